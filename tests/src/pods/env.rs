//! Environment variables: what they are to hold, and `$(NAME)` in them and in command lines.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod};

use super::plan::Refusal;

/// Where a variable's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Value(String),
    /// A field of the pod, `resourceFieldRef`s included.
    Field(String),
    Key {
        kind: Keyed,
        name: String,
        key: String,
        optional: bool,
    },
    /// Every key of an object, each with a prefix.
    All {
        kind: Keyed,
        name: String,
        prefix: String,
        optional: bool,
    },
}

/// What has keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Keyed {
    ConfigMap,
    Secret,
}

/// In order: later ones may use and replace earlier ones. Those of [`Source::All`] have no name of their own.
pub fn sources(container: &Container) -> Result<Vec<(String, Source)>, Refusal> {
    let mut found = Vec::new();
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.clone().unwrap_or_default();
        let config = from.config_map_ref.as_ref().map(|of| (Keyed::ConfigMap, of.name.clone(), of.optional));
        let secret = from.secret_ref.as_ref().map(|of| (Keyed::Secret, of.name.clone(), of.optional));
        if let Some((kind, name, optional)) = config.or(secret) {
            found.push((String::new(), Source::All { kind, name, prefix, optional: optional == Some(true) }));
        }
    }
    for variable in container.env.iter().flatten() {
        found.push((variable.name.clone(), source(variable)?));
    }
    Ok(found)
}

fn source(variable: &EnvVar) -> Result<Source, Refusal> {
    let Some(from) = &variable.value_from else {
        return Ok(Source::Value(variable.value.clone().unwrap_or_default()));
    };
    if let Some(field) = &from.field_ref {
        return Ok(Source::Field(field.field_path.clone()));
    }
    if let Some(resource) = &from.resource_field_ref {
        return Ok(Source::Field(resource.resource.clone()));
    }
    let config = from.config_map_key_ref.as_ref();
    let config = config.map(|of| (Keyed::ConfigMap, of.name.clone(), of.key.clone(), of.optional));
    let secret = from.secret_key_ref.as_ref();
    let secret = secret.map(|of| (Keyed::Secret, of.name.clone(), of.key.clone(), of.optional));
    let (kind, name, key, optional) = config.or(secret).ok_or_else(|| {
        Refusal::config(format!("variable {} comes from what is not known here", variable.name))
    })?;
    Ok(Source::Key { kind, name, key, optional: optional == Some(true) })
}

/// A field of a pod as the downward API has it.
pub fn field(pod: &Pod, container: Option<&Container>, path: &str) -> Result<String, Refusal> {
    let (metadata, spec) = (&pod.metadata, pod.spec.clone().unwrap_or_default());
    let status = pod.status.clone().unwrap_or_default();
    let keyed = |map: &Option<BTreeMap<String, String>>, rest: &str| {
        let key = rest.trim_start_matches("['").trim_end_matches("']");
        map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
    };
    let lines = |map: &Option<BTreeMap<String, String>>| {
        map.iter().flatten().map(|(key, value)| format!("{key}={value:?}\n")).collect::<String>()
    };
    let value = match path {
        "metadata.name" => metadata.name.clone(),
        "metadata.namespace" => metadata.namespace.clone(),
        "metadata.uid" => metadata.uid.clone(),
        "metadata.labels" => Some(lines(&metadata.labels)),
        "metadata.annotations" => Some(lines(&metadata.annotations)),
        "spec.nodeName" => spec.node_name,
        "spec.serviceAccountName" => spec.service_account_name,
        "status.hostIP" => status.host_ip,
        "status.hostIPs" => {
            let all: Vec<String> = status.host_ips.into_iter().flatten().map(|of| of.ip).collect();
            Some(all.join(","))
        }
        "status.podIP" => status.pod_ip,
        "status.podIPs" => {
            let all: Vec<String> = status.pod_ips.into_iter().flatten().map(|of| of.ip).collect();
            Some(all.join(","))
        }
        resource if resource.starts_with("limits.") || resource.starts_with("requests.") => {
            let resources = container.and_then(|container| container.resources.clone()).unwrap_or_default();
            let (of, name) = resource.split_once('.').unwrap_or_default();
            let map = if of == "limits" { resources.limits } else { resources.requests };
            Some(
                map.and_then(|map| map.get(name).map(|quantity| quantity.0.clone()))
                    .unwrap_or_else(|| "0".into()),
            )
        }
        path => match (path.strip_prefix("metadata.labels"), path.strip_prefix("metadata.annotations")) {
            (Some(rest), _) => Some(keyed(&metadata.labels, rest)),
            (_, Some(rest)) => Some(keyed(&metadata.annotations, rest)),
            _ => return Err(Refusal::config(format!("field {path} is not known here"))),
        },
    };
    Ok(value.unwrap_or_default())
}

/// `$(NAME)` becomes the variable's value, `$$(NAME)` stays `$(NAME)`, and what is not known stays as it is.
pub fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let name = after.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        if let Some(escaped) = after.strip_prefix('$') {
            out.push('$');
            rest = escaped;
        } else if let Some((value, tail)) = name.and_then(|(name, tail)| Some((variables.get(name)?, tail))) {
            out.push_str(value);
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_parentheses_are_expanded_as_kubernetes_does() {
        let variables =
            BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "$(A)".to_owned())]);
        for (text, expected) in
            [("x$(A)y$(B)", "x1y$(A)"), ("$$(A) $(C) $A $", "$(A) $(C) $A $"), ("$(A", "$(A"), ("", "")]
        {
            assert_eq!(expand(text, &variables), expected, "{text}");
        }
    }

    #[test]
    fn fields_are_what_the_downward_api_says() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": { "name": "a", "namespace": "n", "labels": { "x/y": "z" } },
            "spec": { "nodeName": "one", "containers": [] },
            "status": { "podIPs": [{ "ip": "1.2.3.4" }, { "ip": "::1" }] },
        }))
        .unwrap();
        for (path, expected) in [
            ("metadata.name", "a"),
            ("metadata.labels['x/y']", "z"),
            ("metadata.annotations['q']", ""),
            ("metadata.labels", "x/y=\"z\"\n"),
            ("status.podIPs", "1.2.3.4,::1"),
            ("limits.cpu", "0"),
        ] {
            assert_eq!(field(&pod, None, path).unwrap(), expected, "{path}");
        }
        assert!(field(&pod, None, "status.phase").is_err());
    }
}
