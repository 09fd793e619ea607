//! `FailoverPolicy`: which one holds, and what its tiers name in vain.

use super::*;

fn policy(name: &str, tiers: Value) -> Value {
    json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "FailoverPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "targetRef": { "kind": "ServiceImport", "name": "web" }, "tiers": tiers },
    })
}

/// West exports `shop/web`; the policy `web` prefers it.
fn importing() -> Facts {
    let mut facts = east();
    facts.link("west");
    facts.import("west").exports.insert(service("shop/web"), exported(2, 2, &[port("http", 80)]));
    facts.apply(policy("web", json!([{ "clusters": ["west"] }, { "clusters": ["@self", "*"] }])));
    facts
}

#[test]
fn a_policy_is_accepted_when_its_target_is_there_and_no_other_holds() {
    let cases: &[Case<'_>] = &[
        ("all well", |_| {}, "True Accepted", &["holds for shop/web"]),
        ("no target", |f| f.imports.clear(), "False TargetNotFound", &["spec.targetRef.name", "shop/web"]),
        (
            "a local target",
            |f| {
                f.imports.clear();
                f.sidecar(7, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
            },
            "True Accepted",
            &[],
        ),
        (
            "an older policy",
            |f| f.apply_at(UNIX - 200, policy("older", json!([{ "clusters": ["*"] }]))),
            "False Conflicted",
            &["older", "shop/web"],
        ),
        (
            "a younger policy",
            |f| f.apply_at(UNIX - 20, policy("a-younger", json!([{ "clusters": ["*"] }]))),
            "True Accepted",
            &[],
        ),
        (
            "settings without effect",
            |f| {
                let mut spilling = policy("web", json!([{ "clusters": ["*"] }]));
                spilling["spec"]["spill"] = json!({ "maxRequestsPerSecond": 5 });
                f.apply(spilling);
            },
            "True Accepted",
            &["spec.spill"],
        ),
    ];
    for (case, fill, head, pieces) in cases {
        let mut facts = importing();
        fill(&mut facts);
        assert_condition(case, &get_one(&facts, "FailoverPolicy", "web"), "Accepted", head, pieces);
    }
}

#[test]
fn what_a_tier_names_in_vain_is_said_by_its_path() {
    let cases: &[(&str, Value, &str, &[&str])] = &[
        ("all there", json!([{ "clusters": ["west", "@self", "*"] }]), "True ResolvedRefs", &[]),
        (
            "not linked",
            json!([{ "clusters": ["west"] }, { "clusters": ["@self", "north"] }]),
            "False ClusterNotFound",
            &["spec.tiers[1].clusters[1]", "north is not linked", "tombolo link token north"],
        ),
        (
            "not exporting",
            json!([{ "clusters": ["central"] }]),
            "False NotExported",
            &["spec.tiers[0].clusters[0]", "central does not export shop/web to east"],
        ),
        ("not served here", json!([{ "clusters": ["east"] }]), "False NotExported", &["no sidecar of this"]),
        (
            "own property missing",
            json!([{ "matchProperties": { "region": "@SameAsImporter@" } }]),
            "False PropertyNotFound",
            &["spec.tiers[0].matchProperties", "east has no property region"],
        ),
        ("a match", json!([{ "matchProperties": { "tier": "gold" } }]), "True ResolvedRefs", &[]),
        ("the peer's match", json!([{ "matchProperties": { "side": "left" } }]), "True ResolvedRefs", &[]),
        (
            "no match",
            json!([{ "matchProperties": { "side": "right" } }]),
            "False NoClusterMatches",
            &["no linked cluster has side=right"],
        ),
        (
            "several",
            json!([{ "clusters": ["north", "south"] }]),
            "False ClusterNotFound",
            &["north is not linked", "south is not linked"],
        ),
    ];
    for (case, tiers, head, pieces) in cases {
        let mut facts = importing();
        facts.link("central");
        facts.import("west").properties.insert("side".into(), "left".into());
        Arc::get_mut(&mut facts.cluster).unwrap().properties.insert("tier".into(), "gold".into());
        facts.apply(policy("web", tiers.clone()));
        assert_condition(case, &get_one(&facts, "FailoverPolicy", "web"), "ResolvedRefs", head, pieces);
    }
}

#[test]
fn status_names_the_policy_that_holds() {
    let mut facts = importing();
    assert_eq!(shown(&facts).imports[0].policy, "web");
    facts.apply_at(UNIX - 200, policy("older", json!([{ "clusters": ["*"] }])));
    assert_eq!(shown(&facts).imports[0].policy, "older");
    facts.objects.clear();
    assert_eq!(shown(&facts).imports[0].policy, "");
}
