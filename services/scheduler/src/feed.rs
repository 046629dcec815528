//! Tells those who wait for a job of its changes. Only jobs that somebody waits for have an entry.

use std::{
    collections::BTreeMap,
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

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Feed(Arc<Mutex<BTreeMap<JobId, watch::Sender<Seen>>>>);

impl Feed {
    /// Begins to wait. Read the job from the registry *after* this, then pass it to [`Feed::publish`].
    pub(crate) fn subscribe(&self, job_id: JobId) -> Subscription {
        let changes = self.entries().entry(job_id).or_insert_with(|| watch::Sender::new(Seen::default())).subscribe();
        Subscription { feed: self.clone(), job_id, changes }
    }

    /// Passes on a newer copy.
    pub(crate) fn publish(&self, job: &Job) {
        if let Some(sender) = self.entries().get(&job.id) {
            sender.send_if_modified(|seen| {
                let newer = seen.job.as_ref().is_none_or(|known| known.revision < job.revision);
                if newer {
                    seen.job = Some(job.clone());
                }
                newer
            });
        }
    }

    /// Passes on that the vmhost has the attempt.
    pub(crate) fn accepted(&self, job_id: JobId, attempt: u32) {
        if let Some(sender) = self.entries().get(&job_id) {
            sender.send_if_modified(|seen| {
                let newer = seen.accepted < attempt;
                seen.accepted = seen.accepted.max(attempt);
                newer
            });
        }
    }

    /// Passes on what a queued job waits for.
    pub(crate) fn waits(&self, job_id: JobId, revision: u64, reason: &str) {
        if let Some(sender) = self.entries().get(&job_id) {
            sender.send_if_modified(|seen| {
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
        let queued = |(job_id, sender): (&JobId, &watch::Sender<Seen>)| {
            let seen = sender.borrow();
            let job = seen.job.as_ref().filter(|job| job.state == JobState::Queued)?;
            Some((*job_id, job.revision))
        };
        self.entries().iter().filter_map(queued).collect()
    }

    /// The jobs that somebody waits for.
    pub(crate) fn waited_for(&self) -> Vec<JobId> {
        self.entries().keys().copied().collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<JobId, watch::Sender<Seen>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        if entries.get(&self.job_id).is_some_and(|sender| sender.receiver_count() <= 1) {
            entries.remove(&self.job_id);
        }
    }
}
