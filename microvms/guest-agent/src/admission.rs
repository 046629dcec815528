//! Which attempt may start, which is attached to and which is refused. Pure: the guest's state in, a decision out.

use std::collections::VecDeque;

use blixard::{
    error::{Error, Reason},
    id::JobId,
};

/// How many jobs the guest remembers after they have ended. A late duplicate of an older start would run it again, but
/// the host sends at most one attempt at a time and gives up on it long before this many others have run.
const REMEMBERED_JOBS: usize = 1024;

/// A job's try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttemptId {
    /// The job.
    pub(crate) job_id: JobId,
    /// The try's number, from 1.
    pub(crate) number: u32,
}

/// The attempt that the guest holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    /// Which.
    pub(crate) id: AttemptId,
    /// Whether it has not ended yet.
    pub(crate) live: bool,
}

/// What to do with a request for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is the one held: attach to it.
    Attach,
    /// It is new and nothing else is live: start it.
    Start,
    /// Neither.
    Deny(DeniedReason),
}

/// Why an attempt is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeniedReason {
    /// A higher attempt of the job was seen, or this one was and is gone.
    Stale { wanted: AttemptId, current: u32 },
    /// Another attempt is live.
    Busy { live: AttemptId },
    /// It is not held, and the caller wants no new one.
    Unknown { wanted: AttemptId },
}

/// The highest attempt seen of each of the last jobs, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Seen(VecDeque<AttemptId>);

impl Seen {
    /// The highest attempt seen of a job; 0 for none.
    #[must_use]
    pub(crate) fn highest(&self, job_id: JobId) -> u32 {
        self.0.iter().filter(|seen| seen.job_id == job_id).map(|seen| seen.number).max().unwrap_or(0)
    }

    /// Remembers an attempt that starts.
    pub(crate) fn insert(&mut self, id: AttemptId) {
        self.0.retain(|seen| seen.job_id != id.job_id);
        if self.0.len() == REMEMBERED_JOBS {
            self.0.pop_front();
        }
        self.0.push_back(id);
    }
}

/// Decides about `wanted`.
#[must_use]
pub(crate) fn decide(held: Option<Held>, seen: &Seen, wanted: AttemptId, attach_only: bool) -> Decision {
    if held.is_some_and(|held| held.id == wanted) {
        return Decision::Attach;
    }
    let current = seen.highest(wanted.job_id);
    if wanted.number <= current {
        return Decision::Deny(DeniedReason::Stale { wanted, current });
    }
    if attach_only {
        return Decision::Deny(DeniedReason::Unknown { wanted });
    }
    match held {
        Some(Held { id, live: true }) => Decision::Deny(DeniedReason::Busy { live: id }),
        Some(Held { live: false, .. }) | None => Decision::Start,
    }
}

impl From<DeniedReason> for Error {
    fn from(denied: DeniedReason) -> Self {
        match denied {
            DeniedReason::Stale { wanted, current } => {
                let message = if wanted.number < current {
                    format!("attempt {} of job {} is over: attempt {current} was seen", wanted.number, wanted.job_id)
                } else {
                    format!("attempt {current} of job {} is over and its output is gone", wanted.job_id)
                };
                Error::new(Reason::StaleAttempt, message)
                    .with("job_id", wanted.job_id)
                    .with("attempt", wanted.number)
                    .with("current", current)
            }
            DeniedReason::Busy { live } => Error::new(
                Reason::GuestRefused,
                format!("attempt {} of job {} is still running in this guest", live.number, live.job_id),
            )
            .with("job_id", live.job_id)
            .with("attempt", live.number),
            DeniedReason::Unknown { wanted } => Error::new(
                Reason::JobNotFound,
                format!("this guest holds no attempt {} of job {}", wanted.number, wanted.job_id),
            )
            .with("job_id", wanted.job_id)
            .with("attempt", wanted.number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(job: u128, number: u32) -> AttemptId {
        AttemptId { job_id: JobId(uuid::Uuid::from_u128(job)), number }
    }

    #[test]
    fn the_table_of_decisions() {
        use Decision::{Attach, Deny, Start};
        let mut seen = Seen::default();
        seen.insert(id(1, 2));
        seen.insert(id(2, 5));
        let live = Some(Held { id: id(2, 5), live: true });
        let ended = Some(Held { id: id(2, 5), live: false });
        let stale = |job, number, current| Deny(DeniedReason::Stale { wanted: id(job, number), current });
        let busy = Deny(DeniedReason::Busy { live: id(2, 5) });
        let unknown = |job, number| Deny(DeniedReason::Unknown { wanted: id(job, number) });
        for (held, wanted, attach_only, expected) in [
            (None, id(3, 1), false, Start),
            (None, id(3, 1), true, unknown(3, 1)),
            (live, id(3, 1), false, busy),
            (ended, id(3, 1), false, Start),
            (live, id(2, 5), false, Attach),
            (live, id(2, 5), true, Attach),
            (ended, id(2, 5), false, Attach),
            (ended, id(2, 5), true, Attach),
            (live, id(2, 4), false, stale(2, 4, 5)),
            (ended, id(2, 4), true, stale(2, 4, 5)),
            (live, id(2, 6), false, busy),
            (live, id(2, 6), true, unknown(2, 6)),
            (ended, id(2, 6), false, Start),
            (ended, id(1, 2), false, stale(1, 2, 2)),
            (ended, id(1, 2), true, stale(1, 2, 2)),
            (ended, id(1, 3), false, Start),
        ] {
            assert_eq!(decide(held, &seen, wanted, attach_only), expected, "{held:?} {wanted:?} {attach_only}");
        }
    }

    #[test]
    fn memory_of_jobs_is_bounded_and_forgets_the_oldest() {
        let mut seen = Seen::default();
        for job in 0..REMEMBERED_JOBS as u128 + 1 {
            seen.insert(id(job, 1));
        }
        assert_eq!(seen.0.len(), REMEMBERED_JOBS);
        assert_eq!((seen.highest(id(0, 1).job_id), seen.highest(id(1, 1).job_id)), (0, 1));
    }
}
