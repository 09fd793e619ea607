//! A federator that has slept for longer than the API server remembers: its watches can't go on where they were (410), and it
//! reads everything anew.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tombolo_tests::kube::Object;

use super::World;
use crate::case::MCS;

impl World {
    pub fn watches_that_are_stale(&mut self) -> Result<()> {
        let case = self.case("stale")?;
        case.service(case.east, json!({}))?;
        case.export(case.east, json!({}))?;
        case.usable(case.west)?;
        let errors = |world: &Self| -> Result<f64> {
            let metrics = world.mesh.metrics("east", 1)?;
            Ok(tombolo_tests::scenario::metric(
                &metrics,
                "tombolo_federator_kubernetes_watch_errors_total",
                &[],
            ))
        };
        let before = errors(self)?;
        self.mesh.process("east/federator")?.signal(Signal::SIGSTOP)?;
        self.restart_api_server()?;
        // It hears of none of these: not of the change, nor of what is deleted.
        let case = self.case_in("stale");
        case.service(case.east, json!({ "ports": [{ "name": "late", "port": 7 }] }))?;
        self.forget_history()?;
        self.restart_api_server()?;
        self.mesh.process("east/federator")?.signal(Signal::SIGCONT)?;
        let case = self.case_in("stale");
        let import = Object::new(MCS, "ServiceImport", "stale", "hello");
        case.west.api.until(&import, Duration::from_secs(60), |found| {
            let found = found.context("the import is gone")?;
            ensure!(found["spec"]["ports"][0]["name"] == "late", "{found}");
            Ok(())
        })?;
        ensure!(errors(self)? > before, "no watch has failed");
        Ok(())
    }

    fn restart_api_server(&mut self) -> Result<()> {
        self.mesh.process_mut("east/apiserver")?.kill()?;
        self.mesh.restart("east/apiserver")?;
        self.east.ready(&self.mesh).map(drop)
    }

    /// etcd's own: nothing before now can be asked for any more.
    fn forget_history(&self) -> Result<()> {
        let cluster = self.mesh.cluster("east")?;
        let etcd = cluster.address(2, 2379);
        let ask = |call: &str, body: Value| -> Result<Value> {
            let url = format!("http://{etcd}/v3/kv/{call}");
            let output = cluster.namespace.run(|| {
                Command::new("curl").args(["-sS", "--max-time", "5", "-d", &body.to_string(), &url]).output()
            })??;
            serde_json::from_slice(&output.stdout).with_context(|| format!("{url}: {output:?}"))
        };
        // `/`, as base64.
        let now = ask("range", json!({ "key": "Lw==", "count_only": true }))?;
        let revision = now["header"]["revision"].clone();
        let done = ask("compaction", json!({ "revision": revision, "physical": true }))?;
        ensure!(done.get("header").is_some(), "{done}");
        Ok(())
    }
}
