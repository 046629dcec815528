//! What the house costs, beside what the same work costs without it, alternated in one run.
//!
//! ```text
//! cargo bench -p mvm-ci --bench end_to_end [-- latency|jobs|logs|boot]
//! ```
//! Prints a table and writes `target/bench/end_to_end.json`: {metric: {ours, baseline, ratio}}. A real `mvm-ci` process is measured
//! over loopback, on the `process` driver; `boot` needs QEMU and ./images (`make guest-image`).
//!
//! - latency: submit → first log byte on a warm service VM, beside F = 3 unary calls + 1 fdatasync + 1 spawn.
//! - jobs: submit → finished, 8 service VMs, beside bare fork/exec of the same program at 8 at a time.
//! - logs: a finished log of 256 MiB read through the scheduler and from vmhost, beside a bare tonic stream of as many bytes
//!   in chunks of the same size.
//! - boot: StartVm → Ready, beside the same commands started by hand until the same agent answers.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use blixard::{
    limits,
    pb::{
        common::v1::{self as common, LogChunk},
        scheduler::v1::{
            self as pb, scheduler_service_client::SchedulerServiceClient, stream_job_logs_response::Record,
        },
        vmhost::v1::{
            self as vmhost, stream_logs_response,
            vm_host_service_client::VmHostServiceClient,
            vm_host_service_server::{VmHostService, VmHostServiceServer},
        },
    },
};
use blixard_chassis::{Server, Tasks, client};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::try_join_all, stream};
use tonic::{Request, Response, Status, transport::Channel};
use uuid::Uuid;

const SERVICE_VMS: usize = 8;
const LOG_BYTES: u64 = 256 * 1024 * 1024;

type Scheduler = SchedulerServiceClient<Channel>;
type Table = BTreeMap<String, Row>;

struct Row {
    unit: &'static str,
    ours: f64,
    baseline: f64,
}

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let runs = |name: &str| wanted.is_empty() || wanted.iter().any(|other| other == name);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut table = Table::new();
    runtime.block_on(async {
        if runs("latency") || runs("jobs") || runs("logs") {
            let plane = ControlPlane::start("process").await?;
            let vms = plane.service_vms(SERVICE_VMS).await?;
            let bare = Bare::start().await?;
            if runs("latency") {
                latency(&plane, &vms[0], &bare, &mut table).await?;
            }
            if runs("jobs") {
                jobs(&plane, &mut table).await?;
            }
            if runs("logs") {
                logs(&plane, &bare, &mut table).await?;
            }
            plane.stop().await?;
        }
        if runs("boot") {
            boot(&mut table).await?;
        }
        anyhow::Ok(())
    })?;
    print(&table)
}

fn print(table: &Table) -> anyhow::Result<()> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
    fs::create_dir_all(&target)?;
    let mut json = serde_json::Map::new();
    println!("{:<44} {:>12} {:>12} {:>8}  unit", "metric", "ours", "baseline", "ratio");
    for (metric, row) in table {
        let ratio = row.ours / row.baseline;
        println!("{metric:<44} {:>12.2} {:>12.2} {ratio:>8.2}  {}", row.ours, row.baseline, row.unit);
        let value = serde_json::json!({"unit": row.unit, "ours": row.ours, "baseline": row.baseline, "ratio": ratio});
        json.insert(metric.clone(), value);
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("(load average afterwards: {})", load.trim());
    fs::write(target.join("end_to_end.json"), serde_json::to_string_pretty(&json)?)?;
    Ok(())
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * percent / 100]
}

// --- the control plane under test -----------------------------------------------------------------------------------

struct ControlPlane {
    process: Child,
    endpoint: String,
    scheduler: Scheduler,
    directory: PathBuf,
}

impl ControlPlane {
    async fn start(driver: &str) -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("blixard-bench-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images");
        let mut process = Command::new(env!("CARGO_BIN_EXE_mvm-ci"))
            .args(["--driver", driver, "--listen", "127.0.0.1:0", "--max-vms", "64", "--image-dir"])
            .arg(images)
            .env("RUST_LOG", "info")
            .current_dir(&directory)
            .stderr(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(process.stderr.take().context("stderr")?).lines();
        let address = loop {
            let Some(line) = lines.next() else { bail!("mvm-ci ended early") };
            if let Some((_, rest)) = line?.split_once("Control plane ready listen=") {
                break rest.split_whitespace().next().unwrap_or_default().to_owned();
            }
        };
        // Its log must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let endpoint = format!("http://{address}");
        let scheduler = SchedulerServiceClient::new(client::channel(&endpoint)?)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        Ok(Self { process, endpoint, scheduler, directory })
    }

    async fn service_vms(&self, count: usize) -> anyhow::Result<Vec<String>> {
        let mut ids = Vec::new();
        for _ in 0..count {
            ids.push(start_vm(&mut self.scheduler.clone(), common::VmKind::Service).await?.0);
        }
        Ok(ids)
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        let mut scheduler = self.scheduler.clone();
        for vm in scheduler.list_vms(pb::ListVmsRequest::default()).await?.into_inner().vms {
            let message = pb::StopVmRequest { vm_id: vm.id, grace_ms: Some(0), reason: String::new() };
            scheduler.stop_vm(message).await?;
        }
        while scheduler
            .list_vms(pb::ListVmsRequest::default())
            .await?
            .into_inner()
            .vms
            .iter()
            .any(|vm| !matches!(vm.state(), common::VmState::Terminated | common::VmState::Failed))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.process.kill()?;
        self.process.wait()?;
        fs::remove_dir_all(&self.directory)?;
        Ok(())
    }
}

/// Starts a VM and waits until it is Ready; returns its id and how long that took.
async fn start_vm(scheduler: &mut Scheduler, kind: common::VmKind) -> anyhow::Result<(String, Duration)> {
    let config = common::VmConfig { kind: kind.into(), ..Default::default() };
    let began = Instant::now();
    let answer = scheduler.start_vm(pb::StartVmRequest { request_id: String::new(), config: Some(config) }).await?;
    let id = answer.into_inner().vm.context("vm")?.id;
    loop {
        let vm = scheduler.get_vm(pb::GetVmRequest { vm_id: id.clone() }).await?.into_inner().vm.context("vm")?;
        match vm.state() {
            common::VmState::Ready => return Ok((id, began.elapsed())),
            common::VmState::Starting => tokio::time::sleep(Duration::from_millis(2)).await,
            state => bail!("VM {id} is {state:?}: {}", vm.reason),
        }
    }
}

fn job(command: &[&str], vm_id: &str) -> pb::SubmitJobRequest {
    let spec = common::JobSpec {
        command: command.iter().map(ToString::to_string).collect(),
        isolation: common::Isolation::Minimal.into(),
        target_vm_id: vm_id.to_owned(),
        ..Default::default()
    };
    pb::SubmitJobRequest { request_id: Uuid::new_v4().to_string(), spec: Some(spec), input: None }
}

fn logs_of(job_id: &str) -> pb::StreamJobLogsRequest {
    pb::StreamJobLogsRequest { job_id: job_id.to_owned(), attempt: 0, offset: 0, follow: true }
}

/// Submits a job and waits for its end.
async fn run_job(scheduler: &mut Scheduler, request: pb::SubmitJobRequest) -> anyhow::Result<common::Job> {
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

// --- the baselines --------------------------------------------------------------------------------------------------

/// A tonic server that does nothing but answer, in a process of its own would be fairer to nobody: it shares ours, as the
/// client does in both measurements.
struct Bare {
    client: VmHostServiceClient<Channel>,
    tasks: Tasks,
}

#[derive(Clone)]
struct Nothing;

type Records = Pin<Box<dyn Stream<Item = Result<vmhost::StreamLogsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl VmHostService for Nothing {
    async fn start_vm(&self, _: Request<vmhost::StartVmRequest>) -> Result<Response<vmhost::StartVmResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stop_vm(&self, _: Request<vmhost::StopVmRequest>) -> Result<Response<vmhost::StopVmResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn run_job(&self, _: Request<vmhost::RunJobRequest>) -> Result<Response<vmhost::RunJobResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn cancel_job(
        &self,
        _: Request<vmhost::CancelJobRequest>,
    ) -> Result<Response<vmhost::CancelJobResponse>, Status> {
        Ok(Response::new(vmhost::CancelJobResponse {}))
    }
    async fn list_vms(&self, _: Request<vmhost::ListVmsRequest>) -> Result<Response<vmhost::ListVmsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    type StreamLogsStream = Records;
    async fn list_artifacts(
        &self,
        _: Request<vmhost::ListArtifactsRequest>,
    ) -> Result<Response<vmhost::ListArtifactsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    type GetArtifactStream = futures::stream::Empty<Result<vmhost::GetArtifactResponse, Status>>;
    async fn get_artifact(
        &self,
        _: Request<vmhost::GetArtifactRequest>,
    ) -> Result<Response<Self::GetArtifactStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn stream_logs(&self, _: Request<vmhost::StreamLogsRequest>) -> Result<Response<Records>, Status> {
        let data = Bytes::from(vec![0; limits::MAX_LOG_CHUNK]);
        let chunks = LOG_BYTES / limits::MAX_LOG_CHUNK as u64;
        let records = (0..chunks).map(move |number| {
            let offset = number * limits::MAX_LOG_CHUNK as u64;
            let chunk = LogChunk { stream: 1, offset, time: None, data: data.clone() };
            Ok(vmhost::StreamLogsResponse { attempt: 1, record: Some(stream_logs_response::Record::Chunk(chunk)) })
        });
        Ok(Response::new(Box::pin(stream::iter(records))))
    }
    async fn get_console(
        &self,
        _: Request<vmhost::GetConsoleRequest>,
    ) -> Result<Response<vmhost::GetConsoleResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl Bare {
    async fn start() -> anyhow::Result<Self> {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let client = VmHostServiceClient::new(client::channel(&server.local_endpoint())?);
        let (tasks, server) = (Tasks::new(), server.add_service(VmHostServiceServer::new(Nothing)));
        let serving = tasks.clone();
        tasks.spawn("bare", async move { drop(server.serve(&serving).await) });
        Ok(Self { client, tasks })
    }

    async fn echo(&self) -> anyhow::Result<()> {
        let message = vmhost::CancelJobRequest { job_id: Uuid::nil().to_string(), attempt: 1 };
        self.client.clone().cancel_job(message).await?;
        Ok(())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

async fn fork_exec() -> anyhow::Result<()> {
    let status = tokio::process::Command::new("/bin/true").stdin(Stdio::null()).stdout(Stdio::null()).status().await?;
    anyhow::ensure!(status.success());
    Ok(())
}

// --- the measurements -----------------------------------------------------------------------------------------------

async fn latency(plane: &ControlPlane, vm_id: &str, bare: &Bare, table: &mut Table) -> anyhow::Result<()> {
    let mut file = fs::File::create(plane.directory.join("fsync"))?;
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for round in 0..320 {
        let began = Instant::now();
        for _ in 0..3 {
            bare.echo().await?;
        }
        file.write_all(&[0; 512])?;
        file.sync_data()?;
        fork_exec().await?;
        let floor_ms = began.elapsed().as_secs_f64() * 1e3;

        let request = job(&["echo", "x"], vm_id);
        let (mut scheduler, job_id) = (plane.scheduler.clone(), request.request_id.clone());
        let began = Instant::now();
        scheduler.submit_job(request).await?;
        let mut records = scheduler.stream_job_logs(logs_of(&job_id)).await?.into_inner();
        let mut first_ms = None;
        while let Some(record) = records.message().await? {
            if matches!(record.record, Some(Record::Chunk(_))) {
                first_ms.get_or_insert(began.elapsed().as_secs_f64() * 1e3);
            }
        }
        // The first rounds warm caches and connections.
        if round >= 20 {
            ours.push(first_ms.context("no output")?);
            floor.push(floor_ms);
        }
    }
    for percent in [50, 99] {
        let (ours, baseline) = (percentile(&mut ours, percent), percentile(&mut floor, percent));
        let metric = format!("latency: submit to first log byte, p{percent} (F)");
        table.insert(metric, Row { unit: "ms", ours, baseline });
    }
    Ok(())
}

async fn jobs(plane: &ControlPlane, table: &mut Table) -> anyhow::Result<()> {
    for callers in [1, 8, 64] {
        let (mut ours, mut baseline) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let each = 400 / callers;
            let began = Instant::now();
            try_join_all((0..8).map(|_| async {
                for _ in 0..100 {
                    fork_exec().await?
                }
                anyhow::Ok(())
            }))
            .await?;
            baseline.push(800.0 / began.elapsed().as_secs_f64());

            let began = Instant::now();
            let caller = || async {
                for _ in 0..each {
                    run_job(&mut plane.scheduler.clone(), job(&["/bin/true"], "")).await?;
                }
                anyhow::Ok(())
            };
            try_join_all((0..callers).map(|_| caller())).await?;
            ours.push((each * callers) as f64 / began.elapsed().as_secs_f64());
        }
        let row = Row { unit: "jobs/s", ours: percentile(&mut ours, 50), baseline: percentile(&mut baseline, 50) };
        table.insert(format!("jobs: {callers:>2} callers (fork/exec, 8 at a time)"), row);
    }
    Ok(())
}

async fn logs(plane: &ControlPlane, bare: &Bare, table: &mut Table) -> anyhow::Result<()> {
    let command = format!("head -c {LOG_BYTES} /dev/zero");
    let job = run_job(&mut plane.scheduler.clone(), job(&["sh", "-c", &command], "")).await?;
    let vmhost = VmHostServiceClient::new(client::channel(&plane.endpoint)?);
    let wanted = |job_id: &str, attempt| vmhost::StreamLogsRequest {
        job_id: job_id.to_owned(),
        attempt,
        offset: 0,
        follow: true,
    };
    for followers in [1usize, 16] {
        let (mut through, mut direct, mut floor) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..3 {
            floor.push(rate(followers, || read_vmhost(bare.client.clone(), wanted("", 1))).await?);
            direct.push(rate(followers, || read_vmhost(vmhost.clone(), wanted(&job.id, job.attempt))).await?);
            through.push(rate(followers, || read_scheduler(plane.scheduler.clone(), logs_of(&job.id))).await?);
        }
        let baseline = percentile(&mut floor, 50);
        for (name, values) in [("vmhost", &mut direct), ("scheduler", &mut through)] {
            let row = Row { unit: "MiB/s", ours: percentile(values, 50), baseline };
            table.insert(format!("logs: {followers:>2} followers, from {name} (bare stream)"), row);
        }
    }
    Ok(())
}

/// MiB per second of all readers together.
async fn rate<F: Future<Output = anyhow::Result<u64>>>(readers: usize, read: impl Fn() -> F) -> anyhow::Result<f64> {
    let began = Instant::now();
    let bytes = try_join_all((0..readers).map(|_| read())).await?;
    anyhow::ensure!(bytes.iter().all(|&bytes| bytes == LOG_BYTES), "incomplete: {bytes:?}");
    Ok((LOG_BYTES * readers as u64) as f64 / 1048576.0 / began.elapsed().as_secs_f64())
}

async fn read_vmhost(
    mut client: VmHostServiceClient<Channel>,
    wanted: vmhost::StreamLogsRequest,
) -> anyhow::Result<u64> {
    let mut records = client.stream_logs(wanted).await?.into_inner();
    let mut bytes = 0;
    while let Some(record) = records.next().await {
        if let Some(stream_logs_response::Record::Chunk(chunk)) = record?.record {
            bytes += chunk.data.len() as u64;
        }
    }
    Ok(bytes)
}

async fn read_scheduler(mut client: Scheduler, wanted: pb::StreamJobLogsRequest) -> anyhow::Result<u64> {
    let mut records = client.stream_job_logs(wanted).await?.into_inner();
    let mut bytes = 0;
    while let Some(record) = records.next().await {
        if let Some(Record::Chunk(chunk)) = record?.record {
            bytes += chunk.data.len() as u64;
        }
    }
    Ok(bytes)
}

async fn boot(table: &mut Table) -> anyhow::Result<()> {
    let plane = ControlPlane::start("qemu").await?;
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let (vm_id, took) = start_vm(&mut plane.scheduler.clone(), common::VmKind::Service).await?;
        ours.push(took.as_secs_f64());
        let commands = command_lines(&plane, &vm_id).await?;
        let stop = pb::StopVmRequest { vm_id: vm_id.clone(), grace_ms: Some(0), reason: String::new() };
        plane.scheduler.clone().stop_vm(stop).await?;
        loop {
            let vm = plane.scheduler.clone().get_vm(pb::GetVmRequest { vm_id: vm_id.clone() }).await?.into_inner();
            if vm.vm.context("vm")?.state() == common::VmState::Terminated {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        baseline.push(by_hand(&plane, &vm_id, &commands).await?.as_secs_f64());
    }
    let row = Row { unit: "s", ours: percentile(&mut ours, 50), baseline: percentile(&mut baseline, 50) };
    table.insert("boot: StartVm to Ready (by hand)".to_owned(), row);
    plane.stop().await
}

/// The commands that vmhost started for this VM, as the kernel has them.
async fn command_lines(plane: &ControlPlane, vm_id: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let mut vmhost = VmHostServiceClient::new(client::channel(&plane.endpoint)?);
    let vms = vmhost.list_vms(vmhost::ListVmsRequest::default()).await?.into_inner().vms;
    let vm = vms.into_iter().find(|vm| vm.vm_id == vm_id).context("the VM")?;
    let mut commands = Vec::new();
    for pid in vm.pids {
        let line = fs::read(format!("/proc/{pid}/cmdline"))?;
        let words = line.split(|&byte| byte == 0).filter(|word| !word.is_empty());
        commands.push(words.map(|word| String::from_utf8_lossy(word).into_owned()).collect());
    }
    // The device first: the hypervisor connects to it.
    commands.sort_by_key(|command: &Vec<String>| command.first().is_some_and(|program| program.contains("qemu")));
    Ok(commands)
}

/// Starts the same commands in a directory of their own and waits for the agent's knock on the host's port, which says that
/// it serves. (The vsock must not be polled: vhost-device-vsock 0.3.0 may hang for good when it is.)
async fn by_hand(plane: &ControlPlane, vm_id: &str, commands: &[Vec<String>]) -> anyhow::Result<Duration> {
    let other_id = Uuid::new_v4().to_string();
    let vm_root = plane.directory.join("data/vm-state").join(&other_id);
    let machine = vm_root.join("machine");
    fs::create_dir_all(&machine)?;
    let commands: Vec<Vec<String>> =
        commands.iter().map(|command| command.iter().map(|word| word.replace(vm_id, &other_id)).collect()).collect();
    let socket = commands.iter().flatten().skip_while(|word| *word != "--uds-path").nth(1).context("no --uds-path")?;
    let knocks = tokio::net::UnixListener::bind(machine.join(format!("{socket}_1024")))?;

    let began = Instant::now();
    let mut children = Vec::new();
    for words in &commands {
        let mut child = Command::new(&words[0]);
        child.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        children.push(child.current_dir(&machine).spawn()?);
        // The hypervisor connects to the device's socket.
        while fs::read_dir(&machine)?.count() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    tokio::time::timeout(Duration::from_secs(120), knocks.accept()).await.context("the agent never knocked")??;
    let took = began.elapsed();
    for mut child in children {
        child.kill()?;
        child.wait()?;
    }
    fs::remove_dir_all(&vm_root)?;
    Ok(took)
}
