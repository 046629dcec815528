//! A node's disk: what a vmhost wrote there is there at its next start. A write that is waited for has arrived when the wait is
//! over, and may have arrived before; one that is not waited for survives the process, but perhaps not the machine.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::Duration,
};

use blixard::{
    id::{JobId, VmId},
    time::Timestamp,
    vm::{VmConfig, VmState},
};
use blixard_vmhost::lifecycle::{Cause, Outcome, Stop};

use crate::kernel::{Instant, Kernel};

/// `vm.json`.
#[derive(Debug, Clone)]
pub struct VmRecord {
    pub config: VmConfig,
    pub host_boot: u64,
    pub guest_boot: Option<u64>,
    pub stop: Option<Stop>,
    pub end: Option<(VmState, String)>,
}

/// `attempt.json`.
#[derive(Debug, Clone)]
pub struct AttemptRecord {
    pub job: JobId,
    pub attempt: u32,
    pub timeout_ms: u64,
    pub cause: Option<Cause>,
    pub arrived_at: Timestamp,
    pub start_timeout_ms: u64,
}

/// The last record of an attempt's log.
#[derive(Debug, Clone)]
pub struct EndRecord {
    pub outcome: Outcome,
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

/// A VM's directory.
#[derive(Debug, Clone, Default)]
pub struct VmDir {
    pub vm: Option<VmRecord>,
    pub attempt: Option<AttemptRecord>,
}

/// What the fence says to an attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Fence {
    Open,
    Running,
    Ended,
    Stale { current: u32 },
}

/// See the module.
pub struct Disk {
    kernel: Kernel,
    slow_until: Cell<Instant>,
    dirs: RefCell<BTreeMap<VmId, VmDir>>,
    /// What of them would survive a loss of power.
    synced: RefCell<BTreeMap<VmId, VmDir>>,
    logs: RefCell<BTreeMap<JobId, BTreeMap<u32, Option<EndRecord>>>>,
}

impl Disk {
    /// An empty one.
    pub fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            slow_until: Cell::default(),
            dirs: RefCell::default(),
            synced: RefCell::default(),
            logs: RefCell::default(),
        }
    }

    /// It gets slow for a while.
    pub fn slow_down(&self, until: Instant) {
        self.slow_until.set(until);
    }

    async fn wait(&self) {
        let slow = self.kernel.now() < self.slow_until.get();
        let (least, most) = if slow { (100, 6000) } else { (0, 4) };
        self.kernel.sleep(self.kernel.between(Duration::from_millis(least), Duration::from_millis(most))).await;
    }

    /// Writes, and waits until that has arrived.
    async fn write(&self, id: VmId, change: impl Fn(&mut VmDir)) {
        let early = self.kernel.random(|random| random.per_mille(500));
        if early {
            change(self.dirs.borrow_mut().entry(id).or_default());
        }
        self.wait().await;
        change(self.dirs.borrow_mut().entry(id).or_default());
        change(self.synced.borrow_mut().entry(id).or_default());
    }

    pub async fn intend_vm(&self, id: VmId, record: &VmRecord) {
        self.write(id, |dir| dir.vm = Some(record.clone())).await;
    }

    pub async fn intend_attempt(&self, id: VmId, record: &AttemptRecord) {
        self.write(id, |dir| dir.attempt = Some(record.clone())).await;
    }

    pub fn note_vm(&self, id: VmId, record: &VmRecord) {
        self.dirs.borrow_mut().entry(id).or_default().vm = Some(record.clone());
    }

    pub fn note_attempt(&self, id: VmId, record: &AttemptRecord) {
        self.dirs.borrow_mut().entry(id).or_default().attempt = Some(record.clone());
    }

    pub fn remove(&self, id: VmId) {
        self.dirs.borrow_mut().remove(&id);
    }

    pub fn dirs(&self) -> Vec<(VmId, VmDir)> {
        self.dirs.borrow().iter().map(|(id, dir)| (*id, dir.clone())).collect()
    }

    /// The power fails: of each directory whose last change was not waited for, that may be gone.
    pub fn lose_power(&self) {
        let mut dirs = self.dirs.borrow_mut();
        let synced = self.synced.borrow();
        for (id, old) in &*synced {
            if self.kernel.random(|random| random.per_mille(300)) {
                dirs.insert(*id, old.clone());
            }
        }
    }

    /// Directories that are gone for good need no memory.
    pub fn forget(&self, id: VmId) {
        self.synced.borrow_mut().remove(&id);
    }

    pub fn highest(&self, job: JobId) -> Option<u32> {
        self.logs.borrow().get(&job).and_then(|logs| logs.keys().next_back().copied())
    }

    pub fn begin_log(&self, job: JobId, attempt: u32) {
        self.logs.borrow_mut().entry(job).or_default().entry(attempt).or_default();
    }

    pub fn log_end(&self, job: JobId, attempt: u32) -> Option<EndRecord> {
        self.logs.borrow().get(&job).and_then(|logs| logs.get(&attempt).cloned().flatten())
    }

    pub async fn finish_log(&self, job: JobId, attempt: u32, end: EndRecord) -> EndRecord {
        if let Some(known) = self.log_end(job, attempt) {
            return known;
        }
        let write = || {
            self.logs.borrow_mut().entry(job).or_default().insert(attempt, Some(end.clone()));
        };
        if self.kernel.random(|random| random.per_mille(500)) {
            write();
        }
        self.wait().await;
        write();
        end
    }
}
