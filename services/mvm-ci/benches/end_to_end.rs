//! What the house costs, beside what the same work costs without it, alternated in one run.
//!
//! ```text
//! cargo bench -p mvm-ci --bench end_to_end [-- logs|boot|idle]
//! ```
//! Prints a table and writes `target/bench/end_to_end.json`: {metric: {ours, baseline, ratio}}. A real `mvm-ci` process is measured
//! over loopback, on the `process` driver; `boot` needs QEMU and ./images (`make guest-image`). How fast jobs go through is
//! `scheduler`'s to tell.
//!
//! - logs: a finished log of 256 MiB read through the scheduler and from vmhost, beside a bare tonic stream of as many bytes
//!   in chunks of the same size.
//! - boot: StartVm → Ready, beside the same commands started by hand until the same agent answers.
//! - idle: memory and CPU of `mvm-ci` with 200 idle VMs, each an agent process, beside itself without any.

mod support;

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use blixard::{
    limits,
    pb::{
        common::v1 as common,
        registry::v1::{self as registry, registry_service_client::RegistryServiceClient, watch_event, watch_response},
        scheduler::v1::{self as pb, stream_job_logs_response::Record},
        vmhost::v1::{self as vmhost, stream_logs_response, vm_host_service_client::VmHostServiceClient},
    },
};
use blixard_chassis::client;
use futures::{StreamExt as _, future::try_join_all};
use tonic::transport::Channel;
use uuid::Uuid;

use crate::support::{
    fake_vmhost::{FakeVmHost, LOG_BYTES},
    plane::{ControlPlane, Scheduler, job, logs_of, run_job},
    table::{self, Row, Table, percentile},
    usage::{Usage, resident_kib},
};

/// As many as fit into the memory of a machine of 24 GiB when each asks for as little as it may.
const IDLE_VMS: usize = 200;
/// Each VM is asked how it is twice meanwhile.
const IDLE_FOR: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let runs = |name: &str| wanted.is_empty() || wanted.iter().any(|other| other == name);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut table = Table::new();
    runtime.block_on(async {
        if runs("logs") {
            let plane = ControlPlane::all_in_one("process")?;
            plane.service_vms(1, None).await?;
            logs(&plane, &FakeVmHost::start().await?, &mut table).await?;
            plane.stop().await?;
        }
        if runs("boot") {
            boot(&mut table).await?;
        }
        if runs("idle") {
            idle(&mut table).await?;
        }
        anyhow::Ok(())
    })?;
    table::print(&table, "end_to_end")
}

async fn logs(plane: &ControlPlane, bare: &FakeVmHost, table: &mut Table) -> anyhow::Result<()> {
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
    let plane = ControlPlane::all_in_one("qemu")?;
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let (vm_id, took) = boot_vm(&plane).await?;
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

/// Starts a VM and is told when it is Ready: whoever asks again and again takes CPU from the guest.
async fn boot_vm(plane: &ControlPlane) -> anyhow::Result<(String, Duration)> {
    let mut registry = RegistryServiceClient::new(client::channel(&plane.endpoint)?);
    let kinds = vec![registry::ObjectKind::Vm.into()];
    let mut changes = registry.watch(registry::WatchRequest { kinds, ..Default::default() }).await?.into_inner();

    let began = Instant::now();
    let config = common::VmConfig { kind: common::VmKind::Service.into(), ..Default::default() };
    let request = pb::StartVmRequest { config: Some(config), ..Default::default() };
    let vm_id = plane.scheduler.clone().start_vm(request).await?.into_inner().vm.context("vm")?.id;
    while let Some(change) = changes.message().await? {
        let Some(watch_response::Message::Event(event)) = change.message else { continue };
        let Some(watch_event::Object::Vm(vm)) = event.object else { continue };
        match vm.state() {
            _ if vm.id != vm_id => {}
            common::VmState::Starting => {}
            common::VmState::Ready => return Ok((vm_id, began.elapsed())),
            state => anyhow::bail!("VM {vm_id} is {state:?}: {}", vm.reason),
        }
    }
    anyhow::bail!("the watch ended")
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
    let vm_root = plane.directory.0.join("data/vm-state").join(&other_id);
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

async fn idle(table: &mut Table) -> anyhow::Result<()> {
    let plane = ControlPlane::all_in_one("process")?;
    let alone = look(&plane).await;
    plane.service_vms(IDLE_VMS, Some(limits::MIN_MEMORY_MIB)).await?;
    let with_vms = look(&plane).await;
    let rows = [("MiB resident", alone.0, with_vms.0), ("% of a core", alone.1, with_vms.1)];
    for (unit, baseline, ours) in rows {
        table.insert(format!("idle: mvm-ci with {IDLE_VMS} VMs, {unit} (without)"), Row { unit, ours, baseline });
    }
    plane.stop().await
}

/// Resident MiB afterwards and percent of a core, of a control plane of which nobody wants anything.
async fn look(plane: &ControlPlane) -> (f64, f64) {
    let pid = plane.services[0].process.id();
    let before = Usage::of_process(pid);
    tokio::time::sleep(IDLE_FOR).await;
    (resident_kib(pid) / 1024.0, Usage::of_process(pid).since(before) / IDLE_FOR.as_secs_f64() * 100.0)
}
