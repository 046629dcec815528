//! Leases: who has one, when it changes hands, and what a scheduler may do whose lease another has.

use std::time::{Duration, Instant};

use blixard::{
    error::Error,
    pb::registry::v1 as wire,
    vm::{VmKind, VmState},
};
use blixard_registry::NodeTiming;

use crate::kit::{Kit, assign, refusal, uuid};

const TTL: Duration = Duration::from_secs(2);
/// Time is counted finely.
const TIMING: NodeTiming = NodeTiming { every: Duration::from_millis(50), grace: Duration::from_secs(60) };

/// A start of a scheduler.
struct Scheduler {
    holder: &'static str,
    instance: String,
}

impl Scheduler {
    fn start(holder: &'static str) -> Self {
        Self { holder, instance: uuid() }
    }

    async fn ask(&self, kit: &mut Kit, release: bool) -> wire::AcquireLeaseResponse {
        let request = wire::AcquireLeaseRequest {
            name: "scheduler".into(),
            holder: self.holder.into(),
            instance: self.instance.clone(),
            ttl_ms: u32::try_from(TTL.as_millis()).unwrap(),
            release,
        };
        kit.client.acquire_lease(request).await.unwrap().into_inner()
    }

    /// The epoch, if it leads.
    async fn leads(&self, kit: &mut Kit) -> Option<u64> {
        let answer = self.ask(kit, false).await;
        answer.held.then_some(answer.epoch)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_kept_by_asking_and_passes_on_by_silence_release_or_a_new_start() {
    let mut kit = Kit::hearing_nodes(TIMING).await;
    let (a, b) = (Scheduler::start("a"), Scheduler::start("b"));
    assert_eq!(a.leads(&mut kit).await, Some(1));
    // Far longer than it would be kept without being asked for.
    let began = Instant::now();
    while began.elapsed() < 2 * TTL {
        assert_eq!(a.leads(&mut kit).await, Some(1));
        assert_eq!(b.leads(&mut kit).await, None);
        tokio::time::sleep(TTL / 20).await;
    }
    // Then it falls silent.
    let silent = Instant::now();
    while b.leads(&mut kit).await.is_none() {
        assert!(silent.elapsed() < 15 * TTL, "it never changes hands");
        tokio::time::sleep(TTL / 40).await;
    }
    assert!(silent.elapsed() > TTL - 2 * TIMING.every, "{:?}", silent.elapsed());
    let told = a.ask(&mut kit, false).await;
    assert_eq!((told.held, told.epoch, told.holder.as_str()), (false, 2, "b"));
    let b_again = Scheduler::start("b");
    assert_eq!(b_again.leads(&mut kit).await, Some(3));
    assert_eq!(b_again.ask(&mut kit, true).await.holder, "");
    assert_eq!(a.leads(&mut kit).await, Some(4));
    // None of it is a change of what the registry records of VMs, jobs and nodes.
    assert_eq!(kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision, 0);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_was_away_costs_nobody_a_lease_and_remembers_its_epoch() {
    let mut kit = Kit::hearing_nodes(TIMING).await;
    let (a, b) = (Scheduler::start("a"), Scheduler::start("b"));
    assert_eq!(a.leads(&mut kit).await, Some(1));
    kit.stop_serving().await;
    // It is the time itself that matters here.
    tokio::time::sleep(TTL).await;
    kit.restart().await;
    assert_eq!(b.leads(&mut kit).await, None);
    assert_eq!(a.leads(&mut kit).await, Some(1));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leads_no_more_is_refused_before_anything_changes() {
    let mut kit = Kit::start().await;
    let (old, new) = (Scheduler::start("a"), Scheduler::start("a"));
    let epoch = old.leads(&mut kit).await.unwrap();
    let (job, vm) = (kit.queued_job(1).await, kit.vm_in(VmKind::Service, VmState::Ready).await);
    let current = new.leads(&mut kit).await.unwrap();
    assert_eq!((epoch, current), (1, 2));
    let of = |scheduler_epoch| wire::AssignJobRequest { scheduler_epoch, ..assign(&job, &vm, 1) };
    let before = (kit.job(&job).await, kit.vm(&vm).await);
    let error = Error::from_status(&kit.client.assign_job(of(epoch)).await.unwrap_err());
    assert_eq!((error.reason.name(), error.metadata["epoch"].as_str()), ("STALE_EPOCH", "1"));
    assert_eq!(error.metadata["current"], "2");
    assert_eq!((kit.job(&job).await, kit.vm(&vm).await), before);
    kit.client.assign_job(of(current)).await.unwrap();
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_want_a_lease_at_once_have_one_holder() {
    let mut kit = Kit::start().await;
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..40 {
        let mut client = kit.client.clone();
        let request = wire::AcquireLeaseRequest {
            name: "scheduler".into(),
            holder: format!("scheduler-{number}"),
            instance: uuid(),
            ttl_ms: 60_000,
            release: false,
        };
        callers.spawn(async move { client.acquire_lease(request).await.unwrap().into_inner() });
    }
    let answers = callers.join_all().await;
    assert_eq!(answers.iter().filter(|answer| answer.held).count(), 1, "{answers:?}");
    assert!(answers.iter().all(|answer| answer.epoch == 1 && answer.holder == answers[0].holder), "{answers:?}");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_for_a_lease_is_refused() {
    let mut kit = Kit::start().await;
    let good = || wire::AcquireLeaseRequest {
        name: "l".into(),
        holder: "h".into(),
        instance: uuid(),
        ttl_ms: 1000,
        release: false,
    };
    for wrong in [
        wire::AcquireLeaseRequest { name: "no name".into(), ..good() },
        wire::AcquireLeaseRequest { holder: String::new(), ..good() },
        wire::AcquireLeaseRequest { instance: "me".into(), ..good() },
        wire::AcquireLeaseRequest { ttl_ms: 999, ..good() },
        wire::AcquireLeaseRequest { ttl_ms: 60_001, ..good() },
    ] {
        assert_eq!(refusal(kit.client.acquire_lease(wrong).await), "INVALID_FIELD");
    }
    assert!(kit.client.acquire_lease(good()).await.unwrap().into_inner().held);
    kit.stop().await;
}
