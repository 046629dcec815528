//! Which Cloud Hypervisor is installed. The driver is made for one major version: fields, defaults and events change from
//! one to the next.

use std::{
    io::{self, Read as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The major version that this driver is made for and tried with.
pub(super) const SUPPORTED: u32 = 53;
/// It prints its version and ends: milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// More of its output does not matter.
const MAX_OUTPUT_BYTES: u64 = 1024;

/// The version of a program, if it is one that the driver can work with; else what is wrong, in words.
pub(super) fn check(program: &Path) -> Result<String, String> {
    let output = ask(program).map_err(|error| format!("{} --version: {error}", program.display()))?;
    let unclear = || format!("{} --version says \"{}\"", program.display(), output.lines().next().unwrap_or_default());
    let version = parse(&output).ok_or_else(unclear)?;
    match major(version) {
        Some(SUPPORTED) => Ok(version.to_owned()),
        Some(_) | None => Err(other(&format!("{} is version {version}", program.display()))),
    }
}

/// What to say of another version.
pub(super) fn other(what: &str) -> String {
    format!("{what}; this driver is made for version {SUPPORTED}")
}

/// The first number of "53.0.0".
pub(super) fn major(version: &str) -> Option<u32> {
    version.split(['.', '-']).next()?.parse().ok()
}

/// "53.0" of "cloud-hypervisor v53.0\n…".
fn parse(output: &str) -> Option<&str> {
    let version = output.lines().next()?.strip_prefix("cloud-hypervisor v")?;
    major(version).map(|_| version)
}

fn ask(program: &Path) -> io::Result<String> {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut output = String::new();
    child.stdout.take().map(|stdout| stdout.take(MAX_OUTPUT_BYTES).read_to_string(&mut output)).transpose()?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn only_the_version_that_the_driver_is_made_for_will_do() {
        let dir = tempfile::tempdir().expect("tempdir");
        let program = dir.path().join("cloud-hypervisor");
        let says = |what: &str| {
            fs::write(&program, format!("#!/bin/sh\necho '{what}'\n")).expect("writes");
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
            check(&program).map_err(|problem| problem.replace(&dir.path().display().to_string(), ""))
        };
        assert_eq!(says("cloud-hypervisor v53.0\nMigration Protocol Versions: 0"), Ok("53.0".to_owned()));
        assert_eq!(says("cloud-hypervisor v53.1-4-gabc-dirty"), Ok("53.1-4-gabc-dirty".to_owned()));
        let other = Err("/cloud-hypervisor is version 52.0; this driver is made for version 53".to_owned());
        assert_eq!(says("cloud-hypervisor v52.0"), other);
        assert_eq!(says("hello"), Err("/cloud-hypervisor --version says \"hello\"".to_owned()));
        let missing = check(Path::new("/no/such/program")).expect_err("is missing");
        assert!(missing.starts_with("/no/such/program --version: No such file"), "{missing}");
    }
}
