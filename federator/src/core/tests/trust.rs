//! Trust updates as the core takes them, keeps them and passes them on.

use prost::Message;
use tombolo_identity::rotation::{SignedUpdate, TrustUpdate, UpdateError, is_issued_by};
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::sync::Update;

use super::*;
use crate::core::trust::settle;
use crate::facts::TrustRecord;
use crate::registry::HeldTrust;
use crate::rotation::{TRUST, progress_key, records};

/// Of a rotation of a world's root.
struct Rotation {
    next: RootAuthority,
}

impl Rotation {
    fn of(world: &World) -> Self {
        let domain = "acme.example".parse().unwrap();
        let next = RootAuthority::init(&world.dir.path().join("next"), domain, at(0).unix).unwrap();
        Self { next }
    }

    fn update(&self, world: &World, step: u64, clusters: &[&Cluster]) -> TrustUpdate {
        let (old, new) = (world.root.certificate().clone(), self.next.certificate().clone());
        let again = |cluster: &&Cluster| {
            let certificate = &cluster.core.facts.trust.intermediate;
            self.next.reissue(certificate, world.root.registry(), at(0).unix).unwrap()
        };
        TrustUpdate {
            trust_domain: world.root.trust_domain.clone(),
            sequence: 1 + step,
            roots: if step == 3 { vec![new.clone()] } else { vec![old, new.clone()] },
            crosses: vec![world.root.cross_sign(&new, at(0).unix).unwrap()],
            intermediates: if step == 1 { Vec::new() } else { clusters.iter().map(again).collect() },
        }
    }

    fn signed(&self, world: &World, step: u64, clusters: &[&Cluster]) -> Vec<u8> {
        let update = self.update(world, step, clusters);
        RootAuthority::sign_update(&update, &[&world.root, &self.next]).unwrap().to_bytes()
    }
}

/// Everything that `from` tells `to`, as a snapshot.
fn passed_on(from: &Cluster, to: &mut Cluster, revision: u64, moment: Moment) {
    let own = from.core.facts.cluster.name.clone();
    let told = crate::records::records(&from.core.facts, &to.core.facts.cluster.name);
    let update = Update::Snapshot {
        epoch: Epoch(7),
        revision: Revision(revision),
        records: told.into_iter().collect(),
    };
    to.core.apply_update(&own, Epoch(7), update, moment).unwrap();
    to.core.publish(moment);
}

fn linked(world: &mut World, pairs: &[(&str, &str)]) -> BTreeMap<String, Cluster> {
    let names: BTreeSet<&str> = pairs.iter().flat_map(|(a, b)| [*a, *b]).collect();
    let mut clusters: BTreeMap<String, Cluster> = names
        .into_iter()
        .map(|name| {
            let mut cluster = world.cluster(name);
            cluster.gateway("gw-1", at(0));
            (name.to_owned(), cluster)
        })
        .collect();
    for (a, b) in pairs {
        let mut joiner = clusters.remove(*b).unwrap();
        let inviter = clusters.get_mut(*a).unwrap();
        super::link(inviter, &mut joiner, at(0));
        clusters.insert((*b).to_owned(), joiner);
    }
    clusters
}

fn word_of(core: &Core, cluster: &str) -> Option<v1::TrustProgress> {
    let words = crate::rotation::words(&core.facts);
    let word = words.get(&name(cluster))?;
    Some(v1::TrustProgress::decode(word.wire.progress.as_slice()).unwrap())
}

#[test]
fn a_rotation_goes_from_cluster_to_cluster_and_their_words_come_back() {
    let mut world = World::new();
    // East and far are two links apart.
    let mut clusters = linked(&mut world, &[("east", "mid"), ("mid", "far")]);
    let [east, far, mid] = ["east", "far", "mid"].map(|name| clusters.remove(name).unwrap());
    let (mut east, mut far, mut mid) = (east, far, mid);
    let rotation = Rotation::of(&world);
    for step in 1..=3 {
        let bytes = rotation.signed(&world, step, &[&east, &mid, &far]);
        let moment = at(step * 10);
        assert!(east.core.update_trust(&bytes, moment).unwrap());
        assert!(!east.core.update_trust(&bytes, moment).unwrap(), "held already");
        passed_on(&east, &mut mid, step * 10, moment);
        passed_on(&mid, &mut far, step * 10, moment);
        passed_on(&far, &mut mid, step * 10 + 1, moment);
        passed_on(&mid, &mut east, step * 10 + 1, moment);
        for cluster in [&east, &mid, &far] {
            let trust = &cluster.core.facts.trust;
            assert_eq!(trust.bundle.sequence, step + 1);
            let under_new = is_issued_by(&trust.intermediate, rotation.next.certificate(), moment.unix);
            assert_eq!(under_new, step > 1);
            assert_eq!(trust.crosses.len(), usize::from(step > 1), "shown where it leads somewhere");
        }
        let word = word_of(&east.core, "far").unwrap();
        assert_eq!((word.sequence, word.members), (step + 1, 2));
        assert_eq!(word.pending.len(), 2, "its federator and gateway have said nothing: {word:?}");
    }
    // What a member says changes the word, which is passed on only where it is news.
    let trust = far.core.facts.trust.clone();
    let held =
        HeldTrust { sequence: 4, issuer_sha256: trust.issuer_sha256, issued_unix: at(60).unix.as_secs() };
    far.core.own_trust(held, at(60));
    far.core.tick(at(60));
    passed_on(&far, &mut mid, 60, at(60));
    passed_on(&mid, &mut east, 60, at(60));
    assert_eq!(word_of(&east.core, "far").unwrap().holding, 1);
    let told: Vec<_> = records(&mid.core.facts, &name("far")).into_iter().map(|(key, _)| key).collect();
    assert_eq!(told, [TRUST.to_owned(), progress_key("mid"), progress_key("east")]);
}

#[test]
fn a_cluster_that_is_made_after_a_rotation_takes_its_last_update_over_with_its_first_link() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.gateway("gw-1", at(0));
    let mut rotation = Rotation::of(&world);
    let updates: Vec<_> = (1..=3).map(|step| rotation.signed(&world, step, &[&east])).collect();
    for update in &updates {
        assert!(east.core.update_trust(update, at(1)).unwrap());
    }
    rotation.next.keep_bundle(&east.core.facts.trust.bundle).unwrap();
    let material = rotation.next.sign_cluster(&name("south"), Existing::Refuse, at(0).unix).unwrap();
    material.save(&world.trust_dir("south")).unwrap();
    let mut south = world.start("south", at(2));
    south.gateway("gw-1", at(2));
    super::link(&mut east, &mut south, at(2));
    passed_on(&east, &mut south, 1, at(3));
    assert_eq!(south.core.facts.trust.update, east.core.facts.trust.update);
    assert!(south.import("east").rejected.is_empty(), "{:?}", south.import("east").rejected);
    passed_on(&south, &mut east, 1, at(4));
    assert_eq!(word_of(&east.core, "south").unwrap().sequence, 4);
}

#[test]
fn what_is_refused_changes_nothing_and_is_counted() {
    let mut world = World::new();
    let mut clusters = linked(&mut world, &[("east", "west")]);
    let (mut east, west) = (clusters.remove("east").unwrap(), clusters.remove("west").unwrap());
    let rotation = Rotation::of(&world);
    let stage = rotation.signed(&world, 1, &[]);
    let reissue = rotation.signed(&world, 2, &[&east, &west]);
    let without_north = rotation.signed(&world, 3, &[&east, &west]);
    let mut north = world.cluster("north");
    north.core.update_trust(&stage, at(1)).unwrap();
    let error = north.core.update_trust(&without_north, at(1)).unwrap_err();
    assert_says(
        &error.to_string(),
        &["without a certificate", "trust cluster north --renew", "trust reload"],
    );
    assert_eq!((north.core.facts.trust.bundle.sequence, north.core.facts.trust.refused["stranded"]), (2, 1));
    let stranger = World::new();
    let foreign = Rotation::of(&stranger).signed(&stranger, 2, &[]);
    east.core.update_trust(&reissue, at(1)).unwrap();
    let before = east.core.facts.trust.clone();
    let emptied = {
        let empty = TrustUpdate { roots: Vec::new(), ..rotation.update(&world, 3, &[&east]) };
        RootAuthority::sign_update(&empty, &[&world.root]).unwrap().to_bytes()
    };
    for (bytes, reason) in [
        (&stage, "old"),
        (&foreign, "unsigned"),
        (&emptied, "roots"),
        (&reissue[..100].to_vec(), "malformed"),
        (&Vec::new(), "malformed"),
    ] {
        let error = east.core.update_trust(bytes, at(2)).unwrap_err();
        assert!(matches!(&error, CoreError::Trust(e) if e.kind() == reason), "{reason}: {error}");
        assert_eq!(
            east.core.facts.trust.refused[reason],
            1 + u64::from(reason == "malformed" && bytes.is_empty())
        );
        assert_eq!(east.core.facts.trust.bundle, before.bundle);
        assert_eq!(east.core.facts.trust.intermediate, before.intermediate);
    }
    // The same from a peer: its record is refused with the reason, its others are taken.
    let record = v1::Record {
        key: TRUST.into(),
        value: Some(v1::record::Value::Trust(v1::TrustRecord { update: foreign })),
    };
    let update = Update::Snapshot {
        epoch: Epoch(7),
        revision: Revision(1),
        records: [(TRUST.to_owned(), record)].into_iter().collect(),
    };
    east.core.apply_update(&name("west"), Epoch(7), update, at(3)).unwrap();
    assert!(east.import("west").rejected[TRUST].contains("not signed by a root"));
    assert_eq!(east.core.facts.trust.bundle, before.bundle);
}

#[test]
fn a_restart_goes_on_with_what_was_taken_over_and_a_broken_store_with_what_was_before() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let rotation = Rotation::of(&world);
    let stage = rotation.signed(&world, 1, &[]);
    east.store.set_broken(true);
    assert!(matches!(east.core.update_trust(&stage, at(1)), Err(CoreError::Store(_))));
    assert_eq!(east.core.facts.trust.bundle.sequence, 1);
    east.store.set_broken(false);
    east.core.update_trust(&stage, at(1)).unwrap();
    let reissue = rotation.signed(&world, 2, &[&east]);
    east.core.update_trust(&reissue, at(1)).unwrap();
    let retire = rotation.signed(&world, 3, &[&east]);
    east.core.update_trust(&retire, at(1)).unwrap();
    let trust = east.core.facts.trust.clone();
    drop(east);
    let again = world.start("east", at(2));
    assert_eq!(again.core.facts.trust.bundle, trust.bundle);
    assert_eq!(again.core.facts.trust.intermediate, trust.intermediate);
    assert_eq!(again.core.facts.trust.update, trust.update);
    let read = SignedUpdate::from_bytes(trust.update.as_deref().unwrap()).unwrap().read().unwrap();
    assert_eq!(read.sequence, 4);
}

#[test]
fn a_words_certificate_cluster_and_signature_are_checked_whoever_brings_it() {
    let mut world = World::new();
    let mut clusters = linked(&mut world, &[("east", "west")]);
    let (mut east, mut west) = (clusters.remove("east").unwrap(), clusters.remove("west").unwrap());
    let stage = Rotation::of(&world).signed(&world, 1, &[]);
    east.core.update_trust(&stage, at(1)).unwrap();
    west.core.update_trust(&stage, at(1)).unwrap();
    let good = west.core.facts.own_word.clone().unwrap().wire.clone();
    let read = |key: &str, wire: &v1::SignedTrustProgress| {
        crate::rotation::read_word(&east.core.facts.trust, key, wire, at(1).unix)
    };
    let key = progress_key("west");
    assert_eq!(read(&key, &good).unwrap().cluster, name("west"));
    let changed = |change: &dyn Fn(&mut v1::TrustProgress)| {
        let mut progress = v1::TrustProgress::decode(good.progress.as_slice()).unwrap();
        change(&mut progress);
        v1::SignedTrustProgress { progress: progress.encode_to_vec(), ..good.clone() }
    };
    let own = east.core.facts.trust.intermediate.to_vec();
    let cases = [
        (read(&progress_key("east"), &good), "record.key"),
        (read(&key, &changed(&|p| p.holding = 99)), "signature"),
        (read(&key, &changed(&|p| p.tag += 1)), "certificate"),
        (read(&key, &changed(&|p| p.certificate = own.clone())), "certificate"),
        (read(&key, &changed(&|p| p.certificate.clear())), "certificate"),
        (
            read(&key, &v1::SignedTrustProgress { progress: vec![0; 17 * 1024], ..good.clone() }),
            "trust_progress",
        ),
        (read(&key, &v1::SignedTrustProgress { progress: vec![0xff], ..good.clone() }), "progress"),
    ];
    for (result, field) in cases {
        assert!(result.unwrap_err().to_string().contains(field), "{field}");
    }
}

#[test]
fn a_further_intermediate_is_read_without_a_restart_if_it_is_this_clusters() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    world.cluster("west");
    let before = east.core.facts.trust.clone();
    let load = |world: &World, cluster: &str| ClusterMaterial::load(&world.trust_dir(cluster)).unwrap();
    assert!(!east.core.reload_trust(load(&world, "east"), false, at(1)).unwrap(), "nothing is new");
    // Of another cluster, of another root, of a key that is not its own.
    let words = east.core.reload_trust(load(&world, "west"), false, at(1)).unwrap_err().to_string();
    assert!(words.contains("west") && words.contains("east"), "{words}");
    let mut stranger = World::new();
    stranger.sign("east", Existing::Refuse);
    let mut foreign = load(&stranger, "east");
    foreign.tag = east.core.facts.cluster.tag;
    assert!(east.core.reload_trust(foreign, false, at(1)).is_err());
    world.sign("east", Existing::Renew);
    let mixed = ClusterMaterial { certificate: before.intermediate.clone(), ..load(&world, "east") };
    let words = east.core.reload_trust(mixed, false, at(1)).unwrap_err().to_string();
    assert!(words.contains("ca.key"), "{words}");
    assert_eq!(east.core.facts.trust.intermediate, before.intermediate);

    assert!(east.core.reload_trust(load(&world, "east"), false, at(1)).unwrap());
    assert_ne!(east.core.facts.trust.issuer_sha256, before.issuer_sha256);
    let leaves_after = at(5).unix.as_secs();
    assert!(east.core.reload_trust(load(&world, "east"), true, at(5)).unwrap());
    assert_eq!(
        crate::rotation::renewal(&east.core.facts, at(9_000_000).unix).issued_after_unix as u64,
        leaves_after
    );
    drop(east);
    let again = world.start("east", at(6));
    assert_eq!(again.core.facts.trust.leaves_after, leaves_after, "kept over a restart");
}

#[test]
fn an_older_bundle_is_refused_at_a_start_and_a_clock_set_back_makes_nobody_renew_for_ever() {
    let mut world = World::new();
    let east = world.cluster("east");
    let record = TrustRecord { sequence: 5, ..TrustRecord::default() };
    let refused = settle(&east.core.issuer.material, &record, at(1).unix).unwrap_err();
    assert_eq!(refused, UpdateError::Old { held: 5, found: 1 });
    let record = TrustRecord { leaves_after: at(100).unix.as_secs(), ..TrustRecord::default() };
    let settled = settle(&east.core.issuer.material, &record, at(1).unix).unwrap();
    assert_eq!(settled.leaves_since(at(1).unix.as_secs()), at(1).unix.as_secs());
    assert_eq!(settled.leaves_since(at(200).unix.as_secs()), at(100).unix.as_secs());
}
