//! Tells those who wait for a job of its changes. Only jobs that somebody waits for, or is about to, have an entry: who
//! submits a job here mostly waits for it next, and what is known of it then need not be read from the registry.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blixard::{
    id::JobId,
    job::{Job, JobState},
};
use tokio::sync::watch;

/// What has been seen of a job since somebody began to wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Its latest copy.
    pub(crate) job: Option<Job>,
    /// The newest attempt that its vmhost has accepted: its log exists.
    pub(crate) accepted: u32,
    /// What it waits for, and the revision of the copy of which that was said.
    pub(crate) waits: Option<(u64, String)>,
}

/// Submissions that are remembered until somebody waits for them, or they end: more than come between a submission's answer
/// and the call that follows it.
const RECENT: usize = 1024;
/// The longest command with its environment, in bytes, of a job that is remembered so: what is long of a job may be 512 KiB.
const RECENT_BYTES: usize = 4096;

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Feed(Arc<Mutex<Entries>>);

#[derive(Default)]
struct Entries {
    jobs: BTreeMap<JobId, Entry>,
    /// Those that have [`Entry::recent`], oldest first; some may have lost it since.
    recent: VecDeque<JobId>,
}

#[derive(Default)]
struct Entry {
    changes: watch::Sender<Seen>,
    /// Stays though nobody waits.
    recent: bool,
}

impl Feed {
    /// Begins to wait. Unless its job is known already, read it from the registry *after* this, then pass it to [`Feed::publish`].
    pub(crate) fn subscribe(&self, job_id: JobId) -> Subscription {
        let changes = self.entries().jobs.entry(job_id).or_default().changes.subscribe();
        Subscription { feed: self.clone(), job_id, changes }
    }

    /// Passes on a newer copy.
    pub(crate) fn publish(&self, job: &Job) {
        let mut entries = self.entries();
        let Some(entry) = entries.jobs.get_mut(&job.id) else { return };
        entry.changes.send_if_modified(|seen| {
            let newer = seen.job.as_ref().is_none_or(|known| known.revision < job.revision);
            if newer {
                seen.job = Some(job.clone());
            }
            newer
        });
        if job.state.is_terminal() {
            entries.forget(job.id);
        }
    }

    /// Remembers a job that was recorded through this scheduler after `subscription` had begun.
    pub(crate) fn remember(&self, subscription: &Subscription, job: &Job) {
        let texts = job.spec.command.iter().chain(job.spec.env.iter().flat_map(|(name, value)| [name, value]));
        if job.state.is_terminal() || texts.map(String::len).sum::<usize>() > RECENT_BYTES {
            return;
        }
        self.publish(job);
        let mut entries = self.entries();
        let Some(entry) = entries.jobs.get_mut(&subscription.job_id) else { return };
        let ended = entry.changes.borrow().job.as_ref().is_none_or(|job| job.state.is_terminal());
        if ended || std::mem::replace(&mut entry.recent, true) {
            return;
        }
        entries.recent.push_back(job.id);
        if entries.recent.len() > RECENT
            && let Some(oldest) = entries.recent.pop_front()
        {
            entries.forget(oldest);
        }
    }

    /// Nothing is remembered any more of jobs that nobody waits for: changes may have been missed.
    pub(crate) fn forget_recent(&self) {
        let mut entries = self.entries();
        for job_id in std::mem::take(&mut entries.recent) {
            entries.forget(job_id);
        }
    }

    /// Passes on that the vmhost has the attempt.
    pub(crate) fn accepted(&self, job_id: JobId, attempt: u32) {
        if let Some(entry) = self.entries().jobs.get(&job_id) {
            entry.changes.send_if_modified(|seen| {
                let newer = seen.accepted < attempt;
                seen.accepted = seen.accepted.max(attempt);
                newer
            });
        }
    }

    /// Passes on what a queued job waits for.
    pub(crate) fn waits(&self, job_id: JobId, revision: u64, reason: &str) {
        if let Some(entry) = self.entries().jobs.get(&job_id) {
            entry.changes.send_if_modified(|seen| {
                let known = seen.waits.as_ref().is_some_and(|(of, known)| *of == revision && known == reason);
                if !known {
                    seen.waits = Some((revision, reason.to_owned()));
                }
                !known
            });
        }
    }

    /// The queued ones among the jobs that somebody waits for, with the revisions of their copies.
    pub(crate) fn queued(&self) -> Vec<(JobId, u64)> {
        let queued = |(job_id, entry): (&JobId, &Entry)| {
            let seen = entry.changes.borrow();
            let job = seen.job.as_ref().filter(|job| job.state == JobState::Queued)?;
            (entry.changes.receiver_count() > 0).then_some((*job_id, job.revision))
        };
        self.entries().jobs.iter().filter_map(queued).collect()
    }

    /// The jobs that somebody waits for.
    pub(crate) fn waited_for(&self) -> Vec<JobId> {
        self.entries().jobs.keys().copied().collect()
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    /// It is kept only for those who wait from now on.
    fn forget(&mut self, job_id: JobId) {
        if let Some(entry) = self.jobs.get_mut(&job_id) {
            entry.recent = false;
            if entry.changes.receiver_count() == 0 {
                self.jobs.remove(&job_id);
            }
        }
    }
}

/// Waits for one job; the last one to go takes the entry with it.
pub(crate) struct Subscription {
    feed: Feed,
    job_id: JobId,
    pub(crate) changes: watch::Receiver<Seen>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut entries = self.feed.entries();
        // This receiver still counts.
        let last = |entry: &Entry| !entry.recent && entry.changes.receiver_count() <= 1;
        if entries.jobs.get(&self.job_id).is_some_and(last) {
            entries.jobs.remove(&self.job_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use blixard::{pb::common::v1 as common, vm::Defaults};

    use super::*;

    fn job(number: u128, revision: u64, state: JobState, argument: &str) -> Job {
        let defaults = Defaults { vcpus: 1, memory_mib: 128 };
        let spec = common::JobSpec { command: vec!["echo".into(), argument.into()], ..Default::default() };
        let spec = blixard::job::JobSpec::parse("spec", spec, defaults).expect("a spec");
        let message = common::Job {
            id: uuid::Uuid::from_u128(number).to_string(),
            spec: Some(spec.into()),
            state: state.to_pb().into(),
            revision,
            generation: 1,
            ..Default::default()
        };
        Job::try_from(message).expect("a job")
    }

    /// What is known of a job by whoever begins to wait for it now.
    fn known(feed: &Feed, id: JobId) -> Option<(u64, JobState)> {
        feed.subscribe(id).changes.borrow().job.as_ref().map(|job| (job.revision, job.state))
    }

    fn submit(feed: &Feed, job: &Job) {
        feed.remember(&feed.subscribe(job.id), job);
    }

    #[test]
    fn who_waits_for_what_was_submitted_here_knows_its_latest_change() {
        let (feed, queued) = (Feed::default(), job(1, 5, JobState::Queued, "x"));
        submit(&feed, &queued);
        feed.publish(&job(1, 6, JobState::Assigned, "x"));
        assert_eq!(known(&feed, queued.id), Some((6, JobState::Assigned)));
        assert_eq!(known(&feed, queued.id), Some((6, JobState::Assigned)), "however often");
    }

    #[test]
    fn what_has_ended_is_long_or_may_have_been_missed_is_read_from_the_registry() {
        let feed = Feed::default();
        let [ended, long, missed] = [1, 2, 3];
        submit(&feed, &job(ended, 5, JobState::Queued, "x"));
        feed.publish(&job(ended, 6, JobState::Failed, "x"));
        submit(&feed, &job(long, 7, JobState::Queued, &"x".repeat(RECENT_BYTES)));
        submit(&feed, &job(missed, 8, JobState::Queued, "x"));
        feed.forget_recent();
        for number in [ended, long, missed] {
            assert_eq!(known(&feed, JobId(uuid::Uuid::from_u128(number))), None, "job {number}");
        }
        assert!(feed.waited_for().is_empty());
    }

    #[test]
    fn so_many_are_remembered_and_the_oldest_go_first() {
        let feed = Feed::default();
        for number in 0..RECENT as u128 + 1 {
            submit(&feed, &job(number, 5, JobState::Queued, "x"));
        }
        assert_eq!(feed.waited_for().len(), RECENT);
        assert_eq!(known(&feed, JobId(uuid::Uuid::from_u128(0))), None);
        assert!(feed.queued().is_empty(), "nobody asks what they wait for");
    }
}
