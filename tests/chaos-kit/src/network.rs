//! A network of one's own for processes and their callers.
//!
//! ```text
//!   namespace of callers:  bridge 10.99.0.254 ── h1 ── h2 ── h3 …        taking down h2 cuts host 2 off from everybody
//!                                               │     │     │
//!   namespaces of hosts:             10.99.0.1 eth0  eth0  eth0          a wrong neighbour entry cuts two off from each other
//! ```
//! Where namespaces can't be made, hosts have addresses of 127.0.0.0/8 and can't be cut off. Everything has the id of this
//! process in its name, and a run sweeps away what dead processes have left.

use std::{
    fs, io,
    net::TcpListener,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// What the names of everything that a run makes begin with.
const PREFIX: &str = "blixard-chaos-";
/// An environment variable: when it is set, a run leaves its directory.
const KEEP: &str = "BLIXARD_CHAOS_KEEP";
/// Nobody has this hardware address.
const NOBODY: &str = "02:00:00:00:00:ff";

static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// The most hosts of a network: without namespaces they are told apart by four bits of their addresses.
const MOST_HOSTS: u64 = 15;

/// Removed when it is dropped, with its directory.
pub struct Network {
    name: String,
    /// They are 1 to this.
    hosts: u64,
    /// Whether hosts can be cut off.
    pub partitions: bool,
    /// For whatever the hosts need.
    pub dir: PathBuf,
    /// Without namespaces: the address of each host, but for the last four bits.
    loopback: u32,
}

impl Network {
    /// With hosts 1 to `hosts`.
    ///
    /// # Panics
    /// Too many hosts.
    #[must_use]
    pub fn new(hosts: u64) -> Self {
        assert!(hosts <= MOST_HOSTS, "at most {MOST_HOSTS} hosts");
        sweep();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(&name);
        fs::create_dir_all(&dir).unwrap();
        // Of dead processes' networks nothing is left, so this tells them apart well enough.
        let loopback = (127 << 24) | ((std::process::id() & 0xffff) << 8) | ((number & 0xf) << 4);
        let mut network = Self { name, hosts, partitions: false, dir, loopback };
        match network.make_namespaces() {
            Ok(()) => network.partitions = true,
            Err(error) => crate::say(&format!(
                "PARTITIONS ARE SKIPPED: no network namespaces can be made here ({error}); it takes root and iproute2"
            )),
        }
        network
    }

    fn make_namespaces(&self) -> io::Result<()> {
        let callers = self.namespace(0);
        ip(&["netns", "add", &callers])?;
        ip(&["-n", &callers, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &callers, "address", "add", "10.99.0.254/24", "dev", "bridge"])?;
        for device in ["lo", "bridge"] {
            ip(&["-n", &callers, "link", "set", device, "up"])?;
        }
        for id in 1..=self.hosts {
            let (own, port, address) = (self.namespace(id), format!("h{id}"), format!("{}/24", address(id)));
            ip(&["netns", "add", &own])?;
            let pair = ["link", "add", &port, "netns", &callers, "type", "veth", "peer", "name", "eth0", "netns", &own];
            ip(&pair)?;
            ip(&["-n", &callers, "link", "set", &port, "master", "bridge", "up"])?;
            ip(&["-n", &own, "address", "add", &address, "dev", "eth0"])?;
            for device in ["lo", "eth0"] {
                ip(&["-n", &own, "link", "set", device, "up"])?;
            }
        }
        Ok(())
    }

    /// Where a host is; 0: the callers.
    fn namespace(&self, id: u64) -> String {
        format!("{}-{id}", self.name)
    }

    /// The address of a host.
    #[must_use]
    pub fn address(&self, id: u64) -> String {
        match self.partitions {
            true => address(id),
            false => std::net::Ipv4Addr::from(self.loopback | u32::try_from(id).unwrap()).to_string(),
        }
    }

    /// Ports of a host: these, where it is alone with its network, else free ones.
    #[must_use]
    pub fn ports<const N: usize>(&self, id: u64, wanted: [u16; N]) -> [u16; N] {
        if self.partitions {
            return wanted;
        }
        let sockets = wanted.map(|_| TcpListener::bind((self.address(id), 0)).unwrap());
        sockets.each_ref().map(|socket| socket.local_addr().unwrap().port())
    }

    /// A command that runs on a host.
    #[must_use]
    pub fn command(&self, id: u64, program: &Path) -> Command {
        if !self.partitions {
            return Command::new(program);
        }
        // It becomes the program, with the same process id.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(id)]).arg(program);
        command
    }

    /// What makes a thread one of the callers'.
    pub fn entry(&self) -> impl Fn() + Clone + Send + Sync + 'static {
        self.entry_of(0)
    }

    /// What makes a thread one of a host's; 0: of the callers'.
    pub fn entry_of(&self, id: u64) -> impl Fn() + Clone + Send + Sync + 'static {
        let path = self.partitions.then(|| Path::new("/run/netns").join(self.namespace(id)));
        move || {
            let Some(path) = &path else { return };
            let namespace = fs::File::open(path).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        }
    }

    /// Cuts a host off from the other hosts and from callers, or ends that.
    pub fn isolate(&self, id: u64, cut: bool) {
        let state = if cut { "down" } else { "up" };
        ip(&["-n", &self.namespace(0), "link", "set", &format!("h{id}"), state]).unwrap();
    }

    /// Cuts two hosts off from each other, or ends that; callers reach both.
    pub fn cut(&self, one: u64, other: u64, cut: bool) {
        for (here, there) in [(one, other), (other, one)] {
            let (namespace, address) = (self.namespace(here), address(there));
            let entry: &[&str] = match cut {
                true => &[
                    "-n",
                    &namespace,
                    "neigh",
                    "replace",
                    &address,
                    "lladdr",
                    NOBODY,
                    "dev",
                    "eth0",
                    "nud",
                    "permanent",
                ],
                false => &["-n", &namespace, "neigh", "delete", &address, "dev", "eth0"],
            };
            ip(entry).unwrap();
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if self.partitions {
            (0..=self.hosts).for_each(|id| drop(ip(&["netns", "delete", &self.namespace(id)])));
        }
        if std::env::var_os(KEEP).is_some() {
            let kept = std::env::temp_dir().join(format!("kept-{}", self.name));
            let _ = fs::rename(&self.dir, &kept);
            crate::say(&format!("what the processes left is in {}", kept.display()));
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn address(id: u64) -> String {
    format!("10.99.0.{id}")
}

fn ip(args: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(args).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)))),
    }
}

/// Whether a name is one that a process gave which is dead.
fn is_left_over(name: &str) -> bool {
    let id = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).filter(|id| id.parse::<u32>().is_ok());
    id.is_some_and(|id| !Path::new("/proc").join(id).exists())
}

/// Whether a path is in the directory of such a run.
fn is_below_left_over(path: &Path) -> bool {
    let below = path.strip_prefix(std::env::temp_dir()).ok();
    below.and_then(|path| path.iter().next()?.to_str()).is_some_and(is_left_over)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// Ends and removes what runs have left whose processes are dead: killed, as tests that take too long are.
fn sweep() {
    for name in names(Path::new("/proc")) {
        let Some(pid) = name.parse().ok().and_then(Pid::from_raw) else { continue };
        let of_process = Path::new("/proc").join(&name);
        let command = fs::read(of_process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        let directory = fs::read_link(of_process.join("cwd")).unwrap_or_default();
        if command.split('\0').map(Path::new).chain([directory.as_path()]).any(is_below_left_over) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    for name in names(Path::new("/run/netns")).iter().filter(|name| is_left_over(name)) {
        let _ = ip(&["netns", "delete", name]);
    }
    for name in names(&std::env::temp_dir()).iter().filter(|name| is_left_over(name)) {
        let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
    }
}

#[test]
fn only_names_of_dead_processes_are_left_over() {
    let alive = format!("{PREFIX}{}-0", std::process::id());
    assert!(!is_left_over(&alive));
    // Beyond the largest process id.
    assert!(is_left_over(&format!("{PREFIX}4294967295-0")));
    assert!(!is_left_over("blixard-chaos-x-0") && !is_left_over("somebody-4294967295-0"));
}
