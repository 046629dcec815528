//! The registry's trial: three processes under load, and everything that can happen to them.
//!
//! ```text
//!   kit's network: a namespace each ──────── cluster: processes, supervisor ◄─ nemesis: seeded faults
//!                                               ▲
//!   load: callers ─┬───────────────────────────┤      history ─► check ◄─ evidence: the replicas' SQLite files
//!   watchers ──────┘                            └─►
//! ```
//! `BLIXARD_CHAOS_SEED` repeats what a run tried (not when: that is the machine's), `BLIXARD_CHAOS_SECONDS` makes it longer:
//! `make chaos-registry SEED=7 SECONDS=600`. Set `BLIXARD_CHAOS_KEEP` and the replicas' data and logs stay,
//! `BLIXARD_CHAOS_RUST_LOG` for what they log, `BLIXARD_CHAOS_REGISTRY` to try another build of `registry`.
#![expect(clippy::unwrap_used, reason = "tests")]

mod check;
mod cluster;
mod evidence;
mod history;
mod load;
mod nemesis;
mod watchers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::pb::registry::v1::{self as wire, registry_service_client::RegistryServiceClient};
use blixard_chaos_kit::{Network, Rng, run_in, say, seed, time};
use blixard_chassis::{ReplicatedChannel, client};
use rustix::process::Signal;
use tokio::task::JoinSet;

use crate::{
    cluster::{Asker, Cluster, IDS},
    history::{History, Holdings},
    load::{Caller, Run},
    nemesis::{Fault, LeaderLoss, Nemesis, WELL_WITHIN, Whom},
    watchers::Watcher,
};

const CALLERS: u64 = 24;
/// Callers that share a channel, as the calls of one process do.
const CALLERS_OF_A_CHANNEL: u64 = 4;
/// Of a first start.
const FIRST_START: Duration = Duration::from_secs(60);
/// How long replicas without callers have to show the same.
const SAME_WITHIN: Duration = Duration::from_secs(30);
/// How long a majority may take no change, after it lost its leader.
const LEADERLESS_AT_MOST: Duration = Duration::from_secs(30);

/// Callers and watchers at work.
struct Load {
    run: Arc<Run>,
    callers: JoinSet<History>,
    watchers: JoinSet<History>,
    until: tokio::sync::watch::Sender<Option<u64>>,
}

impl Load {
    fn start(cluster: &Cluster, seed: u64) -> Self {
        let run = Run::new();
        let (mut callers, mut watchers) = (JoinSet::new(), JoinSet::new());
        for first in (0..CALLERS).step_by(usize::try_from(CALLERS_OF_A_CHANNEL).unwrap()) {
            let channel = ReplicatedChannel::new(&cluster.endpoints_from(first % 3 + 1)).unwrap();
            for number in first..first + CALLERS_OF_A_CHANNEL {
                let rng = Rng::new(seed, 1 + number);
                callers.spawn(Caller::new(number, channel.clone(), rng, run.clone()).run());
            }
            let each = IDS.map(|id| client::channel(cluster.endpoint(id)).unwrap()).to_vec();
            callers.spawn(watchers::read(run.clone(), channel, each));
        }
        let until = tokio::sync::watch::Sender::new(None);
        for first in IDS {
            let channel = |id: u64| client::channel(cluster.endpoint((id - 1) % 3 + 1)).unwrap();
            let stays = (format!("watcher of replica {first}"), vec![channel(first)], usize::MAX);
            let all = vec![channel(first), channel(first + 1), channel(first + 2)];
            let moves = (format!("watcher that begins with replica {first}"), all, 100);
            for (name, channels, switch_after) in [stays, moves] {
                watchers.spawn(Watcher { name, channels, switch_after, until: until.subscribe() }.run());
            }
        }
        Self { run, callers, watchers, until }
    }

    /// Ends the load and collects what it has seen, up to the last revision of all.
    async fn end(mut self, cluster: &Cluster) -> History {
        let mut history = History::default();
        self.run.end();
        while let Some(seen) = self.callers.join_next().await {
            history.add(seen.unwrap());
        }
        let mut all = RegistryServiceClient::new(ReplicatedChannel::new(&cluster.endpoints_from(1)).unwrap());
        let until = Instant::now() + SAME_WITHIN;
        let last = loop {
            let newest = all.get_revision(client::request(wire::GetRevisionRequest {}, Duration::from_secs(5))).await;
            match newest {
                Ok(newest) => break newest.into_inner().revision,
                Err(error) if Instant::now() >= until => panic!("no revision: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        self.until.send_replace(Some(last));
        while let Some(seen) = self.watchers.join_next().await {
            history.add(seen.unwrap());
        }
        history
    }
}

/// What the replicas hold, once it is the same or time is up.
async fn holdings(cluster: &Cluster) -> Vec<Holdings> {
    let until = Instant::now() + SAME_WITHIN;
    loop {
        let all: Vec<_> = IDS.iter().map(|&id| evidence::read(&cluster.database(id)).unwrap()).collect();
        if all.iter().all(|one| one.tables == all[0].tables) || Instant::now() >= until {
            return all;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Fails with everything that is wrong with a history.
fn judge(history: &History, replicas: &[Holdings], cluster: &Cluster) {
    let breaks: u64 = history.watched.iter().map(|watched| watched.breaks).sum();
    say(&format!(
        "{} objects, {} acknowledged and {} unanswered calls, {} reads, {} events, {breaks} breaks of {} watchers",
        history.objects.len(),
        history.acknowledgements.len(),
        history.unanswered.values().sum::<u64>(),
        history.reads.len(),
        replicas[0].events.len(),
        history.watched.len(),
    ));
    for (why, times) in &history.unanswered {
        say(&format!("unanswered {times:>5} × {why}"));
    }
    let violations = check::check(history, replicas);
    if violations.is_empty() {
        return;
    }
    show_logs(cluster);
    let shown: Vec<_> = violations.iter().take(20).map(ToString::to_string).collect();
    panic!("{} violations\n{}", violations.len(), shown.join("\n"));
}

fn show_logs(cluster: &Cluster) {
    for id in IDS {
        let log = cluster.log(id);
        let lines: Vec<_> = log
            .lines()
            .filter(|line| {
                !line.contains("VM registered") && !line.contains("VM state") && !line.contains("assigned to VM")
            })
            .collect();
        say(&format!("the last of replica {id}\n{}", lines[lines.len().saturating_sub(40)..].join("\n")));
    }
}

/// How long callers waited for the first change after each loss of a leader, of those that were asked for after it.
fn judge_failovers(history: &History, losses: &[LeaderLoss]) {
    let mut waits: Vec<(u64, LeaderLoss)> = Vec::new();
    for loss in losses {
        let later = history.acknowledgements.iter().filter(|one| one.asked_ms > loss.at_ms);
        let first = later.map(|one| one.answered_ms).min();
        waits.push((first.map_or(u64::MAX, |first| first - loss.at_ms), *loss));
    }
    waits.sort_by_key(|(wait, _)| *wait);
    let Some((longest, loss)) = waits.last() else { return };
    say(&format!(
        "{} losses of a leader, next change acknowledged after {} ms (median), {longest} ms (longest: {:?} at {} ms)",
        waits.len(),
        waits[waits.len() / 2].0,
        loss.fault,
        loss.at_ms,
    ));
    assert!(Duration::from_millis(*longest) < LEADERLESS_AT_MOST, "{waits:?}");
}

fn unwrap_or_show<T>(result: Result<T, String>, cluster: &Cluster) -> T {
    result.unwrap_or_else(|error| {
        show_logs(cluster);
        panic!("{error}")
    })
}

/// Three replicas that serve, under load.
struct Trial {
    cluster: Cluster,
    seed: u64,
}

impl Trial {
    /// New replicas that take a snapshot after so many entries.
    fn start(seed: u64, entries_per_snapshot: u64) -> Self {
        say(&format!("{entries_per_snapshot} entries for a snapshot"));
        let settings = [("BLIXARD_TEST_ENTRIES_PER_SNAPSHOT", entries_per_snapshot.to_string())];
        Self { cluster: Cluster::start(Network::new(3), &settings), seed }
    }

    /// Does its worst under load, and judges what is left. `worst` must leave three replicas that serve.
    fn run(&self, worst: impl AsyncFnOnce(&Cluster, Asker, Arc<Run>) -> Result<Vec<LeaderLoss>, String> + Send) {
        let cluster = &self.cluster;
        run_in(&cluster.network, || async {
            let asker = Asker::new(cluster);
            unwrap_or_show(asker.wait_for(&IDS, FIRST_START).await, cluster);
            let load = Load::start(cluster, self.seed);
            let losses = unwrap_or_show(worst(cluster, asker, load.run.clone()).await, cluster);
            let history = load.end(cluster).await;
            judge(&history, &holdings(cluster).await, cluster);
            judge_failovers(&history, &losses);
        });
    }
}

#[test]
fn whatever_happens_nothing_acknowledged_is_lost_and_nothing_is_applied_twice() {
    let (seed, time) = (seed(), time(Duration::from_secs(25)));
    let mut rng = Rng::new(seed, 0);
    let long = time > Duration::from_secs(60);
    // Half of the long runs meet snapshots and purged logs all the time.
    let entries = if long && rng.percent(50) { 300 } else { 10_000 };
    let lasts_ms = if long { 200..10_000 } else { 200..3_000 };
    Trial::start(seed, entries).run(async |cluster, asker, run| {
        let mut nemesis = Nemesis { cluster, asker, rng, run, lasts_ms, losses: Vec::new() };
        nemesis.work(time).await?;
        Ok(nemesis.losses)
    });
}

/// After the restart it is sent a snapshot, for the others have purged what it lacks. Hiqlite 0.15.3 then ends its core and
/// lives on.
#[test]
fn a_leader_killed_around_the_first_snapshot_is_back_within_a_minute() {
    const ENTRIES: u64 = 150;
    Trial::start(seed(), ENTRIES).run(async |cluster, asker, run| {
        let leader = asker.wait_for(&IDS, FIRST_START).await?;
        reaches(&asker, leader, ENTRIES - 10).await?;
        cluster.kill(leader);
        let loss = LeaderLoss { fault: Fault::Kill(Whom::Leader), at_ms: run.now_ms() };
        let others: Vec<u64> = IDS.into_iter().filter(|&id| id != leader).collect();
        let next = asker.wait_for(&others, WELL_WITHIN).await?;
        reaches(&asker, next, ENTRIES * 3).await?;
        cluster.start_again(leader);
        let began = Instant::now();
        asker.wait_for(&IDS, WELL_WITHIN).await?;
        say(&format!("it serves after {:?}, {} restarts", began.elapsed(), cluster.ended_by_itself(leader)));
        Ok(vec![loss])
    });
}

/// Waits until a replica's log has so many entries.
async fn reaches(asker: &Asker, id: u64, entries: u64) -> Result<(), String> {
    let until = Instant::now() + FIRST_START;
    loop {
        let index = asker.ask(id).await.map_or(0, |answer| answer.last_log_index);
        if index >= entries {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("the log of replica {id} has {index} entries and not {entries} after {FIRST_START:?}"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The Raft core of a process that stood still for so long ends, in Hiqlite 0.15.3, and the process lives on.
#[test]
#[ignore = "takes two minutes; make chaos-registry runs it"]
fn a_replica_that_stood_still_for_70_seconds_is_back_within_a_minute() {
    let mut rng = Rng::new(seed(), 0);
    let leads = rng.percent(50);
    Trial::start(rng.draw(), 10_000).run(async |cluster, asker, run| {
        let leader = asker.wait_for(&IDS, FIRST_START).await?;
        let id = if leads { leader } else { leader % 3 + 1 };
        say(&format!("replica {id} stands still, replica {leader} leads"));
        let loss = LeaderLoss { fault: Fault::Pause(Whom::Leader), at_ms: run.now_ms() };
        cluster.signal(id, Signal::STOP);
        tokio::time::sleep(Duration::from_secs(70)).await;
        cluster.signal(id, Signal::CONT);
        let began = Instant::now();
        asker.wait_for(&IDS, WELL_WITHIN).await?;
        say(&format!("it serves after {:?}, {} restarts", began.elapsed(), cluster.ended_by_itself(id)));
        Ok(Vec::from_iter(leads.then_some(loss)))
    });
}
