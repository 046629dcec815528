//! What all process-level tests share: running the binary, waiting for a condition, a connection that is cut on purpose.

use std::{
    ffi::OsStr,
    io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

/// How long anything may take on a loaded machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The binary under test, in a directory without configuration files.
pub(crate) fn mvm_ci(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mvm-ci"));
    command.args(args).current_dir("/").stdin(Stdio::null()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// The exit code as a shell would show it.
pub(crate) fn code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|signal| 128 + signal)).expect("an exit code or a signal")
}

/// Runs a command to its end, which must come within the deadline.
pub(crate) fn output(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let pid = child.id();
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if finished.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            signal(pid, rustix::process::Signal::KILL);
        }
    });
    let output = child.wait_with_output().expect("wait");
    drop(done);
    watchdog.join().expect("watchdog");
    output
}

/// What a command wrote to stdout; it must have succeeded.
pub(crate) fn stdout(command: Command) -> String {
    let output = output(command);
    assert!(output.status.success(), "{}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Waits until `look` finds something; the panic shows the last thing that `look` saw instead.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if start.elapsed() > DEADLINE => panic!("waited {DEADLINE:?} for {what}; last seen: {seen}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Waits for a child to end.
#[track_caller]
pub(crate) fn wait_exit(child: &mut Child) -> ExitStatus {
    wait_for("the process to end", || match child.try_wait().expect("wait") {
        Some(status) => Ok(status),
        None => Err("it runs".to_owned()),
    })
}

/// Every process that mentions `needle` in its command line or environment, but this one.
pub(crate) fn processes_mentioning(needle: &Path) -> Vec<(u32, String)> {
    let needle = needle.as_os_str().as_encoded_bytes();
    let mentions = |dir: &Path, file: &str| {
        std::fs::read(dir.join(file)).is_ok_and(|bytes| bytes.windows(needle.len()).any(|part| part == needle))
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let dir = entry.path();
        if pid == std::process::id() || !(mentions(&dir, "cmdline") || mentions(&dir, "environ")) {
            continue;
        }
        let command = std::fs::read(dir.join("cmdline")).unwrap_or_default();
        found.push((pid, text(&command).replace('\0', " ")));
    }
    found
}

/// A forwarder that cuts each connection after so many bytes towards the client.
pub(crate) struct CuttingProxy {
    pub(crate) endpoint: String,
    connections: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl CuttingProxy {
    /// `endpoint`: where to forward to. The proxy ends with the test's process.
    pub(crate) fn start(endpoint: &str, cut_after: usize) -> Self {
        let target = endpoint.trim_start_matches("http://").to_owned();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        let connections = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = connections.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let target = target.clone();
                std::thread::spawn(move || forward(client, &target, cut_after));
            }
        });
        Self { endpoint, connections }
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(std::sync::atomic::Ordering::SeqCst)
    }
}

fn forward(client: std::net::TcpStream, target: &str, cut_after: usize) -> Option<()> {
    let server = std::net::TcpStream::connect(target).ok()?;
    let (mut up_from, mut up_to) = (client.try_clone().ok()?, server.try_clone().ok()?);
    let up = std::thread::spawn(move || {
        let _ = io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(std::net::Shutdown::Both);
    });
    let mut limited = io::Read::take(&server, cut_after as u64);
    let _ = io::copy(&mut limited, &mut &client);
    let _ = client.shutdown(std::net::Shutdown::Both);
    let _ = server.shutdown(std::net::Shutdown::Both);
    up.join().ok()
}

/// A directory of its own for each test, removed at its end.
pub(crate) fn tempdir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("mvm-ci-").tempdir().expect("tempdir")
}

/// Bytes that look like nothing in particular, the same each time.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state >> 56).expect("eight bits")
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A file that a test writes for a process it starts.
pub(crate) fn write(path: PathBuf, content: &str) -> PathBuf {
    std::fs::write(&path, content).expect("write");
    path
}
