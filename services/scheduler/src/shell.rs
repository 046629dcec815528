//! The loop around the engine: registry's changes, users' requests and effects' outcomes in, effects out.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use backon::{ExponentialBuilder, Retryable as _};
use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    job::{Job, JobState},
    node::Node,
    pb::{common::v1 as common, registry::v1 as registry, vmhost::v1 as vmhost},
    time::Timestamp,
    vm::{Vm, VmConfig, VmState},
};
use blixard_chassis::{Tasks, client::request};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tonic::{Status, Streaming};

use crate::{
    SchedulerConfig,
    engine::{Effect, Engine, Input, Order, OrderKey, Settings},
    feed::Feed,
    peers::{CALL_TIMEOUT, Peers, missing, peer_error},
};

/// Requests and outcomes that wait for the loop. Each takes microseconds; senders wait when it is full.
const INBOX: usize = 1024;
/// Effects under way at once: enough to fill the registry's group commit, few enough not to crowd out users' calls.
const EFFECTS_AT_ONCE: usize = 512;
/// Pause before the loop lists and watches again after it lost the registry.
const RECONNECT_AFTER: Duration = Duration::from_millis(200);

/// What the service asks of the loop.
enum Message {
    StartVm { vm_id: VmId, config: VmConfig, reply: oneshot::Sender<Result<Vm, Error>> },
    Explain { job_id: JobId, reply: oneshot::Sender<Option<String>> },
    Input(Box<Input>),
}

/// The service's handle on the loop.
#[derive(Clone)]
pub(crate) struct ShellHandle(mpsc::Sender<Message>);

impl ShellHandle {
    /// Places and records a VM.
    pub(crate) async fn start_vm(&self, vm_id: VmId, config: VmConfig) -> Result<Vm, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::StartVm { vm_id, config, reply }).await?;
        answer.await.map_err(|_| stopped())?
    }

    /// What a job waits for.
    pub(crate) async fn explain(&self, job_id: JobId) -> Result<Option<String>, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Explain { job_id, reply }).await?;
        answer.await.map_err(|_| stopped())
    }

    /// Notes how patiently a VM is to be stopped.
    pub(crate) async fn stop_requested(&self, vm_id: VmId, grace: Duration) -> Result<(), Error> {
        self.send(Message::Input(Box::new(Input::StopRequested { vm_id, grace }))).await
    }

    async fn send(&self, message: Message) -> Result<(), Error> {
        self.0.send(message).await.map_err(|_| stopped())
    }
}

fn stopped() -> Error {
    Error::new(Reason::ShuttingDown, "the scheduler is shutting down")
}

pub(crate) fn start(config: &SchedulerConfig, peers: Peers, feed: Feed, tasks: &Tasks) -> ShellHandle {
    let (sender, inbox) = mpsc::channel(INBOX);
    let engine = Engine::new(Settings {
        max_vms: config.max_vms,
        auto_scaling: config.auto_scaling,
        pre_warm_count: config.pre_warm_count,
        defaults: config.defaults,
    });
    let effects = Effects {
        peers: peers.clone(),
        feed: feed.clone(),
        outcomes: sender.clone(),
        slots: Arc::new(Semaphore::new(EFFECTS_AT_ONCE)),
        tasks: tasks.child(),
    };
    let shell = Shell { engine, inbox, peers, feed, effects, requested: BTreeMap::new() };
    let token = tasks.token().clone();
    tasks.spawn("scheduler", async move {
        tokio::select! {
            () = shell.run() => {}
            () = token.cancelled() => {}
        }
    });
    ShellHandle(sender)
}

/// Revisions up to which the lists of each kind speak; older events of that kind are already in them.
struct Listed {
    jobs: u64,
    vms: u64,
    nodes: u64,
}

struct Shell {
    engine: Engine,
    inbox: mpsc::Receiver<Message>,
    peers: Peers,
    feed: Feed,
    effects: Effects,
    /// Users who wait for their VM to be recorded.
    requested: BTreeMap<VmId, oneshot::Sender<Result<Vm, Error>>>,
}

impl Shell {
    async fn run(mut self) {
        loop {
            match self.connect().await {
                Ok((listed, mut watch)) => {
                    let status = self.follow(&listed, &mut watch).await;
                    tracing::debug!(%status, "the registry's watch ended; listing again");
                }
                Err(error) => tracing::debug!(%error, "the registry does not answer yet"),
            }
            tokio::time::sleep(RECONNECT_AFTER).await;
        }
    }

    /// Lists everything that is live and opens a watch that begins where the oldest list ends.
    async fn connect(&mut self) -> Result<(Listed, Streaming<registry::WatchResponse>), Error> {
        // Jobs before VMs: a VM that a listed job names and the later list lacks has ended.
        let (jobs, job_revision) = self.list_jobs().await?;
        let (vms, vm_revision) = self.list_vms().await?;
        let (nodes, node_revision) = self.list_nodes().await?;
        let listed = Listed { jobs: job_revision, vms: vm_revision, nodes: node_revision };
        let start_revision = job_revision.min(vm_revision).min(node_revision) + 1;
        let watch = self.peers.registry().watch(registry::WatchRequest { start_revision, ..Default::default() }).await;
        let watch = watch.map_err(|status| peer_error("registry", &status))?.into_inner();

        tracing::info!(jobs = jobs.len(), vms = vms.len(), nodes = nodes.len(), "Scheduler in step with the registry");
        self.catch_up_feed(&jobs);
        self.step(Input::Snapshot { nodes, vms, jobs });
        self.peers.set_nodes(self.engine.nodes().clone());
        Ok((listed, watch))
    }

    /// Those who wait for a job that ended while we were not watching learn it from its row.
    fn catch_up_feed(&self, live: &[Job]) {
        for job in live {
            self.feed.publish(job);
        }
        for job_id in self.feed.waited_for() {
            if live.iter().any(|job| job.id == job_id) {
                continue;
            }
            let (mut registry, feed) = (self.peers.registry(), self.feed.clone());
            self.effects.tasks.spawn("job refresh", async move {
                let message = registry::GetJobRequest { job_id: job_id.to_string() };
                let answer = registry.get_job(request(message, CALL_TIMEOUT)).await;
                if let Some(Ok(job)) = answer.ok().and_then(|answer| answer.into_inner().job).map(Job::try_from) {
                    feed.publish(&job);
                }
            });
        }
    }

    async fn follow(&mut self, listed: &Listed, watch: &mut Streaming<registry::WatchResponse>) -> Status {
        loop {
            let wake = self.engine.next_wake().map_or(Duration::MAX, |at| at.since(Timestamp::now()));
            tokio::select! {
                message = watch.message() => match message {
                    Ok(Some(message)) => self.on_watch(listed, message),
                    Ok(None) => return Status::unavailable("the stream ended"),
                    Err(status) => return status,
                },
                Some(message) = self.inbox.recv() => self.on_message(message),
                () = tokio::time::sleep(wake) => self.step(Input::Tick),
            }
        }
    }

    fn on_watch(&mut self, listed: &Listed, message: registry::WatchResponse) {
        use registry::{watch_event::Object, watch_response::Message};
        let revision = message.revision;
        self.peers.saw(revision);
        let Some(Message::Event(event)) = message.message else { return };
        let result = match event.object {
            Some(Object::Job(job)) => Job::try_from(job).map(|job| {
                self.feed.publish(&job);
                if revision > listed.jobs {
                    self.step(Input::Job(job));
                }
            }),
            Some(Object::Vm(vm)) if revision > listed.vms => Vm::try_from(vm).map(|vm| self.step(Input::Vm(vm))),
            Some(Object::Node(node)) if revision > listed.nodes => Node::try_from(node).map(|node| {
                self.step(Input::Node(node));
                self.peers.set_nodes(self.engine.nodes().clone());
            }),
            // What is purged had ended, which the engine has been told.
            Some(Object::Vm(_) | Object::Node(_) | Object::PurgedVmId(_) | Object::PurgedJobId(_)) | None => Ok(()),
        };
        if let Err(error) = result {
            tracing::error!(revision, %error, "the registry sent an object that does not parse");
        }
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::StartVm { vm_id, config, reply } => {
                self.requested.insert(vm_id, reply);
                self.step(Input::VmRequested { vm_id, config });
            }
            Message::Explain { job_id, reply } => {
                let _ = reply.send(self.engine.waits_for(job_id));
            }
            Message::Input(input) => self.step(*input),
        }
    }

    fn step(&mut self, input: Input) {
        for effect in self.engine.step(Timestamp::now(), input) {
            match effect {
                Effect::RefuseVm { vm_id, error } => {
                    if let Some(reply) = self.requested.remove(&vm_id) {
                        let _ = reply.send(Err(error));
                    }
                }
                Effect::CreateVm { vm_id, .. } => {
                    let reply = vm_id.and_then(|vm_id| self.requested.remove(&vm_id));
                    self.effects.carry_out(effect, reply);
                }
                Effect::Assign { .. }
                | Effect::FailJob { .. }
                | Effect::LoseAttempt { .. }
                | Effect::FailVm { .. }
                | Effect::DrainVm { .. }
                | Effect::Tell { .. } => self.effects.carry_out(effect, None),
            }
        }
    }

    async fn list_jobs(&self) -> Result<(Vec<Job>, u64), Error> {
        let states = JobState::ALL.into_iter().filter(|state| !state.is_terminal());
        let states: Vec<i32> = states.map(|state| state.to_pb().into()).collect();
        let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
        loop {
            let message =
                registry::ListJobsRequest { states: states.clone(), page_token, page_size: 1000, ..Default::default() };
            let answer = self.peers.registry().list_jobs(request(message, CALL_TIMEOUT)).await;
            let page = answer.map_err(|status| peer_error("registry", &status))?.into_inner();
            let revision = *first_revision.get_or_insert(page.revision);
            for job in page.jobs {
                all.push(Job::try_from(job)?);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                // Oldest first: the order in which they were submitted.
                all.reverse();
                return Ok((all, revision));
            }
        }
    }

    async fn list_vms(&self) -> Result<(Vec<Vm>, u64), Error> {
        let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
        let states: Vec<i32> = states.map(|state| state.to_pb().into()).collect();
        let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
        loop {
            let message =
                registry::ListVmsRequest { states: states.clone(), page_token, page_size: 1000, ..Default::default() };
            let answer = self.peers.registry().list_vms(request(message, CALL_TIMEOUT)).await;
            let page = answer.map_err(|status| peer_error("registry", &status))?.into_inner();
            let revision = *first_revision.get_or_insert(page.revision);
            for vm in page.vms {
                all.push(Vm::try_from(vm)?);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok((all, revision));
            }
        }
    }

    async fn list_nodes(&self) -> Result<(Vec<Node>, u64), Error> {
        let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
        loop {
            let message = registry::ListNodesRequest { page_token, page_size: 1000 };
            let answer = self.peers.registry().list_nodes(request(message, CALL_TIMEOUT)).await;
            let page = answer.map_err(|status| peer_error("registry", &status))?.into_inner();
            let revision = *first_revision.get_or_insert(page.revision);
            for node in page.nodes {
                all.push(Node::try_from(node)?);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok((all, revision));
            }
        }
    }
}

/// Carries out effects, each in a task of its own, and reports the outcomes that the engine waits for.
#[derive(Clone)]
struct Effects {
    peers: Peers,
    feed: Feed,
    outcomes: mpsc::Sender<Message>,
    slots: Arc<Semaphore>,
    tasks: Tasks,
}

impl Effects {
    fn carry_out(&self, effect: Effect, reply: Option<oneshot::Sender<Result<Vm, Error>>>) {
        let this = self.clone();
        let token = self.tasks.token().clone();
        self.tasks.spawn("effect", async move {
            let work = async {
                let Ok(_slot) = this.slots.acquire().await else { return };
                if let Some(input) = this.perform(effect, reply).await {
                    let _ = this.outcomes.send(Message::Input(Box::new(input))).await;
                }
            };
            tokio::select! {
                () = work => {}
                () = token.cancelled() => {}
            }
        });
    }

    async fn perform(&self, effect: Effect, reply: Option<oneshot::Sender<Result<Vm, Error>>>) -> Option<Input> {
        match effect {
            Effect::RefuseVm { .. } => None,
            Effect::CreateVm { ticket, vm_id, config, node_id } => {
                let vm_id = vm_id.unwrap_or_else(VmId::random);
                let message = registry::CreateVmRequest {
                    vm_id: vm_id.to_string(),
                    config: Some(config.into()),
                    node_id: node_id.to_string(),
                    ..Default::default()
                };
                let result = self.create_vm(message, reply.is_some()).await;
                if let Some(reply) = reply {
                    let _ = reply.send(result.clone());
                }
                Some(Input::Created { ticket, result })
            }
            Effect::Assign { job_id, vm_id, attempt } => {
                let message = registry::AssignJobRequest {
                    job_id: job_id.to_string(),
                    vm_id: vm_id.to_string(),
                    attempt,
                    ..Default::default()
                };
                let result = self.assign(message).await;
                Some(Input::Assigned { job_id, vm_id, result })
            }
            Effect::FailJob { job_id, reason } => {
                let message = registry::FailQueuedJobRequest {
                    job_id: job_id.to_string(),
                    reason: cut(reason),
                    ..Default::default()
                };
                let call =
                    || async { self.peers.registry().fail_queued_job(request(message.clone(), CALL_TIMEOUT)).await };
                note("fail a job", registry_call(call).await)
            }
            Effect::LoseAttempt { job_id, attempt, started, reason } => {
                let lost = registry::AttemptLost { started, reason: cut(reason) };
                let outcome = Some(registry::finish_attempt_request::Outcome::Lost(lost));
                let message = registry::FinishAttemptRequest {
                    job_id: job_id.to_string(),
                    attempt,
                    outcome,
                    ..Default::default()
                };
                let call =
                    || async { self.peers.registry().finish_attempt(request(message.clone(), CALL_TIMEOUT)).await };
                note("report a lost attempt", registry_call(call).await)
            }
            Effect::FailVm { vm_id, reason } => self.transition(vm_id, VmState::Failed, reason).await,
            Effect::DrainVm { vm_id, reason } => self.transition(vm_id, VmState::Draining, reason).await,
            Effect::Tell { node_id, order } => {
                let key = order.key();
                let result = match self.peers.vmhost(&node_id) {
                    Ok(vmhost) => tell(vmhost, order).await,
                    Err(error) => Err(error),
                };
                if let (OrderKey::Run(job_id, attempt), Ok(())) = (key, &result) {
                    self.feed.accepted(job_id, attempt);
                }
                Some(Input::Told { order: key, result })
            }
        }
    }

    /// `for_user`: a fault of the registry's is the user's to hear of; nobody else would.
    async fn create_vm(&self, message: registry::CreateVmRequest, for_user: bool) -> Result<Vm, Error> {
        let call = || async { self.peers.registry().create_vm(request(message.clone(), CALL_TIMEOUT)).await };
        let answer = if for_user { repeat(call, may_pass).await } else { registry_call(call).await };
        let vm = answer?.vm.ok_or_else(|| missing("vm"))?;
        Vm::try_from(vm)
    }

    async fn assign(&self, message: registry::AssignJobRequest) -> Result<Job, Error> {
        let call = || async { self.peers.registry().assign_job(request(message.clone(), CALL_TIMEOUT)).await };
        let job = registry_call(call).await?.job.ok_or_else(|| missing("job"))?;
        Job::try_from(job)
    }

    async fn transition(&self, vm_id: VmId, to: VmState, reason: String) -> Option<Input> {
        let message = registry::TransitionVmRequest {
            vm_id: vm_id.to_string(),
            to_state: to.to_pb().into(),
            expected_generation: 0,
            reason: cut(reason),
            ..Default::default()
        };
        let call = || async { self.peers.registry().transition_vm(request(message.clone(), CALL_TIMEOUT)).await };
        note("change a VM's state", registry_call(call).await)
    }
}

/// A registry that refuses has moved on, and the watch says whereto.
fn note<T>(what: &'static str, result: Result<T, Error>) -> Option<Input> {
    if let Err(error) = result {
        tracing::debug!(what, %error, "the registry refused");
    }
    None
}

/// Repeats a call until the registry has an opinion: every mutation is idempotent. A fault of the registry's, such as a full
/// disk, is none: what the engine wants done it wants once, and would wait for ever.
async fn registry_call<T, F>(call: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    repeat(call, |reason| may_pass(reason) || reason == Reason::Internal).await
}

async fn repeat<T, F>(call: impl Fn() -> F, again: impl Fn(Reason) -> bool) -> Result<T, Error>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let attempt =
        || async { call().await.map(tonic::Response::into_inner).map_err(|status| peer_error("registry", &status)) };
    let policy = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times();
    attempt.retry(policy).when(|error| again(error.reason)).await
}

fn may_pass(reason: Reason) -> bool {
    matches!(reason, Reason::PeerUnavailable | Reason::ShuttingDown | Reason::Overloaded | Reason::DeadlineExceeded)
}

async fn tell(mut vmhost: crate::peers::VmHostClient, order: Order) -> Result<(), Error> {
    let result = match order {
        Order::Start { vm_id, config } => {
            let message = vmhost::StartVmRequest { vm_id: vm_id.to_string(), config: Some(config.into()) };
            vmhost.start_vm(request(message, CALL_TIMEOUT)).await.map(drop)
        }
        Order::Stop { vm_id, grace, reason } => {
            let grace_ms = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
            let message = vmhost::StopVmRequest { vm_id: vm_id.to_string(), grace_ms, reason };
            vmhost.stop_vm(request(message, CALL_TIMEOUT)).await.map(drop)
        }
        Order::Run(job) => {
            let job = *job;
            let message = vmhost::RunJobRequest {
                vm_id: job.vm_id.map(|id| id.to_string()).unwrap_or_default(),
                job_id: job.id.to_string(),
                attempt: job.attempt,
                spec: Some(common::JobSpec::from(job.spec)),
                incarnation: 0,
            };
            vmhost.run_job(request(message, CALL_TIMEOUT)).await.map(drop)
        }
        Order::Cancel { job_id, attempt } => {
            let message = vmhost::CancelJobRequest { job_id: job_id.to_string(), attempt };
            vmhost.cancel_job(request(message, CALL_TIMEOUT)).await.map(drop)
        }
    };
    result.map_err(|status| peer_error("vmhost", &status))
}

/// Keeps a reason within what the registry takes.
fn cut(mut reason: String) -> String {
    if reason.len() > blixard::limits::MAX_REASON_BYTES {
        let end = (0..=blixard::limits::MAX_REASON_BYTES).rev().find(|&at| reason.is_char_boundary(at)).unwrap_or(0);
        reason.truncate(end);
    }
    reason
}
