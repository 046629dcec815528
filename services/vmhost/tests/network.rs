//! Guests on a node's network, in a namespace of their own: who reaches whom, what may be sent, and what is left when vmhost dies.
//!
//! ```text
//!   namespace of the node: vmhost, its bridge, TAPs ── bridge 10.99.0.254 ── namespace outside: 10.99.0.1 and 1.2.3.4
//! ```
//! The guests are raw frames on TAPs (`support::frames`): fast, and they lie as they like. What must not arrive is followed on the same way by
//! something that must: when that is there, the other is not late but gone. It takes root, iproute2, nftables and /dev/net/tun; without
//! them the tests say SKIPPED, and fail instead with `BLIXARD_REQUIRE_NETWORK=1`.

mod support;

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use blixard::{
    config::DriverChoice,
    egress::Egress,
    error::{Error, Reason},
    id::VmId,
    pb::{common::v1 as common, vmhost::v1 as pb},
    vm::VmState,
};
use blixard_chaos_kit::{Network, run_in};
use blixard_vmhost::hypervisor::choose;
use support::{Node, World, frames::Guest, frames::mac, passing::Passing, vm_config, wait_for};

const PUBLIC: Ipv4Addr = Ipv4Addr::new(1, 2, 3, 4);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The node's own address outside.
const NODE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 180, 0, 1);
const PORTS: [u16; 2] = [53, 7000];

/// What arrived outside: payloads, with where they were sent and whom they seemed to be from.
type Arrived = Arc<Mutex<Vec<(String, Ipv4Addr, IpAddr)>>>;

struct Bed {
    world: World,
    arrived: Arrived,
}

/// Runs a test in the node's namespace, if there can be one.
fn bed<F: Future<Output = ()>>(subnet: &'static str, test: impl FnOnce(Bed) -> F + Send) {
    bed_with(subnet, |_| (), test);
}

/// The same; `prepare` adds to what is outside.
fn bed_with<F: Future<Output = ()>>(
    subnet: &'static str,
    prepare: impl FnOnce(&Network),
    test: impl FnOnce(Bed) -> F + Send,
) {
    let network = Network::new(1);
    let lacks = [
        (!network.partitions).then_some("namespaces"),
        (!Path::new("/dev/net/tun").exists()).then_some("/dev/net/tun"),
        (Command::new("nft").arg("--version").output().is_err()).then_some("nft"),
    ];
    let lacks: Vec<&str> = lacks.into_iter().flatten().collect();
    if !lacks.is_empty() {
        let required = std::env::var_os("BLIXARD_REQUIRE_NETWORK").is_some_and(|value| value == "1");
        assert!(!required, "BLIXARD_REQUIRE_NETWORK=1, but there is no {}", lacks.join(", "));
        eprintln!("SKIPPED: no network of guests is tried: there is no {}", lacks.join(", "));
        return;
    }
    ip(&network, 1, &format!("address add {PUBLIC}/32 dev lo"));
    ip(&network, 0, &format!("route add {PUBLIC}/32 via {PRIVATE}"));
    prepare(&network);
    let arrived = Arrived::default();
    for address in [PUBLIC, PRIVATE] {
        PORTS.into_iter().for_each(|port| echo(network.entry_of(1), address, port, Arc::clone(&arrived)));
    }
    run_in(&network, move || async move {
        let mut world = World::new().await;
        world.network.subnet = subnet.parse().ok();
        test(Bed { world, arrived }).await;
    });
}

fn ip(network: &Network, id: u64, line: &str) {
    let done = network.command(id, Path::new("ip")).args(line.split(' ')).status();
    assert!(done.expect("ip runs").success(), "ip {line}");
}

/// Says welcome to everybody who connects, over TCP.
fn welcome(enter: impl Fn() + Send + 'static, address: IpAddr) {
    let (bound, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        enter();
        let listener = TcpListener::bind((address, 7001)).expect("a free port");
        bound.send(()).expect("waited for");
        listener.incoming().flatten().for_each(|mut stream| drop(stream.write_all(b"welcome\n")));
    });
    ready.recv().expect("it is bound");
}

/// Answers everybody who asks there, and remembers it. Ends with the test.
fn echo(enter: impl Fn() + Send + 'static, address: Ipv4Addr, port: u16, arrived: Arrived) {
    let (bound, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        enter();
        let socket = UdpSocket::bind((address, port)).expect("a free port");
        bound.send(()).expect("waited for");
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let payload = String::from_utf8_lossy(&buffer[..length]).into_owned();
            arrived.lock().expect("whole").push((payload, address, from.ip()));
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    ready.recv().expect("it is bound");
}

impl Bed {
    async fn node(&self) -> Node {
        let process = choose(DriverChoice::Process, &self.world.settings()).expect("an agent").0;
        self.world.node_with(Arc::new(Passing { takes_devices: true, ..Passing::new(process) })).await
    }

    async fn try_start(&self, node: &Node, id: VmId, egress: &str) -> Result<(), Error> {
        self.world.record_vm(id, common::VmKind::Service, VmState::Starting);
        let egress: Egress = egress.parse().expect("a policy");
        let config = common::VmConfig {
            egress: Some(egress.into()),
            memory_mib: Some(256),
            ..vm_config(common::VmKind::Service)
        };
        let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(config) };
        node.client.clone().start_vm(request).await.map(drop).map_err(Error::from)
    }

    async fn start(&self, node: &Node, egress: &str) -> VmId {
        let id = VmId::random();
        self.try_start(node, id, egress).await.expect("accepted");
        self.world.wait_vm(id, VmState::Ready).await;
        id
    }

    async fn wait_booted(&self, vm: VmId) {
        let since = Instant::now();
        loop {
            let seen = self.world.registry.state().vms.get(&vm.to_string()).cloned().expect("recorded");
            match seen.state() {
                common::VmState::Starting => assert!(since.elapsed() < BOOT, "not booted within {BOOT:?}"),
                common::VmState::Ready => return,
                other => panic!("{other:?}: {}", seen.reason),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn wait_for_template(&self) {
        let dir = self.world.vm_state_dir().join(".templates");
        wait_for("a template", || {
            let entries: Vec<_> = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|at| at.path()).collect();
            let whole = |path: &std::path::PathBuf| path.extension().is_none() && path.join("template.json").exists();
            if entries.len() == 1 && entries.iter().all(whole) { Ok(()) } else { Err(format!("{entries:?}")) }
        })
        .await;
    }

    /// What a job printed.
    async fn job(&self, node: &Node, vm: VmId, script: &str) -> String {
        let job = self.world.run(node, vm, support::shell(script)).await;
        self.world.wait_job(job).await;
        String::from_utf8(node.follow(job, 0).await.stdout).expect("text")
    }

    /// What takes the place of a VM's guest; the way outside is open for it.
    async fn guest(&self, node: &Node, vm: VmId) -> Guest {
        let address = address(node, vm).await.expect("it has one");
        let mut guest = Guest::attach(&tap(address), address, GATEWAY);
        // The kernel takes a moment to see that somebody is at the TAP, and loses what is sent before.
        guest.converse(guest.packet(PUBLIC, 7000), "hello");
        guest
    }

    /// Whether it is there, of all that was on its way by now.
    fn arrived(&self, payload: &str) -> bool {
        let socket = UdpSocket::bind((NODE, 0)).expect("a free port");
        socket.set_read_timeout(Some(support::SOON)).expect("set");
        for (address, port) in [PUBLIC, PRIVATE].into_iter().flat_map(|address| PORTS.map(|port| (address, port))) {
            socket.send_to(b"the last", (address, port)).expect("sent");
            socket.recv(&mut [0; 64]).expect("answered");
        }
        self.arrived.lock().expect("whole").iter().any(|(other, ..)| other == payload)
    }
}

async fn address(node: &Node, vm: VmId) -> Option<Ipv4Addr> {
    let hosted = node.hosted().await.into_iter().find(|hosted| hosted.vm_id == vm.to_string())?;
    Some(hosted.addresses.first()?.parse().expect("an address"))
}

/// The interfaces of this namespace; sysfs shows those of another.
fn links() -> Vec<String> {
    let listed = Command::new("ip").args(["-o", "link"]).output().expect("ip runs").stdout;
    let listed = String::from_utf8(listed).expect("text");
    let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
    listed.lines().filter_map(name).collect()
}

fn taps() -> Vec<String> {
    links().into_iter().filter(|name| name.starts_with("blx") && name.contains('-')).collect()
}

fn tap(address: Ipv4Addr) -> String {
    let [.., high, low] = address.octets();
    let index = format!("-{:x}", u16::from_be_bytes([high, low]) & 0xfff);
    taps().into_iter().find(|name| name.ends_with(&index)).expect("it has a TAP")
}

fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().expect("a program")).args(words).output().expect("it runs");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn a_policy_says_whom_a_guest_reaches() {
    bed("10.180.0.0/24", |bed| async move {
        let node = bed.node().await;
        let internet = bed.start(&node, "internet").await;
        let listed = bed.start(&node, "allow=10.99.0.1:53,1.2.3.4:7000").await;
        let none = bed.start(&node, "none").await;

        let mut guest = bed.guest(&node, internet).await;
        for (to, port, what) in [(PRIVATE, 7000, "private"), (NODE, 7000, "node"), (GATEWAY, 53, "gateway")] {
            guest.send(guest.packet(to, port), what);
        }
        guest.converse(guest.packet(PUBLIC, 7000), "public");
        assert!(!bed.arrived("private"));

        let mut guest = bed.guest(&node, listed).await;
        for (to, port) in [(PRIVATE, 7000), (PUBLIC, 53)] {
            guest.send(guest.packet(to, port), "not listed");
        }
        guest.converse(guest.packet(PRIVATE, 53), "listed");
        guest.converse(guest.packet(PUBLIC, 7000), "listed too");
        assert!(!bed.arrived("not listed"));
        // By NAT: all of them seem to be the node.
        let sources: Vec<IpAddr> = bed.arrived.lock().expect("whole").iter().map(|(.., from)| *from).collect();
        assert!(sources.iter().all(|from| *from == IpAddr::V4(NODE)), "{sources:?}");

        assert_eq!((address(&node, none).await, taps().len()), (None, 2));
    });
}

#[test]
fn what_goes_through_an_interface_is_counted_as_its_guest_sees_it() {
    bed("10.180.0.0/24", |bed| async move {
        let node = bed.node().await;
        let (vm, none) = (bed.start(&node, "internet").await, bed.start(&node, "none").await);
        let network = async |vm| node.usage(vm).await.expect("it is here").network;
        let mut guest = bed.guest(&node, vm).await;
        let before = network(vm).await.expect("it has one");
        assert!(before.received_packets > 0, "it was answered: {before:?}");
        // Forbidden: they come as far as the bridge.
        for _ in 0..100 {
            guest.send(guest.packet(PRIVATE, 7000), &"x".repeat(1000));
        }
        let after = network(vm).await.expect("it has one");
        assert_eq!(after.sent_packets - before.sent_packets, 100);
        assert_eq!(after.sent_bytes - before.sent_bytes, 100 * (14 + 20 + 8 + 1000));
        assert!(after.received_bytes - before.received_bytes < 50 * 1000, "nobody sent it much: {before:?}; {after:?}");
        guest.converse(guest.packet(PUBLIC, 7000), "hello");
        assert!(network(vm).await.expect("it has one").received_packets > after.received_packets);
        assert_eq!(network(none).await, None);
    });
}

/// Whoever listens on the node itself hears nothing from a guest.
#[test]
fn a_guest_does_not_reach_its_host() {
    bed("10.180.0.0/24", |bed| async move {
        let node = bed.node().await;
        let vm = bed.start(&node, "allow=10.0.0.0/8,1.2.3.4").await;
        let heard = Arrived::default();
        for address in [NODE, GATEWAY] {
            echo(|| (), address, 7000, Arc::clone(&heard));
        }
        let mut guest = bed.guest(&node, vm).await;
        guest.send(guest.packet(NODE, 7000), "node");
        guest.send(guest.packet(GATEWAY, 7000), "gateway");
        guest.converse(guest.packet(PUBLIC, 7000), "marker");
        assert!(heard.lock().expect("whole").is_empty());
    });
}

#[test]
fn what_bears_the_address_of_another_is_dropped() {
    bed("10.180.0.0/24", |bed| async move {
        let node = bed.node().await;
        let (vm, other) = (bed.start(&node, "internet").await, bed.start(&node, "internet").await);
        let others = address(&node, other).await.expect("it has one");
        let mut guest = bed.guest(&node, vm).await;
        let honest = guest.packet(PUBLIC, 7000);
        let lies = [
            support::frames::Packet { from: others, ..honest },
            support::frames::Packet { from: NODE, ..honest },
            support::frames::Packet { from_mac: mac(others), ..honest },
            support::frames::Packet { from_mac: mac(others), from: others, ..honest },
        ];
        lies.into_iter().for_each(|lie| guest.send(lie, "a lie"));
        // That the other's address is here, that the gateway's is, and that its own address is somewhere else.
        let own = guest.mac;
        guest.claim(own, own, others);
        guest.claim(own, own, GATEWAY);
        guest.claim(own, mac(others), others);
        guest.claim(mac(others), mac(others), guest.address);
        guest.converse(honest, "the truth");
        assert!(!bed.arrived("a lie"));
        let neighbours = run("ip neigh show to 10.180.0.0/24");
        assert_eq!(neighbours.lines().filter(|line| line.contains("lladdr")).count(), 1, "{neighbours}");
        assert!(neighbours.starts_with(&format!("{} ", guest.address)), "{neighbours}");
    });
}

#[test]
fn two_guests_do_not_reach_each_other() {
    bed("10.180.0.0/24", |bed| async move {
        // Where it is loaded, br_netfilter shows bridged packets to the forward chain, which drops them too: it is to be the bridge.
        let _ = std::fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        let node = bed.node().await;
        let (one, two) = (bed.start(&node, "internet").await, bed.start(&node, "allow=10.0.0.0/8,1.2.3.4").await);
        let (mut one, mut two) = (bed.guest(&node, one).await, bed.guest(&node, two).await);
        for to_mac in [one.mac, [0xff; 6], mac(GATEWAY)] {
            let packet = support::frames::Packet { to_mac, ..two.packet(one.address, 7000) };
            two.send(packet, "hello neighbour");
        }
        two.converse(two.packet(PUBLIC, 7000), "marker");
        let got = one.converse(one.packet(PUBLIC, 7000), "the end");
        assert!(!got.iter().any(|frame| frame.ends_with(b"hello neighbour")));
    });
}

#[test]
fn addresses_return_and_none_is_left() {
    bed("10.180.0.0/29", |bed| async move {
        let node = bed.node().await;
        let mut vms = BTreeMap::new();
        for _ in 0..5 {
            let vm = bed.start(&node, "internet").await;
            assert!(vms.insert(address(&node, vm).await.expect("it has one"), vm).is_none());
        }
        let refused = bed.try_start(&node, VmId::random(), "internet").await.expect_err("all are taken");
        assert_eq!(refused.reason, Reason::Overloaded);
        assert!(refused.message.contains("10.180.0.0/29"), "{}", refused.message);
        bed.start(&node, "none").await;

        let (given_back, vm) = vms.pop_first().expect("five");
        node.stop_vm(vm, Some(0)).await.expect("stopped");
        wait_for("its TAP to be gone", || if taps().len() == 4 { Ok(()) } else { Err(taps().join(" ")) }).await;
        let vm = VmId::random();
        let since = Instant::now();
        while let Err(error) = bed.try_start(&node, vm, "internet").await {
            assert!(error.reason == Reason::Overloaded && since.elapsed() < support::SOON, "{error}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bed.world.wait_vm(vm, VmState::Ready).await;
        assert_eq!(address(&node, vm).await, Some(given_back));

        for hosted in node.hosted().await {
            node.stop_vm(hosted.vm_id.parse().expect("an id"), Some(0)).await.expect("stopped");
        }
        bed.world.assert_nothing_left().await;
        assert_eq!(taps(), Vec::<String>::new());
    });
}

#[test]
fn a_network_outlives_vmhost_and_is_put_back_when_it_is_flushed() {
    bed("10.180.0.0/24", |bed| async move {
        let node = bed.node().await;
        let vm = bed.start(&node, "internet").await;
        let before = address(&node, vm).await;
        let mut guest = bed.guest(&node, vm).await;
        guest.converse(guest.packet(PUBLIC, 7000), "before");
        node.crash().await;
        guest.converse(guest.packet(PUBLIC, 7000), "while it is gone");
        // Somebody's who has a name like ours, and ours that nobody owns.
        let ours = tap(guest.address).rsplit_once('-').map(|(prefix, _)| format!("{prefix}-77")).expect("a prefix");
        for name in ["blx000000-2", "tap0", &ours] {
            run(&format!("ip tuntap add {name} mode tap"));
        }

        let node = bed.node().await;
        assert_eq!(address(&node, vm).await, before);
        guest.converse(guest.packet(PUBLIC, 7000), "after");
        guest.send(guest.packet(PRIVATE, 7000), "private");
        let left = links();
        assert!(!left.contains(&ours) && left.contains(&"blx000000-2".to_owned()) && left.contains(&"tap0".to_owned()));
        // Another one gets another address, though this vmhost never gave the first.
        let other = bed.start(&node, "internet").await;
        assert_ne!(address(&node, other).await, before);

        run("nft flush ruleset");
        wait_for("the rules to be back", || {
            let tables = run("nft list tables");
            if tables.matches("blixard_").count() == 2 { Ok(()) } else { Err(tables) }
        })
        .await;
        guest.converse(guest.packet(PUBLIC, 7000), "after the flush");
        assert!(!bed.arrived("private"));
    });
}

#[test]
fn a_network_that_is_switched_off_is_taken_away_when_nobody_has_it_any_more() {
    bed("10.180.0.0/24", |mut bed| async move {
        let node = bed.node().await;
        let vm = bed.start(&node, "internet").await;
        node.crash().await;
        bed.world.network.subnet = None;
        let ours = |links: Vec<String>| links.iter().filter(|name| name.starts_with("blx")).count();

        let node = bed.node().await;
        assert_eq!(ours(links()), 2, "an adopted VM keeps its own");
        node.stop_vm(vm, Some(0)).await.expect("stopped");
        bed.world.assert_nothing_left().await;
        node.crash().await;

        let _node = bed.node().await;
        assert_eq!((ours(links()), run("nft list tables").as_str()), (0, ""));
    });
}

/// vmhost dies at whatever moment of a VM's start or end.
#[test]
fn a_kill_at_any_moment_leaves_nothing() {
    bed("10.180.0.0/24", |bed| async move {
        for pause_us in (0..24).map(|turn| turn * 1500) {
            let node = bed.node().await;
            let vm = VmId::random();
            bed.try_start(&node, vm, "internet").await.expect("accepted");
            if pause_us % 2000 == 0 {
                bed.world.wait_vm(vm, VmState::Ready).await;
                node.stop_vm(vm, Some(0)).await.expect("stopped");
            }
            // Not a wait for anything: the moments are what is tried.
            tokio::time::sleep(Duration::from_micros(pause_us)).await;
            node.crash().await;
        }
        let node = bed.node().await;
        assert_eq!(node.differences().await, []);
        for hosted in node.hosted().await {
            node.stop_vm(hosted.vm_id.parse().expect("an id"), Some(0)).await.expect("stopped");
        }
        bed.world.assert_nothing_left().await;
        assert_eq!(node.differences().await, []);
        assert_eq!(taps(), Vec::<String>::new());
        assert_eq!(run("nft list tables").matches("blixard_").count(), 2);
    });
}

const PUBLIC6: Ipv6Addr = Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 1);
/// For a guest under emulation on a loaded machine.
const BOOT: Duration = Duration::from_secs(240);

/// The whole way: a job in a real guest, over virtio-net, TAP, bridge and NAT, to somebody who listens in another namespace.
#[test]
fn a_job_in_a_real_guest_reaches_what_its_policy_allows() {
    let Some(driver) = support::qemu() else { return };
    let prepare = |network: &Network| {
        ip(network, 1, "address add fd99::1/64 dev eth0 nodad");
        ip(network, 1, &format!("address add {PUBLIC6}/128 dev lo nodad"));
        ip(network, 0, "address add fd99::254/64 dev bridge nodad");
        ip(network, 0, &format!("route add {PUBLIC6}/128 via fd99::1"));
        for address in [PUBLIC.into(), PRIVATE.into(), PUBLIC6.into()] {
            welcome(network.entry_of(1), address);
        }
    };
    bed_with("10.180.0.0/24", prepare, |mut bed| async move {
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").expect("a namespace of our own");
        bed.world.network.subnet6 = "fd00:180::/64".parse().ok();
        bed.world.network.mtu = 1400;
        bed.world.templates = 1;
        let node = bed.world.node_with(Arc::clone(&driver)).await;
        let mut vms = Vec::new();
        for egress in ["internet", "allow=10.99.0.1:7001", "none"] {
            let vm = VmId::random();
            bed.try_start(&node, vm, egress).await.expect("accepted");
            vms.push(vm);
        }
        for vm in &vms {
            bed.wait_booted(*vm).await;
        }
        let reach =
            "for to in 1.2.3.4 10.99.0.1 2600::1; do echo $to: $(nc -w 3 $to 7001 < /dev/null 2> /dev/null); done";
        assert_eq!(bed.job(&node, vms[0], reach).await, "1.2.3.4: welcome\n10.99.0.1:\n2600::1: welcome\n");
        assert_eq!(bed.job(&node, vms[1], reach).await, "1.2.3.4:\n10.99.0.1: welcome\n2600::1:\n");
        assert_eq!(bed.job(&node, vms[2], reach).await, "1.2.3.4:\n10.99.0.1:\n2600::1:\n");
        let seen = "cat /etc/resolv.conf /sys/class/net/eth0/mtu; ls /sys/class/net";
        assert_eq!(bed.job(&node, vms[0], seen).await, "nameserver 1.1.1.1\nnameserver 9.9.9.9\n1400\neth0\nlo\n");
        assert_eq!(bed.job(&node, vms[2], "ls /sys/class/net").await, "lo\n");

        // The same for one that is restored: its interface was not there when its template was saved.
        bed.wait_for_template().await;
        let restored = VmId::random();
        bed.try_start(&node, restored, "internet").await.expect("accepted");
        bed.wait_booted(restored).await;
        let lines = bed.world.processes().into_iter().map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")));
        let lines = lines.flatten().filter(|line| String::from_utf8_lossy(line).contains("\0-incoming\0"));
        assert_eq!(lines.count(), 1, "it was booted");
        assert_eq!(bed.job(&node, restored, reach).await, "1.2.3.4: welcome\n10.99.0.1:\n2600::1: welcome\n");
        assert_eq!(bed.job(&node, restored, seen).await, bed.job(&node, vms[0], seen).await);
        vms.push(restored);

        node.crash().await;
        let node = bed.world.node_with(driver).await;
        assert_eq!(node.hosted().await.len(), 4);
        for (vm, has) in vms.iter().zip([true, true, false, true]) {
            let network = node.usage(*vm).await.expect("it is here").network;
            assert_eq!(network.is_some_and(|network| network.sent_packets.min(network.received_packets) > 0), has);
        }
        assert_eq!(bed.job(&node, restored, reach).await, "1.2.3.4: welcome\n10.99.0.1:\n2600::1: welcome\n");
        assert_eq!(bed.job(&node, vms[0], reach).await, "1.2.3.4: welcome\n10.99.0.1:\n2600::1: welcome\n");
        for vm in vms {
            node.stop_vm(vm, Some(0)).await.expect("stopped");
        }
        bed.world.assert_nothing_left().await;
        assert_eq!(taps(), Vec::<String>::new());
    });
}

#[test]
fn a_node_without_a_network_refuses_who_asks_for_one() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut bed = Bed { arrived: Arrived::default(), world: World::new().await };
        let node = bed.node().await;
        let refused = bed.try_start(&node, VmId::random(), "internet").await.expect_err("refused");
        assert_eq!((refused.reason, refused.metadata["field"].as_str()), (Reason::ExceedsCapacity, "config.egress"));
        assert!(refused.message.contains("network.subnet is not set"), "{}", refused.message);
        node.shut_down().await;

        // The process driver has none to give, whatever is set.
        bed.world.network.subnet = "10.180.0.0/24".parse().ok();
        let node = bed.world.node().await;
        let refused = bed.try_start(&node, VmId::random(), "internet").await.expect_err("refused");
        assert!(refused.message.contains("the driver \"process\" has no network to give"), "{}", refused.message);
    });
}
