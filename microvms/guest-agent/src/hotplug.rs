//! CPUs and memory that the machine gets while the guest runs.
//!
//! The kernel finds them by itself and leaves it to user space to use them: memory is used at once when it is told so beforehand, a CPU is
//! announced and waits. What is taken away the kernel lets go alone.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
    netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
    recv, socket_with,
};
use tokio::io::{Interest, unix::AsyncFd};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory/auto_online_blocks";
/// The kernel's own announcements, before any udev has seen them.
const KERNEL_GROUP: u32 = 1;
/// An announcement is at most 2 KiB of text, and a path before it.
const ANNOUNCEMENT_BYTES: usize = 8 * 1024;

/// Puts to use whatever comes, as long as the guest lives.
pub(crate) async fn use_what_comes() {
    if let Err(error) = fs::write(MEMORY, "online") {
        eprintln!("blixard-guest-agent: memory that is added later is not used: {error}");
    }
    let error = match use_cpus(Path::new(CPUS)).await {
        Ok(never) => match never {},
        Err(error) => error,
    };
    eprintln!("blixard-guest-agent: CPUs that are added later are not used: {error}");
}

async fn use_cpus(cpus: &Path) -> io::Result<std::convert::Infallible> {
    let announcements = listen()?;
    let mut buffer = vec![0; ANNOUNCEMENT_BYTES];
    loop {
        let read = announcements.async_io(Interest::READABLE, |socket| {
            recv(socket, &mut buffer[..], RecvFlags::DONTWAIT).map_err(io::Error::from)
        });
        let came = match read.await {
            Ok((length, _)) => is_cpu(&buffer[..length.min(ANNOUNCEMENT_BYTES)]),
            // More was announced at once than the socket holds: perhaps a CPU, too.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => true,
            Err(error) => return Err(error),
        };
        if came {
            for cpu in offline(cpus) {
                if let Err(error) = fs::write(&cpu, "1") {
                    eprintln!("blixard-guest-agent: cannot use {}: {error}", cpu.display());
                }
            }
        }
    }
}

fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
    #[expect(deprecated, reason = "its successor is unsafe; sound here: an `OwnedFd` keeps its descriptor")]
    let announcements = AsyncFd::try_with_interest(socket, Interest::READABLE)?;
    Ok(announcements)
}

/// "add@/devices/system/cpu/cpu1", and details behind a zero.
fn is_cpu(announcement: &[u8]) -> bool {
    announcement.starts_with(b"add@/devices/system/cpu/cpu")
}

/// The switches of CPUs that are there and not used.
fn offline(cpus: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cpus).into_iter().flatten().flatten();
    let switches = entries.map(|entry| entry.path().join("online"));
    switches.filter(|switch| fs::read_to_string(switch).is_ok_and(|state| state.trim() == "0")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_comes_is_told_from_what_else_is_announced() {
        assert!(is_cpu(b"add@/devices/system/cpu/cpu1\0ACTION=add\0"));
        for other in [
            "remove@/devices/system/cpu/cpu1\0",
            "online@/devices/system/cpu/cpu1\0",
            "add@/devices/system/memory/memory32\0",
            "",
        ] {
            assert!(!is_cpu(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn cpus_that_are_off_are_found_and_no_others() {
        let cpus = tempfile::tempdir().expect("tempdir");
        for (cpu, state) in [("cpu1", Some("0\n")), ("cpu2", Some("1\n")), ("cpufreq", None)] {
            let dir = cpus.path().join(cpu);
            fs::create_dir(&dir).expect("mkdir");
            if let Some(state) = state {
                fs::write(dir.join("online"), state).expect("writes");
            }
        }
        assert_eq!(offline(cpus.path()), [cpus.path().join("cpu1/online")]);
        assert_eq!(offline(&cpus.path().join("none")), [] as [PathBuf; 0]);
    }

    /// Any user may listen; nothing is announced here.
    #[tokio::test]
    async fn the_kernel_lets_it_listen() {
        drop(listen().expect("listens"));
    }
}
