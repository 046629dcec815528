//! What every hypervisor driver must do, run against each of them: the same functions, a real guest agent at the other
//! end. The QEMU and Cloud Hypervisor parts boot a real guest kernel; where they cannot they say `SKIPPED`, and fail instead
//! with `BLIXARD_REQUIRE_QEMU=1` and `BLIXARD_REQUIRE_CLOUD_HYPERVISOR=1`. A machine that has Cloud Hypervisor but no
//! hardware virtualization runs its part in an emulated machine that does (see `nested`).

#[path = "../support/agent.rs"]
#[expect(unreachable_pub, reason = "other tests have it in a module")]
mod agent;
mod nested;
mod templates;

use std::{
    collections::BTreeSet,
    env, fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{MetadataExt as _, PermissionsExt as _, chown, lchown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{
    config::{Config, DriverChoice},
    id::{NodeId, VmId},
    pb::{
        common::v1::{JobSpec, VmUsage},
        guest::v1::{
            ConfigureRequest, ConfigureResponse, GuestNetwork, HelloRequest, HelloResponse, Mount, RunRequest,
            RunResponse, RunStart, ShutdownRequest, guest_service_client::GuestServiceClient, run_request,
            run_response,
        },
    },
    time::Timestamp,
    vm::VmShape,
};
use blixard_vmhost::{
    containment::{Containment, Place},
    disk::{
        directory::{Directory, Special},
        erofs::Plan,
        ext4,
        tree::Tree,
    },
    hypervisor::{
        CONSOLE_TAIL_BYTES, Console, Disk, DiskLimit, Hypervisor, HypervisorSettings, IoMax, Launch, LaunchError,
        Machine, MachineExit, ProcessExit, choose,
    },
};
use hyper_util::rt::TokioIo;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

/// For anything that takes milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(60);
/// For a guest under emulation on a loaded machine.
const BOOT: Duration = Duration::from_secs(240);
const SIGKILL: i32 = 9;
/// What `statfs` has for it (`linux/magic.h`).
const TMPFS: i64 = 0x0102_1994;

/// One driver, and a directory for its machines.
struct Bed {
    choice: DriverChoice,
    settings: HypervisorSettings,
    containment: Containment,
    root: tempfile::TempDir,
    /// Guests under emulation take a core each: not all of them at once.
    turn: Option<SemaphorePermit<'static>>,
}

impl Bed {
    fn of(choice: DriverChoice, settings: HypervisorSettings) -> Self {
        let root = tempfile::tempdir().expect("tempdir");
        let driver = choose(choice, &settings).expect("the driver runs here").0;
        let node = NodeId::parse("", "tried").expect("a name");
        let users = Config::default().firecracker.vm_uids;
        // More than any test needs.
        let disk = DiskLimit { mib_per_second: 512, operations_per_second: 0 };
        let containment = Containment::open(users, disk, &node, root.path(), driver.containment());
        Self { choice, settings, containment, root, turn: None }
    }

    async fn process() -> Option<Self> {
        let settings = HypervisorSettings {
            image_dir: "images".into(),
            agent_command: vec![agent::agent().into()],
            vm_uids: None,
        };
        Some(Self::of(DriverChoice::Process, settings))
    }

    async fn qemu() -> Option<Self> {
        let required = env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
        Self::isolated(DriverChoice::Qemu, required).await
    }

    async fn cloud_hypervisor() -> Option<Self> {
        let required = env::var_os(nested::REQUIRE).is_some_and(|value| value == nested::HERE);
        Self::isolated(DriverChoice::CloudHypervisor, required).await
    }

    async fn isolated(choice: DriverChoice, required: bool) -> Option<Self> {
        static TURN: Semaphore = Semaphore::const_new(1);
        let settings = HypervisorSettings { image_dir: image_dir(), agent_command: Vec::new(), vm_uids: None };
        let missing = match choose(choice, &settings) {
            Ok((driver, _)) if driver.images().iter().any(|image| image == "default") => None,
            Ok((_, why)) => Some(why),
            Err(error) => Some(error.to_string()),
        };
        if let Some(missing) = missing {
            assert!(!required, "required, but {missing}");
            eprintln!("SKIPPED: no guest is booted here: {missing}");
            return None;
        }
        let turn = TURN.acquire().await.expect("never closed");
        let mut bed = Self::of(choice, settings);
        bed.turn = Some(turn);
        Some(bed)
    }

    /// A stand-in for the guest agent: a shell script that gets the agent's arguments.
    fn script(script: &str) -> Self {
        let agent_command = ["/bin/sh", "-c", script, "agent"].map(Into::into).to_vec();
        Self::of(DriverChoice::Process, HypervisorSettings { image_dir: "images".into(), agent_command, vm_uids: None })
    }

    /// The driver as a vmhost has it that was started just now: it knows nothing of earlier ones.
    fn driver(&self) -> Arc<dyn Hypervisor> {
        choose(self.choice, &self.settings).expect("the driver runs here").0
    }

    fn launch(&self) -> Launch {
        self.launch_in(&VmId::random().to_string())
    }

    fn launch_in(&self, dir: &str) -> Launch {
        let dir = self.root.path().join(dir);
        fs::create_dir_all(&dir).expect("mkdir");
        let vm_id = VmId::random();
        let Place { user, cgroup } = self.containment.lease(vm_id).expect("there are users");
        let io_max = self.containment.io_max();
        let (image, nic, disks) = ("default".to_owned(), None, vec![]);
        Launch { vm_id, image, vcpus: 1, memory_mib: 256, dir, nic, user, cgroup, io_max, disks }
    }
}

/// A test that fails leaves no process either: each has its machine's directory in its environment.
impl Drop for Bed {
    fn drop(&mut self) {
        let mark = [b"BLIXARD_VM_DIR=", self.root.path().as_os_str().as_bytes(), b"/"].concat();
        let left = processes_where(|proc| contains(&fs::read(proc.join("environ")).unwrap_or_default(), &mark));
        left.into_iter().for_each(kill_from_outside);
        let cgroups = self.containment.cgroups().unwrap_or_default();
        for (_, cgroup) in &cgroups {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            let _ = fs::remove_dir(cgroup);
        }
        let _ = self.containment.lease(VmId::random()).map(|place| place.cgroup?.parent().map(fs::remove_dir));
        assert!(std::thread::panicking() || cgroups.is_empty(), "cgroups are left: {cgroups:?}");
    }
}

fn image_dir() -> PathBuf {
    env::var_os("BLIXARD_IMAGE_DIR").map_or_else(|| project().join("images"), PathBuf::from)
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("services/vmhost is two deep").to_owned()
}

/// Processes that say in their environment that they are this launch's.
fn processes_of(launch: &Launch) -> Vec<u32> {
    let marks = [launch.vm_id.to_string().into_bytes(), launch.dir.as_os_str().as_bytes().to_vec()];
    processes_where(|proc| {
        let environment = fs::read(proc.join("environ")).unwrap_or_default();
        let arguments = fs::read(proc.join("cmdline")).unwrap_or_default();
        marks.iter().any(|mark| contains(&environment, mark) || contains(&arguments, mark))
    })
}

fn processes_where(matches: impl Fn(&Path) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != std::process::id() && matches(Path::new(&format!("/proc/{pid}")))).collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn kill_from_outside(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("not 0");
    // An error means that it has ended by itself.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

async fn within<T>(deadline: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| panic!("{what}: not within {deadline:?}"))
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    within(SOON, what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Connects and says hello, trying again while the guest boots.
async fn hello(machine: &Arc<dyn Machine>) -> HelloResponse {
    let deadline = Instant::now() + BOOT;
    loop {
        match try_hello(machine).await {
            Ok(answer) => return answer,
            Err(error) if Instant::now() < deadline && !machine.pids().is_empty() => drop(error),
            Err(error) => panic!("no hello: {error}; console:\n{}", text(&machine.console())),
        }
    }
}

async fn try_hello(machine: &Arc<dyn Machine>) -> Result<HelloResponse, String> {
    let answer = client(machine).await?.hello(HelloRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|status| status.to_string())
}

async fn client(machine: &Arc<dyn Machine>) -> Result<GuestServiceClient<Channel>, String> {
    let stream = machine.connect().await.map_err(|error| error.to_string())?;
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::other("one connection only"));
        async move { stream }
    });
    let channel = Endpoint::from_static("http://guest").connect_with_connector(connector).await;
    Ok(GuestServiceClient::new(channel.map_err(|error| format!("{error:?}"))?))
}

/// Gives a guest an identity; its boot id.
async fn named(machine: &Arc<dyn Machine>, launch: &Launch) -> String {
    configure(&mut client(machine).await.expect("connects"), launch).await.boot_id
}

async fn configure(guest: &mut GuestServiceClient<Channel>, launch: &Launch) -> ConfigureResponse {
    configure_with(guest, launch, None).await
}

async fn configure_with(
    guest: &mut GuestServiceClient<Channel>,
    launch: &Launch,
    network: Option<GuestNetwork>,
) -> ConfigureResponse {
    let random = || VmId::random().0.into_bytes();
    let configure = ConfigureRequest {
        vm_id: launch.vm_id.to_string(),
        hostname: format!("vm-{}", &launch.vm_id.to_string()[..8]),
        time: Some(Timestamp::now().into()),
        entropy: [random(), random(), random()].concat().into(),
        network,
        mounts: launch.disks.iter().map(mount).collect(),
    };
    guest.configure(configure).await.expect("is configured").into_inner()
}

/// Runs a script in a guest that has no identity yet.
async fn run(mut guest: GuestServiceClient<Channel>, launch: &Launch, script: &str) -> tonic::Streaming<RunResponse> {
    configure(&mut guest, launch).await;
    run_named(guest, script).await
}

async fn run_named(mut guest: GuestServiceClient<Channel>, script: &str) -> tonic::Streaming<RunResponse> {
    let spec = JobSpec {
        command: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        vcpus: Some(1),
        memory_mib: Some(128),
        ..JobSpec::default()
    };
    let start = RunStart { job_id: VmId::random().to_string(), attempt: 1, spec: Some(spec), ..RunStart::default() };
    let start = RunRequest { message: Some(run_request::Message::Start(start)) };
    let requests = tokio_stream::iter([start]).chain(tokio_stream::pending());
    guest.run(requests).await.expect("begins").into_inner()
}

fn mount(disk: &Disk) -> Mount {
    Mount {
        serial: disk.serial.clone(),
        filesystem: disk.filesystem.to_owned(),
        mount_path: format!("/mnt/{}", disk.serial),
        read_only: disk.read_only,
    }
}

/// Runs a script to its end: what it printed, and its exit status.
async fn run_to_its_end(guest: GuestServiceClient<Channel>, launch: &Launch, script: &str) -> (String, Option<i32>) {
    let (mut responses, mut printed) = (run(guest, launch, script).await, Vec::new());
    loop {
        match responses.message().await.expect("it runs").expect("its end comes").message {
            Some(run_response::Message::Exited(exited)) => {
                let code = exited.exit.expect("it was started").exit_code;
                return (String::from_utf8(printed).expect("text"), code);
            }
            Some(run_response::Message::Output(output)) => printed.extend(&output.data),
            Some(run_response::Message::Started(_)) | None => {}
        }
    }
}

fn text(console: &Console) -> String {
    String::from_utf8_lossy(&console.tail).into_owned()
}

async fn start(driver: &Arc<dyn Hypervisor>, launch: &Launch) -> Arc<dyn Machine> {
    within(SOON, "launch", driver.launch(launch)).await.expect("launches")
}

async fn end(machine: &Arc<dyn Machine>) -> MachineExit {
    within(SOON, "kill", machine.kill()).await;
    within(SOON, "wait", machine.wait()).await
}

/// Runs each of the first for each driver, and each of the second for those with a kernel in the guest.
macro_rules! conformance {
    (all: $($test:ident)*; isolated: $($isolated:ident)*;) => {
        conformance!(process: $($test)*);
        conformance!(qemu: $($test)* $($isolated)*);
        conformance!(cloud_hypervisor: $($test)* $($isolated)*);
    };
    ($driver:ident: $($test:ident)*) => {
        mod $driver {
            $(#[tokio::test]
            async fn $test() {
                if let Some(bed) = super::Bed::$driver().await {
                    super::$test(bed).await;
                }
            })*
        }
    };
}

use templates::*;

conformance! {
    all:
    a_launched_machine_says_hello_on_every_connection
    a_guest_that_is_shut_down_ends_clean_and_leaves_nothing
    kill_leaves_nothing_behind
    a_death_from_outside_is_reported_with_its_signal_and_takes_the_rest_along
    a_machine_outlives_its_handle_and_is_adopted
    a_dead_machine_is_not_adopted_and_what_is_left_of_it_is_ended
    sweep_ends_processes_that_were_never_recorded_and_no_others
    a_directory_is_launched_into_once
    an_unknown_image_is_refused_and_starts_nothing
    a_deep_directory_is_no_obstacle
    processes_are_detached_from_vmhost
    what_a_machine_has_used_is_told_and_grows;
    isolated:
    auto_takes_the_best_that_runs_here
    a_guest_that_never_said_that_it_serves_is_not_adopted_but_ended
    a_guest_whose_kernel_panics_ends_and_its_console_says_so
    a_guest_that_printed_while_nobody_read_goes_on_when_somebody_does
    restored_machines_run_jobs_and_no_two_are_alike
    a_restored_machine_is_adopted_shut_down_and_killed_like_any_other
    a_template_that_is_damaged_is_refused_and_leaves_nothing
    its_processes_have_a_user_and_a_cgroup_of_their_own_and_no_rights
    what_hides_from_its_marks_is_swept_by_cgroup_and_user_and_nothing_else_is
    a_machine_that_takes_too_much_memory_ends_and_says_so
    a_guest_has_its_disks_and_several_may_have_one
    a_machine_that_runs_has_other_cpus_and_more_memory_where_its_driver_can
    a_restored_machine_is_resized_like_any_other;
}

async fn a_launched_machine_says_hello_on_every_connection(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    assert!(driver.images().contains(&launch.image));
    let machine = start(&driver, &launch).await;
    let first = hello(&machine).await;
    assert!(!first.kernel_release.is_empty(), "{first:?}");
    assert_eq!(first.boot_id.is_empty(), bed.choice != DriverChoice::Process, "{first:?}");
    let second = hello(&machine).await;
    assert_eq!(first.boot_id, second.boot_id);
    assert_eq!(named(&machine, &launch).await, hello(&machine).await.boot_id);

    // By its memory, not by its kernel: that may be the host's too (see `nested`).
    let isolated = bed.choice != DriverChoice::Process;
    let memory_mib = first.memory_total_kib / 1024;
    assert_eq!(memory_mib, if isolated { memory_mib.clamp(128, 256) } else { 0 });
    if isolated {
        until("the guest's kernel prints to the console", || !machine.console().tail.is_empty()).await;
    }
    end(&machine).await;
}

async fn a_guest_that_is_shut_down_ends_clean_and_leaves_nothing(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    let machine = start(&driver, &launch).await;
    hello(&machine).await;
    let mut guest = client(&machine).await.expect("connects");
    guest.shutdown(ShutdownRequest { grace_ms: 0 }).await.expect("begins");
    let exit = within(BOOT, "wait", machine.wait()).await;
    assert!(exit.is_clean(), "{exit}");
    assert_eq!(processes_of(&launch), [0; 0]);
}

async fn kill_leaves_nothing_behind(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    let machine = start(&driver, &launch).await;
    let pids: BTreeSet<u32> = machine.pids().into_iter().collect();
    assert!(!pids.is_empty());
    assert_eq!(processes_of(&launch).into_iter().collect::<BTreeSet<_>>(), pids);

    let exit = end(&machine).await;
    assert_eq!(exit.status, ProcessExit::Signaled(SIGKILL), "{exit}");
    assert_eq!(processes_of(&launch), [0; 0]);
    assert_eq!(machine.pids(), [0; 0]);
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} is a zombie");
    }
    assert_eq!(end(&machine).await, exit, "a second kill changes nothing");
    let error = machine.connect().await.expect_err("nobody is there");
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert!(within(SOON, "adopt", driver.adopt(&launch)).await.expect("adopts").is_none());
    assert_eq!(within(SOON, "sweep", driver.sweep(&launch)).await.expect("sweeps"), 0);
}

async fn a_death_from_outside_is_reported_with_its_signal_and_takes_the_rest_along(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    let machine = start(&driver, &launch).await;
    for victim in 0..machine.pids().len() {
        let launch = bed.launch();
        let machine = start(&driver, &launch).await;
        let connecting = machine.connect();
        let (exit, again, connection) = tokio::join!(machine.wait(), machine.wait(), async {
            kill_from_outside(machine.pids()[victim]);
            within(SOON, "connect", connecting).await
        });
        assert_eq!(exit.status, ProcessExit::Signaled(SIGKILL), "{exit}");
        assert_eq!(exit, again);
        assert!(connection.is_err() || bed.choice == DriverChoice::Process);
        assert_eq!(processes_of(&launch), [0; 0]);
    }
    end(&machine).await;
}

async fn a_machine_outlives_its_handle_and_is_adopted(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    let (boot_id, pids) = (named(&machine, &launch).await, machine.pids());
    until("the console has something", || !machine.console().tail.is_empty()).await;
    let console = machine.console();
    drop(machine);

    let driver = bed.driver();
    let adopted = within(SOON, "adopt", driver.adopt(&launch)).await.expect("adopts").expect("it lives");
    assert_eq!(adopted.pids(), pids);
    assert_eq!(hello(&adopted).await.boot_id, boot_id);
    let kept = adopted.console();
    assert!(kept.skipped > 0 || kept.tail.starts_with(&console.tail), "{} / {}", text(&console), text(&kept));
    assert_eq!(end(&adopted).await.status, ProcessExit::Signaled(SIGKILL));
    assert_eq!(processes_of(&launch), [0; 0]);
    assert_eq!(Console::of_dir(&launch.dir), adopted.console(), "the console stays on disk");
}

async fn a_dead_machine_is_not_adopted_and_what_is_left_of_it_is_ended(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    let main = machine.pids()[0];
    drop(machine);
    let mut left = Sleeper::start(&launch.vm_id);
    kill_from_outside(main);
    until("it is dead", || state(main).is_none_or(|state| state == "Z")).await;

    let adopted = within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts");
    assert!(adopted.is_none());
    assert_eq!(processes_of(&launch), [0; 0]);
    until("the process that was left has ended", || left.has_ended()).await;
}

async fn auto_takes_the_best_that_runs_here(bed: Bed) {
    let best = choose(DriverChoice::CloudHypervisor, &bed.settings).map_or("qemu", |_| "cloud-hypervisor");
    let (driver, why) = choose(DriverChoice::Auto, &bed.settings).expect("one runs here");
    assert_eq!(driver.name(), best, "{why}");
    assert!(why.starts_with(&format!("{best}: the best this machine can run")), "{why}");
    assert!(why.contains("; images: "), "{why}");
}

/// An agent that listens may be reached before it serves, and then breaks (see `machine.rs`).
async fn a_guest_that_never_said_that_it_serves_is_not_adopted_but_ended(bed: Bed) {
    let launch = bed.launch();
    drop(start(&bed.driver(), &launch).await);
    let adopted = within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts");
    assert!(adopted.is_none());
    assert_eq!(processes_of(&launch), [0; 0]);
}

async fn a_guest_whose_kernel_panics_ends_and_its_console_says_so(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    // The module by which its kernel tells of a panic is inserted only once the agent serves.
    let script = "i=0; while [ ! -d /sys/module/pvpanic_pci ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done; \
        echo c > /proc/sysrq-trigger";
    let output = run(client(&machine).await.expect("connects"), &launch, script).await;
    let exit = within(BOOT, "wait", machine.wait()).await;
    drop(output);
    let console = text(&machine.console());
    assert!(console.contains("Kernel panic - not syncing: sysrq triggered crash"), "{exit}; {console}");
    let told = (bed.choice == DriverChoice::CloudHypervisor).then_some("the guest's kernel panicked");
    assert_eq!(exit.why, told, "{exit}; {console}");
    assert_eq!(processes_of(&launch), [0; 0]);
}

async fn a_guest_that_printed_while_nobody_read_goes_on_when_somebody_does(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    let guest = client(&machine).await.expect("connects");
    // As when vmhost died long ago: nobody reads, and hardly anything more finds room.
    drop(machine);
    fill(&launch.dir.join("output"));
    // In lines longer than what a serial port takes without an interrupt.
    let script = "yes lines that are longer than the sixteen bytes of a serial port | head -c 8000 > /dev/console";
    let mut output = run(guest, &launch, script).await;
    let exited = async {
        loop {
            match output.message().await.expect("it runs").expect("its end comes").message {
                Some(run_response::Message::Exited(exited)) => return exited.exit.expect("it was started").exit_code,
                Some(run_response::Message::Started(_) | run_response::Message::Output(_)) | None => {}
            }
        }
    };
    tokio::pin!(exited);
    // It may have to wait for vmhost, or not.
    let done = tokio::select! {
        code = &mut exited => Some(code),
        () = until("the console is full", || waiting_bytes(&launch.dir.join("output")) >= 65_536) => None,
    };

    let adopted = within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts").expect("it lives");
    hello(&adopted).await;
    let code = match done {
        Some(code) => code,
        None => within(BOOT, "the job's end", exited).await,
    };
    assert_eq!(code, Some(0));
    end(&adopted).await;
}

/// Leaves room for a few lines in a FIFO.
fn fill(fifo: &Path) {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
    let fifo = rustix::fs::open(fifo, flags, rustix::fs::Mode::empty()).expect("opens");
    rustix::io::write(fifo, &[b'.'; 65_000]).expect("has room");
}

/// What is in a FIFO and has not been read.
fn waiting_bytes(fifo: &Path) -> u64 {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let fifo = rustix::fs::open(fifo, flags, rustix::fs::Mode::empty()).expect("opens");
    rustix::io::ioctl_fionread(fifo).expect("a FIFO")
}

/// A process that carries a VM's mark, as one does that vmhost started and never got to record.
struct Sleeper(Child);

impl Sleeper {
    fn start(vm_id: &VmId) -> Self {
        let mut command = Command::new("sleep");
        command.arg("1000").env("BLIXARD_VM_ID", vm_id.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("sleep runs"))
    }

    fn has_ended(&mut self) -> bool {
        // The driver may have taken its status, as it is this process's child.
        self.0.try_wait().map_or(true, |status| status.is_some())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The letter that `/proc` gives for a process; `None` when there is none of that pid.
fn state(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().next()?.to_owned())
}

async fn sweep_ends_processes_that_were_never_recorded_and_no_others(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    let count = machine.pids().len();
    drop(machine);
    fs::remove_file(launch.dir.join("machine.json")).expect("it was recorded");
    let mut stranger = Sleeper::start(&VmId::random());

    let driver = bed.driver();
    assert_eq!(within(SOON, "sweep", driver.sweep(&launch)).await.expect("sweeps"), count);
    assert_eq!(processes_of(&launch), [0; 0]);
    assert_eq!(within(SOON, "sweep", driver.sweep(&launch)).await.expect("sweeps"), 0);
    assert!(!stranger.has_ended(), "a stranger was ended");
}

async fn a_directory_is_launched_into_once(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    let machine = start(&driver, &launch).await;
    let pids: BTreeSet<u32> = machine.pids().into_iter().collect();
    let second = within(SOON, "launch", driver.launch(&launch)).await;
    assert!(matches!(second, Err(LaunchError::Io { .. })), "a second machine in one directory");
    assert_eq!(processes_of(&launch).into_iter().collect::<BTreeSet<_>>(), pids);
    end(&machine).await;
}

async fn an_unknown_image_is_refused_and_starts_nothing(bed: Bed) {
    let launch = Launch { image: "windows".to_owned(), ..bed.launch() };
    let Err(error) = within(SOON, "launch", bed.driver().launch(&launch)).await else { panic!("it was launched") };
    assert!(matches!(error, LaunchError::UnknownImage { .. }), "{error}");
    assert!(error.to_string().starts_with("there is no image \"windows\"; there are: default"), "{error}");
    assert_eq!(processes_of(&launch), [0; 0]);
}

async fn a_deep_directory_is_no_obstacle(bed: Bed) {
    let launch = bed.launch_in(&format!("{}/{}, and=a comma", "d".repeat(90), "e".repeat(90)));
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    drop(machine);
    let adopted = within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts").expect("it lives");
    hello(&adopted).await;
    end(&adopted).await;
    assert_eq!(processes_of(&launch), [0; 0]);
}

async fn processes_are_detached_from_vmhost(bed: Bed) {
    let _ours = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let own: BTreeSet<PathBuf> = sockets_of(std::process::id());
    let machine = start(&bed.driver(), &bed.launch()).await;
    for pid in machine.pids() {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let group = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(2)).expect("a group");
        assert_eq!(group, pid.to_string(), "not a process group of its own");
        assert!(sockets_of(pid).is_disjoint(&own), "it inherited a socket of ours");
        let input = fs::read_link(format!("/proc/{pid}/fd/0")).expect("stdin");
        assert_eq!(input, Path::new("/dev/null"));
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a limit");
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    }
    end(&machine).await;
}

async fn what_a_machine_has_used_is_told_and_grows(bed: Bed) {
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    let before = machine.usage().await;
    eprintln!("used by an idle machine: {before:?}");
    assert!(before.measured_at.is_some() && before.threads > Some(0), "{before:?}");
    assert!(before.memory_bytes > Some(1 << 20) && before.memory_peak_bytes >= before.memory_bytes, "{before:?}");
    let by_hypervisor = bed.choice == DriverChoice::CloudHypervisor;
    assert_eq!((before.disks.is_some(), before.network), (by_hypervisor, None), "{before:?}");
    let delegated = env::var_os(nested::REQUIRE).is_some_and(|value| value == nested::HERE);
    let by_cgroup = before.storage.is_some_and(|storage| storage.reads.is_some());
    assert!(!delegated || launch.cgroup.is_none() || by_cgroup, "{before:?}");

    let _running = run(client(&machine).await.expect("connects"), &launch, "while :; do :; done").await;
    let has_grown = |usage: &VmUsage| usage.cpu_time_us > before.cpu_time_us.map(|time| time + 200_000);
    let grown = async |machine: &Arc<dyn Machine>| {
        within(BOOT, "CPU time is counted", async {
            while !has_grown(&machine.usage().await) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    grown(&machine).await;
    let asked = futures::future::join_all((0..20).map(|_| machine.usage()));
    assert!(within(SOON, "usage", asked).await.iter().all(has_grown));
    drop(machine);
    let adopted = within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts").expect("it lives");
    grown(&adopted).await;
    end(&adopted).await;
    let ended = adopted.usage().await;
    assert_eq!(VmUsage { measured_at: None, ..ended }, VmUsage::default(), "nothing of it is left");
}

/// A field of `/proc/<pid>/status`.
fn status(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {name} in {status}")).trim().replace('\t', " ")
}

async fn its_processes_have_a_user_and_a_cgroup_of_their_own_and_no_rights(bed: Bed) {
    eprintln!("contained by: {}", bed.containment.describe().1);
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    hello(&machine).await;
    let root = rustix::process::geteuid().is_root();
    assert!(!root || launch.user.is_some(), "root may give VMs users of their own");
    for pid in machine.pids() {
        if let Some(user) = launch.user {
            for ids in ["Uid", "Gid"] {
                assert_eq!(status(pid, ids), [user; 4].map(|id| id.to_string()).join(" "), "{ids}");
            }
        }
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(pid, set), "0000000000000000", "{set}");
        }
        assert!(!root || status(pid, "CapBnd") == "0000000000000000");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let most = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("a limit");
            line.split_whitespace().nth(1).expect("a hard limit").to_owned()
        };
        let file = most("Max file size").parse().expect("a number");
        assert!((256_u64 << 20..1 << 30).contains(&file), "{limits}");
        assert!(most("Max open files").parse::<u64>().expect("a number") <= 4096, "{limits}");
    }
    for pid in machine.pids() {
        for thread in fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten() {
            // It may have ended meanwhile.
            let Ok(status) = fs::read_to_string(thread.path().join("status")) else { continue };
            assert!(status.contains("Seccomp:\t2"), "no filter: {status}");
        }
    }
    nothing_is_made_in_its_directory(&launch, machine.pids()[0]);
    let machine = match launch.user {
        None => machine,
        // As a vmhost that knew nothing of this left it.
        Some(user) => {
            drop(machine);
            lchown(launch.dir.join("run"), Some(user), Some(user)).expect("chown");
            within(SOON, "adopt", bed.driver().adopt(&launch)).await.expect("adopts").expect("it lives")
        }
    };
    nothing_is_made_in_its_directory(&launch, machine.pids()[0]);

    let Some(cgroup) = &launch.cgroup else {
        end(&machine).await;
        return;
    };
    let read = |file: &str| fs::read_to_string(cgroup.join(file)).map(|text| text.trim().to_owned());
    let within = read("cgroup.procs").expect("there");
    let within = within.lines().map(|line| line.parse().expect("a pid"));
    // A kernel thread that serves it has no command line.
    let within: BTreeSet<u32> =
        within.filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())).collect();
    assert_eq!(within, machine.pids().into_iter().collect());
    // Where the machine has controllers for version 2.
    let limits: Vec<(&str, String)> = ["cpu.max", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max"]
        .into_iter()
        .filter_map(|file| Some((file, read(file).ok()?)))
        .collect();
    eprintln!("limits: {limits:?}");
    for used in ["memory.current", "pids.current"] {
        eprintln!("{used}: {}", read(used).unwrap_or_default());
    }
    let delegated = env::var_os(nested::REQUIRE).is_some_and(|value| value == nested::HERE);
    assert!(!delegated || limits.len() == 5, "the controllers are all there");
    assert!(!delegated || launch.io_max.is_some(), "and a disk");
    if let Some(io_max) = launch.io_max {
        let line = io_max.to_string();
        assert!(line.ends_with(" rbps=536870912 wbps=536870912 riops=max wiops=max"), "{line}");
        assert_eq!(read("io.max").expect("there"), line);
    }
    for (file, value) in limits {
        match file {
            "cpu.max" => assert_eq!(value, "200000 100000"),
            "memory.max" => assert!((256 << 20..1 << 30).contains(&value.parse::<u64>().expect("bytes")), "{value}"),
            "memory.swap.max" => assert_eq!(value, "0"),
            "memory.oom.group" => assert_eq!(value, "1"),
            "pids.max" => assert_eq!(value, "136"),
            other => panic!("{other} is not expected"),
        }
    }
    end(&machine).await;
    assert!(!cgroup.exists(), "it goes with the machine");
}

/// Its user goes on using what is in the directory that this process of it runs in, and that is all.
fn nothing_is_made_in_its_directory(launch: &Launch, pid: u32) {
    const TRY: &str = "echo *; for name in *; do mv $name moved; rm -f $name; done
        echo > made; mkdir made; ln -s $PWD made; chmod 777 .";
    let own = launch.dir.join("run");
    let names =
        || -> BTreeSet<_> { fs::read_dir(&own).expect("there").flatten().map(|entry| entry.file_name()).collect() };
    let (vmhost, there) = (rustix::process::geteuid().as_raw(), names());
    let directory = fs::metadata(&own).expect("there");
    assert_eq!(directory.uid(), vmhost);
    for entry in fs::read_dir(&own).expect("there").flatten() {
        let owner = entry.metadata().expect("there").uid();
        assert!(
            owner == launch.user.unwrap_or(vmhost) || entry.path().is_dir() && owner == vmhost,
            "{entry:?}: {owner}"
        );
    }
    let Some(user) = launch.user else { return };
    assert_eq!((directory.gid(), directory.mode() & 0o7777), (user, 0o750));
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", TRY]).uid(user).gid(user).current_dir(format!("/proc/{pid}/cwd"));
    let said = shell.output().expect("a shell runs");
    let seen: BTreeSet<_> = String::from_utf8_lossy(&said.stdout).split_whitespace().map(Into::into).collect();
    assert_eq!(seen, there, "{said:?}");
    assert_eq!(names(), there, "{said:?}");
}

/// A process without any mark; killed when it is dropped.
fn unmarked(prepare: impl FnOnce(&mut Command)) -> Sleeper {
    let mut command = Command::new("sleep");
    command.arg("1000").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    prepare(&mut command);
    Sleeper(command.spawn().expect("sleep runs"))
}

/// Writes in a directory, as a vmhost does, that this process is its machine's.
fn record(dir: &Path, user: u32, process: &Sleeper) {
    let pid = process.0.id();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let start_time: u64 =
        stat.rsplit_once(')').expect("a name").1.split_whitespace().nth(19).expect("20").parse().expect("ticks");
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot");
    let record = serde_json::json!({
        "vm_id": VmId::random(), "driver": "qemu", "boot_id": boot_id.trim(), "user": user,
        "processes": [{ "name": "qemu", "pid": pid, "start_time": start_time }],
    });
    fs::write(dir.join("machine.json"), record.to_string()).expect("writes");
    fs::set_permissions(dir.join("machine.json"), fs::Permissions::from_mode(0o600)).expect("chmod");
}

async fn what_hides_from_its_marks_is_swept_by_cgroup_and_user_and_nothing_else_is(bed: Bed) {
    let (launch, other) = (bed.launch(), bed.launch());
    let machine = start(&bed.driver(), &launch).await;
    let count = machine.pids().len();
    drop(machine);
    let mut hidden = Vec::new();
    let mut strangers = vec![unmarked(|_| ())];
    let enter = |process: &Sleeper, cgroup: &Path| {
        fs::write(cgroup.join("cgroup.procs"), process.0.id().to_string()).expect("moves");
    };
    if let (Some(cgroup), Some(others)) = (&launch.cgroup, &other.cgroup) {
        hidden.push(unmarked(|_| ()));
        enter(&hidden[0], cgroup);
        fs::create_dir(others).expect("mkdir");
        strangers.push(unmarked(|_| ()));
        enter(&strangers[1], others);
    }
    if let (Some(user), Some(others)) = (launch.user, other.user) {
        hidden.push(unmarked(|command| {
            command.uid(user);
        }));
        // It says that it is of another machine, which is here, or nowhere, or has a record of the process's own making.
        let forged = bed.launch().dir;
        for dir in [&other.dir, Path::new("/nowhere/machine"), &forged] {
            hidden.push(unmarked(|command| {
                command.uid(user).env("BLIXARD_VM_DIR", dir);
            }));
        }
        record(&forged, user, &hidden[hidden.len() - 1]);
        chown(forged.join("machine.json"), Some(user), Some(user)).expect("chown");
        // And what another node's vmhost has started as the same user, and says so.
        let elsewhere = bed.launch().dir;
        strangers.push(unmarked(|command| {
            command.uid(user).env("BLIXARD_VM_DIR", &elsewhere);
        }));
        record(&elsewhere, user, &strangers[strangers.len() - 1]);
        strangers.push(unmarked(|command| {
            command.uid(others);
        }));
    }
    // Without a record, too: as a vmhost sweeps that knows the VM's own.
    fs::remove_file(launch.dir.join("machine.json")).expect("it was recorded");
    let swept = within(SOON, "sweep", bed.driver().sweep(&launch)).await.expect("sweeps");
    assert_eq!(swept, count + hidden.len());
    for process in &mut hidden {
        until("what hid has ended", || process.has_ended()).await;
    }
    assert!(strangers.iter_mut().all(|process| !process.has_ended()), "a stranger was ended");
    assert!(launch.cgroup.is_none_or(|cgroup| !cgroup.exists()));
    drop(strangers);
    if let Some(others) = other.cgroup {
        until("nobody is in the other's", || fs::remove_dir(&others).is_ok()).await;
    }
}

async fn a_machine_that_takes_too_much_memory_ends_and_says_so(bed: Bed) {
    let launch = bed.launch();
    let limit = launch.cgroup.as_ref().map(|cgroup| cgroup.join("memory.max"));
    let machine = start(&bed.driver(), &launch).await;
    let Some(limit) = limit.filter(|limit| limit.exists()) else {
        eprintln!("SKIPPED: no memory is counted here: {}", bed.containment.describe().1);
        end(&machine).await;
        return;
    };
    hello(&machine).await;
    // As if it had grown: the kernel takes back what it can, and then kills.
    fs::write(&limit, (16 << 20).to_string()).expect("is lowered");
    let exit = within(SOON, "wait", machine.wait()).await;
    assert_eq!(exit.why, Some("it used more memory than it may"), "{exit}");
    assert_eq!(exit.status, ProcessExit::Signaled(SIGKILL), "{exit}");
    assert_eq!(processes_of(&launch), [0; 0]);
}

fn sockets_of(pid: u32) -> BTreeSet<PathBuf> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).collect()
}

#[tokio::test]
async fn ten_machines_start_and_end_at_once() {
    let bed = Bed::process().await.expect("runs anywhere");
    let driver = bed.driver();
    let machines = (0..10).map(|_| async {
        let launch = bed.launch();
        let machine = start(&driver, &launch).await;
        hello(&machine).await;
        let boot_id = named(&machine, &launch).await;
        end(&machine).await;
        assert_eq!(processes_of(&launch), [0; 0]);
        boot_id
    });
    let boot_ids: BTreeSet<String> = futures::future::join_all(machines).await.into_iter().collect();
    assert_eq!(boot_ids.len(), 10, "two machines are one");
}

#[tokio::test]
async fn the_console_is_bounded_in_memory_and_on_disk() {
    let bed = Bed::script("while :; do echo a very chatty guest; done");
    let launch = bed.launch();
    let machine = start(&bed.driver(), &launch).await;
    until("three rings full are printed", || machine.console().skipped > 2 * CONSOLE_TAIL_BYTES as u64).await;
    end(&machine).await;
    let console = machine.console();
    assert_eq!(console.tail.len(), CONSOLE_TAIL_BYTES);
    assert_eq!(Console::of_dir(&launch.dir), console);
    let files = fs::read_dir(&launch.dir).expect("there").flatten().map(|entry| entry.metadata().expect("there").len());
    assert!(files.sum::<u64>() < 4 * CONSOLE_TAIL_BYTES as u64);
}

#[tokio::test]
async fn what_a_machine_printed_before_it_failed_is_in_its_console() {
    let bed = Bed::script("echo I cannot go on >&2; exit 3");
    let machine = start(&bed.driver(), &bed.launch()).await;
    let exit = within(SOON, "wait", machine.wait()).await;
    assert_eq!(exit.to_string(), "guest agent exited with status 3");
    assert_eq!(text(&machine.console()), "I cannot go on\n");
}

#[tokio::test]
async fn processes_that_the_agent_started_end_with_it_however_they_hide() {
    // In a session of its own with the environment wiped, and orphaned before the machine is killed.
    let mark = format!("9{}", VmId::random().0.as_u128() % 1_000_000_000);
    let script = format!("env -i setsid sleep {mark} & (setsid sleep {mark} &) ; exec sleep {mark}");
    let bed = Bed::script(&script);
    let machine = start(&bed.driver(), &bed.launch()).await;
    let sleepers = || {
        processes_where(|proc| {
            let arguments = fs::read(proc.join("cmdline")).unwrap_or_default();
            arguments.starts_with(b"sleep") && contains(&arguments, mark.as_bytes())
        })
    };
    until("three processes sleep", || sleepers().len() == 3).await;
    end(&machine).await;
    assert_eq!(sleepers(), [0; 0]);
}

#[tokio::test]
async fn a_program_that_is_missing_is_named() {
    let settings =
        HypervisorSettings { image_dir: "images".into(), agent_command: vec!["/no/such/agent".into()], vm_uids: None };
    let Err(error) = choose(DriverChoice::Process, &settings) else { panic!("it was chosen") };
    assert!(error.to_string().contains("/no/such/agent is not a program"), "{error}");
}

async fn a_guest_has_its_disks_and_several_may_have_one(bed: Bed) {
    const SCRIPT: &str = "cat /mnt/shared/hello; echo no > /mnt/shared/hello; echo no > /mnt/shared/new
        find /mnt/scratch; head -c 3000000 /dev/zero > /mnt/scratch/zeros; sync; wc -c < /mnt/scratch/zeros
        dd if=/dev/zero of=/mnt/scratch/more bs=1M 2>&1 | grep -o 'No space left on device'; echo yes > /tmp/elsewhere; exec cat /tmp/elsewhere";
    const EXPECTED: &str = "hello\n\
        /bin/sh: can't create /mnt/shared/hello: Read-only file system\n\
        /bin/sh: can't create /mnt/shared/new: Read-only file system\n\
        /mnt/scratch\n\
        3000000\n\
        No space left on device\n\
        yes\n";
    let shared = bed.root.path().join("shared.erofs");
    let files = bed.root.path().join("files");
    fs::create_dir(&files).expect("mkdir");
    fs::write(files.join("hello"), "hello\n").expect("writes");
    write_erofs(&files, &shared);
    let driver = bed.driver();
    let mut machines = Vec::new();
    for _ in 0..2 {
        let launch = bed.launch();
        let scratch = launch.dir.join("scratch");
        let file = fs::File::options().read(true).write(true).create_new(true).open(&scratch).expect("creates");
        ext4::create(&file, 64, &[7; 16]).expect("writes");
        let disk = |path: &Path, serial: &str, read_only, filesystem| Disk {
            path: path.to_owned(),
            serial: serial.to_owned(),
            read_only,
            filesystem,
        };
        let disks = vec![disk(&scratch, "scratch", false, "ext4"), disk(&shared, "shared", true, "erofs")];
        let launch = Launch { disks, ..launch };
        machines.push((start(&driver, &launch).await, launch));
    }
    for (machine, launch) in &machines {
        hello(machine).await;
        let guest = client(machine).await.expect("connects");
        let ran = within(BOOT, "the script", run_to_its_end(guest, launch, SCRIPT)).await;
        assert_eq!(ran, (EXPECTED.to_owned(), Some(0)));
        let by_guest = (bed.choice == DriverChoice::CloudHypervisor).then_some(true);
        let VmUsage { disks, storage, .. } = machine.usage().await;
        assert_eq!(disks.map(|disks| disks.written_bytes >= 3_000_000 && disks.read_bytes > 0), by_guest);
        // Files of a tmpfs are on no disk.
        if rustix::fs::statfs(bed.root.path()).expect("there").f_type != TMPFS {
            assert!(storage.expect("counted").written_bytes >= 3_000_000, "{storage:?}");
        }
        if let (Some(io_max), Some(cgroup)) = (launch.io_max, &launch.cgroup) {
            assert!(written_to(io_max, cgroup) >= 3_000_000, "it is the disk that is limited, and as the VM's own");
        }
    }
    for (machine, _) in &machines {
        end(machine).await;
    }
}

/// What the kernel has counted of the disk that is limited.
fn written_to(io_max: IoMax, cgroup: &Path) -> u64 {
    let (limited, stat) = (io_max.to_string(), fs::read_to_string(cgroup.join("io.stat")).expect("there"));
    let disk = limited.split(' ').next().expect("a number");
    let used = stat.lines().find(|line| line.split(' ').next() == Some(disk));
    let written = used.and_then(|used| used.split(' ').find_map(|field| field.strip_prefix("wbytes=")));
    written.map_or(0, |bytes| bytes.parse().expect("a number"))
}

async fn a_machine_that_runs_has_other_cpus_and_more_memory_where_its_driver_can(bed: Bed) {
    let (driver, launch) = (bed.driver(), bed.launch());
    let machine = start(&driver, &launch).await;
    hello(&machine).await;
    if bed.choice == DriverChoice::CloudHypervisor {
        named(&machine, &launch).await;
        return resize(&bed, &launch, machine).await;
    }
    assert_eq!(driver.most(launch.shape()), None);
    let error =
        driver.resize(&launch, VmShape { vcpus: 2, memory_mib: 384 }, launch.shape()).await.expect_err("it can't");
    assert_eq!(error.to_string(), format!("the driver \"{}\" can't change a machine that runs", driver.name()));
    end(&machine).await;
}

/// Gives a machine other shapes, and looks at them from inside the guest.
async fn resize(bed: &Bed, launch: &Launch, machine: Arc<dyn Machine>) {
    let shape = |vcpus, memory_mib| VmShape { vcpus, memory_mib };
    let give =
        async |driver: &Arc<dyn Hypervisor>, to| within(BOOT, "resize", driver.resize(launch, to, shape(5, 768))).await;
    let limit = |file: &str| {
        let file = launch.cgroup.as_ref()?.join(file);
        fs::read_to_string(file).ok().map(|value| value.trim().to_owned())
    };
    let limits = |vcpus: u64, memory_mib: u64| {
        let memory = (memory_mib + memory_mib / 128 + 96) << 20;
        assert!(limit("cpu.max").is_none_or(|value| value == format!("{} 100000", (vcpus + 1) * 100_000)));
        assert!(limit("memory.max").is_none_or(|value| value == memory.to_string()));
    };
    assert_eq!(launch.shape(), shape(1, 256));
    let first = seen(&machine, 1, 0).await;
    let driver = bed.driver();
    assert_eq!(give(&driver, shape(2, 384)).await.expect("grows"), shape(2, 384));
    limits(2, 384);
    let grown = seen(&machine, 2, first + 100).await;
    drop(machine);

    let driver = bed.driver();
    let adopted = within(SOON, "adopt", driver.adopt(launch)).await.expect("adopts").expect("it lives");
    seen(&adopted, 2, grown).await;
    for _ in 0..2 {
        give(&driver, shape(1, 768)).await.expect("takes a CPU away and adds memory, and then nothing");
        limits(1, 768);
        assert!(seen(&adopted, 1, grown + 300).await > grown + 300);
    }
    give(&driver, shape(3, 768)).await.expect("grows again");
    seen(&adopted, 3, grown + 300).await;
    let error = give(&driver, shape(5, 768)).await.expect_err("that is more than it was launched for");
    assert_eq!(error.has, Some(shape(3, 768)), "{error}");
    limits(3, 768);
    seen(&adopted, 3, grown + 300).await;
    end(&adopted).await;
    let error = give(&driver, shape(1, 768)).await.expect_err("it has ended");
    assert_eq!(error.has, None, "{error}");
}

/// Waits until a guest has so many CPUs and so much memory, and each of the CPUs has run something; its memory in MiB.
async fn seen(machine: &Arc<dyn Machine>, cpus: u32, memory_mib: u64) -> u64 {
    let script = format!(
        "have() {{ [ $(nproc) = {cpus} ] && [ $(awk '/^MemTotal/ {{ print int($2 / 1024) }}' /proc/meminfo) -ge {memory_mib} ]; }}
        i=0; while ! have && [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done
        grep -c ^processor /proc/cpuinfo; awk '/^MemTotal/ {{ print int($2 / 1024) }}' /proc/meminfo
        for cpu in $(seq 0 $(({cpus} - 1))); do taskset -c $cpu true || exit 1; done"
    );
    let ran = run_named(client(machine).await.expect("connects"), &script);
    let told = within(BOOT, "the guest has it", async { output(ran.await).await }).await;
    let mut lines = told.lines().map(|line| line.parse::<u64>().expect("a number"));
    assert_eq!(lines.next(), Some(u64::from(cpus)), "{told}");
    let has = lines.next().expect("memory");
    assert!(has >= memory_mib, "{told}");
    has
}

/// Makes a disk of a directory.
fn write_erofs(from: &Path, to: &Path) {
    let directory = Directory::open(from).expect("a directory");
    let listing = directory.list(Special::LeaveOut, 100).expect("it can be read");
    let mut tree = Tree::default();
    tree.apply(listing.changes).expect("a tree");
    let plan = Plan::of(&tree).expect("it fits");
    plan.write(&directory, &mut fs::File::create_new(to).expect("creates"), &mut |_| {}).expect("writes");
}
