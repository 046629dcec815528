//! What the engine does at each change of a VM, a job or a node: state × input, as golden tables.

use std::fmt::Write as _;

use super::*;

/// A few words for each effect.
fn words(effects: &[Effect]) -> String {
    let words = |effect: &Effect| match effect {
        Effect::CreateVm { config, node_id, .. } => format!("create {} VM on {node_id}", config.kind),
        Effect::RefuseVm { .. } => "refuse VM".to_owned(),
        Effect::Assign { attempt, .. } => format!("assign attempt {attempt}"),
        Effect::FailJob { reason, timed_out, .. } => {
            format!("{} ({reason})", if *timed_out { "time out" } else { "fail job" })
        }
        Effect::LoseAttempt { attempt, started, .. } => format!("lose attempt {attempt}, started: {started}"),
        Effect::FailVm { .. } => "fail VM".to_owned(),
        Effect::DrainVm { reason, .. } => format!("drain VM ({reason})"),
        Effect::LookUpJob { .. } => "look up job".to_owned(),
        Effect::Tell { order, .. } => match order {
            Order::Start { .. } => "tell start".to_owned(),
            Order::Stop { .. } => "tell stop".to_owned(),
            Order::Run(job) => format!("tell run {}", job.attempt),
            Order::Cancel { attempt, .. } => format!("tell cancel {attempt}"),
        },
    };
    if effects.is_empty() { "-".to_owned() } else { effects.iter().map(words).collect::<Vec<_>>().join("; ") }
}

/// A VM that was in one state and is in another, with and without a job on it.
#[test]
fn what_follows_when_a_vm_changes() {
    let mut table = String::new();
    for kind in [VmKind::Service, VmKind::Ephemeral] {
        for before in [None].into_iter().chain(VmState::ALL.into_iter().filter(|state| !state.is_terminal()).map(Some))
        {
            for after in VmState::ALL {
                if before.is_some_and(|before| !before.may_go_to(after, kind)) {
                    continue;
                }
                let mut engine = engine(settings());
                if let Some(state) = before {
                    engine.step(Timestamp(0), Input::Vm(vm(7, 2, kind, state)));
                    engine.step(Timestamp(0), Input::Told { order: OrderKey::Start(vm_id(7)), result: Ok(()) });
                }
                if before == Some(VmState::Busy) {
                    let (vm_id, node_id) = (Some(vm_id(7)), Some(node_id()));
                    let job =
                        Job { state: JobState::Running, attempt: 1, vm_id, node_id, ..queued(1, 3, spec(|_| {})) };
                    engine.step(Timestamp(0), Input::Job(job));
                }
                let effects = engine.step(Timestamp(0), Input::Vm(vm(7, 9, kind, after)));
                let before = before.map_or("-", VmState::as_str);
                writeln!(table, "{kind:9} {before:9} -> {:10} {}", after.as_str(), words(&effects)).expect("a string");
            }
        }
    }
    insta::assert_snapshot!(table);
}

/// A job that was in one state and is in another. Its VM is Busy; another is free.
#[test]
fn what_follows_when_a_job_changes() {
    let mut table = String::new();
    let earlier = [None, Some(JobState::Queued), Some(JobState::Assigned), Some(JobState::Running)];
    for cancel_requested in [false, true] {
        for before in earlier {
            for after in JobState::ALL {
                if before.is_some_and(|before| !before.may_go_to(after)) {
                    continue;
                }
                let job = |state: JobState, revision| {
                    let given = matches!(state, JobState::Assigned | JobState::Running);
                    let (attempt, vm_id) = (u32::from(given), given.then(|| vm_id(7)));
                    let node_id = given.then(node_id);
                    let cancel_requested = cancel_requested && given;
                    Job { state, attempt, vm_id, node_id, cancel_requested, ..queued(1, revision, spec(|_| {})) }
                };
                let mut engine = engine(settings());
                engine.step(Timestamp(0), Input::Vm(vm(7, 2, VmKind::Service, VmState::Busy)));
                if let Some(before) = before {
                    engine.step(Timestamp(0), Input::Job(job(before, 4)));
                }
                engine.step(Timestamp(0), Input::Vm(vm(8, 3, VmKind::Service, VmState::Idle)));
                let effects = engine.step(Timestamp(0), Input::Job(job(after, 9)));
                let (before, cancel) =
                    (before.map_or("-", JobState::as_str), if cancel_requested { "cancel" } else { "" });
                writeln!(table, "{cancel:6} {before:8} -> {:9} {}", after.as_str(), words(&effects)).expect("a string");
            }
        }
    }
    insta::assert_snapshot!(table);
}

/// A node that was in one state and is in another, with a Starting, a free and a Busy VM, and jobs that wait for VMs.
#[test]
fn what_follows_when_a_node_changes() {
    let mut table = String::new();
    for before in NodeState::ALL {
        for after in NodeState::ALL {
            let mut engine = engine(Settings { max_vms: 10, ..settings() });
            engine.step(Timestamp(0), Input::Node(Node { state: before, ..node(2, 1) }));
            engine.step(Timestamp(0), Input::Vm(vm(7, 3, VmKind::Service, VmState::Idle)));
            engine.step(Timestamp(0), Input::Vm(vm(8, 4, VmKind::Service, VmState::Busy)));
            engine.step(Timestamp(0), Input::Vm(vm(9, 5, VmKind::Service, VmState::Starting)));
            let (vm_id, place) = (Some(vm_id(8)), Some(node_id()));
            let job =
                Job { state: JobState::Assigned, attempt: 1, vm_id, node_id: place, ..queued(1, 6, spec(|_| {})) };
            engine.step(Timestamp(0), Input::Job(job));
            engine.step(Timestamp(0), Input::Job(queued(2, 7, spec(|s| s.isolation = Isolation::Maximum))));
            engine.step(Timestamp(0), Input::Job(queued(3, 8, spec(|_| {}))));
            let drain_deadline = (after == NodeState::Draining).then_some(Timestamp(60_000));
            let incarnation = 1 + u64::from(before == NodeState::Lost && after != NodeState::Lost);
            let changed = Node { state: after, drain_deadline, ..node(9, incarnation) };
            let effects = engine.step(Timestamp(0), Input::Node(changed));
            writeln!(table, "{before:8} -> {after:8} at once:   {}", words(&effects)).expect("a string");
            let effects = engine.step(Timestamp(60_000), Input::Tick);
            writeln!(table, "{:20} in a minute: {}", "", words(&effects)).expect("a string");
        }
    }
    insta::assert_snapshot!(table);
}
