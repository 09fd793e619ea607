//! What a pod's volumes are to hold: pure, as the spec has it.

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, Volume};

use super::env::Keyed;
use super::plan::Refusal;

/// Files are readable to everybody unless the spec says otherwise.
const MODE: u32 = 0o644;

/// Where a volume's content comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An empty directory of the pod's.
    Empty,
    /// A directory of this machine's, below the node's own.
    Host(String),
    /// What a PersistentVolumeClaim is bound to.
    Claim(String),
    /// Files that the node writes, and writes again when they change.
    Files(Vec<Piece>),
}

/// A part of a volume of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Keys of an object; `items` empty: all of them, each a file of its name.
    Keys { kind: Keyed, name: String, items: Vec<Item>, optional: bool, mode: u32 },
    /// Fields of the pod.
    Fields { items: Vec<Item>, mode: u32 },
    /// A token of the pod's service account.
    Token { audience: Option<String>, seconds: i64, path: String, mode: u32 },
}

/// A key or field, and the file that it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub key: String,
    pub path: String,
    pub mode: Option<u32>,
    /// Whose resources a `resourceFieldRef` means.
    pub container: Option<String>,
}

/// Of one volume.
pub fn content(volume: &Volume) -> Result<Content, Refusal> {
    if volume.empty_dir.is_some() {
        return Ok(Content::Empty);
    }
    if let Some(host) = &volume.host_path {
        return Ok(Content::Host(host.path.clone()));
    }
    if let Some(claim) = &volume.persistent_volume_claim {
        return Ok(Content::Claim(claim.claim_name.clone()));
    }
    if let Some(secret) = &volume.secret {
        let name = secret.secret_name.clone().unwrap_or_default();
        return keys(Keyed::Secret, &name, secret.items.as_ref(), secret.optional, secret.default_mode);
    }
    if let Some(config) = &volume.config_map {
        return keys(
            Keyed::ConfigMap,
            &config.name,
            config.items.as_ref(),
            config.optional,
            config.default_mode,
        );
    }
    if let Some(downward) = &volume.downward_api {
        let piece = fields(downward.items.iter().flatten(), mode(downward.default_mode)?)?;
        return Ok(Content::Files(vec![piece]));
    }
    let unknown = || Refusal::config(format!("volume {} is of a kind that is not known here", volume.name));
    let projected = volume.projected.as_ref().ok_or_else(unknown)?;
    let default = mode(projected.default_mode)?;
    let mut pieces = Vec::new();
    for source in projected.sources.iter().flatten() {
        let piece = if let Some(token) = &source.service_account_token {
            Piece::Token {
                audience: token.audience.clone(),
                seconds: token.expiration_seconds.unwrap_or(3600),
                path: checked(&token.path)?,
                mode: default,
            }
        } else if let Some(config) = &source.config_map {
            let optional = config.optional == Some(true);
            Piece::Keys {
                kind: Keyed::ConfigMap,
                name: config.name.clone(),
                items: items(config.items.as_ref())?,
                optional,
                mode: default,
            }
        } else if let Some(secret) = &source.secret {
            let optional = secret.optional == Some(true);
            Piece::Keys {
                kind: Keyed::Secret,
                name: secret.name.clone(),
                items: items(secret.items.as_ref())?,
                optional,
                mode: default,
            }
        } else if let Some(downward) = &source.downward_api {
            fields(downward.items.iter().flatten(), default)?
        } else {
            return Err(unknown());
        };
        pieces.push(piece);
    }
    Ok(Content::Files(pieces))
}

fn keys(
    kind: Keyed,
    name: &str,
    of: Option<&Vec<KeyToPath>>,
    optional: Option<bool>,
    default: Option<i32>,
) -> Result<Content, Refusal> {
    let (items, mode) = (items(of)?, mode(default)?);
    let optional = optional == Some(true);
    Ok(Content::Files(vec![Piece::Keys { kind, name: name.to_owned(), items, optional, mode }]))
}

fn items(of: Option<&Vec<KeyToPath>>) -> Result<Vec<Item>, Refusal> {
    let item = |item: &KeyToPath| {
        let mode = item.mode.map(|of| mode(Some(of))).transpose()?;
        Ok(Item { key: item.key.clone(), path: checked(&item.path)?, mode, container: None })
    };
    of.into_iter().flatten().map(item).collect()
}

fn fields<'a>(of: impl Iterator<Item = &'a DownwardAPIVolumeFile>, default: u32) -> Result<Piece, Refusal> {
    let item = |file: &DownwardAPIVolumeFile| {
        let resource = file.resource_field_ref.as_ref();
        let field = file.field_ref.as_ref().map(|field| field.field_path.clone());
        Ok(Item {
            key: field.or(resource.map(|of| of.resource.clone())).unwrap_or_default(),
            path: checked(&file.path)?,
            mode: file.mode.map(|of| mode(Some(of))).transpose()?,
            container: resource.and_then(|of| of.container_name.clone()),
        })
    };
    Ok(Piece::Fields { items: of.map(item).collect::<Result<_, _>>()?, mode: default })
}

fn mode(of: Option<i32>) -> Result<u32, Refusal> {
    let wrong =
        |mode| Refusal::config(format!("mode {mode} of a volume's file, expected 0 to 0777 (decimal 511)"));
    of.map_or(Ok(MODE), |mode| u32::try_from(mode).ok().filter(|of| *of <= 0o777).ok_or_else(|| wrong(mode)))
}

/// A path inside the volume.
fn checked(path: &str) -> Result<String, Refusal> {
    let bad = path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..");
    if bad {
        Err(Refusal::config(format!("path {path:?} leads out of its volume")))
    } else {
        Ok(path.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(volume: serde_json::Value) -> Result<Content, Refusal> {
        content(&serde_json::from_value(volume).unwrap())
    }

    #[test]
    fn the_usual_token_volume_is_a_token_the_cluster_ca_and_the_namespace() {
        let content = of(
            serde_json::json!({ "name": "kube-api-access", "projected": { "defaultMode": 420, "sources": [
            { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
            { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "fieldPath": "metadata.namespace" } }] } },
        ] } }),
        );
        let Ok(Content::Files(pieces)) = content else { panic!("{content:?}") };
        assert_eq!(
            pieces[0],
            Piece::Token { audience: None, seconds: 3607, path: "token".into(), mode: 0o644 }
        );
        assert!(
            matches!(&pieces[1], Piece::Keys { kind: Keyed::ConfigMap, items, .. } if items[0].path == "ca.crt")
        );
        assert!(matches!(&pieces[2], Piece::Fields { items, .. } if items[0].key == "metadata.namespace"));
    }

    #[test]
    fn paths_stay_in_their_volume_and_unknown_kinds_are_refused() {
        for path in ["/a", "../a", "a/../../b", ""] {
            let items = serde_json::json!([{ "key": "k", "path": path }]);
            assert!(
                of(serde_json::json!({ "name": "v", "secret": { "secretName": "s", "items": items } }))
                    .is_err()
            );
        }
        let nfs = serde_json::json!({ "name": "v", "nfs": { "server": "s", "path": "/" } });
        assert!(of(nfs).unwrap_err().message.contains("volume v"));
    }
}
