//! Conversions from wire fields to the model's newtypes, with errors that name the field and the value.

use std::net::SocketAddr;

use tombolo_model::ids::{Block, ClusterTag};

/// A field of a peer's message that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {value:?} is not {expected}")]
pub struct FieldError {
    pub field: &'static str,
    pub value: String,
    pub expected: String,
}

impl FieldError {
    pub fn new(field: &'static str, value: impl ToString, expected: impl ToString) -> Self {
        let mut value = value.to_string();
        if value.len() > 120 {
            value = value.chars().take(120).collect();
        }
        Self { field, value, expected: expected.to_string() }
    }
}

/// Whether a snapshot of epoch `now` after one of epoch `before` says that the federator's store was lost and made anew.
/// 0: the sender's version knows no epochs.
pub fn store_is_new(before: u64, now: u64) -> bool {
    before != 0 && now != 0 && before != now
}

/// Parses a name or key newtype out of a string field.
pub fn parse<T: std::str::FromStr>(field: &'static str, value: &str) -> Result<T, FieldError>
where
    T::Err: std::fmt::Display,
{
    value.parse().map_err(|e: T::Err| FieldError::new(field, value, format!("valid: {e}")))
}

/// A cluster tag.
pub fn tag(field: &'static str, value: u32) -> Result<ClusterTag, FieldError> {
    ClusterTag::new(value).ok_or_else(|| FieldError::new(field, value, "a tag in 1..=16777215"))
}

/// An endpoint block.
pub fn block(field: &'static str, value: u32) -> Result<Block, FieldError> {
    Block::new(value).ok_or_else(|| FieldError::new(field, value, "a 28-bit block"))
}

/// An `ip:port`; the empty string is `None`.
pub fn address(field: &'static str, value: &str) -> Result<Option<SocketAddr>, FieldError> {
    if value.is_empty() {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| FieldError::new(field, value, "an ip:port"))
}

/// Exactly `N` bytes.
pub fn bytes<const N: usize>(field: &'static str, value: &[u8]) -> Result<[u8; N], FieldError> {
    value
        .try_into()
        .map_err(|_| FieldError::new(field, format!("{} bytes", value.len()), format!("{N} bytes")))
}
