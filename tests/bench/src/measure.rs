//! One row on one running topology: starts the load generators, reads the hops' CPU time around the window and their
//! memory within it, and turns both into named figures.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tombolo_tests::process::{Process, ProcessSpec};

use crate::load::{LoadReport, WINDOW_LINE};
use crate::site::{Side, Site, own_program};
use crate::topology::Running;

/// How long a load generator may take besides its warm-up and window: 256 handshakes through a loaded chain, and the
/// end of streams that are stalled.
const SLACK: Duration = Duration::from_secs(30);

/// Figures by name; names carry their units.
pub type Figures = BTreeMap<String, f64>;

/// What one row does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Keep-alive requests on so many connections.
    Requests { connections: usize },
    /// The same with one bulk stream beside it.
    RequestsBesideBulk { connections: usize },
    /// New connections, so many at a time.
    Connections { at_a_time: usize },
    /// Bulk on so many streams.
    Bulk { streams: usize },
}

/// A line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub work: Work,
    pub seconds: f64,
    pub warm_up: f64,
}

impl Row {
    /// The figure that the row is about, whether more is better, and how it is written.
    pub fn main_figure(&self) -> &'static str {
        match self.work {
            Work::Requests { .. } | Work::RequestsBesideBulk { .. } => "requests_per_second",
            Work::Connections { at_a_time: 1 } => "p50_ms",
            Work::Connections { .. } => "connections_per_second",
            Work::Bulk { .. } => "mbit_per_second",
        }
    }

    fn load_args(&self, running: &Running) -> Vec<String> {
        let (kind, target, connections) = match self.work {
            Work::Requests { connections } | Work::RequestsBesideBulk { connections } => {
                ("http", running.http, connections)
            }
            Work::Connections { at_a_time } => ("connect", running.http, at_a_time),
            Work::Bulk { streams } => ("bulk", running.bulk, streams),
        };
        load_args(kind, target, connections, self.seconds, self.warm_up)
    }

    /// The command that made the load, for the report.
    pub fn command(&self, running: &Running) -> String {
        let mut command = format!("tombolo-bench {}", self.load_args(running).join(" "));
        if let Work::RequestsBesideBulk { .. } = self.work {
            command.push_str(" (beside --kind bulk --connections 1)");
        }
        command
    }
}

fn load_args(
    kind: &str,
    target: std::net::SocketAddr,
    connections: usize,
    seconds: f64,
    warm_up: f64,
) -> Vec<String> {
    ["load", "--kind", kind, "--target", &target.to_string(), "--connections", &connections.to_string()]
        .into_iter()
        .map(str::to_owned)
        .chain(["--seconds".to_owned(), seconds.to_string(), "--warm-up".to_owned(), warm_up.to_string()])
        .collect()
}

/// Runs a row. The error says what the load generator or a dead hop wrote.
pub fn measure(site: &Site, running: &Running, row: &Row) -> Result<Figures> {
    let beside = match row.work {
        // Begins before the requests and outlasts them; ends when dropped.
        Work::RequestsBesideBulk { .. } => {
            let args = load_args("bulk", running.bulk, 1, row.seconds + row.warm_up + 60.0, 0.0);
            let bulk = start_load(site, "load-beside", &args)?;
            bulk.wait_for_log(WINDOW_LINE, SLACK)?;
            Some(bulk)
        }
        Work::Requests { .. } | Work::Connections { .. } | Work::Bulk { .. } => None,
    };
    let mut load = start_load(site, "load", &row.load_args(running))?;
    load.wait_for_log(WINDOW_LINE, SLACK + Duration::from_secs_f64(row.warm_up))?;
    let before = cpu_times(running)?;
    std::thread::sleep(Duration::from_secs_f64(row.seconds * 0.7));
    let mut figures = memory(running, "");
    let status = load.wait(Duration::from_secs_f64(row.seconds) + SLACK)?;
    let after = cpu_times(running)?;
    ensure!(status.success(), "the load generator failed: {}", load.tail());
    drop(beside);

    let report = load.log().lines().last().map(serde_json::from_str::<LoadReport>);
    let report =
        report.context("the load generator wrote no report")?.context("read the load generator's report")?;
    let cpu: Vec<(String, f64)> = after
        .into_iter()
        .zip(before)
        .map(|((role, after), (_, before))| (role, after.saturating_sub(before).as_secs_f64()))
        .collect();
    add_figures(&mut figures, row, &report, &cpu);
    Ok(figures)
}

/// RSS and PSS of every hop right now, in MB, with `prefix` before the names.
pub fn memory(running: &Running, prefix: &str) -> Figures {
    let mut figures = Figures::new();
    for hop in &running.hops {
        let Some(usage) = hop.usage() else { continue };
        figures.insert(format!("{prefix}rss_mb:{}", hop.name()), usage.rss_bytes as f64 / 1e6);
        *figures.entry(format!("{prefix}rss_mb")).or_default() += usage.rss_bytes as f64 / 1e6;
        *figures.entry(format!("{prefix}pss_mb")).or_default() += usage.pss_bytes as f64 / 1e6;
    }
    figures
}

fn start_load(site: &Site, name: &str, args: &[String]) -> Result<Process> {
    // A log of an earlier row would already hold the window's line.
    let log = site.dir().join(format!("{name}.log"));
    if log.exists() {
        std::fs::remove_file(&log).with_context(|| format!("remove {}", log.display()))?;
    }
    let spec = ProcessSpec::new(name, own_program()?).args(args).stop_grace(Duration::from_millis(500));
    spec.within_optional(site.namespace(Side::Near)).spawn(site.dir())
}

fn cpu_times(running: &Running) -> Result<Vec<(String, Duration)>> {
    running
        .hops
        .iter()
        .map(|hop| {
            let usage = hop.usage().with_context(|| format!("{} has ended: {}", hop.name(), hop.tail()))?;
            Ok((hop.name().to_owned(), usage.cpu))
        })
        .collect()
}

fn add_figures(figures: &mut Figures, row: &Row, report: &LoadReport, cpu: &[(String, f64)]) {
    let mut set = |name: &str, value: Option<f64>| {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            figures.insert(name.to_owned(), value);
        }
    };
    set("p50_ms", report.p50_ms);
    set("p99_ms", report.p99_ms);
    set("max_ms", report.max_ms);
    set("errors", Some(report.errors as f64));
    let per_second = report.completed as f64 / report.seconds;
    // CPU figures are per this much work.
    let (cpu_name, work) = match row.work {
        Work::Requests { .. } => ("cpu_s_per_10k_requests", report.completed as f64 / 1e4),
        // Its CPU is mostly the bulk stream's, which is not counted here.
        Work::RequestsBesideBulk { .. } => ("", 0.0),
        Work::Connections { .. } => ("cpu_ms_per_connection", report.completed as f64 / 1e3),
        Work::Bulk { .. } => ("cpu_s_per_gb", report.bytes as f64 / 1e9),
    };
    match row.work {
        Work::Requests { .. } | Work::RequestsBesideBulk { .. } => {
            set("requests_per_second", Some(per_second))
        }
        Work::Connections { .. } => {
            set("connections_per_second", Some(per_second));
            set("first_ms", report.first_ms);
        }
        Work::Bulk { .. } => set("mbit_per_second", Some(report.bytes as f64 * 8.0 / report.seconds / 1e6)),
    }
    if work > 0.0 {
        set(cpu_name, Some(cpu.iter().map(|(_, seconds)| seconds).sum::<f64>() / work));
        for (role, seconds) in cpu {
            set(&format!("{cpu_name}:{role}"), Some(seconds / work));
        }
    }
}
