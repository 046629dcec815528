//! Judges what became of the jobs. Pure; it must not know how it was come by.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use blixard::job::JobState;

use crate::job::{Effect, Mark};

/// A job when all is over.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: String,
    /// What it had to print.
    pub(crate) output: Vec<u8>,
    /// Whether its end was asked for.
    pub(crate) cancelled: bool,
    /// How many attempts might start.
    pub(crate) max_attempts: u32,
    /// As the registry has it; `None`: it does not know it.
    pub(crate) recorded: Option<Recorded>,
    /// What its attempts did, in that order.
    pub(crate) effects: Vec<Effect>,
    /// The log of its last attempt as it reads now.
    pub(crate) log: Result<Vec<u8>, String>,
    /// What somebody has seen who followed it from the beginning, of its last attempt.
    pub(crate) followed: Option<Vec<u8>>,
}

/// What the registry has of a job.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) state: JobState,
    pub(crate) reason: String,
    /// The last one.
    pub(crate) attempt: u32,
    pub(crate) attempts_started: u32,
    pub(crate) attempts: Vec<Attempt>,
}

/// A try of a job.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) number: u32,
    /// Whether it is on record that it succeeded.
    pub(crate) succeeded: bool,
}

/// What must never be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Violation {
    /// It was acknowledged, and the registry does not know it.
    Forgotten,
    /// It has not ended.
    NotEnded { state: JobState, reason: String },
    /// It ended as it should not have.
    EndedWrong { state: JobState, reason: String, attempts_started: u32 },
    /// An attempt did something that is not on record.
    Unrecorded { attempt: u32 },
    /// An attempt began, or ended, more than once.
    Repeated { attempt: u32, mark: Mark, times: usize },
    /// An attempt did something although a later one had begun.
    Overlap { attempt: u32, later: u32 },
    /// More than one attempt is on record as having succeeded.
    SucceededTwice { attempts: Vec<u32> },
    /// It succeeded, and its last attempt did not do everything.
    NotDone { attempt: u32, marks: Vec<Mark> },
    /// The log of an attempt that succeeded is not what it printed.
    Log { who: &'static str, expected: usize, found: usize, differs_at: usize },
    /// The log of an attempt that succeeded can't be read.
    NoLog { reason: String },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// All violations of one job.
pub(crate) fn check(job: &Job) -> Vec<Violation> {
    let mut found = Vec::new();
    let Some(recorded) = &job.recorded else { return vec![Violation::Forgotten] };
    end(job, recorded, &mut found);
    effects(&job.effects, recorded, &mut found);
    if recorded.state == JobState::Succeeded {
        done(&job.effects, recorded.attempt, &mut found);
        match &job.log {
            Ok(log) => found.extend(compare("a reader", &job.output, log)),
            Err(reason) => found.push(Violation::NoLog { reason: reason.clone() }),
        }
        found.extend(job.followed.as_ref().and_then(|seen| compare("a follower", &job.output, seen)));
    }
    found
}

/// It ended, and as it had to: a job that nothing but faults stops succeeds.
fn end(job: &Job, recorded: &Recorded, found: &mut Vec<Violation>) {
    let (state, reason) = (recorded.state, recorded.reason.clone());
    let right = match state {
        JobState::Succeeded => true,
        JobState::Cancelled => job.cancelled,
        JobState::Failed => recorded.attempts_started >= job.max_attempts,
        JobState::TimedOut => false,
        JobState::Queued | JobState::Assigned | JobState::Running => {
            found.push(Violation::NotEnded { state, reason });
            return;
        }
    };
    if !right {
        found.push(Violation::EndedWrong { state, reason, attempts_started: recorded.attempts_started });
    }
    let succeeded = recorded.attempts.iter().filter(|attempt| attempt.succeeded);
    let attempts: Vec<_> = succeeded.map(|attempt| attempt.number).collect();
    if attempts.len() > 1 {
        found.push(Violation::SucceededTwice { attempts });
    }
}

/// Each attempt is on record, began and ended once at most, and did nothing after a later one began.
fn effects(effects: &[Effect], recorded: &Recorded, found: &mut Vec<Violation>) {
    let known: BTreeSet<_> = recorded.attempts.iter().map(|attempt| attempt.number).collect();
    let mut seen: BTreeMap<u32, Vec<Mark>> = BTreeMap::new();
    let mut latest = 0;
    let mut overlapped = BTreeSet::new();
    for effect in effects {
        seen.entry(effect.attempt).or_default().push(effect.mark);
        if effect.attempt < latest && overlapped.insert(effect.attempt) {
            found.push(Violation::Overlap { attempt: effect.attempt, later: latest });
        }
        latest = latest.max(effect.attempt);
    }
    for (&attempt, marks) in &seen {
        if !known.contains(&attempt) {
            found.push(Violation::Unrecorded { attempt });
        }
        for mark in [Mark::Begin, Mark::End] {
            let times = marks.iter().filter(|&&other| other == mark).count();
            if times > 1 {
                found.push(Violation::Repeated { attempt, mark, times });
            }
        }
    }
}

/// The attempt began and came to its end.
fn done(effects: &[Effect], attempt: u32, found: &mut Vec<Violation>) {
    let marks: Vec<_> = effects.iter().filter(|effect| effect.attempt == attempt).map(|effect| effect.mark).collect();
    if marks.first() != Some(&Mark::Begin) || marks.last() != Some(&Mark::End) {
        found.push(Violation::NotDone { attempt, marks });
    }
}

fn compare(who: &'static str, expected: &[u8], found: &[u8]) -> Option<Violation> {
    if expected == found {
        return None;
    }
    let same = expected.iter().zip(found).take_while(|(one, other)| one == other).count();
    Some(Violation::Log { who, expected: expected.len(), found: found.len(), differs_at: same })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Effect {
        text.parse().unwrap()
    }

    fn lines(texts: &[&str]) -> Vec<Effect> {
        texts.iter().map(|text| line(text)).collect()
    }

    /// A job whose first attempt was lost while it ran and whose second one succeeded.
    fn job() -> Job {
        let attempts = [(1, false), (2, true)].map(|(number, succeeded)| Attempt { number, succeeded });
        Job {
            id: "a".into(),
            output: b"one\ntwo\n".to_vec(),
            cancelled: false,
            max_attempts: 3,
            recorded: Some(Recorded {
                state: JobState::Succeeded,
                reason: String::new(),
                attempt: 2,
                attempts_started: 2,
                attempts: attempts.into(),
            }),
            effects: lines(&["begin 1 77", "beat 1 77", "begin 2 78", "beat 2 78", "end 2 78"]),
            log: Ok(b"one\ntwo\n".to_vec()),
            followed: Some(b"one\ntwo\n".to_vec()),
        }
    }

    fn after(change: impl FnOnce(&mut Job, &mut Recorded)) -> Vec<Violation> {
        let mut job = job();
        let mut recorded = job.recorded.take().unwrap();
        change(&mut job, &mut recorded);
        job.recorded = Some(recorded);
        check(&job)
    }

    #[test]
    fn a_job_that_was_tried_again_is_well() {
        assert_eq!(after(|_, _| {}), []);
    }

    #[test]
    fn an_attempt_that_is_lost_before_it_did_anything_is_well() {
        assert_eq!(after(|job, _| job.effects = lines(&["begin 2 1", "end 2 1"])), []);
    }

    #[test]
    fn an_attempt_that_lives_on_beside_a_later_one_is_seen() {
        let found = after(|job, _| job.effects.insert(3, line("beat 1 77")));
        assert_eq!(found, [Violation::Overlap { attempt: 1, later: 2 }]);
    }

    #[test]
    fn an_attempt_that_begins_after_a_later_one_is_seen() {
        let found = after(|job, _| job.effects.rotate_left(2));
        assert_eq!(found, [Violation::Overlap { attempt: 1, later: 2 }]);
    }

    #[test]
    fn an_attempt_that_runs_twice_is_seen() {
        let found = after(|job, _| job.effects.extend(lines(&["begin 2 79", "end 2 79"])));
        let repeated = |mark| Violation::Repeated { attempt: 2, mark, times: 2 };
        assert_eq!(found, [repeated(Mark::Begin), repeated(Mark::End)]);
    }

    #[test]
    fn an_attempt_that_is_not_on_record_is_seen() {
        let found = after(|job, _| job.effects.insert(0, line("begin 0 1")));
        assert_eq!(found, [Violation::Unrecorded { attempt: 0 }]);
    }

    #[test]
    fn a_success_that_was_not_one_is_seen() {
        let found = after(|job, _| job.effects.truncate(4));
        assert_eq!(found, [Violation::NotDone { attempt: 2, marks: vec![Mark::Begin, Mark::Beat] }]);
        let found = after(|job, _| job.effects.clear());
        assert_eq!(found, [Violation::NotDone { attempt: 2, marks: vec![] }]);
    }

    #[test]
    fn two_successes_are_seen() {
        let found = after(|_, recorded| recorded.attempts[0].succeeded = true);
        assert_eq!(found, [Violation::SucceededTwice { attempts: vec![1, 2] }]);
    }

    #[test]
    fn a_job_that_is_forgotten_or_does_not_end_is_seen() {
        let mut forgotten = job();
        forgotten.recorded = None;
        assert_eq!(check(&forgotten), [Violation::Forgotten]);
        for state in [JobState::Queued, JobState::Assigned, JobState::Running] {
            let found = after(|_, recorded| recorded.state = state);
            assert_eq!(found, [Violation::NotEnded { state, reason: String::new() }]);
        }
    }

    #[test]
    fn a_job_may_fail_only_when_its_attempts_are_used_up_and_be_cancelled_only_when_asked() {
        let wrong = |state| Violation::EndedWrong { state, reason: String::new(), attempts_started: 2 };
        for state in [JobState::Failed, JobState::Cancelled, JobState::TimedOut] {
            let found = after(|_, recorded| {
                recorded.state = state;
                recorded.attempts[1].succeeded = false;
            });
            assert_eq!(found, [wrong(state)]);
        }
        let used_up = after(|job, recorded| (job.max_attempts, recorded.state) = (2, JobState::Failed));
        assert_eq!(used_up, []);
        let asked = after(|job, recorded| (job.cancelled, recorded.state) = (true, JobState::Cancelled));
        assert_eq!(asked, []);
    }

    #[test]
    fn a_log_that_lacks_repeats_or_changes_a_byte_is_seen() {
        let log = |log: &[u8]| after(|job, _| job.log = Ok(log.to_vec()));
        let differs = |found, differs_at| Violation::Log { who: "a reader", expected: 8, found, differs_at };
        assert_eq!(log(b"one\ntwo"), [differs(7, 7)]);
        assert_eq!(log(b"one\none\ntwo\n"), [differs(12, 4)]);
        assert_eq!(log(b"one\ntwO\n"), [differs(8, 6)]);
        let found = after(|job, _| job.log = Err("gone".into()));
        assert_eq!(found, [Violation::NoLog { reason: "gone".into() }]);
        let found = after(|job, _| job.followed = Some(b"one\n".to_vec()));
        assert_eq!(found, [Violation::Log { who: "a follower", expected: 8, found: 4, differs_at: 4 }]);
    }

    #[test]
    fn a_line_that_no_job_wrote_is_an_error() {
        for text in ["", "begin", "begin x 1", "stop 1 1"] {
            assert!(text.parse::<Effect>().is_err(), "{text}");
        }
    }
}
