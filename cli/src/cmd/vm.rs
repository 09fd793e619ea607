//! `tombolo vm`: machines outside the cluster that join it.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::token;
use crate::args::{Connect, Output, duration};
use crate::failure::{Exit, Failure};

/// Let machines outside the cluster join it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo vm token db-1 > token
  tombolo sidecar --name db-1 --join-token-file token ...     on the machine, within 15 minutes")]
pub struct VmArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a one-use token for the named machine; it needs nothing but its own outbound UDP
    #[command(after_help = "\
Examples:
  tombolo vm token db-1
  tombolo vm token db-1 --group databases
  tombolo vm token db-1 --ttl 5m -o json")]
    Token {
        /// Name of the machine: its identity is cluster/<cluster>/vm/<name>
        name: String,
        /// The machine's group, which `JoinPolicy` objects may ask for
        #[arg(long, default_value = "")]
        group: String,
        /// How long the token is good for, at most a day
        #[arg(long, default_value = "15m", value_parser = duration)]
        ttl: Duration,
        #[command(flatten)]
        output: Output,
    },
}

pub async fn run(args: VmArgs, connect: Connect) -> Result<Exit, Failure> {
    let VmArgs { verb: Verb::Token { name, group, ttl, output } } = args;
    let made = token::create(token::Role::Vm, name, String::new(), group, ttl, &connect).await?;
    token::print(made, output.format)?;
    Ok(Exit::Done)
}
