//! `JoinPolicy` (tombolo.dev/v1alpha1, cluster-scoped): which identities a joiner may have by what it can show, and what those
//! may serve. Reading it, and its evaluation, which is pure.
//!
//! As long as no policy is about machines, each machine with a token joins as what the token says; one policy about them is
//! enough, and only those join that some policy selects. Service accounts likewise, by themselves.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::FieldError;
use super::schema::{NAME_PATTERN, SERVICE_PATTERN};
use crate::names::{Namespace, ServiceKey};

/// Of one list.
const MAX_PATTERNS: usize = 64;
/// Names of Kubernetes objects have at most 253 characters.
const MAX_PATTERN_BYTES: usize = 253;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "has(self.machines) != has(self.serviceAccounts)",
      "message": "give exactly one of machines and serviceAccounts" },
]))]
pub struct JoinPolicySpec {
    /// Selects machines that join with a token: their identity is `vm/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machines: Option<MachineSelector>,
    /// Selects pods by their service account: their identity is `ns/NAMESPACE/sa/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_accounts: Option<ServiceAccountSelector>,
    /// `NAMESPACE/NAME` patterns of what those selected may serve; when empty, what they may without a policy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 507), regex(pattern = SERVICE_PATTERN)))]
    pub services: Vec<String>,
}

/// Each list that is given must match.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MachineSelector {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = NAME_PATTERN)))]
    pub names: Vec<String>,
    /// Of the token: `tombolo vm token NAME --group GROUP`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = NAME_PATTERN)))]
    pub groups: Vec<String>,
}

/// Each list that is given must match.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountSelector {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = NAME_PATTERN)))]
    pub namespaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = NAME_PATTERN)))]
    pub names: Vec<String>,
}

/// What a joiner has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attested<'a> {
    /// A token for this machine of this group; empty: of none.
    Machine {
        name: &'a str,
        group: &'a str,
    },
    ServiceAccount {
        namespace: &'a str,
        name: &'a str,
    },
}

/// Whether `text` fits a pattern, in which `*` stands for any run of characters.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

/// An empty list asks for nothing.
fn any_fits(patterns: &[String], text: &str) -> bool {
    patterns.is_empty() || patterns.iter().any(|pattern| fits(pattern, text))
}

impl JoinPolicySpec {
    /// Whether it is about joiners of this kind.
    pub fn is_about(&self, joiner: Attested<'_>) -> bool {
        match joiner {
            Attested::Machine { .. } => self.machines.is_some(),
            Attested::ServiceAccount { .. } => self.service_accounts.is_some(),
        }
    }

    /// Whether it selects this one.
    pub fn selects(&self, joiner: Attested<'_>) -> bool {
        match (joiner, &self.machines, &self.service_accounts) {
            (Attested::Machine { name, group }, Some(MachineSelector { names, groups }), _) => {
                any_fits(names, name) && any_fits(groups, group) && (groups.is_empty() || !group.is_empty())
            }
            (
                Attested::ServiceAccount { namespace, name },
                _,
                Some(ServiceAccountSelector { namespaces, names }),
            ) => any_fits(namespaces, namespace) && any_fits(names, name),
            _ => false,
        }
    }

    /// Whether those that it selects may serve this.
    pub fn admits_service(&self, service: &ServiceKey) -> bool {
        let admits = |pattern: &String| {
            let (namespace, name) = pattern.split_once('/').unwrap_or_default();
            fits(namespace, service.namespace.as_str()) && fits(name, service.name.as_str())
        };
        self.services.is_empty() || self.services.iter().any(admits)
    }

    /// Whom it selects, in a line.
    pub fn selection(&self) -> String {
        let list = |what: &str, patterns: &[String]| match patterns {
            [] => format!("any {what}"),
            patterns => format!("{what} {}", patterns.join(" or ")),
        };
        match (&self.machines, &self.service_accounts) {
            (Some(MachineSelector { names, groups }), _) if groups.is_empty() => list("name", names),
            (Some(MachineSelector { names, groups }), _) => {
                format!("{}, {}", list("name", names), list("group", groups))
            }
            (None, Some(ServiceAccountSelector { namespaces, names })) => {
                format!("{}, {}", list("namespace", namespaces), list("service account", names))
            }
            (None, None) => String::new(),
        }
    }

    pub(super) fn validate(&self, errors: &mut Vec<FieldError>) {
        let Self { machines, service_accounts, services } = self;
        let one_of = "exactly one of machines and serviceAccounts";
        match (machines, service_accounts) {
            (None, None) => errors.push(FieldError::missing("spec", one_of)),
            (Some(_), Some(_)) => {
                errors.push(FieldError::new("spec", "machines and serviceAccounts", one_of));
            }
            (Some(MachineSelector { names, groups }), None) => {
                patterns("spec.machines.names", names, errors);
                patterns("spec.machines.groups", groups, errors);
            }
            (None, Some(ServiceAccountSelector { namespaces, names })) => {
                patterns("spec.serviceAccounts.namespaces", namespaces, errors);
                patterns("spec.serviceAccounts.names", names, errors);
            }
        }
        if services.len() > MAX_PATTERNS {
            errors.push(too_many("spec.services", services.len()));
        }
        for (index, service) in services.iter().enumerate() {
            let good = service
                .split_once('/')
                .is_some_and(|(namespace, name)| is_pattern(namespace) && is_pattern(name));
            if !good {
                let expected = "NAMESPACE/NAME, each with * for any run of characters, e.g. shop/db-*";
                errors.push(FieldError::new(format!("spec.services[{index}]"), service, expected));
            }
        }
    }
}

fn is_pattern(text: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | '*');
    !text.is_empty() && text.len() <= MAX_PATTERN_BYTES && text.chars().all(letter)
}

fn too_many(path: &str, count: usize) -> FieldError {
    FieldError::new(path, format!("{count} entries"), format!("at most {MAX_PATTERNS}"))
}

fn patterns(path: &str, patterns: &[String], errors: &mut Vec<FieldError>) {
    if patterns.len() > MAX_PATTERNS {
        errors.push(too_many(path, patterns.len()));
    }
    for (index, pattern) in patterns.iter().enumerate().filter(|(_, pattern)| !is_pattern(pattern)) {
        let expected = "lower-case letters, digits, - and ., with * for any run of them, e.g. db-*";
        errors.push(FieldError::new(format!("{path}[{index}]"), pattern, expected));
    }
}

/// What all policies say of one joiner. `Err`: why it may not join, naming the field and what to do.
pub fn judge<'a>(
    policies: impl Iterator<Item = (&'a str, &'a JoinPolicySpec)>,
    joiner: Attested<'_>,
) -> Result<Vec<&'a JoinPolicySpec>, String> {
    let about: Vec<_> = policies.filter(|(_, spec)| spec.is_about(joiner)).collect();
    let selecting: Vec<_> =
        about.iter().filter(|(_, spec)| spec.selects(joiner)).map(|(_, spec)| *spec).collect();
    if about.is_empty() || !selecting.is_empty() {
        return Ok(selecting);
    }
    const SHOWN: usize = 5;
    let there: Vec<String> =
        about.iter().take(SHOWN).map(|(name, spec)| format!("{name}: {}", spec.selection())).collect();
    let more = if about.len() > SHOWN { format!(" and {} more", about.len() - SHOWN) } else { String::new() };
    let (field, who, remedy) = match joiner {
        Attested::Machine { name, group: "" } => (
            "name",
            format!("machine {name:?} without a group"),
            "apply a JoinPolicy whose spec.machines selects it, or make its token with --group",
        ),
        Attested::Machine { name, group } => (
            "group",
            format!("machine {name:?} of group {group:?}"),
            "apply a JoinPolicy whose spec.machines selects it, or make its token with another --group",
        ),
        Attested::ServiceAccount { namespace, name } => (
            "service account",
            format!("{namespace}/{name}"),
            "apply a JoinPolicy whose spec.serviceAccounts selects it",
        ),
    };
    Err(format!(
        "field {field}: no JoinPolicy lets {who} join; there are {}{more}. To let it join, {remedy}",
        there.join("; ")
    ))
}

/// Whether a joiner may serve this by the policies that select it: none is no limit, and with several each adds.
pub fn may_serve(selecting: &[&JoinPolicySpec], service: &ServiceKey) -> bool {
    selecting.is_empty() || selecting.iter().any(|spec| spec.admits_service(service))
}

/// A group's name, as tokens carry it.
pub fn check_group(group: &str) -> Result<(), FieldError> {
    // As Kubernetes names namespaces: DNS labels.
    match group.parse::<Namespace>() {
        Ok(_) => Ok(()),
        Err(error) => Err(FieldError::new("group", group, error)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Object, Spec};
    use super::*;

    fn policy(spec: &Value) -> Result<JoinPolicySpec, String> {
        let object = Object::from_json(json!({
            "apiVersion": "tombolo.dev/v1alpha1", "kind": "JoinPolicy", "metadata": { "name": "p" }, "spec": spec,
        }));
        match object.map_err(|e| e.to_string())?.spec {
            Spec::JoinPolicy(spec) => Ok(spec),
            other => Err(format!("{other:?}")),
        }
    }

    fn machine<'a>(name: &'a str, group: &'a str) -> Attested<'a> {
        Attested::Machine { name, group }
    }

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        for (pattern, text, expected) in [
            ("db-1", "db-1", true),
            ("db-1", "db-12", false),
            ("db-*", "db-", true),
            ("db-*", "db", false),
            ("*", "", true),
            ("*-db", "x-db", true),
            ("a*b*c", "abc", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "acb", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn without_a_policy_of_its_kind_everybody_joins_and_with_one_only_who_is_selected() {
        let databases =
            policy(&json!({ "machines": { "names": ["db-*"], "groups": ["databases"] } })).unwrap();
        let pods = policy(&json!({ "serviceAccounts": { "namespaces": ["shop", "team-*"] } })).unwrap();
        let all = || [("databases", &databases), ("pods", &pods)].into_iter();
        assert!(judge(std::iter::empty(), machine("x", "")).unwrap().is_empty());
        assert_eq!(judge(all(), machine("db-1", "databases")).unwrap(), [&databases]);
        for (name, group) in [("db-1", ""), ("db-1", "web"), ("web-1", "databases")] {
            let refused = judge(all(), machine(name, group)).unwrap_err();
            for said in [name, "databases: name db-*, group databases", "--group", "spec.machines"] {
                assert!(refused.contains(said), "{said}: {refused}");
            }
        }
        let account = |namespace, name| Attested::ServiceAccount { namespace, name };
        assert_eq!(judge(all(), account("team-a", "web")).unwrap(), [&pods]);
        let refused = judge(all(), account("bank", "vault")).unwrap_err();
        assert!(refused.contains("bank/vault") && refused.contains("spec.serviceAccounts"), "{refused}");
        let only_machines = [("databases", &databases)].into_iter();
        assert!(judge(only_machines, account("bank", "vault")).unwrap().is_empty());
    }

    #[test]
    fn services_are_limited_by_the_policies_that_select_and_each_adds() {
        let limited = |services: &[&str]| policy(&json!({ "machines": {}, "services": services })).unwrap();
        let (db, cache, free) = (limited(&["shop/db-*"]), limited(&["*/cache"]), limited(&[]));
        let service = |text: &str| text.parse::<ServiceKey>().unwrap();
        assert!(may_serve(&[], &service("bank/vault")));
        assert!(may_serve(&[&db], &service("shop/db-1")) && !may_serve(&[&db], &service("bank/db-1")));
        assert!(may_serve(&[&db, &cache], &service("bank/cache")));
        assert!(may_serve(&[&db, &free], &service("bank/vault")), "one of them sets no limit");
    }

    #[test]
    fn what_selects_nobody_or_everything_at_once_is_refused_by_its_field() {
        for (spec, said) in [
            (json!({}), "exactly one of machines and serviceAccounts"),
            (json!({ "machines": {}, "serviceAccounts": {} }), "exactly one of"),
            (json!({ "machines": { "names": ["DB"] } }), "spec.machines.names[0]"),
            (json!({ "machines": { "groups": [""] } }), "spec.machines.groups[0]"),
            (json!({ "machines": { "name": ["db"] } }), "names"),
            (json!({ "serviceAccounts": { "namespaces": ["a/b"] } }), "spec.serviceAccounts.namespaces[0]"),
            (json!({ "machines": {}, "services": ["db"] }), "spec.services[0]"),
            (json!({ "machines": {}, "services": vec!["a/b"; 65] }), "at most 64"),
        ] {
            let error = policy(&spec).unwrap_err();
            assert!(error.contains(said), "{said}: {error}");
        }
        assert!(check_group("databases").is_ok() && check_group("Data Bases").is_err());
    }
}
