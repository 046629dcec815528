//! The documents of an OCI image (image-spec 1.1), and of Docker's schema 2, which has the same fields: what we read of
//! them.

use std::{collections::BTreeMap, fmt, fs::File, io, path::Path};

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use super::ImageError;

/// What every document may have at most; registries refuse larger ones.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 4 * 1024 * 1024;

/// A SHA-256 digest: 64 lowercase hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Digest(String);

impl Digest {
    /// Parses `sha256:…`; the only algorithm that registries use.
    pub(super) fn parse(text: &str) -> Result<Self, ImageError> {
        match text.strip_prefix("sha256:") {
            Some(hex) if is_hex(hex) => Ok(Self(hex.to_owned())),
            _ => Err(ImageError::invalid(text, "is no digest of the form sha256:<64 lowercase hexadecimal digits>")),
        }
    }

    pub(super) fn of(bytes: &[u8]) -> Self {
        Self::from(ring::digest::digest(&SHA256, bytes))
    }

    pub(super) fn of_file(path: &Path) -> io::Result<Self> {
        let mut hasher = Hasher::new();
        io::copy(&mut File::open(path)?, &mut hasher)?;
        Ok(hasher.digest())
    }

    pub(super) fn hex(&self) -> &str {
        &self.0
    }

    /// Where a layout has the blob.
    pub(super) fn path(&self) -> String {
        format!("blobs/sha256/{}", self.0)
    }
}

impl From<ring::digest::Digest> for Digest {
    fn from(digest: ring::digest::Digest) -> Self {
        Self(hex::encode(digest))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

pub(super) fn is_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A SHA-256 that is written to.
pub(super) struct Hasher(Context);

impl Hasher {
    pub(super) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn digest(self) -> Digest {
        Digest::from(self.0.finish())
    }
}

impl io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What points at a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// The name of an image in a layout.
    fn name(&self) -> Option<&str> {
        self.annotations.get("org.opencontainers.image.ref.name").map(String::as_str)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
}

/// `index.json`, or a manifest for several platforms.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    pub(super) schema_version: u32,
    pub(super) manifests: Vec<Descriptor>,
}

/// An image for one platform.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// What a descriptor of a manifest may point at.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Document {
    Manifest(Manifest),
    Index(Index),
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    pub(super) config: Option<Execution>,
    pub(super) rootfs: RootFs,
}

/// What a container of the image would run with. Of it, a job takes the environment and the working directory. It has a
/// command of its own, so Entrypoint and Cmd mean nothing here; it is root in its VM, so User does not either.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Execution {
    #[serde(default)]
    pub(super) env: Option<Vec<String>>,
    #[serde(default)]
    pub(super) working_dir: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct RootFs {
    /// Digests of the layers, unpacked.
    pub(super) diff_ids: Vec<String>,
}

/// An entry of the `manifest.json` that `docker save` writes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    pub(super) repo_tags: Option<Vec<String>>,
    pub(super) layers: Vec<String>,
}

pub(super) fn parse<T: for<'a> Deserialize<'a>>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::invalid(what, &format!("can't be understood: {error}")))
}

/// The one image of an index that was asked for and that runs here.
pub(super) fn choose<'a>(index: &'a Index, name: Option<&str>) -> Result<&'a Descriptor, ImageError> {
    let named = |entry: &&Descriptor| name.is_none_or(|name| entry.name() == Some(name));
    // Attestations are there with the platform unknown/unknown.
    let ours = |entry: &&Descriptor| entry.platform.as_ref().is_none_or(runs_here);
    let candidates: Vec<&Descriptor> = index.manifests.iter().filter(named).filter(ours).collect();
    let list = |text: fn(&Descriptor) -> String| index.manifests.iter().map(text).collect::<Vec<_>>().join(", ");
    match (candidates.as_slice(), name) {
        ([one], _) => Ok(one),
        ([], Some(name)) => {
            let names = list(|entry| entry.name().unwrap_or("(without a name)").to_owned());
            Err(ImageError::invalid(
                "the index",
                &format!("has no image \"{name}\" for linux/{}; it has: {names}", arch()),
            ))
        }
        ([], None) => {
            let platform = |entry: &Descriptor| {
                entry
                    .platform
                    .as_ref()
                    .map_or("?".to_owned(), |platform| format!("{}/{}", platform.os, platform.architecture))
            };
            Err(ImageError::invalid(
                "the index",
                &format!("has no image for linux/{}; it has: {}", arch(), list(platform)),
            ))
        }
        (_, _) => {
            let names = list(|entry| entry.name().unwrap_or("(without a name)").to_owned());
            Err(ImageError::invalid("the index", &format!("has several images: choose one with --ref ({names})")))
        }
    }
}

pub(super) fn runs_here(platform: &Platform) -> bool {
    platform.os == "linux" && platform.architecture == arch()
}

/// This machine as OCI names it.
pub(super) fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
