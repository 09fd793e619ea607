//! What was measured: medians with minimum and maximum, ratios to the baselines, as a table and as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;

use crate::measure::Figures;

/// One run of one row on one topology.
#[derive(Debug)]
pub struct Sample {
    pub scenario: String,
    pub row: String,
    pub title: String,
    pub main_figure: String,
    pub topology: String,
    pub command: String,
    pub outcome: Result<Figures, String>,
}

/// Everything of one `run`.
#[derive(Debug)]
pub struct Report {
    quick: bool,
    scenarios: Vec<ScenarioHead>,
    skipped: BTreeMap<String, String>,
    topologies: BTreeMap<String, String>,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct ScenarioHead {
    name: String,
    title: String,
    baselines: Vec<String>,
}

/// All runs of one row on one topology.
#[derive(Debug, Serialize)]
pub struct Line {
    scenario: String,
    row: String,
    title: String,
    topology: String,
    command: String,
    main_figure: String,
    samples: Vec<Figures>,
    failures: Vec<String>,
}

/// A figure over all passes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Line {
    /// `None` when no run has the figure.
    pub fn spread(&self, figure: &str) -> Option<Spread> {
        let mut values: Vec<f64> =
            self.samples.iter().filter_map(|sample| sample.get(figure).copied()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = if values.len() % 2 == 1 { upper } else { (upper + *values.get(middle - 1)?) / 2.0 };
        Some(Spread { median, min, max })
    }

    /// `role value` of a figure that is kept per process.
    fn per_process(&self, figure: &str) -> Vec<String> {
        let role = |key: &str| key.strip_prefix(figure)?.strip_prefix(':').map(str::to_owned);
        let spreads = self.spreads();
        spreads.iter().filter_map(|(key, s)| Some(format!("{} {}", role(key)?, short(s.median)))).collect()
    }

    fn spreads(&self) -> BTreeMap<&str, Spread> {
        let names: BTreeSet<&str> =
            self.samples.iter().flat_map(|sample| sample.keys().map(String::as_str)).collect();
        names.into_iter().filter_map(|name| Some((name, self.spread(name)?))).collect()
    }
}

impl Report {
    pub fn new(quick: bool) -> Self {
        Self {
            quick,
            scenarios: Vec::new(),
            skipped: BTreeMap::new(),
            topologies: BTreeMap::new(),
            lines: Vec::new(),
        }
    }

    pub fn scenario(&mut self, name: &str, title: &str, baselines: &[&str]) {
        let baselines = baselines.iter().map(|&name| name.to_owned()).collect();
        self.scenarios.push(ScenarioHead { name: name.to_owned(), title: title.to_owned(), baselines });
    }

    pub fn skipped(&mut self, scenario: &str, reason: &str) {
        self.skipped.insert(scenario.to_owned(), reason.to_owned());
    }

    pub fn topology(&mut self, name: &str, description: &str) {
        self.topologies.insert(name.to_owned(), description.to_owned());
    }

    pub fn add(&mut self, sample: Sample) {
        let Sample { scenario, row, title, main_figure, topology, command, outcome } = sample;
        let same = |line: &Line| line.scenario == scenario && line.row == row && line.topology == topology;
        let line = match self.lines.iter().position(same) {
            Some(at) => self.lines.get_mut(at),
            None => {
                let (samples, failures) = (Vec::new(), Vec::new());
                self.lines.push(Line {
                    scenario: scenario.clone(),
                    row: row.clone(),
                    title,
                    topology: topology.clone(),
                    command,
                    main_figure,
                    samples,
                    failures,
                });
                self.lines.last_mut()
            }
        };
        match (line, outcome) {
            (Some(line), Ok(figures)) => line.samples.push(figures),
            (Some(line), Err(failure)) => line.failures.push(failure),
            (None, _) => {}
        }
    }

    /// `line`'s median of `figure` divided by the baseline's.
    pub fn ratio(&self, line: &Line, baseline: &str, figure: &str) -> Option<f64> {
        let base = self.line(&line.scenario, &line.row, baseline)?.spread(figure)?.median;
        let own = line.spread(figure)?.median;
        (base > 0.0).then(|| own / base)
    }

    /// The table of a scenario: rows grouped, topologies in the order they ran.
    pub fn print_scenario(&self, name: &str) {
        let Some(head) = self.scenarios.iter().find(|head| head.name == name) else { return };
        let mut table = Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        let mut header = ["row", "topology", "median (min-max)", "p50 ms", "p99 ms", "CPU", "RSS MB"]
            .map(str::to_owned)
            .to_vec();
        for baseline in &head.baselines {
            header.push(format!("vs {baseline}"));
            header.push("p99 vs".to_owned());
        }
        table.set_header(header);
        let mut rows: Vec<&str> = Vec::new();
        for line in self.lines.iter().filter(|line| line.scenario == name) {
            if !rows.contains(&line.row.as_str()) {
                rows.push(&line.row);
            }
        }
        for row in rows {
            for line in self.lines.iter().filter(|line| line.scenario == name && line.row == row) {
                table.add_row(self.cells(head, line));
            }
        }
        println!("\n{} ({}){}\n{table}", head.title, head.name, if self.quick { ", quick look" } else { "" });
        self.print_derived(name);
    }

    /// What one row alone does not show: CPU and memory per process, and what bulk does to requests beside it.
    fn print_derived(&self, name: &str) {
        let in_scenario = || self.lines.iter().filter(|line| line.scenario == name);
        for line in in_scenario() {
            let shown: &[(&str, &str)] = match line.row.as_str() {
                "req1" => &[("idle_rss_mb", "RSS idle, MB")],
                "req256" => &[("rss_mb", "RSS at c=256, MB")],
                "bulk1" => &[("cpu_s_per_gb", "CPU-s per GB")],
                "req32" => &[("cpu_s_per_10k_requests", "CPU-s per 10k requests")],
                _ => &[],
            };
            for (figure, title) in shown {
                let parts = line.per_process(figure);
                if !parts.is_empty() {
                    println!("- {title}, {}: {}", line.topology, parts.join(", "));
                }
            }
        }
        for beside in in_scenario().filter(|line| line.row == "mixed32") {
            if let Some(ratio) = self.beside_bulk(beside) {
                println!(
                    "- p99 at c=32 beside bulk over its own quiet p99, {}: {ratio:.1}x",
                    beside.topology
                );
            }
        }
        for verdict in crate::targets::verdicts(self, name) {
            println!("- {verdict}");
        }
    }

    /// p99 of requests with bulk beside, over the same topology's p99 without.
    pub fn beside_bulk(&self, beside: &Line) -> Option<f64> {
        let quiet = self.line(&beside.scenario, "req32", &beside.topology)?.spread("p99_ms")?.median;
        let loaded = beside.spread("p99_ms")?.median;
        (quiet > 0.0).then(|| loaded / quiet)
    }

    /// The line of a row on a topology.
    pub fn line(&self, scenario: &str, row: &str, topology: &str) -> Option<&Line> {
        self.lines
            .iter()
            .find(|line| line.scenario == scenario && line.row == row && line.topology == topology)
    }

    fn cells(&self, head: &ScenarioHead, line: &Line) -> Vec<Cell> {
        let number = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let median = |figure: &str| line.spread(figure).map_or_else(|| "-".to_owned(), |s| short(s.median));
        let mut main = line.spread(&line.main_figure).map_or_else(
            || "failed".to_owned(),
            |s| {
                format!("{} ({}-{}) {}", short(s.median), short(s.min), short(s.max), unit(&line.main_figure))
            },
        );
        if let Some(errors) = line.spread("errors").filter(|errors| errors.max > 0.0) {
            main.push_str(&format!(", {} errors", short(errors.max)));
        }
        if let Some(first) = line.spread("first_ms").filter(|_| line.main_figure == "p50_ms") {
            main.push_str(&format!(", cold {}", short(first.median)));
        }
        let cpu = ["cpu_s_per_gb", "cpu_s_per_10k_requests", "cpu_ms_per_connection"]
            .into_iter()
            .find_map(|figure| Some(format!("{} {}", short(line.spread(figure)?.median), unit(figure))))
            .unwrap_or_else(|| "-".to_owned());
        let mut cells = vec![
            Cell::new(&line.title),
            Cell::new(&line.topology),
            number(main),
            number(median("p50_ms")),
            number(median("p99_ms")),
            number(cpu),
            number(median("rss_mb")),
        ];
        for baseline in &head.baselines {
            for figure in [line.main_figure.as_str(), "p99_ms"] {
                let ratio = self.ratio(line, baseline, figure);
                cells.push(number(ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"))));
            }
        }
        cells
    }

    /// Every sample, the medians and the ratios.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        #[derive(Serialize)]
        struct JsonLine<'a> {
            #[serde(flatten)]
            line: &'a Line,
            figures: BTreeMap<&'a str, Spread>,
            /// Median over the baseline's median, by baseline and figure.
            ratios: BTreeMap<&'a str, BTreeMap<&'a str, f64>>,
        }
        let lines: Vec<JsonLine<'_>> = self
            .lines
            .iter()
            .map(|line| {
                let figures = line.spreads();
                let baselines =
                    self.scenarios.iter().find(|head| head.name == line.scenario).map(|head| &head.baselines);
                let ratios = baselines
                    .into_iter()
                    .flatten()
                    .map(|baseline| {
                        let of = figures
                            .keys()
                            .filter_map(|&f| Some((f, self.ratio(line, baseline, f)?)))
                            .collect();
                        (baseline.as_str(), of)
                    })
                    .collect();
                JsonLine { line, figures, ratios }
            })
            .collect();
        let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
        let json = serde_json::json!({
            "quick": self.quick,
            "machine": {
                "cores": std::thread::available_parallelism().ok().map(usize::from),
                "kernel": read("/proc/sys/kernel/osrelease"),
                "rmem_max": read("/proc/sys/net/core/rmem_max"),
                "rmem_default": read("/proc/sys/net/core/rmem_default"),
                "load_average": read("/proc/loadavg"),
            },
            "scenarios": self.scenarios,
            "skipped": self.skipped,
            "topologies": self.topologies,
            "targets": self
                .scenarios
                .iter()
                .flat_map(|head| crate::targets::verdicts(self, &head.name))
                .collect::<Vec<_>>(),
            "rows": lines,
        });
        let text = serde_json::to_string_pretty(&json)?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }
}

/// Three significant digits and no exponent.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        0.0 => "0".to_owned(),
        _ => format!("{value:.3}"),
    }
}

fn unit(figure: &str) -> &'static str {
    match figure {
        "requests_per_second" => "req/s",
        "connections_per_second" => "conn/s",
        "mbit_per_second" => "Mbit/s",
        "cpu_s_per_gb" => "s/GB",
        "cpu_s_per_10k_requests" => "s/10k",
        "cpu_ms_per_connection" => "ms/conn",
        _ => "ms",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(topology: &str, value: f64) -> Sample {
        Sample {
            scenario: "local".to_owned(),
            row: "bulk1".to_owned(),
            title: "bulk".to_owned(),
            main_figure: "mbit_per_second".to_owned(),
            topology: topology.to_owned(),
            command: "x".to_owned(),
            outcome: Ok(Figures::from([("mbit_per_second".to_owned(), value)])),
        }
    }

    #[test]
    fn medians_spread_and_ratio_come_from_all_passes() {
        let mut report = Report::new(false);
        for (topology, value) in
            [("a", 10.0), ("base", 5.0), ("a", 30.0), ("base", 4.0), ("a", 20.0), ("base", 100.0)]
        {
            report.add(sample(topology, value));
        }
        assert_eq!(report.lines.len(), 2);
        let spread = report.lines[0].spread("mbit_per_second").unwrap();
        assert_eq!((spread.median, spread.min, spread.max), (20.0, 10.0, 30.0));
        assert_eq!(report.ratio(&report.lines[0], "base", "mbit_per_second"), Some(4.0));
        assert_eq!(report.ratio(&report.lines[0], "none", "mbit_per_second"), None);
    }

    #[test]
    fn a_failed_run_is_kept_and_does_not_count_as_a_zero() {
        let mut report = Report::new(true);
        report.add(Sample { outcome: Err("broke".to_owned()), ..sample("a", 0.0) });
        report.add(sample("a", 7.0));
        assert_eq!(report.lines[0].failures, ["broke"]);
        assert_eq!(report.lines[0].spread("mbit_per_second").unwrap().min, 7.0);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.1234, 1.234, 12.34, 12345.6].map(short), ["0", "0.123", "1.23", "12.3", "12346"]);
    }
}
