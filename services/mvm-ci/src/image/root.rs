//! The root disk of an image: its files, and what the guest agent must know of it, written as a file system.

use std::{
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::Path,
};

use super::{
    ImageError, Phase, Told,
    erofs::{Contents, Plan, WriteError},
    layer::Unpacked,
    oci::{Digest, Hasher},
    tarball::ReadAt,
    tree::{Attributes, Content, Inode, Kind, Tree},
};

/// Its name beside the manifest.
pub(super) const ROOT_DISK: &str = "root.erofs";
/// What is on it.
pub(super) const FILESYSTEM: &str = "erofs";
/// What the guest agent reads in the root: NAME=VALUE, each ended by NUL, as in `/proc/PID/environ`.
const ENV_FILE: [&[u8]; 2] = [b".blixard", b"env"];
/// And the directory where jobs run.
const WORKING_DIR_FILE: [&[u8]; 2] = [b".blixard", b"workdir"];

/// Puts what the guest agent must know of the image where it looks for it, and nothing of a layer's in its place.
pub(super) fn tell_guest(tree: &mut Tree, env: &[String], working_dir: &str) -> Result<(), ImageError> {
    let wrong = |what: &str, value: &str| {
        ImageError::invalid(&format!("the image's {what} \"{}\"", value.escape_debug()), "makes no sense")
    };
    let mut environ = Vec::new();
    for variable in env {
        if variable.find('=').is_none_or(|at| at == 0) || variable.contains('\0') {
            return Err(wrong("variable", variable));
        }
        environ.extend_from_slice(variable.as_bytes());
        environ.push(0);
    }
    if !(working_dir.is_empty() || working_dir.starts_with('/'))
        || working_dir.contains('\0')
        || working_dir.len() > 4095
    {
        return Err(wrong("working directory", working_dir));
    }
    let own = |mode, kind| Inode { kind, attributes: Attributes { mode, ..Attributes::default() } };
    let conflict = |conflict| ImageError::invalid("/.blixard", &format!("can't be written: {conflict}"));
    // A file first: it takes away whatever is there, where a directory would keep what is in it.
    let dir = vec![ENV_FILE[0].to_vec()];
    tree.add(&dir, own(0o644, Kind::File(Content::Bytes(vec![])))).map_err(conflict)?;
    tree.add(&dir, own(0o755, Kind::Directory(Default::default()))).map_err(conflict)?;
    for (path, bytes) in [(ENV_FILE, environ), (WORKING_DIR_FILE, working_dir.as_bytes().to_vec())] {
        let path = path.map(<[u8]>::to_vec);
        tree.add(&path, own(0o644, Kind::File(Content::Bytes(bytes)))).map_err(conflict)?;
    }
    Ok(())
}

/// Writes the root disk, and says its digest.
pub(super) fn write(tree: &Tree, contents: &dyn Contents, path: &Path, told: Told<'_>) -> Result<Digest, ImageError> {
    let failed = |error: WriteError| ImageError::invalid("the root disk", &format!("can't be written: {error}"));
    let plan = Plan::of(tree).map_err(failed)?;
    let file = File::create_new(path).map_err(|error| ImageError::io(path.display(), error))?;
    let mut out = Hashing { inner: BufWriter::with_capacity(1024 * 1024, file), hasher: Hasher::new() };
    plan.write(contents, &mut out, &mut |done| told(Phase::Write, done, plan.bytes())).map_err(failed)?;
    out.flush().map_err(|error| ImageError::io(path.display(), error))?;
    Ok(out.hasher.digest())
}

/// The layers that an image was merged from.
pub(super) struct LayerFiles<'a>(pub(super) &'a [Unpacked]);

impl Contents for LayerFiles<'_> {
    fn open(&self, content: &Content, offset: u64) -> io::Result<Box<dyn Read + '_>> {
        match content {
            Content::Layer { layer, offset: start, .. } => {
                let layer = self.0.get(*layer).ok_or(io::ErrorKind::NotFound)?;
                Ok(Box::new(ReadAt { file: &layer.file, at: start + offset }))
            }
            Content::Host { .. } | Content::Bytes(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Writes through, and sums up what it wrote.
struct Hashing<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
