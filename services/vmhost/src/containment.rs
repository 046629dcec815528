//! What contains this node's VMs: a user and a cgroup for each, and what the kernel offers besides.
//!
//! A user is leased as an address is: it is in the VM's record before anything belongs to it, an adopted VM keeps its own, and it is given back when
//! the VM is forgotten. The path of its cgroup stands beside it. Where vmhost lacks the rights, or the kernel something, VMs run all the same, in a
//! reduced form that [`Containment::describe`] tells.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::lchown,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use blixard::{
    config::UserRange,
    error::{Error, Reason},
    id::{NodeId, VmId},
};

use crate::{
    hypervisor::{Cgroups, Contained, DiskLimit, IoMax, landlock_version, may_change_user, seccomp},
    net::node_tag,
};

/// How many users of a large range one node takes, so that two nodes of one machine hardly ever share one: more VMs than any node has.
const USERS_OF_A_NODE: u32 = 16_384;
/// A file in the state directory that shows whether files there can be given away. It is removed at once.
const PROBE: &str = ".owner";

/// What contains one node's VMs.
#[derive(Debug)]
pub struct Containment {
    /// Who has which; or why VMs have none.
    users: Result<Mutex<Users>, String>,
    /// Or why there are none.
    cgroups: Result<Cgroups, String>,
    landlock: u32,
    /// Or why there is none.
    seccomp: Result<(), String>,
    /// Who has something.
    leased: Mutex<BTreeSet<VmId>>,
}

/// What one VM is contained by. Recorded before it is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// Its user, and the group of the same number.
    pub user: Option<u32>,
    /// Its cgroup.
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug)]
struct Users {
    range: UserRange,
    by_vm: BTreeMap<VmId, u32>,
    /// The one that was given last.
    last: u32,
}

impl Users {
    /// Of the range, what is this node's.
    fn of_node(range: UserRange, tag: [u8; 32]) -> Self {
        let UserRange { first, last } = range;
        let shares = (last - first) / USERS_OF_A_NODE;
        let range = if shares < 2 {
            range
        } else {
            let [a, b, c, d, ..] = tag;
            let first = first + u32::from_be_bytes([a, b, c, d]) % shares * USERS_OF_A_NODE;
            UserRange { first, last: first + (USERS_OF_A_NODE - 1) }
        };
        Self { range, by_vm: BTreeMap::new(), last: range.last }
    }

    /// The first free one after the last that was given, going round: one rests as long as it can before it is somebody else's.
    fn free(&self) -> Option<u32> {
        let UserRange { first, last } = self.range;
        let from = if (first..last).contains(&self.last) { self.last + 1 } else { first };
        let taken = |user: &u32| self.by_vm.values().any(|taken| taken == user);
        (from..=last).chain(first..from).find(|user| !taken(user))
    }
}

impl Containment {
    /// Looks for what there is, and takes it.
    #[must_use]
    pub fn open(users: Option<UserRange>, disk: DiskLimit, node: &NodeId, state_dir: &Path, driver: Contained) -> Self {
        let tag = node_tag(node, state_dir);
        let Contained::Yes { kvm } = driver else {
            let why = "its driver does not contain VMs".to_owned();
            let (users, cgroups, seccomp) = (Err(why.clone()), Err(why.clone()), Err(why));
            return Self { users, cgroups, landlock: 0, seccomp, leased: Mutex::default() };
        };
        let users = usable(users, kvm).and_then(|range| {
            let users = Users::of_node(range, tag);
            let given = give_away(state_dir, users.range.first);
            given.map_err(|error| format!("files in {} can't be given to them: {error}", state_dir.display()))?;
            Ok(Mutex::new(users))
        });
        let (cgroups, landlock) = (Cgroups::open(&hex::encode(&tag[..6]), disk, state_dir), landlock_version());
        Self { users, cgroups, landlock, seccomp: seccomp(), leased: Mutex::default() }
    }

    /// In a line, for people; and whether all of it is there.
    #[must_use]
    pub fn describe(&self) -> (bool, String) {
        let users = match &self.users {
            Ok(users) => Ok(lock(users).range),
            Err(why) => Err(why.as_str()),
        };
        let limited = self.cgroups.as_ref().is_ok_and(Cgroups::limits_all);
        let cgroups = match &self.cgroups {
            Ok(cgroups) => Ok(cgroups.describe()),
            Err(why) => Err(why.as_str()),
        };
        let seccomp = self.seccomp.as_ref().copied().map_err(String::as_str);
        let whole = users.is_ok() && limited && self.landlock > 0 && seccomp.is_ok();
        (whole, in_words(users, cgroups, self.landlock, seccomp))
    }

    /// Keeps a user for a VM, and names its cgroup. Nothing is made yet: first it must be on disk.
    ///
    /// # Errors
    /// All users are taken.
    pub fn lease(&self, vm_id: VmId) -> Result<Place, Error> {
        let cgroup = self.cgroup(vm_id);
        let Ok(users) = &self.users else {
            lock(&self.leased).insert(vm_id);
            return Ok(Place { user: None, cgroup });
        };
        let mut users = lock(users);
        let user = users.free().ok_or_else(|| {
            let message = format!("all users of {} are taken (firecracker.vm_uids)", users.range);
            Error::new(Reason::Overloaded, message).with("limit", users.by_vm.len())
        })?;
        users.last = user;
        users.by_vm.insert(vm_id, user);
        lock(&self.leased).insert(vm_id);
        Ok(Place { user: Some(user), cgroup })
    }

    /// A VM of an earlier vmhost has this one.
    pub(crate) fn restore(&self, vm_id: VmId, place: &Place) {
        lock(&self.leased).insert(vm_id);
        if let (Ok(users), Some(user)) = (&self.users, place.user) {
            let mut users = lock(users);
            if (users.range.first..=users.range.last).contains(&user) {
                // What was given out before is not given to others first thing.
                users.last = users.last.max(user);
            }
            users.by_vm.insert(vm_id, user);
        }
    }

    /// A VM's record is gone, and so are its processes.
    pub fn give_back(&self, vm_id: VmId) {
        lock(&self.leased).remove(&vm_id);
        if let Ok(users) = &self.users {
            lock(users).by_vm.remove(&vm_id);
        }
    }

    /// Whether this is a VM's, or a template's that is being made.
    pub(crate) fn has_leased(&self, vm_id: VmId) -> bool {
        lock(&self.leased).contains(&vm_id)
    }

    /// Where a VM's cgroup is, if VMs have one.
    pub(crate) fn cgroup(&self, vm_id: VmId) -> Option<PathBuf> {
        Some(self.cgroups.as_ref().ok()?.of(vm_id))
    }

    /// What each VM may use of its disk, if that is limited.
    #[must_use]
    pub fn io_max(&self) -> Option<IoMax> {
        self.cgroups.as_ref().ok()?.io_max()
    }

    /// The cgroups of VMs that are there.
    ///
    /// # Errors
    /// They can't be listed.
    pub fn cgroups(&self) -> io::Result<Vec<(VmId, PathBuf)>> {
        self.cgroups.as_ref().map_or(Ok(Vec::new()), Cgroups::list)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What there would be, without making anything: whether all of it, and in a line.
pub(crate) fn look(users: Option<UserRange>, kvm: bool) -> (bool, String) {
    let users = usable(users, kvm);
    let (controllers, landlock, seccomp) = (Cgroups::look(), landlock_version(), seccomp());
    let limited = controllers.as_ref().is_ok_and(Cgroups::is_all);
    let whole = users.is_ok() && limited && landlock > 0 && seccomp.is_ok();
    let cgroups = controllers.as_ref().map(|there| format!("cgroups ({})", Cgroups::in_words(there)));
    let (users, seccomp) = (users.as_ref().copied(), seccomp.as_ref().copied());
    let why = String::as_str;
    (whole, in_words(users.map_err(why), cgroups.map_err(why), landlock, seccomp.map_err(why)))
}

fn in_words(
    users: Result<UserRange, &str>,
    cgroups: Result<String, &str>,
    landlock: u32,
    seccomp: Result<(), &str>,
) -> String {
    let users = users.map_or_else(|why| format!("no users of their own: {why}"), |range| format!("users {range}"));
    let cgroups = cgroups.unwrap_or_else(|why| format!("no cgroups: {why}"));
    let landlock = match landlock {
        0 => "no Landlock (Linux 5.13 has it)".to_owned(),
        version => format!("Landlock {version}"),
    };
    let seccomp = seccomp.map_or_else(|why| format!("no seccomp: {why}"), |()| "seccomp".to_owned());
    format!("{users}; {cgroups}; {landlock}; {seccomp}; no capabilities, no new privileges")
}

fn usable(users: Option<UserRange>, kvm: bool) -> Result<UserRange, String> {
    let range = users.ok_or("firecracker.vm_uids is none")?;
    may_change_user(range, kvm).map(|()| range)
}

/// Whether a file in this directory can be given to a user, tried on one.
fn give_away(state_dir: &Path, user: u32) -> io::Result<()> {
    let probe = state_dir.join(PROBE);
    std::fs::write(&probe, "")?;
    let given = lchown(&probe, Some(user), Some(user));
    std::fs::remove_file(&probe)?;
    given
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn users(first: u32, last: u32, tag: [u8; 32]) -> Users {
        Users::of_node(UserRange { first, last }, tag)
    }

    #[test]
    fn a_large_range_is_shared_out_among_nodes_and_a_small_one_is_a_nodes_own() {
        let UserRange { first, last } = UserRange::UNUSED;
        let shares: Vec<UserRange> = (0..4).map(|node| users(first, last, [node * 85; 32]).range).collect();
        for share in &shares {
            assert!(share.first >= first && share.last <= last, "{share}");
            assert_eq!(share.last - share.first, USERS_OF_A_NODE - 1);
            assert_eq!(shares.iter().filter(|other| other.first <= share.last && share.first <= other.last).count(), 1);
        }
        let small = users(100_000, 100_000 + 2 * USERS_OF_A_NODE - 1, [255; 32]).range;
        assert_eq!(small, UserRange { first: 100_000, last: 100_000 + 2 * USERS_OF_A_NODE - 1 });
    }

    #[test]
    fn what_is_missing_is_said() {
        let range = UserRange { first: 100_000, last: 165_535 };
        let whole = in_words(Ok(range), Ok("cgroups in /c (limits: cpu)".to_owned()), 6, Ok(()));
        insta::assert_snapshot!(whole, @"users 100000-165535; cgroups in /c (limits: cpu); Landlock 6; seccomp; no capabilities, no new privileges");
        let reduced = in_words(Err("firecracker.vm_uids is none"), Err("nowhere"), 0, Err("not here"));
        insta::assert_snapshot!(reduced, @"no users of their own: firecracker.vm_uids is none; no cgroups: nowhere; no Landlock (Linux 5.13 has it); no seccomp: not here; no capabilities, no new privileges");
    }

    #[test]
    fn a_driver_that_contains_nothing_leases_nothing() {
        let node = NodeId::parse("", "node-1").expect("a name");
        let (users, disk) = (Some(UserRange::UNUSED), DiskLimit::default());
        let containment = Containment::open(users, disk, &node, Path::new("/nowhere"), Contained::No);
        assert_eq!(containment.lease(VmId::random()).expect("nothing to lease"), Place::default());
        assert_eq!(containment.cgroups().expect("none"), []);
    }

    proptest! {
        #[test]
        fn every_user_is_given_once_and_rests_as_long_as_it_can(size in 1_u32..40, given in 1_usize..80) {
            let mut users = users(1000, 1000 + size - 1, [0; 32]);
            let mut seen = Vec::new();
            for _ in 0..size {
                let user = users.free().expect("one is free");
                prop_assert!((1000..1000 + size).contains(&user) && !seen.contains(&user));
                seen.push(user);
                users.last = user;
                users.by_vm.insert(VmId::random(), user);
            }
            prop_assert_eq!(users.free(), None);
            users.by_vm.clear();
            for number in 0..given {
                let user = users.free().expect("all are free");
                prop_assert_eq!(user, seen[number % seen.len()]);
                users.last = user;
            }
        }
    }
}
