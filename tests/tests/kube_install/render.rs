//! What the chart renders: by helm, by the command, and before a real API server.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tombolo_tests::kube::{Tools, documents};
use tombolo_tests::mesh::binary;

use super::{GIVEN, NAMESPACE, World, chart};

/// Beyond the presets: everything that is off by default.
const ALL: [&str; 9] = [
    "federator.objects=true",
    "shared.namespaces={shop,bank}",
    "inject.enabled=true",
    "networkPolicy.enabled=true",
    "federator.dns=true",
    "federator.properties.region=eu-west-1",
    "gateway.podLabels.team=net",
    "gateway.service.annotations.example\\.dev/a=b",
    "federator.extraArgs={--audit-days=400}",
];

/// A name, and the same settings for helm and for `tombolo install`.
type Case = (String, Vec<String>, Vec<String>);

/// Each preset's arguments, and everything at once.
fn cases() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(chart().join("presets"))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a preset's name")?.to_owned();
        let file = path.display().to_string();
        cases.push((name.clone(), vec!["-f".into(), file], vec!["--preset".into(), name]));
    }
    ensure!(cases.len() == 6, "{} presets", cases.len());
    let mut all = Vec::new();
    for set in ALL {
        all.extend(["--set".to_owned(), set.to_owned()]);
    }
    cases.push(("everything".into(), all.clone(), all));
    let addresses =
        ["--set", "gateway.exposure=addresses", "--set", "gateway.addresses={10.0.0.1:7440,10.0.0.2:7440}"];
    let addresses: Vec<String> = addresses.iter().map(|arg| (*arg).to_owned()).collect();
    let without: Vec<String> = ["--set", "federator.services=false"].map(str::to_owned).into();
    cases.push(("no services".into(), without.clone(), without));
    cases.push(("addresses".into(), addresses.clone(), addresses));
    Ok(cases)
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// `tombolo install --dry-run`, without any cluster: the objects of the chart.
fn rendered(args: &[&str]) -> Result<Vec<Value>> {
    let nowhere = std::env::temp_dir().join("tombolo-nowhere");
    let output = Command::new(binary()?)
        .args(["install", "--cluster", "east", "--set", "trustDomain=acme.example", "--dry-run"])
        .args(args)
        .arg("--trust-root")
        .arg(nowhere)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut objects = documents(&String::from_utf8(output.stdout)?)?;
    let definitions = objects.iter().filter(|object| object["kind"] == "CustomResourceDefinition").count();
    ensure!(definitions >= 2, "{definitions} definitions");
    ensure!(objects.first().context("nothing")?["kind"] == "Namespace", "the namespace comes first");
    objects.retain(|object| object["kind"] != "CustomResourceDefinition" && object["kind"] != "Namespace");
    Ok(objects)
}

/// Without who installed it, by kind and name.
fn keyed(objects: Vec<Value>) -> Result<BTreeMap<String, Value>> {
    let mut keyed = BTreeMap::new();
    for mut object in objects {
        unmanaged(&mut object);
        let key =
            format!("{} {} {}", object["kind"], object["metadata"]["namespace"], object["metadata"]["name"]);
        ensure!(keyed.insert(key.clone(), object).is_none(), "{key} is there twice");
    }
    Ok(keyed)
}

fn unmanaged(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("app.kubernetes.io/managed-by");
            map.remove("app.kubernetes.io/instance");
            map.values_mut().for_each(unmanaged);
            if map.get("labels").is_some_and(|labels| *labels == json!({})) {
                map.remove("labels");
            }
        }
        Value::Array(items) => items.iter_mut().for_each(unmanaged),
        _ => {}
    }
}

pub fn helm_accepts_the_chart(tools: &Tools) -> Result<()> {
    let chart = chart().display().to_string();
    for (name, args, _) in cases()? {
        let said = tools.helm(&[&["lint", "--strict", &chart], &GIVEN[..], &strs(&args)].concat());
        let said = said.with_context(|| format!("helm lint, {name}"))?;
        ensure!(said.contains("0 chart(s) failed"), "{name}: {said}");
    }
    Ok(())
}

pub fn the_command_renders_what_helm_renders(tools: &Tools) -> Result<()> {
    for (name, helm, command) in cases()? {
        let by_helm = keyed(tools.template(&chart(), &[&GIVEN[..], &strs(&helm)].concat())?)?;
        let by_command = keyed(rendered(&strs(&command))?)?;
        let names = |objects: &BTreeMap<String, Value>| objects.keys().cloned().collect::<Vec<_>>();
        ensure!(
            names(&by_helm) == names(&by_command),
            "{name}: {:?} {:?}",
            names(&by_helm),
            names(&by_command)
        );
        for (key, by_helm) in &by_helm {
            let by_command = by_command.get(key);
            ensure!(by_command == Some(by_helm), "{name}: {key}\nhelm    {by_helm}\ncommand {by_command:?}");
        }
        println!("{name}: {} objects are the same by helm and by the command", by_helm.len());
    }
    Ok(())
}

/// The same values, refused by the schema before anything is rendered, or by the templates.
pub fn wrong_values_are_refused_by_both(tools: &Tools) -> Result<()> {
    for (set, by_helm, by_command) in [
        ("gateway.replica=3", "'replica' not allowed", "gateway.replica: there is no such value"),
        ("gateway.replicas=0", "/gateway/replicas", "gateway.replicas: 0, at least 1"),
        ("gateway.replicas=two", "/gateway/replicas", "gateway.replicas: \"two\" is string"),
        ("gateway.exposure=internet", "/gateway/exposure", "gateway.exposure: \"internet\" is not one of"),
        ("federator.dns=maybe", "/federator/dns", "federator.dns: \"maybe\" is string, expected boolean"),
        ("gateway.ports.border=80", "/gateway/ports/border", "gateway.ports.border: 80, at least 1024"),
        ("federator.persistence.disk=1Gi", "'disk' not allowed", "federator.persistence.disk: there is no"),
        (
            "inject.failurePolicy=Maybe",
            "/inject/failurePolicy",
            "inject.failurePolicy: \"Maybe\" is not one of",
        ),
        ("gateway.service.nodePorts={30440}", "1 entries for 2 replicas", "1 entries for 2 replicas"),
        ("gateway.exposure=addresses", "gateway.addresses is empty", "gateway.addresses is empty"),
    ] {
        let set = ["--set", set];
        let refused = tools.template(&chart(), &[&GIVEN[..], &set].concat());
        let refused = refused.err().with_context(|| format!("{set:?} was taken by helm"))?.to_string();
        ensure!(refused.contains(by_helm), "{set:?}: {refused}");
        let refused =
            rendered(&set).err().with_context(|| format!("{set:?} was taken by the command"))?.to_string();
        ensure!(refused.contains(by_command), "{set:?}: {refused}");
    }
    for (missing, kept) in [("cluster", &GIVEN[2..]), ("trustDomain", &GIVEN[..2])] {
        let refused =
            tools.template(&chart(), kept).err().with_context(|| format!("{missing} is not needed"))?;
        ensure!(refused.to_string().contains(&format!("{missing} is not set")), "{refused}");
    }
    Ok(())
}

/// `deploy/kubernetes/rbac.yaml` is what people apply by hand.
pub fn the_charts_rights_are_those_of_the_manifest(tools: &Tools) -> Result<()> {
    let manifest = documents(include_str!("../../../deploy/kubernetes/rbac.yaml"))?;
    let manifest = manifest.into_iter().filter(|object| object["kind"] != "Namespace").collect();
    let rendered =
        keyed(tools.template(&chart(), &[&GIVEN[..], &["--set", "shared.enabled=true"]].concat())?)?;
    for (key, object) in keyed(manifest)? {
        ensure!(rendered.get(&key) == Some(&object), "{key}: {object}\nchart: {:?}", rendered.get(&key));
    }
    Ok(())
}

/// Every preset's objects, hooks included, as strictly as the API server can: no unknown field, no warning, and pods that
/// PodSecurity "restricted" admits, but for those that use the node's network.
pub fn the_api_server_accepts_every_object(world: &World) -> Result<()> {
    let level = |level: &str| {
        world.plane.api.apply(&json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE, "labels": {
                "pod-security.kubernetes.io/enforce": level, "pod-security.kubernetes.io/warn": level } },
        }))
    };
    let mut judged = 0;
    for (name, args, _) in cases()? {
        level(if name == "host-network" { "privileged" } else { "restricted" })?;
        let text = world.tools.helm(
            &[
                &["template", "tombolo", &chart().display().to_string(), "-n", NAMESPACE],
                &GIVEN[..],
                &strs(&args),
            ]
            .concat(),
        )?;
        let file = world.mesh.path(&format!("{name}.yaml"));
        std::fs::write(&file, &text)?;
        let file = file.display().to_string();
        let said = world.kubectl(&[
            "apply",
            "--dry-run=server",
            "--validate=strict",
            "--warnings-as-errors",
            "-o",
            "name",
            "-f",
            &file,
        ]);
        let said = said.with_context(|| name.clone())?;
        let accepted = said.lines().filter(|line| line.contains('/')).count();
        let rendered = documents(&text)?.len();
        ensure!(accepted == rendered, "{name}: {accepted} of {rendered}: {said}");
        judged += rendered;
    }
    println!("FIGURE {judged} rendered objects accepted by the API server (dry run)");
    let namespace = tombolo_tests::kube::Object::new("v1", "Namespace", "", NAMESPACE);
    world.plane.api.delete(&namespace)?;
    world.plane.api.until(&namespace, std::time::Duration::from_secs(30), |found| {
        ensure!(found.is_none(), "{found:?}");
        Ok(())
    })
}
