//! The parts as processes of their own: one registry, two schedulers, two vmhosts; the scheduler that leads is killed.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{mvm_ci, processes_mentioning, signal, stdout, tempdir, wait_exit, wait_for};

/// A process of the fleet.
struct Part {
    child: Child,
    endpoint: String,
}

struct Fleet {
    dir: TempDir,
    registry: Part,
    schedulers: Vec<Part>,
    vmhosts: Vec<Part>,
}

impl Fleet {
    fn start() -> Self {
        let dir = tempdir();
        let path = |name: &str| dir.path().join(name);
        let mut command = program("registry");
        command.arg("--data-dir").arg(path("registry"));
        let registry = Part::start(command, path("registry.log"));
        let scheduler = |name: &str| {
            let mut command = program("scheduler");
            command.args(["--registry", &registry.endpoint, "--name", name, "--max-vms", "8"]);
            Part::start(command, path(&format!("{name}.log")))
        };
        let vmhost = |name: &str| {
            let mut command = program("vmhost");
            command.args(["--registry", &registry.endpoint, "--node-id", name, "--driver", "process"]);
            command.arg("--data-dir").arg(path(name)).arg("--vm-state-dir").arg(path(name).join("vms"));
            Part::start(command, path(&format!("{name}.log")))
        };
        let schedulers = vec![scheduler("scheduler-a"), scheduler("scheduler-b")];
        let vmhosts = vec![vmhost("node-a"), vmhost("node-b")];
        Self { schedulers, vmhosts, registry, dir }
    }

    fn cli<'a>(&self, scheduler: usize, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = mvm_ci(args);
        command.env("BLIXARD_ENDPOINT", &self.schedulers[scheduler].endpoint);
        command
    }

    fn json<'a>(&self, scheduler: usize, args: impl IntoIterator<Item = &'a str>) -> Value {
        let printed = stdout(self.cli(scheduler, ["--output", "json"].into_iter().chain(args)));
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    }

    /// Which scheduler leads.
    fn leader(&self) -> usize {
        wait_for("a scheduler to lead", || {
            let stats: Vec<_> = (0..self.schedulers.len())
                .filter(|&scheduler| self.schedulers[scheduler].is_alive())
                .map(|scheduler| (scheduler, self.json(scheduler, ["stats"])))
                .collect();
            let leads = stats.iter().find(|(_, stats)| stats["leading"] == true && stats["ready_nodes"] == 2);
            leads.map(|(scheduler, _)| *scheduler).ok_or_else(|| format!("{stats:?}"))
        })
    }
}

impl Part {
    fn start(mut command: Command, log: PathBuf) -> Self {
        let file = || File::options().create(true).append(true).open(&log).expect("log");
        let mut child = command.stdout(file()).stderr(file()).spawn().expect("spawn");
        let endpoint = wait_for("where it listens", || {
            let log = std::fs::read_to_string(&log).expect("log");
            assert!(child.try_wait().expect("wait").is_none(), "it ended: {log}");
            let ready =
                log.lines().find(|line| ["serves", "ready", "listening"].iter().any(|word| line.contains(word)));
            let address = ready.and_then(|line| line.rsplit(['=', ' ', '/']).next());
            address.map(|address| format!("http://{address}")).ok_or(log)
        });
        Self { child, endpoint }
    }

    fn is_alive(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.child.id())).exists()
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let parts = self.schedulers.iter_mut().chain(&mut self.vmhosts).chain([&mut self.registry]);
        for part in parts {
            signal(part.child.id(), Signal::TERM);
            if !std::thread::panicking() {
                wait_exit(&mut part.child);
            }
        }
        for (pid, _) in processes_mentioning(self.dir.path()) {
            signal(pid, Signal::KILL);
        }
        if std::thread::panicking() {
            for name in ["registry", "scheduler-a", "scheduler-b", "node-a", "node-b"] {
                let log = std::fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
                eprintln!("--- {name}\n{log}");
            }
        }
    }
}

/// A binary of the workspace that `make test` has built beside `mvm-ci`.
fn program(name: &str) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_mvm-ci")).with_file_name(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace --bins", path.display());
    let mut command = Command::new(path);
    command.args(["--listen", "127.0.0.1:0"]).current_dir("/").stdin(Stdio::null()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

#[test]
fn the_second_scheduler_goes_on_where_the_one_that_led_was_killed() {
    let mut fleet = Fleet::start();
    let leader = fleet.leader();
    let follower = 1 - leader;
    let done = fleet.dir.path().join("done");
    let script = format!("echo begin; sleep 0.3; echo $ID >> {}; echo end", done.display());
    let submit = |fleet: &Fleet, scheduler: usize, id: usize| {
        let id = format!("ID=job-{id}");
        let args = ["run", "--detach", "--env", &id, "--", "sh", "-c", &script];
        stdout(fleet.cli(scheduler, args)).trim().to_owned()
    };
    // Half of them through each: both take submissions.
    let mut jobs: Vec<_> = (0..12).map(|id| submit(&fleet, id % 2, id)).collect();
    let some = || std::fs::read_to_string(&done).unwrap_or_default().lines().count();
    wait_for("some jobs to have run", || if some() >= 2 { Ok(()) } else { Err(some().to_string()) });
    fleet.schedulers[leader].kill();
    jobs.extend((12..16).map(|id| submit(&fleet, follower, id)));
    assert_eq!(fleet.leader(), follower);

    for job in &jobs {
        let job = wait_for("every job to end", || {
            let job = fleet.json(follower, ["job", "get", job]);
            if job["finished_at"].is_null() { Err(job.to_string()) } else { Ok(job) }
        });
        assert_eq!((&job["state"], &job["attempt"]), (&Value::from("Succeeded"), &Value::from(1)), "{job}");
        assert_eq!(stdout(fleet.cli(follower, ["job", "logs", job["id"].as_str().expect("an id")])), "begin\nend\n");
    }
    let mut ran = BTreeMap::new();
    for line in std::fs::read_to_string(&done).expect("lines").lines() {
        *ran.entry(line.to_owned()).or_insert(0) += 1;
    }
    assert!(ran.len() == 16 && ran.values().all(|&times| times == 1), "{ran:?}");
    // A node that is taken for lost registers again.
    let nodes = fleet.json(follower, ["node", "list"]);
    let nodes = nodes.as_array().expect("a list");
    assert!(nodes.iter().all(|node| node["state"] == "Ready" && node["incarnation"] == 1), "{nodes:?}");
}
