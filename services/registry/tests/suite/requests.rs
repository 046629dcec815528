//! Request ids: one effect and one answer, however often a request comes.

use blixard::{
    error::Error,
    job::JobState,
    pb::{common::v1 as pb, registry::v1 as wire},
    vm::{VmKind, VmState},
};

use crate::kit::{
    Client, Kit, assign, create_job, create_vm, finished, lost, refusal, resize, start_attempt, transition, uuid,
    vm_state,
};

macro_rules! calls {
    ($($rpc:ident: $request:ident),* $(,)?) => {
        /// A call of any mutation.
        #[derive(Clone)]
        #[expect(clippy::enum_variant_names, reason = "the contract's names")]
        #[expect(clippy::large_enum_variant, reason = "a few dozen of them")]
        enum Call {
            $($request(wire::$request),)*
        }

        $(impl From<wire::$request> for Call {
            fn from(request: wire::$request) -> Self {
                Self::$request(request)
            }
        })*

        impl Call {
            /// The answer or the refusal, as text.
            async fn send(&self, client: &mut Client) -> String {
                match self.clone() {
                    $(Self::$request(request) => match client.$rpc(request).await {
                        Ok(answer) => format!("{:?}", answer.into_inner()),
                        Err(status) => format!("{:?}", Error::from_status(&status)),
                    },)*
                }
            }

            fn with_id(mut self, id: &str) -> Self {
                match &mut self {
                    $(Self::$request(request) => request.request_id = id.to_owned(),)*
                }
                self
            }

            fn id(&self) -> String {
                match self {
                    $(Self::$request(request) => request.request_id.clone(),)*
                }
            }
        }
    };
}

calls! {
    create_vm: CreateVmRequest,
    transition_vm: TransitionVmRequest,
    purge_vms: PurgeVmsRequest,
    create_job: CreateJobRequest,
    assign_job: AssignJobRequest,
    start_attempt: StartAttemptRequest,
    finish_attempt: FinishAttemptRequest,
    cancel_job: CancelJobRequest,
    fail_queued_job: FailQueuedJobRequest,
    register_node: RegisterNodeRequest,
    update_node: UpdateNodeRequest,
    resize_vm: ResizeVmRequest,
}

fn cancel(job: &str) -> Call {
    wire::CancelJobRequest { job_id: job.into(), reason: "enough".into(), ..Default::default() }.into()
}

fn fail(job: &str) -> Call {
    wire::FailQueuedJobRequest { job_id: job.into(), reason: "can't".into(), ..Default::default() }.into()
}

fn register() -> Call {
    let node = pb::Node {
        id: "node-1".into(),
        endpoint: "http://127.0.0.1:1".into(),
        max_vms: 4,
        images: vec!["default".into(), "\"quoted\"".into()],
        ..Default::default()
    };
    wire::RegisterNodeRequest { node: Some(node), ..Default::default() }.into()
}

fn purge(ids: &[&String]) -> Call {
    let vm_ids = ids.iter().map(|id| (*id).clone()).collect();
    wire::PurgeVmsRequest { vm_ids, ..Default::default() }.into()
}

/// A life in which every RPC succeeds at least once and is refused at least once, where it can be; each call has an id.
fn a_life() -> Vec<Call> {
    let [vm, dead, job, cancelled, hopeless] = std::array::from_fn(|_| uuid());
    let mut labelled = create_job(&job);
    labelled.spec.as_mut().unwrap().labels = [("why".to_owned(), "{\"a\": 1}".to_owned())].into();
    labelled.spec.as_mut().unwrap().max_attempts = 2;
    let cordon = |node: &str| wire::UpdateNodeRequest {
        node_id: node.into(),
        wanted: pb::NodeState::Cordoned.into(),
        ..Default::default()
    };
    let calls: Vec<Call> = vec![
        register(),
        cordon("node-1").into(),
        cordon("nobody").into(),
        create_vm(&vm, VmKind::Service).into(),
        create_vm(&vm, VmKind::Ephemeral).into(),
        transition(&vm, VmState::Idle).into(),
        transition(&vm, VmState::Ready).into(),
        wire::TransitionVmRequest { expected_generation: 9, ..transition(&vm, VmState::Failed) }.into(),
        transition(&uuid(), VmState::Ready).into(),
        resize(&vm, 3, 640).into(),
        wire::ResizeVmRequest { expected_generation: 9, ..resize(&vm, 1, 640) }.into(),
        assign(&job, &vm, 1).into(),
        labelled.into(),
        create_job(&job).into(),
        start_attempt(&job, 1).into(),
        assign(&job, &uuid(), 1).into(),
        assign(&job, &vm, 1).into(),
        start_attempt(&job, 1).into(),
        lost(&job, 1, true).into(),
        assign(&job, &vm, 2).into(),
        finished(&job, 1, JobState::Succeeded).into(),
        start_attempt(&job, 2).into(),
        finished(&job, 2, JobState::Failed).into(),
        fail(&job),
        cancel(&job),
        create_job(&cancelled).into(),
        cancel(&cancelled),
        cancel(&uuid()),
        create_job(&hopeless).into(),
        fail(&hopeless),
        create_vm(&dead, VmKind::Ephemeral).into(),
        transition(&dead, VmState::Failed).into(),
        purge(&[&dead]),
        transition(&vm, VmState::Draining).into(),
        transition(&vm, VmState::Terminated).into(),
        purge(&[]),
        register(),
    ];
    calls.into_iter().map(|call| call.with_id(&uuid())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_again_gets_its_first_answer_though_things_moved_on_and_after_a_restart_too() {
    let mut kit = Kit::start().await;
    let life = a_life();
    let mut answers = Vec::new();
    for call in &life {
        let first = call.send(&mut kit.client).await;
        assert_eq!(call.send(&mut kit.client).await, first);
        answers.push(first);
    }
    let refused =
        answers.iter().filter(|answer| answer.contains("reason: ")).filter(|answer| answer.starts_with("Error"));
    assert_eq!(refused.count(), 13, "{answers:#?}");
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap();
    for _ in 0..2 {
        for (call, first) in life.iter().zip(&answers) {
            assert_eq!(call.send(&mut kit.client).await, *first);
        }
        kit.restart().await;
    }
    assert_eq!(kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner(), counts.into_inner());
    // Whatever the id was used for, it is used up.
    for (call, other) in life.iter().zip(life.iter().cycle().skip(2)) {
        let (id, answer) = (call.id(), other.clone().with_id(&call.id()).send(&mut kit.client).await);
        assert!(answer.contains("RequestIdReused") && answer.contains(&id), "{answer}");
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_means_the_same_however_it_is_written_and_another_body_is_refused() {
    let mut kit = Kit::start().await;
    let (job, id) = (uuid(), uuid());
    let first = wire::CancelJobRequest { job_id: job.clone(), reason: "first".into(), request_id: id.clone() };
    kit.client.create_job(create_job(&job)).await.unwrap();
    let answer = kit.client.cancel_job(first.clone()).await.unwrap().into_inner();
    let shouted = wire::CancelJobRequest { request_id: id.to_uppercase(), ..first.clone() };
    assert_eq!(kit.client.cancel_job(shouted).await.unwrap().into_inner(), answer);
    let other = wire::CancelJobRequest { reason: "second".into(), ..first.clone() };
    assert_eq!(refusal(kit.client.cancel_job(other).await), "REQUEST_ID_REUSED");
    let nonsense = wire::CancelJobRequest { request_id: "yes".into(), ..first };
    assert_eq!(refusal(kit.client.cancel_job(nonsense).await), "INVALID_FIELD");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_callers_with_one_id_have_one_effect_and_one_answer() {
    let mut kit = Kit::start().await;
    let vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let before = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision;
    let registering = register().with_id(&uuid());
    let draining = Call::from(transition(&vm, VmState::Draining)).with_id(&uuid());
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..60 {
        let (mut client, call) = (kit.client.clone(), if caller % 2 == 0 { &registering } else { &draining }.clone());
        callers.spawn(async move { call.send(&mut client).await });
    }
    let mut answers = std::collections::BTreeSet::new();
    while let Some(answer) = callers.join_next().await {
        answers.insert(answer.unwrap());
    }
    assert_eq!(answers.len(), 2, "{answers:#?}");
    let after = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision;
    assert_eq!(after, before + 2);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_in_several_steps_is_counted_once() {
    const VMS: u64 = 1100;
    let mut kit = Kit::start().await;
    let mut callers = tokio::task::JoinSet::new();
    let end = |mut client: Client| async move {
        let id = uuid();
        client.create_vm(create_vm(&id, VmKind::Ephemeral)).await.unwrap();
        client.transition_vm(transition(&id, VmState::Failed)).await.unwrap();
        id
    };
    for _ in 0..VMS {
        callers.spawn(end(kit.client.clone()));
    }
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
    let request = wire::PurgeVmsRequest { request_id: uuid(), ..Default::default() };
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (mut client, request) = (kit.client.clone(), request.clone());
        callers.spawn(async move { client.purge_vms(request).await.unwrap().into_inner().purged });
    }
    while let Some(purged) = callers.join_next().await {
        assert_eq!(purged.unwrap(), VMS);
    }
    // One that ended later is not this request's to purge.
    let later = end(kit.client.clone()).await;
    assert_eq!(kit.client.purge_vms(request.clone()).await.unwrap().into_inner().purged, VMS);
    assert_eq!(vm_state(&kit.vm(&later).await), VmState::Failed);
    let other = wire::PurgeVmsRequest { vm_ids: vec![later], ..request };
    assert_eq!(refusal(kit.client.purge_vms(other).await), "REQUEST_ID_REUSED");
    kit.stop().await;
}
