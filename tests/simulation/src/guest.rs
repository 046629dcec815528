//! A machine and the guest in it: it boots, runs one attempt at a time as the agent does, obeys signals and leases, and outlives
//! its vmhost. Its calls go over vsock, which no partition cuts.
//!
//! What a command does stands in the command: see [`Work`].

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use blixard::{
    id::{JobId, NodeId, VmId},
    job::{ExitKind, ExitStatus},
    time::Timestamp,
};

use crate::{
    kernel::{Instant, Kernel, ProcessId, Signal},
    settings::Protection,
    world::World,
};

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// What a command does: how long it works, with which status each attempt ends, and whether it minds SIGTERM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    pub lasts: Duration,
    /// Of the first attempt, the second, …; the last one counts for all that follow.
    pub exits: Vec<i32>,
    pub stubborn: bool,
}

impl Work {
    /// As the words of a command.
    #[must_use]
    pub fn to_command(&self) -> Vec<String> {
        let mut words =
            vec!["work".to_owned(), self.lasts.as_millis().to_string(), u8::from(self.stubborn).to_string()];
        words.extend(self.exits.iter().map(ToString::to_string));
        words
    }

    /// From the words of a command.
    #[must_use]
    pub fn of_command(words: &[String]) -> Self {
        let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0);
        Self {
            lasts: Duration::from_millis(number(1)),
            stubborn: number(2) == 1,
            exits: words.iter().skip(3).filter_map(|word| word.parse().ok()).collect(),
        }
    }

    fn exit(&self, attempt: u32) -> i32 {
        let at = attempt.saturating_sub(1) as usize;
        self.exits.get(at).or(self.exits.last()).copied().unwrap_or(0)
    }
}

/// An attempt as its guest holds it.
#[derive(Debug, Clone)]
struct Attempt {
    job: JobId,
    attempt: u32,
    started_at: Timestamp,
    ended: Option<Ended>,
    /// When it is killed, unless it is renewed.
    lease_ends: Option<Instant>,
    /// The strongest signal that it was sent.
    signal: Option<i32>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exit(ExitStatus),
    /// The guest ended it, because its host did not renew its lease.
    LeaseOver,
}

/// Why a guest does not run an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The machine is gone, or its agent does not answer.
    Unreachable,
    /// It was only to be attached to, and is not known.
    Unknown,
    /// A later one of the job was seen, or it is over and forgotten.
    Stale,
    /// Another attempt is running.
    Occupied,
}

/// What an attempt has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub started_at: Timestamp,
    pub ended: Option<Ended>,
}

/// A machine, from its launch to its end.
pub struct Machine {
    world: World,
    process: ProcessId,
    node: NodeId,
    pub vm: VmId,
    pub boot_id: u64,
    up: Cell<bool>,
    ended: Cell<bool>,
    attempt: RefCell<Option<Attempt>>,
    seen: RefCell<BTreeMap<JobId, u32>>,
    changed: Signal,
}

impl Machine {
    /// Launches one.
    pub fn launch(world: &World, node: &NodeId, vm: VmId, memory_mib: u32) -> Rc<Self> {
        let kernel = &world.kernel;
        let process = kernel.process(format!("vm-{}", crate::wire::short(&vm.to_string())));
        let (boot_id, patience) = kernel.random(|random| (random.bits(), random.below(0..1000)));
        kernel.set_clock(process, kernel.random(|random| i64::try_from(random.below(0..400)).unwrap_or(0) - 200));
        world.checker.borrow_mut().machine_started(node, vm, u64::from(memory_mib));
        let machine = Rc::new(Self {
            world: world.clone(),
            process,
            node: node.clone(),
            vm,
            boot_id,
            up: Cell::default(),
            ended: Cell::default(),
            attempt: RefCell::default(),
            seen: RefCell::default(),
            changed: Signal::default(),
        });
        let booting = Rc::clone(&machine);
        // Two in a hundred never come up, three die on the way.
        let boot_time = kernel.between(Duration::from_millis(80), Duration::from_secs(4));
        kernel.spawn(process, async move {
            booting.kernel().sleep(boot_time).await;
            match patience {
                0..20 if booting.world.faulty() => std::future::pending().await,
                20..50 if booting.world.faulty() => booting.die("it panicked while it booted"),
                _ => {
                    booting.up.set(true);
                    booting.changed.notify();
                }
            }
        });
        machine
    }

    fn kernel(&self) -> &Kernel {
        &self.world.kernel
    }

    /// Whether it lives.
    #[must_use]
    pub fn lives(&self) -> bool {
        !self.ended.get()
    }

    /// Ends it here and now: SIGKILL from the host, a panic, the host's power.
    pub fn die(&self, how: &str) {
        if self.ended.replace(true) {
            return;
        }
        self.kernel().trace(format_args!("{} machine {} ends: {how}", self.node, self.vm));
        self.world.checker.borrow_mut().machine_ended(self.vm);
        self.changed.notify();
        // Last: the task that calls this may be one of its own.
        self.kernel().kill(self.process);
    }

    /// Waits for its end.
    pub async fn wait(&self) {
        self.changed.until(|| self.ended.get()).await;
    }

    /// Waits until the agent answers.
    pub async fn agent(&self) {
        self.changed.until(|| self.up.get() && !self.ended.get()).await;
    }

    /// Starts an attempt, or attaches to it: the agent's `Run`. `lease`: how long it may run without [`Machine::renew`].
    pub fn run(
        self: &Rc<Self>,
        job: JobId,
        attempt: u32,
        command: Option<&[String]>,
        lease: Option<Duration>,
    ) -> Result<(), Refusal> {
        if !self.up.get() || self.ended.get() {
            return Err(Refusal::Unreachable);
        }
        if let Some(held) = &mut *self.attempt.borrow_mut() {
            let begins_again = held.ended.is_some() && command.is_some() && !self.world.protects(Protection::Fence);
            if (held.job, held.attempt) == (job, attempt) && !begins_again {
                // A vmhost that has just started has nothing to say about it yet.
                if let Some(lease) = lease {
                    held.lease_ends = Some(self.kernel().now().after(lease));
                    self.changed.notify();
                }
                return Ok(());
            }
            if held.ended.is_none() {
                return Err(if held.job == job && held.attempt > attempt { Refusal::Stale } else { Refusal::Occupied });
            }
        }
        let seen = self.seen.borrow().get(&job).copied().unwrap_or(0);
        if seen >= attempt && self.world.protects(Protection::Fence) {
            return Err(Refusal::Stale);
        }
        let Some(command) = command else { return Err(Refusal::Unknown) };
        self.seen.borrow_mut().insert(job, attempt);
        self.begin(job, attempt, Work::of_command(command), lease);
        Ok(())
    }

    fn begin(self: &Rc<Self>, job: JobId, attempt: u32, work: Work, lease: Option<Duration>) {
        let kernel = self.kernel();
        kernel.trace(format_args!("guest of {}: {job}#{attempt} starts", self.vm));
        let run = self.world.checker.borrow_mut().command_started(job, attempt, self.vm);
        *self.attempt.borrow_mut() = Some(Attempt {
            job,
            attempt,
            started_at: kernel.wall(self.process),
            ended: None,
            lease_ends: lease.map(|lease| kernel.now().after(lease)),
            signal: None,
        });
        self.changed.notify();
        let machine = Rc::clone(self);
        kernel.spawn(self.process, async move {
            let kind = machine.work(&work, attempt).await;
            machine.kernel().trace(format_args!("guest of {}: {job}#{attempt} ends: {kind:?}", machine.vm));
            machine.world.checker.borrow_mut().command_ended(job, attempt);
            if let Some(held) = &mut *machine.attempt.borrow_mut() {
                let exit = |kind| ExitStatus { kind, user_time_ms: run, system_time_ms: 0, max_rss_kib: 1 };
                held.ended = Some(kind.map_or(Ended::LeaseOver, |kind| Ended::Exit(exit(kind))));
            }
            machine.changed.notify();
        });
    }

    /// The command, until it ends by itself or is ended; `None`: by the end of its lease.
    async fn work(&self, work: &Work, attempt: u32) -> Option<ExitKind> {
        let done = self.kernel().now().after(work.lasts);
        loop {
            let seen = self.attempt.borrow().as_ref().map_or((None, None), |held| (held.signal, held.lease_ends));
            // Without this protection a guest runs on whatever becomes of its node.
            let (signal, lease_ends) = (seen.0, seen.1.filter(|_| self.world.protects(Protection::NodeLease)));
            let now = self.kernel().now();
            if lease_ends.is_some_and(|ends| ends <= now) {
                return None;
            }
            if signal == Some(SIGKILL) || signal == Some(SIGTERM) && !work.stubborn {
                return signal.map(ExitKind::Signal);
            }
            if now >= done {
                return Some(ExitKind::Code(work.exit(attempt)));
            }
            let until = lease_ends.unwrap_or(done).min(done);
            let changed = self.changed.until(|| {
                let held = self.attempt.borrow();
                held.as_ref().map(|held| (held.signal, held.lease_ends)) != Some(seen)
            });
            futures::future::select(std::pin::pin!(changed), self.kernel().sleep_until(until)).await;
        }
    }

    /// The attempt may go on for so long.
    pub fn renew(&self, job: JobId, attempt: u32, lease: Duration) {
        if let Some(held) = &mut *self.attempt.borrow_mut()
            && (held.job, held.attempt) == (job, attempt)
        {
            held.lease_ends = Some(self.kernel().now().after(lease));
            self.changed.notify();
        }
    }

    /// What an attempt has come to; `None` when the guest does not have it.
    #[must_use]
    pub fn progress(&self, job: JobId, attempt: u32) -> Option<Progress> {
        let held = self.attempt.borrow();
        let held = held.as_ref().filter(|held| (held.job, held.attempt) == (job, attempt))?;
        Some(Progress { started_at: held.started_at, ended: held.ended })
    }

    /// Waits until an attempt has ended, or the machine.
    pub async fn ended(&self, job: JobId, attempt: u32) {
        let over = || self.progress(job, attempt).is_none_or(|progress| progress.ended.is_some());
        self.changed.until(|| self.ended.get() || over()).await;
    }

    /// Sends a signal to an attempt.
    pub fn signal(&self, job: JobId, attempt: u32, signal: i32) {
        if let Some(held) = &mut *self.attempt.borrow_mut()
            && (held.job, held.attempt) == (job, attempt)
            && held.signal != Some(SIGKILL)
        {
            held.signal = Some(signal);
        }
        self.changed.notify();
    }

    /// Tells the guest to end.
    pub fn shut_down(self: &Rc<Self>, grace: Duration) {
        if !self.up.get() || self.ended.get() {
            return;
        }
        let machine = Rc::clone(self);
        // One in a hundred hangs; the others take their time.
        let hangs = self.world.faulty() && self.kernel().random(|random| random.per_mille(10));
        let power_off = self.kernel().between(Duration::from_millis(10), Duration::from_secs(2));
        self.kernel().spawn(self.process, async move {
            let running = machine
                .attempt
                .borrow()
                .as_ref()
                .filter(|held| held.ended.is_none())
                .map(|held| (held.job, held.attempt));
            if let Some((job, attempt)) = running {
                machine.signal(job, attempt, SIGTERM);
                machine.kernel().timeout(grace, machine.ended(job, attempt)).await;
                machine.signal(job, attempt, SIGKILL);
            }
            machine.kernel().sleep(power_off).await;
            if !hangs {
                machine.die("it powered off");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_through_a_command_unchanged() {
        let work = Work { lasts: Duration::from_millis(1500), exits: vec![1, 0], stubborn: true };
        assert_eq!(Work::of_command(&work.to_command()), work);
        assert_eq!([1, 2, 3].map(|attempt| work.exit(attempt)), [1, 0, 0]);
    }
}
