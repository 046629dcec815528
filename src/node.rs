//! A node: one vmhost and what it offers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{
    error::{Error, invalid},
    id::NodeId,
    pb::common::v1 as pb,
    time::Timestamp,
    vm::parse_labels,
};

/// Whether a node takes work. The names are those of the registry's `state` column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeState {
    Ready,
    Cordoned,
    Draining,
    Lost,
}

impl NodeState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Ready, Self::Cordoned, Self::Draining, Self::Lost];

    /// The name in tables, logs and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Cordoned => "Cordoned",
            Self::Draining => "Draining",
            Self::Lost => "Lost",
        }
    }

    /// The inverse of [`NodeState::as_str`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }

    /// Parses the wire's value.
    ///
    /// # Errors
    /// INVALID_FIELD.
    pub fn from_pb(field: &str, value: i32) -> Result<Self, Error> {
        let known = Self::ALL.into_iter().find(|state| i32::from(state.to_pb()) == value);
        known.ok_or_else(|| invalid(field, value, "one of the node states 1 to 4"))
    }

    /// The wire's value.
    #[must_use]
    pub fn to_pb(self) -> pb::NodeState {
        match self {
            Self::Ready => pb::NodeState::Ready,
            Self::Cordoned => pb::NodeState::Cordoned,
            Self::Draining => pb::NodeState::Draining,
            Self::Lost => pb::NodeState::Lost,
        }
    }
}

/// What a node's machine is short of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostPressure {
    Memory,
    Disk,
    DiskCritical,
}

impl HostPressure {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Disk, Self::DiskCritical];

    /// The name in tables and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::DiskCritical => "disk_critical",
        }
    }

    /// The inverse of [`HostPressure::as_str`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pressure| pressure.as_str() == name)
    }

    /// Parses the wire's value; one of a newer program is none that is known here.
    #[must_use]
    pub fn from_pb(value: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|pressure| i32::from(pressure.to_pb()) == value)
    }

    /// The wire's value.
    #[must_use]
    pub fn to_pb(self) -> pb::HostPressure {
        match self {
            Self::Memory => pb::HostPressure::Memory,
            Self::Disk => pb::HostPressure::Disk,
            Self::DiskCritical => pb::HostPressure::DiskCritical,
        }
    }
}

/// In words: "memory", "disk", "memory and disk".
#[must_use]
pub fn shortage(pressure: &BTreeSet<HostPressure>) -> &'static str {
    let memory = pressure.contains(&HostPressure::Memory);
    match (memory, pressure.len() > usize::from(memory)) {
        (true, true) => "memory and disk",
        (true, false) => "memory",
        (false, true) => "disk",
        (false, false) => "nothing",
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A node as the registry records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    /// Whether it takes work.
    pub state: NodeState,
    /// Where its vmhost answers, as `http://host:port`.
    pub endpoint: String,
    /// The VM driver it uses.
    pub driver: String,
    /// The largest number of virtual CPUs one of its VMs may have.
    pub vcpus: u32,
    /// Memory that all of its VMs together may have, in MiB.
    pub memory_mib: u64,
    /// How many VMs it runs at once.
    pub max_vms: u32,
    /// The images it can boot.
    pub images: Vec<String>,
    /// Counts the starts of its vmhost.
    pub incarnation: u64,
    /// The registry's revision at its last change.
    pub revision: u64,
    /// When its vmhost last registered.
    pub registered_at: Timestamp,
    /// Labels that jobs can ask for.
    pub labels: BTreeMap<String, String>,
    /// Why it is in this state; may be empty.
    pub reason: String,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// While Draining: when what is left is stopped.
    pub drain_deadline: Option<Timestamp>,
    /// What its keepers want of it: its state, unless it is Lost.
    pub wanted: NodeState,
    /// What its machine is short of: with anything it takes no new VMs.
    pub pressure: BTreeSet<HostPressure>,
    /// The volumes that it has for its VMs.
    pub volumes: Vec<String>,
    /// The largest scratch disks that one of its VMs may have, together, in MiB; 0: it gives its VMs no disks.
    pub scratch_mib: u64,
}

impl Node {
    /// Whether it takes new VMs.
    #[must_use]
    pub fn takes_vms(&self) -> bool {
        self.state == NodeState::Ready && self.pressure.is_empty()
    }

    /// Whether VMs that it has take attempts.
    #[must_use]
    pub fn takes_attempts(&self) -> bool {
        self.state == NodeState::Ready && !self.pressure.contains(&HostPressure::DiskCritical)
    }
}

impl From<Node> for pb::Node {
    fn from(node: Node) -> Self {
        Self {
            id: node.id.to_string(),
            state: node.state.to_pb().into(),
            endpoint: node.endpoint,
            driver: node.driver,
            vcpus: node.vcpus,
            memory_mib: node.memory_mib,
            max_vms: node.max_vms,
            images: node.images,
            incarnation: node.incarnation,
            revision: node.revision,
            registered_at: Some(node.registered_at.into()),
            labels: node.labels,
            reason: node.reason,
            updated_at: Some(node.updated_at.into()),
            drain_deadline: node.drain_deadline.map(Into::into),
            wanted: node.wanted.to_pb().into(),
            pressure: node.pressure.into_iter().map(|pressure| pressure.to_pb().into()).collect(),
            volumes: node.volumes,
            scratch_mib: node.scratch_mib,
        }
    }
}

impl TryFrom<pb::Node> for Node {
    type Error = Error;

    fn try_from(node: pb::Node) -> Result<Self, Error> {
        // A vmhost that registers leaves these to the registry.
        let parse = |field: &str, value: i32| match value {
            0 => Ok(NodeState::Ready),
            value => NodeState::from_pb(field, value),
        };
        let (state, wanted) = (parse("node.state", node.state)?, parse("node.wanted", node.wanted)?);
        let host = node.endpoint.strip_prefix("http://").or_else(|| node.endpoint.strip_prefix("https://"));
        if host.is_none_or(str::is_empty) {
            return Err(invalid("node.endpoint", node.endpoint, "http://host:port"));
        }
        if node.max_vms == 0 {
            return Err(invalid("node.max_vms", node.max_vms, "at least 1"));
        }
        Ok(Self {
            id: NodeId::parse("node.id", &node.id)?,
            state,
            endpoint: node.endpoint,
            driver: node.driver,
            vcpus: node.vcpus,
            memory_mib: node.memory_mib,
            max_vms: node.max_vms,
            images: node.images,
            incarnation: node.incarnation,
            revision: node.revision,
            registered_at: node.registered_at.unwrap_or_default().into(),
            labels: parse_labels("node.labels", node.labels)?,
            reason: node.reason,
            updated_at: node.updated_at.unwrap_or_default().into(),
            drain_deadline: node.drain_deadline.map(Into::into),
            wanted,
            pressure: node.pressure.into_iter().filter_map(HostPressure::from_pb).collect(),
            volumes: node.volumes,
            scratch_mib: node.scratch_mib,
        })
    }
}
