//! The embedded Hiqlite node: one Raft member with its SQLite state machine, in `data_dir/hiqlite/`.
//!
//! ```text
//!   registry.lock     held while a process uses the directory; its text is that process' id
//!   secrets           alone: what Raft members authenticate each other with; 0600
//!   addresses         alone: where this node listens, on loopback, the same at each start
//!   replica           one of several: whose data this is
//!   logs/             the Raft log: what makes an answer durable
//!   state_machine/    SQLite, rebuilt from snapshot and log after a crash
//!   hiqlite.db        link to state_machine/db/hiqlite.db, for `sqlite3`
//! ```
//! It must not know what the tables hold.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use blixard::replica::Replica;
use hiqlite::{Client, LogSync, Node, NodeConfig, RaftConfig};
use tokio::net::{TcpSocket, lookup_host};

use crate::{
    StartError,
    read::Readers,
    replica::{Membership, bootstrap::Beginning},
    schema,
};

/// The largest Raft entry must stay well below this (one that did not fit stopped the log's writer for good); a group
/// commit is at most 1 MiB and a job's spec about 600 KiB.
pub(crate) const WAL_SIZE: u32 = 16 * 1024 * 1024;
/// Raft entries between snapshots, which are also the most that a start after a crash replays: about 3 s of it.
const ENTRIES_PER_SNAPSHOT: u64 = 10_000;
/// Heartbeat of a node that is alone. Hiqlite waits five heartbeats at its first start for another cluster to show up and
/// then half a second at a time for a leader; with its default of 500 ms a first start takes 5 s. A lone voter elects
/// itself at its next tick (1.5 heartbeats), so nothing else depends on it. More members need their own, slower timing.
const LONE_HEARTBEAT_MS: u64 = 20;
/// Heartbeat of one of several members, and the time that a message to another one has before it is sent again: with
/// 100 ms a loaded disk made a leader repeat itself until the next election.
const HEARTBEAT_MS: u64 = 200;
/// A member stands for election when it has heard nothing for the longest of these and a random one of them: 2.4 to 3.2 s.
/// (openraft 0.9 adds the timeout to a lease as long as the longest; Hiqlite's defaults make it 4.5 to 6 s.)
const ELECTION_HEARTBEATS: std::ops::Range<u64> = 4..8;
/// Raft entries that a member is sent at once. They must arrive within a heartbeat, else they are sent again, for ever
/// (openraft 0.9); an entry may have 1 MiB. With Hiqlite's 128 a member that had 4 MB to catch up with never did.
const ENTRIES_PER_MESSAGE: u64 = 4;
/// Time for a start to replay what the log holds.
pub(crate) const REPLAY_DEADLINE: Duration = Duration::from_secs(120);

const LOCK: &str = "registry.lock";
/// Below the data directory while a backup is restored; see [`crate::restore`].
pub(crate) const RESTORING: &str = "restoring";

/// The directory of a node, held by this process.
pub(crate) struct DataDir {
    pub(crate) path: PathBuf,
    lock: File,
}

impl DataDir {
    /// Takes the directory, or tells who has it.
    pub(crate) fn take(data_dir: &Path) -> Result<Self, StartError> {
        let path = data_dir.join("hiqlite");
        let failed = |source| StartError::DataDir { path: path.clone(), source };
        let restoring = data_dir.join(RESTORING);
        if restoring.exists() && !path.exists() {
            return Err(StartError::Restoring(restoring));
        }
        fs::create_dir_all(&path).map_err(failed)?;
        let lock = lock(&path)?;
        link(&path).map_err(failed)?;
        Ok(Self { path, lock })
    }

    /// Removes what is in it.
    pub(crate) fn clear(&self) -> Result<(), StartError> {
        let failed = |source| StartError::DataDir { path: self.path.clone(), source };
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() == LOCK {
                continue;
            }
            let is_dir = entry.file_type().map_err(failed)?.is_dir();
            let removed = if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            removed.map_err(failed)?;
        }
        link(&self.path).map_err(failed)
    }
}

/// A running node.
pub(crate) struct Embedded {
    /// Proposes changes.
    pub(crate) client: Client,
    /// The SQLite file.
    pub(crate) database: PathBuf,
    /// Where everything is.
    pub(crate) dir: PathBuf,
    /// Whether it has no other members.
    alone: bool,
    /// Held until the node has shut down.
    lock: File,
}

impl Embedded {
    /// Starts a node that has no other members.
    pub(crate) async fn start_alone(dir: DataDir) -> Result<Self, StartError> {
        let secrets = secrets(&dir.path.join("secrets"))
            .map_err(|source| StartError::DataDir { path: dir.path.clone(), source })?;
        let reserved = reserve(&dir.path.join("addresses"))?;
        let [raft, api] = reserved.each_ref().map(|(_, address)| *address);
        let node = Node { id: 1, addr_raft: raft.to_string(), addr_api: api.to_string() };
        let config = NodeConfig {
            node_id: 1,
            nodes: vec![node],
            listen_addr_api: api.ip().to_string().into(),
            listen_addr_raft: raft.ip().to_string().into(),
            raft_config: timing(LONE_HEARTBEAT_MS),
            ..node_config(&dir.path, secrets)
        };
        let node = Self::start(config, dir, true).await;
        drop(reserved);
        node
    }

    /// Starts the first member of a registry, before it has others.
    pub(crate) async fn start_first(dir: DataDir, membership: Option<&Membership>) -> Result<Self, StartError> {
        let Some(membership) = membership else { return Self::start_alone(dir).await };
        let nodes = vec![member(membership.own()?)];
        let config = member_config(&dir.path, membership, nodes, LONE_HEARTBEAT_MS).await?;
        Self::start(config, dir, true).await
    }

    /// Starts one of several members; returns once it knows a leader.
    pub(crate) async fn start_member(
        dir: DataDir,
        membership: &Membership,
        beginning: Beginning,
    ) -> Result<Self, StartError> {
        let nodes = nodes(membership, beginning);
        let config = member_config(&dir.path, membership, nodes, HEARTBEAT_MS).await?;
        Self::start(config, dir, false).await
    }

    async fn start(config: NodeConfig, dir: DataDir, alone: bool) -> Result<Self, StartError> {
        notice_panics();
        // Hiqlite uses rustls, in which two providers are compiled in: one must be chosen.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Box::pin(hiqlite::start_node(config)).await?;
        let database = dir.path.join("state_machine/db/hiqlite.db");
        Ok(Self { client, database, dir: dir.path, alone, lock: dir.lock })
    }

    /// Flushes and stops the node, and gives the directory back. One of several members does not take the ten seconds that
    /// Hiqlite wants for it (0.15.3): every change is on the disk already, and the next start repairs the rest.
    pub(crate) async fn shutdown(&self) {
        if !self.alone {
            return;
        }
        if let Err(error) = self.client.shutdown().await {
            tracing::warn!(%error, "registry did not shut down cleanly; it repairs itself at the next start");
        }
        if let Err(error) = self.lock.unlock() {
            tracing::warn!(%error, "the registry's data directory stays locked until this process ends");
        }
    }
}

async fn member_config(
    dir: &Path,
    membership: &Membership,
    nodes: Vec<Node>,
    heartbeat_ms: u64,
) -> Result<NodeConfig, StartError> {
    let secret = &membership.secret;
    let secrets = [secret.derive("blixard raft"), secret.derive("blixard hiqlite")];
    let own = membership.own()?;
    let host = resolve(&own.address(own.raft_port)).await?.ip();
    let host = if host.is_ipv6() { format!("[{host}]") } else { host.to_string() };
    Ok(NodeConfig {
        node_id: membership.id,
        nodes,
        listen_addr_api: host.clone().into(),
        listen_addr_raft: host.into(),
        raft_config: timing(heartbeat_ms),
        ..node_config(dir, secrets)
    })
}

/// Whether a task of Raft or of its log has panicked in this process. Hiqlite lives on without it, and its metrics do not
/// tell (0.15.3, openraft 0.9).
static CORE_PANICKED: AtomicBool = AtomicBool::new(false);

/// See [`CORE_PANICKED`].
pub(crate) fn core_has_panicked() -> bool {
    CORE_PANICKED.load(Ordering::Relaxed)
}

/// From now on a panic in Raft or its log is noticed.
fn notice_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let file = panic.location().map(std::panic::Location::file).unwrap_or_default();
            if ["/openraft-", "/hiqlite-"].iter().any(|name| file.contains(name)) {
                CORE_PANICKED.store(true, Ordering::Relaxed);
            }
            others(panic);
        }));
    });
}

/// Makes a member that Raft has chosen ready to lead: everything that was ever acknowledged is in its database, which has
/// this program's schema, and changes are proposed to this member's own core.
pub(crate) async fn prepare(client: &Client, readers: &Readers) -> Result<(), StartError> {
    let ready = async {
        // Hiqlite proposes to the leader of its last error (0.15.3); this makes it look again.
        client.wait_for_cluster_sync_timeout(REPLAY_DEADLINE).await?;
        barrier(client).await?;
        schema::migrate(client).await
    };
    tokio::time::timeout(REPLAY_DEADLINE, ready).await.unwrap_or(Err(StartError::Replay))?;
    readers.look().map_err(StartError::Database)
}

/// The members as Hiqlite is told of them. Of one that joins it must never believe that it is the first: it takes half of
/// the list not answering for a new registry, so the others stand in it several times (0.15.3, `should_node_1_skip_init`).
fn nodes(membership: &Membership, beginning: Beginning) -> Vec<Node> {
    let copies = if beginning == Beginning::Join { 4 } else { 1 };
    let times = |replica: &Replica| if replica.id == membership.id { 1 } else { copies };
    membership.replicas.iter().flat_map(|replica| std::iter::repeat_n(member(replica), times(replica))).collect()
}

fn member(replica: &Replica) -> Node {
    Node { id: replica.id, addr_raft: replica.address(replica.raft_port), addr_api: replica.address(replica.api_port) }
}

/// The address that a name of this machine stands for.
pub(crate) async fn resolve(address: &str) -> Result<SocketAddr, StartError> {
    let failed = |source| StartError::Address { address: address.to_owned(), source };
    let found = lookup_host(address).await.map_err(failed)?.next();
    found.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}

fn timing(heartbeat_ms: u64) -> RaftConfig {
    let mut timing = NodeConfig::default_raft_config(entries_per_snapshot());
    timing.heartbeat_interval = heartbeat_ms;
    timing.election_timeout_min = ELECTION_HEARTBEATS.start * heartbeat_ms;
    timing.election_timeout_max = ELECTION_HEARTBEATS.end * heartbeat_ms;
    timing.max_payload_entries = ENTRIES_PER_MESSAGE;
    // Behind a snapshot too: with Hiqlite's 1 a member that is given one under load finds the log behind it gone when it has
    // read it, and needs the next one, for ever.
    timing.max_in_snapshot_log_to_keep = entries_per_snapshot();
    timing
}

/// Fewer in tests, which meet in seconds what takes minutes otherwise. A release build can't be told.
fn entries_per_snapshot() -> u64 {
    let told = std::env::var("BLIXARD_TEST_ENTRIES_PER_SNAPSHOT").ok().filter(|_| cfg!(debug_assertions));
    told.and_then(|entries| entries.parse().ok()).unwrap_or(ENTRIES_PER_SNAPSHOT)
}

fn node_config(dir: &Path, secrets: [String; 2]) -> NodeConfig {
    let [secret_raft, secret_api] = secrets;
    NodeConfig {
        data_dir: dir.display().to_string().into(),
        filename_db: "hiqlite.db".into(),
        // The only mode in which an answer means that the change is on the disk.
        wal_sync: LogSync::Immediate,
        wal_size: WAL_SIZE,
        secret_raft,
        secret_api,
        ..NodeConfig::default()
    }
}

/// Takes the directory for this process.
fn lock(dir: &Path) -> Result<File, StartError> {
    let path = dir.join(LOCK);
    let failed = |source| StartError::DataDir { path: path.clone(), source };
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner);
            return Err(StartError::InUse { path: dir.to_owned(), owner: owner.trim().to_owned() });
        }
        Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
    }
    file.set_len(0).and_then(|()| write!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(file)
}

/// The secrets of this data directory, made at its first start.
fn secrets(path: &Path) -> io::Result<[String; 2]> {
    let split = |text: &str| {
        let mut lines = text.lines().map(str::to_owned);
        Some([lines.next()?, lines.next()?])
    };
    match fs::read_to_string(path) {
        Ok(text) => split(&text).ok_or_else(|| io::Error::other(format!("{} is damaged: delete it", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = || format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
            let secrets = [secret(), secret()];
            let fresh = path.with_extension("new");
            let _ = fs::remove_file(&fresh);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
            file.write_all(secrets.join("\n").as_bytes())?;
            file.sync_all()?;
            fs::rename(&fresh, path)?;
            Ok(secrets)
        }
        Err(error) => Err(error),
    }
}

/// Puts the database where the usage guide says it is.
fn link(dir: &Path) -> io::Result<()> {
    let path = dir.join("hiqlite.db");
    if fs::symlink_metadata(&path).is_ok() {
        return Ok(());
    }
    symlink("state_machine/db/hiqlite.db", path)
}

/// Where this data directory's node listens, for Raft and for its clients, kept from others until the sockets are dropped.
/// (Hiqlite binds them meanwhile: the kernel lets two sockets that both allow reuse bind one address as long as only one
/// of them listens.)
///
/// Raft records its members' addresses, and Hiqlite's client calls the recorded ones, again and again, whatever the
/// configuration says now. So they are chosen once and stay: at an address of 127.0.0.0/8 that nobody else is likely to
/// have chosen. Only when they are taken all the same are others chosen; writes work then too, beside a complaint in the log.
fn reserve(path: &Path) -> Result<[(TcpSocket, SocketAddr); 2], StartError> {
    let kept = fs::read_to_string(path).ok().and_then(|text| {
        let mut addresses = text.lines().map(|line| line.parse::<SocketAddr>().ok());
        Some([bind(addresses.next()??).ok()?, bind(addresses.next()??).ok()?])
    });
    if let Some(reserved) = kept {
        return Ok(reserved);
    }
    let random = uuid::Uuid::new_v4().into_bytes();
    let own = SocketAddr::from(([127, random[0] | 1, random[1], random[2] & 0x7f | 1], 0));
    let reserved = [bind(own).map_err(StartError::Port)?, bind(own).map_err(StartError::Port)?];
    let text = format!("{}\n{}\n", reserved[0].1, reserved[1].1);
    fs::write(path, text).map_err(|source| StartError::DataDir { path: path.to_owned(), source })?;
    Ok(reserved)
}

fn bind(address: SocketAddr) -> io::Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

/// Waits until everything in the log has been applied: an entry of our own comes after all of it. What that entry does
/// is done at the first start only.
async fn barrier(client: &Client) -> Result<(), StartError> {
    loop {
        match client.execute(schema::CREATE_MIGRATIONS, vec![]).await {
            Ok(_) => return Ok(()),
            // Hiqlite's own limit on a write; the replay goes on.
            Err(hiqlite::Error::Timeout(_)) => tracing::info!("registry is replaying its log"),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_private_and_stay_the_same() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secrets");
        let first = secrets(&path).unwrap();
        assert_eq!(first, secrets(&path).unwrap());
        assert_ne!(first[0], first[1]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, "half").unwrap();
        assert!(secrets(&path).unwrap_err().to_string().contains("damaged"));
    }
}
