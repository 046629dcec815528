//! What the registry tells Prometheus of itself; docs/METRICS.md explains each, and a test compares it with what is served.
//!
//! Handles are registered once, at the first use, which must be after the process has its recorder; recording is an atomic
//! operation. Where no metrics are served it is none.

use std::sync::LazyLock;

use blixard::error::Error;
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

const COMMIT_MUTATIONS: &str = "blixard_registry_commit_mutations";
const COMMIT_SECONDS: &str = "blixard_registry_commit_seconds";
const QUEUED_MUTATIONS: &str = "blixard_registry_queued_mutations";
const REVISION: &str = "blixard_registry_revision";
const WATCHERS: &str = "blixard_registry_watchers";
const APPLIED_LAG: &str = "blixard_registry_applied_lag_entries";
const LEADER_CHANGES: &str = "blixard_registry_leader_changes_total";
const QUERIES_REFUSED: &str = "blixard_registry_queries_refused_total";

/// The handles.
pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

/// See [`METRICS`].
pub(crate) struct Metrics {
    /// Mutations in a commit, as its commit begins.
    pub(crate) commit_mutations: Histogram,
    /// From a commit's proposal to the end of the answers' reading.
    pub(crate) commit_seconds: Histogram,
    /// Mutations that wait for a commit.
    pub(crate) queued_mutations: Gauge,
    /// The newest revision that this replica has.
    pub(crate) revision: Gauge,
    watchers: Gauge,
    /// Raft entries that the leader has and this replica has not applied.
    pub(crate) applied_lag: Gauge,
    /// Leaders that this replica has seen come after another.
    pub(crate) leader_changes: Counter,
}

impl Metrics {
    fn register() -> Self {
        describe_histogram!(COMMIT_MUTATIONS, Unit::Count, "Mutations that shared one Raft entry.");
        describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "Time from a commit's proposal to its answers.");
        describe_gauge!(QUEUED_MUTATIONS, Unit::Count, "Mutations that wait for a commit.");
        describe_gauge!(REVISION, Unit::Count, "The newest revision on this replica.");
        describe_gauge!(WATCHERS, Unit::Count, "Open watches.");
        describe_gauge!(APPLIED_LAG, Unit::Count, "Raft entries that the leader has and this replica has not applied.");
        describe_counter!(LEADER_CHANGES, Unit::Count, "Changes of the leader that this replica has seen.");
        describe_counter!(QUERIES_REFUSED, Unit::Count, "Queries that ended with an error, by its reason.");
        Self {
            commit_mutations: histogram!(COMMIT_MUTATIONS),
            commit_seconds: histogram!(COMMIT_SECONDS),
            queued_mutations: gauge!(QUEUED_MUTATIONS),
            revision: gauge!(REVISION),
            watchers: gauge!(WATCHERS),
            applied_lag: gauge!(APPLIED_LAG),
            leader_changes: counter!(LEADER_CHANGES),
        }
    }

    /// Counts a query that ended with an error.
    pub(crate) fn query_refused(&self, error: &Error) {
        counter!(QUERIES_REFUSED, "reason" => error.reason.name()).increment(1);
    }

    /// Counts a watch as open until the guard is dropped.
    pub(crate) fn watching(&self) -> Watching {
        self.watchers.increment(1.0);
        Watching(self.watchers.clone())
    }
}

/// An open watch.
pub(crate) struct Watching(Gauge);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
