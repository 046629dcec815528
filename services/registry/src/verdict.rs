//! What a committed mutation came to, judged from the number of rows it changed and the rows as they are after it.
//!
//! A mutation that changed nothing was either there already (a repeat, answered like the first time) or is denied with
//! the reason that its caller can act on.

use std::collections::HashMap;

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::JobState,
    pb::common::v1 as pb,
    vm::{VmShape, VmState},
};
use prost::Message as _;

use crate::{
    leases,
    mutation::{LostNode, Mutation, NewJob, Outcome, config_text},
    requests::Recorded,
    rows::{AttemptEnd, JobRow, VmRow},
};

/// The rows that the mutations of a commit name, as they are after it.
#[derive(Debug, Default)]
pub(crate) struct After {
    pub(crate) vms: HashMap<VmId, VmRow>,
    pub(crate) jobs: HashMap<JobId, JobRow>,
    pub(crate) nodes: HashMap<NodeId, pb::Node>,
    pub(crate) leases: HashMap<String, leases::Recorded>,
    /// How those ended after which their job went back to the queue.
    pub(crate) attempts: HashMap<(JobId, u32), AttemptEnd>,
    /// Of the scheduler that leads.
    pub(crate) scheduler_epoch: u64,
    /// The newest revision.
    pub(crate) revision: u64,
    pub(crate) requests: HashMap<uuid::Uuid, Recorded>,
}

/// The answer to a mutation that took place or had taken place before.
#[derive(Debug)]
pub(crate) enum Answer {
    Vm(Box<pb::Vm>),
    Job(Box<pb::Job>),
    Jobs(Vec<pb::Job>),
    Lease(leases::Recorded),
    Node(Box<pb::Node>),
    Purged(usize),
    Revision(u64),
}

/// What a mutation came to.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It took place, now or before.
    Accepted(Answer),
    /// It did not and will not.
    Denied(Error),
    /// It did not, and its refusal comes with something to record: commit this one, which gives the answer.
    Instead(Box<Mutation>),
    /// Its guard did not hold, but would now: something in the same commit came between. Commit it again.
    Again,
}

impl VmRow {
    fn shape(&self) -> VmShape {
        let config = self.vm.config.as_ref();
        let of = |field: fn(&pb::VmConfig) -> Option<u32>| config.and_then(field).unwrap_or(0);
        VmShape { vcpus: of(|config| config.vcpus), memory_mib: of(|config| config.memory_mib) }
    }
}

impl Verdict {
    fn vm(row: &VmRow) -> Self {
        Self::Accepted(Answer::Vm(Box::new(row.vm.clone())))
    }

    fn job(row: &JobRow) -> Self {
        Self::Accepted(Answer::Job(Box::new(row.job.clone())))
    }
}

/// Judges a mutation. `changed` is the number of rows that its last statement changed.
pub(crate) fn judge(mutation: &Mutation, changed: usize, after: &After) -> Verdict {
    if changed == 0
        && let Some(error) = stale_epoch(mutation.scheduler_epoch(), after.scheduler_epoch)
    {
        return Verdict::Denied(error);
    }
    if changed == 0
        && let Some(error) = mutation.lost_node().and_then(|node| not_lost(node, after))
    {
        return Verdict::Denied(error);
    }
    match mutation {
        Mutation::CreateVm { id, config, node_id, .. } => match after.vms.get(id) {
            None => Verdict::Again,
            Some(row) if row.config == config_text(config) && row.vm.node_id == node_id.as_str() => Verdict::vm(row),
            Some(_) => Verdict::Denied(reused(id)),
        },
        Mutation::TransitionVm { id, to, expected_generation, .. } => match after.vms.get(id) {
            None => Verdict::Denied(vm_not_found(id)),
            Some(row) if changed > 0 || row.state == *to => Verdict::vm(row),
            Some(row) => deny_transition(row, *to, *expected_generation),
        },
        Mutation::ResizeVm { id, to, expected_generation } => match after.vms.get(id) {
            None => Verdict::Denied(vm_not_found(id)),
            Some(row) if changed > 0 || row.shape() == *to => Verdict::vm(row),
            Some(row) => deny_resize(row, *expected_generation),
        },
        Mutation::LoseNode { id, incarnation, .. } => match after.nodes.get(id) {
            None => Verdict::Denied(node_not_found(id)),
            Some(node) if node.incarnation != *incarnation => {
                Verdict::Denied(stale_incarnation(id, *incarnation, node.incarnation))
            }
            Some(node) if node.state() == pb::NodeState::Lost => {
                Verdict::Accepted(Answer::Node(Box::new(node.clone())))
            }
            Some(_) => Verdict::Again,
        },
        Mutation::ConfirmRevision => Verdict::Accepted(Answer::Revision(after.revision)),
        Mutation::PurgeVms { .. }
        | Mutation::ForgetVms { .. }
        | Mutation::ForgetJobs { .. }
        | Mutation::ForgetExpiredJobs { .. }
        | Mutation::CompactEvents { .. } => Verdict::Accepted(Answer::Purged(changed)),
        Mutation::RecordLate { job_id, attempt, outcome, refusal } => {
            let end = after.attempts.get(&(*job_id, *attempt)).copied();
            match after.jobs.get(job_id) {
                Some(row) if came_to(outcome, end, row.state) => Verdict::job(row),
                Some(_) | None => Verdict::Denied(refusal.clone()),
            }
        }
        Mutation::TakeLease { name, .. } | Mutation::ReleaseLease { name, .. } => match after.leases.get(name) {
            None => Verdict::Again,
            Some(lease) => Verdict::Accepted(Answer::Lease(lease.clone())),
        },
        Mutation::UpdateNode { id, .. } => match after.nodes.get(id) {
            None => Verdict::Denied(node_not_found(id)),
            // What was wanted of it already is no change.
            Some(node) => Verdict::Accepted(Answer::Node(Box::new(node.clone()))),
        },
        Mutation::RegisterNode { node } => match after.nodes.get(&node.id) {
            None => Verdict::Again,
            Some(node) => Verdict::Accepted(Answer::Node(Box::new(node.clone()))),
        },
        Mutation::CreateJob { job } => match after.jobs.get(&job.id) {
            None => Verdict::Again,
            Some(row) if row.spec == job.spec.encode_to_vec() => Verdict::job(row),
            Some(_) => Verdict::Denied(reused(&job.id)),
        },
        Mutation::CreateJobs { jobs } => judge_group(jobs, after),
        Mutation::AssignJob { job_id: id, .. }
        | Mutation::StartAttempt { job_id: id, .. }
        | Mutation::FinishAttempt { job_id: id, .. }
        | Mutation::CancelJob { id, .. }
        | Mutation::FailQueuedJob { id, .. } => match after.jobs.get(id) {
            None => Verdict::Denied(job_not_found(id)),
            Some(row) if changed > 0 => Verdict::job(row),
            Some(row) => judge_unchanged_job(mutation, row, after),
        },
    }
}

/// All of them were made, or were there.
fn judge_group(jobs: &[NewJob], after: &After) -> Verdict {
    let found: Vec<_> = jobs.iter().map(|job| after.jobs.get(&job.id)).collect();
    let whole: Option<Vec<_>> = found.iter().copied().collect();
    if found.iter().all(Option::is_none) {
        return Verdict::Again;
    }
    let is_other = |at: &usize| found[*at].is_some_and(|row| row.spec != jobs[*at].spec.encode_to_vec());
    let other = (0..jobs.len()).find(is_other);
    match (other, whole) {
        (None, Some(rows)) => Verdict::Accepted(Answer::Jobs(rows.into_iter().map(|row| row.job.clone()).collect())),
        // Also when some of them alone are there: this is not the group they were made in.
        (other, _) => {
            let at = other.or_else(|| found.iter().position(Option::is_some)).unwrap_or(0);
            Verdict::Denied(reused(&jobs[at].id).with("field", format!("jobs[{at}].job_id")))
        }
    }
}

/// The scheduler that asks leads no more; 0: it is none.
fn stale_epoch(epoch: u64, current: u64) -> Option<Error> {
    (epoch != 0 && epoch != current).then(|| {
        let message = format!("the scheduler of epoch {epoch} does not lead: the epoch is {current}");
        Error::new(Reason::StaleEpoch, message).with("epoch", epoch).with("current", current)
    })
}

/// The node is back.
fn not_lost(LostNode { id, incarnation }: &LostNode, after: &After) -> Option<Error> {
    let Some(node) = after.nodes.get(id) else { return Some(node_not_found(id)) };
    if node.state() == pb::NodeState::Lost && node.incarnation == *incarnation {
        return None;
    }
    let message = format!("node {id} is at incarnation {}, and not taken for lost at {incarnation}", node.incarnation);
    let error = Error::new(Reason::StaleIncarnation, message).with("node_id", id);
    Some(error.with("incarnation", incarnation).with("current", node.incarnation))
}

/// The VM is at another generation.
fn stale_generation(row: &VmRow, expected: u64) -> Option<Verdict> {
    let actual = row.vm.generation;
    (expected != 0 && expected != actual).then(|| {
        let message = format!("VM {} is at generation {actual}, not {expected}", row.vm.id);
        let error = Error::new(Reason::StaleGeneration, message)
            .with("id", &row.vm.id)
            .with("expected", expected)
            .with("actual", actual);
        Verdict::Denied(error)
    })
}

fn deny_resize(row: &VmRow, expected_generation: u64) -> Verdict {
    if let Some(stale) = stale_generation(row, expected_generation) {
        return stale;
    }
    if row.state.is_running() {
        return Verdict::Again;
    }
    let message = format!("VM {} is {} and takes no other shape", row.vm.id, row.state);
    Verdict::Denied(Error::new(Reason::VmNotAccepting, message).with("vm_id", &row.vm.id).with("state", row.state))
}

fn deny_transition(row: &VmRow, to: VmState, expected_generation: u64) -> Verdict {
    if let Some(stale) = stale_generation(row, expected_generation) {
        return stale;
    }
    let kind = row.vm.config.as_ref().map(|config| config.kind());
    let kind =
        if kind == Some(pb::VmKind::Service) { blixard::vm::VmKind::Service } else { blixard::vm::VmKind::Ephemeral };
    if row.state.may_go_to(to, kind) {
        return Verdict::Again;
    }
    Verdict::Denied(illegal("VM", &row.vm.id, row.state.as_str(), to.as_str()))
}

/// A mutation of a job that exists, and that changed nothing.
fn judge_unchanged_job(mutation: &Mutation, row: &JobRow, after: &After) -> Verdict {
    match mutation {
        Mutation::AssignJob { vm_id, attempt, .. } => judge_assign(row, *vm_id, *attempt, after),
        Mutation::StartAttempt { attempt, .. } => {
            // A report of the start that the report of the end has overtaken is late, not wrong.
            let ended = matches!(row.attempt_end, Some(AttemptEnd::Result | AttemptEnd::Retried(_)));
            let started = row.state == JobState::Running || ended;
            match *attempt == row.job.attempt {
                true if started => Verdict::job(row),
                true if row.state == JobState::Assigned => Verdict::Again,
                _ => Verdict::Denied(stale(row, *attempt)),
            }
        }
        Mutation::FinishAttempt { job_id, attempt, outcome, .. } => {
            let repeated = came_to(outcome, row.attempt_end, row.state);
            match *attempt == row.job.attempt {
                true if repeated => Verdict::job(row),
                true if row.state.may_go_to(JobState::Queued) => Verdict::Again,
                // There was no such attempt.
                _ if *attempt > row.job.attempt => Verdict::Denied(stale(row, *attempt)),
                _ => {
                    let (job_id, attempt, outcome, refusal) =
                        (*job_id, *attempt, outcome.clone(), stale(row, *attempt));
                    Verdict::Instead(Box::new(Mutation::RecordLate { job_id, attempt, outcome, refusal }))
                }
            }
        }
        Mutation::CancelJob { .. } => match row.state.is_terminal() || row.job.cancel_requested {
            true => Verdict::job(row),
            false => Verdict::Again,
        },
        Mutation::FailQueuedJob { to, reason, .. } => match row.state {
            JobState::Queued => Verdict::Again,
            state if state == *to && row.job.reason == *reason => Verdict::job(row),
            from => Verdict::Denied(illegal("job", &row.job.id, from.as_str(), to.as_str())),
        },
        Mutation::CreateVm { .. }
        | Mutation::TransitionVm { .. }
        | Mutation::ResizeVm { .. }
        | Mutation::PurgeVms { .. }
        | Mutation::CreateJob { .. }
        | Mutation::CreateJobs { .. }
        | Mutation::RecordLate { .. }
        | Mutation::UpdateNode { .. }
        | Mutation::TakeLease { .. }
        | Mutation::ReleaseLease { .. }
        | Mutation::ForgetExpiredJobs { .. }
        | Mutation::RegisterNode { .. }
        | Mutation::LoseNode { .. }
        | Mutation::ConfirmRevision
        | Mutation::ForgetVms { .. }
        | Mutation::ForgetJobs { .. }
        | Mutation::CompactEvents { .. } => Verdict::Again,
    }
}

/// Whether an attempt that ended so, of a job that ended in this state, came to this.
fn came_to(outcome: &Outcome, end: Option<AttemptEnd>, job: JobState) -> bool {
    match (outcome, end) {
        (Outcome::Result { state, .. }, Some(AttemptEnd::Result)) => job == *state,
        (Outcome::Result { state, .. }, Some(AttemptEnd::Retried(retried))) => retried == *state,
        (Outcome::Lost { .. }, Some(AttemptEnd::Lost)) => true,
        (Outcome::Result { .. } | Outcome::Lost { .. }, _) => false,
    }
}

fn judge_assign(row: &JobRow, vm_id: VmId, attempt: u32, after: &After) -> Verdict {
    let vm = after.vms.get(&vm_id);
    // An attempt that another may follow is over, though it was this one.
    let same = row.job.attempt == attempt && row.job.vm_id == vm_id.to_string();
    if same && matches!(row.attempt_end, None | Some(AttemptEnd::Result)) {
        return Verdict::job(row);
    }
    if row.job.attempt.checked_add(1) != Some(attempt) {
        return Verdict::Denied(stale(row, attempt));
    }
    if !row.state.may_go_to(JobState::Assigned) {
        return Verdict::Denied(illegal("job", &row.job.id, row.state.as_str(), JobState::Assigned.as_str()));
    }
    match vm {
        None => Verdict::Denied(vm_not_found(&vm_id)),
        Some(vm) if vm.state.takes_jobs() => Verdict::Again,
        Some(vm) => Verdict::Denied(
            Error::new(Reason::VmNotAccepting, format!("VM {vm_id} is {} and takes no jobs", vm.state))
                .with("vm_id", vm_id)
                .with("state", vm.state),
        ),
    }
}

/// No such VM.
pub(crate) fn vm_not_found(id: &VmId) -> Error {
    Error::new(Reason::VmNotFound, format!("there is no VM {id}")).with("vm_id", id)
}

/// No such job.
pub(crate) fn job_not_found(id: &JobId) -> Error {
    Error::new(Reason::JobNotFound, format!("there is no job {id}")).with("job_id", id)
}

/// No such node.
pub(crate) fn node_not_found(id: &NodeId) -> Error {
    Error::new(Reason::NodeNotFound, format!("there is no node {id}")).with("node_id", id)
}

/// The incarnation is over.
pub(crate) fn stale_incarnation(id: &NodeId, incarnation: u64, current: u64) -> Error {
    let message = match incarnation == current {
        true => format!("node {id} is Lost: register again"),
        false => format!("node {id} is at incarnation {current}, not {incarnation}: register again"),
    };
    let error = Error::new(Reason::StaleIncarnation, message).with("node_id", id);
    error.with("incarnation", incarnation).with("current", current)
}

/// The id stands for something else.
pub(crate) fn reused(id: &impl std::fmt::Display) -> Error {
    Error::new(Reason::RequestIdReused, format!("{id} was used before with another body")).with("request_id", id)
}

fn stale(row: &JobRow, attempt: u32) -> Error {
    let (id, current) = (&row.job.id, row.job.attempt);
    let message = match attempt == current {
        true => format!("attempt {attempt} of job {id} is over"),
        false => format!("job {id} is at attempt {current}, which attempt {attempt} does not fit"),
    };
    Error::new(Reason::StaleAttempt, message).with("job_id", id).with("attempt", attempt).with("current", current)
}

fn illegal(what: &str, id: &str, from: &str, to: &str) -> Error {
    Error::new(Reason::IllegalTransition, format!("{what} {id} is {from} and cannot become {to}"))
        .with("id", id)
        .with("from", from)
        .with("to", to)
}
