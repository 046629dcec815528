//! When a replica may be trusted: a pure state machine over what is observed of its Raft core and of its leader.
//!
//! ```text
//!   metrics of the core ─┐                       ┌─► the role (what may be served)
//!   the leader's answers ┼─► step ─► effects ────┼─► prepare to lead
//!   what others say ─────┘                       └─► end the process, or begin again without data
//! ```
//! A replica is trusted only while it proves itself. Hiqlite 0.15.3 was seen to live on with a core that had ended, and
//! to serve what it knew for minutes without ever catching up again (the first snapshot of a fresh cluster; a process
//! that was stopped for a minute). It must not know how anything is observed or done.

use std::time::{Duration, Instant};

use super::Role;

/// How stale a follower's answers may be. Above the longest stall seen of a healthy one (a snapshot of a large database).
pub(crate) const BEHIND_AFTER: Duration = Duration::from_secs(5);
/// A leader that no majority has answered for this long leads nobody; a few elections' time.
const QUORUM_LOST_AFTER: Duration = Duration::from_secs(3);
/// A replica that has not applied anything for this long, though its leader has more, will not do so by itself.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// A process that looks every few milliseconds and has not for so long was stopped, or starved.
const STOOD_STILL_AFTER: Duration = Duration::from_secs(2);

/// Why a replica has to be started again, when it is not for being stuck.
pub(crate) const CORE_ENDED: &str = "its Raft core has ended";

/// What is seen of a replica at one time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Observation {
    /// Its Raft core has ended.
    pub(crate) ended: bool,
    /// Its Raft core leads.
    pub(crate) leads: bool,
    /// Whom its Raft core follows.
    pub(crate) leader: Option<u64>,
    /// The term.
    pub(crate) term: u64,
    /// Members that vote, this replica among them.
    pub(crate) voters: usize,
    /// A leader's: since a majority last answered.
    pub(crate) quorum_ack: Option<Duration>,
    /// The newest entry that its database shows.
    pub(crate) applied: u64,
}

/// What a leader said it had applied, and when it was asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tip {
    pub(crate) asked_at: Instant,
    pub(crate) applied: u64,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Another role from now on.
    Become(Role),
    /// Make ready to lead in this term; [`Watchdog::prepared`] tells of it.
    Prepare { term: u64 },
    /// The process can't go on with this core; a new one reads its log again.
    Restart(&'static str),
    /// A restart has not helped. If the others are well without this replica: set its data aside and begin without.
    Reseed,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Watchdog {
    /// How many voters make a majority of the configured replicas.
    majority: usize,
    /// The process before this one ended because it was stuck.
    stuck_before: bool,
    role: Role,
    /// The term in which it is ready to lead.
    prepared: Option<u64>,
    preparing: Option<u64>,
    /// Until when it is known to have seen everything.
    caught_up_at: Option<Instant>,
    applied: u64,
    applied_at: Instant,
    looked_at: Instant,
}

impl Watchdog {
    pub(crate) fn new(majority: usize, stuck_before: bool, now: Instant) -> Self {
        Self {
            majority,
            stuck_before,
            role: Role::Starting,
            prepared: None,
            preparing: None,
            caught_up_at: None,
            applied: 0,
            applied_at: now,
            looked_at: now,
        }
    }

    /// The replica is ready to lead in `term`, or failed to become it.
    pub(crate) fn prepared(&mut self, term: u64, ready: bool) {
        self.preparing = None;
        self.prepared = ready.then_some(term);
    }

    /// Whether it has ever been up to date in this process.
    pub(crate) fn has_caught_up(&self) -> bool {
        self.caught_up_at.is_some()
    }

    /// Looks at the replica. `tip` is the latest answer of a leader.
    pub(crate) fn step(&mut self, now: Instant, seen: Observation, tip: Option<Tip>) -> Vec<Effect> {
        if seen.ended {
            return vec![Effect::Restart(CORE_ENDED)];
        }
        // Time in which this process did not run at all is not time in which it got no further.
        let stood_still = now.saturating_duration_since(self.looked_at) > STOOD_STILL_AFTER;
        self.looked_at = now;
        if seen.applied != self.applied || stood_still {
            (self.applied, self.applied_at) = (seen.applied, now);
        }
        let mut effects = Vec::new();
        let role = if seen.leads {
            self.lead(now, seen, &mut effects)
        } else {
            self.prepared = None;
            self.follow(now, seen, tip, &mut effects)
        };
        if role != self.role {
            self.role = role;
            effects.push(Effect::Become(role));
        }
        effects
    }

    fn lead(&mut self, now: Instant, seen: Observation, effects: &mut Vec<Effect>) -> Role {
        // Until enough replicas have joined, "a majority" would be fewer disks than was promised.
        let quorum = seen.voters >= self.majority
            && (seen.voters == 1 || seen.quorum_ack.is_some_and(|age| age < QUORUM_LOST_AFTER));
        match (quorum, self.prepared == Some(seen.term)) {
            (true, true) => {
                self.caught_up_at = Some(now);
                return Role::Leader { term: seen.term };
            }
            (true, false) if self.preparing != Some(seen.term) => {
                self.preparing = Some(seen.term);
                effects.push(Effect::Prepare { term: seen.term });
            }
            (false, true) => return Role::NoQuorum,
            (true | false, false) => {}
        }
        // Its database may lack what the leader before it had acknowledged.
        if self.is_fresh(now) { Role::Follower { leader: None } } else { self.stale_role(None) }
    }

    fn follow(&mut self, now: Instant, seen: Observation, tip: Option<Tip>, effects: &mut Vec<Effect>) -> Role {
        if let Some(tip) = tip.filter(|tip| seen.applied >= tip.applied) {
            self.caught_up_at = self.caught_up_at.max(Some(tip.asked_at));
        }
        if self.is_fresh(now) {
            return Role::Follower { leader: seen.leader };
        }
        let more = tip.is_some_and(|tip| tip.applied > seen.applied && now - tip.asked_at < BEHIND_AFTER);
        if more && now - self.applied_at > STUCK_AFTER {
            effects.push(match self.stuck_before {
                false => Effect::Restart("it does not catch up with its leader"),
                true => Effect::Reseed,
            });
        }
        self.stale_role(seen.leader.filter(|_| tip.is_some()))
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.caught_up_at.is_some_and(|at| now.saturating_duration_since(at) < BEHIND_AFTER)
    }

    fn stale_role(&self, leader: Option<u64>) -> Role {
        match (self.has_caught_up(), leader) {
            (false, _) => Role::Starting,
            (true, Some(_)) => Role::Behind,
            (true, None) => Role::NoQuorum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct World {
        watchdog: Watchdog,
        now: Instant,
    }

    impl World {
        fn new(stuck_before: bool) -> Self {
            let now = Instant::now();
            Self { watchdog: Watchdog::new(2, stuck_before, now), now }
        }

        fn after(&mut self, time: Duration, seen: Observation, tip: Option<u64>) -> Vec<Effect> {
            self.now += time;
            let tip = tip.map(|applied| Tip { asked_at: self.now, applied });
            self.watchdog.step(self.now, seen, tip)
        }
    }

    fn following(applied: u64) -> Observation {
        Observation { leader: Some(1), term: 1, voters: 3, applied, ..Observation::default() }
    }

    fn leading(ack: Duration) -> Observation {
        Observation { leads: true, leader: Some(2), quorum_ack: Some(ack), ..following(7) }
    }

    fn follower(leader: u64) -> Vec<Effect> {
        vec![Effect::Become(Role::Follower { leader: Some(leader) })]
    }

    #[test]
    fn a_follower_serves_once_it_has_what_its_leader_had_when_it_was_asked() {
        let mut world = World::new(false);
        assert_eq!(world.after(SECOND, following(5), None), []);
        assert_eq!(world.after(SECOND, following(5), Some(7)), []);
        assert_eq!(world.after(SECOND, following(7), Some(7)), follower(1));
    }

    #[test]
    fn a_follower_that_no_longer_proves_it_is_behind_and_comes_back() {
        let mut world = World::new(false);
        world.after(SECOND, following(7), Some(7));
        assert_eq!(world.after(SECOND, following(7), Some(9)), []);
        assert_eq!(world.after(BEHIND_AFTER, following(7), Some(99)), [Effect::Become(Role::Behind)]);
        assert_eq!(world.after(SECOND, following(99), Some(99)), follower(1));
        let alone = Observation { leader: None, ..following(99) };
        assert_eq!(world.after(SECOND, alone, None), [Effect::Become(Role::Follower { leader: None })]);
        assert_eq!(world.after(BEHIND_AFTER, alone, None), [Effect::Become(Role::NoQuorum)]);
    }

    #[test]
    fn a_leader_takes_changes_once_it_is_ready_and_only_while_a_majority_answers() {
        let mut world = World::new(false);
        let joining = Observation { voters: 1, ..leading(Duration::ZERO) };
        assert_eq!(world.after(SECOND, joining, None), []);
        assert_eq!(world.after(SECOND, leading(Duration::ZERO), None), [Effect::Prepare { term: 1 }]);
        assert_eq!(world.after(SECOND, leading(Duration::ZERO), None), []);
        world.watchdog.prepared(1, true);
        let leader = vec![Effect::Become(Role::Leader { term: 1 })];
        assert_eq!(world.after(SECOND, leading(Duration::ZERO), None), leader);
        assert_eq!(world.after(SECOND, leading(QUORUM_LOST_AFTER), None), [Effect::Become(Role::NoQuorum)]);
        assert_eq!(world.after(SECOND, leading(Duration::ZERO), None), leader);
        // Another term is another leadership.
        let again = Observation { term: 3, ..leading(Duration::ZERO) };
        let effects = world.after(SECOND, again, None);
        assert_eq!(effects, [Effect::Prepare { term: 3 }, Effect::Become(Role::Follower { leader: None })]);
    }

    #[test]
    fn a_failed_preparation_is_repeated() {
        let mut world = World::new(false);
        world.after(SECOND, leading(Duration::ZERO), None);
        world.watchdog.prepared(1, false);
        assert_eq!(world.after(SECOND, leading(Duration::ZERO), None), [Effect::Prepare { term: 1 }]);
    }

    #[test]
    fn a_core_that_has_ended_ends_the_process() {
        let ended = Observation { ended: true, ..following(7) };
        assert!(matches!(World::new(false).after(SECOND, ended, None)[..], [Effect::Restart(_)]));
    }

    #[test]
    fn time_in_which_the_process_stood_still_does_not_count() {
        let mut world = World::new(true);
        world.after(SECOND, following(7), Some(7));
        let effects = world.after(2 * STUCK_AFTER, following(7), Some(9));
        assert_eq!(effects, [Effect::Become(Role::Behind)]);
    }

    #[test]
    fn a_stuck_replica_is_restarted_and_when_that_did_not_help_begins_again() {
        for stuck_before in [false, true] {
            let mut world = World::new(stuck_before);
            world.after(SECOND, following(7), Some(7));
            let mut effects = Vec::new();
            for _ in 0..=(STUCK_AFTER.as_secs()) {
                effects = world.after(SECOND, following(7), Some(9));
            }
            match stuck_before {
                false => assert!(matches!(effects[..], [Effect::Restart(_)]), "{effects:?}"),
                true => assert_eq!(effects, [Effect::Reseed]),
            }
        }
    }

    #[test]
    fn one_that_catches_up_slowly_or_has_no_leader_is_not_stuck() {
        let mut world = World::new(true);
        for applied in 0..100 {
            let effects = world.after(SECOND, following(applied), Some(1_000_000));
            assert!(!effects.contains(&Effect::Reseed), "{effects:?}");
        }
        let alone = Observation { leader: None, ..following(100) };
        for _ in 0..100 {
            let effects = world.after(SECOND, alone, None);
            assert!(!effects.contains(&Effect::Reseed), "{effects:?}");
        }
    }
}
