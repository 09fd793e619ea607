//! What the API server admits by the definitions alone, asked by dry runs with strict field validation, as kubectl asks.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::documents;

use crate::{World, document};

const DOCUMENTATION: &str = include_str!("../../../docs/objects.md");

/// Every YAML block of the documentation that is an object, or a part of one.
fn documented() -> Result<Vec<Value>> {
    let blocks = DOCUMENTATION.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let mut objects = Vec::new();
    for block in blocks {
        for mut object in documents(block)? {
            // "Backends without a sidecar" shows a Workload's spec alone.
            if object.get("kind").is_none() {
                let spec = object.get("spec").cloned().with_context(|| format!("no object: {block}"))?;
                object = document("Workload", "shop", "part", spec);
            }
            objects.push(object);
        }
    }
    Ok(objects)
}

pub fn examples(world: &World) -> Result<()> {
    let all = documented()?;
    for object in &all {
        world.east.api.admit(object).with_context(|| object.to_string())?;
    }
    for kind in [
        "FailoverPolicy",
        "AccessPolicy",
        "Revocation",
        "TrustDomainFederation",
        "Workload",
        "JoinPolicy",
        "ClusterLink",
    ] {
        ensure!(all.iter().any(|object| object["kind"] == kind), "no example of {kind}");
    }
    println!("{} examples are admitted", all.len());
    Ok(())
}

/// Kind, spec, and what the refusal names.
fn wrong() -> Vec<(&'static str, Value, &'static [&'static str])> {
    let tiers = json!([{ "clusters": ["west"] }]);
    let target = json!({ "kind": "Service", "name": "web" });
    let service = |more: Value| {
        let mut service = json!({ "name": "web", "ports": [{ "port": 80 }] });
        for (field, value) in more.as_object().into_iter().flatten() {
            service[field] = value.clone();
        }
        json!({ "services": [service] })
    };
    let allow = |source: Value| json!({ "action": "ALLOW", "rules": [{ "from": [source] }] });
    let federation = |profile: Value| {
        json!({
            "trustDomain": "partner.example", "bundleEndpointURL": "https://spire.partner.example:8443/",
            "bundleEndpointProfile": profile,
        })
    };
    vec![
        ("FailoverPolicy", json!({ "tiers": tiers }), &["spec.targetRef"]),
        ("FailoverPolicy", json!({ "targetRef": target, "tiers": [] }), &["spec.tiers"]),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": [{}] }),
            &["spec.tiers[0].clusters", "matchProperties"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": [{ "clusters": ["West!"] }] }),
            &["spec.tiers[0].clusters[0]"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": [{ "clusters": ["west"], "weights": { "north": 1 } }] }),
            &["spec.tiers[0].weights", "this tier"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": [{ "clusters": ["west"], "weights": { "west": 0 } }] }),
            &["spec.tiers[0].weights", "above 0"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": [{ "clusters": ["west"], "weights": { "west": 1_000_001 } }] }),
            &["spec.tiers[0].weights", "1000000"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": { "kind": "Pod", "name": "web" }, "tiers": tiers }),
            &["spec.targetRef.kind"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": tiers, "failover": { "whenHealthyBelow": "150%" } }),
            &["spec.failover.whenHealthyBelow"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": tiers, "failover": { "whenHealthyBelow": "50%", "for": "3" } }),
            &["spec.failover.for"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": tiers, "failover": { "whenHealthyBelow": "60%" } }),
            &["spec.failback", "back and forth"],
        ),
        (
            "FailoverPolicy",
            json!({ "targetRef": target, "tiers": tiers, "spill": { "maxRequestsPerSecond": 0 } }),
            &["spec.spill.maxRequestsPerSecond"],
        ),
        ("FailoverPolicy", json!({ "targetRef": target, "tiers": tiers, "failovr": {} }), &["spec.failovr"]),
        ("AccessPolicy", json!({}), &["spec.action"]),
        ("AccessPolicy", json!({ "action": "PERMIT" }), &["spec.action"]),
        ("AccessPolicy", json!({ "action": "DENY", "targetRefs": [] }), &["spec.targetRefs"]),
        (
            "AccessPolicy",
            json!({ "action": "DENY", "targetRefs": [{ "kind": "ServiceImport", "name": "web" }] }),
            &["spec.targetRefs", "Service"],
        ),
        ("AccessPolicy", json!({ "action": "DENY", "ports": [] }), &["spec.ports"]),
        ("AccessPolicy", json!({ "action": "DENY", "ports": [70000] }), &["spec.ports[0]"]),
        ("AccessPolicy", json!({ "action": "ALLOW", "rules": [{ "from": [] }] }), &["spec.rules[0].from"]),
        (
            "AccessPolicy",
            json!({ "action": "ALLOW", "rules": [{ "requests": { "methods": ["GET"] } }] }),
            &["spec.rules[0].requests", "reserved"],
        ),
        ("AccessPolicy", allow(json!({})), &["spec.rules[0].from[0]", "identities"]),
        ("AccessPolicy", allow(json!({ "clusters": ["*"] })), &["spec.rules[0].from[0].clusters[0]"]),
        ("AccessPolicy", allow(json!({ "namespaces": ["a/b"] })), &["spec.rules[0].from[0].namespaces[0]"]),
        (
            "AccessPolicy",
            allow(json!({ "identities": ["acme/web"] })),
            &["spec.rules[0].from[0].identities[0]"],
        ),
        (
            "AccessPolicy",
            allow(json!({ "identities": ["spiffe://acme.example"] })),
            &["spec.rules[0].from[0].identities[0]"],
        ),
        (
            "AccessPolicy",
            allow(json!({ "clusterProperties": {} })),
            &["spec.rules[0].from[0].clusterProperties"],
        ),
        (
            "AccessPolicy",
            allow(json!({ "identites": ["spiffe://a.example/x"] })),
            &["spec.rules[0].from[0].identites"],
        ),
        ("Revocation", json!({}), &["spec", "exactly one"]),
        ("Revocation", json!({ "node": "a", "cluster": "west" }), &["spec", "exactly one"]),
        ("Revocation", json!({ "node": "Db_1" }), &["spec.node"]),
        ("Revocation", json!({ "spiffeId": "acme/web" }), &["spec.spiffeId"]),
        ("Revocation", json!({ "serial": "xyz" }), &["spec.serial"]),
        ("Revocation", json!({ "cluster": "No Cluster" }), &["spec.cluster"]),
        ("Revocation", json!({ "node": "a", "reason": "x".repeat(300) }), &["spec.reason"]),
        ("JoinPolicy", json!({}), &["spec", "exactly one"]),
        ("JoinPolicy", json!({ "machines": {}, "serviceAccounts": {} }), &["spec", "exactly one"]),
        ("JoinPolicy", json!({ "machines": { "names": ["DB"] } }), &["spec.machines.names[0]"]),
        (
            "JoinPolicy",
            json!({ "serviceAccounts": { "namespaces": ["a/b"] } }),
            &["spec.serviceAccounts.namespaces[0]"],
        ),
        ("JoinPolicy", json!({ "machines": {}, "services": ["db"] }), &["spec.services[0]"]),
        ("TrustDomainFederation", json!({ "trustDomain": "a.example" }), &["spec.bundleEndpointURL"]),
        (
            "TrustDomainFederation",
            federation(json!({ "type": "https_ftp" })),
            &["spec.bundleEndpointProfile.type"],
        ),
        (
            "TrustDomainFederation",
            federation(json!({ "type": "https_spiffe" })),
            &["spec.bundleEndpointProfile.endpointSPIFFEID"],
        ),
        (
            "TrustDomainFederation",
            federation(json!({ "type": "https_web", "endpointSPIFFEID": "spiffe://a.example/b" })),
            &["spec.bundleEndpointProfile.endpointSPIFFEID"],
        ),
        ("Workload", json!({ "sidecar": "a", "via": "b" }), &["spec.via"]),
        ("Workload", service(json!({ "ports": [] })), &["spec.services[0].ports"]),
        (
            "Workload",
            service(json!({ "ports": [{ "port": 80 }, { "port": 80 }] })),
            &["spec.services[0].ports", "uplicate"],
        ),
        ("Workload", service(json!({ "ports": [{ "port": 70000 }] })), &["spec.services[0].ports[0].port"]),
        (
            "Workload",
            service(json!({ "ports": [{ "port": 80, "protocol": "SCTP" }] })),
            &["spec.services[0].ports[0].protocol"],
        ),
        ("Workload", service(json!({ "healthCheck": {} })), &["spec.services[0].healthCheck", "one of"]),
        (
            "Workload",
            service(json!({ "healthCheck": { "command": { "exec": ["pg_isready"] } } })),
            &["spec.services[0].healthCheck.command.exec", "absolute"],
        ),
        ("Workload", service(json!({ "backends": [{ "address": "db:5432" }] })), &["spec.services", "via"]),
        (
            "Workload",
            json!({ "via": "a", "services": [{ "name": "db", "ports": [{ "port": 1, "targetPort": 2 }], "backends": [{ "address": "db:1" }] }] }),
            &["spec.services[0].ports", "targetPort"],
        ),
        (
            "Workload",
            json!({ "upstreams": [{ "service": "db", "port": 1, "listen": "5432" }] }),
            &["spec.upstreams[0].listen"],
        ),
        (
            "Workload",
            json!({ "upstreams": [{ "service": "db", "port": 1, "listen": "1.2.3.400:5432" }] }),
            &["spec.upstreams[0].listen"],
        ),
        ("ClusterLink", json!({ "gateways": ["gw.west.example:7440"] }), &["spec.tag"]),
        ("ClusterLink", json!({ "tag": "12" }), &["spec.tag"]),
        ("ClusterLink", json!({ "tag": "01a2b3", "gateways": ["gw.west.example"] }), &["spec.gateways[0]"]),
        ("ClusterLink", json!({ "egress": "far" }), &["spec.egress"]),
        (
            "ClusterLink",
            json!({ "allowedGatewayRanges": ["203.0.113.0/33"] }),
            &["spec.allowedGatewayRanges"],
        ),
        ("ClusterLink", json!({ "cluster": "a.b.c" }), &["spec.cluster"]),
    ]
}

pub fn invalid(world: &World) -> Result<()> {
    let mut failed = Vec::new();
    let all = wrong();
    for (kind, spec, named) in &all {
        let namespaced = matches!(*kind, "FailoverPolicy" | "AccessPolicy" | "Workload");
        let object = document(kind, if namespaced { "shop" } else { "" }, "wrong", spec.clone());
        match world.east.api.admit(&object) {
            Ok(()) => failed.push(format!("{kind} {spec} is admitted")),
            Err(error) => {
                let said = format!("{error:#}");
                if let Some(missing) = named.iter().find(|word| !said.contains(**word)) {
                    failed.push(format!("{kind} {spec}: {missing:?} is not in {said}"));
                }
            }
        }
    }
    println!("{} invalid objects are refused", all.len() - failed.len());
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}
