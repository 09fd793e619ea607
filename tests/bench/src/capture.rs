//! What capturing costs: traffic that is not ours with the rules and without, and a service called at a captured address
//! against the same sidecar's explicit listener. Interleaved, medians of ratios within one pass.
//!
//! Not ours: one client and one origin in two namespaces on a veth pair, in three states of the client's machine: no rules
//! at all (`bare`: the kernel does not even track connections), those of some other tool that translates (`tracked`),
//! and ours (`rules`), with a taken-over address and ports from outside, so that each chain is there.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;
use tombolo_tests::captured::run as run_in;
use tombolo_tests::netns::Namespace;

use crate::measure::{Row, Work, measure};
use crate::mesh::tombolo_binary;
use crate::site::{Side, Site};
use crate::topology::tombolo::{Captured, Tombolo, USUAL};
use crate::topology::{Running, Topology as _};

#[derive(Debug, Clone, clap::Args)]
pub struct CaptureArgs {
    /// Seconds per measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Passes over all states, interleaved.
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// Also writes every sample to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Samples of one row in each state, in the order of the passes.
#[derive(Debug, Default, Serialize)]
struct Samples {
    row: &'static str,
    figure: &'static str,
    states: Vec<(&'static str, Vec<f64>)>,
}

impl Samples {
    fn add(&mut self, state: &'static str, sample: f64) {
        match self.states.iter_mut().find(|(name, _)| *name == state) {
            Some((_, samples)) => samples.push(sample),
            None => self.states.push((state, vec![sample])),
        }
    }

    fn of(&self, state: &str) -> &[f64] {
        self.states.iter().find(|(name, _)| *name == state).map_or(&[], |(_, samples)| samples)
    }

    /// The median over the passes of one state's figure by another's.
    fn ratio(&self, state: &str, by: &str) -> f64 {
        median(self.of(state).iter().zip(self.of(by)).map(|(state, by)| state / by).collect())
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(0.0)
}

fn rows(seconds: f64, bulk: bool) -> Vec<Row> {
    let row = |name, title, work| Row { name, title, work, seconds, warm_up: 0.3 };
    let mut rows = vec![
        row("req32", "requests on 32 connections", Work::Requests { connections: 32 }),
        row("conn16", "new connections, 16 at a time", Work::Connections { at_a_time: 16 }),
    ];
    if bulk {
        rows.insert(0, row("bulk1", "bulk on one stream", Work::Bulk { streams: 1 }));
    }
    rows
}

/// Runs it and prints the figures.
pub fn run(args: &CaptureArgs) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (foreign, own) = (dir.path().join("foreign"), dir.path().join("own"));
    std::fs::create_dir_all(&foreign)?;
    std::fs::create_dir_all(&own)?;
    let not_ours = not_ours(args, &Site::cable(&foreign)?)?;
    let ours = ours(args, &Site::local(&own)?)?;
    println!("\nnot ours, over veth ({} passes of {} s):", args.passes, args.seconds);
    for samples in &not_ours {
        print(samples, &["bare", "tracked", "rules"]);
    }
    println!("\nours: explicit listener and captured address");
    for samples in &ours {
        print(samples, &["explicit", "captured"]);
    }
    let word = |reached: bool| if reached { "REACHED" } else { "MISSED" };
    println!();
    for samples in not_ours.iter().filter(|samples| samples.row == "bulk1") {
        let (bare, tracked) = (samples.ratio("rules", "bare"), samples.ratio("rules", "tracked"));
        println!(
            "{} throughput of what is not ours: {bare:.3} of no rules at all, {tracked:.3} of another tool's, target >= 0.98",
            word(bare >= 0.98)
        );
    }
    for samples in ours.iter().filter(|samples| samples.row == "req32") {
        let ratio = samples.ratio("captured", "explicit");
        println!("{} captured vs explicit, requests/s: {ratio:.3}, target >= 0.95", word(ratio >= 0.95));
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&[&not_ours, &ours])?)?;
    }
    Ok(())
}

fn print(samples: &Samples, states: &[&'static str]) {
    let each = states.iter().map(|state| {
        let mut sorted = samples.of(state).to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (sorted.first().copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
        format!("{state} {:.0} ({least:.0}..{most:.0})", median(sorted))
    });
    println!("  {:<7} {:<24} {}", samples.row, samples.figure, each.collect::<Vec<_>>().join("   "));
}

fn not_ours(args: &CaptureArgs, site: &Site) -> Result<Vec<Samples>> {
    let _origins = site.start_origins()?;
    let running =
        Running { http: site.origin_http(), bulk: site.origin_bulk(), hops: Vec::new(), support: Vec::new() };
    let machine = site.namespace(Side::Near).context("it takes namespaces")?;
    sample(args, site, true, &[("bare", &running), ("tracked", &running), ("rules", &running)], |state| {
        capture(machine, &["remove"])?;
        // The same text with nothing in it removes the other tool's.
        machine.nft("table ip other\ndelete table ip other\n")?;
        match state {
            "tracked" => machine.nft(
                "table ip other {
                    chain output {
                        type nat hook output priority -100;
                        ip daddr 10.96.0.1 tcp dport 80 dnat to 10.78.0.2:80
                    }
                }",
            ),
            "rules" => {
                let inbound = ["--inbound", "permissive", "--inbound-port", "8080"];
                capture(machine, &[&["apply", "--address", "10.78.0.9:5432"], &inbound[..]].concat())
            }
            _ => Ok(()),
        }
    })
}

fn ours(args: &CaptureArgs, site: &Site) -> Result<Vec<Samples>> {
    let _origins = site.start_origins()?;
    let machine = site.namespace(Side::Near).context("it takes namespaces")?;
    let at = |port| SocketAddr::from(([241, 64, 77, 1], port));
    let captured = Captured { listen: ([127, 0, 0, 1], 7447).into(), http: at(80), bulk: at(81) };
    // Addresses of the virtual range, which the rules route and capture.
    capture(machine, &["apply"])?;
    let explicit =
        Tombolo { max_udp_payload: USUAL, captured: Some(captured), datagrams: false }.start(site)?;
    let taken = Running { http: captured.http, bulk: captured.bulk, hops: Vec::new(), support: Vec::new() };
    sample(args, site, false, &[("explicit", &explicit), ("captured", &taken)], |_| Ok(()))
}

/// Every row in every state, pass by pass; every other pass goes through the states backwards.
fn sample(
    args: &CaptureArgs,
    site: &Site,
    bulk: bool,
    states: &[(&'static str, &Running)],
    enter: impl Fn(&str) -> Result<()>,
) -> Result<Vec<Samples>> {
    let rows = rows(args.seconds, bulk);
    let mut all: Vec<Samples> = rows
        .iter()
        .map(|row| Samples { row: row.name, figure: row.main_figure(), states: Vec::new() })
        .collect();
    for pass in 0..args.passes {
        let mut order: Vec<_> = states.iter().collect();
        if pass % 2 == 1 {
            order.reverse();
        }
        for (state, running) in order {
            eprintln!("pass {}/{}: {state}", pass + 1, args.passes);
            enter(state)?;
            for (row, samples) in rows.iter().zip(&mut all) {
                let figures =
                    measure(site, running, row).with_context(|| format!("{state}, {}", row.name))?;
                let figure = figures.get(row.main_figure()).copied().unwrap_or(0.0);
                samples.add(state, figure);
            }
        }
    }
    Ok(all)
}

/// `tombolo sidecar capture ...` on the client's machine.
fn capture(machine: &Namespace, args: &[&str]) -> Result<()> {
    let program = tombolo_binary()?.display().to_string();
    run_in(machine, &program, &[&["sidecar", "capture"], args].concat(), "")?.ok().map(drop)
}
