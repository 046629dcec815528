//! What a vmhost tells the registry and asks it: as `registry.rs` and `reporter.rs` of the vmhost do, in the same order, each
//! thing until it is answered.

use std::time::Duration;

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::JobState,
    pb::{common::v1 as common, registry::v1 as pb},
    time::Timestamp,
    vm::{VmKind, VmState},
};
use blixard_vmhost::lifecycle::Outcome;

use super::disk::EndRecord;
use crate::{
    kernel::ProcessId,
    settings::Protection,
    wire::{Answer, RegistryCall, unexpected},
    world::World,
};

/// How long the registry has to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a heartbeat may stay unanswered.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);
/// The first pause before a report is repeated, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// Whether an error is the registry's considered answer.
pub fn is_answer(error: &Error) -> bool {
    matches!(
        error.reason,
        Reason::StaleAttempt
            | Reason::StaleIncarnation
            | Reason::IllegalTransition
            | Reason::VmNotFound
            | Reason::JobNotFound
            | Reason::NodeNotFound
            | Reason::InvalidField
    )
}

/// The registry, as seen from a node.
#[derive(Clone)]
pub struct Registry {
    pub world: World,
    pub process: ProcessId,
    pub node: NodeId,
}

impl Registry {
    async fn call(&self, call: RegistryCall) -> Result<Answer, Error> {
        self.world.call_registry(self.process, call, CALL_TIMEOUT).await
    }

    /// Repeats something until the registry has answered it.
    pub async fn until_answered<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: impl Fn() -> F,
    ) -> Result<T, Error> {
        let mut pause = PAUSES.0;
        loop {
            match what().await {
                Err(error) if !is_answer(&error) => {
                    self.world.kernel.sleep(pause + self.world.kernel.between(Duration::ZERO, pause)).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                answer => return answer,
            }
        }
    }

    pub async fn register(&self, request: pb::RegisterNodeRequest) -> Result<u64, Error> {
        match self.call(RegistryCall::RegisterNode(request)).await? {
            Answer::Node(node) => Ok(node.incarnation),
            other => Err(unexpected(&other)),
        }
    }

    /// One heartbeat: how long until the next.
    pub async fn heartbeat(&self, incarnation: u64) -> Result<Duration, Error> {
        let beat = pb::HeartbeatRequest { node_id: self.node.to_string(), incarnation };
        match self.world.call_registry(self.process, RegistryCall::Heartbeat(beat), HEARTBEAT_TIMEOUT).await? {
            Answer::Heartbeat(heard) => Ok(Duration::from_millis(heard.interval_ms.into())),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn vm(&self, vm_id: VmId) -> Result<Option<common::Vm>, Error> {
        match self.call(RegistryCall::GetVm(pb::GetVmRequest { vm_id: vm_id.to_string() })).await {
            Ok(Answer::Vm(vm)) => Ok(Some(vm)),
            Ok(other) => Err(unexpected(&other)),
            Err(error) if error.reason == Reason::VmNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub async fn vms_of_this_node(&self) -> Result<Vec<common::Vm>, Error> {
        let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
        let mut request = pb::ListVmsRequest {
            page_size: 1000,
            states: states.map(|state| state.to_pb().into()).collect(),
            node_id: self.node.to_string(),
            ..Default::default()
        };
        let mut vms = Vec::new();
        loop {
            let page = match self.call(RegistryCall::ListVms(request.clone())).await? {
                Answer::VmPage(page) => page,
                other => return Err(unexpected(&other)),
            };
            vms.extend(page.vms);
            if page.next_page_token.is_empty() {
                return Ok(vms);
            }
            request.page_token = page.next_page_token;
        }
    }

    pub async fn transition(&self, vm_id: VmId, to: VmState, generation: u64, reason: &str) -> Result<(), Error> {
        let request = pb::TransitionVmRequest {
            vm_id: vm_id.to_string(),
            to_state: to.to_pb().into(),
            expected_generation: generation,
            reason: reason.to_owned(),
            ..Default::default()
        };
        self.call(RegistryCall::TransitionVm(request)).await.map(drop)
    }

    pub async fn start_attempt(&self, job: JobId, attempt: u32, at: Timestamp) -> Result<(), Error> {
        let request = pb::StartAttemptRequest {
            job_id: job.to_string(),
            attempt,
            started_at: Some(at.into()),
            ..Default::default()
        };
        self.call(RegistryCall::StartAttempt(request)).await.map(drop)
    }

    pub async fn finish_attempt(&self, job: JobId, attempt: u32, end: &EndRecord) -> Result<(), Error> {
        let outcome = match &end.outcome {
            Outcome::Result { state, exit, reason } => pb::finish_attempt_request::Outcome::Result(pb::AttemptResult {
                state: state.to_pb().into(),
                exit: exit.map(Into::into),
                reason: reason.clone(),
                log_bytes: 0,
                finished_at: Some(end.finished_at.into()),
                started_at: end.started_at.map(Into::into),
            }),
            Outcome::Lost { started, reason } => lost(*started, reason),
        };
        self.finish(job.to_string(), attempt, outcome).await
    }

    async fn finish(
        &self,
        job_id: String,
        attempt: u32,
        outcome: pb::finish_attempt_request::Outcome,
    ) -> Result<(), Error> {
        let mut request = pb::FinishAttemptRequest { job_id, attempt, outcome: Some(outcome), ..Default::default() };
        if !self.world.protects(Protection::AttemptGuard) {
            // Whoever reports is believed: as the latest attempt.
            if let Ok(job) = self.job(&request.job_id).await {
                request.attempt = job.attempt;
            }
        }
        self.call(RegistryCall::FinishAttempt(request)).await.map(drop)
    }

    async fn job(&self, job_id: &str) -> Result<common::Job, Error> {
        match self.call(RegistryCall::GetJob(pb::GetJobRequest { job_id: job_id.to_owned() })).await? {
            Answer::Job(job) => Ok(*job),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether the registry has this attempt of a job under way on this VM.
    pub async fn is_current(&self, vm_id: VmId, job: JobId, attempt: u32) -> Result<bool, Error> {
        let job = match self.job(&job.to_string()).await {
            Err(error) if error.reason == Reason::JobNotFound => return Ok(false),
            answer => answer?,
        };
        let state = JobState::from_pb("job.state", job.state)?;
        let under_way = matches!(state, JobState::Assigned | JobState::Running);
        Ok(under_way && job.attempt == attempt && job.vm_id == vm_id.to_string())
    }

    /// Records the end of a VM of this node. An attempt that the registry gave it and that nobody reported is lost first.
    pub async fn end_vm(&self, vm_id: VmId, state: VmState, started: bool, reason: &str) -> Result<(), Error> {
        let Some(vm) = self.vm(vm_id).await? else { return Ok(()) };
        let now = VmState::from_pb("vm.state", vm.state)?;
        if now.is_terminal() || vm.node_id != self.node.as_str() {
            return Ok(());
        }
        if !vm.job_id.is_empty() && self.lose_attempt(&vm, started, reason).await? {
            return Err(Error::new(Reason::StaleGeneration, "the VM changed"));
        }
        let kind = VmKind::from_pb("vm.config.kind", vm.config.unwrap_or_default().kind)?;
        let step = if now.may_go_to(state, kind) { state } else { VmState::Draining };
        self.transition(vm_id, step, vm.generation, reason).await?;
        if step == state { Ok(()) } else { Err(Error::new(Reason::StaleGeneration, "one step further")) }
    }

    async fn lose_attempt(&self, vm: &common::Vm, started: bool, reason: &str) -> Result<bool, Error> {
        let job = match self.job(&vm.job_id).await {
            Err(error) if error.reason == Reason::JobNotFound => return Ok(false),
            answer => answer?,
        };
        let state = JobState::from_pb("job.state", job.state)?;
        if job.vm_id != vm.id || !matches!(state, JobState::Assigned | JobState::Running) {
            return Ok(false);
        }
        let started = started || state == JobState::Running;
        match self.finish(job.id, job.attempt, lost(started, reason)).await {
            Err(error) if error.reason == Reason::StaleAttempt => Ok(false),
            other => other.map(|()| true),
        }
    }
}

fn lost(started: bool, reason: &str) -> pb::finish_attempt_request::Outcome {
    pb::finish_attempt_request::Outcome::Lost(pb::AttemptLost { started, reason: reason.to_owned(), lost_node: None })
}
