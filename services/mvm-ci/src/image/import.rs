//! From a source to an image: the parts, put together.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use blixard_vmhost::hypervisor::{MANIFEST, Manifest, RootDisk};

use super::{
    ImageError, Phase, Told,
    blobs::{Blobs, mismatch, verify},
    erofs::Contents,
    layer::{self, Allowance, Unpacked},
    oci::{self, Config, Digest, Execution, Hasher, Saved},
    reference::Reference,
    registry,
    root::{self, FILESYSTEM, LayerFiles, ROOT_DISK},
    store::{Draft, Entry, Store},
    tree::Tree,
};

/// As Docker.
const MAX_LAYERS: usize = 127;
/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory in the OCI layout.
    Layout(PathBuf),
    /// A tar archive of one, or one that `docker save` wrote.
    Archive(PathBuf),
    /// A directory with a manifest of ours, as `nix build .#guest-image` makes.
    Image(PathBuf),
    /// A registry.
    Registry(Reference),
}

impl Source {
    /// What is meant: a directory or file if there is one, else an image in a registry.
    ///
    /// # Errors
    /// It is none of them.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        let path = Path::new(text);
        if path.is_dir() {
            return if path.join("oci-layout").exists() {
                Ok(Self::Layout(path.to_owned()))
            } else if path.join(MANIFEST).exists() {
                Ok(Self::Image(path.to_owned()))
            } else {
                Err(ImageError::invalid(text, "is a directory with neither oci-layout nor manifest.json in it"))
            };
        }
        if path.exists() {
            return Ok(Self::Archive(path.to_owned()));
        }
        Reference::parse(text).map(Self::Registry)
    }
}

/// How an image is to be made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its name.
    pub name: String,
    /// The image whose kernel and initramfs it gets.
    pub base: String,
    /// An image of this name may be there, and gives way.
    pub replace: bool,
    /// Which image of a layout or archive that has several.
    pub reference: Option<String>,
    /// Where it comes from, as told to people.
    pub source: String,
    /// Now, RFC 3339.
    pub created_at: String,
}

/// Imports an image. It blocks its thread while it works: run it where nothing else waits.
///
/// # Errors
/// Nothing has changed then, but that garbage may be left when even that can't be removed.
pub async fn import(store: &Store, settings: &Settings, source: &Source, told: Told<'_>) -> Result<Entry, ImageError> {
    store.check_name(&settings.name, settings.replace)?;
    let draft = store.draft()?;
    let blobs = match source {
        Source::Image(dir) => {
            take_image(dir, settings, &draft)?;
            return finish(store, settings, draft);
        }
        Source::Layout(dir) => Blobs::layout(dir),
        Source::Archive(path) => Blobs::archive(path, draft.path())?,
        Source::Registry(reference) => {
            // Before the download, not after it.
            Base::find(store, &settings.base)?;
            let dir = draft.path().join("pulled");
            registry::pull(reference, &dir, told).await?;
            Blobs::layout(&dir)
        }
    };
    let base = Base::find(store, &settings.base)?;
    let image = Layers::of(&blobs, settings.reference.as_deref())?;
    let (mut tree, layers) = image.unpack(&blobs, draft.path(), told)?;
    let source = format!("{} ({})", settings.source, image.digest);
    let settings = Settings { source, ..settings.clone() };
    write(&base, &settings, &mut tree, &LayerFiles(&layers), &image.execution, &draft, told)?;
    finish(store, &settings, draft)
}

/// Writes all files of an image into a draft.
pub(super) fn write(
    base: &Base,
    settings: &Settings,
    tree: &mut Tree,
    contents: &dyn Contents,
    execution: &Execution,
    draft: &Draft,
    told: Told<'_>,
) -> Result<(), ImageError> {
    let env = execution.env.clone().unwrap_or_default();
    let working_dir = execution.working_dir.clone().unwrap_or_default();
    root::tell_guest(tree, &env, &working_dir)?;
    fs::create_dir(&draft.image).map_err(|error| ImageError::io(draft.image.display(), error))?;
    let root = root::write(tree, contents, &draft.image.join(ROOT_DISK), told)?;
    let mut manifest = base.link_into(&draft.image)?;
    manifest.sha256.insert(ROOT_DISK.to_owned(), root.hex().to_owned());
    manifest.root_disk = Some(RootDisk { file: ROOT_DISK.to_owned(), filesystem: FILESYSTEM.to_owned() });
    manifest.source.clone_from(&settings.source);
    manifest.created_at.clone_from(&settings.created_at);
    (manifest.env, manifest.working_dir) = (env, working_dir);
    write_manifest(&manifest, &draft.image)
}

/// Makes the draft the image.
pub(super) fn finish(store: &Store, settings: &Settings, draft: Draft) -> Result<Entry, ImageError> {
    store.commit(draft, &settings.name, settings.replace)?;
    let found = store.list()?.into_iter().find(|entry| entry.name == settings.name);
    found.ok_or_else(|| ImageError::invalid(&settings.name, "was made, and has been removed again by somebody"))
}

fn write_manifest(manifest: &Manifest, dir: &Path) -> Result<(), ImageError> {
    let path = dir.join(MANIFEST);
    let written = serde_json::to_vec_pretty(manifest).map_err(io::Error::from).and_then(|text| fs::write(&path, text));
    written.map_err(|error| ImageError::io(path.display(), error))
}

/// The image that gives kernel and initramfs.
pub(super) struct Base {
    dir: PathBuf,
    manifest: Manifest,
}

impl Base {
    pub(super) fn find(store: &Store, name: &str) -> Result<Self, ImageError> {
        let dir = store.find(name)?;
        let what = format!("the base image \"{name}\"");
        let manifest =
            Manifest::read(&dir).map_err(|problem| ImageError::invalid(&what, &format!("is broken: {problem}")))?;
        if !manifest.root_filesystems.iter().any(|filesystem| filesystem == FILESYSTEM) {
            let problem = "can't mount a root disk: it is older than that, or made by other means. Make it again: mvm-ci image build";
            return Err(ImageError::invalid(&what, problem));
        }
        Ok(Self { dir, manifest })
    }

    /// Links its kernel and initramfs, verified, and returns the beginning of a manifest.
    fn link_into(&self, dir: &Path) -> Result<Manifest, ImageError> {
        let base = &self.manifest;
        let mut sha256 = std::collections::BTreeMap::new();
        for name in [&base.kernel, &base.initramfs] {
            sha256.insert(name.clone(), take_file(&self.dir, name, dir, base.sha256.get(name))?);
        }
        Ok(Manifest { sha256, root_disk: None, env: vec![], working_dir: String::new(), ..base.clone() })
    }
}

/// A file of another image: the same one if that is possible, else a copy.
fn take_file(from: &Path, name: &str, to: &Path, sha256: Option<&String>) -> Result<String, ImageError> {
    if !blixard::id::is_name(name) {
        return Err(ImageError::invalid(&format!("\"{name}\""), "is not the name of a file beside manifest.json"));
    }
    let (from, to) = (from.join(name), to.join(name));
    let taken = fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop));
    taken.map_err(|error| ImageError::io(from.display(), error))?;
    let digest = Digest::of_file(&to).map_err(|error| ImageError::io(to.display(), error))?;
    match sha256 {
        Some(expected) if expected != digest.hex() => {
            Err(mismatch(&from.display().to_string(), &format!("sha256:{expected}"), &digest.to_string()))
        }
        _ => Ok(digest.hex().to_owned()),
    }
}

/// An image of ours, from elsewhere. Its files are copied: whoever made it may write into them.
fn take_image(dir: &Path, settings: &Settings, draft: &Draft) -> Result<(), ImageError> {
    let what = dir.display().to_string();
    let broken = |problem: String| ImageError::invalid(&what, &format!("is no image that can be booted: {problem}"));
    let mut manifest = Manifest::read(dir).map_err(broken)?;
    manifest.check(dir).map_err(broken)?;
    fs::create_dir(&draft.image).map_err(|error| ImageError::io(draft.image.display(), error))?;
    let disk = manifest.root_disk.as_ref().map(|disk| disk.file.clone());
    for name in [manifest.kernel.clone(), manifest.initramfs.clone()].into_iter().chain(disk) {
        let to = draft.image.join(&name);
        fs::copy(dir.join(&name), &to).map_err(|error| ImageError::io(to.display(), error))?;
        let digest = Digest::of_file(&to).map_err(|error| ImageError::io(to.display(), error))?;
        if let Some(expected) = manifest.sha256.insert(name.clone(), digest.hex().to_owned())
            && expected != digest.hex()
        {
            return Err(mismatch(
                &dir.join(&name).display().to_string(),
                &format!("sha256:{expected}"),
                &digest.to_string(),
            ));
        }
    }
    manifest.source.clone_from(&settings.source);
    manifest.created_at.clone_from(&settings.created_at);
    write_manifest(&manifest, &draft.image)
}

/// An image's layers and what it says of them.
struct Layers {
    /// Of the manifest, or of the configuration where there is no manifest.
    digest: String,
    layers: Vec<Packed>,
    execution: Execution,
}

/// A layer in the source.
struct Packed {
    place: Place,
    /// The digest of its archive.
    diff_id: Digest,
}

enum Place {
    Blob(oci::Descriptor),
    /// Of `docker save`, which says nothing of it but its `diff_id`.
    Member(String),
}

impl Layers {
    fn of(blobs: &Blobs, reference: Option<&str>) -> Result<Self, ImageError> {
        if blobs.document("index.json")?.is_none()
            && let Some(saved) = blobs.document("manifest.json")?
        {
            return Self::saved(blobs, oci::parse("manifest.json", &saved)?, reference);
        }
        let (manifest, digest) = blobs.manifest(reference)?;
        let config = oci::parse(&manifest.config.digest, &blobs.described(&manifest.config)?)?;
        Self::new(digest, config, manifest.layers.into_iter().map(Place::Blob).collect())
    }

    fn saved(blobs: &Blobs, images: Vec<Saved>, reference: Option<&str>) -> Result<Self, ImageError> {
        let named =
            |image: &Saved| reference.is_none_or(|name| image.repo_tags.iter().flatten().any(|tag| tag == name));
        let mut images: Vec<Saved> = images.into_iter().filter(named).collect();
        let (Some(image), true) = (images.pop(), images.is_empty()) else {
            return Err(ImageError::invalid("this archive", "has no such image, or several: choose one with --ref"));
        };
        let bytes = blobs.document(&image.config)?;
        let bytes = bytes.ok_or_else(|| ImageError::invalid(&image.config, "is not there"))?;
        // Its name is its digest, and it has those of the layers.
        let name = Path::new(&image.config).file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        let digest = Digest::of(&bytes);
        if name != digest.hex() {
            return Err(mismatch(&image.config, &format!("sha256:{name}"), &digest.to_string()));
        }
        let config = oci::parse(&image.config, &bytes)?;
        Self::new(digest.to_string(), config, image.layers.into_iter().map(Place::Member).collect())
    }

    fn new(digest: String, config: Config, places: Vec<Place>) -> Result<Self, ImageError> {
        let own = oci::Platform { architecture: config.architecture, os: config.os };
        if !oci::runs_here(&own) {
            let problem = format!("is for {}/{}, and this machine is linux/{}", own.os, own.architecture, oci::arch());
            return Err(ImageError::invalid(&digest, &problem));
        }
        let diff_ids = config.rootfs.diff_ids;
        if places.is_empty() || places.len() > MAX_LAYERS || places.len() != diff_ids.len() {
            let problem = format!(
                "has {} layers and {} digests of layers; it must have as many of one as of the other, 1 to {MAX_LAYERS}",
                places.len(),
                diff_ids.len()
            );
            return Err(ImageError::invalid(&digest, &problem));
        }
        let layers = places
            .into_iter()
            .zip(diff_ids)
            .map(|(place, diff_id)| Ok(Packed { place, diff_id: Digest::parse(&diff_id)? }));
        Ok(Self {
            layers: layers.collect::<Result<_, ImageError>>()?,
            digest,
            execution: config.config.unwrap_or_default(),
        })
    }

    /// Unpacks, verifies and merges the layers.
    fn unpack(&self, blobs: &Blobs, beside: &Path, told: Told<'_>) -> Result<(Tree, Vec<Unpacked>), ImageError> {
        let (mut tree, mut unpacked) = (Tree::default(), Vec::new());
        let mut allowance = Allowance::default();
        let sizes = self.layers.iter().map(|layer| layer.size(blobs)).collect::<Result<Vec<u64>, _>>()?;
        let (mut done, total) = (0, sizes.iter().fold(0, |sum: u64, size| sum.saturating_add(*size)));
        for ((number, layer), size) in self.layers.iter().enumerate().zip(sizes) {
            let mut told = |read| told(Phase::Unpack, done + read, total);
            let file = layer.unpack(blobs, beside, &mut allowance, &mut told)?;
            let changes = layer::changes(number, &file.file, &mut allowance)?;
            tree.apply(changes).map_err(|conflict| {
                ImageError::invalid(&format!("layer {}", number + 1), &format!("makes no sense: {conflict}"))
            })?;
            unpacked.push(file);
            done += size;
        }
        Ok((tree, unpacked))
    }
}

impl Packed {
    /// How large it is as it lies there.
    fn size(&self, blobs: &Blobs) -> Result<u64, ImageError> {
        match &self.place {
            Place::Blob(descriptor) => Ok(descriptor.size),
            Place::Member(path) => Ok(blobs.open(path)?.map_or(0, |(_, len)| len)),
        }
    }

    fn unpack(
        &self,
        blobs: &Blobs,
        beside: &Path,
        allowance: &mut Allowance,
        told: &mut dyn FnMut(u64),
    ) -> Result<Unpacked, ImageError> {
        let unpacked = match &self.place {
            Place::Blob(descriptor) => {
                let (reader, digest) = blobs.blob(descriptor)?;
                let unpacked = layer::unpack(reader, beside, allowance, told);
                // Bytes that were changed rarely unpack: say the cause, not the effect.
                let unpacked = match unpacked {
                    Err(ImageError::Io { .. }) => {
                        let (mut reader, _) = blobs.blob(descriptor)?;
                        verify_all(&mut reader, &digest, descriptor.size)?;
                        unpacked?
                    }
                    unpacked => unpacked?,
                };
                let (packed, size) = &unpacked.packed;
                verify(&digest.to_string(), (&digest, descriptor.size), (packed, *size))?;
                unpacked
            }
            Place::Member(path) => {
                let (reader, _) = blobs.open(path)?.ok_or_else(|| ImageError::invalid(path, "is not there"))?;
                layer::unpack(reader, beside, allowance, told)?
            }
        };
        if unpacked.digest != self.diff_id {
            return Err(mismatch("an unpacked layer", &self.diff_id.to_string(), &unpacked.digest.to_string()));
        }
        Ok(unpacked)
    }
}

fn verify_all(reader: &mut dyn Read, digest: &Digest, size: u64) -> Result<(), ImageError> {
    let mut hasher = Hasher::new();
    let read = io::copy(reader, &mut hasher).map_err(|error| ImageError::io(digest, error))?;
    verify(&digest.to_string(), (digest, size), (&hasher.digest(), read))
}
