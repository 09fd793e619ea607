//! `tombolo-testbed up`: clusters for people and for suites from outside.

use anyhow::Result;
use clap::Args;
use tombolo_runtime::signals::Signals;

use super::{Layout, Programs, Testbed, log};

pub const EXAMPLES: &str = "Examples:
  tombolo-testbed up                          two clusters, east and west
  tombolo-testbed up --clusters 3 --nodes 2   three clusters of two nodes";

/// Names, in order.
const NAMES: &[&str] = &["east", "west", "north", "south", "centre", "harbour"];

#[derive(Args)]
pub struct UpArgs {
    /// How many clusters.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=6))]
    clusters: u8,
    /// How many nodes each has.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
}

pub fn run(args: &UpArgs) -> Result<()> {
    log();
    crate::capability::netns().map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From the beginning: a signal while clusters start ends them too, in order.
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    let names: Vec<&str> = NAMES.iter().copied().take(args.clusters.into()).collect();
    let testbed = Testbed::start(Programs::find()?, &Layout { clusters: &names, nodes: args.nodes })?;
    println!("KUBECONFIG={}", testbed.kubeconfig().display());
    println!("contexts: {}", names.join(","));
    println!("kubectl: {}", testbed.programs.kubectl.display());
    println!("It stays until Ctrl-C.");
    runtime.block_on(signals.next());
    println!("taking it down ...");
    drop(testbed);
    Ok(())
}
