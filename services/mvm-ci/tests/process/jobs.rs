//! Jobs through the whole house: client, scheduler, registry, vmhost, guest agent, and back.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    process::Stdio,
};

use rustix::process::Signal;

use crate::{
    plane::Plane,
    support::{
        CuttingProxy, code, mvm_ci, noise, output, processes_mentioning, signal, stdout, text, wait_exit, wait_for,
    },
};

#[test]
fn output_arrives_on_the_right_descriptors_and_the_exit_code_is_the_jobs() {
    let plane = Plane::start();
    let result = output(plane.cli(["run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]));
    assert_eq!((text(&result.stdout), text(&result.stderr)), ("out\n".to_owned(), "err\n".to_owned()));
    assert_eq!(code(result.status), 7);
    let result = output(plane.cli(["run", "--", "sh", "-c", "kill -9 $$"]));
    assert_eq!(code(result.status), 137);
    let result = output(plane.cli(["run", "--env", "A=b c", "--workdir", "/tmp", "--", "sh", "-c", "echo $A; pwd"]));
    assert_eq!(text(&result.stdout), "b c\n/tmp\n");
}

#[test]
fn a_job_that_runs_too_long_is_timed_out() {
    let plane = Plane::start();
    let result = output(plane.cli(["run", "--timeout", "2s", "--", "sleep", "60"]));
    let stderr = text(&result.stderr);
    assert_eq!(code(result.status), 124, "{stderr}");
    assert!(stderr.contains("TimedOut"), "{stderr}");
    let jobs = plane.json(["job", "list", "--state", "TimedOut"]);
    assert_eq!(jobs.as_array().map(Vec::len), Some(1));
}

#[test]
fn fifty_megabytes_arrive_complete_and_byte_exact() {
    let plane = Plane::start();
    let mut client = plane.cli(["run", "--", "sh", "-c", "yes | head -c 50000000"]);
    let mut client = client.stdout(Stdio::piped()).spawn().expect("spawn");
    let mut received = Vec::new();
    client.stdout.take().expect("piped").read_to_end(&mut received).expect("read");
    assert_eq!(code(wait_exit(&mut client)), 0);
    assert_eq!(received.len(), 50_000_000);
    assert!(received.chunks(2).all(|pair| pair == b"y\n"));
}

#[test]
fn bytes_that_are_no_text_arrive_unchanged_through_a_connection_that_is_cut_again_and_again() {
    let plane = Plane::start();
    let content = noise(2_000_000);
    std::fs::write(plane.path("noise"), &content).expect("write");
    let proxy = CuttingProxy::start(&plane.endpoint, 150_000);
    let path = plane.path("noise").display().to_string();
    let result = output(mvm_ci(["run", "--endpoint", &proxy.endpoint, "--", "cat", &path]));
    assert_eq!(code(result.status), 0, "{}", text(&result.stderr));
    assert!(result.stdout == content, "{} bytes", result.stdout.len());
    assert!(proxy.connections() > 10, "{} connections", proxy.connections());
}

#[test]
fn a_log_cut_off_in_the_middle_and_resumed_by_offset_is_the_whole() {
    let plane = Plane::start();
    let script = "i=0; while [ $i -lt 3000 ]; do echo line $i of this job; i=$((i+1)); done; sleep 1; echo end";
    let id = stdout(plane.cli(["run", "--detach", "--", "sh", "-c", script])).trim().to_owned();

    let mut first = plane.cli(["job", "logs", "-f", &id]).stdout(Stdio::piped()).spawn().expect("spawn");
    let mut begin = vec![0; 20_000];
    first.stdout.as_mut().expect("piped").read_exact(&mut begin).expect("output");
    first.kill().expect("kill");
    first.wait().expect("wait");

    let offset = begin.len().to_string();
    let rest = output(plane.cli(["job", "logs", "-f", "--offset", &offset, &id]));
    assert_eq!(code(rest.status), 0, "{}", text(&rest.stderr));
    let whole = [begin, rest.stdout].concat();
    let expected: String = (0..3000).map(|i| format!("line {i} of this job\n")).collect();
    assert_eq!(text(&whole), expected + "end\n");
    // And once more, after the end, without following.
    assert!(output(plane.cli(["job", "logs", &id])).stdout == whole);
    let beyond = output(plane.cli(["job", "logs", "--offset", "99999999", &id]));
    assert_eq!(code(beyond.status), 1);
    assert!(text(&beyond.stderr).starts_with("error: OFFSET_BEYOND_END: "), "{}", text(&beyond.stderr));
}

#[test]
fn ctrl_c_cancels_the_job_and_leaves_no_process_of_it() {
    let plane = Plane::start();
    let marker = plane.path("marker").display().to_string();
    let script = format!("trap 'echo bye; exit 0' TERM; echo {marker}; while :; do sleep 0.1; done");
    let mut client = plane.cli(["run", "--", "sh", "-c", &script]);
    let mut client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut begun = vec![0; marker.len() + 1];
    client.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("output");
    signal(client.id(), Signal::INT);
    assert_eq!(code(wait_exit(&mut client)), 130);
    let mut rest = String::new();
    client.stdout.take().expect("piped").read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "bye\n", "what it still wrote is shown");
    let jobs = plane.json(["job", "list"]);
    assert_eq!(jobs[0]["state"], "Cancelled");
    let leftover = processes_mentioning(&plane.path("marker"));
    assert!(leftover.is_empty(), "{leftover:?}");
}

#[test]
fn head_ends_an_endless_job_without_a_word() {
    let plane = Plane::start();
    let mut client =
        plane.cli(["run", "--", "yes"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut lines = [0; 4];
    client.stdout.take().expect("piped").read_exact(&mut lines).expect("output");
    assert_eq!(code(wait_exit(&mut client)), 141);
    let mut stderr = String::new();
    client.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!((lines, stderr.as_str()), (*b"y\ny\n", ""));
    let id = plane.json(["job", "list"])[0]["id"].as_str().expect("an id").to_owned();
    plane.wait_for_job(&id, "Cancelled");
}

#[test]
fn a_service_vm_runs_job_after_job_and_its_life_is_on_record() {
    let plane = Plane::start();
    let vm = plane.json(["vm", "create", "--wait", "--label", "team=ci"]);
    let id = vm["id"].as_str().expect("an id");
    assert_eq!((&vm["state"], &vm["kind"]), (&"Ready".into(), &"service".into()));
    for word in ["one", "two"] {
        assert_eq!(stdout(plane.cli(["run", "--vm", id, "--", "echo", word])), format!("{word}\n"));
    }
    assert_eq!(stdout(plane.cli(["run", "--service", "--", "echo", "three"])), "three\n");
    // The job is on record as ended in the same instant as its VM as Idle.
    assert_eq!(plane.json(["vm", "get", id])["state"], "Idle");
    let usage = plane.json(["vm", "usage", id]);
    assert!(usage["cpu_time_us"].is_u64() && usage["threads"].as_u64() > Some(0), "{usage}");
    assert!(usage["memory_bytes"].as_u64() > Some(1 << 20), "an agent: {usage}");
    assert!(usage["vm_id"] == id && usage["network"].is_null() && usage["disks"].is_null(), "{usage}");
    assert!(stdout(plane.cli(["vm", "usage", id])).contains("\nmemory:  "), "for people");
    let events = plane.json(["vm", "events", id]);
    let path: Vec<_> =
        events.as_array().expect("a list").iter().rev().filter_map(|event| event["to_state"].as_str()).collect();
    assert_eq!(path, ["Starting", "Ready", "Busy", "Idle", "Busy", "Idle", "Busy", "Idle"]);

    assert_eq!(plane.json(["vm", "stop", id, "--wait"])[0]["state"], "Terminated");
    assert_eq!(plane.json(["vm", "list"]), serde_json::json!([]));
    assert_eq!(plane.json(["vm", "purge"])["purged"], 1);
    assert_eq!(plane.json(["vm", "list", "--all"]), serde_json::json!([]));
    assert!(plane.json(["vm", "events", id]).as_array().expect("a list").len() > path.len(), "history stays");
    let log = plane.log();
    for line in [
        "Starting VM Manager...".to_owned(),
        format!("VM registered vm_id={id} state=Starting"),
        format!("VM state changed vm_id={id} Starting -> Ready"),
    ] {
        assert!(log.contains(&line), "{line}\n{log}");
    }
}

#[test]
fn two_hundred_jobs_share_ten_vms_and_leave_nothing() {
    let plane = Plane::with_flags(&["--max-vms", "10"]);
    let ran = plane.path("ran").display().to_string();
    let ids = submit_many(&plane, 200, &format!("echo $ID >> {ran}; echo $ID"));
    let mut most = 0;
    wait_for("200 jobs to end", || {
        let alive = plane.json(["vm", "list"]).as_array().expect("a list").len();
        most = most.max(alive).max(agents_alive(&plane));
        let states = plane.json(["stats"])["job_states"].clone();
        if states["Succeeded"] == 200 { Ok(()) } else { Err(states.to_string()) }
    });
    assert!((2..=10).contains(&most), "{most} VMs at once");
    let mut lines: Vec<_> = std::fs::read_to_string(&ran).expect("ran").lines().map(str::to_owned).collect();
    lines.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(lines, expected, "each job ran once");
    assert_eq!(stdout(plane.cli(["job", "logs", &ids[123]])), format!("{}\n", ids[123]));
    // Dropping the plane asserts that nothing is left.
}

/// How many guest agents live at one moment: those seen in a first look that are still there in a second were all alive
/// in between. An agent that is just forking its job is seen twice under one command line.
fn agents_alive(plane: &Plane) -> usize {
    let look = || -> BTreeSet<String> {
        let found = processes_mentioning(&plane.path("data/vm-state")).into_iter().map(|(_, command)| command);
        found.filter(|command| command.contains(" guest-agent ")).collect()
    };
    look().intersection(&look()).count()
}

/// Submits jobs at once; each finds its id in $ID.
pub(crate) fn submit_many(plane: &Plane, count: usize, script: &str) -> Vec<String> {
    use blixard::sdk::{AppState, Job};
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async {
        let manager = AppState::connect(&plane.endpoint).await.expect("connect").infrastructure().vm_manager();
        let submit = |_| {
            let (manager, mut job) = (manager.clone(), Job::default());
            job.env.insert("ID".into(), job.id.to_string());
            job.command = ["sh", "-c", script].map(Into::into).to_vec();
            async move { manager.submit(job, None).await.expect("accepted").to_string() }
        };
        futures::future::join_all((0..count).map(submit)).await
    })
}

#[test]
fn stdin_of_the_client_is_not_the_jobs() {
    let plane = Plane::start();
    let mut client = plane.cli(["run", "--", "cat"]);
    let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("spawn");
    // The job's stdin is empty, so it ends at once whatever is typed here.
    let _ = client.stdin.as_mut().expect("piped").write_all(b"typed\n");
    assert_eq!(code(wait_exit(&mut client)), 0);
}
