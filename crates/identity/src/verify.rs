//! Authentication: how a certificate chain becomes a [`PeerIdentity`] (X509-SVID specification, section 5).
//!
//! Rules, in order: one URI SAN that is a SPIFFE ID with a path; leaf not a CA, may sign digitally and nothing else;
//! a path to a root in the bundle of the *peer's own* trust domain; the issuing intermediate carries no SPIFFE ID with
//! a path and is bound to a cluster, and the leaf lies in that cluster; nobody has revoked it. Authorisation is somebody else's.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::*;
use x509_parser::public_key::PublicKey;

use crate::bundle::{BundleSet, TrustBundle};
use crate::cluster_binding::{ClusterBinding, OID_TEXT};
use crate::spiffe_id::{SpiffeId, TrustDomain};

/// Leaf, intermediate, root, and one spare: a longer chain only costs CPU.
pub const MAX_CHAIN: usize = 4;
/// An identity that has ended is renewed by possession of its key for this long: a machine that was off over a long holiday
/// comes back by itself.
pub const RENEWABLE_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why a chain was refused, one variant per rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("the peer showed no certificate")]
    NoCertificate,
    #[error("the chain has {0} certificates, at most {MAX_CHAIN}")]
    ChainTooLong(usize),
    #[error("a certificate does not parse: {0}")]
    Malformed(String),
    #[error("the leaf has {0} URI SANs, exactly one is allowed")]
    UriSans(usize),
    #[error("the leaf's URI SAN is not a SPIFFE ID: {0}")]
    SpiffeId(String),
    #[error("the leaf's SPIFFE ID {0} has no path: that is a signer's")]
    NoPath(SpiffeId),
    #[error("the leaf of {0} is a CA")]
    LeafIsCa(SpiffeId),
    #[error(
        "the leaf of {id} has key usage {found}: digitalSignature is needed, keyCertSign and cRLSign are forbidden"
    )]
    KeyUsage { id: SpiffeId, found: String },
    #[error("the leaf of {0} has a weak key: RSA needs 2048 bits")]
    WeakKey(SpiffeId),
    #[error("there is no trust bundle for trust domain {0}")]
    UnknownTrustDomain(TrustDomain),
    #[error("the bundle of trust domain {0} is empty: everything of it is revoked")]
    EmptyBundle(TrustDomain),
    #[error("the leaf of {id} does not chain to a root of its trust domain: {reason}")]
    Path { id: SpiffeId, reason: String },
    #[error("the leaf of {0} has expired")]
    Expired(SpiffeId),
    #[error("the leaf of {0} is not valid yet")]
    NotYetValid(SpiffeId),
    #[error("the issuer of {0} carries a SPIFFE ID with a path")]
    SignerPath(SpiffeId),
    #[error("the issuer of {0} is not bound to a cluster")]
    Unbound(SpiffeId),
    #[error("{id} lies outside its issuer's cluster {cluster}")]
    WrongCluster { id: SpiffeId, cluster: ClusterName },
    #[error("{id} is revoked ({revocation})")]
    Revoked { id: SpiffeId, revocation: Arc<str> },
}

impl IdentityError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::ChainTooLong(_) => "chain_too_long",
            Self::Malformed(_) => "malformed",
            Self::UriSans(_) => "uri_sans",
            Self::SpiffeId(_) => "spiffe_id",
            Self::NoPath(_) => "no_path",
            Self::LeafIsCa(_) => "leaf_is_ca",
            Self::KeyUsage { .. } => "key_usage",
            Self::WeakKey(_) => "weak_key",
            Self::UnknownTrustDomain(_) => "unknown_trust_domain",
            Self::EmptyBundle(_) => "empty_bundle",
            Self::Path { .. } => "path",
            Self::Expired(_) => "expired",
            Self::NotYetValid(_) => "not_yet_valid",
            Self::SignerPath(_) => "signer_path",
            Self::Unbound(_) => "unbound",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::Revoked { .. } => "revoked",
        }
    }
}

/// Who a peer has proven to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    pub spiffe_id: SpiffeId,
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    /// Big-endian, as in the certificate.
    pub serial: Vec<u8>,
    /// Unix seconds.
    pub not_after: i64,
    /// [`chain_hash`] of what was shown.
    pub chain_hash: [u8; 32],
    /// SHA-256 of the issuer's SubjectPublicKeyInfo.
    pub issuer_spki: [u8; 32],
}

/// Which side of TLS the chain was shown on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Usage {
    Server,
    Client,
}

fn malformed(error: impl ToString) -> IdentityError {
    IdentityError::Malformed(error.to_string())
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(malformed("trailing bytes")),
        Err(error) => Err(malformed(error)),
    }
}

pub(crate) fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, IdentityError> {
    let names = certificate.subject_alternative_name().map_err(malformed)?;
    let names = names.map(|san| san.value.general_names.as_slice()).unwrap_or_default();
    Ok(names.iter().filter_map(|n| if let GeneralName::URI(uri) = n { Some(*uri) } else { None }).collect())
}

pub(crate) fn spiffe_id(leaf: &X509Certificate<'_>) -> Result<SpiffeId, IdentityError> {
    let uris = uris(leaf)?;
    let [uri] = uris.as_slice() else { return Err(IdentityError::UriSans(uris.len())) };
    let id: SpiffeId =
        uri.parse().map_err(|e: crate::spiffe_id::SpiffeIdError| IdentityError::SpiffeId(e.to_string()))?;
    if id.path().is_empty() { Err(IdentityError::NoPath(id)) } else { Ok(id) }
}

pub(crate) fn check_leaf(leaf: &X509Certificate<'_>, id: &SpiffeId) -> Result<(), IdentityError> {
    if leaf.basic_constraints().map_err(malformed)?.is_some_and(|b| b.value.ca) {
        return Err(IdentityError::LeafIsCa(id.clone()));
    }
    let usage = leaf.key_usage().map_err(malformed)?;
    let good = usage.as_ref().is_some_and(|usage| {
        usage.value.digital_signature() && !usage.value.key_cert_sign() && !usage.value.crl_sign()
    });
    if !good {
        let found = usage.map_or("none".to_owned(), |usage| usage.value.to_string());
        return Err(IdentityError::KeyUsage { id: id.clone(), found });
    }
    match leaf.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < 2048 => Err(IdentityError::WeakKey(id.clone())),
        Ok(_) => Ok(()),
        Err(error) => Err(malformed(error)),
    }
}

/// SHA-256 over the SHA-256 of each certificate in turn: chains that differ anywhere hash differently.
pub fn chain_hash(chain: &[CertificateDer<'_>]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    chain.iter().for_each(|certificate| hasher.update(Sha256::digest(certificate)));
    hasher.finalize().into()
}

/// Reads who a chain that has been verified belongs to. Checks names and binding, not signatures or time.
pub fn peer_identity_from_certs(chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, IdentityError> {
    let [leaf_der, issuer_der, ..] = chain else {
        return Err(if chain.is_empty() {
            IdentityError::NoCertificate
        } else {
            malformed("no intermediate")
        });
    };
    let leaf = parse(leaf_der)?;
    let id = spiffe_id(&leaf)?;
    let issuer = parse(issuer_der)?;
    for uri in uris(&issuer)? {
        if uri.parse::<SpiffeId>().is_ok_and(|signer| !signer.path().is_empty()) {
            return Err(IdentityError::SignerPath(id));
        }
    }
    let mut bindings = issuer.extensions().iter().filter(|e| e.oid.to_id_string() == OID_TEXT);
    let binding = match (bindings.next(), bindings.next()) {
        (Some(extension), None) => ClusterBinding::from_der(extension.value),
        _ => None,
    };
    let Some(ClusterBinding { cluster, tag }) = binding else { return Err(IdentityError::Unbound(id)) };
    if id.cluster().as_ref() != Some(&cluster) {
        return Err(IdentityError::WrongCluster { id, cluster });
    }
    Ok(PeerIdentity {
        spiffe_id: id,
        cluster,
        tag,
        serial: leaf.raw_serial().to_vec(),
        not_after: leaf.validity().not_after.timestamp(),
        chain_hash: chain_hash(chain),
        issuer_spki: Sha256::digest(issuer.public_key().raw).into(),
    })
}

/// Authenticates a chain (leaf first) against the bundle of its own trust domain, at `now`.
pub fn authenticate(
    chain: &[CertificateDer<'_>],
    bundles: &BundleSet,
    usage: Usage,
    now: UnixTime,
) -> Result<PeerIdentity, IdentityError> {
    let (identity, _) = authenticate_unrevoked(chain, bundles, usage, now)?;
    match bundles.revocations().of(&identity) {
        Some(revocation) => {
            Err(IdentityError::Revoked { id: identity.spiffe_id, revocation: Arc::clone(revocation) })
        }
        None => Ok(identity),
    }
}

/// Authenticates whoever comes to renew: the leaf may have ended up to [`RENEWABLE_FOR`] ago, while its issuer must still
/// hold; every other rule is [`authenticate`]'s. Whether it is revoked is the caller's to ask, so that it can answer.
pub fn authenticate_lapsed(
    chain: &[CertificateDer<'_>],
    bundles: &BundleSet,
    usage: Usage,
    now: UnixTime,
) -> Result<PeerIdentity, IdentityError> {
    let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
    let ended = not_after(leaf)?;
    if now.as_secs() <= ended {
        return authenticate_unrevoked(chain, bundles, usage, now).map(|(identity, _)| identity);
    }
    let at = UnixTime::since_unix_epoch(Duration::from_secs(ended));
    let (identity, issuer) = authenticate_unrevoked(chain, bundles, usage, at)?;
    if now.as_secs() - ended > RENEWABLE_FOR.as_secs() {
        return Err(IdentityError::Expired(identity.spiffe_id));
    }
    // The certificate that the leaf was judged by, or one of its key that a root has signed anew.
    let of_its_key = |der: &&CertificateDer<'_>| {
        let spki = parse(der).map(|c| <[u8; 32]>::from(Sha256::digest(c.public_key().raw)));
        spki.is_ok_and(|spki| spki == identity.issuer_spki)
    };
    let reissued = bundles.reissued().iter().filter(of_its_key);
    let mut issuers = std::iter::once(issuer).chain(reissued);
    if issuers.any(|der| not_after(der).is_ok_and(|until| now.as_secs() <= until)) {
        return Ok(identity);
    }
    let reason = "its issuer has ended meanwhile".to_owned();
    Err(IdentityError::Path { id: identity.spiffe_id, reason })
}

/// The identity, and the certificate of its issuer that it was judged by.
fn authenticate_unrevoked<'a>(
    chain: &'a [CertificateDer<'a>],
    bundles: &'a BundleSet,
    usage: Usage,
    now: UnixTime,
) -> Result<(PeerIdentity, &'a CertificateDer<'a>), IdentityError> {
    if chain.len() > MAX_CHAIN {
        return Err(IdentityError::ChainTooLong(chain.len()));
    }
    let leaf_der = chain.first().ok_or(IdentityError::NoCertificate)?;
    let leaf = parse(leaf_der)?;
    let id = spiffe_id(&leaf)?;
    check_leaf(&leaf, &id)?;
    let domain = id.trust_domain();
    let bundle = bundles.get(&domain).ok_or_else(|| IdentityError::UnknownTrustDomain(domain.clone()))?;
    if bundle.roots.is_empty() {
        return Err(IdentityError::EmptyBundle(domain));
    }
    match check_path(chain, &bundle.roots, &id, usage, now) {
        Ok(()) => {
            let identity = peer_identity_from_certs(chain)?;
            chain.get(1).map(|issuer| (identity, issuer)).ok_or_else(|| malformed("no intermediate"))
        }
        Err(error) => by_reissued(chain, bundles, bundle, &id, usage, now).ok_or(error),
    }
}

/// Who shows an intermediate of a root that is trusted no more, where a trusted root has signed the same key and name
/// anew: a member that was away during a rotation comes back by it. Everything but the signature on the leaf is taken
/// from the certificate that is known here.
fn by_reissued<'a>(
    chain: &'a [CertificateDer<'a>],
    bundles: &'a BundleSet,
    bundle: &TrustBundle,
    id: &SpiffeId,
    usage: Usage,
    now: UnixTime,
) -> Option<(PeerIdentity, &'a CertificateDer<'a>)> {
    let [leaf, shown, ..] = chain else { return None };
    let named = |der: &CertificateDer<'_>| {
        let certificate = parse(der).ok()?;
        Some((certificate.public_key().raw.to_vec(), certificate.subject().as_raw().to_vec()))
    };
    let wanted = named(shown)?;
    let known = bundles.reissued().iter().find(|known| named(known).as_ref() == Some(&wanted))?;
    let better = [leaf.clone(), known.clone()];
    check_path(&better, &bundle.roots, id, usage, now).ok()?;
    let identity = peer_identity_from_certs(&better).ok()?;
    Some((PeerIdentity { chain_hash: chain_hash(chain), ..identity }, known))
}

/// RFC 5280 path validation by webpki: signatures, validity, CA bits, path lengths, extended key usage.
pub(crate) fn check_path(
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
    id: &SpiffeId,
    usage: Usage,
    now: UnixTime,
) -> Result<(), IdentityError> {
    let [leaf, intermediates @ ..] = chain else { return Err(IdentityError::NoCertificate) };
    let anchors: Vec<_> = roots.iter().filter_map(|root| anchor_from_trusted_cert(root).ok()).collect();
    let leaf = EndEntityCert::try_from(leaf).map_err(malformed)?;
    let usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    // The intermediate that webpki used must be the one whose binding is read: the first after the leaf.
    let first_issuer = intermediates.first().map(|der| der.as_ref().to_vec());
    let same_issuer = |path: &webpki::VerifiedPath<'_>| {
        let used = path.intermediate_certificates().next().map(|cert| cert.der().as_ref().to_vec());
        if used == first_issuer { Ok(()) } else { Err(webpki::Error::UnknownIssuer) }
    };
    leaf.verify_for_usage(algorithms, &anchors, intermediates, now, usage, None, Some(&same_issuer))
        .map(drop)
        .map_err(|error| match error {
            webpki::Error::CertExpired { .. } => IdentityError::Expired(id.clone()),
            webpki::Error::CertNotValidYet { .. } => IdentityError::NotYetValid(id.clone()),
            error => IdentityError::Path { id: id.clone(), reason: error.to_string() },
        })
}

/// Whether the holder of the leaf's key signed `message`. ECDSA P-256 with SHA-256, P-384 with SHA-384, and Ed25519:
/// the keys that leaves are issued for. Each key has one scheme, so none is named on the wire.
pub fn signed_by_leaf(leaf: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    use webpki::aws_lc_rs::{ECDSA_P256_SHA256, ECDSA_P384_SHA384, ED25519};
    let Ok(leaf) = EndEntityCert::try_from(leaf) else { return false };
    // An algorithm of another key's type refuses before it computes anything.
    [ECDSA_P256_SHA256, ECDSA_P384_SHA384, ED25519]
        .into_iter()
        .any(|algorithm| leaf.verify_signature(algorithm, message, signature).is_ok())
}

/// Seconds since the epoch as the verifier's time.
pub fn unix_time(since_epoch: Duration) -> UnixTime {
    UnixTime::since_unix_epoch(since_epoch)
}

/// Whether a certificate names itself as its issuer, as roots do.
pub(crate) fn is_self_named(certificate: &[u8]) -> bool {
    parse(certificate).is_ok_and(|certificate| certificate.subject() == certificate.issuer())
}

/// The end of a certificate's validity (DER), unix seconds.
pub fn not_after(certificate: &[u8]) -> Result<u64, IdentityError> {
    let certificate = parse(certificate)?;
    Ok(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0))
}
