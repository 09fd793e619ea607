//! What installing and upgrading do in the cluster: look whose installation is there, make everything, remove what is needed
//! no more.

use std::time::Duration;

use serde_json::{Value, json};
use tombolo_federator::kubernetes::crds::{self, Installed};

use super::objects::{self, Cluster, Kind};
use super::{RECORD, progress};
use crate::failure::Failure;
use crate::output::objects::text;
use crate::{chart, kube_client};

/// What helm installed is helm's.
pub async fn refuse_others(target: &Cluster, namespace: &str) -> Result<(), Failure> {
    // Cluster-wide objects have one name: a second installation would take the first one's rights.
    let bindings = Kind::new("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "");
    let binding = target.find(&bindings, "tombolo-federator").await?;
    let other = binding.as_ref().map(|binding| text(binding, "/subjects/0/namespace")).unwrap_or_default();
    if !other.is_empty() && other != namespace {
        return Err(Failure::new(format_args!("this cluster has an installation in namespace {other}"))
            .remedy("name it with --kube-namespace, or remove it first"));
    }
    let federator = target.find(&Kind::new("apps/v1", "StatefulSet", namespace), "tombolo-federator").await?;
    let manager = federator.as_ref().map(|federator| {
        federator.pointer("/metadata/labels/app.kubernetes.io~1managed-by").and_then(Value::as_str)
    });
    match manager {
        None => Ok(()),
        Some(Some(manager)) if manager == chart::MANAGED_BY => Ok(()),
        Some(Some("Helm")) => Err(Failure::new(format_args!("{namespace} has an installation by helm"))
            .remedy("change it with `helm upgrade`, or remove it with `helm uninstall`")),
        Some(_) => Err(Failure::new(format_args!(
            "{namespace} has a StatefulSet tombolo-federator that was not installed by this command"
        ))
        .remedy("remove it, or name another namespace with --kube-namespace")),
    }
}

/// A claim that nobody provides for would keep the federator from starting, without a word.
pub async fn check_storage(target: &Cluster, values: &Value) -> Result<(), Failure> {
    let persistence = &values["federator"]["persistence"];
    let named = |key: &str| !text(persistence, key).is_empty();
    if persistence["enabled"] != true || named("/storageClass") || named("/existingClaim") {
        return Ok(());
    }
    let classes = target.list(&Kind::new("storage.k8s.io/v1", "StorageClass", ""), "").await?;
    let default = |class: &&Value| {
        text(class, "/metadata/annotations/storageclass.kubernetes.io~1is-default-class") == "true"
    };
    if classes.iter().any(|class| default(&class)) {
        return Ok(());
    }
    let names: Vec<&str> = classes.iter().map(|class| text(class, "/metadata/name")).collect();
    Err(Failure::new("the cluster has no default StorageClass for the federator's store").remedy(match names.as_slice() {
        [] => "give --set federator.persistence.enabled=false (a federator that is replaced has to be linked anew), or --set federator.persistence.existingClaim=NAME".to_owned(),
        names => format!("give --set federator.persistence.storageClass=NAME; known: {}", names.join(", ")),
    }))
}

/// What is to be made.
pub struct Work {
    pub target: Cluster,
    pub namespace: String,
    /// By people.
    pub given: Value,
    /// With the chart's.
    pub values: Value,
    pub objects: Vec<Value>,
}

impl Work {
    pub async fn apply(&self, secret: Option<Value>) -> Result<(), Failure> {
        self.make_namespace().await?;
        if let Some(mut secret) = secret {
            objects::label(&mut secret);
            self.target.apply(&secret).await?;
            eprintln!("{} holds the cluster's keys", objects::shown(&secret));
        }
        let installed = crds::install(self.target.client.clone()).await;
        for (name, what) in installed.map_err(|e| kube_client::failed("definitions", &e))? {
            if what != Installed::Applied {
                eprintln!("customresourcedefinition/{name} is {what}");
            }
        }
        for object in &self.objects {
            self.target.apply(object).await?;
        }
        eprintln!("{} objects applied", self.objects.len());
        Ok(())
    }

    /// One that is there is left as it is.
    async fn make_namespace(&self) -> Result<(), Failure> {
        if self.target.find(&Kind::new("v1", "Namespace", ""), &self.namespace).await?.is_some() {
            return Ok(());
        }
        let host = matches!(text(&self.values, "/gateway/exposure"), "hostNetwork" | "hostPort");
        let level = if host { "privileged" } else { "restricted" };
        let mut namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": self.namespace,
                "labels": { "pod-security.kubernetes.io/enforce": level },
            },
        });
        objects::label(&mut namespace);
        self.target.apply(&namespace).await.map(drop)
    }

    /// Records what was given, removes what is rendered no more, and waits; `None`: it does not.
    pub async fn finish(&self, patience: Option<Duration>) -> Result<(), Failure> {
        let mut record = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": RECORD, "namespace": self.namespace },
            "data": { "version": env!("CARGO_PKG_VERSION"), "values.json": self.given.to_string() },
        });
        objects::label(&mut record);
        self.target.apply(&record).await?;
        let same = |a: &Value, b: &Value| {
            ["/kind", "/metadata/name"].iter().all(|path| text(a, path) == text(b, path))
        };
        let kept = |object: &Value| {
            matches!(text(object, "/kind"), "Namespace" | "Secret")
                || same(object, &record)
                || self.objects.iter().any(|rendered| same(object, rendered))
        };
        for object in self.target.installed(&self.namespace).await?.iter().filter(|object| !kept(object)) {
            self.target.delete(object).await?;
            eprintln!("{} is needed no more and removed", objects::shown(object));
        }
        match patience {
            None => Ok(()),
            Some(patience) => progress::wait(&self.target, &self.objects, patience).await,
        }
    }
}
