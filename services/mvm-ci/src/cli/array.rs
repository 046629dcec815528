//! `mvm-ci run --array`: one job for each number, followed together.
//!
//! Lines of output come whole and begin with their job's number: `[7] …`. Exit code: 0 when every job succeeded, else 1; 125 when
//! nothing was run.

use std::{collections::BTreeMap, ops::RangeInclusive, process::ExitCode};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    job::{Job, JobState},
    pb::{
        common::v1::{self as common, LogStream},
        scheduler::v1 as pb,
    },
};
use blixard_chassis::Tasks;
use futures::{Stream, StreamExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    args::{Format, RunArgs},
    artifacts,
    client::{Client, parse_job},
    failure::Failure,
    log_follower::{LogFollower, LogRecord, Position},
    log_sink::{LogSink, record_json},
    output::{self, Printer},
    progress::Progress,
    run,
};

/// Jobs that are followed at once; they begin in the order of their numbers, so the others wait anyway.
const FOLLOWED_AT_ONCE: usize = 128;
/// A line that grows beyond this without an end is written in parts.
const LONGEST_LINE: usize = 64 * 1024;
/// The name of the array in its group.
const NAME: &str = "run";

/// See the module.
pub(crate) async fn run(
    client: Client,
    indexes: RangeInclusive<u32>,
    spec: common::JobSpec,
    input: Option<common::JobInput>,
    args: &RunArgs,
    printer: &Printer,
) -> Result<ExitCode, Failure> {
    let job = pb::GroupJob {
        name: NAME.into(),
        spec: Some(spec),
        input,
        array_first: *indexes.start(),
        array_last: *indexes.end(),
        depends_on: Vec::new(),
    };
    let request = pb::SubmitJobGroupRequest { request_id: JobId::random().to_string(), jobs: vec![job] };
    let progress = Progress::new();
    let answer = client.call(request, async |mut stub, request| stub.submit_job_group(request).await).await;
    progress.clear();
    let answer = answer.map_err(Failure::NotRun)?;
    if args.detach {
        let jobs = answer.jobs.into_iter().map(|job| parse_job(Some(job))).collect::<Result<Vec<_>, _>>()?;
        printer.print(
            || json!({ "group_id": answer.group_id, "jobs": jobs.iter().map(output::job_json).collect::<Vec<_>>() }),
            || answer.group_id.clone(),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let ids: Vec<_> = indexes.zip(answer.jobs.into_iter().map(|job| job.id)).collect();
    let tasks = Tasks::new();
    let submitted = CancellationToken::new();
    submitted.cancel();
    let all = ids.iter().map(|(_, id)| id.clone()).collect();
    let cancel = run::cancel_on_interrupt(run::Interrupts::listen()?, client.clone(), all, submitted, progress);
    tasks.spawn("interrupts", cancel);
    follow(&client, ids, args, printer.format()).await
}

/// What became of one of the jobs.
enum Event {
    Record(LogRecord),
    /// It has ended.
    Ended(Box<Result<Job, Error>>),
}

async fn follow(client: &Client, ids: Vec<(u32, String)>, args: &RunArgs, format: Format) -> Result<ExitCode, Failure> {
    let mut writer =
        Writer { sink: LogSink::new(format)?, format, partial: BTreeMap::new(), attempts: BTreeMap::new() };
    let total = ids.len();
    let mut unsuccessful = BTreeMap::new();
    let streams = ids.into_iter().map(|(index, job_id)| {
        Box::pin(events(client.clone(), job_id.clone()).map(move |event| (index, job_id.clone(), event)))
    });
    let mut events = futures::stream::iter(streams).flatten_unordered(FOLLOWED_AT_ONCE);
    while let Some((index, job_id, event)) = events.next().await {
        let ended = match event {
            Event::Record(record) => {
                writer.write(index, &job_id, &record)?;
                continue;
            }
            Event::Ended(ended) => *ended,
        };
        match ended {
            Ok(job) => {
                writer.end(index, &job)?;
                if let Some(dir) = &args.artifacts_dir {
                    let dir = dir.join(index.to_string());
                    let mut note = |text: &str| writer.sink.note(text);
                    artifacts::fetch_all(client, &job_id, 0, &dir, &mut note).await.map_err(run::not_run)?;
                }
                if job.state != JobState::Succeeded {
                    unsuccessful.insert(index, run::exit_code(&job).1.unwrap_or_else(|| exited(&job)));
                }
            }
            Err(error) => {
                unsuccessful.insert(index, format!("job {job_id} may go on: {error}"));
            }
        }
    }
    for (index, why) in &unsuccessful {
        writer.sink.note(&format!("[{index}] {why}"))?;
    }
    writer.sink.note(&format!("{} of {total} jobs succeeded", total - unsuccessful.len()))?;
    Ok(if unsuccessful.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn exited(job: &Job) -> String {
    format!("job {} exited with {}", job.id, output::exit_text(job.exit.as_ref()))
}

/// The output of a job, and its end.
fn events(client: Client, job_id: String) -> impl Stream<Item = Event> {
    let start = Position { attempt: 0, offset: 0, follow: true };
    let follower = LogFollower::new(client.clone(), job_id.clone(), start);
    futures::stream::unfold(Some(follower), move |follower| {
        let (client, job_id) = (client.clone(), job_id.clone());
        async move {
            let mut follower = follower?;
            match follower.next().await {
                Ok(Some(record)) => Some((Event::Record(record), Some(follower))),
                Err(error) if error.reason != Reason::LogNotFound => Some((Event::Ended(Box::new(Err(error))), None)),
                // How it ended is on record, whatever became of its log.
                Ok(None) | Err(_) => {
                    let ended = run::wait_for_end(&client, &job_id).await;
                    Some((Event::Ended(Box::new(ended)), None))
                }
            }
        }
    })
}

/// Keeps the lines of different jobs apart.
struct Writer {
    sink: LogSink,
    format: Format,
    /// Lines that have not ended.
    partial: BTreeMap<(u32, bool), Vec<u8>>,
    attempts: BTreeMap<u32, run::Attempts>,
}

impl Writer {
    fn write(&mut self, index: u32, job_id: &str, record: &LogRecord) -> Result<(), Failure> {
        if self.format == Format::Json {
            let mut line = record_json(record);
            line["job_id"] = job_id.into();
            line["array_index"] = index.into();
            return Ok(self.sink.line(&line)?);
        }
        if let Some(note) = self.attempts.entry(index).or_default().look(record) {
            self.sink.note(&format!("[{index}] {note}"))?;
        }
        match record {
            LogRecord::Chunk { stream, data, .. } => {
                let held = self.partial.entry((index, *stream == LogStream::Stderr)).or_default();
                let lines = whole_lines(index, held, data);
                if !lines.is_empty() {
                    self.sink.bytes(*stream, &lines)?;
                }
            }
            LogRecord::Gap { from_offset, to_offset, reason, .. } => {
                let text = format!("[{index}] bytes {from_offset} to {to_offset} of the output are gone: {reason}");
                self.sink.note(&text)?;
            }
            LogRecord::End { .. } => {}
        }
        Ok(())
    }

    /// What is left of its last lines.
    fn end(&mut self, index: u32, job: &Job) -> Result<(), Failure> {
        if self.format == Format::Json {
            self.sink.line(&json!({ "job": output::job_json(job) }))?;
        }
        for (stream, key) in [(LogStream::Stdout, (index, false)), (LogStream::Stderr, (index, true))] {
            let mut held = self.partial.remove(&key).unwrap_or_default();
            if !held.is_empty() {
                let line = whole_lines(index, &mut held, b"\n");
                self.sink.bytes(stream, &line)?;
            }
        }
        Ok(())
    }
}

/// The lines that `data` ends, each with its number before it; the rest is held.
fn whole_lines(index: u32, held: &mut Vec<u8>, data: &[u8]) -> Vec<u8> {
    let mut lines = Vec::new();
    for part in data.split_inclusive(|&byte| byte == b'\n') {
        held.extend_from_slice(part);
        if part.ends_with(b"\n") || held.len() > LONGEST_LINE {
            lines.extend_from_slice(format!("[{index}] ").as_bytes());
            lines.append(held);
            if !lines.ends_with(b"\n") {
                lines.push(b'\n');
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_with_their_number() {
        let mut held = Vec::new();
        assert_eq!(whole_lines(7, &mut held, b"a\nb"), b"[7] a\n");
        assert_eq!(whole_lines(7, &mut held, b"c"), b"");
        assert_eq!(whole_lines(7, &mut held, b"d\n\nrest\xff"), b"[7] bcd\n[7] \n");
        assert_eq!(held, b"rest\xff");
        let long = whole_lines(7, &mut held, &vec![b'x'; LONGEST_LINE]);
        assert!(long.starts_with(b"[7] rest\xffxxx") && long.ends_with(b"x\n") && held.is_empty());
    }
}
