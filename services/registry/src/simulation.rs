//! Test support: the registry without Raft, disk, clock and randomness, for simulations that call it directly.
//!
//! ```text
//!   Store: one method for each unary call ── rpc (parse) ─► mutation (the same guarded SQL) ─► SQLite in memory ─► verdict
//! ```
//! The schema, the statements, the verdicts and the reads are those of the service, and so is what the leader keeps in its
//! memory ([`Store::restart`] is what a new leader begins with). What is missing is what happens between them: every call is
//! a commit of its own, and takes place at once or not at all. The same calls with the same times give the same answers.
//!
//! A database that fails is a bug of the test support or of the schema, and panics.

#![expect(clippy::missing_panics_doc, reason = "see the module")]

use std::time::Duration;

use blixard::{
    error::{Error, Reason},
    id::NodeId,
    pb::registry::v1::{self as wire, WatchResponse},
    time::Timestamp,
};
use hiqlite::{
    Param,
    rusqlite::{Connection, params_from_iter, types::Value},
};

use crate::{
    change::{PageSize, Wanted, read_page},
    commit::{TRIES, read_rows},
    heartbeat::recorded,
    leases::{Asked, Leases},
    mutation::{Key, Mutation, Statement},
    presence::{Heard, Lost, NodeTiming, Presence},
    read::newest_revision,
    requests::{self, RequestId},
    retention::{Retention, next_step},
    rows::find_lease,
    rpc::{self, Command, LeaseRequest, PURGE_CHUNK, Question},
    schema,
    verdict::{Answer, Verdict, judge, node_not_found, stale_incarnation},
};

/// A registry in memory. See the module.
pub struct Store {
    database: Connection,
    timing: NodeTiming,
    presence: Presence,
    leases: Leases,
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident $request:ident $response:ident)*) => {
        $($(#[$doc])*
        ///
        /// # Errors
        /// As the contract says.
        pub fn $name(&mut self, now: Timestamp, request: wire::$request) -> Result<wire::$response, Error> {
            self.change(now, request)
        })*
    };
}

macro_rules! questions {
    ($($(#[$doc:meta])* $name:ident $request:ident $response:ident)*) => {
        $($(#[$doc])*
        ///
        /// # Errors
        /// As the contract says.
        pub fn $name(&self, _: Timestamp, request: wire::$request) -> Result<wire::$response, Error> {
            self.read(request)
        })*
    };
}

impl Store {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        let database = works(Connection::open_in_memory());
        works(schema::create(&database));
        database.set_prepared_statement_cache_capacity(256);
        let timing = NodeTiming::default();
        Self { database, timing, presence: Presence::new(timing), leases: Leases::new(timing.every) }
    }

    /// Another replica begins to lead: what the one before had in its memory is gone.
    pub fn restart(&mut self) {
        self.presence = Presence::new(self.timing);
        self.leases = Leases::new(self.timing.every);
    }

    commands! {
        /// `CreateVm`.
        create_vm CreateVmRequest CreateVmResponse
        /// `TransitionVm`.
        transition_vm TransitionVmRequest TransitionVmResponse
        /// `CreateJob`.
        create_job CreateJobRequest CreateJobResponse
        /// `AssignJob`.
        assign_job AssignJobRequest AssignJobResponse
        /// `StartAttempt`.
        start_attempt StartAttemptRequest StartAttemptResponse
        /// `FinishAttempt`.
        finish_attempt FinishAttemptRequest FinishAttemptResponse
        /// `CancelJob`.
        cancel_job CancelJobRequest CancelJobResponse
        /// `FailQueuedJob`.
        fail_queued_job FailQueuedJobRequest FailQueuedJobResponse
        /// `RegisterNode`.
        register_node RegisterNodeRequest RegisterNodeResponse
        /// `UpdateNode`.
        update_node UpdateNodeRequest UpdateNodeResponse
        /// `ResizeVm`.
        resize_vm ResizeVmRequest ResizeVmResponse
    }

    questions! {
        /// `GetVm`.
        get_vm GetVmRequest GetVmResponse
        /// `ListVms`.
        list_vms ListVmsRequest ListVmsResponse
        /// `ListVmEvents`.
        list_vm_events ListVmEventsRequest ListVmEventsResponse
        /// `GetJob`.
        get_job GetJobRequest GetJobResponse
        /// `GetJobInput`.
        get_job_input GetJobInputRequest GetJobInputResponse
        /// `ListJobs`.
        list_jobs ListJobsRequest ListJobsResponse
        /// `ListAttempts`.
        list_attempts ListAttemptsRequest ListAttemptsResponse
        /// `FindForgottenJobs`.
        find_forgotten_jobs FindForgottenJobsRequest FindForgottenJobsResponse
        /// `ListNodes`.
        list_nodes ListNodesRequest ListNodesResponse
        /// `GetCounts`.
        get_counts GetCountsRequest GetCountsResponse
    }

    /// `CreateJobs`.
    ///
    /// # Errors
    /// As the contract says.
    pub fn create_jobs(
        &mut self,
        now: Timestamp,
        request: wire::CreateJobsRequest,
    ) -> Result<wire::CreateJobsResponse, Error> {
        let Answer::Jobs(jobs) = self.submit(now, rpc::new_jobs(request)?, None)? else { wrong_answer() };
        Ok(wire::CreateJobsResponse { jobs })
    }

    /// `PurgeVms`.
    ///
    /// # Errors
    /// As the contract says.
    pub fn purge_vms(
        &mut self,
        now: Timestamp,
        request: wire::PurgeVmsRequest,
    ) -> Result<wire::PurgeVmsResponse, Error> {
        let (request, mut once) = requests::parse(request)?;
        let chunk = rpc::purge(&request)?;
        let mut purged = 0;
        loop {
            let Answer::Purged(count) = self.submit(now, chunk.clone(), once.clone())? else { wrong_answer() };
            purged += count as u64;
            if count < PURGE_CHUNK as usize {
                return Ok(wire::PurgeVmsResponse { purged });
            }
            once = once.map(|before| before.next_part());
        }
    }

    /// `GetRevision`.
    ///
    /// # Errors
    /// None.
    pub fn get_revision(&self, _: Timestamp, _: wire::GetRevisionRequest) -> Result<wire::GetRevisionResponse, Error> {
        Ok(wire::GetRevisionResponse { revision: works(newest_revision(&self.database)) })
    }

    /// `AcquireLease`.
    ///
    /// # Errors
    /// As the contract says.
    pub fn acquire_lease(
        &mut self,
        now: Timestamp,
        request: wire::AcquireLeaseRequest,
    ) -> Result<wire::AcquireLeaseResponse, Error> {
        let request = LeaseRequest::parse(request)?;
        loop {
            let change = match self.leases.ask(&request.name, &request.who, request.wish) {
                Asked::Stands(lease) => return Ok(request.response(lease)),
                Asked::Take { epoch } => Some(request.take(epoch)),
                Asked::Release => Some(request.give_up()),
                Asked::Unknown => None,
            };
            let lease = match change {
                None => works(find_lease(&self.database, &request.name)).unwrap_or_default(),
                Some(change) => match self.submit(now, change, None)? {
                    Answer::Lease(lease) => lease,
                    _ => wrong_answer(),
                },
            };
            self.leases.recorded(&request.name, lease);
        }
    }

    /// A heartbeat: how long until the next one is expected, or why there is no sense in another one.
    ///
    /// # Errors
    /// NODE_NOT_FOUND, STALE_INCARNATION.
    pub fn heard(&mut self, _: Timestamp, node_id: &str, incarnation: u64) -> Result<Duration, Error> {
        let id = NodeId::parse("node_id", node_id)?;
        let known = works(recorded(&self.database, node_id));
        let current = known.first().map(|node| node.incarnation).ok_or_else(|| node_not_found(&id))?;
        self.presence.recorded(known);
        match self.presence.heard(&id, incarnation) {
            Heard::Alive => Ok(self.timing.every),
            Heard::Over { .. } | Heard::Unknown => Err(stale_incarnation(&id, incarnation, current)),
        }
    }

    /// Time passes in which the registry listens: nodes that have been silent for too long become Lost at `now`, and leases that
    /// are not asked for run out.
    pub fn pass_time(&mut self, now: Timestamp, elapsed: Duration) {
        let mut left = elapsed;
        while !left.is_zero() {
            // As often as the service looks; it would not count more at once.
            let step = left.min(self.timing.every / 2);
            left -= step;
            self.leases.passed(step);
            self.presence.recorded(works(recorded(&self.database, "")));
            for Lost { id, incarnation } in self.presence.passed(step) {
                let reason = format!("not heard of for {:?}", self.timing.grace);
                match self.submit(now, Mutation::LoseNode { id, incarnation, reason }, None) {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.reason, Reason::StaleIncarnation, "{error}"),
                }
            }
        }
    }

    /// Forgets what is old, until nothing is.
    pub fn retain(&mut self, now: Timestamp, retention: &Retention) {
        while let Some(step) = works(next_step(&self.database, retention, now)) {
            let Answer::Purged(_) = works(self.submit(now, step, None)) else { wrong_answer() };
        }
    }

    /// What a watch that has come as far as `after` is sent: every change since, in their order.
    #[must_use]
    pub fn changes(&self, after: u64) -> Vec<WatchResponse> {
        let (mut changes, mut after) = (Vec::new(), after);
        let size = PageSize { changes: usize::MAX, bytes: usize::MAX };
        while after < works(newest_revision(&self.database)) {
            let page = works(read_page(&self.database, after, &Wanted::default(), size));
            changes.extend(page.changes.iter().map(|change| change.message.clone()));
            after = page.covers;
        }
        changes
    }

    fn change<C: Command>(&mut self, now: Timestamp, request: C) -> Result<C::Response, Error> {
        let (request, once) = requests::parse(request)?;
        let answer = self.submit(now, request.parse(now)?, once)?;
        Ok(C::response(answer).unwrap_or_else(|| wrong_answer()))
    }

    fn read<Q: Question>(&self, request: Q) -> Result<Q::Response, Error> {
        works(request.parse()?(&self.database))
    }

    fn submit(&mut self, now: Timestamp, mutation: Mutation, request: Option<RequestId>) -> Result<Answer, Error> {
        let mut unit = (mutation, request);
        for _ in 0..=TRIES {
            let verdict = commit(&self.database, std::slice::from_ref(&unit), now).pop();
            match verdict {
                Some(Verdict::Accepted(answer)) => return Ok(answer),
                Some(Verdict::Denied(error)) => return Err(error),
                Some(Verdict::Instead(mutation)) => unit = (*mutation, None),
                Some(Verdict::Again) | None => {}
            }
        }
        panic!("a change stays undecided: {unit:?}")
    }
}

/// Commits changes together, and what each came to.
pub(crate) fn commit(database: &Connection, units: &[(Mutation, Option<RequestId>)], now: Timestamp) -> Vec<Verdict> {
    let transaction = works(database.unchecked_transaction());
    let mut counts = Vec::new();
    for (mutation, request) in units {
        let statements = match request {
            Some(request) => request.once(mutation, now),
            None => mutation.statements(now),
        };
        counts.push(statements.into_iter().map(|statement| execute(database, statement)).last().unwrap_or(0));
    }
    works(transaction.commit());
    let rows = |keys: Vec<Key>| {
        let mut after = works(read_rows(database, keys));
        after.revision = works(newest_revision(database));
        after
    };
    let verdict = |((mutation, request), count): (&(Mutation, Option<RequestId>), usize)| match request {
        Some(request) => request.judge(mutation, &rows(vec![request.key()])),
        None => judge(mutation, count, &rows(mutation.shows())),
    };
    units.iter().zip(counts).map(verdict).collect()
}

/// Carries out a statement; the number of rows that it changed.
pub(crate) fn execute(database: &Connection, (sql, params): Statement) -> usize {
    let value = |param| match param {
        Param::Text(text) => Value::Text(text),
        Param::Blob(bytes) => Value::Blob(bytes),
        Param::Integer(number) => Value::Integer(number),
        Param::Real(number) => Value::Real(number),
        Param::Null => Value::Null,
        Param::StmtOutputIndexed(..) | Param::StmtOutputNamed(..) => panic!("{param:?} in {sql}"),
    };
    let mut statement = works(database.prepare_cached(&sql));
    works(statement.execute(params_from_iter(params.into_iter().map(value))))
}

fn works<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the registry in memory failed: {error:?}"),
    }
}

fn wrong_answer() -> ! {
    panic!("a change was answered with another kind of object")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use blixard::pb::{
        common::v1 as pb,
        registry::v1::{finish_attempt_request::Outcome, watch_event::Object, watch_response::Message},
    };
    use uuid::Uuid;

    use super::*;

    const NOW: Timestamp = Timestamp(1_764_000_000_123);

    fn later(ms: i64) -> Timestamp {
        Timestamp(NOW.0 + ms)
    }

    fn id(number: u128) -> String {
        Uuid::from_u128(number).to_string()
    }

    fn ms(time: Option<prost_types::Timestamp>) -> Option<i64> {
        time.map(|time| Timestamp::from(time).0 - NOW.0)
    }

    fn spec(change: impl FnOnce(&mut pb::JobSpec)) -> pb::JobSpec {
        let mut spec = pb::JobSpec {
            command: vec!["true".into()],
            vcpus: Some(1),
            memory_mib: Some(128),
            max_attempts: 3,
            retry_on: vec![pb::RetryOn::Lost.into(), pb::RetryOn::Failed.into()],
            ..Default::default()
        };
        change(&mut spec);
        spec
    }

    fn new_job(number: u128, spec: pb::JobSpec) -> wire::CreateJobRequest {
        wire::CreateJobRequest { job_id: id(number), spec: Some(spec), ..Default::default() }
    }

    fn with_input(number: u128, stdin: &str) -> wire::CreateJobRequest {
        let input = pb::JobInput { stdin: stdin.to_owned().into(), ..Default::default() };
        let spec = spec(|spec| spec.input_digest = vec![7; 32].into());
        wire::CreateJobRequest { input: Some(input), ..new_job(number, spec) }
    }

    fn input(store: &Store, number: u128) -> Option<String> {
        let request = wire::GetJobInputRequest { job_id: id(number) };
        let input = store.get_job_input(NOW, request).unwrap().input?;
        Some(String::from_utf8(input.stdin.to_vec()).unwrap())
    }

    /// A VM that takes jobs.
    fn ready_vm(store: &mut Store, number: u128) {
        let config = pb::VmConfig {
            kind: pb::VmKind::Service.into(),
            image: "default".into(),
            vcpus: Some(1),
            memory_mib: Some(512),
            ..Default::default()
        };
        let request = wire::CreateVmRequest {
            vm_id: id(number),
            config: Some(config),
            node_id: "n".into(),
            ..Default::default()
        };
        store.create_vm(NOW, request).unwrap();
        let request =
            wire::TransitionVmRequest { vm_id: id(number), to_state: pb::VmState::Ready.into(), ..Default::default() };
        store.transition_vm(NOW, request).unwrap();
    }

    fn assign(store: &mut Store, attempt: u32) -> pb::Job {
        let decision = pb::Decision { summary: format!("attempt {attempt}"), ..Default::default() };
        let request = wire::AssignJobRequest {
            job_id: id(1),
            vm_id: id(9),
            attempt,
            decision: Some(decision),
            ..Default::default()
        };
        store.assign_job(NOW, request).unwrap().job.unwrap()
    }

    fn result(attempt: u32, state: pb::JobState, exit_code: Option<i32>, reason: &str) -> wire::FinishAttemptRequest {
        let exit = exit_code.map(|code| pb::ExitStatus { exit_code: Some(code), ..Default::default() });
        let result = wire::AttemptResult {
            state: state.into(),
            exit,
            reason: reason.into(),
            log_bytes: 5,
            ..Default::default()
        };
        let outcome = Some(Outcome::Result(result));
        wire::FinishAttemptRequest { job_id: id(1), attempt, outcome, ..Default::default() }
    }

    #[test]
    fn a_short_command_tells_its_start_with_its_end() {
        let mut store = Store::new();
        store.create_job(NOW, new_job(1, spec(|_| {}))).unwrap();
        ready_vm(&mut store, 9);
        assign(&mut store, 1);
        let mut end = result(1, pb::JobState::Succeeded, Some(0), "");
        let Some(Outcome::Result(told)) = &mut end.outcome else { panic!("a result") };
        told.started_at = Some(Timestamp(7).into());
        let job = store.finish_attempt(NOW, end).unwrap().job.unwrap();
        assert_eq!((job.attempts_started, job.started_at.map(Timestamp::from)), (1, Some(Timestamp(7))));
    }

    #[test]
    fn who_cancelled_a_job_is_not_overwritten_by_how_it_ended() {
        let mut store = store_with_job(|_| {});
        assign(&mut store, 1);
        let cancel = wire::CancelJobRequest { job_id: id(1), reason: "wrong branch".into(), ..Default::default() };
        store.cancel_job(NOW, cancel).unwrap();
        let end = result(1, pb::JobState::Cancelled, None, "it was cancelled");
        assert_eq!(store.finish_attempt(NOW, end).unwrap().job.unwrap().reason, "wrong branch");
    }

    #[test]
    fn a_start_that_is_told_with_an_end_that_nobody_saw_counts() {
        let started = |told: Option<Timestamp>| {
            let mut store = store_with_job(|_| {});
            assign(&mut store, 1);
            let mut end = result(1, pb::JobState::TimedOut, None, "its end was not seen");
            let Some(Outcome::Result(result)) = &mut end.outcome else { panic!("a result") };
            result.started_at = told.map(Into::into);
            store.finish_attempt(NOW, end).unwrap().job.unwrap().attempts_started
        };
        assert_eq!((started(Some(Timestamp(7))), started(None)), (1, 0));
    }

    #[test]
    fn a_stop_that_is_asked_for_again_may_only_be_shortened() {
        let mut store = Store::new();
        let drain = |store: &mut Store, grace_ms| {
            let (vm_id, to_state) = (id(9), pb::VmState::Draining.into());
            let request = wire::TransitionVmRequest { vm_id, to_state, grace_ms, ..Default::default() };
            store.transition_vm(NOW, request).unwrap().vm.unwrap().stop_grace_ms
        };
        ready_vm(&mut store, 9);
        assert_eq!(drain(&mut store, None), None);
        assert_eq!(drain(&mut store, Some(5000)), Some(5000));
        assert_eq!(drain(&mut store, Some(9000)), Some(5000));
        assert_eq!(drain(&mut store, Some(0)), Some(0));
        assert_eq!(drain(&mut store, None), Some(0));
    }

    fn lost(attempt: u32, started: bool) -> wire::FinishAttemptRequest {
        let outcome = Some(Outcome::Lost(wire::AttemptLost { started, reason: "gone".into(), lost_node: None }));
        wire::FinishAttemptRequest { job_id: id(1), attempt, outcome, ..Default::default() }
    }

    /// Job 1 and VM 9.
    fn store_with_job(change: impl FnOnce(&mut pb::JobSpec)) -> Store {
        let mut store = Store::new();
        ready_vm(&mut store, 9);
        store.create_job(NOW, new_job(1, spec(change))).unwrap();
        store
    }

    fn attempts(store: &Store) -> Vec<pb::Attempt> {
        store.list_attempts(NOW, wire::ListAttemptsRequest { job_id: id(1) }).unwrap().attempts
    }

    #[test]
    fn a_failed_attempt_is_followed_by_another_after_a_pause_that_doubles_up_to_its_limit() {
        let mut store = store_with_job(|spec| {
            (spec.max_attempts, spec.backoff_ms, spec.max_backoff_ms) = (6, 1000, 3500);
        });
        let mut pauses = Vec::new();
        for attempt in 1..=6 {
            let assigned = assign(&mut store, attempt);
            assert_eq!((assigned.not_before, assigned.attempt), (None, attempt));
            let failed = result(attempt, pb::JobState::Failed, Some(1), "no");
            let job = store.finish_attempt(later(10), failed.clone()).unwrap().job.unwrap();
            // The same report again changes nothing, nor do those of the attempts before.
            assert_eq!(store.finish_attempt(later(20), failed).unwrap().job.unwrap(), job);
            let first = result(1, pb::JobState::Failed, Some(1), "no");
            assert_eq!(store.finish_attempt(later(20), first).unwrap().job.unwrap(), job);
            pauses.push((job.state(), ms(job.not_before), job.attempts_started));
            assert_eq!(job.finished_at.is_some(), attempt == 6);
            // The last one did not go back to the queue.
            assert_eq!(ms(job.queued_at), Some(10));
        }
        let queued = |pause: i64, started| (pb::JobState::Queued, Some(10 + pause), started);
        assert_eq!(
            pauses,
            [
                queued(1000, 1),
                queued(2000, 2),
                queued(3500, 3),
                queued(3500, 4),
                queued(3500, 5),
                (pb::JobState::Failed, None, 6)
            ]
        );
        let kept: Vec<_> = attempts(&store)
            .into_iter()
            .map(|a| (a.attempt, a.state(), a.reported, a.decision.unwrap().summary, a.exit.unwrap().exit_code))
            .collect();
        let expected: Vec<_> =
            (1..=6).map(|n| (n, pb::JobState::Failed, true, format!("attempt {n}"), Some(1))).collect();
        assert_eq!(kept, expected);
    }

    #[test]
    fn the_pause_is_the_one_that_the_spec_of_the_root_package_computes() {
        for (backoff_ms, max_backoff_ms) in [(0, 1000), (1, 3_600_000), (3_600_000, 3_600_000), (7, 10)] {
            let mut store = store_with_job(|spec| {
                (spec.max_attempts, spec.backoff_ms, spec.max_backoff_ms) = (100, backoff_ms, max_backoff_ms);
            });
            let job = store.get_job(NOW, wire::GetJobRequest { job_id: id(1) }).unwrap().job.unwrap();
            let retry = blixard::job::JobSpec::parse_full("", job.spec).unwrap().retry;
            for attempt in 1..=99 {
                assign(&mut store, attempt);
                let failed = result(attempt, pb::JobState::Failed, Some(1), "");
                let job = store.finish_attempt(NOW, failed).unwrap().job.unwrap();
                let pause = i64::try_from(retry.pause_after(attempt).as_millis()).unwrap();
                assert_eq!(ms(job.not_before), (pause > 0).then_some(pause), "{backoff_ms} {attempt}");
            }
        }
    }

    #[test]
    fn only_what_is_named_is_retried() {
        use pb::{JobState::*, RetryOn};
        let failed = || result(1, Failed, Some(1), "");
        let timed_out = || result(1, TimedOut, None, "");
        let cases: [(&[RetryOn], wire::FinishAttemptRequest, pb::JobState); 10] = [
            (&[], failed(), Failed),
            (&[], lost(1, true), Queued),
            (&[RetryOn::Failed], failed(), Queued),
            (&[RetryOn::Failed], timed_out(), TimedOut),
            (&[RetryOn::Failed], lost(1, true), Failed),
            // One that never started always goes back.
            (&[RetryOn::Failed], lost(1, false), Queued),
            (&[RetryOn::TimedOut], timed_out(), Queued),
            (&[RetryOn::TimedOut, RetryOn::Lost], failed(), Failed),
            (&[RetryOn::TimedOut, RetryOn::Failed], result(1, Succeeded, Some(0), ""), Succeeded),
            (&[RetryOn::TimedOut, RetryOn::Failed], result(1, Cancelled, None, ""), Cancelled),
        ];
        for (retry_on, outcome, expected) in cases {
            let mut store = store_with_job(|spec| spec.retry_on = retry_on.iter().map(|&on| on.into()).collect());
            assign(&mut store, 1);
            let job = store.finish_attempt(NOW, outcome.clone()).unwrap().job.unwrap();
            assert_eq!(job.state(), expected, "{retry_on:?} {outcome:?}");
        }
        // Nor is what somebody wants to end.
        let mut store = store_with_job(|spec| spec.retry_on = vec![RetryOn::Failed.into()]);
        assign(&mut store, 1);
        store.cancel_job(NOW, wire::CancelJobRequest { job_id: id(1), ..Default::default() }).unwrap();
        assert_eq!(store.finish_attempt(NOW, failed()).unwrap().job.unwrap().state(), Failed);
    }

    #[test]
    fn a_command_that_can_not_be_run_is_not_tried_for_ever() {
        let mut store = store_with_job(|spec| spec.max_attempts = 3);
        let mut states = Vec::new();
        for attempt in 1..=3 {
            assign(&mut store, attempt);
            let job = store.finish_attempt(NOW, result(attempt, pb::JobState::Failed, None, "no such file")).unwrap();
            states.push(job.job.unwrap().state());
        }
        assert_eq!(states, [pb::JobState::Queued, pb::JobState::Queued, pb::JobState::Failed]);
    }

    #[test]
    fn a_lost_attempt_that_never_started_costs_neither_a_try_nor_a_pause() {
        let mut store = store_with_job(|spec| (spec.max_attempts, spec.backoff_ms) = (2, 1000));
        assign(&mut store, 1);
        let job = store.finish_attempt(NOW, lost(1, false)).unwrap().job.unwrap();
        assert_eq!((job.state(), job.attempts_started, job.not_before), (pb::JobState::Queued, 0, None));
        assign(&mut store, 2);
        let job = store.finish_attempt(NOW, lost(2, true)).unwrap().job.unwrap();
        assert_eq!((job.state(), job.attempts_started, ms(job.not_before)), (pb::JobState::Queued, 1, Some(1000)));
        let kept: Vec<_> = attempts(&store).iter().map(|a| (a.attempt, a.state(), a.reported)).collect();
        assert_eq!(kept, [(1, pb::JobState::Queued, false), (2, pb::JobState::Queued, false)]);
    }

    #[test]
    fn a_late_report_is_refused_and_kept_once_and_no_more_than_ten_are() {
        let mut store = store_with_job(|_| {});
        assign(&mut store, 1);
        store.finish_attempt(NOW, lost(1, true)).unwrap();
        assign(&mut store, 2);
        let refused = |store: &mut Store, report| store.finish_attempt(later(5), report).unwrap_err().reason;
        for _ in 0..2 {
            assert_eq!(refused(&mut store, result(1, pb::JobState::Succeeded, Some(0), "done")), Reason::StaleAttempt);
        }
        // What it came to, again, is no late report of it.
        assert_eq!(store.finish_attempt(later(5), lost(1, true)).unwrap().job.unwrap().attempt, 2);
        // There is no such attempt.
        assert_eq!(refused(&mut store, result(3, pb::JobState::Failed, None, "")), Reason::StaleAttempt);
        let late = &attempts(&store)[0].late_reports;
        assert_eq!(late.len(), 1);
        assert_eq!(
            (late[0].state(), late[0].reason.as_str(), ms(late[0].at)),
            (pb::JobState::Succeeded, "done", Some(5))
        );
        for number in 0..20 {
            refused(&mut store, result(1, pb::JobState::Failed, None, &number.to_string()));
        }
        let kept: Vec<_> = attempts(&store).iter().map(|attempt| attempt.late_reports.len()).collect();
        assert_eq!(kept, [10, 0]);
    }

    #[test]
    fn a_late_report_under_a_request_id_is_answered_alike_each_time() {
        let mut store = store_with_job(|_| {});
        assign(&mut store, 1);
        store.finish_attempt(NOW, lost(1, true)).unwrap();
        let late = wire::FinishAttemptRequest { request_id: id(77), ..result(1, pb::JobState::Succeeded, Some(0), "") };
        let first = store.finish_attempt(later(5), late.clone()).unwrap_err();
        assert_eq!(first.reason, Reason::StaleAttempt);
        assert_eq!(store.finish_attempt(later(6), late).unwrap_err(), first);
        assert_eq!(attempts(&store)[0].late_reports.len(), 1);
    }

    fn lease(holder: &str, instance: u128, release: bool) -> wire::AcquireLeaseRequest {
        wire::AcquireLeaseRequest {
            name: "scheduler".into(),
            holder: holder.into(),
            instance: id(instance),
            ttl_ms: 5000,
            release,
        }
    }

    fn asked(store: &mut Store, request: wire::AcquireLeaseRequest) -> (bool, u64, String) {
        let wire::AcquireLeaseResponse { held, epoch, holder } = store.acquire_lease(NOW, request).unwrap();
        (held, epoch, holder)
    }

    #[test]
    fn a_scheduler_that_leads_no_more_changes_nothing() {
        let mut store = store_with_job(|_| {});
        assert_eq!(asked(&mut store, lease("a", 1, false)), (true, 1, "a".into()));
        store.pass_time(NOW, Duration::from_secs(4));
        assert_eq!(asked(&mut store, lease("b", 1, false)), (false, 1, "a".into()));
        store.pass_time(NOW, Duration::from_secs(2));
        assert_eq!(asked(&mut store, lease("b", 1, false)), (true, 2, "b".into()));
        let revision = store.get_revision(NOW, wire::GetRevisionRequest {}).unwrap().revision;
        let assign = |scheduler_epoch| wire::AssignJobRequest {
            job_id: id(1),
            vm_id: id(9),
            attempt: 1,
            scheduler_epoch,
            ..Default::default()
        };
        let fail =
            wire::FailQueuedJobRequest { job_id: id(1), reason: "no".into(), scheduler_epoch: 1, ..Default::default() };
        let stop = wire::TransitionVmRequest {
            vm_id: id(9),
            to_state: pb::VmState::Draining.into(),
            scheduler_epoch: 1,
            ..Default::default()
        };
        let create = wire::CreateVmRequest {
            vm_id: id(8),
            config: store.get_vm(NOW, wire::GetVmRequest { vm_id: id(9) }).unwrap().vm.unwrap().config,
            node_id: "n".into(),
            scheduler_epoch: 1,
            ..Default::default()
        };
        let refusals = [
            store.assign_job(NOW, assign(1)).unwrap_err(),
            store.assign_job(NOW, assign(3)).unwrap_err(),
            store.fail_queued_job(NOW, fail).unwrap_err(),
            store.transition_vm(NOW, stop).unwrap_err(),
            store.create_vm(NOW, create).unwrap_err(),
            store.finish_attempt(NOW, wire::FinishAttemptRequest { scheduler_epoch: 1, ..lost(1, false) }).unwrap_err(),
        ];
        for (at, error) in refusals.iter().enumerate() {
            let epoch = if at == 1 { "3" } else { "1" };
            let expected: BTreeMap<_, _> =
                [("current".to_owned(), "2".to_owned()), ("epoch".to_owned(), epoch.to_owned())].into();
            assert_eq!((error.reason, &error.metadata), (Reason::StaleEpoch, &expected), "{at}");
        }
        assert_eq!(store.get_revision(NOW, wire::GetRevisionRequest {}).unwrap().revision, revision);
        // The one that leads does, and who is no scheduler.
        assert!(store.assign_job(NOW, assign(2)).is_ok());
        assert!(store.finish_attempt(NOW, lost(1, false)).is_ok());
    }

    #[test]
    fn a_refusal_of_a_stale_scheduler_stays_one_under_its_request_id() {
        let mut store = store_with_job(|_| {});
        asked(&mut store, lease("a", 1, false));
        let assign = wire::AssignJobRequest {
            job_id: id(1),
            vm_id: id(9),
            attempt: 1,
            scheduler_epoch: 2,
            request_id: id(5),
            ..Default::default()
        };
        let first = store.assign_job(NOW, assign.clone()).unwrap_err();
        assert_eq!(first.reason, Reason::StaleEpoch);
        asked(&mut store, lease("a", 2, false));
        assert_eq!(store.assign_job(NOW, assign).unwrap_err(), first);
    }

    #[test]
    fn a_lease_is_given_up_taken_over_by_the_next_start_and_outlives_a_new_leader() {
        let mut store = Store::new();
        assert_eq!(asked(&mut store, lease("a", 1, false)), (true, 1, "a".into()));
        assert_eq!(asked(&mut store, lease("a", 2, false)), (true, 2, "a".into()));
        store.pass_time(NOW, Duration::from_secs(4));
        store.restart();
        store.pass_time(NOW, Duration::from_secs(4));
        assert_eq!(asked(&mut store, lease("b", 1, false)), (false, 2, "a".into()));
        assert_eq!(asked(&mut store, lease("b", 1, true)), (false, 2, "a".into()));
        assert_eq!(asked(&mut store, lease("a", 2, true)), (false, 2, String::new()));
        assert_eq!(asked(&mut store, lease("b", 1, false)), (true, 3, "b".into()));
    }

    #[test]
    fn what_a_node_is_short_of_is_what_it_said_last() {
        use pb::HostPressure::{Disk, Memory};
        let mut store = Store::new();
        let mut register = |pressure: &[pb::HostPressure]| {
            // One that this program does not know is of a newer one.
            let pressure = pressure.iter().map(|&pressure| pressure.into()).chain([99]).collect();
            let node =
                pb::Node { id: "n".into(), endpoint: "http://h:1".into(), max_vms: 1, pressure, ..Default::default() };
            let request = wire::RegisterNodeRequest { node: Some(node), ..Default::default() };
            let node = store.register_node(NOW, request).unwrap().node.unwrap();
            let listed = store.list_nodes(NOW, wire::ListNodesRequest::default()).unwrap().nodes[0].clone();
            assert_eq!(node, listed);
            node.pressure
        };
        let known = |pressure: pb::HostPressure| i32::from(pressure);
        assert_eq!(register(&[]), [] as [i32; 0]);
        assert_eq!(register(&[Disk, Memory]), [Memory, Disk].map(known));
        assert_eq!(register(&[Memory]), [known(Memory)]);
        assert_eq!(register(&[]), [] as [i32; 0]);
    }

    #[test]
    fn a_node_is_what_is_wanted_of_it_unless_it_is_lost_and_comes_back_as_that() {
        let mut store = Store::new();
        let register = |labels: &[(&str, &str)]| {
            let labels = labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
            let node =
                pb::Node { id: "n".into(), endpoint: "http://h:1".into(), max_vms: 1, labels, ..Default::default() };
            wire::RegisterNodeRequest { node: Some(node), ..Default::default() }
        };
        let update = |wanted: pb::NodeState, reason: &str, deadline: Option<Timestamp>| wire::UpdateNodeRequest {
            node_id: "n".into(),
            wanted: wanted.into(),
            reason: reason.into(),
            drain_deadline: deadline.map(Into::into),
            ..Default::default()
        };
        let unknown = store.update_node(NOW, update(pb::NodeState::Ready, "", None)).unwrap_err();
        assert_eq!(unknown.reason, Reason::NodeNotFound);
        let node = store.register_node(NOW, register(&[("disk", "ssd")])).unwrap().node.unwrap();
        assert_eq!((node.state(), node.wanted(), node.labels.len()), (pb::NodeState::Ready, pb::NodeState::Ready, 1));

        let draining = update(pb::NodeState::Draining, "new kernel", Some(later(1000)));
        let node = store.update_node(NOW, draining.clone()).unwrap().node.unwrap();
        assert_eq!((node.state(), node.wanted()), (pb::NodeState::Draining, pb::NodeState::Draining));
        assert_eq!((node.reason.as_str(), ms(node.drain_deadline)), ("new kernel", Some(1000)));
        // What is wanted already is no change.
        assert_eq!(store.update_node(later(1), draining).unwrap().node.unwrap(), node);

        assert!(store.heard(NOW, "n", 1).is_ok());
        store.pass_time(later(20), Duration::from_secs(20));
        let list = |store: &Store| store.list_nodes(NOW, wire::ListNodesRequest::default()).unwrap().nodes[0].clone();
        let node = list(&store);
        assert_eq!((node.state(), node.wanted()), (pb::NodeState::Lost, pb::NodeState::Draining));
        assert_eq!(store.heard(NOW, "n", 1).unwrap_err().reason, Reason::StaleIncarnation);

        let node = store.update_node(NOW, update(pb::NodeState::Cordoned, "disk", None)).unwrap().node.unwrap();
        assert_eq!(
            (node.state(), node.wanted(), node.drain_deadline),
            (pb::NodeState::Lost, pb::NodeState::Cordoned, None)
        );
        assert_ne!(node.reason, "disk");
        let node = store.register_node(NOW, register(&[])).unwrap().node.unwrap();
        assert_eq!((node.state(), node.incarnation, node.reason.as_str()), (pb::NodeState::Cordoned, 2, "disk"));
        assert!(node.labels.is_empty());

        for wrong in [update(pb::NodeState::Lost, "", None), update(pb::NodeState::Ready, "", Some(NOW))] {
            assert_eq!(store.update_node(NOW, wrong).unwrap_err().reason, Reason::InvalidField);
        }
    }

    #[test]
    fn an_input_is_kept_until_the_job_has_ended() {
        let mut store = Store::new();
        ready_vm(&mut store, 9);
        store.create_job(NOW, with_input(1, "hello")).unwrap();
        assert_eq!(input(&store, 1).as_deref(), Some("hello"));
        assign(&mut store, 1);
        store.finish_attempt(NOW, result(1, pb::JobState::Failed, Some(1), "")).unwrap();
        assert_eq!(input(&store, 1).as_deref(), Some("hello"));
        assign(&mut store, 2);
        store.finish_attempt(NOW, result(2, pb::JobState::Succeeded, Some(0), "")).unwrap();
        assert_eq!(input(&store, 1), None);
        // A repeat of its creation does not bring it back.
        store.create_job(NOW, with_input(1, "hello")).unwrap();
        assert_eq!(input(&store, 1), None);
        for end in ["cancelled", "failed"] {
            let job = if end == "failed" { 2 } else { 3 };
            store.create_job(NOW, with_input(job, end)).unwrap();
            assert_eq!(input(&store, job).as_deref(), Some(end));
            let fail = wire::FailQueuedJobRequest {
                job_id: id(job),
                reason: "waited".into(),
                timed_out: true,
                ..Default::default()
            };
            let ended = match end {
                "failed" => store.fail_queued_job(NOW, fail).unwrap().job.unwrap(),
                _ => {
                    let cancel = wire::CancelJobRequest { job_id: id(job), ..Default::default() };
                    store.cancel_job(NOW, cancel).unwrap().job.unwrap()
                }
            };
            let expected = if end == "failed" { pb::JobState::TimedOut } else { pb::JobState::Cancelled };
            assert_eq!((ended.state(), input(&store, job)), (expected, None));
        }
    }

    #[test]
    fn inputs_that_do_not_fit_their_spec_and_secrets_in_clear_are_refused() {
        let mut store = Store::new();
        let clear = pb::JobInput { secrets: [("A".to_owned(), "secret".to_owned())].into(), ..Default::default() };
        let cases = [
            ("input.secrets", wire::CreateJobRequest { input: Some(clear), ..with_input(1, "") }),
            ("input", wire::CreateJobRequest { input: None, ..with_input(1, "") }),
            ("spec.input_digest", wire::CreateJobRequest { spec: Some(spec(|_| {})), ..with_input(1, "") }),
            ("input", with_input(1, &"x".repeat(700 << 10))),
        ];
        for (field, request) in cases {
            let error = store.create_job(NOW, request).unwrap_err();
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(field), "{error}");
        }
    }

    #[test]
    fn jobs_are_created_together_or_not_at_all() {
        let mut store = Store::new();
        let group = Uuid::from_u128(500).to_string();
        let member = |number: u128| {
            let spec = spec(|spec| {
                (spec.group_id, spec.array_index) = (group.clone(), u32::try_from(number).unwrap());
            });
            new_job(number, spec)
        };
        let request = |jobs: Vec<wire::CreateJobRequest>| wire::CreateJobsRequest { jobs };
        let whole = || request(vec![member(1), with_input(2, "two"), member(3)]);
        let jobs = store.create_jobs(NOW, whole()).unwrap().jobs;
        let made: Vec<_> = jobs.iter().map(|job| (job.id.clone(), job.revision, job.state())).collect();
        assert_eq!(made, [1, 2, 3].map(|n| (id(n), u64::try_from(n).unwrap(), pb::JobState::Queued)));
        assert_eq!(ms(jobs[0].queued_at), Some(0));
        assert_eq!(input(&store, 2).as_deref(), Some("two"));
        let seen: Vec<_> = store
            .changes(0)
            .into_iter()
            .map(|change| match change.message {
                Some(Message::Event(wire::WatchEvent { object: Some(Object::Job(job)), .. })) => {
                    (change.revision, job.id)
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(seen, [(1, id(1)), (2, id(2)), (3, id(3))]);
        // A repeat finds them.
        assert_eq!(store.create_jobs(NOW, whole()).unwrap().jobs, jobs);
        // One that is there already, or stands for another, and none is made.
        let refused = |store: &mut Store, jobs| {
            let error = store.create_jobs(NOW, request(jobs)).unwrap_err();
            (error.reason, error.metadata.get("field").cloned().unwrap_or_default())
        };
        let other = new_job(1, spec(|spec| spec.priority = 5));
        assert_eq!(refused(&mut store, vec![member(4), other]), (Reason::RequestIdReused, "jobs[1].job_id".into()));
        assert_eq!(refused(&mut store, vec![member(4), member(3)]), (Reason::RequestIdReused, "jobs[1].job_id".into()));
        let bad = new_job(5, spec(|spec| spec.command.clear()));
        assert_eq!(refused(&mut store, vec![member(4), bad]), (Reason::InvalidField, "jobs[1].spec.command".into()));
        assert_eq!(refused(&mut store, vec![member(4), member(4)]), (Reason::InvalidField, "jobs[1].job_id".into()));
        assert_eq!(refused(&mut store, vec![]), (Reason::InvalidField, "jobs".into()));
        let forgotten = wire::FindForgottenJobsRequest { job_ids: vec![id(1), id(4), id(3)] };
        assert_eq!(store.find_forgotten_jobs(NOW, forgotten).unwrap().job_ids, [id(4)]);
        let list = wire::ListJobsRequest { group_id: group, ..Default::default() };
        let listed: Vec<_> = store.list_jobs(NOW, list).unwrap().jobs.into_iter().map(|job| job.id).collect();
        assert_eq!(listed, [id(3), id(1)]);
    }

    #[test]
    fn a_thousand_jobs_are_one_group() {
        let mut store = Store::new();
        let jobs = (1..=1000).map(|number| new_job(number, spec(|_| {}))).collect();
        assert_eq!(store.create_jobs(NOW, wire::CreateJobsRequest { jobs }).unwrap().jobs.len(), 1000);
    }

    #[test]
    fn a_job_is_kept_as_long_as_it_says_and_takes_with_it_what_is_known_of_it() {
        let mut store = store_with_job(|spec| spec.result_ttl_ms = 2000);
        assign(&mut store, 1);
        store.finish_attempt(NOW, lost(1, true)).unwrap();
        store.finish_attempt(NOW, result(1, pb::JobState::Succeeded, Some(0), "")).unwrap_err();
        assign(&mut store, 2);
        store.finish_attempt(later(500), result(2, pb::JobState::Succeeded, Some(0), "")).unwrap();
        store.create_job(NOW, new_job(2, spec(|spec| spec.result_ttl_ms = 365 * 24 * 3_600_000))).unwrap();
        store.create_job(NOW, new_job(3, spec(|_| {}))).unwrap();
        for job in [2, 3] {
            store.cancel_job(NOW, wire::CancelJobRequest { job_id: id(job), ..Default::default() }).unwrap();
        }
        let day = Duration::from_secs(24 * 3600);
        let retention =
            Retention { events_for: day * 1000, max_events: 1_000_000, ended_for: day * 30, look_every: day };
        let forgotten = |store: &Store| {
            let job_ids = vec![id(1), id(2), id(3)];
            store.find_forgotten_jobs(NOW, wire::FindForgottenJobsRequest { job_ids }).unwrap().job_ids
        };
        store.retain(later(2500), &retention);
        assert_eq!(forgotten(&store), [""; 0]);
        store.retain(later(2501), &retention);
        assert_eq!(forgotten(&store), [id(1)]);
        for table in ["attempts", "late_reports", "job_inputs"] {
            let left: i64 =
                store.database.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap();
            assert_eq!(left, 0, "{table}");
        }
        // One that is to be kept longer than others is.
        store.retain(later(31 * 24 * 3_600_000), &retention);
        assert_eq!(forgotten(&store), [id(1), id(3)]);
    }

    #[test]
    fn a_vm_counts_the_jobs_it_is_given() {
        let mut store = store_with_job(|_| {});
        for attempt in 1..=2 {
            assign(&mut store, attempt);
            store.finish_attempt(NOW, lost(attempt, true)).unwrap();
        }
        let vm = store.get_vm(NOW, wire::GetVmRequest { vm_id: id(9) }).unwrap().vm.unwrap();
        assert_eq!((vm.jobs_assigned, vm.state()), (2, pb::VmState::Idle));
    }
}
