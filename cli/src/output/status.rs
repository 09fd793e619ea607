//! `tombolo status` for people: one section per part of the cluster. Pure: the time is passed in.

use comfy_table::Table;
use time::OffsetDateTime;
use tombolo_model::resource::Condition;
use tombolo_model::status::{
    ClusterStatus, Consumer, EndpointStatus, ExportStatus, FederationStatus, FederatorStatus, Finding,
    GatewayStatus, IdentityStatus, ImportCluster, ImportStatus, LinkStatus, PathStatus, ShiftStatus,
};

use super::objects::{age, span};
use super::{printable, table, table_text};

/// The whole page. `wide` adds paths, identities in full and older shifts.
pub fn page(status: &ClusterStatus, wide: bool, now: OffsetDateTime) -> String {
    let ClusterStatus {
        api_version: _,
        cluster,
        tag,
        trust_domain,
        time: _,
        federator,
        gateways,
        links,
        exports,
        imports,
        endpoints,
        identities,
        federations,
        findings,
    } = status;
    let FederatorStatus { version, epoch, revision, started_at, overlay } = federator;
    let head = format!("cluster {cluster} (tag {tag}) of {trust_domain}");
    let up = age(started_at, now);
    let federator =
        format!("federator {version} at {overlay}, up {up}, revision {revision} of epoch {epoch}");
    let mut page = format!("{}\n{}", printable(&head), printable(&federator));
    let mut section = |title: &str, table: Table, nothing: &str| {
        page.push_str(&format!("\n\n{title}\n"));
        let text = if table.is_empty() { nothing.to_owned() } else { table_text(&table) };
        page.push_str(&indented(&text));
    };
    if !findings.is_empty() {
        section("NEEDS ATTENTION", finding_table(findings), "nothing");
    }
    section("GATEWAYS", gateway_table(gateways, now), "none: start one with `tombolo gateway`");
    section("LINKS", link_table(links), "none: make one with `tombolo link token`");
    if wide {
        section("PATHS", path_table(links), "none probed yet");
    }
    section("EXPORTS", export_table(exports), "none");
    section("IMPORTS", import_table(imports), "none");
    section("SERVED NOW", consumer_table(imports), "nobody calls an import");
    let shifts = shift_table(imports, if wide { usize::MAX } else { RECENT_SHIFTS }, now);
    if !shifts.is_empty() {
        section("SHIFTS", shifts, "none");
    }
    // Callers that have gone serve nobody: what is issued to them ends by itself.
    let is_gone = |endpoint: &&EndpointStatus| endpoint.services.is_empty() && !endpoint.healthy && !wide;
    let gone = endpoints.iter().filter(is_gone).count();
    let shown: Vec<&EndpointStatus> = endpoints.iter().filter(|endpoint| !is_gone(endpoint)).collect();
    let title = match gone {
        0 => "ENDPOINTS".to_owned(),
        _ => format!("ENDPOINTS ({gone} more without services have gone: --output wide)"),
    };
    section(&title, endpoint_table(&shown, now), "none: start one with `tombolo sidecar`");
    section("IDENTITIES", identity_table(identities, wide), "none");
    if !federations.is_empty() {
        section("FOREIGN TRUST DOMAINS", federation_table(federations), "none");
    }
    page
}

/// Shifts per service in the short page.
const RECENT_SHIFTS: usize = 3;

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

fn row(table: &mut Table, cells: impl IntoIterator<Item = impl AsRef<str>>) {
    table.add_row(cells.into_iter().map(|cell| {
        let cell = printable(cell.as_ref());
        if cell.is_empty() { "-".to_owned() } else { cell }
    }));
}

fn finding_table(findings: &[Finding]) -> Table {
    let mut table = table(&["severity", "reason", "what", "what to do"]);
    for Finding { severity, reason, about: _, message, remedy } in findings {
        row(&mut table, [severity, reason, message, remedy]);
    }
    table
}

fn gateway_table(gateways: &[GatewayStatus], now: OffsetDateTime) -> Table {
    let mut table = table(&["name", "state", "border", "inner", "registered", "last seen"]);
    for GatewayStatus { name, border, inner, state, last_seen, registered_endpoints } in gateways {
        let seen = age(last_seen, now);
        row(&mut table, [name.as_str(), state, border, inner, &registered_endpoints.to_string(), &seen]);
    }
    table
}

fn link_table(links: &[LinkStatus]) -> Table {
    let mut table =
        table(&["peer", "tag", "state", "rtt", "mtu", "loss", "heard", "carrier", "gateways", "reason"]);
    for link in links {
        let LinkStatus {
            peer,
            tag,
            state,
            reason,
            rtt_ms,
            mtu,
            loss_per_mille,
            age_ms,
            gateways,
            carrier,
            paths: _,
        } = link;
        row(
            &mut table,
            [
                peer.as_str(),
                tag,
                state,
                &rtt_ms.map(milliseconds).unwrap_or_default(),
                &mtu.map(|mtu| mtu.to_string()).unwrap_or_default(),
                &loss_per_mille.map(per_mille).unwrap_or_default(),
                &age_ms.map(ago).unwrap_or_default(),
                carrier,
                &gateways.join(","),
                reason,
            ],
        );
    }
    table
}

fn path_table(links: &[LinkStatus]) -> Table {
    let mut table = table(&["peer", "from", "to", "alive", "rtt", "loss", "mtu"]);
    for link in links {
        for PathStatus { from, to, alive, rtt_ms, loss_per_mille, mtu } in &link.paths {
            let alive = if *alive { "yes" } else { "no" };
            let (rtt, loss, mtu) = (milliseconds(*rtt_ms), per_mille(*loss_per_mille), mtu.to_string());
            row(&mut table, [link.peer.as_str(), from, to, alive, &rtt, &loss, &mtu]);
        }
    }
    table
}

fn export_table(exports: &[ExportStatus]) -> Table {
    let mut table = table(&["service", "to", "healthy", "condition", "message"]);
    for ExportStatus { service, export_to, healthy, total, conditions } in exports {
        // What needs attention, else the first.
        let condition = conditions.iter().find(|c| c.needs_attention()).or_else(|| conditions.first());
        let (summary, message) = condition.map(summarised).unwrap_or_default();
        row(
            &mut table,
            [service.as_str(), &export_to.join(","), &format!("{healthy}/{total}"), &summary, &message],
        );
    }
    table
}

fn summarised(condition: &Condition) -> (String, String) {
    let Condition { r#type, status, reason, message } = condition;
    (format!("{type}={status} ({reason})"), message.clone())
}

fn import_table(imports: &[ImportStatus]) -> Table {
    let mut table = table(&["service", "cluster", "healthy", "state", "heard", "policy"]);
    for import in imports {
        for ImportCluster { cluster, healthy, total, state, age_ms } in &import.clusters {
            let policy = if import.policy.is_empty() { "(default)" } else { &import.policy };
            let heard = age_ms.map(ago).unwrap_or_default();
            row(
                &mut table,
                [import.service.as_str(), cluster, &format!("{healthy}/{total}"), state, &heard, policy],
            );
        }
    }
    table
}

/// Which tier serves each caller, and why.
fn consumer_table(imports: &[ImportStatus]) -> Table {
    let mut table = table(&["service", "called by", "tier", "served by", "connections", "streams", "why"]);
    for import in imports {
        for Consumer { sidecar, tier, serving, reason, connections, open_streams } in &import.consumers {
            let served = if serving.is_empty() { "nobody".to_owned() } else { serving.join(",") };
            let (connections, streams) = (connections.to_string(), open_streams.to_string());
            row(
                &mut table,
                [
                    import.service.as_str(),
                    sidecar,
                    &tier_name(*tier),
                    &served,
                    &connections,
                    &streams,
                    reason,
                ],
            );
        }
    }
    table
}

/// Tiers are counted from one for people, as they stand in the policy.
fn tier_name(tier: i32) -> String {
    if tier < 0 { "none".to_owned() } else { (i64::from(tier) + 1).to_string() }
}

fn shift_table(imports: &[ImportStatus], most: usize, now: OffsetDateTime) -> Table {
    let mut table = table(&["service", "caller", "when", "tiers", "to", "reason"]);
    for import in imports {
        for ShiftStatus { sidecar, at, shift } in import.shifts.iter().take(most) {
            let tiers =
                format!("{} -> {}", shift.from_tier.saturating_add(1), shift.to_tier.saturating_add(1));
            let to = shift.clusters.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let when = format!("{} ago", age(at, now));
            row(&mut table, [import.service.as_str(), sidecar, &when, &tiers, &to, &shift.reason]);
        }
    }
    table
}

fn endpoint_table(endpoints: &[&EndpointStatus], now: OffsetDateTime) -> Table {
    let mut table = table(&["id", "holder", "services", "healthy", "address", "last seen", "reason"]);
    for endpoint in endpoints {
        let EndpointStatus {
            id,
            holder,
            spiffe_id: _,
            services,
            healthy,
            reason,
            address,
            last_seen,
            plain,
            weights,
        } = endpoint;
        let healthy = if *healthy { "yes" } else { "no" };
        let plain = (!plain.is_empty()).then(|| format!("last hop plain: {}", plain.join(", ")));
        let reason: Vec<&str> = [Some(reason.as_str()), plain.as_deref()]
            .into_iter()
            .flatten()
            .filter(|r| !r.is_empty())
            .collect();
        let weighted = |service: &String| match weights.get(service) {
            Some(weight) => format!("{service} (weight {weight})"),
            None => service.clone(),
        };
        let services: Vec<String> = services.iter().map(weighted).collect();
        let (services, seen, reason) = (services.join(","), age(last_seen, now), reason.join("; "));
        row(&mut table, [id.as_str(), holder, &services, healthy, address, &seen, &reason]);
    }
    table
}

fn identity_table(identities: &[IdentityStatus], wide: bool) -> Table {
    let mut headers = vec!["role", "identity", "expires in"];
    if wide {
        headers.push("not after");
    }
    let mut table = table(&headers);
    for IdentityStatus { spiffe_id, role, not_after, expires_in_seconds } in identities {
        let expires = if *expires_in_seconds <= 0 { "EXPIRED".to_owned() } else { span(*expires_in_seconds) };
        let mut cells = vec![role.as_str(), spiffe_id, &expires];
        if wide {
            cells.push(not_after);
        }
        row(&mut table, cells);
    }
    table
}

fn federation_table(federations: &[FederationStatus]) -> Table {
    let mut table = table(&[
        "trust domain",
        "state",
        "fetched",
        "sequence",
        "roots",
        "jwt keys",
        "profile",
        "last error",
    ]);
    for federation in federations {
        let FederationStatus {
            name: _,
            trust_domain,
            profile,
            state,
            sequence,
            roots,
            jwt_keys,
            age_ms,
            error,
        } = federation;
        let fetched = age_ms.map(ago).unwrap_or_default();
        let [sequence, roots, keys] =
            [*sequence, u64::from(*roots), u64::from(*jwt_keys)].map(|n| n.to_string());
        row(&mut table, [trust_domain.as_str(), state, &fetched, &sequence, &roots, &keys, profile, error]);
    }
    table
}

fn milliseconds(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.2}ms") } else { format!("{ms:.0}ms") }
}

fn per_mille(loss: u32) -> String {
    format!("{}.{}%", loss / 10, loss % 10)
}

fn ago(ms: u64) -> String {
    if ms < 1_000 {
        format!("{ms}ms ago")
    } else {
        format!("{} ago", span(i64::try_from(ms / 1_000).unwrap_or(i64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use time::format_description::well_known::Rfc3339;
    use tombolo_model::failover::Shift;

    use super::*;

    fn now() -> OffsetDateTime {
        OffsetDateTime::parse("2026-11-24T02:05:00Z", &Rfc3339).unwrap()
    }

    fn status() -> ClusterStatus {
        ClusterStatus {
            cluster: "east".into(),
            tag: "3e1e2a".into(),
            trust_domain: "acme.example".into(),
            federator: FederatorStatus {
                version: "0.1.0".into(),
                started_at: "2026-11-24T02:00:00Z".into(),
                ..Default::default()
            },
            links: vec![LinkStatus {
                peer: "west".into(),
                state: "connected".into(),
                rtt_ms: Some(50.24),
                mtu: Some(1420),
                loss_per_mille: Some(12),
                age_ms: Some(350),
                gateways: vec!["gw-1".into(), "gw-2".into()],
                carrier: "udp".into(),
                ..Default::default()
            }],
            imports: vec![ImportStatus {
                service: "shop/web".into(),
                policy: "web".into(),
                clusters: vec![ImportCluster {
                    cluster: "west".into(),
                    healthy: 0,
                    total: 2,
                    state: "fresh".into(),
                    age_ms: Some(20),
                }],
                consumers: vec![Consumer {
                    sidecar: "client".into(),
                    tier: 1,
                    serving: vec!["east".into()],
                    reason: "west is 0 % healthy, below 50 %".into(),
                    ..Default::default()
                }],
                shifts: vec![ShiftStatus {
                    sidecar: "client".into(),
                    at: "2026-11-24T02:04:30Z".into(),
                    shift: Shift {
                        at_unix_ms: 0,
                        from_tier: 0,
                        to_tier: 1,
                        clusters: vec!["east".parse().unwrap()],
                        reason: "west is 0 % healthy".into(),
                    },
                }],
            }],
            identities: vec![IdentityStatus {
                spiffe_id: "spiffe://acme.example/cluster/east/federator".into(),
                role: "federator".into(),
                expires_in_seconds: -5,
                ..Default::default()
            }],
            federations: vec![FederationStatus {
                name: "partner".into(),
                trust_domain: "partner.example".into(),
                profile: "https_spiffe".into(),
                state: "fetched".into(),
                sequence: 7,
                age_ms: Some(90_000),
                error: "timed out".into(),
                ..FederationStatus::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn the_page_shows_which_tier_serves_and_why() {
        let page = page(&status(), false, now());
        let served =
            page.lines().find(|line| line.contains("client") && line.contains("below 50 %")).unwrap();
        assert_eq!(
            served.split_whitespace().take(4).collect::<Vec<_>>(),
            ["shop/web", "client", "2", "east"],
            "{page}"
        );
        assert!(page.contains("1 -> 2") && page.contains("30s ago"), "{page}");
    }

    #[test]
    fn the_page_shows_links_with_rtt_mtu_and_loss_and_what_has_expired() {
        let page = page(&status(), false, now());
        for expected in ["50ms", "1420", "1.2%", "350ms ago", "EXPIRED", "up 5m", "0/2"] {
            assert!(page.contains(expected), "{expected} is missing:\n{page}");
        }
        assert_eq!(page.lines().next(), Some("cluster east (tag 3e1e2a) of acme.example"));
    }

    #[test]
    fn an_empty_cluster_says_what_to_do_next() {
        let page = page(&ClusterStatus::default(), true, now());
        assert!(page.contains("tombolo link token") && page.contains("tombolo gateway"), "{page}");
    }

    #[test]
    fn a_peers_words_cannot_move_the_cursor() {
        let mut status = status();
        status.links[0].reason = "\u{1b}[2J".into();
        assert!(!page(&status, true, now()).contains('\u{1b}'));
    }

    #[test]
    fn callers_that_have_gone_take_no_lines_and_are_counted() {
        let endpoint = |id: &str, services: &[&str], healthy| EndpointStatus {
            id: id.into(),
            services: services.iter().map(|name| (*name).to_owned()).collect(),
            healthy,
            ..EndpointStatus::default()
        };
        let endpoints = vec![
            endpoint("gone0001", &[], false),
            endpoint("calls002", &[], true),
            endpoint("ill00003", &["shop/web"], false),
        ];
        let status = ClusterStatus { endpoints, ..status() };
        let narrow = page(&status, false, now());
        assert!(narrow.contains("ENDPOINTS (1 more without services have gone: --output wide)"), "{narrow}");
        assert!(!narrow.contains("gone0001") && narrow.contains("calls002") && narrow.contains("ill00003"));
        assert!(page(&status, true, now()).contains("gone0001"));
    }
}
