//! A backup as it lies in a directory: the database and a manifest that proves it.
//!
//! ```text
//!   DIR/registry.db      a SQLite database
//!   DIR/manifest.json    what it is, and its digest
//! ```
//! The directory appears when both are whole and on the disk.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use blixard::{pb::registry::v1 as wire, time::Timestamp};
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::time;

const DATABASE: &str = "registry.db";
const MANIFEST: &str = "manifest.json";
/// The only version of the format there is.
const FORMAT_VERSION: u32 = 1;

/// What a backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this file and its neighbour.
    pub format_version: u32,
    /// The newest revision in it.
    pub revision: u64,
    /// The schema it has.
    pub schema_version: i64,
    /// The length of the database.
    pub bytes: u64,
    /// The database's SHA-256, in hexadecimal.
    pub sha256: String,
    /// When it was made, by the registry's clock; RFC 3339.
    pub taken_at: String,
}

/// Why a backup can't be written or used.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Something is there already.
    #[error("{} exists: a backup is never overwritten", .0.display())]
    Exists(PathBuf),
    /// A file can't be read or written.
    #[error("{}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The manifest is none.
    #[error("{} is no manifest of a backup", path.display())]
    Manifest {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A newer program has written it.
    #[error("the backup has format version {0} and this program knows {FORMAT_VERSION}: use a newer program")]
    NewerFormat(u32),
    /// The database is not the one that was backed up.
    #[error("the backup is damaged: {} has {found} and the manifest says {expected}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// The stream ended early.
    #[error("the backup is not whole: {0}")]
    Truncated(&'static str),
}

/// A backup that is being written; what is not finished is removed.
pub struct ArchiveWriter {
    target: PathBuf,
    partial: PathBuf,
    file: File,
    digest: Context,
    bytes: u64,
    header: wire::BackupHeader,
}

impl ArchiveWriter {
    /// Begins a backup that is to become `target`.
    ///
    /// # Errors
    /// `target` exists, or can't be written beside.
    pub fn create(target: &Path, header: wire::BackupHeader) -> Result<Self, ArchiveError> {
        if fs::symlink_metadata(target).is_ok() {
            return Err(ArchiveError::Exists(target.to_owned()));
        }
        let mut name = target.as_os_str().to_owned();
        name.push(format!(".partial-{}", std::process::id()));
        let partial = PathBuf::from(name);
        if let Some(parent) = parent(target) {
            fs::create_dir_all(parent).map_err(failed(parent))?;
        }
        fs::create_dir(&partial).map_err(failed(&partial))?;
        let path = partial.join(DATABASE);
        let file = File::create_new(&path).map_err(failed(&path))?;
        Ok(Self { target: target.to_owned(), partial, file, digest: Context::new(&SHA256), bytes: 0, header })
    }

    /// Adds the next bytes of the database.
    ///
    /// # Errors
    /// They can't be written.
    pub fn write(&mut self, chunk: &[u8]) -> Result<(), ArchiveError> {
        self.digest.update(chunk);
        self.bytes += chunk.len() as u64;
        self.file.write_all(chunk).map_err(failed(&self.partial))
    }

    /// Checks that all has come, and gives the backup its name.
    ///
    /// # Errors
    /// Bytes are missing or are not those that were sent, or `target` has come to exist.
    pub fn finish(self, sha256: &[u8]) -> Result<Manifest, ArchiveError> {
        let digest = self.digest.clone().finish();
        if self.bytes != self.header.size_bytes || digest.as_ref() != sha256 {
            return Err(ArchiveError::Truncated("what came is not what was sent"));
        }
        let taken_at = self.header.taken_at.map_or_else(Timestamp::now, Into::into);
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            revision: self.header.revision,
            schema_version: self.header.schema_version,
            bytes: self.bytes,
            sha256: hex::encode(sha256),
            taken_at: time::to_text(taken_at),
        };
        self.file.sync_all().map_err(failed(&self.partial))?;
        let path = self.partial.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|source| ArchiveError::Manifest { path: path.clone(), source })?;
        File::create_new(&path)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .and_then(|()| sync_dir(&self.partial))
            .map_err(failed(&path))?;
        // A directory takes the place of an empty one only, so nothing is lost to whoever was faster.
        fs::rename(&self.partial, &self.target)
            .and_then(|()| sync_dir(parent(&self.target).unwrap_or(Path::new("."))))
            .map_err(failed(&self.target))?;
        Ok(manifest)
    }
}

impl Drop for ArchiveWriter {
    fn drop(&mut self) {
        // After it was finished there is nothing of that name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// A backup whose digest is right.
#[derive(Debug)]
pub struct Archive {
    /// What it is.
    pub manifest: Manifest,
    pub(crate) database: PathBuf,
}

impl Archive {
    /// Checks a backup.
    ///
    /// # Errors
    /// It is none, not whole, changed, or of a newer program.
    pub fn open(dir: &Path) -> Result<Self, ArchiveError> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(failed(&path))?;
        let version: FormatVersion =
            serde_json::from_slice(&text).map_err(|source| ArchiveError::Manifest { path: path.clone(), source })?;
        if version.format_version != FORMAT_VERSION {
            return Err(ArchiveError::NewerFormat(version.format_version));
        }
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|source| ArchiveError::Manifest { path, source })?;
        let database = dir.join(DATABASE);
        let damaged =
            |found: String, expected: String| ArchiveError::Damaged { path: database.clone(), found, expected };
        let bytes = fs::metadata(&database).map_err(failed(&database))?.len();
        if bytes != manifest.bytes {
            return Err(damaged(format!("{bytes} bytes"), format!("{} bytes", manifest.bytes)));
        }
        let sha256 = digest(&database).map_err(failed(&database))?;
        if sha256 != manifest.sha256 {
            return Err(damaged(format!("SHA-256 {sha256}"), manifest.sha256));
        }
        Ok(Self { manifest, database })
    }
}

/// What any version of the manifest has.
#[derive(Deserialize)]
struct FormatVersion {
    format_version: u32,
}

fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(digest.finish())),
            read => digest.update(&buffer[..read]),
        }
    }
}

/// Makes the names in a directory survive a power loss.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
    let path = path.to_owned();
    move |source| ArchiveError::Io { path, source }
}
