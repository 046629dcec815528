//! Three replicas as processes: who takes what, what callers see, and what is refused before it can do harm. What they
//! survive is `tests/chaos`'s to show.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blixard::{
    error::Error,
    pb::registry::v1::{
        self as wire, ReplicaState, registry_service_client::RegistryServiceClient,
        replica_service_client::ReplicaServiceClient,
    },
    replica::{MIN_REVISION, REVISION, Replicas},
};
use blixard_chassis::{ReplicatedChannel, client};
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::kit::{Client, connect, create_job, refusal, uuid};

/// A first start of three takes 7 s on an idle machine.
const DEADLINE: Duration = Duration::from_secs(90);
const SECRET: &str = "a secret that every replica has";

/// Three replicas at an address of 127.0.0.0/8 that nobody else is likely to use.
struct Three {
    dir: tempfile::TempDir,
    replicas: Replicas,
    children: Vec<Child>,
}

impl Three {
    fn prepare() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), SECRET).unwrap();
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let entry = |id| format!("{id}=127.{}.{b}.{id}:50052/50062/50072", a | 1);
        let replicas = [1, 2, 3].map(entry).join(",").parse().unwrap();
        Self { dir, replicas, children: Vec::new() }
    }

    fn command(&self, id: u64) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registry"));
        command
            .env("BLIXARD_REGISTRY_REPLICAS", self.replicas.to_string())
            .args(["--replica-id", &id.to_string(), "--secret-file"])
            .arg(self.dir.path().join("secret"))
            .arg("--data-dir")
            .arg(self.data_dir(id))
            .env_remove("RUST_LOG")
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.dir.path().join(format!("log-{id}"))).unwrap());
        command
    }

    fn data_dir(&self, id: u64) -> std::path::PathBuf {
        self.dir.path().join(format!("data-{id}"))
    }

    fn start(&mut self, id: u64) {
        let child = self.command(id).spawn().unwrap();
        self.children.push(child);
    }

    fn endpoint(&self, id: u64) -> String {
        self.replicas.get(id).unwrap().endpoint()
    }

    fn client(&self, id: u64) -> Client {
        connect(&self.endpoint(id))
    }

    fn log(&self, id: u64) -> String {
        fs::read_to_string(self.dir.path().join(format!("log-{id}"))).unwrap()
    }

    async fn state(&self, id: u64) -> Option<wire::GetReplicaResponse> {
        let mut client = ReplicaServiceClient::new(client::channel(&self.endpoint(id)).unwrap());
        let request = client::request(wire::GetReplicaRequest::default(), Duration::from_secs(2));
        client.get_replica(request).await.ok().map(tonic::Response::into_inner)
    }

    /// Waits until each of these is in one of these states; returns the leader that the last one knows.
    async fn until(&self, ids: &[u64], states: &[ReplicaState]) -> u64 {
        let began = Instant::now();
        let mut leader = 0;
        for &id in ids {
            loop {
                let seen = self.state(id).await;
                if let Some(seen) = seen.as_ref().filter(|seen| states.contains(&seen.state())) {
                    leader = seen.leader_id.into();
                    break;
                }
                assert!(began.elapsed() < DEADLINE, "replica {id}: {seen:?}\n{}", self.log(id));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        leader
    }

    async fn serving() -> (Self, u64) {
        let mut three = Self::prepare();
        [1, 2, 3].into_iter().for_each(|id| three.start(id));
        let leader = three.until(&[1, 2, 3], &[ReplicaState::Leader, ReplicaState::Follower]).await;
        (three, leader)
    }

    /// Runs a replica that is expected to end by itself; returns what it said.
    fn refused(&self, mut command: Command) -> String {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() > DEADLINE {
                child.kill().unwrap();
                panic!("it was not refused");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }
}

impl Drop for Three {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn with_revision<T>(message: T, revision: u64) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(MIN_REVISION, revision.into());
    request
}

fn revision_of<T>(response: &tonic::Response<T>) -> u64 {
    response.metadata().get(REVISION).unwrap().to_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_takes_every_call_and_no_caller_goes_back_in_time() {
    let (three, leader) = Three::serving().await;
    let mut seen = 0;
    for round in 0..30 {
        let (writer, reader) = (1 + round % 3, 1 + (round + 1) % 3);
        let id = uuid();
        let created = three.client(writer).create_job(create_job(&id)).await.unwrap();
        let revision = revision_of(&created);
        assert!(revision > seen, "{revision} after {seen}");
        seen = revision;
        let get = wire::GetJobRequest { job_id: id };
        let read = three.client(reader).get_job(with_revision(get, revision)).await.unwrap();
        assert!(revision_of(&read) >= revision);
    }
    // A lease is the leader's to give, whoever is asked.
    let instance = uuid();
    for id in [1, 2, 3] {
        let (name, holder, instance) = ("scheduler".to_owned(), "s".to_owned(), instance.clone());
        let request = wire::AcquireLeaseRequest { name, holder, instance, ttl_ms: 60_000, release: false };
        let lease = three.client(id).acquire_lease(request).await.unwrap().into_inner();
        assert_eq!((lease.held, lease.epoch), (true, 1), "replica {id}");
    }
    // A majority's word, through a follower; and the future, which no replica shows.
    let follower = if leader == 1 { 2 } else { 1 };
    let confirmed = three.client(follower).get_revision(wire::GetRevisionRequest {}).await.unwrap();
    assert_eq!(confirmed.into_inner().revision, seen);
    let counts = with_revision(wire::GetCountsRequest {}, seen + 1);
    assert_eq!(refusal(three.client(follower).get_counts(counts).await), "REPLICA_BEHIND");
    let nonsense = {
        let mut request = Request::new(wire::GetCountsRequest {});
        request.metadata_mut().insert(MIN_REVISION, "soon".parse().unwrap());
        request
    };
    assert_eq!(refusal(three.client(follower).get_counts(nonsense).await), "INVALID_FIELD");

    // A follower's watch tells of what was committed by the leader.
    let mut watch = three.client(follower).watch(wire::WatchRequest::default()).await.unwrap().into_inner();
    let synced = watch.message().await.unwrap().unwrap();
    assert!(matches!(synced.message, Some(wire::watch_response::Message::Synced(_))));
    three.client(leader).create_job(create_job(&uuid())).await.unwrap();
    let event = tokio::time::timeout(DEADLINE, watch.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(event.revision, seen + 1);

    for id in [1, 2, 3] {
        let mut health = HealthClient::new(client::channel(&three.endpoint(id)).unwrap());
        let mut check = async |service: &str| {
            let request = HealthCheckRequest { service: service.into() };
            health.check(request).await.unwrap().into_inner().status()
        };
        assert_eq!(check("").await, ServingStatus::Serving);
        assert_eq!(check("blixard.registry.v1.RegistryService").await, ServingStatus::Serving);
        let leads = check("blixard.registry.v1.RegistryService/leader").await == ServingStatus::Serving;
        assert_eq!(leads, id == leader);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_every_endpoint_finds_its_way_past_a_dead_leader() {
    let (mut three, leader) = Three::serving().await;
    let endpoints = [1, 2, 3].map(|id| three.endpoint(id)).join(",");
    let mut client = RegistryServiceClient::new(ReplicatedChannel::new(&endpoints).unwrap());
    client.create_job(create_job(&uuid())).await.unwrap();
    let index = usize::try_from(leader).unwrap() - 1;
    three.children[index].kill().unwrap();
    three.children[index].wait().unwrap();
    let began = Instant::now();
    let id = uuid();
    let created = loop {
        match client.create_job(client::request(create_job(&id), Duration::from_secs(5))).await {
            Ok(created) => break created.into_inner().job.unwrap(),
            Err(status) => {
                let transient = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled);
                assert!(transient || Error::from_status(&status).reason.retryable(), "{status:?}");
                assert!(began.elapsed() < DEADLINE, "{status:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    assert_eq!(created.id, id);
    // Without a majority nothing is served, and health says so.
    let left: Vec<u64> = [1, 2, 3].into_iter().filter(|&id| id != leader).collect();
    let index = usize::try_from(left[0]).unwrap() - 1;
    three.children[index].kill().unwrap();
    three.children[index].wait().unwrap();
    three.until(&left[1..], &[ReplicaState::NoQuorum]).await;
    let refused = three.client(left[1]).get_job(wire::GetJobRequest { job_id: id }).await;
    assert_eq!(refusal(refused), "PEER_UNAVAILABLE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_not_one_of_the_registry_is_refused_with_the_reason() {
    let (mut three, _) = Three::serving().await;
    let refused = three.refused(three.command(2));
    assert!(refused.contains("another process does"), "{refused}");

    three.children[1].kill().unwrap();
    three.children[1].wait().unwrap();
    let stranger = three.dir.path().join("other-secret");
    fs::write(&stranger, "a secret that nobody else has").unwrap();
    let mut command = three.command(2);
    command.arg("--secret-file").arg(&stranger);
    let refused = three.refused(command);
    assert!(refused.contains("has another secret"), "{refused}");

    let mut command = three.command(2);
    command.arg("--replicas").arg(three.replicas.to_string().replace(".3:50052/50062", ".3:50052/50069"));
    let refused = three.refused(command);
    assert!(refused.contains("is configured with other replicas"), "{refused}");

    let mut command = three.command(2);
    let moved: &Path = &three.dir.path().join("moved");
    fs::rename(three.data_dir(2), moved).unwrap();
    fs::create_dir_all(three.data_dir(2)).unwrap();
    fs::rename(moved.join("hiqlite"), three.data_dir(2).join("hiqlite")).unwrap();
    fs::write(three.data_dir(2).join("hiqlite/replica"), "3\n").unwrap();
    let refused = three.refused({
        command.arg("--data-dir").arg(three.data_dir(2));
        command
    });
    assert!(refused.contains("belongs to replica 3 and this is replica 2"), "{refused}");

    let mut command = three.command(9);
    command.arg("--data-dir").arg(three.dir.path().join("nine"));
    let refused = three.refused(command);
    assert!(refused.contains("registry.replica_id: \"9\" is not allowed"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_1_without_data_never_begins_a_second_registry() {
    let (mut three, _) = Three::serving().await;
    let id = uuid();
    three.client(2).create_job(create_job(&id)).await.unwrap();
    for child in &mut three.children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    three.children.clear();
    fs::remove_dir_all(three.data_dir(1)).unwrap();
    // One other replica has data but no leader: that is no reason to begin.
    three.start(1);
    three.start(3);
    three.until(&[3], &[ReplicaState::Starting]).await;
    let began = Instant::now();
    while !three.log(1).contains("replica 1 has no data and waits") {
        assert!(began.elapsed() < DEADLINE, "{}", three.log(1));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(three.state(1).await.unwrap().state(), ReplicaState::Empty);
    // With a majority it is given everything.
    three.start(2);
    three.until(&[1, 2, 3], &[ReplicaState::Leader, ReplicaState::Follower]).await;
    assert_eq!(
        three.client(1).get_job(wire::GetJobRequest { job_id: id.clone() }).await.unwrap().into_inner().job.unwrap().id,
        id
    );
}
