//! kill -9 at any moment: what was acknowledged is there, and nothing is there by half.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use tombolo_model::audit::Action;

use super::stores::{child, child_store};
use super::*;

/// What the child does again and again: an object whose generation counts, and a member that joins.
#[test]
#[ignore = "the other process of nothing_that_was_acknowledged_is_lost_by_kill_9"]
fn crash_child() {
    let dir = child_store();
    let store = Arc::new(RedbStore::open(&dir.join("east.redb")).unwrap());
    let material = ClusterMaterial::load(&dir.join("east-trust")).unwrap();
    let core = Core::load(store, material, Default::default(), at(0).unix).unwrap();
    let mut east = Cluster { core, store: Arc::new(Flaky::open(dir.join("unused.redb"))), connections: 0 };
    let (endpoint, _) = east.core.own_endpoint(at(0)).unwrap();
    east.core.set_own_endpoint(endpoint);
    east.core.publish(at(0));
    println!("starts {} {}", east.core.facts.revision >> 32, endpoint.endpoint.value());
    for round in 0.. {
        let changed = workload("db-1", &[&format!("s{round}"), &format!("t{round}")]);
        east.core.apply(changed, false, at(round)).unwrap();
        println!("object {}", generation(&east.core));
        let joined = east.join("sidecar", "web", at(round));
        println!("joined {}", joined.lease.block);
        east.core.publish(at(round));
    }
}

fn generation(core: &Core) -> u64 {
    core.facts.objects.values().next().map_or(0, |stored| stored.generation)
}

#[test]
fn nothing_that_was_acknowledged_is_lost_by_kill_9() {
    let mut world = World::new();
    drop(world.cluster("east"));
    let (mut starts, mut last, mut blocks) = (1, 0, Vec::new());
    let mut endpoints = std::collections::BTreeSet::new();
    for kill in 0..12_usize {
        let mut process =
            child("crashes::crash_child", world.dir.path()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut acknowledged = 0;
        // Killed after so many acknowledgements, wherever it is then; what it had still said counts.
        for line in lines {
            let mut words =
                line.split_whitespace().skip_while(|w| !["starts", "object", "joined"].contains(w));
            match (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) {
                (Some("starts"), Some(number)) => {
                    starts += 1;
                    assert!(number >= starts, "start {number} was counted before");
                    let endpoint: u32 = words.next().unwrap().parse().unwrap();
                    assert!(endpoints.insert(endpoint), "an endpoint id is used by two starts");
                    starts = number;
                }
                (Some("object"), Some(number)) => last = number,
                (Some("joined"), Some(block)) => blocks.push(u32::try_from(block).unwrap()),
                _ => continue,
            }
            acknowledged += 1;
            if acknowledged == 1 + kill * 3 {
                process.kill().unwrap();
            }
        }
        process.wait().unwrap();
        assert!(acknowledged > kill * 3, "the process ended by itself");

        let store = Arc::new(RedbStore::open(&world.store_file("east")).unwrap());
        let material = ClusterMaterial::load(&world.trust_dir("east")).unwrap();
        let core = Core::load(store, material, Default::default(), at(0).unix).unwrap();
        starts += 1;
        let found = generation(&core);
        assert!(found == last || found == last + 1, "generation {found}, {last} was acknowledged");
        last = found;
        for block in &blocks {
            let block = tombolo_model::ids::Block::new(*block).unwrap();
            assert!(core.facts.leases.contains_key(&block), "block {block} was given out and is forgotten");
        }
        // A join is one transaction: lease, identity and used token. At most the last one was not acknowledged.
        let leases = core.facts.leases.values().filter(|l| l.role == crate::facts::Role::Sidecar).count();
        assert!(
            leases == blocks.len() || leases == blocks.len() + 1,
            "{leases} leases, {} joined",
            blocks.len()
        );
        // Each has its entry in the audit log, and the log has no other join.
        let (entries, _) = super::audit::whole(&core);
        let joins = entries.iter().filter(|entry| entry.action == Action::Join).count();
        assert_eq!(joins, leases, "an identity without an entry, or an entry without an identity");
        let tokens = crate::store::list::<crate::facts::TokenRecord>(&*core.store).unwrap();
        let used = tokens.iter().filter(|(_, token)| token.used_by.is_some()).count();
        assert_eq!(used, leases, "a token was used without a lease, or a lease given without a token");
        assert_eq!(core.facts.identities.len(), leases);
        blocks = core
            .facts
            .leases
            .values()
            .filter(|l| l.role == crate::facts::Role::Sidecar)
            .map(|l| l.block.value())
            .collect();
    }
    assert!(last > 20, "only {last} objects were applied");
}
