//! A world for one vmhost: a registry in memory, directories, and the steps that the scheduler would take.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of this module")]

pub mod agent;
pub mod fake_guest;
pub mod fake_registry;
pub mod faulty;
pub mod frames;
pub mod passing;

use std::{
    collections::BTreeMap,
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

pub use agent::agent;
use blixard::{
    config::{Config, DriverChoice, NetworkConfig},
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    pb::{
        common::v1 as common,
        vmhost::v1::{self as pb, stream_logs_response::Record, vm_host_service_client::VmHostServiceClient},
    },
    vm::VmState,
};
use blixard_chassis::{SecretKey, Server, Tasks, client};
use blixard_vmhost::{
    HealthConfig, LogLimits, Pace, StartError, VmHost, VmHostConfig,
    hypervisor::{DiskLimit, Hypervisor, HypervisorSettings, choose},
    pressure::HostWatch,
};
use fake_registry::FakeRegistry;
use tonic::transport::Channel;

/// For anything that takes milliseconds on an idle machine.
pub const SOON: Duration = Duration::from_secs(60);
pub const NODE: &str = "node-1";

pub struct World {
    pub registry: FakeRegistry,
    pub registry_endpoint: String,
    pub dir: tempfile::TempDir,
    pub tasks: Tasks,
    pub agent: Vec<std::ffi::OsString>,
    pub max_vms: u32,
    pub templates: u32,
    pub secret_key: Option<SecretKey>,
    pub network: NetworkConfig,
    pub volumes: BTreeMap<String, String>,
    pub health: HealthConfig,
    pub logs: LogLimits,
    pub watch: Option<HostWatch>,
    pub pace: Pace,
}

/// A running vmhost, with a runtime of its own so that it can be dropped in the middle of anything.
pub struct Node {
    runtime: Option<tokio::runtime::Runtime>,
    tasks: Tasks,
    pub client: VmHostServiceClient<Channel>,
}

impl World {
    pub async fn new() -> Self {
        let (registry, tasks) = (FakeRegistry::default(), Tasks::new());
        let registry_endpoint = registry.serve(&tasks).await;
        let dir = tempfile::tempdir().expect("tempdir");
        Self {
            registry,
            registry_endpoint,
            dir,
            tasks,
            agent: vec![agent().into()],
            max_vms: 10,
            templates: 0,
            secret_key: SecretKey::from_bytes(&[7; 32]),
            network: Config::default().network,
            volumes: BTreeMap::new(),
            health: HealthConfig { check_every: None, recycle_below_memory_percent: 0 },
            logs: LogLimits::from(&Config::default().retention),
            // Whatever else runs on this machine: it has room.
            watch: Some(HostWatch::new(Default::default)),
            pace: Pace::default(),
        }
    }

    pub fn vm_state_dir(&self) -> PathBuf {
        self.dir.path().join("vm-state")
    }

    pub fn log_dir(&self) -> PathBuf {
        self.dir.path().join("data/logs")
    }

    pub fn settings(&self) -> HypervisorSettings {
        HypervisorSettings { image_dir: "images".into(), agent_command: self.agent.clone(), vm_uids: None }
    }

    pub fn config(&self, advertise_endpoint: String) -> VmHostConfig {
        VmHostConfig {
            node_id: NodeId::parse("node", NODE).expect("a name"),
            vm_state_dir: self.vm_state_dir(),
            log_dir: self.log_dir(),
            driver: DriverChoice::Process,
            image_dir: "images".into(),
            vm_uids: Config::default().firecracker.vm_uids,
            disk_limit: DiskLimit::default(),
            agent_command: self.agent.clone(),
            max_vms: self.max_vms,
            templates: self.templates,
            registry_endpoint: self.registry_endpoint.clone(),
            advertise_endpoint,
            secret_key: self.secret_key.clone(),
            node_labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
            volumes: self.volumes.clone(),
            network: self.network.clone(),
            health: self.health,
            logs: self.logs,
            watch: self.watch.clone(),
            pace: self.pace,
        }
    }

    /// Starts a vmhost with the process driver.
    pub async fn node(&self) -> Node {
        self.node_with(choose(DriverChoice::Process, &self.settings()).expect("an agent").0).await
    }

    pub async fn node_with(&self, hypervisor: Arc<dyn Hypervisor>) -> Node {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let tasks = Tasks::new();
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0)));
        let (config, owned) = (|endpoint| self.config(endpoint), tasks.clone());
        let guard = runtime.handle().clone();
        let server = in_runtime(&guard, server).await.expect("a free port");
        let endpoint = server.local_endpoint();
        let config = config(endpoint.clone());
        let starting = async move {
            let since = Instant::now();
            loop {
                match VmHost::start_with(config.clone(), Arc::clone(&hypervisor), &owned).await {
                    // A crash in this process leaves the lock for a moment with whatever another test is just forking.
                    Err(StartError::StateDir(_)) if since.elapsed() < SOON => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    result => break result,
                }
            }
        };
        let vmhost = in_runtime(&guard, starting).await.expect("it starts");
        let serving = tasks.clone();
        let server = server.add_service(vmhost.service());
        runtime.spawn(async move { server.serve(&serving).await.expect("it serves") });
        let client = VmHostServiceClient::new(client::channel(&endpoint).expect("an endpoint"));
        Node { runtime: Some(runtime), tasks, client }
    }

    /// Records a VM as the scheduler would, and has it started.
    pub async fn start_vm(&self, node: &Node, kind: common::VmKind) -> VmId {
        let id = VmId::random();
        self.record_vm(id, kind, VmState::Starting);
        let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(vm_config(kind)) };
        node.client.clone().start_vm(request).await.expect("accepted");
        self.wait_vm(id, VmState::Ready).await;
        id
    }

    pub fn record_vm(&self, id: VmId, kind: common::VmKind, state: VmState) {
        let vm = common::Vm {
            id: id.to_string(),
            config: Some(vm_config(kind)),
            state: state.to_pb().into(),
            node_id: NODE.to_owned(),
            generation: 1,
            ..Default::default()
        };
        self.registry.state().vms.insert(id.to_string(), vm);
    }

    /// Records an attempt as the scheduler would: the job is Assigned and the VM Busy.
    pub fn assign(&self, vm: VmId, job: JobId, attempt: u32, spec: &common::JobSpec) {
        let mut state = self.registry.state();
        let recorded = common::Job {
            id: job.to_string(),
            spec: Some(spec.clone()),
            state: common::JobState::Assigned.into(),
            attempt,
            vm_id: vm.to_string(),
            node_id: NODE.to_owned(),
            ..Default::default()
        };
        state.jobs.insert(job.to_string(), recorded);
        state.move_vm(&vm.to_string(), VmState::Busy, "").expect("the VM takes jobs");
        state.vm(&vm.to_string()).expect("it is there").job_id = job.to_string();
    }

    /// Assigns a new job and has it run.
    pub async fn run(&self, node: &Node, vm: VmId, spec: common::JobSpec) -> JobId {
        let job = JobId::random();
        self.assign(vm, job, 1, &spec);
        node.run_job(vm, job, 1, spec).await.expect("accepted");
        job
    }

    pub async fn wait_vm(&self, id: VmId, state: VmState) -> common::Vm {
        wait_for(&format!("VM to become {state}"), || {
            let vm = self.registry.state().vms.get(&id.to_string()).cloned().ok_or("no such VM")?;
            if vm.state() == state.to_pb() { Ok(vm) } else { Err(format!("{:?}: {}", vm.state(), vm.reason)) }
        })
        .await
    }

    /// Waits until the job has ended or is back in the queue.
    pub async fn wait_job(&self, id: JobId) -> common::Job {
        self.wait_job_until(id, |job| !matches!(job.state(), common::JobState::Assigned | common::JobState::Running))
            .await
    }

    pub async fn wait_job_until(&self, id: JobId, done: impl Fn(&common::Job) -> bool) -> common::Job {
        wait_for("the job", || {
            let job = self.registry.state().jobs.get(&id.to_string()).cloned().ok_or("no such job")?;
            if done(&job) { Ok(job) } else { Err(format!("{:?}", job.state())) }
        })
        .await
    }

    pub fn history(&self) -> Vec<String> {
        self.registry.state().history.clone()
    }

    pub fn set_down(&self, down: bool) {
        self.registry.state().down = down;
    }

    /// No directory and no process of a VM is left. (Templates may stay.)
    pub async fn assert_nothing_left(&self) {
        const KEPT: [&str; 3] = [".lock", ".templates", "volumes"];
        wait_for("everything to be given back", || {
            let entries = fs::read_dir(self.vm_state_dir()).map_err(|error| error.to_string())?.flatten();
            let dirs: Vec<_> =
                entries.map(|entry| entry.file_name()).filter(|name| !KEPT.iter().any(|kept| name == kept)).collect();
            let pids = self.processes();
            if dirs.is_empty() && pids.is_empty() { Ok(()) } else { Err(format!("{dirs:?} {pids:?}")) }
        })
        .await;
    }

    /// Processes whose environment names this world's directory.
    pub fn processes(&self) -> Vec<u32> {
        processes_with(self.vm_state_dir().into_os_string().into_encoded_bytes())
    }

    /// Those of a job.
    pub fn processes_of(&self, job: JobId) -> Vec<u32> {
        processes_with(format!("BLIXARD_JOB_ID={job}").into_bytes())
    }

    pub async fn wait_no_process_of(&self, job: JobId) {
        wait_for("the job's processes to be gone", || {
            let left = self.processes_of(job);
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }
}

pub fn processes_with(mark: Vec<u8>) -> Vec<u32> {
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.windows(mark.len()).any(|window| window == mark)
        })
        .collect()
}

impl Drop for World {
    /// A failed test leaves no process behind either.
    fn drop(&mut self) {
        for pid in self.processes() {
            kill(pid);
        }
        self.tasks.token().cancel();
    }
}

impl Node {
    /// One that runs elsewhere.
    pub fn remote(client: VmHostServiceClient<Channel>) -> Self {
        Self { runtime: None, tasks: Tasks::new(), client }
    }

    /// Asks again while the node has no lease yet, as the scheduler does.
    pub async fn run_job(&self, vm: VmId, job: JobId, attempt: u32, spec: common::JobSpec) -> Result<(), Error> {
        let since = Instant::now();
        loop {
            match self.try_run_job(vm, job, attempt, spec.clone()).await {
                Err(error) if error.reason == Reason::PeerUnavailable && since.elapsed() < SOON => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                answer => return answer,
            }
        }
    }

    pub async fn try_run_job(&self, vm: VmId, job: JobId, attempt: u32, spec: common::JobSpec) -> Result<(), Error> {
        let request = pb::RunJobRequest {
            vm_id: vm.to_string(),
            job_id: job.to_string(),
            attempt,
            spec: Some(spec),
            incarnation: 0,
        };
        self.client.clone().run_job(request).await.map(drop).map_err(Error::from)
    }

    pub async fn stop_vm(&self, vm: VmId, grace_ms: Option<u64>) -> Result<(), Error> {
        let request = pb::StopVmRequest { vm_id: vm.to_string(), grace_ms, reason: "no longer needed".to_owned() };
        self.client.clone().stop_vm(request).await.map(drop).map_err(Error::from)
    }

    pub async fn cancel(&self, job: JobId, attempt: u32) -> Result<(), Error> {
        let request = pb::CancelJobRequest { job_id: job.to_string(), attempt };
        self.client.clone().cancel_job(request).await.map(drop).map_err(Error::from)
    }

    /// What the node finds to be not as it is on record.
    pub async fn differences(&self) -> Vec<common::Violation> {
        let request = pb::CheckInvariantsRequest { repair: false };
        self.client.clone().check_invariants(request).await.expect("it looks").into_inner().violations
    }

    pub async fn hosted(&self) -> Vec<pb::HostedVm> {
        self.client.clone().list_vms(pb::ListVmsRequest::default()).await.expect("listed").into_inner().vms
    }

    /// Follows a log to its end.
    pub async fn usage(&self, vm: VmId) -> Result<common::VmUsage, Error> {
        let answer = self.client.clone().get_vm_usage(pb::GetVmUsageRequest { vm_id: vm.to_string() }).await;
        Ok(answer?.into_inner().usage.expect("an answer has one"))
    }

    pub async fn follow(&self, job: JobId, offset: u64) -> Log {
        let mut log = Log::default();
        log.read(self, job, offset, u64::MAX).await.expect("the log is readable");
        log
    }

    /// Drops everything in the middle of whatever it is: what kill -9 does.
    pub async fn crash(mut self) {
        let runtime = self.runtime.take().expect("once");
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(SOON)).await.expect("dropped");
    }

    /// Ends it as SIGTERM does.
    pub async fn shut_down(self) {
        assert!(self.tasks.shutdown(SOON).await, "its tasks end");
        self.crash().await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What a follower of a log got.
#[derive(Default)]
pub struct Log {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub bytes: u64,
    pub end: Option<common::LogEnd>,
}

impl Log {
    /// Reads on from `offset`, until the end or about `limit` bytes.
    pub async fn read(&mut self, node: &Node, job: JobId, offset: u64, limit: u64) -> Result<(), Error> {
        let request = pb::StreamLogsRequest { job_id: job.to_string(), attempt: 1, offset, follow: true };
        let mut stream = node.client.clone().stream_logs(request).await?.into_inner();
        let mut next = offset;
        while let Some(response) = stream.message().await? {
            match response.record.expect("a record") {
                Record::Chunk(chunk) => {
                    assert_eq!(chunk.offset, next, "nothing is missing or twice");
                    next += chunk.data.len() as u64;
                    self.bytes += chunk.data.len() as u64;
                    match chunk.stream() {
                        common::LogStream::Stderr => self.stderr.extend(&chunk.data),
                        _ => self.stdout.extend(&chunk.data),
                    }
                    if self.bytes >= limit {
                        return Ok(());
                    }
                }
                Record::Gap(gap) => panic!("a gap: {gap:?}"),
                Record::End(end) => {
                    assert_eq!(end.end_offset, next);
                    self.end = Some(end);
                }
                Record::Heartbeat(_) => {}
            }
        }
        Ok(())
    }
}

async fn in_runtime<T: Send + 'static>(
    runtime: &tokio::runtime::Handle,
    future: impl Future<Output = T> + Send + 'static,
) -> T {
    runtime.spawn(future).await.expect("it does not panic")
}

pub fn vm_config(kind: common::VmKind) -> common::VmConfig {
    common::VmConfig {
        kind: kind.into(),
        image: "default".to_owned(),
        vcpus: Some(1),
        memory_mib: Some(128),
        labels: BTreeMap::new(),
        node_id: String::new(),
        egress: None,
        volumes: vec![],
    }
}

pub fn command(command: &[&str]) -> common::JobSpec {
    common::JobSpec {
        command: command.iter().map(|&argument| argument.to_owned()).collect(),
        vcpus: Some(1),
        memory_mib: Some(128),
        ..Default::default()
    }
}

pub fn shell(script: &str) -> common::JobSpec {
    command(&["sh", "-c", script])
}

/// Polls a condition until it holds; prints what it last saw when it does not in time.
pub async fn wait_for<T, E: std::fmt::Display>(what: &str, mut condition: impl FnMut() -> Result<T, E>) -> T {
    let since = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) => assert!(since.elapsed() < SOON, "waited {SOON:?} for {what}; last: {last}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not 0");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// QEMU, if it can boot a guest here.
pub fn qemu() -> Option<Arc<dyn Hypervisor>> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two deep");
    let image_dir = env::var_os("BLIXARD_IMAGE_DIR").map_or_else(|| project.join("images"), Into::into);
    let chosen =
        choose(DriverChoice::Qemu, &HypervisorSettings { image_dir, agent_command: Vec::new(), vm_uids: None });
    let missing = match chosen {
        Ok((driver, _)) if driver.images().iter().any(|image| image == "default") => return Some(driver),
        Ok((_, why)) => why,
        Err(error) => error.to_string(),
    };
    let required = env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(!required, "BLIXARD_REQUIRE_QEMU=1, but {missing}");
    eprintln!("SKIPPED: no guest is booted under QEMU: {missing}");
    None
}
