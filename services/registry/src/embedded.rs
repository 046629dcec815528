//! The embedded Hiqlite node: one Raft member with its SQLite state machine, on loopback, in `data_dir/hiqlite/`.
//!
//! ```text
//!   registry.lock     held while a process uses the directory; its text is that process' id
//!   secrets           what Raft members authenticate each other with; 0600
//!   addresses         where this node listens, the same at each start
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
    time::Duration,
};

use hiqlite::{Client, LogSync, Node, NodeConfig};
use tokio::net::TcpSocket;

use crate::{StartError, schema};

/// The largest Raft entry must stay well below this (one that did not fit stopped the log's writer for good); a group
/// commit is at most 1 MiB and a job's spec about 600 KiB.
const WAL_SIZE: u32 = 16 * 1024 * 1024;
/// Raft entries between snapshots, which are also the most that a start after a crash replays: about 3 s of it.
const ENTRIES_PER_SNAPSHOT: u64 = 10_000;
/// Heartbeat of a node that is alone. Hiqlite waits five heartbeats at its first start for another cluster to show up and
/// then half a second at a time for a leader; with its default of 500 ms a first start takes 5 s. A lone voter elects
/// itself at its next tick (1.5 heartbeats), so nothing else depends on it. More members need their own, slower timing.
const LONE_HEARTBEAT_MS: u64 = 20;
/// Time for a start to replay what the log holds.
const REPLAY_DEADLINE: Duration = Duration::from_secs(120);

/// A running node.
pub(crate) struct Embedded {
    /// Proposes changes.
    pub(crate) client: Client,
    /// The SQLite file.
    pub(crate) database: PathBuf,
    /// Held until the node has shut down.
    lock: File,
}

impl Embedded {
    /// Starts the node and waits until every change that was ever acknowledged is visible.
    pub(crate) async fn start(data_dir: &Path) -> Result<Self, StartError> {
        let dir = data_dir.join("hiqlite");
        let failed = |source| StartError::DataDir { path: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(failed)?;
        let lock = lock(&dir)?;
        let secrets = secrets(&dir.join("secrets")).map_err(failed)?;
        link(&dir).map_err(failed)?;

        // Hiqlite uses rustls, in which two providers are compiled in: one must be chosen.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let reserved = reserve(&dir.join("addresses"))?;
        let [raft, api] = reserved.each_ref().map(|(_, address)| *address);
        let client = Box::pin(hiqlite::start_node(node_config(&dir, &secrets, raft, api))).await?;
        drop(reserved);

        let database = dir.join("state_machine/db/hiqlite.db");
        let ready = async {
            barrier(&client).await?;
            schema::migrate(&client).await
        };
        match tokio::time::timeout(REPLAY_DEADLINE, ready).await.unwrap_or(Err(StartError::Replay)) {
            Ok(()) => Ok(Self { client, database, lock }),
            Err(error) => {
                let _ = client.shutdown().await;
                Err(error)
            }
        }
    }

    /// Flushes and stops the node, and gives the directory back.
    pub(crate) async fn shutdown(&self) {
        if let Err(error) = self.client.shutdown().await {
            tracing::warn!(%error, "registry did not shut down cleanly; it repairs itself at the next start");
        }
        if let Err(error) = self.lock.unlock() {
            tracing::warn!(%error, "the registry's data directory stays locked until this process ends");
        }
    }
}

fn node_config(dir: &Path, secrets: &[String; 2], raft: SocketAddr, api: SocketAddr) -> NodeConfig {
    let mut timing = NodeConfig::default_raft_config(ENTRIES_PER_SNAPSHOT);
    timing.heartbeat_interval = LONE_HEARTBEAT_MS;
    timing.election_timeout_min = 10 * LONE_HEARTBEAT_MS;
    timing.election_timeout_max = 20 * LONE_HEARTBEAT_MS;
    NodeConfig {
        node_id: 1,
        nodes: vec![Node { id: 1, addr_raft: raft.to_string(), addr_api: api.to_string() }],
        listen_addr_api: api.ip().to_string().into(),
        listen_addr_raft: raft.ip().to_string().into(),
        data_dir: dir.display().to_string().into(),
        filename_db: "hiqlite.db".into(),
        // The only mode in which an answer means that the change is on the disk.
        wal_sync: LogSync::Immediate,
        wal_size: WAL_SIZE,
        raft_config: timing,
        secret_raft: secrets[0].clone(),
        secret_api: secrets[1].clone(),
        ..NodeConfig::default()
    }
}

/// Takes the directory for this process.
fn lock(dir: &Path) -> Result<File, StartError> {
    let path = dir.join("registry.lock");
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
