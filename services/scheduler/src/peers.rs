//! The services that the scheduler calls: the registry, and each node's vmhost.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::NodeId,
    limits,
    pb::{
        registry::v1::registry_service_client::RegistryServiceClient,
        vmhost::v1::vm_host_service_client::VmHostServiceClient,
    },
};
use blixard_chassis::{ReplicatedChannel, client};
use tonic::{Status, transport::Channel};

use crate::engine::Nodes;

/// Deadline of the scheduler's own calls: a registry that fails over answers within it, and every call is repeatable.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) type RegistryClient = RegistryServiceClient<ReplicatedChannel>;
pub(crate) type VmHostClient = VmHostServiceClient<Channel>;

/// Cheap to clone; all clones share the connections and the view of the nodes.
#[derive(Clone)]
pub(crate) struct Peers {
    registry: RegistryClient,
    registry_channel: ReplicatedChannel,
    nodes: Arc<RwLock<Arc<Nodes>>>,
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl Peers {
    pub(crate) fn new(registry_endpoint: &str) -> Result<Self, Error> {
        let registry_channel = ReplicatedChannel::new(registry_endpoint)?;
        let registry = RegistryServiceClient::new(registry_channel.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        Ok(Self { registry, registry_channel, nodes: Arc::default(), channels: Arc::default() })
    }

    pub(crate) fn registry(&self) -> RegistryClient {
        self.registry.clone()
    }

    /// Whatever is read from the registry from now on must show this revision.
    pub(crate) fn saw(&self, revision: u64) {
        self.registry_channel.saw(revision);
    }

    /// The nodes as the engine last saw them.
    pub(crate) fn nodes(&self) -> Arc<Nodes> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_nodes(&self, nodes: Nodes) {
        *self.nodes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(nodes);
    }

    /// The vmhost of a node.
    pub(crate) fn vmhost(&self, node_id: &NodeId) -> Result<VmHostClient, Error> {
        let nodes = self.nodes();
        let Some(entry) = nodes.get(node_id) else {
            let message = format!("the node {node_id} has not registered");
            return Err(Error::new(Reason::PeerUnavailable, message).with("peer", node_id));
        };
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(&entry.node.endpoint) {
            Some(channel) => channel.clone(),
            None => {
                let channel = client::channel(&entry.node.endpoint)?;
                channels.insert(entry.node.endpoint.clone(), channel.clone());
                channel
            }
        };
        Ok(VmHostServiceClient::new(channel)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES))
    }
}

/// What a peer's refusal is to our caller: its own error, or PEER_UNAVAILABLE with the peer's name.
pub(crate) fn peer_error(peer: &str, status: &Status) -> Error {
    let error = Error::from_status(status);
    if error.reason == Reason::PeerUnavailable && error.metadata.is_empty() {
        let message = format!("the {peer} does not answer: {}", error.message);
        return Error::new(Reason::PeerUnavailable, message).with("peer", peer);
    }
    error
}

/// A required part of a peer's answer is missing: a fault of ours.
pub(crate) fn missing(what: &'static str) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, what, "a peer's answer lacks a required field"))
}
