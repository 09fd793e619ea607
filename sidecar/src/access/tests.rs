use serde_json::json;
use tombolo_model::ids::ClusterTag;

use super::*;

fn snapshot(policies: &[(&str, &str, &[&str])]) -> v1::SidecarSnapshot {
    let policy = |(name, spec, services): &(&str, &str, &[&str])| v1::AccessPolicy {
        name: (*name).to_owned(),
        spec_json: (*spec).to_owned(),
        services: services.iter().map(ToString::to_string).collect(),
    };
    v1::SidecarSnapshot {
        access_policies: policies.iter().map(policy).collect(),
        cluster_properties: vec![v1::ClusterProperties {
            cluster: "west".into(),
            properties: [("region".to_owned(), "eu".to_owned())].into(),
        }],
        ..Default::default()
    }
}

fn caller(path: &str) -> PeerIdentity {
    PeerIdentity {
        spiffe_id: format!("spiffe://acme.example/cluster/west{path}").parse().unwrap(),
        cluster: "west".parse().unwrap(),
        tag: ClusterTag::new(2).unwrap(),
        serial: Vec::new(),
        not_after: 0,
        chain_hash: [0; 32],
        issuer_spki: [0; 32],
    }
}

fn read(policies: &[(&str, &str, &[&str])]) -> (Access, Vec<Rejected>) {
    Access::read(&snapshot(policies), &"east".parse().unwrap())
}

fn ask(access: &Access, service: &str) -> Verdict {
    access.decide(&caller("/ns/shop/sa/cart"), &service.parse().unwrap(), 80)
}

#[test]
fn policies_decide_about_the_services_they_were_sent_for_with_the_callers_properties() {
    let spec =
        json!({ "action": "DENY", "rules": [{ "from": [{ "clusterProperties": { "region": "eu" } }] }] });
    let (access, rejected) = read(&[("shop/eu", &spec.to_string(), &["shop/web"])]);
    assert!(rejected.is_empty(), "{rejected:?}");
    assert_eq!(ask(&access, "shop/web").decided_by.policy(), "shop/eu");
    assert!(!ask(&access, "shop/web").allowed && ask(&access, "shop/api").allowed);
    assert_eq!(access.names().len(), 1);
}

#[test]
fn what_can_not_be_read_closes_its_services_unless_it_is_a_dry_run() {
    let later = json!({ "action": "ALLOW", "rules": [{ "requests": [{ "methods": ["GET"] }] }] });
    let unknown = json!({ "action": "ALLOW", "rules": [{}], "sinceVersion2": true });
    let dry = json!({ "action": "AUDIT", "dryRun": true });
    let cases = [
        ("of a later version", "shop/p", later.to_string(), false),
        ("with an unknown field", "shop/p", unknown.to_string(), false),
        ("no JSON", "shop/p", "{".to_owned(), false),
        ("empty", "shop/p", String::new(), false),
        ("nameless", "p", json!({ "action": "ALLOW", "rules": [{}] }).to_string(), false),
        ("a dry run", "shop/p", dry.to_string(), true),
    ];
    for (case, name, spec, open) in cases {
        let (access, rejected) = read(&[(name, &spec, &["shop/web"])]);
        assert_eq!(rejected.len(), 1, "{case}: {rejected:?}");
        assert!(rejected[0].error.to_string().contains(name), "{case}: {rejected:?}");
        assert_eq!(ask(&access, "shop/web").allowed, open, "{case}");
        assert!(ask(&access, "shop/api").allowed, "{case}: others are not affected");
    }
}

#[test]
fn a_service_that_is_none_is_left_out_and_said() {
    let (access, rejected) = read(&[("shop/p", r#"{"action":"ALLOW"}"#, &["web", "shop/web"])]);
    assert!(rejected.len() == 1 && !ask(&access, "shop/web").allowed);
}
