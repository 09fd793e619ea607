//! Objects as the operator sees them: the table of `get`, the page of `describe`. Pure: the time is passed in.

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{printable, table, table_text};

/// A string inside an object, or empty.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// `kind/name` in lower case, as `-o name` prints it.
pub fn short_name(object: &Value) -> String {
    format!("{}/{}", text(object, "/kind").to_ascii_lowercase(), text(object, "/metadata/name"))
}

/// The table of `get`. `all_namespaces` adds the namespace, `wide` what the object is about.
pub fn list(objects: &[Value], namespaces: bool, wide: bool, now: OffsetDateTime) -> String {
    let mut headers = vec!["name", "ready", "reason", "age"];
    if namespaces {
        headers.insert(0, "namespace");
    }
    if wide {
        headers.push("about");
    }
    let mut table = table(&headers);
    for object in objects {
        let condition = leading_condition(object);
        let status = condition.map_or("-", |c| text(c, "/status"));
        let reason = condition.map_or("-", |c| text(c, "/reason"));
        let mut row = vec![
            text(object, "/metadata/name").to_owned(),
            status.to_owned(),
            reason.to_owned(),
            age(text(object, "/metadata/creationTimestamp"), now),
        ];
        if namespaces {
            row.insert(0, text(object, "/metadata/namespace").to_owned());
        }
        if wide {
            row.push(about(object));
        }
        table.add_row(row.iter().map(|cell| printable(cell)));
    }
    table_text(&table)
}

/// The condition that sums an object up: the first that is not `True`, else the first.
fn leading_condition(object: &Value) -> Option<&Value> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    let needs = |c: &&Value| {
        tombolo_model::resource::condition::needs_attention(text(c, "/type"), text(c, "/status"))
    };
    conditions.iter().find(needs).or_else(|| conditions.first())
}

/// One line of what the object is about, by kind.
fn about(object: &Value) -> String {
    let strings = |pointer: &str| -> String {
        let list = object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",")
    };
    match text(object, "/kind") {
        "ServiceExport" => {
            let to = object.pointer("/metadata/annotations/tombolo.dev~1export-to").and_then(Value::as_str);
            // Without the annotation: every linked cluster, as MCS has it.
            format!("to {}", to.unwrap_or("*"))
        }
        "ServiceImport" => {
            let clusters = object.pointer("/status/clusters").and_then(Value::as_array);
            let names: Vec<_> = clusters.into_iter().flatten().map(|c| text(c, "/cluster")).collect();
            match (names.join(","), strings("/spec/ips")) {
                (from, at) if at.is_empty() => format!("from {from}"),
                (from, at) => format!("from {from} at {at}"),
            }
        }
        "FailoverPolicy" => {
            let tiers = object.pointer("/spec/tiers").and_then(Value::as_array).map_or(0, Vec::len);
            format!(
                "{} {}, {tiers} tiers",
                text(object, "/spec/targetRef/kind"),
                text(object, "/spec/targetRef/name")
            )
        }
        "AccessPolicy" => access(object),
        "Revocation" => revoked(object),
        "JoinPolicy" if object.pointer("/spec/machines").is_some() => {
            format!("machines {}", strings("/spec/machines/names"))
        }
        "JoinPolicy" => format!("service accounts of {}", strings("/spec/serviceAccounts/namespaces")),
        "ClusterLink" => format!("gateways {}", strings("/spec/gateways")),
        "ClusterProperty" => text(object, "/spec/value").to_owned(),
        _ => String::new(),
    }
}

/// Whom a revocation is about, and why.
fn revoked(object: &Value) -> String {
    let target = ["spiffeId", "serial", "node", "cluster"].iter().find_map(|field| {
        let value = text(object, &format!("/spec/{field}"));
        (!value.is_empty())
            .then(|| if *field == "spiffeId" { value.to_owned() } else { format!("{field} {value}") })
    });
    match (target.unwrap_or_default(), text(object, "/spec/reason")) {
        (target, "") => target,
        (target, reason) => format!("{target} ({reason})"),
    }
}

/// `ALLOW web,api:80, 2 rules (dry run)`.
fn access(object: &Value) -> String {
    let list = |pointer: &str| object.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice);
    let targets = list("/spec/targetRefs")
        .map(|targets| targets.iter().map(|target| text(target, "/name")).collect::<Vec<_>>().join(","));
    let ports = list("/spec/ports")
        .map(|ports| format!(":{}", ports.iter().map(Value::to_string).collect::<Vec<_>>().join(",")));
    let rules = match list("/spec/rules").unwrap_or_default().len() {
        1 => "1 rule".to_owned(),
        rules => format!("{rules} rules"),
    };
    let dry = object.pointer("/spec/dryRun").and_then(Value::as_bool).unwrap_or_default();
    format!(
        "{} {}{}, {rules}{}",
        text(object, "/spec/action"),
        targets.as_deref().unwrap_or("*"),
        ports.unwrap_or_default(),
        if dry { " (dry run)" } else { "" }
    )
}

/// The page of `describe`: identity, conditions, then spec and status as YAML.
pub fn describe(object: &Value, now: OffsetDateTime) -> String {
    let mut page = String::new();
    let mut field = |name: &str, value: &str| {
        if !value.is_empty() {
            page.push_str(&format!("{:<14}{}\n", format!("{name}:"), printable(value)));
        }
    };
    field("Name", text(object, "/metadata/name"));
    field("Namespace", text(object, "/metadata/namespace"));
    field("Kind", text(object, "/kind"));
    field("API version", text(object, "/apiVersion"));
    let created = text(object, "/metadata/creationTimestamp");
    if !created.is_empty() {
        field("Created", &format!("{created} ({} ago)", age(created, now)));
    }
    for section in ["labels", "annotations"] {
        let map = object.pointer(&format!("/metadata/{section}")).and_then(Value::as_object);
        for (key, value) in map.into_iter().flatten() {
            field(
                if section == "labels" { "Label" } else { "Annotation" },
                &format!("{key}={}", scalar(value)),
            );
        }
    }
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    if let Some(conditions) = conditions.filter(|list| !list.is_empty()) {
        let mut table = table(&["condition", "status", "reason", "since", "message"]);
        for condition in conditions {
            let since = age(text(condition, "/lastTransitionTime"), now);
            let cells = ["/type", "/status", "/reason"].map(|pointer| printable(text(condition, pointer)));
            let [kind, status, reason] = cells;
            table.add_row([kind, status, reason, since, printable(text(condition, "/message"))]);
        }
        page.push('\n');
        page.push_str(&table_text(&table));
        page.push('\n');
    }
    for section in ["spec", "status"] {
        let Some(mut value) = object.get(section).cloned() else { continue };
        if let Some(map) = value.as_object_mut() {
            map.remove("conditions");
            if map.is_empty() {
                continue;
            }
        }
        let yaml = super::yaml_text(&value).unwrap_or_else(|failure| failure.to_string());
        page.push_str(&format!("\n{}:\n", section[..1].to_ascii_uppercase() + &section[1..]));
        for line in yaml.trim_end().lines() {
            page.push_str(&format!("  {}\n", printable(line)));
        }
    }
    page.trim_end().to_owned()
}

fn scalar(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// How long ago an RFC 3339 time was, in the largest fitting unit; `-` when there is none.
pub fn age(timestamp: &str, now: OffsetDateTime) -> String {
    let Ok(then) = OffsetDateTime::parse(timestamp, &Rfc3339) else { return "-".to_owned() };
    span((now - then).whole_seconds())
}

/// A number of seconds in the largest fitting unit.
pub fn span(seconds: i64) -> String {
    match seconds {
        ..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn now() -> OffsetDateTime {
        OffsetDateTime::parse("2026-11-24T02:05:00Z", &Rfc3339).unwrap()
    }

    fn export() -> Value {
        json!({
            "apiVersion": "multicluster.x-k8s.io/v1alpha1", "kind": "ServiceExport",
            "metadata": { "name": "web", "namespace": "shop", "creationTimestamp": "2026-11-24T02:00:00Z",
                          "annotations": { "tombolo.dev/export-to": "east" } },
            "status": { "conditions": [
                { "type": "Valid", "status": "True", "reason": "Valid" },
                { "type": "Ready", "status": "False", "reason": "NoEndpoints", "message": "no healthy endpoint",
                  "lastTransitionTime": "2026-11-24T02:04:30Z" } ] }
        })
    }

    #[test]
    fn a_list_shows_the_condition_that_needs_attention() {
        let text = list(&[export()], true, true, now());
        assert_eq!(
            text,
            "NAMESPACE  NAME  READY  REASON       AGE  ABOUT\nshop       web   False  NoEndpoints  5m   to east"
        );
    }

    #[test]
    fn an_access_policy_is_summed_up_in_a_line() {
        let policy = |spec: Value| about(&json!({ "kind": "AccessPolicy", "spec": spec }));
        let targets = json!([{ "kind": "Service", "name": "web" }, { "kind": "Service", "name": "api" }]);
        let spec =
            json!({ "action": "DENY", "targetRefs": targets, "ports": [80], "rules": [{}], "dryRun": true });
        assert_eq!(policy(spec), "DENY web,api:80, 1 rule (dry run)");
        assert_eq!(policy(json!({ "action": "ALLOW" })), "ALLOW *, 0 rules");
    }

    #[test]
    fn a_description_shows_every_condition_with_its_message() {
        let page = describe(&export(), now());
        assert!(
            page.contains("no healthy endpoint") && page.contains("30s") && page.contains("Valid"),
            "{page}"
        );
        assert!(page.contains("tombolo.dev/export-to=east"), "{page}");
    }

    #[test]
    fn ages_use_the_largest_fitting_unit() {
        assert_eq!([5, 119, 120, 7_199, 7_200, 172_800].map(span), ["5s", "119s", "2m", "119m", "2h", "2d"]);
        assert_eq!(age("not a time", now()), "-");
    }
}
