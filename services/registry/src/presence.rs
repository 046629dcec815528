//! Which nodes are heard of. Pure: it decides which are lost, from what is recorded, what is heard and the time that passes.
//!
//! An incarnation of a node begins when it registers and is over when it is lost or registers again; it never comes back.
//! Silence is counted only while somebody listens: from the time when a replica begins to lead or learns of an
//! incarnation, and never more than [`NodeTiming::every`] for one step, however long that took. So neither a restart nor a
//! new leader nor a registry that was stopped for a minute costs a node that is well.

use std::{collections::BTreeMap, time::Duration};

use blixard::id::NodeId;

/// How vmhosts are to be heard of.
#[derive(Debug, Clone, Copy)]
pub struct NodeTiming {
    /// How often each vmhost says that it lives.
    pub every: Duration,
    /// A node that is not heard of for this long is lost.
    pub grace: Duration,
}

impl Default for NodeTiming {
    fn default() -> Self {
        Self {
            // A thousand nodes are 500 heartbeats a second, which docs/BENCHMARKS.md has the cost of; more often would gain
            // nothing, since the grace has to be far longer.
            every: Duration::from_secs(2),
            // Seven heartbeats: a vmhost whose host is short of CPU for some seconds, or whose connection has to be made
            // anew behind a failover (2 s), is not lost, because its jobs would be run again.
            grace: Duration::from_secs(15),
        }
    }
}

/// A node as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) id: NodeId,
    pub(crate) incarnation: u64,
    pub(crate) lost: bool,
}

/// What a heartbeat means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// The incarnation lives.
    Alive,
    /// The incarnation is over.
    Over { current: u64 },
    /// No such incarnation is known here; it may be recorded.
    Unknown,
}

/// An incarnation that is to be recorded as lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) id: NodeId,
    pub(crate) incarnation: u64,
}

struct Node {
    incarnation: u64,
    /// Since it was heard of; `None`: it is lost.
    silence: Option<Duration>,
}

/// See the module.
pub(crate) struct Presence {
    timing: NodeTiming,
    nodes: BTreeMap<NodeId, Node>,
}

impl Presence {
    /// Of a replica that begins to lead: nobody has been silent yet.
    pub(crate) fn new(timing: NodeTiming) -> Self {
        Self { timing, nodes: BTreeMap::new() }
    }

    /// Learns what is recorded.
    pub(crate) fn recorded(&mut self, nodes: impl IntoIterator<Item = Recorded>) {
        for Recorded { id, incarnation, lost } in nodes {
            let known = self.nodes.get(&id);
            if known.is_none_or(|known| known.incarnation < incarnation) {
                self.nodes.insert(id, Node { incarnation, silence: (!lost).then_some(Duration::ZERO) });
            } else if lost
                && let Some(known) = self.nodes.get_mut(&id)
                && known.incarnation == incarnation
            {
                known.silence = None;
            }
        }
    }

    /// Hears a node.
    pub(crate) fn heard(&mut self, id: &NodeId, incarnation: u64) -> Heard {
        match self.nodes.get_mut(id) {
            Some(Node { incarnation: current, silence: Some(silence) })
                if *current == incarnation && *silence < self.timing.grace =>
            {
                *silence = Duration::ZERO;
                Heard::Alive
            }
            Some(node) if node.incarnation >= incarnation => Heard::Over { current: node.incarnation },
            Some(_) | None => Heard::Unknown,
        }
    }

    /// Lets time pass; returns who is lost, again and again until that is recorded.
    pub(crate) fn passed(&mut self, time: Duration) -> Vec<Lost> {
        let counted = time.min(self.timing.every);
        let mut lost = Vec::new();
        for (id, node) in &mut self.nodes {
            let Some(silence) = &mut node.silence else { continue };
            *silence += counted;
            if *silence >= self.timing.grace {
                lost.push(Lost { id: id.clone(), incarnation: node.incarnation });
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: NodeTiming = NodeTiming { every: Duration::from_secs(2), grace: Duration::from_secs(5) };

    fn id() -> NodeId {
        NodeId::parse("", "n").unwrap()
    }

    /// What happens to one node, step by step, and what each step is answered.
    fn answers(steps: &str) -> Vec<String> {
        let mut presence = Presence::new(TIMING);
        let step = |step: &str| {
            let (what, number) = step.split_once(' ').unwrap_or((step, "0"));
            let number: u64 = number.parse().unwrap();
            match what {
                "recorded" | "lost" => {
                    presence.recorded([Recorded { id: id(), incarnation: number, lost: what == "lost" }]);
                    "-".to_owned()
                }
                "heard" => format!("{:?}", presence.heard(&id(), number)),
                "passed" => match presence.passed(Duration::from_secs(number)).as_slice() {
                    [] => "nobody".to_owned(),
                    lost => lost.iter().map(|lost| format!("{} of {}", lost.id, lost.incarnation)).collect(),
                },
                "leads" => {
                    presence = Presence::new(TIMING);
                    "-".to_owned()
                }
                other => panic!("{other}"),
            }
        };
        steps.split(", ").map(step).collect()
    }

    #[test]
    fn each_story_ends_as_it_should() {
        let stories = [
            (
                "a node that is heard of in time lives",
                "recorded 1, passed 2, passed 2, heard 1, passed 2, passed 2",
                "nobody",
            ),
            ("one that is not is lost", "recorded 1, passed 2, passed 2, passed 2", "n of 1"),
            ("until it is recorded", "recorded 1, passed 2, passed 2, passed 2, passed 1", "n of 1"),
            ("and then no more", "recorded 1, passed 2, passed 2, passed 2, lost 1, passed 2", "nobody"),
            ("once decided, it is decided", "recorded 1, passed 2, passed 2, passed 2, heard 1", "Over { current: 1 }"),
            ("and stays so", "recorded 1, passed 2, passed 2, passed 2, heard 1, passed 0", "n of 1"),
            ("a lost one is told", "lost 1, heard 1", "Over { current: 1 }"),
            ("a late reader does not bring a lost one back", "lost 1, recorded 1, heard 1", "Over { current: 1 }"),
            ("it comes back as a new incarnation", "lost 1, recorded 2, heard 2", "Alive"),
            ("with all its grace", "recorded 1, passed 2, passed 2, recorded 2, passed 2, passed 2", "nobody"),
            ("the old incarnation is over", "recorded 1, recorded 2, heard 1", "Over { current: 2 }"),
            ("and does not speak for the new one", "recorded 2, passed 2, passed 2, heard 1, passed 2", "n of 2"),
            ("a loss that comes late is not the new one's", "recorded 2, lost 1, heard 2", "Alive"),
            ("who has just registered may not be known", "recorded 1, heard 2", "Unknown"),
            ("nor one never heard of", "heard 1", "Unknown"),
            (
                "a new leader begins afresh",
                "recorded 1, passed 2, passed 2, leads, recorded 1, passed 2, passed 2",
                "nobody",
            ),
            ("a registry that was stopped has not listened", "recorded 1, passed 3600", "nobody"),
            ("not even twice", "recorded 1, passed 3600, passed 3600, heard 1, passed 1", "nobody"),
        ];
        for (story, steps, end) in stories {
            assert_eq!(answers(steps).last().unwrap(), end, "{story}: {steps}");
        }
    }
}
