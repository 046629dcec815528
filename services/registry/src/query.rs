//! SQL for users: one read-only statement, within budgets, from one snapshot.
//!
//! ```text
//!   request ─► slot ─► a thread with a connection of its own ──messages──► client
//!                        authorizer: what may be asked      (query_rules)
//!                        progress handler: for how long     (Budget)
//! ```
//! A query shares nothing with changes, lists and watches but the file: neither their connections nor their threads. A
//! client that goes away ends its query at the progress handler's next look.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason, invalid},
    pb::registry::v1::{self as wire, query_response::Message, sql_value::Value},
};
use futures::{Stream, stream};
use rusqlite::{Batch, Connection, ErrorCode, OpenFlags, Statement, limits::Limit, types::ValueRef};
use rusqlite::{fallible_iterator::FallibleIterator as _, types::Value as Bound};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{memory::ResidentMemory, query_rules, read::newest_revision};

/// Queries at once. Each may keep a core busy for its whole time; the rest of the registry needs one too.
const MAX_QUERIES: usize = 4;
/// Longest statement: the guide's are a hundred bytes, a generated `IN (…)` of a thousand ids 40 KB.
const MAX_SQL_BYTES: usize = 64 * 1024;
/// Most parameters.
const MAX_PARAMS: usize = 1000;
const DEFAULT_ROWS: u32 = 10_000;
const MAX_ROWS: u32 = 100_000;
const DEFAULT_BYTES: u64 = 16 * 1024 * 1024;
const MAX_BYTES: u64 = 64 * 1024 * 1024;
const DEFAULT_TIME: Duration = Duration::from_secs(5);
const MAX_TIME: Duration = Duration::from_secs(30);
/// Largest value and largest row: above the largest job (its command and its environment are 256 KiB each, twice in its
/// row), and well below the largest message.
const MAX_VALUE_BYTES: i32 = 2 * 1024 * 1024;
/// How much the process may grow while a query sorts and materializes in memory (temporary files could fill the disk that
/// the Raft log is on).
const MAX_MEMORY_BYTES: u64 = 256 * 1024 * 1024;
/// Instructions of SQLite's machine between two looks at the budget: some microseconds, and at most this many large values.
const LOOK_EVERY_OPS: i32 = 100;
/// Time between two looks at the memory, which cost a system call.
const LOOK_AT_MEMORY_EVERY: Duration = Duration::from_millis(2);
/// A batch of rows is sent when it has this many bytes: a few of HTTP/2's windows.
const BATCH_BYTES: u64 = 256 * 1024;
/// Messages that wait for a client. With batches of at most [`BATCH_BYTES`] and one row, a few MiB per query.
const WAITING_MESSAGES: usize = 2;
/// How long a client may take, in all, to take the answer in; its snapshot is held meanwhile.
const DELIVERY_TIME: Duration = Duration::from_secs(30);
/// SQLite looks at the budget between instructions, and one may take long (`replace` in a text of 2 MiB). The client is
/// answered at the latest after this much more; the slot stays taken until the instruction is over.
const OVERTIME: Duration = Duration::from_millis(500);
/// How long a query waits while a snapshot is being put in place.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers queries.
pub(crate) struct Queries {
    database: PathBuf,
    slots: Arc<Semaphore>,
    stop: CancellationToken,
}

/// A request that has been checked.
struct Query {
    sql: String,
    params: Vec<Bound>,
    max_rows: u64,
    max_bytes: u64,
    time: Duration,
}

impl Query {
    fn parse(request: wire::QueryRequest) -> Result<Self, Error> {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        if request.sql.trim().is_empty() || request.sql.len() > MAX_SQL_BYTES {
            return Err(invalid("sql", request.sql, &format!("1 to {MAX_SQL_BYTES} bytes")));
        }
        if request.params.len() > MAX_PARAMS {
            return Err(invalid("params", request.params.len(), &format!("at most {MAX_PARAMS} values")));
        }
        if request.max_rows > MAX_ROWS {
            return Err(invalid("max_rows", request.max_rows, &format!("0 to {MAX_ROWS}")));
        }
        if request.max_bytes > MAX_BYTES {
            return Err(invalid("max_bytes", request.max_bytes, &format!("0 to {MAX_BYTES}")));
        }
        let time = match request.timeout_ms {
            0 => DEFAULT_TIME,
            ms => Duration::from_millis(ms.into()),
        };
        if time > MAX_TIME {
            return Err(invalid("timeout_ms", request.timeout_ms, &format!("0 to {}", MAX_TIME.as_millis())));
        }
        let bound = |value: wire::SqlValue| match value.value {
            None => Bound::Null,
            Some(Value::Integer(value)) => Bound::Integer(value),
            Some(Value::Real(value)) => Bound::Real(value),
            Some(Value::Text(value)) => Bound::Text(value),
            Some(Value::Blob(value)) => Bound::Blob(value.to_vec()),
        };
        Ok(Self {
            sql: request.sql,
            params: request.params.into_iter().map(bound).collect(),
            max_rows: or(request.max_rows.into(), DEFAULT_ROWS.into()),
            max_bytes: or(request.max_bytes, DEFAULT_BYTES),
            time,
        })
    }
}

impl Queries {
    pub(crate) fn new(database: PathBuf, stop: CancellationToken) -> Arc<Self> {
        Arc::new(Self { database, slots: Arc::new(Semaphore::new(MAX_QUERIES)), stop })
    }

    /// Starts a query; its answer ends with an error or with a summary.
    pub(crate) fn start(
        &self,
        request: wire::QueryRequest,
    ) -> Result<impl Stream<Item = Result<wire::QueryResponse, Status>> + Send + 'static, Error> {
        let query = Query::parse(request)?;
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            let message = format!("{MAX_QUERIES} queries are under way; try again");
            return Err(Error::new(Reason::Overloaded, message).with("limit", MAX_QUERIES));
        };
        let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
        let time = query.time;
        let (database, stop) = (self.database.clone(), self.stop.clone());
        tokio::task::spawn_blocking(move || {
            let answer = Answer::new(sender, time, stop);
            if let Err(error) = run(&database, query, &answer) {
                // A client that has gone needs no reason.
                let _ = answer.deliver(Err(error.into()));
            }
            drop(slot);
        });
        Ok(stream::unfold(Some(receiver), move |receiver| async move {
            let mut receiver = receiver?;
            match tokio::time::timeout(time + OVERTIME, receiver.recv()).await {
                Ok(message) => message.map(|message| (message, Some(receiver))),
                Err(_) => Some((Err(out_of_time(time).into()), None)),
            }
        }))
    }
}

/// What a query may still use, and why it was ended.
struct Budget {
    time: Duration,
    deadline: Instant,
    memory: ResidentMemory,
    look_at_memory: Instant,
    over: Option<Error>,
}

impl Budget {
    /// Whether the query must end. What is over stays over.
    fn is_over(
        &mut self,
        sender: &mpsc::Sender<Result<wire::QueryResponse, Status>>,
        stop: &CancellationToken,
    ) -> bool {
        let now = Instant::now();
        if self.over.is_none() {
            if now >= self.deadline {
                self.over = Some(out_of_time(self.time));
            } else if sender.is_closed() || stop.is_cancelled() {
                self.over = Some(Error::new(Reason::ShuttingDown, "the query was given up"));
            } else if now >= self.look_at_memory {
                self.look_at_memory = now + LOOK_AT_MEMORY_EVERY;
                if self.memory.growth() > MAX_MEMORY_BYTES {
                    self.over = Some(out_of("memory", MAX_MEMORY_BYTES, "bytes of memory"));
                }
            }
        }
        self.over.is_some()
    }
}

/// Where the messages go, and the budget that sending must not use up.
struct Answer {
    sender: mpsc::Sender<Result<wire::QueryResponse, Status>>,
    stop: CancellationToken,
    budget: Arc<Mutex<Budget>>,
    delivered_by: tokio::time::Instant,
}

impl Answer {
    fn new(sender: mpsc::Sender<Result<wire::QueryResponse, Status>>, time: Duration, stop: CancellationToken) -> Self {
        let now = Instant::now();
        let memory = ResidentMemory::now();
        let budget = Budget { time, deadline: now + time, memory, look_at_memory: now, over: None };
        let delivered_by = tokio::time::Instant::now() + time + DELIVERY_TIME;
        Self { sender, stop, budget: Arc::new(Mutex::new(budget)), delivered_by }
    }

    /// Sends; the time a slow client takes is not the query's.
    fn deliver(&self, message: Result<wire::QueryResponse, Status>) -> Result<(), Error> {
        let began = Instant::now();
        let sent = Handle::current().block_on(tokio::time::timeout_at(self.delivered_by, self.sender.send(message)));
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).deadline += began.elapsed();
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Error::new(Reason::DeadlineExceeded, "the client does not take the answer")),
        }
    }

    fn send(&self, message: Message) -> Result<(), Error> {
        self.deliver(Ok(wire::QueryResponse { message: Some(message) }))
    }

    /// Why SQLite was interrupted.
    fn over(&self) -> Option<Error> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner).over.clone()
    }
}

fn run(database: &PathBuf, query: Query, answer: &Answer) -> Result<(), Error> {
    let connection = open(database).map_err(broken)?;
    // The revision and the rows come from one snapshot.
    connection.execute_batch("BEGIN").map_err(broken)?;
    let revision = newest_revision(&connection).map_err(broken)?;
    let refused = query_rules::enforce(&connection).map_err(broken)?;
    watch_budget(&connection, answer).map_err(broken)?;

    let explain = |error: rusqlite::Error| refused.take().or_else(|| answer.over()).unwrap_or_else(|| failed(error));
    let mut statements = Batch::new(&connection, &query.sql);
    let statement = statements.next().map_err(explain)?;
    let mut statement = statement.ok_or_else(|| invalid("sql", &query.sql, "a statement"))?;
    if statements.next().map_err(explain)?.is_some() {
        return Err(query_rules::refused("more than one statement", "several statements"));
    }
    if !statement.readonly() {
        return Err(query_rules::refused("a statement that writes", "a write"));
    }
    bind(&mut statement, &query.params)?;
    answer.send(Message::Header(wire::QueryHeader { columns: columns(&statement), revision }))?;
    let summary = send_rows(&mut statement, &query, answer, &explain)?;
    answer.send(Message::Summary(summary))
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

/// SQLite asks while it compiles and while it runs.
fn watch_budget(connection: &Connection, answer: &Answer) -> rusqlite::Result<()> {
    let (budget, sender, stop) = (Arc::clone(&answer.budget), answer.sender.clone(), answer.stop.clone());
    let look = move || budget.lock().unwrap_or_else(PoisonError::into_inner).is_over(&sender, &stop);
    connection.progress_handler(LOOK_EVERY_OPS, Some(look))
}

fn bind(statement: &mut Statement<'_>, params: &[Bound]) -> Result<(), Error> {
    let wanted = statement.parameter_count();
    if wanted != params.len() {
        return Err(invalid("params", format!("{} values", params.len()), &format!("{wanted}, as the statement has")));
    }
    for (index, param) in params.iter().enumerate() {
        statement.raw_bind_parameter(index + 1, param).map_err(failed)?;
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
    query: &Query,
    answer: &Answer,
    explain: &dyn Fn(rusqlite::Error) -> Error,
) -> Result<wire::QuerySummary, Error> {
    let width = statement.column_count();
    let mut rows = statement.raw_query();
    let (mut count, mut bytes, mut batch_bytes) = (0, 0, 0);
    let mut batch = Vec::new();
    let mut cut = wire::QueryCut::Unspecified;
    while let Some(row) = rows.next().map_err(explain)? {
        if count == query.max_rows {
            cut = wire::QueryCut::Rows;
            break;
        }
        let (row, row_bytes) = encode(row, width).map_err(explain)?;
        if row_bytes > MAX_VALUE_BYTES as u64 {
            return Err(out_of("value", MAX_VALUE_BYTES as u64, "bytes in one row"));
        }
        if bytes + row_bytes > query.max_bytes {
            cut = wire::QueryCut::Bytes;
            break;
        }
        (count, bytes, batch_bytes) = (count + 1, bytes + row_bytes, batch_bytes + row_bytes);
        batch.push(row);
        if batch_bytes >= BATCH_BYTES {
            answer.send(Message::Rows(wire::QueryRows { rows: std::mem::take(&mut batch) }))?;
            batch_bytes = 0;
        }
    }
    if !batch.is_empty() {
        answer.send(Message::Rows(wire::QueryRows { rows: batch }))?;
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

fn out_of_time(time: Duration) -> Error {
    out_of("time", time.as_millis(), "ms")
}

fn out_of(budget: &str, limit: impl ToString, unit: &str) -> Error {
    let message = format!("the query needs more than {} {unit}: ask for less", limit.to_string());
    Error::new(Reason::QueryBudgetExceeded, message).with("budget", budget).with("limit", limit)
}

/// A statement that does not compile, or that fails at what its author wrote.
fn failed(error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(ErrorCode::TooBig) => out_of("value", MAX_VALUE_BYTES, "bytes in one value"),
        Some(ErrorCode::OutOfMemory) => out_of("memory", MAX_MEMORY_BYTES, "bytes of memory"),
        Some(ErrorCode::Unknown) => {
            let said = match &error {
                rusqlite::Error::SqlInputError { msg, offset, .. } if *offset >= 0 => {
                    format!("{msg}, at byte {offset}")
                }
                rusqlite::Error::SqlInputError { msg, .. } | rusqlite::Error::SqliteFailure(_, Some(msg)) => {
                    msg.clone()
                }
                other => other.to_string(),
            };
            Error::new(Reason::InvalidField, format!("sql: {said}"))
                .with("field", "sql")
                .with("value", "")
                .with("allowed", "a statement that SQLite can run")
        }
        Some(ErrorCode::TypeMismatch) | None => invalid("sql", error, "a statement that SQLite can run"),
        Some(_) => broken(error),
    }
}

/// The database itself failed.
fn broken(error: rusqlite::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "query failed"))
}
