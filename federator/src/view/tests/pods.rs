//! Pods that a NetworkPolicy cuts off, or that are not let in.

use tombolo_model::ids::Block;

use super::*;
use crate::facts::{PodRecord, Role};
use crate::snapshot::tests::lease;

fn hop(cluster: &str, alive: bool) -> v1::HopStatus {
    v1::HopStatus { address: "10.0.0.5:7441".into(), alive, cluster: cluster.into(), ..Default::default() }
}

#[test]
fn a_pod_that_hears_no_gateway_is_found_and_the_ports_to_let_through_are_named() {
    let mut facts = east();
    facts.sidecar(7, "/ns/shop/sa/web", &[]);
    lease(&mut facts, 7, Role::Sidecar);
    let found = |facts: &mut Facts, hops: Vec<v1::HopStatus>| {
        facts.report(7, v1::StatusReport { hops, ..Default::default() });
        shown(facts).findings
    };
    assert_eq!(found(&mut facts, vec![hop("east", false)]), [], "not known to be a pod");
    let pod = PodRecord { uid: "u".into(), name: "web-0".into(), joined_unix: UNIX };
    Arc::make_mut(facts.leases.get_mut(&Block::new(7).unwrap()).unwrap()).pod = Some(pod);
    for hops in
        [vec![], vec![hop("east", true), hop("east", false)], vec![hop("east", true), hop("west", false)]]
    {
        assert_eq!(found(&mut facts, hops), []);
    }
    let findings = found(&mut facts, vec![hop("east", false), hop("west", true)]);
    let [finding] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!((finding.reason.as_str(), finding.about.as_str()), ("PodCutOff", "pod shop/web-0"));
    for said in ["7441", "7442", "7443", "NetworkPolicies of namespace shop"] {
        assert!(finding.remedy.contains(said), "{said}: {}", finding.remedy);
    }
}

#[test]
fn a_pod_that_is_not_let_in_is_found_with_the_reason_for_ten_minutes() {
    let mut facts = east();
    let pods = Arc::make_mut(&mut facts.pods);
    pods.asked("pod shop/old-0 (service account web)", Some("long ago".into()), UNIX - 601);
    pods.refused.insert(
        "pod shop/web-0 (service account web)".into(),
        crate::facts::pods::RefusedPod { reason: "is it expired?".into(), times: 3, last: UNIX - 60 },
    );
    let findings = shown(&facts).findings;
    let [finding] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!(
        (finding.reason.as_str(), finding.about.as_str()),
        ("PodRefused", "pod shop/web-0 (service account web)")
    );
    assert!(
        finding.message.contains("3 times") && finding.message.ends_with("is it expired?"),
        "{finding:?}"
    );
}
