//! Faults, chosen by the seed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blixard_chaos_kit::{Rng, say};
use rustix::process::Signal;

use crate::{
    cluster::{Asker, Cluster, IDS},
    load::Run,
};

/// How long the replicas have to serve again, all of them, once nothing is wrong any more. A snapshot's transfer, an
/// election or two take a few seconds each; a core that has ended unseen takes the watchdog a minute.
pub(crate) const WELL_WITHIN: Duration = Duration::from_secs(120);
/// A replica that is asked to end does so within this.
const ENDS_WITHIN: Duration = Duration::from_secs(30);
/// Of a hundred faults, how many come before the one before it is over.
const OVERLAP_PERCENT: u64 = 25;

/// Whom a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    Leader,
    Follower,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Kill(Whom),
    /// kill -9 of the leader and a follower.
    KillTwo,
    /// kill -9 of all three.
    KillAll,
    /// SIGSTOP, and later SIGCONT.
    Pause(Whom),
    /// Cut off from everybody.
    Isolate(Whom),
    /// The leader is cut off from the others, and callers still reach it.
    CutLeaderOff,
    /// The leader and a follower are cut off from each other; the other follower reaches both.
    CutPair,
    /// kill -9 and its data is gone.
    Wipe(Whom),
    /// Each is ended in order and started again.
    RollingRestart,
}

/// All of them.
const FAULTS: &[Fault] = &[
    Fault::Kill(Whom::Leader),
    Fault::Kill(Whom::Follower),
    Fault::KillTwo,
    Fault::KillAll,
    Fault::Pause(Whom::Leader),
    Fault::Pause(Whom::Follower),
    Fault::Isolate(Whom::Leader),
    Fault::Isolate(Whom::Follower),
    Fault::CutLeaderOff,
    Fault::CutPair,
    Fault::Wipe(Whom::Leader),
    Fault::Wipe(Whom::Follower),
    Fault::RollingRestart,
];

impl Fault {
    fn needs_partitions(self) -> bool {
        matches!(self, Self::Isolate(_) | Self::CutLeaderOff | Self::CutPair)
    }

    /// Whether it may only meet three replicas that are well: two would be lost at once.
    fn needs_all_well(self) -> bool {
        matches!(self, Self::Wipe(_))
    }

    /// Whether it takes away a leader and leaves a majority.
    fn takes_the_leader(self) -> bool {
        let leader = Whom::Leader;
        [Self::Kill(leader), Self::Pause(leader), Self::Isolate(leader), Self::Wipe(leader), Self::CutLeaderOff]
            .contains(&self)
    }
}

/// A leader that was taken away while the others were well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeaderLoss {
    pub(crate) fault: Fault,
    pub(crate) at_ms: u64,
}

/// See the module.
pub(crate) struct Nemesis<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) asker: Asker,
    pub(crate) rng: Rng,
    pub(crate) run: Arc<Run>,
    /// How long a fault lasts, in milliseconds.
    pub(crate) lasts_ms: std::ops::Range<u64>,
    pub(crate) losses: Vec<LeaderLoss>,
}

impl Nemesis<'_> {
    /// Does its worst for so long, and leaves three replicas that serve; or tells which do not.
    pub(crate) async fn work(&mut self, time: Duration) -> Result<(), String> {
        let until = Instant::now() + time;
        let mut left: Vec<Fault> = Vec::new();
        let mut well = true;
        while Instant::now() < until {
            let possible = |fault: &Fault| self.cluster.network.partitions || !fault.needs_partitions();
            if left.is_empty() {
                left = FAULTS.iter().copied().filter(possible).collect();
            }
            // Each comes before any comes again.
            let place = self.rng.within(0..left.len() as u64);
            let fault = left.swap_remove(usize::try_from(place).unwrap());
            if !well && fault.needs_all_well() {
                self.well().await?;
                well = true;
            }
            let losses = self.losses.len();
            self.inflict(fault, well).await?;
            well = fault.needs_all_well() || !self.rng.percent(OVERLAP_PERCENT);
            if !well {
                // What comes next may take the majority, too.
                self.losses.truncate(losses);
            }
            if well {
                self.well().await?;
            }
        }
        self.well().await.map(drop)
    }

    async fn well(&self) -> Result<u64, String> {
        let leader = self.asker.wait_for(&IDS, WELL_WITHIN).await?;
        say(&format!("{:>7} ms  all serve, replica {leader} leads", self.run.now_ms()));
        Ok(leader)
    }

    async fn inflict(&mut self, fault: Fault, all_well: bool) -> Result<(), String> {
        let Self { cluster, rng, .. } = self;
        let leader = match self.asker.leader().await {
            Some(leader) => leader,
            None => *rng.pick(&IDS),
        };
        let followers: Vec<u64> = IDS.into_iter().filter(|&id| id != leader).collect();
        let follower = *rng.pick(&followers);
        let one = |whom| if whom == Whom::Leader { leader } else { follower };
        let lasts = Duration::from_millis(rng.within(self.lasts_ms.clone()));
        say(&format!(
            "{:>7} ms  {fault:?} for {lasts:?}, replica {leader} leads, follower {follower}",
            self.run.now_ms()
        ));
        if fault.takes_the_leader() && all_well {
            self.losses.push(LeaderLoss { fault, at_ms: self.run.now_ms() });
        }
        let cluster = *cluster;
        match fault {
            Fault::Kill(whom) => down(cluster, &[one(whom)], lasts).await,
            Fault::KillTwo => down(cluster, &[leader, follower], lasts).await,
            Fault::KillAll => down(cluster, &IDS, lasts).await,
            Fault::Pause(whom) => {
                cluster.signal(one(whom), Signal::STOP);
                tokio::time::sleep(lasts).await;
                cluster.signal(one(whom), Signal::CONT);
            }
            Fault::Isolate(whom) => {
                cluster.network.isolate(one(whom), true);
                tokio::time::sleep(lasts).await;
                cluster.network.isolate(one(whom), false);
            }
            Fault::CutLeaderOff => cut(cluster, leader, &followers, lasts).await,
            Fault::CutPair => cut(cluster, leader, &[follower], lasts).await,
            Fault::Wipe(whom) => {
                cluster.kill(one(whom));
                cluster.wipe(one(whom));
                tokio::time::sleep(lasts).await;
                cluster.start_again(one(whom));
            }
            Fault::RollingRestart => {
                for id in followers.into_iter().chain([leader]) {
                    self.restart(id).await?;
                }
            }
        }
        Ok(())
    }

    /// SIGTERM; whoever supervises it starts it again.
    async fn restart(&self, id: u64) -> Result<(), String> {
        let ended = self.cluster.ended_by_itself(id);
        self.cluster.signal(id, Signal::TERM);
        let until = Instant::now() + ENDS_WITHIN;
        while self.cluster.ended_by_itself(id) == ended {
            if Instant::now() >= until {
                return Err(format!("replica {id} has not ended {ENDS_WITHIN:?} after SIGTERM"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.asker.wait_for(&IDS, WELL_WITHIN).await.map(drop)
    }
}

async fn down(cluster: &Cluster, ids: &[u64], lasts: Duration) {
    ids.iter().for_each(|&id| cluster.kill(id));
    tokio::time::sleep(lasts).await;
    ids.iter().for_each(|&id| cluster.start_again(id));
}

async fn cut(cluster: &Cluster, leader: u64, others: &[u64], lasts: Duration) {
    others.iter().for_each(|&other| cluster.network.cut(leader, other, true));
    tokio::time::sleep(lasts).await;
    others.iter().for_each(|&other| cluster.network.cut(leader, other, false));
}
