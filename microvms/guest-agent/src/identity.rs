//! Who the guest is: what it says of itself, and what its host tells it to be.

use std::{fs, io, path::Path};

use blixard::{
    error::{Error, invalid},
    id::VmId,
    pb::guest::v1 as pb,
    time::Timestamp,
};
use rustix::{
    system::{sethostname, uname},
    time::{ClockId, Timespec, clock_settime},
};

use crate::network::Network;

/// What stays the same until the guest restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// As `uname -r` prints it.
    pub(crate) kernel_release: String,
    /// Random; new with each start.
    pub(crate) boot_id: String,
    /// Whether the agent is PID 1 of a guest, and so may give it a name, a time and entropy.
    pub(crate) owns_guest: bool,
}

impl Identity {
    /// Reads it from the kernel.
    #[must_use]
    pub(crate) fn read(owns_guest: bool) -> Self {
        Self {
            kernel_release: uname().release().to_string_lossy().into_owned(),
            boot_id: if owns_guest { kernel_boot_id() } else { None }
                .unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
            owns_guest,
        }
    }
}

/// The kernel's own: unlike a random number of ours it does not wait for entropy, which comes with Configure.
fn kernel_boot_id() -> Option<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(text.trim().to_owned())
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
        })
    }

    /// Makes the guest so. Returns the steps that were skipped because the machine is not the agent's own.
    ///
    /// # Errors
    /// A step that must not be skipped failed: the guest is not to be used.
    pub(crate) fn apply(&self, owns_guest: bool) -> Result<Vec<String>, Error> {
        if !owns_guest {
            let why = "the agent is not PID 1 of a guest";
            let network = self.network.as_ref().map(|_| "network");
            let steps = ["hostname", "time", "entropy"].into_iter().chain(network);
            return Ok(steps.map(|step| format!("{step}: {why}")).collect());
        }
        let failed = |step: &'static str| {
            move |error: io::Error| {
                Error::new(blixard::error::Reason::GuestRefused, format!("cannot set the guest's {step}: {error}"))
            }
        };
        sethostname(self.hostname.as_bytes()).map_err(|error| failed("hostname")(error.into()))?;
        set_clock(self.time).map_err(failed("clock"))?;
        add_entropy(&self.entropy).map_err(failed("entropy"))?;
        if let Some(network) = &self.network {
            network.apply().map_err(failed("network"))?;
        }
        Ok(Vec::new())
    }
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
        let skipped = |network| request(|r| r.network = network).expect("valid").apply(false).expect("skipped");
        assert_eq!(skipped(None).len(), 3);
        assert_eq!(skipped(Some(network))[3], "network: the agent is not PID 1 of a guest");
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
            ("network.mtu", |r| r.network = Some(pb::GuestNetwork::default())),
        ];
        for (field, change) in cases {
            let error = request(change).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(*field), "{error}");
        }
    }
}
