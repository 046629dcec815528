//! What can be written on the command line.
//!
//! The flags of the control plane are the chassis's, which every binary has.

use std::{ffi::OsString, ops::RangeInclusive, path::PathBuf, time::Duration};

use blixard::{
    egress::Egress,
    job::{JobState, RetryOn},
    limits,
    pb::common::v1 as common,
    vm::{VmKind, VmState},
    volume::DEFAULT_SCRATCH_PATH,
};
use blixard_chassis::settings::{Flags, add_flags};
use clap::{ArgAction, ArgMatches, CommandFactory as _, FromArgMatches as _, error::ErrorKind};

/// Where the control plane listens unless it is told otherwise.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:50051";

/// The parsed command line.
pub(crate) struct Arguments {
    pub(crate) endpoint: String,
    pub(crate) output: Format,
    pub(crate) command: Option<Command>,
    pub(crate) settings: Settings,
}

/// What was said about the control plane's configuration.
#[derive(Default)]
pub(crate) struct Settings {
    /// `--check-config`: print and exit.
    pub(crate) check: bool,
    /// The rest.
    pub(crate) flags: Flags,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs: stable field names.
    Json,
}

/// Runs jobs in microVMs. Without a command: the control plane, all of it in one process.
#[derive(clap::Parser)]
#[command(name = "mvm-ci", version, max_term_width = 120)]
struct Cli {
    /// Where the control plane answers.
    #[arg(long, global = true, env = "BLIXARD_ENDPOINT", default_value = DEFAULT_ENDPOINT, value_name = "URL")]
    endpoint: String,
    /// How to print results.
    #[arg(long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    output: Format,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Run a command in a VM and follow its output; the exit code is the command's.
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Jobs: list, look at, explain, read the output of, fetch the files of, cancel, submit as a group.
    Job(JobArgs),
    /// Nodes: list, look at, take out of service, empty, put back.
    Node(NodeArgs),
    /// VMs: create, list, look at, stop, purge.
    Vm(VmArgs),
    /// Ask the registry in SQL: one read-only statement on the tables of docs/SCHEMA.md.
    Sql(SqlArgs),
    /// The registry's data: back it up, restore it.
    Registry(RegistryArgs),
    /// Images of this machine: make, import, list, remove. Needs no control plane.
    Image(ImageArgs),
    /// Count VMs, jobs and nodes.
    Stats,
    /// Say what this machine can run and how to mend what it cannot.
    Doctor,
    /// Print the control plane's effective configuration as TOML.
    Config,
}

const RUN_HELP: &str = "\
Exit code: the command's own; 128 + N when signal N ended it; 124 when it ran out of time; 130 when it was cancelled;
125 when it could not be run or was lost, or its files could not be fetched. With --array: 0 when every job succeeded, else 1.
Ctrl-C cancels the job; a second Ctrl-C leaves without waiting for its end.";

/// Disks beside the root.
#[derive(Clone, clap::Args)]
pub(crate) struct VolumeArgs {
    /// A volume of its node's by name, mounted read-only; may be repeated.
    #[arg(long, value_parser = volume, value_name = "NAME:/PATH")]
    pub(crate) volume: Vec<common::Volume>,
    /// An empty disk that goes with the VM, such as 10G, mounted at /scratch or where it says; may be repeated.
    #[arg(long, value_parser = scratch, value_name = "SIZE[:/PATH]")]
    pub(crate) scratch: Vec<common::Volume>,
}

impl VolumeArgs {
    /// As the contract has them.
    pub(crate) fn into_pb(self) -> Vec<common::Volume> {
        self.volume.into_iter().chain(self.scratch).collect()
    }
}

/// `NAME:/PATH`; what may stand there is for the server to say.
pub(crate) fn volume(text: &str) -> Result<common::Volume, String> {
    let (name, path) = text.split_once(':').ok_or("expected NAME:/PATH, such as tools:/opt/tools")?;
    let source = Some(common::volume::Source::Name(name.to_owned()));
    Ok(common::Volume { mount_path: path.to_owned(), source })
}

/// `SIZE[:/PATH]`.
pub(crate) fn scratch(text: &str) -> Result<common::Volume, String> {
    const EXPECTED: &str = "expected a size in MiB, GiB or TiB and perhaps a path, such as 512M, 10G:/work or 1T";
    let (size, path) = text.split_once(':').unwrap_or((text, DEFAULT_SCRATCH_PATH));
    let mib_per_unit = [('M', 1), ('G', 1024), ('T', 1024 * 1024)];
    let (number, factor) =
        mib_per_unit.iter().find_map(|(unit, mib)| Some((size.strip_suffix(*unit)?, *mib))).ok_or(EXPECTED)?;
    let mib = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or(EXPECTED)?;
    Ok(common::Volume { mount_path: path.to_owned(), source: Some(common::volume::Source::ScratchMib(mib)) })
}

#[derive(clap::Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) place: Place,
    /// Image it needs.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    pub(crate) image: String,
    /// Virtual CPUs.
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Whom it may talk to over the network: none (the default), internet (public addresses), or what is listed.
    #[arg(long, value_name = "none|internet|allow=CIDR[:PORT],...")]
    pub(crate) egress: Option<Egress>,
    #[command(flatten)]
    pub(crate) volumes: VolumeArgs,
    /// Environment variable; may be repeated.
    #[arg(long, value_parser = key_value, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<(String, String)>,
    /// End it when it has run this long: 500ms, 2s, 5m, 1h30m.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) timeout: Option<Duration>,
    /// Directory to run in.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "PATH")]
    pub(crate) workdir: String,
    /// Higher runs first, -1000 to 1000.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "N")]
    pub(crate) priority: i32,
    /// How many attempts may start, as --retry-on says: one more than --retries.
    #[arg(long, value_name = "N", conflicts_with = "retries")]
    pub(crate) max_attempts: Option<u32>,
    /// How many attempts may follow the first one.
    #[arg(long, value_name = "N")]
    pub(crate) retries: Option<u32>,
    /// What an attempt may come to for another one to follow, of lost, failed and timed-out; lost when left out.
    #[arg(long, value_parser = retry_on, value_delimiter = ',', value_name = "LIST")]
    pub(crate) retry_on: Vec<RetryOn>,
    /// Pause before the second attempt, doubled for each later one.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) backoff: Option<Duration>,
    /// End it when it has waited this long for a VM.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) queue_timeout: Option<Duration>,
    /// End an attempt whose command has not started this long after it came to its node.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) start_timeout: Option<Duration>,
    /// Label; may be repeated.
    #[arg(long, value_parser = key_value, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<(String, String)>,
    /// Whose it is, where shares and limits are concerned: the label "tenant".
    #[arg(long, value_name = "NAME")]
    pub(crate) tenant: Option<String>,
    /// Node that must run it.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NODE")]
    pub(crate) node: String,
    /// Label that its node must have; may be repeated.
    #[arg(long, value_parser = key_value, value_name = "KEY=VALUE")]
    pub(crate) node_label: Vec<(String, String)>,
    /// Label that its node should have; may be repeated.
    #[arg(long, value_parser = key_value, value_name = "KEY=VALUE")]
    pub(crate) prefer_node_label: Vec<(String, String)>,
    /// Job that must have succeeded before; may be repeated.
    #[arg(long, value_name = "ID", conflicts_with = "array")]
    pub(crate) after: Vec<String>,
    /// Give it our standard input, at most 512 KiB.
    #[arg(long)]
    pub(crate) stdin: bool,
    /// Put a file into the guest; may be repeated.
    #[arg(long, value_parser = local_and_guest, value_name = "LOCAL:GUEST")]
    pub(crate) file: Vec<(PathBuf, String)>,
    /// Environment variable that is not to be seen, from our environment or from a file (without the newline at its end); may be
    /// repeated.
    #[arg(long, value_parser = secret, value_name = "NAME[=@FILE]")]
    pub(crate) secret: Vec<(String, Option<PathBuf>)>,
    /// File in the guest that is kept when the command has ended; may be repeated.
    #[arg(long, value_name = "PATH")]
    pub(crate) artifact: Vec<String>,
    /// Fetch these files when the job has ended, into this directory.
    #[arg(long, value_name = "DIR", requires = "artifact", conflicts_with = "detach")]
    pub(crate) artifacts_dir: Option<PathBuf>,
    /// Keep it, its output and its files this long after its end.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub(crate) ttl: Option<Duration>,
    /// Run it once for each number, which is in BLIXARD_ARRAY_INDEX; each line of output begins with its number.
    #[arg(long, value_parser = array, value_name = "FIRST-LAST")]
    pub(crate) array: Option<RangeInclusive<u32>>,
    /// Print the job's id and leave once it is queued.
    #[arg(long)]
    pub(crate) detach: bool,
    /// The program and its arguments; not passed through a shell.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Where a job is to run.
#[derive(clap::Args)]
#[group(multiple = false)]
pub(crate) struct Place {
    /// In a fresh VM that ends after the job.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// In a service VM only.
    #[arg(long)]
    pub(crate) service: bool,
    /// In this VM.
    #[arg(long, value_name = "ID")]
    pub(crate) vm: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct JobArgs {
    #[command(subcommand)]
    pub(crate) command: JobCommand,
}

#[derive(clap::Subcommand)]
pub(crate) enum JobCommand {
    /// List jobs, newest first.
    List {
        /// Only jobs in this state; may be repeated.
        #[arg(long, value_parser = job_state, value_name = "STATE")]
        state: Vec<JobState>,
        /// Only jobs with this label; may be repeated.
        #[arg(long, value_parser = key_value, value_name = "KEY=VALUE")]
        label: Vec<(String, String)>,
        /// Only jobs of this group.
        #[arg(long, value_name = "ID")]
        group: Option<String>,
        /// How many at most.
        #[arg(long, default_value_t = 100, value_name = "N")]
        limit: usize,
    },
    /// Show a job.
    Get {
        /// The job.
        id: String,
    },
    /// Say why a job waits, or was given its VM: as it was decided at the time.
    Explain {
        /// The job.
        id: String,
    },
    /// List the files that a job left, or print one of them.
    Artifacts(ArtifactArgs),
    /// Submit the jobs of a TOML file (docs/USAGE.md), which may depend on each other: all or none.
    Group {
        /// The file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print a job's output: its stdout to stdout, its stderr to stderr, byte for byte.
    Logs {
        /// The job.
        id: String,
        /// Wait for more until the job ends.
        #[arg(short, long)]
        follow: bool,
        /// Begin at this byte (stdout and stderr counted together).
        #[arg(long, default_value_t = 0, value_name = "N")]
        offset: u64,
        /// This attempt instead of the latest.
        #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
        attempt: u32,
    },
    /// Ask for a job's end: SIGTERM, and SIGKILL ten seconds later.
    Cancel {
        /// The job.
        #[arg(required_unless_present = "group", conflicts_with = "group")]
        id: Option<String>,
        /// Every job of this group that has not ended.
        #[arg(long, value_name = "ID")]
        group: Option<String>,
        /// Why; recorded with the job.
        #[arg(long, default_value = "cancelled by mvm-ci job cancel", value_name = "TEXT")]
        reason: String,
    },
}

#[derive(clap::Args)]
pub(crate) struct ArtifactArgs {
    /// The job.
    pub(crate) id: String,
    /// The file to print, as it is listed.
    #[arg(value_name = "PATH", conflicts_with = "dir")]
    pub(crate) path: Option<String>,
    /// This attempt instead of the latest.
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub(crate) attempt: u32,
    /// Fetch all of them into this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) command: NodeCommand,
}

#[derive(clap::Subcommand)]
pub(crate) enum NodeCommand {
    /// List nodes and what of them is taken.
    List,
    /// Show a node.
    Get {
        /// The node.
        id: String,
    },
    /// Take a node out of service: what runs there goes on, nothing new comes.
    Cordon {
        /// The node.
        id: String,
        /// Why; recorded with the node.
        #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
        reason: String,
    },
    /// Put a node back into service.
    #[command(alias = "undrain")]
    Uncordon {
        /// The node.
        id: String,
    },
    /// Empty a node: nothing new comes, jobs finish, VMs end.
    Drain {
        /// The node.
        id: String,
        /// Stop what is left then.
        #[arg(long, value_parser = duration, value_name = "DURATION")]
        deadline: Option<Duration>,
        /// Why; recorded with the node.
        #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
        reason: String,
        /// Wait until it is empty.
        #[arg(long)]
        wait: bool,
    },
    /// Compare what nodes have on record with their processes, directories and network interfaces; status 1 when something is
    /// left that differs.
    Check {
        /// The nodes; none: every node that is not Lost.
        ids: Vec<String>,
        /// End and delete what belongs to no VM.
        #[arg(long)]
        repair: bool,
    },
}

#[derive(clap::Args)]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

#[derive(clap::Subcommand)]
pub(crate) enum VmCommand {
    /// Start a VM; a service VM unless told otherwise.
    Create(VmCreateArgs),
    /// List VMs that have not ended, newest first.
    List {
        /// Only VMs in this state; may be repeated.
        #[arg(long, value_parser = vm_state, value_name = "STATE")]
        state: Vec<VmState>,
        /// Only VMs of this kind: ephemeral or service.
        #[arg(long, value_parser = vm_kind, value_name = "KIND")]
        kind: Option<VmKind>,
        /// Only VMs on this node.
        #[arg(long, default_value = "", hide_default_value = true, value_name = "NODE")]
        node: String,
        /// Also VMs that have ended.
        #[arg(long)]
        all: bool,
    },
    /// Show a VM.
    Get {
        /// The VM.
        id: String,
    },
    /// Show the history of a VM, or of all, newest first.
    Events {
        /// The VM; all when left out.
        id: Option<String>,
        /// How many at most.
        #[arg(long, default_value_t = 100, value_name = "N")]
        limit: usize,
    },
    /// Print the last bytes a VM wrote to its console.
    Console {
        /// The VM.
        id: String,
    },
    /// Show what a VM has used: CPU time, memory, disk and network.
    Usage {
        /// The VM.
        id: String,
    },
    /// End VMs gracefully, and with force after the grace.
    Stop(VmStopArgs),
    /// Give a VM that runs more or fewer vCPUs, or more memory (Cloud Hypervisor).
    Resize {
        /// The VM.
        id: String,
        /// Virtual CPUs: at most four times as many as it was started with, and its node's.
        #[arg(long, value_name = "N", required_unless_present = "memory")]
        vcpus: Option<u32>,
        /// Memory in MiB: more by whole 128, up to four times what it was started with.
        #[arg(long, value_name = "MIB")]
        memory: Option<u32>,
    },
    /// Forget VMs that have ended; their history stays.
    Purge {
        /// Only VMs in this state, Terminated or Failed; may be repeated.
        #[arg(long, value_parser = vm_state, value_name = "STATE")]
        state: Vec<VmState>,
        /// Only these VMs.
        #[arg(value_name = "ID")]
        ids: Vec<String>,
    },
}

#[derive(clap::Args)]
pub(crate) struct VmCreateArgs {
    /// A VM that goes on to other jobs (the default).
    #[arg(long, conflicts_with = "ephemeral")]
    pub(crate) service: bool,
    /// A VM that ends after one job.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    /// Image it boots.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    pub(crate) image: String,
    /// Virtual CPUs.
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Whom it may talk to over the network: none, internet (public addresses), or what is listed.
    #[arg(long, default_value = "none", value_name = "none|internet|allow=CIDR[:PORT],...")]
    pub(crate) egress: Egress,
    #[command(flatten)]
    pub(crate) volumes: VolumeArgs,
    /// Label; may be repeated.
    #[arg(long, value_parser = key_value, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<(String, String)>,
    /// Node that must run it.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NODE")]
    pub(crate) node: String,
    /// Wait until it is Ready, or fail when it failed.
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(clap::Args)]
pub(crate) struct VmStopArgs {
    /// The VMs.
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    pub(crate) ids: Vec<String>,
    /// Every VM that has not ended.
    #[arg(long)]
    pub(crate) all: bool,
    /// How long they have to end by themselves.
    #[arg(long, value_parser = duration, default_value = "10s", value_name = "DURATION")]
    pub(crate) grace: Duration,
    /// No grace: kill at once.
    #[arg(long, conflicts_with = "grace")]
    pub(crate) force: bool,
    /// Wait until they have ended.
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(clap::Args)]
pub(crate) struct SqlArgs {
    /// The statement.
    #[arg(value_name = "STATEMENT")]
    pub(crate) statement: String,
    /// Value of the next ? in it: NULL, a number, or text ('7' is text); may be repeated.
    #[arg(long, allow_hyphen_values = true, value_name = "V")]
    pub(crate) param: Vec<String>,
    /// Cut the answer after this many rows, at most 100000.
    #[arg(long, value_name = "N")]
    pub(crate) max_rows: Option<u32>,
}

#[derive(clap::Args)]
pub(crate) struct RegistryArgs {
    #[command(subcommand)]
    pub(crate) command: RegistryCommand,
}

#[derive(clap::Subcommand)]
pub(crate) enum RegistryCommand {
    /// Ask every replica how it is. Exit code 1: no leader has a majority.
    Status,
    /// Copy a running registry's database into a new directory; nothing waits for it.
    Backup {
        /// The directory; it must not exist.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Make the data directory of a registry that does not run from a backup.
    Restore {
        /// The directory of the backup.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(clap::Subcommand)]
pub(crate) enum ImageCommand {
    /// List the images.
    List,
    /// Make an image from an OCI image: its files become a read-only root disk, over which each VM writes in memory.
    #[command(after_help = IMPORT_HELP)]
    Import {
        /// What to call it.
        #[arg(value_name = "NAME")]
        name: String,
        /// Directory, archive or reference.
        #[arg(value_name = "SOURCE")]
        source: String,
        /// Which image of a layout or archive that has several.
        #[arg(long = "ref", value_name = "REF")]
        reference: Option<String>,
        #[command(flatten)]
        making: ImageMaking,
    },
    /// Make the default image (as make guest-image does), or one from the files of a directory.
    Build {
        /// What to call it; without it, the default image is made.
        #[arg(value_name = "NAME", requires = "dir")]
        name: Option<String>,
        /// The directory with the root's files.
        #[arg(value_name = "DIR")]
        dir: Option<PathBuf>,
        #[command(flatten)]
        making: ImageMaking,
    },
    /// Remove images. VMs that run keep their files.
    Rm {
        /// The images.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Remove what imports left that did not come to their end.
    Gc,
}

const IMPORT_HELP: &str = "\
SOURCE is a directory in the OCI layout; an archive of one, or of docker save, packed or not; a directory with an image of
ours (nix build); or a reference to an image in a registry, [docker://][HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST].";

/// How an image is made.
#[derive(clap::Args)]
pub(crate) struct ImageMaking {
    /// Image that gives kernel and initramfs.
    #[arg(long, default_value = limits::DEFAULT_IMAGE, value_name = "NAME")]
    pub(crate) base: String,
    /// Replace an image of that name.
    #[arg(long)]
    pub(crate) replace: bool,
}

/// Parses the command line.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Arguments, clap::Error> {
    let mut definition = definition();
    let matches = definition.try_get_matches_from_mut(args)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut definition))?;
    let mut settings = Settings::default();
    settings.add(&matches);
    match (&cli.command, matches.subcommand()) {
        (Some(Command::Doctor | Command::Config), Some((_, matches))) => settings.add(matches),
        (
            Some(Command::Registry(RegistryArgs { command: RegistryCommand::Restore { .. } }) | Command::Image(_)),
            Some((_, matches)),
        ) => {
            if let Some((_, matches)) = matches.subcommand() {
                settings.add(matches);
            }
        }
        (Some(_), Some((name, _))) => {
            if let Some(flag) = settings.flags.values.keys().next() {
                let message = format!("--{flag} configures the control plane and means nothing to `mvm-ci {name}`\n");
                return Err(definition.error(ErrorKind::ArgumentConflict, message));
            }
        }
        (_, None) | (None, Some(_)) => {}
    }
    Ok(Arguments { endpoint: cli.endpoint, output: cli.output, command: cli.command, settings })
}

fn definition() -> clap::Command {
    let check = clap::Arg::new("check-config")
        .long("check-config")
        .action(ArgAction::SetTrue)
        .help("Print the effective configuration as TOML and exit")
        .help_heading(CONTROL_PLANE);
    add_flags(Cli::command().arg(check))
        .mut_subcommand("doctor", add_flags)
        .mut_subcommand("config", add_flags)
        .mut_subcommand("image", |image| {
            ["list", "import", "build", "rm", "gc"]
                .iter()
                .fold(image, |image, name| image.mut_subcommand(name, add_flags))
        })
        .mut_subcommand("registry", |registry| registry.mut_subcommand("restore", add_flags))
}

const CONTROL_PLANE: &str = "Control plane";

impl Settings {
    fn add(&mut self, matches: &ArgMatches) {
        if let Ok(Some(true)) = matches.try_get_one::<bool>("check-config") {
            self.check = true;
        }
        self.flags.add(matches);
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

pub(crate) fn retry_on(text: &str) -> Result<RetryOn, String> {
    match text {
        "lost" => Ok(RetryOn::Lost),
        "failed" => Ok(RetryOn::Failed),
        "timed-out" => Ok(RetryOn::TimedOut),
        _ => Err("expected lost, failed or timed-out".to_owned()),
    }
}

/// The guest's path has no colon; ours may have.
fn local_and_guest(text: &str) -> Result<(PathBuf, String), String> {
    match text.rsplit_once(':') {
        Some((local, guest)) if !local.is_empty() && guest.starts_with('/') => Ok((local.into(), guest.to_owned())),
        _ => Err("expected LOCAL:GUEST, the latter an absolute path".to_owned()),
    }
}

fn secret(text: &str) -> Result<(String, Option<PathBuf>), String> {
    match text.split_once('=') {
        None if !text.is_empty() => Ok((text.to_owned(), None)),
        Some((name, file)) if !name.is_empty() && file.len() > 1 && file.starts_with('@') => {
            Ok((name.to_owned(), Some(file[1..].into())))
        }
        // A value here would be seen in the list of processes.
        _ => Err("expected NAME, the name of a variable of our environment, or NAME=@FILE".to_owned()),
    }
}

pub(crate) fn array(text: &str) -> Result<RangeInclusive<u32>, String> {
    let parsed = text.split_once('-').and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    match parsed {
        Some((first, last)) if (1..=last).contains(&first) && ((last - first) as usize) < limits::MAX_GROUP_JOBS => {
            Ok(first..=last)
        }
        _ => Err(format!("expected FIRST-LAST such as 1-100: from 1 on, at most {} of them", limits::MAX_GROUP_JOBS)),
    }
}

fn job_state(text: &str) -> Result<JobState, String> {
    JobState::from_name(text).ok_or_else(|| one_of(&JobState::ALL))
}

fn vm_state(text: &str) -> Result<VmState, String> {
    VmState::from_name(text).ok_or_else(|| one_of(&VmState::ALL))
}

fn vm_kind(text: &str) -> Result<VmKind, String> {
    VmKind::from_name(text).ok_or_else(|| one_of(&[VmKind::Ephemeral, VmKind::Service]))
}

fn one_of(names: &[impl ToString]) -> String {
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    format!("expected one of {}", names.join(", "))
}

/// Parses `2s`, `500ms`, `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 500ms, 2s, 5m or 1h30m".to_owned())
}

fn parse_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let (number, tail) = rest.split_at(digits);
        let unit_length = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_length);
        let unit_ms: u64 = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        let ms = number.parse::<u64>().ok()?.checked_mul(unit_ms)?;
        total = total.checked_add(Duration::from_millis(ms))?;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn parse_line(line: &str) -> Result<Arguments, String> {
        parse(line.split_whitespace().map(Into::into).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_is_sound() {
        definition().debug_assert();
    }

    #[test]
    fn durations_have_a_number_and_a_unit() {
        assert_eq!(parse_duration("2s"), Some(Duration::from_secs(2)));
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "2", "s", "2x", "-2s", "2.5s", "2 s", "99999999999999999999s", "18446744073709551615d"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn everything_after_the_program_belongs_to_the_job() {
        for line in ["mvm-ci run --env A=b=c -- sh -c --output x", "mvm-ci run --env A=b=c sh -c --output x"] {
            let Some(Command::Run(run)) = parse_line(line).expect(line).command else { panic!("{line}") };
            assert_eq!(run.command, ["sh", "-c", "--output", "x"]);
            assert_eq!(run.env, [("A".to_owned(), "b=c".to_owned())]);
        }
    }

    #[test]
    fn settings_are_flags_of_the_control_plane_and_not_of_clients() {
        let settings = parse_line("mvm-ci --driver process --max-vms 3").expect("valid").settings;
        assert_eq!(
            settings.flags.values,
            BTreeMap::from([("driver", "process".to_owned()), ("max-vms", "3".to_owned())])
        );
        let settings = parse_line("mvm-ci --max-vms 3 doctor --driver qemu").expect("valid").settings;
        assert_eq!(settings.flags.values.len(), 2);
        let settings = parse_line("mvm-ci registry restore b --data-dir d").expect("valid").settings;
        assert_eq!(settings.flags.values, BTreeMap::from([("data-dir", "d".to_owned())]));
        let refused = parse_line("mvm-ci --driver qemu stats").err().expect("refused");
        assert!(refused.contains("--driver configures the control plane and means nothing to `mvm-ci stats`"));
    }

    #[test]
    fn places_exclude_each_other_and_bad_values_say_what_is_allowed() {
        for (line, says) in [
            ("mvm-ci run --ephemeral --service -- true", "cannot be used with"),
            ("mvm-ci run", "<CMD>"),
            ("mvm-ci run --timeout 5 -- true", "such as 500ms, 2s, 5m or 1h30m"),
            ("mvm-ci run --env A -- true", "expected NAME=VALUE"),
            ("mvm-ci job list --state Nope", "expected one of Queued, Assigned, Running"),
            ("mvm-ci vm list --kind big", "expected one of ephemeral, service"),
            ("mvm-ci vm stop", "ID"),
            ("mvm-ci vm resize 1", "--vcpus"),
            ("mvm-ci vm stop --all 1", "cannot be used with"),
            ("mvm-ci run --retries 2 --retry-on crashed -- true", "expected lost, failed or timed-out"),
            ("mvm-ci run --retries 2 --max-attempts 3 -- true", "cannot be used with"),
            ("mvm-ci run --file here -- true", "expected LOCAL:GUEST"),
            ("mvm-ci run --file a:b -- true", "the latter an absolute path"),
            ("mvm-ci run --secret TOKEN=abc -- true", "NAME=@FILE"),
            ("mvm-ci run --artifacts-dir d -- true", "--artifact"),
            ("mvm-ci run --volume tools -- true", "expected NAME:/PATH"),
            ("mvm-ci run --scratch 10 -- true", "such as 512M, 10G:/work or 1T"),
            ("mvm-ci run --scratch 99999999999999999T -- true", "such as 512M"),
            ("mvm-ci run --array 0-3 -- true", "such as 1-100"),
            ("mvm-ci run --array 1-1001 -- true", "at most 1000"),
            ("mvm-ci run --array 1-2 --after 7 -- true", "cannot be used with"),
            ("mvm-ci job cancel", "ID"),
            ("mvm-ci node drain", "<ID>"),
            ("mvm-ci registry backup", "<DIR>"),
            ("mvm-ci registry backup b --data-dir d", "unexpected argument '--data-dir'"),
        ] {
            let refused = parse_line(line).err().expect(line);
            assert!(refused.contains(says), "{line}: {refused}");
        }
    }
}
