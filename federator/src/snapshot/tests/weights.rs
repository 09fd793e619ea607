//! The shares of endpoints that callers are told.

use super::*;

#[test]
fn callers_here_and_in_linked_clusters_are_told_weights_by_identity_unless_all_are_alike() {
    let mut facts = shop();
    facts.export("web", Some("west"));
    allot(&mut facts, "east", "shop/web", 400);
    allot(&mut facts, "west", "shop/web", 401);
    facts.sidecar(9, "/vm/vm-1", &[("shop/web", port("", 80))]);
    facts.healthy(9, "shop/web", None);
    let told = |facts: &Facts| {
        let snapshot = sidecar_snapshot(facts, 8, &["shop/web"]);
        let backend = snapshot.upstreams[0].backends[0].clone();
        let record = &crate::records::records(facts, &cluster("west"))["export/shop/web"];
        let Some(v1::record::Value::Export(export)) = &record.value else { panic!("{record:?}") };
        assert_eq!((&backend.spiffe_ids, &backend.weights), (&export.spiffe_ids, &export.weights));
        (backend.spiffe_ids.len(), backend.weights)
    };
    assert_eq!(told(&facts), (2, Vec::new()));
    let weigh = |facts: &mut Facts, block: u32, weight: u32| {
        let member = facts.registry.members.get_mut(&Block::new(block).unwrap()).unwrap();
        member.services.get_mut(&service("shop/web")).unwrap().weight = weight;
    };
    weigh(&mut facts, 9, 30);
    assert_eq!(told(&facts), (2, vec![100, 30]), "in the order of the identities");
    // Endpoints of one identity that differ count by their mean, and those out of rotation not at all.
    for (block, reason) in [(10, None), (11, Some("connection refused"))] {
        facts.sidecar(block, "/ns/shop/sa/web", &[("shop/web", port("", 80))]);
        facts.healthy(block, "shop/web", reason);
    }
    weigh(&mut facts, 10, 50);
    weigh(&mut facts, 11, 1);
    assert_eq!(told(&facts), (2, vec![75, 30]));
}
