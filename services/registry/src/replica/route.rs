//! Where a call to `RegistryService` is answered: here, by the leader, or not at all.
//!
//! ```text
//!            reads ──► here, while this replica is up to date
//!   call ──┤
//!            changes ─► here, while it leads ─► to the leader, as they came, while it follows one
//! ```
//! Handed on is the HTTP request itself, once: a leader that has just lost its office refuses instead of passing it on.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason, invalid},
    pb::registry::v1::registry_service_server::RegistryServiceServer,
    replica::{MIN_REVISION, REVISION},
};
use blixard_chassis::admission::Deadline;
use http::{HeaderValue, Request, Response};
use tokio::sync::watch;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service as _;

use super::{Role, peers::Peers};

/// Calls that a follower answers itself; every other one changes something, or wants the leader's word.
const READS: &[&str] = &[
    "GetVm",
    "ListVms",
    "ListVmEvents",
    "GetJob",
    "ListJobs",
    "ListAttempts",
    "ListNodes",
    "GetCounts",
    "Watch",
    "Query",
    "Backup",
];
/// Calls for the leader that leave nothing on its disk, or a few bytes now and then: a full one must not cost the nodes, nor
/// the scheduler its lease. (A follower may not have come as far as a job that its vmhost has just been given, nor may it say
/// what is forgotten: GetJobInput and FindForgottenJobs are the leader's too.)
const IN_MEMORY: &[&str] = &["Heartbeat", "AcquireLease", "GetJobInput"];
/// How long a call waits for its replica to come as far as the caller has seen: followers are milliseconds behind.
const REACH_WITHIN: Duration = Duration::from_secs(2);
/// Marks a call that a replica has handed on.
const HANDED_ON: &str = "blixard-handed-on";

type Local = RegistryServiceServer<crate::service::Service>;

/// `RegistryService` of a replica.
#[derive(Clone)]
pub struct Gate {
    /// Set once this replica has a database.
    pub(crate) local: Arc<OnceLock<Local>>,
    pub(crate) role: watch::Receiver<Role>,
    /// Why no changes are taken now, though this replica leads.
    pub(crate) closed: watch::Receiver<Option<Error>>,
    /// The newest revision that this replica shows.
    pub(crate) newest: watch::Receiver<u64>,
    pub(crate) peers: Option<Arc<Peers>>,
}

impl NamedService for Gate {
    const NAME: &'static str = <Local as NamedService>::NAME;
}

/// Who answers.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    Here,
    Leader(u64),
    Nobody(Error),
}

impl tower::Service<Request<Body>> for Gate {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let role = *self.role.borrow();
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let (is_read, in_memory) = (READS.contains(&method), IN_MEMORY.contains(&method));
        let closed = self.closed.borrow().clone().filter(|_| !is_read && !in_memory);
        match route(role, is_read, request.headers().contains_key(HANDED_ON), closed) {
            Route::Here => match self.local.get() {
                Some(local) => Box::pin(answer(local.clone(), request, self.newest.clone())),
                None => refuse(not_ready(Role::Starting)),
            },
            Route::Leader(id) => {
                let (role, peers) = (self.role.clone(), self.peers.clone());
                Box::pin(async move { Ok(hand_on(request, id, role, peers).await) })
            }
            Route::Nobody(error) => refuse(error),
        }
    }
}

/// Answers here: not before this replica shows what the caller has seen elsewhere.
async fn answer(
    mut local: Local,
    request: Request<Body>,
    mut newest: watch::Receiver<u64>,
) -> Result<Response<Body>, Infallible> {
    let reached = match request.headers().get(MIN_REVISION) {
        Some(value) => reach(value, &mut newest).await,
        None => Ok(()),
    };
    if let Err(error) = reached {
        return Ok(Status::from(error).into_http());
    }
    let mut response = local.call(request).await?;
    response.headers_mut().insert(REVISION, HeaderValue::from(*newest.borrow()));
    Ok(response)
}

/// Waits until this replica shows a revision.
async fn reach(wanted: &HeaderValue, newest: &mut watch::Receiver<u64>) -> Result<(), Error> {
    let text = wanted.to_str().unwrap_or_default();
    let wanted: u64 = text.parse().map_err(|_| invalid(MIN_REVISION, text, "a revision"))?;
    let reached = tokio::time::timeout(REACH_WITHIN, newest.wait_for(|newest| *newest >= wanted)).await.is_ok();
    if reached {
        return Ok(());
    }
    let revision = *newest.borrow();
    let message = format!("this replica shows revision {revision}, and the caller has seen {wanted}");
    Err(Error::new(Reason::ReplicaBehind, message).with("revision", revision).with("min_revision", wanted))
}

fn refuse(error: Error) -> <Gate as tower::Service<Request<Body>>>::Future {
    Box::pin(async { Ok(Status::from(error).into_http()) })
}

fn route(role: Role, is_read: bool, handed_on: bool, closed: Option<Error>) -> Route {
    match (role, is_read) {
        (Role::Leader { .. } | Role::Follower { .. }, true) => Route::Here,
        (Role::Leader { .. }, false) => closed.map_or(Route::Here, Route::Nobody),
        (Role::Follower { leader: Some(leader) }, false) if !handed_on => Route::Leader(leader),
        (role, _) => Route::Nobody(not_ready(role)),
    }
}

fn not_ready(role: Role) -> Error {
    let (reason, message) = match role {
        Role::Behind => (Reason::ReplicaBehind, "this replica can't prove that it is up to date; ask another one"),
        Role::Empty | Role::Starting => {
            (Reason::PeerUnavailable, "this replica is starting; ask another one, or try again")
        }
        Role::NoQuorum => (Reason::PeerUnavailable, "no majority of the registry's replicas can be reached; try again"),
        Role::Leader { .. } | Role::Follower { .. } => {
            (Reason::PeerUnavailable, "the registry has no leader at this moment; try again")
        }
    };
    Error::new(reason, message).with("peer", "registry")
}

/// Passes a call to the leader; another leader meanwhile ends the wait.
async fn hand_on(
    mut request: Request<Body>,
    leader: u64,
    mut role: watch::Receiver<Role>,
    peers: Option<Arc<Peers>>,
) -> Response<Body> {
    let Some(mut channel) = peers.and_then(|peers| peers.channel(leader)) else {
        return Status::from(not_ready(Role::NoQuorum)).into_http();
    };
    // A stream that has none must not get one.
    if request.headers().contains_key("grpc-timeout")
        && let Some(timeout) = request.extensions().get::<Deadline>().and_then(|&deadline| remaining(deadline))
    {
        request.headers_mut().insert("grpc-timeout", timeout);
    }
    request.headers_mut().insert(HANDED_ON, HeaderValue::from_static("1"));
    let answer = async {
        std::future::poll_fn(|context| channel.poll_ready(context)).await?;
        channel.call(request).await
    };
    let another_leader = role.wait_for(|role| *role != Role::Follower { leader: Some(leader) });
    tokio::select! {
        answer = answer => answer.unwrap_or_else(|error| Status::from(lost(leader, &error.to_string())).into_http()),
        _ = another_leader => Status::from(lost(leader, "it no longer leads")).into_http(),
    }
}

fn lost(leader: u64, why: &str) -> Error {
    let message = format!("the leader, replica {leader}, has not answered ({why}); the outcome is unknown, try again");
    Error::new(Reason::PeerUnavailable, message).with("peer", "registry")
}

/// What is left of a deadline, as gRPC writes it.
fn remaining(Deadline(deadline): Deadline) -> Option<HeaderValue> {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis().min(99_999_999);
    HeaderValue::from_str(&format!("{left}m")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_contract_is_a_read_or_a_change_by_decision() {
        let contract = include_str!("../../../../proto/blixard/registry/v1/registry.proto");
        let methods = contract.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next());
        let changes: Vec<_> = methods.clone().filter(|method| !READS.contains(method)).collect();
        for read in READS.iter().chain(IN_MEMORY) {
            assert!(methods.clone().any(|method| method == *read), "{read}");
        }
        insta::assert_snapshot!(changes.join(" "), @"CreateVm TransitionVm PurgeVms CreateJob CreateJobs GetJobInput AssignJob StartAttempt FinishAttempt CancelJob FailQueuedJob FindForgottenJobs RegisterNode Heartbeat UpdateNode AcquireLease GetRevision ResizeVm");
    }

    #[test]
    fn each_role_answers_hands_on_or_refuses() {
        let leader = Role::Leader { term: 1 };
        let follower = Role::Follower { leader: Some(2) };
        assert_eq!(route(leader, true, false, None), Route::Here);
        assert_eq!(route(leader, false, true, None), Route::Here);
        assert_eq!(route(follower, true, false, None), Route::Here);
        assert_eq!(route(follower, false, false, None), Route::Leader(2));
        let reason = |role, is_read, handed_on| match route(role, is_read, handed_on, None) {
            Route::Nobody(error) => error.reason,
            other => panic!("{role:?} {other:?}"),
        };
        assert_eq!(reason(follower, false, true), Reason::PeerUnavailable);
        assert_eq!(reason(Role::Follower { leader: None }, false, false), Reason::PeerUnavailable);
        for is_read in [true, false] {
            assert_eq!(reason(Role::Behind, is_read, false), Reason::ReplicaBehind);
            for role in [Role::Empty, Role::Starting, Role::NoQuorum] {
                assert_eq!(reason(role, is_read, false), Reason::PeerUnavailable);
            }
        }
        let full = Error::new(Reason::DiskFull, "full");
        assert_eq!(route(leader, false, false, Some(full.clone())), Route::Nobody(full));
    }
}
