//! The guest as its host sees it: one identity, at most one live attempt, one end.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::VmId,
    job::{JobInput, JobSpec},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::{AttemptId, Decision, DeniedReason, Held, Seen, decide},
    attempt::Attempt,
    command,
    identity::{Configuration, Configured, Identity, random_boot_id},
    image::ImageDefaults,
    input,
    lease::Lease,
    processes::Processes,
    redact::Secrets,
};

/// How long the end waits for the host to read an ended attempt to its end.
const DELIVERY_GRACE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    vm_id: Option<VmId>,
    /// Made by the first Configure, where the agent is PID 1.
    boot_id: Option<String>,
    /// Where volumes are mounted.
    mounted: BTreeSet<String>,
    held: Option<Arc<Attempt>>,
    seen: Seen,
}

impl State {
    fn held(&self) -> Option<Held> {
        self.held.as_ref().map(|attempt| Held { id: attempt.id, live: attempt.is_live() })
    }
}

/// The guest. One for each agent, shared by all requests.
#[derive(Debug)]
pub(crate) struct Guest {
    /// What does not change until the guest restarts.
    pub(crate) identity: Identity,
    image: ImageDefaults,
    processes: Arc<Processes>,
    tasks: TaskTracker,
    state: Mutex<State>,
    /// No new attempt begins.
    ending: CancellationToken,
    /// No process is left: stop serving.
    ended: CancellationToken,
}

/// What an attempt is to do.
#[derive(Debug)]
pub(crate) struct Work {
    /// What to run.
    pub(crate) spec: JobSpec,
    /// With what.
    pub(crate) input: JobInput,
    /// For how long, unless that is renewed.
    pub(crate) lease: Lease,
}

/// What Hello tells beside the identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    /// The VM it was configured as.
    pub(crate) vm_id: Option<VmId>,
    /// Empty while it has none.
    pub(crate) boot_id: String,
    /// The attempt whose end the host may not know.
    pub(crate) owed: Option<AttemptId>,
}

impl Guest {
    /// A guest that was just started.
    #[must_use]
    pub(crate) fn new(identity: Identity, image: ImageDefaults, processes: Arc<Processes>) -> Arc<Self> {
        let boot_id = (!identity.owns_guest).then(random_boot_id);
        Arc::new(Self {
            identity,
            image,
            processes,
            tasks: TaskTracker::new(),
            state: Mutex::new(State { boot_id, ..State::default() }),
            ending: CancellationToken::new(),
            ended: CancellationToken::new(),
        })
    }

    /// What it is doing.
    #[must_use]
    pub(crate) fn status(&self) -> Status {
        let state = self.lock();
        let owed = state.held.as_ref().filter(|attempt| attempt.is_owed()).map(|attempt| attempt.id);
        Status { vm_id: state.vm_id, boot_id: state.boot_id.clone().unwrap_or_default(), owed }
    }

    /// Takes on an identity.
    ///
    /// # Errors
    /// It has another name already and a job that runs under it, or a step failed.
    pub(crate) fn configure(&self, configuration: &Configuration) -> Result<Configured, Error> {
        let mut state = self.lock();
        let live = state.held.as_ref().is_some_and(|attempt| attempt.is_live());
        if let Some(current) = state.vm_id.filter(|&current| current != configuration.vm_id && live) {
            let message = format!("this guest runs a job as VM {current}");
            return Err(Error::new(Reason::GuestRefused, message).with("vm_id", current));
        }
        let configured = configuration.apply(self.identity.owns_guest, &mut state.mounted)?;
        state.vm_id = Some(configuration.vm_id);
        let boot_id = state.boot_id.get_or_insert(configured.boot_id).clone();
        Ok(Configured { boot_id, ..configured })
    }

    /// The attempt `id`: the one it holds, or a new one that this call starts. The host has its output up to `offset`.
    ///
    /// # Errors
    /// Why it is refused. A command that can't be started is no error here: it is an attempt that has ended.
    pub(crate) fn run(&self, id: AttemptId, work: &Work, offset: u64) -> Result<Arc<Attempt>, Error> {
        let mut state = self.lock();
        let vm_id = state.vm_id.ok_or_else(|| {
            Error::new(Reason::GuestRefused, "this guest has no identity yet: Configure must come before Run")
        })?;
        match decide(state.held(), &state.seen, id, false) {
            Decision::Deny(denied) => Err(Error::from(denied).with("vm_id", vm_id)),
            Decision::Attach => state.held.clone().ok_or_else(|| DeniedReason::Unknown { wanted: id }.into()),
            Decision::Start if self.ending.is_cancelled() => {
                Err(Error::new(Reason::GuestRefused, "this guest is shutting down").with("vm_id", vm_id))
            }
            // The host has output of an attempt that this guest does not know: the guest was restarted under it.
            Decision::Start if offset > 0 => Err(DeniedReason::Unknown { wanted: id }.into()),
            Decision::Start => {
                state.seen.insert(id);
                let attempt = self.start(id, work, vm_id);
                state.held = Some(attempt.clone());
                Ok(attempt)
            }
        }
    }

    /// The attempt `id` if the guest holds it.
    ///
    /// # Errors
    /// It does not.
    pub(crate) fn find(&self, id: AttemptId) -> Result<Arc<Attempt>, Error> {
        let state = self.lock();
        match (decide(state.held(), &state.seen, id, true), &state.held) {
            (Decision::Attach, Some(attempt)) => Ok(attempt.clone()),
            (Decision::Deny(denied), _) => Err(denied.into()),
            (Decision::Attach | Decision::Start, _) => Err(DeniedReason::Unknown { wanted: id }.into()),
        }
    }

    fn start(&self, id: AttemptId, work: &Work, vm_id: VmId) -> Arc<Attempt> {
        let attempt = Arc::new(Attempt::new(id, work.lease, Secrets::of(&work.input.secrets)));
        let started = input::write_files(&work.input.files);
        match started.and_then(|()| command::spawn(&work.spec, &work.input, &self.image, vm_id, id)) {
            Ok(running) => {
                let driving = attempt.clone().drive(running, work.input.stdin.clone(), self.processes.clone());
                drop(self.tasks.spawn(driving));
            }
            Err(why) => attempt.fail_to_start(&why),
        }
        attempt
    }

    /// Sends a signal to every process of an attempt; without effect when it has ended.
    ///
    /// # Errors
    /// The guest does not hold that attempt.
    pub(crate) fn signal(&self, id: AttemptId, signal: i32) -> Result<(), Error> {
        let state = self.lock();
        let current = state.seen.highest(id.job_id);
        match &state.held {
            Some(attempt) if attempt.id == id => {
                if attempt.is_live() {
                    self.processes.signal_all(signal);
                }
                Ok(())
            }
            // It was here and another has taken its place, so it has ended.
            Some(_) | None if id.number == current => Ok(()),
            Some(_) | None if id.number < current => Err(DeniedReason::Stale { wanted: id, current }.into()),
            Some(_) | None => Err(DeniedReason::Unknown { wanted: id }.into()),
        }
    }

    /// Begins the end: SIGTERM to every process, SIGKILL after the grace. The first call decides the grace, unless a
    /// later one has less patience.
    pub(crate) fn shut_down(self: &Arc<Self>, grace: Duration) {
        self.ending.cancel();
        drop(self.tasks.spawn(self.clone().end(grace)));
    }

    async fn end(self: Arc<Self>, grace: Duration) {
        self.processes.signal_all(libc::SIGTERM);
        // A stopped process takes no SIGTERM.
        self.processes.signal_all(libc::SIGCONT);
        if !self.processes.none_left(grace).await {
            self.processes.kill_all().await;
        }
        let owed = self.lock().held.clone().filter(|attempt| attempt.is_owed());
        if let Some(attempt) = owed {
            attempt.delivered(DELIVERY_GRACE).await;
        }
        self.ended.cancel();
    }

    /// Resolves when the end is over.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Runs a task of the guest's own.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.tasks.spawn(task));
    }

    /// The processes of its jobs.
    #[must_use]
    pub(crate) fn processes(&self) -> &Processes {
        &self.processes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
