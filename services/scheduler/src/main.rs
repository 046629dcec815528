//! The scheduler as a process of its own.

use anyhow::Context as _;
use blixard_chassis::{Server, Tasks, metrics, secrets::SecretKey, settings, telemetry};
use blixard_scheduler::{Scheduler, SchedulerConfig};
use clap::{Arg, Command};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    telemetry::init("info");
    let own = [
        Arg::new("registry")
            .long("registry")
            .env("BLIXARD_REGISTRY")
            .value_name("URL")
            .required(true)
            .help("Where the registry answers, as http://host:port"),
        Arg::new("name").long("name").env("BLIXARD_SCHEDULER_NAME").value_name("NAME").help(
            "Its name among the schedulers: the same at each start, and nobody else's; by default this machine's name and \
             where it listens",
        ),
    ];
    let command = Command::new("scheduler").about("Routes jobs to microVMs").args(own);
    let matches = settings::add_flags(command).get_matches();
    let config = settings::load(&matches)?;
    let registry_endpoint = matches.get_one::<String>("registry").cloned().unwrap_or_default();

    let secret_key = SecretKey::load(&config.storage.secret_key_file)?;
    let tasks = Tasks::new();
    metrics::serve(config.server.metrics_listen, &tasks).await?;
    let server = Server::bind(config.server.listen).await?;
    let mut config = SchedulerConfig::new(&config, registry_endpoint, secret_key);
    config.name = match matches.get_one::<String>("name") {
        Some(name) => name.clone(),
        None => format!("{}/{}", rustix::system::uname().nodename().to_string_lossy(), server.local_addr()),
    };
    let scheduler = Scheduler::start(config, &tasks).await?;
    tracing::info!("Scheduler ready listen={}", server.local_addr());
    server.add_service(scheduler.service()).run(&tasks).await.context("serving")
}
