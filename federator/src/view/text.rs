//! Times, spans and lists as operators read them. Nothing here grows with what a peer sent.

use std::fmt::Display;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Characters of one message: a page of a terminal. Kubernetes' own limit for a condition is 32,768 bytes.
const MAX_MESSAGE: usize = 1000;
/// Names in one sentence; more are counted.
const MAX_LISTED: usize = 5;

/// RFC 3339 in UTC, to the millisecond; empty for a time that no calendar has (beyond the year 9999).
pub fn rfc3339(since_unix_epoch: Duration) -> String {
    let nanos =
        i128::try_from(since_unix_epoch.as_millis()).ok().and_then(|millis| millis.checked_mul(1_000_000));
    let time = nanos.and_then(|nanos| OffsetDateTime::from_unix_timestamp_nanos(nanos).ok());
    time.and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// RFC 3339 of unix seconds; empty for 0, which stands for never.
pub fn rfc3339_seconds(unix: u64) -> String {
    if unix == 0 { String::new() } else { rfc3339(Duration::from_secs(unix)) }
}

/// A span in the largest fitting unit.
pub fn span(span: Duration) -> String {
    match span.as_secs() {
        0 => format!("{}ms", span.as_millis()),
        seconds @ 1..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// `a, b and 3 more`.
pub fn listed(items: impl IntoIterator<Item = impl Display>) -> String {
    joined(items, ", ")
}

/// Sentences one after the other.
pub fn sentences(items: impl IntoIterator<Item = impl Display>) -> String {
    joined(items, "; ")
}

fn joined(items: impl IntoIterator<Item = impl Display>, separator: &str) -> String {
    let mut items = items.into_iter();
    let shown: Vec<String> = items.by_ref().take(MAX_LISTED).map(|item| item.to_string()).collect();
    let shown = shown.join(separator);
    match items.count() {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// A message that stays readable, whoever wrote parts of it.
pub fn message(text: impl Into<String>) -> String {
    let text: String = text.into();
    match text.char_indices().nth(MAX_MESSAGE) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_shown_or_empty_however_far_away() {
        assert_eq!(rfc3339(Duration::from_millis(1_795_486_505_250)), "2026-11-24T02:15:05.25Z");
        assert_eq!(rfc3339_seconds(1_795_486_505), "2026-11-24T02:15:05Z");
        assert_eq!(rfc3339_seconds(0), "");
        assert_eq!(rfc3339_seconds(u64::MAX), "");
        assert_eq!(rfc3339(Duration::MAX), "");
    }

    #[test]
    fn spans_use_the_largest_fitting_unit() {
        let spans = [Duration::from_millis(350), Duration::from_secs(119), Duration::from_secs(120)];
        assert_eq!(spans.map(span), ["350ms", "119s", "2m"]);
        assert!(span(Duration::MAX).ends_with('d'));
    }

    #[test]
    fn a_flood_is_counted_and_cut() {
        assert_eq!(listed(["a", "b"]), "a, b");
        assert_eq!(listed(0..100), "0, 1, 2, 3, 4 and 95 more");
        assert_eq!(message("é".repeat(100_000)).chars().count(), MAX_MESSAGE + 3);
    }
}
