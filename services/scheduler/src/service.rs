//! The RPCs: parse, one call, encode. What is on record comes from the registry; what runs comes from the node it runs on.

use std::{collections::BTreeMap, pin::Pin, time::Duration};

use blixard::{
    error::{Error, Reason, invalid},
    id::{JobId, VmId},
    job::{Job, JobSpec},
    limits,
    node::NodeState,
    pb::{
        registry::v1 as registry,
        scheduler::v1::{self as pb, scheduler_service_server::SchedulerService},
        vmhost::v1 as vmhost,
    },
    time::millis,
    vm::{Vm, VmConfig, VmKind, VmResize, VmState},
};
use blixard_chassis::{
    Tasks,
    client::{forward, request as timed},
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::{
    SchedulerConfig,
    engine::{OWNER_LABEL, could_ever_fit},
    feed::{Feed, Subscription},
    follow,
    hub::Hubs,
    logs,
    nodes::parse_deadline,
    peers::{Peers, missing, peer_error},
    shell::ShellHandle,
    submit::Submission,
};

/// Implements `SchedulerService`.
#[derive(Clone)]
pub struct SchedulerApi {
    pub(crate) config: SchedulerConfig,
    pub(crate) peers: Peers,
    pub(crate) shell: ShellHandle,
    feed: Feed,
    hubs: Hubs,
    tasks: Tasks,
}

/// How long a node has to tell a VM's addresses: who asks for a VM gets it without them from a node that is slow.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(2);

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Receiver<T> = mpsc::Receiver<Result<T, Status>>;

pub(crate) fn refused(status: Status) -> Status {
    peer_error("registry", &status).into()
}

impl SchedulerApi {
    pub(crate) fn new(config: SchedulerConfig, peers: Peers, feed: Feed, shell: ShellHandle, tasks: Tasks) -> Self {
        let hubs = Hubs::new(tasks.clone());
        tasks.spawn_until_end("reasons for waiting", follow::keep_reasons(shell.clone(), feed.clone()));
        Self { config, peers, feed, shell, hubs, tasks }
    }

    /// Sends the changes of a job.
    fn follow_changes(&self, job_id: JobId, subscription: Subscription) -> Receiver<pb::WatchJobResponse> {
        let (sender, receiver) = mpsc::channel(follow::BUFFER);
        let watch = follow::watch_job(self.shell.clone(), self.feed.clone(), job_id, subscription, sender);
        self.tasks.spawn("watch job", watch);
        receiver
    }

    /// Sends the output of a job.
    fn follow_log(&self, wanted: logs::Wanted, subscription: Subscription) -> Receiver<pb::StreamJobLogsResponse> {
        let (sender, receiver) = mpsc::channel(logs::BUFFER);
        let stream = logs::stream(self.peers.clone(), self.hubs.clone(), subscription, wanted, sender);
        self.tasks.spawn("stream job logs", stream);
        receiver
    }

    /// Follows a job: the subscription comes before the read, so that nothing falls between them.
    async fn watch(&self, job_id: JobId) -> Result<Subscription, Status> {
        let subscription = self.feed.subscribe(job_id);
        let message = registry::GetJobRequest { job_id: job_id.to_string() };
        let answer = self.peers.registry().get_job(message).await.map_err(refused)?;
        let job = Job::try_from(answer.into_inner().job.ok_or_else(|| missing("job"))?)?;
        self.feed.publish(&job);
        Ok(subscription)
    }

    /// What addresses a VM has now; none when its node does not tell.
    async fn addresses(&self, vm: &Vm) -> Vec<String> {
        if !vm.config.egress.needs_network() || vm.state.is_terminal() {
            return Vec::new();
        }
        let Ok(mut vmhost) = self.peers.vmhost(&vm.node_id) else { return Vec::new() };
        let list = vmhost::ListVmsRequest { vm_id: vm.id.to_string(), ..Default::default() };
        let listed = vmhost.list_vms(timed(list, ADDRESS_TIMEOUT)).await;
        let hosted = listed.map(|listed| listed.into_inner().vms).unwrap_or_default();
        hosted.into_iter().flat_map(|hosted| hosted.addresses).collect()
    }

    async fn find_vm(&self, vm_id: VmId) -> Result<Vm, Error> {
        let message = registry::GetVmRequest { vm_id: vm_id.to_string() };
        let answer = self.peers.registry().get_vm(message).await.map_err(|status| peer_error("registry", &status))?;
        Vm::try_from(answer.into_inner().vm.ok_or_else(|| missing("vm"))?)
    }

    /// Refuses what could never run, with the field below `field` that is why.
    pub(crate) async fn check_fit(&self, field: &str, spec: &JobSpec) -> Result<(), Error> {
        if let Some(vm_id) = spec.target_vm_id {
            let vm = self.find_vm(vm_id).await?;
            if vm.state.is_terminal() || vm.state == VmState::Draining {
                let message = format!("{field}.target_vm_id: VM {vm_id} is {} and takes no more jobs", vm.state);
                return Err(Error::new(Reason::VmNotAccepting, message).with("vm_id", vm_id).with("state", vm.state));
            }
            if let Some(egress) = spec.egress.as_ref().filter(|egress| **egress != vm.config.egress) {
                let allowed = format!("{}, which its VM has, or nothing", vm.config.egress);
                return Err(invalid(&format!("{field}.egress"), egress, &allowed));
            }
            if !spec.volumes.is_empty() && spec.volumes != vm.config.volumes {
                let has = if vm.config.volumes.is_empty() { "none".to_owned() } else { vm.config.volumes.to_string() };
                let allowed = format!("{has}, which its VM has, or nothing");
                return Err(invalid(&format!("{field}.volumes"), &spec.volumes, &allowed));
            }
            return Ok(());
        }
        let config = VmConfig {
            kind: VmKind::Ephemeral,
            image: spec.image.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            labels: BTreeMap::new(),
            node_id: spec.node_id.clone(),
            egress: spec.egress.clone().unwrap_or_default(),
            volumes: spec.volumes.clone(),
        };
        could_ever_fit(&self.peers.nodes(), field, &config, &spec.node_labels)
    }
}

pub(crate) fn request_id(value: &str) -> Result<uuid::Uuid, Error> {
    if value.is_empty() {
        return Ok(uuid::Uuid::new_v4());
    }
    uuid::Uuid::parse_str(value).map_err(|_| invalid("request_id", value, "a UUID, or empty"))
}

pub(crate) fn check_reason(reason: &str) -> Result<(), Error> {
    if reason.len() > limits::MAX_REASON_BYTES {
        return Err(invalid("reason", reason, &format!("at most {} bytes", limits::MAX_REASON_BYTES)));
    }
    Ok(())
}

fn parse_grace(grace_ms: Option<u64>) -> Result<Duration, Error> {
    let grace = grace_ms.map_or(limits::DEFAULT_STOP_GRACE, Duration::from_millis);
    if grace > limits::MAX_STOP_GRACE {
        let allowed = format!("at most {} (ms)", limits::MAX_STOP_GRACE.as_millis());
        return Err(invalid("grace_ms", grace.as_millis(), &allowed));
    }
    Ok(grace)
}

#[tonic::async_trait]
impl SchedulerService for SchedulerApi {
    async fn submit_job(&self, request: Request<pb::SubmitJobRequest>) -> Answer<pb::SubmitJobResponse> {
        let mut submission = Submission::from(request.get_ref().clone());
        let job_id = JobId(request_id(&submission.request_id)?);
        let repeatable = !submission.request_id.is_empty();
        submission.request_id = job_id.to_string();
        let subscription = self.feed.subscribe(job_id);
        let job = self.submit(&request, submission, repeatable).await?;
        self.feed.remember(&subscription, &job);
        Ok(Response::new(pb::SubmitJobResponse { job: Some(job.into()) }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Answer<pb::GetJobResponse> {
        let get = registry::GetJobRequest { job_id: request.get_ref().job_id.clone() };
        let answer = self.peers.registry().get_job(forward(&request, get)).await.map_err(refused)?;
        Ok(Response::new(pb::GetJobResponse { job: answer.into_inner().job }))
    }

    async fn list_jobs(&self, request: Request<pb::ListJobsRequest>) -> Answer<pb::ListJobsResponse> {
        let asked = request.get_ref().clone();
        let list = registry::ListJobsRequest {
            page_size: asked.page_size,
            page_token: asked.page_token,
            states: asked.states,
            labels: asked.labels,
            node_id: asked.node_id,
            group_id: asked.group_id,
        };
        let answer = self.peers.registry().list_jobs(forward(&request, list)).await.map_err(refused)?.into_inner();
        Ok(Response::new(pb::ListJobsResponse { jobs: answer.jobs, next_page_token: answer.next_page_token }))
    }

    async fn cancel_job(&self, request: Request<pb::CancelJobRequest>) -> Answer<pb::CancelJobResponse> {
        let asked = request.get_ref().clone();
        check_reason(&asked.reason)?;
        let cancel = registry::CancelJobRequest { job_id: asked.job_id, reason: asked.reason, ..Default::default() };
        let answer = self.peers.registry().cancel_job(forward(&request, cancel)).await.map_err(refused)?;
        Ok(Response::new(pb::CancelJobResponse { job: answer.into_inner().job }))
    }

    async fn submit_job_group(
        &self,
        request: Request<pb::SubmitJobGroupRequest>,
    ) -> Answer<pb::SubmitJobGroupResponse> {
        Ok(Response::new(self.submit_group(&request).await?))
    }

    type RunJobStream = Streamed<pb::RunJobResponse>;

    async fn run_job(&self, request: Request<pb::RunJobRequest>) -> Answer<Self::RunJobStream> {
        let mut submission = Submission::from(request.get_ref().clone());
        let job_id = JobId(request_id(&submission.request_id)?);
        let repeatable = !submission.request_id.is_empty();
        submission.request_id = job_id.to_string();
        // Before the job is on record, so that its first change is seen and it need not be read.
        let subscriptions = (self.feed.subscribe(job_id), self.feed.subscribe(job_id));
        let job = self.submit(&request, submission, repeatable).await?;
        self.feed.publish(&job);
        let changes = self.follow_changes(job_id, subscriptions.0);
        let wanted = logs::Wanted { job_id, attempt: None, offset: 0, follow: true };
        let records = self.follow_log(wanted, subscriptions.1);
        let (sender, receiver) = mpsc::channel(logs::BUFFER);
        self.tasks.spawn("run job", follow::run_job(changes, records, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn explain_job(&self, request: Request<pb::ExplainJobRequest>) -> Answer<pb::ExplainJobResponse> {
        Ok(Response::new(self.explain(&request).await?))
    }

    async fn list_artifacts(&self, request: Request<pb::ListArtifactsRequest>) -> Answer<pb::ListArtifactsResponse> {
        Ok(Response::new(self.artifacts(&request).await?))
    }

    type GetArtifactStream = Streamed<pb::GetArtifactResponse>;

    async fn get_artifact(&self, request: Request<pb::GetArtifactRequest>) -> Answer<Self::GetArtifactStream> {
        Ok(Response::new(Box::pin(self.artifact(&request).await?)))
    }

    async fn list_nodes(&self, request: Request<pb::ListNodesRequest>) -> Answer<pb::ListNodesResponse> {
        Ok(Response::new(self.nodes(&request).await?))
    }

    async fn cordon_node(&self, request: Request<pb::CordonNodeRequest>) -> Answer<pb::CordonNodeResponse> {
        let asked = request.get_ref();
        let node = self.want(&request, &asked.node_id, NodeState::Cordoned, &asked.reason, None).await?;
        Ok(Response::new(pb::CordonNodeResponse { node: Some(node) }))
    }

    async fn uncordon_node(&self, request: Request<pb::UncordonNodeRequest>) -> Answer<pb::UncordonNodeResponse> {
        let node = self.want(&request, &request.get_ref().node_id, NodeState::Ready, "", None).await?;
        Ok(Response::new(pb::UncordonNodeResponse { node: Some(node) }))
    }

    async fn drain_node(&self, request: Request<pb::DrainNodeRequest>) -> Answer<pb::DrainNodeResponse> {
        let asked = request.get_ref();
        let deadline = parse_deadline(asked.deadline_ms)?;
        let node = self.want(&request, &asked.node_id, NodeState::Draining, &asked.reason, deadline).await?;
        Ok(Response::new(pb::DrainNodeResponse { node: Some(node) }))
    }

    async fn check_node(&self, request: Request<pb::CheckNodeRequest>) -> Answer<pb::CheckNodeResponse> {
        Ok(Response::new(self.check(&request).await?))
    }

    type WatchJobStream = Streamed<pb::WatchJobResponse>;

    async fn watch_job(&self, request: Request<pb::WatchJobRequest>) -> Answer<Self::WatchJobStream> {
        let job_id = JobId::parse("job_id", &request.get_ref().job_id)?;
        let mut subscription = self.feed.subscribe(job_id);
        if subscription.changes.borrow().job.is_none() {
            subscription = self.watch(job_id).await?;
        }
        let changes = self.follow_changes(job_id, subscription);
        Ok(Response::new(Box::pin(ReceiverStream::new(changes))))
    }

    type StreamJobLogsStream = Streamed<pb::StreamJobLogsResponse>;

    async fn stream_job_logs(&self, request: Request<pb::StreamJobLogsRequest>) -> Answer<Self::StreamJobLogsStream> {
        let asked = request.get_ref();
        let job_id = JobId::parse("job_id", &asked.job_id)?;
        let subscription = self.watch(job_id).await?;
        let wanted = logs::Wanted {
            job_id,
            attempt: (asked.attempt > 0).then_some(asked.attempt),
            offset: asked.offset,
            follow: asked.follow,
        };
        Ok(Response::new(Box::pin(ReceiverStream::new(self.follow_log(wanted, subscription)))))
    }

    async fn start_vm(&self, request: Request<pb::StartVmRequest>) -> Answer<pb::StartVmResponse> {
        let message = request.into_inner();
        let vm_id = VmId(request_id(&message.request_id)?);
        let config = message.config.ok_or_else(|| invalid("config", "", "required"))?;
        let config = VmConfig::parse("config", config, self.config.settings.defaults)?;
        if config.labels.contains_key(OWNER_LABEL) {
            return Err(invalid("config.labels", OWNER_LABEL, "any key but this one: it is the scheduler's").into());
        }
        let repeated = if message.request_id.is_empty() { None } else { self.find_vm(vm_id).await.ok() };
        let vm = match repeated {
            // The registry compares the bodies and gives the first answer, or REQUEST_ID_REUSED.
            Some(vm) => {
                let node_id = vm.node_id.to_string();
                let create = registry::CreateVmRequest {
                    vm_id: vm_id.to_string(),
                    config: Some(config.into()),
                    node_id,
                    ..Default::default()
                };
                self.peers.registry().create_vm(create).await.map_err(refused)?.into_inner().vm
            }
            None => {
                could_ever_fit(&self.peers.nodes(), "config", &config, &BTreeMap::new())?;
                Some(self.shell.start_vm(vm_id, config).await?.into())
            }
        };
        Ok(Response::new(pb::StartVmResponse { vm }))
    }

    async fn stop_vm(&self, request: Request<pb::StopVmRequest>) -> Answer<pb::StopVmResponse> {
        let asked = request.get_ref();
        let vm_id = VmId::parse("vm_id", &asked.vm_id)?;
        let grace = parse_grace(asked.grace_ms)?;
        check_reason(&asked.reason)?;
        let vm = self.find_vm(vm_id).await?;
        if vm.state.is_terminal() {
            return Ok(Response::new(pb::StopVmResponse { vm: Some(vm.into()) }));
        }
        let drain = registry::TransitionVmRequest {
            vm_id: vm_id.to_string(),
            to_state: VmState::Draining.to_pb().into(),
            expected_generation: 0,
            reason: if asked.reason.is_empty() { "stopped by a user".to_owned() } else { asked.reason.clone() },
            grace_ms: Some(millis(grace)),
            ..Default::default()
        };
        let vm = match self.peers.registry().transition_vm(forward(&request, drain)).await {
            Ok(answer) => answer.into_inner().vm,
            // It ended in this moment.
            Err(status) if Error::from_status(&status).reason == Reason::IllegalTransition => {
                Some(self.find_vm(vm_id).await?.into())
            }
            Err(status) => return Err(refused(status)),
        };
        Ok(Response::new(pb::StopVmResponse { vm }))
    }

    async fn get_vm(&self, request: Request<pb::GetVmRequest>) -> Answer<pb::GetVmResponse> {
        let get = registry::GetVmRequest { vm_id: request.get_ref().vm_id.clone() };
        let answer = self.peers.registry().get_vm(forward(&request, get)).await.map_err(refused)?;
        let vm = answer.into_inner().vm;
        let addresses = match vm.clone().map(Vm::try_from) {
            Some(Ok(vm)) => self.addresses(&vm).await,
            Some(Err(_)) | None => Vec::new(),
        };
        Ok(Response::new(pb::GetVmResponse { vm, addresses }))
    }

    async fn list_vms(&self, request: Request<pb::ListVmsRequest>) -> Answer<pb::ListVmsResponse> {
        let asked = request.get_ref().clone();
        let list = registry::ListVmsRequest {
            page_size: asked.page_size,
            page_token: asked.page_token,
            states: asked.states,
            kind: asked.kind,
            node_id: asked.node_id,
            labels: asked.labels,
        };
        let answer = self.peers.registry().list_vms(forward(&request, list)).await.map_err(refused)?.into_inner();
        Ok(Response::new(pb::ListVmsResponse { vms: answer.vms, next_page_token: answer.next_page_token }))
    }

    async fn list_vm_events(&self, request: Request<pb::ListVmEventsRequest>) -> Answer<pb::ListVmEventsResponse> {
        let asked = request.get_ref().clone();
        let list = registry::ListVmEventsRequest {
            vm_id: asked.vm_id,
            page_size: asked.page_size,
            page_token: asked.page_token,
        };
        let answer = self.peers.registry().list_vm_events(forward(&request, list)).await.map_err(refused)?.into_inner();
        Ok(Response::new(pb::ListVmEventsResponse { events: answer.events, next_page_token: answer.next_page_token }))
    }

    async fn purge_vms(&self, request: Request<pb::PurgeVmsRequest>) -> Answer<pb::PurgeVmsResponse> {
        let asked = request.get_ref().clone();
        let purge = registry::PurgeVmsRequest { states: asked.states, vm_ids: asked.vm_ids, ..Default::default() };
        let answer = self.peers.registry().purge_vms(forward(&request, purge)).await.map_err(refused)?;
        Ok(Response::new(pb::PurgeVmsResponse { purged: answer.into_inner().purged }))
    }

    async fn get_vm_console(&self, request: Request<pb::GetVmConsoleRequest>) -> Answer<pb::GetVmConsoleResponse> {
        let vm_id = VmId::parse("vm_id", &request.get_ref().vm_id)?;
        let vm = self.find_vm(vm_id).await?;
        let get = vmhost::GetConsoleRequest { vm_id: vm_id.to_string() };
        let answer = self.peers.vmhost(&vm.node_id)?.get_console(forward(&request, get)).await;
        let console = answer.map_err(|status| peer_error("vmhost", &status))?.into_inner();
        Ok(Response::new(pb::GetVmConsoleResponse { data: console.data, skipped: console.skipped }))
    }

    async fn get_vm_usage(&self, request: Request<pb::GetVmUsageRequest>) -> Answer<pb::GetVmUsageResponse> {
        let vm_id = VmId::parse("vm_id", &request.get_ref().vm_id)?;
        let vm = self.find_vm(vm_id).await?;
        let get = vmhost::GetVmUsageRequest { vm_id: vm_id.to_string() };
        let answer = self.peers.vmhost(&vm.node_id)?.get_vm_usage(forward(&request, get)).await;
        let usage = answer.map_err(|status| peer_error("vmhost", &status))?.into_inner().usage;
        Ok(Response::new(pb::GetVmUsageResponse { usage }))
    }

    async fn resize_vm(&self, request: Request<pb::ResizeVmRequest>) -> Answer<pb::ResizeVmResponse> {
        let asked = request.get_ref();
        let vm_id = VmId::parse("vm_id", &asked.vm_id)?;
        let VmResize { vcpus, memory_mib } = VmResize::parse(asked.vcpus, asked.memory_mib)?;
        let vm = self.find_vm(vm_id).await?;
        if !vm.state.is_running() {
            let message = format!("VM {vm_id} is {} and takes no other shape", vm.state);
            return Err(Error::new(Reason::VmNotAccepting, message)
                .with("vm_id", vm_id)
                .with("state", vm.state)
                .into());
        }
        // What is not named the node knows: what is on record may lag behind.
        let resize = vmhost::ResizeVmRequest { vm_id: vm_id.to_string(), vcpus, memory_mib };
        let answer = self.peers.vmhost(&vm.node_id)?.resize_vm(forward(&request, resize)).await;
        let resized = answer.map_err(|status| peer_error("vmhost", &status))?.into_inner();
        Ok(Response::new(pb::ResizeVmResponse { vm: resized.vm }))
    }

    async fn get_stats(&self, request: Request<pb::GetStatsRequest>) -> Answer<pb::GetStatsResponse> {
        let (leader, leading) = self.shell.leader();
        let counts = registry::GetCountsRequest {};
        let counts = self.peers.registry().get_counts(forward(&request, counts)).await.map_err(refused)?.into_inner();
        let is_running = |state| VmState::from_pb("state", state).is_ok_and(VmState::is_running);
        let ready = self.peers.nodes().values().filter(|entry| entry.node.state == NodeState::Ready).count();
        Ok(Response::new(pb::GetStatsResponse {
            total_vms: counts.vms.iter().map(|row| row.count).sum(),
            running_vms: counts.vms.iter().filter(|row| is_running(row.state)).map(|row| row.count).sum(),
            vm_states: counts.vms.iter().map(|row| pb::VmStateCount { state: row.state, count: row.count }).collect(),
            job_states: counts
                .jobs
                .iter()
                .map(|row| pb::JobStateCount { state: row.state, count: row.count })
                .collect(),
            ready_nodes: u32::try_from(ready).unwrap_or(u32::MAX),
            max_vms: self.config.settings.max_vms,
            revision: counts.revision,
            leader,
            leading,
        }))
    }
}
