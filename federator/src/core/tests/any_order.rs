//! Any interleaving of what can happen to a core: it never panics, its revision only grows, and its facts stay coherent.

use proptest::prelude::*;
use tombolo_model::ids::{Epoch, Revision};
use tombolo_model::sync::Update;

use super::*;
use crate::facts::CONTROL;

/// One thing that happens. Members are `0..3` sidecars, `3` a machine, `4` a gateway.
#[derive(Clone, Debug)]
enum Step {
    Join(usize),
    Hello { member: usize, incarnation: u32, services: Vec<usize> },
    Report { member: usize, healthy: bool, leaving: bool, shifts: Vec<u64> },
    Closed(usize),
    Renew(usize),
    Export { service: usize, to: bool },
    Unexport(usize),
    Workload(Vec<usize>),
    Update { epoch: u64, revision: u64, delta: bool, services: Vec<usize>, bad: bool },
    Heard,
    Lost,
    RestartWatch,
    Unlink,
    EndedByPeer,
    Link,
    Broken(bool),
    Restart,
    LoseStore,
    Wait(u64),
}

const SERVICES: [&str; 4] = ["shop/web", "shop/api", "shop/cart", "bank/vault"];

fn some_services() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0..SERVICES.len(), 0..3)
}

fn step() -> impl Strategy<Value = Step> {
    let member = 0..5_usize;
    prop_oneof![
        4 => member.clone().prop_map(Step::Join),
        6 => (member.clone(), 0..16_u32, some_services())
            .prop_map(|(member, incarnation, services)| Step::Hello { member, incarnation, services }),
        6 => (member.clone(), any::<bool>(), any::<bool>(), proptest::collection::vec(0..9_u64, 0..3))
            .prop_map(|(member, healthy, leaving, shifts)| Step::Report { member, healthy, leaving, shifts }),
        2 => member.clone().prop_map(Step::Closed),
        2 => member.prop_map(Step::Renew),
        3 => (0..SERVICES.len(), any::<bool>()).prop_map(|(service, to)| Step::Export { service, to }),
        2 => (0..SERVICES.len()).prop_map(Step::Unexport),
        1 => some_services().prop_map(Step::Workload),
        4 => (1..3_u64, 0..6_u64, any::<bool>(), some_services(), any::<bool>()).prop_map(
            |(epoch, revision, delta, services, bad)| Step::Update { epoch, revision, delta, services, bad }),
        1 => Just(Step::Heard),
        1 => Just(Step::Lost),
        1 => Just(Step::RestartWatch),
        1 => Just(Step::Unlink),
        1 => Just(Step::EndedByPeer),
        2 => Just(Step::Link),
        2 => any::<bool>().prop_map(Step::Broken),
        1 => Just(Step::Restart),
        1 => Just(Step::LoseStore),
        6 => prop_oneof![0..4_u64, Just(60), Just(HOUR), Just(DAY), Just(40 * DAY)].prop_map(Step::Wait),
    ]
}

struct Play {
    world: World,
    east: Option<Cluster>,
    west: Cluster,
    joined: Vec<Option<Joined>>,
    /// The furthest that the clock has come.
    now: u64,
    revision: u64,
    released: BTreeMap<Handle, u64>,
}

impl Play {
    fn new() -> Self {
        let (world, east, west) = linked();
        Self {
            world,
            east: Some(east),
            west,
            joined: vec![None; 5],
            now: 0,
            revision: 0,
            released: BTreeMap::new(),
        }
    }

    fn moment(&self) -> Moment {
        at(self.now)
    }

    fn step(&mut self, step: Step) {
        let moment = self.moment();
        let east = self.east.as_mut().unwrap();
        match step {
            Step::Join(member) => {
                let (role, name) = [
                    ("sidecar", "a"),
                    ("sidecar", "b"),
                    ("sidecar", "b"),
                    ("vm", "db-1"),
                    ("gateway", "gw-1"),
                ][member];
                if !east.store.broken.load(Ordering::Relaxed) {
                    self.joined[member] = Some(east.join(role, name, moment));
                }
            }
            Step::Hello { member, incarnation, services } => {
                let Some(joined) = &self.joined[member] else { return };
                if member == 4 {
                    let hello = gateway_hello(joined, "gw-1");
                    let _ = east.core.gateway_hello(&joined.identity, joined.connection, &hello, moment);
                    return;
                }
                let services: Vec<_> = services.into_iter().map(|index| SERVICES[index]).collect();
                let hello = v1::SidecarHello {
                    endpoints: vec![joined.endpoint(incarnation)],
                    ..joined.hello(&services)
                };
                let _ = east.core.sidecar_hello(&joined.identity, joined.connection, &hello, moment);
            }
            Step::Report { member, healthy: up, leaving, shifts } => {
                let Some(joined) = self.joined[member].clone() else { return };
                let mut report = healthy(&SERVICES);
                report.health.iter_mut().for_each(|health| health.healthy = up);
                report.leaving = leaving;
                report.shifts = shifts
                    .into_iter()
                    .map(|sequence| v1::Shift { sequence, service: "shop/web".into(), ..Default::default() })
                    .collect();
                let _ = east.report(&joined, report, moment);
            }
            Step::Closed(watch) => east.core.closed(u64::try_from(watch).unwrap() + 1, moment),
            Step::Renew(member) => {
                let Some(joined) = &self.joined[member] else { return };
                let request = v1::RenewRequest { csr_der: csr(), lease: Some(joined.lease.clone()) };
                let _ = east.core.renew(&joined.identity, &request, moment);
            }
            Step::Export { service, to } => {
                let to = if to { "*" } else { "north" };
                let _ = east.core.apply(export(SERVICES[service], to), false, moment);
            }
            Step::Unexport(service) => {
                let _ = east.core.delete(&export(SERVICES[service], "*").key(), false, at(0));
            }
            Step::Workload(services) => {
                let names: std::collections::BTreeSet<_> =
                    services.iter().map(|index| SERVICES[*index].split_once('/').unwrap().1).collect();
                let names: Vec<_> = names.into_iter().collect();
                let _ = east.core.apply(workload("db-1", &names), false, moment);
            }
            Step::Update { epoch, revision, delta, services, bad } => {
                let records: Vec<_> =
                    services.iter().map(|index| imports::any_record(SERVICES[*index], bad)).collect();
                let (epoch, revision) = (Epoch(epoch), Revision(revision));
                let update = if delta {
                    let deletes = records.iter().skip(1).map(|(key, _)| key.clone()).collect();
                    Update::Delta { revision, upserts: records.into_iter().take(1).collect(), deletes }
                } else {
                    Update::Snapshot { epoch, revision, records }
                };
                let _ = east.core.apply_update(&name("west"), epoch, update, moment);
            }
            Step::Heard => east.core.heard_peer(&name("west"), moment),
            Step::Lost => east.core.lost_peer(&name("west"), "lost".into()),
            Step::RestartWatch if east.core.facts.links.contains_key(&name("west")) => {
                east.core.restart_watch(&name("west"));
            }
            Step::RestartWatch => {}
            Step::Unlink => drop(east.core.unlink(&name("west"), moment)),
            Step::EndedByPeer => drop(east.core.ended_by_peer(&name("west"))),
            Step::Link => {
                let request = v1::CreateLinkTokenRequest { peer: "west".into(), ttl_seconds: 0 };
                let Ok(made) = east.core.create_link_token(&request, moment) else { return };
                let token = token::decode(&made.text).unwrap();
                let _ = self.west.core.unlink(&name("east"), moment);
                let request = link_request(&mut self.west, &token, moment);
                let joiner = verified(east, request.joiner.as_ref().unwrap(), moment);
                let _ = east.core.join_link(&request, &joiner, Vec::new(), moment);
                self.west.core.abandon_link(&name("east"), moment);
            }
            Step::Broken(broken) => east.store.set_broken(broken),
            Step::Restart => {
                self.east = None;
                self.east = Some(self.world.start("east", moment));
            }
            Step::LoseStore => {
                self.east = None;
                std::fs::remove_file(self.world.store_file("east")).unwrap();
                self.released.clear();
                self.revision = 0;
                self.east = Some(self.world.start("east", moment));
            }
            Step::Wait(seconds) => {
                self.now += seconds;
                let moment = self.moment();
                self.east.as_mut().unwrap().core.tick(moment);
            }
        }
    }

    /// What holds after every step.
    fn check(&mut self) {
        let moment = self.moment();
        let east = self.east.as_mut().unwrap();
        east.core.publish(moment);
        let facts = &east.core.facts;
        assert!(facts.revision >= self.revision, "the revision went back");
        self.revision = facts.revision;
        let mut handles = std::collections::BTreeSet::new();
        for record in facts.handles.values() {
            assert!(handles.insert(record.handle), "one handle for two services");
            let freed = self.released.get(&record.handle).copied();
            assert!(
                freed.is_none(),
                "a handle is given again {} s after its release",
                self.now - freed.unwrap()
            );
        }
        for handle in east.core.released.keys() {
            assert!(!handles.contains(handle), "a handle is both in use and released");
            self.released.entry(*handle).or_insert(self.now);
        }
        self.released.retain(|_, at| *at + DAY > self.now);
        for (block, lease) in &facts.leases {
            assert_eq!(*block, lease.block);
            assert_eq!(
                crate::store::get::<crate::facts::LeaseRecord>(&*east.store, &allot::block_key(*block))
                    .unwrap()
                    .as_ref(),
                Some(&**lease),
                "the facts know a lease that the store does not"
            );
        }
        for member in facts.registry.members.values() {
            let holder = facts.leases.get(&member.block).map(|lease| lease.spiffe_id.clone());
            assert_eq!(holder.as_deref(), Some(member.spiffe_id.as_str()), "a member without a lease");
        }
        assert_eq!(facts.links.len(), facts.imports.len(), "every link has an import, and no other has");
        for link in facts.links.values() {
            let control = facts.handles.get(&(link.peer.clone(), CONTROL.to_owned()));
            assert!(control.is_some(), "a linked peer has no control handle");
        }
        for shifts in facts.shifts.values() {
            assert!(shifts.len() <= crate::core::boot::SHIFTS_KEPT);
        }
        // What is told of these facts must be tellable.
        crate::snapshot::gateway::snapshot(facts, "gw-1", moment.monotonic, moment.unix);
        crate::records::records(facts, &name("west"));
        crate::view::status(facts, moment.monotonic, moment.unix);
        let rings = crate::snapshot::rings::Rings::default();
        let upstreams: Vec<_> = SERVICES.iter().map(|service| service.parse().unwrap()).collect();
        for block in facts.leases.keys().take(2) {
            crate::snapshot::sidecar::snapshot(
                facts,
                *block,
                &upstreams,
                &rings,
                moment.monotonic,
                moment.unix,
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_breaks_a_core(steps in proptest::collection::vec(step(), 1..60)) {
        let mut play = Play::new();
        for step in steps {
            play.step(step);
            play.check();
        }
    }
}
