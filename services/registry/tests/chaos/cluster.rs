//! Three `registry` processes and a supervisor that starts again those that end.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use blixard::pb::registry::v1::{
    GetReplicaRequest, GetReplicaResponse, ReplicaState, replica_service_client::ReplicaServiceClient,
};
use blixard_chassis::client;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::Channel;

use crate::network::Network;

/// How often the supervisor looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a replica has to say how it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a condition is looked at.
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Every replica.
pub(crate) const IDS: [u64; 3] = [1, 2, 3];

/// Three replicas. They end when it is dropped.
pub(crate) struct Cluster {
    pub(crate) network: Network,
    replicas: Arc<[Replica]>,
    supervisor: Option<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

struct Replica {
    id: u64,
    dir: PathBuf,
    endpoint: String,
    process: Mutex<Process>,
    /// The recipe; whoever starts one adds nothing.
    command: Mutex<Command>,
}

#[derive(Default)]
struct Process {
    child: Option<Child>,
    wanted: bool,
    /// How often it ended though nobody made it.
    ended_by_itself: u64,
}

impl Cluster {
    /// Starts three replicas without data. `settings` are further environment variables.
    pub(crate) fn start(network: Network, settings: &[(&str, String)]) -> Self {
        let secret = network.dir.join("secret");
        fs::write(&secret, "what only replicas of this test know").unwrap();
        let addresses = IDS.map(|id| (id, network.address(id)));
        let list = addresses.each_ref().map(|(id, address)| format!("{id}={address}")).join(",");
        let replica = |(id, address): (u64, String)| {
            let dir = network.dir.join(format!("replica-{id}"));
            let mut command = network.command(id, &program());
            command
                .args(["--replica-id", &id.to_string(), "--data-dir"])
                .arg(&dir)
                .arg("--secret-file")
                .arg(&secret)
                .env_remove("RUST_LOG")
                .envs(std::env::var("BLIXARD_CHAOS_RUST_LOG").ok().map(|directives| ("RUST_LOG", directives)))
                .env("BLIXARD_REGISTRY_REPLICAS", &list)
                .envs(settings.iter().map(|(name, value)| (name, value)))
                .stdin(Stdio::null());
            let endpoint = format!("http://{}", address.split('/').next().unwrap());
            Replica { id, dir, endpoint, process: Mutex::default(), command: Mutex::new(command) }
        };
        let replicas: Arc<[Replica]> = addresses.into_iter().map(replica).collect();
        let over = Arc::new(AtomicBool::new(false));
        let mut cluster = Self { network, replicas, supervisor: None, over };
        IDS.into_iter().for_each(|id| cluster.start_again(id));
        let (replicas, over) = (Arc::clone(&cluster.replicas), Arc::clone(&cluster.over));
        cluster.supervisor = Some(std::thread::spawn(move || supervise(&replicas, &over)));
        cluster
    }

    fn replica(&self, id: u64) -> &Replica {
        self.replicas.iter().find(|replica| replica.id == id).unwrap()
    }

    pub(crate) fn endpoint(&self, id: u64) -> &str {
        &self.replica(id).endpoint
    }

    /// All endpoints as a client is configured with them, beginning with this one.
    pub(crate) fn endpoints_from(&self, id: u64) -> String {
        IDS.into_iter().map(|offset| self.endpoint((id + offset - 1) % 3 + 1).to_owned()).collect::<Vec<_>>().join(",")
    }

    /// Its SQLite file.
    pub(crate) fn database(&self, id: u64) -> PathBuf {
        self.replica(id).dir.join("hiqlite/hiqlite.db")
    }

    /// What it and those before it have logged.
    pub(crate) fn log(&self, id: u64) -> String {
        fs::read_to_string(log_path(&self.replica(id).dir)).unwrap_or_default()
    }

    /// How often a replica has ended though nobody made it.
    pub(crate) fn ended_by_itself(&self, id: u64) -> u64 {
        self.replica(id).process().ended_by_itself
    }

    /// kill -9; it stays down until it is started again.
    pub(crate) fn kill(&self, id: u64) {
        self.replica(id).end();
    }

    /// The supervisor starts it, if it is down.
    pub(crate) fn start_again(&self, id: u64) {
        self.replica(id).process().wanted = true;
    }

    /// To a replica that runs.
    pub(crate) fn signal(&self, id: u64, signal: Signal) {
        self.replica(id).process().signal(signal);
    }

    /// Throws away the data of a replica that is down.
    pub(crate) fn wipe(&self, id: u64) {
        let replica = self.replica(id);
        assert!(replica.process().child.is_none(), "replica {id} is not down");
        fs::remove_dir_all(&replica.dir).unwrap();
    }
}

/// The `registry` under trial.
fn program() -> String {
    std::env::var("BLIXARD_CHAOS_REGISTRY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_registry").to_owned())
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        self.replicas.iter().for_each(Replica::end);
    }
}

impl Replica {
    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        let mut process = self.process();
        process.wanted = false;
        if let Some(mut child) = process.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn spawn(&self) -> Child {
        fs::create_dir_all(&self.dir).unwrap();
        let log = OpenOptions::new().create(true).append(true).open(log_path(&self.dir)).unwrap();
        let mut command = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }
}

impl Process {
    fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            // Nobody has waited for it, so the id is still its own.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }
}

/// Beside the data, so that it outlives them.
fn log_path(dir: &Path) -> PathBuf {
    dir.with_extension("log")
}

fn supervise(replicas: &[Replica], over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        for replica in replicas {
            let mut process = replica.process();
            if let Some(child) = &mut process.child
                && child.try_wait().unwrap().is_some()
            {
                process.child = None;
                process.ended_by_itself += 1;
            }
            if process.wanted && process.child.is_none() {
                process.child = Some(replica.spawn());
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Asks the replicas how they are.
#[derive(Clone)]
pub(crate) struct Asker([Channel; 3]);

impl Asker {
    /// In the callers' network.
    pub(crate) fn new(cluster: &Cluster) -> Self {
        Self(IDS.map(|id| client::channel(cluster.endpoint(id)).unwrap()))
    }

    /// What a replica says of itself; `None`: nothing.
    pub(crate) async fn ask(&self, id: u64) -> Option<GetReplicaResponse> {
        let mut client = ReplicaServiceClient::new(self.0[usize::try_from(id).unwrap() - 1].clone());
        let request = client::request(GetReplicaRequest::default(), ASK_TIMEOUT);
        let answer = tokio::time::timeout(ASK_TIMEOUT, client.get_replica(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    async fn ask_all(&self) -> [Option<GetReplicaResponse>; 3] {
        tokio::join!(self.ask(1), self.ask(2), self.ask(3)).into()
    }

    /// Waits until all of these replicas serve, in one term and under one of them; returns that one.
    pub(crate) async fn wait_for(&self, ids: &[u64], within: Duration) -> Result<u64, String> {
        let until = Instant::now() + within;
        loop {
            let answers = self.ask_all().await;
            let of = |id: u64| answers[usize::try_from(id).unwrap() - 1].as_ref();
            let leader = ids.iter().copied().filter_map(of).find(|answer| leads(answer));
            let follows = |leader: &GetReplicaResponse, id: u64| {
                of(id).is_some_and(|own| is_well(own) && (own.leader_id, own.term) == (leader.replica_id, leader.term))
            };
            if let Some(leader) = leader.filter(|leader| ids.iter().all(|&id| follows(leader, id))) {
                return Ok(leader.replica_id.into());
            }
            if Instant::now() >= until {
                let seen =
                    answers.map(|answer| answer.map(|own| (own.state(), own.leader_id, own.term, own.applied_index)));
                return Err(format!("replicas {ids:?} do not serve after {within:?}: {seen:?}"));
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// The leader, if one is known now.
    pub(crate) async fn leader(&self) -> Option<u64> {
        let answers = self.ask_all().await;
        let leaders = answers.into_iter().flatten().filter(leads);
        leaders.max_by_key(|answer| answer.term).map(|answer| answer.replica_id.into())
    }
}

fn is_well(answer: &GetReplicaResponse) -> bool {
    matches!(answer.state(), ReplicaState::Leader | ReplicaState::Follower)
}

fn leads(answer: &GetReplicaResponse) -> bool {
    answer.state() == ReplicaState::Leader
}
