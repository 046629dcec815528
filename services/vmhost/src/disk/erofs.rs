//! Writes a [`Tree`] as an EROFS file system: uncompressed, read-only, the same bytes for the same tree.
//!
//! ```text
//!   block 0      the superblock, at byte 1024
//!   block 1 …    inodes in breadth-first order: 64 bytes, extended attributes, the end of the content if it fits
//!   behind them  the whole blocks of contents and directories, in the same order
//! ```
//!
//! Own code, because the crates that write EROFS serve another purpose (composefs) or are weeks old, and the part of the
//! format that is needed here is small: no compression, no chunks, no shared attributes. EROFS rather than ext4, because
//! a file system that nobody will ever write to needs no allocator, journal or spare room. It is written once, front to
//! back. The format is Linux' `fs/erofs/erofs_fs.h`; `fsck.erofs` and the kernel are the judges, in the tests.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
};

use super::tree::{Content, Inode, InodeId, Kind, Name, ROOT, Tree};

/// The page size of every machine we run on: Linux before 6.4 mounts no other block size.
const BLOCK: u64 = 4096;
const MAGIC: u32 = 0xE0F5_E1E2;
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const INODE_BYTES: u64 = 64;
/// A nid counts these from the start of the file system.
const SLOT: u64 = 32;
/// Superblock, compatible: `i_mtime` is the time of the last change.
const FEATURE_MTIME: u32 = 2;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const DIRENT_BYTES: usize = 12;
const XATTR_HEADER_BYTES: usize = 12;
/// The most that `i_xattr_icount`, a count of four bytes each, can say.
const MAX_XATTR_BYTES: usize = 64 * 1024;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Why a tree can't be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(
        "the extended attributes of one file are more than {MAX_XATTR_BYTES} bytes, or \"{0}\" is none that EROFS can hold"
    )]
    Xattr(String),
    #[error("the files are more than EROFS can hold")]
    TooLarge,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Opens contents.
pub trait Contents {
    /// The bytes of a file from an offset on.
    fn open(&self, content: &Content, offset: u64) -> io::Result<Box<dyn Read + '_>>;
}

/// Where an inode is.
#[derive(Debug)]
struct Place {
    id: InodeId,
    parent: InodeId,
    /// Byte offset of the inode.
    at: u64,
    links: u32,
    xattr_bytes: u64,
    size: u64,
    /// How much of the content lies in blocks of its own, and from which block on.
    in_blocks: u64,
    block: u64,
}

impl Place {
    /// The end of the content that lies beside the inode.
    fn tail(&self) -> u64 {
        self.size - self.in_blocks.min(self.size)
    }

    fn nid(&self) -> u64 {
        self.at / SLOT
    }
}

/// The plan of a file system: all of it is placed before a byte is written.
pub struct Plan<'a> {
    tree: &'a Tree,
    places: Vec<Place>,
    /// Index in `places`.
    by_inode: BTreeMap<InodeId, usize>,
    blocks: u64,
}

impl<'a> Plan<'a> {
    pub fn of(tree: &'a Tree) -> Result<Self, WriteError> {
        let mut plan = Self { tree, places: vec![], by_inode: BTreeMap::new(), blocks: 0 };
        plan.find_all()?;
        plan.place()?;
        Ok(plan)
    }

    /// The size of the file system.
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK
    }

    /// Everything that has a name, breadth first, each once.
    fn find_all(&mut self) -> Result<(), WriteError> {
        self.found(ROOT, ROOT)?;
        let mut next = 0;
        while let Some(place) = self.places.get(next) {
            let (tree, id) = (self.tree, place.id);
            if let Kind::Directory(names) = &tree.inode(id).kind {
                let mut directories = 0;
                for &child in names.values() {
                    directories += u32::from(matches!(tree.inode(child).kind, Kind::Directory(_)));
                    self.found(child, id)?;
                }
                // Its name, its own ".", and ".." in each directory below.
                self.places[next].links = 2 + directories;
            }
            next += 1;
        }
        Ok(())
    }

    fn found(&mut self, id: InodeId, parent: InodeId) -> Result<(), WriteError> {
        if let Some(&index) = self.by_inode.get(&id) {
            self.places[index].links += 1;
            return Ok(());
        }
        let inode = self.tree.inode(id);
        let xattr_bytes = xattrs(inode)?.len() as u64;
        let size = match &inode.kind {
            Kind::Directory(names) => directory(names, |_| (0, 0), (0, 0)).len() as u64,
            Kind::File(content) => content.size(),
            Kind::Symlink(target) => target.len() as u64,
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => 0,
        };
        self.by_inode.insert(id, self.places.len());
        self.places.push(Place { id, parent, at: 0, links: 1, xattr_bytes, size, in_blocks: 0, block: 0 });
        Ok(())
    }

    fn place(&mut self) -> Result<(), WriteError> {
        let mut at = BLOCK;
        for place in &mut self.places {
            let head = INODE_BYTES + place.xattr_bytes;
            let tail = place.size % BLOCK;
            at = at.next_multiple_of(INODE_BYTES);
            if head + tail > BLOCK {
                place.in_blocks = place.size.next_multiple_of(BLOCK);
            } else {
                place.in_blocks = place.size - tail;
                // A tail must lie in one block.
                if tail > 0 && at % BLOCK + head + tail > BLOCK {
                    at = at.next_multiple_of(BLOCK);
                }
            }
            place.at = at;
            at += head + place.tail();
        }
        let mut block = at.div_ceil(BLOCK);
        for place in &mut self.places {
            place.block = block;
            block += place.in_blocks / BLOCK;
        }
        self.blocks = block;
        if u32::try_from(block).is_err() || u32::try_from(self.places.len()).is_err() {
            return Err(WriteError::TooLarge);
        }
        Ok(())
    }

    /// Writes it, and tells how much is done.
    pub fn write(
        &self,
        contents: &dyn Contents,
        out: &mut impl Write,
        told: &mut dyn FnMut(u64),
    ) -> Result<(), WriteError> {
        let mut out = Counted { out, at: 0 };
        out.pad_to(SUPERBLOCK_AT)?;
        out.write_all(&self.superblock())?;
        for place in &self.places {
            out.pad_to(place.at)?;
            out.write_all(&self.inode(place))?;
            out.write_all(&xattrs(self.tree.inode(place.id))?)?;
            self.copy(place, place.in_blocks.min(place.size)..place.size, contents, &mut out)?;
            told(out.at);
        }
        for place in self.places.iter().filter(|place| place.in_blocks > 0) {
            out.pad_to(place.block * BLOCK)?;
            self.copy(place, 0..place.in_blocks.min(place.size), contents, &mut out)?;
            told(out.at);
        }
        out.pad_to(self.bytes())?;
        Ok(())
    }

    fn superblock(&self) -> Vec<u8> {
        let root = u16::try_from(self.places[0].nid()).unwrap_or(0);
        let mut bytes = Vec::with_capacity(SUPERBLOCK_BYTES);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes()); // No checksum: the manifest has a digest of all of it.
        bytes.extend(FEATURE_MTIME.to_le_bytes());
        bytes.extend([12, 0]); // Block size as a power of two; no further slots.
        bytes.extend(root.to_le_bytes());
        bytes.extend((self.places.len() as u64).to_le_bytes());
        bytes.extend(0_u64.to_le_bytes()); // Time of making, and its nanoseconds: the same tree gives the same bytes.
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(low32(self.blocks).to_le_bytes());
        // Nids count from block 0; block of shared attributes; UUID; volume name; features that must be known; the rest.
        bytes.resize(SUPERBLOCK_BYTES, 0);
        bytes
    }

    fn inode(&self, place: &Place) -> Vec<u8> {
        let Inode { kind, attributes } = self.tree.inode(place.id);
        let (format, data) = match kind {
            Kind::Directory(_) => (S_IFDIR, low32(place.block)),
            Kind::File(_) => (S_IFREG, low32(place.block)),
            Kind::Symlink(_) => (S_IFLNK, low32(place.block)),
            Kind::CharDevice { major, minor } => (S_IFCHR, device(*major, *minor)),
            Kind::BlockDevice { major, minor } => (S_IFBLK, device(*major, *minor)),
            Kind::Fifo => (S_IFIFO, 0),
        };
        let layout = if place.tail() > 0 { FLAT_INLINE } else { FLAT_PLAIN };
        let xattr_count = match place.xattr_bytes {
            0 => 0,
            // At most MAX_XATTR_BYTES / 4.
            bytes => u16::try_from((bytes - XATTR_HEADER_BYTES as u64) / 4 + 1).unwrap_or(u16::MAX),
        };
        let mut bytes = Vec::new();
        bytes.extend((1 | layout << 1).to_le_bytes()); // The inode of 64 bytes.
        bytes.extend(xattr_count.to_le_bytes());
        bytes.extend((format | attributes.mode & 0o7777).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(place.size.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes.extend(low32(place.nid()).to_le_bytes());
        bytes.extend(attributes.uid.to_le_bytes());
        bytes.extend(attributes.gid.to_le_bytes());
        bytes.extend(attributes.mtime.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(place.links.to_le_bytes());
        bytes.resize(64, 0);
        bytes
    }

    fn copy(
        &self,
        place: &Place,
        range: std::ops::Range<u64>,
        contents: &dyn Contents,
        out: &mut impl Write,
    ) -> Result<(), WriteError> {
        let part = |bytes: &[u8], out: &mut dyn Write| {
            let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            out.write_all(&bytes[at(range.start)..at(range.end)])
        };
        match &self.tree.inode(place.id).kind {
            Kind::Directory(names) => {
                let entry = |id| (self.nid(id), self.file_type(id));
                part(&directory(names, entry, (place.nid(), self.nid(place.parent))), out)?;
            }
            Kind::Symlink(target) => part(target, out)?,
            Kind::File(Content::Bytes(bytes)) => part(bytes, out)?,
            Kind::File(content) if !range.is_empty() => {
                let wanted = range.end - range.start;
                if io::copy(&mut contents.open(content, range.start)?.take(wanted), out)? < wanted {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a file became shorter").into());
                }
            }
            Kind::File(_) | Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {}
        }
        Ok(())
    }

    fn nid(&self, id: InodeId) -> u64 {
        self.by_inode.get(&id).map_or(0, |&index| self.places[index].nid())
    }

    fn file_type(&self, id: InodeId) -> u8 {
        match self.tree.inode(id).kind {
            Kind::File(_) => 1,
            Kind::Directory(_) => DIRECTORY_TYPE,
            Kind::CharDevice { .. } => 3,
            Kind::BlockDevice { .. } => 4,
            Kind::Fifo => 5,
            Kind::Symlink(_) => 7,
        }
    }
}

const DIRECTORY_TYPE: u8 = 2;

/// A directory's content: in each block the fixed parts of the entries, then their names. All are sorted by name, `.` and
/// `..` among them, for the kernel searches by halves.
fn directory(names: &BTreeMap<Name, InodeId>, entry: impl Fn(InodeId) -> (u64, u8), own: (u64, u64)) -> Vec<u8> {
    let dots = [(&b"."[..], (own.0, DIRECTORY_TYPE)), (&b".."[..], (own.1, DIRECTORY_TYPE))];
    let mut all: Vec<(&[u8], (u64, u8))> = names.iter().map(|(name, &id)| (name.as_slice(), entry(id))).collect();
    all.extend(dots);
    all.sort_unstable_by_key(|&(name, _)| name);
    let mut bytes = Vec::new();
    let mut rest = &all[..];
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|(name, _)| {
            used += DIRENT_BYTES + name.len();
            used as u64 <= BLOCK
        });
        let (block, later) = rest.split_at(fits.count());
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let mut name_at = block.len() * DIRENT_BYTES;
        for (name, (nid, kind)) in block {
            bytes.extend(nid.to_le_bytes());
            bytes.extend(u16::try_from(name_at).unwrap_or(0).to_le_bytes()); // Below the size of a block.
            bytes.extend([*kind, 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, _)| bytes.extend_from_slice(name));
        rest = later;
    }
    bytes
}

/// An inode's extended attributes as they follow it.
fn xattrs(inode: &Inode) -> Result<Vec<u8>, WriteError> {
    const PREFIXES: [(&[u8], u8); 5] = [
        (b"user.", 1),
        (b"system.posix_acl_access", 2),
        (b"system.posix_acl_default", 3),
        (b"trusted.", 4),
        (b"security.", 6),
    ];
    if inode.attributes.xattrs.is_empty() {
        return Ok(vec![]);
    }
    let mut bytes = vec![0; XATTR_HEADER_BYTES];
    for (full, value) in &inode.attributes.xattrs {
        let refused = || WriteError::Xattr(String::from_utf8_lossy(full).escape_debug().to_string());
        let known = PREFIXES.iter().find_map(|(prefix, index)| Some((full.strip_prefix(*prefix)?, *index)));
        let (name, index) = known.ok_or_else(refused)?;
        bytes.push(u8::try_from(name.len()).map_err(|_| refused())?);
        bytes.push(index);
        bytes.extend(u16::try_from(value.len()).map_err(|_| refused())?.to_le_bytes());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        if bytes.len() > MAX_XATTR_BYTES {
            return Err(refused());
        }
    }
    Ok(bytes)
}

/// A device's number as Linux encodes it.
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// [`Plan::place`] has checked that nothing is larger.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A writer that knows where it is.
struct Counted<'a, W> {
    out: &'a mut W,
    at: u64,
}

impl<W: Write> Counted<'_, W> {
    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        io::copy(&mut io::repeat(0).take(at - self.at), self).map(drop)
    }
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
