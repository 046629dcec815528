//! The front door, and the one that decides which job runs where.
//!
//! ```text
//!   gRPC ─► service ─► registry (record) ─┐                      ┌─► registry: create VM, assign, fail …
//!                                         └─ watch ─► shell ─► engine ─► effects
//!   gRPC ◄─ logs ◄────────── vmhost       (loop)     (pure)      └─► vmhost: start, stop, run, cancel
//! ```
//!
//! - [`engine`] decides. It is pure: inputs in, effects out, no clock, no IO.
//! - `shell` is the loop around it: it watches the registry, feeds the engine, carries out its effects.
//! - `service` answers the RPCs; `logs` follows a job's output from attempt to attempt.
//!
//! The scheduler keeps nothing on disk: what must survive is in the registry before it is acted on.

pub mod engine;

mod feed;
mod logs;
mod peers;
mod service;
mod shell;

use blixard::{
    error::Error, limits, pb::scheduler::v1::scheduler_service_server::SchedulerServiceServer, vm::Defaults,
};
use blixard_chassis::Tasks;

pub use service::SchedulerApi;

/// How a scheduler works.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Where the registry answers, as `http://host:port`.
    pub registry_endpoint: String,
    /// How many VMs may live at once, on all nodes together.
    pub max_vms: u32,
    /// Whether service VMs are started for jobs that need one, and idle ones ended when room is short.
    pub auto_scaling: bool,
    /// How many service VMs of the default image are kept warm.
    pub pre_warm_count: u32,
    /// What fills in what a request leaves out.
    pub defaults: Defaults,
}

/// A running scheduler.
pub struct Scheduler {
    api: SchedulerApi,
}

impl Scheduler {
    /// Starts the loop. It connects to the registry in the background, and again after each loss.
    ///
    /// # Errors
    /// The registry's endpoint is no `http://host:port`.
    pub async fn start(config: SchedulerConfig, tasks: &Tasks) -> Result<Self, Error> {
        let peers = peers::Peers::new(&config.registry_endpoint)?;
        let feed = feed::Feed::default();
        let shell = shell::start(&config, peers.clone(), feed.clone(), tasks);
        Ok(Self { api: SchedulerApi::new(config, peers, feed, shell, tasks.child()) })
    }

    /// The gRPC service.
    #[must_use]
    pub fn service(&self) -> SchedulerServiceServer<SchedulerApi> {
        SchedulerServiceServer::new(self.api.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }
}
