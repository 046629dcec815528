//! Looks at the machine again and again, says how it is, and has VMs end where [`Pressure`] decides so; and those whose hypervisor takes more
//! of the disk than it may.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use blixard::{node::HostPressure, vm::VmState};

use super::{Candidate, Doing, Level, Observation, Pressure, Relief};
use crate::{driver::VmHandle, host::Host, lifecycle::Input, node_lease, volumes::overgrown};

/// How often. A look takes some ten microseconds, and a guest that takes a GiB a second has used up a small node's reserve in one.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the node says of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told {
    /// What it is short of.
    pub(crate) pressure: BTreeSet<HostPressure>,
    /// The same, for people.
    pub(crate) words: String,
}

/// Keeps looking, for ever.
pub(crate) async fn keep(host: &Arc<Host>, mut pressure: Pressure) {
    loop {
        tokio::time::sleep(host.pace.look_at_host_every).await;
        look(host, &mut pressure).await;
    }
}

/// Looks once.
pub(crate) async fn look(host: &Arc<Host>, pressure: &mut Pressure) {
    let (watch, own) = (host.watch.clone(), Arc::clone(host));
    let Ok((seen, grown)) = tokio::task::spawn_blocking(move || (watch.look(), grown(&own))).await else { return };
    for (vm, problem) in grown {
        tracing::error!(vm_id = %vm.id, problem, "a VM's hypervisor is not to be trusted; the VM is ended");
        vm.try_tell(Input::Misbehaves { reason: format!("its hypervisor is not to be trusted: {problem}") });
    }
    let vms: Vec<Candidate> = host.vms().values().filter_map(candidate).collect();
    let before = pressure.levels();
    let relief = pressure.step(node_lease::now(), &seen, &vms);
    let words = words(&seen);
    if pressure.levels() != before {
        report(before, pressure.levels(), &words);
    }
    let told = Told { pressure: pressure.told(), words: words.clone() };
    if !told.pressure.is_empty() {
        host.templates.give_way();
    }
    host.pressure.send_if_modified(|known| {
        let changed = known.pressure != told.pressure;
        *known = told;
        changed
    });
    let Some(relief) = relief else { return };
    let (Relief::Retire(vm_id) | Relief::Kill(vm_id)) = relief;
    let Some(vm) = host.vm(vm_id) else { return };
    let reason = format!("its node ran out of memory: {words}");
    match relief {
        Relief::Retire(_) => {
            tracing::warn!(%vm_id, words, "this node runs out of memory; a VM that runs nothing is ended");
            vm.try_retire(reason);
        }
        Relief::Kill(_) => {
            tracing::error!(%vm_id, words, "this node runs out of memory; a VM is ended with its attempt, which is lost");
            vm.try_tell(Input::OutOfMemory { reason });
        }
    }
}

/// The VMs whose scratch disks are larger than they may be, and how. Machines that become templates have none, nor have those that are
/// restored. Blocking.
fn grown(host: &Host) -> Vec<(VmHandle, String)> {
    let vms: Vec<_> = host.with_scratch(&host.vms()).map(|(vm, dir)| (vm.clone(), dir)).collect();
    let grown = |(vm, dir): (VmHandle, PathBuf)| overgrown(&vm.config.volumes, &dir).map(|problem| (vm, problem));
    vms.into_iter().filter_map(grown).collect()
}

fn candidate(vm: &VmHandle) -> Option<Candidate> {
    let (state, memory_mib) = {
        let view = vm.view.borrow();
        (view.state, view.room.memory_mib)
    };
    let doing = match state {
        VmState::Terminated | VmState::Failed => return None,
        VmState::Ready | VmState::Idle => Doing::Nothing,
        VmState::Busy => Doing::Attempt,
        VmState::Starting | VmState::Draining => Doing::Changing,
    };
    Some(Candidate { id: vm.id, kind: vm.config.kind, memory_mib, accepted_at: vm.accepted_at, doing })
}

/// The worst of what was seen.
fn words(seen: &Observation) -> String {
    let share = |left: u64, total: u64| left.saturating_mul(1000) / total.max(1);
    let memory = seen.memory.iter().min_by_key(|memory| share(memory.available_mib, memory.total_mib));
    let disk = seen.disks.iter().min_by_key(|disk| {
        let inodes = if disk.total_inodes == 0 { 1000 } else { share(disk.free_inodes, disk.total_inodes) };
        share(disk.free_bytes, disk.total_bytes).min(inodes)
    });
    let words = memory.map(ToString::to_string).into_iter().chain(disk.map(ToString::to_string));
    words.collect::<Vec<_>>().join("; ")
}

fn report(before: (Level, Level), now: (Level, Level), words: &str) {
    let (memory, disk) = now;
    if memory > before.0 || disk > before.1 {
        tracing::warn!(?memory, ?disk, words, "this machine is short of memory or disk");
    } else {
        tracing::info!(?memory, ?disk, words, "this machine has memory and disk again");
    }
}
