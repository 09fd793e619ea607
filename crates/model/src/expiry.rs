//! How urgent it is that something ends: the steps by which an operator is told. Pure.

use std::time::Duration;

const DAY: u64 = 86_400;

/// How soon.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Urgency {
    /// Within 30 days: a month to plan the renewal in.
    Month,
    /// Within 7 days.
    Week,
    /// Within a day.
    Day,
    Expired,
}

impl Urgency {
    /// Of an end; `None` while it is more than 30 days away. Both in seconds since the Unix epoch.
    pub fn at(not_after: u64, now: u64) -> Option<Self> {
        match not_after.checked_sub(now) {
            None | Some(0) => Some(Self::Expired),
            Some(left) if left <= DAY => Some(Self::Day),
            Some(left) if left <= 7 * DAY => Some(Self::Week),
            Some(left) if left <= 30 * DAY => Some(Self::Month),
            Some(_) => None,
        }
    }

    /// As findings and logs name it.
    pub fn severity(self) -> &'static str {
        match self {
            Self::Month => "notice",
            Self::Week => "warning",
            Self::Day | Self::Expired => "critical",
        }
    }

    /// How long a log may be silent about it.
    pub fn repeat_after(self) -> Duration {
        Duration::from_secs(match self {
            Self::Month => DAY,
            Self::Week => 6 * 3600,
            Self::Day | Self::Expired => 3600,
        })
    }
}

/// The time until an end, for people: `29 days`, `6 hours`, `3 days ago`.
pub fn in_words(not_after: u64, now: u64) -> String {
    let (span, ago) = match not_after.checked_sub(now) {
        Some(left) => (left, false),
        None => (now - not_after, true),
    };
    let (count, unit) = match span {
        0..7_200 => (span / 60, "minutes"),
        7_200..172_800 => (span / 3_600, "hours"),
        _ => (span / DAY, "days"),
    };
    if ago { format!("{count} {unit} ago") } else { format!("in {count} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_threshold_is_met_at_its_second() {
        let end = 1_000 * DAY;
        let cases = [
            (30 * DAY + 1, None),
            (30 * DAY, Some(Urgency::Month)),
            (7 * DAY + 1, Some(Urgency::Month)),
            (7 * DAY, Some(Urgency::Week)),
            (DAY + 1, Some(Urgency::Week)),
            (DAY, Some(Urgency::Day)),
            (1, Some(Urgency::Day)),
            (0, Some(Urgency::Expired)),
        ];
        for (left, expected) in cases {
            assert_eq!(Urgency::at(end, end - left), expected, "{left} s before");
        }
        assert_eq!(Urgency::at(end, end + 5), Some(Urgency::Expired));
        assert_eq!(Urgency::at(u64::MAX, 0), None);
    }

    #[test]
    fn words_are_in_the_largest_fitting_unit() {
        assert_eq!(in_words(30 * DAY, 0), "in 30 days");
        assert_eq!(in_words(DAY, 0), "in 24 hours");
        assert_eq!(in_words(600, 0), "in 10 minutes");
        assert_eq!(in_words(0, 3 * DAY), "3 days ago");
    }

    #[test]
    fn the_sooner_the_louder() {
        let all = [Urgency::Month, Urgency::Week, Urgency::Day, Urgency::Expired];
        assert!(all.is_sorted() && all.windows(2).all(|w| w[0].repeat_after() >= w[1].repeat_after()));
    }
}
