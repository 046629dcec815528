//! A node's templates: real guests under QEMU, one vmhost. (What a restored guest is like is the conformance suite's.) Without QEMU or an image
//! they say `SKIPPED`, and fail instead with `BLIXARD_REQUIRE_QEMU=1`.

#![allow(clippy::unwrap_used, reason = "the steps of a test may fail it")]

mod support;

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use blixard::{config::DriverChoice, id::VmId, pb::common::v1::VmKind, vm::VmState};
use blixard_vmhost::hypervisor::{Hypervisor, HypervisorSettings, choose};
use support::{Node, World, kill, processes_with, shell, wait_for};
use tokio::sync::{Semaphore, SemaphorePermit};

/// A world whose image is its own, and the driver.
struct Bed {
    world: World,
    driver: Arc<dyn Hypervisor>,
    /// Guests under emulation take a core each.
    _turn: SemaphorePermit<'static>,
}

impl Bed {
    async fn new() -> Option<Self> {
        static TURN: Semaphore = Semaphore::const_new(1);
        let required = env::var_os("BLIXARD_REQUIRE_QEMU").is_some_and(|value| value == "1");
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
        let image =
            env::var_os("BLIXARD_IMAGE_DIR").map_or_else(|| project.join("images"), PathBuf::from).join("default");
        let turn = TURN.acquire().await.unwrap();
        let mut world = World::new().await;
        world.templates = 1;
        let own = world.dir.path().join("images/default");
        fs::create_dir_all(&own).unwrap();
        for file in ["vmlinux", "initramfs"] {
            symlink(image.join(file), own.join(file)).unwrap();
        }
        let manifest = fs::copy(image.join("manifest.json"), own.join("manifest.json"));
        let image_dir = world.dir.path().join("images");
        let settings = HypervisorSettings { image_dir, agent_command: Vec::new(), vm_uids: None };
        let driver = match (manifest, choose(DriverChoice::Qemu, &settings)) {
            (Ok(_), Ok((driver, _))) => driver,
            (manifest, driver) => {
                let problem = manifest.err().map(|error| error.to_string());
                let problem = problem.or(driver.err().map(|error| error.to_string()));
                assert!(!required, "required, but {problem:?}");
                eprintln!("SKIPPED: no guest is booted here: {problem:?}");
                return None;
            }
        };
        Some(Self { world, driver, _turn: turn })
    }

    async fn node(&self) -> Node {
        self.world.node_with(Arc::clone(&self.driver)).await
    }

    fn templates(&self) -> PathBuf {
        self.world.vm_state_dir().join(".templates")
    }

    fn entries(&self) -> BTreeSet<PathBuf> {
        fs::read_dir(self.templates()).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// Waits until there is one template, whole, and nothing else in its place.
    async fn template(&self) -> PathBuf {
        wait_for("a template", || {
            let entries = self.entries();
            let whole = entries.iter().find(|path| path.extension().is_none() && path.join("template.json").exists());
            match whole {
                Some(path) if entries.len() == 1 => Ok(path.clone()),
                Some(_) | None => Err(format!("{entries:?}")),
            }
        })
        .await
    }

    /// Processes of a template that is being made.
    fn makers(&self) -> Vec<u32> {
        processes_with(self.templates().into_os_string().into_encoded_bytes())
    }

    async fn wait_for_makers(&self) {
        let some = || if self.makers().is_empty() { Err("none") } else { Ok(()) };
        wait_for("a template to be begun", some).await;
    }

    async fn wait_for_no_makers(&self) {
        wait_for("nothing of a template to be left", || {
            let (makers, entries) = (self.makers(), self.entries());
            if makers.is_empty() && entries.is_empty() { Ok(()) } else { Err(format!("{makers:?} {entries:?}")) }
        })
        .await;
    }

    /// Whether a VM's machine was restored rather than booted.
    fn is_restored(&self, vm: VmId) -> bool {
        let pids = processes_with(self.world.vm_state_dir().join(vm.to_string()).into_os_string().into_encoded_bytes());
        assert!(!pids.is_empty());
        let arguments = pids.iter().map(|pid| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default());
        arguments.into_iter().any(|line| line.split(|&byte| byte == 0).any(|argument| argument == b"-incoming"))
    }

    async fn stop(&self, node: &Node, vm: VmId) {
        node.stop_vm(vm, Some(0)).await.unwrap();
        self.world.wait_vm(vm, VmState::Terminated).await;
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.makers().into_iter().for_each(kill);
    }
}

#[tokio::test]
async fn a_vm_is_restored_from_the_template_of_the_first_and_booted_when_that_is_damaged() {
    let Some(bed) = Bed::new().await else { return };
    let node = bed.node().await;
    let first = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(!bed.is_restored(first));
    let template = bed.template().await;
    bed.stop(&node, first).await;

    let second = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(bed.is_restored(second));
    let job = bed.world.run(&node, second, shell("cat /etc/machine-id; hostname")).await;
    let told = String::from_utf8(node.follow(job, 0).await.stdout).unwrap();
    assert_eq!(told, format!("{}\nvm-{}\n", second.0.simple(), &second.to_string()[..8]));
    assert_eq!(node.differences().await, []);
    assert_eq!(bed.template().await, template);

    // Half of it is gone: that is seen before it is used. Another is made.
    let state = template.join("state");
    let length = state.metadata().unwrap().len();
    fs::File::options().write(true).open(&state).unwrap().set_len(length / 2).unwrap();
    bed.stop(&node, second).await;
    let third = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(!bed.is_restored(third));
    let template = bed.template().await;
    bed.stop(&node, third).await;

    // It looks whole and is not: the VM that meets it boots all the same. After the second no third is made.
    let damage = |template: &Path| {
        let mut state = fs::File::options().write(true).open(template.join("state")).unwrap();
        state.write_all(&[0x55; 64 * 1024]).unwrap();
    };
    damage(&template);
    let fourth = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(!bed.is_restored(fourth));
    let template = bed.template().await;
    bed.stop(&node, fourth).await;
    damage(&template);
    let fifth = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(!bed.is_restored(fifth));
    assert_eq!(bed.entries(), BTreeSet::new());
    bed.stop(&node, fifth).await;
}

#[tokio::test]
async fn a_changed_image_makes_another_template_and_the_old_one_goes() {
    let Some(bed) = Bed::new().await else { return };
    let node = bed.node().await;
    let first = bed.world.start_vm(&node, VmKind::Service).await;
    let template = bed.template().await;
    bed.stop(&node, first).await;
    let manifest = bed.world.dir.path().join("images/default/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"cmdline\": \"", "\"cmdline\": \"another=word ")).unwrap();

    let second = bed.world.start_vm(&node, VmKind::Service).await;
    assert!(!bed.is_restored(second));
    bed.stop(&node, second).await;
    let another = bed.template().await;
    assert_ne!(another, template);
    node.shut_down().await;

    // Nobody is there to see it change once more: the next start does.
    fs::write(&manifest, text).unwrap();
    let node = bed.node().await;
    assert_eq!(bed.entries(), BTreeSet::new());
    node.shut_down().await;
}

#[tokio::test]
async fn a_vmhost_killed_while_it_makes_a_template_leaves_nothing_that_the_next_does_not_end() {
    let Some(bed) = Bed::new().await else { return };
    let node = bed.node().await;
    let vm = bed.world.start_vm(&node, VmKind::Service).await;
    bed.wait_for_makers().await;
    node.crash().await;
    assert!(!bed.makers().is_empty(), "it ended with vmhost, so this shows nothing");
    let begun: Vec<PathBuf> = bed.entries().into_iter().collect();
    assert!(begun.len() == 1 && begun[0].extension().is_some_and(|extension| extension == "new"), "{begun:?}");

    let node = bed.node().await;
    assert!(bed.makers().is_empty());
    assert_eq!(bed.entries(), BTreeSet::new());
    // What appears later is named.
    fs::create_dir(bed.templates().join("0123.new")).unwrap();
    let found = node.differences().await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].subject.ends_with(".templates/0123.new") && found[0].vm_id.is_empty(), "{found:?}");
    let repair = blixard::pb::vmhost::v1::CheckInvariantsRequest { repair: true };
    assert!(node.client.clone().check_invariants(repair).await.unwrap().into_inner().violations[0].repaired);
    assert_eq!(bed.entries(), BTreeSet::new());
    bed.stop(&node, vm).await;
}

#[tokio::test]
async fn a_template_that_is_being_made_gives_way_to_a_vm_and_ends_with_vmhost() {
    let Some(mut bed) = Bed::new().await else { return };
    bed.world.max_vms = 2;
    let node = bed.node().await;
    let first = bed.world.start_vm(&node, VmKind::Service).await;
    bed.wait_for_makers().await;
    let second = bed.world.start_vm(&node, VmKind::Service).await;
    bed.wait_for_no_makers().await;
    bed.stop(&node, second).await;
    bed.stop(&node, first).await;

    let third = bed.world.start_vm(&node, VmKind::Service).await;
    bed.wait_for_makers().await;
    node.shut_down().await;
    bed.wait_for_no_makers().await;
    let node = bed.node().await;
    bed.stop(&node, third).await;
}
