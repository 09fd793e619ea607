//! Values of the chart: defaults, files and single settings laid over one another, and judged by the chart's own schema.

use serde_json::{Map, Value};

use crate::failure::Failure;

/// Lays `over` over `base`, map by map; `null` takes a key away, as in helm.
pub fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match value {
                    Value::Null => drop(base.remove(&key)),
                    value => merge(base.entry(key).or_insert(Value::Null), value),
                }
            }
        }
        (base, over) => *base = over,
    }
}

/// `a.b=c`, as helm has it: a dot in a key is written `\.`, a list as `{a,b}`; numbers, true, false and null are those.
pub fn setting(text: &str) -> Result<Value, Failure> {
    let wrong = || {
        Failure::usage(format_args!("--set {text:?} is not KEY=VALUE"))
            .remedy("give it as --set gateway.replicas=3")
    };
    let (path, value) = text.split_once('=').ok_or_else(wrong)?;
    let mut keys = vec![String::new()];
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        match c {
            '.' => keys.push(String::new()),
            '\\' => keys.last_mut().ok_or_else(wrong)?.push(chars.next().ok_or_else(wrong)?),
            c => keys.last_mut().ok_or_else(wrong)?.push(c),
        }
    }
    if keys.iter().any(String::is_empty) {
        return Err(wrong());
    }
    let list = value.strip_prefix('{').and_then(|value| value.strip_suffix('}'));
    let value = match list {
        Some("") => Value::Array(Vec::new()),
        Some(items) => items.split(',').map(|item| scalar(item.trim())).collect(),
        None => scalar(value),
    };
    Ok(keys.into_iter().rev().fold(value, |value, key| Value::Object(Map::from_iter([(key, value)]))))
}

fn scalar(text: &str) -> Value {
    match text {
        "true" => true.into(),
        "false" => false.into(),
        "null" => Value::Null,
        // Not 007, which is a name.
        number if number == "0" || !number.starts_with('0') => {
            number.parse::<i64>().map_or_else(|_| text.into(), Value::from)
        }
        _ => text.into(),
    }
}

/// Judges values by a JSON schema, of which the chart's uses this much: type, enum, properties, additionalProperties, items,
/// minimum, maximum, minLength, maxLength, maxItems. Patterns are held by whoever parses the names.
pub fn check(value: &Value, schema: &Value, path: &str) -> Result<(), Failure> {
    let refused = |what: String| {
        let path = if path.is_empty() { "values" } else { path };
        Failure::usage(format_args!("{path}: {what}"))
    };
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        return Err(refused(format!("{value} is not one of {}", allowed.join(", "))));
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if let Some(expected) = schema.get("type").and_then(Value::as_str)
        && expected != kind
    {
        return Err(refused(format!("{value} is {kind}, expected {expected}")));
    }
    let bound = |name: &str| schema.get(name).and_then(Value::as_i64);
    let size = match value {
        Value::String(text) => Some((text.chars().count(), "minLength", "maxLength", "characters")),
        Value::Array(items) => Some((items.len(), "minItems", "maxItems", "entries")),
        _ => None,
    };
    let (number, least, most, unit) = match (size, value.as_i64()) {
        (Some((size, least, most, unit)), _) => {
            (Some(i64::try_from(size).unwrap_or(i64::MAX)), bound(least), bound(most), unit)
        }
        (None, number) => (number, bound("minimum"), bound("maximum"), ""),
    };
    if let Some(number) = number {
        let shown = if unit.is_empty() { value.to_string() } else { format!("{number} {unit}") };
        if let Some(least) = least.filter(|least| number < *least) {
            return Err(refused(format!("{shown}, at least {least} expected")));
        }
        if let Some(most) = most.filter(|most| number > *most) {
            return Err(refused(format!("{shown}, at most {most} expected")));
        }
    }
    if let (Value::Array(items), Some(schema)) = (value, schema.get("items")) {
        for (at, item) in items.iter().enumerate() {
            check(item, schema, &format!("{path}[{at}]"))?;
        }
    }
    let Value::Object(map) = value else { return Ok(()) };
    let known = schema.get("properties").and_then(Value::as_object);
    for (key, value) in map {
        let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (known.and_then(|known| known.get(key)), schema.get("additionalProperties")) {
            (Some(schema), _) => check(value, schema, &below)?,
            (None, Some(Value::Bool(false))) => {
                let mut known: Vec<&str> =
                    known.into_iter().flat_map(Map::keys).map(String::as_str).collect();
                known.sort_unstable();
                return Err(Failure::usage(format_args!("{below}: there is no such value"))
                    .remedy(format_args!("known there: {}", known.join(", "))));
            }
            (None, Some(schema @ Value::Object(_))) => check(value, schema, &below)?,
            (None, _) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_are_read_as_helm_reads_them() {
        for (text, value) in [
            ("a.b=3", json!({ "a": { "b": 3 } })),
            ("a=true", json!({ "a": true })),
            ("a=007", json!({ "a": "007" })),
            (r"a.tombolo\.dev/x=y", json!({ "a": { "tombolo.dev/x": "y" } })),
            ("a={b,1}", json!({ "a": ["b", 1] })),
            ("a=", json!({ "a": "" })),
            ("a=b=c", json!({ "a": "b=c" })),
        ] {
            assert_eq!(setting(text).unwrap(), value, "{text}");
        }
        for bad in ["a", "=b", "a..b=c", ".a=b", "a\\"] {
            assert!(setting(bad).unwrap_err().to_string().contains("--set"), "{bad}");
        }
    }

    #[test]
    fn later_values_win_and_null_takes_away() {
        let mut values = json!({ "a": { "b": 1, "c": 2 }, "d": [1] });
        merge(&mut values, json!({ "a": { "b": 3, "c": null }, "d": [2, 3] }));
        assert_eq!(values, json!({ "a": { "b": 3 }, "d": [2, 3] }));
    }
}
