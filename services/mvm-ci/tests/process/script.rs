//! `test-vm-hiqlite.sh` of the usage guide, as its reader runs it.

use std::{path::Path, process::Command};

use crate::{
    guest,
    support::{output, text},
};

/// Runs the script with this driver, where there is a sqlite3; `make test` requires one (BLIXARD_REQUIRE_QEMU=1).
fn run(driver: &str) {
    if Command::new("sqlite3").arg("-version").output().is_err() {
        let required = std::env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
        assert!(!required, "BLIXARD_REQUIRE_QEMU=1, and there is no sqlite3");
        eprintln!("SKIPPED: no look into Hiqlite without sqlite3 (apt-get install sqlite3)");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut script = Command::new(root.join("test-vm-hiqlite.sh"));
    script.arg(driver).env("MVM_CI", env!("CARGO_BIN_EXE_mvm-ci")).env("BLIXARD_IMAGE_DIR", root.join("images"));
    let ended = output(script);
    let said = text(&ended.stdout);
    assert!(ended.status.success(), "{}\n{said}{}", ended.status, text(&ended.stderr));
    assert!(
        said.ends_with(&format!("PASS: a VM went through its states on \"{driver}\", and Hiqlite knows all of them\n")),
        "{said}"
    );
}

#[test]
fn a_vm_is_seen_in_hiqlite_from_its_start_to_its_end() {
    run("process");
}

#[test]
fn a_real_vm_is_seen_in_hiqlite_from_its_start_to_its_end() {
    if guest::images().is_some() {
        run("qemu");
    }
}

#[test]
fn the_script_fails_where_there_is_nothing_to_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut script = Command::new(root.join("test-vm-hiqlite.sh"));
    script.arg("no-such-driver").env("MVM_CI", env!("CARGO_BIN_EXE_mvm-ci"));
    let ended = output(script);
    assert_eq!(ended.status.code(), Some(1));
    assert!(text(&ended.stderr).ends_with("FAIL (driver \"no-such-driver\")\n"), "{}", text(&ended.stderr));
}
