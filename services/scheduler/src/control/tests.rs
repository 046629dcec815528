//! What the loop makes of lists, news and answers that overtake each other.

use std::collections::BTreeMap;

use blixard::{config::Config, node::NodeState, vm::VmKind};

use super::*;

fn at(ms: i64) -> Timestamp {
    Timestamp(ms)
}

/// A node with room for one VM.
fn node() -> Node {
    Node {
        id: NodeId::parse("node", "n1").unwrap(),
        state: NodeState::Ready,
        endpoint: "http://n1:1".into(),
        driver: "process".into(),
        vcpus: 4,
        memory_mib: 4096,
        max_vms: 1,
        images: vec!["default".into()],
        incarnation: 1,
        revision: 1,
        registered_at: at(0),
        labels: BTreeMap::new(),
        reason: String::new(),
        updated_at: at(0),
        drain_deadline: None,
        wanted: NodeState::Ready,
        pressure: Default::default(),
        volumes: vec![],
        scratch_mib: 0,
    }
}

fn config() -> VmConfig {
    let (labels, image) = (BTreeMap::new(), "default".to_owned());
    VmConfig {
        kind: VmKind::Service,
        image,
        vcpus: 1,
        memory_mib: 256,
        labels,
        node_id: None,
        egress: Default::default(),
        volumes: Default::default(),
    }
}

fn job(state: common::JobState, revision: u64) -> Job {
    let spec = common::JobSpec {
        command: vec!["true".into()],
        vcpus: Some(1),
        memory_mib: Some(256),
        isolation: common::Isolation::Minimal.into(),
        ..Default::default()
    };
    let id = Uuid::from_u128(9).to_string();
    let job = common::Job { id, spec: Some(spec), state: state.into(), generation: 1, revision, ..Default::default() };
    Job::try_from(job).unwrap()
}

fn round(actions: &[Action]) -> Option<Round> {
    actions.iter().find_map(|action| match action {
        Action::List { round } => Some(*round),
        _ => None,
    })
}

fn calls(actions: Vec<Action>) -> Vec<(CallId, Call)> {
    let call = |action| match action {
        Action::Call { call, to } => Some((call, to)),
        _ => None,
    };
    actions.into_iter().filter_map(call).collect()
}

fn lease(held: bool, epoch: u64) -> Event {
    let holder = if held { "me" } else { "other" }.to_owned();
    Event::LeaseAnswered(Some(registry::AcquireLeaseResponse { held, epoch, holder }))
}

/// The list of a round: the node, and nothing else, as of this revision.
fn listed(round: Round, revision: u64) -> Event {
    let (job_revision, vm_revision, node_revision) = (revision, revision, revision);
    let listing = Listing { nodes: vec![node()], job_revision, vm_revision, node_revision, ..Listing::default() };
    Event::Listed { round, result: Ok(Box::new(listing)) }
}

/// A control loop that leads since the beginning, and the round of its watch.
fn leader() -> (Control, Round) {
    let settings = Settings { auto_scaling: false, ..Settings::from(&Config::default()) };
    let mut next = 0;
    let ids = move || {
        next += 1;
        VmId(Uuid::from_u128(next))
    };
    let identity = Identity { name: "me".into(), instance: Uuid::nil() };
    let mut control = Control::new(settings, identity, ids);
    control.handle(at(0), Event::Tick);
    let round = round(&control.handle(at(0), lease(true, 1))).expect("it lists once more");
    control.handle(at(0), listed(round, 10));
    assert!(control.engine().leads());
    (control, round)
}

#[test]
fn a_list_that_was_read_before_an_answer_does_not_take_back_what_that_told() {
    let (mut control, round_before) = leader();
    let vm_id = VmId(Uuid::from_u128(77));
    let asked = calls(control.handle(at(0), Event::VmRequested { vm_id, config: config() }));
    let [(call, Call::CreateVm(request))] = &asked[..] else { panic!("{asked:?}") };
    control.handle(at(0), Event::WatchEnded { round: round_before });
    let round = round(&control.handle(at(1000), Event::Tick)).expect("it lists again");
    let vm = common::Vm {
        id: request.vm_id.clone(),
        config: request.config.clone(),
        state: common::VmState::Starting.into(),
        node_id: "n1".into(),
        generation: 1,
        revision: 50,
        ..Default::default()
    };
    control.handle(at(1000), Event::Answered { call: *call, result: Ok(Reply::Vm(Box::new(vm))) });
    control.handle(at(1000), listed(round, 40));
    let another = VmId(Uuid::from_u128(78));
    let actions = control.handle(at(1000), Event::VmRequested { vm_id: another, config: config() });
    assert!(
        actions.iter().any(|action| matches!(action, Action::AnswerVm { vm_id, result: Err(_) } if *vm_id == another)),
        "the room is taken: {actions:?}"
    );
}

#[test]
fn a_job_that_has_ended_does_not_come_back_with_the_answer_to_its_submission() {
    let (mut control, round) = leader();
    let mut tell = |revision, state| {
        let change = Change::Job(Box::new(job(state, revision)));
        control.handle(at(0), Event::Changed { round, revision, change })
    };
    tell(11, common::JobState::Queued);
    tell(12, common::JobState::Cancelled);
    control.handle(at(0), Event::Submitted(Box::new(job(common::JobState::Queued, 11))));
    assert_eq!(control.engine().queued(), 0);
    control.handle(at(0), Event::Submitted(Box::new(job(common::JobState::Queued, 13))));
    assert_eq!(control.engine().queued(), 1, "one that the watch has not come to is news");
}

#[test]
fn a_lead_that_was_lost_comes_back_under_another_epoch() {
    let (mut control, _) = leader();
    let before = control.lease_request(false);
    control.handle(at(10_000), Event::Tick);
    assert_eq!(control.epoch(), None, "nobody confirmed it");
    let after = control.lease_request(false);
    assert_eq!(before.holder, after.holder);
    assert_ne!(before.instance, after.instance, "what is under way must not be taken for the next lead's");
}

#[test]
fn who_leads_under_another_epoch_decides_nothing_before_it_has_listed() {
    let (mut control, round_before) = leader();
    let round = round(&control.handle(at(1000), lease(true, 2))).expect("it lists once more");
    let actions = control.handle(at(1000), Event::Submitted(Box::new(job(common::JobState::Queued, 20))));
    assert!(!control.engine().leads() && calls(actions).is_empty());
    control.handle(at(1000), listed(round_before, 30));
    assert!(!control.engine().leads(), "that was an earlier list");
    control.handle(at(1000), listed(round, 30));
    assert!(control.engine().leads());
}

#[test]
fn a_clock_that_is_set_forward_does_not_cut_the_grace_of_a_lost_node_short() {
    let (mut control, watch) = leader();
    let lost = |revision| Node { state: NodeState::Lost, revision, ..node() };
    let vm = common::Vm {
        id: Uuid::from_u128(5).to_string(),
        config: Some(config().into()),
        state: common::VmState::Idle.into(),
        node_id: "n1".into(),
        generation: 1,
        revision: 11,
        ..Default::default()
    };
    let vm = Vm::try_from(vm).unwrap();
    control.handle(at(0), Event::Changed { round: watch, revision: 11, change: Change::Vm(Box::new(vm.clone())) });
    control.handle(at(0), Event::Changed { round: watch, revision: 12, change: Change::Node(Box::new(lost(12))) });

    let hour = 3_600_000;
    let mut actions = control.handle(at(hour), Event::ClockSet);
    actions.extend(control.handle(at(hour), Event::Tick));
    actions.extend(control.handle(at(hour), lease(true, 2)));
    let round = round(&actions[actions.len() - 1..]).expect("it lists once more");
    let (job_revision, vm_revision, node_revision) = (20, 20, 20);
    let listing = Listing {
        nodes: vec![lost(12)],
        vms: vec![vm],
        job_revision,
        vm_revision,
        node_revision,
        ..Listing::default()
    };
    actions.extend(control.handle(at(hour), Event::Listed { round, result: Ok(Box::new(listing)) }));
    actions.extend(control.handle(at(hour + 1000), Event::Tick));
    assert!(control.engine().leads());
    assert_eq!(calls(actions), [], "the node was lost a second ago");

    let grace = i64::try_from(Settings::from(&Config::default()).lost_node_grace.as_millis()).unwrap();
    for ms in (2000..grace).step_by(2000) {
        control.handle(at(hour + ms), Event::Tick);
        control.handle(at(hour + ms), lease(true, 2));
    }
    let given_up = calls(control.handle(at(hour + grace), Event::Tick));
    assert!(matches!(&given_up[..], [(_, Call::TransitionVm(_))]), "{given_up:?}");
}
