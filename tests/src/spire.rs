//! A SPIRE server and agent (built by `tests/setup.sh`), as a foreign trust domain that is really somebody else's.
//!
//! Both run in a cluster's namespace, in memory but for the server's sqlite file, and end with the [`Mesh`] that they are
//! started in. Other than by their sockets and ports nothing here knows them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::capability::{skipped, tool_dir};
use crate::mesh::Mesh;
use crate::process::ProcessSpec;

/// As `setup.sh` builds it; the last number counts changes of what is built with it.
const VERSION: &str = "1.13.3-1";
const READY: Duration = Duration::from_secs(30);

/// The two programs.
#[derive(Clone, Debug)]
pub struct Binaries(PathBuf);

/// `None` after listing `test` as skipped where they have not been built.
pub fn require_spire(test: &str) -> Option<Binaries> {
    let dir = tool_dir(&format!("spire-{VERSION}"));
    if ["spire-server", "spire-agent", "spire-downstream"].iter().all(|program| dir.join(program).is_file()) {
        return Some(Binaries(dir));
    }
    skipped(test, &format!("SPIRE {VERSION} is not built (tests/setup.sh builds it where Go is new enough)"));
    None
}

/// A server in a cluster's namespace.
pub struct Spire {
    bin: Binaries,
    dir: PathBuf,
    cluster: String,
    trust_domain: String,
}

/// Where a server listens.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub cluster: &'a str,
    pub host: u8,
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Spire {
    /// Starts a server of `trust_domain`, which serves its bundle by `https_spiffe` on port 8443.
    pub fn start(bin: Binaries, mesh: &mut Mesh, place: Place<'_>, trust_domain: &str) -> Result<Self> {
        let dir = mesh.path("spire");
        std::fs::create_dir_all(dir.join("agent"))?;
        let cluster = mesh.cluster(place.cluster)?;
        let [api, bundle] = [8081, 8443].map(|port| cluster.address(place.host, port));
        let (socket, data) = (text(&dir.join("server.sock")), text(&dir));
        let config = format!(
            r#"server {{
    bind_address = "{address}"
    bind_port = "{port}"
    socket_path = "{socket}"
    trust_domain = "{trust_domain}"
    data_dir = "{data}"
    log_level = "INFO"
    federation {{
        bundle_endpoint {{
            address = "{address}"
            port = {bundle_port}
            refresh_hint = "5s"
            profile "https_spiffe" {{}}
        }}
    }}
}}
plugins {{
    DataStore "sql" {{ plugin_data {{ database_type = "sqlite3" connection_string = "{data}/server.sqlite3" }} }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "disk" {{ plugin_data {{ keys_path = "{data}/keys.json" }} }}
}}
"#,
            address = api.ip(),
            port = api.port(),
            bundle_port = bundle.port(),
        );
        let file = dir.join("server.conf");
        std::fs::write(&file, config)?;
        let spec = ProcessSpec::new("spire-server", bin.0.join("spire-server"))
            .args(["run", "-config", &text(&file)])
            .within(&cluster.namespace);
        mesh.spawn("spire-server", spec)?;
        let spire =
            Self { bin, dir, cluster: place.cluster.to_owned(), trust_domain: trust_domain.to_owned() };
        spire.ready(mesh)?;
        Ok(spire)
    }

    /// Waits until the server answers.
    pub fn ready(&self, mesh: &Mesh) -> Result<()> {
        mesh.eventually("SPIRE's server answers", READY, |mesh| {
            ensure!(!mesh.process("spire-server")?.has_exited(), "{}", mesh.process("spire-server")?.tail());
            self.operate(mesh, &["healthcheck"]).map(drop)
        })?;
        Ok(())
    }

    /// Runs `spire-server` with these arguments against the server; its standard output.
    pub fn operate(&self, mesh: &Mesh, args: &[&str]) -> Result<String> {
        let mut command = Command::new(self.bin.0.join("spire-server"));
        command.args(args).args(["-socketPath", &text(&self.dir.join("server.sock"))]);
        let output = mesh.cluster(&self.cluster)?.namespace.run(|| command.output())??;
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "spire-server {}: {said}{errors}", args.join(" "));
        Ok(said.into_owned())
    }

    /// Its bundle, as its endpoint serves it.
    pub fn bundle(&self, mesh: &Mesh) -> Result<Value> {
        let shown = self.operate(mesh, &["bundle", "show", "-format", "spiffe"])?;
        serde_json::from_str(&shown).with_context(|| format!("not JSON: {shown}"))
    }

    /// Starts an agent, which gives every process of root's the identity `/NAME`; its Workload API. `more`: of the entry, such
    /// as `-federatesWith`.
    pub fn agent(&self, mesh: &mut Mesh, server: SocketAddr, name: &str, more: &[&str]) -> Result<String> {
        let node = format!("spiffe://{}/node", self.trust_domain);
        let token = self.operate(mesh, &["token", "generate", "-spiffeID", &node, "-output", "json"])?;
        let token: Value = serde_json::from_str(&token)?;
        let token = token["value"].as_str().context("no token")?.to_owned();
        let id = format!("spiffe://{}/{name}", self.trust_domain);
        let entry = ["entry", "create", "-parentID", &node, "-spiffeID", &id, "-selector", "unix:uid:0"];
        self.operate(mesh, &[&entry[..], more].concat())?;
        let roots = self.dir.join("roots.pem");
        std::fs::write(&roots, self.operate(mesh, &["bundle", "show", "-format", "pem"])?)?;
        let socket = self.dir.join("agent/api.sock");
        let config = format!(
            r#"agent {{
    data_dir = "{data}"
    log_level = "INFO"
    server_address = "{address}"
    server_port = "{port}"
    socket_path = "{socket}"
    trust_bundle_path = "{roots}"
    trust_domain = "{domain}"
    join_token = "{token}"
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"#,
            data = text(&self.dir.join("agent")),
            address = server.ip(),
            port = server.port(),
            socket = text(&socket),
            roots = text(&roots),
            domain = self.trust_domain,
        );
        let file = self.dir.join("agent.conf");
        std::fs::write(&file, config)?;
        let spec = ProcessSpec::new("spire-agent", self.bin.0.join("spire-agent"))
            .args(["run", "-config", &text(&file)])
            .within(&mesh.cluster(&self.cluster)?.namespace);
        mesh.spawn("spire-agent", spec)?;
        Ok(format!("unix://{}", text(&socket)))
    }

    /// Has the server sign a request as a downstream CA, for the entry `/NAME`; writes the chain and the roots.
    pub fn sign_downstream(
        &self,
        mesh: &Mesh,
        (socket, server): (&str, SocketAddr),
        name: &str,
        csr: &Path,
    ) -> Result<(PathBuf, PathBuf)> {
        let (chain, roots) = (self.dir.join("downstream.pem"), self.dir.join("downstream-roots.pem"));
        let id = format!("spiffe://{}/{name}", self.trust_domain);
        let (server, csr) = (server.to_string(), text(csr));
        let mut command = Command::new(self.bin.0.join("spire-downstream"));
        command.args(["-socket", socket, "-server", &server, "-id", &id, "-csr", &csr]);
        command.args(["-chain", &text(&chain), "-roots", &text(&roots)]);
        let output = mesh.cluster(&self.cluster)?.namespace.run(|| command.output())??;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "spire-downstream: {errors}");
        Ok((chain, roots))
    }
}
