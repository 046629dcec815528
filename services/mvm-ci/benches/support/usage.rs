//! What processes and the machine spend, from /proc.

use std::fs;

/// Of USER_HZ, which is 100 on Linux, wherever programs can see it.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds, as of now.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    busy: f64,
    idle: f64,
}

impl Usage {
    /// Of the machine, all cores.
    pub fn of_machine() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let numbers = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
        let ticks: Vec<f64> = numbers.map(|number| number.parse().unwrap_or_default()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal, …; guest time is in user.
        let at = |index: usize| ticks.get(index).copied().unwrap_or_default() / TICKS_PER_SECOND;
        Self { busy: at(0) + at(1) + at(2) + at(5) + at(6) + at(7), idle: at(3) + at(4) }
    }

    /// Of a process, without its children.
    pub fn of_process(pid: u32) -> Self {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        // utime and stime are the 14th and 15th, and two fields are before the rest.
        let ticks = after_name.split_whitespace().skip(11).take(2);
        let ticks: f64 = ticks.filter_map(|number| number.parse::<f64>().ok()).sum();
        Self { busy: ticks / TICKS_PER_SECOND, idle: 0.0 }
    }

    /// Seconds of CPU since then.
    pub fn since(self, before: Self) -> f64 {
        self.busy - before.busy
    }

    /// How much of the machine was busy since then, 0 to 1.
    pub fn share_since(self, before: Self) -> f64 {
        let (busy, idle) = (self.busy - before.busy, self.idle - before.idle);
        busy / (busy + idle).max(f64::MIN_POSITIVE)
    }
}

/// Resident memory of a process, in KiB.
pub fn resident_kib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or_default()
}
