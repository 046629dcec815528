//! Orders to vmhosts. They follow from state alone and are idempotent, so after a restart of either side all are given again.

use std::{collections::BTreeSet, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    job::Job,
    time::Timestamp,
    vm::{VmConfig, VmState},
};

use super::{Effect, Engine, Wake, jobs::Phase, shape::NodeIx};

/// Between two tries of an order that a vmhost could not be given.
const ORDER_RETRY: Duration = Duration::from_millis(500);

/// An order to a vmhost.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// Start this VM.
    Start { vm_id: VmId, config: VmConfig },
    /// End this VM.
    Stop { vm_id: VmId, grace: Option<Duration>, reason: String },
    /// Run the job's current attempt on its VM.
    Run(Box<Job>),
    /// End this attempt.
    Cancel { job_id: JobId, attempt: u32 },
}

/// Names an order: one of each can be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OrderKey {
    Start(VmId),
    Stop(VmId),
    Run(JobId, u32),
    Cancel(JobId, u32),
}

impl Order {
    /// Its name.
    #[must_use]
    pub fn key(&self) -> OrderKey {
        match self {
            Self::Start { vm_id, .. } => OrderKey::Start(*vm_id),
            Self::Stop { vm_id, .. } => OrderKey::Stop(*vm_id),
            Self::Run(job) => OrderKey::Run(job.id, job.attempt),
            Self::Cancel { job_id, attempt } => OrderKey::Cancel(*job_id, *attempt),
        }
    }
}

/// Which orders were answered, and which are under way.
#[derive(Debug, Default)]
pub(super) struct Orders {
    pub(super) told: BTreeSet<OrderKey>,
    pub(super) in_flight: BTreeSet<OrderKey>,
}

impl Engine {
    pub(super) fn on_told(
        &mut self,
        now: Timestamp,
        key: OrderKey,
        result: Result<(), Error>,
        effects: &mut Vec<Effect>,
    ) {
        if !self.orders.in_flight.remove(&key) {
            return;
        }
        let error = match result {
            Ok(()) => {
                self.note_told(key);
                return self.after_told(now, key);
            }
            Err(error) if asked_again(key, error.reason) => {
                if let OrderKey::Start(vm_id) = key
                    && self.is_turned_away(vm_id, error.reason)
                {
                    effects.push(Effect::DrainVm { vm_id, reason: error.message });
                }
                self.arm(now.plus(ORDER_RETRY), Wake::Order(key));
                // Meanwhile the state may want only what waited for this answer.
                return self.after_told(now, key);
            }
            Err(error) => error,
        };
        self.note_told(key);
        match key {
            OrderKey::Start(vm_id) => effects.push(Effect::FailVm { vm_id, reason: error.message, lost: None }),
            OrderKey::Stop(vm_id) => {
                effects.push(Effect::FailVm {
                    vm_id,
                    reason: format!("its node could not stop it: {}", error.message),
                    lost: None,
                });
            }
            OrderKey::Run(job_id, attempt) if error.reason != Reason::StaleAttempt => {
                let reason = format!("its node refused it: {}", error.message);
                // A fault is no refusal: nobody knows how far the node came, and without a price it would be asked for ever.
                let started = error.reason == Reason::Internal;
                if let Some(vm_id) = self.vm_of(job_id) {
                    self.distrust(now, vm_id);
                }
                effects.push(Effect::LoseAttempt { job_id, attempt, started, reason, lost: None });
            }
            OrderKey::Run(..) | OrderKey::Cancel(..) => {}
        }
        self.after_told(now, key);
    }

    /// Whether a VM of ours had better be started elsewhere: its node, which is short of memory or disk, may be so for long. What is on record
    /// of the node may be older than its refusal; then the next one is understood.
    fn is_turned_away(&self, vm_id: VmId, reason: Reason) -> bool {
        let ours = self.vms.get(&vm_id).filter(|vm| vm.ours && vm.state == VmState::Starting);
        let node = ours.and_then(|vm| self.fleet.node(vm.node));
        reason == Reason::Overloaded && node.is_some_and(|node| !node.pressure.is_empty())
    }

    /// What the state no longer wants need not be remembered.
    fn note_told(&mut self, key: OrderKey) {
        if self.wanted(key).is_some() {
            self.orders.told.insert(key);
        }
    }

    /// A stop waits for the start to be answered, and a cancellation until the vmhost has the run: it must not meet them
    /// reversed.
    fn after_told(&mut self, now: Timestamp, key: OrderKey) {
        match key {
            OrderKey::Start(vm_id) => self.want(now, OrderKey::Stop(vm_id)),
            OrderKey::Run(job_id, attempt) => self.want(now, OrderKey::Cancel(job_id, attempt)),
            OrderKey::Stop(_) | OrderKey::Cancel(..) => {}
        }
    }

    pub(super) fn want(&mut self, now: Timestamp, key: OrderKey) {
        if !self.orders.told.contains(&key) && !self.orders.in_flight.contains(&key) && self.wanted(key).is_some() {
            self.arm(now, Wake::Order(key));
        }
    }

    pub(super) fn want_vm_orders(&mut self, now: Timestamp, vm_id: VmId) {
        self.want(now, OrderKey::Start(vm_id));
        self.want(now, OrderKey::Stop(vm_id));
    }

    pub(super) fn want_job_orders(&mut self, now: Timestamp, job_id: JobId, attempt: u32) {
        self.want(now, OrderKey::Run(job_id, attempt));
        self.want(now, OrderKey::Cancel(job_id, attempt));
    }

    /// Gives an order once more, answered or not.
    pub(super) fn order_anew(&mut self, now: Timestamp, key: OrderKey) {
        self.orders.told.remove(&key);
        self.want(now, key);
    }

    /// A vmhost that has restarted may have lost orders that it had answered in its last moment: give all of them again.
    pub(super) fn order_again(&mut self, now: Timestamp, node: NodeIx) {
        for vm_id in self.vms_on(node) {
            self.order_anew(now, OrderKey::Start(vm_id));
            self.order_anew(now, OrderKey::Stop(vm_id));
            for (job_id, attempt) in self.attempts_on(vm_id) {
                self.order_anew(now, OrderKey::Run(job_id, attempt));
                self.order_anew(now, OrderKey::Cancel(job_id, attempt));
            }
        }
    }

    pub(super) fn forget_orders(&mut self, keys: &[OrderKey]) {
        for key in keys {
            self.orders.told.remove(key);
            self.orders.in_flight.remove(key);
        }
    }

    pub(super) fn give_order(&mut self, key: OrderKey, effects: &mut Vec<Effect>) {
        if self.orders.told.contains(&key) || self.orders.in_flight.contains(&key) {
            return;
        }
        // A Lost node is told everything when it is back.
        let Some(node) = self.wanted(key).filter(|node| !self.fleet.is_lost(*node)) else { return };
        if let Some(order) = self.order(key) {
            self.orders.in_flight.insert(key);
            effects.push(Effect::Tell { node_id: self.fleet.place(node).id.clone(), order });
        }
    }

    /// Whom the order is for; `None` when it is no longer wanted, or not yet.
    fn wanted(&self, key: OrderKey) -> Option<NodeIx> {
        match key {
            OrderKey::Start(vm_id) => self.vms.get(&vm_id).filter(|vm| vm.state == VmState::Starting).map(|vm| vm.node),
            OrderKey::Stop(vm_id) => {
                let vm = self.vms.get(&vm_id).filter(|vm| vm.state == VmState::Draining)?;
                (!self.orders.in_flight.contains(&OrderKey::Start(vm_id))).then_some(vm.node)
            }
            OrderKey::Run(job_id, attempt) => match &self.jobs.get(&job_id)?.phase {
                Phase::Given { node, job: Some(job), .. } if job.attempt == attempt => Some(*node),
                _ => None,
            },
            OrderKey::Cancel(job_id, attempt) => {
                let entry = self.jobs.get(&job_id).filter(|job| job.attempt == attempt && job.cancel_requested)?;
                let Phase::Given { node, job, .. } = &entry.phase else { return None };
                // Of an Assigned job the vmhost knows only when it has taken the order; that it Runs is the vmhost's own word.
                let known = job.is_none() || self.orders.told.contains(&OrderKey::Run(job_id, attempt));
                known.then_some(*node)
            }
        }
    }

    /// The order as it stands now.
    fn order(&self, key: OrderKey) -> Option<Order> {
        Some(match key {
            OrderKey::Start(vm_id) => Order::Start { vm_id, config: self.vms.get(&vm_id)?.config.as_deref()?.clone() },
            OrderKey::Stop(vm_id) => {
                let vm = self.vms.get(&vm_id)?;
                Order::Stop { vm_id, grace: vm.grace, reason: vm.reason.to_string() }
            }
            OrderKey::Run(job_id, _) => match &self.jobs.get(&job_id)?.phase {
                Phase::Given { job: Some(job), .. } => Order::Run(job.clone()),
                Phase::Given { .. } | Phase::Held | Phase::Waiting | Phase::Placing(_) | Phase::Ending => return None,
            },
            OrderKey::Cancel(job_id, attempt) => Order::Cancel { job_id, attempt },
        })
    }
}

/// Whether an order that was answered like this is given again. One to stop is, until the node has no such VM: a VM that is
/// given up while it lives is never ended.
fn asked_again(key: OrderKey, reason: Reason) -> bool {
    let must_end = matches!(key, OrderKey::Stop(_)) && reason == Reason::Internal;
    // A node that has registered again is told anew once its news is here.
    let passes = matches!(reason, Reason::DeadlineExceeded | Reason::StaleIncarnation);
    must_end || passes || reason.retryable()
}
