//! QEMU: a real guest kernel on any machine. KVM where the CPU offers it, else emulation (TCG).
//!
//! ```text
//!   vmhost ─► socket `vsock` ─► vhost-device-vsock ─► socket `vhost` ─► qemu-system-x86_64 ─► guest, vsock port 1024
//! ```
//!
//! Both processes are one machine: the end of either ends the other. `vhost-device-vsock` serves one VM each, so the
//! guest's CID needs to be unique in that process only. When QEMU hangs up it would wait for another, can't make its sockets again, says so
//! (`Could not create backend`) and ends. QEMU gets no monitor: vmhost asks it nothing that a pidfd and
//! the guest agent do not answer, and what is not there cannot be misused. Only a machine that is saved or restored has
//! one, until it has been (see `qmp`).
//!
//! A machine with a vhost-user device can neither be saved nor be filled. So a template has none, nor a network interface, but empty ports
//! for both. They are plugged into a machine that has been restored before it goes on, and its guest, which waits for them, finds them.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use super::{
    ChooseError, HypervisorSettings, Launch, LaunchError, Machine, Nic, Templates, doctor,
    image::Image,
    images_in_words,
    machine::{self, Agent, Kind, Needs, Starting, cannot},
    qmp::{self, Qmp},
    seccomp::Uses,
    template, tools,
    vmm::{self, Vmm},
};

const QEMU: &str = "qemu";
const VSOCK: &str = "vhost-device-vsock";
/// Where vhost-device-vsock takes the host's connections to the guest. Nobody may connect before the guest agent has
/// knocked: version 0.3.0 takes a connection that arrives while QEMU hands over memory and queues for an error, which
/// ends the thread that serves the device, silently and for good.
const AGENT_SOCKET: &str = "vsock";
/// Where QEMU meets vhost-device-vsock.
const VHOST_SOCKET: &str = "vhost";
/// Where QEMU offers the serial port.
const SERIAL_SOCKET: &str = "serial";
/// Where QEMU's monitor meets us, if it has one.
const MONITOR_SOCKET: &str = "monitor";
/// A saved machine's memory and devices, in a template's directory.
const STATE_FILE: &str = "state";
/// What a guest's console says when it can be saved (see `guest.proto`).
const WAITS_FOR_DEVICE: &[u8] = b"serves, and waits for a vsock device";
/// The ports into which a restored machine's devices are plugged.
const VSOCK_PORT: &str = "port1";
const NIC_PORT: &str = "port2";
/// The first CID that is not reserved.
const GUEST_CID: u32 = 3;
/// What both processes may take beside the guest's memory, in MiB. Measured: 71 with the translated code of a booted Debian guest.
const OVERHEAD_MIB: u32 = 192;
/// Room for translated code when there is no KVM. QEMU would take a gigabyte.
const TRANSLATED_MIB: u32 = 256;
/// vhost-device-vsock listens after a few milliseconds; the rest is for a loaded host.
const VSOCK_PATIENCE: Duration = Duration::from_secs(20);

const KIND: Kind = Kind {
    driver: "qemu",
    processes: &[QEMU, VSOCK],
    agent: Agent::Hybrid(AGENT_SOCKET),
    serial: Some(SERIAL_SOCKET),
    events: None,
    counters: None,
    has_children: false,
};

/// A machine that is to be saved.
const TEMPLATE: Kind = Kind { processes: &[QEMU], ..KIND };

/// What every boot needs.
#[derive(Debug, Clone)]
pub(super) struct Boot {
    qemu: PathBuf,
    vsock: PathBuf,
    kvm: bool,
}

/// The driver, and in half a line how it will run.
///
/// # Errors
/// Which programs are missing, each with the command that installs it.
pub(super) fn find(settings: &HypervisorSettings) -> Result<(Vmm<Boot>, String), ChooseError> {
    let (Some(qemu), Some(vsock)) = (tools::QEMU.find(), tools::VHOST_DEVICE_VSOCK.find()) else {
        let needed = [tools::QEMU, tools::VHOST_DEVICE_VSOCK];
        let missing = needed.iter().filter(|tool| tool.find().is_none()).map(tools::Tool::missing).collect();
        return Err(ChooseError::Missing { driver: KIND.driver, missing });
    };
    let (kvm, why) = match doctor::kvm() {
        Ok(()) => (true, "with KVM".to_owned()),
        Err(problem) => (false, format!("with emulation (TCG), for {problem}")),
    };
    let driver = Vmm::new(Boot { qemu, vsock, kvm }, &settings.image_dir);
    let why = format!("{why}; {}", images_in_words(&driver.image_dir));
    Ok((driver, why))
}

#[tonic::async_trait]
impl Templates for Vmm<Boot> {
    fn basis(&self, launch: &Launch) -> Result<String, LaunchError> {
        let basis = template::basis(launch, &self.image_dir, KIND.driver, &[&self.boot.qemu])?;
        Ok(format!("{basis}\n{:?}", self.boot.accelerator()))
    }

    async fn save(&self, launch: &Launch, into: &Path) -> Result<(), LaunchError> {
        let (give, take) = std::sync::mpsc::channel();
        let start = move |boot: &Boot, starting: &mut Starting, image: Image, what: &Launch| {
            let monitor = expect_monitor(starting)?;
            boot.contain(starting, &image)?;
            let arguments = boot.template_arguments(&image, what);
            let qmp = boot.start_with_monitor(starting, monitor, &arguments, Stdio::null())?;
            // Whoever takes it waits for this.
            let _ = give.send(qmp);
            Ok(())
        };
        let machine = self.launch_with(TEMPLATE, launch, start).await?;
        template::be_nice(&*machine);
        let waits = |machine: &dyn Machine| {
            machine.console().tail.windows(WAITS_FOR_DEVICE.len()).any(|at| at == WAITS_FOR_DEVICE)
        };
        let file = into.join(STATE_FILE);
        let saved = match template::until_ready(&*machine, waits).await {
            Ok(()) => tokio::task::spawn_blocking(move || {
                let mut qmp = take.recv().map_err(io::Error::other)?;
                qmp.save(fs::File::create_new(file)?)
            })
            .await
            .map_err(io::Error::from)
            .flatten()
            .map_err(cannot("save the machine")),
            Err(error) => Err(error),
        };
        machine.kill().await;
        saved
    }

    async fn restore(&self, launch: &Launch, template: &Path) -> Result<Arc<dyn Machine>, LaunchError> {
        let file = template.join(STATE_FILE);
        self.launch_with(KIND, launch, move |boot, starting, image, what| {
            let file = fs::File::open(&file).map_err(cannot(format!("open {}", file.display())))?;
            let monitor = expect_monitor(starting)?;
            boot.contain(starting, &image)?;
            boot.start_vsock(starting)?;
            let mut arguments = boot.template_arguments(&image, what);
            arguments.extend(["-incoming", "defer"].map(OsString::from));
            arguments.extend(vsock_backend());
            arguments.extend(what.nic.iter().flat_map(|_| nic_backend()));
            let mut qmp = boot.start_with_monitor(starting, monitor, &arguments, stdin(what)?)?;
            qmp.fill(file).map_err(not_restored)?;
            qmp.plug(&vsock_device(), VSOCK_PORT).map_err(not_restored)?;
            if let Some(nic) = &what.nic {
                qmp.plug(&nic_device(nic), NIC_PORT).map_err(cannot("give the machine its network interface"))?;
            }
            qmp.resume().map_err(not_restored)
        })
        .await
    }
}

impl vmm::Boot for Boot {
    const KIND: Kind = KIND;

    fn uses_kvm(&self) -> bool {
        self.kvm
    }

    fn start(&self, starting: &mut Starting, image: Image, launch: &Launch) -> Result<(), LaunchError> {
        self.contain(starting, &image)?;
        self.start_vsock(starting)?;
        let mut arguments = self.arguments(&image, launch);
        arguments.extend(vsock_backend());
        arguments.extend(["-device".into(), in_words(&vsock_device())]);
        if let Some(nic) = &launch.nic {
            arguments.extend(nic_backend());
            arguments.extend(["-device".into(), in_words(&nic_device(nic))]);
        }
        starting.start_with(QEMU, &self.qemu, &arguments, stdin(launch)?).map(drop)
    }
}

impl Boot {
    fn contain(&self, starting: &mut Starting, image: &Image) -> Result<(), LaunchError> {
        starting.contain(Needs {
            overhead_mib: if self.kvm { OVERHEAD_MIB } else { OVERHEAD_MIB + TRANSLATED_MIB },
            reads: image.files().cloned().collect(),
            restrict_themselves: false,
            uses: Uses::default(),
        })
    }

    fn start_vsock(&self, starting: &mut Starting) -> Result<(), LaunchError> {
        let vsock = starting.start(VSOCK, &self.vsock, &vsock_arguments())?;
        // QEMU connects once, at its start, and gives up if nobody listens.
        let file = starting.sockets().for_us(VHOST_SOCKET);
        let ready = || file.exists() && listens(vsock, VHOST_SOCKET);
        starting.wait_until("start vhost-device-vsock", VSOCK_PATIENCE, ready)
    }

    /// Starts QEMU with a monitor for as long as what is returned is held.
    fn start_with_monitor(
        &self,
        starting: &mut Starting,
        expected: qmp::Expected,
        arguments: &[OsString],
        stdin: Stdio,
    ) -> Result<Qmp, LaunchError> {
        starting.start_with(QEMU, &self.qemu, arguments, stdin)?;
        expected.met(starting)
    }

    fn accelerator(&self) -> [String; 4] {
        let emulation = format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}");
        let (accelerator, cpu) = if self.kvm { ("kvm", "host") } else { (emulation.as_str(), "max") };
        ["-accel", accelerator, "-cpu", cpu].map(str::to_owned)
    }

    /// Those of a machine that is saved, and of one that is restored.
    fn template_arguments(&self, image: &Image, launch: &Launch) -> Vec<OsString> {
        let mut arguments = self.arguments(image, launch);
        let monitor = chardev("monitor0", MONITOR_SOCKET.into(), "");
        arguments.extend(["-chardev".into(), monitor, "-mon".into(), "chardev=monitor0,mode=control".into()]);
        for (number, port) in [VSOCK_PORT, NIC_PORT].iter().enumerate() {
            let port = format!("pcie-root-port,id={port},chassis={},slot={}", number + 1, number + 1);
            arguments.extend(["-device".into(), port.into()]);
        }
        arguments
    }

    /// Those that every machine of the image and shape has.
    fn arguments(&self, image: &Image, launch: &Launch) -> Vec<OsString> {
        let memory = launch.memory_mib;
        let mut arguments: Vec<OsString> = self.accelerator().iter().map(OsString::from).collect();
        let mut add = |name: &str, value: OsString| arguments.extend([OsString::from(name), value]);
        add("-name", format!("guest={}", launch.vm_id).into());
        // vhost-user devices work in the guest's memory, so it must be shared.
        add("-object", format!("memory-backend-memfd,id=mem0,size={memory}M,share=on").into());
        add("-machine", "q35,memory-backend=mem0".into());
        add("-m", format!("{memory}M").into());
        add("-smp", launch.vcpus.to_string().into());
        add("-kernel", image.kernel.clone().into());
        add("-initrd", image.initramfs.clone().into());
        add("-append", image.cmdline.clone().into());
        if let Some(disk) = &image.root_disk {
            add("-drive", drive("root0", disk, true, false));
            add("-device", "virtio-blk-pci,drive=root0".into());
        }
        for disk in &launch.disks {
            let serial = &disk.serial;
            let path = machine::disk_path(launch, disk);
            add("-drive", drive(serial, &path, disk.read_only, launch.is_direct(disk)));
            add("-device", format!("virtio-blk-pci,drive={serial},serial={serial}").into());
        }
        add("-chardev", chardev("serial0", SERIAL_SOCKET.into(), ",server=on,wait=off"));
        add("-serial", "chardev:serial0".into());
        add("-display", "none".into());
        // It needs no further process, user or privilege, and gets none.
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
        arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
        arguments
    }
}

fn not_restored(source: io::Error) -> LaunchError {
    LaunchError::NotRestored { source }
}

/// Before anything is started: what is in the machine's directory then is given to its user.
fn expect_monitor(starting: &Starting) -> Result<qmp::Expected, LaunchError> {
    let path = starting.sockets().for_us(MONITOR_SOCKET);
    qmp::Expected::at(path).map_err(cannot("listen for QEMU's monitor"))
}

/// The TAP, which QEMU gets as its descriptor 0, if there is one.
fn stdin(launch: &Launch) -> Result<Stdio, LaunchError> {
    match &launch.nic {
        Some(nic) => Ok(nic.open().map_err(cannot(format!("open the TAP {}", nic.tap)))?.into()),
        None => Ok(Stdio::null()),
    }
}

fn nic_backend() -> [OsString; 2] {
    ["-netdev", "tap,id=net0,fd=0"].map(OsString::from)
}

fn vsock_backend() -> [OsString; 2] {
    ["-chardev".into(), chardev("vsock0", VHOST_SOCKET.into(), "")]
}

/// A device: what it is, and its options.
type Device = Vec<(&'static str, String)>;

fn vsock_device() -> Device {
    vec![("driver", "vhost-user-vsock-pci".to_owned()), ("chardev", "vsock0".to_owned())]
}

fn nic_device(nic: &Nic) -> Device {
    let (driver, netdev) = ("virtio-net-pci".to_owned(), "net0".to_owned());
    vec![("driver", driver), ("netdev", netdev), ("mac", nic.mac.to_string()), ("romfile", String::new())]
}

/// As the command line has it.
fn in_words(device: &Device) -> OsString {
    device.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",").into()
}

/// Both processes run in the machine's directory.
fn vsock_arguments() -> Vec<OsString> {
    let cid = GUEST_CID.to_string();
    ["--guest-cid", &cid, "--socket", VHOST_SOCKET, "--uds-path", AGENT_SOCKET].map(OsString::from).to_vec()
}

/// A socket chardev.
fn chardev(id: &str, path: PathBuf, options: &str) -> OsString {
    let mut argument = OsString::from(format!("socket,id={id},path="));
    argument.push(escaped(&path));
    argument.push(options);
    argument
}

/// A disk. Any number of VMs may have one that is read-only. An error is the guest's to see: left to itself QEMU stops the whole VM when the
/// host's disk is full, and nobody would set it going again.
fn drive(id: &str, path: &Path, read_only: bool, direct: bool) -> OsString {
    // Without locks: one that some other machine holds, which need not be honest, would keep this one from starting.
    let how = if read_only { "readonly=on,file.locking=off" } else { "readonly=off,werror=report,rerror=report" };
    let cache = if direct { ",cache.direct=on" } else { "" };
    let mut argument = OsString::from(format!("if=none,id={id},format=raw,{how}{cache},file="));
    argument.push(escaped(path));
    argument
}

/// In QEMU's options a comma in a value is written twice.
fn escaped(path: &Path) -> OsString {
    path.to_str().map_or_else(|| path.into(), |path| path.replace(',', ",,").into())
}

/// Whether the process listens on a Unix socket that it bound under this file name. Connecting would tell too, but
/// vhost-device-vsock takes the first connection for QEMU's.
fn listens(pid: u32, name: &str) -> bool {
    const ACCEPTS: &str = "00010000";
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok());
    let own: Vec<String> =
        links.filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    // Its own view: it may be in another network namespace.
    let sockets = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    // Num RefCount Protocol Flags Type St Inode Path
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        fields.get(3) == Some(&ACCEPTS)
            && fields.get(6).is_some_and(|inode| own.iter().any(|own| own == inode))
            && fields.last().is_some_and(|path| path.rsplit('/').next() == Some(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_become_an_option() {
        assert_eq!(chardev("c", "/a,server=on/s".into(), ",wait=off"), "socket,id=c,path=/a,,server=on/s,wait=off");
        assert_eq!(
            drive("d", Path::new("/a,b"), true, false),
            "if=none,id=d,format=raw,readonly=on,file.locking=off,file=/a,,b"
        );
        let scratch = "if=none,id=d,format=raw,readonly=off,werror=report,rerror=report,file=/a,,b";
        assert_eq!(drive("d", Path::new("/a,b"), false, false), scratch);
        let direct = scratch.replace(",file=", ",cache.direct=on,file=");
        assert_eq!(drive("d", Path::new("/a,b"), false, true), direct.as_str());
    }

    #[tokio::test]
    async fn a_socket_listens_from_listen_on() {
        let dir = tempfile::tempdir().expect("tempdir");
        let own = std::process::id();
        assert!(!listens(own, "a-socket"));
        let _listener = tokio::net::UnixListener::bind(dir.path().join("a-socket")).expect("binds");
        assert!(listens(own, "a-socket"));
        assert!(!listens(1, "a-socket"));
    }
}
