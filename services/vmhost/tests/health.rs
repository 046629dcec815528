//! VMs that run nothing are asked how they are; those that do not answer get no jobs, and in the end are given up.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use blixard::{
    error::Reason,
    id::{JobId, VmId},
    pb::common::v1::{JobState, VmKind},
    vm::VmState,
};
use blixard_vmhost::HealthConfig;
use support::{Node, World, command, fake_guest::FakeGuest, wait_for};

async fn world(check_every: Duration) -> World {
    let mut world = World::new().await;
    world.health = HealthConfig { check_every: Some(check_every), recycle_below_memory_percent: 5 };
    world
}

/// A node with a service VM whose guest is told what to do.
async fn fake(world: &World) -> (FakeGuest, Node, VmId) {
    let guest = FakeGuest::default();
    let node = world.node_with(Arc::new(guest.clone())).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    (guest, node, vm)
}

/// Waits for more checks.
async fn checks(guest: &FakeGuest, more: u64) {
    let before = guest.hellos();
    let done = || guest.hellos() - before;
    wait_for("checks", || if done() >= more { Ok(()) } else { Err(done()) }).await;
}

#[tokio::test]
async fn a_vm_that_fails_its_checks_gets_no_jobs_until_it_passes_one() {
    let world = world(Duration::from_millis(200)).await;
    let (guest, node, vm) = fake(&world).await;
    checks(&guest, 2).await;
    guest.told.silent.store(true, Ordering::SeqCst);
    // The first failed check asks twice; when the fourth one comes, three have been counted.
    checks(&guest, 5).await;
    let refused = node.run_job(vm, JobId::random(), 1, command(&["true"])).await.unwrap_err();
    assert_eq!(refused.reason, Reason::VmNotAccepting, "{refused}");
    assert!(refused.message.contains("fails its health checks"), "{refused}");

    guest.told.silent.store(false, Ordering::SeqCst);
    // The first one asks twice again.
    checks(&guest, 4).await;
    guest.told.end.send_replace(true);
    let job = world.run(&node, vm, command(&["true"])).await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    guest.tasks.token().cancel();
}

#[tokio::test]
async fn a_vm_that_runs_a_job_is_not_asked() {
    let world = world(Duration::from_millis(20)).await;
    let (guest, node, vm) = fake(&world).await;
    checks(&guest, 2).await;
    let job = world.run(&node, vm, command(&["true"])).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    // One may have been under way.
    let (asked, beats) = (guest.hellos() + 1, || world.registry.state().heartbeats);
    let before = beats();
    wait_for("time to pass", || if beats() > before + 20 { Ok(()) } else { Err(beats()) }).await;
    assert!(guest.hellos() <= asked, "{} {asked}", guest.hellos());
    guest.told.end.send_replace(true);
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    checks(&guest, 2).await;
    guest.tasks.token().cancel();
}

#[tokio::test]
async fn an_idle_vm_short_of_memory_is_drained_with_the_reason_once_the_registry_agrees() {
    let world = world(Duration::from_millis(50)).await;
    let (guest, _node, vm) = fake(&world).await;
    guest.told.memory_available_kib.store(5_000, Ordering::SeqCst);
    checks(&guest, 3).await;
    world.wait_vm(vm, VmState::Ready).await;
    world.set_down(true);
    guest.told.memory_available_kib.store(4_999, Ordering::SeqCst);
    checks(&guest, 3).await;
    world.set_down(false);
    let ended = world.wait_vm(vm, VmState::Terminated).await;
    assert_eq!(ended.reason, "short of memory: 4 MiB of 97 MiB are available, less than 5 %");
    assert!(world.history().contains(&"vm Ready -> Draining".to_owned()), "{:?}", world.history());
    guest.tasks.token().cancel();
}

#[tokio::test]
async fn a_vm_that_stays_silent_is_given_up_with_the_reason() {
    let world = world(Duration::from_millis(300)).await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let pid = i32::try_from(node.hosted().await[0].pids[0]).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let failed = world.wait_vm(vm, VmState::Failed).await;
    let expected = "unhealthy: its guest agent did not answer within 300 ms";
    assert!(failed.reason.starts_with(expected), "{}", failed.reason);
    world.assert_nothing_left().await;
}

/// `cargo test --release -p blixard-vmhost --test health -- --ignored --nocapture`, on an idle machine.
#[tokio::test]
#[ignore = "measures"]
async fn what_health_checks_cost() {
    let mut world = world(Duration::from_secs(2)).await;
    let vms = 50;
    world.max_vms = vms;
    world.registry.state().heartbeat_ms = 5_000;
    let node = world.node().await;
    for _ in 0..vms {
        world.start_vm(&node, VmKind::Service).await;
    }
    let agents: Vec<u32> = node.hosted().await.iter().flat_map(|vm| vm.pids.clone()).collect();
    let cpu = |pids: &[u32]| -> f64 { pids.iter().map(|pid| cpu_ms(*pid)).sum() };
    let (begun, vmhost, guests) = (Instant::now(), cpu(&[std::process::id()]), cpu(&agents));
    tokio::time::sleep(Duration::from_secs(40)).await;
    let checks = f64::from(vms) * begun.elapsed().as_secs_f64() / 2.0;
    let (vmhost, guests) = (cpu(&[std::process::id()]) - vmhost, cpu(&agents) - guests);
    println!("{checks:.0} checks: {vmhost:.0} ms in vmhost; {guests:.0} ms in the guests");
    println!(
        "a check costs {:.3} ms; 1,000 idle VMs every 30 s: {:.2} % of a core",
        (vmhost + guests) / checks,
        (vmhost + guests) / checks * 1000.0 / 30.0 / 10.0
    );
    assert!(checks > 900.0);
}

/// CPU time of a process in milliseconds.
fn cpu_ms(pid: u32) -> f64 {
    let schedstat = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let nanoseconds = schedstat.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e6
}
