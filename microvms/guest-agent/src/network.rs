//! The guest's network interface: its addresses, routes and resolvers, as the host says.
//!
//! Over netlink, in a few messages of our own: the guest's image has no program for it, and a library for all of netlink would be a
//! good part of the agent's size.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, invalid},
    pb::guest::v1 as pb,
};
use ipnet::IpNet;
use rustix::{
    fd::OwnedFd,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

use crate::boot;

const INTERFACES: &str = "/sys/class/net";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Linux' least (RFC 791) and most.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;
/// How long the interface may take to appear: milliseconds, and the rest for a loaded host.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);
/// The loopback interface's index.
const LOOPBACK: u32 = 1;

/// A checked network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    mac: String,
    /// With the length of their network's prefix.
    addresses: Vec<IpNet>,
    gateways: Vec<IpAddr>,
    mtu: u32,
    resolvers: Vec<IpAddr>,
}

impl Network {
    /// Checks every field.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub(crate) fn parse(network: pb::GuestNetwork) -> Result<Self, Error> {
        let addresses = |field: &str, list: &[String]| {
            let parse = |(at, text): (usize, &String)| {
                text.parse().map_err(|_| invalid(&format!("network.{field}[{at}]"), text, "an IP address"))
            };
            list.iter().enumerate().map(parse).collect::<Result<Vec<IpAddr>, _>>()
        };
        if !MTU.contains(&network.mtu) {
            return Err(invalid("network.mtu", network.mtu, &format!("{} to {}", MTU.start(), MTU.end())));
        }
        let net = |(at, text): (usize, &String)| {
            let allowed = "an IP address and its network's prefix, such as 10.1.0.5/16";
            text.parse().map_err(|_| invalid(&format!("network.addresses[{at}]"), text, allowed))
        };
        Ok(Self {
            gateways: addresses("gateways", &network.gateways)?,
            resolvers: addresses("resolvers", &network.resolvers)?,
            addresses: network.addresses.iter().enumerate().map(net).collect::<Result<_, _>>()?,
            mtu: network.mtu,
            mac: network.mac,
        })
    }

    /// Makes the interface so. Again changes nothing.
    pub(crate) fn apply(&self) -> io::Result<()> {
        let (name, index) = find_soon(Path::new(INTERFACES), &self.mac)?;
        // Nobody else can have these addresses, and nobody but the host says what the routes are.
        for (setting, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
            let _ = fs::write(Path::new("/proc/sys/net/ipv6/conf").join(&name).join(setting), value);
        }
        let netlink = Netlink::open()?;
        netlink.link_up(index, Some(self.mtu))?;
        for address in &self.addresses {
            netlink.add_address(index, address)?;
        }
        for gateway in &self.gateways {
            netlink.add_default_route(index, *gateway)?;
        }
        if self.resolvers.is_empty() { Ok(()) } else { fs::write(RESOLV_CONF, resolv_conf(&self.resolvers)) }
    }
}

/// Waits for the interface: a guest that was restored has got it a moment ago.
fn find_soon(interfaces: &Path, mac: &str) -> io::Result<(String, u32)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match find(interfaces, mac) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                boot::look_for_devices();
                std::thread::sleep(LOOK_AGAIN_AFTER);
            }
            result => return result,
        }
    }
}

/// The name and index of the interface with this hardware address.
fn find(interfaces: &Path, mac: &str) -> io::Result<(String, u32)> {
    let read = |dir: &PathBuf, file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default().trim().to_owned();
    let dirs: Vec<PathBuf> = fs::read_dir(interfaces)?.flatten().map(|entry| entry.path()).collect();
    let dir = dirs.iter().find(|dir| read(dir, "address").eq_ignore_ascii_case(mac));
    let dir =
        dir.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface has the address {mac}")))?;
    let index = read(dir, "ifindex").parse().map_err(io::Error::other)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, index))
}

fn resolv_conf(resolvers: &[IpAddr]) -> String {
    resolvers.iter().map(|resolver| format!("nameserver {resolver}\n")).collect()
}

/// Brings up the loopback interface.
pub(crate) fn loopback_up() -> io::Result<()> {
    Netlink::open()?.link_up(LOOPBACK, None)
}

/// A socket to the kernel's routing.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?))
    }

    /// `ip link set INDEX up mtu MTU`
    fn link_up(&self, index: u32, mtu: Option<u32>) -> io::Result<()> {
        const RTM_NEWLINK: u16 = 16;
        const IFLA_MTU: u16 = 4;
        const IFF_UP: u32 = 1;
        // struct ifinfomsg: family, padding and device type, index, flags, which of them to change.
        let mut body = [0_u32, index, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat();
        if let Some(mtu) = mtu {
            attribute(&mut body, IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.ask(RTM_NEWLINK, 0, &body)
    }

    /// `ip address replace ADDRESS/PREFIX dev INDEX nodad`
    fn add_address(&self, index: u32, address: &IpNet) -> io::Result<()> {
        const RTM_NEWADDR: u16 = 20;
        const IFA_ADDRESS: u16 = 1;
        const IFA_LOCAL: u16 = 2;
        const IFA_F_NODAD: u8 = 2;
        // struct ifaddrmsg: family, prefix, flags, scope (global), index.
        let mut body = vec![family(address.addr()), address.prefix_len(), IFA_F_NODAD, 0];
        body.extend(index.to_ne_bytes());
        let bytes = octets(address.addr());
        attribute(&mut body, IFA_LOCAL, &bytes);
        attribute(&mut body, IFA_ADDRESS, &bytes);
        self.ask(RTM_NEWADDR, CREATE | REPLACE, &body)
    }

    /// `ip route replace default via GATEWAY dev INDEX`
    fn add_default_route(&self, index: u32, gateway: IpAddr) -> io::Result<()> {
        const RTM_NEWROUTE: u16 = 24;
        const RTA_OIF: u16 = 4;
        const RTA_GATEWAY: u16 = 5;
        const RT_TABLE_MAIN: u8 = 254;
        const RTPROT_STATIC: u8 = 4;
        const RTN_UNICAST: u8 = 1;
        // struct rtmsg: family, destination's prefix, source's, type of service, table, protocol, scope (universe), type, flags.
        let mut body = vec![family(gateway), 0, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, 0, 0, 0, 0];
        attribute(&mut body, RTA_OIF, &index.to_ne_bytes());
        attribute(&mut body, RTA_GATEWAY, &octets(gateway));
        self.ask(RTM_NEWROUTE, CREATE | REPLACE, &body)
    }

    /// Sends a message and waits for the kernel's verdict.
    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        send(&self.0, &message(kind, flags, body), SendFlags::empty())?;
        let mut answer = [0_u8; 4096];
        let (length, _) = recv(&self.0, &mut answer[..], RecvFlags::empty())?;
        verdict(&answer[..length])
    }
}

const CREATE: u16 = 0x400;
const REPLACE: u16 = 0x100;
/// Length of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const NLM_F_ACK: u16 = 4;
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    message.extend([0; 8]); // sequence number, port
    message.extend(body);
    message
}

/// Appends an attribute: its length, what it is, its value, and padding to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// `struct nlmsgerr` begins with the negative error, or 0.
fn verdict(answer: &[u8]) -> io::Result<()> {
    const NLMSG_ERROR: u16 = 2;
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let error = answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|bytes| bytes.try_into().ok());
    match error.map(i32::from_ne_bytes).filter(|_| kind == Some(NLMSG_ERROR)) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("the kernel's answer makes no sense")),
    }
}

/// `AF_INET` or `AF_INET6`.
fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 2,
        IpAddr::V6(_) => 10,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(change: impl FnOnce(&mut pb::GuestNetwork)) -> Result<Network, Error> {
        let mut network = pb::GuestNetwork {
            mac: "02:62:0a:b4:00:05".into(),
            addresses: vec!["10.180.0.5/24".into(), "fd00::5/64".into()],
            gateways: vec!["10.180.0.1".into(), "fd00::1".into()],
            mtu: 1500,
            resolvers: vec!["1.1.1.1".into()],
        };
        change(&mut network);
        Network::parse(network)
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        network(|_| {}).expect("valid");
        type Change = fn(&mut pb::GuestNetwork);
        let cases: &[(&str, Change)] = &[
            ("network.addresses[1]", |n| n.addresses[1] = "fd00::5/129".into()),
            ("network.gateways[0]", |n| n.gateways[0] = "10.180.0.1/24".into()),
            ("network.mtu", |n| n.mtu = 0),
            ("network.resolvers[0]", |n| n.resolvers[0] = "one.one.one.one".into()),
        ];
        for (field, change) in cases {
            let error = network(change).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(*field), "{error}");
        }
    }

    #[test]
    fn an_interface_is_found_by_its_address() {
        let root = tempfile::tempdir().expect("tempdir");
        for (name, mac, index) in [("lo", "00:00:00:00:00:00\n", "1\n"), ("eth0", "02:62:0a:b4:00:05\n", "7\n")] {
            fs::create_dir(root.path().join(name)).expect("mkdir");
            fs::write(root.path().join(name).join("address"), mac).expect("writes");
            fs::write(root.path().join(name).join("ifindex"), index).expect("writes");
        }
        assert_eq!(find(root.path(), "02:62:0A:B4:00:05").expect("found"), ("eth0".to_owned(), 7));
        let error = find(root.path(), "02:00:00:00:00:01").expect_err("none").to_string();
        assert_eq!(error, "no interface has the address 02:00:00:00:00:01");
    }

    #[test]
    fn messages_are_laid_out_as_the_kernel_wants_them() {
        let mut body = Vec::new();
        attribute(&mut body, 3, &[1, 2, 3, 4, 5]);
        assert_eq!(body, [9, 0, 3, 0, 1, 2, 3, 4, 5, 0, 0, 0]);
        assert_eq!(message(24, CREATE, &body)[..8], [28, 0, 0, 0, 24, 0, 5, 4]);
        verdict(&message(2, 0, &0_i32.to_ne_bytes())).expect("an acknowledgement");
        let refused = verdict(&message(2, 0, &(-1_i32).to_ne_bytes())).expect_err("an error");
        assert_eq!(refused.raw_os_error(), Some(1));
        assert!(verdict(&[]).is_err());
    }

    #[test]
    fn the_kernel_itself_answers() {
        // Index 0 is no interface, whoever asks: ENODEV, or EPERM without rights.
        let error = Netlink::open().expect("opens").link_up(0x7fff_ffff, None).expect_err("no such interface");
        assert!(matches!(error.raw_os_error(), Some(19 | 1)), "{error}");
    }
}
