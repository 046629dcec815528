//! How a replica begins: what its directory says, and what the other replicas say before it may start.
//!
//! Only replica 1 ever begins a new registry, and only when *every* other replica answered that it has no data either:
//! Hiqlite itself takes replicas that do not answer for replicas without data (0.15.3), and a replica 1 that lost its
//! disk would begin a second registry beside the one it belonged to.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Membership,
    peers::{Answer, Mismatch, Peers},
};

/// How often the others are asked.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// How often the others are looked at while a replica starts.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A replica with data knows its leader within seconds, however long its log is.
const START_WITHIN: Duration = Duration::from_secs(60);
/// In this time a majority elects a leader.
const ELECTED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is told whom a replica waits for.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How a replica starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// With the data it has.
    Resume,
    /// As the first of a new registry.
    New,
    /// Without data, as one of a registry that exists or that replica 1 begins.
    Join,
}

/// Why a directory does not fit this replica.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It belongs to another.
    #[error(
        "the data directory belongs to replica {found} and this is replica {expected}: data directories do not move between replicas"
    )]
    Other {
        /// Whose it is.
        found: String,
        /// Who we are.
        expected: u64,
    },
    /// It belongs to a registry that was alone.
    #[error(
        "the data directory belongs to a registry that was alone: back it up and restore it as replica 1 (docs/OPERATIONS.md)"
    )]
    Alone,
    /// It belongs to a replica, and this registry is to be alone.
    #[error("the data directory belongs to replica {found} of several, and registry.replicas is not set")]
    OfSeveral {
        /// Whose it is.
        found: String,
    },
    /// It can't be read or written.
    #[error("{}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which replica a data directory belongs to, written when it first has data.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    path: PathBuf,
}

impl Identity {
    pub(crate) fn of(dir: &Path) -> Self {
        Self { path: dir.join("replica") }
    }

    fn read(&self) -> Result<Option<String>, IdentityError> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    fn failed(&self, source: io::Error) -> IdentityError {
        IdentityError::Io { path: self.path.clone(), source }
    }

    /// Whether the directory has data of this replica. One of another replica, or of a registry alone, is refused.
    pub(crate) fn check(&self, id: u64) -> Result<bool, IdentityError> {
        match self.read()? {
            Some(found) if found == id.to_string() => Ok(true),
            Some(found) => Err(IdentityError::Other { found, expected: id }),
            None if self.path.with_file_name("addresses").exists() => Err(IdentityError::Alone),
            None => Ok(false),
        }
    }

    /// Refuses the directory of a replica.
    pub(crate) fn check_alone(&self) -> Result<(), IdentityError> {
        match self.read()? {
            Some(found) => Err(IdentityError::OfSeveral { found }),
            None => Ok(()),
        }
    }

    /// The directory has data of this replica from now on.
    pub(crate) fn write(&self, id: u64) -> Result<(), IdentityError> {
        let fresh = self.path.with_extension("new");
        let written = fs::File::create(&fresh).and_then(|mut file| {
            writeln!(file, "{id}")?;
            file.sync_all()?;
            fs::rename(&fresh, &self.path)?;
            fs::File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
        });
        written.map_err(|source| self.failed(source))
    }
}

/// Waits until this replica may start, and says how.
pub(crate) async fn wait_to_begin(
    membership: &Membership,
    peers: &Peers,
    has_data: bool,
) -> Result<Beginning, Mismatch> {
    let begun = tokio::time::Instant::now();
    let (mut tell_at, elected_by) = (begun + TELL_EVERY / 10, begun + ELECTED_WITHIN);
    loop {
        let answers = peers.ask_all().await?;
        if has_data {
            // One that comes back so fast that the others still take it for their leader would not be their leader for the
            // five seconds that Hiqlite then waits (0.15.3): better that they elect another one first.
            let well = answers.iter().filter(|answer| answer.is_well()).count();
            let elects = well >= membership.replicas.majority() && !answers.iter().any(Answer::leads);
            if !elects || tokio::time::Instant::now() >= elected_by {
                return Ok(Beginning::Resume);
            }
            tokio::time::sleep(ASK_EVERY).await;
            continue;
        }
        let empty = answers.iter().filter(|answer| !answer.has_data()).count();
        if membership.id != 1 || answers.iter().any(|answer| answer.leads()) {
            return Ok(Beginning::Join);
        }
        if empty == peers.count() {
            return Ok(Beginning::New);
        }
        if tokio::time::Instant::now() >= tell_at {
            tell_at += TELL_EVERY;
            let answered: Vec<_> = answers.iter().map(|answer| answer.id).collect();
            tracing::warn!(
                ?answered,
                "replica 1 has no data and waits: for all other replicas, to begin a new registry with them, or for one that leads"
            );
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Tells, while a replica starts, what it waits for. Resolves when it should have started long since: some other replica
/// has been leading for [`START_WITHIN`], and this one still knows no leader.
pub(crate) async fn overdue(peers: &Peers) {
    let mut since = None;
    let mut told = false;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let led = peers.ask_all().await.is_ok_and(|answers| answers.iter().any(Answer::leads));
        let now = tokio::time::Instant::now();
        since = led.then(|| since.unwrap_or(now));
        match since {
            Some(since) if now - since > START_WITHIN => return,
            Some(_) => {}
            None if !std::mem::replace(&mut told, true) => {
                tracing::warn!("this replica waits for a majority of the replicas to elect a leader");
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stays_with_its_replica() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::of(dir.path());
        assert!(!identity.check(2).unwrap());
        identity.check_alone().unwrap();
        identity.write(2).unwrap();
        assert!(identity.check(2).unwrap());
        assert!(matches!(identity.check(3), Err(IdentityError::Other { .. })));
        assert!(matches!(identity.check_alone(), Err(IdentityError::OfSeveral { .. })));
    }

    #[test]
    fn the_directory_of_a_registry_alone_is_no_replicas() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("addresses"), "").unwrap();
        assert!(matches!(Identity::of(dir.path()).check(1), Err(IdentityError::Alone)));
    }
}
