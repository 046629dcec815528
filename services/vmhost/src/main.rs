//! `vmhost`: the VMs of this machine, as a service of its own.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use blixard::config::Config;
use blixard_chassis::{SecretKey, Server, Tasks, metrics, settings, telemetry};
use blixard_vmhost::{HealthConfig, LogLimits, Pace, VmHost, VmHostConfig, hypervisor::DiskLimit};
use clap::{Arg, ArgMatches, Command};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    telemetry::init("info");
    let arguments = command().get_matches();
    let config = settings::load(&arguments)?;
    let text = |name: &str| arguments.get_one::<String>(name).cloned();
    let server = Server::bind(config.server.listen).await?;
    let advertise = text("advertise").unwrap_or_else(|| server.local_endpoint());
    let agent = agent(&arguments)?;

    let tasks = Tasks::new();
    metrics::serve(config.server.metrics_listen, &tasks).await?;
    let secret_key = SecretKey::load(&config.storage.secret_key_file)?;
    let host = host_config(config, text("registry"), advertise, &agent, secret_key);
    let vmhost = VmHost::start(host, &tasks).await?;
    tracing::info!(address = %server.local_addr(), "vmhost serves");
    server.add_service(vmhost.service()).run(&tasks).await.context("serving")
}

/// The command line: a flag for each setting, and what only this process needs.
fn command() -> Command {
    let own = [
        Arg::new("registry")
            .long("registry")
            .env("BLIXARD_REGISTRY")
            .value_name("URL")
            .required(true)
            .help("Where the registry answers, as http://host:port"),
        Arg::new("advertise")
            .long("advertise")
            .env("BLIXARD_ADVERTISE")
            .value_name("URL")
            .help("Where others reach this vmhost, as http://host:port; by default where it listens"),
        Arg::new("agent")
            .long("agent")
            .env("BLIXARD_GUEST_AGENT")
            .value_name("PROGRAM")
            .help("The guest agent's program, for the process driver; by default beside this program"),
    ];
    settings::add_flags(Command::new("vmhost").about("Owns the microVMs of one node").args(own))
}

fn agent(arguments: &ArgMatches) -> anyhow::Result<PathBuf> {
    match arguments.get_one::<String>("agent") {
        Some(agent) => Ok(agent.into()),
        None => {
            let this = std::env::current_exe().context("cannot tell where this program is")?;
            Ok(this.with_file_name("blixard-guest-agent"))
        }
    }
}

fn host_config(
    config: Config,
    registry: Option<String>,
    advertise: String,
    agent: &Path,
    secret_key: Option<SecretKey>,
) -> VmHostConfig {
    VmHostConfig {
        node_id: config.server.node_id,
        vm_state_dir: config.storage.vm_state_dir,
        log_dir: config.storage.data_dir.join("logs"),
        driver: config.firecracker.driver,
        disk_limit: DiskLimit::from(&config.firecracker),
        image_dir: config.firecracker.image_dir,
        vm_uids: config.firecracker.vm_uids,
        agent_command: vec![agent.into()],
        max_vms: config.firecracker.max_concurrent_vms,
        templates: config.firecracker.templates,
        registry_endpoint: registry.unwrap_or_default(),
        advertise_endpoint: advertise,
        secret_key,
        network: config.network,
        volumes: config.storage.volumes.0,
        health: HealthConfig::from(&config.vm_manager),
        logs: LogLimits::from(&config.retention),
        watch: None,
        node_labels: config.server.node_labels.0,
        pace: Pace::default(),
    }
}
