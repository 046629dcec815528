//! kill -9 of the whole control plane at any moment: nothing is lost, nothing runs twice, nothing is left.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    jobs::submit_many,
    plane::Plane,
    support::{output, stdout, text, wait_for},
};

/// Lines of a file that jobs append to, counted.
fn lines(plane: &Plane, name: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for line in std::fs::read_to_string(plane.path(name)).unwrap_or_default().lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    counts
}

fn states(plane: &Plane) -> BTreeMap<String, u64> {
    let stats = plane.json(["stats"]);
    let states = stats["job_states"].as_object().expect("an object");
    states.iter().map(|(state, count)| (state.clone(), count.as_u64().expect("a count"))).collect()
}

fn open_jobs(states: &BTreeMap<String, u64>) -> u64 {
    ["Queued", "Assigned", "Running"].iter().filter_map(|&state| states.get(state)).sum()
}

#[test]
fn jobs_queued_running_and_finishing_survive_kill_9_of_everything_but_their_vms() {
    let mut plane = Plane::with_flags(&["--max-vms", "3"]);
    let (begun, done) = (plane.path("begun").display().to_string(), plane.path("done").display().to_string());
    // 40 jobs of about 0.3 s each on three VMs: at any moment some are queued, some run, some are being recorded.
    let script = format!(
        "echo $ID >> {begun}; for i in 1 2 3 4 5 6; do echo $ID $i; sleep 0.05; done; echo $ID >> {done}; echo end"
    );
    let ids = submit_many(&plane, 40, &script);
    for finished in [3, 12, 20] {
        wait_for("some jobs to have finished", || {
            let done = lines(&plane, "done").len();
            if done >= finished { Ok(()) } else { Err(format!("{done} done")) }
        });
        plane.kill();
        plane.restart();
    }
    wait_for("all jobs to end", || {
        let states = states(&plane);
        if open_jobs(&states) == 0 { Ok(()) } else { Err(format!("{states:?}")) }
    });

    let (begun, done) = (lines(&plane, "begun"), lines(&plane, "done"));
    let twice: Vec<_> = begun.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "ran twice: {twice:?}\n{}", plane.log());
    let mut succeeded = 0;
    for id in &ids {
        let job = plane.json(["job", "get", id]);
        if job["state"] == "Succeeded" {
            succeeded += 1;
            let expected: String = (1..=6).map(|i| format!("{id} {i}\n")).chain(["end\n".to_owned()]).collect();
            assert_eq!(stdout(plane.cli(["job", "logs", id])), expected, "the log is complete");
            assert_eq!(done.get(id), Some(&1));
        } else {
            assert!(!job["reason"].as_str().expect("text").is_empty(), "marked with a reason: {job}");
        }
    }
    // VMs outlive the control plane, so what ran goes on: nothing needs to be lost.
    assert_eq!(succeeded, ids.len(), "{:?}\n{}", states(&plane), plane.log());
}

#[test]
fn a_client_that_was_following_goes_on_where_it_was() {
    use std::{io::Read as _, process::Stdio};

    // The endpoint has to stay the same, as it does in real life.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("port");
    let mut plane = Plane::with_flags(&["--listen", &port.to_string()]);
    let script = "for i in $(seq 1 40); do echo line $i; sleep 0.05; done; exit 3";
    let mut client = plane.cli(["run", "--", "sh", "-c", script]);
    let mut client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut received = vec![0; 20];
    client.stdout.as_mut().expect("piped").read_exact(&mut received).expect("output");
    plane.kill();
    plane.restart();
    client.stdout.as_mut().expect("piped").read_to_end(&mut received).expect("output");
    let mut stderr = Vec::new();
    client.stderr.as_mut().expect("piped").read_to_end(&mut stderr).expect("text");
    let expected: String = (1..=40).map(|i| format!("line {i}\n")).collect();
    assert_eq!(text(&received), expected, "{}", text(&stderr));
    assert_eq!(client.wait().expect("wait").code(), Some(3), "{}\n{}", text(&stderr), plane.log());
}

#[test]
fn a_vm_that_died_while_nobody_looked_is_marked_and_its_job_too() {
    let mut plane = Plane::start();
    let id = stdout(plane.cli(["run", "--detach", "--", "sleep", "600"])).trim().to_owned();
    let job = plane.wait_for_job(&id, "Running");
    plane.kill();
    let vm_dir = plane.path("data/vm-state").join(job["vm_id"].as_str().expect("a VM"));
    for (pid, _) in crate::support::processes_mentioning(&vm_dir) {
        crate::support::signal(pid, rustix::process::Signal::KILL);
    }
    plane.restart();
    let job = plane.wait_for_job(&id, "Failed");
    assert!(!job["reason"].as_str().expect("text").is_empty(), "{job}");
    assert_eq!(job["exit"], Value::Null);
    let vm = job["vm_id"].as_str().expect("a VM");
    wait_for("the VM to be marked", || {
        let vm = plane.json(["vm", "get", vm]);
        if vm["state"] == "Failed" || vm["state"] == "Terminated" { Ok(()) } else { Err(vm.to_string()) }
    });
    let result = output(plane.cli(["job", "logs", "-f", &id]));
    assert!(result.status.success(), "{}", text(&result.stderr));
}
