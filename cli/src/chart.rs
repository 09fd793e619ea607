//! The Helm chart, which is part of the program: `tombolo install` applies what helm would render, so there is one source of
//! manifests and helm is needed by nobody. A test compares the two for every preset.
//!
//! Helm's hooks are left out: what they are for (installing definitions) the command does itself.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::failure::Failure;

mod eval;
mod syntax;
pub mod values;

use eval::{RenderError, Renderer};

/// `app.kubernetes.io/managed-by` of what is installed by the command; what the federator writes has another.
pub const MANAGED_BY: &str = "tombolo-install";
/// The release's name, on every object.
pub const RELEASE: &str = "tombolo";

macro_rules! chart {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_str!(concat!("../../deploy/helm/tombolo/", $path)))),*]
    };
}

/// By their path in the chart. A test counts the directory's.
const FILES: &[(&str, &str)] = chart![
    "Chart.yaml",
    "values.yaml",
    "values.schema.json",
    "files/rbac.yaml",
    "presets/aws.yaml",
    "presets/azure.yaml",
    "presets/gcp.yaml",
    "presets/host-network.yaml",
    "presets/metallb.yaml",
    "presets/node-port.yaml",
    "templates/_helpers.tpl",
    "templates/crds.yaml",
    "templates/federator.yaml",
    "templates/gateway.yaml",
    "templates/inject.yaml",
    "templates/monitoring.yaml",
    "templates/networkpolicy.yaml",
    "templates/rbac.yaml",
    "templates/shared.yaml",
];

fn file(path: &str) -> Option<&'static str> {
    FILES.iter().find(|(known, _)| *known == path).map(|(_, text)| *text)
}

fn broken(error: impl std::fmt::Display) -> Failure {
    Failure::new(format_args!("the chart in this program is broken: {error}"))
}

/// One document of YAML.
pub fn document(text: &str) -> Result<Value, Failure> {
    serde_saphyr::from_str(text).map_err(Failure::usage)
}

/// Names of the presets.
pub fn presets() -> impl Iterator<Item = &'static str> {
    FILES.iter().filter_map(|(path, _)| path.strip_prefix("presets/")?.strip_suffix(".yaml"))
}

/// What a preset sets.
pub fn preset(name: &str) -> Result<Value, Failure> {
    let text = file(&format!("presets/{name}.yaml")).ok_or_else(|| {
        let known: Vec<&str> = presets().collect();
        Failure::usage(format_args!("--preset {name:?} is not known"))
            .remedy(format_args!("known: {}", known.join(", ")))
    })?;
    document(text)
}

/// The chart's values with these laid over them in order, judged by its schema.
pub fn values(over: Vec<Value>) -> Result<Value, Failure> {
    let mut values = document(file("values.yaml").unwrap_or_default()).map_err(broken)?;
    over.into_iter().for_each(|over| values::merge(&mut values, over));
    let schema = serde_json::from_str(file("values.schema.json").unwrap_or_default()).map_err(broken)?;
    values::check(&values, &schema, "")?;
    Ok(values)
}

/// Every object, in the order of the templates.
pub fn render(values: &Value, namespace: &str) -> Result<Vec<Value>, Failure> {
    let chart = document(file("Chart.yaml").unwrap_or_default()).map_err(broken)?;
    let root = json!({
        "Values": values,
        "Release": { "Name": RELEASE, "Namespace": namespace, "Service": MANAGED_BY },
        "Chart": { "Name": chart["name"], "Version": chart["version"], "AppVersion": chart["appVersion"] },
    });
    let templates = FILES.iter().filter(|(path, _)| path.starts_with("templates/"));
    let parsed: Vec<_> = templates
        .map(|(path, text)| Ok((*path, syntax::parse(path, text).map_err(broken)?)))
        .collect::<Result<_, Failure>>()?;
    let defines: HashMap<_, _> = parsed.iter().flat_map(|(_, parsed)| parsed.defines.clone()).collect();
    let renderer = Renderer { defines, files: &file };
    let mut objects = Vec::new();
    for (path, parsed) in parsed.iter().filter(|(path, _)| path.ends_with(".yaml")) {
        let text = renderer.render(parsed, &root).map_err(|error| match error {
            RenderError::Refused(reason) => Failure::usage(reason),
            RenderError::Template(reason) => broken(format_args!("{path}: {reason}")),
        })?;
        for part in text.split("\n---").filter(|part| has_content(part)) {
            let object = document(part).map_err(|error| broken(format_args!("{path}: {error}: {part}")))?;
            if object.pointer("/metadata/annotations/helm.sh~1hook").is_none() {
                objects.push(object);
            }
        }
    }
    Ok(objects)
}

/// Whether there is anything but comments.
fn has_content(part: &str) -> bool {
    part.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#') && line != "---")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Value {
        json!({ "cluster": "east", "trustDomain": "acme.example" })
    }

    #[test]
    fn every_file_of_the_chart_is_in_the_program() {
        let dir = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/tombolo"));
        let mut found = Vec::new();
        for below in [".", "templates", "presets", "files"] {
            for entry in std::fs::read_dir(dir.join(below)).unwrap() {
                let entry = entry.unwrap();
                if entry.path().is_file() {
                    let name = entry.file_name().into_string().unwrap();
                    found.push(if below == "." { name } else { format!("{below}/{name}") });
                }
            }
        }
        // The first is helm's alone, the second is what helm prints.
        found.retain(|path| path != ".helmignore" && path != "templates/NOTES.txt");
        found.sort();
        let mut known: Vec<_> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        known.sort();
        assert_eq!(known, found);
    }

    #[test]
    fn each_preset_renders_objects_with_labels_that_the_command_finds_them_by() {
        assert_eq!(presets().count(), 6);
        for name in presets() {
            let values = values(vec![preset(name).unwrap(), given()]).unwrap();
            let objects = render(&values, "mesh").unwrap();
            let kinds: Vec<_> = objects.iter().filter_map(|object| object["kind"].as_str()).collect();
            assert!(kinds.iter().filter(|kind| **kind == "StatefulSet").count() == 2, "{name}: {kinds:?}");
            assert!(!kinds.contains(&"Job"), "{name}: a hook is rendered");
            let text = serde_json::to_string(&objects).unwrap();
            assert!(!text.contains("tombolo-system"), "{name}: another namespace than the release's: {text}");
        }
    }

    #[test]
    fn wrong_values_are_refused_by_their_path_with_what_is_known_there() {
        for (over, said) in [
            (json!({ "gateway": { "replica": 3 } }), "gateway.replica: there is no such value"),
            (json!({ "gateway": { "replicas": 0 } }), "gateway.replicas: 0, at least 1"),
            (
                json!({ "gateway": { "exposure": "x" } }),
                "gateway.exposure: \"x\" is not one of \"loadBalancer\"",
            ),
            (json!({ "federator": { "dns": "yes" } }), "federator.dns: \"yes\" is string, expected boolean"),
            (json!({ "gateway": { "service": { "nodePorts": [0] } } }), "gateway.service.nodePorts[0]: 0"),
            (json!({ "trust": { "secret": "" } }), "trust.secret: 0 characters, at least 1"),
        ] {
            let refused = values(vec![given(), over]).unwrap_err().to_string();
            assert!(refused.contains(said), "{refused}");
        }
        let two = json!({ "gateway": { "addresses": ["10.0.0.1:7440"] } });
        let refused = render(&values(vec![given(), two]).unwrap(), "mesh").unwrap_err().to_string();
        assert!(refused.contains("gateway.addresses has 1 entries for 2 replicas"), "{refused}");
        let refused = render(&values(Vec::new()).unwrap(), "mesh").unwrap_err().to_string();
        assert!(refused.contains("cluster is not set"), "{refused}");
        assert!(preset("aliyun").unwrap_err().to_string().contains("metallb"));
    }
}
