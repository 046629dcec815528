//! The node's place in the registry: it registers, says again and again that it lives, and registers again when the
//! registry has given it up.

use std::{sync::Arc, time::Duration};

use blixard::error::Error;

use crate::{host::Host, reconcile, registry::is_answer};

/// Pause before a broken stream of heartbeats is begun again: some of these fit into the registry's grace.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);
/// Pause before the node registers again: two vmhosts that call themselves the same take turns no faster than this.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Keeps the node registered; ends only when the registry refuses it.
pub(crate) async fn keep_registered(host: &Arc<Host>) {
    while let Some(incarnation) = reconcile::register(host).await {
        let over = beat(host, incarnation).await;
        tracing::warn!(incarnation, error = %over, "the registry has given this node up, or another vmhost has its name; it registers again");
        tokio::time::sleep(REGISTER_AGAIN_AFTER).await;
    }
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
