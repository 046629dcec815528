//! A registry of one's own, and shorthands for requests.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use blixard::{
    error::Error,
    job::JobState,
    pb::{
        common::v1 as pb,
        registry::v1::{self as wire, registry_service_client::RegistryServiceClient},
    },
    vm::{VmKind, VmState},
};
use blixard_chassis::{Server, Tasks, client};
use blixard_registry::{NodeTiming, Registry, RegistryConfig};
use tonic::transport::Channel;

pub(crate) type Client = RegistryServiceClient<Channel>;

/// A registry in this process, with a directory and a socket of its own.
pub(crate) struct Kit {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) client: Client,
    running: Option<(Registry, Tasks)>,
    config: RegistryConfig,
}

impl Kit {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A registry that is configured otherwise.
    pub(crate) async fn start_with(configure: impl FnOnce(&mut RegistryConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config_of(dir.path().to_owned());
        configure(&mut config);
        let (client, running) = Box::pin(serve(config.clone())).await;
        Self { dir, client, running: Some(running), config }
    }

    pub(crate) async fn hearing_nodes(nodes: NodeTiming) -> Self {
        Self::start_with(|config| config.nodes = nodes).await
    }

    pub(crate) async fn stop(&mut self) {
        let Some((registry, tasks)) = self.running.take() else { return };
        tasks.shutdown(Duration::from_secs(30)).await;
        registry.shutdown().await;
    }

    pub(crate) async fn restart(&mut self) {
        // Shutting down gives the directory back, though the old value is still there.
        let (old, tasks) = self.running.take().unwrap();
        tasks.shutdown(Duration::from_secs(30)).await;
        old.shutdown().await;
        let (client, running) = Box::pin(serve(self.config.clone())).await;
        self.client = client;
        self.running = Some(running);
    }

    /// Ends what serves; open streams end with it.
    pub(crate) async fn stop_serving(&self) {
        if let Some((_, tasks)) = &self.running {
            tasks.shutdown(Duration::from_secs(30)).await;
        }
    }

    /// A VM in this state, brought there along the state table.
    pub(crate) async fn vm_in(&mut self, kind: VmKind, state: VmState) -> String {
        let id = uuid();
        self.client.create_vm(create_vm(&id, kind)).await.unwrap();
        let path: &[VmState] = match state {
            VmState::Starting => &[],
            VmState::Ready => &[VmState::Ready],
            VmState::Busy => &[VmState::Ready, VmState::Busy],
            VmState::Idle if kind == VmKind::Service => &[VmState::Ready, VmState::Busy, VmState::Idle],
            VmState::Idle => panic!("an ephemeral VM is never idle"),
            VmState::Draining => &[VmState::Draining],
            VmState::Terminated => &[VmState::Draining, VmState::Terminated],
            VmState::Failed => &[VmState::Failed],
        };
        for state in path {
            self.client.transition_vm(transition(&id, *state)).await.unwrap();
        }
        id
    }

    /// A job, Queued, that may start this often.
    pub(crate) async fn queued_job(&mut self, max_attempts: u32) -> String {
        let id = uuid();
        let spec = pb::JobSpec { max_attempts, ..spec() };
        self.client
            .create_job(wire::CreateJobRequest { job_id: id.clone(), spec: Some(spec), ..Default::default() })
            .await
            .unwrap();
        id
    }

    /// A job in its first attempt, and its VM.
    pub(crate) async fn assigned_job(&mut self, kind: VmKind, max_attempts: u32) -> (String, String) {
        let (job, vm) = (self.queued_job(max_attempts).await, self.vm_in(kind, VmState::Ready).await);
        self.client.assign_job(assign(&job, &vm, 1)).await.unwrap();
        (job, vm)
    }

    pub(crate) async fn vm(&mut self, id: &str) -> pb::Vm {
        self.client.get_vm(wire::GetVmRequest { vm_id: id.into() }).await.unwrap().into_inner().vm.unwrap()
    }

    pub(crate) async fn job(&mut self, id: &str) -> pb::Job {
        self.client.get_job(wire::GetJobRequest { job_id: id.into() }).await.unwrap().into_inner().job.unwrap()
    }
}

/// A registry that is alone, on this directory.
pub(crate) fn config_of(dir: std::path::PathBuf) -> RegistryConfig {
    RegistryConfig { query_worker: env!("CARGO_BIN_EXE_registry").into(), ..RegistryConfig::alone(dir) }
}

/// Serves a registry.
pub(crate) async fn serve(config: RegistryConfig) -> (Client, (Registry, Tasks)) {
    let tasks = Tasks::new();
    let registry = Registry::start(config, &tasks).await.unwrap();
    let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let endpoint = server.local_endpoint();
    let server = server.add_service(registry.service());
    let serving = tasks.clone();
    tasks.spawn("server", async move { server.serve(&serving).await.unwrap() });
    (connect(&endpoint), (registry, tasks))
}

pub(crate) fn connect(endpoint: &str) -> Client {
    RegistryServiceClient::new(client::channel(endpoint).unwrap()).max_decoding_message_size(4 << 20)
}

pub(crate) fn uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}

pub(crate) fn config(kind: VmKind) -> pb::VmConfig {
    pb::VmConfig {
        kind: kind.to_pb().into(),
        image: "default".into(),
        vcpus: Some(2),
        memory_mib: Some(512),
        labels: BTreeMap::new(),
        node_id: String::new(),
        egress: None,
        volumes: vec![],
    }
}

pub(crate) fn create_vm(id: &str, kind: VmKind) -> wire::CreateVmRequest {
    wire::CreateVmRequest {
        vm_id: id.into(),
        config: Some(config(kind)),
        node_id: "node-1".into(),
        ..Default::default()
    }
}

pub(crate) fn transition(id: &str, to: VmState) -> wire::TransitionVmRequest {
    wire::TransitionVmRequest { vm_id: id.into(), to_state: to.to_pb().into(), ..Default::default() }
}

pub(crate) fn resize(id: &str, vcpus: u32, memory_mib: u32) -> wire::ResizeVmRequest {
    wire::ResizeVmRequest { vm_id: id.into(), vcpus, memory_mib, ..Default::default() }
}

pub(crate) fn spec() -> pb::JobSpec {
    pb::JobSpec {
        command: vec!["echo".into(), "hello".into()],
        working_dir: "/".into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        isolation: pb::Isolation::Standard.into(),
        max_attempts: 1,
        ..Default::default()
    }
}

pub(crate) fn create_job(id: &str) -> wire::CreateJobRequest {
    wire::CreateJobRequest { job_id: id.into(), spec: Some(spec()), ..Default::default() }
}

pub(crate) fn assign(job: &str, vm: &str, attempt: u32) -> wire::AssignJobRequest {
    wire::AssignJobRequest { job_id: job.into(), vm_id: vm.into(), attempt, ..Default::default() }
}

pub(crate) fn start_attempt(job: &str, attempt: u32) -> wire::StartAttemptRequest {
    wire::StartAttemptRequest { job_id: job.into(), attempt, started_at: None, ..Default::default() }
}

pub(crate) fn finished(job: &str, attempt: u32, state: JobState) -> wire::FinishAttemptRequest {
    let result = wire::AttemptResult {
        state: state.to_pb().into(),
        exit: Some(pb::ExitStatus { exit_code: Some(i32::from(state != JobState::Succeeded)), ..Default::default() }),
        log_bytes: 6,
        ..Default::default()
    };
    let outcome = Some(wire::finish_attempt_request::Outcome::Result(result));
    wire::FinishAttemptRequest { job_id: job.into(), attempt, outcome, ..Default::default() }
}

pub(crate) fn lost(job: &str, attempt: u32, started: bool) -> wire::FinishAttemptRequest {
    let lost = wire::AttemptLost { started, reason: "its VM is gone".into(), lost_node: None };
    let outcome = Some(wire::finish_attempt_request::Outcome::Lost(lost));
    wire::FinishAttemptRequest { job_id: job.into(), attempt, outcome, ..Default::default() }
}

/// The reason of a refusal, by name.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, tonic::Status>) -> &'static str {
    Error::from_status(&result.unwrap_err()).reason.name()
}

pub(crate) fn vm_state(vm: &pb::Vm) -> VmState {
    VmState::from_pb("state", vm.state).unwrap()
}

pub(crate) fn job_state(job: &pb::Job) -> JobState {
    JobState::from_pb("state", job.state).unwrap()
}
