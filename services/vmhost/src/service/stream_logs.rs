//! One follower of a log: what is stored, then what comes, then the end.
//!
//! It is woken by the log's writer; no timer stands between a byte's arrival and its way out.

use std::{collections::VecDeque, io, sync::Arc};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::JobState,
    limits::HEARTBEAT_EVERY,
    pb::{common::v1 as common, vmhost::v1 as pb},
};
use futures::{StreamExt, stream, stream::BoxStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    blocking::blocking,
    host::Host,
    logs::{EndRecord, Item, LogReader, LogState, Outcome},
};

use pb::stream_logs_response::Record;

/// Opens a log at an offset.
pub(super) async fn open(
    host: &Arc<Host>,
    job: JobId,
    attempt: u32,
    offset: u64,
    follow: bool,
) -> Result<BoxStream<'static, Result<pb::StreamLogsResponse, Status>>, Error> {
    let from = Arc::clone(host);
    let opened = blocking(move || from.logs.read(job, attempt, offset)).await.map_err(unreadable)?;
    let (reader, state) = opened.ok_or_else(|| {
        let message = format!("this node keeps no log of attempt {attempt} of job {job}");
        Error::new(Reason::LogNotFound, message).with("job_id", job).with("attempt", attempt)
    })?;
    if let Some(end) = &state.borrow().end {
        check_offset(offset, end)?;
    }
    let token = host.tasks.token().clone();
    let follower = Follower { reader: Some(reader), state, token, pending: VecDeque::new(), follow, done: false };
    Ok(stream::unfold(follower, move |mut follower| async move {
        let record = follower.next().await?;
        let response = record.map(|record| pb::StreamLogsResponse { attempt, record: Some(record) });
        Some((response.map_err(Status::from), follower))
    })
    .boxed())
}

struct Follower {
    /// `None` only while a read is under way.
    reader: Option<LogReader>,
    state: watch::Receiver<LogState>,
    token: CancellationToken,
    /// Read, and not sent yet.
    pending: VecDeque<Item>,
    follow: bool,
    done: bool,
}

impl Follower {
    /// The next record; `None` after the last.
    async fn next(&mut self) -> Option<Result<Record, Error>> {
        let record = self.advance().await.transpose();
        if matches!(record, Some(Err(_) | Ok(Record::End(_)))) {
            self.done = true;
        }
        record
    }

    async fn advance(&mut self) -> Result<Option<Record>, Error> {
        loop {
            if let Some(item) = self.pending.pop_front() {
                return Ok(Some(match item {
                    Item::Chunk(chunk) => Record::Chunk(chunk),
                    Item::Gap(gap) => Record::Gap(gap),
                }));
            }
            if self.done {
                return Ok(None);
            }
            let state = self.state.borrow_and_update().clone();
            let offset = self.read(state.next).await?;
            if !self.pending.is_empty() {
                continue;
            }
            if let Some(end) = &state.end {
                check_offset(offset, end)?;
                return Ok(Some(Record::End(log_end(end))));
            }
            if !self.follow {
                return Ok(None);
            }
            tokio::select! {
                changed = self.state.changed() => changed.map_err(|_| shutting_down())?,
                () = self.token.cancelled() => return Err(shutting_down()),
                () = tokio::time::sleep(HEARTBEAT_EVERY) => {
                    return Ok(Some(Record::Heartbeat(common::LogHeartbeat { next_offset: state.next })));
                }
            }
        }
    }

    /// Reads what there is before `until`; returns the offset of the next byte.
    async fn read(&mut self, until: u64) -> Result<u64, Error> {
        let Some(mut reader) = self.reader.take() else { return Err(shutting_down()) };
        if reader.offset() < until {
            let (items, back) =
                blocking(move || reader.read(until).map(|items| (items, reader))).await.map_err(unreadable)?;
            self.pending.extend(items);
            reader = back;
        }
        let offset = reader.offset();
        self.reader = Some(reader);
        Ok(offset)
    }
}

fn check_offset(offset: u64, end: &EndRecord) -> Result<(), Error> {
    if offset <= end.end_offset {
        return Ok(());
    }
    let message = format!("offset {offset} lies beyond the end of the log ({})", end.end_offset);
    Err(Error::new(Reason::OffsetBeyondEnd, message).with("offset", offset).with("end_offset", end.end_offset))
}

fn log_end(end: &EndRecord) -> common::LogEnd {
    let (state, exit, reason) = match &end.outcome {
        Outcome::Result { state, exit, reason } => (*state, *exit, reason.clone()),
        Outcome::Lost { reason, .. } => (JobState::Failed, None, reason.clone()),
    };
    common::LogEnd { end_offset: end.end_offset, state: state.to_pb().into(), exit: exit.map(Into::into), reason }
}

fn shutting_down() -> Error {
    Error::new(Reason::ShuttingDown, "the node's vmhost is shutting down; read on from the last offset")
}

fn unreadable(error: io::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "a log can't be read"))
}
