//! The all-in-one control plane: registry, vmhost and scheduler behind one gRPC server.
//!
//! ```text
//!   bind ─► registry ─► vmhost ─► scheduler ─► serve ─► node registered ─► SERVING
//!                         │           │          │
//!                         └───────────┴──────────┘   over loopback, through the same contracts as between machines
//! ```
//!
//! vmhost and scheduler connect in the background, so the order above is for their errors: what can fail does so before
//! anything is served. It must not know how any of the three works.

use std::{ffi::OsString, fmt, net::SocketAddr, time::Duration};

use blixard::{
    config::Config,
    error::{Error, Reason},
    pb::scheduler::v1::{GetStatsRequest, scheduler_service_client::SchedulerServiceClient},
};
use blixard_chassis::{Server, Tasks, client, metrics, secrets::SecretKey, server::BindError, with_causes};
use blixard_registry::{Registry, RegistryConfig};
use blixard_scheduler::{Scheduler, SchedulerConfig};
use blixard_vmhost::{HealthConfig, LogLimits, Pace, VmHost, VmHostConfig, hypervisor::DiskLimit};
use tokio::sync::watch;

/// How long each part has to end. VMs outlive it, so there is little to wait for.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(8);
/// How long this node may take to be registered and seen by the scheduler: milliseconds, but for adoption on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long one look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// A running control plane.
pub struct ControlPlane {
    parts: Parts,
    address: SocketAddr,
    endpoint: String,
    driver: String,
}

/// What is to be ended, in this order.
struct Parts {
    server: Tasks,
    services: Tasks,
    registry: Registry,
}

/// Why a control plane did not start: one sentence with its causes.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

impl StartError {
    fn new(error: &dyn std::error::Error) -> Self {
        Self(with_causes(error))
    }
}

impl From<BindError> for StartError {
    fn from(error: BindError) -> Self {
        let known = error.source.kind() == std::io::ErrorKind::AddrInUse;
        if known { Self(error.to_string()) } else { Self::new(&error) }
    }
}

impl ControlPlane {
    /// Starts everything and returns once it serves. `agent_command` is the guest agent's program and its leading
    /// arguments, for the `process` driver.
    ///
    /// # Errors
    /// The address is taken, the data directory is in use or broken, or the VM driver cannot run here.
    pub async fn start(config: Config, agent_command: Vec<OsString>) -> Result<Self, StartError> {
        let bound = Server::bind(config.server.listen).await?;
        let (server, services) = (Tasks::new(), Tasks::new());
        if !config.registry.replicas.is_empty() {
            let message = "registry.replicas is set, but this program's registry is alone: run registry, scheduler and vmhost as processes";
            return Err(StartError(message.to_owned()));
        }
        metrics::serve(config.server.metrics_listen, &services).await.map_err(|error| StartError::new(&error))?;
        let registry = RegistryConfig::load(&config).map_err(|error| StartError::new(&error))?;
        let registry = Registry::start(registry, &services).await.map_err(|error| StartError::new(&error))?;
        let parts = Parts { server, services, registry };
        let (address, endpoint) = (bound.local_addr(), bound.local_endpoint());
        match Box::pin(parts.start(bound, config, agent_command)).await {
            Ok(driver) => Ok(Self { parts, address, endpoint, driver }),
            Err(error) => {
                parts.stop().await;
                Err(error)
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Where clients of this machine reach it, as `http://host:port`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The VM driver in use.
    #[must_use]
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// Resolves, with the reason, when it can't go on.
    pub async fn failed(&self) -> String {
        tokio::select! {
            () = self.parts.server.token().cancelled() => "the server failed: see the log above".to_owned(),
            reason = self.parts.registry.failed() => reason,
        }
    }

    /// Stops serving, ends everything in order, keeps the VMs: the next start on the same directories adopts them.
    pub async fn shutdown(self) {
        self.parts.stop().await;
    }
}

impl Parts {
    /// Starts the rest beside the registry; returns the VM driver's name.
    async fn start(&self, bound: Server, config: Config, agent_command: Vec<OsString>) -> Result<String, StartError> {
        let endpoint = bound.local_endpoint();
        // The first start makes the key, so that secrets work without further ado; vmhost reads the same file.
        let key_file = &config.storage.secret_key_file;
        let secret_key = SecretKey::load_or_create(key_file).map_err(|error| StartError::new(&error))?;
        let vmhost = VmHostConfig {
            node_id: config.server.node_id.clone(),
            vm_state_dir: config.storage.vm_state_dir.clone(),
            log_dir: config.storage.data_dir.join("logs"),
            driver: config.firecracker.driver,
            image_dir: config.firecracker.image_dir.clone(),
            vm_uids: config.firecracker.vm_uids,
            disk_limit: DiskLimit::from(&config.firecracker),
            agent_command,
            max_vms: config.firecracker.max_concurrent_vms,
            templates: config.firecracker.templates,
            registry_endpoint: endpoint.clone(),
            advertise_endpoint: endpoint.clone(),
            secret_key: Some(secret_key.clone()),
            node_labels: config.server.node_labels.0.clone(),
            volumes: config.storage.volumes.0.clone(),
            network: config.network.clone(),
            health: HealthConfig::from(&config.vm_manager),
            logs: LogLimits::from(&config.retention),
            watch: None,
            pace: Pace::default(),
        };
        let vmhost = VmHost::start(vmhost, &self.services).await.map_err(|error| StartError::new(&error))?;
        let scheduler = SchedulerConfig::new(&config, endpoint.clone(), Some(secret_key));
        let scheduler = Scheduler::start(scheduler, &self.services).await.map_err(|error| StartError::new(&error))?;

        let ready = watch::Sender::new(false);
        let bound = bound
            .serving_while(ready.subscribe())
            .add_service(self.registry.service())
            .add_service(self.registry.replica_service())
            .add_service(vmhost.service())
            .add_service(scheduler.service());
        serve(bound, &self.server);
        wait_for_node(&endpoint).await.map_err(|error| StartError::new(&error))?;
        ready.send_replace(true);
        Ok(vmhost.driver().to_owned())
    }

    /// The server first (NOT_SERVING, open streams end, calls get a grace) and those who call through it; the registry,
    /// which everybody needs, last.
    async fn stop(&self) {
        let (served, ended) =
            tokio::join!(self.server.shutdown(SHUTDOWN_GRACE), self.services.shutdown(SHUTDOWN_GRACE));
        if !(served && ended) {
            tracing::warn!("some tasks did not end in time");
        }
        self.registry.shutdown().await;
    }
}

fn serve(bound: Server, tasks: &Tasks) {
    let own = tasks.clone();
    tasks.spawn("server", async move {
        if let Err(error) = bound.serve(&own).await {
            tracing::error!(%error, "the server failed");
            own.token().cancel();
        }
    });
}

/// Waits until the scheduler knows a node that takes work, so that whoever is told "ready" can have a VM at once.
async fn wait_for_node(endpoint: &str) -> Result<(), Error> {
    let mut scheduler = SchedulerServiceClient::new(client::channel(endpoint)?);
    let seen = async {
        loop {
            let stats = scheduler.get_stats(client::request(GetStatsRequest {}, LOOK_TIMEOUT)).await;
            if stats.is_ok_and(|stats| stats.into_inner().ready_nodes > 0) {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let late = |_| Error::new(Reason::PeerUnavailable, "this node was not registered in time: see the log above");
    tokio::time::timeout(READY_WITHIN, seen).await.map_err(late)
}
