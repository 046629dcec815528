//! What processes say to each other: the contract's own messages.

use std::fmt;

use blixard::{
    error::Error,
    job::JobState,
    pb::{common::v1 as common, registry::v1 as registry, scheduler::v1 as scheduler, vmhost::v1 as vmhost},
    vm::VmState,
};

/// A call.
#[derive(Debug, Clone)]
pub enum Call {
    /// To the registry.
    Registry(RegistryCall),
    /// To a vmhost.
    Host(HostCall),
    /// To a scheduler, by a user.
    Front(FrontCall),
}

/// A call to the registry.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "few are alive at once")]
pub enum RegistryCall {
    CreateVm(registry::CreateVmRequest),
    TransitionVm(registry::TransitionVmRequest),
    GetVm(registry::GetVmRequest),
    ListVms(registry::ListVmsRequest),
    CreateJob(registry::CreateJobRequest),
    CreateJobs(registry::CreateJobsRequest),
    AssignJob(registry::AssignJobRequest),
    StartAttempt(registry::StartAttemptRequest),
    FinishAttempt(registry::FinishAttemptRequest),
    CancelJob(registry::CancelJobRequest),
    FailQueuedJob(registry::FailQueuedJobRequest),
    GetJob(registry::GetJobRequest),
    ListJobs(registry::ListJobsRequest),
    RegisterNode(registry::RegisterNodeRequest),
    UpdateNode(registry::UpdateNodeRequest),
    ListNodes(registry::ListNodesRequest),
    Heartbeat(registry::HeartbeatRequest),
    AcquireLease(registry::AcquireLeaseRequest),
}

/// A call to a vmhost.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "few are alive at once")]
pub enum HostCall {
    StartVm(vmhost::StartVmRequest),
    StopVm(vmhost::StopVmRequest),
    RunJob(vmhost::RunJobRequest),
    CancelJob(vmhost::CancelJobRequest),
}

/// A user's call.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "few are alive at once")]
pub enum FrontCall {
    SubmitJob(scheduler::SubmitJobRequest),
    /// What the front door makes of SubmitJobGroup.
    SubmitJobs(registry::CreateJobsRequest),
    CancelJob(scheduler::CancelJobRequest),
    StartVm(scheduler::StartVmRequest),
    StopVm(scheduler::StopVmRequest),
    CordonNode(scheduler::CordonNodeRequest),
    UncordonNode(scheduler::UncordonNodeRequest),
    DrainNode(scheduler::DrainNodeRequest),
}

/// What is answered.
#[derive(Debug, Clone)]
pub enum Answer {
    Done,
    Vm(common::Vm),
    Job(Box<common::Job>),
    Jobs(Vec<common::Job>),
    Node(common::Node),
    VmPage(registry::ListVmsResponse),
    JobPage(registry::ListJobsResponse),
    NodePage(registry::ListNodesResponse),
    Heartbeat(registry::HeartbeatResponse),
    Lease(registry::AcquireLeaseResponse),
}

impl From<RegistryCall> for Call {
    fn from(call: RegistryCall) -> Self {
        Self::Registry(call)
    }
}

impl From<HostCall> for Call {
    fn from(call: HostCall) -> Self {
        Self::Host(call)
    }
}

impl From<FrontCall> for Call {
    fn from(call: FrontCall) -> Self {
        Self::Front(call)
    }
}

/// The first part of an id: enough for people to tell one from another.
#[must_use]
pub fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

fn vm_state(state: i32) -> String {
    VmState::from_pb("", state).map_or_else(|_| state.to_string(), |state| state.to_string())
}

fn job_state(state: i32) -> String {
    JobState::from_pb("", state).map_or_else(|_| state.to_string(), |state| state.to_string())
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(call) => call.fmt(f),
            Self::Host(call) => call.fmt(f),
            Self::Front(call) => call.fmt(f),
        }
    }
}

impl fmt::Display for RegistryCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateVm(call) => {
                write!(f, "CreateVm {} on {} e{}", short(&call.vm_id), call.node_id, call.scheduler_epoch)
            }
            Self::TransitionVm(call) => {
                write!(f, "TransitionVm {} {} e{}", short(&call.vm_id), vm_state(call.to_state), call.scheduler_epoch)
            }
            Self::GetVm(call) => write!(f, "GetVm {}", short(&call.vm_id)),
            Self::ListVms(call) => write!(f, "ListVms {}{}", call.node_id, call.page_token),
            Self::CreateJob(call) => write!(f, "CreateJob {}", short(&call.job_id)),
            Self::CreateJobs(call) => write!(f, "CreateJobs {}", call.jobs.len()),
            Self::AssignJob(call) => write!(
                f,
                "AssignJob {}#{} to {} e{}",
                short(&call.job_id),
                call.attempt,
                short(&call.vm_id),
                call.scheduler_epoch
            ),
            Self::StartAttempt(call) => write!(f, "StartAttempt {}#{}", short(&call.job_id), call.attempt),
            Self::FinishAttempt(call) => {
                let outcome = match &call.outcome {
                    Some(registry::finish_attempt_request::Outcome::Result(result)) => job_state(result.state),
                    Some(registry::finish_attempt_request::Outcome::Lost(lost)) => {
                        format!("lost, started {}", lost.started)
                    }
                    None => String::new(),
                };
                let (id, epoch) = (short(&call.job_id), call.scheduler_epoch);
                write!(f, "FinishAttempt {id}#{} {outcome} e{epoch}", call.attempt)
            }
            Self::CancelJob(call) => write!(f, "CancelJob {}", short(&call.job_id)),
            Self::FailQueuedJob(call) => {
                write!(f, "FailQueuedJob {} e{} {}", short(&call.job_id), call.scheduler_epoch, call.reason)
            }
            Self::GetJob(call) => write!(f, "GetJob {}", short(&call.job_id)),
            Self::ListJobs(call) => write!(f, "ListJobs {}", call.page_token),
            Self::RegisterNode(call) => {
                write!(f, "RegisterNode {}", call.node.as_ref().map_or("", |node| node.id.as_str()))
            }
            Self::UpdateNode(call) => write!(f, "UpdateNode {} {}", call.node_id, call.wanted().as_str_name()),
            Self::ListNodes(_) => write!(f, "ListNodes"),
            Self::Heartbeat(call) => write!(f, "Heartbeat {} {}", call.node_id, call.incarnation),
            Self::AcquireLease(call) => write!(f, "AcquireLease {} {}", call.holder, short(&call.instance)),
        }
    }
}

impl fmt::Display for HostCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StartVm(call) => write!(f, "StartVm {}", short(&call.vm_id)),
            Self::StopVm(call) => write!(f, "StopVm {} {:?}", short(&call.vm_id), call.grace_ms),
            Self::RunJob(call) => {
                write!(f, "RunJob {}#{} in {}", short(&call.job_id), call.attempt, short(&call.vm_id))
            }
            Self::CancelJob(call) => write!(f, "CancelJob {}#{}", short(&call.job_id), call.attempt),
        }
    }
}

impl fmt::Display for FrontCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SubmitJob(call) => write!(f, "SubmitJob {}", short(&call.request_id)),
            Self::SubmitJobs(call) => write!(f, "SubmitJobGroup of {}", call.jobs.len()),
            Self::CancelJob(call) => write!(f, "CancelJob {}", short(&call.job_id)),
            Self::StartVm(call) => write!(f, "StartVm {}", short(&call.request_id)),
            Self::StopVm(call) => write!(f, "StopVm {}", short(&call.vm_id)),
            Self::CordonNode(call) => write!(f, "CordonNode {}", call.node_id),
            Self::UncordonNode(call) => write!(f, "UncordonNode {}", call.node_id),
            Self::DrainNode(call) => write!(f, "DrainNode {} {:?}", call.node_id, call.deadline_ms),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => write!(f, "done"),
            Self::Vm(vm) => write!(f, "{} r{}", vm_state(vm.state), vm.revision),
            Self::Job(job) => write!(f, "{} #{} r{}", job_state(job.state), job.attempt, job.revision),
            Self::Jobs(jobs) => write!(f, "{} jobs", jobs.len()),
            Self::Node(node) => {
                write!(f, "{} incarnation {} r{}", node.state().as_str_name(), node.incarnation, node.revision)
            }
            Self::VmPage(page) => write!(f, "{} VMs r{}", page.vms.len(), page.revision),
            Self::JobPage(page) => write!(f, "{} jobs r{}", page.jobs.len(), page.revision),
            Self::NodePage(page) => write!(f, "{} nodes r{}", page.nodes.len(), page.revision),
            Self::Heartbeat(_) => write!(f, "heard"),
            Self::Lease(lease) => write!(f, "held {} by {} e{}", lease.held, lease.holder, lease.epoch),
        }
    }
}

/// An answer that is not of the call's kind: a fault of the simulation's.
#[must_use]
pub fn unexpected(answer: &Answer) -> Error {
    Error::new(blixard::error::Reason::Unspecified, format!("the simulation answered {answer}"))
}
