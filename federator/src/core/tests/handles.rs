//! Handles: one per importer and service, released when no more wanted, not given again while somebody may use them.

use std::collections::BTreeSet;

use super::*;

fn handles(cluster: &Cluster) -> Vec<(String, String)> {
    let keys = cluster.core.facts.handles.keys();
    keys.map(|(importer, service)| (importer.to_string(), service.clone())).collect()
}

#[test]
fn a_service_gets_a_handle_for_its_own_cluster_and_for_each_peer_that_it_is_exported_to() {
    let (_world, mut east, _west) = linked();
    east.serving("web", &["shop/web", "shop/cart"], at(1));
    assert!(east.handle("east", "shop/web").is_some() && east.handle("east", "shop/cart").is_some());
    assert!(east.handle("west", "shop/web").is_none(), "not exported yet");
    east.core.apply(export("shop/web", "west"), false, at(2)).unwrap();
    east.core.publish(at(2));
    let own = east.handle("east", "shop/web").unwrap();
    let peers = east.handle("west", "shop/web").unwrap();
    assert_ne!(own.handle, peers.handle);
    assert_ne!(own.export_uid, peers.export_uid);
    assert!(east.handle("west", "shop/cart").is_none());
    assert!(!peers.handle.is_reserved());
}

#[test]
fn an_export_to_other_clusters_gives_no_handle_to_this_one() {
    let (_world, mut east, _west) = linked();
    east.serving("web", &["shop/web"], at(1));
    east.core.apply(export("shop/web", "north,south"), false, at(2)).unwrap();
    east.core.publish(at(2));
    assert!(east.handle("west", "shop/web").is_none());
    assert!(east.handle("north", "shop/web").is_none(), "it is not linked");
}

#[test]
fn an_ended_export_releases_its_handle_and_a_new_one_gets_another_with_another_uid() {
    let (world, mut east, _west) = linked();
    east.serving("web", &["shop/web"], at(1));
    let object = export("shop/web", "west");
    let key = object.key();
    let mut seen = BTreeSet::new();
    for round in 1..20 {
        east.core.apply(object.clone(), false, at(round)).unwrap();
        east.core.publish(at(round));
        let record = east.handle("west", "shop/web").unwrap().clone();
        assert!(seen.insert(record.handle) && seen.len() as u64 == round, "a handle was given again");
        assert!(east.core.delete(&key, false, at(round)).unwrap());
        east.core.publish(at(round));
        assert!(east.handle("west", "shop/web").is_none());
        assert!(east.core.released.contains_key(&record.handle));
    }
    drop(east);
    let mut east = world.start("east", at(30));
    assert!(seen.iter().all(|handle| east.core.released.contains_key(handle)), "the hold survives a restart");
    east.core.tick(at(20 + DAY - 2));
    assert!(!east.core.released.is_empty());
    east.core.tick(at(21 + DAY));
    assert!(east.core.released.is_empty(), "a day later they are free");
    assert!(east.core.store.list(Table::Handles).len() == east.core.facts.handles.len());
}

#[test]
fn a_released_handle_is_not_drawn() {
    let (_world, mut east, _west) = linked();
    // All handles but one are on hold or reserved: only that one can be drawn. 2^32 entries are too many, so the draw
    // itself is asked with every outcome that it would have had on hold.
    let drawn = east.core.new_handle(&name("west"), "shop/web", &BTreeSet::new()).unwrap();
    east.core.released.insert(drawn.handle, UNIX);
    for _ in 0..1000 {
        let next = east.core.new_handle(&name("west"), "shop/web", &BTreeSet::new()).unwrap();
        assert!(!east.core.released.contains_key(&next.handle));
        assert!(!next.handle.is_reserved());
        east.core.released.insert(next.handle, UNIX);
    }
    assert_eq!(east.core.released.len(), 1001);
}

#[test]
fn without_a_writable_store_nothing_is_allotted_and_it_is_made_up_for_later() {
    let (_world, mut east, _west) = linked();
    east.serving("web", &["shop/web"], at(1));
    let before = handles(&east);
    let object = export("shop/web", "west");
    east.core.apply(object.clone(), false, at(2)).unwrap();
    east.store.set_broken(true);
    east.core.publish(at(2));
    assert_eq!(handles(&east), before);
    assert!(!east.core.facts.store_writable);
    east.core.tick(at(3));
    assert!(east.core.publish(at(3)), "it is tried with every tick");
    assert_eq!(handles(&east), before);
    east.store.set_broken(false);
    east.core.tick(at(4));
    assert!(east.core.publish(at(4)));
    assert!(east.handle("west", "shop/web").is_some());
    assert!(east.core.facts.store_writable);
}

#[test]
fn a_service_that_nobody_serves_keeps_no_handle_once_its_members_are_forgotten() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    let handle = east.handle("east", "shop/web").unwrap().handle;
    // Second by second: a longer pause would be the federator's own absence, which it blames nobody for.
    for now in 1..=HOUR + 10 {
        east.core.tick(at(now));
        east.core.publish(at(now));
        let found = east.handle("east", "shop/web").map(|record| record.handle);
        assert!(found == Some(handle) || now > HOUR, "lost after {now} s");
    }
    assert!(east.handle("east", "shop/web").is_none());
    assert!(!east.core.facts.registry.members.contains_key(&web.block()));
}
