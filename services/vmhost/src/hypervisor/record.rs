//! What a launch leaves in its directory so that a later vmhost can take the machine over: `machine.json`.
//!
//! It is written before the first process is started and again after each one. When vmhost dies in between, the
//! processes' environment still says whose they are (see [`super::procfs::Marks`]).
//!
//! A process writes its environment over as it likes. So where another's mark would protect a process, it is the record that counts: a
//! hypervisor can't write one that anybody believes.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use blixard::id::VmId;
use rustix::fs::OFlags;

use super::{
    Launch, MarkedProcess,
    procfs::{self, ProcessId},
};

const FILE: &str = "machine.json";
/// No record is longer: two processes and two paths.
const MAX_BYTES: u64 = 64 * 1024;
/// Who else may write to a file, in its mode.
const OTHERS_WRITE: u32 = 0o022;

/// A machine's processes as recorded.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Record {
    pub(super) vm_id: VmId,
    /// The driver that launched it.
    pub(super) driver: String,
    /// The host's boot in which it was launched.
    boot_id: String,
    /// The user that its processes are; `None`: vmhost's.
    #[serde(default)]
    pub(super) user: Option<u32>,
    /// The cgroup that they are in, if any.
    #[serde(default)]
    pub(super) cgroup: Option<PathBuf>,
    /// Main process first.
    pub(super) processes: Vec<RecordedProcess>,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct RecordedProcess {
    /// What it is: "qemu".
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) id: ProcessId,
}

impl Record {
    /// Begins a launch. Fails when the directory has been launched into before: two machines must never share one.
    pub(super) fn begin(launch: &Launch, driver: &str) -> io::Result<Self> {
        File::create_new(path(&launch.dir))?;
        let record = Self {
            vm_id: launch.vm_id,
            driver: driver.to_owned(),
            boot_id: procfs::boot_id()?,
            user: launch.user,
            cgroup: launch.cgroup.clone(),
            processes: Vec::new(),
        };
        record.write(&launch.dir)?;
        Ok(record)
    }

    /// Adds a process and writes the record.
    pub(super) fn add(&mut self, dir: &Path, name: &str, id: ProcessId, main: bool) -> io::Result<()> {
        let process = RecordedProcess { name: name.to_owned(), id };
        self.processes.insert(if main { 0 } else { self.processes.len() }, process);
        self.write(dir)
    }

    /// The record in a directory, if it is whole and of this boot of the host.
    pub(super) fn read(dir: &Path) -> Option<Self> {
        Self::parse(&fs::read(path(dir)).ok()?)
    }

    /// The same in a directory that a process names which is not to be trusted: only if it is a plain file of root's or of this process's
    /// user, to which nobody else may write. Nothing that can be put there instead is followed, waited for or read without end.
    fn read_named(dir: &Path) -> Option<Self> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path(dir)).ok()?;
        let metadata = file.metadata().ok()?;
        let believed = [0, rustix::process::geteuid().as_raw()].contains(&metadata.uid());
        if !metadata.is_file() || !believed || metadata.mode() & OTHERS_WRITE != 0 {
            return None;
        }
        let mut text = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut text).ok()?;
        Self::parse(&text)
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let record: Self = serde_json::from_slice(text).ok()?;
        (record.boot_id == procfs::boot_id().ok()?).then_some(record)
    }

    fn has(&self, process: ProcessId) -> bool {
        self.processes.iter().any(|recorded| recorded.id == process)
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        // No fsync: the record is worth something only while the host stays up, and then the page cache has it.
        let new = dir.join("machine.json.new");
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new);
        file?.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, path(dir))
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Whether a process of this user is another VM's, of this node's or another's: the directory that it names has a record of that VM, written by
/// whoever may start processes as other users, in which this process stands. To name a directory alone is nothing.
pub(super) fn is_of_another(process: ProcessId, user: u32) -> bool {
    let vouches = |record: Record| record.user == Some(user) && record.has(process);
    procfs::marked_dirs(process.pid).iter().any(|dir| Record::read_named(dir).is_some_and(vouches))
}

impl MarkedProcess {
    /// Whether it stands in the record of the directory that it names; `None`: there is none. Blocking.
    pub(crate) fn is_on_record(&self) -> Option<bool> {
        Record::read(&self.dir).map(|record| record.has(self.id))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{PermissionsExt as _, chown, symlink},
        process::{Child, Command, Stdio},
    };

    use super::*;

    fn launch(dir: &Path) -> Launch {
        Launch {
            vm_id: VmId::random(),
            image: "default".to_owned(),
            vcpus: 1,
            memory_mib: 128,
            dir: dir.to_owned(),
            nic: None,
            user: Some(4711),
            cgroup: Some("/sys/fs/cgroup/vm".into()),
            io_max: None,
            disks: vec![],
        }
    }

    #[test]
    fn a_record_reads_back_and_a_directory_is_launched_into_once() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(Record::read(dir.path()), None);
        let mut record = Record::begin(&launch(dir.path()), "qemu").expect("begins");
        record.add(dir.path(), "helper", ProcessId { pid: 2, start_time: 1 }, false).expect("writes");
        record.add(dir.path(), "qemu", ProcessId { pid: 3, start_time: 2 }, true).expect("writes");
        assert_eq!(record.processes[0].name, "qemu");
        assert_eq!(Record::read(dir.path()), Some(record));
        assert!(Record::begin(&launch(dir.path()), "qemu").is_err());
    }

    #[test]
    fn a_torn_record_or_one_of_another_boot_counts_as_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut record = Record::begin(&launch(dir.path()), "qemu").expect("begins");
        record.boot_id = "another".to_owned();
        record.write(dir.path()).expect("writes");
        assert_eq!(Record::read(dir.path()), None);
        fs::write(path(dir.path()), b"{\"vm_id\":").expect("writes");
        assert_eq!(Record::read(dir.path()), None);
    }

    /// A process that says that it is of the machine in this directory.
    struct Marked(Child);

    impl Marked {
        fn start(dir: &Path) -> Self {
            let mut command = Command::new("sleep");
            command.arg("600").env(procfs::ENV_VM_DIR, dir).stdin(Stdio::null());
            Self(command.spawn().expect("sleep runs"))
        }

        fn id(&self) -> ProcessId {
            procfs::stat(self.0.id()).expect("it runs").id
        }
    }

    impl Drop for Marked {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_is_of_another_only_if_a_record_says_so_that_it_can_not_have_written() {
        let root = tempfile::tempdir().expect("tempdir");
        let dir = root.path().join("machine");
        fs::create_dir(&dir).expect("mkdir");
        let process = Marked::start(&dir);
        let (id, user) = (process.id(), 4711);
        assert!(!is_of_another(id, user), "it names a directory, and nobody else does");
        let mut record = Record::begin(&launch(&dir), "qemu").expect("begins");
        let other_start = ProcessId { start_time: id.start_time + 1, ..id };
        record.add(&dir, "qemu", other_start, true).expect("writes");
        assert!(!is_of_another(id, user), "another process had that pid");
        record.add(&dir, "qemu", id, true).expect("writes");
        assert!(is_of_another(id, user));
        assert!(!is_of_another(id, user + 1), "it should not be that user's");

        // What a hostile process could put there.
        let (file, beside) = (dir.join(FILE), root.path().join("beside"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o602)).expect("chmod");
        assert!(!is_of_another(id, user), "anybody may write to it");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
        assert!(is_of_another(id, user));
        if chown(&file, Some(user), Some(user)).is_ok() {
            assert!(!is_of_another(id, user), "its own user's");
            chown(&file, Some(0), Some(0)).expect("chown");
        }
        fs::rename(&file, &beside).expect("renames");
        symlink(&beside, &file).expect("links");
        assert!(!is_of_another(id, user), "it leads elsewhere");
        fs::remove_file(&file).expect("unlinks");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0).expect("mkfifo");
        assert!(!is_of_another(id, user), "and nobody waits for a FIFO");
    }
}
