//! What lives in the leader's memory: heartbeats of vmhosts, of which it is recorded that a node is lost, and who still wants
//! which lease, of which it is recorded when one changes hands.
//!
//! ```text
//!   vmhost ──heartbeat──► stream ──► presence ◄── recorded nodes, passing time ── watch (a task)
//!          ◄──interval───                              lost ──► a guarded mutation: this incarnation, not lost yet
//!   scheduler ──AcquireLease──► leases ── passes on ──► a guarded mutation: still of this epoch
//! ```

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use blixard::{
    error::{Error, Reason},
    id::NodeId,
    node::NodeState,
    pb::registry::v1::{HeartbeatRequest, HeartbeatResponse},
};
use futures::{Stream, future::join_all, stream};
use hiqlite::rusqlite::{self, Connection};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    commit::CommitHandle,
    leases::{self, Asked, Leases},
    mutation::Mutation,
    presence::{Heard, Lost, NodeTiming, Presence, Recorded},
    read::Readers,
    replica::Role,
    rows::{find_lease, number},
    rpc::LeaseRequest,
    verdict::{Answer, node_not_found, stale_incarnation},
};

/// The heartbeats of all nodes.
pub(crate) struct Heartbeats {
    timing: NodeTiming,
    presence: Mutex<Presence>,
    leases: Mutex<TermLeases>,
    readers: Arc<Readers>,
    commits: CommitHandle,
    role: watch::Receiver<Role>,
    stop: CancellationToken,
}

/// The leases as a leader knows them, and the term in which it does.
struct TermLeases {
    term: Option<u64>,
    leases: Leases,
}

/// How often a lease is asked for anew that others take or give up at the same time.
const TRIES: usize = 5;

impl Heartbeats {
    /// `stop`: when streams are to end.
    pub(crate) fn new(
        timing: NodeTiming,
        readers: Arc<Readers>,
        commits: CommitHandle,
        role: watch::Receiver<Role>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let leases = Mutex::new(TermLeases { term: None, leases: Leases::new(timing.every) });
        Arc::new(Self { timing, presence: Mutex::new(Presence::new(timing)), leases, readers, commits, role, stop })
    }

    /// Watches the nodes while this replica leads.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut role = self.role.clone();
        let mut term = None;
        let mut ticks = tokio::time::interval(self.timing.every / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = Instant::now();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                Ok(()) = role.changed() => {}
                _ = ticks.tick() => {}
            }
            let leads = role.borrow_and_update().leads();
            if leads != term {
                *self.presence() = Presence::new(self.timing);
                term = leads;
            }
            let passed = std::mem::replace(&mut looked_at, Instant::now()).elapsed();
            if leads.is_some() {
                // An error means that it stops leading just now.
                let _ = self.with_leases(|leases| leases.passed(passed));
                let looked = self.stop.run_until_cancelled(self.look(passed)).await;
                if let Some(Err(error)) = looked {
                    tracing::warn!(%error, "the nodes could not be looked at");
                }
            }
        }
    }

    /// Looks who is lost, and records it.
    async fn look(&self, passed: std::time::Duration) -> Result<(), Error> {
        let nodes = self.readers.read(|connection| recorded(connection, "")).await?;
        let lost = {
            let mut presence = self.presence();
            presence.recorded(nodes);
            presence.passed(passed)
        };
        join_all(lost.into_iter().map(|lost| self.record(lost))).await;
        Ok(())
    }

    async fn record(&self, Lost { id, incarnation }: Lost) {
        let reason = format!("not heard of for {:?}", self.timing.grace);
        match self.commits.submit(Mutation::LoseNode { id: id.clone(), incarnation, reason }, None).await {
            Ok(_) => tracing::warn!(node_id = %id, incarnation, "node lost"),
            Err(error) if error.reason == Reason::StaleIncarnation => {}
            Err(error) => tracing::warn!(node_id = %id, incarnation, %error, "the loss of a node is not recorded yet"),
        }
    }

    /// Answers the heartbeats of a stream, until it ends, an incarnation is over, or this replica stops leading.
    pub(crate) fn answer(
        self: &Arc<Self>,
        requests: Streaming<HeartbeatRequest>,
    ) -> impl Stream<Item = Result<HeartbeatResponse, Status>> + use<> {
        let begun = (Arc::clone(self), self.role.clone(), requests);
        stream::unfold(Some(begun), |state| async {
            let (heartbeats, mut role, mut requests) = state?;
            let answer = tokio::select! {
                biased;
                () = heartbeats.stop.cancelled() => Err(shutting_down()),
                () = until_not_leading(&mut role) => Err(no_longer_leading()),
                request = requests.message() => match request {
                    Ok(Some(request)) => heartbeats.heard(request).await,
                    Ok(None) => return None,
                    Err(status) => Err(status.into()),
                },
            };
            match answer {
                Ok(answer) => Some((Ok(answer), Some((heartbeats, role, requests)))),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn heard(&self, request: HeartbeatRequest) -> Result<HeartbeatResponse, Error> {
        let HeartbeatRequest { node_id, incarnation } = request;
        let id = NodeId::parse("node_id", &node_id)?;
        let mut heard = self.presence().heard(&id, incarnation);
        if heard == Heard::Unknown {
            let nodes = self.readers.read(move |connection| recorded(connection, &node_id)).await?;
            let current = nodes.first().map(|node| node.incarnation).ok_or_else(|| node_not_found(&id))?;
            let mut presence = self.presence();
            presence.recorded(nodes);
            heard = match presence.heard(&id, incarnation) {
                Heard::Unknown => Heard::Over { current },
                known => known,
            };
        }
        match heard {
            Heard::Over { current } => Err(stale_incarnation(&id, incarnation, current)),
            Heard::Alive | Heard::Unknown => {
                let interval_ms = u32::try_from(self.timing.every.as_millis()).unwrap_or(u32::MAX);
                Ok(HeartbeatResponse { interval_ms })
            }
        }
    }

    /// Who has a lease now that somebody asks for it.
    pub(crate) async fn lease(&self, request: &LeaseRequest) -> Result<leases::Recorded, Error> {
        let name = request.name.clone();
        for _ in 0..TRIES {
            let change = match self.with_leases(|leases| leases.ask(&name, &request.who, request.wish))? {
                Asked::Stands(lease) => return Ok(lease),
                Asked::Take { epoch } => Some(request.take(epoch)),
                Asked::Release => Some(request.give_up()),
                Asked::Unknown => None,
            };
            let recorded = match change {
                None => {
                    let name = name.clone();
                    self.readers.read(move |connection| find_lease(connection, &name)).await?.unwrap_or_default()
                }
                Some(change) => match self.commits.submit(change, None).await? {
                    Answer::Lease(lease) => {
                        let holder = lease.holder.as_ref().map_or("", |holder| holder.name.as_str());
                        tracing::info!(lease = name, holder, epoch = lease.epoch, "lease changed hands");
                        lease
                    }
                    other => return Err(Error::internal(|id| tracing::error!(error_id = id, ?other, "no lease"))),
                },
            };
            self.with_leases(|leases| leases.recorded(&name, recorded))?;
        }
        let message = format!("the lease {name} changes hands at this moment; ask again");
        Err(Error::new(Reason::PeerUnavailable, message).with("peer", "registry"))
    }

    /// The leases of the term in which this replica leads. Never held across an await.
    fn with_leases<T>(&self, work: impl FnOnce(&mut Leases) -> T) -> Result<T, Error> {
        let Some(term) = self.role.borrow().leads() else { return Err(no_longer_leading()) };
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases.term != Some(term) {
            *leases = TermLeases { term: Some(term), leases: Leases::new(self.timing.every) };
        }
        Ok(work(&mut leases.leases))
    }

    /// Never held across an await.
    fn presence(&self) -> MutexGuard<'_, Presence> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn until_not_leading(role: &mut watch::Receiver<Role>) {
    // An error means that this replica is gone.
    let _ = role.wait_for(|role| role.leads().is_none()).await;
}

/// The node of this id; empty: all nodes.
pub(crate) fn recorded(connection: &Connection, id: &str) -> rusqlite::Result<Vec<Recorded>> {
    let sql = "SELECT id, incarnation, state FROM nodes WHERE ?1 IN (id, '')";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map([id], |row| {
        let (id, state): (String, String) = (row.get(0)?, row.get(2)?);
        Ok((NodeId::parse("id", &id), number(row, 1)?, NodeState::from_name(&state) == Some(NodeState::Lost)))
    })?;
    let known = |(id, incarnation, lost): (Result<NodeId, Error>, u64, bool)| {
        id.ok().map(|id| Recorded { id, incarnation, lost })
    };
    rows.filter_map(|row| row.map(known).transpose()).collect()
}

fn shutting_down() -> Error {
    Error::new(Reason::ShuttingDown, "the registry is shutting down; connect again")
}

fn no_longer_leading() -> Error {
    let message = "this replica of the registry does not lead; connect again";
    Error::new(Reason::PeerUnavailable, message).with("peer", "registry")
}
