//! What nobody should ask for gets an error that says what is wrong, for people, for programs and at start.

use std::process::Stdio;

use blixard::{
    error::{Error, Reason},
    id::JobId,
    pb::{
        common::v1 as common,
        scheduler::v1::{self as pb, scheduler_service_client::SchedulerServiceClient},
    },
};

use crate::{
    plane::{self, Plane},
    support::{code, mvm_ci, output, stdout, tempdir, text, wait_exit, write},
};

#[test]
fn each_request_that_cannot_be_served_has_its_own_reason() {
    let plane = Plane::start();
    let nobody = "00000000-0000-4000-8000-000000000000";
    let gone = plane.json(["vm", "create", "--wait"])["id"].as_str().expect("an id").to_owned();
    stdout(plane.cli(["vm", "stop", "--wait", &gone]));
    let alive = plane.json(["vm", "create", "--wait"])["id"].as_str().expect("an id").to_owned();
    let long = "x".repeat(100_000);
    let cases: &[(&[&str], &str)] = &[
        (&["run", "--image", "nope", "--", "true"], "IMAGE_NOT_FOUND: spec.image: no node has the image \"nope\""),
        (
            &["run", "--node-label", "gpu=yes", "--", "true"],
            "NODE_NOT_FOUND: spec.node_labels: no node that would do has the label gpu=yes",
        ),
        (&["run", "--vcpus", "0", "--", "true"], "INVALID_FIELD: spec.vcpus: \"0\" is not allowed: 1 to 64"),
        (&["run", "--memory", "1048576", "--", "true"], "EXCEEDS_CAPACITY: spec.memory_mib: \"1048576\""),
        (&["run", "--", &long, &long, &long], "INVALID_FIELD: spec.command: \"300000\" is not allowed: at most 262144"),
        (&["run", "--vm", "7", "--", "true"], "INVALID_FIELD: --vm: \"7\" is not allowed: a UUID"),
        (&["run", "--vm", nobody, "--", "true"], "VM_NOT_FOUND: "),
        (&["run", "--vm", &gone, "--", "true"], "VM_NOT_ACCEPTING: "),
        (&["run", "--workdir", "tmp", "--", "true"], "INVALID_FIELD: spec.working_dir: "),
        (&["run", "--priority", "1001", "--", "true"], "INVALID_FIELD: spec.priority: "),
        (&["vm", "create", "--image", "nope"], "IMAGE_NOT_FOUND: "),
        (&["vm", "create", "--vcpus", "0"], "INVALID_FIELD: config.vcpus: \"0\""),
        (&["vm", "get", nobody], "VM_NOT_FOUND: "),
        (&["vm", "stop", nobody], "VM_NOT_FOUND: "),
        (&["vm", "usage", nobody], "VM_NOT_FOUND: "),
        (&["vm", "usage", &gone], "VM_NOT_FOUND: "),
        (&["vm", "resize", nobody, "--vcpus", "4"], "VM_NOT_FOUND: "),
        (&["vm", "resize", &gone, "--vcpus", "4"], "VM_NOT_ACCEPTING: "),
        (&["vm", "resize", &alive, "--vcpus", "65"], "INVALID_FIELD: vcpus: \"65\" is not allowed: 1 to 64"),
        (
            &["vm", "resize", &alive, "--memory", "640"],
            "EXCEEDS_CAPACITY: memory_mib: \"640\" is not allowed: 512, which it has: the driver \"process\" can't",
        ),
        (&["vm", "purge", "--state", "Ready"], "INVALID_FIELD: "),
        (&["job", "get", nobody], "JOB_NOT_FOUND: "),
        (&["job", "logs", nobody], "JOB_NOT_FOUND: "),
        (&["job", "cancel", nobody], "JOB_NOT_FOUND: "),
    ];
    for (args, expected) in cases {
        let result = output(plane.cli(args.iter().copied()));
        let stderr = text(&result.stderr);
        assert_eq!(code(result.status), if args[0] == "run" { 125 } else { 1 }, "{args:?}: {stderr}");
        assert!(stderr.starts_with(&format!("error: {expected}")) && stderr.lines().count() == 1, "{args:?}: {stderr}");
        assert_eq!(text(&result.stdout), "", "{args:?}");
    }
    // What a VM has already it can be given by any driver.
    let vms = plane.json(["vm", "resize", &alive, "--vcpus", "2"]);
    assert_eq!((&vms[0]["id"], &vms[0]["vcpus"], &vms[0]["generation"]), (&alive.into(), &2.into(), &2.into()));
    let result = output(plane.cli(["--output", "json", "job", "get", nobody]));
    let error: serde_json::Value = serde_json::from_slice(&result.stderr).expect("json");
    assert_eq!((&error["error"]["reason"], &error["error"]["code"]), (&"JOB_NOT_FOUND".into(), &"NOT_FOUND".into()));
    assert_eq!(error["error"]["metadata"]["job_id"], nobody);
}

#[test]
fn a_program_that_is_not_there_could_not_be_run() {
    let plane = Plane::start();
    let result = output(plane.cli(["run", "--", "/no/such/program"]));
    assert_eq!(code(result.status), 125);
    assert!(text(&result.stderr).contains("/no/such/program"), "{}", text(&result.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_means_one_job_and_a_huge_message_is_refused_with_its_limit() {
    let plane = Plane::start();
    let mut client = SchedulerServiceClient::connect(plane.endpoint.clone()).await.expect("connect");
    let spec = |argument: &str| common::JobSpec { command: vec!["echo".into(), argument.into()], ..Default::default() };
    let request = |spec| pb::SubmitJobRequest {
        request_id: JobId(uuid::Uuid::from_u128(7)).to_string(),
        spec: Some(spec),
        input: None,
    };
    let first = client.submit_job(request(spec("a"))).await.expect("accepted").into_inner().job.expect("a job");
    let again = client.submit_job(request(spec("a"))).await.expect("repeated").into_inner().job.expect("a job");
    assert_eq!(first.id, again.id);
    let other = client.submit_job(request(spec("b"))).await.expect_err("another body");
    assert_eq!(Error::from_status(&other).reason, Reason::RequestIdReused);
    assert_eq!(other.code(), tonic::Code::InvalidArgument);

    let huge =
        pb::SubmitJobRequest { request_id: String::new(), spec: Some(spec(&"x".repeat(100_000_000))), input: None };
    let refused = client.submit_job(huge).await.expect_err("100 MB");
    let allowed = "message: \"100000016\" is not allowed: at most 4194304 bytes";
    assert_eq!((refused.code(), refused.message()), (tonic::Code::InvalidArgument, allowed));
    assert_eq!(Error::from_status(&refused).reason, Reason::InvalidField);
    drop(client);
    tokio::task::spawn_blocking(move || drop(plane)).await.expect("drop");
}

/// Runs a control plane that cannot start; returns its exit code and what it says beside its log.
fn refuse(flags: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let dir = tempdir();
    let mut command = plane::command(dir.path(), &flags.iter().map(|&flag| flag.to_owned()).collect::<Vec<_>>());
    command.envs(environment.iter().copied()).stdout(Stdio::null());
    let result = output(command);
    let stderr = text(&result.stderr);
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "one clear line: {stderr}");
    (code(result.status), errors[0].to_owned())
}

#[test]
fn a_wrong_configuration_names_the_setting_the_value_and_what_is_allowed() {
    let (exit, error) = refuse(&[], &[("FIRECRACKER_MAX_CONCURRENT_VMS", "many")]);
    assert_eq!(exit, 2);
    let says =
        "environment variable FIRECRACKER_MAX_CONCURRENT_VMS: \"many\" is not allowed: a whole number from 1 to 10000";
    assert_eq!(error, format!("error: {says}"));

    let dir = tempdir();
    let file = write(dir.path().join("broken.toml"), "[server]\nlisten = \"127.0.0.1:1\"\nnode_id = = 3\n");
    let (exit, error) = refuse(&["--config", &file.display().to_string()], &[]);
    assert_eq!(exit, 2);
    assert!(error.contains("broken.toml") && error.contains("line 3"), "{error}");

    let (exit, error) = refuse(&["--config", "/no/such/file.toml"], &[]);
    assert_eq!((exit, error.contains("cannot read /no/such/file.toml")), (2, true), "{error}");
}

#[test]
fn what_is_taken_is_named_with_the_way_out() {
    let plane = Plane::start();
    let address = plane.endpoint.trim_start_matches("http://").to_owned();
    let dir = tempdir();
    let mut port_taken = mvm_ci(["--driver", "process", "--listen", &address]);
    port_taken.arg("--data-dir").arg(dir.path().join("data")).arg("--vm-state-dir").arg(dir.path().join("vms"));
    let result = output(port_taken);
    let stderr = text(&result.stderr);
    assert_eq!(code(result.status), 1, "{stderr}");
    assert!(
        stderr.contains(&format!("error: cannot listen on {address}: ")) && stderr.contains("--listen"),
        "{stderr}"
    );
    assert!(!dir.path().join("data").exists(), "nothing is made before the address is had");

    let data = plane.path("data").display().to_string();
    let (exit, error) = refuse(&["--data-dir", &data], &[]);
    assert_eq!(exit, 1);
    assert!(error.contains(&data) && error.contains("in use") && error.contains(&plane.pid().to_string()), "{error}");

    let vms = plane.path("data/vm-state").display().to_string();
    let (exit, error) = refuse(&["--vm-state-dir", &vms], &[]);
    assert_eq!((exit, error.contains("in use")), (1, true), "{error}");
}

#[test]
fn the_effective_configuration_can_be_printed_and_read_back() {
    let dir = tempdir();
    let file = write(dir.path().join("mvm-ci.toml"), "[vm_manager]\npre_warm_count = 3\n");
    let mut print = mvm_ci(["--check-config", "--max-vms", "4"]);
    print.current_dir(dir.path()).env("FIRECRACKER_DEFAULT_VCPUS", "1");
    let printed = stdout(print);
    for line in ["pre_warm_count = 3", "max_concurrent_vms = 4", "default_vcpus = 1"] {
        assert!(printed.lines().any(|printed| printed == line), "{line}\n{printed}");
    }
    write(file, &printed);
    let mut again = mvm_ci(["config"]);
    again.current_dir(dir.path());
    assert_eq!(stdout(again), printed);
}

#[test]
fn a_second_signal_ends_it_at_once_and_the_first_says_what_goes_on() {
    let mut plane = Plane::start();
    let vm = plane.json(["vm", "create", "--wait"])["id"].as_str().expect("an id").to_owned();
    plane.stop();
    let log = plane.log();
    assert!(log.contains("Shutting down; VMs keep running") && log.contains("vm stop --all"), "{log}");
    plane.restart();
    assert_eq!(stdout(plane.cli(["run", "--vm", &vm, "--", "echo", "adopted"])), "adopted\n");

    let dir = tempdir();
    let mut starting =
        plane::command(dir.path(), &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("spawn");
    // Wherever in its start the first one meets it, two of them are enough. Not SIGINT: what a shell starts in the background ignores
    // that until it listens for it.
    for _ in 0..2 {
        crate::support::signal(starting.id(), rustix::process::Signal::TERM);
    }
    wait_exit(&mut starting);
}
