//! Tells the registry what became of one VM: in order, each thing until it is answered.

use std::{sync::Arc, time::Duration};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    time::Timestamp,
    vm::{VmShape, VmState},
};
use blixard_chassis::Tasks;
use tokio::{sync::mpsc, time::timeout};
use uuid::Uuid;

use crate::{
    driver::{Event, Reply},
    lifecycle::{Input, Stop},
    logs::{EndRecord, Outcome},
    registry::{Registry, until_answered},
};

/// Reports of one VM that wait for the registry. No VM gets another job before the last one's end is answered, so there are
/// at most Ready, Started, Finished and End, and none of another shape is begun while as many wait.
pub(crate) const REPORTS_QUEUED: usize = 8;

/// So long the start of a command waits for its end: what is over as soon is told in one. Nothing waits for the start.
const START_WITH_END: Duration = Duration::from_millis(5);

/// Something the registry is to know.
#[derive(Debug)]
pub(crate) enum Report {
    Ready,
    Started {
        job: JobId,
        attempt: u32,
        at: Timestamp,
    },
    Finished {
        job: JobId,
        attempt: u32,
        end: Arc<EndRecord>,
    },
    /// It has this shape now.
    Resized {
        shape: VmShape,
        /// Who waits until the registry knows, if anybody does.
        reply: Option<Reply>,
    },
    /// The last one. `started`: whether an attempt that this node does not remember may have begun.
    End {
        state: VmState,
        started: bool,
        reason: String,
    },
}

impl Report {
    /// Whether it tells what another one would: an attempt's end says when it started.
    fn tells(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Finished { job, attempt, end }, Self::Started { job: of, attempt: number, .. }) => {
                (job, attempt) == (of, number)
                    && end.started_at.is_some()
                    && matches!(end.outcome, Outcome::Result { .. })
            }
            _ => false,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Ready => "VM is Ready",
            Self::Started { .. } => "attempt started",
            Self::Finished { .. } => "attempt ended",
            Self::Resized { .. } => "VM resized",
            Self::End { .. } => "VM ended",
        }
    }
}

pub(crate) struct Reporter {
    registry: Registry,
    vm_id: VmId,
    events: mpsc::Sender<Event>,
}

impl Reporter {
    /// Starts the reports of a VM; [`Event::Reported`] follows the last one.
    pub(crate) fn spawn(
        registry: Registry,
        vm_id: VmId,
        events: mpsc::Sender<Event>,
        tasks: &Tasks,
    ) -> mpsc::Sender<Report> {
        let (sender, reports) = mpsc::channel(REPORTS_QUEUED);
        let reporter = Self { registry, vm_id, events };
        tasks.spawn_until_end("vm-report", reporter.run(reports));
        sender
    }

    async fn run(self, mut reports: mpsc::Receiver<Report>) {
        let mut next = reports.recv().await;
        while let Some(report) = next.take() {
            if matches!(report, Report::Started { .. }) {
                next = timeout(START_WITH_END, reports.recv()).await.unwrap_or_default();
            }
            if !next.as_ref().is_some_and(|next| next.tells(&report)) {
                // Boxed: what a call takes is not kept while there is nothing to tell.
                Box::pin(self.tell(report)).await;
            }
            if next.is_none() {
                next = reports.recv().await;
            }
        }
    }

    async fn tell(&self, report: Report) {
        let what = report.name();
        let request_id = Uuid::new_v4();
        let answer = until_answered(what, || self.deliver(&report, request_id)).await;
        if let Err(error) = &answer {
            self.refused(&report, error).await;
        }
        match report {
            Report::End { .. } => drop(self.events.send(Event::Reported).await),
            // Whoever asked may have gone.
            Report::Resized { reply: Some(reply), .. } => drop(reply.send(answer)),
            Report::Resized { reply: None, .. } | Report::Ready | Report::Started { .. } | Report::Finished { .. } => {}
        }
    }

    /// `request_id`: the report's, however often it is repeated. What has no attempt and is no step that comes once needs it: a copy that
    /// comes late would undo a later one.
    async fn deliver(&self, report: &Report, request_id: Uuid) -> Result<(), Error> {
        match report {
            Report::Ready => self.registry.transition(self.vm_id, VmState::Ready, 0, "").await,
            Report::Started { job, attempt, at } => self.registry.start_attempt(*job, *attempt, *at).await,
            Report::Finished { job, attempt, end } => self.registry.finish_attempt(*job, *attempt, end).await,
            Report::Resized { shape, .. } => self.registry.resize_vm(self.vm_id, *shape, request_id).await,
            Report::End { state, started, reason } => self.registry.end_vm(self.vm_id, *state, *started, reason).await,
        }
    }

    /// The registry has moved on. A VM that it takes for ended, or never heard of, must not live.
    async fn refused(&self, report: &Report, error: &Error) {
        tracing::info!(vm_id = %self.vm_id, %error, report = report.name(), "the registry has moved on");
        let ended = match error.metadata.get("from").and_then(|from| VmState::from_name(from)) {
            Some(from) => from.is_terminal(),
            None => error.reason == Reason::VmNotFound,
        };
        if ended && matches!(report, Report::Ready) {
            let reason = format!("the registry has no such VM: {error}");
            let stop = Stop { deadline: Timestamp::now(), reason };
            let _ = self.events.send(Event::Input(Input::Stop(stop))).await;
        }
    }
}
