//! All decisions under random interleavings: a registry with compare-and-set, vmhosts that boot, run and die, answers in any
//! order, nodes that are cordoned, drained and lost, schedulers that lose the lead and get it back.

use std::{collections::VecDeque, time::Duration};

use blixard::{
    job::{Dependency, DependencyCondition, TENANT_LABEL},
    volume::{Source, Volume},
};
use proptest::prelude::*;

use super::*;

mod late_news;

const NODES: u8 = 3;
const TENANT_LIMIT: u32 = 2;

fn named(number: u8) -> NodeId {
    NodeId::parse("node", &format!("n{number}")).expect("a valid name")
}

/// Registry and vmhosts, reduced to their contracts.
struct World {
    engine: Engine,
    now: Timestamp,
    revision: u64,
    nodes: BTreeMap<NodeId, Node>,
    vms: BTreeMap<VmId, Vm>,
    jobs: BTreeMap<JobId, Job>,
    events: VecDeque<Input>,
    effects: Vec<Effect>,
    /// Attempts that vmhosts run.
    running: BTreeMap<VmId, (JobId, u32)>,
    /// Those that they have killed, and not reported.
    killed: Vec<(VmId, (JobId, u32))>,
    started: BTreeSet<VmId>,
    /// Since when nodes are Lost.
    lost_since: BTreeMap<NodeId, Timestamp>,
    next_vm: u128,
    settings: Settings,
    epoch: u64,
    /// Jobs in the order in which they were first given a VM.
    first_assigned: Vec<JobId>,
}

impl World {
    fn new(settings: Settings) -> Self {
        let nodes = (1..=NODES).map(|number| (named(number), with_disks(number))).collect();
        let mut world = Self {
            engine: Engine::new(settings.clone()),
            now: Timestamp(0),
            revision: 1,
            nodes,
            vms: BTreeMap::new(),
            jobs: BTreeMap::new(),
            events: VecDeque::new(),
            effects: Vec::new(),
            running: BTreeMap::new(),
            killed: Vec::new(),
            started: BTreeSet::new(),
            lost_since: BTreeMap::new(),
            next_vm: 1000,
            settings,
            epoch: 0,
            first_assigned: Vec::new(),
        };
        world.restart();
        world
    }

    fn feed(&mut self, input: Input) {
        let effects = self.engine.step(self.now, input);
        for (job_id, ..) in assignments(&effects) {
            if !self.first_assigned.contains(&job_id) {
                self.first_assigned.push(job_id);
            }
        }
        self.effects.extend(effects);
        assert_eq!(self.engine.broken_invariant(), None);
    }

    /// The scheduler dies and comes back: what was under way is forgotten, what is on record is listed.
    fn restart(&mut self) {
        self.engine = Engine::new(self.settings.clone());
        self.effects.clear();
        self.events.clear();
        let nodes = self.nodes.values().cloned().collect();
        let vms = self.vms.values().filter(|vm| !vm.state.is_terminal()).cloned().collect();
        let jobs = self.jobs.values().filter(|job| !job.state.is_terminal()).cloned().collect();
        self.epoch += 1;
        if self.epoch.is_multiple_of(2) {
            self.feed(Input::Lead(Some(self.epoch)));
            self.feed(Input::Snapshot { nodes, vms, jobs });
        } else {
            self.feed(Input::Snapshot { nodes, vms, jobs });
            assert!(self.effects.is_empty(), "without the lead nothing is done");
            self.feed(Input::Lead(Some(self.epoch)));
        }
    }

    /// The lead is lost and comes back: the old epoch's calls are refused, and the watch went on.
    fn change_lead(&mut self) {
        self.feed(Input::Lead(None));
        self.effects.clear();
        self.epoch += 1;
        self.feed(Input::Lead(Some(self.epoch)));
    }

    fn put_node(&mut self, id: &NodeId, change: impl FnOnce(&mut Node)) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        change(node);
        self.revision += 1;
        (node.revision, node.updated_at) = (self.revision, self.now);
        self.events.push_back(Input::Node(node.clone()));
    }

    fn put_vm(&mut self, id: VmId, change: impl FnOnce(&mut Vm)) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        change(vm);
        self.revision += 1;
        (vm.revision, vm.updated_at) = (self.revision, self.now);
        self.events.push_back(Input::Vm(vm.clone()));
        let live = || self.vms.values().filter(|vm| !vm.state.is_terminal());
        assert!(live().count() <= self.settings.max_vms as usize, "{} VMs live", live().count());
        for node in self.nodes.values() {
            let here = || live().filter(|vm| vm.node_id == node.id);
            let memory: u64 = here().map(|vm| u64::from(vm.config.memory_mib)).sum();
            assert!(
                memory <= node.memory_mib && here().count() <= node.max_vms as usize,
                "{} is over its capacity",
                node.id
            );
        }
    }

    fn put_job(&mut self, id: JobId, change: impl FnOnce(&mut Job)) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        change(job);
        self.revision += 1;
        job.revision = self.revision;
        self.events.push_back(Input::Job(job.clone()));
    }

    fn transition(&mut self, id: VmId, to: VmState) -> bool {
        let legal = self.vms.get(&id).is_some_and(|vm| vm.state.may_go_to(to, vm.config.kind));
        if legal {
            self.put_vm(id, |vm| vm.state = to);
        }
        legal
    }

    fn finish(&mut self, id: JobId, attempt: u32, to: JobState) {
        let Some(job) = self.jobs.get(&id) else { return };
        if job.attempt != attempt || !matches!(job.state, JobState::Assigned | JobState::Running) {
            return;
        }
        let vm_id = job.vm_id.expect("assigned");
        let now = self.now;
        self.put_job(id, |job| {
            // Free to try again while attempts are left, after a pause.
            let again = to == JobState::Failed && job.attempts_started < job.spec.max_attempts && !job.cancel_requested;
            job.state = if again { JobState::Queued } else { to };
            if job.state == JobState::Queued {
                job.queued_at = now;
                job.not_before = again.then(|| Timestamp(now.0 + 1000));
            }
        });
        let vm = &self.vms[&vm_id];
        if vm.state == VmState::Busy {
            let next = if vm.config.kind == VmKind::Service { VmState::Idle } else { VmState::Draining };
            self.put_vm(vm_id, |vm| (vm.state, vm.job_id) = (next, None));
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::CreateVm { ticket, vm_id: _, config, node_id } => {
                assert_eq!(self.engine.nodes()[&node_id].node.images, config_images(&config));
                let id = vm_id(self.next_vm);
                self.next_vm += 1;
                let mut new = vm(0, 0, config.kind, VmState::Starting);
                (new.id, new.config, new.node_id, new.created_at) = (id, config, node_id, self.now);
                self.vms.insert(id, new);
                self.put_vm(id, |_| {});
                let result = Ok(self.vms[&id].clone());
                self.feed(Input::Created { ticket, result });
            }
            Effect::Assign { job_id, vm_id, attempt, decision } => {
                assert!(!decision.summary.is_empty());
                let result = self.assign(job_id, vm_id, attempt);
                self.feed(Input::Assigned { job_id, vm_id, result });
            }
            Effect::FailJob { job_id, timed_out, .. } => {
                if self.jobs[&job_id].state == JobState::Queued {
                    let to = if timed_out { JobState::TimedOut } else { JobState::Failed };
                    self.put_job(job_id, |job| job.state = to);
                }
            }
            Effect::LoseAttempt { lost: Some(lost), .. } | Effect::FailVm { lost: Some(lost), .. }
                if !self.is_over(&lost) => {}
            Effect::LoseAttempt { job_id, attempt, started, .. } => {
                let to = if started { JobState::Failed } else { JobState::Queued };
                self.finish(job_id, attempt, to);
            }
            Effect::FailVm { vm_id, .. } => {
                self.running.remove(&vm_id);
                self.transition(vm_id, VmState::Failed);
            }
            Effect::DrainVm { vm_id, .. } => drop(self.transition(vm_id, VmState::Draining)),
            Effect::RefuseVm { .. } => {}
            Effect::LookUpJob { job_id } => match self.jobs.get(&job_id).cloned() {
                Some(job) => self.feed(Input::Job(job)),
                None => self.feed(Input::JobGone(job_id)),
            },
            Effect::Tell { node_id, order } => {
                let key = order.key();
                let result = if self.nodes[&node_id].state == NodeState::Lost {
                    Err(Error::new(Reason::PeerUnavailable, "away"))
                } else {
                    self.obey(order);
                    Ok(())
                };
                self.feed(Input::Told { order: key, result });
            }
        }
    }

    /// What the registry asks before it lets go what was on a node.
    fn is_over(&self, lost: &LostNode) -> bool {
        let node = &self.nodes[&lost.node_id];
        node.state == NodeState::Lost && node.incarnation == lost.incarnation
    }

    fn assign(&mut self, job_id: JobId, vm_id: VmId, attempt: u32) -> Result<Job, Error> {
        let job = &self.jobs[&job_id];
        if job.state != JobState::Queued || job.attempt + 1 != attempt || !self.vms[&vm_id].state.takes_jobs() {
            return Err(Error::new(Reason::StaleAttempt, "refused"));
        }
        assert!(job.not_before.is_none_or(|at| at <= self.now), "assigned within its pause");
        for dependency in &job.spec.depends_on {
            let state = self.jobs[&dependency.job_id].state;
            assert!(state.is_terminal(), "{job_id} was assigned before what it depends on had ended");
            assert!(dependency.condition == DependencyCondition::Ended || state == JobState::Succeeded);
        }
        assert_eq!(job.spec.volumes, self.vms[&vm_id].config.volumes, "{job_id} was given another's disks");
        let tenant = job.spec.labels.get(TENANT_LABEL).cloned();
        let same = |other: &&Job| other.spec.labels.get(TENANT_LABEL) == tenant.as_ref();
        let busy = |other: &&Job| matches!(other.state, JobState::Assigned | JobState::Running);
        let has = self.jobs.values().filter(same).filter(busy).count();
        assert!(has < TENANT_LIMIT as usize, "tenant {tenant:?} has {has} jobs already");
        let node_id = self.vms[&vm_id].node_id.clone();
        self.put_job(job_id, |job| {
            (job.state, job.attempt, job.vm_id, job.node_id) =
                (JobState::Assigned, attempt, Some(vm_id), Some(node_id));
            job.not_before = None;
        });
        self.put_vm(vm_id, |vm| {
            (vm.state, vm.job_id, vm.jobs_assigned) = (VmState::Busy, Some(job_id), vm.jobs_assigned + 1);
        });
        Ok(self.jobs[&job_id].clone())
    }

    fn obey(&mut self, order: Order) {
        match order {
            // One that has booted is not booted again.
            Order::Start { vm_id, .. } if self.vms[&vm_id].state == VmState::Starting => {
                self.started.insert(vm_id);
            }
            Order::Start { .. } => {}
            Order::Stop { vm_id, .. } => self.end(vm_id, VmState::Terminated),
            Order::Run(job) => {
                let vm_id = job.vm_id.expect("assigned");
                let (id, attempt) = (job.id, job.attempt);
                let current = self.jobs[&id].attempt == attempt && self.jobs[&id].state == JobState::Assigned;
                // A node has no VM that has ended.
                let lives = !self.vms[&vm_id].state.is_terminal();
                if current && lives && !self.running.contains_key(&vm_id) {
                    let twice = self.running.values().any(|(other, _)| *other == id);
                    assert!(!twice, "two live attempts of {id}");
                    self.running.insert(vm_id, (id, attempt));
                    self.put_job(id, |job| {
                        (job.state, job.attempts_started) = (JobState::Running, job.attempts_started + 1)
                    });
                }
            }
            Order::Cancel { job_id, attempt } => {
                self.running.retain(|_, running| *running != (job_id, attempt));
                self.finish(job_id, attempt, JobState::Cancelled);
            }
        }
    }

    /// The vmhost reports the attempt first, then the VM.
    fn end(&mut self, vm_id: VmId, to: VmState) {
        let held = self.running.remove(&vm_id);
        let assigned = self.vms.get(&vm_id).and_then(|vm| vm.job_id).map(|job_id| (job_id, self.jobs[&job_id].attempt));
        if let Some((job_id, attempt)) = held.or(assigned) {
            let to = if held.is_some() { JobState::Failed } else { JobState::Queued };
            self.finish(job_id, attempt, to);
        }
        if !self.transition(vm_id, to) {
            self.transition(vm_id, VmState::Failed);
        }
    }

    fn is_lost(&self, vm_id: VmId) -> bool {
        self.vms.get(&vm_id).is_some_and(|vm| self.nodes[&vm.node_id].state == NodeState::Lost)
    }

    /// A user has a VM that is up resized. Not to more memory: what its node would turn away then is not tried here.
    fn resize(&mut self, choice: usize) {
        let up: Vec<_> = self.vms.values().filter(|vm| vm.state.is_running()).map(|vm| vm.id).collect();
        let Some(&id) = up.get(choice % up.len().max(1)) else { return };
        let vcpus = u32::try_from(choice / 5 % 4).expect("small") + 1;
        self.put_vm(id, |vm| {
            let memory_mib =
                if choice.is_multiple_of(2) { vm.config.memory_mib } else { vm.config.memory_mib.min(384) };
            (vm.config.vcpus, vm.config.memory_mib) = (vcpus, memory_mib);
        });
    }

    fn change_node(&mut self, choice: usize) {
        let id = named(u8::try_from(choice % usize::from(NODES)).expect("small") + 1);
        self.leases_end();
        let (was, now) = (self.nodes[&id].state, self.now);
        let to = NodeState::ALL[choice / 3 % 4];
        if to != NodeState::Lost {
            self.lost_since.remove(&id);
        } else {
            self.lost_since.entry(id.clone()).or_insert(now);
        }
        self.put_node(&id, |node| {
            node.state = to;
            node.drain_deadline = (to == NodeState::Draining).then(|| Timestamp(now.0 + 5000));
            if was == NodeState::Lost && to != NodeState::Lost {
                node.incarnation += 1;
            }
        });
    }

    /// A vmhost that is not heard kills what it runs when its lease is over.
    fn leases_end(&mut self) {
        let over = |world: &Self, vm_id: &VmId| {
            let since = world.vms.get(vm_id).and_then(|vm| world.lost_since.get(&vm.node_id));
            since.is_some_and(|since| world.now.since(*since) >= Duration::from_secs(30))
        };
        let killed: Vec<_> = self.running.keys().copied().filter(|vm_id| over(self, vm_id)).collect();
        for vm_id in killed {
            self.killed.extend(self.running.remove(&vm_id).map(|attempt| (vm_id, attempt)));
        }
        // What it killed it reports as soon as it is heard again.
        for (vm_id, (job_id, attempt)) in std::mem::take(&mut self.killed) {
            if self.is_lost(vm_id) {
                self.killed.push((vm_id, (job_id, attempt)));
            } else {
                self.finish(job_id, attempt, JobState::Failed);
                self.transition(vm_id, VmState::Failed);
            }
        }
    }

    /// One thing happens; `choice` says which. False when there was nothing to do.
    fn happen(&mut self, kind: u8, choice: usize) -> bool {
        self.leases_end();
        match kind {
            0..=2 => self.events.pop_front().map(|event| self.feed(event)).is_some(),
            3..=5 if !self.effects.is_empty() => {
                let effect = self.effects.remove(choice % self.effects.len());
                self.perform(effect);
                true
            }
            6 => {
                let booting: Vec<_> = self.started.iter().copied().filter(|id| !self.is_lost(*id)).collect();
                let Some(&vm_id) = booting.get(choice % booting.len().max(1)) else { return false };
                self.started.remove(&vm_id);
                let to = if choice.is_multiple_of(5) { VmState::Failed } else { VmState::Ready };
                self.transition(vm_id, to)
            }
            7 | 8 => {
                let held: Vec<_> =
                    self.running.iter().map(|(vm, job)| (*vm, *job)).filter(|(vm, _)| !self.is_lost(*vm)).collect();
                let Some(&(vm_id, (job_id, attempt))) = held.get(choice % held.len().max(1)) else { return false };
                if choice.is_multiple_of(7) {
                    self.end(vm_id, VmState::Failed);
                } else {
                    self.running.remove(&vm_id);
                    let to = if choice.is_multiple_of(3) { JobState::Failed } else { JobState::Succeeded };
                    self.finish(job_id, attempt, to);
                }
                true
            }
            _ => match self.engine.next_wake() {
                Some(at) => {
                    self.now = at.max(self.now);
                    self.feed(Input::Tick);
                    true
                }
                None => false,
            },
        }
    }

    fn settle(&mut self) {
        self.leases_end();
        self.lost_since.clear();
        for number in 1..=NODES {
            self.put_node(&named(number), |node| {
                (node.state, node.drain_deadline, node.incarnation) = (NodeState::Ready, None, node.incarnation + 1);
            });
        }
        for round in 0..3000usize {
            // Many boots succeed here, so that every job can end.
            let idle = !(0..=9).any(|kind| self.happen(kind, round * 5 + 1));
            if idle && self.effects.is_empty() && self.events.is_empty() && self.started.is_empty() {
                return;
            }
        }
        panic!("the world never comes to rest:\n{}", self.describe());
    }

    fn describe(&self) -> String {
        let jobs = self.jobs.values().map(|job| {
            format!("{} {} on {:?}, waits for {:?}", job.id, job.state, job.vm_id, self.engine.waits_for(job.id))
        });
        let vms = self.vms.values().filter(|vm| !vm.state.is_terminal()).map(|vm| {
            format!("VM {} {} {} on {} {:?}", vm.id, vm.config.kind, vm.state, vm.node_id, self.engine.vms.get(&vm.id))
        });
        let more = [format!(
            "now {:?}, wake {:?}, effects {:?}, started {:?}",
            self.now, self.engine.wakes, self.effects, self.started
        )];
        jobs.chain(vms).chain(more).collect::<Vec<_>>().join("\n")
    }
}

fn with_disks(number: u8) -> Node {
    Node { id: named(number), scratch_mib: 1000, volumes: vec!["tools".into()], ..node(1, 1) }
}

fn config_images(config: &VmConfig) -> Vec<String> {
    vec![config.image.clone()]
}

/// What a job is like, and whether it is cancelled.
type Plan = (u8, i32, u8, u8, bool);

fn planned(number: usize, (isolation, priority, tenant, kind, _): Plan) -> JobSpec {
    spec(|spec| {
        spec.isolation = [Isolation::Maximum, Isolation::Standard, Isolation::Minimal][usize::from(isolation)];
        spec.priority = priority;
        spec.labels.insert(TENANT_LABEL.to_owned(), format!("t{tenant}"));
        spec.max_attempts = 2;
        if kind == 1 && number > 0 {
            let condition = if tenant == 0 { DependencyCondition::Succeeded } else { DependencyCondition::Ended };
            spec.depends_on = vec![Dependency { job_id: job_id(number as u128), condition }];
        }
        if kind == 2 {
            spec.queue_timeout = Some(Duration::from_secs(2));
        }
        if kind == 3 {
            spec.memory_mib = 1500;
        }
        if kind == 4 {
            let source = if spec.isolation == Isolation::Minimal {
                Source::Name("tools".to_owned())
            } else {
                Source::ScratchMib(64)
            };
            spec.volumes = [Volume { mount_path: "/disk".to_owned(), source }].into_iter().collect();
        }
    })
}

/// Submits the plans and lets happen what the steps say, then all that is left, and looks at where everything has come to.
fn play(plans: &[Plan], steps: Vec<(u8, usize)>, pre_warm: u32, recycle_after_jobs: u32) -> Result<(), TestCaseError> {
    let settings = Settings {
        max_vms: 4,
        tenant_max_jobs: TENANT_LIMIT,
        pre_warm: warm(pre_warm),
        recycle_after_jobs,
        ..settings()
    };
    let mut world = World::new(settings);
    let mut waiting: VecDeque<_> = plans.iter().copied().enumerate().collect();
    for (kind, choice) in steps {
        match kind {
            10 => {
                if let Some((number, plan)) = waiting.pop_front() {
                    let id = number as u128 + 1;
                    let job =
                        Job { queued_at: world.now, created_at: world.now, ..queued(id, 0, planned(number, plan)) };
                    world.jobs.insert(job_id(id), job);
                    world.put_job(job_id(id), |job| job.cancel_requested = plan.4 && choice % 2 == 0);
                }
            }
            11 if choice % 10 == 0 => world.restart(),
            11 if choice % 10 == 1 => world.change_lead(),
            12 if choice % 4 == 0 => world.change_node(choice / 4),
            13 if choice % 2 == 0 => world.resize(choice / 2),
            kind => drop(world.happen(kind, choice)),
        }
    }
    world.settle();
    prop_assert!(world.jobs.values().all(|job| job.state.is_terminal()), "{}", world.describe());
    prop_assert!(world.running.is_empty());
    // No VM is forgotten: what lives is known, and free or kept warm.
    let live = world.vms.values().filter(|vm| !vm.state.is_terminal());
    for vm in live {
        let kept = vm.config.kind == VmKind::Service && vm.state.takes_jobs() && world.engine.vms.contains_key(&vm.id);
        prop_assert!(
            kept,
            "nobody looks after VM {}:
{}",
            vm.id,
            world.describe()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_order_of_events_every_job_ends_and_no_limit_is_broken(
        plans in prop::collection::vec((0u8..3, -1i32..2, 0u8..2, 0u8..5, any::<bool>()), 1..12),
        steps in prop::collection::vec((0u8..14, 0usize..1000), 0..300),
        pre_warm in 0u32..2,
        recycle_after_jobs in 0u32..3,
    ) {
        play(&plans, steps, pre_warm, recycle_after_jobs)?;
    }

    /// One shape, one tenant, one priority: in the order of submission, whatever happens to VMs.
    #[test]
    fn jobs_alike_are_first_assigned_in_the_order_of_submission(
        count in 1usize..10,
        steps in prop::collection::vec((0u8..11, 0usize..1000), 0..200),
    ) {
        let mut world = World::new(Settings { max_vms: 2, tenant_max_jobs: 0, ..settings() });
        let mut next = 0;
        for (kind, choice) in steps {
            if kind == 10 && next < count {
                next += 1;
                let id = job_id(next as u128 ^ 5);
                let job = Job { queued_at: world.now, ..queued(next as u128 ^ 5, 0, spec(|s| s.isolation = Isolation::Minimal)) };
                world.jobs.insert(id, job);
                world.put_job(id, |_| {});
            } else {
                // Assignments are carried out in the order in which they were decided.
                world.happen(kind, if (3..=5).contains(&kind) { 0 } else { choice });
            }
        }
        world.settle();
        let order: Vec<_> = (1..=next).map(|number| job_id(number as u128 ^ 5)).collect();
        let expected: Vec<_> = order.into_iter().filter(|id| world.first_assigned.contains(id)).collect();
        prop_assert_eq!(&world.first_assigned, &expected);
    }
}
