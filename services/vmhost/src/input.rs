//! What an attempt is given besides its spec: fetched from the registry, its secrets opened. Nothing of it touches the disk here.

use blixard::{
    error::{Error, Reason},
    id::JobId,
    pb::{common::v1 as common, guest::v1 as pb},
};
use blixard_chassis::SecretKey;

use crate::registry::{Registry, until_answered};

/// Where inputs come from.
#[derive(Clone)]
pub(crate) struct InputSource {
    pub(crate) registry: Registry,
    /// `None`: this node has no key.
    pub(crate) key: Option<SecretKey>,
}

/// Why there is no input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoInput {
    /// The job has ended or is forgotten: nobody wants it to run.
    Gone,
    /// It can't be used on this node, for this reason.
    Unusable(String),
}

impl InputSource {
    /// Fetches a job's input; tries until the registry answers.
    pub(crate) async fn fetch(&self, job: JobId) -> Result<pb::GuestInput, NoInput> {
        let input = until_answered("fetching a job's input", || self.registry.job_input(job)).await;
        match input {
            Ok(input) if input == common::JobInput::default() => Err(NoInput::Gone),
            Ok(input) => self.open(job, input),
            Err(Error { reason: Reason::JobNotFound, .. }) => Err(NoInput::Gone),
            Err(error) => Err(NoInput::Unusable(format!("its input can't be had: {error}"))),
        }
    }

    fn open(&self, job: JobId, input: common::JobInput) -> Result<pb::GuestInput, NoInput> {
        let common::JobInput { stdin, files, mut secrets, sealed_secrets } = input;
        if !sealed_secrets.is_empty() {
            let key = self.key.as_ref().ok_or_else(|| {
                NoInput::Unusable("its node has no key to open secrets with (storage.secret_key_file)".to_owned())
            })?;
            for (name, sealed) in sealed_secrets {
                let value = key
                    .open(job, &name, &sealed)
                    .map_err(|error| NoInput::Unusable(format!("its node can't open the secret {name}: {error}")))?;
                secrets.insert(name, value);
            }
        }
        Ok(pb::GuestInput { stdin, files, secrets })
    }
}
