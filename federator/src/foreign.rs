//! Foreign trust domains: what is known of each, and how a bundle that was fetched takes the place of the one before. Pure.
//!
//! [`client`] fetches one bundle, [`task`] fetches each when it is due, `core::federations` keeps them, snapshots hand them
//! to sidecars for the workloads that the object names. Nothing else reads them: handshakes of this federator and of every
//! member know the own trust domain alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_identity::foreign::ForeignBundleError;
use tombolo_identity::{ForeignBundle, SpiffeId, TrustDomain};
use tombolo_model::resource::TrustDomainFederationSpec;
use tombolo_proto::v1;

use crate::facts::{Facts, Role};
use crate::store::{Record, Table};

pub mod client;
mod schedule;
pub mod task;
#[cfg(test)]
mod tests;

/// Of one cluster: their bundles travel in every snapshot (`tombolo_identity::foreign::MAX_BUNDLE_BYTES` each).
pub const MAX_FEDERATIONS: usize = 16;
/// As the specification has it where a bundle does not say (SPIFFE Federation, section 5).
pub const DEFAULT_REFRESH: Duration = Duration::from_secs(300);
/// Endpoints are asked no more often than this, whatever they say, and no less.
const FASTEST_REFRESH: Duration = Duration::from_secs(5);
const SLOWEST_REFRESH: Duration = Duration::from_secs(86_400);
/// Refreshes that may fail before an operator should look.
const PATIENCE: u32 = 3;

/// A foreign trust domain as its object, its endpoint and the attempts since the start say.
#[derive(Clone, PartialEq, Debug)]
pub struct Federation {
    /// Name of the `TrustDomainFederation`.
    pub object: String,
    /// Of the object: what an attempt that was begun before a change brings does not count.
    pub uid: String,
    pub generation: u64,
    pub trust_domain: TrustDomain,
    pub spec: TrustDomainFederationSpec,
    /// In this cluster.
    pub in_force: bool,
    pub bundle: Option<Arc<ForeignBundle>>,
    /// As sidecars get it; empty without a bundle.
    pub bundle_json: Arc<str>,
    /// Unix seconds; `None`: the bundle is the object's own.
    pub fetched: Option<u64>,
    /// Unix seconds since when it could have been fetched: the object's last change, or this process's start.
    pub since: u64,
    /// Kind and text of the last attempt's failure.
    pub error: Option<(&'static str, String)>,
    /// Unix seconds when the audit log last said what its bundle is; `None`: not since the start.
    pub noted: Option<u64>,
    /// It has changed since.
    pub unnoted: bool,
    /// Attempts since the start, by [`client::FetchError::kind`] or `ok`.
    pub attempts: BTreeMap<&'static str, u64>,
}

impl Federation {
    /// How long what was fetched counts as new.
    pub fn refresh(&self) -> Duration {
        let hint = self.bundle.as_ref().and_then(|bundle| bundle.refresh_hint());
        hint.unwrap_or(DEFAULT_REFRESH).clamp(FASTEST_REFRESH, SLOWEST_REFRESH)
    }

    /// Whether its endpoint has given nothing for too long.
    pub fn is_stale(&self, unix: u64) -> bool {
        let last = self.fetched.unwrap_or(self.since);
        self.in_force
            && self.error.is_some()
            && unix.saturating_sub(last) > self.refresh().as_secs() * u64::from(PATIENCE)
    }
}

/// What is kept of a foreign trust domain; one record each, [`key`].
#[derive(Clone, Serialize, Deserialize)]
pub struct BundleRecord {
    /// As it was understood.
    pub document: String,
    /// Unix seconds; `None`: it came with the object.
    pub fetched: Option<u64>,
    /// SHA-256 of the object's own bundle, hex, empty without: another one begins anew.
    pub initial: String,
}
impl Record for BundleRecord {
    const TABLE: Table = Table::Meta;
}

/// Key of a [`BundleRecord`].
pub fn key(trust_domain: &str) -> String {
    format!("foreign-bundle/{trust_domain}")
}

/// Why a bundle that was fetched is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleRefusal {
    #[error(transparent)]
    Document(#[from] ForeignBundleError),
    #[error(
        "the bundle's sequence went back from {held} to {found}: an old copy, or the authority lost its store; if so, apply the object with its present bundle as spec.trustDomainBundle"
    )]
    SequenceBack { held: u64, found: u64 },
}

impl BundleRefusal {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Document(error) => error.kind(),
            Self::SequenceBack { .. } => "sequence_back",
        }
    }
}

/// Reads a document that was fetched and holds it against what is held. One of the same sequence is taken whatever is in
/// it: authorities forget to count (the specification says SHOULD), and TLS has proven whose it is.
pub fn succeed(
    domain: &TrustDomain,
    held: Option<&ForeignBundle>,
    document: &[u8],
) -> Result<ForeignBundle, BundleRefusal> {
    let bundle = ForeignBundle::parse(domain.clone(), document)?;
    let held = held.map_or(0, ForeignBundle::sequence);
    if bundle.sequence() < held {
        return Err(BundleRefusal::SequenceBack { held, found: bundle.sequence() });
    }
    Ok(bundle)
}

/// The bundles that the workload behind a member is told of: by its namespace, or a machine's name. An empty one is left
/// out: that everything of a domain is revoked and that it is unknown mean the same to whoever judges by it.
pub fn for_member(facts: &Facts, id: &SpiffeId) -> Vec<v1::FederatedBundle> {
    let told = facts.federations.values().filter(|federation| {
        let workloads = &federation.spec.workloads;
        let path: Vec<&str> = id.within_cluster().unwrap_or_default().split('/').skip(1).collect();
        let named = match (Role::of(id), path.as_slice()) {
            (Some(Role::Sidecar), ["ns", namespace, ..]) => workloads.include_namespace(namespace),
            (Some(Role::Vm), ["vm", machine]) => workloads.include_machine(machine),
            _ => false,
        };
        named && federation.in_force && federation.bundle.as_ref().is_some_and(|bundle| !bundle.is_empty())
    });
    told.map(|federation| v1::FederatedBundle {
        trust_domain: federation.trust_domain.to_string(),
        bundle_json: federation.bundle_json.to_string(),
    })
    .collect()
}
