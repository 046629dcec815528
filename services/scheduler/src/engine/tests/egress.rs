//! A job shares a VM only with jobs of its egress policy, and goes to nodes that give their guests a network when it needs one.

use blixard::egress::{Egress, NETWORK_LABEL, NETWORK_LABEL_ON};

use super::*;

fn egress(text: &str) -> Egress {
    text.parse().expect("a policy")
}

fn asking(id: u128, text: &str, isolation: Isolation) -> Input {
    let spec = spec(|spec| (spec.egress, spec.isolation) = (Some(egress(text)), isolation));
    Input::Job(queued(id, 10 + id as u64, spec))
}

fn free(id: u128, text: &str) -> Input {
    let mut vm = vm(id, 1000 + id as u64, VmKind::Service, VmState::Idle);
    vm.config.egress = egress(text);
    Input::Vm(vm)
}

/// The node has, or has no more, a network for its guests.
fn node_with_network(revision: u64, on: bool) -> Input {
    let mut node = node(revision, 1);
    if on {
        node.labels.insert(NETWORK_LABEL.to_owned(), NETWORK_LABEL_ON.to_owned());
    }
    Input::Node(node)
}

#[test]
fn a_free_vm_is_given_to_a_job_of_its_own_policy_only() {
    let policies = ["none", "internet", "allow=10.0.0.0/8", "allow=10.0.0.0/8:443"];
    for policy in policies {
        let mut engine = engine(Settings { max_vms: 100, ..settings() });
        engine.step(Timestamp(0), node_with_network(2, true));
        for (id, other) in (100..).zip(policies) {
            engine.step(Timestamp(0), free(id, other));
        }
        let own = 100 + policies.iter().position(|other| *other == policy).expect("one of them") as u128;
        let effects = engine.step(Timestamp(0), asking(1, policy, Isolation::Minimal));
        assert_eq!(assignments(&effects), [(job_id(1), vm_id(own), 1)], "{policy}");
        // That one is taken: the next has a fresh VM rather than another's.
        let effects = engine.step(Timestamp(0), asking(2, policy, Isolation::Standard));
        let created: Vec<_> = effects
            .iter()
            .filter_map(|effect| if let Effect::CreateVm { config, .. } = effect { Some(&config.egress) } else { None })
            .collect();
        assert_eq!((assignments(&effects), created), (vec![], vec![&egress(policy)]));
    }
}

#[test]
fn a_job_that_says_nothing_has_no_network() {
    let mut engine = engine(settings());
    engine.step(Timestamp(0), node_with_network(2, true));
    engine.step(Timestamp(0), free(100, "internet"));
    let effects = engine.step(Timestamp(0), Input::Job(queued(1, 10, spec(|_| {}))));
    assert_eq!((assignments(&effects), creations(&effects)), (vec![], 1));
}

#[test]
fn a_job_that_needs_a_network_never_runs_where_no_node_has_one() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), asking(1, "internet", Isolation::Standard));
    let reasons: Vec<_> = effects
        .iter()
        .filter_map(|effect| if let Effect::FailJob { reason, .. } = effect { Some(reason.as_str()) } else { None })
        .collect();
    let expected = "spec.egress: \"internet\" is not allowed: none: no node that would do gives its guests a network (network.subnet)";
    assert_eq!(reasons, [expected]);

    engine.step(Timestamp(0), node_with_network(2, true));
    assert_eq!(creations(&engine.step(Timestamp(0), asking(2, "internet", Isolation::Standard))), 1);
    let config = VmConfig { egress: egress("internet"), ..vm(5, 1, VmKind::Service, VmState::Idle).config };
    assert_eq!(engine.place(&config), Ok(node_id()));
    engine.step(Timestamp(0), node_with_network(3, false));
    engine.place(&config).expect_err("no more");
}

#[test]
fn warm_vms_have_no_network_and_others_do_not_count_as_warm() {
    let mut engine = Engine::new(Settings { pre_warm: warm(1), max_vms: 100, ..settings() });
    engine.step(Timestamp(0), Input::Lead(Some(1)));
    let mut with_network = vm(100, 1000, VmKind::Service, VmState::Idle);
    with_network.config.egress = egress("internet");
    let world = Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![with_network], jobs: vec![] };
    let created: Vec<Effect> = engine.step(Timestamp(0), world);
    let egresses = created.iter().filter_map(|effect| match effect {
        Effect::CreateVm { config, .. } => Some(config.egress.clone()),
        _ => None,
    });
    assert_eq!(egresses.collect::<Vec<_>>(), [Egress::None]);
}
