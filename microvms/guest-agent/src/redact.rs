//! Takes secrets out of output, before a byte of it gets an offset.
//!
//! Every byte that belongs to an occurrence of a secret is taken out, also where occurrences overlap; each run of bytes that
//! overlapping occurrences cover becomes one `***`. What comes in pieces gives the same as the whole: of each piece only a suffix
//! that may still become a secret is held back.
//!
//! Pure: bytes in, bytes out.

use std::{collections::BTreeMap, fmt};

/// What stands for a secret.
const MASK: &[u8] = b"***";

/// What is to be taken out.
#[derive(Clone, Default)]
pub(crate) struct Secrets {
    /// Longest first.
    values: Vec<Vec<u8>>,
    /// Whether one begins with this byte.
    begins: Vec<bool>,
}

impl Secrets {
    /// The values of variables; an empty one is none.
    #[must_use]
    pub(crate) fn new<'a>(values: impl Iterator<Item = &'a str>) -> Self {
        let mut values: Vec<Vec<u8>> =
            values.filter(|value| !value.is_empty()).map(|v| v.as_bytes().to_vec()).collect();
        values.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        values.dedup();
        let mut begins = vec![false; 256];
        for first in values.iter().filter_map(|value| value.first()) {
            begins[usize::from(*first)] = true;
        }
        Self { values, begins }
    }

    /// Those of an environment.
    #[must_use]
    pub(crate) fn of(variables: &BTreeMap<String, String>) -> Self {
        Self::new(variables.values().map(String::as_str))
    }

    /// Whether there is nothing to take out.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// A whole text without them.
    #[must_use]
    pub(crate) fn redact(&self, text: &str) -> String {
        if self.is_empty() {
            return text.to_owned();
        }
        let mut redactor = Redactor::default();
        let mut clean = redactor.push(self, text.as_bytes());
        clean.extend(redactor.finish(self));
        String::from_utf8_lossy(&clean).into_owned()
    }

    /// The length of the longest one that `bytes` begin with.
    fn match_at(&self, bytes: &[u8]) -> Option<usize> {
        self.values.iter().find(|value| bytes.starts_with(value)).map(Vec::len)
    }

    /// Whether more bytes could make a (longer) one of these.
    fn may_begin(&self, bytes: &[u8]) -> bool {
        self.values.iter().take_while(|value| value.len() > bytes.len()).any(|value| value.starts_with(bytes))
    }
}

/// How many there are.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secrets", self.values.len())
    }
}

/// What one stream holds back.
#[derive(Default)]
pub(crate) struct Redactor {
    held: Vec<u8>,
    /// So many of the bytes held, from the first one on, belong to a secret whose mask has been given out.
    covered: usize,
}

impl Redactor {
    /// Takes the next bytes; returns what can be said by now.
    pub(crate) fn push(&mut self, secrets: &Secrets, bytes: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(bytes);
        self.advance(secrets, false)
    }

    /// The end of the stream: what was held back.
    pub(crate) fn finish(&mut self, secrets: &Secrets) -> Vec<u8> {
        self.advance(secrets, true)
    }

    fn advance(&mut self, secrets: &Secrets, at_end: bool) -> Vec<u8> {
        let mut clean = Vec::with_capacity(self.held.len());
        let mut at = 0;
        while at < self.held.len() {
            let rest = &self.held[at..];
            if secrets.begins.get(usize::from(rest[0])) == Some(&true) {
                if let Some(length) = secrets.match_at(rest) {
                    if self.covered == 0 {
                        clean.extend_from_slice(MASK);
                    }
                    self.covered = self.covered.max(length);
                }
                if !at_end && secrets.may_begin(rest) {
                    break;
                }
            }
            if self.covered > 0 {
                self.covered -= 1;
            } else {
                clean.push(rest[0]);
            }
            at += 1;
        }
        self.held.drain(..at);
        clean
    }
}

/// Without the bytes, which may be a part of a secret.
impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes held back", self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition: mark every byte of every occurrence in the whole text; overlapping occurrences are one run.
    fn naive(secrets: &[String], text: &[u8]) -> Vec<u8> {
        let mut found = Vec::new();
        for start in 0..text.len() {
            let longest = secrets.iter().filter(|secret| text[start..].starts_with(secret.as_bytes())).map(String::len);
            found.extend(longest.max().map(|length| (start, start + length)));
        }
        let (mut clean, mut at) = (Vec::new(), 0);
        for (start, end) in found {
            if start >= at {
                clean.extend_from_slice(&text[at..start]);
                clean.extend_from_slice(MASK);
            }
            at = at.max(end);
        }
        clean.extend_from_slice(&text[at..]);
        clean
    }

    fn redacted<'a>(secrets: &[String], pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let secrets = Secrets::new(secrets.iter().map(String::as_str));
        let mut redactor = Redactor::default();
        let mut clean: Vec<u8> = pieces.into_iter().flat_map(|piece| redactor.push(&secrets, piece)).collect();
        clean.extend(redactor.finish(&secrets));
        clean
    }

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(|&value| value.to_owned()).collect()
    }

    #[test]
    fn secrets_are_replaced_in_every_split_of_a_text() {
        for (secrets, text, expected) in [
            (&["hunter2"][..], "a hunter2 and hunter2", "a *** and ***"),
            (&["hunter2"], "hunter2hunter2", "******"),
            (&["hunter2"], "hunter hunter", "hunter hunter"),
            (&["pass", "password"], "pass password passwo", "*** *** ***wo"),
            (&["abcd", "cdef"], "abcdef abcd cdef", "*** *** ***"),
            (&["abab"], "ababab ab", "*** ab"),
            (&["x\ny"], "1x\ny2x\n", "1***2x\n"),
            (&[""], "nothing", "nothing"),
            (&[], "nothing", "nothing"),
        ] {
            let secrets = strings(secrets);
            for cut in 0..=text.len() {
                let (a, b) = text.as_bytes().split_at(cut);
                let clean = redacted(&secrets, [a, b]);
                assert_eq!(String::from_utf8_lossy(&clean), expected, "{secrets:?} in {text:?} cut at {cut}");
            }
            assert_eq!(redacted(&secrets, text.as_bytes().chunks(1)), expected.as_bytes());
        }
    }

    #[test]
    fn only_what_may_become_a_secret_is_held_back() {
        let secrets = Secrets::new(["hunter2", "no"].into_iter());
        let mut redactor = Redactor::default();
        assert_eq!(redactor.push(&secrets, b"the hunt"), b"the ");
        assert_eq!(redactor.push(&secrets, b"ing"), b"hunting");
        assert_eq!(redactor.push(&secrets, b" hunter2"), b" ***", "a whole secret waits for nothing");
        assert_eq!(redactor.push(&secrets, b"h"), b"");
        assert_eq!(redactor.finish(&secrets), b"h");
    }

    #[test]
    fn neither_secrets_nor_what_is_held_back_are_shown() {
        let secrets = Secrets::new(["hunter2"].into_iter());
        let mut redactor = Redactor::default();
        redactor.push(&secrets, b"hunter");
        let shown = format!("{secrets:?} {redactor:?}");
        assert_eq!(shown, "1 secrets 6 bytes held back");
        assert_eq!(secrets.redact("cannot run hunter2"), "cannot run ***");
    }

    proptest! {
        /// An alphabet of two letters makes prefixes, overlaps and repetitions the rule.
        #[test]
        fn pieces_give_what_the_whole_gives(
            secrets in proptest::collection::vec("[ab]{1,6}", 0..4),
            text in "[abc]{0,60}",
            cuts in proptest::collection::vec(0..60usize, 0..8),
        ) {
            let expected = naive(&secrets, text.as_bytes());
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]);
            prop_assert_eq!(redacted(&secrets, pieces), expected.clone());
            prop_assert_eq!(redacted(&secrets, text.as_bytes().chunks(1)), expected);
        }

        /// A secret that does not overlap itself: what everybody's `replace` does.
        #[test]
        fn one_secret_is_replaced_as_replace_does(text in "([a-c]|xyzw|xyz|xy){0,40}", chunk in 1..9usize) {
            let clean = redacted(&strings(&["xyzw"]), text.as_bytes().chunks(chunk));
            prop_assert_eq!(String::from_utf8(clean).expect("text"), text.replace("xyzw", "***"));
        }

        /// No secret survives.
        #[test]
        fn bytes_of_any_kind_pass_unless_they_are_secret(
            text in proptest::collection::vec(any::<u8>(), 0..200), chunk in 1..50usize,
        ) {
            let secrets = strings(&["hunter2"]);
            prop_assert_eq!(redacted(&secrets, text.chunks(chunk)), naive(&secrets, &text));
        }
    }
}
