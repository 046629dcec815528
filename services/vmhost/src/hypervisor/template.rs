//! What the drivers' templates have in common: what they depend on, and when a machine is ready to be saved as one.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{fs::FallocateFlags, process::Pid};

use super::{Launch, LaunchError, Machine, image, machine::cannot};

/// Between two looks at a machine that comes up.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// Of a machine that nobody waits for, from -20 to 19.
const NICENESS: i32 = 10;
/// The smallest hole that is worth one: many small ones cost more than they save.
const HOLE_BYTES: usize = 64 * 1024;
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
fn identity(file: &Path) -> io::Result<String> {
    let metadata = fs::metadata(file)?;
    let (ino, size, seconds, nanos) = (metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec());
    Ok(format!("file {} {ino} {size} {seconds}.{nanos}", file.display()))
}

/// Gives back the parts of a file's disk space that hold nothing but zeros. They read the same afterwards.
pub(super) fn dig_holes(path: &Path) -> io::Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let (mut block, zeros) = (vec![0; HOLE_BYTES], vec![0; HOLE_BYTES]);
    let mut offset = 0;
    while offset < length {
        let size = usize::try_from(length - offset).unwrap_or(HOLE_BYTES).min(HOLE_BYTES);
        file.read_exact_at(&mut block[..size], offset)?;
        if block[..size] == zeros[..size] {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, offset, size as u64)?;
        }
        offset += size as u64;
    }
    Ok(())
}

/// Lets everything else on the host go before a machine, whose processes have just been started.
pub(super) fn be_nice(machine: &dyn Machine) {
    for pid in machine.pids() {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let threads = threads.filter_map(|thread| Pid::from_raw(thread.file_name().to_str()?.parse().ok()?));
        for thread in threads {
            // An error means that it has ended.
            let _ = rustix::process::setpriority_process(Some(thread), NICENESS);
        }
    }
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
    fn holes_are_dug_where_nothing_is_and_the_rest_stays() {
        let root = tempfile::tempdir().expect("tempdir");
        let path = root.path().join("memory");
        let mut memory = vec![0; 16 * HOLE_BYTES + 100];
        memory[3 * HOLE_BYTES + 5] = 1;
        memory[9 * HOLE_BYTES..][..HOLE_BYTES].fill(2);
        *memory.last_mut().expect("not empty") = 3;
        fs::write(&path, &memory).expect("writes");
        dig_holes(&path).expect("digs");
        assert!(fs::read(&path).expect("reads") == memory);
        let on_disk = fs::metadata(&path).expect("there").blocks() * 512;
        assert!(on_disk < 5 * HOLE_BYTES as u64, "{on_disk} bytes on the disk");
    }

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
            user: None,
            cgroup: None,
            io_max: None,
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
