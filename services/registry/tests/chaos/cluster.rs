//! Three `registry` processes.

use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blixard::pb::registry::v1::{
    GetReplicaRequest, GetReplicaResponse, ReplicaState, replica_service_client::ReplicaServiceClient,
};
use blixard_chaos_kit::{Network, Processes, Program};
use blixard_chassis::client;
use tonic::transport::Channel;

/// How long a replica has to say how it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a condition is looked at.
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Every replica.
pub(crate) const IDS: [u64; 3] = [1, 2, 3];

/// Three replicas. They end when it is dropped.
pub(crate) struct Cluster {
    // Before the network: they end before it goes.
    processes: Processes,
    pub(crate) network: Network,
    endpoints: [String; 3],
}

impl Deref for Cluster {
    type Target = Processes;

    fn deref(&self) -> &Processes {
        &self.processes
    }
}

impl Cluster {
    /// Starts three replicas without data. `settings` are further environment variables.
    pub(crate) fn start(network: Network, settings: &[(&str, String)]) -> Self {
        let secret = network.dir.join("secret");
        fs::write(&secret, "what only replicas of this test know").unwrap();
        let addresses = IDS.map(|id| {
            let [grpc, raft, api] = network.ports(id, [50052, 50062, 50072]);
            (network.address(id), grpc, raft, api)
        });
        let endpoints = addresses.each_ref().map(|(host, grpc, ..)| format!("http://{host}:{grpc}"));
        let entries = IDS.iter().zip(&addresses);
        let list: Vec<_> =
            entries.map(|(id, (host, grpc, raft, api))| format!("{id}={host}:{grpc}/{raft}/{api}")).collect();
        let replica = |id: u64| {
            let dir = network.dir.join(format!("replica-{id}"));
            let mut command = network.command(id, &program());
            command
                .args(["--replica-id", &id.to_string(), "--data-dir"])
                .arg(&dir)
                .arg("--secret-file")
                .arg(&secret)
                .env("BLIXARD_REGISTRY_REPLICAS", list.join(","))
                .envs(settings.iter().map(|(name, value)| (name, value)));
            Program::new(id, dir, command)
        };
        Self { processes: Processes::start(IDS.map(replica).into()), network, endpoints }
    }

    pub(crate) fn endpoint(&self, id: u64) -> &str {
        &self.endpoints[usize::try_from(id - 1).unwrap()]
    }

    /// All endpoints as a client is configured with them, beginning with this one.
    pub(crate) fn endpoints_from(&self, id: u64) -> String {
        IDS.into_iter().map(|offset| self.endpoint((id + offset - 1) % 3 + 1).to_owned()).collect::<Vec<_>>().join(",")
    }

    /// Its SQLite file.
    pub(crate) fn database(&self, id: u64) -> PathBuf {
        self.dir(id).join("hiqlite/hiqlite.db")
    }
}

/// The `registry` under trial.
fn program() -> PathBuf {
    let other = std::env::var_os("BLIXARD_CHAOS_REGISTRY").map(PathBuf::from);
    other.unwrap_or_else(|| Path::new(env!("CARGO_BIN_EXE_registry")).to_owned())
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
