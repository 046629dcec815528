//! The line on a terminal that says what a job waits for, until its first output, or how far something is.

use std::{io::IsTerminal as _, time::Duration};

use blixard::{
    job::{Job, JobState},
    pb::scheduler::v1::WatchJobResponse,
};
use indicatif::{ProgressBar, ProgressStyle};

use super::client::parse_job;

/// A spinner on stderr; nothing at all when stderr is no terminal.
#[derive(Clone)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed:.dim}");
            let bar = ProgressBar::new_spinner().with_message("submitting");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    /// Takes the line away for good; before the first output.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.finish_and_clear();
        }
    }

    /// Shows what becomes of a job.
    pub(crate) fn show(&self, change: &WatchJobResponse) {
        if let Some(bar) = &self.bar
            && !bar.is_finished()
            && let Ok(job) = parse_job(change.job.clone())
        {
            bar.set_message(status_line(&job, &change.waiting_for));
        }
    }
}

/// How much of something is done, on stderr; nothing at all when stderr is no terminal.
pub(crate) struct Gauge {
    bar: Option<ProgressBar>,
}

impl Gauge {
    /// Of something whose size is not known yet; `unit` is `bytes` or what is counted.
    pub(crate) fn new(what: &'static str, unit: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let count = match unit {
                "bytes" => "{bytes}/{total_bytes}".to_owned(),
                unit => format!("{{human_pos}}/{{human_len}} {unit}"),
            };
            let style =
                ProgressStyle::with_template(&format!("{{spinner}} {{msg}} {{wide_bar}} {count} {{elapsed:.dim}}"));
            let bar = ProgressBar::new(0).with_message(what);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    /// Shows that so much of so much is done.
    pub(crate) fn show(&self, done: u64, of: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(of);
            bar.set_position(done);
        }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What a job is doing, in a line.
fn status_line(job: &Job, waiting_for: &str) -> String {
    let vm = job.vm_id.map(|id| id.to_string()).unwrap_or_default();
    match job.state {
        JobState::Queued if waiting_for.is_empty() => "queued".to_owned(),
        JobState::Queued => format!("queued: {}", waiting_for.trim_start_matches("it ")),
        JobState::Assigned => format!("starting in VM {vm}"),
        JobState::Running => format!("running in VM {vm}"),
        JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::TimedOut => job.state.to_string(),
    }
}
