//! Watch: a position in the sequence of changes for each subscriber.
//!
//! ```text
//!            ┌─ near: from the recent changes ─┐
//!   position ┤                                 ├─► message ─► client
//!            └─ behind: a page from SQLite ────┘
//! ```
//! Both ways lead through the same revisions, so a subscriber changes between them as often as it likes and misses and
//! repeats nothing.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use blixard::{
    error::{Error, Reason},
    limits,
    pb::registry::v1::{self as wire, WatchResponse, watch_response::Message},
};
use futures::{Stream, stream};
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use crate::{
    change::{Change, Wanted, compacted_revision},
    metrics::{METRICS, Watching},
    tail::{Next, Recent, Tail},
};

/// After this much silence a watch says that it is alive.
const PROGRESS_EVERY: Duration = limits::HEARTBEAT_EVERY.checked_div(2).unwrap();

/// One subscriber.
pub(crate) struct Watcher {
    tail: Arc<Tail>,
    recent: watch::Receiver<Recent>,
    wanted: Arc<Wanted>,
    /// Everything up to here has been sent or is not wanted.
    position: u64,
    /// Everything up to here had happened when the watch began, or was expected to have.
    synced_at: u64,
    synced: bool,
    /// What was read from storage, and how far that reaches.
    page: VecDeque<Arc<Change>>,
    page_covers: u64,
    progress_at: Instant,
    _watching: Watching,
}

impl Watcher {
    /// Begins a watch at `start_revision`; 0: with the next change.
    pub(crate) fn begin(tail: &Arc<Tail>, wanted: Wanted, start_revision: u64) -> Result<Self, Error> {
        let recent = tail.subscribe();
        let newest = tail.newest();
        let position = start_revision.checked_sub(1).unwrap_or(newest);
        if start_revision > 0 && !recent.borrow().reaches_back_to(position) {
            let compacted = tail.readers().read_here(compacted_revision)?;
            if position < compacted {
                return Err(compacted_away(position, compacted));
            }
        }
        Ok(Self {
            tail: Arc::clone(tail),
            recent,
            wanted: Arc::new(wanted),
            position,
            synced_at: newest.max(position),
            synced: false,
            page: VecDeque::new(),
            page_covers: 0,
            progress_at: Instant::now() + PROGRESS_EVERY,
            _watching: METRICS.watching(),
        })
    }

    /// The messages, without end until shutdown.
    pub(crate) fn stream(self) -> impl Stream<Item = Result<WatchResponse, Status>> {
        stream::unfold(Some(self), |watcher| async {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(error) => Some((Err(error.into()), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<WatchResponse, Error> {
        loop {
            if let Some(change) = self.page.pop_front() {
                return Ok(self.change(&change));
            }
            self.position = self.position.max(self.page_covers);
            if self.is_in_sync() {
                self.synced = true;
                return Ok(self.message(Message::Synced(wire::WatchSynced {})));
            }
            let next = self.recent.borrow_and_update().after(self.position, &self.wanted);
            match next {
                Next::Closed => {
                    return Err(Error::new(Reason::ShuttingDown, "the registry is shutting down; watch again"));
                }
                Next::Change(change) => return Ok(self.change(&change)),
                Next::Behind => self.read_storage().await?,
                Next::Nothing { covers } => {
                    self.position = covers;
                    if !self.is_in_sync() {
                        let _ = tokio::time::timeout_at(self.progress_at, self.recent.changed()).await;
                    }
                }
            }
            // Also when there is much, and nothing of it is wanted.
            if Instant::now() >= self.progress_at {
                return Ok(self.message(Message::Progress(wire::WatchProgress {})));
            }
        }
    }

    /// Whether SYNCED is due. A start that this replica has not reached is a position without anything behind it.
    fn is_in_sync(&self) -> bool {
        !self.synced && self.position >= self.synced_at && self.recent.borrow().head() >= self.synced_at
    }

    async fn read_storage(&mut self) -> Result<(), Error> {
        let page = self.tail.read_storage(self.position, &self.wanted).await?;
        if self.position < page.compacted {
            return Err(compacted_away(self.position, page.compacted));
        }
        (self.page, self.page_covers) = (page.changes, page.covers);
        if self.page.is_empty() {
            self.position = self.page_covers;
        }
        Ok(())
    }

    fn change(&mut self, change: &Change) -> WatchResponse {
        self.position = change.revision;
        self.progress_at = Instant::now() + PROGRESS_EVERY;
        change.message.clone()
    }

    fn message(&mut self, message: Message) -> WatchResponse {
        self.progress_at = Instant::now() + PROGRESS_EVERY;
        WatchResponse { revision: self.position, message: Some(message) }
    }
}

fn compacted_away(position: u64, compacted: u64) -> Error {
    let (start, oldest) = (position + 1, compacted + 1);
    let message = format!("revision {start} was compacted away; the oldest left is {oldest}: list again, then watch");
    Error::new(Reason::RevisionCompacted, message).with("oldest_revision", oldest)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use hiqlite::rusqlite::Connection;
    use tokio_util::sync::{CancellationToken, DropGuard};

    use super::*;
    use crate::{change::PageSize, read::Readers, schema};

    /// A database without a log, whose only writer is the test, and a tail that remembers four changes.
    struct Bed {
        _dir: tempfile::TempDir,
        _stop: DropGuard,
        database: Connection,
        newest: watch::Sender<u64>,
        tail: Arc<Tail>,
    }

    const REMEMBERED: PageSize = PageSize { changes: 4, bytes: 1 << 20 };

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("database");
            let database = Connection::open(&path).unwrap();
            database.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF").unwrap();
            schema::create(&database).unwrap();
            let newest = watch::Sender::new(0);
            let (driver, tail) = Tail::new(Readers::new(path, Arc::default()), newest.subscribe(), REMEMBERED);
            let stop = CancellationToken::new();
            blixard_chassis::Tasks::new().spawn("tail", driver.run(stop.clone()));
            Self { _dir: dir, _stop: stop.drop_guard(), database, newest, tail }
        }

        /// Commits this many changes, and says so once.
        fn change(&self, changes: u64) {
            for _ in 0..changes {
                let sql =
                    "INSERT INTO nodes (id, state, endpoint, driver, vcpus, memory_mib, max_vms, images, incarnation,
                        revision, registered_at, updated_at)
                    SELECT 'n' || (next % 7), 'Ready', '', '', 1, 1, 1, '[]', 1, next, '2026-01-01T00:00:00.000Z',
                        '2026-01-01T00:00:00.000Z'
                    FROM (SELECT seq + 1 AS next FROM sqlite_sequence WHERE name = 'events') WHERE true
                    ON CONFLICT (id) DO UPDATE SET incarnation = incarnation + 1, revision = excluded.revision";
                self.database.execute(sql, []).unwrap();
            }
            self.newest.send_modify(|newest| *newest += changes);
        }

        fn compact(&self, through: u64) {
            self.database.execute("DELETE FROM events WHERE revision <= ?1", [through.cast_signed()]).unwrap();
            self.database.execute("UPDATE compaction SET revision = ?1", [through.cast_signed()]).unwrap();
        }

        fn watch(&self, start_revision: u64) -> Watcher {
            self.watch_for(wire::WatchRequest { start_revision, ..Default::default() })
        }

        fn watch_for(&self, request: wire::WatchRequest) -> Watcher {
            Watcher::begin(&self.tail, Wanted::parse(&request).unwrap(), request.start_revision).unwrap()
        }

        /// Until the tail has read everything.
        async fn tail_is_at(&self, revision: u64) {
            let mut recent = self.tail.subscribe();
            recent.wait_for(|recent| recent.head() >= revision).await.unwrap();
        }
    }

    impl Watcher {
        /// The revisions of the next changes; other messages are passed over.
        async fn revisions(&mut self, count: usize) -> Vec<u64> {
            let mut revisions = Vec::new();
            while revisions.len() < count {
                let message = self.next().await.unwrap();
                if let Some(Message::Event(event)) = message.message {
                    assert!(event.object.is_some());
                    revisions.push(message.revision);
                }
            }
            revisions
        }

        fn is_near(&self) -> bool {
            self.page.is_empty() && self.recent.borrow().reaches_back_to(self.position)
        }
    }

    fn is_synced(message: &WatchResponse) -> bool {
        matches!(message.message, Some(Message::Synced(_)))
    }

    #[tokio::test]
    async fn a_watcher_goes_from_recent_changes_to_storage_and_back_without_a_gap() {
        let bed = Bed::new();
        let mut watcher = bed.watch(1);
        let mut expected = 1;
        for burst in [1, 3, 40, 2, 700, 1, 5, 4, 2000, 1] {
            bed.change(burst);
            bed.tail_is_at(expected + burst - 1).await;
            assert_eq!(watcher.is_near(), burst <= REMEMBERED.changes as u64, "{burst}");
            let revisions = watcher.revisions(usize::try_from(burst).unwrap()).await;
            assert_eq!(revisions, (expected..expected + burst).collect::<Vec<_>>());
            assert!(watcher.is_near());
            expected += burst;
        }
        assert!(watcher.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn nothing_is_read_while_nobody_watches_and_a_watcher_that_comes_then_gets_it_all() {
        let bed = Bed::new();
        bed.change(3);
        // Not by `tail_is_at`, which counts as a watcher.
        while bed.tail.subscribe().borrow().head() < 3 {
            tokio::task::yield_now().await;
        }
        assert!(!bed.tail.subscribe().borrow().reaches_back_to(2));
        let mut watcher = bed.watch(1);
        bed.change(2);
        assert_eq!(watcher.revisions(5).await, [1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn a_start_that_this_replica_has_not_reached_is_waited_for() {
        let bed = Bed::new();
        bed.change(3);
        let mut watcher = bed.watch(10);
        for newest in 4..9 {
            bed.change(1);
            bed.tail_is_at(newest).await;
            assert!(watcher.next().now_or_never().is_none(), "{newest}");
        }
        bed.change(4);
        let synced = watcher.next().await.unwrap();
        assert!(is_synced(&synced) && synced.revision >= 9, "{synced:?}");
        assert_eq!(watcher.revisions(3).await, [10, 11, 12]);
    }

    #[tokio::test]
    async fn a_start_that_comes_next_is_synced_at_once() {
        let bed = Bed::new();
        bed.change(3);
        for start in [0, 4] {
            let synced = bed.watch(start).next().await.unwrap();
            assert!(is_synced(&synced) && synced.revision == 3, "{start}: {synced:?}");
        }
    }

    #[tokio::test]
    async fn who_is_overtaken_by_compaction_is_told_and_who_is_near_is_not_disturbed() {
        let bed = Bed::new();
        let (mut slow, mut near) = (bed.watch(1), bed.watch(1));
        bed.change(2);
        assert_eq!((slow.revisions(1).await, near.revisions(2).await), (vec![1], vec![1, 2]));
        bed.change(100);
        assert_eq!(near.revisions(100).await.last(), Some(&102));
        bed.compact(50);
        let error = slow.next().await.unwrap_err();
        assert_eq!(error.reason, Reason::RevisionCompacted);
        assert_eq!(error.metadata.get("oldest_revision").map(String::as_str), Some("51"));
        bed.change(1);
        assert_eq!(near.revisions(1).await, [103]);

        // All of it: what comes next may still be asked for.
        bed.compact(103);
        bed.change(6);
        bed.tail_is_at(109).await;
        assert_eq!(near.revisions(6).await.first(), Some(&104));
        assert_eq!(bed.watch(104).revisions(6).await.first(), Some(&104));
        let request = wire::WatchRequest { start_revision: 103, ..Default::default() };
        let refused = Watcher::begin(&bed.tail, Wanted::parse(&request).unwrap(), 103).err().unwrap();
        assert_eq!(refused.metadata.get("oldest_revision").map(String::as_str), Some("104"));
    }

    #[tokio::test]
    async fn a_tail_that_is_overtaken_by_compaction_claims_no_more_than_it_has() {
        let bed = Bed::new();
        let mut watcher = bed.watch(1);
        // The tail hears of these only when most are gone.
        let sql = "INSERT INTO events (timestamp, entity, entity_id, reason) VALUES ('2026-01-01T00:00:00.000Z', 'node', 'n', '')";
        for _ in 0..20 {
            bed.database.execute(sql, []).unwrap();
        }
        bed.compact(15);
        bed.newest.send_replace(20);
        bed.tail_is_at(20).await;
        assert!(is_synced(&watcher.next().await.unwrap()));
        let error = watcher.next().await.unwrap_err();
        assert_eq!(error.reason, Reason::RevisionCompacted);
        assert_eq!(error.metadata.get("oldest_revision").map(String::as_str), Some("16"));
    }

    #[tokio::test]
    async fn progress_covers_what_is_filtered_away() {
        let bed = Bed::new();
        let kinds = vec![wire::ObjectKind::Job.into()];
        let jobs = wire::WatchRequest { kinds, start_revision: 1, ..Default::default() };
        let one = wire::WatchRequest { object_ids: vec!["n3".into()], start_revision: 1, ..Default::default() };
        let (mut late, mut jobs, mut one) = (bed.watch_for(jobs.clone()), bed.watch_for(jobs), bed.watch_for(one));
        for watcher in [&mut late, &mut jobs, &mut one] {
            assert!(is_synced(&watcher.next().await.unwrap()));
        }
        for newest in [3, 10, 17, 1017] {
            let before = bed.tail.newest();
            bed.change(newest - before);
            bed.tail_is_at(newest).await;
            // It is time for one.
            jobs.progress_at = Instant::now();
            assert_eq!(progress(&jobs.next().await.unwrap()), Some(newest));
        }
        assert_eq!(one.revisions(4).await, [3, 10, 17, 24]);
        // From storage, and further away than one read reaches.
        bed.change(10_000);
        bed.tail_is_at(11_017).await;
        let mut covered = Vec::new();
        while covered.last() != Some(&11_017) {
            late.progress_at = Instant::now();
            covered.extend(progress(&late.next().await.unwrap()));
        }
        assert!(covered.len() > 1 && covered.is_sorted_by(|a, b| a < b), "{covered:?}");
    }

    fn progress(message: &WatchResponse) -> Option<u64> {
        matches!(message.message, Some(Message::Progress(_))).then_some(message.revision)
    }

    #[tokio::test]
    async fn a_watch_ends_with_the_tail() {
        let bed = Bed::new();
        let mut watcher = bed.watch(0);
        assert!(is_synced(&watcher.next().await.unwrap()));
        let Bed { _stop: stop, .. } = bed;
        drop(stop);
        assert_eq!(watcher.next().await.unwrap_err().reason, Reason::ShuttingDown);
    }
}
