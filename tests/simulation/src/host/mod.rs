//! A node: its machines and disk, which outlive its vmhost, and the vmhost, which does as the real one: the real lifecycle
//! decides for each VM, recovery adopts or ends what an earlier vmhost left, what the registry says is made to agree with what is
//! here, and the node's lease is kept by heartbeats.

pub mod disk;
pub mod driver;
pub mod registry;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    limits::DEFAULT_STOP_GRACE,
    pb::{common::v1 as common, registry::v1 as registry_pb, vmhost::v1 as pb},
    time::Timestamp,
    vm::{Vm, VmConfig, VmKind, VmState},
};
use blixard_vmhost::{
    lease::{LEASE, Lease},
    lifecycle::{Input, Lifecycle, Limits, Outcome, Run, Stop},
};
use futures::future::join_all;

use self::{
    disk::{AttemptRecord, Disk, EndRecord, Fence, VmDir, VmRecord},
    driver::{Beginning, LiveLogs, Mail, Order, Report, VmHandle},
    registry::{Registry, is_answer},
};
use crate::{
    guest::Machine,
    kernel::{Instant, Kernel, ProcessId},
    settings::Protection,
    wire::{Answer, Call, HostCall},
    world::World,
};

/// Pause before a broken stream of heartbeats is begun again.
const RECONNECT_AFTER: Duration = Duration::from_millis(500);
/// Pause before the node registers again.
const REGISTER_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How long the agent of an adopted VM has to answer.
const ADOPT_PATIENCE: Duration = Duration::from_secs(30);
/// How often a vmhost looks whether its lease is over.
const LEASE_LOOK: Duration = Duration::from_secs(1);

/// What a node offers.
#[derive(Debug, Clone)]
pub struct Offer {
    pub vcpus: u32,
    pub memory_mib: u64,
    pub max_vms: u32,
    pub images: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

/// A node without its vmhost.
pub struct Site {
    pub id: NodeId,
    pub process: ProcessId,
    offer: Offer,
    disk: Disk,
    machines: RefCell<BTreeMap<VmId, Rc<Machine>>>,
    boots: Cell<u64>,
}

impl Site {
    /// A new node, with an empty disk.
    pub fn new(kernel: &Kernel, name: &str, offer: Offer) -> Rc<Self> {
        let id = NodeId::parse("node", name).unwrap_or_else(|error| panic!("{error}"));
        Rc::new(Self {
            id,
            process: kernel.process(name),
            offer,
            disk: Disk::new(kernel),
            machines: RefCell::default(),
            boots: Cell::new(1),
        })
    }

    pub fn boot(&self) -> u64 {
        self.boots.get()
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    fn launch(&self, world: &World, vm: VmId, memory_mib: u32) -> Rc<Machine> {
        let machine = Machine::launch(world, &self.id, vm, memory_mib);
        self.machines.borrow_mut().insert(vm, Rc::clone(&machine));
        machine
    }

    /// Ends what is left of a VM.
    fn sweep(&self, vm: VmId) {
        if let Some(machine) = self.machines.borrow_mut().remove(&vm) {
            machine.die("it was swept");
        }
    }

    fn adopt(&self, vm: VmId) -> Option<Rc<Machine>> {
        self.machines.borrow().get(&vm).filter(|machine| machine.lives()).cloned()
    }

    /// Machines that live.
    pub fn living(&self) -> Vec<Rc<Machine>> {
        self.machines.borrow().values().filter(|machine| machine.lives()).cloned().collect()
    }

    /// Its vmhost is killed; its machines go on.
    pub fn kill_vmhost(&self, world: &World) {
        world.network.close(self.process);
        world.kernel.kill(self.process);
    }

    /// Its power fails.
    pub fn lose_power(&self, world: &World) {
        self.kill_vmhost(world);
        let machines = std::mem::take(&mut *self.machines.borrow_mut());
        for machine in machines.into_values() {
            machine.die("its host lost power");
        }
        self.disk.lose_power();
        self.boots.set(self.boots.get() + 1);
    }
}

/// A lower attempt than one seen before.
fn stale(job: JobId, attempt: u32, current: u32) -> Error {
    let message = format!("attempt {attempt} of job {job} is over: this node has seen attempt {current}");
    Error::new(Reason::StaleAttempt, message)
}

/// The time of a clock that never jumps.
pub(crate) fn monotonic(world: &World) -> Duration {
    world.kernel.now().since(Instant::default())
}

/// A vmhost, from its start to its end.
pub struct Host {
    world: World,
    site: Rc<Site>,
    registry: Registry,
    vms: RefCell<BTreeMap<VmId, VmHandle>>,
    live_logs: LiveLogs,
    lease: RefCell<Lease>,
    /// Which incarnation of the node it is; 0: not registered yet.
    incarnation: Cell<u64>,
}

/// Starts a node's vmhost.
pub fn start(world: &World, site: &Rc<Site>) {
    world.kernel.revive(site.process);
    world.kernel.trace(format_args!("{} vmhost starts", site.id));
    let host = Rc::new(Host {
        world: world.clone(),
        site: Rc::clone(site),
        registry: Registry { world: world.clone(), process: site.process, node: site.id.clone() },
        vms: RefCell::default(),
        live_logs: RefCell::default(),
        lease: RefCell::new(Lease::new(LEASE, monotonic(world))),
        incarnation: Cell::default(),
    });
    let starting = Rc::clone(&host);
    host.spawn(async move {
        starting.recover().await;
        let serving = Rc::clone(&starting);
        starting.world.network.serve(
            starting.site.process,
            Rc::new(move |call| {
                let host = Rc::clone(&serving);
                Box::pin(async move { host.serve(call).await })
            }),
        );
        let watching = Rc::clone(&starting);
        starting.spawn(async move { watching.keep_lease().await });
        starting.keep_registered().await;
    });
}

impl Host {
    fn kernel(&self) -> &Kernel {
        &self.world.kernel
    }

    fn wall(&self) -> Timestamp {
        self.kernel().wall(self.site.process)
    }

    fn disk(&self) -> &Disk {
        &self.site.disk
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.kernel().spawn(self.site.process, task);
    }

    /// What anything takes that goes to another process of the node.
    async fn pause(&self) {
        self.kernel().sleep(self.kernel().between(Duration::from_micros(100), Duration::from_millis(5))).await;
    }

    fn forget(&self, vm: VmId) {
        self.vms.borrow_mut().remove(&vm);
    }

    fn vm(&self, vm: VmId) -> Option<VmHandle> {
        self.vms.borrow().get(&vm).cloned()
    }

    fn handles(&self) -> Vec<(VmId, VmHandle)> {
        self.vms.borrow().iter().map(|(id, vm)| (*id, vm.clone())).collect()
    }

    fn fence(&self, job: JobId, attempt: u32) -> Fence {
        if !self.world.protects(Protection::Fence) {
            return Fence::Open;
        }
        match self.disk().highest(job) {
            Some(current) if current > attempt => return Fence::Stale { current },
            Some(current) if current == attempt => {}
            Some(_) | None => return Fence::Open,
        }
        if self.live_logs.borrow().contains(&(job, attempt)) {
            return Fence::Running;
        }
        if self.disk().log_end(job, attempt).is_some() { Fence::Ended } else { Fence::Open }
    }

    // Serving.

    async fn serve(self: Rc<Self>, call: Call) -> Result<Answer, Error> {
        let Call::Host(call) = call else { return Err(Error::new(Reason::Unspecified, "not a vmhost's call")) };
        match call {
            HostCall::StartVm(request) => self.start_vm(request).await?,
            HostCall::StopVm(request) => self.stop_vm(request).await?,
            HostCall::RunJob(request) => self.run_job(request).await?,
            HostCall::CancelJob(request) => self.cancel_job(request).await?,
        }
        Ok(Answer::Done)
    }

    async fn start_vm(self: &Rc<Self>, request: pb::StartVmRequest) -> Result<(), Error> {
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let config = VmConfig::parse_full("config", request.config)?;
        let vm = self.find_or_spawn(vm_id, config)?;
        vm.ask(Mail::Accepted).await
    }

    fn find_or_spawn(self: &Rc<Self>, vm_id: VmId, config: VmConfig) -> Result<VmHandle, Error> {
        if let Some(vm) = self.vm(vm_id) {
            let reused =
                || Error::new(Reason::RequestIdReused, format!("VM {vm_id} is here already, with another config"));
            return if vm.config == config { Ok(vm) } else { Err(reused()) };
        }
        let (count, memory_mib) = {
            let vms = self.vms.borrow();
            let alive = || vms.values().filter(|vm| !vm.state.get().is_terminal());
            (alive().count(), alive().map(|vm| u64::from(vm.config.memory_mib)).sum::<u64>())
        };
        if count >= self.site.offer.max_vms as usize {
            return Err(Error::new(Reason::Overloaded, format!("this node runs {count} VMs already")));
        }
        if memory_mib + u64::from(config.memory_mib) > self.site.offer.memory_mib {
            return Err(Error::new(Reason::Overloaded, format!("this node's VMs have {memory_mib} MiB already")));
        }
        let life = Lifecycle::launching(config.kind);
        let record = VmRecord { config, host_boot: self.site.boot(), guest_boot: None, stop: None, end: None };
        let beginning =
            Beginning { id: vm_id, record, life, machine: None, attempt: None, reports: vec![], inputs: vec![] };
        let vm = driver::spawn(self, beginning);
        self.vms.borrow_mut().insert(vm_id, vm.clone());
        Ok(vm)
    }

    async fn stop_vm(&self, request: pb::StopVmRequest) -> Result<(), Error> {
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let grace = request.grace_ms.map_or(DEFAULT_STOP_GRACE, Duration::from_millis);
        if let Some(vm) = self.vm(vm_id) {
            return match self.stop(&vm, grace, request.reason.clone()).await {
                Err(error) if error.reason == Reason::VmNotFound => Ok(()),
                answer => answer,
            };
        }
        let not_found = || Error::new(Reason::VmNotFound, format!("this node has no VM {vm_id}"));
        let recorded = self.registry.vm(vm_id).await?.ok_or_else(not_found)?;
        if recorded.node_id != self.site.id.as_str() {
            return Err(not_found());
        }
        self.bury(vm_id, VmState::Terminated, &request.reason).await
    }

    async fn stop(&self, vm: &VmHandle, grace: Duration, reason: String) -> Result<(), Error> {
        let stop = Stop { deadline: self.wall().plus(grace), reason };
        vm.ask(|reply| Mail::Stop { stop, reply }).await
    }

    async fn bury(&self, vm: VmId, state: VmState, reason: &str) -> Result<(), Error> {
        self.site.sweep(vm);
        self.registry.until_answered(|| self.registry.end_vm(vm, state, true, reason)).await
    }

    async fn run_job(&self, request: pb::RunJobRequest) -> Result<(), Error> {
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let job = JobId::parse("job_id", &request.job_id)?;
        let attempt = request.attempt;
        match self.fence(job, attempt) {
            Fence::Stale { current } => return Err(stale(job, attempt, current)),
            Fence::Ended | Fence::Running => return Ok(()),
            Fence::Open => {}
        }
        if !self.may_begin() {
            return Err(Error::new(Reason::PeerUnavailable, "the registry does not hear this node"));
        }
        let protects = self.world.protects(Protection::Incarnation);
        if protects && request.incarnation > 0 && request.incarnation != self.incarnation.get() {
            let message = format!("this is incarnation {}, not {}", self.incarnation.get(), request.incarnation);
            return Err(Error::new(Reason::StaleIncarnation, message));
        }
        let spec = request.spec.unwrap_or_default();
        let (timeout_ms, start_timeout_ms) = (spec.timeout_ms, spec.start_timeout_ms);
        let run = Run::new(job, attempt, limits(timeout_ms, start_timeout_ms), self.wall());
        let order = Order { command: spec.command, timeout_ms, start_timeout_ms };
        let answer = match self.vm(vm_id) {
            Some(vm) => vm.ask(|reply| Mail::Run { run, order, reply }).await,
            None => Err(Error::new(Reason::VmNotFound, format!("this node has no VM {vm_id}"))),
        };
        if let Err(error) = &answer
            && matches!(error.reason, Reason::VmNotFound | Reason::VmNotAccepting)
        {
            self.refuse(job, attempt, &error.message).await;
        }
        answer
    }

    /// The scheduler will give it to another: an order that comes again, late, must not begin it here.
    async fn refuse(&self, job: JobId, attempt: u32, reason: &str) {
        if self.fence(job, attempt) == Fence::Open {
            self.live_logs.borrow_mut().insert((job, attempt));
            let outcome = Outcome::Lost { started: false, reason: reason.to_owned() };
            let end = EndRecord { outcome, started_at: None, finished_at: self.wall() };
            self.disk().finish_log(job, attempt, end).await;
            self.live_logs.borrow_mut().remove(&(job, attempt));
        }
    }

    async fn cancel_job(&self, request: pb::CancelJobRequest) -> Result<(), Error> {
        let job = JobId::parse("job_id", &request.job_id)?;
        let attempt = request.attempt;
        let cancel = |vm: VmHandle| async move { vm.ask(|reply| Mail::Cancel { job, attempt, reply }).await };
        let running = self.handles().into_iter().find(|(_, vm)| vm.run.get() == Some((job, attempt)));
        if let Some((_, vm)) = running {
            return match cancel(vm).await {
                Err(error) if error.reason == Reason::VmNotFound => Ok(()),
                answer => answer,
            };
        }
        match self.fence(job, attempt) {
            Fence::Open => {
                Err(Error::new(Reason::JobNotFound, format!("this node has no attempt {attempt} of job {job}")))
            }
            Fence::Running => {
                let answers = join_all(self.handles().into_iter().map(|(_, vm)| cancel(vm))).await;
                let failed =
                    answers.into_iter().filter_map(Result::err).find(|error| error.reason != Reason::VmNotFound);
                failed.map_or(Ok(()), Err)
            }
            Fence::Ended | Fence::Stale { .. } => Ok(()),
        }
    }

    // The node's place in the registry.

    /// Whether attempts may begin.
    fn may_begin(&self) -> bool {
        !self.world.protects(Protection::NodeLease) || self.lease.borrow().holds(monotonic(&self.world))
    }

    fn lease_for_guest(&self) -> Option<Duration> {
        let left = self.lease.borrow().for_guest(monotonic(&self.world));
        if self.world.protects(Protection::NodeLease) { left } else { Some(LEASE) }
    }

    fn renew_every(&self) -> Duration {
        self.lease.borrow().renew_every()
    }

    /// Ends every attempt that runs when the lease is over.
    async fn keep_lease(&self) {
        loop {
            let now = monotonic(&self.world);
            let left = self.lease.borrow().end().saturating_sub(now);
            if left.is_zero() && self.world.protects(Protection::NodeLease) {
                for (_, vm) in self.handles().into_iter().filter(|(_, vm)| vm.run.get().is_some()) {
                    let _ = vm.mail.unbounded_send(Mail::Input(Input::LeaseOver));
                }
            }
            self.kernel().sleep(if left.is_zero() { LEASE_LOOK } else { left.min(LEASE_LOOK) }).await;
        }
    }

    async fn keep_registered(self: &Rc<Self>) {
        loop {
            let request_id = self.kernel().random(crate::random::Random::uuid).to_string();
            let request = registry_pb::RegisterNodeRequest { node: Some(self.node()), request_id };
            // The first one counts for the lease: what a later one is answered may be the answer to that.
            let first_sent = Cell::new(None);
            let registered = self.registry.until_answered(|| async {
                self.reconcile().await?;
                first_sent.set(first_sent.get().or(Some(monotonic(&self.world))));
                self.registry.register(request.clone()).await
            });
            let Ok(incarnation) = registered.await else { return };
            // What was given up in the moment before the node registered is only seen now.
            let _ = self.registry.until_answered(|| self.reconcile()).await;
            if let Some(sent) = first_sent.get() {
                self.lease.borrow_mut().answered(sent);
            }
            self.incarnation.set(incarnation);
            self.beat(incarnation).await;
            self.kernel().sleep(REGISTER_AGAIN_AFTER).await;
        }
    }

    fn node(&self) -> common::Node {
        let Offer { vcpus, memory_mib, max_vms, images, labels } = self.site.offer.clone();
        common::Node {
            id: self.site.id.to_string(),
            endpoint: format!("http://{}", self.site.id),
            driver: "simulation".to_owned(),
            vcpus,
            memory_mib,
            max_vms,
            images,
            labels,
            ..Default::default()
        }
    }

    /// Says that the node lives; returns when this incarnation does not any more.
    async fn beat(&self, incarnation: u64) {
        loop {
            let sent = monotonic(&self.world);
            let pause = match self.registry.heartbeat(incarnation).await {
                Ok(pause) => {
                    self.lease.borrow_mut().answered(sent);
                    pause
                }
                Err(error) if is_answer(&error) => return,
                Err(_) => RECONNECT_AFTER,
            };
            self.kernel().sleep(pause).await;
        }
    }

    async fn reconcile(self: &Rc<Self>) -> Result<(), Error> {
        let recorded = self.registry.vms_of_this_node().await?;
        for (id, vm) in self.handles() {
            self.end_superseded(id, &vm).await?;
        }
        for (id, vm) in self.handles() {
            if !recorded.iter().any(|recorded| recorded.id == id.to_string()) {
                self.end_unwanted(id, &vm).await?;
            }
        }
        for vm in recorded {
            self.bury_missing(vm).await;
        }
        Ok(())
    }

    /// An attempt that runs here and that the registry takes for over: somebody else may run its job.
    async fn end_superseded(&self, id: VmId, vm: &VmHandle) -> Result<(), Error> {
        let Some((job, attempt)) = vm.run.get() else { return Ok(()) };
        if !self.registry.is_current(id, job, attempt).await? {
            let _ = vm.mail.unbounded_send(Mail::Input(Input::Superseded { job, attempt }));
        }
        Ok(())
    }

    async fn end_unwanted(&self, id: VmId, vm: &VmHandle) -> Result<(), Error> {
        if vm.state.get().is_terminal() {
            return Ok(());
        }
        let recorded = self.registry.vm(id).await?;
        let state = recorded.and_then(|vm| VmState::from_pb("vm.state", vm.state).ok());
        if state.is_none_or(VmState::is_terminal) {
            let _ = self.stop(vm, Duration::ZERO, "the registry takes it for ended".to_owned()).await;
        }
        Ok(())
    }

    async fn bury_missing(&self, vm: common::Vm) {
        let Ok(vm) = Vm::try_from(vm) else { return };
        if vm.state == VmState::Starting || self.vm(vm.id).is_some() {
            return;
        }
        let ending = if vm.state == VmState::Draining { VmState::Terminated } else { VmState::Failed };
        let _ = self.bury(vm.id, ending, "its node does not know it any more").await;
    }

    // Recovery.

    async fn recover(self: &Rc<Self>) {
        join_all(self.disk().dirs().into_iter().map(|(id, dir)| self.recover_vm(id, dir))).await;
        // Processes without a directory are found by their environment.
        let known: Vec<VmId> = self.handles().into_iter().map(|(id, _)| id).collect();
        for machine in self.site.living().into_iter().filter(|machine| !known.contains(&machine.vm)) {
            self.site.sweep(machine.vm);
        }
    }

    async fn recover_vm(self: &Rc<Self>, id: VmId, dir: VmDir) {
        let VmDir { vm, attempt } = dir;
        match vm {
            Some(record) if record.guest_boot.is_some() || record.stop.is_some() || record.end.is_some() => {
                let machine = self.adopt(id, &record).await;
                let vm = driver::spawn(self, self.beginning(id, record, machine, attempt));
                self.vms.borrow_mut().insert(id, vm);
            }
            // Never Ready, so no job has met it: it is started afresh when the scheduler asks again.
            Some(_) | None => {
                self.site.sweep(id);
                self.disk().remove(id);
                self.disk().forget(id);
            }
        }
    }

    async fn adopt(&self, id: VmId, record: &VmRecord) -> Option<Rc<Machine>> {
        let machine = match record.guest_boot.filter(|_| record.end.is_none()) {
            Some(boot) => self.site.adopt(id).filter(|machine| machine.boot_id == boot),
            None => None,
        };
        let answers = match &machine {
            Some(machine) => self.kernel().timeout(ADOPT_PATIENCE, machine.agent()).await.is_some(),
            None => false,
        };
        if !answers || machine.as_ref().is_some_and(|machine| !machine.lives()) {
            self.site.sweep(id);
            return None;
        }
        machine
    }

    fn beginning(
        &self,
        id: VmId,
        mut record: VmRecord,
        machine: Option<Rc<Machine>>,
        attempt: Option<AttemptRecord>,
    ) -> Beginning {
        let (mut reports, mut inputs) = (Vec::new(), Vec::new());
        let used = attempt.is_some();
        if machine.is_some() && !used {
            reports.push(Report::Ready);
        }
        let run = attempt.as_ref().map(run_of);
        let ended = attempt.as_ref().and_then(|attempt| self.disk().log_end(attempt.job, attempt.attempt));
        let attempt = attempt.map(|attempt| match &ended {
            Some(end) => {
                reports.push(Report::Finished { job: attempt.job, attempt: attempt.attempt, end: end.clone() });
                (attempt, false)
            }
            None => {
                self.disk().begin_log(attempt.job, attempt.attempt);
                self.live_logs.borrow_mut().insert((attempt.job, attempt.attempt));
                (attempt, true)
            }
        });
        let run = run.filter(|_| machine.is_some() || ended.is_none());
        if machine.is_some() {
            inputs.push(if ended.is_some() { Input::WasOver } else { Input::Resumed });
        }
        let mut life = Lifecycle::adopted(record.config.kind, run, used);
        if machine.is_none() {
            let told_to_end = record.config.kind == VmKind::Ephemeral
                && ended.is_some_and(|end| matches!(end.outcome, Outcome::Result { .. }));
            let end = told_to_end.then(|| (VmState::Terminated, "its job has ended".to_owned()));
            life = life.decided(record.end.take().or(end), record.stop.clone());
            inputs.push(Input::MachineExited { how: "it ended while vmhost was down".to_owned() });
        } else if let Some(stop) = record.stop.clone() {
            inputs.insert(0, Input::Stop(stop));
        }
        Beginning { id, record, life, machine, attempt, reports, inputs }
    }
}

fn run_of(attempt: &AttemptRecord) -> Run {
    let limits = limits(attempt.timeout_ms, attempt.start_timeout_ms);
    Run { cause: attempt.cause, ..Run::new(attempt.job, attempt.attempt, limits, attempt.arrived_at) }
}

fn limits(timeout_ms: u64, start_timeout_ms: u64) -> Limits {
    let limit = |ms| (ms > 0).then(|| Duration::from_millis(ms));
    Limits { run: limit(timeout_ms), start: limit(start_timeout_ms) }
}
