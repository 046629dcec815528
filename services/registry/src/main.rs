//! The `registry` process: one registry behind a gRPC server.

use std::{io::Write as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use blixard::config::Config;
use blixard_chassis::{Server, Tasks, telemetry};
use blixard_registry::{LOG_DIRECTIVES, Registry, RegistryConfig};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Time for tasks to end at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// The durable truth of a control plane: VMs, jobs, nodes and their events.
#[derive(Parser)]
#[command(name = "registry", version)]
struct Flags {
    /// TOML file with settings.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the database is: `hiqlite/` below it.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Where gRPC is served; port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
}

fn main() -> anyhow::Result<()> {
    telemetry::init(&format!("info,{LOG_DIRECTIVES}"));
    let config = load(&Flags::parse())?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(Box::pin(run(config)))
}

fn load(flags: &Flags) -> anyhow::Result<Config> {
    let file = match &flags.config {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some((path.display().to_string(), text))
        }
    };
    let file = file.as_ref().map(|(path, text)| (path.as_str(), text.as_str()));
    let flag = |name: &str| match name {
        "data-dir" => flags.data_dir.clone(),
        "listen" => flags.listen.clone(),
        _ => None,
    };
    Ok(Config::load(file, |name| std::env::var(name).ok(), flag)?)
}

async fn run(config: Config) -> anyhow::Result<()> {
    let tasks = Tasks::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let server = Server::bind(config.server.listen).await?;
    let registry = Registry::start(RegistryConfig { data_dir: config.storage.data_dir }, &tasks).await?;
    // One line for whoever started us with port 0.
    writeln!(std::io::stdout(), "registry listening on {}", server.local_endpoint())?;

    let stop = tasks.token().clone();
    tasks.spawn("signals", async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            () = stop.cancelled() => {}
        }
        stop.cancel();
    });
    let served = server.add_service(registry.service()).serve(&tasks).await;
    tasks.shutdown(SHUTDOWN_GRACE).await;
    registry.shutdown().await;
    Ok(served?)
}
