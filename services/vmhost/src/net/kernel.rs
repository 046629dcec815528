//! What is done in the kernel: bridge and TAPs over netlink, sysctls, and the ruleset through `nft`, which is the well-kept way to replace
//! one in a single transaction. Nothing is decided here.

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use blixard_chassis::Tasks;
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkUnspec,
    packet_route::link::{InfoBridgePort, LinkAttribute},
};
use rustix::thread::{CapabilitySet, capabilities, configure_capability_in_ambient_set, set_capabilities};

use super::plan::{Lease, Names, Plan};
use crate::hypervisor::create_tap;

/// Something that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct KernelError {
    action: String,
    source: Box<dyn Error + Send + Sync>,
}

fn cannot<E: Into<Box<dyn Error + Send + Sync>>>(action: impl Into<String>) -> impl FnOnce(E) -> KernelError {
    move |source| KernelError { action: action.into(), source: source.into() }
}

type Result<T> = std::result::Result<T, KernelError>;

/// The kernel's network, as this process sees it.
pub(super) struct Kernel {
    links: Handle,
    nft: PathBuf,
}

impl Kernel {
    pub(super) fn connect(nft: PathBuf, tasks: &Tasks) -> Result<Self> {
        let (connection, links, _) = rtnetlink::new_connection().map_err(cannot("open a netlink socket"))?;
        tasks.spawn_until_end("netlink", connection);
        Ok(Self { links, nft })
    }

    /// Whether what [`Kernel::apply`] made is there: a firewall's reload may take it away.
    pub(super) async fn has_tables(&self, names: &Names) -> Result<bool> {
        let tables = self.nft(&["list", "tables"], String::new()).await?;
        let has = |family: &str| tables.lines().any(|line| line == format!("table {family} {}", names.table()));
        Ok(has("bridge") && has("inet"))
    }

    /// Puts a ruleset in the place of the one before.
    pub(super) async fn apply(&self, rules: String) -> Result<()> {
        self.nft(&["-f", "-"], rules).await.map(drop)
    }

    async fn nft(&self, arguments: &'static [&'static str], input: String) -> Result<String> {
        let nft = self.nft.clone();
        // A thread of its own, whose rights can be raised and which ends with them.
        let run = move || thread::spawn(move || run_nft(&nft, arguments, input)).join();
        let done = tokio::task::spawn_blocking(run).await.map_err(io::Error::other);
        let done = done.and_then(|done| done.unwrap_or_else(|_| Err(io::Error::other("its thread panicked"))));
        done.map_err(cannot(format!("run nft {}", arguments.join(" "))))
    }

    /// Makes the bridge, or makes it as it should be: addresses, MTU, up.
    pub(super) async fn ensure_bridge(&self, plan: &Plan) -> Result<()> {
        let name = plan.names.bridge();
        if self.index(&name).await?.is_none() {
            // No spanning tree, and nothing to wait for: there is nobody to make a loop with.
            let bridge = LinkBridge::new(&name).forward_delay(0).mcast_snooping(false);
            let bridge = bridge.address(plan.gateway_mac().0.to_vec()).build();
            self.links.link().add(bridge).execute().await.map_err(cannot(format!("make the bridge {name}")))?;
        }
        let missing = || io::Error::other("it vanished");
        let index = self.index(&name).await?.ok_or_else(missing).map_err(cannot(format!("find the bridge {name}")))?;
        let v6 = Path::new("/proc/sys/net/ipv6/conf").join(&name);
        let off = if plan.subnet6.is_some() { "0" } else { "1" };
        write_sysctl(&v6.join("disable_ipv6"), off).or_else(absent)?;
        write_sysctl(&v6.join("accept_ra"), "0").or_else(absent)?;
        let wanted = LinkUnspec::new_with_index(index).mtu(plan.mtu).up().build();
        self.links.link().set(wanted).execute().await.map_err(cannot(format!("set up the bridge {name}")))?;
        self.set_addresses(plan, index).await
    }

    /// The bridge has the gateway's addresses, and none of an earlier subnet.
    async fn set_addresses(&self, plan: &Plan, index: u32) -> Result<()> {
        use rtnetlink::packet_route::address::AddressAttribute::Address;
        let mut wanted = vec![(plan.gateway().into(), plan.subnet.prefix_len())];
        wanted.extend(plan.gateway6().zip(plan.subnet6).map(|(gateway, net)| (gateway.into(), net.prefix_len())));
        let present = self.links.address().get().set_link_index_filter(index).execute();
        let present: Vec<_> = present.try_collect().await.map_err(cannot("list the bridge's addresses"))?;
        for message in present {
            let of = |attribute: &_| if let Address(address) = attribute { Some(*address) } else { None };
            let address: Option<std::net::IpAddr> = message.attributes.iter().find_map(of);
            let known = address.is_some_and(|address| wanted.contains(&(address, message.header.prefix_len)));
            let own = matches!(address, Some(std::net::IpAddr::V6(address)) if address.is_unicast_link_local());
            if !known && !own {
                self.links.address().del(message).execute().await.map_err(cannot("take an address from the bridge"))?;
            }
        }
        for (address, prefix) in wanted {
            let add = self.links.address().add(index, address, prefix).replace();
            add.execute().await.map_err(cannot(format!("give the bridge the address {address}/{prefix}")))?;
        }
        Ok(())
    }

    /// Makes a guest's TAP, a port of the bridge that reaches no other port. Up only when all of that is so.
    pub(super) async fn add_tap(&self, plan: &Plan, lease: &Lease) -> Result<()> {
        let name = &lease.tap;
        // An earlier vmhost may have been killed in the middle of this.
        self.delete(name).await?;
        let tap = name.clone();
        let made = tokio::task::spawn_blocking(move || create_tap(&tap)).await.map_err(io::Error::other);
        made.flatten().map_err(cannot(format!("make the TAP {name}")))?;
        self.make_port(plan, name).await.map_err(cannot(format!("make the TAP {name} a port")))
    }

    async fn make_port(&self, plan: &Plan, name: &str) -> std::result::Result<(), Box<dyn Error + Send + Sync>> {
        let (Some(index), Some(bridge)) = (self.index(name).await?, self.index(&plan.names.bridge()).await?) else {
            return Err("it or its bridge vanished".into());
        };
        // A TAP has no IPv6 of its own to speak with.
        write_sysctl(&Path::new("/proc/sys/net/ipv6/conf").join(name).join("disable_ipv6"), "1").or_else(absent)?;
        let port = LinkUnspec::new_with_index(index).mtu(plan.mtu).controller(bridge).build();
        self.links.link().set(port).execute().await?;
        let port = LinkBridgePort::new(index).append_info_data(InfoBridgePort::Isolated(true)).build();
        self.links.link().set_port(port).execute().await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        Ok(self.links.link().set(up).execute().await?)
    }

    /// Deletes an interface, if it is there.
    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        let Some(index) = self.index(name).await? else { return Ok(()) };
        match self.links.link().del(index).execute().await {
            Err(error) if is(&error, rustix::io::Errno::NODEV) => Ok(()),
            done => done.map_err(cannot(format!("delete the interface {name}"))),
        }
    }

    /// The names of all interfaces.
    pub(super) async fn names(&self) -> Result<Vec<String>> {
        let links: Vec<_> =
            self.links.link().get().execute().try_collect().await.map_err(cannot("list the interfaces"))?;
        let name = |attribute| if let LinkAttribute::IfName(name) = attribute { Some(name) } else { None };
        Ok(links.into_iter().filter_map(|link| link.attributes.into_iter().find_map(name)).collect())
    }

    async fn index(&self, name: &str) -> Result<Option<u32>> {
        match self.links.link().get().match_name(name.to_owned()).execute().try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if is(&error, rustix::io::Errno::NODEV) => Ok(None),
            Err(error) => Err(cannot(format!("look for the interface {name}"))(error)),
        }
    }
}

fn is(error: &rtnetlink::Error, errno: rustix::io::Errno) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno.raw_os_error())
}

/// A machine without IPv6 has none of its settings.
fn absent(error: KernelError) -> Result<()> {
    let missing = error.source.downcast_ref::<io::Error>().is_some_and(|io| io.kind() == io::ErrorKind::NotFound);
    if missing { Ok(()) } else { Err(error) }
}

fn write_sysctl(path: &Path, value: &str) -> Result<()> {
    // What is so already takes no right.
    match fs::read_to_string(path) {
        Ok(now) if now.trim() == value => Ok(()),
        _ => fs::write(path, value).map_err(cannot(format!("write {value} to {}", path.display()))),
    }
}

/// Lets this machine pass packets on, which it takes for guests to reach anybody. Says whether that is news.
pub(super) fn forward_ipv4() -> Result<bool> {
    const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
    let was_on = fs::read_to_string(FORWARD).is_ok_and(|now| now.trim() != "0");
    write_sysctl(Path::new(FORWARD), "1").map(|()| !was_on)
}

/// Whether it does so for IPv6. To switch that on has this machine ignore router advertisements: not ours to do.
pub(super) fn forwards_ipv6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").is_ok_and(|now| now.trim() != "0")
}

fn run_nft(nft: &Path, arguments: &[&str], input: String) -> io::Result<String> {
    hand_on_rights();
    let mut child = Command::new(nft)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    // Beside reading, or both could wait for each other.
    let writer =
        thread::spawn(move || stdin.map_or(Ok(()), |mut stdin| io::Write::write_all(&mut stdin, input.as_bytes())));
    let output = child.wait_with_output()?;
    let written = writer.join().unwrap_or_else(|_| Err(io::Error::other("its input could not be written")));
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{}: {}", output.status, said.trim())));
    }
    written.map(|()| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A vmhost that is not root has its right from its file (`setcap`), and a child would not inherit it. Only this thread's.
fn hand_on_rights() {
    // A right that can't be handed on is one that nft itself will complain about.
    if let Ok(mut sets) = capabilities(None)
        && sets.permitted.contains(CapabilitySet::NET_ADMIN)
    {
        sets.inheritable |= CapabilitySet::NET_ADMIN;
        let _ = set_capabilities(None, sets);
        let _ = configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, true);
    }
}
