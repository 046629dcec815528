//! What belongs to no VM of the node is named, ended and deleted, and nothing else is touched.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use blixard::{
    id::VmId,
    pb::{
        common::v1::{Violation, ViolationKind, VmKind},
        vmhost::v1 as pb,
    },
};
use blixard_vmhost::hypervisor::{Contained, Hypervisor, choose};
use support::{Node, World, command, passing::Passing, wait_for};

/// A process that carries the marks of a VM; killed when it is dropped.
struct Marked(Child);

impl Marked {
    fn start(vm: VmId, state_dir: &Path) -> Self {
        Self::with(state_dir.join(vm.to_string()).join("machine").as_path(), Some(vm))
    }

    /// One that says that it is of the machine in this directory, whose id it does not know.
    fn naming(dir: &Path) -> Self {
        Self::with(dir, None)
    }

    fn with(dir: &Path, vm: Option<VmId>) -> Self {
        let mut command = Command::new("sleep");
        command.arg("600").env("BLIXARD_VM_DIR", dir).envs(vm.map(|vm| ("BLIXARD_VM_ID", vm.to_string())));
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }

    /// One without any mark, in a cgroup.
    fn hidden(cgroup: &Path) -> Self {
        let process = Self(Command::new("sleep").arg("600").env_clear().stdin(Stdio::null()).spawn().unwrap());
        fs::write(cgroup.join("cgroup.procs"), process.0.id().to_string()).unwrap();
        process
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

#[tokio::test]
async fn a_process_that_passes_for_another_vms_is_named_and_ended_and_that_vm_is_not_touched() {
    let world = World::new().await;
    let process = choose(blixard::config::DriverChoice::Process, &world.settings()).unwrap().0;
    let contained = || {
        let process = Arc::clone(&process);
        Arc::new(Passing { containment: Contained::Yes { kvm: false }, ..Passing::new(process) })
    };
    let node = world.node_with(contained()).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    // The test makes no cgroup for it.
    let others = |found: Vec<Violation>| -> Vec<Violation> {
        found.into_iter().filter(|found| found.kind() != ViolationKind::Cgroup).collect()
    };
    assert_eq!(others(check(&node, true).await.violations), []);

    // It says that it is of the VM's machine, or somewhere in it, or that it makes a template.
    let state_dir = world.vm_state_dir();
    let of_vm = Marked::start(vm, &state_dir);
    let below = Marked::naming(&state_dir.join(vm.to_string()).join("machine/run"));
    let template = Marked::naming(&state_dir.join(".templates/0123"));
    let subjects = |found: &[Violation]| {
        let mut subjects: Vec<(String, String)> =
            found.iter().map(|found| (found.vm_id.clone(), found.subject.clone())).collect();
        subjects.sort();
        subjects
    };
    let mut expected: Vec<(String, String)> =
        [(&of_vm, vm.to_string()), (&below, vm.to_string()), (&template, String::new())]
            .map(|(process, vm_id)| (vm_id, format!("{} (sleep)", process.0.id())))
            .into();
    expected.sort();
    let found = others(check(&node, false).await.violations);
    assert_eq!(subjects(&found), expected);
    assert!(found.iter().all(|found| found.kind() == ViolationKind::Process));
    assert!(of_vm.runs() && below.runs() && template.runs(), "only looked at");
    let found = others(check(&node, true).await.violations);
    assert!(subjects(&found) == expected && found.iter().all(|found| found.repaired), "{found:?}");
    assert!(!of_vm.runs() && !below.runs() && !template.runs());
    assert_eq!(others(check(&node, true).await.violations), []);
    let job = world.run(&node, vm, command(&["echo", "untouched"])).await;
    assert_eq!(node.follow(job, 0).await.stdout, b"untouched\n");
}

/// A directory of the cgroup file system that goes with the test.
struct Foreign(PathBuf);

impl Foreign {
    fn make(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let _ = fs::remove_dir(&self.0);
    }
}

/// Where the cgroup of a VM is, as its record says.
fn cgroup_of(world: &World, vm: VmId) -> Option<PathBuf> {
    let record = fs::read(world.vm_state_dir().join(vm.to_string()).join("vm.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    record["place"]["cgroup"].as_str().map(Into::into)
}

#[tokio::test]
async fn cgroups_are_those_of_vms_that_run_and_a_foreign_one_is_never_touched() {
    let world = World::new().await;
    let driver = || -> Arc<dyn Hypervisor> {
        let process = choose(blixard::config::DriverChoice::Process, &world.settings()).unwrap().0;
        Arc::new(Passing { containment: Contained::Yes { kvm: false }, ..Passing::new(process) })
    };
    let node = world.node_with(driver()).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let Some(own) = cgroup_of(&world, vm) else {
        eprintln!("SKIPPED: no cgroup can be made here");
        return;
    };
    let missing = check(&node, true).await.violations;
    assert_eq!(kinds(&missing), [(ViolationKind::Cgroup, vm.to_string(), false)]);
    assert_eq!(missing[0].subject, own.display().to_string());

    let of_node = own.parent().unwrap();
    fs::create_dir_all(&own).unwrap();
    assert_eq!(check(&node, false).await.violations, []);
    // Beside it: of a VM that nobody holds, of no VM, and of another node.
    let stray = VmId::random();
    let left = of_node.join(stray.to_string());
    fs::create_dir(&left).unwrap();
    let process = Marked::hidden(&left);
    let named = Foreign::make(of_node.join("somebody-elses"));
    let others = Foreign::make(of_node.with_extension(VmId::random().to_string()));
    let foreign = Foreign::make(others.0.join(VmId::random().to_string()));
    let untouched = [Marked::hidden(&named.0), Marked::hidden(&foreign.0), Marked::hidden(&own)];
    assert_eq!(kinds(&check(&node, false).await.violations), [(ViolationKind::Cgroup, stray.to_string(), false)]);
    assert!(process.runs(), "only looked at");
    assert_eq!(kinds(&check(&node, true).await.violations), [(ViolationKind::Cgroup, stray.to_string(), true)]);
    assert!(!process.runs() && !left.exists());
    assert_eq!(check(&node, false).await.violations, []);
    assert!(untouched.iter().all(Marked::runs));

    // vmhost is killed, and what is left of the VM hides in its cgroup: the next one sweeps it.
    node.crash().await;
    for process in world.processes() {
        kill(process);
    }
    let _node = world.node_with(driver()).await;
    world.wait_vm(vm, blixard::vm::VmState::Failed).await;
    wait_for("the VM's cgroup to go", || if own.exists() { Err("it is there") } else { Ok(()) }).await;
    assert!(!untouched[2].runs());
    assert!(untouched[..2].iter().all(Marked::runs));
    drop((untouched, foreign, others, named));
    world.assert_nothing_left().await;
    let _ = fs::remove_dir(of_node);
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
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
