//! `tombolo delete`: removes objects by name or by manifest, after asking.

use std::path::PathBuf;

use clap::Args;
use tombolo_proto::v1::DeleteRequest;

use super::confirm::{self, Consent};
use crate::admin_client::Admin;
use crate::args::Connect;
use crate::failure::{Exit, Failure};
use crate::{kinds, manifest, output};

/// Remove objects, after asking
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo delete serviceexport web -n shop
  tombolo delete -f shop.yaml --yes
  tombolo delete fop checkout -n shop --dry-run")]
pub struct DeleteArgs {
    /// Kind: singular, plural or short name
    #[arg(required_unless_present = "filename", requires = "name")]
    kind: Option<String>,
    /// Name of the object
    name: Option<String>,
    /// Namespace
    #[arg(short, long, env = "TOMBOLO_NAMESPACE", default_value = "default")]
    namespace: String,
    /// What the manifests name: file, directory or `-`
    #[arg(short, long, conflicts_with = "kind", value_name = "FILE|DIR|-")]
    filename: Vec<PathBuf>,
    #[command(flatten)]
    consent: Consent,
}

pub async fn run(args: DeleteArgs, connect: Connect) -> Result<Exit, Failure> {
    let DeleteArgs { kind, name, namespace, filename, consent } = args;
    let targets: Vec<DeleteRequest> = match (kind, name) {
        (Some(kind), Some(name)) => {
            let kind = kinds::parse(&kind)?;
            let namespace = if kind.namespaced { namespace } else { String::new() };
            vec![DeleteRequest { kind: kind.kind.to_owned(), namespace, name, dry_run: consent.dry_run }]
        }
        _ => manifest::read(&filename)?
            .iter()
            // Later objects lean on earlier ones: removed in reverse.
            .rev()
            .map(|m| DeleteRequest {
                kind: m.kind().to_owned(),
                namespace: m.namespace().to_owned(),
                name: m.name().to_owned(),
                dry_run: consent.dry_run,
            })
            .collect(),
    };
    let names: Vec<_> =
        targets.iter().map(|t| format!("{}/{}", t.kind.to_ascii_lowercase(), t.name)).collect();
    let mut admin = Admin::connect(&connect).await?;
    if !consent.dry_run && !confirm::ask(&format!("Delete {}?", names.join(", ")), consent)? {
        return Err(Failure::new("nothing was deleted"));
    }
    let mut missing = 0;
    for (target, name) in targets.into_iter().zip(names) {
        let request = admin.request(target);
        let existed = admin
            .client
            .delete(request)
            .await
            .map_err(|status| admin.failed(status).at(&name))?
            .into_inner()
            .existed;
        match (existed, consent.dry_run) {
            (true, false) => output::line(format_args!("{name} deleted"))?,
            (true, true) => output::line(format_args!("{name} would be deleted (dry run)"))?,
            (false, _) => {
                missing += 1;
                Failure::new(format_args!("{name} not found")).remedy("check the namespace (-n)").report();
            }
        }
    }
    Ok(if missing == 0 { Exit::Done } else { Exit::Failed })
}
