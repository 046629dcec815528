//! Decides which job runs where. Pure: `step(now, input)` returns effects and does nothing else.
//!
//! What it knows is a copy of the registry's live objects, kept by the watch, plus what it has set in motion and not heard
//! back from: VMs being created (*tickets*), jobs being assigned (*placing*), orders to vmhosts (*in flight*). An object
//! replaces its copy only when its revision is newer, so late answers and repeated events change nothing.
//!
//! It acts only while it leads. Without the lead it takes everything in, so that it can explain, and begin at once when the
//! lead comes to it: then it forgets what was in motion and derives all that is wanted from what it knows.
//!
//! ```text
//!  jobs ── held (pause, dependencies) ──► queue: lanes, fair lines, open shapes ──► schedule ──► assign · start a VM · evict
//!                                                  ▲ offers                            ▲
//!  vms ─── free ones by class, boots, timers ──────┘        nodes: sites, rooms, warm ─┘
//!  orders follow from state alone: start what is Starting, stop what is Draining, run what is Assigned, cancel what is asked
//! ```
//!
//! No step walks over all jobs, VMs or nodes; what can't be done within a step's bounds is done in the next, for which
//! [`Engine::next_wake`] asks at once. Only [`Input::Snapshot`] and [`Input::Lead`] look at everything.
//!
//! It must not know: time (it is passed in), sockets, randomness, how effects are carried out.

mod explain;
mod invariants;
mod jobs;
mod nodes;
mod orders;
mod pools;
mod queue;
mod reserve;
mod schedule;
mod settings;
mod shape;
mod vms;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use blixard::{
    egress::Egress,
    error::Error,
    id::{JobId, NodeId, VmId},
    job::Job,
    node::{Node, NodeState},
    pb::common::v1 as pb,
    time::Timestamp,
    vm::{Vm, VmConfig},
    volume::Volume,
};

pub use nodes::{NodeEntry, Nodes, could_ever_fit};
pub use orders::{Order, OrderKey};
pub use settings::Settings;

use self::{
    jobs::{Dependencies, JobEntry},
    nodes::Fleet,
    orders::Orders,
    queue::{Offer, Queue, Wait},
    shape::{BootId, ImageId, Names, NodeIx, ShapeId, SiteId},
    vms::{BootFailures, Creation, Evictable, VmCounts, VmEntry},
};

/// Marks VMs that the scheduler started by its own decision; only these are given to any job and ended when room is short.
pub const OWNER_LABEL: &str = "blixard.owner";
/// The value of [`OWNER_LABEL`].
pub const OWNER: &str = "scheduler";

/// Why a job was given its VM, or what it waits for. Made here and only passed on.
pub type Decision = pb::Decision;

/// So many shapes, lanes, timers or dependents are looked at in a step; what is left comes in the next.
const LOOKS_PER_STEP: usize = 64;
/// An assignment or a VM's start costs as much as so many looks.
const LOOKS_PER_PLACEMENT: usize = 4;

/// A VM being created; its id is not known yet.
pub type Ticket = u64;

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// The scheduler leads from now on, under this epoch; or it leads no more.
    Lead(Option<u64>),
    /// Everything that is live in the registry: replaces all that is known. The lead stays.
    Snapshot { nodes: Vec<Node>, vms: Vec<Vm>, jobs: Vec<Job> },
    /// A node changed.
    Node(Node),
    /// A VM changed.
    Vm(Vm),
    /// A job changed, or was looked up.
    Job(Job),
    /// A job that was looked up is not on record.
    JobGone(JobId),
    /// A user asks for a VM.
    VmRequested { vm_id: VmId, config: VmConfig },
    /// [`Effect::CreateVm`] is done.
    Created { ticket: Ticket, result: Result<Vm, Error> },
    /// [`Effect::Assign`] is done.
    Assigned { job_id: JobId, vm_id: VmId, result: Result<Job, Error> },
    /// [`Effect::Tell`] is done.
    Told { order: OrderKey, result: Result<(), Error> },
    /// Time has passed.
    Tick,
}

/// An incarnation of a node that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostNode {
    pub node_id: NodeId,
    pub incarnation: u64,
}

/// What is to be done. Each is idempotent.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Record a VM; its start follows when the registry has it. `vm_id` is a user's choice.
    CreateVm { ticket: Ticket, vm_id: Option<VmId>, config: VmConfig, node_id: NodeId },
    /// Tell the user who asked for a VM that there will be none.
    RefuseVm { vm_id: VmId, error: Error },
    /// Give the job its next attempt on this VM.
    Assign { job_id: JobId, vm_id: VmId, attempt: u32, decision: Box<Decision> },
    /// The job can never run, or has waited too long.
    FailJob { job_id: JobId, reason: String, timed_out: bool },
    /// The attempt's VM is gone and nobody will report. `lost`: only if its node is still Lost.
    LoseAttempt { job_id: JobId, attempt: u32, started: bool, reason: String, lost: Option<LostNode> },
    /// The VM can't be started, or its node is gone. `lost`: only if it still is.
    FailVm { vm_id: VmId, reason: String, lost: Option<LostNode> },
    /// End a VM: an idle one of ours, or one on a node that is emptied.
    DrainVm { vm_id: VmId, reason: String },
    /// Find out what became of a job that another one depends on: [`Input::Job`] or [`Input::JobGone`] answers.
    LookUpJob { job_id: JobId },
    /// Give a vmhost an order.
    Tell { node_id: NodeId, order: Order },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    /// An order is to be given, perhaps again.
    Order(OrderKey),
    /// A VM that refused a job is believed again.
    Trust(VmId),
    /// VMs of this image, with these volumes, may be started again.
    BootPause(BootId),
    /// A free VM is old or idle enough to be ended.
    Vm(VmId),
    /// A job's pause is over, or it has waited long enough.
    Job(JobId),
    /// A node was Lost for too long, or is to be empty.
    Node(NodeIx),
    /// The first job of a shape may have waited too long for room.
    Starving(ShapeId),
}

/// See the module.
pub struct Engine {
    settings: Settings,
    /// The epoch under which it leads.
    lead: Option<u64>,
    now: Timestamp,
    images: Names,
    /// The first one is [`Egress::None`].
    egresses: Names,
    /// The first one is empty.
    volume_sets: Names<[Volume]>,
    fleet: Fleet,
    vms: BTreeMap<VmId, VmEntry>,
    counts: VmCounts,
    evictable: BTreeSet<Evictable>,
    /// VMs whose nodes refused a job for them, until when.
    distrusted: BTreeMap<VmId, Timestamp>,
    /// Nodes that start VMs for one shape only.
    kept: BTreeMap<ShapeId, NodeIx>,
    /// Shapes for which room is to be made, and what they wait for.
    in_need: BTreeMap<ShapeId, Wait>,
    /// The latest revision of a VM that the watch has brought.
    watched_vms: u64,
    creations: BTreeMap<Ticket, Creation>,
    next_ticket: Ticket,
    /// By image and volumes: the reason one VM after another does not boot.
    boot_failures: BTreeMap<BootId, BootFailures>,
    /// Images that are kept warm, and with how many VMs.
    pre_warm: Vec<(ImageId, u32)>,
    jobs: BTreeMap<JobId, JobEntry>,
    /// How many of them are Assigned or Running.
    given: usize,
    /// How many jobs the engine has heard of: the order between jobs of one millisecond.
    heard: u64,
    /// Assigned and Running jobs by their VM. There may be two of one VM: that the first one has ended is heard after the
    /// second was given it.
    jobs_on_vm: BTreeMap<VmId, BTreeSet<JobId>>,
    dependencies: Dependencies,
    queue: Queue,
    orders: Orders,
    wakes: BTreeSet<(Timestamp, Wake)>,
}

impl Engine {
    /// An engine that knows of nothing yet and does not lead.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let mut images = Names::<str>::default();
        let egresses = Names::<str>::beginning_with(&Egress::None.to_string());
        let pre_warm = settings.pre_warm.iter().map(|(image, count)| (ImageId(images.number(image)), *count)).collect();
        Self {
            settings,
            lead: None,
            now: Timestamp(0),
            images,
            egresses,
            volume_sets: Names::beginning_with(&[]),
            fleet: Fleet::default(),
            vms: BTreeMap::new(),
            counts: VmCounts::default(),
            evictable: BTreeSet::new(),
            distrusted: BTreeMap::new(),
            kept: BTreeMap::new(),
            in_need: BTreeMap::new(),
            watched_vms: 0,
            creations: BTreeMap::new(),
            next_ticket: 0,
            boot_failures: BTreeMap::new(),
            pre_warm,
            jobs: BTreeMap::new(),
            given: 0,
            heard: 0,
            jobs_on_vm: BTreeMap::new(),
            dependencies: Dependencies::default(),
            queue: Queue::default(),
            orders: Orders::default(),
            wakes: BTreeSet::new(),
        }
    }

    /// Takes in what happened and says what is to be done.
    pub fn step(&mut self, now: Timestamp, input: Input) -> Vec<Effect> {
        self.now = now;
        let mut effects = Vec::new();
        match input {
            Input::Lead(epoch) => self.on_lead(now, epoch, &mut effects),
            Input::Snapshot { nodes, vms, jobs } => self.on_snapshot(now, nodes, vms, jobs, &mut effects),
            Input::Node(node) => self.on_node(now, node, &mut effects),
            Input::Vm(vm) => {
                self.watched_vms = self.watched_vms.max(vm.revision);
                self.on_vm(now, vm, &mut effects);
            }
            Input::Job(job) => self.on_job(now, job, &mut effects),
            Input::JobGone(job_id) => self.on_job_gone(now, job_id),
            Input::VmRequested { vm_id, config } => self.on_vm_requested(vm_id, config, &mut effects),
            Input::Created { ticket, result } => self.on_created(now, ticket, result, &mut effects),
            Input::Assigned { job_id, vm_id, result } => self.on_assigned(now, job_id, vm_id, result, &mut effects),
            Input::Told { order, result } => self.on_told(now, order, result, &mut effects),
            Input::Tick => {}
        }
        self.settle_dependencies(now, &mut effects);
        self.queue.catch_up(LOOKS_PER_STEP);
        if self.lead.is_none() {
            // Whatever was noticed is derived again when the lead comes.
            return Vec::new();
        }
        self.look_up_dependencies(&mut effects);
        self.wake(now, &mut effects);
        self.schedule(now, &mut effects);
        self.pre_warm(now, &mut effects);
        debug_assert_eq!(self.broken_invariant_if_small(), None);
        effects
    }

    /// When [`Input::Tick`] is wanted next: at once while a step has left something undone.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.lead?;
        if self.queue.has_work() || self.dependencies.has_work() {
            return Some(self.now);
        }
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Whether it acts.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.lead.is_some()
    }

    /// The nodes and what of them is taken.
    #[must_use]
    pub fn nodes(&self) -> &Nodes {
        &self.fleet.nodes
    }

    /// How many jobs wait, those that are held back included.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.jobs.len() - self.given
    }

    /// How many jobs are assigned or running on a node.
    #[must_use]
    pub fn jobs_on(&self, node_id: &NodeId) -> u32 {
        self.fleet.find(node_id).map_or(0, |ix| self.fleet.place(ix).jobs)
    }

    /// What was in motion under another lead is none of ours: forget it and derive everything that is wanted.
    fn on_lead(&mut self, now: Timestamp, epoch: Option<u64>, effects: &mut Vec<Effect>) {
        self.lead = epoch;
        self.wakes.clear();
        self.orders = Orders::default();
        self.in_need.clear();
        self.distrusted.clear();
        for id in self.kept.keys().copied().collect::<Vec<_>>() {
            self.give_back_room(id);
        }
        self.boot_failures.clear();
        for (_, creation) in std::mem::take(&mut self.creations) {
            self.fleet.release(creation.node, creation.class.memory_mib);
            self.end_boot(creation.made_for, creation.class.vcpus);
            self.counts.creation(&creation, -1);
        }
        for id in self.vms.keys().copied().collect::<Vec<_>>() {
            self.forget_motion_of_vm(id);
        }
        for ix in self.fleet.all() {
            self.fleet.place_mut(ix).given_up = false;
            self.fleet.place_mut(ix).timer = None;
            self.node_changed(now, ix, effects);
        }
        for id in self.vms.keys().copied().collect::<Vec<_>>() {
            self.want_vm_orders(now, id);
            self.vm_changed(now, id, effects);
        }
        for id in self.jobs.keys().copied().collect::<Vec<_>>() {
            self.readmit_job(now, id, effects);
        }
        self.dependencies.look_up_all();
        self.queue.offer_to_all(Offer::Anything);
    }

    fn on_snapshot(
        &mut self,
        now: Timestamp,
        nodes: Vec<Node>,
        vms: Vec<Vm>,
        jobs: Vec<Job>,
        effects: &mut Vec<Effect>,
    ) {
        let (creations, next_ticket) = (std::mem::take(&mut self.creations), self.next_ticket);
        let creations: Vec<_> = creations
            .into_iter()
            .map(|(ticket, creation)| (ticket, self.fleet.place(creation.node).id.clone(), creation))
            .collect();
        let lead = self.lead;
        *self = Self::new(self.settings.clone());
        (self.lead, self.next_ticket, self.now) = (lead, next_ticket, now);
        for node in nodes {
            self.on_node(now, node, effects);
        }
        // VMs being created are still being created: until their answers come they count, or there could be too many.
        for (ticket, node_id, creation) in creations {
            let (node, class) = (self.fleet.ix(&node_id), self.class_of(&creation.config));
            let creation = Creation { node, class, made_for: None, ..creation };
            self.fleet.occupy(node, class.memory_mib);
            self.counts.creation(&creation, 1);
            self.creations.insert(ticket, creation);
        }
        for vm in vms {
            self.watched_vms = self.watched_vms.max(vm.revision);
            self.on_vm(now, vm, effects);
        }
        for job in jobs {
            self.on_job(now, job, effects);
        }
    }

    fn on_node(&mut self, now: Timestamp, node: Node, effects: &mut Vec<Effect>) {
        let known = self.fleet.nodes.get(&node.id).map(|entry| &entry.node);
        if known.is_some_and(|known| known.revision >= node.revision) {
            return;
        }
        let restarted = known.is_some_and(|known| {
            known.incarnation < node.incarnation || (known.state == NodeState::Lost && node.state != NodeState::Lost)
        });
        let returned = known.is_some_and(|known| known.state == NodeState::Lost && node.state != NodeState::Lost);
        let version = self.fleet.version;
        let ix = self.fleet.set(now, node, &mut self.images);
        if restarted {
            self.order_again(now, ix);
        }
        if self.fleet.version != version {
            self.queue.offer_to_all(Offer::Room);
        }
        self.node_changed(now, ix, effects);
        if returned {
            // While it was Lost nobody looked after them.
            for vm_id in self.vms_on(ix) {
                self.tend(now, vm_id, effects);
            }
        }
    }

    /// Offers what a node has, or takes from it what it must give up; sets its timer.
    fn node_changed(&mut self, now: Timestamp, ix: NodeIx, effects: &mut Vec<Effect>) {
        let place = self.fleet.place_mut(ix);
        if let Some(at) = place.timer.take() {
            self.wakes.remove(&(at, Wake::Node(ix)));
        }
        let (state, lost_since) = (place.state, place.lost_since.filter(|_| !place.given_up));
        let due = match state {
            Some(NodeState::Lost) => lost_since.map(|since| since.plus(self.settings.lost_node_grace)),
            Some(NodeState::Draining) => self.fleet.node(ix).and_then(|node| node.drain_deadline),
            Some(NodeState::Ready | NodeState::Cordoned) | None => None,
        };
        if let Some(at) = due.filter(|at| state == Some(NodeState::Lost) || *at > now) {
            self.arm(at, Wake::Node(ix));
            self.fleet.place_mut(ix).timer = Some(at);
        }
        match state {
            Some(NodeState::Ready) => {
                for class in self.fleet.free_classes(ix) {
                    self.queue.offer(class.image, Offer::Vm(class));
                }
                for image in self.fleet.images_of(ix) {
                    self.queue.offer(image, Offer::Room);
                }
                for vm_id in self.vms_on(ix) {
                    self.offer_to_its_jobs(vm_id);
                }
            }
            Some(NodeState::Draining) => {
                for vm_id in self.vms_on(ix) {
                    self.tend(now, vm_id, effects);
                }
            }
            Some(NodeState::Cordoned | NodeState::Lost) | None => {}
        }
    }

    fn on_node_timer(&mut self, now: Timestamp, ix: NodeIx, effects: &mut Vec<Effect>) {
        let place = self.fleet.place_mut(ix);
        place.timer = None;
        match place.state {
            Some(NodeState::Lost) => {
                place.given_up = true;
                for vm_id in self.vms_on(ix) {
                    self.give_up_vm(vm_id, effects);
                }
            }
            Some(NodeState::Draining) => {
                for vm_id in self.vms_on(ix) {
                    self.tend(now, vm_id, effects);
                }
            }
            Some(NodeState::Ready | NodeState::Cordoned) | None => {}
        }
    }

    fn vms_on(&self, ix: NodeIx) -> Vec<VmId> {
        self.fleet.place(ix).vms.iter().copied().collect()
    }

    /// Timers are set only while there is somebody to act on them.
    fn arm(&mut self, at: Timestamp, wake: Wake) {
        if self.lead.is_some() {
            self.wakes.insert((at, wake));
        }
    }

    fn wake(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        for _ in 0..LOOKS_PER_STEP {
            let Some((_, wake)) = self.wakes.first().copied().filter(|(at, _)| *at <= now) else { break };
            self.wakes.pop_first();
            match wake {
                Wake::Order(key) => self.give_order(key, effects),
                Wake::Trust(vm_id) if self.distrusted.get(&vm_id).is_some_and(|until| now < *until) => {}
                Wake::Trust(vm_id) => {
                    self.distrusted.remove(&vm_id);
                    self.change_vm(vm_id, |entry| entry.suspect = false);
                    self.vm_changed(now, vm_id, effects);
                }
                Wake::BootPause((image, _)) => self.queue.offer(image, Offer::Anything),
                Wake::Vm(vm_id) => self.on_vm_timer(now, vm_id, effects),
                Wake::Job(job_id) => self.on_job_timer(now, job_id, effects),
                Wake::Node(ix) => self.on_node_timer(now, ix, effects),
                Wake::Starving(id) => self.queue.open(id),
            }
        }
    }

    fn leave_site(&mut self, site: Option<SiteId>) {
        if let Some(site) = site {
            self.fleet.leave_site(site);
        }
    }
}
