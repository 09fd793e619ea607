//! Why the core refused: what it becomes on the wire.

use std::time::Duration;

use tombolo_identity::issuer::IssueError;
use tombolo_identity::rotation::UpdateError;
use tombolo_model::resource::fields::ObjectError;
use tombolo_overlay::grpc;
use tombolo_proto::convert::FieldError;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::store::StoreError;

/// Why an operation was not done; nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    #[error("the federator is shutting down")]
    Gone,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Trust(#[from] UpdateError),
    /// The caller may not do this.
    #[error("{0}")]
    Denied(String),
    /// Another process holds what this one claims, and lives.
    #[error("{0}")]
    Cloned(String),
    /// Whether the holder lives is not known yet: ask again after this.
    #[error("another process may hold this identity: ask again in {} ms", .0.as_millis())]
    Contested(Duration),
    /// Something must be done first.
    #[error("{0}")]
    Precondition(String),
    #[error("{0}")]
    NotFound(String),
    /// Try again later.
    #[error("{0}")]
    Exhausted(String),
    #[error("{0}")]
    Invalid(String),
}

impl CoreError {
    /// A metric label: a closed set.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Store(error) => error.kind(),
            Self::Field(_) | Self::Object(_) | Self::Invalid(_) => "invalid",
            Self::Issue(_) => "issue",
            Self::Trust(_) => "trust",
            Self::Denied(_) => "denied",
            Self::Cloned(_) => "cloned",
            Self::Contested(_) => "contested",
            Self::Precondition(_) => "precondition",
            Self::NotFound(_) => "not_found",
            Self::Exhausted(_) => "exhausted",
        }
    }
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(error) => error.is_retryable(),
            Self::Gone | Self::Exhausted(_) | Self::Contested(_) => true,
            _ => false,
        }
    }
}

impl From<CoreError> for Status {
    fn from(error: CoreError) -> Self {
        let code = match &error {
            CoreError::Gone => Code::Unavailable,
            CoreError::Store(_) => Code::Internal,
            CoreError::Field(_) | CoreError::Object(_) | CoreError::Invalid(_) => Code::InvalidArgument,
            CoreError::Issue(_) | CoreError::Trust(_) | CoreError::Precondition(_) => {
                Code::FailedPrecondition
            }
            CoreError::Denied(_) | CoreError::Cloned(_) => Code::PermissionDenied,
            CoreError::NotFound(_) => Code::NotFound,
            CoreError::Exhausted(_) | CoreError::Contested(_) => Code::ResourceExhausted,
        };
        let mut status = Status::new(code, error.to_string());
        if matches!(error, CoreError::Cloned(_)) {
            status.metadata_mut().insert(grpc::CLONED, MetadataValue::from_static("1"));
        }
        status
    }
}
