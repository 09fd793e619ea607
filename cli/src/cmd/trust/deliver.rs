//! `tombolo trust deliver` and `tombolo trust reload`: what one federator missed, and a further intermediate for a running
//! one.

use std::time::Instant;

use clap::Args;
use prost::Message;
use serde_json::json;
use tombolo_identity::rotation::{SignedUpdate, sha256};
use tombolo_proto::v1;

use super::{Place, rotate, time_text};
use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::output;

/// As often as acknowledgements change.
const ASK_EVERY: std::time::Duration = std::time::Duration::from_millis(200);

#[derive(Debug, Args)]
pub struct DeliverArgs {
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
pub struct ReloadArgs {
    /// Have every member renew its SVID now, whoever issued it
    #[arg(long)]
    renew_leaves: bool,
    /// Wait (up to --timeout) until every member shows the intermediate
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    output: Output,
}

pub async fn deliver(args: DeliverArgs, connect: Connect) -> Result<Exit, Failure> {
    let dir = args.place.resolve()?;
    let mut admin = Admin::connect(&connect).await?;
    let held = status(&mut admin).await?;
    let mut delivered = 0;
    for bytes in rotate::updates(&dir)? {
        let read = SignedUpdate::from_bytes(&bytes).and_then(|signed| signed.read()).map_err(Failure::new)?;
        if read.sequence <= held.sequence {
            continue;
        }
        let request = admin.request(v1::UpdateTrustRequest { update: bytes });
        let answer = admin.client.update_trust(request).await.map_err(|status| admin.failed(status))?;
        let sequence = answer.into_inner().sequence;
        output::line(format_args!("the federator of {} trusts by update {sequence} now", held.cluster))?;
        delivered += 1;
    }
    if delivered == 0 {
        output::line(format_args!("the federator of {} has missed nothing", held.cluster))?;
    }
    Ok(Exit::Done)
}

pub async fn reload(args: ReloadArgs, connect: Connect) -> Result<Exit, Failure> {
    let ReloadArgs { renew_leaves, wait, output: Output { format } } = args;
    let mut admin = Admin::connect(&connect).await?;
    let request = admin.request(v1::ReloadTrustRequest { renew_leaves });
    let answer = admin.client.reload_trust(request).await.map_err(|status| admin.failed(status))?;
    let v1::ReloadTrustResponse { changed, issuer_sha256, not_after_unix } = answer.into_inner();
    let started = Instant::now();
    let own = loop {
        let own = own(&status(&mut admin).await?)?;
        let is_over = own.showing == own.members
            && own.holding == own.members
            && sha256(&own.certificate).as_slice() == issuer_sha256;
        if !wait || is_over {
            break own;
        }
        if started.elapsed() >= connect.timeout {
            return Err(Failure::timed_out(format_args!(
                "{} of {} show the intermediate; waiting for {}",
                own.showing,
                own.members,
                output::printable(&own.pending.join(", "))
            ))
            .remedy("whoever is not connected renews when it is back; wait longer with --timeout"));
        }
        tokio::time::sleep(ASK_EVERY).await;
    };
    let not_after = time_text(u64::try_from(not_after_unix).unwrap_or(0));
    let document = json!({
        "version": 1, "cluster": own.cluster, "changed": changed, "notAfter": not_after,
        "members": own.members, "showing": own.showing, "pending": own.pending,
    });
    match format {
        Format::Json => output::json(&document)?,
        Format::Yaml => output::yaml(&document)?,
        Format::Name => output::line(output::printable(&own.cluster))?,
        Format::Table | Format::Wide => {
            let what = if changed { "issues with what is new in" } else { "has found nothing new in" };
            output::line(format_args!(
                "the federator of {} {what} its trust directory (good until {not_after}): {} of {} show it",
                output::printable(&own.cluster),
                own.showing,
                own.members
            ))?;
        }
    }
    Ok(Exit::Done)
}

async fn status(admin: &mut Admin) -> Result<v1::TrustStatusResponse, Failure> {
    let request = admin.request(v1::TrustStatusRequest {});
    Ok(admin.client.trust_status(request).await.map_err(|status| admin.failed(status))?.into_inner())
}

/// How far the federator's own cluster is.
fn own(status: &v1::TrustStatusResponse) -> Result<v1::TrustProgress, Failure> {
    let first = status.progress.first();
    let read = first.and_then(|word| v1::TrustProgress::decode(word.progress.as_slice()).ok());
    read.ok_or_else(|| Failure::new("the federator does not say how far its cluster is"))
}
