//! What is forgotten, when, and who is told.

use std::time::{Duration, Instant};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    pb::registry::v1 as wire,
    vm::{VmKind, VmState},
};
use hiqlite::rusqlite::Connection;

use crate::{
    kit::{Kit, finished, refusal, transition},
    watches::{Watch, newest},
};

const LONG: Duration = Duration::from_secs(365 * 24 * 3600);
const SOON: Duration = Duration::from_millis(10);

/// The oldest event that is left.
fn oldest_event(kit: &Kit) -> Option<i64> {
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    database.query_row("SELECT min(revision) FROM events", [], |row| row.get(0)).unwrap()
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(SOON).await;
    }
}

async fn watch_from(kit: &mut Kit, start_revision: u64) -> Result<(), Error> {
    let request = wire::WatchRequest { start_revision, ..Default::default() };
    kit.client.watch(request).await.map(drop).map_err(|status| Error::from_status(&status))
}

#[tokio::test(flavor = "multi_thread")]
async fn events_beyond_the_number_are_compacted_and_a_watch_from_there_is_told_where_to_begin() {
    let mut kit = Kit::start_with(|config| {
        config.retention.max_events = 10;
        config.retention.look_every = SOON;
    })
    .await;
    let mut follows = Watch::begin(&mut kit, 1).await;
    for _ in 0..15 {
        kit.vm_in(VmKind::Service, VmState::Ready).await;
    }
    // Whoever keeps up is not disturbed.
    follows.until(30).await;
    assert_eq!(follows.revisions, (1..=30).collect::<Vec<_>>());

    // The rest of what is too much goes with the next look.
    wait_until("20 events are gone", || oldest_event(&kit) == Some(21)).await;
    // It remembers no recent changes now.
    kit.restart().await;
    let error = watch_from(&mut kit, 20).await.unwrap_err();
    assert_eq!(error.reason, Reason::RevisionCompacted);
    assert_eq!(error.metadata.get("oldest_revision").map(String::as_str), Some("21"));
    let mut rest = Watch::begin(&mut kit, 21).await;
    rest.until_synced().await;
    assert_eq!(rest.revisions, (21..=30).collect::<Vec<_>>());
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_every_event_has_gone_by_age_the_sequence_goes_on_across_a_restart() {
    let mut kit = Kit::start_with(|config| {
        config.retention.events_for = Duration::ZERO;
        config.retention.look_every = SOON;
    })
    .await;
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    wait_until("every event is gone", || oldest_event(&kit).is_none()).await;
    kit.restart().await;
    for start in [1, 2] {
        let error = watch_from(&mut kit, start).await.unwrap_err();
        assert_eq!(error.metadata.get("oldest_revision").map(String::as_str), Some("3"));
    }
    let mut watch = Watch::begin(&mut kit, 3).await;
    watch.until_synced().await;
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    watch.until(4).await;
    assert_eq!(watch.revisions, [3, 4]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_long_ago_is_purged_with_an_event_and_the_rest_stays() {
    let mut kit = Kit::start_with(|config| {
        config.retention.ended_for = LONG;
        config.retention.look_every = SOON;
    })
    .await;
    let (mut vms, mut jobs) = (Vec::new(), Vec::new());
    for state in [VmState::Ready, VmState::Terminated, VmState::Failed, VmState::Draining] {
        vms.push(kit.vm_in(VmKind::Ephemeral, state).await);
    }
    jobs.push(kit.queued_job(1).await);
    for state in [JobState::Succeeded, JobState::Failed] {
        let (job, _) = kit.assigned_job(VmKind::Service, 1).await;
        kit.client.finish_attempt(finished(&job, 1, state)).await.unwrap();
        jobs.push(job);
    }
    let recent = kit.vm_in(VmKind::Ephemeral, VmState::Failed).await;
    let before = newest(&mut kit).await;
    let mut watch = Watch::begin(&mut kit, 0).await;

    // A hand in the tables: all but one were made and ended last century.
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    let age = "DROP TRIGGER vms_changed; DROP TRIGGER jobs_changed;
         UPDATE vms SET updated_at = '1999-01-01T00:00:00.000Z' WHERE id <> '{recent}';
         UPDATE jobs SET updated_at = '1999-01-01T00:00:00.000Z', finished_at = iif(finished_at IS NULL, NULL, '1999-01-01T00:00:00.000Z');";
    database.busy_timeout(Duration::from_secs(5)).unwrap();
    database.execute_batch(&age.replace("{recent}", &recent)).unwrap();
    drop(database);
    watch.until(before + 4).await;
    let mut expected = vec![vms[1].clone(), vms[2].clone(), jobs[1].clone(), jobs[2].clone()];
    watch.purged.sort();
    expected.sort();
    assert_eq!(watch.purged, expected);
    assert_eq!(refusal(kit.client.get_job(wire::GetJobRequest { job_id: jobs[1].clone() }).await), "JOB_NOT_FOUND");
    assert_eq!(refusal(kit.client.transition_vm(transition(&vms[1], VmState::Ready)).await), "VM_NOT_FOUND");
    let terminated = vms.swap_remove(1);
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    let left: (u64, u64) =
        (counts.vms.iter().map(|count| count.count).sum(), counts.jobs.iter().map(|count| count.count).sum());
    assert_eq!((left, counts.revision), ((5, 1), before + 4));
    // Its history stays until the events' own time.
    let history = wire::ListVmEventsRequest { vm_id: terminated, ..Default::default() };
    let events = kit.client.list_vm_events(history).await.unwrap().into_inner().events;
    assert_eq!(events.first().map(|event| event.reason.as_str()), Some("purged"));
    kit.stop().await;
}
