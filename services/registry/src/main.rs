//! The `registry` process: one registry behind a gRPC server.

use std::io::Write as _;

use anyhow::Context as _;
use blixard_chassis::{Server, Tasks, settings, telemetry};
use blixard_registry::{LOG_DIRECTIVES, Registry, RegistryConfig};
use clap::Command;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    telemetry::init(&format!("info,{LOG_DIRECTIVES}"));
    let command = Command::new("registry")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The durable truth of a control plane: VMs, jobs, nodes and their events");
    let config = settings::load(&settings::add_flags(command).get_matches())?;

    let tasks = Tasks::new();
    let server = Server::bind(config.server.listen).await?;
    let registry = Box::pin(Registry::start(RegistryConfig { data_dir: config.storage.data_dir }, &tasks)).await?;
    // One line for whoever started us with port 0.
    writeln!(std::io::stdout(), "registry listening on {}", server.local_endpoint())?;
    let served = server.add_service(registry.service()).run(&tasks).await;
    // Last: calls that were let finish may still change something.
    registry.shutdown().await;
    served.context("serving")
}
