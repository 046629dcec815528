//! The nodes: what each offers and has left, and which fits what.
//!
//! A *site* is the set of nodes that some constraint allows. It keeps its Ready nodes in order of free memory, and those that
//! have free VMs by the VMs' class, so that the best one is found without looking at the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use blixard::{
    config::PlacementChoice,
    egress::{NETWORK_LABEL, NETWORK_LABEL_ON},
    error::{Error, Reason, invalid},
    id::{NodeId, VmId},
    node::{Node, NodeState},
    time::Timestamp,
    vm::{VmConfig, VmKind},
    volume::Volumes,
};

use super::shape::{Class, Constraint, ImageId, Names, NodeIx, Shape, ShapeId, SiteId, least_scratch};

/// Sites that nothing uses are kept up to this many: jobs alike come again.
const KEPT_SITES: usize = 256;
/// So many size classes of free VMs are looked at for one job.
const CLASSES_LOOKED_AT: usize = 64;

/// A node and what of it is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEntry {
    /// What it offers.
    pub node: Node,
    /// Memory of its live VMs and of those about to be created.
    pub used_memory_mib: u64,
    /// How many these are.
    pub vms: u32,
}

/// Nodes by id.
pub type Nodes = BTreeMap<NodeId, NodeEntry>;

/// A node as the engine works with it; it may be known by its VMs only.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) id: NodeId,
    /// `None`: it has not registered.
    pub(super) state: Option<NodeState>,
    /// See [`Node::takes_vms`] and [`Node::takes_attempts`].
    takes_vms: bool,
    takes_attempts: bool,
    pub(super) vms: BTreeSet<VmId>,
    pub(super) used_memory_mib: u64,
    pub(super) used_slots: u32,
    /// Jobs that are assigned or running on it.
    pub(super) jobs: u32,
    /// Memory of free VMs that could be ended for others.
    pub(super) evictable_mib: u64,
    /// Since when it is Lost, as far as this engine saw.
    pub(super) lost_since: Option<Timestamp>,
    /// It was Lost for too long: what was on it is given up.
    pub(super) given_up: bool,
    pub(super) timer: Option<Timestamp>,
    /// VMs are started here for this shape only.
    kept_for: Option<ShapeId>,
    images: Vec<ImageId>,
    free: BTreeMap<Class, BTreeSet<VmId>>,
    /// The sites it belongs to, with how much each likes it.
    sites: BTreeMap<SiteId, u32>,
    /// Its free memory as the sites' rooms have it; `None`: they don't.
    listed_mib: Option<u64>,
}

/// See the module.
#[derive(Debug)]
struct Site {
    constraint: Constraint,
    users: u32,
    members: BTreeSet<NodeIx>,
    /// Ready nodes with free VMs.
    warm: BTreeMap<Class, BTreeSet<(u32, NodeIx)>>,
    /// Ready nodes with a free slot, by image and the size of their largest VM: (how much they are liked, free memory, which).
    rooms: BTreeMap<(ImageId, u32), BTreeSet<Room>>,
}

type Room = (u32, u64, NodeIx);

/// A free VM that was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Warm {
    pub(super) vm_id: VmId,
    pub(super) node: NodeIx,
    pub(super) class: Class,
    pub(super) liked: u32,
    pub(super) classes: u32,
}

#[derive(Debug, Default)]
pub(super) struct Fleet {
    pub(super) nodes: Nodes,
    pub(super) places: Vec<Place>,
    numbers: Names,
    sites: BTreeMap<SiteId, Site>,
    site_ids: BTreeMap<Constraint, SiteId>,
    next_site: u32,
    /// Counts the changes of what nodes offer: until the next one, what could not ever fit still can't.
    pub(super) version: u64,
    /// How many nodes are Ready.
    pub(super) ready: u32,
}

impl Fleet {
    pub(super) fn ix(&mut self, id: &NodeId) -> NodeIx {
        let number = self.numbers.number(id.as_str());
        if number as usize == self.places.len() {
            self.places.push(Place {
                id: id.clone(),
                state: None,
                takes_vms: false,
                takes_attempts: false,
                vms: BTreeSet::new(),
                used_memory_mib: 0,
                used_slots: 0,
                jobs: 0,
                evictable_mib: 0,
                lost_since: None,
                given_up: false,
                timer: None,
                kept_for: None,
                images: Vec::new(),
                free: BTreeMap::new(),
                sites: BTreeMap::new(),
                listed_mib: None,
            });
        }
        NodeIx(number)
    }

    pub(super) fn find(&self, id: &NodeId) -> Option<NodeIx> {
        self.numbers.find(id.as_str()).map(NodeIx)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = NodeIx> + use<> {
        (0..u32::try_from(self.places.len()).unwrap_or(u32::MAX)).map(NodeIx)
    }

    pub(super) fn place(&self, ix: NodeIx) -> &Place {
        &self.places[ix.0 as usize]
    }

    pub(super) fn place_mut(&mut self, ix: NodeIx) -> &mut Place {
        &mut self.places[ix.0 as usize]
    }

    pub(super) fn node(&self, ix: NodeIx) -> Option<&Node> {
        self.nodes.get(&self.place(ix).id).map(|entry| &entry.node)
    }

    pub(super) fn images_of(&self, ix: NodeIx) -> Vec<ImageId> {
        self.place(ix).images.clone()
    }

    /// Takes in what a node says of itself.
    pub(super) fn set(&mut self, now: Timestamp, node: Node, images: &mut Names) -> NodeIx {
        let ix = self.ix(&node.id);
        self.unlist(ix);
        let before = self.nodes.get(&node.id).map(|entry| &entry.node);
        let offers_the_same = before.is_some_and(|before| {
            let (a, b) = (before, &node);
            (a.vcpus, a.memory_mib, &a.images, &a.labels) == (b.vcpus, b.memory_mib, &b.images, &b.labels)
                && (&a.volumes, a.scratch_mib) == (&b.volumes, b.scratch_mib)
        });
        let lost_before = before.filter(|before| before.incarnation == node.incarnation).map(|before| before.state);
        self.ready -= u32::from(self.place(ix).state == Some(NodeState::Ready));
        self.ready += u32::from(node.state == NodeState::Ready);
        let place = &mut self.places[ix.0 as usize];
        if node.state != NodeState::Lost {
            (place.lost_since, place.given_up) = (None, false);
        } else if lost_before != Some(NodeState::Lost) || place.lost_since.is_none() {
            (place.lost_since, place.given_up) = (Some(now), false);
        }
        place.state = Some(node.state);
        (place.takes_vms, place.takes_attempts) = (node.takes_vms(), node.takes_attempts());
        place.images = node.images.iter().map(|image| ImageId(images.number(image))).collect();
        let (used_memory_mib, vms) = (place.used_memory_mib, place.used_slots);
        self.nodes.insert(node.id.clone(), NodeEntry { node, used_memory_mib, vms });
        if !offers_the_same {
            self.version += 1;
            for (&id, site) in &mut self.sites {
                site.members.remove(&ix);
                let place = &mut self.places[ix.0 as usize];
                place.sites.remove(&id);
                let Some(entry) = self.nodes.get(&place.id) else { continue };
                if let Some(liked) = likes(&site.constraint, &entry.node) {
                    site.members.insert(ix);
                    place.sites.insert(id, liked);
                }
            }
        }
        self.list(ix);
        ix
    }

    /// The site of a constraint, with one more user.
    pub(super) fn use_site(&mut self, constraint: &Constraint) -> SiteId {
        if let Some(id) = self.site_ids.get(constraint) {
            if let Some(site) = self.sites.get_mut(id) {
                site.users += 1;
            }
            return *id;
        }
        if self.sites.len() >= KEPT_SITES {
            self.drop_unused_sites();
        }
        let id = SiteId(self.next_site);
        self.next_site += 1;
        let mut site = Site {
            constraint: constraint.clone(),
            users: 1,
            members: BTreeSet::new(),
            warm: BTreeMap::new(),
            rooms: BTreeMap::new(),
        };
        let liked = |entry: &NodeEntry| Some((entry.node.id.clone(), likes(constraint, &entry.node)?));
        let members: Vec<_> = match &constraint.node_id {
            Some(node_id) => self.nodes.get(node_id).and_then(liked).into_iter().collect(),
            None => self.nodes.values().filter_map(liked).collect(),
        };
        let members: Vec<_> = members.into_iter().map(|(node_id, liked)| (self.ix(&node_id), liked)).collect();
        for (ix, liked) in members {
            site.members.insert(ix);
            let place = &mut self.places[ix.0 as usize];
            place.sites.insert(id, liked);
            if place.takes_attempts {
                for class in place.free.keys() {
                    site.warm.entry(*class).or_default().insert((liked, ix));
                }
            }
            if let (Some(free), Some(entry)) = (place.listed_mib, self.nodes.get(&place.id)) {
                for image in &place.images {
                    site.rooms.entry((*image, entry.node.vcpus)).or_default().insert((liked, free, ix));
                }
            }
        }
        self.sites.insert(id, site);
        self.site_ids.insert(constraint.clone(), id);
        id
    }

    pub(super) fn leave_site(&mut self, id: SiteId) {
        if let Some(site) = self.sites.get_mut(&id) {
            site.users = site.users.saturating_sub(1);
        }
    }

    fn drop_unused_sites(&mut self) {
        let unused: Vec<SiteId> = self.sites.iter().filter(|(_, site)| site.users == 0).map(|(id, _)| *id).collect();
        for id in unused {
            if let Some(site) = self.sites.remove(&id) {
                self.site_ids.remove(&site.constraint);
                for ix in site.members {
                    self.places[ix.0 as usize].sites.remove(&id);
                }
            }
        }
    }

    pub(super) fn constraint(&self, id: SiteId) -> Constraint {
        self.sites.get(&id).map(|site| site.constraint.clone()).unwrap_or_default()
    }

    pub(super) fn members(&self, id: SiteId) -> usize {
        self.sites.get(&id).map_or(0, |site| site.members.len())
    }

    pub(super) fn allows(&self, id: SiteId, ix: NodeIx) -> bool {
        self.place(ix).sites.contains_key(&id)
    }

    pub(super) fn is_ready(&self, ix: NodeIx) -> bool {
        self.place(ix).state == Some(NodeState::Ready)
    }

    /// Whether it may be given another VM, as far as its state and its machine are concerned.
    pub(super) fn takes_vms(&self, ix: NodeIx) -> bool {
        self.place(ix).takes_vms
    }

    /// Whether its VMs may be given attempts.
    pub(super) fn takes_attempts(&self, ix: NodeIx) -> bool {
        self.place(ix).takes_attempts
    }

    pub(super) fn is_lost(&self, ix: NodeIx) -> bool {
        self.place(ix).state == Some(NodeState::Lost)
    }

    /// Counts a VM, live or about to be created.
    pub(super) fn occupy(&mut self, ix: NodeIx, memory_mib: u32) {
        let place = self.place_mut(ix);
        place.used_memory_mib += u64::from(memory_mib);
        place.used_slots += 1;
        self.relist_room(ix);
    }

    pub(super) fn release(&mut self, ix: NodeIx, memory_mib: u32) {
        let place = self.place_mut(ix);
        place.used_memory_mib = place.used_memory_mib.saturating_sub(memory_mib.into());
        place.used_slots = place.used_slots.saturating_sub(1);
        self.relist_room(ix);
    }

    pub(super) fn add_free(&mut self, ix: NodeIx, class: Class, vm_id: VmId) {
        let place = &mut self.places[ix.0 as usize];
        let vms = place.free.entry(class).or_default();
        vms.insert(vm_id);
        if vms.len() == 1 && place.takes_attempts {
            for (id, liked) in &place.sites {
                if let Some(site) = self.sites.get_mut(id) {
                    site.warm.entry(class).or_default().insert((*liked, ix));
                }
            }
        }
    }

    pub(super) fn remove_free(&mut self, ix: NodeIx, class: Class, vm_id: VmId) {
        let place = &mut self.places[ix.0 as usize];
        let Some(vms) = place.free.get_mut(&class) else { return };
        vms.remove(&vm_id);
        if vms.is_empty() {
            place.free.remove(&class);
            for (id, liked) in &place.sites {
                if let Some(site) = self.sites.get_mut(id) {
                    unwarm(site, class, (*liked, ix));
                }
            }
        }
    }

    pub(super) fn has_free(&self, ix: NodeIx, class: Class, vm_id: VmId) -> bool {
        self.place(ix).free.get(&class).is_some_and(|vms| vms.contains(&vm_id))
    }

    pub(super) fn free_vms(&self) -> impl Iterator<Item = (NodeIx, Class, VmId)> {
        (0u32..).zip(&self.places).flat_map(|(ix, place)| {
            let vms = place.free.iter().flat_map(|(class, vms)| vms.iter().map(|vm_id| (*class, *vm_id)));
            vms.map(move |(class, vm_id)| (NodeIx(ix), class, vm_id))
        })
    }

    pub(super) fn free_classes(&self, ix: NodeIx) -> Vec<Class> {
        self.place(ix).free.keys().copied().collect()
    }

    fn relist_room(&mut self, ix: NodeIx) {
        self.unlist_room(ix);
        self.list_room(ix);
    }

    fn unlist_room(&mut self, ix: NodeIx) {
        let place = &mut self.places[ix.0 as usize];
        let Some(free) = place.listed_mib.take() else { return };
        let Some(entry) = self.nodes.get_mut(&place.id) else { return };
        for (id, liked) in &place.sites {
            let Some(site) = self.sites.get_mut(id) else { continue };
            for image in &place.images {
                let key = (*image, entry.node.vcpus);
                if let Some(rooms) = site.rooms.get_mut(&key) {
                    rooms.remove(&(*liked, free, ix));
                    if rooms.is_empty() {
                        site.rooms.remove(&key);
                    }
                }
            }
        }
    }

    fn list_room(&mut self, ix: NodeIx) {
        let place = &mut self.places[ix.0 as usize];
        let Some(entry) = self.nodes.get_mut(&place.id) else { return };
        (entry.used_memory_mib, entry.vms) = (place.used_memory_mib, place.used_slots);
        if !place.takes_vms || place.used_slots >= entry.node.max_vms || place.kept_for.is_some() {
            return;
        }
        let free = entry.node.memory_mib.saturating_sub(place.used_memory_mib);
        place.listed_mib = Some(free);
        for (id, liked) in &place.sites {
            let Some(site) = self.sites.get_mut(id) else { continue };
            for image in &place.images {
                site.rooms.entry((*image, entry.node.vcpus)).or_default().insert((*liked, free, ix));
            }
        }
    }

    fn list(&mut self, ix: NodeIx) {
        self.list_room(ix);
        let place = &self.places[ix.0 as usize];
        if place.takes_attempts {
            for (id, liked) in &place.sites {
                let Some(site) = self.sites.get_mut(id) else { continue };
                for class in place.free.keys() {
                    site.warm.entry(*class).or_default().insert((*liked, ix));
                }
            }
        }
    }

    fn unlist(&mut self, ix: NodeIx) {
        self.unlist_room(ix);
        let place = &self.places[ix.0 as usize];
        for (id, liked) in &place.sites {
            let Some(site) = self.sites.get_mut(id) else { continue };
            for class in place.free.keys() {
                unwarm(site, *class, (*liked, ix));
            }
        }
    }

    /// A free VM for this shape: a service VM first (it is warm), on a node that is liked, the smallest that fits; else one
    /// that was started for a job like it.
    pub(super) fn warm(&self, shape: &Shape) -> Option<Warm> {
        let Shape::Like { image, egress, volumes, vcpus, memory_mib, site, .. } = *shape else { return None };
        let site = self.sites.get(&site)?;
        let class = |kind, memory_mib, vcpus| Class { image, egress, volumes, kind, memory_mib, vcpus };
        let services = class(VmKind::Service, memory_mib, 0)..=class(VmKind::Service, u32::MAX, u32::MAX);
        let mut best: Option<Warm> = None;
        let mut classes = 0;
        for (class, nodes) in site.warm.range(services).take(CLASSES_LOOKED_AT) {
            classes += 1;
            let Some(&(liked, ix)) = nodes.last().filter(|_| shape.takes(class)) else { continue };
            if best.is_none_or(|best| best.liked < liked) {
                best = self.first_free(ix, *class, liked);
            }
        }
        if best.is_none() {
            let exact = class(VmKind::Ephemeral, memory_mib, vcpus);
            if shape.takes(&exact)
                && let Some(&(liked, ix)) = site.warm.get(&exact).and_then(BTreeSet::last)
            {
                classes += 1;
                best = self.first_free(ix, exact, liked);
            }
        }
        best.map(|best| Warm { classes, ..best })
    }

    fn first_free(&self, node: NodeIx, class: Class, liked: u32) -> Option<Warm> {
        let vm_id = *self.place(node).free.get(&class)?.first()?;
        Some(Warm { vm_id, node, class, liked, classes: 0 })
    }

    /// The node to start a VM on now: of those that are liked best the one with the most free memory, or with the least that
    /// is enough.
    pub(super) fn room(&self, site: SiteId, class: &Class, choice: PlacementChoice) -> Option<Room> {
        let site = self.sites.get(&site)?;
        let tiers = site.rooms.range((class.image, class.vcpus)..=(class.image, u32::MAX));
        let found = tiers.filter_map(|(_, rooms)| best_room(rooms, class.memory_mib.into(), choice));
        found.reduce(|a, b| {
            let better = match choice {
                PlacementChoice::Spread => (b.0, b.1) > (a.0, a.1),
                PlacementChoice::Pack => b.0 > a.0 || (b.0 == a.0 && b.1 < a.1),
            };
            if better { b } else { a }
        })
    }

    /// The best nodes for this, best first, and how many have enough memory: of up to `cap` that were looked at.
    pub(super) fn rooms(&self, site: SiteId, class: &Class, choice: PlacementChoice, cap: usize) -> (u32, Vec<Room>) {
        let Some(site) = self.sites.get(&site) else { return (0, Vec::new()) };
        let tiers = site.rooms.range((class.image, class.vcpus)..=(class.image, u32::MAX));
        let all = tiers.flat_map(|(_, rooms)| rooms.iter().rev()).take(cap);
        let mut fit: Vec<Room> = all.copied().filter(|(_, free, _)| *free >= class.memory_mib.into()).collect();
        let count = u32::try_from(fit.len()).unwrap_or(u32::MAX);
        fit.sort_unstable_by_key(|&(liked, free, ix)| {
            let free = i128::from(free);
            (std::cmp::Reverse(liked), if choice == PlacementChoice::Spread { -free } else { free }, ix)
        });
        fit.truncate(10);
        (count, fit)
    }

    /// How many nodes of the site have the image, vCPUs enough and a free slot.
    pub(super) fn with_slots(&self, site: SiteId, image: ImageId, vcpus: u32) -> usize {
        let Some(site) = self.sites.get(&site) else { return 0 };
        site.rooms.range((image, vcpus)..=(image, u32::MAX)).map(|(_, rooms)| rooms.len()).sum()
    }

    /// Keeps a node's room for one shape, or gives it back to all.
    pub(super) fn keep_for(&mut self, ix: NodeIx, shape: Option<ShapeId>) {
        self.place_mut(ix).kept_for = shape;
        self.relist_room(ix);
    }

    /// Whether another VM may be started on a node, memory aside.
    pub(super) fn has_slot(&self, ix: NodeIx) -> bool {
        self.place(ix).takes_vms && self.node(ix).is_some_and(|node| self.place(ix).used_slots < node.max_vms)
    }

    /// Memory of a node that no VM has.
    pub(super) fn free_mib(&self, ix: NodeIx) -> u64 {
        self.node(ix).map_or(0, |node| node.memory_mib.saturating_sub(self.place(ix).used_memory_mib))
    }

    /// Whether a node would have room for a VM of this class, were it empty, and is kept for nobody.
    pub(super) fn could_hold(&self, ix: NodeIx, site: SiteId, class: &Class) -> bool {
        let place = self.place(ix);
        let Some(node) = self.node(ix) else { return false };
        place.takes_vms
            && self.allows(site, ix)
            && place.kept_for.is_none()
            && place.images.contains(&class.image)
            && node.vcpus >= class.vcpus
            && node.memory_mib >= class.memory_mib.into()
    }

    /// Whether ending free VMs of ours on this node would make room for a VM of this class.
    pub(super) fn could_make_room(&self, ix: NodeIx, site: SiteId, class: &Class) -> bool {
        let place = self.place(ix);
        let Some(node) = self.node(ix) else { return false };
        place.takes_vms
            && self.allows(site, ix)
            && place.images.contains(&class.image)
            && node.vcpus >= class.vcpus
            && node.memory_mib.saturating_sub(place.used_memory_mib) + place.evictable_mib >= class.memory_mib.into()
    }
}

fn unwarm(site: &mut Site, class: Class, node: (u32, NodeIx)) {
    if let Some(nodes) = site.warm.get_mut(&class) {
        nodes.remove(&node);
        if nodes.is_empty() {
            site.warm.remove(&class);
        }
    }
}

fn best_room(rooms: &BTreeSet<Room>, memory_mib: u64, choice: PlacementChoice) -> Option<Room> {
    let last = NodeIx(u32::MAX);
    let mut at_most = (u32::MAX, u64::MAX, last);
    loop {
        let &(liked, ..) = rooms.range(..=at_most).next_back()?;
        let mut enough = rooms.range((liked, memory_mib, NodeIx(0))..=(liked, u64::MAX, last));
        let found = match choice {
            PlacementChoice::Spread => enough.next_back(),
            PlacementChoice::Pack => enough.next(),
        };
        if let Some(room) = found {
            return Some(*room);
        }
        at_most = (liked.checked_sub(1)?, u64::MAX, last);
    }
}

/// How many of the preferred labels a node has; `None`: it must not be used.
fn likes(constraint: &Constraint, node: &Node) -> Option<u32> {
    let has = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
    let allowed = constraint.node_id.as_ref().is_none_or(|wanted| *wanted == node.id)
        && constraint.labels.iter().all(has)
        && missing_volume(constraint, node).is_none();
    let liked = constraint.preferred.iter().filter(|label| has(*label)).count();
    allowed.then(|| u32::try_from(liked).unwrap_or(u32::MAX))
}

/// The first volume that a node lacks, in words.
pub(super) fn missing_volume<'a>(constraint: &'a Constraint, node: &Node) -> Option<&'a str> {
    if node.scratch_mib < constraint.scratch_mib {
        return Some(if node.scratch_mib == 0 { "disks for its VMs" } else { "scratch disks of that size" });
    }
    constraint.volumes.iter().find(|name| !node.volumes.contains(name)).map(String::as_str)
}

/// Keeps the nodes that have what a VM is to have mounted.
fn retain_with_volumes(candidates: &mut Vec<&Node>, field: &str, volumes: &Volumes) -> Result<(), Error> {
    let refuse = |value: &dyn fmt::Display, allowed: &str| {
        let error = invalid(&format!("{field}.volumes"), value, allowed);
        Error { reason: Reason::ExceedsCapacity, ..error }
    };
    if volumes.is_empty() {
        return Ok(());
    }
    let most = candidates.iter().map(|node| node.scratch_mib).max().unwrap_or(0);
    if most == 0 {
        let allowed = "none: no node that would do gives its VMs disks (the driver process has none to give)";
        return Err(refuse(volumes, allowed));
    }
    if volumes.scratch_mib() > most {
        let allowed = format!("scratch disks of at most {most} MiB together, what the largest node offers");
        return Err(refuse(volumes, &allowed));
    }
    candidates.retain(|node| node.scratch_mib >= least_scratch(volumes));
    let known: BTreeSet<&str> = candidates.iter().flat_map(|node| node.volumes.iter().map(String::as_str)).collect();
    for name in volumes.names() {
        if !known.contains(name) {
            let allowed = if known.is_empty() {
                "scratch disks only: no node that would do has volumes (storage.volumes)".to_owned()
            } else {
                format!("the volumes that nodes that would do have: {}", join(known))
            };
            return Err(refuse(&name, &allowed));
        }
    }
    candidates.retain(|node| volumes.names().all(|name| node.volumes.iter().any(|has| has == name)));
    if candidates.is_empty() {
        let names = join(volumes.names());
        return Err(refuse(&names, "volumes of one node: each of these is some node's, but no node has all of them"));
    }
    Ok(())
}

/// Whether any node that has these labels could ever run this, were it empty. With no node at all everything may come.
///
/// # Errors
/// NODE_NOT_FOUND (also when no node has the labels), IMAGE_NOT_FOUND or EXCEEDS_CAPACITY, naming the field below `field`, its
/// value and what is allowed.
pub fn could_ever_fit(
    nodes: &Nodes,
    field: &str,
    config: &VmConfig,
    node_labels: &BTreeMap<String, String>,
) -> Result<(), Error> {
    if nodes.is_empty() {
        return Ok(());
    }
    let mut candidates: Vec<&Node> = nodes.values().map(|entry| &entry.node).collect();
    if let Some(wanted) = &config.node_id {
        candidates.retain(|node| node.id == *wanted);
        if candidates.is_empty() {
            let known = join(nodes.keys().map(NodeId::as_str));
            let message = format!("{field}.node_id: there is no node \"{wanted}\"; there are: {known}");
            return Err(Error::new(Reason::NodeNotFound, message).with("node_id", wanted));
        }
    }
    let has_network = |node: &&Node| node.labels.get(NETWORK_LABEL).is_some_and(|value| value == NETWORK_LABEL_ON);
    if config.egress.needs_network() && !candidates.iter().any(has_network) {
        let allowed = "none: no node that would do gives its guests a network (network.subnet)";
        let error = invalid(&format!("{field}.egress"), &config.egress, allowed);
        return Err(Error { reason: Reason::ExceedsCapacity, ..error });
    }
    candidates.retain(|node| !config.egress.needs_network() || has_network(node));
    retain_with_volumes(&mut candidates, field, &config.volumes)?;
    for (key, value) in node_labels {
        candidates.retain(|node| node.labels.get(key) == Some(value));
        if candidates.is_empty() {
            let message = format!("{field}.node_labels: no node that would do has the label {key}={value}");
            return Err(Error::new(Reason::NodeNotFound, message).with("label", format!("{key}={value}")));
        }
    }
    let has_image = |node: &&Node| node.images.contains(&config.image);
    if !candidates.iter().any(has_image) {
        let mut known: Vec<&str> = candidates.iter().flat_map(|node| node.images.iter().map(String::as_str)).collect();
        known.sort_unstable();
        known.dedup();
        let known = if known.is_empty() {
            "none yet; build the default one with: make guest-image".to_owned()
        } else {
            join(known)
        };
        let message = format!("{field}.image: no node has the image \"{}\"; there are: {known}", config.image);
        return Err(Error::new(Reason::ImageNotFound, message).with("image", &config.image).with("known", known));
    }
    candidates.retain(has_image);
    let most_vcpus = candidates.iter().map(|node| node.vcpus).max().unwrap_or(0);
    if config.vcpus > most_vcpus {
        return Err(exceeds(
            &format!("{field}.vcpus"),
            config.vcpus,
            &format!("at most {most_vcpus}, what the largest node offers"),
        ));
    }
    candidates.retain(|node| node.vcpus >= config.vcpus);
    let most_memory = candidates.iter().map(|node| node.memory_mib).max().unwrap_or(0);
    if u64::from(config.memory_mib) > most_memory {
        let allowed = format!("at most {most_memory} (MiB), what the largest node offers");
        return Err(exceeds(&format!("{field}.memory_mib"), config.memory_mib, &allowed));
    }
    Ok(())
}

fn exceeds(field: &str, value: u32, allowed: &str) -> Error {
    let error = invalid(field, value, allowed);
    Error { reason: Reason::ExceedsCapacity, ..error }
}

fn join<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}
