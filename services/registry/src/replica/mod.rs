//! One of several replicas: how it begins, what it may serve, and who leads.
//!
//! ```text
//!   bootstrap: whom to join, and when a first start is safe     peers: what the other replicas say of themselves
//!   driver: looks at the core, asks the leader ─► watchdog ─► role ─► route: here, to the leader, or refused
//! ```
//! A registry that is alone is the same thing with one member that always leads.

pub(crate) mod bootstrap;
pub(crate) mod doubt;
pub(crate) mod driver;
pub(crate) mod peers;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod watchdog;

use blixard::{
    pb::registry::v1::ReplicaState,
    replica::{Replica, Replicas},
};

use self::peers::Secret;
use crate::StartError;

/// What a replica may serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// It has no data yet and waits for others.
    Empty,
    /// It has not been up to date yet.
    Starting,
    /// It takes changes.
    Leader { term: u64 },
    /// It serves reads; changes go to the leader while one is known.
    Follower { leader: Option<u64> },
    /// It can't prove that it is up to date.
    Behind,
    /// It knows no leader that a majority follows.
    NoQuorum,
}

impl Role {
    /// Whether it serves reads.
    pub(crate) fn serves(self) -> bool {
        matches!(self, Self::Leader { .. } | Self::Follower { .. })
    }

    /// The term in which it takes changes.
    pub(crate) fn leads(self) -> Option<u64> {
        match self {
            Self::Leader { term } => Some(term),
            Self::Empty | Self::Starting | Self::Follower { .. } | Self::Behind | Self::NoQuorum => None,
        }
    }

    fn to_pb(self) -> ReplicaState {
        match self {
            Self::Empty => ReplicaState::Empty,
            Self::Starting => ReplicaState::Starting,
            Self::Leader { .. } => ReplicaState::Leader,
            Self::Follower { .. } => ReplicaState::Follower,
            Self::Behind => ReplicaState::Behind,
            Self::NoQuorum => ReplicaState::NoQuorum,
        }
    }
}

/// Which replica of which registry this is.
#[derive(Debug, Clone)]
pub struct Membership {
    /// All replicas.
    pub replicas: Replicas,
    /// This one.
    pub id: u64,
    /// What they know each other by.
    pub secret: Secret,
}

impl Membership {
    /// This replica's entry in the list.
    pub(crate) fn own(&self) -> Result<&Replica, StartError> {
        self.replicas.get(self.id).ok_or_else(|| StartError::NotListed(self.id))
    }
}
