//! Measures watchers and a large table of events: what ten thousand watchers cost, what a stalled one costs, and what lists,
//! watches, queries, changes and compaction take with ten million events.
//!
//! ```text
//! cargo run --release -p blixard-registry --example registry_watch [-- --watchers 10000 --events 10000000 --dir DIR]
//! ```
//! The registry is a process of its own (this program again), so that memory and CPU are its alone. The events are written
//! into its database with SQLite while it is down: what is measured is their presence, not their making. Prints tables and
//! writes `target/bench/registry_watch.json`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use blixard::pb::{
    common::v1 as pb,
    registry::v1::{self as wire, registry_service_client::RegistryServiceClient, watch_response::Message},
};
use blixard_chassis::{Server, Tasks, client, telemetry};
use blixard_registry::{Registry, RegistryConfig};
use clap::Parser;
use tonic::{Streaming, transport::Channel};

type Client = RegistryServiceClient<Channel>;

/// Watchers on one connection; it takes 1,024 streams.
const WATCHERS_PER_CONNECTION: usize = 1000;

#[derive(Parser)]
struct Flags {
    #[arg(long, default_value_t = 10_000)]
    watchers: usize,
    #[arg(long, default_value_t = 10_000_000)]
    events: u64,
    /// How long a watcher stops reading while changes happen.
    #[arg(long, default_value_t = 60)]
    stall_seconds: u64,
    /// Where the data directory is made.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Be the registry, on this directory.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    #[arg(long, hide = true, default_value_t = u64::MAX >> 1)]
    max_events: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    // It also serves as the process that a query is.
    if let Some(ended) = blixard_registry::query_worker(std::env::args_os()) {
        return Ok(ended);
    }
    measure(Flags::parse()).await.map(|()| ExitCode::SUCCESS)
}

async fn measure(flags: Flags) -> anyhow::Result<()> {
    telemetry::init("warn,hiqlite=error,hiqlite_wal=error,openraft=error");
    if let Some(dir) = flags.serve {
        return serve(dir, flags.max_events).await;
    }
    let dir = tempfile::tempdir_in(&flags.dir)?;
    let mut figures = Figures::default();
    let process = Process::start(dir.path(), flags.max_events)?;
    watchers(&process, &flags, &mut figures).await?;
    stalled(&process, &flags, &mut figures).await?;
    let small = latencies(&process).await?;
    process.stop()?;

    let newest = fill(dir.path(), flags.events)?;
    let process = Process::start(dir.path(), flags.max_events)?;
    figures.note("start_with_events_ms", process.started_in.as_secs_f64() * 1e3);
    let large = latencies(&process).await?;
    println!("\n{:44} {:>10} {:>10} {:>10} {:>10}", "p50 and p99 in ms", "few", "", "many", "events");
    for ((what, few), (_, many)) in small.iter().zip(&large) {
        println!("{what:44} {:10.2} {:10.2} {:10.2} {:10.2}", few.0, few.1, many.0, many.1);
        figures.note(&format!("{what} p50_ms few"), few.0);
        figures.note(&format!("{what} p50_ms many"), many.0);
        figures.note(&format!("{what} p99_ms many"), many.1);
    }
    catch_up(&process, newest, &mut figures).await?;
    // Enough Raft entries for a snapshot, which then has the events in it.
    let (p50, p99, max) = writes(&process, 10_500).await?;
    println!("10,500 changes one by one, a snapshot among them: p50 {p50:.2} ms, p99 {p99:.2} ms, longest {max:.0} ms");
    figures.note("change_longest_ms_with_snapshot", max);
    process.kill()?;
    let process = Process::start(dir.path(), flags.max_events)?;
    figures.note("start_after_kill_ms", process.started_in.as_secs_f64() * 1e3);
    process.stop()?;

    compaction(dir.path(), flags.events, &mut figures).await?;
    figures.write()
}

async fn serve(dir: PathBuf, max_events: u64) -> anyhow::Result<()> {
    let mut config = RegistryConfig::alone(dir);
    let ever = Duration::from_secs(100 * 365 * 24 * 3600);
    (config.retention.max_events, config.retention.events_for, config.retention.ended_for) = (max_events, ever, ever);
    config.retention.look_every = Duration::from_secs(1);
    let tasks = Tasks::new();
    let registry = Box::pin(Registry::start(config, &tasks)).await?;
    let server = Server::bind(([127, 0, 0, 1], 0).into()).await?;
    writeln!(std::io::stdout(), "{}", server.local_endpoint())?;
    server.add_service(registry.service()).run(&tasks).await?;
    registry.shutdown().await;
    Ok(())
}

/// The registry, and what the kernel says of it.
struct Process {
    child: Child,
    endpoint: String,
    started_in: Duration,
}

impl Process {
    fn start(dir: &Path, max_events: u64) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--serve")
            .arg(dir.join("registry"))
            .args(["--max-events", &max_events.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("stdout")?;
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let endpoint = lines.find(|line| line.starts_with("http")).context("the registry did not start")?;
        Ok(Self { child, endpoint, started_in: begun.elapsed() })
    }

    fn client(&self) -> anyhow::Result<Client> {
        Ok(RegistryServiceClient::new(client::channel(&self.endpoint)?).max_decoding_message_size(4 << 20))
    }

    fn resident_mib(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
    }

    /// CPU time so far; the kernel counts in hundredths.
    fn cpu(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 10)
    }

    fn stop(mut self) -> anyhow::Result<()> {
        Command::new("kill").arg(self.child.id().to_string()).status()?;
        self.child.wait().map(drop).context("wait")
    }

    fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop).context("wait")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[derive(Default)]
struct Figures(serde_json::Map<String, serde_json::Value>);

impl Figures {
    fn note(&mut self, what: &str, value: f64) {
        self.0.insert(what.to_owned(), value.into());
    }

    fn write(self) -> anyhow::Result<()> {
        println!("load average at the end: {}", std::fs::read_to_string("/proc/loadavg")?.trim());
        std::fs::create_dir_all("target/bench")?;
        Ok(std::fs::write("target/bench/registry_watch.json", serde_json::to_string_pretty(&self.0)?)?)
    }
}

fn job(id: String) -> wire::CreateJobRequest {
    let spec = pb::JobSpec {
        command: vec!["sh".into(), "-c".into(), "echo hello".into()],
        working_dir: "/".into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        max_attempts: 1,
        ..Default::default()
    };
    wire::CreateJobRequest { job_id: id, spec: Some(spec), ..Default::default() }
}

fn uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The median and the 99th percentile in milliseconds, and the longest.
fn summary(mut times: Vec<Duration>) -> (f64, f64, f64) {
    times.sort();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e3;
    (at(50), at(99), at(100))
}

async fn writes(process: &Process, count: usize) -> anyhow::Result<(f64, f64, f64)> {
    let mut client = process.client()?;
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        client.create_job(job(uuid())).await?;
        times.push(begun.elapsed());
    }
    Ok(summary(times))
}

/// Many watchers: their memory, what idle ones cost, and what a change costs that all of them, or one of them, wants.
async fn watchers(process: &Process, flags: &Flags, figures: &mut Figures) -> anyhow::Result<()> {
    const CHANGES: u64 = 200;
    writes(process, 200).await?;
    let (alone, alone_p99, _) = writes(process, 500).await?;
    for filtered in [false, true] {
        let before = process.resident_mib();
        let received = Arc::new(AtomicU64::new(0));
        let synced = Arc::new(AtomicU64::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for first in (0..flags.watchers).step_by(WATCHERS_PER_CONNECTION) {
            let client = process.client()?;
            for _ in first..flags.watchers.min(first + WATCHERS_PER_CONNECTION) {
                let object_ids = if filtered { vec![uuid()] } else { vec![] };
                let request = wire::WatchRequest { object_ids, ..Default::default() };
                let (mut client, received, synced) = (client.clone(), received.clone(), synced.clone());
                tasks.spawn(async move {
                    let mut watch = client.watch(request).await?.into_inner();
                    while let Some(message) = watch.message().await? {
                        match message.message {
                            Some(Message::Event(_)) => received.fetch_add(1, Ordering::Relaxed),
                            Some(Message::Synced(_)) => synced.fetch_add(1, Ordering::Relaxed),
                            Some(Message::Progress(_)) | None => 0,
                        };
                    }
                    Ok::<(), tonic::Status>(())
                });
            }
        }
        while synced.load(Ordering::Relaxed) < flags.watchers as u64 {
            anyhow::ensure!(tasks.try_join_next().is_none(), "a watch ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let kib = (process.resident_mib() - before) * 1024.0 / flags.watchers as f64;
        let (cpu, idle) = (process.cpu(), Duration::from_secs(10));
        tokio::time::sleep(idle).await;
        let idle_cpu = (process.cpu() - cpu).as_secs_f64() / idle.as_secs_f64() * 100.0;

        let (cpu, begun) = (process.cpu(), Instant::now());
        let (p50, p99, _) = writes(process, CHANGES as usize).await?;
        let wanted = if filtered { 0 } else { CHANGES * flags.watchers as u64 };
        while received.load(Ordering::Relaxed) < wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (took, cpu) = (begun.elapsed().as_secs_f64(), (process.cpu() - cpu).as_secs_f64());
        let kind = if filtered { "each of another object" } else { "of everything" };
        println!("{} watchers {kind}: {kib:.1} KiB each, idle {idle_cpu:.1} % of a core", flags.watchers);
        println!(
            "  {CHANGES} changes: {wanted} messages in {took:.2} s, {cpu:.2} s of CPU; \
             a change p50 {p50:.2} p99 {p99:.2} ms (without watchers {alone:.2} and {alone_p99:.2})"
        );
        let key = if filtered { "filtered" } else { "all" };
        figures.note(&format!("{key}_kib_per_watcher"), kib);
        figures.note(&format!("{key}_idle_cpu_percent"), idle_cpu);
        figures.note(&format!("{key}_cpu_s_for_{CHANGES}_changes"), cpu);
        figures.note(&format!("{key}_messages_per_s"), wanted as f64 / took);
        figures.note(&format!("{key}_change_p50_ms"), p50);
        figures.note(&format!("{key}_change_p99_ms"), p99);
    }
    Ok(())
}

/// One watcher stops reading while others write, another comes again after each event. Both see every revision once.
async fn stalled(process: &Process, flags: &Flags, figures: &mut Figures) -> anyhow::Result<()> {
    let newest = revision(process).await?;
    let request = wire::WatchRequest { start_revision: newest + 1, ..Default::default() };
    let mut watch = process.client()?.watch(request).await?.into_inner();
    let before = process.resident_mib();
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (mut client, stop) = (process.client()?, stop.clone());
        writers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                client.create_job(job(uuid())).await?;
            }
            Ok::<(), tonic::Status>(())
        });
    }
    let end = Instant::now() + Duration::from_secs(flags.stall_seconds);
    let (mut client, mut seen, mut times, mut broken) = (process.client()?, newest, Vec::new(), 0);
    while Instant::now() < end {
        let begun = Instant::now();
        let next = match one_event(&mut client, seen + 1).await {
            Ok(next) => next,
            // h2 gives a connection up after a thousand streams that were dropped with data on its way.
            Err(_) => {
                broken += 1;
                client = process.client()?;
                continue;
            }
        };
        anyhow::ensure!(next == seen + 1, "{next} after {seen}");
        seen = next;
        times.push(begun.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers.join_all().await {
        writer?;
    }
    let grown = process.resident_mib() - before;
    let last = revision(process).await?;
    let begun = Instant::now();
    for expected in newest + 1..=last {
        let next = next_event(&mut watch).await?;
        anyhow::ensure!(next == expected, "{next} instead of {expected}");
    }
    let rate = (last - newest) as f64 / begun.elapsed().as_secs_f64();
    let reconnects = times.len() as f64 / flags.stall_seconds as f64;
    let (p50, p99, _) = summary(times);
    println!(
        "a watcher stalled for {} s and {} changes: the registry grew {grown:.1} MiB; it caught up at {rate:.0} events/s",
        flags.stall_seconds,
        last - newest
    );
    println!(
        "a watcher that comes again after each event: {reconnects:.0}/s, p50 {p50:.2} ms, p99 {p99:.2} ms, {broken} connections used up"
    );
    figures.note("stalled_growth_mib", grown);
    figures.note("stalled_catch_up_events_per_s", rate);
    figures.note("reconnect_p50_ms", p50);
    figures.note("reconnect_p99_ms", p99);
    Ok(())
}

async fn next_event(watch: &mut Streaming<wire::WatchResponse>) -> anyhow::Result<u64> {
    loop {
        let message = watch.message().await?.context("the watch ended")?;
        if let Some(Message::Event(_)) = message.message {
            return Ok(message.revision);
        }
    }
}

async fn one_event(client: &mut Client, start_revision: u64) -> anyhow::Result<u64> {
    let request = wire::WatchRequest { start_revision, ..Default::default() };
    next_event(&mut client.watch(request).await?.into_inner()).await
}

async fn revision(process: &Process) -> anyhow::Result<u64> {
    Ok(process.client()?.get_counts(wire::GetCountsRequest {}).await?.into_inner().revision)
}

/// What users and the scheduler ask for, each many times: median and 99th percentile.
async fn latencies(process: &Process) -> anyhow::Result<Vec<(&'static str, (f64, f64))>> {
    let client = process.client()?;
    let vms = client.clone().list_vms(wire::ListVmsRequest::default()).await?.into_inner().vms;
    let vm_id = vms.first().map_or_else(uuid, |vm| vm.id.clone());
    let newest = revision(process).await?;
    let mut table = Vec::new();
    macro_rules! measure {
        ($what:literal, $times:expr, |$client:ident| $call:expr) => {{
            let mut times = Vec::new();
            for _ in 0..$times {
                let mut $client = client.clone();
                let begun = Instant::now();
                $call;
                times.push(begun.elapsed());
            }
            let (p50, p99, _) = summary(times);
            table.push(($what, (p50, p99)));
        }};
    }
    let live = vec![pb::JobState::Queued.into(), pb::JobState::Assigned.into(), pb::JobState::Running.into()];
    let ended = vec![pb::JobState::Succeeded.into(), pb::JobState::Failed.into()];
    measure!("ListVms, the first 100", 200, |client| client.list_vms(wire::ListVmsRequest::default()).await?);
    measure!("ListJobs, live, 100", 200, |client| {
        client.list_jobs(wire::ListJobsRequest { states: live.clone(), ..Default::default() }).await?
    });
    measure!("ListJobs, ended, 100", 200, |client| {
        client.list_jobs(wire::ListJobsRequest { states: ended.clone(), ..Default::default() }).await?
    });
    measure!("ListJobs, of a node that has none", 20, |client| {
        client.list_jobs(wire::ListJobsRequest { node_id: "none".into(), ..Default::default() }).await?
    });
    measure!("ListVmEvents, of all, 100", 200, |client| {
        client.list_vm_events(wire::ListVmEventsRequest::default()).await?
    });
    measure!("ListVmEvents, of one VM", 200, |client| {
        client.list_vm_events(wire::ListVmEventsRequest { vm_id: vm_id.clone(), ..Default::default() }).await?
    });
    measure!("Watch, the event before the newest", 200, |client| {
        let request = wire::WatchRequest { start_revision: newest - 1, ..Default::default() };
        next_event(&mut client.watch(request).await?.into_inner()).await?
    });
    measure!("Watch, from the middle", 200, |client| {
        let request = wire::WatchRequest { start_revision: newest / 2, ..Default::default() };
        next_event(&mut client.watch(request).await?.into_inner()).await?
    });
    measure!("SQL, the history of one VM", 100, |client| {
        let sql = format!("SELECT * FROM vm_events WHERE vm_id = '{vm_id}' ORDER BY timestamp DESC");
        let mut answer = client.query(wire::QueryRequest { sql, ..Default::default() }).await?.into_inner();
        while answer.message().await?.is_some() {}
    });
    measure!("GetCounts", 20, |client| client.get_counts(wire::GetCountsRequest {}).await?);
    measure!("CreateJob, one after the other", 500, |client| client.create_job(job(uuid())).await?);
    println!("memory of its own: {:.0} MiB", process.resident_mib());
    Ok(table)
}

/// How fast one watcher reads a long past, and one that wants almost nothing of it.
async fn catch_up(process: &Process, newest: u64, figures: &mut Figures) -> anyhow::Result<()> {
    let events = newest.min(200_000);
    let request = wire::WatchRequest { start_revision: newest - events + 1, ..Default::default() };
    let (mut watch, begun) = (process.client()?.watch(request).await?.into_inner(), Instant::now());
    for _ in 0..events {
        next_event(&mut watch).await?;
    }
    let rate = events as f64 / begun.elapsed().as_secs_f64();
    let request = wire::WatchRequest { start_revision: 1, object_ids: vec![uuid()], ..Default::default() };
    let (mut watch, begun) = (process.client()?.watch(request).await?.into_inner(), Instant::now());
    while !matches!(watch.message().await?.context("the watch ended")?.message, Some(Message::Synced(_))) {}
    let filtered = newest as f64 / begun.elapsed().as_secs_f64();
    println!("catching up: {rate:.0} events/s sent, {filtered:.0} events/s filtered away");
    figures.note("catch_up_events_per_s", rate);
    figures.note("filtered_away_events_per_s", filtered);
    Ok(())
}

/// Compaction from all the events to a tenth: its pace, and what a change takes meanwhile.
async fn compaction(dir: &Path, events: u64, figures: &mut Figures) -> anyhow::Result<()> {
    let keep = events / 10;
    let process = Process::start(dir, keep)?;
    let oldest = async || -> anyhow::Result<u64> {
        let request = wire::WatchRequest { start_revision: 1, ..Default::default() };
        let Err(status) = process.client()?.watch(request).await else { return Ok(1) };
        let error = blixard::error::Error::from_status(&status);
        Ok(error.metadata.get("oldest_revision").context("oldest_revision")?.parse()?)
    };
    let (begun, first) = (Instant::now(), oldest().await?);
    let (p50, p99, max) = writes(&process, 3000).await?;
    let rate = (oldest().await? - first) as f64 / begun.elapsed().as_secs_f64();
    println!(
        "compaction beside one writer: {rate:.0} events/s; a change p50 {p50:.2} p99 {p99:.2} longest {max:.0} ms"
    );
    figures.note("compaction_events_per_s", rate);
    figures.note("change_p50_ms_beside_compaction", p50);
    figures.note("change_p99_ms_beside_compaction", p99);
    process.stop()
}

/// Adds events up to this revision, and the VMs and jobs that they are of. Returns the newest revision.
fn fill(dir: &Path, events: u64) -> anyhow::Result<u64> {
    let path = dir.join("registry/hiqlite/hiqlite.db");
    let database = rusqlite::Connection::open(&path)?;
    let newest: i64 =
        database.query_row("SELECT seq FROM sqlite_sequence WHERE name = 'events'", [], |row| row.get(0))?;
    let events = newest.max(events.cast_signed());
    // Triggers would write events of their own; an index is made faster at the end.
    let aside = "SELECT type, name, sql FROM sqlite_schema WHERE type = 'trigger' OR name = 'events_of_vms'";
    let aside: Vec<(String, String, String)> = database
        .prepare(aside)?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<_, _>>()?;
    database.execute_batch("PRAGMA synchronous = OFF; PRAGMA cache_size = -200000; BEGIN")?;
    for (kind, name, _) in &aside {
        database.execute_batch(&format!("DROP {kind} {name}"))?;
    }
    let id =
        |number: &str| format!("printf('%08x-0000-4000-8000-%012x', ({number}) * 2654435761 % 4294967296, {number})");
    let (vm, job) = (id("n / 50"), id("n / 20"));
    let from = |step: u32| {
        format!(
            "FROM (WITH RECURSIVE i(n) AS (SELECT {newest} + 1 UNION ALL SELECT n + {step} FROM i WHERE n + {step} <= {events}) SELECT n FROM i)"
        )
    };
    let time = "'2026-01-01T00:00:00.000Z'";
    let (of_vms, of_jobs, of_all) = (from(50), from(20), from(1));
    database.execute_batch(&format!(
        "INSERT INTO vms SELECT {vm}, 'service', iif(n > {events} - 5000, 'Ready', 'Terminated'), 'node-' || n % 100, 'default', 2,
             512, '{{}}', '{{\"kind\":\"service\",\"image\":\"default\",\"vcpus\":2,\"memory_mib\":512,\"labels\":{{}},\"node_id\":null}}', NULL, '', 3, n, {time},
             {time}, n {of_vms} WHERE true ON CONFLICT DO NOTHING;
         INSERT INTO jobs (id, state, command, image, vcpus, memory_mib, priority, max_attempts, labels, attempt,
             attempts_started, attempt_end, node_id, cancel_requested, exit_code, user_time_ms, system_time_ms, max_rss_kib,
             reason, log_bytes, generation, revision, created_at, updated_at, finished_at, created_revision, spec)
         SELECT {job}, 'Succeeded', 'sh -c true', 'default', 1, 128, 0, 1, '{{}}', 1, 1, 'result', 'node-' || n % 100, 0, 0, 1, 1,
             1, '', 6, 4, n, {time}, {time}, {time}, n, x'0a027368' {of_jobs} WHERE true ON CONFLICT DO NOTHING;
         INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, job_id, vm_id, node_id)
         SELECT n, {time}, iif(n % 2, 'vm', 'job'), iif(n % 2, {vm}, {job}), iif(n % 2, 'Starting', 'Assigned'),
             iif(n % 2, 'Ready', 'Running'), '', iif(n % 2, NULL, {job}), {vm}, 'node-' || n % 100 {of_all};"
    ))?;
    for (_, _, sql) in &aside {
        database.execute_batch(sql)?;
    }
    database.execute_batch("COMMIT; PRAGMA wal_checkpoint(TRUNCATE)")?;
    let mib = std::fs::metadata(&path)?.len() >> 20;
    println!("\nthe database with {events} events has {mib} MiB");
    Ok(events.cast_unsigned())
}
