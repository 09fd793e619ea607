//! A certificate for a server that is called by its DNS name, with a CA of its own that has signed nothing else.
//!
//! Whoever calls is handed the CA out of band. Its key is dropped as soon as it has signed: trusting the CA means trusting
//! this one certificate, and no key is left that could make another.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::authority::{BACKDATE, validity};
use crate::issuer::IssueError;

/// A certificate, its key and the CA that it is trusted by; PEM.
pub struct ServerCertificate {
    pub ca_pem: String,
    pub certificate_pem: String,
    pub key_pem: Zeroizing<String>,
}

/// Issues one for DNS `names` (RFC 5280 subjectAltName), good from a little before `now` (since the Unix epoch) for `life`.
pub fn issue(names: &[String], now: Duration, life: Duration) -> Result<ServerCertificate, IssueError> {
    let failed = |error: rcgen::Error| IssueError::Sign(error.to_string());
    let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed);
    // Each CA has a name of its own: several may be trusted at a time.
    let named = |what: &str| {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, format!("tombolo {what} {}", now.as_secs()));
        name
    };
    let ca_key = key()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name = named("CA");
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    validity(&mut ca, now, life);
    let ca_pem = ca.self_signed(&ca_key).map_err(failed)?.pem();
    let issuer = Issuer::from_params(&ca, &ca_key);
    let leaf_key = key()?;
    let mut leaf = CertificateParams::new(names.to_vec()).map_err(failed)?;
    leaf.distinguished_name = named("server");
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    leaf.use_authority_key_identifier_extension = true;
    validity(&mut leaf, now, life);
    let certificate_pem = leaf.signed_by(&leaf_key, &issuer).map_err(failed)?.pem();
    let key_pem = Zeroizing::new(leaf_key.serialize_pem());
    Ok(ServerCertificate { ca_pem, certificate_pem, key_pem })
}

/// What a certificate says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub names: Vec<String>,
    /// Unix seconds; [`issue`]'s `now`, for one that it has made.
    pub issued: u64,
    /// Unix seconds.
    pub not_after: u64,
}

/// Reads the first certificate of a PEM text; `None`: it is none.
pub fn describe(certificate_pem: &str) -> Option<Described> {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let names = certificate.subject_alternative_name().ok()?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    let dns = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    let validity = certificate.validity();
    Some(Described {
        names: dns.collect(),
        issued: u64::try_from(validity.not_before.timestamp()).ok()?.saturating_add(BACKDATE.as_secs()),
        not_after: u64::try_from(validity.not_after.timestamp()).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::{Error, RootCertStore};

    use super::*;
    use crate::tls;

    const NOW: Duration = Duration::from_secs(1_800_000_000);
    const DAY: Duration = Duration::from_secs(86_400);

    fn accepts(ca: &str, leaf: &str, name: &str, at: Duration) -> Result<(), Error> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider()).build().unwrap();
        let leaf = CertificateDer::from_pem_slice(leaf.as_bytes()).unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::since_unix_epoch(at)).map(drop)
    }

    #[test]
    fn a_certificate_is_good_for_its_names_in_its_time_by_its_own_ca_alone() {
        let names = ["webhook.system.svc".to_owned(), "webhook.system".to_owned()];
        let made = issue(&names, NOW, DAY).unwrap();
        let other = issue(&names, NOW, DAY).unwrap();
        let leaf = &made.certificate_pem;
        for name in &names {
            accepts(&made.ca_pem, leaf, name, NOW).unwrap();
        }
        accepts(&made.ca_pem, leaf, "other.system.svc", NOW).unwrap_err();
        accepts(&made.ca_pem, leaf, &names[0], NOW + DAY * 2).unwrap_err();
        accepts(&other.ca_pem, leaf, &names[0], NOW).unwrap_err();
        let described = describe(leaf).unwrap();
        let expected =
            Described { names: names.to_vec(), issued: NOW.as_secs(), not_after: (NOW + DAY).as_secs() };
        assert_eq!(described, expected);
        assert_eq!(describe("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), None);
    }
}
