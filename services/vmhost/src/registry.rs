//! What this node tells the registry, and asks it.

use std::{convert::Infallible, time::Duration};

use backon::{ExponentialBuilder, Retryable};
use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    job::JobState,
    limits::{MAX_MESSAGE_BYTES, MAX_PAGE_SIZE, MAX_REASON_BYTES},
    pb::{common::v1 as common, registry::v1 as pb},
    time::Timestamp,
    vm::{VmShape, VmState},
};
use blixard_chassis::{ReplicatedChannel, client};
use futures::stream;
use pb::registry_service_client::RegistryServiceClient;
use tokio::sync::mpsc;
use tonic::Code;
use uuid::Uuid;

use crate::{
    logs::{EndRecord, Outcome},
    node_lease,
};

/// How long the registry has to answer; a leader election takes a few seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a heartbeat may stay unanswered: a third of the registry's grace.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(5);
/// The first pause before a report is repeated; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// The registry, as seen from this node.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    client: RegistryServiceClient<ReplicatedChannel>,
    node_id: NodeId,
}

/// Repeats a call until the registry has answered it: with a result, or with an error that repeating can't change.
pub(crate) async fn until_answered<T, F>(what: &'static str, call: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let pauses = ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(MAX_PAUSE)
        .with_jitter()
        .without_max_times();
    let mut told = false;
    call.retry(pauses)
        .when(|error| !is_answer(error.reason))
        .notify(|error, _| {
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(what, %error, "the registry does not answer; trying again until it does");
            }
        })
        .await
}

/// A registry that is silent for longer is given up, and another replica tried.
async fn in_time<T>(answer: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Error> {
    match tokio::time::timeout(HEARTBEAT_TIMEOUT, answer).await {
        Ok(answer) => answer.map_err(Error::from),
        Err(_) => Err(Error::new(Reason::DeadlineExceeded, "the registry did not answer a heartbeat in time")),
    }
}

/// Whether an error is the registry's considered answer.
pub(crate) fn is_answer(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::StaleAttempt
            | Reason::StaleIncarnation
            | Reason::IllegalTransition
            | Reason::VmNotFound
            | Reason::VmNotAccepting
            | Reason::JobNotFound
            | Reason::NodeNotFound
            | Reason::InvalidField
    )
}

impl Registry {
    /// # Errors
    /// The endpoint is no `http://host:port`.
    pub(crate) fn new(endpoint: &str, node_id: NodeId) -> Result<Self, Error> {
        let client = RegistryServiceClient::new(ReplicatedChannel::new(endpoint)?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { client, node_id })
    }

    /// The node this is.
    pub(crate) fn node_id(&self) -> &NodeId {
        &self.node_id
    }

    pub(crate) async fn register(&self, request: pb::RegisterNodeRequest) -> Result<common::Node, Error> {
        let request = client::request(request, CALL_TIMEOUT);
        Ok(self.client.clone().register_node(request).await?.into_inner().node.unwrap_or_default())
    }

    /// Says that this node lives, as often as the registry wants to hear it, and tells of each time it was heard when it had said
    /// so; returns why that ended.
    pub(crate) async fn heartbeats(&self, incarnation: u64, heard: impl FnMut(Duration)) -> Error {
        match self.beat(incarnation, heard).await {
            Err(error) => error,
        }
    }

    async fn beat(&self, incarnation: u64, mut heard: impl FnMut(Duration)) -> Result<Infallible, Error> {
        let beat = pb::HeartbeatRequest { node_id: self.node_id.to_string(), incarnation };
        let (beats, outbound) = mpsc::channel(1);
        let outbound = stream::unfold(outbound, |mut outbound| async { Some((outbound.recv().await?, outbound)) });
        let mut client = self.client.clone();
        let mut answers = in_time(client.heartbeat(outbound)).await?.into_inner();
        loop {
            let sent = node_lease::now();
            // When the stream is over this fails, and the next answer tells why.
            let _ = beats.send(beat.clone()).await;
            let Some(answer) = in_time(answers.message()).await? else {
                return Err(Error::new(Reason::PeerUnavailable, "the registry ended the heartbeats"));
            };
            // One at a time: the answer belongs to the heartbeat before it.
            heard(sent);
            tokio::time::sleep(Duration::from_millis(answer.interval_ms.into())).await;
        }
    }

    /// A VM; `None` when there is none.
    pub(crate) async fn vm(&self, vm_id: VmId) -> Result<Option<common::Vm>, Error> {
        let request = client::request(pb::GetVmRequest { vm_id: vm_id.to_string() }, CALL_TIMEOUT);
        match self.client.clone().get_vm(request).await.map_err(Error::from) {
            Ok(answer) => Ok(answer.into_inner().vm),
            Err(error) if error.reason == Reason::VmNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The VMs of this node that have not ended.
    pub(crate) async fn vms_of_this_node(&self) -> Result<Vec<common::Vm>, Error> {
        let states = VmState::ALL.into_iter().filter(|state| !state.is_terminal());
        let mut request = pb::ListVmsRequest {
            page_size: MAX_PAGE_SIZE,
            states: states.map(|state| state.to_pb().into()).collect(),
            node_id: self.node_id.to_string(),
            ..Default::default()
        };
        let mut vms = Vec::new();
        loop {
            let page = self.client.clone().list_vms(client::request(request.clone(), CALL_TIMEOUT)).await?.into_inner();
            vms.extend(page.vms);
            if page.next_page_token.is_empty() {
                return Ok(vms);
            }
            request.page_token = page.next_page_token;
        }
    }

    pub(crate) async fn transition(
        &self,
        vm_id: VmId,
        to: VmState,
        expected_generation: u64,
        reason: &str,
    ) -> Result<(), Error> {
        let request = pb::TransitionVmRequest {
            vm_id: vm_id.to_string(),
            to_state: to.to_pb().into(),
            expected_generation,
            reason: cut(reason, MAX_REASON_BYTES).to_owned(),
            ..Default::default()
        };
        self.client.clone().transition_vm(client::request(request, CALL_TIMEOUT)).await?;
        Ok(())
    }

    /// Records the shape that a VM has now. With the same id again, however late, nothing more. A registry of an earlier version, which
    /// records no shapes, has nothing to wait for: the next vmhost that adopts the VM tells it again.
    pub(crate) async fn resize_vm(&self, vm_id: VmId, shape: VmShape, request_id: Uuid) -> Result<(), Error> {
        let request = pb::ResizeVmRequest {
            vm_id: vm_id.to_string(),
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
            request_id: request_id.to_string(),
            ..Default::default()
        };
        match self.client.clone().resize_vm(client::request(request, CALL_TIMEOUT)).await {
            Err(status) if status.code() == Code::Unimplemented => {
                tracing::warn!(%vm_id, %shape, "the registry is of a version that records no other shape of a VM");
                Ok(())
            }
            answer => Ok(answer.map(drop)?),
        }
    }

    pub(crate) async fn start_attempt(&self, job: JobId, attempt: u32, at: Timestamp) -> Result<(), Error> {
        let request = pb::StartAttemptRequest {
            job_id: job.to_string(),
            attempt,
            started_at: Some(at.into()),
            ..Default::default()
        };
        self.client.clone().start_attempt(client::request(request, CALL_TIMEOUT)).await?;
        Ok(())
    }

    pub(crate) async fn finish_attempt(&self, job: JobId, attempt: u32, end: &EndRecord) -> Result<(), Error> {
        let outcome = match &end.outcome {
            Outcome::Result { state, exit, reason } => pb::finish_attempt_request::Outcome::Result(pb::AttemptResult {
                state: state.to_pb().into(),
                exit: exit.map(Into::into),
                reason: cut(reason, MAX_REASON_BYTES).to_owned(),
                log_bytes: end.end_offset,
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
        let request = pb::FinishAttemptRequest { job_id, attempt, outcome: Some(outcome), ..Default::default() };
        self.client.clone().finish_attempt(client::request(request, CALL_TIMEOUT)).await?;
        Ok(())
    }

    /// Moves a VM that has no attempt to Draining; false when it has one now, or is on its way out already.
    pub(crate) async fn retire(&self, vm_id: VmId, reason: &str) -> Result<bool, Error> {
        let Some(vm) = self.vm(vm_id).await? else { return Ok(false) };
        if !VmState::from_pb("vm.state", vm.state)?.takes_jobs() {
            return Ok(false);
        }
        match self.transition(vm_id, VmState::Draining, vm.generation, reason).await {
            Err(error) if error.reason == Reason::StaleGeneration => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// What a job is given besides its spec; empty when it has ended.
    pub(crate) async fn job_input(&self, job: JobId) -> Result<common::JobInput, Error> {
        let request = client::request(pb::GetJobInputRequest { job_id: job.to_string() }, CALL_TIMEOUT);
        Ok(self.client.clone().get_job_input(request).await?.into_inner().input.unwrap_or_default())
    }

    /// Whether the registry has this attempt of a job under way on this VM.
    pub(crate) async fn is_current(&self, vm_id: VmId, job: JobId, attempt: u32) -> Result<bool, Error> {
        let request = client::request(pb::GetJobRequest { job_id: job.to_string() }, CALL_TIMEOUT);
        let job = match self.client.clone().get_job(request).await.map_err(Error::from) {
            Ok(answer) => answer.into_inner().job.unwrap_or_default(),
            Err(error) if error.reason == Reason::JobNotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let state = JobState::from_pb("job.state", job.state)?;
        let under_way = matches!(state, JobState::Assigned | JobState::Running);
        Ok(under_way && job.attempt == attempt && job.vm_id == vm_id.to_string())
    }

    /// Which of these jobs are not on record any more.
    pub(crate) async fn forgotten_jobs(&self, jobs: &[JobId]) -> Result<Vec<JobId>, Error> {
        let job_ids = jobs.iter().map(JobId::to_string).collect();
        let request = client::request(pb::FindForgottenJobsRequest { job_ids }, CALL_TIMEOUT);
        let answer = self.client.clone().find_forgotten_jobs(request).await?.into_inner();
        answer.job_ids.iter().map(|id| JobId::parse("job_ids", id)).collect()
    }

    /// Records the end of a VM of this node. An attempt that the registry gave it and that nobody reported is lost first;
    /// `started`: whether it may have begun. Done already, or not ours to end: fine.
    pub(crate) async fn end_vm(&self, vm_id: VmId, state: VmState, started: bool, reason: &str) -> Result<(), Error> {
        let Some(vm) = self.vm(vm_id).await? else { return Ok(()) };
        let now = VmState::from_pb("vm.state", vm.state)?;
        if now.is_terminal() || vm.node_id != self.node_id.as_str() {
            return Ok(());
        }
        if !vm.job_id.is_empty() {
            // First it takes no more jobs: as long as it looks free, the scheduler, which does not know yet, gives it the next
            // one as soon as one is lost, for ever.
            if now != VmState::Draining {
                self.transition(vm_id, VmState::Draining, 0, reason).await?;
                return Err(Error::new(Reason::StaleGeneration, "the VM changed"));
            }
            if self.lose_attempt(&vm, started, reason).await? {
                return Err(Error::new(Reason::StaleGeneration, "the VM changed"));
            }
        }
        let kind = blixard::vm::VmKind::from_pb("vm.config.kind", vm.config.unwrap_or_default().kind)?;
        let step = if now.may_go_to(state, kind) { state } else { VmState::Draining };
        self.transition(vm_id, step, vm.generation, reason).await?;
        if step == state { Ok(()) } else { Err(Error::new(Reason::StaleGeneration, "one step further")) }
    }

    /// Reports the current attempt of a VM's job as lost; false when it is over.
    async fn lose_attempt(&self, vm: &common::Vm, started: bool, reason: &str) -> Result<bool, Error> {
        let request = client::request(pb::GetJobRequest { job_id: vm.job_id.clone() }, CALL_TIMEOUT);
        let job = match self.client.clone().get_job(request).await.map_err(Error::from) {
            Ok(answer) => answer.into_inner().job.unwrap_or_default(),
            Err(error) if error.reason == Reason::JobNotFound => return Ok(false),
            Err(error) => return Err(error),
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
    let reason = cut(reason, MAX_REASON_BYTES).to_owned();
    pb::finish_attempt_request::Outcome::Lost(pb::AttemptLost { started, reason, lost_node: None })
}

/// The beginning of a text, at most `bytes` long.
pub(crate) fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
