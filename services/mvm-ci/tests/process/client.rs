//! The client against a server that misbehaves: what it prints, on which descriptor, and its exit code.

use std::{
    io::Read as _,
    process::{Command, Stdio},
};

use blixard::{
    error::Reason,
    job::JobState,
    pb::common::v1::{
        self as common,
        LogStream::{Stderr, Stdout},
    },
};
use rustix::process::Signal;

use crate::{
    fake_scheduler::{Fake, Script, chunk, end, ended, exited, killed},
    support::{code, mvm_ci, noise, output, signal, text, wait_exit, wait_for},
};

fn run(fake: &Fake, args: &[&str]) -> Command {
    mvm_ci([&["run", "--endpoint", &fake.endpoint], args].concat())
}

#[test]
fn a_stream_that_breaks_is_taken_up_at_the_next_byte_whatever_the_server_repeats() {
    let log = noise(300_000);
    let part = |from: usize, to: usize| chunk(1, Stdout, from as u64, &log[from..to]);
    let fake = Fake::start(
        [
            Script::Fail(vec![part(0, 65_536), part(65_536, 70_000)], Reason::ShuttingDown),
            Script::Fail(vec![], Reason::PeerUnavailable),
            // Begins before the cursor, as a server does whose records have other borders now.
            Script::Fail(vec![part(60_000, 69_000), part(69_000, 120_000)], Reason::PeerUnavailable),
            Script::Close(vec![part(120_000, 180_000)]),
            Script::Close(vec![part(180_000, 240_000), part(240_000, 300_000), end(1, 300_000, JobState::Failed, "")]),
        ],
        ended(JobState::Failed, exited(7), ""),
    );
    let result = output(run(&fake, &["--", "true"]));
    assert_eq!(code(result.status), 7, "{}", text(&result.stderr));
    assert_eq!(text(&result.stderr), "");
    assert!(result.stdout == log, "{} bytes of {}", result.stdout.len(), log.len());
    let asked: Vec<_> = fake.state().streamed.iter().map(|request| (request.attempt, request.offset)).collect();
    assert_eq!(asked, [(0, 0), (1, 70_000), (1, 70_000), (1, 120_000), (1, 180_000)]);
}

#[test]
fn streams_go_to_their_own_descriptors_and_bytes_are_not_touched() {
    let records = vec![
        chunk(1, Stdout, 0, b"out\xff\0\r\n"),
        chunk(1, Stderr, 7, b"err\xfe"),
        chunk(1, Stdout, 11, b"no newline"),
        end(1, 21, JobState::Succeeded, ""),
    ];
    let fake = Fake::start([Script::Close(records)], ended(JobState::Succeeded, exited(0), ""));
    let result = output(run(&fake, &["--", "true"]));
    assert_eq!(code(result.status), 0);
    assert_eq!(result.stdout, b"out\xff\0\r\nno newline");
    assert_eq!(result.stderr, b"err\xfe");
}

#[test]
fn the_exit_code_tells_how_the_job_ended() {
    let cases = [
        (ended(JobState::Succeeded, exited(0), ""), 0, ""),
        (ended(JobState::Failed, exited(255), ""), 255, ""),
        (ended(JobState::Failed, killed(9), ""), 137, "was ended by signal 9"),
        (ended(JobState::TimedOut, killed(15), "ran longer than 2s"), 124, "TimedOut: ran longer than 2s"),
        (ended(JobState::Cancelled, None, "by hand"), 130, "Cancelled: by hand"),
        (ended(JobState::Failed, None, "the VM was lost"), 125, "Failed: the VM was lost"),
    ];
    for (job, expected, says) in cases {
        let state = JobState::from_pb("state", job.state).expect("a state");
        let fake = Fake::start([Script::Close(vec![end(1, 0, state, "")])], job);
        let result = output(run(&fake, &["--", "true"]));
        let stderr = text(&result.stderr);
        assert_eq!(code(result.status), expected, "{stderr}");
        assert!(stderr.contains(says) && stderr.is_empty() == says.is_empty(), "{stderr}");
    }
}

#[test]
fn an_attempt_that_is_not_the_last_is_named_and_the_next_one_followed() {
    let mut job = ended(JobState::Succeeded, exited(0), "");
    job.attempt = 2;
    let first = vec![chunk(1, Stdout, 0, b"first "), end(1, 6, JobState::Queued, "the node was lost")];
    let second = vec![chunk(2, Stdout, 0, b"second"), end(2, 6, JobState::Succeeded, "")];
    // Once in one stream, once with a break between the attempts.
    let scripts = [
        vec![Script::Close([first.clone(), second.clone()].concat())],
        vec![Script::Fail(first, Reason::PeerUnavailable), Script::Close(second)],
    ];
    for scripts in scripts {
        let fake = Fake::start(scripts, job.clone());
        let result = output(run(&fake, &["--", "true"]));
        assert_eq!((code(result.status), text(&result.stdout).as_str()), (0, "first second"));
        assert_eq!(text(&result.stderr), "mvm-ci: attempt 1 was lost: the node was lost\n");
    }
    let first = vec![end(1, 0, JobState::Failed, "it exited with status 1")];
    let second = vec![end(2, 0, JobState::Succeeded, "")];
    let fake = Fake::start([Script::Close([first, second].concat())], job);
    let result = output(run(&fake, &["--", "true"]));
    let said = "mvm-ci: attempt 1 is Failed: it exited with status 1; another one follows\n";
    assert_eq!((code(result.status), text(&result.stderr).as_str()), (0, said));
}

#[test]
fn a_submission_whose_answer_is_lost_is_repeated_under_the_same_id() {
    let script = Script::Close(vec![end(1, 0, JobState::Succeeded, "")]);
    let fake = Fake::start([script], ended(JobState::Succeeded, exited(0), ""));
    fake.state().lost_submissions = 2;
    assert_eq!(code(output(run(&fake, &["--", "true"])).status), 0);
    let submitted = &fake.state().submitted;
    assert_eq!(submitted.len(), 3);
    assert!(submitted.iter().all(|request| *request == submitted[0] && !request.request_id.is_empty()));
}

#[test]
fn an_array_is_followed_line_by_line_and_succeeds_when_all_of_it_does() {
    let log = |text: &'static [u8]| {
        let (head, tail) = text.split_at(3);
        Script::Close(vec![
            chunk(1, Stdout, 0, head),
            chunk(1, Stdout, 3, tail),
            end(1, text.len() as u64, JobState::Succeeded, ""),
        ])
    };
    let scripts = || [log(b"one\ntwo\n"), log(b"no end")];
    let fake = Fake::start(scripts(), ended(JobState::Succeeded, exited(0), ""));
    let result = output(run(&fake, &["--array", "4-5", "--", "true"]));
    let stderr = text(&result.stderr);
    assert_eq!((code(result.status), stderr.as_str()), (0, "mvm-ci: 2 of 2 jobs succeeded\n"));
    let mut lines: Vec<_> = text(&result.stdout).lines().map(|line| line[4..].to_owned()).collect();
    lines.sort();
    assert_eq!(lines, ["no end", "one", "two"], "{}", text(&result.stdout));
    assert!(text(&result.stdout).lines().all(|line| line.starts_with("[4] ") || line.starts_with("[5] ")));

    let fake = Fake::start(scripts(), ended(JobState::Failed, exited(7), ""));
    let result = output(run(&fake, &["--array", "4-5", "--", "true"]));
    let stderr = text(&result.stderr);
    assert_eq!(code(result.status), 1);
    assert!(stderr.contains("[5] job") && stderr.contains("exited with 7"), "{stderr}");
    assert!(stderr.ends_with("mvm-ci: 0 of 2 jobs succeeded\n"), "{stderr}");
}

#[test]
fn the_files_of_a_job_are_fetched_whole_whatever_breaks() {
    let kept = noise(200_000);
    let sha256 = ring::digest::digest(&ring::digest::SHA256, &kept).as_ref().to_vec().into();
    let good = common::Artifact { path: "/out/a.bin".into(), size_bytes: 200_000, sha256, problem: String::new() };
    let lost = common::Artifact { path: "/out/b".into(), problem: "it is not there".into(), ..Default::default() };
    let dir = tempfile::tempdir().expect("a directory");
    let into = dir.path().join("fetched");
    let into = into.to_str().expect("text");
    let start = |good: common::Artifact| {
        let script = Script::Close(vec![end(1, 0, JobState::Succeeded, "")]);
        let fake = Fake::start([script], ended(JobState::Succeeded, exited(0), ""));
        fake.state().breaks = true;
        fake.state().artifacts = vec![(good, kept.clone()), (lost.clone(), Vec::new())];
        fake
    };
    let wanted = ["--artifact", "/out/a.bin", "--artifact", "/out/b", "--artifacts-dir", into, "--", "true"];
    let result = output(run(&start(good.clone()), &wanted));
    assert_eq!(code(result.status), 0, "{}", text(&result.stderr));
    assert_eq!(text(&result.stderr), "mvm-ci: /out/b was not kept: it is not there\n");
    assert!(std::fs::read(dir.path().join("fetched/out/a.bin")).expect("a file") == kept, "byte for byte");

    let damaged = common::Artifact { sha256: vec![0; 32].into(), path: "/out/c.bin".into(), ..good };
    let result = output(run(&start(damaged), &wanted));
    assert!(text(&result.stderr).contains("arrived damaged"), "{}", text(&result.stderr));
    assert_eq!(code(result.status), 125);
    let names: Vec<_> = std::fs::read_dir(dir.path().join("fetched/out")).expect("a directory").collect();
    assert_eq!(names.len(), 1, "nothing is left of the damaged one: {names:?}");
}

#[test]
fn ctrl_c_cancels_the_job_and_its_output_goes_on_to_the_end() {
    let script = Script::Hang(vec![chunk(1, Stdout, 0, b"begun\n")]);
    let fake = Fake::start([script], ended(JobState::Cancelled, killed(15), ""));
    let mut client =
        run(&fake, &["--", "sleep", "60"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut begun = [0; 6];
    client.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("output");
    signal(client.id(), Signal::INT);
    assert_eq!(code(wait_exit(&mut client)), 130);
    assert!(fake.was_cancelled());
    let mut stderr = String::new();
    client.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert!(stderr.contains("cancelling job") && stderr.contains("Cancelled"), "{stderr}");
}

#[test]
fn a_second_ctrl_c_leaves_although_the_job_has_not_ended() {
    // The end never comes: the server has forgotten how to stream and to watch.
    let hang = Script::Hang(vec![chunk(1, Stdout, 0, b"begun\n")]);
    let fake = Fake::start([hang], ended(JobState::Running, None, ""));
    let mut client =
        run(&fake, &["--", "sleep", "60"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("spawn");
    let mut begun = [0; 6];
    client.stdout.as_mut().expect("piped").read_exact(&mut begun).expect("output");
    signal(client.id(), Signal::INT);
    wait_for("the cancellation", || if fake.was_cancelled() { Ok(()) } else { Err("none".to_owned()) });
    assert!(client.try_wait().expect("wait").is_none(), "one Ctrl-C must not leave");
    signal(client.id(), Signal::INT);
    assert_eq!(code(wait_exit(&mut client)), 130);
}

#[test]
fn a_reader_that_leaves_ends_the_client_quietly_and_the_job_with_it() {
    let log = noise(200_000);
    let records: Vec<_> = (0..100).map(|i| chunk(1, Stdout, i * 200_000, &log)).collect();
    let fake = Fake::start([Script::Hang(records)], ended(JobState::Cancelled, None, ""));
    let mut client = run(&fake, &["--", "yes"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut first = [0; 10];
    client.stdout.take().expect("piped").read_exact(&mut first).expect("output");
    assert_eq!(code(wait_exit(&mut client)), 141);
    let mut stderr = String::new();
    client.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!(stderr, "");
    assert!(fake.was_cancelled());
}

#[test]
fn without_a_control_plane_each_command_says_in_one_line_how_to_start_one() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("port");
    let endpoint = format!("http://{port}");
    let expected = format!("error: PEER_UNAVAILABLE: no control plane answers at {endpoint}: start one with `mvm-ci`");
    for (args, exit) in [(&["stats"] as &[_], 1), (&["vm", "list"], 1), (&["job", "list"], 1), (&["run", "true"], 125)]
    {
        let result = output(mvm_ci([&["--endpoint", &endpoint], args].concat()));
        let stderr = text(&result.stderr);
        assert_eq!(code(result.status), exit, "{stderr}");
        assert!(stderr.starts_with(&expected) && stderr.lines().count() == 1, "{stderr}");
    }
    let result = output(mvm_ci(["run", "--endpoint", &endpoint, "--output", "json", "--", "true"]));
    let error: serde_json::Value = serde_json::from_slice(&result.stderr).expect("json");
    assert_eq!(code(result.status), 125);
    assert_eq!(error["error"]["reason"], "PEER_UNAVAILABLE");
    assert_eq!(error["error"]["code"], "UNAVAILABLE");
    assert_eq!(error["error"]["metadata"]["peer"], endpoint.as_str());
}

#[test]
fn ids_are_whole_uuids() {
    let fake = Fake::start([], ended(JobState::Succeeded, exited(0), ""));
    for args in
        [&["job", "get", "0a1b"] as &[_], &["vm", "get", "0a1b"], &["job", "logs", "0a1b"], &["vm", "stop", "0a1b"]]
    {
        let result = output(mvm_ci([&["--endpoint", &fake.endpoint], args].concat()));
        assert_eq!(code(result.status), 1);
        let field = if args[0] == "job" { "job_id" } else { "vm_id" };
        let expected = format!("error: INVALID_FIELD: {field}: \"0a1b\" is not allowed: a UUID\n");
        assert_eq!(text(&result.stderr), expected);
    }
    assert_eq!(code(output(run(&fake, &["--vm", "0a1b", "--", "true"])).status), 125);
    assert!(fake.state().submitted.is_empty());
}

#[test]
fn run_as_json_is_one_line_per_record_and_the_job_at_the_end() {
    let records = vec![chunk(1, Stdout, 0, b"text"), chunk(1, Stderr, 4, b"\xff"), end(1, 5, JobState::Succeeded, "")];
    let fake = Fake::start([Script::Close(records)], ended(JobState::Succeeded, exited(0), ""));
    let result = output(run(&fake, &["--output", "json", "--", "true"]));
    let lines: Vec<serde_json::Value> =
        text(&result.stdout).lines().map(|line| serde_json::from_str(line).expect("json")).collect();
    assert_eq!(lines[0]["data"], "text");
    assert_eq!((&lines[1]["stream"], &lines[1]["data_base64"]), (&"stderr".into(), &"/w==".into()));
    assert_eq!(lines[2]["end"]["end_offset"], 5);
    assert_eq!((lines.len(), &lines[3]["job"]["state"]), (4, &"Succeeded".into()));
}

#[test]
fn detached_jobs_leave_their_id() {
    let fake = Fake::start([], ended(JobState::Queued, None, ""));
    let result = output(run(&fake, &["--detach", "--", "true"]));
    let id = fake.state().submitted[0].request_id.clone();
    assert_eq!(text(&result.stdout), format!("{id}\n"));
}
