//! Attempts of a job: which follow which, what is kept of each, and what a job is given and leaves. The arithmetic is tested on
//! the store of the simulation; here it goes through the log.

use std::time::{Duration, Instant};

use blixard::{
    error::Error,
    job::JobState,
    pb::{common::v1 as pb, registry::v1 as wire},
    vm::{VmKind, VmState},
};
use tonic::Status;

use crate::kit::{Kit, assign, create_job, finished, job_state, lost, refusal, spec, start_attempt, uuid, vm_state};

async fn attempts(kit: &mut Kit, job: &str) -> Vec<pb::Attempt> {
    let request = wire::ListAttemptsRequest { job_id: job.into() };
    kit.client.list_attempts(request).await.unwrap().into_inner().attempts
}

async fn input(kit: &mut Kit, job: &str) -> Option<pb::JobInput> {
    let request = wire::GetJobInputRequest { job_id: job.into() };
    kit.client.get_job_input(request).await.unwrap().into_inner().input
}

fn with_input(id: &str, stdin: &[u8]) -> wire::CreateJobRequest {
    let spec = pb::JobSpec { input_digest: vec![1; 32].into(), ..spec() };
    let input = pb::JobInput { stdin: stdin.to_vec().into(), ..Default::default() };
    wire::CreateJobRequest { job_id: id.into(), spec: Some(spec), input: Some(input), ..Default::default() }
}

fn field(status: &Status) -> String {
    Error::from_status(status).metadata.get("field").cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_tried_again_and_every_attempt_tells_what_it_came_to_and_why_it_got_its_vm() {
    let mut kit = Kit::start().await;
    let job = uuid();
    let retrying = pb::JobSpec {
        max_attempts: 3,
        retry_on: vec![pb::RetryOn::Failed.into(), pb::RetryOn::Lost.into()],
        backoff_ms: 60_000,
        max_backoff_ms: 90_000,
        ..spec()
    };
    let create = wire::CreateJobRequest { job_id: job.clone(), spec: Some(retrying), ..Default::default() };
    let created = kit.client.create_job(create).await.unwrap().into_inner().job.unwrap();
    assert_eq!((created.queued_at, created.not_before), (created.created_at, None));
    let vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let mut pauses = Vec::new();
    for attempt in 1..=3 {
        let decision = Some(pb::Decision { summary: format!("number {attempt}"), ..Default::default() });
        kit.client.assign_job(wire::AssignJobRequest { decision, ..assign(&job, &vm, attempt) }).await.unwrap();
        kit.client.start_attempt(start_attempt(&job, attempt)).await.unwrap();
        let report = if attempt == 2 { lost(&job, 2, true) } else { finished(&job, attempt, JobState::Failed) };
        let after = kit.client.finish_attempt(report.clone()).await.unwrap().into_inner().job.unwrap();
        assert_eq!(kit.client.finish_attempt(report).await.unwrap().into_inner().job.unwrap(), after);
        assert_eq!(vm_state(&kit.vm(&vm).await), VmState::Idle);
        let pause = after.not_before.map(|until| until.seconds - after.queued_at.unwrap().seconds);
        pauses.push((job_state(&after), pause, after.attempts_started));
    }
    let (queued, failed) = (JobState::Queued, JobState::Failed);
    assert_eq!(pauses, [(queued, Some(60), 1), (queued, Some(90), 2), (failed, None, 3)]);
    assert_eq!(kit.vm(&vm).await.jobs_assigned, 3);

    // The first one is heard of once more, twice.
    for _ in 0..2 {
        assert_eq!(refusal(kit.client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await), "STALE_ATTEMPT");
    }
    kit.restart().await;
    let shown: Vec<_> = attempts(&mut kit, &job)
        .await
        .into_iter()
        .map(|one| (one.state(), one.reported, one.decision.unwrap().summary, one.late_reports.len()))
        .collect();
    let expected = [
        (pb::JobState::Failed, true, "number 1".to_owned(), 1),
        (pb::JobState::Queued, false, "number 2".to_owned(), 0),
        (pb::JobState::Failed, true, "number 3".to_owned(), 0),
    ];
    assert_eq!(shown, expected);
    let nobody = wire::ListAttemptsRequest { job_id: uuid() };
    assert_eq!(refusal(kit.client.list_attempts(nobody).await), "JOB_NOT_FOUND");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_under_way_has_come_to_nothing_yet() {
    let mut kit = Kit::start().await;
    let (job, vm) = kit.assigned_job(VmKind::Service, 1).await;
    let shown = attempts(&mut kit, &job).await;
    assert_eq!(shown.len(), 1);
    assert_eq!(
        (shown[0].state(), shown[0].vm_id.as_str(), shown[0].attempt),
        (pb::JobState::Unspecified, vm.as_str(), 1)
    );
    let queued = kit.queued_job(1).await;
    assert_eq!(attempts(&mut kit, &queued).await, []);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_outlives_restarts_and_ends_with_its_job() {
    let mut kit = Kit::start().await;
    let job = uuid();
    let large = vec![0xA5; 512 << 10];
    kit.client.create_job(with_input(&job, &large)).await.unwrap();
    kit.restart().await;
    assert_eq!(input(&mut kit, &job).await.unwrap().stdin, large);
    let vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
    kit.client.assign_job(assign(&job, &vm, 1)).await.unwrap();
    kit.client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await.unwrap();
    assert_eq!(input(&mut kit, &job).await, None);
    assert_eq!(refusal(kit.client.get_job_input(wire::GetJobInputRequest { job_id: uuid() }).await), "JOB_NOT_FOUND");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_group_is_recorded_at_once_and_a_bad_one_not_at_all() {
    let mut kit = Kit::start().await;
    let group = uuid();
    let member = |bytes: usize| {
        let mut spec = pb::JobSpec { group_id: group.clone(), ..spec() };
        spec.command.push("x".repeat(bytes));
        wire::CreateJobRequest { job_id: uuid(), spec: Some(spec), ..Default::default() }
    };
    let mut jobs: Vec<_> = (0..1000).map(|_| member(850)).collect();
    jobs[500] = wire::CreateJobRequest {
        spec: Some(pb::JobSpec { group_id: group.clone(), ..with_input("", b"").spec.unwrap() }),
        input: with_input("", b"x").input,
        ..jobs[500].clone()
    };
    let request = wire::CreateJobsRequest { jobs: jobs.clone() };
    let created = kit.client.create_jobs(request.clone()).await.unwrap().into_inner().jobs;
    assert!(created.iter().map(|job| &job.id).eq(jobs.iter().map(|job| &job.job_id)));
    assert!(created.windows(2).all(|pair| pair[0].revision + 1 == pair[1].revision));
    assert_eq!(kit.client.create_jobs(request).await.unwrap().into_inner().jobs, created);
    assert_eq!(input(&mut kit, &jobs[500].job_id).await.unwrap().stdin, b"x"[..]);
    let list = wire::ListJobsRequest { group_id: group.clone(), page_size: 1000, ..Default::default() };
    assert_eq!(kit.client.list_jobs(list).await.unwrap().into_inner().jobs.len(), 1000);

    let before = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    let mut reused = create_job(&jobs[0].job_id);
    reused.spec.as_mut().unwrap().priority = 7;
    let nameless = wire::CreateJobRequest { job_id: "me".into(), ..member(0) };
    let too_much = (0..9).map(|_| member(200 << 10)).collect();
    for (jobs, at) in [
        (vec![member(0), reused], "jobs[1].job_id"),
        (vec![member(0), member(0), nameless], "jobs[2].job_id"),
        (too_much, "jobs"),
        (vec![], "jobs"),
    ] {
        let status = kit.client.create_jobs(wire::CreateJobsRequest { jobs }).await.unwrap_err();
        assert_eq!(field(&status), at, "{status:?}");
    }
    assert_eq!(kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner(), before);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_when_it_has_been_kept_as_long_as_it_asked() {
    let mut kit = Kit::start_with(|config| config.retention.look_every = Duration::from_millis(20)).await;
    let (short, long) = (uuid(), uuid());
    for (job, result_ttl_ms) in [(&short, 1), (&long, 3_600_000)] {
        let spec = Some(pb::JobSpec { result_ttl_ms, ..spec() });
        kit.client.create_job(wire::CreateJobRequest { spec, ..create_job(job) }).await.unwrap();
        let cancel = wire::CancelJobRequest { job_id: job.clone(), ..Default::default() };
        kit.client.cancel_job(cancel).await.unwrap();
    }
    let began = Instant::now();
    loop {
        let request = wire::FindForgottenJobsRequest { job_ids: vec![long.clone(), short.clone()] };
        let forgotten = kit.client.find_forgotten_jobs(request).await.unwrap().into_inner().job_ids;
        if forgotten == [short.clone()] {
            break;
        }
        assert_eq!(forgotten, [""; 0]);
        assert!(began.elapsed() < Duration::from_secs(30), "it is still there");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    kit.stop().await;
}
