//! `tombolo apply`: creates or changes objects from manifests.

use std::path::PathBuf;

use clap::Args;
use tombolo_proto::v1::ApplyRequest;

use crate::admin_client::Admin;
use crate::args::Connect;
use crate::failure::{Exit, Failure};
use crate::manifest::{self, Manifest};
use crate::output;

/// Create or change objects from YAML or JSON
#[derive(Debug, Args)]
#[command(after_help = "\
Every file is read and checked before anything is sent. Objects are sent one by one; what one of them gets wrong
does not hold back the others, and makes the command exit with 1.

Examples:
  tombolo apply -f shop.yaml
  tombolo apply -f manifests/ --dry-run
  cat shop.yaml | tombolo apply -f - --context east")]
pub struct ApplyArgs {
    /// File, directory or `-` for standard input; may be repeated
    #[arg(short, long = "filename", required = true, value_name = "FILE|DIR|-")]
    filename: Vec<PathBuf>,
    /// Have the federator check everything, and change nothing
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(args: ApplyArgs, connect: Connect) -> Result<Exit, Failure> {
    let ApplyArgs { filename, dry_run } = args;
    let manifests = manifest::read(&filename)?;
    let mut admin = Admin::connect(&connect).await?;
    let mut refused = 0;
    for manifest in &manifests {
        match one(&mut admin, manifest, dry_run).await {
            Ok(lines) => lines.iter().try_for_each(output::line)?,
            // Without an answer the rest has no chance either.
            Err(failure) if failure.exit == Exit::TimedOut => return Err(failure),
            Err(failure) => {
                refused += 1;
                failure.at(&manifest.place).report();
            }
        }
    }
    Ok(if refused == 0 { Exit::Done } else { Exit::Failed })
}

/// Sends one object; the lines to print.
pub async fn one(admin: &mut Admin, manifest: &Manifest, dry_run: bool) -> Result<Vec<String>, Failure> {
    let request = admin.request(ApplyRequest { objects_json: vec![manifest.json()], dry_run });
    let response =
        admin.client.apply(request).await.map_err(|status| {
            admin.failed(status).at(format_args!("{} {}", manifest.kind(), manifest.name()))
        })?;
    let suffix = if dry_run { " (dry run)" } else { "" };
    let mut lines = Vec::new();
    for result in response.into_inner().results {
        let (kind, name, outcome) = (result.kind.to_ascii_lowercase(), result.name, result.outcome);
        lines.push(output::printable(&format!("{kind}/{name} {outcome}{suffix}")));
        if !result.warning.is_empty() {
            eprintln!("warning: {}: {kind}/{name}: {}", manifest.place, output::printable(&result.warning));
        }
    }
    Ok(lines)
}
