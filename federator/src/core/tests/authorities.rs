//! CAs that end: found, logged and shown at 30, 7 and 1 days, and told apart.

use tombolo_model::expiry::Urgency;

use super::*;
use crate::authorities::{self, Announcements};
use crate::view;

#[test]
fn an_intermediate_that_ends_is_found_at_30_7_and_1_days_with_what_to_do() {
    let mut world = World::new();
    let east = world.cluster("east");
    let facts = &east.core.facts;
    let end = facts.trust.intermediate_not_after;
    let before = |days: u64| Duration::from_secs(end - days * DAY);
    let found = |unix: Duration| view::status(facts, Duration::ZERO, unix).findings;
    assert_eq!(found(before(31)), []);
    for (days, severity) in [(30, "notice"), (8, "notice"), (7, "warning"), (1, "critical"), (0, "critical")]
    {
        let found = found(before(days));
        assert_eq!((found.len(), found[0].severity.as_str()), (1, severity), "{days} days before");
        assert_says(&found[0].about, &["intermediate of east"]);
        assert_says(&found[0].remedy, &["tombolo trust cluster east --renew", "--trust-dir"]);
    }
    assert_says(&found(before(29))[0].message, &["expires in 29 days", "2027-"]);
    let after = found(Duration::from_secs(end + 3 * DAY));
    assert_eq!(after[0].reason, "CaExpired");
    assert_says(&after[0].message, &["has expired 3 days ago"]);
    // The root lives nine years longer.
    let roots = authorities::of(facts).into_iter().filter(|a| a.role == "root").collect::<Vec<_>>();
    assert_eq!((roots.len(), roots[0].fingerprint.len()), (1, 16));
    let late = found(Duration::from_secs(roots[0].not_after - 5 * DAY));
    assert_eq!(late.len(), 2);
    assert_eq!(late[0].reason, "CaExpired", "the worst first");
    assert_says(&late[1].about, &["root", &roots[0].fingerprint]);
}

#[test]
fn the_log_is_told_at_each_step_and_then_as_often_as_it_is_urgent() {
    let mut world = World::new();
    let east = world.cluster("east");
    let facts = &east.core.facts;
    let end = facts.trust.intermediate_not_after;
    let mut announcements = Announcements::default();
    let mut told = Vec::new();
    // A look every ten minutes for the last 40 days.
    for minutes in (0..=40 * 24 * 60).step_by(10) {
        let unix = end - 40 * DAY + minutes * 60;
        told.extend(
            announcements.due(facts, Duration::from_secs(unix)).into_iter().map(|(urgency, _)| urgency),
        );
    }
    let count = |urgency| told.iter().filter(|told| **told == urgency).count();
    assert_eq!(count(Urgency::Month), 23, "daily");
    assert_eq!(count(Urgency::Week), 24, "four times a day");
    assert_eq!(count(Urgency::Day), 24, "hourly");
    assert_eq!(count(Urgency::Expired), 1);
}

#[test]
fn a_store_that_fails_is_a_finding_until_it_works_again() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let reasons = |east: &Cluster| {
        let found = view::status(&east.core.facts, at(1).monotonic, at(1).unix).findings;
        found.into_iter().map(|finding| finding.reason).collect::<Vec<_>>()
    };
    east.store.set_broken(true);
    east.core.tick(at(1));
    east.core.publish(at(1));
    assert_eq!(reasons(&east), ["StoreNotWritable"]);
    east.store.set_broken(false);
    east.core.tick(at(2));
    east.core.publish(at(2));
    assert_eq!(reasons(&east), [""; 0]);
}
