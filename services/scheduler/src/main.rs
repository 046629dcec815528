//! The scheduler as a process of its own.

use anyhow::Context as _;
use blixard_chassis::{Server, Tasks, metrics, settings, telemetry};
use blixard_scheduler::{Scheduler, SchedulerConfig};
use clap::{Arg, Command};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    telemetry::init("info");
    let command = Command::new("scheduler").about("Routes jobs to microVMs").arg(
        Arg::new("registry")
            .long("registry")
            .env("BLIXARD_REGISTRY")
            .value_name("URL")
            .required(true)
            .help("Where the registry answers, as http://host:port"),
    );
    let matches = settings::add_flags(command).get_matches();
    let config = settings::load(&matches)?;
    let registry_endpoint = matches.get_one::<String>("registry").cloned().unwrap_or_default();

    let tasks = Tasks::new();
    metrics::serve(config.server.metrics_listen, &tasks).await?;
    let server = Server::bind(config.server.listen).await?;
    let scheduler = Scheduler::start(
        SchedulerConfig {
            registry_endpoint,
            max_vms: config.firecracker.max_concurrent_vms,
            auto_scaling: config.vm_manager.auto_scaling,
            pre_warm_count: config.vm_manager.pre_warm_count,
            defaults: config.defaults(),
        },
        &tasks,
    )
    .await?;
    tracing::info!("Scheduler ready listen={}", server.local_addr());
    server.add_service(scheduler.service()).run(&tasks).await.context("serving")
}
