//! A conversation with QEMU's monitor (QMP: JSON, a message a line), for the moments in which a machine is saved or restored.
//!
//! QEMU connects to a socket of ours, once, at its start. When vmhost hangs up the machine has no monitor any more and none can be had:
//! what is not there cannot be misused. Blocking.
//!
//! QEMU may be its guest's by now. So each command as a whole has a deadline, whatever comes in the meantime, and what comes is bounded.

use std::{
    cell::OnceCell,
    io::{self, Read as _, Write as _},
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

/// How long QEMU may take to connect, and to answer each command: milliseconds, and the rest for a loaded host.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long saving and filling may take: all of its memory is written, or read.
const MEMORY_PATIENCE: Duration = Duration::from_secs(300);
/// The longest message that is listened to. The answers have some hundred bytes.
const MAX_MESSAGE_BYTES: usize = 1024 * 1024;
/// How many events are passed over while an answer is waited for. There are a few.
const MAX_EVENTS: usize = 1000;
/// How much of a refusal is told: it gets into the log, too.
const MAX_REASON_BYTES: usize = 4096;
/// Bytes taken in one read.
const READ_BYTES: usize = 4096;
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
        Qmp::begin(stream, PATIENCE).map_err(cannot("talk to QEMU"))
    }
}

/// One machine's monitor.
pub(super) struct Qmp {
    stream: UnixStream,
    /// What has come and was not looked at yet.
    received: Vec<u8>,
    /// For each command.
    patience: Duration,
}

impl Qmp {
    fn begin(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let mut qmp = Self { stream, received: Vec::new(), patience };
        let deadline = qmp.deadline("QEMU's greeting");
        let greeting = qmp.read(&deadline)?;
        if greeting.get("QMP").is_none() {
            let greeting = greeting.to_string();
            return Err(io::Error::other(format!("this is no monitor of QEMU's: {}", beginning(&greeting))));
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
        let deadline = Deadline::after(MEMORY_PATIENCE, "saving it");
        loop {
            deadline.left()?;
            let answer = self.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = answer["error-desc"].as_str().unwrap_or("it does not say why");
                    return Err(io::Error::other(beginning(why)));
                }
                Some(_) | None => std::thread::sleep(ASK_AGAIN_AFTER),
            }
        }
    }

    /// Fills a machine that was started with `-incoming defer` from an open file. It stands still then.
    pub(super) fn fill(&mut self, file: impl AsFd) -> io::Result<()> {
        self.pass("state", file.as_fd())?;
        self.execute("migrate-incoming", json!({ "uri": "fd:state" }))?;
        let deadline = Deadline::after(MEMORY_PATIENCE, "filling it");
        // QEMU ends when it can't make sense of the file.
        while self.execute("query-status", json!({}))?["status"] == "inmigrate" {
            deadline.left()?;
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

    fn deadline(&self, what: &'static str) -> Deadline {
        Deadline::after(self.patience, what)
    }

    fn execute(&mut self, command: &'static str, arguments: Value) -> io::Result<Value> {
        let deadline = self.deadline(command);
        self.write(&line(command, arguments), &deadline)?;
        self.answer(command, &deadline)
    }

    /// Hands it a descriptor by this name.
    fn pass(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        const COMMAND: &str = "getfd";
        let deadline = self.deadline(COMMAND);
        let descriptors = [descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let line = line(COMMAND, json!({ "fdname": name }));
        self.stream.set_write_timeout(Some(deadline.left()?))?;
        let parts = [io::IoSlice::new(&line)];
        let sent = rustix::net::sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL);
        let sent = sent.map_err(|error| deadline.met_by(error.into()))?;
        self.write(&line[sent..], &deadline)?;
        self.answer(COMMAND, &deadline).map(drop)
    }

    fn write(&mut self, mut line: &[u8], deadline: &Deadline) -> io::Result<()> {
        while !line.is_empty() {
            self.stream.set_write_timeout(Some(deadline.left()?))?;
            match self.stream.write(line) {
                Ok(written) => line = &line[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(deadline.met_by(error)),
            }
        }
        Ok(())
    }

    /// The answer to the one command that is under way; events are passed over.
    fn answer(&mut self, command: &str, deadline: &Deadline) -> io::Result<Value> {
        for _ in 0..=MAX_EVENTS {
            let mut message = self.read(deadline)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let why = beginning(error["desc"].as_str().unwrap_or_default());
                return Err(io::Error::other(format!("{command} was refused: {why}")));
            }
        }
        Err(io::Error::other(format!("QEMU tells of more than {MAX_EVENTS} events and does not answer {command}")))
    }

    /// The next message.
    fn read(&mut self, deadline: &Deadline) -> io::Result<Value> {
        let mut looked_at = 0;
        loop {
            let end = self.received[looked_at..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end {
                let rest = self.received.split_off(looked_at + end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                return Ok(serde_json::from_slice(&line)?);
            }
            looked_at = self.received.len();
            if looked_at > MAX_MESSAGE_BYTES {
                return Err(io::Error::other(format!("QEMU says more than {MAX_MESSAGE_BYTES} bytes in one message")));
            }
            let mut bytes = [0; READ_BYTES];
            self.stream.set_read_timeout(Some(deadline.left()?))?;
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU hung up")),
                Ok(read) => self.received.extend(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(deadline.met_by(error)),
            }
        }
    }
}

/// When something has to be done, however much of it is.
struct Deadline {
    at: Instant,
    patience: Duration,
    /// What is waited for.
    what: &'static str,
}

impl Deadline {
    fn after(patience: Duration, what: &'static str) -> Self {
        Self { at: Instant::now() + patience, patience, what }
    }

    /// How much time is left; an error when there is none.
    fn left(&self) -> io::Result<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.missed()) } else { Ok(left) }
    }

    fn missed(&self) -> io::Error {
        let problem = format!("{} was waited for in vain for {:?}", self.what, self.patience);
        io::Error::new(io::ErrorKind::TimedOut, problem)
    }

    /// What a failed read or write means whose time was what was left.
    fn met_by(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::WouldBlock { self.missed() } else { error }
    }
}

/// As much of a text as is told.
fn beginning(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_REASON_BYTES)]
}

fn line(command: &str, arguments: Value) -> Vec<u8> {
    let mut line = json!({ "execute": command, "arguments": arguments }).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

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
        let result = with(Qmp::begin(ours, PATIENCE));
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

    /// A monitor that greets, is done with the first command, and from then on says this over and over.
    fn goes_on(says: &'static str, patience: Duration) -> io::Error {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let monitor = std::thread::spawn(move || {
            let begun = theirs.write_all(format!("{GREETING}\n{DONE}\n").as_bytes());
            begun.expect("writes");
            // Until nobody listens any more.
            while theirs.write_all(says.as_bytes()).is_ok() {
                if says.len() < 2 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let mut qmp = Qmp::begin(ours, PATIENCE).expect("greets");
        qmp.patience = patience;
        let error = qmp.resume().expect_err("there is no answer");
        drop(qmp);
        monitor.join().expect("it ends");
        error
    }

    #[test]
    fn who_never_comes_to_an_end_is_not_listened_to_for_ever() {
        let dribbles = goes_on(" ", Duration::from_millis(100));
        assert_eq!(dribbles.to_string(), "cont was waited for in vain for 100ms");
        assert_eq!(dribbles.kind(), io::ErrorKind::TimedOut);
        let events = goes_on("{\"event\": \"STOP\"}\n", PATIENCE);
        assert_eq!(events.to_string(), "QEMU tells of more than 1000 events and does not answer cont");
        let long = goes_on("a message without an end", PATIENCE);
        assert_eq!(long.to_string(), "QEMU says more than 1048576 bytes in one message");
    }

    #[test]
    fn who_takes_no_command_is_not_waited_for_for_ever() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        theirs.write_all(format!("{GREETING}\n{DONE}\n").as_bytes()).expect("writes");
        let mut qmp = Qmp::begin(ours, PATIENCE).expect("greets");
        qmp.patience = Duration::from_millis(100);
        // Nobody reads: the commands find no room after a while.
        let long = [("id", "x".repeat(MAX_MESSAGE_BYTES))];
        let error = qmp.plug(&long, "port").expect_err("there is no room");
        assert_eq!(error.to_string(), "device_add was waited for in vain for 100ms");
        drop(theirs);
    }
}
