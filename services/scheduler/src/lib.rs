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
//! - `service` answers the RPCs: `submit` makes jobs of what is asked for (`sealing` their secrets), `follow` watches them, `logs`
//!   follows their output from attempt to attempt (`hub` reads it once for all), `inspect` looks back, `nodes` keeps nodes.
//!
//! The scheduler keeps nothing on disk: what must survive is in the registry before it is acted on.

pub mod control;
pub mod engine;

mod feed;
mod follow;
mod hub;
mod inspect;
mod logs;
mod nodes;
mod peers;
mod sealing;
mod service;
mod shell;
mod submit;

use blixard::{
    config::Config, error::Error, limits, pb::scheduler::v1::scheduler_service_server::SchedulerServiceServer,
};
use blixard_chassis::{Tasks, secrets::SecretKey};

pub use service::SchedulerApi;

/// How a scheduler works.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// Where the registry answers, as `http://host:port`.
    pub registry_endpoint: String,
    /// Its name among the schedulers: the same at each of its starts, and nobody else's.
    pub name: String,
    /// How the engine decides.
    pub settings: engine::Settings,
    /// What seals secrets; without it they are refused.
    pub secret_key: Option<SecretKey>,
}

impl SchedulerConfig {
    /// What the configuration says of a scheduler, for a registry that answers there.
    #[must_use]
    pub fn new(config: &Config, registry_endpoint: impl Into<String>, secret_key: Option<SecretKey>) -> Self {
        Self {
            registry_endpoint: registry_endpoint.into(),
            name: config.server.node_id.to_string(),
            settings: config.into(),
            secret_key,
        }
    }
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
