//! A registry in memory: the same state tables and answers, no disk, no Raft. Served over a real socket.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    pb::{common::v1 as common, registry::v1 as pb},
    vm::{VmKind, VmState},
};
use blixard_chassis::{Server, Tasks};
use futures::{StreamExt, stream::BoxStream};
use pb::registry_service_server::{RegistryService, RegistryServiceServer};
use tonic::{Request, Response, Status, Streaming};

#[derive(Clone, Default)]
pub struct FakeRegistry {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub struct State {
    pub vms: BTreeMap<String, common::Vm>,
    pub jobs: BTreeMap<String, common::Job>,
    pub nodes: BTreeMap<String, common::Node>,
    /// Every change of a VM and every report of an attempt, in order.
    pub history: Vec<String>,
    /// How many were heard, and how many came while it was down.
    pub heartbeats: u64,
    pub heartbeats_missed: u64,
    pub down: bool,
    /// How often it wants to hear of a node; 0: every 20 ms.
    pub heartbeat_ms: u32,
    /// What jobs were given, as it is stored.
    pub inputs: BTreeMap<String, common::JobInput>,
    /// The id of each report of a VM's shape, whether or not it was up.
    pub resize_ids: Vec<String>,
    /// Whether it is of a version that records no shapes.
    pub records_no_shapes: bool,
}

impl FakeRegistry {
    /// Serves on a free port until the tasks end.
    pub async fn serve(&self, tasks: &Tasks) -> String {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let endpoint = server.local_endpoint();
        let server = server.add_service(RegistryServiceServer::new(self.clone()));
        let serving = tasks.clone();
        tasks.spawn("fake-registry", async move { server.serve(&serving).await.expect("it serves") });
        endpoint
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }

    fn hear(&self, heartbeat: &pb::HeartbeatRequest) -> Result<pb::HeartbeatResponse, Status> {
        let down = self.state().down;
        self.state().heartbeats_missed += u64::from(down);
        let mut state = self.up()?;
        state.heartbeats += 1;
        let node = state.nodes.get(&heartbeat.node_id).ok_or_else(|| not_found(Reason::NodeNotFound, "node"))?;
        if node.incarnation != heartbeat.incarnation || node.state() == common::NodeState::Lost {
            return Err(Error::new(Reason::StaleIncarnation, "it is over").into());
        }
        let interval_ms = if state.heartbeat_ms == 0 { 20 } else { state.heartbeat_ms };
        Ok(pb::HeartbeatResponse { interval_ms })
    }

    fn up(&self) -> Result<MutexGuard<'_, State>, Status> {
        let state = self.state();
        if state.down { Err(Status::unavailable("down for the test")) } else { Ok(state) }
    }
}

fn not_found(reason: Reason, id: &str) -> Status {
    Error::new(reason, format!("no {id}")).into()
}

impl State {
    pub fn vm(&mut self, id: &str) -> Result<&mut common::Vm, Status> {
        self.vms.get_mut(id).ok_or_else(|| not_found(Reason::VmNotFound, id))
    }

    pub fn job(&mut self, id: &str) -> Result<&mut common::Job, Status> {
        self.jobs.get_mut(id).ok_or_else(|| not_found(Reason::JobNotFound, id))
    }

    /// Moves a VM along the real table.
    pub fn move_vm(&mut self, id: &str, to: VmState, reason: &str) -> Result<common::Vm, Status> {
        let vm = self.vm(id)?;
        let from = VmState::from_pb("state", vm.state)?;
        let kind = VmKind::from_pb("kind", vm.config.clone().unwrap_or_default().kind)?;
        if from == to {
            return Ok(vm.clone());
        }
        if !from.may_go_to(to, kind) {
            let error = Error::new(Reason::IllegalTransition, format!("{from} -> {to}"));
            return Err(error.with("id", id).with("from", from).with("to", to).into());
        }
        vm.state = to.to_pb().into();
        vm.reason = reason.to_owned();
        vm.generation += 1;
        let vm = vm.clone();
        self.history.push(format!("vm {from} -> {to}"));
        Ok(vm)
    }

    fn resize(&mut self, request: &pb::ResizeVmRequest) -> Result<common::Vm, Status> {
        let vm = self.vm(&request.vm_id)?;
        let state = VmState::from_pb("state", vm.state)?;
        let config = vm.config.as_mut().expect("it has one");
        let to = (Some(request.vcpus), Some(request.memory_mib));
        if (config.vcpus, config.memory_mib) == to {
            return Ok(vm.clone());
        }
        if !state.is_running() {
            return Err(Error::new(Reason::VmNotAccepting, format!("it is {state}")).into());
        }
        (config.vcpus, config.memory_mib) = to;
        vm.generation += 1;
        let vm = vm.clone();
        self.history.push(format!("vm resized to {} {}", request.vcpus, request.memory_mib));
        Ok(vm)
    }

    fn current(&mut self, job_id: &str, attempt: u32) -> Result<&mut common::Job, Status> {
        let job = self.job(job_id)?;
        let state = JobState::from_pb("state", job.state)?;
        if job.attempt != attempt || state == JobState::Queued {
            let error = Error::new(Reason::StaleAttempt, format!("attempt {attempt} is over"));
            return Err(error.with("job_id", job_id).with("current", job.attempt).into());
        }
        Ok(job)
    }

    fn finish(&mut self, request: pb::FinishAttemptRequest) -> Result<common::Job, Status> {
        let job = self.current(&request.job_id, request.attempt)?;
        if JobState::from_pb("state", job.state)?.is_terminal() {
            return Ok(job.clone());
        }
        let line = match request.outcome.expect("an outcome") {
            pb::finish_attempt_request::Outcome::Result(result) => {
                job.state = result.state;
                job.exit = result.exit;
                job.reason = result.reason;
                job.log_bytes = result.log_bytes;
                job.finished_at = result.finished_at;
                job.started_at = job.started_at.take().or(result.started_at);
                format!("attempt {} {:?}", request.attempt, job.state())
            }
            pb::finish_attempt_request::Outcome::Lost(lost) => {
                job.state = JobState::Queued.to_pb().into();
                job.reason = lost.reason;
                format!("attempt {} lost, started {}", request.attempt, lost.started)
            }
        };
        let (job, vm_id) = (job.clone(), job.vm_id.clone());
        self.history.push(line);
        let vm = self.vm(&vm_id)?;
        vm.job_id.clear();
        if vm.state() == common::VmState::Busy {
            let service = vm.config.clone().unwrap_or_default().kind() == common::VmKind::Service;
            let to = if service { VmState::Idle } else { VmState::Draining };
            self.move_vm(&vm_id, to, "")?;
        }
        Ok(job)
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn unused<T>() -> Answer<T> {
    Err(Status::unimplemented("vmhost does not call this"))
}

#[tonic::async_trait]
impl RegistryService for FakeRegistry {
    async fn transition_vm(&self, request: Request<pb::TransitionVmRequest>) -> Answer<pb::TransitionVmResponse> {
        let request = request.into_inner();
        let mut state = self.up()?;
        let generation = state.vm(&request.vm_id)?.generation;
        if request.expected_generation != 0 && request.expected_generation != generation {
            return Err(Error::new(Reason::StaleGeneration, "it changed").into());
        }
        let to = VmState::from_pb("to_state", request.to_state)?;
        let vm = state.move_vm(&request.vm_id, to, &request.reason)?;
        Ok(Response::new(pb::TransitionVmResponse { vm: Some(vm) }))
    }

    async fn get_vm(&self, request: Request<pb::GetVmRequest>) -> Answer<pb::GetVmResponse> {
        let vm = self.up()?.vm(&request.into_inner().vm_id)?.clone();
        Ok(Response::new(pb::GetVmResponse { vm: Some(vm) }))
    }

    async fn list_vms(&self, request: Request<pb::ListVmsRequest>) -> Answer<pb::ListVmsResponse> {
        let request = request.into_inner();
        let state = self.up()?;
        let wanted = |vm: &&common::Vm| request.states.contains(&vm.state) && vm.node_id == request.node_id;
        let vms = state.vms.values().filter(wanted).cloned().collect();
        Ok(Response::new(pb::ListVmsResponse { vms, ..Default::default() }))
    }

    async fn start_attempt(&self, request: Request<pb::StartAttemptRequest>) -> Answer<pb::StartAttemptResponse> {
        let request = request.into_inner();
        let mut state = self.up()?;
        let job = state.current(&request.job_id, request.attempt)?;
        let first = job.state() == common::JobState::Assigned;
        if first {
            job.state = JobState::Running.to_pb().into();
            job.started_at = request.started_at;
        }
        let job = job.clone();
        if first {
            state.history.push(format!("attempt {} started", request.attempt));
        }
        Ok(Response::new(pb::StartAttemptResponse { job: Some(job) }))
    }

    async fn finish_attempt(&self, request: Request<pb::FinishAttemptRequest>) -> Answer<pb::FinishAttemptResponse> {
        let job = self.up()?.finish(request.into_inner())?;
        Ok(Response::new(pb::FinishAttemptResponse { job: Some(job) }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Answer<pb::GetJobResponse> {
        let job = self.up()?.job(&request.into_inner().job_id)?.clone();
        Ok(Response::new(pb::GetJobResponse { job: Some(job) }))
    }

    async fn register_node(&self, request: Request<pb::RegisterNodeRequest>) -> Answer<pb::RegisterNodeResponse> {
        let mut node = request.into_inner().node.unwrap_or_default();
        let mut state = self.up()?;
        node.set_state(common::NodeState::Ready);
        node.incarnation = state.nodes.get(&node.id).map_or(0, |node| node.incarnation) + 1;
        state.nodes.insert(node.id.clone(), node.clone());
        Ok(Response::new(pb::RegisterNodeResponse { node: Some(node) }))
    }

    type HeartbeatStream = BoxStream<'static, Result<pb::HeartbeatResponse, Status>>;
    async fn heartbeat(&self, request: Request<Streaming<pb::HeartbeatRequest>>) -> Answer<Self::HeartbeatStream> {
        let (this, requests) = (self.clone(), request.into_inner());
        Ok(Response::new(Box::pin(requests.map(move |request| this.hear(&request?)))))
    }

    async fn get_job_input(&self, request: Request<pb::GetJobInputRequest>) -> Answer<pb::GetJobInputResponse> {
        let job_id = request.into_inner().job_id;
        let mut state = self.up()?;
        let ended = JobState::from_pb("state", state.job(&job_id)?.state)?.is_terminal();
        let input = state.inputs.get(&job_id).filter(|_| !ended).cloned();
        Ok(Response::new(pb::GetJobInputResponse { input }))
    }

    async fn find_forgotten_jobs(
        &self,
        request: Request<pb::FindForgottenJobsRequest>,
    ) -> Answer<pb::FindForgottenJobsResponse> {
        let state = self.up()?;
        let mut job_ids = request.into_inner().job_ids;
        job_ids.retain(|id| !state.jobs.contains_key(id));
        Ok(Response::new(pb::FindForgottenJobsResponse { job_ids }))
    }

    async fn create_jobs(&self, _: Request<pb::CreateJobsRequest>) -> Answer<pb::CreateJobsResponse> {
        unused()
    }
    async fn list_attempts(&self, _: Request<pb::ListAttemptsRequest>) -> Answer<pb::ListAttemptsResponse> {
        unused()
    }
    async fn update_node(&self, _: Request<pb::UpdateNodeRequest>) -> Answer<pb::UpdateNodeResponse> {
        unused()
    }
    async fn acquire_lease(&self, _: Request<pb::AcquireLeaseRequest>) -> Answer<pb::AcquireLeaseResponse> {
        unused()
    }
    async fn create_vm(&self, _: Request<pb::CreateVmRequest>) -> Answer<pb::CreateVmResponse> {
        unused()
    }
    async fn list_vm_events(&self, _: Request<pb::ListVmEventsRequest>) -> Answer<pb::ListVmEventsResponse> {
        unused()
    }
    async fn purge_vms(&self, _: Request<pb::PurgeVmsRequest>) -> Answer<pb::PurgeVmsResponse> {
        unused()
    }
    async fn create_job(&self, _: Request<pb::CreateJobRequest>) -> Answer<pb::CreateJobResponse> {
        unused()
    }
    async fn assign_job(&self, _: Request<pb::AssignJobRequest>) -> Answer<pb::AssignJobResponse> {
        unused()
    }
    async fn cancel_job(&self, _: Request<pb::CancelJobRequest>) -> Answer<pb::CancelJobResponse> {
        unused()
    }
    async fn fail_queued_job(&self, _: Request<pb::FailQueuedJobRequest>) -> Answer<pb::FailQueuedJobResponse> {
        unused()
    }
    async fn list_jobs(&self, _: Request<pb::ListJobsRequest>) -> Answer<pb::ListJobsResponse> {
        unused()
    }
    async fn list_nodes(&self, _: Request<pb::ListNodesRequest>) -> Answer<pb::ListNodesResponse> {
        unused()
    }
    async fn get_counts(&self, _: Request<pb::GetCountsRequest>) -> Answer<pb::GetCountsResponse> {
        unused()
    }
    async fn get_revision(&self, _: Request<pb::GetRevisionRequest>) -> Answer<pb::GetRevisionResponse> {
        unused()
    }
    async fn resize_vm(&self, request: Request<pb::ResizeVmRequest>) -> Answer<pb::ResizeVmResponse> {
        let request = request.into_inner();
        self.state().resize_ids.push(request.request_id.clone());
        let mut state = self.up()?;
        if state.records_no_shapes {
            return Err(Status::unimplemented(""));
        }
        let vm = state.resize(&request)?;
        Ok(Response::new(pb::ResizeVmResponse { vm: Some(vm) }))
    }
    type QueryStream = BoxStream<'static, Result<pb::QueryResponse, Status>>;
    async fn query(&self, _: Request<pb::QueryRequest>) -> Answer<Self::QueryStream> {
        unused()
    }

    type BackupStream = BoxStream<'static, Result<pb::BackupResponse, Status>>;
    async fn backup(&self, _: Request<pb::BackupRequest>) -> Answer<Self::BackupStream> {
        unused()
    }
    type WatchStream = BoxStream<'static, Result<pb::WatchResponse, Status>>;
    async fn watch(&self, _: Request<pb::WatchRequest>) -> Answer<Self::WatchStream> {
        unused()
    }
}
