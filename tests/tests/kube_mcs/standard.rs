//! Behaviours of the MCS conformance suite that are about API objects; numbers are those of its specs.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::case::{Check, MCS, clusters, slices};

pub const CASES: &[(&str, Check)] = &[
    ("1 an import exists while there is an exporter", |case| {
        case.conflicting((json!({}), json!({})), (json!({}), json!({})))?;
        for at in case.both() {
            case.imported(at, |import| {
                ensure!(clusters(import) == ["east", "west"], "{import}");
                Ok(())
            })?;
            case.exporting(at, "Conflict", "False NoConflicts")?;
        }
        case.unexport(case.east)?;
        for at in case.both() {
            case.imported(at, |import| {
                ensure!(clusters(import) == ["west"], "{import}");
                Ok(())
            })?;
        }
        case.unexport(case.west)?;
        case.both().iter().try_for_each(|at| case.gone(at))
    }),
    ("2 only exported labels and annotations propagate", |case| {
        let mut service = case.service(case.east, json!({}))?;
        service["metadata"] = json!({
            "name": "hello", "namespace": case.namespace,
            "labels": { "own": "x" }, "annotations": { "own": "x" },
        });
        service.as_object_mut().context("no object")?.remove("status");
        case.east.api.apply_as("labeller", &service)?;
        let exported =
            json!({ "exportedLabels": { "team": "shop" }, "exportedAnnotations": { "note": "a b c" } });
        case.export(case.east, exported)?;
        for at in case.both() {
            let import = case.usable(at)?;
            ensure!(import["metadata"]["labels"]["team"] == "shop", "{import}");
            ensure!(import["metadata"]["annotations"]["note"] == "a b c", "{import}");
            ensure!(!import["metadata"].to_string().contains("\"own\""), "{import}");
        }
        Ok(())
    }),
    ("3 of conflicting labels and annotations the oldest hold", |case| {
        let exported =
            |of: &str| json!({ "exportedLabels": { "team": of }, "exportedAnnotations": { "note": of } });
        case.conflicting((json!({}), exported("east")), (json!({}), exported("west")))?;
        for at in case.both() {
            let message = case.exporting(at, "Conflict", "True LabelsConflict,AnnotationsConflict")?;
            ensure!(message.contains("oldest export, in east. 1/2 clusters disagree"), "{message}");
            let import = case.usable(at)?;
            ensure!(import["metadata"]["labels"]["team"] == "east", "{import}");
            ensure!(import["metadata"]["annotations"]["note"] == "east", "{import}");
        }
        // It is settled when they agree.
        case.west
            .api
            .merge(&case.object(MCS, "ServiceExport", "hello"), json!({ "spec": exported("east") }))?;
        case.both().iter().try_for_each(|at| case.exporting(at, "Conflict", "False NoConflicts").map(drop))
    }),
    ("4 a ClusterIP service becomes a ClusterSetIP import in every cluster", |case| {
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        case.exporting(case.east, "Valid", "True Valid")?;
        case.exporting(case.east, "Ready", "True Exported")?;
        for at in case.both() {
            let import = case.usable(at)?;
            ensure!(import["spec"]["type"] == "ClusterSetIP" && clusters(&import) == ["east"], "{import}");
        }
        case.unexport(case.east)?;
        case.both().iter().try_for_each(|at| case.gone(at))?;
        for at in case.both() {
            let left = at.api.list(&case.object("v1", "Service", ""))?;
            ensure!(!json!(left).to_string().contains("derived-"), "a derived service is left: {left:?}");
        }
        Ok(())
    }),
    ("5 6 7 session affinity, internal traffic policy and traffic distribution are copied", |case| {
        let spec = json!({
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 10 } },
            "internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose",
        });
        case.service(case.east, spec.clone())?;
        case.export(case.east, json!({}))?;
        for at in case.both() {
            let import = case.usable(at)?;
            for (field, value) in spec.as_object().into_iter().flatten() {
                ensure!(&import["spec"][field] == value, "{field}: {import}");
            }
        }
        Ok(())
    }),
    ("8 there is an address for each family, in their order", |case| {
        for (policy, families) in [("SingleStack", vec!["IPv6"]), ("RequireDualStack", vec!["IPv6", "IPv4"])]
        {
            case.service(case.east, json!({ "ipFamilyPolicy": policy, "ipFamilies": families }))?;
            if families.len() == 1 {
                case.export(case.east, json!({}))?;
            }
            for at in case.both() {
                case.imported(at, |import| {
                    let texts = |field: &str| -> Vec<String> {
                        let list = import["spec"][field].as_array().into_iter().flatten();
                        list.filter_map(|text| Some(text.as_str()?.to_owned())).collect()
                    };
                    ensure!(texts("ipFamilies") == families, "{families:?}: {import}");
                    let family = |ip: &String| if ip.contains(':') { "IPv6" } else { "IPv4" };
                    let found: Vec<&str> = texts("ips").iter().map(family).collect();
                    ensure!(found == families, "{families:?}: {import}");
                    Ok(())
                })?;
            }
        }
        Ok(())
    }),
    ("9 ports are the service's", |case| {
        let service = case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        for at in case.both() {
            let import = case.usable(at)?;
            let ports = service["spec"]["ports"].as_array().context("no ports")?;
            for (found, port) in import["spec"]["ports"].as_array().into_iter().flatten().zip(ports) {
                for field in ["name", "port", "protocol", "appProtocol"] {
                    ensure!(found[field] == port[field], "{field}: {found} is not {port}");
                }
            }
            ensure!(import["spec"]["ports"].as_array().map(Vec::len) == Some(ports.len()), "{import}");
        }
        Ok(())
    }),
    ("10 ports are the union, which is a conflict", |case| {
        let ports =
            |name: &str, port| json!({ "ports": [{ "name": name, "port": port, "protocol": "TCP" }] });
        case.conflicting((ports("http", 80), json!({})), (ports("admin", 81), json!({})))?;
        for at in case.both() {
            case.exporting(at, "Conflict", "True PortConflict")?;
            case.imported(at, |import| {
                let names: Vec<&str> = import["spec"]["ports"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|p| p["name"].as_str())
                    .collect();
                ensure!(names == ["http", "admin"], "{import}");
                Ok(())
            })?;
        }
        Ok(())
    }),
    ("11 of conflicting port numbers the oldest holds", |case| {
        let ports = |port| json!({ "ports": [{ "name": "http", "port": port, "protocol": "TCP" }] });
        case.conflicting((ports(80), json!({})), (ports(8080), json!({})))?;
        for at in case.both() {
            case.exporting(at, "Conflict", "True PortConflict")?;
            case.imported(at, |import| {
                let ports = import["spec"]["ports"].as_array().context("no ports")?;
                ensure!(ports.len() == 1 && ports[0]["port"] == 80, "{import}");
                Ok(())
            })?;
        }
        Ok(())
    }),
    ("12 13 a headless service becomes a headless import without an address", |case| {
        case.service(case.east, json!({ "clusterIP": "None" }))?;
        case.export(case.east, json!({}))?;
        for at in case.both() {
            let import = case.usable(at)?;
            ensure!(import["spec"]["type"] == "Headless" && import["spec"].get("ips").is_none(), "{import}");
            let services = at.api.list(&case.object("v1", "Service", ""))?;
            ensure!(!json!(services).to_string().contains("derived-"), "{services:?}");
        }
        case.unexport(case.east)?;
        case.both().iter().try_for_each(|at| case.gone(at))
    }),
    ("14 an ExternalName service can't be exported", |case| {
        case.service(case.east, json!({ "type": "ExternalName", "externalName": "example.com" }))?;
        case.export(case.east, json!({}))?;
        let message = case.exporting(case.east, "Valid", "False InvalidServiceType")?;
        ensure!(message.contains("ExternalName"), "{message}");
        std::thread::sleep(Duration::from_secs(1));
        case.both().iter().try_for_each(|at| case.gone(at))
    }),
    ("15 of conflicting types the oldest holds", |case| {
        let headless = json!({ "clusterIP": "None", "ipFamilyPolicy": "SingleStack" });
        case.conflicting((json!({}), json!({})), (headless, json!({})))?;
        for at in case.both() {
            let message = case.exporting(at, "Conflict", "True TypeConflict")?;
            ensure!(message.contains("using ClusterSetIP from the oldest export, in east"), "{message}");
            ensure!(case.usable(at)?["spec"]["type"] == "ClusterSetIP");
        }
        Ok(())
    }),
    ("16 endpoints are there in every cluster, by source cluster, while there is an export", |case| {
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        let endpoint = |address: &str, ready: bool| json!({ "addresses": [address], "hostname": "db-0", "conditions": { "ready": ready } });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "hello-1", "namespace": case.namespace,
                "labels": { "kubernetes.io/service-name": "hello" },
            },
            "endpoints": [endpoint("10.244.1.7", true), endpoint("10.244.1.8", false)],
            "ports": [{ "name": "tcp", "port": 8042, "protocol": "TCP" }],
        });
        case.east.api.apply(&slice)?;
        for at in case.both() {
            let import = case.usable(at)?;
            let found = slices(case, at, |slices| {
                ensure!(slices.len() == 1, "{slices:?}");
                Ok(slices[0].clone())
            })?;
            let label =
                |name: &str| found["metadata"]["labels"][name].as_str().unwrap_or_default().to_owned();
            ensure!(label("multicluster.kubernetes.io/source-cluster") == "east", "{found}");
            let manager = label("endpointslice.kubernetes.io/managed-by");
            ensure!(!manager.is_empty() && manager != "endpointslice-controller.k8s.io", "{found}");
            ensure!(found["metadata"]["ownerReferences"][0]["uid"] == import["metadata"]["uid"], "{found}");
            ensure!(found["endpoints"].as_array().map(Vec::len) == Some(1), "{found}");
            ensure!(found["endpoints"][0]["addresses"] == json!(["10.244.1.7"]), "{found}");
            ensure!(found["endpoints"][0]["hostname"] == "db-0", "{found}");
            ensure!(found["ports"][0]["port"] == 8042, "where they listen: {found}");
        }
        case.unexport(case.east)?;
        for at in case.both() {
            slices(case, at, |slices| {
                ensure!(slices.is_empty(), "{slices:?}");
                Ok(())
            })?;
        }
        Ok(())
    }),
];
