use std::fmt::Write;

use proptest::prelude::*;

use super::*;

const NOW: Timestamp = Timestamp(1_000_000);
const EARLIER: Timestamp = Timestamp(999_000);
const LATER: Timestamp = Timestamp(1_005_000);

fn job() -> JobId {
    JobId(uuid::Uuid::from_u128(7))
}

fn run() -> Run {
    Run::new(job(), 1, Limits::default(), EARLIER)
}

fn life(kind: VmKind, phase: Phase) -> Lifecycle {
    let ending = match phase {
        Phase::ShuttingDown { .. } | Phase::Dying(_) | Phase::Gone => Some((VmState::Terminated, "decided".to_owned())),
        Phase::Launching | Phase::Booting { .. } | Phase::Free | Phase::Running(_) => None,
    };
    Lifecycle { kind, phase, stop: None, ending, used: false }
}

fn stop(deadline: Timestamp) -> Stop {
    Stop { deadline, reason: "enough".to_owned() }
}

fn phases() -> Vec<(&'static str, Phase)> {
    let ending = Run { cause: Some(Cause::Cancelled), kill_at: Some(EARLIER), ..run() };
    let second = Some(Duration::from_millis(1000));
    let overdue = Run { started: Some(EARLIER), limits: Limits { run: second, start: None }, ..run() };
    let late = Run { limits: Limits { run: None, start: second }, ..run() };
    vec![
        ("Launching", Phase::Launching),
        ("Booting", Phase::Booting { deadline: EARLIER }),
        ("Free", Phase::Free),
        ("Running", Phase::Running(run())),
        ("Running, out of time", Phase::Running(overdue.clone())),
        ("Running, ended out of time", Phase::Running(Run { collecting: true, ..overdue.clone() })),
        ("Running, late to start", Phase::Running(late)),
        ("Running, cancelled", Phase::Running(ending.clone())),
        ("Running, killed 3 times", Phase::Running(Run { kills: KILLS_BEFORE_VM, ..ending })),
        ("ShuttingDown", Phase::ShuttingDown { deadline: EARLIER }),
        ("Dying", Phase::Dying(None)),
        ("Dying with a job", Phase::Dying(Some(run()))),
        ("Gone", Phase::Gone),
    ]
}

fn inputs() -> Vec<(&'static str, Input)> {
    let exit = |kind| Some(ExitStatus { kind, user_time_ms: 0, system_time_ms: 0, max_rss_kib: 0 });
    let exited = |kind| Input::Exited { exit: exit(kind), spawn_error: String::new() };
    let lost = |usable| Input::Lost { started: true, usable, reason: "broken".to_owned() };
    vec![
        ("Launched", Input::Launched { boot_deadline: LATER }),
        ("LaunchFailed", Input::LaunchFailed { reason: "no image".to_owned() }),
        ("AgentUp", Input::AgentUp),
        ("BootFailed", Input::BootFailed { reason: "refused".to_owned() }),
        ("Run", Input::Run(run())),
        ("Started", Input::Started { at: LATER }),
        ("Collecting", Input::Collecting),
        ("Exited 0", exited(ExitKind::Code(0))),
        ("Exited 7", exited(ExitKind::Code(7))),
        ("Exited, signal", exited(ExitKind::Signal(9))),
        ("Exited, no spawn", Input::Exited { exit: None, spawn_error: "no such file".to_owned() }),
        ("Lost", lost(true)),
        ("Lost with guest", lost(false)),
        ("Resumed", Input::Resumed),
        ("WasOver", Input::WasOver),
        ("Unstorable", Input::Unstorable { reason: "disk full".to_owned() }),
        ("Cancel", Input::Cancel { job: job(), attempt: 1 }),
        ("Cancel another", Input::Cancel { job: job(), attempt: 2 }),
        ("Superseded", Input::Superseded { job: job(), attempt: 1 }),
        ("Superseded another", Input::Superseded { job: job(), attempt: 2 }),
        ("LeaseOver", Input::LeaseOver),
        ("OutOfMemory", Input::OutOfMemory { reason: "its node ran out of memory".into() }),
        ("Misbehaves", Input::Misbehaves { reason: "its disk is too large".to_owned() }),
        ("Unhealthy", Input::Unhealthy { reason: "it is silent".to_owned() }),
        ("Stop", Input::Stop(stop(LATER))),
        ("Stop at once", Input::Stop(stop(NOW))),
        ("MachineExited", Input::MachineExited { how: "it crashed".to_owned() }),
        ("Tick", Input::Tick),
    ]
}

fn short(effect: &Effect) -> String {
    match effect {
        Effect::Finish(Outcome::Result { state, reason, .. }) => format!("Finish {state} ({reason})"),
        Effect::Finish(Outcome::Lost { started, reason }) => format!("Finish lost, started {started} ({reason})"),
        Effect::End { state, reason } => format!("End {state} ({reason})"),
        Effect::Signal(number) => format!("Signal {number}"),
        Effect::ReportStarted { at } => format!("ReportStarted {}", at.0),
        other => format!("{other:?}"),
    }
}

#[test]
fn every_phase_meets_every_input_as_in_the_table() {
    let mut table = String::new();
    for kind in [VmKind::Ephemeral, VmKind::Service] {
        for (phase_name, phase) in phases() {
            writeln!(table, "{kind} {phase_name}").unwrap();
            for (input_name, input) in inputs() {
                let before = life(kind, phase.clone());
                let mut after = before.clone();
                let effects: Vec<String> = after.step(NOW, input).iter().map(short).collect();
                if effects.is_empty() && after == before {
                    continue;
                }
                writeln!(table, "    {input_name:18} -> {:10} {}", after.state().as_str(), effects.join("; ")).unwrap();
            }
        }
    }
    insta::assert_snapshot!(table);
}

#[test]
fn a_stop_that_meets_a_running_job_ends_the_job_then_the_guest_then_kills() {
    let mut vm = Lifecycle::adopted(VmKind::Service, Some(run()), false);
    assert_eq!(vm.step(NOW, Input::Stop(stop(LATER))), [Effect::Signal(SIGTERM)]);
    assert_eq!((vm.state(), vm.deadline()), (VmState::Draining, Some(LATER)));
    let exit = ExitStatus { kind: ExitKind::Signal(15), user_time_ms: 0, system_time_ms: 0, max_rss_kib: 0 };
    let effects = vm.step(NOW, Input::Exited { exit: Some(exit), spawn_error: String::new() });
    let lost = Outcome::Lost { started: true, reason: "its VM was stopped: enough".to_owned() };
    let half = Duration::from_millis(2500);
    assert_eq!(effects, [Effect::Finish(lost), Effect::ShutDownGuest { grace: half }]);
    assert_eq!(vm.step(LATER, Input::Tick), [Effect::Kill]);
    let end = Effect::End { state: VmState::Terminated, reason: "enough".to_owned() };
    assert_eq!(vm.step(LATER, Input::MachineExited { how: "killed".to_owned() }), [end]);
}

#[test]
fn a_job_that_outlives_its_timeout_is_terminated_then_killed_and_its_state_says_so() {
    let timeout = Duration::from_secs(2);
    let mut vm = Lifecycle::adopted(
        VmKind::Ephemeral,
        Some(Run { limits: Limits { run: Some(timeout), start: None }, ..run() }),
        false,
    );
    assert_eq!(vm.deadline(), None, "the clock starts with the command");
    vm.step(NOW, Input::Started { at: NOW });
    assert_eq!(vm.deadline(), Some(NOW.plus(timeout)));
    let term = vm.step(NOW.plus(timeout), Input::Tick);
    assert_eq!(term, [Effect::SaveCause(Cause::TimedOut), Effect::Signal(SIGTERM)]);
    let kill_at = NOW.plus(timeout).plus(KILL_GRACE);
    assert_eq!(vm.deadline(), Some(kill_at));
    assert_eq!(vm.step(kill_at, Input::Tick), [Effect::Signal(SIGKILL)]);
    let exit = ExitStatus { kind: ExitKind::Signal(9), user_time_ms: 0, system_time_ms: 0, max_rss_kib: 0 };
    let effects = vm.step(kill_at, Input::Exited { exit: Some(exit), spawn_error: String::new() });
    let reason = "it ran longer than 2000 ms".to_owned();
    let result = Outcome::Result { state: JobState::TimedOut, exit: Some(exit), reason };
    assert_eq!(effects, [Effect::Finish(result), Effect::ShutDownGuest { grace: Duration::ZERO }]);
}

#[test]
fn an_attempt_that_does_not_start_in_time_is_ended_and_its_state_says_so() {
    let limits = Limits { run: Some(Duration::from_secs(60)), start: Some(Duration::from_millis(1500)) };
    let mut vm = Lifecycle::adopted(VmKind::Service, Some(Run::new(job(), 1, limits, NOW)), false);
    let late = NOW.plus(Duration::from_millis(1500));
    assert_eq!(vm.deadline(), Some(late));
    let mut started = vm.clone();
    started.step(NOW, Input::Started { at: NOW });
    assert_eq!(started.deadline(), Some(NOW.plus(Duration::from_secs(60))), "the other clock runs from here");
    assert_eq!(vm.step(late, Input::Tick), [Effect::SaveCause(Cause::NotStarted), Effect::Signal(SIGTERM)]);
    let effects = vm.step(late, Input::Lost { started: false, usable: true, reason: "it was not asked".to_owned() });
    let reason = "it did not start within 1500 ms".to_owned();
    assert_eq!(effects, [Effect::Finish(Outcome::Result { state: JobState::TimedOut, exit: None, reason })]);
    assert_eq!(vm.state(), VmState::Idle);
}

#[test]
fn at_the_end_of_the_lease_the_vm_is_killed_and_its_attempt_is_lost() {
    let mut vm = Lifecycle::adopted(VmKind::Service, Some(run()), false);
    assert_eq!(vm.step(NOW, Input::LeaseOver), [Effect::Kill]);
    assert_eq!(vm.step(NOW, Input::LeaseOver), [], "once is enough");
    let lost = Outcome::Lost { started: true, reason: format!("its VM ended: {LEASE_OVER}") };
    let end = Effect::End { state: VmState::Failed, reason: LEASE_OVER.to_owned() };
    assert_eq!(vm.step(NOW, Input::MachineExited { how: "killed".to_owned() }), [Effect::Finish(lost), end]);
    let mut idle = Lifecycle::adopted(VmKind::Service, None, true);
    assert_eq!(idle.step(NOW, Input::LeaseOver), [], "a VM without an attempt is nobody else's");
}

#[test]
fn a_vm_whose_hypervisor_misbehaves_is_killed_whatever_it_does_and_its_attempt_is_lost() {
    let misbehaves = || Input::Misbehaves { reason: "its disk is too large".to_owned() };
    let ended = || Effect::End { state: VmState::Failed, reason: "its disk is too large".to_owned() };
    let exited = || Input::MachineExited { how: "killed".to_owned() };
    let mut busy = Lifecycle::adopted(VmKind::Service, Some(run()), false);
    assert_eq!(busy.step(NOW, misbehaves()), [Effect::Kill]);
    assert_eq!(busy.step(NOW, misbehaves()), [], "once is enough");
    let lost = Outcome::Lost { started: true, reason: "its VM ended: its disk is too large".to_owned() };
    assert_eq!(busy.step(NOW, exited()), [Effect::Finish(lost), ended()]);

    let mut launching = Lifecycle::launching(VmKind::Ephemeral);
    assert_eq!(launching.step(NOW, misbehaves()), [], "there is nothing to kill yet");
    assert_eq!(launching.step(NOW, Input::Launched { boot_deadline: LATER }), [Effect::Kill]);
    assert_eq!(launching.step(NOW, exited()), [ended()]);
}

proptest! {
    /// Whatever happens in whatever order: a VM that is gone stays gone and ended once; each attempt that began is
    /// finished exactly once, and before the VM's end; the state only moves along the table of VM states.
    #[test]
    fn any_sequence_of_inputs_keeps_the_invariants(
        service in any::<bool>(),
        sequence in proptest::collection::vec((0..inputs().len(), 0..20_000i64), 0..60),
    ) {
        let kind = if service { VmKind::Service } else { VmKind::Ephemeral };
        let mut vm = Lifecycle::launching(kind);
        let (mut now, mut running, mut ended) = (NOW, false, false);
        for (index, pause) in sequence {
            now.0 += pause;
            let (name, input) = inputs().swap_remove(index);
            let begins = matches!(input, Input::Run(_)) && vm.admit(job(), 1) == Admission::Accepted;
            let before = vm.state();
            let effects = vm.step(now, input);
            running |= begins;
            for effect in &effects {
                match effect {
                    Effect::Finish(_) => prop_assert!(std::mem::take(&mut running), "{name}: finished what did not run"),
                    Effect::End { .. } => {
                        prop_assert!(!ended && !running, "{name}: ended twice, or with a job");
                        ended = true;
                    }
                    _ => {}
                }
            }
            // `WasOver` comes from recovery alone, instead of a Finish.
            if name == "WasOver" { running = vm.run().is_some(); }
            prop_assert_eq!(running, vm.run().is_some(), "{}", name);
            prop_assert_eq!(ended, vm.state().is_terminal(), "{}", name);
            let after = vm.state();
            let through_draining = before.may_go_to(VmState::Draining, kind);
            let legal = before == after || before.may_go_to(after, kind)
                || (through_draining && VmState::Draining.may_go_to(after, kind));
            prop_assert!(legal, "{name}: {before} -> {after}");
            prop_assert!(vm.deadline().is_none() || !ended);
        }
    }
}
