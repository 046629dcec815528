//! A conversation with QEMU's monitor (QMP: JSON, a message a line), for the moments in which a machine is saved or restored.
//!
//! QEMU connects to a socket of ours, once, at its start. When vmhost hangs up the machine has no monitor any more and none can be had:
//! what is not there cannot be misused. Blocking.

use std::{
    cell::OnceCell,
    io::{self, BufRead as _, BufReader, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use super::{
    LaunchError,
    machine::{Starting, cannot},
};

/// How long QEMU may take to connect and to answer: milliseconds, and the rest for a loaded host.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two questions how far it is.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(2);

/// Where QEMU is expected.
pub(super) struct Expected {
    listener: UnixListener,
    path: PathBuf,
}

impl Expected {
    /// Listens at `path`.
    pub(super) fn at(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Waits for QEMU, which has been started. Nobody else can come afterwards.
    pub(super) fn met(self, starting: &Starting) -> Result<Qmp, LaunchError> {
        let met = OnceCell::new();
        let connected = || self.listener.accept().is_ok_and(|(stream, _)| met.set(stream).is_ok());
        starting.wait_until("reach QEMU's monitor", PATIENCE, connected)?;
        std::fs::remove_file(&self.path).map_err(cannot("take QEMU's monitor away"))?;
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let stream = met.into_inner().ok_or_else(gone).map_err(cannot("reach QEMU's monitor"))?;
        Qmp::begin(stream).map_err(cannot("talk to QEMU"))
    }
}

/// One machine's monitor.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    fn begin(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::other(format!("this is no monitor of QEMU's: {greeting}")));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Saves the machine, which stands still from then on, into an open file.
    pub(super) fn save(&mut self, file: impl AsFd) -> io::Result<()> {
        self.execute("stop", json!({}))?;
        // It limits itself to what a network is thought to bear.
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 }))?;
        self.pass("state", file.as_fd())?;
        self.execute("migrate", json!({ "uri": "fd:state" }))?;
        loop {
            let answer = self.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = answer["error-desc"].as_str().unwrap_or("it does not say why").to_owned();
                    return Err(io::Error::other(why));
                }
                Some(_) | None => std::thread::sleep(ASK_AGAIN_AFTER),
            }
        }
    }

    /// Fills a machine that was started with `-incoming defer` from an open file. It stands still then.
    pub(super) fn fill(&mut self, file: impl AsFd) -> io::Result<()> {
        self.pass("state", file.as_fd())?;
        self.execute("migrate-incoming", json!({ "uri": "fd:state" }))?;
        let deadline = Instant::now() + PATIENCE;
        // QEMU ends when it can't make sense of the file.
        while self.execute("query-status", json!({}))?["status"] == "inmigrate" {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(ASK_AGAIN_AFTER);
        }
        Ok(())
    }

    /// Adds a device at this port.
    pub(super) fn plug(&mut self, device: &[(&'static str, String)], port: &str) -> io::Result<()> {
        let device = device.iter().map(|(name, value)| ((*name).to_owned(), value.as_str().into()));
        let mut arguments: serde_json::Map<String, Value> = device.collect();
        arguments.insert("bus".to_owned(), port.into());
        self.execute("device_add", arguments.into()).map(drop)
    }

    /// Lets the machine go on.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        self.execute("cont", json!({})).map(drop)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        self.stream.get_mut().write_all(&line(command, arguments))?;
        self.answer(command)
    }

    /// Hands it a descriptor by this name.
    fn pass(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let descriptors = [descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let line = line("getfd", json!({ "fdname": name }));
        let sent = rustix::net::sendmsg(
            self.stream.get_ref(),
            &[io::IoSlice::new(&line)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        self.stream.get_mut().write_all(&line[sent..])?;
        self.answer("getfd").map(drop)
    }

    /// The answer to the one command that is under way; events are passed over.
    fn answer(&mut self, command: &str) -> io::Result<Value> {
        loop {
            let mut message = self.read()?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let why = error["desc"].as_str().unwrap_or_default();
                return Err(io::Error::other(format!("{command} was refused: {why}")));
            }
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU hung up"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn line(command: &str, arguments: Value) -> Vec<u8> {
    let mut line = json!({ "execute": command, "arguments": arguments }).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor that gives these answers, one a request, and what it was asked.
    fn talk<T>(answers: &'static [&'static str], with: impl FnOnce(io::Result<Qmp>) -> T) -> (T, Vec<String>) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let monitor = std::thread::spawn(move || {
            let mut stream = BufReader::new(theirs);
            let mut asked = Vec::new();
            for answer in answers {
                stream.get_mut().write_all(format!("{answer}\n").as_bytes()).expect("writes");
                let mut line = String::new();
                if stream.read_line(&mut line).unwrap_or(0) == 0 {
                    break;
                }
                let request: Value = serde_json::from_str(&line).expect("JSON");
                asked.push(request["execute"].as_str().expect("a command").to_owned());
            }
            asked
        });
        let result = with(Qmp::begin(ours));
        (result, monitor.join().expect("it ends"))
    }

    const GREETING: &str = r#"{"QMP": {"version": {}}}"#;
    const DONE: &str = r#"{"return": {}}"#;

    #[test]
    fn a_machine_is_saved_once_it_stands_still_and_events_are_passed_over() {
        const EVENT: &str = "{\"event\": \"STOP\"}\n{\"return\": {}}";
        const UNDER_WAY: &str = r#"{"return": {"status": "active"}}"#;
        const COMPLETED: &str = r#"{"return": {"status": "completed"}}"#;
        let answers = &[GREETING, DONE, EVENT, DONE, DONE, DONE, UNDER_WAY, COMPLETED];
        let file = tempfile::tempfile().expect("a file");
        let (result, asked) = talk(answers, |qmp| qmp.expect("greets").save(&file));
        result.expect("is saved");
        let migrate = ["migrate-set-parameters", "getfd", "migrate", "query-migrate", "query-migrate"];
        assert_eq!(asked, [&["qmp_capabilities", "stop"][..], &migrate].concat());
    }

    #[test]
    fn what_it_refuses_and_why_is_told() {
        const REFUSED: &str = r#"{"error": {"class": "GenericError", "desc": "not while the moon is full"}}"#;
        let file = tempfile::tempfile().expect("a file");
        let (result, _) = talk(&[GREETING, DONE, DONE, REFUSED], |qmp| qmp.expect("greets").fill(&file));
        assert_eq!(result.unwrap_err().to_string(), "migrate-incoming was refused: not while the moon is full");
        const FAILED: &str = r#"{"return": {"status": "failed", "error-desc": "No space left on device"}}"#;
        let answers = &[GREETING, DONE, DONE, DONE, DONE, DONE, FAILED];
        let (result, _) = talk(answers, |qmp| qmp.expect("greets").save(&file));
        assert_eq!(result.unwrap_err().to_string(), "No space left on device");
        let (result, _) = talk(&[r#"{"hello": 1}"#], |qmp| qmp.map(drop));
        assert!(result.unwrap_err().to_string().starts_with("this is no monitor of QEMU's"));
    }

    #[test]
    fn a_machine_that_ends_while_it_is_restored_is_an_error_at_once() {
        let file = tempfile::tempfile().expect("a file");
        let (result, _) = talk(&[GREETING, DONE, DONE], |qmp| qmp.expect("greets").fill(&file));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
