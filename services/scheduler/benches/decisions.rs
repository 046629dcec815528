//! What one step of the engine costs, small and large, and what a job and a VM cost in memory.
//!
//! ```text
//! cargo bench -p blixard-scheduler --bench decisions
//! ```
//! Prints a table and writes `target/bench/decisions.json`. Two clusters, full and with a long queue: 10 nodes, 1,000 VMs and
//! 10,000 queued jobs; 1,000 nodes, 100,000 VMs and 1,000,000 queued jobs (20 shapes, 50 tenants in both). Each is fed the same
//! mixture: jobs submitted, jobs that finish, the VMs that this frees and the assignments that follow, nodes that change. What
//! is timed is each `step` by itself, the ticks that it asks for included.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::Path,
    time::{Duration, Instant},
};

use blixard::{
    config::Config,
    id::{JobId, NodeId, VmId},
    job::{Isolation, Job, JobSpec, JobState, TENANT_LABEL},
    node::{Node, NodeState},
    pb::common::v1 as pb,
    time::Timestamp,
    vm::{Defaults, Vm, VmConfig, VmKind, VmState},
};
use blixard_scheduler::engine::{Effect, Engine, Input, OWNER, OWNER_LABEL, Order, Settings};
use uuid::Uuid;

fn main() -> anyhow::Result<()> {
    let mut report = String::from("{\n");
    println!("{:<34} {:>8} {:>8} {:>8} {:>9}", "step", "n", "p50 µs", "p99 µs", "max µs");
    let mut medians = Vec::new();
    for size in [Size { nodes: 10, vms: 1_000, jobs: 10_000 }, Size { nodes: 1_000, vms: 100_000, jobs: 1_000_000 }] {
        let mut cluster = Cluster::new(size);
        let costs = cluster.measure(60_000);
        for (name, mut times) in costs {
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
            let title = format!("{name}, {} nodes", size.nodes);
            println!("{title:<34} {:>8} {:>8.1} {:>8.1} {:>9.1}", times.len(), at(0.5), at(0.99), at(1.0));
            report += &format!("  \"{name}_{}_nodes_p50_us\": {:.2},\n", size.nodes, at(0.5));
            report += &format!("  \"{name}_{}_nodes_p99_us\": {:.2},\n", size.nodes, at(0.99));
            if name == "all" {
                medians.push((at(0.5), at(0.99)));
            }
        }
        println!(
            "    {} bytes a queued job, {} a VM; snapshot and lead {:.2} s",
            cluster.bytes_per_job,
            cluster.bytes_per_vm,
            cluster.loading.as_secs_f64()
        );
        report += &format!("  \"bytes_per_job_{}_nodes\": {},\n", size.nodes, cluster.bytes_per_job);
        report += &format!("  \"bytes_per_vm_{}_nodes\": {},\n", size.nodes, cluster.bytes_per_vm);
    }
    let (small, large) = (medians[0], medians[1]);
    println!("large / small: p50 {:.2}, p99 {:.2}", large.0 / small.0, large.1 / small.1);
    report += &format!("  \"p50_ratio\": {:.3},\n  \"p99_ratio\": {:.3}\n}}\n", large.0 / small.0, large.1 / small.1);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("decisions.json"), report)?;
    Ok(())
}

#[derive(Clone, Copy)]
struct Size {
    nodes: usize,
    vms: usize,
    jobs: usize,
}

const SHAPES: u128 = 20;
const TENANTS: u128 = 50;
const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512 };

/// The engine, and a registry and vmhosts that do at once whatever it asks for.
struct Cluster {
    engine: Engine,
    size: Size,
    now: Timestamp,
    revision: u64,
    specs: Vec<JobSpec>,
    vms: BTreeMap<VmId, (VmConfig, NodeId)>,
    running: Vec<(JobId, VmId)>,
    next_job: u128,
    next_vm: u128,
    seed: u64,
    pending: VecDeque<Effect>,
    costs: BTreeMap<&'static str, Vec<Duration>>,
    bytes_per_job: usize,
    bytes_per_vm: usize,
    loading: Duration,
}

impl Cluster {
    fn new(size: Size) -> Self {
        let count = u32::try_from(size.vms).unwrap_or(u32::MAX);
        let settings = Settings { max_vms: count, defaults: DEFAULTS, ..Settings::from(&Config::default()) };
        let mut cluster = Self {
            engine: Engine::new(settings),
            size,
            now: Timestamp(1_000_000),
            revision: 0,
            specs: (0..SHAPES * TENANTS).map(spec).collect(),
            vms: BTreeMap::new(),
            running: Vec::new(),
            next_job: 0,
            next_vm: 0,
            seed: 7,
            pending: VecDeque::new(),
            costs: BTreeMap::new(),
            bytes_per_job: 0,
            bytes_per_vm: 0,
            loading: Duration::ZERO,
        };
        for number in 0..size.nodes {
            let node = cluster.node(number, NodeState::Ready);
            cluster.engine.step(cluster.now, Input::Node(node));
        }
        let before = resident_bytes();
        let mut ids = Vec::with_capacity(size.vms);
        for number in 0..size.vms {
            let kind = if number % 10 == 0 { VmKind::Ephemeral } else { VmKind::Service };
            let vm_id = cluster.add_vm(kind, 512, node_id(number % size.nodes));
            let vm = cluster.vm(vm_id, VmState::Busy);
            cluster.engine.step(cluster.now, Input::Vm(vm));
            ids.push(vm_id);
        }
        cluster.bytes_per_vm = resident_bytes().saturating_sub(before) / size.vms;
        for vm_id in ids {
            let job = cluster.new_job();
            cluster.running.push((job, vm_id));
            let job = cluster.job(job, JobState::Running, Some(vm_id));
            cluster.engine.step(cluster.now, Input::Job(job));
        }
        let before = resident_bytes();
        for _ in 0..size.jobs {
            let id = cluster.new_job();
            let job = cluster.job(id, JobState::Queued, None);
            cluster.engine.step(cluster.now, Input::Job(job));
        }
        cluster.bytes_per_job = resident_bytes().saturating_sub(before) / size.jobs;
        let begun = Instant::now();
        cluster.engine.step(cluster.now, Input::Lead(Some(1)));
        cluster.loading = begun.elapsed();
        while cluster.engine.next_wake().is_some_and(|at| at <= cluster.now) {
            cluster.engine.step(cluster.now, Input::Tick);
        }
        cluster
    }

    fn measure(&mut self, rounds: usize) -> BTreeMap<&'static str, Vec<Duration>> {
        self.round(rounds / 10);
        self.costs.clear();
        self.round(rounds);
        std::mem::take(&mut self.costs)
    }

    fn round(&mut self, rounds: usize) {
        for round in 0..rounds {
            self.now.0 += 1;
            let job = self.new_job();
            let submitted = self.job(job, JobState::Queued, None);
            self.feed("job submitted", Input::Job(submitted));
            let at = self.random() % self.running.len();
            let (job_id, vm_id) = self.running.swap_remove(at);
            let finished = self.job(job_id, JobState::Succeeded, Some(vm_id));
            self.feed("job finished", Input::Job(finished));
            let service = self.vms[&vm_id].0.kind == VmKind::Service;
            let vm = self.vm(vm_id, if service { VmState::Idle } else { VmState::Draining });
            self.feed(if service { "service VM freed" } else { "ephemeral VM done" }, Input::Vm(vm));
            if round % 50 == 0 {
                let number = self.random() % self.size.nodes;
                for state in [NodeState::Cordoned, NodeState::Ready] {
                    let node = self.node(number, state);
                    self.feed("node changed", Input::Node(node));
                }
            }
            self.settle();
        }
    }

    fn settle(&mut self) {
        loop {
            if self.engine.next_wake().is_some_and(|at| at <= self.now) {
                self.feed("tick", Input::Tick);
            } else if let Some(effect) = self.pending.pop_front() {
                self.carry_out(effect);
            } else {
                return;
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Assign { job_id, vm_id, .. } => {
                let job = self.job(job_id, JobState::Assigned, Some(vm_id));
                self.feed("assigned", Input::Assigned { job_id, vm_id, result: Ok(job) });
                let vm = self.vm(vm_id, VmState::Busy);
                self.feed("VM changed", Input::Vm(vm));
            }
            Effect::CreateVm { ticket, config, node_id, .. } => {
                let vm_id = self.add_vm(config.kind, config.memory_mib, node_id);
                let vm = self.vm(vm_id, VmState::Starting);
                self.feed("VM created", Input::Created { ticket, result: Ok(vm) });
            }
            Effect::Tell { order, .. } => {
                self.feed("told", Input::Told { order: order.key(), result: Ok(()) });
                match order {
                    Order::Start { vm_id, .. } => {
                        let vm = self.vm(vm_id, VmState::Ready);
                        self.feed("VM changed", Input::Vm(vm));
                    }
                    Order::Stop { vm_id, .. } => {
                        let vm = self.vm(vm_id, VmState::Terminated);
                        self.vms.remove(&vm_id);
                        self.feed("VM ended", Input::Vm(vm));
                    }
                    Order::Run(job) => {
                        let Some(vm_id) = job.vm_id else { return };
                        self.running.push((job.id, vm_id));
                        let job = self.job(job.id, JobState::Running, Some(vm_id));
                        self.feed("job started", Input::Job(job));
                    }
                    Order::Cancel { .. } => {}
                }
            }
            Effect::DrainVm { vm_id, .. } => {
                let vm = self.vm(vm_id, VmState::Draining);
                self.feed("VM changed", Input::Vm(vm));
            }
            Effect::RefuseVm { .. }
            | Effect::FailJob { .. }
            | Effect::LoseAttempt { .. }
            | Effect::FailVm { .. }
            | Effect::LookUpJob { .. } => panic!("nothing fails here: {effect:?}"),
        }
    }

    fn feed(&mut self, name: &'static str, input: Input) {
        let begun = Instant::now();
        let effects = self.engine.step(self.now, input);
        let cost = begun.elapsed();
        self.costs.entry(name).or_default().push(cost);
        self.costs.entry("all").or_default().push(cost);
        self.pending.extend(effects);
    }

    fn random(&mut self) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize
    }

    fn revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn new_job(&mut self) -> JobId {
        self.next_job += 1;
        JobId(Uuid::from_u128(self.next_job))
    }

    fn add_vm(&mut self, kind: VmKind, memory_mib: u32, node_id: NodeId) -> VmId {
        self.next_vm += 1;
        let vm_id = VmId(Uuid::from_u128(self.next_vm));
        let labels = BTreeMap::from([(OWNER_LABEL.to_owned(), OWNER.to_owned())]);
        let config = VmConfig {
            kind,
            image: "default".to_owned(),
            vcpus: 1,
            memory_mib,
            labels,
            node_id: None,
            egress: Default::default(),
            volumes: Default::default(),
        };
        self.vms.insert(vm_id, (config, node_id));
        vm_id
    }

    fn node(&mut self, number: usize, state: NodeState) -> Node {
        let vms = u32::try_from(self.size.vms / self.size.nodes).unwrap_or(u32::MAX);
        Node {
            id: node_id(number),
            state,
            endpoint: "http://127.0.0.1:1".to_owned(),
            driver: "process".to_owned(),
            vcpus: 16,
            memory_mib: u64::from(vms) * 512,
            max_vms: vms,
            images: vec!["default".to_owned()],
            incarnation: 1,
            revision: self.revision(),
            registered_at: self.now,
            labels: BTreeMap::new(),
            reason: String::new(),
            updated_at: self.now,
            drain_deadline: None,
            wanted: state,
            pressure: Default::default(),
            volumes: vec![],
            scratch_mib: 0,
        }
    }

    fn vm(&mut self, id: VmId, state: VmState) -> Vm {
        let (config, node_id) = self.vms[&id].clone();
        Vm {
            id,
            config,
            state,
            node_id,
            job_id: None,
            reason: String::new(),
            generation: 1,
            revision: self.revision(),
            created_at: self.now,
            updated_at: self.now,
            jobs_assigned: 1,
            stop_grace: None,
        }
    }

    fn job(&mut self, id: JobId, state: JobState, vm_id: Option<VmId>) -> Job {
        let spec = self.specs[(id.0.as_u128() % (SHAPES * TENANTS)) as usize].clone();
        Job {
            id,
            spec,
            state,
            attempt: u32::from(vm_id.is_some()),
            vm_id,
            node_id: vm_id.map(|vm_id| self.vms[&vm_id].1.clone()),
            assignment: None,
            cancel_requested: false,
            exit: None,
            reason: String::new(),
            log_bytes: 0,
            generation: 1,
            revision: self.revision(),
            created_at: self.now,
            assigned_at: None,
            started_at: None,
            finished_at: None,
            queued_at: self.now,
            not_before: None,
            attempts_started: 0,
        }
    }
}

fn node_id(number: usize) -> NodeId {
    NodeId::parse("node", &format!("node-{number}")).unwrap_or_else(|_| unreachable!("a valid name"))
}

/// One of as many specs as there are pairs of shape and tenant.
fn spec(number: u128) -> JobSpec {
    let wire = pb::JobSpec { command: vec!["true".to_owned()], ..Default::default() };
    let mut spec = JobSpec::parse("spec", wire, DEFAULTS).unwrap_or_else(|_| unreachable!("a valid spec"));
    let (shape, tenant) = (number % SHAPES, number / SHAPES);
    // Of ten shapes one takes fresh VMs only, as one VM of ten is fresh.
    spec.isolation = if shape % 10 == 0 { Isolation::Maximum } else { Isolation::Standard };
    spec.memory_mib = if shape % 10 == 0 { 512 - u32::from(shape > 0) * 64 } else { 512 - 8 * shape as u32 };
    spec.priority = (number % 3) as i32;
    spec.labels.insert(TENANT_LABEL.to_owned(), format!("tenant-{tenant}"));
    spec
}

fn resident_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap_or(0) * 1024
}
