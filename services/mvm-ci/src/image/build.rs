//! Images that are made here: the default one by its script, others from a directory that holds a root's files.

use std::{io, path::Path as HostPath, process::Command};

use super::{
    ImageError, Told,
    directory::{Directory, ReadError, Special},
    import::{self, Base, Settings},
    oci::Execution,
    store::{Entry, Store},
    tree::Tree,
};

/// Beside the flake.
const SCRIPT: &str = "guest-image.sh";
/// As many as an image's layers may have, roughly: what is told of each is in memory.
const MAX_FILES: usize = 2_000_000;

/// Makes the default image, as `make guest-image` does: kernel, busybox and the agent of these sources.
///
/// # Errors
/// The script is not there, or failed; it has said why.
pub fn run_script(flake_dir: &HostPath, store: &Store) -> Result<Entry, ImageError> {
    let script = flake_dir.join(SCRIPT);
    if !script.exists() {
        let problem = "is not there: it comes with the sources; name their directory microvms with --flake-dir";
        return Err(ImageError::invalid(&script.display().to_string(), problem));
    }
    // Our stdout is for the result.
    let status = Command::new("bash").arg(&script).arg(store.dir()).stdout(io::stderr()).status();
    let status = status.map_err(|error| ImageError::io("bash", error))?;
    if !status.success() {
        return Err(ImageError::invalid(&script.display().to_string(), &format!("failed ({status})")));
    }
    let made = store.list()?.into_iter().find(|entry| entry.name == blixard::limits::DEFAULT_IMAGE);
    made.ok_or_else(|| ImageError::invalid(&script.display().to_string(), "made no image"))
}

/// Makes an image whose root are the files of a directory. What belongs to the caller will belong to root, so that nobody
/// needs to be root; other file systems mounted below, sockets and extended attributes are left out.
///
/// # Errors
/// Nothing has changed then.
pub fn from_directory(store: &Store, settings: &Settings, dir: &HostPath, told: Told<'_>) -> Result<Entry, ImageError> {
    store.check_name(&settings.name, settings.replace)?;
    let base = Base::find(store, &settings.base)?;
    let draft = store.draft()?;
    let mut tree = Tree::default();
    let failed = |ReadError { path, source }| ImageError::io(path.display(), source);
    let files = Directory::open(dir).map_err(failed)?;
    let listing = files.list(Special::Keep, MAX_FILES).map_err(failed)?;
    let conflict = |conflict| ImageError::invalid(&dir.display().to_string(), &format!("makes no sense: {conflict}"));
    tree.apply(listing.changes).map_err(conflict)?;
    import::write(&base, settings, &mut tree, &files, &Execution::default(), &draft, told)?;
    import::finish(store, settings, draft)
}
