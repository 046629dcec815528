//! What this machine can offer to VMs.

use std::{fs, io, thread};

use blixard::error::{Error, Reason};

/// The host keeps this much memory for itself and vmhost, or [`RESERVED_PERCENT`] when that is more.
const RESERVED_MIB: u64 = 512;
/// See [`RESERVED_MIB`].
const RESERVED_PERCENT: u64 = 10;
/// Every VM may have two virtual CPUs, the default, even on a machine with one.
const MIN_VCPUS: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    /// The largest number of virtual CPUs of a VM.
    pub(crate) vcpus: u32,
    /// Memory of all VMs together.
    pub(crate) memory_mib: u64,
}

/// What a machine of so much memory keeps for itself.
pub(crate) fn reserved_mib(total_mib: u64) -> u64 {
    RESERVED_MIB.max(total_mib * RESERVED_PERCENT / 100)
}

impl Capacity {
    /// Looks at this machine.
    pub(crate) fn of_this_machine() -> io::Result<Self> {
        let cpus = thread::available_parallelism()?.get();
        let total = meminfo_mib(&fs::read_to_string("/proc/meminfo")?, "MemTotal")
            .ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
        Ok(Self {
            vcpus: u32::try_from(cpus).unwrap_or(u32::MAX).max(MIN_VCPUS),
            memory_mib: total.saturating_sub(reserved_mib(total)),
        })
    }
}

impl Capacity {
    /// Whether there is room for another VM beside those that are alive. Two schedulers may have promised the same room to two
    /// users: the node has the last word.
    pub(crate) fn room_for(
        &self,
        memory_mib: u32,
        alive: impl Iterator<Item = u32>,
        max_vms: u32,
    ) -> Result<(), Error> {
        let (count, used) = alive.fold((0, 0), |(count, used), memory| (count + 1, used + u64::from(memory)));
        if count >= max_vms {
            let message = format!("this node runs {count} VMs already; it may run {max_vms}");
            return Err(Error::new(Reason::Overloaded, message).with("limit", max_vms));
        }
        if used + u64::from(memory_mib) > self.memory_mib {
            let message = format!("this node's VMs have {used} of its {} MiB already", self.memory_mib);
            return Err(Error::new(Reason::Overloaded, message).with("limit", self.memory_mib));
        }
        Ok(())
    }
}

/// A line of /proc/meminfo.
pub(crate) fn meminfo_mib(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_in_mib() {
        assert_eq!(meminfo_mib("MemTotal:       24683432 kB\nMemFree: 1 kB\n", "MemTotal"), Some(24104));
        assert_eq!(meminfo_mib("nonsense", "MemTotal"), None);
    }

    #[test]
    fn there_is_room_for_as_many_vms_and_as_much_memory_as_the_node_offers() {
        let capacity = Capacity { vcpus: 2, memory_mib: 1024 };
        let room = |memory_mib, alive: &[u32]| capacity.room_for(memory_mib, alive.iter().copied(), 3);
        assert_eq!((room(512, &[256, 256]), room(1024, &[])), (Ok(()), Ok(())));
        assert_eq!(room(513, &[256, 256]).unwrap_err().reason, Reason::Overloaded);
        assert_eq!(room(96, &[96, 96, 96]).unwrap_err().reason, Reason::Overloaded);
    }

    #[test]
    fn this_machine_offers_something() {
        let capacity = Capacity::of_this_machine().unwrap();
        assert!(capacity.vcpus >= 2 && capacity.memory_mib > 0, "{capacity:?}");
    }
}
