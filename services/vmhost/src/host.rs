//! All VMs of this node.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blixard::{
    config::{DriverChoice, FirecrackerConfig, NetworkConfig, UserRange, VmManagerConfig},
    egress::{NETWORK_LABEL, NETWORK_LABEL_ON},
    error::{Error, Reason, invalid},
    id::{JobId, NodeId, VmId},
    job::JobSpec,
    limits::MAX_MESSAGE_BYTES,
    node::{HostPressure, shortage},
    pb::{common::v1 as common, guest::v1::GuestNetwork, vmhost::v1 as pb},
    time::Timestamp,
    vm::{VmConfig, VmResize, VmShape, VmState},
    volume::Volumes,
};
use blixard_chassis::{SecretKey, Tasks};
use futures::future::join_all;
use pb::vm_host_service_server::VmHostServiceServer;
use tokio::sync::watch;

use crate::{
    absent::DELETED,
    capacity::Capacity,
    cleaning,
    consoles::Consoles,
    containment::{Containment, Place},
    driver::{self, Beginning, VmHandle, stale, with_sources},
    heartbeat,
    hypervisor::{self, ChooseError, Contained, DiskLimit, Hypervisor, HypervisorSettings, Launch},
    input::InputSource,
    invariants,
    lease::LEASE,
    lifecycle::{Limits, Run},
    logs::{Fence, LogLimits, LogStore},
    net::{self, Lease, Network, Unavailable},
    node_lease::{self, NodeLease},
    pressure::{self, HostWatch, Pressure, Told},
    records::{self, StateDir, VmRecord},
    recovery,
    registry::Registry,
    resize::{self, Shapes},
    service::Service,
    templates::{self, TemplateStore, Wanted},
    volumes::{Prepared, Room, VolumeStore},
};

/// How long a guest may take to boot to its agent: QEMU without hardware virtualization on a busy host needs half a minute.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// The same for a plain process.
const PROCESS_BOOT_PATIENCE: Duration = Duration::from_secs(10);

/// What a vmhost needs to know.
#[derive(Debug, Clone)]
pub struct VmHostConfig {
    /// This node's name.
    pub node_id: NodeId,
    /// What each VM holds, one directory a VM.
    pub vm_state_dir: PathBuf,
    /// The logs of attempts.
    pub log_dir: PathBuf,
    /// Which hypervisor.
    pub driver: DriverChoice,
    /// Directory of images.
    pub image_dir: PathBuf,
    /// Users that VMs run as; `None`: they have none of their own.
    pub vm_uids: Option<UserRange>,
    /// What each VM may use of the disk with its state.
    pub disk_limit: DiskLimit,
    /// For the process driver: the guest agent's program and its leading arguments.
    pub agent_command: Vec<OsString>,
    /// How many VMs may run at once.
    pub max_vms: u32,
    /// How many templates may be kept; 0: every VM boots.
    pub templates: u32,
    /// Where the registry answers, as `http://host:port`.
    pub registry_endpoint: String,
    /// Where others reach this vmhost, as `http://host:port`.
    pub advertise_endpoint: String,
    /// Opens the secrets of jobs; `None`: jobs that have some fail here.
    pub secret_key: Option<SecretKey>,
    /// Labels that jobs can ask for.
    pub node_labels: BTreeMap<String, String>,
    /// The guests' network.
    pub network: NetworkConfig,
    /// What VMs can have mounted read-only, by name: disk images and directories.
    pub volumes: BTreeMap<String, String>,
    /// How VMs are watched.
    pub health: HealthConfig,
    /// How large logs grow.
    pub logs: LogLimits,
    /// How memory and disk are looked at; `None`: this machine's.
    pub watch: Option<HostWatch>,
    /// Times that only tests change.
    pub pace: Pace,
}

/// How VMs are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthConfig {
    /// How often the agent of each VM that runs nothing is asked whether it is well; `None`: never.
    pub check_every: Option<Duration>,
    /// A service VM that runs nothing and has less of its memory available than this is ended; 0: never.
    pub recycle_below_memory_percent: u32,
}

impl From<&VmManagerConfig> for HealthConfig {
    fn from(config: &VmManagerConfig) -> Self {
        let seconds = u64::from(config.health_check_seconds);
        Self {
            check_every: (seconds > 0).then(|| Duration::from_secs(seconds)),
            recycle_below_memory_percent: config.recycle_below_memory_percent,
        }
    }
}

impl From<&FirecrackerConfig> for DiskLimit {
    fn from(config: &FirecrackerConfig) -> Self {
        Self { mib_per_second: config.vm_disk_mib_per_second, operations_per_second: config.vm_disk_iops }
    }
}

/// Times that are part of the design, not of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How long attempts go on without an answer of the registry.
    pub lease: Duration,
    /// When what the registry has forgotten is deleted for the first time.
    pub first_cleaning_after: Duration,
    /// And how often from then on.
    pub clean_every: Duration,
    /// How often it is asked whether logs take too much of the disk.
    pub make_room_every: Duration,
    /// How often this machine's memory and disk are looked at.
    pub look_at_host_every: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            lease: LEASE,
            first_cleaning_after: cleaning::FIRST_AFTER,
            clean_every: cleaning::EVERY,
            make_room_every: cleaning::MAKE_ROOM_EVERY,
            look_at_host_every: pressure::LOOK_EVERY,
        }
    }
}

/// Why a vmhost can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory is in use or can't be used.
    #[error(transparent)]
    StateDir(Box<dyn std::error::Error + Send + Sync>),
    /// The logs' directory can't be used.
    #[error("cannot use the log directory {}", path.display())]
    LogDir {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No VM driver can run here.
    #[error(transparent)]
    Driver(#[from] ChooseError),
    /// This machine can't be looked at.
    #[error("cannot tell what this machine can offer to VMs")]
    Capacity(#[source] io::Error),
    /// The registry's endpoint is no endpoint.
    #[error("the registry's endpoint")]
    Registry(#[source] Error),
    /// The current directory, below which volumes with relative paths are, is not there.
    #[error("cannot tell where volumes are")]
    Volumes(#[source] io::Error),
    /// The VMs on disk can't be read.
    #[error("cannot read the VM state directory")]
    Recovery(#[source] io::Error),
}

/// The VMs of one node, and the service that speaks for them.
///
/// When the tasks it was started with are shut down, its VMs live on; the next start adopts them.
pub struct VmHost {
    host: Arc<Host>,
}

impl VmHost {
    /// Takes the state directory, adopts or ends the VMs found there, and keeps the node registered in the background.
    ///
    /// # Errors
    /// The directories can't be had, or no driver can run here.
    pub async fn start(config: VmHostConfig, tasks: &Tasks) -> Result<Self, StartError> {
        let settings = HypervisorSettings {
            image_dir: config.image_dir.clone(),
            agent_command: config.agent_command.clone(),
            vm_uids: config.vm_uids,
        };
        let (hypervisor, why) = hypervisor::choose(config.driver, &settings)?;
        tracing::info!(driver = hypervisor.name(), why, "VM driver chosen");
        Self::start_with(config, hypervisor, tasks).await
    }

    /// The same with a given hypervisor.
    ///
    /// # Errors
    /// The directories can't be had.
    pub async fn start_with(
        config: VmHostConfig,
        hypervisor: Arc<dyn Hypervisor>,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let (host, wanted_templates) = Host::open(config, hypervisor, tasks.clone()).await?;
        let host = Arc::new(host);
        recovery::recover(&host).await.map_err(StartError::Recovery)?;
        templates::spawn_maker(&host, wanted_templates, tasks);
        if let Ok(network) = &host.network {
            if let Err(error) = network.settle().await {
                tracing::error!(error = with_sources(&error), "the guests' network can't be set up; it is tried again");
            }
            tasks.spawn_until_end("vmhost-network", Arc::clone(network).keep());
        }
        host.take_network_away().await;
        // Before it registers: a node that is short of something says so from the first.
        let mut pressure = Pressure::default();
        pressure::look(&host, &mut pressure).await;
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-pressure", async move { pressure::keep(&own, pressure).await });
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-register", async move { heartbeat::keep_registered(&own).await });
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-lease", async move { node_lease::keep(&own).await });
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-clean", async move { cleaning::keep_clean(&own).await });
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-log-room", async move { cleaning::keep_room(&own).await });
        let own = Arc::clone(&host);
        tasks.spawn_until_end("vmhost-invariants", async move { invariants::keep(&own).await });
        let leaving = Arc::clone(&host);
        tasks.spawn("vmhost-leave", async move {
            leaving.tasks.token().cancelled().await;
            let left = leaving.vms().values().filter(|vm| !vm.view.borrow().state.is_terminal()).count();
            tracing::info!(vms = left, "vmhost ends; its VMs go on and are adopted at its next start");
        });
        Ok(Self { host })
    }

    /// The name of the VM driver in use.
    #[must_use]
    pub fn driver(&self) -> &'static str {
        self.host.hypervisor.name()
    }

    /// The gRPC service.
    #[must_use]
    pub fn service(&self) -> VmHostServiceServer<Service> {
        VmHostServiceServer::new(Service::new(Arc::clone(&self.host)))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// What the drivers share.
pub(crate) struct Host {
    pub(crate) state: StateDir,
    pub(crate) logs: LogStore,
    pub(crate) consoles: Consoles,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) templates: Arc<TemplateStore>,
    /// The guests' network, or why there is none.
    pub(crate) network: Result<Arc<Network>, Unavailable>,
    pub(crate) containment: Containment,
    volumes: Arc<VolumeStore>,
    pub(crate) registry: Registry,
    pub(crate) lease: Arc<NodeLease>,
    pub(crate) health: HealthConfig,
    pub(crate) watch: HostWatch,
    /// What this machine is short of.
    pub(crate) pressure: watch::Sender<Told>,
    pub(crate) pace: Pace,
    pub(crate) tasks: Tasks,
    /// The host's boot.
    pub(crate) boot: String,
    capacity: Capacity,
    max_vms: u32,
    advertise_endpoint: String,
    labels: BTreeMap<String, String>,
    secret_key: Option<SecretKey>,
    vms: Mutex<BTreeMap<VmId, VmHandle>>,
}

impl Host {
    async fn open(
        config: VmHostConfig,
        hypervisor: Arc<dyn Hypervisor>,
        tasks: Tasks,
    ) -> Result<(Self, Wanted), StartError> {
        let log_dir = |source| StartError::LogDir { path: config.log_dir.clone(), source };
        let state = StateDir::open(&config.vm_state_dir).map_err(|error| StartError::StateDir(error.into()))?;
        let network = Network::open(&config.network, &config.node_id, state.path(), &*hypervisor, &tasks).await;
        match &network {
            Ok(network) => tracing::info!(network = network.describe(), "guests can have a network"),
            Err(Unavailable::Off) => tracing::debug!("guests have no network: network.subnet is not set"),
            Err(why) => tracing::warn!(%why, "guests have NO NETWORK, though network.subnet is set"),
        }
        let contained = hypervisor.containment();
        let containment =
            Containment::open(config.vm_uids, config.disk_limit, &config.node_id, state.path(), contained);
        match (contained, containment.describe()) {
            (Contained::No, _) => {}
            (Contained::Yes { .. }, (true, how)) => tracing::info!(how, "VMs are contained"),
            (Contained::Yes { .. }, (false, how)) => tracing::warn!(how, "VMs are contained in a REDUCED form"),
        }
        let (templates, wanted_templates) = TemplateStore::open(state.path(), config.templates, &hypervisor).await;
        let volumes = VolumeStore::open(&config.volumes, state.path(), tasks.token().clone());
        let dirs = [state.path().to_owned(), config.log_dir.clone()];
        let host = Self {
            state,
            containment,
            templates: Arc::new(templates),
            network: network.map(Arc::new),
            volumes: Arc::new(volumes.map_err(StartError::Volumes)?),
            logs: LogStore::open(&config.log_dir, config.logs).map_err(log_dir)?,
            consoles: Consoles::open(&config.log_dir.join("consoles")).map_err(log_dir)?,
            hypervisor,
            registry: Registry::new(&config.registry_endpoint, config.node_id).map_err(StartError::Registry)?,
            lease: Arc::new(NodeLease::new(config.pace.lease)),
            health: config.health,
            watch: config.watch.unwrap_or_else(|| HostWatch::of_this_machine(dirs)),
            pressure: watch::Sender::default(),
            pace: config.pace,
            tasks,
            boot: records::host_boot(),
            capacity: Capacity::of_this_machine().map_err(StartError::Capacity)?,
            max_vms: config.max_vms,
            advertise_endpoint: config.advertise_endpoint,
            labels: config.node_labels,
            secret_key: config.secret_key,
            vms: Mutex::default(),
        };
        Ok((host, wanted_templates))
    }

    /// The node, as it registers.
    pub(crate) fn node(&self) -> common::Node {
        let mut labels = self.labels.clone();
        // Whether it has a network is not for settings to say.
        labels.remove(NETWORK_LABEL);
        if self.network.is_ok() {
            labels.insert(NETWORK_LABEL.to_owned(), NETWORK_LABEL_ON.to_owned());
        }
        common::Node {
            id: self.registry.node_id().to_string(),
            endpoint: self.advertise_endpoint.clone(),
            driver: self.hypervisor.name().to_owned(),
            vcpus: self.capacity.vcpus,
            memory_mib: self.capacity.memory_mib,
            max_vms: self.max_vms,
            images: self.images(),
            volumes: self.offered_volumes(),
            scratch_mib: self.largest_scratch_mib(),
            labels,
            pressure: self.pressure.borrow().pressure.iter().map(|pressure| pressure.to_pb().into()).collect(),
            ..Default::default()
        }
    }

    /// The images that can be booted now, sorted.
    pub(crate) fn images(&self) -> Vec<String> {
        self.hypervisor.images()
    }

    /// The volumes that VMs can have now, sorted.
    pub(crate) fn offered_volumes(&self) -> Vec<String> {
        if self.hypervisor.takes_devices() { self.volumes.offered() } else { vec![] }
    }

    fn largest_scratch_mib(&self) -> u64 {
        let room = Room::of(self.state.path(), std::iter::empty());
        let total =
            room.inspect_err(|error| tracing::error!(%error, "the VM state directory's disk can't be looked at"));
        // Even a node with no room for any can have volumes.
        if self.hypervisor.takes_devices() { total.map_or(1, |room| room.total_mib.max(1)) } else { 0 }
    }

    /// Where the inputs of jobs come from.
    pub(crate) fn inputs(&self) -> InputSource {
        InputSource { registry: self.registry.clone(), key: self.secret_key.clone() }
    }

    /// What the hypervisor is to launch, or has launched.
    pub(crate) fn launch_of(&self, vm_id: VmId, record: &VmRecord) -> Launch {
        let Place { user, cgroup } = record.place.clone();
        let nic = record.lease.as_ref().map(Lease::nic);
        Launch { nic, user, cgroup, ..self.launch(vm_id, &record.config) }
    }

    /// What can be said of a launch without its record: enough to sweep.
    pub(crate) fn launch(&self, vm_id: VmId, config: &VmConfig) -> Launch {
        Launch {
            vm_id,
            image: config.image.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            dir: self.state.vm(vm_id).machine(),
            nic: None,
            user: None,
            cgroup: self.containment.cgroup(vm_id),
            io_max: self.containment.io_max(),
            disks: vec![],
        }
    }

    /// When the network was switched off and nobody has one any more.
    async fn take_network_away(&self) {
        let off = matches!(self.network, Err(Unavailable::Off));
        if off && self.vms().values().all(|vm| vm.lease.is_none()) {
            let taken = net::take_away(self.registry.node_id(), self.state.path(), &self.tasks).await;
            if let Err(error) = taken {
                tracing::warn!(%error, "what is left of a network for guests can't be taken away");
            }
        }
    }

    /// Makes the interface that a machine is to be launched with, if any.
    pub(crate) async fn attach(&self, launch: &Launch) -> Result<(), String> {
        match (&launch.nic, &self.network) {
            (None, _) => Ok(()),
            (Some(_), Ok(network)) => network.attach(launch.vm_id).await.map_err(|error| with_sources(&error)),
            (Some(_), Err(why)) => Err(format!("this node has no network for its guests: {why}")),
        }
    }

    /// Makes the disks that a machine is to be launched with, in its directory.
    pub(crate) async fn prepare(self: &Arc<Self>, volumes: &Volumes, dir: &Path) -> Result<Prepared, String> {
        let host = Arc::clone(self);
        let room = move || host.disk_room(&host.vms());
        self.volumes.prepare(volumes, dir, room).await.map_err(|error| with_sources(&error))
    }

    /// What the disk of the VM state directory has to give. Blocking, for a few microseconds.
    pub(crate) fn disk_room(&self, vms: &BTreeMap<VmId, VmHandle>) -> io::Result<Room> {
        let others = self.with_scratch(vms).map(|(vm, dir)| (vm.config.volumes.clone(), dir));
        Room::of(self.state.path(), others)
    }

    /// The VMs that live and have scratch disks, and their launches' directories.
    pub(crate) fn with_scratch<'a>(
        &'a self,
        vms: &'a BTreeMap<VmId, VmHandle>,
    ) -> impl Iterator<Item = (&'a VmHandle, PathBuf)> {
        let alive = vms.values().filter(|vm| !vm.view.borrow().state.is_terminal());
        let with_scratch = alive.filter(|vm| vm.config.volumes.scratch_mib() > 0);
        with_scratch.map(|vm| (vm, self.state.vm(vm.id).machine()))
    }

    /// What a VM's guest is told of its network.
    pub(crate) fn guest_network(&self, record: &VmRecord) -> Option<GuestNetwork> {
        let (lease, network) = (record.lease.as_ref()?, self.network.as_ref().ok()?);
        Some(network.configuration(lease, &record.config.egress))
    }

    pub(crate) fn boot_patience(&self) -> Duration {
        if self.hypervisor.name() == "process" { PROCESS_BOOT_PATIENCE } else { BOOT_PATIENCE }
    }

    /// The VMs; never held across an await.
    pub(crate) fn vms(&self) -> MutexGuard<'_, BTreeMap<VmId, VmHandle>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vm(&self, vm_id: VmId) -> Option<VmHandle> {
        self.vms().get(&vm_id).cloned()
    }

    /// A VM that has ended and is reported, or that never came to be.
    pub(crate) fn forget(&self, vm_id: VmId) {
        self.vms().remove(&vm_id);
        if let Ok(network) = &self.network {
            network.give_back(vm_id);
        }
        self.containment.give_back(vm_id);
    }

    /// Gives back what is kept of the network for a VM that is not here; false: it is here again.
    pub(crate) async fn return_lease(&self, vm_id: VmId) -> bool {
        let Ok(network) = &self.network else { return false };
        if self.vms().contains_key(&vm_id) {
            return false;
        }
        network.detach(vm_id).await;
        // Under the lock, so that none is taken from a VM of this id that begins meanwhile.
        let vms = self.vms();
        let gone = !vms.contains_key(&vm_id);
        if gone {
            network.give_back(vm_id);
        }
        gone
    }

    /// Deletes what is left of a VM that is not here. Blocking.
    pub(crate) fn delete_leftover(&self, vm_id: VmId, path: &Path) -> io::Result<()> {
        let deleted = path.with_extension(DELETED);
        if path != deleted {
            // Renamed under the lock, so that no VM of this id begins in what is being deleted.
            let vms = self.vms();
            if vms.contains_key(&vm_id) {
                return Err(io::Error::other(format!("VM {vm_id} is here again")));
            }
            fs::rename(path, &deleted)?;
        }
        fs::remove_dir_all(&deleted)
    }

    fn admit_volumes(&self, config: &VmConfig) -> Result<(), Error> {
        if config.volumes.is_empty() {
            return Ok(());
        }
        if !self.hypervisor.takes_devices() {
            let allowed = format!("none: the driver \"{}\" has no disks to give", self.hypervisor.name());
            let error = invalid("config.volumes", &config.volumes, &allowed);
            return Err(Error { reason: Reason::ExceedsCapacity, ..error });
        }
        let room = self.disk_room(&self.vms()).map_err(unreadable_disk)?;
        self.volumes.admit(&config.volumes, &room)
    }

    /// Starts a VM, unless it is here already; returns when that is on disk.
    pub(crate) async fn start_vm(self: &Arc<Self>, vm_id: VmId, config: VmConfig) -> Result<(), Error> {
        self.admit(&config)?;
        let vm = self.find_or_spawn(vm_id, config)?;
        vm.accepted().await.map_err(|error| match error.reason {
            // Its driver went with us: the next vmhost is asked again.
            Reason::VmNotFound => Error::new(Reason::ShuttingDown, "this vmhost is shutting down"),
            _ => error,
        })
    }

    fn admit(&self, config: &VmConfig) -> Result<(), Error> {
        let too_large = |field: &str, value: u64, allowed: u64| {
            let message = format!("{field}: {value} is more than this node has ({allowed})");
            let error = Error::new(Reason::ExceedsCapacity, message);
            error.with("field", field).with("value", value).with("allowed", allowed)
        };
        if config.vcpus > self.capacity.vcpus {
            return Err(too_large("config.vcpus", config.vcpus.into(), self.capacity.vcpus.into()));
        }
        if u64::from(config.memory_mib) > self.capacity.memory_mib {
            return Err(too_large("config.memory_mib", config.memory_mib.into(), self.capacity.memory_mib));
        }
        if let (true, Err(why)) = (config.egress.needs_network(), &self.network) {
            let allowed = format!("none: this node has no network for its guests ({why})");
            let error = invalid("config.egress", &config.egress, &allowed);
            return Err(Error { reason: Reason::ExceedsCapacity, ..error });
        }
        self.admit_volumes(config)?;
        let known = self.images();
        if known.contains(&config.image) {
            return Ok(());
        }
        let known = known.join(", ");
        let message = format!("this node has no image \"{}\"; it has: {known}", config.image);
        Err(Error::new(Reason::ImageNotFound, message).with("image", &config.image).with("known", known))
    }

    fn find_or_spawn(self: &Arc<Self>, vm_id: VmId, config: VmConfig) -> Result<VmHandle, Error> {
        let mut vms = self.vms();
        if let Some(vm) = vms.get(&vm_id) {
            return if vm.config == config {
                Ok(vm.clone())
            } else {
                let message = format!("VM {vm_id} is here already, with another config");
                Err(Error::new(Reason::RequestIdReused, message).with("request_id", vm_id))
            };
        }
        self.make_room(config.memory_mib, alive_memory(&vms, None))?;
        let scratch_mib = config.volumes.scratch_mib();
        if scratch_mib > 0 {
            let room = self.disk_room(&vms).map_err(unreadable_disk)?;
            room.check(scratch_mib)?;
            // What is saved of a machine takes room, too, and is not worth a VM.
            if self.templates.being_made().is_some_and(|mib| !room.fits(scratch_mib + u64::from(mib))) {
                self.templates.give_way();
            }
        }
        let lease = match &self.network {
            Ok(network) if config.egress.needs_network() => Some(network.lease(vm_id, &config.egress)?),
            Ok(_) | Err(_) => None,
        };
        let place = self.containment.lease(vm_id).inspect_err(|_| {
            if let Ok(network) = &self.network {
                network.give_back(vm_id);
            }
        })?;
        let record = VmRecord {
            lease,
            place,
            shapes: Shapes { most: self.hypervisor.most(config.shape()), ..Shapes::default() },
            config,
            accepted_at: Timestamp::now(),
            host_boot: self.boot.clone(),
            guest_boot: None,
            stop: None,
            end: None,
        };
        let vm = driver::spawn(self, Beginning::fresh(vm_id, record));
        vms.insert(vm_id, vm.clone());
        Ok(vm)
    }

    /// Whether there is room for so much memory beside VMs of these; a template that is being made gives way.
    fn make_room(&self, memory_mib: u32, alive: Vec<u32>) -> Result<(), Error> {
        self.has_relief()?;
        let beside = alive.iter().copied().chain(self.templates.being_made());
        if self.capacity.room_for(memory_mib, beside, self.max_vms).is_err() {
            // Not because of a template.
            self.capacity.room_for(memory_mib, alive.into_iter(), self.max_vms)?;
            self.templates.give_way();
        }
        Ok(())
    }

    /// Whether a VM may be given another shape; `begin` then takes the room that it grows by.
    pub(crate) fn admit_resize(
        &self,
        vm_id: VmId,
        record: &VmRecord,
        to: VmShape,
        begin: impl FnOnce(),
    ) -> Result<(), Error> {
        let cant = format!("the driver \"{}\" can't change a VM that runs", self.hypervisor.name());
        let (most, fixed) = match self.hypervisor.most(record.config.shape()) {
            Some(_) => (record.shapes.most, "it was started by a vmhost that could not give it another"),
            None => (None, cant.as_str()),
        };
        resize::admit(record.shape(), to, most, self.capacity.vcpus, fixed)?;
        let vms = self.vms();
        if to.memory_mib > record.room().memory_mib {
            self.make_room(to.memory_mib, alive_memory(&vms, Some(vm_id)))?;
        }
        begin();
        Ok(())
    }

    /// Gives a VM another shape; the VM as the registry has it then.
    pub(crate) async fn resize_vm(&self, vm_id: VmId, wanted: VmResize) -> Result<common::Vm, Error> {
        let not_found = || Error::new(Reason::VmNotFound, format!("this node has no VM {vm_id}")).with("vm_id", vm_id);
        self.vm(vm_id).ok_or_else(not_found)?.resize(wanted).await?;
        self.registry.vm(vm_id).await?.ok_or_else(not_found)
    }

    /// Whether a template can be made beside the VMs that are here; `begin` then takes the room.
    pub(crate) fn has_room_for_template(&self, memory_mib: u32, begin: impl FnOnce()) -> bool {
        let vms = self.vms();
        let room = self.capacity.room_for(memory_mib, alive_memory(&vms, None).into_iter(), self.max_vms);
        let room = room.and_then(|()| self.has_relief()).is_ok();
        if room {
            begin();
        }
        room
    }

    /// Whether this machine may take another VM.
    fn has_relief(&self) -> Result<(), Error> {
        let told = self.pressure.borrow();
        if told.pressure.is_empty() {
            return Ok(());
        }
        let message = format!("this node is short of {} and takes no VM: {}", shortage(&told.pressure), told.words);
        Err(Error::new(Reason::Overloaded, message))
    }

    /// Whether its disk may take another attempt's output.
    fn has_disk(&self) -> Result<(), Error> {
        let told = self.pressure.borrow();
        if !told.pressure.contains(&HostPressure::DiskCritical) {
            return Ok(());
        }
        Err(Error::new(Reason::Overloaded, format!("this node's disk is full and takes no attempt: {}", told.words)))
    }

    /// Ends a VM; returns when that is on disk.
    pub(crate) async fn stop_vm(&self, vm_id: VmId, grace: Duration, reason: String) -> Result<(), Error> {
        if let Some(vm) = self.vm(vm_id) {
            match vm.stop(grace, reason.clone()).await {
                // It ended in between.
                Err(error) if error.reason == Reason::VmNotFound => return Ok(()),
                answer => return answer,
            }
        }
        let not_found = || Error::new(Reason::VmNotFound, format!("this node has no VM {vm_id}")).with("vm_id", vm_id);
        let recorded = self.registry.vm(vm_id).await?.ok_or_else(not_found)?;
        if recorded.node_id != self.registry.node_id().as_str() {
            return Err(not_found());
        }
        self.bury(recorded, VmState::Terminated, &reason).await
    }

    /// Records the end of a VM that the registry has on this node and that has no directory here: nothing of it can run, and a
    /// look at the processes makes sure.
    pub(crate) async fn bury(&self, vm: common::Vm, state: VmState, reason: &str) -> Result<(), Error> {
        let vm = blixard::vm::Vm::try_from(vm)?;
        if let Err(error) = self.hypervisor.sweep(&self.launch(vm.id, &vm.config)).await {
            tracing::error!(vm_id = %vm.id, error = with_sources(&error), "processes of an unknown VM are left");
        }
        crate::registry::until_answered("VM ended", || self.registry.end_vm(vm.id, state, true, reason)).await
    }

    /// Runs an attempt; returns when it is written down. `incarnation`: the node's that it was given to; 0: any.
    pub(crate) async fn run_job(
        &self,
        vm_id: VmId,
        job: JobId,
        attempt: u32,
        spec: JobSpec,
        incarnation: u64,
    ) -> Result<(), Error> {
        let fence = self.logs.fence(job, attempt).map_err(|error| {
            Error::internal(
                |error_id| tracing::error!(error_id, %error, job_id = %job, "the log directory can't be read"),
            )
        })?;
        match fence {
            Fence::Stale { current } => return Err(stale(job, attempt, current)),
            Fence::Ended | Fence::Running => return Ok(()),
            Fence::Open => {}
        }
        if !self.lease.holds() {
            let message = "the registry does not answer this node, so it begins nothing";
            return Err(Error::new(Reason::PeerUnavailable, message).with("peer", "registry"));
        }
        let current = self.lease.incarnation();
        if incarnation != 0 && incarnation != current {
            let message =
                format!("the attempt was given to incarnation {incarnation} of this node, which is at {current}");
            let error = Error::new(Reason::StaleIncarnation, message).with("node_id", self.registry.node_id());
            return Err(error.with("incarnation", incarnation).with("current", current));
        }
        self.has_disk()?;
        let limits = Limits { run: spec.timeout, start: spec.start_timeout };
        let answer = match self.vm(vm_id) {
            Some(vm) => vm.run(Run::new(job, attempt, limits, Timestamp::now()), spec.into(), current).await,
            None => Err(Error::new(Reason::VmNotFound, format!("this node has no VM {vm_id}")).with("vm_id", vm_id)),
        };
        if let Err(error) = &answer
            && matches!(error.reason, Reason::VmNotFound | Reason::VmNotAccepting | Reason::Internal)
        {
            // The scheduler will give it to another: an order that comes again, late, must not begin it here.
            self.logs.refuse(job, attempt, &error.message).await;
        }
        answer
    }

    /// Ends an attempt that some VM is just beginning, or has just ended: whichever it is meets this behind that.
    async fn cancel_unseen(&self, job: JobId, attempt: u32) -> Result<(), Error> {
        let vms: Vec<VmHandle> = self.vms().values().cloned().collect();
        let answers = join_all(vms.iter().map(|vm| vm.cancel(job, attempt))).await;
        let failed = answers.into_iter().filter_map(Result::err).find(|error| error.reason != Reason::VmNotFound);
        failed.map_or(Ok(()), Err)
    }

    /// Ends an attempt, if it runs.
    pub(crate) async fn cancel_job(&self, job: JobId, attempt: u32) -> Result<(), Error> {
        let running = self.vms().values().find(|vm| vm.view.borrow().run == Some((job, attempt))).cloned();
        match running {
            Some(vm) => match vm.cancel(job, attempt).await {
                Err(error) if error.reason == Reason::VmNotFound => Ok(()),
                answer => answer,
            },
            None => match self.logs.fence(job, attempt) {
                Ok(Fence::Open) => {
                    Err(Error::new(Reason::JobNotFound, format!("this node has no attempt {attempt} of job {job}"))
                        .with("job_id", job))
                }
                Ok(Fence::Running) => self.cancel_unseen(job, attempt).await,
                Ok(Fence::Ended | Fence::Stale { .. }) | Err(_) => Ok(()),
            },
        }
    }
}

/// The memory that each VM may take that has not ended, in MiB, but for one.
fn alive_memory(vms: &BTreeMap<VmId, VmHandle>, but: Option<VmId>) -> Vec<u32> {
    let others = vms.values().filter(|vm| Some(vm.id) != but).map(|vm| vm.view.borrow());
    others.filter(|view| !view.state.is_terminal()).map(|view| view.room.memory_mib).collect()
}

fn unreadable_disk(error: io::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "the VM state directory's disk can't be looked at"))
}
