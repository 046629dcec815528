//! What a machine has used, as the kernel counts: for its cgroup where it does that, else for its processes.
//!
//! This module must not know what a hypervisor is: what its guest's disks did, that tells itself.

use std::{fs, path::PathBuf};

use blixard::pb::common::v1::{IoCounters, NetworkCounters, VmUsage};
use futures::future::BoxFuture;

use super::{block, cgroup::Cgroup, procfs::ProcessId};

/// A clock tick in microseconds: the kernel tells programs of a hundred a second, whatever it counts in itself (`USER_HZ`).
const TICK_US: u64 = 10_000;
const BYTES_PER_KIB: u64 = 1024;
/// The interfaces of this thread's network namespace, which `/sys/class/net` need not show.
const INTERFACES: &str = "/proc/thread-self/net/dev";

/// How a driver's hypervisor tells what its guest's disks did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counters {
    /// The name of its API's socket.
    pub(super) socket: &'static str,
    /// Asks there, and does not wait for long; `None`: it does not tell.
    pub(super) ask: fn(PathBuf) -> BoxFuture<'static, Option<IoCounters>>,
}

/// What these processes, which may be in a cgroup, have used. Blocking.
pub(super) fn of_machine(processes: &[ProcessId], cgroup: Option<&Cgroup>) -> VmUsage {
    let [by_cgroup, by_processes] = [cgroup.map(of_cgroup).unwrap_or_default(), of_processes(processes)];
    VmUsage {
        cpu_time_us: by_cgroup.cpu_time_us.or(by_processes.cpu_time_us),
        cpu_user_time_us: by_cgroup.cpu_user_time_us.or(by_processes.cpu_user_time_us),
        cpu_system_time_us: by_cgroup.cpu_system_time_us.or(by_processes.cpu_system_time_us),
        memory_bytes: by_cgroup.memory_bytes.or(by_processes.memory_bytes),
        // Of the same kind as what it is the peak of.
        memory_peak_bytes: if by_cgroup.memory_bytes.is_some() { by_cgroup } else { by_processes }.memory_peak_bytes,
        threads: by_cgroup.threads.or(by_processes.threads),
        storage: by_cgroup.storage.or(by_processes.storage),
        ..VmUsage::default()
    }
}

fn of_cgroup(cgroup: &Cgroup) -> VmUsage {
    let cpu = cgroup.read("cpu.stat").unwrap_or_default();
    let number = |file: &str| cgroup.read(file)?.trim().parse().ok();
    VmUsage {
        cpu_time_us: value(&cpu, "usage_usec"),
        cpu_user_time_us: value(&cpu, "user_usec"),
        cpu_system_time_us: value(&cpu, "system_usec"),
        memory_bytes: number("memory.current"),
        memory_peak_bytes: number("memory.peak"),
        threads: number("pids.current").and_then(|threads| threads.try_into().ok()),
        storage: cgroup.read("io.stat").map(|stat| storage(&stat, block::is_made_of_others)),
        ..VmUsage::default()
    }
}

/// What an `io.stat` has: a line for each disk, "8:0 rbytes=1 wbytes=2 rios=3 wios=4 …". What a disk made of others did is in their lines.
fn storage(stat: &str, is_made_of_others: impl Fn(&str) -> bool) -> IoCounters {
    let disks = stat.lines().filter_map(|line| line.split_once(' ')).filter(|(disk, _)| !is_made_of_others(disk));
    let fields: Vec<(&str, u64)> = disks
        .flat_map(|(_, fields)| fields.split(' '))
        .filter_map(|field| field.split_once('=').and_then(|(name, value)| Some((name, value.parse().ok()?))))
        .collect();
    let sum = |wanted: &str| fields.iter().filter(|(name, _)| *name == wanted).map(|(_, value)| value).sum();
    IoCounters {
        read_bytes: sum("rbytes"),
        written_bytes: sum("wbytes"),
        reads: Some(sum("rios")),
        writes: Some(sum("wios")),
    }
}

/// What one process has used, and the children that it has seen end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    user_us: u64,
    system_us: u64,
    threads: u32,
    /// Bytes resident now, and at most.
    memory: Option<(u64, u64)>,
    /// Bytes read and written.
    io: Option<(u64, u64)>,
}

impl Used {
    /// `None`: it has ended.
    fn of(process: &ProcessId) -> Option<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", process.pid)).ok();
        let stat = read("stat")?;
        Self::parse(process, &stat, &read("status").unwrap_or_default(), &read("io").unwrap_or_default())
    }

    fn parse(process: &ProcessId, stat: &str, status: &str, io: &str) -> Option<Self> {
        // The fields behind the name, which may hold anything, from the third on (`man 5 proc`).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        if field(22)? != process.start_time {
            return None;
        }
        Some(Self {
            user_us: (field(14)? + field(16)?) * TICK_US,
            system_us: (field(15)? + field(17)?) * TICK_US,
            threads: field(20)?.try_into().ok()?,
            memory: value(status, "VmRSS")
                .zip(value(status, "VmHWM"))
                .map(|(now, most)| (now * BYTES_PER_KIB, most * BYTES_PER_KIB)),
            io: value(io, "read_bytes").zip(value(io, "write_bytes")),
        })
    }
}

fn of_processes(processes: &[ProcessId]) -> VmUsage {
    let used: Vec<Used> = processes.iter().filter_map(Used::of).collect();
    if used.is_empty() {
        return VmUsage::default();
    }
    let (user, system) =
        (used.iter().map(|used| used.user_us).sum::<u64>(), used.iter().map(|used| used.system_us).sum::<u64>());
    let memory: Vec<(u64, u64)> = used.iter().filter_map(|used| used.memory).collect();
    // Some other user's can't be read: then none is told.
    let io: Option<Vec<(u64, u64)>> = used.iter().map(|used| used.io).collect();
    VmUsage {
        cpu_time_us: Some(user + system),
        cpu_user_time_us: Some(user),
        cpu_system_time_us: Some(system),
        memory_bytes: Some(memory.iter().map(|(now, _)| now).sum()),
        memory_peak_bytes: Some(memory.iter().map(|(_, most)| most).sum()),
        threads: Some(used.iter().map(|used| used.threads).sum()),
        storage: io.map(|io| IoCounters {
            read_bytes: io.iter().map(|(read, _)| read).sum(),
            written_bytes: io.iter().map(|(_, written)| written).sum(),
            reads: None,
            writes: None,
        }),
        ..VmUsage::default()
    }
}

/// What has gone through a TAP. Blocking.
pub(super) fn of_tap(tap: &str) -> Option<NetworkCounters> {
    network(&fs::read_to_string(INTERFACES).ok()?, tap)
}

fn network(interfaces: &str, tap: &str) -> Option<NetworkCounters> {
    let mut lines = interfaces.lines().filter_map(|line| line.trim_start().split_once(':'));
    let (_, counters) = lines.find(|(name, _)| *name == tap)?;
    let counters: Vec<u64> = counters.split_ascii_whitespace().map_while(|value| value.parse().ok()).collect();
    // What the TAP receives, the guest has sent.
    let [
        sent_bytes,
        sent_packets,
        _,
        sent_dropped,
        ..,
        received_bytes,
        received_packets,
        _,
        received_dropped,
        _,
        _,
        _,
        _,
    ] = counters[..]
    else {
        return None;
    };
    Some(NetworkCounters { sent_bytes, sent_packets, sent_dropped, received_bytes, received_packets, received_dropped })
}

/// A number behind its name: "usage_usec 7", "VmRSS:     7 kB".
fn value(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix([' ', ':']))?;
    value.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_counts_and_what_it_does_not_its_processes_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        let cgroup = Cgroup::at(dir.path().to_owned());
        let own = super::super::procfs::stat(std::process::id()).expect("this process runs").id;
        let by_processes = of_machine(&[own], Some(&cgroup));
        assert!(by_processes.memory_bytes.expect("told") > 0 && by_processes.threads.expect("told") > 0);
        assert!(by_processes.memory_peak_bytes >= by_processes.memory_bytes);
        assert_eq!(by_processes.storage.as_ref().and_then(|storage| storage.reads), None, "they count no operations");

        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).expect("writes");
        write("cpu.stat", "usage_usec 5000003\nuser_usec 3000001\nsystem_usec 2000002\nnr_periods 0\n");
        let usage = of_machine(&[own], Some(&cgroup));
        assert_eq!(usage.cpu_time_us, Some(5_000_003));
        assert_eq!((usage.cpu_user_time_us, usage.cpu_system_time_us), (Some(3_000_001), Some(2_000_002)));
        assert!(usage.memory_bytes.is_some());

        write("memory.current", "73400320\n");
        write("pids.current", "9\n");
        write("io.stat", "");
        let usage = of_machine(&[own], Some(&cgroup));
        assert_eq!((usage.memory_bytes, usage.memory_peak_bytes), (Some(73_400_320), None), "an old kernel's");
        assert_eq!(usage.threads, Some(9));
        assert_eq!(usage.storage, Some(IoCounters { reads: Some(0), writes: Some(0), ..IoCounters::default() }));
        write("memory.peak", "83886080\n");
        assert_eq!(of_machine(&[], Some(&cgroup)).memory_peak_bytes, Some(83_886_080));
        assert_eq!(of_machine(&[], None), VmUsage::default());
    }

    #[test]
    fn what_a_volume_did_is_counted_once() {
        let stat = "8:0 rbytes=4096 wbytes=100 rios=1 wios=2 dbytes=0 dios=0\n\
                    253:1 rbytes=4096 wbytes=100 rios=1 wios=2 dbytes=0 dios=0\n\
                    7:0 \n\
                    259:0 rbytes=1 wbytes=10 rios=100 wios=1000 dbytes=7 dios=7\n";
        let expected = IoCounters { read_bytes: 4097, written_bytes: 110, reads: Some(101), writes: Some(1002) };
        assert_eq!(storage(stat, |disk| disk == "253:1"), expected);
    }

    #[test]
    fn a_process_has_used_what_its_children_used() {
        let process = ProcessId { pid: 12, start_time: 9876 };
        let stat = "12 (a) b) S 1 12 7 0 -1 4194304 1 2 3 4 50 6 700 8 20 0 3 0 9876 1 1";
        let status = "Name:\tVmRSS\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n";
        let io = "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\n";
        let used = Used {
            user_us: 7_500_000,
            system_us: 140_000,
            threads: 3,
            memory: Some((2_048_000, 3_072_000)),
            io: Some((4096, 8192)),
        };
        assert_eq!(Used::parse(&process, stat, status, io), Some(used));
        assert_eq!(Used::parse(&process, stat, "", ""), Some(Used { memory: None, io: None, ..used }));
        let other = ProcessId { start_time: 9877, ..process };
        assert_eq!(Used::parse(&other, stat, status, io), None, "another process has its pid");
        assert_eq!(Used::parse(&process, "12 (x) S", status, io), None);
    }

    #[test]
    fn what_a_tap_receives_its_guest_has_sent() {
        let interfaces = "Inter-|   Receive                                                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n\
                lo:       9       9    9    9    9     9          9         9        9       9    9    9    9     9       9          9\n \
             blx1-10:    1000      10    1    2    3     4          5         6    20000     200    7    8    9    10      11         12\n \
             blx1-1:     5 6 7\n";
        let expected = NetworkCounters {
            sent_bytes: 1000,
            sent_packets: 10,
            sent_dropped: 2,
            received_bytes: 20_000,
            received_packets: 200,
            received_dropped: 8,
        };
        assert_eq!(network(interfaces, "blx1-10"), Some(expected));
        assert_eq!(network(interfaces, "blx1-1"), None, "not what it should be");
        assert_eq!(network(interfaces, "blx1"), None);
    }
}
