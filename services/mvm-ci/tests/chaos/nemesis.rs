//! Every second something is killed, stopped or cut off, as the seed says; each fault ends by itself.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard_chaos_kit::{Rng, say};
use rustix::process::Signal;
use tokio::task::JoinSet;

use crate::fleet::{Fleet, NODES, REGISTRIES, SCHEDULERS, name, signal};

/// How long a fault lasts, in milliseconds.
const SHORT_MS: Range<u64> = 200..5_000;
/// Longer than a node's lease (30 s), and by seconds than it takes until its jobs begin again elsewhere (15 s of silence and 30 s of
/// grace): what it did not end lives beside its successor.
const LONG_MS: Range<u64> = 55_000..70_000;
/// The first fault is a long one, once jobs run.
const FIRST_AFTER: Duration = Duration::from_secs(8);
/// Of a hundred faults of schedulers and vmhosts, how many are long, but one at a time.
const LONG_PERCENT: u64 = 12;
/// After a fault the registry is left alone for so long: an election takes about 3 s, and it has to be able to work.
const REGISTRY_RESTS: Duration = Duration::from_secs(8);
/// The others.
const OTHERS_REST: Duration = Duration::from_secs(3);

/// What goes wrong with a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// kill -9 of its process.
    Kill,
    /// SIGSTOP, and later SIGCONT.
    Pause,
    /// Cut off from everybody.
    Isolate,
    /// Cut off from one other host.
    Cut,
    /// A node's: kill -9 of its vmhost and of everything in its VMs.
    PowerOff,
    /// kill -9 of a VM's guest agent.
    KillVm,
    /// SIGSTOP of a VM's guest agent, and later SIGCONT.
    PauseVm,
}

impl Fault {
    fn needs_partitions(self) -> bool {
        matches!(self, Self::Isolate | Self::Cut)
    }
}

/// See the module.
pub(crate) struct Nemesis {
    fleet: Arc<Fleet>,
    rng: Rng,
    began: Instant,
    /// Until when a host is left alone.
    rests: BTreeMap<u64, Instant>,
    /// Until when a long fault lasts.
    long_until: Instant,
    under_way: JoinSet<()>,
    inflicted: BTreeMap<String, u64>,
}

impl Nemesis {
    pub(crate) fn new(fleet: Arc<Fleet>, rng: Rng) -> Self {
        let began = Instant::now();
        let (rests, inflicted) = (BTreeMap::new(), BTreeMap::new());
        Self { fleet, rng, began, rests, long_until: began, under_way: JoinSet::new(), inflicted }
    }

    /// Does its worst for so long, then waits until all is as it was.
    pub(crate) async fn work(mut self, time: Duration) {
        // A run of any length has a long one.
        tokio::time::sleep(FIRST_AFTER).await;
        self.strike(*NODES.start(), true, time);
        let mut seconds = tokio::time::interval(Duration::from_secs(1));
        while self.began.elapsed() < time {
            seconds.tick().await;
            let host = self.choose();
            let long = self.rng.percent(LONG_PERCENT);
            self.strike(host, long, time);
        }
        while self.under_way.join_next().await.is_some() {}
        for (what, times) in &self.inflicted {
            say(&format!("inflicted {times:>4} × {what}"));
        }
    }

    /// A host that has rested; any node when none has: its VMs can be struck all the time.
    fn choose(&mut self) -> u64 {
        let kinds = [REGISTRIES, SCHEDULERS, NODES, NODES];
        let hosts: Vec<u64> = self.rng.pick(&kinds).clone().collect();
        let host = *self.rng.pick(&hosts);
        let nodes: Vec<u64> = NODES.collect();
        if self.rests(host) { *self.rng.pick(&nodes) } else { host }
    }

    fn rests(&self, host: u64) -> bool {
        self.rests.get(&host).is_some_and(|until| Instant::now() < *until)
    }

    fn strike(&mut self, host: u64, long: bool, time: Duration) {
        let faults: &[Fault] = match host {
            _ if NODES.contains(&host) && self.rests(host) => &[Fault::KillVm, Fault::PauseVm],
            _ if NODES.contains(&host) => {
                &[Fault::Kill, Fault::Kill, Fault::Pause, Fault::Isolate, Fault::Cut, Fault::PowerOff, Fault::KillVm]
            }
            _ => &[Fault::Kill, Fault::Pause, Fault::Isolate, Fault::Cut],
        };
        // The registry is the one thing that everybody waits for.
        let may_be_long = !REGISTRIES.contains(&host) && !self.rests(host) && Instant::now() >= self.long_until;
        let long = long && may_be_long && self.began.elapsed() + Duration::from_millis(LONG_MS.start) < time;
        // These try the leases: what is cut off or stands still lives on, and does not know.
        let faults = if long { &[Fault::Kill, Fault::Pause, Fault::Isolate, Fault::Isolate] } else { faults };
        let partitions = self.fleet.network.partitions;
        let faults: Vec<_> = faults.iter().copied().filter(|fault| partitions || !fault.needs_partitions()).collect();
        let fault = *self.rng.pick(&faults);
        let now = Instant::now();
        let lasts = Duration::from_millis(self.rng.within(if long { LONG_MS } else { SHORT_MS }));
        if long {
            self.long_until = now + lasts;
        }
        if REGISTRIES.contains(&host) {
            self.rests.extend(REGISTRIES.map(|id| (id, now + lasts + REGISTRY_RESTS)));
        } else if !self.rests(host) {
            self.rests.insert(host, now + lasts + OTHERS_REST);
        }
        let others: Vec<u64> = (1..=*NODES.end()).filter(|&other| other != host).collect();
        let (other, pick) = (*self.rng.pick(&others), self.rng.draw());
        say(&format!("{:>7} ms  {fault:?} {} for {lasts:?}", self.began.elapsed().as_millis(), name(host)));
        let kind = if long { "long " } else { "" };
        let whose = name(host);
        let what = format!("{kind}{fault:?} {}", whose.split('-').next().unwrap_or_default());
        *self.inflicted.entry(what).or_default() += 1;
        self.under_way.spawn(inflict(self.fleet.clone(), fault, host, other, pick, lasts));
    }
}

async fn inflict(fleet: Arc<Fleet>, fault: Fault, host: u64, other: u64, pick: u64, lasts: Duration) {
    match fault {
        Fault::Kill => {
            fleet.kill(host);
            tokio::time::sleep(lasts).await;
            fleet.start_again(host);
        }
        Fault::Pause => {
            fleet.signal(host, Signal::STOP);
            tokio::time::sleep(lasts).await;
            fleet.signal(host, Signal::CONT);
        }
        Fault::Isolate => {
            fleet.network.isolate(host, true);
            tokio::time::sleep(lasts).await;
            fleet.network.isolate(host, false);
        }
        Fault::Cut => {
            fleet.network.cut(host, other, true);
            tokio::time::sleep(lasts).await;
            fleet.network.cut(host, other, false);
        }
        Fault::PowerOff => {
            fleet.power_off(host);
            tokio::time::sleep(lasts).await;
            fleet.start_again(host);
        }
        Fault::KillVm | Fault::PauseVm => {
            let vms: Vec<String> = fleet.vms_of(host).into_iter().collect();
            let Some(place) = usize::try_from(pick).unwrap_or(0).checked_rem(vms.len()) else { return };
            let agents = fleet.agents_of(&vms[place]);
            if fault == Fault::KillVm {
                agents.iter().for_each(|&agent| signal(agent, Signal::KILL));
                return;
            }
            agents.iter().for_each(|&agent| signal(agent, Signal::STOP));
            tokio::time::sleep(lasts).await;
            agents.iter().for_each(|&agent| signal(agent, Signal::CONT));
        }
    }
}
