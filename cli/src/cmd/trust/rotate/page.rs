//! How far a rotation is, on standard output.

use serde_json::{Value, json};
use tombolo_identity::authority::RootAuthority;
use tombolo_runtime::clock;

use super::ledger::Ledger;
use super::state::Rotation;
use crate::args::Format;
use crate::failure::Failure;
use crate::output;

/// `root` and, while a rotation is under way, the `next` one. JSON is stable from version 1 on.
pub fn show(
    rotation: Option<&Rotation>,
    (root, next): (&RootAuthority, Option<&RootAuthority>),
    ledger: &Ledger,
    format: Format,
) -> Result<(), Failure> {
    let mut roots = vec![(if next.is_some() { "old" } else { "current" }, root.certificate())];
    roots.extend(next.map(|next| ("new", next.certificate())));
    let clusters = ledger.document(&roots, clock::since_unix_epoch());
    let document = json!({
        "version": 1,
        "step": rotation.map(|rotation| rotation.step),
        "startedAt": rotation.map(|rotation| &rotation.started_at),
        "root": root.fingerprint(),
        "newRoot": next.map(RootAuthority::fingerprint),
        "sequence": ledger.sequence,
        "clusters": clusters,
    });
    match format {
        Format::Json => output::json(&document),
        Format::Yaml => output::yaml(&document),
        Format::Name => ledger.clusters().try_for_each(output::line),
        Format::Table | Format::Wide => table(rotation, &document),
    }
}

fn table(rotation: Option<&Rotation>, document: &Value) -> Result<(), Failure> {
    match rotation {
        Some(r) => output::line(format_args!("step {} of 3: all {}\n", r.step.number(), r.step.outcome()))?,
        None => output::line("no rotation is under way\n")?,
    }
    let mut table =
        output::table(&["cluster", "sequence", "members", "trust it", "show it", "root", "waiting for"]);
    let clusters = document["clusters"].as_array().map(Vec::as_slice).unwrap_or_default();
    for cluster in clusters {
        let text = |field: &str| match &cluster[field] {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            value => value.to_string(),
        };
        let pending = match cluster["pending"].as_array() {
            Some(pending) => pending.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            None => "to be heard of".to_owned(),
        };
        let fields = ["cluster", "sequence", "members", "holding", "showing", "root"].map(text);
        table.add_row(fields.into_iter().chain([pending]));
    }
    output::line(output::table_text(&table))
}
