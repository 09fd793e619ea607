//! What `/metrics` shows of a federator. Labels are bounded sets: roles, states, linked peers, closed reasons.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tombolo_model::sync::Freshness;
use tombolo_overlay::{Overlay, OverlayStats};

use crate::authorities::{self, Authority};
use crate::core::{CoreError, CoreHandle};
use crate::facts::Facts;
use crate::registry::Presence;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MemberLabels {
    pub role: &'static str,
    pub state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PeerLabels {
    pub peer: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct IssueLabels {
    pub call: &'static str,
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CaLabels {
    /// `root` or `intermediate`.
    pub ca: &'static str,
    /// Of a root: the start of its certificate's SHA-256.
    pub fingerprint: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AttestationLabels {
    /// `ok`, or why it was refused.
    pub result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AddressLabels {
    /// `allotted`, `held` or `wanting`.
    pub state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabels {
    /// As `UpdateError::kind`.
    pub reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ForeignLabels {
    pub trust_domain: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FetchLabels {
    pub trust_domain: String,
    /// `ok`, or why there is no bundle.
    pub result: &'static str,
}

/// Handles of every metric; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    members: Family<MemberLabels, Gauge>,
    link_connected: Family<PeerLabels, Gauge>,
    import_age: Family<PeerLabels, Gauge<f64, AtomicU64>>,
    imports: Family<PeerLabels, Gauge>,
    rejected: Family<PeerLabels, Gauge>,
    issued: Family<IssueLabels, Counter>,
    handles: Gauge,
    leases: Gauge,
    objects: Gauge,
    revision: Gauge<u64, AtomicU64>,
    store_writable: Gauge,
    intermediate_expiry: Gauge<f64, AtomicU64>,
    root_expiry: Gauge<f64, AtomicU64>,
    ca_expiry: Family<CaLabels, Gauge<f64, AtomicU64>>,
    attestations: Family<AttestationLabels, Counter>,
    expired_connections: Counter,
    revoked_connections: Counter,
    trust_sequence: Gauge<u64, AtomicU64>,
    trust_refused: Family<RefusalLabels, Counter>,
    foreign_age: Family<ForeignLabels, Gauge<f64, AtomicU64>>,
    foreign_sequence: Family<ForeignLabels, Gauge<u64, AtomicU64>>,
    foreign_roots: Family<ForeignLabels, Gauge>,
    foreign_fetches: Family<FetchLabels, Counter>,
    addresses: Family<AddressLabels, Gauge>,
}

impl Metrics {
    /// Registers everything under `tombolo_federator_`.
    pub fn register(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("tombolo_federator");
        let metrics = Self {
            members: Family::default(),
            link_connected: Family::default(),
            import_age: Family::default(),
            imports: Family::default(),
            rejected: Family::default(),
            issued: Family::default(),
            handles: Gauge::default(),
            leases: Gauge::default(),
            objects: Gauge::default(),
            revision: Gauge::default(),
            store_writable: Gauge::default(),
            intermediate_expiry: Gauge::default(),
            root_expiry: Gauge::default(),
            ca_expiry: Family::default(),
            attestations: Family::default(),
            expired_connections: Counter::default(),
            revoked_connections: Counter::default(),
            trust_sequence: Gauge::default(),
            trust_refused: Family::default(),
            foreign_age: Family::default(),
            foreign_sequence: Family::default(),
            foreign_roots: Family::default(),
            foreign_fetches: Family::default(),
            addresses: Family::default(),
        };
        registry.register("members", "Sidecars, machines and gateways, by state", metrics.members.clone());
        registry.register(
            "link_connected",
            "1 while the peer's federator is watched",
            metrics.link_connected.clone(),
        );
        registry.register(
            "import_age_seconds",
            "Since the peer's federator was last heard",
            metrics.import_age.clone(),
        );
        registry.register("imported_services", "Services that a peer exports to us", metrics.imports.clone());
        registry.register("rejected_records", "Records of a peer that are refused", metrics.rejected.clone());
        registry.register(
            "requests",
            "Requests for identities and links, by outcome",
            metrics.issued.clone(),
        );
        registry.register("handles", "Handles in use", metrics.handles.clone());
        registry.register("leases", "Leased blocks of endpoint ids", metrics.leases.clone());
        registry.register(
            "virtual_addresses",
            "Services with a virtual address, without one, and addresses that are held",
            metrics.addresses.clone(),
        );
        registry.register("objects", "Applied objects", metrics.objects.clone());
        registry.register("revision", "Of the published facts", metrics.revision.clone());
        registry.register("store_writable", "1 while the last commit worked", metrics.store_writable.clone());
        registry.register(
            "intermediate_expiry_seconds",
            "Until the cluster's intermediate expires",
            metrics.intermediate_expiry.clone(),
        );
        registry.register("root_expiry_seconds", "Until the root expires", metrics.root_expiry.clone());
        registry.register(
            "ca_expiry_seconds",
            "Until a CA that this cluster lives on expires: its intermediate and every root that it trusts",
            metrics.ca_expiry.clone(),
        );
        registry.register(
            "attestations",
            "New chains that peers showed on live connections, by result",
            metrics.attestations.clone(),
        );
        registry.register(
            "expired_connections",
            "Connections ended because their peer's identity had, and it showed no new one",
            metrics.expired_connections.clone(),
        );
        registry.register(
            "revoked_connections",
            "Connections cut because their peer is revoked",
            metrics.revoked_connections.clone(),
        );
        registry.register("trust_sequence", "Of the roots that are trusted", metrics.trust_sequence.clone());
        registry.register(
            "trust_updates_refused",
            "Trust updates that were refused, by reason",
            metrics.trust_refused.clone(),
        );
        registry.register(
            "foreign_bundle_age_seconds",
            "Since a foreign trust domain's endpoint last gave its bundle",
            metrics.foreign_age.clone(),
        );
        registry.register(
            "foreign_bundle_sequence",
            "Of the bundle that is held",
            metrics.foreign_sequence.clone(),
        );
        registry.register(
            "foreign_bundle_roots",
            "Roots in the bundle that is held: none, and everything of the trust domain is revoked",
            metrics.foreign_roots.clone(),
        );
        registry.register(
            "foreign_bundle_fetches",
            "Attempts to fetch a foreign bundle, by result",
            metrics.foreign_fetches.clone(),
        );
        metrics
    }

    /// Counts a request for an identity or a link.
    pub fn issued<T>(&self, call: &'static str, outcome: &Result<T, CoreError>) {
        let result = outcome.as_ref().map_or_else(CoreError::kind, |_| "ok");
        self.issued.get_or_create_owned(&IssueLabels { call, result }).inc();
    }

    fn show(&self, facts: &Facts, unix: Duration) {
        self.members.clear();
        let state = |presence: Presence| match presence {
            Presence::Live => "live",
            Presence::Silent => "silent",
            Presence::Left => "left",
        };
        for member in facts.registry.members.values() {
            let labels = MemberLabels { role: member.role.as_str(), state: state(member.presence) };
            self.members.get_or_create_owned(&labels).inc();
        }
        for gateway in facts.registry.gateways.values() {
            let labels = MemberLabels { role: "gateway", state: state(gateway.presence) };
            self.members.get_or_create_owned(&labels).inc();
        }
        self.link_connected.clear();
        self.import_age.clear();
        self.imports.clear();
        self.rejected.clear();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        for (peer, import) in &facts.imports {
            let labels = PeerLabels { peer: peer.to_string() };
            let fresh = import.connected && import.freshness == Freshness::Fresh;
            self.link_connected.get_or_create_owned(&labels).set(i64::from(fresh));
            if let Some(heard) = import.heard {
                self.import_age.get_or_create_owned(&labels).set(unix.saturating_sub(heard).as_secs_f64());
            }
            self.imports.get_or_create_owned(&labels).set(count(import.exports.len()));
            self.rejected.get_or_create_owned(&labels).set(count(import.rejected.len()));
        }
        self.handles.set(count(facts.handles.len()));
        self.leases.set(count(facts.leases.len()));
        self.objects.set(count(facts.objects.len()));
        self.revision.set(facts.revision);
        self.store_writable.set(i64::from(facts.store_writable));
        let left = |end: u64| end as f64 - unix.as_secs_f64();
        self.intermediate_expiry.set(left(facts.trust.intermediate_not_after));
        self.root_expiry.set(left(facts.trust.root_not_after));
        self.ca_expiry.clear();
        for Authority { role, fingerprint, not_after } in authorities::of(facts) {
            self.ca_expiry.get_or_create_owned(&CaLabels { ca: role, fingerprint }).set(left(not_after));
        }
        let addresses = &facts.addresses;
        let states = [
            ("allotted", addresses.of.len()),
            ("held", addresses.held),
            ("wanting", addresses.wanting.len()),
        ];
        for (state, count) in states {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.addresses.get_or_create_owned(&AddressLabels { state }).set(count);
        }
        self.trust_sequence.set(facts.trust.bundle.sequence);
        for (reason, count) in &facts.trust.refused {
            // The facts' counters only grow, and this is their only copy.
            self.trust_refused.get_or_create_owned(&RefusalLabels { reason }).inner().store(*count, Relaxed);
        }
    }

    /// What is known of foreign trust domains; who is not federated any more is not shown any more.
    fn show_foreign(&self, facts: &Facts, unix: Duration) {
        self.foreign_age.clear();
        self.foreign_sequence.clear();
        self.foreign_roots.clear();
        self.foreign_fetches.clear();
        for federation in facts.federations.values() {
            let trust_domain = federation.trust_domain.to_string();
            let labels = ForeignLabels { trust_domain: trust_domain.clone() };
            if let Some(fetched) = federation.fetched {
                let age = unix.saturating_sub(Duration::from_secs(fetched));
                self.foreign_age.get_or_create_owned(&labels).set(age.as_secs_f64());
            }
            if let Some(bundle) = &federation.bundle {
                let roots = i64::try_from(bundle.roots().len()).unwrap_or(i64::MAX);
                self.foreign_sequence.get_or_create_owned(&labels).set(bundle.sequence());
                self.foreign_roots.get_or_create_owned(&labels).set(roots);
            }
            for (result, count) in &federation.attempts {
                let labels = FetchLabels { trust_domain: trust_domain.clone(), result };
                // As for `trust_refused`.
                self.foreign_fetches.get_or_create_owned(&labels).inner().store(*count, Relaxed);
            }
        }
    }

    fn show_overlay(&self, stats: &OverlayStats) {
        for (result, count) in stats.attestations_refused.iter().chain([("ok", stats.attested)]) {
            // The overlay's counters only grow, and this is their only copy.
            self.attestations
                .get_or_create_owned(&AttestationLabels { result })
                .inner()
                .store(count, Relaxed);
        }
        self.expired_connections.inner().store(stats.expired_closed, Relaxed);
        self.revoked_connections.inner().store(stats.revoked_closed, Relaxed);
    }

    /// Shows the newest facts, once a second: scrapes are seconds apart, changes may be milliseconds.
    pub async fn follow(self, core: CoreHandle, overlay: Overlay) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            let facts: Arc<Facts> = core.facts();
            self.show(&facts, core.now().unix);
            self.show_foreign(&facts, core.now().unix);
            self.show_overlay(&overlay.stats());
        }
    }
}
