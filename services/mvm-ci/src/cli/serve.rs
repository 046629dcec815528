//! `mvm-ci` without a command: the control plane in the foreground, until a signal.

use std::{ffi::OsString, process::ExitCode, time::Duration};

use blixard::{
    config::Config,
    pb::scheduler::v1::{GetStatsRequest, scheduler_service_client::SchedulerServiceClient},
    vm::VmState,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::failure::Failure;
use crate::ControlPlane;

/// Worker threads: the work is short and mostly waits, and memory grows with every thread.
const MAX_WORKERS: usize = 8;
/// The count of VMs in the farewell must not hold up the exit.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the control plane until SIGINT or SIGTERM.
pub(crate) fn serve(config: Config) -> Result<ExitCode, Failure> {
    blixard_chassis::telemetry::init(&format!("info,{},h2=warn,hyper=warn", blixard_registry::LOG_DIRECTIVES));
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(cores.clamp(2, MAX_WORKERS)).enable_all().build()?;
    let result = runtime.block_on(Box::pin(until_signalled(config)));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn until_signalled(config: Config) -> Result<ExitCode, Failure> {
    let mut signals =
        Signals { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? };
    tracing::info!("Starting VM Manager...");
    let agent = vec![std::env::current_exe()?.into_os_string(), OsString::from("guest-agent")];
    let plane = tokio::select! {
        started = Box::pin(ControlPlane::start(config, agent)) => {
            started.map_err(|error| Failure::Start(error.to_string()))?
        }
        code = signals.next() => return Ok(ExitCode::from(code)),
    };
    tracing::info!(listen = %plane.local_addr(), driver = %plane.driver(), "Control plane ready");

    tokio::select! {
        _ = signals.next() => {}
        reason = plane.failed() => {
            plane.shutdown().await;
            return Err(Failure::Start(reason));
        }
    }
    say_farewell(plane.endpoint()).await;
    tokio::select! {
        () = plane.shutdown() => tracing::info!("Control plane stopped"),
        code = signals.next() => std::process::exit(code.into()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what goes on after we have gone.
async fn say_farewell(endpoint: &str) {
    let alive = tokio::time::timeout(FAREWELL_TIMEOUT, count_vms(endpoint)).await.ok().flatten();
    match alive {
        Some(0) => tracing::info!("Shutting down; no VM is left running"),
        Some(vms) => tracing::info!(
            vms,
            "Shutting down; VMs keep running and the next start adopts them (to end them: start again, then `mvm-ci vm stop --all`)"
        ),
        None => tracing::info!("Shutting down; VMs keep running and the next start adopts them"),
    }
}

async fn count_vms(endpoint: &str) -> Option<u64> {
    let channel = blixard_chassis::client::channel(endpoint).ok()?;
    let stats = SchedulerServiceClient::new(channel).get_stats(GetStatsRequest {}).await.ok()?.into_inner();
    let alive = |state: i32| VmState::from_pb("state", state).is_ok_and(|state| !state.is_terminal());
    Some(stats.vm_states.iter().filter(|row| alive(row.state)).map(|row| row.count).sum())
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// The exit code of a process that the next signal ends.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }
}
