//! What must be gone when all is over, asked of the node, the registry and the kernel.

use std::{fs, path::Path, time::Duration};

use blixard::{
    job::JobState,
    limits,
    pb::{registry::v1 as registry, vmhost::v1 as vmhost},
    vm::VmState,
};
use blixard_chassis::client;

use crate::bed::{Bed, CALL_TIMEOUT, VMHOST, wait_until};

/// How long the node may hold VMs that are on record as ended.
const GONE_WITHIN: Duration = Duration::from_secs(60);
/// What the node logs when it has found, by itself, something to repair.
const CONFESSIONS: [&str; 2] = ["this node is not as it is on record", "a TAP of ours that no VM owns is deleted"];
/// A vmhost's first words, and those with which its recovery is over: in between it finds what the one before had no time for.
const RECOVERY: [&str; 2] = ["VM driver chosen", "vmhost serves"];

/// Nothing is.
pub(crate) async fn none(bed: &Bed, vms: &[String]) -> Result<(), String> {
    bed.wait_registered().await?;
    wait_until("the node to hold no VM", GONE_WITHIN, async || {
        let list = client::request(vmhost::ListVmsRequest::default(), CALL_TIMEOUT);
        let vms = bed.vmhost().list_vms(list).await.map_err(|status| status.to_string())?.into_inner().vms;
        if vms.is_empty() { Ok(()) } else { Err(format!("{vms:?}")) }
    })
    .await?;
    wait_until("no template to be made", GONE_WITHIN, async || {
        let templates = fs::read_dir(bed.state_dir().join(".templates")).into_iter().flatten().flatten();
        let made: Vec<_> = templates.map(|entry| entry.file_name()).collect();
        if made.iter().any(|name| name.to_string_lossy().ends_with(".new")) { Err(format!("{made:?}")) } else { Ok(()) }
    })
    .await?;
    // At once: nobody is to have time to clean up.
    let mut wrong = of_host(bed, vms);
    let check = client::request(vmhost::CheckInvariantsRequest { repair: false }, Duration::from_secs(60));
    let found = bed.vmhost().check_invariants(check).await.map_err(|status| status.to_string())?.into_inner();
    wrong.extend(found.violations.iter().map(|violation| format!("CheckInvariants: {violation:?}")));
    if (found.vms, found.processes, found.directories) != (0, 0, 0) {
        wrong.push(format!("CheckInvariants has seen {found:?}"));
    }
    wrong.extend(on_record(bed, vms.len()).await.map_err(|status| status.to_string())?);
    wrong.extend(confessions(&bed.processes().log(VMHOST)));
    match bed.processes().ended_by_itself(VMHOST) {
        0 => {}
        times => wrong.push(format!("vmhost ended by itself {times} times")),
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
}

/// What the vmhosts had to put right themselves while they served, and their panics.
fn confessions(log: &str) -> Vec<String> {
    let mut serves = false;
    let mut wrong = Vec::new();
    for line in log.lines() {
        serves = (serves && !line.contains(RECOVERY[0])) || line.contains(RECOVERY[1]);
        // A console that is quoted may tell of others' panics.
        let panicked = line.starts_with("thread '") && line.contains("panicked");
        if panicked || (serves && CONFESSIONS.iter().any(|words| line.contains(words))) {
            wrong.push(line.to_owned());
        }
    }
    wrong
}

/// What this machine has of these VMs.
fn of_host(bed: &Bed, vms: &[String]) -> Vec<String> {
    let mut wrong: Vec<String> = bed.strays().iter().map(|stray| format!("process {stray:?}")).collect();
    let entries = fs::read_dir(bed.state_dir()).unwrap().flatten();
    // Files of the node's own begin with a dot.
    let left = entries.map(|entry| entry.file_name()).filter(|name| !name.to_string_lossy().starts_with('.'));
    wrong.extend(left.map(|name| format!("{name:?} in the state directory")));
    wrong.extend(links(bed).into_iter().filter(|name| name.contains('-')).map(|name| format!("interface {name}")));
    wrong.extend(cgroups(Path::new("/sys/fs/cgroup"), vms).into_iter().map(|path| format!("cgroup {path}")));
    wrong
}

/// When the node's guests have no network any more.
pub(crate) fn no_network(bed: &Bed) -> Result<(), String> {
    let (links, tables) =
        (links(bed), if bed.has_network() { of_node(bed, "nft", &["list", "tables"]) } else { String::new() });
    if links.is_empty() && tables.is_empty() { Ok(()) } else { Err(format!("{links:?} {tables:?}")) }
}

/// Interfaces of ours on the node's host.
fn links(bed: &Bed) -> Vec<String> {
    if !bed.network().partitions {
        return vec![];
    }
    let listed = of_node(bed, "ip", &["-o", "link"]);
    let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
    listed.lines().filter_map(name).filter(|name| name.starts_with("blx")).collect()
}

fn of_node(bed: &Bed, program: &str, arguments: &[&str]) -> String {
    let output = bed.network().command(VMHOST, Path::new(program)).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Control groups that are named after one of these VMs.
fn cgroups(dir: &Path, vms: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if vms.iter().any(|vm| name.contains(vm)) {
            found.push(path.display().to_string());
        }
        found.extend(cgroups(&path, vms));
    }
    found
}

/// What the registry has of it all.
async fn on_record(bed: &Bed, cycles: usize) -> Result<Vec<String>, tonic::Status> {
    let mut client = bed.registry();
    let (mut wrong, mut vms, mut page_token) = (Vec::new(), 0, String::new());
    loop {
        let list = registry::ListVmsRequest { page_size: limits::MAX_PAGE_SIZE, page_token, ..Default::default() };
        let page = client.list_vms(client::request(list, CALL_TIMEOUT)).await?.into_inner();
        vms += page.vms.len();
        let lives = |state| VmState::from_pb("state", state).is_ok_and(|state| !state.is_terminal());
        wrong.extend(page.vms.into_iter().filter(|vm| lives(vm.state)).map(|vm| format!("on record: {vm:?}")));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if vms != cycles {
        wrong.push(format!("{vms} VMs are on record, not {cycles}"));
    }
    let states = JobState::ALL.into_iter().filter(|state| !state.is_terminal());
    let states = states.map(|state| state.to_pb().into()).collect();
    let list = registry::ListJobsRequest { page_size: limits::MAX_PAGE_SIZE, states, ..Default::default() };
    let jobs = client.list_jobs(client::request(list, CALL_TIMEOUT)).await?.into_inner().jobs;
    wrong.extend(jobs.into_iter().map(|job| format!("on record: {job:?}")));
    Ok(wrong)
}
