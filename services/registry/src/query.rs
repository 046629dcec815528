//! SQL for users: one read-only statement, within budgets, from one snapshot.
//!
//! ```text
//!   request ─► slot ─► worker process ──frames──► client
//!                       authorizer: what may be asked     (query_rules)
//!                       progress handler: for how long    (query_worker)
//!                       limits of the kernel: memory
//! ```
//! A worker is this program again, one for each query, because SQLite cannot be stopped while it compiles: forty lines of
//! `WITH` that each name the one before twice take all memory there is. A process can be killed whatever it does, and what
//! it does to itself does not reach the registry (docs/adr/0005). It shares nothing with changes, lists and watches but
//! the file.

use std::{path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use blixard::{
    error::{Error, Reason, invalid},
    pb::registry::v1::{self as wire, query_response::Message},
};
use blixard_chassis::Tasks;
use futures::{Stream, stream};
use prost::Message as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    sync::{Semaphore, mpsc},
    time::Instant,
};
use tonic::Status;

use crate::{
    metrics::METRICS,
    query_worker::{self, Frame, out_of_time},
};

/// Queries at once. Each may keep a core busy for its whole time; the rest of the registry needs one too.
const MAX_QUERIES: usize = 4;
/// Longest statement: the guide's are a hundred bytes, a generated `IN (…)` of a thousand ids 40 KB.
pub(crate) const MAX_SQL_BYTES: usize = 64 * 1024;
/// Most parameters.
pub(crate) const MAX_PARAMS: usize = 1000;
const DEFAULT_ROWS: u32 = 10_000;
const MAX_ROWS: u32 = 100_000;
const DEFAULT_BYTES: u64 = 16 * 1024 * 1024;
const MAX_BYTES: u64 = 64 * 1024 * 1024;
const DEFAULT_TIME: Duration = Duration::from_secs(5);
const MAX_TIME: Duration = Duration::from_secs(30);
/// A worker that does not end its query by itself is killed after this much more than the query's time: it covers the
/// start of the process, too, which the query's time does not.
const OVERTIME: Duration = Duration::from_secs(1);
/// Messages that wait for a client. With batches of at most a quarter of a MiB and one row, a few MiB per query.
const WAITING_MESSAGES: usize = 2;

/// Answers queries.
pub(crate) struct Queries {
    database: PathBuf,
    worker: PathBuf,
    slots: Arc<Semaphore>,
    tasks: Tasks,
}

type Answers = mpsc::Sender<Result<wire::QueryResponse, Status>>;

impl Queries {
    /// `worker` is a program that becomes a worker when asked to ([`query_worker::main`]).
    pub(crate) fn new(database: PathBuf, worker: PathBuf, tasks: Tasks) -> Arc<Self> {
        Arc::new(Self { database, worker, slots: Arc::new(Semaphore::new(MAX_QUERIES)), tasks })
    }

    /// Starts a query; its answer ends with an error or with a summary.
    pub(crate) fn start(
        &self,
        request: wire::QueryRequest,
    ) -> Result<impl Stream<Item = Result<wire::QueryResponse, Status>> + Send + 'static, Error> {
        self.begin(request).inspect_err(|error| METRICS.query_refused(error))
    }

    fn begin(
        &self,
        request: wire::QueryRequest,
    ) -> Result<impl Stream<Item = Result<wire::QueryResponse, Status>> + Send + 'static, Error> {
        let query = checked(request)?;
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            let message = format!("{MAX_QUERIES} queries are under way; try again");
            return Err(Error::new(Reason::Overloaded, message).with("limit", MAX_QUERIES));
        };
        let mut worker = self.start_worker().map_err(broken)?;
        let (sender, receiver) = mpsc::channel(WAITING_MESSAGES);
        let stop = self.tasks.token().clone();
        self.tasks.spawn("query", async move {
            let answered = tokio::select! {
                answered = relay(&mut worker, &query, &sender) => answered,
                () = stop.cancelled() => Err(Error::new(Reason::ShuttingDown, "the query was given up").into()),
                () = sender.closed() => Ok(()),
            };
            if let Err(status) = answered {
                METRICS.query_refused(&Error::from_status(&status));
                // A client that has gone needs no reason; one that is slow finds the end of the stream instead.
                let _ = sender.try_send(Err(status));
            }
            // The place is free when the process is gone.
            let _ = worker.kill().await;
            drop(slot);
        });
        let next = |mut receiver: mpsc::Receiver<_>| async { receiver.recv().await.map(|answer| (answer, receiver)) };
        Ok(stream::unfold(receiver, next))
    }

    fn start_worker(&self) -> std::io::Result<Child> {
        Command::new(&self.worker)
            .arg(query_worker::NAME)
            .arg(&self.database)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
    }
}

/// Checks a request and fills in the defaults.
fn checked(request: wire::QueryRequest) -> Result<wire::QueryRequest, Error> {
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
    if u128::from(request.timeout_ms) > MAX_TIME.as_millis() {
        return Err(invalid("timeout_ms", request.timeout_ms, &format!("0 to {}", MAX_TIME.as_millis())));
    }
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    Ok(wire::QueryRequest {
        max_rows: or(request.max_rows, DEFAULT_ROWS),
        max_bytes: if request.max_bytes == 0 { DEFAULT_BYTES } else { request.max_bytes },
        timeout_ms: or(request.timeout_ms, u32::try_from(DEFAULT_TIME.as_millis()).unwrap_or(u32::MAX)),
        ..request
    })
}

/// Hands the query to the worker and its answer to the client.
async fn relay(worker: &mut Child, query: &wire::QueryRequest, answers: &Answers) -> Result<(), Status> {
    let (Some(mut stdin), Some(mut stdout)) = (worker.stdin.take(), worker.stdout.take()) else {
        return Err(broken("the worker has no pipes").into());
    };
    let time = Duration::from_millis(query.timeout_ms.into());
    // The time in which the client does not take the answer is not the query's.
    let mut left = time + OVERTIME;
    let delivered_by = Instant::now() + time + query_worker::DELIVERY_TIME;
    // A worker that ends before it has read all is explained below.
    let _ = stdin.write_all(&query.encode_to_vec()).await;
    drop(stdin);
    loop {
        let began = Instant::now();
        let frame = tokio::time::timeout(left, read_frame(&mut stdout)).await.map_err(|_| out_of_time(time))?;
        left = left.saturating_sub(began.elapsed());
        let message = match frame {
            Ok(Frame::Message(message)) => message,
            Ok(Frame::Refused(status)) => return Err(status),
            Ok(Frame::Broken(detail)) => return Err(broken(detail).into()),
            Err(error) => return Err(died(worker, &error).await.into()),
        };
        let last = matches!(message.message, Some(Message::Summary(_)));
        let sent = tokio::time::timeout_at(delivered_by, answers.send(Ok(message))).await;
        if sent.is_err() {
            return Err(Error::new(Reason::DeadlineExceeded, "the client does not take the answer").into());
        }
        if last {
            return Ok(());
        }
    }
}

async fn read_frame(stdout: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Frame> {
    let mut head = [0; Frame::HEAD_BYTES];
    stdout.read_exact(&mut head).await?;
    let (kind, bytes) = Frame::head(head);
    let mut body = vec![0; bytes];
    stdout.read_exact(&mut body).await?;
    Frame::decode(kind, body)
}

/// A worker that ended without an answer. What ends one by a signal is the query: memory or stack that it may not have.
async fn died(worker: &mut Child, error: &std::io::Error) -> Error {
    use std::os::unix::process::ExitStatusExt as _;
    match worker.wait().await {
        Ok(status) if status.signal().is_some() => query_worker::out_of_memory(),
        Ok(status) => broken(format!("the worker said {error} and ended with {status}")),
        Err(wait) => broken(wait),
    }
}

/// The database or the worker itself failed.
fn broken(error: impl std::fmt::Display) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "query failed"))
}
