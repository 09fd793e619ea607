//! Starting from a store: what is refused, what goes on where it was.

use super::*;
use crate::core::boot::BootError;

fn load(world: &World, store_of: &str, trust_of: &str) -> Result<Core, BootError> {
    let store = Arc::new(RedbStore::open(&world.store_file(store_of)).unwrap());
    let material = ClusterMaterial::load(&world.trust_dir(trust_of)).unwrap();
    Core::load(store, material, Default::default(), at(0).unix)
}

#[test]
fn a_store_of_another_cluster_or_tag_is_refused_with_what_to_do() {
    let mut world = World::new();
    drop(world.cluster("east"));
    drop(world.cluster("west"));
    let words = load(&world, "east", "west").err().unwrap().to_string();
    assert_says(&words, &["belongs to cluster east", "to west", "--state-dir"]);
    world.sign("east", Existing::Renew);
    load(&world, "east", "east").unwrap();
    world.sign("east", Existing::Recreate);
    let words = load(&world, "east", "east").err().unwrap().to_string();
    assert_says(&words, &["recreated", "move the state directory away"]);
}

#[test]
fn a_restart_keeps_keys_epoch_and_objects_and_its_revisions_are_higher() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let web = east.serving("web", &["shop/web"], at(0));
    east.core.apply(export("shop/web", "*"), false, at(0)).unwrap();
    let stored = |core: &Core| core.facts.objects.values().next().unwrap().clone();
    let mut revision = 0;
    let (object, epoch) = (stored(&east.core), east.core.facts.cluster.epoch);
    let keys = east.core.block_keys(web.block(), at(0));
    let handle = east.handle("east", "shop/web").unwrap().clone();
    for start in 1..5 {
        for change in 0..start * 10 {
            east.core.apply(workload("db-1", &[&format!("s{change}")]), false, at(start)).unwrap();
            east.core.publish(at(start));
        }
        assert!(east.core.facts.revision > revision, "revisions went back over a restart");
        revision = east.core.facts.revision;
        drop(east);
        east = world.start("east", at(start));
        assert!(east.core.facts.revision > revision);
        assert_eq!(east.core.facts.cluster.epoch, epoch);
        assert_eq!(east.core.block_keys(web.block(), at(0)), keys);
        assert_eq!(*east.handle("east", "shop/web").unwrap(), handle);
        assert_eq!(east.core.facts.objects[&export("shop/web", "*").key()], object);
    }
}

#[test]
fn a_lost_store_gets_a_new_epoch_and_the_keys_that_members_still_hold() {
    let mut world = World::new();
    let east = world.cluster("east");
    let kept = |east: &Cluster| {
        let cluster = &east.core.facts.cluster;
        let control = east.handle(cluster.name.as_str(), crate::facts::CONTROL).unwrap().clone();
        (cluster.cluster_key.clone(), cluster.self_link_key.clone(), control)
    };
    let (epoch, keys) = (east.core.facts.cluster.epoch, kept(&east));
    drop(east);
    std::fs::remove_file(world.store_file("east")).unwrap();
    let east = world.start("east", at(1));
    assert_ne!(east.core.facts.cluster.epoch, epoch, "peers take a snapshot, never a delta");
    assert_eq!(kept(&east), keys, "else no member could come back to show its lease");
    let west = world.cluster("west");
    assert_ne!(kept(&west).0, keys.0, "another CA, other keys");
    assert_ne!(keys.0.as_bytes(), keys.1.as_bytes());
    assert_ne!(kept(&west).2.handle, keys.2.handle);
}

#[test]
fn what_a_newer_version_wrote_is_named_and_not_lost() {
    let mut world = World::new();
    drop(world.cluster("east"));
    let store = RedbStore::open(&world.store_file("east")).unwrap();
    let newer = Transaction {
        checks: Vec::new(),
        writes: vec![crate::store::Write::Put {
            table: Table::Links,
            key: "west".into(),
            value: br#"{"v":2,"d":{}}"#.to_vec(),
        }],
    };
    store.commit(&newer).unwrap();
    drop(store);
    let words = load(&world, "east", "east").err().unwrap().to_string();
    assert_says(&words, &["links/west", "newer version"]);
    let store = RedbStore::open(&world.store_file("east")).unwrap();
    assert!(store.get(Table::Links, "west").is_some());
}

#[test]
fn an_object_is_applied_once_and_keeps_its_uid() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let apply =
        |east: &mut Cluster, to: &str, dry| east.core.apply(export("shop/web", to), dry, at(1)).unwrap();
    assert_eq!(apply(&mut east, "west", true).as_str(), "created");
    assert!(east.core.facts.objects.is_empty(), "a dry run changes nothing");
    assert_eq!(apply(&mut east, "west", false).as_str(), "created");
    let uid = east.core.facts.objects.values().next().unwrap().uid.clone();
    assert_eq!(apply(&mut east, "west", false).as_str(), "unchanged");
    assert_eq!(apply(&mut east, "north", true).as_str(), "configured");
    assert_eq!(apply(&mut east, "north", false).as_str(), "configured");
    let stored = east.core.facts.objects.values().next().unwrap();
    assert_eq!((stored.generation, &stored.uid), (2, &uid));
    let key = export("shop/web", "west").key();
    assert!(east.core.delete(&key, true, at(1)).unwrap() && east.core.facts.objects.len() == 1);
    assert!(east.core.delete(&key, false, at(1)).unwrap() && east.core.facts.objects.is_empty());
    assert!(!east.core.delete(&key, false, at(1)).unwrap());
}
