//! The registry: the real store (schema, guarded statements, verdicts, reads, who lives and who leads) on SQLite in memory. The
//! replicas and their log are modelled as one store that is away during a failover: what was under way then may have been
//! committed or not, and its caller does not learn which.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    job::Job,
    node::Node,
    pb::registry::v1::{self as pb, watch_event::Object, watch_response::Message},
    time::Timestamp,
    vm::Vm,
};
use blixard_registry::simulation::Store;
use blixard_scheduler::control::Change;

use crate::{
    kernel::{Instant, Kernel, ProcessId, Signal},
    network::unavailable,
    settings::Protection,
    wire::{Answer, Call, RegistryCall},
    world::World,
};

/// How often the leader looks who is silent.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A watch that has nothing to bring looks whether it still is one.
const WATCH_LOOK: Duration = Duration::from_secs(10);

/// See the module.
pub struct Registry {
    world: World,
    process: ProcessId,
    store: RefCell<Store>,
    newest: Cell<u64>,
    changed: Signal,
    /// Counts the leaders.
    life: Cell<u64>,
    away: Cell<bool>,
    slow_until: Cell<Instant>,
    /// Changes that the next leader commits.
    inherited: RefCell<Vec<RegistryCall>>,
}

impl Registry {
    /// Starts it, empty.
    pub fn start(world: &World) -> Rc<Self> {
        let registry = Rc::new(Self {
            world: world.clone(),
            process: world.registry,
            store: RefCell::new(Store::new()),
            newest: Cell::default(),
            changed: Signal::default(),
            life: Cell::default(),
            away: Cell::default(),
            slow_until: Cell::default(),
            inherited: RefCell::default(),
        });
        let serving = Rc::clone(&registry);
        world.network.serve(
            registry.process,
            Rc::new(move |call| {
                let registry = Rc::clone(&serving);
                Box::pin(async move { registry.serve(call).await })
            }),
        );
        let looking = Rc::clone(&registry);
        world.kernel.spawn(registry.process, async move { looking.look().await });
        registry
    }

    fn kernel(&self) -> &Kernel {
        &self.world.kernel
    }

    fn wall(&self) -> Timestamp {
        self.kernel().wall(self.process)
    }

    /// Nobody leads any more.
    pub fn go_away(&self) {
        self.away.set(true);
        self.life.set(self.life.get() + 1);
        self.changed.notify();
    }

    /// Another one leads, and commits what the one before had left in a majority's logs.
    pub fn come_back(&self) {
        if self.away.replace(false) {
            self.store.borrow_mut().restart();
            for call in self.inherited.take() {
                let _ = self.apply(call);
            }
        }
    }

    /// Its disk gets slow for a while.
    pub fn slow_down(&self, until: Instant) {
        self.slow_until.set(until);
    }

    /// Which leader it is that a watch began with.
    pub fn life(&self) -> u64 {
        self.life.get()
    }

    /// Waits until there is a change of this revision or a later one, or a watch that began with this leader is over.
    pub async fn newer_than(&self, next: u64, life: u64) {
        let news = self.changed.until(|| self.newest.get() >= next || self.life.get() != life);
        self.kernel().timeout(WATCH_LOOK, news).await;
    }

    /// Every change from a revision on.
    pub fn changes(&self, next: u64) -> Vec<(u64, Option<Change>)> {
        let changes = self.store.borrow().changes(next.saturating_sub(1));
        changes.into_iter().filter_map(|message| self.change(message)).collect()
    }

    fn change(&self, message: pb::WatchResponse) -> Option<(u64, Option<Change>)> {
        let revision = message.revision;
        let Some(Message::Event(event)) = message.message else { return None };
        let change = match event.object {
            Some(Object::Job(job)) => Job::try_from(job).map(|job| Some(Change::Job(Box::new(job)))),
            Some(Object::Vm(vm)) => Vm::try_from(vm).map(|vm| Some(Change::Vm(Box::new(vm)))),
            Some(Object::Node(node)) => Node::try_from(node).map(|node| Some(Change::Node(Box::new(node)))),
            Some(Object::PurgedVmId(_) | Object::PurgedJobId(_)) | None => Ok(None),
        };
        match change {
            Ok(change) => Some((revision, change)),
            Err(error) => {
                self.world.checker.borrow_mut().fail(format!("the registry shows what does not parse: {error}"));
                None
            }
        }
    }

    async fn look(&self) {
        loop {
            self.kernel().sleep(LOOK_EVERY).await;
            if !self.away.get() {
                let now = self.wall();
                self.store.borrow_mut().pass_time(now, LOOK_EVERY);
                self.publish();
            }
        }
    }

    async fn serve(self: Rc<Self>, call: Call) -> Result<Answer, Error> {
        let Call::Registry(call) = call else { return Err(Error::new(Reason::Unspecified, "not a registry's call")) };
        if self.away.get() {
            self.kernel().sleep(self.kernel().between(Duration::ZERO, Duration::from_secs(2))).await;
            return Err(unavailable("the registry has no leader"));
        }
        let life = self.life.get();
        let writes = !is_read(&call);
        if writes {
            self.fsync().await;
        }
        if self.life.get() != life {
            // It may be in the logs of a majority all the same.
            if writes && self.kernel().random(|random| random.per_mille(400)) {
                self.inherit(call);
            }
            return Err(unavailable("the registry's leader is gone"));
        }
        let answer = self.apply(call);
        if writes {
            self.fsync().await;
        }
        if self.life.get() == life { answer } else { Err(unavailable("the registry's leader is gone")) }
    }

    /// A change that its caller does not hear of.
    fn inherit(&self, call: RegistryCall) {
        if self.away.get() {
            self.inherited.borrow_mut().push(call);
        } else {
            let _ = self.apply(call);
        }
    }

    async fn fsync(&self) {
        let slow = self.kernel().now() < self.slow_until.get();
        let (least, most) = if slow { (50, 4000) } else { (0, 3) };
        self.kernel().sleep(self.kernel().between(Duration::from_millis(least), Duration::from_millis(most))).await;
    }

    /// Carries a call out, here and now.
    fn apply(&self, mut call: RegistryCall) -> Result<Answer, Error> {
        let epoch = epoch_of(&mut call).map(|epoch| {
            // Without this protection the registry does not look at it.
            if self.world.protects(Protection::Epoch) { *epoch } else { std::mem::take(epoch) }
        });
        let answer = answer(&mut self.store.borrow_mut(), self.wall(), call);
        match (&answer, epoch) {
            (Ok(Answer::Lease(lease)), _) => self.world.checker.borrow_mut().leads(lease.epoch),
            (Ok(_), Some(epoch)) => self.world.checker.borrow_mut().wrote(epoch),
            (Ok(_), None) | (Err(_), _) => {}
        }
        self.publish();
        answer
    }

    /// Shows what has changed: to the checker at once, to watches when they look.
    fn publish(&self) {
        let changes = self.changes(self.newest.get() + 1);
        for (revision, change) in changes {
            self.newest.set(revision);
            let mut checker = self.world.checker.borrow_mut();
            match change {
                Some(Change::Job(job)) => checker.job_changed(*job),
                Some(Change::Vm(vm)) => checker.vm_changed(self.kernel().now(), *vm),
                Some(Change::Node(node)) => checker.node_changed(*node),
                None => {}
            }
        }
        self.changed.notify();
    }
}

/// The epoch under which a scheduler writes.
fn epoch_of(call: &mut RegistryCall) -> Option<&mut u64> {
    match call {
        RegistryCall::CreateVm(request) => Some(&mut request.scheduler_epoch),
        RegistryCall::TransitionVm(request) => Some(&mut request.scheduler_epoch),
        RegistryCall::AssignJob(request) => Some(&mut request.scheduler_epoch),
        RegistryCall::FinishAttempt(request) => Some(&mut request.scheduler_epoch),
        RegistryCall::FailQueuedJob(request) => Some(&mut request.scheduler_epoch),
        _ => None,
    }
}

fn is_read(call: &RegistryCall) -> bool {
    matches!(
        call,
        RegistryCall::GetVm(_)
            | RegistryCall::ListVms(_)
            | RegistryCall::GetJob(_)
            | RegistryCall::ListJobs(_)
            | RegistryCall::ListNodes(_)
            | RegistryCall::Heartbeat(_)
    )
}

fn answer(store: &mut Store, now: Timestamp, call: RegistryCall) -> Result<Answer, Error> {
    Ok(match call {
        RegistryCall::CreateVm(request) => vm(store.create_vm(now, request)?.vm),
        RegistryCall::TransitionVm(request) => vm(store.transition_vm(now, request)?.vm),
        RegistryCall::GetVm(request) => vm(store.get_vm(now, request)?.vm),
        RegistryCall::ListVms(request) => Answer::VmPage(store.list_vms(now, request)?),
        RegistryCall::CreateJob(request) => job(store.create_job(now, request)?.job),
        RegistryCall::CreateJobs(request) => Answer::Jobs(store.create_jobs(now, request)?.jobs),
        RegistryCall::AssignJob(request) => job(store.assign_job(now, request)?.job),
        RegistryCall::StartAttempt(request) => job(store.start_attempt(now, request)?.job),
        RegistryCall::FinishAttempt(request) => job(store.finish_attempt(now, request)?.job),
        RegistryCall::CancelJob(request) => job(store.cancel_job(now, request)?.job),
        RegistryCall::FailQueuedJob(request) => job(store.fail_queued_job(now, request)?.job),
        RegistryCall::GetJob(request) => job(store.get_job(now, request)?.job),
        RegistryCall::ListJobs(request) => Answer::JobPage(store.list_jobs(now, request)?),
        RegistryCall::RegisterNode(request) => node(store.register_node(now, request)?.node),
        RegistryCall::UpdateNode(request) => node(store.update_node(now, request)?.node),
        RegistryCall::ListNodes(request) => Answer::NodePage(store.list_nodes(now, request)?),
        RegistryCall::Heartbeat(request) => {
            let every = store.heard(now, &request.node_id, request.incarnation)?;
            let interval_ms = u32::try_from(every.as_millis()).unwrap_or(u32::MAX);
            Answer::Heartbeat(pb::HeartbeatResponse { interval_ms })
        }
        RegistryCall::AcquireLease(request) => Answer::Lease(store.acquire_lease(now, request)?),
    })
}

fn vm(vm: Option<blixard::pb::common::v1::Vm>) -> Answer {
    Answer::Vm(vm.unwrap_or_default())
}

fn job(job: Option<blixard::pb::common::v1::Job>) -> Answer {
    Answer::Job(Box::new(job.unwrap_or_default()))
}

fn node(node: Option<blixard::pb::common::v1::Node>) -> Answer {
    Answer::Node(node.unwrap_or_default())
}
