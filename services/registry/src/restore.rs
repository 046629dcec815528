//! Makes a data directory of a backup: rows go through Raft again, as they would from anybody who writes.
//!
//! ```text
//!   DATA/restoring/hiqlite/   a node of its own: tables ─► rows ─► indexes, views, triggers ─► compared with the backup
//!        │ rename, when all is on the disk
//!        ▼
//!   DATA/hiqlite/             the next start serves it, or grows it to several replicas
//! ```
//! Nothing here knows what Hiqlite writes into its files. As long as `restoring` is there and `hiqlite` is not, a registry
//! does not start, and another restore begins again.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use hiqlite::{
    Client, Param,
    rusqlite::{self, Connection, OpenFlags, types::Value},
};

use crate::{
    RegistryConfig, StartError,
    archive::{Archive, ArchiveError, sync_dir},
    embedded::{DataDir, Embedded, RESTORING},
    read::newest_revision,
    replica::bootstrap::Identity,
    schema,
};

/// Bytes of the rows in one Raft entry (the last row may be larger); replicas that join are sent them.
const ENTRY_BYTES: usize = 64 * 1024;
/// Rows in one Raft entry.
const ENTRY_ROWS: usize = 500;

/// Why a backup was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It can't be used.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A registry is there.
    #[error("{} holds a registry: a backup is restored into an empty data directory", .0.display())]
    Occupied(PathBuf),
    /// Only the first replica can begin a registry.
    #[error("a backup is restored as replica 1 and this is replica {0}: start the others without data, they join it")]
    NotTheFirst(u64),
    /// A newer program has written the backup.
    #[error("the backup has schema version {found} and this program knows {known}: use a newer program")]
    NewerSchema {
        /// The version in the backup.
        found: i64,
        /// The newest version this program knows.
        known: i64,
    },
    /// Its file is no sound database, or what was made of it differs.
    #[error("{0}")]
    Unsound(String),
    /// The node that takes the rows failed.
    #[error("the database did not take the backup")]
    Node(#[from] StartError),
    /// Raft failed.
    #[error("the database did not take the backup")]
    Raft(#[from] hiqlite::Error),
    /// SQLite failed.
    #[error("a database can't be read")]
    Database(#[from] rusqlite::Error),
    /// The data directory can't be used.
    #[error("cannot use {}", path.display())]
    DataDir {
        /// What could not be used.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Restores a backup into the data directory of a registry that does not run. `told` hears how many rows of how many are
/// there. The restored registry goes on at the backup's revision.
///
/// # Errors
/// The directory has a registry or can't be used, or the backup can't.
pub async fn restore(config: &RegistryConfig, archive: &Archive, told: impl Fn(u64, u64)) -> Result<(), RestoreError> {
    let source = open(&archive.database)?;
    check(&source, archive)?;
    if let Some(membership) = config.membership.as_ref().filter(|membership| membership.id != 1) {
        return Err(RestoreError::NotTheFirst(membership.id));
    }
    let (target, staging) = (config.data_dir.join("hiqlite"), config.data_dir.join(RESTORING));
    if !is_empty(&target).map_err(failed(&target))? {
        return Err(RestoreError::Occupied(target));
    }
    let dir = DataDir::take(&staging)?;
    dir.clear()?;
    let made = dir.path.clone();
    let node = Embedded::start_first(dir, config.membership.as_ref()).await?;
    let filled = fill(&node, &source, &told).await;
    node.shutdown().await;
    filled?;
    if let Some(membership) = &config.membership {
        Identity::of(&made).write(membership.id).map_err(StartError::Identity)?;
    }
    put_in_place(&made, &target, &staging).map_err(failed(&target))
}

/// The digest says that the file is the one that was written; this says that it is a registry's.
fn check(source: &Connection, archive: &Archive) -> Result<(), RestoreError> {
    let found = schema::version(source)?;
    if found > schema::newest() {
        return Err(RestoreError::NewerSchema { found, known: schema::newest() });
    }
    let revision = newest_revision(source)?;
    if revision != archive.manifest.revision || found != archive.manifest.schema_version {
        return Err(RestoreError::Unsound("the backup's manifest belongs to another database".to_owned()));
    }
    sound(source, "the backup")
}

fn sound(database: &Connection, what: &str) -> Result<(), RestoreError> {
    let said: String = database.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if said == "ok" { Ok(()) } else { Err(RestoreError::Unsound(format!("{what} is damaged: {said}"))) }
}

/// Brings everything into the node's database, and proves it.
async fn fill(node: &Embedded, source: &Connection, told: &impl Fn(u64, u64)) -> Result<(), RestoreError> {
    node.client.wait_for_cluster_sync_timeout(crate::embedded::REPLAY_DEADLINE).await?;
    let (tables, rest): (Vec<_>, Vec<_>) = objects(source)?.into_iter().partition(|object| object.kind == "table");
    propose(&node.client, tables.iter().map(|table| (table.sql.clone(), vec![])).collect()).await?;
    let mut total = 0;
    for table in &tables {
        let count: i64 = source.query_row(&format!("SELECT count(*) FROM {}", table.quoted()), [], |row| row.get(0))?;
        total += count.unsigned_abs();
    }
    let mut loaded = 0;
    for table in &tables {
        load(&node.client, source, table, &mut |rows| {
            loaded += rows;
            told(loaded, total);
        })
        .await?;
    }
    // Rows must not make events: the triggers come when the rows are there.
    let mut last: Vec<_> = rest.into_iter().map(|object| (object.sql, vec![])).collect();
    last.push(("DELETE FROM sqlite_sequence".to_owned(), vec![]));
    for row in rows(source, "SELECT name, seq FROM sqlite_sequence")? {
        last.push(("INSERT INTO sqlite_sequence (name, seq) VALUES (?1, ?2)".to_owned(), params(row)));
    }
    propose(&node.client, last).await?;

    let restored = open(&node.database)?;
    sound(&restored, "the restored database")?;
    compare(source, &restored, &tables)
}

async fn load(
    client: &Client,
    source: &Connection,
    table: &Object,
    done: &mut impl FnMut(u64),
) -> Result<(), RestoreError> {
    let mut select = source.prepare(&format!("SELECT * FROM {}", table.quoted()))?;
    let width = select.column_count();
    let columns: Vec<_> = select.column_names().into_iter().map(quoted).collect();
    let places: Vec<_> = (1..=width).map(|place| format!("?{place}")).collect();
    let insert = format!("INSERT INTO {} ({}) VALUES ({})", table.quoted(), columns.join(", "), places.join(", "));
    let mut rows = select.query([])?;
    let (mut entry, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let row = (0..width).map(|column| row.get(column)).collect::<rusqlite::Result<Vec<Value>>>()?;
        bytes += insert.len() + row.iter().map(size).sum::<usize>();
        entry.push((insert.clone(), params(row)));
        if bytes >= ENTRY_BYTES || entry.len() >= ENTRY_ROWS {
            done(entry.len() as u64);
            propose(client, std::mem::take(&mut entry)).await?;
            bytes = 0;
        }
    }
    done(entry.len() as u64);
    propose(client, entry).await
}

/// One Raft entry, applied whole or not at all.
async fn propose(client: &Client, statements: Vec<(String, Vec<Param>)>) -> Result<(), RestoreError> {
    if statements.is_empty() {
        return Ok(());
    }
    for result in client.txn(statements).await? {
        result?;
    }
    Ok(())
}

/// What the schema consists of.
struct Object {
    kind: String,
    name: String,
    sql: String,
}

impl Object {
    fn quoted(&self) -> String {
        quoted(&self.name)
    }
}

/// Everything but what SQLite and Hiqlite have for themselves, in the order in which it was made.
fn objects(database: &Connection) -> rusqlite::Result<Vec<Object>> {
    let own = "SELECT type, name, sql FROM sqlite_schema
        WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND tbl_name <> '_metadata' ORDER BY rowid";
    let mut statement = database.prepare(own)?;
    let object = |row: &rusqlite::Row<'_>| Ok(Object { kind: row.get(0)?, name: row.get(1)?, sql: row.get(2)? });
    statement.query_map([], object)?.collect()
}

fn compare(source: &Connection, restored: &Connection, tables: &[Object]) -> Result<(), RestoreError> {
    let differs =
        |what: &str| RestoreError::Unsound(format!("the restored database differs from the backup in {what}"));
    let described = |database| -> rusqlite::Result<Vec<_>> {
        let mut objects: Vec<_> = objects(database)?.into_iter().map(|object| (object.name, object.sql)).collect();
        objects.sort();
        Ok(objects)
    };
    if described(source)? != described(restored)? {
        return Err(differs("its schema"));
    }
    let names = tables.iter().map(|table| (table.name.as_str(), format!("SELECT * FROM {}", table.quoted())));
    let sequence = ("sqlite_sequence", "SELECT name, seq FROM sqlite_sequence ORDER BY name".to_owned());
    for (name, select) in names.chain([sequence]) {
        let (mut ours, mut theirs) = (source.prepare(&select)?, restored.prepare(&select)?);
        let width = ours.column_count();
        let (mut ours, mut theirs) = (ours.query([])?, theirs.query([])?);
        loop {
            let next = |row: Option<&rusqlite::Row<'_>>| {
                row.map(|row| (0..width).map(|column| row.get(column)).collect::<rusqlite::Result<Vec<Value>>>())
                    .transpose()
            };
            let (our, their) = (next(ours.next()?)?, next(theirs.next()?)?);
            if our != their {
                return Err(differs(name));
            }
            if our.is_none() {
                break;
            }
        }
    }
    Ok(())
}

/// Gives the directory its name; from then on it is a registry.
fn put_in_place(made: &Path, target: &Path, staging: &Path) -> io::Result<()> {
    sync_tree(made)?;
    // An empty one would be replaced, too, but not one that somebody has begun to use.
    fs::rename(made, target)?;
    fs::remove_dir(staging)?;
    sync_dir(target.parent().unwrap_or(target))
}

/// SQLite does not wait for the disk, because the log does; here the log is as new.
fn sync_tree(path: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    if kind.is_dir() || kind.is_file() { File::open(path)?.sync_all() } else { Ok(()) }
}

fn is_empty(dir: &Path) -> io::Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn open(database: &Path) -> rusqlite::Result<Connection> {
    Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
}

fn rows(database: &Connection, select: &str) -> rusqlite::Result<Vec<Vec<Value>>> {
    let mut statement = database.prepare(select)?;
    let width = statement.column_count();
    statement.query_map([], |row| (0..width).map(|column| row.get(column)).collect())?.collect()
}

fn params(row: Vec<Value>) -> Vec<Param> {
    let param = |value| match value {
        Value::Null => Param::Null,
        Value::Integer(value) => Param::Integer(value),
        Value::Real(value) => Param::Real(value),
        Value::Text(value) => Param::Text(value),
        Value::Blob(value) => Param::Blob(value),
    };
    row.into_iter().map(param).collect()
}

fn size(value: &Value) -> usize {
    const OF_A_VALUE: usize = 8;
    match value {
        Value::Null | Value::Integer(_) | Value::Real(_) => OF_A_VALUE,
        Value::Text(text) => OF_A_VALUE + text.len(),
        Value::Blob(blob) => OF_A_VALUE + blob.len(),
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |source| RestoreError::DataDir { path, source }
}
