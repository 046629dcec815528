//! A real agent process on a Unix socket, driven through the generated client.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use blixard::{
    id::{JobId, VmId},
    limits,
    pb::{
        common::v1::{self as pbc, LogStream},
        guest::v1::{self as pb, guest_service_client::GuestServiceClient, run_request, run_response::Message},
    },
    time::Timestamp,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// Generous: the machine may be busy with something else.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) type Client = GuestServiceClient<Channel>;

/// An agent of its own, ended with the test.
pub(crate) struct Agent {
    pub(crate) vm_id: VmId,
    pub(crate) client: Client,
    pub(crate) socket: PathBuf,
    pub(crate) dir: tempfile::TempDir,
    child: Child,
}

impl Agent {
    /// Starts an agent and connects.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = dir.path().join("agent.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_blixard-guest-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the agent starts");
        let mut line = String::new();
        BufReader::new(child.stderr.take().expect("piped")).read_line(&mut line).expect("the agent speaks");
        assert!(line.contains("serves on unix:"), "{line}");
        let client = connect(&socket);
        Self { vm_id: VmId::random(), client, socket, dir, child }
    }

    /// Starts one that has an identity.
    pub(crate) async fn configured() -> Self {
        let mut agent = Self::start().await;
        let request = agent.configure_request();
        agent.client.configure(request).await.expect("configured");
        agent
    }

    pub(crate) fn configure_request(&self) -> pb::ConfigureRequest {
        pb::ConfigureRequest {
            vm_id: self.vm_id.to_string(),
            hostname: "vm".into(),
            time: Some(Timestamp::now().into()),
            entropy: vec![7; 64].into(),
            network: None,
            mounts: vec![],
        }
    }

    /// Starts the first attempt of a new job.
    pub(crate) async fn run(&self, command: &[&str]) -> Run {
        Run::open(&mut self.client.clone(), start(JobId::random(), 1, command)).await.expect("accepted")
    }

    /// Runs a shell script to its end.
    pub(crate) async fn shell(&self, script: &str) -> Log {
        self.run(&["sh", "-c", script]).await.finish().await
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Waits for the agent to exit.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        wait_for("the agent's exit", || self.child.try_wait().expect("our child")).await
    }

    /// The processes of this agent's jobs, found as vmhost finds them.
    pub(crate) fn processes(&self) -> Vec<u32> {
        processes_with(&format!("BLIXARD_VM_ID={}", self.vm_id))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for pid in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn connect(socket: &Path) -> Client {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Channel::from_static("http://guest")
        .initial_stream_window_size(8 * 1024 * 1024)
        .initial_connection_window_size(8 * 1024 * 1024)
        .connect_with_connector_lazy(connector);
    GuestServiceClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
}

pub(crate) fn spec(command: &[&str]) -> pbc::JobSpec {
    pbc::JobSpec {
        command: command.iter().map(|&argument| argument.to_owned()).collect(),
        vcpus: Some(1),
        memory_mib: Some(128),
        ..Default::default()
    }
}

pub(crate) fn start(job_id: JobId, attempt: u32, command: &[&str]) -> pb::RunStart {
    pb::RunStart {
        job_id: job_id.to_string(),
        attempt,
        spec: Some(spec(command)),
        resume_offset: 0,
        attach_only: false,
        ..Default::default()
    }
}

/// One stream of one attempt.
pub(crate) struct Run {
    pub(crate) start: pb::RunStart,
    requests: mpsc::UnboundedSender<pb::RunRequest>,
    responses: Streaming<pb::RunResponse>,
}

/// Everything a stream said.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Log {
    pub(crate) bytes: Vec<u8>,
    pub(crate) by_stream: BTreeMap<i32, Vec<u8>>,
    pub(crate) chunks: usize,
    pub(crate) exited: Option<pb::RunExited>,
}

impl Log {
    pub(crate) fn stdout(&self) -> &[u8] {
        self.by_stream.get(&LogStream::Stdout.into()).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn stderr(&self) -> &[u8] {
        self.by_stream.get(&LogStream::Stderr.into()).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn exit(&self) -> pbc::ExitStatus {
        let exited = self.exited.clone().expect("the attempt has ended");
        exited.exit.unwrap_or_else(|| panic!("it was not started: {}", exited.spawn_error))
    }

    pub(crate) fn spawn_error(&self) -> String {
        let exited = self.exited.clone().expect("the attempt has ended");
        assert_eq!(exited.exit, None);
        exited.spawn_error
    }
}

impl Run {
    /// Opens a stream and reads its first message.
    pub(crate) async fn open(client: &mut Client, start: pb::RunStart) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::unbounded_channel();
        let message = run_request::Message::Start(start.clone());
        requests.send(pb::RunRequest { message: Some(message) }).expect("open");
        let responses = client.run(UnboundedReceiverStream::new(receiver)).await?.into_inner();
        let mut run = Self { start, requests, responses };
        let first = run.next().await?;
        assert!(matches!(first, Some(Message::Started(_))), "{first:?}");
        Ok(run)
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Message>, Status> {
        let message = tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("a message in time")?;
        Ok(message.and_then(|response| response.message))
    }

    pub(crate) fn renew(&self, lease_ms: u64) {
        let message = run_request::Message::Renew(pb::RunRenew { lease_ms });
        self.requests.send(pb::RunRequest { message: Some(message) }).expect("open");
    }

    pub(crate) fn acknowledge(&self, offset: u64) {
        let message = run_request::Message::Ack(pb::RunAck { offset });
        // A stream that has ended takes no more acknowledgements.
        let _ = self.requests.send(pb::RunRequest { message: Some(message) });
    }

    /// Reads until `enough` bytes or the end of the stream, without acknowledging.
    pub(crate) async fn read(&mut self, enough: usize) -> Log {
        let mut log = Log::default();
        while log.bytes.len() < enough && log.exited.is_none() {
            match self.next().await.expect("no error") {
                Some(message) => self.take(&mut log, message),
                None => break,
            }
        }
        log
    }

    /// Reads until exactly that many more bytes have come; more would be a fault.
    pub(crate) async fn read_exactly(&mut self, bytes: usize) -> usize {
        let mut seen = 0;
        while seen < bytes {
            match self.next().await.expect("no error") {
                Some(Message::Output(chunk)) => seen += chunk.data.len(),
                other => panic!("wanted output, got {other:?}"),
            }
        }
        seen
    }

    /// Reads to the end of the stream without acknowledging.
    pub(crate) async fn finish_unacknowledged(mut self) -> Log {
        let log = self.read(usize::MAX).await;
        assert_eq!(self.next().await.expect("no error"), None, "Exited is the last message");
        log
    }

    /// Reads and acknowledges to the end.
    pub(crate) async fn finish(mut self) -> Log {
        let mut log = Log::default();
        while let Some(message) = self.next().await.expect("no error") {
            self.take(&mut log, message);
            self.acknowledge(self.start.resume_offset + log.bytes.len() as u64);
        }
        assert!(log.exited.is_some(), "the stream ended without Exited");
        log
    }

    fn take(&self, log: &mut Log, message: Message) {
        match message {
            Message::Output(chunk) => {
                assert_eq!(chunk.offset, self.start.resume_offset + log.bytes.len() as u64, "no gap, no overlap");
                assert!((1..=limits::MAX_LOG_CHUNK).contains(&chunk.data.len()));
                log.bytes.extend(&chunk.data);
                log.by_stream.entry(chunk.stream).or_default().extend(&chunk.data);
                log.chunks += 1;
            }
            Message::Exited(exited) => {
                assert_eq!(exited.end_offset, self.start.resume_offset + log.bytes.len() as u64);
                log.exited = Some(exited);
            }
            Message::Started(_) => panic!("started twice"),
        }
    }
}

/// Polls until there is an answer.
pub(crate) async fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Live processes whose environment holds `variable`.
pub(crate) fn processes_with(variable: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        // That of a zombie is empty.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
    })
    .collect()
}
