//! Another shape for a machine that runs: `vm.resize`.
//!
//! vCPUs and memory come by ACPI. A vCPU that is taken away goes when the guest has let it go; until then the hypervisor answers 429 to
//! every other number, and says nothing of it otherwise. So the same number is asked for until it is taken. Memory comes in pieces of whole
//! 128 MiB, of which there may be eight, and stays.

use std::{io, time::Duration};

use blixard::{
    limits::{MAX_MEMORY_MIB, MAX_VCPUS},
    vm::VmShape,
};
use http::StatusCode;
use tokio::time::Instant;

use super::{
    super::{
        GROWTH, Launch, MEMORY_STEP_MIB, ResizeError,
        machine::{limit_again, own_dir},
        socket::SocketDir,
    },
    API_SOCKET, OVERHEAD_MIB,
    api::{Api, ApiError},
    config::ResizeConfig,
};
use crate::driver::with_sources;

/// How long a guest may take to let its vCPUs go: a second, and the rest for a loaded host. Twice this, for what it still had to let go
/// before, too, is less than a caller waits.
const LET_GO_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// What a machine can be given that is launched with this.
pub(super) fn most(shape: VmShape) -> VmShape {
    let memory_mib = (GROWTH * shape.memory_mib).min(MAX_MEMORY_MIB);
    let whole_steps = (memory_mib - shape.memory_mib) / MEMORY_STEP_MIB * MEMORY_STEP_MIB;
    VmShape { vcpus: (GROWTH * shape.vcpus).min(MAX_VCPUS), memory_mib: shape.memory_mib + whole_steps }
}

/// See [`super::super::Hypervisor::resize`].
pub(super) async fn resize(launch: &Launch, to: VmShape, room: VmShape) -> Result<VmShape, ResizeError> {
    resize_within(launch, to, room, LET_GO_PATIENCE).await
}

async fn resize_within(
    launch: &Launch,
    to: VmShape,
    room: VmShape,
    patience: Duration,
) -> Result<VmShape, ResizeError> {
    let unknown = |problem| ResizeError { problem, has: None, told: None };
    let sockets = SocketDir::open(&own_dir(launch)).map_err(|error| unknown(with_sources(&error)))?;
    // Held, for the hypervisor may have become hostile: no link of its is followed.
    let socket = sockets.hold(API_SOCKET).map_err(|error| unknown(with_sources(&error)))?;
    let api = Api::new(socket.path());
    let mut has = api.info().await.map_err(|error| unknown(with_sources(&error)))?.shape();
    // Limits follow from it: whoever is limited does not say how.
    believe(launch, has, room).map_err(unknown)?;
    let changed = change(&api, launch, &mut has, to, patience).await;
    let told = match changed {
        Err(Failure::Unknown(problem)) => return Err(unknown(problem)),
        Err(Failure::Keeps { told, .. }) => Some(told),
        Err(Failure::Refused(_)) | Ok(()) => None,
    };
    // While it keeps vCPUs it may run them.
    let vcpus = if told.is_some() { has.vcpus.max(to.vcpus) } else { has.vcpus };
    let limited = limit_again(launch, VmShape { vcpus, ..has }, OVERHEAD_MIB).map_err(cgroup_problem);
    let changed = changed.map_err(Failure::into_problem);
    changed.and(limited).map_err(|problem| ResizeError { problem, has: Some(has), told })?;
    Ok(has)
}

/// Whether the machine can have what its hypervisor, which its guest may have taken over, says that it has.
fn believe(launch: &Launch, has: VmShape, room: VmShape) -> Result<(), String> {
    let least = VmShape { vcpus: 1, ..launch.shape() };
    if has.max(least) == has && has.max(room) == room {
        return Ok(());
    }
    Err(format!("its hypervisor is not to be trusted: it says {has}, which is not within {least} and {room}"))
}

/// Why a machine has not all that it was to be given.
#[derive(Debug)]
enum Failure {
    /// It was not done.
    Refused(String),
    /// It was told to have so many vCPUs, and its guest keeps more: it may let them go at any time.
    Keeps { told: u32, problem: String },
    /// It may have been done, or be done later.
    Unknown(String),
}

impl Failure {
    fn into_problem(self) -> String {
        match self {
            Self::Refused(problem) | Self::Keeps { problem, .. } | Self::Unknown(problem) => problem,
        }
    }
}

/// A refusal alone tells that nothing was done.
impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        let problem = with_sources(&error);
        match error {
            ApiError::Refused { .. } => Self::Refused(problem),
            ApiError::Late { .. } | ApiError::Unreachable { .. } | ApiError::Nonsense { .. } => Self::Unknown(problem),
        }
    }
}

/// Changes one thing after the other, first what no guest can hold up; `has`: what has been done.
async fn change(api: &Api, launch: &Launch, has: &mut VmShape, to: VmShape, patience: Duration) -> Result<(), Failure> {
    // What it has may not be all yet: its guest may still have to let go of vCPUs.
    let open = |problem, told| Failure::Keeps { told, problem };
    // Before it grows: what it has it must be able to take.
    limit_again(launch, has.max(to), OVERHEAD_MIB).map_err(|error| open(cgroup_problem(error), has.vcpus))?;
    if to.memory_mib > has.memory_mib {
        let grown = api.resize(&ResizeConfig::memory(to)).await.map_err(Failure::from);
        grown.map_err(|failure| match failure {
            Failure::Refused(problem) => open(problem, has.vcpus),
            Failure::Keeps { .. } | Failure::Unknown(_) => failure,
        })?;
        has.memory_mib = to.memory_mib;
    }
    // One that its guest is still to let go would be counted now and go afterwards.
    have_vcpus(api, *has, patience).await?;
    if to.vcpus != has.vcpus {
        api.resize(&ResizeConfig::vcpus(to)).await?;
        have_vcpus(api, to, patience).await?;
        has.vcpus = to.vcpus;
    }
    Ok(())
}

/// Waits until the machine has as many vCPUs as it was told to have last.
async fn have_vcpus(api: &Api, shape: VmShape, patience: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let error = match api.resize(&ResizeConfig::vcpus(shape)).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error {
            ApiError::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. } if Instant::now() < deadline => {
                tokio::time::sleep(ASK_AGAIN_AFTER).await;
            }
            ApiError::Refused { status, .. } => {
                let problem = if status == StatusCode::TOO_MANY_REQUESTS {
                    format!(
                        "its guest does not let go of vCPUs that are taken from it (after {} s)",
                        patience.as_secs()
                    )
                } else {
                    with_sources(&error)
                };
                return Err(Failure::Keeps { told: shape.vcpus, problem });
            }
            ApiError::Late { .. } | ApiError::Unreachable { .. } | ApiError::Nonsense { .. } => {
                return Err(error.into());
            }
        }
    }
}

fn cgroup_problem(error: io::Error) -> String {
    format!("its cgroup's limits can't be changed: {error}")
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write as _,
        os::unix::{fs::symlink, net::UnixListener},
        path::Path,
        thread::JoinHandle,
    };

    use blixard::id::VmId;

    use super::{super::api_tests::receive, *};

    /// A launch whose cgroup is a directory like any other.
    fn launch(dir: &Path) -> Launch {
        fs::create_dir(dir.join("run")).expect("mkdir");
        let cgroup = dir.join("cgroup");
        fs::create_dir(&cgroup).expect("mkdir");
        for file in ["cpu.max", "memory.max", "io.max"] {
            fs::write(cgroup.join(file), "untouched").expect("writes");
        }
        Launch {
            vm_id: VmId::random(),
            image: "default".to_owned(),
            vcpus: 2,
            memory_mib: 256,
            dir: dir.to_owned(),
            nic: None,
            user: None,
            io_max: None,
            cgroup: Some(cgroup),
            disks: vec![],
        }
    }

    /// Its limits, as far as they were written: those for so many vCPUs and so much memory.
    fn limits(launch: &Launch) -> [String; 3] {
        let cgroup = launch.cgroup.as_ref().expect("it has one");
        ["cpu.max", "memory.max", "io.max"].map(|file| fs::read_to_string(cgroup.join(file)).expect("reads"))
    }

    fn limits_of(shape: VmShape) -> [String; 3] {
        let memory = u64::from(shape.memory_mib + shape.memory_mib / 128 + OVERHEAD_MIB) << 20;
        [format!("{} 100000", (shape.vcpus + 1) * 100_000), memory.to_string(), "untouched".to_owned()]
    }

    /// A hypervisor whose VM has so much and that gives these answers, one after the other, to `vm.resize`; what it was asked. 0: it hangs
    /// up.
    fn hypervisor(launch: &Launch, has: VmShape, answers: &[u16]) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(launch.dir.join("run").join(API_SOCKET)).expect("binds");
        let memory = u64::from(has.memory_mib) << 20;
        let info = format!(r#"{{"config":{{"cpus":{{"boot_vcpus":{}}},"memory":{{"size":{memory}}}}}}}"#, has.vcpus);
        let info = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{info}", info.len());
        let answers = answers.iter().map(|status| match status {
            0 => String::new(),
            _ => format!("HTTP/1.1 {status} Told\r\nContent-Length: 0\r\n\r\n"),
        });
        let answers: Vec<String> = [info].into_iter().chain(answers).collect();
        std::thread::spawn(move || {
            let asked = answers.into_iter().map(|answer| {
                let (mut stream, _) = listener.accept().expect("accepts");
                let request = receive(&stream).request;
                stream.write_all(answer.as_bytes()).expect("answers");
                request.split_once("\r\n\r\n").expect("a request").1.to_owned()
            });
            asked.skip(1).collect()
        })
    }

    fn vcpus(count: u32) -> String {
        format!(r#"{{"desired_vcpus":{count}}}"#)
    }

    fn memory(mib: u64) -> String {
        format!(r#"{{"desired_ram":{}}}"#, mib << 20)
    }

    const HAS: VmShape = VmShape { vcpus: 2, memory_mib: 256 };
    const ROOM: VmShape = VmShape { vcpus: 4, memory_mib: 512 };

    #[tokio::test]
    async fn memory_comes_first_and_a_vcpu_that_is_taken_away_is_waited_for() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        // Memory comes, the guest of an earlier time lets go, a vCPU is told to go, and goes at the third look.
        let asked = hypervisor(&launch, HAS, &[204, 429, 204, 204, 429, 429, 204]);
        let to = VmShape { vcpus: 1, memory_mib: 384 };
        assert_eq!(resize(&launch, to, ROOM).await.expect("resizes"), to);
        let (memory, [two, one]) = (memory(384), [vcpus(2), vcpus(1)]);
        assert_eq!(asked.join().expect("asked"), [&memory, &two, &two, &one, &one, &one, &one].map(Clone::clone));
        assert_eq!(limits(&launch), limits_of(to));
    }

    #[tokio::test]
    async fn memory_that_came_when_nobody_looked_is_told_and_stays() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        let has = VmShape { vcpus: 2, memory_mib: 512 };
        let asked = hypervisor(&launch, has, &[204]);
        assert_eq!(resize(&launch, VmShape { memory_mib: 384, ..has }, ROOM).await.expect("is so"), has);
        assert_eq!(asked.join().expect("asked"), [vcpus(2)]);
    }

    #[tokio::test]
    async fn what_was_done_before_something_was_refused_is_told() {
        let to = VmShape { vcpus: 3, memory_mib: 384 };
        let grown = VmShape { memory_mib: 384, ..HAS };
        // Before anybody has asked for them, nobody can tell whether the vCPUs are all let go.
        for (answers, has, told, limit) in [
            (&[500][..], HAS, Some(2), VmShape { vcpus: 3, ..HAS }),
            (&[204, 500], grown, Some(2), to),
            (&[204, 204, 500], grown, None, grown),
        ] {
            let dir = tempfile::tempdir().expect("tempdir");
            let launch = launch(dir.path());
            let asked = hypervisor(&launch, HAS, answers);
            let error = resize(&launch, to, ROOM).await.expect_err("it fails");
            assert_eq!((error.has, error.told), (Some(has), told), "{error}");
            assert!(error.to_string().starts_with("vm.resize was refused with status 500"), "{error}");
            assert_eq!(limits(&launch), limits_of(limit), "{answers:?}");
            assert_eq!(asked.join().expect("asked").len(), answers.len());
        }
    }

    #[tokio::test]
    async fn what_was_not_answered_may_be_done_yet_and_its_limits_stay() {
        let to = VmShape { vcpus: 1, memory_mib: 384 };
        for answers in [&[0][..], &[204, 0], &[204, 204, 0], &[204, 204, 204, 0]] {
            let dir = tempfile::tempdir().expect("tempdir");
            let launch = launch(dir.path());
            let asked = hypervisor(&launch, HAS, answers);
            let error = resize(&launch, to, ROOM).await.expect_err("it fails");
            assert_eq!((error.has, error.told), (None, None), "{error}");
            assert!(error.to_string().starts_with("vm.resize could not be made"), "{error}");
            assert_eq!(limits(&launch), limits_of(HAS.max(to)));
            assert_eq!(asked.join().expect("asked").len(), answers.len());
        }
    }

    #[tokio::test]
    async fn a_guest_that_keeps_its_vcpus_keeps_no_memory_away() {
        // It was told to let two go, before or now.
        for (told, to, answers) in [(2, 4, &[204, 429][..]), (4, 2, &[204, 204, 204, 429]), (2, 2, &[204, 429])] {
            let dir = tempfile::tempdir().expect("tempdir");
            let launch = launch(dir.path());
            let asked = hypervisor(&launch, VmShape { vcpus: told, ..HAS }, answers);
            let to = VmShape { vcpus: to, memory_mib: 384 };
            let error = resize_within(&launch, to, ROOM, Duration::ZERO).await.expect_err("it keeps them");
            assert_eq!((error.has, error.told), (Some(VmShape { vcpus: told, ..to }), Some(2)), "{error}");
            assert!(error.to_string().starts_with("its guest does not let go of vCPUs"), "{error}");
            assert_eq!(limits(&launch), limits_of(VmShape { vcpus: told.max(to.vcpus), ..to }));
            assert_eq!(asked.join().expect("asked").len(), answers.len());
        }
    }

    #[tokio::test]
    async fn a_hypervisor_does_not_say_what_its_limits_are() {
        let shape = |vcpus, memory_mib| VmShape { vcpus, memory_mib };
        for says in [shape(u32::MAX, 256), shape(5, 256), shape(0, 256), shape(2, 255), shape(2, 513)] {
            let dir = tempfile::tempdir().expect("tempdir");
            let launch = launch(dir.path());
            let asked = hypervisor(&launch, says, &[]);
            let error = resize(&launch, shape(1, 384), ROOM).await.expect_err("nobody believes it");
            assert_eq!((error.has, error.told), (None, None), "{error}");
            let words = "which is not within 1 vCPUs, 256 MiB and 4 vCPUs, 512 MiB";
            let words = format!("its hypervisor is not to be trusted: it says {says}, {words}");
            assert_eq!(error.to_string(), words);
            assert_eq!(limits(&launch), ["untouched"; 3]);
            assert_eq!(asked.join().expect("asked"), [""; 0]);
        }
    }

    #[tokio::test]
    async fn a_machine_that_is_gone_or_leads_elsewhere_is_not_asked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        let other = dir.path().join("other");
        let listener = UnixListener::bind(&other).expect("binds");
        symlink(&other, dir.path().join("run").join(API_SOCKET)).expect("links");
        let error = resize(&launch, launch.shape(), ROOM).await.expect_err("a link");
        assert!(error.to_string().contains("api is no socket") && error.has.is_none(), "{error}");
        listener.set_nonblocking(true).expect("sets");
        assert!(listener.accept().is_err(), "nobody came");
        fs::remove_dir_all(dir.path().join("run")).expect("removes");
        assert_eq!(resize(&launch, launch.shape(), ROOM).await.expect_err("gone").has, None);
    }

    #[test]
    fn a_machine_may_come_to_four_times_what_it_was_launched_with_in_whole_steps_of_memory() {
        let most = |vcpus, memory_mib| most(VmShape { vcpus, memory_mib });
        assert_eq!(most(2, 512), VmShape { vcpus: 8, memory_mib: 2048 });
        assert_eq!(most(1, 96), VmShape { vcpus: 4, memory_mib: 96 + 256 });
        assert_eq!(most(20, MAX_MEMORY_MIB), VmShape { vcpus: MAX_VCPUS, memory_mib: MAX_MEMORY_MIB });
        assert_eq!(most(64, MAX_MEMORY_MIB - 200).memory_mib, MAX_MEMORY_MIB - 72);
    }
}
