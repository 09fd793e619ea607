//! Members whose identity has ended: renewed by possession of their key, unless revoked or replaced.

use tombolo_model::audit::Action;
use tombolo_overlay::lease::EndpointLease;

use super::*;
use crate::core::lapsed::{may_come_back, renewal_salt};
use crate::snapshot;

fn back(
    cluster: &mut Cluster,
    member: &Joined,
    moment: Moment,
) -> Result<v1::JoinWorkloadResponse, CoreError> {
    let request = v1::RenewLapsedRequest { csr_der: csr(), lease: Some(member.lease.clone()) };
    cluster.core.renew_lapsed(&member.identity, None, &request, moment)
}

fn revocation(id: &str) -> Object {
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation",
        "metadata": { "name": "stolen" }, "spec": { "spiffeId": id, "reason": "stolen" },
    }))
}

/// What gateways know of a member's way back.
fn salt(cluster: &Cluster, member: &Joined, moment: Moment) -> Option<u32> {
    let snapshot = snapshot::gateway::snapshot(&cluster.core.facts, "gw-1", moment.monotonic, moment.unix);
    let endpoint = snapshot.endpoints.into_iter().find(|e| e.block == member.lease.block)?;
    Some(endpoint.renewal)
}

#[test]
fn a_machine_that_was_off_for_weeks_keeps_its_block_and_gets_all_that_it_needs() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.gateway("gw-1", at(0));
    let vm = east.join("vm", "db-1", at(0));
    drop(east);
    let mut east = world.start("east", at(29 * DAY));
    let answer = back(&mut east, &vm, at(29 * DAY)).unwrap();
    let lease = EndpointLease::from_wire(&answer.lease.unwrap()).unwrap();
    assert_eq!(lease.block, vm.block());
    assert!(lease.is_valid_at(UNIX + 30 * DAY));
    assert_eq!(lease.renewal_key, EndpointLease::from_wire(&vm.lease).unwrap().renewal_key, "it stays");
    assert!(lease.keys.current(at(29 * DAY).unix).is_some());
    let control = answer.control.unwrap();
    assert!(!control.federators.is_empty() && !control.keys.unwrap().keys.is_empty());
    assert_eq!(answer.svid.unwrap().spiffe_id, vm.identity.spiffe_id.as_str());
    let (log, _) = super::audit::whole(&east.core);
    let entry = log.last().unwrap();
    assert_says(&entry.reason, &["the one before had ended"]);
    assert_eq!((entry.subject.as_str(), entry.action), (vm.identity.spiffe_id.as_str(), Action::Renew));
}

#[test]
fn gateways_know_the_way_back_of_machines_until_they_can_not_come_back_any_more() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (vm, web) = (east.join("vm", "db-1", at(0)), east.join("sidecar", "web", at(0)));
    let known = renewal_salt(vm.identity.spiffe_id.as_str()).get();
    // The lease of two days, then the thirty.
    for (days, expected) in [(0, Some(known)), (1, Some(known)), (31, Some(known)), (33, None)] {
        assert_eq!(salt(&east, &vm, at(days * DAY)), expected, "after {days} days");
    }
    assert_eq!(salt(&east, &web, at(0)), Some(0), "who dials the federator needs no gateway");
    assert_eq!(salt(&east, &web, at(3 * DAY)), None, "and is not kept in every snapshot");
    assert!(EndpointLease::from_wire(&web.lease).unwrap().renewal_key.is_none());
}

#[test]
fn who_is_revoked_does_not_come_back_until_that_is_taken_back() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let vm = east.join("vm", "db-1", at(0));
    let id = vm.identity.spiffe_id.to_string();
    east.core.apply(revocation(&id), false, at(1)).unwrap();
    assert_eq!(salt(&east, &vm, at(2)), Some(0), "gateways drop what it sends");
    assert_eq!(salt(&east, &vm, at(5 * DAY)), None);
    let words = refusal(back(&mut east, &vm, at(5 * DAY)));
    assert_says(&words, &["is revoked", "unrevoke"]);
    // By its serial, which only the federator's verifier sees.
    let request = v1::RenewLapsedRequest { csr_der: csr(), lease: Some(vm.lease.clone()) };
    let words = refusal(east.core.renew_lapsed(&vm.identity, Some("east/x"), &request, at(5 * DAY)));
    assert_says(&words, &["is revoked (east/x)"]);
    east.core.delete(&revocation(&id).key(), false, at(5 * DAY)).unwrap();
    back(&mut east, &vm, at(5 * DAY)).unwrap();
}

#[test]
fn a_machine_that_joined_anew_leaves_nothing_to_whoever_has_its_old_disk() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let old = east.join("vm", "db-1", at(0));
    let new = east.join("vm", "db-1", at(DAY));
    assert_ne!(old.block(), new.block());
    assert_says(&refusal(back(&mut east, &old, at(3 * DAY))), &["joined anew"]);
    assert_eq!(salt(&east, &old, at(DAY)), Some(0));
    back(&mut east, &new, at(4 * DAY)).unwrap();
    drop(east);
    let mut east = world.start("east", at(5 * DAY));
    assert_says(&refusal(back(&mut east, &old, at(5 * DAY))), &["joined anew"]);
    // Replicas of a service share one identity, and none of them replaces another.
    let (one, other) = (east.join("sidecar", "web", at(5 * DAY)), east.join("sidecar", "web", at(6 * DAY)));
    back(&mut east, &one, at(8 * DAY)).unwrap();
    back(&mut east, &other, at(8 * DAY)).unwrap();
}

#[test]
fn what_is_shown_must_be_the_callers_own() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (vm, other) = (east.join("vm", "db-1", at(0)), east.join("vm", "db-2", at(0)));
    let borrowed = Joined { lease: other.lease.clone(), ..vm.clone() };
    assert_says(&refusal(back(&mut east, &borrowed, at(3 * DAY))), &["belongs to", "db-2"]);
    let bare = v1::RenewLapsedRequest { csr_der: csr(), lease: None };
    assert_says(&refusal(east.core.renew_lapsed(&vm.identity, None, &bare, at(3 * DAY))), &["lease"]);
    let forged = v1::RenewLapsedRequest { csr_der: vec![1; 100], lease: Some(vm.lease.clone()) };
    assert_says(&refusal(east.core.renew_lapsed(&vm.identity, None, &forged, at(3 * DAY))), &["CSR"]);
    let federator = east.core.facts.cluster.federator_id.to_string();
    let federator = Joined { identity: identity_of(&east.core, &federator), ..vm };
    assert_says(&refusal(back(&mut east, &federator, at(3 * DAY))), &["neither a gateway nor a sidecar"]);
}

#[test]
fn ten_thousand_machines_that_are_away_cost_a_snapshot_little() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.gateway("gw-1", at(0));
    let before = snapshot_bytes(&east);
    let vm = east.join("vm", "db-0", at(0));
    for index in 1..10_000u32 {
        let block = tombolo_model::ids::Block::new(index).unwrap();
        let record = crate::facts::LeaseRecord {
            block,
            spiffe_id: vm.identity.spiffe_id.to_string().replace("db-0", &format!("db-{index}")),
            ..(*east.core.facts.leases[&vm.block()]).clone()
        };
        east.core.facts.leases.insert(block, Arc::new(record));
    }
    let away = (snapshot_bytes(&east) - before) / 10_000;
    println!("{away} bytes of a gateway's snapshot for each machine that is away");
    assert!(away <= 15, "{away}");
    let comes_back = may_come_back(&east.core.facts, UNIX + 20 * DAY);
    assert_eq!(east.core.facts.leases.values().filter(|lease| comes_back(lease)).count(), 10_000);
}

fn snapshot_bytes(cluster: &Cluster) -> usize {
    let moment = at(20 * DAY);
    let facts = &cluster.core.facts;
    prost::Message::encoded_len(&snapshot::gateway::snapshot(facts, "gw-1", moment.monotonic, moment.unix))
}
