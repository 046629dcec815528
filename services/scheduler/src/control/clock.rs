//! Notices that the clock on the wall was set.
//!
//! Control is told the time by that clock, because it compares it with what others have recorded. How long a node has been Lost
//! and when something is to be tried again is measured by it too, and a clock that is set forward would cut a grace short.

use std::time::Duration;

use blixard::time::Timestamp;

/// More than reading two clocks one after the other, or a clock that is being adjusted, can make.
const TOLERANCE: Duration = Duration::from_secs(1);

/// What both clocks showed last.
#[derive(Debug, Default)]
pub struct Clock(Option<(Timestamp, Duration)>);

impl Clock {
    /// Whether the clock on the `wall` was set since the last look; `steady`: the time since a fixed moment by one that never is.
    /// A machine that slept, or a process that was stopped between its looks at the two, counts as well.
    pub fn was_set(&mut self, wall: Timestamp, steady: Duration) -> bool {
        let Some((wall_before, steady_before)) = self.0.replace((wall, steady)) else { return false };
        let passed = steady.saturating_sub(steady_before);
        let passed_ms = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        let error_ms = wall.0.saturating_sub(wall_before.0).saturating_sub(passed_ms).unsigned_abs();
        u128::from(error_ms) > TOLERANCE.as_millis()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_noticed_once_whichever_way() {
        let mut clock = Clock::default();
        let mut was_set = |wall, steady| clock.was_set(Timestamp(wall), Duration::from_millis(steady));
        assert!(!was_set(5_000_000, 0), "the first look");
        assert!(!was_set(5_600_000, 600_400), "time passes, and clocks differ a little");
        assert!(was_set(5_700_000, 601_000));
        assert!(!was_set(5_700_500, 601_500));
        assert!(was_set(5_600_000, 602_000));
    }
}
