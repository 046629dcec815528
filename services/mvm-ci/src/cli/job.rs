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
use serde_json::Value;

use super::{
    args::{JobArgs, JobCommand},
    client::Client,
    failure::Failure,
    log_follower::{LogFollower, Position},
    log_sink::LogSink,
    output::{self, Printer},
};

/// See the module.
pub(crate) async fn job(client: Client, args: JobArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    match args.command {
        JobCommand::List { state, label, limit } => list(client, state, label, limit, printer).await?,
        JobCommand::Get { id } => {
            let job = client.get_job(&parse(&id)?).await?;
            printer.print(|| output::job_json(&job), || output::job_text(&job, Timestamp::now()))?;
        }
        JobCommand::Logs { id, follow, offset, attempt } => {
            logs(client, parse(&id)?, Position { attempt, offset, follow }, printer).await?;
        }
        JobCommand::Cancel { id, reason } => {
            let job = client.cancel_job(&parse(&id)?, &reason).await?;
            printer.print(|| output::job_json(&job), || output::job_text(&job, Timestamp::now()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Ids are whole UUIDs; a prefix is refused here as it would be by the server.
fn parse(id: &str) -> Result<String, Failure> {
    Ok(JobId::parse("job_id", id)?.to_string())
}

async fn list(
    client: Client,
    states: Vec<JobState>,
    labels: Vec<(String, String)>,
    limit: usize,
    printer: &Printer,
) -> Result<(), Failure> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut page_token = String::new();
    while jobs.len() < limit {
        let request = pb::ListJobsRequest {
            page_size: page_size(limit - jobs.len()),
            page_token,
            states: states.iter().map(|state| state.to_pb().into()).collect(),
            labels: labels.iter().cloned().collect(),
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
    printer.print(
        || Value::Array(jobs.iter().map(output::job_json).collect()),
        || output::job_table(&jobs, Timestamp::now()),
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
