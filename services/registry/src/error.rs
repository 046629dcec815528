//! Why a registry did not start, or could not go on.

use std::{io, path::PathBuf};

use crate::replica::{bootstrap::IdentityError, peers::Mismatch};

/// Why a registry did not start, or could not go on.
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
    /// A restore was begun and has not ended.
    #[error(
        "a backup was being restored and the restore did not end: run `mvm-ci registry restore` again, or remove {} to start without data",
        .0.display()
    )]
    Restoring(PathBuf),
    /// The data directory is another's.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The list of replicas lacks this one.
    #[error("registry.replica_id: \"{0}\" is not allowed: an id in registry.replicas, or 0 when that is empty")]
    NotListed(u64),
    /// The secret can't be read.
    #[error("registry.secret_file: cannot read {}", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The secret is too short.
    #[error("registry.secret_file: {} has {found} bytes: {needed} or more are needed", path.display())]
    WeakSecret {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: usize,
        /// The shortest allowed.
        needed: usize,
    },
    /// Another replica is not one of ours.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// A host of the list is not known.
    #[error("registry.replicas: no address for {address}")]
    Address {
        /// What was looked up.
        address: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// An endpoint of the list is none.
    #[error(transparent)]
    Endpoint(blixard::error::Error),
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
    Database(#[source] hiqlite::rusqlite::Error),
    /// It can't go on; the next start may.
    #[error("this replica of the registry must be started again: {0}")]
    Stuck(&'static str),
}
