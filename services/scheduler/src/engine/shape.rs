//! What makes two jobs, two VMs or two sets of nodes the same to the engine; long names as numbers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use blixard::{
    egress::{Egress, NETWORK_LABEL, NETWORK_LABEL_ON},
    id::{NodeId, VmId},
    job::{Isolation, JobSpec},
    vm::{VmConfig, VmKind},
    volume::Volumes,
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
    /// Volumes that a VM has.
    VolumesId
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

/// What VMs boot with: one whose volumes can't be had says nothing of those without.
pub(super) type BootId = (ImageId, VolumesId);

/// [`Egress::None`].
pub(super) const NO_EGRESS: EgressId = EgressId(0);

/// No volumes.
pub(super) const NO_VOLUMES: VolumesId = VolumesId(0);

/// Numbers for names, or for what stands for one. None is ever given back: there are as many as there are images, nodes, policies or
/// sets of volumes.
#[derive(Debug)]
pub(super) struct Names<T: ?Sized = str> {
    numbers: BTreeMap<Arc<T>, u32>,
    names: Vec<Arc<T>>,
}

impl<T: ?Sized> Default for Names<T> {
    fn default() -> Self {
        Self { numbers: BTreeMap::new(), names: Vec::new() }
    }
}

impl<T: ?Sized + Ord> Names<T>
where
    for<'a> Arc<T>: From<&'a T>,
    for<'a> &'a T: Default,
{
    pub(super) fn beginning_with(first: &T) -> Self {
        let mut names = Self::default();
        names.number(first);
        names
    }

    pub(super) fn number(&mut self, name: &T) -> u32 {
        if let Some(&number) = self.numbers.get(name) {
            return number;
        }
        let (name, number) = (Arc::<T>::from(name), u32::try_from(self.names.len()).unwrap_or(u32::MAX));
        self.names.push(name.clone());
        self.numbers.insert(name, number);
        number
    }

    pub(super) fn find(&self, name: &T) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    pub(super) fn name(&self, number: u32) -> &T {
        self.names.get(number as usize).map_or(Default::default(), |name| name)
    }
}

/// Which nodes will do, and which are liked better.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Constraint {
    pub(super) node_id: Option<NodeId>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) preferred: BTreeMap<String, String>,
    /// Volumes that the node has.
    pub(super) volumes: BTreeSet<String>,
    /// It gives its VMs scratch disks of so many MiB, or disks at all when this is 1.
    pub(super) scratch_mib: u64,
}

impl Constraint {
    pub(super) fn of(spec: &JobSpec) -> Self {
        let (labels, preferred) = (spec.node_labels.clone(), spec.preferred_node_labels.clone());
        let constraint = Self { node_id: spec.node_id.clone(), labels, preferred, ..Self::default() };
        let network = spec.egress.as_ref().is_some_and(Egress::needs_network);
        constraint.with_network(network).with_volumes(&spec.volumes)
    }

    pub(super) fn of_vm(config: &VmConfig) -> Self {
        let constraint = Self { node_id: config.node_id.clone(), ..Self::default() };
        constraint.with_network(config.egress.needs_network()).with_volumes(&config.volumes)
    }

    fn with_volumes(self, volumes: &Volumes) -> Self {
        Self { volumes: volumes.names().map(str::to_owned).collect(), scratch_mib: least_scratch(volumes), ..self }
    }

    /// A node that gives its guests a network says so by a label.
    fn with_network(mut self, needed: bool) -> Self {
        if needed {
            self.labels.insert(NETWORK_LABEL.to_owned(), NETWORK_LABEL_ON.to_owned());
        }
        self
    }
}

/// What a node must be able to give to a VM that is to have these.
pub(super) fn least_scratch(volumes: &Volumes) -> u64 {
    volumes.scratch_mib().max(u64::from(!volumes.is_empty()))
}

/// What VMs have in common when any of them will do. Ordered by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Class {
    pub(super) image: ImageId,
    pub(super) egress: EgressId,
    pub(super) volumes: VolumesId,
    pub(super) kind: VmKind,
    pub(super) memory_mib: u32,
    pub(super) vcpus: u32,
}

impl Class {
    /// What VMs fail to boot for, whatever their size.
    pub(super) fn boot(&self) -> BootId {
        (self.image, self.volumes)
    }

    pub(super) fn of(config: &VmConfig, image: ImageId, egress: EgressId, volumes: VolumesId) -> Self {
        Self { image, egress, volumes, kind: config.kind, memory_mib: config.memory_mib, vcpus: config.vcpus }
    }
}

/// What two jobs have in common when whatever fits one fits the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// A VM like this, on one of these nodes.
    Like {
        image: ImageId,
        egress: EgressId,
        volumes: VolumesId,
        vcpus: u32,
        memory_mib: u32,
        isolation: Isolation,
        site: SiteId,
    },
    /// This VM, whatever it is like.
    Target(VmId),
}

impl Shape {
    /// Whether a VM of this class will do, nodes apart. A fresh VM must be of exactly the size that was asked for, any
    /// VM of exactly the egress policy and the volumes; one with a scratch disk is a fresh one, for no other kind has any.
    pub(super) fn takes(&self, class: &Class) -> bool {
        let Self::Like { image, egress, volumes, vcpus, memory_mib, isolation, .. } = *self else { return false };
        (class.image, class.egress, class.volumes) == (image, egress, volumes)
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
        let Self::Like { image, egress, volumes, vcpus, memory_mib, isolation, .. } = *self else { return None };
        let kind = if isolation == Isolation::Minimal { VmKind::Service } else { VmKind::Ephemeral };
        Some(Class { image, egress, volumes, kind, memory_mib, vcpus })
    }
}
