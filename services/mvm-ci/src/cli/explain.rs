//! `mvm-ci job explain`: what the scheduler saw when it decided, in words and tables.

use blixard::{
    error::Error,
    job::{ExitStatus, Job, JobState},
    pb::{common::v1 as common, scheduler::v1 as pb},
    time::Timestamp,
};
use serde_json::{Value, json};

use super::{
    client::{Client, parse_job},
    failure::Failure,
    output::{self, Printer, dash, maybe_time, rfc3339, table, took},
};

/// See the module.
pub(crate) async fn explain(client: &Client, job_id: String, printer: &Printer) -> Result<(), Failure> {
    let request = pb::ExplainJobRequest { job_id };
    let answer = client.call(request, async |mut stub, request| stub.explain_job(request).await).await?;
    let explained = Explained::parse(answer)?;
    printer.print(|| explained.json(), || explained.text())
}

/// The answer, parsed.
struct Explained {
    job: Job,
    attempts: Vec<Attempt>,
    waiting: Option<common::Decision>,
}

/// One try of the job.
struct Attempt {
    told: common::Attempt,
    /// What it came to; `None`: it has not ended.
    state: Option<JobState>,
    exit: Option<ExitStatus>,
    late: Vec<(Timestamp, Option<JobState>, String)>,
}

fn state(value: i32) -> Result<Option<JobState>, Error> {
    if value == 0 { Ok(None) } else { JobState::from_pb("attempt.state", value).map(Some) }
}

impl Explained {
    fn parse(answer: pb::ExplainJobResponse) -> Result<Self, Error> {
        let attempts = answer.attempts.into_iter().map(Attempt::parse).collect::<Result<_, _>>()?;
        Ok(Self { job: parse_job(answer.job)?, attempts, waiting: answer.waiting })
    }

    fn json(&self) -> Value {
        json!({
            "job": output::job_json(&self.job),
            "attempts": self.attempts.iter().map(Attempt::json).collect::<Vec<_>>(),
            "waiting": self.waiting.as_ref().map(decision_json),
        })
    }

    fn text(&self) -> String {
        let because = if self.job.reason.is_empty() { String::new() } else { format!(": {}", self.job.reason) };
        let mut text = line(&format!("job {} is {}{because}", self.job.id, self.job.state));
        if let Some(decision) = &self.waiting {
            text += &decision_text(decision);
        }
        for attempt in &self.attempts {
            text.push('\n');
            text += &attempt.text();
        }
        text
    }
}

impl Attempt {
    fn parse(told: common::Attempt) -> Result<Self, Error> {
        let late = told.late_reports.iter().map(|report| {
            let time = report.at.map(Timestamp::from).unwrap_or_default();
            Ok((time, state(report.state)?, report.reason.clone()))
        });
        let late = late.collect::<Result<_, Error>>()?;
        let exit = told.exit.map(|exit| ExitStatus::parse("attempt.exit", exit)).transpose()?;
        Ok(Self { state: state(told.state)?, exit, late, told })
    }

    fn times(&self) -> [Option<Timestamp>; 3] {
        [self.told.assigned_at, self.told.started_at, self.told.finished_at].map(|time| time.map(Into::into))
    }

    fn kind(&self) -> &'static str {
        match self.told.assignment() {
            common::AssignmentKind::Ephemeral => "ephemeral",
            common::AssignmentKind::Service => "service",
            common::AssignmentKind::Unspecified => "-",
        }
    }

    fn json(&self) -> Value {
        let [assigned_at, started_at, finished_at] = self.times();
        let late = self.late.iter().map(
            |(at, state, reason)| json!({ "at": rfc3339(*at), "state": state.map(JobState::as_str), "reason": reason }),
        );
        json!({
            "attempt": self.told.attempt,
            "vm_id": self.told.vm_id,
            "node_id": self.told.node_id,
            "assignment": self.kind(),
            "state": self.state.map(JobState::as_str),
            "reported": self.told.reported,
            "exit": output::exit_json(self.exit.as_ref()),
            "reason": self.told.reason,
            "log_bytes": self.told.log_bytes,
            "assigned_at": maybe_time(assigned_at),
            "started_at": maybe_time(started_at),
            "finished_at": maybe_time(finished_at),
            "decision": self.told.decision.as_ref().map(decision_json),
            "late_reports": late.collect::<Vec<_>>(),
        })
    }

    /// How it went, in words.
    fn course(&self) -> String {
        let [_, started, finished] = self.times();
        let ran = match (started, finished) {
            (Some(started), Some(finished)) => format!(" after {}", took(finished.since(started))),
            (None, Some(_)) => " before it started".to_owned(),
            (_, None) => String::new(),
        };
        let exit = output::exit_text(self.exit.as_ref());
        let exit = if exit.is_empty() { String::new() } else { format!(" (exit {exit})") };
        let why = if self.told.reason.is_empty() { String::new() } else { format!(": {}", self.told.reason) };
        match (self.state, self.told.reported) {
            (None, _) if started.is_some() => format!("runs{why}"),
            (None, _) => format!("has not started{why}"),
            (Some(_), false) => format!("lost{ran}{why}"),
            (Some(state), true) => format!("{state}{ran}{exit}{why}"),
        }
    }

    fn text(&self) -> String {
        let told = &self.told;
        let place = format!("attempt {} on {} in {} VM {}", told.attempt, told.node_id, self.kind(), told.vm_id);
        let mut text = line(&format!("{place}: {}", self.course()));
        if let Some(decision) = &told.decision {
            text += &decision_text(decision);
        }
        for (at, state, reason) in &self.late {
            let said = state.map_or("lost", JobState::as_str);
            text += &line(&format!("  reported too late, {}: {said} {reason}", rfc3339(*at)));
        }
        text
    }
}

/// Others' words in a line of ours.
fn line(text: &str) -> String {
    format!("{}\n", output::printable(text.trim_end()))
}

fn decision_json(decision: &common::Decision) -> Value {
    let filters = decision.filters.iter().map(|filter| {
        json!({
            "name": filter.name, "considered": filter.considered, "passed": filter.passed, "example": filter.example,
        })
    });
    let candidates = decision.candidates.iter().map(|candidate| {
        json!({
            "node_id": candidate.node_id,
            "vm_id": (!candidate.vm_id.is_empty()).then_some(&candidate.vm_id),
            "score": candidate.score,
            "detail": candidate.detail,
        })
    });
    json!({
        "decided_at": maybe_time(decision.decided_at.map(Into::into)),
        "summary": decision.summary,
        "filters": filters.collect::<Vec<_>>(),
        "candidates": candidates.collect::<Vec<_>>(),
        "queue_position": decision.queue_position,
        "queue_length": decision.queue_length,
        "tenant": decision.tenant,
        "tenant_running": decision.tenant_running,
        "tenant_limit": decision.tenant_limit,
        "waited_ms": decision.waited_ms,
        "scheduler_epoch": decision.scheduler_epoch,
    })
}

fn decision_text(decision: &common::Decision) -> String {
    let mut text = line(&format!("  {}", decision.summary));
    let mut standing = vec![format!("waited {}", took(std::time::Duration::from_millis(decision.waited_ms)))];
    match (decision.queue_position, decision.queue_length) {
        (0, length) => standing.push(format!("jobs waiting: {length}")),
        (position, length) => standing.push(format!("place {position} of its tenant, jobs waiting: {length}")),
    }
    if !decision.tenant.is_empty() || decision.tenant_limit > 0 {
        let limit = match decision.tenant_limit {
            0 => String::new(),
            limit => format!(" of at most {limit}"),
        };
        let tenant = dash(decision.tenant.clone());
        standing.push(format!("tenant {tenant}: {}{limit} running", decision.tenant_running));
    }
    text += &line(&format!("  {}", standing.join("; ")));
    let indented = |table: String| table.lines().map(|line| format!("  {line}\n")).collect::<String>();
    if !decision.filters.is_empty() {
        let row = |filter: &common::DecisionFilter| {
            let passed = format!("{} of {}", filter.passed, filter.considered);
            vec![filter.name.clone(), passed, dash(filter.example.clone())]
        };
        text += &indented(table(
            &["FILTER", "PASSED", "WHO DID NOT"],
            &decision.filters.iter().map(row).collect::<Vec<_>>(),
        ));
    }
    if !decision.candidates.is_empty() {
        let row = |candidate: &common::DecisionCandidate| {
            let vm = if candidate.vm_id.is_empty() { "new".to_owned() } else { candidate.vm_id.clone() };
            vec![candidate.node_id.clone(), vm, candidate.score.to_string(), dash(candidate.detail.clone())]
        };
        text +=
            &indented(table(&["NODE", "VM", "SCORE", "WHY"], &decision.candidates.iter().map(row).collect::<Vec<_>>()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::tests::{CREATED, failed, queued};

    fn time(ms: i64) -> Option<prost_types::Timestamp> {
        Some(Timestamp(CREATED.0 + ms).into())
    }

    fn decision() -> common::Decision {
        let filter = |name: &str, considered, passed, example: &str| common::DecisionFilter {
            name: name.into(),
            considered,
            passed,
            example: example.into(),
        };
        let candidate = |node: &str, vm: &str, score, detail: &str| common::DecisionCandidate {
            node_id: node.into(),
            vm_id: vm.into(),
            score,
            detail: detail.into(),
        };
        common::Decision {
            decided_at: time(5),
            summary: "a new VM on node-1: the emptiest of 2 nodes".into(),
            filters: vec![filter("ready", 3, 2, "node-3 is Cordoned"), filter("memory", 2, 2, "")],
            candidates: vec![
                candidate("node-1", "", 900, "900 MiB free"),
                candidate("node-2", "00000000-0000-0000-0000-00000000000b", 300, "300 MiB free"),
            ],
            queue_length: 16,
            tenant: "ci".into(),
            tenant_running: 3,
            tenant_limit: 5,
            waited_ms: 1500,
            scheduler_epoch: 2,
            ..Default::default()
        }
    }

    fn attempt() -> common::Attempt {
        common::Attempt {
            attempt: 1,
            vm_id: "00000000-0000-0000-0000-00000000000a".into(),
            node_id: "node-1".into(),
            assignment: common::AssignmentKind::Service.into(),
            state: common::JobState::Queued.into(),
            reason: "node-1 was lost".into(),
            assigned_at: time(10),
            started_at: time(20),
            finished_at: time(1520),
            decision: Some(decision()),
            late_reports: vec![common::LateReport {
                at: time(9000),
                state: common::JobState::Succeeded.into(),
                reason: "exit 0".into(),
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_finished_and_a_waiting_job_are_explained_for_people_and_for_programs() {
        let ended = common::Attempt {
            attempt: 2,
            state: common::JobState::Failed.into(),
            reported: true,
            exit: Some(common::ExitStatus { exit_code: Some(7), ..Default::default() }),
            reason: String::new(),
            decision: None,
            late_reports: Vec::new(),
            ..attempt()
        };
        let finished =
            pb::ExplainJobResponse { job: Some(failed().into()), attempts: vec![attempt(), ended], waiting: None };
        let finished = Explained::parse(finished).expect("valid");
        let waiting = common::Decision {
            summary: "waits for memory\u{1b}[31m: node-1 has 100 MiB free".into(),
            queue_position: 4,
            candidates: Vec::new(),
            ..decision()
        };
        let waiting =
            pb::ExplainJobResponse { job: Some(queued().into()), attempts: Vec::new(), waiting: Some(waiting) };
        let waiting = Explained::parse(waiting).expect("valid");
        insta::assert_snapshot!(format!("{}\n---\n{}", finished.text(), waiting.text()));
        insta::assert_snapshot!(format!("{:#}", finished.json()["attempts"][0]));
    }
}
