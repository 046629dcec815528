//! What vmhost does first: every VM that an earlier one left is adopted, or ended and reported.
//!
//! VMs outlive vmhost, so a kill -9 may fall between any two steps. What each leaves, and what the next start makes of it:
//!
//! | killed after | finds | does |
//! |---|---|---|
//! | StartVm arrived | no `vm.json` | removes the directory; the registry still says Starting and the scheduler sends StartVm again |
//! | `vm.json` written | no machine | the same |
//! | a TAP made, whole or half | a TAP that no record owns any more | the same; deletes the TAP |
//! | a cgroup made, or its directory given to its user | both, as `vm.json` names them | the same; removes the cgroup |
//! | processes started, to boot or restored from a template | processes, perhaps without a record of theirs | ends them (by environment, cgroup and user), then the same |
//! | the agent answered, but its identity was not noted | processes | the same |
//! | the agent's identity was noted | `guest_boot` | adopts; reports Ready (again) |
//! | Ready reported | `guest_boot` | the same; the report changes nothing |
//! | RunJob arrived | perhaps an empty log directory | nothing: the job is still Assigned and RunJob comes again; the fence lets an attempt pass whose log was never begun |
//! | `attempt.json` written, its input being fetched | the attempt, unknown to the guest | attaches; the guest never heard of it: reports it lost, never started, and the scheduler queues it again for free |
//! | the guest was asked | the attempt in the guest | attaches at the end of its log; reports Running (again) |
//! | output written, not acknowledged | a longer log than the guest knows | attaches at the log's end: nothing twice |
//! | half a record written | a torn record | cuts it off; the guest still has those bytes: nothing lost |
//! | the job was sent SIGTERM | `cause` in `attempt.json` | sends SIGTERM again and SIGKILL after the grace |
//! | the command exited | the attempt in the guest, ended | attaches; gets the end again |
//! | half of its artifacts fetched | `artifacts.new` | fetches them all again |
//! | the log's end record written | a log with its end | reports it (again); an ephemeral VM is shut down |
//! | the end reported | the same | the same; the report changes nothing |
//! | ResizeVm accepted, or its machine is being changed | `shapes.next` in `vm.json` | asks the hypervisor for it (again), then as below |
//! | the machine changed, and that was noted | `shapes.now` | reports the shape (again); the report changes nothing |
//! | StopVm accepted | `stop` in `vm.json` | goes on stopping, with what is left of the grace |
//! | the guest was told to end, or killed | perhaps no machine any more | reports Terminated: `stop`, or the end of an ephemeral VM's job, tells that it was wanted |
//! | the machine died | no machine | reports the attempt lost, then Failed |
//! | `end` written | `end` in `vm.json` | ends what is left, reports that end |
//! | the end reported | the same | the same; the registry has it already; removes the directory |
//! | a template was begun | `.templates/<key>.new`, perhaps processes | ends and removes them (`templates`) |
//! | a template became whole | `.templates/<key>` | uses it while it is current, else removes it |
//!
//! A VM of the registry that has no directory here, and a VM here that the registry takes for ended, are found when the node
//! registers (`reconcile`).

use std::{io, sync::Arc, time::Duration};

use blixard::{
    error::Error,
    id::VmId,
    vm::{VmConfig, VmKind, VmState},
};
use futures::future::join_all;

use crate::{
    driver::{self, Beginning, with_sources},
    guest::AgentLink,
    host::Host,
    hypervisor::{Launch, Machine, end_cgroup},
    lifecycle::{Input, Lifecycle, Limits, Run},
    logs::{LogWriter, Outcome},
    records::{AttemptRecord, VmDir, VmRecord},
    reporter::Report,
};

/// How long the agent of a VM that lives has to answer a new vmhost. Its guest is up; it may be busy. The node registers only
/// afterwards, and until then no attempt's lease is renewed: this is half of one.
const ADOPT_PATIENCE: Duration = Duration::from_secs(15);

/// Adopts or ends every VM that has a directory.
pub(crate) async fn recover(host: &Arc<Host>) -> io::Result<()> {
    let ids = host.state.list()?;
    end_leftover_cgroups(host).await;
    if ids.is_empty() {
        return Ok(());
    }
    join_all(ids.iter().map(|id| recover_vm(host, *id))).await;
    let alive = host.vms().values().filter(|vm| !vm.view.borrow().state.is_terminal()).count();
    tracing::info!(found = ids.len(), adopted = alive, "VMs of an earlier vmhost recovered");
    Ok(())
}

/// Those that no record stands for, as of a template that was being made.
async fn end_leftover_cgroups(host: &Host) {
    let cgroups = host.containment.cgroups().unwrap_or_else(|error| {
        tracing::error!(%error, "the cgroups of VMs can't be listed");
        Vec::new()
    });
    for (vm_id, path) in cgroups {
        if matches!(host.state.vm(vm_id).vm(), Ok(None))
            && let Err(error) = end_cgroup(path).await
        {
            tracing::error!(%vm_id, error = with_sources(&error), "a cgroup is left");
        }
    }
}

async fn recover_vm(host: &Arc<Host>, id: VmId) {
    let dir = host.state.vm(id);
    let record = dir.vm().unwrap_or_else(|error| {
        tracing::error!(vm_id = %id, %error, "a VM's record is damaged; what is left of the VM is ended");
        None
    });
    match record {
        Some(record) if record.guest_boot.is_some() || record.stop.is_some() || record.end.is_some() => {
            revive(host, id, &dir, record).await;
        }
        // Never Ready, so no job has met it: it is started afresh when the scheduler asks again.
        Some(record) => remove(host, id, &dir, &host.launch_of(id, &record)).await,
        None => remove(host, id, &dir, &host.launch(id, &unknown_config())).await,
    }
}

async fn remove(host: &Host, id: VmId, dir: &VmDir, launch: &Launch) {
    sweep(host, launch).await;
    if let Err(error) = dir.remove().await {
        tracing::error!(vm_id = %id, %error, "the directory of a VM can't be removed");
    }
}

async fn sweep(host: &Host, launch: &Launch) {
    if let Err(error) = host.hypervisor.sweep(launch).await {
        tracing::error!(vm_id = %launch.vm_id, error = with_sources(&error), "processes of a VM are left");
    }
}

/// For a VM whose record can't be read: sweeping needs only its id and directory.
fn unknown_config() -> VmConfig {
    VmConfig {
        kind: VmKind::Ephemeral,
        image: String::new(),
        vcpus: 1,
        memory_mib: 1,
        labels: std::collections::BTreeMap::new(),
        node_id: None,
        egress: Default::default(),
        volumes: Default::default(),
    }
}

/// Puts a driver back in charge of a VM, alive or dead.
async fn revive(host: &Arc<Host>, id: VmId, dir: &VmDir, record: VmRecord) {
    if let (Ok(network), Some(lease)) = (&host.network, &record.lease) {
        network.restore(id, lease.clone(), record.config.egress.clone());
    }
    host.containment.restore(id, &record.place);
    let attempt = dir.attempt().unwrap_or_else(|error| {
        tracing::error!(vm_id = %id, %error, "an attempt's record is damaged");
        None
    });
    let attempt = attempt.and_then(|attempt| match host.logs.reopen(attempt.job, attempt.attempt) {
        Ok(log) => Some((attempt, log)),
        Err(error) => {
            tracing::error!(vm_id = %id, job_id = %attempt.job, %error, "an attempt's log can't be opened");
            None
        }
    });
    let machine = match adopt(host, id, &record).await {
        Ok(machine) => machine,
        Err(problem) => {
            tracing::warn!(vm_id = %id, problem, "a VM can't be adopted and is ended");
            sweep(host, &host.launch_of(id, &record)).await;
            None
        }
    };
    let vm = driver::spawn(host, beginning(host, id, record, machine, attempt));
    host.vms().insert(id, vm);
}

type Adopted = (Arc<dyn Machine>, Arc<AgentLink>);

/// The machine and the way to its agent, if both are alive and the guest has not restarted.
async fn adopt(host: &Host, id: VmId, record: &VmRecord) -> Result<Option<Adopted>, String> {
    let Some(guest_boot) = record.guest_boot.as_ref().filter(|_| record.end.is_none()) else {
        sweep(host, &host.launch_of(id, record)).await;
        return Ok(None);
    };
    let adopted = host.hypervisor.adopt(&host.launch_of(id, record)).await;
    let Some(machine) = adopted.map_err(|error| with_sources(&error))? else { return Ok(None) };
    // It has had its identity since it was Ready, and its volumes with it.
    let link = Arc::new(AgentLink::new(id, Arc::clone(&machine), host.guest_network(record), vec![], false));
    let problem = match tokio::time::timeout(ADOPT_PATIENCE, link.introduce()).await {
        Ok(Ok(agent)) if agent.hello.boot_id == *guest_boot => return Ok(Some((machine, link))),
        Ok(Ok(_)) => "its guest restarted".to_owned(),
        Ok(Err(error)) => Error::to_string(&error),
        Err(_) => format!("its agent did not answer within {} s", ADOPT_PATIENCE.as_secs()),
    };
    machine.kill().await;
    Err(problem)
}

fn beginning(
    host: &Host,
    id: VmId,
    mut record: VmRecord,
    machine: Option<Adopted>,
    attempt: Option<(AttemptRecord, LogWriter)>,
) -> Beginning {
    let mut reports = Vec::new();
    let mut inputs = Vec::new();
    let used = attempt.is_some();
    if machine.is_some() && !used {
        reports.push(Report::Ready);
    }
    if let (Some(_), Some(shape)) = (&machine, record.shapes.now) {
        reports.push(Report::Resized { shape, reply: None });
    }
    let run = attempt.as_ref().map(|(attempt, _)| run_of(attempt));
    let ended = attempt.as_ref().and_then(|(_, log)| log.end());
    let attempt = attempt.map(|(attempt, log)| match &ended {
        Some(end) => {
            let (job, number) = (attempt.job, attempt.attempt);
            host.logs.close(job, number);
            reports.push(Report::Finished { job, attempt: number, end: Arc::clone(end) });
            (attempt, None)
        }
        None => (attempt, Some(log)),
    });
    // An ended attempt occupies a living VM until it has been asked what comes next.
    let run = run.filter(|_| machine.is_some() || ended.is_none());
    if machine.is_some() && ended.is_some() {
        inputs.push(Input::WasOver);
    }
    if machine.is_some() && ended.is_none() {
        inputs.push(Input::Resumed);
    }
    let mut life = Lifecycle::adopted(record.config.kind, run, used);
    if machine.is_none() {
        let told_to_end = record.config.kind == VmKind::Ephemeral
            && ended.is_some_and(|end| matches!(end.outcome, Outcome::Result { .. }));
        let end = told_to_end.then(|| (VmState::Terminated, "its job has ended".to_owned()));
        life = life.decided(record.end.take().or(end), record.stop.clone());
        inputs.push(Input::MachineExited { how: "it ended while vmhost was down".to_owned() });
    } else if let Some(stop) = record.stop.clone() {
        inputs.insert(0, Input::Stop(stop));
    }
    Beginning { id, record, life, machine, attempt, reports, inputs }
}

fn run_of(attempt: &AttemptRecord) -> Run {
    let limit = |ms| (ms > 0).then(|| Duration::from_millis(ms));
    let limits = Limits { run: limit(attempt.timeout_ms), start: limit(attempt.start_timeout_ms) };
    Run { cause: attempt.cause, ..Run::new(attempt.job, attempt.attempt, limits, attempt.arrived_at) }
}
