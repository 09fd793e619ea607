//! `JoinPolicy`: `Accepted`, and how many of those that have joined it selects.

use serde_json::{Value, json};
use tombolo_model::resource::{Condition, JoinPolicySpec};

use super::super::View;
use super::condition;
use crate::joining;

pub fn of(view: &View<'_>, spec: &JoinPolicySpec) -> (Vec<Condition>, Value) {
    let selected = joining::selected(view.facts, spec);
    let text = format!("selects {}; {selected} of those that have joined", spec.selection());
    (vec![condition("Accepted", true, "Accepted", text)], json!({ "selected": selected }))
}
