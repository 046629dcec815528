//! VMs: what the engine keeps of each, the indexes that they are in, and what their changes mean.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    node::NodeState,
    time::Timestamp,
    vm::{Vm, VmConfig, VmKind, VmState},
};

use super::{
    Decision, Effect, Engine, LostNode, OWNER, OWNER_LABEL, OrderKey, Ticket, Wake,
    jobs::Phase,
    queue::Offer,
    shape::{Class, Constraint, ImageId, NodeIx, Shape, ShapeId, TenantId},
};

/// How long a VM is left alone after its node refused a job for it: a guest that is unwell is given up or well again by then, and
/// the end of one that has died is recorded.
const DISTRUST_FOR: Duration = Duration::from_secs(10);
/// How long a VM is left alone after the registry refused to assign a job to it: news of it should arrive at once.
const SUSPECT_FOR: Duration = Duration::from_secs(1);
/// So many VMs in a row must fail to boot before a job that waits for one is failed.
const MAX_BOOT_FAILURES: u32 = 3;

/// The lane for whose jobs a VM is started.
pub(super) type Lane = (ShapeId, TenantId);

/// What the engine keeps of a VM.
#[derive(Debug, Clone)]
pub(super) struct VmEntry {
    pub(super) revision: u64,
    pub(super) created_at: Timestamp,
    /// Since when it is in its state.
    pub(super) since: Timestamp,
    pub(super) class: Class,
    pub(super) node: NodeIx,
    pub(super) jobs_assigned: u32,
    pub(super) state: VmState,
    pub(super) ours: bool,
    /// The registry refused an assignment and no news has come since.
    pub(super) suspect: bool,
    /// Its end has been asked for.
    pub(super) evicted: bool,
    /// The job that is being assigned to it.
    pub(super) reserved: Option<JobId>,
    /// While it is Starting.
    pub(super) made_for: Option<Lane>,
    /// How long it has to end, while it is Draining and somebody said so.
    pub(super) grace: Option<Duration>,
    /// When it is looked at again.
    pub(super) timer: Option<Timestamp>,
    /// What it is made of, while it is Starting: what its node must be told.
    pub(super) config: Option<Box<VmConfig>>,
    /// Why it is in its state, while it is Draining.
    pub(super) reason: Box<str>,
    /// Why it was started where it is, until its first job.
    pub(super) why: Option<Box<Decision>>,
}

impl VmEntry {
    pub(super) fn is_free(&self) -> bool {
        self.state.takes_jobs() && self.reserved.is_none() && !self.suspect && !self.evicted
    }

    /// Whether any job of its class may have it. A fresh VM that a user started waits for that user's jobs.
    pub(super) fn is_on_offer(&self) -> bool {
        self.is_free() && (self.ours || self.class.kind == VmKind::Service)
    }

    fn lives_on(&self) -> bool {
        self.state != VmState::Draining && !self.evicted
    }
}

/// A free VM of ours that may be ended for others, the one that is free longest first.
pub(super) type Evictable = (Timestamp, VmId);

#[derive(Debug, Clone)]
pub(super) struct Creation {
    pub(super) config: VmConfig,
    pub(super) class: Class,
    pub(super) node: NodeIx,
    pub(super) made_for: Option<Lane>,
    pub(super) why: Option<Box<Decision>>,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct BootFailures {
    pub(super) count: u32,
    pub(super) not_before: Timestamp,
    /// The registry's revision of the latest that counted.
    revision: u64,
}

/// Counts that decisions need.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct VmCounts {
    /// Live service VMs that go on, by class, with those being created.
    pub(super) services: BTreeMap<Class, u32>,
    /// Those of ours, by image.
    pub(super) our_services: BTreeMap<ImageId, u32>,
    /// Of ours those that are free, and those being started for no job in particular.
    pub(super) warm: BTreeMap<Class, u32>,
    /// VMs of ours being started for no job in particular: a job that needs one takes it over.
    pub(super) unclaimed: BTreeMap<Class, BTreeMap<NodeIx, BTreeSet<VmId>>>,
}

impl VmCounts {
    pub(super) fn creation(&mut self, creation: &Creation, change: i32) {
        if creation.class.kind == VmKind::Service {
            count(&mut self.services, creation.class, change);
            if is_ours(&creation.config) {
                count(&mut self.our_services, creation.class.image, change);
                if creation.made_for.is_none() {
                    count(&mut self.warm, creation.class, change);
                }
            }
        }
    }

    pub(super) fn vm(&mut self, id: VmId, vm: &VmEntry, change: i32) {
        if !vm.lives_on() {
            return;
        }
        let unclaimed = vm.ours && vm.state == VmState::Starting && vm.made_for.is_none();
        if vm.class.kind == VmKind::Service {
            count(&mut self.services, vm.class, change);
            if vm.ours {
                count(&mut self.our_services, vm.class.image, change);
                if unclaimed || vm.is_free() {
                    count(&mut self.warm, vm.class, change);
                }
            }
        }
        if unclaimed {
            let nodes = self.unclaimed.entry(vm.class).or_default();
            let vms = nodes.entry(vm.node).or_default();
            if change > 0 {
                vms.insert(id);
            } else {
                vms.remove(&id);
                if vms.is_empty() {
                    nodes.remove(&vm.node);
                }
                if nodes.is_empty() {
                    self.unclaimed.remove(&vm.class);
                }
            }
        }
    }
}

fn count<K: Ord>(counts: &mut BTreeMap<K, u32>, key: K, change: i32) {
    let before = counts.get(&key).copied().unwrap_or(0);
    match before.saturating_add_signed(change) {
        0 => {
            counts.remove(&key);
        }
        after => {
            counts.insert(key, after);
        }
    }
}

pub(super) fn is_ours(config: &VmConfig) -> bool {
    config.labels.get(OWNER_LABEL).is_some_and(|owner| owner == OWNER)
}

impl Engine {
    pub(super) fn on_vm(&mut self, now: Timestamp, vm: Vm, effects: &mut Vec<Effect>) {
        let id = vm.id;
        if self.vms.get(&id).is_some_and(|before| before.revision >= vm.revision) {
            return;
        }
        let before = self.remove_vm(id);
        let class = self.class_of(&vm.config);
        let mut entry = VmEntry {
            revision: vm.revision,
            created_at: vm.created_at,
            since: vm.updated_at,
            class,
            node: self.fleet.ix(&vm.node_id),
            jobs_assigned: vm.jobs_assigned,
            state: vm.state,
            ours: is_ours(&vm.config),
            suspect: self.distrusted.get(&id).is_some_and(|until| now < *until),
            evicted: false,
            reserved: None,
            made_for: None,
            grace: vm.stop_grace,
            timer: None,
            config: None,
            reason: "".into(),
            why: None,
        };
        if vm.state.is_terminal() {
            return self.on_vm_end(now, &vm, &entry, before, effects);
        }
        let (mut made_for, mut shortened, mut vcpus) = (None, false, class.vcpus);
        if let Some(before) = before {
            // As they were counted: it may have been resized since.
            vcpus = before.class.vcpus;
            // Told already, perhaps with more patience.
            shortened = before.state == VmState::Draining && before.grace != entry.grace;
            // News may tell of an assignment together with its end: then the VM is free once more.
            let assigned_since = vm.jobs_assigned != before.jobs_assigned;
            entry.reserved = before.reserved.filter(|_| vm.state.takes_jobs() && !assigned_since);
            entry.why = before.why.filter(|_| vm.state == VmState::Starting || vm.state.takes_jobs());
            made_for = before.made_for;
        }
        match vm.state {
            VmState::Starting => {
                (entry.made_for, made_for) = (made_for, None);
                entry.config = Some(Box::new(vm.config));
            }
            VmState::Draining => entry.reason = vm.reason.into(),
            VmState::Ready | VmState::Busy | VmState::Idle => {
                self.boot_failures.remove(&class.boot());
            }
            VmState::Terminated | VmState::Failed => {}
        }
        if vm.state != VmState::Starting {
            self.orders.told.remove(&OrderKey::Start(id));
        }
        self.insert_vm(id, entry);
        self.end_boot(made_for, vcpus);
        if shortened {
            self.order_anew(now, OrderKey::Stop(id));
        }
        self.want_vm_orders(now, id);
        self.vm_changed(now, id, effects);
    }

    /// The vmhost reports an attempt before its VM, so a job that still counts on a VM that has ended has no reporter left.
    fn on_vm_end(
        &mut self,
        now: Timestamp,
        vm: &Vm,
        entry: &VmEntry,
        before: Option<VmEntry>,
        effects: &mut Vec<Effect>,
    ) {
        self.forget_orders(&[OrderKey::Start(vm.id), OrderKey::Stop(vm.id)]);
        if let Some(before) = before {
            self.end_boot(before.made_for, before.class.vcpus);
            let failed_to_boot = before.state == VmState::Starting && vm.state == VmState::Failed;
            if failed_to_boot && entry.ours && !self.fleet.is_lost(entry.node) {
                self.on_boot_failure(now, entry.class, before.revision, vm, effects);
            }
        }
        self.offer_room(entry.node);
        self.offer_to_its_jobs(vm.id);
        let why = if vm.reason.is_empty() { String::new() } else { format!(": {}", vm.reason) };
        let reason = format!("its VM {} is {}{why}", vm.id, vm.state);
        for (job_id, attempt) in self.attempts_on(vm.id) {
            let reason = reason.clone();
            effects.push(Effect::LoseAttempt { job_id, attempt, started: true, reason, lost: None });
        }
    }

    /// Waits longer after each failure in a row; from the third on each failure also fails a job that waits for this image,
    /// so that a broken image ends its jobs with a reason. VMs that were starting together, as on a node whose vmhost was away for
    /// long, are one failure: in a row is what began after the one before had failed. `began`: the revision as of which it was Starting.
    fn on_boot_failure(&mut self, now: Timestamp, class: Class, began: u64, vm: &Vm, effects: &mut Vec<Effect>) {
        let failures = self.boot_failures.entry(class.boot()).or_default();
        if began <= failures.revision {
            return;
        }
        failures.revision = vm.revision;
        failures.count += 1;
        failures.not_before = Timestamp(now.0 + (500 << failures.count.min(6)));
        let (count, not_before) = (failures.count, failures.not_before);
        self.arm(not_before, Wake::BootPause(class.boot()));
        if count < MAX_BOOT_FAILURES || self.lead.is_none() {
            return;
        }
        let reason = format!("{count} VMs in a row failed to start; the last: {}", vm.reason);
        if let Some(job_id) = self.queue.first_waiting_for(&class) {
            self.fail_job(job_id, reason, false, effects);
        }
    }

    /// What a change of a VM that lives may mean to others and to itself.
    pub(super) fn vm_changed(&mut self, now: Timestamp, id: VmId, effects: &mut Vec<Effect>) {
        self.tend(now, id, effects);
        let Some(vm) = self.vms.get(&id) else { return };
        let (node, on_offer, class) = (vm.node, vm.is_on_offer(), vm.class);
        if self.fleet.place(node).given_up {
            self.give_up_vm(id, effects);
        }
        if on_offer {
            self.queue.offer(class.image, Offer::Vm(class));
        }
        self.offer_to_its_jobs(id);
    }

    /// Jobs that wait for this VM and no other are looked at.
    pub(super) fn offer_to_its_jobs(&mut self, id: VmId) {
        if let Some(shape) = self.queue.find(&Shape::Target(id)) {
            self.queue.open(shape);
        }
    }

    /// A VM less: room on its node, and a slot.
    fn offer_room(&mut self, node: NodeIx) {
        if self.live_vms() + 1 >= self.settings.max_vms as usize {
            return self.queue.offer_to_all(Offer::Room);
        }
        for image in self.fleet.images_of(node) {
            self.queue.offer(image, Offer::Room);
        }
    }

    pub(super) fn live_vms(&self) -> usize {
        self.vms.len() + self.creations.len()
    }

    /// The node has been Lost for too long.
    pub(super) fn give_up_vm(&mut self, vm_id: VmId, effects: &mut Vec<Effect>) {
        let Some(vm) = self.vms.get(&vm_id) else { return };
        let (reason, lost) = self.lost(vm.node);
        for (job_id, attempt) in self.attempts_on(vm_id) {
            let (reason, lost) = (reason.clone(), lost.clone());
            effects.push(Effect::LoseAttempt { job_id, attempt, started: true, reason, lost });
        }
        effects.push(Effect::FailVm { vm_id, reason, lost });
    }

    /// That a node is given up, in words, and what the registry is to check.
    pub(super) fn lost(&self, node: NodeIx) -> (String, Option<LostNode>) {
        let node_id = &self.fleet.place(node).id;
        let incarnation = self.nodes().get(node_id).map(|entry| entry.node.incarnation);
        let lost = incarnation.map(|incarnation| LostNode { node_id: node_id.clone(), incarnation });
        (format!("its node {node_id} is lost"), lost)
    }

    pub(super) fn on_vm_requested(&mut self, vm_id: VmId, config: VmConfig, effects: &mut Vec<Effect>) {
        match self.find_room(&config) {
            Ok((class, node)) => self.create_vm(Some(vm_id), config, class, node, None, None, effects),
            Err(error) => effects.push(Effect::RefuseVm { vm_id, error }),
        }
    }

    /// The node on which a user's VM would be started now; whether this engine leads does not matter.
    ///
    /// # Errors
    /// OVERLOADED with what it would wait for.
    pub fn place(&mut self, config: &VmConfig) -> Result<NodeId, Error> {
        let (_, node) = self.find_room(config)?;
        Ok(self.fleet.place(node).id.clone())
    }

    pub(super) fn class_of(&mut self, config: &VmConfig) -> Class {
        let (image, egress) = (ImageId(self.images.number(&config.image)), self.egress_id(&config.egress));
        Class::of(config, image, egress, self.volumes_id(&config.volumes))
    }

    fn find_room(&mut self, config: &VmConfig) -> Result<(Class, NodeIx), Error> {
        let class = self.class_of(config);
        let site = self.fleet.use_site(&Constraint::of_vm(config));
        let room = self.room_for(site, &class).map_err(|wait| self.describe_wait(wait, site, &class));
        self.fleet.leave_site(site);
        match room {
            Ok((_, _, node)) => Ok((class, node)),
            Err(waits_for) => {
                let message = format!("there is no room for another VM: it would wait for {waits_for}");
                Err(Error::new(Reason::Overloaded, message).with("limit", self.settings.max_vms))
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of what is created; a struct would be filled in once and taken apart at once"
    )]
    pub(super) fn create_vm(
        &mut self,
        vm_id: Option<VmId>,
        config: VmConfig,
        class: Class,
        node: NodeIx,
        made_for: Option<Lane>,
        why: Option<Box<Decision>>,
        effects: &mut Vec<Effect>,
    ) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.fleet.occupy(node, class.memory_mib);
        self.begin_boot(made_for, class.vcpus);
        let node_id = self.fleet.place(node).id.clone();
        effects.push(Effect::CreateVm { ticket, vm_id, config: config.clone(), node_id });
        let creation = Creation { config, class, node, made_for, why };
        self.counts.creation(&creation, 1);
        self.creations.insert(ticket, creation);
    }

    pub(super) fn on_created(
        &mut self,
        now: Timestamp,
        ticket: Ticket,
        result: Result<Vm, Error>,
        effects: &mut Vec<Effect>,
    ) {
        let creation = self.creations.remove(&ticket);
        if let Some(creation) = &creation {
            self.fleet.release(creation.node, creation.class.memory_mib);
            self.counts.creation(creation, -1);
        }
        let (mut made_for, why) = creation.as_ref().map_or((None, None), |c| (c.made_for, c.why.clone()));
        let vcpus = creation.as_ref().map_or(0, |creation| creation.class.vcpus);
        if let Ok(vm) = result {
            let id = vm.id;
            // One that the watch has brought and taken away again has ended meanwhile.
            let ended = vm.revision <= self.watched_vms && !self.vms.contains_key(&id);
            if !ended && !vm.state.is_terminal() {
                self.on_vm(now, vm, effects);
            }
            let claims = |vm: &&VmEntry| vm.state == VmState::Starting && vm.made_for.is_none() && made_for.is_some();
            if self.vms.get(&id).filter(claims).is_some() {
                let lane = made_for.take();
                self.change_vm(id, |entry| entry.made_for = lane);
            }
            if let Some(entry) =
                self.vms.get_mut(&id).filter(|entry| entry.state == VmState::Starting || entry.is_free())
            {
                entry.why = why;
            }
        }
        self.end_boot(made_for, vcpus);
        if let Some(creation) = creation {
            self.offer_room(creation.node);
        }
    }

    pub(super) fn begin_boot(&mut self, made_for: Option<Lane>, vcpus: u32) {
        if let Some((shape, tenant)) = made_for {
            let site = self.queue.count_boot(shape, tenant, vcpus, 1);
            self.leave_site(site);
        }
    }

    pub(super) fn end_boot(&mut self, made_for: Option<Lane>, vcpus: u32) {
        if let Some((shape, tenant)) = made_for {
            let site = self.queue.count_boot(shape, tenant, vcpus, -1);
            self.leave_site(site);
        }
    }

    pub(super) fn forget_motion_of_vm(&mut self, id: VmId) {
        let Some(mut entry) = self.remove_vm(id) else { return };
        let made_for = entry.made_for.take();
        (entry.reserved, entry.suspect, entry.evicted, entry.timer) = (None, false, false, None);
        let vcpus = entry.class.vcpus;
        self.insert_vm(id, entry);
        self.end_boot(made_for, vcpus);
    }

    /// The attempts that are under way on a VM, as far as is known.
    pub(super) fn attempts_on(&self, vm_id: VmId) -> Vec<(JobId, u32)> {
        let jobs = self.jobs_on_vm.get(&vm_id).into_iter().flatten();
        jobs.filter_map(|job_id| Some((*job_id, self.jobs.get(job_id)?.attempt))).collect()
    }

    /// The VM that an Assigned or Running job has.
    pub(super) fn vm_of(&self, job_id: JobId) -> Option<VmId> {
        match self.jobs.get(&job_id)?.phase {
            Phase::Given { vm_id, .. } => Some(vm_id),
            Phase::Held | Phase::Waiting | Phase::Placing(_) | Phase::Ending => None,
        }
    }

    /// Its node would not take a job for it, whatever the registry shows of it next.
    pub(super) fn distrust(&mut self, now: Timestamp, vm_id: VmId) {
        let until = now.plus(DISTRUST_FOR);
        self.distrusted.insert(vm_id, until);
        self.arm(until, Wake::Trust(vm_id));
    }

    pub(super) fn suspect(&mut self, now: Timestamp, vm_id: VmId) {
        self.change_vm(vm_id, |entry| (entry.reserved, entry.suspect) = (None, true));
        self.arm(now.plus(SUSPECT_FOR), Wake::Trust(vm_id));
    }

    pub(super) fn change_vm(&mut self, vm_id: VmId, change: impl FnOnce(&mut VmEntry)) {
        if let Some(mut entry) = self.remove_vm(vm_id) {
            change(&mut entry);
            self.insert_vm(vm_id, entry);
        }
    }

    /// The only place where a VM enters the indexes …
    fn insert_vm(&mut self, id: VmId, entry: VmEntry) {
        self.counts.vm(id, &entry, 1);
        self.fleet.occupy(entry.node, entry.class.memory_mib);
        self.fleet.place_mut(entry.node).vms.insert(id);
        if entry.is_on_offer() {
            self.fleet.add_free(entry.node, entry.class, id);
        }
        if entry.ours && entry.is_free() {
            self.evictable.insert((entry.since, id));
            self.fleet.place_mut(entry.node).evictable_mib += u64::from(entry.class.memory_mib);
        }
        self.vms.insert(id, entry);
    }

    /// … and the only one where it leaves them.
    fn remove_vm(&mut self, id: VmId) -> Option<VmEntry> {
        let mut entry = self.vms.remove(&id)?;
        self.counts.vm(id, &entry, -1);
        self.fleet.release(entry.node, entry.class.memory_mib);
        self.fleet.place_mut(entry.node).vms.remove(&id);
        if entry.is_on_offer() {
            self.fleet.remove_free(entry.node, entry.class, id);
        }
        if entry.ours && entry.is_free() {
            self.evictable.remove(&(entry.since, id));
            let place = self.fleet.place_mut(entry.node);
            place.evictable_mib = place.evictable_mib.saturating_sub(entry.class.memory_mib.into());
        }
        if let Some(at) = entry.timer.take() {
            self.wakes.remove(&(at, Wake::Vm(id)));
        }
        Some(entry)
    }

    pub(super) fn is_draining(&self, node: NodeIx) -> bool {
        self.fleet.place(node).state == Some(NodeState::Draining)
    }
}
