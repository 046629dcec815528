//! Watchers and readers: what is sent to those who follow, and how new the answers are.

use std::{sync::Arc, time::Duration};

use blixard::{
    pb::registry::v1::{
        self as wire, registry_service_client::RegistryServiceClient, watch_event::Object as Wire,
        watch_response::Message as Sent,
    },
    replica::MIN_REVISION,
};
use blixard_chassis::{ReplicatedChannel, client};
use tonic::{Request, Status, transport::Channel};

use crate::{
    history::{History, Message, Object, Read, Watched},
    load::Run,
};

/// A watch that says nothing for this long is broken: progress is sent every few seconds.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a watcher whose watch broke waits before it watches again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How long it waits for the last revision; what has not come by then is missing.
const LAST_WITHIN: Duration = Duration::from_secs(60);
/// How often readers ask.
const READ_EVERY: Duration = Duration::from_millis(50);
/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(5);

/// Watches from revision 1 on, each time on the next of these replicas, until it has seen `until`.
pub(crate) struct Watcher {
    pub(crate) name: String,
    pub(crate) channels: Vec<Channel>,
    /// It goes to another replica after so many events, too.
    pub(crate) switch_after: usize,
    /// The last revision there will be, once that is known.
    pub(crate) until: tokio::sync::watch::Receiver<Option<u64>>,
}

impl Watcher {
    pub(crate) async fn run(self) -> History {
        let mut watched = Watched { name: self.name.clone(), ..Watched::default() };
        let mut until = self.until.clone();
        let mut next = 1;
        for channel in self.channels.iter().cycle() {
            let client = RegistryServiceClient::new(channel.clone());
            let watch = watch(client, &mut watched, &mut next, self.switch_after);
            let broken = tokio::select! {
                ended = watch => ended.is_err(),
                _ = until.wait_for(Option::is_some) => break,
            };
            watched.breaks += 1;
            if broken {
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
        // What is still to come, from whoever sends it.
        watched.until = until.borrow().unwrap_or_default();
        let give_up = tokio::time::Instant::now() + LAST_WITHIN;
        for channel in self.channels.iter().cycle() {
            let left = usize::try_from((watched.until + 1).saturating_sub(next)).unwrap();
            if left == 0 || tokio::time::Instant::now() >= give_up {
                break;
            }
            let client = RegistryServiceClient::new(channel.clone());
            let watch = watch(client, &mut watched, &mut next, left.min(self.switch_after));
            if !matches!(tokio::time::timeout_at(give_up, watch).await, Ok(Ok(()))) {
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
        History { watched: vec![watched], ..History::default() }
    }
}

/// Follows until the watch breaks, or until so many events have come.
async fn watch(
    mut client: RegistryServiceClient<Channel>,
    watched: &mut Watched,
    next: &mut u64,
    events: usize,
) -> Result<(), Status> {
    let late = |_| Status::deadline_exceeded("the watch is silent");
    let request = wire::WatchRequest { start_revision: *next, ..Default::default() };
    let mut stream = tokio::time::timeout(SILENCE, client.watch(request)).await.map_err(late)??.into_inner();
    let mut seen = 0;
    while seen < events
        && let Some(response) = tokio::time::timeout(SILENCE, stream.message()).await.map_err(late)??
    {
        let revision = response.revision;
        watched.messages.push(match response.message {
            Some(Sent::Event(event)) => {
                seen += 1;
                *next = revision + 1;
                Message::Event { revision, object: object(event.object) }
            }
            Some(Sent::Synced(_) | Sent::Progress(_)) | None => Message::Covered { revision },
        });
    }
    Ok(())
}

fn object(object: Option<Wire>) -> Object {
    match object.expect("an event has an object") {
        Wire::Vm(vm) => Object::vm(&vm.id),
        Wire::PurgedVmId(id) => Object::vm(&id),
        Wire::Job(job) => Object::job(&job.id),
        Wire::PurgedJobId(id) => Object::job(&id),
        Wire::Node(node) => Object::node(&node.id),
    }
}

/// Asks for the newest revision, and each replica for what it shows, until the run is over.
pub(crate) async fn read(run: Arc<Run>, all: ReplicatedChannel, each: Vec<Channel>) -> History {
    let mut history = History::default();
    let mut all = RegistryServiceClient::new(all);
    let mut seen = 0;
    for channel in each.iter().cycle().take_while(|_| !run.is_over()) {
        // Confirmed by a majority: not older than what had been acknowledged to anybody when it was asked for.
        let at_least = run.acknowledged();
        let newest = all.get_revision(client::request(wire::GetRevisionRequest {}, DEADLINE));
        if let Ok(Ok(newest)) = tokio::time::timeout(DEADLINE, newest).await {
            let shown = newest.into_inner().revision;
            history.reads.push(Read { what: "GetRevision".into(), at_least, shown });
        }
        // A read never shows less than its caller has seen.
        let counts = all.get_counts(client::request(wire::GetCountsRequest {}, DEADLINE));
        if let Ok(Ok(counts)) = tokio::time::timeout(DEADLINE, counts).await {
            let shown = counts.into_inner().revision;
            history.reads.push(Read { what: "GetCounts after GetCounts".into(), at_least: seen, shown });
            seen = shown;
        }
        // Nor less than it asks for, whichever replica it is.
        let at_least = run.acknowledged();
        let mut one = RegistryServiceClient::new(channel.clone());
        let mut request: Request<_> = client::request(wire::GetCountsRequest {}, DEADLINE);
        request.metadata_mut().insert(MIN_REVISION, at_least.into());
        if let Ok(Ok(counts)) = tokio::time::timeout(DEADLINE, one.get_counts(request)).await {
            let shown = counts.into_inner().revision;
            history.reads.push(Read { what: "GetCounts of one replica".into(), at_least, shown });
        }
        tokio::time::sleep(READ_EVERY).await;
    }
    history
}
