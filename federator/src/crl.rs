//! The CRL of this cluster's intermediate, for verifiers that are not ours (OpenSSL, a load balancer): which serials are
//! revoked (pure), one task that keeps a signed list, and where it is fetched.
//!
//! A `Revocation` names an identity, a machine, a certificate or the cluster; a list names serials. So each certificate
//! that was issued and has not ended is held against what is revoked: the store keeps them until a day after their end,
//! and no longer, which bounds the list.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::time::Instant;
use tombolo_identity::SpiffeId;
use tombolo_identity::crl::RevokedSerial;
use tombolo_identity::revocation::{Revocations, Target};
use tombolo_model::resource::ObjectKey;
use tombolo_model::resource::revocation::trimmed_serial;
use tombolo_overlay::revoking;

use crate::core::CoreHandle;
use crate::facts::Facts;
use crate::revocations;

/// Readers that lose sight of the federator believe the last list for a day, as long as leaves live.
pub const LIFE: Duration = Duration::from_secs(24 * 3600);
/// Signed anew this often though nothing has changed, so that readers who fetch it daily always find most of a day.
const RENEW_EVERY: Duration = Duration::from_secs(3600);
/// Facts may change 300 times a second; a list is fetched by the minute.
const PACE: Duration = Duration::from_secs(1);

/// A revoked certificate, and who has issued it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Revoked {
    pub entry: RevokedSerial,
    issuer: String,
}

impl Revoked {
    /// Whether the key of this SHA-256 (hex) has issued it. What was issued before issuers were noted counts for all.
    pub fn is_of(&self, issuer: &str) -> bool {
        self.issuer.is_empty() || self.issuer == issuer
    }
}

/// Every certificate of this cluster that has not ended at `unix` and is revoked by this cluster's word, by serial.
pub fn revoked(facts: &Facts, unix: u64) -> Vec<Revoked> {
    let mut since: HashMap<Arc<str>, u64> = HashMap::new();
    let mut targets: Vec<(Target, Arc<str>)> = Vec::new();
    let mut serials: HashMap<Vec<u8>, u64> = HashMap::new();
    for (object, wire) in revocations::own(facts) {
        let Ok((target, name)) = revoking::from_wire(&wire) else { continue };
        if target.cluster().as_ref() != Some(&facts.cluster.name) {
            continue;
        }
        let key = ObjectKey { kind: "Revocation", namespace: String::new(), name: object.to_owned() };
        let created = facts.objects.get(&key).map_or(unix, |stored| stored.created_unix);
        match target {
            Target::Serial { serial, .. } => {
                serials.entry(serial).or_insert(created);
            }
            target => {
                since.insert(Arc::clone(&name), created);
                targets.push((target, name));
            }
        }
    }
    let set = Revocations::new(targets);
    let live = facts.identities.values().filter(|record| record.not_after > unix);
    let mut revoked: Vec<Revoked> = live
        .filter_map(|record| {
            let serial = hex::decode(&record.serial).ok()?;
            let by_id = || {
                let id: SpiffeId = record.spiffe_id.parse().ok()?;
                since.get(set.of_id(&id)?).copied()
            };
            // One that is named itself is listed whatever else is known of it.
            let since = serials.remove(trimmed_serial(&serial)).or_else(by_id)?;
            Some(Revoked { entry: RevokedSerial { serial, since }, issuer: record.issuer.clone() })
        })
        .collect();
    // A serial that is not on record: issued before the store was lost, or ended. Listed: it costs nothing.
    revoked.extend(
        serials
            .into_iter()
            .map(|(serial, since)| Revoked { entry: RevokedSerial { serial, since }, issuer: String::new() }),
    );
    revoked.sort();
    revoked
}

/// The newest list, for whoever fetches it; clones share it.
#[derive(Clone, Debug)]
pub struct Published {
    der: Arc<ArcSwapOption<Vec<u8>>>,
    entries: Gauge,
}

impl Published {
    pub fn register(registry: &mut Registry) -> Self {
        let published = Self { der: Arc::default(), entries: Gauge::default() };
        registry.sub_registry_with_prefix("tombolo_federator").register(
            "crl_entries",
            "Certificates that are revoked and have not ended",
            published.entries.clone(),
        );
        published
    }
}

/// `GET /crl.der`.
pub fn routes(published: Published) -> axum::Router {
    axum::Router::new().route("/crl.der", get(fetch)).with_state(published)
}

async fn fetch(State(published): State<Published>) -> Response {
    match published.der.load_full() {
        Some(der) => {
            let headers =
                [(header::CONTENT_TYPE, "application/pkix-crl"), (header::CACHE_CONTROL, "max-age=60")];
            (headers, der.to_vec()).into_response()
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, "no list has been signed yet\n").into_response(),
    }
}

/// Keeps the list: signed at once when what is revoked has changed, and every hour.
pub struct CrlTask {
    pub core: CoreHandle,
    pub published: Published,
}

impl CrlTask {
    /// Until the core is gone.
    pub async fn run(self) {
        let mut facts = self.core.watch();
        let mut listed: Option<(Vec<Revoked>, [u8; 32], Instant)> = None;
        loop {
            let current = facts.borrow_and_update().clone();
            let now = revoked(&current, self.core.now().unix.as_secs());
            let issuer = current.trust.issuer_sha256;
            let good = listed
                .as_ref()
                .is_some_and(|(last, by, at)| *last == now && *by == issuer && at.elapsed() < RENEW_EVERY);
            if !good {
                match self.core.attempt(|core, moment| core.sign_crl(moment)).await {
                    Ok(der) => {
                        self.published.der.store(Some(Arc::new(der)));
                        self.published.entries.set(i64::try_from(now.len()).unwrap_or(i64::MAX));
                        listed = Some((now, issuer, Instant::now()));
                    }
                    Err(error) => tracing::warn!(%error, "the CRL can't be signed; the last one is served"),
                }
            }
            tokio::time::sleep(PACE).await;
            if let Ok(Err(_)) = tokio::time::timeout(RENEW_EVERY / 60, facts.changed()).await {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::facts::{IdentityRecord, Role};
    use crate::view::tests::{Fill, UNIX, east};

    #[test]
    fn every_kind_of_revocation_becomes_the_serials_that_have_not_ended() {
        let mut facts = east();
        let issued = [
            ("a1", "/ns/shop/sa/web", 60, "k1"),
            ("00a2", "/ns/shop/sa/web", 60, "k2"),
            ("a3", "/ns/shop/sa/web", 0, "k1"),
            ("b1", "/vm/db-1", 60, "k1"),
            ("c1", "/ns/shop/sa/cart", 60, ""),
            ("d1", "/federator", 60, "k1"),
        ];
        for (serial, path, left, issuer) in issued {
            let record = IdentityRecord {
                spiffe_id: format!("spiffe://acme.example/cluster/east{path}"),
                role: Role::Sidecar,
                serial: serial.into(),
                issued_unix: UNIX - 1000,
                not_after: UNIX + left,
                workload: false,
                issuer: issuer.into(),
            };
            facts.identities.insert(serial.into(), record);
        }
        let listed = |facts: &Facts| -> Vec<String> {
            revoked(facts, UNIX).iter().map(|revoked| hex::encode(&revoked.entry.serial)).collect()
        };
        assert!(listed(&facts).is_empty());
        let web = "spiffe://acme.example/cluster/east/ns/shop/sa/web";
        let cases = [
            (json!({ "spiffeId": web }), vec!["00a2", "a1"]),
            (json!({ "node": "db-1" }), vec!["b1"]),
            (json!({ "serial": "c1" }), vec!["c1"]),
            (json!({ "serial": "a2" }), vec!["00a2"]),
            (json!({ "serial": "ff01" }), vec!["ff01"]),
            (json!({ "cluster": "east" }), vec!["00a2", "a1", "b1", "c1", "d1"]),
            (json!({ "cluster": "west" }), vec![]),
            (json!({ "spiffeId": web.replace("east", "west") }), vec![]),
        ];
        for (spec, expected) in cases {
            let mut facts = facts.clone();
            facts.apply(json!({
                "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation", "metadata": { "name": "r" },
                "spec": spec,
            }));
            assert_eq!(listed(&facts), expected, "{spec}");
            assert!(revoked(&facts, UNIX).iter().all(|revoked| revoked.entry.since == UNIX - 100));
        }
        let of = |issuer: &str| Revoked {
            entry: RevokedSerial { serial: vec![1], since: 1 },
            issuer: issuer.into(),
        };
        assert!(of("k1").is_of("k1") && of("").is_of("k1") && !of("k2").is_of("k1"));
    }
}
