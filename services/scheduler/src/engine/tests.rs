//! The engine against a small world: a registry with compare-and-set, a vmhost that boots, runs and dies, and answers that
//! arrive in any order. Decisions are checked one by one, then all of them under random interleavings.

use blixard::{
    error::Reason,
    job::{Isolation, JobSpec, JobState},
    vm::{Defaults, VmKind, VmState},
};
use uuid::Uuid;

use super::*;

mod behaviours;
mod egress;
mod pressure;
mod tables;
mod volumes;
mod world;

const DEFAULTS: Defaults = Defaults { vcpus: 2, memory_mib: 512 };

fn settings() -> Settings {
    let config = blixard::config::Config::default();
    Settings { max_vms: 3, defaults: DEFAULTS, ..Settings::from(&config) }
}

fn job_id(number: u128) -> JobId {
    JobId(Uuid::from_u128(number))
}

fn vm_id(number: u128) -> VmId {
    VmId(Uuid::from_u128(number))
}

fn node_id() -> NodeId {
    NodeId::parse("node", "n1").expect("a valid name")
}

fn node(revision: u64, incarnation: u64) -> Node {
    Node {
        id: node_id(),
        state: NodeState::Ready,
        endpoint: "http://n1:1".into(),
        driver: "process".into(),
        vcpus: 4,
        memory_mib: 4096,
        max_vms: 10,
        images: vec!["default".into()],
        incarnation,
        revision,
        registered_at: Timestamp(0),
        labels: BTreeMap::new(),
        reason: String::new(),
        updated_at: Timestamp(0),
        drain_deadline: None,
        wanted: NodeState::Ready,
        pressure: Default::default(),
        volumes: vec![],
        scratch_mib: 0,
    }
}

fn spec(change: impl FnOnce(&mut JobSpec)) -> JobSpec {
    let spec = pb::JobSpec { command: vec!["true".into()], ..Default::default() };
    let mut spec = JobSpec::parse("spec", spec, DEFAULTS).expect("valid");
    change(&mut spec);
    spec
}

fn queued(id: u128, revision: u64, spec: JobSpec) -> Job {
    Job {
        id: job_id(id),
        spec,
        state: JobState::Queued,
        attempt: 0,
        vm_id: None,
        node_id: None,
        assignment: None,
        cancel_requested: false,
        exit: None,
        reason: String::new(),
        log_bytes: 0,
        generation: 1,
        revision,
        created_at: Timestamp(0),
        assigned_at: None,
        started_at: None,
        finished_at: None,
        queued_at: Timestamp(0),
        not_before: None,
        attempts_started: 0,
    }
}

fn vm(id: u128, revision: u64, kind: VmKind, state: VmState) -> Vm {
    let labels = BTreeMap::from([(OWNER_LABEL.to_owned(), OWNER.to_owned())]);
    let config = VmConfig {
        kind,
        image: "default".into(),
        vcpus: 2,
        memory_mib: 512,
        labels,
        node_id: None,
        egress: Default::default(),
        volumes: Default::default(),
    };
    Vm {
        id: vm_id(id),
        config,
        state,
        node_id: node_id(),
        job_id: None,
        reason: String::new(),
        generation: 1,
        revision,
        created_at: Timestamp(0),
        updated_at: Timestamp(0),
        jobs_assigned: 0,
        stop_grace: None,
    }
}

fn warm(count: u32) -> BTreeMap<String, u32> {
    BTreeMap::from([("default".to_owned(), count)])
}

fn engine(settings: Settings) -> Engine {
    let mut engine = Engine::new(settings);
    engine.step(Timestamp(0), Input::Lead(Some(1)));
    engine.step(Timestamp(0), Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![], jobs: vec![] });
    engine
}

fn assignments(effects: &[Effect]) -> Vec<(JobId, VmId, u32)> {
    let assignment = |effect: &Effect| match effect {
        Effect::Assign { job_id, vm_id, attempt, .. } => Some((*job_id, *vm_id, *attempt)),
        _ => None,
    };
    effects.iter().filter_map(assignment).collect()
}

fn creations(effects: &[Effect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, Effect::CreateVm { .. })).count()
}

#[test]
fn a_job_without_a_free_vm_gets_a_vm_of_its_own_size() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 2, spec(|s| s.memory_mib = 1000))));
    let [Effect::CreateVm { ticket: 0, vm_id: None, config, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((config.kind, config.memory_mib), (VmKind::Ephemeral, 1000));
}

#[test]
fn a_free_service_vm_is_used_before_a_fresh_one_is_started_unless_isolation_is_maximum() {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Idle)));
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 3, spec(|s| s.isolation = Isolation::Maximum))));
    assert_eq!(creations(&effects), 1);
    let effects = engine.step(Timestamp(0), Input::Job(queued(2, 4, spec(|_| {}))));
    assert_eq!(assignments(&effects), [(job_id(2), vm_id(7), 1)]);
}

#[test]
fn higher_priority_goes_first_and_equals_go_in_the_order_of_submission() {
    let mut engine = engine(Settings { max_vms: 1, auto_scaling: false, ..settings() });
    let service_only = |priority| spec(move |s| (s.isolation, s.priority) = (Isolation::Minimal, priority));
    for (id, priority) in [(9, 0), (3, 0), (5, 1)] {
        engine.step(Timestamp(0), Input::Job(queued(id, 1 + id as u64, service_only(priority))));
    }
    let mut order = Vec::new();
    for number in 0..3 {
        let vm = vm(100 + number, 50 + number as u64, VmKind::Service, VmState::Ready);
        for effect in engine.step(Timestamp(0), Input::Vm(vm)) {
            let Effect::Assign { job_id, .. } = effect else { panic!("{effect:?}") };
            order.push(job_id);
        }
    }
    assert_eq!(order, [job_id(5), job_id(9), job_id(3)]);
}

#[test]
fn never_more_vms_than_allowed_and_the_queue_says_what_it_waits_for() {
    let mut engine = engine(settings());
    let effects: Vec<_> = (1..=200)
        .flat_map(|id| engine.step(Timestamp(0), Input::Job(queued(id, 1 + id as u64, spec(|_| {})))))
        .collect();
    assert_eq!(creations(&effects), 3);
    assert_eq!(engine.waits_for(job_id(200)).as_deref(), Some("one of the 3 VMs to end (max_vms)"));
}

#[test]
fn a_shape_that_does_not_fit_now_does_not_hold_up_another() {
    let mut engine = engine(settings());
    let big = spec(|s| s.memory_mib = 4096);
    engine.step(Timestamp(0), Input::Job(queued(1, 2, spec(|_| {}))));
    assert_eq!(creations(&engine.step(Timestamp(0), Input::Job(queued(2, 3, big)))), 0);
    assert_eq!(creations(&engine.step(Timestamp(0), Input::Job(queued(3, 4, spec(|_| {}))))), 1);
}

#[test]
fn an_idle_service_vm_of_ours_makes_room_for_a_job_that_needs_it() {
    let mut engine = engine(Settings { max_vms: 1, ..settings() });
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Idle)));
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 3, spec(|s| s.isolation = Isolation::Maximum))));
    assert!(matches!(&effects[..], [Effect::DrainVm { vm_id, .. }] if *vm_id == super::tests::vm_id(7)), "{effects:?}");
}

#[test]
fn a_lost_node_gets_no_work_and_nothing_waits_for_what_it_was_booting() {
    let settings = Settings { max_vms: 10, pre_warm: warm(1), ..settings() };
    let service_only = || spec(|s| s.isolation = Isolation::Minimal);
    let mut engine = engine(settings);
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Idle)));
    engine.step(Timestamp(0), Input::Vm(vm(8, 3, VmKind::Service, VmState::Starting)));
    let lost = Node { state: NodeState::Lost, ..node(4, 1) };
    assert_eq!(engine.step(Timestamp(0), Input::Node(lost)), []);
    assert_eq!(engine.step(Timestamp(0), Input::Job(queued(1, 5, service_only()))), []);
    let targeted = spec(|s| s.target_vm_id = Some(vm_id(7)));
    assert_eq!(engine.step(Timestamp(0), Input::Job(queued(2, 6, targeted))), []);

    // Another node takes what can be run anywhere …
    let other = NodeId::parse("node", "n2").expect("a valid name");
    let effects = engine.step(Timestamp(0), Input::Node(Node { id: other.clone(), ..node(7, 1) }));
    assert!(matches!(&effects[..], [Effect::CreateVm { node_id, .. }] if *node_id == other), "{effects:?}");
    // … and what is bound to the lost one is run when it is back.
    let mut effects = engine.step(Timestamp(0), Input::Node(node(8, 2)));
    effects.retain(|effect| matches!(effect, Effect::Assign { .. }));
    assert!(
        effects.iter().any(|effect| matches!(effect, Effect::Assign { vm_id: id, .. } if *id == vm_id(7))),
        "{effects:?}"
    );
}

#[test]
fn a_vm_that_a_user_started_is_never_taken_away_and_a_fresh_one_of_theirs_waits_for_their_jobs() {
    let mut engine = engine(Settings { max_vms: 2, ..settings() });
    for (id, kind) in [(7, VmKind::Service), (8, VmKind::Ephemeral)] {
        let mut theirs = vm(id, id as u64, kind, VmState::Ready);
        theirs.config.labels.clear();
        engine.step(Timestamp(0), Input::Vm(theirs));
    }
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 20, spec(|s| s.isolation = Isolation::Maximum))));
    assert_eq!(effects, []);
    let effects = engine.step(Timestamp(0), Input::Job(queued(2, 21, spec(|s| s.target_vm_id = Some(vm_id(8))))));
    assert_eq!(assignments(&effects), [(job_id(2), vm_id(8), 1)]);
}

#[test]
fn a_job_whose_target_vm_has_ended_is_failed_with_the_reason() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 2, spec(|s| s.target_vm_id = Some(vm_id(9))))));
    assert!(matches!(&effects[..], [Effect::FailJob { reason, .. }] if reason.contains("is gone")), "{effects:?}");
}

#[test]
fn the_third_vm_in_a_row_that_fails_to_boot_fails_the_job_that_waits_for_it() {
    let mut engine = engine(Settings { max_vms: 1, ..settings() });
    let mut now = Timestamp(0);
    let mut effects = engine.step(now, Input::Job(queued(1, 2, spec(|_| {}))));
    for round in 0..3u64 {
        let [Effect::CreateVm { ticket, .. }] = effects[..] else { panic!("round {round}: {effects:?}") };
        let id = 100 + u128::from(round);
        let starting = vm(id, 10 * (round + 1), VmKind::Ephemeral, VmState::Starting);
        engine.step(now, Input::Created { ticket, result: Ok(starting) });
        let mut failed = vm(id, 10 * (round + 1) + 1, VmKind::Ephemeral, VmState::Failed);
        failed.reason = "no kernel".into();
        effects = engine.step(now, Input::Vm(failed));
        if round < 2 {
            assert_eq!(effects, [], "a pause comes first");
            now = engine.next_wake().expect("a wake");
            effects = engine.step(now, Input::Tick);
        }
    }
    assert!(matches!(&effects[..], [Effect::FailJob { reason, .. }] if reason.contains("no kernel")), "{effects:?}");
}

#[test]
fn orders_are_given_again_when_the_vmhost_restarts_and_after_a_failure() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Starting)));
    let [Effect::Tell { order, .. }] = &effects[..] else { panic!("{effects:?}") };
    let key = order.key();
    assert_eq!(key, OrderKey::Start(vm_id(7)));

    let away = Error::new(Reason::PeerUnavailable, "away");
    assert_eq!(engine.step(Timestamp(0), Input::Told { order: key, result: Err(away) }), []);
    let again = engine.step(engine.next_wake().expect("a retry"), Input::Tick);
    assert_eq!(again, effects);
    assert_eq!(engine.step(Timestamp(1000), Input::Told { order: key, result: Ok(()) }), []);
    assert_eq!(engine.step(Timestamp(1000), Input::Node(node(9, 2))), effects);
}

#[test]
fn a_stop_waits_until_the_start_has_been_answered() {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Starting)));
    assert_eq!(engine.step(Timestamp(0), Input::Vm(vm(7, 3, VmKind::Service, VmState::Draining))), []);
    let effects = engine.step(Timestamp(0), Input::Told { order: OrderKey::Start(vm_id(7)), result: Ok(()) });
    assert!(matches!(&effects[..], [Effect::Tell { order: Order::Stop { .. }, .. }]), "{effects:?}");
}

fn away() -> Result<(), Error> {
    Err(Error::new(Reason::DeadlineExceeded, "no answer"))
}

#[test]
fn a_stop_that_waited_for_a_start_is_given_when_the_start_was_never_answered() {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Starting)));
    assert_eq!(engine.step(Timestamp(0), Input::Vm(vm(7, 3, VmKind::Service, VmState::Draining))), []);
    let effects = engine.step(Timestamp(0), Input::Told { order: OrderKey::Start(vm_id(7)), result: away() });
    assert!(matches!(&effects[..], [Effect::Tell { order: Order::Stop { .. }, .. }]), "{effects:?}");
}

#[test]
fn a_stop_that_met_a_fault_of_the_node_is_given_again_and_the_vm_not_given_up() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Draining)));
    let fault = Err(Error::new(Reason::Internal, "a full disk"));
    assert_eq!(engine.step(Timestamp(0), Input::Told { order: OrderKey::Stop(vm_id(7)), result: fault }), []);
    assert_eq!(engine.step(engine.next_wake().expect("a retry"), Input::Tick), effects);
}

/// Job 1, Assigned to VM 7 and told to run there.
fn assigned() -> (Engine, Job, OrderKey) {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Busy)));
    let (state, place) = (JobState::Assigned, (Some(vm_id(7)), Some(node_id())));
    let job = Job { state, attempt: 1, vm_id: place.0, node_id: place.1, ..queued(1, 3, spec(|_| {})) };
    let effects = engine.step(Timestamp(0), Input::Job(job.clone()));
    assert!(matches!(&effects[..], [Effect::Tell { order: Order::Run(_), .. }]), "{effects:?}");
    (engine, job, OrderKey::Run(job_id(1), 1))
}

fn is_cancel(effects: &[Effect]) -> bool {
    matches!(effects, [Effect::Tell { order: Order::Cancel { .. }, .. }])
}

#[test]
fn a_cancellation_of_a_running_job_does_not_wait_for_an_answer_that_was_lost() {
    let (mut engine, job, run) = assigned();
    let running = Job { state: JobState::Running, cancel_requested: true, revision: 4, ..job };
    assert!(is_cancel(&engine.step(Timestamp(0), Input::Job(running))));
    assert_eq!(engine.step(Timestamp(0), Input::Told { order: run, result: away() }), []);
}

#[test]
fn an_attempt_that_its_node_refused_is_free_and_one_that_met_a_fault_of_the_node_counts() {
    for (reason, counts) in [(Reason::VmNotAccepting, false), (Reason::Internal, true)] {
        let (mut engine, _, order) = assigned();
        let effects = engine.step(Timestamp(0), Input::Told { order, result: Err(Error::new(reason, "no")) });
        assert!(matches!(effects[..], [Effect::LoseAttempt { started, .. }] if started == counts), "{effects:?}");
    }
}

#[test]
fn what_a_vmhost_was_told_of_a_job_is_forgotten_with_the_job() {
    let (mut engine, job, run) = assigned();
    engine.step(Timestamp(0), Input::Told { order: run, result: Ok(()) });
    engine.step(Timestamp(0), Input::Job(Job { state: JobState::Succeeded, revision: 4, ..job }));
    assert!(engine.orders.told.is_empty() && engine.orders.in_flight.is_empty() && engine.jobs.is_empty());
}

#[test]
fn pre_warmed_vms_are_kept_while_nothing_waits() {
    let mut engine = Engine::new(Settings { pre_warm: warm(2), ..settings() });
    engine.step(Timestamp(0), Input::Lead(Some(1)));
    let effects = engine.step(Timestamp(0), Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![], jobs: vec![] });
    assert_eq!(creations(&effects), 2);
    assert_eq!(engine.step(Timestamp(0), Input::Tick), []);
}

#[test]
fn a_vm_that_was_resized_is_of_its_new_shape_for_jobs_for_its_node_and_for_the_warm_pool() {
    let resized = |revision, vcpus, memory_mib| {
        let vm = vm(7, revision, VmKind::Service, VmState::Idle);
        Vm { config: VmConfig { vcpus, memory_mib, ..vm.config }, ..vm }
    };
    let mut engine = engine(Settings { max_vms: 2, auto_scaling: false, ..settings() });
    engine.step(Timestamp(0), Input::Vm(resized(2, 2, 512)));
    let large = spec(|s| (s.vcpus, s.memory_mib, s.isolation) = (4, 1024, Isolation::Minimal));
    assert_eq!(engine.step(Timestamp(0), Input::Job(queued(1, 3, large.clone()))), []);
    let effects = engine.step(Timestamp(0), Input::Vm(resized(4, 4, 1024)));
    assert_eq!(assignments(&effects), [(job_id(1), vm_id(7), 1)]);
    assert_eq!(engine.nodes()[&node_id()].used_memory_mib, 1024);
    assert_eq!(engine.broken_invariant(), None);

    // Less than what is kept warm does not count as warm.
    let mut engine = Engine::new(Settings { max_vms: 2, pre_warm: warm(1), ..settings() });
    engine.step(Timestamp(0), Input::Lead(Some(1)));
    let snapshot = Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![resized(2, 2, 512)], jobs: vec![] };
    assert_eq!(creations(&engine.step(Timestamp(0), snapshot)), 0);
    assert_eq!(creations(&engine.step(Timestamp(0), Input::Vm(resized(3, 1, 512)))), 1);
}

#[test]
fn a_vm_whose_resize_is_heard_of_with_its_start_leaves_nothing_counted() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 2, spec(|s| s.isolation = Isolation::Maximum))));
    let [Effect::CreateVm { ticket, .. }] = effects[..] else { panic!("{effects:?}") };
    let starting = vm(7, 3, VmKind::Ephemeral, VmState::Starting);
    engine.step(Timestamp(0), Input::Created { ticket, result: Ok(starting) });
    let mut ready = vm(7, 5, VmKind::Ephemeral, VmState::Ready);
    ready.config.vcpus = 1;
    engine.step(Timestamp(0), Input::Vm(ready));
    assert_eq!(engine.broken_invariant(), None);
}
