//! The other replicas: what they say of themselves, and whether they know the secret.

use std::{collections::BTreeMap, time::Duration};

use blixard::{
    error::Error,
    pb::registry::v1::{
        GetReplicaRequest, GetReplicaResponse, ReplicaState, replica_service_client::ReplicaServiceClient,
    },
    replica::Replicas,
};
use blixard_chassis::client;
use futures::{StreamExt as _, stream::FuturesUnordered};
use ring::{
    hmac::{self, HMAC_SHA256},
    rand::{SecureRandom as _, SystemRandom},
};
use tonic::transport::Channel;

use super::Membership;

/// How long a replica has to say how it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of a challenge.
const NONCE_BYTES: usize = 16;

/// What this replica and the others prove to each other that they know.
#[derive(Debug, Clone)]
pub struct Secret(hmac::Key);

impl Secret {
    /// From what the secret file holds.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        Self(hmac::Key::new(HMAC_SHA256, secret))
    }

    /// See `GetReplicaResponse.proof`.
    pub(crate) fn proof(&self, nonce: &[u8], replica_id: u64) -> Vec<u8> {
        hmac::sign(&self.0, &message(nonce, replica_id)).as_ref().to_vec()
    }

    fn is_proven(&self, nonce: &[u8], answer: &GetReplicaResponse) -> bool {
        hmac::verify(&self.0, &message(nonce, answer.replica_id.into()), &answer.proof).is_ok()
    }

    /// A secret of its own for each purpose, as text.
    pub(crate) fn derive(&self, purpose: &str) -> String {
        hex::encode(hmac::sign(&self.0, purpose.as_bytes()))
    }
}

fn message(nonce: &[u8], replica_id: u64) -> Vec<u8> {
    [nonce, &u32::try_from(replica_id).unwrap_or(u32::MAX).to_be_bytes()].concat()
}

/// Why a replica's answer can't be the one of a replica of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// It was configured with another secret.
    #[error("the replica at {endpoint} has another secret: the file of registry.secret_file must be the same on each")]
    Secret {
        /// Where it answers.
        endpoint: String,
    },
    /// It was configured with another list.
    #[error(
        "the replica at {endpoint} is configured with other replicas ({theirs}): the list must be the same on each"
    )]
    Replicas {
        /// Where it answers.
        endpoint: String,
        /// Its list.
        theirs: String,
    },
    /// Another replica answers there.
    #[error("replica {found} answers at {endpoint}, where the list has replica {expected}")]
    Id {
        /// Where it answers.
        endpoint: String,
        /// Whom the list names there.
        expected: u64,
        /// Who answers.
        found: u32,
    },
}

/// The answer of one replica.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) id: u64,
    pub(crate) replica: GetReplicaResponse,
}

/// Calls the other replicas.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    replicas: Replicas,
    secret: Secret,
    channels: BTreeMap<u64, Channel>,
}

impl Peers {
    pub(crate) fn new(membership: &Membership) -> Result<Self, Error> {
        let others = membership.replicas.iter().filter(|replica| replica.id != membership.id);
        let channels = others.map(|replica| Ok((replica.id, client::channel(&replica.endpoint())?)));
        Ok(Self {
            replicas: membership.replicas.clone(),
            secret: membership.secret.clone(),
            channels: channels.collect::<Result<_, Error>>()?,
        })
    }

    /// The way to another replica.
    pub(crate) fn channel(&self, id: u64) -> Option<Channel> {
        self.channels.get(&id).cloned()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.channels.len()
    }

    /// What one replica says; `None`: it does not answer. An answer that is not one of ours is a mismatch.
    pub(crate) async fn ask(&self, id: u64) -> Option<Result<Answer, Mismatch>> {
        let mut nonce = [0; NONCE_BYTES];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let request = GetReplicaRequest { nonce: nonce.to_vec().into() };
        let mut client = ReplicaServiceClient::new(self.channel(id)?);
        let replica = client.get_replica(client::request(request, ASK_TIMEOUT)).await.ok()?.into_inner();
        Some(self.check(id, &nonce, replica))
    }

    /// What all of them say; those that do not answer are left out.
    pub(crate) async fn ask_all(&self) -> Result<Vec<Answer>, Mismatch> {
        let asked: FuturesUnordered<_> = self.channels.keys().map(|&id| self.ask(id)).collect();
        asked.filter_map(std::future::ready).collect::<Vec<_>>().await.into_iter().collect()
    }

    fn check(&self, id: u64, nonce: &[u8], replica: GetReplicaResponse) -> Result<Answer, Mismatch> {
        let endpoint = self.replicas.get(id).map(blixard::replica::Replica::endpoint).unwrap_or_default();
        if !self.secret.is_proven(nonce, &replica) {
            return Err(Mismatch::Secret { endpoint });
        }
        if replica.replicas != self.replicas.to_string() {
            return Err(Mismatch::Replicas { endpoint, theirs: replica.replicas });
        }
        if u64::from(replica.replica_id) != id {
            return Err(Mismatch::Id { endpoint, expected: id, found: replica.replica_id });
        }
        Ok(Answer { id, replica })
    }
}

impl Answer {
    /// Whether it has data of this registry.
    pub(crate) fn has_data(&self) -> bool {
        self.replica.state() != ReplicaState::Empty
    }

    /// Whether it leads or follows a leader.
    pub(crate) fn is_well(&self) -> bool {
        matches!(self.replica.state(), ReplicaState::Leader | ReplicaState::Follower)
    }

    /// Whether it leads.
    pub(crate) fn leads(&self) -> bool {
        self.replica.state() == ReplicaState::Leader
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(secret: &str) -> Peers {
        let replicas = "1=127.0.0.1:1/2/3,2=127.0.0.1:4/5/6,3=127.0.0.1:7/8/9".parse().unwrap();
        Peers::new(&Membership { replicas, id: 1, secret: Secret::new(secret.as_bytes()) }).unwrap()
    }

    fn answer(peers: &Peers, id: u32, nonce: &[u8]) -> GetReplicaResponse {
        GetReplicaResponse {
            replica_id: id,
            replicas: peers.replicas.to_string(),
            proof: peers.secret.proof(nonce, id.into()).into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn only_a_replica_with_our_secret_list_and_id_is_believed() {
        let peers = peers("the secret");
        assert!(peers.check(2, b"nonce", answer(&peers, 2, b"nonce")).is_ok());
        let replayed = answer(&peers, 2, b"other");
        assert!(matches!(peers.check(2, b"nonce", replayed), Err(Mismatch::Secret { .. })));
        let stranger = self::peers("another secret");
        assert!(matches!(peers.check(2, b"nonce", answer(&stranger, 2, b"nonce")), Err(Mismatch::Secret { .. })));
        let other = GetReplicaResponse { replicas: "1=…".into(), ..answer(&peers, 2, b"nonce") };
        assert!(matches!(peers.check(2, b"nonce", other), Err(Mismatch::Replicas { .. })));
        let wrong = answer(&peers, 3, b"nonce");
        assert_eq!(
            peers.check(2, b"nonce", wrong).unwrap_err().to_string(),
            "replica 3 answers at http://127.0.0.1:4, where the list has replica 2"
        );
    }
}
