//! Whether a VM's guest agent is to be trusted with an attempt: a circuit breaker. Pure.
//!
//! ```text
//!            3 failures in a row                 the next check is a probe (half open)
//!   Closed ───────────────────────► Open ──────────────────────────────────────────────► Closed when it succeeds
//!                                     ▲                    │
//!                                     └── it fails ────────┴──── the third failed probe ─► given up
//! ```

/// Failures in a row that open it: a busy host makes one or two.
const FAILURES_TO_OPEN: u8 = 3;
/// Failed probes in a row after which the VM is given up.
const PROBES_TO_GIVE_UP: u8 = 3;

/// One VM's breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breaker {
    /// The VM takes attempts; so many checks in a row have failed.
    Closed { failures: u8 },
    /// It takes none; so many probes have failed. While a probe is under way the breaker is half open.
    Open { probes: u8 },
}

/// What a check changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Unchanged,
    /// The VM takes no attempts from now on.
    Opened,
    /// It takes them again.
    Closed,
    /// It is beyond help.
    GivenUp,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

impl Breaker {
    /// Whether the VM may be given an attempt.
    pub(crate) fn admits(self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// Takes the result of a check.
    pub(crate) fn checked(&mut self, sound: bool) -> Verdict {
        let (next, verdict) = match (*self, sound) {
            (Self::Closed { .. }, true) => (Self::default(), Verdict::Unchanged),
            (Self::Open { .. }, true) => (Self::default(), Verdict::Closed),
            (Self::Closed { failures }, false) if failures + 1 < FAILURES_TO_OPEN => {
                (Self::Closed { failures: failures + 1 }, Verdict::Unchanged)
            }
            (Self::Closed { .. }, false) => (Self::Open { probes: 0 }, Verdict::Opened),
            (Self::Open { probes }, false) if probes + 1 < PROBES_TO_GIVE_UP => {
                (Self::Open { probes: probes + 1 }, Verdict::Unchanged)
            }
            (Self::Open { .. }, false) => (Self::Open { probes: PROBES_TO_GIVE_UP }, Verdict::GivenUp),
        };
        *self = next;
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(checks: &str) -> (Breaker, Vec<Verdict>) {
        let mut breaker = Breaker::default();
        let verdicts = checks.chars().map(|check| breaker.checked(check == '+')).collect();
        (breaker, verdicts)
    }

    #[test]
    fn three_failures_open_it_and_one_success_closes_it() {
        use Verdict::{Closed, GivenUp, Opened, Unchanged};
        for (checks, last, admits) in [
            ("+", Unchanged, true),
            ("--", Unchanged, true),
            ("---", Opened, false),
            ("--+--", Unchanged, true),
            ("----", Unchanged, false),
            ("---+", Closed, true),
            ("---+--", Unchanged, true),
            ("---+---", Opened, false),
            ("-----", Unchanged, false),
            ("-----+", Closed, true),
            ("------", GivenUp, false),
        ] {
            let (breaker, verdicts) = after(checks);
            assert_eq!((verdicts.last().copied(), breaker.admits()), (Some(last), admits), "{checks}");
            let given_up = verdicts.iter().filter(|verdict| **verdict == GivenUp).count();
            assert_eq!(given_up, usize::from(last == GivenUp), "{checks}");
        }
    }
}
