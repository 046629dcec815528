//! Asks the agent of a VM that runs nothing, now and then, whether it is well. What that means for the VM is its driver's to decide.

use std::{sync::Arc, time::Duration};

use blixard::{id::VmId, pb::guest::v1::HelloResponse, vm::VmState};
use tokio::sync::{mpsc, watch};

use crate::{
    driver::{Event, VmView},
    guest::AgentLink,
};

/// How long an agent has to answer: a thousand times what it takes. A shorter interval of checks is the limit.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What an agent said of its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Health {
    memory_total_kib: u64,
    memory_available_kib: u64,
}

impl Health {
    /// Why the VM should be replaced, when less of its memory is available than so many percent.
    pub(crate) fn shortage(self, percent: u32) -> Option<String> {
        let (total, available) = (self.memory_total_kib, self.memory_available_kib);
        (available * 100 < total * u64::from(percent)).then(|| {
            format!(
                "short of memory: {} MiB of {} MiB are available, less than {percent} %",
                available / 1024,
                total / 1024
            )
        })
    }
}

/// Checks a VM every so often, for as long as its driver listens.
pub(crate) async fn watch(
    vm_id: VmId,
    guest_boot: String,
    link: Arc<AgentLink>,
    view: watch::Receiver<VmView>,
    every: Duration,
    events: mpsc::Sender<Event>,
) {
    // A node's VMs are often started together; their checks are not to come together.
    let share = u32::try_from(vm_id.0.as_u128() % 1024).unwrap_or(0);
    tokio::time::sleep(every * share / 1024).await;
    loop {
        if is_free(&view) {
            // Boxed: what a call takes is not kept between two.
            let result = Box::pin(check(&link, &guest_boot, every.min(ANSWER_WITHIN))).await;
            // An attempt that began meanwhile is watched by itself.
            if is_free(&view) && events.send(Event::Checked(result)).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(every).await;
    }
}

fn is_free(view: &watch::Receiver<VmView>) -> bool {
    let view = view.borrow();
    view.run.is_none() && matches!(view.state, VmState::Ready | VmState::Idle)
}

async fn check(link: &AgentLink, guest_boot: &str, within: Duration) -> Result<Health, String> {
    let answer = tokio::time::timeout(within, link.hello()).await;
    let hello: HelloResponse = match answer {
        Ok(Ok(hello)) => hello,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => {
            link.forget();
            return Err(format!("its guest agent did not answer within {} ms", within.as_millis()));
        }
    };
    if hello.boot_id != guest_boot {
        return Err("its guest restarted".to_owned());
    }
    let HelloResponse { memory_total_kib, memory_available_kib, .. } = hello;
    Ok(Health { memory_total_kib, memory_available_kib })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_short_of_memory_below_the_percentage_only() {
        let health = |total, available| Health { memory_total_kib: total, memory_available_kib: available };
        assert_eq!(health(1024 * 1000, 1024 * 50).shortage(5), None);
        let reason = health(1024 * 1000, 1024 * 49).shortage(5);
        assert_eq!(reason.as_deref(), Some("short of memory: 49 MiB of 1000 MiB are available, less than 5 %"));
        assert_eq!(health(1024, 0).shortage(0), None, "0 is never");
        assert_eq!(health(0, 0).shortage(90), None, "no machine of its own");
    }
}
