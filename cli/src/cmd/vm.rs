//! `tombolo vm`: machines outside the cluster that join it.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{operate, token};
use crate::args::{Connect, Output, duration};
use crate::failure::{Exit, Failure};

mod deregister;
mod join;
mod leave;
mod place;
mod plan;
mod record;
mod settings;
mod systemd;
mod undo;

/// Let machines outside the cluster join it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo vm token db-1 > token                              where the federator runs
  tombolo vm join --token-file token --workload db.yaml      on the machine, within 15 minutes
  tombolo vm leave                                           on the machine")]
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
    Join(Box<join::JoinArgs>),
    Leave(leave::LeaveArgs),
}

pub fn run(args: VmArgs, connect: Connect) -> Result<Exit, Failure> {
    match args.verb {
        Verb::Token { name, group, ttl, output } => operate(async {
            let made = token::create(token::Role::Vm, name, String::new(), group, ttl, &connect).await?;
            token::print(made, output.format)?;
            Ok(Exit::Done)
        }),
        Verb::Join(args) => join::run(*args, connect.timeout),
        Verb::Leave(args) => leave::run(&args, connect.timeout),
    }
}
