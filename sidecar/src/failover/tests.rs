use super::*;
use tombolo_model::failover::Shift;

fn cluster(name: &str) -> ClusterName {
    name.parse().unwrap()
}

fn route(tiers: &[&[(&str, u32)]], down: &[&str]) -> Route {
    Route {
        service: "shop/web".parse().unwrap(),
        tier: 0,
        tiers: tiers.iter().map(|tier| tier.iter().map(|(c, w)| (cluster(c), *w)).collect()).collect(),
        down: down.iter().map(|c| cluster(c)).collect(),
        ports: HashMap::new(),
        pools: HashMap::new(),
        datagrams: HashMap::new(),
        reason: String::new(),
    }
}

fn names(order: &[ClusterName]) -> Vec<&str> {
    order.iter().map(ClusterName::as_str).collect()
}

#[test]
fn the_active_tier_comes_first_and_what_is_down_last() {
    let tiers: &[&[(&str, u32)]] = &[&[("east", 1)], &[("west", 1)], &[("north", 1)]];
    assert_eq!(names(&route(tiers, &[]).order(|| 0)), ["east", "west", "north"]);
    assert_eq!(names(&route(tiers, &["east"]).order(|| 0)), ["west", "north", "east"]);
}

#[test]
fn a_port_is_called_only_where_it_is_served() {
    let mut route = route(&[&[("east", 1)], &[("west", 1)], &[("north", 1)]], &[]);
    let ports =
        [("east", vec![(Protocol::Tcp, 42)]), ("west", vec![(Protocol::Tcp, 4242), (Protocol::Udp, 42)])];
    route.ports = ports.into_iter().map(|(name, ports)| (cluster(name), ports)).collect();
    let order = |protocol, port| route.order_of(protocol, port, || 0);
    assert_eq!(names(&order(Protocol::Tcp, 42)), ["east", "north"], "one that says none may have any");
    assert_eq!(names(&order(Protocol::Tcp, 4242)), ["west", "north"]);
    assert_eq!(names(&order(Protocol::Udp, 42)), ["west", "north"]);
}

#[test]
fn weights_within_a_tier_are_kept() {
    let route = route(&[&[("west", 80), ("central", 20)]], &[]);
    let mut draw = 0;
    let first = (0..100).filter(|_| {
        draw += 1;
        let mut random = [draw - 1, 0].into_iter().cycle();
        names(&route.order(|| random.next().unwrap()))[0] == "west"
    });
    assert_eq!(first.count(), 80);
}

#[test]
fn shifts_and_tiers_survive_a_restart_until_they_are_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let service: ServiceKey = "shop/web".parse().unwrap();
    let shift = |to_tier| Shift {
        at_unix_ms: 1,
        from_tier: 0,
        to_tier,
        clusters: vec![cluster("west")],
        reason: "tier 0 has nobody".into(),
    };
    let log = ShiftLog::open(dir.path());
    log.record(&service, shift(1));
    log.record(&service, shift(2));
    log.keep_tier(&service, 2, "because");
    let log = ShiftLog::open(dir.path());
    assert_eq!(log.last_tier(&service), Some((2, "because".into())));
    assert_eq!(log.pending().iter().map(|s| s.sequence).collect::<Vec<_>>(), [1, 2]);
    log.acknowledge(1);
    let log = ShiftLog::open(dir.path());
    assert_eq!(log.pending().iter().map(|s| s.to_tier).collect::<Vec<_>>(), [2]);
    log.record(&service, shift(3));
    assert_eq!(log.pending().last().unwrap().sequence, 3, "sequences never repeat");
}

#[test]
fn a_torn_history_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("failover.json"), b"{\"next").unwrap();
    assert!(ShiftLog::open(dir.path()).pending().is_empty());
}
