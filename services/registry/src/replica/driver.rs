//! The task that looks after a replica: it observes, asks the leader, and does what the watchdog decides.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::error::Error;
use futures::{
    FutureExt as _,
    future::{BoxFuture, OptionFuture},
};
use hiqlite::Client;
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    Role,
    doubt::Doubt,
    peers::{Answer, Mismatch, Peers},
    service::Report,
    watchdog::{CORE_ENDED, Effect, Observation, Tip, Watchdog},
};
use crate::{
    StartError,
    disk::{LOG_RESERVE_BYTES, Shortage, shortage},
    embedded::{self, Embedded, core_has_panicked},
    metrics::METRICS,
    read::Readers,
};

/// How often a replica is looked at: a new leader takes changes, and a follower's watchers see them, within this. A look
/// copies Raft's metrics: microseconds.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often one that is alone is: there is nothing to see but its core's end.
const LOOK_ALONE_EVERY: Duration = Duration::from_millis(500);
/// How often a follower asks its leader how far it is.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How often the disk is looked at. At full speed the log grows by some 50 MiB in this time.
const LOOK_AT_DISK_EVERY: Duration = Duration::from_secs(1);
/// How often the others are asked whether they are well enough to begin again.
const RESEED_EVERY: Duration = Duration::from_secs(5);
/// What the driver tells others.
pub(crate) struct Outputs {
    pub(crate) role: watch::Sender<Role>,
    pub(crate) serving: watch::Sender<bool>,
    pub(crate) leading: watch::Sender<bool>,
    pub(crate) report: watch::Sender<Report>,
    pub(crate) closed: watch::Sender<Option<Error>>,
}

impl Outputs {
    fn become_role(&self, role: Role) {
        self.role.send_replace(role);
        self.leading.send_replace(role.leads().is_some());
        self.serving.send_replace(role.serves());
    }

    /// Nothing is served any more.
    pub(crate) fn stop_serving(&self) {
        self.become_role(Role::NoQuorum);
    }
}

/// When others were asked, and what they said.
type Asked = (Instant, Result<Vec<Answer>, Mismatch>);
/// The term to lead in, and whether that can begin.
type Prepared = (u64, Result<(), StartError>);

/// See the module.
pub(crate) struct ReplicaDriver {
    client: Client,
    readers: Arc<Readers>,
    dir: PathBuf,
    doubt: Doubt,
    database: PathBuf,
    peers: Option<Arc<Peers>>,
    majority: usize,
    watchdog: Watchdog,
    tip: Option<Tip>,
    asking: Option<BoxFuture<'static, Asked>>,
    ask_at: Instant,
    preparing: Option<BoxFuture<'static, Prepared>>,
    disk_at: Instant,
    reseed_at: Instant,
    applied: u64,
    /// The last one that was known.
    leader: Option<u64>,
}

impl ReplicaDriver {
    pub(crate) fn new(node: &Embedded, readers: Arc<Readers>, peers: Option<Arc<Peers>>, majority: usize) -> Self {
        let now = Instant::now();
        let doubt = Doubt::of(&node.dir);
        Self {
            client: node.client.clone(),
            readers,
            dir: node.dir.clone(),
            database: node.database.clone(),
            peers,
            majority,
            watchdog: Watchdog::new(majority, doubt.was_there_before(), now),
            doubt,
            tip: None,
            asking: None,
            ask_at: now,
            preparing: None,
            disk_at: now,
            reseed_at: now,
            applied: 0,
            leader: None,
        }
    }

    /// Looks after the replica until `stop`, or until it can't go on.
    pub(crate) async fn run(mut self, outputs: &Outputs, stop: CancellationToken) -> Result<(), StartError> {
        let every = if self.peers.is_some() { LOOK_EVERY } else { LOOK_ALONE_EVERY };
        let mut look = tokio::time::interval(every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = look.tick() => {}
                Some((asked_at, answers)) = OptionFuture::from(self.asking.as_mut()) => self.heard(asked_at, answers),
                Some((term, ready)) = OptionFuture::from(self.preparing.as_mut()) => self.prepared(term, ready)?,
            }
            self.look(outputs).await?;
        }
    }

    async fn look(&mut self, outputs: &Outputs) -> Result<(), StartError> {
        let now = Instant::now();
        let (seen, last_log_index) = observe(&self.client).await;
        if !seen.leads && seen.applied != self.applied {
            // What its leader has committed, for its watchers; an error of the database shows where it is read for somebody.
            let _ = self.readers.look();
        }
        self.applied = seen.applied;
        self.measure(seen);
        self.ask(now, seen);
        self.look_at_disk(outputs, now);
        for effect in self.watchdog.step(now, seen, self.tip) {
            self.carry_out(outputs, effect).await?;
        }
        outputs.report.send_replace(Report { seen, last_log_index });
        Ok(())
    }

    fn measure(&mut self, seen: Observation) {
        let leader_has = self.tip.filter(|_| !seen.leads).map_or(0, |tip| tip.applied);
        METRICS.applied_lag.set(leader_has.saturating_sub(seen.applied) as f64);
        if let Some(leader) = seen.leader
            && self.leader.replace(leader).is_some_and(|before| before != leader)
        {
            METRICS.leader_changes.increment(1);
        }
    }

    /// Asks the leader how far it is; or everybody, when none is known.
    fn ask(&mut self, now: Instant, seen: Observation) {
        let Some(peers) = self.peers.clone().filter(|_| self.asking.is_none() && !seen.leads && now >= self.ask_at)
        else {
            return;
        };
        self.ask_at = now + ASK_EVERY;
        let leader = seen.leader;
        self.asking = Some(
            async move {
                let answers = match leader {
                    Some(leader) => peers.ask(leader).await.into_iter().collect(),
                    None => peers.ask_all().await,
                };
                (now, answers)
            }
            .boxed(),
        );
    }

    fn heard(&mut self, asked_at: Instant, answers: Result<Vec<Answer>, Mismatch>) {
        self.asking = None;
        match answers {
            Ok(answers) => {
                if let Some(leader) = answers.into_iter().find(Answer::leads) {
                    self.tip = Some(Tip { asked_at, applied: leader.replica.applied_index });
                }
            }
            Err(mismatch) => tracing::error!(%mismatch, "a replica is not one of this registry"),
        }
    }

    async fn carry_out(&mut self, outputs: &Outputs, effect: Effect) -> Result<(), StartError> {
        match effect {
            Effect::Become(role) => self.become_role(outputs, role),
            Effect::Prepare { term } => {
                let (client, readers) = (self.client.clone(), self.readers.clone());
                self.preparing = Some(async move { (term, embedded::prepare(&client, &readers).await) }.boxed());
            }
            Effect::Restart(why) => {
                tracing::error!(why, "this replica can't go on; it has to be started again");
                if why != CORE_ENDED {
                    self.doubt.note();
                }
                return Err(StartError::Stuck(why));
            }
            Effect::Reseed => {
                let now = Instant::now();
                if let Some(peers) = self.peers.as_ref().filter(|_| now >= self.reseed_at) {
                    self.reseed_at = now + RESEED_EVERY;
                    self.doubt.begin_again(peers, self.majority).await?;
                }
            }
        }
        Ok(())
    }

    fn become_role(&self, outputs: &Outputs, role: Role) {
        outputs.become_role(role);
        if self.peers.is_some() {
            tracing::info!(?role, "registry replica");
        }
        if role.serves() {
            self.doubt.dispel();
        }
    }

    fn prepared(&mut self, term: u64, ready: Result<(), StartError>) -> Result<(), StartError> {
        self.preparing = None;
        match ready {
            Ok(()) => self.watchdog.prepared(term, true),
            // No other try would end differently.
            Err(error @ (StartError::NewerSchema { .. } | StartError::Replay)) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "this replica is not ready to lead yet");
                self.watchdog.prepared(term, false);
            }
        }
        Ok(())
    }

    fn look_at_disk(&mut self, outputs: &Outputs, now: Instant) {
        if now < self.disk_at {
            return;
        }
        self.disk_at = now + LOOK_AT_DISK_EVERY;
        let needed = LOG_RESERVE_BYTES + fs::metadata(&self.database).map_or(0, |database| database.len());
        let Ok(shortage) = shortage(&self.dir, needed) else { return };
        if shortage.is_some() != outputs.closed.borrow().is_some() {
            tracing::warn!(?shortage, needed, "the registry's disk");
            outputs.closed.send_replace(shortage.map(disk_full));
        }
    }
}

/// What is seen of a replica, and the newest entry of its log.
async fn observe(client: &Client) -> (Observation, u64) {
    let Ok(metrics) = client.metrics_db().await else {
        return (Observation { ended: true, ..Observation::default() }, 0);
    };
    let seen = Observation {
        ended: metrics.running_state.is_err() || core_has_panicked(),
        leads: metrics.state.is_leader(),
        leader: metrics.current_leader,
        term: metrics.current_term,
        voters: metrics.membership_config.voter_ids().count(),
        quorum_ack: metrics.millis_since_quorum_ack.map(Duration::from_millis),
        applied: metrics.last_applied.map_or(0, |log| log.index),
    };
    (seen, metrics.last_log_index.unwrap_or(0))
}

fn disk_full(shortage: Shortage) -> Error {
    let Shortage { free, needed } = shortage;
    shortage.error(format!("the registry's disk has {free} bytes free and needs {needed} to take changes safely"))
}
