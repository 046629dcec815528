//! A control plane of a test's own: a process on a directory of its own, which leaves nothing behind.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{mvm_ci, output, processes_mentioning, signal, stdout, tempdir, text, wait_exit, wait_for};

/// A running `mvm-ci`, on the `process` driver unless its flags say otherwise. Dropping it ends its VMs and itself and asserts that nothing is left and no error was logged.
pub(crate) struct Plane {
    dir: TempDir,
    flags: Vec<String>,
    child: Child,
    pub(crate) endpoint: String,
}

impl Plane {
    pub(crate) fn start() -> Self {
        Self::with_flags(&[])
    }

    pub(crate) fn with_flags(flags: &[&str]) -> Self {
        let dir = tempdir();
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        let (child, endpoint) = launch(dir.path(), &flags);
        Self { dir, flags, child, endpoint }
    }

    /// A path in its directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it has logged so far, over all its starts.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(log_path(self.dir.path())).expect("log")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client command against it.
    pub(crate) fn cli<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = mvm_ci(args);
        command.env("BLIXARD_ENDPOINT", &self.endpoint);
        command
    }

    /// What a client command prints with `--output json`.
    #[track_caller]
    pub(crate) fn json<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Value {
        let printed = stdout(self.cli(["--output", "json"].into_iter().chain(args)));
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    }

    /// Waits until a job is in a state.
    #[track_caller]
    pub(crate) fn wait_for_job(&self, id: &str, state: &str) -> Value {
        wait_for(&format!("job {id} to be {state}"), || {
            let job = self.json(["job", "get", id]);
            if job["state"] == state { Ok(job) } else { Err(job.to_string()) }
        })
    }

    /// kill -9, and nothing else.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// SIGTERM, and wait for the orderly end.
    pub(crate) fn stop(&mut self) {
        signal(self.child.id(), Signal::TERM);
        let status = wait_exit(&mut self.child);
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }

    /// Starts it again on the same directory, at another address.
    pub(crate) fn restart(&mut self) {
        (self.child, self.endpoint) = launch(self.dir.path(), &self.flags);
    }

    fn end(&mut self) -> Result<(), String> {
        if self.child.try_wait().map_err(|error| error.to_string())?.is_some() {
            self.restart();
        }
        let stop = output(self.cli(["vm", "stop", "--all", "--force", "--wait"]));
        self.stop();
        if !stop.status.success() {
            return Err(text(&stop.stderr));
        }
        if let Some(line) = self.log().lines().find(|line| line.contains(" ERROR ")) {
            return Err(format!("an error was logged: {line}"));
        }
        let left = processes_mentioning(self.dir.path());
        let held: Vec<_> = std::fs::read_dir(self.path("data/vm-state"))
            .map_err(|error| error.to_string())?
            .flatten()
            // Templates stay.
            .filter(|entry| entry.path().is_dir() && entry.file_name() != ".templates")
            .map(|entry| entry.path())
            .collect();
        if left.is_empty() && held.is_empty() { Ok(()) } else { Err(format!("left: {left:?} {held:?}")) }
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the control plane\n{}", self.log());
            let _ = self.child.kill();
            let _ = self.child.wait();
            for (pid, _) in processes_mentioning(self.dir.path()) {
                signal(pid, Signal::KILL);
            }
        } else if let Err(problem) = self.end() {
            panic!("{problem}\n{}", self.log());
        }
    }
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("stderr.log")
}

/// The command that starts a control plane in `dir`.
pub(crate) fn command(dir: &Path, flags: &[String]) -> Command {
    let mut command = mvm_ci(["--listen", "127.0.0.1:0"]);
    if !flags.iter().any(|flag| flag == "--driver") {
        command.args(["--driver", "process"]);
    }
    command.arg("--data-dir").arg(dir.join("data")).arg("--vm-state-dir").arg(dir.join("data/vm-state"));
    command.args(flags).current_dir(dir);
    command
}

fn launch(dir: &Path, flags: &[String]) -> (Child, String) {
    let path = log_path(dir);
    let log = File::options().create(true).append(true).open(&path).expect("log");
    let begin = log.metadata().expect("log").len();
    let begin = usize::try_from(begin).expect("a short log");
    let mut child = command(dir, flags).stdout(Stdio::null()).stderr(log).spawn().expect("spawn");
    let endpoint = wait_for("the ready line", || {
        let log = std::fs::read(&path).expect("log");
        let log = text(&log[begin..]);
        if let Some(status) = child.try_wait().expect("wait") {
            panic!("it ended with {status}: {log}");
        }
        let (_, after) = log.split_once("Control plane ready listen=").ok_or(log.clone())?;
        after.split_once(' ').map(|(address, _)| format!("http://{address}")).ok_or(log.clone())
    });
    (child, endpoint)
}
