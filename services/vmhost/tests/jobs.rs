//! Jobs in VMs, over sockets: the service, the real guest agent behind the process driver, a registry in memory.

mod support;

use std::time::{Duration, Instant};

use blixard::{
    config::DriverChoice,
    error::{Error, Reason},
    id::{JobId, VmId},
    pb::{
        common::v1::{self as common, JobState, VmKind},
        vmhost::v1 as pb,
    },
    vm::VmState,
};
use blixard_vmhost::hypervisor::choose;
use support::{Log, World, command, faulty::Faulty, kill, shell, vm_config, wait_for};

#[tokio::test]
async fn a_job_runs_in_a_vm_of_its_own_which_then_ends() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, shell("echo out; echo err >&2; exit 7")).await;
    let log = node.follow(job, 0).await;
    assert_eq!((log.stdout.as_slice(), log.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let end = log.end.expect("an end");
    assert_eq!((end.state(), end.exit.and_then(|exit| exit.exit_code)), (JobState::Failed, Some(7)));

    let job = world.wait_job(job).await;
    assert_eq!((job.state(), job.log_bytes, job.reason.as_str()), (JobState::Failed, 8, "it exited with status 7"));
    world.wait_vm(vm, VmState::Terminated).await;
    let expected = [
        "vm Starting -> Ready",
        "vm Ready -> Busy",
        "attempt 1 Failed",
        "vm Busy -> Draining",
        "vm Draining -> Terminated",
    ];
    // The start of a short command is told by itself or with its end.
    let told = world.history().into_iter().filter(|line| line != "attempt 1 started");
    assert_eq!(told.collect::<Vec<_>>(), expected);
    world.assert_nothing_left().await;
    assert_eq!(node.follow(JobId::parse("", &job.id).unwrap(), 0).await.bytes, 8, "the log outlives its VM");
}

#[tokio::test]
async fn a_service_vm_runs_one_job_after_another() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    for number in 0..5 {
        let job = world.run(&node, vm, command(&["echo", &number.to_string()])).await;
        let ended = world.wait_job(job).await;
        // However the start was told: by itself, or with the end.
        assert_eq!((ended.state(), ended.started_at.is_some()), (JobState::Succeeded, true));
        assert_eq!(node.follow(job, 0).await.stdout, format!("{number}\n").into_bytes());
    }
    let hosted = node.hosted().await;
    assert_eq!((hosted.len(), hosted[0].state(), hosted[0].pids.len()), (1, common::VmState::Idle, 1));
    node.stop_vm(vm, None).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn fifty_megabytes_arrive_exactly_from_any_offset() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, shell("yes | head -c 50000000")).await;
    let mut first = Log::default();
    first.read(&node, job, 0, 20_000_001).await.unwrap();
    let rest = node.follow(job, first.bytes).await;
    let all = [first.stdout, rest.stdout].concat();
    assert_eq!(all.len(), 50_000_000);
    assert!(all.chunks(2).all(|line| line == b"y\n"), "byte-exact");
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn output_that_is_not_utf8_arrives_unchanged() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, shell(r"printf '\377\000\376a\200'")).await;
    assert_eq!(node.follow(job, 0).await.stdout, b"\xff\0\xfea\x80");
    world.wait_vm(vm, VmState::Terminated).await;
}

#[tokio::test]
async fn a_job_out_of_time_is_ended() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let since = Instant::now();
    let job = world.run(&node, vm, common::JobSpec { timeout_ms: 300, ..command(&["sleep", "600"]) }).await;
    let job = world.wait_job(job).await;
    assert!(since.elapsed() >= Duration::from_millis(300));
    assert_eq!((job.state(), job.reason.as_str()), (JobState::TimedOut, "it ran longer than 300 ms"));
    assert_eq!(job.exit.and_then(|exit| exit.signal), Some(15));
    world.wait_vm(vm, VmState::Idle).await;
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_cancelled_job_is_ended_and_cancelling_again_changes_nothing() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = world.run(&node, vm, shell("echo up; sleep 600")).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    node.cancel(job, 1).await.unwrap();
    node.cancel(job, 1).await.unwrap();
    assert_eq!(world.wait_job(job).await.state(), JobState::Cancelled);
    node.cancel(job, 1).await.unwrap();
    assert_eq!(node.cancel(JobId::random(), 1).await.unwrap_err().reason, Reason::JobNotFound);
    node.stop_vm(vm, None).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_command_that_can_not_be_started_fails_with_the_reason() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, command(&["/no/such/program"])).await;
    let job = world.wait_job(job).await;
    assert_eq!((job.state(), job.exit), (JobState::Failed, None));
    assert!(job.reason.contains("/no/such/program"), "{}", job.reason);
    world.wait_vm(vm, VmState::Terminated).await;
}

#[tokio::test]
async fn a_vm_that_is_stopped_takes_its_job_with_it() {
    for grace_ms in [None, Some(0)] {
        let world = World::new().await;
        let node = world.node().await;
        let vm = world.start_vm(&node, VmKind::Service).await;
        let job = world.run(&node, vm, shell("echo up; sleep 600")).await;
        world.wait_job_until(job, |job| job.state() == JobState::Running).await;
        node.stop_vm(vm, grace_ms).await.unwrap();
        node.stop_vm(vm, grace_ms).await.unwrap();
        let lost = world.wait_job(job).await;
        assert_eq!((lost.state(), lost.reason.as_str()), (JobState::Queued, "its VM was stopped: no longer needed"));
        let vm = world.wait_vm(vm, VmState::Terminated).await;
        assert_eq!(vm.reason, "no longer needed");
        assert!(world.history().contains(&"attempt 1 lost, started true".to_owned()));
        world.assert_nothing_left().await;
        node.stop_vm(VmId::parse("", &vm.id).unwrap(), None).await.expect("it is gone: nothing to do");
    }
}

#[tokio::test]
async fn the_same_request_again_changes_nothing_and_wrong_ones_are_refused_with_their_reason() {
    let mut world = World::new().await;
    world.max_vms = 2;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let start = |id: VmId, config| {
        let mut client = node.client.clone();
        async move {
            let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(config) };
            client.start_vm(request).await.map(drop).map_err(|status| Error::from(status).reason)
        }
    };
    let service = || vm_config(VmKind::Service);
    assert_eq!(start(vm, service()).await, Ok(()));
    assert_eq!(start(vm, vm_config(VmKind::Ephemeral)).await, Err(Reason::RequestIdReused));
    let other = |config| start(VmId::random(), config);
    let unknown_image = common::VmConfig { image: "nonsense".to_owned(), ..service() };
    assert_eq!(other(unknown_image).await, Err(Reason::ImageNotFound));
    let huge = common::VmConfig { memory_mib: Some(1024 * 1024), ..service() };
    assert_eq!(other(huge).await, Err(Reason::ExceedsCapacity));
    assert_eq!(other(common::VmConfig { vcpus: Some(0), ..service() }).await, Err(Reason::InvalidField));

    let spec = shell("echo once; sleep 600");
    let job = JobId::random();
    world.assign(vm, job, 2, &spec);
    node.run_job(vm, job, 2, spec.clone()).await.unwrap();
    node.run_job(vm, job, 2, spec.clone()).await.unwrap();
    let reason = |result: Result<(), Error>| result.expect_err("refused").reason;
    assert_eq!(reason(node.run_job(vm, job, 1, spec.clone()).await), Reason::StaleAttempt);
    assert_eq!(reason(node.run_job(vm, JobId::random(), 1, spec.clone()).await), Reason::VmNotAccepting);
    assert_eq!(reason(node.run_job(VmId::random(), JobId::random(), 1, spec.clone()).await), Reason::VmNotFound);
    assert_eq!(reason(node.run_job(vm, job, 0, spec.clone()).await), Reason::InvalidField);
    assert_eq!(reason(node.stop_vm(VmId::random(), None).await), Reason::VmNotFound);

    let second = world.start_vm(&node, VmKind::Service).await;
    assert_eq!(other(service()).await, Err(Reason::Overloaded));
    for vm in [vm, second] {
        node.stop_vm(vm, Some(0)).await.unwrap();
        world.wait_vm(vm, VmState::Terminated).await;
    }
    node.run_job(vm, job, 2, spec).await.expect("it has ended here already");
    let started = world.history().iter().filter(|line| line.as_str() == "attempt 2 started").count();
    assert_eq!(started, 1);
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_log_that_is_unknown_or_ended_before_the_offset_is_an_error() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, command(&["echo", "hello"])).await;
    world.wait_vm(vm, VmState::Terminated).await;
    let beyond = Log::default().read(&node, job, 7, u64::MAX).await.unwrap_err();
    assert_eq!(beyond.reason, Reason::OffsetBeyondEnd);
    assert_eq!(beyond.metadata.get("end_offset").map(String::as_str), Some("6"));
    let unknown = Log::default().read(&node, JobId::random(), 0, u64::MAX).await.unwrap_err();
    assert_eq!(unknown.reason, Reason::LogNotFound);
    assert_eq!(node.follow(job, 6).await.end.unwrap().end_offset, 6, "the end itself is an offset");
}

#[tokio::test]
async fn a_guest_connection_that_is_cut_again_and_again_costs_no_byte() {
    let world = World::new().await;
    let (inner, _) = choose(DriverChoice::Process, &world.settings()).unwrap();
    let faulty = Faulty { inner, tasks: world.tasks.clone(), cut_after: 300_000 };
    let node = world.node_with(std::sync::Arc::new(faulty)).await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, shell("seq 1 400000")).await;
    let log = node.follow(job, 0).await;
    let expected: String = (1..=400_000).map(|number| format!("{number}\n")).collect();
    assert!(log.stdout == expected.as_bytes(), "byte-exact over about ten connections");
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_machine_killed_from_outside_loses_its_job_and_fails() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = world.run(&node, vm, shell("echo up; sleep 600")).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    let pids = node.hosted().await.remove(0).pids;
    kill(pids[0]);
    let lost = world.wait_job(job).await;
    assert_eq!(lost.state(), JobState::Queued);
    assert!(lost.reason.contains("its VM ended: guest agent was killed by signal 9"), "{}", lost.reason);
    let failed = world.wait_vm(vm, VmState::Failed).await;
    assert!(failed.reason.contains("killed by signal 9"), "{}", failed.reason);
    assert_eq!(node.follow(job, 0).await.stdout, b"up\n", "what it wrote is kept");
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn reports_wait_for_a_registry_that_is_down() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let spec = shell("echo done");
    let job = JobId::random();
    world.assign(vm, job, 1, &spec);
    world.set_down(true);
    node.run_job(vm, job, 1, spec).await.unwrap();
    assert_eq!(node.follow(job, 0).await.stdout, b"done\n", "the job does not wait for it");
    world.set_down(false);
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_guest_that_does_not_boot_fails_with_its_last_words() {
    let mut world = World::new().await;
    world.agent = ["/bin/sh", "-c", "echo no root file system; exit 3", "agent"].map(Into::into).to_vec();
    let node = world.node().await;
    let id = VmId::random();
    world.record_vm(id, VmKind::Ephemeral, VmState::Starting);
    let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(vm_config(VmKind::Ephemeral)) };
    node.client.clone().start_vm(request).await.unwrap();
    let vm = world.wait_vm(id, VmState::Failed).await;
    assert!(vm.reason.contains("status 3") && vm.reason.contains("no root file system"), "{}", vm.reason);
    world.assert_nothing_left().await;
    let console = node.client.clone().get_console(pb::GetConsoleRequest { vm_id: id.to_string() }).await;
    assert!(String::from_utf8_lossy(&console.unwrap().into_inner().data).contains("no root file system"));
}

#[tokio::test]
async fn what_a_vm_has_used_grows_with_its_jobs_and_is_told_for_as_long_as_it_is_there() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let before = node.usage(vm).await.unwrap();
    let job = world.run(&node, vm, shell("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done")).await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    // What it ran has ended; and however many ask, each is told.
    for usage in futures::future::join_all((0..20).map(|_| node.usage(vm))).await {
        let usage = usage.unwrap();
        assert!(usage.cpu_time_us.unwrap() > before.cpu_time_us.unwrap() + 50_000, "{before:?}; {usage:?}");
        assert!(usage.measured_at.unwrap().seconds > 1_700_000_000);
    }

    node.crash().await;
    let node = world.node().await;
    assert!(node.usage(vm).await.unwrap().cpu_time_us.unwrap() > before.cpu_time_us.unwrap(), "it was adopted");
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    let gone = node.usage(vm).await.unwrap_err();
    assert_eq!((gone.reason, gone.metadata["vm_id"].clone()), (Reason::VmNotFound, vm.to_string()));
    let nonsense = node.client.clone().get_vm_usage(pb::GetVmUsageRequest { vm_id: "7".to_owned() }).await;
    assert_eq!(Error::from(nonsense.unwrap_err()).reason, Reason::InvalidField);
}

#[tokio::test]
async fn a_node_registers_with_what_it_offers() {
    let world = World::new().await;
    world.set_down(true);
    let _node = world.node().await;
    world.set_down(false);
    let registered =
        wait_for("the node", || world.registry.state().nodes.get(support::NODE).cloned().ok_or("none")).await;
    assert_eq!((registered.driver.as_str(), registered.max_vms), ("process", 10));
    assert!(registered.vcpus >= 2 && registered.memory_mib > 0 && registered.endpoint.starts_with("http://127.0.0.1:"));
    assert_eq!(registered.images, ["default"]);
}
