//! The code of the user's guide against a running control plane:
//!
//! ```text
//! cargo run --bin mvm-ci -- --driver process &
//! cargo run -p mvm-ci --example usage_guide
//! ```

use blixard::{
    error::Error,
    sdk::{AppState, Job, JobType, VmAssignment, VmConfig},
};
use uuid::Uuid;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let endpoint = std::env::var("BLIXARD_ENDPOINT").unwrap_or_else(|_| "http://127.0.0.1:50051".to_owned());
    println!("{}", guide(&endpoint).await?);
    Ok(())
}

/// Starts a VM, runs a job in it, stops it, lets a second job be routed; returns what was seen.
pub(crate) async fn guide(endpoint: &str) -> Result<String, Error> {
    let state = AppState::connect(endpoint).await?;
    let vm_manager = state.infrastructure().vm_manager();

    // Start a new VM
    let config = VmConfig::default_ephemeral();
    let vm_instance = vm_manager.start_vm(config).await?;

    // Submit job to specific VM
    let job = Job { command: vec!["uname".into(), "-r".into()], ..Job::default() };
    let result = vm_manager.submit_job_to_vm(vm_instance.config.id, job).await?;
    let mut seen = format!("uname -r: {:?} {:?}\n", result.state, result.exit);

    // Stop a VM
    vm_manager.stop_vm(vm_instance.config.id).await?;

    // Submit job - VM Manager will route to best VM
    let job = Job { id: Uuid::new_v4(), job_type: JobType::Execute, command: vec!["true".into()], ..Job::default() };
    seen += &match vm_manager.execute_job(job).await? {
        VmAssignment::Ephemeral(vm_id) => format!("a VM of its own: {vm_id}\n"),
        VmAssignment::Service(vm_id) => format!("a service VM: {vm_id}\n"),
    };

    // Get VM statistics
    let stats = vm_manager.get_stats().await?;
    seen += &format!("Total VMs: {}, Running: {}", stats.total_vms, stats.running_vms);
    Ok(seen)
}
