//! Local reads: a small pool of read-only connections, each read in one transaction.
//!
//! The connections are our own and not Hiqlite's, because Hiqlite's run one statement each: a page and the revision it
//! belongs to must come from one snapshot.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blixard::error::{Error, Reason};
use hiqlite::rusqlite::{self, Connection, OpenFlags};
use tokio::sync::{Semaphore, watch};

use crate::metrics::METRICS;

/// Reads at once. They are short and CPU-bound; more than the cores of a small machine only wait for each other.
const CONNECTIONS: usize = 4;
/// How long a read may wait for a connection.
const WAIT_DEADLINE: Duration = Duration::from_secs(10);
/// How long SQLite waits while a snapshot is being put in place.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Distinct statements: a few dozen constant ones and the filters in use.
const STATEMENTS: usize = 128;

/// The pool.
pub(crate) struct Readers {
    database: PathBuf,
    newest: Arc<watch::Sender<u64>>,
    idle: Mutex<Vec<Connection>>,
    slots: Semaphore,
}

impl Readers {
    /// Every read tells `newest` of the revision it saw.
    pub(crate) fn new(database: PathBuf, newest: Arc<watch::Sender<u64>>) -> Arc<Self> {
        Arc::new(Self { database, newest, idle: Mutex::default(), slots: Semaphore::new(CONNECTIONS) })
    }

    /// Runs `read` in one read transaction.
    pub(crate) async fn read<T, F>(self: &Arc<Self>, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let Ok(slot) = tokio::time::timeout(WAIT_DEADLINE, self.slots.acquire()).await else {
            return Err(Error::new(Reason::Overloaded, "too many reads are waiting").with("limit", CONNECTIONS));
        };
        let readers = Arc::clone(self);
        let result = tokio::task::spawn_blocking(move || readers.read_blocking(read)).await;
        drop(slot);
        match result {
            Ok(result) => result.map_err(failed),
            Err(error) => Err(Error::internal(|error_id| tracing::error!(error_id, %error, "registry read panicked"))),
        }
    }

    /// Runs `read` in one read transaction on this thread: for a few rows by their key, which take less time than another
    /// thread takes to begin.
    pub(crate) fn read_here<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        self.read_blocking(read).map_err(failed)
    }

    /// Tells `newest` of what the database shows by now.
    pub(crate) fn look(&self) -> rusqlite::Result<()> {
        self.read_blocking(|_| Ok(()))
    }

    fn read_blocking<T>(&self, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.open()?,
        };
        let transaction = connection.unchecked_transaction()?;
        let result = read(&transaction);
        // A replica that has just joined has no tables yet.
        if let Ok(revision) = newest_revision(&transaction) {
            advance(&self.newest, revision);
        }
        transaction.finish()?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        result
    }

    fn open(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.database, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        Ok(connection)
    }
}

fn failed(error: rusqlite::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "registry read failed"))
}

/// The newest revision in the snapshot that `connection` sees.
pub(crate) fn newest_revision(connection: &Connection) -> rusqlite::Result<u64> {
    let mut statement = connection.prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'events'")?;
    statement.query_row([], |row| crate::rows::number(row, 0))
}

/// Tells everybody who waits for it of a newer revision; an older one is no news.
pub(crate) fn advance(newest: &watch::Sender<u64>, revision: u64) {
    newest.send_if_modified(|newest| {
        let newer = revision > *newest;
        *newest = revision.max(*newest);
        METRICS.revision.set(*newest as f64);
        newer
    });
}
