//! What this node's network is called and who has which address in it: arithmetic on the settings, without any doing.
//!
//! Everything that is made in the kernel has a name that begins with this node's tag, so that two vmhosts on one machine never
//! take each other's for their own. A guest is a number, its index; its TAP's name and its addresses follow from that.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    path::Path,
    str::FromStr,
};

use blixard::{config::NetworkConfig, id::NodeId};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest as _, Sha256};

/// What the names of all our interfaces begin with. With tag, hyphen and index they have 14 of the kernel's 15 bytes at most.
const PREFIX: &str = "blx";
/// The gateway's index.
const GATEWAY: u32 = 1;

/// Tells vmhosts on one machine apart.
pub(crate) fn node_tag(node: &NodeId, state_dir: &Path) -> [u8; 32] {
    let digest = Sha256::new().chain_update(node.as_str()).chain_update([0]);
    digest.chain_update(state_dir.as_os_str().as_encoded_bytes()).finalize().into()
}

/// What everything of one node's network is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// Six hexadecimal digits.
    tag: String,
}

impl Names {
    /// `state_dir` and the node's name tell vmhosts on one machine apart.
    pub(super) fn new(node: &NodeId, state_dir: &Path) -> Self {
        Self { tag: hex::encode(&node_tag(node, state_dir)[..3]) }
    }

    pub(super) fn bridge(&self) -> String {
        format!("{PREFIX}{}", self.tag)
    }

    /// The name of both nftables tables.
    pub(super) fn table(&self) -> String {
        format!("blixard_{}", self.tag)
    }

    /// What the names of TAPs begin with.
    pub(super) fn tap_prefix(&self) -> String {
        format!("{PREFIX}{}-", self.tag)
    }
}

/// One node's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) names: Names,
    pub(super) subnet: Ipv4Net,
    pub(super) subnet6: Option<Ipv6Net>,
    pub(super) mtu: u32,
    pub(super) resolvers: Vec<IpAddr>,
    pub(super) denied: Vec<IpNet>,
}

/// What a guest was given. On disk before any of it is made.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Lease {
    /// Its number in the subnet.
    pub(crate) index: u32,
    /// Its TAP.
    pub(crate) tap: String,
    /// Its hardware address.
    pub(crate) mac: Mac,
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Option<Ipv6Addr>,
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Locally administered, unicast, and of one address only.
    fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x62, a, b, c, d])
    }

    /// The link-local address that Linux makes of it (RFC 4291, appendix A).
    pub(super) fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let words = [[a ^ 2, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
        Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("\"{text}\" is no hardware address"))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Plan {
    /// `None`: guests have no network.
    pub(super) fn new(config: &NetworkConfig, names: Names) -> Option<Self> {
        Some(Self {
            names,
            subnet: config.subnet?,
            subnet6: config.subnet6,
            mtu: config.mtu,
            resolvers: config.resolvers.0.clone(),
            denied: config.denied.0.clone(),
        })
    }

    pub(super) fn gateway(&self) -> Ipv4Addr {
        nth(self.subnet, GATEWAY)
    }

    pub(super) fn gateway6(&self) -> Option<Ipv6Addr> {
        self.subnet6.map(|subnet| nth6(subnet, GATEWAY))
    }

    /// The bridge's hardware address: without one of its own it would take the lowest of its ports', and change it.
    pub(super) fn gateway_mac(&self) -> Mac {
        Mac::of(self.gateway())
    }

    /// The indexes that guests may have.
    fn indexes(&self) -> RangeInclusive<u32> {
        let size = 1_u32 << (32 - u32::from(self.subnet.prefix_len()));
        GATEWAY + 1..=size - 2
    }

    /// What the guest of this index has.
    pub(super) fn lease(&self, index: u32) -> Lease {
        let address = nth(self.subnet, index);
        Lease {
            index,
            tap: format!("{}{index:x}", self.names.tap_prefix()),
            mac: Mac::of(address),
            address,
            address6: self.subnet6.map(|subnet| nth6(subnet, index)),
        }
    }

    /// The first free index after `after`, going round: an address rests as long as it can before it is somebody else's, so that
    /// what was on its way to the one does not meet the other.
    pub(super) fn free_index(&self, taken: &BTreeSet<u32>, after: u32) -> Option<u32> {
        let all = self.indexes();
        let from = if all.contains(&(after + 1)) { after + 1 } else { *all.start() };
        (from..=*all.end()).chain(*all.start()..from).find(|index| !taken.contains(index))
    }
}

/// The TAPs to delete: those of this node that no record owns, and nothing else.
pub(super) fn orphans(names: &Names, links: impl IntoIterator<Item = String>, owned: &BTreeSet<String>) -> Vec<String> {
    let prefix = names.tap_prefix();
    links.into_iter().filter(|name| name.starts_with(&prefix) && !owned.contains(name)).collect()
}

fn nth(subnet: Ipv4Net, index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(subnet.network().to_bits() + index)
}

fn nth6(subnet: Ipv6Net, index: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(subnet.network().to_bits() + u128::from(index))
}

#[cfg(test)]
pub(super) mod tests {
    use blixard::config::{Config, List};
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn plan(subnet: &str, subnet6: Option<&str>) -> Plan {
        let config = NetworkConfig {
            subnet: Some(subnet.parse().expect("a network")),
            subnet6: subnet6.map(|net| net.parse().expect("a network")),
            resolvers: List(vec!["1.1.1.1".parse().expect("an address"), "2606:4700:4700::1111".parse().expect("one")]),
            ..Config::default().network
        };
        let node = NodeId::parse("", "node-1").expect("a name");
        Plan::new(&config, Names::new(&node, Path::new("/var/lib/vm-state"))).expect("on")
    }

    #[test]
    fn names_and_addresses_follow_from_the_index() {
        let plan = plan("10.180.0.0/16", Some("fd00:180::/64"));
        let last = plan.lease(0xfffe);
        assert_eq!(plan.lease(5).address.to_string(), "10.180.0.5");
        assert_eq!(plan.lease(5).mac.to_string(), "02:62:0a:b4:00:05");
        assert_eq!(last.address6.map(|address| address.to_string()), Some("fd00:180::fffe".to_owned()));
        assert_eq!(last.mac.link_local().to_string(), "fe80::62:aff:feb4:fffe");
        assert!(last.tap.len() <= 15 && plan.names.bridge().len() <= 15, "{}", last.tap);
        assert_eq!((plan.gateway().to_string(), last.mac.to_string().parse()), ("10.180.0.1".to_owned(), Ok(last.mac)));
        assert_eq!(serde_json::from_str::<Lease>(&serde_json::to_string(&last).expect("json")).expect("reads"), last);
    }

    #[test]
    fn two_vmhosts_of_one_machine_share_no_name() {
        let bridge =
            |node: &str, dir: &str| Names::new(&NodeId::parse("", node).expect("a name"), Path::new(dir)).bridge();
        let names = BTreeSet::from([bridge("a", "/x"), bridge("b", "/x"), bridge("a", "/y"), bridge("a.", "/x")]);
        assert_eq!(names.len(), 4);
    }

    #[test]
    fn only_our_own_taps_that_nobody_owns_are_orphans() {
        let plan = plan("10.180.0.0/24", None);
        let (mine, orphan) = (plan.lease(2).tap, plan.lease(3).tap);
        let links = ["lo", "eth0", "blx000000-3", &plan.names.bridge(), &mine, &orphan].map(str::to_owned);
        assert_eq!(orphans(&plan.names, links, &BTreeSet::from([mine])), [orphan]);
    }

    proptest! {
        #[test]
        fn every_address_is_given_once_and_all_are_given(prefix in 24_u8..=29, start in 0_u32..300) {
            let plan = plan(&format!("10.180.0.0/{prefix}"), None);
            let (mut taken, mut last) = (BTreeSet::new(), start);
            while let Some(index) = plan.free_index(&taken, last) {
                let lease = plan.lease(index);
                prop_assert!(plan.subnet.contains(&lease.address));
                prop_assert!(lease.address != plan.gateway() && lease.address != plan.subnet.broadcast());
                prop_assert!(taken.insert(index));
                last = index;
            }
            prop_assert_eq!(taken.len(), (1 << (32 - prefix)) - 3);
        }

        #[test]
        fn an_address_that_was_given_back_is_the_last_to_be_given_again(given in 2_u32..30) {
            let plan = plan("10.180.0.0/27", None);
            let mut last = given;
            for _ in 0..28 {
                last = plan.free_index(&BTreeSet::new(), last).expect("free");
                prop_assert_ne!(last, given);
            }
            prop_assert_eq!(plan.free_index(&BTreeSet::new(), last), Some(given));
        }
    }
}
