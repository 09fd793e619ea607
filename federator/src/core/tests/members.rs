//! What sidecars and gateways may say of themselves, and what is kept of it.

use super::*;
use crate::registry::Presence;

fn one_sidecar() -> (World, Cluster, Joined) {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.join("sidecar", "web", at(0));
    (world, east, web)
}

fn member<'a>(cluster: &'a Cluster, joined: &Joined) -> &'a crate::registry::Member {
    &cluster.core.facts.registry.members[&joined.block()]
}

#[test]
fn a_hello_that_is_not_right_is_refused_and_enters_nobody() {
    type Change = fn(&mut v1::SidecarHello);
    let many = |h: &mut v1::SidecarHello| h.services = vec![local_service("shop/web"); 257];
    let cases: &[(&str, Change, &[&str])] = &[
        ("an endpoint of another block", |h| h.endpoints[0] ^= 0x10, &["not of the leased block"]),
        ("no endpoint", |h| h.endpoints.clear(), &["endpoints", "at least one"]),
        ("17 endpoints", |h| h.endpoints = vec![h.endpoints[0]; 17], &["endpoints", "at most 16"]),
        ("a foreign lease", |h| h.lease.as_mut().unwrap().spiffe_id.push('x'), &["belongs to"]),
        ("an address of noise", |h| h.endpoint_addresses[0] = "here".into(), &["endpoint_addresses", "here"]),
        ("no real address", |h| h.endpoint_addresses[0] = "0.0.0.0:1".into(), &["endpoint_addresses"]),
        ("multicast", |h| h.endpoint_addresses[0] = "224.0.0.1:1".into(), &["endpoint_addresses"]),
        ("port 0", |h| h.endpoint_addresses[0] = "10.0.0.1:0".into(), &["endpoint_addresses"]),
        ("257 services", many, &["services", "257", "at most 256"]),
        ("a service of noise", |h| h.services[0].service = "web".into(), &["services.service"]),
        ("a port of noise", |h| h.services[0].ports[0].port = 70_000, &["services.ports", "70000"]),
    ];
    for (case, change, pieces) in cases {
        let (_world, mut east, web) = one_sidecar();
        let mut hello = web.hello(&["shop/web"]);
        change(&mut hello);
        let before = east.core.facts.leases[&web.block()].clone();
        assert_says(&refusal(east.greet(&web, &hello, at(1))), pieces);
        assert!(east.core.facts.registry.members.is_empty(), "{case}");
        assert_eq!(east.core.facts.leases[&web.block()], before, "{case}");
    }
}

#[test]
fn a_gateway_is_no_sidecar_and_speaks_only_for_itself() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let gateway = east.gateway("gw-1", at(0));
    assert_says(&refusal(east.greet(&gateway, &gateway.hello(&[]), at(1))), &["is a gateway"]);
    let web = east.join("sidecar", "web", at(0));
    for (caller, claimed) in [(&gateway, "gw-2"), (&web, "gw-1")] {
        let hello = gateway_hello(caller, claimed);
        let words = refusal(east.core.gateway_hello(&caller.identity, caller.connection, &hello, at(1)));
        assert_says(&words, &["may not speak for gateway"]);
    }
    let unreachable =
        v1::GatewayHello { border_address: "0.0.0.0:7440".into(), ..gateway_hello(&gateway, "gw-1") };
    let words = refusal(east.core.gateway_hello(&gateway.identity, gateway.connection, &unreachable, at(1)));
    assert_says(&words, &["border_address"]);
}

#[test]
fn a_pod_serves_only_its_own_namespace_and_is_told_why() {
    let (_world, mut east, web) = one_sidecar();
    east.greet(&web, &web.hello(&["shop/web", "bank/vault"]), at(1)).unwrap();
    let member = member(&east, &web);
    assert_eq!(member.services.keys().map(ToString::to_string).collect::<Vec<_>>(), ["shop/web"]);
    assert_says(&member.refused["bank/vault"], &["namespace shop", "token for namespace bank"]);
}

#[test]
fn a_machine_serves_what_it_said_first_until_a_workload_says_otherwise() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let vm = east.join("vm", "db-1", at(0));
    let served = |east: &Cluster| {
        let member = member(east, &vm);
        (
            member.services.keys().map(ToString::to_string).collect::<Vec<_>>(),
            member.refused.get("shop/cart").cloned().unwrap_or_default(),
        )
    };
    east.greet(&vm, &vm.hello(&["shop/db"]), at(1)).unwrap();
    east.greet(&vm, &vm.hello(&["shop/db", "shop/cart"]), at(2)).unwrap();
    let (services, refused) = served(&east);
    assert_eq!(services, ["shop/db"]);
    assert_says(&refused, &["has not served it before", "sidecar: db-1"]);
    drop(east);
    let mut east = world.start("east", at(3));
    east.greet(&vm, &vm.hello(&["shop/cart"]), at(4)).unwrap();
    assert_eq!(served(&east).0, Vec::<String>::new(), "the pin survives a restart");

    east.core.apply(workload("db-1", &["cart"]), false, at(5)).unwrap();
    east.greet(&vm, &vm.hello(&["shop/db", "shop/cart"]), at(6)).unwrap();
    assert_eq!(served(&east).0, ["shop/cart"], "a Workload alone decides");
    assert_says(&member(&east, &vm).refused["shop/db"], &["Workload of machine db-1 does not list it"]);
    east.core.apply(workload("another", &["db"]), false, at(7)).unwrap();
    east.greet(&vm, &vm.hello(&["shop/db", "shop/cart"]), at(8)).unwrap();
    assert_eq!(served(&east).0, ["shop/cart", "shop/db"], "without one, all that it was ever allowed");
}

#[test]
fn whoever_has_not_said_hello_reports_nothing() {
    let (_world, mut east, web) = one_sidecar();
    let words = refusal(east.report(&web, healthy(&["shop/web"]), at(1)));
    assert_says(&words, &["open the configuration stream before reporting"]);
    let api = east.serving("api", &["shop/api"], at(1));
    let borrowed = Joined { connection: api.connection, ..web };
    assert_says(&refusal(east.report(&borrowed, healthy(&["shop/api"]), at(2))), &["before reporting"]);
    let watch = member(&east, &api).watch;
    east.core.closed(watch, at(3));
    assert_says(&refusal(east.report(&api, healthy(&["shop/api"]), at(4))), &["before reporting"]);
}

#[test]
fn a_new_stream_on_the_same_connection_outlives_the_old_one() {
    let (_world, mut east, web) = one_sidecar();
    let first = east.greet(&web, &web.hello(&["shop/web"]), at(1)).unwrap();
    east.greet(&web, &web.hello(&["shop/web"]), at(2)).unwrap();
    east.core.closed(first.watch, at(3));
    east.report(&web, healthy(&["shop/web"]), at(3)).unwrap();
    assert_eq!(endpoint_ids(&east.core, "shop/web").len(), 1);
}

fn shift(sequence: u64, service: &str) -> v1::Shift {
    v1::Shift {
        sequence,
        at_unix_ms: i64::try_from((UNIX + sequence) * 1000).unwrap(),
        service: service.into(),
        from_tier: 0,
        to_tier: 1,
        clusters: vec!["west".into()],
        reason: format!("shift {sequence}"),
    }
}

fn shifts(sequences: std::ops::Range<u64>) -> v1::StatusReport {
    v1::StatusReport { shifts: sequences.map(|n| shift(n, "shop/web")).collect(), ..healthy(&["shop/web"]) }
}

#[test]
fn shifts_are_stored_once_and_acknowledged_and_the_newest_50_are_kept() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    for _ in 0..3 {
        assert_eq!(east.report(&web, shifts(1..31), at(1)).unwrap().acknowledged_shift, 30);
        assert_eq!(east.core.facts.shifts["shop/web"].len(), 30);
    }
    assert_eq!(east.report(&web, shifts(21..91), at(2)).unwrap().acknowledged_shift, 90);
    let kept = |east: &Cluster| {
        east.core.facts.shifts["shop/web"].iter().map(|shift| shift.sequence).collect::<Vec<_>>()
    };
    let newest: Vec<u64> = (41..91).rev().collect();
    assert_eq!(kept(&east), newest);
    assert_eq!(east.core.store.list(Table::Shifts).len(), 50, "what is not kept does not fill the store");
    drop(east);
    let east = world.start("east", at(3));
    assert_eq!(kept(&east), newest);
}

#[test]
fn replicas_of_one_identity_count_their_shifts_each_for_itself() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let replicas = [east.serving("web", &["shop/web"], at(0)), east.serving("web", &["shop/web"], at(0))];
    assert_ne!(replicas[0].block(), replicas[1].block());
    for replica in &replicas {
        assert_eq!(east.report(replica, shifts(1..3), at(1)).unwrap().acknowledged_shift, 2);
    }
    assert_eq!(east.core.facts.shifts["shop/web"].len(), 4, "an acknowledged shift was dropped");
    assert_eq!(east.core.store.list(Table::Shifts).len(), 4);
}

#[test]
fn a_full_disk_costs_no_heartbeat_and_acknowledges_no_shift() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    east.store.set_broken(true);
    for second in 1..10 {
        let ack = east.report(&web, shifts(1..3), at(second)).unwrap();
        assert_eq!(ack.acknowledged_shift, 0);
        east.core.tick(at(second));
    }
    assert_eq!(endpoint_ids(&east.core, "shop/web").len(), 1, "a full disk must not take endpoints out");
    assert!(east.core.facts.shifts.is_empty());
    east.store.set_broken(false);
    assert_eq!(east.report(&web, shifts(1..3), at(11)).unwrap().acknowledged_shift, 2);
    assert_eq!(east.core.facts.shifts["shop/web"].len(), 2);
}

#[test]
fn one_bad_shift_costs_neither_the_heartbeat_nor_the_good_ones() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    let report = v1::StatusReport {
        shifts: vec![shift(1, "shop/web"), shift(2, "no service"), shift(3, "shop/web")],
        ..healthy(&["shop/web"])
    };
    assert_eq!(east.report(&web, report, at(1)).unwrap().acknowledged_shift, 3);
    assert_eq!(east.core.facts.shifts["shop/web"].len(), 2);
}

#[test]
fn inventing_services_in_shifts_does_not_fill_the_store() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    for round in 0..60_u64 {
        let invented = |n: u64| shift(round * 100 + n, &format!("shop/s-{round}-{n}"));
        let report = v1::StatusReport { shifts: (1..=100).map(invented).collect(), ..healthy(&["shop/web"]) };
        east.report(&web, report, at(1)).unwrap();
    }
    assert!(east.core.facts.shifts.len() <= 5000, "{} services", east.core.facts.shifts.len());
    assert!(east.core.store.list(Table::Shifts).len() <= 5000);
    east.report(&web, shifts(7000..7001), at(2)).unwrap();
    assert_eq!(east.core.facts.shifts["shop/web"].len(), 1, "the newest are the ones that stay");
}

#[test]
fn a_full_disk_does_not_lock_out_a_member_that_comes_back() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    let gateway = east.gateway("gw-1", at(0));
    east.store.set_broken(true);
    let restarted = v1::SidecarHello {
        endpoints: vec![web.endpoint(1)],
        endpoint_addresses: vec!["10.0.0.10:7442".into()],
        ..web.hello(&["shop/web"])
    };
    east.greet(&web, &restarted, at(1)).unwrap();
    east.report(&web, healthy(&["shop/web"]), at(1)).unwrap();
    assert_eq!(endpoint_ids(&east.core, "shop/web"), [EndpointId::from_u32(web.endpoint(1))]);
    let moved = v1::GatewayHello { inner_address: "10.0.0.3:7441".into(), ..gateway_hello(&gateway, "gw-1") };
    east.core.gateway_hello(&gateway.identity, gateway.connection, &moved, at(1)).unwrap();
    assert_eq!(east.core.facts.registry.gateways["gw-1"].inner.to_string(), "10.0.0.3:7441");
}

#[test]
fn a_full_disk_gives_no_new_lease_and_pins_nothing() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let vm = east.join("vm", "db-1", at(0));
    let unknown = {
        let member = east.join("sidecar", "web", at(0));
        east.core.facts.leases.remove(&member.block());
        member
    };
    let token = east.token("sidecar", "api", at(0));
    east.store.set_broken(true);
    let leases = east.core.facts.leases.clone();
    let identities = east.core.facts.identities.len();
    for words in [
        refusal(east.core.join_workload(&request_for(&token), at(1))),
        refusal(east.greet(&unknown, &unknown.hello(&[]), at(1))),
        refusal(east.greet(&vm, &vm.hello(&["shop/db"]), at(1))),
        refusal(east.core.apply(export("shop/web", "*"), false, at(1))),
    ] {
        assert_says(&words, &["the disk under /state/store.redb is full", "free some space"]);
    }
    assert_eq!(east.core.facts.leases, leases);
    assert_eq!(east.core.facts.identities.len(), identities);
    assert!(east.core.facts.objects.is_empty() && east.core.facts.registry.members.is_empty());
    east.store.set_broken(false);
    east.core.join_workload(&request_for(&token), at(2)).expect("the token was not used up");
    east.greet(&vm, &vm.hello(&["shop/db"]), at(2)).unwrap();
}

#[test]
fn a_restarted_federator_serves_those_who_were_healthy_and_not_those_who_had_left() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let stays = east.serving("web", &["shop/web"], at(0));
    let leaves = east.serving("api", &["shop/api"], at(0));
    let farewell = v1::StatusReport { leaving: true, ..healthy(&["shop/api"]) };
    east.report(&leaves, farewell, at(1)).unwrap();
    drop(east);
    let mut east = world.start("east", at(2));
    assert_eq!(endpoint_ids(&east.core, "shop/web"), [EndpointId::from_u32(stays.endpoint(0))]);
    assert!(endpoint_ids(&east.core, "shop/api").is_empty(), "it said that it leaves");
    assert_eq!(member(&east, &stays).presence, Presence::Live);
    east.greet(&leaves, &leaves.hello(&["shop/api"]), at(3)).unwrap();
    east.report(&leaves, healthy(&["shop/api"]), at(3)).unwrap();
    assert_eq!(endpoint_ids(&east.core, "shop/api").len(), 1, "it may come back");
}

#[test]
fn a_restarted_federator_forgets_those_whose_lease_has_ended() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.serving("web", &["shop/web"], at(0));
    east.gateway("gw-1", at(0));
    drop(east);
    let mut east = world.start("east", at(3 * DAY));
    assert!(east.core.facts.registry.members.is_empty(), "a lease of three days ago is in rotation");
    assert!(east.core.facts.registry.gateways.is_empty());
    let web = east.join("sidecar", "web", at(3 * DAY));
    east.greet(&web, &web.hello(&["shop/web"]), at(3 * DAY)).unwrap();
    assert_eq!(east.core.facts.registry.members.len(), 1);
}

#[test]
fn a_gateway_whose_lease_has_ended_is_not_told_of_any_more() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.gateway("gw-1", at(0));
    east.core.tick(at(2 * DAY - 1));
    assert_eq!(east.core.facts.registry.gateways.len(), 1);
    east.core.tick(at(2 * DAY + 2));
    assert!(east.core.facts.registry.gateways.is_empty());
}

#[test]
fn a_gateway_that_joined_anew_is_restored_where_it_is_now() {
    // Blocks are drawn at random: over these rounds the older lease comes last in the store about half of the time.
    for _ in 0..6 {
        let mut world = World::new();
        let mut east = world.cluster("east");
        east.gateway("gw-1", at(0));
        let again = east.join("gateway", "gw-1", at(60));
        let hello =
            v1::GatewayHello { inner_address: "10.0.0.77:7441".into(), ..gateway_hello(&again, "gw-1") };
        east.core.gateway_hello(&again.identity, again.connection, &hello, at(60)).unwrap();
        drop(east);
        let east = world.start("east", at(61));
        let restored = &east.core.facts.registry.gateways["gw-1"];
        assert_eq!(restored.inner.to_string(), "10.0.0.77:7441");
        assert_eq!(restored.endpoint.unwrap().0.block(), again.block());
    }
}

#[test]
fn a_revoked_identity_is_issued_to_nobody_and_the_federator_can_not_revoke_itself() {
    let (world, mut east, _web) = one_sidecar();
    let revoke = |spec: Value| {
        object(json!({
            "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation", "metadata": { "name": "gone" }, "spec": spec,
        }))
    };
    let web = "spiffe://acme.example/cluster/east/ns/shop/sa/web";
    east.core.apply(revoke(json!({ "spiffeId": web })), false, at(1)).unwrap();
    let again = |east: &mut Cluster, seconds| {
        let token = east.token("sidecar", "web", at(seconds));
        east.core.join_workload(&request_for(&token), at(seconds))
    };
    assert_says(
        &again(&mut east, 2).unwrap_err().to_string(),
        &[web, "revocation/gone", "tombolo unrevoke gone"],
    );
    let api = east.join("sidecar", "api", at(3));

    // Of what a member says it has enforced, only what is in force is kept.
    east.greet(&api, &api.hello(&[]), at(3)).unwrap();
    let held = crate::revocations::in_force(&east.core.facts)[0].name.clone();
    let says = |name: &str| v1::Enforcement { revocation: name.into(), at_unix_ms: 1 };
    let enforcements = vec![says("east/made-up@1.1"), says(&held)];
    let report = v1::StatusReport { enforcements, ..Default::default() };
    east.report(&api, report, at(3)).unwrap();
    assert_eq!(member(&east, &api).enforced.keys().collect::<Vec<_>>(), [&held]);

    // Over a restart too.
    drop(east);
    let mut east = world.start("east", at(4));
    assert!(again(&mut east, 5).is_err());
    let key = east.core.facts.objects.keys().next().cloned().unwrap();
    assert!(east.core.delete(&key, false, at(1)).unwrap());
    assert!(again(&mut east, 6).is_ok());

    let federator = east.core.facts.cluster.federator_id.to_string();
    let svid = east.core.own_svid(&csr(), at(7)).unwrap();
    assert_eq!(svid.spiffe_id, federator);
    let held = east.core.facts.identities.values().find(|record| record.spiffe_id == federator).unwrap();
    for spec in [json!({ "spiffeId": federator }), json!({ "serial": held.serial })] {
        let refused = east.core.apply(revoke(spec), false, at(8)).unwrap_err().to_string();
        assert_says(&refused, &["own federator", "linked clusters"]);
    }
}
