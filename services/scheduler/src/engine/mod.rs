//! Decides which job runs where. Pure: `step(now, input)` returns effects and does nothing else.
//!
//! What it knows is a copy of the registry's live objects, kept by the watch, plus what it has set in motion and not heard
//! back from: VMs being created (*tickets*), jobs being assigned (*placing*), orders to vmhosts (*in flight*). An object
//! replaces its copy only when its revision is newer, so late answers and repeated events change nothing.
//!
//! Orders to vmhosts follow from state alone: a Starting VM is to be started, a Draining one stopped, an Assigned job
//! run, a job with `cancel_requested` cancelled. They are idempotent, so after a restart of either side all are given again.
//!
//! It must not know: time (it is passed in), sockets, randomness, how effects are carried out.

mod placement;
mod queue;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::{Job, JobState},
    node::{Node, NodeState},
    time::Timestamp,
    vm::{Defaults, Vm, VmConfig, VmKind, VmState},
};

pub use placement::{NodeEntry, Nodes, could_ever_fit};
use queue::{Queue, Shape};

/// Marks VMs that the scheduler started by its own decision; only these are given to any job and ended when room is short.
pub const OWNER_LABEL: &str = "blixard.owner";
/// The value of [`OWNER_LABEL`].
pub const OWNER: &str = "scheduler";

/// Between two tries of an order that a vmhost could not be given.
const ORDER_RETRY: Duration = Duration::from_millis(500);
/// How long a VM is left alone after the registry refused to assign a job to it: news of it should arrive at once.
const SUSPECT_FOR: Duration = Duration::from_secs(1);
/// So many VMs in a row must fail to boot before a job that waits for one is failed.
const MAX_BOOT_FAILURES: u32 = 3;

/// How the engine decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How many VMs may live at once, on all nodes together.
    pub max_vms: u32,
    /// Whether service VMs are started for jobs that need one, and idle ones ended when room is short.
    pub auto_scaling: bool,
    /// How many service VMs of the default image are kept warm.
    pub pre_warm_count: u32,
    /// The shape of those.
    pub defaults: Defaults,
}

/// A VM being created; its id is not known yet.
pub type Ticket = u64;

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// Everything that is live in the registry: replaces all that is known.
    Snapshot { nodes: Vec<Node>, vms: Vec<Vm>, jobs: Vec<Job> },
    /// A node changed.
    Node(Node),
    /// A VM changed.
    Vm(Vm),
    /// A job changed.
    Job(Job),
    /// A user asks for a VM.
    VmRequested { vm_id: VmId, config: VmConfig },
    /// A user asks for a VM's end with this grace; the registry has recorded it as Draining, or is about to.
    StopRequested { vm_id: VmId, grace: Duration },
    /// [`Effect::CreateVm`] is done.
    Created { ticket: Ticket, result: Result<Vm, Error> },
    /// [`Effect::Assign`] is done.
    Assigned { job_id: JobId, vm_id: VmId, result: Result<Job, Error> },
    /// [`Effect::Tell`] is done.
    Told { order: OrderKey, result: Result<(), Error> },
    /// Time has passed.
    Tick,
}

/// What is to be done. Each is idempotent.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Record a VM; its start follows when the registry has it. `vm_id` is a user's choice.
    CreateVm { ticket: Ticket, vm_id: Option<VmId>, config: VmConfig, node_id: NodeId },
    /// Tell the user who asked for a VM that there will be none.
    RefuseVm { vm_id: VmId, error: Error },
    /// Give the job its next attempt on this VM.
    Assign { job_id: JobId, vm_id: VmId, attempt: u32 },
    /// The job can never run.
    FailJob { job_id: JobId, reason: String },
    /// The attempt's VM is gone and nobody will report.
    LoseAttempt { job_id: JobId, attempt: u32, started: bool, reason: String },
    /// The VM can't be started.
    FailVm { vm_id: VmId, reason: String },
    /// End an idle VM of ours.
    DrainVm { vm_id: VmId, reason: String },
    /// Give a vmhost an order.
    Tell { node_id: NodeId, order: Order },
}

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    Order(OrderKey),
    Trust(VmId),
    Boot,
}

#[derive(Debug, Clone)]
struct VmEntry {
    vm: Vm,
    /// The job that is being assigned to it.
    reserved: Option<JobId>,
    /// The registry refused an assignment and no news has come since.
    suspect: bool,
    /// How long it has to end, when a user said so.
    grace: Option<Duration>,
    /// Its end has been asked for.
    evicted: bool,
}

impl VmEntry {
    fn is_free(&self) -> bool {
        self.vm.state.takes_jobs() && self.reserved.is_none() && !self.suspect && !self.evicted
    }
}

#[derive(Debug, Clone)]
struct Creation {
    config: VmConfig,
    node_id: NodeId,
}

/// What VMs have in common when any of them will do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    kind: VmKind,
    ours: bool,
    image: String,
    vcpus: u32,
    memory_mib: u32,
    /// The node that a VM is on, or that a VM about to be created is for.
    node_id: NodeId,
}

impl Class {
    fn of(config: &VmConfig, node_id: &NodeId) -> Self {
        Self {
            kind: config.kind,
            ours: is_ours(config),
            image: config.image.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            node_id: node_id.clone(),
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct BootFailures {
    count: u32,
    not_before: Timestamp,
}

/// See the module.
pub struct Engine {
    settings: Settings,
    nodes: Nodes,
    vms: BTreeMap<VmId, VmEntry>,
    jobs: BTreeMap<JobId, Job>,
    queue: Queue,
    /// Free VMs by class.
    free: BTreeMap<Class, BTreeSet<VmId>>,
    /// How many VMs of a class are Starting or being created.
    booting: BTreeMap<Class, u32>,
    /// Which job an Assigned or Running job's VM has.
    job_on: BTreeMap<VmId, JobId>,
    creations: BTreeMap<Ticket, Creation>,
    next_ticket: Ticket,
    placing: BTreeMap<JobId, VmId>,
    /// Jobs whose end the engine has asked for.
    ending: BTreeSet<JobId>,
    told: BTreeSet<OrderKey>,
    in_flight: BTreeSet<OrderKey>,
    wakes: BTreeSet<(Timestamp, Wake)>,
    /// By image: the reason one VM after another does not boot.
    boot_failures: BTreeMap<String, BootFailures>,
    dirty: bool,
}

impl Engine {
    /// An engine that knows of nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            nodes: Nodes::new(),
            vms: BTreeMap::new(),
            jobs: BTreeMap::new(),
            queue: Queue::default(),
            free: BTreeMap::new(),
            booting: BTreeMap::new(),
            job_on: BTreeMap::new(),
            creations: BTreeMap::new(),
            next_ticket: 0,
            placing: BTreeMap::new(),
            ending: BTreeSet::new(),
            told: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            wakes: BTreeSet::new(),
            boot_failures: BTreeMap::new(),
            dirty: false,
        }
    }

    /// Takes in what happened and says what is to be done.
    pub fn step(&mut self, now: Timestamp, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Snapshot { nodes, vms, jobs } => self.reset(now, nodes, vms, jobs, &mut effects),
            Input::Node(node) => self.on_node(now, node),
            Input::Vm(vm) => self.on_vm(now, vm, &mut effects),
            Input::Job(job) => self.on_job(now, job, &mut effects),
            Input::VmRequested { vm_id, config } => self.on_vm_requested(vm_id, config, &mut effects),
            Input::StopRequested { vm_id, grace } => self.on_stop_requested(now, vm_id, grace),
            Input::Created { ticket, result } => self.on_created(now, ticket, result, &mut effects),
            Input::Assigned { job_id, vm_id, result } => self.on_assigned(now, job_id, vm_id, result, &mut effects),
            Input::Told { order, result } => self.on_told(now, order, result, &mut effects),
            Input::Tick => {}
        }
        self.wake(now, &mut effects);
        if std::mem::take(&mut self.dirty) {
            self.schedule(now, &mut effects);
        }
        debug_assert_eq!(self.broken_invariant(), None);
        effects
    }

    /// When [`Input::Tick`] is wanted next.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// The nodes and what of them is taken.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// How many jobs wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How many jobs are assigned or run on each node.
    #[must_use]
    pub fn jobs_by_node(&self) -> BTreeMap<NodeId, u32> {
        let mut counts = BTreeMap::new();
        for job in self.jobs.values().filter(|job| job.state != JobState::Queued) {
            if let Some(node_id) = &job.node_id {
                *counts.entry(node_id.clone()).or_default() += 1;
            }
        }
        counts
    }

    /// What a job waits for, in words; `None` when it does not wait.
    #[must_use]
    pub fn waits_for(&self, job_id: JobId) -> Option<String> {
        let job = self.jobs.get(&job_id).filter(|job| job.state == JobState::Queued)?;
        if self.placing.contains_key(&job_id) {
            return Some("its assignment to be recorded".to_owned());
        }
        self.queue.waits_for(&Shape::of(job)).map(str::to_owned)
    }

    fn reset(&mut self, now: Timestamp, nodes: Vec<Node>, vms: Vec<Vm>, jobs: Vec<Job>, effects: &mut Vec<Effect>) {
        let (creations, next_ticket) = (std::mem::take(&mut self.creations), self.next_ticket);
        *self = Self::new(self.settings.clone());
        self.next_ticket = next_ticket;
        for node in nodes {
            self.on_node(now, node);
        }
        // VMs being created are still being created: until their answers come they count, or there could be too many.
        for (ticket, creation) in creations {
            self.occupy(&creation.config, &creation.node_id);
            self.count_booting(&Class::of(&creation.config, &creation.node_id), 1);
            self.creations.insert(ticket, creation);
        }
        for vm in vms {
            self.on_vm(now, vm, effects);
        }
        for job in jobs {
            self.on_job(now, job, effects);
        }
        self.dirty = true;
    }

    fn on_node(&mut self, now: Timestamp, node: Node) {
        let id = node.id.clone();
        let known = self.nodes.get(&id);
        if known.is_some_and(|known| known.node.revision >= node.revision) {
            return;
        }
        let restarted = known.is_some_and(|known| known.node.incarnation < node.incarnation);
        let (used_memory_mib, vms) = match known {
            Some(known) => (known.used_memory_mib, known.vms),
            None => self.usage_of(&id),
        };
        self.nodes.insert(id.clone(), NodeEntry { node, used_memory_mib, vms });
        if restarted {
            self.order_again(now, &id);
        }
        self.dirty = true;
    }

    /// Memory and number of the VMs of a node, counted: when it was not known while its VMs were.
    fn usage_of(&self, node_id: &NodeId) -> (u64, u32) {
        let live = self.vms.values().filter(|entry| entry.vm.node_id == *node_id).map(|entry| &entry.vm.config);
        let coming =
            self.creations.values().filter(|creation| creation.node_id == *node_id).map(|creation| &creation.config);
        live.chain(coming).fold((0, 0), |(memory, vms), config| (memory + u64::from(config.memory_mib), vms + 1))
    }

    /// A vmhost that has restarted may have lost orders that it had answered in its last moment: give all of them again.
    fn order_again(&mut self, now: Timestamp, node_id: &NodeId) {
        let vms = self.vms.values().filter(|entry| entry.vm.node_id == *node_id);
        let vm_orders = vms.flat_map(|entry| [OrderKey::Start(entry.vm.id), OrderKey::Stop(entry.vm.id)]);
        let jobs = self.jobs.values().filter(|job| job.node_id.as_ref() == Some(node_id));
        let job_orders =
            jobs.flat_map(|job| [OrderKey::Run(job.id, job.attempt), OrderKey::Cancel(job.id, job.attempt)]);
        for key in vm_orders.chain(job_orders).collect::<Vec<_>>() {
            self.told.remove(&key);
            self.wakes.insert((now, Wake::Order(key)));
        }
    }

    fn on_vm(&mut self, now: Timestamp, vm: Vm, effects: &mut Vec<Effect>) {
        let id = vm.id;
        let before = self.vms.get(&id);
        if before.is_some_and(|before| before.vm.revision >= vm.revision) {
            return;
        }
        let was_starting = before.is_some_and(|before| before.vm.state == VmState::Starting);
        let (grace, reserved) = before.map_or((None, None), |before| (before.grace, before.reserved));
        self.remove_vm(id);
        self.dirty = true;
        match vm.state {
            VmState::Terminated | VmState::Failed => {
                self.forget_orders(&[OrderKey::Start(id), OrderKey::Stop(id)]);
                if was_starting && vm.state == VmState::Failed && is_ours(&vm.config) {
                    self.on_boot_failure(now, &vm, effects);
                }
                self.on_vm_gone(&vm, effects);
                return;
            }
            VmState::Starting => self.want(now, OrderKey::Start(id)),
            VmState::Draining => self.want(now, OrderKey::Stop(id)),
            VmState::Ready | VmState::Busy | VmState::Idle => {
                self.boot_failures.remove(&vm.config.image);
            }
        }
        let reserved = reserved.filter(|_| vm.state.takes_jobs());
        self.insert_vm(VmEntry { vm, reserved, suspect: false, grace, evicted: false });
    }

    /// The vmhost reports an attempt before its VM, so a job that still counts on a VM that has ended has no reporter left.
    fn on_vm_gone(&mut self, vm: &Vm, effects: &mut Vec<Effect>) {
        let Some(job) = self.job_on.get(&vm.id).and_then(|job_id| self.jobs.get(job_id)) else { return };
        let why = if vm.reason.is_empty() { String::new() } else { format!(": {}", vm.reason) };
        effects.push(Effect::LoseAttempt {
            job_id: job.id,
            attempt: job.attempt,
            started: true,
            reason: format!("its VM {} is {}{why}", vm.id, vm.state),
        });
    }

    /// Waits longer after each failure in a row; from the third on each failure also fails a job that waits for this image,
    /// so that a broken image ends its jobs with a reason.
    fn on_boot_failure(&mut self, now: Timestamp, vm: &Vm, effects: &mut Vec<Effect>) {
        let failures = self.boot_failures.entry(vm.config.image.clone()).or_default();
        failures.count += 1;
        failures.not_before = Timestamp(now.0 + (500 << failures.count.min(6)));
        self.wakes.insert((failures.not_before, Wake::Boot));
        if failures.count < MAX_BOOT_FAILURES {
            return;
        }
        let reason = format!("{} VMs in a row failed to start; the last: {}", failures.count, vm.reason);
        let waiting = self.queue.first_waiting_for(&vm.config, |job_id| !self.ending.contains(&job_id));
        if let Some(job_id) = waiting {
            self.ending.insert(job_id);
            effects.push(Effect::FailJob { job_id, reason });
        }
    }

    fn on_job(&mut self, now: Timestamp, job: Job, effects: &mut Vec<Effect>) {
        let id = job.id;
        if self.jobs.get(&id).is_some_and(|before| before.revision >= job.revision) {
            return;
        }
        self.remove_job(&job);
        self.dirty = true;
        match job.state {
            JobState::Queued => self.queue.insert(&job),
            JobState::Assigned | JobState::Running => {
                let Some(vm_id) = job.vm_id else { return };
                self.job_on.insert(vm_id, id);
                if job.state == JobState::Assigned {
                    self.want(now, OrderKey::Run(id, job.attempt));
                }
                if job.cancel_requested {
                    self.want(now, OrderKey::Cancel(id, job.attempt));
                }
                if !self.vms.contains_key(&vm_id) {
                    let reason = format!("its VM {vm_id} is gone");
                    effects.push(Effect::LoseAttempt { job_id: id, attempt: job.attempt, started: true, reason });
                }
            }
            JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::TimedOut => return,
        }
        self.jobs.insert(id, job);
    }

    /// Takes a job's old copy out of everything.
    fn remove_job(&mut self, next: &Job) {
        let id = next.id;
        self.placing.remove(&id);
        self.ending.remove(&id);
        self.queue.remove(id);
        let Some(before) = self.jobs.remove(&id) else { return };
        if let Some(vm_id) = before.vm_id
            && self.job_on.get(&vm_id) == Some(&id)
        {
            self.job_on.remove(&vm_id);
        }
        if before.attempt != next.attempt || next.state.is_terminal() {
            let attempt = before.attempt;
            self.forget_orders(&[OrderKey::Run(id, attempt), OrderKey::Cancel(id, attempt)]);
        }
    }

    fn on_vm_requested(&mut self, vm_id: VmId, config: VmConfig, effects: &mut Vec<Effect>) {
        match self.room_for(&config) {
            Ok(node_id) => self.create(Some(vm_id), config, node_id, effects),
            Err(waits_for) => {
                let message = format!("there is no room for another VM: it would wait for {waits_for}");
                let error = Error::new(Reason::Overloaded, message).with("limit", self.settings.max_vms);
                effects.push(Effect::RefuseVm { vm_id, error });
            }
        }
    }

    fn on_stop_requested(&mut self, now: Timestamp, vm_id: VmId, grace: Duration) {
        let Some(entry) = self.vms.get_mut(&vm_id) else { return };
        entry.grace = Some(grace);
        if entry.vm.state == VmState::Draining {
            // Told already, perhaps with more patience.
            self.told.remove(&OrderKey::Stop(vm_id));
            self.wakes.insert((now, Wake::Order(OrderKey::Stop(vm_id))));
        }
    }

    fn on_created(&mut self, now: Timestamp, ticket: Ticket, result: Result<Vm, Error>, effects: &mut Vec<Effect>) {
        let Some(creation) = self.creations.remove(&ticket) else { return };
        self.release(&creation.config, &creation.node_id);
        self.count_booting(&Class::of(&creation.config, &creation.node_id), -1);
        self.dirty = true;
        if let Ok(vm) = result
            && !vm.state.is_terminal()
        {
            self.on_vm(now, vm, effects);
        }
    }

    fn on_assigned(
        &mut self,
        now: Timestamp,
        job_id: JobId,
        vm_id: VmId,
        result: Result<Job, Error>,
        effects: &mut Vec<Effect>,
    ) {
        if let Ok(job) = result {
            return self.on_job(now, job, effects);
        }
        if self.placing.get(&job_id) == Some(&vm_id) {
            self.placing.remove(&job_id);
            if let Some(job) = self.jobs.get(&job_id) {
                self.queue.insert(job);
            }
        }
        if self.vms.get(&vm_id).is_some_and(|entry| entry.reserved == Some(job_id)) {
            self.change_vm(vm_id, |entry| {
                entry.reserved = None;
                entry.suspect = true;
            });
            self.wakes.insert((Timestamp(now.0 + SUSPECT_FOR.as_millis() as i64), Wake::Trust(vm_id)));
        }
        self.dirty = true;
    }

    fn on_told(&mut self, now: Timestamp, key: OrderKey, result: Result<(), Error>, effects: &mut Vec<Effect>) {
        if !self.in_flight.remove(&key) {
            return;
        }
        let error = match result {
            Ok(()) => {
                self.told.insert(key);
                return self.after_told(now, key);
            }
            Err(error) if asked_again(key, error.reason) => {
                self.wakes.insert((Timestamp(now.0 + ORDER_RETRY.as_millis() as i64), Wake::Order(key)));
                // Meanwhile the state may want only what waited for this answer.
                return self.after_told(now, key);
            }
            Err(error) => error,
        };
        self.told.insert(key);
        match key {
            OrderKey::Start(vm_id) => effects.push(Effect::FailVm { vm_id, reason: error.message }),
            OrderKey::Stop(vm_id) => {
                effects
                    .push(Effect::FailVm { vm_id, reason: format!("its node could not stop it: {}", error.message) });
            }
            OrderKey::Run(job_id, attempt) if error.reason != Reason::StaleAttempt => {
                let reason = format!("its node refused it: {}", error.message);
                // A fault is no refusal: nobody knows how far the node came, and without a price it would be asked for ever.
                let started = error.reason == Reason::Internal;
                effects.push(Effect::LoseAttempt { job_id, attempt, started, reason });
            }
            OrderKey::Run(..) | OrderKey::Cancel(..) => {}
        }
        self.after_told(now, key);
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

    fn want(&mut self, now: Timestamp, key: OrderKey) {
        if !self.told.contains(&key) && !self.in_flight.contains(&key) {
            self.wakes.insert((now, Wake::Order(key)));
        }
    }

    fn forget_orders(&mut self, keys: &[OrderKey]) {
        for key in keys {
            self.told.remove(key);
            self.in_flight.remove(key);
        }
    }

    fn wake(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        while let Some(&(at, wake)) = self.wakes.first() {
            if at > now {
                break;
            }
            self.wakes.pop_first();
            match wake {
                Wake::Order(key) => self.give_order(key, effects),
                Wake::Trust(vm_id) => {
                    self.change_vm(vm_id, |entry| entry.suspect = false);
                    self.dirty = true;
                }
                Wake::Boot => self.dirty = true,
            }
        }
    }

    fn give_order(&mut self, key: OrderKey, effects: &mut Vec<Effect>) {
        if self.told.contains(&key) || self.in_flight.contains(&key) {
            return;
        }
        if let Some((node_id, order)) = self.order(key) {
            self.in_flight.insert(key);
            effects.push(Effect::Tell { node_id, order });
        }
    }

    /// The order as it stands now; `None` when it is no longer wanted, or not yet.
    fn order(&self, key: OrderKey) -> Option<(NodeId, Order)> {
        match key {
            OrderKey::Start(vm_id) => {
                let vm = &self.vms.get(&vm_id).filter(|entry| entry.vm.state == VmState::Starting)?.vm;
                Some((vm.node_id.clone(), Order::Start { vm_id, config: vm.config.clone() }))
            }
            OrderKey::Stop(vm_id) => {
                let entry = self.vms.get(&vm_id).filter(|entry| entry.vm.state == VmState::Draining)?;
                if self.in_flight.contains(&OrderKey::Start(vm_id)) {
                    return None;
                }
                let reason = entry.vm.reason.clone();
                Some((entry.vm.node_id.clone(), Order::Stop { vm_id, grace: entry.grace, reason }))
            }
            OrderKey::Run(job_id, attempt) => {
                let job = self.jobs.get(&job_id)?;
                let wanted = job.state == JobState::Assigned && job.attempt == attempt;
                Some((job.node_id.clone().filter(|_| wanted)?, Order::Run(Box::new(job.clone()))))
            }
            OrderKey::Cancel(job_id, attempt) => {
                let job = self.jobs.get(&job_id)?;
                // Of an Assigned job the vmhost knows only when it has taken the order; that it Runs is the vmhost's own word.
                let known = match job.state {
                    JobState::Assigned => self.told.contains(&OrderKey::Run(job_id, attempt)),
                    state => state == JobState::Running,
                };
                let wanted = known && job.attempt == attempt && job.cancel_requested;
                Some((job.node_id.clone().filter(|_| wanted)?, Order::Cancel { job_id, attempt }))
            }
        }
    }

    /// Places queued jobs, the most urgent first. A shape that can't be placed is passed over as a whole: all its jobs
    /// are alike. Work is bounded by the number of shapes and of VMs that can be started, not by the queue's length.
    fn schedule(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let mut cursor = self.queue.cursor();
        let mut covered: BTreeMap<Shape, u32> = BTreeMap::new();
        while let Some((job_id, shape)) = self.queue.next(&mut cursor) {
            if self.ending.contains(&job_id) {
                continue;
            }
            if let Some(vm_id) = self.free_vm(&shape) {
                self.assign(job_id, vm_id, effects);
                continue;
            }
            if let Some(target) = shape.target_vm_id {
                if !self.vms.contains_key(&target) {
                    self.ending.insert(job_id);
                    effects.push(Effect::FailJob { job_id, reason: format!("its target VM {target} is gone") });
                } else {
                    self.queue.pass_over(&mut cursor, &shape, format!("its target VM {target} to be free"));
                }
                continue;
            }
            let covered = covered.entry(shape.clone()).or_default();
            if *covered < self.booting_for(&shape) {
                *covered += 1;
                self.queue.set_waiting(&shape, "a VM to boot".to_owned());
                continue;
            }
            match self.start_for(now, &shape, effects) {
                Ok(()) => {
                    *covered += 1;
                    self.queue.set_waiting(&shape, "a VM to boot".to_owned());
                }
                Err(waits_for) => self.queue.pass_over(&mut cursor, &shape, waits_for),
            }
        }
        self.pre_warm(now, effects);
    }

    fn assign(&mut self, job_id: JobId, vm_id: VmId, effects: &mut Vec<Effect>) {
        let Some(job) = self.jobs.get(&job_id) else { return };
        let attempt = job.attempt + 1;
        self.queue.remove(job_id);
        self.placing.insert(job_id, vm_id);
        self.change_vm(vm_id, |entry| entry.reserved = Some(job_id));
        effects.push(Effect::Assign { job_id, vm_id, attempt });
    }

    /// A free VM for this shape: a service VM first (it is warm), the smallest that fits; else one that was started for it.
    fn free_vm(&self, shape: &Shape) -> Option<VmId> {
        if let Some(target) = shape.target_vm_id {
            let usable = |entry: &&VmEntry| entry.is_free() && !self.is_lost(&entry.vm.node_id);
            return self.vms.get(&target).filter(usable).map(|entry| entry.vm.id);
        }
        let usable = |class: &Class| shape.accepts(class) && !self.is_lost(&class.node_id);
        let fits = self.free.iter().filter(|(class, vms)| usable(class) && !vms.is_empty());
        let best = fits.min_by_key(|(class, _)| (class.kind != VmKind::Service, class.memory_mib, class.vcpus))?;
        best.1.first().copied()
    }

    fn booting_for(&self, shape: &Shape) -> u32 {
        let usable = |class: &Class| class.ours && shape.accepts(class) && !self.is_lost(&class.node_id);
        self.booting.iter().filter(|(class, _)| usable(class)).map(|(_, count)| count).sum()
    }

    /// Whether a node is not heard of any more: what is on it gets no work, and nothing is waited for there.
    fn is_lost(&self, node_id: &NodeId) -> bool {
        self.nodes.get(node_id).is_some_and(|entry| entry.node.state == NodeState::Lost)
    }

    fn start_for(&mut self, now: Timestamp, shape: &Shape, effects: &mut Vec<Effect>) -> Result<(), String> {
        if let Some(failures) = self.boot_failures.get(&shape.image)
            && failures.not_before > now
        {
            return Err("the pause after a VM that failed to boot".to_owned());
        }
        if shape.service_only && !self.settings.auto_scaling {
            return Err("a free service VM (auto_scaling is off)".to_owned());
        }
        let config = shape.vm_config();
        match self.room_for(&config) {
            Ok(node_id) => {
                self.create(None, config, node_id, effects);
                Ok(())
            }
            Err(waits_for) => {
                self.evict_one(effects);
                Err(waits_for)
            }
        }
    }

    fn room_for(&self, config: &VmConfig) -> Result<NodeId, String> {
        if self.nodes.is_empty() {
            return Err("a node to register".to_owned());
        }
        let live = self.vms.len() + self.creations.len();
        if live >= self.settings.max_vms as usize {
            return Err(format!("one of the {} VMs to end (max_vms)", self.settings.max_vms));
        }
        placement::choose(&self.nodes, config)
    }

    fn create(&mut self, vm_id: Option<VmId>, config: VmConfig, node_id: NodeId, effects: &mut Vec<Effect>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.occupy(&config, &node_id);
        self.count_booting(&Class::of(&config, &node_id), 1);
        self.creations.insert(ticket, Creation { config: config.clone(), node_id: node_id.clone() });
        effects.push(Effect::CreateVm { ticket, vm_id, config, node_id });
    }

    /// Makes room: ends one idle service VM of ours, unless one is ending already.
    fn evict_one(&mut self, effects: &mut Vec<Effect>) {
        if !self.settings.auto_scaling
            || self.vms.values().any(|entry| entry.evicted || entry.vm.state == VmState::Draining)
        {
            return;
        }
        let idle = self
            .free
            .iter()
            .filter(|(class, _)| class.kind == VmKind::Service && class.ours && !self.is_lost(&class.node_id));
        let oldest = idle.flat_map(|(_, vms)| vms).min_by_key(|id| self.vms.get(id).map(|entry| entry.vm.updated_at));
        if let Some(&vm_id) = oldest {
            self.change_vm(vm_id, |entry| entry.evicted = true);
            let reason = "idle, and its room is needed".to_owned();
            effects.push(Effect::DrainVm { vm_id, reason });
        }
    }

    fn pre_warm(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        if !self.queue.is_empty() {
            return;
        }
        let shape = Shape::pre_warmed(self.settings.defaults);
        let usable = |class: &Class| shape.accepts(class) && !self.is_lost(&class.node_id);
        let free: usize = self.free.iter().filter(|(class, _)| usable(class)).map(|(_, vms)| vms.len()).sum();
        let warm = free as u64 + u64::from(self.booting_for(&shape));
        for _ in warm..u64::from(self.settings.pre_warm_count) {
            let waits = self.boot_failures.get(&shape.image).is_some_and(|failures| failures.not_before > now);
            let Ok(node_id) = self.room_for(&shape.vm_config()) else { return };
            if waits {
                return;
            }
            self.create(None, shape.vm_config(), node_id, effects);
        }
    }

    fn change_vm(&mut self, vm_id: VmId, change: impl FnOnce(&mut VmEntry)) {
        if let Some(mut entry) = self.remove_vm(vm_id) {
            change(&mut entry);
            self.insert_vm(entry);
        }
    }

    /// The only place where a VM enters the indexes …
    fn insert_vm(&mut self, entry: VmEntry) {
        let class = Class::of(&entry.vm.config, &entry.vm.node_id);
        self.occupy(&entry.vm.config, &entry.vm.node_id);
        if entry.vm.state == VmState::Starting {
            self.count_booting(&class, 1);
        }
        if entry.is_free() {
            self.free.entry(class).or_default().insert(entry.vm.id);
        }
        self.vms.insert(entry.vm.id, entry);
    }

    /// … and the only one where it leaves them.
    fn remove_vm(&mut self, vm_id: VmId) -> Option<VmEntry> {
        let entry = self.vms.remove(&vm_id)?;
        let class = Class::of(&entry.vm.config, &entry.vm.node_id);
        self.release(&entry.vm.config, &entry.vm.node_id);
        if entry.vm.state == VmState::Starting {
            self.count_booting(&class, -1);
        }
        if let Some(vms) = self.free.get_mut(&class) {
            vms.remove(&vm_id);
            if vms.is_empty() {
                self.free.remove(&class);
            }
        }
        Some(entry)
    }

    fn occupy(&mut self, config: &VmConfig, node_id: &NodeId) {
        if let Some(entry) = self.nodes.get_mut(node_id) {
            entry.used_memory_mib += u64::from(config.memory_mib);
            entry.vms += 1;
        }
    }

    fn release(&mut self, config: &VmConfig, node_id: &NodeId) {
        if let Some(entry) = self.nodes.get_mut(node_id) {
            entry.used_memory_mib = entry.used_memory_mib.saturating_sub(config.memory_mib.into());
            entry.vms = entry.vms.saturating_sub(1);
        }
    }

    fn count_booting(&mut self, class: &Class, change: i32) {
        let count = self.booting.entry(class.clone()).or_default();
        *count = count.saturating_add_signed(change);
        if *count == 0 {
            self.booting.remove(class);
        }
    }

    /// The first invariant that does not hold, in words. Called after every step in debug builds and by the tests.
    #[must_use]
    pub fn broken_invariant(&self) -> Option<String> {
        for (vm_id, job_id) in self.placing.iter().map(|(job, vm)| (vm, job)) {
            let waits = self.jobs.get(job_id).is_some_and(|job| job.state == JobState::Queued);
            if !waits {
                return Some(format!("job {job_id} is being placed on {vm_id} and is not Queued"));
            }
        }
        for (class, vms) in &self.free {
            if let Some(id) = vms.iter().find(|id| !self.vms.get(id).is_some_and(VmEntry::is_free)) {
                return Some(format!("VM {id} counts as free in {class:?} and is not"));
            }
        }
        for (id, node) in &self.nodes {
            let used = self.usage_of(id);
            if used != (node.used_memory_mib, node.vms) {
                return Some(format!(
                    "node {id} counts {:?} used where its VMs have {used:?}",
                    (node.used_memory_mib, node.vms)
                ));
            }
        }
        let reserved: BTreeSet<_> =
            self.vms.values().filter_map(|entry| entry.reserved.map(|job_id| (job_id, entry.vm.id))).collect();
        if let Some((job_id, _)) = reserved.iter().find(|(job_id, _)| self.queue.contains(*job_id)) {
            return Some(format!("job {job_id} is queued while a VM is reserved for it"));
        }
        None
    }
}

/// Whether an order that was answered like this is given again. One to stop is, until the node has no such VM: a VM that is
/// given up while it lives is never ended.
fn asked_again(key: OrderKey, reason: Reason) -> bool {
    let must_end = matches!(key, OrderKey::Stop(_)) && reason == Reason::Internal;
    must_end || reason.retryable() || reason == Reason::DeadlineExceeded
}

fn is_ours(config: &VmConfig) -> bool {
    config.labels.get(OWNER_LABEL).is_some_and(|owner| owner == OWNER)
}
