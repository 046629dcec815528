//! One VM's driver: the only task that touches the VM's machine, agent, attempt and record.
//!
//! ```text
//! VmHandle ── Command ──►┐
//! boot, attempt, machine │         ┌───────────┐        ┌──► disk, machine, guest
//!          ── Event ────►├─ input ─► Lifecycle ├ effect ┤
//! deadline ── Tick ─────►┘         └───────────┘        └──► reporter ──► registry
//! ```
//! It decides nothing: [`Lifecycle`] does. It never waits for the registry either: reports go through a queue of the VM's
//! own, in order, and are repeated until they are answered.

use std::{collections::HashSet, path::PathBuf, sync::Arc, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    limits::{DEFAULT_STOP_GRACE, MAX_REASON_BYTES},
    pb::common::v1::JobSpec,
    time::Timestamp,
    vm::{VmConfig, VmKind, VmResize, VmShape, VmState},
};
use blixard_chassis::Tasks;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    attempt::{Assignment, AttemptHandle, Lifelines},
    breaker::{Breaker, Verdict},
    guest::AgentLink,
    health::{self, Health},
    host::Host,
    hypervisor::{Console, Launch, Machine, MachineExit, ResizeError},
    lifecycle::{Admission, Effect, Input, Lifecycle, Run, Stop},
    logs::{Fence, LogWriter, Outcome},
    net::Lease,
    records::{AttemptRecord, VmDir, VmRecord},
    registry::cut,
    reporter::{REPORTS_QUEUED, Report, Reporter},
    templates::{self, Started},
};

/// Commands that wait for a busy driver. The scheduler has at most a few under way for one VM.
const COMMANDS_QUEUED: usize = 16;
/// Events that wait for it: its own tasks send one at a time each, and there are eight.
const EVENTS_QUEUED: usize = 8;
/// How much of its console the reason of a failed VM quotes.
const QUOTED_CONSOLE_BYTES: usize = 600;

/// What a handle asks of its driver.
enum Command {
    Accepted {
        reply: Reply,
    },
    Run {
        run: Run,
        spec: Box<JobSpec>,
        /// The node's incarnation under which it was let in.
        incarnation: u64,
        reply: Reply,
    },
    Cancel {
        job: JobId,
        attempt: u32,
        reply: Reply,
    },
    Stop {
        stop: Stop,
        reply: Reply,
    },
    Resize {
        wanted: VmResize,
        /// Answered when the registry knows.
        reply: Reply,
    },
    /// It is to end once the registry gives it no attempts; nobody waits.
    Retire {
        reason: String,
    },
    /// Something happened; nobody waits.
    Tell(Input),
}

impl Command {
    fn into_reply(self) -> Option<Reply> {
        match self {
            Self::Accepted { reply }
            | Self::Run { reply, .. }
            | Self::Cancel { reply, .. }
            | Self::Stop { reply, .. }
            | Self::Resize { reply, .. } => Some(reply),
            Self::Retire { .. } | Self::Tell(_) => None,
        }
    }
}

pub(crate) type Reply = oneshot::Sender<Result<(), Error>>;

/// What a driver's own tasks tell it.
pub(crate) enum Event {
    Input(Input),
    Launched(Started),
    AgentUp {
        boot_id: String,
    },
    MachineExited(MachineExit),
    /// The agent was asked how it is: its answer, or what is wrong.
    Checked(Result<Health, String>),
    /// What became of giving its machine another shape.
    Resized(Result<VmShape, ResizeError>),
    /// The registry has the VM Draining, for this reason: it takes no more attempts.
    Retired(String),
    /// The registry knows everything.
    Reported,
}

/// A VM as its driver shows it.
#[derive(Clone)]
pub(crate) struct VmView {
    pub(crate) state: VmState,
    pub(crate) run: Option<(JobId, u32)>,
    pub(crate) machine: Option<Arc<dyn Machine>>,
    /// How large it is, or is about to be where that is more.
    pub(crate) room: VmShape,
}

/// A VM, to everybody else.
#[derive(Clone)]
pub(crate) struct VmHandle {
    pub(crate) id: VmId,
    /// What it was started with.
    pub(crate) config: VmConfig,
    pub(crate) accepted_at: Timestamp,
    pub(crate) lease: Option<Lease>,
    /// Where its processes are, once it has a machine.
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) view: watch::Receiver<VmView>,
    commands: mpsc::Sender<Command>,
}

impl VmHandle {
    /// Waits until the VM's intent is on disk.
    pub(crate) async fn accepted(&self) -> Result<(), Error> {
        self.ask(|reply| Command::Accepted { reply }).await
    }

    /// Gives it an attempt; returns when that is written down.
    pub(crate) async fn run(&self, run: Run, spec: JobSpec, incarnation: u64) -> Result<(), Error> {
        self.ask(|reply| Command::Run { run, spec: Box::new(spec), incarnation, reply }).await
    }

    /// Ends an attempt.
    pub(crate) async fn cancel(&self, job: JobId, attempt: u32) -> Result<(), Error> {
        self.ask(|reply| Command::Cancel { job, attempt, reply }).await
    }

    /// Ends the VM; returns when that is on disk, if the disk takes it.
    pub(crate) async fn stop(&self, grace: Duration, reason: String) -> Result<(), Error> {
        let stop = Stop { deadline: Timestamp::now().plus(grace), reason };
        self.ask(|reply| Command::Stop { stop, reply }).await
    }

    /// Gives it another shape; returns when it has it and the registry knows.
    pub(crate) async fn resize(&self, wanted: VmResize) -> Result<(), Error> {
        self.ask(|reply| Command::Resize { wanted, reply }).await
    }

    /// Has it end, if it runs nothing and is still there. Waits for nobody, as [`VmHandle::try_tell`].
    pub(crate) fn try_retire(&self, reason: String) {
        let _ = self.commands.try_send(Command::Retire { reason });
    }

    /// Tells it what happened, if it is still there.
    pub(crate) async fn tell(&self, input: Input) {
        let _ = self.commands.send(Command::Tell(input)).await;
    }

    /// The same by somebody who looks after the whole node and says it again: a driver that stands still, for its disk hangs, does not hear it.
    pub(crate) fn try_tell(&self, input: Input) {
        let _ = self.commands.try_send(Command::Tell(input));
    }

    async fn ask(&self, command: impl FnOnce(Reply) -> Command) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::new(Reason::VmNotFound, format!("VM {} is gone", self.id)).with("vm_id", self.id);
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// What a driver begins with.
pub(crate) struct Beginning {
    pub(crate) id: VmId,
    pub(crate) record: VmRecord,
    pub(crate) life: Lifecycle,
    /// The machine, when it runs already, and the way to its agent.
    pub(crate) machine: Option<(Arc<dyn Machine>, Arc<AgentLink>)>,
    /// The latest attempt, with its log while that is open.
    pub(crate) attempt: Option<(AttemptRecord, Option<LogWriter>)>,
    /// What the registry may not know yet.
    pub(crate) reports: Vec<Report>,
    /// What has happened.
    pub(crate) inputs: Vec<Input>,
}

impl Beginning {
    /// A VM that is to be started.
    pub(crate) fn fresh(id: VmId, record: VmRecord) -> Self {
        let life = Lifecycle::launching(record.config.kind);
        Self { id, record, life, machine: None, attempt: None, reports: vec![], inputs: vec![] }
    }
}

/// The attempt's log, or the task that writes it.
enum Attempt {
    Running(AttemptHandle),
    Open(LogWriter),
}

struct Driver {
    host: Arc<Host>,
    id: VmId,
    dir: VmDir,
    launch: Launch,
    record: VmRecord,
    life: Lifecycle,
    machine: Option<(Arc<dyn Machine>, Arc<AgentLink>)>,
    /// Whether the machine was booted, so that a template would have helped.
    booted: bool,
    /// Its machine is being given another shape, which somebody may wait for, and what that one named of it.
    resizing: Option<Option<(VmResize, Reply)>>,
    attempt_record: Option<AttemptRecord>,
    attempt: Option<Attempt>,
    reports: mpsc::Sender<Report>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Receiver<Event>,
    event_sender: mpsc::Sender<Event>,
    view: watch::Sender<VmView>,
    breaker: Breaker,
    tasks: Tasks,
}

/// Starts a VM's driver.
pub(crate) fn spawn(host: &Arc<Host>, beginning: Beginning) -> VmHandle {
    let (command_sender, commands) = mpsc::channel(COMMANDS_QUEUED);
    let (event_sender, events) = mpsc::channel(EVENTS_QUEUED);
    let Beginning { id, record, life, machine, attempt, reports: unreported, inputs } = beginning;
    let tasks = host.tasks.child();
    let reports = Reporter::spawn(host.registry.clone(), id, event_sender.clone(), &tasks);
    let (attempt_record, log) = attempt.map_or((None, None), |(record, log)| (Some(record), log));
    let view = watch::Sender::new(VmView { state: life.state(), run: None, machine: None, room: record.room() });
    let dir = host.state.vm(id);
    let launch = host.launch_of(id, &record);
    let handle = VmHandle {
        id,
        config: record.config.clone(),
        accepted_at: record.accepted_at,
        lease: record.lease.clone(),
        cgroup: record.place.cgroup.clone(),
        view: view.subscribe(),
        commands: command_sender,
    };
    let driver = Driver {
        host: Arc::clone(host),
        id,
        dir,
        launch,
        record,
        life,
        machine,
        booted: false,
        resizing: None,
        attempt_record,
        attempt: log.map(Attempt::Open),
        reports,
        commands,
        events,
        event_sender,
        view,
        breaker: Breaker::default(),
        tasks,
    };
    driver.publish();
    host.tasks.spawn("vm-driver", Box::pin(driver.run(unreported, inputs)));
    handle
}

impl Driver {
    async fn run(mut self, unreported: Vec<Report>, inputs: Vec<Input>) {
        if self.life.state() == VmState::Starting {
            if let Err(error) = self.begin().await {
                return self.refuse(&error).await;
            }
        } else {
            self.resume(unreported).await;
        }
        for input in inputs {
            self.step(input).await;
        }
        let token = self.host.tasks.token().clone();
        loop {
            let deadline = self.life.deadline();
            tokio::select! {
                () = token.cancelled() => break,
                Some(event) = self.events.recv() => if self.handle(event).await { break },
                Some(command) = self.commands.recv() => self.obey(command).await,
                () = sleep_until(deadline) => self.step(Input::Tick).await,
            }
        }
        self.tasks.token().cancel();
    }

    /// Leaves nothing of a VM that could not begin, and tells those who asked for it.
    async fn refuse(mut self, error: &std::io::Error) {
        noted(self.id, self.dir.remove().await);
        self.host.forget(self.id);
        let error = internal(self.id, "a VM could not be written down", error);
        while let Some(command) = self.commands.recv().await {
            if let Some(reply) = command.into_reply() {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }

    /// Writes the intent down and starts the machine.
    async fn begin(&mut self) -> std::io::Result<()> {
        self.dir.create().await?;
        self.dir.intend_vm(&self.record).await?;
        let (host, launch, volumes) = (Arc::clone(&self.host), self.launch.clone(), self.record.config.volumes.clone());
        let network = host.guest_network(&self.record);
        let events = self.event_sender.clone();
        // Not among the VM's own tasks: a launch that vmhost's end cuts in half leaves what recovery has to sweep.
        self.host.tasks.spawn("vm-launch", async move {
            let event = match templates::start(&host, &launch, &volumes, network).await {
                Ok(started) => Event::Launched(started),
                // Nothing of it runs, and it is no fault of the VM: the next vmhost is asked to start it again.
                Err(_) if host.tasks.token().is_cancelled() => return,
                Err(reason) => Event::Input(Input::LaunchFailed { reason }),
            };
            let _ = events.send(event).await;
        });
        Ok(())
    }

    /// Goes on where an earlier vmhost was.
    async fn resume(&mut self, unreported: Vec<Report>) {
        for report in unreported {
            self.report(report).await;
        }
        if let Some((machine, _)) = self.machine.clone() {
            self.watch_machine(machine);
            self.watch_health();
        }
        if let (Some(_), Some(to)) = (&self.machine, self.record.shapes.next) {
            self.resize_machine(to, None);
        }
        if self.machine.is_some()
            && let Some(Attempt::Open(log)) = self.attempt.take()
        {
            self.start_attempt(log, None, 0);
        }
    }

    /// True when there is nothing left to do.
    async fn handle(&mut self, event: Event) -> bool {
        match event {
            Event::Input(input) => self.step(input).await,
            Event::Launched(Started { machine, link, restored }) => {
                // One with volumes boots, template or not.
                self.booted = !restored && self.record.config.volumes.is_empty();
                self.machine = Some((Arc::clone(&machine), link));
                self.watch_machine(machine);
                let boot_deadline = Timestamp::now().plus(self.host.boot_patience());
                self.step(Input::Launched { boot_deadline }).await;
            }
            Event::AgentUp { boot_id } => {
                // Before the registry is told: a VM whose record has no guest boot is one that was never Ready.
                self.record.guest_boot = Some(boot_id);
                self.note_vm();
                self.watch_health();
                self.step(Input::AgentUp).await;
                if self.booted {
                    self.host.templates.want(&self.launch);
                }
            }
            Event::MachineExited(exit) => {
                tracing::info!(vm_id = %self.id, %exit, "machine ended");
                self.step(Input::MachineExited { how: exit.to_string() }).await;
            }
            Event::Checked(result) => self.checked(result).await,
            Event::Resized(result) => self.resized(result).await,
            Event::Retired(reason) => {
                let stop = Stop { deadline: Timestamp::now().plus(DEFAULT_STOP_GRACE), reason };
                self.intend_stop(&stop).await;
                self.step(Input::Stop(stop)).await;
            }
            Event::Reported => {
                if let Err(error) = self.dir.remove().await {
                    tracing::error!(vm_id = %self.id, %error, "the directory of a VM that has ended can't be removed");
                }
                self.host.forget(self.id);
                return true;
            }
        }
        false
    }

    async fn obey(&mut self, command: Command) {
        // Whoever asked may have gone: then nobody wants the answer.
        match command {
            Command::Accepted { reply } => drop(reply.send(Ok(()))),
            Command::Run { run, spec, incarnation, reply } => {
                let answer = self.admit(&run, &spec).await;
                match answer {
                    Ok(Some(log)) => {
                        let _ = reply.send(Ok(()));
                        self.step(Input::Run(run)).await;
                        self.start_attempt(log, Some(*spec), incarnation);
                    }
                    Ok(None) => drop(reply.send(Ok(()))),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Resize { wanted, reply } => self.resize(wanted, reply).await,
            Command::Retire { reason } => self.retire(reason),
            Command::Tell(input) => self.step(input).await,
            Command::Cancel { job, attempt, reply } => {
                self.step(Input::Cancel { job, attempt }).await;
                let _ = reply.send(Ok(()));
            }
            Command::Stop { stop, reply } => {
                self.intend_stop(&stop).await;
                let _ = reply.send(Ok(()));
                self.step(Input::Stop(stop)).await;
            }
        }
    }

    /// Lets an attempt begin: its log is open and it is written down. `None`: it runs, or has ended, already.
    async fn admit(&mut self, run: &Run, spec: &JobSpec) -> Result<Option<LogWriter>, Error> {
        match self.life.admit(run.job, run.attempt) {
            Admission::Accepted if !self.breaker.admits() => return Err(unhealthy(self.id, self.life.state())),
            Admission::Accepted => {}
            Admission::Ignored => return Ok(None),
            Admission::Denied(state) => return Err(not_accepting(self.id, state)),
        }
        let failed = |error: std::io::Error| internal(self.id, "an attempt could not be written down", &error);
        let log = match self.host.logs.begin(run.job, run.attempt).map_err(failed)? {
            Ok(log) => log,
            Err(Fence::Stale { current }) => return Err(stale(run.job, run.attempt, current)),
            Err(Fence::Open | Fence::Running | Fence::Ended) => return Ok(None),
        };
        let record = AttemptRecord {
            job: run.job,
            attempt: run.attempt,
            timeout_ms: spec.timeout_ms,
            cause: None,
            arrived_at: run.arrived,
            start_timeout_ms: spec.start_timeout_ms,
            artifacts: spec.artifacts.clone(),
        };
        if let Err(error) = self.dir.note_attempt(&record) {
            self.host.logs.close(run.job, run.attempt);
            return Err(failed(error));
        }
        self.attempt_record = Some(record);
        Ok(Some(log))
    }

    /// Begins to give the VM another shape.
    async fn resize(&mut self, wanted: VmResize, reply: Reply) {
        let to = wanted.of(self.record.shape());
        match self.admit_resize(to).await {
            Ok(true) => self.resize_machine(to, Some((wanted, reply))),
            Ok(false) => self.report(Report::Resized { shape: to, reply: Some(reply) }).await,
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Lets another shape be given: its room is taken and it is written down. False: the VM has it.
    async fn admit_resize(&mut self, to: VmShape) -> Result<bool, Error> {
        let state = self.life.state();
        if !state.is_running() || self.machine.is_none() {
            let message = format!("VM {} is {state} and takes no other shape", self.id);
            return Err(Error::new(Reason::VmNotAccepting, message).with("vm_id", self.id).with("state", state));
        }
        // The registry is told in order, and may be away.
        if self.resizing.is_some() || self.reports.capacity() <= REPORTS_QUEUED / 2 {
            let message = format!("VM {} is being given another shape already", self.id);
            return Err(Error::new(Reason::Overloaded, message).with("limit", 1));
        }
        let (before, view) = (self.record.shapes, &self.view);
        self.host.admit_resize(self.id, &self.record, to, || view.send_modify(|view| view.room = view.room.max(to)))?;
        if to == self.record.shape() && before.next.is_none() {
            return Ok(false);
        }
        self.record.shapes.ask(to);
        let written = self.dir.intend_vm(&self.record).await;
        if written.is_err() {
            self.record.shapes = before;
        }
        self.publish();
        written.map_err(|error| internal(self.id, "another shape of a VM could not be written down", &error))?;
        Ok(true)
    }

    fn resize_machine(&mut self, to: VmShape, who: Option<(VmResize, Reply)>) {
        self.resizing = Some(who);
        let (host, launch, events) = (Arc::clone(&self.host), self.launch.clone(), self.event_sender.clone());
        let room = self.record.room();
        self.tasks.spawn_until_end("vm-resize", async move {
            let result = host.hypervisor.resize(&launch, to, room).await;
            let _ = events.send(Event::Resized(result)).await;
        });
    }

    /// The machine has another shape, or has it not, or not all of it.
    async fn resized(&mut self, result: Result<VmShape, ResizeError>) {
        let (wanted, reply) = self.resizing.take().flatten().unzip();
        let before = self.record.shape();
        let (has, told) = match &result {
            Ok(has) => (Some(*has), None),
            Err(error) => (error.has, error.told),
        };
        // What nobody can tell stays wanted: its room stays taken, and the next vmhost, or whoever asks again, finds out.
        if let Some(has) = has {
            match told {
                Some(told) => self.record.shapes.know_but_vcpus(has, told, before),
                None => self.record.shapes.know(has),
            }
            self.note_vm();
            self.publish();
        }
        let (vm_id, now) = (self.id, self.record.shape());
        let Err(error) = result else {
            tracing::info!(%vm_id, from = %before, to = %now, "VM resized");
            return self.report(Report::Resized { shape: now, reply }).await;
        };
        tracing::warn!(%vm_id, from = %before, now = %now, error = with_sources(&error), "a VM could not be resized");
        // Whoever wants memory alone does not care for vCPUs that its guest has still to let go.
        let memory = wanted.filter(|wanted| wanted.vcpus.is_none()).and_then(|wanted| wanted.memory_mib);
        if told.is_some() && memory.is_some_and(|memory_mib| now.memory_mib >= memory_mib) {
            return self.report(Report::Resized { shape: now, reply }).await;
        }
        if now != before {
            self.report(Report::Resized { shape: now, reply: None }).await;
        }
        let has = match (has, told) {
            (Some(_), Some(told)) => format!("has {now}, {told} vCPUs as soon as its guest lets the others go"),
            (Some(_), None) => format!("has {now}"),
            (None, _) => "nobody can tell what it has".to_owned(),
        };
        let message = format!("VM {vm_id} could not be resized, and {has}: {error}");
        let _ = reply.map(|reply| reply.send(Err(Error::new(Reason::GuestRefused, message).with("vm_id", vm_id))));
    }

    /// A full disk does not keep a VM alive: ending it makes room, and whoever wants its end asks again after a crash.
    async fn intend_stop(&mut self, stop: &Stop) {
        // One that is on disk stays as it is: only its deadline may shrink, and that is not worth another write.
        if self.record.stop.is_none() && !self.life.state().is_terminal() {
            self.record.stop = Some(stop.clone());
            noted(self.id, self.dir.intend_vm(&self.record).await);
        }
    }

    async fn step(&mut self, input: Input) {
        let before = self.life.state();
        let effects = self.life.step(Timestamp::now(), input);
        self.publish();
        let now = self.life.state();
        if before != now {
            tracing::debug!(vm_id = %self.id, from = %before, to = %now, "VM state as its driver sees it");
        }
        for effect in effects {
            self.carry_out(effect).await;
        }
        self.publish();
    }

    async fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::AwaitAgent => self.await_agent(),
            Effect::ReportReady => self.report(Report::Ready).await,
            Effect::SaveCause(cause) => {
                if let Some(record) = &mut self.attempt_record {
                    record.cause = Some(cause);
                    noted(self.id, self.dir.note_attempt(record));
                }
            }
            Effect::Signal(signal) => self.signal(signal),
            Effect::ReportStarted { at } => {
                if let Some(AttemptRecord { job, attempt, .. }) = self.attempt_record {
                    self.report(Report::Started { job, attempt, at }).await;
                }
            }
            Effect::Finish(outcome) => self.finish(outcome).await,
            Effect::ShutDownGuest { grace } => self.shut_down_guest(grace),
            Effect::Kill => {
                if let Some((machine, _)) = self.machine.clone() {
                    self.tasks.spawn("vm-kill", async move { machine.kill().await });
                }
            }
            Effect::End { state, reason } => self.end(state, reason).await,
        }
    }

    fn await_agent(&self) {
        let Some((_, link)) = self.machine.clone() else { return };
        let events = self.event_sender.clone();
        self.tasks.spawn_until_end("vm-boot", async move {
            let event = match link.introduce().await {
                Ok(agent) => Event::AgentUp { boot_id: agent.hello.boot_id.clone() },
                Err(error) => Event::Input(Input::BootFailed { reason: error.to_string() }),
            };
            let _ = events.send(event).await;
        });
    }

    fn watch_machine(&self, machine: Arc<dyn Machine>) {
        let events = self.event_sender.clone();
        self.tasks.spawn_until_end("vm-wait", async move {
            let _ = events.send(Event::MachineExited(machine.wait().await)).await;
        });
    }

    /// Has the agent asked how it is, now and then.
    fn watch_health(&self) {
        let (Some((_, link)), Some(every)) = (self.machine.clone(), self.host.health.check_every) else { return };
        let guest_boot = self.record.guest_boot.clone().unwrap_or_default();
        let watching =
            health::watch(self.id, guest_boot, link, self.view.subscribe(), every, self.event_sender.clone());
        self.tasks.spawn_until_end("vm-health", watching);
    }

    async fn checked(&mut self, result: Result<Health, String>) {
        let verdict = self.breaker.checked(result.is_ok());
        let vm_id = self.id;
        match (verdict, result) {
            (Verdict::GivenUp, Err(reason)) => self.step(Input::Unhealthy { reason }).await,
            (Verdict::Opened, Err(reason)) => {
                tracing::warn!(%vm_id, reason, "a VM fails its health checks and takes no jobs");
            }
            (Verdict::Closed, Ok(_)) => tracing::info!(%vm_id, "a VM is healthy again"),
            (_, Ok(health)) => self.consider_recycling(health),
            (_, Err(reason)) => tracing::debug!(%vm_id, reason, "a health check failed"),
        }
    }

    /// Ends a service VM that is short of memory, once the registry gives it no more attempts.
    fn consider_recycling(&self, health: Health) {
        let Some(reason) = health.shortage(self.host.health.recycle_below_memory_percent) else { return };
        if self.record.config.kind == VmKind::Service {
            self.retire(reason);
        }
    }

    /// Ends a VM that runs nothing, once the registry gives it no more attempts.
    fn retire(&self, reason: String) {
        let (vm_id, registry, events) = (self.id, self.host.registry.clone(), self.event_sender.clone());
        self.tasks.spawn("vm-recycle", async move {
            match registry.retire(vm_id, &reason).await {
                Ok(true) => drop(events.send(Event::Retired(reason)).await),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%vm_id, reason, %error, "a VM is to be retired and the registry can't be told")
                }
            }
        });
    }

    fn start_attempt(&mut self, log: LogWriter, spec: Option<JobSpec>, incarnation: u64) {
        let (Some((_, link)), Some(record)) = (&self.machine, &self.attempt_record) else { return };
        let assignment = Assignment {
            job: record.job,
            attempt: record.attempt,
            spec,
            incarnation,
            guest_boot: self.record.guest_boot.clone().unwrap_or_default(),
            artifacts: record.artifacts.clone(),
            artifact_dir: self.host.logs.artifacts(record.job, record.attempt),
        };
        let lifelines = Lifelines {
            link: Arc::clone(link),
            inputs: self.host.inputs(),
            lease: Arc::clone(&self.host.lease),
            events: self.event_sender.clone(),
        };
        let (handle, pump) = AttemptHandle::new(assignment, log, lifelines);
        self.attempt = Some(Attempt::Running(handle));
        self.tasks.spawn_until_end("vm-attempt", pump);
    }

    fn signal(&self, signal: i32) {
        let (Some((_, link)), Some(AttemptRecord { job, attempt, .. })) =
            (self.machine.clone(), self.attempt_record.clone())
        else {
            return;
        };
        if let Some(Attempt::Running(handle)) = &self.attempt {
            handle.is_ending();
        }
        self.tasks.spawn("vm-signal", async move {
            if let Err(error) = link.signal(job, attempt, signal).await {
                tracing::warn!(job_id = %job, attempt, signal, %error, "a job could not be sent a signal");
            }
        });
    }

    fn shut_down_guest(&self, grace: Duration) {
        let Some((_, link)) = self.machine.clone() else { return };
        let vm_id = self.id;
        self.tasks.spawn("vm-shut-down", async move {
            // A guest that ends may well take its answer with it; one that does not end meets its deadline.
            if let Err(error) = link.shut_down(grace).await {
                tracing::debug!(%vm_id, %error, "no answer to a guest's shutdown");
            }
        });
    }

    async fn finish(&mut self, outcome: Outcome) {
        let Some(AttemptRecord { job, attempt, .. }) = self.attempt_record else { return };
        let end = match self.attempt.take() {
            Some(Attempt::Running(handle)) => handle.close(outcome).await,
            Some(Attempt::Open(log)) => {
                let end_offset = log.next_offset();
                let end =
                    crate::logs::EndRecord { outcome, end_offset, finished_at: Timestamp::now(), started_at: None };
                Some(log.finish(end).await)
            }
            None => None,
        };
        self.host.logs.close(job, attempt);
        match end {
            Some(end) => self.report(Report::Finished { job, attempt, end }).await,
            None => tracing::error!(job_id = %job, attempt, "an attempt ended without its task"),
        }
    }

    /// Gives back what the machine held and lets the registry know.
    async fn end(&mut self, state: VmState, mut reason: String) {
        let console = self.console();
        if state == VmState::Failed {
            if let Some(last) = console.as_ref().and_then(last_lines) {
                reason = format!("{reason}; its console ends: {last}");
            }
            reason.truncate(cut(&reason, MAX_REASON_BYTES).len());
            tracing::warn!(vm_id = %self.id, reason, "VM failed");
        }
        if let Err(error) = self.host.hypervisor.sweep(&self.launch).await {
            tracing::error!(vm_id = %self.id, error = with_sources(&error), "processes of an ended VM are left");
        }
        // After its processes, before its record.
        if let Ok(network) = &self.host.network {
            network.detach(self.id).await;
        }
        if let (VmState::Failed, Some(console)) = (state, console) {
            self.host.consoles.keep(self.id, &console);
        }
        noted(self.id, self.dir.remove_machine().await);
        self.machine = None;
        self.record.end = Some((state, reason.clone()));
        self.note_vm();
        let started = self.record.host_boot != self.host.boot;
        self.report(Report::End { state, started, reason }).await;
    }

    fn console(&self) -> Option<Console> {
        match &self.machine {
            Some((machine, _)) => Some(machine.console()),
            None => Some(Console::of_dir(&self.launch.dir)).filter(|console| !console.tail.is_empty()),
        }
    }

    async fn report(&self, report: Report) {
        // The reporter lives as long as the driver.
        let _ = self.reports.send(report).await;
    }

    fn note_vm(&self) {
        noted(self.id, self.dir.note_vm(&self.record));
    }

    fn publish(&self) {
        let run = self.life.run().map(|run| (run.job, run.attempt));
        let machine = self.machine.as_ref().map(|(machine, _)| Arc::clone(machine));
        self.view.send_replace(VmView { state: self.life.state(), run, machine, room: self.record.room() });
    }
}

fn noted(vm_id: VmId, result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::error!(%vm_id, %error, "a VM's directory can't be written");
    }
}

async fn sleep_until(deadline: Option<Timestamp>) {
    match deadline {
        // Rounded up: a tick before its time would come again at once.
        Some(deadline) => tokio::time::sleep(deadline.since(Timestamp::now()) + Duration::from_millis(1)).await,
        None => std::future::pending().await,
    }
}

/// The last lines of a console, for people.
fn last_lines(console: &Console) -> Option<String> {
    let tail = &console.tail[console.tail.len().saturating_sub(QUOTED_CONSOLE_BYTES)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut seen = HashSet::new();
    let kept: Vec<&str> = lines.into_iter().rev().filter(|line| seen.insert(*line)).take(4).collect();
    (!kept.is_empty()).then(|| kept.into_iter().rev().collect::<Vec<_>>().join(" | "))
}

/// An error and what caused it, in one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// A lower attempt than one seen before.
pub(crate) fn stale(job: JobId, attempt: u32, current: u32) -> Error {
    let message = format!("attempt {attempt} of job {job} is over: this node has seen attempt {current}");
    Error::new(Reason::StaleAttempt, message).with("job_id", job).with("attempt", attempt).with("current", current)
}

fn unhealthy(vm_id: VmId, state: VmState) -> Error {
    Error::new(Reason::VmNotAccepting, format!("VM {vm_id} fails its health checks and takes no job"))
        .with("vm_id", vm_id)
        .with("state", state)
}

fn not_accepting(vm_id: VmId, state: VmState) -> Error {
    Error::new(Reason::VmNotAccepting, format!("VM {vm_id} is {state} and takes no job"))
        .with("vm_id", vm_id)
        .with("state", state)
}

fn internal(vm_id: VmId, what: &'static str, error: &std::io::Error) -> Error {
    let fault = Error::internal(|error_id| tracing::error!(error_id, %vm_id, %error, what, "a node's disk failed"));
    // Whose disk is full wants to read it where the job or VM is.
    Error { message: format!("{what} on its node: {error} ({})", fault.message), ..fault }
}
