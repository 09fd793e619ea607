//! What a peer exports: taken as it comes, aged, bounded, and there again after a restart.

use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::sync::{Freshness, Update};

use super::*;
use crate::core::imports::IMPORT_LEASE;
use crate::import::{GATEWAYS, PROPERTIES, export_key};

const EPOCH: Epoch = Epoch(77);

fn export_record(service: &str) -> (String, v1::Record) {
    let key = export_key(&service.parse().unwrap());
    let export = v1::ExportRecord {
        service: service.into(),
        export_uid: vec![7; 16],
        handle: 300,
        ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
        spiffe_ids: vec!["spiffe://acme.example/cluster/west/ns/shop/sa/api".into()],
        healthy: 1,
        total: 1,
        ..Default::default()
    };
    (key.clone(), v1::Record { key, value: Some(v1::record::Value::Export(export)) })
}

/// The same record, but one that is refused.
fn bad_record(service: &str) -> (String, v1::Record) {
    let (key, mut record) = export_record(service);
    let Some(v1::record::Value::Export(export)) = &mut record.value else { unreachable!() };
    export.handle = 1;
    (key, record)
}

fn gateways_record(addresses: &[&str]) -> (String, v1::Record) {
    let replica = |address: &&str| v1::GatewayReplica {
        name: "gw-9".into(),
        address: (*address).into(),
        ..Default::default()
    };
    let record = v1::GatewaysRecord { gateways: addresses.iter().map(replica).collect() };
    let value = Some(v1::record::Value::Gateways(record));
    (GATEWAYS.into(), v1::Record { key: GATEWAYS.into(), value })
}

pub fn snapshot(revision: u64, records: Vec<(String, v1::Record)>) -> Update<v1::Record> {
    Update::Snapshot { epoch: EPOCH, revision: Revision(revision), records }
}

fn delta(revision: u64, upserts: Vec<(String, v1::Record)>, deletes: &[String]) -> Update<v1::Record> {
    Update::Delta { revision: Revision(revision), upserts, deletes: deletes.to_vec() }
}

pub fn take(cluster: &mut Cluster, update: Update<v1::Record>, moment: Moment) -> Result<(), CoreError> {
    cluster.core.apply_update(&name("west"), EPOCH, update, moment)
}

fn services(cluster: &Cluster) -> Vec<String> {
    cluster.import("west").exports.keys().map(ToString::to_string).collect()
}

/// What `west` exports to this cluster.
pub fn feed(cluster: &mut Cluster, services: &[&str], moment: Moment) {
    let records = services.iter().map(|service| export_record(service)).collect();
    take(cluster, snapshot(1, records), moment).unwrap();
}

#[test]
fn snapshots_and_deltas_are_taken_over() {
    let (_world, mut east, _west) = linked();
    feed(&mut east, &["shop/api", "shop/web"], at(1));
    assert_eq!(services(&east), ["shop/api", "shop/web"]);
    let deletes = [export_key(&"shop/web".parse().unwrap())];
    take(&mut east, delta(2, vec![export_record("shop/cart")], &deletes), at(2)).unwrap();
    assert_eq!(services(&east), ["shop/api", "shop/cart"]);
    assert_eq!(east.import("west").position, (EPOCH, Revision(2)));
    assert_eq!(east.core.import_position(&name("west")), (EPOCH, Revision(2)));
    take(&mut east, snapshot(5, vec![export_record("shop/web")]), at(3)).unwrap();
    assert_eq!(services(&east), ["shop/web"], "absence from a snapshot is removal");
}

#[test]
fn an_update_that_does_not_fit_changes_nothing() {
    let (_world, mut east, _west) = linked();
    take(&mut east, snapshot(9, vec![export_record("shop/api")]), at(1)).unwrap();
    for (update, epoch) in [
        (snapshot(8, vec![]), EPOCH),
        (delta(8, vec![export_record("shop/web")], &[]), EPOCH),
        (delta(10, vec![export_record("shop/web")], &[]), Epoch(78)),
    ] {
        let words = refusal(east.core.apply_update(&name("west"), epoch, update, at(60)));
        assert_says(&words, &["west sent an update that does not fit"]);
        assert_eq!(services(&east), ["shop/api"]);
        assert_eq!(east.import("west").heard, Some(at(1).unix), "nonsense is no sign of life");
    }
    let unknown = east.core.apply_update(&name("north"), EPOCH, snapshot(1, vec![]), at(1));
    assert_says(&refusal(unknown), &["north is not linked"]);
    // Watched from nothing, even an older revision is news.
    east.core.restart_watch(&name("west"));
    assert_eq!(services(&east), ["shop/api"], "what is known keeps serving");
    take(&mut east, snapshot(3, vec![export_record("shop/web")]), at(2)).unwrap();
    assert_eq!(services(&east), ["shop/web"]);
}

#[test]
fn a_bad_record_costs_the_good_ones_nothing_in_a_delta_or_a_snapshot() {
    let (_world, mut east, _west) = linked();
    let records = || vec![export_record("shop/api"), export_record("shop/web")];
    take(&mut east, snapshot(1, records()), at(1)).unwrap();
    take(&mut east, delta(2, vec![bad_record("shop/api")], &[]), at(2)).unwrap();
    assert_eq!(services(&east), ["shop/api", "shop/web"]);
    take(&mut east, snapshot(3, vec![bad_record("shop/api"), export_record("shop/web")]), at(3)).unwrap();
    assert_eq!(services(&east), ["shop/api", "shop/web"], "a bad record deleted a good one");
    assert_says(&east.import("west").rejected["export/shop/api"], &["export.handle"]);
    take(&mut east, snapshot(4, records()), at(4)).unwrap();
    assert!(east.import("west").rejected.is_empty());
}

#[test]
fn no_gateways_at_all_is_not_believed() {
    let (_world, mut east, _west) = linked();
    let addresses = |east: &Cluster| {
        let link = &east.core.facts.links[&name("west")];
        let gateways = east.core.facts.peer_gateways(link);
        gateways.into_iter().map(|g| g.address.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(addresses(&east), ["203.0.113.7:7440"], "as told when the link was made");
    take(&mut east, snapshot(1, vec![gateways_record(&["203.0.113.9:7440"])]), at(1)).unwrap();
    for update in [
        snapshot(2, vec![gateways_record(&[])]),
        delta(3, vec![gateways_record(&[])], &[]),
        snapshot(4, vec![]),
        delta(5, vec![], &[GATEWAYS.to_owned()]),
    ] {
        take(&mut east, update, at(2)).unwrap();
        assert_eq!(addresses(&east), ["203.0.113.9:7440"]);
    }
}

#[test]
fn ranges_of_a_link_object_bind_what_the_peer_said_before_and_says_later() {
    let (_world, mut east, _west) = linked();
    let spec = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink",
        "metadata": { "name": "west" }, "spec": { "allowedGatewayRanges": ["198.51.100.0/24"] },
    });
    let addresses = |east: &Cluster| {
        let link = &east.core.facts.links[&name("west")];
        let gateways = east.core.facts.peer_gateways(link);
        gateways.into_iter().map(|g| g.address.to_string()).collect::<Vec<_>>()
    };
    take(&mut east, snapshot(1, vec![gateways_record(&["203.0.113.9:7440"])]), at(1)).unwrap();
    east.core.apply(object(spec), false, at(2)).unwrap();
    assert_eq!(addresses(&east), Vec::<String>::new(), "neither announced nor first gateways are outside");
    assert_says(&east.import("west").rejected[GATEWAYS], &["203.0.113.9:7440", "west"]);
    take(&mut east, snapshot(2, vec![gateways_record(&["198.51.100.9:7440"])]), at(3)).unwrap();
    assert_eq!(addresses(&east), ["198.51.100.9:7440"]);
}

#[test]
fn what_is_beyond_the_quota_is_refused_and_said() {
    let (_world, mut east, _west) = linked();
    let quota = crate::core::imports::QUOTA.records;
    let named = |n: usize| export_record(&format!("shop/s{n:05}"));
    take(&mut east, snapshot(1, (0..quota + 3).map(named).collect()), at(1)).unwrap();
    let import = east.import("west");
    assert_eq!(import.exports.len(), quota);
    assert_eq!(import.rejected.len(), 3);
    assert_says(import.rejected.values().next().unwrap(), &["10000"]);
    take(&mut east, delta(2, vec![named(quota + 7)], &[]), at(2)).unwrap();
    assert_eq!(east.import("west").exports.len(), quota);
    take(&mut east, delta(3, vec![named(quota)], &[named(0).0]), at(3)).unwrap();
    assert_eq!(east.import("west").exports.len(), quota, "what is freed may be used");
    assert!(east.import("west").exports.contains_key(&format!("shop/s{quota:05}").parse().unwrap()));
}

#[test]
fn a_record_of_a_megabyte_is_refused_and_not_kept() {
    let (_world, mut east, _west) = linked();
    let (key, mut huge) = export_record("shop/api");
    let Some(v1::record::Value::Export(export)) = &mut huge.value else { unreachable!() };
    export.labels.insert("note".into(), "x".repeat(1_000_000));
    take(&mut east, snapshot(1, vec![(key.clone(), huge), export_record("shop/web")]), at(1)).unwrap();
    assert_eq!(services(&east), ["shop/web"]);
    assert_says(&east.import("west").rejected[&key], &["bytes"]);
    east.core.tick(at(2));
    let stored: usize = east.core.store.list(Table::Imports).iter().map(|(_, value)| value.len()).sum();
    assert!(stored < 10_000, "{stored} bytes are stored");
}

#[test]
fn refusals_do_not_pile_up() {
    let (_world, mut east, _west) = linked();
    feed(&mut east, &["shop/api"], at(1));
    for round in 0..500 {
        let key = format!("{}{}", "é".repeat(150 + round % 3), "k".repeat(200 + round));
        let bad = v1::Record { key: key.clone(), value: None };
        let revision = 2 + 2 * u64::try_from(round).unwrap();
        take(&mut east, delta(revision, vec![(key.clone(), bad)], &[]), at(1)).unwrap();
        take(&mut east, delta(revision + 1, vec![], &[key]), at(1)).unwrap();
    }
    assert!(east.import("west").rejected.is_empty(), "{} are left", east.import("west").rejected.len());
}

#[test]
fn properties_are_the_peers_alone_and_bounded() {
    let (_world, mut east, _west) = linked();
    let record = |count: usize| {
        let properties = (0..count).map(|n| (format!("k{n}"), "v".to_owned())).collect();
        let value = Some(v1::record::Value::Properties(v1::PropertiesRecord { properties }));
        (PROPERTIES.to_owned(), v1::Record { key: PROPERTIES.into(), value })
    };
    take(&mut east, snapshot(1, vec![record(2)]), at(1)).unwrap();
    assert_eq!(east.import("west").properties.len(), 2);
    take(&mut east, delta(2, vec![record(65)], &[]), at(2)).unwrap();
    assert_eq!(east.import("west").properties.len(), 2);
    assert_says(&east.import("west").rejected[PROPERTIES], &["properties", "at most 64"]);
}

#[test]
fn a_copy_is_fresh_for_3_seconds_stale_for_a_day_and_then_expired() {
    let (_world, mut east, _west) = linked();
    feed(&mut east, &["shop/api"], at(100));
    let mut at_age = |age: Duration| {
        let unix = at(100).unix + age;
        east.core.tick(Moment { monotonic: Duration::from_secs(100) + age, unix });
        east.import("west").freshness
    };
    assert_eq!(at_age(Duration::from_millis(3000)), Freshness::Fresh);
    assert_eq!(at_age(Duration::from_millis(3001)), Freshness::Stale);
    assert_eq!(at_age(IMPORT_LEASE), Freshness::Stale);
    assert_eq!(at_age(IMPORT_LEASE + Duration::from_millis(1)), Freshness::Expired);
    assert_eq!(services(&east), ["shop/api"], "what expired is kept, for when the peer is back");
    let back = at(100 + 2 * DAY);
    east.core.heard_peer(&name("west"), back);
    assert_eq!(east.import("west").freshness, Freshness::Fresh);
    east.core.lost_peer(&name("west"), "no word within 3.5 s".into());
    let import = east.import("west");
    assert!(
        !import.connected && import.freshness == Freshness::Fresh,
        "a lost connection alone ages nothing"
    );
    assert_eq!(import.last_error, "no word within 3.5 s");
}

#[test]
fn ageing_is_published_and_silence_of_one_peer_touches_no_other() {
    let mut world = World::new();
    let (mut east, mut west, mut north) =
        (world.cluster("east"), world.cluster("west"), world.cluster("north"));
    for cluster in [&mut east, &mut west, &mut north] {
        cluster.gateway("gw-1", at(0));
    }
    link(&mut east, &mut west, at(0));
    link(&mut east, &mut north, at(0));
    feed(&mut east, &["shop/api"], at(1));
    east.core.heard_peer(&name("north"), at(1));
    east.core.publish(at(1));
    east.core.heard_peer(&name("north"), at(5));
    east.core.tick(at(5));
    assert!(east.core.publish(at(5)), "ageing changes what is published");
    assert_eq!(east.import("west").freshness, Freshness::Stale);
    assert_eq!(east.import("north").freshness, Freshness::Fresh);
}

#[test]
fn a_restart_continues_with_the_last_state_marked_stale() {
    let (world, mut east, _west) = linked();
    take(
        &mut east,
        snapshot(
            7,
            vec![export_record("shop/api"), bad_record("shop/web"), gateways_record(&["203.0.113.9:7440"])],
        ),
        at(10),
    )
    .unwrap();
    east.core.tick(at(11));
    let revision = east.core.facts.revision;
    drop(east);
    let mut east = world.start("east", at(60));
    let import = east.import("west");
    assert_eq!(services(&east), ["shop/api"]);
    assert_eq!((import.freshness, import.connected), (Freshness::Stale, false));
    assert_eq!(import.heard, Some(Duration::from_secs(UNIX + 10)));
    assert_eq!(import.gateways[0].address.to_string(), "203.0.113.9:7440");
    assert_says(&import.rejected["export/shop/web"], &["export.handle"]);
    assert_says(&import.last_error, &["not connected yet since the federator's start"]);
    assert_eq!(east.core.import_position(&name("west")), (EPOCH, Revision(7)), "resumes where it was");
    assert!(east.core.facts.revision > revision);
    take(&mut east, delta(8, vec![], &[export_key(&"shop/api".parse().unwrap())]), at(61)).unwrap();
    assert!(services(&east).is_empty());
}

#[test]
fn a_quiet_peer_is_not_expired_by_a_restart() {
    let (world, mut east, _west) = linked();
    feed(&mut east, &["shop/api"], at(0));
    // Two days of heartbeats without any change.
    for half_hour in 0..96 {
        east.core.heard_peer(&name("west"), at(half_hour * HOUR / 2));
        east.core.tick(at(half_hour * HOUR / 2));
    }
    drop(east);
    let mut east = world.start("east", at(2 * DAY));
    east.core.tick(at(2 * DAY + 1));
    assert_eq!(east.import("west").freshness, Freshness::Stale, "heard until half an hour ago");
}

#[test]
fn a_restart_while_the_peer_is_watched_anew_keeps_what_was_there() {
    let (world, mut east, _west) = linked();
    feed(&mut east, &["shop/api"], at(10));
    east.core.tick(at(11));
    take(&mut east, delta(2, vec![export_record("shop/web")], &[]), at(12)).unwrap();
    east.core.restart_watch(&name("west"));
    east.core.tick(at(13));
    drop(east);
    let east = world.start("east", at(14));
    assert!(services(&east).contains(&"shop/api".to_owned()), "{:?}", services(&east));
}

#[test]
fn a_peers_records_that_can_not_be_saved_are_saved_later() {
    let (world, mut east, _west) = linked();
    east.store.set_broken(true);
    feed(&mut east, &["shop/api"], at(10));
    east.core.tick(at(11));
    assert_eq!(services(&east), ["shop/api"], "a full disk does not stop imports");
    east.store.set_broken(false);
    east.core.tick(at(13));
    drop(east);
    assert_eq!(services(&world.start("east", at(14))), ["shop/api"]);
}

/// A record for tests that do not care which.
pub fn any_record(service: &str, bad: bool) -> (String, v1::Record) {
    if bad { bad_record(service) } else { export_record(service) }
}

#[test]
fn an_import_that_comes_back_has_the_address_that_it_had_and_a_headless_one_has_none() {
    let (_world, mut east, _west) = linked();
    let service = || -> tombolo_model::names::ServiceKey { "shop/api".parse().unwrap() };
    let change = |east: &mut Cluster, update: Update<v1::Record>, second: u64| {
        take(east, update, at(second)).unwrap();
        east.core.publish(at(second));
        east.core.facts.addresses.of.get(&service()).and_then(|of| of.v4)
    };
    assert_eq!(change(&mut east, snapshot(1, Vec::new()), 1), None);
    let first = change(&mut east, delta(2, vec![export_record("shop/api")], &[]), 2);
    assert!(first.is_some());
    let key = export_key(&service());
    assert_eq!(change(&mut east, delta(3, Vec::new(), std::slice::from_ref(&key)), 3), None);
    assert_eq!(change(&mut east, delta(4, vec![export_record("shop/api")], &[]), 4), first);
    let (key, mut record) = export_record("shop/api");
    let Some(v1::record::Value::Export(export)) = &mut record.value else { unreachable!() };
    export.headless = true;
    assert_eq!(change(&mut east, delta(5, vec![(key, record)], &[]), 5), None);
    assert_eq!(change(&mut east, delta(6, vec![export_record("shop/api")], &[]), 6), first);
}
