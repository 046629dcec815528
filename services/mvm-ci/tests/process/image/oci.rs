//! OCI images that tests make: layers from lists of files, and what points at them.

use std::{io::Write as _, path::Path};

use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

/// A blob's digest, as documents write it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest(&SHA256, bytes)))
}

/// A layer while it is made.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, kind: tar::EntryType, mode: u32, link: Option<&str>, bytes: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(bytes.len() as u64);
        // As they are: the builder would refuse what a wicked tool writes.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if let Some(link) = link {
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_cksum();
        self.0.append(&header, bytes).expect("appends");
        self
    }

    pub(crate) fn file(self, path: &str, mode: u32, bytes: &[u8]) -> Self {
        self.add(path, tar::EntryType::Regular, mode, None, bytes)
    }

    pub(crate) fn owned_file(mut self, path: &str, uid: u64, gid: u64, bytes: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o640);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(1_000_000_000);
        header.set_size(bytes.len() as u64);
        self.0.append_data(&mut header, path, bytes).expect("appends");
        self
    }

    pub(crate) fn directory(self, path: &str, mode: u32) -> Self {
        self.add(path, tar::EntryType::Directory, mode, None, b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.add(path, tar::EntryType::Symlink, 0o777, Some(target), b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.add(path, tar::EntryType::Link, 0o644, Some(target), b"")
    }

    /// An extended attribute of the next file, written as a PAX record.
    pub(crate) fn xattr(self, name: &str, value: &[u8]) -> Self {
        let body = [b" SCHILY.xattr.", name.as_bytes(), b"=", value, b"\n"].concat();
        // The length counts its own digits.
        let length =
            (1..5).map(|digits| body.len() + digits).find(|length| length.to_string().len() + body.len() == *length);
        let record = [length.expect("a length").to_string().as_bytes(), &body].concat();
        self.add("pax", tar::EntryType::XHeader, 0o644, None, &record)
    }

    pub(crate) fn tar(self) -> Vec<u8> {
        self.0.into_inner().expect("finishes")
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(bytes).expect("packs");
    packer.finish().expect("packs")
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// An image: its blobs by digest, and the manifest's descriptor.
pub(crate) struct Image {
    pub(crate) blobs: Vec<(String, Vec<u8>)>,
    pub(crate) manifest: Value,
    pub(crate) config: Vec<u8>,
}

/// How a layer is packed.
pub(crate) type Pack = fn(&[u8]) -> Vec<u8>;

impl Image {
    pub(crate) fn new(layers: &[(Vec<u8>, Pack)], execution: &Value) -> Self {
        let mut blobs = Vec::new();
        let mut store = |media_type: &str, bytes: Vec<u8>| {
            let descriptor = json!({"mediaType": media_type, "digest": sha256(&bytes), "size": bytes.len()});
            blobs.push((sha256(&bytes), bytes));
            descriptor
        };
        let diff_ids: Vec<String> = layers.iter().map(|(tar, _)| sha256(tar)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": execution,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config_bytes = config.to_string().into_bytes();
        let config = store("application/vnd.oci.image.config.v1+json", config_bytes.clone());
        let layers: Vec<Value> =
            layers.iter().map(|(tar, pack)| store("application/vnd.oci.image.layer.v1.tar", pack(tar))).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers,
        });
        let manifest = store("application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes());
        Self { blobs, manifest, config: config_bytes }
    }

    pub(crate) fn index(&self) -> Value {
        json!({"schemaVersion": 2, "manifests": [self.manifest]})
    }

    /// The bytes of a blob, for a test to spoil.
    pub(crate) fn blob_mut(&mut self, number: usize) -> &mut Vec<u8> {
        &mut self.blobs[number].1
    }

    pub(crate) fn write_layout(&self, dir: &Path) {
        std::fs::create_dir_all(dir.join("blobs/sha256")).expect("mkdir");
        for (path, bytes) in self.files() {
            std::fs::write(dir.join(path), bytes).expect("writes");
        }
    }

    /// The layout as a tar archive.
    pub(crate) fn archive(&self) -> Vec<u8> {
        self.files().into_iter().fold(Layer::new(), |layer, (path, bytes)| layer.file(&path, 0o644, &bytes)).tar()
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), self.index().to_string().into_bytes()),
        ];
        files.extend(
            self.blobs.iter().map(|(digest, bytes)| (format!("blobs/{}", digest.replace(':', "/")), bytes.clone())),
        );
        files
    }

    /// What `docker save` wrote before it knew OCI.
    pub(crate) fn docker_archive(&self, layers: &[Vec<u8>]) -> Vec<u8> {
        let config = format!("{}.json", &sha256(&self.config)["sha256:".len()..]);
        let paths: Vec<String> = (0..layers.len()).map(|number| format!("{number}/layer.tar")).collect();
        let manifest = json!([{"Config": config, "RepoTags": ["me/app:1"], "Layers": paths}]);
        let begun = Layer::new().file(&config, 0o644, &self.config).file(
            "manifest.json",
            0o644,
            manifest.to_string().as_bytes(),
        );
        paths.iter().zip(layers).fold(begun, |archive, (path, tar)| archive.file(path, 0o644, tar)).tar()
    }
}
