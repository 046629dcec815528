//! What a scheduler does between its engine and the world, decided without touching either.
//!
//! ```text
//!   lists, changes ─┐                                        ┌─► calls to the registry and to vmhosts
//!   answers ────────┼─► Control ─► Engine ─► effects ─► calls ┤
//!   users, time ────┘      └── lease: who leads               └─► list, watch, ask for the lease, answer a user
//! ```
//! [`Control::handle`] takes an [`Event`] and returns [`Action`]s. The shell carries them out over gRPC, the simulation over its
//! own network; both run this very code. Pure: no clock, no socket, no randomness but the ids it is handed.
//!
//! Every scheduler keeps its engine in step with the registry; the one that holds the lease has effects. Who wins it lists
//! everything once more first: then it knows what the leader before has written, and what that one still tries to write is
//! refused for its epoch.

mod calls;
mod clock;
mod lease;

use std::{collections::BTreeSet, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::Job,
    node::Node,
    pb::{common::v1 as common, registry::v1 as registry, vmhost::v1 as vmhost},
    time::{Timestamp, millis},
    vm::{Vm, VmConfig, VmState},
};
use uuid::Uuid;

use self::{
    calls::{Answered, Calls, Purpose},
    lease::{Change as LeaseChange, Lease},
};
pub use self::{
    calls::{Call, CallId, Reply},
    clock::Clock,
};
use crate::engine::{Decision, Effect, Engine, Input, LostNode, Order, OrderKey, Settings};

/// The lease whose holder leads.
pub const LEASE_NAME: &str = "scheduler";
/// Pause before the registry is listed again after it was lost.
const LIST_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Who this scheduler is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The same at each of its starts, and nobody else's.
    pub name: String,
    /// Which start of it.
    pub instance: Uuid,
}

/// Everything that is live in the registry.
#[derive(Debug, Default)]
pub struct Listing {
    /// Jobs that have not ended, oldest first. They are listed before VMs: a VM that one of them names and that is not in
    /// `vms` has ended.
    pub jobs: Vec<Job>,
    /// VMs that have not ended.
    pub vms: Vec<Vm>,
    pub nodes: Vec<Node>,
    /// Up to where the jobs speak; older changes of jobs are already in them.
    pub job_revision: u64,
    /// The same for VMs.
    pub vm_revision: u64,
    /// The same for nodes.
    pub node_revision: u64,
}

/// Something changed.
#[derive(Debug)]
pub enum Change {
    Job(Box<Job>),
    Vm(Box<Vm>),
    Node(Box<Node>),
}

/// Counts the lists: what an earlier one, or its watch, still brings is ignored.
pub type Round = u64;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// [`Action::List`] is done.
    Listed { round: Round, result: Result<Box<Listing>, Error> },
    /// The watch brought this.
    Changed { round: Round, revision: u64, change: Change },
    /// The watch could not be opened, or is over.
    WatchEnded { round: Round },
    /// [`Action::AcquireLease`] was answered; `None`: it was not.
    LeaseAnswered(Option<registry::AcquireLeaseResponse>),
    /// [`Action::Call`] was answered.
    Answered { call: CallId, result: Result<Reply, Error> },
    /// A job was recorded through this scheduler, which need not wait until the watch brings it.
    Submitted(Box<Job>),
    /// A user wants a VM.
    VmRequested { vm_id: VmId, config: VmConfig },
    /// The clock that tells the time was set: see [`Clock`].
    ClockSet,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "most of them are calls; see there")]
pub enum Action {
    /// List everything that is live; a watch that is open is closed.
    List { round: Round },
    /// Watch all changes from here on.
    Watch { round: Round, start_revision: u64 },
    /// Ask for the lease.
    AcquireLease(registry::AcquireLeaseRequest),
    /// Call another service.
    Call { call: CallId, to: Call },
    /// Answer the user who wants this VM.
    AnswerVm { vm_id: VmId, result: Result<Box<Vm>, Error> },
    /// The vmhost has taken this attempt: its log exists.
    Accepted { job_id: JobId, attempt: u32 },
    /// What is known of nodes has changed.
    NodesChanged,
}

/// Where it stands with the registry.
#[derive(Debug, Clone, Copy)]
enum Sync {
    /// Lists at this time.
    Apart {
        list_at: Timestamp,
    },
    Listing,
    /// Revisions up to which the lists of each kind spoke.
    Following {
        jobs: u64,
        vms: u64,
        nodes: u64,
    },
}

/// See the module.
pub struct Control {
    identity: Identity,
    engine: Engine,
    lease: Lease,
    /// An epoch that was won; the lead begins when everything has been listed.
    won: Option<u64>,
    calls: Calls,
    sync: Sync,
    round: Round,
    /// How far the watch has come.
    watched: u64,
    /// What answers have told since the list was asked for: it may not be in there yet.
    told: Vec<Change>,
    new_vm_id: Box<dyn FnMut() -> VmId + Send>,
    /// VMs that users wait for.
    requested: BTreeSet<VmId>,
    actions: Vec<Action>,
}

impl Control {
    /// A scheduler that knows of nothing yet.
    #[must_use]
    pub fn new(settings: Settings, identity: Identity, new_vm_id: impl FnMut() -> VmId + Send + 'static) -> Self {
        Self {
            identity,
            engine: Engine::new(settings),
            lease: Lease::default(),
            won: None,
            calls: Calls::default(),
            sync: Sync::Apart { list_at: Timestamp(0) },
            round: 0,
            watched: 0,
            told: Vec::new(),
            new_vm_id: Box::new(new_vm_id),
            requested: BTreeSet::new(),
            actions: Vec::new(),
        }
    }

    /// Takes in what happened and says what is to be done.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Vec<Action> {
        match event {
            Event::Listed { round, result } if round == self.round => self.listed(now, result),
            Event::Changed { round, revision, change } if round == self.round => {
                self.watched = revision;
                self.changed(now, revision, change);
            }
            Event::WatchEnded { round } if round == self.round => {
                self.sync = Sync::Apart { list_at: now.plus(LIST_AGAIN_AFTER) };
            }
            Event::Listed { .. } | Event::Changed { .. } | Event::WatchEnded { .. } => {}
            Event::LeaseAnswered(answer) => {
                let change = self.lease.answered(now, answer);
                self.lead(now, change);
            }
            Event::Answered { call, result } => self.answered(now, call, result),
            // What the watch has told already may have ended since.
            Event::Submitted(job) if job.revision <= self.watched => {}
            Event::Submitted(job) => self.changed(now, job.revision, Change::Job(job)),
            Event::VmRequested { vm_id, config } => self.vm_requested(now, vm_id, config),
            Event::ClockSet => self.clock_set(now),
            Event::Tick => {}
        }
        self.pass_time(now);
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is wanted next.
    #[must_use]
    pub fn next_wake(&self) -> Option<Timestamp> {
        let list = match self.sync {
            Sync::Apart { list_at } => Some(list_at),
            Sync::Listing | Sync::Following { .. } => None,
        };
        [self.engine.next_wake(), self.lease.next_wake(), self.calls.next_wake(), list].into_iter().flatten().min()
    }

    /// What it knows.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Who leads, as far as is known, and whether it is this one.
    #[must_use]
    pub fn leader(&self) -> (&str, bool) {
        (self.lease.leader(), self.lease.epoch().is_some())
    }

    /// Under which epoch it leads.
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        self.lease.epoch()
    }

    /// What a waiting job waits for.
    #[must_use]
    pub fn explain(&self, now: Timestamp, job_id: JobId) -> Option<Decision> {
        self.engine.explain(now, job_id)
    }

    /// How the lease is asked for, or given up.
    #[must_use]
    pub fn lease_request(&self, release: bool) -> registry::AcquireLeaseRequest {
        registry::AcquireLeaseRequest {
            name: LEASE_NAME.to_owned(),
            holder: self.identity.name.clone(),
            instance: self.identity.instance.to_string(),
            ttl_ms: u32::try_from(lease::TTL.as_millis()).unwrap_or(u32::MAX),
            release,
        }
    }

    fn pass_time(&mut self, now: Timestamp) {
        let change = self.lease.passed(now);
        self.lead(now, change);
        if self.lease.asks(now) {
            self.actions.push(Action::AcquireLease(self.lease_request(false)));
        }
        if let Sync::Apart { list_at } = self.sync
            && list_at <= now
        {
            self.list();
        }
        for (call, to) in self.calls.due(now) {
            self.actions.push(Action::Call { call, to });
        }
        if self.engine.next_wake().is_some_and(|at| at <= now) {
            self.step(now, Input::Tick);
        }
    }

    /// What was to come at a time would come much too early or too late, so all of it is set anew: it gives up its lead, takes it
    /// back under another epoch, and counts from now what it finds.
    fn clock_set(&mut self, now: Timestamp) {
        tracing::warn!("the clock was set; everything that was timed by it begins again");
        let change = self.lease.clock_set(now);
        self.lead(now, change);
        self.calls.clock_set(now);
        self.list();
    }

    fn list(&mut self) {
        self.round += 1;
        self.watched = 0;
        self.told.clear();
        self.sync = Sync::Listing;
        self.actions.push(Action::List { round: self.round });
    }

    fn listed(&mut self, now: Timestamp, result: Result<Box<Listing>, Error>) {
        let Ok(listing) = result else {
            self.sync = Sync::Apart { list_at: now.plus(LIST_AGAIN_AFTER) };
            return;
        };
        let Listing { mut jobs, mut vms, nodes, job_revision, vm_revision, node_revision } = *listing;
        for change in std::mem::take(&mut self.told) {
            match change {
                Change::Job(job) if job.revision > job_revision => renew(&mut jobs, *job, |job| (job.id, job.revision)),
                Change::Vm(vm) if vm.revision > vm_revision => renew(&mut vms, *vm, |vm| (vm.id, vm.revision)),
                Change::Job(_) | Change::Vm(_) | Change::Node(_) => {}
            }
        }
        self.sync = Sync::Following { jobs: job_revision, vms: vm_revision, nodes: node_revision };
        let start_revision = job_revision.min(vm_revision).min(node_revision) + 1;
        self.actions.push(Action::Watch { round: self.round, start_revision });
        self.step(now, Input::Snapshot { nodes, vms, jobs });
        self.actions.push(Action::NodesChanged);
        if let Some(epoch) = self.won.take() {
            self.step(now, Input::Lead(Some(epoch)));
        }
    }

    fn changed(&mut self, now: Timestamp, revision: u64, change: Change) {
        let Sync::Following { jobs, vms, nodes } = self.sync else { return };
        match change {
            Change::Job(job) if revision > jobs => self.step(now, Input::Job(*job)),
            Change::Vm(vm) if revision > vms => self.step(now, Input::Vm(*vm)),
            Change::Node(node) if revision > nodes => {
                self.step(now, Input::Node(*node));
                self.actions.push(Action::NodesChanged);
            }
            Change::Job(_) | Change::Vm(_) | Change::Node(_) => {}
        }
    }

    fn lead(&mut self, now: Timestamp, change: LeaseChange) {
        match change {
            LeaseChange::None => {}
            LeaseChange::Won(epoch) => {
                tracing::info!(epoch, "this scheduler leads");
                if self.engine.leads() {
                    let name = &self.identity.name;
                    tracing::warn!(name, "the lease changed hands meanwhile; is there another scheduler of this name?");
                    // What it decided under another epoch is refused now; and nothing is decided before everything has been listed.
                    self.calls.give_up();
                    self.step(now, Input::Lead(None));
                }
                self.won = Some(epoch);
                self.list();
            }
            LeaseChange::Lost => {
                tracing::info!("this scheduler leads no more");
                self.won = None;
                // What it has under way may still be carried out. Should the lead come back, then under another epoch, which refuses
                // that: it asks as another start of itself.
                self.identity.instance = (self.new_vm_id)().0;
                self.calls.give_up();
                self.step(now, Input::Lead(None));
            }
        }
    }

    fn vm_requested(&mut self, now: Timestamp, vm_id: VmId, config: VmConfig) {
        self.requested.insert(vm_id);
        if self.engine.leads() {
            return self.step(now, Input::VmRequested { vm_id, config });
        }
        // Whoever leads sees it in the registry; until then two of them may take the same room, and the node has the last word.
        match self.engine.place(&config) {
            Ok(node_id) => {
                let request = create_vm(vm_id, config, &node_id, 0);
                self.call(Call::CreateVm(request), Purpose::CreateForUser { vm_id });
            }
            Err(error) => self.answer_vm(vm_id, Err(error)),
        }
    }

    fn answer_vm(&mut self, vm_id: VmId, result: Result<Box<Vm>, Error>) {
        if self.requested.remove(&vm_id) {
            self.actions.push(Action::AnswerVm { vm_id, result });
        }
    }

    fn call(&mut self, call: Call, purpose: Purpose) {
        let epoch = self.lease.epoch().unwrap_or(0);
        let (call, to) = self.calls.begin(call, purpose, epoch);
        self.actions.push(Action::Call { call, to });
    }

    fn answered(&mut self, now: Timestamp, call: CallId, result: Result<Reply, Error>) {
        let Answered::Over { purpose, epoch, result } = self.calls.answered(now, call, result) else { return };
        if let Err(error) = &result
            && error.reason == Reason::StaleEpoch
        {
            let change = self.lease.refused(now, epoch);
            return self.lead(now, change);
        }
        if matches!(self.sync, Sync::Listing) {
            self.note_told(&result);
        }
        match purpose {
            Purpose::Create { ticket, vm_id, .. } => {
                let result = result.and_then(expect_vm);
                self.answer_vm(vm_id, result.clone().map(Box::new));
                self.step(now, Input::Created { ticket, result });
            }
            Purpose::CreateForUser { vm_id } => self.answer_vm(vm_id, result.and_then(expect_vm).map(Box::new)),
            Purpose::Assign { job_id, vm_id } => {
                let result = result.and_then(expect_job);
                self.step(now, Input::Assigned { job_id, vm_id, result });
            }
            Purpose::LookUp { job_id } => match result.and_then(expect_job) {
                Ok(job) => self.step(now, Input::Job(job)),
                Err(error) if error.reason == Reason::JobNotFound => self.step(now, Input::JobGone(job_id)),
                Err(error) => tracing::error!(%job_id, %error, "the registry does not tell what became of a job"),
            },
            Purpose::Tell { order } => {
                let result = result.map(drop);
                if let (OrderKey::Run(job_id, attempt), Ok(())) = (order, &result) {
                    self.actions.push(Action::Accepted { job_id, attempt });
                }
                self.step(now, Input::Told { order, result });
            }
            // A registry that refuses has moved on, and the watch says whereto.
            Purpose::Note => {
                if let Err(error) = result {
                    tracing::debug!(%error, "the registry refused");
                }
            }
        }
    }

    /// The list that is under way may have been read before this was written.
    fn note_told(&mut self, result: &Result<Reply, Error>) {
        let told = match result {
            Ok(Reply::Vm(vm)) => Vm::try_from((**vm).clone()).map(|vm| Change::Vm(Box::new(vm))),
            Ok(Reply::Job(job)) => Job::try_from((**job).clone()).map(|job| Change::Job(Box::new(job))),
            Ok(Reply::Done) | Err(_) => return,
        };
        // What does not parse is an error where it is used.
        self.told.extend(told);
    }

    fn step(&mut self, now: Timestamp, input: Input) {
        for effect in self.engine.step(now, input) {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        let scheduler_epoch = self.lease.epoch().unwrap_or(0);
        match effect {
            Effect::CreateVm { ticket, vm_id, config, node_id } => {
                // What a user asks for is no decision of this leader's.
                let (for_user, scheduler_epoch) = (vm_id.is_some(), if vm_id.is_some() { 0 } else { scheduler_epoch });
                let vm_id = vm_id.unwrap_or_else(&mut self.new_vm_id);
                let request = create_vm(vm_id, config, &node_id, scheduler_epoch);
                self.call(Call::CreateVm(request), Purpose::Create { ticket, vm_id, for_user });
            }
            Effect::RefuseVm { vm_id, error } => self.answer_vm(vm_id, Err(error)),
            Effect::Assign { job_id, vm_id, attempt, decision } => {
                let request = registry::AssignJobRequest {
                    job_id: job_id.to_string(),
                    vm_id: vm_id.to_string(),
                    attempt,
                    scheduler_epoch,
                    decision: Some(*decision),
                    ..Default::default()
                };
                self.call(Call::AssignJob(request), Purpose::Assign { job_id, vm_id });
            }
            Effect::FailJob { job_id, reason, timed_out } => {
                let request = registry::FailQueuedJobRequest {
                    job_id: job_id.to_string(),
                    reason: cut(reason),
                    scheduler_epoch,
                    timed_out,
                    ..Default::default()
                };
                self.call(Call::FailQueuedJob(request), Purpose::Note);
            }
            Effect::LoseAttempt { job_id, attempt, started, reason, lost } => {
                let lost = registry::AttemptLost { started, reason: cut(reason), lost_node: lost.map(lost_node) };
                let request = registry::FinishAttemptRequest {
                    job_id: job_id.to_string(),
                    attempt,
                    outcome: Some(registry::finish_attempt_request::Outcome::Lost(lost)),
                    scheduler_epoch,
                    ..Default::default()
                };
                self.call(Call::FinishAttempt(request), Purpose::Note);
            }
            Effect::FailVm { vm_id, reason, lost } => self.transition(vm_id, VmState::Failed, reason, lost),
            Effect::DrainVm { vm_id, reason } => self.transition(vm_id, VmState::Draining, reason, None),
            Effect::LookUpJob { job_id } => {
                let request = registry::GetJobRequest { job_id: job_id.to_string() };
                self.call(Call::GetJob(request), Purpose::LookUp { job_id });
            }
            Effect::Tell { node_id, order } => {
                let purpose = Purpose::Tell { order: order.key() };
                let call = self.order(node_id, order);
                self.call(call, purpose);
            }
        }
    }

    fn transition(&mut self, vm_id: VmId, to: VmState, reason: String, lost: Option<LostNode>) {
        let request = registry::TransitionVmRequest {
            vm_id: vm_id.to_string(),
            to_state: to.to_pb().into(),
            reason: cut(reason),
            scheduler_epoch: self.lease.epoch().unwrap_or(0),
            lost_node: lost.map(lost_node),
            ..Default::default()
        };
        self.call(Call::TransitionVm(request), Purpose::Note);
    }

    fn order(&self, node_id: NodeId, order: Order) -> Call {
        match order {
            Order::Start { vm_id, config } => {
                let request = vmhost::StartVmRequest { vm_id: vm_id.to_string(), config: Some(config.into()) };
                Call::StartVm(node_id, request)
            }
            Order::Stop { vm_id, grace, reason } => {
                let grace_ms = grace.map(millis);
                Call::StopVm(node_id, vmhost::StopVmRequest { vm_id: vm_id.to_string(), grace_ms, reason })
            }
            Order::Run(job) => {
                // An order that is late must not begin an attempt that was taken for lost with an earlier incarnation.
                let incarnation = self.engine.nodes().get(&node_id).map_or(0, |entry| entry.node.incarnation);
                let request = vmhost::RunJobRequest {
                    vm_id: job.vm_id.map(|id| id.to_string()).unwrap_or_default(),
                    job_id: job.id.to_string(),
                    attempt: job.attempt,
                    spec: Some(common::JobSpec::from(job.spec.clone())),
                    incarnation,
                };
                Call::RunJob(node_id, request)
            }
            Order::Cancel { job_id, attempt } => {
                Call::CancelJob(node_id, vmhost::CancelJobRequest { job_id: job_id.to_string(), attempt })
            }
        }
    }
}

/// Puts something into a list in its newer state.
fn renew<T, K: PartialEq>(list: &mut Vec<T>, newer: T, of: impl Fn(&T) -> (K, u64)) {
    let (id, revision) = of(&newer);
    match list.iter_mut().find(|known| of(known).0 == id) {
        Some(known) if of(known).1 < revision => *known = newer,
        Some(_) => {}
        None => list.push(newer),
    }
}

fn lost_node(LostNode { node_id, incarnation }: LostNode) -> registry::LostNode {
    registry::LostNode { node_id: node_id.to_string(), incarnation }
}

fn create_vm(vm_id: VmId, config: VmConfig, node_id: &NodeId, scheduler_epoch: u64) -> registry::CreateVmRequest {
    registry::CreateVmRequest {
        vm_id: vm_id.to_string(),
        config: Some(config.into()),
        node_id: node_id.to_string(),
        scheduler_epoch,
        ..Default::default()
    }
}

fn expect_vm(reply: Reply) -> Result<Vm, Error> {
    match reply {
        Reply::Vm(vm) => Vm::try_from(*vm),
        Reply::Job(_) | Reply::Done => Err(crate::peers::missing("vm")),
    }
}

fn expect_job(reply: Reply) -> Result<Job, Error> {
    match reply {
        Reply::Job(job) => Job::try_from(*job),
        Reply::Vm(_) | Reply::Done => Err(crate::peers::missing("job")),
    }
}

/// Keeps a reason within what the registry takes.
fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(blixard::limits::MAX_REASON_BYTES));
    reason
}

#[cfg(test)]
mod tests;
