//! `ReplicaService`: a replica's word about itself, also while nothing else works.

use blixard::{
    error::invalid,
    pb::registry::v1::{GetReplicaRequest, GetReplicaResponse, replica_service_server::ReplicaService},
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{Role, peers::Secret, watchdog::Observation};

/// Longest challenge.
const MAX_NONCE_BYTES: usize = 64;

/// What a replica knows of itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) seen: Observation,
    pub(crate) last_log_index: u64,
}

/// Serves `blixard.registry.v1.ReplicaService`.
#[derive(Clone)]
pub struct Service {
    pub(crate) id: u64,
    pub(crate) replicas: String,
    pub(crate) secret: Option<Secret>,
    pub(crate) role: watch::Receiver<Role>,
    pub(crate) report: watch::Receiver<Report>,
    pub(crate) newest: watch::Receiver<u64>,
}

#[tonic::async_trait]
impl ReplicaService for Service {
    async fn get_replica(&self, request: Request<GetReplicaRequest>) -> Result<Response<GetReplicaResponse>, Status> {
        let nonce = request.into_inner().nonce;
        if nonce.len() > MAX_NONCE_BYTES {
            return Err(invalid("nonce", nonce.len(), &format!("at most {MAX_NONCE_BYTES} bytes")).into());
        }
        let proof = match &self.secret {
            Some(secret) if !nonce.is_empty() => secret.proof(&nonce, self.id),
            _ => Vec::new(),
        };
        let role = *self.role.borrow();
        let Report { seen, last_log_index } = *self.report.borrow();
        let leader = match role {
            Role::Leader { .. } => Some(self.id),
            _ => seen.leader,
        };
        Ok(Response::new(GetReplicaResponse {
            replica_id: u32::try_from(self.id).unwrap_or_default(),
            state: role.to_pb().into(),
            leader_id: leader.and_then(|id| u32::try_from(id).ok()).unwrap_or_default(),
            term: seen.term,
            last_log_index,
            applied_index: seen.applied,
            revision: *self.newest.borrow(),
            replicas: self.replicas.clone(),
            proof: proof.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}
