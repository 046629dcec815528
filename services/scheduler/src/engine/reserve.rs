//! Room for jobs that need much of it: a node is kept free for them, or smaller ones would take what comes free for ever.
//!
//! Urgency alone does not help a job of 30 GiB on nodes where 2 GiB come free at a time. So when a shape has got no room for
//! a while though its first job waits for it, one node that could hold it starts no other VMs until it does. What runs there goes on, and free VMs there
//! still take jobs. Slots need no such thing: the next one to come free goes to whose turn it is.

use std::time::Duration;

use blixard::{id::JobId, time::Timestamp};

use super::{
    Engine, Wake,
    queue::{Offer, Wait},
    shape::{Class, NodeIx, ShapeId, SiteId},
};

/// So long a shape waits for room in competition with all others.
const PATIENCE: Duration = Duration::from_secs(60);
/// At most one node of so many is kept free (and one at least).
const ONE_NODE_OF: usize = 4;

impl Engine {
    /// The first job of a shape found no room.
    pub(super) fn keep_room(&mut self, now: Timestamp, id: ShapeId, job_id: JobId, site: SiteId, class: &Class) {
        let (Some(job), Some(waiting)) = (self.jobs.get(&job_id), self.queue.shapes.get(&id)) else { return };
        let due = job.ready_since.max(waiting.started_at).plus(PATIENCE);
        if due > now {
            self.give_back_room(id);
            return self.arm(due, Wake::Starving(id));
        }
        if self.kept.contains_key(&id) || self.kept.len() * ONE_NODE_OF >= self.nodes().len() + ONE_NODE_OF - 1 {
            return;
        }
        let nodes = self.fleet.all().filter(|ix| self.fleet.could_hold(*ix, site, class));
        let free = |ix: &NodeIx| self.fleet.free_mib(*ix) + self.fleet.place(*ix).evictable_mib;
        if let Some(ix) = nodes.max_by_key(free) {
            self.fleet.keep_for(ix, Some(id));
            self.kept.insert(id, ix);
        }
    }

    /// The node that is kept for a shape, if it has room by now.
    pub(super) fn kept_room(&self, id: ShapeId, class: &Class) -> Option<NodeIx> {
        let ix = *self.kept.get(&id)?;
        let room = self.fleet.has_slot(ix) && self.fleet.free_mib(ix) >= class.memory_mib.into();
        room.then_some(ix)
    }

    /// Others may start VMs again on the node that was kept for a shape.
    pub(super) fn give_back_room(&mut self, id: ShapeId) {
        let Some(ix) = self.kept.remove(&id) else { return };
        self.fleet.keep_for(ix, None);
        for image in self.fleet.images_of(ix) {
            self.queue.offer(image, Offer::Room);
        }
    }

    /// Gives back what is kept for nobody, and nodes that take nothing any more.
    pub(super) fn review_kept(&mut self) {
        let over = |(id, ix): (&ShapeId, &NodeIx)| {
            let waits =
                self.queue.shapes.get(id).is_some_and(|waiting| waiting.wait == Wait::Room || waiting.is_open());
            (!waits || !self.fleet.takes_vms(*ix)).then_some(*id)
        };
        for id in self.kept.iter().filter_map(over).collect::<Vec<_>>() {
            self.give_back_room(id);
        }
    }
}
