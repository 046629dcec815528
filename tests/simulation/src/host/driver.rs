//! One VM's driver, as `driver.rs` and `attempt.rs` of the vmhost: it decides nothing, the real [`Lifecycle`] does; here its
//! effects are carried out in the same order, on the world's disk, machine and registry.

use std::{cell::Cell, cell::RefCell, rc::Rc, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    time::Timestamp,
    vm::{VmConfig, VmState},
};
use blixard_vmhost::lifecycle::{Admission, Effect, Input, LEASE_OVER, Lifecycle, Outcome, Run, Stop};
use futures::{
    StreamExt,
    channel::{mpsc, oneshot},
    future::Either,
};

use super::{
    Host,
    disk::{AttemptRecord, EndRecord, Fence, VmRecord},
    registry::Registry,
};
use crate::{
    guest::{Ended, Machine, Refusal},
    wire::short,
};

/// How long a guest may take to boot.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// A guest whose agent can't be reached for so long is given up.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

pub type Reply = oneshot::Sender<Result<(), Error>>;

/// What a driver is told.
pub enum Mail {
    Accepted(Reply),
    Run {
        run: Run,
        order: Order,
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
    Input(Input),
    Launched(Rc<Machine>),
    AgentUp(u64),
    /// The registry knows everything.
    Reported,
}

/// What an attempt is to do, and how long it may take.
pub struct Order {
    pub command: Vec<String>,
    pub timeout_ms: u64,
    pub start_timeout_ms: u64,
}

/// Something the registry is to know.
pub enum Report {
    Ready,
    Started { job: JobId, attempt: u32, at: Timestamp },
    Finished { job: JobId, attempt: u32, end: EndRecord },
    End { state: VmState, started: bool, reason: String },
}

/// A VM, to everybody else.
#[derive(Clone)]
pub struct VmHandle {
    pub config: VmConfig,
    pub state: Rc<Cell<VmState>>,
    pub run: Rc<Cell<Option<(JobId, u32)>>>,
    pub mail: mpsc::UnboundedSender<Mail>,
}

impl VmHandle {
    pub async fn ask(&self, mail: impl FnOnce(Reply) -> Mail) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::new(Reason::VmNotFound, "the VM is gone");
        self.mail.unbounded_send(mail(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// What a driver begins with.
pub struct Beginning {
    pub id: VmId,
    pub record: VmRecord,
    pub life: Lifecycle,
    pub machine: Option<Rc<Machine>>,
    /// The latest attempt, and whether its log is still open.
    pub attempt: Option<(AttemptRecord, bool)>,
    pub reports: Vec<Report>,
    pub inputs: Vec<Input>,
}

/// An attempt whose log is open.
#[derive(Default)]
struct Open {
    /// Whether its guest may have been asked to run it.
    asked: Cell<bool>,
    /// It is being ended: what was not begun is not begun any more.
    ending: Cell<bool>,
}

struct Driver {
    host: Rc<Host>,
    id: VmId,
    record: VmRecord,
    life: Lifecycle,
    machine: Option<Rc<Machine>>,
    attempt: Option<AttemptRecord>,
    /// The attempt, while its log is open.
    open: Option<Rc<Open>>,
    /// When its command started, if that is known.
    started_at: Option<Timestamp>,
    reports: mpsc::UnboundedSender<Report>,
    inbox: mpsc::UnboundedReceiver<Mail>,
    mail: mpsc::UnboundedSender<Mail>,
    state: Rc<Cell<VmState>>,
    run: Rc<Cell<Option<(JobId, u32)>>>,
}

/// Starts a VM's driver.
pub fn spawn(host: &Rc<Host>, beginning: Beginning) -> VmHandle {
    let (mail, inbox) = mpsc::unbounded();
    let Beginning { id, record, life, machine, attempt, reports: unreported, inputs } = beginning;
    let reports = start_reporter(host, id, mail.clone());
    // An earlier vmhost has asked for what is only attached to.
    let asked = || Open { asked: Cell::new(true), ..Open::default() };
    let open = attempt.as_ref().filter(|(_, open)| *open).map(|_| Rc::new(asked()));
    let handle = VmHandle {
        config: record.config.clone(),
        state: Rc::new(Cell::new(life.state())),
        run: Rc::default(),
        mail: mail.clone(),
    };
    let driver = Driver {
        host: Rc::clone(host),
        id,
        record,
        life,
        machine,
        attempt: attempt.map(|(record, _)| record),
        open,
        started_at: None,
        reports,
        inbox,
        mail,
        state: Rc::clone(&handle.state),
        run: Rc::clone(&handle.run),
    };
    driver.publish();
    host.spawn(driver.drive(unreported, inputs));
    handle
}

impl Driver {
    async fn drive(mut self, unreported: Vec<Report>, inputs: Vec<Input>) {
        if self.life.state() == VmState::Starting {
            self.begin().await;
        } else {
            self.resume(unreported);
        }
        for input in inputs {
            self.step(input).await;
        }
        loop {
            let kernel = self.host.kernel().clone();
            let deadline =
                self.life.deadline().map(|deadline| deadline.since(self.host.wall()) + Duration::from_millis(1));
            let tick = async {
                match deadline {
                    Some(wait) => kernel.sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            let mail = match futures::future::select(self.inbox.next(), std::pin::pin!(tick)).await {
                Either::Left((mail, _)) => mail,
                Either::Right(_) => Some(Mail::Input(Input::Tick)),
            };
            let Some(mail) = mail else { return };
            if self.handle(mail).await {
                return;
            }
        }
    }

    /// Writes the intent down and starts the machine.
    async fn begin(&mut self) {
        self.host.disk().intend_vm(self.id, &self.record).await;
        let (host, id, mail, config) = (Rc::clone(&self.host), self.id, self.mail.clone(), self.record.config.clone());
        self.host.spawn(async move {
            host.kernel().sleep(host.kernel().between(Duration::from_millis(1), Duration::from_millis(50))).await;
            let fails = host.world.faulty() && host.kernel().random(|random| random.per_mille(15));
            let event = if fails {
                Mail::Input(Input::LaunchFailed { reason: "the hypervisor did not start".to_owned() })
            } else {
                Mail::Launched(host.site.launch(&host.world, id, config.memory_mib))
            };
            let _ = mail.unbounded_send(event);
        });
    }

    /// Goes on where an earlier vmhost was.
    fn resume(&mut self, unreported: Vec<Report>) {
        for report in unreported {
            self.report(report);
        }
        if let Some(machine) = self.machine.clone() {
            self.watch_machine(machine);
            if self.open.is_some() {
                self.start_attempt(None);
            }
        }
    }

    /// True when there is nothing left to do.
    async fn handle(&mut self, mail: Mail) -> bool {
        match mail {
            Mail::Input(input) => self.step(input).await,
            Mail::Launched(machine) => {
                self.machine = Some(Rc::clone(&machine));
                self.watch_machine(machine);
                let boot_deadline = self.host.wall().plus(BOOT_PATIENCE);
                self.step(Input::Launched { boot_deadline }).await;
            }
            Mail::AgentUp(boot_id) => {
                self.record.guest_boot = Some(boot_id);
                self.host.disk().note_vm(self.id, &self.record);
                self.step(Input::AgentUp).await;
            }
            Mail::Reported => {
                self.host.disk().remove(self.id);
                self.host.disk().forget(self.id);
                self.host.forget(self.id);
                return true;
            }
            Mail::Accepted(reply) => drop(reply.send(Ok(()))),
            Mail::Run { run, order, reply } => match self.admit(&run, &order).await {
                Ok(true) => {
                    let _ = reply.send(Ok(()));
                    self.step(Input::Run(run)).await;
                    self.start_attempt(Some(order.command));
                }
                Ok(false) => drop(reply.send(Ok(()))),
                Err(error) => drop(reply.send(Err(error))),
            },
            Mail::Cancel { job, attempt, reply } => {
                self.step(Input::Cancel { job, attempt }).await;
                let _ = reply.send(Ok(()));
            }
            Mail::Stop { stop, reply } => {
                self.intend_stop(&stop).await;
                let _ = reply.send(Ok(()));
                self.step(Input::Stop(stop)).await;
            }
        }
        false
    }

    /// Whether an attempt begins: then its log is open and it is on disk.
    async fn admit(&mut self, run: &Run, order: &Order) -> Result<bool, Error> {
        match self.life.admit(run.job, run.attempt) {
            Admission::Accepted => {}
            Admission::Ignored => return Ok(false),
            Admission::Denied(state) => {
                return Err(Error::new(Reason::VmNotAccepting, format!("the VM is {state} and takes no job")));
            }
        }
        match self.host.fence(run.job, run.attempt) {
            Fence::Open => {}
            Fence::Stale { current } => return Err(super::stale(run.job, run.attempt, current)),
            Fence::Running | Fence::Ended => return Ok(false),
        }
        self.host.disk().begin_log(run.job, run.attempt);
        self.host.live_logs.borrow_mut().insert((run.job, run.attempt));
        let record = AttemptRecord {
            job: run.job,
            attempt: run.attempt,
            timeout_ms: order.timeout_ms,
            cause: None,
            arrived_at: run.arrived,
            start_timeout_ms: order.start_timeout_ms,
        };
        self.host.disk().intend_attempt(self.id, &record).await;
        self.attempt = Some(record);
        self.open = Some(Rc::default());
        Ok(true)
    }

    async fn intend_stop(&mut self, stop: &Stop) {
        if self.record.stop.is_none() && !self.life.state().is_terminal() {
            self.record.stop = Some(stop.clone());
            self.host.disk().intend_vm(self.id, &self.record).await;
        }
    }

    async fn step(&mut self, input: Input) {
        let effects = self.life.step(self.host.wall(), input);
        self.publish();
        for effect in effects {
            self.carry_out(effect).await;
        }
        self.publish();
    }

    async fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::AwaitAgent => {
                let (Some(machine), mail) = (self.machine.clone(), self.mail.clone()) else { return };
                self.host.spawn(async move {
                    machine.agent().await;
                    let _ = mail.unbounded_send(Mail::AgentUp(machine.boot_id));
                });
            }
            Effect::ReportReady => self.report(Report::Ready),
            Effect::SaveCause(cause) => {
                if let Some(record) = &mut self.attempt {
                    record.cause = Some(cause);
                    self.host.disk().note_attempt(self.id, record);
                }
            }
            Effect::Signal(signal) => {
                let (Some(machine), Some(record)) = (self.machine.clone(), &self.attempt) else { return };
                let (host, job, attempt) = (Rc::clone(&self.host), record.job, record.attempt);
                if let Some(open) = &self.open {
                    open.ending.set(true);
                }
                self.host.spawn(async move {
                    host.pause().await;
                    machine.signal(job, attempt, signal);
                });
            }
            Effect::ReportStarted { at } => {
                if let Some(AttemptRecord { job, attempt, .. }) = self.attempt {
                    self.started_at = Some(at);
                    self.report(Report::Started { job, attempt, at });
                }
            }
            Effect::Finish(outcome) => self.finish(outcome).await,
            Effect::ShutDownGuest { grace } => {
                if let Some(machine) = &self.machine {
                    machine.shut_down(grace);
                }
            }
            Effect::Kill => {
                let Some(machine) = self.machine.clone() else { return };
                let host = Rc::clone(&self.host);
                self.host.spawn(async move {
                    host.pause().await;
                    machine.die("it was killed");
                });
            }
            Effect::End { state, reason } => self.end(state, reason),
        }
    }

    fn watch_machine(&self, machine: Rc<Machine>) {
        let mail = self.mail.clone();
        self.host.spawn(async move {
            machine.wait().await;
            let _ = mail.unbounded_send(Mail::Input(Input::MachineExited { how: "the machine exited".to_owned() }));
        });
    }

    fn start_attempt(&mut self, command: Option<Vec<String>>) {
        let (Some(machine), Some(record), Some(open)) = (self.machine.clone(), &self.attempt, &self.open) else {
            return;
        };
        let pump = Pump {
            host: Rc::clone(&self.host),
            machine,
            job: record.job,
            attempt: record.attempt,
            guest_boot: self.record.guest_boot,
            command,
            open: Rc::clone(open),
            mail: self.mail.clone(),
        };
        self.host.spawn(pump.run());
    }

    async fn finish(&mut self, outcome: Outcome) {
        let (Some(AttemptRecord { job, attempt, .. }), Some(open)) = (self.attempt.clone(), self.open.take()) else {
            return;
        };
        let outcome = match outcome {
            Outcome::Lost { started, reason } => Outcome::Lost { started: started && open.asked.get(), reason },
            result @ Outcome::Result { .. } => result,
        };
        let started_at = self.started_at.take();
        let end = EndRecord { outcome, started_at, finished_at: self.host.wall() };
        let end = self.host.disk().finish_log(job, attempt, end).await;
        self.host.live_logs.borrow_mut().remove(&(job, attempt));
        self.report(Report::Finished { job, attempt, end });
    }

    /// Gives back what the machine held and lets the registry know.
    fn end(&mut self, state: VmState, reason: String) {
        self.host.site.sweep(self.id);
        self.machine = None;
        self.record.end = Some((state, reason.clone()));
        self.host.disk().note_vm(self.id, &self.record);
        let started = self.record.host_boot != self.host.site.boot();
        self.report(Report::End { state, started, reason });
    }

    fn report(&self, report: Report) {
        let _ = self.reports.unbounded_send(report);
    }

    fn publish(&self) {
        self.state.set(self.life.state());
        self.run.set(self.life.run().map(|run| (run.job, run.attempt)));
    }
}

/// Runs one attempt: asks the guest to, until it is over.
struct Pump {
    host: Rc<Host>,
    machine: Rc<Machine>,
    job: JobId,
    attempt: u32,
    guest_boot: Option<u64>,
    command: Option<Vec<String>>,
    open: Rc<Open>,
    mail: mpsc::UnboundedSender<Mail>,
}

impl Pump {
    async fn run(mut self) {
        let kernel = self.host.kernel().clone();
        let patience = kernel.now().after(AGENT_PATIENCE);
        loop {
            self.host.pause().await;
            if self.open.ending.get() && !self.open.asked.get() {
                return self.lost(false, true, "it was ended before it began");
            }
            if self.host.lease_for_guest().is_none() && !self.open.asked.get() {
                return self.lost(false, true, LEASE_OVER);
            }
            if Some(self.machine.boot_id) != self.guest_boot {
                return self.lost(true, false, "the guest restarted under it");
            }
            self.open.asked.set(true);
            // Without a lease nothing new lives for longer than a moment, and what runs keeps what it has.
            let lease = self.host.lease_for_guest();
            let lease = lease.or(self.command.as_ref().map(|_| Duration::from_millis(1)));
            match self.machine.run(self.job, self.attempt, self.command.as_deref(), lease) {
                Ok(()) => break,
                Err(Refusal::Unreachable) if kernel.now() < patience => kernel.sleep(Duration::from_secs(1)).await,
                Err(Refusal::Unreachable) => return self.lost(true, false, "its agent could not be reached"),
                Err(Refusal::Unknown) => return self.lost(false, true, "the guest does not know it"),
                Err(Refusal::Stale) => return self.lost(true, true, "what was left of it is gone"),
                Err(Refusal::Occupied) => return self.lost(true, false, "the guest runs another one"),
            }
        }
        self.host.pause().await;
        let Some(progress) = self.machine.progress(self.job, self.attempt) else { return };
        self.command = None;
        self.tell(Input::Started { at: progress.started_at });
        loop {
            let over = self.machine.ended(self.job, self.attempt);
            if kernel.timeout(self.host.renew_every(), over).await.is_some() {
                break;
            }
            if let Some(left) = self.host.lease_for_guest() {
                self.machine.renew(self.job, self.attempt, left);
            }
        }
        self.host.pause().await;
        let Some(ended) = self.machine.progress(self.job, self.attempt).and_then(|progress| progress.ended) else {
            return;
        };
        match ended {
            Ended::LeaseOver => self.lost(true, true, LEASE_OVER),
            Ended::Exit(exit) => self.tell(Input::Exited { exit: Some(exit), spawn_error: String::new() }),
        }
    }

    fn lost(&self, started: bool, usable: bool, reason: &str) {
        self.tell(Input::Lost { started, usable, reason: reason.to_owned() });
    }

    fn tell(&self, input: Input) {
        let _ = self.mail.unbounded_send(Mail::Input(input));
    }
}

fn start_reporter(host: &Rc<Host>, vm: VmId, mail: mpsc::UnboundedSender<Mail>) -> mpsc::UnboundedSender<Report> {
    let (sender, mut reports) = mpsc::unbounded();
    let host_of = Rc::clone(host);
    host.spawn(async move {
        let registry = &host_of.registry;
        while let Some(report) = reports.next().await {
            if let Err(error) = registry.until_answered(|| deliver(registry, vm, &report)).await {
                refused(&host_of, vm, &report, &error, &mail);
            }
            if matches!(report, Report::End { .. }) {
                let _ = mail.unbounded_send(Mail::Reported);
            }
        }
    });
    sender
}

async fn deliver(registry: &Registry, vm: VmId, report: &Report) -> Result<(), Error> {
    match report {
        Report::Ready => registry.transition(vm, VmState::Ready, 0, "").await,
        Report::Started { job, attempt, at } => registry.start_attempt(*job, *attempt, *at).await,
        Report::Finished { job, attempt, end } => registry.finish_attempt(*job, *attempt, end).await,
        Report::End { state, started, reason } => registry.end_vm(vm, *state, *started, reason).await,
    }
}

/// The registry has moved on. A VM that it takes for ended, or never heard of, must not live.
fn refused(host: &Rc<Host>, vm: VmId, report: &Report, error: &Error, mail: &mpsc::UnboundedSender<Mail>) {
    let kernel = host.kernel();
    kernel.trace(format_args!("{} is refused a report of VM {}: {error}", host.site.id, short(&vm.to_string())));
    let ended = match error.metadata.get("from").and_then(|from| VmState::from_name(from)) {
        Some(from) => from.is_terminal(),
        None => error.reason == Reason::VmNotFound,
    };
    if ended && matches!(report, Report::Ready) {
        let stop = Stop { deadline: host.wall(), reason: format!("the registry has no such VM: {error}") };
        let _ = mail.unbounded_send(Mail::Input(Input::Stop(stop)));
    }
}

/// Set of logs that have a writer.
pub type LiveLogs = RefCell<std::collections::BTreeSet<(JobId, u32)>>;
