//! Foreign trust domains: which objects are taken, what is kept of their bundles, and who is told.

use bytes::Bytes;
use tombolo_identity::TrustDomain;

use super::*;
use crate::foreign::Federation;

fn federation(edit: impl FnOnce(&mut Value)) -> Object {
    let mut spec = json!({
        "trustDomain": "partner.example",
        "bundleEndpointURL": "https://192.0.2.1:8443/",
        "bundleEndpointProfile": { "type": "https_spiffe", "endpointSPIFFEID": "spiffe://partner.example/spire/server" },
        "workloads": { "namespaces": ["shop"], "machines": ["db-1"] },
    });
    edit(&mut spec);
    named("partner", spec)
}

fn named(name: &str, spec: Value) -> Object {
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "TrustDomainFederation",
        "metadata": { "name": name }, "spec": spec,
    }))
}

fn domain() -> TrustDomain {
    "partner.example".parse().unwrap()
}

/// A document with a key that is real.
fn document(sequence: u64) -> String {
    let signer = tombolo_identity::jwt::JwtSigner::generate(name("elsewhere")).unwrap();
    let mut key = signer.authority().to_jwk();
    key["use"] = json!("jwt-svid");
    json!({ "keys": [key], "spiffe_sequence": sequence, "spiffe_refresh_hint": 60 }).to_string()
}

fn known(core: &Core) -> &Federation {
    &core.facts.federations[&domain()]
}

fn fetched(core: &mut Core, document: &str, moment: Moment) -> bool {
    let (uid, generation) = (known(core).uid.clone(), known(core).generation);
    core.bundle_fetched(&domain(), (&uid, generation), Ok(Bytes::from(document.to_owned())), moment)
}

#[test]
fn a_bundle_is_kept_over_restarts_and_goes_with_its_object() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.apply(federation(|_| ()), false, at(1)).unwrap();
    assert!(known(&east.core).bundle.is_none());
    assert!(fetched(&mut east.core, &document(7), at(2)));
    drop(east);

    let mut east = world.start("east", at(3));
    let kept = known(&east.core);
    assert_eq!((kept.fetched, kept.bundle.as_ref().unwrap().sequence()), (Some(UNIX + 2), 7));
    assert!(!fetched(&mut east.core, &document(6), at(4)), "the sequence holds over a restart");
    assert_eq!(known(&east.core).error.as_ref().unwrap().0, "sequence_back");
    assert_eq!(known(&east.core).bundle.as_ref().unwrap().sequence(), 7);
    assert!(!fetched(&mut east.core, "{\"keys\": [", at(5)), "a truncated one");
    assert!(fetched(&mut east.core, "{\"keys\": [], \"spiffe_sequence\": 8}", at(6)));
    assert!(known(&east.core).bundle.as_ref().unwrap().is_empty() && known(&east.core).error.is_none());
    assert_eq!(known(&east.core).attempts["ok"], 1);

    let uid = known(&east.core).uid.clone();
    east.core.delete(&federation(|_| ()).key(), false, at(7)).unwrap();
    assert!(east.core.facts.federations.is_empty());
    east.core.apply(federation(|_| ()), false, at(8)).unwrap();
    assert!(known(&east.core).bundle.is_none(), "applied anew it begins anew");
    let late = east.core.bundle_fetched(&domain(), (&uid, 1), Ok(document(9).into()), at(9));
    assert!(!late && known(&east.core).bundle.is_none(), "what was begun for the one before does not count");
}

#[test]
fn the_objects_own_bundle_is_where_it_begins_and_begins_again() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let with = |sequence| federation(|spec| spec["trustDomainBundle"] = document(sequence).into());
    east.core.apply(with(5), false, at(1)).unwrap();
    assert_eq!(known(&east.core).bundle.as_ref().unwrap().sequence(), 5);
    assert!(fetched(&mut east.core, &document(9), at(2)));
    // The authority has lost its store and counts from one again: the operator says what it has now.
    assert!(!fetched(&mut east.core, &document(2), at(3)));
    east.core.apply(with(1), false, at(4)).unwrap();
    assert_eq!((known(&east.core).bundle.as_ref().unwrap().sequence(), known(&east.core).fetched), (1, None));
    assert!(fetched(&mut east.core, &document(2), at(5)));
    // What was begun before a change does not count.
    let uid = known(&east.core).uid.clone();
    let late = east.core.bundle_fetched(&domain(), (&uid, 1), Ok(document(3).into()), at(6));
    assert!(!late && known(&east.core).bundle.as_ref().unwrap().sequence() == 2);
}

#[test]
fn objects_that_mean_ourselves_or_somebody_twice_are_refused() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.apply(federation(|_| ()), false, at(1)).unwrap();
    let mut refused =
        |object: Object, says: &[&str]| assert_says(&refusal(east.core.apply(object, false, at(2))), says);
    let other = |edit: fn(&mut Value)| {
        let Object { spec, .. } = federation(edit);
        let tombolo_model::resource::Spec::TrustDomainFederation(spec) = spec else { panic!() };
        named("other", serde_json::to_value(spec).unwrap())
    };
    refused(other(|_| ()), &["spec.trustDomain", "partner already"]);
    refused(other(|s| s["trustDomain"] = "acme.example".into()), &["own trust domain", "link token"]);
    refused(
        other(|s| {
            s["trustDomain"] = "b.example".into();
            s["bundleEndpointProfile"]["endpointSPIFFEID"] =
                "spiffe://acme.example/cluster/east/federator".into();
        }),
        &["endpointSPIFFEID", "own trust domain"],
    );
    refused(
        other(|s| {
            s["trustDomain"] = "b.example".into();
            s["trustDomainBundle"] = "{".into();
        }),
        &["spec.trustDomainBundle", "no SPIFFE bundle"],
    );
    for n in 1..crate::foreign::MAX_FEDERATIONS {
        let spec = json!({
            "trustDomain": format!("d{n}.example"), "bundleEndpointURL": "https://a.example",
            "bundleEndpointProfile": { "type": "https_web" },
        });
        east.core.apply(named(&format!("d{n}"), spec), false, at(3)).unwrap();
    }
    let more = json!({ "trustDomain": "z.example", "bundleEndpointURL": "https://a.example", "bundleEndpointProfile": { "type": "https_web" } });
    assert_says(&refusal(east.core.apply(named("z", more), false, at(4))), &["16 foreign trust domains"]);
}

#[test]
fn the_workloads_that_the_object_names_are_told_and_nobody_else_and_no_handshake_knows_it() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.apply(federation(|_| ()), false, at(1)).unwrap();
    assert!(fetched(&mut east.core, &document(7), at(2)));
    let told = |core: &Core, path: &str| {
        let id = format!("spiffe://acme.example/cluster/east{path}").parse().unwrap();
        let told = crate::foreign::for_member(&core.facts, &id);
        assert!(told.iter().all(|bundle| bundle.trust_domain == "partner.example"));
        !told.is_empty()
    };
    let named = ["/ns/shop/sa/web", "/vm/db-1"];
    let others = ["/ns/bank/sa/web", "/vm/db-2", "/gateway/db-1", "/federator", "/ns/shop"];
    assert!(named.iter().all(|path| told(&east.core, path)));
    assert!(!others.iter().any(|path| told(&east.core, path)));
    assert_eq!(east.core.facts.trust.bundle.trust_domain.as_str(), "acme.example");
    assert!(!east.core.facts.trust.bundle_json.contains("jwt-svid"));

    assert!(fetched(&mut east.core, "{\"keys\":[],\"spiffe_sequence\":8}", at(3)));
    assert!(!told(&east.core, "/ns/shop/sa/web"), "an empty one is taken back");
    assert!(fetched(&mut east.core, &document(9), at(4)) && told(&east.core, "/ns/shop/sa/web"));
    east.core.apply(federation(|spec| spec["clusters"] = json!(["west"])), false, at(5)).unwrap();
    assert!(!told(&east.core, "/ns/shop/sa/web"), "it holds in west alone");
}

#[test]
fn the_audit_log_has_what_operators_and_endpoints_did_and_is_not_flooded_by_either() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let said = |core: &Core| -> Vec<String> {
        let (entries, _) = super::audit::whole(core);
        let ours = entries.into_iter().filter(|e| e.action == tombolo_model::audit::Action::Federation);
        ours.map(|entry| format!("{} {}", entry.subject, entry.reason)).collect()
    };
    east.core.apply(federation(|_| ()), false, at(1)).unwrap();
    assert!(
        said(&east.core)[0].contains("trust-domain:partner.example")
            && said(&east.core)[0].contains("applied")
    );
    let same = document(1);
    for second in 2..20 {
        assert!(fetched(&mut east.core, &same, at(second)));
    }
    assert_eq!(said(&east.core).len(), 2, "{:?}", said(&east.core));
    // Another one with every answer: what it is in the end is said when ten minutes are over.
    for second in (20..602).step_by(60) {
        assert!(fetched(&mut east.core, &document(second), at(second)));
    }
    assert_eq!(said(&east.core).len(), 2);
    assert!(fetched(&mut east.core, &document(700), at(602)));
    assert!(said(&east.core)[2].contains("bundle 700"), "{:?}", said(&east.core));
    east.core.delete(&federation(|_| ()).key(), false, at(603)).unwrap();
    assert!(said(&east.core)[3].contains("deleted"));
}
