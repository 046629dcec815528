//! Changes: events with the objects they are about, as watchers get them.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use blixard::{
    error::{Error, invalid},
    id::{NodeId, VmId},
    pb::registry::v1::{self as wire, WatchResponse, watch_event::Object, watch_response::Message},
};
use hiqlite::rusqlite::{self, Connection};
use prost::Message as _;

use crate::{
    read::newest_revision,
    rows::{JobRow, VmRow, find_node, number, when},
};

/// Most ids that a watch may name: it compares each change with them.
const MAX_OBJECT_IDS: usize = 100;
/// Events looked at in one read, wanted or not: a few milliseconds.
const SCANNED_EVENTS: u64 = 4096;

/// What a change is about: the value of `events.entity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Vm,
    Job,
    Node,
}

impl Kind {
    fn from_name(name: &str) -> Self {
        match name {
            "vm" => Self::Vm,
            "job" => Self::Job,
            _ => Self::Node,
        }
    }

    fn parse(field: &str, kind: i32) -> Result<Self, Error> {
        match wire::ObjectKind::try_from(kind) {
            Ok(wire::ObjectKind::Vm) => Ok(Self::Vm),
            Ok(wire::ObjectKind::Job) => Ok(Self::Job),
            Ok(wire::ObjectKind::Node) => Ok(Self::Node),
            Ok(wire::ObjectKind::Unspecified) | Err(_) => Err(invalid(field, kind, "a kind of object")),
        }
    }
}

/// Which changes a watcher wants.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    kinds: BTreeSet<Kind>,
    ids: BTreeSet<String>,
    node_id: String,
}

impl Wanted {
    /// Checks the filters of a request.
    pub(crate) fn parse(request: &wire::WatchRequest) -> Result<Self, Error> {
        if request.object_ids.len() > MAX_OBJECT_IDS {
            return Err(invalid("object_ids", request.object_ids.len(), &format!("at most {MAX_OBJECT_IDS} ids")));
        }
        let mut wanted = Self { node_id: request.node_id.clone(), ..Self::default() };
        for (at, kind) in request.kinds.iter().enumerate() {
            wanted.kinds.insert(Kind::parse(&format!("kinds[{at}]"), *kind)?);
        }
        for (at, id) in request.object_ids.iter().enumerate() {
            // A UUID may be written in several ways; a node's name in one.
            match VmId::parse("", id) {
                Ok(uuid) => drop(wanted.ids.insert(uuid.to_string())),
                Err(_) => drop(NodeId::parse(&format!("object_ids[{at}]"), id)?),
            }
            wanted.ids.insert(id.clone());
        }
        if !request.node_id.is_empty() {
            NodeId::parse("node_id", &request.node_id)?;
        }
        Ok(wanted)
    }

    /// Whether a change passes.
    pub(crate) fn wants(&self, change: &Change) -> bool {
        self.passes(change.kind, &change.id, &change.node_id)
    }

    fn passes(&self, kind: Kind, id: &str, node_id: &str) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&kind))
            && (self.ids.is_empty() || self.ids.contains(id))
            && (self.node_id.is_empty() || self.node_id == node_id)
    }
}

/// A change, and what the filters ask of it.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    kind: Kind,
    id: String,
    /// Empty: on none.
    node_id: String,
    /// What a watcher is sent.
    pub(crate) message: WatchResponse,
    /// Length of the message.
    pub(crate) bytes: usize,
}

/// How much is read at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageSize {
    /// Changes, at most.
    pub(crate) changes: usize,
    /// A page ends with the change that makes it larger than this.
    pub(crate) bytes: usize,
}

/// Changes in their order, from one snapshot.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) changes: VecDeque<Arc<Change>>,
    /// Everything up to here was looked at.
    pub(crate) covers: u64,
    /// Events up to here have been deleted.
    pub(crate) compacted: u64,
}

/// The changes after a revision that are wanted.
pub(crate) fn read_page(
    connection: &Connection,
    after: u64,
    wanted: &Wanted,
    size: PageSize,
) -> rusqlite::Result<Page> {
    let sql = "SELECT revision, timestamp, entity, entity_id, coalesce(node_id, '') FROM events
         WHERE revision > ?1 ORDER BY revision LIMIT ?2";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query([i64::try_from(after).unwrap_or(i64::MAX), SCANNED_EVENTS.cast_signed()])?;
    let mut page = Page { changes: VecDeque::new(), covers: after, compacted: compacted_revision(connection)? };
    let mut objects: HashMap<(Kind, String), Option<Object>> = HashMap::new();
    let (mut scanned, mut bytes) = (0, 0);
    while page.changes.len() < size.changes && bytes < size.bytes {
        let Some(row) = rows.next()? else {
            if scanned < SCANNED_EVENTS {
                // That was the last event; should the newest have been deleted by hand, they are not waited for.
                page.covers = after.max(newest_revision(connection)?);
            }
            break;
        };
        let revision = number(row, 0)?;
        (scanned, page.covers) = (scanned + 1, revision);
        let kind = Kind::from_name(row.get_ref(2)?.as_str()?);
        let (id, node_id) = (row.get_ref(3)?.as_str()?, row.get_ref(4)?.as_str()?);
        if !wanted.passes(kind, id, node_id) {
            continue;
        }
        let key = (kind, id.to_owned());
        let object = match objects.get(&key) {
            Some(object) => object.clone(),
            None => {
                let object = read_object(connection, kind, id)?;
                objects.insert(key, object.clone());
                object
            }
        };
        let event = wire::WatchEvent { timestamp: Some(when(row, 1)?), object };
        let message = WatchResponse { revision, message: Some(Message::Event(event)) };
        let (id, node_id, length) = (id.to_owned(), node_id.to_owned(), message.encoded_len());
        bytes += length;
        page.changes.push_back(Arc::new(Change { revision, kind, id, node_id, message, bytes: length }));
    }
    Ok(page)
}

/// The newest revision whose event was deleted; 0: none was.
pub(crate) fn compacted_revision(connection: &Connection) -> rusqlite::Result<u64> {
    connection.prepare_cached("SELECT revision FROM compaction")?.query_row([], |row| number(row, 0))
}

/// The object as it is now; one that is gone was purged.
fn read_object(connection: &Connection, kind: Kind, id: &str) -> rusqlite::Result<Option<Object>> {
    Ok(match kind {
        Kind::Vm => Some(match VmRow::find(connection, id)? {
            Some(row) => Object::Vm(row.vm),
            None => Object::PurgedVmId(id.to_owned()),
        }),
        Kind::Job => Some(match JobRow::find(connection, id)? {
            Some(row) => Object::Job(row.job),
            None => Object::PurgedJobId(id.to_owned()),
        }),
        Kind::Node => find_node(connection, id)?.map(Object::Node),
    })
}
