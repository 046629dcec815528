//! Runs of the simulation: fresh ones, those that ever failed, and the proof that a seed is a run.

use std::time::{SystemTime, UNIX_EPOCH};

use blixard_simulation::{Settings, run};

/// How many fresh seeds, and how much happens in each: about a minute on one core, unoptimized.
const FRESH: u64 = 12;
const STEPS: u64 = 12_000;

fn live_through(settings: Settings) {
    let outcome = run(settings);
    assert!(outcome.broken.is_none(), "{}", outcome.report());
}

#[test]
fn the_same_seed_gives_the_same_trace_and_another_one_another() {
    let digest = |seed| {
        let outcome = run(Settings::new(seed, 6_000));
        (outcome.digest, outcome.lines, outcome.figures, outcome.lived)
    };
    assert_eq!(digest(1), digest(1));
    assert_ne!(digest(1), digest(2));
}

#[test]
fn fresh_seeds_live_through_their_faults() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    println!("seeds {now} to {}", now + FRESH - 1);
    (now..now + FRESH).for_each(|seed| live_through(Settings::new(seed, STEPS)));
}

/// `seeds.txt`: a seed, its steps, and behind a `#` what it once found.
#[test]
fn every_seed_that_ever_failed_does_not_any_more() {
    let seeds = include_str!("../seeds.txt").lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    for line in seeds.filter(|line| !line.is_empty()) {
        let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let [seed, steps] = numbers[..] else { panic!("{line}") };
        live_through(Settings::new(seed, steps));
    }
}
