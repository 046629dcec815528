//! The process that runs one query: reads a request from its standard input, writes frames to its standard output.
//!
//! It holds nothing that matters, so whoever started it may kill it at any time. It must not log: what it has to say goes
//! into a frame.

use std::{
    ffi::OsString,
    io::{self, Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason, invalid},
    pb::registry::v1::{self as wire, query_response::Message, sql_value::Value},
};
use prost::Message as _;
use rusqlite::{Batch, Connection, ErrorCode, OpenFlags, Statement, limits::Limit, types::ValueRef};
use rusqlite::{fallible_iterator::FallibleIterator as _, types::Value as Bound};
use rustix::process::{Resource, Rlimit, setrlimit};
use tonic::{Code, Status};

use crate::{
    query::{MAX_PARAMS, MAX_SQL_BYTES},
    query_rules,
    read::newest_revision,
};

/// The first argument that makes a program a worker.
pub(crate) const NAME: &str = "query-worker";
/// How long a client may take, in all, to take the answer in; its snapshot is held meanwhile.
pub(crate) const DELIVERY_TIME: Duration = Duration::from_secs(30);
/// Largest value and largest row: above the largest job (its command and its environment are 256 KiB each, twice in its
/// row), and well below the largest message.
const MAX_VALUE_BYTES: i32 = 2 * 1024 * 1024;
/// All memory of the process but its program. SQLite sorts and materializes in it (temporary files could fill the disk that
/// the Raft log is on).
const MAX_MEMORY_BYTES: u64 = 256 * 1024 * 1024;
/// Instructions of SQLite's machine between two looks at the time: some microseconds, and at most this many large values.
const LOOK_EVERY_OPS: i32 = 100;
/// A batch of rows is sent when it has this many bytes: a few of HTTP/2's windows.
const BATCH_BYTES: u64 = 256 * 1024;
/// How long a query waits while a snapshot is being put in place.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// What a worker says.
pub(crate) enum Frame {
    /// A piece of the answer.
    Message(wire::QueryResponse),
    /// The end: the client is told.
    Refused(Status),
    /// The end: the log is told.
    Broken(String),
}

impl Frame {
    /// Its kind and its length.
    pub(crate) const HEAD_BYTES: usize = 5;

    fn encode(self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Message(message) => (0, message.encode_to_vec()),
            Self::Refused(status) => (1, status.details().to_vec()),
            Self::Broken(detail) => (2, detail.into_bytes()),
        };
        // A row is at most 2 MiB, and so is a batch.
        let bytes = u32::try_from(body.len()).unwrap_or(u32::MAX);
        [&[kind], bytes.to_le_bytes().as_slice(), &body].concat()
    }

    /// Kind and length of the body that follows.
    pub(crate) fn head([kind, length @ ..]: [u8; Self::HEAD_BYTES]) -> (u8, usize) {
        (kind, u32::from_le_bytes(length) as usize)
    }

    pub(crate) fn decode(kind: u8, body: Vec<u8>) -> io::Result<Self> {
        match kind {
            0 => Ok(Self::Message(wire::QueryResponse::decode(body.as_slice())?)),
            1 => {
                let status = tonic_types::pb::Status::decode(body.as_slice())?;
                Ok(Self::Refused(Status::with_details(Code::from(status.code), status.message, body.into())))
            }
            2 => Ok(Self::Broken(String::from_utf8_lossy(&body).into_owned())),
            kind => Err(io::Error::other(format!("a frame of the unknown kind {kind}"))),
        }
    }
}

/// Why a query ended without a summary.
enum Ended {
    /// Its author should know.
    Refused(Error),
    /// The database failed.
    Broken(rusqlite::Error),
    /// Nobody listens.
    Unheard(io::Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// Becomes a worker when the first of a program's arguments says so.
#[must_use]
pub fn query_worker(mut args: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    if args.nth(1)? != NAME {
        return None;
    }
    Some(main(args.next().unwrap_or_default().into()))
}

fn main(database: PathBuf) -> ExitCode {
    let mut request = Vec::new();
    let read = io::stdin().read_to_end(&mut request).is_ok();
    let (true, Ok(query)) = (read, wire::QueryRequest::decode(request.as_slice())) else { return ExitCode::FAILURE };
    let answer = Answer::new(&query);
    answer.end_process_when_unwanted();
    let ended = confine().map_err(Ended::Unheard).and_then(|()| run(&database, query, &answer));
    let last = match ended {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Ended::Refused(error)) => Frame::Refused(error.into()),
        Err(Ended::Broken(error)) => Frame::Broken(error.to_string()),
        Err(Ended::Unheard(error)) => Frame::Broken(error.to_string()),
    };
    if answer.send(last).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Limits that the kernel keeps, and the first place should it run out of memory all the same.
fn confine() -> io::Result<()> {
    let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
    setrlimit(Resource::Data, limit(MAX_MEMORY_BYTES))?;
    setrlimit(Resource::Core, limit(0))?;
    // Absent where /proc is not mounted.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    Ok(())
}

/// Where the frames go, and until when the query may run.
struct Answer {
    time: Duration,
    deadline: Arc<Mutex<Instant>>,
}

impl Answer {
    fn new(query: &wire::QueryRequest) -> Self {
        let time = Duration::from_millis(query.timeout_ms.into());
        Self { time, deadline: Arc::new(Mutex::new(Instant::now() + time)) }
    }

    /// A registry that was killed kills no workers.
    fn end_process_when_unwanted(&self) {
        let longest = self.time + 2 * DELIVERY_TIME;
        std::thread::spawn(move || {
            std::thread::sleep(longest);
            std::process::exit(1);
        });
    }

    /// Sends; the time a slow client takes is not the query's.
    fn send(&self, frame: Frame) -> Result<(), Ended> {
        let began = Instant::now();
        let mut stdout = io::stdout().lock();
        let sent = stdout.write_all(&frame.encode()).and_then(|()| stdout.flush());
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) += began.elapsed();
        sent.map_err(Ended::Unheard)
    }

    fn message(&self, message: Message) -> Result<(), Ended> {
        self.send(Frame::Message(wire::QueryResponse { message: Some(message) }))
    }

    /// SQLite asks while it runs and, now and then, while it compiles.
    fn watch_time(&self, connection: &Connection) -> rusqlite::Result<()> {
        let deadline = Arc::clone(&self.deadline);
        let over = move || Instant::now() >= *deadline.lock().unwrap_or_else(PoisonError::into_inner);
        connection.progress_handler(LOOK_EVERY_OPS, Some(over))
    }
}

fn run(database: &PathBuf, query: wire::QueryRequest, answer: &Answer) -> Result<(), Ended> {
    let connection = open(database).map_err(Ended::Broken)?;
    // The revision and the rows come from one snapshot.
    connection.execute_batch("BEGIN").map_err(Ended::Broken)?;
    let revision = newest_revision(&connection).map_err(Ended::Broken)?;
    let refused = query_rules::enforce(&connection).map_err(Ended::Broken)?;
    answer.watch_time(&connection).map_err(Ended::Broken)?;

    let explain = |error: rusqlite::Error| match refused.take() {
        Some(refused) => Ended::Refused(refused),
        None => failed(error, answer.time),
    };
    let mut statements = Batch::new(&connection, &query.sql);
    let statement = statements.next().map_err(explain)?;
    let mut statement = statement.ok_or_else(|| invalid("sql", &query.sql, "a statement"))?;
    if statements.next().map_err(explain)?.is_some() {
        return Err(query_rules::refused("more than one statement", "several statements").into());
    }
    if !statement.readonly() {
        return Err(query_rules::refused("a statement that writes", "a write").into());
    }
    let params: Vec<Bound> = query.params.into_iter().map(bound).collect();
    bind(&mut statement, &params, &explain)?;
    answer.message(Message::Header(wire::QueryHeader { columns: columns(&statement), revision }))?;
    let limits = (query.max_rows.into(), query.max_bytes);
    let summary = send_rows(&mut statement, limits, answer, &explain)?;
    answer.message(Message::Summary(summary))
}

fn open(database: &PathBuf) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(database, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("PRAGMA query_only = ON; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF")?;
    for (limit, value) in [
        (Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
        (Limit::SQLITE_LIMIT_SQL_LENGTH, i32::try_from(MAX_SQL_BYTES).unwrap_or(i32::MAX)),
        (Limit::SQLITE_LIMIT_COLUMN, 200),
        (Limit::SQLITE_LIMIT_EXPR_DEPTH, 100),
        (Limit::SQLITE_LIMIT_PARSER_DEPTH, 200),
        (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 100),
        (Limit::SQLITE_LIMIT_VDBE_OP, 100_000),
        (Limit::SQLITE_LIMIT_ATTACHED, 0),
        // The cost of LIKE grows with the product of pattern and text.
        (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 256),
        (Limit::SQLITE_LIMIT_VARIABLE_NUMBER, i32::try_from(MAX_PARAMS).unwrap_or(i32::MAX)),
        (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
    ] {
        connection.set_limit(limit, value)?;
    }
    Ok(connection)
}

fn bound(value: wire::SqlValue) -> Bound {
    match value.value {
        None => Bound::Null,
        Some(Value::Integer(value)) => Bound::Integer(value),
        Some(Value::Real(value)) => Bound::Real(value),
        Some(Value::Text(value)) => Bound::Text(value),
        Some(Value::Blob(value)) => Bound::Blob(value.to_vec()),
    }
}

fn bind(
    statement: &mut Statement<'_>,
    params: &[Bound],
    explain: &dyn Fn(rusqlite::Error) -> Ended,
) -> Result<(), Ended> {
    let wanted = statement.parameter_count();
    if wanted != params.len() {
        let allowed = format!("{wanted}, as the statement has");
        return Err(invalid("params", format!("{} values", params.len()), &allowed).into());
    }
    for (index, param) in params.iter().enumerate() {
        statement.raw_bind_parameter(index + 1, param).map_err(explain)?;
    }
    Ok(())
}

fn columns(statement: &Statement<'_>) -> Vec<wire::QueryColumn> {
    let column = |column: &rusqlite::Column<'_>| wire::QueryColumn {
        name: column.name().to_owned(),
        declared_type: column.decl_type().unwrap_or_default().to_owned(),
    };
    statement.columns().iter().map(column).collect()
}

fn send_rows(
    statement: &mut Statement<'_>,
    (max_rows, max_bytes): (u64, u64),
    answer: &Answer,
    explain: &dyn Fn(rusqlite::Error) -> Ended,
) -> Result<wire::QuerySummary, Ended> {
    let width = statement.column_count();
    let mut rows = statement.raw_query();
    let (mut count, mut bytes, mut batch_bytes) = (0, 0, 0);
    let mut batch = Vec::new();
    let mut cut = wire::QueryCut::Unspecified;
    while let Some(row) = rows.next().map_err(explain)? {
        if count == max_rows {
            cut = wire::QueryCut::Rows;
            break;
        }
        let (row, row_bytes) = encode(row, width).map_err(explain)?;
        if row_bytes > MAX_VALUE_BYTES as u64 {
            return Err(out_of("value", MAX_VALUE_BYTES as u64, "bytes in one row").into());
        }
        if bytes + row_bytes > max_bytes {
            cut = wire::QueryCut::Bytes;
            break;
        }
        (count, bytes, batch_bytes) = (count + 1, bytes + row_bytes, batch_bytes + row_bytes);
        batch.push(row);
        if batch_bytes >= BATCH_BYTES {
            answer.message(Message::Rows(wire::QueryRows { rows: std::mem::take(&mut batch) }))?;
            batch_bytes = 0;
        }
    }
    if !batch.is_empty() {
        answer.message(Message::Rows(wire::QueryRows { rows: batch }))?;
    }
    Ok(wire::QuerySummary { rows: count, cut: cut.into() })
}

/// A row and its size: of its values and of what a value costs without its content.
fn encode(row: &rusqlite::Row<'_>, width: usize) -> rusqlite::Result<(wire::QueryRow, u64)> {
    const OF_A_VALUE: u64 = 8;
    let mut values = Vec::with_capacity(width);
    let mut bytes = 0;
    for index in 0..width {
        let value = row.get_ref(index)?;
        bytes += OF_A_VALUE;
        // Counted before it is copied: a row of many large values must not be.
        if let ValueRef::Text(content) | ValueRef::Blob(content) = value {
            bytes += content.len() as u64;
            if bytes > MAX_VALUE_BYTES as u64 {
                break;
            }
        }
        let value = match value {
            ValueRef::Null => None,
            ValueRef::Integer(value) => Some(Value::Integer(value)),
            ValueRef::Real(value) => Some(Value::Real(value)),
            ValueRef::Text(text) => Some(match std::str::from_utf8(text) {
                Ok(text) => Value::Text(text.to_owned()),
                Err(_) => Value::Blob(text.to_owned().into()),
            }),
            ValueRef::Blob(blob) => Some(Value::Blob(blob.to_owned().into())),
        };
        values.push(wire::SqlValue { value });
    }
    Ok((wire::QueryRow { values }, bytes))
}

pub(crate) fn out_of_time(time: Duration) -> Error {
    out_of("time", time.as_millis(), "ms")
}

pub(crate) fn out_of_memory() -> Error {
    out_of("memory", MAX_MEMORY_BYTES, "bytes of memory")
}

fn out_of(budget: &str, limit: impl ToString, unit: &str) -> Error {
    let message = format!("the query needs more than {} {unit}: ask for less", limit.to_string());
    Error::new(Reason::QueryBudgetExceeded, message).with("budget", budget).with("limit", limit)
}

/// A statement that does not compile, or that fails at what its author wrote.
fn failed(error: rusqlite::Error, time: Duration) -> Ended {
    let said = match error.sqlite_error_code() {
        Some(ErrorCode::OperationInterrupted) => return out_of_time(time).into(),
        Some(ErrorCode::TooBig) => return out_of("value", MAX_VALUE_BYTES, "bytes in one value").into(),
        Some(ErrorCode::OutOfMemory) => return out_of_memory().into(),
        Some(ErrorCode::Unknown | ErrorCode::TypeMismatch) | None => said(&error),
        Some(_) => return Ended::Broken(error),
    };
    let error = Error::new(Reason::InvalidField, format!("sql: {said}"))
        .with("field", "sql")
        .with("value", "")
        .with("allowed", "a statement that SQLite can run");
    error.into()
}

fn said(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqlInputError { msg, offset, .. } if *offset >= 0 => format!("{msg}, at byte {offset}"),
        rusqlite::Error::SqlInputError { msg, .. } | rusqlite::Error::SqliteFailure(_, Some(msg)) => msg.clone(),
        other => other.to_string(),
    }
}
