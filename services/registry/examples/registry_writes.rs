//! Measures durable registry mutations per second through gRPC, and the start of a registry.
//!
//! ```text
//! cargo run --release -p blixard-registry --example registry_writes [-- --seconds 3 --rounds 3 --dir DIR]
//! ```
//! Baselines of the same run, alternating with ours: etcd's put (where `etcd` is installed), the same gRPC server answering
//! a call that does nothing (a health check), and one `fdatasync` of 256 appended bytes after the other on the same file
//! system. Prints a table and writes `target/bench/registry_writes.json`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use blixard::pb::{
    common::v1 as pb,
    registry::v1::{self as wire, registry_service_client::RegistryServiceClient},
};
use blixard_chassis::{Server, Tasks, client, telemetry};
use blixard_registry::{Registry, RegistryConfig};
use clap::Parser;
use tonic::{codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const CALLERS: [usize; 4] = [1, 8, 64, 256];

#[derive(Parser)]
struct Flags {
    /// Length of each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Measurements of each kind; their median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where the data directory and the baseline's file are made.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    telemetry::init("warn");
    std::fs::create_dir_all(&flags.dir)?;
    let dir = tempfile::tempdir_in(&flags.dir)?;
    let config = || RegistryConfig::alone(dir.path().to_owned());
    let length = Duration::from_secs(flags.seconds);

    let tasks = Tasks::new();
    let begun = Instant::now();
    let registry = Box::pin(Registry::start(config(), &tasks)).await?;
    let first_start = begun.elapsed();
    let server = Server::bind(([127, 0, 0, 1], 0).into()).await?;
    let endpoint = server.local_endpoint();
    let server = server.add_service(registry.service());
    let serving = tasks.clone();
    tasks.spawn("server", async move {
        if let Err(error) = server.serve(&serving).await {
            eprintln!("server: {error}");
        }
    });

    let etcd = Etcd::start(dir.path()).await?;
    let mut figures: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for _ in 0..flags.rounds {
        let syncs = fdatasyncs(dir.path(), length / 3)?;
        figures.entry("fdatasync".into()).or_default().push(syncs);
        for callers in CALLERS {
            let channels = channels(&endpoint, callers)?;
            let echo = measure(&channels, callers, length / 2, check).await?;
            figures.entry(format!("echo_{callers}")).or_default().push(echo);
            let create = measure(&channels, callers, length, create_job).await?;
            figures.entry(format!("create_{callers}")).or_default().push(create);
            if let Some(etcd) = &etcd {
                let put = measure(&etcd.channels(callers)?, callers, length, etcd_put).await?;
                figures.entry(format!("etcd_{callers}")).or_default().push(put);
            }
            let life = measure(&channels, callers, length, vm_steps).await? * 3.0;
            figures.entry(format!("steps_{callers}")).or_default().push(life);
        }
    }
    drop(etcd);
    tasks.shutdown(Duration::from_secs(10)).await;
    registry.shutdown().await;
    let begun = Instant::now();
    let registry = Box::pin(Registry::start(config(), &Tasks::new())).await?;
    let restart = begun.elapsed();
    registry.shutdown().await;
    report(&figures, first_start, restart)
}

/// A few connections: one is a bottleneck of its own with many callers.
fn channels(endpoint: &str, callers: usize) -> anyhow::Result<Vec<Channel>> {
    (0..callers.div_ceil(64)).map(|_| client::channel(endpoint).context("channel")).collect()
}

/// Calls per second with this many callers, each with one call after the other.
async fn measure<F>(
    channels: &[Channel],
    callers: usize,
    length: Duration,
    call: fn(Channel) -> F,
) -> anyhow::Result<f64>
where
    F: Future<Output = Result<(), tonic::Status>> + Send + 'static,
{
    call(channels[0].clone()).await?;
    let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let tasks = tokio::task::JoinSet::from_iter((0..callers).map(|caller| {
        let (channel, done, stop) = (channels[caller % channels.len()].clone(), done.clone(), stop.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                call(channel.clone()).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), tonic::Status>(())
        }
    }));
    let begun = Instant::now();
    tokio::time::sleep(length).await;
    let (done, elapsed) = (done.load(Ordering::Relaxed), begun.elapsed());
    stop.store(true, Ordering::Relaxed);
    for result in tasks.join_all().await {
        result?;
    }
    Ok(done as f64 / elapsed.as_secs_f64())
}

async fn check(channel: Channel) -> Result<(), tonic::Status> {
    HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await.map(drop)
}

/// One mutation: a small job.
async fn create_job(channel: Channel) -> Result<(), tonic::Status> {
    let spec = pb::JobSpec {
        command: vec!["sh".into(), "-c".into(), "echo hello".into()],
        working_dir: "/".into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        max_attempts: 1,
        ..Default::default()
    };
    let request = wire::CreateJobRequest { job_id: uuid::Uuid::new_v4().to_string(), spec: Some(spec) };
    RegistryServiceClient::new(channel).create_job(request).await.map(drop)
}

/// Three mutations: a VM's creation and two steps.
async fn vm_steps(channel: Channel) -> Result<(), tonic::Status> {
    let mut client = RegistryServiceClient::new(channel);
    let vm_id = uuid::Uuid::new_v4().to_string();
    let config = pb::VmConfig {
        kind: pb::VmKind::Service.into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        ..Default::default()
    };
    let request = wire::CreateVmRequest { vm_id: vm_id.clone(), config: Some(config), node_id: "node-1".into() };
    client.create_vm(request).await?;
    for to_state in [pb::VmState::Ready, pb::VmState::Draining] {
        let vm_id = vm_id.clone();
        let request = wire::TransitionVmRequest { vm_id, to_state: to_state.into(), ..Default::default() };
        client.transition_vm(request).await?;
    }
    Ok(())
}

/// etcd with its defaults (fsync before the answer), one member, on the same file system. Ends with this value.
struct Etcd {
    child: Child,
    endpoint: String,
}

impl Etcd {
    /// `None` where etcd is not installed.
    async fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        let free = || std::net::TcpListener::bind("127.0.0.1:0")?.local_addr();
        let (client, peer) = (format!("http://{}", free()?), format!("http://{}", free()?));
        let spawned = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = spawned else { return Ok(None) };
        let etcd = Self { child, endpoint: client };
        let begun = Instant::now();
        while let Err(error) = etcd_put(etcd.channels(1)?.remove(0)).await {
            anyhow::ensure!(begun.elapsed() < Duration::from_secs(30), "etcd does not answer: {error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(Some(etcd))
    }

    fn channels(&self, callers: usize) -> anyhow::Result<Vec<Channel>> {
        channels(&self.endpoint, callers)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `etcdserverpb.PutRequest`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct Put {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `etcdserverpb.PutResponse`; its fields are skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct PutDone {}

/// A key like ours, with a value of a job's size.
async fn etcd_put(channel: Channel) -> Result<(), tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let put = Put { key: uuid::Uuid::new_v4().to_string().into_bytes(), value: vec![7; 100] };
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
    let codec = tonic_prost::ProstCodec::<Put, PutDone>::default();
    client.unary(tonic::Request::new(put), path, codec).await.map(drop)
}

fn fdatasyncs(dir: &Path, length: Duration) -> anyhow::Result<f64> {
    let path = dir.join("fdatasync");
    let mut file = File::create(&path)?;
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < length {
        file.write_all(&[7; 256])?;
        file.sync_data()?;
        count += 1;
    }
    std::fs::remove_file(path)?;
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

fn report(figures: &BTreeMap<String, Vec<f64>>, first_start: Duration, restart: Duration) -> anyhow::Result<()> {
    let median = |name: String| {
        let mut values = figures.get(&name).cloned().unwrap_or_default();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let mut json = serde_json::Map::new();
    let mut record = |name: String, ours: f64, baseline: f64| {
        json.insert(name, serde_json::json!({ "ours": ours, "baseline": baseline, "ratio": ours / baseline }));
    };
    println!("callers  CreateJob/s  VM steps/s  etcd put/s  CreateJob/etcd  bare gRPC/s");
    for callers in CALLERS {
        let (create, steps) = (median(format!("create_{callers}")), median(format!("steps_{callers}")));
        let echo = median(format!("echo_{callers}"));
        let etcd = median(format!("etcd_{callers}"));
        let ratio = if etcd > 0.0 { create / etcd } else { f64::NAN };
        println!("{callers:7}  {create:11.0}  {steps:10.0}  {etcd:10.0}  {ratio:14.2}  {echo:11.0}");
        record(format!("create_job_per_s_{callers}_callers_over_grpc"), create, echo);
        if etcd > 0.0 {
            record(format!("create_job_per_s_{callers}_callers"), create, etcd);
            record(format!("vm_steps_per_s_{callers}_callers"), steps, etcd);
        }
    }
    let syncs = median("fdatasync".into());
    println!("fdatasync/s {syncs:.0} · first start {first_start:.2?} · restart {restart:.2?}");
    record("create_job_per_s_1_caller_over_fdatasync".into(), median("create_1".into()), syncs);
    record("first_start_ms".into(), first_start.as_secs_f64() * 1e3, 5000.0);
    record("restart_ms".into(), restart.as_secs_f64() * 1e3, 5000.0);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average at the end: {}", load.trim());
    std::fs::create_dir_all("target/bench")?;
    Ok(std::fs::write("target/bench/registry_writes.json", serde_json::to_string_pretty(&json)?)?)
}
