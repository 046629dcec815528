//! What makes two jobs, two VMs or two sets of nodes the same to the engine; long names as numbers.

use std::{collections::BTreeMap, sync::Arc};

use blixard::{
    egress::{Egress, NETWORK_LABEL, NETWORK_LABEL_ON},
    id::{NodeId, VmId},
    job::{Isolation, JobSpec},
    vm::{VmConfig, VmKind},
};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) struct $name(pub(super) u32);
    };
}

number!(
    /// An image.
    ImageId
);
number!(
    /// An egress policy, by its text.
    EgressId
);
number!(
    /// A node, in the order in which the engine heard of them.
    NodeIx
);
number!(
    /// A [`Constraint`].
    SiteId
);
number!(
    /// A [`Shape`] that jobs wait with.
    ShapeId
);
number!(
    /// A tenant that has jobs.
    TenantId
);

/// [`Egress::None`].
pub(super) const NO_EGRESS: EgressId = EgressId(0);

/// Numbers for names. None is ever given back: there are as many as there are images, nodes or policies.
#[derive(Debug, Default)]
pub(super) struct Names {
    numbers: BTreeMap<Arc<str>, u32>,
    names: Vec<Arc<str>>,
}

impl Names {
    pub(super) fn beginning_with(first: &str) -> Self {
        let mut names = Self::default();
        names.number(first);
        names
    }

    pub(super) fn number(&mut self, name: &str) -> u32 {
        if let Some(&number) = self.numbers.get(name) {
            return number;
        }
        let (name, number) = (Arc::<str>::from(name), u32::try_from(self.names.len()).unwrap_or(u32::MAX));
        self.names.push(name.clone());
        self.numbers.insert(name, number);
        number
    }

    pub(super) fn find(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    pub(super) fn name(&self, number: u32) -> &str {
        self.names.get(number as usize).map_or("", |name| name)
    }
}

/// Which nodes will do, and which are liked better.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Constraint {
    pub(super) node_id: Option<NodeId>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) preferred: BTreeMap<String, String>,
}

impl Constraint {
    pub(super) fn of(spec: &JobSpec) -> Self {
        let (labels, preferred) = (spec.node_labels.clone(), spec.preferred_node_labels.clone());
        let constraint = Self { node_id: spec.node_id.clone(), labels, preferred };
        constraint.with_network(spec.egress.as_ref().is_some_and(Egress::needs_network))
    }

    pub(super) fn of_vm(config: &VmConfig) -> Self {
        Self { node_id: config.node_id.clone(), ..Self::default() }.with_network(config.egress.needs_network())
    }

    /// A node that gives its guests a network says so by a label.
    fn with_network(mut self, needed: bool) -> Self {
        if needed {
            self.labels.insert(NETWORK_LABEL.to_owned(), NETWORK_LABEL_ON.to_owned());
        }
        self
    }
}

/// What VMs have in common when any of them will do. Ordered by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) image: ImageId,
    pub(super) egress: EgressId,
    pub(super) kind: VmKind,
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
}

impl Class {
    pub(super) fn of(config: &VmConfig, image: ImageId, egress: EgressId) -> Self {
        Self { image, egress, kind: config.kind, memory_mib: config.memory_mib, vcpus: config.vcpus }
    }
}

/// What two jobs have in common when whatever fits one fits the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// A VM like this, on one of these nodes.
    Like { image: ImageId, egress: EgressId, vcpus: u32, memory_mib: u32, isolation: Isolation, site: SiteId },
    /// This VM, whatever it is like.
    Target(VmId),
}

impl Shape {
    /// Whether a VM of this class will do, nodes apart. A fresh VM must be of exactly the size that was asked for, any
    /// VM of exactly the egress policy.
    pub(super) fn takes(&self, class: &Class) -> bool {
        let Self::Like { image, egress, vcpus, memory_mib, isolation, .. } = *self else { return false };
        (class.image, class.egress) == (image, egress)
            && match class.kind {
                VmKind::Service => {
                    isolation != Isolation::Maximum && class.vcpus >= vcpus && class.memory_mib >= memory_mib
                }
                VmKind::Ephemeral => {
                    isolation != Isolation::Minimal && (class.vcpus, class.memory_mib) == (vcpus, memory_mib)
                }
            }
    }

    /// The class of the VM to start for it.
    pub(super) fn wanted(&self) -> Option<Class> {
        let Self::Like { image, egress, vcpus, memory_mib, isolation, .. } = *self else { return None };
        let kind = if isolation == Isolation::Minimal { VmKind::Service } else { VmKind::Ephemeral };
        Some(Class { image, egress, kind, memory_mib, vcpus })
    }
}
