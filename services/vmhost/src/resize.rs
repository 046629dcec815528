//! Whether a VM may be given another shape: what can be said without its machine and the other VMs.
//!
//! Pure: no file, socket or clock.

use blixard::{
    error::{Error, Reason, invalid},
    vm::VmShape,
};

use crate::hypervisor::MEMORY_STEP_MIB;

/// The shapes of a VM, on disk. A machine that is being given another may have either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Shapes {
    /// The largest that it can be given; `None`: it keeps the one that it was started with.
    pub(crate) most: Option<VmShape>,
    /// The one that it has, once that is not the one that it was started with any more.
    pub(crate) now: Option<VmShape>,
    /// The one that it is being given.
    pub(crate) next: Option<VmShape>,
    /// Of those that it was to be given before that and of which nobody can tell whether it was, the largest: it may have that.
    #[serde(default)]
    pub(crate) perhaps: Option<VmShape>,
}

impl Shapes {
    /// It is to be given this one.
    pub(crate) fn ask(&mut self, to: VmShape) {
        if let Some(before) = self.next.replace(to) {
            self.perhaps = Some(self.perhaps.map_or(before, |perhaps| perhaps.max(before)));
        }
    }

    /// It has this one.
    pub(crate) fn know(&mut self, has: VmShape) {
        (self.now, self.next, self.perhaps) = (Some(has), None, None);
    }

    /// It has at least this one, and so much memory; its guest may have to let go of vCPUs until it has `told`. What it had `before` it may
    /// have kept.
    pub(crate) fn know_but_vcpus(&mut self, has: VmShape, told: u32, before: VmShape) {
        let memory_mib = has.memory_mib;
        self.now = Some(VmShape { vcpus: has.vcpus.max(before.vcpus), memory_mib });
        self.next = Some(VmShape { vcpus: told, memory_mib });
        self.perhaps = self.perhaps.map(|perhaps| VmShape { memory_mib, ..perhaps });
    }

    /// The largest that it may have beside `now`.
    pub(crate) fn room(&self, now: VmShape) -> VmShape {
        [self.next, self.perhaps].into_iter().flatten().fold(now, VmShape::max)
    }
}

/// Whether a VM of the shape `from` may be given another one. `node_vcpus`: what the node offers to any VM. `fixed`: why a VM without
/// `most` keeps what it has.
pub(crate) fn admit(
    from: VmShape,
    to: VmShape,
    most: Option<VmShape>,
    node_vcpus: u32,
    fixed: &str,
) -> Result<(), Error> {
    let refused =
        |reason, field: &str, value: u32, allowed: &str| Err(Error { reason, ..invalid(field, value, allowed) });
    let Some(most) = most else {
        return match (from.vcpus == to.vcpus, from.memory_mib == to.memory_mib) {
            (true, true) => Ok(()),
            (true, false) => {
                let allowed = format!("{}, which it has: {fixed}", from.memory_mib);
                refused(Reason::ExceedsCapacity, "memory_mib", to.memory_mib, &allowed)
            }
            (false, _) => {
                let allowed = format!("{}, which it has: {fixed}", from.vcpus);
                refused(Reason::ExceedsCapacity, "vcpus", to.vcpus, &allowed)
            }
        };
    };
    let most_vcpus = most.vcpus.min(node_vcpus).max(from.vcpus);
    if to.vcpus > most_vcpus {
        let allowed = format!("1 to {most_vcpus} (four times what it was started with, and what its node has)");
        return refused(Reason::ExceedsCapacity, "vcpus", to.vcpus, &allowed);
    }
    let allowed = || {
        let (has, most) = (from.memory_mib, most.memory_mib);
        format!("{has}, which it has, or more by whole {MEMORY_STEP_MIB}, up to {most} (MiB); never less")
    };
    match to.memory_mib.checked_sub(from.memory_mib) {
        Some(_) if to.memory_mib > most.memory_mib => {
            refused(Reason::ExceedsCapacity, "memory_mib", to.memory_mib, &allowed())
        }
        Some(more) if more.is_multiple_of(MEMORY_STEP_MIB) => Ok(()),
        Some(_) | None => refused(Reason::InvalidField, "memory_mib", to.memory_mib, &allowed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: VmShape = VmShape { vcpus: 2, memory_mib: 512 };
    const MOST: Option<VmShape> = Some(VmShape { vcpus: 8, memory_mib: 2048 });

    #[test]
    fn room_stays_taken_for_all_of_which_nobody_can_tell() {
        let shape = |vcpus, memory_mib| VmShape { vcpus, memory_mib };
        let mut shapes = Shapes::default();
        for (to, room) in [((4, 768), (4, 768)), ((8, 640), (8, 768)), ((1, 512), (8, 768))] {
            shapes.ask(shape(to.0, to.1));
            assert_eq!(shapes.room(FROM), shape(room.0, room.1));
        }
        // Its memory is known then, and its vCPUs when its guest has let them go.
        shapes.know_but_vcpus(shape(1, 640), 1, FROM);
        let [now, next, perhaps] = [shape(2, 640), shape(1, 640), shape(8, 640)].map(Some);
        assert_eq!(shapes, Shapes { most: None, now, next, perhaps });
        assert_eq!(shapes.room(shape(2, 640)), shape(8, 640));
        shapes.know(shape(1, 640));
        assert_eq!(shapes, Shapes { now: Some(shape(1, 640)), ..Shapes::default() });
        // One that was written down by a vmhost that knew of one only.
        let before = r#"{"most":null,"now":null,"next":{"vcpus":1,"memory_mib":640}}"#;
        let before: Shapes = serde_json::from_str(before).expect("is read");
        assert_eq!(before, Shapes { next: Some(shape(1, 640)), ..Shapes::default() });
    }

    fn refusal(vcpus: u32, memory_mib: u32, most: Option<VmShape>) -> (Reason, String) {
        let error = admit(FROM, VmShape { vcpus, memory_mib }, most, 6, "it is fixed").expect_err("refused");
        (error.reason, error.message)
    }

    #[test]
    fn vcpus_go_both_ways_and_memory_up_in_whole_steps() {
        for (vcpus, memory_mib) in [(1, 512), (6, 512), (2, 640), (6, 2048), (2, 512)] {
            assert_eq!(admit(FROM, VmShape { vcpus, memory_mib }, MOST, 6, ""), Ok(()));
        }
        // One that was started on a larger node keeps what it has.
        assert_eq!(admit(VmShape { vcpus: 8, ..FROM }, VmShape { vcpus: 8, ..FROM }, MOST, 6, ""), Ok(()));
    }

    #[test]
    fn a_refusal_names_field_value_and_what_is_allowed() {
        let allowed = "512, which it has, or more by whole 128, up to 2048 (MiB); never less";
        assert_eq!(
            refusal(7, 512, MOST),
            (
                Reason::ExceedsCapacity,
                "vcpus: \"7\" is not allowed: 1 to 6 (four times what it was started with, and what its node has)"
                    .to_owned()
            )
        );
        for (memory_mib, reason) in
            [(2176, Reason::ExceedsCapacity), (600, Reason::InvalidField), (384, Reason::InvalidField)]
        {
            let message = format!("memory_mib: \"{memory_mib}\" is not allowed: {allowed}");
            assert_eq!(refusal(2, memory_mib, MOST), (reason, message));
        }
        let fixed = |field: &str, value: u32, has: u32| {
            (Reason::ExceedsCapacity, format!("{field}: \"{value}\" is not allowed: {has}, which it has: it is fixed"))
        };
        assert_eq!(refusal(3, 640, None), fixed("vcpus", 3, 2));
        assert_eq!(refusal(2, 640, None), fixed("memory_mib", 640, 512));
        assert_eq!(admit(FROM, FROM, None, 6, ""), Ok(()));
    }
}
