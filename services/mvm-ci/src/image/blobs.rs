//! Where the blobs of an image are: a directory in the OCI layout, or an archive of one, or what `docker save` writes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufReader, Read, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use super::{
    ImageError,
    layer::{self, Allowance},
    oci::{self, Descriptor, Digest, MAX_DOCUMENT_BYTES},
    tarball::{Members, ReadAt},
};

/// A blob that is read, and how long it is.
pub(super) type Opened<'a> = (Box<dyn Read + 'a>, u64);

/// Where blobs are.
pub(super) enum Blobs {
    Layout(PathBuf),
    /// The archive, not packed, and what of it is where.
    Archive {
        file: File,
        members: BTreeMap<Vec<u8>, (u64, u64)>,
    },
}

impl Blobs {
    /// The layout in a directory.
    pub(super) fn layout(dir: &Path) -> Self {
        Self::Layout(dir.to_owned())
    }

    /// An archive, packed or not; unpacked it goes into a file without a name beside what is made.
    pub(super) fn archive(path: &Path, beside: &Path) -> Result<Self, ImageError> {
        let failed = |error| ImageError::io(path.display(), error);
        let mut file = File::open(path).map_err(failed)?;
        let mut magic = [0; 4];
        let packed = match file.read(&mut magic).map_err(failed)? {
            4 => magic.starts_with(&[0x1f, 0x8b]) || magic == [0x28, 0xb5, 0x2f, 0xfd],
            _ => false,
        };
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        if packed {
            file = layer::unpack(file, beside, &mut Allowance::default(), |_| ())?.file;
        }
        let no_archive =
            |error| ImageError::invalid(&path.display().to_string(), &format!("is no tar archive: {error}"));
        let mut members = BTreeMap::new();
        let mut links = Vec::new();
        for member in Members::of(&file).map_err(no_archive)? {
            let member = member.map_err(no_archive)?;
            if member.kind().is_file() {
                members.insert(plain(&member.path), (member.offset, member.len));
            } else if member.kind().is_symlink() || member.kind().is_hard_link() {
                links.push((plain(&member.path), member));
            }
        }
        // `docker save` writes a layer that two images share once, and links to it.
        for (path, member) in links {
            let target =
                if member.kind().is_symlink() { beside_link(&path, &member.link) } else { plain(&member.link) };
            if let Some(&place) = members.get(&target) {
                members.insert(path, place);
            }
        }
        Ok(Self::Archive { file, members })
    }

    /// What is at a path of the layout, and its size.
    pub(super) fn open(&self, path: &str) -> Result<Option<Opened<'_>>, ImageError> {
        match self {
            Self::Layout(dir) => {
                let path = dir.join(path);
                match File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file))) {
                    Ok((len, file)) => Ok(Some((Box::new(file), len))),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(ImageError::io(path.display(), error)),
                }
            }
            Self::Archive { file, members } => Ok(members.get(path.as_bytes()).map(|&(at, len)| {
                let reader: Box<dyn Read> = Box::new(BufReader::new(ReadAt { file, at }).take(len));
                (reader, len)
            })),
        }
    }

    /// A document, whose digest nobody knows yet.
    pub(super) fn document(&self, path: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some((reader, _)) = self.open(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        reader.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).map_err(|error| ImageError::io(path, error))?;
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge {
                what: "a document of the image",
                allowed: format!("{MAX_DOCUMENT_BYTES} bytes"),
            });
        }
        Ok(Some(bytes))
    }

    /// The document that a descriptor points at, verified.
    pub(super) fn described(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let digest = Digest::parse(&descriptor.digest)?;
        let bytes = self.document(&digest.path())?.ok_or_else(|| missing(&digest))?;
        verify(&digest.to_string(), (&digest, descriptor.size), (&Digest::of(&bytes), bytes.len() as u64))?;
        Ok(bytes)
    }

    /// The blob that a descriptor points at. Whoever reads it verifies it.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> Result<(Box<dyn Read + '_>, Digest), ImageError> {
        let digest = Digest::parse(&descriptor.digest)?;
        let (reader, len) = self.open(&digest.path())?.ok_or_else(|| missing(&digest))?;
        if len != descriptor.size {
            return Err(mismatch(&digest.to_string(), &format!("{} bytes", descriptor.size), &format!("{len} bytes")));
        }
        Ok((reader, digest))
    }

    /// The manifest of the image that was asked for: down from the index, through any further one.
    pub(super) fn manifest(&self, name: Option<&str>) -> Result<(oci::Manifest, String), ImageError> {
        let bytes = self.document("index.json")?;
        let bytes = bytes.ok_or_else(|| ImageError::invalid("this OCI layout", "has no index.json"))?;
        let mut index: oci::Index = oci::parse("index.json", &bytes)?;
        let mut name = name;
        for _ in 0..MAX_INDEXES {
            let chosen = oci::choose(&index, name)?;
            let document = self.described(chosen)?;
            match oci::parse(&chosen.digest, &document)? {
                oci::Document::Manifest(manifest) => return Ok((manifest, chosen.digest.clone())),
                oci::Document::Index(below) => index = below,
            }
            // The names are those of the layout's own index.
            name = None;
        }
        Err(ImageError::invalid("the index", "points at an index, which points at an index, and so on"))
    }
}

/// An index of a layout points at one for several platforms; more are a joke.
const MAX_INDEXES: usize = 4;

fn missing(digest: &Digest) -> ImageError {
    ImageError::invalid(&digest.to_string(), "is not there")
}

pub(super) fn mismatch(what: &str, expected: &str, actual: &str) -> ImageError {
    ImageError::Mismatch { what: what.to_owned(), expected: expected.to_owned(), actual: actual.to_owned() }
}

/// Compares what came with what was asked for.
pub(super) fn verify(what: &str, expected: (&Digest, u64), actual: (&Digest, u64)) -> Result<(), ImageError> {
    if expected.1 != actual.1 {
        return Err(mismatch(what, &format!("{} bytes", expected.1), &format!("{} bytes", actual.1)));
    }
    if expected.0 != actual.0 {
        return Err(mismatch(what, &expected.0.to_string(), &actual.0.to_string()));
    }
    Ok(())
}

/// A member's path without `./` and the like.
fn plain(path: &[u8]) -> Vec<u8> {
    let names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.collect::<Vec<_>>().join(&b'/')
}

/// What a symbolic link in an archive points at: only a key of ours, so that no care is needed.
fn beside_link(path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut names: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    names.pop();
    for name in target.split(|&byte| byte == b'/') {
        match name {
            b".." => drop(names.pop()),
            b"" | b"." => {}
            name => names.push(name),
        }
    }
    names.join(&b'/')
}
