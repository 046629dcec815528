//! Lists, pages and events.

use std::collections::BTreeMap;

use blixard::{
    job::JobState,
    pb::{common::v1 as pb, registry::v1 as wire},
    vm::{VmKind, VmState},
};
use hiqlite::rusqlite::Connection;

use crate::{
    kit::{Kit, assign, config, finished, lost, refusal, spec, start_attempt, transition, uuid, vm_state},
    watches::Watch,
};

pub(crate) fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_filter_by_state_kind_node_and_labels_newest_first() {
    let mut kit = Kit::start().await;
    let mut ids = Vec::new();
    for (node, kind, pairs) in [
        ("node-1", VmKind::Service, vec![("team", "a"), ("it's \"odd\"", "\\,\":{")]),
        ("node-2", VmKind::Service, vec![("team", "b")]),
        ("node-1", VmKind::Ephemeral, vec![("team", "a")]),
    ] {
        let id = uuid();
        let config = pb::VmConfig { labels: labels(&pairs), ..config(kind) };
        let request = wire::CreateVmRequest {
            vm_id: id.clone(),
            config: Some(config),
            node_id: node.into(),
            ..Default::default()
        };
        kit.client.create_vm(request).await.unwrap();
        ids.push(id);
    }
    kit.client.transition_vm(transition(&ids[1], VmState::Failed)).await.unwrap();
    let mut list = async |request: wire::ListVmsRequest| -> Vec<usize> {
        let vms = kit.client.list_vms(request).await.unwrap().into_inner().vms;
        vms.iter().map(|vm| ids.iter().position(|id| *id == vm.id).unwrap()).collect()
    };
    assert_eq!(list(wire::ListVmsRequest::default()).await, [2, 1, 0]);
    let states = vec![pb::VmState::Failed.into(), pb::VmState::Ready.into()];
    assert_eq!(list(wire::ListVmsRequest { states, ..Default::default() }).await, [1]);
    let kind = pb::VmKind::Service.into();
    assert_eq!(list(wire::ListVmsRequest { kind, ..Default::default() }).await, [1, 0]);
    assert_eq!(list(wire::ListVmsRequest { node_id: "node-1".into(), ..Default::default() }).await, [2, 0]);
    let of = |pairs: &[(&str, &str)]| wire::ListVmsRequest { labels: labels(pairs), ..Default::default() };
    assert_eq!(list(of(&[("team", "a")])).await, [2, 0]);
    assert_eq!(list(of(&[("team", "a"), ("it's \"odd\"", "\\,\":{")])).await, [0]);
    assert_eq!(list(of(&[("team", "c")])).await, [0_usize; 0]);
    let all = wire::ListVmsRequest { kind, node_id: "node-1".into(), ..of(&[("team", "a")]) };
    assert_eq!(list(all).await, [0]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_show_everything_once_while_rows_are_added() {
    let mut kit = Kit::start().await;
    let mut expected = Vec::new();
    for _ in 0..25 {
        expected.push(kit.queued_job(1).await);
    }
    expected.reverse();
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request = wire::ListJobsRequest { page_size: 10, page_token: token, ..Default::default() };
        let page = kit.client.list_jobs(request).await.unwrap().into_inner();
        assert_eq!(page.revision, 25 + u64::try_from(seen.len() / 10).unwrap());
        seen.extend(page.jobs.into_iter().map(|job| job.id));
        kit.queued_job(1).await;
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, expected);

    for bad in ["nonsense", "v0000000000000001"] {
        let request = wire::ListJobsRequest { page_token: bad.into(), ..Default::default() };
        let error = kit.client.list_jobs(request).await.unwrap_err();
        assert!(error.message().starts_with("page_token"), "{error}");
    }
    let request = wire::ListJobsRequest { page_size: 1001, ..Default::default() };
    assert_eq!(refusal(kit.client.list_jobs(request).await), "INVALID_FIELD");
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_ends_before_it_outgrows_a_message() {
    let mut kit = Kit::start().await;
    for _ in 0..12 {
        let spec = pb::JobSpec {
            command: vec!["x".repeat(250 << 10)],
            env: labels(&[("BIG", &"y".repeat(250 << 10))]),
            ..spec()
        };
        kit.client
            .create_job(wire::CreateJobRequest { job_id: uuid(), spec: Some(spec), ..Default::default() })
            .await
            .unwrap();
    }
    let (mut seen, mut pages, mut token) = (0, 0, String::new());
    loop {
        let request = wire::ListJobsRequest { page_token: token, ..Default::default() };
        let page = kit.client.list_jobs(request).await.unwrap().into_inner();
        (seen, pages, token) = (seen + page.jobs.len(), pages + 1, page.next_page_token);
        if token.is_empty() {
            break;
        }
    }
    assert!(seen == 12 && pages > 1, "{seen} in {pages}");
    // A watch passes the same jobs on one by one.
    let mut watch = Watch::begin(&mut kit, 1).await;
    watch.until_synced().await;
    assert_eq!(watch.revisions, (1..=12).collect::<Vec<_>>());
    kit.stop().await;
}

/// A life with every kind of change in it.
pub(crate) async fn a_busy_day(kit: &mut Kit) -> [String; 2] {
    let node = pb::Node { id: "node-1".into(), endpoint: "http://h:1".into(), max_vms: 4, ..Default::default() };
    kit.client
        .register_node(wire::RegisterNodeRequest { node: Some(node.clone()), ..Default::default() })
        .await
        .unwrap();
    kit.client.register_node(wire::RegisterNodeRequest { node: Some(node), ..Default::default() }).await.unwrap();
    let (job, vm) = kit.assigned_job(VmKind::Service, 2).await;
    kit.client.start_attempt(start_attempt(&job, 1)).await.unwrap();
    kit.client.finish_attempt(lost(&job, 1, true)).await.unwrap();
    kit.client.assign_job(assign(&job, &vm, 2)).await.unwrap();
    kit.client.start_attempt(start_attempt(&job, 2)).await.unwrap();
    kit.client
        .cancel_job(wire::CancelJobRequest { job_id: job.clone(), reason: "enough".into(), ..Default::default() })
        .await
        .unwrap();
    kit.client.finish_attempt(finished(&job, 2, JobState::Cancelled)).await.unwrap();
    let gone = kit.vm_in(VmKind::Ephemeral, VmState::Terminated).await;
    kit.client.purge_vms(wire::PurgeVmsRequest::default()).await.unwrap();
    [vm, gone]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_has_one_event_and_replaying_them_gives_the_rows() {
    let mut kit = Kit::start().await;
    a_busy_day(&mut kit).await;
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    let mut statement =
        database.prepare("SELECT revision, entity, entity_id, from_state, to_state FROM events ORDER BY 1").unwrap();
    let mut rows = statement.query([]).unwrap();
    let (mut last, mut replayed) = (0_i64, BTreeMap::new());
    while let Some(row) = rows.next().unwrap() {
        assert_eq!(row.get::<_, i64>(0).unwrap(), last + 1, "no gap");
        last += 1;
        let (entity, id): (String, String) = (row.get(1).unwrap(), row.get(2).unwrap());
        let (from, to): (Option<String>, Option<String>) = (row.get(3).unwrap(), row.get(4).unwrap());
        assert_eq!(
            replayed.remove(&(entity.clone(), id.clone())),
            from,
            "each event begins where the one before ended"
        );
        to.map(|to| replayed.insert((entity, id), to));
    }
    let mut found = BTreeMap::new();
    for (entity, table) in [("vm", "vms"), ("job", "jobs"), ("node", "nodes")] {
        let sql = format!(
            "SELECT t.id, t.state, t.revision, (SELECT max(revision) FROM events WHERE entity_id = t.id) FROM {table} t"
        );
        let mut statement = database.prepare(&sql).unwrap();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            assert_eq!(
                row.get::<_, i64>(2).unwrap(),
                row.get::<_, i64>(3).unwrap(),
                "a row's revision is its last event's"
            );
            found.insert((entity.to_owned(), row.get::<_, String>(0).unwrap()), row.get::<_, String>(1).unwrap());
        }
    }
    assert_eq!(replayed, found);
    let counts = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner();
    assert_eq!(counts.revision, u64::try_from(last).unwrap());
    assert_eq!(counts.jobs, [wire::JobStateCount { state: pb::JobState::Cancelled.into(), count: 1 }]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_deletes_ended_vms_alone_and_keeps_their_history() {
    let mut kit = Kit::start().await;
    let alive = kit.vm_in(VmKind::Service, VmState::Ready).await;
    let failed = kit.vm_in(VmKind::Service, VmState::Failed).await;
    let ended = kit.vm_in(VmKind::Service, VmState::Terminated).await;
    let purge = |states: &[VmState], ids: &[&String]| wire::PurgeVmsRequest {
        states: states.iter().map(|state| state.to_pb().into()).collect(),
        vm_ids: ids.iter().map(|id| (*id).clone()).collect(),
        ..Default::default()
    };
    assert_eq!(refusal(kit.client.purge_vms(purge(&[VmState::Ready], &[])).await), "INVALID_FIELD");
    assert_eq!(kit.client.purge_vms(purge(&[], &[&alive])).await.unwrap().into_inner().purged, 0);
    assert_eq!(kit.client.purge_vms(purge(&[VmState::Failed], &[])).await.unwrap().into_inner().purged, 1);
    assert_eq!(kit.client.purge_vms(purge(&[], &[&alive, &ended])).await.unwrap().into_inner().purged, 1);
    assert_eq!(vm_state(&kit.vm(&alive).await), VmState::Ready);
    assert_eq!(refusal(kit.client.get_vm(wire::GetVmRequest { vm_id: failed }).await), "VM_NOT_FOUND");

    let mut history = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = wire::ListVmEventsRequest { vm_id: ended.clone(), page_size: 2, page_token };
        let page = kit.client.list_vm_events(request).await.unwrap().into_inner();
        history.extend(page.events.into_iter().map(|event| (event.from_state(), event.to_state())));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    use pb::VmState::{Draining, Starting, Terminated, Unspecified};
    let expected = [(Terminated, Unspecified), (Draining, Terminated), (Starting, Draining), (Unspecified, Starting)];
    assert_eq!(history, expected);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_registers_again_has_a_new_incarnation() {
    let mut kit = Kit::start().await;
    let node = |id: &str| pb::Node {
        id: id.into(),
        endpoint: "http://127.0.0.1:1".into(),
        driver: "process".into(),
        max_vms: 10,
        images: vec!["default".into()],
        ..Default::default()
    };
    for (id, incarnation) in [("b", 1), ("a", 1), ("b", 2), ("b", 3)] {
        let request = wire::RegisterNodeRequest { node: Some(node(id)), ..Default::default() };
        let registered = kit.client.register_node(request).await.unwrap().into_inner().node.unwrap();
        assert_eq!((registered.incarnation, registered.state()), (incarnation, pb::NodeState::Ready));
        assert_eq!(registered.images, ["default"]);
    }
    let first = wire::ListNodesRequest { page_size: 1, ..Default::default() };
    let page = kit.client.list_nodes(first).await.unwrap().into_inner();
    assert_eq!(page.nodes[0].id, "a");
    let second = wire::ListNodesRequest { page_size: 1, page_token: page.next_page_token };
    let page = kit.client.list_nodes(second).await.unwrap().into_inner();
    assert_eq!((page.nodes[0].id.as_str(), page.next_page_token.as_str()), ("b", ""));
    let nameless = wire::RegisterNodeRequest { node: Some(node("")), ..Default::default() };
    assert_eq!(refusal(kit.client.register_node(nameless).await), "INVALID_FIELD");
    kit.stop().await;
}
