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
/// How long a VM has to end by itself when the caller names no grace.
pub const DEFAULT_STOP_GRACE: Duration = Duration::from_secs(10);
/// The longest such grace.
pub const MAX_STOP_GRACE: Duration = Duration::from_secs(600);
/// Between SIGTERM and SIGKILL of a job that is cancelled or out of time (Kubernetes gives 30 s, Docker 10 s).
pub const KILL_GRACE: Duration = Duration::from_secs(10);
/// Most bytes in one log chunk.
pub const MAX_LOG_CHUNK: usize = 64 * 1024;

/// The image that is meant when none is named.
pub const DEFAULT_IMAGE: &str = "default";
