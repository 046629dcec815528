//! Reads a job's log to its end across broken connections, losing and repeating nothing.
//!
//! The cursor is (attempt, offset of the next byte). Whenever the stream breaks, a new one is opened there; what a server
//! repeats is cut off, what it skips becomes a gap. It must not know what is done with the records.

use std::time::Duration;

use backon::BackoffBuilder as _;
use blixard::{
    error::{Error, Reason},
    job::{ExitStatus, Job, JobState},
    limits,
    pb::{
        common::v1::{LogChunk, LogEnd, LogStream},
        scheduler::v1 as pb,
    },
    time::Timestamp,
};
use bytes::Bytes;
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::{
    client::{Client, backoff, is_transient, parse_job},
    progress::Progress,
};

/// A stream that has been silent this long is dead: three heartbeats are missing.
const SILENCE: Duration = Duration::from_secs(3 * limits::HEARTBEAT_EVERY.as_secs());
/// How long a control plane may be away before we give up.
const PATIENCE: Duration = Duration::from_secs(300);
/// Streams in a row that may end early without an error and without a byte.
const EMPTY_STREAMS: u32 = 20;

/// What a log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LogRecord {
    /// Bytes.
    Chunk { attempt: u32, stream: LogStream, offset: u64, time: Timestamp, data: Bytes },
    /// Bytes that are gone.
    Gap { attempt: u32, from_offset: u64, to_offset: u64, reason: String },
    /// The attempt's log is complete.
    End { attempt: u32, end_offset: u64, state: JobState, exit: Option<ExitStatus>, reason: String },
}

impl LogRecord {
    /// The attempt it belongs to.
    pub(crate) fn attempt(&self) -> u32 {
        match self {
            Self::Chunk { attempt, .. } | Self::Gap { attempt, .. } | Self::End { attempt, .. } => *attempt,
        }
    }
}

/// Where to begin and how far to go.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Position {
    /// 0: the latest attempt.
    pub(crate) attempt: u32,
    /// The first byte wanted.
    pub(crate) offset: u64,
    /// Wait for more until the attempt ends.
    pub(crate) follow: bool,
}

/// Where records come from.
enum Source {
    Log(Box<Streaming<pb::StreamJobLogsResponse>>),
    /// The stream that submitted the job: it tells the job's changes, too.
    Run(Box<Streaming<pb::RunJobResponse>>, Progress),
}

/// See the module.
pub(crate) struct LogFollower {
    client: Client,
    job_id: String,
    /// The job as it was last told of.
    job: Option<Job>,
    /// The attempt that was asked for; 0 follows from one to the next.
    asked: u32,
    at: Position,
    stream: Option<Source>,
    outage: Outage,
    /// The end of attempt `at.attempt` was seen.
    ended: bool,
    /// Streams in a row that closed without a word.
    empty_streams: u32,
}

impl LogFollower {
    pub(crate) fn new(client: Client, job_id: String, at: Position) -> Self {
        Self {
            client,
            job_id,
            job: None,
            asked: at.attempt,
            at,
            stream: None,
            outage: Outage::default(),
            ended: false,
            empty_streams: 0,
        }
    }

    /// From the first byte of a job that is being submitted; what becomes of it is shown until there is output.
    pub(crate) fn of_run(
        client: Client,
        job_id: String,
        events: Streaming<pb::RunJobResponse>,
        progress: Progress,
    ) -> Self {
        let start = Position { attempt: 0, offset: 0, follow: true };
        let mut this = Self::new(client, job_id, start);
        this.stream = Some(Source::Run(Box::new(events), progress));
        this
    }

    /// The job, once it is known to have ended.
    pub(crate) fn ended_job(&mut self) -> Option<Job> {
        self.job.take_if(|job| job.state.is_terminal())
    }

    /// Where the next byte will be.
    pub(crate) fn position(&self) -> Position {
        self.at
    }

    /// The next record; `None` once the log is complete or, without `follow`, at the last byte there is.
    ///
    /// # Errors
    /// The control plane refused, or was away for too long.
    pub(crate) async fn next(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            let message = match self.receive().await {
                Ok(message) => message,
                Err(status) if is_transient(&status) => {
                    self.stream = None;
                    self.outage.wait(&status).await?;
                    continue;
                }
                Err(status) => return Err(Error::from_status(&status)),
            };
            let Some(message) = message else {
                self.stream = None;
                if self.closed().await? {
                    return Ok(None);
                }
                continue;
            };
            self.outage = Outage::default();
            if let Some(record) = self.take(message)? {
                self.empty_streams = 0;
                return Ok(Some(record));
            }
        }
    }

    async fn receive(&mut self) -> Result<Option<pb::StreamJobLogsResponse>, Status> {
        if self.stream.is_none() {
            if self.ended && self.asked == 0 && self.at.follow {
                // The stream broke between two attempts: what comes next, if anything, is the next attempt.
                let job = self.client.get_job(&self.job_id).await?;
                if job.attempt <= self.at.attempt {
                    return if job.state.is_terminal() {
                        Ok(None)
                    } else {
                        Err(Error::new(Reason::PeerUnavailable, "the next attempt has not begun").into())
                    };
                }
                self.at = Position { attempt: self.at.attempt + 1, offset: 0, follow: true };
                self.ended = false;
            }
            let request = pb::StreamJobLogsRequest {
                job_id: self.job_id.clone(),
                attempt: self.at.attempt,
                offset: self.at.offset,
                follow: self.at.follow,
            };
            self.stream = Some(Source::Log(Box::new(self.client.stream_job_logs(request).await?)));
        }
        match tokio::time::timeout(SILENCE, self.message()).await {
            Ok(message) => message,
            Err(_) => Err(Status::unavailable("the log stream fell silent")),
        }
    }

    /// The stream's next message about the log.
    async fn message(&mut self) -> Result<Option<pb::StreamJobLogsResponse>, Status> {
        use pb::run_job_response::Event;
        loop {
            let event = match &mut self.stream {
                None => return Ok(None),
                Some(Source::Log(records)) => return records.message().await,
                Some(Source::Run(events, progress)) => match events.message().await? {
                    None => return Ok(None),
                    Some(event) => {
                        if let Some(Event::Job(change)) = &event.event {
                            progress.show(change);
                        }
                        event.event
                    }
                },
            };
            match event {
                Some(Event::Log(record)) => return Ok(Some(record)),
                Some(Event::Job(change)) => self.job = Some(parse_job(change.job)?),
                None => {}
            }
        }
    }

    /// The server closed the stream without an error. Whether that was all.
    async fn closed(&mut self) -> Result<bool, Error> {
        if !self.at.follow {
            return Ok(true);
        }
        if self.ended && self.job.as_ref().is_some_and(|job| job.state.is_terminal() && job.attempt <= self.at.attempt)
        {
            return Ok(true);
        }
        let job = self.client.get_job(&self.job_id).await?;
        let over = job.state.is_terminal();
        if self.ended && (self.asked != 0 || (over && job.attempt <= self.at.attempt)) {
            return Ok(true);
        }
        // A job that ended before its first attempt has no log.
        if over && job.attempt == 0 {
            return Ok(true);
        }
        self.empty_streams += 1;
        if self.empty_streams > EMPTY_STREAMS {
            let message = format!("the log stream ended early at offset {} again and again", self.at.offset);
            return Err(Error::new(Reason::PeerUnavailable, message));
        }
        self.outage.wait(&Status::unavailable("the log stream ended early")).await?;
        Ok(false)
    }

    fn take(&mut self, message: pb::StreamJobLogsResponse) -> Result<Option<LogRecord>, Error> {
        use pb::stream_job_logs_response::Record;
        let attempt = message.attempt;
        if attempt > self.at.attempt {
            let offset = if self.at.attempt == 0 { self.at.offset } else { 0 };
            self.at = Position { attempt, offset, ..self.at };
            self.ended = false;
        } else if attempt < self.at.attempt {
            return Ok(None);
        }
        match message.record {
            Some(Record::Chunk(chunk)) => Ok(self.chunk(attempt, chunk)),
            Some(Record::Gap(gap)) => {
                let from_offset = gap.from_offset.max(self.at.offset);
                self.at.offset = self.at.offset.max(gap.to_offset);
                let to_offset = gap.to_offset;
                Ok((from_offset < to_offset).then_some(LogRecord::Gap {
                    attempt,
                    from_offset,
                    to_offset,
                    reason: gap.reason,
                }))
            }
            Some(Record::End(end)) => self.end(attempt, end),
            Some(Record::Heartbeat(_)) | None => Ok(None),
        }
    }

    fn chunk(&mut self, attempt: u32, chunk: LogChunk) -> Option<LogRecord> {
        let end = chunk.offset + chunk.data.len() as u64;
        let repeated = self.at.offset.saturating_sub(chunk.offset);
        if chunk.data.is_empty() || end <= self.at.offset {
            return None;
        }
        self.at.offset = end;
        // `repeated` is below the length: the end lies beyond the cursor.
        let data = chunk.data.slice(usize::try_from(repeated).unwrap_or(0)..);
        Some(LogRecord::Chunk {
            attempt,
            stream: LogStream::try_from(chunk.stream).unwrap_or(LogStream::Stdout),
            offset: chunk.offset + repeated,
            time: chunk.time.unwrap_or_default().into(),
            data,
        })
    }

    fn end(&mut self, attempt: u32, end: LogEnd) -> Result<Option<LogRecord>, Error> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(None);
        }
        Ok(Some(LogRecord::End {
            attempt,
            end_offset: end.end_offset,
            state: JobState::from_pb("end.state", end.state)?,
            exit: end.exit.map(|exit| ExitStatus::parse("end.exit", exit)).transpose()?,
            reason: end.reason,
        }))
    }
}

/// The time since the control plane was last heard of.
#[derive(Default)]
pub(crate) struct Outage(Option<(Instant, backon::ExponentialBackoff)>);

impl Outage {
    /// Waits a little longer each time.
    ///
    /// # Errors
    /// `status`, once the patience is at an end.
    pub(crate) async fn wait(&mut self, status: &Status) -> Result<(), Error> {
        let (since, backoff) = self.0.get_or_insert_with(|| (Instant::now(), backoff().without_max_times().build()));
        if since.elapsed() > PATIENCE {
            return Err(Error::from_status(status));
        }
        tokio::time::sleep(backoff.next().unwrap_or(Duration::from_secs(5))).await;
        Ok(())
    }
}
