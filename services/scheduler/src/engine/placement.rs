//! Which node fits what: filters first, then a score. Pure functions over what nodes offer.

use std::collections::BTreeMap;

use blixard::{
    error::{Error, Reason, invalid},
    id::NodeId,
    node::{Node, NodeState},
    vm::VmConfig,
};

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

/// Whether any node could ever run this, were it empty. With no node at all everything may come.
///
/// # Errors
/// NODE_NOT_FOUND, IMAGE_NOT_FOUND or EXCEEDS_CAPACITY, naming the field below `field`, its value and what is allowed.
pub fn could_ever_fit(nodes: &Nodes, field: &str, config: &VmConfig) -> Result<(), Error> {
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

/// The node to start a VM on now: the one with the most free memory, so that VMs spread.
///
/// # Errors
/// What the VM waits for, in words.
pub(super) fn choose(nodes: &Nodes, config: &VmConfig) -> Result<NodeId, String> {
    let mut best: Option<(u64, &NodeId)> = None;
    let mut waits_for = "a node that is ready and has the image".to_owned();
    for (id, entry) in nodes {
        let node = &entry.node;
        let suitable = node.state == NodeState::Ready
            && node.images.contains(&config.image)
            && node.vcpus >= config.vcpus
            && config.node_id.as_ref().is_none_or(|wanted| wanted == id);
        if !suitable {
            continue;
        }
        let free = node.memory_mib.saturating_sub(entry.used_memory_mib);
        if entry.vms >= node.max_vms {
            waits_for = format!("one of the {} VMs of {id} to end", node.max_vms);
        } else if free < config.memory_mib.into() {
            waits_for = format!("{} MiB of memory: {id} has {free} MiB free", config.memory_mib);
        } else if best.is_none_or(|(most, _)| free > most) {
            best = Some((free, id));
        }
    }
    best.map(|(_, id)| id.clone()).ok_or(waits_for)
}

fn join<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}
