//! What happens to a VM and its job: the decisions, without any doing.
//!
//! ```text
//! Launching ─► Booting ─► Free ◄─► Running      one job at a time; a service VM comes back to Free
//!     │           │         └────┬────┘
//!     │           │         ShuttingDown        the guest was told to end
//!     │           └──────► Dying ◄──┘           it was killed
//!     └───────────────────► Gone                nothing of the machine is left
//! ```
//! [`Lifecycle::step`] takes an [`Input`] and the time and returns the [`Effect`]s for the driver to carry out, in order. Time
//! passes by [`Input::Tick`], due at [`Lifecycle::deadline`]. No file, socket, clock or task is touched here. Public, so that a
//! simulation drives what a node really does.

use std::time::Duration;

use blixard::{
    id::JobId,
    job::{ExitKind, ExitStatus, JobState},
    limits::KILL_GRACE,
    time::Timestamp,
    vm::{VmKind, VmState},
};

pub use crate::logs::Outcome;

/// How long the guest of an ephemeral VM has to power off after its job.
pub(crate) const POWER_OFF_GRACE: Duration = Duration::from_secs(10);
/// A job that was sent SIGKILL and has not ended is sent it again after this: the first may have met a broken connection.
const KILL_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// So often; then the guest is taken for dead and the whole VM is killed.
const KILLS_BEFORE_VM: u8 = 3;

/// Why an attempt is lost that the node had no right to any more.
pub const LEASE_OVER: &str = "its lease ran out (its node was out of touch, or it stood still): another may run it";

/// SIGTERM's number on Linux.
pub(crate) const SIGTERM: i32 = 15;
/// SIGKILL's number on Linux.
pub(crate) const SIGKILL: i32 = 9;

/// Where a VM is in its life on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The hypervisor is starting it.
    Launching,
    /// It runs, and its agent has not answered yet.
    Booting { deadline: Timestamp },
    /// It could take a job.
    Free,
    /// It runs one.
    Running(Run),
    /// Its guest was told to end.
    ShuttingDown { deadline: Timestamp },
    /// It was killed and is not gone yet; with the attempt that was running.
    Dying(Option<Run>),
    /// Nothing of it is left.
    Gone,
}

/// How long an attempt may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// From the start of its command.
    pub run: Option<Duration>,
    /// From its arrival at the node to the start of its command.
    pub start: Option<Duration>,
}

/// An attempt under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The job.
    pub job: JobId,
    /// Its attempt.
    pub attempt: u32,
    /// How long it may take.
    pub limits: Limits,
    /// When this node was given it.
    pub arrived: Timestamp,
    /// When its command started.
    pub started: Option<Timestamp>,
    /// Its command has ended, and what it left is being fetched: that is not its time any more.
    pub collecting: bool,
    /// Why it is being ended.
    pub cause: Option<Cause>,
    /// When it is sent SIGKILL.
    pub kill_at: Option<Timestamp>,
    /// How often it was.
    pub kills: u8,
}

impl Run {
    /// An attempt that begins.
    #[must_use]
    pub fn new(job: JobId, attempt: u32, limits: Limits, arrived: Timestamp) -> Self {
        Self { job, attempt, limits, arrived, started: None, collecting: false, cause: None, kill_at: None, kills: 0 }
    }

    /// When its time is up.
    fn timeout_at(&self) -> Option<Timestamp> {
        match self.started {
            _ if self.cause.is_some() || self.collecting => None,
            Some(started) => Some(started.plus(self.limits.run?)),
            None => Some(self.arrived.plus(self.limits.start?)),
        }
    }

    /// What an attempt that was ended for this cause came to. `unseen`: why its end was not seen.
    fn ended(&self, cause: Cause, exit: Option<ExitStatus>, unseen: Option<&str>) -> Outcome {
        let words = match cause {
            Cause::Cancelled => "it was cancelled".to_owned(),
            Cause::TimedOut => format!("it ran longer than {} ms", milliseconds(self.limits.run)),
            Cause::NotStarted => format!("it did not start within {} ms", milliseconds(self.limits.start)),
            Cause::Superseded => "the registry has moved on to another attempt".to_owned(),
        };
        let reason = match unseen {
            Some(why) if self.started.is_some() => format!("{words}; its end was not seen: {why}"),
            Some(_) | None => words,
        };
        match cause {
            Cause::Cancelled => Outcome::Result { state: JobState::Cancelled, exit, reason },
            Cause::TimedOut | Cause::NotStarted => Outcome::Result { state: JobState::TimedOut, exit, reason },
            Cause::Superseded => Outcome::Lost { started: true, reason },
        }
    }
}

fn milliseconds(limit: Option<Duration>) -> u128 {
    limit.unwrap_or_default().as_millis()
}

/// Why an attempt is ended before its command ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Cause {
    /// Somebody wanted it.
    Cancelled,
    /// It ran too long.
    TimedOut,
    /// It took too long to start.
    NotStarted,
    /// The job has moved on to another attempt.
    Superseded,
}

/// Somebody wants the VM to end.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stop {
    /// When patience ends.
    pub deadline: Timestamp,
    /// Why, in words.
    pub reason: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The machine runs.
    Launched { boot_deadline: Timestamp },
    /// It could not be started; nothing of it is left.
    LaunchFailed { reason: String },
    /// The agent answered and has its identity.
    AgentUp,
    /// The agent answered, and will never be of use.
    BootFailed { reason: String },
    /// An attempt begins: it is written down already, and [`Lifecycle::admit`] let it pass.
    Run(Run),
    /// Its command has started.
    Started { at: Timestamp },
    /// Its command has ended, and what it left is being fetched; [`Input::Exited`] follows.
    Collecting,
    /// Its command has ended (or could not be started: `spawn_error`), and its output is complete.
    Exited { exit: Option<ExitStatus>, spawn_error: String },
    /// The guest does not have it (any more). `usable`: the guest is sound and takes other jobs.
    Lost { started: bool, usable: bool, reason: String },
    /// vmhost came back to an attempt: what was begun to end it is begun again.
    Resumed,
    /// It had ended, and its log says how, before vmhost came back.
    WasOver,
    /// Its output can't be stored.
    Unstorable { reason: String },
    /// Somebody wants this attempt to end.
    Cancel { job: JobId, attempt: u32 },
    /// The registry takes this attempt for over: nobody waits for it, and somebody else may run the job.
    Superseded { job: JobId, attempt: u32 },
    /// The registry has not answered this node for so long that somebody else may run what runs here.
    LeaseOver,
    /// The guest agent fails its health checks.
    Unhealthy { reason: String },
    /// The node has no memory left for what the VM runs.
    OutOfMemory { reason: String },
    /// Its hypervisor does what it may not.
    Misbehaves { reason: String },
    /// Somebody wants the VM to end; that is on disk already.
    Stop(Stop),
    /// The machine ended.
    MachineExited { how: String },
    /// A deadline may have passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Wait for the agent and give it its identity.
    AwaitAgent,
    /// Tell the registry: Ready.
    ReportReady,
    /// Write down why the attempt is being ended.
    SaveCause(Cause),
    /// Send every process of the attempt this signal.
    Signal(i32),
    /// Tell the registry that the command started.
    ReportStarted { at: Timestamp },
    /// End the attempt's log with this, on disk, and tell the registry.
    Finish(Outcome),
    /// Tell the guest to end; its processes have this long before they are killed.
    ShutDownGuest { grace: Duration },
    /// Kill the machine.
    Kill,
    /// Give back what is left, tell the registry and forget the VM.
    End { state: VmState, reason: String },
}

/// What becomes of an attempt that the scheduler sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It may begin.
    Accepted,
    /// It is the one that runs.
    Ignored,
    /// The VM takes no job in this state.
    Denied(VmState),
}

/// One VM's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    kind: VmKind,
    phase: Phase,
    stop: Option<Stop>,
    /// What the VM will have come to, once that is decided.
    ending: Option<(VmState, String)>,
    /// Whether it has run a job.
    used: bool,
}

impl Lifecycle {
    /// A VM that is being started.
    #[must_use]
    pub fn launching(kind: VmKind) -> Self {
        Self { kind, phase: Phase::Launching, stop: None, ending: None, used: false }
    }

    /// A VM that lived when vmhost came back: with the attempt it runs, if any.
    #[must_use]
    pub fn adopted(kind: VmKind, run: Option<Run>, used: bool) -> Self {
        let phase = run.map_or(Phase::Free, Phase::Running);
        Self { kind, used: used || matches!(phase, Phase::Running(_)), phase, stop: None, ending: None }
    }

    /// What it came to was decided before vmhost went; it is gone now.
    #[must_use]
    pub fn decided(mut self, end: Option<(VmState, String)>, stop: Option<Stop>) -> Self {
        let stopped = stop.as_ref().map(|stop| (VmState::Terminated, stop.reason.clone()));
        self.ending = end.or(stopped);
        self.stop = stop;
        self
    }

    /// The state as the registry's words have it.
    #[must_use]
    pub fn state(&self) -> VmState {
        match &self.phase {
            Phase::Launching | Phase::Booting { .. } => VmState::Starting,
            Phase::Free if self.used => VmState::Idle,
            Phase::Free => VmState::Ready,
            Phase::Running(_) if self.stop.is_some() => VmState::Draining,
            Phase::Running(_) => VmState::Busy,
            Phase::ShuttingDown { .. } | Phase::Dying(_) => VmState::Draining,
            Phase::Gone => self.ending.as_ref().map_or(VmState::Failed, |(state, _)| *state),
        }
    }

    /// The attempt it runs.
    #[must_use]
    pub fn run(&self) -> Option<&Run> {
        match &self.phase {
            Phase::Running(run) | Phase::Dying(Some(run)) => Some(run),
            Phase::Launching
            | Phase::Booting { .. }
            | Phase::Free
            | Phase::ShuttingDown { .. }
            | Phase::Dying(None)
            | Phase::Gone => None,
        }
    }

    /// When the next [`Input::Tick`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Booting { deadline } | Phase::ShuttingDown { deadline } => Some(*deadline),
            Phase::Running(run) => {
                let stop = self.stop.as_ref().map(|stop| stop.deadline);
                [run.timeout_at(), run.kill_at, stop].into_iter().flatten().min()
            }
            Phase::Launching | Phase::Free | Phase::Dying(_) | Phase::Gone => None,
        }
    }

    /// Whether an attempt may begin here.
    #[must_use]
    pub fn admit(&self, job: JobId, attempt: u32) -> Admission {
        match &self.phase {
            Phase::Free => Admission::Accepted,
            Phase::Running(run) if (run.job, run.attempt) == (job, attempt) => Admission::Ignored,
            Phase::Launching
            | Phase::Booting { .. }
            | Phase::Running(_)
            | Phase::ShuttingDown { .. }
            | Phase::Dying(_)
            | Phase::Gone => Admission::Denied(self.state()),
        }
    }

    /// Takes an input; what does not fit the phase is ignored.
    pub fn step(&mut self, now: Timestamp, input: Input) -> Vec<Effect> {
        match input {
            Input::Launched { boot_deadline } => self.launched(boot_deadline),
            Input::LaunchFailed { reason } => match self.phase {
                Phase::Launching => self.gone(reason),
                _ => vec![],
            },
            Input::AgentUp => match self.phase {
                Phase::Booting { .. } => self.go(Phase::Free, vec![Effect::ReportReady]),
                _ => vec![],
            },
            Input::BootFailed { reason } => match self.phase {
                Phase::Booting { .. } => self.kill(None, VmState::Failed, reason),
                _ => vec![],
            },
            Input::Run(run) => match self.phase {
                Phase::Free => {
                    self.used = true;
                    self.go(Phase::Running(run), vec![])
                }
                _ => vec![],
            },
            Input::Started { at } => self.started(at.min(now)),
            Input::Collecting => {
                if let Phase::Running(run) = &mut self.phase {
                    run.collecting = true;
                }
                vec![]
            }
            Input::Exited { exit, spawn_error } => self.exited(now, exit, spawn_error),
            Input::Lost { started, usable, reason } => self.lost(now, started, usable, reason),
            Input::Resumed => match &mut self.phase {
                Phase::Running(run) if run.cause.is_some() => {
                    run.kill_at = Some(now.plus(KILL_GRACE));
                    vec![Effect::Signal(SIGTERM)]
                }
                _ => vec![],
            },
            Input::WasOver => {
                if self.run().is_some() {
                    self.after_job(now)
                } else {
                    vec![]
                }
            }
            Input::Unstorable { reason } => self.unstorable(reason),
            Input::Cancel { job, attempt } => match &mut self.phase {
                Phase::Running(run) if (run.job, run.attempt) == (job, attempt) && run.cause.is_none() => {
                    end_run(run, now, Cause::Cancelled)
                }
                _ => vec![],
            },
            Input::Superseded { job, attempt } => match &mut self.phase {
                Phase::Running(run) if (run.job, run.attempt) == (job, attempt) && run.cause.is_none() => {
                    run.cause = Some(Cause::Superseded);
                    kill_run(run, now, vec![Effect::SaveCause(Cause::Superseded)])
                }
                _ => vec![],
            },
            Input::LeaseOver => match &self.phase {
                Phase::Running(run) => self.kill(Some(run.clone()), VmState::Failed, LEASE_OVER.to_owned()),
                _ => vec![],
            },
            Input::Unhealthy { reason } => match self.phase {
                Phase::Free => self.kill(None, VmState::Failed, format!("unhealthy: {reason}")),
                _ => vec![],
            },
            Input::OutOfMemory { reason } => match &self.phase {
                Phase::Running(run) => self.kill(Some(run.clone()), VmState::Failed, reason),
                _ => vec![],
            },
            Input::Misbehaves { reason } => match &self.phase {
                // Killed as soon as there is something that can be.
                Phase::Launching => {
                    self.ending.get_or_insert((VmState::Failed, reason));
                    vec![]
                }
                Phase::Booting { .. } | Phase::Free | Phase::Running(_) | Phase::ShuttingDown { .. } => {
                    self.kill(self.run().cloned(), VmState::Failed, reason)
                }
                Phase::Dying(_) | Phase::Gone => vec![],
            },
            Input::Stop(stop) => self.stop(now, stop),
            Input::MachineExited { how } => self.machine_exited(how),
            Input::Tick => self.tick(now),
        }
    }

    fn go(&mut self, phase: Phase, effects: Vec<Effect>) -> Vec<Effect> {
        self.phase = phase;
        effects
    }

    fn launched(&mut self, deadline: Timestamp) -> Vec<Effect> {
        match (&self.phase, &self.ending) {
            (Phase::Launching, None) => self.go(Phase::Booting { deadline }, vec![Effect::AwaitAgent]),
            (Phase::Launching, Some(_)) => self.go(Phase::Dying(None), vec![Effect::Kill]),
            _ => vec![],
        }
    }

    /// Kills the machine. What was decided about its end first stays decided.
    fn kill(&mut self, run: Option<Run>, state: VmState, reason: String) -> Vec<Effect> {
        self.ending.get_or_insert((state, reason));
        self.go(Phase::Dying(run), vec![Effect::Kill])
    }

    fn gone(&mut self, how: String) -> Vec<Effect> {
        let (state, reason) = self.ending.get_or_insert((VmState::Failed, how)).clone();
        self.go(Phase::Gone, vec![Effect::End { state, reason }])
    }

    fn started(&mut self, at: Timestamp) -> Vec<Effect> {
        match &mut self.phase {
            Phase::Running(run) | Phase::Dying(Some(run)) if run.started.is_none() => {
                run.started = Some(at);
                vec![Effect::ReportStarted { at }]
            }
            _ => vec![],
        }
    }

    fn exited(&mut self, now: Timestamp, exit: Option<ExitStatus>, spawn_error: String) -> Vec<Effect> {
        let Some(run) = self.run() else { return vec![] };
        let mut effects = vec![Effect::Finish(self.outcome_of_exit(run, exit, spawn_error))];
        effects.extend(self.after_job(now));
        effects
    }

    fn outcome_of_exit(&self, run: &Run, exit: Option<ExitStatus>, spawn_error: String) -> Outcome {
        if let Some(cause) = run.cause {
            return run.ended(cause, exit, None);
        }
        if let Some(stop) = &self.stop {
            return Outcome::Lost { started: true, reason: stopped(stop) };
        }
        match exit.map(|exit| exit.kind) {
            Some(ExitKind::Code(0)) => Outcome::Result { state: JobState::Succeeded, exit, reason: String::new() },
            Some(ExitKind::Code(code)) => failed(exit, format!("it exited with status {code}")),
            Some(ExitKind::Signal(signal)) => failed(exit, format!("signal {signal} killed it")),
            None => failed(None, spawn_error),
        }
    }

    /// The attempt is over: what comes next for the VM?
    fn after_job(&mut self, now: Timestamp) -> Vec<Effect> {
        if matches!(self.phase, Phase::Dying(_)) {
            return self.go(Phase::Dying(None), vec![]);
        }
        match (self.stop.clone(), self.kind) {
            (Some(stop), _) => self.shut_down_patiently(now, stop),
            // What a job left behind has no claim to patience.
            (None, VmKind::Ephemeral) => {
                let deadline = now.plus(POWER_OFF_GRACE);
                self.shut_down(deadline, Duration::ZERO, "its job has ended".to_owned())
            }
            (None, VmKind::Service) => self.go(Phase::Free, vec![]),
        }
    }

    /// Half of the patience is the processes', the rest is for powering off.
    fn shut_down_patiently(&mut self, now: Timestamp, stop: Stop) -> Vec<Effect> {
        self.shut_down(stop.deadline, stop.deadline.since(now) / 2, stop.reason)
    }

    fn shut_down(&mut self, deadline: Timestamp, grace: Duration, reason: String) -> Vec<Effect> {
        self.ending.get_or_insert((VmState::Terminated, reason));
        self.go(Phase::ShuttingDown { deadline }, vec![Effect::ShutDownGuest { grace }])
    }

    fn lost(&mut self, now: Timestamp, started: bool, usable: bool, reason: String) -> Vec<Effect> {
        let Some(run) = self.run() else { return vec![] };
        let mut effects = vec![Effect::Finish(self.outcome_of_loss(run, started, &reason))];
        if usable || matches!(self.phase, Phase::Dying(_)) {
            effects.extend(self.after_job(now));
        } else {
            effects.extend(self.kill(None, VmState::Failed, reason));
        }
        effects
    }

    /// A job that was being ended has ended, even when nobody saw it.
    fn outcome_of_loss(&self, run: &Run, started: bool, reason: &str) -> Outcome {
        match (run.cause, &self.stop) {
            (Some(cause), _) => run.ended(cause, None, Some(reason)),
            (None, Some(stop)) => Outcome::Lost { started, reason: stopped(stop) },
            (None, None) => Outcome::Lost { started, reason: reason.to_owned() },
        }
    }

    fn unstorable(&mut self, reason: String) -> Vec<Effect> {
        if self.run().is_none() {
            return vec![];
        }
        let mut effects = vec![Effect::Finish(failed(None, reason.clone()))];
        effects.extend(self.kill(None, VmState::Failed, reason));
        effects
    }

    fn stop(&mut self, now: Timestamp, wanted: Stop) -> Vec<Effect> {
        // The first reason stays; patience may only shrink.
        let stop = self.stop.get_or_insert(wanted.clone());
        stop.deadline = stop.deadline.min(wanted.deadline);
        let Stop { deadline, reason } = stop.clone();
        let patient = deadline > now;
        match &mut self.phase {
            Phase::Launching => {
                self.ending.get_or_insert((VmState::Terminated, reason));
                vec![]
            }
            // A guest that is still booting has nothing to save.
            Phase::Booting { .. } => self.kill(None, VmState::Terminated, reason),
            Phase::Free if patient => self.shut_down_patiently(now, Stop { deadline, reason }),
            Phase::Running(run) if patient => {
                let signal = run.cause.is_none();
                if signal { vec![Effect::Signal(SIGTERM)] } else { vec![] }
            }
            Phase::ShuttingDown { deadline: shut_down } if patient => {
                *shut_down = deadline.min(*shut_down);
                vec![]
            }
            Phase::Free | Phase::Running(_) | Phase::ShuttingDown { .. } => {
                self.kill(self.run().cloned(), VmState::Terminated, reason)
            }
            Phase::Dying(_) | Phase::Gone => vec![],
        }
    }

    fn machine_exited(&mut self, how: String) -> Vec<Effect> {
        if self.phase == Phase::Gone {
            return vec![];
        }
        let mut effects = Vec::new();
        if let Some(run) = self.run() {
            // Why it was ended says more than how.
            let why = self.ending.as_ref().map_or(&how, |(_, reason)| reason);
            effects.push(Effect::Finish(self.outcome_of_loss(run, true, &format!("its VM ended: {why}"))));
        }
        effects.extend(self.gone(how));
        effects
    }

    fn tick(&mut self, now: Timestamp) -> Vec<Effect> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return vec![];
        }
        match &mut self.phase {
            Phase::Booting { .. } => {
                self.kill(None, VmState::Failed, "the guest agent did not answer in time".to_owned())
            }
            Phase::ShuttingDown { .. } => self.kill(None, VmState::Terminated, String::new()),
            Phase::Running(run) => match &self.stop {
                Some(stop) if stop.deadline <= now => {
                    let (run, reason) = (run.clone(), stop.reason.clone());
                    self.kill(Some(run), VmState::Terminated, reason)
                }
                Some(_) | None if run.kill_at.is_none() => {
                    let cause = if run.started.is_some() { Cause::TimedOut } else { Cause::NotStarted };
                    end_run(run, now, cause)
                }
                Some(_) | None if run.kills < KILLS_BEFORE_VM => kill_run(run, now, vec![]),
                Some(_) | None => {
                    let run = run.clone();
                    self.kill(Some(run), VmState::Failed, "the guest does not end a job that was killed".to_owned())
                }
            },
            Phase::Launching | Phase::Free | Phase::Dying(_) | Phase::Gone => vec![],
        }
    }
}

fn end_run(run: &mut Run, now: Timestamp, cause: Cause) -> Vec<Effect> {
    run.cause = Some(cause);
    run.kill_at = Some(now.plus(KILL_GRACE));
    vec![Effect::SaveCause(cause), Effect::Signal(SIGTERM)]
}

/// Sends it SIGKILL, for the first time or again, after what else is to be done.
fn kill_run(run: &mut Run, now: Timestamp, mut effects: Vec<Effect>) -> Vec<Effect> {
    run.kills += 1;
    run.kill_at = Some(now.plus(KILL_AGAIN_AFTER));
    effects.push(Effect::Signal(SIGKILL));
    effects
}

fn failed(exit: Option<ExitStatus>, reason: String) -> Outcome {
    Outcome::Result { state: JobState::Failed, exit, reason }
}

fn stopped(stop: &Stop) -> String {
    format!("its VM was stopped: {}", stop.reason)
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
