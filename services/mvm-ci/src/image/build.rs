//! Images that are made here: the default one by its script, others from a directory that holds a root's files.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _, fs::MetadataExt as _},
    path::Path as HostPath,
    process::Command,
};

use super::{
    ImageError, Told,
    import::{self, Base, Settings},
    oci::Execution,
    store::{Entry, Store},
    tree::{Attributes, Change, Content, Inode, Kind, Path, Tree},
};

/// Beside the flake.
const SCRIPT: &str = "guest-image.sh";

/// Makes the default image, as `make guest-image` does: kernel, busybox and the agent of these sources.
///
/// # Errors
/// The script is not there, or failed; it has said why.
pub fn run_script(flake_dir: &HostPath, store: &Store) -> Result<Entry, ImageError> {
    let script = flake_dir.join(SCRIPT);
    if !script.exists() {
        let problem = "is not there: it comes with the sources; name their directory microvms with --flake-dir";
        return Err(ImageError::invalid(&script.display().to_string(), problem));
    }
    // Our stdout is for the result.
    let status = Command::new("bash").arg(&script).arg(store.dir()).stdout(io::stderr()).status();
    let status = status.map_err(|error| ImageError::io("bash", error))?;
    if !status.success() {
        return Err(ImageError::invalid(&script.display().to_string(), &format!("failed ({status})")));
    }
    let made = store.list()?.into_iter().find(|entry| entry.name == blixard::limits::DEFAULT_IMAGE);
    made.ok_or_else(|| ImageError::invalid(&script.display().to_string(), "made no image"))
}

/// Makes an image whose root are the files of a directory. What belongs to the caller will belong to root, so that nobody
/// needs to be root; other file systems mounted below, sockets and extended attributes are left out.
///
/// # Errors
/// Nothing has changed then.
pub fn from_directory(store: &Store, settings: &Settings, dir: &HostPath, told: Told<'_>) -> Result<Entry, ImageError> {
    store.check_name(&settings.name, settings.replace)?;
    let base = Base::find(store, &settings.base)?;
    let draft = store.draft()?;
    let mut tree = Tree::new();
    let mut walk = Walk::new(dir).map_err(|error| ImageError::io(dir.display(), error))?;
    walk.visit(dir, &vec![])?;
    let conflict = |conflict| ImageError::invalid(&dir.display().to_string(), &format!("makes no sense: {conflict}"));
    tree.apply(walk.changes).map_err(conflict)?;
    import::write(&base, settings, &mut tree, &[], &Execution::default(), &draft, told)?;
    import::finish(store, settings, draft)
}

struct Walk {
    device: u64,
    changes: Vec<Change>,
    /// Files with several names.
    seen: BTreeMap<u64, Path>,
    own: (u32, u32),
}

impl Walk {
    fn new(dir: &HostPath) -> io::Result<Self> {
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Self { device: fs::metadata(dir)?.dev(), changes: vec![], seen: BTreeMap::new(), own })
    }

    /// Depth first, with a list of its own instead of recursion.
    fn visit(&mut self, dir: &HostPath, root: &Path) -> Result<(), ImageError> {
        let mut ahead = vec![(dir.to_owned(), root.clone())];
        while let Some((here, path)) = ahead.pop() {
            let failed = |error| ImageError::io(here.display(), error);
            // The directory itself may be a link; nothing below it is followed.
            let metadata = if path.is_empty() { fs::metadata(&here) } else { fs::symlink_metadata(&here) };
            let metadata = metadata.map_err(failed)?;
            if !self.add(&here, &path, &metadata).map_err(failed)? || metadata.dev() != self.device {
                continue;
            }
            for entry in fs::read_dir(&here).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let mut below = path.clone();
                below.push(entry.file_name().as_bytes().to_vec());
                ahead.push((entry.path(), below));
            }
        }
        Ok(())
    }

    /// Whether it is a directory.
    fn add(&mut self, here: &HostPath, path: &Path, metadata: &fs::Metadata) -> io::Result<bool> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            return Ok(false);
        }
        if !kind.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = self.seen.get(&metadata.ino()) {
                self.changes.push(Change::Link(path.clone(), first.clone()));
                return Ok(false);
            }
            self.seen.insert(metadata.ino(), path.clone());
        }
        let kind = if kind.is_dir() {
            Kind::Directory(BTreeMap::new())
        } else if kind.is_symlink() {
            Kind::Symlink(fs::read_link(here)?.as_os_str().as_bytes().to_vec())
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_file() {
            Kind::File(Content::Host { path: here.to_owned(), len: metadata.len() })
        } else {
            let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
            if kind.is_char_device() { Kind::CharDevice { major, minor } } else { Kind::BlockDevice { major, minor } }
        };
        let is_directory = matches!(kind, Kind::Directory(_));
        let attributes = Attributes {
            mode: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0),
            uid: if metadata.uid() == self.own.0 { 0 } else { metadata.uid() },
            gid: if metadata.gid() == self.own.1 { 0 } else { metadata.gid() },
            mtime: u64::try_from(metadata.mtime()).unwrap_or(0),
            xattrs: BTreeMap::new(),
        };
        self.changes.push(Change::Add(path.clone(), Inode { kind, attributes }));
        Ok(is_directory)
    }
}
