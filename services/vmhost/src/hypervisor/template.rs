//! What the drivers' templates have in common: what they depend on, and when a machine is ready to be saved as one.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Launch, LaunchError, Machine, image, machine::cannot};

/// Between two looks at a machine that comes up.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// Lines of `/proc/cpuinfo` that say which CPU it is. What else is there changes while the machine runs.
const CPU: [&str; 3] = ["model name", "microcode", "flags"];

/// What a template of this launch depends on whoever makes it, a thing a line: the programs, the CPU, the host's kernel, the image, the
/// shape. Blocking.
pub(super) fn basis(
    launch: &Launch,
    image_dir: &Path,
    driver: &str,
    programs: &[&Path],
) -> Result<String, LaunchError> {
    let image = image::find(image_dir, &launch.image)?;
    let mut lines = vec![format!("driver {driver}"), format!("shape {} {}", launch.vcpus, launch.memory_mib)];
    let manifest = image_dir.join(&launch.image).join(image::MANIFEST);
    let parts: [Option<&PathBuf>; 4] =
        [Some(&manifest), Some(&image.kernel), Some(&image.initramfs), image.root_disk.as_ref()];
    let files = programs.iter().copied().chain(parts.into_iter().flatten().map(PathBuf::as_path));
    for file in files {
        lines.push(identity(file).map_err(cannot(format!("look at {}", file.display())))?);
    }
    // The digests of the image's files, among others.
    let text = fs::read_to_string(&manifest).map_err(cannot(format!("read {}", manifest.display())))?;
    lines.push(text);
    let cpus = fs::read_to_string("/proc/cpuinfo").map_err(cannot("read /proc/cpuinfo"))?;
    let first = cpus.split("\n\n").next().unwrap_or_default().lines();
    lines.extend(first.filter(|line| CPU.iter().any(|name| line.starts_with(name))).map(str::to_owned));
    let kernel = fs::read_to_string("/proc/version").map_err(cannot("read /proc/version"))?;
    lines.push(kernel);
    Ok(lines.join("\n"))
}

/// Differs when a file has been replaced or written to, whatever its name says.
fn identity(file: &Path) -> std::io::Result<String> {
    let metadata = fs::metadata(file)?;
    let (ino, size, seconds, nanos) = (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
    Ok(format!("file {} {ino} {size} {seconds}.{nanos}", file.display()))
}

/// Waits until a machine that comes up is `ready`; an error when it ends first. Its caller has the deadline.
pub(super) async fn until_ready(
    machine: &dyn Machine,
    ready: impl Fn(&dyn Machine) -> bool,
) -> Result<(), LaunchError> {
    while !ready(machine) {
        tokio::select! {
            exit = machine.wait() => {
                let output = String::from_utf8_lossy(&machine.console().tail).trim().to_owned();
                return Err(LaunchError::EndedEarly { exit, output });
            }
            () = tokio::time::sleep(LOOK_AGAIN_AFTER) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use blixard::id::VmId;

    use super::*;

    #[test]
    fn a_basis_changes_with_everything_that_a_template_depends_on_and_with_nothing_else() {
        let root = tempfile::tempdir().expect("tempdir");
        let image = root.path().join("default");
        fs::create_dir(&image).expect("mkdir");
        fs::write(image.join("manifest.json"), r#"{"kernel":"k","initramfs":"i","cmdline":""}"#).expect("writes");
        fs::write(image.join("k"), "k").expect("writes");
        fs::write(image.join("i"), "i").expect("writes");
        let program = root.path().join("program");
        fs::write(&program, "p").expect("writes");
        let launch = || Launch {
            vm_id: VmId::random(),
            image: "default".to_owned(),
            vcpus: 1,
            memory_mib: 256,
            dir: "/nowhere".into(),
            nic: None,
            disks: vec![],
        };
        let basis = |launch: &Launch, driver| basis(launch, root.path(), driver, &[&program]).expect("there");

        let first = basis(&launch(), "d");
        assert_eq!(first, basis(&launch(), "d"), "another VM of the same kind");
        let mut seen = vec![first];
        let mut differs = |basis: String| {
            assert!(!seen.contains(&basis), "{basis}");
            seen.push(basis);
        };
        differs(basis(&launch(), "e"));
        differs(basis(&Launch { vcpus: 2, ..launch() }, "d"));
        differs(basis(&Launch { memory_mib: 512, ..launch() }, "d"));
        for file in ["program", "default/k", "default/i"] {
            // The same bytes in another file: what was mapped from the old one may differ all the same.
            let path = root.path().join(file);
            fs::copy(&path, path.with_extension("copy")).expect("copies");
            fs::rename(path.with_extension("copy"), &path).expect("renames");
            differs(basis(&launch(), "d"));
        }
        let manifest = r#"{"kernel":"k","initramfs":"i","cmdline":"q"}"#;
        fs::write(image.join("manifest.json"), manifest).expect("writes");
        differs(basis(&launch(), "d"));
    }
}
