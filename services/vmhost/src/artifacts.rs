//! The files that attempts leave.
//!
//! ```text
//! LOG_DIR/<job>/<attempt>/artifacts/index.json    what there is, in the order of the spec
//!                                   0, 1, …       the bytes
//!                         artifacts.new/          while they are being fetched
//! ```
//! They are written aside and the directory is renamed when all is on the disk: after a crash in the middle everything is fetched
//! again, and after one behind the rename nothing is.
//!
//! Nothing here knows VMs or the registry.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    limits::{MAX_ARTIFACT_BYTES, MAX_LOG_CHUNK},
    pb::{common::v1 as common, guest::v1 as guest, vmhost::v1 as pb},
};
use blixard_chassis::client;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::{blocking::blocking, guest::AgentLink};

/// How long all files of an attempt may take: 256 MiB at 1 MiB a second. Its VM waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(256);
/// How long one answer may take to begin.
const CALL_TIMEOUT: Duration = Duration::from_secs(256);
/// The first pause after a broken connection; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest.
const MAX_PAUSE: Duration = Duration::from_secs(1);

const INDEX: &str = "index.json";
const DROPPED: &str = "the node has dropped it, to bound what logs and artifacts take of its disk";

/// Where an attempt's files are.
#[derive(Debug, Clone)]
pub(crate) struct ArtifactDir(PathBuf);

/// A file, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Entry {
    path: String,
    size_bytes: u64,
    sha256: Vec<u8>,
    /// Empty: it is here.
    problem: String,
}

impl From<Entry> for common::Artifact {
    fn from(entry: Entry) -> Self {
        let Entry { path, size_bytes, sha256, problem } = entry;
        Self { path, size_bytes, sha256: sha256.into(), problem }
    }
}

impl ArtifactDir {
    /// In an attempt's directory.
    pub(crate) fn of(attempt_dir: &Path) -> Self {
        Self(attempt_dir.join("artifacts"))
    }

    fn beside(&self) -> PathBuf {
        self.0.with_extension("new")
    }

    fn index(&self) -> io::Result<Vec<Entry>> {
        match fs::read(self.0.join(INDEX)) {
            Ok(text) => serde_json::from_slice(&text).map_err(Into::into),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            Err(error) => Err(error),
        }
    }

    /// What was kept, and what was not. Blocking.
    pub(crate) fn list(&self) -> io::Result<Vec<common::Artifact>> {
        Ok(self.index()?.into_iter().map(Into::into).collect())
    }

    /// Opens a file; `None` when the attempt names no such file. Blocking.
    pub(crate) fn open(&self, path: &str) -> io::Result<Option<(common::Artifact, Option<File>)>> {
        let found = self.index()?.into_iter().enumerate().find(|(_, entry)| entry.path == path);
        let Some((number, entry)) = found else { return Ok(None) };
        let file = entry.problem.is_empty().then(|| File::open(self.0.join(number.to_string()))).transpose()?;
        Ok(Some((entry.into(), file)))
    }

    /// How much is kept. Blocking.
    pub(crate) fn bytes(&self) -> io::Result<u64> {
        Ok(self.kept_files()?.iter().map(|(_, bytes)| bytes).sum())
    }

    /// The files but for the index, with their lengths.
    fn kept_files(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| name.parse::<usize>().is_ok()) {
                files.push((entry.path(), entry.metadata()?.len()));
            }
        }
        Ok(files)
    }

    /// Drops what is kept; the index says so from before the first file goes. Returns how many bytes are gone. Blocking.
    pub(crate) fn drop_files(&self) -> io::Result<u64> {
        let files = self.kept_files()?;
        if files.is_empty() {
            return Ok(0);
        }
        let mut index = self.index()?;
        index
            .iter_mut()
            .filter(|entry| entry.problem.is_empty())
            .for_each(|entry| DROPPED.clone_into(&mut entry.problem));
        let beside = self.0.join(INDEX).with_extension("new");
        let mut file = File::create(&beside)?;
        file.write_all(&serde_json::to_vec(&index)?)?;
        file.sync_data()?;
        fs::rename(&beside, self.0.join(INDEX))?;
        files.iter().try_for_each(|(path, _)| fs::remove_file(path))?;
        Ok(files.iter().map(|(_, bytes)| bytes).sum())
    }

    /// Fetches files from a guest, unless that was done before.
    pub(crate) async fn fetch(&self, link: &AgentLink, guest_boot: &str, paths: &[String]) -> io::Result<()> {
        if self.0.exists() {
            return Ok(());
        }
        let beside = self.beside();
        // What an earlier vmhost fetched may be large.
        let fresh = beside.clone();
        blocking(move || clear(&fresh).and_then(|()| fs::create_dir_all(fresh))).await?;
        let mut fetching = Fetching { link, guest_boot, deadline: Instant::now() + PATIENCE, room: MAX_ARTIFACT_BYTES };
        let mut index = Vec::with_capacity(paths.len());
        for (number, path) in paths.iter().enumerate() {
            let kept = beside.join(number.to_string());
            let entry = fetching.fetch(path, &kept).await?;
            if !entry.problem.is_empty() {
                fs::remove_file(&kept)?;
            }
            index.push(entry);
        }
        let (from, to) = (beside, self.0.clone());
        blocking(move || {
            let mut file = File::create(from.join(INDEX))?;
            file.write_all(&serde_json::to_vec(&index)?)?;
            for entry in fs::read_dir(&from)? {
                File::open(entry?.path())?.sync_all()?;
            }
            fs::rename(&from, &to)
        })
        .await
    }
}

fn clear(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

struct Fetching<'a> {
    link: &'a AgentLink,
    guest_boot: &'a str,
    deadline: Instant,
    /// How many bytes may still be kept.
    room: u64,
}

/// A file that is being written.
struct Partial {
    file: File,
    hash: Sha256,
    have: u64,
    size: Option<u64>,
}

/// Why a file is not kept, or why it is to be asked for again.
enum Stop {
    Problem(String),
    Broken(Error),
    Disk(io::Error),
}

impl From<tonic::Status> for Stop {
    fn from(status: tonic::Status) -> Self {
        let error = Error::from(status);
        match error.reason {
            Reason::ArtifactNotFound => Self::Problem("not there".to_owned()),
            Reason::PeerUnavailable => Self::Broken(error),
            _ => Self::Problem(error.message),
        }
    }
}

impl Fetching<'_> {
    /// One file, across broken connections. An error is one of our own disk.
    async fn fetch(&mut self, path: &str, into: &Path) -> io::Result<Entry> {
        let mut partial = Partial { file: File::create(into)?, hash: Sha256::new(), have: 0, size: None };
        let mut pause = FIRST_PAUSE;
        let problem = loop {
            let before = partial.have;
            let stop = match tokio::time::timeout_at(self.deadline, self.read(path, &mut partial)).await {
                Ok(Ok(())) => break String::new(),
                Ok(Err(stop)) => stop,
                Err(_) => Stop::Problem(format!("it could not be fetched within {} s", PATIENCE.as_secs())),
            };
            match stop {
                Stop::Problem(problem) => break problem,
                Stop::Disk(error) => return Err(error),
                Stop::Broken(error) => tracing::debug!(%error, path, "the connection broke while a file was fetched"),
            }
            self.link.forget();
            pause = if partial.have > before { FIRST_PAUSE } else { (pause * 2).min(MAX_PAUSE) };
            tokio::time::sleep(pause).await;
        };
        let kept = problem.is_empty();
        self.room -= if kept { partial.have } else { 0 };
        let sha256 = if kept { partial.hash.finalize().to_vec() } else { vec![] };
        Ok(Entry { path: path.to_owned(), size_bytes: partial.size.unwrap_or(0), sha256, problem })
    }

    /// What is missing of a file.
    async fn read(&self, path: &str, partial: &mut Partial) -> Result<(), Stop> {
        let mut agent = self.link.agent().await.map_err(Stop::Broken)?;
        if agent.hello.boot_id != self.guest_boot {
            return Err(Stop::Problem("the guest restarted".to_owned()));
        }
        let request = guest::GetFileRequest { path: path.to_owned(), offset: partial.have };
        let mut parts = agent.client.get_file(client::request(request, CALL_TIMEOUT)).await?.into_inner();
        let Some(mut part) = parts.message().await? else { return Err(Stop::Problem("it has no bytes".to_owned())) };
        let size = *partial.size.get_or_insert(part.size_bytes);
        if part.size_bytes != size {
            return Err(Stop::Problem("it changed while it was fetched".to_owned()));
        }
        if size > self.room {
            let problem = format!("it has {size} bytes: of {MAX_ARTIFACT_BYTES} for an attempt {} are left", self.room);
            return Err(Stop::Problem(problem));
        }
        loop {
            partial.file.write_all(&part.data).map_err(Stop::Disk)?;
            partial.hash.update(&part.data);
            partial.have += part.data.len() as u64;
            match parts.message().await? {
                Some(next) if partial.have + (next.data.len() as u64) <= size => part = next,
                Some(_) => return Err(Stop::Problem("the guest sent more than there is".to_owned())),
                None if partial.have == size => return Ok(()),
                None => return Err(Stop::Problem("the guest sent less than there is".to_owned())),
            }
        }
    }
}

/// The bytes of a kept file, part by part.
pub(crate) struct Reader {
    file: File,
    left: u64,
    artifact: Option<common::Artifact>,
}

impl Reader {
    /// From an offset that is not beyond the end.
    pub(crate) fn new(mut file: File, artifact: common::Artifact, offset: u64) -> io::Result<Self> {
        file.seek(SeekFrom::Start(offset))?;
        Ok(Self { file, left: artifact.size_bytes - offset, artifact: Some(artifact) })
    }

    /// The next part; `None` after the last. The first one comes also when there are no bytes. Blocking.
    pub(crate) fn next(&mut self) -> io::Result<Option<pb::GetArtifactResponse>> {
        if self.left == 0 && self.artifact.is_none() {
            return Ok(None);
        }
        let mut data = vec![0; usize::try_from(self.left).unwrap_or(usize::MAX).min(MAX_LOG_CHUNK)];
        self.file.read_exact(&mut data)?;
        self.left -= data.len() as u64;
        Ok(Some(pb::GetArtifactResponse { artifact: self.artifact.take(), data: data.into() }))
    }
}
