//! Logs: human lines or JSON on standard error, filtered by `--log-level` or `TOMBOLO_LOG`.
//!
//! Standard output stays free for results. [`init`] is called once per process, before any role is built.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::{clock, settings};

/// Shape of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Human,
    Json,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, TelemetryError> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            other => Err(TelemetryError::Format { value: other.to_owned() }),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Human => "human",
            Self::Json => "json",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log format {value:?} is unknown: use human or json")]
    Format { value: String },
    #[error(
        "log filter {value:?} is not understood ({reason}): use a level such as info, or tombolo_overlay=debug,info"
    )]
    Filter { value: String, reason: String },
    #[error("logging was already set up in this process")]
    Twice,
}

/// Libraries that call every failed attempt an error; who asks them says once what it means. A filter may name them.
const TALKATIVE: &str = "kube_client=off,kube_runtime=off";

/// Sets up logging for the whole process. `filter` is a level or a list of `target=level`.
pub fn init(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(format!("{TALKATIVE},{filter}"))
        .map_err(|e| TelemetryError::Filter { value: filter.to_owned(), reason: e.to_string() })?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_timer(Rfc3339);
    let installed = match format {
        LogFormat::Human => builder.with_ansi(stderr_colors()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_ansi(false).try_init(),
    };
    installed.map_err(|_| TelemetryError::Twice)
}

/// Colours on standard error: only on a terminal, and never when `NO_COLOR` is set to anything but the empty string.
pub fn stderr_colors() -> bool {
    settings::environment("NO_COLOR").is_none() && std::io::stderr().is_terminal()
}

/// UTC with microseconds, from the clock that scenario tests can shift.
struct Rfc3339;

impl FormatTime for Rfc3339 {
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        let since = clock::since_unix_epoch();
        let at = i64::try_from(since.as_secs())
            .ok()
            .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok())
            .ok_or(fmt::Error)?;
        write!(
            w,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute(),
            at.second(),
            since.subsec_micros()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_format_says_what_would_be_accepted() {
        let error = "xml".parse::<LogFormat>().unwrap_err().to_string();
        assert!(error.contains("\"xml\"") && error.contains("human or json"), "{error}");
    }

    #[test]
    fn a_wrong_filter_names_the_value() {
        let error = init(LogFormat::Human, "tombolo=loud").unwrap_err().to_string();
        assert!(error.contains("tombolo=loud"), "{error}");
    }
}
