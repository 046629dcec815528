//! Callers: each submits a job, waits for its end, and takes the next one. Some cancel theirs, some follow its output.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blixard::{
    job::JobState,
    pb::scheduler::v1::{
        self as pb, scheduler_service_client::SchedulerServiceClient, stream_job_logs_response::Record,
    },
};
use blixard_chassis::{ReplicatedChannel, client};
use tonic::Status;

use crate::job::Plan;

/// Deadline of a call: then it is repeated.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream that is silent for so long is opened again.
const SILENCE: Duration = Duration::from_secs(10);
/// Pause before a call is repeated.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

pub(crate) type Scheduler = SchedulerServiceClient<ReplicatedChannel>;

/// The work of all callers.
pub(crate) struct Load {
    plans: Vec<Plan>,
    effects: PathBuf,
    began: Instant,
    /// Over which time the submissions are spread.
    spread: Duration,
    next: AtomicUsize,
    ended: AtomicUsize,
    over: AtomicBool,
    /// Calls without an answer that tells the outcome, by what was told instead.
    unanswered: Mutex<BTreeMap<String, u64>>,
}

/// What a caller has seen of a job.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Its submission was acknowledged.
    pub(crate) acknowledged: bool,
    /// What was followed: of the last attempt, from its first byte on.
    pub(crate) followed: Option<Followed>,
}

/// The output of an attempt as a follower got it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Followed {
    pub(crate) attempt: u32,
    pub(crate) bytes: Vec<u8>,
}

impl Load {
    pub(crate) fn new(plans: Vec<Plan>, effects: PathBuf, spread: Duration) -> Self {
        Self {
            plans,
            effects,
            began: Instant::now(),
            spread,
            next: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            unanswered: Mutex::default(),
        }
    }

    pub(crate) fn plans(&self) -> &[Plan] {
        &self.plans
    }

    /// How many jobs callers have seen the end of.
    pub(crate) fn ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    /// Callers wait for nothing any more.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn unanswered(&self) -> BTreeMap<String, u64> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One caller. Returns what it has seen, by the jobs' places in the plan.
    pub(crate) async fn call(&self, scheduler: Scheduler) -> BTreeMap<usize, Seen> {
        let mut all = BTreeMap::new();
        loop {
            let place = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(plan) = self.plans.get(place) else { return all };
            let share = u32::try_from(place).unwrap_or(u32::MAX);
            let due = self.spread * share / u32::try_from(self.plans.len()).unwrap_or(1).max(1);
            tokio::time::sleep_until((self.began + due).into()).await;
            all.insert(place, self.one(plan, &scheduler).await);
        }
    }

    async fn one(&self, plan: &Plan, scheduler: &Scheduler) -> Seen {
        let submit = || {
            let spec = Some(plan.spec(&self.effects));
            let message = pb::SubmitJobRequest { request_id: plan.id.clone(), spec, ..Default::default() };
            let mut scheduler = scheduler.clone();
            async move { scheduler.submit_job(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        let mut seen = Seen { acknowledged: self.until_answered("submit", submit).await, followed: None };
        if !seen.acknowledged {
            return seen;
        }
        let follow = async {
            match plan.followed {
                true => Some(self.follow(plan, scheduler.clone()).await),
                false => None,
            }
        };
        let ((), (), followed) =
            tokio::join!(self.wait_for_end(plan, scheduler.clone()), self.cancel(plan, scheduler), follow);
        seen.followed = followed;
        self.ended.fetch_add(1, Ordering::Relaxed);
        seen
    }

    async fn cancel(&self, plan: &Plan, scheduler: &Scheduler) {
        let Some(after) = plan.cancel_after_ms else { return };
        tokio::time::sleep(Duration::from_millis(after)).await;
        let cancel = || {
            let message = pb::CancelJobRequest { job_id: plan.id.clone(), reason: "the trial's".to_owned() };
            let mut scheduler = scheduler.clone();
            async move { scheduler.cancel_job(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        self.until_answered("cancel", cancel).await;
    }

    /// Whether it was answered before all was over.
    async fn until_answered<F: Future<Output = Result<(), Status>>>(&self, what: &str, call: impl Fn() -> F) -> bool {
        while !self.over.load(Ordering::Relaxed) {
            match call().await {
                Ok(()) => return true,
                Err(status) => self.note(what, &status),
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
        false
    }

    fn note(&self, what: &str, status: &Status) {
        let why = format!("{what}: {:?} {}", status.code(), status.message());
        *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).entry(why).or_default() += 1;
    }

    async fn wait_for_end(&self, plan: &Plan, mut scheduler: Scheduler) {
        while !self.over.load(Ordering::Relaxed) {
            let watch = scheduler.watch_job(pb::WatchJobRequest { job_id: plan.id.clone() });
            match in_time(watch).await {
                Ok(changes) => {
                    let mut changes = changes.into_inner();
                    while let Ok(Some(change)) = in_time(changes.message()).await {
                        let state = change.job.and_then(|job| JobState::from_pb("state", job.state).ok());
                        if state.is_some_and(JobState::is_terminal) {
                            return;
                        }
                    }
                }
                Err(status) => self.note("watch", &status),
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    }

    /// Reads a job's output from its first byte, and after a break from where it was, until the last attempt's end.
    async fn follow(&self, plan: &Plan, mut scheduler: Scheduler) -> Followed {
        let mut seen = Followed::default();
        while !self.over.load(Ordering::Relaxed) {
            let offset = seen.bytes.len() as u64;
            let message =
                pb::StreamJobLogsRequest { job_id: plan.id.clone(), attempt: seen.attempt, offset, follow: true };
            match in_time(scheduler.stream_job_logs(message)).await {
                Ok(records) => {
                    let mut records = records.into_inner();
                    while let Ok(Some(record)) = in_time(records.message()).await {
                        if seen.took(record) {
                            return seen;
                        }
                    }
                }
                Err(status) => self.note("follow", &status),
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
        seen
    }
}

impl Followed {
    /// Whether that was all.
    fn took(&mut self, message: pb::StreamJobLogsResponse) -> bool {
        match message.record {
            Some(Record::Chunk(chunk)) => {
                if message.attempt != self.attempt {
                    *self = Self { attempt: message.attempt, bytes: Vec::new() };
                }
                self.bytes.extend_from_slice(&chunk.data);
                false
            }
            Some(Record::End(end)) => {
                let state = JobState::from_pb("state", end.state);
                if state.is_ok_and(JobState::is_terminal) {
                    self.attempt = message.attempt;
                    return true;
                }
                // It was lost, and another may follow: from its beginning, whichever it is.
                *self = Self::default();
                false
            }
            // A gap shows in the bytes.
            Some(Record::Gap(_) | Record::Heartbeat(_)) | None => false,
        }
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let silent = |_| Status::deadline_exceeded("silent");
    tokio::time::timeout(SILENCE, answer).await.map_err(silent)?
}
