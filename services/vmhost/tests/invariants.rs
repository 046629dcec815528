//! What belongs to no VM of the node is named, ended and deleted, and nothing else is touched.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use blixard::{
    id::VmId,
    pb::{
        common::v1::{Violation, ViolationKind, VmKind},
        vmhost::v1 as pb,
    },
};
use support::{Node, World, command};

/// A process that carries the marks of a VM; killed when it is dropped.
struct Marked(Child);

impl Marked {
    fn start(vm: VmId, state_dir: &Path) -> Self {
        let dir = state_dir.join(vm.to_string()).join("machine");
        let mut command = Command::new("sleep");
        command.arg("600").env("BLIXARD_VM_ID", vm.to_string()).env("BLIXARD_VM_DIR", dir).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }

    /// By what the kernel says: whoever ended it may have taken its status.
    fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with('Z'))
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn check(node: &Node, repair: bool) -> pb::CheckInvariantsResponse {
    node.client.clone().check_invariants(pb::CheckInvariantsRequest { repair }).await.unwrap().into_inner()
}

fn kinds(violations: &[Violation]) -> Vec<(ViolationKind, String, bool)> {
    violations.iter().map(|found| (found.kind(), found.vm_id.clone(), found.repaired)).collect()
}

#[tokio::test]
async fn what_belongs_to_no_vm_is_named_and_then_repaired_and_nothing_else_is_touched() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let clean = check(&node, false).await;
    assert_eq!((clean.vms, clean.directories, clean.violations), (1, 1, vec![]));
    assert!(clean.processes >= 1);

    let state_dir = world.vm_state_dir();
    let (stray, forgotten, half) = (VmId::random(), VmId::random(), VmId::random());
    let process = Marked::start(stray, &state_dir);
    fs::create_dir_all(state_dir.join(forgotten.to_string()).join("machine")).unwrap();
    fs::create_dir_all(state_dir.join(format!("{half}.deleted"))).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Marked::start(VmId::random(), elsewhere.path());
    fs::create_dir(state_dir.join("notes")).unwrap();

    let mut expected = [
        (ViolationKind::Process, stray.to_string(), false),
        (ViolationKind::Directory, forgotten.to_string(), false),
        (ViolationKind::Directory, half.to_string(), false),
    ];
    let found = check(&node, false).await.violations;
    let pid = process.0.id();
    assert_eq!(found[0].subject, format!("{pid} (sleep)"));
    let sorted = |mut kinds: Vec<(ViolationKind, String, bool)>| {
        kinds.sort();
        kinds
    };
    assert_eq!(sorted(kinds(&found)), sorted(expected.to_vec()));
    assert!(process.runs(), "only looked at");

    let found = check(&node, true).await.violations;
    expected.iter_mut().for_each(|expected| expected.2 = true);
    assert_eq!(sorted(kinds(&found)), sorted(expected.to_vec()));
    assert!(!process.runs());
    assert_eq!(check(&node, false).await.violations, []);
    assert!(foreign.runs() && state_dir.join("notes").is_dir(), "not this node's");

    let job = world.run(&node, vm, command(&["echo", "untouched"])).await;
    assert_eq!(node.follow(job, 0).await.stdout, b"untouched\n");
    fs::remove_dir(state_dir.join("notes")).unwrap();
}

/// VMs come and go while the node looks: nothing of them is a difference, and nothing of them is repaired away.
#[tokio::test]
async fn vms_that_begin_and_end_meanwhile_are_no_differences() {
    let world = World::new().await;
    let node = world.node().await;
    let busy = async {
        for _ in 0..10 {
            let vm = world.start_vm(&node, VmKind::Service).await;
            node.stop_vm(vm, Some(0)).await.unwrap();
            world.wait_vm(vm, blixard::vm::VmState::Terminated).await;
        }
    };
    let looking = async {
        loop {
            assert_eq!(check(&node, true).await.violations, []);
        }
    };
    tokio::select! {
        () = busy => {}
        () = looking => {}
    }
    world.assert_nothing_left().await;
}
