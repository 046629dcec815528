use blixard::node::HostPressure as Told;
use proptest::prelude::*;

use super::*;

/// A machine of 10,240 MiB keeps 1,024 MiB for itself: tight below 512, critical below 256.
fn memory(available_mib: u64) -> Observation {
    stalled(available_mib, 0)
}

fn stalled(available_mib: u64, stalled_percent: u32) -> Observation {
    Observation { memory: vec![Memory { total_mib: 10_240, available_mib, stalled_percent }], disks: vec![] }
}

/// A disk of 1,000 GiB with a million inodes.
fn disk(free_mib: u64, free_inodes: u64) -> Observation {
    let disk = Disk { total_bytes: 1000 << 30, free_bytes: free_mib << 20, total_inodes: 1_000_000, free_inodes };
    Observation { memory: vec![], disks: vec![disk] }
}

fn vm(id: u128, kind: VmKind, memory_mib: u32, accepted_at: i64, doing: Doing) -> Candidate {
    Candidate { id: VmId(uuid::Uuid::from_u128(id)), kind, memory_mib, accepted_at: Timestamp(accepted_at), doing }
}

fn id(id: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(id))
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_level_is_entered_at_its_limit_and_left_at_half_as_much_again() {
    use Level::{Critical, None, Tight};
    for (seen, memory_level, disk_level) in [
        (vec![memory(512)], None, None),
        (vec![memory(511)], Tight, None),
        (vec![memory(511), memory(767)], Tight, None),
        (vec![memory(511), memory(768)], None, None),
        (vec![memory(256)], Tight, None),
        (vec![memory(255)], Critical, None),
        (vec![memory(255), memory(383)], Critical, None),
        (vec![memory(255), memory(384)], Tight, None),
        (vec![memory(255), memory(9000)], None, None),
        (vec![stalled(2000, 90)], None, None),
        (vec![stalled(1000, 19)], None, None),
        (vec![stalled(1000, 20)], Tight, None),
        (vec![stalled(500, 39)], Tight, None),
        (vec![stalled(500, 40)], Critical, None),
        (vec![disk(4096, 500_000)], None, None),
        (vec![disk(4095, 500_000)], None, Tight),
        (vec![disk(4095, 500_000), disk(6143, 500_000)], None, Tight),
        (vec![disk(4095, 500_000), disk(6144, 500_000)], None, None),
        (vec![disk(1023, 500_000)], None, Critical),
        (vec![disk(900_000, 49_999)], None, Tight),
        (vec![disk(900_000, 19_999)], None, Critical),
        (vec![Observation::default()], None, None),
    ] {
        let mut pressure = Pressure::default();
        for seen in &seen {
            assert_eq!(pressure.step(at(0), seen, &[]), Option::None);
        }
        assert_eq!(pressure.levels(), (memory_level, disk_level), "{seen:?}");
    }
}

#[test]
fn a_small_disk_needs_a_part_of_itself_and_a_file_system_without_inodes_none() {
    let disk = |free_mib: u64| Disk { total_bytes: 1000 << 20, free_bytes: free_mib << 20, ..Disk::default() };
    for (free, level) in [(50, Level::None), (49, Level::Tight), (20, Level::Tight), (19, Level::Critical)] {
        assert_eq!(disk(free).level(Level::None), level, "{free} MiB");
    }
}

#[test]
fn the_node_tells_what_it_is_short_of() {
    let told = |seen: &[Observation]| {
        let mut pressure = Pressure::default();
        let mut all = Observation::default();
        seen.iter().cloned().for_each(|seen| {
            all.memory.extend(seen.memory);
            all.disks.extend(seen.disks);
        });
        pressure.step(at(0), &all, &[]);
        pressure.told().into_iter().collect::<Vec<_>>()
    };
    assert_eq!(told(&[memory(9000), disk(9000, 900_000)]), []);
    assert_eq!(told(&[memory(300), disk(9000, 900_000)]), [Told::Memory]);
    assert_eq!(told(&[memory(100), disk(4000, 900_000)]), [Told::Memory, Told::Disk]);
    assert_eq!(told(&[memory(9000), disk(100, 900_000)]), [Told::Disk, Told::DiskCritical]);
    assert_eq!(told(&[memory(9000), memory(300)]), [Told::Memory], "the worst of them");
}

#[test]
fn who_costs_least_goes_first_one_at_a_time_and_never_more_than_needed() {
    use Doing::{Attempt, Changing, Nothing};
    use VmKind::{Ephemeral, Service};
    let mut vms = vec![
        vm(1, Service, 512, 5, Nothing),
        vm(2, Service, 1024, 9, Nothing),
        vm(3, Service, 1024, 7, Nothing),
        vm(4, Ephemeral, 4096, 1, Nothing),
        vm(5, Ephemeral, 256, 10, Attempt),
        vm(6, Ephemeral, 256, 11, Attempt),
        vm(7, Service, 256, 12, Attempt),
        vm(8, Ephemeral, 256, 13, Changing),
    ];
    let mut pressure = Pressure::default();
    assert_eq!(pressure.step(at(0), &memory(300), &vms), None, "tight is no reason");
    let mut now = 0;
    for expected in [
        Relief::Retire(id(3)),
        Relief::Retire(id(2)),
        Relief::Retire(id(1)),
        Relief::Retire(id(4)),
        Relief::Kill(id(6)),
        Relief::Kill(id(5)),
        Relief::Kill(id(7)),
    ] {
        assert_eq!(pressure.step(at(now), &memory(100), &vms), Some(expected), "{now}");
        assert_eq!(pressure.step(at(now + 14), &memory(100), &vms), None, "it may take its time");
        let (Relief::Retire(gone) | Relief::Kill(gone)) = expected;
        vms.retain(|vm| vm.id != gone);
        assert_eq!(pressure.step(at(now + 14), &memory(100), &vms), None, "its memory is coming back");
        now += 17;
    }
    assert_eq!(pressure.step(at(now), &memory(100), &vms), None, "nobody is left whose end would help");
}

#[test]
fn who_does_not_end_in_time_is_passed_over_and_told_again_at_last() {
    let vms = [vm(1, VmKind::Service, 512, 1, Doing::Nothing), vm(2, VmKind::Ephemeral, 512, 2, Doing::Attempt)];
    let mut pressure = Pressure::default();
    let critical = memory(100);
    assert_eq!(pressure.step(at(0), &critical, &vms), Some(Relief::Retire(id(1))));
    assert_eq!(pressure.step(at(15), &critical, &vms), Some(Relief::Kill(id(2))));
    assert_eq!(pressure.step(at(30), &critical, &vms), None);
    assert_eq!(pressure.step(at(32), &critical, &vms), Some(Relief::Retire(id(1))));
    // It was enough, and later it is not again.
    assert_eq!(pressure.step(at(33), &memory(400), &vms), None);
    assert_eq!(pressure.step(at(34), &critical, &vms), Some(Relief::Retire(id(1))));
}

proptest! {
    /// Whatever is seen, and however fast VMs end: only critical memory ends any, never two within what the first needs to take effect,
    /// and no attempt while somebody runs nothing who was not told.
    #[test]
    fn nothing_is_ended_without_need(
        steps in proptest::collection::vec((0..600u64, 0..100u32, 0..5u64, any::<bool>()), 1..60),
        kinds in proptest::collection::vec((any::<bool>(), 0..3u8), 0..8),
    ) {
        let doing = |doing| match doing { 0 => Doing::Nothing, 1 => Doing::Attempt, _ => Doing::Changing };
        let kind = |service| if service { VmKind::Service } else { VmKind::Ephemeral };
        let of = |(number, (service, what)): (usize, &(bool, u8))| {
            vm(number as u128, kind(*service), 256, i64::try_from(number).unwrap(), doing(*what))
        };
        let mut vms: Vec<Candidate> = kinds.iter().enumerate().map(of).collect();
        let (mut pressure, mut now, mut last) = (Pressure::default(), at(0), None::<Duration>);
        let mut told: BTreeSet<VmId> = BTreeSet::new();
        for (available, stalled_percent, seconds, ends) in steps {
            now += at(seconds);
            let relief = pressure.step(now, &stalled(available, stalled_percent), &vms);
            if pressure.levels().0 < Level::Critical {
                prop_assert_eq!(relief, None);
                (last, told) = (None, BTreeSet::new());
            }
            let Some(Relief::Retire(victim) | Relief::Kill(victim)) = relief else { continue };
            let found = *vms.iter().find(|vm| vm.id == victim).expect("it is here");
            prop_assert!(last.is_none_or(|last| now - last >= SETTLES));
            match relief {
                Some(Relief::Kill(_)) => {
                    prop_assert_eq!(found.doing, Doing::Attempt);
                    let spared = vms.iter().find(|vm| vm.doing == Doing::Nothing && !told.contains(&vm.id));
                    prop_assert_eq!(spared, None);
                }
                _ => prop_assert_eq!(found.doing, Doing::Nothing),
            }
            told.insert(victim);
            last = Some(now);
            if ends {
                vms.retain(|vm| vm.id != victim);
            }
        }
    }
}
