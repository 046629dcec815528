//! The disks that a VM has beside its root.
//!
//! ```text
//! tools:/opt/tools │ scratch=10240M:/scratch
//! ```
//! Who asks for one says a name, never a path of the host: what a name stands for is each node's to say. What makes disks is vmhost.

use std::{fmt, ops::Deref};

use crate::{
    error::{Error, invalid},
    id::{NAME_ALLOWED, is_name},
    limits::{MAX_MOUNT_PATH_BYTES, MAX_SCRATCH_MIB, MAX_VOLUMES, MIN_SCRATCH_MIB},
    pb::common::v1 as pb,
};

/// Where a scratch disk is mounted when nobody says where.
pub const DEFAULT_SCRATCH_PATH: &str = "/scratch";

const PATH_ALLOWED: &str = "an absolute path of at most 255 of a-z, A-Z, 0-9, '-', '_', '.', '+', '@' and '/', without empty parts, \".\" and \"..\"; \
     not \"/\", and not /dev, /proc, /sys or below";

/// A disk, and where its VM's jobs see it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Volume {
    /// Absolute, in the one way it can be written.
    pub mount_path: String,
    /// What it is.
    #[serde(flatten)]
    pub source: Source,
}

/// What a volume is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The node's volume of this name, read-only.
    Name(String),
    /// An empty disk of so many MiB that goes with its VM.
    ScratchMib(u64),
}

/// A VM's volumes, in the order of their paths: however they are asked for, the same ones are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(into = "Vec<Volume>", try_from = "Vec<Volume>")]
pub struct Volumes(Vec<Volume>);

impl Volumes {
    /// Checks a request's volumes; errors name the field below `field`.
    ///
    /// # Errors
    /// INVALID_FIELD.
    pub fn from_pb(field: &str, volumes: Vec<pb::Volume>) -> Result<Self, Error> {
        if volumes.len() > MAX_VOLUMES {
            return Err(invalid(field, volumes.len(), &format!("at most {MAX_VOLUMES} volumes")));
        }
        let parsed = volumes.into_iter().enumerate().map(|(at, volume)| parse(&format!("{field}[{at}]"), volume));
        let parsed: Vec<Volume> = parsed.collect::<Result<_, _>>()?;
        for (at, volume) in parsed.iter().enumerate() {
            let path = &volume.mount_path;
            if let Some(other) = parsed[..at].iter().find(|other| collide(path, &other.mount_path)) {
                let allowed = format!(
                    "a path that is neither {} nor inside or around it, where another volume is",
                    other.mount_path
                );
                return Err(invalid(&format!("{field}[{at}].mount_path"), path, &allowed));
            }
        }
        Ok(Self::from_iter(parsed))
    }

    /// The names of the node's volumes among them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|volume| match &volume.source {
            Source::Name(name) => Some(name.as_str()),
            Source::ScratchMib(_) => None,
        })
    }

    /// How much scratch disks may take, all of them together, in MiB.
    #[must_use]
    pub fn scratch_mib(&self) -> u64 {
        let sizes = self.0.iter().map(|volume| if let Source::ScratchMib(mib) = volume.source { mib } else { 0 });
        sizes.sum()
    }
}

fn parse(field: &str, volume: pb::Volume) -> Result<Volume, Error> {
    if !is_mount_path(&volume.mount_path) {
        return Err(invalid(&format!("{field}.mount_path"), volume.mount_path.escape_debug(), PATH_ALLOWED));
    }
    let source = match volume.source {
        Some(pb::volume::Source::Name(name)) if is_name(&name) => Source::Name(name),
        Some(pb::volume::Source::Name(name)) => {
            return Err(invalid(&format!("{field}.name"), name.escape_debug(), NAME_ALLOWED));
        }
        Some(pb::volume::Source::ScratchMib(mib)) if (MIN_SCRATCH_MIB..=MAX_SCRATCH_MIB).contains(&mib) => {
            Source::ScratchMib(mib)
        }
        Some(pb::volume::Source::ScratchMib(mib)) => {
            let allowed = format!("{MIN_SCRATCH_MIB} to {MAX_SCRATCH_MIB} (MiB)");
            return Err(invalid(&format!("{field}.scratch_mib"), mib, &allowed));
        }
        None => return Err(invalid(&format!("{field}.source"), "", "name or scratch_mib")),
    };
    Ok(Volume { mount_path: volume.mount_path, source })
}

/// Whether a volume may be mounted here.
#[must_use]
pub fn is_mount_path(path: &str) -> bool {
    let Some(below) = path.strip_prefix('/') else { return false };
    let is_part = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.+@".contains(&byte))
    };
    let top = below.split('/').next().unwrap_or_default();
    path.len() <= MAX_MOUNT_PATH_BYTES && below.split('/').all(is_part) && !matches!(top, "dev" | "proc" | "sys")
}

/// Whether one path is the other or inside it.
fn collide(a: &str, b: &str) -> bool {
    let inside = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    inside(a, b) || inside(b, a)
}

impl Deref for Volumes {
    type Target = [Volume];

    fn deref(&self) -> &[Volume] {
        &self.0
    }
}

/// For volumes that have been checked.
impl FromIterator<Volume> for Volumes {
    fn from_iter<I: IntoIterator<Item = Volume>>(volumes: I) -> Self {
        let mut volumes: Vec<Volume> = volumes.into_iter().collect();
        volumes.sort_unstable();
        Self(volumes)
    }
}

impl From<Volumes> for Vec<Volume> {
    fn from(volumes: Volumes) -> Self {
        volumes.0
    }
}

impl TryFrom<Vec<Volume>> for Volumes {
    type Error = Error;

    fn try_from(volumes: Vec<Volume>) -> Result<Self, Error> {
        Self::from_pb("volumes", volumes.into_iter().map(Into::into).collect())
    }
}

impl From<Volume> for pb::Volume {
    fn from(volume: Volume) -> Self {
        let source = match volume.source {
            Source::Name(name) => pb::volume::Source::Name(name),
            Source::ScratchMib(mib) => pb::volume::Source::ScratchMib(mib),
        };
        Self { mount_path: volume.mount_path, source: Some(source) }
    }
}

impl From<Volumes> for Vec<pb::Volume> {
    fn from(volumes: Volumes) -> Self {
        volumes.0.into_iter().map(Into::into).collect()
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Name(name) => write!(f, "{name}:{}", self.mount_path),
            Source::ScratchMib(mib) => write!(f, "scratch={mib}M:{}", self.mount_path),
        }
    }
}

impl fmt::Display for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let volumes: Vec<String> = self.0.iter().map(Volume::to_string).collect();
        f.write_str(&volumes.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use pb::volume::Source::{Name, ScratchMib};

    use super::*;

    fn volume(mount_path: &str, source: pb::volume::Source) -> pb::Volume {
        pb::Volume { mount_path: mount_path.into(), source: Some(source) }
    }

    #[test]
    fn volumes_survive_the_wire_and_their_json_and_their_order_means_nothing() {
        let (tools, scratch) = (volume("/opt/tools", Name("tools".into())), volume("/scratch", ScratchMib(16)));
        let volumes = Volumes::from_pb("v", vec![scratch.clone(), tools.clone()]).expect("valid");
        assert_eq!(Volumes::from_pb("v", vec![tools, scratch]), Ok(volumes.clone()));
        assert_eq!(Volumes::from_pb("v", volumes.clone().into()), Ok(volumes.clone()));
        let json = serde_json::to_string(&volumes).expect("text");
        assert_eq!(json, r#"[{"mount_path":"/opt/tools","name":"tools"},{"mount_path":"/scratch","scratch_mib":16}]"#);
        assert_eq!(serde_json::from_str::<Volumes>(&json).expect("reads"), volumes);
        assert_eq!(volumes.to_string(), "tools:/opt/tools scratch=16M:/scratch");
        assert_eq!((volumes.names().collect::<Vec<_>>(), volumes.scratch_mib()), (vec!["tools"], 16));
    }

    #[test]
    fn a_path_is_written_in_one_way_and_leaves_the_guest_what_it_needs() {
        for path in
            ["/a", "/a/b.c/d-e_f+g@h", "/tmp", "/process", "/device/x", "/...", &format!("/{}", "a".repeat(254))]
        {
            assert!(is_mount_path(path), "{path}");
        }
        let long = format!("/{}", "a".repeat(255));
        let bad = [
            "", "a", "/", "//a", "/a/", "/a//b", "/.", "/a/..", "/a/../b", "/a b", "/a,b", "/a:b", "/a\n", "/é", "/a\0",
        ];
        for path in bad.into_iter().chain(["/dev", "/dev/shm", "/proc", "/proc/1", "/sys", "/sys/x", long.as_str()]) {
            assert!(!is_mount_path(path), "{path:?}");
        }
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        let tools = |path: &str| volume(path, Name("tools".into()));
        let cases = [
            ("v", (0..17).map(|at| tools(&format!("/{at}"))).collect()),
            ("v[0].mount_path", vec![tools("/proc")]),
            ("v[1].mount_path", vec![tools("/a"), tools("/a")]),
            ("v[1].mount_path", vec![tools("/a"), tools("/a/b")]),
            ("v[2].mount_path", vec![tools("/a/b"), tools("/a.b"), tools("/a")]),
            ("v[0].name", vec![volume("/a", Name("../etc".into()))]),
            ("v[0].name", vec![volume("/a", Name(String::new()))]),
            ("v[0].scratch_mib", vec![volume("/a", ScratchMib(15))]),
            ("v[0].scratch_mib", vec![volume("/a", ScratchMib(1_048_577))]),
            ("v[0].source", vec![pb::Volume { mount_path: "/a".into(), source: None }]),
        ];
        for (field, volumes) in cases {
            let error = Volumes::from_pb("v", volumes).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(field), "{error}");
        }
        let apart = [tools("/a"), tools("/ab"), tools("/a.b"), volume("/b", ScratchMib(1_048_576))];
        Volumes::from_pb("v", apart.to_vec()).expect("none is inside another");
        serde_json::from_str::<Volumes>(r#"[{"mount_path":"/proc","name":"x"}]"#).expect_err("checked here, too");
    }
}
