//! SIG Multicluster's inventory: properties that objects give a cluster reach its peers, and linked clusters have profiles.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Object, condition};

use crate::{SOON, World, document, links, object};

/// Definitions are looked for once a minute.
const FOUND: Duration = Duration::from_secs(75);

fn property(name: &str) -> Object {
    Object::new("about.k8s.io/v1beta1", "ClusterProperty", "", name)
}

/// What west says of a policy that asks for a property of some cluster.
fn resolved(world: &World) -> Result<String> {
    let args = ["get", "accesspolicy", "europeans", "-n", "shop", "-o", "json"];
    let policy: Value = serde_json::from_str(&world.mesh.operate("west", &args)?)?;
    Ok(condition(&policy, "ResolvedRefs").0)
}

pub fn inventory(world: &mut World) -> Result<()> {
    world.mesh.apply("west", &links::about(&world.mesh, "east")?.to_string())?;
    world.east.api.apply(&links::about(&world.mesh, "west")?)?;
    links::connected(&world.mesh, "east", "west")?;
    let World { mesh, east } = &*world;
    for (name, value) in [("cluster.clusterset.k8s.io", "east"), ("clusterset.k8s.io", "acme.example")] {
        east.api.until(&property(name), FOUND, |found| {
            let found = found.with_context(|| format!("no {name}"))?;
            ensure!(found["spec"]["value"] == value, "{found}");
            Ok(())
        })?;
    }
    let rules = json!([{ "from": [{ "clusterProperties": { "region.topology": "eu" } }] }]);
    let policy = document(
        "AccessPolicy",
        "shop",
        "europeans",
        json!({ "action": "ALLOW", "dryRun": true, "rules": rules }),
    );
    mesh.apply("west", &policy.to_string())?;
    ensure!(resolved(world)? == "False NoClusterMatches", "{}", resolved(world)?);
    let region = json!({
        "apiVersion": "about.k8s.io/v1beta1", "kind": "ClusterProperty",
        "metadata": { "name": "region.topology" }, "spec": { "value": "eu" },
    });
    east.api.apply(&region)?;
    let reaches = |expected: &str| {
        mesh.eventually("west knows the property", SOON, |_| {
            let found = resolved(world)?;
            ensure!(found == expected, "{found}");
            Ok(())
        })
        .map(drop)
    };
    reaches("True ResolvedRefs")?;
    east.api.delete(&property("region.topology"))?;
    reaches("False NoClusterMatches")?;

    let profile = Object::new("multicluster.x-k8s.io/v1alpha2", "ClusterProfile", "tombolo-system", "west");
    let found = east.api.until(&profile, SOON, |found| {
        let found = found.context("no profile")?;
        for expected in ["Joined", "ControlPlaneHealthy"] {
            let (is, message) = condition(found, expected);
            ensure!(is.starts_with("True"), "{expected} is {is}: {message}");
        }
        Ok(found.clone())
    })?;
    ensure!(found["metadata"]["labels"]["x-k8s.io/cluster-manager"] == "tombolo", "{found}");
    ensure!(found["spec"]["clusterManager"]["name"] == "tombolo", "{found}");
    // An id that says something else is not changed back: it is immutable, whoever changed it has to say why.
    let id = property("cluster.clusterset.k8s.io");
    east.api.merge(&id, json!({ "spec": { "value": "other" } }))?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(east.api.get(&id)?.context("no id")?["spec"]["value"] == "other", "it is changed back");
    east.api.delete(&id)?;
    east.api.until(&id, SOON, |found| {
        ensure!(found.context("no id")?["spec"]["value"] == "east", "{found:?}");
        Ok(())
    })?;
    // The link goes, and so does the profile.
    east.api.delete(&object("ClusterLink", "", "west"))?;
    east.api.until(&profile, SOON, |found| {
        ensure!(found.is_none(), "the profile stays: {found:?}");
        Ok(())
    })
}
