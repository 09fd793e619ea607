//! Trust updates: which roots a federation trusts from now on, signed by a root that it trusts already. Pure.
//!
//! A rotation of the root is three of them (both roots; intermediates of the new root; the new root alone). Since a root
//! signs, nobody who carries one need be trusted: federators take it from an operator or from any linked peer, check it
//! here, and pass it on. Only certificates travel. The bytes, integers big-endian:
//!
//! ```text
//!  signed   u32 length | payload | u8 count | count times { SHA-256 of the root's certificate (32) | u16 length | signature }
//!  payload  "tombolo trust update v1" 0x00 | u8 length | trust domain | u64 sequence
//!           | u8 count | roots         { u16 length | DER }
//!           | u8 count | crosses       { u16 length | DER }
//!           | u16 count | intermediates { u8 length | cluster | u32 tag | u16 length | DER }
//! ```
//! What is signed is the payload; its label keeps it apart from certificates, which begin with 0x30. The order of a
//! rotation lets every update carry a signature of the old and of the new root, so that whoever trusts either takes it.
//!
//! A *cross* is a root's key and name, signed by the root before it: shown with a chain, it leads whoever missed the
//! rotation from the root that they know to the one that is in use. An *intermediate* is a cluster's CA key signed anew.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use crate::bundle::TrustBundle;
use crate::cluster_binding::{ClusterBinding, OID_TEXT};
use crate::spiffe_id::TrustDomain;
use crate::verify::signed_by_leaf;

mod codec;
#[cfg(test)]
mod tests;

pub use codec::SignedUpdate;
pub(crate) use codec::payload;

/// A federation's record holds 64 KB; an intermediate has 550 bytes, so this is a hundred clusters.
pub const MAX_UPDATE_BYTES: usize = 60 * 1024;
/// The root in use, the one before, and as many to come.
pub const MAX_ROOTS: usize = 4;

/// What a federation is told to trust.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustUpdate {
    pub trust_domain: TrustDomain,
    /// Grows with every update; a bundle of it carries the same number.
    pub sequence: u64,
    pub roots: Vec<CertificateDer<'static>>,
    pub crosses: Vec<CertificateDer<'static>>,
    pub intermediates: Vec<Reissued>,
}

/// A cluster's CA key, signed anew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reissued {
    pub cluster: ClusterName,
    pub tag: ClusterTag,
    pub certificate: CertificateDer<'static>,
}

impl TrustUpdate {
    pub fn bundle(&self) -> TrustBundle {
        TrustBundle {
            trust_domain: self.trust_domain.clone(),
            sequence: self.sequence,
            roots: self.roots.clone(),
        }
    }
}

/// Why an update was refused; what was trusted before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    #[error("the trust update has {0} bytes, at most {MAX_UPDATE_BYTES}")]
    TooLarge(usize),
    #[error("the trust update does not read: {0}")]
    Malformed(&'static str),
    #[error("the trust update is of trust domain {found}, not of {own}")]
    Foreign { own: TrustDomain, found: TrustDomain },
    #[error(
        "the trust update (sequence {0}) is not signed by a root that is trusted here: an earlier one is missing; run `tombolo trust deliver` for this cluster"
    )]
    Unsigned(u64),
    #[error("the trust update has sequence {found}, and {held} is held already")]
    Old { held: u64, found: u64 },
    #[error(
        "another trust update with sequence {0} is held already: two copies of the root's directory have been used"
    )]
    Conflict(u64),
    #[error("the trust update names {0} roots, 1 to {MAX_ROOTS} are allowed")]
    Roots(usize),
    #[error("a certificate of the trust update can't be used ({what}): {reason}")]
    Certificate { what: String, reason: &'static str },
    #[error(
        "the trust update would leave {cluster} without a certificate of a trusted root: run `tombolo trust cluster {cluster} --renew`, give the federator what it wrote, and run `tombolo trust reload`"
    )]
    Stranded { cluster: ClusterName },
}

impl UpdateError {
    /// Every [`Self::kind`].
    pub const KINDS: [&'static str; 9] = [
        "too_large",
        "malformed",
        "foreign",
        "unsigned",
        "old",
        "conflict",
        "roots",
        "certificate",
        "stranded",
    ];

    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "too_large",
            Self::Malformed(_) => "malformed",
            Self::Foreign { .. } => "foreign",
            Self::Unsigned(_) => "unsigned",
            Self::Old { .. } => "old",
            Self::Conflict(_) => "conflict",
            Self::Roots(_) => "roots",
            Self::Certificate { .. } => "certificate",
            Self::Stranded { .. } => "stranded",
        }
    }
}

/// What is trusted now, which an update is held against.
#[derive(Clone, Copy, Debug)]
pub struct Held<'a> {
    pub bundle: &'a TrustBundle,
    /// The update that the bundle came with, if it came with one.
    pub update: Option<&'a [u8]>,
}

/// Judges an update. `None`: it is the one that is held.
pub fn accept(bytes: &[u8], held: Held<'_>, now: Duration) -> Result<Option<TrustUpdate>, UpdateError> {
    let signed = SignedUpdate::from_bytes(bytes)?;
    let update = signed.read()?;
    let bundle = held.bundle;
    if update.trust_domain != bundle.trust_domain {
        return Err(UpdateError::Foreign { own: bundle.trust_domain.clone(), found: update.trust_domain });
    }
    // Before anything that costs a signature: what peers hold is usually what is held here.
    if held.update == Some(bytes) {
        return Ok(None);
    }
    if update.sequence < bundle.sequence {
        return Err(UpdateError::Old { held: bundle.sequence, found: update.sequence });
    }
    if !bundle.roots.iter().any(|root| is_current(root, now) && signed.is_signed_by(root)) {
        return Err(UpdateError::Unsigned(update.sequence));
    }
    // A cluster that was made after it holds its bundle already, and the rest comes with it.
    let completes = held.update.is_none() && update.roots == bundle.roots;
    if update.sequence == bundle.sequence && !completes {
        return Err(UpdateError::Conflict(update.sequence));
    }
    check_contents(&update, now)?;
    Ok(Some(update))
}

/// Whether every certificate is what it says it is.
pub fn check_contents(update: &TrustUpdate, now: Duration) -> Result<(), UpdateError> {
    let refuse = |what: &str, reason| Err(UpdateError::Certificate { what: what.to_owned(), reason });
    if update.roots.is_empty() || update.roots.len() > MAX_ROOTS {
        return Err(UpdateError::Roots(update.roots.len()));
    }
    for root in &update.roots {
        if !is_issued_by(root, root, now) {
            return refuse("a root", "it is not a CA that has signed itself, or not valid now");
        }
    }
    for cross in &update.crosses {
        let names = |der: &CertificateDer<'_>| {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            Some((certificate.subject().as_raw().to_vec(), certificate.public_key().raw.to_vec()))
        };
        let found = names(cross);
        if found.is_none() || !update.roots.iter().any(|root| names(root) == found) {
            return refuse("a cross certificate", "it has not the name and key of one of the roots");
        }
    }
    for Reissued { cluster, tag, certificate } in &update.intermediates {
        let what = format!("the intermediate of {cluster}");
        // One whose time is over is of no use any more, and no reason to refuse the others.
        if !update.roots.iter().any(|root| is_signed_by(certificate, root)) {
            return refuse(&what, "no root of the update has signed it");
        }
        let binding = ClusterBinding { cluster: cluster.clone(), tag: *tag };
        if binding_of(certificate).as_ref() != Some(&binding) {
            return refuse(&what, "it is bound to another cluster or tag");
        }
    }
    Ok(())
}

/// Of the certificates for one CA key that are at hand, the one to issue with: bound to this cluster, of a trusted root,
/// valid, of the last root that is listed (a new one follows the one that goes), and the newest of those. `None`: the cluster would be cut off.
pub fn choose_intermediate<'a>(
    candidates: impl IntoIterator<Item = &'a CertificateDer<'static>>,
    spki: &[u8],
    binding: &ClusterBinding,
    roots: &[CertificateDer<'_>],
    now: Duration,
) -> Option<&'a CertificateDer<'static>> {
    let usable = candidates.into_iter().filter_map(|certificate| {
        let fits = spki_of(certificate).as_deref() == Some(spki)
            && binding_of(certificate).as_ref() == Some(binding);
        let root = roots.iter().rposition(|root| is_issued_by(certificate, root, now)).filter(|_| fits)?;
        Some(((root, not_before(certificate)), certificate))
    });
    usable.max_by_key(|(rank, _)| *rank).map(|(_, certificate)| certificate)
}

/// SubjectPublicKeyInfo, DER.
pub fn spki_of(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.public_key().raw.to_vec())
}

/// The cluster that an intermediate is bound to, if it is to exactly one.
pub fn binding_of(certificate: &[u8]) -> Option<ClusterBinding> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut bindings = certificate.extensions().iter().filter(|e| e.oid.to_id_string() == OID_TEXT);
    match (bindings.next(), bindings.next()) {
        (Some(extension), None) => ClusterBinding::from_der(extension.value),
        _ => None,
    }
}

/// The start of a certificate's validity, unix seconds; 0 where it does not parse.
pub fn not_before(certificate: &[u8]) -> u64 {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return 0 };
    u64::try_from(certificate.validity().not_before.timestamp()).unwrap_or(0)
}

/// The root of these that has signed an intermediate.
pub fn root_of<'a>(
    certificate: &[u8],
    roots: &'a [CertificateDer<'static>],
    now: Duration,
) -> Option<&'a CertificateDer<'static>> {
    roots.iter().find(|root| is_issued_by(certificate, root, now))
}

/// How a certificate is known in acknowledgements.
pub fn sha256(certificate: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

fn is_current(certificate: &[u8], now: Duration) -> bool {
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let Ok(now) = ASN1Time::from_timestamp(seconds) else { return false };
    X509Certificate::from_der(certificate).is_ok_and(|(_, found)| found.validity().is_valid_at(now))
}

/// Whether a CA certificate is valid and signed by `root`'s key, under `root`'s name, and `root` is valid too.
pub fn is_issued_by(certificate: &[u8], root: &CertificateDer<'_>, now: Duration) -> bool {
    is_current(certificate, now) && is_current(root, now) && is_signed_by(certificate, root)
}

/// The same, whatever the time is.
fn is_signed_by(certificate: &[u8], root: &CertificateDer<'_>) -> bool {
    let (Ok(([], issued)), Ok((_, issuer))) =
        (X509Certificate::from_der(certificate), X509Certificate::from_der(root))
    else {
        return false;
    };
    let is_ca = |certificate: &X509Certificate<'_>| {
        certificate.basic_constraints().ok().flatten().is_some_and(|b| b.value.ca)
    };
    issued.issuer().as_raw() == issuer.subject().as_raw()
        && is_ca(&issued)
        && is_ca(&issuer)
        && signed_by_leaf(root, issued.tbs_certificate.as_ref(), &issued.signature_value.data)
}
