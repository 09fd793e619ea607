//! `tombolo-testbed up`: clusters for people and for suites from outside.

use anyhow::Result;
use clap::Args;
use tombolo_runtime::signals::Signals;

use super::{Dns, Layout, Programs, Testbed, log};

pub const EXAMPLES: &str = "Examples:
  tombolo-testbed up                                    two clusters, east and west, linked
  tombolo-testbed up --clusters 3 --nodes 2             three clusters of two nodes
  tombolo-testbed up --set shared.enabled=true          with more values of the chart
  tombolo-testbed up --bare                             Kubernetes alone

The images that its pods may have are programs of this machine: tombolo (this build), socat, netshoot, busybox, alpine, python,
nginx, curl. Needs root, and what tests/setup.sh installs.";

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
    /// Kubernetes alone, without Tombolo.
    #[arg(long)]
    bare: bool,
    /// A value of Tombolo's chart; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "bare")]
    set: Vec<String>,
    /// What answers for clusterset.local: CoreDNS itself, or nobody.
    #[arg(long, value_enum, default_value_t = Names::Coredns, conflicts_with = "bare")]
    names: Names,
    /// Links that tell no pods' addresses: there are no EndpointSlices of other clusters then, nor names of their pods.
    #[arg(long, conflicts_with = "bare")]
    gateways_only: bool,
}

/// Who knows the names of the cluster set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Names {
    Coredns,
    Nobody,
}

pub fn run(args: &UpArgs) -> Result<()> {
    log();
    crate::capability::netns().map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From the beginning: a signal while clusters start ends them too, in order.
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    let names: Vec<&str> = NAMES.iter().copied().take(args.clusters.into()).collect();
    let testbed = Testbed::start(Programs::find()?, &Layout { clusters: &names, nodes: args.nodes })?;
    if !args.bare {
        println!("installing Tombolo ...");
        let values: Vec<&str> = args.set.iter().map(String::as_str).collect();
        testbed.install(&values)?;
        testbed.linked()?;
        if !args.gateways_only {
            testbed.flatten()?;
        }
        if args.names == Names::Coredns {
            testbed.clusters.iter().try_for_each(|cluster| cluster.set_dns(&Dns::Multicluster))?;
            testbed.clusters.iter().try_for_each(super::Cluster::dns_ready)?;
        }
    }
    let Programs { kubectl, helm, tombolo, .. } = &testbed.programs;
    println!("KUBECONFIG={}", testbed.kubeconfig().display());
    println!("contexts (and names) of the clusters: {}", names.join(","));
    for program in [kubectl, helm, tombolo] {
        println!("program: {}", program.display());
    }
    println!("It stays until Ctrl-C.");
    runtime.block_on(signals.next());
    println!("taking it down ...");
    drop(testbed);
    Ok(())
}
