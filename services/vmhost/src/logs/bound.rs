//! Bounds what the logs of a node take together: output and artifacts of the attempts that ended longest ago go first. How they ended stays, and
//! whoever reads them gets a gap.
//!
//! ```text
//!   00…00.seg  00…16777216.seg (its last record: the end)   ─►   00…20000000.seg (nothing but the end)
//! ```
//! The segment with the end alone is on the disk before another is deleted, so a crash in between leaves a log whose rest goes next time.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
    sync::atomic::Ordering,
    time::SystemTime,
};

use blixard::id::JobId;

use super::{
    LogStore, NodeLogs, record,
    segment::{self, Segment},
};
use crate::{absent::gone, artifacts::ArtifactDir, pressure::Disk};

/// Room is made down to so much of the bound: not again at once.
const DOWN_TO_PERCENT: u64 = 90;
/// What is left of a log when its output has gone is smaller.
const LEFT_BYTES: u64 = 4096;

/// What was dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Dropped {
    pub(crate) attempts: usize,
    pub(crate) bytes: u64,
    /// There is still more than there may be: it is of attempts that run.
    pub(crate) crowded: bool,
}

/// What there is of an attempt.
#[derive(Debug)]
struct Kept {
    last_written: SystemTime,
    job: JobId,
    attempt: u32,
    bytes: u64,
}

impl LogStore {
    /// Whether there may be more than there should, by what was written since it was last looked.
    pub(crate) fn may_be_crowded(&self) -> io::Result<bool> {
        let known = self.known_bytes.load(Ordering::Relaxed);
        Ok(known.saturating_add(self.written.load(Ordering::Relaxed)) > self.node_bytes()?)
    }

    /// How much all logs may take.
    fn node_bytes(&self) -> io::Result<u64> {
        match self.limits.node {
            NodeLogs::Bytes(bytes) => Ok(bytes),
            NodeLogs::Percent(percent) => Ok((Disk::of(&self.dir)?.total_bytes / 100).saturating_mul(percent.into())),
        }
    }

    /// Looks at everything and drops what is too much. Blocking.
    pub(crate) fn make_room(&self) -> io::Result<Dropped> {
        let bound = self.node_bytes()?;
        self.written.store(0, Ordering::Relaxed);
        let mut kept = self.kept()?;
        let mut total = kept.iter().map(|kept| kept.bytes).sum::<u64>();
        let mut dropped = Dropped::default();
        if total > bound {
            kept.sort_by_key(|kept| kept.last_written);
            for Kept { job, attempt, .. } in kept.into_iter().filter(|kept| kept.bytes > LEFT_BYTES) {
                if total <= bound / 100 * DOWN_TO_PERCENT {
                    break;
                }
                let bytes = gone(self.drop_output(job, attempt))?;
                dropped.attempts += usize::from(bytes > 0);
                dropped.bytes += bytes;
                total = total.saturating_sub(bytes);
            }
        }
        dropped.crowded = total > bound;
        self.known_bytes.store(total, Ordering::Relaxed);
        Ok(dropped)
    }

    fn kept(&self) -> io::Result<Vec<Kept>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let Some(job) = name.to_str().and_then(|name| name.parse::<JobId>().ok()) else { continue };
            for attempt in gone(numbers(&self.dir.join(name)))? {
                all.extend(gone(self.kept_of(job, attempt).map(Some))?);
            }
        }
        Ok(all)
    }

    fn kept_of(&self, job: JobId, attempt: u32) -> io::Result<Kept> {
        let dir = self.attempt_dir(job, attempt);
        let mut kept =
            Kept { last_written: SystemTime::UNIX_EPOCH, job, attempt, bytes: ArtifactDir::of(&dir).bytes()? };
        for segment in segment::list(&dir)? {
            let file = fs::metadata(&segment.path)?;
            kept.bytes += file.len();
            kept.last_written = kept.last_written.max(file.modified()?);
        }
        Ok(kept)
    }

    /// Leaves of an ended attempt only how it ended; returns how many bytes are gone, none when it has not ended.
    fn drop_output(&self, job: JobId, attempt: u32) -> io::Result<u64> {
        if self.live().contains_key(&(job, attempt)) {
            return Ok(0);
        }
        let dir = self.attempt_dir(job, attempt);
        let mut segments = segment::list(&dir)?;
        let Some(last) = segments.last().cloned() else { return Ok(0) };
        let scan = segment::scan(&File::open(&last.path)?, last.base)?;
        let Some(end) = scan.end else { return Ok(0) };
        if last.base == scan.end_offset {
            // It holds the end alone.
            segments.pop();
        } else {
            let mut buffer = Vec::new();
            let text = serde_json::to_vec(&end)?;
            record::encode(&mut buffer, record::Kind::End, scan.end_offset, end.finished_at, &text);
            write_beside(&dir, &Segment::new(&dir, scan.end_offset), &buffer)?;
        }
        let mut bytes = 0;
        for segment in segments {
            let len = fs::metadata(&segment.path)?.len();
            fs::remove_file(&segment.path)?;
            bytes += len;
        }
        Ok(bytes + ArtifactDir::of(&dir).drop_files()?)
    }
}

/// The entries of a directory that are numbers.
fn numbers(dir: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

/// On the disk, under its name, when this returns.
fn write_beside(dir: &Path, segment: &Segment, bytes: &[u8]) -> io::Result<()> {
    let beside = segment.path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&beside, &segment.path)?;
    File::open(dir)?.sync_all()
}
