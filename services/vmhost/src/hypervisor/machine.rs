//! A machine made of host processes: what the drivers share. Starting them, taking them over, watching over them, ending
//! them, and reaching the guest agent behind them.
//!
//! ```text
//!   Starting ── start(program) … ──► HostMachine ◄── adopt(dir) ── machine.json
//!                                        │
//!            supervise: the end of one of its processes is the end of all; then, and only then, `wait` resolves
//! ```

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io,
    os::unix::{fs::DirBuilderExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use blixard::{
    pb::common::v1::{IoCounters, VmUsage},
    time::Timestamp,
    vm::VmShape,
};
use blixard_chassis::Tasks;
use rustix::process::{Pid, Resource, Rlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream, unix::pipe},
    sync::{Mutex, mpsc, watch},
    time::Instant,
};

use crate::blocking::blocking;

use super::{
    AGENT_PORT, Console, Disk, GROWTH, Launch, LaunchError, Machine, MachineExit, ProcessExit,
    cgroup::{Cgroup, Limits},
    confine::{self, Confinement, Files},
    console::{self, Recorder},
    events::Events,
    own_dir::{self, hand_over},
    procfs::{self, DEATH_PATIENCE, ENV_VM_DIR, ENV_VM_ID, Held, Marks, ProcessId},
    record::{self, Record},
    seccomp::Uses,
    socket::SocketDir,
    usage::{self, Counters},
};

/// How long one [`Machine::connect`] tries before it lets its caller decide.
pub const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// How long the console is read on after the machine's end: what it wrote is in the kernel, and reading it is quick.
const CONSOLE_DRAIN: Duration = Duration::from_secs(2);
/// How long the main process may take to end by itself after another has: vhost-device-vsock ends when QEMU hangs up, which it does a little
/// before its own end.
const MAIN_PATIENCE: Duration = Duration::from_secs(1);
/// Between two tries to reach the serial port's socket.
const SERIAL_RETRY: Duration = Duration::from_millis(2);
/// Between two tries to accept a knock when this process has no descriptor left for it.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Longest answer to `CONNECT`: "OK 4294967295\n".
const MAX_ANSWER_BYTES: usize = 32;

/// The directory in a launch's directory that its processes run in and may write to. What lies beside it is vmhost's: it would follow a link
/// that a hostile hypervisor lays there.
const OWN_DIR: &str = "run";
/// In it: links to disks that other machines have, too.
const SHARED_DISKS: &str = "disks";
/// CPUs that a machine may use beyond its guest's: for the threads that serve its devices.
const SPARE_CPUS: u32 = 1;
/// For each so many MiB of a guest the kernel may keep one in page tables: two processes' and the processor's, eight bytes for 4 KiB each.
const MIB_PER_MIB_OF_TABLES: u64 = 128;
/// Threads that a machine may have beyond two for each CPU of its guest: QEMU's pool alone may have 64.
const SPARE_THREADS: u32 = 128;
const BYTES_PER_MIB: u64 = 1024 * 1024;

/// What of vmhost's environment its children see: what a program needs to run, and no secret.
const PASSED_ON: [&str; 6] = ["PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ"];

/// What kind of machine a driver makes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// The driver's name.
    pub(super) driver: &'static str,
    /// Its processes, main process first.
    pub(super) processes: &'static [&'static str],
    /// How the guest agent is reached.
    pub(super) agent: Agent,
    /// The guest's serial port: the name of a socket in the directory. `None`: what the processes print is all.
    pub(super) serial: Option<&'static str>,
    /// How its hypervisor tells what happens, if it does.
    pub(super) events: Option<Events>,
    /// How its hypervisor tells what the guest's disks did, if it does.
    pub(super) counters: Option<Counters>,
    /// Whether its processes start others, which must end with it.
    pub(super) has_children: bool,
}

/// What the processes of a contained machine need.
#[derive(Debug)]
pub(super) struct Needs {
    /// Memory beside the guest's, in MiB.
    pub(super) overhead_mib: u32,
    /// Files of others that they read.
    pub(super) reads: Vec<PathBuf>,
    /// Whether they restrict themselves to what they need of the file system.
    pub(super) restrict_themselves: bool,
    /// Which system calls they make that others do not.
    pub(super) uses: Uses,
}

/// How the guest agent is reached.
#[derive(Debug, Clone, Copy)]
pub(super) enum Agent {
    /// It listens on this socket itself.
    Direct(&'static str),
    /// Through this socket of a hypervisor's vsock proxy: `CONNECT <port>\n`, answered with `OK <n>\n`. Not before the
    /// agent has knocked: once it serves it connects to the host's port of the same number, and the proxy from there to
    /// the socket `<socket>_<port>`. That file is removed then, so that its presence says: never knocked.
    Hybrid(&'static str),
}

impl Agent {
    /// Between two tries while nobody listens: a small part of what coming up takes.
    fn retry(self) -> Duration {
        match self {
            Self::Direct(_) => Duration::from_millis(1),
            Self::Hybrid(_) => Duration::from_millis(20),
        }
    }

    /// Where its knock arrives.
    fn knock_socket(self, sockets: &SocketDir) -> Option<PathBuf> {
        match self {
            Self::Direct(_) => None,
            Self::Hybrid(socket) => Some(sockets.for_us(&format!("{socket}_{AGENT_PORT}"))),
        }
    }
}

/// What comes from a machine by itself.
struct Sources {
    /// What its processes print.
    output: Option<pipe::Receiver>,
    events: Option<pipe::Receiver>,
    /// The guest agent's knock.
    knocks: Option<UnixListener>,
}

impl Sources {
    /// Of a machine that an earlier vmhost launched. A FIFO that is gone costs messages, not the machine.
    fn of_adopted(kind: Kind, launch: &Launch) -> Self {
        let missing =
            |error: &io::Error| tracing::warn!(vm_id = %launch.vm_id, %error, "an adopted machine lacks a FIFO");
        let output = console::open_output(&launch.dir).inspect_err(missing).ok();
        let own = own_dir(launch);
        let events = kind.events.and_then(|events| events.open(&own).inspect_err(missing).ok());
        Self { output, events, knocks: None }
    }
}

/// A machine whose processes are being started. Its methods block.
pub(super) struct Starting {
    kind: Kind,
    launch: Launch,
    record: Record,
    recorder: Recorder,
    output: File,
    sources: Sources,
    sockets: SocketDir,
    /// How its processes are started, once that is said.
    confinement: Option<Confinement>,
    /// Where they are put.
    cgroup: Option<Cgroup>,
    /// In the order of their start.
    processes: Vec<(&'static str, Held)>,
}

/// Turns an I/O error into a launch error that says what was tried.
pub(super) fn cannot(action: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
    move |source| LaunchError::Io { action: action.into(), source }
}

impl Starting {
    /// Records the intent and makes what every machine needs.
    pub(super) fn begin(kind: Kind, launch: &Launch) -> Result<Self, LaunchError> {
        let dir = launch.dir.as_path();
        let record =
            Record::begin(launch, kind.driver).map_err(cannot(format!("record a new machine in {}", dir.display())))?;
        let own = own_dir(launch);
        DirBuilder::new().mode(own_dir::USED).create(&own).map_err(cannot("make the directory that it runs in"))?;
        let (output, receiver) = console::make_output(dir).map_err(cannot("make the FIFO for output"))?;
        let events =
            kind.events.map(|events| events.make(&own)).transpose().map_err(cannot("make the FIFO for events"))?;
        let sockets = SocketDir::open(&own).map_err(cannot("open the machine's directory"))?;
        let knocks = kind.agent.knock_socket(&sockets).map(UnixListener::bind).transpose();
        let knocks = knocks.map_err(cannot("listen for the guest agent's knock"))?;
        let recorder = Recorder::open(dir);
        let launch = launch.clone();
        let sources = Sources { output: Some(receiver), events, knocks };
        let (confinement, cgroup, processes) = (None, None, Vec::new());
        Ok(Self { kind, launch, record, recorder, output, sources, sockets, confinement, cgroup, processes })
    }

    /// Where its processes run. What is made there before they are contained is given to their user with it.
    pub(super) fn own_dir(&self) -> PathBuf {
        own_dir(&self.launch)
    }

    pub(super) fn sockets(&self) -> &SocketDir {
        &self.sockets
    }

    /// Has what is started from now on contained: as the VM's user, in its cgroup, with nothing but what it needs.
    pub(super) fn contain(&mut self, needs: Needs) -> Result<(), LaunchError> {
        let own = self.own_dir();
        let longest_disk = reach_disks(&self.launch).map_err(cannot("put the machine's disks into its directory"))?;
        if let Some(user) = self.launch.user {
            hand_over(&own, user).map_err(cannot(format!("give {} to user {user}", own.display())))?;
        }
        let limits = limits(&self.launch, self.launch.shape(), needs.overhead_mib);
        let (threads, guest_mib) = (limits.threads, u64::from(self.launch.memory_mib));
        if let Some(path) = self.launch.cgroup.clone() {
            let failed = cannot(format!("make the cgroup {}", path.display()));
            let cgroup = self.cgroup.insert(Cgroup::at(path));
            cgroup.make(limits).map_err(failed)?;
        }
        self.confinement = Some(Confinement {
            user: self.launch.user,
            reads: needs.reads.into_iter().chain(disks_of_others(&self.launch)).collect(),
            files: if needs.restrict_themselves { Files::Any } else { Files::Own(own) },
            // The guest's memory is a file, and the longest that it writes but for what it is saved as, which has its devices besides, and for
            // its disks.
            longest_file: longest_disk.max((guest_mib + u64::from(needs.overhead_mib)) * BYTES_PER_MIB),
            threads: threads.into(),
            uses: needs.uses,
        });
        Ok(())
    }

    /// Starts one of the machine's processes and records it; returns its pid.
    pub(super) fn start(&mut self, name: &'static str, program: &Path, args: &[OsString]) -> Result<u32, LaunchError> {
        self.start_with(name, program, args, Stdio::null())
    }

    /// The same with this as its descriptor 0: the one way to hand a descriptor on that no other child of ours can inherit too.
    pub(super) fn start_with(
        &mut self,
        name: &'static str,
        program: &Path,
        args: &[OsString],
        stdin: Stdio,
    ) -> Result<u32, LaunchError> {
        let spawn_error = |source| LaunchError::Spawn { program: program.to_owned(), source };
        let mut command = Command::new(program);
        command.args(args).current_dir(self.sockets.for_start()).process_group(0).env_clear();
        command.envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.env(ENV_VM_ID, self.launch.vm_id.to_string()).env(ENV_VM_DIR, &self.launch.dir);
        let output = || self.output.try_clone().map(Stdio::from).map_err(spawn_error);
        command.stdin(stdin).stdout(output()?).stderr(output()?);
        let child = match &self.confinement {
            Some(confinement) => confine::spawn(command, confinement),
            None => command.spawn(),
        };
        let child = child.map_err(spawn_error)?;

        // Nobody else waits for our children, so until it is reaped below or by its supervisor the pid is its own.
        let id = procfs::stat(child.id()).map(|stat| stat.id);
        let held = id.map_or(Ok(None), Held::open).map_err(spawn_error)?;
        let held = held.ok_or_else(|| spawn_error(io::Error::other("it vanished")))?;
        procfs::sacrifice(child.id());
        let (id, main) = (held.id, self.kind.processes.first() == Some(&name));
        self.processes.push((name, held));
        if self.confinement.is_none() {
            without_core_dumps(id);
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.add(id.pid).map_err(cannot("put a process into its cgroup"))?;
        }
        self.record.add(&self.launch.dir, name, id, main).map_err(cannot("record a process"))?;
        Ok(id.pid)
    }

    /// Waits until `ready`, or fails when a process has ended or the time is up.
    pub(super) fn wait_until(
        &self,
        what: &str,
        patience: Duration,
        ready: impl Fn() -> bool,
    ) -> Result<(), LaunchError> {
        let deadline = std::time::Instant::now() + patience;
        while !ready() {
            if self.processes.iter().any(|(_, process)| !process.runs()) {
                return Err(cannot(what)(io::Error::other("a process of the machine has ended")));
            }
            if std::time::Instant::now() >= deadline {
                return Err(cannot(what)(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The guest's agent serves already: no knock will come.
    pub(super) fn agent_serves(&mut self) -> Result<(), LaunchError> {
        let taken = self.launch.user.map_or(Ok(()), |user| own_dir::take_back(&self.own_dir(), user));
        taken.map_err(cannot("take back the directory that it runs in"))?;
        let knocked = self.kind.agent.knock_socket(&self.sockets).map_or(Ok(()), fs::remove_file);
        knocked.map_err(cannot("note that the guest agent serves"))?;
        self.sources.knocks = None;
        Ok(())
    }

    /// All processes run: from here on the machine is watched over.
    pub(super) fn finish(mut self, tasks: &Tasks) -> Arc<dyn Machine> {
        let rank = |name| self.kind.processes.iter().position(|&process| process == name);
        self.processes.sort_by_key(|(name, _)| rank(*name));
        let processes = self.processes.into_iter().map(|(_, process)| process).collect();
        // Not by the socket's being there: a hypervisor that has been taken over already can remove it.
        let knocked = self.sources.knocks.is_none();
        let core = Core::new(self.kind, &self.launch, processes, self.sockets, self.recorder, self.cgroup, knocked);
        HostMachine::watch_over(core, self.sources, tasks)
    }

    /// Something failed: ends what runs, and says what it had printed.
    pub(super) async fn abandon(self, error: LaunchError) -> LaunchError {
        let Self { kind, launch, recorder, output, sources, processes, cgroup, .. } = self;
        let ended = processes.iter().find(|(_, process)| !process.runs());
        let why = cgroup.as_ref().and_then(Cgroup::out_of_memory);
        let ended = ended.map(|&(name, ref process)| MachineExit { process: name, status: process.reap(), why });
        let roots: Vec<ProcessId> = processes.iter().map(|(_, process)| process.id).collect();
        let marks = Marks::new(launch.vm_id, &launch.dir);
        let within = cgroup.clone();
        let find = move || running(kind, &marks, &roots, within.as_ref());
        if let Some(cgroup) = &cgroup {
            cgroup.kill();
        }
        if let Err(error) = procfs::end_all(find).await {
            return error;
        }
        if let Err(error) = remove(cgroup).await {
            tracing::warn!(vm_id = %launch.vm_id, %error, "a cgroup is left");
        }
        drop(output);
        if let Some(output) = sources.output {
            let _ = tokio::time::timeout(CONSOLE_DRAIN, recorder.record(output)).await;
        }
        recorder.persist();
        match ended {
            Some(exit) => {
                let output = String::from_utf8_lossy(&recorder.snapshot().tail).trim().to_owned();
                LaunchError::EndedEarly { exit, output }
            }
            None => error,
        }
    }
}

/// What the processes of a machine may take together that was launched so, and has this shape now.
fn limits(launch: &Launch, shape: VmShape, overhead_mib: u32) -> Limits {
    let guest_mib = u64::from(shape.memory_mib);
    Limits {
        cpus: shape.vcpus + SPARE_CPUS,
        memory_mib: guest_mib + guest_mib / MIB_PER_MIB_OF_TABLES + u64::from(overhead_mib),
        // Those of every CPU that it may come to have: their user's limit can't be changed with their cgroup's.
        threads: SPARE_THREADS + 2 * GROWTH * launch.vcpus,
        io: launch.io_max,
    }
}

/// Has the processes of a machine that runs take what goes with this shape, and no more. Their use of the disk stays limited as it is: that
/// does not go with a shape, and is lifted once a machine is to end.
pub(super) fn limit_again(launch: &Launch, shape: VmShape, overhead_mib: u32) -> io::Result<()> {
    let cgroup = launch.cgroup.clone().map(Cgroup::at);
    cgroup.map_or(Ok(()), |cgroup| cgroup.limit(Limits { io: None, ..limits(launch, shape, overhead_mib) }))
}

/// Where a launch's processes run.
pub(super) fn own_dir(launch: &Launch) -> PathBuf {
    launch.dir.join(OWN_DIR)
}

/// Where a machine's processes find a disk: its own ones below the directory that they run in, for what is above that is closed to them.
pub(super) fn disk_path(launch: &Launch, disk: &Disk) -> PathBuf {
    match disk.path.strip_prefix(&launch.dir) {
        Ok(name) if disk.read_only => Path::new(".").join(SHARED_DISKS).join(name),
        Ok(name) => Path::new(".").join(name),
        Err(_) => disk.path.clone(),
    }
}

/// Links a machine's own disks to where its processes find them. Those that others have, too, into a directory: what is in it is not given
/// to the machine's user. Says how long the longest is that may be written to.
fn reach_disks(launch: &Launch) -> io::Result<u64> {
    let (own, mut longest) = (own_dir(launch), 0);
    for disk in launch.disks.iter().filter(|disk| disk.path.starts_with(&launch.dir)) {
        let link = own.join(disk_path(launch, disk));
        if disk.read_only {
            DirBuilder::new().mode(0o700).recursive(true).create(own.join(SHARED_DISKS))?;
        } else {
            longest = longest.max(fs::metadata(&disk.path)?.len());
        }
        fs::hard_link(&disk.path, link)?;
    }
    Ok(longest)
}

/// Its other disks.
fn disks_of_others(launch: &Launch) -> impl Iterator<Item = PathBuf> {
    launch.disks.iter().filter(|disk| !disk.path.starts_with(&launch.dir)).map(|disk| disk.path.clone())
}

/// A machine's processes that run, those too that its own have started. Blocking where it has such: all of /proc is looked through.
fn running(kind: Kind, marks: &Marks, processes: &[ProcessId], cgroup: Option<&Cgroup>) -> Vec<ProcessId> {
    if kind.has_children { marks.find(processes) } else { still_running(processes, cgroup) }
}

/// Those of these processes that run, and whatever is in the cgroup.
fn still_running(processes: &[ProcessId], cgroup: Option<&Cgroup>) -> Vec<ProcessId> {
    let runs = |id: &ProcessId| procfs::stat(id.pid).is_some_and(|stat| stat.id == *id && !stat.dead);
    let within = cgroup.map(|cgroup| procfs::alive(&cgroup.pids())).unwrap_or_default();
    let all: BTreeSet<ProcessId> = processes.iter().copied().filter(runs).chain(within).collect();
    all.into_iter().collect()
}

/// Removes a cgroup that is empty.
async fn remove(cgroup: Option<Cgroup>) -> io::Result<()> {
    let Some(cgroup) = cgroup else { return Ok(()) };
    blocking(move || cgroup.remove()).await
}

fn without_core_dumps(process: ProcessId) {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    if let Err(error) = rustix::process::prlimit(pid, Resource::Core, none)
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(pid = process.pid, %error, "cannot switch off core dumps");
    }
}

/// Runs `start` on a thread that may block, and makes a machine of what it started. When it fails, nothing is left.
pub(super) async fn launch(
    kind: Kind,
    launch: &Launch,
    tasks: &Tasks,
    start: impl FnOnce(&mut Starting) -> Result<(), LaunchError> + Send + 'static,
) -> Result<Arc<dyn Machine>, LaunchError> {
    let launch = launch.clone();
    let started = tokio::task::spawn_blocking(move || {
        let mut starting = Starting::begin(kind, &launch)?;
        let result = start(&mut starting);
        Ok((starting, result))
    });
    let (starting, result) = started.await.map_err(io::Error::from).map_err(cannot("start the machine"))??;
    match result {
        Ok(()) => Ok(starting.finish(tasks)),
        Err(error) => Err(starting.abandon(error).await),
    }
}

/// Takes over a machine that an earlier vmhost launched, if all of it lives; else ends what is left of it.
pub(super) async fn adopt(kind: Kind, launch: &Launch, tasks: &Tasks) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
    let owned = launch.clone();
    let core = tokio::task::spawn_blocking(move || Core::of_record(kind, &owned));
    let core = core.await.map_err(io::Error::from).map_err(cannot("read the machine's record"))??;
    match core {
        Some(core) => {
            let sources = Sources::of_adopted(kind, launch);
            Ok(Some(HostMachine::watch_over(core, sources, tasks)))
        }
        None => sweep(launch).await.map(|_| None),
    }
}

/// Ends every process that was started for this launch, by its marks, its cgroup or its user, and removes the cgroup.
pub(super) async fn sweep(launch: &Launch) -> Result<usize, LaunchError> {
    let marks = Marks::new(launch.vm_id, &launch.dir);
    let record = Record::read(&launch.dir);
    let user = launch.user.or(record.as_ref().and_then(|record| record.user));
    // An earlier vmhost may have been started elsewhere.
    let recorded = record.as_ref().and_then(|record| record.cgroup.clone());
    let cgroups: BTreeSet<PathBuf> = recorded.into_iter().chain(launch.cgroup.clone()).collect();
    let cgroups: Vec<Cgroup> = cgroups.into_iter().map(Cgroup::at).collect();
    let record = record.map(|record| record.processes).unwrap_or_default();
    let within = cgroups.clone();
    let ended = procfs::end_all(move || {
        // Only a recorded process that provably still is the same one may stand for its session and its children.
        let alive: Vec<ProcessId> = record
            .iter()
            .map(|process| process.id)
            .filter(|id| procfs::stat(id.pid).is_some_and(|stat| stat.id == *id))
            .collect();
        let mut found: BTreeSet<ProcessId> = marks.find(&alive).into_iter().collect();
        found.extend(within.iter().flat_map(|cgroup| procfs::alive(&cgroup.pids())));
        // Nodes of one machine may share a range of users, against all advice.
        let of_user = |user| procfs::of_user(user).into_iter().filter(move |id| !record::is_of_another(*id, user));
        found.extend(user.into_iter().flat_map(of_user));
        within.iter().for_each(Cgroup::kill);
        found.into_iter().collect()
    })
    .await?;
    for cgroup in cgroups {
        remove(Some(cgroup)).await.map_err(cannot("remove a VM's cgroup"))?;
    }
    Ok(ended)
}

/// Ends whatever is in a VM's cgroup, and removes that.
pub(crate) async fn end_cgroup(path: PathBuf) -> Result<(), LaunchError> {
    let cgroup = Cgroup::at(path);
    let within = cgroup.clone();
    procfs::end_all(move || {
        let found = procfs::alive(&within.pids());
        within.kill();
        found
    })
    .await?;
    remove(Some(cgroup)).await.map_err(cannot("remove a VM's cgroup"))
}

/// What a machine's handle and its tasks share.
struct Core {
    kind: Kind,
    marks: Marks,
    /// Main process first.
    processes: Vec<Held>,
    /// Where they run, and as whom.
    own_dir: PathBuf,
    user: Option<u32>,
    sockets: SocketDir,
    recorder: Recorder,
    cgroup: Option<Cgroup>,
    /// The host's end of its network interface.
    tap: Option<String>,
    /// Who looks what it has used.
    looking: Arc<Mutex<()>>,
    /// Whether the agent has said that it serves, if it says so ([`Agent::Hybrid`]).
    knocked: watch::Sender<bool>,
    /// Why it was ended, if its hypervisor told.
    why: OnceLock<&'static str>,
    exit: watch::Sender<Option<MachineExit>>,
}

impl Core {
    fn new(
        kind: Kind,
        launch: &Launch,
        processes: Vec<Held>,
        sockets: SocketDir,
        recorder: Recorder,
        cgroup: Option<Cgroup>,
        knocked: bool,
    ) -> Self {
        let marks = Marks::new(launch.vm_id, &launch.dir);
        let (own_dir, user) = (own_dir(launch), launch.user);
        let (knocked, exit) = (watch::Sender::new(knocked), watch::Sender::new(None));
        let tap = launch.nic.as_ref().map(|nic| nic.tap.clone());
        let (looking, why) = (Arc::default(), OnceLock::new());
        Self { kind, marks, processes, own_dir, user, sockets, recorder, cgroup, tap, looking, knocked, why, exit }
    }

    /// What is recorded in the launch's directory, if each of its processes lives and is the machine's.
    fn of_record(kind: Kind, launch: &Launch) -> Result<Option<Self>, LaunchError> {
        let Some(record) = Record::read(&launch.dir) else { return Ok(None) };
        let names = record.processes.iter().map(|process| process.name.as_str());
        if record.driver != kind.driver || record.vm_id != launch.vm_id || !names.eq(kind.processes.iter().copied()) {
            return Ok(None);
        }
        let marks = Marks::new(launch.vm_id, &launch.dir);
        let mut processes = Vec::new();
        for process in &record.processes {
            match Held::open(process.id).map_err(cannot("open a pidfd"))? {
                Some(held) if held.runs() && marks.are_on(held.id.pid) => processes.push(held),
                Some(_) | None => return Ok(None),
            }
        }
        let sockets = SocketDir::open(&own_dir(launch)).map_err(cannot("open the machine's directory"))?;
        let cgroup = record.cgroup.map(Cgroup::at);
        let launch = Launch { user: record.user, ..launch.clone() };
        if kind.agent.knock_socket(&sockets).is_some_and(|socket| socket.exists()) {
            // Its knock went to nobody, or will. No job has met it, so nothing is lost with it.
            return Ok(None);
        }
        let core = Self::new(kind, &launch, processes, sockets, Recorder::open(&launch.dir), cgroup, true);
        // An earlier version may not have done so.
        core.take_back().map_err(cannot("take back the directory that the machine runs in"))?;
        Ok(Some(core))
    }

    /// Leaves its processes the use of the directory that they run in, now that they have made in it what they need. Blocking.
    fn take_back(&self) -> io::Result<()> {
        self.user.map_or(Ok(()), |user| own_dir::take_back(&self.own_dir, user))
    }

    /// Resolves when one of the processes has ended: its index.
    async fn first_end(&self) -> usize {
        let ends = self.processes.iter().map(|process| Box::pin(process.ended()));
        futures::future::select_all(ends).await.1
    }

    /// What the kernel has counted for it. Blocking.
    fn count(&self) -> VmUsage {
        let roots: Vec<ProcessId> = self.processes.iter().map(|process| process.id).collect();
        let processes = running(self.kind, &self.marks, &roots, self.cgroup.as_ref());
        let network = self.tap.as_deref().and_then(usage::of_tap);
        VmUsage { network, ..usage::of_machine(&processes, self.cgroup.as_ref()) }
    }

    /// What its guest had of its disks, if its hypervisor tells.
    async fn disks(&self) -> Option<IoCounters> {
        let counters = self.kind.counters?;
        let socket = self.sockets.hold(counters.socket).ok()?;
        (counters.ask)(socket.path()).await
    }

    /// The machine's processes that run now, those too that its processes started.
    async fn find(&self) -> Vec<ProcessId> {
        let roots: Vec<ProcessId> = self.processes.iter().map(|process| process.id).collect();
        let (kind, marks, cgroup) = (self.kind, self.marks.clone(), self.cgroup.clone());
        if !kind.has_children {
            return running(kind, &marks, &roots, cgroup.as_ref());
        }
        tokio::task::spawn_blocking(move || running(kind, &marks, &roots, cgroup.as_ref())).await.unwrap_or_default()
    }

    /// Sends SIGKILL to everything. What a process started is found while that process still runs to tell of it.
    async fn kill(&self) {
        let found = self.find().await;
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        self.processes.iter().for_each(Held::kill);
        for id in found {
            if let Ok(Some(held)) = Held::open(id) {
                held.kill();
            }
        }
    }

    /// Waits until everything that was killed is gone, however long that takes, and ends what is left besides.
    async fn end(&self) {
        // Not by `procfs::end`, which would take their statuses from the process table.
        for process in &self.processes {
            while tokio::time::timeout(DEATH_PATIENCE, process.ended()).await.is_err() {
                tracing::error!(driver = self.kind.driver, pid = process.id.pid, "a process does not end");
            }
        }
        loop {
            let left = self.find().await;
            if left.is_empty() {
                return;
            }
            if let Err(error) = procfs::end(&left).await {
                tracing::error!(driver = self.kind.driver, %error, "a machine does not end");
            }
        }
    }

    async fn supervise(&self, mut console_open: mpsc::Receiver<()>) {
        let first = self.first_end().await;
        if let Some(main) = self.processes.first() {
            let _ = tokio::time::timeout(MAIN_PATIENCE, main.ended()).await;
        }
        let main_too = self.processes.first().is_some_and(|main| !main.runs());
        self.kill().await;
        self.end().await;
        // Reaped last: until then no other process can have one of these pids.
        let statuses: Vec<_> = self.processes.iter().map(Held::reap).collect();
        // One that was returning its memory when it was killed keeps the status that it ended with.
        let main_too = main_too || matches!(statuses.first(), Some(ProcessExit::Exited(_)));
        let cause = if main_too { cause(first, &statuses) } else { first };
        let _ = tokio::time::timeout(CONSOLE_DRAIN, console_open.recv()).await;
        let recorder = self.recorder.clone();
        let _ = tokio::task::spawn_blocking(move || recorder.persist()).await;
        let (process, status) = (self.kind.processes[cause], statuses[cause]);
        let why = self.cgroup.as_ref().and_then(Cgroup::out_of_memory).or(self.why.get().copied());
        if let Err(error) = remove(self.cgroup.clone()).await {
            tracing::warn!(driver = self.kind.driver, %error, "a cgroup is left until its VM is swept");
        }
        self.exit.send_replace(Some(MachineExit { process, status, why }));
    }

    /// Ends the machine when its hypervisor says that the guest is over.
    async fn heed_events(&self, events: Events, source: pipe::Receiver) {
        if let Some(why) = events.await_verdict(source).await {
            // Set once: there is one task that heeds, and it ends here.
            let _ = self.why.set(why);
            self.kill().await;
        }
    }

    async fn record_serial(&self, socket: &str) {
        loop {
            if let Ok(stream) = self.sockets.connect(socket).await {
                self.recorder.record(stream).await;
            }
            tokio::select! {
                _ = self.first_end() => return,
                () = tokio::time::sleep(SERIAL_RETRY) => {}
            }
        }
    }

    async fn await_knock(self: Arc<Self>, knocks: UnixListener) {
        while let Err(error) = knocks.accept().await {
            tracing::warn!(%error, "cannot accept a guest agent's knock");
            tokio::time::sleep(ACCEPT_RETRY).await;
        }
        let core = Arc::clone(&self);
        if let Err(error) = blocking(move || core.take_back()).await {
            tracing::error!(driver = self.kind.driver, %error, "a machine keeps the directory that it runs in, and is ended");
            let _ = self.why.set("the directory that it runs in could not be taken back");
            return self.kill().await;
        }
        // First, so that whoever could reach the agent has left a machine that can be adopted.
        let removed = self.kind.agent.knock_socket(&self.sockets).map_or(Ok(()), fs::remove_file);
        if let Err(error) = removed {
            tracing::warn!(%error, "a machine that knocked cannot be marked so: a later vmhost will end it");
        }
        self.knocked.send_replace(true);
    }

    /// Tries until the agent answers.
    async fn reach_agent(&self) -> UnixStream {
        loop {
            match self.try_agent().await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(self.kind.agent.retry()).await,
            }
        }
    }

    async fn try_agent(&self) -> io::Result<UnixStream> {
        match self.kind.agent {
            Agent::Direct(socket) => self.sockets.connect(socket).await,
            Agent::Hybrid(socket) => {
                // The sender lives as long as `self`.
                let _ = self.knocked.subscribe().wait_for(|knocked| *knocked).await;
                open_port(self.sockets.connect(socket).await?, AGENT_PORT).await
            }
        }
    }
}

/// Whose end is the cause when the main process has ended by itself, too: that one's, unless the `first` was killed, which it may have
/// taken notice of.
fn cause(first: usize, statuses: &[ProcessExit]) -> usize {
    match (statuses.get(first), statuses.first()) {
        (Some(ProcessExit::Signaled(_)), Some(ProcessExit::Exited(_))) => first,
        (_, _) => 0,
    }
}

/// Makes a connection to a vsock proxy one to a guest's port.
async fn open_port(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line is already the agent's.
    let mut answer = Vec::with_capacity(MAX_ANSWER_BYTES);
    while answer.last() != Some(&b'\n') {
        if answer.len() == MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

/// The handle of a machine. The tasks that watch over it end with the handle; the machine does not.
struct HostMachine {
    core: Arc<Core>,
    tasks: Tasks,
}

impl HostMachine {
    fn watch_over(core: Core, sources: Sources, tasks: &Tasks) -> Arc<dyn Machine> {
        let machine = Self { core: Arc::new(core), tasks: tasks.child() };
        // Open for as long as one task holds its sender: as long as console bytes may come.
        let (console_guard, console_open) = mpsc::channel(1);
        if let Some(output) = sources.output {
            let guard = console_guard.clone();
            machine.spawn("machine output", move |core| async move {
                core.recorder.record(output).await;
                drop(guard);
            });
        }
        if let Some(socket) = machine.core.kind.serial {
            machine.spawn("machine serial port", move |core| async move {
                core.record_serial(socket).await;
                drop(console_guard);
            });
        }
        if let (Some(events), Some(source)) = (machine.core.kind.events, sources.events) {
            machine.spawn("machine events", move |core| async move { core.heed_events(events, source).await });
        }
        if let Some(knocks) = sources.knocks {
            machine.spawn("machine agent's knock", |core| async move { core.await_knock(knocks).await });
        }
        machine.spawn("machine console store", |core| async move { core.recorder.keep_persisting().await });
        let supervised = Tasks::clone(&machine.tasks);
        machine.spawn("machine supervisor", move |core| async move {
            core.supervise(console_open).await;
            supervised.token().cancel();
        });
        Arc::new(machine)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        name: &'static str,
        task: impl FnOnce(Arc<Core>) -> F + Send,
    ) {
        let cancelled = self.tasks.token().clone().cancelled_owned();
        let task = task(Arc::clone(&self.core));
        self.tasks.spawn(name, async move {
            tokio::select! {
                () = cancelled => {}
                () = task => {}
            }
        });
    }
}

impl Drop for HostMachine {
    fn drop(&mut self) {
        self.tasks.token().cancel();
        self.core.recorder.persist();
    }
}

#[tonic::async_trait]
impl Machine for HostMachine {
    fn pids(&self) -> Vec<u32> {
        self.core.processes.iter().filter(|process| process.runs()).map(|process| process.id.pid).collect()
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let dead = || io::Error::new(io::ErrorKind::NotConnected, "the machine has ended");
        if self.core.exit.borrow().is_some() {
            return Err(dead());
        }
        tokio::select! {
            biased;
            _ = self.core.first_end() => Err(dead()),
            stream = tokio::time::timeout_at(Instant::now() + CONNECT_PATIENCE, self.core.reach_agent()) => {
                stream.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest agent does not answer"))
            }
        }
    }

    async fn wait(&self) -> MachineExit {
        let mut exit = self.core.exit.subscribe();
        loop {
            if let Some(exit) = exit.borrow_and_update().clone() {
                return exit;
            }
            // The sender lives as long as `self`.
            let _ = exit.changed().await;
        }
    }

    async fn kill(&self) {
        self.core.kill().await;
        self.wait().await;
    }

    fn console(&self) -> Console {
        self.core.recorder.snapshot()
    }

    async fn usage(&self) -> VmUsage {
        let (core, turn) = (Arc::clone(&self.core), Arc::clone(&self.core.looking).lock_owned().await);
        let measured_at = Some(Timestamp::now().into());
        if core.exit.borrow().is_some() {
            return VmUsage { measured_at, ..VmUsage::default() };
        }
        // Whoever asks may go away: then the look goes on, and so does its turn.
        let counted = tokio::task::spawn_blocking(move || (core.count(), turn)).await;
        let (counted, _turn) = counted.map_or_else(|_| Default::default(), |(counted, turn)| (counted, Some(turn)));
        VmUsage { measured_at, disks: self.core.disks().await, ..counted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_process_ends_the_machine_unless_another_was_killed_before_it() {
        use ProcessExit::{Exited, Signaled, Unknown};
        assert_eq!(cause(0, &[Exited(0), Exited(1)]), 0);
        // As vhost-device-vsock does when QEMU hangs up.
        assert_eq!(cause(1, &[Exited(0), Exited(1)]), 0);
        assert_eq!(cause(1, &[Exited(1), Signaled(9)]), 1);
        // All of them, as for want of memory; and of adopted ones nothing is known.
        assert_eq!(cause(1, &[Signaled(9), Signaled(9)]), 0);
        assert_eq!(cause(1, &[Unknown, Unknown]), 0);
    }
}
