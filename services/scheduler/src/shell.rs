//! Carries out what [`crate::control`] decides: lists, watches, calls, the lease; and hands it what comes back.
//!
//! One task owns the control loop; each call runs in a task of its own.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::{Job, JobState},
    node::Node,
    pb::registry::v1 as registry,
    time::Timestamp,
    vm::{Vm, VmConfig, VmState},
};
use blixard_chassis::{Tasks, client::request};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tonic::{Response, Status, Streaming};
use uuid::Uuid;

use crate::{
    SchedulerConfig,
    control::{Action, Call, Change, Clock, Control, Event, Identity, Listing, Reply, Round},
    engine::Decision,
    feed::Feed,
    peers::{CALL_TIMEOUT, Peers, missing, peer_error},
};

/// Requests and answers that wait for the loop. Each takes microseconds; senders wait when it is full.
const INBOX: usize = 1024;
/// Calls to the registry under way at once: enough to fill its group commit, few enough not to crowd out users' calls. As many
/// to vmhosts, counted apart: what a node that is cut off does not answer must not keep anything from being recorded.
const CALLS_AT_ONCE: usize = 512;
/// Deadline of the question for the lease: shorter than the lease, so that it can be asked again.
const LEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// Deadline of giving the lease up: whoever ends has a second.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);
/// Changes taken in before the loop looks at anything else.
const CHANGES_AT_ONCE: usize = 64;

/// What the loop is told.
enum Message {
    StartVm { vm_id: VmId, config: VmConfig, reply: oneshot::Sender<Result<Vm, Error>> },
    Explain { job_id: JobId, reply: oneshot::Sender<Option<Decision>> },
    NodeUse { reply: oneshot::Sender<BTreeMap<NodeId, NodeUse>> },
    WatchOpened { round: Round, watch: Box<Streaming<registry::WatchResponse>> },
    Event(Box<Event>),
}

/// What of a node is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct NodeUse {
    /// VMs that have not ended.
    pub(crate) vms: u32,
    /// Memory of these.
    pub(crate) used_memory_mib: u64,
    /// Jobs that are assigned to them or run there.
    pub(crate) jobs: u32,
}

/// What others may know of the loop at any time.
#[derive(Default)]
struct Known {
    leader: RwLock<(String, bool)>,
    queued: AtomicUsize,
}

/// The service's handle on the loop.
#[derive(Clone)]
pub(crate) struct ShellHandle {
    inbox: mpsc::Sender<Message>,
    status: Arc<Known>,
}

impl ShellHandle {
    /// Places and records a VM.
    pub(crate) async fn start_vm(&self, vm_id: VmId, config: VmConfig) -> Result<Vm, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::StartVm { vm_id, config, reply }).await?;
        answer.await.map_err(|_| stopped())?
    }

    /// Takes in a job that was recorded through this scheduler. When the loop has enough to do, the watch will bring it.
    pub(crate) fn submitted(&self, job: Job) {
        let _ = self.inbox.try_send(Message::Event(Box::new(Event::Submitted(Box::new(job)))));
    }

    /// What a job waits for.
    pub(crate) async fn explain(&self, job_id: JobId) -> Result<Option<Decision>, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Explain { job_id, reply }).await?;
        answer.await.map_err(|_| stopped())
    }

    /// What of each node is taken.
    pub(crate) async fn node_use(&self) -> Result<BTreeMap<NodeId, NodeUse>, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::NodeUse { reply }).await?;
        answer.await.map_err(|_| stopped())
    }

    /// Who leads, as far as is known, and whether it is this one.
    pub(crate) fn leader(&self) -> (String, bool) {
        self.status.leader.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many jobs wait.
    pub(crate) fn queued(&self) -> usize {
        self.status.queued.load(Ordering::Relaxed)
    }

    async fn send(&self, message: Message) -> Result<(), Error> {
        self.inbox.send(message).await.map_err(|_| stopped())
    }
}

fn stopped() -> Error {
    Error::new(Reason::ShuttingDown, "the scheduler is shutting down")
}

pub(crate) fn start(config: &SchedulerConfig, peers: Peers, feed: Feed, tasks: &Tasks) -> ShellHandle {
    let (sender, inbox) = mpsc::channel(INBOX);
    let identity = Identity { name: config.name.clone(), instance: Uuid::new_v4() };
    let control = Control::new(config.settings.clone(), identity, VmId::random);
    let status = Arc::new(Known::default());
    let caller = Caller {
        peers: peers.clone(),
        answers: sender.clone(),
        to_registry: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
        to_vmhosts: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
        tasks: tasks.child(),
    };
    let mut shell = Shell {
        control,
        clock: Clock::default(),
        begun: Instant::now(),
        inbox,
        peers,
        feed,
        caller,
        connection: tasks.child(),
        tasks: tasks.child(),
        watch: None,
        requested: BTreeMap::new(),
        status: Arc::clone(&status),
    };
    let token = tasks.token().clone();
    tasks.spawn("scheduler", async move {
        tokio::select! {
            () = shell.run() => {}
            () = token.cancelled() => {}
        }
        // Another one need not wait for the lease to run out. Which start of this one has it may have changed since the beginning.
        let release = request(shell.control.lease_request(true), RELEASE_TIMEOUT);
        let _ = shell.peers.registry().acquire_lease(release).await;
    });
    ShellHandle { inbox: sender, status }
}

struct Shell {
    control: Control,
    clock: Clock,
    /// From when the steady clock counts.
    begun: Instant,
    inbox: mpsc::Receiver<Message>,
    peers: Peers,
    feed: Feed,
    caller: Caller,
    /// Lists, and opens watches: ended when another list begins.
    connection: Tasks,
    tasks: Tasks,
    watch: Option<(Round, Box<Streaming<registry::WatchResponse>>)>,
    /// Users who wait for their VM to be recorded.
    requested: BTreeMap<VmId, oneshot::Sender<Result<Vm, Error>>>,
    status: Arc<Known>,
}

impl Shell {
    async fn run(&mut self) {
        self.handle(Event::Tick);
        loop {
            let wake = self.control.next_wake().map_or(Duration::MAX, |at| at.since(Timestamp::now()));
            tokio::select! {
                (round, message) = next_change(&mut self.watch) => self.on_watch(round, message),
                Some(message) = self.inbox.recv() => self.on_message(message),
                () = tokio::time::sleep(wake) => self.handle(Event::Tick),
            }
            self.publish();
        }
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::StartVm { vm_id, config, reply } => {
                self.requested.insert(vm_id, reply);
                self.handle(Event::VmRequested { vm_id, config });
            }
            Message::Explain { job_id, reply } => {
                let _ = reply.send(self.control.explain(Timestamp::now(), job_id));
            }
            Message::NodeUse { reply } => {
                let engine = self.control.engine();
                let used = engine.nodes().iter().map(|(id, entry)| {
                    let jobs = engine.jobs_on(id);
                    (id.clone(), NodeUse { vms: entry.vms, used_memory_mib: entry.used_memory_mib, jobs })
                });
                let _ = reply.send(used.collect());
            }
            Message::WatchOpened { round, watch } => self.watch = Some((round, watch)),
            Message::Event(event) => {
                if let Event::Listed { result: Ok(listing), .. } = &*event {
                    self.on_listed(listing);
                }
                self.handle(*event);
            }
        }
    }

    fn on_watch(&mut self, round: Round, message: Option<Result<registry::WatchResponse, Status>>) {
        match message {
            Some(Ok(message)) => self.on_change(round, message),
            Some(Err(_)) | None => {
                self.watch = None;
                return self.handle(Event::WatchEnded { round });
            }
        }
        // What has come with it is taken in before anything is waited for again.
        for _ in 0..CHANGES_AT_ONCE {
            match next_change(&mut self.watch).now_or_never() {
                Some((round, Some(Ok(message)))) => self.on_change(round, message),
                Some((round, Some(Err(_)) | None)) => {
                    self.watch = None;
                    return self.handle(Event::WatchEnded { round });
                }
                None => return,
            }
        }
    }

    fn on_change(&mut self, round: Round, message: registry::WatchResponse) {
        use registry::{watch_event::Object, watch_response::Message};
        let revision = message.revision;
        self.peers.saw(revision);
        let Some(Message::Event(event)) = message.message else { return };
        let change = match event.object {
            Some(Object::Job(job)) => Job::try_from(job).map(|job| {
                self.feed.publish(&job);
                Change::Job(Box::new(job))
            }),
            Some(Object::Vm(vm)) => Vm::try_from(vm).map(|vm| Change::Vm(Box::new(vm))),
            Some(Object::Node(node)) => Node::try_from(node).map(|node| Change::Node(Box::new(node))),
            // What is purged had ended, which was told before.
            Some(Object::PurgedVmId(_) | Object::PurgedJobId(_)) | None => return,
        };
        match change {
            Ok(change) => self.handle(Event::Changed { round, revision, change }),
            Err(error) => tracing::error!(revision, %error, "the registry sent an object that does not parse"),
        }
    }

    /// Those who wait for a job that ended while nothing was watched learn it from its row.
    fn on_listed(&self, listing: &Listing) {
        let (jobs, vms, nodes) = (listing.jobs.len(), listing.vms.len(), listing.nodes.len());
        tracing::info!(jobs, vms, nodes, "Scheduler in step with the registry");
        for job in &listing.jobs {
            self.feed.publish(job);
        }
        self.feed.forget_recent();
        let live: std::collections::BTreeSet<JobId> = listing.jobs.iter().map(|job| job.id).collect();
        for job_id in self.feed.waited_for().into_iter().filter(|job_id| !live.contains(job_id)) {
            let (mut registry, feed) = (self.peers.registry(), self.feed.clone());
            self.tasks.spawn("job refresh", async move {
                let message = registry::GetJobRequest { job_id: job_id.to_string() };
                let answer = registry.get_job(request(message, CALL_TIMEOUT)).await;
                if let Some(Ok(job)) = answer.ok().and_then(|answer| answer.into_inner().job).map(Job::try_from) {
                    feed.publish(&job);
                }
            });
        }
    }

    fn handle(&mut self, event: Event) {
        let now = Timestamp::now();
        if self.clock.was_set(now, self.begun.elapsed()) {
            let actions = self.control.handle(now, Event::ClockSet);
            self.carry_out(actions);
        }
        let actions = self.control.handle(now, event);
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::List { round } => self.list(round),
                Action::Watch { round, start_revision } => self.open_watch(round, start_revision),
                Action::AcquireLease(message) => self.caller.acquire_lease(message),
                Action::Call { call, to } => self.caller.call(call, to),
                Action::AnswerVm { vm_id, result } => {
                    if let Some(reply) = self.requested.remove(&vm_id) {
                        let _ = reply.send(result.map(|vm| *vm));
                    }
                }
                Action::Accepted { job_id, attempt } => self.feed.accepted(job_id, attempt),
                Action::NodesChanged => self.peers.set_nodes(self.control.engine().nodes().clone()),
            }
        }
    }

    fn publish(&self) {
        self.status.queued.store(self.control.engine().queued(), Ordering::Relaxed);
        let (leader, leading) = self.control.leader();
        let mut known = self.status.leader.write().unwrap_or_else(PoisonError::into_inner);
        if (known.0.as_str(), known.1) != (leader, leading) {
            *known = (leader.to_owned(), leading);
        }
    }

    fn list(&mut self, round: Round) {
        self.watch = None;
        self.connection.token().cancel();
        self.connection = self.tasks.child();
        let (peers, answers) = (self.peers.clone(), self.caller.answers.clone());
        self.connection.spawn_until_end("list", async move {
            let result = list_everything(&peers).await;
            if let Err(error) = &result {
                tracing::debug!(%error, "the registry does not answer yet");
            }
            let event = Event::Listed { round, result: result.map(Box::new) };
            let _ = answers.send(Message::Event(Box::new(event))).await;
        });
    }

    fn open_watch(&mut self, round: Round, start_revision: u64) {
        let (peers, answers) = (self.peers.clone(), self.caller.answers.clone());
        self.connection.spawn_until_end("watch", async move {
            let message = registry::WatchRequest { start_revision, ..Default::default() };
            let message = match peers.registry().watch(message).await {
                Ok(watch) => Message::WatchOpened { round, watch: Box::new(watch.into_inner()) },
                Err(_) => Message::Event(Box::new(Event::WatchEnded { round })),
            };
            let _ = answers.send(message).await;
        });
    }
}

/// The next message of the watch; never, while there is none.
async fn next_change(
    watch: &mut Option<(Round, Box<Streaming<registry::WatchResponse>>)>,
) -> (Round, Option<Result<registry::WatchResponse, Status>>) {
    match watch {
        Some((round, watch)) => (*round, watch.next().await),
        None => std::future::pending().await,
    }
}

/// Makes calls, each in a task of its own, and hands the answers to the loop.
#[derive(Clone)]
struct Caller {
    peers: Peers,
    answers: mpsc::Sender<Message>,
    to_registry: Arc<Semaphore>,
    to_vmhosts: Arc<Semaphore>,
    tasks: Tasks,
}

impl Caller {
    fn acquire_lease(&self, message: registry::AcquireLeaseRequest) {
        let this = self.clone();
        self.spawn("lease", async move {
            let answer = this.peers.registry().acquire_lease(request(message, LEASE_TIMEOUT)).await;
            Event::LeaseAnswered(answer.ok().map(Response::into_inner))
        });
    }

    fn call(&self, call: u64, to: Call) {
        let this = self.clone();
        self.spawn("call", async move {
            let slots = if to.node().is_some() { &this.to_vmhosts } else { &this.to_registry };
            let _slot = slots.acquire().await;
            Event::Answered { call, result: this.perform(to).await }
        });
    }

    fn spawn(&self, name: &'static str, work: impl Future<Output = Event> + Send + 'static) {
        let answers = self.answers.clone();
        self.tasks.spawn_until_end(name, async move {
            let _ = answers.send(Message::Event(Box::new(work.await))).await;
        });
    }

    async fn perform(&self, call: Call) -> Result<Reply, Error> {
        let mut registry = self.peers.registry();
        let of_registry = |status: Status| peer_error("registry", &status);
        let of_vmhost = |status: Status| peer_error("vmhost", &status);
        match call {
            Call::CreateVm(message) => {
                let answer = registry.create_vm(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                answer.into_inner().vm.map(|vm| Reply::Vm(Box::new(vm))).ok_or_else(|| missing("vm"))
            }
            Call::TransitionVm(message) => {
                registry.transition_vm(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                Ok(Reply::Done)
            }
            Call::AssignJob(message) => {
                let answer = registry.assign_job(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                answer.into_inner().job.map(|job| Reply::Job(Box::new(job))).ok_or_else(|| missing("job"))
            }
            Call::FinishAttempt(message) => {
                registry.finish_attempt(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                Ok(Reply::Done)
            }
            Call::FailQueuedJob(message) => {
                registry.fail_queued_job(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                Ok(Reply::Done)
            }
            Call::GetJob(message) => {
                let answer = registry.get_job(request(message, CALL_TIMEOUT)).await.map_err(of_registry)?;
                answer.into_inner().job.map(|job| Reply::Job(Box::new(job))).ok_or_else(|| missing("job"))
            }
            Call::StartVm(node_id, message) => {
                self.peers.vmhost(&node_id)?.start_vm(request(message, CALL_TIMEOUT)).await.map_err(of_vmhost)?;
                Ok(Reply::Done)
            }
            Call::StopVm(node_id, message) => {
                self.peers.vmhost(&node_id)?.stop_vm(request(message, CALL_TIMEOUT)).await.map_err(of_vmhost)?;
                Ok(Reply::Done)
            }
            Call::RunJob(node_id, message) => {
                self.peers.vmhost(&node_id)?.run_job(request(message, CALL_TIMEOUT)).await.map_err(of_vmhost)?;
                Ok(Reply::Done)
            }
            Call::CancelJob(node_id, message) => {
                self.peers.vmhost(&node_id)?.cancel_job(request(message, CALL_TIMEOUT)).await.map_err(of_vmhost)?;
                Ok(Reply::Done)
            }
        }
    }
}

async fn list_everything(peers: &Peers) -> Result<Listing, Error> {
    let (jobs, job_revision) = list_jobs(peers).await?;
    let (vms, vm_revision) = list_vms(peers).await?;
    let (nodes, node_revision) = list_nodes(peers).await?;
    Ok(Listing { jobs, vms, nodes, job_revision, vm_revision, node_revision })
}

async fn list_jobs(peers: &Peers) -> Result<(Vec<Job>, u64), Error> {
    let states = JobState::ALL.into_iter().filter(|state| !state.is_terminal());
    let states: Vec<i32> = states.map(|state| state.to_pb().into()).collect();
    let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
    loop {
        let message =
            registry::ListJobsRequest { states: states.clone(), page_token, page_size: 1000, ..Default::default() };
        let answer = peers.registry().list_jobs(request(message, CALL_TIMEOUT)).await;
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

async fn list_vms(peers: &Peers) -> Result<(Vec<Vm>, u64), Error> {
    let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
    let states: Vec<i32> = states.map(|state| state.to_pb().into()).collect();
    let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
    loop {
        let message =
            registry::ListVmsRequest { states: states.clone(), page_token, page_size: 1000, ..Default::default() };
        let answer = peers.registry().list_vms(request(message, CALL_TIMEOUT)).await;
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

async fn list_nodes(peers: &Peers) -> Result<(Vec<Node>, u64), Error> {
    let (mut all, mut first_revision, mut page_token) = (Vec::new(), None, String::new());
    loop {
        let message = registry::ListNodesRequest { page_token, page_size: 1000 };
        let answer = peers.registry().list_nodes(request(message, CALL_TIMEOUT)).await;
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
