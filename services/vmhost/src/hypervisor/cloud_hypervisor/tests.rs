//! The driver and its client against the real program, with guests of a few bytes: they do what a stock kernel needs real
//! hardware virtualization for, so any `/dev/kvm` that opens will do. (`tests/hypervisor_conformance` boots real guests.)
//!
//! Where the program or `/dev/kvm` is missing they say `SKIPPED`, and fail instead with
//! `BLIXARD_REQUIRE_CLOUD_HYPERVISOR=1`.

use std::{
    env, fs,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use blixard::{id::VmId, pb::common::v1::IoCounters};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

use super::{
    API_SOCKET, Boot, KIND, VSOCK_SOCKET, Vmm,
    api::{Api, ApiError, Call, DeviceCounters, parse},
    config::{NetConfig, VmConfig},
    disks, has_landlock, installed, needs, verdict,
};
use crate::hypervisor::{Disk, Hypervisor as _, Launch, LaunchError, Machine, ProcessExit, image};

/// For anything that takes milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);

/// Real machines in a directory of their own.
struct Bed {
    root: tempfile::TempDir,
    driver: Vmm<Boot>,
}

impl Bed {
    /// Its only image, "tiny", is a guest that runs `code` after it has said that it is up.
    fn with_guest(code: &[u8]) -> Option<Self> {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        let program = match (installed(), kvm) {
            (Ok((program, _)), Ok(_)) => program,
            (Err(problem), _) => return skipped(&problem),
            (Ok(_), Err(error)) => return skipped(&format!("/dev/kvm cannot be opened: {error}")),
        };
        let root = tempfile::tempdir().expect("tempdir");
        let image = root.path().join("images/tiny");
        fs::create_dir_all(&image).expect("mkdir");
        fs::write(image.join("kernel"), kernel(code)).expect("writes");
        fs::write(image.join("initramfs"), "none").expect("writes");
        let manifest = json!({"kernel": "kernel", "initramfs": "initramfs", "cmdline": "console=ttyS0"});
        fs::write(image.join("manifest.json"), manifest.to_string()).expect("writes");
        let boot = Boot { program, landlock: has_landlock() };
        let driver = Vmm::new(boot, &root.path().join("images"));
        Some(Self { root, driver })
    }

    fn launch(&self) -> Launch {
        let vm_id = VmId::random();
        let dir = self.root.path().join(vm_id.to_string());
        fs::create_dir(&dir).expect("mkdir");
        let (nic, user, cgroup, io_max, disks) = (None, None, None, None, vec![]);
        Launch { vm_id, image: "tiny".to_owned(), vcpus: 1, memory_mib: 64, dir, nic, user, cgroup, io_max, disks }
    }

    /// A machine that runs, with its API.
    async fn running(&self) -> Running {
        let launch = self.launch();
        let machine = within("launch", self.driver.launch(&launch)).await.expect("launches");
        Running { api: Api::new(launch.dir.join("run").join(API_SOCKET)), machine }
    }

    /// A hypervisor that was told about a VM but not to boot it.
    async fn created(&self) -> Running {
        let launch = self.launch();
        let image = image::find(&self.driver.image_dir, &launch.image).expect("there");
        let config = VmConfig::new(&launch, image, VSOCK_SOCKET, self.driver.boot.landlock);
        let start = self.driver.launch_with(KIND, &launch, |boot, starting, _, _| boot.start_vmm(starting).map(drop));
        let machine = within("launch", start).await.expect("starts");
        let api = Api::new(launch.dir.join("run").join(API_SOCKET));
        api.create(&config).await.expect("creates");
        Running { api, machine }
    }
}

fn skipped<T>(problem: &str) -> Option<T> {
    let required = env::var_os("BLIXARD_REQUIRE_CLOUD_HYPERVISOR").is_some_and(|value| value == "1");
    assert!(!required, "BLIXARD_REQUIRE_CLOUD_HYPERVISOR=1, but {problem}");
    eprintln!("SKIPPED: the real Cloud Hypervisor is not tried: {problem}");
    None
}

/// Ends with the test, whatever becomes of that.
struct Running {
    api: Api,
    machine: Arc<dyn Machine>,
}

impl Running {
    async fn get(&self, name: &'static str) -> Value {
        let answer = self.api.call(Call { method: http::Method::GET, name, ..Call::default() }).await.expect("answers");
        parse(name, &answer.expect("has a body")).expect("is JSON")
    }

    async fn put(&self, name: &'static str, body: Value) -> Result<(), ApiError> {
        self.api.put(name, Some(&body).filter(|body| !body.is_null())).await
    }

    async fn state(&self) -> Value {
        self.get("vm.info").await["state"].take()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for pid in self.machine.pids() {
            let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not 0");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}

async fn says(machine: &Arc<dyn Machine>, text: &str) {
    within(text, async {
        while !String::from_utf8_lossy(&machine.console().tail).contains(text) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Writes a byte to a port: `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> [u8; 7] {
    let [low, high] = port.to_le_bytes();
    [0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `hlt`, for ever.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];
/// ACPI's port for sleeping and resetting.
const POWER: u16 = 0x600;

/// An ELF kernel that is entered in 32-bit mode (PVH), prints "up" to the serial port, runs `code`, and halts.
fn kernel(code: &[u8]) -> Vec<u8> {
    const AT: u32 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let text: Vec<u8> = [out(0x3f8, b'u'), out(0x3f8, b'p'), out(0x3f8, b'\n')].concat();
    let text = [&text, code, &HALT[..]].concat();
    // Type 18: the 32-bit entry point.
    let note =
        [&4_u32.to_le_bytes()[..], &8_u32.to_le_bytes(), &18_u32.to_le_bytes(), b"Xen\0", &u64::from(AT).to_le_bytes()];
    let note = note.concat();
    let segment = |kind: u32, offset: u64, length: usize| {
        let (length, address) = (length as u64, u64::from(AT));
        let words = [offset, address, address, length, length, 4];
        [&kind.to_le_bytes()[..], &7_u32.to_le_bytes(), &words.map(u64::to_le_bytes).concat()].concat()
    };
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    elf.extend(1_u32.to_le_bytes());
    elf.extend([u64::from(AT), 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    elf.extend(segment(1, HEADERS, text.len()));
    elf.extend(segment(4, HEADERS + text.len() as u64, note.len()));
    [elf, text, note].concat()
}

/// A TAP in a network namespace that lives as long as the TAP.
fn tap() -> Option<OwnedFd> {
    const OPEN: &str = r#"
import fcntl, os, socket, struct
tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, TUNSETIFF = 0x2, 0x1000, 0x4000, 0x400454CA
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"blixtest0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
socket.send_fds(socket.socket(fileno=0), [b"."], [tap])
"#;
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let mut command = Command::new("unshare");
    command.args(["--net", "python3", "-c", OPEN]).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    let output = command.stderr(Stdio::piped()).output();
    drop(command);
    let problem = match output {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(problem) = problem {
        return skipped(&format!("no TAP can be made in a network namespace (root, unshare, python3): {problem}"));
    }
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(&ours, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC).expect("receives");
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

fn net() -> NetConfig {
    NetConfig { id: "net0".into(), mac: "52:54:00:12:34:56".into(), num_queues: 2 }
}

#[tokio::test]
async fn a_guest_that_powers_off_ends_clean_with_its_console() {
    let Some(bed) = Bed::with_guest(&out(POWER, 0x34)) else { return };
    let running = bed.running().await;
    let exit = within("power-off", running.machine.wait()).await;
    assert!(exit.is_clean(), "{exit}");
    assert_eq!(exit.to_string(), "cloud-hypervisor exited with status 0");
    let console = running.machine.console();
    let console = String::from_utf8_lossy(&console.tail);
    assert!(console.contains("up\n"), "{console}");
}

#[tokio::test]
async fn a_guest_that_resets_is_not_booted_again_and_the_exit_says_why() {
    let Some(bed) = Bed::with_guest(&out(POWER, 1)) else { return };
    let running = bed.running().await;
    let exit = within("reset", running.machine.wait()).await;
    assert_eq!(exit.why, Some("the guest reset itself"));
    assert_eq!(exit.to_string(), "the guest reset itself: cloud-hypervisor was killed by signal 9");
}

#[tokio::test]
async fn a_machine_that_runs_is_paused_resumed_and_counted() {
    let Some(bed) = Bed::with_guest(&HALT) else { return };
    let running = bed.running().await;
    says(&running.machine, "up\n").await;
    assert_eq!(running.state().await, "Running");
    running.put("vm.pause", Value::Null).await.expect("pauses");
    assert_eq!(running.state().await, "Paused");
    running.put("vm.resume", Value::Null).await.expect("resumes");
    assert_eq!(running.state().await, "Running");
    assert!(running.get("vm.counters").await.is_object());
    let usage = within("usage", running.machine.usage()).await;
    // It has no disk, and says so.
    let none = IoCounters { reads: Some(0), writes: Some(0), ..IoCounters::default() };
    assert_eq!((usage.disks, usage.network), (Some(none), None), "{usage:?}");

    within("kill", running.machine.kill()).await;
    let exit = within("wait", running.machine.wait()).await;
    assert_eq!((exit.status, exit.why), (ProcessExit::Signaled(9), None));
}

#[tokio::test]
async fn a_vm_is_resized_and_deleted_before_it_boots() {
    let Some(bed) = Bed::with_guest(&HALT) else { return };
    let running = bed.created().await;
    assert_eq!(running.state().await, "Created");
    running.put("vm.resize", json!({"desired_ram": 128 << 20})).await.expect("resizes");
    assert_eq!(running.get("vm.info").await["config"]["memory"]["size"], 128 << 20);
    running.put("vm.delete", Value::Null).await.expect("deletes");
    let error = running.api.boot().await.expect_err("there is no VM");
    assert!(matches!(error, ApiError::Refused { .. }), "{error}");
    running.put("vmm.shutdown", Value::Null).await.expect("ends");
    assert!(within("end", running.machine.wait()).await.is_clean());
}

#[tokio::test]
async fn a_tap_is_passed_before_the_boot_and_while_the_guest_runs() {
    let Some(bed) = Bed::with_guest(&HALT) else { return };
    let Some(first) = tap() else { return };
    let running = bed.created().await;
    let place = running.api.add_net(&net(), vec![first]).await.expect("is added");
    assert_eq!(place, None);
    running.api.boot().await.expect("boots");
    says(&running.machine, "up\n").await;
    let mut info = running.get("vm.info").await;
    assert_eq!(info["config"]["net"][0]["mac"].take(), "52:54:00:12:34:56");
    assert!(info["device_tree"]["net0"].is_object(), "{info}");

    let Some(second) = tap() else { return };
    let config = NetConfig { id: "net1".into(), mac: "52:54:00:12:34:57".into(), ..net() };
    let place = running.api.add_net(&config, vec![second]).await.expect("is added");
    assert_eq!(place.expect("has a place").id, "net1");
}

#[tokio::test]
async fn what_the_hypervisor_refuses_is_in_the_launch_error() {
    let Some(bed) = Bed::with_guest(&HALT) else { return };
    fs::write(bed.root.path().join("images/tiny/kernel"), "not a kernel").expect("writes");
    let launch = bed.launch();
    let Err(error) = within("launch", bed.driver.launch(&launch)).await else { panic!("it booted") };
    let text = crate::driver::with_sources(&error);
    assert!(matches!(error, LaunchError::Io { .. }), "{text}");
    assert!(text.starts_with("cannot boot the VM: vm.boot was refused with status 500"), "{text}");
    assert!(text.to_lowercase().contains("kernel"), "{text}");
    assert_eq!(within("sweep", bed.driver.sweep(&launch)).await.expect("sweeps"), 0, "it was left running");
}

#[tokio::test]
async fn its_process_may_open_nothing_but_what_it_needs() {
    let Some(bed) = Bed::with_guest(&HALT) else { return };
    let running = bed.running().await;
    let status = |thread: &Path| fs::read_to_string(thread.join("status")).expect("it runs");
    let pid = running.machine.pids()[0];
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let filtered = threads.filter(|thread| status(&thread.path()).contains("Seccomp:\t2")).count();
    assert!(filtered >= 3, "only {filtered} of its threads are filtered");
    if has_landlock() {
        // A disk that exists, but was not named when the VM was created.
        let disk = bed.root.path().join("disk");
        fs::write(&disk, [0; 4096]).expect("writes");
        let error = running.put("vm.add-disk", json!({"path": disk, "image_type": "Raw"})).await.expect_err("refused");
        assert!(error.to_string().contains("Permission denied"), "{error}");
    }
}

#[test]
fn who_has_no_disk_gets_no_io_uring() {
    let (nic, user, cgroup, io_max, disks) = (None, None, None, None, vec![]);
    let (vm_id, image, dir) = (VmId::random(), "tiny".to_owned(), "/vm".into());
    let without = Launch { vm_id, image, vcpus: 1, memory_mib: 64, dir, nic, user, cgroup, io_max, disks };
    let disk = Disk { path: "/disk".into(), serial: "disk".to_owned(), read_only: true, filesystem: "erofs" };
    let with = Launch { disks: vec![disk], ..without.clone() };
    let image = |root_disk| image::Image {
        kernel: "/kernel".into(),
        initramfs: "/initramfs".into(),
        cmdline: String::new(),
        root_disk,
        filesystems: vec![],
    };
    let gets = |image, launch| needs(&image, launch).uses.io_uring;
    assert!(!gets(image(None), &without));
    assert!(gets(image(None), &with) && gets(image(Some("/root".into())), &without));
}

#[test]
fn disks_are_told_from_other_devices_and_a_liars_numbers_do_no_harm() {
    let device = |counters: &[(&str, u64)]| -> DeviceCounters {
        counters.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    };
    let disk = device(&[("read_bytes", 4096), ("write_bytes", 512), ("read_ops", 2), ("write_ops", 1)]);
    let (net, liar) = (device(&[("rx_bytes", 7), ("tx_frames", 7)]), device(&[("read_bytes", u64::MAX)]));
    let told = disks([&disk, &net, &disk].into_iter());
    let expected = IoCounters { read_bytes: 8192, written_bytes: 1024, reads: Some(4), writes: Some(2) };
    assert_eq!(told, expected);
    assert_eq!(disks([&disk, &liar].into_iter()).read_bytes, u64::MAX);
}

#[test]
fn an_event_that_ends_the_machine_is_told_from_the_others() {
    let event = |source, event| json!({"timestamp": {}, "source": source, "event": event, "properties": null});
    let says = |source, name| verdict(&format!("{:#}", event(source, name)));
    assert_eq!(says("guest", "panic"), Some("the guest's kernel panicked"));
    assert_eq!(says("vm", "rebooting"), Some("the guest reset itself"));
    assert_eq!(says("vm", "booted"), None);
    assert_eq!(says("virtio-device", "reset"), None);
    assert_eq!(verdict("{"), None);
}
