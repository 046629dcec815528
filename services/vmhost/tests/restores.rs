//! When VMs can't be restored: which templates go, and when there are no more. A hypervisor that does as the test says; what real ones do is in
//! `templates` and the conformance suite.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use blixard::{
    id::VmId,
    pb::{
        common::v1::{HostPressure, VmConfig, VmKind, VmUsage},
        vmhost::v1 as pb,
    },
    vm::VmState,
};
use blixard_vmhost::{
    hypervisor::{Console, Hypervisor, Launch, LaunchError, Machine, MachineExit, ProcessExit, Templates},
    pressure::{HostWatch, Memory, Observation},
};
use support::{NODE, Node, World, fake_guest::FakeGuest, fake_registry::FakeRegistry, vm_config, wait_for};
use tokio::{net::UnixStream, sync::Barrier};

const SIGKILL: i32 = 9;

/// What becomes of a VM that is to be restored; without one it is.
enum Fate {
    Fails(LaunchError),
    /// It comes up, and ends.
    Ends(MachineExit),
    /// It is refused while the machine is short of memory.
    RefusedInNeed,
    /// As many as there are of these are refused at once.
    RefusedTogether(Arc<Barrier>),
}

/// A hypervisor whose machines are agents in this process.
#[derive(Default)]
struct Fake {
    fates: Mutex<VecDeque<Fate>>,
    booted: AtomicUsize,
    restored: AtomicUsize,
    /// The memory of each machine that was saved.
    saved: Mutex<Vec<u32>>,
    seen: Arc<Mutex<Observation>>,
    registry: FakeRegistry,
}

fn refused() -> LaunchError {
    LaunchError::NotRestored { source: io::Error::other("another version saved it") }
}

fn exit(status: ProcessExit, why: Option<&'static str>) -> MachineExit {
    MachineExit { process: "fake", status, why }
}

fn memory(available_mib: u64) -> Observation {
    Observation { memory: vec![Memory { total_mib: 10_240, available_mib, stalled_percent: 0 }], disks: vec![] }
}

#[tonic::async_trait]
impl Hypervisor for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn templates(&self) -> Option<&dyn Templates> {
        Some(self)
    }

    fn images(&self) -> Vec<String> {
        vec!["default".to_owned()]
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        self.booted.fetch_add(1, Ordering::SeqCst);
        FakeGuest::default().launch(launch).await
    }

    async fn adopt(&self, _: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        Ok(None)
    }

    async fn sweep(&self, _: &Launch) -> Result<usize, LaunchError> {
        Ok(0)
    }
}

#[tonic::async_trait]
impl Templates for Fake {
    fn basis(&self, launch: &Launch) -> Result<String, LaunchError> {
        Ok(format!("{} {}", launch.vcpus, launch.memory_mib))
    }

    async fn save(&self, launch: &Launch, into: &Path) -> Result<(), LaunchError> {
        fs::write(into.join("state"), "saved").unwrap();
        self.saved.lock().unwrap().push(launch.memory_mib);
        Ok(())
    }

    async fn restore(&self, launch: &Launch, _: &Path) -> Result<Arc<dyn Machine>, LaunchError> {
        let fate = self.fates.lock().unwrap().pop_front();
        match fate {
            None => {
                self.restored.fetch_add(1, Ordering::SeqCst);
                FakeGuest::default().launch(launch).await
            }
            Some(Fate::Fails(error)) => Err(error),
            Some(Fate::Ends(exit)) => Ok(Arc::new(Ended(exit))),
            Some(Fate::RefusedInNeed) => {
                *self.seen.lock().unwrap() = memory(300);
                wait_told(&self.registry, &[HostPressure::Memory]).await;
                Err(refused())
            }
            Some(Fate::RefusedTogether(barrier)) => {
                barrier.wait().await;
                Err(refused())
            }
        }
    }
}

/// A machine that has ended.
struct Ended(MachineExit);

#[tonic::async_trait]
impl Machine for Ended {
    fn pids(&self) -> Vec<u32> {
        vec![]
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        Err(io::ErrorKind::NotConnected.into())
    }

    async fn wait(&self) -> MachineExit {
        self.0.clone()
    }

    async fn kill(&self) {}

    fn console(&self) -> Console {
        Console::default()
    }

    async fn usage(&self) -> VmUsage {
        VmUsage::default()
    }
}

async fn wait_told(registry: &FakeRegistry, pressure: &[HostPressure]) {
    wait_for("the node to tell", || {
        let node = registry.state().nodes.get(NODE).cloned().ok_or("not registered")?;
        let told: Vec<_> = node.pressure().collect();
        if told == pressure { Ok(()) } else { Err(format!("{told:?}")) }
    })
    .await;
}

struct Bed {
    world: World,
    fake: Arc<Fake>,
    node: Node,
}

impl Bed {
    /// A node with a VM that was booted, and its template.
    async fn new() -> Self {
        let mut world = World::new().await;
        world.templates = 4;
        world.pace.look_at_host_every = Duration::from_millis(10);
        let fake = Arc::new(Fake { registry: world.registry.clone(), ..Fake::default() });
        let seen = Arc::clone(&fake.seen);
        world.watch = Some(HostWatch::new(move || seen.lock().unwrap().clone()));
        let hypervisor: Arc<dyn Hypervisor> = Arc::<Fake>::clone(&fake);
        let node = world.node_with(hypervisor).await;
        let bed = Self { world, fake, node };
        bed.boots(128).await;
        bed.template(1).await;
        bed
    }

    async fn accept(&self, memory_mib: u32) -> VmId {
        let (id, kind) = (VmId::random(), VmKind::Ephemeral);
        self.world.record_vm(id, kind, VmState::Starting);
        let config = VmConfig { memory_mib: Some(memory_mib), ..vm_config(kind) };
        let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(config) };
        self.node.client.clone().start_vm(request).await.unwrap();
        id
    }

    async fn start(&self, memory_mib: u32) {
        let vm = self.accept(memory_mib).await;
        self.world.wait_vm(vm, VmState::Ready).await;
        // There is room for ten.
        self.node.stop_vm(vm, Some(0)).await.unwrap();
        self.world.wait_vm(vm, VmState::Terminated).await;
    }

    fn counts(&self) -> (usize, usize) {
        (self.fake.booted.load(Ordering::SeqCst), self.fake.restored.load(Ordering::SeqCst))
    }

    async fn boots(&self, memory_mib: u32) {
        let before = self.counts();
        self.start(memory_mib).await;
        assert_eq!(self.counts(), (before.0 + 1, before.1), "it boots");
    }

    async fn is_restored(&self) {
        let before = self.counts();
        self.start(128).await;
        assert_eq!(self.counts(), (before.0, before.1 + 1), "it is restored");
    }

    /// The next VM that is to be restored meets this, and boots.
    async fn meets(&self, fate: Fate) {
        self.fake.fates.lock().unwrap().push_back(fate);
        self.boots(128).await;
        assert!(self.fake.fates.lock().unwrap().is_empty(), "it was to be restored first");
    }

    fn entries(&self) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(self.world.vm_state_dir().join(".templates")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Waits for the template that was made as the last of so many.
    async fn template(&self, made: usize) {
        wait_for("a template", || {
            let (saved, entries) = (self.fake.saved.lock().unwrap().clone(), self.entries());
            let whole = entries.iter().any(|path| path.join("template.json").exists());
            let done = saved.len() == made && entries.len() == 1 && whole;
            if done { Ok(()) } else { Err(format!("{saved:?} {entries:?}")) }
        })
        .await;
    }
}

#[tokio::test]
async fn a_failure_that_tells_nothing_of_the_template_costs_none() {
    let bed = Bed::new().await;
    let io = || io::Error::from(io::ErrorKind::NotFound);
    let killed = || exit(ProcessExit::Signaled(SIGKILL), None);
    let host = || exit(ProcessExit::Signaled(SIGKILL), Some("the host ran out of memory"));
    for fate in [
        Fate::Fails(LaunchError::Io { action: "open the TAP".to_owned(), source: io() }),
        Fate::Fails(LaunchError::Spawn { program: "fake".into(), source: io() }),
        Fate::Fails(LaunchError::EndedEarly { exit: killed(), output: String::new() }),
        Fate::Ends(killed()),
        Fate::Ends(host()),
    ] {
        bed.meets(fate).await;
    }
    bed.meets(Fate::RefusedInNeed).await;
    *bed.fake.seen.lock().unwrap() = memory(5000);
    wait_told(&bed.world.registry, &[]).await;
    bed.is_restored().await;
    bed.template(1).await;
}

#[tokio::test]
async fn two_templates_in_a_row_that_are_of_no_use_are_followed_by_none() {
    let bed = Bed::new().await;
    bed.meets(Fate::Fails(refused())).await;
    bed.template(2).await;
    bed.is_restored().await;

    // The first since one was of use, and once, though two VMs meet it.
    let barrier = Arc::new(Barrier::new(2));
    let both = [0, 1].map(|_| Fate::RefusedTogether(Arc::clone(&barrier)));
    bed.fake.fates.lock().unwrap().extend(both);
    tokio::join!(bed.start(128), bed.start(128));
    bed.template(3).await;

    bed.meets(Fate::Ends(exit(ProcessExit::Signaled(11), None))).await;
    bed.boots(128).await;
    // One at a time are made: this one was asked for last.
    bed.boots(256).await;
    bed.template(4).await;
    assert_eq!(*bed.fake.saved.lock().unwrap(), [128, 128, 128, 256]);
    bed.boots(128).await;
}
