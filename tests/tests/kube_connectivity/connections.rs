//! Behaviours 17 to 21: connections, by the names of the cluster set, from pods without a sidecar.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tombolo_tests::testbed::{Cluster, eventually};

use super::case::{Case, Check};

/// The suite's own patience for a connection.
const PATIENCE: Duration = Duration::from_secs(30);

pub const CASES: &[(&str, Check)] = &[
    ("17 what is not exported is not reached", unexported),
    ("18 an exported service is reached by its name from every cluster", reached),
    ("18 and so it is over IPv6 and by UDP", reached_otherwise),
    ("19 of a service that two clusters have, the exporter's pods answer alone", exporter_alone),
    ("20 each port of a union is routed to the cluster that has it", ports_of_two_clusters),
    ("21 a port that two clusters disagree on is routed to the one that holds it", disagreement),
];

fn ask(case: &Case<'_>, from: &Cluster, port: &str) -> Result<String> {
    case.request(from, &["nc", "-w", "2", "-4", &case.name("clusterset.local"), port])
}

/// The address that the first answer says.
fn first(from: &Cluster, ask: impl Fn() -> Result<String>) -> Result<String> {
    let said = eventually(&format!("an answer in {}", from.name), PATIENCE, || {
        let said = ask()?;
        ensure!(said.contains("pod ip "), "{said:?}");
        Ok(said)
    })?;
    Ok(said.trim().trim_start_matches("pod ip ").to_owned())
}

fn answer(case: &Case<'_>, from: &Cluster, port: &str) -> Result<String> {
    first(from, || ask(case, from, port))
}

fn pods_of(case: &Case<'_>, cluster: &Cluster) -> Result<Vec<String>> {
    Ok(case.pods(cluster)?.into_iter().map(|(_, v4, _)| v4).collect())
}

fn unexported(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    for cluster in case.both() {
        for _ in 0..20 {
            let answer = ask(case, cluster, "42");
            ensure!(answer.is_err(), "{} got {answer:?}", cluster.name);
        }
    }
    Ok(())
}

/// By each family's address, and with datagrams.
fn reached_otherwise(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    case.export(case.east)?;
    let pods = pods_of(case, case.east)?;
    let name = case.name("clusterset.local");
    for cluster in case.both() {
        case.imported(cluster)?;
        for (kind, udp) in [("AAAA", false), ("A", true), ("AAAA", true)] {
            let found = case.dig(cluster, &name, kind, |found| {
                ensure!(found.len() == 1);
                Ok(())
            })?;
            let ask = || {
                let command = format!("echo hi | nc -w 2 {} {} 42", if udp { "-u" } else { "" }, found[0]);
                case.request(cluster, &["sh", "-c", &command])
            };
            let said = first(cluster, ask).with_context(|| format!("{kind}, udp: {udp}"))?;
            ensure!(pods.contains(&said), "{}: {said} answered, expected one of {pods:?}", cluster.name);
        }
    }
    Ok(())
}

fn reached(case: &Case<'_>) -> Result<()> {
    case.serve(case.east, "Deployment", &json!({}))?;
    case.export(case.east)?;
    let pods = pods_of(case, case.east)?;
    for cluster in case.both() {
        case.imported(cluster)?;
        let said = answer(case, cluster, "42")?;
        ensure!(pods.contains(&said), "{}: {said} answered, expected one of {pods:?}", cluster.name);
    }
    Ok(())
}

fn exporter_alone(case: &Case<'_>) -> Result<()> {
    for cluster in case.both() {
        case.serve(cluster, "Deployment", &json!({}))?;
    }
    case.export(case.east)?;
    let pods = pods_of(case, case.east)?;
    for cluster in case.both() {
        case.imported(cluster)?;
        for _ in 0..10 {
            let said = answer(case, cluster, "42")?;
            ensure!(pods.contains(&said), "{}: {said} answered, expected one of {pods:?}", cluster.name);
        }
    }
    Ok(())
}

/// East has port 42 alone, west 43 alone, both served by the same kind of pods.
fn ports_of_two_clusters(case: &Case<'_>) -> Result<()> {
    let port = |number: u16| json!({ "ports": [{ "name": format!("tcp-{number}"), "port": number, "targetPort": 42, "protocol": "TCP" }] });
    case.serve(case.east, "Deployment", &port(42))?;
    case.serve(case.west, "Deployment", &port(43))?;
    case.export_both()?;
    for cluster in case.both() {
        for (number, owner) in [("42", case.east), ("43", case.west)] {
            let pods = pods_of(case, owner)?;
            for _ in 0..5 {
                let said = answer(case, cluster, number)?;
                ensure!(
                    pods.contains(&said),
                    "{} port {number}: {said} answered, expected {pods:?}",
                    cluster.name
                );
            }
        }
    }
    Ok(())
}

/// One name, two numbers: the older export's holds.
fn disagreement(case: &Case<'_>) -> Result<()> {
    let port = |number: u16| json!({ "ports": [{ "name": "tcp", "port": number, "targetPort": 42, "protocol": "TCP" }] });
    case.serve(case.east, "Deployment", &port(42))?;
    case.serve(case.west, "Deployment", &port(43))?;
    case.export_both()?;
    let pods = pods_of(case, case.east)?;
    for cluster in case.both() {
        for _ in 0..5 {
            let said = answer(case, cluster, "42")?;
            ensure!(pods.contains(&said), "{}: {said} answered, expected {pods:?}", cluster.name);
        }
        let other = ask(case, cluster, "43");
        ensure!(other.is_err(), "{} got {other:?} of a port that does not hold", cluster.name);
    }
    Ok(())
}
