//! The root's side of a rotation: a successor, certificates that lead to it, updates that both sign, and the exchange of
//! their files.
//!
//! The successor lies in `next/` of the root's directory, a root of its own; when the rotation is over its files take the
//! place of the old ones, which go to `retired/<fingerprint>/`. Every step can be repeated.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, CustomExtension, Issuer, PublicKeyData, SigningKey, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{
    AuthorityError, INTERMEDIATE_LIFE, RegistryEntry, RootAuthority, adopt, signer_params, validity,
};
use crate::bundle::TrustBundle;
use crate::cluster_binding::{ClusterBinding, OID};
use crate::files::{self, FileError};
use crate::rotation::{self, Reissued, SignedUpdate, TrustUpdate, binding_of, spki_of};

/// Whoever was away for a month joins anew: no SVID outlives that.
const CROSS_LIFE: Duration = Duration::from_secs(30 * 86_400);
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// The bundle of the last update, beside the root: absent until a first rotation.
const BUNDLE: &str = "bundle.json";

impl RootAuthority {
    /// Where the successor lies while a rotation is under way.
    pub fn next_dir(dir: &Path) -> PathBuf {
        dir.join("next")
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The one place where the root's key signs what is no certificate.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, AuthorityError> {
        Ok(SigningKey::sign(&self.key, message).map_err(|e| self.key.why(e))?)
    }

    /// The one place where the root's key signs a certificate for somebody else's key.
    fn certify(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key)?;
        Ok(params.clone().signed_by(key, &issuer).map_err(|e| self.key.why(e))?.der().clone())
    }

    /// A cluster's intermediate of another root, signed by this one: same name, same tag, same key. It must be in the
    /// register: whoever holds a certificate of a key that never was is given none.
    pub fn reissue(
        &self,
        intermediate: &[u8],
        register: &[RegistryEntry],
        now: Duration,
    ) -> Result<Reissued, AuthorityError> {
        let refuse = |reason: &str| AuthorityError::Reissue(reason.to_owned());
        let ClusterBinding { cluster, tag } =
            binding_of(intermediate).ok_or_else(|| refuse("it is bound to no cluster"))?;
        let spki = spki_of(intermediate).ok_or_else(|| refuse("it does not parse"))?;
        let key = SubjectPublicKeyInfo::from_der(&spki)?;
        let name = hex::encode(Sha256::digest(key.der_bytes()));
        let known = register
            .iter()
            .any(|e| e.name == cluster && e.tag == tag && e.spki_sha256 == name && !e.superseded);
        if !known {
            return Err(refuse(&format!("the key of {cluster} ({tag}) is not in registry.json")));
        }
        // As when it was made: leaves name their issuer by it.
        let mut params = signer_params(&self.trust_domain, String::new(), 0);
        adopt::named_like(&mut params, &CertificateDer::from(intermediate))?;
        validity(&mut params, now, INTERMEDIATE_LIFE);
        let binding = ClusterBinding { cluster: cluster.clone(), tag };
        params.custom_extensions = vec![CustomExtension::from_oid_content(OID, binding.to_der())];
        params.use_authority_key_identifier_extension = true;
        Ok(Reissued { cluster, tag, certificate: self.certify(&params, &key)? })
    }

    /// The successor's name and key, signed by this root: leads whoever knows only this one to the successor.
    pub fn cross_sign(
        &self,
        successor: &CertificateDer<'_>,
        now: Duration,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let damaged = || AuthorityError::Reissue("the successor's certificate does not parse".to_owned());
        let (_, certificate) = X509Certificate::from_der(successor).map_err(|_| damaged())?;
        let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        let key = SubjectPublicKeyInfo::from_der(certificate.public_key().raw)?;
        let mut params = signer_params(&self.trust_domain, name.ok_or_else(damaged)?.to_owned(), 1);
        validity(&mut params, now, CROSS_LIFE);
        params.use_authority_key_identifier_extension = true;
        self.certify(&params, &key)
    }

    /// Signs an update as every one of `roots`.
    pub fn sign_update(update: &TrustUpdate, roots: &[&Self]) -> Result<SignedUpdate, AuthorityError> {
        let payload = rotation::payload(update);
        let signatures = roots
            .iter()
            .map(|root| Ok((rotation::sha256(&root.certificate), root.sign(&payload)?)))
            .collect::<Result<Vec<_>, AuthorityError>>()?;
        Ok(SignedUpdate::new(payload, signatures))
    }

    /// What clusters that are made from now on are told to trust.
    pub fn keep_bundle(&mut self, bundle: &TrustBundle) -> Result<(), AuthorityError> {
        files::write_atomic(&self.dir.join(BUNDLE), bundle.to_json().as_bytes(), 0o644)?;
        self.bundle = bundle.clone();
        Ok(())
    }

    /// The roots that were in the place of the one in `dir`, as far as they read.
    pub fn retired(dir: &Path) -> Vec<CertificateDer<'static>> {
        let listed = fs::read_dir(dir.join("retired")).into_iter().flatten().flatten();
        let read = |path: PathBuf| CertificateDer::from_pem_slice(&files::read(&path, MAX_FILE).ok()?).ok();
        listed.filter_map(|entry| read(entry.path().join("root.crt"))).collect()
    }

    /// Puts the successor in the place of the root in `dir`. Repeating it after a crash ends where it would have ended;
    /// without a successor there is nothing to do.
    pub fn promote(dir: &Path, retired_fingerprint: &str) -> Result<(), AuthorityError> {
        let next = Self::next_dir(dir);
        // Taken out of its place whole, before it is taken apart: half a successor would be mistaken for one without a file.
        let emptied = dir.join("retired").join("emptied");
        let remove = |path: &Path| match fs::remove_dir_all(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(FileError::new("can't remove", path)(error))
            }
            _ => Ok(()),
        };
        remove(&emptied)?;
        if !next.exists() {
            return Ok(());
        }
        let name: String = retired_fingerprint.chars().filter(char::is_ascii_alphanumeric).collect();
        let retired = dir.join("retired").join(name);
        if !retired.exists() {
            // Whole or not at all: a repetition must not take the successor for the old root.
            let partial = dir.join("retired").join("partial");
            files::private_dir(&partial)?;
            copy_root_files(dir, &partial)?;
            fs::rename(&partial, &retired).map_err(FileError::new("can't rename", &partial))?;
        }
        copy_root_files(&next, dir)?;
        // A successor behind a program has no file: the old key's must not be taken for it.
        let (held, stale) = (next.join("root.key"), dir.join("root.key"));
        if !held.exists() && stale.exists() {
            fs::remove_file(&stale).map_err(FileError::new("can't remove", &stale))?;
        }
        fs::rename(&next, &emptied).map_err(FileError::new("can't rename", &next))?;
        Ok(remove(&emptied)?)
    }
}

/// Copies `root.*`: the key, in whatever form, and the certificate.
fn copy_root_files(from: &Path, to: &Path) -> Result<(), AuthorityError> {
    let listed = fs::read_dir(from).map_err(FileError::new("can't read", from))?;
    for entry in listed {
        let entry = entry.map_err(FileError::new("can't read", from))?;
        let name = entry.file_name();
        if !name.to_string_lossy().starts_with("root.") {
            continue;
        }
        let content = zeroize::Zeroizing::new(files::read(&entry.path(), MAX_FILE)?);
        let mode = if name == "root.crt" { 0o644 } else { 0o600 };
        files::write_atomic(&to.join(&name), &content, mode)?;
    }
    Ok(())
}

/// The bundle beside the root, or that of a root that was never rotated.
pub(super) fn bundle_of(
    dir: &Path,
    trust_domain: &crate::spiffe_id::TrustDomain,
    certificate: &CertificateDer<'static>,
) -> Result<TrustBundle, AuthorityError> {
    let path = dir.join(BUNDLE);
    if !path.exists() {
        let roots = vec![certificate.clone()];
        return Ok(TrustBundle { trust_domain: trust_domain.clone(), sequence: 1, roots });
    }
    let damaged = |reason: String| AuthorityError::Damaged { path: path.clone(), reason };
    let text = String::from_utf8(files::read(&path, MAX_FILE)?).map_err(|e| damaged(e.to_string()))?;
    TrustBundle::from_json(trust_domain.clone(), &text).map_err(|e| damaged(e.to_string()))
}
