//! A machine that runs out of memory or disk, as its vmhost is made to see it: what the node says, refuses and ends.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    pb::{
        common::v1::{self as common, HostPressure, JobState, VmKind},
        vmhost::v1 as pb,
    },
    vm::VmState,
};
use blixard_vmhost::pressure::{Disk, HostWatch, Memory, Observation};
use support::{NODE, Node, World, command, shell, vm_config, wait_for};

/// It keeps 1,024 MiB for itself: tight below 512, critical below 256 and until there are 384.
const TOTAL_MIB: u64 = 10_240;

fn memory(available_mib: u64) -> Observation {
    let memory = Memory { total_mib: TOTAL_MIB, available_mib, stalled_percent: 0 };
    Observation { memory: vec![memory], disks: vec![] }
}

fn disk(free_mib: u64) -> Observation {
    let disk = Disk { total_bytes: 1 << 40, free_bytes: free_mib << 20, total_inodes: 0, free_inodes: 0 };
    Observation { memory: vec![], disks: vec![disk] }
}

/// A world whose machine is as the test says.
async fn world() -> (World, Arc<Mutex<Observation>>) {
    let mut world = World::new().await;
    let seen = Arc::new(Mutex::new(Observation::default()));
    let shown = Arc::clone(&seen);
    world.watch = Some(HostWatch::new(move || shown.lock().unwrap().clone()));
    world.pace.look_at_host_every = Duration::from_millis(10);
    (world, seen)
}

async fn wait_told(world: &World, pressure: &[HostPressure]) {
    wait_for("the node to tell", || {
        let node = world.registry.state().nodes.get(NODE).cloned().ok_or("not registered")?;
        let told: Vec<_> = node.pressure().collect();
        if told == pressure { Ok(()) } else { Err(format!("{told:?}")) }
    })
    .await;
}

async fn try_start(world: &World, node: &Node) -> Result<VmId, Error> {
    let id = VmId::random();
    world.record_vm(id, VmKind::Service, VmState::Starting);
    let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(vm_config(VmKind::Service)) };
    node.client.clone().start_vm(request).await?;
    world.wait_vm(id, VmState::Ready).await;
    Ok(id)
}

/// As the scheduler does: told to the incarnation that is on record, and again until the node has heard of that itself.
async fn run(world: &World, node: &Node, vm: VmId, spec: &common::JobSpec) -> Result<JobId, Error> {
    let job = JobId::random();
    world.assign(vm, job, 1, spec);
    give(world, node, vm, job, spec).await.map(|()| job)
}

async fn give(world: &World, node: &Node, vm: VmId, job: JobId, spec: &common::JobSpec) -> Result<(), Error> {
    let since = Instant::now();
    loop {
        let incarnation = world.registry.state().nodes[NODE].incarnation;
        let (vm_id, job_id) = (vm.to_string(), job.to_string());
        let request = pb::RunJobRequest { vm_id, job_id, attempt: 1, spec: Some(spec.clone()), incarnation };
        match node.client.clone().run_job(request).await.map_err(Error::from) {
            Err(error) if error.reason == Reason::StaleIncarnation && since.elapsed() < support::SOON => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            answer => return answer.map(drop),
        }
    }
}

async fn running(world: &World, node: &Node, kind: VmKind) -> (VmId, JobId) {
    let vm = world.start_vm(node, kind).await;
    let job = run(world, node, vm, &shell("echo up; sleep 600")).await.unwrap();
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    (vm, job)
}

#[tokio::test]
async fn a_node_that_is_short_of_memory_says_so_and_takes_no_vm_while_those_it_has_go_on() {
    let (world, seen) = world().await;
    *seen.lock().unwrap() = memory(300);
    let node = world.node().await;
    wait_told(&world, &[HostPressure::Memory]).await;
    let incarnation = world.registry.state().nodes[NODE].incarnation;
    assert_eq!(incarnation, 1, "it said so when it registered first");
    let refused = try_start(&world, &node).await.unwrap_err();
    assert_eq!((refused.reason, refused.reason.code()), (Reason::Overloaded, tonic::Code::ResourceExhausted));
    let words = "this node is short of memory and takes no VM: 300 MiB of 10240 MiB of memory are available";
    assert_eq!(refused.message, words);

    *seen.lock().unwrap() = memory(5000);
    wait_told(&world, &[]).await;
    let vm = try_start(&world, &node).await.unwrap();
    *seen.lock().unwrap() = memory(300);
    wait_told(&world, &[HostPressure::Memory]).await;
    // The same order again is no new VM, and a job needs none.
    let request = pb::StartVmRequest { vm_id: vm.to_string(), config: Some(vm_config(VmKind::Service)) };
    node.client.clone().start_vm(request).await.unwrap();
    let job = run(&world, &node, vm, &command(&["echo", "on"])).await.unwrap();
    assert_eq!(node.follow(job, 0).await.stdout, b"on\n");

    // Should the kernel have to choose after all, it is not vmhost.
    let badness =
        |pid: u32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse::<i32>().unwrap();
    for pid in node.hosted().await.remove(0).pids {
        assert_eq!(badness(pid), badness(std::process::id()).max(500));
    }
}

#[tokio::test]
async fn a_node_that_runs_out_of_memory_ends_who_costs_least_and_no_more_than_it_must() {
    let mut world = World::new().await;
    let (base, dir) = (Arc::new(Mutex::new(5000_u64)), world.vm_state_dir());
    let shown = Arc::clone(&base);
    // Each VM has 150 MiB of it, and gives them back when it is gone.
    world.watch = Some(HostWatch::new(move || {
        let vms = fs::read_dir(&dir).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()).count();
        memory(shown.lock().unwrap().saturating_sub(150 * vms as u64))
    }));
    world.pace.look_at_host_every = Duration::from_millis(10);
    let node = world.node().await;
    let idle = [world.start_vm(&node, VmKind::Service).await, world.start_vm(&node, VmKind::Service).await];
    let (elder, elders) = running(&world, &node, VmKind::Ephemeral).await;
    let (younger, youngers) = running(&world, &node, VmKind::Ephemeral).await;

    // 200 MiB with all of them, 350 with three, 500 with two: enough.
    *base.lock().unwrap() = 800;
    for vm in idle {
        let ended = world.wait_vm(vm, VmState::Terminated).await;
        assert!(
            ended.reason.contains("its node ran out of memory: 200 MiB of 10240 MiB")
                || ended.reason.contains("350 MiB"),
            "{}",
            ended.reason
        );
    }
    // 240 with two, 390 with one.
    *base.lock().unwrap() = 540;
    let failed = world.wait_vm(younger, VmState::Failed).await;
    assert!(failed.reason.contains("its node ran out of memory: 240 MiB"), "{}", failed.reason);
    let lost = world.wait_job(youngers).await;
    assert_eq!(lost.state(), JobState::Queued, "lost, not failed: another attempt may follow");
    assert!(lost.reason.contains("its node ran out of memory"), "{}", lost.reason);
    assert!(world.history().contains(&"attempt 1 lost, started true".to_owned()));

    // Looked at for longer than it takes to end another.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let hosted = node.hosted().await;
        let spared = hosted.iter().find(|vm| vm.vm_id == elder.to_string()).expect("it is here");
        assert_eq!((spared.state(), spared.job_id.as_str()), (common::VmState::Busy, &*elders.to_string()));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(node.differences().await, []);
    node.stop_vm(elder, Some(0)).await.unwrap();
    world.wait_vm(elder, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn nothing_begins_while_the_disk_is_full() {
    let (world, seen) = world().await;
    let node = world.node().await;
    let vm = try_start(&world, &node).await.unwrap();
    *seen.lock().unwrap() = disk(3000);
    wait_told(&world, &[HostPressure::Disk]).await;
    let job = run(&world, &node, vm, &command(&["echo", "still"])).await.unwrap();
    assert_eq!(node.follow(job, 0).await.stdout, b"still\n");
    world.wait_vm(vm, VmState::Idle).await;
    let refused = try_start(&world, &node).await.unwrap_err();
    assert!(refused.message.contains("short of disk and takes no VM: 3000 MiB of 1048576 MiB"), "{refused}");

    *seen.lock().unwrap() = disk(900);
    wait_told(&world, &[HostPressure::Disk, HostPressure::DiskCritical]).await;
    let (job, spec) = (JobId::random(), command(&["echo", "later"]));
    world.assign(vm, job, 1, &spec);
    let refused = give(&world, &node, vm, job, &spec).await.unwrap_err();
    assert!(refused.reason == Reason::Overloaded && refused.message.contains("disk is full"), "{refused}");
    *seen.lock().unwrap() = disk(7000);
    wait_told(&world, &[]).await;
    give(&world, &node, vm, job, &spec).await.unwrap();
    assert_eq!(node.follow(job, 0).await.stdout, b"later\n", "a refusal that passes is no refusal of the attempt");
}
