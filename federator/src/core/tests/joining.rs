//! Who may join as what, by `JoinPolicy` objects.

use super::*;
use crate::facts::Role;
use crate::token_review::PodIdentity;

fn policy(name: &str, spec: Value) -> Object {
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "JoinPolicy", "metadata": { "name": name }, "spec": spec,
    }))
}

fn databases() -> Object {
    let machines = json!({ "names": ["db-*"], "groups": ["databases"] });
    policy("databases", json!({ "machines": machines, "services": ["shop/db", "shop/db-*"] }))
}

fn vm(name: &str, group: &str) -> v1::CreateJoinTokenRequest {
    v1::CreateJoinTokenRequest {
        role: "vm".into(),
        name: name.into(),
        group: group.into(),
        ..Default::default()
    }
}

fn member(east: &mut Cluster, answer: v1::JoinWorkloadResponse) -> Joined {
    east.connections += 1;
    Joined {
        identity: identity_of(&east.core, &answer.svid.unwrap().spiffe_id),
        lease: answer.lease.unwrap(),
        connection: east.connections,
    }
}

fn served(east: &mut Cluster, member: &Joined, services: &[&str], second: u64) -> (Vec<String>, String) {
    east.greet(member, &member.hello(services), at(second)).unwrap();
    let member = &east.core.facts.registry.members[&member.block()];
    let refused = member.refused.values().cloned().collect::<Vec<_>>().join("; ");
    (member.services.keys().map(ToString::to_string).collect(), refused)
}

#[test]
fn a_token_is_bound_to_its_group_and_made_only_for_who_may_join() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let before = east.core.create_join_token(&vm("web-1", ""), at(0)).unwrap();
    east.core.apply(databases(), false, at(1)).unwrap();
    for (name, group, field) in
        [("web-1", "", "field name"), ("db-1", "", "field name"), ("db-1", "web", "field group")]
    {
        let words = refusal(east.core.create_join_token(&vm(name, group), at(2)));
        assert_says(&words, &[field, name, "databases: name db-*, group databases", "--group"]);
    }
    // One that was made before the policy is refused when it is used, and stays good for when that is mended.
    let token = token::decode(&before.text).unwrap();
    assert_says(&refusal(east.core.join_workload(&request_for(&token), at(3))), &["web-1", "JoinPolicy"]);
    let all = policy("all", json!({ "machines": {} }));
    east.core.apply(all.clone(), false, at(4)).unwrap();
    east.core.join_workload(&request_for(&token), at(5)).unwrap();
    east.core.delete(&all.key(), false, at(6)).unwrap();

    let made = east.core.create_join_token(&vm("db-1", "databases"), at(7)).unwrap();
    let token = token::decode(&made.text).unwrap();
    let joined = east.core.join_workload(&request_for(&token), at(8)).unwrap();
    let joined = member(&mut east, joined);
    assert_eq!(east.core.facts.leases[&joined.block()].group, "databases");
    east.core.tick(at(70));
    let (log, _) = super::audit::whole(&east.core);
    assert!(log.iter().any(|entry| entry.reason.starts_with("group databases; good until")));
    assert!(log.iter().any(|entry| entry.reason.contains("no JoinPolicy lets machine")), "{log:?}");
}

#[test]
fn groups_are_names_and_of_machines_alone() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    assert_says(&refusal(east.core.create_join_token(&vm("db-1", "Data Bases"), at(0))), &["group"]);
    let sidecar = v1::CreateJoinTokenRequest {
        role: "sidecar".into(),
        namespace: "shop".into(),
        ..vm("web", "databases")
    };
    assert_says(&refusal(east.core.create_join_token(&sidecar, at(0))), &["field group", "only machines"]);
}

#[test]
fn what_a_machine_may_serve_is_limited_after_a_restart_too() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.apply(databases(), false, at(0)).unwrap();
    let made = east.core.create_join_token(&vm("db-1", "databases"), at(1)).unwrap();
    let joined = east.core.join_workload(&request_for(&token::decode(&made.text).unwrap()), at(2)).unwrap();
    let db = member(&mut east, joined);
    let (services, refused) = served(&mut east, &db, &["shop/db", "shop/cart"], 3);
    assert_eq!(services, ["shop/db"]);
    assert_says(&refused, &["shop/cart", "spec.services"]);
    drop(east);
    let mut east = world.start("east", at(10));
    assert_eq!(served(&mut east, &db, &["shop/db", "shop/cart"], 11).0, ["shop/db"]);
    // Without a policy the group means nothing.
    east.core.delete(&databases().key(), false, at(12)).unwrap();
    assert_eq!(served(&mut east, &db, &["shop/db"], 13).0, ["shop/db"]);
}

#[test]
fn service_accounts_are_selected_by_namespace_and_name_and_token_holders_need_no_policy() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let pod = |namespace: &str, account: &str| PodIdentity {
        namespace: namespace.parse().unwrap(),
        service_account: account.into(),
        pod_uid: format!("{namespace}-{account}"),
        pod: account.into(),
        bound: true,
    };
    let accounts = json!({ "namespaces": ["shop", "team-*"], "names": ["web"] });
    let spec = json!({ "serviceAccounts": accounts, "services": ["*/web"] });
    east.core.apply(policy("pods", spec), false, at(0)).unwrap();
    let answer = east.core.join_pod(Ok(pod("team-a", "web")), Role::Sidecar, &csr(), at(1)).unwrap();
    assert_eq!(answer.svid.unwrap().spiffe_id, "spiffe://acme.example/cluster/east/ns/team-a/sa/web");
    for (namespace, account) in [("bank", "web"), ("shop", "cart")] {
        let words = refusal(east.core.join_pod(Ok(pod(namespace, account)), Role::Sidecar, &csr(), at(2)));
        assert_says(&words, &[&format!("{namespace}/{account}"), "spec.serviceAccounts", "pods: namespace"]);
    }
    let answer = east.core.join_pod(Ok(pod("shop", "web")), Role::Sidecar, &csr(), at(3)).unwrap();
    let web = member(&mut east, answer);
    let (services, refused) = served(&mut east, &web, &["shop/web", "shop/cart"], 4);
    assert_eq!(services, ["shop/web"]);
    assert_says(&refused, &["spec.services"]);
    let by_token = east.join("sidecar", "cart", at(5));
    assert_eq!(served(&mut east, &by_token, &["shop/cart"], 6).0, ["shop/cart"]);
    east.join("vm", "db-1", at(7));
}
