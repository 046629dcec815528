//! A job: what to run, and the one table of its life.

mod input;
mod spec;

use std::fmt;

use crate::{
    error::{Error, invalid},
    id::{JobId, NodeId, VmId},
    pb::common::v1 as pb,
    time::Timestamp,
    vm::VmKind,
};

pub use self::{
    input::{InputFile, JobInput},
    spec::{Dependency, DependencyCondition, Isolation, JobSpec, Retry, RetryOn, TENANT_LABEL},
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

    /// Whether a job may go from here to `to`. Assigned and Running go back to Queued when their attempt is over and
    /// another may follow; Queued becomes TimedOut when it waits too long; Assigned reaches a final state directly when the report of its start was overtaken by that of its end.
    #[must_use]
    pub fn may_go_to(self, to: Self) -> bool {
        match self {
            Self::Queued => matches!(to, Self::Assigned | Self::Failed | Self::Cancelled | Self::TimedOut),
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
    /// When it last became Queued.
    pub queued_at: Timestamp,
    /// While Queued after an attempt: when the next one may begin.
    pub not_before: Option<Timestamp>,
    /// How many of its attempts have started.
    pub attempts_started: u32,
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
            queued_at: Some(job.queued_at.into()),
            not_before: job.not_before.map(Into::into),
            attempts_started: job.attempts_started,
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
            queued_at: job.queued_at.or(job.created_at).unwrap_or_default().into(),
            not_before: job.not_before.map(Into::into),
            attempts_started: job.attempts_started,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_transitions_is_the_documented_one() {
        let mut table = String::new();
        for from in JobState::ALL {
            let to: Vec<_> = JobState::ALL.into_iter().filter(|&to| from.may_go_to(to)).map(JobState::as_str).collect();
            table += &format!("{from:9} -> {}\n", to.join(" "));
        }
        insta::assert_snapshot!(table, @r"
        Queued    -> Assigned Failed Cancelled TimedOut
        Assigned  -> Queued Running Succeeded Failed Cancelled TimedOut
        Running   -> Queued Succeeded Failed Cancelled TimedOut
        Succeeded -> 
        Failed    -> 
        Cancelled -> 
        TimedOut  -> 
        ");
    }
}
