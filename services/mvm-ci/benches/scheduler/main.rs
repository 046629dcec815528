//! How fast jobs go through, beside what the same work costs without us, alternated in one run.
//!
//! ```text
//! cargo bench -p mvm-ci --bench scheduler [-- latency|jobs|control] [--rounds N] [--seconds N]
//! ```
//! Prints tables and writes `target/bench/scheduler.json`: {metric: {ours, baseline, ratio}}; `scripts/bench.sh` builds what
//! it needs. All of it is durable: every answer came after an fsync.
//!
//! - latency: submit → first log byte on a warm service VM (`mvm-ci`, `process` driver), beside F = 3 unary calls +
//!   1 fdatasync + 1 spawn.
//! - jobs: submit → finished, real processes on 8 service VMs of the same, beside bare fork/exec of the same program at 8 at a
//!   time.
//! - control: the control plane alone, `registry` and `scheduler`, with a node that has run every job at once, beside Redis
//!   Streams with an fsync before each answer: publish, consume and acknowledge.

#[path = "../support/mod.rs"]
mod support;

mod redis;

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use blixard::pb::scheduler::v1::{self as pb, run_job_response::Event, stream_job_logs_response::Record};
use futures::future::try_join_all;

use crate::{
    redis::Redis,
    support::{
        baseline::{floor, fork_exec},
        fake_vmhost::FakeVmHost,
        plane::{ControlPlane, Directory, Scheduler, connect, job, run_job},
        table::{self, Row, Table, load_average, percentile},
        usage::Usage,
    },
};

/// Warm VMs, and processes at once of the baseline.
const AT_ONCE: usize = 8;
const CALLERS: [usize; 4] = [1, 16, 64, 256];
/// Callers that share a connection, as the calls of one process do.
const CALLERS_OF_A_CONNECTION: usize = 64;
/// About as long as the spec of the jobs, for Redis.
const PAYLOAD: &str = "[128 bytes, which is about what the spec of a small job has on the wire: command, image, vcpus, memory, \
                       isolation, labels.]";

struct Settings {
    wanted: Vec<String>,
    rounds: usize,
    time: Duration,
}

impl Settings {
    fn parse() -> anyhow::Result<Self> {
        let mut settings = Self { wanted: Vec::new(), rounds: 3, time: Duration::from_secs(2) };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut number = || arguments.next().and_then(|text| text.parse().ok()).context("a number is missing");
            match argument.as_str() {
                "--rounds" => settings.rounds = number()?,
                "--seconds" => settings.time = Duration::from_secs(number()? as u64),
                // Cargo's.
                "--bench" => {}
                _ => settings.wanted.push(argument),
            }
        }
        Ok(settings)
    }

    fn wants(&self, name: &str) -> bool {
        self.wanted.is_empty() || self.wanted.iter().any(|wanted| wanted == name)
    }
}

fn main() -> anyhow::Result<()> {
    let settings = Settings::parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut table = Table::new();
    println!("{} rounds of {:?}, load average before: {}", settings.rounds, settings.time, load_average());
    runtime.block_on(async {
        if settings.wants("latency") || settings.wants("jobs") {
            let plane = ControlPlane::all_in_one("process")?;
            let vms = plane.service_vms(AT_ONCE, None).await?;
            if settings.wants("latency") {
                latency(&plane, &vms[0], &mut table).await?;
            }
            if settings.wants("jobs") {
                jobs(&plane, &settings, &mut table).await?;
            }
            plane.stop().await?;
        }
        if settings.wants("control") {
            control(&settings, &mut table).await?;
        }
        anyhow::Ok(())
    })?;
    table::print(&table, "scheduler")
}

async fn latency(plane: &ControlPlane, vm_id: &str, table: &mut Table) -> anyhow::Result<()> {
    let bare = FakeVmHost::start().await?;
    let mut file = fs::File::create(plane.directory.0.join("fsync"))?;
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for round in 0..320 {
        let began = Instant::now();
        floor(&bare, &mut file).await?;
        let floor_ms = began.elapsed().as_secs_f64() * 1e3;
        let first_ms = first_byte_ms(&mut plane.scheduler.clone(), vm_id).await?;
        // The first rounds warm caches and connections.
        if round >= 20 {
            ours.push(first_ms);
            baseline.push(floor_ms);
        }
    }
    // F is a unit: its median, whatever the percentile of ours.
    let floor_ms = percentile(&mut baseline, 50);
    for percent in [50, 99] {
        let metric = format!("latency: submit to first log byte, p{percent} (F)");
        table.insert(metric, Row { unit: "ms", ours: percentile(&mut ours, percent), baseline: floor_ms });
    }
    Ok(())
}

/// From the submission of a job to its first byte of output.
async fn first_byte_ms(scheduler: &mut Scheduler, vm_id: &str) -> anyhow::Result<f64> {
    let pb::SubmitJobRequest { request_id, spec, input } = job(&["echo", "x"], vm_id);
    let began = Instant::now();
    let mut events = scheduler.run_job(pb::RunJobRequest { request_id, spec, input }).await?.into_inner();
    let mut first_ms = None;
    while let Some(message) = events.message().await? {
        if let Some(Event::Log(pb::StreamJobLogsResponse { record: Some(Record::Chunk(_)), .. })) = message.event {
            first_ms.get_or_insert(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    first_ms.context("no output")
}

/// What a round came to.
#[derive(Default)]
struct Round {
    per_second: f64,
    /// Of each operation.
    took_ms: Vec<f64>,
}

/// Callers that do one thing after the other, until time is up.
async fn round<T>(
    callers: impl IntoIterator<Item = T>,
    time: Duration,
    one: impl AsyncFn(&mut T) -> anyhow::Result<()>,
) -> anyhow::Result<Round> {
    let began = Instant::now();
    let one = &one;
    let work = callers.into_iter().map(async |mut caller| {
        let mut took_ms = Vec::new();
        while began.elapsed() < time {
            let began = Instant::now();
            one(&mut caller).await?;
            took_ms.push(began.elapsed().as_secs_f64() * 1e3);
        }
        anyhow::Ok(took_ms)
    });
    let took_ms = try_join_all(work).await?.concat();
    Ok(Round { per_second: took_ms.len() as f64 / began.elapsed().as_secs_f64(), took_ms })
}

/// Rounds of ours and the baseline, taking turns.
struct Duel {
    ours: Vec<Round>,
    baseline: Vec<Round>,
    /// Of the processes that work for either, for each operation, in µs.
    cpu_us: Vec<Vec<f64>>,
    baseline_cpu_us: Vec<f64>,
    /// How much of the machine was busy while ours ran.
    busy: Vec<f64>,
}

impl Duel {
    async fn fight(
        settings: &Settings,
        pids: &[u32],
        baseline_pid: u32,
        ours: impl AsyncFn() -> anyhow::Result<Round>,
        baseline: impl AsyncFn() -> anyhow::Result<Round>,
    ) -> anyhow::Result<Self> {
        let mut duel = Self {
            ours: Vec::new(),
            baseline: Vec::new(),
            cpu_us: vec![Vec::new(); pids.len()],
            baseline_cpu_us: Vec::new(),
            busy: Vec::new(),
        };
        let us_each = |usage: f64, round: &Round| usage * 1e6 / round.took_ms.len() as f64;
        for _ in 0..settings.rounds {
            let before = Usage::of_process(baseline_pid);
            let round = baseline().await?;
            duel.baseline_cpu_us.push(us_each(Usage::of_process(baseline_pid).since(before), &round));
            duel.baseline.push(round);
            let before: Vec<_> = pids.iter().map(|&pid| Usage::of_process(pid)).collect();
            let machine = Usage::of_machine();
            let round = ours().await?;
            duel.busy.push(Usage::of_machine().share_since(machine));
            for ((pid, before), cpu_us) in pids.iter().zip(before).zip(&mut duel.cpu_us) {
                cpu_us.push(us_each(Usage::of_process(*pid).since(before), &round));
            }
            duel.ours.push(round);
        }
        Ok(duel)
    }

    fn row(&self) -> Row {
        let median = |rounds: &[Round]| {
            let mut rates: Vec<_> = rounds.iter().map(|round| round.per_second).collect();
            percentile(&mut rates, 50)
        };
        Row { unit: "jobs/s", ours: median(&self.ours), baseline: median(&self.baseline) }
    }

    /// A line for people; `names` are those of the processes under test.
    fn print(&mut self, callers: usize, names: &[&str], baseline: &str) {
        let row = self.row();
        let mut took_ms: Vec<f64> = self.ours.iter().flat_map(|round| round.took_ms.iter().copied()).collect();
        let (p50, p99) = (percentile(&mut took_ms, 50), percentile(&mut took_ms, 99));
        let medians = self.cpu_us.iter_mut().map(|values| percentile(values, 50));
        let cpu: Vec<_> = names.iter().zip(medians).map(|(name, us)| format!("{name} {us:.0} µs")).collect();
        println!(
            "{callers:>4} callers: {:>7.0} jobs/s, p50 {p50:.1} ms, p99 {p99:.1} ms; baseline {:>7.0}/s; ratio {:.2}; \
             machine {:.0} % busy; CPU of a job: {}; of the baseline: {baseline} {:.0} µs",
            row.ours,
            row.baseline,
            row.ours / row.baseline,
            percentile(&mut self.busy, 50) * 100.0,
            cpu.join(", "),
            percentile(&mut self.baseline_cpu_us, 50),
        );
    }
}

/// As many connections as the callers need, each caller with its own handle.
fn connections(endpoint: &str, callers: usize) -> anyhow::Result<Vec<Scheduler>> {
    let connections: Vec<_> =
        (0..callers.div_ceil(CALLERS_OF_A_CONNECTION)).map(|_| connect(endpoint)).collect::<anyhow::Result<_>>()?;
    Ok((0..callers).map(|caller| connections[caller % connections.len()].clone()).collect())
}

async fn jobs(plane: &ControlPlane, settings: &Settings, table: &mut Table) -> anyhow::Result<()> {
    println!("\njobs: real processes on {AT_ONCE} service VMs, beside fork/exec at {AT_ONCE} at a time");
    let pids = [plane.services[0].process.id(), std::process::id()];
    for callers in CALLERS {
        let schedulers = connections(&plane.endpoint, callers)?;
        let one = async |scheduler: &mut Scheduler| run_job(scheduler, job(&["/bin/true"], "")).await.map(drop);
        let ours = async || round(schedulers.clone(), settings.time, one).await;
        let baseline = async || round([(); AT_ONCE], settings.time, async |()| fork_exec().await).await;
        let mut duel = Duel::fight(settings, &pids, std::process::id(), ours, baseline).await?;
        duel.print(callers, &["mvm-ci", "callers"], "the one that forks");
        table.insert(format!("jobs: {callers:>3} callers (fork/exec, 8 at a time)"), duel.row());
    }
    Ok(())
}

async fn control(settings: &Settings, table: &mut Table) -> anyhow::Result<()> {
    println!("\ncontrol: registry and scheduler with a node that has run every job at once, beside Redis Streams");
    let plane = ControlPlane::without_nodes()?;
    let node = FakeVmHost::node(&plane.services[0].endpoint).await?;
    wait_for_node(&plane).await?;
    plane.service_vms(CALLERS.into_iter().max().unwrap_or(1), None).await?;
    let directory = Directory::new("redis")?;
    let redis = Redis::start(&directory.0).await?;
    let pids = [plane.services[0].process.id(), plane.services[1].process.id(), std::process::id()];
    for callers in CALLERS {
        let schedulers = connections(&plane.endpoint, callers)?;
        let one = async |scheduler: &mut Scheduler| run_job(scheduler, job(&["/bin/true"], "")).await.map(drop);
        let ours = async || round(schedulers.clone(), settings.time, one).await;
        let baseline = async || {
            let connections = (0..callers).map(async |caller| redis.connect(&format!("caller-{caller}")).await);
            let connections = try_join_all(connections).await?;
            round(connections, settings.time, async |connection| connection.job(PAYLOAD).await).await
        };
        let mut duel = Duel::fight(settings, &pids, redis.pid(), ours, baseline).await?;
        duel.print(callers, &["registry", "scheduler", "callers and node"], "redis-server");
        table.insert(format!("control: {callers:>3} callers (Redis Streams)"), duel.row());
    }
    drop(node);
    Ok(())
}

/// Until the scheduler knows the node.
async fn wait_for_node(plane: &ControlPlane) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let stats = plane.scheduler.clone().get_stats(pb::GetStatsRequest {}).await;
        if stats.is_ok_and(|stats| stats.into_inner().ready_nodes > 0) {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "the scheduler does not see the node");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
