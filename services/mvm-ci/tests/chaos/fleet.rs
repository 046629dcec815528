//! Three registries, two schedulers and three vmhosts, each a process on a host of its own.

use std::{
    collections::BTreeSet,
    fs,
    ops::{Deref, RangeInclusive},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blixard::pb::{
    registry::v1::{GetReplicaRequest, ReplicaState, replica_service_client::ReplicaServiceClient},
    scheduler::v1::scheduler_service_client::SchedulerServiceClient,
};
use blixard_chaos_kit::{Network, Processes, Program, processes_mentioning};
use blixard_chassis::{ReplicatedChannel, client};
use rustix::process::{Pid, Signal, kill_process};

/// Hosts: where the registry's replicas are.
pub(crate) const REGISTRIES: RangeInclusive<u64> = 1..=3;
/// Where the schedulers are.
pub(crate) const SCHEDULERS: RangeInclusive<u64> = 4..=5;
/// Where the vmhosts are.
pub(crate) const NODES: RangeInclusive<u64> = 6..=8;
/// VMs of a node.
pub(crate) const VMS_OF_A_NODE: usize = 6;

/// How long a replica has to say how it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// A VM's processes are gone within this after SIGKILL.
const DIES_WITHIN: Duration = Duration::from_secs(20);

/// All of them. They end when it is dropped, and so do the VMs.
pub(crate) struct Fleet {
    // Before the network: they end before it goes.
    processes: Processes,
    pub(crate) network: Network,
    /// Where jobs write what they have done, one file each.
    pub(crate) effects: PathBuf,
    registries: Vec<String>,
    schedulers: Vec<String>,
}

impl Deref for Fleet {
    type Target = Processes;

    fn deref(&self) -> &Processes {
        &self.processes
    }
}

impl Fleet {
    /// Starts all of them without data.
    pub(crate) fn start() -> Self {
        let network = Network::new(*NODES.end());
        let effects = network.dir.join("effects");
        fs::create_dir_all(&effects).unwrap();
        let secret = network.dir.join("secret");
        fs::write(&secret, "what only replicas of this test know").unwrap();

        let ports = |id| network.ports(id, [50052, 50062, 50072]);
        let replicas: Vec<_> = REGISTRIES.map(|id| (id, network.address(id), ports(id))).collect();
        let registries: Vec<_> = replicas.iter().map(|(_, host, [grpc, ..])| format!("http://{host}:{grpc}")).collect();
        let entries = replicas.iter().map(|(id, host, [grpc, raft, api])| format!("{id}={host}:{grpc}/{raft}/{api}"));
        let list = entries.collect::<Vec<_>>().join(",");
        let mut programs: Vec<_> = REGISTRIES
            .map(|id| {
                let dir = network.dir.join(name(id));
                let mut command = network.command(id, &program("registry"));
                command.args(["--replica-id", &id.to_string(), "--replicas", &list]);
                command.arg("--data-dir").arg(&dir).arg("--secret-file").arg(&secret);
                Program::new(id, dir, command)
            })
            .collect();

        let mut schedulers = Vec::new();
        for id in SCHEDULERS {
            let [port] = network.ports(id, [50051]);
            let (dir, address) = (network.dir.join(name(id)), format!("{}:{port}", network.address(id)));
            let mut command = network.command(id, &program("scheduler"));
            command.args(["--listen", &address, "--registry", &from(&registries, id), "--name", &name(id)]);
            command.args(["--max-vms", "100"]);
            programs.push(Program::new(id, dir, command));
            schedulers.push(format!("http://{address}"));
        }
        for id in NODES {
            let [port] = network.ports(id, [50053]);
            let (dir, address) = (network.dir.join(name(id)), format!("{}:{port}", network.address(id)));
            let mut command = network.command(id, &program("vmhost"));
            command.args(["--listen", &address, "--registry", &from(&registries, id), "--node-id", &name(id)]);
            command.args(["--driver", "process", "--max-vms", &VMS_OF_A_NODE.to_string()]);
            command.arg("--data-dir").arg(&dir).arg("--vm-state-dir").arg(vms_below(&dir));
            programs.push(Program::new(id, dir, command));
        }
        Self { processes: Processes::start(programs), network, effects, registries, schedulers }
    }

    /// The registry, in the callers' network.
    pub(crate) fn registry(&self) -> ReplicatedChannel {
        ReplicatedChannel::new(&self.registries.join(",")).unwrap()
    }

    /// Both schedulers, beginning with one of them.
    pub(crate) fn schedulers(&self, first: u64) -> SchedulerServiceClient<ReplicatedChannel> {
        let channel = ReplicatedChannel::new(&from(&self.schedulers, first)).unwrap();
        SchedulerServiceClient::new(channel)
    }

    /// What each replica says of itself.
    pub(crate) async fn replicas(&self) -> Vec<Option<ReplicaState>> {
        let asked = self.registries.iter().map(async |endpoint| {
            let mut client = ReplicaServiceClient::new(client::channel(endpoint).unwrap());
            let request = client::request(GetReplicaRequest::default(), ASK_TIMEOUT);
            let answer = tokio::time::timeout(ASK_TIMEOUT, client.get_replica(request)).await;
            Some(answer.ok()?.ok()?.into_inner().state())
        });
        futures::future::join_all(asked).await
    }

    /// The VMs that a node holds something of.
    pub(crate) fn vms_of(&self, node: u64) -> BTreeSet<String> {
        let entries = fs::read_dir(vms_below(self.dir(node))).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.path().is_dir());
        directories.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The guest agents of a VM: there is at most one.
    pub(crate) fn agents_of(&self, vm_id: &str) -> Vec<u32> {
        let of_vm = processes_mentioning(&[vm_id.to_owned()]).into_iter();
        of_vm.filter(|(_, command)| command.contains("--listen")).map(|(pid, _)| pid).collect()
    }

    /// A power failure: the vmhost and whatever runs in its VMs, all at once. Nothing is left when it returns.
    pub(crate) fn power_off(&self, node: u64) {
        self.kill(node);
        let vms: Vec<_> = self.vms_of(node).into_iter().collect();
        let until = Instant::now() + DIES_WITHIN;
        while !vms.is_empty() {
            let left = processes_mentioning(&vms);
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "these outlive SIGKILL: {left:?}");
            left.iter().for_each(|(pid, _)| signal(*pid, Signal::KILL));
        }
    }

    /// What of all this runs besides its own processes.
    pub(crate) fn strays(&self) -> Vec<(u32, String)> {
        let own: BTreeSet<_> = (1..=*NODES.end()).filter_map(|id| self.pid(id)).collect();
        let dir = self.network.dir.to_str().unwrap().to_owned();
        processes_mentioning(&[dir]).into_iter().filter(|(pid, _)| !own.contains(pid)).collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        NODES.for_each(|id| self.power_off(id));
        self.strays().iter().for_each(|(pid, _)| signal(*pid, Signal::KILL));
    }
}

/// A host's name; it is also that of its process.
pub(crate) fn name(id: u64) -> String {
    match id {
        _ if REGISTRIES.contains(&id) => format!("registry-{id}"),
        _ if SCHEDULERS.contains(&id) => format!("scheduler-{id}"),
        _ => format!("node-{id}"),
    }
}

/// To a process that need not be there any more.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Short, for there are sockets below it.
fn vms_below(dir: &Path) -> PathBuf {
    dir.join("vms")
}

/// Endpoints as a client is configured with them, beginning with any.
fn from(endpoints: &[String], first: u64) -> String {
    let mut endpoints = endpoints.to_vec();
    let places = usize::try_from(first).unwrap() % endpoints.len();
    endpoints.rotate_left(places);
    endpoints.join(",")
}

/// A binary of the workspace, beside `mvm-ci`.
fn program(name: &str) -> PathBuf {
    let directory = std::env::var_os("BLIXARD_CHAOS_PROGRAMS").map(PathBuf::from);
    let beside = || Path::new(env!("CARGO_BIN_EXE_mvm-ci")).parent().unwrap().to_owned();
    let path = directory.unwrap_or_else(beside).join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}
