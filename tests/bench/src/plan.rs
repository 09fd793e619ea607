//! Which rows run on which topologies in which scenario, and the run itself: pass after pass, within a pass topology
//! after topology, so that what disturbs the machine for a while disturbs all of them alike.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use tombolo_tests::link::Shape;

use crate::RunArgs;
use crate::measure::{Row, Work, measure, memory};
use crate::report::{Report, Sample};
use crate::site::Site;
use crate::topology::{self, Topology};

struct Scenario {
    name: &'static str,
    title: &'static str,
    /// Loss in each direction of the emulated link; `None`: loopback.
    loss: Option<f64>,
    in_quick: bool,
}

const SCENARIOS: &[Scenario] = &[
    Scenario { name: "local", title: "loopback", loss: None, in_quick: true },
    Scenario { name: "wan-0", title: "50 ms RTT, 300 Mbit/s, no loss", loss: Some(0.0), in_quick: true },
    Scenario {
        name: "wan-0.1",
        title: "50 ms RTT, 300 Mbit/s, 0.1 % loss",
        loss: Some(0.001),
        in_quick: false,
    },
    Scenario { name: "wan-1", title: "50 ms RTT, 300 Mbit/s, 1 % loss", loss: Some(0.01), in_quick: true },
];

impl Scenario {
    fn topologies(&self) -> Vec<Box<dyn Topology>> {
        if self.loss.is_some() { topology::wide_area() } else { topology::local() }
    }

    fn baselines(&self) -> &'static [&'static str] {
        if self.loss.is_some() { topology::WIDE_AREA_BASELINES } else { topology::LOCAL_BASELINES }
    }

    fn rows(&self, quick: bool) -> Vec<Row> {
        let row = |name, title, work, seconds: f64, warm_up: f64| Row { name, title, work, seconds, warm_up };
        if self.loss.is_none() {
            let seconds = if quick { 1.0 } else { 2.0 };
            let requests =
                |name, title, connections| row(name, title, Work::Requests { connections }, seconds, 0.3);
            return vec![
                requests("req1", "1 KiB requests, c=1", 1),
                requests("req32", "1 KiB requests, c=32", 32),
                requests("req256", "1 KiB requests, c=256", 256),
                row(
                    "mixed32",
                    "requests c=32 beside bulk",
                    Work::RequestsBesideBulk { connections: 32 },
                    seconds,
                    0.3,
                ),
                row(
                    "conn16",
                    "new connections, 16 at a time",
                    Work::Connections { at_a_time: 16 },
                    seconds,
                    0.3,
                ),
                row("bulk1", "bulk, 1 stream", Work::Bulk { streams: 1 }, seconds, 0.3),
                row("bulk8", "bulk, 8 streams", Work::Bulk { streams: 8 }, seconds, 0.3),
            ];
        }
        // A window under loss needs several congestion epochs; the slow start before it is not measured.
        let (bulk, warm_up, requests, first) =
            if quick { (2.0, 1.0, 2.0, 0.6) } else { (5.0, 1.5, 3.0, 2.0) };
        vec![
            // First, while nothing is warm: `first_ms` is the cold one.
            row("first", "first byte of a new connection", Work::Connections { at_a_time: 1 }, first, 0.0),
            row("req100", "1 KiB requests, c=100", Work::Requests { connections: 100 }, requests, 0.5),
            row("bulk1", "bulk, 1 stream", Work::Bulk { streams: 1 }, bulk, warm_up),
            row("bulk8", "bulk, 8 streams", Work::Bulk { streams: 8 }, bulk, warm_up),
        ]
    }
}

/// `--only`: an empty kind of name narrows nothing.
struct Selection<'a>(&'a [String]);

impl Selection<'_> {
    fn checked<'a>(only: &'a [String], quick: bool) -> Result<Selection<'a>> {
        for wanted in only {
            let known = SCENARIOS.iter().any(|scenario| {
                scenario.name.contains(wanted.as_str())
                    || scenario.rows(quick).iter().any(|row| row.name.contains(wanted.as_str()))
                    || scenario.topologies().iter().any(|topology| topology.name().contains(wanted.as_str()))
            });
            if !known {
                bail!(
                    "--only {wanted}: no scenario, row or topology is called so; `tombolo-bench list` shows them"
                );
            }
        }
        Ok(Selection(only))
    }

    fn takes(&self, name: &str, all_of_kind: &[String]) -> bool {
        let mut of_kind =
            self.0.iter().filter(|wanted| all_of_kind.iter().any(|n| n.contains(wanted.as_str()))).peekable();
        of_kind.peek().is_none() || of_kind.any(|wanted| name.contains(wanted.as_str()))
    }
}

/// Prints the names.
pub fn list() -> Result<()> {
    for scenario in SCENARIOS {
        println!("{} ({})", scenario.name, scenario.title);
        for row in scenario.rows(false) {
            println!("  row       {:<10} {}", row.name, row.title);
        }
        for topology in scenario.topologies() {
            println!("  topology  {:<22} {}", topology.name(), topology.description());
        }
    }
    Ok(())
}

/// Runs what `args` select and prints the tables.
pub fn run(args: &RunArgs) -> Result<()> {
    let selection = Selection::checked(&args.only, args.quick)?;
    let temporary = tempdir(args.keep.as_deref())?;
    let dir = temporary.path();
    let local_passes = args.passes.unwrap_or(if args.quick { 1 } else { 3 }).max(1);
    let wide_area_passes = local_passes.saturating_sub(1).max(1);
    let mut report = Report::new(args.quick);
    let scenario_names: Vec<String> = SCENARIOS.iter().map(|scenario| scenario.name.to_owned()).collect();
    for scenario in SCENARIOS {
        let named = args.only.iter().any(|wanted| scenario.name.contains(wanted.as_str()));
        if !selection.takes(scenario.name, &scenario_names) || (args.quick && !scenario.in_quick && !named) {
            continue;
        }
        let site_dir = dir.join(scenario.name);
        std::fs::create_dir_all(&site_dir).with_context(|| format!("create {}", site_dir.display()))?;
        let site = match scenario.loss {
            None => Site::local(&site_dir)?,
            Some(loss) => {
                if let Err(reason) = tombolo_tests::capability::netns() {
                    println!("SKIPPED {}: {reason}", scenario.name);
                    report.skipped(scenario.name, &reason);
                    continue;
                }
                Site::wide_area(&site_dir, Shape::wide_area(loss))?
            }
        };
        report.scenario(scenario.name, scenario.title, scenario.baselines());
        let passes = if scenario.loss.is_some() { wide_area_passes } else { local_passes };
        run_scenario(scenario, &site, passes, args, &selection, &mut report)?;
        report.print_scenario(scenario.name);
    }
    if let Some(path) = &args.json {
        report.write_json(path)?;
    }
    Ok(())
}

fn run_scenario(
    scenario: &Scenario,
    site: &Site,
    passes: usize,
    args: &RunArgs,
    selection: &Selection<'_>,
    report: &mut Report,
) -> Result<()> {
    let topologies = scenario.topologies();
    let topology_names: Vec<String> = topologies.iter().map(|topology| topology.name()).collect();
    let rows = scenario.rows(args.quick);
    let row_names: Vec<String> = rows.iter().map(|row| row.name.to_owned()).collect();
    for pass in 0..passes {
        for topology in &topologies {
            let name = topology.name();
            if !selection.takes(&name, &topology_names) {
                continue;
            }
            eprintln!("{} pass {}/{passes}: {name}", scenario.name, pass + 1);
            site.set_congestion_control(topology.kernel_congestion())?;
            let _origins = site.start_origins()?;
            let running = match topology.start(site) {
                Ok(running) => running,
                Err(error) => {
                    // What cannot start is a result too; the others still run.
                    eprintln!("{} {name}: {error:#}", scenario.name);
                    report.skipped(&format!("{} {name}", scenario.name), &format!("{error:#}"));
                    continue;
                }
            };
            report.topology(&name, &topology.description());
            let idle = memory(&running, "idle_");
            for row in rows.iter().filter(|row| selection.takes(row.name, &row_names)) {
                let dropped_before = site.link().map(|link| link.a_to_b().counters().queue_full);
                let outcome = measure(site, &running, row).map(|mut figures| {
                    figures.extend(idle.clone());
                    if let (Some(before), Some(link)) = (dropped_before, site.link()) {
                        let dropped = link.a_to_b().counters().queue_full.saturating_sub(before);
                        figures.insert("link_queue_drops_out".to_owned(), dropped as f64);
                    }
                    figures
                });
                if let Err(error) = &outcome {
                    // A row that fails is a result; the others still run.
                    eprintln!("{} {name} {}: {error:#}", scenario.name, row.name);
                }
                report.add(Sample {
                    scenario: scenario.name.to_owned(),
                    row: row.name.to_owned(),
                    title: row.title.to_owned(),
                    main_figure: row.main_figure().to_owned(),
                    topology: name.clone(),
                    command: row.command(&running),
                    outcome: outcome.map_err(|error| format!("{error:#}")),
                });
            }
        }
    }
    Ok(())
}

/// A directory that goes with its value, unless the user named one.
enum Directory {
    Kept(PathBuf),
    Temporary(PathBuf),
}

impl Directory {
    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) | Self::Temporary(path) => path,
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Self::Temporary(path) = self {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

fn tempdir(keep: Option<&Path>) -> Result<Directory> {
    let directory = match keep {
        Some(path) => Directory::Kept(std::path::absolute(path)?),
        None => {
            Directory::Temporary(std::env::temp_dir().join(format!("tombolo-bench-{}", std::process::id())))
        }
    };
    std::fs::create_dir_all(directory.path())
        .with_context(|| format!("create {}", directory.path().display()))?;
    Ok(directory)
}
