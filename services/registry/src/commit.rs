//! Group commit: one task takes every mutation that waits and commits them as one Raft entry with one fsync.
//!
//! ```text
//!   callers ─► queue (bounded) ─► batch ─► txn ─► rows and events after it ─► each caller's own answer
//!                 full: OVERLOADED                      └─► newest revision, which wakes the watchers
//! ```
//! A caller that is alone waits for nobody. One commit is under way at a time, and what comes meanwhile is the next one:
//! a second one beside it made both smaller and slower (8 callers: 0.9 × alone, 0.8 × with three replicas). Mutations of the
//! same row go into one commit after the other, in the order they came. A batch that SQLite refuses is rolled back whole
//! and replayed one by one, so that nobody pays for a neighbour.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    time::Timestamp,
};
use futures::{
    FutureExt as _,
    future::{BoxFuture, OptionFuture},
};
use hiqlite::{Client, Param, rusqlite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::METRICS,
    mutation::{Key, Mutation, Statement},
    read::{Readers, advance, newest_revision},
    replica::Role,
    requests::{self, Recorded, RequestId},
    rows::{JobRow, VmRow, attempt_end, find_lease, find_node, made_job, made_vm, number, scheduler_epoch, text},
    verdict::{After, Answer, Verdict, judge},
};

/// Mutations that may wait: as many as there may be requests.
const QUEUE: usize = blixard::limits::MAX_CONCURRENT_REQUESTS;
/// Mutations in one commit: about 20 ms of SQLite's time, so that a caller never waits long behind others.
const BATCH_MUTATIONS: usize = 1024;
/// Bytes in one commit, far below what the Raft log can hold in one entry.
const BATCH_BYTES: usize = 1024 * 1024;
/// How long a commit may take. A snapshot of a large database stalls one for a second.
const COMMIT_DEADLINE: Duration = Duration::from_secs(20);
/// A commit of no more rows than this is read where it was made: another thread would take longer to begin.
const READ_HERE: usize = 16;
/// How often a mutation whose guard was overtaken in its own commit is tried again.
pub(crate) const TRIES: u32 = 5;

/// A mutation and who waits for it.
struct Unit {
    mutation: Mutation,
    /// Under which it takes place once.
    request: Option<RequestId>,
    reply: oneshot::Sender<Result<Answer, Error>>,
    tries: u32,
}

impl Unit {
    /// What two units of one commit must not share.
    fn keys(&self) -> Vec<Key> {
        self.mutation.keys().into_iter().chain(self.request.as_ref().map(RequestId::key)).collect()
    }

    /// What is read to judge it.
    fn reads(&self) -> Vec<Key> {
        match &self.request {
            None => self.mutation.shows(),
            Some(request) => vec![request.key()],
        }
    }

    /// Whether it makes a row and changes none. Under a request id its last statement is that of the record.
    fn makes_row(&self) -> bool {
        self.request.is_none() && self.mutation.makes_row()
    }

    fn statements(&self, now: Timestamp) -> Vec<Statement> {
        match &self.request {
            None => self.mutation.statements(now),
            Some(request) => request.once(&self.mutation, now),
        }
    }

    fn judge(&self, changed: usize, after: &After) -> Verdict {
        match &self.request {
            None => judge(&self.mutation, changed, after),
            Some(request) => request.judge(&self.mutation, after),
        }
    }
}

/// Hands mutations to the committer.
#[derive(Clone)]
pub(crate) struct CommitHandle {
    queue: mpsc::Sender<Unit>,
}

impl CommitHandle {
    /// Commits a mutation, once under its request id: when this returns, the change and its event are on the disk.
    pub(crate) async fn submit(&self, mutation: Mutation, request: Option<RequestId>) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Unit { mutation, request, reply, tries: 0 }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Error::new(Reason::Overloaded, format!("{QUEUE} changes are waiting already")).with("limit", QUEUE)
            }
            mpsc::error::TrySendError::Closed(_) => shutting_down(),
        })?;
        answer.await.unwrap_or_else(|_| Err(outcome_unknown()))
    }
}

/// The task that commits.
pub(crate) struct CommitDriver {
    committer: Committer,
    queue: mpsc::Receiver<Unit>,
    newest: Arc<watch::Sender<u64>>,
    /// Up to this revision the log has told of everything.
    logged: u64,
    role: watch::Receiver<Role>,
    waiting: VecDeque<Unit>,
    under_way: Option<BoxFuture<'static, Done>>,
}

/// Why a commit did not take place, or may not have.
enum Fault {
    /// SQLite refused it; nothing of it took place.
    RolledBack(hiqlite::Error),
    /// Nobody knows.
    Unknown(Error),
}

impl CommitDriver {
    /// A driver to run and the handle to it. It commits while this replica leads, and tells `newest` of each commit.
    pub(crate) fn new(
        client: Client,
        readers: Arc<Readers>,
        newest: Arc<watch::Sender<u64>>,
        role: watch::Receiver<Role>,
    ) -> (Self, CommitHandle) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let driver = Self {
            committer: Committer { client, readers, role: role.clone() },
            queue,
            newest,
            logged: 0,
            role,
            waiting: VecDeque::new(),
            under_way: None,
        };
        (driver, CommitHandle { queue: sender })
    }

    /// Commits until `stop` is cancelled; who waits then is told SHUTTING_DOWN, once the commit under way is answered.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut term = None;
        loop {
            tokio::select! {
                biased;
                Some(done) = OptionFuture::from(self.under_way.as_mut()) => self.settle(done),
                () = stop.cancelled() => break,
                Ok(()) = self.role.changed() => {}
                unit = self.queue.recv(), if self.waiting.len() < QUEUE => match unit {
                    Some(unit) => self.waiting.push_back(unit),
                    None => break,
                },
            }
            while self.waiting.len() < QUEUE
                && let Ok(unit) = self.queue.try_recv()
            {
                self.waiting.push_back(unit);
            }
            let leads = self.role.borrow_and_update().leads();
            if leads != std::mem::replace(&mut term, leads) {
                // Another leader may carry it out, or nobody. Who waits for it is told that the outcome is unknown.
                self.under_way = None;
                self.logged = *self.newest.borrow();
            }
            match leads {
                Some(_) => self.begin_commit(),
                None => self.refuse_waiting(&no_leader()),
            }
            METRICS.queued_mutations.set(self.waiting.len() as f64);
        }
        self.queue.close();
        if let Some(under_way) = self.under_way.take() {
            let done = under_way.await;
            self.settle(done);
        }
        self.refuse_waiting(&shutting_down());
    }

    fn refuse_waiting(&mut self, error: &Error) {
        while let Some(unit) = self.waiting.pop_front().or_else(|| self.queue.try_recv().ok()) {
            let _ = unit.reply.send(Err(error.clone()));
        }
    }

    /// Begins the next commit, if none is under way and somebody waits.
    fn begin_commit(&mut self) {
        if self.under_way.is_none() && !self.waiting.is_empty() {
            let batch = take_batch(&mut self.waiting, Timestamp::now());
            self.under_way = Some(self.committer.clone().commit(batch, self.logged).boxed());
        }
    }

    /// Tells the log and the watchers of the commit, and answers.
    fn settle(&mut self, done: Done) {
        self.under_way = None;
        done.events.iter().for_each(Event::log);
        self.logged = self.logged.max(done.newest);
        advance(&self.newest, done.newest);
        for (mut unit, verdict) in done.units.into_iter().rev() {
            match verdict {
                Verdict::Accepted(answer) => drop(unit.reply.send(Ok(answer))),
                Verdict::Denied(error) => drop(unit.reply.send(Err(error))),
                Verdict::Instead(mutation) => {
                    (unit.mutation, unit.request) = (*mutation, None);
                    self.waiting.push_front(unit);
                }
                Verdict::Again if unit.tries < TRIES => {
                    unit.tries += 1;
                    self.waiting.push_front(unit);
                }
                Verdict::Again => {
                    let log = |id: &str| tracing::error!(error_id = id, mutation = ?unit.mutation, "a change stays undecided");
                    let _ = unit.reply.send(Err(Error::internal(log)));
                }
            }
        }
    }
}

/// A commit that is over: what its mutations came to, the events since its driver last looked and the newest revision.
#[derive(Default)]
struct Done {
    units: Vec<(Unit, Verdict)>,
    events: Vec<Event>,
    newest: u64,
}

impl Done {
    fn refused(units: Vec<(Unit, usize)>, error: &Error) -> Self {
        let deny = |(unit, _)| (unit, Verdict::Denied(error.clone()));
        Self { units: units.into_iter().map(deny).collect(), ..Self::default() }
    }

    /// Adds what a later commit came to.
    fn add(&mut self, later: Self) {
        self.units.extend(later.units);
        self.events.extend(later.events);
        self.newest = self.newest.max(later.newest);
    }
}

/// Carries out one commit.
#[derive(Clone)]
struct Committer {
    client: Client,
    readers: Arc<Readers>,
    role: watch::Receiver<Role>,
}

impl Committer {
    async fn commit(self, mut batch: Batch, seen: u64) -> Done {
        let changes = batch.units.len();
        METRICS.commit_mutations.record(changes as f64);
        let begun = Instant::now();
        match self.propose(std::mem::take(&mut batch.statements)).await {
            Ok(counts) => {
                let committed = begun.elapsed();
                let done = self.read(batch.units, batch.at, &counts, seen).await;
                tracing::debug!(changes, ?committed, read = ?begun.elapsed(), "group commit");
                METRICS.commit_seconds.record(begun.elapsed());
                done
            }
            Err(Fault::Unknown(error)) => Done::refused(batch.units, &error),
            Err(Fault::RolledBack(error)) if changes == 1 => Done::refused(batch.units, &refusal(&error)),
            Err(Fault::RolledBack(error)) => {
                tracing::warn!(%error, changes, "a group commit was rolled back; replaying its changes");
                self.replay(batch.units, seen).await
            }
        }
    }

    /// Commits units one by one.
    async fn replay(&self, units: Vec<(Unit, usize)>, seen: u64) -> Done {
        let mut all = Done { newest: seen, ..Done::default() };
        for (unit, _) in units {
            let now = Timestamp::now();
            let statements = unit.statements(now);
            let units = vec![(unit, statements.len() - 1)];
            let done = match self.propose(statements).await {
                Ok(counts) => self.read(units, now, &counts, all.newest).await,
                Err(Fault::Unknown(error)) => Done::refused(units, &error),
                Err(Fault::RolledBack(error)) => Done::refused(units, &refusal(&error)),
            };
            all.add(done);
        }
        all
    }

    /// One Raft entry. Returns the number of rows that each statement changed.
    async fn propose(&self, statements: Vec<Statement>) -> Result<Vec<usize>, Fault> {
        let term = self.role.borrow().leads();
        let Ok(result) = tokio::time::timeout(COMMIT_DEADLINE, self.client.txn(statements)).await else {
            let message = "the commit did not end in time; the outcome is unknown";
            return Err(Fault::Unknown(Error::new(Reason::DeadlineExceeded, message)));
        };
        // Hiqlite sends what a deposed leader proposes to the new one, whose database is not the one that is read here.
        if self.role.borrow().leads() != term || !self.client.is_leader_db().await {
            return Err(Fault::Unknown(outcome_unknown()));
        }
        use hiqlite::Error as Hiqlite;
        let counts = result.and_then(|counts| counts.into_iter().collect());
        counts.map_err(|error: Hiqlite| match error {
            Hiqlite::Transaction(_)
            | Hiqlite::Sqlite(_)
            | Hiqlite::ConstraintViolation(_)
            | Hiqlite::PrepareStatement(_)
            | Hiqlite::QueryParams(_) => Fault::RolledBack(error),
            error => {
                tracing::error!(%error, "registry commit failed");
                Fault::Unknown(outcome_unknown())
            }
        })
    }

    /// Reads what a commit left and judges its mutations. Rows that it made are not read: their mutations and their
    /// events, which are, tell what is in them.
    async fn read(&self, units: Vec<(Unit, usize)>, at: Timestamp, counts: &[usize], seen: u64) -> Done {
        let changed = |last: usize| counts.get(last).copied().unwrap_or(0);
        let is_made = |unit: &Unit, last| unit.makes_row() && changed(last) > 0;
        let found = units.iter().filter(|(unit, last)| !is_made(unit, *last));
        let keys: BTreeSet<_> = found.flat_map(|(unit, _)| unit.reads()).collect();
        let few = keys.len() <= READ_HERE;
        let read = move |connection: &rusqlite::Connection| read_after(connection, keys, seen);
        let read = if few { self.readers.read_here(read) } else { self.readers.read(read).await };
        match read {
            Ok((after, events, newest)) => {
                let mut in_order = events.iter();
                let judge = |(unit, last): (Unit, usize)| {
                    let made =
                        is_made(&unit, last).then(|| in_order.find_map(|event| event.row_made(&unit.mutation, at)));
                    let verdict = match made.flatten() {
                        Some(answer) => Verdict::Accepted(answer),
                        None => unit.judge(changed(last), &after),
                    };
                    (unit, verdict)
                };
                Done { units: units.into_iter().map(judge).collect(), events, newest }
            }
            Err(error) => Done::refused(units, &error),
        }
    }
}

fn refusal(error: &hiqlite::Error) -> Error {
    Error::internal(|id| tracing::error!(error_id = id, %error, "registry refused a change"))
}

/// What one commit holds: each unit with the index of its last statement.
struct Batch {
    /// When it was put together: the time of its changes.
    at: Timestamp,
    units: Vec<(Unit, usize)>,
    statements: Vec<Statement>,
}

/// Takes as much as one commit may hold, leaving behind what shares a row with something before it.
fn take_batch(waiting: &mut VecDeque<Unit>, now: Timestamp) -> Batch {
    let mut batch = Batch { at: now, units: Vec::new(), statements: Vec::new() };
    let mut taken: HashSet<Key> = HashSet::new();
    let mut bytes = 0;
    let mut left = VecDeque::new();
    while let Some(unit) = waiting.pop_front() {
        let keys = unit.keys();
        let free = keys.iter().all(|key| !taken.contains(key));
        // The rows of one that stays behind are taken too: what comes later must not overtake it.
        taken.extend(keys);
        if !free {
            left.push_back(unit);
            continue;
        }
        let statements = unit.statements(now);
        bytes += statements.iter().map(size).sum::<usize>();
        if bytes > BATCH_BYTES && !batch.units.is_empty() {
            left.push_back(unit);
            break;
        }
        batch.statements.extend(statements);
        batch.units.push((unit, batch.statements.len() - 1));
        if batch.units.len() == BATCH_MUTATIONS {
            break;
        }
    }
    left.append(waiting);
    *waiting = left;
    let requests = batch.units.iter().filter(|(unit, _)| unit.request.is_some()).count();
    if requests > 0 {
        // More than come, so that the table gets smaller when there is much to forget.
        batch.statements.push(requests::forget(now, 2 * requests));
    }
    batch
}

fn size((sql, params): &Statement) -> usize {
    let param = |param: &Param| match param {
        Param::Text(text) => text.len(),
        Param::Blob(bytes) => bytes.len(),
        Param::Null | Param::Integer(_) | Param::Real(_) => 8,
        Param::StmtOutputIndexed(..) | Param::StmtOutputNamed(..) => 16,
    };
    sql.len() + params.iter().map(param).sum::<usize>()
}

/// An event of a commit, as far as the log tells of it.
struct Event {
    revision: u64,
    entity: String,
    from: String,
    to: String,
    job_id: String,
    vm_id: String,
}

impl Event {
    /// The answer to the mutation that made a row, if this is the event of it.
    fn row_made(&self, mutation: &Mutation, at: Timestamp) -> Option<Answer> {
        let made_here = |entity: &str, id: String, of: &str| self.entity == entity && self.from.is_empty() && id == of;
        match mutation {
            Mutation::CreateVm { id, config, node_id, .. } if made_here("vm", id.to_string(), &self.vm_id) => {
                Some(Answer::Vm(Box::new(made_vm(id, config, node_id, at, self.revision))))
            }
            Mutation::CreateJob { job } if made_here("job", job.id.to_string(), &self.job_id) => {
                Some(Answer::Job(Box::new(made_job(&job.id, &job.spec, at, self.revision))))
            }
            _ => None,
        }
    }

    /// The lines that the usage guide promises.
    fn log(&self) {
        let Self { entity, from, to, job_id, vm_id, .. } = self;
        match (entity.as_str(), from.as_str(), to.as_str()) {
            ("vm", "", state) => tracing::info!(%vm_id, %state, "VM registered"),
            ("vm", _, "") => tracing::info!(%vm_id, "VM purged"),
            ("vm", from, to) => tracing::info!("VM state changed vm_id={vm_id} {from} -> {to}"),
            ("job", from, to) if from != to && to == JobState::Assigned.as_str() => {
                tracing::info!(%job_id, %vm_id, "Job assigned to VM");
            }
            _ => {}
        }
    }
}

/// The rows under these keys.
pub(crate) fn read_rows(
    connection: &rusqlite::Connection,
    keys: impl IntoIterator<Item = Key>,
) -> rusqlite::Result<After> {
    let mut after = After { scheduler_epoch: scheduler_epoch(connection)?, ..After::default() };
    for key in keys {
        match key {
            Key::Vm(id) => drop(VmRow::find(connection, &id.to_string())?.map(|row| after.vms.insert(id, row))),
            Key::Job(id) => drop(JobRow::find(connection, &id.to_string())?.map(|row| after.jobs.insert(id, row))),
            Key::Request(id) => drop(Recorded::find(connection, id)?.map(|row| after.requests.insert(id, row))),
            Key::Attempt(id, number) => {
                let end = attempt_end(connection, &id.to_string(), number)?;
                after.attempts.extend(end.map(|end| ((id, number), end)));
            }
            Key::Lease(name) => drop(find_lease(connection, &name)?.map(|lease| after.leases.insert(name, lease))),
            Key::Node(id) => drop(find_node(connection, id.as_str())?.map(|node| after.nodes.insert(id, node))),
        }
    }
    Ok(after)
}

fn read_after(
    connection: &rusqlite::Connection,
    keys: BTreeSet<Key>,
    seen: u64,
) -> rusqlite::Result<(After, Vec<Event>, u64)> {
    let mut after = read_rows(connection, keys)?;
    let sql = "SELECT entity, from_state, to_state, job_id, vm_id, revision FROM events WHERE revision > ?1 ORDER BY revision";
    let mut statement = connection.prepare_cached(sql)?;
    let event = |row: &rusqlite::Row<'_>| {
        Ok(Event {
            entity: row.get(0)?,
            from: text(row, 1)?,
            to: text(row, 2)?,
            job_id: text(row, 3)?,
            vm_id: text(row, 4)?,
            revision: number(row, 5)?,
        })
    };
    let events = statement.query_map([i64::try_from(seen).unwrap_or(i64::MAX)], event)?.collect::<Result<_, _>>()?;
    after.revision = newest_revision(connection)?;
    let newest = after.revision;
    Ok((after, events, newest))
}

fn outcome_unknown() -> Error {
    let message =
        "the registry's log took the change at a moment when it may be lost; the outcome is unknown, try again";
    Error::new(Reason::PeerUnavailable, message).with("peer", "registry")
}

fn no_leader() -> Error {
    Error::new(Reason::PeerUnavailable, "this replica of the registry does not lead; try again")
        .with("peer", "registry")
}

fn shutting_down() -> Error {
    Error::new(Reason::ShuttingDown, "the registry is shutting down; try again")
}

#[cfg(test)]
mod tests {
    use blixard::{
        id::{JobId, VmId},
        pb::common::v1 as pb,
    };

    use super::*;
    use crate::mutation::NewJob;

    fn unit(mutation: Mutation) -> Unit {
        Unit { mutation, request: None, reply: oneshot::channel().0, tries: 0 }
    }

    fn cancel(id: JobId) -> Mutation {
        Mutation::CancelJob { id, reason: String::new() }
    }

    fn batches(mutations: Vec<Mutation>) -> Vec<Vec<Vec<Key>>> {
        let mut waiting: VecDeque<_> = mutations.into_iter().map(unit).collect();
        let mut batches = Vec::new();
        while !waiting.is_empty() {
            let batch = take_batch(&mut waiting, Timestamp(0));
            assert!(!batch.units.is_empty());
            assert!(batch.units.len() == 1 || batch.statements.iter().map(size).sum::<usize>() <= BATCH_BYTES);
            batches.push(batch.units.into_iter().map(|(unit, _)| unit.mutation.keys()).collect());
        }
        batches
    }

    #[test]
    fn changes_of_one_row_are_committed_one_after_the_other_in_their_order() {
        let [a, b, c] = [JobId::random(), JobId::random(), JobId::random()];
        let vm_id = VmId::random();
        let assign = |job_id| Mutation::AssignJob { job_id, vm_id, attempt: 1, decision: None, scheduler_epoch: 0 };
        // The last one touches only `b`, but must not overtake the second assignment, which waits for the VM.
        let taken = batches(vec![assign(a), assign(b), cancel(c), cancel(b)]);
        let (vm, a, b, c) = (Key::Vm(vm_id), Key::Job(a), Key::Job(b), Key::Job(c));
        assert_eq!(taken, [vec![vec![a, vm.clone()], vec![c]], vec![vec![b.clone(), vm]], vec![vec![b]]]);
    }

    #[test]
    fn a_batch_is_bounded_in_number_and_in_bytes() {
        let many = (0..BATCH_MUTATIONS + 1).map(|_| cancel(JobId::random())).collect();
        assert_eq!(batches(many).iter().map(Vec::len).collect::<Vec<_>>(), [BATCH_MUTATIONS, 1]);
        let large = |_| {
            let spec = pb::JobSpec { command: vec!["x".repeat(400 << 10)], ..Default::default() };
            Mutation::CreateJob { job: Box::new(NewJob { id: JobId::random(), spec, input: None }) }
        };
        assert_eq!(batches((0..5).map(large).collect()).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    }

    #[tokio::test]
    async fn a_full_queue_is_overloaded_and_a_closed_one_is_shutting_down() {
        let (queue, receiver) = mpsc::channel(1);
        let handle = CommitHandle { queue };
        handle.queue.try_send(unit(cancel(JobId::random()))).unwrap();
        let refused = handle.submit(cancel(JobId::random()), None).await.unwrap_err();
        assert_eq!(refused.reason, Reason::Overloaded);
        drop(receiver);
        let refused = handle.submit(cancel(JobId::random()), None).await.unwrap_err();
        assert_eq!(refused.reason, Reason::ShuttingDown);
    }
}
