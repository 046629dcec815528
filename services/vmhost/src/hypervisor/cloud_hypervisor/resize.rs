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

/// How long a guest may take to let its vCPUs go: a second, and the rest for a loaded host.
const LET_GO_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks whether it has.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// What a machine can be given that is launched with this.
pub(super) fn most(shape: VmShape) -> VmShape {
    let memory_mib = (GROWTH * shape.memory_mib).min(MAX_MEMORY_MIB);
    let whole_steps = (memory_mib - shape.memory_mib) / MEMORY_STEP_MIB * MEMORY_STEP_MIB;
    VmShape { vcpus: (GROWTH * shape.vcpus).min(MAX_VCPUS), memory_mib: shape.memory_mib + whole_steps }
}

/// See [`super::super::Hypervisor::resize`].
pub(super) async fn resize(launch: &Launch, to: VmShape) -> Result<VmShape, ResizeError> {
    let unknown = |error: &dyn std::error::Error| ResizeError { problem: with_sources(error), has: None };
    let sockets = SocketDir::open(&own_dir(launch)).map_err(|error| unknown(&error))?;
    let api = Api::within(sockets, API_SOCKET);
    let mut has = api.info().await.map_err(|error| unknown(&error))?.shape();
    // One that its guest is still to let go would be counted now and go afterwards.
    let settled = have_vcpus(&api, has).await;
    settled.map_err(|problem| ResizeError { problem, has: None })?;
    let changed = change(&api, launch, &mut has, to).await;
    let limited = limit_again(launch, has, OVERHEAD_MIB).map_err(cgroup_problem);
    changed.and(limited).map_err(|problem| ResizeError { problem, has: Some(has) })?;
    Ok(has)
}

/// Changes one thing after the other, first what may fail; `has`: what has been done.
async fn change(api: &Api, launch: &Launch, has: &mut VmShape, to: VmShape) -> Result<(), String> {
    // Before it grows: what it has it must be able to take.
    limit_again(launch, has.max(to), OVERHEAD_MIB).map_err(cgroup_problem)?;
    if to.memory_mib > has.memory_mib {
        api.resize(&ResizeConfig::memory(to)).await.map_err(|error| with_sources(&error))?;
        has.memory_mib = to.memory_mib;
    }
    if to.vcpus != has.vcpus {
        api.resize(&ResizeConfig::vcpus(to)).await.map_err(|error| with_sources(&error))?;
        have_vcpus(api, to).await?;
        has.vcpus = to.vcpus;
    }
    Ok(())
}

/// Waits until the machine has as many vCPUs as it was told to have last.
async fn have_vcpus(api: &Api, shape: VmShape) -> Result<(), String> {
    let deadline = Instant::now() + LET_GO_PATIENCE;
    loop {
        match api.resize(&ResizeConfig::vcpus(shape)).await {
            Ok(()) => return Ok(()),
            Err(ApiError::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. }) if Instant::now() < deadline => {
                tokio::time::sleep(ASK_AGAIN_AFTER).await;
            }
            Err(ApiError::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. }) => {
                let seconds = LET_GO_PATIENCE.as_secs();
                return Err(format!("its guest does not let go of vCPUs that are taken from it (after {seconds} s)"));
            }
            Err(error) => return Err(with_sources(&error)),
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

    fn launch(dir: &Path) -> Launch {
        fs::create_dir(dir.join("run")).expect("mkdir");
        Launch {
            vm_id: VmId::random(),
            image: "default".to_owned(),
            vcpus: 2,
            memory_mib: 256,
            dir: dir.to_owned(),
            nic: None,
            user: None,
            io_max: None,
            cgroup: None,
            disks: vec![],
        }
    }

    /// A hypervisor whose VM has so much and that gives these answers, one after the other, to `vm.resize`; what it was asked.
    fn hypervisor(launch: &Launch, has: VmShape, answers: &[u16]) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(launch.dir.join("run").join(API_SOCKET)).expect("binds");
        let memory = u64::from(has.memory_mib) << 20;
        let info = format!(r#"{{"config":{{"cpus":{{"boot_vcpus":{}}},"memory":{{"size":{memory}}}}}}}"#, has.vcpus);
        let info = format!("200 OK\r\nContent-Length: {}\r\n\r\n{info}", info.len());
        let answers = answers.iter().map(|status| format!("{status} Told\r\nContent-Length: 0\r\n\r\n"));
        let answers: Vec<String> = [info].into_iter().chain(answers).collect();
        std::thread::spawn(move || {
            let asked = answers.into_iter().map(|answer| {
                let (mut stream, _) = listener.accept().expect("accepts");
                let request = receive(&stream).request;
                stream.write_all(format!("HTTP/1.1 {answer}").as_bytes()).expect("answers");
                request.split_once("\r\n\r\n").expect("a request").1.to_owned()
            });
            asked.skip(1).collect()
        })
    }

    fn vcpus(count: u32) -> String {
        format!(r#"{{"desired_vcpus":{count}}}"#)
    }

    #[tokio::test]
    async fn memory_comes_first_and_a_vcpu_that_is_taken_away_is_waited_for() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        let has = VmShape { vcpus: 2, memory_mib: 256 };
        // The guest of an earlier time lets go, memory comes, a vCPU is told to go, and goes at the third look.
        let asked = hypervisor(&launch, has, &[429, 204, 204, 204, 429, 429, 204]);
        let to = VmShape { vcpus: 1, memory_mib: 384 };
        assert_eq!(resize(&launch, to).await.expect("resizes"), to);
        let memory = format!(r#"{{"desired_ram":{}}}"#, 384 << 20);
        let [two, one] = [vcpus(2), vcpus(1)];
        assert_eq!(asked.join().expect("asked"), [&two, &two, &memory, &one, &one, &one, &one].map(Clone::clone));
    }

    #[tokio::test]
    async fn memory_that_came_when_nobody_looked_is_told_and_stays() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        let has = VmShape { vcpus: 2, memory_mib: 512 };
        let asked = hypervisor(&launch, has, &[204]);
        assert_eq!(resize(&launch, VmShape { memory_mib: 384, ..has }).await.expect("is so"), has);
        assert_eq!(asked.join().expect("asked"), [vcpus(2)]);
    }

    #[tokio::test]
    async fn what_was_done_before_something_failed_is_told() {
        let to = VmShape { vcpus: 3, memory_mib: 384 };
        let has = VmShape { vcpus: 2, memory_mib: 256 };
        for (answers, left) in
            [(&[500][..], None), (&[204, 500], Some(has)), (&[204, 204, 500], Some(VmShape { memory_mib: 384, ..has }))]
        {
            let dir = tempfile::tempdir().expect("tempdir");
            let launch = launch(dir.path());
            let asked = hypervisor(&launch, has, answers);
            let error = resize(&launch, to).await.expect_err("it fails");
            assert_eq!(error.has, left, "{error}");
            assert!(error.to_string().starts_with("vm.resize was refused with status 500"), "{error}");
            assert_eq!(asked.join().expect("asked").len(), answers.len());
        }
    }

    #[tokio::test]
    async fn a_machine_that_is_gone_or_leads_elsewhere_is_not_asked() {
        let dir = tempfile::tempdir().expect("tempdir");
        let launch = launch(dir.path());
        let other = dir.path().join("other");
        let listener = UnixListener::bind(&other).expect("binds");
        symlink(&other, dir.path().join("run").join(API_SOCKET)).expect("links");
        let error = resize(&launch, launch.shape()).await.expect_err("a link");
        assert!(error.to_string().contains("api is no socket") && error.has.is_none(), "{error}");
        listener.set_nonblocking(true).expect("sets");
        assert!(listener.accept().is_err(), "nobody came");
        fs::remove_dir_all(dir.path().join("run")).expect("removes");
        assert_eq!(resize(&launch, launch.shape()).await.expect_err("gone").has, None);
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
