//! Appends to one attempt's log. There is one writer of a log at a time: the task that runs the attempt.
//!
//! Writes go to the page cache, in the task itself: that takes microseconds, and the bytes survive the death of this
//! process. Only [`LogWriter::finish`] waits for the disk, on the blocking pool.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use blixard::{pb::common::v1 as pb, time::Timestamp};
use tokio::sync::watch;

use crate::blocking::blocking;

use super::{
    EndRecord, LogLimits, LogState,
    record::{self, Kind},
    segment::{self, Segment},
};

/// The only one who may append to a log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    dir: PathBuf,
    limits: LogLimits,
    /// Counts what all writers of the node write.
    written: Arc<AtomicU64>,
    /// Oldest first. The last one is `file`, when there is one.
    segments: VecDeque<(Segment, u64)>,
    file: Option<File>,
    buffer: Vec<u8>,
    next: u64,
    state: watch::Sender<LogState>,
}

impl LogWriter {
    /// Opens a log for appending: a torn record at its end, left by a crash, is cut off.
    pub(super) fn open(dir: &Path, limits: LogLimits, written: Arc<AtomicU64>) -> io::Result<Self> {
        let mut segments = VecDeque::new();
        for segment in segment::list(dir)? {
            let bytes = fs::metadata(&segment.path)?.len();
            segments.push_back((segment, bytes));
        }
        let mut file = None;
        let mut state = LogState::default();
        if let Some((segment, bytes)) = segments.back_mut() {
            let last = OpenOptions::new().read(true).append(true).open(&segment.path)?;
            let scan = segment::scan(&last, segment.base)?;
            last.set_len(scan.good_bytes)?;
            *bytes = scan.good_bytes;
            state = LogState { next: scan.end_offset, end: scan.end.map(Arc::new) };
            file = Some(last);
        }
        let next = state.next;
        let state = watch::Sender::new(state);
        Ok(Self { dir: dir.to_owned(), limits, written, segments, file, buffer: Vec::new(), next, state })
    }

    /// The offset of the next byte.
    pub(crate) fn next_offset(&self) -> u64 {
        self.next
    }

    /// How the attempt ended, when it has.
    pub(crate) fn end(&self) -> Option<Arc<EndRecord>> {
        self.state.borrow().end.clone()
    }

    pub(super) fn watch(&self) -> watch::Receiver<LogState> {
        self.state.subscribe()
    }

    /// Appends output. Bytes that the log has already are skipped; a hole is an error. When this returns the bytes are in the
    /// page cache and readers have been told of them.
    pub(crate) fn append(&mut self, chunks: &[pb::LogChunk]) -> io::Result<()> {
        self.buffer.clear();
        let mut next = self.next;
        for chunk in chunks {
            if chunk.offset > next {
                return Err(io::Error::other(format!("the guest skipped from offset {next} to {}", chunk.offset)));
            }
            let known = usize::try_from(next - chunk.offset).unwrap_or(usize::MAX);
            let kind = match chunk.stream() {
                pb::LogStream::Stderr => Kind::Stderr,
                pb::LogStream::Stdout | pb::LogStream::Unspecified => Kind::Stdout,
            };
            let time = chunk.time.map_or(Timestamp(0), Timestamp::from);
            for data in chunk.data.get(known..).unwrap_or_default().chunks(record::MAX_DATA) {
                record::encode(&mut self.buffer, kind, next, time, data);
                next += data.len() as u64;
            }
        }
        if next == self.next {
            return Ok(());
        }
        self.write(next)?;
        self.state.send_modify(|state| state.next = next);
        Ok(())
    }

    /// Records the attempt's end after its output and waits until all of it is on the disk. Readers are told of the end even
    /// when the disk fails: then it is lost with this process.
    pub(crate) async fn finish(mut self, end: EndRecord) -> Arc<EndRecord> {
        if let Some(known) = self.end() {
            return known;
        }
        if let Err(error) = self.write_end(&end).await {
            tracing::error!(log = %self.dir.display(), %error, "the end of a log could not be written");
        }
        let end = Arc::new(end);
        self.state.send_modify(|state| state.end = Some(Arc::clone(&end)));
        end
    }

    async fn write_end(&mut self, end: &EndRecord) -> io::Result<()> {
        let data = serde_json::to_vec(end)?;
        self.buffer.clear();
        record::encode(&mut self.buffer, Kind::End, self.next, end.finished_at, &data);
        self.write(self.next)?;
        let file = self.file.take();
        blocking(move || file.map_or(Ok(()), |file| file.sync_data())).await
    }

    /// Writes the buffer; the log then goes on at `next`.
    fn write(&mut self, next: u64) -> io::Result<()> {
        if self.segments.back().is_none_or(|(_, bytes)| *bytes >= self.limits.segment_bytes) {
            self.rotate()?;
        }
        let (Some(file), Some((_, bytes))) = (&mut self.file, self.segments.back_mut()) else {
            return Err(io::Error::other("no segment is open"));
        };
        if let Err(error) = file.write_all(&self.buffer) {
            // Half a record may be there: cut it off, so that the next one follows the last good one.
            let _ = file.set_len(*bytes);
            return Err(error);
        }
        *bytes += self.buffer.len() as u64;
        self.written.fetch_add(self.buffer.len() as u64, Ordering::Relaxed);
        self.next = next;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let segment = Segment::new(&self.dir, self.next);
        self.file = Some(OpenOptions::new().read(true).append(true).create(true).open(&segment.path)?);
        self.segments.push_back((segment, 0));
        let mut total: u64 = self.segments.iter().map(|(_, bytes)| bytes).sum();
        while total + self.limits.segment_bytes > self.limits.attempt_bytes && self.segments.len() > 1 {
            let Some((oldest, bytes)) = self.segments.pop_front() else { break };
            fs::remove_file(&oldest.path)?;
            total -= bytes;
        }
        Ok(())
    }
}
