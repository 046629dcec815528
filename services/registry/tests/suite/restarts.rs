//! What is left after a restart, a crash and an attempt to share.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use blixard::{
    job::JobState,
    pb::registry::v1 as wire,
    vm::{VmKind, VmState},
};
use blixard_chassis::Tasks;
use blixard_registry::{Registry, RegistryConfig, StartError};
use hiqlite::rusqlite::Connection;

use crate::kit::{Client, Kit, assign, connect, create_job, create_vm, finished, refusal, transition, uuid};

/// A `registry` process, ended with the test.
struct Process {
    child: Child,
    client: Client,
    log: Option<JoinHandle<String>>,
}

impl Process {
    fn spawn(dir: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_registry"))
            .args(["--listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Kills it; returns what it had logged.
    fn kill(mut self) -> String {
        self.child.kill().unwrap();
        self.log.take().unwrap().join().unwrap()
    }

    fn start(dir: &Path) -> Self {
        let mut child = Self::spawn(dir);
        let mut stderr = child.stderr.take().unwrap();
        // The pipe must be emptied, or the process would block on its own log.
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        // Hiqlite prints there too, when it restores a snapshot.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let endpoint = lines.find_map(|line| Some(line.strip_prefix("registry listening on ")?.to_owned()));
        let Some(endpoint) = endpoint else {
            panic!("the registry did not start: {:?}\n{}", child.wait(), log.join().unwrap());
        };
        Self { client: connect(&endpoint), child, log: Some(log) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_and_goes_on_counting() {
    let mut kit = Kit::start().await;
    let (job, vm) = kit.assigned_job(VmKind::Ephemeral, 3).await;
    for _ in 0..2 {
        let (job_before, vm_before) = (kit.job(&job).await, kit.vm(&vm).await);
        let before = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
        kit.restart().await;
        assert_eq!((kit.job(&job).await, kit.vm(&vm).await), (job_before, vm_before));
        assert_eq!(kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner(), before);
        let created = kit.client.create_job(create_job(&uuid())).await.unwrap().into_inner().job.unwrap();
        assert_eq!(created.revision, before.revision + 1);
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_under_load_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<String> = Vec::new();
    for _ in 0..3 {
        let mut process = Process::start(dir.path());
        let (report, mut reports) = tokio::sync::mpsc::unbounded_channel();
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (mut client, report) = (process.client.clone(), report.clone());
            callers.spawn(async move {
                loop {
                    let id = uuid();
                    if client.create_job(create_job(&id)).await.is_err() {
                        break;
                    }
                    let _ = report.send(id);
                }
            });
        }
        drop(report);
        for _ in 0..300 {
            acknowledged.extend(reports.recv().await);
        }
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        while let Some(id) = reports.recv().await {
            acknowledged.push(id);
        }
        while callers.join_next().await.is_some() {}
    }
    let mut process = Process::start(dir.path());
    for id in &acknowledged {
        process.client.get_job(wire::GetJobRequest { job_id: id.clone() }).await.unwrap();
    }
    // The events are whole too: each change has its own, without a gap.
    let counts = process.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    let jobs: u64 = counts.jobs.iter().map(|count| count.count).sum();
    assert_eq!(jobs, counts.revision);
    assert!(acknowledged.len() >= 900 && jobs >= acknowledged.len() as u64, "{jobs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_tells_of_vms_and_assignments_in_the_guides_words() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path());
    let (vm, job) = (uuid(), uuid());
    process.client.create_vm(create_vm(&vm, VmKind::Ephemeral)).await.unwrap();
    process.client.transition_vm(transition(&vm, VmState::Ready)).await.unwrap();
    process.client.create_job(create_job(&job)).await.unwrap();
    process.client.assign_job(assign(&job, &vm, 1)).await.unwrap();
    process.client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await.unwrap();
    let log = process.kill();
    let lines = log.lines().filter_map(|line| Some(line.split_once(" INFO ")?.1));
    let lines: Vec<_> = lines.filter(|line| !line.starts_with("registry schema migrated version=")).collect();
    let expected = [
        format!("VM registered vm_id={vm} state=Starting"),
        format!("VM state changed vm_id={vm} Starting -> Ready"),
        format!("VM state changed vm_id={vm} Ready -> Busy"),
        format!("Job assigned to VM job_id={job} vm_id={vm}"),
        format!("VM state changed vm_id={vm} Busy -> Draining"),
    ];
    assert_eq!(lines, expected, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_on_the_same_data_is_refused_and_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::start(dir.path());
    let output = Process::spawn(dir.path()).wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains(&format!("is in use by process {}", first.child.id())), "{stderr}");
    assert!(stderr.contains("--data-dir"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Registry::start(RegistryConfig::alone(file), &Tasks::new()).await.err().unwrap();
    assert!(matches!(error, StartError::DataDir { .. }) && error.to_string().contains("file/hiqlite"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_a_newer_program_is_refused() {
    let mut kit = Kit::start().await;
    kit.stop().await;
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    database.execute("INSERT INTO schema_migrations (version) VALUES (999)", []).unwrap();
    drop(database);
    let config = RegistryConfig::alone(kit.dir.path().to_owned());
    let error = Registry::start(config, &Tasks::new()).await.err().unwrap();
    assert!(matches!(error, StartError::NewerSchema { found: 999, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usage_guides_sql_works_while_the_registry_runs() {
    let mut kit = Kit::start().await;
    let ready = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let failed = kit.vm_in(VmKind::Ephemeral, VmState::Failed).await;
    let path = kit.dir.path().join("hiqlite/hiqlite.db");
    let rows = |sql: &str| -> Vec<Vec<String>> {
        let database = Connection::open(&path).unwrap();
        let mut statement = database.prepare(sql).unwrap();
        let columns = statement.column_count();
        let text =
            |row: &hiqlite::rusqlite::Row<'_>, column| match row.get::<_, hiqlite::rusqlite::types::Value>(column)? {
                hiqlite::rusqlite::types::Value::Text(text) => Ok(text),
                hiqlite::rusqlite::types::Value::Null => Ok(String::new()),
                other => Ok(format!("{other:?}")),
            };
        let read = |row: &hiqlite::rusqlite::Row<'_>| (0..columns).map(|column| text(row, column)).collect();
        statement.query_map([], read).unwrap().map(Result::unwrap).collect()
    };
    let created_at = rows("SELECT id, state, node_id, created_at FROM vms WHERE state = 'Ready'").remove(0).remove(3);
    assert!(created_at.len() == 24 && created_at.ends_with('Z'), "{created_at}");
    assert_eq!(rows("SELECT state, COUNT(*) FROM vms GROUP BY state").len(), 2);
    let events =
        rows(&format!("SELECT * FROM vm_events WHERE vm_id = '{ready}' ORDER BY timestamp DESC, revision DESC"));
    assert_eq!((events.len(), events[0][3].as_str(), events[1][2].as_str()), (2, "Ready", ""));
    let config = rows("SELECT id, config FROM vms WHERE state = 'Ready'").remove(0).remove(1);
    assert!(config.starts_with("{\"kind\":\"service\",\"image\":\"default\""), "{config}");
    assert_eq!(rows("SELECT * FROM vms")[0][0], ready);
    assert_eq!(
        rows("SELECT id, state, node_id FROM vms WHERE state = 'Failed';"),
        [[failed.as_str(), "Failed", "node-1"]]
    );
    assert_eq!(rows("SELECT COUNT(*) FROM vms WHERE state IN ('Ready', 'Busy');"), [["Integer(1)"]]);
    assert!(rows("DELETE FROM vms WHERE state = 'Failed';").is_empty());
    // The system goes on after a hand has been in its tables.
    assert_eq!(refusal(kit.client.transition_vm(transition(&failed, VmState::Ready)).await), "VM_NOT_FOUND");
    kit.client.transition_vm(transition(&ready, VmState::Draining)).await.unwrap();
    kit.stop().await;
}
