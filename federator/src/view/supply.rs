//! Who serves a service: each cluster's share, how fresh it is, and the sentence about it.

use std::time::Duration;

use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::sync::Freshness;

use super::View;
use super::text::{listed, span};
use crate::exports;

/// How far a share can be believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShareState {
    Local,
    Fresh,
    Stale,
    Expired,
}

impl ShareState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Fresh => "fresh",
            Self::Stale => "stale",
            Self::Expired => "expired",
        }
    }
    /// Whether traffic may go there.
    pub fn counts(self) -> bool {
        self != Self::Expired
    }
}

/// One cluster's share of a service.
#[derive(Clone, PartialEq, Debug)]
pub struct Share {
    pub cluster: ClusterName,
    pub healthy: u32,
    pub total: u32,
    pub state: ShareState,
    /// Since the peer was last heard; `None` for the own cluster and one that never was.
    pub age: Option<Duration>,
}

/// Every cluster that serves a service or exports it to us; the own one first.
pub fn shares(view: &View<'_>, service: &ServiceKey) -> Vec<Share> {
    let (healthy, total) = view.local_counts(service);
    let own = (total > 0 || exports::export_of(view.facts, service).is_some()).then(|| Share {
        cluster: view.facts.cluster.name.clone(),
        healthy,
        total,
        state: ShareState::Local,
        age: None,
    });
    let peers = view.facts.imports.iter().filter_map(|(peer, import)| {
        let exported = import.exports.get(service)?;
        // What is left of a peer that is linked no more is no supply.
        let linked = view.facts.links.get(peer).is_some_and(|link| link.is_live());
        let state = match import.freshness {
            _ if !linked => ShareState::Expired,
            Freshness::Fresh => ShareState::Fresh,
            Freshness::Stale => ShareState::Stale,
            Freshness::Expired => ShareState::Expired,
        };
        Some(Share {
            cluster: peer.clone(),
            healthy: exported.healthy,
            total: exported.total,
            state,
            age: import.heard.map(|heard| view.since(heard)),
        })
    });
    own.into_iter().chain(peers).collect()
}

/// `east 1/1 (local), west 0/2 (stale, heard 5s ago)`.
pub fn sentence(shares: &[Share]) -> String {
    listed(shares.iter().map(|Share { cluster, healthy, total, state, age }| {
        let state = match (state, age) {
            (ShareState::Fresh, _) => String::new(),
            (ShareState::Local, _) | (_, None) => format!(" ({})", state.as_str()),
            (_, Some(age)) => format!(" ({}, heard {} ago)", state.as_str(), span(*age)),
        };
        format!("{cluster} {healthy}/{total}{state}")
    }))
}
