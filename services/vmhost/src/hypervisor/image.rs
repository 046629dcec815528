//! Images: what a guest boots. An image is a directory with a `manifest.json` that names its kernel and initramfs.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use blixard::id::is_name;

use super::LaunchError;

const MANIFEST: &str = "manifest.json";

/// `manifest.json`. Fields it has beyond these say where the parts came from.
#[derive(Debug, serde::Deserialize)]
struct Manifest {
    /// File name of the kernel.
    kernel: String,
    /// File name of the initramfs.
    initramfs: String,
    /// The kernel's command line.
    cmdline: String,
    /// SHA-256 digests by file name, 64 hexadecimal digits each.
    #[serde(default)]
    sha256: BTreeMap<String, String>,
}

/// An image that can be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) cmdline: String,
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
    let path = dir.join(MANIFEST);
    let text = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    for digest in manifest.sha256.values() {
        if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("{}: \"{digest}\" is no SHA-256 digest", path.display()));
        }
    }
    Ok(Image {
        kernel: part(dir, &manifest.kernel)?,
        initramfs: part(dir, &manifest.initramfs)?,
        cmdline: manifest.cmdline,
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

        assert_eq!(names(root.path()), ["good"]);
        assert_eq!(find(root.path(), "good").expect("boots").kernel, root.path().join("good/vmlinuz"));
        let problem = |name| find(root.path(), name).expect_err("refused").to_string();
        assert!(problem("half").contains("initramfs: No such file"), "{}", problem("half"));
        assert!(problem("torn").contains("manifest.json: EOF"), "{}", problem("torn"));
        assert!(problem("outside").contains("\"../vmlinuz\" is not the name"), "{}", problem("outside"));
        assert!(problem("digest").contains("no SHA-256"), "{}", problem("digest"));
        assert_eq!(problem("none"), "there is no image \"none\"; there are: good");
        assert_eq!(problem("../good"), "there is no image \"../good\"; there are: good");
    }
}
