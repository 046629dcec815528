//! A job's output, from attempt to attempt and across restarts of its vmhost.
//!
//! The node that ran an attempt holds its log; this follows the job to that node and passes the records on. When the
//! connection breaks it asks again from the last offset, so the caller's stream goes on without a byte lost or repeated.
//! Those who follow the same attempt share one read of its log ([`crate::hub`]).

use std::time::Duration;

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId},
    job::{Job, JobState},
    limits,
    pb::{
        common::v1::{LogEnd, LogHeartbeat},
        scheduler::v1::{StreamJobLogsResponse, stream_job_logs_response::Record},
        vmhost::v1 as vmhost,
    },
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{
    feed::Subscription,
    hub::{Hubs, Joined, Next, Seat, ended_early, record_of},
    peers::{Peers, VmHostClient, peer_error},
};

/// Records between the vmhost's stream and the caller's: of at most 64 KiB each.
pub(crate) const BUFFER: usize = 16;
/// Pause before a vmhost that broke off, or does not have the log yet, is asked again.
const RETRY_AFTER: Duration = Duration::from_millis(200);

pub(crate) type Sender = mpsc::Sender<Result<StreamJobLogsResponse, Status>>;

/// What the caller asked for.
pub(crate) struct Wanted {
    pub(crate) job_id: JobId,
    /// `None`: the latest, and with `follow` those after it.
    pub(crate) attempt: Option<u32>,
    pub(crate) offset: u64,
    pub(crate) follow: bool,
}

/// Why a stream ends early: the caller has gone, or is told an error.
enum Stop {
    CallerGone,
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// How one pass over an attempt's log ended.
enum Pass {
    /// The log is complete.
    Ended,
    /// The vmhost has no more now, and no follow was asked for.
    CaughtUp,
    /// The connection broke, or the log is not there yet.
    Broken(Error),
}

/// Streams until the end; runs in a task of its own.
pub(crate) async fn stream(peers: Peers, hubs: Hubs, changes: Subscription, wanted: Wanted, sender: Sender) {
    let mut follower = Follower { peers, hubs, changes, sender, offset: wanted.offset, wanted };
    match follower.run().await {
        Ok(()) | Err(Stop::CallerGone) => {}
        Err(Stop::Error(error)) => {
            let _ = follower.sender.send(Err(error.into())).await;
        }
    }
}

struct Follower {
    peers: Peers,
    hubs: Hubs,
    changes: Subscription,
    sender: Sender,
    wanted: Wanted,
    /// The next byte of the attempt that is being read.
    offset: u64,
}

impl Follower {
    async fn run(&mut self) -> Result<(), Stop> {
        let Some(mut attempt) = self.first_attempt().await? else { return Ok(()) };
        loop {
            let job = self.job()?;
            match self.pass(&job, attempt).await? {
                Pass::CaughtUp => return Ok(()),
                Pass::Ended => {
                    let Some(next) = self.next_attempt(attempt).await? else { return Ok(()) };
                    attempt = next;
                    self.offset = 0;
                }
                Pass::Broken(error) => {
                    if !self.worth_retrying(&error, attempt)? {
                        return Err(error.into());
                    }
                    self.pause(attempt).await?;
                }
            }
        }
    }

    fn job(&self) -> Result<Job, Stop> {
        self.changes.changes.borrow().job.clone().ok_or_else(|| Stop::Error(crate::peers::missing("job")))
    }

    /// Waits for the first attempt to be accepted; `None` when there will be none or none is waited for.
    async fn first_attempt(&mut self) -> Result<Option<u32>, Stop> {
        loop {
            let job = self.job()?;
            if let Some(attempt) = self.wanted.attempt {
                if attempt <= job.attempt {
                    return Ok(Some(attempt));
                }
                if !self.wanted.follow || job.state.is_terminal() {
                    return Err(no_such_attempt(&job, attempt).into());
                }
            } else if job.attempt > 0 {
                return Ok(Some(job.attempt));
            } else if job.state.is_terminal() {
                self.send_end(&job, 0).await?;
                return Ok(None);
            } else if !self.wanted.follow {
                return Ok(None);
            }
            self.change(0).await?;
        }
    }

    /// After an attempt's end: the next one if it was lost and the job goes on, else nothing.
    async fn next_attempt(&mut self, attempt: u32) -> Result<Option<u32>, Stop> {
        if !self.wanted.follow || self.wanted.attempt.is_some() {
            return Ok(None);
        }
        loop {
            let job = self.job()?;
            if job.attempt > attempt {
                return Ok(Some(job.attempt));
            }
            if job.state.is_terminal() {
                return Ok(None);
            }
            self.change(attempt).await?;
        }
    }

    /// Waits for the job to change, with heartbeats.
    async fn change(&mut self, attempt: u32) -> Result<(), Stop> {
        loop {
            tokio::select! {
                changed = self.changes.changes.changed() => {
                    return changed.map_err(|_| Stop::Error(Error::new(Reason::ShuttingDown, "the scheduler is shutting down")));
                }
                () = self.sender.closed() => return Err(Stop::CallerGone),
                () = tokio::time::sleep(limits::HEARTBEAT_EVERY) => {
                    self.send(attempt, Record::Heartbeat(LogHeartbeat { next_offset: self.offset })).await?;
                }
            }
        }
    }

    async fn pass(&mut self, job: &Job, attempt: u32) -> Result<Pass, Stop> {
        let mut broken =
            Error::new(Reason::LogNotFound, format!("no node has the log of attempt {attempt} of job {}", job.id))
                .with("job_id", job.id)
                .with("attempt", attempt);
        for node_id in self.candidates(job, attempt) {
            match self.read_from(&node_id, attempt).await? {
                Pass::Broken(error) if error.reason == Reason::LogNotFound => broken = error,
                pass => return Ok(pass),
            }
        }
        // A job that ended without leaving a log there still has an end to tell.
        if broken.reason == Reason::LogNotFound && attempt == job.attempt && job.state.is_terminal() {
            self.send_end(job, attempt).await?;
            return Ok(Pass::Ended);
        }
        Ok(Pass::Broken(broken))
    }

    /// The latest attempt's node is on record; an earlier attempt may have been on any.
    fn candidates(&self, job: &Job, attempt: u32) -> Vec<NodeId> {
        if attempt == job.attempt {
            return job.node_id.iter().cloned().collect();
        }
        self.peers.nodes().keys().cloned().collect()
    }

    async fn read_from(&mut self, node_id: &NodeId, attempt: u32) -> Result<Pass, Stop> {
        let vmhost = match self.peers.vmhost(node_id) {
            Ok(vmhost) => vmhost,
            Err(error) => return Ok(Pass::Broken(error)),
        };
        if !self.wanted.follow {
            let pass = self.read_alone(vmhost, attempt).await?;
            return Ok(pass.unwrap_or(Pass::CaughtUp));
        }
        loop {
            let pass = match self.hubs.join((self.wanted.job_id, attempt), self.offset, vmhost.clone()) {
                Joined::Seat(seat) => self.read_shared(seat, attempt).await?,
                Joined::Apart => self.read_alone(vmhost.clone(), attempt).await?,
            };
            if let Some(pass) = pass {
                return Ok(pass);
            }
        }
    }

    /// Takes what the hub reads for everybody; `None` when it is too far ahead.
    async fn read_shared(&mut self, mut seat: Seat, attempt: u32) -> Result<Option<Pass>, Stop> {
        loop {
            let next = tokio::select! {
                next = seat.next() => next,
                () = self.sender.closed() => return Err(Stop::CallerGone),
            };
            match next {
                Next::Records(records) => {
                    for record in records {
                        if self.forward(attempt, record).await? {
                            return Ok(Some(Pass::Ended));
                        }
                    }
                }
                Next::Heartbeat => {
                    self.send(attempt, Record::Heartbeat(LogHeartbeat { next_offset: self.offset })).await?;
                }
                Next::Behind => return Ok(None),
                Next::Failed(error) => return Ok(Some(Pass::Broken(error))),
            }
        }
    }

    /// Reads the log for this caller only; `None` when a hub has come by, or nothing more is wanted.
    async fn read_alone(&mut self, mut vmhost: VmHostClient, attempt: u32) -> Result<Option<Pass>, Stop> {
        let message = vmhost::StreamLogsRequest {
            job_id: self.wanted.job_id.to_string(),
            attempt,
            offset: self.offset,
            follow: self.wanted.follow,
        };
        let mut records = match vmhost.stream_logs(message).await {
            Ok(records) => records.into_inner(),
            Err(status) => return Ok(Some(Pass::Broken(peer_error("vmhost", &status)))),
        };
        loop {
            let record = tokio::select! {
                record = records.message() => record,
                () = self.sender.closed() => return Err(Stop::CallerGone),
            };
            match record {
                Ok(Some(response)) => {
                    let Some(record) = record_of(response) else { continue };
                    if self.forward(attempt, record).await? {
                        return Ok(Some(Pass::Ended));
                    }
                    if self.wanted.follow && self.hubs.can_join((self.wanted.job_id, attempt), self.offset) {
                        return Ok(None);
                    }
                }
                Ok(None) if self.wanted.follow => return Ok(Some(Pass::Broken(ended_early()))),
                Ok(None) => return Ok(Some(Pass::CaughtUp)),
                Err(status) => return Ok(Some(Pass::Broken(peer_error("vmhost", &status)))),
            }
        }
    }

    /// Passes a record on, without what the caller has already; true when it was the last.
    async fn forward(&mut self, attempt: u32, mut record: Record) -> Result<bool, Stop> {
        let mut last = false;
        match &mut record {
            Record::Chunk(chunk) => {
                let end = chunk.offset + chunk.data.len() as u64;
                if end <= self.offset {
                    return Ok(false);
                }
                if let Some(known) = self.offset.checked_sub(chunk.offset).filter(|&known| known > 0) {
                    chunk.data = chunk.data.slice(usize::try_from(known).unwrap_or(usize::MAX)..);
                    chunk.offset = self.offset;
                }
                self.offset = end;
            }
            Record::Gap(gap) => {
                gap.from_offset = gap.from_offset.max(self.offset);
                if gap.to_offset <= gap.from_offset {
                    return Ok(false);
                }
                self.offset = gap.to_offset;
            }
            Record::End(_) => last = true,
            Record::Heartbeat(_) => {}
        }
        self.send(attempt, record).await?;
        Ok(last)
    }

    /// A log that is not there yet will come while its attempt is the current one and has not ended; a node that is away
    /// may come back for a caller who follows.
    fn worth_retrying(&self, error: &Error, attempt: u32) -> Result<bool, Stop> {
        let job = self.job()?;
        Ok(match error.reason {
            Reason::LogNotFound => self.wanted.follow && job.attempt == attempt && !job.state.is_terminal(),
            Reason::PeerUnavailable | Reason::ShuttingDown | Reason::Overloaded | Reason::DeadlineExceeded => {
                self.wanted.follow
            }
            _ => false,
        })
    }

    /// Waits a moment, or until the vmhost has accepted the attempt.
    async fn pause(&mut self, attempt: u32) -> Result<(), Stop> {
        let accepted = async {
            if self.changes.changes.borrow().accepted < attempt {
                let _ = self.changes.changes.wait_for(|seen| seen.accepted >= attempt).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = accepted => Ok(()),
            () = tokio::time::sleep(RETRY_AFTER) => Ok(()),
            () = self.sender.closed() => Err(Stop::CallerGone),
        }
    }

    async fn send_end(&mut self, job: &Job, attempt: u32) -> Result<(), Stop> {
        let end = LogEnd {
            end_offset: job.log_bytes,
            state: job.state.to_pb().into(),
            exit: job.exit.map(Into::into),
            reason: job.reason.clone(),
        };
        self.send(attempt, Record::End(end)).await
    }

    async fn send(&mut self, attempt: u32, record: Record) -> Result<(), Stop> {
        let response = StreamJobLogsResponse { attempt, record: Some(record) };
        self.sender.send(Ok(response)).await.map_err(|_| Stop::CallerGone)
    }
}

fn no_such_attempt(job: &Job, attempt: u32) -> Error {
    let message = match job.state {
        JobState::Queued if job.attempt == 0 => format!("job {} has not had an attempt yet", job.id),
        _ => format!("job {} has had {} attempts; there is no attempt {attempt}", job.id, job.attempt),
    };
    Error::new(Reason::LogNotFound, message).with("job_id", job.id).with("attempt", attempt)
}
