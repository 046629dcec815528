//! A VM is given another shape while it runs: the room that it takes, what is on disk and what the registry knows, whenever vmhost is
//! killed. (That a real machine has it is the conformance suite's.)

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{fs, sync::Arc};

use blixard::{
    config::DriverChoice,
    error::{Error, Reason},
    id::VmId,
    pb::{
        common::v1::{self as common, VmKind},
        vmhost::v1 as pb,
    },
    vm::{VmShape, VmState},
};
use blixard_vmhost::hypervisor::choose;
use support::{
    Node, World, command,
    passing::{Passing, Resizes},
    shell, wait_for,
};

/// Starts a vmhost whose machines are processes that pass for ones that can be resized.
async fn node(world: &World) -> (Node, Arc<Resizes>) {
    let resizes = Arc::new(Resizes::default());
    let inner = choose(DriverChoice::Process, &world.settings()).unwrap().0;
    let hypervisor = Passing { resizes: Some(Arc::clone(&resizes)), ..Passing::new(inner) };
    (world.node_with(Arc::new(hypervisor)).await, resizes)
}

fn shape(vcpus: u32, memory_mib: u32) -> VmShape {
    VmShape { vcpus, memory_mib }
}

async fn resize(node: &Node, vm: VmId, to: VmShape) -> Result<VmShape, Error> {
    give(node, vm, Some(to.vcpus), Some(to.memory_mib)).await
}

/// The same for what is named alone.
async fn give(node: &Node, vm: VmId, vcpus: Option<u32>, memory_mib: Option<u32>) -> Result<VmShape, Error> {
    let request = pb::ResizeVmRequest { vm_id: vm.to_string(), vcpus, memory_mib };
    let answer = node.client.clone().resize_vm(request).await.map_err(Error::from)?.into_inner();
    Ok(shape_of(answer.vm.unwrap().config))
}

fn shape_of(config: Option<common::VmConfig>) -> VmShape {
    let config = config.unwrap();
    shape(config.vcpus(), config.memory_mib())
}

fn recorded(world: &World, vm: VmId) -> VmShape {
    shape_of(world.registry.state().vms[&vm.to_string()].config.clone())
}

async fn hosted(node: &Node) -> VmShape {
    shape_of(node.hosted().await.remove(0).config)
}

/// `shapes` of the VM's record.
fn on_disk(world: &World, vm: VmId) -> serde_json::Value {
    let record = fs::read(world.vm_state_dir().join(vm.to_string()).join("vm.json")).unwrap();
    serde_json::from_slice::<serde_json::Value>(&record).unwrap()["shapes"].take()
}

fn resized(world: &World) -> Vec<String> {
    world.history().into_iter().filter(|line| line.starts_with("vm resized")).collect()
}

async fn asked(resizes: &Resizes, count: usize) {
    wait_for("the machine to be asked", || {
        let asked = resizes.asked.lock().unwrap().len();
        if asked == count { Ok(()) } else { Err(asked) }
    })
    .await;
}

async fn wait_recorded(world: &World, vm: VmId, to: VmShape) {
    wait_for("the registry to know", || {
        let now = recorded(world, vm);
        if now == to { Ok(()) } else { Err(now) }
    })
    .await;
}

async fn stop(world: &World, node: &Node, vm: VmId) {
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_runs_has_another_shape_and_the_registry_knows_when_that_is_answered() {
    let world = World::new().await;
    let (node, resizes) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = world.run(&node, vm, shell("echo begun; sleep 600")).await;
    assert_eq!(resize(&node, vm, shape(2, 256)).await, Ok(shape(2, 256)));
    assert_eq!((hosted(&node).await, recorded(&world, vm)), (shape(2, 256), shape(2, 256)));
    // Again, and back; one that it has costs its machine nothing.
    assert_eq!(resize(&node, vm, shape(2, 256)).await, Ok(shape(2, 256)));
    assert_eq!(resize(&node, vm, shape(1, 256)).await, Ok(shape(1, 256)));
    assert_eq!(*resizes.asked.lock().unwrap(), [shape(2, 256), shape(1, 256)]);
    assert_eq!(resized(&world), ["vm resized to 2 256", "vm resized to 1 256"]);

    // The order to start it, come late, is still the one that it was started with.
    let again = pb::StartVmRequest { vm_id: vm.to_string(), config: Some(support::vm_config(VmKind::Service)) };
    node.client.clone().start_vm(again).await.unwrap();
    node.cancel(job, 1).await.unwrap();
    world.wait_job(job).await;
    stop(&world, &node, vm).await;
    assert_eq!(resize(&node, vm, shape(2, 256)).await.unwrap_err().reason, Reason::VmNotFound);
}

#[tokio::test]
async fn what_is_not_named_stays_as_the_vm_has_it_whatever_the_registry_says() {
    let world = World::new().await;
    let (node, resizes) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    assert_eq!(give(&node, vm, Some(2), None).await, Ok(shape(2, 128)));
    world.registry.state().vms.get_mut(&vm.to_string()).unwrap().config.as_mut().unwrap().vcpus = Some(1);
    assert_eq!(give(&node, vm, None, Some(256)).await, Ok(shape(2, 256)));
    assert_eq!(*resizes.asked.lock().unwrap(), [shape(2, 128), shape(2, 256)]);
    assert_eq!(give(&node, vm, None, None).await.unwrap_err().reason, Reason::InvalidField);
    stop(&world, &node, vm).await;
}

#[tokio::test]
async fn what_a_vm_can_not_have_is_refused_before_anything_is_done() {
    let world = World::new().await;
    let (node, resizes) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    for (to, reason, field) in [
        (shape(64, 128), Reason::ExceedsCapacity, "vcpus"),
        (shape(1, 640), Reason::ExceedsCapacity, "memory_mib"),
        (shape(1, 200), Reason::InvalidField, "memory_mib"),
        (shape(1, 96), Reason::InvalidField, "memory_mib"),
        (shape(0, 128), Reason::InvalidField, "vcpus"),
    ] {
        let error = resize(&node, vm, to).await.unwrap_err();
        assert_eq!((error.reason, error.metadata["field"].as_str()), (reason, field), "{error}");
    }
    assert_eq!(resize(&node, VmId::random(), shape(1, 128)).await.unwrap_err().reason, Reason::VmNotFound);
    assert_eq!(*resizes.asked.lock().unwrap(), []);
    assert_eq!(on_disk(&world, vm)["next"], serde_json::Value::Null);
    node.shut_down().await;

    // A driver that can't.
    let node = world.node().await;
    let error = resize(&node, vm, shape(2, 128)).await.unwrap_err();
    assert_eq!(error.reason, Reason::ExceedsCapacity);
    let fresh = world.start_vm(&node, VmKind::Service).await;
    let refused = resize(&node, fresh, shape(2, 128)).await.unwrap_err();
    assert_eq!(refused.reason, Reason::ExceedsCapacity);
    let allowed = "1, which it has: the driver \"process\" can't change a VM that runs";
    assert_eq!(refused.metadata["allowed"], allowed);
    assert_eq!(resized(&world), [""; 0]);
    node.stop_vm(fresh, Some(0)).await.unwrap();
    world.wait_vm(fresh, VmState::Terminated).await;
    stop(&world, &node, vm).await;
}

#[tokio::test]
async fn a_vm_of_an_earlier_version_keeps_its_shape() {
    let world = World::new().await;
    let (first, _) = node(&world).await;
    let vm = world.start_vm(&first, VmKind::Service).await;
    first.crash().await;
    let path = world.vm_state_dir().join(vm.to_string()).join("vm.json");
    let mut record: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record.remove("shapes").unwrap();
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();

    let (second, _) = node(&world).await;
    let error = resize(&second, vm, shape(2, 128)).await.unwrap_err();
    assert_eq!(error.reason, Reason::ExceedsCapacity);
    assert!(error.message.contains("it was started by a vmhost that could not"), "{error}");
    stop(&world, &second, vm).await;
}

#[tokio::test]
async fn a_vmhost_that_is_killed_in_the_middle_is_followed_by_one_that_goes_on() {
    let world = World::new().await;
    let (first, closed) = node(&world).await;
    let vm = world.start_vm(&first, VmKind::Service).await;
    closed.open.send_replace(false);
    let request = pb::ResizeVmRequest { vm_id: vm.to_string(), vcpus: Some(2), memory_mib: Some(256) };
    let mut client = first.client.clone();
    let caller = world.tasks.clone();
    caller.spawn("caller", async move { drop(client.resize_vm(request).await) });
    asked(&closed, 1).await;
    // Written down before, its room is taken, and there is one at a time.
    assert_eq!(on_disk(&world, vm)["next"], serde_json::json!({"vcpus": 2, "memory_mib": 256}));
    assert_eq!((hosted(&first).await, recorded(&world, vm)), (shape(2, 256), shape(1, 128)));
    assert_eq!(resize(&first, vm, shape(1, 128)).await.unwrap_err().reason, Reason::Overloaded);
    first.crash().await;

    let (second, resizes) = node(&world).await;
    wait_recorded(&world, vm, shape(2, 256)).await;
    assert_eq!(*resizes.asked.lock().unwrap(), [shape(2, 256)]);
    let disk = on_disk(&world, vm);
    assert_eq!(
        (&disk["now"], &disk["next"]),
        (&serde_json::json!({"vcpus": 2, "memory_mib": 256}), &serde_json::Value::Null)
    );
    // It is told again by each vmhost that adopts the VM, which changes nothing.
    second.crash().await;
    let (third, resizes) = node(&world).await;
    assert_eq!(hosted(&third).await, shape(2, 256));
    let job = world.run(&third, vm, command(&["true"])).await;
    world.wait_job(job).await;
    assert_eq!((resized(&world).len(), resizes.asked.lock().unwrap().len()), (1, 0));
    stop(&world, &third, vm).await;
}

#[tokio::test]
async fn what_the_registry_could_not_be_told_is_told_by_the_next_vmhost() {
    let world = World::new().await;
    let (first, _) = node(&world).await;
    let vm = world.start_vm(&first, VmKind::Service).await;
    world.set_down(true);
    let request = pb::ResizeVmRequest { vm_id: vm.to_string(), vcpus: Some(1), memory_mib: Some(256) };
    let mut client = first.client.clone();
    let caller = world.tasks.clone();
    caller.spawn("caller", async move { drop(client.resize_vm(request).await) });
    wait_for("the machine to have it", || {
        let disk = on_disk(&world, vm);
        if disk["now"]["memory_mib"] == 256 { Ok(()) } else { Err(disk) }
    })
    .await;
    // Repeated, it is the same report.
    let ids = || world.registry.state().resize_ids.clone();
    wait_for("it to be told again", || if ids().len() > 1 { Ok(()) } else { Err(ids().len()) }).await;
    assert!(ids().iter().all(|id| *id == ids()[0] && !id.is_empty()), "{:?}", ids());
    first.crash().await;
    assert_eq!(recorded(&world, vm), shape(1, 128));
    world.set_down(false);
    let (second, resizes) = node(&world).await;
    wait_recorded(&world, vm, shape(1, 256)).await;
    assert_eq!(*resizes.asked.lock().unwrap(), []);
    stop(&world, &second, vm).await;
}

#[tokio::test]
async fn a_registry_that_records_no_shapes_holds_nothing_up() {
    let world = World::new().await;
    let (node, _) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    world.registry.state().records_no_shapes = true;
    assert_eq!(resize(&node, vm, shape(2, 256)).await, Ok(shape(1, 128)));
    assert_eq!(hosted(&node).await, shape(2, 256));
    let job = world.run(&node, vm, command(&["true"])).await;
    world.wait_job(job).await;
    stop(&world, &node, vm).await;
}

#[tokio::test]
async fn a_resize_that_fails_half_way_is_told_with_what_the_vm_has_then() {
    let world = World::new().await;
    let (node, resizes) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    resizes.fail(Some(shape(1, 256)), None);
    let error = resize(&node, vm, shape(2, 256)).await.unwrap_err();
    assert_eq!(error.reason, Reason::GuestRefused);
    assert!(error.message.contains("and has 1 vCPUs, 256 MiB: it fails for the test"), "{error}");
    wait_recorded(&world, vm, shape(1, 256)).await;
    assert_eq!(hosted(&node).await, shape(1, 256));

    // Nobody knows: its room stays taken, until somebody finds out.
    for (to, room) in [(shape(1, 384), shape(1, 384)), (shape(2, 256), shape(2, 384))] {
        resizes.fail(None, None);
        let error = resize(&node, vm, to).await.unwrap_err();
        assert!(error.message.contains("nobody can tell what it has"), "{error}");
        assert_eq!((hosted(&node).await, recorded(&world, vm)), (room, shape(1, 256)));
    }
    assert_eq!(resize(&node, vm, shape(2, 256)).await, Ok(shape(2, 256)));
    assert_eq!(hosted(&node).await, shape(2, 256));
    stop(&world, &node, vm).await;
}

#[tokio::test]
async fn a_guest_that_keeps_its_vcpus_keeps_their_room_and_is_asked_again() {
    let world = World::new().await;
    let (node, resizes) = node(&world).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    assert_eq!(resize(&node, vm, shape(2, 128)).await, Ok(shape(2, 128)));
    resizes.fail(Some(shape(2, 256)), Some(1));
    let error = resize(&node, vm, shape(1, 256)).await.unwrap_err();
    assert_eq!(error.reason, Reason::GuestRefused);
    assert!(error.message.contains("2 vCPUs, 256 MiB, 1 vCPUs as soon as its guest lets the others go"), "{error}");
    wait_recorded(&world, vm, shape(2, 256)).await;
    assert_eq!(hosted(&node).await, shape(2, 256));

    // It may have let them go since: what it seems to have is asked for, too.
    let asked = resizes.asked.lock().unwrap().len();
    assert_eq!(resize(&node, vm, shape(2, 256)).await, Ok(shape(2, 256)));
    assert_eq!(resizes.asked.lock().unwrap()[asked..], [shape(2, 256)]);

    // It keeps no memory away, whether or not it lets go.
    resizes.fail(Some(shape(2, 384)), Some(1));
    assert_eq!(give(&node, vm, None, Some(384)).await, Ok(shape(2, 384)));
    resizes.fail(Some(shape(2, 384)), Some(1));
    assert_eq!(give(&node, vm, None, Some(512)).await.unwrap_err().reason, Reason::GuestRefused);
    assert_eq!(resize(&node, vm, shape(1, 384)).await, Ok(shape(1, 384)));
    assert_eq!(on_disk(&world, vm)["next"], serde_json::Value::Null);
    stop(&world, &node, vm).await;
}
