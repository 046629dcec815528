//! What befalls the world: processes are killed and stopped, hosts lose power, VMs die, the network parts, the registry fails
//! over, disks get slow and clocks jump. Each fault ends by itself; [`Nemesis::stop`] ends all.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use crate::{
    host::{self, Site},
    kernel::ProcessId,
    network::Weather,
    random::Random,
    registry::Registry,
    scheduler,
    world::{World, usual_weather},
};

/// Who brings the faults.
#[derive(Clone)]
pub struct Nemesis(Rc<Inner>);

/// How a fault that lasts is ended.
type End = Box<dyn FnOnce(&Inner)>;

struct Inner {
    world: World,
    registry: Rc<Registry>,
    sites: Vec<Rc<Site>>,
    /// What this world's faults are drawn from.
    deck: Vec<Fault>,
    stopped: Cell<bool>,
    /// Faults that last, and how each is ended.
    lasting: RefCell<BTreeMap<u64, End>>,
    next: Cell<u64>,
}

/// What can befall a world.
#[derive(Debug, Clone, Copy)]
enum Fault {
    KillScheduler,
    KillVmhost,
    CutPower,
    Freeze,
    Part,
    Isolate,
    FailOver,
    SlowDisk,
    JumpClock,
    KillMachine,
    Storm,
}

impl Fault {
    /// How often each is drawn, usually.
    const USUAL: [(Self, u64); 11] = [
        (Self::KillScheduler, 14),
        (Self::KillVmhost, 14),
        (Self::CutPower, 5),
        (Self::Freeze, 14),
        (Self::Part, 14),
        (Self::Isolate, 8),
        (Self::FailOver, 9),
        (Self::SlowDisk, 7),
        (Self::JumpClock, 6),
        (Self::KillMachine, 7),
        (Self::Storm, 4),
    ];

    /// The faults of one world, to be drawn from: each world has its own troubles, and is spared others. Where everything
    /// happens, one fault often ends what another has begun.
    fn deck(random: &mut Random) -> Vec<Self> {
        let mut deck = Vec::new();
        for (fault, often) in Self::USUAL {
            let often = often * *random.of(&[0, 1, 1, 1, 4]);
            deck.extend((0..often).map(|_| fault));
        }
        if deck.is_empty() { vec![Self::Part] } else { deck }
    }
}

/// Starts them.
pub fn start(world: &World, registry: &Rc<Registry>, sites: &[Rc<Site>]) -> Nemesis {
    let process = world.kernel.process("nemesis");
    world.network.set_weather(usual_weather());
    let inner = Rc::new(Inner {
        world: world.clone(),
        registry: Rc::clone(registry),
        sites: sites.to_vec(),
        deck: world.kernel.random(Fault::deck),
        stopped: Cell::default(),
        lasting: RefCell::default(),
        next: Cell::default(),
    });
    let living = Rc::clone(&inner);
    // Some worlds are rougher than others.
    let usual_pause = world.kernel.random(|random| *random.of(&[3_000, 10_000, 30_000]));
    world.kernel.spawn(process, async move {
        loop {
            let pause = living.random(|random| random.below(0..usual_pause * 2));
            living.world.kernel.sleep(Duration::from_millis(pause)).await;
            if living.stopped.get() {
                return;
            }
            Inner::strike(&living);
        }
    });
    Nemesis(inner)
}

impl Nemesis {
    /// Ends every fault, for good.
    pub fn stop(&self) {
        self.0.stopped.set(true);
        let lasting = std::mem::take(&mut *self.0.lasting.borrow_mut());
        for end in lasting.into_values() {
            end(&self.0);
        }
        self.0.world.network.set_weather(Weather::FAIR);
        self.0.world.kernel.trace(format_args!("the faults are over"));
    }
}

impl Inner {
    fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        self.world.kernel.random(draw)
    }

    /// Lets something last for a while.
    fn last(self: &Rc<Self>, duration: Duration, end: impl FnOnce(&Self) + 'static) {
        let key = self.next.get();
        self.next.set(key + 1);
        self.lasting.borrow_mut().insert(key, Box::new(end));
        let this = Rc::clone(self);
        self.world.kernel.at(self.world.kernel.now().after(duration), move |_| {
            let end = this.lasting.borrow_mut().remove(&key);
            if let Some(end) = end {
                end(&this);
            }
        });
    }

    fn a_while(&self, most_ms: u64) -> Duration {
        // Mostly a moment, or long enough for leases to end and others to take over.
        let most = most_ms.min(90_000);
        let draw = |random: &mut Random| {
            if random.per_mille(500) { random.skewed(10..most_ms) } else { random.below(most / 10..most) }
        };
        Duration::from_millis(self.random(draw))
    }

    fn a_site(&self) -> Rc<Site> {
        self.random(|random| Rc::clone(random.of(&self.sites)))
    }

    fn a_scheduler(&self) -> ProcessId {
        self.random(|random| *random.of(&self.world.schedulers))
    }

    fn a_process(&self) -> ProcessId {
        if self.random(|random| random.per_mille(500)) { self.a_scheduler() } else { self.a_site().process }
    }

    fn strike(self: &Rc<Self>) {
        match self.random(|random| *random.of(&self.deck)) {
            Fault::KillScheduler => self.kill_scheduler(),
            Fault::KillVmhost => self.kill_vmhost(),
            Fault::CutPower => self.cut_power(),
            Fault::Freeze => self.freeze(),
            Fault::Part => self.part(),
            Fault::Isolate => self.isolate(),
            Fault::FailOver => self.fail_over(),
            Fault::SlowDisk => self.slow_disk(),
            Fault::JumpClock => self.jump_clock(),
            Fault::KillMachine => self.kill_machine(),
            Fault::Storm => self.storm(),
        }
    }

    fn note(&self, what: &str) {
        self.world.kernel.trace(format_args!("FAULT {what}"));
    }

    fn kill_scheduler(self: &Rc<Self>) {
        let scheduler = self.a_scheduler();
        let down = self.a_while(60_000);
        self.note(&format!("{} is killed for {down:?}", self.world.kernel.name(scheduler)));
        self.world.network.close(scheduler);
        self.world.kernel.kill(scheduler);
        self.last(down, move |this| {
            if !this.world.kernel.lives(scheduler) {
                scheduler::start(&this.world, &this.registry, scheduler);
            }
        });
    }

    fn kill_vmhost(self: &Rc<Self>) {
        let site = self.a_site();
        let down = self.a_while(120_000);
        self.note(&format!("the vmhost of {} is killed for {down:?}", site.id));
        site.kill_vmhost(&self.world);
        self.last(down, move |this| this.start_vmhost(&site));
    }

    fn start_vmhost(&self, site: &Rc<Site>) {
        if !self.world.kernel.lives(site.process) {
            host::start(&self.world, site);
        }
    }

    fn cut_power(self: &Rc<Self>) {
        let site = self.a_site();
        let down = self.a_while(200_000);
        self.note(&format!("{} loses power for {down:?}", site.id));
        site.lose_power(&self.world);
        self.last(down, move |this| this.start_vmhost(&site));
    }

    fn freeze(self: &Rc<Self>) {
        let process = self.a_process();
        let stopped = self.a_while(120_000);
        self.note(&format!("{} is stopped for {stopped:?}", self.world.kernel.name(process)));
        self.world.kernel.freeze(process, true);
        self.last(stopped, move |this| this.world.kernel.freeze(process, false));
    }

    /// Cuts one off from another, from the registry or from all, in one direction or both.
    fn part(self: &Rc<Self>) {
        let one = self.a_process();
        let others: Vec<ProcessId> = match self.random(|random| random.below(0..3)) {
            0 => vec![self.world.registry],
            1 => vec![self.a_process()],
            _ => self.everybody(),
        };
        let ways = self.random(|random| random.below(1..4));
        let lasts = self.a_while(150_000);
        let name = |process: &ProcessId| self.world.kernel.name(*process);
        let names: Vec<String> = others.iter().map(name).collect();
        self.note(&format!("{} is cut off from {} for {lasts:?}, ways {ways}", name(&one), names.join(" ")));
        let pairs: Vec<(ProcessId, ProcessId)> = others
            .into_iter()
            .filter(|other| *other != one)
            .flat_map(|other| {
                let there = (ways & 1 > 0).then_some((one, other));
                there.into_iter().chain((ways & 2 > 0).then_some((other, one)))
            })
            .collect();
        for (from, to) in &pairs {
            self.world.network.cut(*from, *to);
        }
        self.last(lasts, move |this| {
            for (from, to) in pairs {
                this.world.network.mend(from, to);
            }
        });
    }

    /// Cuts a node off from the registry, or from all, for so long that it is given up.
    fn isolate(self: &Rc<Self>) {
        let site = self.a_site();
        let others =
            if self.random(|random| random.per_mille(500)) { self.everybody() } else { vec![self.world.registry] };
        let lasts = Duration::from_millis(self.random(|random| random.below(20_000..100_000)));
        self.note(&format!("{} is isolated from {} others for {lasts:?}", site.id, others.len()));
        for other in &others {
            self.world.network.cut(site.process, *other);
            self.world.network.cut(*other, site.process);
        }
        self.last(lasts, move |this| {
            for other in others {
                this.world.network.mend(site.process, other);
                this.world.network.mend(other, site.process);
            }
        });
    }

    fn everybody(&self) -> Vec<ProcessId> {
        let sites = self.sites.iter().map(|site| site.process);
        sites.chain(self.world.schedulers.iter().copied()).chain([self.world.registry]).collect()
    }

    fn fail_over(self: &Rc<Self>) {
        let away = self.a_while(20_000);
        self.note(&format!("the registry fails over for {away:?}"));
        self.registry.go_away();
        self.last(away, |this| this.registry.come_back());
    }

    fn slow_disk(self: &Rc<Self>) {
        let until = self.world.kernel.now().after(self.a_while(60_000));
        if self.random(|random| random.per_mille(300)) {
            self.note(&format!("the registry's disk is slow until {until}"));
            self.registry.slow_down(until);
        } else {
            let site = self.a_site();
            self.note(&format!("the disk of {} is slow until {until}", site.id));
            site.disk().slow_down(until);
        }
    }

    fn jump_clock(self: &Rc<Self>) {
        let process = if self.random(|random| random.per_mille(200)) { self.world.registry } else { self.a_process() };
        // Mostly what NTP leaves, now and then what an operator does.
        let most = self.random(|random| *random.of(&[300, 300, 5_000, 600_000]));
        let error = self.random(|random| random.below(0..2 * most)).cast_signed() - most.cast_signed();
        self.note(&format!("the clock of {} is off by {error} ms", self.world.kernel.name(process)));
        self.world.kernel.set_clock(process, error);
        self.last(Duration::from_secs(300), move |this| this.world.kernel.set_clock(process, 0));
    }

    fn kill_machine(self: &Rc<Self>) {
        let living = self.a_site().living();
        if let Some(machine) = (!living.is_empty()).then(|| self.random(|random| Rc::clone(random.of(&living)))) {
            self.note(&format!("VM {} dies", machine.vm));
            machine.die("it panicked");
        }
    }

    fn storm(self: &Rc<Self>) {
        let lasts = self.a_while(30_000);
        self.note(&format!("the network is bad for {lasts:?}"));
        self.world.network.set_weather(Weather { lost: 120, twice: 50, slow: 200 });
        self.last(lasts, |this| {
            if !this.stopped.get() {
                this.world.network.set_weather(usual_weather());
            }
        });
    }
}
