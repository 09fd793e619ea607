//! The offline root: signs one intermediate per cluster, bound to its name and tag, and keeps the register of tags.
//!
//! A directory of four files: `root.key` (0600), `root.crt`, `trust-domain`, `registry.json`; `bundle.json` after a first
//! rotation ([`rotating`]). It is needed only when a cluster is made or renewed, so keep it off the clusters. The key may lie
//! elsewhere, or under a passphrase ([`keys`]); a cluster's key may be made where it is used ([`csr`]).

pub mod adopt;
pub mod csr;
mod keys;
mod rotating;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use zeroize::Zeroizing;

use crate::bundle::{TrustBundle, fingerprint};
use crate::cluster_binding::{ClusterBinding, OID};
use crate::files::{self, FileError};
use crate::signer::file::SecretKey;
use crate::signer::{CaKey, KeyError, SignerError};
use crate::spiffe_id::TrustDomain;

/// Roots are rotated, not renewed: ten years leave nine to do it in.
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Intermediates are reissued from the offline root once a year.
pub const INTERMEDIATE_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// Certificates start this much in the past: clocks are off by up to ten minutes.
pub const BACKDATE: Duration = Duration::from_secs(600);
const MAX_FILE: u64 = 4 * 1024 * 1024;

/// Why the root could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path} exists already; choose another --dir, or remove it if no cluster uses this root", path = .0.display())]
    Exists(PathBuf),
    #[error("{path} is damaged ({reason}); restore it from your backup", path = path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "cluster {name} is registered already (tag {tag}); --renew gives it a further intermediate with the same tag, --recreate a new tag"
    )]
    Registered { name: ClusterName, tag: ClusterTag },
    #[error("all cluster tags are taken")]
    NoTagLeft,
    #[error("signing failed: {0}")]
    Sign(#[from] rcgen::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the CSR can't be signed: {0}; make one with `tombolo trust csr NAME`")]
    Csr(String),
    #[error("the certificate can't be adopted: {0}")]
    Adopt(String),
    #[error("a certificate can't be signed anew: {0}")]
    Reissue(String),
}

impl From<SignerError> for AuthorityError {
    fn from(error: SignerError) -> Self {
        Self::Key(error.into())
    }
}

/// One registered intermediate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RegistryEntry {
    pub name: ClusterName,
    pub tag: ClusterTag,
    /// SHA-256 of the intermediate's public key.
    pub spki_sha256: String,
    /// Unix seconds.
    pub issued_at: u64,
    /// A recreated cluster's old entries stay, marked.
    #[serde(default)]
    pub superseded: bool,
}

/// How an existing cluster name is treated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Existing {
    #[default]
    Refuse,
    /// A further intermediate with the same tag.
    Renew,
    /// A new tag: linked clusters see `ClusterRecreated`.
    Recreate,
}

/// The offline root.
pub struct RootAuthority {
    dir: PathBuf,
    pub trust_domain: TrustDomain,
    key: CaKey,
    certificate: CertificateDer<'static>,
    registry: Vec<RegistryEntry>,
    /// What the federation is told to trust.
    bundle: TrustBundle,
}

/// How the key of a new root is kept.
pub enum Protection<'a> {
    /// In `root.key`, readable by its owner alone.
    Plain,
    /// In `root.key`, under a passphrase.
    Passphrase(&'a str),
    /// Elsewhere: this one signs.
    Signer(Box<dyn crate::signer::Signer>),
}

/// Everything a federator needs to be its cluster's CA; written by `tombolo trust cluster`.
pub struct ClusterMaterial {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub trust_domain: TrustDomain,
    pub key_pem: Zeroizing<String>,
    pub certificate: CertificateDer<'static>,
    pub bundle: TrustBundle,
}

/// What is no secret of a cluster's material.
fn save_public(
    dir: &Path,
    cluster: &ClusterFile,
    certificate: &CertificateDer<'_>,
    bundle: &TrustBundle,
) -> Result<(), AuthorityError> {
    files::write_atomic(&dir.join("ca.crt"), pem(certificate).as_bytes(), 0o644)?;
    files::write_atomic(&dir.join("bundle.json"), bundle.to_json().as_bytes(), 0o644)?;
    let json = serde_json::to_vec_pretty(cluster).unwrap_or_default();
    Ok(files::write_atomic(&dir.join("cluster.json"), &json, 0o644)?)
}

#[derive(Serialize, Deserialize)]
struct ClusterFile {
    name: ClusterName,
    tag: ClusterTag,
    trust_domain: TrustDomain,
}

pub(crate) fn offset(now: Duration) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(now.as_secs() as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

pub(crate) fn validity(params: &mut CertificateParams, now: Duration, life: Duration) {
    params.not_before = offset(now.saturating_sub(BACKDATE));
    params.not_after = offset(now + life);
}

pub(crate) fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f; // RFC 5280 section 4.1.2.2: positive
    bytes[0] |= 0x40; // and of constant length
    SerialNumber::from_slice(&bytes)
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

fn subject(common_name: String) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Tombolo");
    name.push(DnType::CommonName, common_name);
    name
}

fn signer_params(trust_domain: &TrustDomain, common_name: String, path_len: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(common_name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial());
    // A signer's SPIFFE ID has no path (X509-SVID section 4.1).
    if let Ok(uri) = format!("spiffe://{}", trust_domain.as_str()).try_into() {
        params.subject_alt_names = vec![SanType::URI(uri)];
    }
    params
}

impl RootAuthority {
    /// Makes a new root in `dir`, which must not hold one yet, with its key in a file.
    pub fn init(dir: &Path, trust_domain: TrustDomain, now: Duration) -> Result<Self, AuthorityError> {
        Self::init_with(dir, trust_domain, Protection::Plain, now)
    }

    /// The same, with its key kept as `protection` says.
    pub fn init_with(
        dir: &Path,
        trust_domain: TrustDomain,
        protection: Protection<'_>,
        now: Duration,
    ) -> Result<Self, AuthorityError> {
        // One with its key elsewhere has only the certificate.
        for name in ["root.key", "root.crt"] {
            if dir.join(name).exists() {
                return Err(AuthorityError::Exists(dir.join(name)));
            }
        }
        let (key, key_pem) = keys::made(protection)?;
        // A name of its own per key: a root and its successor are told apart by it.
        let spki = hex::encode(Sha256::digest(key.der_bytes()));
        let short = spki.get(..16).unwrap_or_default();
        let mut params = signer_params(&trust_domain, format!("{trust_domain} root {short}"), 1);
        validity(&mut params, now, ROOT_LIFE);
        let certificate = params.self_signed(&key).map_err(|e| key.why(e))?.der().clone();
        files::private_dir(dir)?;
        if let Some(key_pem) = key_pem {
            files::write_atomic(&dir.join("root.key"), key_pem.as_bytes(), 0o600)?;
        }
        files::write_atomic(&dir.join("root.crt"), pem(&certificate).as_bytes(), 0o644)?;
        files::write_atomic(&dir.join("trust-domain"), trust_domain.as_str().as_bytes(), 0o644)?;
        let bundle = rotating::bundle_of(dir, &trust_domain, &certificate)?;
        let root = Self { dir: dir.to_owned(), trust_domain, key, certificate, registry: Vec::new(), bundle };
        root.save_registry()?;
        Ok(root)
    }

    /// Reads a root. Its key opens at once when it lies in a plain file; else see [`RootAuthority::unlock`] and
    /// [`RootAuthority::attach`]. What needs no signature works with a closed key.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let damaged = |name: &str, reason: String| AuthorityError::Damaged { path: dir.join(name), reason };
        let text = |name: &str| -> Result<String, AuthorityError> {
            let bytes = files::read(&dir.join(name), MAX_FILE)?;
            String::from_utf8(bytes).map_err(|e| damaged(name, e.to_string()))
        };
        let certificate = CertificateDer::from_pem_slice(text("root.crt")?.as_bytes())
            .map_err(|e| damaged("root.crt", format!("{e:?}")))?;
        let key = keys::found(&dir.join("root.key"), &certificate)?;
        let trust_domain = text("trust-domain")?
            .trim()
            .parse()
            .map_err(|e: crate::spiffe_id::SpiffeIdError| damaged("trust-domain", e.to_string()))?;
        let registry = serde_json::from_str(&text("registry.json")?)
            .map_err(|e| damaged("registry.json", e.to_string()))?;
        let bundle = rotating::bundle_of(dir, &trust_domain, &certificate)?;
        Ok(Self { dir: dir.to_owned(), trust_domain, key, certificate, registry, bundle })
    }

    fn save_registry(&self) -> Result<(), AuthorityError> {
        let json = serde_json::to_vec_pretty(&self.registry).unwrap_or_default();
        Ok(files::write_atomic(&self.dir.join("registry.json"), &json, 0o644)?)
    }

    pub fn registry(&self) -> &[RegistryEntry] {
        &self.registry
    }
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.certificate)
    }
    pub fn bundle(&self) -> TrustBundle {
        self.bundle.clone()
    }

    fn tag_for(&self, name: &ClusterName, existing: Existing) -> Result<ClusterTag, AuthorityError> {
        let current = self.registry.iter().rev().find(|e| e.name == *name && !e.superseded);
        match (current, existing) {
            (Some(entry), Existing::Refuse) => {
                return Err(AuthorityError::Registered { name: name.clone(), tag: entry.tag });
            }
            (Some(entry), Existing::Renew) => return Ok(entry.tag),
            _ => {}
        }
        // 16.7 million tags: a few draws find a free one unless nearly all are taken.
        (0..10_000)
            .filter_map(|_| ClusterTag::new(rand::random::<u32>() & ClusterTag::MAX))
            .find(|tag| !self.registry.iter().any(|e| e.tag == *tag))
            .ok_or(AuthorityError::NoTagLeft)
    }

    /// Signs an intermediate for a cluster with a fresh key, and registers it.
    pub fn sign_cluster(
        &mut self,
        name: &ClusterName,
        existing: Existing,
        now: Duration,
    ) -> Result<ClusterMaterial, AuthorityError> {
        let key = SecretKey::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let Certified { tag, certificate } = self.certify_cluster(name, &*key, None, existing, now)?;
        Ok(ClusterMaterial {
            cluster: name.clone(),
            tag,
            trust_domain: self.trust_domain.clone(),
            key_pem: Zeroizing::new(key.serialize_pem()),
            certificate,
            bundle: self.bundle(),
        })
    }

    /// `like`: a certificate for the same key that a foreign authority has signed, whose name it gets.
    fn certify_cluster(
        &mut self,
        name: &ClusterName,
        key: &impl PublicKeyData,
        like: Option<&CertificateDer<'_>>,
        existing: Existing,
        now: Duration,
    ) -> Result<Certified, AuthorityError> {
        let tag = self.tag_for(name, existing)?;
        let spki = hex::encode(Sha256::digest(key.der_bytes()));
        // A subject of its own per key: revocation lists are found by the issuer's name.
        let short = spki.get(..16).unwrap_or_default();
        let mut params = signer_params(&self.trust_domain, format!("cluster {name} {short}"), 0);
        if let Some(like) = like {
            adopt::named_like(&mut params, like)?;
        }
        validity(&mut params, now, INTERMEDIATE_LIFE);
        let binding = ClusterBinding { cluster: name.clone(), tag };
        params.custom_extensions = vec![CustomExtension::from_oid_content(OID, binding.to_der())];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        let certificate = params.signed_by(key, &issuer).map_err(|e| self.key.why(e))?.der().clone();
        if like.is_some_and(|like| !adopt::same_name(like, &certificate)) {
            return Err(AuthorityError::Adopt("its name does not come out as it is".to_owned()));
        }
        if existing == Existing::Recreate {
            self.registry.iter_mut().filter(|e| e.name == *name).for_each(|e| e.superseded = true);
        }
        self.registry.push(RegistryEntry {
            name: name.clone(),
            tag,
            spki_sha256: spki,
            issued_at: now.as_secs(),
            superseded: false,
        });
        self.save_registry()?;
        Ok(Certified { tag, certificate })
    }
}

/// A cluster's certificate, just signed and registered.
struct Certified {
    tag: ClusterTag,
    certificate: CertificateDer<'static>,
}

impl ClusterMaterial {
    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        files::private_dir(dir)?;
        files::write_atomic(&dir.join("ca.key"), self.key_pem.as_bytes(), 0o600)?;
        let cluster = ClusterFile {
            name: self.cluster.clone(),
            tag: self.tag,
            trust_domain: self.trust_domain.clone(),
        };
        save_public(dir, &cluster, &self.certificate, &self.bundle)
    }

    /// The intermediate of a directory, whose key may be elsewhere.
    pub fn certificate_in(dir: &Path) -> Result<CertificateDer<'static>, AuthorityError> {
        let path = dir.join("ca.crt");
        CertificateDer::from_pem_slice(&files::read(&path, MAX_FILE)?)
            .map_err(|e| AuthorityError::Damaged { path, reason: format!("{e:?}") })
    }

    /// Another certificate of the same key, and the bundle to go with it; the key, if it is there, stays.
    pub fn save_certificate(
        dir: &Path,
        cluster: &ClusterName,
        tag: ClusterTag,
        certificate: &CertificateDer<'_>,
        bundle: &TrustBundle,
    ) -> Result<(), AuthorityError> {
        let trust_domain = bundle.trust_domain.clone();
        save_public(dir, &ClusterFile { name: cluster.clone(), tag, trust_domain }, certificate, bundle)
    }

    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let damaged = |name: &str, reason: String| AuthorityError::Damaged { path: dir.join(name), reason };
        let text = |name: &str| -> Result<String, AuthorityError> {
            let bytes = files::read(&dir.join(name), MAX_FILE)?;
            String::from_utf8(bytes).map_err(|e| damaged(name, e.to_string()))
        };
        let ClusterFile { name, tag, trust_domain } = serde_json::from_str(&text("cluster.json")?)
            .map_err(|e| damaged("cluster.json", e.to_string()))?;
        let certificate = Self::certificate_in(dir)?;
        let bundle = TrustBundle::from_json(trust_domain.clone(), &text("bundle.json")?)
            .map_err(|e| damaged("bundle.json", e.to_string()))?;
        let key_pem = files::read_secret(&dir.join("ca.key"), MAX_FILE)?;
        let key = SecretKey::from_pem(&key_pem).map_err(|e| damaged("ca.key", e.to_string()))?;
        if !keys::is_about(&certificate, &*key) {
            let reason =
                "it is about another key than ca.key: put the files of one `tombolo trust cluster` together";
            return Err(damaged("ca.crt", reason.to_owned()));
        }
        Ok(Self { cluster: name, tag, trust_domain, key_pem, certificate, bundle })
    }
}
