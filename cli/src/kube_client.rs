//! The Kubernetes cluster that an operator's command is about, as the operator's kubeconfig has it: `--kube-context`,
//! `--kubeconfig`. Credential plugins of the kubeconfig are run, as kubectl does.

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::args::Connect;
use crate::failure::{self, Failure};

/// Whether the command is about a Kubernetes cluster at all.
pub fn wanted(connect: &Connect) -> bool {
    connect.kube_context.is_some() || connect.kubeconfig.is_some()
}

/// A client as the operator.
pub async fn connect(connect: &Connect) -> Result<Client, Failure> {
    let kubeconfig = match &connect.kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let kubeconfig = kubeconfig.map_err(|e| {
        Failure::usage(failure::chain(&e)).at("--kubeconfig").remedy("name the file with --kubeconfig FILE")
    })?;
    if let Some(context) = &connect.kube_context {
        let known: Vec<&str> = kubeconfig.contexts.iter().map(|context| context.name.as_str()).collect();
        if !known.contains(&context.as_str()) {
            return Err(Failure::usage(format_args!("--kube-context {context:?} is not in the kubeconfig"))
                .remedy(format_args!(
                    "known: {}",
                    if known.is_empty() { "none".to_owned() } else { known.join(", ") }
                )));
        }
    }
    let options = KubeConfigOptions { context: connect.kube_context.clone(), ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
    let mut config = config.map_err(|e| Failure::usage(failure::chain(&e)).at("--kubeconfig"))?;
    config.connect_timeout = Some(connect.timeout);
    Client::try_from(config).map_err(|e| Failure::new(failure::chain(&e)))
}

/// What the API server said, or that it did not answer.
pub fn failed(what: impl std::fmt::Display, error: &kube::Error) -> Failure {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            Failure::new(format_args!("{what}: {}", status.message))
                .remedy("use a context whose user may do that: installing needs a cluster administrator")
        }
        kube::Error::Api(status) => Failure::new(format_args!("{what}: {}", status.message)),
        error => {
            Failure::new(format_args!("{what}: the API server can't be reached: {}", failure::chain(error)))
        }
    }
}
