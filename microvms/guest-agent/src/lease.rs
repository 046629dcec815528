//! How long an attempt may go on without word from its host. Pure: the time is handed in.
//!
//! The host may have lost the right to run the attempt, and then somebody else runs it again. Time is the monotonic clock's: it
//! does not jump when the guest's clock is set.

use std::time::Duration;

use tokio::time::Instant;

/// The right to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lease {
    /// For ever.
    Unlimited,
    /// Until then.
    Until(Instant),
}

impl Lease {
    /// What an attempt starts with; 0 milliseconds: no limit.
    #[must_use]
    pub(crate) fn granted(now: Instant, lease_ms: u64) -> Self {
        if lease_ms == 0 { Self::Unlimited } else { Self::Unlimited.renewed(now, lease_ms) }
    }

    /// The host's latest word counts, be it less than its last: it says what is left of its own lease.
    #[must_use]
    pub(crate) fn renewed(self, now: Instant, lease_ms: u64) -> Self {
        // What lies beyond the clock's range is no limit.
        now.checked_add(Duration::from_millis(lease_ms)).map_or(Self::Unlimited, Self::Until)
    }

    /// Whether it has run out.
    #[must_use]
    pub(crate) fn is_over(self, now: Instant) -> bool {
        match self {
            Self::Unlimited => false,
            Self::Until(end) => now >= end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_unless_it_is_renewed_and_the_latest_word_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let lease = Lease::granted(start, 100);
        assert!(!lease.is_over(at(99)) && lease.is_over(at(100)));
        let renewed = lease.renewed(at(60), 100);
        assert!(!renewed.is_over(at(159)) && renewed.is_over(at(160)));
        assert!(renewed.renewed(at(60), 10).is_over(at(70)), "less than before");
        assert!(renewed.renewed(at(60), 0).is_over(at(60)));
        assert!(!Lease::granted(start, 0).is_over(at(u64::from(u32::MAX))), "0 is no limit");
        assert!(!Lease::granted(start, u64::MAX).is_over(at(u64::from(u32::MAX))));
    }
}
