//! The document of `tombolo status`, section by section.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tombolo_model::failover::Shift;
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::resource::Spec;
use tombolo_model::resource::service_export::ExportTo;
use tombolo_model::resource::workload::DEFAULT_WEIGHT;
use tombolo_model::status::{
    API_VERSION, ClusterStatus, Consumer, EndpointStatus, ExportStatus, FederatorStatus, GatewayStatus,
    IdentityStatus, ImportCluster, ImportStatus, LinkStatus, PathStatus, ShiftStatus,
};

use super::links::{self, PastGateways, Path};
use super::members;
use super::supply::{self, Share};
use super::text::{message, rfc3339, rfc3339_seconds};
use super::{View, conditions, pods};
use crate::authorities;
use crate::exports::{Export, all_exports, exports};
use crate::facts::{IdentityRecord, Role, ShiftRecord};
use crate::policies::policy_for;
use crate::registry::{Gateway, Member, Presence};

/// Shifts shown per service.
const SHIFTS: usize = 10;

pub fn document(view: &View<'_>) -> ClusterStatus {
    let facts = view.facts;
    let cluster = &facts.cluster;
    ClusterStatus {
        api_version: API_VERSION.to_owned(),
        cluster: cluster.name.to_string(),
        tag: cluster.tag.to_string(),
        trust_domain: cluster.trust_domain.as_str().to_owned(),
        time: rfc3339(view.unix),
        federator: FederatorStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            epoch: cluster.epoch.0,
            revision: facts.revision,
            started_at: rfc3339_seconds(cluster.started_unix),
            overlay: facts.federator.map(|federator| federator.address.to_string()).unwrap_or_default(),
        },
        gateways: facts.registry.gateways.values().map(gateway).collect(),
        links: linked_or_named(view).iter().map(|peer| link(view, peer)).collect(),
        exports: all_exports(facts).map(|export| exported(view, &export)).collect(),
        imports: imports(view),
        endpoints: facts.registry.members.values().map(|member| endpoint(view, member)).collect(),
        identities: identities(view),
        federations: conditions::federation::all(view),
        findings: authorities::findings(facts, view.unix)
            .into_iter()
            .chain(pods::findings(view))
            .chain(pods::refused(view))
            .collect(),
    }
}

fn gateway(gateway: &Gateway) -> GatewayStatus {
    let state = match gateway.presence {
        Presence::Live if gateway.draining => "draining",
        // One that drains says so, then closes its connection: its last packets still leave.
        Presence::Left if gateway.draining => "draining",
        Presence::Live => "ready",
        Presence::Left | Presence::Silent => "silent",
    };
    GatewayStatus {
        name: gateway.name.clone(),
        border: gateway.border.to_string(),
        inner: gateway.inner.to_string(),
        state: state.to_owned(),
        last_seen: rfc3339_seconds(gateway.heard_unix),
        registered_endpoints: gateway.registered,
    }
}

/// Linked clusters, and those that a `ClusterLink` names before the link is made.
pub fn linked_or_named(view: &View<'_>) -> BTreeSet<ClusterName> {
    let named = view.facts.objects.values().filter_map(|stored| match &stored.object.spec {
        Spec::ClusterLink(spec) => {
            spec.cluster.as_deref().unwrap_or(&stored.object.metadata.name).parse().ok()
        }
        _ => None,
    });
    view.facts.links.keys().cloned().chain(named).collect()
}

fn link(view: &View<'_>, peer: &ClusterName) -> LinkStatus {
    let standing = links::standing(view, peer);
    let paths = links::paths(view, peer);
    let reachability = links::reachability(view, peer, &paths);
    let best = links::best(&paths);
    let link = view.facts.links.get(peer);
    // The federators may hear each other through one gateway while no probe of another is answered.
    let unreachable = reachability.reachable != Some(true);
    let reason = match standing.message.as_str() {
        "" if unreachable => reachability.message,
        _ => standing.message,
    };
    let carrier = best.map(|path| path.hop.carrier.clone()).unwrap_or_default();
    LinkStatus {
        peer: peer.to_string(),
        tag: link.map(|link| link.tag.to_string()).unwrap_or_default(),
        state: standing.state.to_owned(),
        reason,
        rtt_ms: best.and_then(Path::rtt_ms),
        mtu: best.map(|path| path.hop.mtu).filter(|mtu| *mtu > 0),
        loss_per_mille: best.map(|path| path.hop.loss_per_mille),
        age_ms: standing.age.map(millis),
        gateways: link
            .map(|link| view.facts.peer_gateways(link))
            .unwrap_or_default()
            .into_iter()
            .map(|gateway| if gateway.name.is_empty() { gateway.address.to_string() } else { gateway.name })
            .collect(),
        carrier,
        paths: paths.iter().map(path).chain(links::past_gateways(view, peer).map(past)).collect(),
    }
}

fn past(path: PastGateways<'_>) -> PathStatus {
    PathStatus {
        from: members::holder(&path.member.spiffe_id).to_owned(),
        to: path.hop.peer.clone(),
        alive: path.alive,
        rtt_ms: path.hop.rtt_us as f64 / 1000.0,
        loss_per_mille: path.hop.loss_per_mille,
        mtu: path.hop.mtu,
    }
}

fn path(path: &Path<'_>) -> PathStatus {
    PathStatus {
        from: path.gateway.name.clone(),
        to: path.to().to_owned(),
        alive: path.alive,
        rtt_ms: path.rtt_ms().unwrap_or_default(),
        loss_per_mille: path.hop.loss_per_mille,
        mtu: path.hop.mtu,
    }
}

fn exported(view: &View<'_>, export: &Export<'_>) -> ExportStatus {
    let (healthy, total) = view.local_counts(&export.service);
    ExportStatus {
        service: export.service.to_string(),
        export_to: match &export.to {
            ExportTo::Everyone => vec!["*".to_owned()],
            ExportTo::Clusters(names) => names.iter().map(ToString::to_string).collect(),
        },
        healthy,
        total,
        conditions: conditions::export::of(view, export),
    }
}

/// What peers export to us, what we export, and what is called here.
fn imports(view: &View<'_>) -> Vec<ImportStatus> {
    let mut consumers = consumers(view);
    let imported = view.facts.imports.values().flat_map(|import| import.exports.keys().cloned());
    let exported = exports(view.facts).map(|export| export.service);
    let called = consumers.keys().cloned();
    let services: BTreeSet<ServiceKey> = imported.chain(exported).chain(called).collect();
    services
        .into_iter()
        .map(|service| ImportStatus {
            clusters: supply::shares(view, &service).into_iter().map(import_cluster).collect(),
            policy: policy_for(view.facts, &service)
                .map(|(stored, _)| stored.object.metadata.name.clone())
                .unwrap_or_default(),
            consumers: consumers.remove(&service).unwrap_or_default(),
            shifts: shifts(view, &service),
            service: service.to_string(),
        })
        .collect()
}

fn import_cluster(share: Share) -> ImportCluster {
    let Share { cluster, healthy, total, state, age } = share;
    ImportCluster {
        cluster: cluster.to_string(),
        healthy,
        total,
        state: state.as_str().to_owned(),
        age_ms: age.map(millis),
    }
}

/// Who calls what; a sidecar that has left calls nothing.
fn consumers(view: &View<'_>) -> BTreeMap<ServiceKey, Vec<Consumer>> {
    let mut consumers: BTreeMap<ServiceKey, Vec<Consumer>> = BTreeMap::new();
    let present = view.facts.registry.members.values().filter(|member| member.presence != Presence::Left);
    for member in present {
        for upstream in &member.upstreams {
            let Ok(service) = upstream.service.parse() else { continue };
            let reason = match member.presence {
                Presence::Live => upstream.reason.clone(),
                _ => format!("{} (said before it fell silent)", upstream.reason),
            };
            consumers.entry(service).or_default().push(Consumer {
                sidecar: members::holder(&member.spiffe_id).to_owned(),
                tier: upstream.tier,
                serving: upstream.clusters.clone(),
                reason: message(reason),
                connections: upstream.connections,
                open_streams: upstream.open_streams,
            });
        }
    }
    consumers
}

fn shifts(view: &View<'_>, service: &ServiceKey) -> Vec<ShiftStatus> {
    let recorded = view.facts.shifts.get(&service.to_string());
    let shown = recorded.into_iter().flatten().take(SHIFTS);
    shown
        .map(|record| {
            let ShiftRecord {
                block: _,
                sidecar,
                sequence: _,
                at_unix_ms,
                service: _,
                from_tier,
                to_tier,
                clusters,
                reason,
            } = record;
            ShiftStatus {
                sidecar: sidecar.clone(),
                at: rfc3339(Duration::from_millis(*at_unix_ms)),
                shift: Shift {
                    at_unix_ms: *at_unix_ms,
                    from_tier: *from_tier,
                    to_tier: *to_tier,
                    clusters: clusters.clone(),
                    reason: message(reason),
                },
            }
        })
        .collect()
}

fn endpoint(view: &View<'_>, member: &Member) -> EndpointStatus {
    let members::Verdict { healthy, reason } = members::verdict(view, member);
    EndpointStatus {
        id: members::id(member),
        holder: members::holder(&member.spiffe_id).to_owned(),
        spiffe_id: member.spiffe_id.as_str().to_owned(),
        services: member.services.keys().map(ToString::to_string).collect(),
        healthy,
        reason,
        address: members::address(member),
        last_seen: rfc3339_seconds(member.heard_unix),
        plain: member
            .plain
            .iter()
            .flat_map(|(service, hops)| hops.iter().map(move |hop| format!("{service} at {hop}")))
            .collect(),
        weights: member
            .services
            .iter()
            .filter(|(_, served)| served.weight != DEFAULT_WEIGHT)
            .map(|(service, served)| (service.to_string(), served.weight))
            .collect(),
    }
}

/// The authorities, then the newest SVID of each identity, by role.
fn identities(view: &View<'_>) -> Vec<IdentityStatus> {
    let cluster = &view.facts.cluster;
    let authority = format!("spiffe://{}", cluster.trust_domain.as_str());
    let trust = &view.facts.trust;
    let authorities = [("root", trust.root_not_after), ("intermediate", trust.intermediate_not_after)];
    let known = authorities.into_iter().filter(|(_, not_after)| *not_after > 0);
    let mut shown: Vec<_> =
        known.map(|(role, not_after)| identity(view, &authority, role, not_after)).collect();

    let mut newest: BTreeMap<(Role, &str), &IdentityRecord> = BTreeMap::new();
    // A provisional lease comes with no SVID.
    let issued =
        view.facts.identities.values().filter(|record| record.role != Role::Provisional && !record.workload);
    for record in issued {
        let age = |record: &IdentityRecord| (record.issued_unix, record.not_after);
        let kept = newest.entry((record.role, &record.spiffe_id)).or_insert(record);
        if age(record) > age(kept) {
            *kept = record;
        }
    }
    shown.extend(
        newest.iter().map(|((role, id), record)| identity(view, id, role.as_str(), record.not_after)),
    );
    shown
}

fn identity(view: &View<'_>, spiffe_id: &str, role: &str, not_after: u64) -> IdentityStatus {
    let signed = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    IdentityStatus {
        spiffe_id: spiffe_id.to_owned(),
        role: role.to_owned(),
        not_after: rfc3339_seconds(not_after),
        expires_in_seconds: signed(not_after).saturating_sub(signed(view.unix.as_secs())),
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
