//! One behaviour each: queue and shares, routing, pools, nodes, the lead, explanations.

use std::time::Duration;

use blixard::{
    config::PlacementChoice,
    job::{Dependency, DependencyCondition, TENANT_LABEL},
};

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp(seconds * 1000)
}

fn minimal() -> JobSpec {
    spec(|spec| spec.isolation = Isolation::Minimal)
}

fn of_tenant(name: &str) -> JobSpec {
    spec(|spec| {
        spec.isolation = Isolation::Minimal;
        spec.labels.insert(TENANT_LABEL.to_owned(), name.to_owned());
    })
}

fn free_vm(id: u128) -> Input {
    Input::Vm(vm(id, 1000 + id as u64, VmKind::Service, VmState::Idle))
}

/// Gives as many VMs as there are jobs, one after the other, and says in which order the jobs went.
fn order_of(engine: &mut Engine, now: Timestamp, count: u128) -> Vec<JobId> {
    let given = (0..count).flat_map(|number| assignments(&engine.step(now, free_vm(500 + number)))).collect::<Vec<_>>();
    given.into_iter().map(|(job_id, ..)| job_id).collect()
}

fn reasons(effects: &[Effect]) -> Vec<String> {
    let reason = |effect: &Effect| match effect {
        Effect::FailJob { reason, timed_out, .. } => Some(format!("{timed_out}: {reason}")),
        Effect::DrainVm { vm_id, reason } => Some(format!("{}: {reason}", vm_id.0.as_u128())),
        _ => None,
    };
    effects.iter().filter_map(reason).collect()
}

fn no_scaling() -> Settings {
    Settings { auto_scaling: false, max_vms: 100, ..settings() }
}

#[test]
fn the_tenant_that_has_the_fewest_vcpus_goes_first() {
    let mut engine = engine(no_scaling());
    for (id, tenant) in [(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "b")] {
        engine.step(at(0), Input::Job(queued(id, 10 + id as u64, of_tenant(tenant))));
    }
    assert_eq!(order_of(&mut engine, at(0), 5), [1, 4, 2, 5, 3].map(job_id));
}

#[test]
fn a_tenant_at_its_limit_waits_until_one_of_its_jobs_has_ended() {
    let limits = BTreeMap::from([("a".to_owned(), 1)]);
    let mut engine = engine(Settings { tenant_limits: limits, ..no_scaling() });
    for id in [1, 2] {
        engine.step(at(0), Input::Job(queued(id, 10 + id as u64, of_tenant("a"))));
    }
    assert_eq!(order_of(&mut engine, at(0), 2), [job_id(1)]);
    assert_eq!(engine.waits_for(job_id(2)).as_deref(), Some("one of the 1 jobs of \"a\" to end (tenant_max_jobs)"));
    let ended = Job { state: JobState::Succeeded, ..queued(1, 50, of_tenant("a")) };
    let effects = engine.step(at(0), Input::Job(ended));
    assert_eq!(assignments(&effects), [(job_id(2), vm_id(501), 1)]);
}

#[test]
fn the_limit_holds_for_vms_that_are_started_too() {
    let mut engine = engine(Settings { max_vms: 100, tenant_max_jobs: 2, ..settings() });
    let effects: Vec<_> =
        (1..=10).flat_map(|id| engine.step(at(0), Input::Job(queued(id, 10 + id as u64, spec(|_| {}))))).collect();
    assert_eq!(creations(&effects), 2);
}

#[test]
fn waiting_is_worth_priority() {
    let job = |id, queued_at, priority| Job {
        queued_at: at(queued_at),
        ..queued(id, 10 + id as u64, spec(|s| (s.isolation, s.priority) = (Isolation::Minimal, priority)))
    };
    let mut engine = engine(no_scaling());
    // A level is worth 30 s: the second has 31 s of advantage over the first, the third has 29.
    for job in [job(1, 0, 0), job(2, 29, 1), job(3, 31, 1)] {
        engine.step(at(40), Input::Job(job));
    }
    assert_eq!(order_of(&mut engine, at(40), 3), [2, 1, 3].map(job_id));
}

#[test]
fn a_pause_between_attempts_is_kept_and_costs_nothing_meanwhile() {
    let mut engine = engine(no_scaling());
    engine.step(at(0), free_vm(7));
    let paused = Job { attempt: 1, not_before: Some(at(10)), ..queued(1, 10, minimal()) };
    assert_eq!(engine.step(at(0), Input::Job(paused)), []);
    assert_eq!(engine.waits_for(job_id(1)).as_deref(), Some("the pause before its next attempt to be over"));
    assert_eq!(engine.next_wake(), Some(at(10)));
    assert_eq!(assignments(&engine.step(at(10), Input::Tick)), [(job_id(1), vm_id(7), 2)]);
}

#[test]
fn a_job_that_waits_too_long_times_out_and_pauses_do_not_count() {
    let timeout = || spec(|s| (s.isolation, s.queue_timeout) = (Isolation::Minimal, Some(Duration::from_secs(5))));
    let mut engine = engine(no_scaling());
    engine.step(at(0), Input::Job(queued(1, 10, timeout())));
    engine.step(at(0), Input::Job(Job { not_before: Some(at(10)), attempt: 1, ..queued(2, 11, timeout()) }));
    assert_eq!(engine.next_wake(), Some(at(5)));
    let timed_out = "true: it waited 5000 ms, as long as queue_timeout_ms allows";
    assert_eq!(reasons(&engine.step(at(5), Input::Tick)), [timed_out]);
    assert_eq!(engine.step(at(10), Input::Tick), []);
    assert_eq!(reasons(&engine.step(at(15), Input::Tick)), [timed_out]);
}

fn dependent(id: u128, on: u128, condition: DependencyCondition) -> Job {
    let depends_on = vec![Dependency { job_id: job_id(on), condition }];
    queued(id, 20 + id as u64, spec(|s| (s.isolation, s.depends_on) = (Isolation::Minimal, depends_on)))
}

#[test]
fn a_job_starts_when_what_it_depends_on_has_ended_as_demanded_and_fails_otherwise() {
    use DependencyCondition::{Ended, Succeeded};
    for (condition, state, starts) in [
        (Succeeded, JobState::Succeeded, true),
        (Succeeded, JobState::Failed, false),
        (Succeeded, JobState::Cancelled, false),
        (Ended, JobState::TimedOut, true),
    ] {
        let mut engine = engine(no_scaling());
        engine.step(at(0), Input::Job(queued(1, 10, minimal())));
        assert_eq!(engine.step(at(0), Input::Job(dependent(2, 1, condition))), []);
        assert_eq!(engine.waits_for(job_id(2)), Some(format!("job {} to end", job_id(1))));
        let effects = engine.step(at(0), Input::Job(Job { state, ..queued(1, 50, minimal()) }));
        if starts {
            assert_eq!(assignments(&engine.step(at(0), free_vm(7))), [(job_id(2), vm_id(7), 1)]);
        } else {
            assert_eq!(
                reasons(&effects),
                [format!("false: it depends on the success of job {}, which is {state}", job_id(1))]
            );
        }
    }
}

#[test]
fn a_dependency_that_is_not_among_the_live_jobs_is_looked_up() {
    let mut engine = engine(no_scaling());
    let effects = engine.step(at(0), Input::Job(dependent(2, 1, DependencyCondition::Succeeded)));
    assert_eq!(effects, [Effect::LookUpJob { job_id: job_id(1) }]);
    assert_eq!(reasons(&engine.step(at(0), Input::JobGone(job_id(1)))).len(), 1);
    engine.step(at(0), Input::Job(dependent(3, 1, DependencyCondition::Succeeded)));
    engine.step(at(0), Input::Job(Job { state: JobState::Succeeded, ..queued(1, 5, minimal()) }));
    assert_eq!(assignments(&engine.step(at(0), free_vm(7))), [(job_id(3), vm_id(7), 1)]);
}

#[test]
fn what_a_step_leaves_undone_is_done_in_the_next_which_is_asked_for_at_once() {
    let mut engine = Engine::new(Settings { max_vms: 1000, ..no_scaling() });
    let vms = (1..=100).map(|id| vm(id, id as u64, VmKind::Service, VmState::Idle)).collect();
    let jobs = (1..=100).map(|id| queued(id, id as u64, minimal())).collect();
    engine.step(at(0), Input::Lead(Some(1)));
    let nodes = vec![Node { memory_mib: 1 << 20, ..node(1, 1) }];
    let first = assignments(&engine.step(at(0), Input::Snapshot { nodes, vms, jobs }));
    assert!((1..=16).contains(&first.len()), "{}", first.len());
    let mut all = first;
    while engine.next_wake() == Some(at(0)) {
        all.extend(assignments(&engine.step(at(0), Input::Tick)));
    }
    let expected: Vec<_> = (1..=100).map(|id| (job_id(id), vm_id(id), 1)).collect();
    assert_eq!(all, expected);
}

#[test]
fn more_shapes_than_a_step_looks_at_all_get_their_turn() {
    let mut engine = engine(no_scaling());
    for id in 1..=300u128 {
        let small = spec(|s| (s.isolation, s.memory_mib) = (Isolation::Minimal, 100 + id as u32));
        engine.step(at(0), Input::Job(queued(id, 10 + id as u64, small)));
    }
    let mut given = Vec::new();
    for number in 0..300 {
        given.extend(assignments(&engine.step(at(0), free_vm(500 + number))));
        while engine.next_wake() == Some(at(0)) {
            given.extend(assignments(&engine.step(at(0), Input::Tick)));
        }
    }
    assert_eq!(given.len(), 300);
}

fn cluster(settings: Settings, nodes: [Node; 3]) -> Engine {
    let mut engine = Engine::new(settings);
    engine.step(at(0), Input::Lead(Some(1)));
    engine.step(at(0), Input::Snapshot { nodes: nodes.to_vec(), vms: vec![], jobs: vec![] });
    engine
}

fn labelled(name: &str, memory_mib: u64, label: (&str, &str)) -> Node {
    let labels = BTreeMap::from([(label.0.to_owned(), label.1.to_owned())]);
    Node { id: NodeId::parse("node", name).expect("a name"), memory_mib, labels, ..node(1, 1) }
}

fn placed_on<'a>(effects: &'a [Effect]) -> Vec<&'a str> {
    let node = |effect: &'a Effect| match effect {
        Effect::CreateVm { node_id, .. } => Some(node_id.as_str()),
        _ => None,
    };
    effects.iter().filter_map(node).collect()
}

#[test]
fn required_labels_filter_preferred_ones_decide_and_else_the_placement_that_was_chosen() {
    let nodes = || {
        [
            labelled("n1", 2000, ("disk", "ssd")),
            labelled("n2", 4000, ("disk", "hdd")),
            labelled("n3", 3000, ("zone", "b")),
        ]
    };
    let wants = |required: &[(&str, &str)], preferred: &[(&str, &str)]| {
        let labels = |of: &[(&str, &str)]| of.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let (required, preferred) = (labels(required), labels(preferred));
        spec(|s| (s.node_labels, s.preferred_node_labels) = (required, preferred))
    };
    for (placement, spec, node) in [
        (PlacementChoice::Spread, wants(&[], &[]), "n2"),
        (PlacementChoice::Pack, wants(&[], &[]), "n1"),
        (PlacementChoice::Spread, wants(&[("disk", "ssd")], &[]), "n1"),
        (PlacementChoice::Spread, wants(&[], &[("zone", "b"), ("rack", "7")]), "n3"),
        (PlacementChoice::Pack, wants(&[("disk", "hdd")], &[("zone", "b")]), "n2"),
    ] {
        let mut engine = cluster(Settings { placement, ..settings() }, nodes());
        let effects = engine.step(at(0), Input::Job(queued(1, 10, spec)));
        assert_eq!(placed_on(&effects), [node]);
    }
}

#[test]
fn what_no_node_could_ever_run_fails_with_the_reason_and_a_lost_node_could() {
    let mut engine = engine(settings());
    // It would do, were it elsewhere.
    engine.step(at(0), Input::Vm(vm(7, 5, VmKind::Service, VmState::Busy)));
    let labels = BTreeMap::from([("gpu".to_owned(), "yes".to_owned())]);
    let effects = engine.step(at(0), Input::Job(queued(1, 10, spec(|s| s.node_labels = labels.clone()))));
    assert_eq!(reasons(&effects), ["false: spec.node_labels: no node that would do has the label gpu=yes"]);
    engine.step(at(0), Input::Node(Node { state: NodeState::Lost, ..labelled("n2", 4000, ("gpu", "yes")) }));
    assert_eq!(engine.step(at(0), Input::Job(queued(2, 11, spec(|s| s.node_labels = labels)))), []);
    assert_eq!(engine.waits_for(job_id(2)).as_deref(), Some("a node that is ready and has the image"));
}

#[test]
fn no_more_service_vms_of_an_image_are_started_than_allowed() {
    let mut engine = engine(Settings { max_vms: 10, max_service_vms: 2, ..settings() });
    let effects: Vec<_> =
        (1..=5).flat_map(|id| engine.step(at(0), Input::Job(queued(id, 10 + id as u64, minimal())))).collect();
    assert_eq!(creations(&effects), 2);
    assert_eq!(engine.waits_for(job_id(5)).as_deref(), Some("one of the 2 service VMs of default (max_service_vms)"));
}

/// An engine that keeps one VM warm: VM 7, which has just booted.
fn pre_warmed() -> Engine {
    let mut engine = engine(Settings { max_vms: 10, pre_warm: warm(1), ..settings() });
    engine.step(at(0), Input::Created { ticket: 0, result: Ok(vm(7, 2, VmKind::Service, VmState::Starting)) });
    engine.step(at(0), Input::Vm(vm(7, 3, VmKind::Service, VmState::Ready)));
    engine
}

#[test]
fn an_idle_vm_beyond_the_warm_ones_ends_when_it_was_idle_long_enough_and_not_before() {
    let mut engine = pre_warmed();
    let effects: Vec<_> = [7, 8].into_iter().flat_map(|id| engine.step(at(0), free_vm(id))).collect();
    assert_eq!(reasons(&effects), [""; 0]);
    assert_eq!(reasons(&engine.step(at(299), Input::Tick)), [""; 0]);
    assert_eq!(reasons(&engine.step(at(300), Input::Tick)), ["7: idle, and nothing needed it"]);
    assert_eq!(reasons(&engine.step(at(9000), Input::Tick)), [""; 0]);
}

#[test]
fn a_warm_vm_that_is_taken_is_replaced() {
    let mut engine = pre_warmed();
    let effects = engine.step(at(0), Input::Job(queued(1, 11, minimal())));
    assert_eq!((assignments(&effects).len(), creations(&effects)), (1, 1));
}

#[test]
fn a_service_vm_is_replaced_after_so_many_jobs_and_at_an_age() {
    let settings = Settings { recycle_after_jobs: 5, recycle_after: Some(Duration::from_secs(100)), ..settings() };
    let mut engine = engine(settings);
    let used = |id, jobs_assigned, state| Vm { jobs_assigned, ..vm(id, 10 + id as u64, VmKind::Service, state) };
    assert_eq!(reasons(&engine.step(at(0), Input::Vm(used(7, 4, VmState::Idle)))), [""; 0]);
    assert_eq!(reasons(&engine.step(at(0), Input::Vm(used(8, 5, VmState::Busy)))), [""; 0]);
    assert_eq!(reasons(&engine.step(at(0), Input::Vm(used(9, 5, VmState::Idle)))), ["9: replaced after 5 jobs"]);
    assert_eq!(reasons(&engine.step(at(100), Input::Tick)), ["7: replaced: it is old enough"]);
}

#[test]
fn one_idle_vm_makes_room_at_a_time() {
    let mut engine = engine(Settings { max_vms: 2, ..settings() });
    engine.step(at(0), free_vm(7));
    engine.step(at(0), free_vm(8));
    let maximum = || spec(|s| s.isolation = Isolation::Maximum);
    let effects: Vec<_> =
        (1..=4).flat_map(|id| engine.step(at(0), Input::Job(queued(id, 10 + id as u64, maximum())))).collect();
    assert_eq!(reasons(&effects), ["7: idle, and its room is needed"]);
}

#[test]
fn a_cordoned_node_gets_no_vms_and_its_free_ones_no_jobs() {
    let mut engine = engine(settings());
    engine.step(at(0), free_vm(7));
    engine.step(at(0), Input::Node(Node { state: NodeState::Cordoned, ..node(2, 1) }));
    let targeted = spec(|s| s.target_vm_id = Some(vm_id(7)));
    for (id, spec) in [(1, minimal()), (2, spec(|s| s.isolation = Isolation::Maximum)), (3, targeted)] {
        assert_eq!(engine.step(at(0), Input::Job(queued(id, 10 + id as u64, spec))), []);
    }
    let effects = engine.step(at(0), Input::Node(node(3, 1)));
    assert_eq!((assignments(&effects).len(), creations(&effects)), (1, 1));
}

#[test]
fn a_draining_node_loses_its_free_vms_at_once_busy_ones_when_they_are_free_and_all_at_the_deadline() {
    let mut engine = engine(Settings { max_vms: 10, ..settings() });
    engine.step(at(0), free_vm(7));
    for id in [8, 9] {
        engine.step(at(0), Input::Vm(vm(id, id as u64, VmKind::Service, VmState::Busy)));
    }
    let draining = Node { state: NodeState::Draining, drain_deadline: Some(at(60)), ..node(20, 1) };
    assert_eq!(reasons(&engine.step(at(0), Input::Node(draining))), ["7: its node is drained"]);
    assert_eq!(reasons(&engine.step(at(10), free_vm(8))), ["8: its node is drained"]);
    assert_eq!(engine.next_wake(), Some(at(60)));
    let mut effects = engine.step(at(60), Input::Tick);
    effects.retain(|effect| matches!(effect, Effect::DrainVm { vm_id: id, .. } if *id == vm_id(9)));
    assert_eq!(reasons(&effects), ["9: its node is drained, and the deadline has passed"]);
}

#[test]
fn a_node_lost_for_longer_than_the_grace_takes_its_attempts_with_it_and_one_that_returns_in_time_does_not() {
    let (mut engine, ..) = assigned();
    let lost = |revision| Input::Node(Node { state: NodeState::Lost, ..node(revision, 1) });
    assert_eq!(engine.step(at(0), lost(10)), []);
    assert_eq!(engine.next_wake(), Some(at(30)));
    engine.step(at(29), Input::Node(node(11, 2)));
    engine.step(at(100), Input::Tick);
    assert_eq!(engine.step(at(100), lost(12)), []);
    let effects = engine.step(at(130), Input::Tick);
    let [Effect::LoseAttempt { started: true, attempt: 1, .. }, Effect::FailVm { .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
}

#[test]
fn orders_wait_until_a_lost_node_is_back() {
    let mut engine = engine(settings());
    engine.step(at(0), Input::Node(Node { state: NodeState::Lost, ..node(2, 1) }));
    assert_eq!(engine.step(at(0), Input::Vm(vm(7, 3, VmKind::Service, VmState::Draining))), []);
    let effects = engine.step(at(0), Input::Node(node(4, 2)));
    assert!(matches!(&effects[..], [Effect::Tell { order: Order::Stop { .. }, .. }]), "{effects:?}");
}

#[test]
fn without_the_lead_nothing_is_done_and_with_it_everything_that_follows_from_what_is_known() {
    let mut engine = Engine::new(settings());
    engine.step(at(0), Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![], jobs: vec![] });
    engine.step(at(0), free_vm(7));
    engine.step(at(0), Input::Vm(vm(8, 5, VmKind::Service, VmState::Starting)));
    let effects = engine.step(at(0), Input::Job(queued(1, 10, minimal())));
    assert_eq!((effects, engine.next_wake()), (vec![], None));
    assert_eq!(engine.waits_for(job_id(1)).as_deref(), Some("its turn"));
    for epoch in [3, 4] {
        let effects = engine.step(at(0), Input::Lead(Some(epoch)));
        assert_eq!(
            assignments(&effects),
            [(job_id(1), vm_id(7), 1)],
            "again, for nobody knows what became of the first"
        );
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Tell { order: Order::Start { .. }, .. })));
        assert_eq!(engine.step(at(0), Input::Lead(None)), []);
    }
}

#[test]
fn a_late_answer_does_not_bring_back_what_has_ended() {
    let mut engine = engine(settings());
    let effects = engine.step(at(0), Input::Job(queued(1, 2, spec(|_| {}))));
    let [Effect::CreateVm { ticket, .. }] = effects[..] else { panic!("{effects:?}") };
    engine.step(at(0), Input::Vm(vm(7, 10, VmKind::Ephemeral, VmState::Starting)));
    engine.step(at(0), Input::Vm(vm(7, 11, VmKind::Ephemeral, VmState::Failed)));
    engine.step(at(0), Input::Created { ticket, result: Ok(vm(7, 10, VmKind::Ephemeral, VmState::Starting)) });
    assert!(!engine.vms.contains_key(&vm_id(7)));
}

#[test]
fn an_explanation_says_what_every_node_was_asked_and_answered() {
    let nodes = [
        labelled("n1", 400, ("disk", "ssd")),
        labelled("n2", 4000, ("disk", "hdd")),
        Node { state: NodeState::Cordoned, ..labelled("n3", 4000, ("disk", "ssd")) },
    ];
    let mut engine = cluster(settings(), nodes);
    let labels = BTreeMap::from([("disk".to_owned(), "ssd".to_owned())]);
    engine.step(at(0), Input::Job(queued(1, 10, spec(|s| s.node_labels = labels))));
    let decision = engine.explain(at(7), job_id(1)).expect("it waits");
    let filters = decision.filters.iter().map(|f| format!("{} {}/{} {}", f.name, f.passed, f.considered, f.example));
    let text = [decision.summary.clone()].into_iter().chain(filters).collect::<Vec<_>>().join("\n");
    insta::assert_snapshot!(text, @r"
    it waits for 512 MiB of memory: n1 has 400 MiB free
    node 3/3 
    node_labels 2/3 n2 has no label disk=ssd
    volumes 2/2 
    image 2/2 
    vcpus 2/2 
    ready 1/2 n3 is Cordoned
    pressure 1/1 
    vm_slots 1/1 
    memory 0/1 n1 has 400 MiB free
    service_vms_large_enough 0/0
    ");
    assert_eq!((decision.queue_position, decision.queue_length, decision.waited_ms), (1, 1, 7000));
}

#[test]
fn an_assignment_carries_why_its_vm_was_started_where_it_was() {
    let mut engine = engine(settings());
    let effects = engine.step(at(0), Input::Job(queued(1, 10, spec(|_| {}))));
    let [Effect::CreateVm { ticket, .. }] = effects[..] else { panic!("{effects:?}") };
    engine.step(at(0), Input::Created { ticket, result: Ok(vm(7, 20, VmKind::Ephemeral, VmState::Starting)) });
    let effects = engine.step(at(3), Input::Vm(vm(7, 21, VmKind::Ephemeral, VmState::Ready)));
    let [Effect::Assign { decision, .. }] = &effects[..] else { panic!("{effects:?}") };
    let started = "no free VM fitted; a new ephemeral VM on n1 (spread: the most free memory)";
    assert_eq!(decision.summary, format!("VM {}, started for such a job: {started}", vm_id(7)));
    assert_eq!(
        (decision.scheduler_epoch, decision.waited_ms, decision.candidates[0].node_id.as_str()),
        (1, 3000, "n1")
    );
}

#[test]
fn engines_count_what_waits_and_what_runs() {
    let (mut engine, ..) = assigned();
    engine.step(at(0), Input::Job(queued(2, 30, spec(|s| s.target_vm_id = Some(vm_id(7))))));
    assert_eq!((engine.queued(), engine.jobs_on(&node_id())), (1, 1));
}

#[test]
fn room_is_kept_for_a_large_job_that_small_ones_would_starve() {
    let mut engine = engine(Settings { max_vms: 100, ..settings() });
    let small = || spec(|s| (s.isolation, s.memory_mib) = (Isolation::Maximum, 1024));
    for id in 1..=20 {
        engine.step(at(0), Input::Job(queued(id, 10 + id as u64, small())));
    }
    engine.step(at(0), Input::Job(queued(50, 60, spec(|s| s.memory_mib = 3000))));
    // A VM of a small job ends: how many are started in its place, of which size?
    let mut revision = 100;
    let mut end_one = |engine: &mut Engine, now: Timestamp| -> Vec<u32> {
        let ticket = *engine.creations.keys().next().expect("a VM that is being created");
        let mut created = vm(revision.into(), revision, VmKind::Ephemeral, VmState::Starting);
        created.config.memory_mib = 1024;
        let failed = Vm { state: VmState::Terminated, revision: revision + 1, ..created.clone() };
        revision += 2;
        let mut effects = engine.step(now, Input::Created { ticket, result: Ok(created) });
        effects.extend(engine.step(now, Input::Vm(failed)));
        let size = |effect: &Effect| match effect {
            Effect::CreateVm { config, .. } => Some(config.memory_mib),
            _ => None,
        };
        effects.iter().filter_map(size).collect()
    };
    assert_eq!(end_one(&mut engine, at(1)), [1024]);
    assert_eq!(end_one(&mut engine, at(59)), [1024], "its patience is not over");
    engine.step(at(60), Input::Tick);
    assert_eq!(end_one(&mut engine, at(61)), [0; 0], "it is kept for the large one");
    assert_eq!(end_one(&mut engine, at(62)), [0; 0]);
    assert_eq!(end_one(&mut engine, at(63)), [3000]);
    assert_eq!(end_one(&mut engine, at(64)), [1024], "then it is everybody's again");
    assert_eq!(engine.broken_invariant(), None);
}

#[test]
fn a_vm_is_not_held_for_a_job_whose_attempt_is_over_in_whatever_order_that_is_heard() {
    let given = |engine: &mut Engine| {
        engine.step(at(0), free_vm(7));
        let effects = engine.step(at(0), Input::Job(queued(1, 2000, minimal())));
        assert_eq!(assignments(&effects), [(job_id(1), vm_id(7), 1)]);
    };
    let again = || Input::Job(Job { attempt: 1, ..queued(1, 2009, minimal()) });
    let idle = || Input::Vm(Vm { jobs_assigned: 1, ..vm(7, 2008, VmKind::Service, VmState::Idle) });

    // The watch may show a job in a later state than the one in which its VM is known.
    let mut engine = engine(no_scaling());
    given(&mut engine);
    assert_eq!(assignments(&engine.step(at(0), again())), [], "nobody knows yet that the VM is free");
    assert_eq!(engine.broken_invariant(), None);
    assert_eq!(assignments(&engine.step(at(0), idle())), [(job_id(1), vm_id(7), 2)]);

    // Or the VM as Idle, without its having been Busy.
    let mut engine = super::engine(no_scaling());
    given(&mut engine);
    engine.step(at(0), idle());
    assert_eq!(assignments(&engine.step(at(0), again())), [(job_id(1), vm_id(7), 2)]);
}

#[test]
fn a_vm_whose_node_refused_a_job_is_left_alone_for_a_while_whatever_is_heard_of_it() {
    let mut engine = engine(no_scaling());
    engine.step(at(0), free_vm(7));
    engine.step(at(0), Input::Job(queued(1, 2000, minimal())));
    let given = |state, attempt, revision| Job {
        state,
        attempt,
        vm_id: Some(vm_id(7)),
        node_id: Some(node_id()),
        ..queued(1, revision, minimal())
    };
    engine.step(at(0), Input::Job(given(JobState::Assigned, 1, 2001)));
    let refused = Err(Error::new(Reason::VmNotAccepting, "it is Failed"));
    let effects = engine.step(at(0), Input::Told { order: OrderKey::Run(job_id(1), 1), result: refused });
    assert!(matches!(effects[..], [Effect::LoseAttempt { started: false, .. }]), "{effects:?}");
    let idle = |revision| Input::Vm(Vm { jobs_assigned: 1, ..vm(7, revision, VmKind::Service, VmState::Idle) });
    engine.step(at(0), idle(2002));
    assert_eq!(assignments(&engine.step(at(1), Input::Job(given(JobState::Queued, 1, 2003)))), []);
    assert_eq!(assignments(&engine.step(at(9), idle(2004))), []);
    assert_eq!(assignments(&engine.step(at(10), Input::Tick)), [(job_id(1), vm_id(7), 2)]);
}

#[test]
fn a_job_for_a_node_that_is_cordoned_says_so() {
    let mut engine = engine(settings());
    engine.step(at(0), Input::Node(Node { state: NodeState::Cordoned, ..node(5, 1) }));
    engine.step(at(0), Input::Job(queued(1, 10, spec(|s| s.node_id = Some(node_id())))));
    assert_eq!(engine.waits_for(job_id(1)).as_deref(), Some("n1, which is Cordoned, to take VMs again"));
    engine.step(at(0), Input::Job(queued(2, 11, spec(|_| {}))));
    assert_eq!(engine.waits_for(job_id(2)).as_deref(), Some("a node that is ready and has the image"));
}

/// The tickets of the VMs that are to be made.
fn tickets(effects: &[Effect]) -> Vec<u64> {
    let ticket = |effect: &Effect| match effect {
        Effect::CreateVm { ticket, .. } => Some(*ticket),
        _ => None,
    };
    effects.iter().filter_map(ticket).collect()
}

#[test]
fn vms_that_fail_to_boot_one_after_the_other_fail_a_job_and_those_that_fail_together_count_once() {
    let mut engine = engine(Settings { max_vms: 10, ..settings() });
    let mut revision = 10;
    let mut next = || {
        revision += 1;
        revision
    };
    let mut effects = Vec::new();
    for id in 1..=3 {
        effects.extend(engine.step(at(0), Input::Job(queued(id, next(), spec(|_| {})))));
    }
    let (mut now, mut made) = (0, 100);
    let mut failed = Vec::new();
    for round in 1..=3 {
        let mut starting = Vec::new();
        for ticket in tickets(&effects) {
            made += 1;
            starting.push(made);
            let vm = vm(made, next(), VmKind::Ephemeral, VmState::Starting);
            engine.step(at(now), Input::Created { ticket, result: Ok(vm) });
        }
        assert!(starting.len() >= 2, "round {round}: {starting:?}");
        for id in starting {
            let gone = Vm { reason: "no kernel".into(), ..vm(id, next(), VmKind::Ephemeral, VmState::Failed) };
            failed.extend(engine.step(at(now), Input::Vm(gone)));
        }
        if round < 3 {
            assert_eq!(reasons(&failed), [""; 0], "round {round}");
        }
        now += 60_000;
        effects = engine.step(at(now), Input::Tick);
    }
    assert_eq!(reasons(&failed), ["false: 3 VMs in a row failed to start; the last: no kernel"]);
}
