//! The agent as the process driver runs it, over its socket.

mod harness;

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    id::JobId,
    pb::{
        common::v1::{InputFile, LogStream},
        guest::v1 as pb,
    },
};
use tonic::Status;

use crate::harness::{Agent, Log, Run, connect, processes_with, spec, start, wait_for};

const MIB: usize = 1024 * 1024;

fn reason<T: std::fmt::Debug>(result: Result<T, Status>) -> Reason {
    Error::from_status(&result.expect_err("refused")).reason
}

#[tokio::test]
async fn a_guest_has_no_identity_before_configure_and_runs_nothing() {
    let mut agent = Agent::start().await;
    let hello = agent.client.hello(pb::HelloRequest {}).await.expect("hello").into_inner();
    assert!(!hello.configured && hello.vm_id.is_empty() && hello.job_id.is_empty(), "{hello:?}");
    assert!(!hello.boot_id.is_empty(), "not PID 1, so it must not be cloned, and says so");
    assert_eq!(hello.kernel_release, fs::read_to_string("/proc/sys/kernel/osrelease").expect("linux").trim());
    let refused = Run::open(&mut agent.client, start(JobId::random(), 1, &["true"])).await.map(|_| ());
    assert_eq!(reason(refused), Reason::GuestRefused);

    let mut boot_ids = Vec::new();
    for _ in 0..2 {
        let request = agent.configure_request();
        let answer = agent.client.configure(request).await.expect("idempotent").into_inner();
        assert_eq!(answer.skipped.len(), 4, "not PID 1, so it names what it left alone: {answer:?}");
        assert_eq!(answer.done, ["boot-id"]);
        boot_ids.push(answer.boot_id);
    }
    let after = agent.client.hello(pb::HelloRequest {}).await.expect("hello").into_inner();
    assert_eq!((after.configured, &after.vm_id), (true, &agent.vm_id.to_string()));
    assert_eq!(after.boot_id, hello.boot_id);
    assert_eq!(boot_ids, vec![after.boot_id; 2]);
}

#[tokio::test]
async fn stdout_and_stderr_are_told_apart_and_arrive_byte_for_byte() {
    let agent = Agent::configured().await;
    let log = agent.shell(r"printf 'a\377\000\n'; printf '\376err' >&2; printf z").await;
    assert_eq!(log.stdout(), b"a\xff\0\nz");
    assert_eq!(log.stderr(), b"\xfeerr");
    assert_eq!(log.exit().exit_code, Some(0));
}

#[tokio::test]
async fn fifty_megabytes_arrive_complete() {
    let agent = Agent::configured().await;
    let log = agent.shell("yes | head -c 50000000").await;
    assert_eq!(log.bytes.len(), 50_000_000);
    assert!(log.bytes.chunks(2).all(|line| line == b"y\n"));
    assert!(log.chunks < 50_000_000 / 8192, "{} chunks: output must not be cut into crumbs", log.chunks);
}

#[tokio::test]
async fn a_command_gets_the_guests_environment_its_own_and_its_names() {
    let agent = Agent::configured().await;
    let job_id = JobId::random();
    let mut request = start(job_id, 3, &["env"]);
    let spec = request.spec.as_mut().expect("a spec");
    spec.env.insert("MINE".into(), "a b".into());
    spec.env.insert("BLIXARD_JOB_ID".into(), "a lie".into());
    let log = Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await;
    let text = String::from_utf8(log.bytes).expect("text");
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "BLIXARD_ATTEMPT=3",
            &format!("BLIXARD_JOB_ID={job_id}"),
            &format!("BLIXARD_VM_ID={}", agent.vm_id),
            "HOME=/root",
            "MINE=a b",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
    );
}

#[tokio::test]
async fn a_command_runs_in_its_directory_with_nothing_to_read_in_a_process_group_of_its_own() {
    let agent = Agent::configured().await;
    let script = "#!/bin/sh\npwd; cat; echo \"$0\"; test \"$(cut -d ' ' -f 5 /proc/$$/stat)\" = $$";
    fs::write(agent.path("script"), script).expect("written");
    Command::new("chmod").args(["+x", &agent.path("script")]).status().expect("chmod");
    let mut request = start(JobId::random(), 1, &["./script"]);
    request.spec.as_mut().expect("a spec").working_dir = agent.path("");
    let log = Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await;
    let directory = agent.dir.path().display().to_string();
    let text = String::from_utf8_lossy(&log.bytes).into_owned();
    assert!(text.starts_with(&format!("{directory}\n")), "{text}");
    assert_eq!(log.exit().exit_code, Some(0));
}

#[tokio::test]
async fn exit_codes_signals_and_resource_use_are_reported() {
    let agent = Agent::configured().await;
    for code in [0, 1, 7, 255] {
        let exit = agent.shell(&format!("exit {code}")).await.exit();
        assert_eq!((exit.exit_code, exit.signal), (Some(code), None));
    }
    for signal in [2, 9, 15, 11, 34] {
        let exit = agent.shell(&format!("kill -{signal} $$")).await.exit();
        assert_eq!((exit.exit_code, exit.signal), (None, Some(signal)));
    }
    let busy = agent.shell("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done").await.exit();
    assert!(busy.user_time_ms + busy.system_time_ms > 0 && busy.max_rss_kib > 100, "{busy:?}");
}

#[tokio::test]
async fn a_command_that_cannot_be_started_says_why() {
    let agent = Agent::configured().await;
    fs::write(agent.path("plain"), "").expect("written");
    fs::write(agent.path("orphan"), "#!/no/such/interpreter\n").expect("written");
    Command::new("chmod").args(["+x", &agent.path("orphan")]).status().expect("chmod");
    for (program, directory, expected) in [
        ("no-such-command", "/", "command not found: no-such-command (PATH=/usr/local/sbin:"),
        ("/no/such/file", "/", "command not found: /no/such/file"),
        (&agent.path("plain"), "/", "plain: it is not executable"),
        (&agent.path("orphan"), "/", "orphan: the interpreter or loader it names does not exist"),
        ("/tmp", "/", "cannot run /tmp: it is a directory"),
        ("true", "/no/such/dir", "cannot use the working directory /no/such/dir: No such file or directory"),
        ("true", &agent.path("plain"), "plain is not a directory"),
    ] {
        let mut request = start(JobId::random(), 1, &[program]);
        request.spec.as_mut().expect("a spec").working_dir = directory.into();
        let run = Run::open(&mut agent.client.clone(), request).await.expect("accepted");
        let error = run.finish().await.spawn_error();
        assert!(error.contains(expected), "{program} in {directory}: {error}");
    }
    assert_eq!(agent.shell("echo still here").await.stdout(), b"still here\n");
}

#[tokio::test]
async fn a_stream_resumed_at_any_offset_gives_exactly_the_rest() {
    let mut agent = Agent::configured().await;
    let script = "i=0; while [ $i -lt 2000 ]; do echo out $i; [ $((i % 7)) = 0 ] && echo err $i >&2; i=$((i+1)); done
                  head -c 300000 /dev/urandom; exit 5";
    let mut first = agent.run(&["sh", "-c", script]).await;
    let whole = first.read(usize::MAX).await;
    assert_eq!(whole.exit().exit_code, Some(5));
    let length = whole.bytes.len() as u64;
    // Rising, because resuming at an offset acknowledges everything before it.
    for offset in [0, 1, 2, 9_999, 65_535, 65_536, 65_537, length - 200_000, length - 1, length] {
        let again = pb::RunStart { resume_offset: offset, attach_only: offset % 2 == 1, ..first.start.clone() };
        let rest = Run::open(&mut agent.client, again).await.expect("attached").finish_unacknowledged().await;
        assert_eq!(rest.bytes[..], whole.bytes[usize::try_from(offset).expect("small")..], "from {offset}");
        assert_eq!(rest.exited, whole.exited);
    }
    let gone = pb::RunStart { resume_offset: 5, ..first.start.clone() };
    assert_eq!(reason(Run::open(&mut agent.client, gone).await.map(|_| ())), Reason::GuestRefused);
    let beyond = pb::RunStart { resume_offset: length + 1, ..first.start.clone() };
    assert_eq!(reason(Run::open(&mut agent.client, beyond).await.map(|_| ())), Reason::OffsetBeyondEnd);
}

#[tokio::test]
async fn a_host_that_comes_back_in_the_middle_of_a_running_command_loses_and_repeats_nothing() {
    let agent = Agent::configured().await;
    let mut whole = Vec::new();
    let mut request = start(JobId::random(), 1, &["sh", "-c", "head -c 3000000 /dev/urandom | tee copy; exit 3"]);
    request.spec.as_mut().expect("a spec").working_dir = agent.path("");
    let exited = loop {
        // Another connection each time, as after a restart of vmhost.
        let mut run = Run::open(&mut connect(&agent.socket), request.clone()).await.expect("attached");
        let part = run.read(700_000).await;
        whole.extend(part.bytes);
        request.resume_offset = whole.len() as u64;
        if let Some(exited) = part.exited {
            break exited;
        }
    };
    assert_eq!(exited.exit.and_then(|exit| exit.exit_code), Some(3));
    assert!(whole == fs::read(agent.path("copy")).expect("the copy"), "the log differs from what was written");
}

#[tokio::test]
async fn a_command_blocks_when_nothing_is_acknowledged_and_goes_on_when_it_is() {
    let agent = Agent::configured().await;
    let mut run = agent.run(&["head", "-c", "30000000", "/dev/zero"]).await;
    let unacknowledged = run.read(4 * MIB).await;
    assert_eq!(unacknowledged.bytes.len(), 4 * MIB);
    let pid = wait_for("the command", || agent.processes().first().copied()).await;
    // It sleeps in write(2): what it has written and the agent has not read is in the pipe.
    wait_for("the command to block", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.trim_start().starts_with('S').then_some(())
    })
    .await;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("alive");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let resident: usize = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(resident < 40 * 1024, "the agent holds {resident} KiB");

    run.acknowledge(100);
    assert_eq!(run.read_exactly(100).await, 100, "exactly what was acknowledged comes after");
    run.acknowledge(4 * MIB as u64 + 100);
    let again = pb::RunStart { resume_offset: 4 * MIB as u64 + 100, ..run.start.clone() };
    let rest = Run::open(&mut agent.client.clone(), again).await.expect("attached").finish().await;
    assert_eq!(rest.bytes.len(), 30_000_000 - 4 * MIB - 100);
    assert_eq!(rest.exit().exit_code, Some(0));
}

#[tokio::test]
async fn a_host_that_acknowledges_what_was_never_written_is_told_so() {
    let agent = Agent::configured().await;
    let mut run = agent.run(&["sleep", "1000"]).await;
    run.acknowledge(1);
    assert_eq!(reason(run.next().await), Reason::OffsetBeyondEnd);
    let again = Run::open(&mut agent.client.clone(), run.start.clone()).await;
    assert!(again.is_ok(), "the attempt itself goes on");
}

#[tokio::test]
async fn a_signal_reaches_the_whole_tree_and_nothing_of_it_stays() {
    let mut agent = Agent::configured().await;
    let script = "setsid sleep 1000 & (sleep 1000 & sleep 1000) & sleep 1000 & wait";
    let run = agent.run(&["sh", "-c", script]).await;
    let job = format!("BLIXARD_JOB_ID={}", run.start.job_id);
    wait_for("the tree to grow", || (processes_with(&job).len() >= 5).then_some(())).await;
    let signal = |signal| pb::SignalRequest { job_id: run.start.job_id.clone(), attempt: 1, signal };
    agent.client.signal(signal(15)).await.expect("signalled");
    let request = signal(15);
    let exit = run.finish().await.exit();
    assert_eq!(exit.signal, Some(15));
    assert_eq!(processes_with(&job), [0_u32; 0]);
    agent.client.signal(request).await.expect("without effect once it has ended");
}

#[tokio::test]
async fn what_a_command_leaves_behind_is_ended_with_it() {
    let agent = Agent::configured().await;
    let script = "trap '' TERM HUP; sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' & echo done; exit 4";
    let log = agent.shell(script).await;
    assert_eq!(log.stdout(), b"done\n");
    assert_eq!(log.exit().exit_code, Some(4));
    assert_eq!(agent.processes(), [0_u32; 0]);
}

#[tokio::test]
async fn output_written_before_the_end_is_never_lost_however_late_it_is_acknowledged() {
    let agent = Agent::configured().await;
    // Leaves a full buffer and a full pipe behind, and a child that holds the pipe open.
    let mut run = agent.run(&["sh", "-c", "head -c 5000000 /dev/zero; sleep 1000 & exit 0"]).await;
    assert_eq!(run.read(4 * MIB).await.bytes.len(), 4 * MIB);
    let again = pb::RunStart { resume_offset: 4 * MIB as u64, ..run.start.clone() };
    let rest = Run::open(&mut agent.client.clone(), again).await.expect("attached").finish().await;
    assert_eq!(rest.bytes.len(), 5_000_000 - 4 * MIB);
    assert_eq!(agent.processes(), [0_u32; 0]);
}

#[tokio::test]
async fn one_attempt_at_a_time_and_none_twice() {
    let mut agent = Agent::configured().await;
    let job = JobId::random();
    let _first = Run::open(&mut agent.client, start(job, 2, &["sleep", "1000"])).await.expect("accepted");
    let hello = agent.client.hello(pb::HelloRequest {}).await.expect("hello").into_inner();
    assert_eq!((hello.job_id, hello.attempt), (job.to_string(), 2));
    let open = |start| {
        let mut client = agent.client.clone();
        async move { Run::open(&mut client, start).await.map(|_| ()) }
    };
    assert_eq!(reason(open(start(JobId::random(), 1, &["true"])).await), Reason::GuestRefused);
    assert_eq!(reason(open(start(job, 3, &["true"])).await), Reason::GuestRefused);
    assert_eq!(reason(open(start(job, 1, &["true"])).await), Reason::StaleAttempt);
    let other = JobId::random();
    let unknown = pb::RunStart { attach_only: true, spec: None, ..start(other, 1, &[]) };
    assert_eq!(reason(open(unknown).await), Reason::JobNotFound);
    let signal = |job_id: JobId, attempt| pb::SignalRequest { job_id: job_id.to_string(), attempt, signal: 9 };
    assert_eq!(reason(agent.client.clone().signal(signal(other, 1)).await), Reason::JobNotFound);
    assert_eq!(reason(agent.client.clone().signal(signal(job, 1)).await), Reason::StaleAttempt);

    agent.client.clone().signal(signal(job, 2)).await.expect("killed");
    let killed = pb::RunStart { attach_only: true, spec: None, ..start(job, 2, &[]) };
    let killed = Run::open(&mut agent.client, killed).await.expect("kept until another begins").finish().await;
    assert_eq!(killed.exit().signal, Some(9));
    let hello = agent.client.hello(pb::HelloRequest {}).await.expect("hello").into_inner();
    assert_eq!(hello.job_id, "", "the host has all of it");

    assert_eq!(agent.shell("echo next").await.stdout(), b"next\n");
    let twice = Run::open(&mut agent.client, start(job, 2, &["true"])).await.map(|_| ());
    assert_eq!(reason(twice), Reason::StaleAttempt, "a late duplicate must not run it again");
    let with_output = pb::RunStart { resume_offset: 10, ..start(JobId::random(), 1, &["true"]) };
    assert_eq!(reason(Run::open(&mut agent.client, with_output).await.map(|_| ())), Reason::JobNotFound);
}

#[tokio::test]
async fn a_newer_stream_of_an_attempt_ends_the_older() {
    let agent = Agent::configured().await;
    let mut older = agent.run(&["sleep", "1000"]).await;
    let mut newer = Run::open(&mut connect(&agent.socket), older.start.clone()).await.expect("attached");
    assert_eq!(reason(older.next().await), Reason::GuestRefused);
    let job_id = older.start.job_id.clone();
    agent.client.clone().signal(pb::SignalRequest { job_id, attempt: 1, signal: 9 }).await.expect("killed");
    assert_eq!(newer.read(1).await.exit().signal, Some(9));
}

#[tokio::test]
async fn nonsense_is_refused_with_the_field_it_stands_in() {
    let mut agent = Agent::configured().await;
    let job_id = JobId::random().to_string();
    let good = start(JobId::random(), 1, &["true"]);
    for (field, bad) in [
        ("start.job_id", pb::RunStart { job_id: "x".into(), ..good.clone() }),
        ("start.attempt", pb::RunStart { attempt: 0, ..good.clone() }),
        ("start.spec", pb::RunStart { spec: None, ..good.clone() }),
        ("start.spec.command", pb::RunStart { spec: Some(spec(&[])), ..good.clone() }),
    ] {
        let status = Run::open(&mut agent.client, bad).await.map(|_| ()).expect_err(field);
        assert_eq!(Error::from_status(&status).metadata.get("field").map(String::as_str), Some(field), "{status}");
    }
    for signal in [0, 65, -1] {
        let request = pb::SignalRequest { job_id: job_id.clone(), attempt: 1, signal };
        assert_eq!(reason(agent.client.signal(request).await), Reason::InvalidField);
    }
    let patient = pb::ShutdownRequest { grace_ms: 60_001 };
    assert_eq!(reason(agent.client.shutdown(patient).await), Reason::InvalidField);
}

#[tokio::test]
async fn shutdown_ends_the_job_tells_its_host_and_leaves_nothing() {
    let mut agent = Agent::configured().await;
    let script = "trap 'echo bye; exit 6' TERM; echo up; while :; do sleep 0.01; done";
    let mut run = agent.run(&["sh", "-c", script]).await;
    assert_eq!(run.read(3).await.stdout(), b"up\n");
    agent.client.shutdown(pb::ShutdownRequest { grace_ms: 30_000 }).await.expect("begun");
    let mut rest = Vec::new();
    let exit = loop {
        match run.next().await.expect("no error").expect("Exited comes first") {
            // The shell remarks on stderr that its `sleep` was terminated.
            pb::run_response::Message::Output(chunk) if chunk.stream() == LogStream::Stderr => {}
            pb::run_response::Message::Output(chunk) => rest.extend(chunk.data),
            pb::run_response::Message::Exited(exited) => break exited.exit.expect("it ran"),
            pb::run_response::Message::Started(_) => panic!("started twice"),
        }
    };
    assert_eq!((&rest[..], exit.exit_code), (&b"bye\n"[..], Some(6)));
    drop(run);
    assert!(agent.exit().await.success());
    assert!(!agent.socket.exists());
    assert_eq!(agent.processes(), [0_u32; 0]);
}

#[tokio::test]
async fn shutdown_kills_after_the_grace_what_ignores_it() {
    let mut agent = Agent::configured().await;
    let mut run =
        agent.run(&["sh", "-c", "trap '' TERM; echo up; setsid sleep 1000 & while :; do sleep 1; done"]).await;
    assert_eq!(run.read(3).await.stdout(), b"up\n");
    agent.client.shutdown(pb::ShutdownRequest { grace_ms: 1 }).await.expect("begun");
    let refused = Run::open(&mut agent.client, start(JobId::random(), 1, &["true"])).await.map(|_| ());
    assert!(refused.is_err(), "no job starts in a guest that ends");
    assert!(agent.exit().await.success());
    assert_eq!(agent.processes(), [0_u32; 0]);
}

#[tokio::test]
async fn sigterm_to_the_agent_is_a_shutdown() {
    let mut agent = Agent::configured().await;
    let mut run = agent.run(&["sh", "-c", "echo up; sleep 1000 & sleep 1000"]).await;
    assert_eq!(run.read(3).await.stdout(), b"up\n");
    Command::new("kill").arg(agent.pid().to_string()).status().expect("kill");
    assert!(agent.exit().await.success());
    assert!(!agent.socket.exists());
    assert_eq!(agent.processes(), [0_u32; 0]);
}

#[tokio::test]
async fn the_agent_leads_its_own_session() {
    let agent = Agent::start().await;
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid())).expect("alive");
    let session = stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(3)).expect("a session");
    assert_eq!(session, agent.pid().to_string(), "Ctrl-C at the control plane must not reach it");
}

#[test]
fn bad_arguments_are_refused_with_what_is_allowed() {
    for args in [&[][..], &["--listen"], &["--listen", "tcp:1"], &["--listen", "vsock:x"], &["--what"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_blixard-guest-agent")).args(args).output().expect("runs");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("--listen vsock:PORT | unix:PATH"), "{text}");
    }
}

/// Runs a shell script with input.
async fn with_input(agent: &Agent, input: pb::GuestInput, script: &str) -> Log {
    let request = pb::RunStart { input: Some(input), ..start(JobId::random(), 1, &["sh", "-c", script]) };
    Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await
}

#[tokio::test]
async fn a_command_reads_its_input_to_the_end_byte_for_byte() {
    let agent = Agent::configured().await;
    let stdin: Vec<u8> = (0..300_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let input = pb::GuestInput { stdin: stdin.clone().into(), ..Default::default() };
    let log = with_input(&agent, input, "cat").await;
    assert!(log.stdout() == stdin, "{} bytes of {}", log.stdout().len(), stdin.len());
    assert_eq!(log.exit().exit_code, Some(0));
}

#[tokio::test]
async fn a_command_that_does_not_read_its_input_is_not_held_up() {
    let agent = Agent::configured().await;
    // More than any pipe holds.
    let input = pb::GuestInput { stdin: vec![b'x'; 500_000].into(), ..Default::default() };
    for script in ["echo done", "head -c 3", "exec <&-; echo done", "sleep 600 & echo done"] {
        let log = with_input(&agent, input.clone(), script).await;
        assert_eq!(log.exit().exit_code, Some(0), "{script}");
        assert!([&b"done\n"[..], b"xxx"].contains(&log.stdout()), "{script}");
    }
}

#[tokio::test]
async fn files_are_there_before_the_command_starts_with_their_bytes_and_modes() {
    let agent = Agent::configured().await;
    let file =
        |name: &str, content: &[u8], mode| InputFile { path: agent.path(name), content: content.to_vec().into(), mode };
    fs::write(agent.path("old"), "a longer text than the new one").expect("written");
    Command::new("chmod").args(["400", &agent.path("old")]).status().expect("chmod");
    let files = vec![
        file("new/dir/run.sh", b"#!/bin/sh\necho \"ran $1\"\n", 0o755),
        file("bytes", b"\xff\0\n", 0),
        file("old", b"new", 0o606),
        file("empty", b"", 0o4700),
    ];
    let input = pb::GuestInput { files, ..Default::default() };
    let dir = agent.path("");
    let script = format!("cd {dir}; new/dir/run.sh it; cat bytes old; stat -c %a new/dir/run.sh bytes old empty");
    let log = with_input(&agent, input, &script).await;
    assert_eq!(log.stderr(), b"");
    assert_eq!(log.stdout(), b"ran it\n\xff\0\nnew755\n644\n606\n4700\n");
}

#[tokio::test]
async fn a_file_that_can_not_be_written_is_why_the_command_did_not_start() {
    let agent = Agent::configured().await;
    fs::write(agent.path("plain"), "").expect("written");
    let path = agent.path("plain/below");
    let files = vec![InputFile { path: path.clone(), content: "x".into(), mode: 0 }];
    let log = with_input(&agent, pb::GuestInput { files, ..Default::default() }, "echo ran").await;
    let error = log.spawn_error();
    assert!(error.starts_with(&format!("cannot write {path}: ")), "{error}");
    assert_eq!(log.bytes, b"");
}

#[tokio::test]
async fn secrets_are_in_the_environment_and_not_in_the_output() {
    let agent = Agent::configured().await;
    let secrets = [("TOKEN", "hunter2"), ("LONG", "hunter2-and-more"), ("LINES", "first\nsecond")];
    let secrets = secrets.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let input = pb::GuestInput { secrets, ..Default::default() };
    // The parts of a secret are written one by one, and a part of one comes last.
    let script = r#"
        echo "a $TOKEN b $LONG c"; printf 'err %s' "$LINES" >&2
        for part in hu nt er 2; do printf %s $part; sleep 0.02; done; echo
        echo ${#TOKEN} ${#LONG}; printf hunter"#;
    let log = with_input(&agent, input.clone(), script).await;
    assert_eq!(String::from_utf8_lossy(log.stdout()), "a *** b *** c\n***\n7 16\nhunter");
    assert_eq!(log.stderr(), b"err ***");

    let loud = "yes hunter2 | head -c 8000000; printf hunter2";
    let log = with_input(&agent, input.clone(), loud).await;
    assert_eq!(log.stdout().len(), 4 * 1_000_000 + 3);
    assert!(log.stdout().chunks_exact(4).all(|line| line == b"***\n"));

    let mut request = pb::RunStart { input: Some(input), ..start(JobId::random(), 1, &["no-such-command"]) };
    request.spec.as_mut().expect("a spec").env.insert("PATH".into(), "/hunter2/bin".into());
    let log = Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await;
    assert_eq!(log.spawn_error(), "command not found: no-such-command (PATH=/***/bin)");
}

#[tokio::test]
async fn an_element_of_an_array_knows_its_place() {
    let agent = Agent::configured().await;
    for (index, expected) in [(0, "none\n"), (7, "7\n")] {
        let mut request = start(JobId::random(), 1, &["sh", "-c", "echo ${BLIXARD_ARRAY_INDEX-none}"]);
        request.spec.as_mut().expect("a spec").array_index = index;
        let log = Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await;
        assert_eq!(log.stdout(), expected.as_bytes());
    }
}

#[tokio::test]
async fn an_attempt_whose_lease_runs_out_is_killed_with_all_its_processes() {
    let agent = Agent::configured().await;
    let script = r#"trap "" TERM; (trap "" TERM; sleep 600) & echo up; while :; do sleep 0.1; done"#;
    let request = pb::RunStart { lease_ms: 300, ..start(JobId::random(), 1, &["sh", "-c", script]) };
    let begun = Instant::now();
    let log = Run::open(&mut agent.client.clone(), request).await.expect("accepted").finish().await;
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!((log.stdout(), log.exit().signal), (&b"up\n"[..], Some(9)));
    assert!(log.exited.as_ref().is_some_and(|exited| exited.lease_over));
    assert_eq!(agent.processes(), [0; 0]);
    assert!(!agent.shell("kill -9 $$").await.exited.is_some_and(|exited| exited.lease_over));
}

#[tokio::test]
async fn a_lease_is_renewed_on_any_stream_of_the_attempt() {
    let agent = Agent::configured().await;
    let lease = Duration::from_millis(1500);
    let lease_ms = 1500;
    let request = pb::RunStart { lease_ms, ..start(JobId::random(), 1, &["sh", "-c", "sleep 4; echo survived"]) };
    let mut client = agent.client.clone();
    let first = Run::open(&mut client, request.clone()).await.expect("accepted");
    // The newer stream reads; renewals on the older one count all the same.
    let second =
        Run::open(&mut client, pb::RunStart { attach_only: true, lease_ms: 0, ..request }).await.expect("attached");
    let renewing = async {
        let mut every = tokio::time::interval(lease / 5);
        loop {
            every.tick().await;
            first.renew(lease_ms);
        }
    };
    let log = tokio::select! {
        log = second.finish() => log,
        () = renewing => unreachable!("it renews for ever"),
    };
    assert_eq!((log.stdout(), log.exit().exit_code), (&b"survived\n"[..], Some(0)));
    assert!(log.exited.is_some_and(|exited| !exited.lease_over));
}

#[tokio::test]
async fn files_are_given_out_from_any_offset_and_only_files() {
    let agent = Agent::configured().await;
    let content: Vec<u8> = (0..200_001_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(agent.path("file"), &content).expect("written");
    fs::write(agent.path("empty"), "").expect("written");
    Command::new("mkfifo").arg(agent.path("pipe")).status().expect("mkfifo");
    let get = async |path: String, offset| {
        let mut parts = agent.client.clone().get_file(pb::GetFileRequest { path, offset }).await?.into_inner();
        let first = parts.message().await?.expect("a first part");
        let (size, mut bytes) = (first.size_bytes, first.data.to_vec());
        while let Some(part) = parts.message().await? {
            assert!((1..=65_536).contains(&part.data.len()) && part.size_bytes == 0);
            bytes.extend_from_slice(&part.data);
        }
        Ok::<_, Status>((size, bytes))
    };
    for offset in [0, 1, 65_536, 200_000, 200_001] {
        let (size, bytes) = get(agent.path("file"), offset).await.expect("read");
        assert_eq!(size, 200_001);
        assert!(bytes == content[usize::try_from(offset).expect("small")..], "from {offset}");
    }
    assert_eq!(get(agent.path("empty"), 0).await.expect("read"), (0, vec![]));
    for (path, offset, expected) in [
        (agent.path("file"), 200_002, Reason::OffsetBeyondEnd),
        (agent.path("no-such-file"), 0, Reason::ArtifactNotFound),
        (agent.path("file/below"), 0, Reason::ArtifactNotFound),
        (agent.path(""), 0, Reason::GuestRefused),
        (agent.path("pipe"), 0, Reason::GuestRefused),
        ("relative".to_owned(), 0, Reason::InvalidField),
    ] {
        assert_eq!(reason(get(path.clone(), offset).await), expected, "{path}");
    }
}
