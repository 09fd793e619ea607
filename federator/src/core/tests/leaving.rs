//! Machines that leave for good.

use super::*;

#[test]
fn a_machine_that_leaves_is_out_at_once_is_not_renewed_and_may_come_back_by_a_new_token() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let member = east.join("vm", "db-1", at(0));
    east.greet(&member, &member.hello(&["shop/db"]), at(1)).unwrap();
    east.report(&member, healthy(&["shop/db"]), at(1)).unwrap();
    let service = "shop/db".parse().unwrap();
    assert_eq!(east.core.facts.registry.healthy(&service).len(), 1);
    // It speaks, as the first does when a copy of it wants to leave.
    let lives = east.core.leave(&member.identity, Some(&member.lease), at(2)).unwrap_err();
    assert!(matches!(lives, CoreError::Contested(_)), "{lives}");
    assert_eq!(east.core.facts.registry.healthy(&service).len(), 1);
    east.core.leave(&member.identity, Some(&member.lease), at(3)).unwrap();
    assert!(east.core.facts.registry.serving(&service).next().is_none());
    // A copy of its disk, started later, neither serves nor renews.
    let back = east.greet(&member, &member.hello(&["shop/db"]), at(3)).unwrap_err();
    assert!(matches!(back, CoreError::Denied(_)), "{back}");
    let renewal =
        v1::RenewRequest { csr_der: csr(), lease: Some(member.lease.clone()), ..Default::default() };
    let refused = east.core.renew(&member.identity, &renewal, at(3)).unwrap_err();
    assert!(matches!(refused, CoreError::Denied(_)), "{refused}");
    let lapsed = v1::RenewLapsedRequest { csr_der: csr(), lease: Some(member.lease.clone()) };
    let refused = east.core.renew_lapsed(&member.identity, None, &lapsed, at(3)).unwrap_err();
    assert!(matches!(refused, CoreError::Denied(_)), "{refused}");
    // Twice is once, and a restart does not bring it back.
    east.core.leave(&member.identity, Some(&member.lease), at(4)).unwrap();
    drop(east);
    let mut east = world.start("east", at(10));
    assert!(east.core.facts.registry.serving(&service).next().is_none());
    let again = east.join("vm", "db-1", at(11));
    assert_ne!(again.block(), member.block());
}

#[test]
fn nobody_leaves_for_another_and_gateways_drain_instead() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (one, other) = (east.join("vm", "db-1", at(0)), east.join("vm", "db-2", at(0)));
    let refused = east.core.leave(&one.identity, Some(&other.lease), at(1)).unwrap_err();
    assert!(matches!(refused, CoreError::Denied(_)), "{refused}");
    assert!(east.core.leave(&one.identity, None, at(1)).is_err());
    let gateway = east.gateway("gw-1", at(1));
    assert!(east.core.leave(&gateway.identity, Some(&gateway.lease), at(2)).is_err());
}
