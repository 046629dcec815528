//! Jobs that wait, by shape and urgency.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use blixard::{
    id::{JobId, NodeId, VmId},
    job::{Isolation, Job},
    limits,
    time::Timestamp,
    vm::{Defaults, VmConfig, VmKind},
};

use super::{Class, OWNER, OWNER_LABEL};

/// What two jobs have in common when whatever fits one fits the other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    pub(super) image: String,
    vcpus: u32,
    memory_mib: u32,
    /// Takes service VMs.
    service: bool,
    /// Takes nothing else.
    pub(super) service_only: bool,
    node_id: Option<NodeId>,
    pub(super) target_vm_id: Option<VmId>,
}

impl Shape {
    pub(super) fn of(job: &Job) -> Self {
        let spec = &job.spec;
        Self {
            image: spec.image.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            service: spec.isolation != Isolation::Maximum,
            service_only: spec.isolation == Isolation::Minimal,
            node_id: spec.node_id.clone(),
            target_vm_id: spec.target_vm_id,
        }
    }

    /// The shape that a pre-warmed VM waits for.
    pub(super) fn pre_warmed(defaults: Defaults) -> Self {
        Self {
            image: limits::DEFAULT_IMAGE.to_owned(),
            vcpus: defaults.vcpus,
            memory_mib: defaults.memory_mib,
            service: true,
            service_only: true,
            node_id: None,
            target_vm_id: None,
        }
    }

    /// Whether a VM of this class will do. A fresh VM must be of exactly the size that was asked for, and ours: one that
    /// a user started waits for that user's jobs.
    pub(super) fn accepts(&self, class: &Class) -> bool {
        let place = class.image == self.image && self.node_id.as_ref().is_none_or(|wanted| *wanted == class.node_id);
        place
            && match class.kind {
                VmKind::Service => self.service && class.vcpus >= self.vcpus && class.memory_mib >= self.memory_mib,
                VmKind::Ephemeral => {
                    !self.service_only && class.ours && class.vcpus == self.vcpus && class.memory_mib == self.memory_mib
                }
            }
    }

    /// The VM to start for it.
    pub(super) fn vm_config(&self) -> VmConfig {
        VmConfig {
            kind: if self.service_only { VmKind::Service } else { VmKind::Ephemeral },
            image: self.image.clone(),
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            labels: BTreeMap::from([(OWNER_LABEL.to_owned(), OWNER.to_owned())]),
            node_id: self.node_id.clone(),
        }
    }
}

/// Urgency: priority, then age, then the order in which the engine heard of them (within one millisecond).
type Key = (Reverse<i32>, Timestamp, u64, JobId);

/// Jobs that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    shapes: BTreeMap<Shape, Waiting>,
    index: BTreeMap<JobId, (Shape, Key)>,
    heard: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: BTreeSet<Key>,
    waits_for: String,
}

/// A walk through the queue in order of urgency, shapes passed over left out.
pub(super) struct Cursor {
    /// The next job of each shape that is still considered.
    heads: BTreeSet<(Key, Shape)>,
}

impl Queue {
    pub(super) fn insert(&mut self, job: &Job) {
        if self.index.contains_key(&job.id) {
            return;
        }
        let shape = Shape::of(job);
        let key = (Reverse(job.spec.priority), job.created_at, self.heard, job.id);
        self.heard += 1;
        self.shapes.entry(shape.clone()).or_default().jobs.insert(key);
        self.index.insert(job.id, (shape, key));
    }

    pub(super) fn remove(&mut self, job_id: JobId) {
        let Some((shape, key)) = self.index.remove(&job_id) else { return };
        if let Some(waiting) = self.shapes.get_mut(&shape) {
            waiting.jobs.remove(&key);
            if waiting.jobs.is_empty() {
                self.shapes.remove(&shape);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn contains(&self, job_id: JobId) -> bool {
        self.index.contains_key(&job_id)
    }

    pub(super) fn cursor(&self) -> Cursor {
        let first = |(shape, waiting): (&Shape, &Waiting)| Some((*waiting.jobs.first()?, shape.clone()));
        Cursor { heads: self.shapes.iter().filter_map(first).collect() }
    }

    /// The most urgent job not yet seen. It may be removed before the next call.
    pub(super) fn next(&self, cursor: &mut Cursor) -> Option<(JobId, Shape)> {
        let (key, shape) = cursor.heads.pop_first()?;
        let later = |waiting: &Waiting| {
            waiting.jobs.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded)).next().copied()
        };
        if let Some(next) = self.shapes.get(&shape).and_then(later) {
            cursor.heads.insert((next, shape.clone()));
        }
        Some((key.3, shape))
    }

    /// Leaves the rest of a shape out of this walk, and notes why.
    pub(super) fn pass_over(&mut self, cursor: &mut Cursor, shape: &Shape, waits_for: String) {
        cursor.heads.retain(|(_, other)| other != shape);
        self.set_waiting(shape, waits_for);
    }

    pub(super) fn set_waiting(&mut self, shape: &Shape, waits_for: String) {
        if let Some(waiting) = self.shapes.get_mut(shape) {
            waiting.waits_for = waits_for;
        }
    }

    pub(super) fn waits_for(&self, shape: &Shape) -> Option<&str> {
        self.shapes.get(shape).map(|waiting| waiting.waits_for.as_str())
    }

    /// The most urgent job for which a VM like this one would be started.
    pub(super) fn first_waiting_for(&self, config: &VmConfig, eligible: impl Fn(JobId) -> bool) -> Option<JobId> {
        let shapes = self.shapes.iter().filter(|(shape, _)| {
            let wanted = shape.vm_config();
            (wanted.kind, &wanted.image) == (config.kind, &config.image)
        });
        let jobs = shapes.flat_map(|(_, waiting)| waiting.jobs.iter().find(|key| eligible(key.3)));
        jobs.min().map(|key| key.3)
    }
}
