//! One read of a log for everybody who follows it.
//!
//! ```text
//!   vmhost ── StreamLogs ──► reader ──► window (8 MiB) ──► follower, follower, follower …
//!                              ▲                               │
//!                              └──── as far as the fastest ────┘
//! ```
//!
//! The first follower of an attempt's log opens the stream at its own offset; who comes later takes what the window still
//! holds and then the rest. Chunks are shared, never copied. The reader goes as fast as the fastest follower: one that falls
//! out of the window, or begins before it, reads for itself until it meets the window again. The stream ends with its last
//! follower. A stream that breaks tells everybody; who still wants the log joins again, and the first one opens the next.
//!
//! It must not know what becomes of the job: [`crate::logs`] does.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    pb::{
        scheduler::v1::stream_job_logs_response::Record,
        vmhost::v1::{StreamLogsRequest, StreamLogsResponse, stream_logs_response},
    },
};
use blixard_chassis::Tasks;
use tokio::sync::{Notify, watch};

use crate::peers::{VmHostClient, peer_error};

/// How much of a log its followers share: a follower may be this far behind the fastest one. A few seconds of a busy build.
const WINDOW_BYTES: usize = 8 * 1024 * 1024;
/// What a record costs besides its bytes.
const RECORD_OVERHEAD: usize = 128;
/// So many records the reader is ahead of the fastest follower: 2 MiB of the largest, enough to keep the wire busy.
const READ_AHEAD: u64 = 32;
/// Records that a follower takes at once.
const TAKE: usize = 8;

/// Which log.
type Key = (JobId, u32);

/// The logs that are being followed. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Hubs {
    open: Arc<Mutex<BTreeMap<Key, Arc<Hub>>>>,
    tasks: Tasks,
}

/// How joining went.
pub(crate) enum Joined {
    /// In the hub.
    Seat(Seat),
    /// There is a hub, but its window does not hold what is wanted: read alone.
    Apart,
}

impl Hubs {
    pub(crate) fn new(tasks: Tasks) -> Self {
        Self { open: Arc::default(), tasks }
    }

    /// A seat among the followers of a log, from `offset` on. Without a hub the log is opened there.
    pub(crate) fn join(&self, key: Key, offset: u64, vmhost: VmHostClient) -> Joined {
        let mut open = self.entries();
        if let Some(hub) = open.get(&key).filter(|hub| !hub.has_failed()) {
            return match hub.covers(offset) {
                true => Joined::Seat(self.seat(key, hub.clone(), offset)),
                false => Joined::Apart,
            };
        }
        let hub = Arc::new(Hub::new(offset));
        open.insert(key, hub.clone());
        // Subscribed before the reader runs: a reader without followers ends.
        let seat = self.seat(key, hub.clone(), offset);
        let token = self.tasks.token().clone();
        self.tasks.spawn("log hub", async move {
            tokio::select! {
                () = hub.read(key, offset, vmhost) => {}
                () = hub.news.closed() => {}
                () = token.cancelled() => hub.end(Outcome::Failed(shutting_down())),
            }
        });
        Joined::Seat(seat)
    }

    /// Whether a hub holds what comes at `offset`: a follower that reads alone can join.
    pub(crate) fn can_join(&self, key: Key, offset: u64) -> bool {
        self.entries().get(&key).is_some_and(|hub| !hub.has_failed() && hub.covers(offset))
    }

    fn seat(&self, key: Key, hub: Arc<Hub>, offset: u64) -> Seat {
        let news = hub.news.subscribe();
        let next = hub.window().position(offset);
        Seat { hubs: self.clone(), key, hub, news, next }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<Key, Arc<Hub>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shutting_down() -> Error {
    Error::new(Reason::ShuttingDown, "the scheduler is shutting down")
}

/// How a stream ended.
#[derive(Debug, Clone)]
enum Outcome {
    /// With the log's end.
    Complete,
    /// Before it.
    Failed(Error),
}

/// What followers wait for.
#[derive(Debug, Clone, Default)]
struct News {
    /// The number of the next record.
    head: u64,
    /// Heartbeats of the vmhost.
    beats: u64,
    outcome: Option<Outcome>,
}

struct Hub {
    window: Mutex<Window>,
    news: watch::Sender<News>,
    /// The number of the next record of the fastest follower.
    fastest: AtomicU64,
    /// It moved.
    moved: Notify,
}

impl Hub {
    fn new(offset: u64) -> Self {
        Self {
            window: Mutex::new(Window::new(offset)),
            news: watch::Sender::new(News::default()),
            fastest: AtomicU64::new(0),
            moved: Notify::new(),
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn covers(&self, offset: u64) -> bool {
        let window = self.window();
        (window.start..=window.next).contains(&offset)
    }

    fn has_failed(&self) -> bool {
        matches!(self.news.borrow().outcome, Some(Outcome::Failed(_)))
    }

    fn end(&self, outcome: Outcome) {
        self.news.send_modify(|news| news.outcome = Some(outcome));
    }

    /// Reads the log to its end.
    async fn read(&self, (job_id, attempt): Key, offset: u64, mut vmhost: VmHostClient) {
        let message = StreamLogsRequest { job_id: job_id.to_string(), attempt, offset, follow: true };
        let outcome = match vmhost.stream_logs(message).await {
            Ok(records) => self.pump(records.into_inner()).await,
            Err(status) => Outcome::Failed(peer_error("vmhost", &status)),
        };
        self.end(outcome);
    }

    async fn pump(&self, mut records: tonic::Streaming<StreamLogsResponse>) -> Outcome {
        loop {
            self.wait_for_followers().await;
            match records.message().await {
                Ok(Some(response)) => match record_of(response) {
                    Some(Record::Heartbeat(_)) => self.news.send_modify(|news| news.beats += 1),
                    Some(record) => {
                        let last = matches!(record, Record::End(_));
                        let head = self.window().push(record);
                        self.news.send_modify(|news| news.head = head);
                        if last {
                            return Outcome::Complete;
                        }
                    }
                    None => {}
                },
                Ok(None) => return Outcome::Failed(ended_early()),
                Err(status) => return Outcome::Failed(peer_error("vmhost", &status)),
            }
        }
    }

    /// Waits until somebody has come close to the head.
    async fn wait_for_followers(&self) {
        loop {
            let moved = self.moved.notified();
            if self.news.borrow().head < self.fastest.load(Ordering::Acquire) + READ_AHEAD {
                return;
            }
            moved.await;
        }
    }
}

/// A stream of a followed log that ends without saying that the log has.
pub(crate) fn ended_early() -> Error {
    Error::new(Reason::PeerUnavailable, "the vmhost ended the stream early")
}

/// The vmhost's record as the scheduler passes it on: the same fields under the same numbers.
pub(crate) fn record_of(response: StreamLogsResponse) -> Option<Record> {
    Some(match response.record? {
        stream_logs_response::Record::Chunk(chunk) => Record::Chunk(chunk),
        stream_logs_response::Record::Gap(gap) => Record::Gap(gap),
        stream_logs_response::Record::End(end) => Record::End(end),
        stream_logs_response::Record::Heartbeat(beat) => Record::Heartbeat(beat),
    })
}

/// The last records of a log, numbered from 0.
struct Window {
    records: VecDeque<Held>,
    /// The number of the first one.
    first: u64,
    /// The offset of the first byte that it holds.
    start: u64,
    /// The offset after the last one.
    next: u64,
    /// What they cost.
    bytes: usize,
}

struct Held {
    record: Record,
    /// The offset after it.
    end: u64,
    cost: usize,
}

/// What a follower found.
enum Found {
    Records(Vec<Record>),
    /// Nothing new.
    Nothing,
    /// What it wants has left the window.
    Gone,
}

impl Window {
    fn new(offset: u64) -> Self {
        Self { records: VecDeque::new(), first: 0, start: offset, next: offset, bytes: 0 }
    }

    /// Takes a record in, the oldest ones out; the number of the next one.
    fn push(&mut self, record: Record) -> u64 {
        let data = match &record {
            Record::Chunk(chunk) => {
                self.next = chunk.offset + chunk.data.len() as u64;
                chunk.data.len()
            }
            Record::Gap(gap) => {
                self.next = gap.to_offset;
                gap.reason.len()
            }
            Record::End(end) => end.reason.len(),
            Record::Heartbeat(_) => 0,
        };
        let cost = data + RECORD_OVERHEAD;
        self.records.push_back(Held { record, end: self.next, cost });
        self.bytes += cost;
        while self.bytes > WINDOW_BYTES {
            let Some(oldest) = self.records.pop_front() else { break };
            self.bytes -= oldest.cost;
            self.first += 1;
            self.start = oldest.end;
        }
        self.first + self.records.len() as u64
    }

    /// The number of the record in which `offset` is, or that comes at it.
    fn position(&self, offset: u64) -> u64 {
        let before = |held: &Held| held.end <= offset && !matches!(held.record, Record::End(_));
        self.first + self.records.partition_point(before) as u64
    }

    fn take(&self, from: u64) -> Found {
        let Some(skipped) = from.checked_sub(self.first) else { return Found::Gone };
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        let found: Vec<_> = self.records.iter().skip(skipped).take(TAKE).map(|held| held.record.clone()).collect();
        if found.is_empty() { Found::Nothing } else { Found::Records(found) }
    }
}

/// A follower's place; the last one to leave ends the stream.
pub(crate) struct Seat {
    hubs: Hubs,
    key: Key,
    hub: Arc<Hub>,
    news: watch::Receiver<News>,
    /// The number of the next record wanted.
    next: u64,
}

/// What a seat brings.
pub(crate) enum Next {
    /// The next records; the first one may begin before the offset that was asked for.
    Records(Vec<Record>),
    /// The vmhost lives and has nothing new.
    Heartbeat,
    /// Others were faster: what comes next has left the window.
    Behind,
    /// The stream broke; everything before it has been brought.
    Failed(Error),
}

impl Seat {
    /// The next news. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Next {
        loop {
            let news = self.news.borrow_and_update().clone();
            let found = self.hub.window().take(self.next);
            match found {
                Found::Records(records) => {
                    self.next += records.len() as u64;
                    self.hub.fastest.fetch_max(self.next, Ordering::AcqRel);
                    self.hub.moved.notify_one();
                    return Next::Records(records);
                }
                Found::Gone => return Next::Behind,
                Found::Nothing => {}
            }
            match news.outcome {
                Some(Outcome::Failed(error)) => return Next::Failed(error),
                // Its last record was the end, and it was taken: nobody asks on.
                Some(Outcome::Complete) => return Next::Failed(ended_early()),
                None => {}
            }
            let beats = news.beats;
            if self.news.changed().await.is_err() {
                return Next::Failed(shutting_down());
            }
            if self.news.borrow().beats > beats && self.news.borrow().head <= self.next {
                return Next::Heartbeat;
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.hubs.entries();
        // This receiver still counts.
        if self.hub.news.receiver_count() <= 1 && open.get(&self.key).is_some_and(|hub| Arc::ptr_eq(hub, &self.hub)) {
            open.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use blixard::pb::common::v1::{LogChunk, LogEnd};

    use super::*;

    fn chunk(offset: u64, length: usize) -> Record {
        Record::Chunk(LogChunk { offset, data: vec![b'x'; length].into(), ..Default::default() })
    }

    fn offsets(found: Found) -> Vec<u64> {
        let Found::Records(records) = found else { return Vec::new() };
        let offset = |record: &Record| match record {
            Record::Chunk(chunk) => chunk.offset,
            Record::Gap(gap) => gap.from_offset,
            Record::End(end) => end.end_offset,
            Record::Heartbeat(beat) => beat.next_offset,
        };
        records.iter().map(offset).collect()
    }

    #[test]
    fn a_window_begins_where_it_is_asked_to_and_the_end_is_there_for_everybody() {
        let mut window = Window::new(100);
        assert_eq!(window.position(100), 0);
        window.push(chunk(100, 10));
        window.push(chunk(110, 5));
        assert_eq!([100, 109, 110, 115].map(|offset| window.position(offset)), [0, 0, 1, 2]);
        assert_eq!(offsets(window.take(0)), [100, 110]);
        window.push(Record::End(LogEnd { end_offset: 115, ..Default::default() }));
        assert_eq!(offsets(window.take(window.position(115))), [115], "who has every byte is told the end");
        assert!(matches!(window.take(3), Found::Nothing));
    }

    #[test]
    fn the_oldest_records_leave_a_full_window_and_who_wants_them_is_told() {
        let mut window = Window::new(0);
        let records = 2 * WINDOW_BYTES as u64 / 65_536;
        for number in 0..records {
            window.push(chunk(number * 65_536, 65_536));
        }
        assert!(window.bytes <= WINDOW_BYTES && window.bytes > WINDOW_BYTES - 70_000, "{}", window.bytes);
        assert!(matches!(window.take(0), Found::Gone));
        assert_eq!(window.start, window.first * 65_536);
        assert_eq!(offsets(window.take(window.position(window.start))).first(), Some(&window.start));
    }
}
