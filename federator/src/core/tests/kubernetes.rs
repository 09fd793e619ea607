//! Exports that Kubernetes keeps: told before any pod has joined, kept over restarts, and not an operator's to change.

use tombolo_model::mcs::{Port, ServiceProperties};
use tombolo_model::names::ServiceKey;

use super::super::kubernetes::KubernetesExport;
use super::*;
use crate::facts::{ExportedService, KubernetesHosts, KubernetesService, NamedEndpoint};
use crate::records::records;

fn web() -> ServiceKey {
    "shop/web".parse().unwrap()
}

fn found() -> KubernetesService {
    let port = Port { name: "http".into(), port: 80, app_protocol: String::new(), protocol: String::new() };
    KubernetesService::Found(ExportedService {
        headless: false,
        ports: vec![port],
        properties: ServiceProperties::default(),
    })
}

fn exported(service: KubernetesService) -> Option<KubernetesExport> {
    let host = NamedEndpoint { hostname: "web-0".into(), address: "10.244.0.7".parse().unwrap() };
    Some(KubernetesExport {
        object: export("shop/web", "west"),
        uid: "of-kubernetes".into(),
        created_unix: UNIX,
        generation: 1,
        service,
        hosts: KubernetesHosts { hosts: vec![host], ports: Vec::new() },
        pods: Vec::new(),
    })
}

impl Cluster {
    fn kubernetes(&mut self, export: Option<KubernetesExport>, complete: bool, moment: Moment) {
        self.core.set_kubernetes_exports([(web(), export)].into(), complete, moment).unwrap();
        self.core.publish(moment);
    }

    fn told(&self, peer: &str) -> Option<v1::ExportRecord> {
        let record = records(&self.core.facts, &name(peer)).remove("export/shop/web")?;
        match record.value? {
            v1::record::Value::Export(export) => Some(export),
            _ => None,
        }
    }
}

#[test]
fn a_service_of_kubernetes_is_told_of_before_any_pod_has_joined_and_as_long_as_there_is_one() {
    let (_world, mut east, _west) = linked();
    east.kubernetes(exported(KubernetesService::Missing), true, at(1));
    assert!(east.told("west").is_none(), "there is no service to export");
    east.kubernetes(exported(found()), false, at(2));
    let told = east.told("west").unwrap();
    assert_eq!((told.ports.len(), told.ports[0].port, told.total), (1, 80, 0));
    assert_eq!(told.kubernetes.unwrap().session_affinity, "None");
    assert_eq!(told.hosts, [], "endpoint addresses cross no link that is not flat");
    east.kubernetes(exported(KubernetesService::ExternalName), false, at(3));
    assert!(east.told("west").is_none());
    east.kubernetes(exported(found()), false, at(4));
    east.kubernetes(None, false, at(5));
    assert!(east.told("west").is_none() && east.core.facts.objects.is_empty());
    assert!(east.core.facts.kubernetes_hosts.is_empty());
}

#[test]
fn a_headless_service_of_kubernetes_resolves_to_its_pods() {
    let (_world, mut east, _west) = linked();
    let KubernetesService::Found(service) = found() else { unreachable!() };
    let headless = KubernetesService::Found(ExportedService { headless: true, ..service });
    east.kubernetes(exported(headless), true, at(1));
    let records = crate::names::records(&east.core.facts);
    let hosts: Vec<_> = records["shop/web"].endpoints.iter().map(|e| (&*e.hostname, &*e.address)).collect();
    assert_eq!(hosts, [("web-0", "10.244.0.7")]);
}

#[test]
fn over_a_flat_link_ready_endpoints_are_told() {
    let (_world, mut east, _west) = linked();
    let link = json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "ClusterLink", "metadata": { "name": "west" },
        "spec": { "flat": true },
    });
    east.core.apply(object(link), false, at(1)).unwrap();
    east.kubernetes(exported(found()), true, at(1));
    let hosts = east.told("west").unwrap().hosts;
    assert_eq!((hosts.len(), hosts[0].address.as_str()), (1, "10.244.0.7"));
}

#[test]
fn exports_of_kubernetes_survive_a_restart_without_it_and_those_that_ended_meanwhile_go() {
    let (world, mut east, _west) = linked();
    east.kubernetes(exported(found()), true, at(1));
    let before = east.told("west").unwrap();
    drop(east);
    let mut east = world.start("east", at(10));
    let after = east.told("west").unwrap();
    assert_eq!((after.handle, after.export_uid), (before.handle, before.export_uid));
    assert_eq!((after.ports, after.exported_at_unix_ms), (before.ports, before.exported_at_unix_ms));
    east.core.set_kubernetes_exports(Default::default(), true, at(11)).unwrap();
    east.core.publish(at(11));
    assert!(east.told("west").is_none() && east.core.facts.objects.is_empty());
}

#[test]
fn what_kubernetes_keeps_is_changed_there_and_what_was_applied_is_taken_over() {
    let (_world, mut east, _west) = linked();
    let applied = export("shop/web", "west");
    let key = applied.key();
    east.core.apply(applied.clone(), false, at(1)).unwrap();
    let mut other = export("shop/other", "west");
    other.metadata.labels.insert("a".into(), "b".into());
    east.core.apply(other, false, at(1)).unwrap();
    east.kubernetes(exported(found()), true, at(2));
    assert_eq!(east.core.facts.objects[&key].uid, "of-kubernetes");
    assert_eq!(east.core.facts.objects.len(), 2, "what was applied of another service is left");
    for refused in [
        east.core.apply(export("shop/web", "north"), false, at(3)).map(drop),
        east.core.delete(&key, false, at(3)).map(drop),
    ] {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("ServiceExport/shop/web is kept by this cluster's Kubernetes"), "{said}");
    }
}

#[test]
fn a_store_that_fails_changes_nothing() {
    let (_world, mut east, _west) = linked();
    east.store.set_broken(true);
    let changes = [(web(), exported(found()))].into();
    assert!(east.core.set_kubernetes_exports(changes, true, at(1)).is_err());
    assert!(east.core.facts.objects.is_empty() && east.core.facts.kubernetes_hosts.is_empty());
}
