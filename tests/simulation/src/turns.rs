//! Whose turn it is: what one scheduler has been told of waiting jobs, and what it decides, held against the order of the queue and
//! the fair shares. Only what it knew counts: news that are still on their way oblige it to nothing.

use std::{collections::BTreeMap, time::Duration};

use blixard::{
    id::{JobId, NodeId, VmId},
    job::{Isolation, Job, JobSpec, JobState, TENANT_LABEL},
    time::Timestamp,
};

/// So often in a row may others, who have more, be given what a waiting job could have had. Not never: VMs that are being started
/// for a tenant count as its share before its jobs run.
const PASSED_OVER: u32 = 24;

/// What two jobs have in common when whatever does for one does for the other.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    image: String,
    size: (u32, u32),
    isolation: Isolation,
    node: Option<NodeId>,
    labels: [BTreeMap<String, String>; 2],
    target: Option<VmId>,
}

impl Shape {
    fn of(spec: &JobSpec) -> Self {
        Self {
            image: spec.image.clone(),
            size: (spec.vcpus, spec.memory_mib),
            isolation: spec.isolation,
            node: spec.node_id.clone(),
            labels: [spec.node_labels.clone(), spec.preferred_node_labels.clone()],
            target: spec.target_vm_id,
        }
    }
}

/// A job, as the scheduler knows it.
#[derive(Debug)]
struct Known {
    shape: Shape,
    tenant: String,
    state: JobState,
    revision: u64,
    /// The lower the more urgent, in milliseconds.
    urgency: i64,
    not_before: Option<Timestamp>,
    /// Others decide when its turn comes: it depends on jobs, or may be timed out at any moment.
    special: bool,
    /// It is being assigned, or ended.
    decided: bool,
    passed_over: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Turns {
    ageing: Duration,
    jobs: BTreeMap<JobId, Known>,
}

impl Turns {
    /// Of a scheduler to which so long in the queue is worth a level of priority.
    #[must_use]
    pub fn new(ageing: Duration) -> Self {
        Self { ageing, jobs: BTreeMap::new() }
    }

    /// It is told of everything that is live.
    pub fn listed(&mut self, jobs: &[Job]) {
        self.jobs.retain(|id, known| known.decided && jobs.iter().any(|job| job.id == *id));
        for job in jobs {
            self.told(job);
        }
    }

    /// It is told of a job.
    pub fn told(&mut self, job: &Job) {
        let before = self.jobs.get(&job.id);
        if before.is_some_and(|before| before.revision >= job.revision) {
            return;
        }
        if job.state.is_terminal() {
            self.jobs.remove(&job.id);
            return;
        }
        // One that is being assigned stays so, until that is answered.
        let decided = job.state == JobState::Queued && before.is_some_and(|before| before.decided);
        let ageing_ms = i64::try_from(self.ageing.as_millis()).unwrap_or(i64::MAX);
        let known = Known {
            shape: Shape::of(&job.spec),
            tenant: job.spec.labels.get(TENANT_LABEL).cloned().unwrap_or_default(),
            state: job.state,
            revision: job.revision,
            urgency: job.queued_at.0.saturating_sub(ageing_ms.saturating_mul(job.spec.priority.into())),
            not_before: job.not_before,
            special: !job.spec.depends_on.is_empty() || job.spec.queue_timeout.is_some() || job.cancel_requested,
            decided,
            passed_over: before.map_or(0, |before| before.passed_over),
        };
        self.jobs.insert(job.id, known);
    }

    /// What it had decided did not come about; all of it, when it leads no more.
    pub fn undone(&mut self, job: Option<JobId>) {
        for (_, known) in self.jobs.iter_mut().filter(|(id, _)| job.is_none_or(|job| job == **id)) {
            known.decided = false;
            known.passed_over = 0;
        }
    }

    /// It ends a job that waits.
    pub fn ends(&mut self, job: JobId) {
        if let Some(known) = self.jobs.get_mut(&job) {
            known.decided = true;
        }
    }

    /// It gives a job a VM. Was it the job's turn?
    ///
    /// # Errors
    /// In words, whose turn it was.
    pub fn assigns(&mut self, now: Timestamp, id: JobId) -> Result<(), String> {
        let Some(given) = self.jobs.get(&id) else {
            return Err(format!("job {id} is given a VM, and nobody spoke of it"));
        };
        let (shape, tenant, urgency) = (given.shape.clone(), given.tenant.clone(), given.urgency);
        let mut loads: BTreeMap<String, u32> = BTreeMap::new();
        for known in self.jobs.values().filter(|known| known.decided || known.state != JobState::Queued) {
            *loads.entry(known.tenant.clone()).or_default() += known.shape.size.0;
        }
        let load = |tenant: &str| loads.get(tenant).copied().unwrap_or(0);
        let waits = |known: &Known| {
            known.state == JobState::Queued
                && !known.decided
                && !known.special
                && known.shape == shape
                && known.not_before.is_none_or(|at| at <= now)
        };
        let mut wrong = None;
        for (other, known) in self.jobs.iter_mut().filter(|(other, known)| **other != id && waits(known)) {
            if known.tenant == tenant {
                if known.urgency < urgency {
                    wrong = Some(format!("job {id} is given a VM before job {other}, which is more urgent"));
                }
            } else if load(&known.tenant) < load(&tenant) {
                known.passed_over += 1;
                if known.passed_over > PASSED_OVER {
                    wrong =
                        Some(format!("job {other} of {} was passed over {} times", known.tenant, known.passed_over));
                }
            } else {
                known.passed_over = 0;
            }
        }
        if let Some(known) = self.jobs.get_mut(&id) {
            (known.decided, known.passed_over) = (true, 0);
        }
        wrong.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use blixard::pb::common::v1 as pb;
    use uuid::Uuid;

    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);

    fn id(number: u128) -> JobId {
        JobId(Uuid::from_u128(number))
    }

    /// A job that became Queued so many seconds after 1970.
    fn queued(number: u128, tenant: &str, at: i64, priority: i32) -> Job {
        let spec = pb::JobSpec {
            command: vec!["work".to_owned()],
            vcpus: Some(1),
            memory_mib: Some(256),
            priority,
            labels: BTreeMap::from([(TENANT_LABEL.to_owned(), tenant.to_owned())]),
            ..Default::default()
        };
        let job = pb::Job {
            id: id(number).to_string(),
            spec: Some(spec),
            state: pb::JobState::Queued.into(),
            generation: 1,
            revision: 1,
            queued_at: Some(Timestamp(at * 1000).into()),
            ..Default::default()
        };
        Job::try_from(job).unwrap()
    }

    fn told(jobs: &[Job]) -> Turns {
        let mut turns = Turns::new(Duration::from_secs(60));
        turns.listed(jobs);
        turns
    }

    #[test]
    fn of_a_tenants_jobs_the_one_that_came_first_is_first() {
        let jobs = [queued(1, "a", 1, 0), queued(2, "a", 2, 0)];
        assert_eq!(told(&jobs).assigns(NOW, id(1)), Ok(()));
        assert!(told(&jobs).assigns(NOW, id(2)).unwrap_err().contains("more urgent"));
    }

    #[test]
    fn priority_is_worth_its_time_and_no_more() {
        let jobs = [queued(1, "a", 1, 0), queued(2, "a", 50, 1)];
        assert!(told(&jobs).assigns(NOW, id(1)).is_err());
        assert_eq!(told(&jobs).assigns(NOW, id(2)), Ok(()));
        let jobs = [queued(1, "a", 1, 0), queued(2, "a", 70, 1)];
        assert_eq!(told(&jobs).assigns(NOW, id(1)), Ok(()));
    }

    #[test]
    fn one_that_is_under_way_or_not_yet_wanted_or_unheard_of_is_no_competitor() {
        let (first, second) = (queued(1, "a", 1, 0), queued(2, "a", 2, 0));
        let mut turns = told(&[first.clone(), second.clone()]);
        assert_eq!((turns.assigns(NOW, id(1)), turns.assigns(NOW, id(2))), (Ok(()), Ok(())));
        turns.undone(Some(id(1)));
        turns.undone(Some(id(2)));
        assert!(turns.assigns(NOW, id(2)).is_err());
        let later = Job { not_before: Some(Timestamp(NOW.0 + 1)), ..first };
        assert_eq!(told(&[later, second.clone()]).assigns(NOW, id(2)), Ok(()));
        assert_eq!(told(&[second]).assigns(NOW, id(2)), Ok(()));
    }

    #[test]
    fn a_tenant_that_has_less_is_not_passed_over_for_ever() {
        let jobs: Vec<Job> =
            (1..=100).map(|number| queued(number, "a", 1, 0)).chain([queued(200, "b", 1, 0)]).collect();
        let mut turns = told(&jobs);
        let answers: Vec<Result<(), String>> = (1..=100).map(|number| turns.assigns(NOW, id(number))).collect();
        assert!(answers[..10].iter().all(Result::is_ok));
        assert!(answers[40].as_ref().is_err_and(|error| error.contains("passed over")), "{:?}", answers[40]);
    }
}
