//! The files that an attempt left, as they are on this node's disk.

use std::{io, sync::Arc};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    pb::{common::v1 as common, vmhost::v1 as pb},
};
use futures::{StreamExt, stream, stream::BoxStream};
use tonic::Status;

use crate::{
    artifacts::{ArtifactDir, Reader},
    blocking::blocking,
    host::Host,
};

/// What was kept of an attempt, and what was not.
pub(super) async fn list(host: &Arc<Host>, job: JobId, attempt: u32) -> Result<Vec<common::Artifact>, Error> {
    let dir = dir(host, job, attempt, "")?;
    blocking(move || dir.list()).await.map_err(unreadable)
}

/// The bytes of one file from an offset on.
pub(super) async fn open(
    host: &Arc<Host>,
    job: JobId,
    attempt: u32,
    path: String,
    offset: u64,
) -> Result<BoxStream<'static, Result<pb::GetArtifactResponse, Status>>, Error> {
    let dir = dir(host, job, attempt, &path)?;
    let wanted = path.clone();
    let (artifact, file) = match blocking(move || dir.open(&wanted)).await.map_err(unreadable)? {
        Some((artifact, Some(file))) => (artifact, file),
        Some((artifact, None)) => {
            let message = format!("attempt {attempt} of job {job} kept no {path}: {}", artifact.problem);
            return Err(not_found(message, job, attempt, &path));
        }
        None => return Err(not_found(format!("attempt {attempt} of job {job} kept no {path}"), job, attempt, &path)),
    };
    let size = artifact.size_bytes;
    if offset > size {
        let message = format!("offset {offset} lies beyond the end of {path} ({size})");
        return Err(Error::new(Reason::OffsetBeyondEnd, message).with("offset", offset).with("end_offset", size));
    }
    let reader = blocking(move || Reader::new(file, artifact, offset)).await.map_err(unreadable)?;
    Ok(stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match blocking(move || reader.next().map(|part| (part, reader))).await.map_err(unreadable) {
            Ok((part, reader)) => part.map(|part| (Ok(part), Some(reader))),
            Err(error) => Some((Err(error.into()), None)),
        }
    })
    .boxed())
}

fn dir(host: &Host, job: JobId, attempt: u32, path: &str) -> Result<ArtifactDir, Error> {
    host.logs.artifacts(job, attempt).ok_or_else(|| {
        not_found(format!("this node keeps nothing of attempt {attempt} of job {job}"), job, attempt, path)
    })
}

fn not_found(message: String, job: JobId, attempt: u32, path: &str) -> Error {
    Error::new(Reason::ArtifactNotFound, message).with("job_id", job).with("attempt", attempt).with("path", path)
}

fn unreadable(error: io::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "a kept file can't be read"))
}
