//! Runs one attempt: reads its output from the guest into its log, across broken connections.
//!
//! ```text
//! guest ── RunStarted, output… , RunExited ──► log segments ──► readers
//!       ◄── ack (everything before this offset is stored) ──
//! ```
//! Bytes are acknowledged only after they were written, and after a break the guest is asked for what follows the log's last
//! byte: nothing is lost and nothing comes twice. The agent starts an attempt at most once per boot however often it is asked,
//! so asking again is safe as long as the same boot answers. Every few seconds the guest is told how long it may go on.
//!
//! Before the guest is asked the first time, the attempt's input is fetched; when the command has ended, the files that it leaves.
//!
//! What an event means for the VM is the driver's to decide: at the end it says what the attempt came to, and that is
//! written behind the output.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::ExitStatus,
    pb::{common::v1 as common, guest::v1 as pb},
    time::Timestamp,
};
use futures::{Stream, StreamExt, stream};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::{
    artifacts::ArtifactDir,
    driver::Event,
    guest::{Agent, AgentLink},
    input::{InputSource, NoInput},
    lifecycle::{Input, LEASE_OVER},
    logs::{EndRecord, LogWriter, Outcome},
    node_lease::NodeLease,
};

/// Output that has arrived already is written in one go, up to so many bytes.
const BATCH_BYTES: usize = 256 * 1024;
/// The longest pause between two tries to reach the agent.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// The first pause after the second failure in a row; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// A guest whose agent can't be reached for so long, though its machine lives, is given up.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// What to run.
pub(crate) struct Assignment {
    pub(crate) job: JobId,
    pub(crate) attempt: u32,
    /// `None`: it was begun by an earlier vmhost; only attach to it.
    pub(crate) spec: Option<common::JobSpec>,
    /// The node's incarnation under which it was admitted: with the next one it may have been given to another node.
    pub(crate) incarnation: u64,
    /// The boot of the guest that may run it.
    pub(crate) guest_boot: String,
    /// Files that are kept when its command has ended.
    pub(crate) artifacts: Vec<String>,
    /// Where.
    pub(crate) artifact_dir: Option<ArtifactDir>,
}

/// What an attempt's task needs of others.
pub(crate) struct Lifelines {
    /// The way to its guest.
    pub(crate) link: Arc<AgentLink>,
    /// Where its input comes from.
    pub(crate) inputs: InputSource,
    /// How long it may go on.
    pub(crate) lease: Arc<NodeLease>,
    /// Where its driver listens.
    pub(crate) events: mpsc::Sender<Event>,
}

/// A running attempt's task, to its driver.
pub(crate) struct AttemptHandle {
    close: oneshot::Sender<Outcome>,
    closed: oneshot::Receiver<Arc<EndRecord>>,
    ending: CancellationToken,
}

impl AttemptHandle {
    /// A handle, and the future to run.
    pub(crate) fn new(
        assignment: Assignment,
        log: LogWriter,
        lifelines: Lifelines,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (close, close_receiver) = oneshot::channel();
        let (closed_sender, closed) = oneshot::channel();
        // An earlier vmhost has asked for what is only attached to.
        let asked = assignment.spec.is_none();
        let ending = CancellationToken::new();
        let Lifelines { link, inputs, lease, events } = lifelines;
        let own = ending.clone();
        let pump = Pump {
            assignment,
            log,
            link,
            inputs,
            input: None,
            lease,
            events,
            ending: own,
            asked,
            heard: false,
            started_at: None,
        };
        (Self { close, closed, ending }, pump.run(close_receiver, closed_sender))
    }

    /// The attempt is being ended: one that the guest was not asked for is not begun any more, and nothing more is fetched.
    pub(crate) fn is_ending(&self) {
        self.ending.cancel();
    }

    /// Ends the attempt's log with what it came to; returns when that is on disk. `None` when its task is gone.
    pub(crate) async fn close(self, outcome: Outcome) -> Option<Arc<EndRecord>> {
        self.close.send(outcome).ok()?;
        self.closed.await.ok()
    }
}

struct Pump {
    assignment: Assignment,
    log: LogWriter,
    link: Arc<AgentLink>,
    inputs: InputSource,
    /// What it is given besides its spec, until it has started.
    input: Option<pb::GuestInput>,
    lease: Arc<NodeLease>,
    events: mpsc::Sender<Event>,
    ending: CancellationToken,
    /// Whether the guest may have been asked to start it.
    asked: bool,
    /// Whether the guest has answered on the latest connection.
    heard: bool,
    /// When the command started, once the guest has said so.
    started_at: Option<Timestamp>,
}

/// Why a conversation ended.
enum Broken {
    /// The connection did.
    Connection(Error),
    /// There is nothing more to be had: the driver has been told.
    Final,
}

impl Pump {
    async fn run(mut self, close: oneshot::Receiver<Outcome>, closed: oneshot::Sender<Arc<EndRecord>>) {
        let outcome = tokio::select! {
            outcome = close => outcome,
            // Ends only when vmhost does.
            () = self.converse() => return,
        };
        // Without an outcome vmhost is going; the attempt goes on and the next vmhost attaches to it.
        let Ok(outcome) = outcome else { return };
        let _ = closed.send(self.end(outcome).await);
    }

    async fn end(self, outcome: Outcome) -> Arc<EndRecord> {
        let outcome = match outcome {
            Outcome::Lost { started, reason } => Outcome::Lost { started: started && self.asked, reason },
            result @ Outcome::Result { .. } => result,
        };
        let (end_offset, started_at) = (self.log.next_offset(), self.started_at);
        let end = EndRecord { outcome, end_offset, finished_at: Timestamp::now(), started_at };
        self.log.finish(end).await
    }

    /// Talks to the guest until there is nothing more to be had from it, then waits to be closed.
    async fn converse(&mut self) {
        if self.prepare().await {
            self.talk().await;
        }
        std::future::pending::<()>().await;
    }

    async fn talk(&mut self) {
        let mut outage = Outage::default();
        loop {
            self.heard = false;
            let error = match self.attach().await {
                Broken::Final => return,
                Broken::Connection(error) => error,
            };
            tracing::info!(job_id = %self.assignment.job, %error, offset = self.log.next_offset(),
                "lost the guest agent in the middle of an attempt; attaching again");
            self.link.forget();
            let Some(pause) = outage.broke(self.heard, Instant::now()) else {
                let reason =
                    format!("the guest agent could not be reached for {} s: {error}", AGENT_PATIENCE.as_secs());
                return self.tell(Input::Lost { started: true, usable: false, reason }).await;
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// One connection: from attaching to its end.
    async fn attach(&mut self) -> Broken {
        let mut agent = match self.link.agent().await {
            Ok(agent) => agent,
            Err(error) => return Broken::Connection(error),
        };
        if self.ending.is_cancelled() && !self.asked {
            self.tell(not_begun("it was ended before it began")).await;
            return Broken::Final;
        }
        // A lease that was over and is had again may find it given to another node, if this one was held up in between.
        let may_begin = self.lease.for_guest_ms().is_some() && self.lease.incarnation() == self.assignment.incarnation;
        if !may_begin && !self.asked {
            self.tell(not_begun(LEASE_OVER)).await;
            return Broken::Final;
        }
        if agent.hello.boot_id != self.assignment.guest_boot {
            let reason = "the guest restarted under it".to_owned();
            return self.lost(false, reason).await;
        }
        let (acks, stored) = watch::channel(self.log.next_offset());
        let requests = self.requests(stored);
        self.asked = true;
        match agent.client.run(requests).await {
            Ok(response) => self.read(response.into_inner(), &acks).await,
            Err(status) => self.refused(&agent, status.into()).await,
        }
    }

    /// Fetches what the guest is to be given; false: there is nothing to ask it for, and the driver has been told.
    async fn prepare(&mut self) -> bool {
        let spec = self.assignment.spec.as_ref();
        if spec.is_none_or(|spec| spec.input_digest.is_empty()) {
            return true;
        }
        let fetched = tokio::select! {
            fetched = self.inputs.fetch(self.assignment.job) => fetched,
            () = self.ending.cancelled() => Err(NoInput::Gone),
        };
        let told = match fetched {
            Ok(input) => {
                self.input = Some(input);
                return true;
            }
            Err(NoInput::Gone) if self.ending.is_cancelled() => not_begun("it was ended before it began"),
            Err(NoInput::Gone) => not_begun("its input is gone: the job has ended"),
            Err(NoInput::Unusable(spawn_error)) => Input::Exited { exit: None, spawn_error },
        };
        self.tell(told).await;
        false
    }

    fn requests(&self, stored: watch::Receiver<u64>) -> impl Stream<Item = pb::RunRequest> + Send + 'static {
        let start = pb::RunStart {
            job_id: self.assignment.job.to_string(),
            attempt: self.assignment.attempt,
            spec: self.assignment.spec.clone(),
            resume_offset: self.log.next_offset(),
            attach_only: self.assignment.spec.is_none(),
            input: self.input.clone(),
            // Without a lease, which is there soon or never again, what is only attached to goes on as it is, and nothing begins.
            lease_ms: self.lease.for_guest_ms().unwrap_or(u64::from(self.assignment.spec.is_some())),
        };
        let renewed = (start.lease_ms > 1).then(Instant::now);
        let words = Words { stored, lease: Arc::clone(&self.lease), renewed };
        stream::once(std::future::ready(pb::run_request::Message::Start(start)))
            .chain(stream::unfold(words, |mut words| async move { Some((words.next().await?, words)) }))
            .map(|message| pb::RunRequest { message: Some(message) })
    }

    async fn read(&mut self, mut responses: Streaming<pb::RunResponse>, acks: &watch::Sender<u64>) -> Broken {
        loop {
            let batch = match next_batch(&mut responses).await {
                Ok(batch) => batch,
                Err(error) if error.reason == Reason::PeerUnavailable => return Broken::Connection(error),
                Err(error) => {
                    let agent = self.link.agent().await;
                    return match agent {
                        Ok(agent) => self.refused(&agent, error).await,
                        Err(_) => Broken::Connection(error),
                    };
                }
            };
            self.heard = true;
            if let Some(started) = batch.started {
                // From now on it is attached to, never begun.
                (self.assignment.spec, self.input) = (None, None);
                let now = Timestamp::now();
                let at = started.started_at.map_or(now, Timestamp::from).min(now);
                self.started_at = Some(at);
                self.tell(Input::Started { at }).await;
            }
            if let Err(error) = self.log.append(&batch.output) {
                let reason = format!("its output could not be stored on the node: {error}");
                self.tell(Input::Unstorable { reason }).await;
                return Broken::Final;
            }
            acks.send_if_modified(|stored| {
                let changed = *stored != self.log.next_offset();
                *stored = self.log.next_offset();
                changed
            });
            if let Some(exited) = batch.exited {
                return self.exited(exited).await;
            }
        }
    }

    async fn exited(&mut self, exited: pb::RunExited) -> Broken {
        if exited.end_offset != self.log.next_offset() {
            let stored = self.log.next_offset();
            let message = format!("the guest ended its output at {}, the log is at {stored}", exited.end_offset);
            return Broken::Connection(Error::new(Reason::PeerUnavailable, message));
        }
        let exit = match exited.exit.map(|exit| ExitStatus::parse("exited.exit", exit)).transpose() {
            Ok(exit) => exit,
            Err(error) => return self.lost(false, format!("the guest's answer makes no sense: {error}")).await,
        };
        if exited.lease_over {
            return self.lost(true, LEASE_OVER.to_owned()).await;
        }
        self.collect().await;
        let spawn_error = if exit.is_none() && exited.spawn_error.is_empty() {
            "it could not be started".to_owned()
        } else {
            exited.spawn_error
        };
        self.tell(Input::Exited { exit, spawn_error }).await;
        Broken::Final
    }

    /// Fetches the files that the attempt leaves. Whoever ends it meanwhile does not want them.
    async fn collect(&self) {
        let Some(dir) = self.assignment.artifact_dir.as_ref().filter(|_| !self.assignment.artifacts.is_empty()) else {
            return;
        };
        self.tell(Input::Collecting).await;
        let fetching = dir.fetch(&self.link, &self.assignment.guest_boot, &self.assignment.artifacts);
        let fetched = tokio::select! {
            fetched = fetching => fetched,
            () = self.ending.cancelled() => Ok(()),
        };
        if let Err(error) = fetched {
            tracing::error!(job_id = %self.assignment.job, %error, "the files of an attempt could not be stored");
        }
    }

    /// The guest answered with an error.
    async fn refused(&mut self, agent: &Agent, error: Error) -> Broken {
        match error.reason {
            // It was never started in this boot of the guest.
            Reason::JobNotFound => {
                self.tell(not_begun(&error.message)).await;
                Broken::Final
            }
            // It was, and what was left of it is gone.
            Reason::StaleAttempt => self.lost(true, error.message).await,
            Reason::GuestRefused | Reason::InvalidField => {
                tracing::warn!(job_id = %self.assignment.job, %error, kernel = agent.hello.kernel_release,
                    "the guest refused an attempt");
                self.lost(false, format!("the guest refused it: {error}")).await
            }
            _ => Broken::Connection(error),
        }
    }

    async fn lost(&mut self, usable: bool, reason: String) -> Broken {
        self.tell(Input::Lost { started: true, usable, reason }).await;
        Broken::Final
    }

    async fn tell(&self, input: Input) {
        // The driver is gone only when vmhost is going.
        let _ = self.events.send(Event::Input(input)).await;
    }
}

/// What the guest is told after the first message: what has been stored, and that it may go on. Ends with the conversation.
struct Words {
    /// Only the latest is kept: acknowledgements never queue up.
    stored: watch::Receiver<u64>,
    lease: Arc<NodeLease>,
    /// When the guest was told last that it may go on.
    renewed: Option<Instant>,
}

impl Words {
    async fn next(&mut self) -> Option<pb::run_request::Message> {
        tokio::select! {
            changed = self.stored.changed() => {
                changed.ok()?;
                let offset = *self.stored.borrow_and_update();
                Some(pb::run_request::Message::Ack(pb::RunAck { offset }))
            }
            lease_ms = self.lease.renewal(self.renewed) => {
                self.renewed = Some(Instant::now());
                Some(pb::run_request::Message::Renew(pb::RunRenew { lease_ms }))
            }
        }
    }
}

/// The guest has nothing of it, and is sound.
fn not_begun(reason: &str) -> Input {
    Input::Lost { started: false, usable: true, reason: reason.to_owned() }
}

/// Since when the agent has not answered, and how long to wait before the next try.
#[derive(Default)]
struct Outage {
    since: Option<Instant>,
    pause: Duration,
}

impl Outage {
    /// A connection broke, on which the guest had been `heard` or not: the pause before the next. `None`: patience is over.
    /// However long the guest was heard without a word of output, an outage begins at its break.
    fn broke(&mut self, heard: bool, now: Instant) -> Option<Duration> {
        if heard {
            *self = Self::default();
        }
        let since = *self.since.get_or_insert(now);
        let pause = self.pause;
        self.pause = (pause * 2).clamp(FIRST_PAUSE, MAX_PAUSE);
        (now.duration_since(since) <= AGENT_PATIENCE).then_some(pause)
    }
}

/// Messages that can be handled together.
#[derive(Default)]
struct Batch {
    started: Option<pb::RunStarted>,
    output: Vec<common::LogChunk>,
    exited: Option<pb::RunExited>,
}

/// Waits for a message and takes what else has arrived with it.
async fn next_batch(responses: &mut Streaming<pb::RunResponse>) -> Result<Batch, Error> {
    let mut batch = Batch::default();
    let mut bytes = 0;
    let mut next = Some(responses.next().await);
    while let Some(message) = next.take() {
        let message = match message {
            Some(Ok(message)) => message.message,
            // Keep what came before; the error comes again with the next read.
            Some(Err(_)) | None if !batch.output.is_empty() || batch.started.is_some() => break,
            Some(Err(status)) => return Err(status.into()),
            None => return Err(Error::new(Reason::PeerUnavailable, "the guest agent closed the stream")),
        };
        match message {
            Some(pb::run_response::Message::Started(started)) => batch.started = Some(started),
            Some(pb::run_response::Message::Output(chunk)) => {
                bytes += chunk.data.len();
                batch.output.push(chunk);
            }
            Some(pb::run_response::Message::Exited(exited)) => {
                batch.exited = Some(exited);
                break;
            }
            None => {}
        }
        if bytes < BATCH_BYTES {
            next = ready_now(responses).await;
        }
    }
    Ok(batch)
}

/// A message that is here already.
async fn ready_now(
    responses: &mut Streaming<pb::RunResponse>,
) -> Option<Option<Result<pb::RunResponse, tonic::Status>>> {
    poll_fn(|context| match responses.poll_next_unpin(context) {
        Poll::Ready(message) => Poll::Ready(Some(message)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_with_an_agent_begins_anew_once_it_was_heard_though_the_job_was_silent() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.broke(true, start), Some(Duration::ZERO));
        let later = start + AGENT_PATIENCE * 10;
        assert_eq!(outage.broke(true, later), Some(Duration::ZERO), "heard in between");
        assert_eq!(outage.broke(false, later + AGENT_PATIENCE), Some(FIRST_PAUSE));
        assert_eq!(outage.broke(false, later + AGENT_PATIENCE + FIRST_PAUSE), None);
    }
}
