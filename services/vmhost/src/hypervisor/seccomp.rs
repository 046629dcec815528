//! Which system calls no contained process may make, whatever filter it has of its own.
//!
//! A list of what is denied: what a hypervisor and its libraries call differs by version and machine, and most of it reaches only what its user,
//! its capabilities and Landlock let it. Denied is what those leave open: memory and queues that outlive whoever made them, namespaces, in which a
//! process has rights again, the modes of files that belong to its user, protocols that nobody here speaks, and parts of the kernel that
//! none of these programs needs.
//!
//! A filter is inherited over fork and exec and can't be taken off.

use std::{collections::BTreeMap, env::consts::ARCH, io, sync::OnceLock, thread};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};

/// Denied with EPERM, whatever their arguments.
const DENIED: &[i64] = &[
    // System V's and POSIX' means of talking to others: what is made stays when its maker has ended.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_shmdt,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semctl,
    libc::SYS_semtimedop,
    libc::SYS_msgget,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_msgctl,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    // Namespaces (`clone`: below).
    libc::SYS_unshare,
    libc::SYS_setns,
    // File systems.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    // Files, past the directories that lead to them.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Who may open a file, and what else is kept about it: where VMs have no users of their own, all of vmhost's files are theirs.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    REMOVEXATTRAT,
    FILE_SETATTR,
    libc::SYS_utimensat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    // The kernel's keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Programs in the kernel, and what looks into it or holds it up.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_fanotify_init,
    libc::SYS_syslog,
    libc::SYS_lookup_dcookie,
    // The machine.
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_nfsservctl,
    libc::SYS_vhangup,
];
/// Besides, what only this processor has.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[i64] = &[
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_kexec_file_load,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];
#[cfg(target_arch = "aarch64")]
const DENIED_HERE: &[i64] = &[KEXEC_FILE_LOAD];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const DENIED_HERE: &[i64] = &[];

/// Those that `libc` does not have everywhere yet. From number 424 on they are the same on all processors.
const FCHMODAT2: i64 = 452;
const SETXATTRAT: i64 = 463;
const REMOVEXATTRAT: i64 = 466;
const OPEN_TREE_ATTR: i64 = 467;
const FILE_SETATTR: i64 = 469;
#[cfg(target_arch = "aarch64")]
const KEXEC_FILE_LOAD: i64 = 294;

/// Denied to who does not use it: what is asked for there passes no filter.
const IO_URING: [i64; 3] = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
/// What `clone` may not make new.
const NAMESPACES: [u64; 7] = [
    libc::CLONE_NEWNS as u64,
    libc::CLONE_NEWCGROUP as u64,
    libc::CLONE_NEWUTS as u64,
    libc::CLONE_NEWIPC as u64,
    libc::CLONE_NEWUSER as u64,
    libc::CLONE_NEWPID as u64,
    libc::CLONE_NEWNET as u64,
];
/// The numbers of x86-64's other system calls (x32) begin here; to a filter they look like the same processor's.
const X32: u32 = 0x4000_0000;

/// What one kind of process may do that others may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Uses {
    /// Disks by io_uring.
    pub(super) io_uring: bool,
}

/// A filter that can be installed.
pub(super) struct Filter(BpfProgram);

impl Filter {
    /// For the calling thread, and what it starts from then on. For good.
    pub(super) fn install(&self) -> io::Result<()> {
        seccompiler::apply_filter(&self.0).map_err(io::Error::other)
    }
}

/// The filter of a process; `None` where the kernel has none.
pub(super) fn filter(uses: Uses) -> io::Result<Option<Filter>> {
    if seccomp().is_err() {
        return Ok(None);
    }
    Ok(Some(Filter(program(uses).map_err(io::Error::other)?)))
}

/// Whether this kernel lets a process filter its system calls; if not, why.
pub(crate) fn seccomp() -> Result<(), String> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let tried = || {
        let filter = Filter(program(Uses::default()).map_err(|error| error.to_string())?);
        // By a thread that ends with it.
        let installed = thread::Builder::new().name("seccomp".to_owned()).spawn(move || filter.install());
        let installed = installed.and_then(|thread| thread.join().map_err(|_| io::Error::other("it panicked"))?);
        installed.map_err(|error| error.to_string())
    };
    TRIED.get_or_init(tried).clone()
}

fn program(uses: Uses) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        DENIED.iter().chain(DENIED_HERE).map(|call| (*call, Vec::new())).collect();
    if !uses.io_uring {
        rules.extend(IO_URING.map(|call| (call, Vec::new())));
    }
    let (first, int) = (0, SeccompCmpArgLen::Dword);
    let mut flags = Vec::new();
    for flag in NAMESPACES {
        let has = SeccompCondition::new(first, int.clone(), SeccompCmpOp::MaskedEq(flag), flag)?;
        flags.push(SeccompRule::new(vec![has])?);
    }
    rules.insert(libc::SYS_clone, flags);
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let other = SeccompCondition::new(first, int.clone(), SeccompCmpOp::Ne, libc::AF_UNIX as u64)?;
        rules.insert(call, vec![SeccompRule::new(vec![other])?]);
    }
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    // It kills who makes a system call of another processor, as 64-bit programs can make 32-bit ones.
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, denied, ARCH.try_into()?)?;
    let filter: BpfProgram = filter.try_into()?;
    Ok(absent().into_iter().chain(filter).collect())
}

/// Answers what is to look as if the kernel had not got it: `clone3`, whose flags no filter sees (libraries then use `clone`), and x32. What follows it decides
/// about the rest.
fn absent() -> [sock_filter; 4] {
    let number = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let (at_least, equal) = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let step = |code: u32, k: u32, jt, jf| sock_filter { code: code as u16, jt, jf, k };
    [
        // At offset 0 of what it sees.
        step(number, 0, 0, 0),
        step(at_least, X32, 1, 0),
        step(equal, libc::SYS_clone3 as u32, 0, 1),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0, 0),
    ]
}

#[cfg(test)]
#[expect(unsafe_code, reason = "system calls that nobody makes have no safe wrapper")]
mod tests {
    use std::{
        env, fs,
        os::unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt as _,
        },
        path::Path,
        process::{Command, Output, Stdio},
    };

    use super::{
        super::confine::{Confinement, Files, spawn},
        *,
    };

    /// What a contained process is to try.
    const TRY: &str = "BLIXARD_TRY";

    /// This test, contained: the one below, in a process of its own.
    fn contained(what: &str, uses: Uses) -> Output {
        let mut command = Command::new(env::current_exe().expect("this test has a path"));
        let this = module_path!().split_once("::").expect("a crate").1;
        command.args([&format!("{this}::tries"), "--exact", "--ignored", "--nocapture"]).env(TRY, what);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let confinement =
            Confinement { user: None, reads: Vec::new(), files: Files::Any, longest_file: 1 << 20, threads: 64, uses };
        spawn(command, &confinement).expect("starts").wait_with_output().expect("ends")
    }

    fn passes(what: &str, uses: Uses) {
        let output = contained(what, uses);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && said.contains("1 passed"), "{what}: {}: {said}", output.status);
    }

    /// 0, or the error.
    fn call(number: i64, first: u64) -> i32 {
        // SAFETY: every pointer among the arguments is null or nothing, which the kernel refuses.
        let result = unsafe { libc::syscall(number, first, 0_u64, 0_u64, 0_u64, 0_u64, 0_u64) };
        if result < 0 { io::Error::last_os_error().raw_os_error().expect("an error") } else { 0 }
    }

    #[test]
    #[ignore = "what another test has a contained process do"]
    fn tries() {
        match env::var(TRY).as_deref() {
            Ok("calls") => try_calls(),
            Ok("io_uring") => assert_ne!(call(libc::SYS_io_uring_setup, 0), libc::EPERM),
            Ok("work") => do_ordinary_things(),
            #[cfg(target_arch = "x86_64")]
            Ok("other processor") => call_as_i386(),
            Ok(_) | Err(_) => {}
        }
    }

    fn try_calls() {
        let always = DENIED.iter().chain(DENIED_HERE).chain(&IO_URING).map(|call| (*call, 0));
        let clones = NAMESPACES.map(|flag| (libc::SYS_clone, flag | libc::SIGCHLD as u64));
        let families = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_ALG];
        let sockets = families.map(|family| (libc::SYS_socket, family as u64));
        let pairs = [(libc::SYS_socketpair, libc::AF_TIPC as u64)];
        for (number, first) in always.chain(clones).chain(sockets).chain(pairs) {
            assert_eq!(call(number, first), libc::EPERM, "system call {number}({first:#x})");
        }
        let x32 = i64::from(X32);
        for number in [libc::SYS_clone3, libc::SYS_shmget | x32, libc::SYS_getpid | x32] {
            assert_eq!(call(number, 0), libc::ENOSYS, "system call {number}");
        }
    }

    fn do_ordinary_things() {
        let dir = env::temp_dir().join(format!("blixard-{}", std::process::id()));
        fs::create_dir(&dir).expect("mkdir");
        let socket = dir.join("socket");
        let listener = UnixListener::bind(&socket).expect("binds");
        let connected = thread::spawn(move || UnixStream::connect(socket).map(drop));
        listener.accept().expect("accepts");
        connected.join().expect("a thread runs").expect("connects");
        let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).expect("there is memory");
        rustix::fs::ftruncate(memory, 4096).expect("grows");
        fs::write(dir.join("file"), "text").expect("writes");
        fs::remove_dir_all(&dir).expect("removes");
        let said = Command::new("/bin/sh").args(["-c", "echo $((6 * 7)) | cat"]).output().expect("a program runs");
        assert_eq!(said.stdout, b"42\n");
    }

    #[cfg(target_arch = "x86_64")]
    fn call_as_i386() {
        let mut result = 20;
        // SAFETY: getpid, by the door for 32-bit programs. It changes nothing but the register for its result.
        unsafe { std::arch::asm!("int 0x80", inout("eax") result) };
        panic!("it is process {result}");
    }

    /// Whether there are filters; what is missing is said where VMs are started, too.
    fn filters() -> bool {
        let there = seccomp();
        assert_eq!(there.is_ok(), Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(), "{there:?}");
        there.is_ok()
    }

    #[test]
    fn what_nobody_needs_is_denied_to_all_and_ordinary_things_are_not() {
        if !filters() {
            return eprintln!("SKIPPED: this kernel has no seccomp");
        }
        passes("calls", Uses::default());
        passes("work", Uses::default());
        passes("io_uring", Uses { io_uring: true });
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn system_calls_of_another_processor_are_no_way_around() {
        if !filters() {
            return eprintln!("SKIPPED: this kernel has no seccomp");
        }
        // The other signal: where the kernel has no such door.
        let signal = contained("other processor", Uses::default()).status.signal();
        assert!(matches!(signal, Some(libc::SIGSYS | libc::SIGSEGV)), "{signal:?}");
    }
}
