//! Plans against an API server that does what it is told, and against what others do.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::core::DynamicObject;
use kube::runtime::watcher::Event;
use tombolo_model::mcs::{Exporter, IpFamily, Port, ServiceProperties, merge};

mod fronts;

use super::*;
use crate::facts::{KubernetesHosts, NamedEndpoint};

const API: &str = "multicluster.x-k8s.io/v1beta1";

fn web() -> ServiceKey {
    "shop/web".parse().unwrap()
}

fn exporter(cluster: &str, kind: ServiceType) -> Exporter {
    Exporter {
        cluster: cluster.parse().unwrap(),
        since: Duration::from_secs(1),
        kind,
        ports: vec![Port {
            name: "http".into(),
            port: 80,
            app_protocol: String::new(),
            protocol: "TCP".into(),
        }],
        labels: [("team".to_owned(), "shop".to_owned())].into(),
        annotations: BTreeMap::new(),
        service: Some(ServiceProperties { ip_families: vec![IpFamily::IPv4], ..Default::default() }),
    }
}

fn host(address: &str) -> NamedEndpoint {
    NamedEndpoint {
        hostname: super::super::tables::dashed(&address.parse().unwrap()),
        address: address.parse().unwrap(),
    }
}

fn shown(kind: ServiceType) -> ShownService {
    let exporters = [exporter("east", kind), exporter("west", kind)];
    let hosts = |addresses: &[&str]| KubernetesHosts {
        hosts: addresses.iter().map(|address| host(address)).collect(),
        ports: exporters[0].ports.clone(),
    };
    let endpoints = BTreeMap::from([
        ("east".parse().unwrap(), hosts(&["10.1.0.1", "fd00::1", "127.0.0.1", "169.254.169.254"])),
        ("west".parse().unwrap(), hosts(&[])),
    ]);
    let clusters = exporters.iter().map(|exporter| exporter.cluster.clone()).collect();
    ShownService {
        export: None,
        import: Some(ShownImport { merged: merge(&exporters), clusters, endpoints }),
    }
}

/// An API server as far as plans see one.
#[derive(Default)]
struct Server {
    tables: Tables,
    version: u64,
    written: Vec<String>,
    /// How often: what is made anew has a uid of its own.
    deleted: BTreeMap<(Kind, String), u64>,
}

impl Server {
    fn with_namespace() -> Self {
        let mut server = Self::default();
        server.put(Kind::Namespace, json!({ "metadata": { "name": "shop" } }));
        server
    }

    fn put(&mut self, kind: Kind, mut document: Value) {
        self.version += 1;
        let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap().to_owned();
        document["metadata"]["resourceVersion"] = self.version.to_string().into();
        let uid = format!("{}-{name}", kind.as_str());
        let again = self.deleted.get(&(kind, name)).map(|times| format!("-{times}")).unwrap_or_default();
        document["metadata"]["uid"] = format!("{uid}{again}").into();
        let object: DynamicObject = serde_json::from_value(document).unwrap();
        self.tables.apply(kind, Event::Apply(object));
    }

    fn perform(&mut self, write: Write) {
        match write {
            Write::Apply { kind, mut document, .. } => {
                self.written.push(format!("apply {}", kind.as_str()));
                if kind == Kind::Service {
                    document["spec"]["clusterIP"] = "10.96.0.7".into();
                    document["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
                }
                if kind == Kind::ServiceImport {
                    document["status"] =
                        self.tables.import_row(&web()).map(|row| row.status.value()).unwrap_or_default();
                }
                self.put(kind, document);
            }
            Write::Status { kind, document, .. } => {
                self.written.push(format!("status {}", kind.as_str()));
                let row = self.tables.import_row(&web()).unwrap();
                let metadata = json!({
                    "name": "web", "namespace": "shop",
                    "labels": { super::super::labels::MANAGED_BY: "tombolo" },
                    "annotations": { super::super::labels::APPLIED: row.meta.applied },
                });
                let whole =
                    json!({ "metadata": metadata, "spec": row.spec.value(), "status": document["status"] });
                self.put(kind, whole);
            }
            Write::Delete { kind, name, uid } => {
                self.written.push(format!("delete {}", kind.as_str()));
                let metadata = json!({ "name": &name, "namespace": "shop", "uid": uid });
                let object = serde_json::from_value(json!({ "metadata": metadata })).unwrap();
                self.tables.apply(kind, Event::Delete(object));
                *self.deleted.entry((kind, name)).or_default() += 1;
            }
        }
    }

    fn plan(&self, shown: &ShownService) -> Plan {
        self.plan_with(shown, None, None)
    }

    fn plan_with(&self, shown: &ShownService, front: Option<Front<'_>>, refusal: Option<&str>) -> Plan {
        let cluster = "east".parse().unwrap();
        let now = "2026-11-24T02:15:05Z";
        let with = Surroundings { api_version: API, cluster: &cluster, now, refusal, front };
        plan(&web(), shown, &self.tables, &with)
    }

    /// Until nothing is left to be written; what was written.
    fn settle(&mut self, shown: &ShownService) -> Vec<String> {
        self.settle_with(shown, None)
    }

    fn settle_with(&mut self, shown: &ShownService, front: Option<Front<'_>>) -> Vec<String> {
        for _ in 0..10 {
            let Plan { writes, .. } = self.plan_with(shown, front, None);
            if writes.is_empty() {
                return std::mem::take(&mut self.written);
            }
            writes.into_iter().for_each(|write| self.perform(write));
        }
        panic!("it does not settle: {:?}", self.written);
    }
}

#[test]
fn an_import_gets_an_address_and_slices_and_is_taken_away_whole() {
    let mut server = Server::with_namespace();
    let wanted = shown(ServiceType::ClusterSetIp);
    let written = server.settle(&wanted);
    assert_eq!(
        written,
        [
            "apply ServiceImport",
            "apply Service",
            "apply EndpointSlice",
            "apply EndpointSlice",
            "apply ServiceImport",
            "status ServiceImport"
        ],
        "one slice per family; loopback and link-local addresses are nobody's"
    );
    let row = server.tables.import_row(&web()).unwrap();
    assert_eq!(row.spec.value()["ips"], json!(["10.96.0.7"]));
    assert_eq!(row.spec.value()["ipFamilies"], json!(["IPv4"]));
    assert_eq!(row.status.value()["clusters"], json!([{ "cluster": "east" }, { "cluster": "west" }]));
    assert_eq!(row.status.value()["conditions"][0]["reason"], "Ready");
    assert_eq!(server.settle(&wanted), Vec::<String>::new(), "settled is settled");
    assert_eq!(
        server.settle(&ShownService::default()),
        ["delete EndpointSlice", "delete EndpointSlice", "delete Service", "delete ServiceImport"]
    );
    assert!(server.tables.known().is_empty());
}

#[test]
fn an_exporter_that_says_nonsense_costs_the_others_nothing() {
    let port = |name: &str, port, protocol: &str, app_protocol: &str| Port {
        name: name.into(),
        port,
        app_protocol: app_protocol.into(),
        protocol: protocol.into(),
    };
    let mut bad = exporter("east", ServiceType::ClusterSetIp);
    bad.ports = vec![
        port("", 80, "FOO", ""),
        port("A b", 81, "TCP", ""),
        port("", 82, "TCP", "not a name"),
        port("tcp-82", 83, "TCP", ""),
    ];
    bad.service =
        Some(ServiceProperties { traffic_distribution: Some("Nowhere".into()), ..Default::default() });
    let good = Exporter { since: Duration::from_secs(2), ..exporter("west", ServiceType::ClusterSetIp) };
    let merged = merge(&[bad, good]);
    let service =
        super::super::desired::derived(&web(), &merged, None, "uid", "v1", &BTreeMap::new()).unwrap();
    let ports: Vec<_> = service["spec"]["ports"].as_array().unwrap().clone();
    let names: Vec<_> = ports.iter().map(|port| port["name"].as_str().unwrap_or_default()).collect();
    assert_eq!(names, ["tcp-82-x", "tcp-82", "http"], "{ports:?}");
    assert!(ports.iter().all(|port| port.get("appProtocol").is_none()), "{ports:?}");
    assert!(service["spec"].get("trafficDistribution").is_none());
}

#[test]
fn a_headless_import_has_no_address_and_one_that_becomes_headless_loses_it() {
    let mut server = Server::with_namespace();
    server.settle(&shown(ServiceType::ClusterSetIp));
    let written = server.settle(&shown(ServiceType::Headless));
    assert_eq!(
        written,
        ["apply ServiceImport", "delete Service", "status ServiceImport"].to_vec()[..2].to_vec()
    );
    let row = server.tables.import_row(&web()).unwrap();
    assert_eq!((row.addressed, &row.spec.value()["type"]), (false, &json!("Headless")));
}

#[test]
fn without_the_namespace_nothing_is_made() {
    let mut server = Server::default();
    assert_eq!(server.settle(&shown(ServiceType::ClusterSetIp)), Vec::<String>::new());
}

#[test]
fn what_somebody_else_keeps_is_not_touched_and_said() {
    let mut server = Server::with_namespace();
    let foreign =
        json!({ "metadata": { "name": "web", "namespace": "shop" }, "spec": { "type": "Headless" } });
    server.put(Kind::ServiceImport, foreign.clone());
    let planned = server.plan(&shown(ServiceType::ClusterSetIp));
    assert!(planned.writes.is_empty());
    assert!(planned.obstacle.unwrap().contains("a ServiceImport shop/web is there that somebody else keeps"));
    assert_eq!(server.plan(&ShownService::default()), Plan::default(), "nor deleted");
    // Nor a Service that has the name of a derived one.
    let mut server = Server::with_namespace();
    let name = derived_name(&web());
    server.put(
        Kind::Service,
        json!({ "metadata": { "name": name, "namespace": "shop" }, "spec": { "clusterIP": "1.2.3.4" } }),
    );
    server.settle(&shown(ServiceType::ClusterSetIp));
    let row = server.tables.import_row(&web()).unwrap();
    assert!(!row.addressed);
    assert_eq!(row.status.value()["conditions"][0]["status"], "False");
    let status = row.status.value();
    let message = status["conditions"][0]["message"].as_str().unwrap();
    assert!(message.contains("somebody else keeps"), "{message}");
}

#[test]
fn what_others_change_is_put_right_and_what_they_add_is_left() {
    let mut server = Server::with_namespace();
    let wanted = shown(ServiceType::ClusterSetIp);
    server.settle(&wanted);
    let row = server.tables.import_row(&web()).unwrap().clone();
    let whole = |spec: Value, labels: Value| {
        let mut labels = labels;
        labels[super::super::labels::MANAGED_BY] = "tombolo".into();
        let annotations = json!({ super::super::labels::APPLIED: row.meta.applied });
        let metadata =
            json!({ "name": "web", "namespace": "shop", "labels": labels, "annotations": annotations });
        json!({ "metadata": metadata, "spec": spec, "status": row.status.value() })
    };
    server.put(Kind::ServiceImport, whole(row.spec.value(), json!({ "theirs": "x" })));
    assert_eq!(server.settle(&wanted), Vec::<String>::new());
    let mut spec = row.spec.value();
    spec["ports"][0]["port"] = 81.into();
    server.put(Kind::ServiceImport, whole(spec, json!({})));
    assert_eq!(server.settle(&wanted), ["apply ServiceImport"]);
}

#[test]
fn conditions_keep_the_time_of_their_last_change_and_those_of_others_are_left() {
    let condition = |status, message: &str| Condition::new("Ready", status, "Exported", message);
    let before = status::conditions(&[condition(true, "a")], &[], 1, "2026-01-01T00:00:00Z");
    let same = status::conditions(&[condition(true, "b")], &before, 2, "2027-01-01T00:00:00Z");
    assert_eq!(same[0]["lastTransitionTime"], "2026-01-01T00:00:00Z");
    assert_eq!((&same[0]["message"], &same[0]["observedGeneration"]), (&json!("b"), &json!(2)));
    let other = status::conditions(&[condition(false, "b")], &before, 2, "2027-01-01T00:00:00Z");
    assert_eq!(other[0]["lastTransitionTime"], "2027-01-01T00:00:00Z");
}

#[test]
fn the_status_of_an_export_is_written_once_for_the_very_object_and_generation() {
    let mut server = Server::with_namespace();
    let theirs = json!({ "type": "Theirs", "status": "True", "reason": "x" });
    let export = |conditions: Value| {
        json!({
            "metadata": { "name": "web", "namespace": "shop", "generation": 1 },
            "status": { "conditions": conditions },
        })
    };
    server.put(Kind::ServiceExport, export(json!([theirs])));
    let wanted = |uid: &str, generation| ShownService {
        export: Some(ShownExport {
            uid: uid.into(),
            generation,
            conditions: vec![Condition::new("Valid", true, "Valid", "")],
        }),
        import: None,
    };
    assert!(server.plan(&wanted("another", 1)).writes.is_empty());
    assert!(server.plan(&wanted("ServiceExport-web", 2)).writes.is_empty());
    let writes = server.plan(&wanted("ServiceExport-web", 1)).writes;
    let [Write::Status { document, changed, .. }] = writes.as_slice() else { panic!("{writes:?}") };
    assert_eq!(changed.len(), 1);
    let conditions = document["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 1, "theirs are theirs to apply");
    server.put(Kind::ServiceExport, export(json!([theirs, conditions[0]])));
    assert!(server.plan(&wanted("ServiceExport-web", 1)).writes.is_empty());
}
