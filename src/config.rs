//! Every setting: its name in TOML, environment and flags, its default and what is allowed.
//!
//! Order: defaults < TOML file < environment < flags. All four go through the same [`SETTINGS`] table, so a bad value is the
//! same error wherever it stands: it names the setting as its user wrote it, the value and what is allowed.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    id::{NAME_ALLOWED, NodeId, is_name},
    limits,
    replica::{REPLICAS_ALLOWED, Replicas},
    vm::Defaults,
};

/// The whole configuration of a control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Who this node is and where it listens.
    pub server: ServerConfig,
    /// VM hypervisor settings.
    pub firecracker: FirecrackerConfig,
    /// Where things are stored.
    pub storage: StorageConfig,
    /// Whether the registry is alone or one of several replicas.
    pub registry: RegistryConfig,
    /// The network of guests.
    pub network: NetworkConfig,
    /// How VMs are managed.
    pub vm_manager: VmManagerConfig,
    /// How jobs are queued and shared out.
    pub scheduler: SchedulerConfig,
    /// What is forgotten, and when.
    pub retention: RetentionConfig,
}

/// Who this node is and where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Where gRPC is served. Port 0: any free port.
    pub listen: SocketAddr,
    /// This node's name.
    pub node_id: NodeId,
    /// Where metrics are served; none: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// Labels of this node that jobs can ask for.
    pub node_labels: Assignments<String>,
}

/// VM hypervisor settings. The name is history's: the hypervisors are Cloud Hypervisor and QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirecrackerConfig {
    /// Which hypervisor.
    pub driver: DriverChoice,
    /// How many VMs may run at once.
    pub max_concurrent_vms: u32,
    /// How many templates a node keeps; 0: every VM boots.
    pub templates: u32,
    /// Memory of a VM that asks for none, in MiB.
    pub default_memory_mb: u32,
    /// Virtual CPUs of a VM that asks for none.
    pub default_vcpus: u32,
    /// Directory of the Nix flake that builds images.
    pub flake_dir: PathBuf,
    /// Directory of images: one directory each, with `manifest.json`, kernel and initramfs.
    pub image_dir: PathBuf,
    /// Users that hypervisors run as, one for each VM; none: they run as vmhost's.
    pub vm_uids: Option<UserRange>,
    /// How much a VM may read of its node's disk each second, and write to it, in MiB; 0: no limit.
    pub vm_disk_mib_per_second: u32,
    /// How many operations a second it may have there of either kind; 0: no limit.
    pub vm_disk_iops: u32,
}

/// User ids that nobody else has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

impl UserRange {
    /// What systemd's list of users (<https://systemd.io/UIDS-GIDS>) has as unused: above those of containers, below those of foreign file systems.
    pub const UNUSED: Self = Self { first: 1_879_048_192, last: 2_147_352_575 };
    /// Users that are taken everywhere: "nobody", and an id of 16 bits that stands for none.
    const TAKEN: [u32; 2] = [65_534, 65_535];
    /// The first that is not the system's own.
    const MIN: u32 = 1000;
    /// The last that every program takes for a number.
    const MAX: u32 = 2_147_483_646;

    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once('-')?;
        let range = Self { first: number(first, Self::MIN, Self::MAX)?, last: number(last, Self::MIN, Self::MAX)? };
        let taken = Self::TAKEN.iter().any(|id| (range.first..=range.last).contains(id));
        (range.first <= range.last && !taken).then_some(range)
    }
}

impl fmt::Display for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Where things are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageConfig {
    /// The registry's database (`hiqlite/`) and the logs of jobs (`logs/`).
    pub data_dir: PathBuf,
    /// What each VM holds, one directory a VM.
    pub vm_state_dir: PathBuf,
    /// A file with the key that seals jobs' secrets.
    pub secret_key_file: PathBuf,
    /// What jobs can have mounted read-only, by name: disk images and directories.
    pub volumes: Assignments<String>,
}

/// Whether the registry is alone or one of several replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// All replicas, the same on each; none: the registry is alone.
    pub replicas: Replicas,
    /// Which of them this one is; 0 when it is alone.
    pub replica_id: u64,
    /// A file with the secret that the replicas know each other by.
    pub secret_file: PathBuf,
}

/// The network of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// What guests' addresses are taken from; none: guests have no network.
    pub subnet: Option<Ipv4Net>,
    /// What their IPv6 addresses are taken from besides; none: they have none.
    pub subnet6: Option<Ipv6Net>,
    /// The longest packet, in bytes.
    pub mtu: u32,
    /// Those who resolve names for guests.
    pub resolvers: List<IpAddr>,
    /// Networks that no guest reaches, whatever its job asks for.
    pub denied: List<IpNet>,
}

/// How VMs are managed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmManagerConfig {
    /// Whether the scheduler starts service VMs for jobs that need one, and ends its idle ones when room is short.
    pub auto_scaling: bool,
    /// How many service VMs of the default image the scheduler keeps warm.
    pub pre_warm_count: u32,
    /// How many of other images.
    pub pre_warm_images: Assignments<u32>,
    /// How many service VMs of one image the scheduler starts at most; 0: as many as there is room for.
    pub max_service_vms: u32,
    /// How long a service VM beyond those kept warm stays idle before the scheduler ends it.
    pub scale_down_seconds: u32,
    /// After so many jobs a service VM is replaced; 0: never.
    pub recycle_after_jobs: u32,
    /// After so many minutes a service VM is replaced; 0: never.
    pub recycle_after_minutes: u32,
    /// A service VM with less of its memory available than this is replaced; 0: never.
    pub recycle_below_memory_percent: u32,
    /// How often each VM's guest agent is asked whether it is well; 0: never.
    pub health_check_seconds: u32,
    /// Which of the nodes that fit a VM is put on.
    pub placement: PlacementChoice,
}

/// Which of the nodes that fit a VM is put on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlacementChoice {
    /// The one with the most free memory: load spreads.
    Spread,
    /// The one with the least: large gaps stay.
    Pack,
}

/// How jobs are queued and shared out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// How many jobs may wait; more are refused.
    pub max_queued_jobs: u32,
    /// How many jobs of one tenant may be assigned or running; 0: no limit.
    pub tenant_max_jobs: u32,
    /// The same for some tenants.
    pub tenant_limits: Assignments<u32>,
    /// So many seconds in the queue are worth one level of priority.
    pub ageing_seconds: u32,
    /// How long a Lost node may come back before its jobs are taken for lost.
    pub lost_node_grace_seconds: u32,
}

/// `value,…`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List<T>(pub Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: fmt::Display> fmt::Display for List<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values: Vec<_> = self.0.iter().map(T::to_string).collect();
        f.write_str(&values.join(","))
    }
}

impl<T> List<T> {
    fn parse(text: &str, most: usize, value: impl Fn(&str) -> Option<T>) -> Option<Self> {
        let values = text.split(',').map(str::trim).filter(|value| !value.is_empty());
        let values: Vec<T> = values.map(value).collect::<Option<_>>()?;
        (values.len() <= most).then_some(Self(values))
    }
}

/// `name=value,…`, each name once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignments<T>(pub BTreeMap<String, T>);

impl<T> Default for Assignments<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: fmt::Display> fmt::Display for Assignments<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.0.iter().map(|(name, value)| format!("{name}={value}")).collect();
        f.write_str(&pairs.join(","))
    }
}

impl<T> Assignments<T> {
    fn parse(text: &str, value: impl Fn(&str) -> Option<T>) -> Option<Self> {
        let mut all = BTreeMap::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (name, given) = pair.split_once('=')?;
            let fits = (1..=63).contains(&name.len()) && given.len() <= 255;
            if !fits || all.insert(name.to_owned(), value(given)?).is_some() {
                return None;
            }
        }
        (all.len() <= limits::MAX_LABELS).then_some(Self(all))
    }
}

/// What is forgotten, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionConfig {
    /// Events are kept for this many days …
    pub events_days: u32,
    /// … unless there are more than this many; then the oldest go.
    pub max_events: u32,
    /// VMs and jobs that have ended are kept for this many days.
    pub ended_days: u32,
    /// Of each attempt's output its node keeps so much, in MiB; then the oldest goes.
    pub max_log_mib: u32,
    /// The output and artifacts that a node keeps may take so much of their file system; then those of the oldest attempts go.
    pub node_log_percent: u32,
}

/// Which VM driver to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverChoice {
    /// The best that this machine can run; never `process`.
    Auto,
    /// Cloud Hypervisor: for production, where KVM works.
    CloudHypervisor,
    /// QEMU: KVM where it works, else emulation.
    Qemu,
    /// Plain processes without isolation: for development and tests.
    Process,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            server: ServerConfig {
                listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
                node_id: NodeId::parse("node_id", "node-1").unwrap_or_else(|_| unreachable!("a constant name")),
                metrics_listen: None,
                node_labels: Assignments::default(),
            },
            firecracker: FirecrackerConfig {
                driver: DriverChoice::Auto,
                max_concurrent_vms: 10,
                // A VM is there in a third of the time or less. Each takes what a guest's memory holds after its boot, some 80 MB.
                templates: 4,
                default_memory_mb: 512,
                default_vcpus: 2,
                flake_dir: "./microvms".into(),
                image_dir: "./images".into(),
                vm_uids: Some(UserRange::UNUSED),
                vm_disk_mib_per_second: 0,
                vm_disk_iops: 0,
            },
            storage: StorageConfig {
                data_dir: "./data".into(),
                vm_state_dir: "./data/vm-state".into(),
                secret_key_file: "./data/secrets.key".into(),
                volumes: Assignments::default(),
            },
            registry: RegistryConfig {
                replicas: Replicas::default(),
                replica_id: 0,
                secret_file: "./registry.secret".into(),
            },
            // Off: nobody wants bridges, NAT and forwarding on a machine because a program was tried there. Public resolvers, because
            // a machine's own are often on its loopback or in a network that guests don't reach.
            network: NetworkConfig {
                subnet: None,
                subnet6: None,
                mtu: 1500,
                resolvers: List(vec![IpAddr::from([1, 1, 1, 1]), IpAddr::from([9, 9, 9, 9])]),
                denied: List::default(),
            },
            vm_manager: VmManagerConfig {
                auto_scaling: true,
                pre_warm_count: 0,
                pre_warm_images: Assignments::default(),
                max_service_vms: 0,
                // Long enough that a pause between two pushes does not cost a boot.
                scale_down_seconds: 300,
                recycle_after_jobs: 0,
                recycle_after_minutes: 0,
                recycle_below_memory_percent: 5,
                // A thousand VMs are 33 calls a second.
                health_check_seconds: 30,
                placement: PlacementChoice::Spread,
            },
            // The registry counts 15 s of silence before a node is Lost; a vmhost ends its attempts 30 s after it was heard of.
            scheduler: SchedulerConfig {
                max_queued_jobs: 1_000_000,
                tenant_max_jobs: 0,
                tenant_limits: Assignments::default(),
                ageing_seconds: 30,
                lost_node_grace_seconds: 30,
            },
            // A week covers any watcher's absence and last weekend's questions. A million events are some 200 MB, and the
            // database's snapshots, which hold up writers, take a second with as much. What ended last month is still listed.
            // A log of 1 GiB is more than anybody reads, and of the disk half is left for whatever else is there.
            retention: RetentionConfig {
                events_days: 7,
                max_events: 1_000_000,
                ended_days: 30,
                max_log_mib: 1024,
                node_log_percent: 50,
            },
        }
    }
}

impl Config {
    /// What fills in what a request leaves out.
    #[must_use]
    pub fn defaults(&self) -> Defaults {
        Defaults { vcpus: self.firecracker.default_vcpus, memory_mib: self.firecracker.default_memory_mb }
    }

    /// Puts the configuration together. `file` is the path and text of a TOML file, `env` looks up an environment
    /// variable, `flag` the value of a command-line flag by its name without dashes.
    ///
    /// # Errors
    /// The first setting that is unknown or has a value that is not allowed.
    pub fn load(
        file: Option<(&str, &str)>,
        env: impl Fn(&str) -> Option<String>,
        flag: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some((path, text)) = file {
            config.apply_file(path, text)?;
        }
        for setting in SETTINGS {
            if let Some(value) = env(setting.env) {
                setting.apply(&mut config, &format!("environment variable {}", setting.env), &value)?;
            }
            if let Some(value) = flag(setting.flag) {
                setting.apply(&mut config, &format!("flag --{}", setting.flag), &value)?;
            }
        }
        Ok(config)
    }

    fn apply_file(&mut self, path: &str, text: &str) -> Result<(), ConfigError> {
        let syntax = |error: toml::de::Error| {
            let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or_default();
            let (line, column) =
                (before.split('\n').count(), before.chars().rev().take_while(|&c| c != '\n').count() + 1);
            let message = format!("line {line}, column {column}: {}", error.message());
            ConfigError::Syntax { path: path.to_owned(), message }
        };
        for (section, body) in text.parse::<toml::Table>().map_err(syntax)? {
            let unknown = |key: String| ConfigError::Unknown { path: path.to_owned(), key };
            let toml::Value::Table(body) = body else { return Err(unknown(section)) };
            for (key, value) in body {
                let name = format!("{section}.{key}");
                let Some(setting) = SETTINGS.iter().find(|setting| setting.key == name) else {
                    return Err(unknown(name));
                };
                let value = match value {
                    toml::Value::String(text) => text,
                    other => other.to_string(),
                };
                setting.apply(self, &format!("{path}: {name}"), &value)?;
            }
        }
        Ok(())
    }

    /// The configuration as a TOML file, each setting with its comment.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for setting in SETTINGS {
            let (head, key) = setting.key.split_once('.').unwrap_or(("", setting.key));
            if head != section {
                section = head;
                text += &format!("{}[{head}]\n", if text.is_empty() { "" } else { "\n" });
            }
            let value = (setting.get)(self);
            let bare = value.parse::<u64>().is_ok() || value == "true" || value == "false";
            let value = if bare { value } else { toml::Value::String(value).to_string() };
            text += &format!("# {} ({})\n{key} = {value}\n", setting.help, setting.allowed);
        }
        text
    }
}

/// A setting: one row of the table that the documentation, the file, the environment and the flags share.
pub struct Setting {
    /// `section.key` in a TOML file.
    pub key: &'static str,
    /// Environment variable.
    pub env: &'static str,
    /// Command-line flag, without dashes.
    pub flag: &'static str,
    /// What it does.
    pub help: &'static str,
    /// What is allowed, in words.
    pub allowed: &'static str,
    set: fn(&mut Config, &str) -> Option<()>,
    get: fn(&Config) -> String,
}

impl Setting {
    /// The value in `config`, written as it would be in a flag.
    #[must_use]
    pub fn value(&self, config: &Config) -> String {
        (self.get)(config)
    }

    fn apply(&self, config: &mut Config, source: &str, value: &str) -> Result<(), ConfigError> {
        (self.set)(config, value).ok_or_else(|| ConfigError::Value {
            source_name: source.to_owned(),
            value: value.to_owned(),
            allowed: self.allowed,
        })
    }
}

/// Every setting, by section.
pub const SETTINGS: &[Setting] = &[
    Setting {
        key: "server.listen",
        env: "BLIXARD_LISTEN",
        flag: "listen",
        help: "Where gRPC is served",
        allowed: "an address and port such as 127.0.0.1:50051; port 0 takes any free one",
        set: |config, value| value.parse().ok().map(|address| config.server.listen = address),
        get: |config| config.server.listen.to_string(),
    },
    Setting {
        key: "server.node_id",
        env: "BLIXARD_NODE_ID",
        flag: "node-id",
        help: "This node's name",
        allowed: NAME_ALLOWED,
        set: |config, value| NodeId::parse("", value).ok().map(|id| config.server.node_id = id),
        get: |config| config.server.node_id.to_string(),
    },
    Setting {
        key: "server.metrics_listen",
        env: "BLIXARD_METRICS_LISTEN",
        flag: "metrics-listen",
        help: "Where metrics are served over HTTP, at /metrics; empty: nowhere",
        allowed: "empty, or an address and port such as 127.0.0.1:9464; port 0 takes any free one",
        set: |config, value| {
            config.server.metrics_listen = if value.is_empty() { None } else { Some(value.parse().ok()?) };
            Some(())
        },
        get: |config| config.server.metrics_listen.map_or_else(String::new, |address| address.to_string()),
    },
    Setting {
        key: "server.node_labels",
        env: "BLIXARD_NODE_LABELS",
        flag: "node-labels",
        help: "Labels of this node that jobs can ask for",
        allowed: "empty, or key=value,…: at most 32; keys of 1 to 63 and values of at most 255 bytes",
        set: |config, value| {
            Assignments::parse(value, |value| Some(value.to_owned())).map(|all| config.server.node_labels = all)
        },
        get: |config| config.server.node_labels.to_string(),
    },
    Setting {
        key: "firecracker.driver",
        env: "BLIXARD_DRIVER",
        flag: "driver",
        help: "Which VM driver to use; process has no isolation",
        allowed: "auto, cloud-hypervisor, qemu or process",
        set: |config, value| {
            config.firecracker.driver = match value {
                "auto" => DriverChoice::Auto,
                "cloud-hypervisor" => DriverChoice::CloudHypervisor,
                "qemu" => DriverChoice::Qemu,
                "process" => DriverChoice::Process,
                _ => return None,
            };
            Some(())
        },
        get: |config| {
            match config.firecracker.driver {
                DriverChoice::Auto => "auto",
                DriverChoice::CloudHypervisor => "cloud-hypervisor",
                DriverChoice::Qemu => "qemu",
                DriverChoice::Process => "process",
            }
            .to_owned()
        },
    },
    Setting {
        key: "firecracker.max_concurrent_vms",
        env: "FIRECRACKER_MAX_CONCURRENT_VMS",
        flag: "max-vms",
        help: "How many VMs may run at once",
        allowed: "a whole number from 1 to 10000",
        set: |config, value| number(value, 1, 10_000).map(|n| config.firecracker.max_concurrent_vms = n),
        get: |config| config.firecracker.max_concurrent_vms.to_string(),
    },
    Setting {
        key: "firecracker.templates",
        env: "BLIXARD_TEMPLATES",
        flag: "templates",
        help: "How many templates a node keeps: saved machines from which VMs are restored instead of booted",
        allowed: "a whole number from 0 to 1000; 0: every VM boots",
        set: |config, value| number(value, 0, 1_000).map(|n| config.firecracker.templates = n),
        get: |config| config.firecracker.templates.to_string(),
    },
    Setting {
        key: "firecracker.default_memory_mb",
        env: "FIRECRACKER_DEFAULT_MEMORY_MB",
        flag: "default-memory-mb",
        help: "Memory of a VM that asks for none, in MiB",
        allowed: "a whole number from 96 to 1048576",
        set: |config, value| {
            number(value, limits::MIN_MEMORY_MIB, limits::MAX_MEMORY_MIB)
                .map(|n| config.firecracker.default_memory_mb = n)
        },
        get: |config| config.firecracker.default_memory_mb.to_string(),
    },
    Setting {
        key: "firecracker.default_vcpus",
        env: "FIRECRACKER_DEFAULT_VCPUS",
        flag: "default-vcpus",
        help: "Virtual CPUs of a VM that asks for none",
        allowed: "a whole number from 1 to 64",
        set: |config, value| number(value, 1, limits::MAX_VCPUS).map(|n| config.firecracker.default_vcpus = n),
        get: |config| config.firecracker.default_vcpus.to_string(),
    },
    Setting {
        key: "firecracker.flake_dir",
        env: "FIRECRACKER_FLAKE_DIR",
        flag: "flake-dir",
        help: "Directory of the Nix flake that builds images",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.firecracker.flake_dir = path),
        get: |config| config.firecracker.flake_dir.display().to_string(),
    },
    Setting {
        key: "firecracker.image_dir",
        env: "BLIXARD_IMAGE_DIR",
        flag: "image-dir",
        help: "Directory of images, one directory each with manifest.json, kernel and initramfs",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.firecracker.image_dir = path),
        get: |config| config.firecracker.image_dir.display().to_string(),
    },
    Setting {
        key: "firecracker.vm_uids",
        env: "BLIXARD_VM_UIDS",
        flag: "vm-uids",
        help: "User ids that hypervisors run as, one for each VM",
        allowed: "none, or FIRST-LAST from 1000 to 2147483646 without 65534 and 65535; nobody else's",
        set: |config, value| {
            config.firecracker.vm_uids = if value == "none" { None } else { Some(UserRange::parse(value)?) };
            Some(())
        },
        get: |config| config.firecracker.vm_uids.map_or_else(|| "none".to_owned(), |range| range.to_string()),
    },
    Setting {
        key: "firecracker.vm_disk_mib_per_second",
        env: "BLIXARD_VM_DISK_MIB_PER_SECOND",
        flag: "vm-disk-mib-per-second",
        help: "How much each VM may read of the disk with vm_state_dir, and write to it, in MiB a second",
        allowed: "a whole number from 0 to 1048576; 0: no limit",
        set: |config, value| number(value, 0, 1_048_576).map(|n| config.firecracker.vm_disk_mib_per_second = n),
        get: |config| config.firecracker.vm_disk_mib_per_second.to_string(),
    },
    Setting {
        key: "firecracker.vm_disk_iops",
        env: "BLIXARD_VM_DISK_IOPS",
        flag: "vm-disk-iops",
        help: "How many reads of that disk each VM may have in a second, and as many writes",
        allowed: "a whole number from 0 to 10000000; 0: no limit",
        set: |config, value| number(value, 0, 10_000_000).map(|n| config.firecracker.vm_disk_iops = n),
        get: |config| config.firecracker.vm_disk_iops.to_string(),
    },
    Setting {
        key: "storage.data_dir",
        env: "BLIXARD_DATA_DIR",
        flag: "data-dir",
        help: "Where the registry's database and the logs of jobs are",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.storage.data_dir = path),
        get: |config| config.storage.data_dir.display().to_string(),
    },
    Setting {
        key: "storage.vm_state_dir",
        env: "VM_STATE_DIR",
        flag: "vm-state-dir",
        help: "What each VM holds, one directory a VM",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.storage.vm_state_dir = path),
        get: |config| config.storage.vm_state_dir.display().to_string(),
    },
    Setting {
        key: "storage.secret_key_file",
        env: "BLIXARD_SECRET_KEY_FILE",
        flag: "secret-key-file",
        help: "A file with the key, 32 bytes or more, that seals jobs' secrets; the same at every scheduler and vmhost",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.storage.secret_key_file = path),
        get: |config| config.storage.secret_key_file.display().to_string(),
    },
    Setting {
        key: "storage.volumes",
        env: "BLIXARD_VOLUMES",
        flag: "volumes",
        help: "What jobs on this node can have mounted read-only: disk images with an erofs or ext4 file system, and directories",
        allowed: "empty, or name=path,…: at most 32; names of 1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', paths of 1 to 255 bytes without a comma",
        set: |config, value| {
            let path = |path: &str| (!path.is_empty()).then(|| path.to_owned());
            let all = Assignments::parse(value, path).filter(|all| all.0.keys().all(|name| is_name(name)))?;
            config.storage.volumes = all;
            Some(())
        },
        get: |config| config.storage.volumes.to_string(),
    },
    Setting {
        key: "registry.replicas",
        env: "BLIXARD_REGISTRY_REPLICAS",
        flag: "replicas",
        help: "All replicas of the registry, the same list on each; empty: the registry is alone",
        allowed: REPLICAS_ALLOWED,
        set: |config, value| value.parse().ok().map(|replicas| config.registry.replicas = replicas),
        get: |config| config.registry.replicas.to_string(),
    },
    Setting {
        key: "registry.replica_id",
        env: "BLIXARD_REGISTRY_REPLICA_ID",
        flag: "replica-id",
        help: "Which of the replicas this one is; it listens where the list says",
        allowed: "a whole number from 0 to 255; 0 when it is alone",
        set: |config, value| number(value, 0, u8::MAX.into()).map(|id| config.registry.replica_id = id.into()),
        get: |config| config.registry.replica_id.to_string(),
    },
    Setting {
        key: "registry.secret_file",
        env: "BLIXARD_REGISTRY_SECRET_FILE",
        flag: "secret-file",
        help: "A file with the secret by which the replicas know each other, 16 bytes or more, the same on each",
        allowed: "a path",
        set: |config, value| path(value).map(|path| config.registry.secret_file = path),
        get: |config| config.registry.secret_file.display().to_string(),
    },
    Setting {
        key: "network.subnet",
        env: "BLIXARD_NETWORK_SUBNET",
        flag: "network-subnet",
        help: "What guests' addresses are taken from, by NAT reaching the outside; empty: guests have no network",
        allowed: "empty, or an IPv4 network of this node alone with a prefix of 16 to 29 bits, such as 10.180.0.0/20",
        set: |config, value| {
            let fits = |net: &Ipv4Net| *net == net.trunc() && (16..=29).contains(&net.prefix_len());
            config.network.subnet = if value.is_empty() { None } else { Some(value.parse().ok().filter(fits)?) };
            Some(())
        },
        get: |config| config.network.subnet.map_or_else(String::new, |net| net.to_string()),
    },
    Setting {
        key: "network.subnet6",
        env: "BLIXARD_NETWORK_SUBNET6",
        flag: "network-subnet6",
        help: "What guests' IPv6 addresses are taken from besides; empty: they have none",
        allowed: "empty, or an IPv6 network of this node alone with a prefix of 48 to 112 bits, such as fd00:180::/64",
        set: |config, value| {
            let fits = |net: &Ipv6Net| *net == net.trunc() && (48..=112).contains(&net.prefix_len());
            config.network.subnet6 = if value.is_empty() { None } else { Some(value.parse().ok().filter(fits)?) };
            Some(())
        },
        get: |config| config.network.subnet6.map_or_else(String::new, |net| net.to_string()),
    },
    Setting {
        key: "network.mtu",
        env: "BLIXARD_NETWORK_MTU",
        flag: "network-mtu",
        help: "The longest packet of guests, in bytes",
        allowed: "a whole number from 1280 to 9000",
        set: |config, value| number(value, 1280, 9000).map(|mtu| config.network.mtu = mtu),
        get: |config| config.network.mtu.to_string(),
    },
    Setting {
        key: "network.resolvers",
        env: "BLIXARD_NETWORK_RESOLVERS",
        flag: "network-resolvers",
        help: "Who resolves names for guests",
        allowed: "empty, or at most 3 addresses with commas between them; not of loopback",
        set: |config, value| {
            let address = |text: &str| text.parse().ok().filter(|address: &IpAddr| !address.is_loopback());
            List::parse(value, 3, address).map(|all| config.network.resolvers = all)
        },
        get: |config| config.network.resolvers.to_string(),
    },
    Setting {
        key: "network.denied",
        env: "BLIXARD_NETWORK_DENIED",
        flag: "network-denied",
        help: "Networks that no guest reaches, whatever its job asks for",
        allowed: "empty, or at most 64 networks with commas between them, such as 10.0.0.0/8",
        set: |config, value| {
            let net = |text: &str| text.parse().ok().filter(|net: &IpNet| *net == net.trunc());
            List::parse(value, 64, net).map(|all| config.network.denied = all)
        },
        get: |config| config.network.denied.to_string(),
    },
    Setting {
        key: "vm_manager.auto_scaling",
        env: "BLIXARD_AUTO_SCALING",
        flag: "auto-scaling",
        help: "Start service VMs for jobs that need one, and end idle ones when room is short",
        allowed: "true or false",
        set: |config, value| value.parse().ok().map(|on| config.vm_manager.auto_scaling = on),
        get: |config| config.vm_manager.auto_scaling.to_string(),
    },
    Setting {
        key: "vm_manager.pre_warm_count",
        env: "BLIXARD_PRE_WARM_COUNT",
        flag: "pre-warm-count",
        help: "How many service VMs of the default image are kept warm",
        allowed: "a whole number from 0 to 10000",
        set: |config, value| number(value, 0, 10_000).map(|n| config.vm_manager.pre_warm_count = n),
        get: |config| config.vm_manager.pre_warm_count.to_string(),
    },
    Setting {
        key: "vm_manager.pre_warm_images",
        env: "BLIXARD_PRE_WARM_IMAGES",
        flag: "pre-warm-images",
        help: "How many service VMs of other images are kept warm",
        allowed: "empty, or image=number,… with numbers from 0 to 10000",
        set: |config, value| {
            Assignments::parse(value, |n| number(n, 0, 10_000)).map(|all| config.vm_manager.pre_warm_images = all)
        },
        get: |config| config.vm_manager.pre_warm_images.to_string(),
    },
    Setting {
        key: "vm_manager.max_service_vms",
        env: "BLIXARD_MAX_SERVICE_VMS",
        flag: "max-service-vms",
        help: "How many service VMs of one image the scheduler starts at most",
        allowed: "a whole number from 0 to 10000; 0: as many as there is room for",
        set: |config, value| number(value, 0, 10_000).map(|n| config.vm_manager.max_service_vms = n),
        get: |config| config.vm_manager.max_service_vms.to_string(),
    },
    Setting {
        key: "vm_manager.scale_down_seconds",
        env: "BLIXARD_SCALE_DOWN_SECONDS",
        flag: "scale-down-seconds",
        help: "How long a service VM beyond those kept warm stays idle before it is ended",
        allowed: "a whole number from 1 to 86400",
        set: |config, value| number(value, 1, 86_400).map(|n| config.vm_manager.scale_down_seconds = n),
        get: |config| config.vm_manager.scale_down_seconds.to_string(),
    },
    Setting {
        key: "vm_manager.recycle_after_jobs",
        env: "BLIXARD_RECYCLE_AFTER_JOBS",
        flag: "recycle-after-jobs",
        help: "After how many jobs a service VM is replaced",
        allowed: "a whole number from 0 to 1000000; 0: never",
        set: |config, value| number(value, 0, 1_000_000).map(|n| config.vm_manager.recycle_after_jobs = n),
        get: |config| config.vm_manager.recycle_after_jobs.to_string(),
    },
    Setting {
        key: "vm_manager.recycle_after_minutes",
        env: "BLIXARD_RECYCLE_AFTER_MINUTES",
        flag: "recycle-after-minutes",
        help: "After how many minutes a service VM is replaced",
        allowed: "a whole number from 0 to 525600; 0: never",
        set: |config, value| number(value, 0, 525_600).map(|n| config.vm_manager.recycle_after_minutes = n),
        get: |config| config.vm_manager.recycle_after_minutes.to_string(),
    },
    Setting {
        key: "vm_manager.recycle_below_memory_percent",
        env: "BLIXARD_RECYCLE_BELOW_MEMORY_PERCENT",
        flag: "recycle-below-memory-percent",
        help: "A service VM with less of its memory available is replaced",
        allowed: "a whole number from 0 to 90; 0: never",
        set: |config, value| number(value, 0, 90).map(|n| config.vm_manager.recycle_below_memory_percent = n),
        get: |config| config.vm_manager.recycle_below_memory_percent.to_string(),
    },
    Setting {
        key: "vm_manager.health_check_seconds",
        env: "BLIXARD_HEALTH_CHECK_SECONDS",
        flag: "health-check-seconds",
        help: "How often each VM's guest agent is asked whether it is well",
        allowed: "a whole number from 0 to 3600; 0: never",
        set: |config, value| number(value, 0, 3_600).map(|n| config.vm_manager.health_check_seconds = n),
        get: |config| config.vm_manager.health_check_seconds.to_string(),
    },
    Setting {
        key: "vm_manager.placement",
        env: "BLIXARD_PLACEMENT",
        flag: "placement",
        help: "Which of the nodes that fit a VM is put on: the emptiest or the fullest",
        allowed: "spread or pack",
        set: |config, value| {
            config.vm_manager.placement = match value {
                "spread" => PlacementChoice::Spread,
                "pack" => PlacementChoice::Pack,
                _ => return None,
            };
            Some(())
        },
        get: |config| {
            match config.vm_manager.placement {
                PlacementChoice::Spread => "spread",
                PlacementChoice::Pack => "pack",
            }
            .to_owned()
        },
    },
    Setting {
        key: "scheduler.max_queued_jobs",
        env: "BLIXARD_MAX_QUEUED_JOBS",
        flag: "max-queued-jobs",
        help: "How many jobs may wait; more are refused",
        allowed: "a whole number from 1 to 10000000",
        set: |config, value| number(value, 1, 10_000_000).map(|n| config.scheduler.max_queued_jobs = n),
        get: |config| config.scheduler.max_queued_jobs.to_string(),
    },
    Setting {
        key: "scheduler.tenant_max_jobs",
        env: "BLIXARD_TENANT_MAX_JOBS",
        flag: "tenant-max-jobs",
        help: "How many jobs of one tenant may be assigned or running at once",
        allowed: "a whole number from 0 to 1000000; 0: no limit",
        set: |config, value| number(value, 0, 1_000_000).map(|n| config.scheduler.tenant_max_jobs = n),
        get: |config| config.scheduler.tenant_max_jobs.to_string(),
    },
    Setting {
        key: "scheduler.tenant_limits",
        env: "BLIXARD_TENANT_LIMITS",
        flag: "tenant-limits",
        help: "The same for some tenants",
        allowed: "empty, or tenant=number,… with numbers from 0 to 1000000",
        set: |config, value| {
            Assignments::parse(value, |n| number(n, 0, 1_000_000)).map(|all| config.scheduler.tenant_limits = all)
        },
        get: |config| config.scheduler.tenant_limits.to_string(),
    },
    Setting {
        key: "scheduler.ageing_seconds",
        env: "BLIXARD_AGEING_SECONDS",
        flag: "ageing-seconds",
        help: "How many seconds in the queue are worth one level of priority",
        allowed: "a whole number from 1 to 86400",
        set: |config, value| number(value, 1, 86_400).map(|n| config.scheduler.ageing_seconds = n),
        get: |config| config.scheduler.ageing_seconds.to_string(),
    },
    Setting {
        key: "scheduler.lost_node_grace_seconds",
        env: "BLIXARD_LOST_NODE_GRACE_SECONDS",
        flag: "lost-node-grace-seconds",
        help: "How long a Lost node may come back before its jobs are taken for lost",
        allowed: "a whole number from 20 to 86400",
        set: |config, value| number(value, 20, 86_400).map(|n| config.scheduler.lost_node_grace_seconds = n),
        get: |config| config.scheduler.lost_node_grace_seconds.to_string(),
    },
    Setting {
        key: "retention.events_days",
        env: "BLIXARD_RETENTION_EVENTS_DAYS",
        flag: "retention-events-days",
        help: "How many days the registry keeps events",
        allowed: "a whole number from 1 to 3650",
        set: |config, value| number(value, 1, 3650).map(|n| config.retention.events_days = n),
        get: |config| config.retention.events_days.to_string(),
    },
    Setting {
        key: "retention.max_events",
        env: "BLIXARD_RETENTION_MAX_EVENTS",
        flag: "retention-max-events",
        help: "How many events the registry keeps at most; the oldest go first",
        allowed: "a whole number from 10000 to 100000000",
        set: |config, value| number(value, 10_000, 100_000_000).map(|n| config.retention.max_events = n),
        get: |config| config.retention.max_events.to_string(),
    },
    Setting {
        key: "retention.ended_days",
        env: "BLIXARD_RETENTION_ENDED_DAYS",
        flag: "retention-ended-days",
        help: "How many days the registry keeps VMs and jobs that have ended",
        allowed: "a whole number from 1 to 3650",
        set: |config, value| number(value, 1, 3650).map(|n| config.retention.ended_days = n),
        get: |config| config.retention.ended_days.to_string(),
    },
    Setting {
        key: "retention.max_log_mib",
        env: "BLIXARD_RETENTION_MAX_LOG_MIB",
        flag: "retention-max-log-mib",
        help: "How much of an attempt's output its node keeps, in MiB; the oldest goes",
        allowed: "a whole number from 32 to 1048576",
        set: |config, value| number(value, 32, 1_048_576).map(|n| config.retention.max_log_mib = n),
        get: |config| config.retention.max_log_mib.to_string(),
    },
    Setting {
        key: "retention.node_log_percent",
        env: "BLIXARD_RETENTION_NODE_LOG_PERCENT",
        flag: "retention-node-log-percent",
        help: "How much of its file system a node's logs and artifacts may take; those of the oldest attempts go",
        allowed: "a whole number from 1 to 90",
        set: |config, value| number(value, 1, 90).map(|n| config.retention.node_log_percent = n),
        get: |config| config.retention.node_log_percent.to_string(),
    },
];

fn number(value: &str, min: u32, max: u32) -> Option<u32> {
    value.parse().ok().filter(|number| (min..=max).contains(number))
}

fn path(value: &str) -> Option<PathBuf> {
    (!value.is_empty()).then(|| value.into())
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigError {
    /// A value is not allowed.
    Value {
        /// The setting as its user wrote it.
        source_name: String,
        /// Its value.
        value: String,
        /// What would have been allowed.
        allowed: &'static str,
    },
    /// A file has a key that means nothing.
    Unknown {
        /// The file.
        path: String,
        /// The key.
        key: String,
    },
    /// A file is no TOML.
    Syntax {
        /// The file.
        path: String,
        /// What the parser says, with line and column.
        message: String,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { source_name, value, allowed } => {
                write!(f, "{source_name}: \"{value}\" is not allowed: {allowed}")
            }
            Self::Unknown { path, key } => {
                let known: Vec<_> = SETTINGS.iter().map(|setting| setting.key).collect();
                write!(f, "{path}: there is no setting \"{key}\"; there are: {}", known.join(", "))
            }
            Self::Syntax { path, message } => write!(f, "{path} is not valid TOML: {message}"),
        }
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: Option<&str>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
        let find = |list: &[(&str, &str)], name: &str| {
            list.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        Config::load(file.map(|text| ("c.toml", text)), |name| find(env, name), |name| find(flags, name))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn flags_beat_environment_beats_file_beats_defaults() {
        let file = "[firecracker]\nmax_concurrent_vms = 1\ndefault_vcpus = 1\ndefault_memory_mb = 100\n";
        let env = [("FIRECRACKER_MAX_CONCURRENT_VMS", "2"), ("FIRECRACKER_DEFAULT_VCPUS", "2")];
        let config = load(Some(file), &env, &[("max-vms", "3")]).expect("valid").firecracker;
        assert_eq!((config.max_concurrent_vms, config.default_vcpus, config.default_memory_mb), (3, 2, 100));
    }

    #[test]
    fn errors_name_the_setting_as_written_the_value_and_what_is_allowed() {
        let refused = [
            load(None, &[("FIRECRACKER_MAX_CONCURRENT_VMS", "0")], &[]),
            load(None, &[("FIRECRACKER_DEFAULT_MEMORY_MB", "lots")], &[]),
            load(None, &[("FIRECRACKER_DEFAULT_VCPUS", "65")], &[]),
            load(None, &[("FIRECRACKER_FLAKE_DIR", "")], &[]),
            load(None, &[("VM_STATE_DIR", "")], &[]),
            load(None, &[], &[("driver", "firecracker")]),
            load(Some("[vm_manager]\npre_warm_count = -1\n"), &[], &[]),
            load(Some("[vm_manager]\npre_warm = 1\n"), &[], &[]),
            load(None, &[], &[("tenant-limits", "a=1,a=2")]),
            load(None, &[], &[("placement", "random")]),
            load(None, &[("BLIXARD_NETWORK_SUBNET", "10.0.0.1/24")], &[]),
            load(None, &[], &[("network-resolvers", "127.0.0.53")]),
            load(None, &[], &[("vm-uids", "60000-70000")]),
            load(None, &[("BLIXARD_VM_UIDS", "200000-100000")], &[]),
            load(None, &[], &[("volumes", "../x=/srv")]),
            load(None, &[("BLIXARD_VOLUMES", "tools=")], &[]),
            load(None, &[], &[("vm-disk-mib-per-second", "none")]),
        ];
        let messages: Vec<_> = refused.into_iter().map(|result| result.expect_err("refused")).collect();
        insta::assert_snapshot!(messages.join("\n"), @r#"
        environment variable FIRECRACKER_MAX_CONCURRENT_VMS: "0" is not allowed: a whole number from 1 to 10000
        environment variable FIRECRACKER_DEFAULT_MEMORY_MB: "lots" is not allowed: a whole number from 96 to 1048576
        environment variable FIRECRACKER_DEFAULT_VCPUS: "65" is not allowed: a whole number from 1 to 64
        environment variable FIRECRACKER_FLAKE_DIR: "" is not allowed: a path
        environment variable VM_STATE_DIR: "" is not allowed: a path
        flag --driver: "firecracker" is not allowed: auto, cloud-hypervisor, qemu or process
        c.toml: vm_manager.pre_warm_count: "-1" is not allowed: a whole number from 0 to 10000
        c.toml: there is no setting "vm_manager.pre_warm"; there are: server.listen, server.node_id, server.metrics_listen, server.node_labels, firecracker.driver, firecracker.max_concurrent_vms, firecracker.templates, firecracker.default_memory_mb, firecracker.default_vcpus, firecracker.flake_dir, firecracker.image_dir, firecracker.vm_uids, firecracker.vm_disk_mib_per_second, firecracker.vm_disk_iops, storage.data_dir, storage.vm_state_dir, storage.secret_key_file, storage.volumes, registry.replicas, registry.replica_id, registry.secret_file, network.subnet, network.subnet6, network.mtu, network.resolvers, network.denied, vm_manager.auto_scaling, vm_manager.pre_warm_count, vm_manager.pre_warm_images, vm_manager.max_service_vms, vm_manager.scale_down_seconds, vm_manager.recycle_after_jobs, vm_manager.recycle_after_minutes, vm_manager.recycle_below_memory_percent, vm_manager.health_check_seconds, vm_manager.placement, scheduler.max_queued_jobs, scheduler.tenant_max_jobs, scheduler.tenant_limits, scheduler.ageing_seconds, scheduler.lost_node_grace_seconds, retention.events_days, retention.max_events, retention.ended_days, retention.max_log_mib, retention.node_log_percent
        flag --tenant-limits: "a=1,a=2" is not allowed: empty, or tenant=number,… with numbers from 0 to 1000000
        flag --placement: "random" is not allowed: spread or pack
        environment variable BLIXARD_NETWORK_SUBNET: "10.0.0.1/24" is not allowed: empty, or an IPv4 network of this node alone with a prefix of 16 to 29 bits, such as 10.180.0.0/20
        flag --network-resolvers: "127.0.0.53" is not allowed: empty, or at most 3 addresses with commas between them; not of loopback
        flag --vm-uids: "60000-70000" is not allowed: none, or FIRST-LAST from 1000 to 2147483646 without 65534 and 65535; nobody else's
        environment variable BLIXARD_VM_UIDS: "200000-100000" is not allowed: none, or FIRST-LAST from 1000 to 2147483646 without 65534 and 65535; nobody else's
        flag --volumes: "../x=/srv" is not allowed: empty, or name=path,…: at most 32; names of 1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', paths of 1 to 255 bytes without a comma
        environment variable BLIXARD_VOLUMES: "tools=" is not allowed: empty, or name=path,…: at most 32; names of 1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', paths of 1 to 255 bytes without a comma
        flag --vm-disk-mib-per-second: "none" is not allowed: a whole number from 0 to 1048576; 0: no limit
        "#);
        let syntax = load(Some("[server\n"), &[], &[]).expect_err("refused");
        assert!(syntax.starts_with("c.toml is not valid TOML: line 1, column 8: "), "{syntax}");
    }

    #[test]
    fn the_printed_configuration_loads_back_as_itself() {
        let config = load(None, &[("FIRECRACKER_MAX_CONCURRENT_VMS", "77")], &[("driver", "process")]).expect("valid");
        assert_eq!(load(Some(&config.to_toml()), &[], &[]), Ok(config));
    }
}
