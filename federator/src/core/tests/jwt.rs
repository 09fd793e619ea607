//! JWT-SVIDs: for whom they are signed, with which key, and what linked clusters are told of it.

use tombolo_identity::Revocations;
use tombolo_identity::jwt::JwtAuthorities;

use super::imports::{snapshot, take};
use super::*;
use crate::{jwt, records};

fn request(audience: &[&str]) -> v1::MintJwtRequest {
    v1::MintJwtRequest { audience: audience.iter().map(ToString::to_string).collect() }
}

fn revocation(spec: Value) -> Object {
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation", "metadata": { "name": "r" }, "spec": spec,
    }))
}

#[test]
fn a_member_gets_a_token_for_itself_until_it_is_revoked_and_a_restart_keeps_the_key() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.join("sidecar", "web", at(0));
    let minted = east.core.mint_jwt(&web.identity, &request(&["shop"]), at(1)).unwrap();
    assert_eq!(minted.not_after_unix, i64::try_from(UNIX + 301).unwrap());
    let known = |core: &Core| JwtAuthorities::new(core.facts.jwt_authorities.iter().cloned());
    let judge = |core: &Core, token: &str| {
        let domain = &core.facts.cluster.trust_domain;
        known(core).verify(token, "shop", domain, &Revocations::default(), at(2).unix)
    };
    assert_eq!(judge(&east.core, &minted.token).unwrap().spiffe_id, web.identity.spiffe_id);

    for path in ["/gateway/gw-1", "/federator"] {
        let caller = identity_of(&east.core, &format!("spiffe://acme.example/cluster/east{path}"));
        assert_says(&refusal(east.core.mint_jwt(&caller, &request(&["shop"]), at(1))), &["no workload"]);
    }
    assert_says(
        &refusal(east.core.mint_jwt(&web.identity, &request(&[]), at(1))),
        &["audience", "at least one"],
    );
    let spec = json!({ "spiffeId": web.identity.spiffe_id.as_str(), "reason": "test" });
    east.core.apply(revocation(spec), false, at(3)).unwrap();
    assert_says(&refusal(east.core.mint_jwt(&web.identity, &request(&["shop"]), at(3))), &["is revoked"]);

    drop(east);
    let east = world.start("east", at(4));
    assert!(judge(&east.core, &minted.token).is_ok(), "its key is the same after a restart");
}

#[test]
fn a_months_old_key_gives_way_to_a_new_one_that_was_published_before() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.join("sidecar", "web", at(0));
    let mut kids = Vec::new();
    for moment in [at(0), at(30 * DAY), at(30 * DAY + HOUR + 900), at(31 * DAY)] {
        east.core.renew_jwt_keys(moment.unix.as_secs());
        let minted = east.core.mint_jwt(&web.identity, &request(&["shop"]), moment).unwrap();
        let published = east.core.facts.jwt_authorities.clone();
        let signed_by = published.iter().position(|a| {
            let one = JwtAuthorities::new([a.clone()]);
            let domain = &east.core.facts.cluster.trust_domain;
            one.verify(&minted.token, "shop", domain, &Revocations::default(), moment.unix).is_ok()
        });
        kids.push((published.len(), published[signed_by.unwrap()].kid().to_owned()));
    }
    assert_eq!(kids.iter().map(|(published, _)| *published).collect::<Vec<_>>(), [1, 2, 1, 1]);
    assert!(kids[0].1 == kids[1].1 && kids[1].1 != kids[2].1 && kids[2].1 == kids[3].1);
    // A disk that is full costs the change of keys, not the tokens.
    east.store.set_broken(true);
    east.core.renew_jwt_keys(at(70 * DAY).unix.as_secs());
    assert_eq!(east.core.facts.jwt_authorities.len(), 1);
    east.core.mint_jwt(&web.identity, &request(&["shop"]), at(70 * DAY)).unwrap();
}

#[test]
fn a_linked_cluster_believes_the_peers_keys_until_it_is_unlinked_or_revoked() {
    let (_world, mut east, west) = linked();
    let told = records::records(&west.core.facts, &name("east"));
    let record = told[jwt::AUTHORITIES].clone();
    take(&mut east, snapshot(1, vec![(record.key.clone(), record.clone())]), at(5)).unwrap();
    let believed = |east: &Cluster| {
        jwt::believed(&east.core.facts).into_iter().map(|a| a.cluster().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(believed(&east), ["east", "west"]);
    // A peer that speaks for another cluster is not believed, and what was good stays.
    let mut forged = record;
    let Some(v1::record::Value::JwtAuthorities(authorities)) = &mut forged.value else { panic!() };
    authorities.authorities[0].cluster = "east".into();
    take(&mut east, snapshot(2, vec![(forged.key.clone(), forged)]), at(6)).unwrap();
    assert!(east.import("west").rejected[jwt::AUTHORITIES].contains("jwt_authorities.cluster"));
    assert_eq!(believed(&east), ["east", "west"]);

    east.core.apply(revocation(json!({ "cluster": "west", "reason": "test" })), false, at(7)).unwrap();
    assert_eq!(believed(&east), ["east"]);
    let key = revocation(json!({ "cluster": "west", "reason": "test" })).key();
    east.core.delete(&key, false, at(7)).unwrap();
    assert_eq!(believed(&east), ["east", "west"]);
    east.core.unlink(&name("west"), at(8)).unwrap();
    assert_eq!(believed(&east), ["east"]);
}

#[test]
fn what_a_workload_shows_is_not_taken_for_what_its_sidecar_shows() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    let own_serial = |east: &Cluster, workload: bool| {
        let of = |i: &&crate::facts::IdentityRecord| {
            i.workload == workload && i.spiffe_id == web.identity.spiffe_id.as_str()
        };
        hex::decode(&east.core.facts.identities.values().find(of).unwrap().serial).unwrap()
    };
    let renewal = v1::RenewRequest { csr_der: csr(), lease: Some(web.lease.clone()), workload: true };
    east.core.renew(&web.identity, &renewal, at(9)).unwrap();
    let asked = |serial: Vec<u8>| {
        let serial = tombolo_model::resource::revocation::trimmed_serial(&serial).to_vec();
        let wire = v1::Revocation {
            name: "east/r@1.1".into(),
            cluster: "east".into(),
            target: Some(v1::revocation::Target::Serial(serial)),
            reason: String::new(),
        };
        crate::revocations::progress(&east.core.facts, &wire).len()
    };
    assert_eq!(asked(own_serial(&east, false)), 1, "the sidecar is cut off: the federator alone is asked");
    assert_eq!(asked(own_serial(&east, true)), 2, "the sidecar has to enforce what its workload's key did");
}
