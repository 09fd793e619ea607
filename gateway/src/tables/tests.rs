//! What of a snapshot counts.

use super::*;
use crate::fixture::*;
use tombolo_proto::v1;

fn try_parse(wire: &v1::GatewaySnapshot, previous: Option<&Arc<Tables>>) -> Result<Tables, SnapshotError> {
    Tables::parse(wire, &"east".parse().unwrap(), east(), previous, UNIX)
}

#[test]
fn a_snapshot_becomes_tables() {
    let tables = tables();
    assert_eq!(tables.rejected, []);
    assert_eq!((tables.endpoints.len(), tables.handles.len(), tables.links.len()), (4, 5, 2));
    assert_eq!(tables.siblings.len(), 1, "this replica is no sibling of its own");
    assert_eq!(tables.endpoint(Block::new(5).unwrap(), UNIX), Some(Endpoint::PROVISIONAL));
    assert_eq!(
        tables.endpoint(Block::new(5).unwrap(), UNIX + Duration::from_secs(900)),
        None,
        "the token has ended"
    );
    assert!(tables.peer(west(), UNIX).is_some() && tables.peer(east(), UNIX).is_none());
}

#[test]
fn bad_records_are_refused_one_by_one_with_their_field() {
    let mut wire = snapshot();
    wire.endpoints.push(v1::GatewayEndpoint { block: 6, address: "nowhere".into(), ..Default::default() });
    wire.endpoints.push(v1::GatewayEndpoint { block: u32::MAX, ..Default::default() });
    wire.endpoints.push(v1::GatewayEndpoint { block: 6, min_incarnation: 16, ..Default::default() });
    wire.handles.push(inbound(500, "north", "shop/web", v1::HandleClass::Service, &[]));
    wire.handles.push(inbound(300, "west", "shop/other", v1::HandleClass::Service, &[]));
    wire.handles.push(inbound(5, "west", "shop/web", v1::HandleClass::Service, &[]));
    wire.handles.push(inbound(501, "west", "shop/web", v1::HandleClass::Unspecified, &[]));
    wire.links.push(v1::GatewayLink { peer: "south".into(), tag: 4, key: vec![1; 31], ..Default::default() });
    wire.links.push(v1::GatewayLink {
        peer: "south".into(),
        tag: west().value(),
        key: vec![1; 32],
        ..Default::default()
    });
    wire.links.push(v1::GatewayLink {
        peer: "east".into(),
        tag: 9,
        key: vec![1; 32],
        self_: true,
        ..Default::default()
    });
    wire.links[0].gateways.push(v1::GatewayReplica { address: "0.0.0.0:7440".into(), ..Default::default() });
    wire.provisional.push(v1::ProvisionalLease { block: 9, not_after_unix: -1 });
    let tables = try_parse(&wire, None).unwrap();
    let fields: Vec<_> = tables.rejected.iter().map(|r| (r.record, r.error.field)).collect();
    assert_eq!(
        fields,
        [
            ("endpoint", "endpoints.address"),
            ("endpoint", "endpoints.block"),
            ("endpoint", "endpoints.min_incarnation"),
            ("provisional", "provisional.not_after_unix"),
            ("peer_gateway", "links.gateways.address"),
            ("link", "links.key"),
            ("link", "links.tag"),
            ("link", "links.tag"),
            ("handle", "handles.binding.importer"),
            ("handle", "handles.binding.handle"),
            ("handle", "handles.binding.handle"),
            ("handle", "handles.class"),
        ]
    );
    assert_eq!(
        (tables.endpoints.len(), tables.handles.len(), tables.links.len()),
        (4, 5, 2),
        "the rest counts"
    );
}

#[test]
fn another_clusters_snapshot_and_an_empty_one_are_refused_whole() {
    let other = v1::GatewaySnapshot { tag: west().value(), ..snapshot() };
    assert!(matches!(try_parse(&other, None), Err(SnapshotError::OtherCluster(_))));
    let empty = v1::GatewaySnapshot {
        cluster: "east".into(),
        tag: east().value(),
        cluster_key: CLUSTER_KEY.to_vec(),
        ..Default::default()
    };
    assert!(try_parse(&empty, None).is_ok(), "with nothing known there is nothing to keep");
    assert!(matches!(try_parse(&empty, Some(&tables())), Err(SnapshotError::Empty)));
    let keyless = v1::GatewaySnapshot { cluster_key: vec![1; 5], ..snapshot() };
    assert!(matches!(try_parse(&keyless, None), Err(SnapshotError::ClusterKey(_))));
}

#[test]
fn absence_is_removal_while_the_store_is_the_same() {
    let mut wire = snapshot();
    wire.endpoints.remove(0);
    wire.handles.clear();
    let tables = parse(&wire, Some(&tables()));
    assert!(tables.endpoint(Block::new(1).unwrap(), UNIX).is_none());
    assert!(tables.carried(UNIX).is_none());
}

#[test]
fn a_handle_keeps_its_bucket_unless_it_was_given_out_again() {
    let first = tables();
    let handle = Handle::from_u32(300);
    let same = parse(&snapshot(), Some(&first));
    assert!(Arc::ptr_eq(&first.handles[&handle].bucket, &same.handles[&handle].bucket));
    let mut again = snapshot();
    again.handles[0].binding.as_mut().unwrap().export_uid = vec![8; 16];
    let again = parse(&again, Some(&same));
    assert!(!Arc::ptr_eq(&same.handles[&handle].bucket, &again.handles[&handle].bucket));
}

#[test]
fn generations_do_not_pile_up() {
    let mut tables = tables();
    for key in 10..20u32 {
        let wire = v1::GatewaySnapshot { epoch: key.into(), ..snapshot() };
        tables = parse(&wire, Some(&tables));
    }
    assert_eq!(tables.generations(UNIX).count(), 2);
    assert!(tables.carried(UNIX).unwrap().carried(UNIX).is_none());
}
