//! What the image says of the jobs that run in it, where a job does not say otherwise. `mvm-ci image import` writes it
//! into the root disk, so that it can't be another image's; without a root disk there is none.

use std::{collections::BTreeMap, fs};

/// `NAME=VALUE`, each ended by NUL, as in `/proc/PID/environ`.
const ENV: &str = "/.blixard/env";
/// An absolute path, or nothing.
const WORKING_DIR: &str = "/.blixard/workdir";

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ImageDefaults {
    /// Environment variables.
    pub(crate) env: BTreeMap<String, String>,
    /// Where to run.
    pub(crate) working_dir: Option<String>,
}

impl ImageDefaults {
    /// What the root says.
    #[must_use]
    pub(crate) fn read() -> Self {
        let working_dir = fs::read_to_string(WORKING_DIR).ok().filter(|path| path.starts_with('/'));
        Self { env: parse_env(&fs::read_to_string(ENV).unwrap_or_default()), working_dir }
    }
}

fn parse_env(text: &str) -> BTreeMap<String, String> {
    let variables = text.split('\0').filter_map(|variable| variable.split_once('='));
    variables.filter(|(name, _)| !name.is_empty()).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_ended_by_nul_and_may_hold_anything_else() {
        let parsed = parse_env("PATH=/bin\0A=b=c\nd\0=x\0EMPTY=\0");
        let expected = [("A", "b=c\nd"), ("EMPTY", ""), ("PATH", "/bin")];
        assert_eq!(parsed, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }
}
