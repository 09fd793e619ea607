//! What the three roles have in common: settings layered as flag > environment > file, logging, the runtime.

use std::future::Future;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tombolo_runtime::settings;
use tombolo_runtime::telemetry::{self, LogFormat};

use crate::failure::{Exit, Failure};

/// Fills every setting that flags and environment left open from the file. Destructured without `..`: a setting that
/// is forgotten here does not compile.
macro_rules! layered {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl $name {
            pub fn over(self, file: Self) -> Self {
                let Self { $($field),* } = self;
                Self { $($field: $field.or(file.$field)),* }
            }
        }
    };
}
pub(crate) use layered;

/// The file's part of a role's settings, which flags and environment come before.
pub fn file<T: DeserializeOwned + Default>(config: Option<&Path>) -> Result<T, Failure> {
    config.map_or_else(|| Ok(T::default()), |path| settings::load(path).map_err(Failure::usage))
}

/// Sets up logging.
pub fn logging(format: Option<String>, level: Option<String>) -> Result<(), Failure> {
    let format: LogFormat =
        format.map(|text| text.parse()).transpose().map_err(Failure::usage)?.unwrap_or_default();
    telemetry::init(format, level.as_deref().unwrap_or("info")).map_err(Failure::usage)
}

/// A setting that has no default.
pub fn required<T>(value: Option<T>, flag: &str, example: &str) -> Result<T, Failure> {
    value.ok_or_else(|| {
        let environment =
            format!("TOMBOLO_{}", flag.trim_start_matches("--").replace('-', "_").to_ascii_uppercase());
        Failure::usage(format_args!("{flag} is not set")).remedy(format_args!(
            "give {flag} {example}, or set {environment}, or put it into the file of --config"
        ))
    })
}

/// A zone's name: federators keep 64 characters of it.
pub fn zone(name: Option<String>) -> Result<String, Failure> {
    let name = name.unwrap_or_default();
    match name.chars().count() {
        0..=64 => Ok(name),
        count => Err(Failure::usage(format_args!("--zone has {count} characters, at most 64"))
            .remedy("give the zone as your cloud names it, e.g. eu-west-1a")),
    }
}

/// A join token, given in a file so that it shows in no process list. Absent when the file is gone: a member that has
/// joined needs it no more, and one that has not is told by its role.
pub fn join_token(path: &Path) -> Result<Option<String>, Failure> {
    if !path.exists() {
        return Ok(None);
    }
    let most = u64::try_from(tombolo_proto::token::MAX_TEXT_BYTES).unwrap_or(u64::MAX);
    let bytes =
        tombolo_identity::files::read(path, most).map_err(|e| Failure::new(crate::failure::chain(&e)))?;
    let text = String::from_utf8(bytes).map_err(|_| Failure::new("not text").at(path.display()))?;
    match text.trim() {
        "" => Err(Failure::new("is empty").at(path.display()).remedy("put the token into it")),
        token => Ok(Some(token.to_owned())),
    }
}

/// A duration in a flag or a settings file: `10s`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        crate::args::duration(text).map(Self)
    }
}

impl<'de> serde::Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Runs a role to its end on a runtime of one thread.
pub fn run(
    role: &str,
    work: impl Future<Output = Result<(), Box<dyn std::error::Error>>>,
) -> Result<Exit, Failure> {
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    let ended = runtime.block_on(work);
    ended.map(|()| Exit::Done).map_err(|error| Failure::new(crate::failure::chain(&*error)).at(role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_that_would_be_cut_is_refused_by_name() {
        assert_eq!(zone(None).unwrap(), "");
        assert_eq!(zone(Some("z".repeat(64))).unwrap().len(), 64);
        let refused = format!("{:?}", zone(Some("z".repeat(65))).unwrap_err());
        assert!(refused.contains("--zone has 65 characters"), "{refused}");
    }
}
