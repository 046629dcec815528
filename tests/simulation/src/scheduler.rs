//! A scheduler: the real control loop with the real engine in it. Here its actions are carried out over the world's network, as
//! the shell does over gRPC, and users' calls are taken as the front door takes them.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use blixard::{
    config::Config,
    error::{Error, Reason},
    id::{JobId, VmId},
    job::{Job, JobSpec, JobState},
    limits::DEFAULT_IMAGE,
    node::Node,
    pb::{common::v1 as common, registry::v1 as registry_pb, scheduler::v1 as front},
    time::Timestamp,
    vm::{Defaults, Vm, VmConfig, VmState},
};
use blixard_scheduler::{
    control::{self, Action, CallId, Change, Clock, Control, Event, Identity, Listing, Reply, Round},
    engine,
};
use futures::{
    StreamExt,
    channel::{mpsc, oneshot},
    future::Either,
};

use crate::{
    host::monotonic,
    kernel::{Kernel, ProcessId},
    network::is_open,
    registry::Registry,
    settings::Protection,
    turns::Turns,
    wire::{Answer, Call, FrontCall, HostCall, RegistryCall, short},
    world::{MAX_VMS, World},
};

/// How long another service has to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a user's call is tried.
const USERS_PATIENCE: Duration = Duration::from_secs(20);
/// The invariants of the engine are looked at after one of so many events.
const LOOK_EVERY: u64 = 16;
const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 256 };

type VmReply = oneshot::Sender<Result<Box<Vm>, Error>>;

/// A scheduler, from its start to its end.
struct Scheduler {
    world: World,
    registry: Rc<Registry>,
    process: ProcessId,
    events: mpsc::UnboundedSender<Event>,
    /// Users who wait for their VM.
    requested: RefCell<BTreeMap<VmId, VmReply>>,
    round: RefCell<Round>,
    clock: RefCell<Clock>,
}

/// Starts one.
pub fn start(world: &World, registry: &Rc<Registry>, process: ProcessId) {
    let kernel = &world.kernel;
    kernel.revive(process);
    let instance = kernel.random(crate::random::Random::uuid);
    let name = kernel.name(process);
    kernel.trace(format_args!("{name} starts as {}", short(&instance.to_string())));
    let (events, inbox) = mpsc::unbounded();
    let scheduler = Rc::new(Scheduler {
        world: world.clone(),
        registry: Rc::clone(registry),
        process,
        events,
        requested: RefCell::default(),
        round: RefCell::default(),
        clock: RefCell::default(),
    });
    let mut ids = kernel.random(crate::random::Random::fork);
    let mut settings = settings();
    if !world.protects(Protection::Grace) {
        settings.lost_node_grace = Duration::ZERO;
    }
    let control = Control::new(settings, Identity { name, instance }, move || VmId(ids.uuid()));
    let control = Rc::new(RefCell::new(control));
    world.controls.borrow_mut().insert(process, Rc::clone(&control));
    let serving = Rc::clone(&scheduler);
    world.network.serve(
        process,
        Rc::new(move |call| {
            let scheduler = Rc::clone(&serving);
            Box::pin(async move { scheduler.serve(call).await })
        }),
    );
    kernel.spawn(process, scheduler.drive(control, inbox));
}

/// How this world's schedulers decide: as by default, but with everything on and sooner, so that a run sees it.
fn settings() -> engine::Settings {
    engine::Settings {
        max_vms: MAX_VMS,
        pre_warm: [(DEFAULT_IMAGE.to_owned(), 1)].into(),
        max_service_vms: 5,
        scale_down_after: Duration::from_secs(120),
        recycle_after_jobs: 10,
        recycle_after: Some(Duration::from_secs(900)),
        tenant_limits: [("blue".to_owned(), 4)].into(),
        defaults: DEFAULTS,
        ..engine::Settings::from(&Config::default())
    }
}

impl Scheduler {
    fn kernel(&self) -> &Kernel {
        &self.world.kernel
    }

    fn now(&self) -> Timestamp {
        self.kernel().wall(self.process)
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.kernel().spawn(self.process, task);
    }

    fn tell(&self, event: Event) {
        let _ = self.events.unbounded_send(event);
    }

    async fn drive(self: Rc<Self>, control: Rc<RefCell<Control>>, mut inbox: mpsc::UnboundedReceiver<Event>) {
        let mut turns = Watcher { turns: Turns::new(settings().ageing), covered: 0, assigning: BTreeMap::new() };
        let mut event = Event::Tick;
        for number in 0.. {
            if self.clock.borrow_mut().was_set(self.now(), monotonic(&self.world)) {
                self.turn(&control, &mut turns, Event::ClockSet, false);
            }
            self.turn(&control, &mut turns, event, number % LOOK_EVERY == 0);
            let wake = control.borrow().next_wake();
            event = self.next(&mut inbox, wake).await;
        }
    }

    /// One event, and what is to be done about it.
    fn turn(self: &Rc<Self>, control: &RefCell<Control>, turns: &mut Watcher, event: Event, look: bool) {
        if self.is_news(&event) {
            turns.before(&event);
        }
        let (actions, leads) = self.handle(&mut control.borrow_mut(), event, look);
        if !leads {
            turns.turns.undone(None);
        }
        for action in actions {
            if let Err(wrong) = turns.sees(self.now(), &action) {
                let name = self.kernel().name(self.process);
                self.world.checker.borrow_mut().fail(format!("{name}: {wrong}"));
            }
            self.carry_out(action);
        }
    }

    /// One event: what is to be done, and whether it leads.
    fn handle(&self, control: &mut Control, event: Event, look: bool) -> (Vec<Action>, bool) {
        let (led, name) = (control.epoch(), self.kernel().name(self.process));
        let actions = control.handle(self.now(), event);
        if look && let Some(broken) = control.engine().broken_invariant() {
            self.world.checker.borrow_mut().fail(format!("the engine of {name}: {broken}"));
        }
        if led != control.epoch() {
            self.kernel().trace(format_args!("{name} leads: {:?}", control.epoch()));
        }
        (actions, control.epoch().is_some())
    }

    /// What an earlier list, or its watch, still brings is ignored.
    fn is_news(&self, event: &Event) -> bool {
        match event {
            Event::Listed { round, .. } | Event::Changed { round, .. } | Event::WatchEnded { round } => {
                *round == *self.round.borrow()
            }
            _ => true,
        }
    }

    async fn next(&self, inbox: &mut mpsc::UnboundedReceiver<Event>, wake: Option<Timestamp>) -> Event {
        let kernel = self.kernel().clone();
        let now = self.now();
        let tick = async move {
            match wake {
                // A tick before its time would come again at once.
                Some(wake) => kernel.sleep(wake.since(now) + Duration::from_millis(1)).await,
                None => std::future::pending().await,
            }
        };
        match futures::future::select(inbox.next(), std::pin::pin!(tick)).await {
            Either::Left((Some(event), _)) => event,
            Either::Left((None, _)) | Either::Right(_) => Event::Tick,
        }
    }

    fn carry_out(self: &Rc<Self>, action: Action) {
        let this = Rc::clone(self);
        match action {
            Action::List { round } => {
                self.round.replace(round);
                self.spawn(async move {
                    let result = this.list().await.map(Box::new);
                    this.tell(Event::Listed { round, result });
                });
            }
            Action::Watch { round, start_revision } => {
                self.spawn(async move { this.watch(round, start_revision).await })
            }
            Action::AcquireLease(request) => self.spawn(async move {
                let answer = this.registry(RegistryCall::AcquireLease(request)).await;
                let answer = match answer {
                    Ok(Answer::Lease(lease)) => Some(lease),
                    Ok(_) | Err(_) => None,
                };
                this.tell(Event::LeaseAnswered(answer));
            }),
            Action::Call { call, to } => self.spawn(async move {
                let result = this.call(to).await;
                this.tell(Event::Answered { call, result });
            }),
            Action::AnswerVm { vm_id, result } => {
                if let Some(reply) = self.requested.borrow_mut().remove(&vm_id) {
                    let _ = reply.send(result);
                }
            }
            Action::Accepted { .. } | Action::NodesChanged => {}
        }
    }

    async fn registry(&self, call: RegistryCall) -> Result<Answer, Error> {
        self.world.call_registry(self.process, call, CALL_TIMEOUT).await
    }

    async fn call(&self, to: control::Call) -> Result<Reply, Error> {
        let node = to.node().map(ToString::to_string);
        let Some(node) = node else {
            return match self.registry(registry_call(to)?).await? {
                Answer::Vm(vm) => Ok(Reply::Vm(Box::new(vm))),
                Answer::Job(job) => Ok(Reply::Job(job)),
                _ => Ok(Reply::Done),
            };
        };
        let host = self.world.node(&node).ok_or_else(|| Error::new(Reason::NodeNotFound, "no such node"))?;
        self.world.network.call(self.process, host, host_call(to)?, CALL_TIMEOUT).await.map(|_| Reply::Done)
    }

    /// Everything that is live, jobs first.
    async fn list(&self) -> Result<Listing, Error> {
        let mut listing = Listing::default();
        let states = JobState::ALL.into_iter().filter(|state| !state.is_terminal());
        let mut request = registry_pb::ListJobsRequest {
            page_size: 1000,
            states: states.map(|state| state.to_pb().into()).collect(),
            ..Default::default()
        };
        let mut first = None;
        loop {
            let Answer::JobPage(page) = self.registry(RegistryCall::ListJobs(request.clone())).await? else { break };
            listing.job_revision = *first.get_or_insert(page.revision);
            for job in page.jobs {
                listing.jobs.push(Job::try_from(job)?);
            }
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        listing.jobs.reverse();
        self.list_vms(&mut listing).await?;
        self.list_nodes(&mut listing).await?;
        Ok(listing)
    }

    async fn list_vms(&self, listing: &mut Listing) -> Result<(), Error> {
        let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
        let mut request = registry_pb::ListVmsRequest {
            page_size: 1000,
            states: states.map(|state| state.to_pb().into()).collect(),
            ..Default::default()
        };
        let mut first = None;
        loop {
            let Answer::VmPage(page) = self.registry(RegistryCall::ListVms(request.clone())).await? else {
                return Ok(());
            };
            listing.vm_revision = *first.get_or_insert(page.revision);
            for vm in page.vms {
                listing.vms.push(Vm::try_from(vm)?);
            }
            if page.next_page_token.is_empty() {
                return Ok(());
            }
            request.page_token = page.next_page_token;
        }
    }

    async fn list_nodes(&self, listing: &mut Listing) -> Result<(), Error> {
        let request = registry_pb::ListNodesRequest { page_size: 1000, ..Default::default() };
        let Answer::NodePage(page) = self.registry(RegistryCall::ListNodes(request)).await? else { return Ok(()) };
        listing.node_revision = page.revision;
        for node in page.nodes {
            listing.nodes.push(Node::try_from(node)?);
        }
        Ok(())
    }

    /// Brings all changes from a revision on, in their order, until the connection breaks.
    async fn watch(&self, round: Round, start_revision: u64) {
        let mut next = start_revision;
        let life = self.registry.life();
        loop {
            self.registry.newer_than(next, life).await;
            if *self.round.borrow() != round {
                return;
            }
            let changes = self.registry.changes(next);
            if self.registry.life() != life || !self.world.network.pass(self.world.registry, self.process).await {
                break;
            }
            for (revision, change) in changes {
                next = revision + 1;
                if let Some(change) = change {
                    self.kernel().trace(format_args!(
                        "{} sees r{revision}: {}",
                        self.kernel().name(self.process),
                        seen(&change)
                    ));
                    self.tell(Event::Changed { round, revision, change });
                }
            }
        }
        self.tell(Event::WatchEnded { round });
    }

    // The front door.

    async fn serve(self: Rc<Self>, call: Call) -> Result<Answer, Error> {
        let Call::Front(call) = call else { return Err(Error::new(Reason::Unspecified, "not a user's call")) };
        match call {
            FrontCall::SubmitJob(request) => self.submit(request).await,
            FrontCall::SubmitJobs(mut request) => {
                for job in &mut request.jobs {
                    job.spec = Some(checked(job.spec.take())?);
                }
                self.for_user(RegistryCall::CreateJobs(request)).await
            }
            FrontCall::CancelJob(request) => {
                let request = registry_pb::CancelJobRequest {
                    job_id: request.job_id,
                    reason: request.reason,
                    ..Default::default()
                };
                self.for_user(RegistryCall::CancelJob(request)).await
            }
            FrontCall::StartVm(request) => self.start_vm(request).await,
            FrontCall::StopVm(request) => {
                let request = registry_pb::TransitionVmRequest {
                    vm_id: request.vm_id,
                    to_state: common::VmState::Draining.into(),
                    reason: request.reason,
                    grace_ms: request.grace_ms,
                    ..Default::default()
                };
                self.for_user(RegistryCall::TransitionVm(request)).await
            }
            FrontCall::CordonNode(request) => {
                self.update_node(request.node_id, common::NodeState::Cordoned, request.reason, None).await
            }
            FrontCall::UncordonNode(request) => {
                self.update_node(request.node_id, common::NodeState::Ready, String::new(), None).await
            }
            FrontCall::DrainNode(request) => {
                let deadline = request.deadline_ms.map(|ms| Timestamp(self.now().0 + ms.cast_signed()));
                self.update_node(request.node_id, common::NodeState::Draining, request.reason, deadline).await
            }
        }
    }

    /// Asks the registry until it has an opinion, or the user's patience ends.
    async fn for_user(&self, call: RegistryCall) -> Result<Answer, Error> {
        let until = self.kernel().now().after(USERS_PATIENCE);
        loop {
            let answer = self.registry(call.clone()).await;
            if !answer.as_ref().is_err_and(is_open) || self.kernel().now() >= until {
                return answer;
            }
            self.kernel().sleep(self.kernel().between(Duration::from_millis(20), Duration::from_secs(1))).await;
        }
    }

    async fn submit(&self, request: front::SubmitJobRequest) -> Result<Answer, Error> {
        let spec = checked(request.spec)?;
        let request =
            registry_pb::CreateJobRequest { job_id: request.request_id, spec: Some(spec), ..Default::default() };
        let answer = self.for_user(RegistryCall::CreateJob(request)).await?;
        if let Answer::Job(job) = &answer
            && let Ok(job) = Job::try_from((**job).clone())
        {
            self.tell(Event::Submitted(Box::new(job)));
        }
        Ok(answer)
    }

    async fn start_vm(&self, request: front::StartVmRequest) -> Result<Answer, Error> {
        let vm_id = VmId::parse("request_id", &request.request_id)?;
        let config = VmConfig::parse("config", request.config.unwrap_or_default(), DEFAULTS)?;
        let (reply, answer) = oneshot::channel();
        self.requested.borrow_mut().insert(vm_id, reply);
        self.tell(Event::VmRequested { vm_id, config });
        let gone = |_| Error::new(Reason::ShuttingDown, "the scheduler is going");
        answer.await.map_err(gone)?.map(|vm| Answer::Vm((*vm).into()))
    }

    async fn update_node(
        &self,
        node_id: String,
        wanted: common::NodeState,
        reason: String,
        deadline: Option<Timestamp>,
    ) -> Result<Answer, Error> {
        let request = registry_pb::UpdateNodeRequest {
            node_id,
            wanted: wanted.into(),
            reason,
            drain_deadline: deadline.map(Into::into),
            ..Default::default()
        };
        self.for_user(RegistryCall::UpdateNode(request)).await
    }
}

/// A change, for the trace.
fn seen(change: &Change) -> String {
    match change {
        Change::Job(job) => {
            format!("job {} {} #{} r{}", short(&job.id.to_string()), job.state, job.attempt, job.revision)
        }
        Change::Vm(vm) => format!("VM {} {} r{}", short(&vm.id.to_string()), vm.state, vm.revision),
        Change::Node(node) => format!("node {} {} incarnation {}", node.id, node.state, node.incarnation),
    }
}

/// Sees what a control loop is told and what it does, for [`Turns`].
struct Watcher {
    turns: Turns,
    /// How far the watch, or the list before it, has come.
    covered: u64,
    assigning: BTreeMap<CallId, JobId>,
}

impl Watcher {
    fn before(&mut self, event: &Event) {
        match event {
            Event::Listed { result: Ok(listing), .. } => {
                self.covered = listing.job_revision;
                self.turns.listed(&listing.jobs);
            }
            Event::Changed { revision, change, .. } => {
                self.covered = *revision;
                if let Change::Job(job) = change {
                    self.turns.told(job);
                }
            }
            // One that the watch has told of already may have ended since.
            Event::Submitted(job) if job.revision > self.covered => self.turns.told(job),
            Event::Answered { call, result: Err(error) } if !is_open(error) => {
                if let Some(job) = self.assigning.remove(call) {
                    self.turns.undone(Some(job));
                }
            }
            _ => {}
        }
    }

    fn sees(&mut self, now: Timestamp, action: &Action) -> Result<(), String> {
        match action {
            Action::Call { call, to: control::Call::AssignJob(request) } if !self.assigning.contains_key(call) => {
                let Ok(job) = JobId::parse("job_id", &request.job_id) else { return Ok(()) };
                self.assigning.insert(*call, job);
                self.turns.assigns(now, job)
            }
            Action::Call { to: control::Call::FailQueuedJob(request), .. } => {
                if let Ok(job) = JobId::parse("job_id", &request.job_id) {
                    self.turns.ends(job);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A spec with every default filled in.
fn checked(spec: Option<common::JobSpec>) -> Result<common::JobSpec, Error> {
    JobSpec::parse("spec", spec.unwrap_or_default(), DEFAULTS).map(Into::into)
}

fn registry_call(to: control::Call) -> Result<RegistryCall, Error> {
    Ok(match to {
        control::Call::CreateVm(request) => RegistryCall::CreateVm(request),
        control::Call::TransitionVm(request) => RegistryCall::TransitionVm(request),
        control::Call::AssignJob(request) => RegistryCall::AssignJob(request),
        control::Call::FinishAttempt(request) => RegistryCall::FinishAttempt(request),
        control::Call::FailQueuedJob(request) => RegistryCall::FailQueuedJob(request),
        control::Call::GetJob(request) => RegistryCall::GetJob(request),
        other => return Err(Error::new(Reason::Unspecified, format!("{other:?} is no call to the registry"))),
    })
}

fn host_call(to: control::Call) -> Result<HostCall, Error> {
    match to {
        control::Call::StartVm(_, request) => Ok(HostCall::StartVm(request)),
        control::Call::StopVm(_, request) => Ok(HostCall::StopVm(request)),
        control::Call::RunJob(_, request) => Ok(HostCall::RunJob(request)),
        control::Call::CancelJob(_, request) => Ok(HostCall::CancelJob(request)),
        other => Err(unexpected_call(&other)),
    }
}

fn unexpected_call(call: &control::Call) -> Error {
    Error::new(Reason::Unspecified, format!("{call:?} is no call to a vmhost"))
}
