//! One world: a registry, schedulers, nodes and users on a network, the faults that befall them, and the checker that sees all.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    time::Duration,
};

use blixard::error::Error;
use blixard_scheduler::control::Control;

use crate::{
    checker::{Checker, Figures},
    clients::{self, Asked},
    faults,
    host::{self, Offer, Site},
    kernel::{Instant, Kernel, ProcessId},
    network::{Network, Weather},
    registry::Registry,
    scheduler,
    settings::{Protection, Settings},
    wire::{Answer, RegistryCall},
};

/// How many VMs may live at once in all.
pub const MAX_VMS: u32 = 11;
/// Memory of the largest VM that jobs ask for.
pub const MAX_MEMORY_MIB: u32 = 1024;
/// After the faults everything must have settled within this time of the world.
const SETTLE_WITHIN: Duration = Duration::from_secs(1800);
/// How often is looked whether it has.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// So many events must bring it there, or something spins.
const SETTLE_STEPS: u64 = 600_000;

/// What all parts of a world share.
#[derive(Clone)]
pub struct World {
    pub kernel: Kernel,
    pub network: Network,
    pub checker: Rc<RefCell<Checker>>,
    pub registry: ProcessId,
    pub schedulers: Rc<[ProcessId]>,
    pub node_names: Rc<[String]>,
    /// What each scheduler knows, for the report of a failure.
    pub controls: Rc<RefCell<BTreeMap<ProcessId, Rc<RefCell<Control>>>>>,
    nodes: Rc<BTreeMap<String, ProcessId>>,
    settings: Settings,
    faulty: Rc<Cell<bool>>,
}

impl World {
    /// Whether something keeps the system from doing wrong in this run.
    #[must_use]
    pub fn protects(&self, protection: Protection) -> bool {
        self.settings.without != Some(protection)
    }

    /// Whether faults still happen.
    #[must_use]
    pub fn faulty(&self) -> bool {
        self.faulty.get()
    }

    /// The vmhost's process of a node.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<ProcessId> {
        self.nodes.get(name).copied()
    }

    /// A call to the registry's leader.
    pub async fn call_registry(
        &self,
        from: ProcessId,
        call: RegistryCall,
        patience: Duration,
    ) -> Result<Answer, Error> {
        self.network.call(from, self.registry, call, patience).await
    }
}

/// How a run went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub settings: Settings,
    /// What must not have happened.
    pub broken: Option<String>,
    /// What the trace comes to: the same run has the same one.
    pub digest: u64,
    pub lines: u64,
    pub steps: u64,
    pub lived: Duration,
    pub figures: Figures,
    /// The end of the trace.
    pub last_lines: Vec<String>,
}

impl Outcome {
    /// For people: what broke, what happened before, and how to see it again.
    #[must_use]
    pub fn report(&self) -> String {
        let Some(broken) = &self.broken else { return format!("seed {}: nothing wrong", self.settings.seed) };
        format!("{}\n{broken}\nagain: {}\n", self.last_lines.join("\n"), self.settings.command())
    }
}

/// Lives through a run.
#[must_use]
pub fn run(settings: Settings) -> Outcome {
    let kernel = Kernel::new(settings.seed, settings.trace);
    let registry_process = kernel.process("registry");
    let scheduler_processes: Vec<ProcessId> =
        (1..=kernel.random(|random| random.below(2..4))).map(|number| kernel.process(format!("s{number}"))).collect();
    let sites: Vec<Rc<Site>> = (1..=kernel.random(|random| random.below(3..6)))
        .map(|number| Site::new(&kernel, &format!("n{number}"), offer(&kernel, number)))
        .collect();
    let world = World {
        network: Network::new(&kernel),
        checker: Rc::new(RefCell::new(Checker::new(MAX_VMS))),
        registry: registry_process,
        schedulers: scheduler_processes.into(),
        node_names: sites.iter().map(|site| site.id.to_string()).collect(),
        controls: Rc::default(),
        nodes: Rc::new(sites.iter().map(|site| (site.id.to_string(), site.process)).collect()),
        settings,
        faulty: Rc::new(Cell::new(true)),
        kernel,
    };
    let registry = Registry::start(&world);
    for scheduler in world.schedulers.iter() {
        scheduler::start(&world, &registry, *scheduler);
    }
    for site in &sites {
        host::start(&world, site);
    }
    let asked = Rc::new(Asked::default());
    clients::start(&world, &asked);
    let nemesis = faults::start(&world, &registry, &sites);

    let life = AssertUnwindSafe(|| {
        let fine = |world: &World| world.checker.borrow().broken().is_none();
        while world.kernel.steps() < settings.steps && fine(&world) && world.kernel.step() {}
        if fine(&world) {
            // Peace: what is broken is mended, users want nothing more.
            asked.closed.set(true);
            world.faulty.set(false);
            nemesis.stop();
            settle(&world);
        }
    });
    // A panic is a failure like any other: with the trace that led to it.
    if let Err(panic) = catch_unwind(life) {
        let what = panic.downcast_ref::<String>().cloned();
        let what = what.or_else(|| panic.downcast_ref::<&str>().map(|what| (*what).to_owned()));
        world.checker.borrow_mut().fail(format!("panic: {}", what.unwrap_or_default()));
    }
    outcome(&world)
}

/// A node of this world: each one a little different.
fn offer(kernel: &Kernel, number: u64) -> Offer {
    Offer {
        vcpus: 2,
        memory_mib: kernel.random(|random| *random.of(&[1280, 1536, 2048])),
        max_vms: u32::try_from(kernel.random(|random| random.below(2..6))).unwrap_or(2),
        images: vec!["default".to_owned()],
        labels: [("zone".to_owned(), if number % 2 == 1 { "a" } else { "b" }.to_owned())].into(),
    }
}

fn settle(world: &World) {
    let began = world.kernel.now();
    let last_step = world.kernel.steps() + SETTLE_STEPS;
    let mut look = began;
    while world.checker.borrow().broken().is_none() && world.kernel.step() {
        let now = world.kernel.now();
        if now < look && world.kernel.steps() < last_step {
            continue;
        }
        look = now.after(LOOK_EVERY);
        let open = world.checker.borrow().unsettled();
        if open.is_empty() {
            return;
        }
        if now.since(began) > SETTLE_WITHIN || world.kernel.steps() >= last_step {
            let open = [open, explanations(world)].concat().join("\n  ");
            let what = format!("{} s after the last fault:\n  {open}", now.since(began).as_secs());
            world.checker.borrow_mut().fail(what);
        }
    }
}

/// Why jobs wait, in the leader's words.
fn explanations(world: &World) -> Vec<String> {
    let checker = world.checker.borrow();
    let mut told = Vec::new();
    for (process, control) in world.controls.borrow().iter() {
        let control = control.borrow();
        if control.epoch().is_none() {
            continue;
        }
        for job in checker.jobs().filter(|job| !job.state.is_terminal()) {
            let why = control.explain(world.kernel.wall(*process), job.id).map(|decision| decision.summary);
            told.push(format!("{} says of job {}: {}", world.kernel.name(*process), job.id, why.unwrap_or_default()));
        }
    }
    told
}

fn outcome(world: &World) -> Outcome {
    let (digest, lines) = world.kernel.digest();
    let checker = world.checker.borrow();
    let broken = checker.broken().map(str::to_owned);
    let last_lines = if broken.is_some() { world.kernel.last_lines() } else { vec![] };
    Outcome {
        settings: world.settings,
        broken,
        digest,
        lines,
        steps: world.kernel.steps(),
        lived: world.kernel.now().since(Instant::default()),
        figures: checker.figures(),
        last_lines,
    }
}

/// The weather while faults happen.
#[must_use]
pub fn usual_weather() -> Weather {
    Weather { lost: 3, twice: 8, slow: 5 }
}
