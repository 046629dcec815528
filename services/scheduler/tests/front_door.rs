//! The front door over real gRPC, between a registry and a vmhost that do as the test says.

mod support;

use std::collections::BTreeMap;

use blixard::{
    error::{Error, Reason},
    job::JobState,
    pb::{
        common::v1 as common,
        scheduler::v1::{self as pb, run_job_response::Event, stream_job_logs_response::Record},
    },
};
use blixard_chassis::secrets::SecretKey;
use support::{NODE, World, wait_for};
use tonic::{Status, Streaming};
use uuid::Uuid;

/// Bytes in which every place looks different.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64 / 8 + 1).flat_map(|at| (at * 0x9e37_79b9).to_be_bytes()).take(length).collect()
}

fn spec() -> common::JobSpec {
    common::JobSpec { command: vec!["true".into()], ..Default::default() }
}

async fn submit(world: &World) -> String {
    let request = pb::SubmitJobRequest { spec: Some(spec()), ..Default::default() };
    let answer = world.scheduler.clone().submit_job(request).await.expect("submitted");
    answer.into_inner().job.expect("a job").id
}

async fn follow(world: &World, job_id: &str, offset: u64) -> Streaming<pb::StreamJobLogsResponse> {
    let request = pb::StreamJobLogsRequest { job_id: job_id.into(), attempt: 0, offset, follow: true };
    world.scheduler.clone().stream_job_logs(request).await.expect("followed").into_inner()
}

/// Reads a log to its end; every byte must come at its offset.
async fn read(mut records: Streaming<pb::StreamJobLogsResponse>, from: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(response) = records.message().await.expect("a record") {
        match response.record.expect("a record") {
            Record::Chunk(chunk) => {
                assert_eq!(chunk.offset, from + bytes.len() as u64, "nothing lost, nothing twice");
                bytes.extend_from_slice(&chunk.data);
            }
            Record::Gap(gap) => panic!("{gap:?}"),
            Record::End(end) => assert_eq!(end.end_offset, from + bytes.len() as u64),
            Record::Heartbeat(_) => {}
        }
    }
    bytes
}

async fn read_from(records: Streaming<pb::StreamJobLogsResponse>, from: usize) -> (usize, Vec<u8>) {
    (from, read(records, from as u64).await)
}

fn reason(result: Result<impl std::fmt::Debug, Status>) -> Reason {
    Error::from_status(&result.expect_err("refused")).reason
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_followers_of_a_live_log_cost_one_read_of_it() {
    const FOLLOWERS: usize = 1000;
    let world = World::start().await;
    let job_id = submit(&world).await;
    world.registry.run(&job_id);
    let expected = pattern(100_000);
    world.vmhost.held().chunk = 1000;
    world.vmhost.write(&expected[..10_000]);

    let mut followers = tokio::task::JoinSet::new();
    for _ in 0..FOLLOWERS {
        let records = follow(&world, &job_id, 0).await;
        followers.spawn(read(records, 0));
    }
    for part in expected[10_000..].chunks(10_000) {
        world.vmhost.write(part);
        tokio::task::yield_now().await;
    }
    world.vmhost.end();
    world.registry.finish(&job_id, JobState::Succeeded, expected.len() as u64);
    let mut read = 0;
    while let Some(bytes) = followers.join_next().await {
        assert!(bytes.expect("a follower") == expected, "byte for byte");
        read += 1;
    }
    assert_eq!(read, FOLLOWERS);
    assert_eq!(world.vmhost.held().opened, [0], "one read of the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_who_does_not_read_holds_up_nobody_and_loses_nothing() {
    let world = World::start().await;
    let job_id = submit(&world).await;
    world.registry.run(&job_id);
    // Four times what the hub keeps.
    let expected = pattern(32 * 1024 * 1024);
    let slow = follow(&world, &job_id, 0).await;
    let fast = follow(&world, &job_id, 0).await;
    world.vmhost.write(&expected);
    world.vmhost.end();
    world.registry.finish(&job_id, JobState::Succeeded, expected.len() as u64);
    assert!(read(fast, 0).await == expected, "the fast one has all of it while the slow one has read nothing");
    assert!(read(slow, 0).await == expected, "the slow one has all of it in the end");
    let opened = world.vmhost.held().opened.clone();
    assert_eq!(opened.len(), 2, "one together, one alone from where it was left behind: {opened:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmhost_that_breaks_off_is_asked_again_where_it_stopped_and_late_followers_have_their_offset() {
    let world = World::start().await;
    let job_id = submit(&world).await;
    world.registry.run(&job_id);
    let expected = pattern(1_000_000);
    {
        let mut held = world.vmhost.held();
        (held.chunk, held.breaks_after) = (10_000, Some(300_000));
    }
    world.vmhost.write(&expected[..600_000]);
    let mut followers = tokio::task::JoinSet::new();
    for _ in 0..2 {
        followers.spawn(read_from(follow(&world, &job_id, 0).await, 0));
    }
    wait_for("the second stream", || async { world.vmhost.held().opened.len() > 1 }).await;
    followers.spawn(read_from(follow(&world, &job_id, 123_456).await, 123_456));
    world.vmhost.write(&expected[600_000..]);
    world.vmhost.end();
    world.registry.finish(&job_id, JobState::Succeeded, expected.len() as u64);
    while let Some(follower) = followers.join_next().await {
        let (from, bytes) = follower.expect("a follower");
        assert!(bytes == expected[from..], "byte for byte from {from}");
    }
    assert!(world.vmhost.held().opened.contains(&300_000), "{:?}", world.vmhost.held().opened);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_job_tells_the_job_its_output_and_its_end_in_this_order() {
    let world = World::start().await;
    let request_id = Uuid::new_v4().to_string();
    let request = pb::RunJobRequest { request_id: request_id.clone(), spec: Some(spec()), input: None };
    let mut events = world.scheduler.clone().run_job(request).await.expect("begun").into_inner();
    let first = events.message().await.expect("an event").expect("an event");
    let Some(Event::Job(change)) = first.event else { panic!("{first:?}") };
    let job = change.job.expect("a job");
    assert_eq!((job.id.as_str(), job.state()), (request_id.as_str(), common::JobState::Queued));

    world.registry.run(&request_id);
    world.vmhost.write(b"hello");
    // The registry knows of the end before the log does.
    world.registry.finish(&request_id, JobState::Succeeded, 11);
    world.vmhost.write(b" world");
    world.vmhost.end();
    let (mut output, mut last) = (Vec::new(), None);
    while let Some(event) = events.message().await.expect("an event") {
        assert!(last.is_none(), "nothing comes after the end");
        match event.event.expect("an event") {
            Event::Log(pb::StreamJobLogsResponse { record: Some(Record::Chunk(chunk)), .. }) => {
                output.extend_from_slice(&chunk.data);
            }
            Event::Log(_) => {}
            Event::Job(change) => {
                let job = change.job.expect("a job");
                last = (job.state() == common::JobState::Succeeded).then_some(job);
            }
        }
    }
    assert_eq!(output, b"hello world");
    assert_eq!(last.expect("the job as it ended").log_bytes, 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_full_refuses_new_jobs_and_repeats_old_answers() {
    let world = World::start_with(|config| config.settings.max_queued_jobs = 2).await;
    let request_id = Uuid::new_v4().to_string();
    let first = pb::SubmitJobRequest { request_id, spec: Some(spec()), input: None };
    world.scheduler.clone().submit_job(first.clone()).await.expect("room");
    submit(&world).await;
    let another = || pb::SubmitJobRequest { spec: Some(spec()), ..Default::default() };
    wait_for("the queue to be full", || async { world.scheduler.clone().submit_job(another()).await.is_err() }).await;
    let refused = world.scheduler.clone().submit_job(another()).await.expect_err("full");
    assert!(tonic_types::StatusExt::get_details_retry_info(&refused).is_some(), "{refused:?}");
    assert_eq!(reason(world.scheduler.clone().submit_job(another()).await), Reason::Overloaded);
    let again = world.scheduler.clone().submit_job(first.clone()).await.expect("the first answer");
    assert_eq!(again.into_inner().job.expect("a job").id, first.request_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_recorded_in_one_call_and_its_secrets_are_not() {
    let world = World::start_with(|config| config.secret_key = SecretKey::from_bytes(&[7; 32])).await;
    let secrets = BTreeMap::from([("TOKEN".to_owned(), "hunter22".to_owned())]);
    let input = common::JobInput { secrets, ..Default::default() };
    let test = pb::GroupJob {
        name: "test".into(),
        spec: Some(spec()),
        input: Some(input),
        array_first: 1,
        array_last: 3,
        ..Default::default()
    };
    let dependency = pb::GroupDependency { name: "test".into(), condition: 0 };
    let report =
        pb::GroupJob { name: "report".into(), spec: Some(spec()), depends_on: vec![dependency], ..Default::default() };
    let request_id = Uuid::new_v4().to_string();
    let request = pb::SubmitJobGroupRequest { request_id: request_id.clone(), jobs: vec![test, report] };
    let answer = world.scheduler.clone().submit_job_group(request.clone()).await.expect("recorded").into_inner();
    assert_eq!((answer.group_id.as_str(), answer.jobs.len()), (request_id.as_str(), 4));
    let again = world.scheduler.clone().submit_job_group(request).await.expect("recorded").into_inner();
    assert_eq!(answer, again);
    let list = pb::ListJobsRequest { group_id: request_id, ..Default::default() };
    let listed = world.scheduler.clone().list_jobs(list).await.expect("listed").into_inner();
    assert_eq!(listed.jobs.len(), 4);
    let recorded = world.registry.recorded();
    assert_eq!(recorded.inputs.len(), 3);
    let key = SecretKey::from_bytes(&[7; 32]).expect("a key");
    for (job_id, input) in &recorded.inputs {
        assert!(input.secrets.is_empty());
        let job_id = job_id.parse().expect("an id");
        assert_eq!(key.open(job_id, "TOKEN", &input.sealed_secrets["TOKEN"]).as_deref(), Ok("hunter22"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_and_a_finished_job_are_explained_and_their_files_fetched() {
    let world = World::start().await;
    let job_id = submit(&world).await;
    let explain = || pb::ExplainJobRequest { job_id: job_id.clone() };
    let get = |attempt: u32, path: &str| pb::GetArtifactRequest {
        job_id: job_id.clone(),
        attempt,
        path: path.into(),
        offset: 100_000,
    };
    wait_for("the decision", || async {
        let answer = world.scheduler.clone().explain_job(explain()).await.expect("explained").into_inner();
        answer.waiting.is_some()
    })
    .await;
    assert_eq!(reason(world.scheduler.clone().get_artifact(get(0, "/out/1")).await), Reason::ArtifactNotFound);

    world.registry.run(&job_id);
    world.registry.run(&job_id);
    let first = common::Attempt { attempt: 1, node_id: NODE.into(), ..Default::default() };
    world.registry.recorded().attempts.push(first);
    world.registry.finish(&job_id, JobState::Failed, 0);
    let answer = world.scheduler.clone().explain_job(explain()).await.expect("explained").into_inner();
    assert_eq!((answer.waiting, answer.attempts.len()), (None, 1));

    world.vmhost.held().artifact = pattern(300_000);
    for (attempt, path) in [(0, "/out/2"), (1, "/out/1")] {
        let list = pb::ListArtifactsRequest { job_id: job_id.clone(), attempt };
        let listed = world.scheduler.clone().list_artifacts(list).await.expect("listed").into_inner();
        assert_eq!(listed.artifacts[0].path, path);
        let mut parts = world.scheduler.clone().get_artifact(get(attempt, path)).await.expect("found").into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = parts.message().await.expect("a part") {
            bytes.extend_from_slice(&part.data);
        }
        assert!(bytes == pattern(300_000)[100_000..], "byte for byte");
    }
    assert_eq!(reason(world.scheduler.clone().get_artifact(get(0, "/etc/passwd")).await), Reason::ArtifactNotFound);
    assert_eq!(reason(world.scheduler.clone().get_artifact(get(3, "/out/3")).await), Reason::ArtifactNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_listed_cordoned_drained_and_put_back() {
    let world = World::start().await;
    let listed = world.scheduler.clone().list_nodes(pb::ListNodesRequest::default()).await.expect("listed");
    assert_eq!(listed.into_inner().nodes[0].node.as_ref().expect("a node").id, NODE);
    let cordon = pb::CordonNodeRequest { node_id: NODE.into(), reason: "disk".into() };
    let node = world.scheduler.clone().cordon_node(cordon).await.expect("cordoned").into_inner().node.expect("a node");
    assert_eq!((node.state(), node.reason.as_str()), (common::NodeState::Cordoned, "disk"));
    let drain = |ms| pb::DrainNodeRequest { node_id: NODE.into(), reason: String::new(), deadline_ms: Some(ms) };
    let node =
        world.scheduler.clone().drain_node(drain(60_000)).await.expect("drains").into_inner().node.expect("a node");
    let deadline = blixard::time::Timestamp::from(node.drain_deadline.expect("a deadline"));
    let left = deadline.since(blixard::time::Timestamp::now()).as_secs();
    assert!((50..=60).contains(&left), "{left} s");
    assert_eq!(reason(world.scheduler.clone().drain_node(drain(u64::MAX)).await), Reason::InvalidField);
    let back = pb::UncordonNodeRequest { node_id: NODE.into() };
    let node = world.scheduler.clone().uncordon_node(back).await.expect("back").into_inner().node.expect("a node");
    assert_eq!((node.state(), node.drain_deadline), (common::NodeState::Ready, None));
    let nobody = pb::UncordonNodeRequest { node_id: "node-9".into() };
    assert_eq!(reason(world.scheduler.clone().uncordon_node(nobody).await), Reason::NodeNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resize_goes_to_the_node_as_it_was_asked_for_and_its_refusals_come_back() {
    let world = World::start().await;
    let config = common::VmConfig {
        kind: common::VmKind::Service.into(),
        vcpus: Some(2),
        memory_mib: Some(512),
        ..Default::default()
    };
    let id = Uuid::new_v4().to_string();
    let vm = common::Vm {
        id: id.clone(),
        config: Some(config),
        state: common::VmState::Idle.into(),
        node_id: NODE.into(),
        ..Default::default()
    };
    world.registry.recorded().vm = Some(vm);
    let resize = |vcpus, memory_mib| pb::ResizeVmRequest { vm_id: id.clone(), vcpus, memory_mib };
    let ask = async |request| world.scheduler.clone().resize_vm(request).await;

    let answer = ask(resize(Some(4), None)).await.expect("resized").into_inner().vm.expect("a VM");
    assert_eq!(answer.config.expect("a config").vcpus, Some(4));
    ask(resize(None, Some(640))).await.expect("resized");
    let resized: Vec<_> = world.vmhost.held().resized.iter().map(|asked| (asked.vcpus, asked.memory_mib)).collect();
    assert_eq!(resized, [(Some(4), None), (None, Some(640))]);

    let refused = Error::from_status(&ask(resize(Some(9), None)).await.expect_err("the node refuses"));
    assert_eq!((refused.reason, refused.metadata["field"].as_str()), (Reason::InvalidField, "vcpus"));
    assert_eq!(reason(ask(resize(None, None)).await), Reason::InvalidField);
    assert_eq!(reason(ask(resize(Some(65), None)).await), Reason::InvalidField);
    assert_eq!(reason(ask(resize(None, Some(95))).await), Reason::InvalidField);
    let other = pb::ResizeVmRequest { vm_id: Uuid::new_v4().to_string(), ..resize(Some(1), None) };
    assert_eq!(reason(ask(other).await), Reason::VmNotFound);
    world.registry.recorded().vm.as_mut().expect("a VM").state = common::VmState::Draining.into();
    assert_eq!(reason(ask(resize(Some(4), None)).await), Reason::VmNotAccepting);
    assert_eq!(world.vmhost.held().resized.len(), 2);
}
