//! One VM from its record to its end, with the steps that a scheduler takes: it records, orders, and gives its orders again when the
//! node has registered anew.

use std::{
    collections::BTreeMap,
    ops::Range,
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    pb::{
        common::v1::{self as common, Egress, EgressPolicy, VmKind},
        registry::v1 as registry,
        vmhost::v1 as vmhost,
    },
    vm::VmState,
};
use blixard_chaos_kit::Rng;
use blixard_chassis::client;
use tonic::Status;

use crate::bed::{Bed, CALL_TIMEOUT, NODE};

/// Between two looks at a VM, and two tries of a call.
const LOOK_EVERY: Duration = Duration::from_millis(15);
/// A VM's whole life takes no longer, however often vmhost dies meanwhile.
const LIVES_WITHIN: Duration = Duration::from_secs(600);
const MEMORY_MIB: u32 = 128;

/// How long what takes.
pub(crate) struct Times {
    /// From a VM's record to a moment of its life at which it may be told to end.
    pub(crate) moment_ms: Range<u64>,
    /// From a job's assignment to such a moment.
    pub(crate) job_ms: Range<u64>,
}

/// When a VM is told to end.
#[derive(Debug, Clone, Copy)]
enum Stop {
    /// So long after it was recorded, whatever it does then.
    After(Duration),
    /// As soon as it is Ready.
    Ready,
    /// When its job has ended.
    JobEnded,
    /// So long after it was given its job.
    Busy(Duration),
}

/// One cycle.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    vm_id: String,
    job_id: String,
    kind: VmKind,
    network: bool,
    stop: Stop,
    grace_ms: Option<u64>,
    /// The job prints much, and does not end by itself.
    endless: bool,
}

/// What became of a VM.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) vm_id: String,
    pub(crate) state: VmState,
    /// Why, if it Failed.
    pub(crate) failure: Option<String>,
    /// Whether it was given a job.
    pub(crate) ran: bool,
}

/// An order to the node; each is given once to each incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Start,
    Run,
    Stop,
}

impl Plan {
    pub(crate) fn choose(rng: &mut Rng, network: bool, times: &Times) -> Self {
        let stop = match rng.within(0..100) {
            0..30 => Stop::After(Duration::from_millis(rng.within(times.moment_ms.clone()))),
            30..45 => Stop::Ready,
            45..75 => Stop::JobEnded,
            _ => Stop::Busy(Duration::from_millis(rng.within(times.job_ms.clone()))),
        };
        Self {
            vm_id: rng.uuid(),
            job_id: rng.uuid(),
            kind: if rng.percent(50) { VmKind::Ephemeral } else { VmKind::Service },
            network: network && rng.percent(70),
            stop,
            grace_ms: *rng.pick(&[Some(0), Some(300), None]),
            endless: rng.percent(60) && matches!(stop, Stop::Busy(_)),
        }
    }

    fn config(&self) -> common::VmConfig {
        let policy = if self.network { EgressPolicy::Internet } else { EgressPolicy::None };
        common::VmConfig {
            kind: self.kind.into(),
            image: "default".to_owned(),
            vcpus: Some(1),
            memory_mib: Some(MEMORY_MIB),
            egress: Some(Egress { policy: policy.into(), allow: vec![] }),
            ..Default::default()
        }
    }

    fn job(&self) -> common::JobSpec {
        let rest = if self.endless { "sleep 3600" } else { "echo end" };
        let script = format!("i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done; {rest}");
        common::JobSpec {
            command: ["sh", "-c", &script].map(str::to_owned).to_vec(),
            image: "default".to_owned(),
            vcpus: Some(1),
            memory_mib: Some(MEMORY_MIB),
            ..Default::default()
        }
    }

    fn wants_job(&self) -> bool {
        matches!(self.stop, Stop::JobEnded | Stop::Busy(_))
    }

    /// Has it live and die. An error is an answer that nobody may get.
    pub(crate) async fn live(&self, bed: &Bed) -> Result<Ended, String> {
        let wrong = |what: &str| format!("VM {}: {what}: {self:?}", self.vm_id);
        let create = || {
            let (config, mut client) = (Some(self.config()), bed.registry());
            let message = registry::CreateVmRequest {
                vm_id: self.vm_id.clone(),
                config,
                node_id: NODE.to_owned(),
                ..Default::default()
            };
            async move { client.create_vm(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        until_answered(create).await.map_err(|error| wrong(&format!("recorded: {error}")))?;
        let mut life = Life { plan: self, bed, began: Instant::now(), assigned: None, told: BTreeMap::new() };
        while life.began.elapsed() < LIVES_WITHIN {
            if let Some(ended) = life.look().await.map_err(|what| wrong(&what))? {
                return Ok(ended);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Err(wrong(&format!("it lives after {LIVES_WITHIN:?}: {:?}", life.vm().await)))
    }
}

struct Life<'a> {
    plan: &'a Plan,
    bed: &'a Bed,
    began: Instant,
    /// When it was given its job.
    assigned: Option<Instant>,
    /// The incarnation that each order was given to.
    told: BTreeMap<Order, u64>,
}

impl Life<'_> {
    async fn vm(&self) -> Result<Option<(VmState, common::Vm)>, String> {
        let get = registry::GetVmRequest { vm_id: self.plan.vm_id.clone() };
        match self.bed.registry().get_vm(client::request(get, CALL_TIMEOUT)).await.map_err(Error::from) {
            Ok(answer) => {
                let vm = answer.into_inner().vm.unwrap_or_default();
                let state = VmState::from_pb("state", vm.state).map_err(|error| error.to_string())?;
                Ok(Some((state, vm)))
            }
            Err(error) if is_silence(error.reason) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn job(&self) -> Result<Option<(JobState, common::Job)>, String> {
        let get = registry::GetJobRequest { job_id: self.plan.job_id.clone() };
        match self.bed.registry().get_job(client::request(get, CALL_TIMEOUT)).await.map_err(Error::from) {
            Ok(answer) => {
                let job = answer.into_inner().job.unwrap_or_default();
                Ok(Some((JobState::from_pb("state", job.state).map_err(|error| error.to_string())?, job)))
            }
            Err(error) if is_silence(error.reason) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// One look at what is on record, and what follows from it.
    async fn look(&mut self) -> Result<Option<Ended>, String> {
        let Some((state, vm)) = self.vm().await? else { return Ok(None) };
        if state.is_terminal() {
            return self.ended(state, vm).await;
        }
        match state {
            VmState::Draining => {
                self.order(Order::Stop).await?;
                return Ok(None);
            }
            VmState::Starting => self.order(Order::Start).await?,
            VmState::Ready if self.plan.wants_job() && self.assigned.is_none() => self.assign().await?,
            VmState::Ready | VmState::Busy | VmState::Idle | VmState::Terminated | VmState::Failed => {}
        }
        let mut job_ended = false;
        if self.assigned.is_some()
            && let Some((job, _)) = self.job().await?
        {
            job_ended = job.is_terminal() || job == JobState::Queued;
            if job == JobState::Assigned {
                self.order(Order::Run).await?;
            }
        }
        let due = match self.plan.stop {
            Stop::After(moment) => self.began.elapsed() >= moment,
            Stop::Ready => matches!(state, VmState::Ready | VmState::Idle),
            Stop::JobEnded => job_ended,
            Stop::Busy(moment) => self.assigned.is_some_and(|since| since.elapsed() >= moment),
        };
        if due {
            self.drain().await?;
        }
        Ok(None)
    }

    /// Its job must have ended with it. One that is Queued again would be given to another VM: here it is given up.
    async fn ended(&self, state: VmState, vm: common::Vm) -> Result<Option<Ended>, String> {
        if self.assigned.is_some() {
            match self.job().await? {
                Some((job, _)) if job.is_terminal() => {}
                Some((JobState::Queued, _)) => {
                    let cancel = registry::CancelJobRequest { job_id: self.plan.job_id.clone(), ..Default::default() };
                    let _ = self.bed.registry().cancel_job(client::request(cancel, CALL_TIMEOUT)).await;
                    return Ok(None);
                }
                Some((job, _)) => return Err(format!("it is {state} and its job {job}")),
                None => return Ok(None),
            }
        }
        let failure = (state == VmState::Failed).then_some(vm.reason);
        Ok(Some(Ended { vm_id: self.plan.vm_id.clone(), state, failure, ran: self.assigned.is_some() }))
    }

    async fn assign(&mut self) -> Result<(), String> {
        let create = || {
            let mut client = self.bed.registry();
            let (job_id, spec) = (self.plan.job_id.clone(), Some(self.plan.job()));
            let message = registry::CreateJobRequest { job_id, spec, ..Default::default() };
            async move { client.create_job(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        until_answered(create).await.map_err(|error| format!("its job: {error}"))?;
        let assign = || {
            let mut client = self.bed.registry();
            let (job_id, vm_id) = (self.plan.job_id.clone(), self.plan.vm_id.clone());
            let message = registry::AssignJobRequest { job_id, vm_id, attempt: 1, ..Default::default() };
            async move { client.assign_job(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        // Refused: it has it already, or the VM has met its end. The job tells.
        let _ = until_answered(assign).await;
        self.assigned = Some(Instant::now());
        Ok(())
    }

    async fn drain(&self) -> Result<(), String> {
        let message = registry::TransitionVmRequest {
            vm_id: self.plan.vm_id.clone(),
            to_state: VmState::Draining.to_pb().into(),
            reason: "the trial has had enough of it".to_owned(),
            grace_ms: self.plan.grace_ms,
            ..Default::default()
        };
        match self.bed.registry().transition_vm(client::request(message, CALL_TIMEOUT)).await {
            Ok(_) => Ok(()),
            Err(status) => match Error::from(status) {
                error if is_silence(error.reason) || error.reason == Reason::IllegalTransition => Ok(()),
                error => Err(format!("it can't be drained: {error}")),
            },
        }
    }

    async fn order(&mut self, order: Order) -> Result<(), String> {
        let incarnation = self.bed.incarnation();
        if self.told.get(&order) == Some(&incarnation) {
            return Ok(());
        }
        match self.give(order, incarnation).await.map_err(Error::from) {
            Ok(()) => {}
            Err(error) if is_silence(error.reason) || error.reason.retryable() => return Ok(()),
            // Told again once the node's news is here.
            Err(error) if error.reason == Reason::StaleIncarnation => return Ok(()),
            Err(error) if order == Order::Run => self.lose_attempt(&error).await?,
            Err(error) => return Err(format!("{order:?}: {:?} {error}", error.reason)),
        }
        self.told.insert(order, incarnation);
        Ok(())
    }

    async fn give(&self, order: Order, incarnation: u64) -> Result<(), Status> {
        let (vm_id, mut client) = (self.plan.vm_id.clone(), self.bed.vmhost());
        match order {
            Order::Start => {
                let message = vmhost::StartVmRequest { vm_id, config: Some(self.plan.config()) };
                client.start_vm(client::request(message, CALL_TIMEOUT)).await.map(drop)
            }
            Order::Run => {
                let message = vmhost::RunJobRequest {
                    vm_id,
                    job_id: self.plan.job_id.clone(),
                    attempt: 1,
                    spec: Some(self.plan.job()),
                    incarnation,
                };
                client.run_job(client::request(message, CALL_TIMEOUT)).await.map(drop)
            }
            Order::Stop => {
                let reason = "the trial has had enough of it".to_owned();
                let message = vmhost::StopVmRequest { vm_id, grace_ms: self.plan.grace_ms, reason };
                client.stop_vm(client::request(message, CALL_TIMEOUT)).await.map(drop)
            }
        }
    }

    /// The node has refused it.
    async fn lose_attempt(&self, error: &Error) -> Result<(), String> {
        let (started, reason) = (error.reason == Reason::Internal, format!("its node refused it: {error}"));
        let lost = registry::AttemptLost { started, reason, lost_node: None };
        let finish = || {
            let mut client = self.bed.registry();
            let message = registry::FinishAttemptRequest {
                job_id: self.plan.job_id.clone(),
                attempt: 1,
                outcome: Some(registry::finish_attempt_request::Outcome::Lost(lost.clone())),
                ..Default::default()
            };
            async move { client.finish_attempt(client::request(message, CALL_TIMEOUT)).await.map(drop) }
        };
        match until_answered(finish).await {
            Ok(()) => Ok(()),
            Err(error) if error.reason == Reason::StaleAttempt => Ok(()),
            Err(error) => Err(format!("its attempt can't be lost: {error}")),
        }
    }
}

/// Whether it is not known what became of a call.
fn is_silence(reason: Reason) -> bool {
    matches!(reason, Reason::PeerUnavailable | Reason::DeadlineExceeded | Reason::ShuttingDown)
}

async fn until_answered<F: Future<Output = Result<(), Status>>>(call: impl Fn() -> F) -> Result<(), Error> {
    loop {
        match call().await.map_err(Error::from) {
            Err(error) if is_silence(error.reason) || error.reason.retryable() => tokio::time::sleep(LOOK_EVERY).await,
            answer => return answer,
        }
    }
}
