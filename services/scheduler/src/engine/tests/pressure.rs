//! A node that is short of memory or disk gets no new VMs; while its disk is full, no attempts either.

use blixard::node::HostPressure;

use super::*;

fn short_of(revision: u64, pressure: &[HostPressure]) -> Input {
    Input::Node(Node { pressure: pressure.iter().copied().collect(), ..node(revision, revision) })
}

fn job(id: u128) -> Input {
    Input::Job(queued(id, 10 + id as u64, spec(|spec| spec.isolation = Isolation::Standard)))
}

fn drained(effects: &[Effect]) -> Vec<VmId> {
    let drained = |effect: &Effect| if let Effect::DrainVm { vm_id, .. } = effect { Some(*vm_id) } else { None };
    effects.iter().filter_map(drained).collect()
}

#[test]
fn a_node_that_is_short_of_something_gets_no_vm_and_the_job_waits_and_says_why_until_that_is_over() {
    for (pressure, word) in [(HostPressure::Memory, "memory"), (HostPressure::Disk, "disk")] {
        let mut engine = engine(settings());
        engine.step(Timestamp(0), short_of(2, &[pressure]));
        assert_eq!(creations(&engine.step(Timestamp(0), job(1))), 0);
        let explained = engine.explain(Timestamp(0), job_id(1)).expect("it waits");
        let filter = explained.filters.iter().find(|filter| filter.name == "pressure").expect("it was asked");
        assert_eq!(
            (filter.considered, filter.passed, filter.example.as_str()),
            (1, 0, &*format!("n1 is short of {word}"))
        );
        let summary = &explained.summary;
        assert!(summary.contains(&format!("n1, which is short of {word}, to take VMs again")), "{summary}");

        let effects = engine.step(Timestamp(1), short_of(3, &[]));
        assert_eq!(creations(&effects), 1, "{effects:?}");
    }
}

#[test]
fn another_node_takes_what_the_one_that_is_short_does_not() {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), short_of(2, &[HostPressure::Memory]));
    let other = NodeId::parse("node", "n2").expect("a name");
    // Smaller, so that it is not chosen otherwise.
    engine.step(Timestamp(0), Input::Node(Node { id: other.clone(), memory_mib: 1024, ..node(3, 1) }));
    let effects = engine.step(Timestamp(0), job(1));
    let nodes: Vec<_> = effects
        .iter()
        .filter_map(|effect| if let Effect::CreateVm { node_id, .. } = effect { Some(node_id) } else { None })
        .collect();
    assert_eq!(nodes, [&other]);
}

#[test]
fn vms_that_are_there_get_jobs_unless_the_disk_is_full() {
    let warm = || Input::Vm(vm(100, 1000, VmKind::Service, VmState::Idle));
    for (pressure, given) in [
        (&[HostPressure::Memory][..], true),
        (&[HostPressure::Disk], true),
        (&[HostPressure::Disk, HostPressure::DiskCritical], false),
    ] {
        let mut engine = engine(settings());
        engine.step(Timestamp(0), warm());
        engine.step(Timestamp(0), short_of(2, pressure));
        let effects = engine.step(Timestamp(0), job(1));
        assert_eq!(!assignments(&effects).is_empty(), given, "{pressure:?}: {effects:?}");
        let effects = engine.step(Timestamp(1), short_of(3, &[]));
        assert_eq!(!assignments(&effects).is_empty(), !given, "{pressure:?}: {effects:?}");
    }
}

/// The node refuses before the scheduler has heard why: the VM is given up for another, and that is no failure to boot.
#[test]
fn a_vm_that_its_node_turned_away_is_started_elsewhere() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), job(1));
    let [Effect::CreateVm { ticket, .. }] = &effects[..] else { panic!("{effects:?}") };
    let mut starting = vm(100, 1000, VmKind::Ephemeral, VmState::Starting);
    engine.step(Timestamp(0), Input::Created { ticket: *ticket, result: Ok(starting.clone()) });
    let refused = |at: i64, engine: &mut Engine| {
        engine.step(Timestamp(at), Input::Tick);
        let result = Err(Error::new(Reason::Overloaded, "this node is short of memory and takes no VM"));
        engine.step(Timestamp(at), Input::Told { order: OrderKey::Start(vm_id(100)), result })
    };
    assert_eq!(drained(&refused(0, &mut engine)), [], "it may have had no slot just then");
    engine.step(Timestamp(100), short_of(2, &[HostPressure::Memory]));
    assert_eq!(drained(&refused(600, &mut engine)), [vm_id(100)]);
    (starting.state, starting.revision) = (VmState::Terminated, 1001);
    engine.step(Timestamp(700), Input::Vm(starting));
    assert_eq!(creations(&engine.step(Timestamp(700), short_of(3, &[]))), 1, "at once: it is no failure to boot");
}
