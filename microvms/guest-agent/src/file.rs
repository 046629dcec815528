//! The bytes of a file in the guest, for the host.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
};

use blixard::{
    error::{Error, Reason, invalid},
    limits,
    pb::guest::v1 as pb,
};
use futures::{Stream, stream};
use rustix::fs::OFlags;
use tonic::Status;

/// Opens a file and reads it from an offset on, to the length that it had when it was opened.
///
/// # Errors
/// There is no such file (ARTIFACT_NOT_FOUND), it is not a regular one or can't be read (GUEST_REFUSED), or is shorter.
pub(crate) fn read(
    path: &str,
    offset: u64,
) -> Result<impl Stream<Item = Result<pb::GetFileResponse, Status>> + Send + use<>, Error> {
    if !path.starts_with('/') {
        return Err(invalid("path", path, "an absolute path"));
    }
    let (mut file, size) = open(path)?;
    if offset > size {
        let message = format!("offset {offset} lies beyond the end of {path} ({size})");
        return Err(Error::new(Reason::OffsetBeyondEnd, message).with("offset", offset).with("end_offset", size));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|error| unreadable(path, &error.to_string()))?;
    // A thousand parts of a large file are read one by one, as fast as the host takes them.
    let parts = Parts { file, left: size - offset, size: Some(size), path: path.to_owned() };
    Ok(stream::unfold(parts, |mut parts| async move { parts.next().transpose().map(|part| (part, parts)) }))
}

fn open(path: &str) -> Result<(File, u64), Error> {
    // Nobody may be at the other end of a named pipe: opening must not wait.
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file =
        OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Error::new(Reason::ArtifactNotFound, format!("{path}: no such file")).with("path", path)
            }
            _ => unreadable(path, &error.to_string()),
        })?;
    let metadata = file.metadata().map_err(|error| unreadable(path, &error.to_string()))?;
    if metadata.is_file() { Ok((file, metadata.len())) } else { Err(unreadable(path, "not a regular file")) }
}

fn unreadable(path: &str, why: &str) -> Error {
    Error::new(Reason::GuestRefused, format!("{path}: {why}")).with("path", path)
}

struct Parts {
    file: File,
    left: u64,
    /// Told in the first part, which comes also when there are no bytes.
    size: Option<u64>,
    path: String,
}

impl Parts {
    fn next(&mut self) -> Result<Option<pb::GetFileResponse>, Status> {
        if self.left == 0 && self.size.is_none() {
            return Ok(None);
        }
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(limits::MAX_LOG_CHUNK);
        let mut data = vec![0; wanted];
        if let Err(error) = self.file.read_exact(&mut data) {
            // The error ends the stream.
            (self.left, self.size) = (0, None);
            let why =
                if error.kind() == io::ErrorKind::UnexpectedEof { "it became shorter" } else { "it can't be read" };
            return Err(unreadable(&self.path, why).into());
        }
        self.left -= wanted as u64;
        Ok(Some(pb::GetFileResponse { size_bytes: self.size.take().unwrap_or(0), data: data.into() }))
    }
}
