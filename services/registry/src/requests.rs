//! Request ids: a change that is asked for twice takes place once, and both callers get the first answer.
//!
//! ```text
//!   one transaction:  statements, each only while the id is not recorded ─► record: body, rows changed, rows after
//!   then:             the record, whoever made it ─► judge ─► answer
//! ```
//! Nothing is looked up before it is written: a copy of a change that comes late, with a deposed leader's batch, finds the
//! record like any other repeat. The first answer is judged from the record as well, so every repeat gets the same one, a
//! refusal too, on any replica and after any restart.
//!
//! The record holds the rows in the state in which the guards of the statements saw or left them; a verdict on it never is
//! "try again".

use blixard::{
    error::{Error, invalid},
    pb::registry::v1 as wire,
    time::Timestamp,
};
use hiqlite::{
    Param,
    rusqlite::{Connection, OptionalExtension as _, Result, Row},
};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    mutation::{Key, Mutation, SCHEDULER_EPOCH, Statement, only_if},
    rows::{JOB_COLUMNS, JobRow, NODE_COLUMNS, VM_COLUMNS, VmRow, node, number},
    verdict::{After, Verdict, judge, reused},
};

/// How long a request is remembered: longer than anybody repeats one.
const REMEMBERED_MS: i64 = 24 * 3600 * 1000;
/// Most requests that are remembered: about 150 MB of database, and at a thousand a second the last three minutes, when
/// callers repeat for seconds while a leader is elected.
const REMEMBERED: i64 = 200_000;

/// The id that a caller gave to a change, and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RequestId {
    id: Uuid,
    /// Of the RPC and the body.
    digest: Vec<u8>,
}

impl RequestId {
    /// The id of the next part of a request that takes place in several changes.
    pub(crate) fn next_part(&self) -> Self {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(Sha256::digest(self.id)).for_each(|(byte, hashed)| *byte = hashed);
        Self { id: uuid::Builder::from_custom_bytes(bytes).into_uuid(), digest: self.digest.clone() }
    }

    pub(crate) fn key(&self) -> Key {
        Key::Request(self.id)
    }

    /// The statements of a change, so that they do nothing when the id is recorded already, and the record.
    pub(crate) fn once(&self, mutation: &Mutation, now: Timestamp) -> Vec<Statement> {
        let statements = mutation.statements(now).into_iter().map(|statement| self.unless_recorded(statement));
        statements.chain([self.record(mutation, now)]).collect()
    }

    fn unless_recorded(&self, statement: Statement) -> Statement {
        let guard = |place| format!("NOT EXISTS (SELECT 1 FROM requests WHERE id = ?{place})");
        only_if(statement, self.id.to_string(), guard)
    }

    /// `changes()` are those of the statement before, which tells whether the mutation took place.
    fn record(&self, mutation: &Mutation, now: Timestamp) -> Statement {
        let (mut vm, mut job, mut node) = (Param::Null, Param::Null, Param::Null);
        for key in mutation.shows() {
            match key {
                Key::Vm(id) => vm = id.to_string().into(),
                Key::Job(id) => job = id.to_string().into(),
                Key::Node(id) => node = id.as_str().into(),
                Key::Lease(_) | Key::Attempt(..) | Key::Request(_) => {}
            }
        }
        let sql = format!(
            "INSERT INTO requests (at, id, digest, changed, epoch, vm, job, spec, node) \
             SELECT ?1, ?2, ?3, changes(), coalesce({SCHEDULER_EPOCH}, 0), \
                 (SELECT {} FROM vms WHERE id = ?4), (SELECT {} FROM jobs WHERE id = ?5), \
                 (SELECT spec FROM jobs WHERE id = ?5), (SELECT {} FROM nodes WHERE id = ?6) \
             WHERE true ON CONFLICT (id) DO NOTHING",
            packed(VM_COLUMNS),
            packed(JOB_COLUMNS),
            packed(NODE_COLUMNS)
        );
        let digest = Param::Blob(self.digest.clone());
        (sql.into(), vec![now.0.into(), self.id.to_string().into(), digest, vm, job, node])
    }

    /// What the change came to.
    pub(crate) fn judge(&self, mutation: &Mutation, after: &After) -> Verdict {
        match after.requests.get(&self.id) {
            // It was forgotten just now.
            None => Verdict::Again,
            Some(recorded) if recorded.digest == self.digest => judge(mutation, recorded.changed, &recorded.after),
            Some(_) => Verdict::Denied(reused(&self.id)),
        }
    }
}

/// Forgets the oldest requests of those that need not be remembered any more: at most this many, found without a search.
pub(crate) fn forget(now: Timestamp, at_most: usize) -> Statement {
    let sql = "DELETE FROM requests WHERE seq IN (SELECT seq FROM (SELECT seq, at FROM requests ORDER BY seq LIMIT ?1) \
         WHERE at < ?2 OR seq <= (SELECT max(seq) FROM requests) - ?3)";
    let at_most = i64::try_from(at_most).unwrap_or(i64::MAX);
    (sql.into(), vec![at_most.into(), (now.0 - REMEMBERED_MS).into(), REMEMBERED.into()])
}

/// What is recorded of a request.
#[derive(Debug)]
pub(crate) struct Recorded {
    digest: Vec<u8>,
    changed: usize,
    after: After,
}

impl Recorded {
    pub(crate) fn find(connection: &Connection, id: Uuid) -> Result<Option<Self>> {
        let [vm, job, node_of] =
            [("vm", VM_COLUMNS), ("job", JOB_COLUMNS), ("node", NODE_COLUMNS)].map(|(name, columns)| {
                format!("SELECT {} FROM requests WHERE id = ?1 AND {name} IS NOT NULL", unpacked(name, columns))
            });
        let mut after = After::default();
        if let Some(row) = find(connection, &vm, id, VmRow::read)?
            && let Ok(id) = row.vm.id.parse()
        {
            after.vms.insert(id, row);
        }
        if let Some(row) = find(connection, &job, id, JobRow::read)?
            && let Ok(id) = row.job.id.parse()
        {
            after.jobs.insert(id, row);
        }
        if let Some(row) = find(connection, &node_of, id, node)?
            && let Ok(id) = blixard::id::NodeId::parse("id", &row.id)
        {
            after.nodes.insert(id, row);
        }
        find(connection, "SELECT digest, changed, epoch FROM requests WHERE id = ?1", id, |row| {
            let changed = usize::try_from(number(row, 1)?).unwrap_or(usize::MAX);
            Ok(Self { digest: row.get(0)?, changed, after: After { scheduler_epoch: number(row, 2)?, ..after } })
        })
    }
}

fn find<T>(
    connection: &Connection,
    sql: &str,
    id: Uuid,
    read: impl FnOnce(&Row<'_>) -> Result<T>,
) -> Result<Option<T>> {
    connection.prepare_cached(sql)?.query_row([id.to_string()], read).optional()
}

/// A row as one JSON array. JSON holds no bytes, so `spec` has a column of its own.
fn packed(columns: &str) -> String {
    format!("json_array({})", columns.replace("spec", "NULL"))
}

/// The columns of a row that was [`packed`]. One that is added later, at the end, is NULL in records from before.
fn unpacked(name: &str, columns: &str) -> String {
    let column = |(at, column): (usize, &str)| match column {
        "spec" => column.to_owned(),
        _ => format!("{name} ->> {at}"),
    };
    columns.split(", ").enumerate().map(column).collect::<Vec<_>>().join(", ")
}

/// The request of a mutation.
pub(crate) trait Repeatable: prost::Message {
    const RPC: &'static str;

    fn request_id(&mut self) -> &mut String;
}

macro_rules! repeatable {
    ($($request:ident)*) => {
        $(impl Repeatable for wire::$request {
            const RPC: &'static str = stringify!($request);

            fn request_id(&mut self) -> &mut String {
                &mut self.request_id
            }
        })*
    };
}

repeatable! {
    CreateVmRequest TransitionVmRequest PurgeVmsRequest CreateJobRequest AssignJobRequest StartAttemptRequest
    FinishAttemptRequest CancelJobRequest FailQueuedJobRequest RegisterNodeRequest UpdateNodeRequest ResizeVmRequest
}

/// A request and its id, if its caller gave it one.
pub(crate) fn parse<R: Repeatable>(mut request: R) -> std::result::Result<(R, Option<RequestId>), Error> {
    let text = std::mem::take(request.request_id());
    if text.is_empty() {
        return Ok((request, None));
    }
    let id = Uuid::parse_str(&text).map_err(|_| invalid("request_id", text, "a UUID or nothing"))?;
    // What was decoded is encoded again: the same values are the same bytes, however the caller had ordered them.
    let digest = Sha256::new_with_prefix(R::RPC).chain_update([0]).chain_update(request.encode_to_vec()).finalize();
    Ok((request, Some(RequestId { id, digest: digest.to_vec() })))
}

#[cfg(test)]
mod tests {
    use blixard::{
        id::{JobId, NodeId, VmId},
        job::JobState,
        node::{Node, NodeState},
        pb::common::v1 as pb,
        vm::{VmConfig, VmKind, VmShape, VmState},
    };
    use hiqlite::rusqlite::types::Value;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        leases::Holder,
        mutation::{NewJob, Outcome},
        schema,
        simulation::{commit, execute},
    };

    /// A database without Raft in front of it.
    struct Database(Connection);

    impl Database {
        fn new() -> Self {
            let database = Self(schema::in_memory());
            let holder = Holder { name: "a".into(), instance: Uuid::nil() };
            database
                .commit(&[(Mutation::TakeLease { name: "scheduler".into(), holder, epoch: 0 }, None)], Timestamp(0));
            database
        }

        fn execute(&self, statement: Statement) -> usize {
            execute(&self.0, statement)
        }

        /// Commits units together; what each came to.
        fn commit(&self, units: &[(Mutation, Option<RequestId>)], now: Timestamp) -> Vec<String> {
            commit(&self.0, units, now).iter().map(|verdict| format!("{verdict:?}")).collect()
        }

        fn tables(&self) -> Vec<Vec<Vec<Value>>> {
            let table = |name| {
                let mut statement = self.0.prepare(&format!("SELECT * FROM {name} ORDER BY 1")).unwrap();
                let columns = statement.column_count();
                let row = |row: &Row<'_>| (0..columns).map(|column| row.get(column)).collect();
                statement.query_map([], row).unwrap().map(Result::unwrap).collect()
            };
            ["vms", "jobs", "nodes", "attempts", "job_inputs", "leases", "events"].map(table).into()
        }
    }

    fn request(id: u128, body: u8) -> RequestId {
        RequestId { id: Uuid::from_u128(id), digest: vec![body] }
    }

    fn create_vm(vm: u128, kind: VmKind) -> Mutation {
        let labels = [("\"a\"".to_owned(), "é\u{1}".to_owned())].into();
        let config = VmConfig {
            kind,
            image: "default".into(),
            vcpus: 1,
            memory_mib: 512,
            labels,
            node_id: None,
            egress: Default::default(),
            volumes: Default::default(),
        };
        let node_id = NodeId::parse("", "n").unwrap();
        Mutation::CreateVm { id: VmId(Uuid::from_u128(vm)), config, node_id, scheduler_epoch: 0 }
    }

    fn register() -> Mutation {
        let node = Node {
            id: NodeId::parse("", "n").unwrap(),
            state: NodeState::Ready,
            endpoint: "http://h:1".into(),
            driver: "process".into(),
            vcpus: 1,
            memory_mib: 1,
            max_vms: 1,
            images: vec!["default".into()],
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
        Mutation::RegisterNode { node }
    }

    fn mutation() -> impl Strategy<Value = Mutation> {
        let vm = || (1..=2u128).prop_map(|id| VmId(Uuid::from_u128(id)));
        let job = || (1..=2u128).prop_map(|id| JobId(Uuid::from_u128(id)));
        let kind = prop_oneof![Just(VmKind::Ephemeral), Just(VmKind::Service)];
        let ended = JobState::ALL.into_iter().filter(|state| state.is_terminal()).collect::<Vec<_>>();
        let result = prop::sample::select(ended).prop_map(|state| Outcome::Result {
            state,
            exit: None,
            reason: "it ended".into(),
            log_bytes: 7,
            finished_at: Timestamp(5),
            started_at: Some(Timestamp(4)),
        });
        let lost = any::<bool>().prop_map(|started| Outcome::Lost { started, reason: "gone".into(), node: None });
        // The scheduler's epoch is 1.
        let epoch = || prop::sample::select(vec![0u64, 1, 2]);
        let new_job = |id, max_attempts| NewJob {
            id,
            spec: pb::JobSpec {
                command: vec!["true".into()],
                max_attempts,
                retry_on: vec![pb::RetryOn::Lost.into(), pb::RetryOn::Failed.into()],
                backoff_ms: 10,
                max_backoff_ms: 100,
                ..Default::default()
            },
            input: Some(pb::JobInput { stdin: vec![1].into(), ..Default::default() }),
        };
        prop_oneof![
            2 => (1..=2u128, kind).prop_map(|(vm, kind)| create_vm(vm, kind)),
            4 => (vm(), prop::sample::select(VmState::ALL.to_vec()), 0..3u64, epoch(), any::<Option<u16>>()).prop_map(
                |(id, to, expected_generation, scheduler_epoch, grace_ms)| {
                    let (reason, grace_ms) = ("s\0o".into(), grace_ms.map(Into::into));
                    Mutation::TransitionVm { id, to, expected_generation, reason, grace_ms, lost_node: None, scheduler_epoch }
                },
            ),
            2 => (vm(), 1..3u32, 0..4u64).prop_map(|(id, vcpus, expected_generation)| {
                Mutation::ResizeVm { id, to: VmShape { vcpus, memory_mib: 512 }, expected_generation }
            }),
            1 => Just(Mutation::PurgeVms { states: vec![VmState::Failed], ids: vec![], at_most: 9 }),
            2 => (job(), 1..3u32).prop_map(move |(id, most)| Mutation::CreateJob { job: Box::new(new_job(id, most)) }),
            4 => (job(), vm(), 1..4u32, epoch()).prop_map(|(job_id, vm_id, attempt, scheduler_epoch)| {
                Mutation::AssignJob { job_id, vm_id, attempt, decision: Some(pb::Decision::default()), scheduler_epoch }
            }),
            2 => (job(), 1..4u32).prop_map(|(job_id, attempt)| {
                Mutation::StartAttempt { job_id, attempt, started_at: Timestamp(4) }
            }),
            2 => (job(), 1..4u32, prop_oneof![result, lost]).prop_map(|(job_id, attempt, outcome)| {
                Mutation::FinishAttempt { job_id, attempt, outcome, scheduler_epoch: 0 }
            }),
            1 => job().prop_map(|id| Mutation::CancelJob { id, reason: "enough".into() }),
            1 => (job(), prop::sample::select(vec![JobState::Failed, JobState::TimedOut])).prop_map(|(id, to)| {
                Mutation::FailQueuedJob { id, to, reason: "never".into(), scheduler_epoch: 0 }
            }),
            1 => Just(register()),
            1 => prop::sample::select(vec![NodeState::Ready, NodeState::Cordoned]).prop_map(|wanted| {
                let id = NodeId::parse("", "n").unwrap();
                Mutation::UpdateNode { id, wanted, reason: "so".into(), drain_deadline: None }
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

        /// Any history, with any of its requests repeated at any later time and in any company, leaves what it leaves
        /// without ids and repeats, and every request gets the one answer that it gets there.
        #[test]
        fn repeats_change_nothing_and_get_the_first_answer(
            history in prop::collection::vec((mutation(), prop::collection::vec(any::<prop::sample::Index>(), 0..3)), 1..40),
        ) {
            let (plain, repeated) = (Database::new(), Database::new());
            let now = |at: usize| Timestamp(1000 * at as i64);
            let mut answers = Vec::new();
            for (at, (mutation, repeats)) in history.iter().enumerate() {
                answers.extend(plain.commit(&[(mutation.clone(), None)], now(at)));
                prop_assert_ne!(&answers[at], "Again");
                // The new one comes behind repeats of old ones and of itself: all in one commit.
                let together: Vec<usize> = repeats.iter().map(|index| index.index(at + 1)).chain([at, at]).collect();
                let unit = |&at: &usize| (history[at].0.clone(), Some(request(at as u128, 0)));
                // Those that come later are committed with a later time, which must not show.
                let (first, rest) = together.split_at(together.iter().position(|&of| of == at).unwrap() + 1);
                let mut got = repeated.commit(&first.iter().map(unit).collect::<Vec<_>>(), now(at));
                got.extend(repeated.commit(&rest.iter().map(unit).collect::<Vec<_>>(), now(at + 1000)));
                let expected: Vec<_> = together.iter().map(|&of| answers[of].clone()).collect();
                prop_assert_eq!(got, expected);
                prop_assert_eq!(plain.tables(), repeated.tables());
            }
        }
    }

    #[test]
    fn another_body_under_the_same_id_is_refused_and_changes_nothing() {
        let database = Database::new();
        let first = database.commit(&[(create_vm(1, VmKind::Service), Some(request(1, 1)))], Timestamp(0));
        let other = database.commit(&[(create_vm(2, VmKind::Service), Some(request(1, 2)))], Timestamp(0));
        assert!(first[0].starts_with("Accepted") && other[0].contains("RequestIdReused"), "{first:?} {other:?}");
        assert_eq!(database.tables()[0].len(), 1);
    }

    #[test]
    fn old_requests_are_forgotten_oldest_first_a_few_at_a_time_and_count_as_new_then() {
        let database = Database::new();
        let register =
            |id: u128, now: i64| database.commit(&[(register(), Some(request(id, 0)))], Timestamp(now))[0].clone();
        let incarnation = |answer: &str| answer.split("incarnation: ").nth(1).unwrap()[..1].to_owned();
        for id in 1..=4 {
            assert_eq!(incarnation(&register(id, id as i64)), id.to_string());
        }
        let count = || database.0.query_row("SELECT count(*) FROM requests", [], |row| row.get::<_, i64>(0)).unwrap();
        database.execute(forget(Timestamp(REMEMBERED_MS + 1), 10));
        assert_eq!(count(), 4);
        database.execute(forget(Timestamp(REMEMBERED_MS + 4), 2));
        assert_eq!(count(), 2);
        assert_eq!(incarnation(&register(3, REMEMBERED_MS)), "3");
        assert_eq!(incarnation(&register(1, REMEMBERED_MS)), "5");
        // So are those beyond the number that is remembered, whatever their age.
        database.0.execute("UPDATE requests SET seq = seq + ?1 WHERE seq > 3", [REMEMBERED]).unwrap();
        database.execute(forget(Timestamp(0), 10));
        assert_eq!(count(), 2);
    }

    #[test]
    fn the_parts_of_a_request_have_ids_of_their_own_and_always_the_same() {
        let first = request(7, 1);
        assert_eq!(first.next_part(), request(7, 1).next_part());
        assert_ne!(first.next_part().id, first.next_part().next_part().id);
        assert_ne!(first.next_part().id, request(8, 1).next_part().id);
        assert_eq!(first.next_part().digest, first.digest);
    }
}
