//! What trials by fault share: a network of one's own, processes that are killed and started again, and a seed that decides
//! what is tried. It must not know what is tried.
//!
//! Whoever uses it is steered by the environment: `BLIXARD_CHAOS_SEED` repeats what a run tried (not when: that is the
//! machine's), `BLIXARD_CHAOS_SECONDS` makes it longer, `BLIXARD_CHAOS_KEEP` leaves what the processes wrote, and
//! `BLIXARD_CHAOS_RUST_LOG` is for what they log.
#![expect(clippy::unwrap_used, reason = "for tests")]

mod network;
mod processes;
mod rng;

use std::{future::Future, io::Write as _, time::Duration};

pub use crate::{
    network::Network,
    processes::{Processes, Program, processes_mentioning},
    rng::Rng,
};

/// Tells also those whose tests succeed.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "chaos: {text}");
}

/// A number from the environment, if it is set there.
#[must_use]
pub fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

/// The seed, which is told.
#[must_use]
pub fn seed() -> u64 {
    let seed = setting("BLIXARD_CHAOS_SEED").unwrap_or_else(|| u64::from(uuid::Uuid::new_v4().as_fields().0));
    say(&format!("BLIXARD_CHAOS_SEED={seed}"));
    seed
}

/// How long a run is.
#[must_use]
pub fn time(otherwise: Duration) -> Duration {
    setting("BLIXARD_CHAOS_SECONDS").map_or(otherwise, Duration::from_secs)
}

/// Runs in the callers' network.
pub fn run_in<T: Send, F: Future<Output = T>>(network: &Network, work: impl FnOnce() -> F + Send) -> T {
    let enter = network.entry();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().on_thread_start(enter.clone()).build().unwrap();
    let ours = move || {
        enter();
        runtime.block_on(work())
    };
    std::thread::scope(|scope| match scope.spawn(ours).join() {
        Ok(output) => output,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
