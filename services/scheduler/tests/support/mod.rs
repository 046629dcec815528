//! A registry and a vmhost that are small, and a scheduler between them, over real gRPC.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    limits,
    pb::{
        common::v1 as common,
        registry::v1::{
            self as registry,
            registry_service_server::{RegistryService, RegistryServiceServer},
        },
        scheduler::v1::scheduler_service_client::SchedulerServiceClient,
        vmhost::v1::{
            self as vmhost, stream_logs_response,
            vm_host_service_server::{VmHostService, VmHostServiceServer},
        },
    },
};
use blixard_chassis::{Server, Tasks, client};
use blixard_scheduler::{Scheduler, SchedulerConfig};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

pub(crate) const NODE: &str = "node-1";

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Everything that runs in a test; it ends with the test.
pub(crate) struct World {
    pub(crate) registry: FakeRegistry,
    pub(crate) vmhost: FakeVmHost,
    pub(crate) scheduler: SchedulerServiceClient<Channel>,
    tasks: Tasks,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(crate) async fn start_with(change: impl FnOnce(&mut SchedulerConfig)) -> Self {
        let tasks = Tasks::new();
        let vmhost = FakeVmHost::default();
        let endpoint = serve(&tasks, |server| server.add_service(VmHostServiceServer::new(vmhost.clone()))).await;
        let registry = FakeRegistry::new(&endpoint);
        let endpoint = serve(&tasks, |server| server.add_service(RegistryServiceServer::new(registry.clone()))).await;
        let mut config = SchedulerConfig::new(&blixard::config::Config::default(), endpoint, None);
        change(&mut config);
        let scheduler = Scheduler::start(config, &tasks).await.expect("a scheduler");
        let endpoint = serve(&tasks, |server| server.add_service(scheduler.service())).await;
        let scheduler = SchedulerServiceClient::new(client::channel(&endpoint).expect("a channel"))
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        let world = Self { registry, vmhost, scheduler, tasks };
        // The scheduler knows the node.
        wait_for("the node", || async {
            let stats = world.scheduler.clone().get_stats(blixard::pb::scheduler::v1::GetStatsRequest {}).await;
            stats.is_ok_and(|stats| stats.into_inner().ready_nodes == 1)
        })
        .await;
        world
    }
}

async fn serve(tasks: &Tasks, add: impl FnOnce(Server) -> Server) -> String {
    let server = Server::bind("127.0.0.1:0".parse().expect("an address")).await.expect("a socket");
    let endpoint = server.local_endpoint();
    let (server, own) = (add(server), tasks.clone());
    tasks.spawn("server", async move { server.serve(&own).await.expect("served") });
    endpoint
}

/// Looks until it is so.
pub(crate) async fn wait_for<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let seen = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), seen).await.unwrap_or_else(|_| panic!("{what} did not come"));
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what it is told and tells its changes; it decides nothing.
#[derive(Clone)]
pub(crate) struct FakeRegistry(Arc<Mutex<Recorded>>, Tasks);

pub(crate) struct Recorded {
    pub(crate) jobs: BTreeMap<String, common::Job>,
    pub(crate) inputs: BTreeMap<String, common::JobInput>,
    pub(crate) attempts: Vec<common::Attempt>,
    pub(crate) vm: Option<common::Vm>,
    pub(crate) node: common::Node,
    events: Vec<registry::WatchResponse>,
    revision: watch::Sender<u64>,
}

impl FakeRegistry {
    fn new(vmhost: &str) -> Self {
        let node = common::Node {
            id: NODE.into(),
            state: common::NodeState::Ready.into(),
            wanted: common::NodeState::Ready.into(),
            endpoint: vmhost.into(),
            driver: "process".into(),
            vcpus: 8,
            memory_mib: 65_536,
            max_vms: 10,
            images: vec!["default".into()],
            incarnation: 1,
            revision: 1,
            ..Default::default()
        };
        let recorded = Arc::new(Mutex::new(Recorded {
            jobs: BTreeMap::new(),
            inputs: BTreeMap::new(),
            attempts: Vec::new(),
            vm: None,
            node,
            events: Vec::new(),
            revision: watch::Sender::new(1),
        }));
        Self(recorded, Tasks::new())
    }

    pub(crate) fn recorded(&self) -> MutexGuard<'_, Recorded> {
        locked(&self.0)
    }

    /// Changes a job, and tells those who watch.
    pub(crate) fn change(&self, job_id: &str, change: impl FnOnce(&mut common::Job)) {
        let mut recorded = self.recorded();
        let revision = *recorded.revision.borrow() + 1;
        let job = recorded.jobs.get_mut(job_id).expect("a job");
        change(job);
        job.revision = revision;
        job.generation += 1;
        let job = job.clone();
        recorded.tell(revision, registry::watch_event::Object::Job(job));
    }

    /// Gives a job its next attempt, whose command runs.
    pub(crate) fn run(&self, job_id: &str) {
        self.change(job_id, |job| {
            job.attempt += 1;
            job.state = JobState::Running.to_pb().into();
            job.node_id = NODE.into();
            job.vm_id = uuid::Uuid::new_v4().to_string();
            job.assignment = common::AssignmentKind::Ephemeral.into();
        });
    }

    pub(crate) fn finish(&self, job_id: &str, state: JobState, log_bytes: u64) {
        self.change(job_id, |job| {
            job.state = state.to_pb().into();
            job.log_bytes = log_bytes;
            job.finished_at = Some(blixard::time::Timestamp::now().into());
        });
    }
}

impl Recorded {
    fn tell(&mut self, revision: u64, object: registry::watch_event::Object) {
        let event = registry::WatchEvent { timestamp: None, object: Some(object) };
        let message = Some(registry::watch_response::Message::Event(event));
        self.events.push(registry::WatchResponse { revision, message });
        self.revision.send_replace(revision);
    }

    fn create(&mut self, request: registry::CreateJobRequest) -> common::Job {
        if let Some(known) = self.jobs.get(&request.job_id) {
            return known.clone();
        }
        let revision = *self.revision.borrow() + 1;
        let now = Some(blixard::time::Timestamp::now().into());
        let job = common::Job {
            id: request.job_id.clone(),
            spec: request.spec,
            state: JobState::Queued.to_pb().into(),
            generation: 1,
            revision,
            created_at: now,
            queued_at: now,
            ..Default::default()
        };
        self.inputs.extend(request.input.map(|input| (request.job_id.clone(), input)));
        self.jobs.insert(request.job_id, job.clone());
        self.tell(revision, registry::watch_event::Object::Job(job.clone()));
        job
    }
}

fn not_here<T>() -> Answer<T> {
    Err(Error::new(Reason::PeerUnavailable, "the fake does not do this").into())
}

#[tonic::async_trait]
impl RegistryService for FakeRegistry {
    type WatchStream = Streamed<registry::WatchResponse>;
    type QueryStream = Streamed<registry::QueryResponse>;
    type BackupStream = Streamed<registry::BackupResponse>;
    type HeartbeatStream = Streamed<registry::HeartbeatResponse>;

    async fn create_job(&self, request: Request<registry::CreateJobRequest>) -> Answer<registry::CreateJobResponse> {
        let job = self.recorded().create(request.into_inner());
        Ok(Response::new(registry::CreateJobResponse { job: Some(job) }))
    }
    async fn create_jobs(&self, request: Request<registry::CreateJobsRequest>) -> Answer<registry::CreateJobsResponse> {
        let mut recorded = self.recorded();
        let jobs = request.into_inner().jobs.into_iter().map(|job| recorded.create(job)).collect();
        Ok(Response::new(registry::CreateJobsResponse { jobs }))
    }
    async fn get_job(&self, request: Request<registry::GetJobRequest>) -> Answer<registry::GetJobResponse> {
        let job = self.recorded().jobs.get(&request.get_ref().job_id).cloned();
        let job = job.ok_or_else(|| Error::new(Reason::JobNotFound, "there is no such job"))?;
        Ok(Response::new(registry::GetJobResponse { job: Some(job) }))
    }
    async fn list_jobs(&self, request: Request<registry::ListJobsRequest>) -> Answer<registry::ListJobsResponse> {
        let (recorded, asked) = (self.recorded(), request.into_inner());
        let wanted = |job: &&common::Job| {
            let of_group = job.spec.as_ref().is_some_and(|spec| spec.group_id == asked.group_id);
            (asked.states.is_empty() || asked.states.contains(&job.state)) && (asked.group_id.is_empty() || of_group)
        };
        let jobs = recorded.jobs.values().filter(wanted).cloned().collect();
        let revision = *recorded.revision.borrow();
        Ok(Response::new(registry::ListJobsResponse { jobs, next_page_token: String::new(), revision }))
    }
    async fn list_attempts(&self, _: Request<registry::ListAttemptsRequest>) -> Answer<registry::ListAttemptsResponse> {
        let attempts = self.recorded().attempts.clone();
        Ok(Response::new(registry::ListAttemptsResponse { attempts }))
    }
    async fn list_vms(&self, _: Request<registry::ListVmsRequest>) -> Answer<registry::ListVmsResponse> {
        let revision = *self.recorded().revision.borrow();
        Ok(Response::new(registry::ListVmsResponse { revision, ..Default::default() }))
    }
    async fn list_nodes(&self, _: Request<registry::ListNodesRequest>) -> Answer<registry::ListNodesResponse> {
        let recorded = self.recorded();
        let (nodes, revision) = (vec![recorded.node.clone()], *recorded.revision.borrow());
        Ok(Response::new(registry::ListNodesResponse { nodes, next_page_token: String::new(), revision }))
    }
    async fn update_node(&self, request: Request<registry::UpdateNodeRequest>) -> Answer<registry::UpdateNodeResponse> {
        let (mut recorded, asked) = (self.recorded(), request.into_inner());
        if asked.node_id != NODE {
            return Err(Error::new(Reason::NodeNotFound, "there is no such node").into());
        }
        let revision = *recorded.revision.borrow() + 1;
        recorded.node.state = asked.wanted;
        recorded.node.wanted = asked.wanted;
        recorded.node.reason = asked.reason;
        recorded.node.drain_deadline = asked.drain_deadline;
        recorded.node.revision = revision;
        let node = recorded.node.clone();
        recorded.tell(revision, registry::watch_event::Object::Node(node.clone()));
        Ok(Response::new(registry::UpdateNodeResponse { node: Some(node) }))
    }
    async fn get_counts(&self, _: Request<registry::GetCountsRequest>) -> Answer<registry::GetCountsResponse> {
        Ok(Response::new(registry::GetCountsResponse::default()))
    }
    async fn acquire_lease(
        &self,
        request: Request<registry::AcquireLeaseRequest>,
    ) -> Answer<registry::AcquireLeaseResponse> {
        let holder = request.into_inner().holder;
        Ok(Response::new(registry::AcquireLeaseResponse { held: true, epoch: 1, holder }))
    }
    async fn watch(&self, request: Request<registry::WatchRequest>) -> Answer<Self::WatchStream> {
        let (this, from) = (self.clone(), request.get_ref().start_revision);
        let mut news = self.recorded().revision.subscribe();
        let (sender, receiver) = mpsc::channel(64);
        self.1.spawn("watch", async move {
            let mut next = from;
            loop {
                let seen = *news.borrow_and_update();
                let events = this.recorded().events.clone();
                for event in events.into_iter().filter(|event| (next..=seen).contains(&event.revision)) {
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                next = next.max(seen + 1);
                tokio::select! {
                    changed = news.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }
    async fn create_vm(&self, _: Request<registry::CreateVmRequest>) -> Answer<registry::CreateVmResponse> {
        // The tests decide who runs when.
        std::future::pending().await
    }
    async fn transition_vm(&self, _: Request<registry::TransitionVmRequest>) -> Answer<registry::TransitionVmResponse> {
        not_here()
    }
    async fn get_vm(&self, request: Request<registry::GetVmRequest>) -> Answer<registry::GetVmResponse> {
        let vm = self.recorded().vm.clone().filter(|vm| vm.id == request.get_ref().vm_id);
        let vm = vm.ok_or_else(|| Error::new(Reason::VmNotFound, "there is no such VM"))?;
        Ok(Response::new(registry::GetVmResponse { vm: Some(vm) }))
    }
    async fn resize_vm(&self, _: Request<registry::ResizeVmRequest>) -> Answer<registry::ResizeVmResponse> {
        not_here()
    }
    async fn list_vm_events(
        &self,
        _: Request<registry::ListVmEventsRequest>,
    ) -> Answer<registry::ListVmEventsResponse> {
        not_here()
    }
    async fn purge_vms(&self, _: Request<registry::PurgeVmsRequest>) -> Answer<registry::PurgeVmsResponse> {
        not_here()
    }
    async fn get_job_input(&self, _: Request<registry::GetJobInputRequest>) -> Answer<registry::GetJobInputResponse> {
        not_here()
    }
    async fn assign_job(&self, _: Request<registry::AssignJobRequest>) -> Answer<registry::AssignJobResponse> {
        not_here()
    }
    async fn start_attempt(&self, _: Request<registry::StartAttemptRequest>) -> Answer<registry::StartAttemptResponse> {
        not_here()
    }
    /// The fake's jobs have no VMs, so the engine takes their attempts for lost; the tests say what becomes of them.
    async fn finish_attempt(
        &self,
        _: Request<registry::FinishAttemptRequest>,
    ) -> Answer<registry::FinishAttemptResponse> {
        std::future::pending().await
    }
    async fn cancel_job(&self, _: Request<registry::CancelJobRequest>) -> Answer<registry::CancelJobResponse> {
        not_here()
    }
    async fn fail_queued_job(
        &self,
        _: Request<registry::FailQueuedJobRequest>,
    ) -> Answer<registry::FailQueuedJobResponse> {
        std::future::pending().await
    }
    async fn find_forgotten_jobs(
        &self,
        _: Request<registry::FindForgottenJobsRequest>,
    ) -> Answer<registry::FindForgottenJobsResponse> {
        not_here()
    }
    async fn register_node(&self, _: Request<registry::RegisterNodeRequest>) -> Answer<registry::RegisterNodeResponse> {
        not_here()
    }
    async fn heartbeat(&self, _: Request<Streaming<registry::HeartbeatRequest>>) -> Answer<Self::HeartbeatStream> {
        not_here()
    }
    async fn get_revision(&self, _: Request<registry::GetRevisionRequest>) -> Answer<registry::GetRevisionResponse> {
        not_here()
    }
    async fn query(&self, _: Request<registry::QueryRequest>) -> Answer<Self::QueryStream> {
        not_here()
    }
    async fn backup(&self, _: Request<registry::BackupRequest>) -> Answer<Self::BackupStream> {
        not_here()
    }
}

/// Has one log, which grows as the test says, and one artifact.
#[derive(Clone, Default)]
pub(crate) struct FakeVmHost(Arc<Log>, Tasks);

#[derive(Default)]
struct Log {
    held: Mutex<Held>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
pub(crate) struct Held {
    pub(crate) bytes: Vec<u8>,
    pub(crate) ended: bool,
    /// Bytes in a chunk; 0: 64 KiB.
    pub(crate) chunk: usize,
    /// The next stream breaks after so many bytes.
    pub(crate) breaks_after: Option<u64>,
    /// The offsets at which streams were opened.
    pub(crate) opened: Vec<u64>,
    pub(crate) artifact: Vec<u8>,
    /// What VMs were to be resized to.
    pub(crate) resized: Vec<vmhost::ResizeVmRequest>,
}

impl FakeVmHost {
    pub(crate) fn held(&self) -> MutexGuard<'_, Held> {
        locked(&self.0.held)
    }

    pub(crate) fn write(&self, bytes: &[u8]) {
        self.held().bytes.extend_from_slice(bytes);
        self.0.changed.send_replace(());
    }

    pub(crate) fn end(&self) {
        self.held().ended = true;
        self.0.changed.send_replace(());
    }

    /// What comes at an offset; `None`: nothing yet.
    fn next(&self, offset: u64) -> Option<stream_logs_response::Record> {
        let held = self.held();
        let from = usize::try_from(offset).expect("an offset");
        if from >= held.bytes.len() {
            let end_offset = held.bytes.len() as u64;
            let state = JobState::Succeeded.to_pb().into();
            let end = common::LogEnd { end_offset, state, ..Default::default() };
            return held.ended.then_some(stream_logs_response::Record::End(end));
        }
        let size = if held.chunk == 0 { limits::MAX_LOG_CHUNK } else { held.chunk };
        let data = Bytes::copy_from_slice(&held.bytes[from..held.bytes.len().min(from + size)]);
        let chunk = common::LogChunk { stream: common::LogStream::Stdout.into(), offset, time: None, data };
        Some(stream_logs_response::Record::Chunk(chunk))
    }
}

#[tonic::async_trait]
impl VmHostService for FakeVmHost {
    type StreamLogsStream = Streamed<vmhost::StreamLogsResponse>;
    type GetArtifactStream = Streamed<vmhost::GetArtifactResponse>;

    async fn stream_logs(&self, request: Request<vmhost::StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        let asked = request.into_inner();
        let breaks_at = {
            let mut held = self.held();
            held.opened.push(asked.offset);
            held.breaks_after.take().map(|bytes| asked.offset + bytes)
        };
        let this = self.clone();
        let mut changed = self.0.changed.subscribe();
        let (sender, receiver) = mpsc::channel(4);
        self.1.spawn("log", async move {
            let mut offset = asked.offset;
            loop {
                changed.mark_unchanged();
                if breaks_at.is_some_and(|at| offset >= at) {
                    let _ = sender.send(Err(Status::unavailable("the vmhost was killed"))).await;
                    return;
                }
                let Some(record) = this.next(offset) else {
                    if !asked.follow {
                        return;
                    }
                    tokio::select! {
                        changed = changed.changed() => if changed.is_err() { return },
                        () = sender.closed() => return,
                    }
                    continue;
                };
                let last = matches!(record, stream_logs_response::Record::End(_));
                if let stream_logs_response::Record::Chunk(chunk) = &record {
                    offset += chunk.data.len() as u64;
                }
                let response = vmhost::StreamLogsResponse { attempt: asked.attempt, record: Some(record) };
                if sender.send(Ok(response)).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }
    async fn list_artifacts(
        &self,
        request: Request<vmhost::ListArtifactsRequest>,
    ) -> Answer<vmhost::ListArtifactsResponse> {
        let attempt = request.get_ref().attempt;
        let size_bytes = self.held().artifact.len() as u64;
        let artifact = common::Artifact { path: format!("/out/{attempt}"), size_bytes, ..Default::default() };
        Ok(Response::new(vmhost::ListArtifactsResponse { artifacts: vec![artifact] }))
    }
    async fn get_artifact(&self, request: Request<vmhost::GetArtifactRequest>) -> Answer<Self::GetArtifactStream> {
        let asked = request.into_inner();
        if asked.path != format!("/out/{}", asked.attempt) {
            return Err(Error::new(Reason::ArtifactNotFound, "there is no such file").with("path", asked.path).into());
        }
        let bytes = Bytes::from(self.held().artifact.clone()).slice(usize::try_from(asked.offset).expect("fits")..);
        let artifact = common::Artifact { path: asked.path, size_bytes: bytes.len() as u64, ..Default::default() };
        let parts: Vec<_> = bytes.chunks(65_536).map(Bytes::copy_from_slice).collect();
        let parts = parts.into_iter().enumerate().map(move |(at, data)| {
            Ok(vmhost::GetArtifactResponse { artifact: (at == 0).then(|| artifact.clone()), data })
        });
        Ok(Response::new(futures::stream::iter(parts).boxed()))
    }
    async fn start_vm(&self, _: Request<vmhost::StartVmRequest>) -> Answer<vmhost::StartVmResponse> {
        not_here()
    }
    async fn stop_vm(&self, _: Request<vmhost::StopVmRequest>) -> Answer<vmhost::StopVmResponse> {
        not_here()
    }
    async fn run_job(&self, _: Request<vmhost::RunJobRequest>) -> Answer<vmhost::RunJobResponse> {
        not_here()
    }
    async fn cancel_job(&self, _: Request<vmhost::CancelJobRequest>) -> Answer<vmhost::CancelJobResponse> {
        not_here()
    }
    async fn list_vms(&self, _: Request<vmhost::ListVmsRequest>) -> Answer<vmhost::ListVmsResponse> {
        not_here()
    }
    async fn check_invariants(
        &self,
        _: Request<vmhost::CheckInvariantsRequest>,
    ) -> Answer<vmhost::CheckInvariantsResponse> {
        not_here()
    }
    async fn get_console(&self, _: Request<vmhost::GetConsoleRequest>) -> Answer<vmhost::GetConsoleResponse> {
        not_here()
    }
    async fn get_vm_usage(&self, _: Request<vmhost::GetVmUsageRequest>) -> Answer<vmhost::GetVmUsageResponse> {
        not_here()
    }
    async fn resize_vm(&self, request: Request<vmhost::ResizeVmRequest>) -> Answer<vmhost::ResizeVmResponse> {
        let asked = request.into_inner();
        if let Some(vcpus) = asked.vcpus.filter(|vcpus| *vcpus > 8) {
            return Err(blixard::error::invalid("vcpus", vcpus, "at most 8, for the test").into());
        }
        let (vcpus, memory_mib) = (asked.vcpus, asked.memory_mib);
        let config = common::VmConfig { vcpus, memory_mib, ..Default::default() };
        let vm = common::Vm { id: asked.vm_id.clone(), config: Some(config), ..Default::default() };
        self.held().resized.push(asked);
        Ok(Response::new(vmhost::ResizeVmResponse { vm: Some(vm) }))
    }
}
