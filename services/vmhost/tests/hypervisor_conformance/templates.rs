//! Machines that are restored from one that was saved.

use std::{collections::BTreeMap, fs::File};

use super::*;

/// How many machines are restored from one template, when it is not said: a minute's work.
const CLONES: &str = "BLIXARD_CLONES";
const CLONES_OF_QEMU: usize = 50;
/// In the emulated machine there is no room for more.
const CLONES_OF_CLOUD_HYPERVISOR: usize = 5;
/// How many are being restored at once.
const AT_ONCE: usize = 4;
/// What a guest could be told from another by, each a line, and its clock.
const WHO: &str = "cat /proc/sys/kernel/random/uuid; head -c 64 /dev/urandom | md5sum; hostname; cat /etc/machine-id; \
    cat /proc/sys/kernel/random/boot_id; date +%s";

/// A template of the launches of this bed.
async fn template(bed: &Bed) -> PathBuf {
    let (driver, launch) = (bed.driver(), bed.launch());
    let into = bed.root.path().join("template");
    fs::create_dir(&into).expect("mkdir");
    let templates = driver.templates().expect("it saves machines");
    within(BOOT, "save", templates.save(&launch, &into)).await.expect("is saved");
    assert_eq!(processes_of(&launch), [0; 0]);
    into
}

async fn restore(bed: &Bed, launch: &Launch, template: &Path) -> Arc<dyn Machine> {
    let driver = bed.driver();
    let templates = driver.templates().expect("it restores machines");
    within(BOOT, "restore", templates.restore(launch, template)).await.expect("is restored")
}

/// Everything that a script prints.
pub(super) async fn output(mut run: tonic::Streaming<RunResponse>) -> String {
    let mut output = Vec::new();
    loop {
        match run.message().await.expect("it runs").expect("its end comes").message {
            Some(run_response::Message::Output(chunk)) => output.extend(chunk.data),
            Some(run_response::Message::Exited(exited)) => {
                assert_eq!(exited.exit.expect("it was started").exit_code, Some(0));
                return String::from_utf8(output).expect("text");
            }
            Some(run_response::Message::Started(_)) | None => {}
        }
    }
}

pub(super) async fn restored_machines_run_jobs_and_no_two_are_alike(bed: Bed) {
    let by_default = if bed.choice == DriverChoice::Qemu { CLONES_OF_QEMU } else { CLONES_OF_CLOUD_HYPERVISOR };
    let clones = env::var(CLONES).map_or(by_default, |count| count.parse().expect("a number"));
    let begun = Instant::now();
    let template = template(&bed).await;
    eprintln!("saved after {:?}", begun.elapsed());
    let turns = Semaphore::new(AT_ONCE);
    let clone = |number: usize| {
        let (bed, template, turns) = (&bed, &template, &turns);
        async move {
            let turn = turns.acquire().await.expect("never closed");
            let (launch, begun) = (bed.launch(), Instant::now());
            let machine = restore(bed, &launch, template).await;
            let before = hello(&machine).await;
            eprintln!("machine {number} answers after {:?}", begun.elapsed());
            assert!(!before.configured && before.boot_id.is_empty(), "it was saved with an identity: {before:?}");
            let mut guest = client(&machine).await.expect("connects");
            let configured = configure(&mut guest, &launch).await;
            assert_eq!(configured.done, ["entropy", "boot-id", "clock", "hostname", "machine-id"]);
            assert_eq!(configured.skipped, [""; 0]);
            let told = output(run_named(guest, WHO).await).await;
            let now = Timestamp::now().0 / 1000;
            let mut lines: Vec<String> = told.lines().map(str::to_owned).collect();
            let clock: i64 = lines.pop().expect("a clock").parse().expect("seconds");
            assert!((now - 60..=now + 1).contains(&clock), "its clock says {clock}, it is {now}");
            assert_eq!(lines[2], format!("vm-{}", &launch.vm_id.to_string()[..8]));
            assert_eq!(lines[3], launch.vm_id.0.simple().to_string());
            assert_eq!(lines[4], configured.boot_id);
            drop(turn);
            (launch, machine, lines)
        }
    };
    let clones = futures::future::join_all((0..clones).map(clone)).await;
    // All of them live.
    let mut seen = BTreeMap::new();
    for (launch, machine, lines) in &clones {
        assert!(!machine.pids().is_empty());
        for (line, says) in lines.iter().enumerate() {
            let other = seen.insert((line, says.clone()), launch.vm_id);
            assert!(other.is_none(), "{} and {other:?} both say {says:?}", launch.vm_id);
        }
    }
    assert_eq!(seen.len(), 5 * clones.len());
    for (launch, machine, _) in clones {
        end(&machine).await;
        assert_eq!(processes_of(&launch), [0; 0]);
    }
}

pub(super) async fn a_restored_machine_is_adopted_shut_down_and_killed_like_any_other(bed: Bed) {
    let template = template(&bed).await;
    let (first, second) = (bed.launch(), bed.launch());
    let machine = restore(&bed, &first, &template).await;
    let killed = restore(&bed, &second, &template).await;
    // It needs it no more.
    fs::remove_dir_all(&template).expect("removes");
    hello(&machine).await;
    let boot_id = named(&machine, &first).await;
    let pids = machine.pids();
    drop(machine);
    let adopted = within(SOON, "adopt", bed.driver().adopt(&first)).await.expect("adopts").expect("it lives");
    assert_eq!((adopted.pids(), hello(&adopted).await.boot_id), (pids, boot_id));
    let all = output(run_named(client(&adopted).await.expect("connects"), "find / -xdev | wc -l").await).await;
    assert!(all.trim().parse::<u32>().expect("a number") > 100, "{all}");
    client(&adopted).await.expect("connects").shutdown(ShutdownRequest { grace_ms: 0 }).await.expect("begins");
    let exit = within(BOOT, "wait", adopted.wait()).await;
    assert!(exit.is_clean(), "{exit}");
    assert_eq!(processes_of(&first), [0; 0]);

    hello(&killed).await;
    assert_eq!(end(&killed).await.status, ProcessExit::Signaled(SIGKILL));
    assert_eq!(processes_of(&second), [0; 0]);
}

pub(super) async fn a_restored_machine_is_resized_like_any_other(bed: Bed) {
    if bed.choice != DriverChoice::CloudHypervisor {
        // It resizes none.
        return;
    }
    let (template, launch) = (template(&bed).await, bed.launch());
    let machine = restore(&bed, &launch, &template).await;
    hello(&machine).await;
    named(&machine, &launch).await;
    resize(&bed, &launch, machine).await;
}

pub(super) async fn a_template_that_is_damaged_is_refused_and_leaves_nothing(bed: Bed) {
    let template = template(&bed).await;
    // Not its memory: that may be read only when the guest needs it.
    let mut files = fs::read_dir(&template).expect("there").flatten().map(|file| file.path());
    let state = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"state"));
    let path = files.find(state).expect("it has a state");
    let length = path.metadata().expect("there").len();
    File::options().write(true).open(&path).expect("opens").set_len(length / 2).expect("truncates");
    let (driver, launch) = (bed.driver(), bed.launch());
    let templates = driver.templates().expect("it restores machines");
    let Err(error) = within(BOOT, "restore", templates.restore(&launch, &template)).await else {
        panic!("it was restored from half of a template")
    };
    eprintln!("{error}");
    assert_eq!(processes_of(&launch), [0; 0]);

    fs::remove_dir_all(&template).expect("removes");
    let launch = bed.launch();
    assert!(within(BOOT, "restore", templates.restore(&launch, &template)).await.is_err());
    assert_eq!(processes_of(&launch), [0; 0]);
}

/// In the emulated machine alone: elsewhere interfaces would be the host's. (QEMU's are tried in `tests/network.rs`.)
mod cloud_hypervisor {
    use blixard::pb::guest::v1::GuestNetwork;
    use blixard_vmhost::hypervisor::Nic;

    use super::*;

    #[tokio::test]
    async fn restored_machines_have_the_network_interfaces_that_their_template_had_not() {
        if env::var_os(nested::REQUIRE).is_none_or(|value| value != nested::HERE) {
            return;
        }
        let Some(bed) = Bed::cloud_hypervisor().await else { return };
        let template = template(&bed).await;
        let mut machines = Vec::new();
        for number in 1..3 {
            let (tap, mac, address) =
                (format!("tried{number}"), format!("02:62:0a:b4:00:0{number}"), format!("10.180.0.{number}/24"));
            let made = Command::new("busybox").args(["tunctl", "-t", &tap]).status().expect("busybox runs");
            assert!(made.success());
            // Where vmhost is to do that, this does.
            let up = Command::new("busybox").args(["ip", "link", "set", &tap, "up"]).status().expect("busybox runs");
            assert!(up.success());
            let nic = Nic { tap, mac: mac.parse().expect("an address") };
            let launch = Launch { nic: Some(nic), ..bed.launch() };
            let machine = restore(&bed, &launch, &template).await;
            hello(&machine).await;
            let mut guest = client(&machine).await.expect("connects");
            let network = GuestNetwork {
                mac: mac.clone(),
                addresses: vec![address.clone()],
                gateways: vec!["10.180.0.254".to_owned()],
                mtu: 1400,
                resolvers: Vec::new(),
            };
            let configured = configure_with(&mut guest, &launch, Some(network)).await;
            assert_eq!(configured.done.last().map(String::as_str), Some("network"));
            let script = "cat /sys/class/net/eth0/address; ip -4 -o address show eth0; ip route; ping -c 1 -W 1 10.180.0.254 || :";
            let told = output(run_named(guest, script).await).await;
            assert!(told.starts_with(&format!("{mac}\n")), "{told}");
            assert!(told.contains(&address) && told.contains("default via 10.180.0.254 dev eth0"), "{told}");
            let network = machine.usage().await.network.expect("it has an interface");
            assert!(network.sent_packets > 0 && network.sent_bytes > 0, "it looked for its gateway: {network:?}");
            machines.push(machine);
        }
        for machine in machines {
            end(&machine).await;
        }
    }
}

/// How long a guest takes to answer that is booted and one that is restored, in turns.
async fn measure(bed: Option<Bed>) {
    let Some(bed) = bed else { return };
    let template = template(&bed).await;
    let mut took: [Vec<Duration>; 2] = Default::default();
    for _ in 0..9 {
        for (kind, took) in took.iter_mut().enumerate() {
            let (launch, begun) = (bed.launch(), Instant::now());
            let machine =
                if kind == 0 { start(&bed.driver(), &launch).await } else { restore(&bed, &launch, &template).await };
            let launched = begun.elapsed();
            hello(&machine).await;
            took.push(begun.elapsed());
            eprintln!("{} {launched:?} {:?}", ["booted", "restored"][kind], begun.elapsed());
            end(&machine).await;
        }
    }
    let median = |took: &mut Vec<Duration>| {
        took.sort();
        took[took.len() / 2]
    };
    let [booted, restored] = took.each_mut().map(median);
    eprintln!("median of 9: booted {booted:?}, restored {restored:?}");
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure_qemu() {
    measure(Bed::qemu().await).await;
}

#[tokio::test]
#[ignore = "a measurement"]
async fn measure_cloud_hypervisor() {
    measure(Bed::cloud_hypervisor().await).await;
}
