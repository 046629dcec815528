//! A registry and a vmhost, each a process on a host of its own.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blixard::{
    config::DriverChoice,
    error::Error,
    limits::MAX_MESSAGE_BYTES,
    pb::{
        common::v1::NodeState,
        registry::v1::{ListNodesRequest, registry_service_client::RegistryServiceClient},
        vmhost::v1::vm_host_service_client::VmHostServiceClient,
    },
};
use blixard_chaos_kit::{Network, Processes, Program, processes_mentioning, say};
use blixard_chassis::client;
use rustix::process::{Pid, Signal, kill_process};
use tonic::transport::Channel;

/// The host of the registry, and its process.
const REGISTRY: u64 = 1;
/// The node.
pub(crate) const VMHOST: u64 = 2;
pub(crate) const NODE: &str = "node-1";
/// Room for a few addresses only: those that do not return are missed.
const SUBNET: &str = "10.180.0.0/28";
/// VMs that the node may have.
const MAX_VMS: &str = "32";
/// Deadline of a call: then it is made again.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node may take to be there: its VMs' agents have 15 s to answer.
const THERE_WITHIN: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(crate) struct Bed {
    // Before the network: they end before it goes.
    processes: Mutex<Option<Processes>>,
    network: Network,
    driver: DriverChoice,
    /// Where registry and vmhost listen.
    endpoints: [String; 2],
    channels: OnceLock<[Channel; 2]>,
    incarnation: AtomicU64,
}

/// The processes, for as long as they are not replaced.
pub(crate) struct Held<'a>(MutexGuard<'a, Option<Processes>>);

impl std::ops::Deref for Held<'_> {
    type Target = Processes;

    fn deref(&self) -> &Processes {
        self.0.as_ref().unwrap()
    }
}

impl Bed {
    pub(crate) fn start(driver: DriverChoice) -> Self {
        let network = Network::new(VMHOST);
        let address = |id, port| {
            let [port] = network.ports(id, [port]);
            format!("{}:{port}", network.address(id))
        };
        let endpoints = [address(REGISTRY, 50052), address(VMHOST, 50053)];
        let (processes, channels, incarnation) = (Mutex::default(), OnceLock::new(), AtomicU64::new(0));
        let bed = Self { processes, network, driver, endpoints, channels, incarnation };
        bed.start_processes(bed.has_network());
        bed
    }

    /// From the callers' network.
    fn channels(&self) -> &[Channel; 2] {
        let channel = |address: &String| client::channel(&format!("http://{address}")).unwrap();
        self.channels.get_or_init(|| self.endpoints.each_ref().map(channel))
    }

    pub(crate) fn registry(&self) -> RegistryServiceClient<Channel> {
        RegistryServiceClient::new(self.channels()[0].clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    pub(crate) fn vmhost(&self) -> VmHostServiceClient<Channel> {
        VmHostServiceClient::new(self.channels()[1].clone())
    }

    /// Whether its guests can have one: only in a namespace, for the machine's own is not ours.
    pub(crate) fn has_network(&self) -> bool {
        self.driver == DriverChoice::Qemu && self.network.partitions && Path::new("/dev/net/tun").exists()
    }

    fn start_processes(&self, with_network: bool) {
        let [registry, vmhost] = &self.endpoints;
        let dir = self.network.dir.join("registry");
        let mut command = self.network.command(REGISTRY, &program("registry"));
        command.args(["--listen", registry]).arg("--data-dir").arg(&dir);
        let first = Program::new(REGISTRY, dir, command);

        let mut command = self.network.command(VMHOST, &program("vmhost"));
        command.args(["--listen", vmhost, "--registry", &format!("http://{registry}"), "--node-id", NODE]);
        let driver = if self.driver == DriverChoice::Qemu { "qemu" } else { "process" };
        command.args(["--driver", driver, "--max-vms", MAX_VMS]).arg("--image-dir").arg(image_dir());
        command.arg("--data-dir").arg(self.dir()).arg("--vm-state-dir").arg(self.state_dir());
        if with_network {
            command.args(["--network-subnet", SUBNET]);
        }
        let second = Program::new(VMHOST, self.dir(), command);
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        // In this order: those before are gone when these begin.
        drop(processes.take());
        *processes = Some(Processes::start(vec![first, second]));
    }

    /// Starts both again, and from now on the node's guests have no network.
    pub(crate) fn switch_network_off(&self) {
        self.start_processes(false);
        self.incarnation.store(0, Ordering::Relaxed);
    }

    pub(crate) fn processes(&self) -> Held<'_> {
        Held(self.processes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    fn dir(&self) -> PathBuf {
        self.network.dir.join(NODE)
    }

    /// Short, for there are sockets below it.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir().join("vms")
    }

    /// The newest that was heard of.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Relaxed)
    }

    /// Keeps looking which incarnation of the node is on record: what a scheduler's watch tells it.
    pub(crate) async fn watch_incarnation(&self) -> Infallible {
        loop {
            if let Ok(incarnation) = self.registered().await {
                self.incarnation.store(incarnation, Ordering::Relaxed);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn registered(&self) -> Result<u64, String> {
        let list = client::request(ListNodesRequest::default(), CALL_TIMEOUT);
        let nodes = self.registry().list_nodes(list).await.map_err(|status| status.to_string())?;
        let node = nodes.into_inner().nodes.into_iter().find(|node| node.state() == NodeState::Ready);
        node.map(|node| node.incarnation).ok_or_else(|| "no node is Ready".to_owned())
    }

    /// Waits until the node has registered and answers.
    pub(crate) async fn wait_registered(&self) -> Result<(), String> {
        wait_until("the node to be there", THERE_WITHIN, async || {
            let incarnation = self.registered().await?;
            let vms = self.vmhost().list_vms(client::request(Default::default(), CALL_TIMEOUT)).await;
            vms.map_err(|status| Error::from(status).to_string())?;
            self.incarnation.store(incarnation, Ordering::Relaxed);
            Ok(())
        })
        .await
    }

    /// What of all this runs besides its own processes.
    pub(crate) fn strays(&self) -> Vec<(u32, String)> {
        let own: Vec<_> = [REGISTRY, VMHOST].into_iter().filter_map(|id| self.processes().pid(id)).collect();
        let dir = self.network.dir.to_str().unwrap().to_owned();
        processes_mentioning(&[dir]).into_iter().filter(|(pid, _)| !own.contains(pid)).collect()
    }

    /// What vmhost complained of last.
    pub(crate) fn show_log(&self) {
        let log = self.processes().log(VMHOST);
        let lines: Vec<_> = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
        say(&format!("warnings of vmhost\n{}", lines[lines.len().saturating_sub(40)..].join("\n")));
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.processes().kill(VMHOST);
        for (pid, _) in self.strays() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Waits until `look` finds nothing to complain of.
pub(crate) async fn wait_until<T>(
    what: &str,
    within: Duration,
    look: impl AsyncFn() -> Result<T, String>,
) -> Result<T, String> {
    let until = Instant::now() + within;
    loop {
        match look().await {
            Ok(seen) => return Ok(seen),
            Err(seen) if Instant::now() >= until => return Err(format!("waited {within:?} for {what}: {seen}")),
            Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// Where the images are.
pub(crate) fn image_dir() -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    std::env::var_os("BLIXARD_IMAGE_DIR").map_or_else(|| project.join("images"), PathBuf::from)
}

/// A binary of the workspace, beside `mvm-ci`.
fn program(name: &str) -> PathBuf {
    let directory = std::env::var_os("BLIXARD_CHAOS_PROGRAMS").map(PathBuf::from);
    let beside = || Path::new(env!("CARGO_BIN_EXE_mvm-ci")).parent().unwrap().to_owned();
    let path = directory.unwrap_or_else(beside).join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}
