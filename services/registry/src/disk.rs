//! Room on the disk that the registry's data is on.

use std::{io, path::Path};

use blixard::error::{Error, Reason};

use crate::embedded::WAL_SIZE;

/// What the Raft log may want to grow by while nobody looks: a log that could not grow would end the core.
pub(crate) const LOG_RESERVE_BYTES: u64 = 4 * WAL_SIZE as u64;

/// A disk that has less room than is needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shortage {
    pub(crate) free: u64,
    pub(crate) needed: u64,
}

impl Shortage {
    /// The refusal, for people in these words.
    pub(crate) fn error(self, message: String) -> Error {
        Error::new(Reason::DiskFull, message).with("free_bytes", self.free).with("needed_bytes", self.needed)
    }
}

/// Whether the disk of a directory lacks the room that is needed.
pub(crate) fn shortage(dir: &Path, needed: u64) -> io::Result<Option<Shortage>> {
    let disk = rustix::fs::statvfs(dir)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    Ok((free < needed).then_some(Shortage { free, needed }))
}
