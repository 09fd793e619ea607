//! What a pod is told to serve.

use std::sync::Arc;

use tombolo_model::ids::Block;

use super::lease;
use super::*;
use crate::facts::PodRecord;
use crate::facts::pods::{PodGroup, PodPort};

fn told(facts: &Facts, block: u32) -> Option<Vec<String>> {
    let snapshot =
        super::super::sidecar::snapshot(facts, Block::new(block).unwrap(), &[], &Rings::default(), NOW, AT);
    let shown = |service: v1::PodService| {
        let ports: Vec<String> =
            service.ports.iter().map(|port| format!("{}={}", port.port, port.target)).collect();
        format!("{} {} {}", service.service, ports.join(","), service.ready)
    };
    snapshot.pod_services.map(|told| told.services.into_iter().map(shown).collect())
}

#[test]
fn a_pod_is_told_what_kubernetes_sends_to_it_once_that_is_known() {
    let mut facts = east();
    facts.sidecar(7, "/ns/shop/sa/web", &[]);
    facts.sidecar(8, "/vm/db-1", &[]);
    lease(&mut facts, 7, Role::Sidecar);
    lease(&mut facts, 8, Role::Vm);
    let block = Block::new(7).unwrap();
    let pod = PodRecord { uid: "of-web-0".into(), name: "web-0".into(), joined_unix: UNIX };
    Arc::make_mut(facts.leases.get_mut(&block).unwrap()).pod = Some(pod);
    assert_eq!(told(&facts, 7), None, "nothing is known: what was told before holds");
    let port = PodPort {
        name: "http".into(),
        port: 80,
        target: 8080,
        protocol: "TCP".into(),
        app_protocol: String::new(),
    };
    let group =
        |uid: &str, ready| PodGroup { ports: [port.clone()].into(), pods: vec![(Arc::from(uid), ready)] };
    let pods = Arc::make_mut(&mut facts.pods);
    pods.told = true;
    assert_eq!(told(&facts, 7), Some(Vec::new()), "it is known that there is nothing");
    let pods = Arc::make_mut(&mut facts.pods);
    pods.set(&"shop/web".parse().unwrap(), vec![group("of-web-0", true), group("of-another", true)]);
    pods.set(&"shop/admin".parse().unwrap(), vec![group("of-web-0", false)]);
    pods.set(&"shop/db".parse().unwrap(), vec![group("of-another", true)]);
    let expected = vec!["shop/admin 80=8080 false".to_owned(), "shop/web 80=8080 true".to_owned()];
    assert_eq!(told(&facts, 7), Some(expected));
    assert_eq!(told(&facts, 8), None, "a machine is no pod");
}
