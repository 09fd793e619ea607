//! Settings of what pods may join as, and of what they are told.

use tombolo_federator::kubernetes::{KubernetesConfig, PodsConfig};
use tombolo_federator::token_review::access::KubernetesAccess;
use tombolo_model::names::Namespace;

use crate::failure::Failure;

/// The federator's namespace.
pub fn own_namespace(access: &KubernetesAccess, namespace: Option<String>) -> Result<String, Failure> {
    // Kubernetes writes it beside the token.
    let own = |access: &KubernetesAccess| match access {
        KubernetesAccess::InCluster { dir, .. } => std::fs::read_to_string(dir.join("namespace")).ok(),
        KubernetesAccess::Kubeconfig(_) => None,
    };
    let namespace = namespace.or_else(|| own(access)).unwrap_or_else(|| "tombolo-system".to_owned());
    let parsed: Result<Namespace, _> = namespace.trim().parse();
    Ok(parsed.map_err(|error| Failure::usage(format_args!("--kubernetes-namespace: {error}")))?.to_string())
}

/// Which pods may be gateways, and where what joiners need to know is written.
pub fn config(
    access: Option<&KubernetesAccess>,
    gateways: Option<String>,
    publish: Option<String>,
    namespace: Option<&String>,
) -> Result<PodsConfig, Failure> {
    let without = |flag: &str| {
        Failure::usage(format_args!("{flag}: there is no --kubernetes"))
            .remedy("give --kubernetes in-cluster, or --kubernetes with a kubeconfig")
    };
    if gateways.is_some() && access.is_none() {
        return Err(without("--kubernetes-gateways"));
    }
    let wrong = |error| Failure::usage(format_args!("--kubernetes-gateways: {error}"));
    let gateways = gateways.map(|text| text.parse().map_err(wrong)).transpose()?;
    let publish = match (publish, access) {
        (None, _) => None,
        (Some(_), None) => return Err(without("--kubernetes-publish")),
        (Some(federator), Some(access)) => {
            let namespace = own_namespace(access, namespace.cloned())?;
            Some((
                KubernetesConfig {
                    access: access.clone(),
                    namespace,
                    services: false,
                    objects: false,
                    shared: None,
                },
                federator,
            ))
        }
    };
    Ok(PodsConfig { gateways, publish })
}
