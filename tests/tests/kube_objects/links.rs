//! Clusters that link because each has an object about the other: east's is in Kubernetes, west's is applied from a file, and
//! north, under the same root, is named by nobody.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tombolo_tests::mesh::{Mesh, http_get};
use tombolo_tests::scenario::{application, export, flag};

use crate::{World, document, object};

/// Dials, answers, and the gateways' new snapshots.
const LINKED: Duration = Duration::from_secs(30);

/// The object by which another cluster links to this one.
pub fn about(mesh: &Mesh, cluster: &str) -> Result<Value> {
    let status = mesh.status(cluster)?;
    let gateways: Vec<&Value> =
        status["gateways"].as_array().into_iter().flatten().map(|gateway| &gateway["border"]).collect();
    Ok(document("ClusterLink", "", cluster, json!({ "tag": status["tag"], "gateways": gateways })))
}

pub fn connected(mesh: &Mesh, cluster: &str, peer: &str) -> Result<()> {
    mesh.eventually(&format!("{cluster} is connected to {peer}"), LINKED, |mesh| {
        let status = mesh.status(cluster)?;
        let links = status["links"].as_array().cloned().unwrap_or_default();
        let link = links.iter().find(|link| link["peer"] == peer).context("there is no link")?;
        ensure!(link["state"] == "connected", "{link}");
        Ok(())
    })?;
    Ok(())
}

/// What `tombolo` shows of a link's condition.
fn standing(mesh: &Mesh, cluster: &str, peer: &str) -> Result<(String, String)> {
    let link: Value =
        serde_json::from_str(&mesh.operate(cluster, &["get", "clusterlink", peer, "-o", "json"])?)?;
    let (is, message) = tombolo_tests::kube::condition(&link, "Connected");
    Ok((is, message))
}

fn pending(mesh: &Mesh, cluster: &str, peer: &str) -> Result<()> {
    mesh.eventually(&format!("{cluster} waits for {peer}"), LINKED, |mesh| {
        let (is, message) = standing(mesh, cluster, peer)?;
        ensure!(
            is == "False Pending" && message.contains(&format!("waiting for {peer}'s object")),
            "{is}: {message}"
        );
        ensure!(no_link(mesh, cluster, peer)?, "there is a link");
        Ok(())
    })?;
    Ok(())
}

fn no_link(mesh: &Mesh, cluster: &str, peer: &str) -> Result<bool> {
    let status = mesh.status(cluster)?;
    Ok(!status["links"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|link| link["peer"] == peer && link["state"] == "connected"))
}

/// An application of west is called from east.
fn call_over(mesh: &mut Mesh) -> Result<()> {
    let (app, listen) = (mesh.cluster("west")?.address(21, 8080), mesh.cluster("east")?.address(22, 9080));
    application(mesh, "west", "app", app, "west")?;
    mesh.sidecar("west", "web", &flag("--service", "web", 80, app))?;
    mesh.apply("west", &export("web"))?;
    mesh.sidecar("east", "cart", &flag("--upstream", "web", 80, listen))?;
    mesh.eventually("a call crosses the link", LINKED, |mesh| {
        let answer = http_get(&mesh.cluster("east")?.namespace, listen, "/")?;
        ensure!(answer.contains("west"), "{answer}");
        Ok(())
    })?;
    Ok(())
}

pub fn by_objects(world: &mut World) -> Result<()> {
    let World { mesh, east } = &*world;
    let link = object("ClusterLink", "", "west");
    // North names east, and nobody names north.
    mesh.apply("north", &about(mesh, "east")?.to_string())?;
    east.api.apply(&about(mesh, "west")?)?;
    let message = world.says(&link, "Connected", "False Pending")?;
    ensure!(
        message.contains("waiting for west's object") && message.contains("ClusterLink about cluster east"),
        "{message}"
    );
    world.says(&link, "Accepted", "True Accepted")?;
    // An object about another cluster of east's name is none about east.
    let mut other = about(mesh, "east")?;
    other["spec"]["tag"] = "00beef".into();
    mesh.apply("west", &other.to_string())?;
    std::thread::sleep(Duration::from_secs(6));
    pending(mesh, "east", "west")?;
    pending(mesh, "west", "east")?;

    mesh.apply("west", &about(mesh, "east")?.to_string())?;
    connected(mesh, "east", "west")?;
    connected(mesh, "west", "east")?;
    world.says(&link, "Connected", "True Connected")?;
    call_over(&mut world.mesh)?;
    let World { mesh, .. } = &*world;
    match mesh.operate("west", &["unlink", "east", "--yes"]) {
        Ok(said) => bail!("what an object links was unlinked: {said}"),
        Err(error) => ensure!(format!("{error:#}").contains("by a ClusterLink object"), "{error:#}"),
    }
    // It outlives both federators.
    let World { mesh, .. } = world;
    for cluster in ["east", "west"] {
        mesh.process_mut(&format!("{cluster}/federator"))?.kill()?;
        mesh.restart(&format!("{cluster}/federator"))?;
        mesh.ready(cluster, 1, "federator")?;
    }
    connected(mesh, "east", "west")?;
    connected(mesh, "west", "east")?;

    // West's goes: both sides lose the link, and east waits again.
    mesh.operate("west", &["delete", "clusterlink", "east", "--yes"])?;
    pending(mesh, "east", "west")?;
    ensure!(mesh.status("west")?["links"].as_array().is_none_or(Vec::is_empty), "west keeps the link");
    mesh.apply("west", &about(mesh, "east")?.to_string())?;
    connected(mesh, "east", "west")?;
    connected(mesh, "west", "east")?;
    // East's goes, in Kubernetes.
    let World { mesh, east } = &*world;
    east.api.delete(&link)?;
    pending(mesh, "west", "east")?;
    ensure!(mesh.status("east")?["links"].as_array().is_none_or(Vec::is_empty), "east keeps the link");

    // All the while nobody has let north in.
    pending(mesh, "north", "east")?;
    let audit = mesh.operate("east", &["audit", "-o", "json"])?;
    ensure!(!audit.contains("cluster:north"), "north got as far as a federator: {audit}");
    Ok(())
}
