//! The scheduler as a process of its own.

use anyhow::Context as _;
use blixard::id::{NAME_ALLOWED, is_name};
use blixard_chassis::{Server, Tasks, metrics, secrets::SecretKey, settings, telemetry};
use blixard_scheduler::{Scheduler, SchedulerConfig};
use clap::{Arg, Command};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    telemetry::init("info");
    let command = Command::new("scheduler")
        .about("Routes jobs to microVMs")
        .arg(
            Arg::new("registry")
                .long("registry")
                .env("BLIXARD_REGISTRY")
                .value_name("URL")
                .required(true)
                .help("Where the registry answers, as http://host:port"),
        )
        .arg(
            Arg::new("name")
                .long("name")
                .env("BLIXARD_SCHEDULER_NAME")
                .value_name("NAME")
                .value_parser(|name: &str| if is_name(name) { Ok(name.to_owned()) } else { Err(NAME_ALLOWED) })
                .help("Its name, the same at each start and no other scheduler's; the node's when left out"),
        );
    let matches = settings::add_flags(command).get_matches();
    let config = settings::load(&matches)?;
    let registry_endpoint = matches.get_one::<String>("registry").cloned().unwrap_or_default();

    let secret_key = SecretKey::load(&config.storage.secret_key_file)?;
    let tasks = Tasks::new();
    metrics::serve(config.server.metrics_listen, &tasks).await?;
    let server = Server::bind(config.server.listen).await?;
    let mut own = SchedulerConfig::new(&config, registry_endpoint, secret_key);
    if let Some(name) = matches.get_one::<String>("name") {
        own.name.clone_from(name);
    }
    let scheduler = Scheduler::start(own, &tasks).await?;
    tracing::info!("Scheduler ready listen={}", server.local_addr());
    server.add_service(scheduler.service()).run(&tasks).await.context("serving")
}
