//! Backups: a consistent copy of the database, made and streamed while changes go on.
//!
//! The copy is SQLite's own (`VACUUM INTO` on a connection of its own): it reads one snapshot and holds up no writer. It has
//! a name only while it is made; what a killed process leaves is removed at the next start.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    pb::registry::v1::{self as wire, backup_response::Message},
    time::Timestamp,
};
use blixard_chassis::Tasks;
use futures::{Stream, stream};
use hiqlite::rusqlite::{Connection, OpenFlags};
use ring::digest::{Context, SHA256};
use tokio::sync::{Semaphore, mpsc};
use tonic::Status;

use crate::{
    disk::{LOG_RESERVE_BYTES, shortage},
    read::newest_revision,
    schema,
};

/// Bytes of a chunk.
const CHUNK_BYTES: usize = 64 * 1024;
/// Chunks that wait for a client: four of HTTP/2's windows.
const WAITING_CHUNKS: usize = 4;
/// How long a client may take for a chunk. The copy takes up disk meanwhile.
const CHUNK_DEADLINE: Duration = Duration::from_secs(60);
type Answers = mpsc::Sender<Result<wire::BackupResponse, Status>>;

/// Answers requests for backups.
pub(crate) struct Backups {
    database: PathBuf,
    copy: PathBuf,
    slot: Arc<Semaphore>,
    tasks: Tasks,
}

impl Backups {
    /// Copies are made in `dir`.
    pub(crate) fn new(database: PathBuf, dir: &Path, tasks: Tasks) -> Arc<Self> {
        let copy = dir.join("backup.tmp");
        if let Err(error) = remove(&copy) {
            tracing::warn!(path = %copy.display(), %error, "cannot remove what a backup has left");
        }
        Arc::new(Self { database, copy, slot: Arc::new(Semaphore::new(1)), tasks })
    }

    /// Starts a backup; it ends with an error or with the digest.
    pub(crate) fn start(
        &self,
    ) -> Result<impl Stream<Item = Result<wire::BackupResponse, Status>> + Send + 'static, Error> {
        let Ok(slot) = Arc::clone(&self.slot).try_acquire_owned() else {
            return Err(Error::new(Reason::Overloaded, "a backup is under way; try again").with("limit", 1));
        };
        let (answers, receiver) = mpsc::channel(WAITING_CHUNKS);
        let (database, copy) = (self.database.clone(), self.copy.clone());
        let stop = self.tasks.token().clone();
        self.tasks.spawn("backup", async move {
            let sent = tokio::select! {
                sent = send(database, copy, &answers) => sent,
                () = stop.cancelled() => Err(Error::new(Reason::ShuttingDown, "the backup was given up")),
                () = answers.closed() => Ok(()),
            };
            if let Err(error) = sent {
                // A client that is slow finds the end of the stream instead.
                let _ = answers.try_send(Err(error.into()));
            }
            drop(slot);
        });
        let next = |mut receiver: mpsc::Receiver<_>| async { receiver.recv().await.map(|answer| (answer, receiver)) };
        Ok(stream::unfold(receiver, next))
    }
}

async fn send(database: PathBuf, copy: PathBuf, answers: &Answers) -> Result<(), Error> {
    let made = tokio::task::spawn_blocking(move || make(&database, &copy)).await;
    let (header, mut file) = made.map_err(broken)??;
    let mut left = header.size_bytes;
    deliver(answers, Message::Header(header)).await?;
    let mut digest = Context::new(&SHA256);
    while left > 0 {
        // From memory: it has just been written.
        let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(left).unwrap_or(CHUNK_BYTES))];
        file.read_exact(&mut chunk).map_err(broken)?;
        digest.update(&chunk);
        left -= chunk.len() as u64;
        deliver(answers, Message::Chunk(chunk.into())).await?;
    }
    let sha256 = digest.finish().as_ref().to_vec().into();
    deliver(answers, Message::Digest(wire::BackupDigest { sha256 })).await
}

async fn deliver(answers: &Answers, message: Message) -> Result<(), Error> {
    let answer = wire::BackupResponse { message: Some(message) };
    match tokio::time::timeout(CHUNK_DEADLINE, answers.send(Ok(answer))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Error::new(Reason::DeadlineExceeded, "the client does not take the backup")),
    }
}

/// Makes the copy, and takes its name away again.
fn make(database: &Path, copy: &Path) -> Result<(wire::BackupHeader, File), Error> {
    let made = copy_database(database, copy);
    remove(copy).map_err(broken)?;
    made
}

fn copy_database(database: &Path, copy: &Path) -> Result<(wire::BackupHeader, File), Error> {
    remove(copy).map_err(broken)?;
    let connection = open(database).map_err(broken)?;
    check_room(&connection, copy)?;
    let to = copy.to_str().ok_or_else(|| broken("the data directory's name is not UTF-8"))?;
    connection.execute("VACUUM INTO ?1", [to]).map_err(broken)?;
    let taken_at = Some(Timestamp::now().into());
    let copied = open(copy).map_err(broken)?;
    let file = File::open(copy).map_err(broken)?;
    let header = wire::BackupHeader {
        revision: newest_revision(&copied).map_err(broken)?,
        schema_version: schema::version(&copied).map_err(broken)?,
        size_bytes: file.metadata().map_err(broken)?.len(),
        taken_at,
    };
    Ok((header, file))
}

fn open(database: &Path) -> hiqlite::rusqlite::Result<Connection> {
    Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
}

/// A backup must not fill the disk that the log is on.
fn check_room(connection: &Connection, copy: &Path) -> Result<(), Error> {
    let sizes = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
    let size: i64 = connection.query_row(sizes, [], |row| row.get(0)).map_err(broken)?;
    let needed = u64::try_from(size).unwrap_or(0) + LOG_RESERVE_BYTES;
    let Some(shortage) = shortage(copy.parent().unwrap_or(copy), needed).map_err(broken)? else { return Ok(()) };
    let free = shortage.free;
    Err(shortage
        .error(format!("a backup needs {needed} bytes on the registry's disk for a while, and {free} are free")))
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "backup failed"))
}
