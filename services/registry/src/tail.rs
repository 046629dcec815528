//! The tail of the events: one task reads new changes once, however many watchers there are.
//!
//! ```text
//!   newest revision ─► tail ─► recent changes (a ring) ─► every watcher that is near
//!                       │ one read per wake-up
//!   SQLite ─────────────┴───────── pages ───────────────► a watcher that is behind, until it is near
//! ```
//! A watcher holds nothing but its position, so a slow one costs nobody anything. While nobody watches nothing is read.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use blixard::error::Error;
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    change::{Change, Page, PageSize, Wanted, read_page},
    read::Readers,
};

/// Of the recent changes: a fifth of a second of the fastest writing, and some MiB of memory. Who falls further behind
/// reads from SQLite, whose pages are in the kernel's memory then.
pub(crate) const RECENT: PageSize = PageSize { changes: 4096, bytes: 4 * 1024 * 1024 };
/// What the tail reads at once.
const TAIL_PAGE: PageSize = PageSize { changes: 512, bytes: 512 * 1024 };
/// What a watcher that is behind reads at once, and holds until it is sent: little, since ten thousand may.
const STORAGE_PAGE: PageSize = PageSize { changes: 256, bytes: 32 * 1024 };
/// Watchers that read from SQLite at once; the other connections are for everybody else.
const STORAGE_READS: usize = 2;
/// Changes that the tail reads on its own thread: another would take longer to begin.
const READ_HERE: u64 = 16;
/// What waking one watcher costs, generously. The next wake-up comes no sooner than all of the last are through, so that
/// ten thousand watchers get fewer and larger portions (after 50 ms) and leave time for commits.
const WAKE_COST: Duration = Duration::from_micros(5);
/// A shorter pause than this is none: timers tick in milliseconds.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// The most recent changes, without a gap.
pub(crate) struct Recent {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
    limit: PageSize,
    /// Every change after this one, up to `head`, is in it.
    base: u64,
    head: u64,
    closed: bool,
}

/// What comes after a position.
pub(crate) enum Next {
    Change(Arc<Change>),
    /// Nothing that is wanted, up to here.
    Nothing {
        covers: u64,
    },
    /// It is no longer here: read storage.
    Behind,
    /// The tail has ended.
    Closed,
}

impl Recent {
    fn new(head: u64, limit: PageSize) -> Self {
        Self { changes: VecDeque::new(), bytes: 0, limit, base: head, head, closed: false }
    }

    /// The first wanted change after `cursor`.
    pub(crate) fn after(&self, cursor: u64, wanted: &Wanted) -> Next {
        if self.closed {
            return Next::Closed;
        }
        if !self.reaches_back_to(cursor) {
            return Next::Behind;
        }
        let begin = self.changes.partition_point(|change| change.revision <= cursor);
        match self.changes.range(begin..).find(|change| wanted.wants(change)) {
            Some(change) => Next::Change(Arc::clone(change)),
            None => Next::Nothing { covers: self.head.max(cursor) },
        }
    }

    /// Whether every change after `cursor` is here or still to come.
    pub(crate) fn reaches_back_to(&self, cursor: u64) -> bool {
        cursor >= self.base
    }

    /// The newest revision that the tail has seen.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    fn push(&mut self, page: Page) {
        self.head = page.covers;
        for change in page.changes {
            self.bytes += change.bytes;
            self.changes.push_back(change);
            while self.changes.len() > self.limit.changes || self.bytes > self.limit.bytes {
                let Some(oldest) = self.changes.pop_front() else { break };
                self.bytes -= oldest.bytes;
                self.base = oldest.revision;
            }
        }
    }

    /// Forgets everything up to `head`: who has not seen it reads storage.
    fn restart_at(&mut self, head: u64) {
        self.changes.clear();
        (self.bytes, self.base, self.head) = (0, head, head);
    }
}

/// The task that reads.
pub(crate) struct TailDriver(Arc<Tail>);

/// What watchers share.
pub(crate) struct Tail {
    readers: Arc<Readers>,
    newest: watch::Receiver<u64>,
    recent: watch::Sender<Recent>,
    storage: Semaphore,
}

impl Tail {
    /// A driver to run and what it serves. `newest` is the newest revision that the database shows, and changes with it.
    pub(crate) fn new(readers: Arc<Readers>, newest: watch::Receiver<u64>, limit: PageSize) -> (TailDriver, Arc<Self>) {
        let recent = watch::Sender::new(Recent::new(*newest.borrow(), limit));
        let tail = Arc::new(Self { readers, newest, recent, storage: Semaphore::new(STORAGE_READS) });
        (TailDriver(Arc::clone(&tail)), tail)
    }

    /// The recent changes, from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Recent> {
        self.recent.subscribe()
    }

    /// The newest revision that the database shows.
    pub(crate) fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    /// For short reads of a watcher that begins.
    pub(crate) fn readers(&self) -> &Readers {
        &self.readers
    }

    /// What a watcher that is behind reads next; waits for its turn.
    pub(crate) async fn read_storage(&self, after: u64, wanted: &Arc<Wanted>) -> Result<Page, Error> {
        let turn = self.storage.acquire().await;
        let wanted = Arc::clone(wanted);
        let page = self.readers.read(move |connection| read_page(connection, after, &wanted, STORAGE_PAGE)).await;
        drop(turn);
        page
    }
}

impl TailDriver {
    /// Reads until `stop` is cancelled, or until no revision will come any more.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut newest = self.0.newest.clone();
        let mut next_wake = Instant::now();
        // Also what came before this task.
        newest.mark_changed();
        while let Some(Ok(())) = stop.run_until_cancelled(newest.changed()).await {
            if next_wake > Instant::now() + SHORTEST_PAUSE {
                tokio::time::sleep_until(next_wake).await;
            }
            let target = *newest.borrow_and_update();
            stop.run_until_cancelled(self.read_up_to(target)).await;
            let watchers = u32::try_from(self.0.recent.receiver_count()).unwrap_or(u32::MAX);
            next_wake = Instant::now() + WAKE_COST.saturating_mul(watchers);
        }
    }

    async fn read_up_to(&self, newest: u64) {
        let Tail { readers, recent, .. } = &*self.0;
        loop {
            let after = recent.borrow().head;
            if after >= newest {
                return;
            }
            if recent.receiver_count() == 0 {
                // One that begins meanwhile finds itself behind, and reads storage.
                recent.send_modify(|recent| recent.restart_at(newest));
                return;
            }
            let read = move |connection: &_| read_page(connection, after, &Wanted::default(), TAIL_PAGE);
            let page = if newest - after <= READ_HERE { readers.read_here(read) } else { readers.read(read).await };
            recent.send_modify(|recent| match page {
                Ok(page) if page.compacted > after => recent.restart_at(page.compacted),
                Ok(page) => recent.push(page),
                // It is in the log; watchers read storage, and hear for themselves when that does not work.
                Err(_) => recent.restart_at(newest),
            });
        }
    }
}

/// Ends every watch, also when the task panicked.
impl Drop for TailDriver {
    fn drop(&mut self) {
        self.0.recent.send_modify(|recent| recent.closed = true);
    }
}
