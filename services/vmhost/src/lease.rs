//! How long this node may run attempts without an answer of the registry. Pure: the time is handed in.
//!
//! ```text
//!  heartbeat sent        answered                                                    sent + LEASE: the lease ends
//!  ──┬──────────────────────┬───────────────────────────────────────────┬───────────────────┬──────────────
//!    └ the lease counts from here, because the registry may have heard  └ guests end what they run,
//!      it right then and nothing since                                    and at the end their VMs are killed
//! ```
//! The registry makes a node Lost after 15 s of silence, and the scheduler gives its attempts to others 30 s later at the
//! earliest: 45 s after the last heartbeat that was heard. By then this node has ended them, 30 s after it was sent.
//!
//! Time is a [`Duration`] since a fixed moment, by a clock that never jumps and does not stand still while the machine sleeps.
//! Public, so that a simulation drives what a node really does.

use std::time::Duration;

/// How long a lease lasts.
pub const LEASE: Duration = Duration::from_secs(30);

/// A node's right to run attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    length: Duration,
    /// When this vmhost began; what it adopts was begun with an earlier one's lease.
    begun: Duration,
    /// When the last heartbeat (or registration) that was answered was sent.
    heard: Option<Duration>,
}

impl Lease {
    /// None yet.
    #[must_use]
    pub fn new(length: Duration, now: Duration) -> Self {
        Self { length, begun: now, heard: None }
    }

    /// What was sent at `sent` has been answered.
    pub fn answered(&mut self, sent: Duration) {
        self.heard = self.heard.max(Some(sent));
    }

    /// When attempts that have not ended are to be ended. Those of an earlier vmhost have as long from the beginning: its guests'
    /// own leases end before that.
    #[must_use]
    pub fn end(&self) -> Duration {
        self.heard.unwrap_or(self.begun).saturating_add(self.length)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self, now: Duration) -> bool {
        now >= self.end()
    }

    /// Whether attempts may begin.
    #[must_use]
    pub fn holds(&self, now: Duration) -> bool {
        self.heard.is_some() && !self.is_over(now)
    }

    /// How long a guest may go on with an attempt without another word: what is left, less a tenth of the lease, so that a guest
    /// that does as it is told keeps its VM. `None`: there is nothing to be given.
    #[must_use]
    pub fn for_guest(&self, now: Duration) -> Option<Duration> {
        let left = self.end().saturating_sub(self.length / 10).checked_sub(now)?;
        (self.heard.is_some() && !left.is_zero()).then_some(left)
    }

    /// How often guests are told: often enough that two messages may be late.
    #[must_use]
    pub fn renew_every(&self) -> Duration {
        self.length / 6
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_counts_from_the_sending_of_the_last_heartbeat_that_was_answered() {
        let mut lease = Lease::new(LEASE, at(100));
        assert!(!lease.holds(at(100)) && !lease.is_over(at(129)), "what was adopted is not ended at once");
        assert!(lease.is_over(at(130)));
        assert_eq!(lease.for_guest(at(100)), None);
        lease.answered(at(102));
        assert!(lease.holds(at(131)) && !lease.holds(at(132)) && lease.is_over(at(132)));
        assert_eq!(lease.for_guest(at(110)), Some(at(19)), "a tenth less");
        assert_eq!((lease.for_guest(at(128)), lease.for_guest(at(129))), (Some(at(1)), None));
        lease.answered(at(101));
        assert_eq!(lease.end(), at(132), "an older answer takes nothing back");
        lease.answered(at(140));
        assert!(lease.holds(at(141)), "a lease that was over can be had again");
        assert_eq!(lease.renew_every(), at(5));
    }

    proptest! {
        /// Whatever is answered when: a guest is never given more than its node has.
        #[test]
        fn no_guest_outlives_the_lease(sent in proptest::collection::vec(0..1000u64, 0..10), now in 0..1100u64) {
            let mut lease = Lease::new(LEASE, at(0));
            sent.iter().for_each(|sent| lease.answered(at(*sent)));
            if let Some(left) = lease.for_guest(at(now)) {
                prop_assert!(lease.holds(at(now)) && at(now) + left < lease.end());
            }
        }
    }
}
