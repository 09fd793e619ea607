use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}

fn policy(name: &str, spec: Value) -> Policy {
    let spec: AccessPolicySpec = serde_json::from_value(spec).unwrap();
    let mut errors = Vec::new();
    let policy = Policy::read(&format!("shop/{name}"), &"shop".parse().unwrap(), &spec, &mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    policy
}

fn from(action: &str, source: Value) -> Value {
    json!({ "action": action, "rules": [{ "from": [source] }] })
}

/// Asks for shop/web:80, in east; west is in the EU.
fn ask(policies: &[Policy], id: &str) -> Verdict {
    ask_for(policies, id, "shop/web", 80)
}

fn ask_for(policies: &[Policy], id: &str, service: &str, port: u16) -> Verdict {
    let full = format!("spiffe://acme.example/cluster/{id}");
    let of = cluster(id.split('/').next().unwrap());
    let properties: BTreeMap<String, String> = [("region".to_owned(), "eu".to_owned())].into();
    let known = (of.as_str() == "west").then_some(&properties);
    let caller = Caller::new(&full, &of, &cluster("east"), known);
    decide(policies, &caller, &service.parse().unwrap(), port)
}

const CART: &str = "west/ns/shop/sa/cart";
const MACHINE: &str = "west/vm/db-1";
const LOCAL: &str = "east/ns/shop/sa/cart";

#[test]
fn each_kind_of_source_matches_whom_it_names_and_nobody_else() {
    let cases = [
        (json!({ "identities": ["spiffe://acme.example/cluster/west/ns/shop/sa/cart"] }), vec![CART]),
        (json!({ "identities": ["spiffe://acme.example/cluster/west/ns/shop/*"] }), vec![CART]),
        (json!({ "identities": ["spiffe://acme.example/cluster/west/ns/sh/*"] }), vec![]),
        (json!({ "identities": ["spiffe://acme.example/cluster/west/vm/*"] }), vec![MACHINE]),
        (json!({ "identities": ["spiffe://acme.example/cluster/west/ns/shop/sa/cart/*"] }), vec![]),
        (json!({ "identities": ["spiffe://other.example/*"] }), vec![]),
        (json!({ "identities": ["spiffe://acme.example/*"] }), vec![CART, MACHINE, LOCAL]),
        (json!({ "clusters": ["west"] }), vec![CART, MACHINE]),
        (json!({ "clusters": ["@self"] }), vec![LOCAL]),
        (json!({ "clusters": ["@self", "west"] }), vec![CART, MACHINE, LOCAL]),
        (json!({ "namespaces": ["shop"] }), vec![CART, LOCAL]),
        (json!({ "namespaces": ["shop"], "clusters": ["west"] }), vec![CART]),
        (json!({ "namespaces": ["other"], "clusters": ["west"] }), vec![]),
        (json!({ "clusterProperties": { "region": "eu" } }), vec![CART, MACHINE]),
        (json!({ "clusterProperties": { "region": "us" } }), vec![]),
        (json!({ "clusterProperties": { "region": "eu", "tier": "gold" } }), vec![]),
    ];
    for (source, matched) in cases {
        let (allow, deny) =
            ([policy("p", from("ALLOW", source.clone()))], [policy("p", from("DENY", source.clone()))]);
        for id in [CART, MACHINE, LOCAL] {
            assert_eq!(ask(&allow, id).allowed, matched.contains(&id), "ALLOW {source} {id}");
            assert_eq!(ask(&deny, id).allowed, !matched.contains(&id), "DENY {source} {id}");
        }
    }
}

#[test]
fn the_verdict_names_what_decided() {
    let allow = policy(
        "b",
        json!({ "action": "ALLOW", "rules": [
        { "from": [{ "clusters": ["north"] }] }, { "from": [{ "clusters": ["west"] }] } ] }),
    );
    let deny =
        policy("c", from("DENY", json!({ "identities": ["spiffe://acme.example/cluster/west/vm/*"] })));
    let rule = |name: &str, index| DecidedBy::Rule { policy: name.into(), index };
    let cases = [
        (vec![], CART, true, DecidedBy::Export),
        (vec![allow.clone()], CART, true, rule("shop/b", 1)),
        (vec![allow.clone()], LOCAL, false, DecidedBy::NoRule { policy: "shop/b".into() }),
        (vec![allow.clone(), deny.clone()], CART, true, rule("shop/b", 1)),
        (vec![allow.clone(), deny.clone()], MACHINE, false, rule("shop/c", 0)),
        (vec![deny], LOCAL, true, DecidedBy::Export),
        (
            vec![policy("z", json!({ "action": "ALLOW" })), allow],
            LOCAL,
            false,
            DecidedBy::NoRule { policy: "shop/b".into() },
        ),
        (vec![policy("z", json!({ "action": "DENY", "rules": [{}] }))], LOCAL, false, rule("shop/z", 0)),
        (vec![policy("z", json!({ "action": "ALLOW", "rules": [{}] }))], LOCAL, true, rule("shop/z", 0)),
    ];
    for (policies, id, allowed, by) in cases {
        let verdict = ask(&policies, id);
        assert_eq!((verdict.allowed, verdict.decided_by), (allowed, by), "{policies:?} {id}");
    }
    assert_eq!(rule("shop/b", 1).to_string(), "shop/b rules[1]");
    assert_eq!(DecidedBy::Export.policy(), NO_POLICY);
}

#[test]
fn a_policy_has_a_say_only_about_its_services_and_ports() {
    let narrow = [policy(
        "p",
        json!({ "targetRefs": [{ "kind": "Service", "name": "web" }], "ports": [80], "action": "ALLOW" }),
    )];
    for (service, port, allowed) in
        [("shop/web", 80, false), ("shop/web", 81, true), ("shop/api", 80, true), ("bank/web", 80, true)]
    {
        assert_eq!(ask_for(&narrow, CART, service, port).allowed, allowed, "{service} {port}");
    }
    let wide = [policy("p", json!({ "action": "ALLOW" }))];
    for (service, allowed) in [("shop/web", false), ("shop/api", false), ("bank/web", true)] {
        assert_eq!(ask_for(&wide, CART, service, 80).allowed, allowed, "{service}");
    }
}

#[test]
fn dry_runs_say_together_what_they_would_deny() {
    let dry = |name, mut spec: Value| {
        spec["dryRun"] = json!(true);
        policy(name, spec)
    };
    let (west, east) = (json!({ "clusters": ["west"] }), json!({ "clusters": ["east"] }));
    let cases = [
        ("a dry DENY that matches", vec![dry("d", from("DENY", west.clone()))], CART, vec!["shop/d"]),
        ("a dry DENY that does not", vec![dry("d", from("DENY", east.clone()))], CART, vec![]),
        ("a dry ALLOW that does not", vec![dry("a", from("ALLOW", east.clone()))], CART, vec!["shop/a"]),
        (
            "two dry ALLOWs, one of which does",
            vec![dry("a", from("ALLOW", east.clone())), dry("b", from("ALLOW", west.clone()))],
            CART,
            vec![],
        ),
        (
            "an enforced ALLOW that does",
            vec![dry("a", from("ALLOW", east.clone())), policy("b", from("ALLOW", west.clone()))],
            CART,
            vec![],
        ),
        (
            "denied anyway",
            vec![dry("a", from("DENY", west.clone())), policy("b", from("DENY", west.clone()))],
            CART,
            vec![],
        ),
        (
            "both kinds",
            vec![dry("b", from("ALLOW", east)), dry("a", from("DENY", west))],
            CART,
            vec!["shop/a", "shop/b"],
        ),
    ];
    for (case, policies, id, expected) in cases {
        let denials = ask(&policies, id).dry_run_denials;
        assert_eq!(denials.iter().map(|d| &**d).collect::<Vec<_>>(), expected, "{case}");
    }
}

#[test]
fn what_can_not_be_read_admits_nobody_to_what_it_selects() {
    let unreadable = [Policy::unreadable("shop/new", &"shop/web".parse().unwrap())];
    assert_eq!(ask(&unreadable, CART).decided_by.policy(), "shop/new");
    assert!(!ask(&unreadable, CART).allowed && ask_for(&unreadable, CART, "shop/api", 80).allowed);
}

#[test]
fn a_namespace_is_read_only_from_a_workloads_path() {
    for (id, expected) in [
        ("spiffe://a/cluster/west/ns/shop/sa/cart", Some("shop")),
        ("spiffe://a/cluster/west/ns/shop", None),
        ("spiffe://a/cluster/west/ns/shop/sa/cart/x", None),
        ("spiffe://a/cluster/west/vm/db-1", None),
        ("spiffe://a/cluster/west/federator", None),
        ("spiffe://a/ns/shop/sa/cart", None),
        ("not one", None),
    ] {
        assert_eq!(namespace_of(id), expected, "{id}");
    }
}

fn source() -> impl Strategy<Value = Value> {
    let ids = proptest::sample::subsequence(
        vec![
            "spiffe://acme.example/cluster/west/*",
            "spiffe://acme.example/cluster/east/ns/shop/sa/cart",
            "spiffe://acme.example/cluster/west/vm/db-1",
        ],
        1..=3,
    );
    let clusters = proptest::sample::subsequence(vec!["west", "north", "@self"], 1..=3);
    let namespaces = proptest::sample::subsequence(vec!["shop", "bank"], 1..=2);
    prop_oneof![
        ids.prop_map(|ids| json!({ "identities": ids })),
        (clusters, namespaces).prop_map(|(c, n)| json!({ "clusters": c, "namespaces": n })),
        Just(json!({ "clusterProperties": { "region": "eu" } })),
    ]
}

fn any_policy() -> impl Strategy<Value = Value> {
    let rule = prop_oneof![
        1 => Just(json!({})),
        4 => proptest::collection::vec(source(), 1..3).prop_map(|from| json!({ "from": from })),
    ];
    let rules = proptest::collection::vec(rule, 1..3);
    (any::<bool>(), any::<bool>(), rules, proptest::option::of(80u32..83)).prop_map(
        |(deny, dry, rules, port)| {
            let mut spec =
                json!({ "action": if deny { "DENY" } else { "ALLOW" }, "dryRun": dry, "rules": rules });
            if let Some(port) = port {
                spec["ports"] = json!([port]);
            }
            spec
        },
    )
}

/// Distinct names, in an order that has nothing to do with the list's.
fn all(specs: &[Value]) -> Vec<Policy> {
    let name = |index: usize| format!("p{}", (index * 7 + 3) % 11);
    specs.iter().enumerate().map(|(index, spec)| policy(&name(index), spec.clone())).collect()
}

fn anybody() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![CART, MACHINE, LOCAL, "north/ns/bank/sa/teller", "east/vm/x"])
}

proptest! {
    #[test]
    fn the_order_of_policies_does_not_matter(
        specs in proptest::collection::vec(any_policy(), 0..8), id in anybody(), turn in 0usize..8
    ) {
        let policies = all(&specs);
        let verdict = ask(&policies, id);
        let mut turned = policies;
        let by = turn.min(turned.len());
        turned.rotate_left(by);
        prop_assert_eq!(&ask(&turned, id), &verdict);
        turned.reverse();
        prop_assert_eq!(ask(&turned, id), verdict);
    }

    #[test]
    fn one_more_deny_never_admits_anybody(
        specs in proptest::collection::vec(any_policy(), 0..8), more in any_policy(), id in anybody()
    ) {
        let mut policies = all(&specs);
        let before = ask(&policies, id).allowed;
        policies.push(policy("z", json!({ "action": "DENY", "rules": more["rules"] })));
        prop_assert!(before || !ask(&policies, id).allowed);
    }

    #[test]
    fn one_more_allow_takes_nothing_from_those_who_were_allowed_by_one(
        specs in proptest::collection::vec(any_policy(), 0..8), more in any_policy(), id in anybody()
    ) {
        let mut policies = all(&specs);
        let before = ask(&policies, id);
        policies.push(policy("z", json!({ "action": "ALLOW", "rules": more["rules"] })));
        if before.allowed && before.decided_by != DecidedBy::Export {
            prop_assert!(ask(&policies, id).allowed);
        }
    }

    #[test]
    fn a_dry_run_never_changes_the_verdict_and_foretells_its_enforcement(
        specs in proptest::collection::vec(any_policy(), 0..8), id in anybody()
    ) {
        let verdict = ask(&all(&specs), id);
        let policies = all(&specs);
        let enforced: Vec<Policy> = policies.iter().filter(|p| !p.is_dry_run()).cloned().collect();
        let without = ask(&enforced, id);
        prop_assert_eq!((without.allowed, without.decided_by), (verdict.allowed, verdict.decided_by));
        if verdict.allowed {
            let all_enforced: Vec<Policy> = policies.into_iter().map(|p| Policy { dry_run: false, ..p }).collect();
            prop_assert_eq!(ask(&all_enforced, id).allowed, verdict.dry_run_denials.is_empty());
        }
    }

    #[test]
    fn hostile_text_is_refused_and_never_panics(text in ".{0,300}") {
        let spec = json!({ "action": text, "targetRefs": [{ "kind": text, "name": text }],
            "rules": [{ "from": [{ "identities": [text], "clusters": [text], "namespaces": [text] }] }] });
        let spec: AccessPolicySpec = serde_json::from_value(spec).unwrap();
        let mut errors = Vec::new();
        Policy::read("shop/p", &"shop".parse().unwrap(), &spec, &mut errors);
        prop_assert!(!errors.is_empty());
    }
}

/// A foreign identity may look like a member's: only policies that name it count.
#[test]
fn a_foreign_identity_is_admitted_only_where_a_policy_names_it() {
    const FOREIGN_CART: &str = "spiffe://partner.example/cluster/east/ns/shop/sa/cart";
    let service: ServiceKey = "shop/web".parse().unwrap();
    let asked = |policies: &[Policy], port| decide(policies, &Caller::foreign(FOREIGN_CART), &service, port);
    let named = json!({ "identities": [FOREIGN_CART] });
    let below = json!({ "identities": ["spiffe://partner.example/*"] });
    let cases = [
        ("everyone", vec![json!({ "action": "ALLOW", "rules": [{}] })], false),
        ("a cluster", vec![from("ALLOW", json!({ "clusters": ["east", "@self"] }))], false),
        ("a namespace", vec![from("ALLOW", json!({ "namespaces": ["shop"] }))], false),
        ("properties", vec![from("ALLOW", json!({ "clusterProperties": { "region": "eu" } }))], false),
        (
            "its name in a cluster",
            vec![from("ALLOW", json!({ "identities": [FOREIGN_CART], "clusters": ["east"] }))],
            false,
        ),
        ("another domain", vec![from("ALLOW", json!({ "identities": ["spiffe://acme.example/*"] }))], false),
        ("its name", vec![from("ALLOW", named.clone())], true),
        ("its domain", vec![from("ALLOW", below.clone())], true),
        (
            "its name, and a DENY of everyone",
            vec![from("ALLOW", named.clone()), json!({ "action": "DENY", "rules": [{}] })],
            false,
        ),
        (
            "its domain, and a DENY of its name",
            vec![from("ALLOW", below), from("DENY", named.clone())],
            false,
        ),
        (
            "its name in a dry run",
            vec![json!({ "action": "ALLOW", "rules": [{ "from": [named.clone()] }], "dryRun": true })],
            false,
        ),
        (
            "its name on another port",
            vec![json!({ "action": "ALLOW", "ports": [443], "rules": [{ "from": [named] }] })],
            false,
        ),
    ];
    for (case, specs, allowed) in cases {
        let policies: Vec<Policy> =
            specs.into_iter().enumerate().map(|(n, spec)| policy(&format!("p{n}"), spec)).collect();
        let verdict = asked(&policies, 80);
        assert_eq!(verdict.allowed, allowed, "{case}: {:?}", verdict.decided_by);
        let shared: Vec<Arc<Policy>> = policies.into_iter().map(Arc::new).collect();
        let anywhere = admits_foreign(&shared, FOREIGN_CART, &service);
        assert_eq!(anywhere, allowed || case.contains("another port"), "{case}");
    }
    let nothing = asked(&[], 80);
    assert!(!nothing.allowed && nothing.decided_by == DecidedBy::Foreign, "an export admits no foreigner");
    assert_eq!(nothing.decided_by.policy(), NO_POLICY);
}
