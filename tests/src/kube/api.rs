//! An API server as its administrator sees it: objects are JSON, calls wait for their answer.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use k8s_openapi::api::authentication::v1::TokenRequest;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, ValidationDirective};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

use crate::netns::Namespace;

pub const MCS: &str = "multicluster.x-k8s.io/v1beta1";
const LONGEST: Duration = Duration::from_secs(20);

/// Which object is meant.
#[derive(Clone, Debug)]
pub struct Object {
    api_version: String,
    kind: String,
    namespace: String,
    name: String,
}

impl Object {
    /// `namespace`: empty for those of the cluster.
    pub fn new(api_version: &str, kind: &str, namespace: &str, name: &str) -> Self {
        let [api_version, kind, namespace, name] = [api_version, kind, namespace, name].map(str::to_owned);
        Self { api_version, kind, namespace, name }
    }

    /// The one that a document is about.
    fn of(document: &Value) -> Result<Self> {
        let text = |path: &str| document.pointer(path).and_then(Value::as_str);
        let needed = |path: &str| text(path).with_context(|| format!("{path} is missing: {document}"));
        let namespace = text("/metadata/namespace").unwrap_or_default();
        Ok(Self::new(needed("/apiVersion")?, needed("/kind")?, namespace, needed("/metadata/name")?))
    }

    fn resource(&self) -> ApiResource {
        let (group, version) = self.api_version.split_once('/').unwrap_or(("", &self.api_version));
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &self.kind))
    }

    fn api(&self, client: Client) -> kube::Api<DynamicObject> {
        match self.namespace.as_str() {
            "" => kube::Api::all_with(client, &self.resource()),
            namespace => kube::Api::namespaced_with(client, namespace, &self.resource()),
        }
    }
}

/// Connected from inside a cluster's namespace.
pub struct Api {
    // Whose threads are inside the namespace: a connection is made where its task runs.
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Api {
    pub fn connect(namespace: &Namespace, kubeconfig: &Path) -> Result<Self> {
        let runtime = namespace.runtime(1)?;
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let client = runtime.block_on(runtime.spawn(async move {
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            Ok::<_, anyhow::Error>(Client::try_from(config)?)
        }));
        Ok(Self { client: client??, runtime })
    }

    fn run<T, F>(&self, call: impl FnOnce(Client) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, kube::Error>> + Send + 'static,
    {
        let call = call(self.client.clone());
        let limited = self.runtime.spawn(async move { tokio::time::timeout(LONGEST, call).await });
        self.runtime.block_on(limited)?.context("the API server does not answer")?.map_err(|e| anyhow!("{e}"))
    }

    /// Server-side apply; the object as it is then.
    pub fn apply(&self, document: &Value) -> Result<Value> {
        self.apply_as("test", document)
    }

    pub fn apply_as(&self, manager: &str, document: &Value) -> Result<Value> {
        let object = Object::of(document)?;
        let params = PatchParams::apply(manager).force();
        let patch = Patch::Apply(document.clone());
        let made =
            self.run(|client| async move { object.api(client).patch(&object.name, &params, &patch).await })?;
        Ok(serde_json::to_value(made)?)
    }

    /// Whether it would be admitted, by a dry run with strict field validation, as kubectl's own.
    pub fn admit(&self, document: &Value) -> Result<()> {
        let object = Object::of(document)?;
        let mut params = PatchParams::apply("test").force().dry_run();
        params.field_validation = Some(ValidationDirective::Strict);
        let patch = Patch::Apply(document.clone());
        self.run(|client| async move { object.api(client).patch(&object.name, &params, &patch).await })
            .map(drop)
    }

    /// Makes a new one; refused when it is there.
    pub fn create(&self, document: &Value) -> Result<Value> {
        let object = Object::of(document)?;
        let new: DynamicObject = serde_json::from_value(document.clone())?;
        let made =
            self.run(|client| async move { object.api(client).create(&PostParams::default(), &new).await })?;
        Ok(serde_json::to_value(made)?)
    }

    /// A merge patch.
    pub fn merge(&self, object: &Object, patch: Value) -> Result<()> {
        let object = object.clone();
        self.run(|client| async move {
            let patch = Patch::Merge(patch);
            object.api(client).patch(&object.name, &PatchParams::default(), &patch).await.map(drop)
        })
    }

    /// A merge patch of the status.
    pub fn merge_status(&self, object: &Object, patch: Value) -> Result<()> {
        let object = object.clone();
        self.run(|client| async move {
            let patch = Patch::Merge(patch);
            object.api(client).patch_status(&object.name, &PatchParams::default(), &patch).await.map(drop)
        })
    }

    pub fn get(&self, object: &Object) -> Result<Option<Value>> {
        let object = object.clone();
        let found = self.run(|client| async move { object.api(client).get_opt(&object.name).await })?;
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// Every object of the kind in the namespace, or everywhere when that is empty.
    pub fn list(&self, of: &Object) -> Result<Vec<Value>> {
        let object = of.clone();
        let list = self.run(|client| async move { object.api(client).list(&ListParams::default()).await })?;
        Ok(list.items.into_iter().map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    /// At once, without a grace period.
    pub fn kill(&self, object: &Object) -> Result<()> {
        let object = object.clone();
        self.run(|client| async move {
            let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            object.api(client).delete(&object.name, &params).await.map(drop)
        })
    }

    pub fn delete(&self, object: &Object) -> Result<()> {
        let object = object.clone();
        self.run(|client| async move {
            object.api(client).delete(&object.name, &DeleteParams::default()).await.map(drop)
        })
    }

    /// A token of a service account, for the API server itself.
    pub fn token(&self, account: &Object) -> Result<String> {
        let account = account.clone();
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "expirationSeconds": 7200, "audiences": [] },
        });
        let made: TokenRequest = self.run(|client| async move {
            let api = account.api(client);
            api.create_subresource("token", &account.name, &PostParams::default(), &body).await
        })?;
        Ok(made.status.context("no token")?.token)
    }

    /// Polls until `check` holds of the object, or fails with what it last said.
    pub fn until<T>(
        &self,
        object: &Object,
        limit: Duration,
        check: impl Fn(Option<&Value>) -> Result<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            let found = self.get(object).and_then(|found| check(found.as_ref()));
            match found {
                Ok(found) => return Ok(found),
                Err(error) if start.elapsed() > limit => {
                    let what = format!("{} {}/{}", object.kind, object.namespace, object.name);
                    return Err(error.context(format!("not within {limit:?}: {what}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// A condition of an object: status and reason, joined by a space, and the message.
pub fn condition(object: &Value, r#type: &str) -> (String, String) {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let found = conditions.into_iter().find(|condition| condition["type"] == r#type);
    let text = |field: &str| found.and_then(|c| c[field].as_str()).unwrap_or_default().to_owned();
    (format!("{} {}", text("status"), text("reason")).trim().to_owned(), text("message"))
}

/// The documents of a manifest.
pub fn documents(manifest: &str) -> Result<Vec<Value>> {
    let parts = manifest.split("\n---");
    let read = |part: &str| serde_saphyr::from_str::<Value>(part).with_context(|| part.to_owned());
    parts
        .filter(|part| part.lines().any(|line| !line.is_empty() && !line.starts_with('#')))
        .map(read)
        .collect()
}
