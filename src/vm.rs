//! A VM: what it is made of, and the one table of its life.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::{
    egress::Egress,
    error::{Error, invalid},
    id::{JobId, NAME_ALLOWED, NodeId, VmId, is_name},
    limits,
    pb::common::v1 as pb,
    time::{Timestamp, millis},
    volume::{Source, Volumes},
};

/// How long a VM lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmKind {
    /// Runs one job and ends.
    Ephemeral,
    /// Runs job after job until it is stopped.
    Service,
}

/// Where a VM is in its life. The names are those of the registry's `state` column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum VmState {
    Starting,
    Ready,
    Busy,
    Idle,
    Draining,
    Terminated,
    Failed,
}

impl VmState {
    /// Every state, in the order of a VM's life.
    pub const ALL: [Self; 7] =
        [Self::Starting, Self::Ready, Self::Busy, Self::Idle, Self::Draining, Self::Terminated, Self::Failed];

    /// Whether a VM of this kind may go from here to `to`. Everything that moves a VM asks this one function.
    #[must_use]
    pub fn may_go_to(self, to: Self, kind: VmKind) -> bool {
        match self {
            Self::Starting => matches!(to, Self::Ready | Self::Draining | Self::Failed),
            Self::Ready | Self::Idle => matches!(to, Self::Busy | Self::Draining | Self::Failed),
            Self::Busy => match to {
                Self::Idle => kind == VmKind::Service,
                Self::Draining | Self::Failed => true,
                Self::Starting | Self::Ready | Self::Busy | Self::Terminated => false,
            },
            Self::Draining => matches!(to, Self::Terminated | Self::Failed),
            Self::Terminated | Self::Failed => false,
        }
    }

    /// Whether the VM has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed)
    }

    /// Whether the VM can be given a job now.
    #[must_use]
    pub fn takes_jobs(self) -> bool {
        matches!(self, Self::Ready | Self::Idle)
    }

    /// Whether its guest is up: what users count as running.
    #[must_use]
    pub fn is_running(self) -> bool {
        matches!(self, Self::Ready | Self::Busy | Self::Idle)
    }

    /// The name in tables, logs and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "Starting",
            Self::Ready => "Ready",
            Self::Busy => "Busy",
            Self::Idle => "Idle",
            Self::Draining => "Draining",
            Self::Terminated => "Terminated",
            Self::Failed => "Failed",
        }
    }

    /// The inverse of [`VmState::as_str`], ignoring case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str().eq_ignore_ascii_case(name))
    }

    /// Parses the wire's value.
    pub fn from_pb(field: &str, value: i32) -> Result<Self, Error> {
        Ok(match pb::VmState::try_from(value) {
            Ok(pb::VmState::Starting) => Self::Starting,
            Ok(pb::VmState::Ready) => Self::Ready,
            Ok(pb::VmState::Busy) => Self::Busy,
            Ok(pb::VmState::Idle) => Self::Idle,
            Ok(pb::VmState::Draining) => Self::Draining,
            Ok(pb::VmState::Terminated) => Self::Terminated,
            Ok(pb::VmState::Failed) => Self::Failed,
            Ok(pb::VmState::Unspecified) | Err(_) => return Err(invalid(field, value, "one of the VM states 1 to 7")),
        })
    }

    /// The wire's value.
    #[must_use]
    pub fn to_pb(self) -> pb::VmState {
        match self {
            Self::Starting => pb::VmState::Starting,
            Self::Ready => pb::VmState::Ready,
            Self::Busy => pb::VmState::Busy,
            Self::Idle => pb::VmState::Idle,
            Self::Draining => pb::VmState::Draining,
            Self::Terminated => pb::VmState::Terminated,
            Self::Failed => pb::VmState::Failed,
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl VmKind {
    /// The name in tables, logs and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ephemeral => "ephemeral",
            Self::Service => "service",
        }
    }

    /// The inverse of [`VmKind::as_str`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Ephemeral, Self::Service].into_iter().find(|kind| kind.as_str().eq_ignore_ascii_case(name))
    }

    /// Parses the wire's value; unspecified is an error.
    pub fn from_pb(field: &str, value: i32) -> Result<Self, Error> {
        match pb::VmKind::try_from(value) {
            Ok(pb::VmKind::Ephemeral) => Ok(Self::Ephemeral),
            Ok(pb::VmKind::Service) => Ok(Self::Service),
            Ok(pb::VmKind::Unspecified) | Err(_) => {
                Err(invalid(field, value, "VM_KIND_EPHEMERAL (1) or VM_KIND_SERVICE (2)"))
            }
        }
    }

    /// The wire's value.
    #[must_use]
    pub fn to_pb(self) -> pb::VmKind {
        match self {
            Self::Ephemeral => pb::VmKind::Ephemeral,
            Self::Service => pb::VmKind::Service,
        }
    }
}

impl fmt::Display for VmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What fills in what a request leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Defaults {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// How large a VM is. Of what it is made of this alone may change while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VmShape {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl VmShape {
    /// Checks the fields `vcpus` and `memory_mib` of a request.
    pub fn parse(vcpus: u32, memory_mib: u32) -> Result<Self, Error> {
        Ok(Self { vcpus: check_vcpus("vcpus", vcpus)?, memory_mib: check_memory("memory_mib", memory_mib)? })
    }

    /// Of both the larger, thing by thing.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { vcpus: self.vcpus.max(other.vcpus), memory_mib: self.memory_mib.max(other.memory_mib) }
    }
}

impl fmt::Display for VmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vCPUs, {} MiB", self.vcpus, self.memory_mib)
    }
}

/// Another shape for a VM: what is not named stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmResize {
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    pub memory_mib: Option<u32>,
}

impl VmResize {
    /// Checks the fields `vcpus` and `memory_mib` of a request.
    pub fn parse(vcpus: Option<u32>, memory_mib: Option<u32>) -> Result<Self, Error> {
        if (vcpus, memory_mib) == (None, None) {
            return Err(invalid("vcpus", "", "a number, unless `memory_mib` has one"));
        }
        Ok(Self {
            vcpus: vcpus.map(|vcpus| check_vcpus("vcpus", vcpus)).transpose()?,
            memory_mib: memory_mib.map(|memory_mib| check_memory("memory_mib", memory_mib)).transpose()?,
        })
    }

    /// The shape that a VM of this one is to have.
    #[must_use]
    pub fn of(self, now: VmShape) -> VmShape {
        VmShape { vcpus: self.vcpus.unwrap_or(now.vcpus), memory_mib: self.memory_mib.unwrap_or(now.memory_mib) }
    }
}

/// What a VM is made of: checked, with every default filled in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct VmConfig {
    /// Ephemeral or service.
    pub kind: VmKind,
    /// Name of the image it boots.
    pub image: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Labels for filtering.
    pub labels: BTreeMap<String, String>,
    /// The node that must run it; `None`: the scheduler chooses.
    pub node_id: Option<NodeId>,
    /// Whom it may talk to. Not in what is stored of a VM without a network, so that an id that is used again after an upgrade
    /// still finds its request.
    #[serde(default, skip_serializing_if = "is_none")]
    pub egress: Egress,
    /// Disks beside its root. Not stored when there are none, for the same reason.
    #[serde(default, skip_serializing_if = "no_volumes")]
    pub volumes: Volumes,
}

fn no_volumes(volumes: &Volumes) -> bool {
    volumes.is_empty()
}

fn is_none(egress: &Egress) -> bool {
    !egress.needs_network()
}

impl VmConfig {
    /// Checks a request's `config`, filling in defaults; errors name the field below `field`.
    pub fn parse(field: &str, config: pb::VmConfig, defaults: Defaults) -> Result<Self, Error> {
        let kind = VmKind::from_pb(&format!("{field}.kind"), config.kind)?;
        let volumes = Volumes::from_pb(&format!("{field}.volumes"), config.volumes)?;
        let scratch = volumes.iter().find(|volume| matches!(volume.source, Source::ScratchMib(_)));
        if let (VmKind::Service, Some(scratch)) = (kind, scratch) {
            let allowed = "none, for a scratch disk is one job's and a service VM runs several";
            return Err(invalid(&format!("{field}.volumes"), scratch, allowed));
        }
        Ok(Self {
            kind,
            image: parse_image(field, config.image)?,
            vcpus: parse_vcpus(field, config.vcpus, defaults)?,
            memory_mib: parse_memory(field, config.memory_mib, defaults)?,
            labels: parse_labels(&format!("{field}.labels"), config.labels)?,
            node_id: parse_node(field, &config.node_id)?,
            egress: Egress::from_pb(&format!("{field}.egress"), config.egress)?,
            volumes,
        })
    }

    /// How large it is.
    #[must_use]
    pub fn shape(&self) -> VmShape {
        VmShape { vcpus: self.vcpus, memory_mib: self.memory_mib }
    }

    /// Checks a config in which nothing may be left out: what services send each other.
    pub fn parse_full(field: &str, config: Option<pb::VmConfig>) -> Result<Self, Error> {
        let config = config.ok_or_else(|| invalid(field, "", "required"))?;
        // Zero is refused below, so a missing number can't slip through as a default.
        Self::parse(field, config, Defaults { vcpus: 0, memory_mib: 0 })
    }
}

impl From<VmConfig> for pb::VmConfig {
    fn from(config: VmConfig) -> Self {
        Self {
            kind: config.kind.to_pb().into(),
            image: config.image,
            vcpus: Some(config.vcpus),
            memory_mib: Some(config.memory_mib),
            labels: config.labels,
            node_id: config.node_id.map(|id| id.to_string()).unwrap_or_default(),
            egress: config.egress.needs_network().then(|| config.egress.into()),
            volumes: config.volumes.into(),
        }
    }
}

pub(crate) fn parse_image(field: &str, image: String) -> Result<String, Error> {
    if image.is_empty() {
        Ok(limits::DEFAULT_IMAGE.to_owned())
    } else if is_name(&image) {
        Ok(image)
    } else {
        Err(invalid(&format!("{field}.image"), image, NAME_ALLOWED))
    }
}

pub(crate) fn parse_vcpus(field: &str, vcpus: Option<u32>, defaults: Defaults) -> Result<u32, Error> {
    check_vcpus(&format!("{field}.vcpus"), vcpus.unwrap_or(defaults.vcpus))
}

fn check_vcpus(field: &str, vcpus: u32) -> Result<u32, Error> {
    if (1..=limits::MAX_VCPUS).contains(&vcpus) {
        Ok(vcpus)
    } else {
        Err(invalid(field, vcpus, &format!("1 to {}", limits::MAX_VCPUS)))
    }
}

pub(crate) fn parse_memory(field: &str, memory_mib: Option<u32>, defaults: Defaults) -> Result<u32, Error> {
    check_memory(&format!("{field}.memory_mib"), memory_mib.unwrap_or(defaults.memory_mib))
}

fn check_memory(field: &str, memory_mib: u32) -> Result<u32, Error> {
    if (limits::MIN_MEMORY_MIB..=limits::MAX_MEMORY_MIB).contains(&memory_mib) {
        Ok(memory_mib)
    } else {
        let allowed = format!("{} to {} (MiB)", limits::MIN_MEMORY_MIB, limits::MAX_MEMORY_MIB);
        Err(invalid(field, memory_mib, &allowed))
    }
}

/// Checks labels: those of a spec and those of a filter.
pub fn parse_labels(field: &str, labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Error> {
    if labels.len() > limits::MAX_LABELS {
        return Err(invalid(field, labels.len(), &format!("at most {} labels", limits::MAX_LABELS)));
    }
    for (key, value) in &labels {
        if !(1..=63).contains(&key.len()) {
            return Err(invalid(field, key, "keys of 1 to 63 bytes"));
        }
        if value.len() > 255 {
            return Err(invalid(field, value, "values of at most 255 bytes"));
        }
    }
    Ok(labels)
}

pub(crate) fn parse_node(field: &str, node_id: &str) -> Result<Option<NodeId>, Error> {
    match node_id {
        "" => Ok(None),
        id => NodeId::parse(&format!("{field}.node_id"), id).map(Some),
    }
}

/// A VM as the registry records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    pub id: VmId,
    /// What it is made of.
    pub config: VmConfig,
    /// Where it is in its life.
    pub state: VmState,
    /// The node that runs it.
    pub node_id: NodeId,
    /// The job it runs now.
    pub job_id: Option<JobId>,
    /// Why it is in this state; may be empty.
    pub reason: String,
    /// Counts its changes, from 1.
    pub generation: u64,
    /// The registry's revision at its last change.
    pub revision: u64,
    /// When it was recorded.
    pub created_at: Timestamp,
    /// When it last changed.
    pub updated_at: Timestamp,
    /// How many jobs it has been given.
    pub jobs_assigned: u32,
    /// While Draining: how long it has to end by itself; `None`: its node's default.
    pub stop_grace: Option<Duration>,
}

impl From<Vm> for pb::Vm {
    fn from(vm: Vm) -> Self {
        Self {
            id: vm.id.to_string(),
            config: Some(vm.config.into()),
            state: vm.state.to_pb().into(),
            node_id: vm.node_id.to_string(),
            job_id: vm.job_id.map(|id| id.to_string()).unwrap_or_default(),
            reason: vm.reason,
            generation: vm.generation,
            revision: vm.revision,
            created_at: Some(vm.created_at.into()),
            updated_at: Some(vm.updated_at.into()),
            jobs_assigned: vm.jobs_assigned,
            stop_grace_ms: vm.stop_grace.map(millis),
        }
    }
}

impl TryFrom<pb::Vm> for Vm {
    type Error = Error;

    fn try_from(vm: pb::Vm) -> Result<Self, Error> {
        Ok(Self {
            id: VmId::parse("vm.id", &vm.id)?,
            config: VmConfig::parse_full("vm.config", vm.config)?,
            state: VmState::from_pb("vm.state", vm.state)?,
            node_id: NodeId::parse("vm.node_id", &vm.node_id)?,
            job_id: if vm.job_id.is_empty() { None } else { Some(JobId::parse("vm.job_id", &vm.job_id)?) },
            reason: vm.reason,
            generation: vm.generation,
            revision: vm.revision,
            created_at: vm.created_at.unwrap_or_default().into(),
            updated_at: vm.updated_at.unwrap_or_default().into(),
            jobs_assigned: vm.jobs_assigned,
            stop_grace: vm.stop_grace_ms.map(Duration::from_millis),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_transitions_is_the_documented_one() {
        let mut table = String::new();
        for kind in [VmKind::Ephemeral, VmKind::Service] {
            for from in VmState::ALL {
                let to: Vec<_> =
                    VmState::ALL.into_iter().filter(|&to| from.may_go_to(to, kind)).map(VmState::as_str).collect();
                table += &format!("{kind:9} {from:10} -> {}\n", to.join(" "));
            }
        }
        insta::assert_snapshot!(table, @r"
        ephemeral Starting   -> Ready Draining Failed
        ephemeral Ready      -> Busy Draining Failed
        ephemeral Busy       -> Draining Failed
        ephemeral Idle       -> Busy Draining Failed
        ephemeral Draining   -> Terminated Failed
        ephemeral Terminated -> 
        ephemeral Failed     -> 
        service   Starting   -> Ready Draining Failed
        service   Ready      -> Busy Draining Failed
        service   Busy       -> Idle Draining Failed
        service   Idle       -> Busy Draining Failed
        service   Draining   -> Terminated Failed
        service   Terminated -> 
        service   Failed     -> 
        ");
    }

    #[test]
    fn a_scratch_disk_is_an_ephemeral_vms_and_what_is_stored_without_volumes_is_as_it_was() {
        let scratch = pb::volume::Source::ScratchMib(64);
        let volumes = vec![pb::Volume { mount_path: "/scratch".into(), source: Some(scratch) }];
        let parse = |kind: VmKind, volumes| {
            let config = pb::VmConfig { kind: kind.to_pb().into(), volumes, ..Default::default() };
            VmConfig::parse("config", config, Defaults { vcpus: 1, memory_mib: 128 })
        };
        let config = parse(VmKind::Ephemeral, volumes.clone()).expect("valid");
        assert_eq!(VmConfig::parse_full("config", Some(config.clone().into())), Ok(config.clone()));
        let stored = serde_json::to_string(&config).expect("text");
        assert_eq!(serde_json::from_str::<VmConfig>(&stored).expect("reads"), config);
        let refused = parse(VmKind::Service, volumes).expect_err("refused");
        assert_eq!(refused.metadata["field"], "config.volumes");
        let without = serde_json::to_string(&parse(VmKind::Service, vec![]).expect("valid")).expect("text");
        assert!(!without.contains("volumes"), "{without}");
    }

    #[test]
    fn names_and_wire_values_round_trip() {
        for state in VmState::ALL {
            assert_eq!(VmState::from_name(state.as_str()), Some(state));
            assert_eq!(VmState::from_pb("s", state.to_pb().into()), Ok(state));
        }
        assert!(VmState::from_pb("s", 0).is_err() && VmState::from_pb("s", 99).is_err());
    }
}
