//! What people expect of jobs and nodes, through the whole house.

use std::{io::Write as _, process::Stdio};

use serde_json::Value;

use crate::{
    plane::Plane,
    support::{code, noise, output, stdout, text, wait_exit, wait_for, write},
};

#[test]
fn a_job_waits_for_a_cordoned_node_and_says_so_and_runs_when_the_node_is_back() {
    let plane = Plane::start();
    let node = plane.json(["node", "list"])[0]["id"].as_str().expect("a node").to_owned();
    let cordoned = plane.json(["node", "cordon", &node, "--reason", "new disk"]);
    assert_eq!((&cordoned["state"], &cordoned["reason"]), (&Value::from("Cordoned"), &Value::from("new disk")));
    let id = stdout(plane.cli(["run", "--detach", "--", "true"])).trim().to_owned();
    let explained = wait_for("the decision", || {
        let explained = plane.json(["job", "explain", &id]);
        let summary = explained["waiting"]["summary"].as_str().unwrap_or_default();
        if summary.is_empty() { Err(explained.to_string()) } else { Ok(explained) }
    });
    assert_eq!(
        (&explained["job"]["state"], &explained["attempts"]),
        (&Value::from("Queued"), &Value::from(vec![(); 0]))
    );
    assert_eq!(plane.json(["node", "undrain", &node])["state"], "Ready");
    assert_eq!(code(output(plane.cli(["job", "logs", "-f", &id])).status), 0);
    let explained = wait_for("the end", || {
        let explained = plane.json(["job", "explain", &id]);
        if explained["job"]["state"] == "Succeeded" { Ok(explained) } else { Err(explained.to_string()) }
    });
    assert_eq!(explained["waiting"], Value::Null);
    assert_eq!(explained["attempts"][0]["state"], "Succeeded");
    let people = stdout(plane.cli(["job", "explain", &id]));
    assert!(people.contains(&format!("job {id} is Succeeded")) && people.contains("attempt 1 on"), "{people}");
}

#[test]
fn a_node_is_drained_when_its_jobs_have_ended() {
    let plane = Plane::start();
    let node = plane.json(["node", "list"])[0]["id"].as_str().expect("a node").to_owned();
    let busy = plane.path("busy");
    let script = format!("touch {0}; while [ -e {0} ]; do sleep 0.05; done", busy.display());
    let id = stdout(plane.cli(["run", "--detach", "--", "sh", "-c", &script])).trim().to_owned();
    wait_for("the job", || if busy.exists() { Ok(()) } else { Err("it has not begun".to_owned()) });
    let mut drain = plane.cli(["node", "drain", &node, "--wait"]).stdout(Stdio::piped()).spawn().expect("spawn");
    wait_for("the drain", || {
        let seen = plane.json(["node", "get", &node]);
        let draining = seen["state"] == "Draining" && seen["vms"] == 1 && seen["jobs"] == 1;
        if draining { Ok(()) } else { Err(seen.to_string()) }
    });
    assert!(drain.try_wait().expect("wait").is_none(), "it waits for the job");
    std::fs::remove_file(&busy).expect("removed");
    assert_eq!(code(wait_exit(&mut drain)), 0);
    assert_eq!(plane.json(["job", "get", &id])["state"], "Succeeded", "the job was let finish");
    assert_eq!(plane.json(["node", "get", &node])["state"], "Draining", "until it is put back");
    let refused = output(plane.cli(["node", "drain", "nowhere"]));
    assert!(text(&refused.stderr).contains("NODE_NOT_FOUND"), "{}", text(&refused.stderr));
}

#[test]
fn an_array_runs_once_for_each_number_and_is_one_group() {
    let plane = Plane::start();
    let script = "echo number $BLIXARD_ARRAY_INDEX; [ $BLIXARD_ARRAY_INDEX != 3 ]";
    let result = output(plane.cli(["run", "--array", "2-4", "--", "sh", "-c", script]));
    let mut lines: Vec<_> = text(&result.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["[2] number 2", "[3] number 3", "[4] number 4"], "{}", text(&result.stderr));
    assert_eq!(code(result.status), 1);
    assert!(text(&result.stderr).ends_with("mvm-ci: 2 of 3 jobs succeeded\n"), "{}", text(&result.stderr));
    let group = plane.json(["job", "list"])[0]["spec"]["group_id"].as_str().expect("a group").to_owned();
    assert_eq!(plane.json(["job", "list", "--group", &group]).as_array().map(Vec::len), Some(3));
}

#[test]
fn the_jobs_of_a_file_run_in_the_order_of_their_dependencies() {
    let plane = Plane::start();
    let order = plane.path("order").display().to_string();
    let job = |name: &str, script: &str, more: &str| {
        format!("[[job]]\nname = \"{name}\"\ncommand = [\"sh\", \"-c\", \"{script}\"]\n{more}\n")
    };
    let append = |name: &str| format!("echo {name} >> {order}");
    let file = [
        job("last", &append("last"), "after = [\"first\"]\nafter_end = [\"fails\"]"),
        job("never", &append("never"), "after = [\"fails\"]"),
        job("first", &format!("sleep 0.5; {}", append("first")), ""),
        job("fails", "exit 1", ""),
    ];
    let file = write(plane.path("group.toml"), &file.concat()).display().to_string();
    let group = stdout(plane.cli(["job", "group", &file])).trim().to_owned();
    let jobs = wait_for("every job to end", || {
        let jobs = plane.json(["job", "list", "--group", &group]);
        let ended = jobs.as_array().expect("jobs").iter().filter(|job| !job["finished_at"].is_null()).count();
        if ended == 4 { Ok(jobs) } else { Err(jobs.to_string()) }
    });
    assert_eq!(std::fs::read_to_string(&order).expect("lines"), "first\nlast\n", "{jobs}");
}

#[test]
fn a_job_is_given_stdin_files_and_secrets_and_leaves_files() {
    let plane = Plane::start();
    let (content, given) = (noise(100_000), noise(50_000));
    std::fs::write(plane.path("local"), &content).expect("written");
    let guest = plane.path("in/the/guest");
    let file = format!("{}:{}", plane.path("local").display(), guest.display());
    let left = plane.path("left").display().to_string();
    let script = format!("cat > {left}; cat {} >> {left}; echo the token is $TOKEN", guest.display());
    let fetched = plane.path("fetched");
    let fetched_text = fetched.display().to_string();
    let args = ["run", "--stdin", "--file", &file, "--secret", "TOKEN", "--artifact", &left, "--artifacts-dir"];
    let mut client = plane.cli([&args[..], &[&fetched_text, "--", "sh", "-c", &script]].concat());
    client.env("TOKEN", "hunter22").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = client.spawn().expect("spawn");
    client.stdin.take().expect("piped").write_all(&given).expect("written");
    let result = client.wait_with_output().expect("ended");
    assert_eq!(text(&result.stdout), "the token is ***\n", "{}", text(&result.stderr));
    let whole = std::fs::read(fetched.join(left.trim_start_matches('/'))).expect("the artifact");
    assert!(whole == [given, content].concat(), "{} bytes", whole.len());
}
