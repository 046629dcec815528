//! Users: they submit jobs of every kind, cancel some, start and stop VMs, take nodes out of service and put them back, and repeat
//! what was not answered, under the same request id, at whichever scheduler answers.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use blixard::{
    error::Error,
    id::{JobId, VmId},
    job::TENANT_LABEL,
    pb::{common::v1 as common, registry::v1 as registry, scheduler::v1 as pb},
    vm::Vm,
};
use blixard_scheduler::engine::OWNER_LABEL;
use uuid::Uuid;

use crate::{
    guest::Work,
    kernel::{Kernel, ProcessId},
    network::is_open,
    random::Random,
    settings::Protection,
    wire::{Answer, FrontCall},
    world::{MAX_MEMORY_MIB, World},
};

/// How long a user waits for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many jobs may be open before users wait with the next: a world with an endless queue would never settle.
const OPEN_JOBS: u64 = 60;
const TENANTS: [&str; 3] = ["red", "green", "blue"];

/// What users have asked for.
#[derive(Default)]
pub struct Asked {
    jobs: RefCell<Vec<JobId>>,
    vms: RefCell<Vec<VmId>>,
    /// Nodes that are out of service by a user's wish.
    pub closed: Cell<bool>,
}

/// One user.
struct User {
    world: World,
    process: ProcessId,
    tenant: &'static str,
    asked: Rc<Asked>,
}

/// Starts so many users; they stop asking when [`Asked::closed`] is set.
pub fn start(world: &World, asked: &Rc<Asked>) {
    for tenant in TENANTS {
        let process = world.kernel.process(format!("user-{tenant}"));
        let user = User { world: world.clone(), process, tenant, asked: Rc::clone(asked) };
        world.kernel.spawn(process, async move { user.live().await });
    }
}

impl User {
    fn kernel(&self) -> &Kernel {
        &self.world.kernel
    }

    fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        self.kernel().random(draw)
    }

    async fn live(&self) {
        loop {
            let pause = self.random(|random| random.skewed(1..12_000));
            self.kernel().sleep(Duration::from_millis(pause)).await;
            if self.asked.closed.get() {
                return self.give_back().await;
            }
            self.act().await;
        }
    }

    /// Stops the VMs that users have started and opens the nodes that they have closed: jobs may wait for what they hold.
    async fn give_back(&self) {
        loop {
            let mine = |vm: &&Vm| !vm.state.is_terminal() && !vm.config.labels.contains_key(OWNER_LABEL);
            let left: Vec<VmId> = self.world.checker.borrow().vms().filter(mine).map(|vm| vm.id).collect();
            for vm in left {
                self.stop(vm, Some(0)).await;
            }
            // What was asked of a node may have come late, and twice.
            let closed: Vec<String> = self.world.checker.borrow().closed_nodes();
            for node in closed {
                self.uncordon(&node).await;
            }
            self.kernel().sleep(Duration::from_secs(20)).await;
        }
    }

    async fn act(&self) {
        let busy = self.world.checker.borrow().figures().open_jobs >= OPEN_JOBS;
        match self.random(|random| random.below(0..100)) {
            0..60 if !busy => self.submit().await,
            60..70 if !busy => self.submit_group().await,
            70..82 => self.cancel().await,
            82..87 => self.start_vm().await,
            87..94 => self.stop_vm().await,
            94..100 => self.keep_nodes().await,
            _ => {}
        }
    }

    /// Asks until it is answered, or patience ends; perhaps a scheduler that does not lead.
    async fn ask(&self, call: impl Fn() -> FrontCall) -> Option<Result<Answer, Error>> {
        for _ in 0..self.random(|random| random.below(3..12)) {
            let scheduler = self.random(|random| *random.of(&self.world.schedulers));
            let answer = self.world.network.call(self.process, scheduler, call(), PATIENCE).await;
            if !answer.as_ref().is_err_and(is_open) {
                return Some(answer);
            }
            let pause = self.random(|random| random.below(50..3000));
            self.kernel().sleep(Duration::from_millis(pause)).await;
        }
        None
    }

    /// The id of a request: the same however often it is repeated.
    fn id_for_repeats(&self, id: Uuid) -> impl Fn() -> Uuid {
        let (world, first) = (self.world.clone(), Cell::new(true));
        move || {
            // Without idempotency each repetition is a request of its own.
            let fresh = !world.protects(Protection::Idempotency) && !first.replace(false);
            if fresh { world.kernel.random(Random::uuid) } else { id }
        }
    }

    async fn submit(&self) {
        let (id, spec) = self.random(|random| (random.uuid(), self.spec(random)));
        let repeat = self.id_for_repeats(id);
        let answer = self
            .ask(|| {
                let repeated = repeat();
                self.world.checker.borrow_mut().asked(JobId(id), JobId(repeated));
                FrontCall::SubmitJob(pb::SubmitJobRequest {
                    request_id: repeated.to_string(),
                    spec: Some(spec.clone()),
                    input: None,
                })
            })
            .await;
        if let Some(Ok(Answer::Job(job))) = answer {
            self.acknowledged(&[*job]);
        }
    }

    fn acknowledged(&self, jobs: &[common::Job]) {
        for job in jobs {
            let Ok(id) = JobId::parse("job.id", &job.id) else { continue };
            self.world.checker.borrow_mut().acknowledged(id);
            self.asked.jobs.borrow_mut().push(id);
        }
    }

    /// A chain or a fan of jobs that depend on each other.
    async fn submit_group(&self) {
        let jobs = self.random(|random| {
            let group = random.uuid();
            let ids: Vec<Uuid> = (0..random.below(2..6)).map(|_| random.uuid()).collect();
            let mut jobs = Vec::new();
            for (at, id) in ids.iter().enumerate() {
                let mut spec = self.spec(random);
                spec.group_id = group.to_string();
                spec.target_vm_id.clear();
                let before = if random.per_mille(500) { at.checked_sub(1) } else { at.checked_sub(1).map(|_| 0) };
                let condition = if random.per_mille(500) {
                    common::DependencyCondition::Ended
                } else {
                    common::DependencyCondition::Succeeded
                };
                spec.depends_on = before
                    .map(|before| common::Dependency { job_id: ids[before].to_string(), condition: condition.into() })
                    .into_iter()
                    .collect();
                jobs.push(registry::CreateJobRequest {
                    job_id: id.to_string(),
                    spec: Some(spec),
                    ..Default::default()
                });
            }
            jobs
        });
        let call = || FrontCall::SubmitJobs(registry::CreateJobsRequest { jobs: jobs.clone() });
        if let Some(Ok(Answer::Jobs(jobs))) = self.ask(call).await {
            self.acknowledged(&jobs);
        }
    }

    /// What to run: of every kind that there is.
    fn spec(&self, random: &mut Random) -> common::JobSpec {
        let exits = match random.below(0..10) {
            0..7 => vec![0],
            7..9 => vec![1, 0],
            _ => vec![1],
        };
        let work = Work {
            // Mostly a moment; some outlive a fault and what follows from it.
            lasts: Duration::from_millis(match random.below(0..5) {
                0 => random.below(20_000..120_000),
                _ => random.skewed(20..60_000),
            }),
            exits,
            stubborn: random.per_mille(100),
        };
        let retry_on = match random.below(0..4) {
            0 => vec![common::RetryOn::Lost.into(), common::RetryOn::Failed.into(), common::RetryOn::TimedOut.into()],
            1 => vec![common::RetryOn::Failed.into()],
            _ => vec![],
        };
        let isolation = *random.of(&[
            common::Isolation::Maximum,
            common::Isolation::Standard,
            common::Isolation::Standard,
            common::Isolation::Minimal,
        ]);
        let on_node = if random.per_mille(50) { random.of(&self.world.node_names).clone() } else { String::new() };
        let zoned = random.per_mille(60);
        let target = random.per_mille(50).then(|| self.asked.vms.borrow().last().copied()).flatten();
        let target_config = target.map(|_| (1, 256));
        let (vcpus, memory_mib) =
            target_config.unwrap_or_else(|| (1, *random.of(&[256, 256, 256, 512, MAX_MEMORY_MIB])));
        // Now and then something that no node could ever do.
        let impossible = random.per_mille(10);
        common::JobSpec {
            command: work.to_command(),
            working_dir: "/".to_owned(),
            image: "default".to_owned(),
            vcpus: Some(if impossible { 64 } else { vcpus }),
            memory_mib: Some(memory_mib),
            isolation: if target.is_some() { common::Isolation::Standard } else { isolation }.into(),
            priority: i32::try_from(random.below(0..3)).unwrap_or(0) - 1,
            timeout_ms: if random.per_mille(300) { random.skewed(50..120_000) } else { 0 },
            max_attempts: u32::try_from(random.below(1..5)).unwrap_or(1),
            labels: BTreeMap::from([(TENANT_LABEL.to_owned(), self.tenant.to_owned())]),
            node_id: on_node,
            node_labels: if zoned { BTreeMap::from([("zone".to_owned(), "a".to_owned())]) } else { BTreeMap::new() },
            target_vm_id: target.map(|id| id.to_string()).unwrap_or_default(),
            retry_on,
            backoff_ms: if random.per_mille(300) { random.below(100..5000) } else { 0 },
            queue_timeout_ms: if random.per_mille(100) { random.below(1000..120_000) } else { 0 },
            start_timeout_ms: if random.per_mille(100) { random.below(1000..60_000) } else { 0 },
            ..Default::default()
        }
    }

    async fn cancel(&self) {
        let job = {
            let jobs = self.asked.jobs.borrow();
            // Mostly one of the latest, which may still run.
            let back = self.random(|random| random.skewed(1..200));
            jobs.len().checked_sub(usize::try_from(back).unwrap_or(1)).map(|at| jobs[at])
        };
        let Some(job) = job else { return };
        let call = || {
            FrontCall::CancelJob(pb::CancelJobRequest {
                job_id: job.to_string(),
                reason: "its user changed her mind".to_owned(),
            })
        };
        self.ask(call).await;
    }

    async fn start_vm(&self) {
        let id = VmId(self.random(Random::uuid));
        let kind = if self.random(|random| random.per_mille(800)) {
            common::VmKind::Service
        } else {
            common::VmKind::Ephemeral
        };
        let config = common::VmConfig {
            kind: kind.into(),
            image: "default".to_owned(),
            vcpus: Some(1),
            memory_mib: Some(256),
            ..Default::default()
        };
        let call =
            || FrontCall::StartVm(pb::StartVmRequest { request_id: id.to_string(), config: Some(config.clone()) });
        if let Some(Ok(Answer::Vm(_))) = self.ask(call).await {
            self.asked.vms.borrow_mut().push(id);
        }
    }

    async fn stop_vm(&self) {
        // One that a user started, or any that lives.
        let own = self.random(|random| random.per_mille(700));
        let vm = if own {
            self.asked.vms.borrow_mut().pop()
        } else {
            let checker = self.world.checker.borrow();
            let living: Vec<VmId> = checker.vms().filter(|vm| !vm.state.is_terminal()).map(|vm| vm.id).collect();
            (!living.is_empty()).then(|| self.random(|random| *random.of(&living)))
        };
        let Some(vm) = vm else { return };
        let grace_ms = self.random(|random| *random.of(&[None, Some(0), Some(2000)]));
        self.stop(vm, grace_ms).await;
    }

    async fn stop(&self, vm: VmId, grace_ms: Option<u64>) {
        let call = || {
            FrontCall::StopVm(pb::StopVmRequest {
                vm_id: vm.to_string(),
                grace_ms,
                reason: "a user wants its end".to_owned(),
            })
        };
        self.ask(call).await;
    }

    /// Takes a node out of service, and puts it back a while later.
    async fn keep_nodes(&self) {
        let (node_id, drains, deadline_ms, back_after) = self.random(|random| {
            let node = random.of(&self.world.node_names).clone();
            let deadline = random.per_mille(500).then(|| random.below(1000..60_000));
            (node, random.per_mille(500), deadline, random.below(2000..120_000))
        });
        let reason = "maintenance".to_owned();
        if drains {
            let request = pb::DrainNodeRequest { node_id: node_id.clone(), reason, deadline_ms };
            self.ask(|| FrontCall::DrainNode(request.clone())).await;
        } else {
            let request = pb::CordonNodeRequest { node_id: node_id.clone(), reason };
            self.ask(|| FrontCall::CordonNode(request.clone())).await;
        }
        self.kernel().sleep(Duration::from_millis(back_after)).await;
        self.uncordon(&node_id).await;
    }

    async fn uncordon(&self, node_id: &str) {
        let call = || FrontCall::UncordonNode(pb::UncordonNodeRequest { node_id: node_id.to_owned() });
        // Whoever closes a node opens it again, or nothing would ever settle.
        while !matches!(
            self.ask(call).await,
            Some(Ok(_) | Err(Error { reason: blixard::error::Reason::NodeNotFound, .. }))
        ) {}
    }
}
