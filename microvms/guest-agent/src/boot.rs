//! What PID 1 does before it serves, and the last thing it does.
//!
//! No step may end the boot: a guest that lacks a mount or a module but answers its host can say so. Each failure is a
//! line on the console.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

use rustix::{
    mount::{MountFlags, mount},
    net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with},
    process::{Resource, Rlimit, setrlimit},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stdout},
    system::{RebootCommand, finit_module, reboot},
    termios::{Action, tcflow},
};

/// The kernel modules to insert, one path below `/lib/modules` a line, in order. A line `--` ends those that are needed
/// to serve; the rest are inserted afterwards.
const MODULE_ORDER: &str = "/lib/modules/order";
const AFTER_SERVING: &str = "--";
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
pub(crate) fn prepare() -> Vec<String> {
    for &(source, target, kind, flags, data) in MOUNTS {
        let made = fs::create_dir_all(target);
        report(&format!("mount {target}"), made.and_then(|()| Ok(mount(source, target, kind, flags, data)?)));
    }
    report("use the console", use_console());
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        report("link /dev", std::os::unix::fs::symlink(target, Path::new("/dev").join(link)));
    }
    let files = Rlimit { current: Some(1024), maximum: Some(MAX_OPEN_FILES) };
    report("raise the limit of open files", setrlimit(Resource::Nofile, files).map_err(Into::into));
    // Fails only for the leader of a process group, which is then a session's already.
    let _ = rustix::process::setsid();

    let order = fs::read_to_string(MODULE_ORDER).unwrap_or_default();
    let mut modules = order.lines().map(str::trim).filter(|line| !line.is_empty());
    insert_modules(modules.by_ref().take_while(|&line| line != AFTER_SERVING));
    modules.map(str::to_owned).collect()
}

/// Sets up what serving did not need: the other modules and the loopback interface.
pub(crate) fn finish(modules: &[String]) {
    insert_modules(modules.iter().map(String::as_str));
    report("bring up the loopback interface", loopback_up());
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

/// `ip link set lo up`: one netlink message (an interface of index 1, flag UP).
fn loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const LOOPBACK_INDEX: i32 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes()); // nlmsghdr: length,
    message.extend(RTM_NEWLINK.to_ne_bytes()); // type,
    message.extend(NLM_F_REQUEST.to_ne_bytes()); // flags,
    message.extend([0; 8]); // sequence number, port;
    message.extend([0; 4]); // ifinfomsg: family, padding, device type,
    message.extend(LOOPBACK_INDEX.to_ne_bytes()); // index,
    message.extend(IFF_UP.to_ne_bytes()); // flags,
    message.extend(IFF_UP.to_ne_bytes()); // which of them to change.
    let route = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&route, &message, SendFlags::empty())?;
    Ok(())
}
