//! Each check is told a story in which it must speak up, and one in which it must not.

use std::collections::{BTreeMap, BTreeSet};

use blixard::{
    job::{ExitKind, ExitStatus, Isolation, JobSpec, Retry, RetryOn},
    time::Timestamp,
    vm::{VmConfig, VmKind},
};
use bytes::Bytes;
use uuid::Uuid;

use super::*;

fn job(state: JobState, attempt: u32, generation: u64) -> Job {
    let spec = JobSpec {
        command: vec!["work".to_owned()],
        env: BTreeMap::new(),
        working_dir: "/".to_owned(),
        image: "default".to_owned(),
        vcpus: 1,
        memory_mib: 256,
        isolation: Isolation::Standard,
        priority: 0,
        timeout: None,
        max_attempts: 2,
        labels: BTreeMap::new(),
        node_id: None,
        target_vm_id: None,
        retry: Retry { on: BTreeSet::from([RetryOn::Lost]), backoff: Duration::ZERO, max_backoff: Duration::ZERO },
        queue_timeout: None,
        start_timeout: None,
        node_labels: BTreeMap::new(),
        preferred_node_labels: BTreeMap::new(),
        group_id: None,
        array_index: None,
        depends_on: vec![],
        artifacts: vec![],
        result_ttl: None,
        input_digest: Bytes::new(),
        egress: None,
        volumes: Default::default(),
    };
    Job {
        id: JobId(Uuid::from_u128(1)),
        spec,
        state,
        attempt,
        vm_id: None,
        node_id: None,
        assignment: None,
        cancel_requested: false,
        exit: None,
        reason: String::new(),
        log_bytes: 0,
        generation,
        revision: generation,
        created_at: Timestamp(0),
        assigned_at: None,
        started_at: None,
        finished_at: None,
        queued_at: Timestamp(0),
        not_before: None,
        attempts_started: attempt,
    }
}

fn vm(number: u128, memory_mib: u32) -> Vm {
    Vm {
        id: VmId(Uuid::from_u128(number)),
        config: VmConfig {
            kind: VmKind::Service,
            image: "default".to_owned(),
            vcpus: 1,
            memory_mib,
            labels: BTreeMap::from([(OWNER_LABEL.to_owned(), "scheduler".to_owned())]),
            node_id: None,
            egress: Default::default(),
            volumes: Default::default(),
        },
        state: VmState::Starting,
        node_id: node().id,
        job_id: None,
        reason: String::new(),
        generation: 1,
        revision: 1,
        created_at: Timestamp(0),
        updated_at: Timestamp(0),
        jobs_assigned: 0,
        stop_grace: None,
    }
}

/// Room for two VMs of 512 MiB in all.
fn node() -> Node {
    Node {
        id: NodeId::parse("", "n").unwrap(),
        state: NodeState::Ready,
        endpoint: "http://n".to_owned(),
        driver: String::new(),
        vcpus: 1,
        memory_mib: 512,
        max_vms: 2,
        images: vec![],
        incarnation: 1,
        revision: 1,
        registered_at: Timestamp(0),
        labels: BTreeMap::new(),
        reason: String::new(),
        updated_at: Timestamp(0),
        drain_deadline: None,
        wanted: NodeState::Ready,
        pressure: Default::default(),
        volumes: vec![],
        scratch_mib: 0,
    }
}

fn exit(run: RunNumber) -> Option<ExitStatus> {
    Some(ExitStatus { kind: ExitKind::Code(0), user_time_ms: run, system_time_ms: 0, max_rss_kib: 0 })
}

/// What the checker says to a story.
fn told(story: impl FnOnce(&mut Checker)) -> Option<String> {
    let mut checker = Checker::new(3);
    checker.node_changed(node());
    story(&mut checker);
    checker.broken().map(str::to_owned)
}

/// The job is given its first attempt.
fn assigned(checker: &mut Checker, attempt: u32) {
    checker.job_changed(job(JobState::Queued, 0, 1));
    checker.job_changed(job(JobState::Assigned, attempt, 2));
}

/// An attempt of the job is lost, and it is given the next.
fn again(checker: &mut Checker, attempt: u32) {
    let generation = u64::from(attempt) * 2 + 1;
    checker.job_changed(job(JobState::Queued, attempt, generation));
    checker.job_changed(Job {
        attempts_started: 2.min(attempt + 1),
        ..job(JobState::Assigned, attempt + 1, generation + 1)
    });
}

const NOW: Instant = Instant(0);
const VM: VmId = VmId(Uuid::from_u128(7));

#[test]
fn a_job_that_goes_the_usual_way_is_fine() {
    let said = told(|checker| {
        let id = job(JobState::Queued, 0, 1).id;
        checker.asked(id, id);
        checker.job_changed(job(JobState::Queued, 0, 1));
        checker.acknowledged(id);
        checker.vm_changed(NOW, vm(7, 256));
        checker.machine_started(&node().id, VM, 256);
        checker.job_changed(Job { attempts_started: 0, ..job(JobState::Assigned, 1, 2) });
        let run = checker.command_started(id, 1, VM);
        checker.job_changed(job(JobState::Running, 1, 3));
        checker.command_ended(id, 1);
        checker.job_changed(Job { exit: exit(run), ..job(JobState::Succeeded, 1, 4) });
        checker.vm_changed(NOW, Vm { state: VmState::Failed, generation: 2, ..vm(7, 256) });
        checker.machine_ended(VM);
        assert_eq!(checker.unsettled(), Vec::<String>::new());
    });
    assert_eq!(said, None);
}

#[test]
fn two_live_attempts_of_a_job_are_seen_and_one_after_the_other_is_fine() {
    let id = job(JobState::Queued, 0, 1).id;
    let begin = |checker: &mut Checker| {
        assigned(checker, 1);
        checker.command_started(id, 1, VM);
    };
    let said = told(|checker| {
        begin(checker);
        again(checker, 1);
        checker.command_started(id, 2, VM);
    });
    assert!(said.unwrap().starts_with("two live attempts"));
    let ended = told(|checker| {
        begin(checker);
        checker.command_ended(id, 1);
        again(checker, 1);
        checker.command_started(id, 2, VM);
    });
    let died = told(|checker| {
        begin(checker);
        checker.machine_ended(VM);
        again(checker, 1);
        checker.command_started(id, 2, VM);
    });
    assert_eq!((ended, died), (None, None));
}

#[test]
fn an_attempt_that_starts_when_it_is_over_is_seen() {
    let id = job(JobState::Queued, 0, 1).id;
    let said = told(|checker| {
        assigned(checker, 1);
        again(checker, 1);
        checker.command_started(id, 1, VM);
    });
    assert!(
        said.unwrap()
            .contains("attempt 1 of job 00000000-0000-0000-0000-000000000001 starts, which is Assigned at attempt 2")
    );
}

#[test]
fn an_attempt_that_starts_twice_or_once_too_often_is_seen() {
    let id = job(JobState::Queued, 0, 1).id;
    let run = |checker: &mut Checker, attempt| {
        checker.command_started(id, attempt, VM);
        checker.command_ended(id, attempt);
    };
    let said = |attempts: &[u32]| {
        told(|checker| {
            assigned(checker, 1);
            for (at, attempt) in attempts.iter().enumerate() {
                if at > 0 && attempts[at - 1] < *attempt {
                    again(checker, attempts[at - 1]);
                }
                run(checker, *attempt);
            }
        })
    };
    assert_eq!(said(&[1, 2]), None);
    assert!(said(&[1, 1]).unwrap().contains("started twice"));
    assert!(said(&[1, 2, 3]).unwrap().contains("started 3 times; it may 2 times"));
}

#[test]
fn the_result_of_another_run_is_seen() {
    let id = job(JobState::Queued, 0, 1).id;
    let said = told(|checker| {
        assigned(checker, 1);
        let first = checker.command_started(id, 1, VM);
        checker.command_ended(id, 1);
        again(checker, 1);
        checker.command_started(id, 2, VM);
        checker.job_changed(Job { exit: exit(first), ..job(JobState::Succeeded, 2, 5) });
    });
    assert!(said.unwrap().contains("the result of another run"));
}

#[test]
fn an_attempt_that_started_and_was_not_counted_is_seen() {
    let id = job(JobState::Queued, 0, 1).id;
    let said = told(|checker| {
        checker.job_changed(job(JobState::Queued, 0, 1));
        checker.job_changed(Job { attempts_started: 0, ..job(JobState::Assigned, 1, 2) });
        checker.command_started(id, 1, VM);
        checker.job_changed(Job { attempts_started: 0, ..job(JobState::Failed, 1, 3) });
    });
    assert!(said.unwrap().contains("counts 0 started attempts; 1 were seen"));
}

#[test]
fn a_job_that_is_acknowledged_and_not_on_record_is_seen() {
    assert!(told(|checker| checker.acknowledged(job(JobState::Queued, 0, 1).id)).unwrap().contains("not on record"));
}

#[test]
fn what_a_scheduler_writes_that_was_replaced_is_seen() {
    let wrote = |epoch| {
        told(|checker| {
            checker.leads(1);
            checker.leads(2);
            checker.wrote(epoch);
        })
    };
    assert_eq!((wrote(2), wrote(0)), (None, None));
    assert!(wrote(1).unwrap().contains("a scheduler of epoch 1 wrote"));
}

#[test]
fn one_wish_that_became_two_jobs_is_seen() {
    let (one, two) = (job(JobState::Queued, 0, 1), JobId(Uuid::from_u128(2)));
    let said = told(|checker| {
        checker.asked(one.id, one.id);
        checker.asked(one.id, two);
        checker.job_changed(one.clone());
        checker.job_changed(Job { id: two, ..one });
    });
    assert!(said.unwrap().contains("one request became two jobs"));
}

#[test]
fn steps_that_the_tables_do_not_have_are_seen() {
    let steps = |first: Job, second: Job| {
        told(|checker| {
            checker.job_changed(first);
            checker.job_changed(second);
        })
    };
    let queued = || job(JobState::Queued, 0, 1);
    assert!(steps(queued(), job(JobState::Running, 0, 2)).unwrap().contains("from Queued to Running"));
    assert!(steps(queued(), job(JobState::Assigned, 1, 3)).unwrap().contains("generation 1 is followed by 3"));
    assert!(steps(queued(), job(JobState::Assigned, 2, 2)).unwrap().contains("attempt 0 is followed by 2"));
    assert!(
        told(|checker| checker.job_changed(job(JobState::Assigned, 1, 1))).unwrap().contains("it begins as Assigned")
    );
    let busy = Vm { state: VmState::Busy, generation: 2, ..vm(1, 256) };
    let said = told(|checker| {
        checker.vm_changed(NOW, vm(1, 256));
        checker.vm_changed(NOW, busy);
    });
    assert!(said.unwrap().contains("from Starting to Busy"));
}

#[test]
fn more_than_a_node_holds_is_seen_on_record_and_in_its_machines() {
    let on_record = |sizes: &[u32]| {
        told(|checker| {
            for (number, size) in (1u128..).zip(sizes) {
                checker.vm_changed(NOW, vm(number, *size));
            }
        })
    };
    assert_eq!(on_record(&[256, 256]), None);
    assert!(on_record(&[256, 512]).unwrap().contains("more than node n holds"));
    assert!(on_record(&[96, 96, 96]).unwrap().contains("more than node n holds"));
    assert!(on_record(&[96, 96, 96, 96]).is_some());
    let machines = told(|checker| {
        for number in [1, 2, 3] {
            checker.machine_started(&node().id, VmId(Uuid::from_u128(number)), 96);
        }
    });
    assert!(machines.unwrap().contains("holds 3 machines"));
    let again = told(|checker| {
        checker.vm_changed(NOW, vm(1, 512));
        checker.vm_changed(NOW, Vm { state: VmState::Failed, generation: 2, ..vm(1, 512) });
        checker.vm_changed(NOW, vm(2, 512));
    });
    assert_eq!(again, None, "what has ended holds nothing");
    let users = |now| {
        told(|checker| {
            let mut of_a_user = vm(1, 512);
            of_a_user.config.labels.clear();
            checker.vm_changed(NOW, of_a_user);
            checker.vm_changed(now, vm(2, 512));
        })
    };
    assert_eq!(users(Instant(59_000_000)), None, "who placed it may not have heard of the other yet");
    assert!(users(Instant(61_000_000)).is_some());
}

#[test]
fn what_is_open_after_the_faults_is_named() {
    let mut checker = Checker::new(9);
    checker.node_changed(node());
    let id = job(JobState::Queued, 0, 1).id;
    checker.job_changed(job(JobState::Queued, 0, 1));
    checker.command_started(id, 1, VM);
    checker.vm_changed(NOW, vm(1, 256));
    checker.machine_started(&node().id, VmId(Uuid::from_u128(2)), 96);
    let open = checker.unsettled().join("\n");
    for part in [
        "is Queued at attempt 0",
        "still runs in VM",
        "no machine of node n",
        "not on record as living",
        "still Starting",
    ] {
        assert!(open.contains(part), "{part} in {open}");
    }
}
