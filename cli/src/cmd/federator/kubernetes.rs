//! Which Kubernetes the federator works with.

use std::path::PathBuf;

use tombolo_federator::kubernetes::KubernetesConfig;
use tombolo_federator::token_review::access::{IN_CLUSTER_DIR, KubernetesAccess};
use tombolo_model::names::Namespace;
use tombolo_runtime::settings;

use crate::failure::Failure;

/// Where the Kubernetes API server is: `in-cluster`, or a kubeconfig.
pub fn api_server(place: &str) -> Result<KubernetesAccess, Failure> {
    if place != "in-cluster" {
        return Ok(KubernetesAccess::Kubeconfig(PathBuf::from(place)));
    }
    // As Kubernetes sets them in every pod.
    let host = settings::environment("KUBERNETES_SERVICE_HOST");
    let port = settings::environment("KUBERNETES_SERVICE_PORT");
    let (Some(host), Some(port)) = (host, port) else {
        return Err(Failure::usage("--kubernetes in-cluster: KUBERNETES_SERVICE_HOST and _PORT are not set")
            .remedy("this is no pod: give a kubeconfig"));
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let dir = PathBuf::from(IN_CLUSTER_DIR);
    Ok(KubernetesAccess::InCluster { server: format!("https://{host}:{port}"), dir })
}

/// The Kubernetes that more is done with than reviewing tokens.
pub fn driven(
    access: Option<&KubernetesAccess>,
    injects: bool,
    namespace: Option<String>,
    shared: Option<String>,
) -> Result<KubernetesConfig, Failure> {
    let Some(access) = access.cloned() else {
        let flag = if injects { "--kubernetes-inject" } else { "--kubernetes-services" };
        return Err(Failure::usage(format_args!("{flag}: there is no --kubernetes"))
            .remedy("give --kubernetes in-cluster, or --kubernetes with a kubeconfig"));
    };
    // Kubernetes writes it beside the token.
    let own = |access: &KubernetesAccess| match access {
        KubernetesAccess::InCluster { dir, .. } => std::fs::read_to_string(dir.join("namespace")).ok(),
        KubernetesAccess::Kubeconfig(_) => None,
    };
    let namespace = namespace.or_else(|| own(&access)).unwrap_or_else(|| "tombolo-system".to_owned());
    let parsed: Result<Namespace, _> = namespace.trim().parse();
    let namespace =
        parsed.map_err(|error| Failure::usage(format_args!("--kubernetes-namespace: {error}")))?.to_string();
    let shared = shared.map(|text| {
        text.parse().map_err(|error| Failure::usage(format_args!("--kubernetes-shared {text:?}: {error}")))
    });
    Ok(KubernetesConfig { access, namespace, shared: shared.transpose()? })
}

/// Derived Services lead to shared sidecars, and are there only where services are imported.
pub fn shared_needs_services(shared: Option<&str>, services: bool) -> Result<(), Failure> {
    match shared.filter(|_| !services) {
        Some(shared) => {
            let failure = format_args!("--kubernetes-shared {shared}: there is no --kubernetes-services");
            Err(Failure::usage(failure).remedy("give it too: only then there are derived Services"))
        }
        None => Ok(()),
    }
}
