//! The client that users program against: the lines of the user's guide, over `SchedulerService`.
//!
//! ```no_run
//! use blixard::sdk::{AppState, Job, JobType, VmAssignment, VmConfig};
//! use uuid::Uuid;
//!
//! # async fn guide() -> Result<(), blixard::error::Error> {
//! let state = AppState::connect("http://127.0.0.1:50051").await?;
//! let vm_manager = state.infrastructure().vm_manager();
//!
//! // A VM of one's own, and a job in it.
//! let config = VmConfig::default_ephemeral();
//! let vm_instance = vm_manager.start_vm(config).await?;
//! let job = Job { command: vec!["uname".into(), "-r".into()], ..Job::default() };
//! let result = vm_manager.submit_job_to_vm(vm_instance.config.id, job).await?;
//! println!("{:?}: {:?}", result.state, result.exit);
//! vm_manager.stop_vm(vm_instance.config.id).await?;
//!
//! // A job that is routed.
//! let job = Job {
//!     id: Uuid::new_v4(),
//!     job_type: JobType::Execute,
//!     command: vec!["true".into()],
//!     ..Job::default()
//! };
//! match vm_manager.execute_job(job).await? {
//!     VmAssignment::Ephemeral(vm_id) => println!("a VM of its own: {vm_id}"),
//!     VmAssignment::Service(vm_id) => println!("a service VM: {vm_id}"),
//! }
//!
//! let stats = vm_manager.get_stats().await?;
//! println!("Total VMs: {}, Running: {}", stats.total_vms, stats.running_vms);
//! # Ok(())
//! # }
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use crate::{
    error::{Error, Reason, invalid},
    id::{JobId, VmId},
    job::{ExitStatus, InputFile, Isolation, Job as Recorded, JobState, RetryOn},
    limits,
    pb::{
        common::v1 as common,
        scheduler::v1::{
            self as pb, scheduler_service_client::SchedulerServiceClient, stream_job_logs_response::Record,
        },
    },
    time::millis,
    vm::{Vm, VmKind, VmState},
};

/// A watch that broke off is opened again after this.
const RECONNECT_AFTER: Duration = Duration::from_millis(200);
/// So many times in a row, about half a minute: a control plane that restarts is back by then.
const RECONNECTS: u32 = 150;

/// A connection to a control plane.
#[derive(Debug, Clone)]
pub struct AppState {
    infrastructure: Infrastructure,
}

/// What a control plane offers.
#[derive(Debug, Clone)]
pub struct Infrastructure {
    vm_manager: VmManager,
}

impl AppState {
    /// Connects to a scheduler, as `http://host:port`.
    ///
    /// # Errors
    /// INVALID_FIELD for something else, PEER_UNAVAILABLE when nobody answers there.
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        let parsed = Endpoint::from_shared(endpoint.to_owned());
        let parsed = parsed.map_err(|_| invalid("endpoint", endpoint, "http://host:port"))?;
        let channel = parsed.connect_timeout(Duration::from_secs(5)).tcp_nodelay(true).connect().await;
        let channel = channel.map_err(|error| {
            let message = format!("no control plane answers at {endpoint} ({error}); start one with: mvm-ci");
            Error::new(Reason::PeerUnavailable, message).with("peer", endpoint)
        })?;
        Ok(Self { infrastructure: Infrastructure { vm_manager: VmManager::new(channel) } })
    }

    /// What the control plane offers.
    #[must_use]
    pub fn infrastructure(&self) -> &Infrastructure {
        &self.infrastructure
    }
}

impl Infrastructure {
    /// Starts and stops VMs and runs jobs in them.
    #[must_use]
    pub fn vm_manager(&self) -> VmManager {
        self.vm_manager.clone()
    }
}

/// What a VM is to be made of. What is `None` is the control plane's to choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Its id; starting the same id and config again gives the same VM.
    pub id: VmId,
    /// Ephemeral or service.
    pub kind: VmKind,
    /// Name of the image it boots.
    pub image: String,
    /// Virtual CPUs, 1 to 64.
    pub vcpus: Option<u32>,
    /// Memory in MiB, 96 to 1,048,576.
    pub memory_mib: Option<u32>,
    /// Labels for filtering.
    pub labels: BTreeMap<String, String>,
}

impl VmConfig {
    /// A VM that runs one job and ends.
    #[must_use]
    pub fn default_ephemeral() -> Self {
        Self::new(VmKind::Ephemeral)
    }

    /// A VM that runs job after job until it is stopped.
    #[must_use]
    pub fn default_service() -> Self {
        Self::new(VmKind::Service)
    }

    fn new(kind: VmKind) -> Self {
        Self {
            id: VmId::random(),
            kind,
            image: limits::DEFAULT_IMAGE.to_owned(),
            vcpus: None,
            memory_mib: None,
            labels: BTreeMap::new(),
        }
    }
}

/// A VM that has been recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmInstance {
    /// What it is made of, defaults filled in.
    pub config: VmConfig,
    /// Its state at that moment.
    pub state: VmState,
    /// The node that runs it.
    pub node_id: String,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum JobType {
    /// Runs `command`.
    #[default]
    Execute,
}

/// A job to run. What is `None` is the control plane's to choose.
#[derive(Clone, PartialEq, Eq)]
pub struct Job {
    /// Its id; submitting the same id and body again gives the same job.
    pub id: Uuid,
    /// What it does.
    pub job_type: JobType,
    /// The program and its arguments; not passed through a shell.
    pub command: Vec<String>,
    /// Environment, added to the guest's own and the image's.
    pub env: BTreeMap<String, String>,
    /// Absolute path to run in; empty: the one that the image names, else "/".
    pub working_dir: String,
    /// Name of the image it needs.
    pub image: String,
    /// Virtual CPUs of its VM.
    pub vcpus: Option<u32>,
    /// Memory of its VM in MiB.
    pub memory_mib: Option<u32>,
    /// How far it must be kept from other jobs.
    pub isolation: Isolation,
    /// Higher runs first, -1,000 to 1,000.
    pub priority: i32,
    /// How long one attempt may run.
    pub timeout: Option<Duration>,
    /// How many attempts may start, as `retry_on` says; 0: 1.
    pub max_attempts: u32,
    /// What an attempt may come to for another one to follow; empty: lost.
    pub retry_on: BTreeSet<RetryOn>,
    /// Pause before the second attempt, doubled for each later one.
    pub backoff: Duration,
    /// How long it may wait in the queue.
    pub queue_timeout: Option<Duration>,
    /// How long an attempt may take from its arrival at the node to the start of its command.
    pub start_timeout: Option<Duration>,
    /// Labels for filtering; `tenant` says whose it is.
    pub labels: BTreeMap<String, String>,
    /// Labels that its node must have.
    pub node_labels: BTreeMap<String, String>,
    /// Labels that its node should have.
    pub preferred_node_labels: BTreeMap<String, String>,
    /// Jobs that must have succeeded before.
    pub after: Vec<JobId>,
    /// What its command reads on standard input. All input together: at most 512 KiB.
    pub stdin: Vec<u8>,
    /// Files that are put into the guest.
    pub files: Vec<InputFile>,
    /// Environment variables that are not to be seen, in its output either. Sealed before they are stored.
    pub secrets: BTreeMap<String, String>,
    /// Absolute paths of files in the guest that are kept: see [`VmManager::artifact`].
    pub artifacts: Vec<String>,
    /// How long it is kept after its end; `None`: as long as retention says.
    pub result_ttl: Option<Duration>,
}

/// Without what it is given: secrets are in it.
impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("id", &self.id).field("command", &self.command).finish_non_exhaustive()
    }
}

impl Default for Job {
    /// A job with a new id and no command yet.
    fn default() -> Self {
        Self {
            id: Uuid::new_v4(),
            job_type: JobType::Execute,
            command: Vec::new(),
            env: BTreeMap::new(),
            working_dir: String::new(),
            image: String::new(),
            vcpus: None,
            memory_mib: None,
            isolation: Isolation::Standard,
            priority: 0,
            timeout: None,
            max_attempts: 0,
            retry_on: BTreeSet::new(),
            backoff: Duration::ZERO,
            queue_timeout: None,
            start_timeout: None,
            labels: BTreeMap::new(),
            node_labels: BTreeMap::new(),
            preferred_node_labels: BTreeMap::new(),
            after: Vec::new(),
            stdin: Vec::new(),
            files: Vec::new(),
            secrets: BTreeMap::new(),
            artifacts: Vec::new(),
            result_ttl: None,
        }
    }
}

impl Job {
    /// What the control plane is asked for.
    fn into_request(self, vm_id: Option<VmId>) -> pb::SubmitJobRequest {
        let JobType::Execute = self.job_type;
        let isolation = match self.isolation {
            Isolation::Maximum => common::Isolation::Maximum,
            Isolation::Standard => common::Isolation::Standard,
            Isolation::Minimal => common::Isolation::Minimal,
        };
        let succeeded = common::DependencyCondition::Succeeded.into();
        let after = self.after.iter().map(|id| common::Dependency { job_id: id.to_string(), condition: succeeded });
        let spec = common::JobSpec {
            command: self.command,
            env: self.env,
            working_dir: self.working_dir,
            image: self.image,
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            isolation: isolation.into(),
            priority: self.priority,
            timeout_ms: self.timeout.map_or(0, millis),
            max_attempts: self.max_attempts,
            retry_on: self.retry_on.into_iter().map(|on| common::RetryOn::from(on).into()).collect(),
            backoff_ms: millis(self.backoff),
            queue_timeout_ms: self.queue_timeout.map_or(0, millis),
            start_timeout_ms: self.start_timeout.map_or(0, millis),
            labels: self.labels,
            node_labels: self.node_labels,
            preferred_node_labels: self.preferred_node_labels,
            target_vm_id: vm_id.map(|id| id.to_string()).unwrap_or_default(),
            depends_on: after.collect(),
            artifacts: self.artifacts,
            result_ttl_ms: self.result_ttl.map_or(0, millis),
            ..Default::default()
        };
        let input = common::JobInput {
            stdin: self.stdin.into(),
            files: self.files.into_iter().map(Into::into).collect(),
            secrets: self.secrets,
            sealed_secrets: BTreeMap::new(),
        };
        let input = (input != common::JobInput::default()).then_some(input);
        pb::SubmitJobRequest { request_id: self.id.to_string(), spec: Some(spec), input }
    }
}

/// Where a job went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmAssignment {
    /// A VM that ends after the job.
    Ephemeral(VmId),
    /// A VM that goes on to other jobs.
    Service(VmId),
}

/// What a job came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobResult {
    /// The job.
    pub job_id: JobId,
    /// The VM of its last attempt.
    pub vm_id: Option<VmId>,
    /// Its final state.
    pub state: JobState,
    /// How the command ended; `None` when it never ran or was lost.
    pub exit: Option<ExitStatus>,
    /// Why, in words; may be empty.
    pub reason: String,
}

/// A job's whole output.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Output {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

/// Counts of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmStats {
    /// VMs on record, ended ones included.
    pub total_vms: u64,
    /// VMs that are Ready, Busy or Idle.
    pub running_vms: u64,
    /// How many VMs may live at once.
    pub max_vms: u32,
    /// Nodes that take work.
    pub ready_nodes: u32,
}

/// Starts and stops VMs and runs jobs in them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct VmManager {
    client: SchedulerServiceClient<Channel>,
}

impl VmManager {
    fn new(channel: Channel) -> Self {
        let client = SchedulerServiceClient::new(channel)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        Self { client }
    }

    /// Records a VM and starts it. Jobs may be submitted to it while it boots.
    ///
    /// # Errors
    /// INVALID_FIELD, IMAGE_NOT_FOUND, EXCEEDS_CAPACITY, OVERLOADED when there is no room now.
    pub async fn start_vm(&self, config: VmConfig) -> Result<VmInstance, Error> {
        let message = pb::StartVmRequest {
            request_id: config.id.to_string(),
            config: Some(common::VmConfig {
                kind: config.kind.to_pb().into(),
                image: config.image,
                vcpus: config.vcpus,
                memory_mib: config.memory_mib,
                labels: config.labels,
                node_id: String::new(),
                egress: None,
                volumes: Vec::new(),
            }),
        };
        let vm = self.client.clone().start_vm(message).await?.into_inner().vm;
        Vm::try_from(vm.ok_or_else(|| invalid("vm", "", "required"))?).map(VmInstance::from)
    }

    /// Ends a VM: its job is sent SIGTERM, and after ten seconds it is killed. Answers once that is on record.
    ///
    /// # Errors
    /// VM_NOT_FOUND.
    pub async fn stop_vm(&self, vm_id: VmId) -> Result<(), Error> {
        let message = pb::StopVmRequest { vm_id: vm_id.to_string(), grace_ms: None, reason: String::new() };
        self.client.clone().stop_vm(message).await?;
        Ok(())
    }

    /// Runs a job in this VM and waits for its end.
    ///
    /// # Errors
    /// INVALID_FIELD, VM_NOT_FOUND, VM_NOT_ACCEPTING. A command that fails is no error: see [`JobResult`].
    pub async fn submit_job_to_vm(&self, vm_id: VmId, job: Job) -> Result<JobResult, Error> {
        let job_id = self.submit(job, Some(vm_id)).await?;
        self.wait(job_id).await
    }

    /// Queues a job and waits until it has a VM.
    ///
    /// # Errors
    /// INVALID_FIELD, IMAGE_NOT_FOUND, EXCEEDS_CAPACITY; GUEST_REFUSED with the reason when the job ended without a VM.
    pub async fn execute_job(&self, job: Job) -> Result<VmAssignment, Error> {
        let job_id = self.submit(job, None).await?;
        let job = self.watch(job_id, |job| job.assignment.is_some() || job.state.is_terminal()).await?;
        match (job.assignment, job.vm_id) {
            (Some(VmKind::Ephemeral), Some(vm_id)) => Ok(VmAssignment::Ephemeral(vm_id)),
            (Some(VmKind::Service), Some(vm_id)) => Ok(VmAssignment::Service(vm_id)),
            _ => {
                let message = format!("job {job_id} ended as {} without a VM: {}", job.state, job.reason);
                Err(Error::new(Reason::GuestRefused, message).with("job_id", job_id))
            }
        }
    }

    /// Queues a job for any VM, or for this one. Answers once it is durable.
    ///
    /// # Errors
    /// As [`VmManager::execute_job`] and [`VmManager::submit_job_to_vm`].
    pub async fn submit(&self, job: Job, vm_id: Option<VmId>) -> Result<JobId, Error> {
        let job_id = JobId(job.id);
        self.client.clone().submit_job(job.into_request(vm_id)).await?;
        Ok(job_id)
    }

    /// Waits for a job's end.
    ///
    /// # Errors
    /// JOB_NOT_FOUND; PEER_UNAVAILABLE when the control plane stays away for half a minute.
    pub async fn wait(&self, job_id: JobId) -> Result<JobResult, Error> {
        let job = self.watch(job_id, |job| job.state.is_terminal()).await?;
        Ok(JobResult { job_id, vm_id: job.vm_id, state: job.state, exit: job.exit, reason: job.reason })
    }

    /// Waits for a job's end and returns all of its output. For output that does not fit in memory use
    /// `SchedulerService.StreamJobLogs`.
    ///
    /// # Errors
    /// JOB_NOT_FOUND, LOG_NOT_FOUND, PEER_UNAVAILABLE.
    pub async fn output(&self, job_id: JobId) -> Result<Output, Error> {
        let message = pb::StreamJobLogsRequest { job_id: job_id.to_string(), attempt: 0, offset: 0, follow: true };
        let mut records = self.client.clone().stream_job_logs(message).await?.into_inner();
        let (mut output, mut attempt) = (Output::default(), 0);
        while let Some(response) = records.message().await? {
            if response.attempt > attempt {
                (output, attempt) = (Output::default(), response.attempt);
            }
            if let Some(Record::Chunk(chunk)) = response.record {
                match chunk.stream() {
                    common::LogStream::Stderr => output.stderr.extend_from_slice(&chunk.data),
                    common::LogStream::Stdout | common::LogStream::Unspecified => {
                        output.stdout.extend_from_slice(&chunk.data);
                    }
                }
            }
        }
        Ok(output)
    }

    /// A file that the latest attempt of a job left; name it in [`Job::artifacts`].
    ///
    /// # Errors
    /// JOB_NOT_FOUND, ARTIFACT_NOT_FOUND, PEER_UNAVAILABLE.
    pub async fn artifact(&self, job_id: JobId, path: &str) -> Result<Vec<u8>, Error> {
        let message =
            pb::GetArtifactRequest { job_id: job_id.to_string(), attempt: 0, path: path.to_owned(), offset: 0 };
        let mut parts = self.client.clone().get_artifact(message).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = parts.message().await? {
            bytes.extend_from_slice(&part.data);
        }
        Ok(bytes)
    }

    /// Counts of the moment.
    ///
    /// # Errors
    /// PEER_UNAVAILABLE.
    pub async fn get_stats(&self) -> Result<VmStats, Error> {
        let stats = self.client.clone().get_stats(pb::GetStatsRequest {}).await?.into_inner();
        Ok(VmStats {
            total_vms: stats.total_vms,
            running_vms: stats.running_vms,
            max_vms: stats.max_vms,
            ready_nodes: stats.ready_nodes,
        })
    }

    /// Follows a job until `done`, through restarts of the control plane.
    async fn watch(&self, job_id: JobId, done: impl Fn(&Recorded) -> bool) -> Result<Recorded, Error> {
        let mut failures = 0;
        loop {
            let message = pb::WatchJobRequest { job_id: job_id.to_string() };
            let error = match self.client.clone().watch_job(message).await {
                Ok(changes) => match first(changes.into_inner(), &done).await {
                    Ok(Some(job)) => return Ok(job),
                    Ok(None) => Error::new(Reason::PeerUnavailable, "the stream ended"),
                    Err(error) => error,
                },
                Err(status) => Error::from(status),
            };
            failures += 1;
            if !error.reason.retryable() || failures > RECONNECTS {
                return Err(error);
            }
            tokio::time::sleep(RECONNECT_AFTER).await;
        }
    }
}

async fn first(
    mut changes: Streaming<pb::WatchJobResponse>,
    done: impl Fn(&Recorded) -> bool,
) -> Result<Option<Recorded>, Error> {
    while let Some(change) = changes.message().await.map_err(|status: Status| Error::from(status))? {
        let job = Recorded::try_from(change.job.unwrap_or_default())?;
        if done(&job) {
            return Ok(Some(job));
        }
    }
    Ok(None)
}

impl From<Vm> for VmInstance {
    fn from(vm: Vm) -> Self {
        Self {
            config: VmConfig {
                id: vm.id,
                kind: vm.config.kind,
                image: vm.config.image,
                vcpus: Some(vm.config.vcpus),
                memory_mib: Some(vm.config.memory_mib),
                labels: vm.config.labels,
            },
            state: vm.state,
            node_id: vm.node_id.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_becomes_a_request_and_its_secrets_are_not_printed() {
        let job = Job {
            command: vec!["make".into()],
            retry_on: BTreeSet::from([RetryOn::Failed]),
            max_attempts: 3,
            backoff: Duration::from_secs(1),
            after: vec![JobId(Uuid::from_u128(9))],
            stdin: vec![1, 2],
            secrets: BTreeMap::from([("TOKEN".into(), "hunter22".into())]),
            artifacts: vec!["/out".into()],
            ..Job::default()
        };
        assert!(!format!("{job:?}").contains("hunter22"));
        let request = job.into_request(None);
        let spec = request.spec.expect("a spec");
        assert_eq!((spec.max_attempts, spec.backoff_ms, &spec.retry_on[..]), (3, 1000, &[2][..]));
        assert_eq!((spec.depends_on.len(), spec.artifacts.len()), (1, 1));
        let input = request.input.expect("an input");
        assert_eq!((&input.stdin[..], input.secrets["TOKEN"].as_str()), (&[1, 2][..], "hunter22"));
        assert_eq!(Job::default().into_request(None).input, None, "nothing is given when nothing is");
    }
}
