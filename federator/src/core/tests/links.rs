//! Links: pinned to a name and a tag, made once, removed whole.

use tombolo_model::ids::ClusterTag;

use super::*;
use crate::facts::CONTROL;

#[test]
fn both_sides_hold_the_same_key_and_dial_each_others_control_handle() {
    let (_world, east, west) = linked();
    let (there, here) = (&east.core.facts.links[&name("west")], &west.core.facts.links[&name("east")]);
    assert_eq!(there.key, here.key);
    assert_eq!(there.control.handle, west.handle("east", CONTROL).unwrap().handle);
    assert_eq!(here.control.export_uid, east.handle("west", CONTROL).unwrap().export_uid);
    assert_eq!((there.tag, here.tag), (west.core.facts.cluster.tag, east.core.facts.cluster.tag));
    assert_eq!(there.first_gateways[0].address.to_string(), "203.0.113.7:7440");
    assert_eq!(east.import("west").freshness, tombolo_model::sync::Freshness::Expired, "nothing heard yet");
}

#[test]
fn a_repeated_link_request_gets_the_same_key_again() {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    let token = link_token(&mut east, "west", at(0));
    let request = link_request(&mut west, &token, at(0));
    let first = answer(&mut east, &request, at(1)).unwrap();
    let again = answer(&mut east, &request, at(2)).unwrap();
    assert_eq!(first.link_key, again.link_key);
    let control = |answer: v1::JoinLinkResponse| answer.inviter.unwrap().control;
    assert_eq!(control(first), control(again));
    let other = link_request(&mut west, &token, at(3));
    assert_ne!(other, request, "a fresh proof");
    assert_says(&refusal(answer(&mut east, &other, at(3))), &["used already"]);
}

#[test]
fn a_link_needs_a_gateway_on_both_sides_and_a_peer_that_is_new() {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    let request = v1::CreateLinkTokenRequest { peer: "west".into(), ttl_seconds: 0 };
    assert_says(&refusal(east.core.create_link_token(&request, at(0))), &["no gateway is connected"]);
    east.gateway("gw-1", at(0));
    let token = link_token(&mut east, "west", at(0));
    let chain = west.chain(at(0));
    let tag = ClusterTag::new(token.tag).unwrap();
    let words = refusal(west.core.begin_link(&name("east"), tag, &token.token_id, chain));
    assert_says(&words, &["no gateway is connected"]);
    let own = v1::CreateLinkTokenRequest { peer: "east".into(), ttl_seconds: 0 };
    assert_says(&refusal(east.core.create_link_token(&own, at(0))), &["this cluster itself"]);
    west.gateway("gw-1", at(0));
    link(&mut east, &mut west, at(1));
    assert_says(
        &refusal(east.core.create_link_token(&request, at(2))),
        &["linked already", "tombolo unlink west"],
    );
}

#[test]
fn a_peer_of_the_own_name_or_with_a_tag_in_use_is_refused() {
    let (_world, mut east, west) = linked();
    let own_tag = east.core.facts.cluster.tag;
    let west_tag = west.core.facts.cluster.tag;
    let free =
        ClusterTag::new((1..).find(|t| *t != own_tag.value() && *t != west_tag.value()).unwrap()).unwrap();
    let cases: &[(&str, ClusterTag, &[&str])] = &[
        ("east", free, &["both sides are called east"]),
        ("north", own_tag, &["both clusters have the tag", "--recreate"]),
        ("north", west_tag, &["west is linked with the tag", "two clusters with one tag"]),
        ("west", west_tag, &["west is linked already"]),
    ];
    let chain = east.chain(at(1));
    let handles = east.core.facts.handles.clone();
    for (peer, tag, pieces) in cases {
        assert_says(&refusal(east.core.begin_link(&name(peer), *tag, "t", chain.clone())), pieces);
    }
    assert_eq!(east.core.facts.handles, handles, "a refused link costs no handle");
    assert!(west.core.facts.links[&name("east")].recreated.is_none());
}

#[test]
fn a_recreated_peer_is_shown_until_it_is_accepted_and_then_links_anew() {
    let (mut world, mut east, west) = linked();
    let old = west.core.facts.cluster.tag;
    drop(west);
    world.sign("west", Existing::Recreate);
    std::fs::remove_file(world.store_file("west")).unwrap();
    let mut west = world.start("west", at(10));
    west.gateway("gw-1", at(10));
    let new = west.core.facts.cluster.tag;
    assert_ne!(old, new);
    // The recreated cluster invites, and the old link still stands here.
    let token = link_token(&mut west, "east", at(10));
    let chain = east.chain(at(10));
    let words = refusal(east.core.begin_link(&name("west"), new, &token.token_id, chain));
    assert_says(&words, &["ClusterRecreated", &old.to_string(), &new.to_string(), "link accept west"]);
    assert_eq!(east.core.facts.links[&name("west")].recreated, Some(new));
    assert_eq!(east.core.facts.links[&name("west")].tag, old, "the pin stays");
    drop(east);
    let mut east = world.start("east", at(11));
    assert_eq!(east.core.facts.links[&name("west")].recreated, Some(new), "it is on the disk");
    assert_eq!(east.core.accept_link(&name("west"), at(12)).unwrap(), new);
    assert!(east.core.facts.links.is_empty());
    link(&mut west, &mut east, at(13));
    assert_eq!(east.core.facts.links[&name("west")].tag, new);
    assert_says(&refusal(east.core.accept_link(&name("west"), at(14))), &["nothing to accept"]);
    assert_says(&refusal(east.core.accept_link(&name("north"), at(14))), &["no link to north"]);
}

#[test]
fn unlinking_removes_everything_that_came_with_the_link() {
    let (world, mut east, _west) = linked();
    east.serving("web", &["shop/web"], at(1));
    east.core.apply(export("shop/web", "*"), false, at(1)).unwrap();
    east.core.publish(at(1));
    imports::feed(&mut east, &["shop/api"], at(1));
    east.core.tick(at(2));
    assert_eq!(east.core.store.list(Table::Imports).len(), 1);
    let released: Vec<_> =
        [CONTROL, "shop/web"].map(|s| east.handle("west", s).unwrap().handle).into_iter().collect();

    let unlinked = east.core.unlink(&name("west"), at(3)).unwrap();
    assert!(unlinked.existed);
    assert_eq!(unlinked.removed, ["export shop/web to west", "import shop/api from west"]);
    east.core.publish(at(3));
    east.core.tick(at(5));
    for (what, gone) in [
        ("link", east.core.facts.links.is_empty()),
        ("import", east.core.facts.imports.is_empty()),
        ("view", east.core.views.is_empty()),
        ("handles", east.core.facts.handles.keys().all(|(importer, _)| *importer != name("west"))),
        ("stored link", east.core.store.list(Table::Links).is_empty()),
        ("stored import", east.core.store.list(Table::Imports).is_empty()),
    ] {
        assert!(gone, "the {what} is still there");
    }
    assert!(released.iter().all(|handle| east.core.released.contains_key(handle)), "handles rest for a day");
    assert!(east.handle("east", "shop/web").is_some(), "what is not the link's stays");
    assert!(!east.core.unlink(&name("west"), at(6)).unwrap().existed);
    drop(east);
    let east = world.start("east", at(7));
    assert!(east.core.facts.links.is_empty() && east.core.facts.imports.is_empty());
}

#[test]
fn unlinking_on_a_full_disk_changes_nothing() {
    let (_world, mut east, _west) = linked();
    let handles = east.core.facts.handles.clone();
    east.store.set_broken(true);
    assert_says(&refusal(east.core.unlink(&name("west"), at(1))), &["disk", "full"]);
    assert_eq!(east.core.facts.handles, handles);
    assert!(east.core.facts.links.contains_key(&name("west")));
    assert!(east.core.facts.imports.contains_key(&name("west")));
    east.store.set_broken(false);
    assert!(east.core.unlink(&name("west"), at(2)).unwrap().existed);
}

#[test]
fn a_link_that_the_peer_has_ended_carries_nothing_and_may_be_made_anew() {
    let (_world, mut east, mut west) = linked();
    east.serving("web", &["shop/web"], at(1));
    east.core.apply(export("shop/web", "west"), false, at(1)).unwrap();
    imports::feed(&mut east, &["shop/api"], at(1));
    east.core.publish(at(1));
    assert!(east.handle("west", "shop/web").is_some());
    west.core.unlink(&name("east"), at(2)).unwrap();
    east.core.ended_by_peer(&name("west"), at(3)).unwrap();
    east.core.publish(at(2));
    assert!(east.handle("west", "shop/web").is_none());
    assert!(east.import("west").exports.is_empty());
    assert_says(&east.import("west").last_error, &["west has unlinked"]);
    link(&mut east, &mut west, at(3));
    assert!(east.core.facts.links[&name("west")].is_live());
    assert!(east.handle("west", "shop/web").is_some());
}

#[test]
fn a_joiner_that_gives_up_gives_the_handle_back() {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    let token = link_token(&mut east, "west", at(0));
    link_request(&mut west, &token, at(0));
    let handle = west.handle("east", CONTROL).unwrap().handle;
    west.core.abandon_link(&name("east"), at(1));
    assert!(west.handle("east", CONTROL).is_none());
    assert!(west.core.released.contains_key(&handle));
    link(&mut east, &mut west, at(2));
    west.core.abandon_link(&name("east"), at(3));
    assert!(west.handle("east", CONTROL).is_some(), "a link that stands is not abandoned");
}

#[test]
fn a_party_is_believed_only_with_its_own_federators_chain_under_our_root() {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    let token = link_token(&mut east, "west", at(0));
    let request = link_request(&mut west, &token, at(0));
    let good = request.joiner.clone().unwrap();
    let member = {
        let token = west.token("vm", "db-1", at(0));
        let svid = west.core.join_workload(&request_for(&token), at(0)).unwrap().svid.unwrap();
        [svid.chain_der, vec![good.ca_chain_der[2].clone()]].concat()
    };
    let mut other = World::new();
    let mut stranger = other.cluster("west");
    let strangers = stranger.chain(at(0));
    type Case<'a> = (&'a str, Box<dyn Fn(&mut v1::LinkParty) + 'a>, &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        ("no chain", Box::new(|p| p.ca_chain_der.clear()), &["party.ca_chain"]),
        ("another root", Box::new(|p| p.ca_chain_der = strangers.clone()), &["another federation"]),
        (
            "another root's chain under ours",
            Box::new(|p| p.ca_chain_der[..2].clone_from_slice(&strangers[..2])),
            &["the chain of west does not hold"],
        ),
        ("a member's chain", Box::new(|p| p.ca_chain_der = member.clone()), &["is not a federator"]),
        ("another name", Box::new(|p| p.cluster = "north".into()), &["whoever says to be north"]),
        ("another tag", Box::new(|p| p.tag ^= 1), &["whoever says to be west"]),
        ("no federator", Box::new(|p| p.federator_ids.clear()), &["party.federator_ids"]),
        (
            "another cluster's federator",
            Box::new(|p| p.federator_ids = vec!["spiffe://acme.example/cluster/east/federator".into()]),
            &["party.federator_ids", "of cluster west"],
        ),
        ("no control handle", Box::new(|p| p.control = None), &["party.control"]),
        (
            "a control handle for somebody else",
            Box::new(|p| p.control.as_mut().unwrap().importer = "north".into()),
            &["not a control handle for east"],
        ),
        (
            "a reserved handle",
            Box::new(|p| p.control.as_mut().unwrap().handle = 1),
            &["not a control handle"],
        ),
        (
            "a gateway on loopback",
            Box::new(|p| p.gateways[0].address = "127.0.0.1:7440".into()),
            &["gateways.address", "127.0.0.1:7440"],
        ),
    ];
    let own = &east.core.facts;
    linking::verify_party(&good, own, false, at(0).unix).unwrap();
    for (case, change, pieces) in cases {
        let mut party = good.clone();
        change(&mut party);
        match linking::verify_party(&party, own, false, at(0).unix) {
            Ok(_) => panic!("{case}: believed"),
            Err(error) => assert_says(&error.to_string(), pieces),
        }
    }
    let late = Duration::from_secs(UNIX + 2 * DAY);
    assert!(linking::verify_party(&good, own, false, late).is_err(), "its chain has expired");
    assert!(linking::verify_proof(&good, &request.token_id, &request.joiner_chain_proof));
    let changed = v1::LinkParty { gateways: Vec::new(), ..good.clone() };
    assert!(!linking::verify_proof(&changed, &request.token_id, &request.joiner_chain_proof));
    assert!(!linking::verify_proof(&good, "another token", &request.joiner_chain_proof));
}
