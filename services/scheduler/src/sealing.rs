//! What is stored of a job's input: files as they are, secrets sealed.

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::JobInput,
    pb::common::v1 as pb,
};
use blixard_chassis::secrets::SecretKey;
use bytes::Bytes;
use prost::Message as _;

/// The input as it is stored, and its digest; `None` for an empty one.
pub(crate) fn store(
    job_id: JobId,
    input: JobInput,
    key: Option<&SecretKey>,
) -> Result<Option<(pb::JobInput, Bytes)>, Error> {
    if input.is_empty() {
        return Ok(None);
    }
    let sealed_secrets = match (input.secrets.is_empty(), key) {
        (true, _) => Default::default(),
        (false, Some(key)) => {
            let seal = |(name, value): (String, String)| {
                let sealed = key.seal(job_id, &name, &value).into();
                (name, sealed)
            };
            input.secrets.into_iter().map(seal).collect()
        }
        (false, None) => {
            let message = "this control plane has no key to seal secrets with: see storage.secret_key_file";
            return Err(Error::new(Reason::SecretsUnavailable, message));
        }
    };
    let stored = pb::JobInput {
        stdin: input.stdin,
        files: input.files.into_iter().map(Into::into).collect(),
        secrets: Default::default(),
        sealed_secrets,
    };
    // Canonical: prost writes fields in the order of their numbers, and our maps are sorted.
    let digest = ring::digest::digest(&ring::digest::SHA256, &stored.encode_to_vec());
    Ok(Some((stored, Bytes::copy_from_slice(digest.as_ref()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_stored_of_an_empty_input() {
        assert!(store(JobId::random(), JobInput::default(), None).expect("stored").is_none());
    }
}
