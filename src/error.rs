//! Every reason an RPC fails for, and the one way to make a [`Status`] of it.
//!
//! Services have one `thiserror` enum per operation where they must branch; at the edge each becomes an [`Error`], whose
//! [`Reason`] decides the gRPC code. The reasons are part of the contract (`proto/blixard/common/v1/error.proto`).

use std::{collections::BTreeMap, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::pb::common::v1::ErrorReason as Pb;

/// The `domain` of every `google.rpc.ErrorInfo` of ours.
pub const DOMAIN: &str = "blixard";

/// How long a caller should wait when a bounded queue was full: a few group commits.
const RETRY_WHEN_FULL: Duration = Duration::from_millis(100);
/// The longest value that an error repeats to its caller.
const SHOWN_VALUE_BYTES: usize = 80;

/// Why an RPC failed. Same names as `blixard.common.v1.ErrorReason`.
pub type Reason = Pb;

impl Reason {
    /// The name in `ErrorInfo.reason`: without the enum's prefix.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.as_str_name().trim_start_matches("ERROR_REASON_")
    }

    /// The inverse of [`Reason::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::from_str_name(&format!("ERROR_REASON_{name}"))
    }

    /// The gRPC code this reason always has.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::Unspecified | Self::Internal => Code::Internal,
            Self::InvalidField | Self::RequestIdReused | Self::QueryRefused => Code::InvalidArgument,
            Self::VmNotFound | Self::JobNotFound | Self::NodeNotFound | Self::LogNotFound | Self::ArtifactNotFound => {
                Code::NotFound
            }
            Self::IllegalTransition
            | Self::StaleAttempt
            | Self::StaleIncarnation
            | Self::StaleEpoch
            | Self::SecretsUnavailable
            | Self::ImageNotFound
            | Self::ExceedsCapacity
            | Self::VmNotAccepting
            | Self::GuestRefused => Code::FailedPrecondition,
            Self::StaleGeneration => Code::Aborted,
            Self::Overloaded | Self::QueryBudgetExceeded | Self::DiskFull => Code::ResourceExhausted,
            Self::OffsetBeyondEnd | Self::RevisionCompacted => Code::OutOfRange,
            Self::PeerUnavailable | Self::ShuttingDown | Self::ReplicaBehind | Self::NotLeading => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
        }
    }

    /// Whether the same call may succeed later without anything else being changed.
    #[must_use]
    pub fn retryable(self) -> bool {
        matches!(
            self,
            Self::Overloaded
                | Self::PeerUnavailable
                | Self::ShuttingDown
                | Self::StaleGeneration
                | Self::ReplicaBehind
                | Self::DiskFull
                | Self::NotLeading
        )
    }
}

/// A failed operation as its caller sees it: a reason, a sentence for people, and metadata for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Which of the contract's reasons.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// For programs; the keys stand beside each reason in the contract.
    pub metadata: BTreeMap<String, String>,
}

impl Error {
    /// An error without metadata.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), metadata: BTreeMap::new() }
    }

    /// Adds metadata.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// A fault of ours. The detail goes to the log under a random id; the caller is told the id alone.
    pub fn internal(log: impl FnOnce(&str)) -> Self {
        let error_id = uuid::Uuid::new_v4().to_string();
        log(&error_id);
        Self::new(Reason::Internal, format!("internal error {error_id}: see the server's log"))
            .with("error_id", error_id)
    }

    /// Reads a [`Status`] back: what a client does with an answer.
    #[must_use]
    pub fn from_status(status: &Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let known = info.as_ref().and_then(|info| Reason::from_name(&info.reason));
        let reason = known.unwrap_or(match status.code() {
            Code::DeadlineExceeded => Reason::DeadlineExceeded,
            // What tonic's client says when its own timer fires (seen in 0.14.9).
            Code::Cancelled if status.message() == "Timeout expired" => Reason::DeadlineExceeded,
            // A connection that broke in the middle of a call is any of these to tonic's client. No server of ours answers
            // with the first two, and INTERNAL never without its ErrorInfo: whether the call was obeyed is not known.
            Code::Unavailable | Code::Unknown | Code::Cancelled => Reason::PeerUnavailable,
            Code::Internal if status.message().starts_with("h2 protocol error") => Reason::PeerUnavailable,
            Code::ResourceExhausted => Reason::Overloaded,
            Code::InvalidArgument => Reason::InvalidField,
            _ => Reason::Internal,
        });
        let metadata = info.map(|info| info.metadata.into_iter().collect()).unwrap_or_default();
        Self { reason, message: status.message().to_owned(), metadata }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(
            error.reason.name(),
            DOMAIN,
            error.metadata.clone().into_iter().collect::<std::collections::HashMap<_, _>>(),
        );
        if matches!(error.reason, Reason::Overloaded | Reason::DiskFull) {
            details.set_retry_info(Some(RETRY_WHEN_FULL));
        }
        if error.reason == Reason::InvalidField
            && let Some(field) = error.metadata.get("field")
        {
            details.add_bad_request_violation(field.as_str(), error.message.as_str());
        }
        Status::with_error_details(error.reason.code(), error.message, details)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

/// A field that is wrong: names the field, the value and what is allowed.
pub fn invalid(field: &str, value: impl fmt::Display, allowed: &str) -> Error {
    let mut value = value.to_string();
    if value.len() > SHOWN_VALUE_BYTES {
        let end = value.floor_char_boundary(SHOWN_VALUE_BYTES);
        value = format!("{}… ({} bytes)", &value[..end], value.len());
    }
    Error::new(Reason::InvalidField, format!("{field}: \"{value}\" is not allowed: {allowed}"))
        .with("field", field)
        .with("value", value)
        .with("allowed", allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire_with_its_code_and_metadata() {
        let mut seen = 0;
        for number in 1.. {
            let Ok(reason) = Reason::try_from(number) else { break };
            let error = Error::new(reason, "what happened").with("vm_id", "v1");
            let status = Status::from(error.clone());
            assert_eq!(status.code(), reason.code(), "{reason:?}");
            assert_ne!(status.code(), Code::Unknown, "{reason:?}");
            assert_eq!(Error::from_status(&status), error, "{reason:?}");
            let retry = status.get_details_retry_info().is_some();
            assert_eq!(retry, matches!(reason, Reason::Overloaded | Reason::DiskFull), "{reason:?}");
            seen += 1;
        }
        assert_eq!(seen, 29, "a reason was added or lost: keep the list in error.proto without holes");
    }

    #[test]
    fn a_broken_connection_is_no_answer_whatever_the_client_calls_it() {
        let broken = [Status::unavailable(""), Status::unknown("transport error"), Status::cancelled("closed")];
        for status in broken.into_iter().chain([Status::internal("h2 protocol error: error reading a body")]) {
            assert_eq!(Error::from_status(&status).reason, Reason::PeerUnavailable, "{status:?}");
        }
        assert_eq!(Error::from_status(&Status::internal("anything else")).reason, Reason::Internal);
    }

    #[test]
    fn an_invalid_field_names_field_value_and_what_is_allowed_and_cuts_long_values() {
        let error = invalid("spec.vcpus", 0, "1 to 64");
        assert_eq!(error.message, "spec.vcpus: \"0\" is not allowed: 1 to 64");
        let long = invalid("spec.image", "é".repeat(1000), "a name");
        assert!(long.message.contains("(2000 bytes)") && long.message.len() < 200, "{long}");
    }
}
