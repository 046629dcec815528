//! What Cloud Hypervisor is told about a VM: the bodies of its API's calls, with the field names that it has for them.
//!
//! Whatever is not named here is its default; what would be dangerous as a default is named.

use std::path::{Path, PathBuf};

use blixard::vm::VmShape;
use serde::Serialize;

use super::{
    super::{Launch, Nic, image::Image, machine::disk_path},
    resize::most,
};

/// The first CID that is not reserved. The guest's address in its own vsock proxy only, so every VM may have the same.
const GUEST_CID: u32 = 3;
pub(super) const BYTES_PER_MIB: u64 = 1024 * 1024;

/// The body of `vm.create`.
#[derive(Debug, Serialize)]
pub(super) struct VmConfig {
    payload: Payload,
    cpus: Cpus,
    memory: Memory,
    rng: Rng,
    /// The first one is /dev/vda.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<Disk>,
    vsock: Vsock,
    serial: Console,
    console: Console,
    /// A device by which the guest's kernel says that it panics.
    pvpanic: bool,
    landlock_enable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    landlock_rules: Vec<LandlockRule>,
}

#[derive(Debug, Serialize)]
struct LandlockRule {
    path: PathBuf,
    access: &'static str,
}

#[derive(Debug, Serialize)]
struct Payload {
    kernel: PathBuf,
    initramfs: PathBuf,
    cmdline: String,
}

#[derive(Debug, Serialize)]
struct Cpus {
    boot_vcpus: u32,
    /// What it may be resized to.
    max_vcpus: u32,
    /// Whether the guest may run VMs itself: on unless it is said.
    nested: bool,
}

#[derive(Debug, Serialize)]
struct Memory {
    size: u64,
    /// What it may be given besides, by ACPI: until then it takes address space alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplug_size: Option<u64>,
    /// Only devices outside the hypervisor's process would need it.
    shared: bool,
}

#[derive(Debug, Serialize)]
struct Rng {
    src: &'static str,
}

/// A disk. All VMs that have it share one that is read-only.
#[derive(Debug, Serialize)]
struct Disk {
    path: PathBuf,
    readonly: bool,
    /// Whether it passes the page cache by.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    direct: bool,
    /// Otherwise the format would be guessed from the disk's own bytes.
    image_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
}

#[derive(Debug, Serialize)]
struct Vsock {
    cid: u32,
    socket: PathBuf,
}

#[derive(Debug, Serialize)]
struct Console {
    mode: ConsoleMode,
}

#[derive(Debug, Serialize)]
enum ConsoleMode {
    Off,
    /// The hypervisor's stdout.
    Tty,
}

impl VmConfig {
    /// The VM of a launch. `vsock`: the name of a socket in its directory.
    pub(super) fn new(launch: &Launch, image: Image, vsock: &str, landlock: bool) -> Self {
        let most = most(launch.shape());
        let hotplug_size = u64::from(most.memory_mib - launch.memory_mib) * BYTES_PER_MIB;
        Self {
            payload: Payload { kernel: image.kernel, initramfs: image.initramfs, cmdline: image.cmdline },
            cpus: Cpus { boot_vcpus: launch.vcpus, max_vcpus: most.vcpus, nested: false },
            memory: Memory {
                size: u64::from(launch.memory_mib) * BYTES_PER_MIB,
                hotplug_size: Some(hotplug_size).filter(|size| *size > 0),
                shared: false,
            },
            rng: Rng { src: "/dev/urandom" },
            disks: image
                .root_disk
                .into_iter()
                .map(|path| Disk { path, readonly: true, direct: false, image_type: "Raw", serial: None })
                .chain(launch.disks.iter().map(|disk| Disk {
                    path: disk_path(launch, disk),
                    readonly: disk.read_only,
                    direct: launch.is_direct(disk),
                    image_type: "Raw",
                    serial: Some(disk.serial.clone()),
                }))
                .collect(),
            // Relative to the launch's directory, which the hypervisor runs in: no path is too long for a socket. With
            // the dot, for Landlock's rule is about the path's parent, and that of a bare name is empty.
            vsock: Vsock { cid: GUEST_CID, socket: Path::new(".").join(vsock) },
            // To stdout, which is a FIFO that neither grows nor blocks. Not a file, which has no bound, and not a socket
            // (`console.rs` says why).
            serial: Console { mode: ConsoleMode::Tty },
            console: Console { mode: ConsoleMode::Off },
            pvpanic: true,
            landlock_enable: landlock,
            landlock_rules: Vec::new(),
        }
    }

    /// The same for a VM that is to be saved into this directory, which lies in the launch's.
    pub(super) fn saved_to(mut self, dir: &str) -> Self {
        self.landlock_rules.push(LandlockRule { path: Path::new(".").join(dir), access: "rw" });
        self
    }
}

/// The body of `vm.resize`.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct ResizeConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    desired_vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    desired_ram: Option<u64>,
}

impl ResizeConfig {
    /// So many vCPUs.
    pub(super) fn vcpus(shape: VmShape) -> Self {
        Self { desired_vcpus: Some(shape.vcpus), desired_ram: None }
    }

    /// So much memory.
    pub(super) fn memory(shape: VmShape) -> Self {
        Self { desired_vcpus: None, desired_ram: Some(u64::from(shape.memory_mib) * BYTES_PER_MIB) }
    }
}

/// The body of `vm.snapshot`.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotConfig {
    destination_url: String,
}

impl SnapshotConfig {
    /// Into a directory that lies in the launch's.
    pub(super) fn new(dir: &str) -> Self {
        Self { destination_url: format!("file://./{dir}") }
    }
}

/// The body of `vm.restore`.
#[derive(Debug, Serialize)]
pub(super) struct RestoreConfig {
    source_url: String,
    memory_restore_mode: &'static str,
}

impl RestoreConfig {
    /// From a directory that lies in the one that it runs in. All memory is there before the guest goes on: with the holes of a template that is
    /// sooner done than page by page, "OnDemand", which also takes the right to handle page faults (ADR 10).
    pub(super) fn new(dir: &str) -> Self {
        Self { source_url: format!("file://./{dir}"), memory_restore_mode: "Copy" }
    }
}

/// The body of `vm.add-net`. Its TAP is not named but passed, open, with the call. Its MTU is not named either: to set it
/// the hypervisor would need a right; in the TAP's network namespace it tells the guest the one that the TAP has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct NetConfig {
    pub(super) id: String,
    /// The guest's address: "52:54:00:12:34:56".
    pub(super) mac: String,
    /// Two for each descriptor: one to receive, one to send.
    pub(super) num_queues: usize,
}

impl NetConfig {
    /// The interface of a launch, of one queue.
    pub(super) fn new(nic: &Nic) -> Self {
        Self { id: "net0".to_owned(), mac: nic.mac.to_string(), num_queues: 2 }
    }
}

#[cfg(test)]
mod tests {
    use blixard::id::VmId;

    use super::*;

    #[test]
    fn the_config_of_a_vm() {
        let image = Image {
            kernel: "/images/default/vmlinux".into(),
            initramfs: "/images/default/initramfs".into(),
            cmdline: "console=ttyS0 quiet".to_owned(),
            root_disk: Some("/images/tools/root.erofs".into()),
            filesystems: vec!["erofs".to_owned(), "ext4".to_owned()],
        };
        let disk = |path: &str, number, read_only| super::super::super::Disk {
            path: path.into(),
            serial: format!("volume{number}"),
            read_only,
            filesystem: "ext4",
        };
        let launch = Launch {
            vm_id: VmId::random(),
            image: "default".to_owned(),
            vcpus: 2,
            memory_mib: 512,
            dir: "/var/lib/blixard/vm".into(),
            nic: None,
            user: None,
            cgroup: None,
            io_max: None,
            disks: vec![disk("/srv/tools.img", 0, true), disk("/var/lib/blixard/vm/disk1", 1, false)],
        };
        insta::assert_json_snapshot!(VmConfig::new(&launch, image, "vsock", true));
    }

    #[test]
    fn the_configs_of_saving_and_restoring() {
        insta::assert_json_snapshot!((SnapshotConfig::new("saved"), RestoreConfig::new("saved"),));
    }

    #[test]
    fn the_configs_of_resizing() {
        let shape = VmShape { vcpus: 3, memory_mib: 640 };
        let json = |config| serde_json::to_string(&config).expect("text");
        assert_eq!(json(ResizeConfig::vcpus(shape)), r#"{"desired_vcpus":3}"#);
        assert_eq!(json(ResizeConfig::memory(shape)), r#"{"desired_ram":671088640}"#);
    }

    #[test]
    fn the_config_of_a_network_device() {
        let nic = Nic { tap: "blx0".into(), mac: "52:54:00:12:34:56".parse().expect("an address") };
        insta::assert_json_snapshot!(NetConfig::new(&nic));
    }
}
