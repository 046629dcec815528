//! What goes into an attempt besides its spec, and the files that come out of it.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{
    config::DriverChoice,
    error::{Error, Reason},
    id::{JobId, VmId},
    pb::{
        common::v1::{self as common, JobState, VmKind},
        vmhost::v1::{self as pb, stream_logs_response::Record},
    },
    vm::VmState,
};
use blixard_chassis::SecretKey;
use blixard_vmhost::{LogLimits, NodeLogs, hypervisor::choose};
use sha2::{Digest, Sha256};
use support::{Node, World, command, faulty::Faulty, shell, wait_for};

fn noise(bytes: usize) -> Vec<u8> {
    (0..u32::try_from(bytes).unwrap()).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Records a job with input as the front door does, and has it run.
async fn run_with(world: &World, node: &Node, vm: VmId, spec: common::JobSpec, input: common::JobInput) -> JobId {
    let job = JobId::random();
    let spec = assign_with(world, vm, job, spec, input);
    node.run_job(vm, job, 1, spec).await.unwrap();
    job
}

fn assign_with(
    world: &World,
    vm: VmId,
    job: JobId,
    spec: common::JobSpec,
    mut input: common::JobInput,
) -> common::JobSpec {
    let key = SecretKey::from_bytes(&[7; 32]).unwrap();
    for (name, value) in std::mem::take(&mut input.secrets) {
        input.sealed_secrets.insert(name.clone(), key.seal(job, &name, &value).into());
    }
    let spec = common::JobSpec { input_digest: vec![1; 32].into(), ..spec };
    world.registry.state().inputs.insert(job.to_string(), input);
    world.assign(vm, job, 1, &spec);
    spec
}

fn secret() -> common::JobInput {
    common::JobInput { secrets: [("TOKEN".to_owned(), "hunter2".to_owned())].into(), ..Default::default() }
}

async fn list(node: &Node, job: JobId) -> Result<Vec<common::Artifact>, Error> {
    let request = pb::ListArtifactsRequest { job_id: job.to_string(), attempt: 1 };
    Ok(node.client.clone().list_artifacts(request).await?.into_inner().artifacts)
}

async fn get(node: &Node, job: JobId, path: &str, offset: u64) -> Result<(common::Artifact, Vec<u8>), Error> {
    let request = pb::GetArtifactRequest { job_id: job.to_string(), attempt: 1, path: path.to_owned(), offset };
    let mut parts = node.client.clone().get_artifact(request).await?.into_inner();
    let first = parts.message().await?.expect("a first part");
    let (artifact, mut bytes) = (first.artifact.expect("the file"), first.data.to_vec());
    while let Some(part) = parts.message().await? {
        assert!(part.artifact.is_none() && (1..=65_536).contains(&part.data.len()));
        bytes.extend_from_slice(&part.data);
    }
    Ok((artifact, bytes))
}

#[tokio::test]
async fn stdin_files_and_secrets_reach_the_command_and_no_secret_reaches_the_disk() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let (stdin, file) = (noise(100_000), world.dir.path().join("new/input"));
    let files =
        vec![common::InputFile { path: file.to_str().unwrap().to_owned(), content: noise(777).into(), mode: 0o600 }];
    let input = common::JobInput { stdin: stdin.clone().into(), files, ..secret() };
    let script = format!("cat; echo; echo \"the token is $TOKEN\"; stat -c %a {}", file.display());
    let job = run_with(&world, &node, vm, shell(&script), input).await;
    let log = node.follow(job, 0).await;
    assert!(log.stdout == [&stdin[..], b"\nthe token is ***\n600\n"].concat(), "byte for byte, and redacted");
    assert!(fs::read(&file).unwrap() == noise(777));
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);

    let found =
        std::process::Command::new("grep").args(["-r", "-l", "hunter2"]).arg(world.dir.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
}

#[tokio::test]
async fn secrets_that_can_not_be_opened_fail_the_job_and_say_why() {
    let mut world = World::new().await;
    for (key, expected) in [
        (None, "its node has no key to open secrets with (storage.secret_key_file)"),
        (SecretKey::from_bytes(&[8; 32]), "its node can't open the secret TOKEN: it was sealed with another key"),
    ] {
        world.secret_key = key;
        let node = world.node().await;
        let vm = world.start_vm(&node, VmKind::Service).await;
        let job = run_with(&world, &node, vm, command(&["true"]), secret()).await;
        let job = world.wait_job(job).await;
        assert_eq!(job.state(), JobState::Failed);
        assert!(job.reason.starts_with(expected), "{}", job.reason);
        world.wait_vm(vm, VmState::Idle).await;
        node.shut_down().await;
    }
}

#[tokio::test]
async fn an_input_that_is_gone_costs_no_attempt() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let job = run_with(&world, &node, vm, command(&["true"]), common::JobInput::default()).await;
    let job = world.wait_job(job).await;
    assert_eq!((job.state(), job.reason.as_str()), (JobState::Queued, "its input is gone: the job has ended"));
    assert!(world.history().contains(&"attempt 1 lost, started false".to_owned()));
    world.wait_vm(vm, VmState::Idle).await;
}

#[tokio::test]
async fn an_attempt_waits_for_its_input_until_it_is_late_to_start_or_cancelled() {
    let world = World::new().await;
    let node = world.node().await;
    let (late, cancelled, patient) = (
        world.start_vm(&node, VmKind::Service).await,
        world.start_vm(&node, VmKind::Service).await,
        world.start_vm(&node, VmKind::Service).await,
    );
    let held = || world.registry.state().heartbeats > 0;
    wait_for("a lease", || if held() { Ok(()) } else { Err("none") }).await;
    let jobs = [JobId::random(), JobId::random(), JobId::random()];
    let spec = common::JobSpec { start_timeout_ms: 400, ..command(&["echo", "ran"]) };
    let late_spec = assign_with(&world, late, jobs[0], spec, secret());
    let cancelled_spec = assign_with(&world, cancelled, jobs[1], command(&["echo", "ran"]), secret());
    let patient_spec = assign_with(&world, patient, jobs[2], command(&["echo", "ran"]), secret());
    world.set_down(true);
    node.run_job(late, jobs[0], 1, late_spec).await.unwrap();
    node.run_job(cancelled, jobs[1], 1, cancelled_spec).await.unwrap();
    node.run_job(patient, jobs[2], 1, patient_spec).await.unwrap();
    node.cancel(jobs[1], 1).await.unwrap();
    let log = node.follow(jobs[0], 0).await;
    assert_eq!((log.bytes, log.end.unwrap().reason.as_str()), (0, "it did not start within 400 ms"));
    assert_eq!(node.follow(jobs[1], 0).await.bytes, 0);
    world.set_down(false);
    let states = [
        world.wait_job(jobs[0]).await.state(),
        world.wait_job(jobs[1]).await.state(),
        world.wait_job(jobs[2]).await.state(),
    ];
    assert_eq!(states, [JobState::TimedOut, JobState::Cancelled, JobState::Succeeded]);
    assert_eq!(node.follow(jobs[2], 0).await.stdout, b"ran\n");
}

#[tokio::test]
async fn artifacts_are_kept_byte_for_byte_across_a_restart_and_what_is_not_there_is_told() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Ephemeral).await;
    let path = |name: &str| world.dir.path().join(name).to_str().unwrap().to_owned();
    let content = noise(1_000_001);
    fs::write(path("source"), &content).unwrap();
    let script =
        format!("cp {0} {1}; : > {2}; mkdir {3}; exit 3", path("source"), path("big"), path("empty"), path("dir"));
    let artifacts = [path("big"), path("no-such-file"), path("empty"), path("dir")];
    let spec = common::JobSpec { artifacts: artifacts.to_vec(), ..shell(&script) };
    let job = world.run(&node, vm, spec).await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Failed);
    world.wait_vm(vm, VmState::Terminated).await;
    node.crash().await;
    let node = world.node().await;

    let kept = list(&node, job).await.unwrap();
    let paths: Vec<_> = kept.iter().map(|artifact| artifact.path.clone()).collect();
    assert_eq!(paths, artifacts, "in the order of the spec");
    let problems: Vec<_> = kept.iter().map(|artifact| artifact.problem.as_str()).collect();
    assert_eq!(problems[..3], ["", "not there", ""]);
    assert!(problems[3].ends_with("not a regular file"), "{problems:?}");
    assert_eq!((kept[0].size_bytes, kept[2].size_bytes), (1_000_001, 0));
    assert_eq!(kept[0].sha256, Sha256::digest(&content).to_vec());
    for offset in [0, 1, 65_536, 1_000_001] {
        let (artifact, bytes) = get(&node, job, &path("big"), offset).await.unwrap();
        assert_eq!(artifact, kept[0]);
        assert!(bytes == content[usize::try_from(offset).unwrap()..], "from {offset}");
    }
    assert_eq!(get(&node, job, &path("empty"), 0).await.unwrap().1, b"");
    for (job, name, offset, reason) in [
        (job, "no-such-file", 0, Reason::ArtifactNotFound),
        (job, "source", 0, Reason::ArtifactNotFound),
        (job, "big", 1_000_002, Reason::OffsetBeyondEnd),
        (JobId::random(), "big", 0, Reason::ArtifactNotFound),
    ] {
        assert_eq!(get(&node, job, &path(name), offset).await.unwrap_err().reason, reason, "{name}");
    }
    assert_eq!(list(&node, JobId::random()).await.unwrap_err().reason, Reason::ArtifactNotFound);
}

#[tokio::test]
async fn artifacts_arrive_whole_over_connections_that_break() {
    let world = World::new().await;
    let inner = choose(DriverChoice::Process, &world.settings()).unwrap().0;
    let node = world.node_with(Arc::new(Faulty { inner, tasks: world.tasks.clone(), cut_after: 300_000 })).await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let path = world.dir.path().join("file").to_str().unwrap().to_owned();
    let content = noise(2_000_003);
    fs::write(&path, &content).unwrap();
    let spec = common::JobSpec { artifacts: vec![path.clone()], timeout_ms: 20_000, ..command(&["true"]) };
    let job = world.run(&node, vm, spec).await;
    let recorded = world.wait_job(job).await;
    assert_eq!(recorded.state(), JobState::Succeeded, "{}", recorded.reason);
    assert!(get(&node, job, &path, 0).await.unwrap().1 == content);
}

#[tokio::test]
async fn a_vmhost_that_dies_while_it_fetches_artifacts_fetches_them_again() {
    let world = World::new().await;
    let mut node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let path = world.dir.path().join("file").to_str().unwrap().to_owned();
    let content = noise(1_000_000);
    fs::write(&path, &content).unwrap();
    let go = world.dir.path().join("go");
    let script = format!("until [ -e {} ]; do sleep 0.01; done", go.display());
    let job = world.run(&node, vm, common::JobSpec { artifacts: vec![path.clone(); 40], ..shell(&script) }).await;
    world.wait_job_until(job, |job| job.state() == JobState::Running).await;
    fs::write(go, "").unwrap();
    let attempt = world.log_dir().join(job.to_string()).join("1");
    wait_for("some of the files", || if attempt.join("artifacts.new/5").exists() { Ok(()) } else { Err("none") }).await;
    node.crash().await;
    assert!(!attempt.join("artifacts").exists(), "it died in the middle");
    node = world.node().await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    let kept = list(&node, job).await.unwrap();
    assert!(kept.len() == 40 && kept.iter().all(|artifact| artifact.problem.is_empty()), "{kept:?}");
    assert!(get(&node, job, &path, 0).await.unwrap().1 == content);
    assert!(!attempt.join("artifacts.new").exists());
}

#[tokio::test]
async fn what_exceeds_the_room_for_artifacts_is_not_kept_and_the_rest_is() {
    let world = World::new().await;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let path = |name: &str| world.dir.path().join(name).to_str().unwrap().to_owned();
    // Holes: only their length counts.
    let script = format!("truncate -s 300M {}; echo small > {}", path("large"), path("small"));
    let spec = common::JobSpec { artifacts: vec![path("large"), path("small")], ..shell(&script) };
    let job = world.run(&node, vm, spec).await;
    assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
    let kept = list(&node, job).await.unwrap();
    assert!(kept[0].problem.starts_with("it has 314572800 bytes: of 268435456"), "{kept:?}");
    assert_eq!(get(&node, job, &path("small"), 0).await.unwrap().1, b"small\n");
}

#[tokio::test]
async fn what_the_registry_has_forgotten_is_deleted_and_nothing_while_it_is_away() {
    let mut world = World::new().await;
    let soon = Duration::from_millis(50);
    world.pace.first_cleaning_after = soon;
    world.pace.clean_every = soon;
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let artifact = world.dir.path().join("file").to_str().unwrap().to_owned();
    let spec = common::JobSpec { artifacts: vec![artifact.clone()], ..shell(&format!("echo x | tee {artifact}")) };
    let (mut jobs, mut dirs) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let job = world.run(&node, vm, spec.clone()).await;
        world.wait_job(job).await;
        world.wait_vm(vm, VmState::Idle).await;
        dirs.push(world.log_dir().join(job.to_string()));
        jobs.push(job);
    }
    let running = world.run(&node, vm, command(&["sleep", "600"])).await;
    world.wait_job_until(running, |job| job.state() == JobState::Running).await;
    world.set_down(true);
    {
        let mut state = world.registry.state();
        state.jobs.remove(&jobs[0].to_string());
        state.jobs.remove(&jobs[2].to_string());
        // Even what it does not know of is kept while it runs.
        state.jobs.remove(&running.to_string());
    }
    let missed = || world.registry.state().heartbeats_missed;
    let before = missed();
    wait_for("some rounds", || if missed() > before + 1 { Ok(()) } else { Err(missed()) }).await;
    assert!(dirs.iter().all(|dir| dir.exists()), "nothing is deleted unasked");
    world.set_down(false);
    wait_for("two to go", || if dirs[0].exists() || dirs[2].exists() { Err("still there") } else { Ok(()) }).await;
    assert_eq!(get(&node, jobs[1], &artifact, 0).await.unwrap().1, b"x\n");
    assert_eq!(node.follow(jobs[1], 0).await.stdout, b"x\n");
    assert!(world.log_dir().join(running.to_string()).exists());
    assert_eq!(list(&node, jobs[0]).await.unwrap_err().reason, Reason::ArtifactNotFound);
}

#[tokio::test]
async fn output_and_artifacts_of_the_oldest_attempts_make_room_and_say_so() {
    let mut world = World::new().await;
    world.logs = LogLimits { segment_bytes: 16 * 1024, attempt_bytes: 1 << 30, node: NodeLogs::Bytes(300_000) };
    world.pace.make_room_every = Duration::from_millis(10);
    let node = world.node().await;
    let vm = world.start_vm(&node, VmKind::Service).await;
    let artifact = world.dir.path().join("file").to_str().unwrap().to_owned();
    // 108,894 bytes of each: three are too many.
    let script = format!("seq 1 20000; head -c 40000 /dev/zero > {artifact}");
    let mut jobs = Vec::new();
    for _ in 0..3 {
        let spec = common::JobSpec { artifacts: vec![artifact.clone()], ..shell(&script) };
        let job = world.run(&node, vm, spec).await;
        assert_eq!(world.wait_job(job).await.state(), JobState::Succeeded);
        jobs.push(job);
    }
    let since = Instant::now();
    while list(&node, jobs[0]).await.unwrap()[0].problem.is_empty() {
        assert!(since.elapsed() < support::SOON, "nothing is dropped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let dropped = list(&node, jobs[0]).await.unwrap().remove(0);
    assert!(dropped.problem.contains("dropped") && dropped.size_bytes == 40_000, "{dropped:?}");
    let refused = get(&node, jobs[0], &artifact, 0).await.unwrap_err();
    assert!(refused.reason == Reason::ArtifactNotFound && refused.message.contains("dropped"), "{refused}");

    let request = pb::StreamLogsRequest { job_id: jobs[0].to_string(), attempt: 1, offset: 100, follow: true };
    let mut records = node.client.clone().stream_logs(request).await.unwrap().into_inner();
    let Some(Record::Gap(gap)) = records.message().await.unwrap().unwrap().record else { panic!("a gap") };
    let Some(Record::End(end)) = records.message().await.unwrap().unwrap().record else { panic!("the end") };
    assert_eq!((gap.from_offset, gap.to_offset, end.end_offset), (100, 108_894, 108_894));
    assert!(gap.reason.contains("dropped") && end.state() == JobState::Succeeded, "{gap:?} {end:?}");

    assert_eq!(get(&node, jobs[2], &artifact, 0).await.unwrap().1.len(), 40_000);
    assert_eq!(node.follow(jobs[2], 0).await.stdout.len(), 108_894);
}
