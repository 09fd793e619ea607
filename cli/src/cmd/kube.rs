//! `tombolo kube`: what a Kubernetes cluster needs before a federator works with it.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;
use tombolo_federator::kubernetes::client::connect;
use tombolo_federator::kubernetes::crds;

use super::federator;
use crate::failure::{Exit, Failure};
use crate::output;

/// Prepare a Kubernetes cluster
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tombolo kube crds | kubectl apply --server-side -f -
  tombolo kube crds --install ~/.kube/config")]
pub struct KubeArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Crds(CrdsArgs),
}

/// Print the definitions of ServiceExport, ServiceImport and Tombolo's own kinds, or install them
#[derive(Debug, Args)]
#[command(after_help = "\
A definition of a later version that is there already is left as it is.

Examples:
  tombolo kube crds | kubectl apply --server-side -f -
  tombolo kube crds --install ~/.kube/config")]
struct CrdsArgs {
    /// Install them in the cluster of this kubeconfig, or in the pod's own
    #[arg(long, value_name = "KUBECONFIG|in-cluster")]
    install: Option<String>,
}

pub async fn run(args: KubeArgs, patience: Duration) -> Result<Exit, Failure> {
    let KubeArgs { verb: Verb::Crds(CrdsArgs { install }) } = args;
    let Some(place) = install else {
        for document in crds::all() {
            output::line(format!("---\n{}", yaml(&document)?))?;
        }
        return Ok(Exit::Done);
    };
    let client = connect(&federator::api_server(&place)?).await.map_err(Failure::new)?;
    let installed = tokio::time::timeout(patience, crds::install(client)).await;
    let installed = installed.map_err(|_| {
        Failure::new(format_args!("the API server has not answered within {} s", patience.as_secs()))
    })?;
    for (name, what) in installed.map_err(Failure::new)? {
        output::line(format!("customresourcedefinition/{name} {what}"))?;
    }
    Ok(Exit::Done)
}

fn yaml(document: &Value) -> Result<String, Failure> {
    serde_saphyr::to_string(document).map(|text| text.trim_end().to_owned()).map_err(Failure::new)
}
