//! The contract: parse, one domain call, encode.

use std::{pin::Pin, sync::Arc};

use blixard::{
    error::{Error, invalid},
    id::{JobId, NodeId, VmId},
    job::{ExitStatus, JobSpec, JobState},
    limits,
    node::Node,
    pb::{
        common::v1 as pb,
        registry::v1::{self as wire, registry_service_server::RegistryService},
    },
    time::Timestamp,
    vm::{VmConfig, VmKind, VmState, parse_labels},
};
use futures::Stream;
use hiqlite::rusqlite::Connection;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    backup::Backups,
    change::Wanted,
    commit::CommitHandle,
    heartbeat::Heartbeats,
    list::{self, Filter, List, PageRequest},
    mutation::{Mutation, Outcome},
    query::Queries,
    read::{Readers, newest_revision},
    requests::{self, RequestId},
    rows::{JobRow, VmRow, number},
    tail::Tail,
    verdict::{Answer, job_not_found, vm_not_found},
    watch::Watcher,
};

/// Rows that one mutation of a purge deletes: a few milliseconds of everybody's time.
const PURGE_CHUNK: u32 = 500;
/// Most VMs that a purge may name.
const MAX_PURGE_IDS: usize = 1000;

/// Serves `blixard.registry.v1.RegistryService`.
#[derive(Clone)]
pub struct Service {
    pub(crate) commits: CommitHandle,
    pub(crate) readers: Arc<Readers>,
    pub(crate) queries: Arc<Queries>,
    pub(crate) tail: Arc<Tail>,
    pub(crate) heartbeats: Arc<Heartbeats>,
    pub(crate) backups: Arc<Backups>,
}

type Answered<T> = Result<Response<T>, Status>;

impl Service {
    async fn vm(&self, mutation: Mutation, once: Option<RequestId>) -> Result<Option<pb::Vm>, Error> {
        match self.commits.submit(mutation, once).await? {
            Answer::Vm(vm) => Ok(Some(*vm)),
            Answer::Job(_) | Answer::Node(_) | Answer::Purged(_) | Answer::Revision(_) => Err(wrong_answer()),
        }
    }

    async fn job(&self, mutation: Mutation, once: Option<RequestId>) -> Result<Option<pb::Job>, Error> {
        match self.commits.submit(mutation, once).await? {
            Answer::Job(job) => Ok(Some(*job)),
            Answer::Vm(_) | Answer::Node(_) | Answer::Purged(_) | Answer::Revision(_) => Err(wrong_answer()),
        }
    }
}

#[tonic::async_trait]
impl RegistryService for Service {
    async fn create_vm(&self, request: Request<wire::CreateVmRequest>) -> Answered<wire::CreateVmResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::CreateVm {
            id: VmId::parse("vm_id", &request.vm_id)?,
            config: VmConfig::parse_full("config", request.config)?,
            node_id: NodeId::parse("node_id", &request.node_id)?,
        };
        Ok(Response::new(wire::CreateVmResponse { vm: self.vm(mutation, once).await? }))
    }

    async fn transition_vm(&self, request: Request<wire::TransitionVmRequest>) -> Answered<wire::TransitionVmResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::TransitionVm {
            id: VmId::parse("vm_id", &request.vm_id)?,
            to: VmState::from_pb("to_state", request.to_state)?,
            expected_generation: request.expected_generation,
            reason: reason("reason", request.reason)?,
        };
        Ok(Response::new(wire::TransitionVmResponse { vm: self.vm(mutation, once).await? }))
    }

    async fn get_vm(&self, request: Request<wire::GetVmRequest>) -> Answered<wire::GetVmResponse> {
        let id = VmId::parse("vm_id", &request.into_inner().vm_id)?;
        let row = self.readers.read(move |connection| VmRow::find(connection, &id.to_string())).await?;
        let row = row.ok_or_else(|| vm_not_found(&id))?;
        Ok(Response::new(wire::GetVmResponse { vm: Some(row.vm) }))
    }

    async fn list_vms(&self, request: Request<wire::ListVmsRequest>) -> Answered<wire::ListVmsResponse> {
        let request = request.into_inner();
        let page = PageRequest::parse_revision(List::Vms, request.page_size, &request.page_token)?;
        let states = vm_states(&request.states)?;
        let kind = match request.kind {
            0 => "",
            kind => VmKind::from_pb("kind", kind)?.as_str(),
        };
        let filter = Filter::default()
            .states(states.iter().map(|state| state.as_str()))
            .equals("kind", kind)
            .equals("node_id", node_filter(&request.node_id)?)
            .labels(&parse_labels("labels", request.labels)?);
        let page = self.readers.read(move |connection| list::vms(connection, &page, &filter)).await?;
        let (vms, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
        Ok(Response::new(wire::ListVmsResponse { vms, next_page_token, revision }))
    }

    async fn list_vm_events(
        &self,
        request: Request<wire::ListVmEventsRequest>,
    ) -> Answered<wire::ListVmEventsResponse> {
        let request = request.into_inner();
        let page = PageRequest::parse_revision(List::VmEvents, request.page_size, &request.page_token)?;
        let vm_id = match request.vm_id.as_str() {
            "" => String::new(),
            id => VmId::parse("vm_id", id)?.to_string(),
        };
        let page = self.readers.read(move |connection| list::vm_events(connection, &page, &vm_id)).await?;
        let (events, next_page_token) = (page.items, page.next_page_token);
        Ok(Response::new(wire::ListVmEventsResponse { events, next_page_token }))
    }

    async fn purge_vms(&self, request: Request<wire::PurgeVmsRequest>) -> Answered<wire::PurgeVmsResponse> {
        let (request, once) = requests::parse(request)?;
        let states = purged_states(&request.states)?;
        if request.vm_ids.len() > MAX_PURGE_IDS {
            return Err(invalid("vm_ids", request.vm_ids.len(), &format!("at most {MAX_PURGE_IDS} ids")).into());
        }
        let parse = |(at, id): (usize, &String)| VmId::parse(&format!("vm_ids[{at}]"), id);
        let ids: Vec<_> = request.vm_ids.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
        let (mut purged, mut once) = (0, once);
        loop {
            let chunk = Mutation::PurgeVms { states: states.clone(), ids: ids.clone(), at_most: PURGE_CHUNK };
            let answer = self.commits.submit(chunk, once.clone()).await?;
            let Answer::Purged(count) = answer else { return Err(wrong_answer().into()) };
            purged += count as u64;
            if count < PURGE_CHUNK as usize {
                return Ok(Response::new(wire::PurgeVmsResponse { purged }));
            }
            // Each chunk is remembered; a repeat goes through the same ones, and on from where the first was cut off.
            once = once.map(|before| before.next_part());
        }
    }

    async fn create_job(&self, request: Request<wire::CreateJobRequest>) -> Answered<wire::CreateJobResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::CreateJob {
            id: JobId::parse("job_id", &request.job_id)?,
            spec: JobSpec::parse_full("spec", request.spec)?.into(),
        };
        Ok(Response::new(wire::CreateJobResponse { job: self.job(mutation, once).await? }))
    }

    async fn assign_job(&self, request: Request<wire::AssignJobRequest>) -> Answered<wire::AssignJobResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::AssignJob {
            job_id: JobId::parse("job_id", &request.job_id)?,
            vm_id: VmId::parse("vm_id", &request.vm_id)?,
            attempt: attempt(request.attempt)?,
        };
        Ok(Response::new(wire::AssignJobResponse { job: self.job(mutation, once).await? }))
    }

    async fn start_attempt(&self, request: Request<wire::StartAttemptRequest>) -> Answered<wire::StartAttemptResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::StartAttempt {
            job_id: JobId::parse("job_id", &request.job_id)?,
            attempt: attempt(request.attempt)?,
            started_at: request.started_at.map_or_else(Timestamp::now, Into::into),
        };
        Ok(Response::new(wire::StartAttemptResponse { job: self.job(mutation, once).await? }))
    }

    async fn finish_attempt(
        &self,
        request: Request<wire::FinishAttemptRequest>,
    ) -> Answered<wire::FinishAttemptResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::FinishAttempt {
            job_id: JobId::parse("job_id", &request.job_id)?,
            attempt: attempt(request.attempt)?,
            outcome: outcome(request.outcome)?,
        };
        Ok(Response::new(wire::FinishAttemptResponse { job: self.job(mutation, once).await? }))
    }

    async fn cancel_job(&self, request: Request<wire::CancelJobRequest>) -> Answered<wire::CancelJobResponse> {
        let (request, once) = requests::parse(request)?;
        let mutation = Mutation::CancelJob {
            id: JobId::parse("job_id", &request.job_id)?,
            reason: reason("reason", request.reason)?,
        };
        Ok(Response::new(wire::CancelJobResponse { job: self.job(mutation, once).await? }))
    }

    async fn fail_queued_job(
        &self,
        request: Request<wire::FailQueuedJobRequest>,
    ) -> Answered<wire::FailQueuedJobResponse> {
        let (request, once) = requests::parse(request)?;
        if request.reason.is_empty() {
            return Err(invalid("reason", "", &format!("1 to {} bytes", limits::MAX_REASON_BYTES)).into());
        }
        let mutation = Mutation::FailQueuedJob {
            id: JobId::parse("job_id", &request.job_id)?,
            reason: reason("reason", request.reason)?,
        };
        Ok(Response::new(wire::FailQueuedJobResponse { job: self.job(mutation, once).await? }))
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Answered<wire::GetJobResponse> {
        let id = JobId::parse("job_id", &request.into_inner().job_id)?;
        let row = self.readers.read(move |connection| JobRow::find(connection, &id.to_string())).await?;
        let row = row.ok_or_else(|| job_not_found(&id))?;
        Ok(Response::new(wire::GetJobResponse { job: Some(row.job) }))
    }

    async fn list_jobs(&self, request: Request<wire::ListJobsRequest>) -> Answered<wire::ListJobsResponse> {
        let request = request.into_inner();
        let page = PageRequest::parse_revision(List::Jobs, request.page_size, &request.page_token)?;
        let parse = |state: &i32| JobState::from_pb("states", *state);
        let states: Vec<_> = request.states.iter().map(parse).collect::<Result<_, _>>()?;
        let filter = Filter::default()
            .states(states.iter().map(|state| state.as_str()))
            .equals("node_id", node_filter(&request.node_id)?)
            .labels(&parse_labels("labels", request.labels)?);
        let page = self.readers.read(move |connection| list::jobs(connection, &page, &filter)).await?;
        let (jobs, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
        Ok(Response::new(wire::ListJobsResponse { jobs, next_page_token, revision }))
    }

    async fn register_node(&self, request: Request<wire::RegisterNodeRequest>) -> Answered<wire::RegisterNodeResponse> {
        let (request, once) = requests::parse(request)?;
        let node = request.node.ok_or_else(|| invalid("node", "", "required"))?;
        // What the registry sets is ignored, so that it can't be wrong either.
        let node = Node::try_from(pb::Node { state: 0, ..node })?;
        match self.commits.submit(Mutation::RegisterNode { node }, once).await? {
            Answer::Node(node) => Ok(Response::new(wire::RegisterNodeResponse { node: Some(*node) })),
            Answer::Vm(_) | Answer::Job(_) | Answer::Purged(_) | Answer::Revision(_) => Err(wrong_answer().into()),
        }
    }

    async fn create_jobs(&self, _: Request<wire::CreateJobsRequest>) -> Answered<wire::CreateJobsResponse> {
        Err(Status::unimplemented("create_jobs"))
    }

    async fn get_job_input(&self, _: Request<wire::GetJobInputRequest>) -> Answered<wire::GetJobInputResponse> {
        Err(Status::unimplemented("get_job_input"))
    }

    async fn list_attempts(&self, _: Request<wire::ListAttemptsRequest>) -> Answered<wire::ListAttemptsResponse> {
        Err(Status::unimplemented("list_attempts"))
    }

    async fn find_forgotten_jobs(
        &self,
        _: Request<wire::FindForgottenJobsRequest>,
    ) -> Answered<wire::FindForgottenJobsResponse> {
        Err(Status::unimplemented("find_forgotten_jobs"))
    }

    async fn update_node(&self, _: Request<wire::UpdateNodeRequest>) -> Answered<wire::UpdateNodeResponse> {
        Err(Status::unimplemented("update_node"))
    }

    async fn acquire_lease(&self, _: Request<wire::AcquireLeaseRequest>) -> Answered<wire::AcquireLeaseResponse> {
        Err(Status::unimplemented("acquire_lease"))
    }

    type HeartbeatStream = Pin<Box<dyn Stream<Item = Result<wire::HeartbeatResponse, Status>> + Send>>;

    async fn heartbeat(&self, request: Request<Streaming<wire::HeartbeatRequest>>) -> Answered<Self::HeartbeatStream> {
        Ok(Response::new(Box::pin(self.heartbeats.answer(request.into_inner()))))
    }

    async fn list_nodes(&self, request: Request<wire::ListNodesRequest>) -> Answered<wire::ListNodesResponse> {
        let request = request.into_inner();
        let page = PageRequest::parse(List::Nodes, request.page_size, &request.page_token)?;
        let page = self.readers.read(move |connection| list::nodes(connection, &page)).await?;
        let (nodes, next_page_token, revision) = (page.items, page.next_page_token, page.revision);
        Ok(Response::new(wire::ListNodesResponse { nodes, next_page_token, revision }))
    }

    async fn get_counts(&self, _: Request<wire::GetCountsRequest>) -> Answered<wire::GetCountsResponse> {
        Ok(Response::new(self.readers.read(counts).await?))
    }

    async fn get_revision(&self, _: Request<wire::GetRevisionRequest>) -> Answered<wire::GetRevisionResponse> {
        match self.commits.submit(Mutation::ConfirmRevision, None).await? {
            Answer::Revision(revision) => Ok(Response::new(wire::GetRevisionResponse { revision })),
            Answer::Vm(_) | Answer::Job(_) | Answer::Node(_) | Answer::Purged(_) => Err(wrong_answer().into()),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Answered<Self::WatchStream> {
        let request = request.into_inner();
        let watcher = Watcher::begin(&self.tail, Wanted::parse(&request)?, request.start_revision)?;
        Ok(Response::new(Box::pin(watcher.stream())))
    }

    type QueryStream = Pin<Box<dyn Stream<Item = Result<wire::QueryResponse, Status>> + Send>>;

    async fn query(&self, request: Request<wire::QueryRequest>) -> Answered<Self::QueryStream> {
        Ok(Response::new(Box::pin(self.queries.start(request.into_inner())?)))
    }

    type BackupStream = Pin<Box<dyn Stream<Item = Result<wire::BackupResponse, Status>> + Send>>;

    async fn backup(&self, _: Request<wire::BackupRequest>) -> Answered<Self::BackupStream> {
        Ok(Response::new(Box::pin(self.backups.start()?)))
    }
}

fn counts(connection: &Connection) -> hiqlite::rusqlite::Result<wire::GetCountsResponse> {
    let count = |table: &str| -> hiqlite::rusqlite::Result<Vec<(String, u64)>> {
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

fn outcome(outcome: Option<wire::finish_attempt_request::Outcome>) -> Result<Outcome, Error> {
    use wire::finish_attempt_request::Outcome as Wire;
    match outcome {
        None => Err(invalid("outcome", "", "result or lost")),
        Some(Wire::Lost(lost)) => {
            Ok(Outcome::Lost { started: lost.started, reason: reason("lost.reason", lost.reason)? })
        }
        Some(Wire::Result(result)) => {
            let state = JobState::from_pb("result.state", result.state)?;
            if !state.is_terminal() {
                return Err(invalid("result.state", state, "Succeeded, Failed, Cancelled or TimedOut"));
            }
            Ok(Outcome::Result {
                state,
                exit: result.exit.map(|exit| ExitStatus::parse("result.exit", exit)).transpose()?,
                reason: reason("result.reason", result.reason)?,
                log_bytes: result.log_bytes,
                finished_at: result.finished_at.map_or_else(Timestamp::now, Into::into),
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

fn wrong_answer() -> Error {
    Error::internal(|error_id| tracing::error!(error_id, "a change was answered with another kind of object"))
}
