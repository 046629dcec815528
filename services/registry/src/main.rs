//! The `registry` process: one registry behind a gRPC server.

use std::{io::Write as _, process::ExitCode};

use anyhow::Context as _;
use blixard::config::ServerConfig;
use blixard_chassis::{Server, Tasks, metrics, settings, telemetry};
use blixard_registry::{LOG_DIRECTIVES, REPLICA_LOG_DIRECTIVES, Registry, RegistryConfig};
use clap::Command;

/// The name under which health tells the leader from its followers.
const LEADER_HEALTH: &str = "blixard.registry.v1.RegistryService/leader";

fn main() -> anyhow::Result<ExitCode> {
    if let Some(ended) = blixard_registry::query_worker(std::env::args_os()) {
        return Ok(ended);
    }
    let command = Command::new("registry")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The durable truth of a control plane: VMs, jobs, nodes and their events");
    let config = settings::load(&settings::add_flags(command).get_matches())?;
    let own = RegistryConfig::load(&config)?;
    let directives = if own.membership.is_some() { REPLICA_LOG_DIRECTIVES } else { LOG_DIRECTIVES };
    telemetry::init(&format!("info,{directives}"));

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(serve(config.server, own));
    // Hiqlite's threads take seconds to notice that nobody needs them any more.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

async fn serve(config: ServerConfig, own: RegistryConfig) -> anyhow::Result<()> {
    let tasks = Tasks::new();
    let metrics = metrics::serve(config.metrics_listen, &tasks).await?;
    // A replica listens where the list says. That the address is this machine's and free is also what keeps a second
    // replica of the same id from running.
    let server = Server::bind(own.listen(config.listen).await?).await?;
    let registry = Box::pin(Registry::start(own, &tasks)).await?;
    // For whoever started us with port 0.
    writeln!(std::io::stdout(), "registry listening on {}", server.local_endpoint())?;
    if let Some(address) = metrics {
        writeln!(std::io::stdout(), "registry metrics on http://{address}/metrics")?;
    }
    let served = server
        .serving_while(registry.serving())
        .with_health(LEADER_HEALTH, registry.leading())
        .add_service(registry.service())
        .add_service(registry.replica_service())
        .run(&tasks);
    tokio::select! {
        served = served => {
            // Last: calls that were let finish may still change something.
            registry.shutdown().await;
            served.context("serving")
        }
        // What is acknowledged is on the disk; whoever supervises this process starts it again.
        reason = registry.failed() => anyhow::bail!(reason),
    }
}
