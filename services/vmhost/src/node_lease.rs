//! Keeps the node's [`Lease`]: takes answers, tells guests how long they may go on, and ends what runs when it is over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use rustix::time::{ClockId, clock_gettime};
use tokio::{sync::watch, time::Instant};

use crate::{driver::VmHandle, host::Host, lease::Lease, lifecycle::Input};

/// How often the end of the lease is looked for at least: timers stand still while the machine sleeps, the lease does not.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The lease, shared by all who ask for it.
#[derive(Debug)]
pub(crate) struct NodeLease {
    lease: watch::Sender<Lease>,
    /// The node's, once it has registered.
    incarnation: AtomicU64,
}

/// The time since the machine's boot, its sleep included.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl NodeLease {
    /// None yet.
    pub(crate) fn new(length: Duration) -> Self {
        Self { lease: watch::Sender::new(Lease::new(length, now())), incarnation: AtomicU64::new(0) }
    }

    /// The node has registered.
    pub(crate) fn registered(&self, incarnation: u64) {
        self.incarnation.store(incarnation, Ordering::Relaxed);
    }

    /// The node's incarnation; 0: it has not registered yet.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Relaxed)
    }

    /// The registry has answered what was sent then.
    pub(crate) fn answered(&self, sent: Duration) {
        self.lease.send_modify(|lease| lease.answered(sent));
    }

    /// Whether attempts may begin.
    pub(crate) fn holds(&self) -> bool {
        self.lease.borrow().holds(now())
    }

    /// How long a guest may go on, in milliseconds.
    pub(crate) fn for_guest_ms(&self) -> Option<u64> {
        let left = self.lease.borrow().for_guest(now())?;
        Some(blixard::time::millis(left).max(1))
    }

    /// Waits until a guest that was told `last` is to be told again how long it may go on, in milliseconds; one that was never told
    /// as soon as there is something to tell.
    pub(crate) async fn renewal(&self, last: Option<Instant>) -> u64 {
        if let Some(last) = last {
            let every = self.lease.borrow().renew_every();
            tokio::time::sleep_until(last + every).await;
        }
        let mut lease = self.lease.subscribe();
        loop {
            lease.borrow_and_update();
            if let Some(left) = self.for_guest_ms() {
                return left;
            }
            if lease.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Ends every attempt that runs when the lease is over.
pub(crate) async fn keep(host: &Arc<Host>) {
    let mut told = false;
    loop {
        let left = host.lease.lease.borrow().end().saturating_sub(now());
        if !left.is_zero() {
            told = false;
            tokio::time::sleep(left.min(LOOK_EVERY)).await;
            continue;
        }
        let running: Vec<VmHandle> = {
            let vms = host.vms();
            vms.values().filter(|vm| vm.view.borrow().run.is_some()).cloned().collect()
        };
        if !std::mem::replace(&mut told, true) {
            tracing::error!(
                attempts = running.len(),
                "the registry has not answered for too long; what runs here is ended"
            );
        }
        // All at once, and whose queue is full is told by the next look: a driver whose disk hangs holds up no other.
        let tell = join_all(running.iter().map(|vm| vm.tell(Input::LeaseOver)));
        let _ = tokio::time::timeout(LOOK_EVERY, tell).await;
        // An attempt that was let in at the last moment is found by the next look.
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
