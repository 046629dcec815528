//! The logs of attempts: append-only segments with checksums on the node's disk.
//!
//! ```text
//! LOG_DIR/<job>/<attempt>/00000000000000000000.seg     records, oldest first
//!                         00000000000016777216.seg     named by the offset of its first byte
//!                         artifacts/                   what the attempt left, see `artifacts`
//!         <job>.deleted/                               being deleted
//! ```
//! A cursor is (job, attempt, byte offset) and never shifts. The last record of an ended attempt is its [`EndRecord`], so
//! one fdatasync makes output and result durable together, and the log alone tells how the attempt ended.
//!
//! The directories are the *fence* too: the highest attempt of a job that this node has seen is the highest directory, and a
//! lower one is refused for ever. A directory that no writer holds and that has no end record belongs to an attempt that was
//! never begun: beginning an attempt is made durable elsewhere first, and recovery ends the log of each begun one.
//!
//! Nothing here knows VMs, guests or the registry.

mod bound;
mod reader;
mod record;
mod segment;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
};

use blixard::{
    config::RetentionConfig,
    id::JobId,
    job::{ExitStatus, JobState},
    time::Timestamp,
};
use tokio::sync::watch;

use crate::{absent::DELETED, artifacts::ArtifactDir};

pub(crate) use self::{
    bound::Dropped,
    reader::{Item, LogReader},
    writer::LogWriter,
};

/// Size at which a segment is closed. A reader scans one segment to find its offset: 16 MiB from the page cache take
/// about 5 ms.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// How large logs grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Size at which a segment is closed.
    pub segment_bytes: u64,
    /// How much of one attempt's log is kept: beyond it the oldest segments are dropped, so that a job that writes for ever can't fill the
    /// disk.
    pub attempt_bytes: u64,
    /// How much all logs and artifacts of the node may take.
    pub node: NodeLogs,
}

/// How much that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeLogs {
    /// Of the file system that they are on.
    Percent(u32),
    /// Just so many bytes.
    Bytes(u64),
}

impl From<&RetentionConfig> for LogLimits {
    fn from(config: &RetentionConfig) -> Self {
        Self {
            segment_bytes: SEGMENT_BYTES,
            attempt_bytes: u64::from(config.max_log_mib) * 1024 * 1024,
            node: NodeLogs::Percent(config.node_log_percent),
        }
    }
}

/// What an attempt came to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The command ended, or could not be run.
    Result {
        /// Succeeded, Failed, Cancelled or TimedOut.
        state: JobState,
        /// How it ended; `None` when nobody saw it.
        exit: Option<ExitStatus>,
        /// Why, in words; may be empty.
        reason: String,
    },
    /// Nobody will ever know.
    Lost {
        /// Whether its command may have started.
        started: bool,
        /// Why, in words.
        reason: String,
    },
}

/// The end of an attempt, as the last record of its log tells it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct EndRecord {
    /// What it came to.
    pub(crate) outcome: Outcome,
    /// Length of its log in bytes.
    pub(crate) end_offset: u64,
    /// When it ended.
    pub(crate) finished_at: Timestamp,
    /// When its command started, if that was seen.
    #[serde(default)]
    pub(crate) started_at: Option<Timestamp>,
}

/// How far a log has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LogState {
    /// The offset of the next byte.
    pub(crate) next: u64,
    /// The attempt's end; no byte follows.
    pub(crate) end: Option<Arc<EndRecord>>,
}

/// What the fence says to an attempt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// It may begin.
    Open,
    /// It runs on this node.
    Running,
    /// It has run on this node and ended.
    Ended,
    /// A higher one has been seen.
    Stale {
        /// The highest.
        current: u32,
    },
}

/// Every log of this node.
#[derive(Debug)]
pub(crate) struct LogStore {
    dir: PathBuf,
    limits: LogLimits,
    /// What all logs took when it was last looked; nobody has: as much as can be.
    known_bytes: AtomicU64,
    /// What has been written since.
    written: Arc<AtomicU64>,
    /// Logs that have a writer.
    live: Mutex<HashMap<(JobId, u32), watch::Receiver<LogState>>>,
}

impl LogStore {
    /// Opens the directory, making it when it is not there.
    pub(crate) fn open(dir: &Path, limits: LogLimits) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (known_bytes, written) = (AtomicU64::new(u64::MAX), Arc::default());
        Ok(Self { dir: dir.to_owned(), limits, known_bytes, written, live: Mutex::default() })
    }

    /// Whether an attempt may begin.
    pub(crate) fn fence(&self, job: JobId, attempt: u32) -> io::Result<Fence> {
        self.fence_locked(&mut self.live(), job, attempt)
    }

    fn fence_locked(&self, live: &mut LiveLogs<'_>, job: JobId, attempt: u32) -> io::Result<Fence> {
        match self.highest(job)? {
            Some(current) if current > attempt => return Ok(Fence::Stale { current }),
            Some(current) if current == attempt => {}
            Some(_) | None => return Ok(Fence::Open),
        }
        if let Some(state) = live.get(&(job, attempt)) {
            return Ok(if state.borrow().end.is_some() { Fence::Ended } else { Fence::Running });
        }
        let ended = self.inspect(job, attempt)?.is_some_and(|state| state.end.is_some());
        Ok(if ended { Fence::Ended } else { Fence::Open })
    }

    /// Begins an attempt's log, if the fence lets it.
    pub(crate) fn begin(&self, job: JobId, attempt: u32) -> io::Result<Result<LogWriter, Fence>> {
        let mut live = self.live();
        match self.fence_locked(&mut live, job, attempt)? {
            Fence::Open => {}
            closed @ (Fence::Running | Fence::Ended | Fence::Stale { .. }) => return Ok(Err(closed)),
        }
        fs::create_dir_all(self.attempt_dir(job, attempt))?;
        self.open_writer(&mut live, job, attempt).map(Ok)
    }

    /// Ends an attempt that never begins here, for good.
    pub(crate) async fn refuse(&self, job: JobId, attempt: u32, reason: &str) {
        let log = match self.begin(job, attempt) {
            Ok(Ok(log)) => log,
            Ok(Err(_)) => return,
            Err(error) => return tracing::error!(job_id = %job, attempt, %error, "a refusal can't be written down"),
        };
        let outcome = Outcome::Lost { started: false, reason: reason.to_owned() };
        log.finish(EndRecord { outcome, end_offset: 0, finished_at: Timestamp::now(), started_at: None }).await;
        self.close(job, attempt);
    }

    /// Goes on with the log of an attempt that an earlier process began.
    pub(crate) fn reopen(&self, job: JobId, attempt: u32) -> io::Result<LogWriter> {
        let mut live = self.live();
        fs::create_dir_all(self.attempt_dir(job, attempt))?;
        self.open_writer(&mut live, job, attempt)
    }

    fn open_writer(&self, live: &mut LiveLogs<'_>, job: JobId, attempt: u32) -> io::Result<LogWriter> {
        let writer = LogWriter::open(&self.attempt_dir(job, attempt), self.limits, Arc::clone(&self.written))?;
        live.insert((job, attempt), writer.watch());
        Ok(writer)
    }

    /// Forgets that a log has a writer. Its readers follow it to its end all the same.
    pub(crate) fn close(&self, job: JobId, attempt: u32) {
        self.live().remove(&(job, attempt));
    }

    /// A reader at `offset`, and how far the log has come; `None` when there is no such log. Blocking.
    pub(crate) fn read(
        &self,
        job: JobId,
        attempt: u32,
        offset: u64,
    ) -> io::Result<Option<(LogReader, watch::Receiver<LogState>)>> {
        let live = self.live().get(&(job, attempt)).cloned();
        let state = match live {
            Some(state) => state,
            None => match self.inspect(job, attempt)? {
                Some(state) if state.end.is_some() => watch::Sender::new(state).subscribe(),
                Some(_) | None => return Ok(None),
            },
        };
        Ok(Some((LogReader::new(self.attempt_dir(job, attempt), offset), state)))
    }

    /// How far a log without a writer has come; `None` when there is none.
    fn inspect(&self, job: JobId, attempt: u32) -> io::Result<Option<LogState>> {
        let segments = match segment::list(&self.attempt_dir(job, attempt)) {
            Ok(segments) => segments,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(last) = segments.last() else { return Ok(Some(LogState::default())) };
        let scan = segment::scan(&File::open(&last.path)?, last.base)?;
        Ok(Some(LogState { next: scan.end_offset, end: scan.end.map(Arc::new) }))
    }

    /// The files of an attempt; `None` when this node has never had it.
    pub(crate) fn artifacts(&self, job: JobId, attempt: u32) -> Option<ArtifactDir> {
        let dir = self.attempt_dir(job, attempt);
        dir.is_dir().then(|| ArtifactDir::of(&dir))
    }

    /// Jobs that have a directory and no attempt that is being written. Blocking.
    pub(crate) fn quiet_jobs(&self) -> io::Result<Vec<JobId>> {
        let mut jobs = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let job = path.file_stem().and_then(|name| name.to_str()?.parse::<JobId>().ok());
            match (job, path.extension()) {
                // A crash fell into its deletion.
                (Some(_), Some(extension)) if extension == DELETED => fs::remove_dir_all(path)?,
                (Some(job), None) => jobs.push(job),
                (Some(_), Some(_)) | (None, _) => {}
            }
        }
        let live = self.live();
        jobs.retain(|job| !live.keys().any(|(writing, _)| writing == job));
        Ok(jobs)
    }

    /// Deletes what there is of a job, unless an attempt of it is being written. False: nothing was. Blocking.
    pub(crate) fn delete(&self, job: JobId) -> io::Result<bool> {
        let dir = self.dir.join(job.to_string());
        let deleted = dir.with_extension(DELETED);
        {
            // Renamed under the lock, so that no attempt begins in what is being deleted.
            let live = self.live();
            if live.keys().any(|(writing, _)| *writing == job) {
                return Ok(false);
            }
            match fs::rename(&dir, &deleted) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                other => other?,
            }
        }
        fs::remove_dir_all(&deleted)?;
        Ok(true)
    }

    fn highest(&self, job: JobId) -> io::Result<Option<u32>> {
        let entries = match fs::read_dir(self.dir.join(job.to_string())) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut highest = None;
        for entry in entries {
            highest = highest.max(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
        }
        Ok(highest)
    }

    fn attempt_dir(&self, job: JobId, attempt: u32) -> PathBuf {
        self.dir.join(job.to_string()).join(attempt.to_string())
    }

    fn live(&self) -> LiveLogs<'_> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type LiveLogs<'a> = MutexGuard<'a, HashMap<(JobId, u32), watch::Receiver<LogState>>>;
