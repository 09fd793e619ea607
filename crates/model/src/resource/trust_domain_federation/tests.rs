use serde_json::{Value, json};

use super::*;

fn good() -> Value {
    json!({
        "trustDomain": "partner.example",
        "bundleEndpointURL": "https://spire.partner.example:8443/",
        "bundleEndpointProfile": { "type": "https_spiffe", "endpointSPIFFEID": "spiffe://partner.example/spire/server" },
        "trustDomainBundle": "{}",
        "clusters": ["@self", "west"],
        "workloads": { "namespaces": ["shop"], "machines": ["*"] },
    })
}

fn spec(value: Value) -> TrustDomainFederationSpec {
    serde_json::from_value(value).unwrap()
}

fn errors(value: Value) -> Vec<String> {
    let mut errors = Vec::new();
    spec(value).validate(&mut errors);
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_good_one_is_taken_and_each_wrong_field_is_named() {
    assert_eq!(errors(good()), Vec::<String>::new());
    assert_eq!(serde_json::to_value(spec(good())).unwrap(), good());
    let cases = [
        ("/trustDomain", json!("spiffe://partner.example"), "spec.trustDomain"),
        ("/trustDomain", json!(""), "spec.trustDomain"),
        ("/bundleEndpointURL", json!("http://partner.example"), "spec.bundleEndpointURL"),
        ("/bundleEndpointURL", json!("https://user@partner.example"), "spec.bundleEndpointURL"),
        ("/bundleEndpointProfile/type", json!("https"), "spec.bundleEndpointProfile.type"),
        ("/bundleEndpointProfile/type", json!("https_web"), "spec.bundleEndpointProfile.endpointSPIFFEID"),
        (
            "/bundleEndpointProfile/endpointSPIFFEID",
            json!("spiffe://partner.example"),
            "spec.bundleEndpointProfile.endpointSPIFFEID",
        ),
        (
            "/bundleEndpointProfile/endpointSPIFFEID",
            Value::Null,
            "spec.bundleEndpointProfile.endpointSPIFFEID",
        ),
        ("/trustDomainBundle", json!("x".repeat(70_000)), "spec.trustDomainBundle"),
        ("/clusters/1", json!("No Cluster"), "spec.clusters[1]"),
        ("/workloads/namespaces/0", json!("Shop"), "spec.workloads.namespaces[0]"),
        ("/workloads/machines/0", json!("DB_1"), "spec.workloads.machines[0]"),
    ];
    for (pointer, value, field) in cases {
        let mut wrong = good();
        *wrong.pointer_mut(pointer).unwrap() = value;
        let errors = errors(wrong);
        assert!(errors.len() == 1 && errors[0].starts_with(field), "{field}: {errors:?}");
    }
}

#[test]
fn urls_are_taken_apart_or_refused() {
    let url = |text: &str| EndpointUrl::parse(text).map(|url| (url.host, url.port, url.path));
    let is = |host: &str, port, path: &str| Ok((host.to_owned(), port, path.to_owned()));
    assert_eq!(url("https://a.example"), is("a.example", 443, "/"));
    assert_eq!(url("https://a.example:8443/b/c?d=e"), is("a.example", 8443, "/b/c?d=e"));
    assert_eq!(url("https://a.example?d"), is("a.example", 443, "/?d"));
    assert_eq!(url("https://[2001:db8::1]:8443/"), is("2001:db8::1", 8443, "/"));
    assert_eq!(url("https://[2001:db8::1]"), is("2001:db8::1", 443, "/"));
    let wrong = [
        "",
        "https://",
        "https:///a",
        "http://a",
        "https://a:0",
        "https://a:",
        "https://a:99999",
        "https://a b",
        "https://a#b",
        "https://[a]",
        "https://[::1",
        "https://[::1]x",
        "https://a\r\nb",
        "https://2001:db8::1/",
    ];
    for text in wrong {
        assert!(EndpointUrl::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn it_holds_where_it_says_and_for_whom_it_says() {
    let (east, west): (ClusterName, ClusterName) = ("east".parse().unwrap(), "west".parse().unwrap());
    let mut federation = spec(good());
    assert!(federation.holds_in(&east), "@self");
    federation.clusters = vec!["west".into()];
    assert!(federation.holds_in(&west) && !federation.holds_in(&east));
    federation.clusters.clear();
    assert!(federation.holds_in(&east));
    let workloads = &federation.workloads;
    assert!(workloads.include_namespace("shop") && !workloads.include_namespace("bank"));
    assert!(workloads.include_machine("db-1"));
    assert!(!FederatedWorkloads::default().include_namespace("shop"));
    assert_eq!(federation.endpoint_trust_domain(), Some("partner.example"));
    assert!(federation.warnings().is_empty());
    let bare =
        TrustDomainFederationSpec { workloads: Default::default(), trust_domain_bundle: None, ..federation };
    assert_eq!(bare.warnings().len(), 2);
}
