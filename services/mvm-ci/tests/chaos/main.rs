//! The scheduler's trial: a whole fleet of real processes under load, and everything that can happen to them.
//!
//! ```text
//!   kit's network: a host each ─ fleet: 3 registries, 2 schedulers, 3 vmhosts (`process` driver) ◄─ nemesis: seeded faults
//!                                        ▲              │
//!   load: callers, cancels, followers ───┘              └─ job: each appends what it does to a file   ─► check ◄─ evidence
//! ```
//! Beside what steers every trial (see the kit): `BLIXARD_CHAOS_JOBS`, and `BLIXARD_CHAOS_PROGRAMS` for a directory with other
//! builds of the programs. `make chaos-scheduler SEED=7 SECONDS=600 JOBS=5000`.
#![expect(clippy::unwrap_used, reason = "tests")]

mod check;
mod evidence;
mod fleet;
mod job;
mod load;
mod nemesis;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{
    job::JobState,
    limits,
    pb::{
        common::v1::NodeState,
        registry::v1::{ListNodesRequest, ReplicaState, registry_service_client::RegistryServiceClient},
        scheduler::v1 as pb,
    },
    vm::VmState,
};
use blixard_chaos_kit::{Rng, run_in, say, seed, setting, time};
use blixard_chassis::client;
use tokio::task::JoinSet;

use crate::{
    check::{Job, check},
    fleet::{Fleet, NODES, SCHEDULERS, name},
    job::{MAX_ATTEMPTS, Plan, effects},
    load::{Load, Seen},
    nemesis::Nemesis,
};

/// More than there are VMs, so that some wait.
const CALLERS: u64 = 40;
/// The first jobs, so that each node has some when the first long fault meets one.
const LONG_JOBS: u64 = 6;
/// Of a first start, and of the nodes' and replicas' return when nothing is wrong any more: a lost node is given up after 45 s.
const WELL_WITHIN: Duration = Duration::from_secs(120);
/// How long jobs may take to end when nothing is wrong any more: the longest runs for 80 s, and one that was just lost
/// waits for 45 s before it begins again.
const END_WITHIN: Duration = Duration::from_secs(240);
/// How long VMs may take to be gone once they were told to.
const GONE_WITHIN: Duration = Duration::from_secs(60);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Waits until `look` finds nothing to complain of.
async fn wait_until(what: &str, within: Duration, look: impl AsyncFn() -> Result<(), String>) -> Result<(), String> {
    let until = Instant::now() + within;
    loop {
        match look().await {
            Ok(()) => return Ok(()),
            Err(seen) if Instant::now() >= until => return Err(format!("not {what} after {within:?}: {seen}")),
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// All replicas serve, and all nodes take work.
async fn all_well(fleet: &Fleet) -> Result<(), String> {
    let replicas = fleet.replicas().await;
    let serves = |state: &Option<ReplicaState>| matches!(state, Some(ReplicaState::Leader | ReplicaState::Follower));
    if !replicas.iter().all(serves) {
        return Err(format!("{replicas:?}"));
    }
    let list = client::request(ListNodesRequest::default(), CALL_TIMEOUT);
    let nodes = RegistryServiceClient::new(fleet.registry()).list_nodes(list).await;
    let nodes = nodes.map_err(|status| status.to_string())?.into_inner().nodes;
    let ready = nodes.iter().filter(|node| node.state() == NodeState::Ready).count();
    if ready != NODES.count() || nodes.len() != ready {
        let states: Vec<_> = nodes.iter().map(|node| (&node.id, node.state(), &node.reason)).collect();
        return Err(format!("{states:?}"));
    }
    Ok(())
}

/// Ends every VM and waits until nothing of any is left on a host.
async fn no_leftovers(fleet: &Fleet) -> Result<(), String> {
    let mut scheduler = fleet.schedulers(*SCHEDULERS.start());
    let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
    let states: Vec<i32> = states.map(|state| state.to_pb().into()).collect();
    let list = pb::ListVmsRequest { page_size: limits::MAX_PAGE_SIZE, states, ..Default::default() };
    let answer = scheduler.list_vms(client::request(list.clone(), CALL_TIMEOUT)).await;
    for vm in answer.map_err(|status| status.to_string())?.into_inner().vms {
        let stop = pb::StopVmRequest { vm_id: vm.id, grace_ms: Some(0), reason: "the trial is over".to_owned() };
        scheduler.stop_vm(client::request(stop, CALL_TIMEOUT)).await.map_err(|status| status.to_string())?;
    }
    wait_until("gone", GONE_WITHIN, async || {
        let answer = scheduler.clone().list_vms(client::request(list.clone(), CALL_TIMEOUT)).await;
        let vms = answer.map_err(|status| status.to_string())?.into_inner().vms;
        let held: BTreeMap<_, _> = NODES.map(|id| (name(id), fleet.vms_of(id))).collect();
        let strays = fleet.strays();
        if vms.is_empty() && held.values().all(|vms| vms.is_empty()) && strays.is_empty() {
            return Ok(());
        }
        let vms: Vec<_> = vms.iter().map(|vm| (&vm.id, vm.state(), &vm.node_id, &vm.reason)).collect();
        Err(format!("VMs {vms:?}\ndirectories {held:?}\nprocesses {strays:?}"))
    })
    .await
}

/// Everything about the jobs, for the judge.
async fn collect(fleet: &Fleet, load: &Load, seen: &BTreeMap<usize, Seen>) -> Vec<Job> {
    let mut recorded = evidence::recorded(fleet.registry()).await.unwrap();
    let mut effects = effects(&fleet.effects).unwrap();
    let scheduler = fleet.schedulers(*SCHEDULERS.start());
    let mut jobs = Vec::new();
    for (place, plan) in load.plans().iter().enumerate() {
        let Some(seen) = seen.get(&place).filter(|seen| seen.acknowledged) else { continue };
        let recorded = recorded.remove(&plan.id);
        let last = recorded.as_ref().map_or(0, |recorded| recorded.attempt);
        let log = match &recorded {
            Some(recorded) if recorded.state == JobState::Succeeded => {
                evidence::log(scheduler.clone(), &plan.id, last).await
            }
            _ => Err("not read".to_owned()),
        };
        let followed = seen.followed.as_ref().filter(|followed| followed.attempt == last);
        jobs.push(Job {
            id: plan.id.clone(),
            output: plan.output(),
            cancelled: plan.cancel_after_ms.is_some(),
            max_attempts: MAX_ATTEMPTS,
            recorded,
            effects: effects.remove(&plan.id).unwrap_or_default(),
            log,
            followed: followed.map(|followed| followed.bytes.clone()),
        });
    }
    assert!(recorded.is_empty(), "jobs that nobody submitted: {:?}", recorded.keys());
    jobs
}

fn judge(jobs: &[Job]) -> Result<(), String> {
    let mut states: BTreeMap<String, usize> = BTreeMap::new();
    let (mut attempts, mut most, mut again, mut followed) = (0, 0, 0, 0);
    for job in jobs {
        let Some(recorded) = &job.recorded else { continue };
        *states.entry(format!("{:?}", recorded.state)).or_default() += 1;
        attempts += recorded.attempts.len();
        most = most.max(recorded.attempt);
        again += usize::from(recorded.attempts.len() > 1);
        followed += usize::from(job.followed.is_some());
    }
    let bytes: usize = jobs.iter().filter_map(|job| job.log.as_ref().ok()).map(Vec::len).sum();
    say(&format!(
        "{} jobs {states:?}, {attempts} attempts, {again} jobs with more than one, at most {most}; {bytes} bytes of logs, \
         {followed} followed",
        jobs.len()
    ));
    let mut wrong = Vec::new();
    for job in jobs {
        for violation in check(job) {
            wrong.push(format!("job {}: {violation}\n    {:?}\n    {:?}", job.id, job.recorded, job.effects));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    wrong.sort_by_key(String::len);
    Err(format!("{} violations\n{}", wrong.len(), wrong[..wrong.len().min(15)].join("\n")))
}

fn show_logs(fleet: &Fleet) {
    for id in 1..=*NODES.end() {
        let log = fleet.log(id);
        let lines: Vec<_> = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
        say(&format!("warnings of {}\n{}", name(id), lines[lines.len().saturating_sub(15)..].join("\n")));
    }
}

async fn trial(fleet: Arc<Fleet>, seed: u64, time: Duration, jobs: u64) -> Result<(), String> {
    wait_until("well", WELL_WITHIN, async || all_well(&fleet).await).await?;
    say("all serve");
    let mut rng = Rng::new(seed, 1);
    let plans =
        (0..jobs).map(|place| if place < LONG_JOBS { Plan::choose_long(&mut rng) } else { Plan::choose(&mut rng) });
    let plans = plans.collect();
    let load = Arc::new(Load::new(plans, fleet.effects.clone(), time));
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let (load, scheduler) = (load.clone(), fleet.schedulers(caller));
        callers.spawn(async move { load.call(scheduler).await });
    }
    Nemesis::new(fleet.clone(), Rng::new(seed, 0)).work(time).await;
    say(&format!("{} of {jobs} jobs have ended; from now on nothing is wrong", load.ended()));

    let total = usize::try_from(jobs).unwrap();
    let ended = wait_until("ended", END_WITHIN, async || match load.ended() {
        ended if ended == total => Ok(()),
        ended => Err(format!("{ended} of {total} jobs")),
    })
    .await;
    load.end();
    let seen: BTreeMap<_, _> = callers.join_all().await.into_iter().flatten().collect();
    for (why, times) in load.unanswered() {
        say(&format!("unanswered {times:>5} × {why}"));
    }
    let well = wait_until("well", WELL_WITHIN, async || all_well(&fleet).await).await;
    let judged = judge(&collect(&fleet, &load, &seen).await);
    let gone = no_leftovers(&fleet).await;
    let wrong: Vec<_> = [ended, well, judged, gone].into_iter().filter_map(Result::err).collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

#[test]
fn whatever_happens_every_job_ends_and_no_two_attempts_of_one_live_at_once() {
    let (seed, time) = (seed(), time(Duration::from_secs(70)));
    let jobs = setting("BLIXARD_CHAOS_JOBS").unwrap_or(300);
    let fleet = Arc::new(Fleet::start());
    let outcome = run_in(&fleet.network, || trial(fleet.clone(), seed, time, jobs));
    if let Err(wrong) = outcome {
        show_logs(&fleet);
        panic!("{wrong}");
    }
}
