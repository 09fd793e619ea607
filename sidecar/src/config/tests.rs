use super::*;

fn config(services: &[&str], upstreams: &[&str]) -> SidecarConfig {
    let parse = |flags: &[&str]| flags.iter().map(|f| f.parse().unwrap()).collect::<Vec<Mapping>>();
    SidecarConfig {
        name: "web".into(),
        state_dir: "/var/lib/tombolo/web".into(),
        token: None,
        bind: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        announce: None,
        service_account_token: None,
        gateways: EntryPoints::default(),
        zone: String::new(),
        max_udp_payload_bytes: DEFAULT_UDP_PAYLOAD,
        services: services_from(parse(services)),
        provided: None,
        upstreams: upstreams_from(parse(upstreams)),
        admin: SocketAddr::from(([127, 0, 0, 1], 0)),
        threads: NonZeroUsize::MIN,
        drain: DEFAULT_DRAIN,
        inbound: InboundLimits::default(),
        pool: PoolLimits::default(),
        udp: UdpLimits::default(),
        workload_api: None,
        capture: None,
        names: None,
        agentless_allow: Vec::new(),
        pod_ip: None,
    }
}

#[test]
fn a_mapping_names_service_port_and_address() {
    let mapping: Mapping = "shop/web:80=127.0.0.1:8080".parse().unwrap();
    assert_eq!((mapping.service.to_string().as_str(), mapping.port), ("shop/web", 80));
    assert_eq!(mapping.address, "127.0.0.1:8080".parse().unwrap());
    assert_eq!("shop/web:80=[::1]:8080".parse::<Mapping>().unwrap().address, "[::1]:8080".parse().unwrap());
}

#[test]
fn a_mapping_is_tcps_unless_it_says_udp_and_a_port_may_be_both() {
    let protocol = |text: &str| text.parse::<Mapping>().unwrap().protocol;
    assert_eq!(protocol("shop/dns:53=127.0.0.1:53"), Protocol::Tcp);
    assert_eq!(protocol("shop/dns:53/udp=127.0.0.1:53"), Protocol::Udp);
    let both = ["shop/dns:53=127.0.0.1:5353", "shop/dns:53/udp=127.0.0.1:5353"];
    assert_eq!(config(&both, &both).check(), Ok(()));
}

#[test]
fn a_wrong_mapping_names_the_flag_the_value_and_what_would_be_right() {
    let wrong = [
        "shop/web:80",
        "shop/web=127.0.0.1:1",
        "web:80=127.0.0.1:1",
        "shop/web:0=127.0.0.1:1",
        "shop/web:80=local:1",
        "shop/web:80/sctp=127.0.0.1:1",
    ];
    for text in wrong {
        let error = Mapping::parse("--service", text).unwrap_err().to_string();
        assert!(
            error.contains("--service") && error.contains(text) && error.contains("shop/web:80="),
            "{error}"
        );
    }
}

#[test]
fn contradictions_are_found_before_anything_is_bound() {
    let web = "shop/web:80=127.0.0.1:8080";
    assert_eq!(config(&[web], &[]).check(), Ok(()));
    assert_eq!(config(&[], &[]).check(), Err(ConfigError::Nothing));
    assert!(matches!(config(&[web, web], &[]).check(), Err(ConfigError::PortTwice { port: 80, .. })));
    let two = ["shop/a:80=127.0.0.1:9000", "shop/b:80=127.0.0.1:9000"];
    assert!(matches!(config(&[], &two).check(), Err(ConfigError::ListenTwice { .. })));
    let mut twice = config(&[web], &[]);
    twice.services.push(twice.services[0].clone());
    assert!(matches!(twice.check(), Err(ConfigError::ServiceTwice { .. })));
    let mut nowhere = config(&[web], &[]);
    nowhere.announce = Some("0.0.0.0:7442".parse().unwrap());
    assert!(matches!(nowhere.check(), Err(ConfigError::Announce { .. })));
    let mut giant = config(&[web], &[]);
    giant.max_udp_payload_bytes = 65_000;
    assert_eq!(giant.check(), Err(ConfigError::Payload { bytes: 65_000 }));
}

#[test]
fn a_sidecar_without_an_address_registers() {
    let mut config = config(&["shop/web:80=127.0.0.1:8080"], &[]);
    assert!(config.registers());
    config.announce = Some("10.0.0.7:7442".parse().unwrap());
    assert!(!config.registers());
}
