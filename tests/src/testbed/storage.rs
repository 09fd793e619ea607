//! Volumes for claims: directories of the cluster's, made ready in advance, because nothing here provisions any.

use anyhow::Result;
use serde_json::json;

use crate::kube::Api;

const VOLUMES: u8 = 12;

pub fn prepare(api: &Api) -> Result<()> {
    api.apply(&json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
        "metadata": { "name": "standard", "annotations": { "storageclass.kubernetes.io/is-default-class": "true" } },
        "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "Immediate", "reclaimPolicy": "Retain",
    }))?;
    for number in 1..=VOLUMES {
        let name = format!("volume-{number}");
        api.apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": name },
            "spec": {
                "storageClassName": "standard", "capacity": { "storage": "100Gi" }, "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain", "hostPath": { "path": format!("/volumes/{name}") },
            },
        }))?;
    }
    Ok(())
}
