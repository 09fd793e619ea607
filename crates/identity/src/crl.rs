//! Certificate revocation lists (RFC 5280 section 5) of a cluster's intermediate, for verifiers that are not ours.
//!
//! Our own verifiers ask [`Revocations`](crate::Revocations); nothing here reads a list.

use std::time::Duration;

use rcgen::{
    CertificateRevocationListParams, Issuer, KeyIdMethod, PublicKeyData, RevocationReason, RevokedCertParams,
    SerialNumber,
};
use sha2::{Digest, Sha256};

use crate::authority::offset;
use crate::issuer::{IssueError, LeafIssuer};

/// 40 bytes each: 8 MB, what readers bear. A cluster of 100,000 workloads that is revoked as a whole fits.
pub const MAX_ENTRIES: usize = 200_000;

/// One certificate that is revoked.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RevokedSerial {
    /// Big-endian, as in the certificate.
    pub serial: Vec<u8>,
    /// Unix seconds.
    pub since: u64,
}

impl LeafIssuer {
    /// SHA-256 of the issuing key, hex: names who has issued what.
    pub fn spki_sha256(&self) -> String {
        hex::encode(Sha256::digest(self.key.der_bytes()))
    }

    /// A list of these, good for `life`, DER. `number` must grow from list to list.
    pub fn sign_crl(
        &self,
        revoked: &[RevokedSerial],
        number: u64,
        now: Duration,
        life: Duration,
    ) -> Result<Vec<u8>, IssueError> {
        if revoked.len() > MAX_ENTRIES {
            let text = format!("{} revoked certificates, a list has at most {MAX_ENTRIES}", revoked.len());
            return Err(IssueError::Sign(text));
        }
        let entry = |RevokedSerial { serial, since }: &RevokedSerial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: offset(Duration::from_secs(*since)),
            // Why is the operators' matter.
            reason_code: None::<RevocationReason>,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            // Backdated like certificates: clocks are off by up to ten minutes.
            this_update: offset(now.saturating_sub(crate::authority::BACKDATE)),
            next_update: offset(now + life),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let sign = |e: rcgen::Error| IssueError::Sign(e.to_string());
        let issuer = Issuer::from_ca_cert_der(&self.material.certificate, &*self.key).map_err(sign)?;
        Ok(params.signed_by(&issuer).map_err(sign)?.der().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

    use super::*;
    use crate::authority::{Existing, RootAuthority};

    const NOW: Duration = Duration::from_secs(1_795_486_505);

    #[test]
    fn a_list_is_signed_by_its_issuer_names_the_serials_and_says_when_the_next_one_comes() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = RootAuthority::init(&dir.path().join("t"), "a.example".parse().unwrap(), NOW).unwrap();
        let mut sign = |name: &str| {
            let material = root.sign_cluster(&name.parse().unwrap(), Existing::Refuse, NOW).unwrap();
            LeafIssuer::new(material).unwrap()
        };
        let (east, west) = (sign("east"), sign("west"));
        assert_ne!(east.spki_sha256(), west.spki_sha256());
        let revoked = [RevokedSerial { serial: vec![0x7a, 1], since: 1_795_000_000 }];
        for entries in [&revoked[..], &[]] {
            let der = east.sign_crl(entries, 9, NOW, Duration::from_secs(3600)).unwrap();
            let (rest, list) = CertificateRevocationList::from_der(&der).unwrap();
            assert!(rest.is_empty());
            let key = |issuer: &LeafIssuer| {
                let (_, certificate) = X509Certificate::from_der(&issuer.material.certificate).unwrap();
                list.verify_signature(certificate.public_key()).is_ok()
            };
            assert!(key(&east) && !key(&west));
            let serials: Vec<_> = list.iter_revoked_certificates().map(|r| r.raw_serial().to_vec()).collect();
            assert_eq!(serials, entries.iter().map(|e| e.serial.clone()).collect::<Vec<_>>());
            assert_eq!(list.next_update().unwrap().timestamp(), NOW.as_secs() as i64 + 3600);
            assert_eq!(list.crl_number().unwrap().to_string(), "9");
        }
        let bomb = vec![revoked[0].clone(); MAX_ENTRIES + 1];
        assert!(east.sign_crl(&bomb, 9, NOW, Duration::ZERO).is_err());
    }
}
