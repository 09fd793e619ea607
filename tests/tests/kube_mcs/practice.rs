//! What goes wrong in practice: things that come late, that others keep or change.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::case::{Check, MCS, OLD_MCS, SOON};

pub const CASES: &[(&str, Check)] = &[
    ("an export waits for its service, and follows it", |case| {
        case.export(case.east, json!({}))?;
        case.exporting(case.east, "Valid", "False NoService")?;
        case.service(case.east, json!({}))?;
        case.exporting(case.east, "Valid", "True Valid")?;
        case.usable(case.west)?;
        case.east.api.delete(&case.object("v1", "Service", "hello"))?;
        case.exporting(case.east, "Valid", "False NoService")?;
        case.gone(case.west)?;
        case.service(case.east, json!({ "ports": [{ "name": "other", "port": 43 }] }))?;
        let import = case.usable(case.west)?;
        ensure!(import["spec"]["ports"][0]["name"] == "other", "{import}");
        Ok(())
    }),
    ("exports of the older version are read, and only the clusters that are named import", |case| {
        case.service(case.east, json!({}))?;
        let named = |to: &str| json!({ "tombolo.dev/export-to": to });
        case.export_with(case.east, OLD_MCS, named("No Cluster"), json!({}))?;
        let message = case.exporting(case.east, "Ready", "False Failed")?;
        ensure!(message.contains("metadata.annotations[tombolo.dev/export-to]: \"No Cluster\""), "{message}");
        case.usable(case.east)?;
        case.gone(case.west)?;
        let export = case.object(MCS, "ServiceExport", "hello");
        case.east.api.merge(&export, json!({ "metadata": { "annotations": named("west") } }))?;
        case.usable(case.west)?;
        case.exporting(case.east, "Ready", "True Exported")?;
        Ok(())
    }),
    ("a foreign import is not touched, and said", |case| {
        let foreign = json!({
            "apiVersion": MCS, "kind": "ServiceImport",
            "metadata": { "name": "hello", "namespace": case.namespace },
            "spec": { "type": "Headless", "ports": [] },
        });
        let before = case.east.api.create(&foreign)?;
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        let message = case.exporting(case.east, "Ready", "False Failed")?;
        ensure!(message.contains("that somebody else keeps"), "{message}");
        case.usable(case.west)?;
        case.unexport(case.east)?;
        case.gone(case.west)?;
        let import = case.object(MCS, "ServiceImport", "hello");
        let after = case.east.api.get(&import)?.context("it was deleted")?;
        ensure!(after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"], "{after}");
        Ok(())
    }),
    ("what others change is put right, what they delete is made anew", |case| {
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        let import = case.object(MCS, "ServiceImport", "hello");
        let made = case.usable(case.west)?;
        case.west.api.merge(&import, json!({ "spec": { "type": "Headless", "ips": [] } }))?;
        case.imported(case.west, |found| {
            ensure!(found["spec"] == made["spec"], "{found}");
            Ok(())
        })?;
        case.west.api.delete(&import)?;
        let again = case.imported(case.west, |found| {
            ensure!(found["metadata"]["uid"] != made["metadata"]["uid"], "the old one");
            ensure!(found["spec"].get("ips").is_some(), "{found}");
            Ok(found.clone())
        })?;
        let derived = again["metadata"]["annotations"]["multicluster.kubernetes.io/derived-service"].clone();
        let derived = derived.as_str().context("no derived service")?;
        let service = case.object("v1", "Service", derived);
        let found = case.west.api.until(&service, SOON, |found| {
            let found = found.context("no derived service")?;
            ensure!(found["metadata"]["ownerReferences"][0]["uid"] == again["metadata"]["uid"], "{found}");
            Ok(found.clone())
        })?;
        ensure!(found["spec"].get("selector").is_none(), "{found}");
        case.imported(case.west, |import| {
            ensure!(import["spec"]["ips"] == found["spec"]["clusterIPs"], "{import} {found}");
            Ok(())
        })
    }),
    ("Events tell what an operator would look for", |case| {
        case.conflicting(
            (json!({}), json!({ "exportedLabels": { "a": "b" } })),
            (json!({ "clusterIP": "None", "ipFamilyPolicy": "SingleStack" }), json!({})),
        )?;
        case.exporting(case.west, "Conflict", "True TypeConflict,LabelsConflict")?;
        let events = case.object("events.k8s.io/v1", "Event", "");
        let start = Instant::now();
        loop {
            let found = case.west.api.list(&events)?;
            let has =
                |reason: &str, kind: &str| found.iter().any(|e| e["reason"] == reason && e["type"] == kind);
            if has("Exported", "Normal") && has("TypeConflict", "Warning") {
                return Ok(());
            }
            ensure!(start.elapsed() < SOON, "{found:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }),
];
