//! The node's place in the registry: it registers, says again and again that it lives, and registers again when the
//! registry has given it up, or when there are other images or volumes than it said, or it is short of something else.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use blixard::{error::Error, node::HostPressure};

use crate::{host::Host, reconcile, registry::is_answer};

/// Pause before a broken stream of heartbeats is begun again: some of these fit into the registry's grace.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);
/// Pause before the node registers again: two vmhosts that call themselves the same take turns no faster than this.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How often the images and volumes are looked at. A look reads one small file, or a few bytes of one, for each.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Keeps the node registered; ends only when the registry refuses it.
pub(crate) async fn keep_registered(host: &Arc<Host>) {
    loop {
        // Before it registers: what appears meanwhile is found afterwards, and at worst told twice.
        let (offers, told) = (offers(host), host.pressure.borrow().pressure.clone());
        let Some(incarnation) = reconcile::register(host).await else { return };
        tokio::select! {
            over = beat(host, incarnation) => {
                tracing::warn!(incarnation, error = %over, "the registry has given this node up, or another vmhost has its name; it registers again");
            }
            (images, volumes) = other_offers(host, &offers) => {
                tracing::info!(incarnation, ?images, ?volumes, "the images or volumes have changed; the node registers again");
            }
            pressure = other_pressure(host, &told) => {
                tracing::info!(incarnation, ?pressure, "what this node is short of has changed; it registers again");
            }
        }
        tokio::time::sleep(REGISTER_AGAIN_AFTER).await;
    }
}

type Offers = (Vec<String>, Vec<String>);

/// The images and the volumes that VMs can have now.
fn offers(host: &Host) -> Offers {
    (host.images(), host.offered_volumes())
}

/// Returns when they are others than these.
async fn other_offers(host: &Host, known: &Offers) -> Offers {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let offers = offers(host);
        if offers != *known {
            return offers;
        }
    }
}

/// Returns when the node is short of something else than this.
async fn other_pressure(host: &Host, known: &BTreeSet<HostPressure>) -> BTreeSet<HostPressure> {
    let mut told = host.pressure.subscribe();
    // The sender lives as long as the host.
    let _ = told.wait_for(|told| told.pressure != *known).await;
    told.borrow().pressure.clone()
}

/// Says that the node lives; returns when the registry answers that this incarnation does not.
async fn beat(host: &Host, incarnation: u64) -> Error {
    let mut told = false;
    loop {
        let heard = |sent| {
            told = false;
            host.lease.answered(sent);
        };
        let error = host.registry.heartbeats(incarnation, heard).await;
        if is_answer(error.reason) {
            return error;
        }
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(%error, "the registry does not hear this node; trying again until it does");
        }
        tokio::time::sleep(RECONNECT_AFTER).await;
    }
}
