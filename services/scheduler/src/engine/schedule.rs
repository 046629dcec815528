//! Which waiting job is next, and what it is given: a free VM, or one that is started for it.

use blixard::{
    error::Reason,
    id::{JobId, VmId},
    job::Isolation,
    time::Timestamp,
    vm::VmKind,
};

use super::{
    Decision, Effect, Engine, LOOKS_PER_PLACEMENT, LOOKS_PER_STEP,
    jobs::Phase,
    nodes::could_ever_fit,
    queue::Wait,
    shape::{Class, NodeIx, Shape, ShapeId, SiteId},
};

impl Engine {
    /// Looks at the open shapes, the one whose turn it is first, until the step's bound is reached.
    pub(super) fn schedule(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        self.review_kept();
        let mut budget = LOOKS_PER_STEP.saturating_sub(self.queue.sweep(LOOKS_PER_STEP)).max(LOOKS_PER_PLACEMENT);
        while budget > 0
            && let Some(id) = self.queue.next()
        {
            let before = effects.len();
            self.look_at(now, id, effects);
            let cost = if effects.len() > before { LOOKS_PER_PLACEMENT } else { 1 };
            budget = budget.saturating_sub(cost);
        }
        // Only when every shape has been looked at is a VM that is still free one that nobody can have.
        if !self.queue.has_work() {
            for (id, wait) in std::mem::take(&mut self.in_need) {
                self.evict_for(id, wait, effects);
            }
        }
    }

    fn look_at(&mut self, now: Timestamp, id: ShapeId, effects: &mut Vec<Effect>) {
        self.in_need.remove(&id);
        let Some(shape) = self.queue.shapes.get(&id).map(|waiting| waiting.shape) else { return };
        let Some(head) = self.queue.head(id) else { return self.queue.close(id, Wait::Turn) };
        let (site, isolation) = match shape {
            Shape::Target(vm_id) => return self.look_at_target(now, id, head, vm_id, effects),
            Shape::Like { site, isolation, .. } => (site, isolation),
        };
        if let Some(warm) = self.fleet.warm(&shape) {
            let decision = self.explain_warm(now, head, &warm);
            return self.assign(head, warm.vm_id, decision, effects);
        }
        let Some(class) = shape.wanted() else { return };
        let Some((tenant, job_id)) = self.queue.head_to_start(id) else { return self.queue.close(id, Wait::Boot) };
        if let Some(vm_id) = self.unclaimed(&shape, site) {
            self.change_vm(vm_id, |entry| entry.made_for = Some((id, tenant)));
            return self.begin_boot(Some((id, tenant)), class.vcpus);
        }
        match self.start_for(now, id, isolation, site, &class) {
            Ok(node) => {
                self.give_back_room(id);
                if let Some(waiting) = self.queue.shapes.get_mut(&id) {
                    waiting.started_at = now;
                }
                let why = self.explain_start(now, job_id, site, &class, node);
                let config = self.config_of(&class, &self.fleet.constraint(site));
                self.create_vm(None, config, class, node, Some((id, tenant)), Some(why), effects);
            }
            Err(wait) => {
                if let Some(reason) = self.never(id, site, &class, isolation) {
                    return self.fail_job(job_id, reason, false, effects);
                }
                if wait.for_room() {
                    self.in_need.insert(id, wait);
                }
                if wait == Wait::Room {
                    self.keep_room(now, id, job_id, site, &class);
                }
                self.queue.close(id, wait);
            }
        }
    }

    fn look_at_target(&mut self, now: Timestamp, id: ShapeId, job_id: JobId, vm_id: VmId, effects: &mut Vec<Effect>) {
        match self.vms.get(&vm_id) {
            Some(vm) if vm.is_free() && self.fleet.takes_attempts(vm.node) => {
                let decision = self.explain_target(now, job_id, vm_id, vm);
                self.assign(job_id, vm_id, decision, effects);
            }
            Some(_) => self.queue.close(id, Wait::Target(vm_id)),
            None => self.fail_job(job_id, format!("its target VM {vm_id} is gone"), false, effects),
        }
    }

    fn assign(&mut self, job_id: JobId, vm_id: VmId, decision: Box<Decision>, effects: &mut Vec<Effect>) {
        self.unqueue(job_id);
        let Some(entry) = self.jobs.get_mut(&job_id) else { return };
        entry.phase = Phase::Placing(vm_id);
        let (attempt, tenant, vcpus) = (entry.attempt + 1, entry.tenant, entry.vcpus);
        self.queue.count_job(tenant, vcpus, 1);
        self.change_vm(vm_id, |entry| entry.reserved = Some(job_id));
        effects.push(Effect::Assign { job_id, vm_id, attempt, decision });
    }

    /// A VM that is being started for nobody in particular and would do.
    fn unclaimed(&self, shape: &Shape, site: SiteId) -> Option<VmId> {
        let Shape::Like { image, egress, volumes, memory_mib, .. } = *shape else { return None };
        let class = |kind, memory_mib, vcpus| Class { image, egress, volumes, kind, memory_mib, vcpus };
        let from = class(VmKind::Ephemeral, memory_mib, 0);
        let classes = self.counts.unclaimed.range(from..=class(VmKind::Service, u32::MAX, u32::MAX));
        let would_do = classes.filter(|(class, _)| shape.takes(class)).flat_map(|(_, nodes)| nodes);
        let mut nodes = would_do.take(LOOKS_PER_STEP);
        let (_, vms) = nodes.find(|(ix, _)| self.fleet.is_ready(**ix) && self.fleet.allows(site, **ix))?;
        vms.first().copied()
    }

    /// Where to start a VM for jobs like these, or why none is.
    fn start_for(
        &self,
        now: Timestamp,
        id: ShapeId,
        isolation: Isolation,
        site: SiteId,
        class: &Class,
    ) -> Result<NodeIx, Wait> {
        if self.boot_pause(now, class.boot()) {
            return Err(Wait::BootPause);
        }
        if isolation == Isolation::Minimal {
            if !self.settings.auto_scaling {
                return Err(Wait::AutoScalingOff);
            }
            let most = self.settings.max_service_vms;
            if most > 0 && self.our_services(class.image) >= most {
                return Err(Wait::MaxServiceVms);
            }
        }
        match self.room_for(site, class) {
            Err(Wait::Room) => self.kept_room(id, class).ok_or(Wait::Room),
            room => room.map(|(_, _, node)| node),
        }
    }

    pub(super) fn room_for(&self, site: SiteId, class: &Class) -> Result<(u32, u64, NodeIx), Wait> {
        if self.fleet.nodes.is_empty() {
            return Err(Wait::NoNode);
        }
        if self.live_vms() >= self.settings.max_vms as usize {
            return Err(Wait::MaxVms);
        }
        self.fleet.room(site, class, self.settings.placement).ok_or(Wait::Room)
    }

    /// Why no VM can ever be had for these jobs, if so. Found anew only when a node has changed what it offers.
    fn never(&mut self, id: ShapeId, site: SiteId, class: &Class, isolation: Isolation) -> Option<String> {
        let version = self.fleet.version;
        if self.queue.shapes.get(&id)?.possible_at == Some(version) {
            return None;
        }
        let constraint = self.fleet.constraint(site);
        let config = self.config_of(class, &constraint);
        let error = could_ever_fit(self.nodes(), "spec", &config, &constraint.labels).err();
        // A service VM that lives, wherever its image came from, is as good as a node; but none lives on a node that is not there.
        let service = |other: &Class| other.vcpus >= class.vcpus && other.memory_mib >= class.memory_mib;
        let from = Class { kind: VmKind::Service, vcpus: 0, ..*class };
        let to = Class { kind: VmKind::Service, vcpus: u32::MAX, memory_mib: u32::MAX, ..*class };
        let lives = isolation != Isolation::Maximum && self.counts.services.range(from..=to).any(|(c, _)| service(c));
        match error {
            Some(error) if !lives || error.reason == Reason::NodeNotFound => Some(error.message),
            Some(_) | None => {
                if let Some(waiting) = self.queue.shapes.get_mut(&id) {
                    // Such a VM may end without a node's changing: then look again.
                    waiting.possible_at = error.is_none().then_some(version);
                }
                None
            }
        }
    }
}
