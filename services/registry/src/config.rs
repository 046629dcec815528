//! What a registry needs to know before it starts.

use std::{fs, net::SocketAddr, path::PathBuf};

use blixard::config::Config;

use crate::{
    NodeTiming, StartError, embedded,
    replica::{Membership, peers::Secret},
    retention::Retention,
};

/// Shortest secret of replicas: 128 bits.
const MIN_SECRET_BYTES: usize = 16;

/// What a registry needs to know.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The database is in `hiqlite/` below it.
    pub data_dir: PathBuf,
    /// What is kept, and for how long.
    pub retention: Retention,
    /// Which of several replicas it is; `None`: it is alone.
    pub membership: Option<Membership>,
    /// The program to start for each query: one that begins with [`crate::query_worker`].
    pub query_worker: PathBuf,
    /// How nodes are to be heard of.
    pub nodes: NodeTiming,
}

impl RegistryConfig {
    /// Of a registry that is alone, in a program that begins with [`crate::query_worker`].
    #[must_use]
    pub fn alone(data_dir: PathBuf) -> Self {
        // The program that runs, also when its file has been replaced since.
        let retention = Config::default().retention.into();
        Self {
            data_dir,
            retention,
            membership: None,
            nodes: NodeTiming::default(),
            query_worker: "/proc/self/exe".into(),
        }
    }

    /// What a configuration asks for.
    ///
    /// # Errors
    /// The replica's id is not in the list, or the secret can't be read or is too short.
    pub fn load(config: &Config) -> Result<Self, StartError> {
        let registry = &config.registry;
        let alone = Self { retention: config.retention.into(), ..Self::alone(config.storage.data_dir.clone()) };
        if registry.replicas.is_empty() && registry.replica_id == 0 {
            return Ok(alone);
        }
        let (replicas, id) = (registry.replicas.clone(), registry.replica_id);
        replicas.get(id).ok_or(StartError::NotListed(id))?;
        let path = registry.secret_file.clone();
        let mut secret = match fs::read(&path) {
            Ok(secret) => secret,
            Err(source) => return Err(StartError::Secret { path, source }),
        };
        secret.truncate(secret.trim_ascii_end().len());
        if secret.len() < MIN_SECRET_BYTES {
            return Err(StartError::WeakSecret { path, found: secret.len(), needed: MIN_SECRET_BYTES });
        }
        Ok(Self { membership: Some(Membership { replicas, id, secret: Secret::new(&secret) }), ..alone })
    }

    /// Where it is to be served: a replica where the list says, a registry that is alone at `otherwise`.
    ///
    /// # Errors
    /// The list names a host that is not known.
    pub async fn listen(&self, otherwise: SocketAddr) -> Result<SocketAddr, StartError> {
        let Some(membership) = &self.membership else { return Ok(otherwise) };
        let own = membership.own()?;
        embedded::resolve(&own.address(own.grpc_port)).await
    }
}
