//! What a job is given besides its spec: standard input, files and secrets.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;

use super::spec::{check_env, check_path};
use crate::{
    error::{Error, invalid},
    limits,
    pb::{common::v1 as pb, guest::v1 as guest},
};

/// Checked. Secrets are in clear here; they are sealed before they are stored, and never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct JobInput {
    /// What its command reads on standard input.
    pub stdin: Bytes,
    /// Files that are put into the guest.
    pub files: Vec<InputFile>,
    /// Environment variables that are not to be seen.
    pub secrets: BTreeMap<String, String>,
}

/// A file to be put into a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// Absolute path.
    pub path: String,
    pub content: Bytes,
    /// Permission bits.
    pub mode: u32,
}

impl JobInput {
    /// Checks a request's `input`; errors name the field below `field`.
    ///
    /// # Errors
    /// INVALID_FIELD.
    pub fn parse(field: &str, input: pb::JobInput) -> Result<Self, Error> {
        let at = |name: &str| format!("{field}.{name}");
        if !input.sealed_secrets.is_empty() {
            return Err(invalid(&at("sealed_secrets"), input.sealed_secrets.len(), "none: give `secrets`"));
        }
        if input.files.len() > limits::MAX_FILES {
            return Err(invalid(&at("files"), input.files.len(), &format!("at most {} files", limits::MAX_FILES)));
        }
        check_env(&at("secrets"), &input.secrets)?;
        if input.secrets.len() > limits::MAX_SECRETS {
            let allowed = format!("at most {} secrets", limits::MAX_SECRETS);
            return Err(invalid(&at("secrets"), input.secrets.len(), &allowed));
        }
        // The value of a secret is in no message.
        let fits = |value: &str| (limits::MIN_SECRET_BYTES..=limits::MAX_SECRET_BYTES).contains(&value.len());
        if let Some((name, value)) = input.secrets.iter().find(|(_, value)| !fits(value)) {
            let allowed = format!("values of {} to {} bytes", limits::MIN_SECRET_BYTES, limits::MAX_SECRET_BYTES);
            return Err(invalid(&at("secrets"), format!("{name} of {} bytes", value.len()), &allowed));
        }
        let mut files = Vec::with_capacity(input.files.len());
        for (index, file) in input.files.into_iter().enumerate() {
            let at = |name: &str| format!("{field}.files[{index}].{name}");
            check_path(&at("path"), &file.path)?;
            if file.mode > 0o7777 {
                return Err(invalid(&at("mode"), format!("{:#o}", file.mode), "at most 0o7777"));
            }
            let mode = if file.mode == 0 { 0o644 } else { file.mode };
            files.push(InputFile { path: file.path, content: file.content, mode });
        }
        let parsed = Self { stdin: input.stdin, files, secrets: input.secrets };
        let bytes = parsed.bytes();
        if bytes > limits::MAX_INPUT_BYTES {
            return Err(invalid(field, bytes, &format!("at most {} bytes in all", limits::MAX_INPUT_BYTES)));
        }
        Ok(parsed)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stdin.is_empty() && self.files.is_empty() && self.secrets.is_empty()
    }

    fn bytes(&self) -> usize {
        let files = self.files.iter().map(|file| file.path.len() + file.content.len());
        let secrets = self.secrets.iter().map(|(name, value)| name.len() + value.len());
        self.stdin.len() + files.chain(secrets).sum::<usize>()
    }
}

impl From<InputFile> for pb::InputFile {
    fn from(file: InputFile) -> Self {
        Self { path: file.path, content: file.content, mode: file.mode }
    }
}

/// Without the secrets, and without what files and standard input may hide.
impl fmt::Debug for JobInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show("JobInput", f, &self.stdin, self.files.iter().map(|file| &file.path), self.secrets.keys())
    }
}

/// As it is on the wire; likewise.
impl fmt::Debug for pb::JobInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets = self.secrets.keys().chain(self.sealed_secrets.keys());
        show("JobInput", f, &self.stdin, self.files.iter().map(|file| &file.path), secrets)
    }
}

/// As a guest is given it; likewise.
impl fmt::Debug for guest::GuestInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show("GuestInput", f, &self.stdin, self.files.iter().map(|file| &file.path), self.secrets.keys())
    }
}

fn show<'a>(
    name: &str,
    f: &mut fmt::Formatter<'_>,
    stdin: &[u8],
    files: impl Iterator<Item = &'a String>,
    secrets: impl Iterator<Item = &'a String>,
) -> fmt::Result {
    f.debug_struct(name)
        .field("stdin_bytes", &stdin.len())
        .field("files", &files.collect::<Vec<_>>())
        .field("secrets", &secrets.collect::<Vec<_>>())
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_field_is_refused_by_name_and_no_secret_is_told() {
        let file = |path: &str, mode| pb::InputFile { path: path.into(), mode, content: vec![1].into() };
        let with = |change: &dyn Fn(&mut pb::JobInput)| {
            let mut input = pb::JobInput::default();
            change(&mut input);
            input
        };
        let cases = [
            ("input.files[0].path", with(&|i| i.files.push(file("tmp", 0)))),
            ("input.files[0].mode", with(&|i| i.files.push(file("/tmp/x", 0o10000)))),
            ("input.files", with(&|i| i.files = vec![file("/x", 0); limits::MAX_FILES + 1])),
            ("input.secrets", with(&|i| drop(i.secrets.insert("A".into(), "xyz".into())))),
            ("input.secrets", with(&|i| drop(i.secrets.insert("A=B".into(), "xyzxyz".into())))),
            ("input.sealed_secrets", with(&|i| drop(i.sealed_secrets.insert("A".into(), vec![1].into())))),
            ("input", with(&|i| i.stdin = vec![0; limits::MAX_INPUT_BYTES + 1].into())),
        ];
        for (field, input) in cases {
            let error = JobInput::parse("input", input).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(field), "{error}");
            assert!(!error.to_string().contains("xyz"), "{error}");
        }
        let secrets = BTreeMap::from([("TOKEN".to_owned(), "hunter2".to_owned())]);
        let on_the_wire = pb::JobInput { secrets: secrets.clone(), ..Default::default() };
        let given =
            guest::RunStart { input: Some(guest::GuestInput { secrets, ..Default::default() }), ..Default::default() };
        let shown = format!("{on_the_wire:?} {given:?} {:?}", JobInput::parse("input", on_the_wire.clone()));
        assert!(shown.contains("TOKEN") && !shown.contains("hunter2"), "{shown}");
    }
}
