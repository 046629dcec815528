//! Processes of the host: told apart by pid and start time, found through `/proc`, held and signalled through pidfds.
//!
//! A pid alone names nothing for long: the kernel gives it to another process. So a process is recorded with its start
//! time, and every signal goes through a pidfd that was opened first and checked against that start time afterwards.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt, fs,
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use blixard::id::VmId;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::{Interest, unix::AsyncFd};

use super::{LaunchError, ProcessExit};

/// Every process of a machine has it in its environment: the VM's id.
pub(super) const ENV_VM_ID: &str = "BLIXARD_VM_ID";
/// Every process of a machine has it in its environment: its launch's directory.
pub(super) const ENV_VM_DIR: &str = "BLIXARD_VM_DIR";

/// The most that the kernel lets a program start with is half of this, arguments included.
const MAX_ENVIRONMENT_BYTES: u64 = 4 * 1024 * 1024;

/// How long a process may take to end after SIGKILL: it must leave the kernel, and QEMU returns its memory.
pub(super) const DEATH_PATIENCE: Duration = Duration::from_secs(30);

/// A process, for as long as the host is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub(super) struct ProcessId {
    pub(super) pid: u32,
    /// Clock ticks between the host's boot and its start.
    pub(super) start_time: u64,
}

/// What `/proc/<pid>/stat` says that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) id: ProcessId,
    /// Whether it has ended and only waits for its parent to notice.
    pub(super) dead: bool,
    /// Whether it is the kernel's own: those that serve a VM are in its cgroup, take no signal, and end with it.
    kernel: bool,
    parent: u32,
    session: u32,
}

/// The flag of a kernel thread (`include/linux/sched.h`).
const PF_KTHREAD: u32 = 0x0020_0000;

/// Reads the state of a process; `None` when there is none of that pid.
pub(super) fn stat(pid: u32) -> Option<Stat> {
    parse_stat(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(pid: u32, text: &str) -> Option<Stat> {
    // The name stands in brackets and may hold anything, brackets and blanks too: the fields begin after the last one.
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    let flags: u32 = fields.nth(2)?.parse().ok()?;
    let threads: u32 = fields.nth(10)?.parse().ok()?;
    let start_time = fields.nth(1)?.parse().ok()?;
    // A thread may outlive the one that the process began with.
    let (dead, kernel) = (matches!(state, "Z" | "X") && threads <= 1, flags & PF_KTHREAD != 0);
    Some(Stat { id: ProcessId { pid, start_time }, dead, kernel, parent, session })
}

/// What is added to the badness of a machine's processes, in thousandths of all memory.
const OOM_SCORE: i32 = 500;

/// Has the kernel, should it run out of memory, take this process and what it starts rather than vmhost or the registry: what becomes of a VM
/// that dies is provided for. It takes no right to make oneself more likely to die.
pub(super) fn sacrifice(pid: u32) {
    let path = format!("/proc/{pid}/oom_score_adj");
    if let Err(error) = fs::write(&path, OOM_SCORE.to_string()) {
        // It has ended, or it is somebody else's by now: whoever waits for it finds out.
        tracing::debug!(path, %error, "a process can't be made the first to go");
    }
}

/// The host's boot: start times of two boots must not be compared.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn running() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(stat).filter(|stat| !stat.dead).collect()
}

/// What a process has in its environment. It may have it anywhere in its memory, and of any length.
fn environment(pid: u32) -> Vec<u8> {
    let mut environment = Vec::new();
    if let Ok(file) = fs::File::open(format!("/proc/{pid}/environ")) {
        // What was read before an error counts.
        let _ = file.take(MAX_ENVIRONMENT_BYTES).read_to_end(&mut environment);
    }
    environment
}

/// The directories of the machines that a process was started for, as its environment says. A hostile one has there what it likes.
pub(super) fn marked_dirs(pid: u32) -> Vec<PathBuf> {
    let mark = [ENV_VM_DIR.as_bytes(), b"="].concat();
    let environment = environment(pid);
    let dirs = environment.split(|&byte| byte == 0).filter_map(|entry| entry.strip_prefix(mark.as_slice()));
    dirs.map(|dir| PathBuf::from(OsStr::from_bytes(dir))).collect()
}

/// What tells a machine's processes from all others.
#[derive(Debug, Clone)]
pub(super) struct Marks {
    environment: [Vec<u8>; 2],
}

impl Marks {
    pub(super) fn new(vm_id: VmId, dir: &Path) -> Self {
        let directory = [ENV_VM_DIR.as_bytes(), b"=", dir.as_os_str().as_bytes()].concat();
        Self { environment: [format!("{ENV_VM_ID}={vm_id}").into_bytes(), directory] }
    }

    /// Whether the process was started for this machine, as its environment says.
    pub(super) fn are_on(&self, pid: u32) -> bool {
        let environment = environment(pid);
        environment.split(|&byte| byte == 0).any(|entry| self.environment.iter().any(|mark| mark == entry))
    }

    /// Every running process of the machine: those that carry the marks, those in the session of one of `roots`, and
    /// all of their descendants. Never this process. With roots, only processes as young as the oldest of them count.
    ///
    /// `roots` are processes that run or have ended just now: a session is known by a pid alone, so the processes of
    /// one that ended long ago cannot be told from those of a stranger with the same pid.
    pub(super) fn find(&self, roots: &[ProcessId]) -> Vec<ProcessId> {
        let oldest = roots.iter().map(|root| root.start_time).min().unwrap_or(0);
        let roots: Vec<ProcessId> =
            roots.iter().copied().filter(|root| stat(root.pid).is_none_or(|stat| stat.id == *root)).collect();
        let own = std::process::id();
        let mut others = running();
        others.retain(|stat| stat.id.pid != own && stat.id.start_time >= oldest);

        let in_session = |stat: &Stat| roots.iter().any(|root| root.pid == stat.session);
        let mut found = Vec::new();
        let mut parents: BTreeSet<u32> = roots.iter().map(|root| root.pid).collect();
        let (mut members, mut rest): (Vec<Stat>, Vec<Stat>) = others
            .into_iter()
            .partition(|stat| roots.contains(&stat.id) || in_session(stat) || self.are_on(stat.id.pid));
        while !members.is_empty() {
            parents.extend(members.iter().map(|stat| stat.id.pid));
            found.extend(members.iter().map(|stat| stat.id));
            (members, rest) = rest.into_iter().partition(|stat| parents.contains(&stat.parent));
        }
        found
    }
}

/// Every running process of a user, whichever way it is that user's. Never this process.
pub(super) fn of_user(user: u32) -> Vec<ProcessId> {
    let own = std::process::id();
    let is_theirs = |stat: &Stat| {
        let status = fs::read_to_string(format!("/proc/{}/status", stat.id.pid)).unwrap_or_default();
        let users = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
        users.split_ascii_whitespace().any(|id| id.parse() == Ok(user))
    };
    let processes = running().into_iter().filter(|stat| stat.id.pid != own);
    processes.filter(is_theirs).map(|stat| stat.id).collect()
}

/// Those of these pids that run. Never this process, nor the kernel's.
pub(super) fn alive(pids: &[u32]) -> Vec<ProcessId> {
    let own = std::process::id();
    let stats = pids.iter().filter(|pid| **pid != own).filter_map(|pid| stat(*pid));
    stats.filter(|stat| !stat.dead && !stat.kernel).map(|stat| stat.id).collect()
}

/// A running process that was started for some VM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MarkedProcess {
    pub(super) id: ProcessId,
    /// The directory of its machine.
    pub dir: PathBuf,
}

impl fmt::Display for MarkedProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.id.pid)).unwrap_or_default();
        write!(f, "{} ({})", self.id.pid, name.trim_end())
    }
}

/// Every running process that was started for a machine below `state_dir`, whether or not that is still there. Blocking: reads
/// all of `/proc`.
#[must_use]
pub fn marked_below(state_dir: &Path) -> Vec<MarkedProcess> {
    let own = std::process::id();
    let dir_of = |pid: u32| marked_dirs(pid).into_iter().find(|dir| dir.starts_with(state_dir));
    let processes = running().into_iter().filter(|stat| stat.id.pid != own);
    processes.filter_map(|stat| Some(MarkedProcess { id: stat.id, dir: dir_of(stat.id.pid)? })).collect()
}

/// Ends exactly these processes; one that has ended, and one that has got the pid since, is left alone.
///
/// # Errors
/// Some did not end, or could not be taken hold of.
pub async fn end_marked(processes: &[MarkedProcess]) -> Result<(), LaunchError> {
    end(&processes.iter().map(|process| process.id).collect::<Vec<_>>()).await
}

/// A process that can be waited for and signalled, whoever's child it is.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Held {
    /// Takes hold of a process; `None` when it is gone or has been reaped. One that has ended but is still listed can
    /// be held: its status is there to be read.
    pub(super) fn open(id: ProcessId) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(id.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // In this order: whatever reused the pid before the pidfd was opened has another start time.
        if stat(id.pid).is_none_or(|stat| stat.id != id) {
            return Ok(None);
        }
        #[expect(deprecated, reason = "its successor is unsafe; sound here: an `OwnedFd` keeps its descriptor")]
        let pidfd = AsyncFd::try_with_interest(pidfd, Interest::READABLE)?;
        Ok(Some(Self { id, pidfd }))
    }

    /// Resolves when the process has ended. Any number may wait.
    pub(super) async fn ended(&self) {
        // A pidfd becomes readable once and stays so. An error means that the runtime is going away: nobody is left
        // who could act on the answer.
        if self.pidfd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether it still runs.
    pub(super) fn runs(&self) -> bool {
        stat(self.id.pid).is_some_and(|stat| stat.id == self.id && !stat.dead)
    }

    pub(super) fn kill(&self) {
        // The only possible error is that it has ended.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// How it ended, taking it from the process table if it is our child. Call after [`Held::ended`].
    pub(super) fn reap(&self) -> ProcessExit {
        use std::os::fd::AsFd as _;
        let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
        let status = rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG).ok().flatten();
        match status {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ProcessExit::Exited(code),
                (None, Some(signal)) => ProcessExit::Signaled(signal),
                (None, None) => ProcessExit::Unknown,
            },
            None => ProcessExit::Unknown,
        }
    }
}

/// Ends every process that `find` finds, and those it finds then, until it finds none; says how many there were.
pub(super) async fn end_all(find: impl Fn() -> Vec<ProcessId> + Send + Clone + 'static) -> Result<usize, LaunchError> {
    let mut ended = 0;
    loop {
        let find = find.clone();
        // Reading /proc takes milliseconds on a busy host.
        let found = tokio::task::spawn_blocking(find).await.unwrap_or_default();
        if found.is_empty() {
            return Ok(ended);
        }
        ended += found.len();
        end(&found).await?;
    }
}

/// Ends these processes and waits until they are gone.
pub(super) async fn end(processes: &[ProcessId]) -> Result<(), LaunchError> {
    let mut held = Vec::with_capacity(processes.len());
    for &process in processes {
        let open = Held::open(process);
        held.extend(open.map_err(|source| LaunchError::Io { action: "open a pidfd".to_owned(), source })?);
    }
    held.iter().for_each(Held::kill);
    let all_ended = async {
        for process in &held {
            process.ended().await;
            process.reap();
        }
    };
    tokio::time::timeout(DEATH_PATIENCE, all_ended).await.map_err(|_| LaunchError::WillNotDie {
        pids: held.iter().filter(|process| process.runs()).map(|process| process.id.pid).collect(),
        seconds: DEATH_PATIENCE.as_secs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_brackets_and_blanks_does_not_confuse_the_parser() {
        let text = "12 (a) b) (c) S 1 12 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 9876 1 1";
        let stat = parse_stat(12, text).expect("parses");
        let id = ProcessId { pid: 12, start_time: 9876 };
        assert_eq!(stat, Stat { id, dead: false, kernel: false, parent: 1, session: 7 });
        let kthread = text.replace("4194304", "2129984");
        assert!(parse_stat(12, &kthread).expect("parses").kernel);
        let leader_gone = text.replace(") S 1", ") Z 1");
        assert!(parse_stat(12, &leader_gone).expect("parses").dead);
        let others_run = leader_gone.replace("20 0 1 0 9876", "20 0 3 0 9876");
        assert!(!parse_stat(12, &others_run).expect("parses").dead, "its other threads run");
        assert_eq!(parse_stat(12, "12 (x"), None);
        assert_eq!(parse_stat(12, "12 (x) S 1"), None);
    }

    #[tokio::test]
    async fn a_process_with_another_start_time_is_another_process() {
        let me = stat(std::process::id()).expect("this process runs").id;
        assert!(Held::open(me).expect("opens").is_some());
        let other = ProcessId { start_time: me.start_time + 1, ..me };
        assert!(Held::open(other).expect("opens").is_none());
    }
}
