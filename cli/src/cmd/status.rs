//! `tombolo status`: what one cluster's federator knows: links, exports, imports and which tier serves, endpoints, identities.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use serde_json::Value;
use tombolo_model::status::ClusterStatus;
use tombolo_proto::v1::StatusRequest;
use tombolo_runtime::clock;

use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output, duration};
use crate::failure::{Exit, Failure};
use crate::output;

/// Show clusters, links, exports, imports and which tier serves, endpoints and identities
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo status
  tombolo status --context east -o json
  tombolo status --watch --interval 1s")]
pub struct StatusArgs {
    /// Stay, and print again and again
    #[arg(short, long)]
    watch: bool,
    /// How often with --watch
    #[arg(long, default_value = "2s", value_parser = duration)]
    interval: Duration,
    #[command(flatten)]
    output: Output,
}

pub async fn run(args: StatusArgs, connect: Connect) -> Result<Exit, Failure> {
    let StatusArgs { watch, interval, output: Output { format } } = args;
    let mut admin = Admin::connect(&connect).await?;
    loop {
        let status = fetch(&mut admin).await?;
        match format {
            Format::Json if watch => output::json_line(&status)?,
            Format::Json => output::json(&status)?,
            Format::Yaml => output::yaml(&status)?,
            Format::Name => output::line(output::printable(&parsed(status)?.cluster))?,
            Format::Table | Format::Wide => {
                let page =
                    output::status::page(&parsed(status)?, format == Format::Wide, clock::now().into());
                if watch {
                    before_next()?;
                }
                output::line(page)?;
            }
        }
        if !watch {
            return Ok(Exit::Done);
        }
        tokio::time::sleep(interval).await;
    }
}

/// Clears a terminal, so that the page stays in its place; elsewhere pages are told apart by an empty line.
fn before_next() -> Result<(), Failure> {
    const CLEAR_AND_HOME: &str = "\x1b[2J\x1b[H";
    let terminal = std::io::stdout().is_terminal();
    output::line(if terminal { CLEAR_AND_HOME } else { "" })
}

/// The document's parts, for a table: fields that a newer federator adds are for `-o json`.
pub fn parsed(status: Value) -> Result<ClusterStatus, Failure> {
    serde_json::from_value(status).map_err(|e| {
        Failure::new(format_args!("the federator's status is not understood: {e}"))
            .remedy("use the `tombolo` of the federator's version, or -o json")
    })
}

/// The federator's status document.
pub async fn fetch(admin: &mut Admin) -> Result<Value, Failure> {
    let request = admin.request(StatusRequest {});
    let response = admin.client.status(request).await.map_err(|status| admin.failed(status))?.into_inner();
    serde_json::from_str(&response.status_json)
        .map_err(|e| Failure::new(format_args!("the federator sent a status that is no JSON: {e}")))
}
