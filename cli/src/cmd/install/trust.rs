//! What a federator of Kubernetes is trusted by: the Secret with the files of `tombolo trust cluster`, from a directory of
//! this machine. A cluster that has none yet is signed where the root's directory is at hand.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Map, Value, json};
use tombolo_identity::authority::{ClusterMaterial, Existing};
use tombolo_identity::files;
use tombolo_model::names::ClusterName;
use tombolo_runtime::dirs::Dirs;

use crate::cmd::trust;
use crate::cmd::trust::keys::KeyArgs;
use crate::failure::{Failure, chain};
use crate::output::objects::text;

use super::objects::{Cluster, Kind};

/// A chain of certificates has a few KB.
const MAX_FILE: u64 = 256 * 1024;
/// Of the files in the directory; others are somebody else's.
const FILES: [&str; 6] =
    ["ca.key", "ca.crt", "bundle.json", "cluster.json", "upstream.crt", "upstream-roots.crt"];

/// Where the cluster's keys come from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Trust")]
pub struct TrustOptions {
    /// What `tombolo trust cluster` wrote for this cluster [default: clusters/<cluster> below the root's directory]
    #[arg(long, value_name = "DIR")]
    trust_dir: Option<PathBuf>,
    /// Directory of the root, which signs a cluster that it does not know [default: <state directory>/trust]
    #[arg(long, env = "TOMBOLO_TRUST_ROOT", value_name = "DIR")]
    trust_root: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
}

/// What is known of the cluster.
#[derive(Debug, PartialEq, Eq)]
pub struct Known {
    pub cluster: String,
    pub trust_domain: String,
    /// The Secret to make; `None`: it is there already.
    pub secret: Option<Value>,
}

impl TrustOptions {
    fn root(&self) -> Result<PathBuf, Failure> {
        match &self.trust_root {
            Some(root) => Ok(root.clone()),
            None => Ok(Dirs::from_environment().map_err(Failure::new)?.trust()),
        }
    }

    fn dir(&self, cluster: &ClusterName) -> Result<PathBuf, Failure> {
        match &self.trust_dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(trust::cluster_dir(&self.root()?, cluster.as_str())),
        }
    }

    /// What the directory says, without signing anything.
    pub fn look(&self, cluster: &ClusterName) -> Result<Option<String>, Failure> {
        let dir = self.dir(cluster)?;
        if !dir.join("cluster.json").exists() {
            return Ok(None);
        }
        Ok(Some(load(&dir, cluster)?.trust_domain.to_string()))
    }

    /// The trust of this cluster: as its Secret has it, else from the directory, else signed now.
    pub fn provide(
        &self,
        cluster: &ClusterName,
        secret: (&str, &str),
        found: Option<&Value>,
    ) -> Result<Known, Failure> {
        let (namespace, name) = secret;
        if let Some(found) = found {
            return of_secret(found, cluster, name);
        }
        let dir = self.dir(cluster)?;
        if !dir.join("cluster.json").exists() {
            let root = self.root()?;
            if self.trust_dir.is_some() || !root.join("root.crt").exists() {
                return Err(Failure::new(format_args!("{} holds no keys of cluster {cluster}", dir.display()))
                    .remedy(format_args!(
                    "make them where the root is: `tombolo trust cluster {cluster}`, after `tombolo trust init --trust-domain acme.example` for a first one; or name their directory with --trust-dir"
                )));
            }
            trust::cluster(cluster.as_str(), None, Existing::Refuse, &root, &self.key)?;
        }
        let material = load(&dir, cluster)?;
        let mut data = Map::new();
        for file in FILES {
            let path = dir.join(file);
            if path.exists() {
                let bytes = zeroize::Zeroizing::new(
                    files::read(&path, MAX_FILE).map_err(|e| Failure::new(chain(&e)))?,
                );
                data.insert(file.to_owned(), STANDARD.encode(&*bytes).into());
            }
        }
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": { "name": name, "namespace": namespace }, "data": data,
        });
        let trust_domain = material.trust_domain.to_string();
        Ok(Known { cluster: cluster.to_string(), trust_domain, secret: Some(secret) })
    }
}

fn load(dir: &Path, cluster: &ClusterName) -> Result<ClusterMaterial, Failure> {
    let material = ClusterMaterial::load(dir).map_err(|e| Failure::new(chain(&e)))?;
    if material.cluster != *cluster {
        return Err(Failure::usage(format_args!(
            "{} holds the keys of cluster {}, not of {cluster}",
            dir.display(),
            material.cluster
        ))
        .remedy("give --cluster or --trust-dir accordingly"));
    }
    Ok(material)
}

/// One that is there is left as it is: it may be newer than what lies here.
fn of_secret(found: &Value, cluster: &ClusterName, name: &str) -> Result<Known, Failure> {
    let unread = || {
        Failure::new(format_args!("Secret {name} is there, and holds no cluster.json that can be read"))
            .remedy("delete it, or name another one with --set trust.secret=NAME")
    };
    let bytes = STANDARD.decode(text(found, "/data/cluster.json")).map_err(|_| unread())?;
    let file: Value = serde_json::from_slice(&bytes).map_err(|_| unread())?;
    let field = |names: [&str; 2]| {
        names.iter().find_map(|name| file.get(*name)?.as_str().map(str::to_owned)).ok_or_else(unread)
    };
    let (held, trust_domain) = (field(["name", "cluster"])?, field(["trust_domain", "trustDomain"])?);
    if held != cluster.as_str() {
        return Err(Failure::usage(format_args!(
            "Secret {name} holds the keys of cluster {held}, not of {cluster}"
        ))
        .remedy(format_args!("give --cluster {held}")));
    }
    Ok(Known { cluster: held, trust_domain, secret: None })
}

/// The Secret that is there.
pub async fn secret(cluster: &Cluster, namespace: &str, name: &str) -> Result<Option<Value>, Failure> {
    cluster.find(&Kind::new("v1", "Secret", namespace), name).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_is_there_says_whose_it_is() {
        let secret = |text: &str| json!({ "data": { "cluster.json": STANDARD.encode(text) } });
        let east: ClusterName = "east".parse().unwrap();
        let good = secret(r#"{"name":"east","tag":7,"trust_domain":"acme.example"}"#);
        let known = of_secret(&good, &east, "tombolo-trust").unwrap();
        assert_eq!((known.trust_domain.as_str(), known.secret), ("acme.example", None));
        let west: ClusterName = "west".parse().unwrap();
        let other = of_secret(&good, &west, "tombolo-trust").unwrap_err().to_string();
        assert!(
            other.contains("holds the keys of cluster east") && other.contains("--cluster east"),
            "{other}"
        );
        for bad in [secret("{"), secret("{}"), json!({})] {
            let unread = of_secret(&bad, &east, "tombolo-trust").unwrap_err().to_string();
            assert!(unread.contains("Secret tombolo-trust"), "{unread}");
        }
    }
}
