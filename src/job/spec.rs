//! What a job is to run, checked.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    egress::Egress,
    error::{Error, invalid},
    id::{JobId, NodeId, VmId},
    limits,
    pb::common::v1 as pb,
    time::millis,
    vm::{Defaults, parse_image, parse_labels, parse_memory, parse_node, parse_vcpus},
    volume::Volumes,
};

/// How far a job must be kept from other jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Always a fresh VM.
    Maximum,
    /// A free service VM if there is one, else a fresh VM.
    Standard,
    /// A service VM only.
    Minimal,
}

/// What to run: checked, with every default filled in. Never changes once recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// Program and arguments; never empty.
    pub command: Vec<String>,
    /// Environment, added to the guest's own and the image's.
    pub env: BTreeMap<String, String>,
    /// Absolute path to run in; empty: the image's own, else "/".
    pub working_dir: String,
    /// Image it needs.
    pub image: String,
    /// Virtual CPUs of its VM.
    pub vcpus: u32,
    /// Memory of its VM in MiB.
    pub memory_mib: u32,
    /// How far it must be kept from other jobs.
    pub isolation: Isolation,
    /// Higher runs first, -1000 to 1000.
    pub priority: i32,
    /// How long one attempt may run, from its start in the guest.
    pub timeout: Option<Duration>,
    /// How many attempts may start.
    pub max_attempts: u32,
    /// Labels for filtering.
    pub labels: BTreeMap<String, String>,
    /// The node that must run it.
    pub node_id: Option<NodeId>,
    /// The VM that must run it.
    pub target_vm_id: Option<VmId>,
    /// When another attempt follows one that is over.
    pub retry: Retry,
    /// How long it may wait in the queue each time.
    pub queue_timeout: Option<Duration>,
    /// How long an attempt may take from its arrival at the node to its start in the guest.
    pub start_timeout: Option<Duration>,
    /// Labels that its node must have.
    pub node_labels: BTreeMap<String, String>,
    /// Labels that its node should have.
    pub preferred_node_labels: BTreeMap<String, String>,
    /// The group it belongs to.
    pub group_id: Option<Uuid>,
    /// Its place in its array, from 1.
    pub array_index: Option<u32>,
    /// What must have ended before it may start.
    pub depends_on: Vec<Dependency>,
    /// Absolute paths of files that are kept when its command has ended.
    pub artifacts: Vec<String>,
    /// How long it is kept after its end; `None`: as long as retention says.
    pub result_ttl: Option<Duration>,
    /// Identifies its input; empty: it has none.
    pub input_digest: Bytes,
    /// Whom its VM may talk to; `None`: nobody, or whatever the VM has that it names.
    pub egress: Option<Egress>,
    /// Disks of its VM; none: none, or whatever the VM has that it names.
    pub volumes: Volumes,
}

/// The label that says whose a job is.
pub const TENANT_LABEL: &str = "tenant";

/// What an attempt may come to for another one to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RetryOn {
    Lost,
    Failed,
    TimedOut,
}

/// When another attempt follows one that is over, as long as fewer than `max_attempts` have started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// What the one before came to; never empty.
    pub on: BTreeSet<RetryOn>,
    /// Pause before the second attempt that starts; doubled for each later one.
    pub backoff: Duration,
    /// The longest such pause.
    pub max_backoff: Duration,
}

impl Retry {
    /// The pause after so many attempts have started.
    #[must_use]
    pub fn pause_after(&self, attempts_started: u32) -> Duration {
        let doublings = attempts_started.saturating_sub(1).min(31);
        self.backoff.saturating_mul(1 << doublings).min(self.max_backoff)
    }
}

/// What a job that another one depends on must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DependencyCondition {
    Succeeded,
    Ended,
}

/// A job that must have ended before another may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dependency {
    pub job_id: JobId,
    /// What it must come to.
    pub condition: DependencyCondition,
}

impl JobSpec {
    /// Checks a request's `spec`, filling in defaults; errors name the field below `field`.
    pub fn parse(field: &str, spec: pb::JobSpec, defaults: Defaults) -> Result<Self, Error> {
        let at = |name: &str| format!("{field}.{name}");
        check_command(&at("command"), &spec.command)?;
        check_env(&at("env"), &spec.env)?;
        let working_dir = spec.working_dir;
        let is_path = working_dir.starts_with('/') && working_dir.len() <= 4096 && !working_dir.contains('\0');
        if !(working_dir.is_empty() || is_path) {
            return Err(invalid(&at("working_dir"), working_dir, "an absolute path of at most 4096 bytes"));
        }
        if !(-1000..=1000).contains(&spec.priority) {
            return Err(invalid(&at("priority"), spec.priority, "-1000 to 1000"));
        }
        if spec.max_attempts > limits::MAX_ATTEMPTS {
            return Err(invalid(&at("max_attempts"), spec.max_attempts, &format!("0 to {}", limits::MAX_ATTEMPTS)));
        }
        let isolation = match pb::Isolation::try_from(spec.isolation) {
            Ok(pb::Isolation::Maximum) => Isolation::Maximum,
            Ok(pb::Isolation::Standard | pb::Isolation::Unspecified) => Isolation::Standard,
            Ok(pb::Isolation::Minimal) => Isolation::Minimal,
            Err(_) => return Err(invalid(&at("isolation"), spec.isolation, "one of the isolation levels 0 to 3")),
        };
        let volumes = Volumes::from_pb(&at("volumes"), spec.volumes)?;
        if isolation == Isolation::Minimal && volumes.scratch_mib() > 0 {
            let allowed = "maximum or standard, for with a scratch disk it is given a VM of its own";
            return Err(invalid(&at("isolation"), "minimal", allowed));
        }
        Ok(Self {
            command: spec.command,
            env: spec.env,
            working_dir,
            image: parse_image(field, spec.image)?,
            vcpus: parse_vcpus(field, spec.vcpus, defaults)?,
            memory_mib: parse_memory(field, spec.memory_mib, defaults)?,
            isolation,
            priority: spec.priority,
            timeout: parse_timeout(&at("timeout_ms"), spec.timeout_ms)?,
            max_attempts: spec.max_attempts.max(1),
            retry: parse_retry(field, &spec.retry_on, spec.backoff_ms, spec.max_backoff_ms)?,
            queue_timeout: parse_timeout(&at("queue_timeout_ms"), spec.queue_timeout_ms)?,
            start_timeout: parse_timeout(&at("start_timeout_ms"), spec.start_timeout_ms)?,
            labels: parse_labels(&at("labels"), spec.labels)?,
            node_labels: parse_labels(&at("node_labels"), spec.node_labels)?,
            preferred_node_labels: parse_labels(&at("preferred_node_labels"), spec.preferred_node_labels)?,
            group_id: match spec.group_id.as_str() {
                "" => None,
                id => Some(Uuid::parse_str(id).map_err(|_| invalid(&at("group_id"), id, "a UUID, or empty"))?),
            },
            array_index: (spec.array_index > 0).then_some(spec.array_index),
            depends_on: parse_dependencies(&at("depends_on"), spec.depends_on)?,
            artifacts: parse_artifacts(&at("artifacts"), spec.artifacts)?,
            result_ttl: parse_ttl(&at("result_ttl_ms"), spec.result_ttl_ms)?,
            input_digest: match spec.input_digest.len() {
                0 | 32 => spec.input_digest,
                length => return Err(invalid(&at("input_digest"), length, "32 bytes, or none")),
            },
            egress: spec.egress.map(|egress| Egress::from_pb(&at("egress"), Some(egress))).transpose()?,
            volumes,
            node_id: parse_node(field, &spec.node_id)?,
            target_vm_id: match spec.target_vm_id.as_str() {
                "" => None,
                id => Some(VmId::parse(&at("target_vm_id"), id)?),
            },
        })
    }

    /// Checks a spec in which nothing may be left out: what services send each other.
    pub fn parse_full(field: &str, spec: Option<pb::JobSpec>) -> Result<Self, Error> {
        let spec = spec.ok_or_else(|| invalid(field, "", "required"))?;
        Self::parse(field, spec, Defaults { vcpus: 0, memory_mib: 0 })
    }
}

fn parse_timeout(field: &str, ms: u64) -> Result<Option<Duration>, Error> {
    let timeout = Duration::from_millis(ms);
    if timeout > limits::MAX_TIMEOUT {
        let allowed = format!("at most {} (30 days), 0 for none", limits::MAX_TIMEOUT.as_millis());
        return Err(invalid(field, ms, &allowed));
    }
    Ok((ms > 0).then_some(timeout))
}

fn parse_ttl(field: &str, ms: u64) -> Result<Option<Duration>, Error> {
    let ttl = Duration::from_millis(ms);
    if ttl > limits::MAX_RESULT_TTL {
        let allowed = format!("at most {} (3650 days), 0 for retention's", limits::MAX_RESULT_TTL.as_millis());
        return Err(invalid(field, ms, &allowed));
    }
    Ok((ms > 0).then_some(ttl))
}

fn parse_retry(field: &str, on: &[i32], backoff_ms: u64, max_backoff_ms: u64) -> Result<Retry, Error> {
    let mut parsed = BTreeSet::new();
    for &value in on {
        parsed.insert(match pb::RetryOn::try_from(value) {
            Ok(pb::RetryOn::Lost) => RetryOn::Lost,
            Ok(pb::RetryOn::Failed) => RetryOn::Failed,
            Ok(pb::RetryOn::TimedOut) => RetryOn::TimedOut,
            Ok(pb::RetryOn::Unspecified) | Err(_) => {
                return Err(invalid(&format!("{field}.retry_on"), value, "1 (lost), 2 (failed) and 3 (timed out)"));
            }
        });
    }
    if parsed.is_empty() {
        parsed.insert(RetryOn::Lost);
    }
    let pause = |name: &str, ms: u64| {
        let pause = Duration::from_millis(ms);
        let allowed = format!("at most {} (an hour)", limits::MAX_BACKOFF.as_millis());
        if pause > limits::MAX_BACKOFF { Err(invalid(&format!("{field}.{name}"), ms, &allowed)) } else { Ok(pause) }
    };
    let max_backoff = match max_backoff_ms {
        0 => limits::DEFAULT_MAX_BACKOFF,
        ms => pause("max_backoff_ms", ms)?,
    };
    Ok(Retry { on: parsed, backoff: pause("backoff_ms", backoff_ms)?, max_backoff })
}

fn parse_dependencies(field: &str, depends_on: Vec<pb::Dependency>) -> Result<Vec<Dependency>, Error> {
    if depends_on.len() > limits::MAX_DEPENDENCIES {
        return Err(invalid(field, depends_on.len(), &format!("at most {} jobs", limits::MAX_DEPENDENCIES)));
    }
    let parse = |(at, dependency): (usize, pb::Dependency)| {
        let condition = match pb::DependencyCondition::try_from(dependency.condition) {
            Ok(pb::DependencyCondition::Unspecified | pb::DependencyCondition::Succeeded) => {
                DependencyCondition::Succeeded
            }
            Ok(pb::DependencyCondition::Ended) => DependencyCondition::Ended,
            Err(_) => {
                let field = format!("{field}[{at}].condition");
                return Err(invalid(&field, dependency.condition, "one of the conditions 0 to 2"));
            }
        };
        Ok(Dependency { job_id: JobId::parse(&format!("{field}[{at}].job_id"), &dependency.job_id)?, condition })
    };
    depends_on.into_iter().enumerate().map(parse).collect()
}

fn parse_artifacts(field: &str, paths: Vec<String>) -> Result<Vec<String>, Error> {
    if paths.len() > limits::MAX_FILES {
        return Err(invalid(field, paths.len(), &format!("at most {} paths", limits::MAX_FILES)));
    }
    for (at, path) in paths.iter().enumerate() {
        check_path(&format!("{field}[{at}]"), path)?;
    }
    Ok(paths)
}

/// Checks the absolute path of a file in a guest.
pub(super) fn check_path(field: &str, path: &str) -> Result<(), Error> {
    let named = path.rsplit('/').next().is_some_and(|name| !matches!(name, "" | "." | ".."));
    if !path.starts_with('/') || !named || path.len() > limits::MAX_PATH_BYTES || path.contains('\0') {
        let allowed = format!("the absolute path of a file, of at most {} bytes", limits::MAX_PATH_BYTES);
        return Err(invalid(field, path.escape_debug(), &allowed));
    }
    Ok(())
}

fn check_command(field: &str, command: &[String]) -> Result<(), Error> {
    if command.first().is_none_or(String::is_empty) {
        return Err(invalid(field, "", "a program and its arguments"));
    }
    if command.len() > limits::MAX_COMMAND_ARGS {
        return Err(invalid(field, command.len(), &format!("at most {} strings", limits::MAX_COMMAND_ARGS)));
    }
    let bytes: usize = command.iter().map(String::len).sum();
    if bytes > limits::MAX_COMMAND_BYTES {
        return Err(invalid(field, bytes, &format!("at most {} bytes in all", limits::MAX_COMMAND_BYTES)));
    }
    match command.iter().find(|argument| argument.contains('\0')) {
        Some(argument) => Err(invalid(field, argument.escape_debug(), "strings without NUL bytes")),
        None => Ok(()),
    }
}

pub(super) fn check_env(field: &str, env: &BTreeMap<String, String>) -> Result<(), Error> {
    if env.len() > limits::MAX_ENV_VARS {
        return Err(invalid(field, env.len(), &format!("at most {} variables", limits::MAX_ENV_VARS)));
    }
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > limits::MAX_COMMAND_BYTES {
        return Err(invalid(field, bytes, &format!("at most {} bytes in all", limits::MAX_COMMAND_BYTES)));
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(invalid(
                field,
                name.escape_debug(),
                "names that are not empty and contain neither '=' nor NUL",
            ));
        }
        if value.contains('\0') {
            return Err(invalid(field, value.escape_debug(), "values without NUL bytes"));
        }
    }
    Ok(())
}

impl From<JobSpec> for pb::JobSpec {
    fn from(spec: JobSpec) -> Self {
        Self {
            command: spec.command,
            env: spec.env,
            working_dir: spec.working_dir,
            image: spec.image,
            vcpus: Some(spec.vcpus),
            memory_mib: Some(spec.memory_mib),
            isolation: match spec.isolation {
                Isolation::Maximum => pb::Isolation::Maximum,
                Isolation::Standard => pb::Isolation::Standard,
                Isolation::Minimal => pb::Isolation::Minimal,
            }
            .into(),
            priority: spec.priority,
            timeout_ms: spec.timeout.map_or(0, millis),
            max_attempts: spec.max_attempts,
            labels: spec.labels,
            node_id: spec.node_id.map(|id| id.to_string()).unwrap_or_default(),
            target_vm_id: spec.target_vm_id.map(|id| id.to_string()).unwrap_or_default(),
            retry_on: spec.retry.on.into_iter().map(|on| pb::RetryOn::from(on).into()).collect(),
            backoff_ms: millis(spec.retry.backoff),
            max_backoff_ms: millis(spec.retry.max_backoff),
            queue_timeout_ms: spec.queue_timeout.map_or(0, millis),
            start_timeout_ms: spec.start_timeout.map_or(0, millis),
            node_labels: spec.node_labels,
            preferred_node_labels: spec.preferred_node_labels,
            group_id: spec.group_id.map(|id| id.to_string()).unwrap_or_default(),
            array_index: spec.array_index.unwrap_or(0),
            depends_on: spec.depends_on.into_iter().map(Into::into).collect(),
            artifacts: spec.artifacts,
            result_ttl_ms: spec.result_ttl.map_or(0, millis),
            input_digest: spec.input_digest,
            egress: spec.egress.map(Into::into),
            volumes: spec.volumes.into(),
        }
    }
}

impl From<RetryOn> for pb::RetryOn {
    fn from(on: RetryOn) -> Self {
        match on {
            RetryOn::Lost => Self::Lost,
            RetryOn::Failed => Self::Failed,
            RetryOn::TimedOut => Self::TimedOut,
        }
    }
}

impl From<Dependency> for pb::Dependency {
    fn from(dependency: Dependency) -> Self {
        let condition = match dependency.condition {
            DependencyCondition::Succeeded => pb::DependencyCondition::Succeeded,
            DependencyCondition::Ended => pb::DependencyCondition::Ended,
        };
        Self { job_id: dependency.job_id.to_string(), condition: condition.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults { vcpus: 2, memory_mib: 512 };

    fn spec(change: impl FnOnce(&mut pb::JobSpec)) -> Result<JobSpec, Error> {
        let mut spec = pb::JobSpec { command: vec!["true".into()], ..Default::default() };
        change(&mut spec);
        JobSpec::parse("spec", spec, DEFAULTS)
    }

    #[test]
    fn a_spec_is_filled_with_defaults_and_survives_the_wire() {
        let spec = spec(|_| {}).expect("valid");
        assert_eq!((spec.vcpus, spec.memory_mib, spec.image.as_str(), spec.max_attempts), (2, 512, "default", 1));
        assert_eq!(JobSpec::parse_full("spec", Some(spec.clone().into())), Ok(spec));
    }

    #[test]
    fn the_pause_between_attempts_doubles_up_to_its_limit() {
        let retry = spec(|s| (s.backoff_ms, s.max_backoff_ms) = (100, 1000)).expect("valid").retry;
        let pauses: Vec<_> = (0..7).map(|started| retry.pause_after(started).as_millis()).collect();
        assert_eq!(pauses, [100, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(retry.pause_after(u32::MAX), retry.max_backoff);
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        type Spoil = fn(&mut pb::JobSpec);
        let cases: &[(&str, Spoil)] = &[
            ("spec.command", |s| s.command.clear()),
            ("spec.command", |s| s.command = vec!["x".repeat(limits::MAX_COMMAND_BYTES + 1)]),
            ("spec.command", |s| s.command.push("a\0b".into())),
            ("spec.env", |s| drop(s.env.insert("A=B".into(), String::new()))),
            ("spec.working_dir", |s| s.working_dir = "tmp".into()),
            ("spec.image", |s| s.image = "../etc".into()),
            ("spec.vcpus", |s| s.vcpus = Some(0)),
            ("spec.memory_mib", |s| s.memory_mib = Some(1)),
            ("spec.isolation", |s| s.isolation = 9),
            ("spec.priority", |s| s.priority = 1001),
            ("spec.timeout_ms", |s| s.timeout_ms = u64::MAX),
            ("spec.max_attempts", |s| s.max_attempts = 101),
            ("spec.retry_on", |s| s.retry_on = vec![0]),
            ("spec.backoff_ms", |s| s.backoff_ms = 3_600_001),
            ("spec.max_backoff_ms", |s| s.max_backoff_ms = 3_600_001),
            ("spec.queue_timeout_ms", |s| s.queue_timeout_ms = u64::MAX),
            ("spec.start_timeout_ms", |s| s.start_timeout_ms = u64::MAX),
            ("spec.node_labels", |s| drop(s.node_labels.insert(String::new(), String::new()))),
            ("spec.preferred_node_labels", |s| drop(s.preferred_node_labels.insert("k".repeat(64), String::new()))),
            ("spec.group_id", |s| s.group_id = "nonsense".into()),
            ("spec.depends_on[0].job_id", |s| s.depends_on = vec![pb::Dependency::default()]),
            ("spec.artifacts[0]", |s| s.artifacts = vec!["out".into()]),
            ("spec.artifacts[1]", |s| s.artifacts = vec!["/out".into(), "/tmp/..".into()]),
            ("spec.result_ttl_ms", |s| s.result_ttl_ms = u64::MAX),
            ("spec.input_digest", |s| s.input_digest = vec![1].into()),
            ("spec.egress.policy", |s| s.egress = Some(pb::Egress { policy: 9, allow: vec![] })),
            ("spec.volumes[0].source", |s| s.volumes = vec![pb::Volume { mount_path: "/a".into(), source: None }]),
            ("spec.isolation", |s| {
                s.isolation = pb::Isolation::Minimal.into();
                let source = Some(pb::volume::Source::ScratchMib(64));
                s.volumes = vec![pb::Volume { mount_path: "/scratch".into(), source }];
            }),
            ("spec.labels", |s| drop(s.labels.insert(String::new(), String::new()))),
            ("spec.node_id", |s| s.node_id = "a b".into()),
            ("spec.target_vm_id", |s| s.target_vm_id = "nonsense".into()),
        ];
        for (field, change) in cases {
            let error = spec(change).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(*field), "{error}");
        }
    }
}
