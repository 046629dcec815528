//! A cgroup (version 2) for each VM: what its hypervisor may take of the machine, and a list of its processes that none of them can leave.
//!
//! ```text
//!   where vmhost is ─┬─ blixard-vmhost       vmhost itself, where the kernel wants it in a leaf
//!                    └─ blixard-<tag>        this node's; there while one of its VMs is
//!                         ├─ <vm>            its hypervisor's processes: cpu.max, memory.max, pids.max, io.max
//!                         └─ <vm>
//! ```
//! The tag tells nodes on one machine apart, and only what lies below it and is named as a VM is ever ended or removed. Controllers that the
//! machine does not have for version 2 are done without: processes are grouped all the same, and `cgroup.kill` ends them.
//!
//! This module must not know what a hypervisor is.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt, fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blixard::id::VmId;

use crate::absent::gone;

use super::block::Device;

/// What this node's cgroup is called, with its tag behind.
const PREFIX: &str = "blixard-";
/// Where vmhost goes when the cgroup that it was started in must have no processes of its own: only a leaf may, once controllers are handed
/// down. systemd puts it there by itself with `DelegateSubgroup=blixard-vmhost`.
const LEAF: &str = "blixard-vmhost";
/// What is wanted of the kernel. `io` has a limit only where one is set: by itself it has VMs share the disk evenly, and all of them together
/// get as much as vmhost.
const WANTED: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// How long a cgroup may stay busy after its last process has ended.
const EMPTY_PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries to remove it.
const REMOVE_RETRY: Duration = Duration::from_millis(1);
/// How often a cgroup is made again below a parent that goes with the last VM of somebody else just then.
const MAKE_TRIES: usize = 100;
/// `cpu.max` counts in periods of this length: the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;
const BYTES_PER_MIB: u64 = 1024 * 1024;
/// Why a VM was killed that had not used more memory than it may.
pub(super) const HOST_OUT_OF_MEMORY: &str = "the host ran out of memory";
/// Of a disk, in `io.max`.
const NO_IO_LIMIT: &str = "rbps=max wbps=max riops=max wiops=max";

/// How much each VM may use of a disk, reading and writing counted apart. 0: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimit {
    /// MiB a second.
    pub mib_per_second: u32,
    /// Operations a second.
    pub operations_per_second: u32,
}

/// The same of a disk that is known: a line of `io.max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoMax {
    disk: Device,
    limit: DiskLimit,
}

impl fmt::Display for IoMax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DiskLimit { mib_per_second, operations_per_second } = self.limit;
        let max = |limit: u64| if limit == 0 { "max".to_owned() } else { limit.to_string() };
        let (bytes, operations) =
            (max(u64::from(mib_per_second) * BYTES_PER_MIB), max(u64::from(operations_per_second)));
        write!(f, "{} rbps={bytes} wbps={bytes} riops={operations} wiops={operations}", self.disk)
    }
}

/// What a VM's processes may take together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// CPUs.
    pub(super) cpus: u32,
    /// Memory in MiB, page cache and what the kernel keeps for them included. Nothing of it is swapped: it holds secrets.
    pub(super) memory_mib: u64,
    /// Threads.
    pub(super) threads: u32,
    /// What they may use of the disk; `None`: as much as their share is.
    pub(super) io: Option<IoMax>,
}

impl Limits {
    /// The files to write, each with its value.
    fn files(self) -> Vec<(&'static str, String)> {
        let quota = u64::from(self.cpus) * CPU_PERIOD_US;
        let mut files = vec![
            ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
            ("memory.max", (self.memory_mib * BYTES_PER_MIB).to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("memory.oom.group", "1".to_owned()),
            ("pids.max", self.threads.to_string()),
        ];
        files.extend(self.io.map(|io| ("io.max", io.to_string())));
        files
    }
}

/// Where the cgroups of a node's VMs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    dir: PathBuf,
    /// What the kernel counts and limits there.
    controllers: BTreeSet<String>,
    /// How VMs are limited in the use of their disk, if they are to be; or why they can't be.
    io: Result<Option<IoMax>, String>,
}

impl Cgroups {
    /// Those of the node with this tag, ready for use. Nothing of them is made yet. The limit is for the disk that the files in `state_dir`
    /// are on.
    ///
    /// # Errors
    /// Why there can't be any, in words.
    pub fn open(tag: &str, limit: DiskLimit, state_dir: &Path) -> Result<Self, String> {
        let base = base()?;
        let controllers = hand_down(&base)?;
        let dir = base.join(format!("{PREFIX}{tag}"));
        // Whether it may: the answer that counts is the kernel's.
        make(&dir).map_err(|error| format!("no cgroup can be made in {}: {error}", base.display()))?;
        let kind = fs::read_to_string(dir.join("cgroup.type")).unwrap_or_default();
        let io = limit_io(&dir, limit, state_dir);
        // Not while an earlier vmhost's VMs are in it.
        let _ = fs::remove_dir(&dir);
        if kind.trim_end() != "domain" {
            return Err(format!("{} takes no processes below it, only threads", base.display()));
        }
        Ok(Self { dir, controllers, io })
    }

    /// What there would be, without making anything: the controllers.
    pub(crate) fn look() -> Result<BTreeSet<String>, String> {
        let base = base()?;
        let writable = rustix::fs::access(base.join("cgroup.procs"), rustix::fs::Access::WRITE_OK);
        writable.map_err(|error| format!("no cgroup can be made in {}: {error}", base.display()))?;
        Ok(wanted(&base.join("cgroup.controllers")))
    }

    /// The cgroup of a VM, whether or not it is there.
    #[must_use]
    pub fn of(&self, vm_id: VmId) -> PathBuf {
        self.dir.join(vm_id.to_string())
    }

    /// All that are there. Whatever is not named as a VM is not ours.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn list(&self) -> io::Result<Vec<(VmId, PathBuf)>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let vm_id = path.file_name().and_then(OsStr::to_str).and_then(|name| name.parse().ok());
            found.extend(vm_id.map(|vm_id| (vm_id, path)));
        }
        Ok(found)
    }

    /// In a few words, for the log.
    #[must_use]
    pub fn describe(&self) -> String {
        let io = match &self.io {
            Ok(None) => String::new(),
            Ok(Some(io)) => format!("; io.max: {io}"),
            Err(why) => format!("; no limit for the disk: {why}"),
        };
        format!("cgroups in {} ({}{io})", self.dir.display(), Self::in_words(&self.controllers))
    }

    /// Whether the kernel limits everything that it should.
    #[must_use]
    pub fn limits_all(&self) -> bool {
        Self::is_all(&self.controllers) && self.io.is_ok()
    }

    /// What each VM may use of its disk, if that is limited.
    pub(crate) fn io_max(&self) -> Option<IoMax> {
        self.io.as_ref().ok().copied().flatten()
    }

    /// Whether these are all the controllers that are wanted.
    pub(crate) fn is_all(there: &BTreeSet<String>) -> bool {
        WANTED.iter().all(|wanted| there.contains(*wanted))
    }

    /// Which controllers there are and which are missing.
    pub(crate) fn in_words(there: &BTreeSet<String>) -> String {
        let (has, lacks): (Vec<&str>, Vec<&str>) = WANTED.iter().partition(|wanted| there.contains(**wanted));
        match (has.is_empty(), lacks.is_empty()) {
            (false, true) => format!("limits: {}", has.join(", ")),
            (false, false) => format!("limits: {}; not: {}", has.join(", "), lacks.join(", ")),
            (true, _) => format!("no limits: version 2 lacks the controllers {}", lacks.join(", ")),
        }
    }
}

/// One VM's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes it and sets its limits. One that was there before is used: it is the VM's.
    pub(super) fn make(&self, limits: Limits) -> io::Result<()> {
        let node = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        for _ in 0..MAKE_TRIES {
            make(node)?;
            match enable(node).and_then(|()| make(&self.path)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(()) => return self.limit(limits),
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Sets its limits, as far as it is there.
    pub(super) fn limit(&self, limits: Limits) -> io::Result<()> {
        for (file, value) in limits.files() {
            let file = self.path.join(file);
            // Without its controller there is no such file. Not `create`: in a cgroup that means nothing.
            if file.exists() {
                write(&file, &value)?;
            }
        }
        Ok(())
    }

    /// Moves a process into it.
    pub(super) fn add(&self, pid: u32) -> io::Result<()> {
        write(&self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// The processes in it, those too that they have started.
    pub(super) fn pids(&self) -> Vec<u32> {
        // 0 stands for one that this process can't see.
        read_pids(&self.path).into_iter().filter(|pid| *pid != 0).collect()
    }

    /// Sends SIGKILL to all of them at once, so that none can fork away from it. (Linux 5.14; before, they are killed one by one.)
    pub(super) fn kill(&self) {
        self.lift_io();
        if let Err(error) = write(&self.path.join("cgroup.kill"), "1")
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(cgroup = %self.path.display(), %error, "a cgroup can't be killed");
        }
    }

    /// Has what is under way to a disk come to its end soon: a process that waits for it ends no sooner, whatever signal it gets.
    fn lift_io(&self) {
        let limits = self.read("io.max").unwrap_or_default();
        for disk in limits.lines().filter_map(|line| line.split(' ').next()) {
            if let Err(error) = write(&self.path.join("io.max"), &format!("{disk} {NO_IO_LIMIT}")) {
                tracing::debug!(cgroup = %self.path.display(), %error, "the limit for a disk stays");
            }
        }
    }

    /// What the kernel tells in one of its files; `None`: it does not count that here.
    pub(super) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Why its processes were killed, if it was for want of memory.
    pub(super) fn out_of_memory(&self) -> Option<&'static str> {
        verdict(&self.read("memory.events")?)
    }

    /// Removes it, and the node's own when it was the last in it. Blocks while a process is on its way out.
    pub(super) fn remove(&self) -> io::Result<()> {
        let deadline = Instant::now() + EMPTY_PATIENCE;
        loop {
            match gone(fs::remove_dir(&self.path)) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::sleep(REMOVE_RETRY);
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        // Another VM's may be in it, or its removal may come first.
        let _ = self.path.parent().map(fs::remove_dir);
        Ok(())
    }
}

fn verdict(events: &str) -> Option<&'static str> {
    let count = |name: &str| {
        let mut fields = events.lines().filter_map(|line| line.split_once(' '));
        fields.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<u64>().ok()).unwrap_or(0)
    };
    match (count("oom_kill"), count("oom")) {
        (0, _) => None,
        (_, 0) => Some(HOST_OUT_OF_MEMORY),
        (_, _) => Some("it used more memory than it may"),
    }
}

/// What to limit the VMs below a cgroup to, tried on that without limiting it: what the kernel takes for a disk is for it to say.
fn limit_io(cgroup: &Path, limit: DiskLimit, state_dir: &Path) -> Result<Option<IoMax>, String> {
    if limit == DiskLimit::default() {
        return Ok(None);
    }
    let file = cgroup.join("io.max");
    if !file.exists() {
        return Err("the kernel has no io.max there".to_owned());
    }
    let disk = Device::of_files_in(state_dir)?;
    write(&file, &format!("{disk} {NO_IO_LIMIT}"))
        .map_err(|error| format!("the kernel does not take the disk {disk}: {error}"))?;
    Ok(Some(IoMax { disk, limit }))
}

fn read_pids(cgroup: &Path) -> Vec<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The cgroup in which this node's is.
fn base() -> Result<PathBuf, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let own = locate(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)?;
    let in_leaf = own.file_name() == Some(OsStr::new(LEAF));
    Ok(own.parent().filter(|_| in_leaf).map_or(own.clone(), Path::to_owned))
}

/// Where the cgroup of a process is in the file system, by its `/proc/<pid>/cgroup` and `mountinfo`.
fn locate(cgroup: &str, mountinfo: &str) -> Result<PathBuf, String> {
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    let own = Path::new(own.ok_or("this machine has no cgroups of version 2")?);
    // ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS … - TYPE SOURCE OPTIONS
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        kind.starts_with("cgroup2 ").then_some((unescaped(fields.next()?), unescaped(fields.next()?)))
    });
    let mut seen = mounts.filter_map(|(root, point)| Some(point.join(own.strip_prefix(root).ok()?)));
    // A path with ".." leads out of this process's cgroup namespace.
    seen.find(|path| path.components().all(|part| part.as_os_str() != ".."))
        .ok_or_else(|| format!("the cgroup of this process, {}, is mounted nowhere (cgroup2)", own.display()))
}

/// A path as `mountinfo` writes it: blanks and backslashes in octal.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'\\').then(|| std::str::from_utf8(tail.get(..3)?).ok()).flatten();
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

/// Has the kernel count and limit what is below `base`: the controllers that it does so with.
fn hand_down(base: &Path) -> Result<BTreeSet<String>, String> {
    let failed = |error: io::Error| format!("controllers can't be used in {}: {error}", base.display());
    // Only the kernel's root has none. Elsewhere processes must be in leaves once controllers are handed down: with some the kernel refuses,
    // with others it makes a place for threads of it, into which no process can go.
    let is_root = !base.join("cgroup.type").exists();
    let offered = wanted(&base.join("cgroup.controllers"));
    if !is_root && offered != in_force(base) {
        let own = std::process::id();
        if read_pids(base).into_iter().any(|pid| pid != own) {
            // Others are in it, as in a login session. They are not ours to move.
            return Ok(in_force(base));
        }
        // In its leaf already, this process stays there.
        let leaf = base.join(LEAF);
        make(&leaf).and_then(|()| write(&leaf.join("cgroup.procs"), "0")).map_err(failed)?;
    }
    enable(base).map_err(failed)?;
    Ok(in_force(base))
}

/// Has the kernel use in a cgroup's children each wanted controller that it has itself. One that can't be used is done without.
fn enable(cgroup: &Path) -> io::Result<()> {
    let file = cgroup.join("cgroup.subtree_control");
    for controller in wanted(&cgroup.join("cgroup.controllers")).difference(&in_force(cgroup)) {
        match write(&file, &format!("+{controller}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
            Err(error) => {
                tracing::debug!(cgroup = %cgroup.display(), controller, %error, "a controller is done without")
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// What is limited below a cgroup.
fn in_force(cgroup: &Path) -> BTreeSet<String> {
    wanted(&cgroup.join("cgroup.subtree_control"))
}

/// Those of a list of controllers that are wanted.
fn wanted(list: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(list).unwrap_or_default();
    text.split_whitespace().filter(|name| WANTED.contains(name)).map(str::to_owned).collect()
}

fn make(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Writes to a file that is there.
fn write(file: &Path, value: &str) -> io::Result<()> {
    use io::Write as _;
    fs::OpenOptions::new().write(true).open(file)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use blixard::id::VmId;

    use super::{
        super::{Launch, machine::limit_again},
        *,
    };

    #[test]
    fn the_own_cgroup_is_found_on_a_pure_a_hybrid_and_a_contained_machine() {
        let pure = "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let unit = "0::/system.slice/blixard.service\n";
        assert_eq!(locate(unit, pure), Ok("/sys/fs/cgroup/system.slice/blixard.service".into()));
        let hybrid = "36 31 0:33 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(locate("4:memory:/x\n0::/\n", hybrid), Ok("/sys/fs/cgroup/unified/".into()));
        // A part of the hierarchy, in a directory with a blank.
        let part = "41 31 0:38 /docker/1 /my\\040cgroups rw - cgroup2 cgroup2 rw\n";
        assert_eq!(locate("0::/docker/1/a\n", part), Ok("/my cgroups/a".into()));

        assert!(locate("4:memory:/x\n", hybrid).expect_err("none").contains("no cgroups of version 2"));
        assert!(locate("0::/elsewhere\n", part).expect_err("none").contains("/elsewhere, is mounted nowhere"));
        assert!(locate("0::/../outside\n", pure).expect_err("none").contains("mounted nowhere"));
        assert!(locate("0::/\n", "").is_err());
    }

    #[test]
    fn the_limits_of_a_vm() {
        let disk = Device { major: 259, minor: 3 };
        let limit = |mib_per_second, operations_per_second| DiskLimit { mib_per_second, operations_per_second };
        let io = Some(IoMax { disk, limit: limit(1_048_576, 0) });
        let limits = Limits { cpus: 3, memory_mib: 600, threads: 132, io };
        let files: Vec<_> = limits.files().into_iter().map(|(file, value)| format!("{file} = {value}")).collect();
        insta::assert_snapshot!(files.join("\n"), @r"
        cpu.max = 300000 100000
        memory.max = 629145600
        memory.swap.max = 0
        memory.oom.group = 1
        pids.max = 132
        io.max = 259:3 rbps=1099511627776 wbps=1099511627776 riops=max wiops=max
        ");
        let operations = IoMax { disk, limit: limit(0, 500) };
        assert_eq!(operations.to_string(), "259:3 rbps=max wbps=max riops=500 wiops=500");
        assert_eq!(Limits { io: None, ..limits }.files().len(), 5, "VMs share evenly");
    }

    /// With a directory that stands in for the cgroup; the conformance suite has a real one where it has a disk.
    #[test]
    fn a_disk_is_limited_where_there_is_one_and_the_kernel_can() {
        let limit = DiskLimit { mib_per_second: 10, operations_per_second: 0 };
        let (cgroup, proc) = (tempfile::tempdir().expect("tempdir"), Path::new("/proc"));
        assert_eq!(limit_io(cgroup.path(), DiskLimit::default(), proc), Ok(None), "nothing is asked for");
        let problem = limit_io(cgroup.path(), limit, proc).expect_err("there is no io.max");
        assert_eq!(problem, "the kernel has no io.max there");
        let file = cgroup.path().join("io.max");
        fs::write(&file, "").expect("writes");
        let problem = limit_io(cgroup.path(), limit, proc).expect_err("it is on no disk");
        assert!(problem.starts_with("/proc is on a file system that has no disk of its own"), "{problem}");
        assert_eq!(fs::read_to_string(&file).expect("there"), "", "nothing was tried");

        let io = Some(IoMax { disk: Device { major: 8, minor: 0 }, limit });
        let vm = Cgroup::at(cgroup.path().to_owned());
        vm.limit(Limits { cpus: 1, memory_mib: 64, threads: 8, io }).expect("writes");
        let line = "8:0 rbps=10485760 wbps=10485760 riops=max wiops=max";
        assert_eq!(fs::read_to_string(&file).expect("there"), line);
        assert_eq!(fs::read_dir(cgroup.path()).expect("there").count(), 1, "no file is made");
        fs::write(&file, "8:0 rbps=1 wbps=1 riops=1 wiops=1\n").expect("writes");
        vm.kill();
        let lifted = fs::read_to_string(&file).expect("there");
        assert!(lifted.starts_with("8:0 rbps=max wbps=max riops=max wiops=max"), "{lifted}");
        // A new shape of it does not limit it again.
        let launch = Launch {
            vm_id: VmId::random(),
            image: String::new(),
            vcpus: 1,
            memory_mib: 64,
            dir: PathBuf::new(),
            nic: None,
            user: None,
            cgroup: Some(cgroup.path().to_owned()),
            io_max: io,
            disks: vec![],
        };
        limit_again(&launch, launch.shape(), 64).expect("writes");
        assert_eq!(fs::read_to_string(&file).expect("there"), lifted);
    }

    #[test]
    fn an_end_for_want_of_memory_is_told_from_others_and_whose_want_it_was() {
        let events =
            |oom: u8, kill: u8| format!("low 0\nhigh 0\nmax 12\noom {oom}\noom_kill {kill}\noom_group_kill 0\n");
        assert_eq!(verdict(&events(0, 0)), None);
        assert_eq!(verdict(&events(1, 0)), None);
        assert_eq!(verdict(&events(1, 2)), Some("it used more memory than it may"));
        assert_eq!(verdict(&events(0, 1)), Some("the host ran out of memory"));
        assert_eq!(verdict(""), None);
    }

    #[test]
    fn what_is_missing_is_said() {
        let words = |names: &[&str]| Cgroups::in_words(&names.iter().map(ToString::to_string).collect());
        assert_eq!(words(&["cpu", "memory", "pids", "io"]), "limits: cpu, memory, pids, io");
        assert_eq!(words(&["memory", "pids"]), "limits: memory, pids; not: cpu, io");
        assert!(words(&[]).starts_with("no limits: version 2 lacks"));
    }

    /// Where this machine lets us; the conformance suite asks for more.
    #[test]
    fn a_cgroup_holds_what_is_put_into_it_ends_it_and_goes_and_a_foreign_one_stays() {
        let tag = format!("test-{}", VmId::random());
        let cgroups = match Cgroups::open(&tag, DiskLimit::default(), Path::new("/")) {
            Ok(cgroups) => cgroups,
            Err(problem) => return eprintln!("SKIPPED: no cgroup is made: {problem}"),
        };
        assert_eq!(cgroups.list().expect("lists"), []);
        let (vm, other) = (VmId::random(), VmId::random());
        let limits = Limits { cpus: 1, memory_mib: 64, threads: 8, io: None };
        let cgroup = Cgroup::at(cgroups.of(vm));
        cgroup.make(limits).expect("makes");
        cgroup.make(limits).expect("is there already");
        fs::create_dir(cgroups.dir.join("not-a-vm")).expect("mkdir");
        assert_eq!(cgroups.list().expect("lists"), [(vm, cgroups.of(vm))]);

        let mut process = std::process::Command::new("sleep").arg("600").spawn().expect("starts");
        cgroup.add(process.id()).expect("moves");
        assert_eq!(cgroup.pids(), [process.id()]);
        assert!(fs::remove_dir(&cgroup.path).is_err(), "a process is in it");
        cgroup.kill();
        process.wait().expect("ends");
        cgroup.remove().expect("removes");
        cgroup.remove().expect("is gone already");
        assert!(cgroups.dir.join("not-a-vm").exists());
        fs::remove_dir(cgroups.dir.join("not-a-vm")).expect("rmdir");
        let last = Cgroup::at(cgroups.of(other));
        last.make(limits).expect("makes");
        last.remove().expect("removes");
        assert!(!cgroups.dir.exists(), "the node's own goes with the last");
    }
}
