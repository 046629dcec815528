//! Every change as a typed operation that compiles to statements which cannot fail.
//!
//! The precondition stands inside the SQL (compare-and-set), so that neighbours in a group commit never see each other's
//! failures: a statement whose guard does not hold changes no row. What that means is for [`crate::verdict`] to say.
//! The guards come from the state tables of the root package; no state is listed here by hand.
//!
//! It must not know how or when statements are committed.

use std::{borrow::Cow, sync::LazyLock};

use blixard::{
    error::Error,
    id::{JobId, NodeId, VmId},
    job::{ExitKind, ExitStatus, JobState},
    node::{Node, NodeState},
    pb::common::v1 as pb,
    time::Timestamp,
    vm::{VmConfig, VmKind, VmShape, VmState},
};
use hiqlite::{Param, Params};
use prost::Message as _;

use crate::{leases::Holder, schema::NEXT_REVISION, time};

/// The longest command that `jobs.command` shows to people; the whole one is in `spec`.
const SHOWN_COMMAND_BYTES: usize = 200;

/// A change.
#[derive(Debug, Clone)]
pub(crate) enum Mutation {
    CreateVm {
        id: VmId,
        config: VmConfig,
        node_id: NodeId,
        scheduler_epoch: u64,
    },
    TransitionVm {
        id: VmId,
        to: VmState,
        expected_generation: u64,
        reason: String,
        /// To Draining: how long it has to end by itself.
        grace_ms: Option<u64>,
        lost_node: Option<LostNode>,
        scheduler_epoch: u64,
    },
    /// A VM that runs has this shape now.
    ResizeVm {
        id: VmId,
        to: VmShape,
        expected_generation: u64,
    },
    PurgeVms {
        states: Vec<VmState>,
        ids: Vec<VmId>,
        at_most: u32,
    },
    CreateJob {
        job: Box<NewJob>,
    },
    /// All or none.
    CreateJobs {
        jobs: Vec<NewJob>,
    },
    AssignJob {
        job_id: JobId,
        vm_id: VmId,
        attempt: u32,
        decision: Option<pb::Decision>,
        scheduler_epoch: u64,
    },
    StartAttempt {
        job_id: JobId,
        attempt: u32,
        started_at: Timestamp,
    },
    FinishAttempt {
        job_id: JobId,
        attempt: u32,
        outcome: Outcome,
        scheduler_epoch: u64,
    },
    /// A report about an attempt that is over: kept and refused, unless it says again what the attempt came to.
    RecordLate {
        job_id: JobId,
        attempt: u32,
        outcome: Outcome,
        refusal: Error,
    },
    CancelJob {
        id: JobId,
        reason: String,
    },
    /// To Failed or TimedOut.
    FailQueuedJob {
        id: JobId,
        to: JobState,
        reason: String,
        scheduler_epoch: u64,
    },
    RegisterNode {
        node: Node,
    },
    /// What is wanted of a node.
    UpdateNode {
        id: NodeId,
        wanted: NodeState,
        reason: String,
        drain_deadline: Option<Timestamp>,
    },
    /// A lease changes hands, if nobody has taken it since this epoch.
    TakeLease {
        name: String,
        holder: Holder,
        epoch: u64,
    },
    /// Its holder gives a lease up.
    ReleaseLease {
        name: String,
        holder: Holder,
    },
    /// Nothing is heard of this incarnation any more.
    LoseNode {
        id: NodeId,
        incarnation: u64,
        reason: String,
    },
    /// Changes nothing: when it is committed, a majority has confirmed that nobody else leads.
    ConfirmRevision,
    /// Deletes the rows of VMs that ended before then; retention's, as the next two.
    ForgetVms {
        ended_before: Timestamp,
        at_most: u32,
    },
    ForgetJobs {
        ended_before: Timestamp,
        at_most: u32,
    },
    /// Those that say themselves how long they are kept.
    ForgetExpiredJobs {
        now: Timestamp,
        at_most: u32,
    },
    /// Deletes the events up to this revision.
    CompactEvents {
        through: u64,
    },
}

/// A job to record.
#[derive(Debug, Clone)]
pub(crate) struct NewJob {
    pub(crate) id: JobId,
    pub(crate) spec: pb::JobSpec,
    pub(crate) input: Option<pb::JobInput>,
}

/// What an attempt came to.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Result {
        state: JobState,
        exit: Option<ExitStatus>,
        reason: String,
        log_bytes: u64,
        finished_at: Timestamp,
        /// When its command started, if that was not reported before.
        started_at: Option<Timestamp>,
    },
    Lost {
        started: bool,
        reason: String,
        node: Option<LostNode>,
    },
}

/// What only a node's loss allows: it is Lost, and this incarnation of it is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LostNode {
    pub(crate) id: NodeId,
    pub(crate) incarnation: u64,
}

/// The rows that a mutation's answer shows. Mutations that share one are not committed together, so that each answer
/// shows exactly the row that its mutation left.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Vm(VmId),
    Job(JobId),
    Node(NodeId),
    Lease(String),
    /// One after which the job went back to the queue.
    Attempt(JobId, u32),
    /// Not a row that the answer shows, but one that tells it: see [`crate::requests`].
    Request(uuid::Uuid),
}

/// A statement and its parameters. Its condition is a WHERE at its end, or before an INSERT's ON CONFLICT, to which ANDs can
/// be added. The text travels through the Raft log with each change, so it carries no indentation.
pub(crate) type Statement = (Cow<'static, str>, Params);

impl Mutation {
    /// See [`Key`].
    pub(crate) fn keys(&self) -> Vec<Key> {
        match self {
            Self::CreateVm { id, .. } | Self::TransitionVm { id, .. } | Self::ResizeVm { id, .. } => vec![Key::Vm(*id)],
            Self::PurgeVms { ids, .. } => ids.iter().copied().map(Key::Vm).collect(),
            Self::CreateJob { job } => vec![Key::Job(job.id)],
            Self::CancelJob { id, .. } | Self::FailQueuedJob { id, .. } => vec![Key::Job(*id)],
            Self::CreateJobs { jobs } => jobs.iter().map(|job| Key::Job(job.id)).collect(),
            Self::AssignJob { job_id, vm_id, .. } => vec![Key::Job(*job_id), Key::Vm(*vm_id)],
            Self::StartAttempt { job_id, .. } | Self::FinishAttempt { job_id, .. } => vec![Key::Job(*job_id)],
            Self::RecordLate { job_id, attempt, .. } => vec![Key::Job(*job_id), Key::Attempt(*job_id, *attempt)],
            Self::RegisterNode { node } => vec![Key::Node(node.id.clone())],
            Self::UpdateNode { id, .. } | Self::LoseNode { id, .. } => vec![Key::Node(id.clone())],
            Self::TakeLease { name, .. } | Self::ReleaseLease { name, .. } => vec![Key::Lease(name.clone())],
            Self::ConfirmRevision
            | Self::ForgetVms { .. }
            | Self::ForgetJobs { .. }
            | Self::ForgetExpiredJobs { .. }
            | Self::CompactEvents { .. } => vec![],
        }
    }

    /// Those of [`Mutation::keys`] that the answer shows, and what else it is judged by.
    pub(crate) fn shows(&self) -> Vec<Key> {
        if matches!(self, Self::PurgeVms { .. }) {
            return vec![];
        }
        let node = self.lost_node().map(|node| Key::Node(node.id.clone()));
        self.keys().into_iter().chain(node).collect()
    }

    /// The node whose loss alone allows it.
    pub(crate) fn lost_node(&self) -> Option<&LostNode> {
        match self {
            Self::TransitionVm { lost_node, .. } => lost_node.as_ref(),
            Self::FinishAttempt { outcome: Outcome::Lost { node, .. }, .. } => node.as_ref(),
            _ => None,
        }
    }

    /// Whether it makes a row and changes none: then the row is known without a look.
    pub(crate) fn makes_row(&self) -> bool {
        matches!(self, Self::CreateVm { .. } | Self::CreateJob { .. })
    }

    /// The epoch of the scheduler that asks for it; 0: it is not a scheduler, or none is asked for.
    pub(crate) fn scheduler_epoch(&self) -> u64 {
        match self {
            Self::CreateVm { scheduler_epoch, .. }
            | Self::TransitionVm { scheduler_epoch, .. }
            | Self::AssignJob { scheduler_epoch, .. }
            | Self::FinishAttempt { scheduler_epoch, .. }
            | Self::FailQueuedJob { scheduler_epoch, .. } => *scheduler_epoch,
            Self::ResizeVm { .. }
            | Self::PurgeVms { .. }
            | Self::CreateJob { .. }
            | Self::CreateJobs { .. }
            | Self::StartAttempt { .. }
            | Self::RecordLate { .. }
            | Self::CancelJob { .. }
            | Self::RegisterNode { .. }
            | Self::UpdateNode { .. }
            | Self::TakeLease { .. }
            | Self::ReleaseLease { .. }
            | Self::LoseNode { .. }
            | Self::ConfirmRevision
            | Self::ForgetVms { .. }
            | Self::ForgetJobs { .. }
            | Self::ForgetExpiredJobs { .. }
            | Self::CompactEvents { .. } => 0,
        }
    }

    /// The statements. The number of rows that the *last* one changes tells whether the mutation took place.
    pub(crate) fn statements(&self, now: Timestamp) -> Vec<Statement> {
        let mut statements = self.whoever_leads(now);
        if let Some(LostNode { id, incarnation }) = self.lost_node() {
            let (node, lost) = (format!("{incarnation}/{id}"), NodeState::Lost);
            let is_lost =
                |place| format!("?{place} IN (SELECT incarnation || '/' || id FROM nodes WHERE state = '{lost}')");
            statements = statements.into_iter().map(|statement| only_if(statement, node.as_str(), is_lost)).collect();
        }
        match self.scheduler_epoch() {
            0 => statements,
            epoch => {
                let leads = |place| format!("?{place} = {SCHEDULER_EPOCH}");
                statements.into_iter().map(|statement| only_if(statement, integer(epoch), leads)).collect()
            }
        }
    }

    fn whoever_leads(&self, at: Timestamp) -> Vec<Statement> {
        let now = time::to_text(at);
        match self {
            Self::CreateVm { id, config, node_id, .. } => vec![create_vm(*id, config, node_id, now)],
            Self::TransitionVm { id, to, expected_generation, reason, grace_ms, .. } => {
                let generation = integer(*expected_generation);
                let mut params = vec![id.text(), generation, reason.into(), now.into()];
                if *to == VmState::Draining {
                    params.push(grace_ms.map_or(Param::Null, integer));
                }
                vec![(sql(&TRANSITION_VM[index(*to)]), params)]
            }
            Self::ResizeVm { id, to, expected_generation } => {
                let shape = [to.vcpus.into(), to.memory_mib.into()];
                let params = [id.text()].into_iter().chain(shape).chain([integer(*expected_generation), now.into()]);
                vec![(sql(&RESIZE_VM), params.collect())]
            }
            Self::PurgeVms { states, ids, at_most } => purge_vms(states, ids, *at_most, now),
            Self::CreateJob { job } => create_job(job, now),
            Self::CreateJobs { jobs } => create_jobs(jobs, now),
            Self::AssignJob { job_id, vm_id, attempt, decision, .. } => {
                let params = vec![job_id.text(), vm_id.text(), (*attempt).into(), now.into()];
                let decision = decision.as_ref().map_or(Param::Null, |decision| Param::Blob(decision.encode_to_vec()));
                let job = params.iter().cloned().chain([decision]).collect();
                vec![(sql(&ASSIGN_VM), params), (sql(&ASSIGN_JOB), job)]
            }
            Self::StartAttempt { job_id, attempt, started_at } => {
                let started_at = time::to_text(*started_at);
                vec![(sql(&START), vec![job_id.text(), (*attempt).into(), started_at.into(), now.into()])]
            }
            Self::FinishAttempt { job_id, attempt, outcome, .. } => {
                let release = vec![job_id.text(), (*attempt).into(), now.into()];
                vec![(sql(&RELEASE_VM), release), finish(*job_id, *attempt, outcome, at)]
            }
            Self::RecordLate { job_id, attempt, outcome, .. } => vec![record_late(*job_id, *attempt, outcome, now)],
            Self::CancelJob { id, reason } => {
                vec![(sql(&CANCEL), vec![id.text(), reason.into(), now.into(), at.0.into()])]
            }
            Self::FailQueuedJob { id, to, reason, .. } => {
                let params = vec![id.text(), reason.into(), now.into(), to.as_str().into(), at.0.into()];
                vec![(sql(&FAIL_QUEUED), params)]
            }
            Self::RegisterNode { node } => vec![register_node(node, now)],
            Self::UpdateNode { id, wanted, reason, drain_deadline } => {
                let deadline = drain_deadline.map_or(Param::Null, text);
                let params = vec![id.as_str().into(), wanted.as_str().into(), reason.into(), deadline, now.into()];
                vec![(sql(&UPDATE_NODE), params)]
            }
            Self::TakeLease { name, holder: Holder { name: holder, instance }, epoch } => {
                let params = vec![name.into(), holder.into(), instance.to_string().into(), integer(*epoch)];
                vec![(TAKE_LEASE.into(), params)]
            }
            Self::ReleaseLease { name, holder: Holder { name: holder, instance } } => {
                vec![(RELEASE_LEASE.into(), vec![name.into(), holder.into(), instance.to_string().into()])]
            }
            Self::LoseNode { id, incarnation, reason } => {
                let params = vec![id.as_str().into(), integer(*incarnation), reason.into(), now.into()];
                vec![(sql(&LOSE_NODE), params)]
            }
            Self::ConfirmRevision => vec![("UPDATE purge_clock SET at = at WHERE false".into(), vec![])],
            Self::ForgetVms { ended_before, at_most } => {
                vec![set_purge_clock(now), (sql(&FORGET_VMS), vec![text(*ended_before), (*at_most).into()])]
            }
            Self::ForgetJobs { ended_before, at_most } => {
                vec![set_purge_clock(now), (sql(&FORGET_JOBS), vec![text(*ended_before), (*at_most).into()])]
            }
            Self::ForgetExpiredJobs { now: at, at_most } => {
                vec![set_purge_clock(now), (sql(&FORGET_EXPIRED_JOBS), vec![at.0.into(), (*at_most).into()])]
            }
            Self::CompactEvents { through } => vec![
                ("DELETE FROM events WHERE revision <= ?1".into(), vec![integer(*through)]),
                ("UPDATE compaction SET revision = ?1 WHERE revision < ?1".into(), vec![integer(*through)]),
            ],
        }
    }
}

/// The epoch of the scheduler that leads; NULL: none ever has.
pub(crate) const SCHEDULER_EPOCH: &str = "(SELECT epoch FROM leases WHERE name = 'scheduler')";

/// Adds a condition to a statement; it is given the place of its parameter.
pub(crate) fn only_if(
    (sql, mut params): Statement,
    param: impl Into<Param>,
    condition: impl FnOnce(usize) -> String,
) -> Statement {
    params.push(param.into());
    let condition = format!(" AND {}", condition(params.len()));
    let mut sql = sql.into_owned();
    sql.insert_str(sql.find(" ON CONFLICT").unwrap_or(sql.len()), &condition);
    (sql.into(), params)
}

/// The text in `vms.config`.
pub(crate) fn config_text(config: &VmConfig) -> String {
    json(config)
}

static CREATE_VM: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO vms (id, kind, state, node_id, image, vcpus, memory_mib, labels, config, reason, generation, \
             revision, created_at, updated_at, created_revision) \
         SELECT ?1, ?2, '{}', ?3, ?4, ?5, ?6, ?7, ?8, '', 1, next, ?9, ?9, next FROM (SELECT {NEXT_REVISION} AS next) \
         WHERE true ON CONFLICT (id) DO NOTHING",
        VmState::Starting
    )
});

fn create_vm(id: VmId, config: &VmConfig, node_id: &NodeId, now: String) -> Statement {
    let params = vec![
        id.text(),
        config.kind.as_str().into(),
        node_id.as_str().into(),
        config.image.as_str().into(),
        config.vcpus.into(),
        config.memory_mib.into(),
        json(&config.labels).into(),
        config_text(config).into(),
        now.into(),
    ];
    (sql(&CREATE_VM), params)
}

/// One statement for each state to reach, in the order of `VmState::ALL`.
static TRANSITION_VM: LazyLock<Vec<String>> = LazyLock::new(|| {
    let statement = |to: VmState| {
        // A VM that is draining may still run its job, and may be given less time to end; in any other state that it
        // reaches here it runs none.
        let (set, may_reach) = match to {
            VmState::Draining => (
                "stop_grace_ms = ?5",
                format!(
                    "({} OR (state = '{to}' AND (stop_grace_ms IS NULL OR ?5 < stop_grace_ms) AND ?5 IS NOT NULL))",
                    may_reach(to)
                ),
            ),
            _ => ("job_id = NULL", may_reach(to)),
        };
        format!(
            "UPDATE vms SET state = '{to}', {set}, reason = ?3, generation = generation + 1, \
                 revision = {NEXT_REVISION}, updated_at = ?4 \
             WHERE id = ?1 AND (?2 = 0 OR generation = ?2) AND {may_reach}"
        )
    };
    VmState::ALL.into_iter().map(statement).collect()
});

/// The text in `config` stays: it is what the VM was asked for, and tells whether that is asked for again.
static RESIZE_VM: LazyLock<String> = LazyLock::new(|| {
    let running = VmState::ALL.into_iter().filter(|state| state.is_running());
    format!(
        "UPDATE vms SET vcpus = ?2, memory_mib = ?3, \
             reason = 'resized from ' || vcpus || ' vCPUs, ' || memory_mib || ' MiB to ' || ?2 || ' vCPUs, ' || ?3 || ' MiB', \
             generation = generation + 1, revision = {NEXT_REVISION}, updated_at = ?5 \
         WHERE id = ?1 AND (?4 = 0 OR generation = ?4) AND NOT (vcpus = ?2 AND memory_mib = ?3) AND state IN ({})",
        names(running.map(VmState::as_str))
    )
});

fn purge_vms(states: &[VmState], ids: &[VmId], at_most: u32, now: String) -> Vec<Statement> {
    let states = names(states.iter().map(|state| state.as_str()));
    let chosen = if ids.is_empty() { "" } else { "AND id IN (SELECT value FROM json_each(?2))" };
    let delete = format!(
        "DELETE FROM vms WHERE id IN (SELECT id FROM vms WHERE state IN ({states}) {chosen} \
         ORDER BY created_revision LIMIT ?1)"
    );
    let mut params = vec![at_most.into()];
    if !ids.is_empty() {
        params.push(json(ids).into());
    }
    vec![set_purge_clock(now), (delete.into(), params)]
}

/// The time of the events of the rows that are deleted next.
fn set_purge_clock(now: String) -> Statement {
    ("UPDATE purge_clock SET at = ?1 WHERE true".into(), vec![now.into()])
}

/// VMs that ended before a time. SQLite would choose the index by state, and read every VM that ended.
pub(crate) static ENDED_VMS: LazyLock<String> = LazyLock::new(|| {
    let ended = VmState::ALL.into_iter().filter(|state| state.is_terminal());
    format!("FROM vms INDEXED BY vms_ended WHERE state IN ({}) AND updated_at < ?1", names(ended.map(VmState::as_str)))
});

/// Jobs that ended before a time and don't say themselves how long they are kept.
pub(crate) static ENDED_JOBS: LazyLock<String> =
    LazyLock::new(|| "FROM jobs WHERE finished_at < ?1 AND result_ttl_ms = 0".to_owned());

/// Jobs that are kept no longer, by themselves, at a time in milliseconds.
pub(crate) const EXPIRED_JOBS: &str = "FROM jobs WHERE expires_ms < ?1";

static FORGET_VMS: LazyLock<String> = LazyLock::new(|| {
    format!("DELETE FROM vms WHERE id IN (SELECT id {} ORDER BY updated_at, created_revision LIMIT ?2)", *ENDED_VMS)
});

static FORGET_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!("DELETE FROM jobs WHERE id IN (SELECT id {} ORDER BY finished_at, created_revision LIMIT ?2)", *ENDED_JOBS)
});

static FORGET_EXPIRED_JOBS: LazyLock<String> = LazyLock::new(|| {
    format!("DELETE FROM jobs WHERE id IN (SELECT id {EXPIRED_JOBS} ORDER BY expires_ms, created_revision LIMIT ?2)")
});

/// The columns of a new job: first those that every one has in common with itself ([`NewJob::params`]), then the others.
const NEW_JOB_COLUMNS: &str = "id, command, image, vcpus, memory_mib, priority, max_attempts, labels, group_id, \
     array_index, retry_on, backoff_ms, max_backoff_ms, result_ttl_ms, spec, state, attempt, attempts_started, \
     cancel_requested, user_time_ms, system_time_ms, max_rss_kib, reason, log_bytes, generation, revision, \
     created_revision, created_at, updated_at, queued_at";
/// How many of them are [`NewJob::params`].
const NEW_JOB_PARAMS: usize = 15;

/// The values of the other columns; `made`: the revision of the job's creation.
fn new_job_constants(made: &str, now: &str) -> String {
    format!("'{}', 0, 0, 0, 0, 0, 0, '', 0, 1, {made}, {made}, {now}, {now}, {now}", JobState::Queued)
}

static CREATE_JOB: LazyLock<String> = LazyLock::new(|| {
    let places: Vec<_> = (1..=NEW_JOB_PARAMS).map(|place| format!("?{place}")).collect();
    format!(
        "INSERT INTO jobs ({NEW_JOB_COLUMNS}) SELECT {}, {} FROM (SELECT {NEXT_REVISION} AS next) \
         WHERE true ON CONFLICT (id) DO NOTHING",
        places.join(", "),
        new_job_constants("next", "?16")
    )
});

/// The input comes first, because the last statement tells whether the job was made.
const CREATE_INPUT: &str = "INSERT INTO job_inputs (job_id, input) SELECT ?1, ?2 \
     WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE id = ?1) ON CONFLICT DO NOTHING";

fn create_job(job: &NewJob, now: String) -> Vec<Statement> {
    let input = job.input.as_ref().map(|input| {
        let params = vec![job.id.text(), Param::Blob(input.encode_to_vec())];
        (CREATE_INPUT.into(), params)
    });
    let params = job.params().into_iter().chain([now.into()]).collect();
    input.into_iter().chain([(sql(&CREATE_JOB), params)]).collect()
}

/// One statement for all jobs, and one for their inputs, if none of the jobs is there. Their revisions are consecutive.
fn create_jobs(jobs: &[NewJob], now: String) -> Vec<Statement> {
    // Named first, so that the places of the rows' values, which have no numbers, come after it.
    let group = "WITH own (id) AS (SELECT value FROM json_each(?1))";
    let none = "NOT EXISTS (SELECT 1 FROM jobs WHERE id IN own)";
    let ids = Param::Text(json(&jobs.iter().map(|job| job.id).collect::<Vec<_>>()));
    let rows = |rows: usize, of: usize| {
        let row = format!("({}?)", "?,".repeat(of.saturating_sub(1)));
        vec![row; rows].join(",")
    };
    let inputs: Vec<_> = jobs.iter().filter_map(|job| Some((job.id, job.input.as_ref()?))).collect();
    let mut statements = Vec::new();
    if !inputs.is_empty() {
        let sql = format!(
            "{group} INSERT INTO job_inputs (job_id, input) SELECT * FROM (VALUES {}) WHERE {none} ON CONFLICT DO NOTHING",
            rows(inputs.len(), 2)
        );
        let params = inputs.iter().flat_map(|(id, input)| [id.text(), Param::Blob(input.encode_to_vec())]);
        statements.push((sql.into(), [ids.clone()].into_iter().chain(params).collect()));
    }
    let columns: Vec<_> = (1..=NEW_JOB_PARAMS).map(|column| format!("column{column}")).collect();
    let place = format!("column{}", NEW_JOB_PARAMS + 1);
    let sql = format!(
        "{group} INSERT INTO jobs ({NEW_JOB_COLUMNS}) SELECT {}, {} FROM (VALUES {}), (SELECT {NEXT_REVISION} AS next) \
         WHERE {none} ON CONFLICT (id) DO NOTHING",
        columns.join(", "),
        new_job_constants(&format!("next + {place}"), "?2"),
        rows(jobs.len(), NEW_JOB_PARAMS + 1)
    );
    let mut params = vec![ids, now.into()];
    for (place, job) in jobs.iter().enumerate() {
        params.extend(job.params());
        params.push(integer(place as u64));
    }
    statements.push((sql.into(), params));
    statements
}

impl NewJob {
    fn params(&self) -> [Param; NEW_JOB_PARAMS] {
        let Self { id, spec, .. } = self;
        let mut command = spec.command.join(" ");
        if command.len() > SHOWN_COMMAND_BYTES {
            command.truncate(command.floor_char_boundary(SHOWN_COMMAND_BYTES));
            command.push('…');
        }
        [
            id.text(),
            command.into(),
            spec.image.as_str().into(),
            spec.vcpus().into(),
            spec.memory_mib().into(),
            spec.priority.into(),
            spec.max_attempts.into(),
            json(&spec.labels).into(),
            if spec.group_id.is_empty() { Param::Null } else { spec.group_id.as_str().into() },
            spec.array_index.into(),
            spec.retry_on().map(bit).sum::<i64>().into(),
            integer(spec.backoff_ms),
            integer(spec.max_backoff_ms),
            integer(spec.result_ttl_ms),
            Param::Blob(spec.encode_to_vec()),
        ]
    }
}

/// The bit in `jobs.retry_on`.
fn bit(on: pb::RetryOn) -> i64 {
    match on {
        pb::RetryOn::Unspecified => 0,
        pb::RetryOn::Lost => 1,
        pb::RetryOn::Failed => 2,
        pb::RetryOn::TimedOut => 4,
    }
}

/// First the VM, if the job can be assigned …
static ASSIGN_VM: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE vms SET state = '{}', job_id = ?1, jobs_assigned = jobs_assigned + 1, reason = '', \
             generation = generation + 1, \
             revision = {NEXT_REVISION}, updated_at = ?4 \
         WHERE id = ?2 AND state IN ({}) AND EXISTS (SELECT 1 FROM jobs WHERE id = ?1 AND attempt = ?3 - 1 \
             AND state IN ({}))",
        VmState::Busy,
        names(VmState::ALL.into_iter().filter(|state| state.takes_jobs()).map(VmState::as_str)),
        job_sources(JobState::Assigned),
    )
});

/// … then the job, if the change before this one was that VM's.
static ASSIGN_JOB: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE jobs SET state = '{}', attempt = ?3, attempt_end = NULL, vm_id = ?2, node_id = vm.node_id, \
             assignment = vm.kind, exit_code = NULL, signal = NULL, user_time_ms = 0, system_time_ms = 0, \
             max_rss_kib = 0, reason = '', log_bytes = 0, decision = ?5, generation = jobs.generation + 1, \
             revision = {NEXT_REVISION}, updated_at = ?4, assigned_at = ?4, started_at = NULL \
         FROM (SELECT node_id, kind FROM vms WHERE id = ?2 AND job_id = ?1 AND state = '{}' \
             AND revision = {NEXT_REVISION} - 1) AS vm \
         WHERE jobs.id = ?1 AND jobs.attempt = ?3 - 1 AND jobs.state IN ({})",
        JobState::Assigned,
        VmState::Busy,
        job_sources(JobState::Assigned),
    )
});

static START: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE jobs SET state = '{}', attempts_started = attempts_started + 1, started_at = ?3, \
             generation = generation + 1, revision = {NEXT_REVISION}, updated_at = ?4 \
         WHERE id = ?1 AND attempt = ?2 AND state IN ({})",
        JobState::Running,
        job_sources(JobState::Running),
    )
});

/// Takes the job from its Busy VM, if its attempt can be finished.
static RELEASE_VM: LazyLock<String> = LazyLock::new(|| {
    // Where the state table lets a Busy VM go when its job is over.
    let next = |kind| if VmState::Busy.may_go_to(VmState::Idle, kind) { VmState::Idle } else { VmState::Draining };
    format!(
        "UPDATE vms SET state = iif(kind = '{}', '{}', '{}'), job_id = NULL, reason = '', generation = generation + 1, \
             revision = {NEXT_REVISION}, updated_at = ?3 \
         WHERE id = (SELECT vm_id FROM jobs WHERE id = ?1 AND attempt = ?2 AND state IN ({})) \
             AND state = '{}' AND job_id = ?1",
        VmKind::Service,
        next(VmKind::Service),
        next(VmKind::Ephemeral),
        with_attempt(),
        VmState::Busy,
    )
});

static FINISH: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE jobs SET state = ?3, attempt_end = 'result', \
             attempts_started = attempts_started + (started_at IS NULL AND ?4), started_at = coalesce(started_at, ?15), \
             exit_code = ?5, signal = ?6, user_time_ms = ?7, system_time_ms = ?8, max_rss_kib = ?9, log_bytes = ?10, \
             reason = iif(cancel_requested AND reason <> '' AND (?11 = '' OR ?3 = 'Cancelled'), reason, ?11), cancel_requested = 0, finished_at = ?12, \
             expires_ms = ?14 + nullif(result_ttl_ms, 0), \
             generation = generation + 1, revision = {NEXT_REVISION}, updated_at = ?13 \
         WHERE id = ?1 AND attempt = ?2 AND state IN ({})",
        with_attempt()
    )
});

/// The same for a result that another attempt may follow. One that never started counts then, or there would be no end to
/// the attempts of a command that can't be run.
static FINISH_OR_RETRY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE jobs SET state = iif(again, '{}', ?3), attempt_end = iif(again, ?3, 'result'), \
             attempts_started = iif(again OR ?4, counted, attempts_started), started_at = coalesce(started_at, ?15), \
             exit_code = ?5, signal = ?6, user_time_ms = ?7, system_time_ms = ?8, max_rss_kib = ?9, log_bytes = ?10, \
             reason = iif(cancel_requested AND reason <> '' AND (?11 = '' OR ?3 = 'Cancelled'), reason, ?11), cancel_requested = 0, \
             finished_at = iif(again, NULL, ?12), queued_at = iif(again, ?13, queued_at), \
             not_before_ms = {}, expires_ms = iif(again, NULL, ?14 + nullif(result_ttl_ms, 0)), \
             generation = generation + 1, revision = {NEXT_REVISION}, updated_at = ?13 \
         FROM (SELECT counted, NOT cancel_requested AND retry_on & ?16 AND counted < max_attempts AS again \
             FROM (SELECT *, attempts_started + (started_at IS NULL) AS counted FROM jobs WHERE id = ?1)) \
         WHERE id = ?1 AND attempt = ?2 AND state IN ({})",
        JobState::Queued,
        pause("?14", "again"),
        with_attempt()
    )
});

static LOSE: LazyLock<String> = LazyLock::new(|| {
    let assigned = JobState::Assigned;
    format!(
        "UPDATE jobs SET \
             state = CASE WHEN again THEN '{}' WHEN cancel_requested THEN '{}' ELSE '{}' END, \
             attempt_end = 'lost', attempts_started = counted, \
             reason = iif(cancel_requested AND reason <> '', reason, ?4), \
             finished_at = iif(again, NULL, ?5), queued_at = iif(again, ?5, queued_at), \
             not_before_ms = {}, expires_ms = iif(again, NULL, ?6 + nullif(result_ttl_ms, 0)), cancel_requested = 0, \
             generation = generation + 1, revision = {NEXT_REVISION}, updated_at = ?5 \
         FROM (SELECT counted, never_started, \
                 NOT cancel_requested AND (never_started OR (retry_on & {} AND counted < max_attempts)) AS again \
             FROM (SELECT *, attempts_started + (state = '{assigned}' AND ?3) AS counted, \
                 state = '{assigned}' AND NOT ?3 AS never_started FROM jobs WHERE id = ?1)) \
         WHERE id = ?1 AND attempt = ?2 AND state IN ({})",
        JobState::Queued,
        JobState::Cancelled,
        JobState::Failed,
        pause("?6", "again AND NOT never_started"),
        bit(pb::RetryOn::Lost),
        with_attempt()
    )
});

/// When the next attempt may begin, after as many as are `counted`: `Retry::pause_after` of the root package, in SQL. NULL: at
/// once.
fn pause(now_ms: &str, condition: &str) -> String {
    format!(
        "iif({condition} AND backoff_ms > 0, \
             {now_ms} + min(backoff_ms << max(0, min(counted - 1, 31)), max_backoff_ms), NULL)"
    )
}

fn finish(job_id: JobId, attempt: u32, outcome: &Outcome, at: Timestamp) -> Statement {
    let now = time::to_text(at);
    match outcome {
        Outcome::Result { state, exit, reason, log_bytes, finished_at, started_at } => {
            let (code, signal) = match exit.map(|exit| exit.kind) {
                Some(ExitKind::Code(code)) => (Some(code), None),
                Some(ExitKind::Signal(signal)) => (None, Some(signal)),
                None => (None, None),
            };
            let mut params = vec![
                job_id.text(),
                attempt.into(),
                state.as_str().into(),
                // Whether it has started: of one that was lost sight of, its start may be all that is known.
                (exit.is_some() || started_at.is_some()).into(),
                code.into(),
                signal.into(),
                integer(exit.map_or(0, |exit| exit.user_time_ms)),
                integer(exit.map_or(0, |exit| exit.system_time_ms)),
                integer(exit.map_or(0, |exit| exit.max_rss_kib)),
                integer(*log_bytes),
                reason.into(),
                time::to_text(*finished_at).into(),
                now.into(),
                at.0.into(),
                started_at.map_or(Param::Null, text),
            ];
            let retry_on = match state {
                JobState::Failed => bit(pb::RetryOn::Failed),
                JobState::TimedOut => bit(pb::RetryOn::TimedOut),
                JobState::Queued
                | JobState::Assigned
                | JobState::Running
                | JobState::Succeeded
                | JobState::Cancelled => return (sql(&FINISH), params),
            };
            params.push(retry_on.into());
            (sql(&FINISH_OR_RETRY), params)
        }
        Outcome::Lost { started, reason, .. } => {
            let params = vec![job_id.text(), attempt.into(), (*started).into(), reason.into(), now.into(), at.0.into()];
            (sql(&LOSE), params)
        }
    }
}

/// Most late reports that are kept of an attempt.
const MAX_LATE_REPORTS: u32 = 10;

/// Each once; what an attempt came to is no late report of it.
static RECORD_LATE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO late_reports (job_id, attempt, at, state, reason) SELECT id, ?2, ?3, ?4, ?5 FROM jobs \
         WHERE id = ?1 AND (attempt > ?2 OR (attempt = ?2 AND state NOT IN ({}))) \
             AND NOT EXISTS (SELECT 1 FROM late_reports \
                 WHERE job_id = ?1 AND attempt = ?2 AND state IS ?4 AND reason = ?5) \
             AND NOT EXISTS (SELECT 1 FROM attempts \
                 WHERE job_id = ?1 AND attempt = ?2 AND iif(reported, state, NULL) IS ?4) \
             AND (SELECT count(*) FROM late_reports WHERE job_id = ?1 AND attempt = ?2) < {MAX_LATE_REPORTS}",
        with_attempt()
    )
});

fn record_late(job_id: JobId, attempt: u32, outcome: &Outcome, now: String) -> Statement {
    let (state, reason) = match outcome {
        Outcome::Result { state, reason, .. } => (state.as_str().into(), reason),
        Outcome::Lost { reason, .. } => (Param::Null, reason),
    };
    (sql(&RECORD_LATE), vec![job_id.text(), attempt.into(), now.into(), state, reason.into()])
}

static CANCEL: LazyLock<String> = LazyLock::new(|| {
    let queued = JobState::Queued;
    format!(
        "UPDATE jobs SET state = iif(state = '{queued}', '{}', state), cancel_requested = (state <> '{queued}'), \
             reason = ?2, finished_at = iif(state = '{queued}', ?3, NULL), \
             expires_ms = iif(state = '{queued}', ?4 + nullif(result_ttl_ms, 0), NULL), generation = generation + 1, \
             revision = {NEXT_REVISION}, updated_at = ?3 \
         WHERE id = ?1 AND NOT cancel_requested AND state IN ({})",
        JobState::Cancelled,
        job_sources(JobState::Cancelled)
    )
});

static FAIL_QUEUED: LazyLock<String> = LazyLock::new(|| {
    format!(
        "UPDATE jobs SET state = ?4, reason = ?2, finished_at = ?3, \
             expires_ms = ?5 + nullif(result_ttl_ms, 0), generation = generation + 1, \
             revision = {NEXT_REVISION}, updated_at = ?3 \
         WHERE id = ?1 AND state = '{}'",
        JobState::Queued
    )
});

static REGISTER_NODE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO nodes (id, state, endpoint, driver, vcpus, memory_mib, max_vms, images, incarnation, revision, \
             registered_at, updated_at, reason, labels, pressure, volumes, scratch_mib) \
         SELECT ?1, '{}', ?2, ?3, ?4, ?5, ?6, ?7, 1, {NEXT_REVISION}, ?8, ?8, '', ?9, ?10, ?11, ?12 WHERE true \
         ON CONFLICT (id) DO UPDATE SET state = wanted, endpoint = excluded.endpoint, \
             driver = excluded.driver, vcpus = excluded.vcpus, memory_mib = excluded.memory_mib, \
             max_vms = excluded.max_vms, images = excluded.images, incarnation = incarnation + 1, \
             revision = excluded.revision, registered_at = excluded.registered_at, \
             updated_at = excluded.updated_at, reason = wanted_reason, labels = excluded.labels, \
             pressure = excluded.pressure, volumes = excluded.volumes, scratch_mib = excluded.scratch_mib",
        NodeState::Ready
    )
});

fn register_node(node: &Node, now: String) -> Statement {
    let params = vec![
        node.id.as_str().into(),
        node.endpoint.as_str().into(),
        node.driver.as_str().into(),
        node.vcpus.into(),
        integer(node.memory_mib),
        node.max_vms.into(),
        json(&node.images).into(),
        now.into(),
        json(&node.labels).into(),
        json(&node.pressure.iter().map(|pressure| pressure.as_str()).collect::<Vec<_>>()).into(),
        json(&node.volumes).into(),
        integer(node.scratch_mib),
    ];
    (sql(&REGISTER_NODE), params)
}

/// A Lost node stays Lost, and comes back as what is wanted.
static UPDATE_NODE: LazyLock<String> = LazyLock::new(|| {
    let lost = NodeState::Lost;
    format!(
        "UPDATE nodes SET state = iif(state = '{lost}', state, ?2), reason = iif(state = '{lost}', reason, ?3), \
             wanted = ?2, wanted_reason = ?3, drain_deadline = ?4, revision = {NEXT_REVISION}, updated_at = ?5 \
         WHERE id = ?1 AND NOT (wanted = ?2 AND wanted_reason = ?3 AND drain_deadline IS ?4)"
    )
});

const TAKE_LEASE: &str = "INSERT INTO leases (name, holder, instance, epoch) SELECT ?1, ?2, ?3, 1 WHERE true \
     ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, instance = excluded.instance, epoch = epoch + 1 \
     WHERE epoch = ?4";

/// The epoch stays: the next one to take it makes it greater.
const RELEASE_LEASE: &str =
    "UPDATE leases SET holder = '', instance = '' WHERE name = ?1 AND holder = ?2 AND instance = ?3";

static LOSE_NODE: LazyLock<String> = LazyLock::new(|| {
    let lost = NodeState::Lost;
    format!(
        "UPDATE nodes SET state = '{lost}', reason = ?3, revision = {NEXT_REVISION}, updated_at = ?4 \
         WHERE id = ?1 AND incarnation = ?2 AND state <> '{lost}'"
    )
});

/// The condition under which the state table lets a VM go to `to`.
fn may_reach(to: VmState) -> String {
    let of_kind = |kind: VmKind| {
        let sources = VmState::ALL.into_iter().filter(|from| from.may_go_to(to, kind));
        format!("(kind = '{kind}' AND state IN ({}))", names(sources.map(VmState::as_str)))
    };
    format!("({} OR {})", of_kind(VmKind::Ephemeral), of_kind(VmKind::Service))
}

/// The states from which the state table lets a job go to `to`.
fn job_sources(to: JobState) -> String {
    names(JobState::ALL.into_iter().filter(|from| from.may_go_to(to)).map(JobState::as_str))
}

/// The states of a job whose attempt can still end: those that can be lost.
fn with_attempt() -> String {
    job_sources(JobState::Queued)
}

/// A list of constants for `IN (…)`.
pub(crate) fn names(names: impl Iterator<Item = &'static str>) -> String {
    names.map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
}

fn index(state: VmState) -> usize {
    VmState::ALL.into_iter().position(|other| other == state).unwrap_or(0)
}

fn sql(statement: &'static str) -> Cow<'static, str> {
    Cow::Borrowed(statement)
}

fn text(time: Timestamp) -> Param {
    time::to_text(time).into()
}

/// SQLite's integers are signed.
fn integer(number: u64) -> Param {
    Param::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

/// Strings, lists and maps of strings always have a JSON form.
fn json(value: &(impl serde::Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

trait Text {
    fn text(&self) -> Param;
}

impl Text for VmId {
    fn text(&self) -> Param {
        Param::Text(self.to_string())
    }
}

impl Text for JobId {
    fn text(&self) -> Param {
        Param::Text(self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finish_guard_fits_every_final_state() {
        for state in JobState::ALL.into_iter().filter(|state| state.is_terminal()) {
            for from in JobState::ALL.into_iter().filter(|from| from.may_go_to(JobState::Queued)) {
                assert!(from.may_go_to(state), "{from} -> {state}");
            }
        }
    }

    #[test]
    fn no_statement_reads_a_clock_or_randomness() {
        let node = Node {
            id: NodeId::parse("", "n").unwrap(),
            state: NodeState::Ready,
            endpoint: String::new(),
            driver: String::new(),
            vcpus: 1,
            memory_mib: 1,
            max_vms: 1,
            images: vec![],
            incarnation: 0,
            revision: 0,
            registered_at: Timestamp(0),
            labels: std::collections::BTreeMap::new(),
            reason: String::new(),
            updated_at: Timestamp(0),
            drain_deadline: None,
            wanted: NodeState::Ready,
            pressure: Default::default(),
            volumes: vec![],
            scratch_mib: 0,
        };
        let id = JobId::random();
        let lost = Outcome::Lost { started: true, reason: String::new(), node: None };
        let failed = Outcome::Result {
            state: JobState::Failed,
            exit: None,
            reason: String::new(),
            log_bytes: 0,
            finished_at: Timestamp(0),
            started_at: None,
        };
        let late = Mutation::RecordLate {
            job_id: id,
            attempt: 1,
            outcome: failed.clone(),
            refusal: blixard::error::invalid("", "", ""),
        };
        let job = NewJob { id, spec: pb::JobSpec::default(), input: Some(pb::JobInput::default()) };
        let holder = Holder { name: "a".into(), instance: uuid::Uuid::nil() };
        let mutations = [
            Mutation::RegisterNode { node },
            Mutation::FinishAttempt { job_id: id, attempt: 1, outcome: lost, scheduler_epoch: 1 },
            Mutation::FinishAttempt { job_id: id, attempt: 1, outcome: failed, scheduler_epoch: 0 },
            late,
            Mutation::CancelJob { id, reason: String::new() },
            Mutation::ResizeVm {
                id: VmId::random(),
                to: VmShape { vcpus: 1, memory_mib: 128 },
                expected_generation: 0,
            },
            Mutation::AssignJob { job_id: id, vm_id: VmId::random(), attempt: 1, decision: None, scheduler_epoch: 0 },
            Mutation::CreateJob { job: Box::new(job.clone()) },
            Mutation::CreateJobs { jobs: vec![job] },
            Mutation::TakeLease { name: "l".into(), holder: holder.clone(), epoch: 0 },
            Mutation::ReleaseLease { name: "l".into(), holder },
            Mutation::ForgetExpiredJobs { now: Timestamp(0), at_most: 1 },
            Mutation::ForgetVms { ended_before: Timestamp(0), at_most: 1 },
            Mutation::ForgetJobs { ended_before: Timestamp(0), at_most: 1 },
            Mutation::CompactEvents { through: 1 },
        ];
        for (sql, _) in mutations.iter().flat_map(|mutation| mutation.statements(Timestamp(0))) {
            let sql = sql.to_lowercase();
            for banned in ["current_", "random", "now", "date(", "strftime", "datetime", "unixepoch"] {
                assert!(!sql.contains(banned), "{banned} in {sql}");
            }
        }
    }
}
