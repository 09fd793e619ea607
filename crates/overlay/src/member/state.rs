//! `member.json`: what a member keeps beside its lease.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tombolo_identity::bundle::{BundleSet, TrustBundle};
use tombolo_identity::{SpiffeId, Svid, files};
use tombolo_model::ids::{ClusterTag, EndpointId, Handle};
use tombolo_model::names::ClusterName;
use tombolo_proto::{convert, v1};
use tombolo_runtime::dirs;

use super::{Control, MemberError};
use crate::keys::KeyRing;
use crate::routes::GatewayHop;

pub(super) const FILE: &str = "member.json";
const FORMAT: &str = "tombolo-member/1";
/// A chain, a bundle of a few roots and a key ring are 20 KB.
const MAX_BYTES: u64 = 1024 * 1024;

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    format: String,
    pub name: String,
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    spiffe_id: SpiffeId,
    /// PKCS#8 DER, hex.
    key: String,
    /// DER, hex; leaf first.
    chain: Vec<String>,
    /// SPIFFE bundle of the own trust domain.
    pub bundle: String,
    handle: Handle,
    first_hour: u64,
    keys: Vec<String>,
    federator_ids: Vec<SpiffeId>,
    federators: Vec<Federator>,
    gateways: Vec<Gateway>,
    /// The gateways that it joined through: tried beside the last ones known when nothing else answers.
    #[serde(default)]
    pub origins: Vec<std::net::SocketAddr>,
}

/// The key must not end up in a log.
impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("name", &self.name)
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Federator {
    endpoint: EndpointId,
    address: Option<std::net::SocketAddr>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gateway {
    name: String,
    address: std::net::SocketAddr,
    balanced: bool,
    #[serde(default)]
    zone: String,
}

impl State {
    pub fn new(
        name: &str,
        cluster: ClusterName,
        tag: ClusterTag,
        key_pkcs8: &[u8],
        issued: &v1::Svid,
        control: &Control,
    ) -> Result<Self, MemberError> {
        let mut state = Self {
            format: FORMAT.to_owned(),
            name: name.to_owned(),
            cluster,
            tag,
            spiffe_id: convert::parse("svid.spiffe_id", &issued.spiffe_id)?,
            key: String::new(),
            chain: Vec::new(),
            bundle: String::new(),
            handle: control.handle,
            first_hour: 0,
            keys: Vec::new(),
            federator_ids: Vec::new(),
            federators: Vec::new(),
            gateways: Vec::new(),
            origins: Vec::new(),
        };
        state.set_identity(key_pkcs8, issued);
        state.set_control(control);
        Ok(state)
    }

    pub fn set_identity(&mut self, key_pkcs8: &[u8], issued: &v1::Svid) {
        self.key = hex::encode(key_pkcs8);
        self.chain = issued.chain_der.iter().map(hex::encode).collect();
        self.bundle.clone_from(&issued.trust_bundle_json);
    }

    pub fn set_control(&mut self, control: &Control) {
        let keys = control.keys.to_wire();
        self.handle = control.handle;
        self.first_hour = keys.first_hour;
        self.keys = keys.keys.iter().map(hex::encode).collect();
        self.federator_ids = control.spiffe_ids.to_vec();
        let federator =
            |(endpoint, address): &(EndpointId, _)| Federator { endpoint: *endpoint, address: *address };
        self.federators = control.federators.iter().map(federator).collect();
        let gateway = |GatewayHop { name, address, balanced, zone }: &GatewayHop| Gateway {
            name: name.clone(),
            address: *address,
            balanced: *balanced,
            zone: zone.clone(),
        };
        self.gateways = control.gateways.iter().map(gateway).collect();
    }

    pub fn control(&self) -> Result<Control, MemberError> {
        let keys = self.keys.iter().map(|key| unhex("keys", key)).collect::<Result<Vec<_>, _>>()?;
        Ok(Control {
            handle: self.handle,
            keys: Arc::new(KeyRing::from_wire(&v1::KeyRing { first_hour: self.first_hour, keys })?),
            spiffe_ids: self.federator_ids.clone().into(),
            federators: self.federators.iter().map(|f| (f.endpoint, f.address)).collect(),
            gateways: self
                .gateways
                .iter()
                .map(|Gateway { name, address, balanced, zone }| GatewayHop {
                    name: name.clone(),
                    address: *address,
                    balanced: *balanced,
                    zone: zone.clone(),
                })
                .collect(),
        })
    }

    pub fn svid(&self) -> Result<Svid, MemberError> {
        let key = unhex("key", &self.key)?;
        let chain = self.chain.iter().map(|der| unhex("chain", der).map(Into::into));
        let chain = chain.collect::<Result<Vec<_>, _>>()?;
        let bundle = TrustBundle::from_json(self.spiffe_id.trust_domain(), &self.bundle)?;
        Ok(Svid::new(&key, chain, BundleSet::of(bundle))?)
    }

    pub fn load(dir: &Path) -> Result<Option<Self>, MemberError> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        dirs::ensure_private(dir)?;
        let damaged = |reason: String| MemberError::Damaged { path: path.clone(), reason };
        let text = files::read(&path, MAX_BYTES)?;
        let state: Self = serde_json::from_slice(&text).map_err(|e| damaged(e.to_string()))?;
        if state.format != FORMAT {
            return Err(damaged(format!("its format is not {FORMAT:?}")));
        }
        Ok(Some(state))
    }

    pub fn save(&self, dir: &Path) -> Result<(), MemberError> {
        dirs::ensure_private(dir)?;
        // Strings, numbers and lists always serialise.
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        Ok(files::write_atomic(&dir.join(FILE), &text, 0o600)?)
    }
}

fn unhex(field: &'static str, text: &str) -> Result<Vec<u8>, MemberError> {
    hex::decode(text).map_err(|e| convert::FieldError::new(field, e, "hex digits").into())
}
