//! The disks that VMs have beside their roots.
//!
//! ```text
//!   a name ─► a disk image of the operator's ─────────────────────────────► attached read-only as it is
//!          └► a directory ─► list, stamp ─► volumes/NAME-STAMP.erofs ─ link ─► VM_STATE_DIR/<vm>/machine/disk0
//!   scratch ─► a sparse file with an empty ext4 ──────────────────────────► VM_STATE_DIR/<vm>/machine/disk1
//! ```
//! What is made for a VM lies in its launch's directory and goes with it, whoever dies when. A directory's image is made once for as long
//! as the directory stays as it is: links keep it for the VMs that have it, and the newest one is kept for the next. What is half made has
//! one name for each volume, and is removed at the next start.
//!
//! Nobody who asks for a volume says a path. This must not know about jobs or hypervisors.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use blixard::{
    error::{Error, Reason, invalid},
    pb::guest::v1::Mount,
    volume::{Source, Volumes},
};
use tokio_util::sync::CancellationToken;

use crate::{
    absent::gone,
    blocking::blocking,
    disk::{
        directory::{Directory, Listing, Special},
        erofs::Plan,
        ext4,
        tree::Tree,
    },
    hypervisor::Disk,
    pressure,
};

/// The directory of directories' images, in the VM state directory.
const CACHE: &str = "volumes";
const IMAGE: &str = "erofs";
/// Ends the name of an image that is being written.
const NEW: &str = "new";
/// Files of a directory: what is told of each is in memory while its image is made, some hundred bytes.
const MAX_FILES: usize = 1_000_000;
/// So often a directory that changes while it is read is read.
const TRIES: usize = 3;
/// Where ext4 has its magic number, and what that is.
const EXT4_MAGIC: (u64, [u8; 2]) = (1080, [0x53, 0xef]);
const EROFS_MAGIC: (u64, [u8; 4]) = (1024, [0xe2, 0xe1, 0xf5, 0xe0]);
/// As often as its size a scratch disk may take of the disk: a file system may have a file's bytes three times, as ZFS with `copies=3`, and needs
/// room to find them.
const MOST_TAKEN: u64 = 4;
const BYTES_PER_MIB: u64 = 1024 * 1024;

/// Why a VM can't have a volume, in words.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// There is none of this name.
    #[error("this node has no volume \"{0}\"")]
    Unknown(String),
    /// What the operator named can't be used.
    #[error("the volume \"{name}\" can't be used: {problem}")]
    Unusable {
        /// The volume.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Somebody writes to it.
    #[error("the volume \"{0}\" changes while it is read; try again when nobody writes to its directory")]
    Changing(String),
    /// There is no room for its image.
    #[error("there is no room for the image of the volume \"{name}\": it takes {needed} MiB, and {left} MiB are left")]
    NoRoom {
        /// The volume.
        name: String,
        /// What it takes.
        needed: u64,
        /// What there is.
        left: u64,
    },
    /// A scratch disk can't be made.
    #[error("a scratch disk can't be made: {0}")]
    Scratch(#[source] io::Error),
}

/// A VM's disks, and what its guest is told of them.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    pub(crate) disks: Vec<Disk>,
    pub(crate) mounts: Vec<Mount>,
}

/// The volumes of a node.
#[derive(Debug)]
pub(crate) struct VolumeStore {
    cache: PathBuf,
    by_name: BTreeMap<String, Named>,
    /// What was wrong with each when it was last looked at.
    problems: Mutex<BTreeMap<String, String>>,
    ending: CancellationToken,
}

#[derive(Debug)]
struct Named {
    path: PathBuf,
    /// Held by who makes its image: others wait, and find it.
    making: Arc<tokio::sync::Mutex<()>>,
}

/// What a name stands for now.
#[derive(Debug)]
enum Kind {
    Image(&'static str),
    Directory,
}

impl VolumeStore {
    /// Takes the names, and removes images that are none of theirs. When `ending` is cancelled, images are made no further.
    pub(crate) fn open(
        paths: &BTreeMap<String, String>,
        state_dir: &Path,
        ending: CancellationToken,
    ) -> io::Result<Self> {
        let cache = state_dir.join(CACHE);
        let named = |(name, path): (&String, &String)| {
            let making = Arc::default();
            Ok((name.clone(), Named { path: std::path::absolute(path)?, making }))
        };
        let by_name = paths.iter().map(named).collect::<io::Result<_>>()?;
        let store = Self { cache, by_name, problems: Mutex::default(), ending };
        store.sweep(|name, file| store.by_name.contains_key(name) && !file.ends_with(NEW));
        Ok(store)
    }

    /// Those that VMs can have now, sorted. What is wrong with others is in the log, once.
    pub(crate) fn offered(&self) -> Vec<String> {
        let mut offered = Vec::new();
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, named) in &self.by_name {
            match kind_of(&named.path) {
                Ok(_) => {
                    problems.remove(name);
                    offered.push(name.clone());
                }
                Err(problem) => {
                    if problems.get(name) != Some(&problem) {
                        tracing::warn!(volume = name, problem, "a volume can't be used: no VM of this node gets it");
                        problems.insert(name.clone(), problem);
                    }
                }
            }
        }
        offered
    }

    /// Whether this node could ever give a VM these.
    pub(crate) fn admit(&self, volumes: &Volumes, disk: &Room) -> Result<(), Error> {
        let refuse = |value: &dyn std::fmt::Display, allowed: &str| {
            let error = invalid("config.volumes", value, allowed);
            Error { reason: Reason::ExceedsCapacity, ..error }
        };
        if let Some(name) = volumes.names().find(|name| !self.by_name.contains_key(*name)) {
            let known: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
            return Err(refuse(&name, &format!("the volumes of this node: {}", known.join(", "))));
        }
        if volumes.scratch_mib() > disk.total_mib {
            let allowed = format!(
                "scratch disks of at most {} MiB together, for the disk of this node has no more to give",
                disk.total_mib
            );
            return Err(refuse(volumes, &allowed));
        }
        Ok(())
    }

    /// Makes what a VM is to have, in its launch's directory.
    pub(crate) async fn prepare(
        self: &Arc<Self>,
        volumes: &Volumes,
        dir: &Path,
        room: impl Fn() -> io::Result<Room> + Clone + Send + 'static,
    ) -> Result<Prepared, VolumeError> {
        let mut prepared = Prepared::default();
        for (at, volume) in volumes.iter().enumerate() {
            let own = disk_in(dir, at);
            let (path, filesystem, read_only) = match &volume.source {
                Source::Name(name) => {
                    let (path, filesystem) = self.find(name, own, room.clone()).await?;
                    (path, filesystem, true)
                }
                Source::ScratchMib(mib) => {
                    let (mib, file) = (*mib, own.clone());
                    blocking(move || make_scratch(&file, mib)).await.map_err(VolumeError::Scratch)?;
                    (own, "ext4", false)
                }
            };
            let serial = format!("volume{at}");
            let mount_path = volume.mount_path.clone();
            let mount = Mount { serial: serial.clone(), filesystem: filesystem.to_owned(), mount_path, read_only };
            prepared.mounts.push(mount);
            prepared.disks.push(Disk { path, serial, read_only, filesystem });
        }
        Ok(prepared)
    }

    async fn find(
        self: &Arc<Self>,
        name: &str,
        link: PathBuf,
        room: impl Fn() -> io::Result<Room> + Send + 'static,
    ) -> Result<(PathBuf, &'static str), VolumeError> {
        let named = self.by_name.get(name).ok_or_else(|| VolumeError::Unknown(name.to_owned()))?;
        let unusable = |problem: String| VolumeError::Unusable { name: name.to_owned(), problem };
        match kind_of(&named.path).map_err(unusable)? {
            Kind::Image(filesystem) => return Ok((named.path.clone(), filesystem)),
            Kind::Directory => {}
        }
        let making = Arc::clone(&named.making).lock_owned().await;
        let (store, name, path, to) = (Arc::clone(self), name.to_owned(), named.path.clone(), link.clone());
        let linked = tokio::task::spawn_blocking(move || {
            // The thread keeps it: whoever waits for this may be gone before the image is done.
            let _making = making;
            store.link_image(&name, &path, &to, &room)
        });
        linked.await.map_err(|error| unusable_name(&self.cache, &error.into()))??;
        Ok((link, IMAGE))
    }

    /// Links the image of a directory to where a VM has its own; makes it when there is none of the directory as it is.
    fn link_image(
        &self,
        name: &str,
        path: &Path,
        link: &Path,
        room: &dyn Fn() -> io::Result<Room>,
    ) -> Result<(), VolumeError> {
        let unusable = |problem: String| VolumeError::Unusable { name: name.to_owned(), problem };
        let read = |directory: &Directory| {
            let listing = directory.list(Special::LeaveOut, MAX_FILES);
            listing.map_err(|error| unusable(format!("{error}: {}", error.source)))
        };
        let directory = Directory::open(path).map_err(|error| unusable(format!("{error}: {}", error.source)))?;
        let mut listing = read(&directory)?;
        for _ in 0..TRIES {
            let stamp = listing.stamp;
            let image = self.cache.join(format!("{name}-{}.{IMAGE}", hex::encode(stamp)));
            if !image.exists() {
                let new = self.cache.join(format!("{name}.{NEW}"));
                let written = self.write_image(name, &directory, listing, &new, room);
                listing = read(&directory)?;
                if listing.stamp != stamp {
                    continue;
                }
                written?;
                fs::rename(&new, &image).map_err(|error| unusable_name(&image, &error))?;
                // Of others that VMs have there are links.
                self.sweep(|owner, file| {
                    owner != name || Some(file) == image.file_name().and_then(|file| file.to_str())
                });
            }
            return fs::hard_link(&image, link).map_err(|error| unusable_name(link, &error));
        }
        Err(VolumeError::Changing(name.to_owned()))
    }

    fn write_image(
        &self,
        name: &str,
        directory: &Directory,
        listing: Listing,
        new: &Path,
        room: &dyn Fn() -> io::Result<Room>,
    ) -> Result<(), VolumeError> {
        let unusable = |problem: String| VolumeError::Unusable { name: name.to_owned(), problem };
        let failed = |error: io::Error| unusable_name(new, &error);
        let mut tree = Tree::default();
        tree.apply(listing.changes).map_err(|conflict| unusable(conflict.to_string()))?;
        let plan = Plan::of(&tree).map_err(|error| unusable(error.to_string()))?;
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&self.cache).map_err(failed)?;
        gone(fs::remove_file(new)).map_err(failed)?;
        let (needed, left) = (plan.bytes().div_ceil(BYTES_PER_MIB), room().map_err(failed)?.free_mib);
        if needed > left {
            return Err(VolumeError::NoRoom { name: name.to_owned(), needed, left });
        }
        // Nobody writes to it any more, and only who may enter a directory that has it may read it.
        let file = File::options().write(true).create_new(true).mode(0o444).open(new).map_err(failed)?;
        let out = WhileServing { inner: file, ending: &self.ending };
        let mut out = BufWriter::with_capacity(1024 * 1024, out);
        plan.write(directory, &mut out, &mut |_| {}).map_err(|error| unusable(error.to_string()))?;
        out.flush().map_err(failed)
    }

    /// Removes the images that are not to be kept; asked with the volume's name and the file's.
    fn sweep(&self, keep: impl Fn(&str, &str) -> bool) {
        for entry in fs::read_dir(&self.cache).into_iter().flatten().flatten() {
            let file = entry.file_name().into_string().unwrap_or_default();
            let owner = file.strip_suffix(NEW).map_or_else(
                || file.rsplit_once('-').map_or("", |(owner, _)| owner),
                |owner| owner.trim_end_matches('.'),
            );
            if !keep(owner, &file)
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "a volume's old image can't be removed");
            }
        }
    }
}

fn unusable_name(path: &Path, error: &io::Error) -> VolumeError {
    VolumeError::Unusable { name: path.display().to_string(), problem: error.to_string() }
}

/// What is at a volume's path, or why it is of no use.
fn kind_of(path: &Path) -> Result<Kind, String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let metadata = fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Ok(Kind::Directory);
    }
    if !metadata.is_file() {
        return Err(format!("{} is neither a file nor a directory", path.display()));
    }
    let file = File::open(path).map_err(failed)?;
    let (mut ext4, mut erofs) = ([0; 2], [0; 4]);
    let is_ext4 = file.read_exact_at(&mut ext4, EXT4_MAGIC.0).is_ok() && ext4 == EXT4_MAGIC.1;
    let is_erofs = file.read_exact_at(&mut erofs, EROFS_MAGIC.0).is_ok() && erofs == EROFS_MAGIC.1;
    match (is_erofs, is_ext4) {
        (true, _) => Ok(Kind::Image("erofs")),
        (false, true) => Ok(Kind::Image("ext4")),
        (false, false) => Err(format!("{} has neither an erofs nor an ext4 file system on it", path.display())),
    }
}

fn make_scratch(path: &Path, mib: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    ext4::create(&file, mib, uuid::Uuid::new_v4().as_bytes())
}

/// What the file system of the VM state directory has to give, beside what must stay free: were it all taken, the node would not be short of
/// disk yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// If it were empty, in MiB.
    pub(crate) total_mib: u64,
    /// Of what is free and promised to no scratch disk, in MiB.
    pub(crate) free_mib: u64,
}

impl Room {
    /// Looks; `others` are the volumes of VMs that live, and their launches' directories.
    pub(crate) fn of(state_dir: &Path, others: impl Iterator<Item = (Volumes, PathBuf)>) -> io::Result<Self> {
        // First: what a disk takes meanwhile counts twice rather than not at all.
        let promised: u64 = others.map(|(volumes, dir)| still_to_take(&volumes, &dir)).sum();
        Ok(Self::on(&pressure::Disk::of(state_dir)?, promised))
    }

    fn on(disk: &pressure::Disk, promised: u64) -> Self {
        let mib = |bytes: u64| bytes.saturating_sub(disk.reserve_bytes()) / BYTES_PER_MIB;
        Self { total_mib: mib(disk.total_bytes), free_mib: mib(disk.free_bytes.saturating_sub(promised)) }
    }

    /// Whether so much more can be taken.
    pub(crate) fn fits(&self, mib: u64) -> bool {
        mib <= self.free_mib
    }

    /// Whether there is room for scratch disks of this size.
    pub(crate) fn check(&self, scratch_mib: u64) -> Result<(), Error> {
        if self.fits(scratch_mib) {
            return Ok(());
        }
        let message = format!(
            "this node's disk has {} MiB left beside its reserve and what scratch disks may still take, and the VM's take {scratch_mib}",
            self.free_mib
        );
        Err(Error::new(Reason::Overloaded, message).with("limit", self.free_mib))
    }
}

/// A VM's scratch disks in its launch's directory: of each that is there its size in bytes, and what the disk has of it.
fn scratch_disks(volumes: &Volumes, dir: &Path) -> impl Iterator<Item = (u64, Option<fs::Metadata>)> {
    volumes.iter().enumerate().filter_map(move |(at, volume)| match volume.source {
        Source::Name(_) => None,
        Source::ScratchMib(mib) => Some((mib * BYTES_PER_MIB, fs::metadata(disk_in(dir, at)).ok())),
    })
}

/// Where a VM's disk of this number is.
fn disk_in(dir: &Path, at: usize) -> PathBuf {
    dir.join(format!("disk{at}"))
}

fn taken(file: &fs::Metadata) -> u64 {
    file.blocks() * 512
}

/// What a VM's scratch disks may take beyond what they have taken.
fn still_to_take(volumes: &Volumes, dir: &Path) -> u64 {
    scratch_disks(volumes, dir).map(|(size, file)| size.saturating_sub(file.as_ref().map_or(0, taken))).sum()
}

/// What is wrong with a VM's scratch disks when one is larger than it was made. A guest can't do that, so it is the hypervisor's work: its
/// limit on the length of files is that of the longest, and none holds for what lies behind a file's end. Blocking: a `stat` for each.
pub(crate) fn overgrown(volumes: &Volumes, dir: &Path) -> Option<String> {
    let grown = |(size, file): (u64, Option<fs::Metadata>)| {
        let (length, taken) = file.map(|file| (file.len(), taken(&file)))?;
        let mib = |bytes: u64| bytes.div_ceil(BYTES_PER_MIB);
        (length > size || taken > size * MOST_TAKEN).then(|| {
            let (size, length, taken) = (mib(size), mib(length), mib(taken));
            format!("a scratch disk of {size} MiB is a file of {length} MiB and takes {taken} MiB")
        })
    };
    scratch_disks(volumes, dir).find_map(grown)
}

/// Writes through, until the program is to end: nobody waits for a large image then.
struct WhileServing<'a, W> {
    inner: W,
    ending: &'a CancellationToken,
}

impl<W: Write> Write for WhileServing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.ending.is_cancelled() {
            return Err(io::Error::other("this vmhost ends"));
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use blixard::volume::Volume;
    use proptest::prelude::*;

    use super::*;
    use crate::pressure::{Disk, Level};

    struct Bed {
        dir: tempfile::TempDir,
        launches: std::cell::Cell<u32>,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("tools/bin")).unwrap();
            fs::write(dir.path().join("tools/bin/tool"), "a tool").unwrap();
            Self { dir, launches: Default::default() }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn store(&self, volumes: &[(&str, &str)]) -> Arc<VolumeStore> {
            let path = |path: &str| self.at(path).to_str().unwrap().to_owned();
            let paths = volumes.iter().map(|(name, to)| ((*name).to_owned(), path(to))).collect();
            Arc::new(VolumeStore::open(&paths, &self.at("state"), CancellationToken::new()).unwrap())
        }

        async fn prepare(&self, store: &Arc<VolumeStore>, volumes: &[(&str, Source)]) -> Result<Prepared, String> {
            let volumes =
                volumes.iter().map(|(path, source)| Volume { mount_path: (*path).into(), source: source.clone() });
            let launch = self.launches.get();
            self.launches.set(launch + 1);
            let dir = self.at(&format!("state/launch{launch}"));
            fs::create_dir_all(&dir).unwrap();
            let room = || Ok(Room { total_mib: 1000, free_mib: 1000 });
            store.prepare(&volumes.collect(), &dir, room).await.map_err(|error| error.to_string())
        }

        fn cached(&self) -> Vec<String> {
            let entries = fs::read_dir(self.at("state/volumes")).into_iter().flatten().flatten();
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
        }
    }

    fn named(name: &str) -> Source {
        Source::Name(name.to_owned())
    }

    #[tokio::test]
    async fn a_directory_has_one_image_for_as_long_as_it_stays_as_it_is() {
        let bed = Bed::new();
        let store = bed.store(&[("tools", "tools")]);
        let inode = |prepared: &Prepared| fs::metadata(&prepared.disks[0].path).unwrap().ino();
        let first = bed.prepare(&store, &[("/tools", named("tools"))]).await.unwrap();
        let second = bed.prepare(&store, &[("/elsewhere", named("tools"))]).await.unwrap();
        assert_eq!(inode(&first), inode(&second));
        assert_eq!(first.mounts[0].filesystem, "erofs");
        assert!(first.mounts[0].read_only && first.disks[0].read_only);
        assert_eq!(bed.cached().len(), 1);

        fs::write(bed.at("tools/bin/other"), "another").unwrap();
        let third = bed.prepare(&store, &[("/tools", named("tools"))]).await.unwrap();
        assert_ne!(inode(&third), inode(&first));
        // The VMs that have the old one keep it; for others there is one.
        assert!(first.disks[0].path.exists());
        assert_eq!(bed.cached().len(), 1);
        // A later vmhost finds it, unless it has no such volume.
        fs::write(bed.at("state/volumes/tools.new"), "half of one").unwrap();
        let fourth = bed.prepare(&bed.store(&[("tools", "tools")]), &[("/tools", named("tools"))]).await.unwrap();
        assert_eq!((inode(&fourth), bed.cached().len()), (inode(&third), 1));
        bed.store(&[("others", "tools")]);
        assert_eq!(bed.cached(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn what_is_offered_is_what_can_be_used() {
        let bed = Bed::new();
        fs::write(bed.at("junk"), [0; 4096]).unwrap();
        make_scratch(&bed.at("disk"), 16).unwrap();
        let store = bed.store(&[("tools", "tools"), ("junk", "junk"), ("gone", "gone"), ("disk", "disk")]);
        assert_eq!(store.offered(), ["disk", "tools"]);
        let disk = bed.prepare(&store, &[("/disk", named("disk"))]).await.unwrap();
        assert_eq!((&disk.disks[0].path, disk.disks[0].filesystem), (&bed.at("disk"), "ext4"));
        let junk = bed.prepare(&store, &[("/junk", named("junk"))]).await.unwrap_err();
        assert!(junk.ends_with("junk has neither an erofs nor an ext4 file system on it"), "{junk}");
        let unknown = bed.prepare(&store, &[("/x", named("x"))]).await.unwrap_err();
        assert_eq!(unknown, "this node has no volume \"x\"");
        fs::create_dir(bed.at("gone")).unwrap();
        assert_eq!(store.offered(), ["disk", "gone", "tools"]);
    }

    #[tokio::test]
    async fn a_directory_for_whose_image_there_is_no_room_or_no_time_leaves_nothing() {
        let bed = Bed::new();
        fs::write(bed.at("tools/large"), vec![1; 3 << 20]).unwrap();
        let store = bed.store(&[("tools", "tools")]);
        let volumes: Volumes = [Volume { mount_path: "/t".into(), source: named("tools") }].into_iter().collect();
        let room = || Ok(Room { total_mib: 1000, free_mib: 2 });
        let error = store.prepare(&volumes, &bed.at("state"), room).await.unwrap_err().to_string();
        assert!(error.contains("it takes 4 MiB, and 2 MiB are left"), "{error}");
        store.ending.cancel();
        let error = bed.prepare(&store, &[("/t", named("tools"))]).await.unwrap_err();
        assert!(error.contains("this vmhost ends"), "{error}");
        bed.store(&[("tools", "tools")]);
        assert_eq!(bed.cached(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_directory_that_changes_while_it_is_read_is_read_again_and_then_refused() {
        let bed = Bed::new();
        let store = bed.store(&[("tools", "tools")]);
        let volumes: Volumes = [Volume { mount_path: "/t".into(), source: named("tools") }].into_iter().collect();
        // It is asked for room between listing and reading, and meanwhile somebody writes, so many times.
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let room = |writes: usize| {
            let (asked, log) = (Arc::clone(&asked), bed.at("tools/log"));
            move || {
                let number = asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                if number < writes {
                    fs::write(&log, vec![b'x'; number + 1])?;
                }
                Ok(Room { total_mib: 1000, free_mib: 1000 })
            }
        };
        let prepare = async |name: &str, writes| {
            let dir = bed.at(name);
            fs::create_dir_all(&dir).unwrap();
            asked.store(0, std::sync::atomic::Ordering::SeqCst);
            store.prepare(&volumes, &dir, room(writes)).await.map_err(|error| error.to_string())
        };
        let refused = prepare("state/one", TRIES).await.unwrap_err();
        let expected = "the volume \"tools\" changes while it is read; try again when nobody writes to its directory";
        assert_eq!(refused, expected);
        fs::remove_file(bed.at("tools/log")).unwrap();
        prepare("state/two", TRIES - 1).await.unwrap();
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), TRIES);
        let image = fs::read(bed.at("state/two/disk0")).unwrap();
        assert!(image.windows(TRIES - 1).any(|part| part.iter().all(|byte| *byte == b'x')), "what was written last");
        assert_eq!(bed.cached().len(), 1);
    }

    #[tokio::test]
    async fn a_scratch_disk_takes_no_room_before_it_is_written_to_and_all_of_it_is_promised() {
        let bed = Bed::new();
        let store = bed.store(&[]);
        let prepared = bed.prepare(&store, &[("/a", Source::ScratchMib(100))]).await.unwrap();
        let disk = &prepared.disks[0];
        assert!(!disk.read_only && !prepared.mounts[0].read_only);
        let metadata = fs::metadata(&disk.path).unwrap();
        assert_eq!(metadata.len(), 100 * BYTES_PER_MIB);
        assert!(metadata.blocks() * 512 < BYTES_PER_MIB, "{}", metadata.blocks());

        let volumes: Volumes =
            [Volume { mount_path: "/a".into(), source: Source::ScratchMib(100) }].into_iter().collect();
        let dir = disk.path.parent().unwrap();
        let before = still_to_take(&volumes, dir);
        assert!((99 * BYTES_PER_MIB..100 * BYTES_PER_MIB).contains(&before), "{before}");
        File::options().write(true).open(&disk.path).unwrap().write_all_at(&vec![1; 8 << 20], 50 << 20).unwrap();
        assert!(still_to_take(&volumes, dir) <= before - (8 << 20));
        assert_eq!(still_to_take(&volumes, &bed.at("nowhere")), 100 * BYTES_PER_MIB);
        let room = Room { total_mib: 100, free_mib: 50 };
        assert_eq!((room.check(50), room.check(51).unwrap_err().reason), (Ok(()), Reason::Overloaded));
        assert_eq!(store.admit(&volumes, &room), Ok(()));
        let room = Room { total_mib: 99, free_mib: 50 };
        assert_eq!(store.admit(&volumes, &room).unwrap_err().reason, Reason::ExceedsCapacity);
    }

    #[test]
    fn a_scratch_disk_that_is_longer_or_takes_more_than_it_may_is_noticed_and_a_full_one_is_not() {
        let bed = Bed::new();
        let volume = |path: &str, mib| Volume { mount_path: path.into(), source: Source::ScratchMib(mib) };
        let volumes: Volumes = [volume("/a", 64), volume("/b", 16)].into_iter().collect();
        assert_eq!(overgrown(&volumes, &bed.at("nowhere")), None);
        make_scratch(&bed.at("disk0"), 64).unwrap();
        make_scratch(&bed.at("disk1"), 16).unwrap();
        let disk = File::options().write(true).open(bed.at("disk1")).unwrap();
        disk.write_all_at(&vec![1; 16 << 20], 0).unwrap();
        let seen = || overgrown(&volumes, bed.dir.path());
        assert_eq!(seen(), None);

        // No longer than the other one is, so the kernel has nothing against it.
        disk.set_len((16 << 20) + 1).unwrap();
        let told = seen().unwrap();
        assert!(told.starts_with("a scratch disk of 16 MiB is a file of 17 MiB and takes 1"), "{told}");
        disk.set_len(16 << 20).unwrap();
        assert_eq!(seen(), None);
        // Behind its end.
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&disk, flags, 16 << 20, 64 << 20).unwrap();
        assert_eq!(seen().unwrap(), "a scratch disk of 16 MiB is a file of 16 MiB and takes 80 MiB");
    }

    proptest! {
        /// However large the disk, and however full: when every promise is kept to the last byte, the node is not short of disk.
        #[test]
        fn scratch_disks_that_are_all_full_leave_the_node_its_reserve(
            total_mib in 16..4_000_000_u64,
            used_percent in 0..100_u64,
            promised_percent in 0..100_u64,
        ) {
            let total_bytes = total_mib << 20;
            let free_bytes = total_bytes / 100 * (100 - used_percent);
            let promised = free_bytes / 100 * promised_percent;
            let disk = Disk { total_bytes, free_bytes, ..Disk::default() };
            let room = Room::on(&disk, promised);
            prop_assert!(room.free_mib <= room.total_mib && room.total_mib <= total_mib);
            prop_assert!(room.check(room.free_mib).is_ok() && room.check(room.free_mib + 1).is_err());
            if room.free_mib > 0 {
                let full = Disk { free_bytes: free_bytes - promised - (room.free_mib << 20), ..disk };
                prop_assert_eq!(full.level(Level::None), Level::None);
                let fuller = Disk { free_bytes: full.free_bytes.saturating_sub(1 << 20), ..disk };
                prop_assert!(fuller.level(Level::None) >= Level::Tight, "no more is kept than that takes");
            }
        }
    }
}
