//! What must hold after every step. One function, called by the tests, the simulation and, while there is little to look at, by
//! every debug build.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Engine,
    jobs::Phase,
    vms::{VmCounts, VmEntry},
};

/// Debug builds check after each step only up to so many jobs and VMs: a check looks at all of them.
const SMALL: usize = 256;

impl Engine {
    pub(super) fn broken_invariant_if_small(&self) -> Option<String> {
        if self.jobs.len() + self.vms.len() > SMALL { None } else { self.broken_invariant() }
    }

    /// The first invariant that does not hold, in words.
    #[must_use]
    pub fn broken_invariant(&self) -> Option<String> {
        self.broken_by_jobs()
            .or_else(|| self.broken_by_vms())
            .or_else(|| self.broken_by_nodes())
            .or_else(|| self.queue.broken_invariant())
    }

    /// Each job is where its phase says, once; tenants count what their jobs use.
    fn broken_by_jobs(&self) -> Option<String> {
        let lanes: BTreeMap<_, _> = self
            .queue
            .lanes()
            .flat_map(|(shape, tenant, lane)| lane.jobs.iter().map(move |(key, id)| (*id, (shape, tenant, *key))))
            .collect();
        if lanes.len() != self.queue.waiting {
            return Some(format!("{} jobs stand in lanes, some of them twice", self.queue.waiting));
        }
        let mut tenants: BTreeMap<_, (u32, u64)> = BTreeMap::new();
        let mut given = 0;
        for (id, job) in &self.jobs {
            let (waits, place) = (matches!(job.phase, Phase::Waiting), lanes.get(id));
            if waits != place.is_some() {
                return Some(format!("job {id} is {:?} and its lane is {place:?}", job.phase));
            }
            if place.is_some_and(|place| Some(place.0) != job.shape || (place.1, place.2) != (job.tenant, job.key)) {
                return Some(format!("job {id} stands in another lane than its own: {place:?}"));
            }
            if matches!(job.phase, Phase::Given { .. } | Phase::Placing(_)) {
                let sum = tenants.entry(job.tenant).or_default();
                *sum = (sum.0 + 1, sum.1 + u64::from(job.vcpus));
            }
            if let Phase::Given { vm_id, .. } = job.phase {
                given += 1;
                if !self.jobs_on_vm.get(&vm_id).is_some_and(|jobs| jobs.contains(id)) {
                    return Some(format!("job {id} has VM {vm_id} and would not be found by it"));
                }
            }
        }
        let found = self.jobs_on_vm.values().map(BTreeSet::len).sum::<usize>();
        if given != found {
            return Some(format!("{given} jobs have VMs and {found} are found by them"));
        }
        if given != self.given {
            return Some(format!("{given} jobs are assigned or running and {} are counted", self.given));
        }
        self.queue.tenants.iter().find_map(|(id, tenant)| {
            let sum = tenants.get(id).copied().unwrap_or_default();
            (sum != (tenant.jobs, tenant.vcpus)).then(|| {
                format!("tenant {:?} counts {:?} where its jobs are {sum:?}", tenant.name, (tenant.jobs, tenant.vcpus))
            })
        })
    }

    /// A VM is reserved for one job at most, which no other VM is; it is on offer only when it is free.
    fn broken_by_vms(&self) -> Option<String> {
        let mut reserved = BTreeMap::new();
        for (id, vm) in &self.vms {
            let Some(job_id) = vm.reserved else { continue };
            if let Some(other) = reserved.insert(job_id, id) {
                return Some(format!("job {job_id} has two VMs reserved: {other} and {id}"));
            }
            if self.jobs.get(&job_id).is_some_and(|job| matches!(job.phase, Phase::Waiting)) {
                return Some(format!("job {job_id} is in line while VM {id} is reserved for it"));
            }
        }
        for (node, class, vm_id) in self.fleet.free_vms() {
            let offered = |vm: &VmEntry| vm.is_on_offer() && vm.node == node && vm.class == class;
            if !self.vms.get(&vm_id).is_some_and(offered) {
                return Some(format!("VM {vm_id} counts as free in {class:?} and is not"));
            }
        }
        let hidden = self.vms.iter().find(|(id, vm)| vm.is_on_offer() && !self.fleet.has_free(vm.node, vm.class, **id));
        if let Some((id, _)) = hidden {
            return Some(format!("VM {id} is free and nobody would find it"));
        }
        let counts = self.counted_anew();
        (counts != self.counts).then(|| format!("VMs are counted as {:?} and are {counts:?}", self.counts))
    }

    fn counted_anew(&self) -> VmCounts {
        let mut counts = VmCounts::default();
        for (id, vm) in &self.vms {
            counts.vm(*id, vm, 1);
        }
        for creation in self.creations.values() {
            counts.creation(creation, 1);
        }
        counts
    }

    /// What a node counts as used is what its VMs have, those about to be created included.
    fn broken_by_nodes(&self) -> Option<String> {
        let live = self.vms.values().map(|vm| (vm.node, vm.class));
        let coming = self.creations.values().map(|creation| (creation.node, creation.class));
        let mut used: BTreeMap<_, (u64, u32)> = BTreeMap::new();
        for (node, class) in live.chain(coming) {
            let sum = used.entry(node).or_default();
            *sum = (sum.0 + u64::from(class.memory_mib), sum.1 + 1);
        }
        self.fleet.all().find_map(|ix| {
            let place = self.fleet.place(ix);
            let sum = used.get(&ix).copied().unwrap_or_default();
            let shown = self.nodes().get(&place.id).map_or(sum, |entry| (entry.used_memory_mib, entry.vms));
            let counted = (place.used_memory_mib, place.used_slots);
            (sum != counted || sum != shown)
                .then(|| format!("node {} counts {counted:?} and shows {shown:?} where its VMs have {sum:?}", place.id))
        })
    }
}
