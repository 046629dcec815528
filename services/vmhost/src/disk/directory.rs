//! The files of a directory of this machine, taken as they are: where a link points is nobody's business here, and nothing is opened
//! through one. Whoever may write to the directory can so give away nothing that lies outside it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Seek as _},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path as HostPath, PathBuf},
};

use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat, statat},
};
use sha2::{Digest as _, Sha256};

use super::{
    erofs::Contents,
    tree::{Attributes, Change, Content, Inode, Kind, Path},
};

/// What to do with devices and FIFOs. Sockets are always left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    Keep,
    LeaveOut,
}

/// Why a directory can't be read.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct ReadError {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub source: io::Error,
}

/// What is in a directory.
#[derive(Debug)]
pub struct Listing {
    /// The files, for a tree.
    pub changes: Vec<Change>,
    /// Another one when any file has changed, whatever of it has.
    pub stamp: [u8; 32],
}

/// A directory of this machine.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    root: OwnedFd,
    device: u64,
    own: (u32, u32),
}

impl Directory {
    /// Opens it; it may be a link itself.
    ///
    /// # Errors
    /// It is none, or can't be read.
    pub fn open(path: &HostPath) -> Result<Self, ReadError> {
        let failed = |error: rustix::io::Errno| ReadError { path: path.to_owned(), source: error.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let device = fstat(&root).map_err(failed)?.st_dev;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Self { path: path.to_owned(), root, device, own })
    }

    /// Lists everything in it but other file systems that are mounted below, extended attributes, and sockets. What belongs to the caller
    /// is listed as root's, so that nobody needs to be root.
    ///
    /// # Errors
    /// Something can't be read, or there are more than `most` files.
    pub fn list(&self, special: Special, most: usize) -> Result<Listing, ReadError> {
        let mut list = Lister { of: self, special, changes: vec![], hasher: Sha256::new(), seen: BTreeMap::new() };
        // Depth first, with a list of its own instead of recursion.
        let mut ahead = vec![Path::new()];
        while let Some(path) = ahead.pop() {
            let failed = |source: io::Error| ReadError { path: self.path.join(relative(&path)), source };
            let dir = self.open_below(&path, OFlags::DIRECTORY).map_err(failed)?;
            if path.is_empty() {
                list.add(&dir, &path, &fstat(&dir).map_err(|error| failed(error.into()))?).map_err(failed)?;
            }
            let entries = Dir::read_from(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            let entries = entries.map_err(|error| failed(error.into()))?;
            let names = entries.iter().map(|entry| entry.file_name().to_bytes().to_vec());
            let mut names: Vec<Vec<u8>> = names.filter(|name| name != b"." && name != b"..").collect();
            names.sort_unstable();
            for name in names {
                let mut below = path.clone();
                below.push(name.clone());
                let failed = |source: io::Error| ReadError { path: self.path.join(relative(&below)), source };
                let stat = statat(&dir, OsStr::from_bytes(&name), AtFlags::SYMLINK_NOFOLLOW);
                let stat = stat.map_err(|error| failed(error.into()))?;
                if list.add(&dir, &below, &stat).map_err(failed)? && stat.st_dev == self.device {
                    ahead.push(below);
                }
            }
            if list.changes.len() > most {
                return Err(failed(io::Error::other(format!("there are more than {most} files"))));
            }
        }
        Ok(Listing { changes: list.changes, stamp: list.hasher.finalize().into() })
    }

    fn open_below(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { PathBuf::from(".") } else { relative(path) };
        // Without waiting: a file may have become a FIFO.
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(openat2(&self.root, path, flags, Mode::empty(), resolve)?)
    }
}

impl Contents for Directory {
    fn open(&self, content: &Content, offset: u64) -> io::Result<Box<dyn Read + '_>> {
        let Content::Host { path, .. } = content else { return Err(io::ErrorKind::NotFound.into()) };
        let mut file = File::from(self.open_below(path, OFlags::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other(format!("{} is no file any more", relative(path).display())));
        }
        file.seek(io::SeekFrom::Start(offset))?;
        Ok(Box::new(file))
    }
}

fn relative(path: &Path) -> PathBuf {
    path.iter().map(|name| OsString::from_vec(name.clone())).collect()
}

struct Lister<'a> {
    of: &'a Directory,
    special: Special,
    changes: Vec<Change>,
    hasher: Sha256,
    /// Files with several names.
    seen: BTreeMap<u64, Path>,
}

impl Lister<'_> {
    /// Takes in what is in `dir` under the last name of `path`. Whether it is a directory.
    fn add(&mut self, dir: &OwnedFd, path: &Path, stat: &Stat) -> io::Result<bool> {
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let kind = match file_type {
            FileType::Directory => Kind::Directory(BTreeMap::new()),
            FileType::RegularFile => Kind::File(Content::Host { path: path.clone(), len: unsigned(stat.st_size) }),
            FileType::Symlink => {
                let name = path.last().map_or(OsStr::new(""), |name| OsStr::from_bytes(name));
                Kind::Symlink(readlinkat(dir, name, Vec::new())?.into_bytes())
            }
            _ if self.special == Special::LeaveOut => return Ok(false),
            FileType::Fifo => Kind::Fifo,
            FileType::CharacterDevice => {
                Kind::CharDevice { major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) }
            }
            FileType::BlockDevice => {
                Kind::BlockDevice { major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) }
            }
            FileType::Socket | FileType::Unknown => return Ok(false),
        };
        self.stamp(path, &kind, stat);
        if file_type != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.seen.get(&stat.st_ino) {
                self.changes.push(Change::Link(path.clone(), first.clone()));
                return Ok(false);
            }
            self.seen.insert(stat.st_ino, path.clone());
        }
        let (own_uid, own_gid) = self.of.own;
        let attributes = Attributes {
            mode: u16::try_from(stat.st_mode & 0o7777).unwrap_or(0),
            uid: if stat.st_uid == own_uid { 0 } else { stat.st_uid },
            gid: if stat.st_gid == own_gid { 0 } else { stat.st_gid },
            mtime: unsigned(stat.st_mtime),
            xattrs: BTreeMap::new(),
        };
        self.changes.push(Change::Add(path.clone(), Inode { kind, attributes }));
        Ok(file_type == FileType::Directory)
    }

    /// The time of the last change of a file, which nobody can set, moves with its content, its attributes and its names.
    fn stamp(&mut self, path: &Path, kind: &Kind, stat: &Stat) {
        for name in path {
            self.hasher.update(name);
            self.hasher.update([0]);
        }
        if let Kind::Symlink(target) = kind {
            self.hasher.update(target);
        }
        let times = [(stat.st_mtime, stat.st_mtime_nsec), (stat.st_ctime, stat.st_ctime_nsec)];
        let times = times.map(|(seconds, nanoseconds)| format!("{seconds}.{nanoseconds}"));
        let (mode, owner) = (stat.st_mode, (stat.st_uid, stat.st_gid));
        let of_file = format!("\0{mode} {owner:?} {} {} {} {times:?}\n", stat.st_dev, stat.st_ino, stat.st_size);
        self.hasher.update(of_file);
    }
}

/// A size, or a time: one before 1970 is no reason to refuse a file.
fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    use super::*;

    fn names(listing: &Listing) -> Vec<String> {
        let path = |change: &Change| match change {
            Change::Add(path, _) | Change::Link(path, _) => relative(path).display().to_string(),
            Change::Remove(_) | Change::Empty(_) => unreachable!("nothing is taken away"),
        };
        let mut names: Vec<String> = listing.changes.iter().map(path).collect();
        names.sort();
        names
    }

    #[test]
    fn a_listing_has_files_and_links_as_they_are_and_no_special_files() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::write(at("sub/file"), "x").unwrap();
        fs::hard_link(at("sub/file"), at("again")).unwrap();
        symlink("/etc", at("out")).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let listing = directory.list(Special::LeaveOut, 100).unwrap();
        assert_eq!(names(&listing), ["", "again", "out", "sub", "sub/file"]);
        let kept = directory.list(Special::Keep, 100).unwrap();
        assert_eq!(names(&kept), ["", "again", "fifo", "out", "sub", "sub/file"]);
        assert_eq!(directory.list(Special::LeaveOut, 100).unwrap().stamp, listing.stamp);
        let error = directory.list(Special::LeaveOut, 4).unwrap_err();
        assert_eq!(error.source.to_string(), "there are more than 4 files");
    }

    /// The clock of files moves with the timer's interrupt: waits until it has.
    fn await_tick(path: &HostPath) {
        let time = |path: &HostPath| {
            let stat = rustix::fs::lstat(path).unwrap();
            (stat.st_ctime, stat.st_ctime_nsec)
        };
        let (probe, began) = (tempfile::NamedTempFile::new().unwrap(), std::time::Instant::now());
        let latest = fs::read_dir(path).unwrap().map(|entry| time(&entry.unwrap().path())).chain([time(path)]).max();
        while Some(time(probe.path())) <= latest {
            assert!(began.elapsed().as_secs() < 60, "the clock stands still");
            fs::write(probe.path(), "x").unwrap();
        }
    }

    #[test]
    fn whatever_changes_changes_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "one").unwrap();
        let stamp = || Directory::open(dir.path()).unwrap().list(Special::LeaveOut, 100).unwrap().stamp;
        let mut before = stamp();
        let modified = fs::metadata(at("file")).unwrap().modified().unwrap();
        let steps: [&dyn Fn(); 5] = [
            // The same size, and the time set back.
            &|| {
                fs::write(at("file"), "two").unwrap();
                fs::File::options().write(true).open(at("file")).unwrap().set_modified(modified).unwrap();
            },
            &|| fs::write(at("new"), "").unwrap(),
            &|| fs::rename(at("new"), at("other")).unwrap(),
            &|| symlink("a", at("link")).unwrap(),
            &|| fs::remove_file(at("other")).unwrap(),
        ];
        for (number, step) in steps.iter().enumerate() {
            await_tick(dir.path());
            step();
            let after = stamp();
            assert_ne!(after, before, "step {number}");
            before = after;
        }
    }

    #[test]
    fn nothing_is_opened_through_a_link_that_took_a_files_place() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let content = |path: &[&str]| {
            let path: Path = path.iter().map(|name| name.as_bytes().to_vec()).collect();
            Content::Host { path, len: 6 }
        };
        symlink(outside.path(), dir.path().join("sub")).unwrap();
        symlink(outside.path().join("secret"), dir.path().join("file")).unwrap();
        for path in [&["sub", "secret"][..], &["file"], &["..", "x"], &["missing"]] {
            assert!(directory.open(&content(path), 0).is_err(), "{path:?}");
        }
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        assert!(directory.open(&content(&["fifo"]), 0).is_err(), "and it does not wait for a writer");
    }
}
