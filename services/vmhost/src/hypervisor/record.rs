//! What a launch leaves in its directory so that a later vmhost can take the machine over: `machine.json`.
//!
//! It is written before the first process is started and again after each one. When vmhost dies in between, the
//! processes' environment still says whose they are (see [`super::procfs::Marks`]).

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use blixard::id::VmId;

use super::{
    Launch,
    procfs::{self, ProcessId},
};

const FILE: &str = "machine.json";

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
        fs::File::create_new(path(&launch.dir))?;
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
        let record: Self = serde_json::from_slice(&fs::read(path(dir)).ok()?).ok()?;
        (record.boot_id == procfs::boot_id().ok()?).then_some(record)
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        // No fsync: the record is worth something only while the host stays up, and then the page cache has it.
        let new = dir.join("machine.json.new");
        fs::File::create(&new)?.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, path(dir))
    }
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

#[cfg(test)]
mod tests {
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
}
