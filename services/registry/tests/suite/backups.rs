//! Backup and restore: what comes back is what was there, or nothing is.

use std::{
    fs,
    net::TcpListener,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blixard::{
    job::JobState,
    pb::{
        common::v1 as pb,
        registry::v1::{self as wire, backup_response::Message},
    },
    replica::Replicas,
    vm::{VmKind, VmState},
};
use blixard_chassis::Tasks;
use blixard_registry::{
    Archive, ArchiveError, ArchiveWriter, Manifest, Membership, Registry, RegistryConfig, RestoreError, Secret,
    StartError, restore,
};
use hiqlite::rusqlite::{Connection, types::Value};

use crate::kit::{Client, Kit, config_of, connect, create_vm, finished, lost, refusal, serve, spec, transition, uuid};

const DEADLINE: Duration = Duration::from_secs(120);
const SECRET: &[u8] = b"a secret of these replicas alone";

async fn back_up(client: &mut Client, dir: &Path) -> Manifest {
    let mut stream = client.backup(wire::BackupRequest {}).await.unwrap().into_inner();
    let mut next = async || stream.message().await.unwrap().unwrap().message.unwrap();
    let Message::Header(header) = next().await else { panic!("no header") };
    let mut writer = ArchiveWriter::create(dir, header).unwrap();
    loop {
        match next().await {
            Message::Chunk(chunk) => writer.write(&chunk).unwrap(),
            Message::Digest(digest) => return writer.finish(&digest.sha256).unwrap(),
            Message::Header(header) => panic!("{header:?}"),
        }
    }
}

/// Every row of every table but Hiqlite's own and SQLite's statistics, and the schema.
fn dump(database: &Path) -> Vec<(String, Vec<Vec<Value>>)> {
    let connection = Connection::open(database).unwrap();
    let rows = |sql: &str| -> Vec<Vec<Value>> {
        let mut statement = connection.prepare(sql).unwrap();
        let width = statement.column_count();
        let rows = statement.query_map([], |row| (0..width).map(|at| row.get(at)).collect()).unwrap();
        rows.collect::<Result<_, _>>().unwrap()
    };
    let ours = "tbl_name <> '_metadata' AND tbl_name NOT LIKE 'sqlite\\_stat%' ESCAPE '\\' ORDER BY name";
    let schema = rows(&format!("SELECT type, name, sql FROM sqlite_schema WHERE {ours}"));
    let mut dump = vec![("schema".to_owned(), schema)];
    for row in rows(&format!("SELECT name FROM sqlite_schema WHERE type = 'table' AND {ours}")) {
        let Value::Text(table) = &row[0] else { panic!("{row:?}") };
        let mut rows = rows(&format!("SELECT * FROM {table}"));
        rows.sort_by_cached_key(|row| format!("{row:?}"));
        dump.push((table.clone(), rows));
    }
    let integrity: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(integrity, "ok");
    dump
}

/// Panics at the first row that two databases do not share.
fn assert_equal(one: &Path, other: &Path) {
    for ((table, rows), (other_table, other_rows)) in dump(one).into_iter().zip(dump(other)) {
        assert_eq!((&table, rows.len()), (&other_table, other_rows.len()));
        for (row, other_row) in rows.iter().zip(&other_rows) {
            assert_eq!(row, other_row, "{table}");
        }
    }
}

/// VMs and jobs in several states, with some megabytes of environment.
async fn fill(kit: &mut Kit) {
    for state in [VmState::Ready, VmState::Busy, VmState::Failed] {
        kit.vm_in(VmKind::Service, state).await;
    }
    kit.client.purge_vms(wire::PurgeVmsRequest::default()).await.unwrap();
    let (job, _) = kit.assigned_job(VmKind::Ephemeral, 3).await;
    kit.client.finish_attempt(lost(&job, 1, true)).await.unwrap();
    kit.client.finish_attempt(finished(&job, 1, JobState::Succeeded)).await.unwrap_err();
    let input = Some(pb::JobInput { stdin: vec![0, 1, 2].into(), ..Default::default() });
    let spec_with_input = Some(pb::JobSpec { input_digest: vec![9; 32].into(), ..spec() });
    let request = wire::CreateJobRequest { job_id: uuid(), spec: spec_with_input, input, ..Default::default() };
    kit.client.create_job(request).await.unwrap();
    let lease = wire::AcquireLeaseRequest {
        name: "scheduler".into(),
        holder: "s".into(),
        instance: uuid(),
        ttl_ms: 1000,
        release: false,
    };
    kit.client.acquire_lease(lease).await.unwrap();
    let node = pb::Node { id: "n".into(), endpoint: "http://h:1".into(), max_vms: 1, ..Default::default() };
    let register = wire::RegisterNodeRequest { node: Some(node), request_id: uuid() };
    kit.client.register_node(register).await.unwrap();
    for _ in 0..20 {
        let env = [("LARGE".to_owned(), "x".repeat(200_000))].into_iter().collect();
        let request =
            wire::CreateJobRequest { job_id: uuid(), spec: Some(pb::JobSpec { env, ..spec() }), ..Default::default() };
        kit.client.create_job(request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_writes_comes_back_as_it_was_and_goes_on_at_its_revision() {
    let mut kit = Kit::start().await;
    fill(&mut kit).await;
    let dir = tempfile::tempdir().unwrap();
    let (archive, data) = (dir.path().join("backup"), dir.path().join("data"));
    let (writers, mut writer) = (Tasks::new(), kit.client.clone());
    let stop = writers.token().clone();
    writers.spawn("writer", async move {
        while !stop.is_cancelled() {
            writer.create_vm(create_vm(&uuid(), VmKind::Service)).await.unwrap();
        }
    });
    let manifest = back_up(&mut kit.client, &archive).await;
    assert!(writers.shutdown(DEADLINE).await);
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    assert!(counts.revision > manifest.revision, "nothing was written meanwhile");
    kit.stop().await;

    restore(&RegistryConfig::alone(data.clone()), &Archive::open(&archive).unwrap(), |_, _| {}).await.unwrap();
    assert_equal(&archive.join("registry.db"), &data.join("hiqlite/hiqlite.db"));
    let backed_up = dump(&archive.join("registry.db"));
    let revisions = &backed_up.iter().find(|(name, _)| name == "events").unwrap().1;
    assert_eq!(u64::try_from(revisions.len()).unwrap(), manifest.revision, "an event for each revision");
    for (table, rows) in &backed_up {
        assert!(!rows.is_empty(), "{table} is not tried");
    }

    let (mut client, (registry, tasks)) = Box::pin(serve(config_of(data.clone()))).await;
    let vm = client.create_vm(create_vm(&uuid(), VmKind::Service)).await.unwrap().into_inner().vm.unwrap();
    assert_eq!(vm.revision, manifest.revision + 1);
    client.transition_vm(transition(&vm.id, VmState::Ready)).await.unwrap();
    tasks.shutdown(DEADLINE).await;
    registry.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_a_whole_backup_is_refused_and_nothing_is_overwritten() {
    let mut kit = Kit::start().await;
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("backup");
    back_up(&mut kit.client, &archive).await;
    let exists = ArchiveWriter::create(&archive, wire::BackupHeader::default()).err().unwrap();
    assert!(matches!(exists, ArchiveError::Exists(_)), "{exists}");
    let short =
        ArchiveWriter::create(&dir.path().join("short"), wire::BackupHeader { size_bytes: 9, ..Default::default() });
    assert!(matches!(short.unwrap().finish(&[0; 32]).unwrap_err(), ArchiveError::Truncated(_)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what is not whole leaves nothing");

    let occupied = RegistryConfig::alone(kit.dir.path().to_owned());
    let error = restore(&occupied, &Archive::open(&archive).unwrap(), |_, _| {}).await.unwrap_err();
    assert!(matches!(error, RestoreError::Occupied(_)), "{error}");

    let database = archive.join("registry.db");
    let whole = fs::read(&database).unwrap();
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    for damaged in [&whole[..whole.len() - 4096], &changed, b""] {
        fs::write(&database, damaged).unwrap();
        let error = Archive::open(&archive).unwrap_err();
        assert!(matches!(error, ArchiveError::Damaged { .. }), "{error}");
    }
    fs::write(&database, &whole).unwrap();
    Archive::open(&archive).unwrap();
    let manifest = archive.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"format_version\": 1", "\"format_version\": 2")).unwrap();
    assert!(matches!(Archive::open(&archive).unwrap_err(), ArchiveError::NewerFormat(2)));
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(matches!(Archive::open(&archive).unwrap_err(), ArchiveError::Manifest { .. }));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_was_killed_is_told_at_the_next_start_and_done_again() {
    let mut kit = Kit::start().await;
    fill(&mut kit).await;
    let dir = tempfile::tempdir().unwrap();
    let (archive, data) = (dir.path().join("backup"), dir.path().join("data"));
    back_up(&mut kit.client, &archive).await;
    kit.stop().await;
    let mut restoring = restore_in_a_process(&archive, &data, "");
    let began = Instant::now();
    while !data.join("restoring/hiqlite/state_machine/db/hiqlite.db").exists() {
        assert!(began.elapsed() < DEADLINE, "the restore does not begin");
        tokio::task::yield_now().await;
    }
    restoring.kill().unwrap();
    assert_eq!(restoring.wait().unwrap().signal(), Some(9), "it ended before it was killed");

    let config = RegistryConfig::alone(data.clone());
    let error = Registry::start(config.clone(), &Tasks::new()).await.err().unwrap();
    assert!(matches!(error, StartError::Restoring(_)), "{error}");
    restore(&config, &Archive::open(&archive).unwrap(), |_, _| {}).await.unwrap();
    assert_equal(&archive.join("registry.db"), &data.join("hiqlite/hiqlite.db"));
    assert!(!data.join("restoring").exists());
}

/// This test's binary again, as somebody else's `mvm-ci registry restore`: a node of Hiqlite's that has shut down keeps its
/// ports until its process ends.
fn restore_in_a_process(archive: &Path, data: &Path, replicas: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "backups::child", "--ignored"])
        .env("ARCHIVE", archive)
        .env("DATA", data)
        .env("REPLICAS", replicas)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "what restore_in_a_process runs"]
async fn child() {
    let get = |name: &str| std::env::var(name).unwrap();
    let (archive, replicas): (_, Replicas) = (get("ARCHIVE"), get("REPLICAS").parse().unwrap());
    let membership = (!replicas.is_empty()).then(|| Membership { replicas, id: 1, secret: Secret::new(SECRET) });
    let config = RegistryConfig { membership, ..RegistryConfig::alone(get("DATA").into()) };
    restore(&config, &Archive::open(Path::new(&archive)).unwrap(), |_, _| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_made_one_at_a_time_and_leave_nothing_behind() {
    let mut kit = Kit::start().await;
    fill(&mut kit).await;
    let mut first = kit.client.backup(wire::BackupRequest {}).await.unwrap().into_inner();
    first.message().await.unwrap().unwrap();
    let copy = kit.dir.path().join("hiqlite/backup.tmp");
    assert!(!copy.exists(), "a copy that is sent has no name");
    assert_eq!(refusal(kit.client.backup(wire::BackupRequest {}).await), "OVERLOADED");
    drop(first);
    let began = Instant::now();
    while kit.client.backup(wire::BackupRequest {}).await.is_err() {
        assert!(began.elapsed() < DEADLINE, "the place of a client that left is still taken");
        tokio::task::yield_now().await;
    }
    kit.stop().await;
    fs::write(&copy, "what a killed process left").unwrap();
    let (_, (registry, _)) = Box::pin(serve(config_of(kit.dir.path().to_owned()))).await;
    assert!(!copy.exists());
    registry.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_grow_from_a_restored_one() {
    let mut kit = Kit::start().await;
    fill(&mut kit).await;
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("backup");
    let manifest = back_up(&mut kit.client, &archive).await;
    kit.stop().await;

    let ports: Vec<_> = (0..9).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let port = |at: usize| ports[at].local_addr().unwrap().port();
    let one = |at: usize| format!("{}=127.0.0.1:{}/{}/{}", at + 1, port(3 * at), port(3 * at + 1), port(3 * at + 2));
    let replicas: Replicas = (0..3).map(one).collect::<Vec<_>>().join(",").parse().unwrap();
    drop(ports);
    let second = RegistryConfig {
        membership: Some(Membership { replicas: replicas.clone(), id: 2, secret: Secret::new(SECRET) }),
        ..RegistryConfig::alone(dir.path().join("2"))
    };
    let error = restore(&second, &Archive::open(&archive).unwrap(), |_, _| {}).await.unwrap_err();
    assert!(matches!(error, RestoreError::NotTheFirst(2)), "{error}");
    let restored = restore_in_a_process(&archive, &dir.path().join("1"), &replicas.to_string()).wait().unwrap();
    assert!(restored.success());

    let secret = dir.path().join("secret");
    fs::write(&secret, SECRET).unwrap();
    let running: Vec<_> = replicas.iter().map(|replica| Replica::start(replica, &replicas, dir.path())).collect();
    let began = Instant::now();
    let mut client = connect(&running[2].endpoint);
    let vm = loop {
        match client.create_vm(create_vm(&uuid(), VmKind::Service)).await {
            Ok(answer) => break answer.into_inner().vm.unwrap(),
            Err(status) => assert!(began.elapsed() < DEADLINE, "{status}"),
        }
        tokio::task::yield_now().await;
    };
    assert!(vm.revision > manifest.revision);
    for replica in &running {
        let mut client = connect(&replica.endpoint);
        let counts = loop {
            let mut request = tonic::Request::new(wire::GetCountsRequest::default());
            request.metadata_mut().insert("blixard-min-revision", vm.revision.to_string().parse().unwrap());
            match client.get_counts(request).await {
                Ok(answer) => break answer.into_inner(),
                Err(status) => assert!(began.elapsed() < DEADLINE, "{status}"),
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(counts.jobs.iter().map(|state| state.count).sum::<u64>(), 22);
    }
    let databases = ["1", "2", "3"].map(|id| dir.path().join(id).join("hiqlite/hiqlite.db"));
    assert_equal(&databases[0], &databases[1]);
    assert_equal(&databases[0], &databases[2]);
}

/// A `registry` process.
struct Replica {
    endpoint: String,
    process: Child,
}

impl Replica {
    fn start(replica: &blixard::replica::Replica, replicas: &Replicas, dir: &Path) -> Self {
        let id = replica.id.to_string();
        let process = Command::new(env!("CARGO_BIN_EXE_registry"))
            .args(["--replicas", &replicas.to_string(), "--replica-id", &id])
            .arg("--secret-file")
            .arg(dir.join("secret"))
            .arg("--data-dir")
            .arg(dir.join(&id))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { endpoint: replica.endpoint(), process }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
