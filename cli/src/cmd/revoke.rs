//! `tombolo revoke` and `tombolo unrevoke`: a `Revocation` object made or removed by what it is about, and the wait until
//! everybody has enforced it.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tombolo_model::resource::Object;
use tombolo_proto::v1::{ApplyRequest, DeleteRequest, GetRequest};

use super::confirm::{self, Consent};
use super::get::parse;
use crate::admin_client::Admin;
use crate::args::{Connect, Format, Output};
use crate::failure::{Exit, Failure};
use crate::output::{self, objects::text};

const KIND: &str = "Revocation";
/// Enforcement takes tens of milliseconds; asking costs the federator microseconds.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Refuse an identity everywhere, from now on, and cut its live connections
#[derive(Debug, Args)]
#[command(after_help = "\
TARGET is one of
  spiffe://DOMAIN/cluster/EAST/...   one identity
  serial:HEX                         one certificate of this cluster
  node:NAME                          a machine or gateway of this cluster
  cluster:NAME                       this whole cluster, for the linked ones; or a linked one, for this one alone

What is about this cluster's identities holds in every linked cluster. `tombolo get revocations` lists what is revoked,
`tombolo unrevoke TARGET` takes it back.

Examples:
  tombolo revoke spiffe://acme.example/cluster/east/ns/shop/sa/cart --reason 'key leaked' --wait
  tombolo revoke node:db-1 --reason stolen --yes
  tombolo revoke cluster:west --dry-run")]
pub struct RevokeArgs {
    /// Whom to revoke
    target: String,
    /// Why; kept with the revocation
    #[arg(long, default_value = "", value_name = "TEXT")]
    reason: String,
    /// Wait (up to --timeout) until every sidecar and federator that has to has enforced it, and say when they did
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    output: Output,
}

/// Take a revocation back
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo unrevoke spiffe://acme.example/cluster/east/ns/shop/sa/cart
  tombolo unrevoke node:db-1 --yes")]
pub struct UnrevokeArgs {
    /// What was revoked, as `tombolo revoke` was given it, or the name of the revocation
    target: String,
    #[command(flatten)]
    consent: Consent,
}

pub async fn revoke(args: RevokeArgs, connect: Connect) -> Result<Exit, Failure> {
    let RevokeArgs { target, reason, wait, consent, output: Output { format } } = args;
    let (name, mut spec) = target_of(&target)?;
    if !reason.is_empty() {
        spec["reason"] = reason.into();
    }
    let object = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": KIND, "metadata": { "name": name }, "spec": spec,
    });
    // The same check as the federator's, before anybody is asked.
    Object::from_json(object.clone()).map_err(Failure::usage)?;
    let mut admin = Admin::connect(&connect).await?;
    let question =
        format!("Revoke {target}? Its connections are cut at once, in every cluster that it concerns.");
    if !consent.dry_run && !confirm::ask(&question, consent)? {
        return Err(Failure::new("nothing was revoked"));
    }
    let started = Instant::now();
    let request = ApplyRequest { objects_json: vec![object.to_string()], dry_run: consent.dry_run };
    let request = admin.request(request);
    admin.client.apply(request).await.map_err(|status| admin.failed(status))?;
    if consent.dry_run {
        output::line(format_args!("{target} would be revoked (dry run)"))?;
        return Ok(Exit::Done);
    }
    if !wait {
        return match format {
            Format::Table | Format::Wide => {
                output::line(format_args!("{target} is revoked (revocation/{name})"))?;
                Ok(Exit::Done)
            }
            format => shown(&get(&mut admin, &name).await?, format),
        };
    }
    loop {
        let object = get(&mut admin, &name).await?;
        let enforced = condition(&object, "/status") == "True";
        if enforced || started.elapsed() >= connect.timeout {
            if !matches!(format, Format::Table | Format::Wide) {
                shown(&object, format)?;
            } else {
                progress(&object)?;
            }
            if enforced {
                return Ok(Exit::Done);
            }
            let pending = condition(&object, "/message").to_owned();
            return Err(Failure::timed_out(format_args!("{target} is revoked, and {pending}")).remedy(
                "whoever is not connected enforces it before any traffic once it is back; wait longer with --timeout",
            ));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

pub async fn unrevoke(args: UnrevokeArgs, connect: Connect) -> Result<Exit, Failure> {
    let UnrevokeArgs { target, consent } = args;
    // A name has none of the signs of a target.
    let name = if target.contains(':') { target_of(&target)?.0 } else { target.clone() };
    let mut admin = Admin::connect(&connect).await?;
    let question = format!("Take back the revocation of {target}? It is accepted again at once.");
    if !consent.dry_run && !confirm::ask(&question, consent)? {
        return Err(Failure::new("nothing was changed"));
    }
    let request =
        DeleteRequest { kind: KIND.to_owned(), namespace: String::new(), name, dry_run: consent.dry_run };
    let request = admin.request(request);
    let existed = admin.client.delete(request).await.map_err(|status| admin.failed(status))?;
    if !existed.into_inner().existed {
        return Err(Failure::new(format_args!("{target} is not revoked by this cluster"))
            .remedy("`tombolo get revocations` lists what is; each cluster takes back its own"));
    }
    let dry = if consent.dry_run { "would be accepted again (dry run)" } else { "is revoked no more" };
    output::line(format_args!("{target} {dry}"))?;
    Ok(Exit::Done)
}

/// The name and the spec of a target's revocation. The same target always has the same name.
fn target_of(target: &str) -> Result<(String, Value), Failure> {
    let (field, value) = match target.split_once(':') {
        Some(("spiffe", _)) => ("spiffeId", target),
        Some((field @ ("serial" | "node" | "cluster"), value)) => (field, value),
        _ => {
            return Err(Failure::usage(format_args!("{target:?} names nobody that can be revoked"))
                .remedy("give a SPIFFE ID, serial:HEX, node:NAME or cluster:NAME"));
        }
    };
    let last = value.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    let readable: String = last.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
    let hash: String = hex::encode(Sha256::digest(target)).chars().take(8).collect();
    let kind = if field == "spiffeId" { "id" } else { field };
    let readable = readable.trim_matches('-');
    let name =
        if readable.is_empty() { format!("{kind}-{hash}") } else { format!("{kind}-{readable}-{hash}") };
    Ok((name, json!({ field: value })))
}

async fn get(admin: &mut Admin, name: &str) -> Result<Value, Failure> {
    let request = admin.request(GetRequest {
        kind: KIND.to_owned(),
        namespace: String::new(),
        name: name.to_owned(),
        all_namespaces: false,
    });
    let found = parse(admin.client.get(request).await.map_err(|status| admin.failed(status))?.into_inner())?;
    let gone = || Failure::new(format_args!("revocation/{name} was deleted meanwhile"));
    found.into_iter().next().ok_or_else(gone)
}

fn condition<'a>(object: &'a Value, field: &str) -> &'a str {
    text(object, &format!("/status/conditions/0{field}"))
}

fn shown(object: &Value, format: Format) -> Result<Exit, Failure> {
    match format {
        Format::Yaml => output::yaml(object)?,
        Format::Name => output::line(format_args!("revocation/{}", text(object, "/metadata/name")))?,
        _ => output::json(object)?,
    }
    Ok(Exit::Done)
}

/// Cluster by cluster: how many have enforced it, and when the last one did.
fn progress(object: &Value) -> Result<(), Failure> {
    let mut table = output::table(&["cluster", "enforced", "last at", "pending"]);
    for share in object.pointer("/status/clusters").and_then(Value::as_array).into_iter().flatten() {
        let number = |field: &str| share.get(field).and_then(Value::as_u64).unwrap_or_default();
        let pending: Vec<&str> = share
            .get("pending")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        table.add_row([
            output::printable(text(share, "/cluster")),
            format!("{} of {}", number("enforced"), number("members")),
            output::printable(text(share, "/lastEnforced")),
            output::printable(&pending.join(", ")),
        ]);
    }
    output::line(output::table_text(&table))?;
    output::line(output::printable(condition(object, "/message")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_valid_object_of_a_stable_name() {
        for target in [
            "spiffe://acme.example/cluster/east/ns/shop/sa/cart",
            "serial:0a:1b:2c",
            "node:db-1",
            "cluster:west",
        ] {
            let (name, spec) = target_of(target).unwrap();
            let object = json!({
                "apiVersion": "tombolo.dev/v1alpha1", "kind": KIND, "metadata": { "name": name }, "spec": spec,
            });
            Object::from_json(object).unwrap_or_else(|e| panic!("{target}: {e}"));
            assert_eq!(target_of(target).unwrap().0, name);
        }
        for wrong in ["cart", "", "pod:x", "spiffe"] {
            assert!(target_of(wrong).unwrap_err().to_string().contains("serial:HEX"), "{wrong}");
        }
    }
}
