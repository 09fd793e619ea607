//! Links by objects: only what an object on each side names gets one, and it ends with either.

use tombolo_model::ids::{ClusterTag, Handle};
use tombolo_model::resource::Spec;
use tombolo_model::resource::cluster_link::TagText;
use tombolo_overlay::keys::LinkKey;

use super::*;
use crate::core::first_contact;
use crate::core::objects::KeptByKubernetes;
use crate::facts::CONTROL;

fn link_object(peer: &str, tag: ClusterTag, gateways: &[&str]) -> Object {
    object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": peer },
        "spec": { "tag": TagText(tag), "gateways": gateways },
    }))
}

fn tag(cluster: &Cluster) -> ClusterTag {
    cluster.core.facts.cluster.tag
}

/// What the caller's certificate says.
fn federator(cluster: &mut Cluster, moment: Moment) -> PeerIdentity {
    let id = cluster.core.facts.cluster.federator_id.to_string();
    let chain = cluster.chain(moment);
    drop(chain);
    identity_of(&cluster.core, &id)
}

fn pair() -> (World, Cluster, Cluster) {
    let mut world = World::new();
    let (mut east, mut west) = (world.cluster("east"), world.cluster("west"));
    east.gateway("gw-1", at(0));
    west.gateway("gw-1", at(0));
    (world, east, west)
}

/// `asking` has an object about `asked`; what it is answered.
fn ask(asking: &mut Cluster, asked: &mut Cluster, moment: Moment) -> Result<v1::JoinLinkResponse, CoreError> {
    let caller = federator(asking, moment);
    let peer = asked.core.facts.cluster.name.clone();
    let chain = asking.chain(moment);
    let party = asking.core.begin_contact(&peer, chain)?;
    let chain = asked.chain(moment);
    first_contact::answer(&mut asked.core, &caller, &party, chain, moment)
}

fn name_each_other(east: &mut Cluster, west: &mut Cluster, moment: Moment) {
    let (of_east, of_west) = (tag(east), tag(west));
    east.core.apply(link_object("west", of_west, &["gw.west.example:7440"]), false, moment).unwrap();
    west.core.apply(link_object("east", of_east, &["gw.east.example:7440"]), false, moment).unwrap();
}

fn link_by_objects(east: &mut Cluster, west: &mut Cluster, moment: Moment) {
    name_each_other(east, west, moment);
    let answer = ask(east, west, moment).unwrap();
    let inviter = verified(east, answer.inviter.as_ref().unwrap(), moment);
    let key = LinkKey::from_bytes(answer.link_key.try_into().unwrap());
    east.core.finish_contact(&inviter, &key, moment).unwrap();
}

#[test]
fn objects_on_both_sides_make_the_link_that_a_token_makes() {
    let (_world, mut east, mut west) = pair();
    link_by_objects(&mut east, &mut west, at(1));
    let (there, here) = (&east.core.facts.links[&name("west")], &west.core.facts.links[&name("east")]);
    assert_eq!(there.key, here.key);
    assert_eq!(there.control.handle, west.handle("east", CONTROL).unwrap().handle);
    assert_eq!(here.control.handle, east.handle("west", CONTROL).unwrap().handle);
    assert!(there.by_object && here.by_object && here.unconfirmed && !there.unconfirmed);
    west.core.confirm_link(&name("east"));
    west.core.review_links(at(1000)).unwrap();
    assert!(west.core.facts.links.contains_key(&name("east")), "confirmed");
    assert_says(&refusal(east.core.unlink(&name("west"), at(2))), &["ClusterLink object", "west"]);
}

#[test]
fn a_cluster_under_the_root_that_nobody_named_gets_nothing() {
    let (mut world, mut east, mut west) = pair();
    let mut north = world.cluster("north");
    north.gateway("gw-1", at(0));
    let (of_east, of_west) = (tag(&east), tag(&west));
    // North names east; east names nobody, then somebody else.
    north.core.apply(link_object("east", of_east, &["gw.east.example:7440"]), false, at(0)).unwrap();
    assert_says(&refusal(ask(&mut north, &mut east, at(1))), &["no ClusterLink object in east", "north"]);
    east.core.apply(link_object("west", of_west, &["gw.west.example:7440"]), false, at(1)).unwrap();
    assert_says(&refusal(ask(&mut north, &mut east, at(2))), &["no ClusterLink object in east"]);
    // It says that it is west; its certificate does not.
    let caller = federator(&mut north, at(2));
    west.core.apply(link_object("east", of_east, &["gw.east.example:7440"]), false, at(2)).unwrap();
    let chain = west.chain(at(2));
    let of_west = west.core.begin_contact(&name("east"), chain).unwrap();
    let chain = east.chain(at(2));
    let words = refusal(first_contact::answer(&mut east.core, &caller, &of_west, chain, at(2)));
    assert_says(&words, &["says to be west"]);
    // A member of a cluster that is named is no federator of it.
    let member = PeerIdentity {
        spiffe_id: "spiffe://acme.example/cluster/west/gateway/gw-1".parse().unwrap(),
        ..federator(&mut west, at(2))
    };
    let chain = east.chain(at(2));
    let words = refusal(first_contact::answer(&mut east.core, &member, &of_west, chain, at(2)));
    assert_says(&words, &["is not a federator of west"]);
    assert!(east.core.facts.links.is_empty());
    let gateway = crate::snapshot::gateway::snapshot(&east.core.facts, "gw-1", at(2).monotonic, at(2).unix);
    let handle = Handle::first_contact(tag(&north)).value();
    assert!(
        gateway.handles.iter().all(|h| h.binding.as_ref().unwrap().handle != handle),
        "no way in for north"
    );
}

#[test]
fn only_the_tag_that_the_object_names_is_linked_and_no_cluster_links_itself() {
    let (_world, mut east, mut west) = pair();
    let (of_east, of_west) = (tag(&east), tag(&west));
    let other = ClusterTag::new(of_west.value() ^ 1).filter(|t| *t != of_east).unwrap();
    east.core.apply(link_object("west", other, &["gw.west.example:7440"]), false, at(0)).unwrap();
    west.core.apply(link_object("east", of_east, &["gw.east.example:7440"]), false, at(0)).unwrap();
    assert_says(&refusal(ask(&mut west, &mut east, at(1))), &["about west with tag", &other.to_string()]);
    let itself = link_object("east", of_west, &["gw.east.example:7440"]);
    assert_says(&refusal(east.core.apply(itself, false, at(1))), &["spec.cluster", "this cluster itself"]);
    let own_tag = link_object("south", of_east, &["gw.south.example:7440"]);
    assert_says(&refusal(east.core.apply(own_tag, false, at(1))), &["spec.tag", "this cluster's own"]);
}

#[test]
fn a_link_by_objects_ends_with_either_object_and_begins_anew_with_it() {
    let (_world, mut east, mut west) = pair();
    link_by_objects(&mut east, &mut west, at(1));
    let object = link_object("west", tag(&west), &["gw.west.example:7440"]);
    assert!(east.core.delete(&object.key(), false, at(2)).unwrap());
    assert!(east.core.facts.links.is_empty() && east.handle("west", CONTROL).is_none());
    west.core.ended_by_peer(&name("east"), at(2)).unwrap();
    assert!(west.core.facts.links.is_empty(), "it waits again, and is no link that ended");
    east.core.publish(at(2));
    west.core.publish(at(2));
    east.core.apply(object.clone(), false, at(3)).unwrap();
    link_by_objects(&mut east, &mut west, at(4));
    // Without gateways it restricts, and does not link any more.
    let mut plain = object;
    if let Spec::ClusterLink(spec) = &mut plain.spec {
        spec.gateways.clear();
    }
    east.core.apply(plain, false, at(5)).unwrap();
    assert!(east.core.facts.links.is_empty());
}

#[test]
fn an_answer_that_was_lost_is_given_again_and_a_link_that_nobody_confirms_is_given_up() {
    let (_world, mut east, mut west) = pair();
    name_each_other(&mut east, &mut west, at(1));
    let first = ask(&mut east, &mut west, at(1)).unwrap();
    let again = ask(&mut east, &mut west, at(2)).unwrap();
    assert_eq!(first.link_key, again.link_key);
    west.core.review_links(at(20)).unwrap();
    assert!(!west.core.facts.links.is_empty(), "its answer may be on its way");
    west.core.review_links(at(40)).unwrap();
    assert!(west.core.facts.links.is_empty());
    west.core.set_first_contact(&name("east"), Some(vec!["192.0.2.1:7440".parse().unwrap()]), None);
    assert_eq!(west.core.facts.pending_contacts().count(), 1, "it waits again");
}

#[test]
fn objects_of_kubernetes_are_taken_over_owned_by_it_and_kept_over_restarts() {
    let (world, mut east, west) = pair();
    let object = link_object("west", tag(&west), &[]);
    east.core.apply(object.clone(), false, at(1)).unwrap();
    let kept = |generation| KeptByKubernetes { uid: "u".into(), created_unix: 5, generation };
    use crate::core::objects::Outcome;
    let taken = east.core.apply_of_kubernetes(object.clone(), kept(1), at(2)).unwrap();
    assert_eq!(taken, Outcome::Configured);
    assert_eq!(east.core.apply_of_kubernetes(object.clone(), kept(1), at(2)).unwrap(), Outcome::Unchanged);
    assert_eq!(east.core.apply_of_kubernetes(object.clone(), kept(2), at(2)).unwrap(), Outcome::Configured);
    for refused in [
        refusal(east.core.apply(object.clone(), false, at(3))),
        refusal(east.core.delete(&object.key(), false, at(3))),
    ] {
        assert_says(&refused, &["ClusterLink/west", "kept by this cluster's Kubernetes"]);
    }
    drop(east);
    let mut east = world.start("east", at(4));
    let stored = &east.core.facts.objects[&object.key()];
    assert_eq!((stored.uid.as_str(), stored.generation, stored.in_kubernetes), ("u", 2, true));
    let shown = crate::view::kept_in_kubernetes(&east.core.facts, at(5).monotonic, at(5).unix);
    assert!(shown[&object.key()].0.iter().any(|condition| condition.r#type == "Accepted"));
    assert!(east.core.delete_of_kubernetes(&object.key(), at(5)).unwrap());
    assert!(!east.core.delete_of_kubernetes(&object.key(), at(5)).unwrap());
}
