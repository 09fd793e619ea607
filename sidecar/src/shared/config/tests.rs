use std::num::NonZeroUsize;

use super::*;
use crate::config::{DEFAULT_DRAIN, DEFAULT_UDP_PAYLOAD};
use crate::config::{Mapping, services_from, upstreams_from};

fn application(name: &str, bind: &str, sources: &[&str]) -> Application {
    let sidecar = SidecarConfig {
        name: name.into(),
        state_dir: format!("/var/lib/tombolo/{name}").into(),
        token: None,
        service_account_token: None,
        bind: bind.parse().unwrap(),
        announce: None,
        gateways: Default::default(),
        zone: String::new(),
        max_udp_payload_bytes: DEFAULT_UDP_PAYLOAD,
        services: Vec::new(),
        provided: None,
        upstreams: Vec::new(),
        admin: "127.0.0.1:0".parse().unwrap(),
        threads: NonZeroUsize::MIN,
        drain: DEFAULT_DRAIN,
        inbound: Default::default(),
        pool: Default::default(),
        udp: Default::default(),
        workload_api: None,
        capture: None,
        names: None,
        agentless_allow: Vec::new(),
        pod_ip: None,
    };
    let sources = sources.iter().map(|source| source.parse().unwrap()).collect();
    Application { sources, sidecar, fingerprint: String::new(), start: Start::Now }
}

fn shared(applications: Vec<Application>) -> SharedConfig {
    SharedConfig {
        applications,
        upstreams: Vec::new(),
        admin: "127.0.0.1:0".parse().unwrap(),
        overlay_ports: None,
        incomplete: false,
        register: None,
    }
}

#[test]
fn a_caller_is_told_by_the_network_that_it_calls_from() {
    let applications = [
        application("cart", "10.0.0.5:7450", &["10.0.0.11/32", "10.0.1.7/24"]),
        application("db", "10.0.0.5:7451", &["10.0.0.12/32", "fd00::/64"]),
        application("web", "10.0.0.5:7452", &["172.16.0.0/12", "172.17.0.0/16"]),
    ];
    let callers = Callers::new(&applications);
    let of = |address: &str| callers.of(address.parse().unwrap());
    assert_eq!(of("10.0.0.11"), Some("cart"));
    assert_eq!(of("::ffff:10.0.0.11"), Some("cart"));
    assert_eq!(of("10.0.1.255"), Some("cart"));
    assert_eq!(of("10.0.0.12"), Some("db"));
    assert_eq!(of("fd00::1"), Some("db"));
    assert_eq!((of("172.17.0.1"), of("172.20.0.1")), (Some("web"), Some("web")), "networks in one another");
    for nobody in ["10.0.0.10", "10.0.0.13", "10.0.2.0", "9.0.0.1", "fd00:0:0:1::", "::1"] {
        assert_eq!(of(nobody), None, "{nobody}");
    }
}

#[test]
fn contradictions_are_named_with_both_sides() {
    let good = || application("cart", "10.0.0.5:7450", &["10.0.0.11/32"]);
    assert_eq!(shared(vec![good()]).check(), Ok(()));
    let mut serves = application("db", "10.0.0.5:7451", &[]);
    serves.sidecar.services =
        services_from([Mapping::parse("services", "shop/db:5432=10.0.0.12:5432").unwrap()]);
    assert_eq!(shared(vec![good(), serves]).check(), Ok(()));

    let mut captures = good();
    captures.sidecar.threads = NonZeroUsize::new(2).unwrap();
    let twice = |mapping: &str| upstreams_from([Mapping::parse("upstreams", mapping).unwrap()]).remove(0);
    let mut listens = shared(vec![good()]);
    listens.upstreams = vec![twice("shop/a:80=10.0.0.5:9080"), twice("shop/b:80=10.0.0.5:9080")];
    let mut datagrams = shared(vec![good()]);
    datagrams.upstreams = vec![twice("shop/dns:53/udp=10.0.0.5:9053"), twice("shop/dns:53=10.0.0.5:9053")];
    assert_eq!(datagrams.check(), Ok(()), "TCP and UDP at one address");
    datagrams.upstreams.push(twice("shop/ntp:123/udp=10.0.0.5:9053"));
    let cases = [
        (shared(Vec::new()), "applications"),
        (shared(vec![good(), good()]), "the same name (cart)"),
        (
            shared(vec![good(), application("db", "10.0.0.5:7450", &["10.0.0.12/32"])]),
            "the same bind (10.0.0.5:7450)",
        ),
        (
            shared(vec![good(), application("db", "10.0.0.5:7451", &["10.0.0.0/24"])]),
            "sources 10.0.0.0/24 of db and 10.0.0.11/32 of cart overlap",
        ),
        (
            shared(vec![
                application("cart", "10.0.0.5:7450", &["10.0.0.0/8", "10.1.0.0/16"]),
                application("db", "10.0.0.5:7451", &["10.2.0.0/16"]),
            ]),
            "sources 10.0.0.0/8 of cart and 10.2.0.0/16 of db overlap",
        ),
        (shared(vec![application("idle", "10.0.0.5:7450", &[])]), "neither `sources` nor services"),
        (shared(vec![captures]), "`threads` is for a sidecar beside its application"),
        (listens, "upstreams shop/a and shop/b both listen on 10.0.0.5:9080"),
        (datagrams, "upstreams shop/dns and shop/ntp both listen on 10.0.0.5:9053"),
    ];
    for (config, text) in cases {
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let many = (0..=MAX_APPLICATIONS).map(|i| application(&format!("a{i}"), "10.0.0.5:0", &["10.0.0.11/32"]));
    assert_eq!(
        shared(many.collect()).check(),
        Err(SharedConfigError::TooMany { count: MAX_APPLICATIONS + 1 })
    );
}
