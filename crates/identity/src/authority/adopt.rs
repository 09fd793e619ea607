//! An intermediate whose key a foreign authority (SPIRE, a company's PKI) has certified too.
//!
//! ```text
//!   federation's root                    foreign authority
//!        | {key, cluster, tag}                 | certificate for ca.csr
//!        v                                     v
//!     ca.crt  <------ same key and name ---->  upstream.crt
//!        |                                     |
//!        +-------------- leaves ---------------+
//! ```
//! What the root signs is a certificate for the same key, under the same name, bound to the cluster: the signed record of
//! whose the key is. The mesh believes that one alone, so nothing that the foreign authority signs for anybody else is
//! believed, and its end or its silence ends nothing here. Applications are shown both, and whoever knows the foreign
//! authority alone believes their leaves by its certificate.

use std::path::Path;
use std::time::Duration;

use rcgen::string::{Ia5String, PrintableString};
use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyIdMethod, SubjectPublicKeyInfo};
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tombolo_model::names::ClusterName;
use x509_parser::asn1_rs::Tag;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{ASN1Time, X509Certificate};
use x509_parser::x509::X509Name;

use super::csr::SignedCluster;
use super::{AuthorityError, Certified, ClusterFile, Existing, MAX_FILE, RootAuthority, pem};
use crate::files;
use crate::spiffe_id::SpiffeId;
use crate::verify;

/// A leaf, the root's certificate and these make [`verify::MAX_CHAIN`].
const MAX_UPSTREAM: usize = verify::MAX_CHAIN - 2;
const MAX_ROOTS: usize = 8;
/// In the cluster's directory, beside `ca.crt`.
const CHAIN: &str = "upstream.crt";
const ROOTS: &str = "upstream-roots.crt";

/// What a foreign authority has signed for a cluster's key, and by what that is judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// The intermediate first, then those above it; no root.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, AuthorityError> {
    Err(AuthorityError::Adopt(reason.into()))
}

fn parse<'a>(der: &'a CertificateDer<'_>, what: &str) -> Result<X509Certificate<'a>, AuthorityError> {
    verify::parse(der).map_err(|e| AuthorityError::Adopt(format!("{what}: {e}")))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let pem = files::read(path, MAX_FILE)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match read {
        Ok(read) if !read.is_empty() => Ok(read),
        _ => refuse(format!("{} holds no certificates in PEM", path.display())),
    }
}

impl Upstream {
    /// From PEM files: the chain that the foreign authority gave, and its roots.
    pub fn read(chain: &Path, roots: &Path) -> Result<Self, AuthorityError> {
        let (mut chain, roots) = (certificates(chain)?, certificates(roots)?);
        // Authorities hand out their root with the chain; it is of no use in it.
        chain.retain(|certificate| !roots.contains(certificate));
        if chain.is_empty() || chain.len() > MAX_UPSTREAM || roots.len() > MAX_ROOTS {
            return refuse(format!(
                "{} certificates below {} roots: 1 to {MAX_UPSTREAM} below at most {MAX_ROOTS} can be used",
                chain.len(),
                roots.len()
            ));
        }
        Ok(Self { chain, roots })
    }

    /// Of a cluster's directory; `None` where no foreign authority is above it.
    pub fn load(dir: &Path) -> Result<Option<Self>, AuthorityError> {
        if !dir.join(CHAIN).exists() {
            return Ok(None);
        }
        Self::read(&dir.join(CHAIN), &dir.join(ROOTS)).map(Some)
    }

    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        let text = |list: &[CertificateDer<'_>]| list.iter().map(pem).collect::<String>();
        files::write_atomic(&dir.join(CHAIN), text(&self.chain).as_bytes(), 0o644)?;
        Ok(files::write_atomic(&dir.join(ROOTS), text(&self.roots).as_bytes(), 0o644)?)
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// What is shown beside a leaf of this intermediate at `now`: nothing where it is about another key or name, or where any of
    /// it has ended.
    pub fn beside(&self, intermediate: &CertificateDer<'_>, now: Duration) -> &[CertificateDer<'static>] {
        let same = |first: &CertificateDer<'_>| {
            let (Ok(a), Ok(b)) = (verify::parse(first), verify::parse(intermediate)) else { return false };
            a.public_key().raw == b.public_key().raw && a.subject().as_raw() == b.subject().as_raw()
        };
        let lives =
            |der: &CertificateDer<'static>| verify::not_after(der).is_ok_and(|end| end > now.as_secs());
        let fits = self.chain.first().is_some_and(same) && self.chain.iter().all(lives);
        if fits { &self.chain } else { &[] }
    }

    /// Whether each is a CA, valid, and signed by the next, the last by one of the roots.
    fn check(&self, now: Duration) -> Result<(), AuthorityError> {
        let now = ASN1Time::from_timestamp(i64::try_from(now.as_secs()).unwrap_or(i64::MAX))
            .map_err(|e| AuthorityError::Adopt(e.to_string()))?;
        let usable = |found: &X509Certificate<'_>, what: &str| {
            let constraints = found.basic_constraints().ok().flatten();
            let usage = found.key_usage().ok().flatten();
            if !constraints.is_some_and(|b| b.value.ca) || usage.is_some_and(|u| !u.value.key_cert_sign()) {
                return refuse(format!("{what} ({}) is no CA", found.subject()));
            }
            if !found.validity().is_valid_at(now) {
                return refuse(format!("{what} ({}) is not valid now", found.subject()));
            }
            Ok(())
        };
        for (index, der) in self.chain.iter().enumerate() {
            let what = format!("certificate {} of the chain", index + 1);
            let found = parse(der, &what)?;
            usable(&found, &what)?;
            let above = self.chain.get(index + 1).map_or(self.roots.as_slice(), std::slice::from_ref);
            let signed = above.iter().any(|issuer| {
                let Ok(issuer) = verify::parse(issuer) else { return false };
                usable(&issuer, "the authority").is_ok()
                    && found.issuer().as_raw() == issuer.subject().as_raw()
                    && found.verify_signature(Some(issuer.public_key())).is_ok()
            });
            if !signed {
                return refuse(format!(
                    "{what} ({}) is signed neither by the next one nor by a root that is given",
                    found.subject()
                ));
            }
        }
        Ok(())
    }
}

/// The name as it stands in a certificate. Rarer kinds of it are refused: one that came out otherwise would make leaves that do not
/// chain to the certificate that it was taken from.
fn name(subject: &X509Name<'_>) -> Result<DistinguishedName, AuthorityError> {
    let odd = || AuthorityError::Adopt(format!("its name ({subject}) is of a kind that can't be repeated"));
    let mut name = DistinguishedName::new();
    for set in subject.iter() {
        let mut attributes = set.iter();
        let (Some(attribute), None) = (attributes.next(), attributes.next()) else { return Err(odd()) };
        let oid: Vec<u64> = attribute.attr_type().iter().ok_or_else(odd)?.collect();
        let value = attribute.attr_value();
        let text = std::str::from_utf8(value.data).map_err(|_| odd())?;
        let value = match value.header.tag() {
            Tag::Utf8String => DnValue::Utf8String(text.to_owned()),
            Tag::PrintableString => {
                DnValue::PrintableString(PrintableString::try_from(text).map_err(|_| odd())?)
            }
            Tag::Ia5String => DnValue::Ia5String(Ia5String::try_from(text).map_err(|_| odd())?),
            _ => return Err(odd()),
        };
        name.push(DnType::from_oid(&oid), value);
    }
    Ok(name)
}

/// Gives the certificate to be made the name and the key identifier of one for the same key, so that leaves chain to both.
pub(super) fn named_like(
    params: &mut CertificateParams,
    like: &CertificateDer<'_>,
) -> Result<(), AuthorityError> {
    let certificate = parse(like, "it")?;
    params.distinguished_name = name(certificate.subject())?;
    let ids = certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    if let Some(id) = ids {
        params.key_identifier_method = KeyIdMethod::PreSpecified(id);
    }
    Ok(())
}

/// Whether two certificates have one name, byte for byte.
pub(super) fn same_name(a: &CertificateDer<'_>, b: &CertificateDer<'_>) -> bool {
    match (verify::parse(a), verify::parse(b)) {
        (Ok(a), Ok(b)) => a.subject().as_raw() == b.subject().as_raw(),
        _ => false,
    }
}

impl RootAuthority {
    /// Binds a key that a foreign authority has certified to a cluster, and registers it.
    pub fn adopt(
        &mut self,
        cluster: &ClusterName,
        upstream: &Upstream,
        existing: Existing,
        now: Duration,
    ) -> Result<SignedCluster, AuthorityError> {
        upstream.check(now)?;
        let Some(first) = upstream.chain.first() else { return refuse("the chain is empty") };
        let certificate = parse(first, "it")?;
        for uri in verify::uris(&certificate).map_err(|e| AuthorityError::Adopt(e.to_string()))? {
            let own = uri
                .parse::<SpiffeId>()
                .is_ok_and(|id| id.trust_domain() == self.trust_domain && id.path().is_empty());
            if !own {
                return refuse(format!(
                    "it is a signer's for {uri}, not for spiffe://{}: the foreign authority must have the federation's trust domain",
                    self.trust_domain
                ));
            }
        }
        let key = SubjectPublicKeyInfo::from_der(certificate.public_key().raw)
            .map_err(|e| AuthorityError::Adopt(format!("its key: {e}")))?;
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return refuse("its key is not ECDSA P-256: sign what `tombolo trust csr` wrote");
        }
        let Certified { tag, certificate } =
            self.certify_cluster(cluster, &key, Some(first), existing, now)?;
        let file = ClusterFile { name: cluster.clone(), tag, trust_domain: self.trust_domain.clone() };
        Ok(SignedCluster {
            cluster: cluster.clone(),
            tag,
            file,
            certificate,
            bundle: self.bundle(),
            upstream: Some(upstream.clone()),
        })
    }
}

#[cfg(test)]
mod tests;
