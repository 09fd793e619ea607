//! `ServiceExport` (multicluster.x-k8s.io, KEP-1645), and to whom: the annotation `tombolo.dev/export-to`; of which
//! type: `tombolo.dev/service-type`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ObjectMeta;
use super::fields::FieldError;
use crate::names::{ClusterName, ServiceName};

/// Names the clusters that may import: comma-separated, or `*`; absent: every linked cluster, as MCS has it.
pub const EXPORT_TO: &str = "tombolo.dev/export-to";

/// `ClusterSetIP` or `Headless`: what names of the service resolve to. Outside Kubernetes no `Service` says so; absent:
/// `ClusterSetIP`.
pub const SERVICE_TYPE: &str = "tombolo.dev/service-type";

/// The type of a service that is exported (KEP-1645).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ServiceType {
    /// It has one virtual address.
    #[default]
    ClusterSetIp,
    /// It resolves to its endpoints.
    Headless,
}

impl ServiceType {
    /// Reads the annotation; the error is what can't be one.
    pub fn of(metadata: &ObjectMeta) -> Result<Self, String> {
        match metadata.annotations.get(SERVICE_TYPE).map(String::as_str) {
            None | Some("ClusterSetIP") => Ok(Self::ClusterSetIp),
            Some("Headless") => Ok(Self::Headless),
            Some(other) => Err(other.to_owned()),
        }
    }
    /// As `ServiceImport` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterSetIp => "ClusterSetIP",
            Self::Headless => "Headless",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceExportSpec {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exported_labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exported_annotations: BTreeMap<String, String>,
}

/// Which clusters an export is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExportTo {
    Everyone,
    Clusters(Vec<ClusterName>),
}

impl ExportTo {
    /// Reads the annotation; the error is the name that can't be one.
    pub fn of(metadata: &ObjectMeta) -> Result<Self, String> {
        match metadata.annotations.get(EXPORT_TO).map(String::as_str) {
            None | Some("*") => Ok(Self::Everyone),
            Some(list) => {
                let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
                names
                    .map(|name| name.parse().map_err(|_| name.to_owned()))
                    .collect::<Result<_, _>>()
                    .map(Self::Clusters)
            }
        }
    }
    pub fn includes(&self, cluster: &ClusterName) -> bool {
        match self {
            Self::Everyone => true,
            Self::Clusters(names) => names.contains(cluster),
        }
    }
}

impl ServiceExportSpec {
    pub(super) fn validate(&self, metadata: &ObjectMeta, errors: &mut Vec<FieldError>) {
        if let Err(error) = metadata.name.parse::<ServiceName>() {
            errors.push(FieldError::new("metadata.name", &metadata.name, error));
        }
        if let Err(name) = ExportTo::of(metadata) {
            let path = format!("metadata.annotations[{EXPORT_TO}]");
            errors.push(FieldError::new(path, name, "cluster names separated by commas, or *"));
        }
        if let Err(name) = ServiceType::of(metadata) {
            let path = format!("metadata.annotations[{SERVICE_TYPE}]");
            errors.push(FieldError::new(path, name, "ClusterSetIP or Headless"));
        }
    }
}
