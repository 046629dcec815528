//! Following a job: its changes (WatchJob), and its changes and its output in one stream (RunJob).

use std::time::Duration;

use blixard::{
    id::JobId,
    job::JobState,
    pb::scheduler::v1::{self as pb, run_job_response::Event},
    time::Timestamp,
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{
    feed::{Feed, Subscription},
    shell::ShellHandle,
};

/// How often the reasons for which queued jobs wait are looked at: once for all who watch the same job.
const WAIT_REASON_EVERY: Duration = Duration::from_secs(1);
/// Changes between the watch and its caller.
pub(crate) const BUFFER: usize = 4;

/// Sends the job after each change, and when the reason for its waiting changes, until it has ended.
pub(crate) async fn watch_job(
    shell: ShellHandle,
    feed: Feed,
    job_id: JobId,
    mut subscription: Subscription,
    sender: mpsc::Sender<Result<pb::WatchJobResponse, Status>>,
) {
    let mut sent: Option<(u64, String)> = None;
    loop {
        let seen = subscription.changes.borrow_and_update().clone();
        let Some(job) = seen.job else { return };
        let waiting_for = match (job.state, seen.waits) {
            (JobState::Queued, Some((revision, reason))) if revision == job.revision => reason,
            // Most jobs wait for a moment only; what the others wait for is told by [`keep_reasons`].
            (JobState::Queued, _) if Timestamp::now().since(job.queued_at) >= WAIT_REASON_EVERY => {
                let reason = waits_for(&shell, job_id).await;
                feed.waits(job_id, job.revision, &reason);
                reason
            }
            _ => String::new(),
        };
        let ended = job.state.is_terminal();
        let news = (job.revision, waiting_for.clone());
        if sent.as_ref() != Some(&news) {
            sent = Some(news);
            let response = pb::WatchJobResponse { job: Some(job.into()), waiting_for };
            if sender.send(Ok(response)).await.is_err() {
                return;
            }
        }
        if ended {
            return;
        }
        tokio::select! {
            changed = subscription.changes.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

async fn waits_for(shell: &ShellHandle, job_id: JobId) -> String {
    shell.explain(job_id).await.ok().flatten().map(|decision| decision.summary).unwrap_or_default()
}

/// Keeps the reasons fresh for those who watch queued jobs; runs for as long as the scheduler does.
pub(crate) async fn keep_reasons(shell: ShellHandle, feed: Feed) {
    loop {
        tokio::time::sleep(WAIT_REASON_EVERY).await;
        for (job_id, revision) in feed.queued() {
            let reason = waits_for(&shell, job_id).await;
            feed.waits(job_id, revision, &reason);
        }
    }
}

/// Merges the changes and the output of one job: first the job as recorded, last the job as it ended, between them everything as
/// it comes. Neither source waits for the other.
pub(crate) async fn run_job(
    mut changes: mpsc::Receiver<Result<pb::WatchJobResponse, Status>>,
    mut records: mpsc::Receiver<Result<pb::StreamJobLogsResponse, Status>>,
    sender: mpsc::Sender<Result<pb::RunJobResponse, Status>>,
) {
    let mut last = None;
    let mut begun = false;
    let (mut more_changes, mut more_records) = (true, true);
    while more_changes || more_records {
        let event = tokio::select! {
            biased;
            change = changes.recv(), if more_changes => match change {
                Some(Ok(change)) if ended(&change) => {
                    last = Some(change);
                    continue;
                }
                Some(change) => {
                    begun = true;
                    change.map(Event::Job)
                }
                None => {
                    more_changes = false;
                    continue;
                }
            },
            record = records.recv(), if more_records && (begun || last.is_some()) => match record {
                Some(record) => record.map(Event::Log),
                None => {
                    more_records = false;
                    continue;
                }
            },
            () = sender.closed() => return,
        };
        // What came first is the job, even when it has ended long ago.
        if let (false, Some(change)) = (begun, &last) {
            begun = true;
            if send(&sender, Ok(Event::Job(change.clone()))).await.is_err() {
                return;
            }
        }
        let failed = event.is_err();
        if send(&sender, event).await.is_err() || failed {
            return;
        }
    }
    if let Some(change) = last {
        let _ = send(&sender, Ok(Event::Job(change))).await;
    }
}

fn ended(change: &pb::WatchJobResponse) -> bool {
    let state = change.job.as_ref().and_then(|job| JobState::from_pb("state", job.state).ok());
    state.is_some_and(JobState::is_terminal)
}

async fn send(
    sender: &mpsc::Sender<Result<pb::RunJobResponse, Status>>,
    event: Result<Event, Status>,
) -> Result<(), ()> {
    sender.send(event.map(|event| pb::RunJobResponse { event: Some(event) })).await.map_err(drop)
}

#[cfg(test)]
mod tests {
    use blixard::pb::{
        common::v1::{self as common, LogChunk},
        scheduler::v1::stream_job_logs_response::Record,
    };

    use super::*;

    fn change(state: JobState) -> Result<pb::WatchJobResponse, Status> {
        let job = common::Job { state: state.to_pb().into(), ..Default::default() };
        Ok(pb::WatchJobResponse { job: Some(job), waiting_for: String::new() })
    }

    fn chunk(offset: u64) -> Result<pb::StreamJobLogsResponse, Status> {
        let chunk = LogChunk { offset, data: vec![b'x'].into(), ..Default::default() };
        Ok(pb::StreamJobLogsResponse { attempt: 1, record: Some(Record::Chunk(chunk)) })
    }

    async fn merged(
        changes: Vec<Result<pb::WatchJobResponse, Status>>,
        records: Vec<Result<pb::StreamJobLogsResponse, Status>>,
    ) -> Vec<String> {
        let (change_sender, change_receiver) = mpsc::channel(16);
        let (record_sender, record_receiver) = mpsc::channel(16);
        let (sender, mut receiver) = mpsc::channel(64);
        for change in changes {
            change_sender.send(change).await.expect("room");
        }
        for record in records {
            record_sender.send(record).await.expect("room");
        }
        drop((change_sender, record_sender));
        run_job(change_receiver, record_receiver, sender).await;
        let mut told = Vec::new();
        while let Some(event) = receiver.recv().await {
            told.push(match event.map(|response| response.event.expect("an event")) {
                Ok(Event::Job(change)) => change.job.expect("a job").state().as_str_name().replace("JOB_STATE_", ""),
                Ok(Event::Log(pb::StreamJobLogsResponse { record: Some(Record::Chunk(chunk)), .. })) => {
                    chunk.offset.to_string()
                }
                Ok(Event::Log(other)) => format!("{other:?}"),
                Err(status) => status.message().to_owned(),
            });
        }
        told
    }

    #[tokio::test]
    async fn the_end_comes_after_the_last_byte_however_early_it_is_known() {
        let changes = [JobState::Queued, JobState::Running, JobState::Succeeded].map(change);
        let told = merged(changes.into(), vec![chunk(0), chunk(1)]).await;
        assert_eq!(told, ["QUEUED", "RUNNING", "0", "1", "SUCCEEDED"]);
    }

    #[tokio::test]
    async fn a_job_that_had_ended_is_the_first_and_the_last_event() {
        let told = merged(vec![change(JobState::Failed)], vec![chunk(0)]).await;
        assert_eq!(told, ["FAILED", "0", "FAILED"]);
    }

    #[tokio::test]
    async fn a_log_that_is_not_to_be_had_ends_the_stream_with_its_error() {
        let changes = vec![change(JobState::Queued), change(JobState::Failed)];
        let told = merged(changes, vec![chunk(0), Err(Status::not_found("gone"))]).await;
        assert_eq!(told, ["QUEUED", "0", "gone"]);
    }
}
