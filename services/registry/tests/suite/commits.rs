//! Group commit: everybody gets their own answer.

use std::{collections::BTreeSet, time::Duration};

use blixard::{
    job::JobState,
    pb::registry::v1::{self as wire, watch_response::Message},
    vm::{VmKind, VmState},
};
use hiqlite::rusqlite::Connection;

use crate::kit::{
    Kit, assign, create_job, create_vm, finished, job_state, refusal, start_attempt, transition, uuid, vm_state,
};

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_callers_at_once_each_get_their_own_answer() {
    let mut kit = Kit::start().await;
    let dead = kit.vm_in(VmKind::Service, VmState::Failed).await;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..200 {
        let (mut client, dead) = (kit.client.clone(), dead.clone());
        callers.spawn(async move {
            let id = uuid();
            match caller % 5 {
                0 => {
                    let vm = client.create_vm(create_vm(&id, VmKind::Service)).await.unwrap().into_inner().vm.unwrap();
                    assert_eq!(vm.id, id);
                }
                1 => {
                    let job = client.create_job(create_job(&id)).await.unwrap().into_inner().job.unwrap();
                    assert_eq!(job.id, id);
                }
                2 => assert_eq!(refusal(client.transition_vm(transition(&id, VmState::Ready)).await), "VM_NOT_FOUND"),
                3 => {
                    let answer = client.transition_vm(transition(&dead, VmState::Ready)).await;
                    assert_eq!(refusal(answer), "ILLEGAL_TRANSITION");
                }
                _ => assert_eq!(refusal(client.start_attempt(start_attempt(&id, 1)).await), "JOB_NOT_FOUND"),
            }
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_is_answered_as_it_is_read_later_and_so_is_a_repeat() {
    let mut kit = Kit::start().await;
    for kind in [VmKind::Ephemeral, VmKind::Service] {
        let mut request = create_vm(&uuid(), kind);
        request.config.as_mut().unwrap().labels = [("disk".to_owned(), "ssd".to_owned())].into();
        let made = kit.client.create_vm(request.clone()).await.unwrap().into_inner().vm.unwrap();
        assert_eq!(made, kit.vm(&request.vm_id).await);
        assert_eq!(made, kit.client.create_vm(request).await.unwrap().into_inner().vm.unwrap());
    }
    let mut request = create_job(&uuid());
    let spec = request.spec.as_mut().unwrap();
    spec.env = [("A".to_owned(), "ü".to_owned())].into();
    spec.labels = [("team".to_owned(), "x".to_owned())].into();
    (spec.priority, spec.max_attempts, spec.timeout_ms) = (-3, 5, 1234);
    let made = kit.client.create_job(request.clone()).await.unwrap().into_inner().job.unwrap();
    assert_eq!(made, kit.job(&request.job_id).await);
    assert_eq!(made, kit.client.create_job(request).await.unwrap().into_inner().job.unwrap());
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_change_that_the_database_refuses_does_not_spoil_its_neighbours() {
    let mut kit = Kit::start().await;
    // No mutation of ours can fail, so the database is made to refuse one.
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    let poison =
        "CREATE TRIGGER poison BEFORE INSERT ON jobs WHEN NEW.image = 'poison' BEGIN SELECT RAISE(ABORT, 'no'); END";
    database.execute_batch(poison).unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..60 {
        let mut client = kit.client.clone();
        callers.spawn(async move {
            let mut request = create_job(&uuid());
            if caller % 20 == 7 {
                request.spec.as_mut().unwrap().image = "poison".into();
                assert_eq!(refusal(client.create_job(request).await), "INTERNAL");
            } else {
                client.create_job(request).await.unwrap();
            }
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    assert_eq!((counts.jobs[0].count, counts.revision), (57, 57));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_race_for_one_row_get_consistent_answers() {
    let mut kit = Kit::start().await;
    let vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let job = kit.queued_job(1).await;
        let (mut client, vm) = (kit.client.clone(), vm.clone());
        callers.spawn(async move {
            match client.assign_job(assign(&job, &vm, 1)).await {
                Ok(_) => Some(job),
                Err(status) => {
                    assert_eq!(refusal::<()>(Err(status)), "VM_NOT_ACCEPTING");
                    None
                }
            }
        });
    }
    let mut winners = Vec::new();
    while let Some(answer) = callers.join_next().await {
        winners.extend(answer.unwrap());
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(kit.vm(&vm).await.job_id, winners[0]);

    // Many reports of the same end: one change, the same answer for all.
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (mut client, job) = (kit.client.clone(), winners[0].clone());
        callers.spawn(async move {
            client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await.unwrap().into_inner().job.unwrap()
        });
    }
    let mut revisions = BTreeSet::new();
    while let Some(answer) = callers.join_next().await {
        let job = answer.unwrap();
        assert_eq!(job_state(&job), JobState::Succeeded);
        revisions.insert(job.revision);
    }
    assert_eq!(revisions.len(), 1);
    assert_eq!(vm_state(&kit.vm(&vm).await), VmState::Idle);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_jobs_on_few_vms_keep_job_and_vm_in_step() {
    let mut kit = Kit::start().await;
    let mut vms = Vec::new();
    for _ in 0..4 {
        vms.push(kit.vm_in(VmKind::Service, VmState::Ready).await);
    }
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..40 {
        let (mut client, vm) = (kit.client.clone(), vms[caller % 4].clone());
        callers.spawn(async move {
            let job = uuid();
            client.create_job(create_job(&job)).await.unwrap();
            while let Err(status) = client.assign_job(assign(&job, &vm, 1)).await {
                assert_eq!(refusal::<()>(Err(status)), "VM_NOT_ACCEPTING");
            }
            client.start_attempt(start_attempt(&job, 1)).await.unwrap();
            client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await.unwrap();
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    assert_eq!(
        counts.jobs.iter().map(|count| (count.state(), count.count)).collect::<Vec<_>>(),
        [(JobState::Succeeded.to_pb(), 40)]
    );
    assert_eq!(
        counts.vms.iter().map(|count| (count.state(), count.count)).collect::<Vec<_>>(),
        [(VmState::Idle.to_pb(), 4)]
    );
    // Creations and first steps, then four changes of jobs and two of VMs for each job.
    assert_eq!(counts.revision, 4 * 2 + 40 * 6);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_sees_each_revision_once_and_in_order_while_many_write_the_same_rows() {
    const WRITERS: usize = 64;
    const JOBS_EACH: usize = 5;
    let mut kit = Kit::start().await;
    let vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let first = kit.vm(&vm).await.revision + 1;
    let mut watch = kit
        .client
        .watch(wire::WatchRequest { start_revision: first, ..Default::default() })
        .await
        .unwrap()
        .into_inner();

    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let (mut client, vm) = (kit.client.clone(), vm.clone());
        writers.spawn(async move {
            let mut newest = 0;
            for _ in 0..JOBS_EACH {
                let id = uuid();
                let created = client.create_job(create_job(&id)).await.unwrap().into_inner().job.unwrap();
                // All writers want the one VM; who gets it gives it back.
                let assigned = client.assign_job(assign(&id, &vm, 1)).await;
                if assigned.is_ok() {
                    client.finish_attempt(finished(&id, 1, JobState::Succeeded)).await.unwrap();
                }
                let request = wire::CancelJobRequest { job_id: id, ..Default::default() };
                let ended = client.cancel_job(request).await.unwrap().into_inner().job.unwrap();
                assert!(created.revision > newest && ended.revision > created.revision);
                newest = ended.revision;
            }
            newest
        });
    }
    let mut last = 0;
    while let Some(newest) = writers.join_next().await {
        last = last.max(newest.unwrap());
    }
    let mut expected = first;
    while expected <= last {
        let message = tokio::time::timeout(Duration::from_secs(60), watch.message()).await.unwrap().unwrap().unwrap();
        if let Some(Message::Event(_)) = message.message {
            assert_eq!(message.revision, expected);
            expected += 1;
        }
    }
    assert!(last - first >= (2 * WRITERS * JOBS_EACH) as u64 - 1);
    drop(watch);
    kit.stop().await;
}
