//! What must hold, always: told of everything that happens, it says what of it must not have happened.
//!
//! It sees the world as nobody in it does: what the guests do at the moment they do it, and each change of the registry in the
//! moment it is committed. It knows no process, network or fault, so its own tests can tell it any story.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use blixard::{
    id::{JobId, NodeId, VmId},
    job::{Job, JobState},
    node::{Node, NodeState},
    vm::{Vm, VmState},
};

use blixard_scheduler::engine::OWNER_LABEL;

use crate::kernel::Instant;

/// A run of a command in a guest: its number is its fingerprint, and comes back in the result.
pub type RunNumber = u64;

/// What of a node's capacity is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Held {
    vms: u32,
    memory_mib: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Checker {
    max_vms: u32,
    broken: Option<String>,
    /// Of the lease by which one scheduler leads.
    epoch: u64,
    acknowledged: BTreeSet<JobId>,
    /// Which wish of a user a job's id stands for, and the job that each wish became.
    wishes: BTreeMap<JobId, JobId>,
    granted: BTreeMap<JobId, JobId>,
    jobs: BTreeMap<JobId, Job>,
    vms: BTreeMap<VmId, Vm>,
    nodes: BTreeMap<NodeId, Node>,
    /// Attempts whose command is running in some guest, by job.
    live: BTreeMap<JobId, (u32, VmId)>,
    /// Every attempt whose command ever started.
    started: BTreeMap<JobId, BTreeSet<u32>>,
    runs: Vec<(JobId, u32)>,
    /// Machines that exist, on which node.
    machines: BTreeMap<VmId, (NodeId, u64)>,
    held: BTreeMap<NodeId, Held>,
    live_vms: u32,
    open_jobs: u64,
    /// When a user's VM was last recorded on a node.
    users_vms: BTreeMap<NodeId, Instant>,
}

/// A VM that a user asks for is recorded by any scheduler, at once; so long later the one that leads has heard of it, and has to
/// count it. Until then the node has the last word.
const HEARD_OF_WITHIN: Duration = Duration::from_secs(60);

/// How much happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub jobs: usize,
    pub open_jobs: u64,
    pub runs: usize,
    pub vms: usize,
    pub machines: usize,
}

impl Checker {
    /// Of a world in which so many VMs may live at once.
    #[must_use]
    pub fn new(max_vms: u32) -> Self {
        Self { max_vms, ..Self::default() }
    }

    /// The first thing that must not have happened.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Something must not have happened.
    pub fn fail(&mut self, what: String) {
        self.broken.get_or_insert(what);
    }

    fn require(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds && self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    /// How much happened so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            jobs: self.jobs.len(),
            open_jobs: self.open_jobs,
            runs: self.runs.len(),
            vms: self.vms.len(),
            machines: self.machines.len(),
        }
    }

    /// The job as last committed.
    #[must_use]
    pub fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id)
    }

    /// Every job as last committed.
    pub fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values()
    }

    /// Every VM as last committed.
    pub fn vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.values()
    }

    /// A scheduler leads under this epoch.
    pub fn leads(&mut self, epoch: u64) {
        self.epoch = self.epoch.max(epoch);
    }

    /// Something was recorded that a scheduler decided when it led under this epoch; 0: nobody's decision.
    pub fn wrote(&mut self, epoch: u64) {
        let now = self.epoch;
        self.require(epoch == 0 || epoch == now, || {
            format!("a scheduler of epoch {epoch} wrote, and the epoch is {now}")
        });
    }

    /// A user asks for one job, under this id, because of this wish: however often, it is one job.
    pub fn asked(&mut self, wish: JobId, id: JobId) {
        self.wishes.insert(id, wish);
    }

    /// Nodes that take no work because a user wants it so.
    #[must_use]
    pub fn closed_nodes(&self) -> Vec<String> {
        let closed = self.nodes.values().filter(|node| node.wanted != NodeState::Ready);
        closed.map(|node| node.id.to_string()).collect()
    }

    /// A user was told that a job is queued.
    pub fn acknowledged(&mut self, id: JobId) {
        self.acknowledged.insert(id);
        let known = self.jobs.contains_key(&id);
        self.require(known, || format!("job {id} was acknowledged and is not on record"));
    }

    /// A command starts in a guest.
    pub fn command_started(&mut self, job: JobId, attempt: u32, vm: VmId) -> RunNumber {
        let other = self.live.insert(job, (attempt, vm));
        self.require(other.is_none(), || {
            let (other, other_vm) = other.unwrap_or((0, vm));
            format!("two live attempts of job {job}: #{other} in VM {other_vm} and now #{attempt} in VM {vm}")
        });
        let under_way =
            |known: &Job| known.attempt == attempt && matches!(known.state, JobState::Assigned | JobState::Running);
        let known = self.jobs.get(&job);
        let now = known.map(|known| format!("{} at attempt {}", known.state, known.attempt)).unwrap_or_default();
        let current = known.is_some_and(under_way);
        self.require(current, || format!("attempt {attempt} of job {job} starts, which is {now} on record"));
        let first = self.started.entry(job).or_default().insert(attempt);
        self.require(first, || format!("attempt {attempt} of job {job} was started twice"));
        let allowed = self.jobs.get(&job).map_or(0, |job| job.spec.max_attempts);
        let starts = self.started.get(&job).map_or(0, BTreeSet::len);
        self.require(starts <= allowed as usize, || {
            format!("job {job} started {starts} times; it may {allowed} times")
        });
        self.runs.push((job, attempt));
        self.runs.len() as RunNumber
    }

    /// It has ended, however.
    pub fn command_ended(&mut self, job: JobId, attempt: u32) {
        if self.live.get(&job).is_some_and(|(live, _)| *live == attempt) {
            self.live.remove(&job);
        }
    }

    /// A machine comes to be.
    pub fn machine_started(&mut self, node: &NodeId, vm: VmId, memory_mib: u64) {
        let before = self.machines.insert(vm, (node.clone(), memory_mib));
        self.require(before.is_none(), || format!("VM {vm} was started while it lived"));
        let here = self.machines.values().filter(|(on, _)| on == node);
        let (machines, memory) = here.fold((0, 0), |(count, memory), (_, mib)| (count + 1, memory + mib));
        let Some(offered) = self.nodes.get(node) else { return };
        let (max_vms, memory_mib) = (offered.max_vms, offered.memory_mib);
        self.require(machines <= max_vms && memory <= memory_mib, || {
            format!("node {node} holds {machines} machines of {memory} MiB; it has room for {max_vms} of {memory_mib}")
        });
    }

    /// Nothing of a machine is left.
    pub fn machine_ended(&mut self, vm: VmId) {
        self.machines.remove(&vm);
        let orphans: Vec<JobId> = self.live.iter().filter(|(_, (_, on))| *on == vm).map(|(job, _)| *job).collect();
        for job in orphans {
            self.live.remove(&job);
        }
    }

    /// A node changed in the registry.
    pub fn node_changed(&mut self, node: Node) {
        let before = self.nodes.get(&node.id).map_or(0, |before| before.incarnation);
        self.require(node.incarnation >= before, || {
            format!("node {} went back to incarnation {}", node.id, node.incarnation)
        });
        self.nodes.insert(node.id.clone(), node);
    }

    /// A VM changed in the registry.
    pub fn vm_changed(&mut self, now: Instant, vm: Vm) {
        let id = vm.id;
        let before = self.vms.get(&id).cloned();
        if let Some(wrong) = wrong_step(
            before.as_ref().map(|before| (before.state, before.generation)),
            (vm.state, vm.generation),
            VmState::Starting,
            |from, to| from.may_go_to(to, vm.config.kind) || from == to,
        ) {
            self.fail(format!("VM {id}: {wrong}"));
        }
        let lived = before.is_some_and(|before| !before.state.is_terminal());
        let lives = !vm.state.is_terminal();
        let held = self.held.entry(vm.node_id.clone()).or_default();
        let memory = u64::from(vm.config.memory_mib);
        match (lived, lives) {
            (false, true) => {
                (held.vms, held.memory_mib) = (held.vms + 1, held.memory_mib + memory);
                self.live_vms += 1;
                self.check_capacity(now, &vm);
            }
            (true, false) => {
                (held.vms, held.memory_mib) = (held.vms - 1, held.memory_mib - memory);
                self.live_vms -= 1;
            }
            (true, true) | (false, false) => {}
        }
        self.vms.insert(id, vm);
    }

    fn check_capacity(&mut self, now: Instant, vm: &Vm) {
        if !vm.config.labels.contains_key(OWNER_LABEL) {
            self.users_vms.insert(vm.node_id.clone(), now);
        }
        let unheard = |at: &Instant| now.since(*at) < HEARD_OF_WITHIN;
        let (total, most) = (self.live_vms, self.max_vms);
        if !self.users_vms.values().any(unheard) {
            self.require(total <= most, || format!("{total} VMs on record live with VM {}; max_vms is {most}", vm.id));
        }
        let Some(node) = self.nodes.get(&vm.node_id) else {
            return self.fail(format!("VM {} was placed on node {}, which nobody knows", vm.id, vm.node_id));
        };
        if self.users_vms.get(&vm.node_id).is_some_and(unheard) {
            return;
        }
        let held = self.held.get(&vm.node_id).copied().unwrap_or_default();
        let fits = held.vms <= node.max_vms && held.memory_mib <= node.memory_mib && vm.config.vcpus <= node.vcpus;
        let offer = format!("{} VMs of {} MiB", node.max_vms, node.memory_mib);
        self.require(fits, || format!("VM {} is more than node {} holds: {held:?} of {offer}", vm.id, vm.node_id));
    }

    /// A job changed in the registry.
    pub fn job_changed(&mut self, job: Job) {
        let id = job.id;
        let before = self.jobs.get(&id);
        let wrong = wrong_step(
            before.map(|before| (before.state, before.generation)),
            (job.state, job.generation),
            JobState::Queued,
            |from, to| from.may_go_to(to) || from == to,
        )
        .or_else(|| before.and_then(|before| wrong_attempt(before, &job)));
        let is_new = before.is_none();
        let newly_ended = job.state.is_terminal() && before.is_none_or(|before| !before.state.is_terminal());
        self.open_jobs += u64::from(is_new);
        self.open_jobs -= u64::from(newly_ended);
        if let Some(wrong) = wrong {
            self.fail(format!("job {id}: {wrong}"));
        }
        if let Some(wish) = self.wishes.get(&id).filter(|_| is_new) {
            let other = self.granted.insert(*wish, id);
            self.require(other.is_none(), || format!("one request became two jobs: {other:?} and {id}"));
        }
        if newly_ended {
            self.check_result(&job);
        }
        self.jobs.insert(id, job);
    }

    fn check_result(&mut self, job: &Job) {
        let (id, attempt) = (job.id, job.attempt);
        if let Some(exit) = job.exit {
            let run = usize::try_from(exit.user_time_ms).ok().and_then(|run| self.runs.get(run.checked_sub(1)?));
            let of = run.copied();
            self.require(of == Some((id, attempt)), || {
                format!("job {id} ended at attempt {attempt} with the result of another run: {of:?}")
            });
        }
        let succeeded = job.state == JobState::Succeeded;
        self.require(!succeeded || job.exit.is_some_and(|exit| exit.success()), || {
            format!("job {id} is Succeeded with exit {:?}", job.exit)
        });
        let starts = self.started.get(&id).map_or(0, BTreeSet::len);
        self.require(job.attempts_started as usize >= starts, || {
            format!("job {id} counts {} started attempts; {starts} were seen to start", job.attempts_started)
        });
    }

    /// The faults are over and everything had its time: what is still open?
    #[must_use]
    pub fn unsettled(&self) -> Vec<String> {
        let jobs = self.jobs.values().filter(|job| !job.state.is_terminal());
        let lost = self.acknowledged.iter().filter(|id| !self.jobs.contains_key(id));
        let forgotten = self.vms.values().filter(|vm| !vm.state.is_terminal() && !self.machines.contains_key(&vm.id));
        let wild = self.machines.keys().filter(|id| self.vms.get(id).is_none_or(|vm| vm.state.is_terminal()));
        let moving =
            self.vms.values().filter(|vm| matches!(vm.state, VmState::Starting | VmState::Draining | VmState::Busy));
        jobs.map(|job| format!("job {} is {} at attempt {} ({})", job.id, job.state, job.attempt, job.reason))
            .chain(lost.map(|id| format!("job {id} was acknowledged and is gone")))
            .chain(
                self.live
                    .iter()
                    .map(|(job, (attempt, vm))| format!("attempt {attempt} of job {job} still runs in VM {vm}")),
            )
            .chain(
                forgotten
                    .map(|vm| format!("VM {} is {} on record and no machine of node {}", vm.id, vm.state, vm.node_id)),
            )
            .chain(wild.map(|id| format!("the machine of VM {id} lives and is not on record as living")))
            .chain(moving.map(|vm| format!("VM {} is still {} on node {}", vm.id, vm.state, vm.node_id)))
            .collect()
    }
}

/// What is wrong with a step of something that has a state and a generation.
fn wrong_step<S: Copy + PartialEq + std::fmt::Display>(
    before: Option<(S, u64)>,
    now: (S, u64),
    first: S,
    may: impl Fn(S, S) -> bool,
) -> Option<String> {
    let Some((state, generation)) = before else {
        return (now.0 != first || now.1 != 1).then(|| format!("it begins as {} of generation {}", now.0, now.1));
    };
    if now.1 != generation + 1 {
        return Some(format!("generation {generation} is followed by {}", now.1));
    }
    (!may(state, now.0)).then(|| format!("it went from {state} to {}", now.0))
}

/// What is wrong with how a job's attempts went on.
fn wrong_attempt(before: &Job, now: &Job) -> Option<String> {
    let assigned = before.state == JobState::Queued && now.state == JobState::Assigned;
    let expected = before.attempt + u32::from(assigned);
    if now.attempt != expected {
        return Some(format!("attempt {} is followed by {} as it becomes {}", before.attempt, now.attempt, now.state));
    }
    if now.attempts_started > now.spec.max_attempts {
        return Some(format!("{} attempts started; {} may", now.attempts_started, now.spec.max_attempts));
    }
    if now.attempts_started < before.attempts_started {
        return Some(format!("{} started attempts became {}", before.attempts_started, now.attempts_started));
    }
    None
}

#[cfg(test)]
#[path = "checker_tests.rs"]
mod tests;
