//! Calls that are under way: to the registry until it has an opinion, to vmhosts once.
//!
//! Every mutation is idempotent, so a call whose outcome is unknown is made again, later and later.

use std::{collections::BTreeMap, collections::BTreeSet, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, NodeId, VmId},
    pb::{common::v1 as common, registry::v1 as registry, vmhost::v1 as vmhost},
    time::Timestamp,
};

use crate::engine::{OrderKey, Ticket};

/// The pause before a call is made again; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Up to this.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Names a call of one control loop.
pub type CallId = u64;

/// A call to another service.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "each is moved a few times on its way out; a box would be one more allocation"
)]
pub enum Call {
    CreateVm(registry::CreateVmRequest),
    TransitionVm(registry::TransitionVmRequest),
    AssignJob(registry::AssignJobRequest),
    FinishAttempt(registry::FinishAttemptRequest),
    FailQueuedJob(registry::FailQueuedJobRequest),
    GetJob(registry::GetJobRequest),
    StartVm(NodeId, vmhost::StartVmRequest),
    StopVm(NodeId, vmhost::StopVmRequest),
    RunJob(NodeId, vmhost::RunJobRequest),
    CancelJob(NodeId, vmhost::CancelJobRequest),
}

impl Call {
    /// The node whose vmhost is called; `None`: the registry is.
    #[must_use]
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::StartVm(node, _) | Self::StopVm(node, _) | Self::RunJob(node, _) | Self::CancelJob(node, _) => {
                Some(node)
            }
            Self::CreateVm(_)
            | Self::TransitionVm(_)
            | Self::AssignJob(_)
            | Self::FinishAttempt(_)
            | Self::FailQueuedJob(_)
            | Self::GetJob(_) => None,
        }
    }
}

/// What was answered, as far as anybody wants to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Vm(Box<common::Vm>),
    Job(Box<common::Job>),
    /// It was accepted.
    Done,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The engine, for a VM. `for_user`: and a user, who is told of every fault.
    Create {
        ticket: Ticket,
        vm_id: VmId,
        for_user: bool,
    },
    /// A user alone: this scheduler does not lead.
    CreateForUser {
        vm_id: VmId,
    },
    Assign {
        job_id: JobId,
        vm_id: VmId,
    },
    LookUp {
        job_id: JobId,
    },
    Tell {
        order: OrderKey,
    },
    /// Nobody: the watch tells what came of it.
    Note,
}

#[derive(Debug)]
struct Pending {
    call: Call,
    purpose: Purpose,
    /// The epoch under which it writes.
    epoch: u64,
    failures: u32,
}

/// What becomes of a call that was answered.
#[derive(Debug)]
pub(crate) enum Answered {
    /// It is over.
    Over { purpose: Purpose, epoch: u64, result: Result<Reply, Error> },
    /// It will be made again.
    Again,
    /// Nobody waits for it any more.
    Unknown,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    pending: BTreeMap<CallId, Pending>,
    again: BTreeSet<(Timestamp, CallId)>,
    next: CallId,
}

impl Calls {
    /// Notes a call that is about to be made.
    pub(crate) fn begin(&mut self, call: Call, purpose: Purpose, epoch: u64) -> (CallId, Call) {
        let id = self.next;
        self.next += 1;
        self.pending.insert(id, Pending { call: call.clone(), purpose, epoch, failures: 0 });
        (id, call)
    }

    pub(crate) fn answered(&mut self, now: Timestamp, id: CallId, result: Result<Reply, Error>) -> Answered {
        let Some(pending) = self.pending.get_mut(&id) else { return Answered::Unknown };
        if let Err(error) = &result
            && pending.is_made_again(error.reason)
        {
            let doublings = pending.failures.min(16);
            pending.failures += 1;
            let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(MAX_PAUSE);
            self.again.insert((now.plus(pause), id));
            return Answered::Again;
        }
        match self.pending.remove(&id) {
            Some(Pending { purpose, epoch, .. }) => Answered::Over { purpose, epoch, result },
            None => Answered::Unknown,
        }
    }

    /// Calls whose pause is over.
    pub(crate) fn due(&mut self, now: Timestamp) -> Vec<(CallId, Call)> {
        let mut due = Vec::new();
        while let Some(&(at, id)) = self.again.first()
            && at <= now
        {
            self.again.pop_first();
            if let Some(pending) = self.pending.get(&id) {
                due.push((id, pending.call.clone()));
            }
        }
        due
    }

    pub(crate) fn next_wake(&self) -> Option<Timestamp> {
        self.again.first().map(|(at, _)| *at)
    }

    /// The clock was set: what is to be made again is made now.
    pub(crate) fn clock_set(&mut self, now: Timestamp) {
        self.again = std::mem::take(&mut self.again).into_iter().map(|(_, id)| (now, id)).collect();
    }

    /// Gives up everything but what users wait for.
    pub(crate) fn give_up(&mut self) {
        self.pending.retain(|_, pending| match &pending.purpose {
            Purpose::Create { for_user, .. } => *for_user,
            Purpose::CreateForUser { .. } => true,
            Purpose::Assign { .. } | Purpose::LookUp { .. } | Purpose::Tell { .. } | Purpose::Note => false,
        });
    }
}

impl Pending {
    fn is_made_again(&self, reason: Reason) -> bool {
        let may_pass = reason.retryable() || reason == Reason::DeadlineExceeded;
        match &self.purpose {
            // The engine gives an order again, as it is by then.
            Purpose::Tell { .. } => false,
            // A fault of the registry's is the user's to hear of; nobody else would.
            Purpose::Create { for_user: true, .. } | Purpose::CreateForUser { .. } => may_pass,
            // Such as a full disk: what the engine wants it wants once, and would wait for ever.
            Purpose::Create { for_user: false, .. } | Purpose::Assign { .. } | Purpose::Note => {
                may_pass || reason == Reason::Internal
            }
            // Only this says that a job is gone.
            Purpose::LookUp { .. } => reason != Reason::JobNotFound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call::GetJob(registry::GetJobRequest::default())
    }

    fn away() -> Result<Reply, Error> {
        Err(Error::new(Reason::PeerUnavailable, "away"))
    }

    #[test]
    fn a_call_whose_outcome_is_unknown_is_made_again_later_and_later() {
        let mut calls = Calls::default();
        let (id, _) = calls.begin(call(), Purpose::Note, 1);
        let (mut now, mut pauses) = (Timestamp(0), Vec::new());
        for _ in 0..9 {
            assert!(matches!(calls.answered(now, id, away()), Answered::Again));
            let due = calls.next_wake().expect("made again");
            pauses.push(due.0 - now.0);
            assert!(calls.due(Timestamp(due.0 - 1)).is_empty());
            assert_eq!(calls.due(due), [(id, call())]);
            now = due;
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        assert!(matches!(calls.answered(now, id, Ok(Reply::Done)), Answered::Over { epoch: 1, .. }));
        assert!(matches!(calls.answered(now, id, Ok(Reply::Done)), Answered::Unknown), "once");
    }

    #[test]
    fn an_order_and_a_refusal_are_not_repeated() {
        let mut calls = Calls::default();
        let order = Purpose::Tell { order: OrderKey::Start(VmId(uuid::Uuid::nil())) };
        let (id, _) = calls.begin(call(), order, 1);
        assert!(matches!(calls.answered(Timestamp(0), id, away()), Answered::Over { .. }));
        let (id, _) = calls.begin(call(), Purpose::Note, 1);
        let refused = Err(Error::new(Reason::IllegalTransition, "no"));
        assert!(matches!(calls.answered(Timestamp(0), id, refused), Answered::Over { .. }));
    }

    #[test]
    fn who_leads_no_more_goes_on_only_with_what_users_wait_for() {
        let mut calls = Calls::default();
        let vm_id = VmId(uuid::Uuid::nil());
        let (own, _) = calls.begin(call(), Purpose::Create { ticket: 1, vm_id, for_user: false }, 1);
        let (users, _) = calls.begin(call(), Purpose::Create { ticket: 2, vm_id, for_user: true }, 1);
        calls.give_up();
        assert!(matches!(calls.answered(Timestamp(0), own, Ok(Reply::Done)), Answered::Unknown));
        assert!(matches!(calls.answered(Timestamp(0), users, Ok(Reply::Done)), Answered::Over { .. }));
    }
}
