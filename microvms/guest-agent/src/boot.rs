//! What PID 1 does before it serves, and the last thing it does.
//!
//! No step may end the boot: a guest that lacks a mount or a module but answers its host can say so. Each failure is a
//! line on the console. The exception is a root disk that can't be had: then jobs would run among the wrong files.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, mount, mount_move},
    process::{Resource, Rlimit, chroot, setrlimit},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stdout},
    system::{RebootCommand, finit_module, reboot},
    termios::{Action, tcflow},
};

use crate::network;

/// The kernel modules to insert, one path below `/lib/modules` a line, in order: those that are needed to serve, those
/// that can wait, those for file systems. A line `--` ends each part.
const MODULE_ORDER: &str = "/lib/modules/order";
const END_OF_PART: &str = "--";
/// What jobs may raise their number of open files to: systemd's default.
const MAX_OPEN_FILES: u64 = 512 * 1024;

/// Where what is mounted.
const MOUNTS: &[(&str, &str, &str, MountFlags, Option<&std::ffi::CStr>)] = {
    const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);
    &[
        ("proc", "/proc", "proc", PLAIN, None),
        ("sysfs", "/sys", "sysfs", PLAIN, None),
        ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None),
        ("devpts", "/dev/pts", "devpts", MountFlags::NOSUID.union(MountFlags::NOEXEC), Some(c"mode=620,ptmxmode=666")),
        ("tmpfs", "/dev/shm", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), None),
        ("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=1777")),
        ("tmpfs", "/run", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=755")),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", PLAIN, None),
    ]
};

/// Makes the guest one in which the agent can serve and jobs can run. Returns the modules that can wait.
///
/// # Errors
/// The image has a root disk, and it can't be had.
pub(crate) fn prepare() -> io::Result<Vec<String>> {
    mount_all();
    report("use the console", use_console());
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        report("link /dev", std::os::unix::fs::symlink(target, Path::new("/dev").join(link)));
    }
    let files = Rlimit { current: Some(1024), maximum: Some(MAX_OPEN_FILES) };
    report("raise the limit of open files", setrlimit(Resource::Nofile, files).map_err(Into::into));
    // Fails only for the leader of a process group, which is then a session's already.
    let _ = rustix::process::setsid();

    let order = fs::read_to_string(MODULE_ORDER).unwrap_or_default();
    let [first, later, filesystems] = parts(&order);
    insert_modules(first.into_iter());
    let Some(disk) = RootDisk::of(&fs::read_to_string("/proc/cmdline").unwrap_or_default()) else {
        return Ok(later.into_iter().map(str::to_owned).collect());
    };
    // The modules are out of sight afterwards.
    insert_modules(later.into_iter().chain(filesystems));
    disk.become_root()?;
    mount_all();
    Ok(vec![])
}

/// The parts of [`MODULE_ORDER`].
fn parts(order: &str) -> [Vec<&str>; 3] {
    let mut lines = order.lines().map(str::trim).filter(|line| !line.is_empty());
    std::array::from_fn(|_| lines.by_ref().take_while(|&line| line != END_OF_PART).collect())
}

fn mount_all() {
    for &(source, target, kind, flags, data) in MOUNTS {
        let made = fs::create_dir_all(target);
        report(&format!("mount {target}"), made.and_then(|()| Ok(mount(source, target, kind, flags, data)?)));
    }
}

/// The disk that the kernel's command line names, in the words that Linux itself has for it: `root=`, `rootfstype=`.
///
/// It becomes the root of the agent too, rather than of jobs alone: then everything that a job or its host names is named
/// in that root - the command, its directory, files that are put and fetched - and nothing has to translate. The agent
/// needs no file of the initramfs any more: it is static, and runs.
#[derive(Debug, PartialEq, Eq)]
struct RootDisk {
    device: String,
    filesystem: String,
}

/// Where the root is put together. Nobody sees it afterwards.
const ROOT_PARTS: &str = "/run/root";
/// How long the kernel may take to find the disk: virtio_blk does it while it is inserted; the rest is for a loaded host.
const DISK_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

impl RootDisk {
    fn of(cmdline: &str) -> Option<Self> {
        let value = |name: &str| cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix(name));
        let device = value("root=")?.to_owned();
        Some(Self { device, filesystem: value("rootfstype=").unwrap_or("ext4").to_owned() })
    }

    /// Mounts the disk, lays a file system in memory over it, and makes that the root: `switch_root`, but that what is in
    /// the initramfs stays where it is, for there may be another process that uses it (and it is 10 MB).
    fn become_root(&self) -> io::Result<()> {
        let failed = |what: &'static str| move |error| io::Error::other(format!("{what}: {error}"));
        let at = |part: &str| Path::new(ROOT_PARTS).join(part);
        let writable = MountFlags::empty();
        fs::create_dir_all(ROOT_PARTS)?;
        mount("tmpfs", ROOT_PARTS, "tmpfs", writable, Some(c"mode=755")).map_err(failed("mount tmpfs"))?;
        for part in ["disk", "upper", "work", "root"] {
            fs::create_dir(at(part))?;
        }
        let deadline = Instant::now() + DISK_PATIENCE;
        while !Path::new(&self.device).exists() && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN_AFTER);
        }
        let what = format!("mount {} ({})", self.device, self.filesystem);
        mount(self.device.as_str(), at("disk"), self.filesystem.as_str(), MountFlags::RDONLY, None)
            .map_err(|error| io::Error::other(format!("{what}: {error}")))?;
        // The root has the mode of the disk's: the upper directory's is what counts.
        let mode = fs::metadata(at("disk"))?.permissions();
        fs::set_permissions(at("upper"), mode)?;
        let options = c"lowerdir=/run/root/disk,upperdir=/run/root/upper,workdir=/run/root/work";
        mount("overlay", at("root"), "overlay", writable, Some(options)).map_err(failed("mount overlay"))?;
        std::env::set_current_dir(at("root"))?;
        mount_move(".", "/").map_err(failed("move the root"))?;
        chroot(".").map_err(failed("change the root"))?;
        std::env::set_current_dir("/")
    }
}

/// Sees to it that the kernel knows a file system, as far as the image has it. With a root disk everything is inserted already, and out of
/// sight.
pub(crate) fn have_filesystem(name: &str) {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.split_ascii_whitespace().last() == Some(name)) {
        let order = fs::read_to_string(MODULE_ORDER).unwrap_or_default();
        let [.., filesystems] = parts(&order);
        insert_modules(filesystems.into_iter());
    }
}

/// Sets up what serving did not need: the other modules and the loopback interface.
pub(crate) fn finish(modules: &[String]) {
    insert_modules(modules.iter().map(String::as_str));
    report("bring up the loopback interface", network::loopback_up());
}

/// Finds devices that the machine has got since its kernel looked, whatever else tells of them.
pub(crate) fn look_for_devices() {
    report("look for devices", fs::write("/sys/bus/pci/rescan", "1"));
}

/// Switches the machine off. Returns only when the kernel refuses.
pub(crate) fn power_off() {
    rustix::fs::sync();
    report("power off", reboot(RebootCommand::PowerOff).map_err(Into::into));
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("blixard-guest-agent: cannot {what}: {error}");
    }
}

/// The kernel gives PID 1 a console only when the initramfs holds a device node for it, which takes root to make.
fn use_console() -> io::Result<()> {
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

/// Sets a console going again that waits for an interrupt which will not come: Cloud Hypervisor 53 raises none for a byte
/// that it could not write, and its console is full when vmhost has been away for long. Whoever prints waits then.
pub(crate) fn restart_console() {
    // Stopped and started as by Ctrl-S and Ctrl-Q. An error means that the console is none that can stand still.
    let _ = tcflow(stdout(), Action::OOff).and_then(|()| tcflow(stdout(), Action::OOn));
}

fn insert_modules<'a>(modules: impl Iterator<Item = &'a str>) {
    for module in modules {
        report(&format!("insert {module}"), insert_module(&Path::new("/lib/modules").join(module)));
    }
}

fn insert_module(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        // Already there: built into this kernel, or inserted as another's dependency.
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_in_three_parts() {
        assert_eq!(parts("a\nb\n--\n\nc\n--\nd\ne"), [vec!["a", "b"], vec!["c"], vec!["d", "e"]]);
        assert_eq!(parts("a"), [vec!["a"], vec![], vec![]]);
    }

    #[test]
    fn a_root_disk_is_what_the_command_line_says() {
        let disk = |device: &str, filesystem: &str| RootDisk { device: device.into(), filesystem: filesystem.into() };
        assert_eq!(RootDisk::of("console=ttyS0 quiet"), None);
        assert_eq!(RootDisk::of("quiet root=/dev/vda rootfstype=erofs ro\n"), Some(disk("/dev/vda", "erofs")));
        assert_eq!(RootDisk::of("rooty=1 root=/dev/vda"), Some(disk("/dev/vda", "ext4")));
    }
}
