//! A job: what to run, and the one table of its life.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::{
    error::{Error, invalid},
    id::{JobId, NodeId, VmId},
    limits,
    pb::common::v1 as pb,
    time::Timestamp,
    vm::{Defaults, VmKind, parse_image, parse_labels, parse_memory, parse_node, parse_vcpus},
};

/// Where a job is in its life. The names are those of the registry's `state` column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum JobState {
    Queued,
    Assigned,
    Running,
    Succeeded,
    Failed,
    Cancelled,
    TimedOut,
}

impl JobState {
    /// Every state, in the order of a job's life.
    pub const ALL: [Self; 7] =
        [Self::Queued, Self::Assigned, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled, Self::TimedOut];

    /// Whether a job may go from here to `to`. Assigned and Running go back to Queued when their attempt is lost;
    /// Assigned reaches a final state directly when the report of its start was overtaken by that of its end.
    #[must_use]
    pub fn may_go_to(self, to: Self) -> bool {
        match self {
            Self::Queued => matches!(to, Self::Assigned | Self::Failed | Self::Cancelled),
            Self::Assigned => to == Self::Running || to == Self::Queued || to.is_terminal(),
            Self::Running => to == Self::Queued || to.is_terminal(),
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::TimedOut => false,
        }
    }

    /// Whether the job has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::TimedOut)
    }

    /// The name in tables, logs and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "Queued",
            Self::Assigned => "Assigned",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
            Self::TimedOut => "TimedOut",
        }
    }

    /// The inverse of [`JobState::as_str`], ignoring case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str().eq_ignore_ascii_case(name))
    }

    /// Parses the wire's value.
    pub fn from_pb(field: &str, value: i32) -> Result<Self, Error> {
        Ok(match pb::JobState::try_from(value) {
            Ok(pb::JobState::Queued) => Self::Queued,
            Ok(pb::JobState::Assigned) => Self::Assigned,
            Ok(pb::JobState::Running) => Self::Running,
            Ok(pb::JobState::Succeeded) => Self::Succeeded,
            Ok(pb::JobState::Failed) => Self::Failed,
            Ok(pb::JobState::Cancelled) => Self::Cancelled,
            Ok(pb::JobState::TimedOut) => Self::TimedOut,
            Ok(pb::JobState::Unspecified) | Err(_) => {
                return Err(invalid(field, value, "one of the job states 1 to 7"));
            }
        })
    }

    /// The wire's value.
    #[must_use]
    pub fn to_pb(self) -> pb::JobState {
        match self {
            Self::Queued => pb::JobState::Queued,
            Self::Assigned => pb::JobState::Assigned,
            Self::Running => pb::JobState::Running,
            Self::Succeeded => pb::JobState::Succeeded,
            Self::Failed => pb::JobState::Failed,
            Self::Cancelled => pb::JobState::Cancelled,
            Self::TimedOut => pb::JobState::TimedOut,
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How far a job must be kept from other jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Always a fresh VM.
    Maximum,
    /// A free service VM if there is one, else a fresh VM.
    Standard,
    /// A service VM only.
    Minimal,
}

/// What to run: checked, with every default filled in. Never changes once recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// Program and arguments; never empty.
    pub command: Vec<String>,
    /// Environment, added to the guest's own.
    pub env: BTreeMap<String, String>,
    /// Absolute path to run in.
    pub working_dir: String,
    /// Image it needs.
    pub image: String,
    /// Virtual CPUs of its VM.
    pub vcpus: u32,
    /// Memory of its VM in MiB.
    pub memory_mib: u32,
    /// How far it must be kept from other jobs.
    pub isolation: Isolation,
    /// Higher runs first, -1000 to 1000.
    pub priority: i32,
    /// How long one attempt may run, from its start in the guest.
    pub timeout: Option<Duration>,
    /// How many attempts may start.
    pub max_attempts: u32,
    /// Labels for filtering.
    pub labels: BTreeMap<String, String>,
    /// The node that must run it.
    pub node_id: Option<NodeId>,
    /// The VM that must run it.
    pub target_vm_id: Option<VmId>,
}

impl JobSpec {
    /// Checks a request's `spec`, filling in defaults; errors name the field below `field`.
    pub fn parse(field: &str, spec: pb::JobSpec, defaults: Defaults) -> Result<Self, Error> {
        let at = |name: &str| format!("{field}.{name}");
        check_command(&at("command"), &spec.command)?;
        check_env(&at("env"), &spec.env)?;
        let working_dir = if spec.working_dir.is_empty() { "/".to_owned() } else { spec.working_dir };
        if !working_dir.starts_with('/') || working_dir.len() > 4096 || working_dir.contains('\0') {
            return Err(invalid(&at("working_dir"), working_dir, "an absolute path of at most 4096 bytes"));
        }
        if !(-1000..=1000).contains(&spec.priority) {
            return Err(invalid(&at("priority"), spec.priority, "-1000 to 1000"));
        }
        let timeout = Duration::from_millis(spec.timeout_ms);
        if timeout > limits::MAX_TIMEOUT {
            let allowed = format!("at most {} (30 days), 0 for none", limits::MAX_TIMEOUT.as_millis());
            return Err(invalid(&at("timeout_ms"), spec.timeout_ms, &allowed));
        }
        if spec.max_attempts > limits::MAX_ATTEMPTS {
            return Err(invalid(&at("max_attempts"), spec.max_attempts, &format!("0 to {}", limits::MAX_ATTEMPTS)));
        }
        let isolation = match pb::Isolation::try_from(spec.isolation) {
            Ok(pb::Isolation::Maximum) => Isolation::Maximum,
            Ok(pb::Isolation::Standard | pb::Isolation::Unspecified) => Isolation::Standard,
            Ok(pb::Isolation::Minimal) => Isolation::Minimal,
            Err(_) => return Err(invalid(&at("isolation"), spec.isolation, "one of the isolation levels 0 to 3")),
        };
        Ok(Self {
            command: spec.command,
            env: spec.env,
            working_dir,
            image: parse_image(field, spec.image)?,
            vcpus: parse_vcpus(field, spec.vcpus, defaults)?,
            memory_mib: parse_memory(field, spec.memory_mib, defaults)?,
            isolation,
            priority: spec.priority,
            timeout: (!timeout.is_zero()).then_some(timeout),
            max_attempts: spec.max_attempts.max(1),
            labels: parse_labels(field, spec.labels)?,
            node_id: parse_node(field, &spec.node_id)?,
            target_vm_id: match spec.target_vm_id.as_str() {
                "" => None,
                id => Some(VmId::parse(&at("target_vm_id"), id)?),
            },
        })
    }

    /// Checks a spec in which nothing may be left out: what services send each other.
    pub fn parse_full(field: &str, spec: Option<pb::JobSpec>) -> Result<Self, Error> {
        let spec = spec.ok_or_else(|| invalid(field, "", "required"))?;
        Self::parse(field, spec, Defaults { vcpus: 0, memory_mib: 0 })
    }
}

fn check_command(field: &str, command: &[String]) -> Result<(), Error> {
    if command.first().is_none_or(String::is_empty) {
        return Err(invalid(field, "", "a program and its arguments"));
    }
    if command.len() > limits::MAX_COMMAND_ARGS {
        return Err(invalid(field, command.len(), &format!("at most {} strings", limits::MAX_COMMAND_ARGS)));
    }
    let bytes: usize = command.iter().map(String::len).sum();
    if bytes > limits::MAX_COMMAND_BYTES {
        return Err(invalid(field, bytes, &format!("at most {} bytes in all", limits::MAX_COMMAND_BYTES)));
    }
    match command.iter().find(|argument| argument.contains('\0')) {
        Some(argument) => Err(invalid(field, argument.escape_debug(), "strings without NUL bytes")),
        None => Ok(()),
    }
}

fn check_env(field: &str, env: &BTreeMap<String, String>) -> Result<(), Error> {
    if env.len() > limits::MAX_ENV_VARS {
        return Err(invalid(field, env.len(), &format!("at most {} variables", limits::MAX_ENV_VARS)));
    }
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > limits::MAX_COMMAND_BYTES {
        return Err(invalid(field, bytes, &format!("at most {} bytes in all", limits::MAX_COMMAND_BYTES)));
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(invalid(
                field,
                name.escape_debug(),
                "names that are not empty and contain neither '=' nor NUL",
            ));
        }
        if value.contains('\0') {
            return Err(invalid(field, value.escape_debug(), "values without NUL bytes"));
        }
    }
    Ok(())
}

impl From<JobSpec> for pb::JobSpec {
    fn from(spec: JobSpec) -> Self {
        Self {
            command: spec.command,
            env: spec.env,
            working_dir: spec.working_dir,
            image: spec.image,
            vcpus: Some(spec.vcpus),
            memory_mib: Some(spec.memory_mib),
            isolation: match spec.isolation {
                Isolation::Maximum => pb::Isolation::Maximum,
                Isolation::Standard => pb::Isolation::Standard,
                Isolation::Minimal => pb::Isolation::Minimal,
            }
            .into(),
            priority: spec.priority,
            timeout_ms: spec.timeout.map_or(0, |timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            max_attempts: spec.max_attempts,
            labels: spec.labels,
            node_id: spec.node_id.map(|id| id.to_string()).unwrap_or_default(),
            target_vm_id: spec.target_vm_id.map(|id| id.to_string()).unwrap_or_default(),
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitKind {
    /// It exited with this status, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// How a process ended and what it used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExitStatus {
    /// Status or signal.
    pub kind: ExitKind,
    /// CPU time in user mode, with waited-for children.
    pub user_time_ms: u64,
    /// CPU time in the kernel, likewise.
    pub system_time_ms: u64,
    /// The largest resident set among them.
    pub max_rss_kib: u64,
}

impl ExitStatus {
    /// Parses the wire's message: exactly one of code and signal.
    pub fn parse(field: &str, exit: pb::ExitStatus) -> Result<Self, Error> {
        let kind = match (exit.exit_code, exit.signal) {
            (Some(code), None) => ExitKind::Code(code),
            (None, Some(signal)) => ExitKind::Signal(signal),
            _ => return Err(invalid(field, "", "exactly one of exit_code and signal")),
        };
        Ok(Self {
            kind,
            user_time_ms: exit.user_time_ms,
            system_time_ms: exit.system_time_ms,
            max_rss_kib: exit.max_rss_kib,
        })
    }

    /// Whether the process exited with status 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.kind == ExitKind::Code(0)
    }
}

impl From<ExitStatus> for pb::ExitStatus {
    fn from(exit: ExitStatus) -> Self {
        let (exit_code, signal) = match exit.kind {
            ExitKind::Code(code) => (Some(code), None),
            ExitKind::Signal(signal) => (None, Some(signal)),
        };
        Self {
            exit_code,
            signal,
            user_time_ms: exit.user_time_ms,
            system_time_ms: exit.system_time_ms,
            max_rss_kib: exit.max_rss_kib,
        }
    }
}

/// A job as the registry records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub id: JobId,
    /// What to run.
    pub spec: JobSpec,
    /// Where it is in its life.
    pub state: JobState,
    /// Number of its latest attempt (its epoch); 0 before the first.
    pub attempt: u32,
    /// VM of the latest attempt.
    pub vm_id: Option<VmId>,
    /// Node of that VM; it holds the attempt's log.
    pub node_id: Option<NodeId>,
    /// Kind of that VM.
    pub assignment: Option<VmKind>,
    /// Somebody asked for its end, and it has not ended yet.
    pub cancel_requested: bool,
    /// How the command ended.
    pub exit: Option<ExitStatus>,
    /// Why it is in this state; may be empty.
    pub reason: String,
    /// Length of the latest attempt's log, once it has ended.
    pub log_bytes: u64,
    /// Counts its changes, from 1.
    pub generation: u64,
    /// The registry's revision at its last change.
    pub revision: u64,
    /// When it was submitted.
    pub created_at: Timestamp,
    /// When the latest attempt was given its VM.
    pub assigned_at: Option<Timestamp>,
    /// When the latest attempt's command started.
    pub started_at: Option<Timestamp>,
    /// When it reached its final state.
    pub finished_at: Option<Timestamp>,
}

impl From<Job> for pb::Job {
    fn from(job: Job) -> Self {
        Self {
            id: job.id.to_string(),
            spec: Some(job.spec.into()),
            state: job.state.to_pb().into(),
            attempt: job.attempt,
            vm_id: job.vm_id.map(|id| id.to_string()).unwrap_or_default(),
            node_id: job.node_id.map(|id| id.to_string()).unwrap_or_default(),
            assignment: match job.assignment {
                None => pb::AssignmentKind::Unspecified,
                Some(VmKind::Ephemeral) => pb::AssignmentKind::Ephemeral,
                Some(VmKind::Service) => pb::AssignmentKind::Service,
            }
            .into(),
            cancel_requested: job.cancel_requested,
            exit: job.exit.map(Into::into),
            reason: job.reason,
            log_bytes: job.log_bytes,
            generation: job.generation,
            revision: job.revision,
            created_at: Some(job.created_at.into()),
            assigned_at: job.assigned_at.map(Into::into),
            started_at: job.started_at.map(Into::into),
            finished_at: job.finished_at.map(Into::into),
        }
    }
}

impl TryFrom<pb::Job> for Job {
    type Error = Error;

    fn try_from(job: pb::Job) -> Result<Self, Error> {
        Ok(Self {
            id: JobId::parse("job.id", &job.id)?,
            spec: JobSpec::parse_full("job.spec", job.spec)?,
            state: JobState::from_pb("job.state", job.state)?,
            attempt: job.attempt,
            vm_id: if job.vm_id.is_empty() { None } else { Some(VmId::parse("job.vm_id", &job.vm_id)?) },
            node_id: if job.node_id.is_empty() { None } else { Some(NodeId::parse("job.node_id", &job.node_id)?) },
            assignment: match pb::AssignmentKind::try_from(job.assignment) {
                Ok(pb::AssignmentKind::Unspecified) => None,
                Ok(pb::AssignmentKind::Ephemeral) => Some(VmKind::Ephemeral),
                Ok(pb::AssignmentKind::Service) => Some(VmKind::Service),
                Err(_) => return Err(invalid("job.assignment", job.assignment, "one of the assignment kinds 0 to 2")),
            },
            cancel_requested: job.cancel_requested,
            exit: job.exit.map(|exit| ExitStatus::parse("job.exit", exit)).transpose()?,
            reason: job.reason,
            log_bytes: job.log_bytes,
            generation: job.generation,
            revision: job.revision,
            created_at: job.created_at.unwrap_or_default().into(),
            assigned_at: job.assigned_at.map(Into::into),
            started_at: job.started_at.map(Into::into),
            finished_at: job.finished_at.map(Into::into),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults { vcpus: 2, memory_mib: 512 };

    fn spec(change: impl FnOnce(&mut pb::JobSpec)) -> Result<JobSpec, Error> {
        let mut spec = pb::JobSpec { command: vec!["true".into()], ..Default::default() };
        change(&mut spec);
        JobSpec::parse("spec", spec, DEFAULTS)
    }

    #[test]
    fn the_table_of_transitions_is_the_documented_one() {
        let mut table = String::new();
        for from in JobState::ALL {
            let to: Vec<_> = JobState::ALL.into_iter().filter(|&to| from.may_go_to(to)).map(JobState::as_str).collect();
            table += &format!("{from:9} -> {}\n", to.join(" "));
        }
        insta::assert_snapshot!(table, @r"
        Queued    -> Assigned Failed Cancelled
        Assigned  -> Queued Running Succeeded Failed Cancelled TimedOut
        Running   -> Queued Succeeded Failed Cancelled TimedOut
        Succeeded -> 
        Failed    -> 
        Cancelled -> 
        TimedOut  -> 
        ");
    }

    #[test]
    fn a_spec_is_filled_with_defaults_and_survives_the_wire() {
        let spec = spec(|_| {}).expect("valid");
        assert_eq!((spec.vcpus, spec.memory_mib, spec.image.as_str(), spec.max_attempts), (2, 512, "default", 1));
        assert_eq!(JobSpec::parse_full("spec", Some(spec.clone().into())), Ok(spec));
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        type Spoil = fn(&mut pb::JobSpec);
        let cases: &[(&str, Spoil)] = &[
            ("spec.command", |s| s.command.clear()),
            ("spec.command", |s| s.command = vec!["x".repeat(limits::MAX_COMMAND_BYTES + 1)]),
            ("spec.command", |s| s.command.push("a\0b".into())),
            ("spec.env", |s| drop(s.env.insert("A=B".into(), String::new()))),
            ("spec.working_dir", |s| s.working_dir = "tmp".into()),
            ("spec.image", |s| s.image = "../etc".into()),
            ("spec.vcpus", |s| s.vcpus = Some(0)),
            ("spec.memory_mib", |s| s.memory_mib = Some(1)),
            ("spec.isolation", |s| s.isolation = 9),
            ("spec.priority", |s| s.priority = 1001),
            ("spec.timeout_ms", |s| s.timeout_ms = u64::MAX),
            ("spec.max_attempts", |s| s.max_attempts = 101),
            ("spec.labels", |s| drop(s.labels.insert(String::new(), String::new()))),
            ("spec.node_id", |s| s.node_id = "a b".into()),
            ("spec.target_vm_id", |s| s.target_vm_id = "nonsense".into()),
        ];
        for (field, change) in cases {
            let error = spec(change).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(*field), "{error}");
        }
    }
}
