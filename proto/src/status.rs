//! Errors as they cross the wire: a closed set of kinds, and the one place where they become a gRPC status.
//!
//! In: a [`Failure`], made where something went wrong. Out: a [`tonic::Status`] with `google.rpc` details.
//! Never here: paths, addresses or other internals in a message meant for a client; whoever makes a `Failure` sees to it.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain in every `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "conclave";

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is at fault; sending it again will not help.
    InvalidArgument,
    /// What it names does not exist here.
    NotFound,
    /// The system is not in the state the request needs.
    FailedPrecondition,
    /// A bound was reached; try again after a while.
    ResourceExhausted,
    /// Something that was needed is away; try again after a while.
    Unavailable,
    /// The deadline passed.
    DeadlineExceeded,
    /// The caller gave up.
    Cancelled,
    /// Not offered by this server.
    Unimplemented,
    /// A fault of ours.
    Internal,
}

impl ErrorKind {
    /// The gRPC code of this kind: the only `match` from ours to theirs.
    pub fn code(self) -> Code {
        match self {
            Self::InvalidArgument => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::FailedPrecondition => Code::FailedPrecondition,
            Self::ResourceExhausted => Code::ResourceExhausted,
            Self::Unavailable => Code::Unavailable,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unimplemented => Code::Unimplemented,
            Self::Internal => Code::Internal,
        }
    }

    /// The kind a received status speaks of. Codes that we never send are faults of the other side.
    pub fn of(status: &Status) -> Self {
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Self::InvalidArgument,
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => Self::FailedPrecondition,
            Code::ResourceExhausted => Self::ResourceExhausted,
            Code::Unavailable => Self::Unavailable,
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::Cancelled => Self::Cancelled,
            Code::Unimplemented => Self::Unimplemented,
            Code::Ok
            | Code::Unknown
            | Code::Internal
            | Code::DataLoss
            | Code::PermissionDenied
            | Code::Unauthenticated => Self::Internal,
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        matches!(self, Self::ResourceExhausted | Self::Unavailable)
    }
}

/// One failure, complete: what a caller reads and what its code acts on.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What a caller can do about it.
    pub kind: ErrorKind,
    /// One sentence for people.
    pub message: String,
    /// Path of the request field at fault, for `InvalidArgument`.
    pub field: Option<String>,
    /// For programs: upper snake case, stable.
    pub reason: &'static str,
    /// When trying again makes sense.
    pub retry_after: Option<Duration>,
}

impl Failure {
    fn new(kind: ErrorKind, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), field: None, reason, retry_after: None }
    }

    /// `field` (its path in the request) is out of range, as `message` says.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(ErrorKind::InvalidArgument, "INVALID_FIELD", message) }
    }

    /// What the request names is not here.
    pub fn not_found(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, reason, message)
    }

    /// The system is not in the state the request needs.
    pub fn precondition(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::FailedPrecondition, reason, message)
    }

    /// A bound was reached; there may be room after `retry_after`.
    pub fn exhausted(reason: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(ErrorKind::ResourceExhausted, reason, message) }
    }

    /// Something needed is away; it may be back after `retry_after`.
    pub fn unavailable(reason: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(ErrorKind::Unavailable, reason, message) }
    }

    /// The caller's deadline passed.
    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::DeadlineExceeded, "DEADLINE", message)
    }

    /// The caller went away.
    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Cancelled, "CANCELLED", message)
    }

    /// A fault of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, "INTERNAL", message)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(failure.reason, DOMAIN, std::collections::HashMap::new());
        if let Some(field) = &failure.field {
            details.add_bad_request_violation(field, &failure.message);
        }
        if let Some(after) = failure.retry_after {
            details.set_retry_info(Some(after));
        }
        // The message names the field too: many clients show nothing but the message.
        let message = match &failure.field {
            Some(field) => format!("{field}: {}", failure.message),
            None => failure.message,
        };
        Status::with_error_details(failure.kind.code(), message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_field_is_named_in_message_and_details() {
        let status: Status = Failure::invalid("sampling.top_p", "must be in (0, 1], is 2").into();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "sampling.top_p: must be in (0, 1], is 2");
        let details = status.get_error_details();
        assert_eq!(details.bad_request().expect("bad request").field_violations[0].field, "sampling.top_p");
    }

    #[test]
    fn what_may_be_tried_again_says_when() {
        let after = Duration::from_millis(1500);
        let status: Status = Failure::unavailable("NO_HOLDER", "expert 3 of layer 1 has no holder", after).into();
        let details = status.get_error_details();
        assert_eq!(details.retry_info().expect("retry info").retry_delay, Some(after));
        assert_eq!(details.error_info().expect("error info").reason, "NO_HOLDER");
        assert!(ErrorKind::of(&status).retryable());
    }

    #[test]
    fn every_kind_survives_the_wire() {
        for kind in [
            ErrorKind::InvalidArgument,
            ErrorKind::NotFound,
            ErrorKind::FailedPrecondition,
            ErrorKind::ResourceExhausted,
            ErrorKind::Unavailable,
            ErrorKind::DeadlineExceeded,
            ErrorKind::Cancelled,
            ErrorKind::Unimplemented,
            ErrorKind::Internal,
        ] {
            assert_eq!(ErrorKind::of(&Status::new(kind.code(), "")), kind);
        }
    }
}
