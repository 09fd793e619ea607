//! The API server, as every part of the federator is told of it ([`KubernetesAccess`]): a client of it, and which
//! version of the MCS kinds it serves.

use std::time::Duration;

use http::Uri;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, Config};

use super::tables::Kind;
use crate::token_review::access::{AccessError, KubernetesAccess};

const MCS_GROUP: &str = "multicluster.x-k8s.io";
/// Best first.
const MCS_VERSIONS: [&str; 2] = ["v1beta1", "v1alpha1"];
/// An API server that does not answer a short question by then is away.
pub const LONGEST: Duration = Duration::from_secs(15);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("{0}")]
    Config(String),
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("no answer within {} s", LONGEST.as_secs())]
    Late,
    #[error(
        "the API server serves no {MCS_GROUP}/v1beta1 or v1alpha1: install the CRDs with `tombolo kube crds | kubectl apply -f -`"
    )]
    NoCrds,
}

/// A client with the credentials as they are now; tokens in files are read again by it.
pub async fn connect(access: &KubernetesAccess) -> Result<Client, ConnectError> {
    // What is refused there is refused here: plugins, passwords, unverified servers.
    access.read()?;
    let wrong = |error: &dyn std::fmt::Display| ConnectError::Config(error.to_string());
    let config = match access {
        KubernetesAccess::InCluster { server, dir } => {
            let server: Uri = server.parse().map_err(|e| wrong(&e))?;
            let mut config = Config::new(server);
            config.root_cert_file = Some(dir.join("ca.crt"));
            config.auth_info.token_file = Some(dir.join("token").display().to_string());
            config
        }
        KubernetesAccess::Kubeconfig(path) => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(|e| wrong(&e))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|e| wrong(&e))?
        }
    };
    Ok(Client::try_from(config)?)
}

/// The groups of kinds that the API server serves.
pub async fn served_groups(client: &Client) -> Result<Vec<APIGroup>, ConnectError> {
    let groups = tokio::time::timeout(LONGEST, client.list_api_groups());
    Ok(groups.await.map_err(|_| ConnectError::Late)??.groups)
}

/// How the kinds are called at this API server.
#[derive(Clone, Debug)]
pub struct Resources {
    /// Of the MCS kinds.
    pub api_version: String,
}

impl Resources {
    /// Asks which version of the MCS kinds is served.
    pub async fn discover(client: &Client) -> Result<Self, ConnectError> {
        let served = served_groups(client).await?.into_iter().find(|group| group.name == MCS_GROUP);
        let versions = served.map(|group| group.versions).unwrap_or_default();
        let best = MCS_VERSIONS.into_iter().find(|known| versions.iter().any(|v| v.version == *known));
        let version = best.ok_or(ConnectError::NoCrds)?;
        Ok(Self { api_version: format!("{MCS_GROUP}/{version}") })
    }

    pub fn resource(&self, kind: Kind) -> ApiResource {
        let mcs = self.api_version.rsplit('/').next().unwrap_or_default();
        let (group, version, plural) = match kind {
            Kind::Namespace => ("", "v1", "namespaces"),
            Kind::Service => ("", "v1", "services"),
            Kind::EndpointSlice => ("discovery.k8s.io", "v1", "endpointslices"),
            Kind::ServiceExport => (MCS_GROUP, mcs, "serviceexports"),
            Kind::ServiceImport => (MCS_GROUP, mcs, "serviceimports"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind.as_str()), plural)
    }

    /// Every namespace's objects of a kind.
    pub fn all(&self, client: &Client, kind: Kind) -> Api<DynamicObject> {
        Api::all_with(client.clone(), &self.resource(kind))
    }

    pub fn within(&self, client: &Client, kind: Kind, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(client.clone(), namespace, &self.resource(kind))
    }
}
