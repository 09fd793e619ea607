//! The ratios the mesh's path has to reach, each checked against what the same run measured.

use std::fmt;

use serde::Serialize;

use crate::report::Report;

/// The topology whose figures are promised.
pub const PROMISED: &str = "tombolo";

#[derive(Debug, Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// `figure` of a row over the same figure on `baseline`.
struct Target {
    scenario: &'static str,
    row: &'static str,
    figure: &'static str,
    baseline: &'static str,
    bound: Bound,
}

const fn target(
    scenario: &'static str,
    row: &'static str,
    figure: &'static str,
    baseline: &'static str,
    bound: Bound,
) -> Target {
    Target { scenario, row, figure, baseline, bound }
}

const TARGETS: &[Target] = &[
    target("local", "req32", "requests_per_second", "haproxy", Bound::AtLeast(1.5)),
    target("local", "req256", "requests_per_second", "haproxy", Bound::AtLeast(1.5)),
    target("local", "req32", "p99_ms", "haproxy", Bound::AtMost(0.5)),
    target("local", "conn16", "connections_per_second", "haproxy", Bound::AtLeast(8.0)),
    target("local", "bulk1", "mbit_per_second", "haproxy", Bound::AtLeast(0.7)),
    target("local", "bulk8", "mbit_per_second", "haproxy", Bound::AtLeast(0.7)),
    target("local", "bulk1", "cpu_s_per_gb:gateway-near", "quic-terminating", Bound::AtMost(0.25)),
    target("wan-1", "req100", "p99_ms", "haproxy", Bound::AtMost(0.5)),
    target("wan-1", "req100", "p99_ms", "haproxy-bbr", Bound::AtMost(0.8)),
    target("wan-1", "bulk1", "mbit_per_second", "haproxy", Bound::AtLeast(20.0)),
    target("wan-1", "bulk1", "mbit_per_second", "haproxy-bbr", Bound::AtLeast(0.8)),
];

/// Bulk in packets of a 9000-byte network.
const JUMBO: &str = "tombolo-9000";
const JUMBO_AT_LEAST: f64 = 1.0;
/// Requests beside bulk: p99 at most so many times the quiet one.
const BESIDE_BULK_AT_MOST: f64 = 3.0;
/// First byte of a new warm connection: at most 1.1 round trips of 50 ms.
const WARM_FIRST_BYTE_MS: f64 = 55.0;

/// One target's outcome.
#[derive(Debug, Serialize)]
pub struct Verdict {
    what: String,
    measured: Option<f64>,
    bound: String,
    reached: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.reached { "REACHED" } else { "MISSED" };
        let measured = self.measured.map_or_else(|| "not measured".to_owned(), |value| format!("{value:.2}"));
        write!(f, "{word} {}: {measured}, target {}", self.what, self.bound)
    }
}

fn verdict(what: String, measured: Option<f64>, bound: Bound) -> Verdict {
    let text = match bound {
        Bound::AtLeast(value) => format!(">= {value}"),
        Bound::AtMost(value) => format!("<= {value}"),
    };
    Verdict { what, measured, bound: text, reached: measured.is_some_and(|value| bound.holds(value)) }
}

/// Outcomes for the rows of a scenario that ran on the promised topology; empty where it did not run.
pub fn verdicts(report: &Report, scenario: &str) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for target in TARGETS.iter().filter(|target| target.scenario == scenario) {
        if let Some(line) = report.line(scenario, target.row, PROMISED) {
            let what = format!("{} {} vs {}", target.row, target.figure, target.baseline);
            verdicts.push(verdict(what, report.ratio(line, target.baseline, target.figure), target.bound));
        }
    }
    if let Some(line) = report.line(scenario, "bulk1", JUMBO) {
        let what = "bulk1 mbit_per_second in 9000-byte packets vs haproxy".to_owned();
        let measured = report.ratio(line, "haproxy", "mbit_per_second");
        verdicts.push(verdict(what, measured, Bound::AtLeast(JUMBO_AT_LEAST)));
    }
    if let Some(line) = report.line(scenario, "mixed32", PROMISED) {
        let what = "p99 at c=32 beside bulk vs its own quiet p99".to_owned();
        verdicts.push(verdict(what, report.beside_bulk(line), Bound::AtMost(BESIDE_BULK_AT_MOST)));
    }
    if let Some(line) = report.line(scenario, "first", PROMISED).filter(|_| scenario == "wan-0") {
        let what = "first byte of a new warm connection over 50 ms, ms".to_owned();
        let measured = line.spread("p50_ms").map(|spread| spread.median);
        verdicts.push(verdict(what, measured, Bound::AtMost(WARM_FIRST_BYTE_MS)));
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Figures;
    use crate::report::Sample;

    fn sample(topology: &str, row: &str, figure: &str, value: f64) -> Sample {
        Sample {
            scenario: "local".to_owned(),
            row: row.to_owned(),
            title: row.to_owned(),
            main_figure: figure.to_owned(),
            topology: topology.to_owned(),
            command: String::new(),
            outcome: Ok(Figures::from([(figure.to_owned(), value)])),
        }
    }

    #[test]
    fn a_target_is_reached_missed_or_not_measured_and_absent_without_the_mesh() {
        let mut report = Report::new(true);
        report.add(sample("haproxy", "req32", "requests_per_second", 100.0));
        assert!(verdicts(&report, "local").is_empty());
        report.add(sample(PROMISED, "req32", "requests_per_second", 150.0));
        report.add(sample(PROMISED, "conn16", "connections_per_second", 10.0));
        let of =
            |what: &str| verdicts(&report, "local").into_iter().find(|v| v.what.starts_with(what)).unwrap();
        assert!(of("req32 requests").reached);
        // No p99 in that sample, no baseline for the connections: neither may look reached.
        assert!(!of("req32 p99").reached && of("req32 p99").measured.is_none());
        assert!(!of("conn16").reached);
    }
}
