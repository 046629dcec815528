//! Callers: each leads VMs and jobs of its own through their lives and records what it was told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blixard::{
    error::Error,
    job::JobState,
    pb::{
        common::v1 as pb,
        registry::v1::{
            self as wire, finish_attempt_request::Outcome as Report, registry_service_client::RegistryServiceClient,
        },
    },
    vm::{VmKind, VmState},
};
use blixard_chaos_kit::Rng;
use blixard_chassis::{ReplicatedChannel, client};
use tonic::{Code, Status};

use crate::history::{Acknowledgement, History, Object, Outcome, Pair, Read, Registrations, Row, Shown, Step};

/// How long a caller waits for an answer, in milliseconds.
const DEADLINE_MS: std::ops::Range<u64> = 1_000..6_000;
/// How long it waits before it tries again.
const RETRY_MS: std::ops::Range<u64> = 10..300;
/// Of a hundred outcomes that it is not told, how many it leaves unknown.
const LEFT_UNKNOWN_PERCENT: u64 = 20;
/// A caller that wants to end tries an unknown step so many times more.
const LAST_TRIES: u32 = 3;
/// Attempts of a job that may start: more than a caller ever loses.
const MAX_ATTEMPTS: u32 = 9;

pub(crate) type Client = RegistryServiceClient<ReplicatedChannel>;

/// What all callers and watchers of a run share.
pub(crate) struct Run {
    began: Instant,
    over: AtomicBool,
    /// The highest revision that was acknowledged to anybody.
    acknowledged: AtomicU64,
}

impl Run {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), over: AtomicBool::new(false), acknowledged: AtomicU64::new(0) })
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// The highest revision that was acknowledged to anybody.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }
}

/// A change to ask for.
#[expect(clippy::large_enum_variant, reason = "one for each caller")]
enum Change {
    CreateVm(wire::CreateVmRequest),
    Transition(wire::TransitionVmRequest),
    Purge(wire::PurgeVmsRequest),
    CreateJob(wire::CreateJobRequest),
    Assign(wire::AssignJobRequest),
    Start(wire::StartAttemptRequest),
    Finish(wire::FinishAttemptRequest),
    Cancel(wire::CancelJobRequest),
    FailQueued(wire::FailQueuedJobRequest),
    Register(wire::RegisterNodeRequest),
}

impl Change {
    /// Asks once.
    async fn ask(&self, client: &mut Client, deadline: Duration) -> Result<Option<Shown>, Status> {
        macro_rules! ask {
            ($method:ident, $request:expr) => {
                client.$method(client::request($request.clone(), deadline)).await?.into_inner()
            };
        }
        let answer = async {
            Ok(match self {
                Self::CreateVm(request) => ask!(create_vm, request).vm.map(vm),
                Self::Transition(request) => ask!(transition_vm, request).vm.map(vm),
                Self::Purge(request) => {
                    ask!(purge_vms, request);
                    None
                }
                Self::CreateJob(request) => ask!(create_job, request).job.map(job),
                Self::Assign(request) => ask!(assign_job, request).job.map(job),
                Self::Start(request) => ask!(start_attempt, request).job.map(job),
                Self::Finish(request) => ask!(finish_attempt, request).job.map(job),
                Self::Cancel(request) => ask!(cancel_job, request).job.map(job),
                Self::FailQueued(request) => ask!(fail_queued_job, request).job.map(job),
                Self::Register(request) => ask!(register_node, request).node.map(node),
            })
        };
        let late = |_| Err(Status::deadline_exceeded("the caller waits no longer"));
        tokio::time::timeout(deadline, answer).await.unwrap_or_else(late)
    }
}

fn vm(vm: pb::Vm) -> Shown {
    let state = VmState::from_pb("state", vm.state).unwrap().to_string();
    Shown { row: Row { state, generation: vm.generation, attempt: 0 }, revision: vm.revision }
}

fn job(job: pb::Job) -> Shown {
    let state = JobState::from_pb("state", job.state).unwrap().to_string();
    Shown { row: Row { state, generation: job.generation, attempt: job.attempt }, revision: job.revision }
}

fn node(node: pb::Node) -> Shown {
    let row = Row { state: String::new(), generation: node.incarnation, attempt: 0 };
    Shown { row, revision: node.revision }
}

/// Whether an error leaves open what became of the change.
fn is_unknown(status: &Status) -> bool {
    // Internal too: an error in a handler says nothing of the log.
    let codes = [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Unknown, Code::Internal];
    codes.contains(&status.code()) || status.code() == Code::ResourceExhausted
}

/// An object and what it is now, as its caller knows it.
struct Known {
    object: Object,
    row: Row,
}

impl Known {
    fn id(&self) -> String {
        self.object.id.clone()
    }

    /// Changes the row to what the next step makes of it.
    fn becomes(&mut self, state: impl ToString) -> &mut Self {
        self.row.state = state.to_string();
        self.row.generation += 1;
        self
    }
}

/// One caller.
pub(crate) struct Caller {
    client: Client,
    rng: Rng,
    run: Arc<Run>,
    node_id: String,
    instance: String,
    history: History,
}

impl Caller {
    pub(crate) fn new(number: u64, channel: ReplicatedChannel, mut rng: Rng, run: Arc<Run>) -> Self {
        let (node_id, instance) = (format!("chaos-{number}"), rng.uuid());
        Self { client: RegistryServiceClient::new(channel), rng, run, node_id, instance, history: History::default() }
    }

    /// Leads one VM after the other through its life until the run is over.
    pub(crate) async fn run(mut self) -> History {
        while !self.run.is_over() {
            if self.rng.percent(10) {
                self.register_node().await;
            }
            if self.rng.percent(50) {
                self.ask_for_the_lease().await;
            }
            // `None`: the life of this VM ends in the dark.
            let _ = self.lead_vm().await;
        }
        self.history
    }

    async fn lead_vm(&mut self) -> Option<()> {
        let kind = if self.rng.percent(70) { VmKind::Service } else { VmKind::Ephemeral };
        let id = self.rng.uuid();
        let mut vm = Known { object: Object::vm(&id), row: Row::default() };
        vm.becomes(VmState::Starting);
        let config = config(kind);
        let create = wire::CreateVmRequest {
            vm_id: id,
            config: Some(config),
            node_id: self.node_id.clone(),
            request_id: self.request_id(),
            ..Default::default()
        };
        self.step(&Change::CreateVm(create), &[&vm]).await?;
        self.transition(&mut vm, VmState::Ready).await?;
        self.look_at(&vm).await;
        let jobs = if kind == VmKind::Service { self.rng.within(1..6) } else { 1 };
        for _ in 0..jobs {
            self.lead_job(&mut vm, kind).await?;
            if self.run.is_over() || vm.row.state == VmState::Draining.as_str() {
                break;
            }
        }
        if vm.row.state != VmState::Draining.as_str() {
            self.transition(&mut vm, VmState::Draining).await?;
        }
        self.transition(&mut vm, VmState::Terminated).await?;
        if self.rng.percent(30) {
            let purge = wire::PurgeVmsRequest { states: vec![], vm_ids: vec![vm.id()], request_id: self.request_id() };
            vm.row = Row::default();
            self.step(&Change::Purge(purge), &[&vm]).await?;
        }
        Some(())
    }

    async fn lead_job(&mut self, vm: &mut Known, kind: VmKind) -> Option<()> {
        let id = self.rng.uuid();
        let mut job = Known { object: Object::job(&id), row: Row::default() };
        job.becomes(JobState::Queued);
        let create = wire::CreateJobRequest {
            job_id: id,
            spec: Some(spec()),
            request_id: self.request_id(),
            ..Default::default()
        };
        self.step(&Change::CreateJob(create), &[&job]).await?;
        if self.rng.percent(10) {
            job.becomes(JobState::Cancelled);
            let cancel =
                wire::CancelJobRequest { job_id: job.id(), reason: "cancelled".into(), request_id: self.request_id() };
            return self.step(&Change::Cancel(cancel), &[&job]).await;
        }
        if self.rng.percent(10) {
            job.becomes(JobState::Failed);
            let fail = wire::FailQueuedJobRequest {
                job_id: job.id(),
                reason: "no node".into(),
                request_id: self.request_id(),
                ..Default::default()
            };
            return self.step(&Change::FailQueued(fail), &[&job]).await;
        }
        loop {
            self.assign(&mut job, vm).await?;
            if self.rng.percent(20) && kind == VmKind::Service {
                let started = self.rng.percent(50);
                let report = Report::Lost(wire::AttemptLost { started, reason: "lost".into(), lost_node: None });
                self.finish(&mut job, JobState::Queued, vm, kind, report).await?;
                if job.row.attempt < MAX_ATTEMPTS - 1 {
                    continue;
                }
                return Some(());
            }
            job.becomes(JobState::Running);
            let start = wire::StartAttemptRequest {
                job_id: job.id(),
                attempt: job.row.attempt,
                started_at: None,
                request_id: self.request_id(),
            };
            self.step(&Change::Start(start), &[&job]).await?;
            let mut end = *self.rng.pick(&[JobState::Succeeded, JobState::Failed, JobState::TimedOut]);
            if self.rng.percent(10) {
                job.becomes(JobState::Running);
                let cancel = wire::CancelJobRequest {
                    job_id: job.id(),
                    reason: "cancelled".into(),
                    request_id: self.request_id(),
                };
                self.step(&Change::Cancel(cancel), &[&job]).await?;
                end = JobState::Cancelled;
            }
            let result = wire::AttemptResult { state: end.to_pb().into(), ..Default::default() };
            self.finish(&mut job, end, vm, kind, Report::Result(result)).await?;
            self.look_at(&job).await;
            return Some(());
        }
    }

    async fn transition(&mut self, vm: &mut Known, to: VmState) -> Option<()> {
        let request = wire::TransitionVmRequest {
            vm_id: vm.id(),
            to_state: to.to_pb().into(),
            expected_generation: vm.row.generation,
            reason: String::new(),
            request_id: self.request_id(),
            ..Default::default()
        };
        self.step(&Change::Transition(request), &[vm.becomes(to)]).await
    }

    async fn assign(&mut self, job: &mut Known, vm: &mut Known) -> Option<()> {
        job.row.attempt += 1;
        let request = wire::AssignJobRequest {
            job_id: job.id(),
            vm_id: vm.id(),
            attempt: job.row.attempt,
            request_id: self.request_id(),
            ..Default::default()
        };
        self.step(&Change::Assign(request), &[job.becomes(JobState::Assigned), vm.becomes(VmState::Busy)]).await
    }

    async fn finish(
        &mut self,
        job: &mut Known,
        to: JobState,
        vm: &mut Known,
        kind: VmKind,
        report: Report,
    ) -> Option<()> {
        let free = if kind == VmKind::Service { VmState::Idle } else { VmState::Draining };
        let request = wire::FinishAttemptRequest {
            job_id: job.id(),
            attempt: job.row.attempt,
            outcome: Some(report),
            request_id: self.request_id(),
            ..Default::default()
        };
        self.step(&Change::Finish(request), &[job.becomes(to), vm.becomes(free)]).await
    }

    /// Asks for a change of these objects, of which the answer shows the first, until the outcome is known. `None`: it is
    /// left unknown.
    async fn step(&mut self, change: &Change, objects: &[&Known]) -> Option<()> {
        let outcomes = match self.ask(change).await {
            Some(shown) => [Outcome::Acknowledged(shown), Outcome::Acknowledged(None)],
            None => [Outcome::Unknown, Outcome::Unknown],
        };
        let known = outcomes[0] != Outcome::Unknown;
        let mut places = Vec::new();
        for (known, outcome) in objects.iter().zip(outcomes) {
            let steps = self.history.objects.entry(known.object.clone()).or_default();
            places.push((known.object.clone(), steps.len()));
            steps.push(Step { after: known.row.clone(), outcome });
        }
        if let Ok(places) = places.try_into() {
            self.history.pairs.push(Pair(places));
        }
        known.then_some(())
    }

    async fn ask(&mut self, change: &Change) -> Option<Option<Shown>> {
        let mut tries_left = LAST_TRIES;
        loop {
            match self.ask_once(change).await {
                Ok(shown) => return Some(shown),
                Err(status) if is_unknown(&status) => {}
                Err(status) => {
                    let reason = Error::from_status(&status).reason.name();
                    self.history.refusals.push(format!("{reason}: {}", status.message()));
                    return None;
                }
            }
            if self.run.is_over() {
                tries_left -= 1;
            }
            if tries_left == 0 || self.rng.percent(LEFT_UNKNOWN_PERCENT) {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(self.rng.within(RETRY_MS))).await;
        }
    }

    async fn ask_once(&mut self, change: &Change) -> Result<Option<Shown>, Status> {
        let deadline = Duration::from_millis(self.rng.within(DEADLINE_MS));
        let asked_ms = self.run.now_ms();
        let answer = change.ask(&mut self.client, deadline).await;
        match &answer {
            Ok(shown) => {
                self.history.acknowledgements.push(Acknowledgement { asked_ms, answered_ms: self.run.now_ms() });
                let revision = shown.as_ref().map_or(0, |shown| shown.revision);
                self.run.acknowledged.fetch_max(revision, Ordering::SeqCst);
            }
            Err(status) => {
                let why = format!("{:?}: {}", status.code(), status.message());
                *self.history.unanswered.entry(why).or_default() += 1;
            }
        }
        answer
    }

    async fn register_node(&mut self) {
        let node = pb::Node {
            id: self.node_id.clone(),
            endpoint: "http://10.99.1.1:1".into(),
            driver: "process".into(),
            vcpus: 4,
            memory_mib: 1024,
            max_vms: 4,
            images: vec!["default".into()],
            ..Default::default()
        };
        // To register twice is two changes, but for the request id.
        let request = wire::RegisterNodeRequest { node: Some(node), request_id: self.rng.uuid() };
        let answer = self.ask(&Change::Register(request)).await;
        let registrations: &mut Registrations = self.history.nodes.entry(Object::node(&self.node_id)).or_default();
        match answer {
            Some(shown) => registrations.acknowledged.extend(shown.map(|shown| shown.row.generation)),
            None => registrations.unknown += 1,
        }
    }

    /// There is one lease, and every caller wants it now and then. What becomes of a wish without an answer does not matter:
    /// whoever is told that it has the lease is the only one in that epoch.
    async fn ask_for_the_lease(&mut self) {
        let request = wire::AcquireLeaseRequest {
            name: "scheduler".into(),
            holder: self.node_id.clone(),
            instance: self.instance.clone(),
            ttl_ms: 1000,
            release: self.rng.percent(20),
        };
        let deadline = Duration::from_millis(self.rng.within(DEADLINE_MS));
        let answer = self.client.acquire_lease(client::request(request, deadline));
        if let Ok(Ok(answer)) = tokio::time::timeout(deadline, answer).await {
            let wire::AcquireLeaseResponse { held, epoch, holder } = answer.into_inner();
            if held {
                self.history.leases.push((epoch, holder));
            }
        }
    }

    /// Half of the changes have one. Those of VMs and jobs are the same when they are asked for again, with it and without.
    fn request_id(&mut self) -> String {
        if self.rng.percent(50) { self.rng.uuid() } else { String::new() }
    }

    /// Who has been told of a change sees it, whichever replica answers.
    async fn look_at(&mut self, known: &Known) {
        let (id, deadline) = (known.id(), Duration::from_millis(self.rng.within(DEADLINE_MS)));
        let read = async {
            Ok::<_, Status>(match known.object.entity {
                "vm" => {
                    let request = client::request(wire::GetVmRequest { vm_id: id }, deadline);
                    self.client.get_vm(request).await?.into_inner().vm.map_or(0, |vm| vm.generation)
                }
                _ => {
                    let request = client::request(wire::GetJobRequest { job_id: id }, deadline);
                    self.client.get_job(request).await?.into_inner().job.map_or(0, |job| job.generation)
                }
            })
        };
        let shown = match tokio::time::timeout(deadline, read).await {
            Ok(Ok(shown)) => shown,
            Ok(Err(status)) if status.code() == Code::NotFound => 0,
            _ => return,
        };
        let what = format!("the generation of {}", known.object);
        self.history.reads.push(Read { what, at_least: known.row.generation, shown });
    }
}

fn config(kind: VmKind) -> pb::VmConfig {
    pb::VmConfig {
        kind: kind.to_pb().into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        ..Default::default()
    }
}

fn spec() -> pb::JobSpec {
    pb::JobSpec {
        command: vec!["echo".into(), "hello".into()],
        working_dir: "/".into(),
        image: "default".into(),
        vcpus: Some(1),
        memory_mib: Some(128),
        isolation: pb::Isolation::Standard.into(),
        max_attempts: MAX_ATTEMPTS,
        ..Default::default()
    }
}
