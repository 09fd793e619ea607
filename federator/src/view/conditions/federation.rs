//! `TrustDomainFederation`: `BundleFetched` (its endpoint gave a bundle, lately) and `Trusted` (there is something to judge
//! its identities by); and its line in `tombolo status`.

use std::time::Duration;

use serde_json::{Value, json};
use tombolo_model::resource::{Condition, Object};
use tombolo_model::status::FederationStatus;

use super::super::View;
use super::super::text::{rfc3339_seconds, span};
use super::{condition, unknown};
use crate::foreign::Federation;

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn age(view: &View<'_>, federation: &Federation) -> Option<Duration> {
    federation.fetched.map(|at| view.since(Duration::from_secs(at)))
}

pub fn of(view: &View<'_>, object: &Object) -> (Vec<Condition>, Value) {
    let name = object.metadata.name.as_str();
    let Some(federation) = view.facts.federations.values().find(|known| known.object == name) else {
        let text = "spec.trustDomain: it is no trust domain";
        return (vec![condition("BundleFetched", false, "Invalid", text)], json!({}));
    };
    let mut status = json!({ "trustDomain": federation.trust_domain.as_str(), "state": state(federation) });
    if let Some(bundle) = &federation.bundle {
        status["sequence"] = bundle.sequence().into();
        status["roots"] = bundle.roots().len().into();
        status["jwtKeys"] = bundle.jwt_keys().into();
    }
    if let Some(at) = federation.fetched {
        status["fetchedAt"] = rfc3339_seconds(at).into();
    }
    if !federation.in_force {
        let text = format!("spec.clusters: {} is not among them", view.facts.cluster.name);
        return (vec![condition("BundleFetched", false, "OtherCluster", text)], status);
    }
    (vec![fetched(view, federation), trusted(federation)], status)
}

fn fetched(view: &View<'_>, federation: &Federation) -> Condition {
    let heard = match age(view, federation) {
        Some(age) => format!("fetched {} ago", span(age)),
        None => "never fetched".to_owned(),
    };
    match &federation.error {
        Some((kind, error)) => {
            let held = if federation.bundle.is_some() { "what is held stays" } else { "nothing is held" };
            condition("BundleFetched", false, reason(kind), format!("{error}; {heard}, {held}"))
        }
        None if federation.fetched.is_some() => condition("BundleFetched", true, "Fetched", heard),
        None => unknown("BundleFetched", "Pending", "it is asked for"),
    }
}

fn trusted(federation: &Federation) -> Condition {
    match &federation.bundle {
        None => condition("Trusted", false, "NoBundle", "no bundle is held: nobody of it is believed"),
        Some(bundle) if bundle.is_empty() => {
            let text = "its bundle is empty: everything of it is revoked";
            condition("Trusted", false, "EmptyBundle", text)
        }
        Some(bundle) => {
            let (roots, keys) = (bundle.roots().len(), bundle.jwt_keys());
            let text = format!("bundle {}: {roots} roots, {keys} JWT keys", bundle.sequence());
            let reason = if federation.fetched.is_some() { "Fetched" } else { "Initial" };
            condition("Trusted", true, reason, text)
        }
    }
}

/// In CamelCase; a closed set, as [`crate::foreign::client::FetchError::kind`] and
/// [`crate::foreign::BundleRefusal::kind`] are.
fn reason(kind: &str) -> &'static str {
    match kind {
        "sequence_back" => "SequenceWentBack",
        "other_trust_domain" => "OtherTrustDomain",
        "malformed" => "MalformedBundle",
        "too_large" => "TooLarge",
        "redirect" => "Redirected",
        "tls" | "no_bundle" => "NotBelieved",
        "timed_out" => "TimedOut",
        _ => "FetchFailed",
    }
}

fn state(federation: &Federation) -> &'static str {
    match &federation.bundle {
        _ if !federation.in_force => "elsewhere",
        None => "unknown",
        Some(bundle) if bundle.is_empty() => "empty",
        Some(_) if federation.fetched.is_some() => "fetched",
        Some(_) => "initial",
    }
}

pub fn all(view: &View<'_>) -> Vec<FederationStatus> {
    let shown = view.facts.federations.values().map(|federation| {
        let bundle = federation.bundle.as_deref();
        let millis = |age: Duration| u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        FederationStatus {
            name: federation.object.clone(),
            trust_domain: federation.trust_domain.to_string(),
            profile: federation.spec.bundle_endpoint_profile.profile.clone(),
            state: state(federation).to_owned(),
            sequence: bundle.map_or(0, |bundle| bundle.sequence()),
            roots: count(bundle.map_or(0, |bundle| bundle.roots().len())),
            jwt_keys: count(bundle.map_or(0, |bundle| bundle.jwt_keys())),
            age_ms: age(view, federation).map(millis),
            error: federation
                .error
                .as_ref()
                .map(|(_, text)| super::message(text.clone()))
                .unwrap_or_default(),
        }
    });
    shown.collect()
}
