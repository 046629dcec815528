//! The processes of the guest's job: reaping them, signalling them all, knowing when none is left.
//!
//! Every process below the agent belongs to its one live attempt: the agent is PID 1 or a *child subreaper*, so what a
//! job leaves behind becomes the agent's own child and nothing can leave the tree by forking twice or by opening
//! sessions and groups of its own. "No children left" (ECHILD) therefore means that the attempt holds no process at all.
//!
//! Not covered, in the process driver only: a process that a job starts through somebody else's daemon (`at`, `docker`)
//! is that daemon's; and between listing and signalling a grandchild its id could in theory be given to a new process.
//! As PID 1 neither exists: one `kill(-1)` reaches everything at once.

use std::{collections::BTreeMap, fs, io, sync::Mutex, time::Duration};

use blixard::job::{ExitKind, ExitStatus};
use rustix::process::getpid;
use tokio::sync::{oneshot, watch};

/// How long SIGKILL is given before a process is taken for unkillable (stuck in the kernel).
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How often SIGKILL is repeated meanwhile, for those that were being born during the last round.
const KILL_AGAIN_EVERY: Duration = Duration::from_millis(20);

/// A process id.
pub(crate) type Pid = i32;

/// How the agent finds the processes of its jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// It is PID 1 of a guest: everything but itself.
    WholeGuest,
    /// It is a subreaper: everything below itself.
    Descendants,
}

/// Reaps children and tells who waits for one, or for all.
#[derive(Debug)]
pub(crate) struct Processes {
    reach: Reach,
    waiting: Mutex<BTreeMap<Pid, oneshot::Sender<ExitStatus>>>,
    childless: watch::Sender<bool>,
}

impl Processes {
    /// Nothing runs yet.
    #[must_use]
    pub(crate) fn new(reach: Reach) -> Self {
        Self { reach, waiting: Mutex::default(), childless: watch::Sender::new(true) }
    }

    /// Must be called before the runtime can reap again after a spawn: without an `await` in between.
    pub(crate) fn exit_of(&self, pid: Pid) -> oneshot::Receiver<ExitStatus> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(pid, sender);
        self.childless.send_replace(false);
        receiver
    }

    /// Reaps every child that has ended. To be called at each SIGCHLD.
    pub(crate) fn reap(&self) {
        let mut ended = Vec::new();
        let childless = loop {
            match wait_any() {
                Ok(Some(child)) => ended.push(child),
                Ok(None) => break false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // ECHILD: there are none.
                Err(_) => break true,
            }
        };
        self.childless.send_replace(childless);
        for (pid, status) in ended {
            if let Some(waiting) = self.lock().remove(&pid) {
                // Nobody listening means that the attempt's task is gone: the agent is going down.
                let _ = waiting.send(status);
            }
        }
    }

    /// Waits until no process of a job is left; `false` when `patience` ran out first.
    pub(crate) async fn none_left(&self, patience: Duration) -> bool {
        let mut childless = self.childless.subscribe();
        tokio::time::timeout(patience, childless.wait_for(|&childless| childless)).await.is_ok()
    }

    /// Sends a signal to every process of the job.
    pub(crate) fn signal_all(&self, signal: i32) {
        match self.reach {
            Reach::WholeGuest => send(-1, signal),
            Reach::Descendants => {
                for pid in descendants() {
                    send(pid, signal);
                }
            }
        }
    }

    /// Ends every process of the job; `false` when some survive even SIGKILL.
    pub(crate) async fn kill_all(&self) -> bool {
        let mut waited = Duration::ZERO;
        while waited < KILL_PATIENCE {
            self.signal_all(libc::SIGKILL);
            if self.none_left(KILL_AGAIN_EVERY).await {
                return true;
            }
            waited += KILL_AGAIN_EVERY;
        }
        false
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Pid, oneshot::Sender<ExitStatus>>> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn send(pid: Pid, signal: i32) {
    // SAFETY: kill(2) takes two integers and touches no memory of ours. -1 is passed by PID 1 only, which it spares.
    // (No safe wrapper sends real-time signals.) A process that has just ended is no error.
    #[expect(unsafe_code, reason = "rustix and nix know named signals only; the contract has all 64")]
    unsafe {
        libc::kill(pid, signal);
    }
}

/// One child that has ended, or `None` while all still run.
fn wait_any() -> io::Result<Option<(Pid, ExitStatus)>> {
    let mut status = 0;
    // SAFETY: both pointers are to live, writable values of the right types; wait4 fills them or leaves them alone, and
    // all zeroes is a valid rusage.
    #[expect(unsafe_code, reason = "no safe wrapper returns the resources that a child used")]
    let (pid, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage), usage)
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some((pid, exit_status(status, &usage)))),
    }
}

fn exit_status(status: i32, usage: &libc::rusage) -> ExitStatus {
    let kind = if libc::WIFSIGNALED(status) {
        ExitKind::Signal(libc::WTERMSIG(status))
    } else {
        ExitKind::Code(libc::WEXITSTATUS(status))
    };
    ExitStatus {
        kind,
        user_time_ms: milliseconds(usage.ru_utime),
        system_time_ms: milliseconds(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    }
}

fn milliseconds(time: libc::timeval) -> u64 {
    u64::try_from(time.tv_sec * 1000 + time.tv_usec / 1000).unwrap_or(0)
}

/// Every process below this one, parents before children.
fn descendants() -> Vec<Pid> {
    let mut children: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(parent) = fs::read(entry.path().join("stat")).ok().and_then(|stat| parent_of(&stat)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![getpid().as_raw_nonzero().get()];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found.split_off(1)
}

/// The parent in a line of `/proc/PID/stat`: the second field after the name, which may itself hold parentheses.
fn parent_of(stat: &[u8]) -> Option<Pid> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let fields = std::str::from_utf8(&stat[after_name..]).ok()?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_a_name_with_parentheses_and_bytes_of_any_encoding() {
        assert_eq!(parent_of(b"12 (sh) S 7 12 12 0"), Some(7));
        assert_eq!(parent_of(b"12 (a) S 99 \xff(b)) R 7 12 12 0"), Some(7));
        assert_eq!(parent_of(b"12"), None);
    }

    #[test]
    fn a_status_is_a_code_or_a_signal() {
        // SAFETY: all zeroes is a valid rusage.
        #[expect(unsafe_code, reason = "plain C data")]
        let usage: libc::rusage = unsafe { std::mem::zeroed() };
        assert_eq!(exit_status(7 << 8, &usage).kind, ExitKind::Code(7));
        assert_eq!(exit_status(9, &usage).kind, ExitKind::Signal(9));
        assert_eq!(exit_status(libc::SIGSEGV | 0x80, &usage).kind, ExitKind::Signal(libc::SIGSEGV));
    }
}
