//! Blocks: given once, adopted after the store is lost, never taken from their holder.

use std::collections::BTreeSet;

use super::*;
use crate::facts::Role;

#[test]
fn no_two_holders_get_one_block() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let mut blocks = BTreeSet::new();
    for index in 0..200 {
        let member = east.join("sidecar", &format!("web-{index}"), at(0));
        assert!(blocks.insert(member.block()), "{} was given twice", member.block());
    }
    assert!(blocks.iter().all(|block| east.core.facts.leases.contains_key(block)));
}

#[test]
fn a_block_rests_until_its_holder_can_not_come_back() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let member = east.join("sidecar", "web", at(0));
    // Two days of lease, then 35 days in which its holder may come back.
    east.core.tick(at(37 * DAY));
    assert!(east.core.facts.leases.contains_key(&member.block()));
    east.core.tick(at(37 * DAY + 2));
    assert!(!east.core.facts.leases.contains_key(&member.block()));
    assert!(east.core.facts.identities.values().all(|i| i.spiffe_id != member.identity.spiffe_id.as_str()));
}

#[test]
fn a_lost_store_adopts_the_leases_that_it_is_shown() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let member = east.serving("web", &["shop/web"], at(0));
    drop(east);
    std::fs::remove_file(world.store_file("east")).unwrap();
    let mut east = world.start("east", at(10));
    assert!(!east.core.facts.leases.contains_key(&member.block()));
    let welcome = east.greet(&member, &member.hello(&["shop/web"]), at(11)).unwrap();
    assert_eq!(welcome.block, member.block());
    let record = &east.core.facts.leases[&member.block()];
    assert!(record.adopted);
    assert_eq!((record.spiffe_id.as_str(), record.role), (member.identity.spiffe_id.as_str(), Role::Sidecar));
    drop(east);
    let east = world.start("east", at(20));
    assert!(east.core.facts.leases[&member.block()].adopted, "adoption is on the disk");
}

#[test]
fn a_lease_that_is_not_the_callers_is_not_adopted() {
    type Change = fn(&mut v1::EndpointLease);
    let cases: &[(&str, Change, &[&str])] = &[
        ("a forged signature", |l| l.signature[9] ^= 1, &["not signed by this cluster's CA"]),
        ("no signature", |l| l.signature.clear(), &["not signed by this cluster's CA"]),
        ("another block", |l| l.block ^= 1, &["not signed by this cluster's CA"]),
        ("a longer life", |l| l.not_after_unix += 1, &["not signed by this cluster's CA"]),
        ("another holder", |l| l.spiffe_id.push('x'), &["belongs to", "not to"]),
        ("another cluster's", |l| l.cluster = "west".into(), &["of cluster west"]),
        ("another tag's", |l| l.tag ^= 1, &["of cluster east"]),
        ("a block of 29 bits", |l| l.block = 1 << 28, &["lease.block"]),
        ("a time before 1970", |l| l.not_after_unix = -1, &["lease.not_after_unix"]),
        ("a signature of 100 KB", |l| l.signature = vec![1; 100_000], &["lease.signature"]),
    ];
    let mut world = World::new();
    let member = world.cluster("east").join("sidecar", "web", at(0));
    std::fs::remove_file(world.store_file("east")).unwrap();
    let mut east = world.start("east", at(10));
    for (case, change, pieces) in cases {
        let mut hello = member.hello(&["shop/web"]);
        change(hello.lease.as_mut().unwrap());
        hello.endpoints = vec![hello.lease.as_ref().unwrap().block << 4];
        assert_says(&refusal(east.greet(&member, &hello, at(11))), pieces);
        assert!(east.core.facts.registry.members.is_empty(), "{case}: the member was entered");
    }
    let without = v1::SidecarHello { lease: None, ..member.hello(&[]) };
    assert_says(&refusal(east.greet(&member, &without, at(11))), &["lease"]);
    east.greet(&member, &member.hello(&["shop/web"]), at(12)).unwrap();
}

#[test]
fn a_lease_of_another_clusters_ca_is_refused() {
    let mut world = World::new();
    let member = world.cluster("east").join("sidecar", "web", at(0));
    let mut west = world.cluster("west");
    let mut foreign = member.clone();
    foreign.lease.cluster = "west".into();
    foreign.lease.tag = west.core.facts.cluster.tag.value();
    let words = refusal(west.greet(&foreign, &foreign.hello(&[]), at(1)));
    assert_says(&words, &["not signed by this cluster's CA"]);
}

#[test]
fn a_block_that_has_a_new_holder_is_not_given_back() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (web, api) = (east.join("sidecar", "web", at(0)), east.join("sidecar", "api", at(0)));
    // As if `web` had the block of `api`: properly signed, and known to be somebody else's.
    let record = crate::facts::LeaseRecord {
        spiffe_id: web.identity.spiffe_id.to_string(),
        ..(*east.core.facts.leases[&api.block()]).clone()
    };
    let lease = east.core.lease_to_wire(&record, at(0)).unwrap();
    let claim = Joined { lease, ..web };
    let words = refusal(east.greet(&claim, &claim.hello(&[]), at(1)));
    assert_says(&words, &["is held by", "/sa/api", "join again"]);
}

#[test]
fn a_lease_is_moved_on_when_half_of_its_life_is_over() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let member = east.join("sidecar", "web", at(0));
    let request =
        v1::RenewRequest { csr_der: csr(), lease: Some(member.lease.clone()), ..Default::default() };
    let end = |answer: v1::RenewResponse| u64::try_from(answer.lease.unwrap().not_after_unix).unwrap();
    assert_eq!(end(east.core.renew(&member.identity, &request, at(HOUR)).unwrap()), UNIX + 2 * DAY);
    let late = at(DAY + 1);
    assert_eq!(end(east.core.renew(&member.identity, &request, late).unwrap()), UNIX + 3 * DAY + 1);
    // 29 days after its end it is still its holder's.
    let back = east.core.renew(&member.identity, &request, at(32 * DAY)).unwrap();
    assert_eq!(back.lease.unwrap().block, member.lease.block);
}

#[test]
fn renewing_is_for_members_only() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let member = east.join("sidecar", "web", at(0));
    let request =
        v1::RenewRequest { csr_der: csr(), lease: Some(member.lease.clone()), ..Default::default() };
    for path in ["/federator", "/admin", "/ns/shop"] {
        let caller = identity_of(&east.core, &format!("spiffe://acme.example/cluster/east{path}"));
        let words = refusal(east.core.renew(&caller, &request, at(1)));
        assert_says(&words, &["neither a gateway nor a sidecar"]);
    }
    let other = identity_of(&east.core, "spiffe://acme.example/cluster/east/ns/shop/sa/api");
    assert_says(&refusal(east.core.renew(&other, &request, at(1))), &["belongs to"]);
}

#[test]
fn each_start_of_a_federator_is_another_incarnation_and_the_17th_takes_another_block() {
    // Which of two blocks comes first in the store is chance: five clusters have both.
    for _ in 0..5 {
        let mut world = World::new();
        world.sign("east", Existing::Refuse);
        let mut seen = BTreeSet::new();
        let mut blocks = Vec::new();
        for start in 0..33 {
            let east = world.start("east", at(start));
            let endpoint = east.core.facts.federator.unwrap().endpoint;
            assert!(seen.insert(endpoint), "start {start} has an endpoint id that was used before");
            if !blocks.contains(&endpoint.block()) {
                blocks.push(endpoint.block());
            }
        }
        assert_eq!(blocks.len(), 3, "16 starts each on two blocks, the 33rd on a third");
    }
}

#[test]
fn a_federator_that_runs_for_weeks_keeps_its_own_lease() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let block = east.core.facts.federator.unwrap().endpoint.block();
    for day in 1..40 {
        east.core.tick(at(day * DAY));
        let lease = &east.core.facts.leases[&block];
        assert!(lease.not_after > UNIX + day * DAY, "day {day}");
    }
}
