//! Looks at this machine: memory in `/proc` and in the control groups above this process, disks by their file systems. Blocking, but short.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Disk, Memory, Observation};
use crate::capacity::meminfo_mib;

/// Where it is looked; a test may say what there is to see.
#[derive(Clone)]
pub struct HostWatch(Arc<dyn Fn() -> Observation + Send + Sync>);

impl fmt::Debug for HostWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostWatch")
    }
}

impl HostWatch {
    /// What this says.
    pub fn new(look: impl Fn() -> Observation + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// This machine, with the file systems that these directories are on.
    pub(crate) fn of_this_machine(dirs: [PathBuf; 2]) -> Self {
        Self::new(move || observe(Path::new("/proc"), Path::new("/sys/fs/cgroup"), &dirs))
    }

    pub(super) fn look(&self) -> Observation {
        (self.0)()
    }
}

/// What can't be read is left out: nothing is done about what is not known.
fn observe(proc: &Path, cgroups: &Path, dirs: &[PathBuf]) -> Observation {
    let stalled_percent = read(&proc.join("pressure/memory")).and_then(|text| stalled(&text)).unwrap_or(0);
    let host = read(&proc.join("meminfo")).and_then(|text| meminfo(&text));
    let host = host.map(|memory| Memory { stalled_percent, ..memory });
    let own = read(&proc.join("self/cgroup")).and_then(|text| own_group(&text, cgroups));
    let groups = own.iter().flat_map(|own| own.ancestors().take_while(|dir| dir.starts_with(cgroups)));
    let memory = host.into_iter().chain(groups.filter_map(group)).collect();
    let disks = dirs.iter().filter_map(|dir| Disk::of(dir).ok()).collect();
    Observation { memory, disks }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn meminfo(text: &str) -> Option<Memory> {
    let (total_mib, available_mib) = (meminfo_mib(text, "MemTotal")?, meminfo_mib(text, "MemAvailable")?);
    Some(Memory { total_mib, available_mib, stalled_percent: 0 })
}

/// `full avg10=12.34 avg60=…`
fn stalled(text: &str) -> Option<u32> {
    let full = text.lines().find_map(|line| line.strip_prefix("full "))?;
    let percent = full.split(' ').find_map(|word| word.strip_prefix("avg10="))?;
    percent.split('.').next()?.parse().ok()
}

/// The directory of the control group (version 2) that this process is in.
fn own_group(text: &str, cgroups: &Path) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(cgroups.join(path))
}

/// A group's memory, if it has a limit. What files have of it goes when it is needed.
fn group(dir: &Path) -> Option<Memory> {
    let number = |name: &str| read(&dir.join(name))?.trim().parse::<u64>().ok();
    let (total, current) = (number("memory.max")?, number("memory.current")?);
    let stat = read(&dir.join("memory.stat")).unwrap_or_default();
    let files = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cached = files("inactive_file ").unwrap_or(0) + files("active_file ").unwrap_or(0);
    let stalled_percent = read(&dir.join("memory.pressure")).and_then(|text| stalled(&text)).unwrap_or(0);
    let available = total.saturating_sub(current).saturating_add(cached).min(total);
    Some(Memory { total_mib: total >> 20, available_mib: available >> 20, stalled_percent })
}

impl Disk {
    /// The file system that a directory is on.
    pub(crate) fn of(dir: &Path) -> io::Result<Self> {
        let space = rustix::fs::statvfs(dir)?;
        Ok(Self {
            total_bytes: space.f_blocks.saturating_mul(space.f_frsize),
            free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
            total_inodes: space.f_files,
            free_inodes: space.f_favail,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn memory_is_read_of_the_machine_and_of_every_group_above_that_has_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, groups) = (dir.path().join("proc"), dir.path().join("cgroup"));
        let psi = "some avg10=50.00 avg60=1.00 avg300=0.00 total=1\nfull avg10=12.99 avg60=0.50 avg300=0.00 total=1\n";
        let meminfo = "MemTotal:       24683432 kB\nMemFree:  1 kB\nMemAvailable:   2048000 kB\nSwapFree: 1 kB\n";
        write(&proc, &[("meminfo", meminfo), ("pressure/memory", psi)]);
        let host = Memory { total_mib: 24104, available_mib: 2000, stalled_percent: 12 };
        assert_eq!(observe(&proc, &groups, &[]).memory, [host], "no control groups");

        write(&proc, &[("self/cgroup", "1:name=systemd:/x\n0::/a/b\n")]);
        let stat = "anon 1\ninactive_file 1048576\nactive_file 2097152\n";
        write(&groups, &[("a/memory.max", "1073741824\n"), ("a/memory.current", "1072693248\n")]);
        write(&groups, &[("a/memory.stat", stat), ("a/b/memory.max", "max\n"), ("a/b/memory.current", "5\n")]);
        let group = Memory { total_mib: 1024, available_mib: 4, stalled_percent: 0 };
        assert_eq!(observe(&proc, &groups, &[]).memory, [host, group]);
    }

    #[test]
    fn what_is_not_there_is_not_told() {
        let nowhere = Path::new("/no/such/directory");
        assert_eq!(observe(nowhere, nowhere, &[nowhere.to_owned()]), Observation::default());
        assert_eq!((meminfo("MemTotal: x kB\n"), stalled("nonsense")), (None, None));
    }

    #[test]
    fn this_machine_has_memory_and_disk() {
        let seen = HostWatch::of_this_machine(["/".into(), "/proc".into()]).look();
        assert!(seen.memory[0].total_mib > seen.memory[0].available_mib && seen.disks[0].total_bytes > 0, "{seen:?}");
    }
}
