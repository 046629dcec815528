//! `mvm-ci job …`.

use std::process::ExitCode;

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::{Job, JobState},
    limits,
    pb::scheduler::v1 as pb,
    time::Timestamp,
};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::{
    args::{JobArgs, JobCommand},
    artifacts,
    client::Client,
    explain,
    failure::Failure,
    group,
    log_follower::{LogFollower, Position},
    log_sink::LogSink,
    output::{self, Printer},
};

/// Jobs of a group that are cancelled at once.
const CANCELS_AT_ONCE: usize = 16;

/// See the module.
pub(crate) async fn job(client: Client, args: JobArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    match args.command {
        JobCommand::List { state, label, group, limit } => {
            let group_id = group.map(|id| parse_group(&id)).transpose()?.unwrap_or_default();
            let jobs = list(&client, &state, label, group_id, limit).await?;
            printer.print(
                || Value::Array(jobs.iter().map(output::job_json).collect()),
                || output::job_table(&jobs, Timestamp::now()),
            )?;
        }
        JobCommand::Get { id } => {
            let job = client.get_job(&parse(&id)?).await?;
            printer.print(|| output::job_json(&job), || output::job_text(&job, Timestamp::now()))?;
        }
        JobCommand::Logs { id, follow, offset, attempt } => {
            logs(client, parse(&id)?, Position { attempt, offset, follow }, printer).await?;
        }
        JobCommand::Explain { id } => explain::explain(&client, parse(&id)?, printer).await?,
        JobCommand::Artifacts(args) => artifacts::artifacts(client, args, printer).await?,
        JobCommand::Group { file } => group::group(&client, &file, printer).await?,
        JobCommand::Cancel { id: Some(id), reason, .. } => {
            let job = client.cancel_job(&parse(&id)?, &reason).await?;
            printer.print(|| output::job_json(&job), || output::job_text(&job, Timestamp::now()))?;
        }
        JobCommand::Cancel { id: None, group, reason } => {
            cancel_group(&client, parse_group(&group.unwrap_or_default())?, &reason, printer).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Ids are whole UUIDs; a prefix is refused here as it would be by the server.
fn parse(id: &str) -> Result<String, Failure> {
    Ok(JobId::parse("job_id", id)?.to_string())
}

fn parse_group(id: &str) -> Result<String, Failure> {
    Ok(JobId::parse("group_id", id)?.to_string())
}

async fn list(
    client: &Client,
    states: &[JobState],
    labels: Vec<(String, String)>,
    group_id: String,
    limit: usize,
) -> Result<Vec<Job>, Failure> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut page_token = String::new();
    while jobs.len() < limit {
        let request = pb::ListJobsRequest {
            page_size: page_size(limit - jobs.len()),
            page_token,
            states: states.iter().map(|state| state.to_pb().into()).collect(),
            labels: labels.iter().cloned().collect(),
            group_id: group_id.clone(),
            ..Default::default()
        };
        let page = client.call(request, async |mut stub, request| stub.list_jobs(request).await).await?;
        for job in page.jobs {
            jobs.push(job.try_into()?);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    Ok(jobs)
}

/// Asks for the end of every job of a group that has not ended.
async fn cancel_group(client: &Client, group_id: String, reason: &str, printer: &Printer) -> Result<(), Failure> {
    let live: Vec<_> = JobState::ALL.into_iter().filter(|state| !state.is_terminal()).collect();
    let jobs = list(client, &live, Vec::new(), group_id, limits::MAX_GROUP_JOBS).await?;
    let cancel = |job: Job| async move { client.cancel_job(&job.id.to_string(), reason).await };
    let cancelled: Vec<Job> = futures::stream::iter(jobs).map(cancel).buffered(CANCELS_AT_ONCE).try_collect().await?;
    printer.print(
        || Value::Array(cancelled.iter().map(output::job_json).collect()),
        || output::job_table(&cancelled, Timestamp::now()),
    )
}

/// The size of the next page when `wanted` rows are still wanted.
pub(crate) fn page_size(wanted: usize) -> u32 {
    u32::try_from(wanted).unwrap_or(u32::MAX).min(limits::MAX_PAGE_SIZE)
}

async fn logs(client: Client, job_id: String, at: Position, printer: &Printer) -> Result<(), Failure> {
    let mut sink = LogSink::new(printer.format())?;
    let mut follower = LogFollower::new(client.clone(), job_id.clone(), at);
    loop {
        match follower.next().await {
            Ok(Some(record)) => sink.write(&record)?,
            Ok(None) => return Ok(()),
            Err(error) if error.reason == Reason::LogNotFound => return no_log(&client, &job_id, error).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// A job that never ran has no output, which is no failure.
async fn no_log(client: &Client, job_id: &str, error: Error) -> Result<(), Failure> {
    let job = client.get_job(job_id).await?;
    if job.attempt == 0 { Ok(()) } else { Err(error.into()) }
}
