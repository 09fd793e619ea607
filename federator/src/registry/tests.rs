use super::*;

fn secs(n: f64) -> Duration {
    Duration::from_secs_f64(n)
}
fn web() -> ServiceKey {
    "shop/web".parse().unwrap()
}
fn hello(watch: u64) -> Event {
    let block = Block::new(7).unwrap();
    let id = "spiffe://a.example/cluster/east/ns/shop/sa/web".parse().unwrap();
    let port = Port { name: String::new(), port: 80, app_protocol: String::new(), protocol: "TCP".into() };
    Event::Sidecar(SidecarHello {
        block,
        spiffe_id: id,
        role: Role::Sidecar,
        ids: vec![EndpointId::from_u32(7 << 4)],
        address: Some("10.0.0.1:7442".parse().unwrap()),
        services: [(web(), (vec![port], 100))].into(),
        refused: BTreeMap::new(),
        watch,
        version: String::new(),
        instance: None,
        host: String::new(),
        answers: false,
        plain: BTreeMap::new(),
    })
}
fn report(healthy: bool, leaving: bool) -> Event {
    let health = v1::ServiceHealth { service: "shop/web".into(), healthy, reason: String::new() };
    let report = v1::StatusReport { health: vec![health], leaving, ..Default::default() };
    Event::SidecarReport { block: Block::new(7).unwrap(), report: Box::new(report) }
}
fn live() -> Registry {
    let mut registry = Registry::new(Patience::default());
    registry.step(Event::Tick, secs(0.0), 0);
    registry.step(hello(1), secs(0.0), 0);
    registry.step(report(true, false), secs(0.1), 0);
    registry
}

#[test]
fn an_endpoint_is_in_rotation_from_its_first_healthy_report() {
    let mut registry = Registry::new(Patience::default());
    registry.step(hello(1), secs(0.0), 0);
    assert!(registry.healthy(&web()).is_empty());
    assert_eq!(registry.counts(&web()), (0, 1));
    assert!(registry.step(report(true, false), secs(0.1), 0));
    assert_eq!(registry.healthy(&web()).len(), 1);
    assert!(!registry.step(report(true, false), secs(0.2), 0), "a heartbeat changes nothing");
}

#[test]
fn two_seconds_of_silence_take_it_out_and_a_report_brings_it_back() {
    let mut registry = live();
    let mut changed_at = None;
    for tick in 1..20 {
        let now = secs(f64::from(tick) * 0.25);
        if registry.step(Event::Tick, now, 0) && changed_at.is_none() {
            changed_at = Some(now);
        }
    }
    assert_eq!(changed_at, Some(secs(2.25)));
    assert!(registry.healthy(&web()).is_empty());
    assert!(registry.step(report(true, false), secs(5.0), 0));
    assert_eq!(registry.healthy(&web()).len(), 1);
}

#[test]
fn a_closed_connection_or_a_farewell_takes_it_out_at_once() {
    let mut registry = live();
    assert!(registry.step(Event::Closed { watch: 1 }, secs(0.2), 0));
    assert!(registry.healthy(&web()).is_empty());
    let mut registry = live();
    assert!(registry.step(report(true, true), secs(0.2), 0));
    assert!(registry.healthy(&web()).is_empty());
    assert!(registry.members.values().all(|m| m.gone(secs(0.2))));
}

#[test]
fn the_end_of_an_older_connection_does_not_take_out_the_newer() {
    let mut registry = live();
    registry.step(hello(2), secs(0.3), 0);
    assert!(!registry.step(Event::Closed { watch: 1 }, secs(0.4), 0));
    assert_eq!(registry.healthy(&web()).len(), 1, "a reconnecting sidecar keeps its health");
}

#[test]
fn a_federator_that_was_stopped_blames_nobody_else() {
    let mut registry = live();
    registry.step(Event::Tick, secs(0.25), 0);
    assert!(!registry.step(Event::Tick, secs(60.0), 0));
    assert_eq!(registry.healthy(&web()).len(), 1);
    for tick in 1..12 {
        registry.step(Event::Tick, secs(60.0 + f64::from(tick) * 0.25), 0);
    }
    assert!(registry.healthy(&web()).is_empty(), "the silence after that counts");
}

#[test]
fn a_restarted_federator_keeps_members_in_rotation_until_they_could_be_back() {
    let lease = remembered(true);
    let mut registry = Registry::new(Patience::default());
    registry.restore(&lease, lease.spiffe_id.parse().unwrap(), secs(0.0));
    for tick in 0..39 {
        registry.step(Event::Tick, secs(f64::from(tick) * 0.25), 0);
    }
    assert_eq!(registry.healthy(&web()).len(), 1);
    for tick in 39..44 {
        registry.step(Event::Tick, secs(f64::from(tick) * 0.25), 0);
    }
    assert!(registry.healthy(&web()).is_empty());
}

#[test]
fn a_restarted_federator_does_not_bring_the_dead_into_rotation() {
    let lease = remembered(false);
    let mut registry = Registry::new(Patience::default());
    registry.restore(&lease, lease.spiffe_id.parse().unwrap(), secs(0.0));
    registry.step(Event::Tick, secs(0.0), 0);
    assert!(registry.healthy(&web()).is_empty());
    assert_eq!(registry.members.values().next().unwrap().presence, Presence::Silent);
}

fn remembered(healthy: bool) -> LeaseRecord {
    LeaseRecord {
        block: Block::new(7).unwrap(),
        spiffe_id: "spiffe://a.example/cluster/east/ns/shop/sa/web".into(),
        role: Role::Sidecar,
        not_after: u64::MAX,
        adopted: false,
        address: None,
        registers: true,
        ids: vec![EndpointId::from_u32(7 << 4)],
        services: vec![ServedRecord { service: web(), ports: vec![], weight: 100, healthy }],
        pinned: vec![],
        gateway: None,
        replaced: false,
        left: false,
        group: String::new(),
        pod: None,
        clones: Vec::new(),
    }
}
