//! The directory of images: what is there, and how something new gets there.

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use blixard::id::{NAME_ALLOWED, is_name};
use blixard_vmhost::hypervisor::{MANIFEST, Manifest};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::{ImageError, oci::Digest};

/// Begins the names of what is not complete. No image's name begins with a dot.
const DRAFT: &str = ".draft-";

/// The images below a directory.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

/// An image as it lies there.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its manifest, or why it can't be booted.
    pub manifest: Result<Manifest, String>,
    /// SHA-256 of the manifest, which has the digests of the rest.
    pub digest: String,
    /// The size of its files together. Those linked from another image are counted for each.
    pub bytes: u64,
}

impl Store {
    /// The images below this directory.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every image, sorted by name; none when the directory is not there yet.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn list(&self) -> Result<Vec<Entry>, ImageError> {
        let mut entries: Vec<Entry> = self.names()?.into_iter().map(|name| self.entry(name)).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn names(&self) -> Result<Vec<String>, ImageError> {
        let failed = |error| ImageError::io(self.dir.display(), error);
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().into_string().ok().filter(|name| is_name(name));
            names.extend(name.filter(|_| entry.path().join(MANIFEST).exists()));
        }
        Ok(names)
    }

    fn entry(&self, name: String) -> Entry {
        let dir = self.dir.join(&name);
        let files = fs::read_dir(&dir).into_iter().flatten().flatten();
        let bytes = files.filter_map(|file| file.metadata().ok()).filter(|file| file.is_file()).map(|file| file.len());
        let manifest = Manifest::read(&dir).and_then(|manifest| manifest.check(&dir).map(|()| manifest));
        let digest = fs::read(dir.join(MANIFEST)).map(|bytes| Digest::of(&bytes).hex().to_owned());
        Entry { bytes: bytes.sum(), manifest, digest: digest.unwrap_or_default(), name }
    }

    /// An image's directory.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn find(&self, name: &str) -> Result<PathBuf, ImageError> {
        let dir = self.dir.join(name);
        if is_name(name) && dir.join(MANIFEST).exists() {
            return Ok(dir);
        }
        let mut known = self.names()?;
        known.sort();
        Err(ImageError::NotFound { name: name.to_owned(), known })
    }

    /// Removes an image: at once as far as anybody can see.
    ///
    /// # Errors
    /// There is none of this name, or it can't be removed.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let dir = self.find(name)?;
        let draft = self.draft()?;
        fs::rename(&dir, draft.path().join("removed")).map_err(|error| ImageError::io(dir.display(), error))
    }

    /// Removes what imports left that did not come to their end, and says how many there were.
    ///
    /// # Errors
    /// The directory can't be read, or something in it not removed.
    pub fn collect_garbage(&self) -> Result<usize, ImageError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            entries => entries.map_err(|error| ImageError::io(self.dir.display(), error))?,
        };
        let mut removed = 0;
        for entry in
            entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(DRAFT.as_bytes()))
        {
            let path = entry.path();
            // A lock goes with its process, however that ended.
            let Ok(_lock) = lock(&path) else { continue };
            match fs::remove_dir_all(&path) {
                Ok(()) => removed += 1,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(ImageError::io(path.display(), error)),
            }
        }
        Ok(removed)
    }

    /// Whether a new image may have this name.
    pub(super) fn check_name(&self, name: &str, replace: bool) -> Result<(), ImageError> {
        if !is_name(name) {
            return Err(ImageError::invalid(
                &format!("\"{name}\""),
                &format!("is no name for an image: {NAME_ALLOWED}"),
            ));
        }
        match fs::symlink_metadata(self.dir.join(name)) {
            Ok(_) if !replace => Err(ImageError::Exists(name.to_owned())),
            _ => Ok(()),
        }
    }

    /// A place to make an image in.
    pub(super) fn draft(&self) -> Result<Draft, ImageError> {
        let failed = |error| ImageError::io(self.dir.display(), error);
        fs::create_dir_all(&self.dir).map_err(failed)?;
        self.collect_garbage()?;
        loop {
            let dir = tempfile::Builder::new().prefix(DRAFT).tempdir_in(&self.dir).map_err(failed)?;
            match lock(dir.path()) {
                Ok(lock) => return Ok(Draft { image: dir.path().join("image"), dir, _lock: lock }),
                // Another's collection of garbage came between.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::WouldBlock) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Makes a draft the image of this name.
    pub(super) fn commit(&self, draft: Draft, name: &str, replace: bool) -> Result<(), ImageError> {
        let target = self.dir.join(name);
        let failed = |error: io::Error| match error.kind() {
            ErrorKind::AlreadyExists => ImageError::Exists(name.to_owned()),
            _ => ImageError::io(target.display(), error),
        };
        sync_all(&draft.image).map_err(failed)?;
        let renamed = match renameat_with(CWD, &draft.image, CWD, &target, RenameFlags::NOREPLACE) {
            // The old one takes the draft's place, and goes with it.
            Err(rustix::io::Errno::EXIST) if replace => {
                renameat_with(CWD, &draft.image, CWD, &target, RenameFlags::EXCHANGE)
            }
            renamed => renamed,
        };
        renamed.map_err(|error| failed(error.into()))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(|error| ImageError::io(self.dir.display(), error))
    }
}

/// Locks a directory, if it is still the one of this name.
fn lock(path: &Path) -> io::Result<File> {
    let dir = File::open(path)?;
    flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    fs::symlink_metadata(path)?;
    Ok(dir)
}

/// The image's files must be whole before its name is.
fn sync_all(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        File::open(entry?.path())?.sync_all()?;
    }
    File::open(dir)?.sync_all()
}

/// What is not complete yet. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Draft {
    /// What becomes the image's directory.
    pub(super) image: PathBuf,
    dir: tempfile::TempDir,
    _lock: File,
}

impl Draft {
    /// For what is needed only while the image is made.
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }
}
