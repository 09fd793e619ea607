//! Pods join as their service account, as often as pods are started anew, and no more.

use super::*;
use crate::facts::Role;
use crate::token_review::{PodIdentity, ReviewError};

fn pod(uid: &str, account: &str) -> PodIdentity {
    PodIdentity {
        namespace: "shop".parse().unwrap(),
        service_account: account.into(),
        pod_uid: uid.into(),
        pod: format!("{account}-{uid}"),
        bound: true,
    }
}

fn join(
    cluster: &mut Cluster,
    pod: PodIdentity,
    moment: Moment,
) -> Result<v1::JoinWorkloadResponse, CoreError> {
    cluster.core.join_pod(Ok(pod), Role::Sidecar, &csr(), moment)
}

#[test]
fn a_pod_is_its_service_account_and_each_start_has_a_block_of_its_own() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let first = join(&mut east, pod("1", "web"), at(0)).unwrap();
    let second = join(&mut east, pod("1", "web"), at(60)).unwrap();
    let other = join(&mut east, pod("2", "web"), at(60)).unwrap();
    let id = "spiffe://acme.example/cluster/east/ns/shop/sa/web";
    let blocks: Vec<u32> =
        [&first, &second, &other].map(|answer| answer.lease.as_ref().unwrap().block).into();
    assert!([&first, &second, &other].iter().all(|a| a.svid.as_ref().unwrap().spiffe_id == id));
    assert!(blocks[0] != blocks[1] && blocks[1] != blocks[2]);
    let end = |block: u32| east.core.facts.leases[&tombolo_model::ids::Block::new(block).unwrap()].not_after;
    assert_eq!(end(blocks[0]), UNIX + 60, "the start before is over");
    assert!(end(blocks[1]) > UNIX + DAY && end(blocks[2]) > UNIX + DAY);
    assert!(!first.control.unwrap().federators[0].address.is_empty(), "it dials the federator itself");
    // Pods come and go: what they leave is gone a day later.
    east.core.tick(at(DAY + 62));
    let known =
        |block: u32| east.core.facts.leases.contains_key(&tombolo_model::ids::Block::new(block).unwrap());
    assert!(!known(blocks[0]) && known(blocks[1]));
}

#[test]
fn a_pod_in_a_loop_fills_nothing_and_others_join_beside_it() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    for second in 0..5 {
        join(&mut east, pod("1", "web"), at(second)).unwrap();
    }
    let leases = east.core.facts.leases.len();
    for second in 5..100 {
        let words = refusal(join(&mut east, pod("1", "web"), at(second)));
        assert_says(&words, &["web-1", "has joined 5 times within 150 s", "emptyDir"]);
    }
    assert_eq!(east.core.facts.leases.len(), leases);
    join(&mut east, pod("2", "web"), at(100)).unwrap();
    drop(east);
    let mut east = world.start("east", at(101));
    assert_says(&refusal(join(&mut east, pod("1", "web"), at(101))), &["has joined"]);
    join(&mut east, pod("1", "web"), at(151)).unwrap();
}

#[test]
fn who_is_not_vouched_for_is_refused_and_that_is_in_the_log() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    for (error, kind) in [
        (ReviewError::Unauthenticated { expected: "x".into(), reason: "expired".into() }, "denied"),
        (ReviewError::NotBound, "denied"),
        (ReviewError::NotConfigured, "denied"),
        (ReviewError::Unavailable("refused".into()), "exhausted"),
        (ReviewError::NotAllowed("403".into()), "exhausted"),
    ] {
        let refused = east.core.join_pod(Err(error.clone()), Role::Sidecar, &csr(), at(1)).unwrap_err();
        assert_eq!(refused.kind(), kind, "{error}");
        assert_eq!(refused.to_string(), error.to_string());
        east.core.pod_asked(kind, Some(&refused), at(1));
    }
    let shown: Vec<&str> = east.core.facts.pods.refused.keys().map(String::as_str).collect();
    assert_eq!(shown, ["denied"], "an API server that is away is nothing that a pod could mend");
    assert_says(&refusal(east.core.join_pod(Ok(pod("1", "web")), Role::Sidecar, &[1; 10], at(1))), &["CSR"]);
    assert_says(&refusal(join(&mut east, pod("1", "we b"), at(1))), &["we b"]);
    east.core.tick(at(5));
    let (log, _) = super::audit::whole(&east.core);
    let reasons: Vec<&str> = log.iter().map(|entry| entry.reason.as_str()).collect();
    assert!(reasons.iter().any(|reason| reason.contains("bound to no pod")), "{reasons:?}");
}

#[test]
fn what_pods_are_told_holds_no_secret_and_names_where_to_go() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let mut made = |names: &[&str]| {
        let federator_names = names.iter().map(|name| (*name).to_owned()).collect();
        let request =
            v1::CreateJoinTokenRequest { role: "pod".into(), federator_names, ..Default::default() };
        east.core.create_join_token(&request, at(0)).map(|made| token::decode(&made.text).unwrap())
    };
    let named = made(&["federator.tombolo.svc:7443"]).unwrap();
    assert!(named.secret.is_empty() && named.join_keys.is_none() && named.federators.is_empty());
    assert_eq!(made(&[]).unwrap().federators[0].address, "10.0.0.1:7443");
    for bad in ["federator", ":7443", "federator:99999"] {
        assert_says(&refusal(made(&[bad])), &["field federator", bad]);
    }
    assert_says(&refusal(made(&["a:1"; 17])), &["17 names"]);
}

#[test]
fn pods_of_the_named_account_become_the_gateway_that_they_are_called_and_no_others() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let gateway = |account: &str| PodIdentity { pod: "tombolo-gateway-0".into(), ..pod("g", account) };
    let ask = |east: &mut Cluster, account: &str| {
        east.core.join_pod(Ok(gateway(account)), Role::Gateway, &csr(), at(1))
    };
    assert_says(
        &refusal(ask(&mut east, "web")),
        &["shop/web may not be a gateway", "--kubernetes-gateways shop/web"],
    );
    east.core.set_gateways(Some("shop/tombolo-gateway".parse().unwrap()));
    assert_says(
        &refusal(ask(&mut east, "web")),
        &["shop/web may not be a gateway", "pods of shop/tombolo-gateway may"],
    );
    let unbound = PodIdentity { bound: false, ..gateway("tombolo-gateway") };
    let refused = refusal(east.core.join_pod(Ok(unbound), Role::Gateway, &csr(), at(1)));
    assert_says(&refused, &["bound to no pod"]);
    let answer = ask(&mut east, "tombolo-gateway").unwrap();
    let id = answer.svid.unwrap().spiffe_id;
    assert!(id.ends_with("/cluster/east/gateway/tombolo-gateway-0"), "{id}");
    // It is a workload, too, if it asks to be: its account is one like any other.
    let sidecar = east.core.join_pod(Ok(gateway("tombolo-gateway")), Role::Sidecar, &csr(), at(2)).unwrap();
    assert!(sidecar.svid.unwrap().spiffe_id.ends_with("/ns/shop/sa/tombolo-gateway"));
    for bad in ["", "shop", "/a", "shop/", "Shop/a", "shop/a/b"] {
        assert!(bad.parse::<crate::core::pods::ServiceAccount>().is_err(), "{bad}");
    }
}
