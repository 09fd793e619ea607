//! Volumes on disk: directories of the pod's below the node's own, and the files that the node keeps as the API has them.
//!
//! Files are swapped all at once (`..data`, as a kubelet does it), so that a reader sees old or new ones. Tokens are made by
//! TokenRequest, bound to the pod, and made anew when four fifths of their time are over.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret, ServiceAccount,
};
use kube::api::PostParams;
use kube::{Api, Client};

use super::env::{self, Keyed};
use super::plan::PodPlan;
use super::sources::{Content, Item, Piece};

/// Name and content of a file, and its mode.
type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// One pod's.
pub struct Volumes {
    client: Client,
    dir: PathBuf,
    /// The node's own, that `hostPath`s are below.
    host: PathBuf,
    group: Option<u32>,
    contents: Vec<(String, Content)>,
    written: BTreeMap<String, Files>,
    /// By volume and path: the token, and when there is to be another one.
    tokens: BTreeMap<(String, String), (String, Instant)>,
}

impl Volumes {
    pub fn new(client: Client, dir: PathBuf, host: PathBuf, plan: &PodPlan) -> Self {
        let contents = plan.volumes.clone();
        Self {
            client,
            dir,
            host,
            group: plan.fs_group,
            contents,
            written: BTreeMap::new(),
            tokens: BTreeMap::new(),
        }
    }

    /// Whether anything in them can change.
    pub fn live(&self) -> bool {
        self.contents.iter().any(|(_, content)| matches!(content, Content::Files(_)))
    }

    /// Where each volume is.
    pub async fn places(&self, pod: &Pod) -> Result<BTreeMap<String, PathBuf>> {
        let mut places = BTreeMap::new();
        for (name, content) in &self.contents {
            let place = match content {
                Content::Empty | Content::Files(_) => self.dir.join(name),
                Content::Host(path) => self.host.join(path.trim_start_matches('/')),
                Content::Claim(claim) => self.claimed(pod, claim).await?,
            };
            fs::create_dir_all(&place)?;
            if !matches!(content, Content::Files(_)) {
                fs::set_permissions(&place, fs::Permissions::from_mode(0o777))?;
            }
            places.insert(name.clone(), place);
        }
        Ok(places)
    }

    async fn claimed(&self, pod: &Pod, claim: &str) -> Result<PathBuf> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let spec = claims.get(claim).await?.spec;
        let volume =
            spec.and_then(|spec| spec.volume_name).with_context(|| format!("claim {claim} is not bound"))?;
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let path = volumes.get(&volume).await?.spec.and_then(|spec| spec.host_path).map(|host| host.path);
        let path = path.with_context(|| format!("volume {volume} has no hostPath"))?;
        Ok(self.host.join(path.trim_start_matches('/')))
    }

    /// Writes what is not as it is to be.
    pub async fn refresh(&mut self, pod: &Pod) -> Result<()> {
        for (name, content) in self.contents.clone() {
            let Content::Files(pieces) = content else { continue };
            let mut files = Files::new();
            for piece in &pieces {
                self.collect(pod, &name, piece, &mut files)
                    .await
                    .with_context(|| format!("volume {name}"))?;
            }
            if self.written.get(&name) != Some(&files) {
                swap(&self.dir.join(&name), &files, self.group)?;
                self.written.insert(name, files);
            }
        }
        Ok(())
    }

    async fn collect(&mut self, pod: &Pod, volume: &str, piece: &Piece, files: &mut Files) -> Result<()> {
        match piece {
            Piece::Keys { kind, name, items, optional, mode } => {
                let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
                let Some(keys) = keys(&self.client, namespace, *kind, name).await? else {
                    return if *optional {
                        Ok(())
                    } else {
                        Err(anyhow::anyhow!("there is no {kind:?} {name}"))
                    };
                };
                if items.is_empty() {
                    files.extend(keys.into_iter().map(|(key, value)| (key, (value, *mode))));
                    return Ok(());
                }
                for item in items {
                    match keys.get(&item.key) {
                        Some(value) => {
                            drop(files.insert(item.path.clone(), (value.clone(), item.mode.unwrap_or(*mode))))
                        }
                        None if *optional => {}
                        None => anyhow::bail!("{kind:?} {name} has no key {}", item.key),
                    }
                }
            }
            Piece::Fields { items, mode } => {
                for Item { key, path, mode: own, container } in items {
                    let spec = pod.spec.as_ref();
                    let named = spec.and_then(|spec| {
                        spec.containers.iter().find(|of| Some(&of.name) == container.as_ref())
                    });
                    let value = env::field(pod, named, key)?;
                    files.insert(path.clone(), (value.into_bytes(), own.unwrap_or(*mode)));
                }
            }
            Piece::Token { audience, seconds, path, mode } => {
                let token = self.token(pod, volume, path, audience.as_deref(), *seconds).await?;
                // The pod's group alone, where there is one.
                let mode = if self.group.is_some() { mode & 0o640 } else { *mode };
                files.insert(path.clone(), (token.into_bytes(), mode));
            }
        }
        Ok(())
    }

    async fn token(
        &mut self,
        pod: &Pod,
        volume: &str,
        path: &str,
        audience: Option<&str>,
        seconds: i64,
    ) -> Result<String> {
        let place = (volume.to_owned(), path.to_owned());
        if let Some((token, _)) = self.tokens.get(&place).filter(|(_, until)| Instant::now() < *until) {
            return Ok(token.clone());
        }
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let bound = BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
        };
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: audience.map(str::to_owned).into_iter().collect(),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(bound),
            },
            ..TokenRequest::default()
        };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let account = account.unwrap_or_else(|| "default".to_owned());
        let made = accounts.create_token_request(&account, &PostParams::default(), &request).await?;
        let token = made.status.context("no token")?.token;
        let lasts = Duration::from_secs(u64::try_from(seconds).unwrap_or(600));
        self.tokens.insert(place, (token.clone(), Instant::now() + lasts * 4 / 5));
        Ok(token)
    }
}

/// What an object holds.
pub async fn keys(
    client: &Client,
    namespace: &str,
    kind: Keyed,
    name: &str,
) -> Result<Option<BTreeMap<String, Vec<u8>>>> {
    Ok(match kind {
        Keyed::ConfigMap => {
            let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
            maps.get_opt(name).await?.map(|map| {
                let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
                text.chain(map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0))).collect()
            })
        }
        Keyed::Secret => {
            let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
            let secret = secrets.get_opt(name).await?;
            secret
                .map(|secret| secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect())
        }
    })
}

/// Puts `files` in the place of those that are there.
fn swap(dir: &Path, files: &Files, group: Option<u32>) -> Result<()> {
    fs::create_dir_all(dir)?;
    let data = dir.join("..data");
    let old = fs::read_link(&data).ok();
    let number =
        old.as_ref().and_then(|old| old.to_str()?.strip_prefix("..")?.parse::<u64>().ok()).unwrap_or(0) + 1;
    let fresh = format!("..{number}");
    for (name, (content, mode)) in files {
        let path = dir.join(&fresh).join(name);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&path, content)?;
        let mode = if group.is_some() { mode | 0o440 } else { *mode };
        chown(&path, None, group)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    fs::create_dir_all(dir.join(&fresh))?;
    let next = dir.join("..data_next");
    let _ = fs::remove_file(&next);
    symlink(&fresh, &next)?;
    fs::rename(&next, &data)?;
    let first = |name: &String| name.split('/').next().unwrap_or_default().to_owned();
    let wanted: std::collections::BTreeSet<String> = files.keys().map(first).collect();
    for name in &wanted {
        if !dir.join(name).is_symlink() {
            symlink(Path::new("..data").join(name), dir.join(name))?;
        }
    }
    for entry in fs::read_dir(dir)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && !wanted.contains(&name) {
            let _ = fs::remove_file(entry.path());
        }
    }
    if let Some(old) = old {
        let _ = fs::remove_dir_all(dir.join(old));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_swapped_and_those_that_are_gone_go() {
        let dir = tempfile::tempdir().unwrap();
        let files = |names: &[&str]| -> Files {
            names.iter().map(|name| ((*name).to_owned(), (name.as_bytes().to_vec(), 0o644))).collect()
        };
        swap(dir.path(), &files(&["a", "b/c"]), None).unwrap();
        assert_eq!(fs::read(dir.path().join("b/c")).unwrap(), b"b/c");
        swap(dir.path(), &files(&["a"]), None).unwrap();
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"a");
        assert!(!dir.path().join("b").is_symlink());
        assert_eq!(fs::read_link(dir.path().join("..data")).unwrap(), Path::new("..2"));
        assert!(!dir.path().join("..1").exists());
    }
}
