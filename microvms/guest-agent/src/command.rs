//! From a job's spec to a running process, or to a sentence that says why there is none.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use blixard::{
    id::VmId,
    job::{JobInput, JobSpec},
};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::{admission::AttemptId, image::ImageDefaults, processes::Pid};

/// Where commands are looked for when the job names no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The size pipes are grown to: what Linux allows without privileges. Fewer switches between command and agent.
pub(crate) const PIPE_BYTES: usize = 1024 * 1024;

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Running {
    /// Its process, which leads its own process group.
    pub(crate) pid: Pid,
    /// The other end of its standard input, when there is something to read.
    pub(crate) stdin: Option<OwnedFd>,
    /// The other end of its standard output.
    pub(crate) stdout: OwnedFd,
    /// The other end of its standard error.
    pub(crate) stderr: OwnedFd,
}

/// Where jobs run when neither they nor their image say.
const DEFAULT_DIRECTORY: &str = "/";

/// Starts a job's command: stdin is a pipe or, when it gets nothing, `/dev/null`; the environment is the guest's own, the
/// image's, the job's, its secrets, and the names of VM, job and attempt.
///
/// The command gets a process group rather than a session of its own: that leaves the standard library its fast path
/// (vfork), and the agent, which leads a session without a terminal, finds strays by descent, not by session.
///
/// # Errors
/// Why it could not be started, for people.
pub(crate) fn spawn(
    spec: &JobSpec,
    input: &JobInput,
    image: &ImageDefaults,
    vm_id: VmId,
    id: AttemptId,
) -> Result<Running, String> {
    let env = environment(spec, input, image, vm_id, id);
    let working_dir = match spec.working_dir.as_str() {
        "" => image.working_dir.as_deref().unwrap_or(DEFAULT_DIRECTORY),
        own => own,
    };
    let program = resolve(spec, working_dir, &env)?;
    let name = spec.command.first().map_or("", String::as_str);
    let no_pipe = |error: io::Error| format!("cannot make a pipe: {error}");
    let (stdout, stdout_writer) = pipe().map_err(no_pipe)?;
    let (stderr, stderr_writer) = pipe().map_err(no_pipe)?;
    let mut command = Command::new(&program);
    command.arg0(name).args(spec.command.iter().skip(1)).env_clear().envs(&env).process_group(0);
    command.stdout(stdout_writer).stderr(stderr_writer);
    let stdin = if input.stdin.is_empty() {
        command.stdin(Stdio::null());
        None
    } else {
        let (reader, writer) = pipe().map_err(no_pipe)?;
        command.stdin(reader);
        Some(writer)
    };
    // Not asked for where it is so already: in a static program a change of directory costs the fast path.
    if std::env::current_dir().ok().as_deref() != Some(Path::new(working_dir)) {
        command.current_dir(working_dir);
    }
    let child = command.spawn().map_err(|error| spawn_error(&program, working_dir, &error))?;
    // The other ends of the pipes must not stay open here, or they would never end.
    drop(command);
    // The reaper waits for every child, so nothing may wait through this handle.
    let pid = Pid::try_from(child.id()).map_err(|_| format!("process id {} is out of range", child.id()))?;
    Ok(Running { pid, stdin, stdout, stderr })
}

fn environment(
    spec: &JobSpec,
    input: &JobInput,
    image: &ImageDefaults,
    vm_id: VmId,
    id: AttemptId,
) -> BTreeMap<String, String> {
    let mut env = BTreeMap::from([("PATH".to_owned(), DEFAULT_PATH.to_owned()), ("HOME".into(), "/root".into())]);
    env.extend(image.env.clone());
    env.extend(spec.env.clone());
    env.extend(input.secrets.clone());
    // Last, so that no job can hide: vmhost finds what a VM left behind by these.
    env.insert("BLIXARD_VM_ID".into(), vm_id.to_string());
    env.insert("BLIXARD_JOB_ID".into(), id.job_id.to_string());
    env.insert("BLIXARD_ATTEMPT".into(), id.number.to_string());
    if let Some(index) = spec.array_index {
        env.insert("BLIXARD_ARRAY_INDEX".into(), index.to_string());
    }
    env
}

/// The file to execute. A name with a slash is relative to the working directory, any other is looked up in the job's
/// own PATH, as a shell would.
fn resolve(spec: &JobSpec, working_dir: &str, env: &BTreeMap<String, String>) -> Result<PathBuf, String> {
    let name = spec.command.first().map_or("", String::as_str);
    let directory = Path::new(working_dir);
    if name.contains('/') {
        return Ok(directory.join(name));
    }
    let path = env.get("PATH").map_or("", String::as_str);
    let candidates = || path.split(':').map(|entry| directory.join(entry).join(name)).filter(|file| file.is_file());
    match candidates().find(|file| is_executable(file)).or_else(|| candidates().next()) {
        Some(file) => Ok(file),
        None => Err(format!("command not found: {name} (PATH={path})")),
    }
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}

/// The kernel has one ENOENT for four mistakes: say which one it was.
fn spawn_error(program: &Path, working_dir: &str, error: &io::Error) -> String {
    let program_name = program.display();
    match fs::metadata(working_dir) {
        Err(reason) => return format!("cannot use the working directory {working_dir}: {reason}"),
        Ok(metadata) if !metadata.is_dir() => return format!("the working directory {working_dir} is not a directory"),
        Ok(_) => {}
    }
    match (error.kind(), fs::metadata(program)) {
        (io::ErrorKind::NotFound, Err(_)) => format!("command not found: {program_name}"),
        (io::ErrorKind::NotFound, Ok(_)) => {
            format!("cannot run {program_name}: the interpreter or loader it names does not exist")
        }
        (io::ErrorKind::PermissionDenied, Ok(metadata)) if metadata.is_dir() => {
            format!("cannot run {program_name}: it is a directory")
        }
        (io::ErrorKind::PermissionDenied, Ok(_)) if !is_executable(program) => {
            format!("cannot run {program_name}: it is not executable")
        }
        _ => format!("cannot run {program_name}: {error}"),
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // Refused when this user holds many large pipes already; the normal size is only slower.
    let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
    Ok((reader, writer))
}
