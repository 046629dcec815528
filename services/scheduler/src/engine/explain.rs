//! Why a job was given its VM, and what a waiting one waits for, in words.
//!
//! What is said at a decision is put together from what was looked at and from counts that are kept anyway; only
//! [`Engine::explain`], which somebody has asked for, looks at every node.

use blixard::{
    id::{JobId, VmId},
    job::Isolation,
    node::{Node, NodeState, shortage},
    pb::common::v1 as pb,
    time::{Timestamp, millis},
    vm::VmKind,
};

use super::{
    Decision, Engine,
    jobs::{JobEntry, Phase},
    nodes::{NodeEntry, Warm, missing_volume},
    queue::Wait,
    shape::{Class, Constraint, NodeIx, Shape, SiteId},
    vms::VmEntry,
};

/// The place in the queue is counted up to here at a decision …
const COUNTED_AT_DECISION: usize = 100;
/// … and up to here when somebody asks.
const COUNTED_WHEN_ASKED: usize = 10_000;
/// So many nodes with room are looked at for the record of a VM's start.
const ROOMS_LOOKED_AT: usize = 256;

impl Engine {
    /// What a waiting job waits for, with what every node was asked and answered; `None` when it does not wait. Its place in
    /// the queue is counted up to 10,000.
    #[must_use]
    pub fn explain(&self, now: Timestamp, job_id: JobId) -> Option<Decision> {
        let entry = self.jobs.get(&job_id)?;
        let waits_for = self.waits_for(job_id)?;
        let mut decision = self.about(now, entry, COUNTED_WHEN_ASKED);
        decision.summary = format!("it waits for {waits_for}");
        if let Some(Shape::Like { isolation, site, .. }) = self.shape_of(entry)
            && let Some(class) = self.shape_of(entry).and_then(|shape| shape.wanted())
        {
            decision.filters = self.filters(&self.fleet.constraint(site), &class);
            if isolation != Isolation::Maximum {
                decision.filters.push(self.warm_filter(&class));
            }
            decision.candidates = self.candidates(site, &class, usize::MAX).1;
        }
        Some(decision)
    }

    /// What a job waits for, in words; `None` when it does not wait.
    #[must_use]
    pub fn waits_for(&self, job_id: JobId) -> Option<String> {
        let entry = self.jobs.get(&job_id)?;
        match entry.phase {
            Phase::Given { .. } => None,
            Phase::Placing(_) => Some("its assignment to be recorded".to_owned()),
            Phase::Ending => Some("its end to be recorded".to_owned()),
            Phase::Held => Some(match entry.unmet.first() {
                Some(dependency) if entry.unmet.len() == 1 => format!("job {} to end", dependency.job_id),
                Some(dependency) => format!("job {} and {} more to end", dependency.job_id, entry.unmet.len() - 1),
                None => "the pause before its next attempt to be over".to_owned(),
            }),
            Phase::Waiting => {
                let waiting = self.queue.shapes.get(&entry.shape?)?;
                let tenant = self.queue.tenants.get(&entry.tenant)?;
                if tenant.limit > 0 && tenant.jobs >= tenant.limit {
                    let whose = if tenant.name.is_empty() { String::new() } else { format!(" of \"{}\"", tenant.name) };
                    return Some(format!("one of the {} jobs{whose} to end (tenant_max_jobs)", tenant.jobs));
                }
                let Shape::Like { site, .. } = waiting.shape else { return Some(waiting.wait.to_string()) };
                Some(self.describe_wait(waiting.wait, site, &waiting.shape.wanted()?))
            }
        }
    }

    /// What a VM of this class would wait for.
    pub(super) fn describe_wait(&self, wait: Wait, site: SiteId, class: &Class) -> String {
        match wait {
            Wait::MaxVms => format!("one of the {} VMs to end (max_vms)", self.settings.max_vms),
            Wait::MaxServiceVms => {
                let image = self.images.name(class.image.0);
                format!("one of the {} service VMs of {image} (max_service_vms)", self.our_services(class.image))
            }
            Wait::Room => self.missing_room(&self.fleet.constraint(site), class),
            Wait::Turn | Wait::Boot | Wait::BootPause | Wait::AutoScalingOff | Wait::NoNode | Wait::Target(_) => {
                wait.to_string()
            }
        }
    }

    /// What the node that comes nearest lacks.
    fn missing_room(&self, constraint: &Constraint, class: &Class) -> String {
        if let Some(node) = constraint.node_id.as_ref().and_then(|id| self.nodes().get(id)).map(|entry| &entry.node)
            && node.state != NodeState::Ready
        {
            return format!("{}, which is {}, to take VMs again", node.id, node.state);
        }
        let mut lacks = "a node that is ready and has the image".to_owned();
        let questions = self.questions(constraint, class);
        for entry in self.nodes().values() {
            let failed = questions.iter().position(|question| !(question.passes)(entry));
            if failed.is_some_and(|at| questions[at].name == "pressure") {
                let node = &entry.node;
                lacks = format!("{}, which is short of {}, to take VMs again", node.id, shortage(&node.pressure));
            }
            if failed.is_some_and(|at| matches!(questions[at].name, "vm_slots" | "memory")) {
                let node = &entry.node;
                let free = node.memory_mib.saturating_sub(entry.used_memory_mib);
                lacks = if entry.vms >= node.max_vms {
                    format!("one of the {} VMs of {} to end", node.max_vms, node.id)
                } else {
                    format!("{} MiB of memory: {} has {free} MiB free", class.memory_mib, node.id)
                };
            }
        }
        lacks
    }

    fn shape_of(&self, entry: &JobEntry) -> Option<Shape> {
        self.queue.shapes.get(&entry.shape?).map(|waiting| waiting.shape)
    }

    /// What every decision says: the queue, the tenant, the wait.
    fn about(&self, now: Timestamp, entry: &JobEntry, cap: usize) -> Decision {
        let tenant = self.queue.tenants.get(&entry.tenant);
        let in_line = matches!(entry.phase, Phase::Waiting);
        let position = if in_line { self.queue.ahead_of(entry.tenant, entry.key, cap) as u64 + 1 } else { 0 };
        Decision {
            decided_at: Some(now.into()),
            queue_position: position,
            queue_length: self.queue.waiting as u64,
            tenant: tenant.map(|tenant| tenant.name.to_string()).unwrap_or_default(),
            tenant_running: tenant.map_or(0, |tenant| tenant.jobs),
            tenant_limit: tenant.map_or(0, |tenant| tenant.limit),
            waited_ms: millis(now.since(entry.queued_at)),
            scheduler_epoch: self.lead.unwrap_or(0),
            ..Decision::default()
        }
    }

    /// Why a free VM was given to the job: what was looked at to find it.
    pub(super) fn explain_warm(&self, now: Timestamp, job_id: JobId, warm: &Warm) -> Box<Decision> {
        let Some(entry) = self.jobs.get(&job_id) else { return Box::default() };
        let node_id = self.fleet.place(warm.node).id.as_str();
        let about = self.about(now, entry, COUNTED_AT_DECISION);
        let kind = warm.class.kind.as_str();
        let size = format!("{} vCPUs, {} MiB", warm.class.vcpus, warm.class.memory_mib);
        let why = self.vms.get(&warm.vm_id).and_then(|vm| vm.why.as_deref());
        let mut decision = match why {
            Some(why) => Decision {
                summary: format!("VM {}, started for such a job: {}", warm.vm_id, why.summary),
                filters: why.filters.clone(),
                candidates: why.candidates.clone(),
                ..about
            },
            None => Decision {
                summary: format!("VM {} on {node_id}: the smallest free {kind} VM that fits ({size})", warm.vm_id),
                filters: vec![filter("free_vms", warm.classes, 1)],
                ..about
            },
        };
        if decision.candidates.is_empty() {
            decision.candidates.push(pb::DecisionCandidate {
                node_id: node_id.to_owned(),
                vm_id: warm.vm_id.to_string(),
                score: warm.liked.into(),
                detail: format!("{kind}, {size}; preferred labels: {}", warm.liked),
            });
        }
        Box::new(decision)
    }

    pub(super) fn explain_target(&self, now: Timestamp, job_id: JobId, vm_id: VmId, vm: &VmEntry) -> Box<Decision> {
        let Some(entry) = self.jobs.get(&job_id) else { return Box::default() };
        let node_id = self.fleet.place(vm.node).id.to_string();
        let about = self.about(now, entry, COUNTED_AT_DECISION);
        let summary = format!("VM {vm_id} on {node_id}: the one that was asked for");
        let detail = "its target VM".to_owned();
        let candidate = pb::DecisionCandidate { node_id, vm_id: vm_id.to_string(), score: 0, detail };
        Box::new(Decision { summary, candidates: vec![candidate], ..about })
    }

    /// Why a VM is started on this node, from what the indexes count.
    pub(super) fn explain_start(
        &self,
        now: Timestamp,
        job_id: JobId,
        site: SiteId,
        class: &Class,
        node: NodeIx,
    ) -> Box<Decision> {
        let Some(entry) = self.jobs.get(&job_id) else { return Box::default() };
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (all, allowed) = (count(self.nodes().len()), count(self.fleet.members(site)));
        let slots = count(self.fleet.with_slots(site, class.image, class.vcpus));
        let (fit, candidates) = self.candidates(site, class, ROOMS_LOOKED_AT);
        let about = self.about(now, entry, COUNTED_AT_DECISION);
        let filters = vec![
            filter("node_labels_and_volumes", all, allowed),
            filter("ready_image_vcpus_vm_slots", allowed, slots),
            filter("memory", slots.min(count(ROOMS_LOOKED_AT)), fit),
        ];
        let (kind, node_id) = (class.kind.as_str(), &self.fleet.place(node).id);
        let summary = format!("no free VM fitted; a new {kind} VM on {node_id} ({})", self.rule());
        Box::new(Decision { summary, filters, candidates, ..about })
    }

    fn rule(&self) -> &'static str {
        match self.settings.placement {
            blixard::config::PlacementChoice::Spread => "spread: the most free memory",
            blixard::config::PlacementChoice::Pack => "pack: the least free memory that is enough",
        }
    }

    /// The nodes on which a VM could be started now, the best first, and how many fit of those that were looked at.
    fn candidates(&self, site: SiteId, class: &Class, cap: usize) -> (u32, Vec<pb::DecisionCandidate>) {
        let (fit, rooms) = self.fleet.rooms(site, class, self.settings.placement, cap);
        let candidate = |(liked, free, ix): (u32, u64, NodeIx)| pb::DecisionCandidate {
            node_id: self.fleet.place(ix).id.to_string(),
            vm_id: String::new(),
            score: i64::from(liked),
            detail: format!("preferred labels: {liked}; {free} MiB free; {}", self.rule()),
        };
        (fit, rooms.into_iter().map(candidate).collect())
    }

    /// Every question, asked of every node that passed the one before.
    fn filters(&self, constraint: &Constraint, class: &Class) -> Vec<pb::DecisionFilter> {
        let mut left: Vec<&NodeEntry> = self.nodes().values().collect();
        let ask = |question: Question<'_>| {
            let considered = left.len();
            let example = left.iter().find(|entry| !(question.passes)(entry)).map(|entry| (question.why_not)(entry));
            left.retain(|entry| (question.passes)(entry));
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            let (considered, passed) = (count(considered), count(left.len()));
            pb::DecisionFilter { example: example.unwrap_or_default(), ..filter(question.name, considered, passed) }
        };
        self.questions(constraint, class).into_iter().map(ask).collect()
    }

    fn questions<'a>(&'a self, constraint: &'a Constraint, class: &'a Class) -> Vec<Question<'a>> {
        let image = self.images.name(class.image.0);
        let free = |entry: &NodeEntry| entry.node.memory_mib.saturating_sub(entry.used_memory_mib);
        let (vcpus, memory_mib) = (class.vcpus, class.memory_mib);
        vec![
            Question::new(
                "node",
                |entry| constraint.node_id.as_ref().is_none_or(|wanted| *wanted == entry.node.id),
                |entry| format!("{} is another node", entry.node.id),
            ),
            Question::new(
                "node_labels",
                |entry| missing_label(constraint, &entry.node).is_none(),
                |entry| {
                    let label = missing_label(constraint, &entry.node).unwrap_or_default();
                    format!("{} has no label {label}", entry.node.id)
                },
            ),
            Question::new(
                "volumes",
                |entry| missing_volume(constraint, &entry.node).is_none(),
                |entry| {
                    let missing = missing_volume(constraint, &entry.node).unwrap_or_default();
                    format!("{} has not: {missing}", entry.node.id)
                },
            ),
            Question::new(
                "image",
                move |entry| entry.node.images.iter().any(|other| other == image),
                move |entry| format!("{} has no image {image}", entry.node.id),
            ),
            Question::new(
                "vcpus",
                move |entry| entry.node.vcpus >= vcpus,
                |entry| format!("{} has VMs of at most {} vCPUs", entry.node.id, entry.node.vcpus),
            ),
            Question::new(
                "ready",
                |entry| entry.node.state == NodeState::Ready,
                |entry| format!("{} is {}", entry.node.id, entry.node.state),
            ),
            Question::new(
                "pressure",
                |entry| entry.node.pressure.is_empty(),
                |entry| format!("{} is short of {}", entry.node.id, shortage(&entry.node.pressure)),
            ),
            Question::new(
                "vm_slots",
                |entry| entry.vms < entry.node.max_vms,
                |entry| format!("{} has its {} VMs", entry.node.id, entry.node.max_vms),
            ),
            Question::new(
                "memory",
                move |entry| free(entry) >= u64::from(memory_mib),
                move |entry| format!("{} has {} MiB free", entry.node.id, free(entry)),
            ),
        ]
    }

    /// Service VMs of the image that are large enough.
    fn warm_filter(&self, class: &Class) -> pb::DecisionFilter {
        let from = Class { kind: VmKind::Service, memory_mib: 0, vcpus: 0, ..*class };
        let to = Class { memory_mib: u32::MAX, vcpus: u32::MAX, ..from };
        let all = self.counts.services.range(from..=to);
        let fits = |other: &Class| other.vcpus >= class.vcpus && other.memory_mib >= class.memory_mib;
        let (mut considered, mut passed) = (0, 0);
        for (other, count) in all {
            considered += count;
            passed += if fits(other) { *count } else { 0 };
        }
        pb::DecisionFilter {
            example: if passed > 0 { "those that fit are busy or starting".to_owned() } else { String::new() },
            ..filter("service_vms_large_enough", considered, passed)
        }
    }
}

/// What is asked of a node.
struct Question<'a> {
    name: &'static str,
    passes: Box<dyn Fn(&NodeEntry) -> bool + 'a>,
    why_not: Box<dyn Fn(&NodeEntry) -> String + 'a>,
}

impl<'a> Question<'a> {
    fn new(
        name: &'static str,
        passes: impl Fn(&NodeEntry) -> bool + 'a,
        why_not: impl Fn(&NodeEntry) -> String + 'a,
    ) -> Self {
        Self { name, passes: Box::new(passes), why_not: Box::new(why_not) }
    }
}

fn missing_label(constraint: &Constraint, node: &Node) -> Option<String> {
    let missing = constraint.labels.iter().find(|(key, value)| node.labels.get(*key) != Some(value));
    missing.map(|(key, value)| format!("{key}={value}"))
}

fn filter(name: &str, considered: u32, passed: u32) -> pb::DecisionFilter {
    pb::DecisionFilter { name: name.to_owned(), considered, passed, example: String::new() }
}
