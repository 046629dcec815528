//! What this node knows about its VMs, on disk.
//!
//! ```text
//! VM_STATE_DIR/.lock               held by the one vmhost that may use the directory
//!              <vm>/vm.json        the VM: config, whether its end is wanted, what it came to
//!              <vm>/attempt.json   its latest attempt; how that ended is the last record of the attempt's log
//!              <vm>/machine/       the hypervisor's
//!              .templates/         see `templates`
//! ```
//! A VM's record is written beside its place, flushed and renamed, *before* it is acted on. What only refines it (a boot id, an end) is
//! renamed, too, but not flushed: that survives the death of vmhost. The death of the whole machine is the death of its VMs, and an
//! attempt that a VM may have had by then is reported as lost, whether or not it is remembered. So an attempt's record is not flushed
//! either, and where it fits into a page it is written over the last one: a new file for each job costs a tenth of the job's time.
//!
//! Nothing here knows processes, guests or the registry.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, FileExt},
    path::{Path, PathBuf},
};

use blixard::{
    id::{JobId, VmId},
    time::Timestamp,
    vm::{VmConfig, VmShape, VmState},
};
use rustix::fs::{FlockOperation, flock};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    absent::{DELETED, gone},
    blocking::blocking,
    containment::Place,
    lifecycle::{Cause, Stop},
    net::Lease,
    resize::Shapes,
};

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct VmRecord {
    /// What it is made of.
    pub(crate) config: VmConfig,
    /// When this node accepted it.
    pub(crate) accepted_at: Timestamp,
    /// The host's boot in which it was accepted: what was not flushed is believed only during the same one.
    pub(crate) host_boot: String,
    /// The guest's boot, from when on the registry may have been told Ready.
    pub(crate) guest_boot: Option<String>,
    /// Its end is wanted.
    pub(crate) stop: Option<Stop>,
    /// Its addresses; `None`: it has no network.
    #[serde(default)]
    pub(crate) lease: Option<Lease>,
    /// Its user and cgroup.
    #[serde(default)]
    pub(crate) place: Place,
    /// Its shapes, where that in the config is not all.
    #[serde(default)]
    pub(crate) shapes: Shapes,
    /// What it came to: all that is left is to report it.
    pub(crate) end: Option<(VmState, String)>,
}

impl VmRecord {
    /// The shape that it has.
    pub(crate) fn shape(&self) -> VmShape {
        self.shapes.now.unwrap_or(self.config.shape())
    }

    /// The room that it may take: while it is being given another shape, or nobody can tell which it has, that of the largest.
    pub(crate) fn room(&self) -> VmShape {
        self.shapes.room(self.shape())
    }
}

/// An attempt that a VM was given.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct AttemptRecord {
    pub(crate) job: JobId,
    pub(crate) attempt: u32,
    /// 0: none.
    pub(crate) timeout_ms: u64,
    /// Why it is being ended.
    pub(crate) cause: Option<Cause>,
    /// When this node was given it.
    #[serde(default)]
    pub(crate) arrived_at: Timestamp,
    /// How long it may take from then to its start; 0: no limit.
    #[serde(default)]
    pub(crate) start_timeout_ms: u64,
    /// Files that are kept when its command has ended.
    #[serde(default)]
    pub(crate) artifacts: Vec<String>,
}

/// Every VM's directory. Holds the lock.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: File,
}

/// Why a state directory can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Another process has it.
    #[error("the VM state directory {} is in use by process {pid}: choose another with VM_STATE_DIR or --vm-state-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who has it.
        pid: String,
    },
    /// It can't be made or opened.
    #[error("cannot use the VM state directory {}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl StateDir {
    /// Opens the directory, making it when it is not there, and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path.join(".lock"));
        let mut lock = lock.map_err(failed)?;
        if let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(failed(error.into()));
            }
            let mut pid = String::new();
            let _ = lock.read_to_string(&mut pid);
            return Err(OpenError::InUse { path, pid: pid.trim().to_owned() });
        }
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
        writeln!(lock, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The VMs that have a directory.
    pub(crate) fn list(&self) -> io::Result<Vec<VmId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            ids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<VmId>().ok()));
        }
        Ok(ids)
    }

    /// Whose what lies at or below `path` is.
    pub(crate) fn owner(&self, path: &Path) -> Option<VmId> {
        let name = path.strip_prefix(&self.path).ok()?.components().next()?.as_os_str().to_str()?;
        name.strip_suffix(DELETED).map_or(name, |name| name.trim_end_matches('.')).parse().ok()
    }

    /// Everything of VMs that lies in it, what is being deleted, too.
    pub(crate) fn entries(&self) -> io::Result<Vec<(VmId, PathBuf)>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            entries.extend(self.owner(&path).map(|id| (id, path)));
        }
        Ok(entries)
    }

    /// One VM's directory.
    pub(crate) fn vm(&self, id: VmId) -> VmDir {
        VmDir { path: self.path.join(id.to_string()) }
    }
}

/// One VM's directory. In it there may be large disks, and whatever a machine has left: deleting takes its time, and is done where it holds up nobody.
#[derive(Debug, Clone)]
pub(crate) struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// Makes it, and an empty one for the machine; what an earlier life left there is removed.
    pub(crate) async fn create(&self) -> io::Result<()> {
        self.blocking(|dir| {
            dir.delete()?;
            DirBuilder::new().mode(0o700).recursive(true).create(dir.machine())
        })
        .await
    }

    /// Where the hypervisor keeps what it needs.
    pub(crate) fn machine(&self) -> PathBuf {
        self.path.join("machine")
    }

    /// An empty one for the machine, in place of the one that there is.
    pub(crate) async fn renew_machine(&self) -> io::Result<()> {
        self.blocking(|dir| {
            dir.delete_machine()?;
            DirBuilder::new().mode(0o700).create(dir.machine())
        })
        .await
    }

    /// Removes the machine's part of it.
    pub(crate) async fn remove_machine(&self) -> io::Result<()> {
        self.blocking(Self::delete_machine).await
    }

    /// Removes all of it. The VM's record goes last: a crash in between leaves a VM that is found again.
    pub(crate) async fn remove(&self) -> io::Result<()> {
        self.blocking(Self::delete).await
    }

    fn delete_machine(&self) -> io::Result<()> {
        gone(fs::remove_dir_all(self.machine()))
    }

    fn delete(&self) -> io::Result<()> {
        self.delete_machine()?;
        gone(fs::remove_file(self.path.join(ATTEMPT)))?;
        gone(fs::remove_dir_all(&self.path))
    }

    async fn blocking(&self, work: impl FnOnce(&Self) -> io::Result<()> + Send + 'static) -> io::Result<()> {
        let dir = self.clone();
        blocking(move || work(&dir)).await
    }

    /// The VM's record; `None` when there is none.
    pub(crate) fn vm(&self) -> io::Result<Option<VmRecord>> {
        read(&self.path.join(VM))
    }

    /// The latest attempt's record; `None` when there is none.
    pub(crate) fn attempt(&self) -> io::Result<Option<AttemptRecord>> {
        // Behind a record there may be the rest of a longer one.
        read_first(&self.path.join(ATTEMPT))
    }

    /// Writes the VM's record and waits for the disk.
    pub(crate) async fn intend_vm(&self, record: &VmRecord) -> io::Result<()> {
        flushed(self.path.join(VM), serde_json::to_vec(record)?).await
    }

    /// Refines the VM's record, without waiting for the disk.
    pub(crate) fn note_vm(&self, record: &VmRecord) -> io::Result<()> {
        note(&self.path.join(VM), record)
    }

    /// Writes an attempt's record, or refines it, without waiting for the disk.
    pub(crate) fn note_attempt(&self, record: &AttemptRecord) -> io::Result<()> {
        let (path, text) = (self.path.join(ATTEMPT), serde_json::to_vec(record)?);
        if text.len() >= PAGE { replace(&path, &text, false) } else { write_over(&path, text) }
    }
}

/// The kernel copies so much in one step, which no signal interrupts.
const PAGE: usize = 4096;
const VM: &str = "vm.json";
const ATTEMPT: &str = "attempt.json";

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let text = contents(path)?;
    text.map(|text| serde_json::from_slice(&text)).transpose().map_err(Into::into)
}

/// The first record of a file.
fn read_first<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let Some(text) = contents(path)? else { return Ok(None) };
    serde_json::Deserializer::from_slice(&text).into_iter().next().transpose().map_err(Into::into)
}

fn contents(path: &Path) -> io::Result<Option<Vec<u8>>> {
    gone(fs::read(path).map(Some))
}

/// Writes a page at most over what a file begins with, in one step. What it held behind that stays there.
fn write_over(path: &Path, mut text: Vec<u8>) -> io::Result<()> {
    text.push(b'\n');
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    let written = file.write_at(&text, 0)?;
    if written == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn note(path: &Path, record: &impl Serialize) -> io::Result<()> {
    replace(path, &serde_json::to_vec(record)?, false)
}

async fn flushed(path: PathBuf, text: Vec<u8>) -> io::Result<()> {
    blocking(move || replace(&path, &text, true)).await
}

fn replace(path: &Path, text: &[u8], flush: bool) -> io::Result<()> {
    let beside = path.with_extension("tmp");
    let mut file = File::create(&beside)?;
    file.write_all(text)?;
    if flush {
        file.sync_data()?;
    }
    fs::rename(&beside, path)
}

/// The id of the host's current boot.
pub(crate) fn host_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_has_one_user_and_the_second_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
        drop(first);
        StateDir::open(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn the_latest_attempt_is_read_back_whatever_was_there_before() {
        let dir = tempfile::tempdir().unwrap();
        let vm = StateDir::open(dir.path()).unwrap().vm(VmId::random());
        vm.create().await.unwrap();
        assert_eq!(vm.attempt().unwrap(), None);
        let record = |attempt, artifacts: &[&str]| AttemptRecord {
            job: JobId::random(),
            attempt,
            timeout_ms: 0,
            cause: None,
            arrived_at: Timestamp(1),
            start_timeout_ms: 0,
            artifacts: artifacts.iter().map(ToString::to_string).collect(),
        };
        let long = "x".repeat(3 * PAGE);
        for artifacts in [&[][..], &["/a/longer/one"], &[], &[&long], &["/short"], &[]] {
            let record = record(7, artifacts);
            vm.note_attempt(&record).unwrap();
            assert_eq!(vm.attempt().unwrap(), Some(record));
        }
    }

    #[test]
    fn deleting_holds_up_nobody_else_of_its_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let vm = StateDir::open(dir.path()).unwrap().vm(VmId::random());
            vm.create().await.unwrap();
            for (deletes, left) in [("machine", true), ("all", false)] {
                fs::create_dir_all(vm.machine().join("run")).unwrap();
                // The one thread that may block is taken: nothing is deleted until it is free.
                let (free, taken) = std::sync::mpsc::channel::<()>();
                let taken = tokio::task::spawn_blocking(move || taken.recv());
                let deleting = async { if left { vm.remove_machine().await } else { vm.remove().await } };
                let mut deleting = std::pin::pin!(deleting);
                assert!(futures::poll!(&mut deleting).is_pending(), "{deletes}: it was not waited for");
                assert!(vm.machine().join("run").exists(), "{deletes}: by this thread");
                free.send(()).unwrap();
                taken.await.unwrap().unwrap();
                deleting.await.unwrap();
                assert!(!vm.machine().exists(), "{deletes}");
                assert_eq!(vm.path.exists(), left, "{deletes}");
            }
        });
    }

    #[test]
    fn a_directory_that_can_not_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = StateDir::open(&file.join("below")).unwrap_err().to_string();
        assert!(error.contains("file/below"), "{error}");
    }
}
