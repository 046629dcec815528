//! A layer: from a blob to [`Change`]s. It is unpacked into a file without a name, where the contents stay; what is read
//! of it are names, kinds and attributes.

use std::{
    cell::Cell,
    fs::File,
    io::{self, BufReader, Read, Write},
    path::Path as HostPath,
};

use tar::EntryType;

use super::{
    ImageError,
    oci::{Digest, Hasher},
    tarball::{Member, Members},
    tree::{Attributes, Change, Content, Inode, Kind, Name, Path, show},
};

/// All of an image, unpacked: nobody boots more, and a bomb fills no disk.
pub(super) const MAX_UNPACKED_BYTES: u64 = 32 * 1024 * 1024 * 1024;
/// What the names and attributes of all files may take in memory: two million files with names of ordinary length.
const MAX_METADATA_BYTES: u64 = 1024 * 1024 * 1024;
/// A file without its names, roughly.
const METADATA_OF_A_FILE: u64 = 300;
/// Linux' own.
const MAX_NAME_BYTES: usize = 255;
const MAX_PATH_BYTES: usize = 4095;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What aufs kept for itself.
const RESERVED: &[u8] = b".wh..wh.";
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What may still come, over all layers.
#[derive(Debug)]
pub(super) struct Allowance {
    bytes: u64,
    metadata: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { bytes: MAX_UNPACKED_BYTES, metadata: MAX_METADATA_BYTES }
    }
}

/// A layer that was unpacked.
pub(super) struct Unpacked {
    /// The tar archive, without a name in any directory.
    pub(super) file: File,
    /// Its digest.
    pub(super) digest: Digest,
    /// The digest and the size of what it was unpacked from.
    pub(super) packed: (Digest, u64),
}

/// Unpacks gzip, zstd, or nothing, as the first bytes say: media types were wrong too often. Tells how much of what is packed
/// has been read.
pub(super) fn unpack(
    packed: impl Read,
    beside: &HostPath,
    allowance: &mut Allowance,
    mut told: impl FnMut(u64),
) -> Result<Unpacked, ImageError> {
    let taken = Cell::new(0);
    let mut packed = BufReader::new(Hashed { inner: packed, hasher: Hasher::new(), read: &taken });
    let mut file = tempfile::tempfile_in(beside).map_err(|error| ImageError::io(beside.display(), error))?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    {
        let mut plain = decoder(&mut packed).map_err(|error| ImageError::io("a layer", error))?;
        loop {
            let read = plain.read(&mut buffer).map_err(|error| ImageError::io("unpacking a layer", error))?;
            if read == 0 {
                break;
            }
            allowance.bytes = allowance.bytes.checked_sub(read as u64).ok_or(ImageError::TooLarge {
                what: "the unpacked image",
                allowed: format!("{MAX_UNPACKED_BYTES} bytes"),
            })?;
            hasher.update(&buffer[..read]);
            file.write_all(&buffer[..read]).map_err(|error| ImageError::io(beside.display(), error))?;
            told(taken.get());
        }
    }
    // What stands behind the end of the packed stream counts for its digest.
    io::copy(&mut packed, &mut io::sink()).map_err(|error| ImageError::io("a layer", error))?;
    let Hashed { hasher: packed, .. } = packed.into_inner();
    Ok(Unpacked { file, digest: hasher.digest(), packed: (packed.digest(), taken.get()) })
}

pub(super) fn decoder<'a, R: io::BufRead>(packed: &'a mut R) -> io::Result<Box<dyn Read + 'a>> {
    let magic = packed.fill_buf()?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(packed)));
    }
    if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable(magic) {
        return Ok(Box::new(Frames { packed, frame: None }));
    }
    Ok(Box::new(packed))
}

/// A zstd frame that holds no data; zstd:chunked writes such.
fn is_skippable(magic: &[u8]) -> bool {
    matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// zstd: frame after frame.
struct Frames<'a, R: io::BufRead> {
    packed: &'a mut R,
    frame: Option<Box<ruzstd::decoding::FrameDecoder>>,
}

impl<R: io::BufRead> Read for Frames<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::{BlockDecodingStrategy, errors::FrameDecoderError, errors::ReadFrameHeaderError};
        loop {
            let frame = self.frame.get_or_insert_with(Box::default);
            if frame.can_collect() == 0 && frame.is_finished() {
                if self.packed.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                match frame.reset(&mut *self.packed) {
                    Ok(()) => {}
                    Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                        length, ..
                    })) => {
                        io::copy(&mut (&mut *self.packed).take(length.into()), &mut io::sink())?;
                        self.frame = None;
                    }
                    Err(error) => return Err(io::Error::other(error)),
                }
                continue;
            }
            if frame.can_collect() == 0 {
                let some = BlockDecodingStrategy::UptoBytes(buffer.len());
                frame.decode_blocks(&mut *self.packed, some).map_err(io::Error::other)?;
            }
            match frame.read(buffer)? {
                0 => {}
                read => return Ok(read),
            }
        }
    }
}

/// Reads through, and sums up what it read.
struct Hashed<'a, R> {
    inner: R,
    hasher: Hasher,
    read: &'a Cell<u64>,
}

impl<R: Read> Read for Hashed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// What the layer `number` changes.
pub(super) fn changes(number: usize, file: &File, allowance: &mut Allowance) -> Result<Vec<Change>, ImageError> {
    let what = format!("layer {}", number + 1);
    let problem = |error: io::Error| ImageError::invalid(&what, &format!("is no tar archive: {error}"));
    let mut changes = Vec::new();
    for member in Members::of(file).map_err(problem)? {
        let member = member.map_err(problem)?;
        let described: usize = member.records.iter().map(|(key, value)| key.len() + value.len()).sum();
        let metadata = METADATA_OF_A_FILE + (member.path.len() + member.link.len() + described) as u64;
        allowance.metadata = allowance.metadata.checked_sub(metadata).ok_or(ImageError::TooLarge {
            what: "what the image says of its files (names, attributes)",
            allowed: format!("{MAX_METADATA_BYTES} bytes, about two million files"),
        })?;
        changes.extend(change(number, &member).map_err(|problem| problem.in_layer(&what))?);
    }
    Ok(changes)
}

/// Why an entry is refused.
struct Refused(String);

impl Refused {
    fn in_layer(self, layer: &str) -> ImageError {
        ImageError::invalid(layer, &self.0)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self(format!("is no tar archive: {error}"))
    }
}

fn change(layer: usize, member: &Member) -> Result<Option<Change>, Refused> {
    if member.kind() == EntryType::XGlobalHeader {
        return Ok(None);
    }
    let path = parse_path(&member.path)?;
    if let Some((last, parent)) = path.split_last()
        && last.starts_with(WHITEOUT)
    {
        return whiteout(parent, last, &path);
    }
    let at = |text: &str| Refused(format!("has {}, {text}", show(&path)));
    if member.records.keys().any(|key| key.starts_with(b"GNU.sparse.")) {
        return Err(at("a sparse file, which layers must not have"));
    }
    let kind = match member.kind() {
        EntryType::Link => {
            let target = parse_path(&member.link)?;
            return Ok(Some(Change::Link(path, target)));
        }
        EntryType::Directory => Kind::Directory(Default::default()),
        // Before POSIX a directory was a file whose name ends so.
        EntryType::Regular | EntryType::Continuous if member.path.ends_with(b"/") => {
            Kind::Directory(Default::default())
        }
        EntryType::Regular | EntryType::Continuous => {
            Kind::File(Content::Layer { layer, offset: member.offset, len: member.len })
        }
        EntryType::Symlink => {
            let target = &member.link;
            if target.is_empty() || target.len() > MAX_PATH_BYTES || target.contains(&0) {
                return Err(at("a symbolic link whose target is no path"));
            }
            Kind::Symlink(target.clone())
        }
        EntryType::Char => device(member).map(|(major, minor)| Kind::CharDevice { major, minor })?,
        EntryType::Block => device(member).map(|(major, minor)| Kind::BlockDevice { major, minor })?,
        EntryType::Fifo => Kind::Fifo,
        EntryType::GNUSparse => return Err(at("a sparse file, which layers must not have")),
        other => return Err(at(&format!("of a kind that layers do not have ({:?})", char::from(other.as_byte())))),
    };
    Ok(Some(Change::Add(path, Inode { kind, attributes: attributes(member)? })))
}

fn whiteout(parent: &[Name], last: &[u8], path: &Path) -> Result<Option<Change>, Refused> {
    if last == OPAQUE {
        return Ok(Some(Change::Empty(parent.to_vec())));
    }
    if last.starts_with(RESERVED) {
        return Ok(None);
    }
    match &last[WHITEOUT.len()..] {
        b"" | b"." | b".." => Err(Refused(format!("has {}, a whiteout of nothing", show(path)))),
        name => Ok(Some(Change::Remove(parent.iter().cloned().chain([name.to_vec()]).collect()))),
    }
}

/// The names of a path below the root. One that climbs is no mistake of an honest tool.
fn parse_path(raw: &[u8]) -> Result<Path, Refused> {
    let refused = |why: &str| Refused(format!("has a file named \"{}\", {why}", raw.escape_ascii()));
    if raw.len() > MAX_PATH_BYTES {
        return Err(refused("a path longer than 4095 bytes"));
    }
    let names = raw.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let check = |name: &[u8]| match name {
        b".." => Err(refused("which leads out of the image")),
        name if name.len() > MAX_NAME_BYTES => Err(refused("a name longer than 255 bytes")),
        name if name.contains(&0) => Err(refused("a name with a NUL")),
        name => Ok(name.to_vec()),
    };
    names.map(check).collect()
}

fn attributes(member: &Member) -> Result<Attributes, Refused> {
    let id = |what: &str, value: u64| {
        u32::try_from(value).map_err(|_| Refused(format!("has a file whose {what} is {value}, more than Linux has")))
    };
    let xattrs = member.records.iter().filter_map(|(key, value)| {
        let name = key.strip_prefix(XATTR).filter(|name| is_kept(name))?;
        Some((name.to_vec(), value.clone()))
    });
    Ok(Attributes {
        mode: u16::try_from(member.header.mode()? & 0o7777).unwrap_or(0),
        uid: id("uid", member.number(b"uid", tar::Header::uid)?)?,
        gid: id("gid", member.number(b"gid", tar::Header::gid)?)?,
        // One before 1970 or with a fraction is no reason to refuse an image.
        mtime: member.header.mtime().unwrap_or(0),
        xattrs: xattrs.collect(),
    })
}

/// Other namespaces mean nothing to Linux (macOS writes some), and those of overlayfs would mean too much: the guest lays
/// one over this root.
fn is_kept(name: &[u8]) -> bool {
    let known: [&[u8]; 5] =
        [b"user.", b"security.", b"trusted.", b"system.posix_acl_access", b"system.posix_acl_default"];
    known.iter().any(|prefix| name.starts_with(prefix))
        && !name.starts_with(b"trusted.overlay.")
        && !name.starts_with(b"user.overlay.")
}

fn device(member: &Member) -> Result<(u32, u32), Refused> {
    let (major, minor) = (member.header.device_major()?, member.header.device_minor()?);
    match (major, minor) {
        // What Linux has room for.
        (Some(major @ 0..=0xfff), Some(minor @ 0..=0xf_ffff)) => Ok((major, minor)),
        _ => Err(Refused("has a device with a number that Linux does not have".to_owned())),
    }
}

#[cfg(test)]
mod tests;
