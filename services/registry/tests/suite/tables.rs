//! The state tables, through the real database.

use blixard::{
    job::JobState,
    pb::{common::v1 as pb, registry::v1 as wire},
    vm::{VmKind, VmState},
};

use crate::kit::{
    Kit, assign, create_job, create_vm, finished, job_state, lost, refusal, resize, start_attempt, transition, uuid,
    vm_state,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_vm_transition_is_answered_as_the_state_table_says() {
    let mut kit = Kit::start().await;
    for kind in [VmKind::Ephemeral, VmKind::Service] {
        for from in VmState::ALL {
            if kind == VmKind::Ephemeral && from == VmState::Idle {
                continue;
            }
            for to in VmState::ALL {
                let id = kit.vm_in(kind, from).await;
                let before = kit.vm(&id).await;
                let answer = kit.client.transition_vm(transition(&id, to)).await;
                let after = kit.vm(&id).await;
                if from == to {
                    assert_eq!(answer.unwrap().into_inner().vm, Some(before), "{kind} {from} -> {to}");
                } else if from.may_go_to(to, kind) {
                    assert_eq!(answer.unwrap().into_inner().vm, Some(after.clone()), "{kind} {from} -> {to}");
                    assert_eq!((vm_state(&after), after.generation), (to, before.generation + 1));
                    assert!(after.revision > before.revision);
                } else {
                    assert_eq!(refusal(answer), "ILLEGAL_TRANSITION", "{kind} {from} -> {to}");
                    assert_eq!(after, before);
                }
            }
        }
    }
    assert_eq!(refusal(kit.client.transition_vm(transition(&uuid(), VmState::Ready)).await), "VM_NOT_FOUND");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transition_names_the_generation_it_expects() {
    let mut kit = Kit::start().await;
    let id = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let expecting = |expected_generation| wire::TransitionVmRequest {
        expected_generation,
        reason: "told so".into(),
        ..transition(&id, VmState::Draining)
    };
    assert_eq!(refusal(kit.client.transition_vm(expecting(1)).await), "STALE_GENERATION");
    let vm = kit.client.transition_vm(expecting(2)).await.unwrap().into_inner().vm.unwrap();
    assert_eq!((vm_state(&vm), vm.generation, vm.reason.as_str()), (VmState::Draining, 3, "told so"));
    // Where it is already, the generation does not matter.
    assert_eq!(kit.client.transition_vm(expecting(2)).await.unwrap().into_inner().vm, Some(vm));
    kit.stop().await;
}

fn shape(vm: &pb::Vm) -> (u32, u32) {
    let config = vm.config.as_ref().unwrap();
    (config.vcpus(), config.memory_mib())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_up_has_another_shape_with_its_event_and_one_that_is_not_keeps_its_own() {
    let mut kit = Kit::start().await;
    for state in VmState::ALL {
        let id = kit.vm_in(VmKind::Service, state).await;
        let before = kit.vm(&id).await;
        // As it is on record already: no change, whatever its state.
        assert_eq!(kit.client.resize_vm(resize(&id, 2, 512)).await.unwrap().into_inner().vm, Some(before.clone()));
        let answer = kit.client.resize_vm(resize(&id, 4, 640)).await;
        let after = kit.vm(&id).await;
        if !state.is_running() {
            assert_eq!((refusal(answer), after), ("VM_NOT_ACCEPTING", before), "{state}");
            continue;
        }
        assert_eq!(answer.unwrap().into_inner().vm, Some(after.clone()), "{state}");
        assert_eq!((vm_state(&after), shape(&after)), (state, (4, 640)));
        assert_eq!((after.generation, after.job_id.clone()), (before.generation + 1, before.job_id));
        assert_eq!(after.reason, "resized from 2 vCPUs, 512 MiB to 4 vCPUs, 640 MiB");
        let events = wire::ListVmEventsRequest { vm_id: id.clone(), ..Default::default() };
        let newest = kit.client.list_vm_events(events).await.unwrap().into_inner().events.remove(0);
        assert_eq!((newest.from_state, newest.to_state), (after.state, after.state));
        assert_eq!((newest.reason, newest.revision), (after.reason, after.revision));
    }
    assert_eq!(refusal(kit.client.resize_vm(resize(&uuid(), 4, 640)).await), "VM_NOT_FOUND");
    for wrong in [(0, 640), (65, 640), (4, 95)] {
        let id = kit.vm_in(VmKind::Service, VmState::Ready).await;
        assert_eq!(refusal(kit.client.resize_vm(resize(&id, wrong.0, wrong.1)).await), "INVALID_FIELD");
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resize_names_the_generation_it_expects_and_what_was_asked_for_first_stays_known() {
    let mut kit = Kit::start().await;
    let id = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let expecting = |expected_generation| wire::ResizeVmRequest { expected_generation, ..resize(&id, 1, 512) };
    assert_eq!(refusal(kit.client.resize_vm(expecting(1)).await), "STALE_GENERATION");
    let vm = kit.client.resize_vm(expecting(2)).await.unwrap().into_inner().vm.unwrap();
    assert_eq!((shape(&vm), vm.generation), ((1, 512), 3));
    // Where it is already, the generation does not matter.
    assert_eq!(kit.client.resize_vm(expecting(2)).await.unwrap().into_inner().vm, Some(vm.clone()));
    kit.restart().await;
    assert_eq!(kit.vm(&id).await, vm);
    // The request that made it is still that request, and one for what it is now is not.
    let again = kit.client.create_vm(create_vm(&id, VmKind::Service)).await;
    assert_eq!(again.unwrap().into_inner().vm, Some(vm.clone()));
    let other = wire::CreateVmRequest { config: vm.config.clone(), ..create_vm(&id, VmKind::Service) };
    assert_eq!(refusal(kit.client.create_vm(other).await), "REQUEST_ID_REUSED");
    kit.stop().await;
}

/// What can be asked of a job.
const INPUTS: [&str; 9] = [
    "assign next",
    "assign again",
    "assign stale",
    "start",
    "succeed",
    "lost unstarted",
    "lost started",
    "cancel",
    "fail",
];

async fn apply(kit: &mut Kit, input: &str, job: &pb::Job, fresh_vm: &str) -> Result<pb::Job, tonic::Status> {
    let (id, attempt) = (job.id.as_str(), job.attempt.max(1));
    let client = &mut kit.client;
    let job = match input {
        "assign next" => client.assign_job(assign(id, fresh_vm, job.attempt + 1)).await?.into_inner().job,
        "assign again" => {
            let vm = if job.vm_id.is_empty() { fresh_vm } else { &job.vm_id };
            client.assign_job(assign(id, vm, attempt)).await?.into_inner().job
        }
        "assign stale" => client.assign_job(assign(id, fresh_vm, job.attempt + 2)).await?.into_inner().job,
        "start" => client.start_attempt(start_attempt(id, attempt)).await?.into_inner().job,
        "succeed" => client.finish_attempt(finished(id, attempt, JobState::Succeeded)).await?.into_inner().job,
        "lost unstarted" => client.finish_attempt(lost(id, attempt, false)).await?.into_inner().job,
        "lost started" => client.finish_attempt(lost(id, attempt, true)).await?.into_inner().job,
        "cancel" => {
            let request = wire::CancelJobRequest { job_id: id.into(), reason: "enough".into(), ..Default::default() };
            client.cancel_job(request).await?.into_inner().job
        }
        "fail" => {
            let request =
                wire::FailQueuedJobRequest { job_id: id.into(), reason: "can't".into(), ..Default::default() };
            client.fail_queued_job(request).await?.into_inner().job
        }
        other => panic!("{other}"),
    };
    Ok(job.unwrap())
}

/// A job in each place where it can be, by name.
async fn job_at(kit: &mut Kit, place: &str) -> String {
    let (id, _) = match place {
        "Queued" => return kit.queued_job(1).await,
        "requeued" | "Failed by loss" => kit.assigned_job(VmKind::Service, 1).await,
        "Running, 2 tries" => kit.assigned_job(VmKind::Service, 2).await,
        _ => kit.assigned_job(VmKind::Ephemeral, 1).await,
    };
    let client = &mut kit.client;
    let cancel = wire::CancelJobRequest { job_id: id.clone(), reason: "enough".into(), ..Default::default() };
    match place {
        "Assigned" => {}
        "Running" | "Running, 2 tries" => drop(client.start_attempt(start_attempt(&id, 1)).await.unwrap()),
        "cancelling" => drop(client.cancel_job(cancel).await.unwrap()),
        "requeued" => drop(client.finish_attempt(lost(&id, 1, false)).await.unwrap()),
        "Failed by loss" => drop(client.finish_attempt(lost(&id, 1, true)).await.unwrap()),
        "Succeeded" => drop(client.finish_attempt(finished(&id, 1, JobState::Succeeded)).await.unwrap()),
        "Cancelled" => {
            client.cancel_job(cancel).await.unwrap();
            client.finish_attempt(finished(&id, 1, JobState::Cancelled)).await.unwrap();
        }
        other => panic!("{other}"),
    }
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn every_input_to_a_job_is_accepted_ignored_or_denied_as_documented() {
    // Place × input: the state after it, `=` when nothing changes, or the reason of the refusal.
    const TABLE: &str = "
    place            | assign next         | assign again   | assign stale  | start         | succeed       | lost unstarted | lost started  | cancel    | fail
    Queued           | Assigned            | Assigned       | STALE_ATTEMPT | STALE_ATTEMPT | STALE_ATTEMPT | STALE_ATTEMPT  | STALE_ATTEMPT | Cancelled | Failed
    Assigned         | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | Running       | Succeeded     | Queued         | Failed        | Assigned  | ILLEGAL_TRANSITION
    Running          | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | =             | Succeeded     | Failed         | Failed        | Running   | ILLEGAL_TRANSITION
    Running, 2 tries | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | =             | Succeeded     | Queued         | Queued        | Running   | ILLEGAL_TRANSITION
    cancelling       | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | Running       | Succeeded     | Cancelled      | Cancelled     | =         | ILLEGAL_TRANSITION
    requeued         | Assigned            | STALE_ATTEMPT  | STALE_ATTEMPT | STALE_ATTEMPT | STALE_ATTEMPT | =              | =             | Cancelled | Failed
    Failed by loss   | ILLEGAL_TRANSITION  | STALE_ATTEMPT  | STALE_ATTEMPT | STALE_ATTEMPT | STALE_ATTEMPT | =              | =             | =         | ILLEGAL_TRANSITION
    Succeeded        | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | =             | =             | STALE_ATTEMPT  | STALE_ATTEMPT | =         | ILLEGAL_TRANSITION
    Cancelled        | ILLEGAL_TRANSITION  | =              | STALE_ATTEMPT | =             | STALE_ATTEMPT | STALE_ATTEMPT  | STALE_ATTEMPT | =         | ILLEGAL_TRANSITION";
    let mut kit = Kit::start().await;
    for line in TABLE.lines().skip(2) {
        let mut cells = line.split('|').map(str::trim);
        let place = cells.next().unwrap();
        for (input, expected) in INPUTS.into_iter().zip(cells) {
            let id = job_at(&mut kit, place).await;
            let fresh_vm = kit.vm_in(VmKind::Service, VmState::Ready).await;
            let before = kit.job(&id).await;
            let answer = apply(&mut kit, input, &before, &fresh_vm).await;
            let after = kit.job(&id).await;
            let context = format!("{place} × {input}: {answer:?}");
            match expected {
                "=" => assert_eq!((answer.unwrap(), &after), (before.clone(), &before), "{context}"),
                reason if reason.len() > 1 && reason == reason.to_uppercase() => {
                    assert_eq!(refusal(answer), reason, "{context}");
                    assert_eq!(after, before, "{context}");
                }
                state => {
                    assert_eq!(answer.unwrap(), after, "{context}");
                    assert_eq!(job_state(&after).as_str(), state, "{context}");
                    assert_eq!(after.generation, before.generation + 1, "{context}");
                    let (from, to) = (job_state(&before), job_state(&after));
                    assert!(from == to || from.may_go_to(to), "{context}");
                    assert_eq!(after.finished_at.is_some(), to.is_terminal(), "{context}");
                }
            }
        }
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn assigning_moves_job_and_vm_or_neither() {
    let mut kit = Kit::start().await;
    let job = kit.queued_job(1).await;
    for state in [VmState::Starting, VmState::Busy, VmState::Draining, VmState::Terminated, VmState::Failed] {
        let vm = kit.vm_in(VmKind::Service, state).await;
        let before = kit.vm(&vm).await;
        assert_eq!(refusal(kit.client.assign_job(assign(&job, &vm, 1)).await), "VM_NOT_ACCEPTING", "{state}");
        assert_eq!(kit.vm(&vm).await, before);
    }
    assert_eq!(refusal(kit.client.assign_job(assign(&job, &uuid(), 1)).await), "VM_NOT_FOUND");
    let vm = kit.vm_in(VmKind::Service, VmState::Idle).await;
    assert_eq!(refusal(kit.client.assign_job(assign(&uuid(), &vm, 1)).await), "JOB_NOT_FOUND");
    assert_eq!(refusal(kit.client.assign_job(assign(&job, &vm, 2)).await), "STALE_ATTEMPT");
    assert_eq!(vm_state(&kit.vm(&vm).await), VmState::Idle);

    let assigned = kit.client.assign_job(assign(&job, &vm, 1)).await.unwrap().into_inner().job.unwrap();
    assert_eq!((assigned.vm_id.as_str(), assigned.node_id.as_str(), assigned.attempt), (vm.as_str(), "node-1", 1));
    assert_eq!(assigned.assignment(), pb::AssignmentKind::Service);
    let busy = kit.vm(&vm).await;
    assert_eq!((vm_state(&busy), busy.job_id.as_str()), (VmState::Busy, job.as_str()));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finishing_frees_the_vm_as_its_kind_says_and_leaves_one_that_moved_on() {
    let mut kit = Kit::start().await;
    for (kind, expected) in [(VmKind::Service, VmState::Idle), (VmKind::Ephemeral, VmState::Draining)] {
        let (job, vm) = kit.assigned_job(kind, 1).await;
        kit.client.start_attempt(start_attempt(&job, 1)).await.unwrap();
        assert_eq!(refusal(kit.client.finish_attempt(finished(&job, 2, JobState::Failed)).await), "STALE_ATTEMPT");
        assert_eq!(vm_state(&kit.vm(&vm).await), VmState::Busy);
        let done =
            kit.client.finish_attempt(finished(&job, 1, JobState::Failed)).await.unwrap().into_inner().job.unwrap();
        assert_eq!((job_state(&done), done.log_bytes), (JobState::Failed, 6));
        assert_eq!(done.exit.as_ref().and_then(|exit| exit.exit_code), Some(1));
        let freed = kit.vm(&vm).await;
        assert_eq!((vm_state(&freed), freed.job_id.as_str()), (expected, ""));
        // The same report again changes nothing, on the VM either.
        assert_eq!(
            kit.client.finish_attempt(finished(&job, 1, JobState::Failed)).await.unwrap().into_inner().job,
            Some(done)
        );
        assert_eq!(kit.vm(&vm).await, freed);
    }
    let (job, vm) = kit.assigned_job(VmKind::Service, 1).await;
    kit.client.transition_vm(transition(&vm, VmState::Failed)).await.unwrap();
    let failed = kit.vm(&vm).await;
    assert_eq!(failed.job_id, "");
    let job = kit.client.finish_attempt(lost(&job, 1, true)).await.unwrap().into_inner().job.unwrap();
    assert_eq!((job_state(&job), job.reason.as_str()), (JobState::Failed, "its VM is gone"));
    assert_eq!(kit.vm(&vm).await, failed);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_that_never_started_do_not_count() {
    let mut kit = Kit::start().await;
    let job = kit.queued_job(2).await;
    let mut states = Vec::new();
    for (attempt, started) in [(1, false), (2, false), (3, true), (4, true)] {
        let vm = kit.vm_in(VmKind::Ephemeral, VmState::Ready).await;
        kit.client.assign_job(assign(&job, &vm, attempt)).await.unwrap();
        let after = kit.client.finish_attempt(lost(&job, attempt, started)).await.unwrap().into_inner().job.unwrap();
        states.push(job_state(&after));
        assert_eq!(after.attempt, attempt);
    }
    assert_eq!(states, [JobState::Queued, JobState::Queued, JobState::Queued, JobState::Failed]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creating_twice_returns_the_first_and_another_body_is_refused() {
    let mut kit = Kit::start().await;
    let id = uuid();
    let first = kit.client.create_job(create_job(&id)).await.unwrap().into_inner();
    assert_eq!(kit.client.create_job(create_job(&id)).await.unwrap().into_inner(), first);
    let mut other = create_job(&id);
    other.spec.as_mut().unwrap().command.push("more".into());
    assert_eq!(refusal(kit.client.create_job(other).await), "REQUEST_ID_REUSED");

    let first = kit.client.create_vm(create_vm(&id, VmKind::Service)).await.unwrap().into_inner();
    assert_eq!(kit.client.create_vm(create_vm(&id, VmKind::Service)).await.unwrap().into_inner(), first);
    assert_eq!(refusal(kit.client.create_vm(create_vm(&id, VmKind::Ephemeral)).await), "REQUEST_ID_REUSED");
    let elsewhere = wire::CreateVmRequest { node_id: "node-2".into(), ..create_vm(&id, VmKind::Service) };
    assert_eq!(refusal(kit.client.create_vm(elsewhere).await), "REQUEST_ID_REUSED");
    kit.stop().await;
}
