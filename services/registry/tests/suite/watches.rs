//! Watch: every change once, in order, whoever reads how.

use std::time::Duration;

use blixard::{
    error::Error,
    pb::{
        common::v1 as pb,
        registry::v1::{self as wire, WatchResponse, watch_event::Object, watch_response::Message},
    },
    vm::{VmKind, VmState},
};
use tonic::Streaming;

use crate::{
    kit::{Kit, config, create_job, create_vm, refusal, uuid},
    lists::a_busy_day,
};

const DEADLINE: Duration = Duration::from_secs(60);

/// A watch and what it has said so far.
pub(crate) struct Watch {
    stream: Streaming<WatchResponse>,
    pub(crate) revisions: Vec<u64>,
    /// Kind and id of each.
    objects: Vec<(&'static str, String)>,
    pub(crate) purged: Vec<String>,
    covered: u64,
}

impl Watch {
    pub(crate) async fn begin(kit: &mut Kit, start_revision: u64) -> Self {
        Self::begin_with(kit, wire::WatchRequest { start_revision, ..Default::default() }).await
    }

    pub(crate) async fn begin_with(kit: &mut Kit, request: wire::WatchRequest) -> Self {
        let stream = kit.client.watch(request).await.unwrap().into_inner();
        Self { stream, revisions: Vec::new(), objects: Vec::new(), purged: Vec::new(), covered: 0 }
    }

    pub(crate) async fn next(&mut self) -> Option<Result<WatchResponse, tonic::Status>> {
        let next = tokio::time::timeout(DEADLINE, self.stream.message()).await;
        next.expect("a watch is never silent for long").transpose()
    }

    /// Takes the next message; true when it is SYNCED.
    pub(crate) async fn take(&mut self) -> bool {
        let message = self.next().await.unwrap().unwrap();
        assert!(message.revision >= self.covered, "revisions never go back");
        self.covered = message.revision;
        match message.message.unwrap() {
            Message::Event(event) => {
                let (own, object) = match event.object.unwrap() {
                    Object::Vm(vm) => (vm.revision, ("vm", vm.id)),
                    Object::Job(job) => (job.revision, ("job", job.id)),
                    Object::Node(node) => (node.revision, ("node", node.id)),
                    Object::PurgedVmId(id) => {
                        self.purged.push(id.clone());
                        (message.revision, ("vm", id))
                    }
                    Object::PurgedJobId(id) => {
                        self.purged.push(id.clone());
                        (message.revision, ("job", id))
                    }
                };
                assert!(own >= message.revision, "an object is never older than its event");
                self.revisions.push(message.revision);
                self.objects.push(object);
                false
            }
            Message::Synced(_) => true,
            Message::Progress(_) => false,
        }
    }

    pub(crate) async fn until_synced(&mut self) {
        while !self.take().await {}
    }

    pub(crate) async fn until(&mut self, revision: u64) {
        while self.revisions.last().is_none_or(|last| *last < revision) {
            self.take().await;
        }
    }
}

pub(crate) async fn newest(kit: &mut Kit) -> u64 {
    kit.client.get_counts(wire::GetCountsRequest {}).await.unwrap().into_inner().revision
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_any_revision_gives_the_same_suffix() {
    let mut kit = Kit::start().await;
    let [_, gone] = a_busy_day(&mut kit).await;
    let newest = newest(&mut kit).await;
    for start in 1..=newest {
        let mut watch = Watch::begin(&mut kit, start).await;
        watch.until_synced().await;
        assert_eq!(watch.revisions, (start..=newest).collect::<Vec<_>>());
        assert_eq!(watch.purged.last(), Some(&gone));
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_and_a_vm_of_one_id_are_not_mistaken_for_each_other() {
    let mut kit = Kit::start().await;
    let id = kit.queued_job(1).await;
    kit.client.create_vm(create_vm(&id, VmKind::Service)).await.unwrap();
    let mut watch = Watch::begin(&mut kit, 1).await;
    let kinds =
        [watch.next().await.unwrap().unwrap(), watch.next().await.unwrap().unwrap()].map(|message| {
            match message.message.unwrap() {
                Message::Event(wire::WatchEvent { object: Some(Object::Job(_)), .. }) => "job",
                Message::Event(wire::WatchEvent { object: Some(Object::Vm(_)), .. }) => "vm",
                other => panic!("{other:?}"),
            }
        });
    assert_eq!(kinds, ["job", "vm"]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_now_is_synced_at_once_and_follows() {
    let mut kit = Kit::start().await;
    a_busy_day(&mut kit).await;
    let before = newest(&mut kit).await;
    let mut now = Watch::begin(&mut kit, 0).await;
    now.until_synced().await;
    assert_eq!(now.revisions, [0_u64; 0]);
    let mut ahead = Watch::begin(&mut kit, before + 2).await;
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    now.until(before + 2).await;
    assert_eq!(now.revisions, [before + 1, before + 2]);
    ahead.until(before + 2).await;
    assert_eq!(ahead.revisions, [before + 2]);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_stops_reading_misses_nothing_and_holds_nobody_up() {
    const VMS: u64 = 1500;
    let mut kit = Kit::start().await;
    let mut slow = Watch::begin(&mut kit, 1).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..30 {
        let mut client = kit.client.clone();
        callers.spawn(async move {
            // All in all 12 MB: more than the connection takes in and more than the registry remembers.
            let values: Vec<_> = (0..32).map(|label| (label.to_string(), "z".repeat(255))).collect();
            for _ in 0..VMS / 30 {
                let config = pb::VmConfig { labels: values.iter().cloned().collect(), ..config(VmKind::Service) };
                let request = wire::CreateVmRequest { config: Some(config), ..create_vm(&uuid(), VmKind::Service) };
                client.create_vm(request).await.unwrap();
            }
        });
    }
    let mut fast = Watch::begin(&mut kit, 1).await;
    fast.until(VMS).await;
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    slow.until(VMS).await;
    assert_eq!(slow.revisions, (1..=VMS).collect::<Vec<_>>());
    assert_eq!(fast.revisions, slow.revisions);
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_comes_again_after_each_event_sees_what_one_that_stays_sees() {
    let mut kit = Kit::start().await;
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut client = kit.client.clone();
        writers.spawn(async move {
            for _ in 0..20 {
                client.create_job(create_job(&uuid())).await.unwrap();
            }
        });
    }
    let mut stays = Watch::begin(&mut kit, 1).await;
    stays.until(160).await;
    let mut seen = Vec::new();
    while seen.len() < 160 {
        let mut watch = Watch::begin(&mut kit, seen.last().map_or(1, |last| last + 1)).await;
        while watch.revisions.is_empty() {
            watch.take().await;
        }
        seen.append(&mut watch.revisions);
    }
    assert_eq!(seen, (1..=160).collect::<Vec<_>>());
    assert_eq!(seen, stays.revisions);
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_choose_by_kind_id_and_node_and_synced_covers_the_rest() {
    use wire::ObjectKind;
    let mut kit = Kit::start().await;
    let [vm, gone] = a_busy_day(&mut kit).await;
    let newest = newest(&mut kit).await;
    let mut all = Watch::begin(&mut kit, 1).await;
    all.until_synced().await;
    let all: Vec<_> = (1..=newest).zip(std::mem::take(&mut all.objects)).collect();
    let mut chosen = async |request: wire::WatchRequest| {
        let request = wire::WatchRequest { start_revision: 1, ..request };
        let mut watch = Watch::begin_with(&mut kit, request).await;
        watch.until_synced().await;
        assert_eq!(watch.covered, newest);
        watch.revisions.into_iter().zip(watch.objects).collect::<Vec<_>>()
    };
    let those = |wanted: &dyn Fn(&str, &str) -> bool| -> Vec<_> {
        all.iter().filter(|(_, (kind, id))| wanted(kind, id)).cloned().collect()
    };
    let kinds = |kinds: &[ObjectKind]| wire::WatchRequest {
        kinds: kinds.iter().map(|kind| (*kind).into()).collect(),
        ..Default::default()
    };
    let ids = |ids: &[&str]| wire::WatchRequest {
        object_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        ..Default::default()
    };
    assert_eq!(chosen(kinds(&[ObjectKind::Vm])).await, those(&|kind, _| kind == "vm"));
    assert_eq!(chosen(kinds(&[ObjectKind::Job, ObjectKind::Node])).await, those(&|kind, _| kind != "vm"));
    assert_eq!(chosen(ids(&[&vm.to_uppercase(), "node-1"])).await, those(&|_, id| id == vm || id == "node-1"));
    assert_eq!(chosen(ids(&[&gone])).await, those(&|_, id| id == gone));
    assert_eq!(chosen(ids(&[&uuid()])).await, []);
    let both = wire::WatchRequest { object_ids: ids(&[&vm]).object_ids, ..kinds(&[ObjectKind::Job]) };
    assert_eq!(chosen(both).await, []);
    // All but the job's creation, which was on no node.
    let on_node = wire::WatchRequest { node_id: "node-1".into(), ..Default::default() };
    let on_node = chosen(on_node).await;
    assert_eq!(on_node.len(), all.len() - 1);
    let elsewhere = wire::WatchRequest { node_id: "node-2".into(), ..Default::default() };
    assert_eq!(chosen(elsewhere).await, []);

    // Those that follow are chosen alike.
    let mut watch = Watch::begin_with(&mut kit, kinds(&[ObjectKind::Job])).await;
    watch.until_synced().await;
    kit.vm_in(VmKind::Service, VmState::Ready).await;
    let job = kit.queued_job(1).await;
    watch.until(newest + 3).await;
    assert_eq!((watch.revisions, watch.objects), (vec![newest + 3], vec![("job", job)]));
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_that_mean_nothing_are_named() {
    let mut kit = Kit::start().await;
    let cases = [
        (wire::WatchRequest { kinds: vec![1, 0], ..Default::default() }, "kinds[1]"),
        (wire::WatchRequest { kinds: vec![99], ..Default::default() }, "kinds[0]"),
        (wire::WatchRequest { object_ids: vec!["no id".into()], ..Default::default() }, "object_ids[0]"),
        (wire::WatchRequest { object_ids: vec![uuid(); 101], ..Default::default() }, "object_ids"),
        (wire::WatchRequest { node_id: "no name".into(), ..Default::default() }, "node_id"),
    ];
    for (request, field) in cases {
        let error = Error::from_status(&kit.client.watch(request).await.unwrap_err());
        assert_eq!(error.metadata.get("field").map(String::as_str), Some(field));
    }
    kit.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_at_shutdown_and_says_so() {
    let mut kit = Kit::start().await;
    let mut watch = Watch::begin(&mut kit, 0).await;
    watch.until_synced().await;
    kit.stop_serving().await;
    assert_eq!(refusal(watch.next().await.unwrap()), "SHUTTING_DOWN");
    kit.stop().await;
}
