//! Why a command failed, as its user is told.

use blixard::error::{Error, Reason};
use tonic::{Code, Status};

use super::args::Format;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The control plane refused, or could not be reached.
    Rpc(Error),
    /// The configuration is wrong, or asks for something that is taken.
    Config(String),
    /// The control plane could not start or go on.
    Start(String),
    /// A backup can't be written or restored.
    Backup(String),
    /// An image can't be made, found or removed.
    Image(String),
    /// A job was not run, or what became of it is unknown.
    NotRun(Error),
    /// The terminal or a file did.
    Io(std::io::Error),
}

impl From<crate::image::ImageError> for Failure {
    fn from(error: crate::image::ImageError) -> Self {
        Self::Image(error.to_string())
    }
}

/// Exit code of `run` when the job's own is not known: the one of `docker run` and `env`.
pub(crate) const NOT_RUN: u8 = 125;
/// As if SIGPIPE had ended us: 128 + 13.
const READER_GONE: u8 = 141;

impl Failure {
    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Rpc(_) | Self::Start(_) | Self::Backup(_) | Self::Image(_) => 1,
            Self::Config(_) => 2,
            Self::NotRun(_) => NOT_RUN,
            Self::Io(error) if error.kind() == std::io::ErrorKind::BrokenPipe => READER_GONE,
            Self::Io(_) => 1,
        }
    }

    /// Whether there is nothing to tell: the reader of our output has left, as `head` does.
    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// The text on stderr: one line for people, one JSON object for programs.
    pub(crate) fn render(&self, format: Format) -> String {
        match format {
            Format::Table => match self {
                Self::Rpc(error) | Self::NotRun(error) => {
                    format!("error: {}: {}", error.reason.name(), one_line(&error.message))
                }
                Self::Config(message) | Self::Start(message) | Self::Backup(message) | Self::Image(message) => {
                    format!("error: {}", one_line(message))
                }
                Self::Io(error) => format!("error: {error}"),
            },
            Format::Json => {
                let (reason, code, message, metadata) = match self {
                    Self::Rpc(error) | Self::NotRun(error) => (
                        error.reason.name(),
                        code_name(error.reason.code()),
                        error.message.clone(),
                        error.metadata.clone(),
                    ),
                    Self::Config(message) => ("CONFIGURATION", "INVALID_ARGUMENT", message.clone(), Default::default()),
                    Self::Start(message) => ("START", "FAILED_PRECONDITION", message.clone(), Default::default()),
                    Self::Backup(message) => ("BACKUP", "FAILED_PRECONDITION", message.clone(), Default::default()),
                    Self::Image(message) => ("IMAGE", "FAILED_PRECONDITION", message.clone(), Default::default()),
                    Self::Io(error) => ("IO", "UNKNOWN", error.to_string(), Default::default()),
                };
                let body = serde_json::json!({
                    "reason": reason, "message": message, "metadata": metadata, "code": code,
                });
                serde_json::json!({ "error": body }).to_string()
            }
        }
    }
}

/// Errors are one line: whatever a server says must not draw on the terminal.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The name of a gRPC code as the protocol writes it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Nobody answers at the endpoint.
pub(crate) fn unreachable(endpoint: &str) -> Error {
    let message =
        format!("no control plane answers at {endpoint}: start one with `mvm-ci`, or name another with --endpoint");
    Error::new(Reason::PeerUnavailable, message).with("peer", endpoint)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Rpc(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Rpc(Error::from_status(&status))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_read_as_one_line_and_as_one_object() {
        let missing = Error::new(Reason::JobNotFound, "there is no job 7").with("job_id", 7);
        let rude = Error::new(Reason::VmNotFound, "no\nVM\u{1b}[31m");
        let failures = [
            Failure::Rpc(missing),
            Failure::Rpc(rude),
            Failure::Rpc(unreachable("http://127.0.0.1:50051")),
            Failure::NotRun(Error::new(Reason::ImageNotFound, "no node has the image \"x\"").with("image", "x")),
            Failure::Config("flag --driver: \"x\" is not allowed: auto, cloud-hypervisor, qemu or process".into()),
            Failure::Start("cannot listen on 127.0.0.1:50051".into()),
        ];
        let mut text = String::new();
        for failure in &failures {
            text += &format!(
                "[{}] {}\n    {}\n",
                failure.exit_code(),
                failure.render(Format::Table),
                failure.render(Format::Json)
            );
        }
        insta::assert_snapshot!(text);
    }
}
