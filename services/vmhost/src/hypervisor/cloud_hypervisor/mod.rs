//! Cloud Hypervisor: for production. KVM only.
//!
//! ```text
//!   vmhost ─► socket `api` ──► cloud-hypervisor ── stdout, FIFO `output` ─► console: the guest's serial port too
//!      │                        │       └───────── FIFO `events` ─────────► why the machine is over
//!      └────► socket `vsock` ──►└─► guest, vsock port 1024
//! ```
//!
//! A VM is made in steps: the process, `vm.create`, what has to be passed as a descriptor, `vm.boot`. From then on the
//! API is needed only to resize it and to tell what the guest's disks did: a pidfd and the guest agent answer everything else, and adoption asks
//! them alone.
//!
//! A guest that resets would be booted again by the same process. Here a machine boots once, as with QEMU, so the event of
//! a reset ends it; should that event be lost, the agent's new boot id tells.
//!
//! A machine is saved as it is, paused, but for its confinement to its own directory, which is that of each machine that is restored from
//! it. It has its vsock device then, which is a socket's relative path; a network interface is added before it goes on.
//!
//! It runs under its own seccomp filters, and where the kernel has it under a Landlock that it makes itself: it opens the image's files, its
//! disks, its own directory and nothing else. What `confine` does comes on top.

mod api;
#[cfg(test)]
mod api_tests;
mod config;
mod resize;
#[cfg(test)]
mod tests;
mod version;

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{
        fs::{PermissionsExt as _, lchown},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use blixard::{pb::common::v1::IoCounters, vm::VmShape};
use landlock::{ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _};
use tokio::runtime::Handle;

use self::{
    api::{Api, ApiError, DeviceCounters, Ping},
    config::{NetConfig, RestoreConfig, SnapshotConfig, VmConfig},
};
use super::{
    AGENT_PORT, ChooseError, HypervisorSettings, Launch, LaunchError, Machine, Nic, ResizeError, Templates, doctor,
    events::Events,
    image::Image,
    images_in_words,
    machine::{self, Agent, Kind, Needs, Starting, cannot},
    own_dir,
    seccomp::Uses,
    socket::SocketDir,
    template, tools,
    usage::Counters,
    vmm::{self, Vmm},
};

const VMM: &str = "cloud-hypervisor";
/// Where it takes calls. It leaves a file of this name with `.lock` appended beside it.
const API_SOCKET: &str = "api";
/// Where its vsock proxy takes connections to the guest.
const VSOCK_SOCKET: &str = "vsock";
const EVENTS_FIFO: &str = "events";
/// Where in its directory a machine is saved to.
const SAVED: &str = "saved";
/// In it: what `vm.create` was told …
const SAVED_CONFIG: &str = "config.json";
/// … and the guest's memory.
const SAVED_MEMORY: &str = "memory-ranges";
/// What it may take beside the guest's memory, in MiB. Measured: 2 of an idle machine; its devices' buffers come on top.
const OVERHEAD_MIB: u32 = 96;
/// It listens after a few milliseconds; the rest is for a loaded host.
const API_PATIENCE: Duration = Duration::from_secs(20);
/// The Landlock version that it insists on. Linux 6.2 has it.
const LANDLOCK_ABI: ABI = ABI::V3;

const KIND: Kind = Kind {
    driver: "cloud-hypervisor",
    processes: &[VMM],
    agent: Agent::Hybrid(VSOCK_SOCKET),
    serial: None,
    events: Some(Events { fifo: EVENTS_FIFO, verdict }),
    counters: Some(Counters { socket: API_SOCKET, ask: |socket| Box::pin(ask_counters(socket)) }),
    has_children: false,
};

/// What every boot needs.
#[derive(Debug, Clone)]
pub(super) struct Boot {
    program: PathBuf,
    landlock: bool,
}

/// The driver, and in half a line how it will run.
///
/// # Errors
/// What is missing, each with what to do about it.
pub(super) fn find(settings: &HypervisorSettings) -> Result<(Vmm<Boot>, String), ChooseError> {
    let (kvm, installed) = (doctor::kvm(), installed());
    let (program, version) = match (kvm, installed) {
        (Ok(()), Ok(installed)) => installed,
        (kvm, installed) => {
            let missing = [kvm.err(), installed.err()].into_iter().flatten().collect();
            return Err(ChooseError::Missing { driver: KIND.driver, missing });
        }
    };
    let landlock = has_landlock();
    let driver = Vmm::new(Boot { program, landlock }, &settings.image_dir);
    let why = format!("version {version}, {}; {}", confinement(landlock), images_in_words(&driver.image_dir));
    Ok((driver, why))
}

/// The program and its version, if it is there and one that this driver is made for; else what is wrong.
pub(super) fn installed() -> Result<(PathBuf, String), String> {
    let tool = tools::CLOUD_HYPERVISOR;
    let program = tool.find().ok_or_else(|| tool.missing())?;
    let version = version::check(&program)?;
    Ok((program, version))
}

/// How its process is confined, in words.
pub(super) fn confinement(landlock: bool) -> &'static str {
    if landlock {
        "confined by seccomp and Landlock"
    } else {
        "confined by seccomp, without Landlock (Linux 6.2 has it)"
    }
}

/// Whether this kernel offers what it insists on when it is told to use Landlock.
pub(super) fn has_landlock() -> bool {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    ruleset.handle_access(AccessFs::from_all(LANDLOCK_ABI)).and_then(Ruleset::create).is_ok()
}

#[tonic::async_trait]
impl Templates for Vmm<Boot> {
    fn basis(&self, launch: &Launch) -> Result<String, LaunchError> {
        let basis = template::basis(launch, &self.image_dir, KIND.driver, &[&self.boot.program])?;
        let most = resize::most(launch.shape());
        Ok(format!("{basis}\nlandlock {}\nmost {} {}", self.boot.landlock, most.vcpus, most.memory_mib))
    }

    async fn save(&self, launch: &Launch, into: &Path) -> Result<(), LaunchError> {
        let saved = machine::own_dir(launch).join(SAVED);
        let start = |boot: &Boot, starting: &mut Starting, image: Image, what: &Launch| {
            let saved = starting.own_dir().join(SAVED);
            fs::create_dir(&saved).map_err(cannot(format!("make {}", saved.display())))?;
            starting.contain(needs(&image, what))?;
            // Not before: what is in the machine's directory is made for use alone then.
            let lent = fs::set_permissions(&saved, fs::Permissions::from_mode(own_dir::LENT));
            lent.map_err(cannot(format!("lend {}", saved.display())))?;
            let config = VmConfig::new(what, image, VSOCK_SOCKET, boot.landlock);
            boot.boot(starting, config.saved_to(SAVED), what)
        };
        let machine = self.launch_with(KIND, launch, start).await?;
        template::be_nice(&*machine);
        let done = save_running(&*machine, launch).await;
        // Nobody may change what is kept while it is looked at.
        machine.kill().await;
        done.and_then(|()| move_saved(&saved, into))
    }

    async fn restore(&self, launch: &Launch, template: &Path) -> Result<Arc<dyn Machine>, LaunchError> {
        let template = template.to_owned();
        self.launch_with(KIND, launch, move |boot, starting, image, what| {
            link_saved(&template, &starting.own_dir().join(SAVED))
                .map_err(cannot(format!("reach {} from the machine's directory", template.display())))?;
            starting.contain(needs(&image, what))?;
            boot.restore(starting, what)
        })
        .await
    }
}

async fn save_running(machine: &dyn Machine, launch: &Launch) -> Result<(), LaunchError> {
    // What waits for the agent's knock takes the socket away when it has come.
    let own = machine::own_dir(launch);
    let knock = own.join(format!("{VSOCK_SOCKET}_{AGENT_PORT}"));
    template::until_ready(machine, |_| !knock.exists()).await?;
    let sockets = SocketDir::open(&own).map_err(cannot("open the machine's directory"))?;
    let socket = sockets.hold(API_SOCKET).map_err(cannot("reach the hypervisor's API"))?;
    let api = Api::new(socket.path());
    api.pause().await.map_err(failed("pause the VM"))?;
    api.snapshot(&SnapshotConfig::new(SAVED)).await.map_err(failed("save the VM"))
}

/// Moves what a machine was saved as out of its directory. A machine that is restored has no more business with such a place. And of its
/// memory only what is not zero is kept: the hypervisor skips holes when it reads it back.
fn move_saved(saved: &Path, into: &Path) -> Result<(), LaunchError> {
    let moved = || {
        let path = saved.join(SAVED_CONFIG);
        let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&fs::read(&path)?)?;
        config.remove("landlock_rules");
        fs::write(&path, serde_json::to_vec(&config)?)?;
        template::dig_holes(&saved.join(SAVED_MEMORY))?;
        for entry in fs::read_dir(saved)? {
            let entry = entry?;
            // Every machine that is restored reads it, whoever that runs as, and none may change it.
            let (owner, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            lchown(entry.path(), Some(owner), Some(group))?;
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o444))?;
            fs::rename(entry.path(), into.join(entry.file_name()))?;
        }
        Ok(())
    };
    // A link would lead this process elsewhere.
    let plain = || {
        for entry in fs::read_dir(saved)? {
            let entry = entry?;
            if !entry.file_type()?.is_file() {
                return Err(io::Error::other(format!("{} is no file", entry.path().display())));
            }
        }
        Ok(())
    };
    plain().map_err(cannot("keep what the VM was saved as"))?;
    moved().map_err(cannot("keep what the VM was saved as"))
}

/// Puts the files of a template into a directory that is made for it: the template's own is closed to the machine's user.
fn link_saved(template: &Path, dir: &Path) -> io::Result<()> {
    fs::create_dir(dir)?;
    for entry in fs::read_dir(template)? {
        let entry = entry?;
        fs::hard_link(entry.path(), dir.join(entry.file_name()))?;
    }
    Ok(())
}

fn needs(image: &Image, launch: &Launch) -> Needs {
    let reads = image.files().cloned().collect();
    let has_disks = image.root_disk.is_some() || !launch.disks.is_empty();
    Needs { overhead_mib: OVERHEAD_MIB, reads, restrict_themselves: true, uses: Uses { io_uring: has_disks } }
}

#[tonic::async_trait]
impl vmm::Boot for Boot {
    const KIND: Kind = KIND;

    fn uses_kvm(&self) -> bool {
        true
    }

    fn start(&self, starting: &mut Starting, image: Image, launch: &Launch) -> Result<(), LaunchError> {
        starting.contain(needs(&image, launch))?;
        self.boot(starting, VmConfig::new(launch, image, VSOCK_SOCKET, self.landlock), launch)
    }

    fn most(shape: VmShape) -> Option<VmShape> {
        Some(resize::most(shape))
    }

    async fn resize(launch: &Launch, to: VmShape, room: VmShape) -> Result<VmShape, ResizeError> {
        resize::resize(launch, to, room).await
    }
}

impl Boot {
    fn boot(&self, starting: &mut Starting, config: VmConfig, launch: &Launch) -> Result<(), LaunchError> {
        let (api, pid) = self.start_vmm(starting)?;
        Handle::current().block_on(async {
            check(&api.ping().await.map_err(failed("ask cloud-hypervisor who it is"))?, pid)?;
            api.create(&config).await.map_err(failed("create the VM"))?;
            if let Some(nic) = &launch.nic {
                add_nic(&api, nic).await?;
            }
            api.boot().await.map_err(failed("boot the VM"))
        })
    }

    fn restore(&self, starting: &mut Starting, launch: &Launch) -> Result<(), LaunchError> {
        let (api, pid) = self.start_vmm(starting)?;
        Handle::current().block_on(async {
            check(&api.ping().await.map_err(failed("ask cloud-hypervisor who it is"))?, pid)?;
            api.restore(&RestoreConfig::new(SAVED)).await.map_err(not_restored)?;
            if let Some(nic) = &launch.nic {
                add_nic(&api, nic).await?;
            }
            api.resume().await.map_err(not_restored)
        })?;
        // Its agent knocked when it was saved.
        starting.agent_serves()
    }

    /// Starts the process and waits until it takes calls.
    fn start_vmm(&self, starting: &mut Starting) -> Result<(Api, u32), LaunchError> {
        let pid = starting.start(VMM, &self.program, &arguments())?;
        let socket = starting.sockets().for_us(API_SOCKET);
        let ready = || UnixStream::connect(&socket).is_ok();
        starting.wait_until("reach cloud-hypervisor's API", API_PATIENCE, ready)?;
        Ok((Api::new(socket), pid))
    }
}

/// By a call of its own: `vm.create` takes no descriptors.
async fn add_nic(api: &Api, nic: &Nic) -> Result<(), LaunchError> {
    let tap = nic.open().map_err(cannot(format!("open the TAP {}", nic.tap)))?;
    let added = api.add_net(&NetConfig::new(nic), vec![tap]).await;
    added.map(drop).map_err(failed("give the VM its network interface"))
}

/// Paths are relative to the launch's directory, which it runs in: in its options a comma would end one.
fn arguments() -> Vec<OsString> {
    let api = format!("path={API_SOCKET}");
    let events = format!("path={EVENTS_FIFO}");
    ["--api-socket", &api, "--event-monitor", &events, "--seccomp", "true"].map(OsString::from).to_vec()
}

fn failed(action: &str) -> impl FnOnce(ApiError) -> LaunchError {
    let action = action.to_owned();
    move |error| cannot(action)(io::Error::other(error))
}

fn not_restored(error: ApiError) -> LaunchError {
    LaunchError::NotRestored { source: io::Error::other(error) }
}

/// Whether who answers is whom we started, and one that we know how to talk to: the program may have been replaced since
/// the driver was chosen.
fn check(ping: &Ping, pid: u32) -> Result<(), LaunchError> {
    let problem = if ping.pid != pid {
        format!("process {} answers on the API socket of process {pid}", ping.pid)
    } else if version::major(&ping.version) != Some(version::SUPPORTED) {
        version::other(&format!("cloud-hypervisor says that it is version {}", ping.version))
    } else if !ping.features.iter().any(|feature| feature == "kvm") {
        format!("this cloud-hypervisor was built without KVM, with: {}", ping.features.join(", "))
    } else {
        return Ok(());
    };
    Err(cannot("use this cloud-hypervisor")(io::Error::other(problem)))
}

/// What the guest did with its disks, all of them together, as the hypervisor says.
async fn ask_counters(socket: PathBuf) -> Option<IoCounters> {
    match Api::new(socket).counters().await {
        Ok(devices) => Some(disks(devices.values())),
        Err(error) => {
            tracing::debug!(%error, "cloud-hypervisor does not tell what its devices did");
            None
        }
    }
}

/// Of a hypervisor's devices, those that count as disks do.
fn disks<'a>(devices: impl Iterator<Item = &'a DeviceCounters> + Clone) -> IoCounters {
    let sum = |name: &str| {
        devices.clone().filter_map(|device| device.get(name)).fold(0, |sum: u64, n| sum.saturating_add(*n))
    };
    IoCounters {
        read_bytes: sum("read_bytes"),
        written_bytes: sum("write_bytes"),
        reads: Some(sum("read_ops")),
        writes: Some(sum("write_ops")),
    }
}

/// What an event says about the machine's end.
fn verdict(event: &str) -> Option<&'static str> {
    #[derive(serde::Deserialize)]
    struct Event {
        source: String,
        event: String,
    }
    let event: Event = serde_json::from_str(event).ok()?;
    match (event.source.as_str(), event.event.as_str()) {
        ("guest", "panic") => Some("the guest's kernel panicked"),
        ("vm", "rebooting") => Some("the guest reset itself"),
        _ => None,
    }
}
