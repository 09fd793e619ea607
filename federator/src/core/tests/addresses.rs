//! Virtual addresses: one per service, for its life and over restarts; not another's within a day.

use std::net::Ipv4Addr;

use tombolo_model::virtual_ranges::VirtualRanges;

use super::*;

const HOUR: u64 = 3600;

fn address(cluster: &Cluster, service: &str) -> Option<Ipv4Addr> {
    cluster.core.facts.addresses.of.get(&service.parse().unwrap()).and_then(|of| of.v4)
}

fn move_to(cluster: &mut Cluster, ranges: &[&str], moment: Moment) {
    cluster.core.set_virtual_ranges(VirtualRanges::parse(ranges.iter().copied()).unwrap());
    cluster.core.publish(moment);
}

#[test]
fn what_is_served_exported_or_imported_has_an_address_of_its_own() {
    let (_world, mut east, _west) = linked();
    east.serving("web", &["shop/web", "shop/cart"], at(1));
    east.core.apply(export("shop/later", "west"), false, at(2)).unwrap();
    east.core.publish(at(2));
    let found = ["shop/web", "shop/cart", "shop/later"].map(|service| address(&east, service).unwrap());
    assert!(found.iter().all(|address| VirtualRanges::default().contains((*address).into())));
    assert_ne!(found[0], found[1]);
    assert_ne!(found[1], found[2]);
    assert_eq!(address(&east, "shop/other"), None);
}

#[test]
fn an_address_survives_restarts_and_the_absence_of_its_service() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let object = export("shop/web", "west");
    east.core.apply(object.clone(), false, at(1)).unwrap();
    east.core.publish(at(1));
    let first = address(&east, "shop/web").unwrap();
    drop(east);
    let mut east = world.start("east", at(2));
    assert_eq!(address(&east, "shop/web"), Some(first), "over a restart");
    east.core.delete(&object.key(), false, at(3)).unwrap();
    east.core.publish(at(3));
    assert_eq!((address(&east, "shop/web"), east.core.facts.addresses.held), (None, 1));
    drop(east);
    let mut east = world.start("east", at(4));
    assert_eq!(east.core.facts.addresses.held, 1);
    east.core.apply(object, false, at(5)).unwrap();
    east.core.publish(at(5));
    assert_eq!((address(&east, "shop/web"), east.core.facts.addresses.held), (Some(first), 0));
}

#[test]
fn a_range_that_is_used_up_costs_new_services_theirs_and_a_released_one_is_held_for_a_day() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    move_to(&mut east, &["10.9.8.0/29"], at(0));
    let object = export("shop/web", "west");
    east.core.apply(object.clone(), false, at(1)).unwrap();
    east.core.publish(at(1));
    let first = address(&east, "shop/web").unwrap();
    east.core.delete(&object.key(), false, at(3)).unwrap();
    east.core.publish(at(3));
    // Six addresses: five others get the rest, the sixth none.
    for index in 0..6 {
        east.core.apply(export(&format!("shop/s{index}"), "west"), false, at(4)).unwrap();
        east.core.publish(at(4));
    }
    let wanting = &east.core.facts.addresses.wanting;
    assert_eq!(wanting.iter().map(ToString::to_string).collect::<Vec<_>>(), ["shop/s5"]);
    assert!((0..6).all(|index| address(&east, &format!("shop/s{index}")) != Some(first)), "it is held");
    east.core.apply(object.clone(), false, at(HOUR)).unwrap();
    east.core.publish(at(HOUR));
    assert_eq!(address(&east, "shop/web"), Some(first), "the service that comes back gets its own");
    east.core.delete(&object.key(), false, at(HOUR)).unwrap();
    east.core.publish(at(HOUR));
    east.core.tick(at(24 * HOUR));
    east.core.publish(at(24 * HOUR));
    assert_eq!(address(&east, "shop/s5"), None);
    east.core.tick(at(25 * HOUR + 2));
    east.core.publish(at(25 * HOUR + 2));
    assert_eq!(address(&east, "shop/s5"), Some(first), "after a day it is another's");
    assert!(east.core.facts.addresses.wanting.is_empty());
}

#[test]
fn a_moved_range_moves_the_addresses_and_a_new_family_is_added_to_them() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.apply(export("shop/web", "west"), false, at(1)).unwrap();
    east.core.publish(at(1));
    let first = address(&east, "shop/web").unwrap();
    move_to(&mut east, &["fd00:77::/112"], at(2));
    let both = east.core.facts.addresses.of[&"shop/web".parse().unwrap()];
    assert_eq!(both.v4, Some(first), "the other family is left alone");
    assert!(both.v6.unwrap().to_string().starts_with("fd00:77::"));
    move_to(&mut east, &["10.77.0.0/16"], at(3));
    let moved = east.core.facts.addresses.of[&"shop/web".parse().unwrap()];
    assert!(moved.v4.unwrap().to_string().starts_with("10.77.") && moved.v6.is_none(), "{moved:?}");
}

#[test]
fn without_a_store_no_address_is_told() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.serving("web", &["shop/web"], at(1));
    east.store.set_broken(true);
    let before = east.core.facts.addresses.clone();
    east.core.addresses_stale = true;
    east.core.dirty = true;
    east.core.set_virtual_ranges(VirtualRanges::parse(["10.77.0.0/16"]).unwrap());
    east.core.publish(at(2));
    assert!(east.core.facts.addresses.of.is_empty(), "nothing is told that is not on the disk");
    east.store.set_broken(false);
    east.core.tick(at(3));
    east.core.publish(at(3));
    assert_eq!(east.core.facts.addresses.of.len(), before.of.len());
}
