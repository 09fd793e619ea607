//! Real Kubernetes clusters on one machine, without containers' images: see `tests/README.md`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use tombolo_tests::pods::{enter, launch, node};
use tombolo_tests::testbed::up;

#[derive(Parser)]
#[command(
    name = "tombolo-testbed",
    version,
    about = "Real Kubernetes clusters on one machine, with Tombolo in them"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts clusters, prints how they are reached, and stays until Ctrl-C.
    #[command(after_help = up::EXAMPLES)]
    Up(up::UpArgs),
    /// A node of a cluster (started by `up`).
    #[command(hide = true)]
    Node { config: PathBuf },
    /// Becomes a container (started by a node).
    #[command(hide = true)]
    Launch { plan: PathBuf },
    /// Runs a command in a container (started by a node).
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        pod: String,
        #[arg(long)]
        container: String,
        #[arg(last = true)]
        command_line: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("tombolo-testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Up(args) => up::run(&args).map(|()| 0),
        Command::Node { config } => {
            let text = std::fs::read(&config).with_context(|| format!("read {}", config.display()))?;
            let config =
                serde_json::from_slice(&text).with_context(|| format!("read {}", config.display()))?;
            tombolo_tests::testbed::log();
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(node::run(config)).map(|()| 0)
        }
        // One thread each: they enter namespaces.
        Command::Launch { plan } => match launch::run(&plan)? {},
        Command::Enter { dir, pod, container, command_line } => {
            let code = enter::enter(&dir, &pod, &container, &command_line)?;
            Ok(u8::try_from(code).unwrap_or(u8::MAX))
        }
    }
}
