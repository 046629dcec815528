//! Real guests: the same house with QEMU under it. `make test` requires them (BLIXARD_REQUIRE_QEMU=1); elsewhere a machine
//! without QEMU, vhost-device-vsock or ./images skips these tests and says so.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    plane::Plane,
    support::{code, output, stdout, text, wait_for},
};

/// The directory of images for a control plane with real guests; `None` where there can be none.
pub(crate) fn images() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let images = root.join("images");
    let vsock = root.join("target/tools/bin/vhost-device-vsock");
    let found = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let missing = [
        (!found("qemu-system-x86_64"), "qemu-system-x86_64 (apt-get install qemu-system-x86)"),
        (!found("vhost-device-vsock") && !vsock.exists(), "vhost-device-vsock (make tools)"),
        (!images.join("default/manifest.json").exists(), "images/default (make guest-image)"),
    ];
    if let Some((_, missing)) = missing.into_iter().find(|(is_missing, _)| *is_missing) {
        let required = std::env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
        assert!(!required, "BLIXARD_REQUIRE_QEMU=1, and there is no {missing}");
        eprintln!("SKIPPED: no real guest without {missing}");
        return None;
    }
    Some(images)
}

fn flags() -> Option<[String; 6]> {
    let images = images()?.to_str().expect("UTF-8").to_owned();
    Some(["--driver".into(), "qemu".into(), "--image-dir".into(), images, "--default-memory-mb".into(), "256".into()])
}

fn plane() -> Option<Plane> {
    let flags = flags()?;
    Some(Plane::with_flags(&flags.each_ref().map(String::as_str)))
}

#[test]
fn a_job_runs_in_a_real_guest_with_a_kernel_of_its_own() {
    let Some(plane) = plane() else { return };
    let script = "uname -r; echo aside >&2; head -c 3000000 /dev/zero | tr '\\0' '\\377'; exit 9";
    let output = output(plane.cli(["run", "--ephemeral", "--", "sh", "-c", script]));
    assert_eq!((code(output.status), text(&output.stderr).as_str()), (9, "aside\n"));

    let newline = output.stdout.iter().position(|&byte| byte == b'\n').expect("a line");
    let guest = text(&output.stdout[..newline]);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the host's kernel");
    assert_ne!(guest, host.trim(), "the job saw the host's kernel");
    let rest = &output.stdout[newline + 1..];
    assert!(rest.len() == 3_000_000 && rest.iter().all(|&byte| byte == 0xff), "{} bytes", rest.len());
}

#[test]
fn a_real_guest_outlives_kill_9_of_the_control_plane_and_its_job_goes_on() {
    let Some(mut plane) = plane() else { return };
    let script = "for i in $(seq 40); do echo line $i; sleep 0.1; done";
    let id = stdout(plane.cli(["run", "--service", "--detach", "--", "sh", "-c", script])).trim().to_owned();
    wait_for("output from the guest", || {
        let log = output(plane.cli(["job", "logs", &id]));
        if text(&log.stdout).contains("line 5") { Ok(()) } else { Err(text(&log.stdout)) }
    });
    plane.kill();
    plane.restart();
    let log = stdout(plane.cli(["job", "logs", "-f", &id]));
    let expected: String = (1..=40).map(|number| format!("line {number}\n")).collect();
    assert_eq!(log, expected);
    let job = plane.wait_for_job(&id, "Succeeded");
    assert_eq!(job["attempt"], 1, "{job}");
}
