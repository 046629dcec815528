//! What a VM is made of on the host: the seam between vmhost and a hypervisor.
//!
//! ```text
//!   Hypervisor ── launch(dir) ──► Machine ── connect() ─► raw stream to the guest agent's port
//!       │  └───── adopt(dir) ───►    │  └─── wait() ────► how its main process ended
//!       └──────── sweep(dir)         └────── kill(), console(), pids(), usage()
//!
//!   cloud-hypervisor  cloud-hypervisor, KVM                                       a real guest kernel
//!   qemu              qemu-system-x86_64 + vhost-device-vsock, KVM or emulation   a real guest kernel
//!   process           the guest agent as a plain process                          no isolation
//! ```
//!
//! Rules that every implementation keeps, and `tests/hypervisor_conformance.rs` proves:
//! - Its processes outlive vmhost: a process group of their own, no parent-death signal, no descriptor of vmhost's.
//! - Every process carries `BLIXARD_VM_ID` and `BLIXARD_VM_DIR` in its environment from its first instruction, so that
//!   [`Hypervisor::sweep`] finds it even when vmhost was killed between starting it and writing its record.
//! - A process is named by pid *and* start time, and signalled through a pidfd: a reused pid is never hit.
//! - Each launch has a fresh directory. Nothing is made outside it but the cgroup, whose path is in the launch and in its record.
//! - What has a guest's kernel to defend itself from runs with no more than it needs (`confine`, `cgroup`).
//!
//! This module must not know about jobs, the registry, or what the guest agent says.

mod block;
mod cgroup;
mod cloud_hypervisor;
mod confine;
mod console;
mod doctor;
mod events;
mod image;
mod machine;
mod nic;
mod own_dir;
mod process;
mod procfs;
mod qemu;
mod qmp;
mod record;
mod seccomp;
mod socket;
mod template;
mod tools;
mod usage;
mod vmm;

use std::{
    ffi::OsString,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use blixard::{
    config::{DriverChoice, UserRange},
    id::VmId,
    pb::common::v1::VmUsage,
    vm::VmShape,
};
use tokio::net::UnixStream;

pub use cgroup::{Cgroups, DiskLimit, IoMax};
pub(crate) use confine::{landlock_version, may_change_user};
pub use console::{CONSOLE_TAIL_BYTES, Console};
pub(crate) use doctor::NetworkTools;
pub use doctor::{Check, diagnose};
pub use image::{MANIFEST, Manifest, RootDisk};
pub(crate) use machine::end_cgroup;
pub use nic::Nic;
pub(crate) use nic::create_tap;
pub use procfs::{MarkedProcess, end_marked, marked_below};
pub(crate) use seccomp::seccomp;

/// The guest agent's vsock port. The agent also connects to the host's port of this number once it serves: it knocks.
pub const AGENT_PORT: u32 = 1024;

const SIGKILL: i32 = 9;
/// A machine that can be given another shape while it runs may come to so many times what it was launched with: all that it could
/// come to costs its guest's kernel a little from the first.
const GROWTH: u32 = 4;
/// Memory comes to it in steps of this: x86's unit of memory that is added and removed.
pub(crate) const MEMORY_STEP_MIB: u32 = 128;

/// What to launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The VM.
    pub vm_id: VmId,
    /// Name of the image to boot.
    pub image: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// This incarnation's own directory: absolute, mode 0700, and empty at launch but for its disks. May be longer than a socket's path.
    pub dir: PathBuf,
    /// Its network interface, at launch; `None`: it gets none.
    pub nic: Option<Nic>,
    /// The user that its processes become, and the group of the same number; `None`: they stay vmhost's. Nobody else's.
    pub user: Option<u32>,
    /// The cgroup that its processes are put into; `None`: into none. Made at launch, gone with the machine.
    pub cgroup: Option<PathBuf>,
    /// What they may use of their node's disk, in that cgroup; `None`: as much as their share is.
    pub io_max: Option<IoMax>,
    /// Disks beside the image's, at launch.
    pub disks: Vec<Disk>,
}

impl Launch {
    /// Whether what its guest does with a disk passes the page cache by. Where a VM's use of the disk is limited, what it writes must be its
    /// own at once: the cache writes a file back as that of who wrote to it first, here vmhost, until the kernel notices.
    fn is_direct(&self, disk: &Disk) -> bool {
        self.io_max.is_some() && !disk.read_only
    }

    /// How large the machine is at first.
    #[must_use]
    pub fn shape(&self) -> VmShape {
        VmShape { vcpus: self.vcpus, memory_mib: self.memory_mib }
    }
}

/// Whether a driver's machines are contained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contained {
    /// They are processes like any other.
    No,
    /// They have a user and a cgroup of their own and no rights, and their processes start no others.
    Yes {
        /// Whether they need /dev/kvm.
        kvm: bool,
    },
}

/// A disk beside the image's. It is raw: its bytes are the guest's, and its format is never guessed from them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file, absolute.
    pub path: PathBuf,
    /// What the guest knows it by: at most 20 bytes.
    pub serial: String,
    /// Whether nobody writes to it, so that any number of VMs may have it.
    pub read_only: bool,
    /// The file system on it: "erofs", "ext4".
    pub filesystem: &'static str,
}

/// A way to run VMs.
#[tonic::async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// "cloud-hypervisor", "qemu", "process".
    fn name(&self) -> &'static str;

    /// Whether its machines have a network interface and disks when [`Launch::nic`] and [`Launch::disks`] say so.
    fn takes_devices(&self) -> bool {
        true
    }

    /// How its machines are contained: as [`Launch::user`] and [`Launch::cgroup`] say, or not at all.
    fn containment(&self) -> Contained {
        Contained::No
    }

    /// How it saves machines and restores them, if it does.
    fn templates(&self) -> Option<&dyn Templates> {
        None
    }

    /// The images it can boot now, sorted.
    fn images(&self) -> Vec<String>;

    /// Starts a machine in `launch.dir`. Returns once its processes run; the guest may not be up yet. After an error
    /// nothing of it runs. A caller that drops the future before its end does not know what runs: it must sweep.
    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError>;

    /// After a restart of vmhost: the machine launched into `launch.dir` earlier, if it lives and has been up. `None`: it
    /// is dead or its agent was never heard of, and every process left of it has been ended.
    async fn adopt(&self, launch: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError>;

    /// Ends every process that belongs to `launch`, whatever was or was not recorded, and says how many there were.
    async fn sweep(&self, launch: &Launch) -> Result<usize, LaunchError>;

    /// The largest shape that a machine launched with this one can be given while it runs; `None`: it keeps the one it has.
    fn most(&self, _: VmShape) -> Option<VmShape> {
        None
    }

    /// Gives a machine that runs another shape, at most [`Hypervisor::most`] of what `launch` says, and says what it has then: memory is
    /// not taken back. Again changes nothing. A caller that drops the future before its end does not know what the machine has: it must
    /// call again. `room`: the largest shape that it may have, `to` included. What is limited does not say its limits: a machine that claims
    /// more is refused.
    async fn resize(&self, _: &Launch, _: VmShape, _: VmShape) -> Result<VmShape, ResizeError> {
        let problem = format!("the driver \"{}\" can't change a machine that runs", self.name());
        Err(ResizeError { problem, has: None, told: None })
    }
}

/// Saving a machine whose agent serves but has no identity yet, and restoring any number of machines from it.
#[tonic::async_trait]
pub trait Templates: Send + Sync {
    /// What a template for such a launch depends on, in words: only one that was saved with the same may be used. Blocking.
    ///
    /// # Errors
    /// There is no such image.
    fn basis(&self, launch: &Launch) -> Result<String, LaunchError>;

    /// Boots `launch`, which has no network interface, and saves it into the directory `into`, which is empty and on the same file system as
    /// the launch's. Nothing of it runs afterwards. A caller that drops the future before its end must sweep.
    async fn save(&self, launch: &Launch, into: &Path) -> Result<(), LaunchError>;

    /// Starts a machine from a directory that [`Templates::save`] has filled: otherwise as [`Hypervisor::launch`]. Once it
    /// returns the directory may go.
    async fn restore(&self, launch: &Launch, template: &Path) -> Result<Arc<dyn Machine>, LaunchError>;
}

/// A running machine. Dropping it leaves the machine running.
#[tonic::async_trait]
pub trait Machine: Send + Sync + 'static {
    /// Its processes on the host that still run, main process first.
    fn pids(&self) -> Vec<u32>;

    /// A fresh raw stream to the guest agent. While the guest comes up this waits and tries again, for at most
    /// [`CONNECT_PATIENCE`] (then: `TimedOut`; call again). An error at once when the machine is dead (`NotConnected`).
    async fn connect(&self) -> io::Result<UnixStream>;

    /// Resolves when the machine has ended and nothing of it is left. Any number may wait.
    async fn wait(&self) -> MachineExit;

    /// Kills everything of it and returns when it is gone. Idempotent.
    async fn kill(&self);

    /// What it wrote to its console.
    fn console(&self) -> Console;

    /// What it has used so far. Looks once at a time, however many ask, and waits for nobody for more than seconds.
    async fn usage(&self) -> VmUsage;
}

pub use machine::CONNECT_PATIENCE;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineExit {
    /// The process whose end ended the machine: "cloud-hypervisor", "qemu", "vhost-device-vsock", "guest agent".
    pub process: &'static str,
    /// How it ended.
    pub status: ProcessExit,
    /// Why the machine was ended, where its hypervisor told. A hint: there may be a reason of which nothing is known.
    pub why: Option<&'static str>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessExit {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
    /// It was adopted, so its status went to another parent.
    Unknown,
}

impl MachineExit {
    /// Whether the machine ended by itself and without complaint, as after a power-off.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.status == ProcessExit::Exited(0)
    }

    /// Whether it did not end by itself: the host had no memory for it, or somebody killed it.
    pub(crate) fn is_the_hosts_doing(&self) -> bool {
        self.why.map_or(self.status == ProcessExit::Signaled(SIGKILL), |why| why == cgroup::HOST_OUT_OF_MEMORY)
    }
}

impl fmt::Display for MachineExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = self.why {
            write!(f, "{why}: ")?;
        }
        match self.status {
            ProcessExit::Exited(code) => write!(f, "{} exited with status {code}", self.process),
            ProcessExit::Signaled(signal) => write!(f, "{} was killed by signal {signal}", self.process),
            ProcessExit::Unknown => write!(f, "{} ended", self.process),
        }
    }
}

/// Why a machine could not be launched, adopted or swept.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No such image.
    #[error("there is no image \"{image}\"; there are: {}", list(known))]
    UnknownImage {
        /// The name asked for.
        image: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The image's files are wrong.
    #[error("image \"{image}\" cannot be booted: {problem}")]
    BadImage {
        /// The image.
        image: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process ended before the machine was up.
    #[error("{exit} while the machine was being started: {output}")]
    EndedEarly {
        /// Which, and how.
        exit: MachineExit,
        /// The last of what it wrote.
        output: String,
    },
    /// The hypervisor did not make a machine of what was saved.
    #[error("cannot restore the machine")]
    NotRestored {
        /// What it said.
        source: io::Error,
    },
    /// Something else that vmhost needed from the host failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Processes that did not end although they were sent SIGKILL.
    #[error("processes {pids:?} did not end within {seconds} s of SIGKILL")]
    WillNotDie {
        /// Their ids.
        pids: Vec<u32>,
        /// How long was waited.
        seconds: u64,
    },
}

impl LaunchError {
    /// Whether it tells of what a machine was to be restored from: the hypervisor refused that, or ended over it. Whatever else is missing a
    /// machine that boots needs, too.
    pub(crate) fn is_the_templates(&self) -> bool {
        match self {
            Self::NotRestored { .. } => true,
            Self::EndedEarly { exit, .. } => !exit.is_the_hosts_doing(),
            Self::UnknownImage { .. }
            | Self::BadImage { .. }
            | Self::Spawn { .. }
            | Self::Io { .. }
            | Self::WillNotDie { .. } => false,
        }
    }
}

/// Why a machine has not the shape that it was to be given.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub struct ResizeError {
    /// What is wrong, in words.
    pub problem: String,
    /// The shape that it has now; `None`: nobody can tell.
    pub has: Option<VmShape>,
    /// To how many vCPUs it was told to come, where its guest may have to let go of others still: as long as it does not, it has those, so
    /// that `has` is what it has at least.
    pub told: Option<u32>,
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none (make one with `make guest-image`)".to_owned() } else { names.join(", ") }
}

/// The images there are, for the line that says which driver was chosen.
fn images_in_words(image_dir: &Path) -> String {
    let images = image::names(image_dir);
    if images.is_empty() {
        format!("no image in {} yet (make guest-image)", image_dir.display())
    } else {
        format!("images: {}", images.join(", "))
    }
}

/// What the drivers need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorSettings {
    /// Directory of images, one directory each.
    pub image_dir: PathBuf,
    /// For the process driver: the guest agent's program and its leading arguments; `--listen unix:PATH` is appended.
    pub agent_command: Vec<OsString>,
    /// Users that VMs may run as; `None`: they have none of their own.
    pub vm_uids: Option<UserRange>,
}

/// Why there is no driver.
#[derive(Debug, thiserror::Error)]
pub enum ChooseError {
    /// This machine lacks what the driver needs.
    #[error("the driver \"{driver}\" cannot run here: {}", missing.join("; "))]
    Missing {
        /// The driver.
        driver: &'static str,
        /// What is missing, each with the command that fixes it.
        missing: Vec<String>,
    },
}

/// The driver to use, and in one line why.
///
/// # Errors
/// What is missing, each with the command that fixes it. `Auto` never falls back to `process`: that has no isolation.
pub fn choose(
    choice: DriverChoice,
    settings: &HypervisorSettings,
) -> Result<(Arc<dyn Hypervisor>, String), ChooseError> {
    match choice {
        DriverChoice::Auto => choose_best(settings),
        DriverChoice::CloudHypervisor => {
            let (driver, why) = cloud_hypervisor::find(settings)?;
            Ok((Arc::new(driver), format!("cloud-hypervisor: as asked; {why}")))
        }
        DriverChoice::Qemu => {
            let (driver, why) = qemu::find(settings)?;
            Ok((Arc::new(driver), format!("qemu: as asked; {why}")))
        }
        DriverChoice::Process => {
            let why = "process: as asked; jobs run as plain processes of this machine, WITHOUT isolation".to_owned();
            Ok((Arc::new(process::Process::new(settings)?), why))
        }
    }
}

fn choose_best(settings: &HypervisorSettings) -> Result<(Arc<dyn Hypervisor>, String), ChooseError> {
    let best = "the best this machine can run";
    let passed_over = match cloud_hypervisor::find(settings) {
        Ok((driver, why)) => return Ok((Arc::new(driver), format!("cloud-hypervisor: {best}; {why}"))),
        // Without KVM it is no choice at all, and QEMU says so itself.
        Err(ChooseError::Missing { missing, .. }) if doctor::kvm().is_ok() => {
            format!(", not cloud-hypervisor: {}", missing.join("; "))
        }
        Err(ChooseError::Missing { .. }) => String::new(),
    };
    let (driver, why) = qemu::find(settings)?;
    Ok((Arc::new(driver), format!("qemu: {best}{passed_over}; {why}")))
}
