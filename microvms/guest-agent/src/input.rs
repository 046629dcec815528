//! What an attempt is given besides its spec.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use blixard::{
    error::Error,
    job::{InputFile, JobInput},
    pb::{common::v1 as pbc, guest::v1 as pb},
};

/// Checks what came with an attempt.
///
/// # Errors
/// The first field that is wrong.
pub(crate) fn parse(input: Option<pb::GuestInput>) -> Result<JobInput, Error> {
    let pb::GuestInput { stdin, files, secrets } = input.unwrap_or_default();
    JobInput::parse("start.input", pbc::JobInput { stdin, files, secrets, ..Default::default() })
}

/// Puts the files where they belong.
///
/// # Errors
/// Which one could not be written, and why, for people.
pub(crate) fn write_files(files: &[InputFile]) -> Result<(), String> {
    files.iter().try_for_each(|file| write(file).map_err(|error| format!("cannot write {}: {error}", file.path)))
}

fn write(file: &InputFile) -> io::Result<()> {
    let path = Path::new(&file.path);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    // What is there already may be read-only, a link to somewhere else, or a program that runs: it is replaced, not written to.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    new.write_all(&file.content)?;
    // Not by `open`, which would take the umask off.
    new.set_permissions(fs::Permissions::from_mode(file.mode))
}
