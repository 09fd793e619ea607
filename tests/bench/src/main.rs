//! `tombolo-bench`: one command that starts each topology in turn, loads it, and prints a table and JSON.
//!
//! The programs that make load, take it and terminate QUIC at every hop are subcommands of the same binary, so that
//! they can run as processes of their own inside the namespaces (and their CPU can be told apart).

mod capture;
mod certificates;
mod cluster;
mod footprint;
mod forward;
mod issuance;
mod load;
mod measure;
mod mesh;
mod names;
mod origin;
mod plan;
mod quic_hop;
mod report;
mod samples;
mod scale;
mod site;
mod storm;
mod targets;
mod topology;
mod udp;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "tombolo-bench",
    version,
    about = "Measures the mesh's path against other ways to do the same"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the benchmark: every topology, interleaved, medians with minimum and maximum.
    Run(RunArgs),
    /// Lists scenarios, rows and topologies by the names that `run --only` takes.
    List,
    /// Measures a sidecar's memory, and how it takes thousands of clients back after a restart.
    Footprint(footprint::FootprintArgs),
    /// Measures what a gateway forwards with one worker and with two, and that it keeps no state.
    Forward(forward::ForwardArgs),
    /// Measures what captured connections cost against an explicit listener, and what the rules cost everything else.
    Capture(capture::CaptureArgs),
    /// Measures packets per second of a UDP service against two hops of nginx.
    Udp(udp::UdpArgs),
    /// Simulates many linked clusters on one federator's core: memory and time per cluster, export and change.
    Scale(scale::ScaleArgs),
    /// Measures what a federator issues against bare signing with openssl, and a thousand members that come at once.
    Issuance(issuance::IssuanceArgs),
    /// Lets a thousand members that have just started renew at once, over sockets.
    Storm(storm::StormArgs),
    /// Measures answers per second of the mesh's name server against CoreDNS, with the same names and questions.
    Names(names::NamesArgs),
    /// (internal) The mesh's name server, with names made up.
    #[command(hide = true)]
    NamesServer(names::ServerArgs),
    /// (internal) One load generator; prints its report as JSON.
    #[command(hide = true)]
    Load(load::LoadArgs),
    /// (internal) The far end of bulk transfers.
    #[command(hide = true)]
    Origin(origin::OriginArgs),
    /// (internal) Echoes over UDP.
    #[command(hide = true)]
    UdpLoad(udp::UdpLoadArgs),
    /// (internal) The far end of echoes over UDP.
    #[command(hide = true)]
    UdpOrigin(udp::UdpOriginArgs),
    /// (internal) One hop of the path whose gateways terminate QUIC.
    #[command(hide = true)]
    QuicHop(quic_hop::HopArgs),
}

/// What to run and where results go.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// Only scenarios, rows or topologies whose name contains one of these (comma separated; a name of each kind
    /// narrows that kind: `--only local,bulk1,haproxy`).
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Also writes everything measured, each sample too, to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// One pass with short runs: about two minutes, for a look and not for a figure.
    #[arg(long)]
    quick: bool,
    /// Passes over all local topologies (the wide-area ones take one less, at least one).
    #[arg(long)]
    passes: Option<usize>,
    /// Where processes' configuration and logs are kept; by default a temporary directory that is removed.
    #[arg(long)]
    keep: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => plan::run(&args),
        Command::List => plan::list(),
        Command::Footprint(args) => footprint::run(&args),
        Command::Forward(args) => forward::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Udp(args) => udp::run(&args),
        Command::UdpLoad(args) => udp::generate(&args),
        Command::UdpOrigin(args) => udp::origin(&args),
        Command::Scale(args) => scale::run(&args),
        Command::Issuance(args) => issuance::run(&args),
        Command::Storm(args) => storm::run(&args),
        Command::Names(args) => names::run(&args),
        Command::NamesServer(args) => names::serve(&args),
        Command::Load(args) => load::run(&args),
        Command::Origin(args) => origin::run(&args),
        Command::QuicHop(args) => quic_hop::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tombolo-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
