//! A job shares a VM only with jobs of its volumes, one with a scratch disk with nobody, and each goes where its volumes are.

use blixard::volume::{Source, Volume, Volumes};

use super::*;

/// `tools:/tools,64:/scratch`.
fn volumes(text: &str) -> Volumes {
    let volume = |text: &str| {
        let (what, path) = text.split_once(':').expect("a path");
        let source = what.parse().map_or_else(|_| Source::Name(what.to_owned()), Source::ScratchMib);
        Volume { mount_path: path.to_owned(), source }
    };
    text.split(',').filter(|text| !text.is_empty()).map(volume).collect()
}

fn asking(id: u128, text: &str, isolation: Isolation) -> Input {
    let spec = spec(|spec| (spec.volumes, spec.isolation) = (volumes(text), isolation));
    Input::Job(queued(id, 10 + id as u64, spec))
}

fn free(id: u128, text: &str) -> Input {
    let mut vm = vm(id, 1000 + id as u64, VmKind::Service, VmState::Idle);
    vm.config.volumes = volumes(text);
    Input::Vm(vm)
}

fn node_with(name: &str, revision: u64, scratch_mib: u64, volumes: &[&str]) -> Input {
    Input::Node(Node {
        id: NodeId::parse("node", name).expect("a name"),
        scratch_mib,
        volumes: volumes.iter().map(ToString::to_string).collect(),
        ..node(revision, 1)
    })
}

fn created(effects: &[Effect]) -> Vec<(VmKind, String, String)> {
    let created = effects.iter().filter_map(|effect| match effect {
        Effect::CreateVm { config, node_id, .. } => {
            Some((config.kind, config.volumes.to_string(), node_id.to_string()))
        }
        _ => None,
    });
    created.collect()
}

fn failures(effects: &[Effect]) -> Vec<&str> {
    effects
        .iter()
        .filter_map(|effect| if let Effect::FailJob { reason, .. } = effect { Some(reason.as_str()) } else { None })
        .collect()
}

#[test]
fn a_free_vm_is_given_to_a_job_of_its_own_volumes_only() {
    let sets = ["", "tools:/tools", "tools:/other", "tools:/tools,data:/data"];
    for set in sets {
        let mut engine = engine(Settings { max_vms: 100, ..settings() });
        engine.step(Timestamp(0), node_with("n1", 2, 100, &["tools", "data"]));
        for (id, other) in (100..).zip(sets) {
            engine.step(Timestamp(0), free(id, other));
        }
        let own = 100 + sets.iter().position(|other| *other == set).expect("one of them") as u128;
        let effects = engine.step(Timestamp(0), asking(1, set, Isolation::Minimal));
        assert_eq!(assignments(&effects), [(job_id(1), vm_id(own), 1)], "{set}");
        let effects = engine.step(Timestamp(0), asking(2, set, Isolation::Standard));
        let expected = (VmKind::Ephemeral, volumes(set).to_string(), "n1".to_owned());
        assert_eq!((assignments(&effects), created(&effects)), (vec![], vec![expected]));
    }
}

#[test]
fn a_job_with_a_scratch_disk_is_given_a_vm_of_its_own() {
    let mut engine = engine(Settings { max_vms: 100, ..settings() });
    engine.step(Timestamp(0), node_with("n1", 2, 100, &[]));
    engine.step(Timestamp(0), free(100, ""));
    for id in [1, 2] {
        let effects = engine.step(Timestamp(0), asking(id, "64:/scratch", Isolation::Standard));
        let expected = (VmKind::Ephemeral, "scratch=64M:/scratch".to_owned(), "n1".to_owned());
        assert_eq!((assignments(&effects), created(&effects)), (vec![], vec![expected]));
    }
}

#[test]
fn a_job_goes_where_all_its_volumes_are_and_waits_for_them_no_longer_than_they_are_there() {
    let mut engine = engine(Settings { max_vms: 100, ..settings() });
    engine.step(Timestamp(0), node_with("n1", 2, 100, &["tools"]));
    engine.step(Timestamp(0), node_with("n2", 3, 100, &["tools", "data"]));
    engine.step(Timestamp(0), node_with("n3", 4, 100, &["data", "more"]));
    for (id, set, node) in [(1, "tools:/t,data:/d", "n2"), (2, "more:/m", "n3"), (3, "tools:/t,64:/s,data:/d", "n2")] {
        let effects = engine.step(Timestamp(0), asking(id, set, Isolation::Maximum));
        assert_eq!(created(&effects)[0].2, node, "{set}");
    }
    let effects = engine.step(Timestamp(0), asking(4, "tools:/t,more:/m", Isolation::Maximum));
    let expected = "spec.volumes: \"more, tools\" is not allowed: volumes of one node: each of these is some node's, but no node has all of them";
    assert_eq!(failures(&effects), [expected]);
    let effects = engine.step(Timestamp(0), asking(5, "tols:/t", Isolation::Minimal));
    let expected =
        "spec.volumes: \"tols\" is not allowed: the volumes that nodes that would do have: data, more, tools";
    assert_eq!(failures(&effects), [expected]);

    // What is taken away is there no more.
    let config = VmConfig { volumes: volumes("more:/m"), ..vm(5, 1, VmKind::Service, VmState::Idle).config };
    engine.place(&config).expect("n3 has it");
    engine.step(Timestamp(0), node_with("n3", 50, 100, &[]));
    engine.place(&config).expect_err("nobody has it");
}

#[test]
fn plain_processes_have_no_disks_and_others_none_that_are_larger_than_their_nodes() {
    let mut engine = engine(settings());
    let effects = engine.step(Timestamp(0), asking(1, "64:/scratch", Isolation::Standard));
    let expected = "spec.volumes: \"scratch=64M:/scratch\" is not allowed: none: no node that would do gives its VMs disks \
        (the driver process has none to give)";
    assert_eq!(failures(&effects), [expected]);
    engine.step(Timestamp(0), node_with("n2", 2, 100, &[]));
    let effects = engine.step(Timestamp(0), asking(2, "64:/scratch", Isolation::Standard));
    assert_eq!(created(&effects)[0].2, "n2");
    let effects = engine.step(Timestamp(0), asking(4, "64:/scratch,64:/more", Isolation::Standard));
    let expected = "spec.volumes: \"scratch=64M:/more scratch=64M:/scratch\" is not allowed: scratch disks of at most 100 MiB together, \
        what the largest node offers";
    assert_eq!(failures(&effects), [expected]);
    let effects = engine.step(Timestamp(0), asking(3, "tools:/t", Isolation::Standard));
    let expected = "spec.volumes: \"tools\" is not allowed: scratch disks only: no node that would do has volumes (storage.volumes)";
    assert_eq!(failures(&effects), [expected]);
}

#[test]
fn an_explanation_names_what_a_node_has_not() {
    let mut engine = engine(Settings { max_vms: 0, ..settings() });
    engine.step(Timestamp(0), node_with("n2", 2, 100, &[]));
    engine.step(Timestamp(0), node_with("n3", 3, 100, &["tools"]));
    engine.step(Timestamp(0), asking(1, "tools:/t", Isolation::Standard));
    let decision = engine.explain(Timestamp(0), job_id(1)).expect("it waits");
    let asked = decision.filters.iter().find(|filter| filter.name == "volumes").expect("asked");
    assert_eq!((asked.considered, asked.passed, asked.example.as_str()), (3, 1, "n1 has not: disks for its VMs"));
}

#[test]
fn warm_vms_have_no_volumes_and_others_do_not_count_as_warm() {
    let mut engine = Engine::new(Settings { pre_warm: warm(1), max_vms: 100, ..settings() });
    engine.step(Timestamp(0), Input::Lead(Some(1)));
    let mut with_volume = vm(100, 1000, VmKind::Service, VmState::Idle);
    with_volume.config.volumes = volumes("tools:/t");
    let world = Input::Snapshot { nodes: vec![node(1, 1)], vms: vec![with_volume], jobs: vec![] };
    let effects = engine.step(Timestamp(0), world);
    assert_eq!(created(&effects), [(VmKind::Service, String::new(), "n1".to_owned())]);
}

#[test]
fn volumes_that_can_not_be_had_keep_nobody_else_waiting() {
    let mut engine = engine(Settings { max_vms: 100, ..settings() });
    engine.step(Timestamp(0), node_with("n1", 2, 100, &["torn"]));
    let effects = engine.step(Timestamp(0), asking(1, "torn:/t", Isolation::Maximum));
    let [Effect::CreateVm { ticket, .. }] = effects[..] else { panic!("{effects:?}") };
    let torn = |revision, state| {
        let mut vm = vm(7, revision, VmKind::Ephemeral, state);
        vm.config.volumes = volumes("torn:/t");
        vm
    };
    engine.step(Timestamp(0), Input::Created { ticket, result: Ok(torn(20, VmState::Starting)) });
    engine.step(Timestamp(0), Input::Vm(torn(21, VmState::Failed)));
    assert_eq!(engine.waits_for(job_id(1)).as_deref(), Some("the pause after a VM that failed to boot"));
    assert_eq!(creations(&engine.step(Timestamp(0), asking(2, "", Isolation::Maximum))), 1);
}
