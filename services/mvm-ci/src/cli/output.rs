//! How results look: tables for people, JSON for programs.
//!
//! The JSON field names are part of the contract: snake_case, states by name, times as RFC 3339 in UTC with milliseconds,
//! ids as strings, `null` for what is not there. Tables hold full ids, because they are pasted.

use std::{io::Write as _, time::Duration};

use blixard::{
    error::Error,
    job::{Dependency, DependencyCondition, ExitKind, ExitStatus, Isolation, Job, JobSpec, JobState, RetryOn},
    pb::common::v1 as pb,
    time::{Timestamp, millis},
    vm::{Vm, VmKind, VmState},
};
use serde_json::{Value, json};

use super::{args::Format, failure::Failure};

/// The longest command shown in a list.
const COMMAND_WIDTH: usize = 60;

/// Prints results in the format asked for.
pub(crate) struct Printer {
    format: Format,
}

impl Printer {
    pub(crate) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Prints JSON or the text for people; only the one that is wanted is made.
    pub(crate) fn print(&self, json: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let mut text = match self.format {
            Format::Json => format!("{:#}", json()),
            Format::Table => text(),
        };
        if !text.ends_with('\n') && !text.is_empty() {
            text.push('\n');
        }
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }
}

/// `2026-01-31T12:34:56.789Z`.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    let time = jiff::Timestamp::from_millisecond(time.0).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}

pub(crate) fn maybe_time(time: Option<Timestamp>) -> Value {
    time.map_or(Value::Null, |time| rfc3339(time).into())
}

fn maybe(value: Option<impl ToString>) -> Value {
    value.map_or(Value::Null, |value| value.to_string().into())
}

/// A duration as people say it: its largest unit.
pub(crate) fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// How long something took, to the millisecond when it was short.
pub(crate) fn took(duration: Duration) -> String {
    if duration < Duration::from_secs(60) { format!("{:.3}s", duration.as_secs_f64()) } else { age(duration) }
}

/// Rows under headings, each column as wide as its widest cell, two spaces apart.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|&cell| cell.to_owned()).collect();
    let lines: Vec<Vec<String>> =
        std::iter::once(&heading).chain(rows).map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| lines.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in &lines {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// `key: value` lines, aligned; rows without a value are left out.
pub(crate) fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let shown = rows.iter().filter(|(_, value)| !value.is_empty());
    shown.map(|(name, value)| format!("{:width$}  {}\n", format!("{name}:"), printable(value))).collect()
}

/// What others wrote must not steer the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(crate) fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn optional(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// A command as one would type it.
fn shell_words(command: &[String]) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    let word = |word: &String| {
        if !word.is_empty() && word.chars().all(safe) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    command.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn shorten(text: String, width: usize) -> String {
    if text.chars().count() <= width { text } else { text.chars().take(width - 1).chain(['…']).collect() }
}

pub(crate) fn exit_text(exit: Option<&ExitStatus>) -> String {
    match exit.map(|exit| exit.kind) {
        Some(ExitKind::Code(code)) => code.to_string(),
        Some(ExitKind::Signal(signal)) => format!("signal {signal}"),
        None => String::new(),
    }
}

pub(crate) fn exit_json(exit: Option<&ExitStatus>) -> Value {
    let Some(exit) = exit else { return Value::Null };
    let (code, signal) = match exit.kind {
        ExitKind::Code(code) => (Some(code), None),
        ExitKind::Signal(signal) => (None, Some(signal)),
    };
    json!({
        "exit_code": code, "signal": signal, "user_time_ms": exit.user_time_ms, "system_time_ms": exit.system_time_ms,
        "max_rss_kib": exit.max_rss_kib,
    })
}

fn isolation_name(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::Maximum => "maximum",
        Isolation::Standard => "standard",
        Isolation::Minimal => "minimal",
    }
}

fn retry_name(on: RetryOn) -> &'static str {
    match on {
        RetryOn::Lost => "lost",
        RetryOn::Failed => "failed",
        RetryOn::TimedOut => "timed-out",
    }
}

fn dependency_json(dependency: &Dependency) -> Value {
    json!({ "job_id": dependency.job_id.to_string(), "condition": condition_name(dependency.condition) })
}

fn condition_name(condition: DependencyCondition) -> &'static str {
    match condition {
        DependencyCondition::Succeeded => "succeeded",
        DependencyCondition::Ended => "ended",
    }
}

/// A job.
pub(crate) fn job_json(job: &Job) -> Value {
    json!({
        "id": job.id.to_string(),
        "state": job.state.as_str(),
        "reason": job.reason,
        "attempt": job.attempt,
        "assignment": job.assignment.map(VmKind::as_str),
        "vm_id": maybe(job.vm_id),
        "node_id": maybe(job.node_id.as_ref()),
        "cancel_requested": job.cancel_requested,
        "exit": exit_json(job.exit.as_ref()),
        "log_bytes": job.log_bytes,
        "attempts_started": job.attempts_started,
        "created_at": rfc3339(job.created_at),
        "queued_at": rfc3339(job.queued_at),
        "not_before": maybe_time(job.not_before),
        "assigned_at": maybe_time(job.assigned_at),
        "started_at": maybe_time(job.started_at),
        "finished_at": maybe_time(job.finished_at),
        "generation": job.generation,
        "revision": job.revision,
        "spec": spec_json(&job.spec),
    })
}

/// What it is to run.
fn spec_json(spec: &JobSpec) -> Value {
    json!({
        "command": spec.command,
        "env": spec.env,
        "working_dir": spec.working_dir,
        "image": spec.image,
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "isolation": isolation_name(spec.isolation),
        "egress": spec.egress,
        "volumes": spec.volumes,
        "priority": spec.priority,
        "timeout_ms": spec.timeout.map(millis),
        "queue_timeout_ms": spec.queue_timeout.map(millis),
        "start_timeout_ms": spec.start_timeout.map(millis),
        "result_ttl_ms": spec.result_ttl.map(millis),
        "max_attempts": spec.max_attempts,
        "retry_on": spec.retry.on.iter().map(|on| retry_name(*on)).collect::<Vec<_>>(),
        "backoff_ms": millis(spec.retry.backoff),
        "max_backoff_ms": millis(spec.retry.max_backoff),
        "labels": spec.labels,
        "node_id": maybe(spec.node_id.as_ref()),
        "target_vm_id": maybe(spec.target_vm_id),
        "node_labels": spec.node_labels,
        "preferred_node_labels": spec.preferred_node_labels,
        "group_id": maybe(spec.group_id),
        "array_index": spec.array_index,
        "depends_on": spec.depends_on.iter().map(dependency_json).collect::<Vec<_>>(),
        "artifacts": spec.artifacts,
        "has_input": !spec.input_digest.is_empty(),
    })
}

/// Jobs as a table.
pub(crate) fn job_table(jobs: &[Job], now: Timestamp) -> String {
    let row = |job: &Job| {
        vec![
            job.id.to_string(),
            job.state.to_string(),
            dash(exit_text(job.exit.as_ref())),
            age(now.since(job.created_at)),
            dash(run_time(job, now)),
            dash(optional(job.node_id.as_ref())),
            shorten(shell_words(&job.spec.command), COMMAND_WIDTH),
        ]
    };
    table(&["ID", "STATE", "EXIT", "AGE", "RAN", "NODE", "COMMAND"], &jobs.iter().map(row).collect::<Vec<_>>())
}

fn run_time(job: &Job, now: Timestamp) -> String {
    let Some(started) = job.started_at else { return String::new() };
    took(job.finished_at.unwrap_or(now).since(started))
}

/// `2 (1 of 3 started; again when lost, failed)`: the attempts that never started do not count.
fn attempts_text(job: &Job) -> String {
    let (started, most) = (job.attempts_started, job.spec.max_attempts);
    if most <= 1 {
        return job.attempt.to_string();
    }
    let on: Vec<_> = job.spec.retry.on.iter().map(|on| retry_name(*on)).collect();
    format!("{} ({started} of {most} started; again when {})", job.attempt, on.join(", "))
}

fn dependency_text(dependency: &Dependency) -> String {
    format!("{} ({})", dependency.job_id, condition_name(dependency.condition))
}

/// One job in full.
pub(crate) fn job_text(job: &Job, now: Timestamp) -> String {
    let spec = &job.spec;
    let at = |time: Option<Timestamp>| time.map(rfc3339).unwrap_or_default();
    let pairs = |map: &std::collections::BTreeMap<String, String>| {
        map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    };
    let ending = if job.cancel_requested && !job.state.is_terminal() { " (cancelling)" } else { "" };
    fields(&[
        ("id", job.id.to_string()),
        ("state", format!("{}{ending}", job.state)),
        ("reason", job.reason.clone()),
        ("exit", exit_text(job.exit.as_ref())),
        ("command", shell_words(&spec.command)),
        ("env", pairs(&spec.env)),
        ("working dir", spec.working_dir.clone()),
        ("image", spec.image.clone()),
        ("vcpus", spec.vcpus.to_string()),
        ("memory", format!("{} MiB", spec.memory_mib)),
        ("egress", optional(spec.egress.as_ref())),
        ("volumes", spec.volumes.to_string()),
        ("isolation", isolation_name(spec.isolation).to_owned()),
        ("priority", if spec.priority == 0 { String::new() } else { spec.priority.to_string() }),
        ("timeout", spec.timeout.map(took).unwrap_or_default()),
        ("labels", pairs(&spec.labels)),
        ("queue timeout", spec.queue_timeout.map(took).unwrap_or_default()),
        ("start timeout", spec.start_timeout.map(took).unwrap_or_default()),
        ("kept for", spec.result_ttl.map(age).unwrap_or_default()),
        ("node labels", pairs(&spec.node_labels)),
        ("better on", pairs(&spec.preferred_node_labels)),
        ("group", optional(spec.group_id)),
        ("array index", optional(spec.array_index)),
        ("after", spec.depends_on.iter().map(dependency_text).collect::<Vec<_>>().join(" ")),
        ("artifacts", spec.artifacts.join(" ")),
        ("attempt", attempts_text(job)),
        ("not before", if job.state == JobState::Queued { at(job.not_before) } else { String::new() }),
        ("assignment", job.assignment.map(|kind| kind.as_str().to_owned()).unwrap_or_default()),
        ("vm", optional(job.vm_id)),
        ("node", optional(job.node_id.as_ref())),
        ("output", if job.state.is_terminal() { format!("{} bytes", job.log_bytes) } else { String::new() }),
        ("created", rfc3339(job.created_at)),
        ("assigned", at(job.assigned_at)),
        ("started", at(job.started_at)),
        ("finished", at(job.finished_at)),
        ("ran", run_time(job, now)),
    ])
}

/// A VM.
pub(crate) fn vm_json(vm: &Vm) -> Value {
    let config = &vm.config;
    json!({
        "id": vm.id.to_string(),
        "kind": config.kind.as_str(),
        "state": vm.state.as_str(),
        "reason": vm.reason,
        "node_id": vm.node_id.to_string(),
        "job_id": maybe(vm.job_id),
        "image": config.image,
        "vcpus": config.vcpus,
        "memory_mib": config.memory_mib,
        "egress": config.egress,
        "volumes": config.volumes,
        "labels": config.labels,
        "created_at": rfc3339(vm.created_at),
        "updated_at": rfc3339(vm.updated_at),
        "generation": vm.generation,
        "revision": vm.revision,
        "jobs_assigned": vm.jobs_assigned,
        "stop_grace_ms": vm.stop_grace.map(millis),
    })
}

/// VMs as a table.
pub(crate) fn vm_table(vms: &[Vm], now: Timestamp) -> String {
    let row = |vm: &Vm| {
        vec![
            vm.id.to_string(),
            vm.config.kind.as_str().to_owned(),
            vm.state.to_string(),
            vm.node_id.to_string(),
            vm.config.image.clone(),
            vm.config.vcpus.to_string(),
            format!("{} MiB", vm.config.memory_mib),
            age(now.since(vm.created_at)),
            dash(optional(vm.job_id)),
        ]
    };
    let heading = ["ID", "KIND", "STATE", "NODE", "IMAGE", "VCPUS", "MEMORY", "AGE", "JOB"];
    table(&heading, &vms.iter().map(row).collect::<Vec<_>>())
}

/// One VM in full.
pub(crate) fn vm_text(vm: &Vm, addresses: &[String]) -> String {
    let labels = vm.config.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ");
    fields(&[
        ("id", vm.id.to_string()),
        ("kind", vm.config.kind.as_str().to_owned()),
        ("state", vm.state.to_string()),
        ("reason", vm.reason.clone()),
        ("node", vm.node_id.to_string()),
        ("job", optional(vm.job_id)),
        ("jobs so far", vm.jobs_assigned.to_string()),
        ("image", vm.config.image.clone()),
        ("vcpus", vm.config.vcpus.to_string()),
        ("memory", format!("{} MiB", vm.config.memory_mib)),
        ("egress", vm.config.egress.to_string()),
        ("volumes", vm.config.volumes.to_string()),
        ("addresses", addresses.join(" ")),
        ("labels", labels),
        ("created", rfc3339(vm.created_at)),
        ("updated", rfc3339(vm.updated_at)),
    ])
}

/// A line of a VM's history, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmEvent {
    pub(crate) revision: u64,
    pub(crate) vm_id: String,
    pub(crate) time: Timestamp,
    pub(crate) from: Option<VmState>,
    pub(crate) to: Option<VmState>,
    pub(crate) reason: String,
    pub(crate) job_id: Option<String>,
}

impl TryFrom<pb::VmEvent> for VmEvent {
    type Error = Error;

    fn try_from(event: pb::VmEvent) -> Result<Self, Error> {
        let state = |field: &str, value: i32| match value {
            0 => Ok(None),
            value => VmState::from_pb(field, value).map(Some),
        };
        Ok(Self {
            revision: event.revision,
            vm_id: event.vm_id,
            time: event.timestamp.unwrap_or_default().into(),
            from: state("event.from_state", event.from_state)?,
            to: state("event.to_state", event.to_state)?,
            reason: event.reason,
            job_id: Some(event.job_id).filter(|id| !id.is_empty()),
        })
    }
}

/// A line of history.
pub(crate) fn event_json(event: &VmEvent) -> Value {
    json!({
        "revision": event.revision,
        "vm_id": event.vm_id,
        "time": rfc3339(event.time),
        "from_state": event.from.map(VmState::as_str),
        "to_state": event.to.map(VmState::as_str),
        "reason": event.reason,
        "job_id": event.job_id,
    })
}

/// Histories as a table.
pub(crate) fn event_table(events: &[VmEvent]) -> String {
    let name = |state: Option<VmState>| state.map_or("-", VmState::as_str).to_owned();
    let row = |event: &VmEvent| {
        let to = if event.to.is_none() { "purged".to_owned() } else { name(event.to) };
        let job = dash(event.job_id.clone().unwrap_or_default());
        vec![rfc3339(event.time), event.vm_id.clone(), name(event.from), to, job, event.reason.clone()]
    };
    table(&["TIME", "VM", "FROM", "TO", "JOB", "REASON"], &events.iter().map(row).collect::<Vec<_>>())
}

/// The name of a job's state in the control plane's counts; what a newer one counts and we do not know keeps its number.
pub(crate) fn job_state_name(state: i32) -> String {
    JobState::from_pb("state", state).map_or_else(|_| state.to_string(), |state| state.to_string())
}

/// The same for VMs.
pub(crate) fn vm_state_name(state: i32) -> String {
    VmState::from_pb("state", state).map_or_else(|_| state.to_string(), |state| state.to_string())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use blixard::{
        id::{JobId, NodeId, VmId},
        job::Retry,
        vm::VmConfig,
    };
    use uuid::Uuid;

    use super::*;

    pub(crate) const CREATED: Timestamp = Timestamp(1_769_860_000_250);
    const NOW: Timestamp = Timestamp(CREATED.0 + 200_000);

    fn node() -> NodeId {
        NodeId::parse("node_id", "node-1").expect("a name")
    }

    pub(crate) fn queued() -> Job {
        let spec = JobSpec {
            command: ["sh", "-c", "echo it's\u{1b}[31m; exit 7"].map(Into::into).to_vec(),
            env: BTreeMap::from([("A".into(), "1".into())]),
            working_dir: "/".into(),
            image: "default".into(),
            vcpus: 2,
            memory_mib: 512,
            isolation: Isolation::Standard,
            priority: 0,
            timeout: Some(Duration::from_secs(2)),
            max_attempts: 3,
            labels: BTreeMap::from([("team".into(), "ci".into())]),
            node_id: None,
            target_vm_id: None,
            retry: Retry {
                on: BTreeSet::from([RetryOn::Lost, RetryOn::Failed]),
                backoff: Duration::from_secs(1),
                max_backoff: Duration::from_secs(300),
            },
            queue_timeout: Some(Duration::from_secs(30)),
            start_timeout: None,
            node_labels: BTreeMap::from([("disk".into(), "ssd".into())]),
            preferred_node_labels: BTreeMap::new(),
            group_id: Some(Uuid::from_u128(0x99)),
            array_index: Some(3),
            depends_on: vec![Dependency {
                job_id: JobId(Uuid::from_u128(0x16)),
                condition: DependencyCondition::Succeeded,
            }],
            artifacts: vec!["/out/report.html".into()],
            result_ttl: Some(Duration::from_secs(86_400)),
            input_digest: Default::default(),
            egress: None,
            volumes: Default::default(),
        };
        Job {
            id: JobId(Uuid::from_u128(0x17)),
            spec,
            state: JobState::Queued,
            attempt: 0,
            vm_id: None,
            node_id: None,
            assignment: None,
            cancel_requested: false,
            exit: None,
            reason: String::new(),
            log_bytes: 0,
            generation: 1,
            revision: 5,
            created_at: CREATED,
            assigned_at: None,
            started_at: None,
            finished_at: None,
            queued_at: CREATED,
            not_before: None,
            attempts_started: 0,
        }
    }

    pub(crate) fn failed() -> Job {
        Job {
            id: JobId(Uuid::from_u128(0x18)),
            state: JobState::Failed,
            attempt: 1,
            attempts_started: 1,
            vm_id: Some(VmId(Uuid::from_u128(0xa))),
            node_id: Some(node()),
            assignment: Some(VmKind::Ephemeral),
            exit: Some(ExitStatus { kind: ExitKind::Code(7), user_time_ms: 1, system_time_ms: 2, max_rss_kib: 900 }),
            log_bytes: 12,
            generation: 4,
            revision: 9,
            assigned_at: Some(Timestamp(CREATED.0 + 10)),
            started_at: Some(Timestamp(CREATED.0 + 20)),
            finished_at: Some(Timestamp(CREATED.0 + 1520)),
            ..queued()
        }
    }

    fn vm() -> Vm {
        Vm {
            id: VmId(Uuid::from_u128(0xa)),
            config: VmConfig {
                kind: VmKind::Service,
                image: "default".into(),
                vcpus: 2,
                memory_mib: 512,
                labels: BTreeMap::from([("team".into(), "ci".into())]),
                node_id: None,
                egress: Default::default(),
                volumes: Default::default(),
            },
            state: VmState::Busy,
            node_id: node(),
            job_id: Some(JobId(Uuid::from_u128(0x17))),
            reason: String::new(),
            generation: 3,
            revision: 8,
            created_at: CREATED,
            updated_at: NOW,
            jobs_assigned: 4,
            stop_grace: None,
        }
    }

    #[test]
    fn jobs_for_people() {
        let jobs = [queued(), failed()];
        insta::assert_snapshot!(format!("{}\n{}", job_table(&jobs, NOW), job_text(&failed(), NOW)));
    }

    #[test]
    fn jobs_for_programs() {
        insta::assert_snapshot!(format!("{:#}", json!([job_json(&queued()), job_json(&failed())])));
    }

    #[test]
    fn vms_and_their_history_for_people() {
        let events = [
            VmEvent {
                revision: 8,
                vm_id: vm().id.to_string(),
                time: NOW,
                from: Some(VmState::Ready),
                to: Some(VmState::Busy),
                reason: "job assigned".into(),
                job_id: Some(JobId(Uuid::from_u128(0x17)).to_string()),
            },
            VmEvent {
                revision: 7,
                vm_id: vm().id.to_string(),
                time: CREATED,
                from: None,
                to: Some(VmState::Starting),
                reason: String::new(),
                job_id: None,
            },
        ];
        let json = json!(events.iter().map(event_json).collect::<Vec<_>>());
        insta::assert_snapshot!(format!(
            "{}\n{}\n{}\n{json:#}",
            vm_table(&[vm()], NOW),
            vm_text(&vm(), &["10.180.0.5".to_owned()]),
            event_table(&events)
        ));
    }

    #[test]
    fn vms_for_programs() {
        insta::assert_snapshot!(format!("{:#}", vm_json(&vm())));
    }

    #[test]
    fn an_empty_table_still_has_its_heading() {
        assert_eq!(table(&["ID", "STATE"], &[]), "ID  STATE\n");
    }
}
