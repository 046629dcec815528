//! `mvm-ci run`: submits a job, passes its output on as it comes, ends as the job ended: all in one call.
//!
//! Exit code: the job's; 128 + n when signal n ended it; 124 when it ran out of time (as `timeout` has it); 130 when it was
//! cancelled; 125 when it could not be run or was lost (as `docker run` has it), or its files could not be fetched; 141 when the reader of its output left,
//! which cancels the job just as SIGPIPE ends a local one. Arrays are [`super::array`]'s.

use std::process::ExitCode;

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::{ExitKind, Job, JobState},
    pb::scheduler::v1 as pb,
};
use blixard_chassis::Tasks;
use futures::StreamExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{
    args::{Format, RunArgs},
    array, artifacts,
    client::{Client, is_transient, parse_job},
    failure::{Failure, NOT_RUN},
    log_follower::{LogFollower, LogRecord, Outage},
    log_sink::LogSink,
    output::{self, Printer},
    progress::Progress,
    submission,
};

/// What `timeout(1)` exits with.
const TIMED_OUT: u8 = 124;
/// As if SIGINT had ended it.
const CANCELLED: u8 = 130;
/// Jobs of an array that are cancelled at once.
const CANCELS_AT_ONCE: usize = 16;

/// See the module.
pub(crate) async fn run(endpoint: &str, args: RunArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let spec = submission::spec(&args).map_err(Failure::NotRun)?;
    let input = submission::input(&args)?;
    let client = Client::connect(endpoint).await.map_err(not_run)?;
    if let Some(indexes) = &args.array {
        return array::run(client, indexes.clone(), spec, input, &args, printer).await;
    }
    // The id is ours, so that a submission whose answer is lost can be repeated.
    let job_id = JobId::random().to_string();
    if args.detach {
        let request = pb::SubmitJobRequest { request_id: job_id.clone(), spec: Some(spec), input };
        let answer = client.call(request, async |mut stub, request| stub.submit_job(request).await).await;
        let job = answer.and_then(|answer| parse_job(answer.job)).map_err(Failure::NotRun)?;
        printer.print(|| output::job_json(&job), || job_id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let progress = Progress::new();
    let submitted = CancellationToken::new();
    let tasks = Tasks::new();
    let cancel = cancel_on_interrupt(
        Interrupts::listen()?,
        client.clone(),
        vec![job_id.clone()],
        submitted.clone(),
        progress.clone(),
    );
    tasks.spawn("interrupts", cancel);
    let request = pb::RunJobRequest { request_id: job_id.clone(), spec: Some(spec), input };
    let events = client.run_job(request).await.inspect_err(|_| progress.clear()).map_err(Failure::NotRun)?;
    submitted.cancel();
    let mut follower = LogFollower::of_run(client.clone(), job_id.clone(), events, progress.clone());
    let mut sink = LogSink::new(printer.format())?;
    let outcome = attend(&client, &job_id, &mut follower, &progress, &mut sink).await;
    progress.clear();
    if let (Ok(_), Some(dir)) = (&outcome, &args.artifacts_dir) {
        artifacts::fetch_all(&client, &job_id, 0, dir, &mut |text| sink.note(text)).await.map_err(not_run)?;
    }
    finish(&client, &job_id, outcome, &mut sink, printer.format()).await
}

/// What keeps a job from being run has an exit code of its own.
pub(crate) fn not_run(failure: Failure) -> Failure {
    match failure {
        Failure::Rpc(error) => Failure::NotRun(error),
        other => other,
    }
}

/// Passes the output on until the job has ended.
async fn attend(
    client: &Client,
    job_id: &str,
    follower: &mut LogFollower,
    progress: &Progress,
    sink: &mut LogSink,
) -> Result<Job, Failure> {
    let mut attempts = Attempts::default();
    loop {
        match follower.next().await {
            Ok(Some(record)) => {
                progress.clear();
                if let Some(note) = attempts.look(&record) {
                    sink.note(&note)?;
                }
                sink.write(&record)?;
            }
            Ok(None) => break,
            // The node that held the log is gone; how the job ended is on record all the same.
            Err(error) if error.reason == Reason::LogNotFound => {
                progress.clear();
                sink.note(&format!("the job's output is not to be had: {}", error.message))?;
                break;
            }
            Err(error) => {
                let at = follower.position().offset;
                sink.note(&format!(
                    "lost touch with job {job_id}, which may go on: mvm-ci job logs -f --offset {at} {job_id}"
                ))?;
                return Err(Failure::NotRun(error));
            }
        }
    }
    match follower.ended_job() {
        Some(job) => Ok(job),
        None => wait_for_end(client, job_id).await.map_err(Failure::NotRun),
    }
}

/// Notices when an attempt was not the last one.
#[derive(Default)]
pub(crate) struct Attempts {
    /// The latest one that has ended.
    ended: Option<(u32, JobState, String)>,
}

impl Attempts {
    /// What is to be said before this record: how the attempt before its own ended.
    pub(crate) fn look(&mut self, record: &LogRecord) -> Option<String> {
        let before = self.ended.take_if(|(ended, ..)| *ended < record.attempt());
        if let LogRecord::End { attempt, state, reason, .. } = record {
            self.ended = Some((*attempt, *state, reason.clone()));
        }
        let (attempt, state, reason) = before?;
        let because = if reason.is_empty() { reason } else { format!(": {reason}") };
        Some(match state {
            JobState::Queued => format!("attempt {attempt} was lost{because}"),
            state => format!("attempt {attempt} is {state}{because}; another one follows"),
        })
    }
}

/// The job once it has ended: the registry's record, not the log, says how.
pub(crate) async fn wait_for_end(client: &Client, job_id: &str) -> Result<Job, Error> {
    let mut outage = Outage::default();
    loop {
        let status = match client.watch_job(job_id).await {
            Err(status) => Some(status),
            Ok(mut watch) => loop {
                match watch.message().await {
                    Ok(Some(change)) => {
                        outage = Outage::default();
                        let job = parse_job(change.job)?;
                        if job.state.is_terminal() {
                            return Ok(job);
                        }
                    }
                    Ok(None) => break None,
                    Err(status) => break Some(status),
                }
            },
        };
        let status = status.unwrap_or_else(|| tonic::Status::unavailable("the watch ended early"));
        if !is_transient(&status) {
            return Err(Error::from_status(&status));
        }
        outage.wait(&status).await?;
    }
}

async fn finish(
    client: &Client,
    job_id: &str,
    outcome: Result<Job, Failure>,
    sink: &mut LogSink,
    format: Format,
) -> Result<ExitCode, Failure> {
    match outcome {
        Ok(job) => {
            if format == Format::Json {
                sink.line(&serde_json::json!({ "job": output::job_json(&job) }))?;
            }
            let (code, note) = exit_code(&job);
            if let Some(note) = note {
                sink.note(&note)?;
            }
            Ok(ExitCode::from(code))
        }
        Err(failure) => {
            if failure.is_quiet() {
                // Whether it is accepted or not, nobody is there to be told.
                let _ = client.cancel_job(job_id, "the reader of its output left").await;
            }
            Err(failure)
        }
    }
}

/// What to exit with, and what to say when the code alone does not.
pub(crate) fn exit_code(job: &Job) -> (u8, Option<String>) {
    let because = if job.reason.is_empty() { String::new() } else { format!(": {}", job.reason) };
    let say = |what: String| Some(format!("job {} {what}{because}", job.id));
    match (job.state, job.exit.map(|exit| exit.kind)) {
        (JobState::Succeeded, _) => (0, None),
        (JobState::TimedOut, _) => (TIMED_OUT, say("TimedOut".to_owned())),
        (JobState::Cancelled, _) => (CANCELLED, say("Cancelled".to_owned())),
        (JobState::Failed, Some(ExitKind::Code(code))) => (u8::try_from(code).unwrap_or(1), None),
        (JobState::Failed, Some(ExitKind::Signal(signal))) => {
            (u8::try_from(128 + signal).unwrap_or(u8::MAX), say(format!("was ended by signal {signal}")))
        }
        (JobState::Failed, None) => (NOT_RUN, say("Failed".to_owned())),
        (JobState::Queued | JobState::Assigned | JobState::Running, _) => (NOT_RUN, say("has not ended".to_owned())),
    }
}

/// Ctrl-C and SIGTERM.
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub(crate) fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The first interrupt cancels the jobs, whose output goes on to their end; the second leaves.
pub(crate) async fn cancel_on_interrupt(
    mut interrupts: Interrupts,
    client: Client,
    job_ids: Vec<String>,
    submitted: CancellationToken,
    progress: Progress,
) {
    interrupts.next().await;
    progress.clear();
    match &job_ids[..] {
        [job_id] => note(&format!("cancelling job {job_id}; once more leaves without waiting for its end")),
        _ => note(&format!("cancelling {} jobs; once more leaves without waiting for their end", job_ids.len())),
    }
    let cancel_one = |job_id: String| {
        let client = &client;
        async move {
            if let Err(error) = client.cancel_job(&job_id, "interrupted at the terminal").await {
                note(&format!("job {job_id} could not be cancelled: {error}"));
            }
        }
    };
    let cancel = async {
        submitted.cancelled().await;
        futures::stream::iter(job_ids).for_each_concurrent(CANCELS_AT_ONCE, cancel_one).await;
    };
    tokio::select! {
        () = async { cancel.await; std::future::pending().await } => {}
        () = interrupts.next() => {}
    }
    std::process::exit(CANCELLED.into());
}

fn note(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "mvm-ci: {text}");
}
