//! Measures durable changes per second through gRPC beside etcd's put: same machine, same size of value, same client code.
//!
//! ```text
//! make bench-registry                                       # or, with the flags below:
//! cargo run --release -p blixard-registry --example bench_registry -- --rounds 3 --replicas 1 --callers 64,256
//! ```
//! The servers are processes of their own: `registry` alone or as three replicas, and etcd with one or three members, all
//! with an fsync on a majority before the answer. Both clients speak to the leader. Ours and etcd take turns, who begins
//! changes from round to round, and medians of the rounds count. The operations:
//!
//! - **create**: `CreateJob` with a spec of as many bytes as etcd's value; etcd: a put of a new key.
//! - **step**: `TransitionVm`, each caller with a VM of its own (Idle → Busy → Idle …); etcd: a put of a key that is there.
//!
//! Prints tables in Markdown and writes `target/bench/registry.json`.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use blixard::pb::{
    common::v1 as pb,
    registry::v1::{
        self as wire, ReplicaState, registry_service_client::RegistryServiceClient,
        replica_service_client::ReplicaServiceClient,
    },
};
use blixard_chassis::client;
use clap::Parser;
use prost::Message as _;
use tonic::{Status, codegen::http::uri::PathAndQuery, transport::Channel};

/// Callers of one connection. With more, the connection is what is measured.
const CALLERS_PER_CONNECTION: usize = 64;
/// How long servers may take to begin.
const START_DEADLINE: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Flags {
    /// Length of each measurement.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Measurements of each kind; their median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128)]
    value_bytes: usize,
    /// Callers at once, each with one call after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64, 256])]
    callers: Vec<usize>,
    /// Replicas, and members of etcd.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3])]
    replicas: Vec<usize>,
    /// What is measured: create, step.
    #[arg(long, value_delimiter = ',', default_values_t = ["create".to_owned(), "step".to_owned()])]
    operations: Vec<String>,
    /// The program under test; by default the one that was built with this.
    #[arg(long)]
    registry: Option<PathBuf>,
    /// Another build of it, to take turns with.
    #[arg(long)]
    before: Option<PathBuf>,
    /// Where the data directories are made.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    fs::create_dir_all(&flags.dir)?;
    let built = std::env::current_exe()?;
    let built = built.parent().and_then(Path::parent).context("no directory above")?.join("registry");
    let program = flags.registry.clone().unwrap_or(built);
    let load_before = load_average();
    let mut json = serde_json::Map::new();
    for &replicas in &flags.replicas {
        let dir = tempfile::tempdir_in(&flags.dir)?;
        let mut subjects = vec![Subject::registry("ours", &program, &dir.path().join("ours"), replicas).await?];
        subjects.push(Subject::etcd(&dir.path().join("etcd"), replicas).await?);
        if let Some(before) = &flags.before {
            subjects.push(Subject::registry("before", before, &dir.path().join("before"), replicas).await?);
        }
        for operation in &flags.operations {
            let figures = measure_all(&flags, operation, &mut subjects).await?;
            report(operation, replicas, &flags, &figures, &mut json);
        }
        println!("load average: {load_before} before, {} after", load_average());
    }
    fs::create_dir_all("target/bench")?;
    Ok(fs::write("target/bench/registry.json", serde_json::to_string_pretty(&json)?)?)
}

type Figures = BTreeMap<(&'static str, usize), Vec<Figure>>;

async fn measure_all(flags: &Flags, operation: &str, subjects: &mut [Subject]) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    for round in 0..flags.rounds {
        for &callers in &flags.callers {
            for turn in 0..subjects.len() {
                let at = (round + turn) % subjects.len();
                let subject = &mut subjects[at];
                let endpoint = subject.leader().await?;
                let connections = callers.div_ceil(CALLERS_PER_CONNECTION);
                let channels: Vec<_> =
                    (0..connections).map(|_| client::channel(&endpoint)).collect::<Result<_, _>>()?;
                let mut own = Vec::new();
                for caller in 0..callers {
                    let channel = channels[caller % connections].clone();
                    own.push(Caller::new(subject.kind, operation, channel, flags.value_bytes).await?);
                }
                let figure = subject.measure(own, Duration::from_secs_f64(flags.seconds)).await?;
                eprintln!("{operation} {} {callers:3} callers: {:.0}/s", subject.name, figure.per_second);
                figures.entry((subject.name, callers)).or_default().push(figure);
            }
        }
    }
    Ok(figures)
}

/// What one measurement came to. Times in microseconds.
struct Figure {
    per_second: f64,
    p50: f64,
    p99: f64,
    /// CPU time of all servers, for one operation.
    server_cpu: f64,
    /// CPU time of this process, for one operation.
    client_cpu: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Registry,
    Etcd,
}

/// A server of one or several processes, ended with this value.
struct Subject {
    name: &'static str,
    kind: Kind,
    endpoints: Vec<String>,
    children: Vec<Child>,
}

impl Subject {
    async fn registry(name: &'static str, program: &Path, dir: &Path, replicas: usize) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut subject = Self { name, kind: Kind::Registry, endpoints: Vec::new(), children: Vec::new() };
        let ports = free_ports(3 * replicas)?;
        let of = |id: usize| &ports[3 * id..3 * id + 3];
        let listed = (0..replicas).map(|id| {
            let [grpc, raft, api] = of(id) else { unreachable!("three ports each") };
            format!("{}=127.0.0.1:{grpc}/{raft}/{api}", id + 1)
        });
        let list = listed.collect::<Vec<_>>().join(",");
        let secret = dir.join("secret");
        fs::write(&secret, uuid::Uuid::new_v4().to_string())?;
        for id in 0..replicas {
            let mut command = Command::new(program);
            command.arg("--data-dir").arg(dir.join(id.to_string()));
            match replicas {
                1 => command.args(["--listen", &format!("127.0.0.1:{}", of(id)[0])]),
                _ => command
                    .args(["--replicas", &list, "--replica-id", &(id + 1).to_string(), "--secret-file"])
                    .arg(&secret),
            };
            subject.spawn(command.env("RUST_LOG", "error"), &dir.join(format!("{id}.log")))?;
            subject.endpoints.push(format!("http://127.0.0.1:{}", of(id)[0]));
        }
        subject.wait().await
    }

    /// etcd with its defaults, which write to the disk before the answer.
    async fn etcd(dir: &Path, members: usize) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut subject = Self { name: "etcd", kind: Kind::Etcd, endpoints: Vec::new(), children: Vec::new() };
        let urls: Vec<_> = free_ports(2 * members)?.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        let cluster: Vec<_> = (0..members).map(|id| format!("m{id}={}", urls[2 * id])).collect();
        for id in 0..members {
            let (peer, own) = (&urls[2 * id], &urls[2 * id + 1]);
            let mut command = Command::new("etcd");
            command.args(["--name", &format!("m{id}"), "--data-dir"]).arg(dir.join(id.to_string()));
            command.args(["--listen-client-urls", own, "--advertise-client-urls", own]);
            command.args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]);
            command.args(["--initial-cluster", &cluster.join(","), "--log-level", "error"]);
            subject.spawn(&mut command, &dir.join(format!("{id}.log")))?;
            subject.endpoints.push(own.clone());
        }
        subject.wait().await
    }

    fn spawn(&mut self, command: &mut Command, log: &Path) -> anyhow::Result<()> {
        let program = command.get_program().to_owned();
        let child = command.stdout(Stdio::null()).stderr(fs::File::create(log)?).stdin(Stdio::null()).spawn();
        self.children.push(child.with_context(|| format!("cannot start {}", program.display()))?);
        Ok(())
    }

    async fn wait(self) -> anyhow::Result<Self> {
        let begun = Instant::now();
        while let Err(error) = self.leader().await {
            ensure!(begun.elapsed() < START_DEADLINE, "{} does not answer: {error}", self.name);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(self)
    }

    /// The endpoint that leads, once all are well.
    async fn leader(&self) -> anyhow::Result<String> {
        let mut leader = None;
        for endpoint in &self.endpoints {
            let channel = client::channel(endpoint)?;
            let leads = match self.kind {
                Kind::Registry => {
                    let mut client = ReplicaServiceClient::new(channel);
                    let replica = client.get_replica(wire::GetReplicaRequest::default()).await?.into_inner();
                    match replica.state() {
                        ReplicaState::Leader => true,
                        ReplicaState::Follower => false,
                        state => bail!("{endpoint} is {}", state.as_str_name()),
                    }
                }
                Kind::Etcd => {
                    let path = PathAndQuery::from_static("/etcdserverpb.Maintenance/Status");
                    let status: MemberStatus = unary(channel, path, Empty {}).await?;
                    ensure!(status.leader != 0, "{endpoint} has no leader");
                    status.header.is_some_and(|header| header.member_id == status.leader)
                }
            };
            if leads {
                leader = Some(endpoint.clone());
            }
        }
        leader.context("no leader")
    }

    /// Lets every caller call until the time is over.
    async fn measure(&mut self, callers: Vec<Caller>, length: Duration) -> anyhow::Result<Figure> {
        let stop = Arc::new(AtomicBool::new(false));
        let (servers, own) = (self.cpu_time()?, cpu_time("self")?);
        let begun = Instant::now();
        let tasks = tokio::task::JoinSet::from_iter(callers.into_iter().map(|mut caller| {
            let stop = stop.clone();
            async move {
                let mut times = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    caller.call().await?;
                    times.push(begun.elapsed().as_secs_f64() * 1e6);
                }
                Ok::<_, Status>(times)
            }
        }));
        tokio::time::sleep(length).await;
        stop.store(true, Ordering::Relaxed);
        let mut times = Vec::new();
        for result in tasks.join_all().await {
            times.extend(result?);
        }
        let elapsed = begun.elapsed();
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        let count = times.len() as f64;
        Ok(Figure {
            per_second: count / elapsed.as_secs_f64(),
            p50: at(0.5),
            p99: at(0.99),
            server_cpu: (self.cpu_time()? - servers) * 1e6 / count,
            client_cpu: (cpu_time("self")? - own) * 1e6 / count,
        })
    }

    fn cpu_time(&self) -> anyhow::Result<f64> {
        self.children.iter().map(|child| cpu_time(&child.id().to_string())).sum()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One who calls, again and again.
enum Caller {
    Create { client: RegistryServiceClient<Channel>, spec: Box<pb::JobSpec> },
    Step { client: RegistryServiceClient<Channel>, vm_id: String, busy: bool },
    Put { channel: Channel, key: Option<Vec<u8>>, value: Vec<u8> },
}

impl Caller {
    /// With everything that it needs, which is not measured.
    async fn new(kind: Kind, operation: &str, channel: Channel, value_bytes: usize) -> anyhow::Result<Self> {
        let id = uuid::Uuid::new_v4().to_string();
        let mut caller = match (kind, operation) {
            (Kind::Registry, "create") => {
                Self::Create { client: RegistryServiceClient::new(channel), spec: Box::new(spec(value_bytes)?) }
            }
            (Kind::Registry, "step") => {
                let mut client = RegistryServiceClient::new(channel);
                let config = pb::VmConfig {
                    kind: pb::VmKind::Service.into(),
                    image: "default".into(),
                    vcpus: Some(1),
                    memory_mib: Some(128),
                    ..Default::default()
                };
                let request = wire::CreateVmRequest {
                    vm_id: id.clone(),
                    config: Some(config),
                    node_id: "node-1".into(),
                    ..Default::default()
                };
                client.create_vm(request).await?;
                client.transition_vm(step(&id, pb::VmState::Ready)).await?;
                Self::Step { client, vm_id: id, busy: false }
            }
            (Kind::Etcd, "create") => Self::Put { channel, key: None, value: vec![b'x'; value_bytes] },
            (Kind::Etcd, "step") => Self::Put { channel, key: Some(id.into_bytes()), value: vec![b'x'; value_bytes] },
            (_, other) => bail!("there is no operation {other:?}"),
        };
        caller.call().await?;
        Ok(caller)
    }

    async fn call(&mut self) -> Result<(), Status> {
        match self {
            Self::Create { client, spec } => {
                let job_id = uuid::Uuid::new_v4().to_string();
                client
                    .create_job(wire::CreateJobRequest { job_id, spec: Some((**spec).clone()), ..Default::default() })
                    .await
                    .map(drop)
            }
            Self::Step { client, vm_id, busy } => {
                *busy = !*busy;
                let to = if *busy { pb::VmState::Busy } else { pb::VmState::Idle };
                client.transition_vm(step(vm_id, to)).await.map(drop)
            }
            Self::Put { channel, key, value } => {
                let key = key.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string().into_bytes());
                let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
                unary::<_, PutDone>(channel.clone(), path, Put { key, value: value.clone() }).await.map(drop)
            }
        }
    }
}

fn step(vm_id: &str, to: pb::VmState) -> wire::TransitionVmRequest {
    wire::TransitionVmRequest { vm_id: vm_id.to_owned(), to_state: to.into(), ..Default::default() }
}

/// A job whose spec has this many bytes.
fn spec(bytes: usize) -> anyhow::Result<pb::JobSpec> {
    let mut spec = pb::JobSpec {
        command: vec!["sh".into(), "-c".into(), String::new()],
        working_dir: "/".into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        max_attempts: 1,
        ..Default::default()
    };
    while spec.encoded_len() < bytes {
        spec.command[2].push('x');
    }
    ensure!(spec.encoded_len() == bytes, "no spec has {bytes} bytes; the smallest has {}", spec.encoded_len());
    Ok(spec)
}

/// A call of etcd's v3 API.
async fn unary<Q, A>(channel: Channel, path: PathAndQuery, message: Q) -> Result<A, Status>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    Ok(client.unary(tonic::Request::new(message), path, codec).await?.into_inner())
}

/// `etcdserverpb.PutRequest`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct Put {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `etcdserverpb.PutResponse`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct PutDone {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
}

/// `etcdserverpb.StatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

/// `etcdserverpb.StatusResponse`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct MemberStatus {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// `etcdserverpb.ResponseHeader`.
#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "1")]
    cluster_id: u64,
    #[prost(uint64, tag = "2")]
    member_id: u64,
    #[prost(int64, tag = "3")]
    revision: i64,
    #[prost(uint64, tag = "4")]
    raft_term: u64,
}

fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let held: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    Ok(held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<std::io::Result<_>>()?)
}

/// Seconds of CPU that a process has used (proc(5): fields 14 and 15 of `stat`, in hundredths of a second).
fn cpu_time(process: &str) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).context("a server has ended")?;
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn median(figures: &[Figure], of: fn(&Figure) -> f64) -> f64 {
    let mut values: Vec<_> = figures.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(
    operation: &str,
    replicas: usize,
    flags: &Flags,
    figures: &Figures,
    json: &mut serde_json::Map<String, serde_json::Value>,
) {
    println!("\n{operation}, {replicas} of each\n");
    println!(
        "| callers | ours/s | etcd/s | ratio | p50 | etcd's p50 | p99 | etcd's p99 | server CPU | etcd's CPU | client CPU | with etcd |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for &callers in &flags.callers {
        let of = |name: &'static str, of: fn(&Figure) -> f64| median(&figures[&(name, callers)], of);
        let (ours, etcd) = (of("ours", |f| f.per_second), of("etcd", |f| f.per_second));
        let ms = |name, get| format!("{:.2} ms", of(name, get) / 1e3);
        let us = |name, get| format!("{:.0} µs", of(name, get));
        println!(
            "| {callers} | {ours:.0} | {etcd:.0} | **{:.2}** | {} | {} | {} | {} | {} | {} | {} | {} |",
            ours / etcd,
            ms("ours", |f| f.p50),
            ms("etcd", |f| f.p50),
            ms("ours", |f| f.p99),
            ms("etcd", |f| f.p99),
            us("ours", |f| f.server_cpu),
            us("etcd", |f| f.server_cpu),
            us("ours", |f| f.client_cpu),
            us("etcd", |f| f.client_cpu),
        );
        let mut record = |what: &str, get: fn(&Figure) -> f64| {
            let (ours, baseline) = (of("ours", get), of("etcd", get));
            let value = serde_json::json!({ "ours": ours, "baseline": baseline, "ratio": ours / baseline });
            json.insert(format!("{operation}_{replicas}_replicas_{callers}_callers_{what}"), value);
        };
        record("per_s", |f| f.per_second);
        record("p50_us", |f| f.p50);
        record("p99_us", |f| f.p99);
        record("server_cpu_us", |f| f.server_cpu);
        record("client_cpu_us", |f| f.client_cpu);
        if flags.before.is_some() {
            let (before, cpu) = (of("before", |f| f.per_second), of("before", |f| f.server_cpu));
            println!(
                "| before | {before:.0} | now / before | **{:.2}** | {} | | {} | | {cpu:.0} µs | | | |",
                ours / before,
                ms("before", |f| f.p50),
                ms("before", |f| f.p99),
            );
        }
    }
}
