//! What a submission becomes: parsed, with its input sealed, and with the ids of a group's jobs.
//!
//! Everything here is pure but for [`SchedulerApi::submit`] and [`SchedulerApi::submit_group`], which record it.

use std::collections::{BTreeMap, BTreeSet};

use blixard::{
    error::{Error, Reason, invalid},
    id::{JobId, NAME_ALLOWED, is_name},
    job::{Job, JobInput, JobSpec},
    limits,
    pb::{common::v1 as common, registry::v1 as registry, scheduler::v1 as pb},
    vm::Defaults,
};
use blixard_chassis::{client::forward, secrets::SecretKey};
use bytes::Bytes;
use prost::Message as _;
use tonic::{Request, Status};
use uuid::Uuid;

use crate::{
    peers::missing,
    sealing::store,
    service::{SchedulerApi, refused, request_id},
};

/// A job as it was asked for.
pub(crate) struct Submission {
    pub(crate) request_id: String,
    pub(crate) spec: Option<common::JobSpec>,
    pub(crate) input: Option<common::JobInput>,
}

impl From<pb::SubmitJobRequest> for Submission {
    fn from(message: pb::SubmitJobRequest) -> Self {
        Self { request_id: message.request_id, spec: message.spec, input: message.input }
    }
}

impl From<pb::RunJobRequest> for Submission {
    fn from(message: pb::RunJobRequest) -> Self {
        Self { request_id: message.request_id, spec: message.spec, input: message.input }
    }
}

/// A job that is ready to be recorded.
#[derive(Debug)]
pub(crate) struct Planned {
    /// Where its spec stands in the request.
    field: String,
    pub(crate) job_id: JobId,
    pub(crate) spec: JobSpec,
    input: Option<common::JobInput>,
}

impl Planned {
    fn new(
        field: &str,
        job_id: JobId,
        mut spec: JobSpec,
        input: JobInput,
        key: Option<&SecretKey>,
    ) -> Result<Self, Error> {
        let stored = store(job_id, input, key)?;
        let (input, digest) = stored.map_or((None, Bytes::new()), |(input, digest)| (Some(input), digest));
        spec.input_digest = digest;
        Ok(Self { field: field.to_owned(), job_id, spec, input })
    }

    fn into_request(self) -> registry::CreateJobRequest {
        registry::CreateJobRequest {
            job_id: self.job_id.to_string(),
            spec: Some(self.spec.into()),
            request_id: String::new(),
            input: self.input,
        }
    }
}

/// One job of its own.
pub(crate) fn plan_job(submission: Submission, defaults: Defaults, key: Option<&SecretKey>) -> Result<Planned, Error> {
    let job_id = JobId(request_id(&submission.request_id)?);
    let spec = submission.spec.ok_or_else(|| invalid("spec", "", "required"))?;
    leave_to_the_server("spec", &spec)?;
    let spec = JobSpec::parse("spec", spec, defaults)?;
    if let Some(at) = spec.depends_on.iter().position(|dependency| dependency.job_id == job_id) {
        return Err(invalid(&format!("spec.depends_on[{at}].job_id"), job_id, "another job than this one"));
    }
    let input = JobInput::parse("input", submission.input.unwrap_or_default())?;
    Planned::new("spec", job_id, spec, input, key)
}

/// Refuses what only the server says.
fn leave_to_the_server(field: &str, spec: &common::JobSpec) -> Result<(), Error> {
    let servers =
        |name: &str, value: String| Err(invalid(&format!("{field}.{name}"), value, "none: it is the server's"));
    if !spec.group_id.is_empty() {
        return servers("group_id", spec.group_id.clone());
    }
    if spec.array_index != 0 {
        return servers("array_index", spec.array_index.to_string());
    }
    if !spec.input_digest.is_empty() {
        return servers("input_digest", format!("{} bytes", spec.input_digest.len()));
    }
    Ok(())
}

/// The jobs of a group, arrays spread out, names resolved to ids.
pub(crate) fn plan_group(
    group_id: Uuid,
    jobs: Vec<pb::GroupJob>,
    defaults: Defaults,
    key: Option<&SecretKey>,
) -> Result<Vec<Planned>, Error> {
    let members = jobs.iter().enumerate().map(|(at, job)| Member::parse(at, job)).collect::<Result<Vec<_>, _>>()?;
    let total: usize = members.iter().map(|member| member.indexes.len()).sum();
    if total == 0 || total > limits::MAX_GROUP_JOBS {
        let allowed = format!("1 to {} jobs, array elements counted", limits::MAX_GROUP_JOBS);
        return Err(invalid("jobs", total, &allowed));
    }
    let by_name = by_name(&members)?;
    let edges = edges(&jobs, &by_name)?;
    refuse_cycles(&jobs, &edges)?;

    let mut planned = Vec::with_capacity(total);
    for (at, job) in jobs.into_iter().enumerate() {
        let depends_on = dependencies(group_id, at, &job, &edges, &members)?;
        let field = format!("jobs[{at}].spec");
        let mut spec = job.spec.ok_or_else(|| invalid(&field, "", "required"))?;
        leave_to_the_server(&field, &spec)?;
        if !spec.depends_on.is_empty() {
            let field = format!("{field}.depends_on");
            return Err(invalid(
                &field,
                spec.depends_on.len(),
                "none: name jobs of the group in depends_on of the job",
            ));
        }
        spec.group_id = group_id.to_string();
        spec.depends_on = depends_on;
        let spec = JobSpec::parse(&field, spec, defaults)?;
        let input = JobInput::parse(&format!("jobs[{at}].input"), job.input.unwrap_or_default())?;
        for &index in &members[at].indexes {
            let job_id = members[at].id(group_id, index);
            let spec = JobSpec { array_index: (index > 0).then_some(index), ..spec.clone() };
            planned.push(Planned::new(&field, job_id, spec, input.clone(), key)?);
        }
    }
    Ok(planned)
}

/// A job of a group, or an array.
struct Member {
    name: String,
    /// 0 alone: it is no array.
    indexes: Vec<u32>,
}

impl Member {
    fn parse(at: usize, job: &pb::GroupJob) -> Result<Self, Error> {
        if !is_name(&job.name) {
            return Err(invalid(&format!("jobs[{at}].name"), &job.name, NAME_ALLOWED));
        }
        let indexes = match (job.array_first, job.array_last) {
            (0, 0) => vec![0],
            (0, _) => return Err(invalid(&format!("jobs[{at}].array_first"), 0, "at least 1, with array_last")),
            (first, last) => {
                let most = u32::try_from(limits::MAX_GROUP_JOBS).unwrap_or(u32::MAX);
                if last < first || last - first >= most {
                    let allowed = format!("array_first to array_first + {}", most - 1);
                    return Err(invalid(&format!("jobs[{at}].array_last"), last, &allowed));
                }
                (first..=last).collect()
            }
        };
        Ok(Self { name: job.name.clone(), indexes })
    }

    /// The id of one of its jobs: UUIDv5 of the group, the name and the index, so that the same request has the same jobs.
    fn id(&self, group_id: Uuid, index: u32) -> JobId {
        JobId(uuid_v5(group_id, format!("{}/{index}", self.name).as_bytes()))
    }
}

/// RFC 9562, 5.5.
fn uuid_v5(namespace: Uuid, name: &[u8]) -> Uuid {
    let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(namespace.as_bytes());
    hash.update(name);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finish().as_ref()[..16]);
    uuid::Builder::from_sha1_bytes(bytes).into_uuid()
}

fn by_name(members: &[Member]) -> Result<BTreeMap<&str, usize>, Error> {
    let mut by_name = BTreeMap::new();
    for (at, member) in members.iter().enumerate() {
        if by_name.insert(member.name.as_str(), at).is_some() {
            return Err(invalid(
                &format!("jobs[{at}].name"),
                &member.name,
                "a name that no other job of the group has",
            ));
        }
    }
    Ok(by_name)
}

/// Whom each member depends on.
type Edges = Vec<Vec<usize>>;

fn edges(jobs: &[pb::GroupJob], by_name: &BTreeMap<&str, usize>) -> Result<Edges, Error> {
    let mut edges = Vec::with_capacity(jobs.len());
    for (at, job) in jobs.iter().enumerate() {
        if job.depends_on.len() > limits::MAX_DEPENDENCIES {
            return Err(too_many_dependencies(at, job.depends_on.len()));
        }
        let resolve = |(nth, dependency): (usize, &pb::GroupDependency)| {
            let field = |name: &str| format!("jobs[{at}].depends_on[{nth}].{name}");
            if common::DependencyCondition::try_from(dependency.condition).is_err() {
                return Err(invalid(&field("condition"), dependency.condition, "one of the conditions 0 to 2"));
            }
            let known = by_name.get(dependency.name.as_str()).copied();
            known.ok_or_else(|| invalid(&field("name"), &dependency.name, "the name of a job of the group"))
        };
        edges.push(job.depends_on.iter().enumerate().map(resolve).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(edges)
}

fn too_many_dependencies(at: usize, count: usize) -> Error {
    let allowed = format!("at most {} jobs, array elements counted", limits::MAX_DEPENDENCIES);
    invalid(&format!("jobs[{at}].depends_on"), count, &allowed)
}

/// Takes away who depends on nobody that is left, until nobody does: who is left then is in a cycle, or behind one.
fn refuse_cycles(jobs: &[pb::GroupJob], edges: &Edges) -> Result<(), Error> {
    let mut waits_for: Vec<usize> = edges.iter().map(Vec::len).collect();
    let mut waited_for_by = vec![Vec::new(); edges.len()];
    for (at, on) in edges.iter().enumerate() {
        on.iter().for_each(|&other| waited_for_by[other].push(at));
    }
    let mut free: Vec<usize> = (0..edges.len()).filter(|&at| waits_for[at] == 0).collect();
    while let Some(at) = free.pop() {
        for &other in &waited_for_by[at] {
            waits_for[other] -= 1;
            if waits_for[other] == 0 {
                free.push(other);
            }
        }
    }
    // From one who is left to one who is left, until one comes twice: that one is in the cycle.
    let Some(mut at) = (0..edges.len()).find(|&at| waits_for[at] > 0) else { return Ok(()) };
    let mut met = BTreeSet::new();
    loop {
        let Some(nth) = edges[at].iter().position(|&other| waits_for[other] > 0) else { return Ok(()) };
        if !met.insert(at) {
            let field = format!("jobs[{at}].depends_on[{nth}].name");
            return Err(invalid(&field, &jobs[edges[at][nth]].name, "no cycle: it depends on this job itself"));
        }
        at = edges[at][nth];
    }
}

/// The jobs that the member at `at` depends on, by id.
fn dependencies(
    group_id: Uuid,
    at: usize,
    job: &pb::GroupJob,
    edges: &Edges,
    members: &[Member],
) -> Result<Vec<common::Dependency>, Error> {
    let mut depends_on = Vec::new();
    for (&other, dependency) in edges[at].iter().zip(&job.depends_on) {
        let ids = members[other].indexes.iter().map(|&index| members[other].id(group_id, index).to_string());
        depends_on.extend(ids.map(|job_id| common::Dependency { job_id, condition: dependency.condition }));
    }
    if depends_on.len() > limits::MAX_DEPENDENCIES {
        return Err(too_many_dependencies(at, depends_on.len()));
    }
    Ok(depends_on)
}

impl SchedulerApi {
    /// Records a job. `repeatable`: its id is the caller's choice, so it may be on record already.
    pub(crate) async fn submit<T>(
        &self,
        caller: &Request<T>,
        submission: Submission,
        repeatable: bool,
    ) -> Result<Job, Status> {
        let planned = plan_job(submission, self.config.settings.defaults, self.config.secret_key.as_ref())?;
        self.admit(&planned, repeatable, 1).await?;
        let request = forward(caller, planned.into_request());
        let answer = self.peers.registry().create_job(request).await.map_err(refused)?;
        let job = Job::try_from(answer.into_inner().job.ok_or_else(|| missing("job"))?)?;
        self.shell.submitted(job.clone());
        Ok(job)
    }

    /// Records the jobs of a group, all or none.
    pub(crate) async fn submit_group(
        &self,
        caller: &Request<pb::SubmitJobGroupRequest>,
    ) -> Result<pb::SubmitJobGroupResponse, Status> {
        let message = caller.get_ref().clone();
        let repeatable = !message.request_id.is_empty();
        let group_id = request_id(&message.request_id)?;
        let planned =
            plan_group(group_id, message.jobs, self.config.settings.defaults, self.config.secret_key.as_ref())?;
        let (count, mut checked) = (planned.len(), BTreeSet::new());
        for job in &planned {
            // The jobs of an array ask for the same.
            if checked.insert(job.field.as_str()) {
                self.admit(job, repeatable, count).await?;
            }
        }
        let jobs: Vec<_> = planned.into_iter().map(Planned::into_request).collect();
        let create = registry::CreateJobsRequest { jobs };
        if create.encoded_len() > limits::MAX_GROUP_BYTES {
            let allowed = format!("at most {} bytes in all", limits::MAX_GROUP_BYTES);
            return Err(invalid("jobs", create.encoded_len(), &allowed).into());
        }
        let answer = self.peers.registry().create_jobs(forward(caller, create)).await.map_err(refused)?;
        Ok(pb::SubmitJobGroupResponse { group_id: group_id.to_string(), jobs: answer.into_inner().jobs })
    }

    /// Refuses what could never run, and what the queue has no room for; `count` jobs come together. A repeated request is
    /// answered as the first one was, whatever has changed since.
    async fn admit(&self, planned: &Planned, repeatable: bool, count: usize) -> Result<(), Error> {
        let most = usize::try_from(self.config.settings.max_queued_jobs).unwrap_or(usize::MAX);
        let refusal = if self.shell.queued().saturating_add(count) > most {
            let message = format!("{most} jobs may wait, and that many do");
            Err(Error::new(Reason::Overloaded, message).with("limit", most))
        } else {
            self.check_fit(&planned.field, &planned.spec).await
        };
        let Err(error) = refusal else { return Ok(()) };
        let known = registry::GetJobRequest { job_id: planned.job_id.to_string() };
        if repeatable && self.peers.registry().get_job(known).await.is_ok() { Ok(()) } else { Err(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 128 };
    const GROUP: Uuid = Uuid::from_u128(7);

    fn spec() -> common::JobSpec {
        common::JobSpec { command: vec!["true".into()], ..Default::default() }
    }

    fn job(name: &str, depends_on: &[&str]) -> pb::GroupJob {
        let depends_on =
            depends_on.iter().map(|&name| pb::GroupDependency { name: name.into(), condition: 0 }).collect();
        pb::GroupJob { name: name.into(), spec: Some(spec()), depends_on, ..Default::default() }
    }

    fn array(name: &str, first: u32, last: u32) -> pb::GroupJob {
        pb::GroupJob { array_first: first, array_last: last, ..job(name, &[]) }
    }

    fn plan(jobs: Vec<pb::GroupJob>) -> Result<Vec<Planned>, Error> {
        plan_group(GROUP, jobs, DEFAULTS, None)
    }

    fn refused_field(result: Result<impl std::fmt::Debug, Error>) -> String {
        let error = result.expect_err("refused");
        assert_eq!(error.reason, Reason::InvalidField, "{error}");
        error.metadata.get("field").cloned().unwrap_or_default()
    }

    #[test]
    fn version_5_is_that_of_the_rfc() {
        // RFC 9562, A.4: the DNS name www.example.com.
        let expected = Uuid::parse_str("2ed6657d-e927-568b-95e1-2665a8aea6a2").expect("a UUID");
        assert_eq!(uuid_v5(Uuid::NAMESPACE_DNS, b"www.example.com"), expected);
    }

    #[test]
    fn the_same_group_has_the_same_jobs_and_arrays_are_spread_out_in_order() {
        let jobs = || vec![array("test", 3, 5), job("report", &["test"]), job("build", &[])];
        let (first, second) = (plan(jobs()).expect("valid"), plan(jobs()).expect("valid"));
        let ids = |planned: &[Planned]| planned.iter().map(|job| job.job_id).collect::<Vec<_>>();
        assert_eq!(ids(&first), ids(&second));
        assert_eq!(ids(&first).into_iter().collect::<BTreeSet<_>>().len(), 5, "each its own");
        let indexes: Vec<_> = first.iter().map(|job| job.spec.array_index).collect();
        assert_eq!(indexes, [Some(3), Some(4), Some(5), None, None]);
        assert!(first.iter().all(|job| job.spec.group_id == Some(GROUP)));
        let waits_for: Vec<_> = first[3].spec.depends_on.iter().map(|on| on.job_id).collect();
        assert_eq!(waits_for, ids(&first)[..3], "of an array, all its jobs");
        let other = plan_group(Uuid::from_u128(8), jobs(), DEFAULTS, None).expect("valid");
        assert_ne!(ids(&first), ids(&other));
    }

    #[test]
    fn each_bad_group_is_refused_by_field() {
        let with_spec = |change: fn(&mut common::JobSpec)| {
            let mut spec = spec();
            change(&mut spec);
            pb::GroupJob { spec: Some(spec), ..job("a", &[]) }
        };
        let cases = [
            ("jobs", vec![]),
            ("jobs", vec![array("a", 1, 999), array("b", 1, 2)]),
            ("jobs[0].name", vec![job("a b", &[])]),
            ("jobs[1].name", vec![job("a", &[]), job("a", &[])]),
            ("jobs[0].array_first", vec![array("a", 0, 3)]),
            ("jobs[0].array_last", vec![array("a", 3, 2)]),
            ("jobs[0].array_last", vec![array("a", 1, u32::MAX)]),
            ("jobs[0].depends_on[0].name", vec![job("a", &["b"])]),
            ("jobs[0].depends_on[0].name", vec![job("a", &["a"])]),
            (
                "jobs[1].depends_on[1].name",
                vec![job("z", &[]), job("a", &["z", "b"]), job("b", &["c"]), job("c", &["a"])],
            ),
            ("jobs[1].depends_on[0].name", vec![job("behind", &["a"]), job("a", &["b"]), job("b", &["a"])]),
            ("jobs[1].depends_on", vec![array("a", 1, 101), job("b", &["a"])]),
            ("jobs[0].spec.command", vec![with_spec(|spec| spec.command.clear())]),
            ("jobs[0].spec.group_id", vec![with_spec(|spec| spec.group_id = GROUP.to_string())]),
            ("jobs[0].spec.array_index", vec![with_spec(|spec| spec.array_index = 1)]),
            ("jobs[0].spec.depends_on", vec![with_spec(|spec| spec.depends_on.push(Default::default()))]),
            ("jobs[0].spec", vec![pb::GroupJob { spec: None, ..job("a", &[]) }]),
        ];
        for (field, jobs) in cases {
            assert_eq!(refused_field(plan(jobs)), field);
        }
        let mut odd = job("a", &[]);
        odd.depends_on = vec![pb::GroupDependency { name: "b".into(), condition: 9 }];
        assert_eq!(refused_field(plan(vec![odd, job("b", &[])])), "jobs[0].depends_on[0].condition");
    }

    #[test]
    fn a_job_of_its_own_may_depend_on_others_and_says_nothing_that_is_the_servers() {
        let submit = |change: fn(&mut common::JobSpec)| {
            let mut spec = spec();
            change(&mut spec);
            let request_id = GROUP.to_string();
            plan_job(Submission { request_id, spec: Some(spec), input: None }, DEFAULTS, None)
        };
        let depends = submit(|spec| {
            spec.depends_on = vec![common::Dependency { job_id: Uuid::from_u128(99).to_string(), condition: 2 }];
        });
        let itself = submit(|spec| {
            spec.depends_on = vec![common::Dependency { job_id: GROUP.to_string(), condition: 2 }];
        });
        assert_eq!(refused_field(itself), "spec.depends_on[0].job_id");
        assert_eq!(depends.expect("valid").spec.depends_on.len(), 1);
        assert_eq!(refused_field(submit(|spec| spec.group_id = GROUP.to_string())), "spec.group_id");
        assert_eq!(refused_field(submit(|spec| spec.array_index = 2)), "spec.array_index");
        assert_eq!(refused_field(submit(|spec| spec.input_digest = vec![0; 32].into())), "spec.input_digest");
    }

    #[test]
    fn an_input_is_identified_by_what_is_stored_and_secrets_need_a_key() {
        let submit = |secret: &str, key: Option<&SecretKey>| {
            let secrets = BTreeMap::from([("TOKEN".to_owned(), secret.to_owned())]);
            let input = common::JobInput { stdin: vec![1, 2].into(), secrets, ..Default::default() };
            let submission = Submission { request_id: GROUP.to_string(), spec: Some(spec()), input: Some(input) };
            plan_job(submission, DEFAULTS, key)
        };
        let key = SecretKey::from_bytes(&[7; 32]);
        let error = submit("hunter22", None).expect_err("there is no key");
        assert_eq!(error.reason, Reason::SecretsUnavailable);
        let (first, again) = (submit("hunter22", key.as_ref()), submit("hunter22", key.as_ref()));
        let (first, again) = (first.expect("sealed"), again.expect("sealed"));
        assert_eq!(first.spec.input_digest.len(), 32);
        assert_eq!(first.spec.input_digest, again.spec.input_digest);
        let other = submit("hunter23", key.as_ref()).expect("sealed");
        assert_ne!(first.spec.input_digest, other.spec.input_digest);
        let stored = first.into_request().input.expect("an input");
        assert!(stored.secrets.is_empty());
        let opened = key.expect("a key").open(JobId(GROUP), "TOKEN", &stored.sealed_secrets["TOKEN"]);
        assert_eq!(opened.as_deref(), Ok("hunter22"));
    }
}
