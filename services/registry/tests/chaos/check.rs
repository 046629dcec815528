//! Judges a history against what the replicas hold in the end. Pure; it must not know how either was come by.

use std::{collections::BTreeMap, fmt};

use crate::history::{Event, History, Holdings, Message, Object, Outcome, Registrations, Row, Step, Watched};

/// What must never be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Violation {
    /// An acknowledged step has left no event.
    Lost { object: Object, step: usize },
    /// More changes than were asked for.
    Repeated { object: Object, expected: usize, found: usize },
    /// A change is not the step that was asked for, or not at the revision that was told.
    Differs { object: Object, step: usize, expected: String, found: String },
    /// The object is not what its last change made it.
    Row { object: Object, expected: Option<Row>, found: Option<Row> },
    /// An answer did not show what the step leads to.
    Answer { object: Object, step: usize, expected: Row, shown: Row },
    /// Half of a step took place.
    Torn { objects: [Object; 2] },
    /// An event of an object that nobody touched.
    Unasked { object: Object },
    /// The registrations of a node do not add up.
    Registrations { object: Object, registrations: String, found: u64 },
    /// Two were told that they have the lease in one epoch.
    Lease { epoch: u64, holders: [String; 2] },
    /// Somebody was told that it has the lease, and nothing is recorded of it.
    LeaseLost { epoch: u64, recorded: u64 },
    /// A step was refused that nothing stood against.
    Refused(String),
    /// An answer was older than it had to be.
    Stale { what: String, at_least: u64, shown: u64 },
    /// The revisions of the events table have a gap.
    Gap { expected: u64, found: u64 },
    /// A watcher was sent something else than the next event.
    Watcher { name: String, expected: String, found: String },
    /// A table is not the same on two replicas.
    Replicas { table: String, row: usize, here: Option<String>, there: Option<String> },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// All violations.
pub(crate) fn check(history: &History, replicas: &[Holdings]) -> Vec<Violation> {
    let mut found = Vec::new();
    let Some((first, others)) = replicas.split_first() else { return found };
    for other in others {
        compare(first, other, &mut found);
    }
    gaps(&first.events, &mut found);
    let mut events: BTreeMap<&Object, Vec<&Event>> = BTreeMap::new();
    for event in &first.events {
        events.entry(&event.object).or_default().push(event);
    }
    let of = |object: &Object| events.get(object).map_or(&[][..], Vec::as_slice);
    for (object, steps) in &history.objects {
        changes(object, steps, of(object), &mut found);
        let expected = of(object).len().checked_sub(1).and_then(|last| steps.get(last)).map(|step| &step.after);
        let expected = expected.filter(|row| !row.state.is_empty());
        let row = first.rows.get(object);
        if row != expected {
            found.push(Violation::Row { object: object.clone(), expected: expected.cloned(), found: row.cloned() });
        }
    }
    for pair in &history.pairs {
        let took_place = pair.0.each_ref().map(|(object, step)| of(object).len() > *step);
        if took_place[0] != took_place[1] {
            found.push(Violation::Torn { objects: pair.0.clone().map(|(object, _)| object) });
        }
    }
    for (object, node) in &history.nodes {
        registrations(object, node, first.rows.get(object), &mut found);
    }
    leases(&history.leases, first.epoch, &mut found);
    let touched = |object: &Object| history.objects.contains_key(object) || history.nodes.contains_key(object);
    found.extend(
        events.keys().filter(|object| !touched(object)).map(|&object| Violation::Unasked { object: object.clone() }),
    );
    found.extend(history.refusals.iter().cloned().map(Violation::Refused));
    for read in history.reads.iter().filter(|read| read.shown < read.at_least) {
        found.push(Violation::Stale { what: read.what.clone(), at_least: read.at_least, shown: read.shown });
    }
    for watched in &history.watched {
        found.extend(watcher(watched, &first.events));
    }
    found
}

/// The first difference of each table.
fn compare(here: &Holdings, there: &Holdings, found: &mut Vec<Violation>) {
    for table in here.tables.keys().chain(there.tables.keys().filter(|table| !here.tables.contains_key(*table))) {
        let rows = |holdings: &Holdings| holdings.tables.get(table).cloned().unwrap_or_default();
        let (here, there) = (rows(here), rows(there));
        let differs = |row: &usize| here.get(*row) != there.get(*row);
        if let Some(row) = (0..here.len().max(there.len())).find(differs) {
            let (here, there) = (here.get(row).cloned(), there.get(row).cloned());
            found.push(Violation::Replicas { table: table.clone(), row, here, there });
        }
    }
}

fn gaps(events: &[Event], found: &mut Vec<Violation>) {
    for (expected, event) in (1..).zip(events) {
        if event.revision != expected {
            found.push(Violation::Gap { expected, found: event.revision });
            return;
        }
    }
}

/// Each acknowledged step has taken place once, and one whose outcome is unknown once or not at all.
fn changes(object: &Object, steps: &[Step], events: &[&Event], found: &mut Vec<Violation>) {
    let object = || object.clone();
    for (at, step) in steps.iter().enumerate() {
        let told = match &step.outcome {
            Outcome::Acknowledged(shown) => shown.as_ref(),
            Outcome::Unknown if at < events.len() => None,
            Outcome::Unknown => continue,
        };
        let Some(event) = events.get(at) else {
            found.push(Violation::Lost { object: object(), step: at });
            return;
        };
        let expected = (&step.after.state, told.map_or(event.revision, |shown| shown.revision));
        if (&event.to_state, event.revision) != expected {
            let (expected, found_event) = (format!("{expected:?}"), format!("{event:?}"));
            found.push(Violation::Differs { object: object(), step: at, expected, found: found_event });
        }
        if let Some(shown) = told.filter(|shown| shown.row != step.after) {
            let (expected, shown) = (step.after.clone(), shown.row.clone());
            found.push(Violation::Answer { object: object(), step: at, expected, shown });
        }
    }
    if events.len() > steps.len() {
        found.push(Violation::Repeated { object: object(), expected: steps.len(), found: events.len() });
    }
}

/// Each acknowledged registration was one of its own.
fn registrations(object: &Object, node: &Registrations, row: Option<&Row>, found: &mut Vec<Violation>) {
    let incarnation = row.map_or(0, |row| row.generation);
    let told = node.acknowledged.len() as u64;
    let possible = told..=told + node.unknown;
    let rising = node.acknowledged.windows(2).all(|pair| pair[0] < pair[1]);
    let last = node.acknowledged.last().copied().unwrap_or(0);
    if !possible.contains(&incarnation) || !rising || last > incarnation {
        let registrations = format!("{node:?}");
        found.push(Violation::Registrations { object: object.clone(), registrations, found: incarnation });
    }
}

/// Each epoch of the lease had one holder, and is recorded.
fn leases(told: &[(u64, String)], recorded: u64, found: &mut Vec<Violation>) {
    let mut holders: BTreeMap<u64, &str> = BTreeMap::new();
    for (epoch, holder) in told {
        let first = holders.entry(*epoch).or_insert(holder);
        if *first != holder {
            found.push(Violation::Lease { epoch: *epoch, holders: [(*first).to_owned(), holder.clone()] });
        }
    }
    if let Some((&epoch, _)) = holders.last_key_value().filter(|(epoch, _)| **epoch > recorded) {
        found.push(Violation::LeaseLost { epoch, recorded });
    }
}

/// A watcher was sent every event once, in its order, and was never told that more was sent than was.
fn watcher(watched: &Watched, events: &[Event]) -> Option<Violation> {
    let differs =
        |expected: String, found: String| Some(Violation::Watcher { name: watched.name.clone(), expected, found });
    let mut next = events.iter();
    let mut sent = 0;
    for message in &watched.messages {
        match message {
            Message::Event { revision, object } => {
                let expected = next.next();
                if expected.is_none_or(|event| (event.revision, &event.object) != (*revision, object)) {
                    return differs(format!("{expected:?}"), format!("{message:?}"));
                }
                sent = *revision;
            }
            Message::Covered { revision } if *revision > sent => {
                return differs(format!("nothing beyond {sent} covered"), format!("{message:?}"));
            }
            Message::Covered { .. } => {}
        }
    }
    next.next()
        .filter(|event| event.revision <= watched.until)
        .and_then(|event| differs(format!("{event:?}"), "nothing more".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Pair, Read, Shown};

    fn row(state: &str, generation: u64) -> Row {
        Row { state: state.into(), generation, attempt: 0 }
    }

    /// A VM that was made at revision 1 and became Ready at 2, seen by one watcher, on two replicas.
    fn world() -> (History, Vec<Holdings>) {
        let vm = Object::vm("a");
        let step = |state: &str, generation| {
            let shown = Shown { row: row(state, generation), revision: generation };
            Step { after: row(state, generation), outcome: Outcome::Acknowledged(Some(shown)) }
        };
        let event = |state: &str, revision| Event { revision, object: vm.clone(), to_state: state.into() };
        let message = |revision| Message::Event { revision, object: vm.clone() };
        let history = History {
            objects: [(vm.clone(), vec![step("Starting", 1), step("Ready", 2)])].into(),
            watched: vec![Watched {
                name: "watcher".into(),
                messages: vec![message(1), message(2), Message::Covered { revision: 2 }],
                until: 2,
                breaks: 0,
            }],
            ..History::default()
        };
        let holdings = Holdings {
            tables: [("vms".to_owned(), vec!["a Ready".to_owned()])].into(),
            events: vec![event("Starting", 1), event("Ready", 2)],
            rows: [(vm.clone(), row("Ready", 2))].into(),
            epoch: 0,
        };
        (history, vec![holdings.clone(), holdings])
    }

    fn steps(history: &mut History) -> &mut Vec<Step> {
        history.objects.get_mut(&Object::vm("a")).unwrap()
    }

    fn each(replicas: &mut [Holdings], mut change: impl FnMut(&mut Holdings)) {
        replicas.iter_mut().for_each(&mut change);
    }

    /// Also the watcher, who sees what there is.
    fn push_event(history: &mut History, replicas: &mut [Holdings], object: &Object, state: &str) {
        each(replicas, |replica| {
            let revision = replica.events.len() as u64 + 1;
            replica.events.push(Event { revision, object: object.clone(), to_state: state.into() });
        });
        let revision = replicas[0].events.len() as u64;
        history.watched[0].messages.push(Message::Event { revision, object: object.clone() });
    }

    #[test]
    fn a_faultless_run_has_no_violation() {
        let (history, replicas) = world();
        assert_eq!(check(&history, &replicas), []);
    }

    #[test]
    fn a_lost_acknowledged_step_is_found() {
        let (mut history, mut replicas) = world();
        let after = row("Draining", 3);
        steps(&mut history).push(Step { after: after.clone(), outcome: Outcome::Acknowledged(None) });
        assert_eq!(check(&history, &replicas), [Violation::Lost { object: Object::vm("a"), step: 2 }]);
        // What is unknown may be missing, or have taken place.
        steps(&mut history)[2].outcome = Outcome::Unknown;
        assert_eq!(check(&history, &replicas), []);
        push_event(&mut history, &mut replicas, &Object::vm("a"), "Draining");
        each(&mut replicas, |replica| drop(replica.rows.insert(Object::vm("a"), after.clone())));
        assert_eq!(check(&history, &replicas), []);
    }

    #[test]
    fn an_object_that_was_never_made_is_lost() {
        let (mut history, replicas) = world();
        let step = Step { after: row("Queued", 1), outcome: Outcome::Acknowledged(None) };
        history.objects.insert(Object::job("b"), vec![step]);
        assert_eq!(check(&history, &replicas), [Violation::Lost { object: Object::job("b"), step: 0 }]);
    }

    #[test]
    fn a_step_that_took_place_twice_is_found() {
        let (mut history, mut replicas) = world();
        push_event(&mut history, &mut replicas, &Object::vm("a"), "Ready");
        each(&mut replicas, |replica| drop(replica.rows.insert(Object::vm("a"), row("Ready", 3))));
        let found = check(&history, &replicas);
        assert_eq!(found[0], Violation::Repeated { object: Object::vm("a"), expected: 2, found: 3 });
        assert!(matches!(found[1], Violation::Row { .. }), "{found:?}");
    }

    #[test]
    fn a_row_that_is_not_what_its_events_say_is_found() {
        let (history, mut replicas) = world();
        each(&mut replicas, |replica| drop(replica.rows.insert(Object::vm("a"), row("Ready", 3))));
        assert!(matches!(check(&history, &replicas)[..], [Violation::Row { .. }]));
        each(&mut replicas, |replica| drop(replica.rows.remove(&Object::vm("a"))));
        assert!(matches!(check(&history, &replicas)[..], [Violation::Row { found: None, .. }]));
    }

    #[test]
    fn another_state_or_revision_than_was_told_is_found() {
        let (history, mut replicas) = world();
        each(&mut replicas, |replica| replica.events[1].to_state = "Draining".into());
        assert!(matches!(check(&history, &replicas)[..], [Violation::Differs { step: 1, .. }]));
        let (mut history, replicas) = world();
        let shown = Shown { row: row("Ready", 2), revision: 7 };
        steps(&mut history)[1].outcome = Outcome::Acknowledged(Some(shown));
        assert!(matches!(check(&history, &replicas)[..], [Violation::Differs { step: 1, .. }]));
    }

    #[test]
    fn an_answer_that_shows_something_else_is_found() {
        let (mut history, replicas) = world();
        let shown = Shown { row: row("Starting", 1), revision: 2 };
        steps(&mut history)[1].outcome = Outcome::Acknowledged(Some(shown));
        assert!(matches!(check(&history, &replicas)[..], [Violation::Answer { step: 1, .. }]));
    }

    #[test]
    fn half_a_step_is_found() {
        let (mut history, replicas) = world();
        let job = Object::job("b");
        history.objects.insert(job.clone(), vec![Step { after: row("Assigned", 2), outcome: Outcome::Unknown }]);
        history.pairs.push(Pair([(Object::vm("a"), 1), (job.clone(), 0)]));
        assert_eq!(check(&history, &replicas), [Violation::Torn { objects: [Object::vm("a"), job] }]);
    }

    #[test]
    fn a_purged_object_has_no_row() {
        let (mut history, mut replicas) = world();
        steps(&mut history).push(Step { after: Row::default(), outcome: Outcome::Acknowledged(None) });
        push_event(&mut history, &mut replicas, &Object::vm("a"), "");
        assert!(matches!(check(&history, &replicas)[..], [Violation::Row { expected: None, .. }]));
        each(&mut replicas, |replica| replica.rows.clear());
        assert_eq!(check(&history, &replicas), []);
    }

    #[test]
    fn what_nobody_asked_for_is_found() {
        let (mut history, mut replicas) = world();
        push_event(&mut history, &mut replicas, &Object::job("b"), "Queued");
        assert_eq!(check(&history, &replicas), [Violation::Unasked { object: Object::job("b") }]);
    }

    #[test]
    fn registrations_that_do_not_add_up_are_found() {
        let (mut history, mut replicas) = world();
        let node = Object::node("n");
        each(&mut replicas, |replica| drop(replica.rows.insert(node.clone(), row("Ready", 3))));
        for (acknowledged, unknown, right) in [
            (vec![1, 2, 3], 0, true),
            (vec![1, 3], 1, true),
            (vec![1, 3], 0, false),
            (vec![1, 2, 2], 0, false),
            (vec![1, 2, 3, 4], 0, false),
            (vec![4], 2, false),
        ] {
            history.nodes.insert(node.clone(), Registrations { acknowledged: acknowledged.clone(), unknown });
            assert_eq!(check(&history, &replicas).is_empty(), right, "{acknowledged:?} {unknown}");
        }
    }

    #[test]
    fn refusals_and_stale_answers_are_found() {
        let (mut history, replicas) = world();
        history.refusals.push("STALE_GENERATION".into());
        history.reads.push(Read { what: "GetRevision".into(), at_least: 7, shown: 7 });
        history.reads.push(Read { what: "GetRevision".into(), at_least: 7, shown: 6 });
        let stale = Violation::Stale { what: "GetRevision".into(), at_least: 7, shown: 6 };
        assert_eq!(check(&history, &replicas), [Violation::Refused("STALE_GENERATION".into()), stale]);
    }

    #[test]
    fn a_gap_in_the_revisions_is_found() {
        let (history, mut replicas) = world();
        each(&mut replicas, |replica| drop(replica.events.remove(0)));
        assert_eq!(check(&history, &replicas)[0], Violation::Gap { expected: 1, found: 2 });
    }

    #[test]
    fn a_watcher_that_misses_repeats_or_mistakes_an_event_is_found() {
        let wrong = |change: &dyn Fn(&mut Vec<Message>)| {
            let (mut history, replicas) = world();
            change(&mut history.watched[0].messages);
            let found = check(&history, &replicas);
            assert!(matches!(found[..], [Violation::Watcher { .. }]), "{found:?}");
        };
        wrong(&|messages| drop(messages.remove(0)));
        wrong(&|messages| drop(messages.remove(1)));
        wrong(&|messages| messages.insert(0, messages[0].clone()));
        wrong(&|messages| messages.swap(0, 1));
        wrong(&|messages| messages[1] = Message::Event { revision: 2, object: Object::job("a") });
        wrong(&|messages| messages[2] = Message::Covered { revision: 3 });
        wrong(&|messages| messages.truncate(1));
    }

    #[test]
    fn a_watcher_need_not_see_what_came_after_it_stopped() {
        let (mut history, replicas) = world();
        history.watched[0].messages.truncate(1);
        history.watched[0].until = 1;
        assert_eq!(check(&history, &replicas), []);
    }

    #[test]
    fn replicas_that_differ_are_found() {
        let (history, mut replicas) = world();
        replicas[1].tables.get_mut("vms").unwrap()[0] = "a Starting".into();
        assert!(matches!(check(&history, &replicas)[..], [Violation::Replicas { row: 0, .. }]));
        let (history, mut replicas) = world();
        replicas[1].tables.get_mut("vms").unwrap().push("b".into());
        assert!(matches!(check(&history, &replicas)[..], [Violation::Replicas { row: 1, here: None, .. }]));
        let (history, mut replicas) = world();
        replicas[1].tables.insert("jobs".into(), vec!["j".into()]);
        assert!(matches!(check(&history, &replicas)[..], [Violation::Replicas { here: None, .. }]));
    }

    #[test]
    fn an_epoch_of_a_lease_has_one_holder_and_is_recorded() {
        let told = |told: &[(u64, &str)], recorded| {
            let (mut history, mut replicas) = world();
            history.leases = told.iter().map(|&(epoch, holder)| (epoch, holder.to_owned())).collect();
            replicas.iter_mut().for_each(|replica| replica.epoch = recorded);
            check(&history, &replicas)
        };
        assert_eq!(told(&[(1, "a"), (2, "b"), (1, "a")], 2), []);
        let holders = ["a".to_owned(), "b".to_owned()];
        assert_eq!(told(&[(1, "a"), (1, "b")], 1), [Violation::Lease { epoch: 1, holders }]);
        assert_eq!(told(&[(3, "a")], 2), [Violation::LeaseLost { epoch: 3, recorded: 2 }]);
    }
}
