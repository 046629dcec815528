//! The control plane under test, as processes, and what callers do with it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use blixard::{
    limits,
    pb::{
        common::v1 as common,
        scheduler::v1::{self as pb, scheduler_service_client::SchedulerServiceClient},
    },
};
use blixard_chassis::client;
use tonic::transport::Channel;
use uuid::Uuid;

pub type Scheduler = SchedulerServiceClient<Channel>;

/// A process of ours that serves. It is killed when it is dropped.
pub struct Service {
    pub process: Child,
    pub endpoint: String,
}

impl Service {
    /// Starts it in `directory` and waits for the line of its output that says where it serves, after `marker`.
    pub fn start(command: &mut Command, directory: &Path, marker: &str) -> anyhow::Result<Self> {
        let mut process = command.current_dir(directory).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (stdout, stderr) = (process.stdout.take().context("stdout")?, process.stderr.take().context("stderr")?);
        let (found, address) = std::sync::mpsc::channel();
        for output in [Box::new(stdout) as Box<dyn Read + Send>, Box::new(stderr)] {
            let (found, marker) = (found.clone(), marker.to_owned());
            // To its end: its log must not fill the pipe.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if let Some((_, rest)) = line.split_once(&marker) {
                        let _ = found.send(rest.split_whitespace().next().unwrap_or_default().to_owned());
                    }
                }
            });
        }
        drop(found);
        let Ok(address) = address.recv() else { bail!("{:?} ended early", command.get_program()) };
        let endpoint = if address.starts_with("http") { address } else { format!("http://{address}") };
        Ok(Self { process, endpoint })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A program of ours, beside `mvm-ci`.
fn program(name: &str) -> anyhow::Result<Command> {
    let path = Path::new(env!("CARGO_BIN_EXE_mvm-ci")).with_file_name(name);
    anyhow::ensure!(path.exists(), "{} is missing: scripts/bench.sh builds it", path.display());
    Ok(Command::new(path))
}

/// Removed when it is dropped.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("blixard-bench-{}-{name}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A scheduler that serves, with what it needs.
pub struct ControlPlane {
    pub services: Vec<Service>,
    pub endpoint: String,
    pub scheduler: Scheduler,
    pub directory: Directory,
}

impl ControlPlane {
    /// All in one process.
    pub fn all_in_one(driver: &str) -> anyhow::Result<Self> {
        let directory = Directory::new(driver)?;
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images");
        let mut command = Command::new(env!("CARGO_BIN_EXE_mvm-ci"));
        command.args(["--driver", driver, "--listen", "127.0.0.1:0", "--max-vms", "256", "--image-dir"]).arg(images);
        // Booting is measured, not restoring.
        command.args(["--templates", "0"]);
        let all = Service::start(command.env("RUST_LOG", "info"), &directory.0, "Control plane ready listen=")?;
        Self::new(vec![all], directory)
    }

    /// Registry and scheduler, and no node. The registry is the first of the services.
    pub fn without_nodes() -> anyhow::Result<Self> {
        let directory = Directory::new("plane")?;
        let mut registry = program("registry")?;
        registry.args(["--listen", "127.0.0.1:0"]);
        let registry = Service::start(registry.env("RUST_LOG", "warn"), &directory.0, "registry listening on ")?;
        let mut scheduler = program("scheduler")?;
        scheduler.args(["--listen", "127.0.0.1:0", "--max-vms", "10000", "--registry", &registry.endpoint]);
        let scheduler = Service::start(scheduler.env("RUST_LOG", "info"), &directory.0, "Scheduler ready listen=")?;
        Self::new(vec![registry, scheduler], directory)
    }

    fn new(services: Vec<Service>, directory: Directory) -> anyhow::Result<Self> {
        let endpoint = services.last().context("a service")?.endpoint.clone();
        let scheduler = connect(&endpoint)?;
        Ok(Self { services, endpoint, scheduler, directory })
    }

    /// Service VMs with so much memory, or the default.
    pub async fn service_vms(&self, count: usize, memory_mib: Option<u32>) -> anyhow::Result<Vec<String>> {
        let config = || common::VmConfig { kind: common::VmKind::Service.into(), memory_mib, ..Default::default() };
        let starting = (0..count).map(async |_| start_vm(&mut self.scheduler.clone(), config()).await);
        futures::future::try_join_all(starting).await
    }

    /// Ends every VM: they would outlive the processes.
    pub async fn stop(self) -> anyhow::Result<()> {
        let mut scheduler = self.scheduler.clone();
        for vm in list_vms(&mut scheduler).await? {
            let message = pb::StopVmRequest { vm_id: vm.id, grace_ms: Some(0), reason: String::new() };
            scheduler.stop_vm(message).await?;
        }
        let ended = |vm: &common::Vm| matches!(vm.state(), common::VmState::Terminated | common::VmState::Failed);
        while !list_vms(&mut scheduler).await?.iter().all(ended) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

async fn list_vms(scheduler: &mut Scheduler) -> anyhow::Result<Vec<common::Vm>> {
    let message = pb::ListVmsRequest { page_size: limits::MAX_PAGE_SIZE, ..Default::default() };
    Ok(scheduler.list_vms(message).await?.into_inner().vms)
}

/// A connection of its own.
pub fn connect(endpoint: &str) -> anyhow::Result<Scheduler> {
    let channel = client::channel(endpoint)?;
    Ok(SchedulerServiceClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES))
}

/// Starts a VM and waits until it is Ready; returns its id.
async fn start_vm(scheduler: &mut Scheduler, config: common::VmConfig) -> anyhow::Result<String> {
    let answer = scheduler.start_vm(pb::StartVmRequest { request_id: String::new(), config: Some(config) }).await?;
    let id = answer.into_inner().vm.context("vm")?.id;
    loop {
        let vm = scheduler.get_vm(pb::GetVmRequest { vm_id: id.clone() }).await?.into_inner().vm.context("vm")?;
        match vm.state() {
            common::VmState::Ready => return Ok(id),
            common::VmState::Starting => tokio::time::sleep(Duration::from_millis(2)).await,
            state => bail!("VM {id} is {state:?}: {}", vm.reason),
        }
    }
}

/// A job for a service VM: this one, or any.
pub fn job(command: &[&str], vm_id: &str) -> pb::SubmitJobRequest {
    let spec = common::JobSpec {
        command: command.iter().map(ToString::to_string).collect(),
        isolation: common::Isolation::Minimal.into(),
        target_vm_id: vm_id.to_owned(),
        ..Default::default()
    };
    pb::SubmitJobRequest { request_id: Uuid::new_v4().to_string(), spec: Some(spec), ..Default::default() }
}

pub fn logs_of(job_id: &str) -> pb::StreamJobLogsRequest {
    pb::StreamJobLogsRequest { job_id: job_id.to_owned(), attempt: 0, offset: 0, follow: true }
}

/// Submits a job and waits for its end.
pub async fn run_job(scheduler: &mut Scheduler, request: pb::SubmitJobRequest) -> anyhow::Result<common::Job> {
    let job_id = request.request_id.clone();
    scheduler.submit_job(request).await?;
    let mut changes = scheduler.watch_job(pb::WatchJobRequest { job_id: job_id.clone() }).await?.into_inner();
    let mut last = None;
    while let Some(change) = changes.message().await? {
        last = change.job;
    }
    let last = last.context("a job")?;
    anyhow::ensure!(last.state() == common::JobState::Succeeded, "job {job_id} is {:?}: {}", last.state(), last.reason);
    Ok(last)
}
