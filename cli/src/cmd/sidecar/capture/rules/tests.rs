//! What is and is not in the rules; that they do what they say is for the scenarios.

use std::time::Duration;

use super::*;

fn plan() -> Plan {
    Plan {
        outbound: Outbound::Services,
        port: 7447,
        virtual_ranges: vec!["241.64.0.0/16".parse().unwrap()],
        addresses: Vec::new(),
        away: Away::Pass,
        grace: Duration::from_secs(15),
        inbound: None,
        exclude: Exclude { marks: [0x7462].into(), ..Exclude::default() },
    }
}

fn tcp(address: &str) -> (Protocol, SocketAddr) {
    (Protocol::Tcp, address.parse().unwrap())
}

fn udp(address: &str) -> (Protocol, SocketAddr) {
    (Protocol::Udp, address.parse().unwrap())
}

fn chain<'a>(rules: &'a str, name: &str) -> Vec<&'a str> {
    let (_, rest) = rules.split_once(&format!("\tchain {name} {{\n")).unwrap();
    rest.split_once("\t}\n").unwrap().0.lines().map(str::trim).collect()
}

#[test]
fn the_old_table_goes_and_the_new_one_comes_in_one_transaction() {
    let rules = plan().rules();
    assert!(rules.starts_with(&(removal() + "table inet tombolo_capture {\n")), "{rules}");
    assert_eq!(rules.matches("table inet").count(), 3);
}

#[test]
fn only_a_first_packet_of_tcp_is_looked_at_and_own_traffic_is_let_through_first() {
    let rules = plan().rules();
    let output = chain(&rules, "output");
    assert_eq!(
        output,
        [
            "type nat hook output priority -110; policy accept;",
            "meta l4proto != tcp accept",
            "tcp flags & (fin | syn | rst | ack) != syn accept",
            "meta mark { 0x7462 } accept",
            "ip daddr @virtual4 counter name \"virtual\" meta l4proto tcp redirect to :7447",
        ]
    );
}

#[test]
fn exclusions_come_before_anything_is_taken() {
    let mut plan = plan();
    plan.outbound = Outbound::All;
    plan.addresses = vec![tcp("10.0.0.7:5432"), tcp("[fd00::7]:5432"), udp("10.0.0.7:53")];
    plan.exclude = Exclude {
        uids: [999].into(),
        gids: [998].into(),
        marks: [1, 2].into(),
        ports: [22].into(),
        ranges: vec![
            "10.1.0.0/16".parse().unwrap(),
            "10.1.2.0/24".parse().unwrap(),
            "fd01::/16".parse().unwrap(),
        ],
        interfaces: ["wg0".to_owned()].into(),
    };
    let rules = plan.rules();
    let output = chain(&rules, "output");
    let at = |needle: &str| {
        output.iter().position(|rule| rule.contains(needle)).unwrap_or_else(|| panic!("{needle}: {rules}"))
    };
    let first = at("@virtual4");
    for let_through in [
        "meta mark { 0x1, 0x2 } accept",
        "meta skuid { 999 } accept",
        "meta skgid { 998 } accept",
        "oifname { \"wg0\" } accept",
        "tcp dport { 22 } accept",
        "ip daddr @excluded4 accept",
        "ip6 daddr @excluded6 accept",
    ] {
        assert!(at(let_through) < first, "{let_through}");
    }
    assert!(at("@taken4 goto ours") < at("fib daddr type local accept"), "a taken-over address may be local");
    assert_eq!(output.last(), Some(&"goto ours"));
    assert!(rules.contains("elements = { 10.1.0.0/16 }"), "overlaps are merged: {rules}");
}

#[test]
fn what_can_do_without_the_sidecar_goes_past_it_while_nobody_listens_unless_told_otherwise() {
    assert!(chain(&plan().rules(), "ours")[0].starts_with("meta nfproto @away"));
    let refuse = Plan { away: Away::Refuse, ..plan() }.rules();
    assert_eq!(chain(&refuse, "ours").len(), 1);
}

#[test]
fn without_a_grace_time_nothing_waits() {
    let rules = Plan { grace: Duration::ZERO, ..plan() }.rules();
    assert!(!chain(&rules, "listening").iter().any(|rule| rule.ends_with("drop")), "{rules}");
    assert!(plan().rules().contains("timeout 15000ms"));
}

#[test]
fn nothing_outbound_means_no_outbound_chain() {
    let inbound = Inbound {
        mode: InboundMode::Strict,
        listen_port: 7448,
        ports: ["8080", "9090", "5353/udp"].map(|text| text.parse().unwrap()).into(),
        allow: vec![
            Allow { source: Some("10.0.0.0/24".parse().unwrap()), port: Some(9090) },
            Allow { source: Some("fd00::1/128".parse().unwrap()), port: None },
            Allow { source: None, port: Some(9100) },
        ],
    };
    let plan = Plan { outbound: Outbound::None, inbound: Some(inbound), ..plan() };
    let rules = plan.rules();
    assert!(!rules.contains("redirect") && !rules.contains("hook output"), "{rules}");
    let prerouting = chain(&rules, "prerouting");
    assert_eq!(prerouting[2], "tcp dport != { 8080, 9090 } accept");
    assert_eq!(prerouting[3], "iifname { \"lo\" } accept");
    assert!(prerouting.contains(&"ip saddr 10.0.0.0/24 tcp dport 9090 accept"), "{rules}");
    assert!(prerouting.contains(&"ip6 saddr fd00::1/128 accept"), "{rules}");
    assert!(prerouting.contains(&"tcp dport 9100 accept"), "{rules}");
    assert!(prerouting.last().unwrap().ends_with("reject with tcp reset"));
    assert_eq!(
        chain(&rules, "udp_inbound"),
        [
            "type filter hook prerouting priority -150; policy accept;",
            "meta l4proto != udp accept",
            "udp dport != { 5353 } accept",
            "iifname { \"lo\" } accept",
            "fib daddr type != { local, broadcast, multicast } accept",
            "ip saddr 10.0.0.0/24 udp dport 9090 accept",
            "ip6 saddr fd00::1/128 accept",
            "udp dport 9100 accept",
            "ct direction reply accept",
            "counter name \"inbound_datagrams_refused\" reject",
        ]
    );
}

#[test]
fn each_protocol_has_a_chain_where_it_has_ports() {
    let of = |port: &str, mode| {
        let ports = [port.parse().unwrap()].into();
        let inbound = Inbound { mode, listen_port: 7448, ports, allow: Vec::new() };
        Plan { inbound: Some(inbound), ..plan() }.rules()
    };
    let tcp = of("8080", InboundMode::Permissive);
    assert!(tcp.contains("chain prerouting") && !tcp.contains("chain udp_inbound"), "{tcp}");
    let udp = of("5353/udp", InboundMode::Permissive);
    assert!(!udp.contains("chain prerouting"), "{udp}");
    assert!(
        chain(&udp, "udp_inbound").last().unwrap().ends_with("counter name \"inbound_datagrams\" accept")
    );
}

#[test]
fn the_comment_says_what_must_be_there() {
    let plan = Plan { addresses: vec![tcp("10.0.0.7:5432"), udp("[fd00::7]:53")], ..plan() };
    let inventory = parse_comment(&plan.comment()).unwrap();
    let rules = plan.rules();
    let written = ["ours", "listening", "udp_ours"].map(|name| chain(&rules, name).len());
    let hooked =
        ["output", "input", "udp_output", "udp_prerouting"].map(|name| chain(&rules, name).len() - 1);
    assert_eq!(inventory.rules, written.iter().chain(&hooked).sum::<usize>(), "{rules}");
    assert_eq!(inventory.addresses, 3);
    assert_eq!(parse_comment("tombolo 99: 1 rules, 1 addresses"), None);
}

#[test]
fn datagrams_to_ours_are_marked_before_any_translation_and_nobody_elses_are_touched() {
    let plan = Plan { addresses: vec![tcp("10.0.0.7:5432"), udp("10.0.0.7:53")], ..plan() };
    let rules = plan.rules();
    assert_eq!(
        chain(&rules, "udp_output"),
        [
            "type route hook output priority -300; policy accept;",
            "meta l4proto != udp accept",
            "meta mark { 0x7462 } accept",
            "ip daddr @virtual4 meta nfproto @udp_away counter name \"datagrams_refused\" reject",
            "ip daddr @virtual4 meta mark set 0x7463 notrack accept",
            "ip daddr . udp dport @udp_taken4 goto udp_ours",
        ]
    );
    assert!(
        rules.contains("set udp_taken4 { type ipv4_addr . inet_service; elements = { 10.0.0.7 . 53 }; }")
    );
    let all = Plan { outbound: Outbound::All, ..plan };
    assert_eq!(chain(&all.rules(), "udp_output"), chain(&rules, "udp_output"), "of UDP, only what is ours");
}

#[test]
fn datagrams_to_a_taken_over_address_go_past_a_sidecar_that_is_away_unless_told_otherwise() {
    assert!(chain(&plan().rules(), "udp_ours")[0].ends_with("counter name \"datagrams_past\" accept"));
    let refuse = Plan { away: Away::Refuse, ..plan() }.rules();
    assert!(chain(&refuse, "udp_ours")[0].ends_with("counter name \"datagrams_refused\" reject"));
}
