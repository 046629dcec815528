//! One attempt: its process, its output, and the one stream that reads it.
//!
//! A job ends with its main process. What that leaves behind (background children, pipelines it did not wait for) has
//! [`STRAGGLER_GRACE`] to write its last words and end; then it is killed. So an attempt always ends, and when it has
//! ended no process of it is left and every byte that was written to its pipes is in its log.
//!
//! ```text
//!   spawn ─► running ─► main process exits ─► stragglers end or are killed ─► pipes are empty ─► ended
//!              └───────────── output flows all the while, as far as there is room ──────────┘
//! ```

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    job::ExitStatus,
    limits,
    pb::{
        common::v1 as pbc,
        common::v1::LogStream,
        guest::v1::{self as pb, run_response::Message},
    },
    time::Timestamp,
};
use bytes::{Bytes, BytesMut};
use futures::{Stream, stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::AsyncWriteExt,
    net::unix::pipe,
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    admission::AttemptId,
    command::{PIPE_BYTES, Running},
    lease::Lease,
    output::{NotKept, OutputBuffer},
    processes::Processes,
    redact::{Redactor, Secrets},
};

/// How long what a job's main process left behind may go on: enough for `tee` or `cat` at the end of a pipe to write
/// what it has already been given.
const STRAGGLER_GRACE: Duration = Duration::from_millis(500);

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    /// The main process's end, or why there was none.
    exit: Result<ExitStatus, String>,
    /// It was killed because the lease had run out.
    lease_over: bool,
    finished_at: Timestamp,
}

#[derive(Debug)]
struct State {
    output: OutputBuffer,
    outcome: Option<Outcome>,
    /// The host has been sent the outcome, on a stream that it read to the end.
    outcome_delivered: bool,
    /// Only the latest stream goes on.
    stream: StreamNumber,
    /// Why the latest stream must end before its time.
    broken_off: Option<Error>,
}

/// Counts the streams that have read an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamNumber(u64);

/// An attempt, running or ended. Kept until another one begins.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// Which.
    pub(crate) id: AttemptId,
    started_at: Timestamp,
    state: Mutex<State>,
    /// Taken out of the output.
    secrets: Secrets,
    lease: watch::Sender<Lease>,
    /// Output, outcome or stream number changed.
    changed: watch::Sender<()>,
    /// The host acknowledged something.
    room: Notify,
}

impl Attempt {
    /// An attempt that starts now.
    #[must_use]
    pub(crate) fn new(id: AttemptId, lease: Lease, secrets: Secrets) -> Self {
        let state = State {
            output: OutputBuffer::default(),
            outcome: None,
            outcome_delivered: false,
            stream: StreamNumber(0),
            broken_off: None,
        };
        Self {
            id,
            started_at: Timestamp::now(),
            state: Mutex::new(state),
            secrets,
            lease: watch::Sender::new(lease),
            changed: watch::Sender::new(()),
            room: Notify::new(),
        }
    }

    /// Whether it has not ended yet.
    #[must_use]
    pub(crate) fn is_live(&self) -> bool {
        self.lock().outcome.is_none()
    }

    /// Whether it runs, or has ended and the host may not have everything yet.
    #[must_use]
    pub(crate) fn is_owed(&self) -> bool {
        let state = self.lock();
        let everything_acknowledged = state.output.start() == state.output.end();
        !(state.outcome.is_some() && state.outcome_delivered && everything_acknowledged)
    }

    /// Waits until it has ended and the host has been sent all of it; `false` when `patience` ran out first.
    pub(crate) async fn delivered(&self, patience: Duration) -> bool {
        let mut changed = self.changed.subscribe();
        let delivered = changed.wait_for(|()| self.lock().outcome_delivered);
        tokio::time::timeout(patience, delivered).await.is_ok_and(|result| result.is_ok())
    }

    /// The host has every byte before `offset`.
    ///
    /// # Errors
    /// It can't have: the attempt has not written that much.
    pub(crate) fn acknowledge(&self, offset: u64) -> Result<(), Error> {
        self.lock().output.acknowledge(offset).map_err(|kept| not_kept(offset, kept))?;
        self.room.notify_waiters();
        Ok(())
    }

    /// It may go on for so long from now.
    pub(crate) fn renew(&self, lease_ms: u64) {
        self.lease.send_modify(|lease| *lease = lease.renewed(Instant::now(), lease_ms));
    }

    /// The command could not be started.
    pub(crate) fn fail_to_start(&self, why: &str) {
        // A PATH may be a secret too.
        self.end(Err(self.secrets.redact(why)), false);
    }

    /// Follows the command until it has ended. The attempt's one task.
    pub(crate) async fn drive(self: Arc<Self>, running: Running, stdin: Bytes, processes: Arc<Processes>) {
        let mut exit = processes.exit_of(running.pid);
        let all_ended = CancellationToken::new();
        let end = async {
            let (exit, lease_over) = tokio::select! {
                biased;
                exit = &mut exit => (exit, false),
                () = lease_over(self.lease.subscribe()) => {
                    // Without a word on stderr: who read it may be what is gone.
                    processes.kill_all().await;
                    (exit.await, true)
                }
            };
            if !processes.none_left(STRAGGLER_GRACE).await && !processes.kill_all().await {
                eprintln!("job {}: processes survive SIGKILL; going on without them", self.id.job_id);
            }
            all_ended.cancel();
            (exit.map_err(|_| "the agent lost track of the process".to_owned()), lease_over)
        };
        let pumps = async {
            tokio::join!(
                self.pump(LogStream::Stdout, running.stdout, &all_ended),
                self.pump(LogStream::Stderr, running.stderr, &all_ended),
                feed(running.stdin, &stdin, &all_ended),
            )
        };
        let ((exit, lease_over), _) = tokio::join!(end, pumps);
        self.end(exit, lease_over);
    }

    fn end(&self, exit: Result<ExitStatus, String>, lease_over: bool) {
        self.lock().outcome = Some(Outcome { exit, lease_over, finished_at: Timestamp::now() });
        self.changed.send_replace(());
    }

    /// Moves one pipe's bytes into the buffer, and what was held back of them last.
    async fn pump(&self, stream: LogStream, pipe: OwnedFd, all_ended: &CancellationToken) {
        let mut redactor = Redactor::default();
        self.pump_to_end(stream, pipe, &mut redactor, all_ended).await;
        self.say(stream, &redactor.finish(&self.secrets));
    }

    /// To the pipe's end or, when all processes of the job have ended, until it is empty (somebody outside of the job may hold the
    /// other end).
    async fn pump_to_end(
        &self,
        stream: LogStream,
        pipe: OwnedFd,
        redactor: &mut Redactor,
        all_ended: &CancellationToken,
    ) {
        let pipe = match pipe::Receiver::from_owned_fd(pipe) {
            Ok(pipe) => pipe,
            Err(error) => return eprintln!("job {}: cannot watch a pipe: {error}", self.id.job_id),
        };
        // What the job wrote before it ended is in the pipe, so it is no more than the pipe holds.
        let mut left_after_end = PIPE_BYTES;
        loop {
            self.wait_for_room().await;
            if all_ended.is_cancelled() && (left_after_end == 0 || is_empty(&pipe)) {
                return;
            }
            tokio::select! {
                biased;
                ready = pipe.readable() => if ready.is_err() { return },
                () = all_ended.cancelled(), if !all_ended.is_cancelled() => continue,
            }
            match self.read(stream, &pipe, redactor) {
                Ok(0) => return,
                Ok(length) => {
                    if all_ended.is_cancelled() {
                        left_after_end = left_after_end.saturating_sub(length);
                    }
                    // Lets the stream send this while it is in the CPU's cache.
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return eprintln!("job {}: cannot read a pipe: {error}", self.id.job_id),
            }
        }
    }

    async fn wait_for_room(&self) {
        loop {
            let acknowledged = self.room.notified();
            if self.lock().output.room() > 0 {
                return;
            }
            acknowledged.await;
        }
    }

    fn read(&self, stream: LogStream, pipe: &pipe::Receiver, redactor: &mut Redactor) -> io::Result<usize> {
        let mut state = self.lock();
        let room = state.output.room();
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if !self.secrets.is_empty() {
            drop(state);
            let mut bytes = BytesMut::with_capacity(room.min(limits::MAX_LOG_CHUNK));
            let length = pipe.try_read_buf(&mut bytes)?;
            self.say(stream, &redactor.push(&self.secrets, &bytes));
            return Ok(length);
        }
        let length = state.output.append(stream, Timestamp::now(), |into| pipe.try_read_buf(into))?;
        drop(state);
        self.changed.send_replace(());
        Ok(length)
    }

    fn say(&self, stream: LogStream, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.lock().output.push(stream, Timestamp::now(), bytes);
            self.changed.send_replace(());
        }
    }

    /// Makes a new stream the one that reads on; it ends the one before. The host has every byte before `offset`.
    ///
    /// # Errors
    /// The offset was acknowledged before, or lies beyond what was written.
    pub(crate) fn attach(&self, offset: u64) -> Result<StreamNumber, Error> {
        let number = {
            let mut state = self.lock();
            state.output.chunk_from(offset).map_err(|kept| not_kept(offset, kept))?;
            state.stream = StreamNumber(state.stream.0 + 1);
            state.broken_off = None;
            state.stream
        };
        self.acknowledge(offset)?;
        self.changed.send_replace(());
        Ok(number)
    }

    /// Ends a stream with an error, unless it has ended or a newer one has taken over.
    pub(crate) fn break_off(&self, stream: StreamNumber, error: Error) {
        let mut state = self.lock();
        if state.stream == stream {
            state.broken_off = Some(error);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// What the host is told on a stream: everything from `offset` on.
    pub(crate) fn responses(
        self: Arc<Self>,
        number: StreamNumber,
        offset: u64,
    ) -> impl Stream<Item = Result<pb::RunResponse, Status>> + Send + use<> {
        let changed = self.changed.subscribe();
        let reader = Reader { attempt: self, number, offset, phase: Phase::Started };
        stream::unfold((reader, changed), |(mut reader, mut changed)| async move {
            let item = reader.next(&mut changed).await?;
            Some((item, (reader, changed)))
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when a lease has run out.
async fn lease_over(mut lease: watch::Receiver<Lease>) {
    loop {
        let current = *lease.borrow_and_update();
        if current.is_over(Instant::now()) {
            return;
        }
        let end = async {
            match current {
                Lease::Unlimited => std::future::pending().await,
                Lease::Until(end) => tokio::time::sleep_until(end).await,
            }
        };
        tokio::select! {
            () = end => {}
            // The attempt holds the sender.
            Ok(()) = lease.changed() => {}
        }
    }
}

/// Gives a command what it reads, then the end of the file. One that does not read it, or not all, is no fault.
async fn feed(pipe: Option<OwnedFd>, stdin: &[u8], all_ended: &CancellationToken) {
    let Some(pipe) = pipe else { return };
    let write = async { pipe::Sender::from_owned_fd(pipe)?.write_all(stdin).await };
    tokio::select! {
        // The only error there is: nobody reads on.
        _ = write => {}
        () = all_ended.cancelled() => {}
    }
}

/// Whether nothing can be read now, nor the end of the stream.
fn is_empty(pipe: &pipe::Receiver) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

fn not_kept(offset: u64, kept: NotKept) -> Error {
    if offset > kept.end {
        Error::new(
            Reason::OffsetBeyondEnd,
            format!("offset {offset} lies beyond the {} bytes written so far", kept.end),
        )
        .with("offset", offset)
        .with("end_offset", kept.end)
    } else {
        Error::new(
            Reason::GuestRefused,
            format!("offset {offset} was acknowledged: only bytes from {} on are kept", kept.start),
        )
        .with("offset", offset)
        .with("start_offset", kept.start)
    }
}

enum Phase {
    Started,
    Output,
    Exited,
    Over,
}

/// What one response stream has sent so far.
struct Reader {
    attempt: Arc<Attempt>,
    number: StreamNumber,
    offset: u64,
    phase: Phase,
}

impl Reader {
    async fn next(&mut self, changed: &mut watch::Receiver<()>) -> Option<Result<pb::RunResponse, Status>> {
        loop {
            changed.borrow_and_update();
            match self.step() {
                Step::Send(message) => return Some(Ok(pb::RunResponse { message: Some(message) })),
                Step::Fail(error) => return Some(Err(error.into())),
                Step::End => return None,
                Step::Wait => changed.changed().await.ok()?,
            }
        }
    }

    fn step(&mut self) -> Step {
        let attempt = self.attempt.clone();
        let mut state = attempt.lock();
        match self.phase {
            Phase::Started => {
                self.phase = Phase::Output;
                Step::Send(Message::Started(pb::RunStarted { started_at: Some(attempt.started_at.into()) }))
            }
            Phase::Output if state.stream != self.number => {
                self.fail(Error::new(Reason::GuestRefused, "a newer stream has taken this attempt over"))
            }
            Phase::Output => self.read_on(&mut state),
            Phase::Exited => {
                self.phase = Phase::Over;
                state.outcome_delivered = true;
                drop(state);
                attempt.changed.send_replace(());
                Step::End
            }
            Phase::Over => Step::End,
        }
    }

    fn read_on(&mut self, state: &mut State) -> Step {
        if let Some(error) = state.broken_off.take() {
            return self.fail(error);
        }
        match (state.output.chunk_from(self.offset), &state.outcome) {
            (Err(kept), _) => self.fail(not_kept(self.offset, kept)),
            (Ok(Some(chunk)), _) => {
                self.offset += chunk.data.len() as u64;
                Step::Send(Message::Output(pbc::LogChunk {
                    stream: chunk.stream.into(),
                    offset: chunk.offset,
                    time: Some(chunk.time.into()),
                    data: chunk.data,
                }))
            }
            (Ok(None), Some(outcome)) => {
                self.phase = Phase::Exited;
                Step::Send(Message::Exited(exited(outcome, self.offset)))
            }
            (Ok(None), None) => Step::Wait,
        }
    }

    fn fail(&mut self, error: Error) -> Step {
        self.phase = Phase::Over;
        Step::Fail(error)
    }
}

enum Step {
    Send(Message),
    Fail(Error),
    End,
    Wait,
}

fn exited(outcome: &Outcome, end_offset: u64) -> pb::RunExited {
    let (exit, spawn_error) = match &outcome.exit {
        Ok(status) => (Some((*status).into()), String::new()),
        Err(why) => (None, why.clone()),
    };
    pb::RunExited {
        exit,
        spawn_error,
        end_offset,
        finished_at: Some(outcome.finished_at.into()),
        lease_over: outcome.lease_over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_attempt_outlives_its_lease_as_often_as_that_is_renewed_and_no_longer() {
        let id = AttemptId { job_id: blixard::id::JobId::random(), number: 1 };
        let attempt = Attempt::new(id, Lease::granted(Instant::now(), 1000), Secrets::default());
        let over = lease_over(attempt.lease.subscribe());
        tokio::pin!(over);
        let begun = Instant::now();
        for _ in 0..3 {
            assert!(tokio::time::timeout(Duration::from_millis(900), &mut over).await.is_err(), "it was renewed");
            attempt.renew(1000);
        }
        over.await;
        assert_eq!(begun.elapsed(), Duration::from_millis(3 * 900 + 1000));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_without_a_lease_goes_on_until_it_is_given_one() {
        let id = AttemptId { job_id: blixard::id::JobId::random(), number: 1 };
        let attempt = Attempt::new(id, Lease::Unlimited, Secrets::default());
        let over = lease_over(attempt.lease.subscribe());
        tokio::pin!(over);
        assert!(tokio::time::timeout(Duration::from_secs(1_000_000), &mut over).await.is_err());
        attempt.renew(5);
        over.await;
    }
}
