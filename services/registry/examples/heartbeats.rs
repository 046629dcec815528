//! Measures what the heartbeats of many vmhosts cost a `registry` process.
//!
//! ```text
//! cargo build [--release] -p blixard-registry --bin registry
//! cargo run [--release] -p blixard-registry --example heartbeats [-- --nodes 1000 --seconds 20]
//! ```
//! Each node has a connection of its own, registers, and sends heartbeats as often as the registry asks for. Prints the
//! registry's CPU time and memory with the connections open and silent, and with heartbeats.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use blixard::pb::{
    common::v1 as pb,
    registry::v1::{self as wire, registry_service_client::RegistryServiceClient},
};
use blixard_chassis::client;
use clap::Parser;
use futures::stream;
use tokio::sync::{Semaphore, mpsc, watch};

/// Connections that are being made at once.
const CONNECTING: usize = 32;

#[derive(Parser)]
struct Flags {
    /// How many vmhosts.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Length of each measurement.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

/// The process that is measured; ended with the program.
struct Registry(Child);

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let dir = tempfile::tempdir()?;
    let (registry, endpoint) = start(&dir)?;
    let length = Duration::from_secs(flags.seconds);
    let before = usage(&registry)?;

    let (begin, begun) = watch::channel(false);
    let (heard, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (registered, mut waiting) = mpsc::channel(flags.nodes);
    let slots = Arc::new(Semaphore::new(CONNECTING));
    let mut nodes = tokio::task::JoinSet::new();
    for node in 0..flags.nodes {
        let (endpoint, begun, heard, failed) = (endpoint.clone(), begun.clone(), heard.clone(), failed.clone());
        let (registered, slots) = (registered.clone(), slots.clone());
        nodes.spawn(async move {
            if let Err(error) = live(&endpoint, node, &slots, registered, begun, &heard).await {
                eprintln!("node {node}: {error:#}");
                failed.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    drop(registered);
    let mut count = 0;
    while count < flags.nodes && waiting.recv().await.is_some() {
        count += 1;
    }
    println!("{count} nodes registered; memory {} MiB, before {} MiB", usage(&registry)?.1, before.1);
    // Well within the grace of the first to have registered.
    let (silent, _) = measure(&registry, Duration::from_secs(5)).await?;
    println!("silent: {silent:.2} % of a core");

    begin.send_replace(true);
    // Until all streams are open.
    tokio::time::sleep(Duration::from_secs(3)).await;
    heard.store(0, Ordering::Relaxed);
    let begun = Instant::now();
    let (busy, memory) = measure(&registry, length).await?;
    let rate = heard.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    let failed = failed.load(Ordering::Relaxed);
    println!("{rate:.0} heartbeats/s: {busy:.2} % of a core, {memory} MiB, {failed} nodes failed");
    nodes.shutdown().await;
    Ok(())
}

/// Percent of a core that a process uses for this long, and its memory then.
async fn measure(registry: &Registry, length: Duration) -> anyhow::Result<(f64, u64)> {
    let ((before, _), begun) = (usage(registry)?, Instant::now());
    tokio::time::sleep(length).await;
    let (after, memory) = usage(registry)?;
    Ok((100.0 * (after - before) / begun.elapsed().as_secs_f64(), memory))
}

fn start(dir: &tempfile::TempDir) -> anyhow::Result<(Registry, String)> {
    let program: PathBuf = std::env::current_exe()?.ancestors().nth(2).context("no target directory")?.join("registry");
    let mut child = Command::new(&program)
        .args(["--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} (build it first)", program.display()))?;
    let lines = BufReader::new(child.stdout.take().context("no output")?).lines().map_while(Result::ok);
    let registry = Registry(child);
    let mut endpoints = lines.filter_map(|line| Some(line.strip_prefix("registry listening on ")?.to_owned()));
    Ok((registry, endpoints.next().context("the registry did not start")?))
}

/// A vmhost, as far as the registry sees it.
async fn live(
    endpoint: &str,
    node: usize,
    slots: &Semaphore,
    registered: mpsc::Sender<()>,
    mut begun: watch::Receiver<bool>,
    heard: &AtomicU64,
) -> anyhow::Result<()> {
    let mut registry = RegistryServiceClient::new(client::channel(endpoint)?);
    let node_id = format!("node-{node}");
    let offer = pb::Node { id: node_id.clone(), endpoint: "http://h:1".into(), max_vms: 1, ..Default::default() };
    let request = wire::RegisterNodeRequest { node: Some(offer), ..Default::default() };
    let slot = slots.acquire().await?;
    let incarnation = registry.register_node(request).await?.into_inner().node.unwrap_or_default().incarnation;
    drop(slot);
    registered.send(()).await?;
    begun.wait_for(|begun| *begun).await?;

    let (beats, receiver) = mpsc::channel(1);
    let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let mut answers = registry.heartbeat(requests).await?.into_inner();
    loop {
        beats.send(wire::HeartbeatRequest { node_id: node_id.clone(), incarnation }).await?;
        let answer = answers.message().await?.context("the stream ended")?;
        heard.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(answer.interval_ms.into())).await;
    }
}

/// CPU seconds that a process has used, and its resident memory in MiB.
fn usage(Registry(process): &Registry) -> anyhow::Result<(f64, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id()))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // User and system time, in hundredths of a second on Linux; resident pages of 4 KiB.
    let number =
        |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).context("an odd /proc/PID/stat");
    Ok(((number(11)? + number(12)?) as f64 / 100.0, number(21)? * 4 / 1024))
}
