//! How long an export takes to be an import that can be used.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Api, Object};

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
/// On a machine that others use, too.
const SOON: Duration = Duration::from_secs(20);

/// Makes a Service with this `spec` at `from`, exports it, and waits for its import with an address at `to`: from the
/// export on.
pub fn exported(from: &Api, to: &Api, namespace: &str, name: &str, spec: &Value) -> Result<Duration> {
    let metadata = json!({ "name": name, "namespace": namespace });
    from.create(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }))?;
    let start = Instant::now();
    from.create(&json!({ "apiVersion": MCS, "kind": "ServiceExport", "metadata": metadata }))?;
    to.until(&Object::new(MCS, "ServiceImport", namespace, name), SOON, |found| {
        let found = found.context("no import")?;
        ensure!(found["spec"].get("ips").is_some(), "{found}");
        Ok(start.elapsed())
    })
}
