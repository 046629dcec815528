//! Who has which lease. Pure: it answers who asks, from what is recorded, who has asked and the time that passes.
//!
//! A lease is recorded with its holder and its epoch, and both are written only when it changes hands. That its holder still
//! wants it is in memory alone: the holder asks again and again, and its silence is counted as [`crate::presence`] counts that
//! of nodes, only while somebody listens. So a replica that begins to lead gives every holder its whole time.

use std::{collections::BTreeMap, time::Duration};

use uuid::Uuid;

/// Who has a lease, or wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The same at each of its starts.
    pub(crate) name: String,
    /// Which start of it.
    pub(crate) instance: Uuid,
}

/// A lease as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Recorded {
    /// `None`: nobody has it.
    pub(crate) holder: Option<Holder>,
    /// Counts the changes of hands; 0: nobody ever had it.
    pub(crate) epoch: u64,
}

/// What somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// To take it or keep it, and to lose it after so much silence.
    Have(Duration),
    GiveUp,
}

/// What is to be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It stands as it is recorded: answer that.
    Stands(Recorded),
    /// Record that the lease passes to who asks, if its epoch still is this.
    Take { epoch: u64 },
    /// Record that who asks gives it up.
    Release,
    /// Read what is recorded, and ask again.
    Unknown,
}

struct Lease {
    recorded: Recorded,
    /// Since its holder has asked for it.
    silence: Duration,
    /// What its holder has asked for; `None`: it has not yet, here.
    ttl: Option<Duration>,
}

/// See the module.
pub(crate) struct Leases {
    /// The most silence that one step counts.
    step: Duration,
    leases: BTreeMap<String, Lease>,
}

impl Leases {
    /// Of a replica that begins to lead: no holder has been silent yet.
    pub(crate) fn new(step: Duration) -> Self {
        Self { step, leases: BTreeMap::new() }
    }

    /// Learns what is recorded; an older record is no news.
    pub(crate) fn recorded(&mut self, name: &str, recorded: Recorded) {
        match self.leases.get_mut(name) {
            Some(lease) if lease.recorded.epoch > recorded.epoch || lease.recorded == recorded => {}
            // Given up; what comes late with its holder does not bring it back.
            Some(lease) if lease.recorded.epoch == recorded.epoch && lease.recorded.holder.is_none() => {}
            _ => {
                let lease = Lease { recorded, silence: Duration::ZERO, ttl: None };
                self.leases.insert(name.to_owned(), lease);
            }
        }
    }

    /// Answers who asks.
    pub(crate) fn ask(&mut self, name: &str, who: &Holder, wish: Wish) -> Asked {
        let Some(lease) = self.leases.get_mut(name) else { return Asked::Unknown };
        let epoch = lease.recorded.epoch;
        match (&lease.recorded.holder, wish) {
            (Some(holder), Wish::Have(ttl)) if holder == who => {
                lease.silence = Duration::ZERO;
                lease.ttl = Some(ttl);
                Asked::Stands(lease.recorded.clone())
            }
            (Some(holder), Wish::GiveUp) if holder == who => Asked::Release,
            (_, Wish::GiveUp) => Asked::Stands(lease.recorded.clone()),
            // Another start of the holder: the one before it has ended.
            (Some(holder), Wish::Have(_)) if holder.name == who.name => Asked::Take { epoch },
            // One that has not been heard of here is taken to have asked for what the next one does.
            (Some(_), Wish::Have(ttl)) if lease.silence < lease.ttl.unwrap_or(ttl) => {
                Asked::Stands(lease.recorded.clone())
            }
            (Some(_) | None, Wish::Have(_)) => Asked::Take { epoch },
        }
    }

    /// Lets time pass. Nothing is written of a lease that runs out until somebody wants it.
    pub(crate) fn passed(&mut self, time: Duration) {
        for lease in self.leases.values_mut() {
            lease.silence += time.min(self.step);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "scheduler";
    const STEP: Duration = Duration::from_secs(2);

    /// What happens to one lease of three seconds, step by step, and what each step is answered. Who asks is a letter and the
    /// number of its start; whatever is to be recorded is.
    fn answers(steps: &str) -> Vec<String> {
        let mut leases = Leases::new(STEP);
        let mut table = Recorded::default();
        let holder = |text: &str| {
            let (name, instance) = text.split_at(1);
            Holder { name: name.into(), instance: Uuid::from_u128(instance.parse().unwrap()) }
        };
        let shown = |recorded: &Recorded| match &recorded.holder {
            Some(Holder { name, instance }) => format!("{name}{} {}", instance.as_u128(), recorded.epoch),
            None => format!("nobody {}", recorded.epoch),
        };
        let mut step = |step: &str| {
            let (what, argument) = step.split_once(' ').unwrap();
            let wish = match what {
                "asks" => Wish::Have(Duration::from_secs(3)),
                "releases" => Wish::GiveUp,
                "passed" => {
                    leases.passed(Duration::from_secs(argument.parse().unwrap()));
                    return "-".to_owned();
                }
                "leads" => {
                    leases = Leases::new(STEP);
                    return "-".to_owned();
                }
                other => panic!("{other}"),
            };
            let who = holder(argument);
            let mut asked = leases.ask(NAME, &who, wish);
            if asked == Asked::Unknown {
                leases.recorded(NAME, table.clone());
                asked = leases.ask(NAME, &who, wish);
            }
            match asked {
                Asked::Take { epoch } => {
                    assert_eq!(epoch, table.epoch);
                    table = Recorded { holder: Some(who), epoch: epoch + 1 };
                }
                Asked::Release => table.holder = None,
                Asked::Stands(recorded) => return shown(&recorded),
                Asked::Unknown => panic!("it was told"),
            }
            leases.recorded(NAME, table.clone());
            format!("written: {}", shown(&table))
        };
        steps.split(", ").map(&mut step).collect()
    }

    #[test]
    fn each_story_ends_as_it_should() {
        let stories = [
            ("the first to ask has it", "asks a1", "written: a1 1"),
            ("and keeps it without a write", "asks a1, passed 2, asks a1", "a1 1"),
            ("nobody else gets it meanwhile", "asks a1, passed 2, asks b1", "a1 1"),
            ("who asks in time keeps it", "asks a1, asks a1, passed 2, asks a1, passed 2, asks b1", "a1 1"),
            ("who doesn't loses it", "asks a1, passed 2, passed 2, asks b1", "written: b1 2"),
            ("unless nobody wants it", "asks a1, passed 2, passed 2, passed 2, asks a1", "a1 1"),
            ("and is told", "asks a1, passed 2, passed 2, asks b1, asks a1", "b1 2"),
            ("another start of the holder has it at once", "asks a1, asks a2", "written: a2 2"),
            ("it is given up", "asks a1, releases a1", "written: nobody 1"),
            ("then the next has it", "asks a1, releases a1, asks b1", "written: b1 2"),
            ("nobody else can give it up", "asks a1, releases b1", "a1 1"),
            ("not even another start", "asks a1, releases a2", "a1 1"),
            ("what nobody has can be given up", "releases a1", "nobody 0"),
            ("a new leader begins afresh", "asks a1, passed 2, leads 2, asks b1, passed 2, asks b1", "a1 1"),
            ("and counts on", "asks a1, leads 2, asks b1, passed 2, passed 2, asks b1", "written: b1 2"),
            ("a registry that was stopped has not listened", "asks a1, passed 3600, asks b1", "a1 1"),
        ];
        for (story, steps, end) in stories {
            assert_eq!(answers(steps).last().unwrap(), end, "{story}: {steps}");
        }
    }

    #[test]
    fn what_is_read_late_does_not_undo_what_was_recorded_since() {
        let mut leases = Leases::new(STEP);
        let a = Holder { name: "a".into(), instance: Uuid::nil() };
        let held = Recorded { holder: Some(a.clone()), epoch: 2 };
        leases.recorded(NAME, held.clone());
        leases.recorded(NAME, Recorded { holder: None, epoch: 1 });
        assert_eq!(leases.ask(NAME, &a, Wish::Have(STEP)), Asked::Stands(held.clone()));
        leases.recorded(NAME, Recorded { holder: None, epoch: 2 });
        leases.recorded(NAME, held);
        assert_eq!(leases.ask(NAME, &a, Wish::Have(STEP)), Asked::Take { epoch: 2 });
    }
}
