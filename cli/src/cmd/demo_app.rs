//! `tombolo demo-app`: the demo's web application. Hidden: no part of the product.

use std::net::SocketAddr;

use clap::Args;

use crate::demo::app;
use crate::failure::{Exit, Failure};

/// The web application of `tombolo demo`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo demo-app --listen 127.0.2.21:8080 --name west")]
pub struct DemoAppArgs {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
    /// The name it answers with
    #[arg(long)]
    name: String,
}

pub fn run(args: DemoAppArgs) -> Result<Exit, Failure> {
    let DemoAppArgs { listen, name } = args;
    let runtime =
        tombolo_runtime::rt::one_thread().map_err(|e| Failure::new(format_args!("cannot start: {e}")))?;
    let served = runtime.block_on(app::serve(listen, name));
    served.map(|()| Exit::Done).map_err(|e| {
        Failure::new(e).at(format_args!("listening on {listen}")).remedy("choose another address")
    })
}
