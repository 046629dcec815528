//! What is left of the jobs when all is over, asked of those who hold it.

use std::{collections::BTreeMap, time::Duration};

use blixard::{
    job::{Job, JobState},
    limits,
    pb::{
        registry::v1::{self as registry, registry_service_client::RegistryServiceClient},
        scheduler::v1::{self as pb, stream_job_logs_response::Record},
    },
};
use blixard_chassis::{ReplicatedChannel, client};
use tonic::Status;

use crate::{
    check::{Attempt, Recorded},
    load::Scheduler,
};

/// Nothing is wrong any more: an answer takes no longer.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// What the registry has of every job, by id.
pub(crate) async fn recorded(channel: ReplicatedChannel) -> Result<BTreeMap<String, Recorded>, Status> {
    let mut client = RegistryServiceClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
    let mut all = BTreeMap::new();
    let mut page_token = String::new();
    loop {
        let list = registry::ListJobsRequest { page_size: limits::MAX_PAGE_SIZE, page_token, ..Default::default() };
        let page = client.list_jobs(client::request(list, CALL_TIMEOUT)).await?.into_inner();
        for job in page.jobs {
            let job = Job::try_from(job)?;
            let attempts = attempts(&mut client, job.id.to_string()).await?;
            let Job { state, reason, attempt, attempts_started, .. } = job;
            all.insert(job.id.to_string(), Recorded { state, reason, attempt, attempts_started, attempts });
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

async fn attempts(
    client: &mut RegistryServiceClient<ReplicatedChannel>,
    job_id: String,
) -> Result<Vec<Attempt>, Status> {
    let list = client::request(registry::ListAttemptsRequest { job_id }, CALL_TIMEOUT);
    let attempts = client.list_attempts(list).await?.into_inner().attempts.into_iter();
    let succeeded = |state| JobState::from_pb("state", state).ok() == Some(JobState::Succeeded);
    Ok(attempts.map(|one| Attempt { number: one.attempt, succeeded: succeeded(one.state) }).collect())
}

/// An attempt's log from its first byte to its end.
pub(crate) async fn log(mut scheduler: Scheduler, job_id: &str, attempt: u32) -> Result<Vec<u8>, String> {
    let message = pb::StreamJobLogsRequest { job_id: job_id.to_owned(), attempt, offset: 0, follow: false };
    let read = async {
        let mut records = scheduler.stream_job_logs(message).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(record) = records.message().await? {
            match record.record {
                Some(Record::Chunk(chunk)) => bytes.extend_from_slice(&chunk.data),
                Some(Record::End(_)) => return Ok(bytes),
                Some(Record::Gap(_) | Record::Heartbeat(_)) | None => {}
            }
        }
        Err(Status::data_loss("the stream ended without the log's end"))
    };
    let late = |_| format!("not read within {CALL_TIMEOUT:?}");
    tokio::time::timeout(CALL_TIMEOUT, read).await.map_err(late)?.map_err(|status| status.to_string())
}
