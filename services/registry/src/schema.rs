//! The tables, as a list of migrations that only ever grows.
//!
//! ```text
//!   vms ──┐  a trigger on each table writes one row of `events` for each change, in the same transaction:
//!   jobs ─┼─► events(revision, …) ──► vm_events (a view: what users query)
//!   nodes ┘
//! ```
//! A row's `revision` is that of its latest event. The statement that changes a row sets it to [`NEXT_REVISION`] and the
//! trigger inserts the event under it, so a change that forgets to take a revision fails on the primary key of `events`
//! instead of going unseen. Times are passed in and rowids carry no meaning but `created_revision`, so that every replica
//! computes the same rows.

use hiqlite::{
    Client, Param,
    rusqlite::{
        self, Connection,
        functions::{Context, FunctionFlags},
    },
};

use crate::StartError;

/// The revision of the change that a statement makes.
pub(crate) const NEXT_REVISION: &str = "(SELECT seq + 1 FROM sqlite_sequence WHERE name = 'events')";

/// One step of the schema: applied whole or not at all, once.
struct Migration {
    version: i64,
    statements: &'static [&'static str],
}

const MIGRATIONS: &[Migration] = &[TABLES, RETENTION, REQUESTS, LOST_NODES, RETRIES, PRESSURE, VOLUMES];

const TABLES: Migration = Migration {
    version: 1,
    statements: &[
        "CREATE TABLE events (
            revision   INTEGER PRIMARY KEY AUTOINCREMENT,
            timestamp  TEXT NOT NULL,
            entity     TEXT NOT NULL,
            entity_id  TEXT NOT NULL,
            from_state TEXT,
            to_state   TEXT,
            reason     TEXT NOT NULL,
            job_id     TEXT,
            vm_id      TEXT,
            node_id    TEXT,
            attempt    INTEGER
        ) STRICT",
        // `NEXT_REVISION` reads it, before the first event too.
        "INSERT INTO sqlite_sequence (name, seq) VALUES ('events', 0)",
        "CREATE INDEX events_of_vms ON events (entity_id, revision) WHERE entity = 'vm'",
        "CREATE VIEW vm_events AS
            SELECT entity_id AS vm_id, timestamp, from_state, to_state, reason, job_id, revision
            FROM events WHERE entity = 'vm'",
        "CREATE TABLE vms (
            id               TEXT NOT NULL UNIQUE,
            kind             TEXT NOT NULL,
            state            TEXT NOT NULL,
            node_id          TEXT NOT NULL,
            image            TEXT NOT NULL,
            vcpus            INTEGER NOT NULL,
            memory_mib       INTEGER NOT NULL,
            labels           TEXT NOT NULL,
            config           TEXT NOT NULL,
            job_id           TEXT,
            reason           TEXT NOT NULL,
            generation       INTEGER NOT NULL,
            revision         INTEGER NOT NULL,
            created_at       TEXT NOT NULL,
            updated_at       TEXT NOT NULL,
            created_revision INTEGER PRIMARY KEY
        ) STRICT",
        "CREATE INDEX vms_by_state ON vms (state)",
        "CREATE TRIGGER vms_created AFTER INSERT ON vms BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, to_state, reason, job_id, vm_id, node_id)
            VALUES (NEW.revision, NEW.created_at, 'vm', NEW.id, NEW.state, NEW.reason, NEW.job_id, NEW.id, NEW.node_id);
        END",
        "CREATE TRIGGER vms_changed AFTER UPDATE ON vms BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, job_id, vm_id,
                node_id)
            VALUES (NEW.revision, NEW.updated_at, 'vm', NEW.id, OLD.state, NEW.state, NEW.reason,
                coalesce(NEW.job_id, OLD.job_id), NEW.id, NEW.node_id);
        END",
        // A DELETE has no new row to carry its time.
        "CREATE TABLE purge_clock (at TEXT NOT NULL) STRICT",
        "INSERT INTO purge_clock (at) VALUES ('')",
        "CREATE TRIGGER vms_purged AFTER DELETE ON vms BEGIN
            INSERT INTO events (timestamp, entity, entity_id, from_state, reason, vm_id, node_id)
            VALUES (max(OLD.updated_at, (SELECT at FROM purge_clock)), 'vm', OLD.id, OLD.state, 'purged', OLD.id,
                OLD.node_id);
        END",
        "CREATE TABLE jobs (
            id               TEXT NOT NULL UNIQUE,
            state            TEXT NOT NULL,
            command          TEXT NOT NULL,
            image            TEXT NOT NULL,
            vcpus            INTEGER NOT NULL,
            memory_mib       INTEGER NOT NULL,
            priority         INTEGER NOT NULL,
            max_attempts     INTEGER NOT NULL,
            labels           TEXT NOT NULL,
            attempt          INTEGER NOT NULL,
            attempts_started INTEGER NOT NULL,
            attempt_end      TEXT,
            vm_id            TEXT,
            node_id          TEXT,
            assignment       TEXT,
            cancel_requested INTEGER NOT NULL,
            exit_code        INTEGER,
            signal           INTEGER,
            user_time_ms     INTEGER NOT NULL,
            system_time_ms   INTEGER NOT NULL,
            max_rss_kib      INTEGER NOT NULL,
            reason           TEXT NOT NULL,
            log_bytes        INTEGER NOT NULL,
            generation       INTEGER NOT NULL,
            revision         INTEGER NOT NULL,
            created_at       TEXT NOT NULL,
            updated_at       TEXT NOT NULL,
            assigned_at      TEXT,
            started_at       TEXT,
            finished_at      TEXT,
            created_revision INTEGER PRIMARY KEY,
            spec             BLOB NOT NULL
        ) STRICT",
        "CREATE INDEX jobs_by_state ON jobs (state)",
        "CREATE TRIGGER jobs_created AFTER INSERT ON jobs BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, to_state, reason, job_id, attempt)
            VALUES (NEW.revision, NEW.created_at, 'job', NEW.id, NEW.state, NEW.reason, NEW.id, NEW.attempt);
        END",
        "CREATE TRIGGER jobs_changed AFTER UPDATE ON jobs BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, job_id, vm_id,
                node_id, attempt)
            VALUES (NEW.revision, NEW.updated_at, 'job', NEW.id, OLD.state, NEW.state, NEW.reason, NEW.id, NEW.vm_id,
                NEW.node_id, NEW.attempt);
        END",
        "CREATE TABLE nodes (
            id            TEXT NOT NULL PRIMARY KEY,
            state         TEXT NOT NULL,
            endpoint      TEXT NOT NULL,
            driver        TEXT NOT NULL,
            vcpus         INTEGER NOT NULL,
            memory_mib    INTEGER NOT NULL,
            max_vms       INTEGER NOT NULL,
            images        TEXT NOT NULL,
            incarnation   INTEGER NOT NULL,
            revision      INTEGER NOT NULL,
            registered_at TEXT NOT NULL
        ) STRICT, WITHOUT ROWID",
        "CREATE TRIGGER nodes_created AFTER INSERT ON nodes BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, to_state, reason, node_id)
            VALUES (NEW.revision, NEW.registered_at, 'node', NEW.id, NEW.state, '', NEW.id);
        END",
        "CREATE TRIGGER nodes_changed AFTER UPDATE ON nodes BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, node_id)
            VALUES (NEW.revision, NEW.registered_at, 'node', NEW.id, OLD.state, NEW.state, '', NEW.id);
        END",
    ],
};

/// What is forgotten, and how far.
const RETENTION: Migration = Migration {
    version: 2,
    statements: &[
        // Events up to this revision were deleted, though none may be left to tell.
        "CREATE TABLE compaction (revision INTEGER NOT NULL) STRICT",
        "INSERT INTO compaction (revision) SELECT coalesce(min(revision) - 1, 0) FROM events",
        "CREATE TRIGGER jobs_purged AFTER DELETE ON jobs BEGIN
            INSERT INTO events (timestamp, entity, entity_id, from_state, reason, job_id, vm_id, node_id, attempt)
            VALUES (max(OLD.updated_at, (SELECT at FROM purge_clock)), 'job', OLD.id, OLD.state, 'purged', OLD.id,
                OLD.vm_id, OLD.node_id, OLD.attempt);
        END",
        // Written once in a row's life, at its end; without them each look for what is old enough reads every row.
        "CREATE INDEX vms_ended ON vms (updated_at) WHERE state IN ('Terminated', 'Failed')",
        "CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL",
    ],
};

/// What was answered under each request id; see `requests`.
const REQUESTS: Migration = Migration {
    version: 3,
    statements: &[
        // `vm`, `job` and `node` are rows in their state then, as JSON arrays.
        "CREATE TABLE requests (
            seq     INTEGER PRIMARY KEY,
            at      INTEGER NOT NULL,
            id      TEXT NOT NULL UNIQUE,
            digest  BLOB NOT NULL,
            changed INTEGER NOT NULL,
            vm      TEXT,
            job     TEXT,
            node    TEXT,
            spec    BLOB
        ) STRICT",
    ],
};

/// A node changes without registering: when it is lost. The statement that does so says when and why.
const LOST_NODES: Migration = Migration {
    version: 4,
    statements: &[
        "ALTER TABLE nodes ADD COLUMN reason TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE nodes ADD COLUMN updated_at TEXT NOT NULL DEFAULT ''",
        "DROP TRIGGER nodes_changed",
        "UPDATE nodes SET updated_at = registered_at",
        "CREATE TRIGGER nodes_changed AFTER UPDATE ON nodes BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, node_id)
            VALUES (NEW.revision, NEW.updated_at, 'node', NEW.id, OLD.state, NEW.state, NEW.reason, NEW.id);
        END",
    ],
};

/// Retries and what is known of each attempt, inputs, groups, leases, and nodes that are told what is wanted of them.
///
/// A change of a job with one attempt and no input writes no row of these tables: what happens seldom is in triggers, whose
/// text is not in the log with each change.
const RETRIES: Migration = Migration {
    version: 5,
    statements: &[
        "ALTER TABLE vms ADD COLUMN jobs_assigned INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE vms ADD COLUMN stop_grace_ms INTEGER",
        "ALTER TABLE jobs ADD COLUMN queued_at TEXT NOT NULL DEFAULT ''",
        // Times that are computed in SQL are milliseconds since 1970: Hiqlite forbids SQLite's functions for times.
        "ALTER TABLE jobs ADD COLUMN not_before_ms INTEGER",
        "ALTER TABLE jobs ADD COLUMN group_id TEXT",
        "ALTER TABLE jobs ADD COLUMN array_index INTEGER NOT NULL DEFAULT 0",
        // Bits; a job from before is retried when it is lost.
        "ALTER TABLE jobs ADD COLUMN retry_on INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE jobs ADD COLUMN backoff_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN max_backoff_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN result_ttl_ms INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN expires_ms INTEGER",
        "ALTER TABLE jobs ADD COLUMN decision BLOB",
        "CREATE INDEX jobs_of_groups ON jobs (group_id, created_revision) WHERE group_id IS NOT NULL",
        // A job that says how long it is kept is in an index of its own.
        "DROP INDEX jobs_ended",
        "CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL AND result_ttl_ms = 0",
        "CREATE INDEX jobs_expiring ON jobs (expires_ms) WHERE expires_ms IS NOT NULL",
        // Attempts after which the job went back to the queue; the latest one is in `jobs`.
        "CREATE TABLE attempts (
            job_id         TEXT NOT NULL,
            attempt        INTEGER NOT NULL,
            vm_id          TEXT NOT NULL,
            node_id        TEXT NOT NULL,
            assignment     TEXT NOT NULL,
            state          TEXT NOT NULL,
            reported       INTEGER NOT NULL,
            exit_code      INTEGER,
            signal         INTEGER,
            user_time_ms   INTEGER NOT NULL,
            system_time_ms INTEGER NOT NULL,
            max_rss_kib    INTEGER NOT NULL,
            reason         TEXT NOT NULL,
            log_bytes      INTEGER NOT NULL,
            assigned_at    TEXT NOT NULL,
            started_at     TEXT,
            finished_at    TEXT NOT NULL,
            decision       BLOB,
            PRIMARY KEY (job_id, attempt)
        ) STRICT, WITHOUT ROWID",
        "CREATE TABLE late_reports (
            seq     INTEGER PRIMARY KEY,
            job_id  TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            at      TEXT NOT NULL,
            state   TEXT,
            reason  TEXT NOT NULL
        ) STRICT",
        "CREATE INDEX late_reports_of_jobs ON late_reports (job_id, attempt)",
        "CREATE TABLE job_inputs (
            job_id TEXT NOT NULL UNIQUE,
            input  BLOB NOT NULL
        ) STRICT",
        // The last change of a row from before is its own; only what is new in it is filled in.
        "DROP TRIGGER jobs_changed",
        "UPDATE jobs SET queued_at = created_at",
        "CREATE TRIGGER jobs_changed AFTER UPDATE ON jobs BEGIN
            INSERT INTO events (revision, timestamp, entity, entity_id, from_state, to_state, reason, job_id, vm_id,
                node_id, attempt)
            VALUES (NEW.revision, NEW.updated_at, 'job', NEW.id, OLD.state, NEW.state, NEW.reason, NEW.id, NEW.vm_id,
                NEW.node_id, NEW.attempt);
        END",
        "CREATE TRIGGER jobs_requeued AFTER UPDATE OF state ON jobs WHEN NEW.state = 'Queued' BEGIN
            INSERT INTO attempts (job_id, attempt, vm_id, node_id, assignment, state, reported, exit_code, signal,
                user_time_ms, system_time_ms, max_rss_kib, reason, log_bytes, assigned_at, started_at, finished_at,
                decision)
            SELECT NEW.id, NEW.attempt, NEW.vm_id, NEW.node_id, NEW.assignment,
                iif(NEW.attempt_end = 'lost', 'Queued', NEW.attempt_end), NEW.attempt_end <> 'lost', NEW.exit_code,
                NEW.signal, NEW.user_time_ms, NEW.system_time_ms, NEW.max_rss_kib, NEW.reason, NEW.log_bytes,
                NEW.assigned_at, NEW.started_at, NEW.queued_at, NEW.decision
            WHERE true ON CONFLICT DO NOTHING;
            DELETE FROM attempts WHERE job_id = NEW.id AND attempt <= NEW.attempt - 1000;
            DELETE FROM late_reports WHERE job_id = NEW.id AND attempt <= NEW.attempt - 1000;
        END",
        "CREATE TRIGGER jobs_finished AFTER UPDATE OF finished_at ON jobs WHEN NEW.finished_at IS NOT NULL BEGIN
            DELETE FROM job_inputs WHERE job_id = NEW.id;
        END",
        "CREATE TRIGGER jobs_forgotten AFTER DELETE ON jobs BEGIN
            DELETE FROM attempts WHERE job_id = OLD.id;
            DELETE FROM late_reports WHERE job_id = OLD.id;
            DELETE FROM job_inputs WHERE job_id = OLD.id;
        END",
        "CREATE TABLE leases (
            name     TEXT NOT NULL PRIMARY KEY,
            holder   TEXT NOT NULL,
            instance TEXT NOT NULL,
            epoch    INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID",
        // Of the scheduler's lease, when the request came: a refusal that it explains stays explained.
        "ALTER TABLE requests ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE nodes ADD COLUMN labels TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE nodes ADD COLUMN wanted TEXT NOT NULL DEFAULT 'Ready'",
        "ALTER TABLE nodes ADD COLUMN wanted_reason TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE nodes ADD COLUMN drain_deadline TEXT",
    ],
};

/// Nodes that say what their machines are short of.
const PRESSURE: Migration =
    Migration { version: 6, statements: &["ALTER TABLE nodes ADD COLUMN pressure TEXT NOT NULL DEFAULT '[]'"] };

/// What nodes have for their VMs to mount.
const VOLUMES: Migration = Migration {
    version: 7,
    statements: &[
        "ALTER TABLE nodes ADD COLUMN volumes TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE nodes ADD COLUMN scratch_mib INTEGER NOT NULL DEFAULT 0",
    ],
};

/// The version of the schema that this program writes.
pub(crate) fn newest() -> i64 {
    MIGRATIONS.last().map_or(0, |migration| migration.version)
}

/// The version of the schema that a database has.
pub(crate) fn version(database: &Connection) -> rusqlite::Result<i64> {
    database.query_row("SELECT coalesce(max(version), 0) FROM schema_migrations", [], |row| row.get(0))
}

/// Where the applied migrations are recorded.
pub(crate) const CREATE_MIGRATIONS: &str =
    "CREATE TABLE IF NOT EXISTS schema_migrations (version INTEGER PRIMARY KEY) STRICT";

/// Brings the database to [`newest`]; refuses one that a newer program has written.
pub(crate) async fn migrate(client: &Client) -> Result<(), StartError> {
    let applied = "SELECT coalesce(max(version), 0) AS version FROM schema_migrations";
    let applied: i64 = client.query_raw_one(applied, vec![]).await?.try_get("version")?;
    if applied > newest() {
        return Err(StartError::NewerSchema { found: applied, known: newest() });
    }
    migrate_from(client, applied, newest()).await
}

async fn migrate_from(client: &Client, applied: i64, to: i64) -> Result<(), StartError> {
    for migration in MIGRATIONS.iter().filter(|migration| (applied + 1..=to).contains(&migration.version)) {
        let record = "INSERT INTO schema_migrations (version) VALUES (?1)";
        let statements = migration.statements.iter().map(|&statement| (statement, vec![]));
        client.txn(statements.chain([(record, vec![Param::Integer(migration.version)])])).await?;
        tracing::info!(version = migration.version, "registry schema migrated");
    }
    Ok(())
}

/// The schema in a plain SQLite file, for a registry without a log: see [`crate::simulation`].
pub(crate) fn create(database: &Connection) -> rusqlite::Result<()> {
    for name in FORBIDDEN {
        let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
        let refuse = move |_: &Context<'_>| -> rusqlite::Result<i64> {
            Err(rusqlite::Error::UserFunctionError(format!("{name} is forbidden: replicas would differ").into()))
        };
        database.create_scalar_function(name, -1, flags, refuse)?;
    }
    MIGRATIONS
        .iter()
        .flat_map(|migration| migration.statements)
        .try_for_each(|statement| database.execute_batch(statement))
}

/// What Hiqlite makes panic on the connection that writes, lest replicas differ.
const FORBIDDEN: [&str; 10] =
    ["date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff", "random", "randomblob", "now"];

/// A database of this schema without Raft in front of it.
#[cfg(test)]
pub(crate) fn in_memory() -> Connection {
    let connection = Connection::open_in_memory().unwrap();
    create(&connection).unwrap();
    connection
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::{DataDir, Embedded};

    /// Through Hiqlite, which allows less than SQLite does.
    #[tokio::test(flavor = "multi_thread")]
    async fn rows_of_version_4_get_what_is_new_in_them_and_keep_their_revisions() {
        const ROWS: [&str; 2] = [
            "INSERT INTO jobs (id, state, command, image, vcpus, memory_mib, priority, max_attempts, labels, attempt,
                 attempts_started, cancel_requested, user_time_ms, system_time_ms, max_rss_kib, reason, log_bytes,
                 generation, revision, created_at, updated_at, created_revision, spec)
             VALUES ('j', 'Queued', 'true', 'default', 1, 128, 0, 3, '{}', 0, 0, 0, 0, 0, 0, '', 0, 1, 1,
                 '2026-01-02T03:04:05.678Z', '2026-01-02T03:04:05.678Z', 1, x'')",
            "INSERT INTO nodes (id, state, endpoint, driver, vcpus, memory_mib, max_vms, images, incarnation, revision,
                 registered_at, updated_at)
             VALUES ('n', 'Ready', 'http://h:1', 'process', 1, 1, 1, '[]', 1, 2, '2026-01-02T03:04:05.678Z',
                 '2026-01-02T03:04:05.678Z')",
        ];
        let dir = tempfile::tempdir().unwrap();
        let node = Embedded::start_alone(DataDir::take(dir.path()).unwrap()).await.unwrap();
        let write = async |sql: &'static str| node.client.execute(sql, vec![]).await.unwrap();
        node.client.wait_until_healthy_db().await;
        write(CREATE_MIGRATIONS).await;
        migrate_from(&node.client, 0, 4).await.unwrap();
        for row in ROWS {
            write(row).await;
        }
        migrate(&node.client).await.unwrap();

        let of = |sql: &str| {
            let database = Connection::open(&node.database).unwrap();
            database.query_row(sql, [], |row| row.get::<_, String>(0)).unwrap()
        };
        assert_eq!(
            of("SELECT concat_ws(' ', queued_at, retry_on, backoff_ms, result_ttl_ms, revision) FROM jobs"),
            "2026-01-02T03:04:05.678Z 1 0 0 1"
        );
        assert_eq!(
            of("SELECT concat_ws(' ', labels, wanted, revision, volumes, scratch_mib) FROM nodes"),
            "{} Ready 2 [] 0"
        );
        assert_eq!(of("SELECT concat(count(*)) FROM events"), "2");
        // The event of the next change is written again.
        write("UPDATE jobs SET state = 'Cancelled', revision = 3").await;
        assert_eq!(of("SELECT concat(count(*)) FROM events"), "3");
        node.shutdown().await;
    }
}
