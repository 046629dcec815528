//! A node's trial: VMs begin and end by the hundred while their vmhost is killed at random moments, and in the end nothing of any is left.
//!
//! ```text
//!   callers ── orders, as a scheduler gives them ──► vmhost ◄── nemesis: kill -9, and started again
//!      └────────────────► registry ◄── reports ─────────┘           (each a process in a network namespace of its own)
//!   in the end: CheckInvariants ─ and the kernel's word: processes, interfaces, rules, cgroups, the state directory
//! ```
//! Beside what steers every trial (see the kit): `BLIXARD_CHAOS_CYCLES` for plain processes and `BLIXARD_CHAOS_GUESTS` for guests under QEMU.
//! `make chaos-node SEED=7 CYCLES=1000 GUESTS=20`. Where QEMU can't boot a guest that part says SKIPPED, and fails instead with
//! `BLIXARD_REQUIRE_QEMU=1`.
#![expect(clippy::unwrap_used, reason = "tests")]

mod bed;
mod leftovers;
mod life;

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blixard::config::DriverChoice;
use blixard_chaos_kit::{Rng, run_in, say, seed, setting};
use blixard_vmhost::hypervisor::{HypervisorSettings, choose};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    bed::{Bed, VMHOST, image_dir},
    life::{Ended, Plan, Times},
};

/// Both trials want the whole machine.
static TURN: Mutex<()> = Mutex::new(());

/// What is tried.
struct Trial {
    driver: DriverChoice,
    cycles: u64,
    /// VMs at once.
    callers: u64,
    times: Times,
    /// Between two kills, in milliseconds.
    pauses: Range<u64>,
    /// How long all cycles may take.
    within: Duration,
}

/// Kills vmhost again and again, as the seed says, until all is over; then it runs. Returns how often.
async fn nemesis(bed: Arc<Bed>, mut rng: Rng, pauses: Range<u64>, over: CancellationToken) -> usize {
    let mut kills = 0;
    loop {
        // The moments are what is tried: nothing is waited for. Some fall into the recovery from the one before.
        let pause = if rng.percent(15) { rng.within(0..400) } else { rng.within(pauses.clone()) };
        let down = if rng.percent(20) { rng.within(0..1500) } else { 0 };
        tokio::select! {
            () = over.cancelled() => return kills,
            () = tokio::time::sleep(Duration::from_millis(pause)) => {}
        }
        let killed = Arc::clone(&bed);
        tokio::task::spawn_blocking(move || killed.processes().kill(VMHOST)).await.unwrap();
        kills += 1;
        tokio::time::sleep(Duration::from_millis(down)).await;
        bed.processes().start_again(VMHOST);
    }
}

/// Callers that take one plan after the other. Returns what became of each.
async fn cycles(bed: &Arc<Bed>, trial: &Trial, seed: u64) -> Result<Vec<Ended>, String> {
    let mut rng = Rng::new(seed, 1);
    let plans: Arc<Vec<Plan>> =
        Arc::new((0..trial.cycles).map(|_| Plan::choose(&mut rng, bed.has_network(), &trial.times)).collect());
    let next = Arc::new(AtomicUsize::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..trial.callers {
        let (bed, plans, next) = (Arc::clone(bed), Arc::clone(&plans), Arc::clone(&next));
        callers.spawn(async move {
            let mut ended = Vec::new();
            while let Some(plan) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
                ended.push(plan.live(&bed).await?);
            }
            Ok::<_, String>(ended)
        });
    }
    let mut all = Vec::new();
    let until = tokio::time::Instant::now() + trial.within;
    loop {
        match tokio::time::timeout_at(until, callers.join_next()).await {
            Ok(Some(ended)) => all.extend(ended.map_err(|error| error.to_string())??),
            Ok(None) => return Ok(all),
            Err(_) => return Err(format!("not all cycles ended within {:?}", trial.within)),
        }
    }
}

async fn run(bed: &Arc<Bed>, trial: &Trial, seed: u64) -> Result<(), String> {
    bed.wait_registered().await?;
    let began = Instant::now();
    let over = CancellationToken::new();
    let living = async {
        let ended = cycles(bed, trial, seed).await;
        over.cancel();
        ended
    };
    let nemesis = nemesis(bed.clone(), Rng::new(seed, 0), trial.pauses.clone(), over.clone());
    let (ended, kills) = tokio::select! {
        both = async { tokio::join!(living, nemesis) } => both,
        never = bed.watch_incarnation() => match never {},
    };
    let took = began.elapsed();
    let ended = ended?;
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    for one in &ended {
        *counts.entry(one.state.as_str()).or_default() += 1;
    }
    let jobs = ended.iter().filter(|one| one.ran).count();
    say(&format!("{} cycles in {took:.1?}, {kills} kills of vmhost, {jobs} jobs began; VMs {counts:?}", ended.len()));
    let mut failures: BTreeMap<&str, usize> = BTreeMap::new();
    ended.iter().filter_map(|one| one.failure.as_deref()).for_each(|why| *failures.entry(why).or_default() += 1);
    failures.iter().for_each(|(why, times)| say(&format!("Failed {times:>4} × {why}")));
    let vms: Vec<String> = ended.into_iter().map(|one| one.vm_id).collect();
    leftovers::none(bed, &vms).await
}

/// One trial, and then the node's network is switched off: not even a bridge is left.
fn trial(trial: Trial) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = seed();
    let bed = Arc::new(Bed::start(trial.driver));
    let outcome = run_in(bed.network(), || async {
        run(&bed, &trial, seed).await?;
        bed.switch_network_off();
        bed.wait_registered().await?;
        leftovers::no_network(&bed)
    });
    if let Err(wrong) = outcome {
        bed.show_log();
        panic!("BLIXARD_CHAOS_SEED={seed}: {wrong}");
    }
}

#[test]
fn whenever_vmhost_is_killed_nothing_is_left_of_plain_processes() {
    trial(Trial {
        driver: DriverChoice::Process,
        cycles: setting("BLIXARD_CHAOS_CYCLES").unwrap_or(1000),
        callers: 12,
        times: Times { moment_ms: 0..400, job_ms: 0..150 },
        pauses: 100..1500,
        within: Duration::from_secs(1200),
    });
}

#[test]
fn whenever_vmhost_is_killed_nothing_is_left_of_guests_under_qemu() {
    let settings = HypervisorSettings { image_dir: image_dir(), agent_command: Vec::new(), vm_uids: None };
    let missing = match choose(DriverChoice::Qemu, &settings) {
        Ok((driver, _)) if driver.images().iter().any(|image| image == "default") => None,
        Ok((_, why)) => Some(why),
        Err(error) => Some(error.to_string()),
    };
    if let Some(missing) = missing {
        let required = std::env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
        assert!(!required, "BLIXARD_REQUIRE_QEMU=1, but {missing}");
        return say(&format!("SKIPPED: no guest is booted under QEMU: {missing}"));
    }
    trial(Trial {
        driver: DriverChoice::Qemu,
        cycles: setting("BLIXARD_CHAOS_GUESTS").unwrap_or(20),
        callers: 4,
        times: Times { moment_ms: 0..12_000, job_ms: 0..2000 },
        pauses: 4000..16_000,
        within: Duration::from_secs(1200),
    });
}
