//! How many VMs of ours there are when nobody waits for one: warm pools, scale-down, recycling, emptying of nodes, eviction.

use std::collections::BTreeMap;

use blixard::{
    egress::Egress,
    id::VmId,
    time::Timestamp,
    vm::{VmConfig, VmKind, VmState},
    volume::Volumes,
};

use super::{
    Effect, Engine, LOOKS_PER_STEP, OWNER, OWNER_LABEL, Wake,
    queue::Wait,
    shape::{
        BootId, Class, Constraint, EgressId, ImageId, NO_EGRESS, NO_VOLUMES, NodeIx, Shape, ShapeId, SiteId, VolumesId,
    },
    vms::VmEntry,
};

/// What is to become of a VM that nobody has asked anything of.
enum Duty {
    Keep,
    LookAgain(Timestamp),
    Drain(String),
}

impl Engine {
    /// Ends a VM that has served its time, or notes when to look again.
    pub(super) fn tend(&mut self, now: Timestamp, id: VmId, effects: &mut Vec<Effect>) {
        if self.lead.is_none() {
            return;
        }
        let Some(vm) = self.vms.get(&id) else { return };
        let (duty, timer) = (self.duty(now, vm), vm.timer);
        if let Some(at) = timer {
            self.wakes.remove(&(at, Wake::Vm(id)));
        }
        let next = if let Duty::LookAgain(at) = duty { Some(at) } else { None };
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.timer = next;
        }
        match duty {
            Duty::Keep => {}
            Duty::LookAgain(at) => self.arm(at, Wake::Vm(id)),
            Duty::Drain(reason) => self.drain(id, reason, effects),
        }
    }

    pub(super) fn on_vm_timer(&mut self, now: Timestamp, id: VmId, effects: &mut Vec<Effect>) {
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.timer = None;
        }
        self.tend(now, id, effects);
    }

    fn duty(&self, now: Timestamp, vm: &VmEntry) -> Duty {
        if vm.evicted || vm.state == VmState::Draining || self.fleet.is_lost(vm.node) {
            return Duty::Keep;
        }
        if self.is_draining(vm.node) {
            let deadline = self.fleet.node(vm.node).and_then(|node| node.drain_deadline);
            if deadline.is_some_and(|deadline| deadline <= now) {
                return Duty::Drain("its node is drained, and the deadline has passed".to_owned());
            }
            if vm.is_free() || vm.state == VmState::Starting {
                return Duty::Drain("its node is drained".to_owned());
            }
        }
        if !vm.ours || !vm.is_free() {
            return Duty::Keep;
        }
        let service = vm.class.kind == VmKind::Service;
        let limit = self.settings.recycle_after_jobs;
        if service && limit > 0 && vm.jobs_assigned >= limit {
            return Duty::Drain(format!("replaced after {} jobs", vm.jobs_assigned));
        }
        let old_at = self.settings.recycle_after.filter(|_| service).map(|age| vm.created_at.plus(age));
        if old_at.is_some_and(|at| at <= now) {
            return Duty::Drain("replaced: it is old enough".to_owned());
        }
        let idle_at = self.settings.auto_scaling.then(|| vm.since.plus(self.settings.scale_down_after));
        match idle_at {
            Some(at) if at > now => Duty::LookAgain(old_at.map_or(at, |old| old.min(at))),
            // Nobody has looked yet whether a job that waits can have it.
            Some(_) if self.queue.anyone_takes(&vm.class) => Duty::LookAgain(now.plus(self.settings.scale_down_after)),
            Some(_) if !self.is_kept_warm(&vm.class) => Duty::Drain("idle, and nothing needed it".to_owned()),
            Some(_) | None => old_at.map_or(Duty::Keep, Duty::LookAgain),
        }
    }

    /// Whether a free VM of this class is one of those that are kept warm, and none too many.
    fn is_kept_warm(&self, class: &Class) -> bool {
        let wanted = self.pre_warm.iter().find(|(image, _)| *image == class.image).map_or(0, |(_, count)| *count);
        let defaults = self.settings.defaults;
        let counts = (class.kind, class.egress, class.volumes) == (VmKind::Service, NO_EGRESS, NO_VOLUMES)
            && class.memory_mib >= defaults.memory_mib
            && class.vcpus >= defaults.vcpus;
        counts && self.warm_of(class.image) <= wanted
    }

    /// VMs of ours of at least the default size that are free or being started for no job in particular.
    fn warm_of(&self, image: ImageId) -> u32 {
        let defaults = self.settings.defaults;
        let class = |memory_mib, vcpus| Class { memory_mib, vcpus, ..self.pre_warmed(image) };
        let large = self.counts.warm.range(class(defaults.memory_mib, 0)..=class(u32::MAX, u32::MAX));
        large.filter(|(class, _)| class.vcpus >= defaults.vcpus).map(|(_, count)| count).sum()
    }

    /// Fills up the warm pools, unless somebody waits for the room.
    pub(super) fn pre_warm(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        if self.queue.hungry > 0 {
            return;
        }
        for at in 0..self.pre_warm.len() {
            let (image, wanted) = self.pre_warm[at];
            let class = self.pre_warmed(image);
            let missing = wanted.saturating_sub(self.warm_of(image)).min(16);
            for _ in 0..missing {
                let most = self.settings.max_service_vms.max(wanted);
                let full = self.settings.max_service_vms > 0 && self.our_services(image) >= most;
                if full || self.boot_pause(now, class.boot()) {
                    break;
                }
                let site = self.fleet.use_site(&Constraint::default());
                let room = self.room_for(site, &class);
                self.fleet.leave_site(site);
                let Ok((_, _, node)) = room else { break };
                let config = self.config_of(&class, &Constraint::default());
                self.create_vm(None, config, class, node, None, None, effects);
            }
        }
    }

    fn pre_warmed(&self, image: ImageId) -> Class {
        let defaults = self.settings.defaults;
        let (memory_mib, vcpus) = (defaults.memory_mib, defaults.vcpus);
        Class { image, egress: NO_EGRESS, volumes: NO_VOLUMES, kind: VmKind::Service, memory_mib, vcpus }
    }

    pub(super) fn our_services(&self, image: ImageId) -> u32 {
        self.counts.our_services.get(&image).copied().unwrap_or(0)
    }

    pub(super) fn boot_pause(&self, now: Timestamp, boot: BootId) -> bool {
        self.boot_failures.get(&boot).is_some_and(|failures| failures.not_before > now)
    }

    /// The number of a policy.
    pub(super) fn egress_id(&mut self, egress: &Egress) -> EgressId {
        EgressId(self.egresses.number(&egress.to_string()))
    }

    /// The policy of a class's VMs.
    fn egress_of(&self, class: &Class) -> Egress {
        // Whatever has a number is the text of one.
        self.egresses.name(class.egress.0).parse().unwrap_or_default()
    }

    /// The number of a set of volumes.
    pub(super) fn volumes_id(&mut self, volumes: &Volumes) -> VolumesId {
        VolumesId(self.volume_sets.number(volumes))
    }

    /// The VM of ours to start.
    pub(super) fn config_of(&self, class: &Class, constraint: &Constraint) -> VmConfig {
        VmConfig {
            kind: class.kind,
            image: self.images.name(class.image.0).to_owned(),
            vcpus: class.vcpus,
            memory_mib: class.memory_mib,
            labels: BTreeMap::from([(OWNER_LABEL.to_owned(), OWNER.to_owned())]),
            node_id: constraint.node_id.clone(),
            egress: self.egress_of(class),
            volumes: self.volume_sets.name(class.volumes.0).iter().cloned().collect(),
        }
    }

    pub(super) fn drain(&mut self, vm_id: VmId, reason: String, effects: &mut Vec<Effect>) {
        self.change_vm(vm_id, |entry| entry.evicted = true);
        effects.push(Effect::DrainVm { vm_id, reason });
    }

    /// Makes room for a shape that waits: ends one idle VM of ours, unless one is ending for it already.
    pub(super) fn evict_for(&mut self, id: ShapeId, wait: Wait, effects: &mut Vec<Effect>) {
        let Some(waiting) = self.queue.shapes.get(&id) else { return };
        let (Shape::Like { site, .. }, Some(class)) = (waiting.shape, waiting.shape.wanted()) else { return };
        let still = waiting.evicting.and_then(|vm_id| self.vms.get(&vm_id));
        if !self.settings.auto_scaling || still.is_some_and(|vm| vm.evicted || vm.state == VmState::Draining) {
            return;
        }
        let room = self.fleet.room(site, &class, self.settings.placement).is_some();
        let helps = |vm: &VmEntry| match wait {
            Wait::MaxVms => room || self.makes_room(vm.node, site, &class),
            Wait::MaxServiceVms => vm.class.kind == VmKind::Service && vm.class.image == class.image,
            _ => self.makes_room(vm.node, site, &class),
        };
        let mut idle = self.evictable.iter().take(LOOKS_PER_STEP).map(|(_, vm_id)| *vm_id);
        let oldest = idle.find(|vm_id| self.vms.get(vm_id).is_some_and(|vm| !self.fleet.is_lost(vm.node) && helps(vm)));
        if let Some(vm_id) = oldest {
            self.drain(vm_id, "idle, and its room is needed".to_owned(), effects);
            if let Some(waiting) = self.queue.shapes.get_mut(&id) {
                waiting.evicting = Some(vm_id);
            }
        }
    }

    fn makes_room(&self, node: NodeIx, site: SiteId, class: &Class) -> bool {
        self.fleet.could_make_room(node, site, class)
    }
}
