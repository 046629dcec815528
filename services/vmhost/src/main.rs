//! `vmhost`: the VMs of this machine, as a service of its own.

use std::{net::SocketAddr, path::Path, process::ExitCode};

use anyhow::Context;
use blixard::config::{Config, SETTINGS};
use blixard_chassis::{Server, Tasks, telemetry};
use blixard_vmhost::{VmHost, VmHostConfig};
use clap::{Arg, ArgMatches, Command};
use tokio::signal::unix::{SignalKind, signal};

/// How long tasks have to end after the server has.
const SHUTDOWN_GRACE: std::time::Duration = std::time::Duration::from_secs(5);

fn main() -> ExitCode {
    telemetry::init("info");
    let arguments = command().get_matches();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(&arguments)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmhost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command line: a flag for each setting, and what only this process needs.
fn command() -> Command {
    let own = [
        Arg::new("config").long("config").value_name("FILE").help("TOML file with settings"),
        Arg::new("registry")
            .long("registry")
            .env("BLIXARD_REGISTRY")
            .default_value("http://127.0.0.1:50051")
            .help("Where the registry answers"),
        Arg::new("advertise")
            .long("advertise")
            .env("BLIXARD_ADVERTISE")
            .value_name("http://HOST:PORT")
            .help("Where others reach this vmhost; by default where it listens"),
        Arg::new("agent")
            .long("agent")
            .env("BLIXARD_GUEST_AGENT")
            .value_name("PROGRAM")
            .help("The guest agent's program, for the process driver; by default beside this program"),
    ];
    let settings = SETTINGS.iter().map(|setting| {
        let help = format!("{} ({}) [env: {}]", setting.help, setting.allowed, setting.env);
        Arg::new(setting.flag).long(setting.flag).value_name("VALUE").help(help)
    });
    Command::new("vmhost").about("Owns the microVMs of one node").args(own).args(settings)
}

fn load(arguments: &ArgMatches) -> anyhow::Result<Config> {
    let path = arguments.get_one::<String>("config");
    let text =
        path.map(|path| std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))).transpose()?;
    let file = path.zip(text.as_ref()).map(|(path, text)| (path.as_str(), text.as_str()));
    let env = |name: &str| std::env::var(name).ok();
    Ok(Config::load(file, env, |flag| arguments.get_one::<String>(flag).cloned())?)
}

async fn run(arguments: &ArgMatches) -> anyhow::Result<()> {
    let config = load(arguments)?;
    let text = |name: &str| arguments.get_one::<String>(name).cloned();
    let server = Server::bind(config.server.listen).await?;
    let advertise = text("advertise").unwrap_or_else(|| server.local_endpoint());
    let agent = match text("agent") {
        Some(agent) => agent.into(),
        None => {
            std::env::current_exe().context("cannot tell where this program is")?.with_file_name("blixard-guest-agent")
        }
    };
    let tasks = Tasks::new();
    let vmhost = VmHost::start(host_config(config, text("registry"), advertise, &agent), &tasks).await?;
    let address: SocketAddr = server.local_addr();
    tracing::info!(%address, "vmhost serves");
    let serving = tasks.child();
    let ending = tasks.clone();
    tasks.spawn("signals", async move { end_on_signal(&ending).await });
    server.add_service(vmhost.service()).serve(&serving).await?;
    tasks.shutdown(SHUTDOWN_GRACE).await;
    Ok(())
}

fn host_config(config: Config, registry: Option<String>, advertise: String, agent: &Path) -> VmHostConfig {
    VmHostConfig {
        node_id: config.server.node_id,
        vm_state_dir: config.storage.vm_state_dir,
        log_dir: config.storage.data_dir.join("logs"),
        driver: config.firecracker.driver,
        image_dir: config.firecracker.image_dir,
        agent_command: vec![agent.into()],
        max_vms: config.firecracker.max_concurrent_vms,
        registry_endpoint: registry.unwrap_or_default(),
        advertise_endpoint: advertise,
    }
}

/// Ends everything at SIGTERM or Ctrl-C.
async fn end_on_signal(tasks: &Tasks) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("signals can't be caught; only kill -9 ends this process");
        return;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
        () = tasks.token().cancelled() => {}
    }
    tasks.token().cancel();
}
