//! The world's machine: time, processes and their tasks. One thread, no clock and no socket; all that happens is one event after
//! the other, and which comes next follows from the seed.
//!
//! A process is a set of tasks (futures) that can be killed between any two of its awaits, or frozen: then its tasks are woken but
//! not run until it is thawed, as after SIGSTOP. Time stands still while a task runs.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use blixard::time::Timestamp;
use futures::future::LocalBoxFuture;

use crate::random::{Random, mix};

/// When every world begins: 2026-01-01.
const BEGINNING_MS: i64 = 1_767_225_600_000;
/// How many lines of the trace are kept for the report of a failure.
const LAST_LINES: usize = 400;

/// A process, over all of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(u32);

/// The world's time in microseconds from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The time a while later.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)))
    }

    /// The time that has passed since then; zero when it is to come.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

type Action = Box<dyn FnOnce(&Kernel)>;

enum Due {
    Wake(Waker),
    Do(Action),
}

struct Task {
    process: ProcessId,
    /// Absent while it runs.
    future: Option<LocalBoxFuture<'static, ()>>,
    waker: Waker,
}

struct Process {
    name: String,
    alive: bool,
    frozen: bool,
    tasks: BTreeSet<u64>,
    /// Woken while it was frozen.
    held: BTreeSet<u64>,
    /// How far its clock is off, in milliseconds.
    clock_error_ms: i64,
}

struct TaskWaker {
    task: u64,
    woken: Arc<Mutex<Vec<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner).push(self.task);
    }
}

/// What happened, as lines: hashed, the last ones kept, all of them printed if asked.
struct Trace {
    digest: u64,
    lines: u64,
    last: VecDeque<String>,
    print: bool,
}

struct Inner {
    now: Cell<Instant>,
    sequence: Cell<u64>,
    steps: Cell<u64>,
    due: RefCell<BTreeMap<(Instant, u64), Due>>,
    tasks: RefCell<BTreeMap<u64, Task>>,
    processes: RefCell<Vec<Process>>,
    ready: RefCell<BTreeSet<u64>>,
    woken: Arc<Mutex<Vec<u64>>>,
    random: RefCell<Random>,
    trace: RefCell<Trace>,
}

/// See the module.
#[derive(Clone)]
pub struct Kernel(Rc<Inner>);

impl Kernel {
    /// A world in which nothing is yet.
    #[must_use]
    pub fn new(seed: u64, print: bool) -> Self {
        Self(Rc::new(Inner {
            now: Cell::default(),
            sequence: Cell::default(),
            steps: Cell::default(),
            due: RefCell::default(),
            tasks: RefCell::default(),
            processes: RefCell::default(),
            ready: RefCell::default(),
            woken: Arc::default(),
            random: RefCell::new(Random::new(seed)),
            trace: RefCell::new(Trace { digest: seed, lines: 0, last: VecDeque::new(), print }),
        }))
    }

    /// The world's time.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.0.now.get()
    }

    /// How much has happened.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.0.steps.get()
    }

    /// Draws.
    pub fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut self.0.random.borrow_mut())
    }

    /// A moment between two durations.
    #[must_use]
    pub fn between(&self, least: Duration, most: Duration) -> Duration {
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.random(|random| random.below(micros(least)..micros(most))))
    }

    /// Notes what happened.
    pub fn trace(&self, what: fmt::Arguments<'_>) {
        let mut trace = self.0.trace.borrow_mut();
        let line = format!("{:>14} {what}", self.now().to_string());
        for chunk in line.as_bytes().chunks(8) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            trace.digest = mix(trace.digest ^ u64::from_le_bytes(bytes)).wrapping_add(1);
        }
        trace.lines += 1;
        if trace.print {
            println!("{line}");
        }
        if trace.last.len() == LAST_LINES {
            trace.last.pop_front();
        }
        trace.last.push_back(line);
    }

    /// What the trace comes to, and how long it is.
    #[must_use]
    pub fn digest(&self) -> (u64, u64) {
        let trace = self.0.trace.borrow();
        (trace.digest, trace.lines)
    }

    /// The trace's last lines.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        self.0.trace.borrow().last.iter().cloned().collect()
    }

    /// Makes a process; it lives.
    #[must_use]
    pub fn process(&self, name: impl Into<String>) -> ProcessId {
        let mut processes = self.0.processes.borrow_mut();
        let id = ProcessId(u32::try_from(processes.len()).unwrap_or(u32::MAX));
        processes.push(Process {
            name: name.into(),
            alive: true,
            frozen: false,
            tasks: BTreeSet::new(),
            held: BTreeSet::new(),
            clock_error_ms: 0,
        });
        id
    }

    fn with<T>(&self, process: ProcessId, look: impl FnOnce(&mut Process) -> T) -> T {
        look(&mut self.0.processes.borrow_mut()[process.0 as usize])
    }

    /// Its name.
    #[must_use]
    pub fn name(&self, process: ProcessId) -> String {
        self.with(process, |process| process.name.clone())
    }

    /// Whether it lives.
    #[must_use]
    pub fn lives(&self, process: ProcessId) -> bool {
        self.with(process, |process| process.alive)
    }

    /// What a process reads from the clock on its wall.
    #[must_use]
    pub fn wall(&self, process: ProcessId) -> Timestamp {
        let error = self.with(process, |process| process.clock_error_ms);
        Timestamp(self.true_time().0 + error)
    }

    /// What a perfect clock shows.
    #[must_use]
    pub fn true_time(&self) -> Timestamp {
        Timestamp(BEGINNING_MS + i64::try_from(self.now().0 / 1000).unwrap_or(i64::MAX))
    }

    /// Sets how far its clock is off.
    pub fn set_clock(&self, process: ProcessId, error_ms: i64) {
        self.with(process, |process| process.clock_error_ms = error_ms);
    }

    /// Begins a process's next life.
    pub fn revive(&self, process: ProcessId) {
        self.with(process, |process| (process.alive, process.frozen) = (true, false));
    }

    /// Ends a process: none of its tasks goes on.
    pub fn kill(&self, process: ProcessId) {
        let tasks = self.with(process, |process| {
            (process.alive, process.frozen) = (false, false);
            process.held.clear();
            std::mem::take(&mut process.tasks)
        });
        let dead: Vec<Option<Task>> = {
            let mut all = self.0.tasks.borrow_mut();
            tasks.iter().map(|task| all.remove(task)).collect()
        };
        self.0.ready.borrow_mut().retain(|task| !tasks.contains(task));
        drop(dead);
    }

    /// Stops a process, or lets it go on.
    pub fn freeze(&self, process: ProcessId, frozen: bool) {
        let mut ready = self.0.ready.borrow_mut();
        self.with(process, |process| {
            process.frozen = frozen && process.alive;
            if process.frozen {
                process.held.extend(ready.extract_if(.., |task| process.tasks.contains(task)));
            } else {
                ready.append(&mut process.held);
            }
        });
    }

    /// Starts a task of a process; of a dead one it is none.
    pub fn spawn(&self, process: ProcessId, future: impl Future<Output = ()> + 'static) {
        if !self.lives(process) {
            return;
        }
        let task = self.next();
        let waker = Waker::from(Arc::new(TaskWaker { task, woken: Arc::clone(&self.0.woken) }));
        self.0.tasks.borrow_mut().insert(task, Task { process, future: Some(Box::pin(future)), waker: waker.clone() });
        self.with(process, |process| process.tasks.insert(task));
        waker.wake();
    }

    /// Lets something happen at a time, whoever lives then.
    pub fn at(&self, time: Instant, action: impl FnOnce(&Kernel) + 'static) {
        self.0.due.borrow_mut().insert((time, self.next()), Due::Do(Box::new(action)));
    }

    /// Lets time pass.
    #[must_use]
    pub fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now().after(duration))
    }

    /// Waits for a time.
    #[must_use]
    pub fn sleep_until(&self, until: Instant) -> Sleep {
        Sleep { kernel: self.clone(), until, key: None }
    }

    /// Waits for an answer, but not for ever.
    pub async fn timeout<T>(&self, patience: Duration, future: impl Future<Output = T>) -> Option<T> {
        let future = std::pin::pin!(future);
        match futures::future::select(future, self.sleep(patience)).await {
            futures::future::Either::Left((value, _)) => Some(value),
            futures::future::Either::Right(_) => None,
        }
    }

    fn next(&self) -> u64 {
        let next = self.0.sequence.get() + 1;
        self.0.sequence.set(next);
        next
    }

    /// Lets one thing happen; false when there is nothing more.
    pub fn step(&self) -> bool {
        self.0.steps.set(self.0.steps.get() + 1);
        self.collect_woken();
        let task = {
            let ready = self.0.ready.borrow();
            let chosen = self.random(|random| random.index(ready.len().max(1)));
            ready.iter().nth(chosen).copied()
        };
        if let Some(task) = task {
            self.0.ready.borrow_mut().remove(&task);
            self.poll(task);
            return true;
        }
        let Some(((time, _), due)) = self.0.due.borrow_mut().pop_first() else { return false };
        self.0.now.set(time.max(self.now()));
        match due {
            Due::Wake(waker) => waker.wake(),
            Due::Do(action) => action(self),
        }
        true
    }

    fn collect_woken(&self) {
        let woken = std::mem::take(&mut *self.0.woken.lock().unwrap_or_else(PoisonError::into_inner));
        for task in woken {
            let Some(process) = self.0.tasks.borrow().get(&task).map(|task| task.process) else { continue };
            self.with(process, |process| {
                let wake = if process.frozen { &mut process.held } else { &mut *self.0.ready.borrow_mut() };
                wake.insert(task);
            });
        }
    }

    fn poll(&self, id: u64) {
        let taken = self.0.tasks.borrow_mut().get_mut(&id).map(|task| (task.future.take(), task.waker.clone()));
        let Some((Some(mut future), waker)) = taken else { return };
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.0.tasks.borrow_mut();
        // It may have ended its own process.
        if let Some(task) = tasks.get_mut(&id) {
            if done {
                let process = task.process;
                tasks.remove(&id);
                self.with(process, |process| process.tasks.remove(&id));
            } else {
                task.future = Some(future);
                return;
            }
        }
        drop(tasks);
    }
}

/// See [`Kernel::sleep`].
pub struct Sleep {
    kernel: Kernel,
    until: Instant,
    key: Option<(Instant, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.kernel.now() >= self.until {
            return Poll::Ready(());
        }
        let key = match self.key {
            Some(key) => key,
            None => (self.until, self.kernel.next()),
        };
        self.key = Some(key);
        self.kernel.0.due.borrow_mut().insert(key, Due::Wake(context.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.kernel.0.due.borrow_mut().remove(&key);
        }
    }
}

/// Something that changes and can be waited for, within the world.
#[derive(Default)]
pub struct Signal(RefCell<Vec<Waker>>);

impl Signal {
    /// It has changed.
    pub fn notify(&self) {
        for waker in self.0.borrow_mut().drain(..) {
            waker.wake();
        }
    }

    /// Waits until something is so; whoever changes it notifies.
    pub async fn until(&self, is_so: impl Fn() -> bool) {
        std::future::poll_fn(|context| {
            if is_so() {
                return Poll::Ready(());
            }
            self.0.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What two processes do in a world, in the order in which it happens.
    fn story(during: impl Fn(&Kernel, [ProcessId; 2]) + 'static) -> Vec<String> {
        let kernel = Kernel::new(1, false);
        let processes = ["a", "b"].map(|name| kernel.process(name));
        let story = Rc::new(RefCell::new(Vec::new()));
        for process in processes {
            let (kernel, story) = (kernel.clone(), Rc::clone(&story));
            kernel.clone().spawn(process, async move {
                for number in 1..=3 {
                    kernel.sleep(Duration::from_secs(1)).await;
                    story.borrow_mut().push(format!(
                        "{} {number} at {}",
                        kernel.name(process),
                        kernel.now().0 / 1_000_000
                    ));
                }
            });
        }
        kernel.at(Instant(1_500_000), move |kernel| during(kernel, processes));
        while kernel.step() {}
        story.take()
    }

    #[test]
    fn time_passes_for_all_alike() {
        let mut story = story(|_, _| {});
        story.sort();
        assert_eq!(story, ["a 1 at 1", "a 2 at 2", "a 3 at 3", "b 1 at 1", "b 2 at 2", "b 3 at 3"]);
    }

    #[test]
    fn a_killed_process_does_nothing_more() {
        let story = story(|kernel, [a, _]| kernel.kill(a));
        assert_eq!(story.iter().filter(|line| line.starts_with('a')).count(), 1);
        assert_eq!(story.iter().filter(|line| line.starts_with('b')).count(), 3);
    }

    #[test]
    fn a_frozen_one_goes_on_when_it_is_thawed() {
        let story = story(|kernel, [a, _]| {
            kernel.freeze(a, true);
            kernel.at(Instant(10_000_000), move |kernel| kernel.freeze(a, false));
        });
        assert!(story.contains(&"a 2 at 10".to_owned()) && story.contains(&"a 3 at 11".to_owned()), "{story:?}");
        assert!(story.contains(&"b 3 at 3".to_owned()));
    }

    #[test]
    fn clocks_may_be_wrong() {
        let kernel = Kernel::new(1, false);
        let process = kernel.process("p");
        kernel.set_clock(process, -5000);
        assert_eq!(kernel.wall(process).0, kernel.true_time().0 - 5000);
    }
}
