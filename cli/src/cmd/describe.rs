//! `tombolo describe`: one object with its conditions, spec and status.

use clap::Args;
use tombolo_runtime::clock;

use super::get::{Scope, parse};
use crate::admin_client::Admin;
use crate::args::Connect;
use crate::failure::{Exit, Failure};
use crate::kinds;
use crate::output::{self, objects};

/// Show objects with their conditions, spec and status
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo describe serviceimport checkout -n shop
  tombolo describe clusterlink west
  tombolo describe fop -A")]
pub struct DescribeArgs {
    /// Kind: singular, plural or short name
    kind: String,
    /// Only this object
    name: Option<String>,
    #[command(flatten)]
    scope: Scope,
}

pub async fn run(args: DescribeArgs, connect: Connect) -> Result<Exit, Failure> {
    let DescribeArgs { kind, name, scope } = args;
    let kind = kinds::parse(&kind)?;
    let request = scope.request(kind, name);
    let what = format!("{} {:?}", kind.kind, request.name);
    let mut admin = Admin::connect(&connect).await?;
    let request = admin.request(request);
    let response = admin.client.get(request).await.map_err(|status| admin.failed(status))?;
    let found = parse(response.into_inner())?;
    if found.is_empty() {
        return Err(Failure::new(format_args!("{what} not found")).remedy("look in all namespaces with -A"));
    }
    let pages: Vec<_> = found.iter().map(|object| objects::describe(object, clock::now().into())).collect();
    output::line(pages.join("\n\n---\n\n"))?;
    Ok(Exit::Done)
}
