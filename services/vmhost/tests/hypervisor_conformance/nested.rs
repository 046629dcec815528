//! Cloud Hypervisor's part of the suite in a machine that QEMU emulates, hardware virtualization included. It is slow (a
//! guest boots in 15 s) but needs nothing of its host, and everything in it is real:
//!
//! ```text
//!   this test ─► QEMU, TCG: a CPU with SVM ─► Linux with kvm_amd ─► this test again ─► cloud-hypervisor ─► guest
//! ```
//!
//! The machine is made of what is there: the kernel and initramfs of the default image, and after that initramfs a second
//! one with this very program, Cloud Hypervisor, the image, KVM's modules from the kernel's package, and an `/init` that
//! runs the tests and says how they ended. A disk, sparse, has what they make: use of one can be limited.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use blixard::config::DriverChoice;
use blixard_vmhost::{
    disk::ext4,
    hypervisor::{HypervisorSettings, choose, diagnose},
};

use super::{image_dir, project};

/// Says that the real Cloud Hypervisor must be tried: `1` somehow, [`HERE`] without another machine around it.
pub(super) const REQUIRE: &str = "BLIXARD_REQUIRE_CLOUD_HYPERVISOR";
pub(super) const HERE: &str = "here";
/// Which tests to run in the machine, when not all of them.
const TESTS: &str = "BLIXARD_NESTED_TESTS";
/// The suite takes some minutes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(3000);
/// What `/init` says before the test's exit status.
const VERDICT: &str = "nested suite ended with status ";
const MEMORY_MIB: u32 = 2048;
const DISK_MIB: u64 = 8192;

/// In the order of their dependencies.
const MODULES: [&str; 10] = [
    "virt/lib/irqbypass.ko",
    "arch/x86/kvm/kvm.ko",
    "arch/x86/kvm/kvm-amd.ko",
    "drivers/net/tun.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
];

#[test]
fn cloud_hypervisor_passes_in_an_emulated_machine() {
    let parts = match Parts::find() {
        Ok(parts) => parts,
        Err(problem) => {
            let required = env::var_os(REQUIRE).is_some_and(|value| value == "1");
            assert!(!required, "{REQUIRE}=1, but {problem}");
            eprintln!("SKIPPED: Cloud Hypervisor is not tried in an emulated machine: {problem}");
            return;
        }
    };
    let Some(parts) = parts else {
        eprintln!("SKIPPED: no emulated machine is needed: this one runs Cloud Hypervisor itself");
        return;
    };
    let dir = tempfile::tempdir().expect("tempdir");
    let initramfs = parts.pack(dir.path());
    let disk = dir.path().join("disk");
    let file = fs::File::options().read(true).write(true).create_new(true).open(&disk).expect("creates");
    ext4::create(&file, DISK_MIB, &[7; 16]).expect("writes");
    let verdict = Machine::boot(&parts, &initramfs, &disk).verdict();
    assert_eq!(verdict.as_deref(), Some("0"), "see what it printed above");
}

/// What the emulated machine is made of.
struct Parts {
    qemu: PathBuf,
    cloud_hypervisor: PathBuf,
    busybox: PathBuf,
    image: PathBuf,
    kernel_package: PathBuf,
}

impl Parts {
    /// `None` when Cloud Hypervisor runs on this machine itself.
    fn find() -> Result<Option<Self>, String> {
        let settings = HypervisorSettings { image_dir: image_dir(), agent_command: Vec::new(), vm_uids: None };
        if choose(DriverChoice::CloudHypervisor, &settings).is_ok() {
            return Ok(None);
        }
        let checks = diagnose(&settings);
        let found = |name: &str| {
            let check = checks.iter().find(|check| check.name == name).ok_or("is not looked for")?;
            // "path" or "path, version …"
            let path = check.detail.split(',').next().unwrap_or_default();
            if check.ok { Ok(PathBuf::from(path)) } else { Err(format!("{name}: {}", check.detail)) }
        };
        let image = image_dir().join("default");
        if !image.join("manifest.json").exists() {
            return Err(format!("there is no image in {} (make guest-image)", image.display()));
        }
        Ok(Some(Self {
            cloud_hypervisor: found("cloud-hypervisor")?,
            qemu: found("qemu-system-x86_64")?,
            busybox: on_path("busybox")?,
            kernel_package: kernel_package(&image)?,
            image,
        }))
    }

    /// Makes the machine's initramfs.
    fn pack(&self, dir: &Path) -> PathBuf {
        let tree = dir.join("tree");
        let copy = |from: &Path, to: &str| {
            let to = tree.join(to);
            fs::create_dir_all(to.parent().expect("below the tree")).expect("mkdir");
            fs::copy(from, &to).unwrap_or_else(|error| panic!("copy {}: {error}", from.display()));
        };
        let test = env::current_exe().expect("this test has a path");
        run(Command::new("strip").arg("-o").arg(dir.join("test")).arg(&test));
        copy(&dir.join("test"), "nested/test");
        copy(&self.cloud_hypervisor, "nested/cloud-hypervisor");
        copy(&self.busybox, "bin/busybox");
        for library in libraries(&test).into_iter().chain(libraries(&self.cloud_hypervisor)) {
            copy(&library, library.strip_prefix("/").expect("absolute").to_str().expect("UTF-8"));
        }
        for file in ["manifest.json", "vmlinux", "initramfs"] {
            copy(&self.image.join(file), &format!("nested/images/default/{file}"));
        }
        let unpack = r#"dpkg-deb --fsys-tarfile "$0" | tar -x -C "$1" --no-same-owner --wildcards "$@""#;
        let mut modules = Command::new("sh");
        modules.args(["-c", &unpack.replace("\"$@\"", &MODULES.map(|module| format!("'*/{module}'")).join(" "))]);
        run(modules.arg(&self.kernel_package).arg(&tree));
        let init = tree.join("init");
        fs::write(&init, script()).expect("writes");
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).expect("chmod");

        // The kernel unpacks one archive after the other; a later file replaces an earlier one.
        let initramfs = dir.join("initramfs");
        fs::copy(self.image.join("initramfs"), &initramfs).expect("copies");
        let append = r#"cd "$0" && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0 >> "$1""#;
        run(Command::new("sh").args(["-c", append]).arg(&tree).arg(&initramfs));
        initramfs
    }
}

/// The package that the image's kernel is from, as `microvms/guest-image.sh` has downloaded it.
fn kernel_package(image: &Path) -> Result<PathBuf, String> {
    let manifest = fs::read_to_string(image.join("manifest.json")).map_err(|error| error.to_string())?;
    let manifest: serde_json::Value = serde_json::from_str(&manifest).map_err(|error| error.to_string())?;
    let release = manifest["kernel_release"].as_str().ok_or("the image's manifest names no kernel_release")?;
    let cache = project().join("target/guest-image");
    let files = fs::read_dir(&cache).into_iter().flatten().flatten().map(|entry| entry.path());
    let wanted = format!("linux-image-{release}_");
    files
        .filter(|file| file.extension().is_some_and(|extension| extension == "deb"))
        .find(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&wanted)))
        .ok_or_else(|| format!("{} holds no {wanted}*.deb (make guest-image)", cache.display()))
}

fn on_path(name: &str) -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| format!("{name} is not installed (apt-get install {name}-static)"))
}

/// The shared libraries of a program; none of a static one.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The emulated machine's `/init`. It runs the tests as systemd runs a service that cgroups are delegated to.
fn script() -> String {
    let tests = env::var(TESTS).unwrap_or_else(|_| "cloud_hypervisor::".to_owned());
    let modules = MODULES.map(|module| format!("insmod /lib/modules/*/kernel/{module}")).join("\n");
    format!(
        "#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+cpu +memory +pids +io' > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/unit
ip link set lo up
{modules}
mount -t ext4 /dev/vda /tmp
chmod 1777 /tmp
chmod 666 /dev/kvm
export {REQUIRE}={HERE} CLOUD_HYPERVISOR=/nested/cloud-hypervisor BLIXARD_IMAGE_DIR=/nested/images
sh -c 'echo 0 > /sys/fs/cgroup/unit/cgroup.procs; exec /nested/test {tests} --test-threads=1' 2>&1
echo {VERDICT}$?
poweroff -f
"
    )
}

/// The emulated machine. It ends with the test.
struct Machine {
    qemu: Child,
    lines: mpsc::Receiver<String>,
}

impl Machine {
    fn boot(parts: &Parts, initramfs: &Path, disk: &Path) -> Self {
        let mut qemu = Command::new(&parts.qemu);
        qemu.args(["-accel", "tcg", "-cpu", "EPYC,+svm,+npt", "-machine", "q35", "-smp", "1"]);
        qemu.args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        qemu.arg("-kernel").arg(parts.image.join("vmlinux")).arg("-initrd").arg(initramfs);
        qemu.args(["-append", "console=ttyS0 quiet loglevel=4 panic=-1 cryptomgr.notests", "-serial", "stdio"]);
        let drive = format!("if=virtio,format=raw,cache=unsafe,file={}", disk.display());
        let mut qemu =
            qemu.args(["-drive", &drive]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("QEMU starts");
        let output = BufReader::new(qemu.stdout.take().expect("a pipe"));
        // The machine is gone soon when nobody reads on.
        let (sender, lines) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { qemu, lines }
    }

    /// Passes on what the machine prints; the test's exit status, if it said one.
    fn verdict(self) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut verdict = None;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            eprintln!("nested | {line}");
            verdict = line.strip_prefix(VERDICT).map(str::to_owned).or(verdict);
        }
        verdict
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
