//! `tombolo unlink`: removes a link and everything that came with it, after asking.

use clap::Args;
use tombolo_proto::v1::{GetRequest, UnlinkRequest};

use super::confirm::{self, Consent};
use super::get::parse;
use crate::admin_client::Admin;
use crate::args::Connect;
use crate::failure::{Exit, Failure};
use crate::output;

/// Remove the link to a cluster, and everything that came with it
#[derive(Debug, Args)]
#[command(after_help = "\
Imports of that cluster disappear and connections with it are closed.

Examples:
  tombolo unlink west
  tombolo unlink west --dry-run
  tombolo unlink west --yes")]
pub struct UnlinkArgs {
    /// Name of the cluster
    peer: String,
    #[command(flatten)]
    consent: Consent,
}

pub async fn run(args: UnlinkArgs, connect: Connect) -> Result<Exit, Failure> {
    let UnlinkArgs { peer, consent } = args;
    let mut admin = Admin::connect(&connect).await?;
    if consent.dry_run {
        return dry_run(&mut admin, &peer).await;
    }
    let question = format!("Unlink {peer}? Its services become unreachable here, and ours there.");
    if !confirm::ask(&question, consent)? {
        return Err(Failure::new("nothing was changed"));
    }
    let request = admin.request(UnlinkRequest { peer: peer.clone() });
    let response = admin.client.unlink(request).await.map_err(|status| admin.failed(status))?.into_inner();
    if !response.existed {
        return Err(not_linked(&peer));
    }
    output::line(format_args!("unlinked from {peer}"))?;
    for removed in &response.removed {
        output::line(format_args!("removed {}", output::printable(removed)))?;
    }
    Ok(Exit::Done)
}

/// What would go: the link, and the imports that only that cluster serves or shares.
async fn dry_run(admin: &mut Admin, peer: &str) -> Result<Exit, Failure> {
    if list(admin, "ClusterLink")
        .await?
        .iter()
        .all(|link| output::objects::text(link, "/metadata/name") != peer)
    {
        return Err(not_linked(peer));
    }
    output::line(format_args!("the link to {peer} would be removed (dry run)"))?;
    for import in list(admin, "ServiceImport").await? {
        let clusters: Vec<_> = import
            .pointer("/status/clusters")
            .and_then(serde_json::Value::as_array)
            .into_iter()
            .flatten()
            .map(|cluster| output::objects::text(cluster, "/cluster").to_owned())
            .collect();
        if clusters.iter().any(|cluster| cluster == peer) {
            let (namespace, name) = (
                output::objects::text(&import, "/metadata/namespace"),
                output::objects::text(&import, "/metadata/name"),
            );
            let left: Vec<_> = clusters.iter().filter(|c| *c != peer).map(String::as_str).collect();
            let outcome = if left.is_empty() {
                "would disappear".to_owned()
            } else {
                format!("would be served by {}", left.join(", "))
            };
            output::line(output::printable(&format!(
                "serviceimport {namespace}/{name} {outcome} (dry run)"
            )))?;
        }
    }
    Ok(Exit::Done)
}

pub async fn list(admin: &mut Admin, kind: &str) -> Result<Vec<serde_json::Value>, Failure> {
    let request = admin.request(GetRequest {
        kind: kind.to_owned(),
        namespace: String::new(),
        name: String::new(),
        all_namespaces: true,
    });
    parse(admin.client.get(request).await.map_err(|status| admin.failed(status))?.into_inner())
}

fn not_linked(peer: &str) -> Failure {
    Failure::new(format_args!("there is no link to {peer:?}")).remedy("see `tombolo link list`")
}
