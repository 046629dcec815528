//! What each unary call means: a change of the registry, or a question to it. Parse, and encode what came of it.
//!
//! It must not know whether a Raft log stands in front of the database ([`crate::service`]) or none ([`crate::simulation`]).

use std::collections::{BTreeMap, BTreeSet};

use blixard::{
    error::{Error, invalid},
    id::{JobId, NAME_ALLOWED, NodeId, VmId, is_name},
    job::{ExitStatus, JobSpec, JobState},
    limits,
    node::{Node, NodeState},
    pb::{
        common::v1 as pb,
        registry::v1::{self as wire, finish_attempt_request::Outcome as WireOutcome},
    },
    time::Timestamp,
    vm::{VmConfig, VmKind, VmShape, VmState, parse_labels},
};
use hiqlite::rusqlite::{self, Connection};
use prost::Message as _;
use std::time::Duration;
use uuid::Uuid;

use crate::{
    leases::{Holder, Recorded, Wish},
    list::{self, Filter, List, PageRequest},
    mutation::{LostNode, Mutation, NewJob, Outcome},
    read::newest_revision,
    requests::Repeatable,
    rows::{JobRow, VmRow, attempts, number},
    verdict::{Answer, job_not_found, vm_not_found},
};

/// Rows that one mutation of a purge deletes: a few milliseconds of everybody's time.
pub(crate) const PURGE_CHUNK: u32 = 500;
/// Most ids that a purge and a search may name.
const MAX_IDS: usize = 1000;
/// Most bytes of a job's input as it is stored: what may be submitted, and what sealing adds to secrets.
const MAX_STORED_INPUT_BYTES: usize = limits::MAX_INPUT_BYTES + 64 * 1024;
/// Most bytes of a decision.
const MAX_DECISION_BYTES: usize = 16 * 1024;
/// Longest name of a lease's holder.
const MAX_HOLDER_BYTES: usize = 255;
/// How long a lease may be kept without being asked for, in milliseconds.
const LEASE_TTL_MS: std::ops::RangeInclusive<u32> = 1000..=60_000;

/// A request that is one change.
pub(crate) trait Command: Repeatable {
    type Response;

    /// Checks it. A time that is left out is `now`.
    fn parse(self, now: Timestamp) -> Result<Mutation, Error>;

    /// `None`: the answer is about another kind of object.
    fn response(answer: Answer) -> Option<Self::Response>;
}

/// What a question asks of the database, in one read transaction.
pub(crate) type Read<T> = Box<dyn FnOnce(&Connection) -> rusqlite::Result<Result<T, Error>> + Send>;

/// A request that changes nothing.
pub(crate) trait Question {
    type Response: Send + 'static;

    /// Checks it.
    fn parse(self) -> Result<Read<Self::Response>, Error>;
}

impl Answer {
    fn vm(self) -> Option<pb::Vm> {
        if let Self::Vm(vm) = self { Some(*vm) } else { None }
    }

    fn job(self) -> Option<pb::Job> {
        if let Self::Job(job) = self { Some(*job) } else { None }
    }

    fn node(self) -> Option<pb::Node> {
        if let Self::Node(node) = self { Some(*node) } else { None }
    }
}

impl Command for wire::CreateVmRequest {
    type Response = wire::CreateVmResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::CreateVm {
            id: VmId::parse("vm_id", &self.vm_id)?,
            config: VmConfig::parse_full("config", self.config)?,
            node_id: NodeId::parse("node_id", &self.node_id)?,
            scheduler_epoch: self.scheduler_epoch,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::CreateVmResponse { vm: Some(answer.vm()?) })
    }
}

impl Command for wire::TransitionVmRequest {
    type Response = wire::TransitionVmResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::TransitionVm {
            id: VmId::parse("vm_id", &self.vm_id)?,
            to: VmState::from_pb("to_state", self.to_state)?,
            expected_generation: self.expected_generation,
            reason: reason("reason", self.reason)?,
            grace_ms: grace(self.grace_ms)?,
            lost_node: lost_node("lost_node", self.lost_node)?,
            scheduler_epoch: self.scheduler_epoch,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::TransitionVmResponse { vm: Some(answer.vm()?) })
    }
}

impl Command for wire::ResizeVmRequest {
    type Response = wire::ResizeVmResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::ResizeVm {
            id: VmId::parse("vm_id", &self.vm_id)?,
            to: VmShape::parse(self.vcpus, self.memory_mib)?,
            expected_generation: self.expected_generation,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::ResizeVmResponse { vm: Some(answer.vm()?) })
    }
}

impl Command for wire::CreateJobRequest {
    type Response = wire::CreateJobResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::CreateJob { job: Box::new(new_job("", self)?) })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::CreateJobResponse { job: Some(answer.job()?) })
    }
}

/// Several jobs, to be recorded together. They have no request id.
pub(crate) fn new_jobs(request: wire::CreateJobsRequest) -> Result<Mutation, Error> {
    let (count, bytes) = (request.jobs.len(), request.encoded_len());
    if !(1..=limits::MAX_GROUP_JOBS).contains(&count) {
        return Err(invalid("jobs", count, &format!("1 to {} jobs", limits::MAX_GROUP_JOBS)));
    }
    if bytes > limits::MAX_GROUP_BYTES {
        return Err(invalid("jobs", bytes, &format!("at most {} bytes in all", limits::MAX_GROUP_BYTES)));
    }
    let mut ids = BTreeSet::new();
    let mut jobs = Vec::with_capacity(count);
    for (at, request) in request.jobs.into_iter().enumerate() {
        let field = format!("jobs[{at}].");
        if !request.request_id.is_empty() {
            return Err(invalid(&format!("{field}request_id"), request.request_id, "empty"));
        }
        let job = new_job(&field, request)?;
        if !ids.insert(job.id) {
            return Err(invalid(&format!("{field}job_id"), job.id, "an id that no other job of the request has"));
        }
        jobs.push(job);
    }
    Ok(Mutation::CreateJobs { jobs })
}

fn new_job(at: &str, request: wire::CreateJobRequest) -> Result<NewJob, Error> {
    let spec = JobSpec::parse_full(&format!("{at}spec"), request.spec)?;
    let (field, input) = (format!("{at}input"), request.input);
    match (&input, spec.input_digest.is_empty()) {
        (None, true) | (Some(_), false) => {}
        (None, false) => return Err(invalid(&field, "", "required, since `spec.input_digest` identifies it")),
        (Some(_), true) => return Err(invalid(&format!("{at}spec.input_digest"), "", "32 bytes with an `input`")),
    }
    if let Some(input) = &input {
        if !input.secrets.is_empty() {
            return Err(invalid(&format!("{field}.secrets"), input.secrets.len(), "none: they are sealed first"));
        }
        let bytes = input.encoded_len();
        if bytes > MAX_STORED_INPUT_BYTES {
            return Err(invalid(&field, bytes, &format!("at most {MAX_STORED_INPUT_BYTES} bytes in all")));
        }
    }
    Ok(NewJob { id: JobId::parse(&format!("{at}job_id"), &request.job_id)?, spec: spec.into(), input })
}

impl Command for wire::AssignJobRequest {
    type Response = wire::AssignJobResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        let bytes = self.decision.as_ref().map_or(0, |decision| decision.encoded_len());
        if bytes > MAX_DECISION_BYTES {
            return Err(invalid("decision", bytes, &format!("at most {MAX_DECISION_BYTES} bytes")));
        }
        Ok(Mutation::AssignJob {
            job_id: JobId::parse("job_id", &self.job_id)?,
            vm_id: VmId::parse("vm_id", &self.vm_id)?,
            attempt: attempt(self.attempt)?,
            decision: self.decision,
            scheduler_epoch: self.scheduler_epoch,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::AssignJobResponse { job: Some(answer.job()?) })
    }
}

impl Command for wire::StartAttemptRequest {
    type Response = wire::StartAttemptResponse;

    fn parse(self, now: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::StartAttempt {
            job_id: JobId::parse("job_id", &self.job_id)?,
            attempt: attempt(self.attempt)?,
            started_at: self.started_at.map_or(now, Into::into),
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::StartAttemptResponse { job: Some(answer.job()?) })
    }
}

impl Command for wire::FinishAttemptRequest {
    type Response = wire::FinishAttemptResponse;

    fn parse(self, now: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::FinishAttempt {
            job_id: JobId::parse("job_id", &self.job_id)?,
            attempt: attempt(self.attempt)?,
            outcome: outcome(self.outcome, now)?,
            scheduler_epoch: self.scheduler_epoch,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::FinishAttemptResponse { job: Some(answer.job()?) })
    }
}

impl Command for wire::CancelJobRequest {
    type Response = wire::CancelJobResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        Ok(Mutation::CancelJob { id: JobId::parse("job_id", &self.job_id)?, reason: reason("reason", self.reason)? })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::CancelJobResponse { job: Some(answer.job()?) })
    }
}

impl Command for wire::FailQueuedJobRequest {
    type Response = wire::FailQueuedJobResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        if self.reason.is_empty() {
            return Err(invalid("reason", "", &format!("1 to {} bytes", limits::MAX_REASON_BYTES)));
        }
        Ok(Mutation::FailQueuedJob {
            id: JobId::parse("job_id", &self.job_id)?,
            to: if self.timed_out { JobState::TimedOut } else { JobState::Failed },
            reason: reason("reason", self.reason)?,
            scheduler_epoch: self.scheduler_epoch,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::FailQueuedJobResponse { job: Some(answer.job()?) })
    }
}

impl Command for wire::RegisterNodeRequest {
    type Response = wire::RegisterNodeResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        let node = self.node.ok_or_else(|| invalid("node", "", "required"))?;
        // What the registry sets is ignored, so that it can't be wrong either.
        Ok(Mutation::RegisterNode { node: Node::try_from(pb::Node { state: 0, wanted: 0, ..node })? })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::RegisterNodeResponse { node: Some(answer.node()?) })
    }
}

impl Command for wire::UpdateNodeRequest {
    type Response = wire::UpdateNodeResponse;

    fn parse(self, _: Timestamp) -> Result<Mutation, Error> {
        let wanted = NodeState::from_pb("wanted", self.wanted)?;
        if wanted == NodeState::Lost {
            return Err(invalid("wanted", wanted, "Ready, Cordoned or Draining"));
        }
        let drain_deadline: Option<Timestamp> = self.drain_deadline.map(Into::into);
        if let Some(deadline) = drain_deadline.filter(|_| wanted != NodeState::Draining) {
            return Err(invalid("drain_deadline", deadline.0, "none, unless the node is to be Draining"));
        }
        Ok(Mutation::UpdateNode {
            id: NodeId::parse("node_id", &self.node_id)?,
            wanted,
            reason: reason("reason", self.reason)?,
            drain_deadline,
        })
    }

    fn response(answer: Answer) -> Option<Self::Response> {
        Some(wire::UpdateNodeResponse { node: Some(answer.node()?) })
    }
}

/// A chunk of a purge; when it deletes as many rows as it may, another one follows.
pub(crate) fn purge(request: &wire::PurgeVmsRequest) -> Result<Mutation, Error> {
    let states = purged_states(&request.states)?;
    let ids = ids("vm_ids", &request.vm_ids, VmId::parse)?;
    Ok(Mutation::PurgeVms { states, ids, at_most: PURGE_CHUNK })
}

/// Who asks for which lease.
#[derive(Debug, Clone)]
pub(crate) struct LeaseRequest {
    pub(crate) name: String,
    pub(crate) who: Holder,
    pub(crate) wish: Wish,
}

impl LeaseRequest {
    pub(crate) fn parse(request: wire::AcquireLeaseRequest) -> Result<Self, Error> {
        let wire::AcquireLeaseRequest { name, holder, instance, ttl_ms, release } = request;
        if !is_name(&name) {
            return Err(invalid("name", name, NAME_ALLOWED));
        }
        if !(1..=MAX_HOLDER_BYTES).contains(&holder.len()) {
            return Err(invalid("holder", holder, &format!("1 to {MAX_HOLDER_BYTES} bytes")));
        }
        let instance = Uuid::parse_str(&instance).map_err(|_| invalid("instance", instance, "a UUID"))?;
        if !release && !LEASE_TTL_MS.contains(&ttl_ms) {
            let (least, most) = (LEASE_TTL_MS.start(), LEASE_TTL_MS.end());
            return Err(invalid("ttl_ms", ttl_ms, &format!("{least} to {most}")));
        }
        let wish = if release { Wish::GiveUp } else { Wish::Have(Duration::from_millis(ttl_ms.into())) };
        Ok(Self { name, who: Holder { name: holder, instance }, wish })
    }

    pub(crate) fn response(&self, lease: Recorded) -> wire::AcquireLeaseResponse {
        let Recorded { holder, epoch } = lease;
        let held = holder.as_ref() == Some(&self.who);
        wire::AcquireLeaseResponse { held, epoch, holder: holder.map_or_else(String::new, |holder| holder.name) }
    }

    /// Who asks takes it.
    pub(crate) fn take(&self, epoch: u64) -> Mutation {
        Mutation::TakeLease { name: self.name.clone(), holder: self.who.clone(), epoch }
    }

    /// Who asks gives it up.
    pub(crate) fn give_up(&self) -> Mutation {
        Mutation::ReleaseLease { name: self.name.clone(), holder: self.who.clone() }
    }
}

impl Question for wire::GetVmRequest {
    type Response = wire::GetVmResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        let id = VmId::parse("vm_id", &self.vm_id)?;
        Ok(Box::new(move |connection| {
            let row = VmRow::find(connection, &id.to_string())?.ok_or_else(|| vm_not_found(&id));
            Ok(row.map(|row| wire::GetVmResponse { vm: Some(row.vm) }))
        }))
    }
}

impl Question for wire::ListVmsRequest {
    type Response = wire::ListVmsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        let page = PageRequest::parse_revision(List::Vms, self.page_size, &self.page_token)?;
        let kind = match self.kind {
            0 => "",
            kind => VmKind::from_pb("kind", kind)?.as_str(),
        };
        let filter = Filter::default()
            .states(vm_states(&self.states)?.into_iter().map(VmState::as_str))
            .equals("kind", kind)
            .equals("node_id", node_filter(&self.node_id)?)
            .labels(&parse_labels("labels", self.labels)?);
        Ok(Box::new(move |connection| {
            let page = list::vms(connection, &page, &filter)?;
            let (vms, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
            Ok(Ok(wire::ListVmsResponse { vms, next_page_token, revision }))
        }))
    }
}

impl Question for wire::ListVmEventsRequest {
    type Response = wire::ListVmEventsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        let page = PageRequest::parse_revision(List::VmEvents, self.page_size, &self.page_token)?;
        let vm_id = match self.vm_id.as_str() {
            "" => String::new(),
            id => VmId::parse("vm_id", id)?.to_string(),
        };
        Ok(Box::new(move |connection| {
            let page = list::vm_events(connection, &page, &vm_id)?;
            Ok(Ok(wire::ListVmEventsResponse { events: page.items, next_page_token: page.next_page_token }))
        }))
    }
}

impl Question for wire::GetJobRequest {
    type Response = wire::GetJobResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        of_job(&self.job_id, |_, row| Ok(wire::GetJobResponse { job: Some(row.job) }))
    }
}

impl Question for wire::GetJobInputRequest {
    type Response = wire::GetJobInputResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        of_job(&self.job_id, |connection, row| {
            let sql = "SELECT input FROM job_inputs WHERE job_id = ?1";
            let mut statement = connection.prepare_cached(sql)?;
            let mut found = statement.query_map([&row.job.id], |row| row.get::<_, Vec<u8>>(0))?;
            let input = found.next().transpose()?;
            let decoded = input.map(|bytes| pb::JobInput::decode(bytes.as_slice())).transpose();
            let input = decoded.map_err(|error| {
                rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, error.into())
            })?;
            Ok(wire::GetJobInputResponse { input })
        })
    }
}

impl Question for wire::ListAttemptsRequest {
    type Response = wire::ListAttemptsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        of_job(&self.job_id, |connection, row| Ok(wire::ListAttemptsResponse { attempts: attempts(connection, &row)? }))
    }
}

/// What is read of a job that exists.
fn of_job<T>(
    id: &str,
    read: impl FnOnce(&Connection, JobRow) -> rusqlite::Result<T> + Send + 'static,
) -> Result<Read<T>, Error> {
    let id = JobId::parse("job_id", id)?;
    Ok(Box::new(move |connection| match JobRow::find(connection, &id.to_string())? {
        Some(row) => read(connection, row).map(Ok),
        None => Ok(Err(job_not_found(&id))),
    }))
}

impl Question for wire::FindForgottenJobsRequest {
    type Response = wire::FindForgottenJobsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        // What is found is answered as it was asked, however it was written.
        let asked: BTreeMap<String, String> = ids("job_ids", &self.job_ids, JobId::parse)?
            .into_iter()
            .map(|id| id.to_string())
            .zip(self.job_ids)
            .collect();
        Ok(Box::new(move |connection| {
            let mut statement = connection.prepare_cached("SELECT 1 FROM jobs WHERE id = ?1")?;
            let mut job_ids = Vec::new();
            for (id, asked) in asked {
                if !statement.exists([&id])? {
                    job_ids.push(asked);
                }
            }
            Ok(Ok(wire::FindForgottenJobsResponse { job_ids }))
        }))
    }
}

impl Question for wire::ListJobsRequest {
    type Response = wire::ListJobsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        let page = PageRequest::parse_revision(List::Jobs, self.page_size, &self.page_token)?;
        let parse = |state: &i32| JobState::from_pb("states", *state);
        let states: Vec<_> = self.states.iter().map(parse).collect::<Result<_, _>>()?;
        let group = match self.group_id.as_str() {
            "" => String::new(),
            id => Uuid::parse_str(id).map_err(|_| invalid("group_id", id, "a UUID, or empty"))?.to_string(),
        };
        let filter = Filter::default()
            .states(states.iter().map(|state| state.as_str()))
            .equals("node_id", node_filter(&self.node_id)?)
            .equals("group_id", &group)
            .labels(&parse_labels("labels", self.labels)?);
        Ok(Box::new(move |connection| {
            let page = list::jobs(connection, &page, &filter)?;
            let (jobs, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
            Ok(Ok(wire::ListJobsResponse { jobs, next_page_token, revision }))
        }))
    }
}

impl Question for wire::ListNodesRequest {
    type Response = wire::ListNodesResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        let page = PageRequest::parse(List::Nodes, self.page_size, &self.page_token)?;
        Ok(Box::new(move |connection| {
            let page = list::nodes(connection, &page)?;
            let (nodes, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
            Ok(Ok(wire::ListNodesResponse { nodes, next_page_token, revision }))
        }))
    }
}

impl Question for wire::GetCountsRequest {
    type Response = wire::GetCountsResponse;

    fn parse(self) -> Result<Read<Self::Response>, Error> {
        Ok(Box::new(|connection| counts(connection).map(Ok)))
    }
}

fn counts(connection: &Connection) -> rusqlite::Result<wire::GetCountsResponse> {
    let count = |table: &str| -> rusqlite::Result<Vec<(String, u64)>> {
        let sql = format!("SELECT state, count(*) FROM {table} GROUP BY state");
        connection.prepare_cached(&sql)?.query_map([], |row| Ok((row.get(0)?, number(row, 1)?)))?.collect()
    };
    let (by_vm, by_job) = (count("vms")?, count("jobs")?);
    let of = |list: &[(String, u64)], state: &str| list.iter().find(|(name, _)| name == state).map(|(_, count)| *count);
    let vms = VmState::ALL.into_iter().filter_map(|state| {
        of(&by_vm, state.as_str()).map(|count| wire::VmStateCount { state: state.to_pb().into(), count })
    });
    let jobs = JobState::ALL.into_iter().filter_map(|state| {
        of(&by_job, state.as_str()).map(|count| wire::JobStateCount { state: state.to_pb().into(), count })
    });
    Ok(wire::GetCountsResponse { vms: vms.collect(), jobs: jobs.collect(), revision: newest_revision(connection)? })
}

fn lost_node(field: &str, node: Option<wire::LostNode>) -> Result<Option<LostNode>, Error> {
    let parse = |node: wire::LostNode| {
        let id = NodeId::parse(&format!("{field}.node_id"), &node.node_id)?;
        Ok(LostNode { id, incarnation: node.incarnation })
    };
    node.map(parse).transpose()
}

fn grace(grace_ms: Option<u64>) -> Result<Option<u64>, Error> {
    let most = u64::try_from(limits::MAX_STOP_GRACE.as_millis()).unwrap_or(u64::MAX);
    match grace_ms {
        Some(grace_ms) if grace_ms > most => Err(invalid("grace_ms", grace_ms, &format!("at most {most} (ms)"))),
        grace_ms => Ok(grace_ms),
    }
}

fn outcome(outcome: Option<WireOutcome>, now: Timestamp) -> Result<Outcome, Error> {
    match outcome {
        None => Err(invalid("outcome", "", "result or lost")),
        Some(WireOutcome::Lost(lost)) => {
            let node = lost_node("lost.lost_node", lost.lost_node)?;
            Ok(Outcome::Lost { started: lost.started, reason: reason("lost.reason", lost.reason)?, node })
        }
        Some(WireOutcome::Result(result)) => {
            let state = JobState::from_pb("result.state", result.state)?;
            if !state.is_terminal() {
                return Err(invalid("result.state", state, "Succeeded, Failed, Cancelled or TimedOut"));
            }
            Ok(Outcome::Result {
                state,
                exit: result.exit.map(|exit| ExitStatus::parse("result.exit", exit)).transpose()?,
                reason: reason("result.reason", result.reason)?,
                log_bytes: result.log_bytes,
                finished_at: result.finished_at.map_or(now, Into::into),
                started_at: result.started_at.map(Into::into),
            })
        }
    }
}

fn vm_states(states: &[i32]) -> Result<Vec<VmState>, Error> {
    states.iter().map(|&state| VmState::from_pb("states", state)).collect()
}

/// The states that a purge names; none: all that a VM can end in.
fn purged_states(states: &[i32]) -> Result<Vec<VmState>, Error> {
    let states = vm_states(states)?;
    if let Some(alive) = states.iter().find(|state| !state.is_terminal()) {
        return Err(invalid("states", alive, "Terminated and Failed"));
    }
    if states.is_empty() {
        Ok(VmState::ALL.into_iter().filter(|state| state.is_terminal()).collect())
    } else {
        Ok(states)
    }
}

fn node_filter(node_id: &str) -> Result<&str, Error> {
    if !node_id.is_empty() {
        NodeId::parse("node_id", node_id)?;
    }
    Ok(node_id)
}

fn attempt(attempt: u32) -> Result<u32, Error> {
    if attempt == 0 { Err(invalid("attempt", attempt, "1 or more")) } else { Ok(attempt) }
}

fn reason(field: &str, reason: String) -> Result<String, Error> {
    match reason.len() > limits::MAX_REASON_BYTES {
        true => Err(invalid(field, reason, &format!("at most {} bytes", limits::MAX_REASON_BYTES))),
        false => Ok(reason),
    }
}

/// A list of ids; errors name the one that is wrong.
fn ids<T>(field: &str, ids: &[String], parse: impl Fn(&str, &str) -> Result<T, Error>) -> Result<Vec<T>, Error> {
    if ids.len() > MAX_IDS {
        return Err(invalid(field, ids.len(), &format!("at most {MAX_IDS} ids")));
    }
    ids.iter().enumerate().map(|(at, id)| parse(&format!("{field}[{at}]"), id)).collect()
}
