//! Points in time as the database holds them: RFC 3339 in UTC with milliseconds, so that they sort as text.

use blixard::time::Timestamp;

/// The database's text for a time.
pub(crate) fn to_text(time: Timestamp) -> String {
    // Times beyond jiff's range (the year 9999) can only come from a caller's broken clock.
    let time = jiff::Timestamp::from_millisecond(time.0).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// The inverse of [`to_text`].
pub(crate) fn from_text(text: &str) -> Option<Timestamp> {
    text.parse::<jiff::Timestamp>().ok().map(|time| Timestamp(time.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_database_and_sort_as_text() {
        for ms in [0, 1, 999, 1_000, 1_764_000_000_123] {
            assert_eq!(from_text(&to_text(Timestamp(ms))), Some(Timestamp(ms)));
        }
        assert_eq!(to_text(Timestamp(1_500)), "1970-01-01T00:00:01.500Z");
        assert!(to_text(Timestamp(999)) < to_text(Timestamp(1_000)));
        assert_eq!(from_text("yesterday"), None);
    }
}
