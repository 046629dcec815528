//! Watch: a cursor into the events table for each subscriber.
//!
//! ```text
//!   events table ──page──► cursor ──message──► client        newest revision (from the committer) wakes the cursor
//! ```
//! Nothing is queued for a subscriber but the page it is reading: a slow one costs only itself, and misses nothing.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use blixard::{
    error::{Error, Reason},
    limits,
    pb::registry::v1::{self as wire, WatchResponse, watch_event::Object, watch_response::Message},
};
use futures::{Stream, stream};
use hiqlite::rusqlite::{self, Connection};
use prost::Message as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    metrics::{METRICS, Watching},
    read::Readers,
    rows::{JobRow, VmRow, find_node, number, when},
};

/// Events read at once.
const PAGE_EVENTS: i64 = 256;
/// A page ends early rather than hold more than this.
const PAGE_BYTES: usize = 1024 * 1024;

/// One subscriber.
pub(crate) struct Watcher {
    readers: Arc<Readers>,
    newest: watch::Receiver<u64>,
    stop: CancellationToken,
    /// Everything up to here has been sent.
    cursor: u64,
    /// Everything up to here had happened when the watch began.
    began_at: u64,
    synced: bool,
    page: VecDeque<WatchResponse>,
    _watching: Watching,
}

impl Watcher {
    /// Begins a watch at `start_revision`; 0: with the next change.
    pub(crate) async fn begin(
        readers: Arc<Readers>,
        newest: watch::Receiver<u64>,
        stop: CancellationToken,
        start_revision: u64,
    ) -> Result<Self, Error> {
        let began_at = *newest.borrow();
        let cursor = match start_revision {
            0 => began_at,
            start => {
                let oldest = readers.read(oldest_revision).await?;
                if start < oldest {
                    return Err(compacted(start, oldest));
                }
                start - 1
            }
        };
        Ok(Self {
            readers,
            newest,
            stop,
            cursor,
            began_at,
            synced: false,
            page: VecDeque::new(),
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
            if self.stop.is_cancelled() {
                return Err(Error::new(Reason::ShuttingDown, "the registry is shutting down; watch again"));
            }
            if let Some(message) = self.page.pop_front() {
                self.cursor = message.revision;
                return Ok(message);
            }
            if !self.synced && self.cursor >= self.began_at {
                self.synced = true;
                return Ok(self.message(Message::Synced(wire::WatchSynced {})));
            }
            if self.cursor < *self.newest.borrow_and_update() {
                let cursor = self.cursor;
                self.page = self.readers.read(move |connection| read_page(connection, cursor)).await?;
                continue;
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                // The committer is gone only at shutdown.
                changed = self.newest.changed() => if changed.is_err() { self.stop.cancelled().await },
                () = tokio::time::sleep(limits::HEARTBEAT_EVERY / 2) => {
                    return Ok(self.message(Message::Progress(wire::WatchProgress {})));
                }
            }
        }
    }

    fn message(&self, message: Message) -> WatchResponse {
        WatchResponse { revision: self.cursor, message: Some(message) }
    }
}

fn oldest_revision(connection: &Connection) -> rusqlite::Result<u64> {
    let sql = "SELECT coalesce(min(revision), 0) FROM events";
    connection.prepare_cached(sql)?.query_row([], |row| number(row, 0))
}

fn compacted(start: u64, oldest: u64) -> Error {
    let message = format!("revision {start} was compacted away; the oldest left is {oldest}: list again, then watch");
    Error::new(Reason::RevisionCompacted, message).with("oldest_revision", oldest)
}

/// Events after `cursor` with their objects, from one snapshot.
fn read_page(connection: &Connection, cursor: u64) -> rusqlite::Result<VecDeque<WatchResponse>> {
    let sql =
        "SELECT revision, timestamp, entity, entity_id FROM events WHERE revision > ?1 ORDER BY revision LIMIT ?2";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query([i64::try_from(cursor).unwrap_or(i64::MAX), PAGE_EVENTS])?;
    let mut objects: HashMap<(String, String), Option<Object>> = HashMap::new();
    let mut page = VecDeque::new();
    let mut bytes = 0;
    while bytes < PAGE_BYTES
        && let Some(row) = rows.next()?
    {
        let key: (String, String) = (row.get(2)?, row.get(3)?);
        let object = match objects.get(&key) {
            Some(object) => object.clone(),
            None => {
                let object = read_object(connection, &key.0, &key.1)?;
                objects.insert(key, object.clone());
                object
            }
        };
        let event = wire::WatchEvent { timestamp: Some(when(row, 1)?), object };
        bytes += event.encoded_len();
        page.push_back(WatchResponse { revision: number(row, 0)?, message: Some(Message::Event(event)) });
    }
    Ok(page)
}

/// The object as it is now; a VM that is gone was purged.
fn read_object(connection: &Connection, entity: &str, id: &str) -> rusqlite::Result<Option<Object>> {
    Ok(match entity {
        "vm" => Some(match VmRow::find(connection, id)? {
            Some(row) => Object::Vm(row.vm),
            None => Object::PurgedVmId(id.to_owned()),
        }),
        "job" => JobRow::find(connection, id)?.map(|row| Object::Job(row.job)),
        _ => find_node(connection, id)?.map(Object::Node),
    })
}
