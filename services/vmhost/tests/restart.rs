//! vmhost goes and comes back; its VMs stay. A crash here drops a vmhost's runtime in the middle of whatever it does; one
//! test kills the real program.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use blixard::{
    config::DriverChoice,
    id::{JobId, VmId},
    pb::{
        common::v1::{self as common, JobState, VmKind},
        vmhost::v1::{self as pb, vm_host_service_client::VmHostServiceClient},
    },
    vm::VmState,
};
use blixard_chassis::{Tasks, client};
use blixard_vmhost::VmHost;
use support::{Log, NODE, Node, World, command, kill, shell, vm_config, wait_for};

/// Prints numbered lines, waiting after each so many for the file `go` to grow by a line.
fn numbers(world: &World) -> common::JobSpec {
    let go = world.dir.path().join("go");
    fs::write(&go, "").unwrap();
    let script = r#"
        n=0; steps=0
        while [ $steps -lt 5 ]; do
            seq $((n + 1)) $((n + 20000)); n=$((n + 20000)); steps=$((steps + 1))
            while [ "$(wc -l < "$0")" -lt $steps ]; do sleep 0.01; done
        done"#;
    command(&["sh", "-c", script, go.to_str().unwrap()])
}

fn go(world: &World) {
    let path = world.dir.path().join("go");
    let lines = fs::read_to_string(&path).unwrap() + "go\n";
    fs::write(path, lines).unwrap();
}

fn all_numbers() -> Vec<u8> {
    (1..=100_000).map(|number| format!("{number}\n")).collect::<String>().into_bytes()
}

#[tokio::test]
async fn a_job_goes_on_through_crashes_of_vmhost_and_its_log_is_whole() {
    let world = World::new().await;
    let mut node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let job = world.run(&node, vm, numbers(&world)).await;
    let (mut read, mut received) = (0, Vec::new());
    for step in 0..5u64 {
        let mut log = Log::default();
        log.read(&node, job, read, 10_000 + step * 1000).await.unwrap();
        read += log.bytes;
        received.extend(log.stdout);
        node.crash().await;
        go(&world);
        node = world.node().await;
    }
    received.extend(node.follow(job, read).await.stdout);
    assert!(received == all_numbers(), "nothing lost, nothing twice");
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
    let lines = world.history();
    assert_eq!(lines.iter().filter(|line| line.starts_with("attempt")).count(), 2, "{lines:?}");
}

#[tokio::test]
async fn an_orderly_end_leaves_vms_running_and_the_next_start_adopts_them() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let pids = node.hosted().await.remove(0).pids;
    node.shut_down().await;
    assert_eq!(world.processes(), pids, "the machine lives");
    let node = world.node().await;
    let hosted = node.hosted().await.remove(0);
    assert_eq!((hosted.state(), hosted.pids), (common::VmState::Ready, pids));
    let job = world.run(&node, vm, command(&["echo", "still here"])).await;
    assert_eq!(node.follow(job, 0).await.stdout, b"still here\n");
    world.wait_vm(vm, VmState::Idle).await;
    node.stop_vm(vm, None).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_died_meanwhile_is_reported_with_its_job() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = world.run(&node, vm, shell("echo up; sleep 600")).await;
    let mut log = Log::default();
    log.read(&node, job, 0, 3).await.unwrap();
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    node.crash().await;
    world.processes().into_iter().for_each(kill);
    let node = world.node().await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Queued);
    assert!(world.history().contains(&"attempt 1 lost, started true".to_owned()));
    let failed = world.wait_vm(vm, VmState::Failed).await;
    assert!(failed.reason.contains("while vmhost was down"), "{}", failed.reason);
    let log = node.follow(job, 0).await;
    assert_eq!(log.stdout, b"up\n");
    assert!(log.end.unwrap().reason.contains("while vmhost was down"));
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_result_that_could_not_be_reported_is_reported_by_the_next_vmhost() {
    for kind in [VmKind::Service, VmKind::Ephemeral] {
        let world = World::new().await;
        let node = world.node().await;
        let vm = world.start_vm(&node, kind).await;
        let spec = shell("echo done; exit 3");
        let job = JobId::random();
        world.assign(vm, job, 1, &spec);
        world.set_down(true);
        node.run_job(vm, job, 1, spec).await.unwrap();
        assert!(node.follow(job, 0).await.end.is_some());
        node.crash().await;
        if kind == VmKind::Ephemeral {
            // Its guest was told to end, or would have been: that vmhost did not see it makes it no failure.
            world.processes().into_iter().for_each(kill);
        }
        world.set_down(false);
        let node = world.node().await;
        let job = world.wait_job(job).await;
        assert_eq!((job.state(), job.exit.and_then(|exit| exit.exit_code)), (JobState::Failed, Some(3)));
        if kind == VmKind::Service {
            world.wait_vm(vm, VmState::Idle).await;
            node.stop_vm(vm, Some(0)).await.unwrap();
        }
        world.wait_vm(vm, VmState::Terminated).await;
        world.assert_nothing_left().await;
    }
}

#[tokio::test]
async fn a_timeout_a_cancel_and_a_stop_hold_across_a_crash() {
    let world = World::new().await;
    let mut node = world.node().await;
    let stubborn = r#"trap "" TERM; echo up; while :; do sleep 0.05; done"#;
    let limited = common::JobSpec { timeout_ms: 500, ..command(&["sleep", "600"]) };
    let mut jobs = Vec::new();
    for spec in [limited, command(&["sleep", "600"]), shell(stubborn)] {
        let vm = world.start_vm(&node, VmKind::Service).await;
        let job = world.run(&node, vm, spec).await;
        world.wait_job_until(job, |job| job.state() != JobState::Assigned).await;
        jobs.push((vm, job));
    }
    let mut log = Log::default();
    log.read(&node, jobs[2].1, 0, 3).await.unwrap();
    node.cancel(jobs[1].1, 1).await.unwrap();
    node.stop_vm(jobs[2].0, Some(1000)).await.unwrap();
    node.crash().await;
    node = world.node().await;
    assert_eq!(world.wait_job(jobs[0].1).await.state(), JobState::TimedOut);
    assert_eq!(world.wait_job(jobs[1].1).await.state(), JobState::Cancelled);
    assert_eq!(world.wait_job(jobs[2].1).await.state(), JobState::Queued);
    world.wait_vm(jobs[2].0, VmState::Terminated).await;
    for (vm, _) in &jobs[..2] {
        node.stop_vm(*vm, Some(0)).await.unwrap();
        world.wait_vm(*vm, VmState::Terminated).await;
    }
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_never_became_ready_is_ended_and_started_again_when_asked() {
    let mut world = World::new().await;
    let agent = std::mem::replace(&mut world.agent, ["/bin/sh", "-c", "sleep 600", "agent"].map(Into::into).to_vec());
    let node = world.node().await;
    let vm = VmId::random();
    world.record_vm(vm, VmKind::Service, VmState::Starting);
    let start = pb::StartVmRequest { vm_id: vm.to_string(), config: Some(vm_config(VmKind::Service)) };
    node.client.clone().start_vm(start.clone()).await.unwrap();
    wait_for("the machine", || if world.processes().is_empty() { Err("none") } else { Ok(()) }).await;
    node.crash().await;

    world.agent = agent;
    let node = world.node().await;
    world.assert_nothing_left().await;
    node.client.clone().start_vm(start).await.unwrap();
    world.wait_vm(vm, VmState::Ready).await;
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn registry_and_node_agree_again_about_vms_that_only_one_of_them_knows() {
    let world = World::new().await;
    let node = world.node().await;
    let forgotten = world.start_vm(&node, VmKind::Service).await;
    node.crash().await;
    // The registry took it for dead; and it has two VMs that this node never heard of.
    world.registry.state().move_vm(&forgotten.to_string(), VmState::Failed, "lost").unwrap();
    let (busy, draining, job) = (VmId::random(), VmId::random(), JobId::random());
    world.record_vm(busy, VmKind::Service, VmState::Ready);
    world.assign(busy, job, 1, &command(&["true"]));
    world.record_vm(draining, VmKind::Service, VmState::Draining);
    let _node = world.node().await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Queued);
    world.wait_vm(busy, VmState::Failed).await;
    world.wait_vm(draining, VmState::Terminated).await;
    world.assert_nothing_left().await;
    let incarnation = || world.registry.state().nodes.get(NODE).map_or(0, |node| node.incarnation);
    wait_for("the second registration", || if incarnation() == 2 { Ok(()) } else { Err("not yet") }).await;
}

#[tokio::test]
async fn a_node_says_that_it_lives_and_registers_again_when_it_was_given_up() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let heard = || world.registry.state().heartbeats;
    wait_for("heartbeats", || if heard() > 3 { Ok(()) } else { Err(heard()) }).await;

    // An interruption is none: the same incarnation goes on.
    world.registry.state().down = true;
    let missed = || world.registry.state().heartbeats_missed;
    wait_for("new tries", || if missed() > 1 { Ok(()) } else { Err(missed()) }).await;
    world.registry.state().down = false;
    let before = heard();
    wait_for("heartbeats again", || if heard() > before + 3 { Ok(()) } else { Err(heard()) }).await;
    let incarnation = || world.registry.state().nodes[NODE].incarnation;
    assert_eq!(incarnation(), 1);

    // Lost: it comes back as another incarnation, and its VM has lived on.
    world.registry.state().nodes.get_mut(NODE).unwrap().set_state(common::NodeState::Lost);
    wait_for("the second registration", || if incarnation() == 2 { Ok(()) } else { Err(incarnation()) }).await;
    let before = heard();
    wait_for("its heartbeats", || if heard() > before + 3 { Ok(()) } else { Err(heard()) }).await;
    world.wait_vm(vm, VmState::Ready).await;
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
}

#[tokio::test]
async fn a_state_directory_in_use_is_refused_with_the_process_that_has_it() {
    let world = World::new().await;
    let _node = world.node().await;
    let second = VmHost::start(world.config("http://127.0.0.1:1".to_owned()), &Tasks::new()).await;
    let error = second.err().expect("refused").to_string();
    assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
}

#[tokio::test]
async fn damaged_records_are_cleared_away_and_reported() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    node.crash().await;
    fs::write(world.vm_state_dir().join(vm.to_string()).join("vm.json"), "{\"half").unwrap();
    fs::create_dir_all(world.vm_state_dir().join(VmId::random().to_string()).join("machine")).unwrap();
    let _node = world.node().await;
    world.wait_vm(vm, VmState::Failed).await;
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_can_not_be_written_down_is_refused_with_the_cause() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = VmId::random();
    fs::write(world.vm_state_dir().join(vm.to_string()), "in the way").unwrap();
    let start = pb::StartVmRequest { vm_id: vm.to_string(), config: Some(vm_config(VmKind::Service)) };
    let error = node.client.clone().start_vm(start).await.unwrap_err();
    assert!(error.message().contains("a VM could not be written down on its node: Not a directory"), "{error}");
    assert_eq!(node.hosted().await, []);
    fs::remove_file(world.vm_state_dir().join(vm.to_string())).unwrap();
    world.assert_nothing_left().await;
}

#[tokio::test]
async fn a_vm_is_stopped_though_its_end_can_not_be_written_down() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    // What a record is first written to can't be.
    let beside = world.vm_state_dir().join(vm.to_string()).join("vm.tmp");
    fs::create_dir(&beside).unwrap();
    node.stop_vm(vm, Some(0)).await.unwrap();
    world.wait_vm(vm, VmState::Terminated).await;
    world.assert_nothing_left().await;
}

/// The program itself.
struct Program {
    child: Child,
    node: Node,
}

impl Program {
    fn start(world: &World) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmhost"))
            .args(["--driver", "process", "--listen", "127.0.0.1:0", "--node-id", NODE])
            .arg("--registry")
            .arg(&world.registry_endpoint)
            .arg("--vm-state-dir")
            .arg(world.vm_state_dir())
            .arg("--data-dir")
            .arg(world.dir.path().join("data"))
            .arg("--agent")
            .arg(&world.agent[0])
            .env("RUST_LOG", "info")
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let serves = lines.by_ref().map(|line| line.unwrap()).find(|line| line.contains("vmhost serves"));
        let line = serves.expect("it says where it serves");
        let address: String = line
            .split("127.0.0.1:")
            .nth(1)
            .map(|port| port.chars().take_while(char::is_ascii_digit).collect())
            .expect("an address");
        // Somebody has to read on, or the program would block.
        std::thread::spawn(move || lines.for_each(drop));
        let channel = client::channel(&format!("http://127.0.0.1:{address}")).unwrap();
        Self { child, node: Node::remote(VmHostServiceClient::new(channel)) }
    }

    fn kill_9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn the_program_killed_with_kill_9_goes_on_where_it_was() {
    let world = World::new().await;
    let mut program = Program::start(&world);
    let (vm, job) = (VmId::random(), JobId::random());
    world.record_vm(vm, VmKind::Ephemeral, VmState::Starting);
    let start = pb::StartVmRequest { vm_id: vm.to_string(), config: Some(vm_config(VmKind::Ephemeral)) };
    program.node.client.start_vm(start).await.unwrap();
    world.wait_vm(vm, VmState::Ready).await;
    let spec = numbers(&world);
    world.assign(vm, job, 1, &spec);
    program.node.run_job(vm, job, 1, spec).await.unwrap();
    for step in 0..5u64 {
        // Another place in the output each time.
        Log::default().read(&program.node, job, 0, step * 115_000).await.unwrap();
        program.kill_9();
        go(&world);
        program = Program::start(&world);
    }
    let received = program.node.follow(job, 0).await.stdout;
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    assert_eq!(world.wait_vm(vm, VmState::Terminated).await.reason, "its job has ended");
    assert!(received == all_numbers(), "nothing lost, nothing twice");
    world.assert_nothing_left().await;
    drop(program);
}

#[tokio::test]
async fn the_driver_that_is_chosen_by_name_is_the_one_that_runs() {
    let world = World::new().await;
    let tasks = Tasks::new();
    let config = world.config("http://127.0.0.1:1".to_owned());
    assert_eq!(config.driver, DriverChoice::Process);
    VmHost::start(config, &tasks).await.expect("the process driver needs nothing");
    assert!(tasks.shutdown(support::SOON).await);
}
