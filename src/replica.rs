//! The replicas of a registry, as a configuration lists them.

use std::{collections::BTreeSet, fmt, str::FromStr};

/// Metadata of an answer: a revision that covers everything the answer shows.
pub const REVISION: &str = "blixard-revision";
/// Metadata of a request: the oldest revision that its answer may show.
pub const MIN_REVISION: &str = "blixard-min-revision";

/// What a list of replicas looks like.
pub const REPLICAS_ALLOWED: &str = "empty, or 3, 5 or 7 of ID=HOST:GRPC_PORT/RAFT_PORT/API_PORT with commas between them, \
     such as 1=10.0.0.1:50052/50062/50072; ids from 1 on, each once";

/// One replica of the registry and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its number, from 1 on.
    pub id: u64,
    /// A name or an address; an IPv6 address without its brackets.
    pub host: String,
    /// Port of the contracts.
    pub grpc_port: u16,
    /// Port of Raft, for replicas among themselves.
    pub raft_port: u16,
    /// Port of Hiqlite's own protocol, for replicas among themselves.
    pub api_port: u16,
}

impl Replica {
    /// `host:port`, with brackets where IPv6 wants them.
    #[must_use]
    pub fn address(&self, port: u16) -> String {
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }

    /// Where it serves the contracts, as `http://host:port`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address(self.grpc_port))
    }
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}/{}/{}", self.id, self.address(self.grpc_port), self.raft_port, self.api_port)
    }
}

impl FromStr for Replica {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (id, address) = text.split_once('=').ok_or(())?;
        let (address, api) = address.rsplit_once('/').ok_or(())?;
        let (address, raft) = address.rsplit_once('/').ok_or(())?;
        let (host, grpc) = address.rsplit_once(':').ok_or(())?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') || (c == ':' && bare.is_some());
        let port = |text: &str| text.parse().ok().filter(|&port: &u16| port > 0).ok_or(());
        let replica = Self {
            id: text_id(id).ok_or(())?,
            host: host.to_owned(),
            grpc_port: port(grpc)?,
            raft_port: port(raft)?,
            api_port: port(api)?,
        };
        if host.is_empty() || !host.chars().all(known) { Err(()) } else { Ok(replica) }
    }
}

fn text_id(text: &str) -> Option<u64> {
    text.parse().ok().filter(|id| (1..=u64::from(u8::MAX)).contains(id))
}

/// The replicas of one registry, in the order of their ids; none for a registry that is alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Replicas(Vec<Replica>);

impl Replicas {
    /// Whether the registry is alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Replica> {
        self.0.iter()
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Replica> {
        self.0.iter().find(|replica| replica.id == id)
    }

    /// How many make a majority.
    #[must_use]
    pub fn majority(&self) -> usize {
        self.0.len() / 2 + 1
    }
}

impl fmt::Display for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<_> = self.0.iter().map(Replica::to_string).collect();
        f.write_str(&list.join(","))
    }
}

impl FromStr for Replicas {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let mut list: Vec<Replica> = text.split(',').map(|one| one.trim().parse()).collect::<Result<_, _>>()?;
        list.sort_by_key(|replica| replica.id);
        let ids: BTreeSet<_> = list.iter().map(|replica| replica.id).collect();
        let addresses: BTreeSet<_> = list
            .iter()
            .flat_map(|one| [one.grpc_port, one.raft_port, one.api_port].map(|port| one.address(port)))
            .collect();
        // An even number fails as easily as the odd one below it. Replica 1 is the one that begins.
        let valid = matches!(list.len(), 3 | 5 | 7)
            && ids.len() == list.len()
            && ids.contains(&1)
            && addresses.len() == 3 * list.len();
        if valid { Ok(Self(list)) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_reads_as_it_is_written() {
        let text = "1=10.0.0.1:50052/50062/50072,2=registry-2.local:1/2/3,3=[fd00::3]:50052/50062/50072";
        let replicas: Replicas = text.parse().expect("valid");
        assert_eq!(replicas.to_string(), text);
        assert_eq!(replicas.get(3).map(Replica::endpoint).as_deref(), Some("http://[fd00::3]:50052"));
        assert_eq!((replicas.majority(), replicas.get(4)), (2, None));
        assert!("".parse::<Replicas>().expect("alone").is_empty());
    }

    #[test]
    fn what_is_no_list_of_replicas_is_refused() {
        let one = "1=a:1/2/3";
        for bad in [
            one,
            "1=a:1/2/3,2=b:1/2/3",
            "1=a:1/2/3,2=b:1/2/3,2=c:1/2/3",
            "2=a:1/2/3,3=b:1/2/3,4=c:1/2/3",
            "0=a:1/2/3,1=b:1/2/3,2=c:1/2/3",
            "1=a:1/2/3,2=a:1/2/3,3=c:1/2/3",
            "1=a:0/2/3,2=b:1/2/3,3=c:1/2/3",
            "1=a:1/2,2=b:1/2/3,3=c:1/2/3",
            "1=:1/2/3,2=b:1/2/3,3=c:1/2/3",
            "1=a b:1/2/3,2=b:1/2/3,3=c:1/2/3",
            "nonsense",
        ] {
            assert_eq!(bad.parse::<Replicas>(), Err(()), "{bad}");
        }
    }
}
