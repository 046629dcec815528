//! Nodes: who is heard of, who is lost, and how they come back.

use std::time::{Duration, Instant};

use blixard::{
    error::Error,
    pb::{common::v1 as pb, registry::v1 as wire},
};
use blixard_registry::NodeTiming;
use futures::stream;
use hiqlite::rusqlite::Connection;
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::kit::{Client, Kit, refusal};

const DEADLINE: Duration = Duration::from_secs(30);
/// Long enough for a vmhost on a busy machine, short enough to be outlasted.
const TIMING: NodeTiming = NodeTiming { every: Duration::from_millis(50), grace: Duration::from_secs(1) };

/// Heartbeats of one incarnation.
struct Beats {
    beats: mpsc::Sender<wire::HeartbeatRequest>,
    answers: Streaming<wire::HeartbeatResponse>,
    node_id: String,
    incarnation: u64,
}

impl Beats {
    async fn begin(client: &mut Client, node_id: &str, incarnation: u64) -> Self {
        let (beats, receiver) = mpsc::channel(1);
        let requests = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        let answers = client.heartbeat(requests).await.unwrap().into_inner();
        Self { beats, answers, node_id: node_id.into(), incarnation }
    }

    /// One heartbeat and how long to wait for the next, or the reason why there is none.
    async fn beat(&mut self) -> Result<Duration, &'static str> {
        let beat = wire::HeartbeatRequest { node_id: self.node_id.clone(), incarnation: self.incarnation };
        let _ = self.beats.send(beat).await;
        match tokio::time::timeout(DEADLINE, self.answers.message()).await.unwrap() {
            Ok(answer) => Ok(Duration::from_millis(answer.unwrap().interval_ms.into())),
            Err(status) => Err(Error::from_status(&status).reason.name()),
        }
    }

    /// What a vmhost does, for this long.
    async fn live(&mut self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            let interval = self.beat().await.unwrap();
            assert_eq!(interval, TIMING.every);
            tokio::time::sleep(interval).await;
        }
    }
}

async fn register(kit: &mut Kit, id: &str) -> pb::Node {
    let node = pb::Node { id: id.into(), endpoint: "http://h:1".into(), max_vms: 1, ..Default::default() };
    let request = wire::RegisterNodeRequest { node: Some(node), ..Default::default() };
    kit.client.register_node(request).await.unwrap().into_inner().node.unwrap()
}

async fn state(kit: &mut Kit, id: &str) -> (pb::NodeState, u64) {
    let nodes = kit.client.list_nodes(wire::ListNodesRequest::default()).await.unwrap().into_inner().nodes;
    let node = nodes.into_iter().find(|node| node.id == id).unwrap();
    (node.state(), node.incarnation)
}

async fn until_lost(kit: &mut Kit, id: &str) {
    let begun = Instant::now();
    while state(kit, id).await.0 != pb::NodeState::Lost {
        assert!(begun.elapsed() < DEADLINE, "{id} is not lost");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The events of a node: state, reason, time.
fn events(kit: &Kit, id: &str) -> Vec<(String, String, String)> {
    let database = Connection::open(kit.dir.path().join("hiqlite/hiqlite.db")).unwrap();
    let sql =
        "SELECT to_state, reason, timestamp FROM events WHERE entity = 'node' AND entity_id = ?1 ORDER BY revision";
    let mut statement = database.prepare(sql).unwrap();
    let row = |row: &hiqlite::rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
    statement.query_map([id], row).unwrap().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_lost_after_its_grace_once_and_comes_back_as_a_new_incarnation() {
    let mut kit = Kit::hearing_nodes(TIMING).await;
    let first = register(&mut kit, "well").await;
    register(&mut kit, "silent").await;
    let mut well = Beats::begin(&mut kit.client, "well", 1).await;
    well.live(3 * TIMING.grace).await;
    assert_eq!(state(&mut kit, "well").await, (pb::NodeState::Ready, 1));
    until_lost(&mut kit, "silent").await;

    until_lost(&mut kit, "well").await;
    assert_eq!(well.beat().await, Err("STALE_INCARNATION"));
    let again = register(&mut kit, "well").await;
    assert_eq!((again.state(), again.incarnation), (pb::NodeState::Ready, 2));
    let mut old = Beats::begin(&mut kit.client, "well", 1).await;
    assert_eq!(old.beat().await, Err("STALE_INCARNATION"));
    let mut new = Beats::begin(&mut kit.client, "well", 2).await;
    new.live(2 * TIMING.grace).await;
    assert_eq!(state(&mut kit, "well").await, (pb::NodeState::Ready, 2));

    let [(ready, _, registered_at), (lost, why, lost_at), (back, ..)] = &events(&kit, "well")[..] else {
        panic!("{:?}", events(&kit, "well"));
    };
    assert_eq!([ready, lost, back], ["Ready", "Lost", "Ready"]);
    assert_eq!(why, "not heard of for 1s");
    assert!(lost_at > registered_at, "{lost_at} {first:?}");
    assert_eq!(events(&kit, "silent").len(), 2);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_was_away_for_longer_than_the_grace_costs_no_node() {
    let mut kit = Kit::hearing_nodes(TIMING).await;
    register(&mut kit, "n").await;
    let mut beats = Beats::begin(&mut kit.client, "n", 1).await;
    beats.live(TIMING.every).await;
    kit.stop_serving().await;
    let ended = beats.beat().await.unwrap_err();
    assert!(["SHUTTING_DOWN", "PEER_UNAVAILABLE"].contains(&ended), "{ended}");
    // It is the time itself that matters here.
    tokio::time::sleep(TIMING.grace).await;
    kit.restart().await;
    Beats::begin(&mut kit.client, "n", 1).await.live(2 * TIMING.grace).await;
    assert_eq!(state(&mut kit, "n").await, (pb::NodeState::Ready, 1));
    assert_eq!(events(&kit, "n").len(), 1);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_of_nobody_are_told_so_and_leave_no_trace() {
    let mut kit = Kit::start().await;
    register(&mut kit, "n").await;
    let revision = kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision;
    for (node, incarnation, answer) in [
        ("n", 1, Ok(NodeTiming::default().every)),
        ("n", 0, Err("STALE_INCARNATION")),
        ("n", 2, Err("STALE_INCARNATION")),
        ("m", 1, Err("NODE_NOT_FOUND")),
        ("no name", 1, Err("INVALID_FIELD")),
    ] {
        let mut beats = Beats::begin(&mut kit.client, node, incarnation).await;
        assert_eq!(beats.beat().await, answer, "{node} {incarnation}");
    }
    assert_eq!(kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision, revision);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_what_is_wanted_of_it_and_a_lost_one_comes_back_as_that() {
    let mut kit = Kit::hearing_nodes(TIMING).await;
    register(&mut kit, "n").await;
    let update = |wanted: pb::NodeState, reason: &str| wire::UpdateNodeRequest {
        node_id: "n".into(),
        wanted: wanted.into(),
        reason: reason.into(),
        ..Default::default()
    };
    let cordon = update(pb::NodeState::Cordoned, "new disks");
    let cordoned = kit.client.update_node(cordon.clone()).await.unwrap().into_inner().node.unwrap();
    assert_eq!((cordoned.state(), cordoned.reason.as_str()), (pb::NodeState::Cordoned, "new disks"));
    // What is wanted already is no change.
    let again = kit.client.update_node(cordon).await.unwrap().into_inner().node.unwrap();
    assert_eq!(again.revision, cordoned.revision);
    until_lost(&mut kit, "n").await;
    let draining = kit.client.update_node(update(pb::NodeState::Draining, "no disks")).await.unwrap();
    let draining = draining.into_inner().node.unwrap();
    assert_eq!((draining.state(), draining.wanted()), (pb::NodeState::Lost, pb::NodeState::Draining));
    let back = register(&mut kit, "n").await;
    assert_eq!((back.state(), back.incarnation, back.reason.as_str()), (pb::NodeState::Draining, 2, "no disks"));
    let nobody = wire::UpdateNodeRequest { node_id: "m".into(), ..update(pb::NodeState::Ready, "") };
    assert_eq!(refusal(kit.client.update_node(nobody).await), "NODE_NOT_FOUND");
    assert_eq!(refusal(kit.client.update_node(update(pb::NodeState::Lost, "")).await), "INVALID_FIELD");
    kit.stop().await;
}
