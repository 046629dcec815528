//! Whether this scheduler leads, from what the registry answers and the time that passes.
//!
//! Safety lies in the epoch, which the registry checks on every write; this only decides when to try. A leader that is not
//! confirmed for the lease's whole time stops by itself: another one may lead by then.

use std::time::Duration;

use blixard::{pb::registry::v1::AcquireLeaseResponse, time::Timestamp};

/// How long the lease is kept without being asked for. A leader that dies is followed by another one after so long; one whose
/// process is short of CPU, or whose registry fails over (3 to 5 s), keeps it.
pub(crate) const TTL: Duration = Duration::from_secs(10);
/// How often it is asked for.
pub(crate) const EVERY: Duration = Duration::from_secs(2);

/// What an answer means for the control loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// As before.
    None,
    /// Lead under this epoch, once what the leader before wrote has been read.
    Won(u64),
    /// Lead no more.
    Lost,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// Under which it leads, and when the request was sent by which that was last confirmed.
    held: Option<(u64, Timestamp)>,
    /// Who leads, as far as is known.
    leader: String,
    asked_at: Option<Timestamp>,
    /// The lead was lost while a question was under way: its answer is about who this scheduler was.
    disowned: bool,
    ask_next: Timestamp,
}

impl Lease {
    /// Under which epoch this scheduler leads.
    pub(crate) fn epoch(&self) -> Option<u64> {
        self.held.map(|(epoch, _)| epoch)
    }

    /// Who leads, as far as is known; empty: nobody.
    pub(crate) fn leader(&self) -> &str {
        &self.leader
    }

    /// Whether to ask now; noted as done.
    pub(crate) fn asks(&mut self, now: Timestamp) -> bool {
        if self.asked_at.is_some() || now < self.ask_next {
            return false;
        }
        self.asked_at = Some(now);
        true
    }

    /// The registry answered; `None`: it did not.
    pub(crate) fn answered(&mut self, now: Timestamp, answer: Option<AcquireLeaseResponse>) -> Change {
        let asked_at = self.asked_at.take().unwrap_or(now);
        if std::mem::take(&mut self.disowned) {
            self.ask_next = now;
            return Change::None;
        }
        self.ask_next = now.plus(EVERY);
        let Some(answer) = answer else { return Change::None };
        self.leader = answer.holder;
        match (answer.held, self.held) {
            (true, Some((epoch, _))) if epoch == answer.epoch => {
                self.held = Some((epoch, asked_at));
                Change::None
            }
            (true, _) => {
                self.held = Some((answer.epoch, asked_at));
                Change::Won(answer.epoch)
            }
            (false, Some(_)) => self.lost(),
            (false, None) => Change::None,
        }
    }

    /// The registry refused a write for its epoch.
    pub(crate) fn refused(&mut self, now: Timestamp, epoch: u64) -> Change {
        match self.held {
            Some((held, _)) if held == epoch => {
                self.ask_next = now;
                self.lost()
            }
            Some(_) | None => Change::None,
        }
    }

    /// Time has passed.
    pub(crate) fn passed(&mut self, now: Timestamp) -> Change {
        match self.held {
            Some((_, confirmed)) if now >= confirmed.plus(TTL) => self.lost(),
            Some(_) | None => Change::None,
        }
    }

    /// The clock was set: how long ago it was confirmed is not known any more.
    pub(crate) fn clock_set(&mut self, now: Timestamp) -> Change {
        self.ask_next = now;
        self.asked_at = self.asked_at.map(|_| now);
        if self.held.is_some() { self.lost() } else { Change::None }
    }

    /// When it has something to do next; `None`: when the answer comes.
    pub(crate) fn next_wake(&self) -> Option<Timestamp> {
        let ask = self.asked_at.is_none().then_some(self.ask_next);
        let end = self.held.map(|(_, confirmed)| confirmed.plus(TTL));
        ask.into_iter().chain(end).min()
    }

    fn lost(&mut self) -> Change {
        self.held = None;
        self.disowned = self.asked_at.is_some();
        Change::Lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(held: bool, epoch: u64) -> Option<AcquireLeaseResponse> {
        Some(AcquireLeaseResponse { held, epoch, holder: if held { "me" } else { "other" }.to_owned() })
    }

    fn at(ms: i64) -> Timestamp {
        Timestamp(ms)
    }

    #[test]
    fn it_is_asked_for_again_and_again_one_question_at_a_time() {
        let mut lease = Lease::default();
        assert!(lease.asks(at(0)) && !lease.asks(at(5000)), "one is under way");
        assert_eq!(lease.answered(at(5000), None), Change::None);
        assert_eq!(lease.next_wake(), Some(at(7000)));
        assert!(!lease.asks(at(6999)) && lease.asks(at(7000)));
    }

    #[test]
    fn it_is_won_once_and_lost_when_another_has_it() {
        let mut lease = Lease::default();
        lease.asks(at(0));
        assert_eq!(lease.answered(at(1), answer(true, 7)), Change::Won(7));
        lease.asks(at(2001));
        assert_eq!(lease.answered(at(2002), answer(true, 7)), Change::None);
        lease.asks(at(4002));
        assert_eq!(lease.answered(at(4003), answer(false, 8)), Change::Lost);
        assert_eq!((lease.epoch(), lease.leader()), (None, "other"));
        lease.asks(at(6003));
        assert_eq!(lease.answered(at(6004), answer(true, 9)), Change::Won(9));
    }

    #[test]
    fn a_leader_that_is_not_confirmed_stops_counted_from_when_it_asked() {
        let mut lease = Lease::default();
        lease.asks(at(0));
        lease.answered(at(9000), answer(true, 7));
        assert_eq!(lease.passed(at(9999)), Change::None);
        assert_eq!(lease.passed(at(10_000)), Change::Lost);
        assert_eq!(lease.passed(at(10_001)), Change::None, "once");
    }

    #[test]
    fn what_was_asked_before_the_lead_was_lost_does_not_bring_it_back() {
        let mut lease = Lease::default();
        lease.asks(at(0));
        lease.answered(at(0), answer(true, 7));
        lease.asks(at(2000));
        assert_eq!(lease.passed(at(10_000)), Change::Lost);
        assert_eq!(lease.answered(at(10_500), answer(true, 7)), Change::None);
        assert!(lease.asks(at(10_500)), "it asks as who it is now");
        assert_eq!(lease.answered(at(10_501), answer(true, 8)), Change::Won(8));
    }

    #[test]
    fn a_write_refused_for_its_epoch_costs_the_lead_unless_it_was_an_earlier_ones() {
        let mut lease = Lease::default();
        lease.asks(at(0));
        lease.answered(at(0), answer(true, 7));
        assert_eq!(lease.refused(at(1), 6), Change::None);
        assert_eq!(lease.refused(at(1), 7), Change::Lost);
        assert!(lease.asks(at(1)), "who leads is asked at once");
    }
}
