//! Processes and a supervisor that starts again those that end.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// How often the supervisor looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One of them: the recipe, and the process while there is one.
pub struct Program {
    id: u64,
    dir: PathBuf,
    command: Mutex<Command>,
    process: Mutex<Process>,
}

#[derive(Default)]
struct Process {
    child: Option<Child>,
    wanted: bool,
    /// How often it ended though nobody made it.
    ended_by_itself: u64,
}

impl Program {
    /// `dir` is its own, and is there when it starts; its log lies beside that. Whoever starts it adds nothing to `command`.
    #[must_use]
    pub fn new(id: u64, dir: PathBuf, mut command: Command) -> Self {
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command.envs(std::env::var("BLIXARD_CHAOS_RUST_LOG").ok().map(|directives| ("RUST_LOG", directives)));
        Self { id, dir, command: Mutex::new(command), process: Mutex::default() }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        let mut process = self.process();
        process.wanted = false;
        if let Some(mut child) = process.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn spawn(&self) -> Child {
        fs::create_dir_all(&self.dir).unwrap();
        let log = OpenOptions::new().create(true).append(true).open(log_path(&self.dir)).unwrap();
        let mut command = self.command.lock().unwrap_or_else(PoisonError::into_inner);
        command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }
}

/// Beside the data, so that it outlives them.
fn log_path(dir: &Path) -> PathBuf {
    dir.with_extension("log")
}

/// All of them. They end when it is dropped.
pub struct Processes {
    programs: Arc<[Program]>,
    supervisor: Option<JoinHandle<()>>,
    over: Arc<AtomicBool>,
}

impl Processes {
    /// Starts each.
    #[must_use]
    pub fn start(programs: Vec<Program>) -> Self {
        let programs: Arc<[Program]> = programs.into();
        programs.iter().for_each(|program| program.process().wanted = true);
        let over = Arc::new(AtomicBool::new(false));
        let (supervised, end) = (Arc::clone(&programs), Arc::clone(&over));
        let supervisor = Some(std::thread::spawn(move || supervise(&supervised, &end)));
        Self { programs, supervisor, over }
    }

    fn program(&self, id: u64) -> &Program {
        self.programs.iter().find(|program| program.id == id).unwrap()
    }

    /// What is its own.
    #[must_use]
    pub fn dir(&self, id: u64) -> &Path {
        &self.program(id).dir
    }

    /// What it and those before it have logged.
    #[must_use]
    pub fn log(&self, id: u64) -> String {
        let log = fs::read(log_path(&self.program(id).dir)).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// How often it has ended though nobody made it.
    #[must_use]
    pub fn ended_by_itself(&self, id: u64) -> u64 {
        self.program(id).process().ended_by_itself
    }

    /// Its process id, while it runs.
    #[must_use]
    pub fn pid(&self, id: u64) -> Option<u32> {
        self.program(id).process().child.as_ref().map(Child::id)
    }

    /// kill -9; it stays down until it is started again.
    pub fn kill(&self, id: u64) {
        self.program(id).end();
    }

    /// The supervisor starts it, if it is down.
    pub fn start_again(&self, id: u64) {
        self.program(id).process().wanted = true;
    }

    /// To one that runs.
    pub fn signal(&self, id: u64, signal: Signal) {
        if let Some(child) = &self.program(id).process().child {
            // Nobody has waited for it, so the id is still its own.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Throws away the data of one that is down.
    ///
    /// # Panics
    /// It is not down.
    pub fn wipe(&self, id: u64) {
        let program = self.program(id);
        assert!(program.process().child.is_none(), "{} is not down", program.dir.display());
        fs::remove_dir_all(&program.dir).unwrap();
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
        self.programs.iter().for_each(Program::end);
    }
}

fn supervise(programs: &[Program], over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        for program in programs {
            let mut process = program.process();
            if let Some(child) = &mut process.child
                && child.try_wait().unwrap().is_some()
            {
                process.child = None;
                process.ended_by_itself += 1;
            }
            if process.wanted && process.child.is_none() {
                process.child = Some(program.spawn());
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Every process but this one that has one of these words in its command line or environment, with its command line.
#[must_use]
pub fn processes_mentioning(words: &[String]) -> Vec<(u32, String)> {
    let mentions = |path: PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        words.iter().any(|word| bytes.windows(word.len()).any(|part| part == word.as_bytes()))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let dir = entry.path();
        // A dead one that nobody has waited for has neither.
        if pid != std::process::id() && (mentions(dir.join("cmdline")) || mentions(dir.join("environ"))) {
            let command = fs::read(dir.join("cmdline")).unwrap_or_default();
            found.push((pid, String::from_utf8_lossy(&command).replace('\0', " ")));
        }
    }
    found
}
