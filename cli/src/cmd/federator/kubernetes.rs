//! Which Kubernetes the federator works with.

use std::path::PathBuf;

use tombolo_federator::kubernetes::KubernetesConfig;
use tombolo_federator::token_review::access::{IN_CLUSTER_DIR, KubernetesAccess};
use tombolo_runtime::settings;

use super::pods;
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

/// What is done with it beside reviewing tokens.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub services: bool,
    pub objects: bool,
    pub injects: bool,
}

/// The Kubernetes that any of this is done with.
pub fn driven(
    access: Option<&KubernetesAccess>,
    Work { services, objects, injects }: Work,
    namespace: Option<String>,
    shared: Option<String>,
) -> Result<Option<KubernetesConfig>, Failure> {
    if let Some(shared) = shared.as_ref().filter(|_| !services) {
        let failure = format_args!("--kubernetes-shared {shared}: there is no --kubernetes-services");
        return Err(Failure::usage(failure).remedy("give it too: only then there are derived Services"));
    }
    let flags = [
        ("--kubernetes-services", services),
        ("--kubernetes-objects", objects),
        ("--kubernetes-inject", injects),
    ];
    let Some((flag, _)) = flags.into_iter().find(|(_, given)| *given) else { return Ok(None) };
    let Some(access) = access.cloned() else {
        return Err(Failure::usage(format_args!("{flag}: there is no --kubernetes"))
            .remedy("give --kubernetes in-cluster, or --kubernetes with a kubeconfig"));
    };
    let shared = shared.map(|text| {
        text.parse().map_err(|error| Failure::usage(format_args!("--kubernetes-shared {text:?}: {error}")))
    });
    Ok(Some(KubernetesConfig {
        namespace: pods::own_namespace(&access, namespace)?,
        shared: shared.transpose()?,
        access,
        services,
        objects,
    }))
}
