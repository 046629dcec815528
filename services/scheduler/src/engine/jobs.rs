//! Jobs: what the engine keeps of each, what holds them back, and what their changes mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use blixard::{
    egress::Egress,
    error::Error,
    id::{JobId, VmId},
    job::{Dependency, DependencyCondition, Job, JobSpec, JobState, TENANT_LABEL},
    time::Timestamp,
};

use super::{
    Effect, Engine, LOOKS_PER_STEP, OrderKey, Wake,
    queue::Key,
    shape::{Constraint, ImageId, NodeIx, Shape, ShapeId, TenantId},
};

/// What the engine keeps of a job.
#[derive(Debug, Clone)]
pub(super) struct JobEntry {
    pub(super) revision: u64,
    pub(super) queued_at: Timestamp,
    /// Since when it may run: queued, its pause over, its dependencies met, whichever is last.
    pub(super) ready_since: Timestamp,
    pub(super) not_before: Option<Timestamp>,
    /// When it is looked at again.
    timer: Option<Timestamp>,
    pub(super) key: Key,
    pub(super) attempt: u32,
    queue_timeout_ms: Option<u32>,
    pub(super) tenant: TenantId,
    pub(super) vcpus: u32,
    /// While it is Queued.
    pub(super) shape: Option<ShapeId>,
    pub(super) cancel_requested: bool,
    /// Dependencies that have not ended.
    pub(super) unmet: Vec<Dependency>,
    /// Why it can never run.
    doom: Option<Box<str>>,
    pub(super) phase: Phase,
}

/// Where a job stands.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// Queued, and held back by a pause or dependencies.
    Held,
    /// In its lane.
    Waiting,
    /// Being assigned to this VM.
    Placing(VmId),
    /// Its end has been asked for.
    Ending,
    /// Assigned or Running. While it is Assigned the whole job is kept: its node must be told.
    Given { vm_id: VmId, node: NodeIx, job: Option<Box<Job>> },
}

/// What a job that others depend on came to; `None`: it is not on record any more.
#[derive(Debug, Clone, Copy)]
struct End {
    state: Option<JobState>,
    at: Timestamp,
}

/// Who waits for whose end.
#[derive(Debug, Default)]
pub(super) struct Dependencies {
    pub(super) dependents: BTreeMap<JobId, BTreeSet<JobId>>,
    /// Of these it is not known whether they live.
    unknown: BTreeSet<JobId>,
    /// Those have ended, and not all of their dependents have been told.
    ended: BTreeMap<JobId, End>,
}

impl Dependencies {
    pub(super) fn has_work(&self) -> bool {
        !self.unknown.is_empty() || !self.ended.is_empty()
    }

    pub(super) fn look_up_all(&mut self) {
        self.unknown = self.dependents.keys().copied().collect();
    }

    fn remove(&mut self, on: JobId, dependent: JobId) {
        if let Some(dependents) = self.dependents.get_mut(&on) {
            dependents.remove(&dependent);
            if dependents.is_empty() {
                self.dependents.remove(&on);
                self.unknown.remove(&on);
                self.ended.remove(&on);
            }
        }
    }
}

impl Engine {
    pub(super) fn on_job(&mut self, now: Timestamp, job: Job, effects: &mut Vec<Effect>) {
        let id = job.id;
        if self.jobs.get(&id).is_some_and(|before| before.revision >= job.revision) {
            return;
        }
        let before = self.remove_job(id);
        if let Some(Phase::Placing(vm_id) | Phase::Given { vm_id, .. }) = before.as_ref().map(|before| &before.phase) {
            self.release_vm(now, *vm_id, &job, effects);
        }
        if let Some(attempt) = before.as_ref().map(|before| before.attempt)
            && (attempt != job.attempt || job.state.is_terminal())
        {
            self.forget_orders(&[OrderKey::Run(id, attempt), OrderKey::Cancel(id, attempt)]);
        }
        if job.state.is_terminal() {
            return self.job_ended(id, End { state: Some(job.state), at: job.finished_at.unwrap_or(now) });
        }
        if job.state == JobState::Running {
            self.orders.told.remove(&OrderKey::Run(id, job.attempt));
        }
        let entry = self.entry_of(job, before);
        let (given, attempt) = (matches!(entry.phase, Phase::Given { .. }), entry.attempt);
        self.jobs.insert(id, entry);
        if given {
            self.admit_given(id, effects);
            self.want_job_orders(now, id, attempt);
        } else {
            self.admit_queued(now, id, effects);
        }
    }

    /// That an attempt is over may be heard before the news that its VM was given it: it is not held for the job any more, and not
    /// believed to be free before there are news of it.
    fn release_vm(&mut self, now: Timestamp, vm_id: VmId, job: &Job, effects: &mut Vec<Effect>) {
        let under_way = matches!(job.state, JobState::Assigned | JobState::Running) && job.vm_id == Some(vm_id);
        if !under_way && self.vms.get(&vm_id).is_some_and(|vm| vm.reserved == Some(job.id)) {
            self.suspect(now, vm_id);
            self.vm_changed(now, vm_id, effects);
        }
    }

    fn entry_of(&mut self, job: Job, before: Option<JobEntry>) -> JobEntry {
        let limits = &self.settings;
        let limit = |name: &str| limits.tenant_limits.get(name).copied().unwrap_or(limits.tenant_max_jobs);
        let name = job.spec.labels.get(TENANT_LABEL).map_or("", String::as_str);
        let tenant = self.queue.tenant(name, limit);
        let ageing = i64::try_from(self.settings.ageing.as_millis()).unwrap_or(i64::MAX);
        let urgency = job.queued_at.0.saturating_sub(ageing.saturating_mul(job.spec.priority.into()));
        let before = before.filter(|before| before.shape.is_some() && job.state == JobState::Queued);
        let heard = before.as_ref().map(|before| before.key.1).unwrap_or_else(|| {
            self.heard += 1;
            self.heard
        });
        let queued = job.state == JobState::Queued;
        let shape = queued.then(|| self.enter_shape(&job.spec, tenant));
        let ready_since = job.not_before.map_or(job.queued_at, |at| at.max(job.queued_at));
        // An attempt has been made: what it depends on had ended before.
        let first = queued && job.attempt == 0;
        let (unmet, ready_since, doom) = match before {
            Some(before) if first => (before.unmet, before.ready_since.max(ready_since), before.doom),
            _ if first => (job.spec.depends_on.clone(), ready_since, None),
            _ => (Vec::new(), ready_since, None),
        };
        JobEntry {
            revision: job.revision,
            queued_at: job.queued_at,
            ready_since,
            not_before: job.not_before,
            timer: None,
            key: (urgency, heard),
            attempt: job.attempt,
            queue_timeout_ms: job.spec.queue_timeout.map(|it| u32::try_from(it.as_millis()).unwrap_or(u32::MAX)),
            tenant,
            vcpus: job.spec.vcpus,
            shape,
            cancel_requested: job.cancel_requested,
            unmet,
            doom,
            phase: match (job.vm_id, &job.node_id) {
                (Some(vm_id), Some(node_id)) if !queued => {
                    let node = self.fleet.ix(node_id);
                    let assigned = job.state == JobState::Assigned;
                    Phase::Given { vm_id, node, job: assigned.then(|| Box::new(job)) }
                }
                _ => Phase::Held,
            },
        }
    }

    fn enter_shape(&mut self, spec: &JobSpec, tenant: TenantId) -> ShapeId {
        if let Some(vm_id) = spec.target_vm_id {
            return self.queue.enter(Shape::Target(vm_id), tenant).0;
        }
        let site = self.fleet.use_site(&Constraint::of(spec));
        let image = ImageId(self.images.number(&spec.image));
        let egress = self.egress_id(spec.egress.as_ref().unwrap_or(&Egress::None));
        let volumes = self.volumes_id(&spec.volumes);
        let (vcpus, memory_mib, isolation) = (spec.vcpus, spec.memory_mib, spec.isolation);
        let shape = Shape::Like { image, egress, volumes, vcpus, memory_mib, isolation, site };
        let (id, new) = self.queue.enter(shape, tenant);
        if !new {
            self.fleet.leave_site(site);
        }
        id
    }

    /// Puts a Queued job where it belongs: held back, in its lane, or to its end.
    fn admit_queued(&mut self, now: Timestamp, id: JobId, effects: &mut Vec<Effect>) {
        let Some(entry) = self.jobs.get_mut(&id) else { return };
        entry.phase = Phase::Held;
        if let Some(reason) = entry.doom.clone() {
            return self.fail_job(id, reason.into(), false, effects);
        }
        if !entry.unmet.is_empty() {
            for dependency in entry.unmet.clone() {
                let dependents = self.dependencies.dependents.entry(dependency.job_id).or_default();
                dependents.insert(id);
                if !self.dependencies.ended.contains_key(&dependency.job_id) {
                    self.dependencies.unknown.insert(dependency.job_id);
                }
            }
            return;
        }
        let at = match entry.not_before.filter(|at| *at > now) {
            Some(at) => Some(at),
            None => {
                entry.phase = Phase::Waiting;
                let timeout = entry.queue_timeout_ms.map(|ms| Duration::from_millis(ms.into()));
                timeout.map(|timeout| entry.ready_since.plus(timeout))
            }
        };
        let lane = (entry.shape, entry.tenant, entry.key, matches!(entry.phase, Phase::Waiting));
        if let (Some(shape), tenant, key, true) = lane {
            self.queue.insert(shape, tenant, key, id);
        }
        self.set_job_timer(id, at);
    }

    fn set_job_timer(&mut self, id: JobId, at: Option<Timestamp>) {
        let Some(entry) = self.jobs.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut entry.timer, at) {
            self.wakes.remove(&(old, Wake::Job(id)));
        }
        if let Some(at) = at {
            self.arm(at, Wake::Job(id));
        }
    }

    pub(super) fn on_job_timer(&mut self, now: Timestamp, id: JobId, effects: &mut Vec<Effect>) {
        let Some(entry) = self.jobs.get_mut(&id) else { return };
        entry.timer = None;
        match entry.phase {
            Phase::Held => self.admit_queued(now, id, effects),
            Phase::Waiting => {
                let timeout = Duration::from_millis(entry.queue_timeout_ms.unwrap_or(0).into());
                let reason = format!("it waited {} ms, as long as queue_timeout_ms allows", timeout.as_millis());
                self.fail_job(id, reason, true, effects);
            }
            Phase::Placing(_) | Phase::Ending | Phase::Given { .. } => {}
        }
    }

    fn admit_given(&mut self, id: JobId, effects: &mut Vec<Effect>) {
        let Some(entry) = self.jobs.get(&id) else { return };
        let Phase::Given { vm_id, node, .. } = entry.phase else { return };
        let (attempt, tenant, vcpus) = (entry.attempt, entry.tenant, entry.vcpus);
        self.queue.count_job(tenant, vcpus, 1);
        self.given += 1;
        self.fleet.place_mut(node).jobs += 1;
        self.jobs_on_vm.entry(vm_id).or_default().insert(id);
        let (reason, lost) = if !self.vms.contains_key(&vm_id) {
            (format!("its VM {vm_id} is gone"), None)
        } else if self.fleet.place(node).given_up {
            self.lost(node)
        } else {
            return;
        };
        effects.push(Effect::LoseAttempt { job_id: id, attempt, started: true, reason, lost });
    }

    /// Takes a job out of everything.
    fn remove_job(&mut self, id: JobId) -> Option<JobEntry> {
        self.unqueue(id);
        let entry = self.jobs.remove(&id)?;
        if let Phase::Given { vm_id, node, .. } = entry.phase {
            self.given -= 1;
            let place = self.fleet.place_mut(node);
            place.jobs = place.jobs.saturating_sub(1);
            if let Some(jobs) = self.jobs_on_vm.get_mut(&vm_id) {
                jobs.remove(&id);
                if jobs.is_empty() {
                    self.jobs_on_vm.remove(&vm_id);
                }
            }
            self.queue.count_job(entry.tenant, entry.vcpus, -1);
        }
        if let Some(shape) = entry.shape {
            let site = self.queue.leave(shape, entry.tenant);
            self.leave_site(site);
        }
        Some(entry)
    }

    /// Takes a Queued job out of its lane, out of what holds it back, or from the VM that it is being given.
    pub(super) fn unqueue(&mut self, id: JobId) {
        self.set_job_timer(id, None);
        let Some(entry) = self.jobs.get(&id) else { return };
        match entry.phase {
            Phase::Held => {
                for dependency in entry.unmet.clone() {
                    self.dependencies.remove(dependency.job_id, id);
                }
            }
            Phase::Waiting => {
                if let Some(shape) = entry.shape {
                    self.queue.remove(shape, entry.tenant, entry.key);
                }
            }
            Phase::Placing(_) => {
                let (tenant, vcpus) = (entry.tenant, entry.vcpus);
                self.queue.count_job(tenant, vcpus, -1);
            }
            Phase::Ending | Phase::Given { .. } => {}
        }
    }

    pub(super) fn fail_job(&mut self, job_id: JobId, reason: String, timed_out: bool, effects: &mut Vec<Effect>) {
        self.unqueue(job_id);
        if let Some(entry) = self.jobs.get_mut(&job_id) {
            entry.phase = Phase::Ending;
            effects.push(Effect::FailJob { job_id, reason, timed_out });
        }
    }

    pub(super) fn on_assigned(
        &mut self,
        now: Timestamp,
        job_id: JobId,
        vm_id: VmId,
        result: Result<Job, Error>,
        effects: &mut Vec<Effect>,
    ) {
        if let Ok(job) = result {
            // One that is not known any more has ended meanwhile.
            if self.jobs.contains_key(&job_id) {
                self.on_job(now, job, effects);
            }
            return;
        }
        if self.jobs.get(&job_id).is_some_and(|job| matches!(job.phase, Phase::Placing(on) if on == vm_id)) {
            self.unqueue(job_id);
            self.admit_queued(now, job_id, effects);
        }
        if self.vms.get(&vm_id).is_some_and(|vm| vm.reserved == Some(job_id)) {
            self.suspect(now, vm_id);
            self.vm_changed(now, vm_id, effects);
        }
    }

    /// Begins anew with what is on record about a job.
    pub(super) fn readmit_job(&mut self, now: Timestamp, id: JobId, effects: &mut Vec<Effect>) {
        let Some(entry) = self.jobs.get_mut(&id) else { return };
        entry.timer = None;
        let attempt = entry.attempt;
        if let Phase::Given { vm_id, node, .. } = entry.phase {
            let (reason, lost) = if !self.vms.contains_key(&vm_id) {
                (format!("its VM {vm_id} is gone"), None)
            } else if self.fleet.place(node).given_up {
                self.lost(node)
            } else {
                return self.want_job_orders(now, id, attempt);
            };
            return effects.push(Effect::LoseAttempt { job_id: id, attempt, started: true, reason, lost });
        }
        self.unqueue(id);
        self.admit_queued(now, id, effects);
    }

    pub(super) fn on_job_gone(&mut self, now: Timestamp, id: JobId) {
        if !self.jobs.contains_key(&id) {
            self.job_ended(id, End { state: None, at: now });
        }
    }

    fn job_ended(&mut self, id: JobId, end: End) {
        if self.dependencies.dependents.contains_key(&id) {
            self.dependencies.unknown.remove(&id);
            self.dependencies.ended.insert(id, end);
        }
    }

    /// Tells some of those who waited for a job that it has ended.
    pub(super) fn settle_dependencies(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        for _ in 0..LOOKS_PER_STEP {
            let Some((&on, &end)) = self.dependencies.ended.first_key_value() else { return };
            let dependents = self.dependencies.dependents.get(&on);
            match dependents.and_then(|dependents| dependents.first().copied()) {
                Some(job_id) => self.dependency_ended(now, job_id, on, end, effects),
                None => {
                    self.dependencies.ended.remove(&on);
                }
            }
        }
    }

    fn dependency_ended(&mut self, now: Timestamp, id: JobId, on: JobId, end: End, effects: &mut Vec<Effect>) {
        // Out of the index with all that it waits for, and in again with what is left.
        self.unqueue(id);
        self.dependencies.remove(on, id);
        let Some(entry) = self.jobs.get_mut(&id) else { return };
        let must_succeed =
            entry.unmet.iter().any(|other| other.job_id == on && other.condition == DependencyCondition::Succeeded);
        entry.unmet.retain(|other| other.job_id != on);
        entry.ready_since = entry.ready_since.max(end.at);
        if must_succeed && end.state != Some(JobState::Succeeded) {
            let what = end.state.map_or_else(|| "is not on record any more".to_owned(), |state| format!("is {state}"));
            entry.doom = Some(format!("it depends on the success of job {on}, which {what}").into());
        }
        self.admit_queued(now, id, effects);
    }

    /// Asks for dependencies that are not among the live jobs.
    pub(super) fn look_up_dependencies(&mut self, effects: &mut Vec<Effect>) {
        for _ in 0..LOOKS_PER_STEP {
            let Some(job_id) = self.dependencies.unknown.pop_first() else { return };
            if !self.jobs.contains_key(&job_id) {
                effects.push(Effect::LookUpJob { job_id });
            }
        }
    }
}
