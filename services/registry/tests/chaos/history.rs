//! What a run has seen: what callers tried and were told, what watchers were sent, and what the replicas hold in the end.
//!
//! Each object is changed by one caller only, step after step, so its history is a list of steps of which each states what
//! the object must be after it. Only the last one can be unknown: a caller repeats a step whose outcome it was not told, or
//! leaves the object alone for good.

use std::{collections::BTreeMap, fmt};

/// A VM, a job or a node, as the events table names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Object {
    pub(crate) entity: &'static str,
    pub(crate) id: String,
}

impl Object {
    pub(crate) fn vm(id: &str) -> Self {
        Self { entity: "vm", id: id.to_owned() }
    }

    pub(crate) fn job(id: &str) -> Self {
        Self { entity: "job", id: id.to_owned() }
    }

    pub(crate) fn node(id: &str) -> Self {
        Self { entity: "node", id: id.to_owned() }
    }

    /// As a row of the events table has it.
    pub(crate) fn of(entity: &str, id: String) -> Self {
        let entity = ["vm", "job", "node"].into_iter().find(|known| *known == entity).expect("a known entity");
        Self { entity, id }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.entity, self.id)
    }
}

/// An object at one time. One that has been purged has no state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Row {
    pub(crate) state: String,
    /// A node's: its incarnation.
    pub(crate) generation: u64,
    pub(crate) attempt: u32,
}

/// An object as an answer shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) row: Row,
    pub(crate) revision: u64,
}

/// What a caller was told of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It took place. Of two objects that one step changes, the answer shows one.
    Acknowledged(Option<Shown>),
    Unknown,
}

/// A change of an object.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    /// What the object is after it.
    pub(crate) after: Row,
    pub(crate) outcome: Outcome,
}

/// One step of two objects: both take place or neither.
#[derive(Debug, Clone)]
pub(crate) struct Pair(pub(crate) [(Object, usize); 2]);

/// The registrations of a node: each is a change of its own, so what is unknown may have taken place besides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registrations {
    pub(crate) acknowledged: Vec<u64>,
    pub(crate) unknown: u64,
}

/// An answer that had to show at least something: a revision, or a generation of an object.
#[derive(Debug, Clone)]
pub(crate) struct Read {
    pub(crate) what: String,
    pub(crate) at_least: u64,
    pub(crate) shown: u64,
}

/// When an acknowledged change was asked for and answered, in milliseconds of the run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Acknowledgement {
    pub(crate) asked_ms: u64,
    pub(crate) answered_ms: u64,
}

/// What a watcher was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Event {
        revision: u64,
        object: Object,
    },
    /// Everything up to here has been sent.
    Covered {
        revision: u64,
    },
}

/// One watcher, from revision 1 on through all of its breaks.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watched {
    pub(crate) name: String,
    pub(crate) messages: Vec<Message>,
    /// It stopped when it had been sent this: the registry itself may change a node later still.
    pub(crate) until: u64,
    pub(crate) breaks: u64,
}

/// What callers and watchers have seen.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) objects: BTreeMap<Object, Vec<Step>>,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) nodes: BTreeMap<Object, Registrations>,
    /// Who was told that it has the lease, and in which epoch.
    pub(crate) leases: Vec<(u64, String)>,
    /// Refusals though nobody else touches the object.
    pub(crate) refusals: Vec<String>,
    pub(crate) reads: Vec<Read>,
    pub(crate) acknowledgements: Vec<Acknowledgement>,
    pub(crate) watched: Vec<Watched>,
    /// Calls without an answer that tells the outcome, by what was told instead.
    pub(crate) unanswered: BTreeMap<String, u64>,
}

impl History {
    pub(crate) fn add(&mut self, mut other: Self) {
        self.objects.append(&mut other.objects);
        self.pairs.append(&mut other.pairs);
        self.nodes.append(&mut other.nodes);
        self.leases.append(&mut other.leases);
        self.refusals.append(&mut other.refusals);
        self.reads.append(&mut other.reads);
        self.acknowledgements.append(&mut other.acknowledgements);
        self.watched.append(&mut other.watched);
        for (why, times) in other.unanswered {
            *self.unanswered.entry(why).or_default() += times;
        }
    }
}

/// A row of the events table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) revision: u64,
    pub(crate) object: Object,
    pub(crate) to_state: String,
}

/// What a replica holds in the end: each table's rows, as text, in their order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Holdings {
    pub(crate) tables: BTreeMap<String, Vec<String>>,
    pub(crate) events: Vec<Event>,
    pub(crate) rows: BTreeMap<Object, Row>,
    /// Of the lease that callers ask for.
    pub(crate) epoch: u64,
}
