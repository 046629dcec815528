//! Rows of the tables as the contract's messages. What was checked when it was written is not checked again.

use blixard::{
    id::{JobId, NodeId, VmId},
    job::JobState,
    limits,
    node::{HostPressure, NodeState},
    pb::common::v1 as pb,
    time::Timestamp,
    vm::{VmConfig, VmKind, VmState},
};
use hiqlite::rusqlite::{Connection, OptionalExtension as _, Result, Row, types::Type};
use prost::Message as _;
use uuid::Uuid;

use crate::{
    leases,
    mutation::{SCHEDULER_EPOCH, names},
    time,
};

/// The columns that [`VmRow::read`] expects.
pub(crate) const VM_COLUMNS: &str = "id, config, state, node_id, job_id, reason, generation, revision, created_at, updated_at, created_revision, \
     jobs_assigned, stop_grace_ms, vcpus, memory_mib";
/// The columns that [`JobRow::read`] expects.
pub(crate) const JOB_COLUMNS: &str = "id, spec, state, attempt, vm_id, node_id, assignment, cancel_requested, exit_code, \
     signal, user_time_ms, system_time_ms, max_rss_kib, reason, log_bytes, generation, revision, created_at, assigned_at, \
     started_at, finished_at, created_revision, attempt_end, queued_at, not_before_ms, attempts_started";
/// The columns that [`node`] expects.
pub(crate) const NODE_COLUMNS: &str = "id, state, endpoint, driver, vcpus, memory_mib, max_vms, images, incarnation, revision, registered_at, \
     labels, reason, updated_at, drain_deadline, wanted, pressure, volumes, scratch_mib";

/// How an attempt ended: the value of `jobs.attempt_end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttemptEnd {
    /// It came to what the job came to.
    Result,
    /// It came to this, and another one may follow.
    Retried(JobState),
    Lost,
}

/// A row of `vms`.
#[derive(Debug, Clone)]
pub(crate) struct VmRow {
    pub(crate) vm: pb::Vm,
    pub(crate) state: VmState,
    /// The text in `config`: with the shape that was asked for.
    pub(crate) config: String,
    /// Orders rows by when they were made.
    pub(crate) created_revision: u64,
}

/// A row of `jobs`.
#[derive(Debug, Clone)]
pub(crate) struct JobRow {
    pub(crate) job: pb::Job,
    pub(crate) state: JobState,
    /// The bytes in `spec`.
    pub(crate) spec: Vec<u8>,
    /// How the latest attempt ended.
    pub(crate) attempt_end: Option<AttemptEnd>,
    /// Orders rows by when they were made.
    pub(crate) created_revision: u64,
}

impl VmRow {
    /// Reads [`VM_COLUMNS`].
    pub(crate) fn read(row: &Row<'_>) -> Result<Self> {
        let config: String = row.get(1)?;
        let asked: VmConfig = serde_json::from_str(&config).map_err(|error| damaged(1, error))?;
        let vcpus = row.get::<_, Option<u32>>(13)?.unwrap_or(asked.vcpus);
        let memory_mib = row.get::<_, Option<u32>>(14)?.unwrap_or(asked.memory_mib);
        let state = vm_state(row, 2)?;
        let vm = pb::Vm {
            id: row.get(0)?,
            config: Some(VmConfig { vcpus, memory_mib, ..asked }.into()),
            state: state.to_pb().into(),
            node_id: row.get(3)?,
            job_id: text(row, 4)?,
            reason: row.get(5)?,
            generation: number(row, 6)?,
            revision: number(row, 7)?,
            created_at: Some(when(row, 8)?),
            updated_at: Some(when(row, 9)?),
            jobs_assigned: row.get::<_, Option<u32>>(11)?.unwrap_or(0),
            stop_grace_ms: row.get::<_, Option<i64>>(12)?.map(i64::unsigned_abs),
        };
        Ok(Self { vm, state, config, created_revision: number(row, 10)? })
    }

    /// The VM with this id.
    pub(crate) fn find(connection: &Connection, id: &str) -> Result<Option<Self>> {
        let sql = format!("SELECT {VM_COLUMNS} FROM vms WHERE id = ?1");
        connection.prepare_cached(&sql)?.query_row([id], Self::read).optional()
    }
}

impl JobRow {
    /// Reads [`JOB_COLUMNS`].
    pub(crate) fn read(row: &Row<'_>) -> Result<Self> {
        let spec: Vec<u8> = row.get(1)?;
        let state = from_name(row, 2, JobState::from_name)?;
        let created_at = when(row, 17)?;
        // While it waits; the column keeps what it last was.
        let not_before = row.get::<_, Option<i64>>(24)?.filter(|_| state == JobState::Queued);
        let job = pb::Job {
            id: row.get(0)?,
            spec: Some(pb::JobSpec::decode(spec.as_slice()).map_err(|error| damaged(1, error))?),
            state: state.to_pb().into(),
            attempt: row.get(3)?,
            vm_id: text(row, 4)?,
            node_id: text(row, 5)?,
            assignment: assignment(row, 6)?.into(),
            cancel_requested: row.get(7)?,
            exit: exit(row, 8)?,
            reason: row.get(13)?,
            log_bytes: number(row, 14)?,
            generation: number(row, 15)?,
            revision: number(row, 16)?,
            created_at: Some(created_at),
            assigned_at: maybe_when(row, 18)?,
            started_at: maybe_when(row, 19)?,
            finished_at: maybe_when(row, 20)?,
            queued_at: maybe_when(row, 23)?.or(Some(created_at)),
            not_before: not_before.map(|ms| Timestamp(ms).into()),
            attempts_started: row.get::<_, Option<u32>>(25)?.unwrap_or(0),
        };
        let attempt_end = match row.get_ref(22)?.as_str_or_null()? {
            Some("result") => Some(AttemptEnd::Result),
            Some("lost") => Some(AttemptEnd::Lost),
            Some(_) => Some(AttemptEnd::Retried(from_name(row, 22, JobState::from_name)?)),
            None => None,
        };
        Ok(Self { job, state, spec, attempt_end, created_revision: number(row, 21)? })
    }

    /// The job with this id.
    pub(crate) fn find(connection: &Connection, id: &str) -> Result<Option<Self>> {
        let sql = format!("SELECT {JOB_COLUMNS} FROM jobs WHERE id = ?1");
        connection.prepare_cached(&sql)?.query_row([id], Self::read).optional()
    }
}

/// A VM as [`VmRow::read`] finds it after its creation.
pub(crate) fn made_vm(id: &VmId, config: &VmConfig, node_id: &NodeId, at: Timestamp, revision: u64) -> pb::Vm {
    pb::Vm {
        id: id.to_string(),
        config: Some(config.clone().into()),
        state: VmState::Starting.to_pb().into(),
        node_id: node_id.to_string(),
        generation: 1,
        revision,
        created_at: Some(at.into()),
        updated_at: Some(at.into()),
        ..pb::Vm::default()
    }
}

/// A job as [`JobRow::read`] finds it after its creation.
pub(crate) fn made_job(id: &JobId, spec: &pb::JobSpec, at: Timestamp, revision: u64) -> pb::Job {
    pb::Job {
        id: id.to_string(),
        spec: Some(spec.clone()),
        state: JobState::Queued.to_pb().into(),
        generation: 1,
        revision,
        created_at: Some(at.into()),
        queued_at: Some(at.into()),
        ..pb::Job::default()
    }
}

/// Reads [`NODE_COLUMNS`].
pub(crate) fn node(row: &Row<'_>) -> Result<pb::Node> {
    let images: String = row.get(7)?;
    Ok(pb::Node {
        id: row.get(0)?,
        state: from_name(row, 1, NodeState::from_name)?.to_pb().into(),
        endpoint: row.get(2)?,
        driver: row.get(3)?,
        vcpus: row.get(4)?,
        memory_mib: number(row, 5)?,
        max_vms: row.get(6)?,
        images: serde_json::from_str(&images).map_err(|error| damaged(7, error))?,
        incarnation: number(row, 8)?,
        revision: number(row, 9)?,
        registered_at: Some(when(row, 10)?),
        labels: serde_json::from_str(row.get_ref(11)?.as_str_or_null()?.unwrap_or("{}"))
            .map_err(|error| damaged(11, error))?,
        reason: text(row, 12)?,
        updated_at: maybe_when(row, 13)?,
        drain_deadline: maybe_when(row, 14)?,
        wanted: match row.get_ref(15)?.as_str_or_null()? {
            None => NodeState::Ready,
            Some(_) => from_name(row, 15, NodeState::from_name)?,
        }
        .to_pb()
        .into(),
        pressure: pressure(row, 16)?,
        volumes: serde_json::from_str(row.get_ref(17)?.as_str_or_null()?.unwrap_or("[]"))
            .map_err(|error| damaged(17, error))?,
        scratch_mib: row.get::<_, Option<i64>>(18)?.and_then(|mib| u64::try_from(mib).ok()).unwrap_or(0),
    })
}

fn pressure(row: &Row<'_>, column: usize) -> Result<Vec<i32>> {
    let names: Vec<String> = serde_json::from_str(row.get_ref(column)?.as_str_or_null()?.unwrap_or("[]"))
        .map_err(|error| damaged(column, error))?;
    let known = names.iter().filter_map(|name| HostPressure::from_name(name));
    Ok(known.map(|pressure| pressure.to_pb().into()).collect())
}

/// The node with this id.
pub(crate) fn find_node(connection: &Connection, id: &str) -> Result<Option<pb::Node>> {
    let sql = format!("SELECT {NODE_COLUMNS} FROM nodes WHERE id = ?1");
    connection.prepare_cached(&sql)?.query_row([id], node).optional()
}

/// The lease of this name, as it is recorded.
pub(crate) fn find_lease(connection: &Connection, name: &str) -> Result<Option<leases::Recorded>> {
    let sql = "SELECT holder, instance, epoch FROM leases WHERE name = ?1";
    let lease = |row: &Row<'_>| {
        let holder = match row.get_ref(0)?.as_str()? {
            "" => None,
            name => {
                let instance = from_name(row, 1, |text| Uuid::parse_str(text).ok())?;
                Some(leases::Holder { name: name.to_owned(), instance })
            }
        };
        Ok(leases::Recorded { holder, epoch: number(row, 2)? })
    };
    connection.prepare_cached(sql)?.query_row([name], lease).optional()
}

/// The epoch of the scheduler that leads; 0: none ever has.
pub(crate) fn scheduler_epoch(connection: &Connection) -> Result<u64> {
    let sql = format!("SELECT coalesce({SCHEDULER_EPOCH}, 0)");
    connection.prepare_cached(&sql)?.query_row([], |row| number(row, 0))
}

/// How an attempt ended after which the job went back to the queue.
pub(crate) fn attempt_end(connection: &Connection, job_id: &str, attempt: u32) -> Result<Option<AttemptEnd>> {
    let sql = "SELECT state, reported FROM attempts WHERE job_id = ?1 AND attempt = ?2";
    let end = |row: &Row<'_>| {
        Ok(match row.get(1)? {
            true => AttemptEnd::Retried(from_name(row, 0, JobState::from_name)?),
            false => AttemptEnd::Lost,
        })
    };
    connection.prepare_cached(sql)?.query_row((job_id, attempt), end).optional()
}

/// The attempts of a job, the first one first: the newest ones that an answer has room for.
pub(crate) fn attempts(connection: &Connection, job: &JobRow) -> Result<Vec<pb::Attempt>> {
    let columns = "job_id, attempt, vm_id, node_id, assignment, state, reported, exit_code, signal, user_time_ms, \
         system_time_ms, max_rss_kib, reason, log_bytes, assigned_at, started_at, finished_at, decision";
    let earlier = format!("SELECT {columns} FROM attempts WHERE job_id = ?1");
    // An attempt after which the job waits again is among the earlier ones.
    let ended = names(JobState::ALL.into_iter().filter(|state| state.is_terminal()).map(JobState::as_str));
    let latest = columns
        .replace("job_id", "id")
        .replace(" state", &format!(" iif(state IN ({ended}), state, NULL)"))
        .replace("reported", "attempt_end IS 'result'");
    let sql = format!(
        "{earlier} UNION ALL SELECT {latest} FROM jobs WHERE id = ?1 AND attempt > 0 \
             AND NOT EXISTS (SELECT 1 FROM attempts WHERE job_id = ?1 AND attempt = jobs.attempt) \
         ORDER BY 2 DESC LIMIT 1000"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([&job.job.id])?;
    let (mut attempts, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let mut attempt = attempt(row)?;
        attempt.late_reports = late_reports(connection, &attempt)?;
        bytes += attempt.encoded_len();
        if bytes > limits::MAX_PAGE_BYTES && !attempts.is_empty() {
            break;
        }
        attempts.push(attempt);
    }
    attempts.reverse();
    Ok(attempts)
}

fn attempt(row: &Row<'_>) -> Result<pb::Attempt> {
    let decision: Option<Vec<u8>> = row.get(17)?;
    let decision = decision.map(|bytes| pb::Decision::decode(bytes.as_slice())).transpose();
    Ok(pb::Attempt {
        job_id: row.get(0)?,
        attempt: row.get(1)?,
        vm_id: text(row, 2)?,
        node_id: text(row, 3)?,
        assignment: assignment(row, 4)?.into(),
        state: maybe_job_state(row, 5)?.into(),
        reported: row.get(6)?,
        exit: exit(row, 7)?,
        reason: row.get(12)?,
        log_bytes: number(row, 13)?,
        assigned_at: maybe_when(row, 14)?,
        started_at: maybe_when(row, 15)?,
        finished_at: maybe_when(row, 16)?,
        decision: decision.map_err(|error| damaged(17, error))?,
        late_reports: vec![],
    })
}

fn late_reports(connection: &Connection, attempt: &pb::Attempt) -> Result<Vec<pb::LateReport>> {
    let sql = "SELECT at, state, reason FROM late_reports WHERE job_id = ?1 AND attempt = ?2 ORDER BY seq";
    let report = |row: &Row<'_>| {
        Ok(pb::LateReport { at: Some(when(row, 0)?), state: maybe_job_state(row, 1)?.into(), reason: row.get(2)? })
    };
    let mut statement = connection.prepare_cached(sql)?;
    statement.query_map((&attempt.job_id, attempt.attempt), report)?.collect()
}

/// Reads how a command ended from five columns.
fn exit(row: &Row<'_>, at: usize) -> Result<Option<pb::ExitStatus>> {
    let (exit_code, signal): (Option<i32>, Option<i32>) = (row.get(at)?, row.get(at + 1)?);
    let exit = pb::ExitStatus {
        exit_code,
        signal,
        user_time_ms: number(row, at + 2)?,
        system_time_ms: number(row, at + 3)?,
        max_rss_kib: number(row, at + 4)?,
    };
    Ok((exit_code.is_some() || signal.is_some()).then_some(exit))
}

fn assignment(row: &Row<'_>, column: usize) -> Result<pb::AssignmentKind> {
    Ok(match row.get_ref(column)?.as_str_or_null()? {
        None => pb::AssignmentKind::Unspecified,
        Some(_) => match from_name(row, column, VmKind::from_name)? {
            VmKind::Ephemeral => pb::AssignmentKind::Ephemeral,
            VmKind::Service => pb::AssignmentKind::Service,
        },
    })
}

/// Reads the state of a job; NULL is unspecified.
fn maybe_job_state(row: &Row<'_>, column: usize) -> Result<pb::JobState> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(pb::JobState::Unspecified),
        Some(_) => Ok(from_name(row, column, JobState::from_name)?.to_pb()),
    }
}

/// Reads the state of a VM; NULL is an error.
pub(crate) fn vm_state(row: &Row<'_>, column: usize) -> Result<VmState> {
    from_name(row, column, VmState::from_name)
}

/// Reads the state of a VM that may be NULL.
pub(crate) fn maybe_vm_state(row: &Row<'_>, column: usize) -> Result<Option<VmState>> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(None),
        Some(_) => vm_state(row, column).map(Some),
    }
}

/// Reads text; NULL is empty.
pub(crate) fn text(row: &Row<'_>, column: usize) -> Result<String> {
    Ok(row.get::<_, Option<String>>(column)?.unwrap_or_default())
}

/// Reads a number that is never negative.
pub(crate) fn number(row: &Row<'_>, column: usize) -> Result<u64> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|error| damaged(column, error))
}

/// Reads a time.
pub(crate) fn when(row: &Row<'_>, column: usize) -> Result<prost_types::Timestamp> {
    from_name(row, column, time::from_text).map(Into::into)
}

fn maybe_when(row: &Row<'_>, column: usize) -> Result<Option<prost_types::Timestamp>> {
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(None),
        Some(_) => when(row, column).map(Some),
    }
}

/// Reads text and parses it.
fn from_name<T>(row: &Row<'_>, column: usize, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
    let value = row.get_ref(column)?;
    let text = value.as_str().map_err(|error| damaged(column, error))?;
    parse(text).ok_or_else(|| damaged(column, format!("unknown value {text:?}")))
}

/// A value that this program did not write.
fn damaged(column: usize, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> hiqlite::rusqlite::Error {
    hiqlite::rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into())
}
