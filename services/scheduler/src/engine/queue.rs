//! Jobs that wait: a *lane* for each tenant and shape, in order of urgency; the lanes of a shape in *line* by fair share.
//!
//! A shape is *open* while it may be that one of its jobs can be placed. One that was looked at in vain is closed until
//! something is *offered* that may change it (a free VM, room, a slot) or a lane joins its line. So a decision looks at shapes,
//! never at jobs, and only at those for which something has changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use blixard::{
    id::{JobId, VmId},
    time::Timestamp,
};

use super::shape::{Class, ImageId, Shape, ShapeId, SiteId, TenantId};

/// Urgency: queued_at − priority × ageing in milliseconds, then the order in which the engine heard of the jobs.
pub(super) type Key = (i64, u64);

/// A lane's place in line: vCPUs that the tenant has, its most urgent job, whose it is.
pub(super) type Position = (u64, Key, TenantId);

/// Why a shape was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// It is open: nobody has looked since something changed.
    Turn,
    /// A VM was started for each of its jobs.
    Boot,
    BootPause,
    AutoScalingOff,
    MaxVms,
    MaxServiceVms,
    NoNode,
    Room,
    Target(VmId),
}

impl Wait {
    /// Whether a VM's end may change it.
    pub(super) fn for_room(self) -> bool {
        matches!(self, Self::MaxVms | Self::MaxServiceVms | Self::NoNode | Self::Room)
    }
}

/// What may be of use to a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// A free VM.
    Vm(Class),
    /// Memory, or a slot.
    Room,
    Anything,
}

/// A walk through an image's shapes that opens those to which the offer may be of use.
#[derive(Debug)]
struct Sweep {
    offer: Offer,
    next: ShapeId,
    left: usize,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) shape: Shape,
    /// Queued jobs of this shape, in line or not.
    users: u32,
    lanes: BTreeMap<TenantId, Lane>,
    /// Lanes whose head may be given a VM.
    line: BTreeSet<Position>,
    /// Lanes for which a VM may be started.
    starting_line: BTreeSet<Position>,
    open: Option<Position>,
    pub(super) wait: Wait,
    /// VMs being started for it.
    boots: u32,
    /// When one was started last.
    pub(super) started_at: Timestamp,
    /// A VM that was ended to make room for it.
    pub(super) evicting: Option<VmId>,
    /// The fleet's version at which it was last found that some node could ever take it.
    pub(super) possible_at: Option<u64>,
}

impl Waiting {
    /// Whether it is to be looked at.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }
}

#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) jobs: BTreeMap<Key, JobId>,
    /// VMs being started for its jobs.
    boots: u32,
    line: Option<Position>,
    starting_line: Option<Position>,
}

#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) name: Arc<str>,
    /// 0: none.
    pub(super) limit: u32,
    /// Its queued jobs.
    users: u32,
    /// Jobs being placed, assigned or running.
    pub(super) jobs: u32,
    pub(super) vcpus: u64,
    /// VMs being started for its jobs: they count as much, or one tenant would have them all started.
    boots: u32,
    boot_vcpus: u64,
    pub(super) lanes: BTreeSet<ShapeId>,
}

impl Tenant {
    fn below_limit(&self, more: u32) -> bool {
        self.limit == 0 || self.jobs + more < self.limit
    }
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) shapes: BTreeMap<ShapeId, Waiting>,
    ids: BTreeMap<Shape, ShapeId>,
    next_shape: u32,
    pub(super) tenants: BTreeMap<TenantId, Tenant>,
    tenant_ids: BTreeMap<Arc<str>, TenantId>,
    next_tenant: u32,
    by_image: BTreeMap<ImageId, BTreeSet<ShapeId>>,
    open: BTreeSet<(Position, ShapeId)>,
    sweeps: BTreeMap<ImageId, Sweep>,
    /// Tenants whose lanes are to be put in line again, and where to go on.
    stale: BTreeMap<TenantId, ShapeId>,
    /// Jobs in lanes.
    pub(super) waiting: usize,
    /// Shapes that wait for room.
    pub(super) hungry: usize,
}

impl Queue {
    pub(super) fn tenant(&mut self, name: &str, limit: impl Fn(&str) -> u32) -> TenantId {
        if let Some(id) = self.tenant_ids.get(name) {
            return *id;
        }
        let id = TenantId(self.next_tenant);
        self.next_tenant += 1;
        let shared = Arc::<str>::from(name);
        self.tenant_ids.insert(shared.clone(), id);
        let tenant = Tenant {
            name: shared,
            limit: limit(name),
            users: 0,
            jobs: 0,
            vcpus: 0,
            boots: 0,
            boot_vcpus: 0,
            lanes: BTreeSet::new(),
        };
        self.tenants.insert(id, tenant);
        id
    }

    /// The id of a shape; `None` when no job waits with it.
    pub(super) fn find(&self, shape: &Shape) -> Option<ShapeId> {
        self.ids.get(shape).copied()
    }

    /// One more queued job of this shape and tenant. False: the shape was known.
    pub(super) fn enter(&mut self, shape: Shape, tenant: TenantId) -> (ShapeId, bool) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.users += 1;
        }
        if let Some(&id) = self.ids.get(&shape) {
            if let Some(waiting) = self.shapes.get_mut(&id) {
                waiting.users += 1;
            }
            return (id, false);
        }
        let id = ShapeId(self.next_shape);
        self.next_shape = self.next_shape.wrapping_add(1);
        self.ids.insert(shape, id);
        if let Shape::Like { image, .. } = shape {
            self.by_image.entry(image).or_default().insert(id);
        }
        let waiting = Waiting {
            shape,
            users: 1,
            lanes: BTreeMap::new(),
            line: BTreeSet::new(),
            starting_line: BTreeSet::new(),
            open: None,
            wait: Wait::Turn,
            boots: 0,
            evicting: None,
            started_at: Timestamp(i64::MIN),
            possible_at: None,
        };
        self.shapes.insert(id, waiting);
        (id, true)
    }

    /// One queued job less. The site that nothing uses any more, if so.
    #[must_use]
    pub(super) fn leave(&mut self, shape: ShapeId, tenant: TenantId) -> Option<SiteId> {
        if let Some(waiting) = self.shapes.get_mut(&shape) {
            waiting.users = waiting.users.saturating_sub(1);
        }
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.users = entry.users.saturating_sub(1);
        }
        self.drop_tenant_if_unused(tenant);
        self.drop_shape_if_unused(shape)
    }

    fn drop_shape_if_unused(&mut self, id: ShapeId) -> Option<SiteId> {
        let waiting = self.shapes.get(&id).filter(|waiting| waiting.users == 0 && waiting.boots == 0)?;
        let (shape, open, wait) = (waiting.shape, waiting.open, waiting.wait);
        self.hungry -= usize::from(wait.for_room());
        if let Some(position) = open {
            self.open.remove(&(position, id));
        }
        self.shapes.remove(&id);
        self.ids.remove(&shape);
        let Shape::Like { image, site, .. } = shape else { return None };
        if let Some(shapes) = self.by_image.get_mut(&image) {
            shapes.remove(&id);
            if shapes.is_empty() {
                self.by_image.remove(&image);
                self.sweeps.remove(&image);
            }
        }
        Some(site)
    }

    fn drop_tenant_if_unused(&mut self, id: TenantId) {
        let unused =
            |tenant: &Tenant| (tenant.users, tenant.jobs, tenant.boots) == (0, 0, 0) && tenant.lanes.is_empty();
        if let Some(tenant) = self.tenants.get(&id).filter(|tenant| unused(tenant)) {
            self.tenant_ids.remove(&tenant.name);
            self.tenants.remove(&id);
            self.stale.remove(&id);
        }
    }

    pub(super) fn insert(&mut self, shape: ShapeId, tenant: TenantId, key: Key, job_id: JobId) {
        let Some(waiting) = self.shapes.get_mut(&shape) else { return };
        if waiting.lanes.entry(tenant).or_default().jobs.insert(key, job_id).is_none() {
            self.waiting += 1;
        }
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.lanes.insert(shape);
        }
        self.line_up(shape, tenant);
    }

    pub(super) fn remove(&mut self, shape: ShapeId, tenant: TenantId, key: Key) {
        let lane = self.shapes.get_mut(&shape).and_then(|waiting| waiting.lanes.get_mut(&tenant));
        if lane.is_some_and(|lane| lane.jobs.remove(&key).is_some()) {
            self.waiting -= 1;
            self.line_up(shape, tenant);
        }
    }

    /// A job of the tenant begins (1) or has ended (-1) being placed, assigned or running.
    pub(super) fn count_job(&mut self, id: TenantId, vcpus: u32, change: i32) {
        let Some(tenant) = self.tenants.get_mut(&id) else { return };
        tenant.jobs = tenant.jobs.saturating_add_signed(change);
        tenant.vcpus = tenant.vcpus.saturating_add_signed(i64::from(vcpus) * i64::from(change));
        self.line_up_tenant(id);
        self.drop_tenant_if_unused(id);
    }

    /// A VM begins (1) or has ended (-1) being started for a job of this lane. The site that nothing uses any more, if so.
    #[must_use]
    pub(super) fn count_boot(&mut self, shape: ShapeId, id: TenantId, vcpus: u32, change: i32) -> Option<SiteId> {
        if let Some(waiting) = self.shapes.get_mut(&shape) {
            waiting.boots = waiting.boots.saturating_add_signed(change);
            let lane = waiting.lanes.entry(id).or_default();
            lane.boots = lane.boots.saturating_add_signed(change);
        }
        if let Some(tenant) = self.tenants.get_mut(&id) {
            tenant.boots = tenant.boots.saturating_add_signed(change);
            tenant.boot_vcpus = tenant.boot_vcpus.saturating_add_signed(i64::from(vcpus) * i64::from(change));
            tenant.lanes.insert(shape);
        }
        self.line_up(shape, id);
        self.line_up_tenant(id);
        self.drop_tenant_if_unused(id);
        self.drop_shape_if_unused(shape)
    }

    fn line_up_tenant(&mut self, id: TenantId) {
        self.stale.insert(id, ShapeId(0));
        self.catch_up(super::LOOKS_PER_STEP);
    }

    /// Puts lanes in line again whose tenants have got more or less; at most so many.
    pub(super) fn catch_up(&mut self, mut budget: usize) {
        while budget > 0
            && let Some((&tenant, &from)) = self.stale.first_key_value()
        {
            let lanes = self.tenants.get(&tenant).into_iter().flat_map(|tenant| tenant.lanes.range(from..));
            let lanes: Vec<ShapeId> = lanes.take(budget).copied().collect();
            match lanes.last() {
                Some(last) if lanes.len() == budget => {
                    self.stale.insert(tenant, ShapeId(last.0 + 1));
                }
                _ => {
                    self.stale.remove(&tenant);
                }
            }
            budget -= lanes.len();
            for shape in lanes {
                self.line_up(shape, tenant);
            }
        }
    }

    /// Puts a lane where it belongs; opens its shape when it joins a line.
    fn line_up(&mut self, id: ShapeId, tenant_id: TenantId) {
        let Some(waiting) = self.shapes.get_mut(&id) else { return };
        let Some(lane) = waiting.lanes.get_mut(&tenant_id) else { return };
        let Some(tenant) = self.tenants.get_mut(&tenant_id) else { return };
        let load = tenant.vcpus + tenant.boot_vcpus;
        let position = lane.jobs.first_key_value().map(|(key, _)| (load, *key, tenant_id));
        let line = position.filter(|_| tenant.below_limit(0));
        let uncovered = lane.jobs.len() > lane.boots as usize && tenant.below_limit(tenant.boots);
        let starting_line = line.filter(|_| uncovered);
        let joins =
            (line.is_some() && lane.line.is_none()) || (starting_line.is_some() && lane.starting_line.is_none());
        move_in(&mut waiting.line, &mut lane.line, line);
        move_in(&mut waiting.starting_line, &mut lane.starting_line, starting_line);
        if lane.jobs.is_empty() && lane.boots == 0 {
            waiting.lanes.remove(&tenant_id);
            tenant.lanes.remove(&id);
        }
        if joins {
            self.open(id);
        } else {
            self.reopen(id);
        }
    }

    pub(super) fn open(&mut self, id: ShapeId) {
        let Some(waiting) = self.shapes.get_mut(&id) else { return };
        self.hungry -= usize::from(waiting.wait.for_room());
        waiting.wait = Wait::Turn;
        if waiting.open.is_none()
            && let Some(&position) = waiting.line.first()
        {
            waiting.open = Some(position);
            self.open.insert((position, id));
        }
        self.reopen(id);
    }

    /// An open shape is found under its first lane's position.
    fn reopen(&mut self, id: ShapeId) {
        let Some(waiting) = self.shapes.get_mut(&id) else { return };
        let Some(position) = waiting.open else { return };
        let first = waiting.line.first().copied();
        if first != Some(position) {
            self.open.remove(&(position, id));
            waiting.open = first;
            if let Some(first) = first {
                self.open.insert((first, id));
            }
        }
    }

    pub(super) fn close(&mut self, id: ShapeId, wait: Wait) {
        let Some(waiting) = self.shapes.get_mut(&id) else { return };
        self.hungry += usize::from(wait.for_room());
        self.hungry -= usize::from(waiting.wait.for_room());
        waiting.wait = wait;
        if let Some(position) = waiting.open.take() {
            self.open.remove(&(position, id));
        }
    }

    /// Something that may be of use to shapes of this image.
    pub(super) fn offer(&mut self, image: ImageId, offer: Offer) {
        let Some(shapes) = self.by_image.get(&image) else { return };
        let left = shapes.len();
        match self.sweeps.get_mut(&image) {
            Some(sweep) => {
                sweep.offer = if sweep.offer == offer { offer } else { Offer::Anything };
                sweep.left = left;
            }
            None => {
                self.sweeps.insert(image, Sweep { offer, next: ShapeId(0), left });
            }
        }
    }

    pub(super) fn offer_to_all(&mut self, offer: Offer) {
        let images: Vec<ImageId> = self.by_image.keys().copied().collect();
        for image in images {
            self.offer(image, offer);
        }
    }

    /// Goes on with what was offered: looks at no more than so many shapes and returns at how many it did.
    pub(super) fn sweep(&mut self, budget: usize) -> usize {
        let mut looked = 0;
        while looked < budget
            && let Some((&image, sweep)) = self.sweeps.first_key_value()
        {
            let (offer, next, left) = (sweep.offer, sweep.next, sweep.left);
            let Some(shapes) = self.by_image.get(&image) else {
                self.sweeps.remove(&image);
                continue;
            };
            let some: Vec<ShapeId> =
                shapes.range(next..).chain(shapes.range(..next)).take(left.min(budget - looked)).copied().collect();
            looked += some.len().max(1);
            // Shapes may have gone since.
            let rest = left.min(shapes.len()) - some.len();
            match some.last() {
                Some(last) if rest > 0 => {
                    self.sweeps.insert(image, Sweep { offer, next: ShapeId(last.0 + 1), left: rest });
                }
                _ => {
                    self.sweeps.remove(&image);
                }
            }
            for id in some {
                let useful = self.shapes.get(&id).is_some_and(|waiting| match offer {
                    Offer::Vm(class) => waiting.shape.takes(&class),
                    Offer::Room => waiting.wait.for_room(),
                    Offer::Anything => true,
                });
                if useful {
                    self.open(id);
                }
            }
        }
        looked
    }

    /// The open shape whose turn it is.
    pub(super) fn next(&self) -> Option<ShapeId> {
        self.open.first().map(|(_, id)| *id)
    }

    pub(super) fn has_work(&self) -> bool {
        !self.open.is_empty() || !self.sweeps.is_empty() || !self.stale.is_empty()
    }

    /// The job of this shape whose turn it is to be given a VM …
    pub(super) fn head(&self, id: ShapeId) -> Option<JobId> {
        let waiting = self.shapes.get(&id)?;
        waiting.at(waiting.line.first()?)
    }

    /// … and the lane and job for which the next VM is to be started.
    pub(super) fn head_to_start(&self, id: ShapeId) -> Option<(TenantId, JobId)> {
        let waiting = self.shapes.get(&id)?;
        let position = waiting.starting_line.first()?;
        Some((position.2, waiting.at(position)?))
    }

    /// Of the shapes that such a VM would be started for, some of them looked at: the job whose turn it is.
    pub(super) fn first_waiting_for(&self, class: &Class) -> Option<JobId> {
        let shapes = self.by_image.get(&class.image)?.iter().take(super::LOOKS_PER_STEP);
        let shapes = shapes.filter_map(|id| self.shapes.get(id));
        let wanted = |waiting: &&Waiting| waiting.shape.wanted().is_some_and(|wanted| wanted.kind == class.kind);
        let first = shapes.filter(wanted).filter_map(|waiting| Some((waiting.line.first()?, waiting)));
        let (position, waiting) = first.min_by_key(|(position, _)| **position)?;
        waiting.at(position)
    }

    /// Whether a VM of this class would do for a shape that waits; of the image's shapes some are looked at.
    pub(super) fn anyone_takes(&self, class: &Class) -> bool {
        let shapes = self.by_image.get(&class.image).into_iter().flatten().take(super::LOOKS_PER_STEP);
        shapes
            .filter_map(|id| self.shapes.get(id))
            .any(|waiting| !waiting.line.is_empty() && waiting.shape.takes(class))
    }

    /// How many jobs of the tenant are more urgent: counted up to `cap`, in so many of its lanes.
    pub(super) fn ahead_of(&self, tenant: TenantId, key: Key, cap: usize) -> usize {
        let lanes = self.tenants.get(&tenant).into_iter().flat_map(|tenant| tenant.lanes.iter().take(cap));
        let lanes = lanes.filter_map(|id| self.shapes.get(id)?.lanes.get(&tenant));
        lanes.flat_map(|lane| lane.jobs.range(..key)).take(cap).count()
    }

    /// The first invariant that does not hold, in words.
    pub(super) fn broken_invariant(&self) -> Option<String> {
        let jobs: usize = self.lanes().map(|(_, _, lane)| lane.jobs.len()).sum();
        if jobs != self.waiting {
            return Some(format!("{jobs} jobs are in lanes and {} are counted", self.waiting));
        }
        let hungry = self.shapes.values().filter(|waiting| waiting.wait.for_room()).count();
        if hungry != self.hungry {
            return Some(format!("{hungry} shapes wait for room and {} are counted", self.hungry));
        }
        for (&id, waiting) in &self.shapes {
            if waiting.open.is_some() != self.open.iter().any(|(_, other)| *other == id) {
                return Some(format!("shape {id:?} is open and is not: {:?}", waiting.open));
            }
            if waiting.open.is_none() && waiting.wait == Wait::Turn && !waiting.line.is_empty() {
                return Some(format!("shape {id:?} has jobs in line, waits for its turn and is not open"));
            }
            let lines = waiting.lanes.values().filter(|lane| lane.line.is_some()).count();
            if lines != waiting.line.len() {
                return Some(format!("shape {id:?} has {lines} lanes in line and {} in its line", waiting.line.len()));
            }
        }
        self.stale.is_empty().then(|| self.unfair_line()).flatten()
    }

    fn unfair_line(&self) -> Option<String> {
        for (id, tenant_id, lane) in self.lanes() {
            let Some(tenant) = self.tenants.get(&tenant_id) else {
                return Some(format!("the tenant of a lane of {id:?} is not known"));
            };
            let load = tenant.vcpus + tenant.boot_vcpus;
            if lane.line.is_some_and(|position| position.0 != load) {
                return Some(format!("tenant {:?} has {load} vCPUs and stands at {:?}", tenant.name, lane.line));
            }
            if lane.line.is_some() != (!lane.jobs.is_empty() && tenant.below_limit(0)) {
                return Some(format!("tenant {:?} is in line of {id:?} and must not, or the reverse", tenant.name));
            }
        }
        None
    }

    pub(super) fn lanes(&self) -> impl Iterator<Item = (ShapeId, TenantId, &Lane)> {
        self.shapes.iter().flat_map(|(id, waiting)| waiting.lanes.iter().map(|(tenant, lane)| (*id, *tenant, lane)))
    }
}

impl Waiting {
    fn at(&self, position: &Position) -> Option<JobId> {
        self.lanes.get(&position.2)?.jobs.get(&position.1).copied()
    }
}

fn move_in(line: &mut BTreeSet<Position>, held: &mut Option<Position>, to: Option<Position>) {
    if *held == to {
        return;
    }
    if let Some(old) = held.take() {
        line.remove(&old);
    }
    if let Some(new) = to {
        line.insert(new);
        *held = Some(new);
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Turn => f.write_str("its turn"),
            Self::Boot => f.write_str("a VM to boot"),
            Self::BootPause => f.write_str("the pause after a VM that failed to boot"),
            Self::AutoScalingOff => f.write_str("a free service VM (auto_scaling is off)"),
            Self::MaxVms => f.write_str("one of the VMs to end (max_vms)"),
            Self::MaxServiceVms => f.write_str("one of the service VMs of its image (max_service_vms)"),
            Self::NoNode => f.write_str("a node to register"),
            Self::Room => f.write_str("room on a node"),
            Self::Target(vm_id) => write!(f, "its target VM {vm_id} to be free"),
        }
    }
}
