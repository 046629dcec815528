//! Whether this node is as it has it on record: every process, directory, cgroup, network interface and address belongs to a VM that it holds, to
//! one only, and every VM that it holds has what it needs. What belongs to none is ended, and only that: a process is told by the mark that it was started with
//! ([`crate::hypervisor::marked_below`]), which names a directory below this node's own state directory. A contained process may have made its mark
//! itself, to pass for another VM's: it is one only if it stands in that machine's record.
//!
//! VMs begin and end while this looks. So processes and directories are listed first and what should be there afterwards, and
//! only a difference that several looks find is one.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use blixard::{error::Error, id::VmId, pb::common::v1 as pb, vm::VmState};

use crate::{
    absent::DELETED,
    blocking::blocking,
    driver::{VmHandle, with_sources},
    host::Host,
    hypervisor::{Contained, MarkedProcess, end_cgroup, end_marked, marked_below},
    net::Lease,
};

/// How often the node looks by itself. Reading the environment of every process costs about 10 µs each.
const EVERY: Duration = Duration::from_secs(60);
/// A difference counts when so many looks have found it.
const LOOKS: usize = 3;
/// Between two of them: an event that has happened is handled by then.
const APART: Duration = Duration::from_millis(500);
/// How many differences are told.
const MOST_TOLD: usize = 1000;

/// Something is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Violation {
    /// A process of a VM that is not held, or that has ended.
    Process(VmId, MarkedProcess),
    /// A process that passes for one of a VM that is held.
    Stranger(VmId, MarkedProcess),
    /// A directory of a VM that is not held, or what is left of one that was being deleted.
    Directory(VmId, PathBuf),
    /// A held VM is not on disk.
    Record(VmId),
    /// The machine of a VM that takes jobs does not run.
    Machine(VmId, VmState),
    /// The cgroup of a VM that is not held, or that has ended.
    Cgroup(VmId, PathBuf),
    /// The machine of a VM that takes jobs is not in its cgroup: that is not there.
    NoCgroup(VmId, PathBuf),
    /// A network interface that is nobody's.
    Interface(String),
    /// The network interface of a VM that takes jobs is not there.
    NoInterface(VmId, String),
    /// Another held VM was given the same.
    GivenTwice(VmId, Given),
    /// An address is kept for a VM that is not held.
    Lease(VmId, String),
    /// A process of a template that is not being made.
    TemplateProcess(MarkedProcess),
    /// What is left of making or deleting a template.
    TemplateDirectory(PathBuf),
}

/// What no two VMs may have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Given {
    Address(IpAddr),
    Mac(String),
    Tap(String),
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) violations: Vec<pb::Violation>,
    pub(crate) vms: usize,
    pub(crate) processes: usize,
    pub(crate) directories: usize,
}

/// What a look saw.
#[derive(Debug, Default)]
struct Seen {
    processes: Vec<(VmId, MarkedProcess)>,
    /// Those among them that do not stand in their machine's record.
    strangers: BTreeSet<MarkedProcess>,
    directories: Vec<(VmId, PathBuf)>,
    cgroups: Vec<(VmId, PathBuf)>,
    /// Interfaces by name.
    taps: BTreeSet<String>,
    /// Whom addresses are kept for, and the first of them.
    leases: BTreeMap<VmId, String>,
    vms: BTreeMap<VmId, Held>,
    /// What is in the templates' place and has no business there.
    stray_templates: Vec<Violation>,
}

/// A VM that this node holds.
#[derive(Debug, Clone)]
struct Held {
    state: VmState,
    recorded: bool,
    /// Whether its machine runs; `None`: it has none.
    runs: Option<bool>,
    /// What it was given of the network.
    lease: Option<Lease>,
    /// Its cgroup, if that is not there.
    lost_cgroup: Option<PathBuf>,
}

impl Held {
    fn tap(&self) -> Option<&String> {
        self.lease.as_ref().map(|lease| &lease.tap)
    }

    fn given(&self) -> impl Iterator<Item = Given> + use<'_> {
        let of = |lease: &Lease| {
            let v6 = lease.address6.map(|address| Given::Address(address.into()));
            let rest = [Given::Mac(lease.mac.to_string()), Given::Tap(lease.tap.clone())];
            [Given::Address(lease.address.into())].into_iter().chain(v6).chain(rest).collect::<Vec<_>>()
        };
        self.lease.iter().flat_map(of)
    }
}

/// What does not fit. Pure.
fn differences(seen: &Seen) -> BTreeSet<Violation> {
    let lives = |id: &VmId| seen.vms.get(id).is_some_and(|held| !held.state.is_terminal());
    let processes = seen.processes.iter().filter(|(id, _)| !lives(id));
    let processes = processes.map(|(id, process)| Violation::Process(*id, process.clone()));
    // While one starts, what was started is not on record for a moment.
    let is_up = |id: &VmId| lives(id) && seen.vms.get(id).is_some_and(|held| held.state != VmState::Starting);
    let strangers = seen.processes.iter().filter(|(id, process)| is_up(id) && seen.strangers.contains(process));
    let strangers = strangers.map(|(id, process)| Violation::Stranger(*id, process.clone()));
    // One whose end the registry does not know yet keeps its directory.
    let directories = seen.directories.iter().filter(|(id, path)| !seen.vms.contains_key(id) || is_deleted(path));
    let directories = directories.map(|(id, path)| Violation::Directory(*id, path.clone()));
    let records = seen.vms.iter().filter(|(_, held)| !held.recorded).map(|(id, _)| Violation::Record(*id));
    let running = || seen.vms.iter().filter(|(_, held)| held.state.is_running());
    let machines = running().filter(|(_, held)| held.runs != Some(true));
    let machines = machines.map(|(id, held)| Violation::Machine(*id, held.state));
    let cgroups = seen.cgroups.iter().filter(|(id, _)| !lives(id));
    let cgroups = cgroups.map(|(id, path)| Violation::Cgroup(*id, path.clone()));
    let lost = running().filter_map(|(id, held)| Some(Violation::NoCgroup(*id, held.lost_cgroup.clone()?)));
    let owned: BTreeSet<&String> = seen.vms.values().filter_map(Held::tap).collect();
    let strays = seen.taps.iter().filter(|tap| !owned.contains(tap)).cloned().map(Violation::Interface);
    let missing = running().filter_map(|(id, held)| Some((*id, held.tap().filter(|tap| !seen.taps.contains(*tap))?)));
    let missing = missing.map(|(id, tap)| Violation::NoInterface(id, tap.clone()));
    let leases = seen.leases.iter().filter(|(id, _)| !seen.vms.contains_key(id));
    let leases = leases.map(|(id, address)| Violation::Lease(*id, address.clone()));
    let templates = seen.stray_templates.iter().cloned();
    let of_vms =
        processes.chain(strangers).chain(directories).chain(records).chain(machines).chain(cgroups).chain(lost);
    of_vms.chain(strays).chain(missing).chain(leases).chain(given_twice(&seen.vms)).chain(templates).collect()
}

fn given_twice(vms: &BTreeMap<VmId, Held>) -> impl Iterator<Item = Violation> + use<> {
    let mut owners: BTreeMap<Given, Vec<VmId>> = BTreeMap::new();
    for (id, held) in vms {
        held.given().for_each(|given| owners.entry(given).or_default().push(*id));
    }
    let twice = owners.into_iter().filter(|(_, owners)| owners.len() > 1);
    twice.flat_map(|(given, owners)| owners.into_iter().map(move |id| Violation::GivenTwice(id, given.clone())))
}

fn is_deleted(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == DELETED)
}

impl Violation {
    fn describe(&self) -> pb::Violation {
        use pb::ViolationKind as Kind;
        let (kind, vm_id, subject, problem) = match self {
            Self::Process(vm_id, process) => {
                (Kind::Process, Some(vm_id), process.to_string(), "a process of a VM that this node does not hold")
            }
            Self::Stranger(vm_id, process) => (
                Kind::Process,
                Some(vm_id),
                process.to_string(),
                "a process that passes for one of this VM and is none",
            ),
            Self::Directory(vm_id, path) => {
                let path = path.display().to_string();
                (Kind::Directory, Some(vm_id), path, "the directory of a VM that this node does not hold")
            }
            Self::Record(vm_id) => {
                (Kind::Record, Some(vm_id), vm_id.to_string(), "this node holds it and has no record of it on disk")
            }
            Self::Machine(vm_id, VmState::Busy) => {
                (Kind::Machine, Some(vm_id), vm_id.to_string(), "it is Busy and its machine does not run")
            }
            Self::Machine(vm_id, _) => {
                (Kind::Machine, Some(vm_id), vm_id.to_string(), "it waits for jobs and its machine does not run")
            }
            Self::Cgroup(vm_id, path) => {
                let path = path.display().to_string();
                (Kind::Cgroup, Some(vm_id), path, "the cgroup of a VM that this node does not hold, or that has ended")
            }
            Self::NoCgroup(vm_id, path) => {
                (Kind::Cgroup, Some(vm_id), path.display().to_string(), "the cgroup of its VM is not there")
            }
            Self::Interface(tap) => {
                (Kind::Interface, None, tap.clone(), "a network interface of this node's that no VM owns")
            }
            Self::NoInterface(vm_id, tap) => {
                (Kind::Interface, Some(vm_id), tap.clone(), "the network interface of its VM is not there")
            }
            Self::GivenTwice(vm_id, Given::Address(address)) => {
                (Kind::Address, Some(vm_id), address.to_string(), "two VMs that this node holds have this address")
            }
            Self::GivenTwice(vm_id, Given::Mac(mac)) => {
                (Kind::Address, Some(vm_id), mac.clone(), "two VMs that this node holds have this hardware address")
            }
            Self::GivenTwice(vm_id, Given::Tap(tap)) => {
                (Kind::Address, Some(vm_id), tap.clone(), "two VMs that this node holds have this network interface")
            }
            Self::Lease(vm_id, address) => (
                Kind::Address,
                Some(vm_id),
                address.clone(),
                "an address is kept for a VM that this node does not hold",
            ),
            Self::TemplateProcess(process) => {
                (Kind::Process, None, process.to_string(), "a process of a template that is not being made")
            }
            Self::TemplateDirectory(path) => {
                (Kind::Directory, None, path.display().to_string(), "what is left of making or deleting a template")
            }
        };
        let vm_id = vm_id.map(VmId::to_string).unwrap_or_default();
        pb::Violation { kind: kind.into(), vm_id, subject, problem: problem.to_owned(), repaired: false }
    }
}

/// Checks now and then, for ever, and repairs what it finds.
pub(crate) async fn keep(host: &Arc<Host>) {
    loop {
        tokio::time::sleep(EVERY).await;
        match check(host, true).await {
            Ok(findings) => {
                for found in findings.violations {
                    let (vm_id, subject, repaired) = (found.vm_id, found.subject, found.repaired);
                    tracing::error!(
                        vm_id,
                        subject,
                        repaired,
                        problem = found.problem,
                        "this node is not as it is on record"
                    );
                }
            }
            Err(error) => tracing::error!(%error, "this node can't be compared with its records"),
        }
    }
}

/// Compares what is on record with what is there, and puts right what can be, if so asked.
pub(crate) async fn check(host: &Arc<Host>, repair: bool) -> Result<Findings, Error> {
    let (mut findings, mut violations) = look(host).await?;
    for _ in 1..LOOKS {
        if violations.is_empty() {
            return Ok(findings);
        }
        tokio::time::sleep(APART).await;
        let (latest, again) = look(host).await?;
        findings = latest;
        violations.retain(|violation| again.contains(violation));
    }
    for violation in violations.iter().take(MOST_TOLD) {
        // Before: a process that has ended has no name.
        let described = violation.describe();
        let repaired = repair && put_right(host, violation).await;
        findings.violations.push(pb::Violation { repaired, ..described });
    }
    Ok(findings)
}

async fn look(host: &Arc<Host>) -> Result<(Findings, BTreeSet<Violation>), Error> {
    let (taps, leases) = match &host.network {
        Ok(network) => {
            let taps = network.taps().await.map_err(|error| {
                let error = with_sources(&error);
                Error::internal(|error_id| tracing::error!(error_id, error, "the network interfaces can't be listed"))
            })?;
            (taps, network.leases())
        }
        Err(_) => Default::default(),
    };
    let seen = Seen { taps, leases, ..Seen::default() };
    let from = Arc::clone(host);
    let seen = blocking(move || see(&from, seen)).await.map_err(|error| {
        Error::internal(|error_id| tracing::error!(error_id, %error, "the VM state directory can't be read"))
    })?;
    let (vms, processes, directories) = (seen.vms.len(), seen.processes.len(), seen.directories.len());
    Ok((Findings { violations: vec![], vms, processes, directories }, differences(&seen)))
}

fn see(host: &Host, before: Seen) -> io::Result<Seen> {
    let state_dir = host.state.path();
    let owner = |process: MarkedProcess| Some((host.state.owner(&process.dir)?, process));
    // Where nothing is contained a job's processes are its machine's, and bear its mark.
    let contained = host.hypervisor.containment() != Contained::No;
    let is_its =
        |process: &MarkedProcess, names_it: bool| !contained || names_it && process.is_on_record().unwrap_or(true);
    let (of_templates, processes): (Vec<_>, Vec<_>) =
        marked_below(state_dir).into_iter().partition(|process| host.templates.owns(&process.dir));
    let processes: Vec<_> = processes.into_iter().filter_map(owner).collect();
    let is_stranger =
        |(id, process): &&(VmId, MarkedProcess)| !is_its(process, process.dir == host.state.vm(*id).machine());
    let strangers = processes.iter().filter(is_stranger).map(|(_, process)| process.clone()).collect();
    let (directories, template_directories) = (host.state.entries()?, host.templates.entries()?);
    let mut cgroups = host.containment.cgroups()?;
    // Afterwards: what it holds now it may have begun since, what it does not hold it has not held since.
    let vms: Vec<_> = host.vms().iter().map(|(id, vm)| (*id, vm.clone())).collect();
    let held = |(id, vm): (VmId, VmHandle)| {
        let recorded = matches!(host.state.vm(id).vm(), Ok(Some(_)));
        let view = vm.view.borrow().clone();
        let runs = view.machine.map(|machine| !machine.pids().is_empty());
        let lost_cgroup = vm.cgroup.filter(|path| !path.exists());
        (id, Held { state: view.state, recorded, runs, lease: vm.lease, lost_cgroup })
    };
    let makes = |process: &MarkedProcess| host.templates.makes_in(&process.dir) && is_its(process, true);
    let of_templates = of_templates.into_iter().filter(|process| !makes(process));
    let left = template_directories.into_iter().filter(|path| !host.templates.accounts_for(path));
    let stray_templates =
        of_templates.map(Violation::TemplateProcess).chain(left.map(Violation::TemplateDirectory)).collect();
    let vms: BTreeMap<VmId, Held> = vms.into_iter().map(held).collect();
    // A template's is nobody's, and accounted for while that is made.
    cgroups.retain(|(id, _)| vms.contains_key(id) || !host.containment.has_leased(*id));
    Ok(Seen { processes, strangers, directories, cgroups, vms, stray_templates, ..before })
}

/// Ends or deletes what belongs to nobody; false: that can't be done, or must not be.
async fn put_right(host: &Arc<Host>, violation: &Violation) -> bool {
    match violation {
        Violation::Process(_, process) | Violation::Stranger(_, process) | Violation::TemplateProcess(process) => {
            let ended = end_marked(std::slice::from_ref(process)).await;
            ended.inspect_err(|error| tracing::error!(error = with_sources(error), "a process does not end")).is_ok()
        }
        Violation::Directory(vm_id, path) => {
            let (host, vm_id, path) = (Arc::clone(host), *vm_id, path.clone());
            let deleted = blocking(move || host.delete_leftover(vm_id, &path)).await;
            deleted.inspect_err(|error| tracing::error!(%error, "a VM's directory can't be deleted")).is_ok()
        }
        Violation::TemplateDirectory(path) => {
            let (templates, path) = (Arc::clone(&host.templates), path.clone());
            let deleted = blocking(move || templates.delete_leftover(&path)).await;
            deleted.inspect_err(|error| tracing::error!(%error, "a template's directory can't be deleted")).is_ok()
        }
        // One of this id may have begun since: then it is its own.
        Violation::Cgroup(vm_id, _) if host.vm(*vm_id).is_some_and(|vm| !vm.view.borrow().state.is_terminal()) => false,
        Violation::Cgroup(_, path) => {
            let ended = end_cgroup(path.clone()).await;
            ended.inspect_err(|error| tracing::error!(error = with_sources(error), "a cgroup is left")).is_ok()
        }
        Violation::Interface(_) => match &host.network {
            Ok(network) => {
                let settled = network.settle().await;
                settled
                    .inspect_err(|error| tracing::error!(error = with_sources(error), "an interface is left"))
                    .is_ok()
            }
            Err(_) => false,
        },
        Violation::Lease(vm_id, _) => host.return_lease(*vm_id).await,
        // Its driver has it in hand: it notices, or it is the next vmhost that makes an end of it. And whose of two VMs an address is,
        // nobody can tell.
        Violation::Record(_)
        | Violation::Machine(..)
        | Violation::NoCgroup(..)
        | Violation::NoInterface(..)
        | Violation::GivenTwice(..) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Mac;

    fn held(state: VmState, recorded: bool, runs: Option<bool>) -> Held {
        Held { state, recorded, runs, lease: None, lost_cgroup: None }
    }

    fn found(state: VmState, recorded: bool, runs: Option<bool>) -> Vec<Violation> {
        let vms = BTreeMap::from([(VmId(uuid::Uuid::nil()), held(state, recorded, runs))]);
        differences(&Seen { vms, ..Seen::default() }).into_iter().collect()
    }

    fn lease(index: u8) -> Lease {
        let tap = format!("tap{index}");
        let (mac, address) = (Mac([2, 0, 0, 0, 0, index]), [10, 0, 0, index].into());
        Lease { index: index.into(), tap, mac, address, address6: None }
    }

    fn with_lease(state: VmState, lease: Lease) -> Held {
        Held { lease: Some(lease), ..held(state, true, Some(true)) }
    }

    #[test]
    fn a_vm_that_takes_jobs_needs_a_machine_and_each_a_record() {
        let vm = VmId(uuid::Uuid::nil());
        for state in VmState::ALL {
            let works = matches!(state, VmState::Ready | VmState::Busy | VmState::Idle);
            assert_eq!(found(state, true, Some(true)), []);
            for dead in [None, Some(false)] {
                let expected = if works { vec![Violation::Machine(vm, state)] } else { vec![] };
                assert_eq!(found(state, true, dead), expected, "{state} {dead:?}");
            }
            assert_eq!(found(state, false, Some(true)), [Violation::Record(vm)], "{state}");
        }
    }

    #[test]
    fn the_directory_of_a_held_vm_may_stay_until_its_end_is_known_but_not_half_deleted() {
        let vm = VmId(uuid::Uuid::nil());
        let held = held(VmState::Terminated, true, None);
        let (whole, half) = (PathBuf::from(format!("/s/{vm}")), PathBuf::from(format!("/s/{vm}.deleted")));
        let directories = vec![(vm, whole.clone()), (vm, half.clone())];
        let mut seen = Seen { directories, vms: BTreeMap::from([(vm, held)]), ..Seen::default() };
        assert_eq!(differences(&seen), BTreeSet::from([Violation::Directory(vm, half.clone())]));
        seen.vms.clear();
        assert_eq!(differences(&seen), [whole, half].map(|path| Violation::Directory(vm, path)).into());
    }

    #[test]
    fn a_cgroup_goes_with_its_vm_and_is_there_while_that_takes_jobs() {
        let (vm, path) = (VmId(uuid::Uuid::nil()), PathBuf::from("/c/vm"));
        let of = |state, cgroups: &[PathBuf], lost_cgroup| {
            let cgroups = cgroups.iter().map(|path| (vm, path.clone())).collect();
            let held = Held { lost_cgroup, ..held(state, true, Some(true)) };
            differences(&Seen { cgroups, vms: BTreeMap::from([(vm, held)]), ..Seen::default() })
        };
        let there = [path.clone()];
        assert_eq!(of(VmState::Starting, &[], Some(path.clone())), BTreeSet::new(), "it may not be made yet");
        assert_eq!(of(VmState::Idle, &there, None), BTreeSet::new());
        assert_eq!(of(VmState::Idle, &[], Some(path.clone())), [Violation::NoCgroup(vm, path.clone())].into());
        assert_eq!(of(VmState::Terminated, &[], Some(path.clone())), BTreeSet::new());
        assert_eq!(of(VmState::Failed, &there, None), [Violation::Cgroup(vm, path.clone())].into());
        let unheld = differences(&Seen { cgroups: vec![(vm, path.clone())], ..Seen::default() });
        assert_eq!(unheld, [Violation::Cgroup(vm, path)].into());
    }

    #[test]
    fn an_interface_has_an_owner_and_a_vm_that_takes_jobs_the_one_it_was_given() {
        let vm = VmId(uuid::Uuid::nil());
        let held = |state| with_lease(state, lease(1));
        let of = |state, taps: &[&str]| {
            let taps = taps.iter().map(ToString::to_string).collect();
            differences(&Seen { taps, vms: BTreeMap::from([(vm, held(state))]), ..Seen::default() })
        };
        assert_eq!(of(VmState::Idle, &["tap1"]), BTreeSet::new());
        assert_eq!(of(VmState::Starting, &[]), BTreeSet::new(), "it may not be made yet");
        assert_eq!(of(VmState::Idle, &[]), [Violation::NoInterface(vm, "tap1".into())].into());
        assert_eq!(of(VmState::Starting, &["tap1", "tap2"]), [Violation::Interface("tap2".into())].into());
    }

    #[test]
    fn what_is_given_is_given_to_one_vm_that_is_held() {
        let [one, two] = [1, 2].map(|id| VmId(uuid::Uuid::from_u128(id)));
        let of = |second: Lease, kept: &[VmId]| {
            let vms = [(one, lease(1)), (two, second)].map(|(id, lease)| (id, with_lease(VmState::Starting, lease)));
            let leases = kept.iter().map(|id| (*id, "10.0.0.1".to_owned())).collect();
            differences(&Seen { vms: vms.into(), leases, ..Seen::default() })
        };
        assert_eq!(of(lease(2), &[one, two]), BTreeSet::new());
        for (second, given) in [
            (Lease { address: lease(1).address, ..lease(2) }, Given::Address(lease(1).address.into())),
            (Lease { mac: lease(1).mac, ..lease(2) }, Given::Mac(lease(1).mac.to_string())),
            (Lease { tap: lease(1).tap, ..lease(2) }, Given::Tap(lease(1).tap)),
        ] {
            let both = [one, two].map(|id| Violation::GivenTwice(id, given.clone()));
            assert_eq!(of(second, &[]), both.into());
        }
        let gone = VmId(uuid::Uuid::from_u128(3));
        assert_eq!(of(lease(2), &[gone, one]), [Violation::Lease(gone, "10.0.0.1".into())].into());
    }
}
