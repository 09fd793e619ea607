//! Thresholds, holds, weights, restarts; and that no sequence of events makes traffic flap.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn policy(failover: (&str, &str), failback: (&str, &str)) -> FailoverPolicySpec {
    serde_json::from_value(json!({
        "targetRef": { "kind": "ServiceImport", "name": "web" },
        "tiers": [{ "clusters": ["@self"] }, { "clusters": ["west", "central"], "weights": { "west": 80, "central": 20 } }],
        "failover": { "whenHealthyBelow": failover.0, "for": failover.1 },
        "failback": { "whenHealthyAbove": failback.0, "for": failback.1 },
    }))
    .unwrap()
}

fn machine(failover: (&str, &str), failback: (&str, &str)) -> FailoverMachine {
    FailoverMachine::new(policy(failover, failback), "east".parse().unwrap())
}

fn health(cluster: &str, healthy: u32, total: u32) -> ClusterHealth {
    ClusterHealth {
        cluster: cluster.parse().unwrap(),
        healthy,
        total,
        reachable: true,
        properties: BTreeMap::new(),
    }
}

fn world(east: u32, west: u32, central: u32) -> Vec<ClusterHealth> {
    vec![health("east", east, 10), health("west", west, 10), health("central", central, 10)]
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(1000 + seconds)
}

fn names(outcome: &Outcome) -> Vec<(String, u32)> {
    outcome.active.iter().map(|(c, w)| (c.to_string(), *w)).collect()
}

#[test]
fn traffic_moves_after_the_hold_with_a_reason_and_the_configured_weights() {
    let mut machine = machine(("50%", "3s"), ("80%", "60s"));
    assert_eq!(names(&machine.step(&world(10, 10, 10), at(0))), [("east".into(), 10)]);
    assert!(machine.step(&world(4, 10, 10), at(1)).shift.is_none(), "not before the hold");
    assert_eq!(machine.step(&world(4, 10, 10), at(2)).next_check, Some(at(4)));
    let outcome = machine.step(&world(4, 10, 10), at(4));
    let shift = outcome.shift.clone().unwrap();
    assert_eq!((shift.from_tier, shift.to_tier), (0, 1));
    assert!(shift.reason.contains("under 50% healthy for 3s (now 4 of 10)"), "{}", shift.reason);
    assert_eq!(names(&outcome), [("west".into(), 80), ("central".into(), 20)]);
}

#[test]
fn traffic_comes_back_after_the_failback_hold_only() {
    let mut machine = machine(("50%", "3s"), ("80%", "60s"));
    machine.step(&world(10, 10, 10), at(0));
    machine.step(&world(0, 10, 10), at(1));
    assert_eq!(machine.step(&world(0, 10, 10), at(4)).tier, 1);
    assert_eq!(machine.step(&world(8, 10, 10), at(10)).tier, 1, "80% is not above 80%");
    machine.step(&world(9, 10, 10), at(20));
    assert_eq!(machine.step(&world(9, 10, 10), at(79)).tier, 1);
    machine.step(&world(7, 10, 10), at(79)); // a dip starts the hold anew
    machine.step(&world(9, 10, 10), at(80));
    assert_eq!(machine.step(&world(9, 10, 10), at(139)).tier, 1);
    assert_eq!(machine.step(&world(9, 10, 10), at(140)).shift.unwrap().to_tier, 0);
}

#[test]
fn an_unreachable_cluster_counts_as_down_and_a_dead_one_gets_nothing() {
    let mut machine = machine(("0%", "0s"), ("50%", "5s"));
    machine.step(&world(10, 10, 10), at(0));
    let mut seen = world(10, 0, 3);
    seen[0].reachable = false;
    let outcome = machine.step(&seen, at(1));
    assert_eq!((outcome.tier, names(&outcome)), (1, vec![("central".into(), 20)]));
}

#[test]
fn with_everything_down_it_stays_says_so_and_still_names_where_to_try() {
    let mut machine = machine(("50%", "1s"), ("80%", "5s"));
    machine.step(&world(10, 10, 10), at(0));
    machine.step(&world(0, 0, 0), at(1));
    let outcome = machine.step(&world(0, 0, 0), at(3));
    assert!(outcome.shift.is_none() && outcome.reason.contains("no other tier"), "{}", outcome.reason);
    assert!(!outcome.active.is_empty());
}

#[test]
fn when_the_later_tier_dies_an_earlier_one_serves_before_its_hold() {
    let mut machine = machine(("50%", "1s"), ("80%", "3600s"));
    machine.step(&world(0, 10, 10), at(0));
    machine.step(&world(10, 0, 0), at(1));
    let outcome = machine.step(&world(10, 0, 0), at(2));
    assert_eq!(outcome.tier, 0, "{}", outcome.reason);
}

#[test]
fn a_restart_continues_where_it_stopped() {
    let mut machine = machine(("50%", "1s"), ("80%", "60s"));
    machine.resume(1, "as before".into());
    let outcome = machine.step(&world(10, 10, 10), at(0));
    assert_eq!((outcome.tier, outcome.shift), (1, None));
}

#[test]
fn properties_select_the_importers_region() {
    let spec = serde_json::from_value(json!({
        "targetRef": { "kind": "ServiceImport", "name": "web" },
        "tiers": [{ "matchProperties": { "region": "@SameAsImporter@" } }, { "clusters": ["*"] }],
    }))
    .unwrap();
    let mut machine = FailoverMachine::new(spec, "east".parse().unwrap());
    let mut seen = world(5, 5, 5);
    seen[0].properties.insert("region".into(), "eu".into());
    seen[2].properties.insert("region".into(), "eu".into());
    assert_eq!(names(&machine.step(&seen, at(0))), [("east".into(), 5), ("central".into(), 5)]);
}

proptest! {
    #[test]
    fn it_never_flaps(hold in 1u64..10, steps in proptest::collection::vec((0u32..=10, 0u32..=10, any::<bool>(), 0u64..3), 1..200)) {
        let hold_text = format!("{hold}s");
        let mut machine = machine(("50%", &hold_text), ("50%", &hold_text));
        let (mut now, mut shifts) = (0, 0);
        for (east, west, reachable, pause) in steps {
            now += pause;
            let mut seen = world(east, west, 5);
            seen[0].reachable = reachable;
            let outcome = machine.step(&seen, at(now));
            shifts += u64::from(outcome.shift.is_some());
            prop_assert!(!outcome.active.is_empty());
        }
        prop_assert!(shifts <= now / hold + 1, "{shifts} shifts in {now} s with a hold of {hold} s");
    }
}
