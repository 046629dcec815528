//! A node whose registry is silent ends what it runs, and goes on when it is heard again. Leases are short here.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::time::{Duration, Instant};

use blixard::{
    error::Reason,
    id::{JobId, VmId},
    pb::common::v1::{JobState, NodeState, VmKind},
    vm::VmState,
};
use blixard_vmhost::{Pace, lifecycle::LEASE_OVER};
use support::{NODE, Node, World, command, kill, shell, wait_for};

const LEASE: Duration = Duration::from_millis(3000);

async fn world() -> World {
    let mut world = World::new().await;
    world.pace = Pace { lease: LEASE, ..Pace::default() };
    world
}

async fn running(world: &World, node: &Node) -> (VmId, JobId) {
    let vm = world.start_vm(node, VmKind::Service).await;
    let job = world.run(node, vm, shell(r#"trap "" TERM; echo up; while :; do sleep 0.05; done"#)).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    (vm, job)
}

#[tokio::test]
async fn a_job_outlives_its_lease_as_long_as_the_registry_answers() {
    let world = world().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let since = Instant::now();
    let job = world.run(&node, vm, command(&["sleep", "7"])).await;
    let job = world.wait_job(job).await;
    assert_eq!(job.state(), JobState::Succeeded, "{}", job.reason);
    assert!(since.elapsed() > LEASE * 2);
}

#[tokio::test]
async fn a_node_that_is_not_answered_ends_its_attempt_and_begins_none() {
    let world = world().await;
    let node = world.node().await;
    let (vm, job) = running(&world, &node).await;
    let free = world.start_vm(&node, VmKind::Service).await;
    world.set_down(true);
    let silent = Instant::now();
    let log = node.follow(job, 0).await;
    assert!(silent.elapsed() < LEASE + Duration::from_secs(10), "{:?}", silent.elapsed());
    assert_eq!(log.end.unwrap().reason, LEASE_OVER, "its guest has ended it");
    world.wait_no_process_of(job).await;
    assert_eq!(world.processes().len(), 2, "both VMs live on");
    wait_for("the lease's end", || if silent.elapsed() > LEASE { Ok(()) } else { Err("not yet") }).await;
    let refused = node.try_run_job(free, JobId::random(), 1, command(&["true"])).await.unwrap_err();
    assert_eq!(refused.reason, Reason::PeerUnavailable, "{refused}");

    world.set_down(false);
    assert_eq!(world.wait_job(job).await.state(), JobState::Queued, "it may run again, here or elsewhere");
    assert!(world.history().contains(&"attempt 1 lost, started true".to_owned()));
    world.wait_vm(vm, VmState::Idle).await;
    let next = world.run(&node, vm, command(&["true"])).await;
    assert_eq!(world.wait_job(next).await.state(), JobState::Succeeded);
}

#[tokio::test]
async fn a_vm_whose_guest_does_not_end_the_attempt_is_killed_at_the_leases_end() {
    let world = world().await;
    let node = world.node().await;
    let (vm, job) = running(&world, &node).await;
    // A guest that does nothing any more: its agent is stopped.
    let agents: Vec<u32> = node.hosted().await.into_iter().flat_map(|vm| vm.pids).collect();
    agents.iter().for_each(|pid| signal(*pid, rustix::process::Signal::STOP));
    world.set_down(true);
    let log = node.follow(job, 0).await;
    assert_eq!(log.end.unwrap().reason, format!("its VM ended: {LEASE_OVER}"));
    world.wait_no_process_of(job).await;
    world.set_down(false);
    assert_eq!(world.wait_job(job).await.state(), JobState::Queued);
    assert_eq!(world.wait_vm(vm, VmState::Failed).await.reason.split(';').next(), Some(LEASE_OVER));
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn an_attempt_ends_by_itself_when_its_vmhost_is_gone_for_good() {
    let world = world().await;
    let node = world.node().await;
    let (vm, job) = running(&world, &node).await;
    assert_ne!(world.processes_of(job), [0; 0]);
    node.crash().await;
    let gone = Instant::now();
    world.wait_no_process_of(job).await;
    assert_eq!(world.processes().len(), 1, "its VM waits");
    assert!(gone.elapsed() < LEASE + Duration::from_secs(10), "{:?}", gone.elapsed());

    // A late vmhost finds a sound VM and an attempt that was lost, not one that failed.
    let _node = world.node().await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Queued);
    assert!(world.history().contains(&"attempt 1 lost, started true".to_owned()));
    world.wait_vm(vm, VmState::Idle).await;
}

#[tokio::test]
async fn an_adopted_attempt_goes_on_under_the_new_vmhosts_lease() {
    let world = world().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = world.run(&node, vm, shell("sleep 6; echo done")).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    node.crash().await;
    let node = world.node().await;
    assert_eq!(node.follow(job, 0).await.stdout, b"done\n");
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
}

#[tokio::test]
async fn an_attempt_whose_job_has_moved_on_is_ended_when_the_node_comes_back() {
    let world = World::new().await;
    let node = world.node().await;
    let (vm, job) = running(&world, &node).await;
    {
        // While the node was Lost, another attempt was begun elsewhere; its VM is still on record.
        let mut state = world.registry.state();
        let moved = state.job(&job.to_string()).unwrap();
        (moved.attempt, moved.vm_id, moved.node_id) = (2, VmId::random().to_string(), "node-2".to_owned());
        state.nodes.get_mut(NODE).unwrap().set_state(NodeState::Lost);
    }
    let log = node.follow(job, 0).await;
    assert_eq!(log.end.unwrap().reason, "the registry has moved on to another attempt");
    let incarnation = || world.registry.state().nodes[NODE].incarnation;
    wait_for("the second registration", || if incarnation() == 2 { Ok(()) } else { Err(incarnation()) }).await;
    let moved = job;
    let job = world.registry.state().jobs[&job.to_string()].clone();
    assert_eq!((job.state(), job.attempt), (JobState::Running, 2), "what runs elsewhere is not touched");
    world.wait_no_process_of(moved).await;
    let hosted = node.hosted().await.remove(0);
    assert_eq!((hosted.vm_id, hosted.job_id), (vm.to_string(), String::new()), "its VM is free");
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[tokio::test]
async fn labels_are_registered_with_the_node() {
    let world = World::new().await;
    let _node = world.node().await;
    let labels = || world.registry.state().nodes.get(NODE).map(|node| node.labels.clone()).unwrap_or_default();
    wait_for("the labels", || if labels().get("zone").is_some_and(|zone| zone == "a") { Ok(()) } else { Err("none") })
        .await;
    world.processes().into_iter().for_each(kill);
}
