//! `tombolo install` and `tombolo upgrade`: the Helm chart's objects in a Kubernetes cluster, by server-side apply.
//!
//! Helm is not needed, and what helm has installed is left to helm. The values that were given are kept in a ConfigMap, which
//! an upgrade begins with and which says that an install came to its end: one that was interrupted is run again.

pub mod objects;
mod progress;
pub mod trust;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tombolo_federator::kubernetes::crds;
use tombolo_model::names::{ClusterName, Namespace};

use super::confirm::{self, Consent};
use crate::args::{Connect, duration};
use crate::failure::{Exit, Failure};
use crate::output::objects::text;
use crate::{chart, kube_client, output};
use objects::{Cluster, Kind};
use trust::{Known, TrustOptions};
use work::{Work, check_storage, refuse_others};

/// The values that were given, and that an install was done.
pub const RECORD: &str = "tombolo-install";
/// A values file is written by people.
const MAX_VALUES: u64 = 1024 * 1024;

/// Install into a Kubernetes cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Makes the namespace, the Secret with the cluster's keys (signed now where the root's directory is on this machine), the
definitions, a federator and gateways, and waits until they are ready. The objects and values are those of the Helm chart.

Examples:
  tombolo trust init --trust-domain acme.example              once, for all clusters
  tombolo install --kube-context east
  tombolo install --kube-context east --preset aws --set gateway.replicas=3
  tombolo install --kube-context kind-east --cluster east --preset node-port --set federator.persistence.enabled=false
  tombolo install --cluster east --dry-run > manifests.yaml")]
pub struct InstallArgs {
    /// Name of the cluster [default: the context's]
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    trust: TrustOptions,
}

/// Bring an installation up to this version, or to other values
#[derive(Debug, Args)]
#[command(after_help = "\
Values given before are kept. Gateways are replaced one after the other, each when the one before is ready; the federator's
store, and so links and identities, stay. Everything goes on with what it knows while the federator is replaced.

Examples:
  tombolo upgrade --kube-context east
  tombolo upgrade --kube-context east --set gateway.replicas=3
  tombolo upgrade --kube-context east --dry-run | kubectl --context east diff -f -")]
pub struct UpgradeArgs {
    /// Begin with the chart's values instead of those given before
    #[arg(long)]
    reset_values: bool,
    /// Go on although a later version is installed
    #[arg(long)]
    allow_downgrade: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Args)]
struct Settings {
    /// Values for a kind of balancer: aws, azure, gcp, metallb, host-network, node-port
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// File with values of the chart; may be repeated, later ones win
    #[arg(short = 'f', long = "values", value_name = "FILE")]
    values: Vec<PathBuf>,
    /// One value of the chart; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The image [default: tombolo of this program's version]
    #[arg(long, env = "TOMBOLO_IMAGE", value_name = "REPOSITORY[:TAG]")]
    image: Option<String>,
    /// Print the manifests, and change nothing. The Secret is left out
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until it is ready
    #[arg(long)]
    no_wait: bool,
    /// How long to wait until it is ready
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    ready_within: Duration,
}

impl Settings {
    /// `None`: it is not waited for.
    fn patience(&self) -> Option<Duration> {
        (!self.no_wait).then_some(self.ready_within)
    }

    /// What is given, laid over one another.
    fn given(&self, before: Value) -> Result<Value, Failure> {
        let mut given = before;
        if let Some(preset) = &self.preset {
            chart::values::merge(&mut given, chart::preset(preset)?);
        }
        for path in &self.values {
            let bytes = tombolo_identity::files::read(path, MAX_VALUES)
                .map_err(|e| Failure::usage(crate::failure::chain(&e)))?;
            let text = String::from_utf8(bytes).map_err(|_| Failure::usage("not text").at(path.display()))?;
            let values = chart::document(&text).map_err(|failure| failure.at(path.display()))?;
            match values {
                Value::Null => {}
                values @ Value::Object(_) => chart::values::merge(&mut given, values),
                _ => return Err(Failure::usage("is no map of values").at(path.display())),
            }
        }
        if let Some(image) = &self.image {
            let colon = image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'));
            let (repository, tag) = colon.unwrap_or((image, ""));
            chart::values::merge(&mut given, json!({ "image": { "repository": repository, "tag": tag } }));
        }
        for setting in &self.set {
            chart::values::merge(&mut given, chart::values::setting(setting)?);
        }
        Ok(given)
    }
}

fn namespace(connect: &Connect) -> Result<String, Failure> {
    let parsed: Result<Namespace, _> = connect.kube_namespace.parse();
    Ok(parsed.map_err(|e| Failure::usage(format_args!("--kube-namespace: {e}")))?.to_string())
}

/// The cluster to change. Which one is said, never guessed.
pub async fn target(connect: &Connect) -> Result<Cluster, Failure> {
    if !kube_client::wanted(connect) {
        return Err(Failure::usage("which cluster is not said")
            .remedy("give --kube-context NAME, or --kubeconfig FILE for its current context"));
    }
    Ok(Cluster { client: kube_client::connect(connect).await? })
}

pub fn install(args: InstallArgs, connect: Connect) -> Result<Exit, Failure> {
    let InstallArgs { cluster, settings, trust } = args;
    let namespace = namespace(&connect)?;
    let given = settings.given(json!({}))?;
    let name = cluster.or_else(|| Some(text(&given, "/cluster").to_owned()).filter(|name| !name.is_empty()));
    let name = name.or_else(|| connect.kube_context.clone()).ok_or_else(|| {
        Failure::usage("the cluster's name is not known").remedy("give it with --cluster east")
    })?;
    let cluster: ClusterName = name.parse().map_err(|e| {
        Failure::usage(format_args!("{e}")).at("--cluster").remedy("give a name with --cluster east")
    })?;
    let secret = match text(&given, "/trust/secret") {
        "" => "tombolo-trust".to_owned(),
        name => name.to_owned(),
    };
    if settings.dry_run {
        let mut values = given;
        let known = trust.look(&cluster)?;
        chart::values::merge(&mut values, json!({ "cluster": cluster.to_string() }));
        if let Some(trust_domain) = known {
            chart::values::merge(&mut values, json!({ "trustDomain": trust_domain }));
        }
        return print(&render(values, &namespace)?.1, &namespace);
    }
    // Signing may ask for a passphrase, so it stands between the two halves, which talk to the API server.
    let found = super::operate_for(async {
        let target = target(&connect).await?;
        refuse_others(&target, &namespace).await?;
        if target.find(&Kind::new("v1", "ConfigMap", &namespace), RECORD).await?.is_some() {
            return Err(Failure::new(format_args!("{namespace} has an installation already"))
                .remedy("change it with `tombolo upgrade`, or remove it with `tombolo uninstall`"));
        }
        trust::secret(&target, &namespace, &secret).await
    })?;
    let known = trust.provide(&cluster, (&namespace, &secret), found.as_ref())?;
    super::operate(async {
        let target = target(&connect).await?;
        let Known { cluster, trust_domain, secret } = known;
        let mut given = given;
        chart::values::merge(&mut given, json!({ "cluster": cluster, "trustDomain": trust_domain }));
        let (values, objects) = render(given.clone(), &namespace)?;
        check_storage(&target, &values).await?;
        let work = Work { target, namespace, given, values, objects };
        work.apply(secret).await?;
        work.finish(settings.patience()).await?;
        next_steps(&connect);
        Ok(Exit::Done)
    })
}

pub async fn upgrade(args: UpgradeArgs, connect: Connect) -> Result<Exit, Failure> {
    let UpgradeArgs { reset_values, allow_downgrade, settings } = args;
    let namespace = namespace(&connect)?;
    let target = target(&connect).await?;
    refuse_others(&target, &namespace).await?;
    let record = target.find(&Kind::new("v1", "ConfigMap", &namespace), RECORD).await?;
    let record = record.ok_or_else(|| {
        Failure::new(format_args!("nothing is installed in namespace {namespace}"))
            .remedy("install with `tombolo install`, or name the namespace with --kube-namespace")
    })?;
    let installed = text(&record, "/data/version");
    let this = env!("CARGO_PKG_VERSION");
    if numbers(installed) > numbers(this) && !allow_downgrade {
        return Err(Failure::new(format_args!("version {installed} is installed, and this is {this}"))
            .remedy("use the `tombolo` of that version, or add --allow-downgrade"));
    }
    let before: Value =
        serde_json::from_str(text(&record, "/data/values.json")).unwrap_or_else(|_| json!({}));
    let kept = if reset_values {
        json!({ "cluster": before["cluster"], "trustDomain": before["trustDomain"] })
    } else {
        before
    };
    let given = settings.given(kept)?;
    let (values, objects) = render(given.clone(), &namespace)?;
    if settings.dry_run {
        return print(&objects, &namespace);
    }
    let work = Work { target, namespace, given, values, objects };
    work.apply(None).await?;
    work.finish(settings.patience()).await?;
    output::line(format_args!("upgraded from {installed} to {this}"))?;
    Ok(Exit::Done)
}

/// `1.2.3-rc.1`: `[1, 2, 3]`.
fn numbers(version: &str) -> Vec<u64> {
    let release = version.split(['-', '+']).next().unwrap_or_default();
    release.split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

/// The whole values, and every object with the labels by which it is found.
fn render(given: Value, namespace: &str) -> Result<(Value, Vec<Value>), Failure> {
    let values = chart::values(vec![given])?;
    let mut objects = chart::render(&values, namespace)?;
    objects.iter_mut().for_each(objects::label);
    objects.sort_by_key(objects::rank);
    Ok((values, objects))
}

fn print(objects: &[Value], namespace: &str) -> Result<Exit, Failure> {
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
    for document in std::iter::once(&namespace).chain(&crds::all()).chain(objects) {
        output::line(format_args!("---\n{}", output::yaml_text(document)?.trim_end()))?;
    }
    Ok(Exit::Done)
}

fn next_steps(connect: &Connect) {
    let this = match (&connect.kube_context, &connect.kubeconfig) {
        (Some(context), _) => format!("--kube-context {context}"),
        (None, Some(file)) => format!("--kubeconfig {}", file.display()),
        (None, None) => String::new(),
    };
    eprintln!(
        "installed. Next:
  tombolo {this} status
  tombolo {this} link token OTHER | tombolo --kube-context OTHER link join -      tie it to another cluster"
    );
}

/// For [`super::uninstall`].
pub fn agreed(question: &str, consent: Consent) -> Result<(), Failure> {
    if confirm::ask(question, consent)? { Ok(()) } else { Err(Failure::new("nothing was changed")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        for (installed, this, later) in [
            ("0.2.0", "0.1.0", true),
            ("0.10.0", "0.9.0", true),
            ("0.1.0", "0.1.0", false),
            ("", "0.1.0", false),
        ] {
            assert_eq!(numbers(installed) > numbers(this), later, "{installed} {this}");
        }
    }
}
