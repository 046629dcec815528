//! What makes two jobs, two VMs or two sets of nodes the same to the engine; long names as numbers.

use std::{collections::BTreeMap, sync::Arc};

use blixard::{
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

/// Numbers for names. None is ever given back: there are as many as there are images or nodes.
#[derive(Debug, Default)]
pub(super) struct Names {
    numbers: BTreeMap<Arc<str>, u32>,
    names: Vec<Arc<str>>,
}

impl Names {
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
        Self { node_id: spec.node_id.clone(), labels, preferred }
    }

    pub(super) fn only(node_id: Option<NodeId>) -> Self {
        Self { node_id, ..Self::default() }
    }
}

/// What VMs have in common when any of them will do. Ordered by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) image: ImageId,
    pub(super) kind: VmKind,
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
}

impl Class {
    pub(super) fn of(config: &VmConfig, image: ImageId) -> Self {
        Self { image, kind: config.kind, memory_mib: config.memory_mib, vcpus: config.vcpus }
    }
}

/// What two jobs have in common when whatever fits one fits the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// A VM like this, on one of these nodes.
    Like { image: ImageId, vcpus: u32, memory_mib: u32, isolation: Isolation, site: SiteId },
    /// This VM, whatever it is like.
    Target(VmId),
}

impl Shape {
    /// Whether a VM of this class will do, nodes apart. A fresh VM must be of exactly the size that was asked for.
    pub(super) fn takes(&self, class: &Class) -> bool {
        let Self::Like { image, vcpus, memory_mib, isolation, .. } = *self else { return false };
        class.image == image
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
        let Self::Like { image, vcpus, memory_mib, isolation, .. } = *self else { return None };
        let kind = if isolation == Isolation::Minimal { VmKind::Service } else { VmKind::Ephemeral };
        Some(Class { image, kind, memory_mib, vcpus })
    }
}
