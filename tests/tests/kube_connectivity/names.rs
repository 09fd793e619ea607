//! Behaviours 22 to 27: names. They are asked in both clusters; east is the one that exports.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::case::{Case, Check};

pub const CASES: &[(&str, Check)] = &[
    ("22 a name of the cluster set has the import's addresses", addresses),
    ("23 SRV of the service has one answer, its port and its name", service_records),
    ("24 cluster.local still means the cluster's own service", local_names),
    ("25 a headless name has the addresses of all ready pods", headless),
    ("26 pods of a StatefulSet have names of their own", host_names),
    ("27 SRV of a headless service has an answer for each pod", headless_service_records),
    ("nothing answers for a cluster's part of a service, nor for what is not exported", no_more_than_that),
];

fn addresses(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    case.export(case.east)?;
    for cluster in case.both() {
        let import = case.imported(cluster)?;
        let ips: Vec<String> = serde_json::from_value(import["spec"]["ips"].clone())?;
        ensure!(!ips.is_empty(), "{import}");
        for ip in ips {
            let kind = if ip.contains(':') { "AAAA" } else { "A" };
            case.dig(cluster, &case.name("clusterset.local"), kind, |found| {
                ensure!(found == [ip.clone()], "expected {ip}");
                Ok(())
            })?;
            let said = case
                .request(cluster, &["nslookup", &format!("-type={kind}"), &case.name("clusterset.local")])?;
            ensure!(said.contains(&ip), "nslookup: {said}");
        }
    }
    Ok(())
}

fn service_records(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    case.export(case.east)?;
    let name = case.name("clusterset.local");
    for cluster in case.both() {
        case.imported(cluster)?;
        case.dig(cluster, &name, "SRV", |found| {
            let words: Vec<&str> = found.first().map(|line| line.split(' ').collect()).unwrap_or_default();
            ensure!(
                found.len() == 1 && words.get(2..) == Some(&["42", name.as_str()]),
                "expected one record"
            );
            Ok(())
        })?;
        for port in ["_tcp._tcp", "_udp._udp"] {
            case.dig(cluster, &format!("{port}.{name}"), "SRV", |found| {
                ensure!(
                    found.len() == 1 && found[0].ends_with(&format!(" 42 {name}")),
                    "expected one record"
                );
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn local_names(case: &Case<'_>) -> Result<()> {
    for cluster in case.both() {
        case.serve(cluster, "Deployment", &json!({}))?;
    }
    case.export(case.east)?;
    for cluster in case.both() {
        let import = case.imported(cluster)?;
        let own = cluster.service_ip(&case.namespace, "hello")?;
        ensure!(import["spec"]["ips"][0] != own.as_str(), "the import has the service's own address");
        case.dig(cluster, &case.name("cluster.local"), "A", |found| {
            ensure!(found == [own.clone()], "expected {own}");
            Ok(())
        })?;
    }
    Ok(())
}

fn headless(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "StatefulSet", &json!({ "clusterIP": "None" }))?;
    case.export(case.east)?;
    let pods = case.pods(case.east)?;
    ensure!(pods.len() == 3, "{pods:?}");
    let mut expected: Vec<String> = pods.into_iter().map(|(_, v4, _)| v4).collect();
    expected.sort_unstable();
    for cluster in case.both() {
        case.imported(cluster)?;
        case.dig(cluster, &case.name("clusterset.local"), "A", |found| {
            ensure!(found == expected, "expected {expected:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn host_names(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "StatefulSet", &json!({ "clusterIP": "None" }))?;
    case.export(case.east)?;
    for cluster in case.both() {
        case.imported(cluster)?;
        for (host, v4, v6) in case.pods(case.east)? {
            let name = format!("{host}.east.{}", case.name("clusterset.local"));
            for (kind, address) in [("A", v4), ("AAAA", v6)] {
                case.dig(cluster, &name, kind, |found| {
                    ensure!(found == [address.clone()], "expected {address}");
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

fn headless_service_records(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "StatefulSet", &json!({ "clusterIP": "None" }))?;
    case.export(case.east)?;
    let name = case.name("clusterset.local");
    let pods = case.pods(case.east)?;
    for cluster in case.both() {
        case.imported(cluster)?;
        let found = case.dig(cluster, &name, "SRV", |found| {
            let targets: std::collections::BTreeSet<&str> =
                found.iter().filter_map(|line| line.rsplit(' ').next()).collect();
            ensure!(targets.len() == pods.len(), "expected {} targets", pods.len());
            Ok(())
        })?;
        for (host, ..) in &pods {
            let target = format!("{host}.east.{name}");
            let line = found.iter().find(|line| line.ends_with(&format!(" 42 {target}")));
            line.with_context(|| format!("no record for {target}: {found:?}"))?;
        }
    }
    Ok(())
}

fn no_more_than_that(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    let name = case.name("clusterset.local");
    let empty = |cluster, name: &str| {
        case.dig(cluster, name, "A", |found| {
            ensure!(found.is_empty(), "expected nothing");
            Ok(())
        })
    };
    for cluster in case.both() {
        empty(cluster, &name)?;
    }
    case.export(case.east)?;
    for cluster in case.both() {
        case.imported(cluster)?;
        case.dig(cluster, &name, "A", |found| {
            ensure!(found.len() == 1, "expected an address");
            Ok(())
        })?;
        empty(cluster, &format!("east.{name}"))?;
        empty(cluster, &format!("other.east.{name}"))?;
    }
    Ok(())
}
