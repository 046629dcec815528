//! The first talk with the registry, and each one after it had given the node up: what it says of this node's VMs and what is here are made to agree, then the node registers.
//!
//! It comes before the registration, because that makes the scheduler send again what it wants of this node.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use blixard::{
    error::Error,
    id::VmId,
    pb::{common::v1 as common, registry::v1::RegisterNodeRequest},
    vm::{Vm, VmState},
};
use futures::{StreamExt, TryStreamExt, stream};
use uuid::Uuid;

use crate::{driver::VmHandle, host::Host, lifecycle::Input, node_lease, registry::until_answered};

/// VMs that are looked at together: enough to use a group commit, few enough to be no burden.
const AT_ONCE: usize = 16;

/// Reconciles and registers; returns the incarnation when the registry knows the node, and nothing when it refuses it.
pub(crate) async fn register(host: &Arc<Host>) -> Option<u64> {
    // The same request each time: however often it has to be repeated, it is one incarnation.
    let request = RegisterNodeRequest { node: Some(host.node()), request_id: Uuid::new_v4().to_string() };
    // The first one counts for the lease: what a later one is answered may be the answer to that.
    let first_sent = OnceLock::new();
    let registered = until_answered("registering the node", || async {
        reconcile(host).await?;
        first_sent.get_or_init(node_lease::now);
        host.registry.register(request.clone()).await
    });
    match registered.await {
        Ok(node) => {
            // What was given up in the moment before the node registered is only seen now; afterwards nothing is any more.
            if let Err(error) = until_answered("looking again", || reconcile(host)).await {
                tracing::warn!(%error, "the registry could not be asked again after the node registered");
            }
            // In this order: nobody finds the lease again and the incarnation before.
            host.lease.registered(node.incarnation);
            host.lease.answered(*first_sent.get_or_init(node_lease::now));
            tracing::info!(node_id = node.id, incarnation = node.incarnation, "node registered");
            Some(node.incarnation)
        }
        Err(error) => {
            tracing::error!(%error, "the registry refuses this node; it gets no work");
            None
        }
    }
}

/// An error means that something could not be asked: all of it is done again before the node registers, because afterwards nobody
/// would ask any more.
async fn reconcile(host: &Arc<Host>) -> Result<(), Error> {
    let recorded = host.registry.vms_of_this_node().await?;
    let here: Vec<(VmId, VmHandle)> = host.vms().iter().map(|(id, vm)| (*id, vm.clone())).collect();
    let known = stream::iter(here.iter().cloned().map(Ok));
    known.try_for_each_concurrent(AT_ONCE, |(id, vm)| end_superseded(host, id, vm)).await?;
    let missing = here.into_iter().filter(|(id, _)| !recorded.iter().any(|vm| vm.id == id.to_string()));
    stream::iter(missing.map(Ok)).try_for_each_concurrent(AT_ONCE, |(id, vm)| end_unwanted(host, id, vm)).await?;
    stream::iter(recorded).for_each_concurrent(AT_ONCE, |vm| bury_missing(host, vm)).await;
    Ok(())
}

/// An attempt that runs here and that the registry takes for over: somebody else may run its job.
async fn end_superseded(host: &Host, id: VmId, vm: VmHandle) -> Result<(), Error> {
    let Some((job, attempt)) = vm.view.borrow().run else { return Ok(()) };
    if !host.registry.is_current(id, job, attempt).await? {
        tracing::warn!(vm_id = %id, job_id = %job, attempt, "the registry has moved on from an attempt that runs here; it is ended");
        vm.tell(Input::Superseded { job, attempt }).await;
    }
    Ok(())
}

/// A VM that is here and that the registry takes for ended, or never heard of.
async fn end_unwanted(host: &Host, id: VmId, vm: VmHandle) -> Result<(), Error> {
    if vm.view.borrow().state.is_terminal() {
        return Ok(());
    }
    let recorded = host.registry.vm(id).await?;
    let state = recorded.and_then(|vm| VmState::from_pb("vm.state", vm.state).ok());
    if state.is_none_or(VmState::is_terminal) {
        tracing::warn!(vm_id = %id, "the registry takes a VM for ended that lives here; it is ended");
        let _ = vm.stop(Duration::ZERO, "the registry takes it for ended".to_owned()).await;
    }
    Ok(())
}

/// A VM that the registry has on this node and that is not here. One that is Starting is sent again by the scheduler.
async fn bury_missing(host: &Host, vm: common::Vm) {
    let Ok(parsed) = Vm::try_from(vm.clone()) else { return };
    if parsed.state == VmState::Starting || host.vm(parsed.id).is_some() {
        return;
    }
    let ending = if parsed.state == VmState::Draining { VmState::Terminated } else { VmState::Failed };
    if let Err(error) = host.bury(vm, ending, "its node does not know it any more").await {
        tracing::warn!(vm_id = %parsed.id, %error, "a VM that is gone could not be reported");
    }
}
