//! Whom a VM may talk to over the network.
//!
//! ```text
//! none │ internet │ allow=10.1.0.0/16,192.0.2.7:443,[2001:db8::/32]:53
//! ```
//! The text stands on command lines, in the registry's `config` column and in messages. What enforces it is vmhost's.

use std::{collections::BTreeSet, fmt, net::IpAddr, num::NonZeroU16, str::FromStr};

use ipnet::IpNet;

use crate::{
    error::{Error, invalid},
    limits::MAX_EGRESS_RULES,
    pb::common::v1 as pb,
};

/// The label by which a node says that it gives its guests a network. vmhost sets it; nobody else can.
pub const NETWORK_LABEL: &str = "blixard.network";
/// Its value.
pub const NETWORK_LABEL_ON: &str = "on";

/// What is allowed, in words.
pub const EGRESS_ALLOWED: &str =
    "none, internet, or allow=CIDR[:PORT],… with [CIDR]:PORT for IPv6, such as allow=10.1.0.0/16,[2001:db8::/32]:443";
const CIDR_ALLOWED: &str = "a network such as 10.1.0.0/16 or 2001:db8::/32 without bits beyond its prefix, and not loopback, \
     link-local or multicast";

/// What may leave a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Egress {
    /// Nothing: it has no network interface.
    #[default]
    None,
    /// What goes to public addresses.
    Internet,
    /// What goes to these destinations; never empty.
    AllowList(BTreeSet<EgressRule>),
}

/// Destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EgressRule {
    /// Where.
    pub net: IpNet,
    /// The port, of TCP and UDP; `None`: every port and protocol.
    pub port: Option<NonZeroU16>,
}

impl Egress {
    /// Whether it takes a node that gives its guests a network.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        *self != Self::None
    }

    /// Parses the wire's value; absent is `None`, the variant.
    ///
    /// # Errors
    /// INVALID_FIELD, below `field`.
    pub fn from_pb(field: &str, egress: Option<pb::Egress>) -> Result<Self, Error> {
        let egress = egress.unwrap_or_default();
        let policy = pb::EgressPolicy::try_from(egress.policy)
            .map_err(|_| invalid(&format!("{field}.policy"), egress.policy, "one of the policies 0 to 3"))?;
        let allow = format!("{field}.allow");
        let known = match policy {
            pb::EgressPolicy::AllowList => {
                let rules = egress.allow.iter().enumerate();
                let rules = rules.map(|(at, rule)| EgressRule::from_pb(&format!("{allow}[{at}]"), rule));
                return Self::allow_list(&allow, rules.collect::<Result<Vec<_>, _>>()?);
            }
            pb::EgressPolicy::Unspecified | pb::EgressPolicy::None => Self::None,
            pb::EgressPolicy::Internet => Self::Internet,
        };
        match egress.allow.len() {
            0 => Ok(known),
            given => Err(invalid(&allow, format!("{given} destinations"), "none, for the policy is not ALLOW_LIST")),
        }
    }

    fn allow_list(field: &str, rules: Vec<EgressRule>) -> Result<Self, Error> {
        if !(1..=MAX_EGRESS_RULES).contains(&rules.len()) {
            let given = format!("{} destinations", rules.len());
            return Err(invalid(field, given, &format!("1 to {MAX_EGRESS_RULES}")));
        }
        Ok(Self::AllowList(rules.into_iter().collect()))
    }
}

impl EgressRule {
    fn from_pb(field: &str, rule: &pb::EgressRule) -> Result<Self, Error> {
        let net = parse_net(&rule.cidr).ok_or_else(|| invalid(&format!("{field}.cidr"), &rule.cidr, CIDR_ALLOWED))?;
        let port = u16::try_from(rule.port).map_err(|_| invalid(&format!("{field}.port"), rule.port, "0 to 65535"))?;
        Ok(Self { net, port: NonZeroU16::new(port) })
    }

    fn parse(text: &str) -> Option<Self> {
        let (net, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (net, port) = rest.split_once("]:")?;
                (net, Some(port))
            }
            // An IPv6 network has more than one colon.
            None if text.matches(':').count() == 1 => text.split_once(':').map(|(net, port)| (net, Some(port)))?,
            None => (text, None),
        };
        Some(Self { net: parse_net(net)?, port: port.map(str::parse).transpose().ok()? })
    }
}

/// A network that a VM may be allowed to reach.
fn parse_net(text: &str) -> Option<IpNet> {
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => text.parse::<IpAddr>().ok()?.into(),
    };
    let never = match net.addr() {
        IpAddr::V4(first) => first.is_loopback() || first.is_link_local() || first.is_multicast(),
        IpAddr::V6(first) => first.is_loopback() || first.is_unicast_link_local() || first.is_multicast(),
    };
    (net == net.trunc() && !never).then_some(net)
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.net, self.port) {
            (net, None) => write!(f, "{net}"),
            (IpNet::V4(net), Some(port)) => write!(f, "{net}:{port}"),
            (IpNet::V6(net), Some(port)) => write!(f, "[{net}]:{port}"),
        }
    }
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Internet => f.write_str("internet"),
            Self::AllowList(rules) => {
                let rules: Vec<String> = rules.iter().map(EgressRule::to_string).collect();
                write!(f, "allow={}", rules.join(","))
            }
        }
    }
}

impl FromStr for Egress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || invalid("egress", text, EGRESS_ALLOWED);
        match text {
            "none" => Ok(Self::None),
            "internet" => Ok(Self::Internet),
            _ => {
                let rules = text.strip_prefix("allow=").ok_or_else(wrong)?;
                let rules: Option<Vec<EgressRule>> = rules.split(',').map(EgressRule::parse).collect();
                Self::allow_list("egress", rules.ok_or_else(wrong)?)
            }
        }
    }
}

impl From<Egress> for String {
    fn from(egress: Egress) -> Self {
        egress.to_string()
    }
}

impl TryFrom<String> for Egress {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Egress> for pb::Egress {
    fn from(egress: Egress) -> Self {
        let (policy, rules) = match egress {
            Egress::None => (pb::EgressPolicy::None, BTreeSet::new()),
            Egress::Internet => (pb::EgressPolicy::Internet, BTreeSet::new()),
            Egress::AllowList(rules) => (pb::EgressPolicy::AllowList, rules),
        };
        let allow = rules.into_iter().map(|rule| pb::EgressRule {
            cidr: rule.net.to_string(),
            port: rule.port.map_or(0, |port| port.get().into()),
        });
        Self { policy: policy.into(), allow: allow.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_survives_its_text_and_the_wire() {
        let list = "allow=10.1.0.0/16,192.0.2.7/32:443,2001:db8::/32,[2001:db8:1::/48]:53";
        for text in ["none", "internet", list] {
            let egress: Egress = text.parse().expect(text);
            assert_eq!(egress.to_string(), text);
            assert_eq!(Egress::from_pb("e", Some(egress.clone().into())), Ok(egress.clone()));
            let json = serde_json::to_string(&egress).expect("text");
            assert_eq!(serde_json::from_str::<Egress>(&json).expect("reads"), egress);
        }
        assert_eq!(Egress::from_pb("e", None), Ok(Egress::None));
        assert_eq!("allow=192.0.2.7".parse::<Egress>().expect("one").to_string(), "allow=192.0.2.7/32");
        let orders = ["allow=10.0.0.0/8,11.0.0.0/8", "allow=11.0.0.0/8,10.0.0.0/8,11.0.0.0/8"];
        assert_eq!(orders[0].parse::<Egress>(), orders[1].parse::<Egress>());
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        let many = format!("allow={}", vec!["10.0.0.0/8"; MAX_EGRESS_RULES + 1].join(","));
        let texts = ["", "all", "allow=", "allow=10.0.0.1/8", "allow=10.0.0.0/8:0", "allow=10.0.0.0/8:70000", &many];
        let never = ["allow=127.0.0.0/8", "allow=169.254.169.254", "allow=fe80::/10", "allow=224.0.0.0/4"];
        for text in texts.into_iter().chain(never) {
            text.parse::<Egress>().expect_err(text);
        }
        let rule = |cidr: &str, port| pb::EgressRule { cidr: cidr.into(), port };
        let cases = [
            ("e.policy", 9, vec![]),
            ("e.allow", 1, vec![rule("10.0.0.0/8", 0)]),
            ("e.allow", 3, vec![]),
            ("e.allow[1].cidr", 3, vec![rule("10.0.0.0/8", 0), rule("::1", 0)]),
            ("e.allow[0].port", 3, vec![rule("10.0.0.0/8", 65_536)]),
        ];
        for (field, policy, allow) in cases {
            let error = Egress::from_pb("e", Some(pb::Egress { policy, allow })).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(field), "{error}");
        }
    }
}
