//! The limits that every service keeps. They are part of the contract: `docs/ARCHITECTURE.md` lists them for users.

use std::time::Duration;

/// Largest message a server accepts and a client reads. A job's command and environment are at most 256 KiB each, a
/// page holds at most [`MAX_PAGE_SIZE`] rows and is cut by bytes before that ([`MAX_PAGE_BYTES`]), so 4 MiB (gRPC's own default) is enough.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// Requests a server works on at once; more are refused as OVERLOADED.
pub const MAX_CONCURRENT_REQUESTS: usize = 4096;
/// HTTP/2 streams of one connection.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
/// Deadline of a unary call whose caller sets none.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// Rows in a page when the caller names no number.
pub const DEFAULT_PAGE_SIZE: u32 = 100;
/// Most rows in a page.
pub const MAX_PAGE_SIZE: u32 = 1000;
/// A page ends early rather than grow beyond this many encoded bytes.
pub const MAX_PAGE_BYTES: usize = 3 * 1024 * 1024;
/// How long a stream may be silent before it sends a heartbeat.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(10);

/// Longest `reason` text a caller may give.
pub const MAX_REASON_BYTES: usize = 1024;
/// Most strings in a command.
pub const MAX_COMMAND_ARGS: usize = 4096;
/// Most bytes in a command, and in an environment.
pub const MAX_COMMAND_BYTES: usize = 256 * 1024;
/// Most environment variables.
pub const MAX_ENV_VARS: usize = 1024;
/// Most labels.
pub const MAX_LABELS: usize = 32;
/// Largest number of virtual CPUs of a VM.
pub const MAX_VCPUS: u32 = 64;
/// Smallest memory of a VM: Debian's cloud kernel panics for want of memory at 72 MiB and boots our image at 80.
pub const MIN_MEMORY_MIB: u32 = 96;
/// Largest memory of a VM: 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// Longest timeout of a job: 30 days.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most attempts of a job.
pub const MAX_ATTEMPTS: u32 = 100;
/// Longest time that a job asks to be kept after its end: 3,650 days.
pub const MAX_RESULT_TTL: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Longest pause between two attempts.
pub const MAX_BACKOFF: Duration = Duration::from_secs(3600);
/// The longest pause when the job names none.
pub const DEFAULT_MAX_BACKOFF: Duration = Duration::from_secs(300);
/// Most jobs that a job depends on.
pub const MAX_DEPENDENCIES: usize = 100;
/// Most files in, and most artifacts out.
pub const MAX_FILES: usize = 100;
/// Longest path of one.
pub const MAX_PATH_BYTES: usize = 4096;
/// Most bytes of a job's input in all: like a command and its environment it goes through the Raft log.
pub const MAX_INPUT_BYTES: usize = 512 * 1024;
/// Most secrets of a job.
pub const MAX_SECRETS: usize = 100;
/// Shortest secret: anything shorter would be found everywhere in the output.
pub const MIN_SECRET_BYTES: usize = 4;
/// Longest secret.
pub const MAX_SECRET_BYTES: usize = 65_536;
/// Most bytes of artifacts that are kept of an attempt; a file beyond it is not.
pub const MAX_ARTIFACT_BYTES: u64 = 256 * 1024 * 1024;
/// Most jobs of a group, and most elements of an array.
pub const MAX_GROUP_JOBS: usize = 1000;
/// Most bytes of a group in all: it is one entry of the Raft log.
pub const MAX_GROUP_BYTES: usize = 1024 * 1024;
/// Longest deadline of a drain.
pub const MAX_DRAIN_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a VM has to end by itself when the caller names no grace.
pub const DEFAULT_STOP_GRACE: Duration = Duration::from_secs(10);
/// The longest such grace.
pub const MAX_STOP_GRACE: Duration = Duration::from_secs(600);
/// Between SIGTERM and SIGKILL of a job that is cancelled or out of time (Kubernetes gives 30 s, Docker 10 s).
pub const KILL_GRACE: Duration = Duration::from_secs(10);
/// Most bytes in one log chunk.
pub const MAX_LOG_CHUNK: usize = 64 * 1024;

/// Most volumes of a VM.
pub const MAX_VOLUMES: usize = 16;
/// Longest path at which one is mounted.
pub const MAX_MOUNT_PATH_BYTES: usize = 255;
/// Smallest scratch disk: below it a file system is mostly itself.
pub const MIN_SCRATCH_MIB: u64 = 16;
/// Largest scratch disk: 1 TiB.
pub const MAX_SCRATCH_MIB: u64 = 1024 * 1024;

/// Most destinations of an egress allow-list.
pub const MAX_EGRESS_RULES: usize = 64;

/// The image that is meant when none is named.
pub const DEFAULT_IMAGE: &str = "default";
