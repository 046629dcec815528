//! The simulation has teeth: whichever protection is taken away, it notices. With all of them the same seed passes.

use blixard_simulation::{Protection, Settings, run};

/// So many seeds must suffice.
const SEEDS: u64 = 30;
const STEPS: u64 = 20_000;

/// The first seed that fails, and why; from one on that has been seen to.
fn bites(without: Protection, first: u64) -> Option<(u64, String)> {
    (first..first + SEEDS).find_map(|seed| {
        let outcome = run(Settings { without: Some(without), ..Settings::new(seed, STEPS) });
        outcome.broken.map(|broken| (seed, broken))
    })
}

/// Takes a protection away, then gives it back.
fn is_needed(protection: Protection, first: u64) {
    let (seed, broken) = bites(protection, first).unwrap_or_else(|| panic!("nobody misses the {protection}"));
    println!("without the {protection}, seed {seed}: {broken}");
    let whole = run(Settings::new(seed, STEPS));
    assert!(whole.broken.is_none(), "{}", whole.report());
}

#[test]
fn without_the_epoch_a_leader_that_was_replaced_goes_on() {
    is_needed(Protection::Epoch, 1);
}

#[test]
fn without_the_node_lease_a_node_that_is_cut_off_runs_what_others_run_again() {
    is_needed(Protection::NodeLease, 4);
}

#[test]
fn without_idempotency_a_request_that_is_repeated_takes_effect_twice() {
    is_needed(Protection::Idempotency, 1);
}

#[test]
fn without_the_fence_an_order_that_comes_twice_runs_twice() {
    is_needed(Protection::Fence, 1);
}

#[test]
fn without_the_attempts_number_a_late_report_counts() {
    is_needed(Protection::AttemptGuard, 10);
}

#[test]
fn without_the_grace_a_lost_node_still_runs_what_is_given_to_another() {
    is_needed(Protection::Grace, 10);
}
