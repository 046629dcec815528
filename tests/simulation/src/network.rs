//! How processes reach each other: calls that take their time, get lost on the way or on the way back, come twice or late.
//!
//! Every call is answered, or fails with a reason that leaves its outcome open, as over gRPC: a connection that breaks says
//! PEER_UNAVAILABLE, patience that ends DEADLINE_EXCEEDED. What was sent into a partition may still arrive when it is over, long
//! after its caller has given up.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use blixard::error::{Error, Reason};
use futures::{channel::oneshot, future::LocalBoxFuture};

use crate::{
    kernel::{Kernel, ProcessId},
    wire::{Answer, Call},
};

/// What serves a process's calls.
pub type Server = Rc<dyn Fn(Call) -> LocalBoxFuture<'static, Result<Answer, Error>>>;

/// How bad the weather is, in a thousand.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Calls, and answers, that are lost.
    pub lost: u64,
    /// Calls that arrive twice.
    pub twice: u64,
    /// Messages that take seconds.
    pub slow: u64,
}

impl Weather {
    /// Nothing is lost.
    pub const FAIR: Self = Self { lost: 0, twice: 0, slow: 0 };
}

/// Between two processes of one machine room.
const USUAL: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(2));
/// When packets have to be sent again.
const SLOW: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(8));
/// What is caught in a partition is sent again after this, and again after twice as long …
const SENT_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// … until this is over, as TCP does: it may arrive long after the partition's end.
const HELD_FOR: Duration = Duration::from_secs(180);
/// How often a stream looks whether it goes on.
const LOOK_EVERY: Duration = Duration::from_millis(700);
/// How late the second copy of a call may be.
const COPY: (Duration, Duration) = (Duration::ZERO, Duration::from_secs(20));

struct Inner {
    kernel: Kernel,
    servers: RefCell<BTreeMap<ProcessId, Server>>,
    /// Who does not reach whom.
    cut: RefCell<BTreeSet<(ProcessId, ProcessId)>>,
    weather: Cell<Weather>,
}

/// See the module.
#[derive(Clone)]
pub struct Network(Rc<Inner>);

impl Network {
    /// A network without anybody on it.
    #[must_use]
    pub fn new(kernel: &Kernel) -> Self {
        Self(Rc::new(Inner {
            kernel: kernel.clone(),
            servers: RefCell::default(),
            cut: RefCell::default(),
            weather: Cell::new(Weather::FAIR),
        }))
    }

    /// A process answers from now on.
    pub fn serve(&self, process: ProcessId, server: Server) {
        self.0.servers.borrow_mut().insert(process, server);
    }

    /// It does not any more.
    pub fn close(&self, process: ProcessId) {
        self.0.servers.borrow_mut().remove(&process);
    }

    /// The weather changes.
    pub fn set_weather(&self, weather: Weather) {
        self.0.weather.set(weather);
    }

    /// What one sends does not reach the other any more.
    pub fn cut(&self, from: ProcessId, to: ProcessId) {
        self.0.cut.borrow_mut().insert((from, to));
    }

    /// It does again.
    pub fn mend(&self, from: ProcessId, to: ProcessId) {
        self.0.cut.borrow_mut().remove(&(from, to));
    }

    /// Whether it does.
    #[must_use]
    pub fn reaches(&self, from: ProcessId, to: ProcessId) -> bool {
        !self.0.cut.borrow().contains(&(from, to))
    }

    /// One call and its answer.
    pub async fn call(
        &self,
        from: ProcessId,
        to: ProcessId,
        call: impl Into<Call>,
        patience: Duration,
    ) -> Result<Answer, Error> {
        let call = call.into();
        let kernel = &self.0.kernel;
        kernel.trace(format_args!("{} > {}: {call}", kernel.name(from), kernel.name(to)));
        let (sender, receiver) = oneshot::channel();
        let back = Rc::new(RefCell::new(Some(sender)));
        let twice = kernel.random(|random| random.per_mille(self.0.weather.get().twice));
        if twice {
            let (network, call, back) = (self.clone(), call.clone(), Rc::clone(&back));
            let at = kernel.now().after(kernel.between(COPY.0, COPY.1));
            kernel.at(at, move |_| network.send(from, to, call, back));
        }
        self.send(from, to, call, back);
        match kernel.timeout(patience, receiver).await {
            Some(Ok(answer)) => answer,
            Some(Err(oneshot::Canceled)) => Err(unavailable("the connection broke")),
            None => Err(Error::new(Reason::DeadlineExceeded, "no answer in time")),
        }
    }

    /// How long a message travels.
    fn delay(&self) -> Duration {
        let kernel = &self.0.kernel;
        let slow = kernel.random(|random| random.per_mille(self.0.weather.get().slow));
        let (least, most) = if slow { SLOW } else { USUAL };
        kernel.between(least, most)
    }

    /// Whether a message is lost; if so, whether its sender hears of a broken connection is chance too.
    fn loses(&self) -> bool {
        self.0.kernel.random(|random| random.per_mille(self.0.weather.get().lost))
    }

    fn send(&self, from: ProcessId, to: ProcessId, call: Call, back: Back) {
        if self.loses() {
            return self.lose(back);
        }
        let network = self.clone();
        self.travel(from, to, move |kernel| {
            let server = network.0.servers.borrow().get(&to).cloned();
            // Nobody listens there: the connection is refused.
            let Some(server) = server.filter(|_| kernel.lives(to)) else { return drop(back.take()) };
            let name = call.to_string();
            let handler = server(call);
            let network = network.clone();
            kernel.spawn(to, async move {
                // A server that dies breaks its connections.
                let breaks = Breaks(back);
                let answer = handler.await;
                network.answer(from, to, &name, answer, &breaks.0);
            });
        });
    }

    fn answer(&self, from: ProcessId, to: ProcessId, name: &str, answer: Result<Answer, Error>, back: &Back) {
        let kernel = &self.0.kernel;
        match &answer {
            Ok(answer) => kernel.trace(format_args!("{} < {}: {name}: {answer}", kernel.name(from), kernel.name(to))),
            Err(error) => kernel.trace(format_args!(
                "{} < {}: {name}: {}: {error}",
                kernel.name(from),
                kernel.name(to),
                error.reason.name()
            )),
        }
        let Some(sender) = back.take() else { return };
        if self.loses() {
            return self.lose(Rc::new(RefCell::new(Some(sender))));
        }
        self.travel(to, from, move |_| {
            // Whoever asked may have given up.
            let _ = sender.send(answer);
        });
    }

    /// The connection breaks at once, or nothing is ever heard of it.
    fn lose(&self, back: Back) {
        if self.0.kernel.random(|random| random.per_mille(500)) {
            let at = self.0.kernel.now().after(self.delay());
            self.0.kernel.at(at, move |_| drop(back.take()));
        } else {
            // Held until long after everybody's patience.
            let at = self.0.kernel.now().after(HELD_FOR * 10);
            self.0.kernel.at(at, move |_| drop(back));
        }
    }

    fn travel(&self, from: ProcessId, to: ProcessId, arrive: impl FnOnce(&Kernel) + 'static) {
        self.try_again(from, to, self.delay(), SENT_AGAIN_AFTER, Box::new(arrive));
    }

    fn try_again(&self, from: ProcessId, to: ProcessId, delay: Duration, pause: Duration, arrive: Arrive) {
        let network = self.clone();
        self.0.kernel.at(self.0.kernel.now().after(delay), move |kernel| {
            if network.reaches(from, to) {
                arrive(kernel);
            } else if pause < HELD_FOR {
                network.try_again(from, to, pause + network.delay(), pause * 2, arrive);
            }
        });
    }

    /// One step of a stream that keeps its order; false when the connection is broken.
    pub async fn pass(&self, from: ProcessId, to: ProcessId) -> bool {
        self.0.kernel.sleep(self.delay()).await;
        let until = self.0.kernel.now().after(Duration::from_secs(10));
        while !self.reaches(from, to) {
            if self.0.kernel.now() >= until {
                return false;
            }
            self.0.kernel.sleep(LOOK_EVERY).await;
        }
        !self.loses()
    }
}

type Arrive = Box<dyn FnOnce(&Kernel)>;
type Back = Rc<RefCell<Option<oneshot::Sender<Result<Answer, Error>>>>>;

/// Breaks the connection when it is dropped.
struct Breaks(Back);

impl Drop for Breaks {
    fn drop(&mut self) {
        drop(self.0.take());
    }
}

/// The connection broke: whether the call was obeyed is not known.
#[must_use]
pub fn unavailable(what: &str) -> Error {
    Error::new(Reason::PeerUnavailable, what)
}

/// Whether an answer says nothing about what was asked: ask again.
#[must_use]
pub fn is_open(error: &Error) -> bool {
    matches!(
        error.reason,
        Reason::PeerUnavailable
            | Reason::ShuttingDown
            | Reason::Overloaded
            | Reason::DeadlineExceeded
            | Reason::ReplicaBehind
            | Reason::DiskFull
            | Reason::Internal
    )
}
