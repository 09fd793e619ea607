//! Join tokens: who may use one, how often, and what a refusal says.

use super::*;
use crate::facts::CONTROL;

fn east() -> (World, Cluster) {
    let mut world = World::new();
    let cluster = world.cluster("east");
    (world, cluster)
}

#[test]
fn the_right_secret_gets_an_identity_a_lease_and_the_way_to_the_federator() {
    let (_world, mut east) = east();
    let token = east.token("sidecar", "web", at(0));
    let answer = east.core.join_workload(&request_for(&token), at(1)).unwrap();
    let svid = answer.svid.unwrap();
    assert_eq!(svid.spiffe_id, "spiffe://acme.example/cluster/east/ns/shop/sa/web");
    let lease = answer.lease.unwrap();
    assert_eq!((lease.spiffe_id, lease.cluster.as_str()), (svid.spiffe_id, "east"));
    let control = answer.control.unwrap();
    assert_eq!(control.handle, east.handle("east", CONTROL).unwrap().handle.value());
    assert_eq!(control.federators[0].address, "10.0.0.1:7443");
    assert_eq!(control.keys, east.core.control_keys(at(1)));
}

#[test]
fn a_token_is_refused_for_every_reason_with_words_of_its_own() {
    type Change = fn(&mut v1::JoinWorkloadRequest);
    let cases: &[(&str, Change, u64, &[&str])] = &[
        ("a wrong secret", |r| r.secret[0] ^= 1, 1, &["not known here, or its secret is wrong"]),
        ("an empty secret", |r| r.secret.clear(), 1, &["not known here, or its secret is wrong"]),
        ("an unknown id", |r| r.token_id = "00".repeat(12), 1, &["not known here"]),
        ("an empty id", |r| r.token_id.clear(), 1, &["not known here"]),
        ("an id of 100 KB", |r| r.token_id = "a".repeat(100_000), 1, &["not known here"]),
        ("another name", |r| r.name = "api".into(), 1, &["for \"web\"", "not for \"api\""]),
        ("too late", |_| (), 901, &["expired 1 s ago"]),
        ("a CSR of noise", |r| r.csr_der = vec![7; 300], 1, &["CSR"]),
        ("a CSR of 100 KB", |r| r.csr_der = vec![7; 100_000], 1, &["CSR", "at most"]),
    ];
    for (case, change, second, pieces) in cases {
        let (_world, mut east) = east();
        let token = east.token("sidecar", "web", at(0));
        let mut request = request_for(&token);
        change(&mut request);
        let leases = east.core.facts.leases.len();
        let words = refusal(east.core.join_workload(&request, at(*second)));
        assert!(words.len() < 1000, "{case}: {} bytes of error", words.len());
        assert_says(&words, pieces);
        assert_eq!(east.core.facts.leases.len(), leases, "{case}: a block was given");
        if *second == 1 {
            east.core.join_workload(&request_for(&token), at(2)).expect("a refused request uses nothing up");
        }
    }
}

#[test]
fn a_name_of_100_kilobytes_is_not_repeated_in_the_refusal() {
    let (_world, mut east) = east();
    let token = east.token("sidecar", "web", at(0));
    let request = v1::JoinWorkloadRequest { name: "x".repeat(100_000), ..request_for(&token) };
    let words = refusal(east.core.join_workload(&request, at(1)));
    assert_says(&words, &["the token is for \"web\""]);
    assert!(words.len() < 1000, "{} bytes of error", words.len());
}

#[test]
fn five_wrong_secrets_void_a_token_even_for_the_right_one() {
    let (world, mut east) = east();
    let token = east.token("vm", "db-1", at(0));
    let wrong = v1::JoinWorkloadRequest { secret: vec![0; 32], ..request_for(&token) };
    for _ in 0..5 {
        assert_says(&refusal(east.core.join_workload(&wrong, at(1))), &["its secret is wrong"]);
    }
    assert_says(&refusal(east.core.join_workload(&request_for(&token), at(2))), &["void", "make a new one"]);
    drop(east);
    let mut east = world.start("east", at(3));
    assert_says(&refusal(east.core.join_workload(&request_for(&token), at(4))), &["void"]);
}

#[test]
fn four_wrong_secrets_do_not() {
    let (_world, mut east) = east();
    let token = east.token("vm", "db-1", at(0));
    let wrong = v1::JoinWorkloadRequest { secret: vec![0; 32], ..request_for(&token) };
    for _ in 0..4 {
        refusal(east.core.join_workload(&wrong, at(1)));
    }
    east.core.join_workload(&request_for(&token), at(2)).unwrap();
}

#[test]
fn another_request_with_a_used_token_is_refused_but_the_same_one_is_answered_again() {
    let (world, mut east) = east();
    let token = east.token("sidecar", "web", at(0));
    let request = request_for(&token);
    let first = east.core.join_workload(&request, at(1)).unwrap();
    let other = request_for(&token);
    assert_says(&refusal(east.core.join_workload(&other, at(2))), &["used already"]);
    let again = east.core.join_workload(&request, at(3)).unwrap();
    let (first, again) = (first.lease.unwrap(), again.lease.unwrap());
    assert_eq!(again.block, first.block, "a lost answer costs no second block");
    drop(east);
    let mut east = world.start("east", at(4));
    let restarted = east.core.join_workload(&request, at(5)).unwrap().lease.unwrap();
    assert_eq!(restarted.block, first.block);
    assert_says(&refusal(east.core.join_workload(&other, at(6))), &["used already"]);
}

#[test]
fn tokens_of_one_kind_do_not_do_for_the_other() {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    let link = link_token(&mut east, "west", at(0));
    let as_join = refusal(east.core.join_workload(&request_for(&link), at(1)));
    assert_says(&as_join, &["link token", "tombolo link join"]);
    let join = east.token("sidecar", "west", at(0));
    let request = link_request(&mut west, &join, at(1));
    assert_says(&refusal(answer(&mut east, &request, at(1))), &["join token", "--join-token-file"]);
}

#[test]
fn what_can_not_be_made_is_refused_with_the_field() {
    let (_world, mut east) = east();
    let request = |role: &str, name: &str, namespace: &str, ttl: u32| v1::CreateJoinTokenRequest {
        role: role.into(),
        name: name.into(),
        namespace: namespace.into(),
        ttl_seconds: ttl,
        ..Default::default()
    };
    let cases: &[(v1::CreateJoinTokenRequest, &[&str])] = &[
        (request("admin", "web", "shop", 0), &["role", "admin"]),
        (request("sidecar", "Web!", "shop", 0), &["Web!"]),
        (request("sidecar", "web", "", 0), &["namespace"]),
        (request("sidecar", "web", "shop", 86_401), &["86401", "24 h"]),
    ];
    for (request, pieces) in cases {
        assert_says(&refusal(east.core.create_join_token(request, at(0))), pieces);
    }
    let outside = v1::CreateJoinTokenRequest { via_gateways: true, ..request("vm", "db-1", "", 0) };
    assert_says(&refusal(east.core.create_join_token(&outside, at(0))), &["no gateway", "tombolo gateway"]);
}

#[test]
fn a_token_from_outside_holds_a_provisional_lease_that_outlives_it_by_a_quarter_of_an_hour() {
    let (_world, mut east) = east();
    east.gateway("gw-1", at(0));
    let request = v1::CreateJoinTokenRequest {
        role: "vm".into(),
        name: "db-1".into(),
        ttl_seconds: 60,
        via_gateways: true,
        ..Default::default()
    };
    let token = token::decode(&east.core.create_join_token(&request, at(0)).unwrap().text).unwrap();
    assert_eq!(token.gateways[0].address, "203.0.113.7:7440");
    let block = token.provisional.unwrap().block;
    let open = |moment: Moment, east: &Cluster| {
        let snapshot =
            crate::snapshot::gateway::snapshot(&east.core.facts, "gw-1", moment.monotonic, moment.unix);
        snapshot.provisional.iter().any(|lease| lease.block == block)
    };
    let end = 60 + 15 * 60;
    assert!(open(at(end), &east), "whoever comes late is told so");
    assert!(!open(at(end + 1), &east));
    let kept = |east: &Cluster| east.core.facts.leases.keys().any(|b| b.value() == block);
    east.core.tick(at(end + DAY));
    assert!(kept(&east), "its keys may still be around");
    east.core.tick(at(end + 2 + DAY));
    assert!(!kept(&east), "a day later nobody remembers it");
}

#[test]
fn an_ended_token_is_forgotten_after_a_day() {
    let (_world, mut east) = east();
    let token = east.token("vm", "db-1", at(0));
    east.core.tick(at(900 + DAY));
    assert_says(&refusal(east.core.join_workload(&request_for(&token), at(900 + DAY))), &["expired"]);
    east.core.tick(at(902 + DAY));
    assert_says(&refusal(east.core.join_workload(&request_for(&token), at(903 + DAY))), &["not known"]);
}
