//! Who the guest is: what it says of itself, and what its host tells it to be.
//!
//! A guest whose PID 1 is the agent may be one of many that were restored from the same saved memory. So nothing that tells it from others exists before
//! Configure: what is random is drawn after the host's entropy has gone into the kernel's pool. Only then is the kernel's boot id read for the
//! first time, which is when the kernel makes it. What clones have in common is older: the layout of the agent's memory and the
//! keys of its hash tables, on which nothing secret depends.

use std::{collections::BTreeSet, fs, io, path::Path};

use blixard::{
    error::{Error, Reason, invalid},
    id::VmId,
    pb::guest::v1 as pb,
    time::Timestamp,
};
use rustix::{
    system::{sethostname, uname},
    time::{ClockId, Timespec, clock_settime},
};

use crate::{network::Network, volumes::Volume};

/// What programs take for the id of the machine that they run on.
const MACHINE_ID: &str = "/etc/machine-id";

/// What stays the same until the guest restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// As `uname -r` prints it.
    pub(crate) kernel_release: String,
    /// Whether the agent is PID 1 of a guest, and so may give it a name, a time and entropy.
    pub(crate) owns_guest: bool,
}

impl Identity {
    /// Reads it from the kernel.
    #[must_use]
    pub(crate) fn read(owns_guest: bool) -> Self {
        Self { kernel_release: uname().release().to_string_lossy().into_owned(), owns_guest }
    }
}

/// The kernel's own id of its boot, drawn when it is read for the first time.
fn kernel_boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// One of an agent that is not PID 1: of its own start.
pub(crate) fn random_boot_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// What a configuration came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configured {
    /// The steps that were done.
    pub(crate) done: Vec<&'static str>,
    /// The others, each with the reason.
    pub(crate) skipped: Vec<String>,
    /// Random; new with each start.
    pub(crate) boot_id: String,
}

/// The guest's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All of it, in KiB.
    pub(crate) total_kib: u64,
    /// What could be had without swapping, in KiB.
    pub(crate) available_kib: u64,
}

impl Memory {
    /// Asks the kernel; zeroes when it does not tell.
    #[must_use]
    pub(crate) fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    }

    fn parse(meminfo: &str) -> Self {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse().ok()
        };
        Self { total_kib: field("MemTotal:").unwrap_or(0), available_kib: field("MemAvailable:").unwrap_or(0) }
    }
}

/// A checked Configure request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    /// The VM.
    pub(crate) vm_id: VmId,
    hostname: String,
    time: Timestamp,
    entropy: Vec<u8>,
    network: Option<Network>,
    volumes: Vec<Volume>,
}

impl Configuration {
    /// Checks every field.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub(crate) fn parse(request: pb::ConfigureRequest) -> Result<Self, Error> {
        let hostname = request.hostname;
        let hostname_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=63).contains(&hostname.len()) || !hostname.bytes().all(hostname_byte) {
            return Err(invalid("hostname", hostname, "1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.'"));
        }
        if !(32..=512).contains(&request.entropy.len()) {
            return Err(invalid("entropy", format!("{} bytes", request.entropy.len()), "32 to 512 bytes"));
        }
        Ok(Self {
            vm_id: VmId::parse("vm_id", &request.vm_id)?,
            hostname,
            time: request.time.map(Timestamp::from).ok_or_else(|| invalid("time", "", "required"))?,
            entropy: request.entropy.into(),
            network: request.network.map(Network::parse).transpose()?,
            volumes: Volume::parse_all(request.mounts)?,
        })
    }

    /// Makes the guest so. Steps are skipped when the machine is not the agent's own. `mounted`: where volumes are mounted already.
    ///
    /// # Errors
    /// A step failed: the guest is not to be used.
    pub(crate) fn apply(&self, owns_guest: bool, mounted: &mut BTreeSet<String>) -> Result<Configured, Error> {
        if !owns_guest {
            let why = "the agent is not PID 1 of a guest";
            // A job that asked for a disk must not find a directory of the same name.
            if let Some(volume) = self.volumes.first() {
                let problem = format!("cannot mount {}: {why}", volume.mount_path);
                return Err(Error::new(Reason::GuestRefused, problem));
            }
            let network = self.network.as_ref().map(|_| "network");
            let steps = ["entropy", "clock", "hostname", "machine-id"].into_iter().chain(network);
            let skipped = steps.map(|step| format!("{step}: {why}")).collect();
            return Ok(Configured { done: vec!["boot-id"], skipped, boot_id: random_boot_id() });
        }
        let mut done = Vec::new();
        let mut step = |name: &'static str, result: io::Result<()>| match result {
            Ok(()) => {
                done.push(name);
                Ok(())
            }
            Err(error) => Err(Error::new(Reason::GuestRefused, format!("cannot set the guest's {name}: {error}"))),
        };
        // First: whatever is random after it is this guest's alone.
        step("entropy", add_entropy(&self.entropy))?;
        let mut boot_id = String::new();
        step("boot-id", kernel_boot_id().map(|id| boot_id = id))?;
        step("clock", set_clock(self.time))?;
        step("hostname", sethostname(self.hostname.as_bytes()).map_err(Into::into))?;
        step("machine-id", set_machine_id(Path::new(MACHINE_ID), self.vm_id))?;
        if let Some(network) = &self.network {
            step("network", network.apply())?;
        }
        if !self.volumes.is_empty() {
            step("volumes", self.mount(mounted))?;
        }
        Ok(Configured { done, skipped: Vec::new(), boot_id })
    }

    fn mount(&self, mounted: &mut BTreeSet<String>) -> io::Result<()> {
        for volume in &self.volumes {
            if !mounted.contains(&volume.mount_path) {
                volume.mount()?;
                mounted.insert(volume.mount_path.clone());
            }
        }
        Ok(())
    }
}

/// Replaces the file, whatever it is: an image may have one of its own, or a link.
fn set_machine_id(path: &Path, vm_id: VmId) -> io::Result<()> {
    let beside = path.with_extension("new");
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    fs::write(&beside, format!("{}\n", vm_id.0.simple()))?;
    fs::rename(&beside, path)
}

fn set_clock(time: Timestamp) -> io::Result<()> {
    let time = Timespec { tv_sec: time.0.div_euclid(1000), tv_nsec: time.0.rem_euclid(1000) * 1_000_000 };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Mixes bytes into the kernel's pool *and credits them*, so that the first `getrandom` of a fresh guest does not wait,
/// and reseeds the generator, so that two guests restored from one snapshot part ways now.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` with room for the longest request.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; 512],
    }
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

    let mut info = PoolInfo { entropy_count: 0, buf_size: 0, buf: [0; 512] };
    let length = bytes.len().min(info.buf.len());
    info.buf[..length].copy_from_slice(&bytes[..length]);
    info.buf_size = libc::c_int::try_from(length).unwrap_or(0);
    info.entropy_count = info.buf_size * 8;
    let pool = fs::OpenOptions::new().write(true).open(Path::new("/dev/urandom"))?;
    let pool = std::os::fd::AsRawFd::as_raw_fd(&pool);
    // SAFETY: `pool` is open for the whole block; RNDADDENTROPY reads `buf_size` bytes of `buf`, which has that many and
    // is laid out as <linux/random.h> says; RNDRESEEDCRNG takes no argument.
    #[expect(unsafe_code, reason = "crediting entropy is an ioctl without a safe wrapper")]
    let done =
        unsafe { libc::ioctl(pool, RNDADDENTROPY, &raw const info) == 0 && libc::ioctl(pool, RNDRESEEDCRNG) == 0 };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut pb::ConfigureRequest)) -> Result<Configuration, Error> {
        let mut request = pb::ConfigureRequest {
            vm_id: VmId::random().to_string(),
            hostname: "vm-1".into(),
            time: Some(Timestamp(1).into()),
            entropy: vec![1; 32].into(),
            network: None,
            mounts: vec![],
        };
        change(&mut request);
        Configuration::parse(request)
    }

    #[test]
    fn memory_is_what_the_kernel_says() {
        let meminfo = "MemTotal:        8138672 kB\nMemFree:          202756 kB\nMemAvailable:    6117648 kB\n";
        assert_eq!(Memory::parse(meminfo), Memory { total_kib: 8_138_672, available_kib: 6_117_648 });
        assert_eq!(Memory::parse("nonsense"), Memory::default());
        let here = Memory::read();
        assert!(here.total_kib >= here.available_kib && here.available_kib > 0, "{here:?}");
    }

    #[test]
    fn a_process_is_given_nothing_and_says_so() {
        let network = pb::GuestNetwork { mtu: 1500, ..Default::default() };
        let apply = |network| {
            let configuration = request(|r| r.network = network).expect("valid");
            configuration.apply(false, &mut BTreeSet::new()).expect("skipped")
        };
        assert_eq!(apply(None).skipped.len(), 4);
        let configured = apply(Some(network));
        assert_eq!(configured.skipped[4], "network: the agent is not PID 1 of a guest");
        assert_eq!(configured.done, ["boot-id"]);
        assert_ne!(configured.boot_id, apply(None).boot_id);
        let mount = pb::Mount {
            serial: "volume0".into(),
            filesystem: "ext4".into(),
            mount_path: "/scratch".into(),
            read_only: false,
        };
        let with_volume = request(|r| r.mounts = vec![mount]).expect("valid");
        let refused = with_volume.apply(false, &mut BTreeSet::new()).expect_err("it would be a directory");
        assert_eq!(refused.message, "cannot mount /scratch: the agent is not PID 1 of a guest");
    }

    #[test]
    fn the_machine_id_of_an_image_is_replaced_and_a_link_not_followed() {
        let root = tempfile::tempdir().expect("tempdir");
        let (path, outside) = (root.path().join("etc/machine-id"), root.path().join("outside"));
        let vm_id = VmId::random();
        set_machine_id(&path, vm_id).expect("is set");
        assert_eq!(fs::read_to_string(&path).expect("there"), format!("{}\n", vm_id.0.simple()));

        fs::write(&outside, "the image's").expect("writes");
        fs::remove_file(&path).expect("removes");
        std::os::unix::fs::symlink(&outside, &path).expect("links");
        std::os::unix::fs::symlink(&outside, path.with_extension("new")).expect("links");
        set_machine_id(&path, vm_id).expect("is set");
        assert_eq!(fs::read_to_string(&path).expect("there").len(), 33);
        assert_eq!(fs::read_to_string(&outside).expect("there"), "the image's");
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        request(|_| {}).expect("valid");
        type Change = fn(&mut pb::ConfigureRequest);
        let cases: &[(&str, Change)] = &[
            ("vm_id", |r| r.vm_id = "nonsense".into()),
            ("hostname", |r| r.hostname = String::new()),
            ("hostname", |r| r.hostname = "a".repeat(64)),
            ("hostname", |r| r.hostname = "a b".into()),
            ("time", |r| r.time = None),
            ("entropy", |r| r.entropy = vec![1; 31].into()),
            ("entropy", |r| r.entropy = vec![1; 513].into()),
            ("mounts[0].serial", |r| r.mounts = vec![pb::Mount::default()]),
            ("network.mtu", |r| r.network = Some(pb::GuestNetwork::default())),
        ];
        for (field, change) in cases {
            let error = request(change).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(*field), "{error}");
        }
    }
}
