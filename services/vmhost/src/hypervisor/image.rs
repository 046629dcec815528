//! Images: what a guest boots. An image is a directory with a `manifest.json` that names its kernel, its initramfs and,
//! perhaps, a root disk. `mvm-ci image` makes them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use blixard::id::is_name;

use super::{Disk, LaunchError};

/// The file in an image's directory that says what it is.
pub const MANIFEST: &str = "manifest.json";

/// `manifest.json`: how to boot an image, and where it comes from. Fields that are not here are left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Manifest {
    /// File name of the kernel.
    pub kernel: String,
    /// File name of the initramfs, whose `/init` is the guest agent.
    pub initramfs: String,
    /// The kernel's command line. `root=` of a root disk is added unless it is there.
    pub cmdline: String,
    /// The disk whose files jobs see. None: they see the initramfs's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_disk: Option<RootDisk>,
    /// The file systems that the initramfs can mount, as a root disk and as volumes.
    #[serde(default)]
    pub root_filesystems: Vec<String>,
    /// SHA-256 digests by file name, 64 hexadecimal digits each.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
    /// The kernel, as `uname -r` says it.
    #[serde(default)]
    pub kernel_release: String,
    /// The guest agent's version.
    #[serde(default)]
    pub agent_version: String,
    /// Where the root disk comes from.
    #[serde(default)]
    pub source: String,
    /// When it was made, RFC 3339.
    #[serde(default)]
    pub created_at: String,
    /// What jobs get in their environment unless they say otherwise. Told for people: the guest reads it from the disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Where jobs run unless they say otherwise; also told for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
}

/// A read-only disk that all VMs of the image share. The guest lays what it writes over it, in memory.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RootDisk {
    /// File name.
    pub file: String,
    /// The file system on it: "erofs", "ext4".
    pub filesystem: String,
}

impl Manifest {
    /// The manifest in an image's directory.
    ///
    /// # Errors
    /// It is not there or makes no sense, in words.
    pub fn read(dir: &Path) -> Result<Self, String> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Whether an image with this manifest can be booted from its directory.
    ///
    /// # Errors
    /// A file is not there or is no plain file beside the manifest, or the manifest makes no sense; in words.
    pub fn check(&self, dir: &Path) -> Result<(), String> {
        image_of(dir, self).map(drop)
    }
}

/// An image that can be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) cmdline: String,
    /// The first disk, `/dev/vda` in the guest: read-only, the same file for all VMs.
    pub(super) root_disk: Option<PathBuf>,
    /// What its guest can mount.
    pub(super) filesystems: Vec<String>,
}

impl Image {
    /// Whether its guest can mount these disks.
    pub(super) fn check(&self, name: &str, disks: &[Disk]) -> Result<(), LaunchError> {
        let strange = disks.iter().find(|disk| !self.filesystems.iter().any(|known| known == disk.filesystem));
        strange.map_or(Ok(()), |disk| {
            let known = if self.filesystems.is_empty() { "none".to_owned() } else { self.filesystems.join(", ") };
            let problem = format!("its initramfs can't mount a volume of \"{}\", only of: {known}", disk.filesystem);
            Err(LaunchError::BadImage { image: name.to_owned(), problem })
        })
    }

    /// What a hypervisor reads of it.
    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.kernel, &self.initramfs].into_iter().chain(&self.root_disk)
    }
}

/// The images below a directory that can be booted, sorted.
pub(super) fn names(image_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(image_dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| is_name(name));
    let mut names: Vec<String> = names.filter(|name| read(&image_dir.join(name)).is_ok()).collect();
    names.sort();
    names
}

/// The image of this name.
pub(super) fn find(image_dir: &Path, name: &str) -> Result<Image, LaunchError> {
    let dir = image_dir.join(name);
    // The name becomes part of a path: nothing but a plain name may.
    if !is_name(name) || !dir.join(MANIFEST).exists() {
        return Err(LaunchError::UnknownImage { image: name.to_owned(), known: names(image_dir) });
    }
    read(&dir).map_err(|problem| LaunchError::BadImage { image: name.to_owned(), problem })
}

/// Digests are checked for their form only: hashing 20 MiB at each boot would cost more than it protects, since whoever
/// can change the kernel can change the manifest beside it.
fn read(dir: &Path) -> Result<Image, String> {
    image_of(dir, &Manifest::read(dir)?)
}

fn image_of(dir: &Path, manifest: &Manifest) -> Result<Image, String> {
    for digest in manifest.sha256.values() {
        if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("{}: \"{digest}\" is no SHA-256 digest", dir.join(MANIFEST).display()));
        }
    }
    let mut cmdline = manifest.cmdline.clone();
    if let Some(RootDisk { filesystem, .. }) = &manifest.root_disk {
        // It becomes a word of the command line.
        if !manifest.root_filesystems.contains(filesystem) || !is_name(filesystem) {
            let known = manifest.root_filesystems.join(", ");
            return Err(format!("its initramfs can't mount a root disk of \"{filesystem}\", only of: {known}"));
        }
        // An image that finds its root by itself, as NixOS does, says so.
        if !cmdline.split_ascii_whitespace().any(|word| word.starts_with("root=")) {
            cmdline += &format!(" root=/dev/vda rootfstype={filesystem} ro");
        }
    }
    let root_disk = manifest.root_disk.as_ref().map(|disk| part(dir, &disk.file)).transpose()?;
    Ok(Image {
        kernel: part(dir, &manifest.kernel)?,
        initramfs: part(dir, &manifest.initramfs)?,
        cmdline,
        root_disk,
        filesystems: manifest.root_filesystems.clone(),
    })
}

fn part(dir: &Path, name: &str) -> Result<PathBuf, String> {
    if !is_name(name) {
        return Err(format!("\"{name}\" is not the name of a file beside {MANIFEST}"));
    }
    let path = dir.join(name);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            std::path::absolute(&path).map_err(|error| format!("{}: {error}", path.display()))
        }
        Ok(_) => Err(format!("{} is empty or not a file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(dir: &Path, name: &str, manifest: &str) {
        fs::create_dir_all(dir.join(name)).expect("mkdir");
        fs::write(dir.join(name).join(MANIFEST), manifest).expect("writes");
        fs::write(dir.join(name).join("vmlinuz"), "k").expect("writes");
    }

    #[test]
    fn an_image_is_found_by_name_and_a_broken_one_says_what_is_wrong() {
        let root = tempfile::tempdir().expect("tempdir");
        let manifest = r#"{"kernel":"vmlinuz","initramfs":"initramfs","cmdline":"quiet"}"#;
        image(root.path(), "good", manifest);
        fs::write(root.path().join("good/initramfs"), "i").expect("writes");
        image(root.path(), "half", manifest);
        image(root.path(), "torn", "{");
        image(root.path(), "outside", r#"{"kernel":"../vmlinuz","initramfs":"initramfs","cmdline":""}"#);
        let digest = r#"{"kernel":"vmlinuz","initramfs":"vmlinuz","cmdline":"","sha256":{"vmlinuz":"12"}}"#;
        image(root.path(), "digest", digest);

        let disk = r#"{"kernel":"vmlinuz","initramfs":"vmlinuz","cmdline":"quiet","root_filesystems":["erofs"],
            "root_disk":{"file":"vmlinuz","filesystem":"FS"}}"#;
        image(root.path(), "disk", &disk.replace("FS", "erofs"));
        image(root.path(), "own", &disk.replace("FS", "erofs").replace("quiet", "quiet root=fstab"));
        image(root.path(), "strange", &disk.replace("FS", "ntfs"));

        assert_eq!(names(root.path()), ["disk", "good", "own"]);
        let disk = find(root.path(), "disk").expect("boots");
        assert_eq!(disk.root_disk, Some(root.path().join("disk/vmlinuz")));
        assert_eq!(disk.cmdline, "quiet root=/dev/vda rootfstype=erofs ro");
        assert_eq!(find(root.path(), "good").expect("boots").kernel, root.path().join("good/vmlinuz"));
        assert_eq!(find(root.path(), "own").expect("boots").cmdline, "quiet root=fstab");
        let volume =
            |filesystem| vec![Disk { path: "/v".into(), serial: "volume0".to_owned(), read_only: true, filesystem }];
        disk.check("disk", &volume("erofs")).expect("it can mount that");
        assert_eq!(
            disk.check("disk", &volume("ext4")).expect_err("it can't").to_string(),
            "image \"disk\" cannot be booted: its initramfs can't mount a volume of \"ext4\", only of: erofs"
        );
        let problem = |name| find(root.path(), name).expect_err("refused").to_string();
        assert!(problem("half").contains("initramfs: No such file"), "{}", problem("half"));
        assert!(problem("torn").contains("manifest.json: EOF"), "{}", problem("torn"));
        assert!(problem("outside").contains("\"../vmlinuz\" is not the name"), "{}", problem("outside"));
        assert!(
            problem("strange").contains("can't mount a root disk of \"ntfs\", only of: erofs"),
            "{}",
            problem("strange")
        );
        assert!(problem("digest").contains("no SHA-256"), "{}", problem("digest"));
        assert_eq!(problem("none"), "there is no image \"none\"; there are: disk, good, own");
        assert_eq!(problem("../good"), "there is no image \"../good\"; there are: disk, good, own");
    }
}
