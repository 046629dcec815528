//! Whether this machine is short of memory or disk, and what is done about it before the kernel does something. Pure: what was seen, the time
//! and the VMs are handed in; `observe` looks, `keep` carries out.
//!
//! ```text
//!   seen ─► level of memory, level of disk ─┬─ Tight: the node takes no new VM, and says so        None ─► Tight ─► Critical
//!                                           └─ Critical: of memory: VMs are ended, one at a time     ◄── half as much again ──
//!                                              of disk: no attempt begins
//! ```
//! VMs have what [`crate::capacity`] leaves them; the rest is the node's own reserve, and it is that which runs out: at a half of it the node
//! is tight, at a quarter it ends VMs. Those that run nothing go first; then, as lost, the attempt that has the least to lose.

mod keep;
mod observe;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use blixard::{id::VmId, node::HostPressure, time::Timestamp, vm::VmKind};

pub(crate) use self::keep::{LOOK_EVERY, Told, keep, look};
pub use self::observe::HostWatch;

/// Of the file systems' space as much must be free, or [`TIGHT_FREE_BYTES`] if that is less: a log and its artifacts have 1.25 GiB.
const TIGHT_FREE_PERCENT: u64 = 5;
/// See [`TIGHT_FREE_PERCENT`].
const TIGHT_FREE_BYTES: u64 = 4 << 30;
/// The same for what runs already: it may write on, but nothing begins.
const CRITICAL_FREE_PERCENT: u64 = 2;
/// See [`CRITICAL_FREE_PERCENT`].
const CRITICAL_FREE_BYTES: u64 = 1 << 30;
/// While less than the reserve is available: everybody waits for memory for as much of ten seconds. Then the node is tight.
const TIGHT_STALL_PERCENT: u32 = 20;
/// And while it is tight already: then it is critical.
const CRITICAL_STALL_PERCENT: u32 = 40;
/// How long a VM that was told to end may take, the ten seconds of a guest included; then the next one is.
const PATIENCE: Duration = Duration::from_secs(15);
/// From a VM's end until its memory shows in what is available.
const SETTLES: Duration = Duration::from_secs(3);

/// What was seen of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observation {
    /// The machine's memory, and that of each control group above this process that has a limit.
    pub memory: Vec<Memory>,
    /// The file systems of VMs' state and of logs.
    pub disks: Vec<Disk>,
}

/// Memory, and what is left of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub total_mib: u64,
    /// Without swapping.
    pub available_mib: u64,
    /// For how much of the last ten seconds everybody waited for it; 0 where the kernel does not tell.
    pub stalled_percent: u32,
}

/// A file system, and what is left of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// 0: it has no fixed number of them.
    pub total_inodes: u64,
    pub free_inodes: u64,
}

/// How short something is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    #[default]
    None,
    Tight,
    Critical,
}

/// The level of what is left. To leave one takes half as much again, so that a node does not go to and fro.
fn level(before: Level, left: u64, tight: u64, critical: u64) -> Level {
    let below = |limit: u64, held: bool| left < if held { limit + limit / 2 } else { limit };
    if below(critical, before == Level::Critical) {
        Level::Critical
    } else if below(tight, before >= Level::Tight) {
        Level::Tight
    } else {
        Level::None
    }
}

impl Memory {
    fn level(&self, before: Level) -> Level {
        let reserve = crate::capacity::reserved_mib(self.total_mib);
        let by_amount = level(before, self.available_mib, reserve / 2, reserve / 4);
        // Where there is plenty, whoever waits does so for another reason.
        let stalled = if self.available_mib < reserve { self.stalled_percent } else { 0 };
        match by_amount {
            Level::Tight if stalled >= CRITICAL_STALL_PERCENT => Level::Critical,
            Level::None if stalled >= TIGHT_STALL_PERCENT => Level::Tight,
            by_amount => by_amount,
        }
    }
}

impl Disk {
    /// What must stay free for it not to be tight.
    pub(crate) fn reserve_bytes(&self) -> u64 {
        self.least(TIGHT_FREE_PERCENT, TIGHT_FREE_BYTES)
    }

    fn least(&self, percent: u64, most: u64) -> u64 {
        (self.total_bytes / 100 * percent).min(most)
    }

    pub(crate) fn level(&self, before: Level) -> Level {
        let critical = self.least(CRITICAL_FREE_PERCENT, CRITICAL_FREE_BYTES);
        let space = level(before, self.free_bytes, self.reserve_bytes(), critical);
        let inodes = |percent: u64| self.total_inodes / 100 * percent;
        space.max(level(before, self.free_inodes, inodes(TIGHT_FREE_PERCENT), inodes(CRITICAL_FREE_PERCENT)))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB of {} MiB of memory are available", self.available_mib, self.total_mib)?;
        match self.stalled_percent {
            0 => Ok(()),
            stalled => write!(f, ", and {stalled} % of the time everybody waits for it"),
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(f, "{} MiB of {} MiB of disk are free", mib(self.free_bytes), mib(self.total_bytes))?;
        match self.total_inodes {
            0 => Ok(()),
            total => write!(f, ", and {} of {total} inodes", self.free_inodes),
        }
    }
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// It waits for an attempt.
    Nothing,
    /// It runs one.
    Attempt,
    /// It begins or ends.
    Changing,
}

/// A VM of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub id: VmId,
    pub kind: VmKind,
    pub memory_mib: u32,
    pub accepted_at: Timestamp,
    pub doing: Doing,
}

/// What gives memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relief {
    /// End this VM, which runs nothing, once the registry gives it no attempts.
    Retire(VmId),
    /// Kill this VM; its attempt is lost.
    Kill(VmId),
}

/// The machine's state, as far as it was seen.
#[derive(Debug, Clone, Default)]
pub struct Pressure {
    memory: Level,
    disk: Level,
    victim: Option<Victim>,
    /// Who was told since memory became critical, and when.
    told: BTreeMap<VmId, Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Victim {
    id: VmId,
    gone_at: Option<Duration>,
}

impl Pressure {
    /// What is to be told of the node.
    #[must_use]
    pub fn told(&self) -> BTreeSet<HostPressure> {
        let memory = (self.memory >= Level::Tight).then_some(HostPressure::Memory);
        let disk = (self.disk >= Level::Tight).then_some(HostPressure::Disk);
        let full = (self.disk == Level::Critical).then_some(HostPressure::DiskCritical);
        memory.into_iter().chain(disk).chain(full).collect()
    }

    /// How short memory is, and disk.
    #[must_use]
    pub fn levels(&self) -> (Level, Level) {
        (self.memory, self.disk)
    }

    /// Takes what was seen, and the VMs that this node holds.
    pub fn step(&mut self, now: Duration, seen: &Observation, vms: &[Candidate]) -> Option<Relief> {
        self.disk = seen.disks.iter().map(|disk| disk.level(self.disk)).max().unwrap_or_default();
        self.memory = seen.memory.iter().map(|memory| memory.level(self.memory)).max().unwrap_or_default();
        if self.memory < Level::Critical {
            self.told.clear();
            self.victim = None;
            return None;
        }
        if self.is_awaited(now, vms) {
            return None;
        }
        let relief = self.choose(vms);
        self.victim = relief.map(|(Relief::Retire(id) | Relief::Kill(id))| Victim { id, gone_at: None });
        self.told.extend(self.victim.map(|victim| (victim.id, now)));
        relief
    }

    /// Whether what was done last may yet be enough.
    fn is_awaited(&mut self, now: Duration, vms: &[Candidate]) -> bool {
        let Some(victim) = &mut self.victim else { return false };
        if vms.iter().any(|vm| vm.id == victim.id) {
            let told_at = self.told.get(&victim.id).copied().unwrap_or(now);
            return now.saturating_sub(told_at) < PATIENCE;
        }
        let gone_at = *victim.gone_at.get_or_insert(now);
        now.saturating_sub(gone_at) < SETTLES
    }

    /// The VM that costs least. One that was told and is still there is told again only when all have been.
    fn choose(&mut self, vms: &[Candidate]) -> Option<Relief> {
        let untold = |vm: &&Candidate| !self.told.contains_key(&vm.id);
        let of = |doing| vms.iter().filter(move |vm| vm.doing == doing).filter(untold);
        // A service VM is warm for somebody, a fresh one waits for its job: the largest, then the oldest.
        let worth = |vm: &&Candidate| (vm.kind == VmKind::Ephemeral, u32::MAX - vm.memory_mib, vm.accepted_at, vm.id);
        if let Some(vm) = of(Doing::Nothing).min_by_key(worth) {
            return Some(Relief::Retire(vm.id));
        }
        // The youngest has the least to lose; how long the attempt of a service VM has run its age does not tell.
        let youth = |vm: &&Candidate| (vm.kind == VmKind::Ephemeral, vm.accepted_at, vm.id);
        if let Some(vm) = of(Doing::Attempt).max_by_key(youth) {
            return Some(Relief::Kill(vm.id));
        }
        self.told.clear();
        None
    }
}

#[cfg(test)]
mod tests;
