//! Volumes, from a name to what a job in a real guest sees of it, and what becomes of them.

mod support;

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{
    config::DriverChoice,
    error::{Error, Reason},
    id::VmId,
    pb::{
        common::v1::{self as common, volume::Source},
        vmhost::v1 as pb,
    },
    vm::VmState,
};
use blixard_vmhost::{disk::ext4, hypervisor::choose};
use support::{Node, World, command, fake_guest::FakeGuest, passing::Passing, shell, vm_config};

/// For a guest under emulation on a loaded machine.
const BOOT: Duration = Duration::from_secs(240);
const MIB: u64 = 1024 * 1024;

fn volume(mount_path: &str, source: Source) -> common::Volume {
    common::Volume { mount_path: mount_path.into(), source: Some(source) }
}

fn named(name: &str, mount_path: &str) -> common::Volume {
    volume(mount_path, Source::Name(name.into()))
}

fn scratch(mib: u64) -> common::Volume {
    volume("/scratch", Source::ScratchMib(mib))
}

async fn start(world: &World, node: &Node, volumes: Vec<common::Volume>) -> Result<VmId, Error> {
    let (id, kind) = (VmId::random(), common::VmKind::Ephemeral);
    world.record_vm(id, kind, VmState::Starting);
    let config = common::VmConfig { memory_mib: Some(256), volumes, ..vm_config(kind) };
    let request = pb::StartVmRequest { vm_id: id.to_string(), config: Some(config) };
    node.client.clone().start_vm(request).await.map(|_| id).map_err(Error::from)
}

/// The VM once it starts no more.
async fn started(world: &World, vm: VmId) -> common::Vm {
    let since = Instant::now();
    loop {
        let seen = world.registry.state().vms.get(&vm.to_string()).cloned().expect("recorded");
        if seen.state() != common::VmState::Starting {
            return seen;
        }
        assert!(since.elapsed() < BOOT, "not booted within {BOOT:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A file system with one file, made by others, where their tool is.
fn make_ext4(path: &Path, of: &Path) -> bool {
    let mut make = Command::new("/usr/sbin/mke2fs");
    let made = make.args(["-q", "-t", "ext4", "-d"]).arg(of).arg(path).arg("8M").output();
    made.inspect_err(|_| eprintln!("SKIPPED: no disk that mke2fs made (apt-get install e2fsprogs)")).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_in_real_guests_share_what_they_may_read_and_nothing_that_they_may_write() {
    let Some(driver) = support::qemu() else { return };
    let mut world = World::new().await;
    let at = |name: &str| world.dir.path().join(name);
    fs::create_dir_all(at("tools/bin")).expect("mkdir");
    fs::write(at("tools/bin/tool"), "a tool\n").expect("writes");
    symlink("/etc/hostname", at("tools/out")).expect("links");
    fs::create_dir(at("other")).expect("mkdir");
    fs::write(at("other/hello"), "hello\n").expect("writes");
    let with_ext4 = make_ext4(&at("disk.ext4"), &at("other"));
    // A file system by its first bytes only.
    let mut broken = vec![0xff; 1 << 20];
    broken[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
    fs::write(at("broken"), broken).expect("writes");
    let names = [("tools", "tools"), ("disk", if with_ext4 { "disk.ext4" } else { "other" }), ("broken", "broken")];
    let volumes = names.map(|(name, path)| (name.to_owned(), at(path).to_str().expect("UTF-8").to_owned()));
    world.volumes = volumes.into();

    let mut node = world.node_with(Arc::clone(&driver)).await;
    let both = || vec![named("tools", "/opt/tools"), named("disk", "/disk")];
    let with_scratch = start(&world, &node, [both(), vec![scratch(64)]].concat()).await.expect("accepted");
    let without = start(&world, &node, both()).await.expect("accepted");
    let bad = start(&world, &node, vec![named("broken", "/broken")]).await.expect("accepted");
    for vm in [with_scratch, without] {
        let seen = started(&world, vm).await;
        assert_eq!(seen.state(), common::VmState::Ready, "{}", seen.reason);
    }
    let file = world.vm_state_dir().join(with_scratch.to_string()).join("machine/disk2");
    let taken = || fs::metadata(&file).expect("it is there").blocks() * 512;
    assert!(taken() < 2 * MIB, "{}", taken());

    // Both have them now.
    let reads = "cat /opt/tools/bin/tool /disk/hello; readlink /opt/tools/out
        for to in /opt/tools/new /opt/tools/bin/tool /disk/new; do echo no > $to; done 2>&1 | grep -c 'Read-only file system'";
    let writes = "ls -A /scratch; head -c 20000000 /dev/zero > /scratch/some; sync; wc -c < /scratch/some
        dd if=/dev/zero of=/scratch/full bs=1M 2>&1 | grep -o 'No space left on device'
        echo more > /tmp/file; cat /tmp/file; rm /scratch/*; echo again > /scratch/file; cat /scratch/file";
    let read = "a tool\nhello\n/etc/hostname\n3\n";
    let cases = [(with_scratch, format!("{reads}\n{writes}")), (without, reads.to_owned())];
    let mut printed = Vec::new();
    for (vm, script) in &cases {
        let job = world.run(&node, *vm, shell(script)).await;
        world.wait_job(job).await;
        printed.push(String::from_utf8(node.follow(job, 0).await.stdout).expect("text"));
    }
    assert_eq!(printed[0], format!("{read}20000000\nNo space left on device\nmore\nagain\n"));
    assert_eq!(printed[1], read);

    let failed = started(&world, bad).await;
    assert_eq!(failed.state(), common::VmState::Failed);
    let says = "cannot set the guest's volumes: mount a file system of erofs at /broken: ";
    assert!(failed.reason.contains(says), "{}", failed.reason);

    // What others hold counts, and goes with them.
    let disk = rustix::fs::statvfs(world.dir.path()).expect("a disk");
    let mib = |blocks: u64| blocks * disk.f_frsize / MIB;
    let free = mib(disk.f_bavail).saturating_sub((mib(disk.f_blocks) / 20).min(4096));
    if (200..1_500_000).contains(&free) {
        let most = start(&world, &node, vec![scratch(free * 6 / 10)]).await.expect("accepted");
        let refused = start(&world, &node, vec![scratch(free * 6 / 10)]).await.expect_err("no room");
        assert_eq!(refused.reason, Reason::Overloaded, "{refused}");
        node.stop_vm(most, Some(0)).await.expect("stopped");
        world.wait_vm(most, VmState::Terminated).await;
        let again = start(&world, &node, vec![scratch(free * 6 / 10)]).await.expect("there is room again");
        // In the middle of its start.
        node.crash().await;
        node = world.node_with(driver).await;
        assert_eq!(node.differences().await, []);
        if node.hosted().await.iter().any(|hosted| hosted.vm_id == again.to_string()) {
            // It was up already when the crash came, on a machine with much to do.
            node.stop_vm(again, Some(0)).await.expect("stopped");
        }
    }
    world.assert_nothing_left().await;
    let cached = fs::read_dir(world.vm_state_dir().join("volumes")).expect("a directory").count();
    assert_eq!(cached, if with_ext4 { 1 } else { 2 });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_says_which_volumes_it_has_as_they_come_and_plain_processes_have_none() {
    let mut world = World::new().await;
    let (there, later) = (world.dir.path().join("there"), world.dir.path().join("later"));
    let file = fs::File::options().read(true).write(true).create_new(true).open(&there).expect("creates");
    ext4::create(&file, 16, &[1; 16]).expect("writes");
    for (name, path) in [("there", &there), ("later", &later)] {
        world.volumes.insert(name.to_owned(), path.to_str().expect("UTF-8").to_owned());
    }
    let process = choose(DriverChoice::Process, &world.settings());
    let process = process.expect("an agent").0;
    let registered = |world: &World| {
        let volumes = world.registry.state().nodes.values().next().map(|node| node.volumes.clone());
        volumes.ok_or("not registered yet".to_owned())
    };
    let node = world.node_with(Arc::clone(&process)).await;
    let wait = async |world: &World, expected: &[&str]| {
        let what = format!("the volumes {expected:?}");
        support::wait_for(&what, || match registered(world) {
            Ok(volumes) if volumes == expected => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    };
    wait(&world, &[]).await;
    let refused = start(&world, &node, vec![scratch(16)]).await.expect_err("refused");
    assert_eq!((refused.reason, refused.metadata["field"].as_str()), (Reason::ExceedsCapacity, "config.volumes"));
    assert!(refused.message.contains("the driver \"process\" has no disks to give"), "{refused}");
    node.shut_down().await;

    let node = world.node_with(Arc::new(Passing { takes_devices: true, ..Passing::new(process) })).await;
    wait(&world, &["there"]).await;
    fs::create_dir(&later).expect("mkdir");
    wait(&world, &["later", "there"]).await;
    let scratch_mib = |world: &World| world.registry.state().nodes.values().next().expect("registered").scratch_mib;
    assert!(scratch_mib(&world) > 0);
    for (volumes, says) in [
        (vec![named("nowhere", "/x")], "the volumes of this node: later, there"),
        (
            vec![
                scratch(1_048_576),
                volume("/y", Source::ScratchMib(1_048_576)),
                volume("/z", Source::ScratchMib(1_048_576)),
            ],
            "the disk of this node has no more to give",
        ),
    ] {
        let refused = start(&world, &node, volumes).await.expect_err("refused");
        assert_eq!(refused.reason, Reason::ExceedsCapacity, "{refused}");
        assert!(refused.message.contains(says), "{refused}");
    }
}

#[tokio::test]
async fn a_vm_whose_hypervisor_makes_its_scratch_disk_larger_is_ended_and_its_job_is_lost() {
    let mut world = World::new().await;
    world.pace.look_at_host_every = Duration::from_millis(10);
    let node = world.node_with(Arc::new(FakeGuest::default())).await;
    let disks = || vec![volume("/a", Source::ScratchMib(64)), volume("/b", Source::ScratchMib(16))];
    let vm = start(&world, &node, disks()).await.expect("accepted");
    world.wait_vm(vm, VmState::Ready).await;
    let job = world.run(&node, vm, command(&["sleep", "600"])).await;
    world.wait_job_until(job, |job| job.state() == common::JobState::Running).await;
    let grow = |disk: &str, bytes| {
        let path = world.vm_state_dir().join(vm.to_string()).join("machine").join(disk);
        fs::File::options().write(true).open(path).expect("it is there").set_len(bytes).expect("it grows");
    };
    // As long as it may be.
    grow("disk1", 16 * MIB);
    assert_eq!(node.hosted().await[0].state(), common::VmState::Busy);
    grow("disk1", 64 * MIB);
    let failed = world.wait_vm(vm, VmState::Failed).await;
    let says = "its hypervisor is not to be trusted: a scratch disk of 16 MiB is a file of 64 MiB and takes 1 MiB";
    assert!(failed.reason.starts_with(says), "{}", failed.reason);
    let lost = world.wait_job(job).await;
    assert_eq!(lost.state(), common::JobState::Queued, "lost, not failed: another attempt may follow");
    assert!(lost.reason.contains("its VM ended: its hypervisor is not to be trusted"), "{}", lost.reason);
    world.assert_nothing_left().await;
}
