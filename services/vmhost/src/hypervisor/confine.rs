//! How the processes of a contained machine are started: with nothing but what they need.
//!
//! ```text
//!   vmhost ── a thread of its own ─ user, groups ─ no capabilities ─ no new privileges ─ Landlock ─ seccomp ─ spawn ─► hypervisor
//!                     └─ ends
//! ```
//! Credentials, `no_new_privs`, Landlock domains and seccomp filters belong to a *thread* on Linux, and a child inherits those of the thread that
//! started it. So there is no code between fork and exec, where hardly anything is safe: a thread gives up its rights, starts the process, and ends.
//! It must never be one that serves others afterwards.
//!
//! While that thread lives a process of the same user could try to get hold of it, and so of vmhost. The kernel lets it not: with its change
//! of user the whole process becomes undumpable, which is never undone, and may not be traced.
//!
//! This module must not know cgroups or what a hypervisor is.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use blixard::config::UserRange;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, Scope,
};
use rustix::{
    process::{Gid, Pid, Resource, Rlimit, Uid},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::seccomp::{self, Uses};

/// The newest Landlock that the rules are made for. What the kernel does not know of it is left out.
const LANDLOCK: ABI = ABI::V6;
/// How many files a process may have open: each connection to a guest is one.
const OPEN_FILES: u64 = 4096;
/// Where programs and libraries are. What is not there is left out.
const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store"];
/// What programs read besides: their data, and where their libraries are.
const PROGRAM_DATA: [&str; 2] = ["/usr/share", "/etc/ld.so.cache"];
const KVM: &str = "/dev/kvm";
/// Devices of which any process may have use.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/urandom", KVM];
/// What it takes to start processes as other users, and to look after them and their files then.
const RIGHTS: [(CapabilitySet, &str); 6] = [
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::KILL, "CAP_KILL"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
];

/// What a process is started with.
#[derive(Debug, Clone)]
pub(super) struct Confinement {
    /// Its user, and its group of the same number; `None`: vmhost's.
    pub(super) user: Option<u32>,
    /// Files of others that it needs to read.
    pub(super) reads: Vec<PathBuf>,
    /// Which files it may open.
    pub(super) files: Files,
    /// The longest file that it may write, in bytes. Memory that is shared with another process is a file, too.
    pub(super) longest_file: u64,
    /// How many threads its user may have: the same as its cgroup, where that has no say.
    pub(super) threads: u64,
    /// What its filter of system calls leaves open to it.
    pub(super) uses: Uses,
}

/// Which files a process may open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Files {
    /// Its program, libraries, and what it needs to read; sockets in this directory, which it runs in.
    Own(PathBuf),
    /// It restricts itself.
    Any,
}

/// Starts the process.
pub(super) fn spawn(mut command: Command, confinement: &Confinement) -> io::Result<Child> {
    let program = PathBuf::from(command.get_program());
    let ruleset = ruleset(&confinement.files, &program, &confinement.reads).map_err(io::Error::other)?;
    let filter = seccomp::filter(confinement.uses)?;
    let confinement = confinement.clone();
    let thread = std::thread::Builder::new().name("launch".to_owned()).spawn(move || {
        confinement.drop_rights()?;
        confinement.reads.iter().try_for_each(|path| readable(path, confinement.user))?;
        // Sets `no_new_privs`, too, but only where there is Landlock.
        set_no_new_privs(true)?;
        ruleset.restrict_self().map_err(io::Error::other)?;
        if let Some(filter) = filter {
            filter.install()?;
        }
        let child = command.spawn().map_err(|error| explained(&program, error, confinement.user))?;
        confinement.limit(&child)?;
        Ok(child)
    })?;
    thread.join().map_err(|_| io::Error::other("the thread that starts processes panicked"))?
}

impl Confinement {
    /// Of the calling thread.
    fn drop_rights(&self) -> io::Result<()> {
        if let Some(user) = self.user {
            let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
            let groups: Vec<Gid> = groups().into_iter().map(Gid::from_raw).collect();
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            forget_capabilities()?;
            set_thread_res_uid(uid, uid, uid)?;
        } else {
            forget_capabilities()?;
        }
        let none = CapabilitySet::empty();
        clear_ambient_capability_set()?;
        Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
    }

    /// Of a process that the calling thread has started: it may, for their user is the same.
    fn limit(&self, child: &Child) -> io::Result<()> {
        let mut limits =
            vec![(Resource::Core, 0), (Resource::Nofile, OPEN_FILES), (Resource::Fsize, self.longest_file)];
        if self.user.is_some() {
            // Of vmhost's own user there may be any number of processes.
            limits.push((Resource::Nproc, self.threads));
        }
        for (resource, most) in limits {
            // Never more than vmhost's own, which nobody may exceed.
            let most = rustix::process::getrlimit(resource).maximum.map_or(most, |own| own.min(most));
            let limit = Rlimit { current: Some(most), maximum: Some(most) };
            match rustix::process::prlimit(Pid::from_raw(child.id().cast_signed()), resource, limit) {
                // It has ended already, and whoever waits for it learns how.
                Ok(_) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Takes from the bounding set what no program is to get from a file. It takes CAP_SETPCAP; without that nobody else gets any either, for
/// there are no new privileges.
fn forget_capabilities() -> io::Result<()> {
    if !capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // The kernel knows no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Made while every path can still be reached.
fn ruleset(files: &Files, program: &Path, reads: &[PathBuf]) -> Result<RulesetCreated, RulesetError> {
    // Its one way to others: no TCP, no abstract sockets, no signals but among its own.
    let ruleset = Ruleset::default().handle_access(AccessNet::from_all(LANDLOCK))?.scope(Scope::from_all(LANDLOCK))?;
    let Files::Own(dir) = files else { return ruleset.create() };
    let mut ruleset = ruleset.handle_access(AccessFs::from_all(LANDLOCK))?.create()?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::ReadFile | AccessFs::WriteFile;
    let mut allow = |path: &Path, access: BitFlags<AccessFs>| -> Result<(), RulesetError> {
        // What is not there needs no rule.
        let Ok(opened) = PathFd::new(path) else { return Ok(()) };
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
        (&mut ruleset).add_rule(PathBeneath::new(opened, access)).map(drop)
    };
    for path in LIBRARIES {
        allow(path.as_ref(), read | AccessFs::Execute)?;
    }
    for path in PROGRAM_DATA {
        allow(path.as_ref(), read)?;
    }
    // Beside a program that is not the system's own is what it needs, as in /opt/qemu/{bin,lib,share}.
    if let Some(prefix) = program.ancestors().nth(2) {
        allow(&prefix.join("lib"), read | AccessFs::Execute)?;
        allow(&prefix.join("share"), read)?;
    }
    allow(program, AccessFs::ReadFile | AccessFs::Execute)?;
    for path in DEVICES {
        allow(path.as_ref(), write | AccessFs::IoctlDev)?;
    }
    for path in reads {
        allow(path, AccessFs::ReadFile.into())?;
    }
    // Sockets, and no other file: it can't fill the disk, but with sockets' names.
    allow(dir, write | AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile)?;
    Ok(ruleset)
}

/// Which Landlock the kernel has, of those that there are rules for here: 0 is none.
pub(crate) fn landlock_version() -> u32 {
    let strict = || Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let files = |abi| strict().handle_access(AccessFs::from_all(abi)).and_then(Ruleset::create).is_ok();
    let net = strict().handle_access(AccessNet::from_all(ABI::V4)).and_then(Ruleset::create).is_ok();
    let scopes = strict().scope(Scope::from_all(ABI::V6)).and_then(Ruleset::create).is_ok();
    let known = [files(ABI::V1), files(ABI::V2), files(ABI::V3), net, files(ABI::V5), scopes];
    (1..).zip(known).take_while(|(_, known)| *known).last().map_or(0, |(version, _)| version)
}

/// What a VM's user is a member of besides its own group.
fn groups() -> BTreeSet<u32> {
    group_of(KVM).into_iter().collect()
}

/// A group, other than root's, that may use a device where not everybody may.
fn group_of(device: &str) -> Option<u32> {
    let device = fs::metadata(device).ok()?;
    (device.mode() & 0o006 != 0o006 && device.mode() & 0o060 == 0o060 && device.gid() != 0).then_some(device.gid())
}

/// Whether processes can be started as these users here; if not, why. `kvm`: they need KVM.
pub(crate) fn may_change_user(users: UserRange, kvm: bool) -> Result<(), String> {
    let has = capabilities(None).map(|sets| sets.effective).unwrap_or(CapabilitySet::empty());
    let missing: Vec<&str> = RIGHTS.iter().filter(|(right, _)| !has.contains(*right)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(format!("this process lacks {}", missing.join(", ")));
    }
    for map in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        let text = fs::read_to_string(map).map_err(|error| format!("{map}: {error}"))?;
        if !maps(&text, users) {
            return Err(format!("its user namespace has not all of the ids {users}"));
        }
    }
    let for_all = fs::metadata(KVM).is_ok_and(|device| device.mode() & 0o006 == 0o006);
    if kvm && !for_all && group_of(KVM).is_none() {
        return Err(format!("{KVM} is for root alone (chgrp kvm {KVM} && chmod 660 {KVM})"));
    }
    Ok(())
}

/// Whether a namespace has all of these ids.
fn maps(map: &str, users: UserRange) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (Some(Ok(start)), Some(Ok(count))) = (fields.next(), fields.nth(1)) else { return false };
        start <= users.first.into() && u64::from(users.last) < start + count
    })
}

/// A file of somebody else's that a process needs.
fn readable(path: &Path, user: Option<u32>) -> io::Result<()> {
    fs::File::open(path).map(drop).map_err(|error| explained(path, error, user))
}

/// An error, with what is in the way when a user may not reach a path.
fn explained(path: &Path, error: io::Error, user: Option<u32>) -> io::Error {
    let (io::ErrorKind::PermissionDenied, Some(user)) = (error.kind(), user) else { return error };
    let problem = Unreachable { path: path.to_owned(), user };
    io::Error::new(io::ErrorKind::PermissionDenied, problem)
}

/// What a VM's user may not reach.
#[derive(Debug)]
struct Unreachable {
    path: PathBuf,
    user: u32,
}

impl std::error::Error for Unreachable {}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, user } = self;
        write!(f, "{} is not open to user {user}, as which the VM runs", path.display())?;
        match closed_to_others(path) {
            Some(closed) if closed == *path => write!(f, " (chmod o+r {}", closed.display())?,
            Some(closed) => write!(f, ", for {} is closed (chmod o+x {0}", closed.display())?,
            None => return Ok(()),
        }
        write!(f, ", or firecracker.vm_uids = \"none\")")
    }
}

/// What keeps other users from reading a file: the first directory above it that they may not pass, or itself.
pub(super) fn closed_to_others(path: &Path) -> Option<PathBuf> {
    let mode = |path: &Path| fs::metadata(path).map(|metadata| metadata.mode());
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    let closed = above.into_iter().find(|dir| mode(dir).is_ok_and(|mode| mode & 0o001 == 0));
    closed.or_else(|| mode(path).is_ok_and(|mode| mode & 0o004 == 0).then_some(path)).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, process::Stdio};

    use super::*;

    fn confinement(user: Option<u32>, files: Files) -> Confinement {
        Confinement { user, reads: Vec::new(), files, longest_file: 1 << 20, threads: 64, uses: Uses::default() }
    }

    /// What a shell says that is started so; it begins once it has been started whole.
    fn says(script: &str, confinement: &Confinement) -> String {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("read -r begin; {script}")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Waiting for it closes its standard input.
        let output = spawn(command, confinement).expect("starts").wait_with_output().expect("ends");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).split_whitespace().collect()
    }

    const USER: u32 = 1_879_048_192;

    /// Only who may change users can try it.
    fn as_other() -> bool {
        match may_change_user(UserRange { first: USER, last: USER }, false) {
            Ok(()) => true,
            Err(problem) => {
                eprintln!("SKIPPED: no process is started as another user: {problem}");
                false
            }
        }
    }

    #[test]
    fn a_process_starts_without_any_privilege_and_this_one_keeps_its_own() {
        let own = || fs::read_to_string("/proc/thread-self/status").expect("reads");
        let before = own();
        for user in [None, as_other().then_some(USER)] {
            // Nothing in between that could change them: the shell itself reads.
            let script = "while read -r line; do echo \"$line\"; done < /proc/self/status; ulimit -c; ulimit -n";
            let status = says(script, &confinement(user, Files::Any));
            let own =
                before.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a user").split_whitespace().next();
            let expected = user.map_or_else(|| own.expect("a user").to_owned(), |user| user.to_string());
            assert_eq!(field(&status, "Uid"), [expected.as_str(); 4]);
            if user.is_some() {
                assert_eq!(field(&status, "Gid"), [expected.as_str(); 4]);
                let groups: Vec<String> = groups().iter().map(ToString::to_string).collect();
                assert_eq!(field(&status, "Groups"), groups);
            }
            assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                let has = field(&status, set);
                let bounded = set == "CapBnd"
                    && capabilities(None).is_ok_and(|sets| !sets.effective.contains(CapabilitySet::SETPCAP));
                assert!(bounded || has == ["0000000000000000"], "{set}: {has:?}");
            }
            let limits: Vec<&str> = status.lines().rev().take(2).collect();
            assert_eq!(limits[1], "0", "core");
            assert!(limits[0].parse::<u64>().is_ok_and(|files| files <= OPEN_FILES), "{limits:?}");
        }
        let same = ["Uid", "Gid", "Groups", "NoNewPrivs", "CapEff", "CapPrm", "CapBnd"];
        for name in same {
            assert_eq!(field(&before, name), field(&own(), name), "{name} of the test's own thread");
        }
    }

    #[test]
    fn a_confined_process_opens_what_it_needs_and_nothing_else() {
        if landlock_version() == 0 {
            return eprintln!("SKIPPED: this kernel has no Landlock");
        }
        let root = tempfile::tempdir().expect("tempdir");
        let (own, image, secret) = (root.path().join("own"), root.path().join("image"), root.path().join("secret"));
        fs::create_dir(&own).expect("mkdir");
        fs::write(&image, "an image").expect("writes");
        fs::write(&secret, "a secret").expect("writes");
        let confinement = Confinement { reads: vec![image.clone()], ..confinement(None, Files::Own(own.clone())) };
        let read = |path: &Path| says(&format!("read -r line < '{}'; echo \"$line\"", path.display()), &confinement);
        assert_eq!(read(&image), "an image\n");
        assert!(read(&secret).contains("Permission denied"), "{}", read(&secret));
        let write = |path: &Path| says(&format!("echo x > '{}'; echo done", path.display()), &confinement);
        assert!(write(&image).contains("Permission denied"));
        assert!(write(&own.join("file")).contains("Permission denied"), "only sockets are made there");
        // No other program, however it is permitted.
        let other = says("/usr/bin/env true; echo $?", &confinement);
        assert!(other.contains("Permission denied") && other.contains("126\n"), "{other}");
        assert!(says("kill -0 1 && echo reached", &confinement).contains("not permitted") || landlock_version() < 6);
    }

    #[test]
    fn what_a_vms_user_may_not_reach_is_named_with_what_is_in_the_way() {
        let root = tempfile::tempdir().expect("tempdir");
        let image = root.path().join("images/vmlinux");
        fs::create_dir(root.path().join("images")).expect("mkdir");
        fs::write(&image, "kernel").expect("writes");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).expect("chmod");
        assert_eq!(closed_to_others(&image).as_deref(), Some(root.path()));
        if as_other() {
            let confinement = Confinement { reads: vec![image.clone()], ..confinement(Some(USER), Files::Any) };
            let error = spawn(Command::new("/bin/true"), &confinement).expect_err("refused").to_string();
            let (image, closed) = (image.display(), root.path().display());
            let expected = format!(
                "{image} is not open to user {USER}, as which the VM runs, for {closed} is closed (chmod o+x {closed}, or \
                 firecracker.vm_uids = \"none\")"
            );
            assert_eq!(error, expected);
        }
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).expect("chmod");
        assert_eq!(closed_to_others(&image), Some(image.clone()));
        fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).expect("chmod");
        assert_eq!(closed_to_others(&image), None);
    }

    #[test]
    fn a_namespace_has_the_ids_that_its_map_says() {
        let maps = |map, first, last| maps(map, UserRange { first, last });
        let whole = "         0          0 4294967295\n";
        assert!(maps(whole, USER, USER + 16_383));
        let rootless = "0 1000 1\n1 100000 65536\n";
        assert!(maps(rootless, 1000, 2000));
        assert!(!maps(rootless, 65_000, 65_537));
        assert!(!maps(rootless, USER, USER));
        assert!(!maps("", 1000, 1000));
    }
}
