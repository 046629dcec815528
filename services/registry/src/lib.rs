//! The registry: VMs, jobs, nodes and their events, the one durable truth of a control plane.
//!
//! ```text
//!   service ── parse, one call, encode
//!     ├─► commit ── mutation (guarded SQL) ─► Hiqlite (Raft log, fsync) ─► verdict ─► answer
//!     ├─► list, read ── pages from one snapshot of SQLite
//!     ├─► query ── users' SQL, on threads of their own, within budgets
//!     └─► watch ── a cursor into the events table
//! ```
//! Architecture invariants: every change writes its event in the same transaction (triggers, [`schema`]); an answered
//! change is on the disk; a change that the state tables of the root package do not allow is refused inside the
//! transaction. It must not know who its callers are.

mod commit;
mod embedded;
mod list;
mod memory;
mod mutation;
mod query;
mod query_rules;
mod read;
mod rows;
mod schema;
mod service;
mod time;
mod verdict;
mod watch;

use std::{io, path::PathBuf, time::Duration};

use blixard::{limits, pb::registry::v1::registry_service_server::RegistryServiceServer};
use blixard_chassis::Tasks;

pub use crate::service::Service;
use crate::{commit::CommitDriver, embedded::Embedded, query::Queries, read::Readers};

/// Time for the commit that is under way when the registry is shut down.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// Log directives for the libraries below: their warnings tell of nothing that a user could act on (a first start and a
/// start after a crash warn a lot), their errors do.
pub const LOG_DIRECTIVES: &str = "hiqlite=error,hiqlite_wal=error,openraft=error";

/// What a registry needs to know.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The database is in `hiqlite/` below it.
    pub data_dir: PathBuf,
}

/// Why a registry did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process has the data directory.
    #[error("the data directory {} is in use by process {owner}: stop it, or choose another with --data-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Its process id.
        owner: String,
    },
    /// The data directory can't be used.
    #[error("cannot use {}", path.display())]
    DataDir {
        /// What could not be used.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A newer program has written the database.
    #[error("the database has schema version {found} and this program knows {known}: use a newer program")]
    NewerSchema {
        /// The version in the database.
        found: i64,
        /// The newest version this program knows.
        known: i64,
    },
    /// No loopback port can be had.
    #[error("no free port on 127.0.0.1")]
    Port(#[source] io::Error),
    /// The log could not be replayed in time.
    #[error("the database did not become ready in time")]
    Replay,
    /// Hiqlite failed.
    #[error("the database did not start")]
    Hiqlite(#[from] hiqlite::Error),
    /// The database could not be read.
    #[error("the database can't be read")]
    Read(#[source] blixard::error::Error),
}

/// A running registry.
pub struct Registry {
    service: Service,
    embedded: Embedded,
    /// The committer's own tree: it works until [`Registry::shutdown`], while services that end may still report to it.
    committer: Tasks,
}

impl Registry {
    /// Starts the embedded database and everything on it. Watches end when `tasks` are shut down; changes are taken until
    /// [`Registry::shutdown`].
    ///
    /// # Errors
    /// The data directory is in use or can't be used, or the database is damaged or from a newer program.
    pub async fn start(config: RegistryConfig, tasks: &Tasks) -> Result<Self, StartError> {
        let embedded = Embedded::start(&config.data_dir).await?;
        let readers = Readers::new(embedded.database.clone());
        let revision = readers.read(read::newest_revision).await.map_err(StartError::Read)?;
        let (driver, commits) = CommitDriver::new(embedded.client.clone(), readers.clone(), revision);
        let committer = Tasks::new();
        committer.spawn("registry committer", driver.run(committer.token().clone()));
        let stop = tasks.token().clone();
        let queries = Queries::new(embedded.database.clone(), stop.clone());
        let service = Service { commits, readers, queries, stop };
        Ok(Self { service, embedded, committer })
    }

    /// The gRPC service, with the contract's limits set.
    #[must_use]
    pub fn service(&self) -> RegistryServiceServer<Service> {
        RegistryServiceServer::new(self.service.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }

    /// Ends the commit that is under way, refuses those that wait and closes the database.
    pub async fn shutdown(&self) {
        if !self.committer.shutdown(SHUTDOWN_GRACE).await {
            tracing::warn!("registry shut down in the middle of a commit");
        }
        self.embedded.shutdown().await;
    }
}
