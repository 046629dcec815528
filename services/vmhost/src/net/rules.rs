//! What guests may send, as an nftables document: rendered from who has which address and policy, without any doing.
//!
//! ```text
//!   table bridge   what enters from a TAP bears its guest's own addresses, in ARP and neighbour advertisements, too
//!   table inet     input    nothing for the host
//!                  forward  from a guest: as its policy says; to a guest: what answers it
//!                  nat      a guest's packets leave with the host's address
//! ```
//! That guests don't reach each other is the bridge's doing (isolated ports); what would be routed back to it is dropped here.
//! A policy is asked of every packet and not only of the first of a connection: an address that has changed hands has none of its former
//! owner's connections. Both tables are replaced as a whole, in one transaction.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    net::IpAddr,
};

use blixard::egress::{Egress, EgressRule};
use ipnet::IpNet;

use super::plan::{Lease, Names, Plan};

/// IPv4 ranges that are not the internet's (RFC 6890).
const SPECIAL4: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, \
     192.0.2.0/24, 192.88.99.0/24, 192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, 224.0.0.0/3";
/// What of IPv6 is the internet's …
const GLOBAL6: &str = "2000::/3";
/// … but for these: documentation, and what holds an IPv4 address that might be a private one (Teredo, 6to4).
const SPECIAL6: &str = "2001::/23, 2001:db8::/32, 2002::/16, 3fff::/20";

/// A guest as the rules know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Guest {
    pub(super) lease: Lease,
    pub(super) egress: Egress,
}

/// The whole ruleset, for `nft -f -`.
pub(super) fn render(plan: &Plan, guests: &BTreeMap<u32, Guest>) -> String {
    let table = plan.names.table();
    let (bridge, inet) = (render_bridge(plan, guests), render_inet(plan, guests));
    let head = render_nothing(&plan.names);
    format!("{head}table bridge {table} {{\n{bridge}}}\ntable inet {table} {{\n{inet}}}\n")
}

/// What takes away whatever [`render`] made.
pub(super) fn render_nothing(names: &Names) -> String {
    // Named first, so that deleting finds it.
    let deleted = |family: &str| format!("table {family} {0}\ndelete table {family} {0}\n", names.table());
    deleted("bridge") + &deleted("inet")
}

/// Writes a chain.
fn chain(text: &mut String, name: impl Display, rules: &[String]) {
    let _ = writeln!(text, "    chain {name} {{");
    for rule in rules {
        let _ = writeln!(text, "        {rule}");
    }
    let _ = writeln!(text, "    }}");
}

/// `{ a, b }`; nothing for nothing, since nftables has no empty set in a rule.
fn set<T: Display>(values: impl IntoIterator<Item = T>) -> Option<String> {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    (!values.is_empty()).then(|| format!("{{ {} }}", values.join(", ")))
}

fn render_bridge(plan: &Plan, guests: &BTreeMap<u32, Guest>) -> String {
    let mut text = String::new();
    let taps = format!("iifname \"{}*\" jump guests", plan.names.tap_prefix());
    // The earliest: before anything is learned, forwarded or tracked.
    let hook = "type filter hook prerouting priority -300; policy accept;".to_owned();
    chain(&mut text, "prerouting", &[hook, taps]);
    let own = set(guests.values().map(|guest| format!("\"{}\" : goto vm_{}", guest.lease.tap, guest.lease.index)));
    let own = own.map(|own| format!("iifname vmap {own}"));
    chain(&mut text, "guests", &own.into_iter().chain(["drop".to_owned()]).collect::<Vec<_>>());
    for Guest { lease, .. } in guests.values() {
        let (mac, address) = (lease.mac, lease.address);
        let mut rules = vec![
            format!("ether saddr != {mac} drop"),
            format!(
                "ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {mac} arp saddr ip {address} accept"
            ),
            format!("ether type ip ip saddr {address} accept"),
        ];
        if let Some(address6) = lease.address6 {
            let link_local = mac.link_local();
            rules.push("icmpv6 type { nd-router-advert, nd-redirect } drop".to_owned());
            // Whom a neighbour advertisement speaks for: 128 bits, 64 from the beginning of ICMPv6.
            let (one, other) = (address6.to_bits(), link_local.to_bits());
            rules.push(format!(
                "icmpv6 type nd-neighbor-advert @th,64,128 != 0x{one:032x} @th,64,128 != 0x{other:032x} drop"
            ));
            rules.push(format!("ether type ip6 ip6 saddr {{ {address6}, {link_local} }} accept"));
        }
        rules.push("drop".to_owned());
        chain(&mut text, format!("vm_{}", lease.index), &rules);
    }
    text
}

fn render_inet(plan: &Plan, guests: &BTreeMap<u32, Guest>) -> String {
    let (mut text, bridge) = (String::new(), plan.names.bridge());
    let filter = |hook: &str| format!("type filter hook {hook} priority filter; policy accept;");
    chain(&mut text, "input", &[filter("input"), format!("iifname \"{bridge}\" jump for_host")]);
    let from = format!("iifname \"{bridge}\" goto from_guest");
    let to = format!("oifname \"{bridge}\" goto to_guest");
    chain(&mut text, "forward", &[filter("forward"), from, to]);
    // Without it a guest could not find its gateway. For IPv4 that is ARP, which does not come here.
    let neighbours = "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept";
    let neighbours = plan.subnet6.map(|_| neighbours.to_owned());
    chain(&mut text, "for_host", &neighbours.into_iter().chain(["drop".to_owned()]).collect::<Vec<_>>());
    chain(&mut text, "to_guest", &["ct state established,related accept".to_owned(), "drop".to_owned()]);
    chain(&mut text, "from_guest", &from_guest(plan, guests));
    chain(&mut text, "internet", &internet(&plan.resolvers));
    for Guest { lease, egress } in guests.values() {
        if let Egress::AllowList(rules) = egress {
            let rules = rules.iter().map(allow).chain(["drop".to_owned()]);
            chain(&mut text, format!("vm_{}", lease.index), &rules.collect::<Vec<_>>());
        }
    }
    let mut nat = vec!["type nat hook postrouting priority srcnat; policy accept;".to_owned()];
    nat.push(format!("ip saddr {} oifname != \"{bridge}\" masquerade", plan.subnet));
    nat.extend(plan.subnet6.map(|subnet| format!("ip6 saddr {subnet} oifname != \"{bridge}\" masquerade")));
    chain(&mut text, "postrouting", &nat);
    text
}

fn from_guest(plan: &Plan, guests: &BTreeMap<u32, Guest>) -> Vec<String> {
    let mut rules = vec![format!("oifname \"{}\" drop", plan.names.bridge())];
    rules.extend(plan.denied.iter().map(|net| format!("{} drop", destination(net))));
    let verdict = |guest: &Guest| match guest.egress {
        // It has no interface to send from.
        Egress::None => "drop".to_owned(),
        Egress::Internet => "goto internet".to_owned(),
        Egress::AllowList(_) => format!("goto vm_{}", guest.lease.index),
    };
    let all4 = guests.values().map(|guest| format!("{} : {}", guest.lease.address, verdict(guest)));
    let all6 = guests.values().filter_map(|guest| Some(format!("{} : {}", guest.lease.address6?, verdict(guest))));
    rules.extend(set(all4).map(|guests| format!("ip saddr vmap {guests}")));
    rules.extend(set(all6).map(|guests| format!("ip6 saddr vmap {guests}")));
    rules.push("drop".to_owned());
    rules
}

fn internet(resolvers: &[IpAddr]) -> Vec<String> {
    let dns = |address: &IpAddr| format!("{} {} accept", destination(&IpNet::from(*address)), port(53));
    let mut rules: Vec<String> = resolvers.iter().map(dns).collect();
    rules.push(format!("ip daddr {{ {SPECIAL4} }} drop"));
    rules.push(format!("ip6 daddr != {GLOBAL6} drop"));
    rules.push(format!("ip6 daddr {{ {SPECIAL6} }} drop"));
    rules.push("accept".to_owned());
    rules
}

fn allow(rule: &EgressRule) -> String {
    let port = rule.port.map_or_else(String::new, |number| format!("{} ", port(number.get())));
    format!("{} {port}accept", destination(&rule.net))
}

/// What matches a destination. Not in a set with others: those must not overlap.
fn destination(net: &IpNet) -> String {
    let family = if net.addr().is_ipv4() { "ip" } else { "ip6" };
    format!("{family} daddr {net}")
}

/// What matches a port of TCP and UDP.
fn port(number: u16) -> String {
    format!("meta l4proto {{ tcp, udp }} th dport {number}")
}

/// The resolvers that a guest with this policy reaches; others it is not told of.
pub(super) fn reachable_resolvers(plan: &Plan, egress: &Egress) -> Vec<IpAddr> {
    let listed = |rules: &std::collections::BTreeSet<EgressRule>, address: IpAddr| {
        let dns = |rule: &EgressRule| rule.net.contains(&address) && rule.port.is_none_or(|port| port.get() == 53);
        rules.iter().any(dns)
    };
    let reaches = |address: IpAddr| match egress {
        Egress::None => false,
        Egress::Internet => true,
        Egress::AllowList(rules) => listed(rules, address),
    };
    let usable = |address: IpAddr| {
        let family = address.is_ipv4() || plan.subnet6.is_some();
        family && !plan.denied.iter().any(|net| net.contains(&address)) && reaches(address)
    };
    plan.resolvers.iter().copied().filter(|address| usable(*address)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::plan::tests::plan;

    fn guests(plan: &Plan, policies: &[&str]) -> BTreeMap<u32, Guest> {
        let guest = |(at, policy): (u32, &&str)| {
            let lease = plan.lease(at);
            (at, Guest { lease, egress: policy.parse().expect("a policy") })
        };
        (2..).zip(policies).map(guest).collect()
    }

    #[test]
    fn a_network_without_guests_lets_nothing_through() {
        let plan = plan("10.180.0.0/24", None);
        insta::assert_snapshot!(render(&plan, &BTreeMap::new()));
    }

    #[test]
    fn each_policy_has_its_rules() {
        let mut plan = plan("10.180.0.0/24", Some("fd00:180::/64"));
        plan.denied = vec!["10.9.0.0/16".parse().expect("a network"), "fd00:9::/32".parse().expect("a network")];
        let policies = ["internet", "allow=10.1.0.0/16,192.0.2.7:443,[2001:db8::/32]:53"];
        insta::assert_snapshot!(render(&plan, &guests(&plan, &policies)));
    }

    #[test]
    fn a_guest_is_told_of_the_resolvers_that_it_reaches() {
        let mut plan = plan("10.180.0.0/24", None);
        let told = |plan: &Plan, policy: &str| {
            let resolvers = reachable_resolvers(plan, &policy.parse().expect("a policy"));
            resolvers.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(told(&plan, "internet"), "1.1.1.1");
        assert_eq!(told(&plan, "none"), "");
        assert_eq!(told(&plan, "allow=1.0.0.0/8:443"), "");
        assert_eq!(told(&plan, "allow=1.1.1.1:53"), "1.1.1.1");
        plan.subnet6 = "fd00::/64".parse().ok();
        assert_eq!(told(&plan, "internet"), "1.1.1.1 2606:4700:4700::1111");
        plan.denied = vec!["1.1.1.0/24".parse().expect("a network")];
        assert_eq!(told(&plan, "internet"), "2606:4700:4700::1111");
    }
}
