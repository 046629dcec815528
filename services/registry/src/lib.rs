//! The registry: VMs, jobs, nodes and their events, the one durable truth of a control plane.
//!
//! ```text
//!   replica ── may this replica answer? here, through the leader, or not
//!   service ── parse, one call, encode (rpc)
//!     ├─► commit ── mutation (guarded SQL) ─► Hiqlite (Raft log, fsync) ─► verdict ─► answer
//!     ├─► list, read ── pages from one snapshot of SQLite
//!     ├─► heartbeat ── which nodes live, who wants which lease: in the leader's memory, but for what changes
//!     ├─► query ── users' SQL, in processes of their own, within budgets
//!     └─► watch ── a position in the sequence of changes ◄── tail (recent ones, read once for all) or change (pages)
//! retention ── forgets what is old, through commit like everybody
//! ```
//! Architecture invariants: every change writes its event in the same transaction (triggers, [`schema`]); an answered
//! change is on the disks of a majority; a change that the state tables of the root package do not allow is refused inside
//! the transaction. It must not know who its callers are.

mod archive;
mod backup;
mod change;
mod commit;
mod config;
mod disk;
mod embedded;
mod error;
mod heartbeat;
mod leases;
mod list;
mod metrics;
mod mutation;
mod presence;
mod query;
mod query_rules;
mod query_worker;
mod read;
mod replica;
mod requests;
mod restore;
mod retention;
mod rows;
mod rpc;
mod schema;
mod service;
pub mod simulation;
mod tail;
mod time;
mod verdict;
mod watch;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use blixard::{
    limits,
    pb::registry::v1::{registry_service_server::RegistryServiceServer, replica_service_server::ReplicaServiceServer},
};
use blixard_chassis::{Tasks, with_causes};
use tokio::sync::watch as channel;

pub use crate::{
    archive::{Archive, ArchiveError, ArchiveWriter, Manifest},
    config::RegistryConfig,
    error::StartError,
    presence::NodeTiming,
    query_worker::query_worker,
    replica::{
        Membership,
        bootstrap::IdentityError,
        peers::{Mismatch, Secret},
        route::Gate,
    },
    restore::{RestoreError, restore},
    retention::Retention,
    service::Service,
};
use crate::{
    backup::Backups,
    commit::CommitDriver,
    embedded::{DataDir, Embedded},
    heartbeat::Heartbeats,
    query::Queries,
    read::Readers,
    replica::{
        Role,
        bootstrap::{self, Beginning, Identity},
        doubt::Doubt,
        driver::{Outputs, ReplicaDriver},
        peers::Peers,
        service::Report,
    },
    retention::RetentionDriver,
    tail::Tail,
};

/// Time for the commit that is under way when the registry is shut down.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// Log directives for the libraries below: their warnings tell of nothing that a user could act on (a first start and a
/// start after a crash warn a lot), their errors do. Hiqlite's client of another leader has none to call here, and complains
/// at a shutdown on a busy machine that nobody does.
pub const LOG_DIRECTIVES: &str = "hiqlite=error,hiqlite::client::stream=off,hiqlite_wal=error,openraft=error";

/// The same for one of several replicas, whose peers come and go: what that means, [`replica`] tells itself.
pub const REPLICA_LOG_DIRECTIVES: &str = "hiqlite=off,hiqlite_wal=error,openraft=off";

/// A running registry.
pub struct Registry {
    gate: Gate,
    replica: replica::service::Service,
    serving: channel::Receiver<bool>,
    leading: channel::Receiver<bool>,
    failed: channel::Receiver<Option<String>>,
    node: Arc<OnceLock<Embedded>>,
    /// The committer's own tree: it works until [`Registry::shutdown`], while services that end may still report to it.
    committer: Tasks,
}

/// What becomes of a registry that starts.
struct Opening {
    config: RegistryConfig,
    peers: Option<Arc<Peers>>,
    outputs: Outputs,
    /// The newest revision that the database shows.
    newest: Arc<channel::Sender<u64>>,
    local: Arc<OnceLock<RegistryServiceServer<Service>>>,
    node: Arc<OnceLock<Embedded>>,
    failed: channel::Sender<Option<String>>,
    committer: Tasks,
    /// Watches and queries end with it.
    tasks: Tasks,
}

impl Registry {
    /// Starts the database and everything on it. A registry that is alone is ready when this returns; a replica makes
    /// itself ready in the background, for which it needs a majority of the others. Watches end when `tasks` are shut
    /// down; changes are taken until [`Registry::shutdown`].
    ///
    /// # Errors
    /// The data directory is in use, another's or can't be used, or the database is damaged or from a newer program.
    pub async fn start(config: RegistryConfig, tasks: &Tasks) -> Result<Self, StartError> {
        let dir = DataDir::take(&config.data_dir)?;
        match config.membership.clone() {
            None => Self::start_alone(dir, config, tasks).await,
            Some(membership) => Self::start_replica(dir, membership, config, tasks),
        }
    }

    async fn start_alone(dir: DataDir, config: RegistryConfig, tasks: &Tasks) -> Result<Self, StartError> {
        Identity::of(&dir.path).check_alone()?;
        let (opening, mut registry) = Opening::new(config, None, Role::Starting, tasks);
        let node = Embedded::start_alone(dir).await?;
        let readers = opening.readers(&node);
        if let Err(error) = embedded::prepare(&node.client, &readers).await {
            node.shutdown().await;
            return Err(error);
        }
        let driver = opening.open(node, readers);
        let committer = registry.committer.clone();
        committer.clone().spawn("registry replica", opening.watch_over(driver));
        // It leads at once; if its core ends instead, `failed` tells.
        tokio::select! {
            _ = registry.serving.wait_for(|serving| *serving) => {}
            _ = registry.failed.wait_for(Option::is_some) => {}
        }
        Ok(registry)
    }

    fn start_replica(
        dir: DataDir,
        membership: Membership,
        config: RegistryConfig,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let has_data = Identity::of(&dir.path).check(membership.id)?;
        let peers = Arc::new(Peers::new(&membership).map_err(StartError::Endpoint)?);
        let role = if has_data { Role::Starting } else { Role::Empty };
        let (opening, registry) = Opening::new(config, Some(peers.clone()), role, tasks);
        let committer = registry.committer.clone();
        committer.spawn("registry replica", Box::pin(opening.join(dir, membership, peers, has_data)));
        Ok(registry)
    }

    /// The gRPC service, with the contract's limits set.
    #[must_use]
    pub fn service(&self) -> Gate {
        self.gate.clone()
    }

    /// What this replica says of itself.
    #[must_use]
    pub fn replica_service(&self) -> ReplicaServiceServer<replica::service::Service> {
        ReplicaServiceServer::new(self.replica.clone())
    }

    /// Whether it serves.
    #[must_use]
    pub fn serving(&self) -> channel::Receiver<bool> {
        self.serving.clone()
    }

    /// Whether it leads.
    #[must_use]
    pub fn leading(&self) -> channel::Receiver<bool> {
        self.leading.clone()
    }

    /// Resolves with the reason when the registry can't go on: the process has to be started again.
    pub async fn failed(&self) -> String {
        match self.failed.clone().wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // It has been shut down.
            Err(_) => std::future::pending().await,
        }
    }

    /// Ends the commit that is under way, refuses those that wait and closes the database.
    pub async fn shutdown(&self) {
        if !self.committer.shutdown(SHUTDOWN_GRACE).await {
            tracing::warn!("registry shut down in the middle of a commit");
        }
        if let Some(node) = self.node.get() {
            node.shutdown().await;
        }
    }
}

impl Opening {
    fn new(config: RegistryConfig, peers: Option<Arc<Peers>>, role: Role, tasks: &Tasks) -> (Self, Registry) {
        let membership = config.membership.as_ref();
        let newest = Arc::new(channel::Sender::new(0));
        let (role, closed) = (channel::Sender::new(role), channel::Sender::new(None));
        let (serving, leading) = (channel::Sender::new(false), channel::Sender::new(false));
        let (report, failed) = (channel::Sender::new(Report::default()), channel::Sender::new(None));
        let (local, node, committer) = (Arc::default(), Arc::default(), Tasks::new());
        let replica = replica::service::Service {
            id: membership.map_or(1, |membership| membership.id),
            replicas: membership.map(|membership| membership.replicas.to_string()).unwrap_or_default(),
            secret: membership.map(|membership| membership.secret.clone()),
            role: role.subscribe(),
            report: report.subscribe(),
            newest: newest.subscribe(),
        };
        let gate = Gate {
            local: Arc::clone(&local),
            role: role.subscribe(),
            closed: closed.subscribe(),
            newest: newest.subscribe(),
            peers: peers.clone(),
        };
        let registry = Registry {
            gate,
            replica,
            serving: serving.subscribe(),
            leading: leading.subscribe(),
            failed: failed.subscribe(),
            node: Arc::clone(&node),
            committer: committer.clone(),
        };
        let outputs = Outputs { role, serving, leading, report, closed };
        let opening = Self { config, peers, outputs, newest, local, node, failed, committer, tasks: tasks.clone() };
        (opening, registry)
    }

    /// From a directory to a replica that serves, for as long as it can.
    async fn join(self, dir: DataDir, membership: Membership, peers: Arc<Peers>, has_data: bool) {
        let stop = self.committer.token().clone();
        match stop.run_until_cancelled(self.begin(dir, &membership, &peers, has_data)).await {
            None => {}
            Some(Ok(driver)) => self.watch_over(driver).await,
            Some(Err(error)) => self.fail(&error),
        }
    }

    /// Starts the database when that is safe; returns when a leader is known.
    async fn begin(
        &self,
        dir: DataDir,
        membership: &Membership,
        peers: &Peers,
        has_data: bool,
    ) -> Result<ReplicaDriver, StartError> {
        let beginning = bootstrap::wait_to_begin(membership, peers, has_data).await?;
        tracing::info!(replica = membership.id, ?beginning, "registry replica starts");
        let (identity, doubt) = (Identity::of(&dir.path), Doubt::of(&dir.path));
        let node = tokio::select! {
            node = Embedded::start_member(dir, membership, beginning) => node?,
            () = bootstrap::overdue(peers), if beginning == Beginning::Resume => {
                if doubt.was_there_before() {
                    doubt.begin_again(peers, membership.replicas.majority()).await?;
                }
                doubt.note();
                return Err(StartError::Stuck("it finds no leader, though there is one"));
            }
        };
        identity.write(membership.id)?;
        self.outputs.role.send_replace(Role::Starting);
        let readers = self.readers(&node);
        Ok(self.open(node, readers))
    }

    fn readers(&self, node: &Embedded) -> Arc<Readers> {
        Readers::new(node.database.clone(), self.newest.clone())
    }

    /// Opens what serves on a database.
    fn open(&self, node: Embedded, readers: Arc<Readers>) -> ReplicaDriver {
        let role = self.outputs.role.subscribe();
        let (driver, commits) =
            CommitDriver::new(node.client.clone(), readers.clone(), self.newest.clone(), role.clone());
        self.committer.spawn("registry committer", driver.run(self.committer.token().clone()));
        let queries = Queries::new(node.database.clone(), self.config.query_worker.clone(), self.tasks.clone());
        let backups = Backups::new(node.database.clone(), &node.dir, self.tasks.clone());
        let stop = self.tasks.token().clone();
        let (tail_driver, tail) = Tail::new(readers.clone(), self.newest.subscribe(), tail::RECENT);
        self.tasks.spawn("registry tail", tail_driver.run(stop.clone()));
        let leads = self.outputs.leading.subscribe();
        let retention = RetentionDriver {
            retention: self.config.retention,
            readers: readers.clone(),
            commits: commits.clone(),
            leads,
        };
        self.tasks.spawn("registry retention", retention.run(stop.clone()));
        let heartbeats = Heartbeats::new(self.config.nodes, readers.clone(), commits.clone(), role, stop);
        self.committer.spawn("registry node watch", heartbeats.clone().watch());
        let service = Service { heartbeats, commits, readers: readers.clone(), queries, backups, tail };
        let service = RegistryServiceServer::new(service)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        let _ = self.local.set(service);
        let majority = self.config.membership.as_ref().map_or(1, |membership| membership.replicas.majority());
        let driver = ReplicaDriver::new(&node, readers, self.peers.clone(), majority);
        let _ = self.node.set(node);
        driver
    }

    async fn watch_over(self, driver: ReplicaDriver) {
        let stop = self.committer.token().clone();
        if let Err(error) = Box::pin(driver.run(&self.outputs, stop)).await {
            self.fail(&error);
        }
    }

    fn fail(&self, error: &StartError) {
        self.outputs.stop_serving();
        self.failed.send_replace(Some(with_causes(error)));
    }
}
