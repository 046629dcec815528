//! That a job has ended may be heard after its VM was given to the next one.

use super::*;

/// Jobs are listed before VMs: the first job, listed as Assigned, has ended when its VM is listed as free. The second job is
/// given the VM before the watch tells of the first one's end.
fn two_jobs_of_one_vm() -> Engine {
    let mut engine = engine(Settings { auto_scaling: false, ..settings() });
    let minimal = || spec(|spec| spec.isolation = Isolation::Minimal);
    let on_vm = |id, revision, state| Job {
        state,
        attempt: 1,
        vm_id: Some(vm_id(7)),
        node_id: Some(node_id()),
        ..queued(id, revision, minimal())
    };
    let snapshot = Input::Snapshot {
        nodes: vec![node(1, 1)],
        vms: vec![Vm { jobs_assigned: 1, ..vm(7, 2006, VmKind::Service, VmState::Idle) }],
        jobs: vec![on_vm(1, 2002, JobState::Assigned), queued(2, 2003, minimal())],
    };
    assert_eq!(assignments(&engine.step(Timestamp(0), snapshot)), [(job_id(2), vm_id(7), 1)]);
    let result = Ok(on_vm(2, 2010, JobState::Assigned));
    engine.step(Timestamp(0), Input::Assigned { job_id: job_id(2), vm_id: vm_id(7), result });
    for (revision, state) in [(2004, JobState::Running), (2005, JobState::Succeeded)] {
        engine.step(Timestamp(0), Input::Job(on_vm(1, revision, state)));
        assert_eq!(engine.broken_invariant(), None);
    }
    engine
}

#[test]
fn the_second_job_is_lost_when_the_vm_ends() {
    let mut engine = two_jobs_of_one_vm();
    let effects = engine.step(Timestamp(0), Input::Vm(vm(7, 2011, VmKind::Service, VmState::Failed)));
    let lost =
        |effect: &Effect| matches!(effect, Effect::LoseAttempt { job_id: id, attempt: 1, .. } if *id == job_id(2));
    assert!(effects.iter().any(lost), "{effects:?}");
}

#[test]
fn the_second_job_is_ordered_again_when_its_node_comes_back() {
    let mut engine = two_jobs_of_one_vm();
    let run = OrderKey::Run(job_id(2), 1);
    engine.step(Timestamp(0), Input::Told { order: run, result: Ok(()) });
    let effects = engine.step(Timestamp(0), Input::Node(node(2012, 2)));
    let told = |effect: &Effect| matches!(effect, Effect::Tell { order, .. } if order.key() == run);
    assert!(effects.iter().any(told), "{effects:?}");
}

/// Found by chance, which needs thousands of worlds for it.
#[test]
#[rustfmt::skip]
fn a_vm_that_is_given_up_takes_its_second_job_with_it() {
    let plans = [
        (0, 1, 0, 0, true), (1, 0, 0, 0, false), (0, 0, 0, 1, false), (0, 0, 0, 0, false), (0, 0, 0, 1, false),
        (2, 0, 1, 0, true), (0, 0, 0, 3, false),
    ];
    let steps = vec![
        (10, 272), (10, 0), (10, 0), (0, 0), (0, 0), (10, 0), (3, 272), (0, 0), (3, 437), (2, 69), (5, 881),
        (2, 892), (6, 774), (2, 637), (12, 176), (4, 966), (1, 240), (10, 774), (6, 36), (0, 700), (3, 601),
        (3, 284), (0, 436), (5, 99), (2, 660), (2, 591), (2, 964), (4, 877), (2, 475), (5, 815), (4, 67), (2, 378),
        (0, 966), (7, 0), (1, 696), (1, 441), (5, 410), (10, 66), (5, 615), (2, 421), (2, 987), (2, 472), (5, 310),
        (10, 318), (11, 390), (4, 460), (2, 703), (6, 528), (1, 423), (5, 80), (5, 924), (3, 518), (3, 641),
        (2, 180), (0, 370), (12, 764), (4, 618), (0, 167), (6, 934), (1, 665), (5, 515), (6, 334), (2, 431), (5, 77),
        (3, 30), (5, 154), (12, 659), (1, 996), (12, 952), (5, 296), (2, 751), (11, 861), (9, 89), (2, 983),
        (3, 424), (1, 922), (2, 927), (1, 856), (1, 723), (3, 322), (2, 55), (13, 689), (13, 162), (3, 172),
    ];
    play(&plans, steps, 0, 1).expect("every job ends");
}

/// Found by chance, which needs thousands of worlds for it.
#[test]
#[rustfmt::skip]
fn a_node_that_comes_back_is_told_of_the_second_job() {
    let plans = [
        (0, 0, 1, 0, false), (2, 0, 0, 0, true), (1, 0, 1, 1, false), (0, 0, 0, 1, false), (0, 0, 0, 1, false),
        (1, 0, 0, 0, true), (0, 0, 1, 3, true),
    ];
    let steps = vec![
        (10, 0), (10, 450), (10, 0), (0, 0), (0, 0), (3, 301), (10, 0), (3, 157), (0, 2), (4, 159), (12, 804),
        (6, 323), (1, 81), (10, 592), (10, 278), (0, 503), (1, 734), (2, 713), (3, 295), (6, 906), (0, 201),
        (0, 408), (10, 744), (4, 779), (4, 754), (4, 708), (12, 196), (1, 673), (1, 56), (3, 823), (1, 788),
        (5, 370), (4, 429), (0, 968), (0, 748), (3, 529), (3, 765), (0, 203), (2, 915), (5, 773), (7, 593), (1, 4),
        (5, 236), (12, 92), (2, 103), (3, 669), (4, 636), (1, 588), (1, 457), (1, 646), (11, 501), (0, 501),
        (2, 570), (1, 646), (5, 782), (4, 831), (3, 41), (3, 40), (9, 930), (12, 424), (1, 575), (2, 807), (1, 332),
        (0, 323), (2, 586), (2, 619), (0, 167), (2, 24), (12, 575), (5, 166), (0, 768), (0, 495), (12, 501),
        (3, 401), (13, 326),
    ];
    play(&plans, steps, 0, 0).expect("every job ends");
}
