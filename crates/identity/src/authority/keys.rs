//! Where the root's key lies: a plain file, a file under a passphrase, or behind a program.

use std::path::Path;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{AuthorityError, MAX_FILE, Protection, RootAuthority};
use crate::files;
use crate::signer::file::{self, FileSigner, SecretKey};
use crate::signer::{self, CaKey, Signer, SignerError};

/// A new key and what to write of it; nothing when it lies elsewhere.
pub(super) fn made(protection: Protection<'_>) -> Result<(CaKey, Option<Zeroizing<String>>), AuthorityError> {
    let fresh = || -> Result<(CaKey, Zeroizing<String>), AuthorityError> {
        let key = SecretKey::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let pem = Zeroizing::new(key.serialize_pem());
        Ok((CaKey::new(Box::new(FileSigner::new(key)?)), pem))
    };
    match protection {
        Protection::Plain => fresh().map(|(key, pem)| (key, Some(pem))),
        Protection::Passphrase(passphrase) => {
            let (key, pem) = fresh()?;
            Ok((key, Some(file::encrypt(&pem, passphrase)?)))
        }
        Protection::Signer(signer) => {
            signer::check_algorithm(signer.public_key(), "the signer's key")?;
            Ok((CaKey::new(signer), None))
        }
    }
}

/// The public key that a certificate is about.
fn public_of(certificate: &CertificateDer<'_>) -> Option<SubjectPublicKeyInfo> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    SubjectPublicKeyInfo::from_der(certificate.public_key().raw).ok()
}

/// Whether a certificate is about this key.
pub(super) fn is_about(certificate: &CertificateDer<'_>, key: &impl PublicKeyData) -> bool {
    public_of(certificate)
        .is_some_and(|public| public.der_bytes() == key.der_bytes() && public.algorithm() == key.algorithm())
}

/// The key at `path`, as far as it opens by itself.
pub(super) fn found(path: &Path, certificate: &CertificateDer<'_>) -> Result<CaKey, AuthorityError> {
    let public = public_of(certificate).ok_or_else(|| AuthorityError::Damaged {
        path: path.with_file_name("root.crt"),
        reason: "its key does not read".to_owned(),
    })?;
    if !path.exists() {
        return Ok(CaKey::absent(public, path.to_owned()));
    }
    let pem = files::read_secret(path, MAX_FILE)?;
    if file::is_encrypted(&pem) {
        return Ok(CaKey::locked(public, path.to_owned()));
    }
    let signer = FileSigner::from_pem(&pem, path)?;
    fitting(Box::new(signer), &public, &path.display().to_string()).map(CaKey::new)
}

fn fitting(
    signer: Box<dyn Signer>,
    public: &SubjectPublicKeyInfo,
    what: &str,
) -> Result<Box<dyn Signer>, AuthorityError> {
    if signer.public_key() == public {
        return Ok(signer);
    }
    Err(SignerError::OtherKey { what: what.to_owned() }.into())
}

impl RootAuthority {
    /// Whether `root.key` is there and needs a passphrase.
    pub fn is_encrypted(&self) -> Result<bool, AuthorityError> {
        let path = self.dir.join("root.key");
        if !path.exists() {
            return Ok(false);
        }
        Ok(file::is_encrypted(&files::read_secret(&path, MAX_FILE)?))
    }

    /// Whether the key lies in this directory at all.
    pub fn holds_key(&self) -> bool {
        self.dir.join("root.key").exists()
    }

    /// Opens an encrypted `root.key`.
    pub fn unlock(&mut self, passphrase: &str) -> Result<(), AuthorityError> {
        let path = self.dir.join("root.key");
        let pem = file::decrypt(&files::read_secret(&path, MAX_FILE)?, passphrase, &path)?;
        let signer = FileSigner::from_pem(&pem, &path)?;
        let signer = fitting(Box::new(signer), self.key.public_key(), &path.display().to_string())?;
        self.key = CaKey::new(signer);
        Ok(())
    }

    /// Has somebody else sign, who must hold the root's key.
    pub fn attach(&mut self, signer: Box<dyn Signer>) -> Result<(), AuthorityError> {
        let signer = fitting(signer, self.key.public_key(), "the signer command")?;
        self.key = CaKey::new(signer);
        Ok(())
    }

    /// Writes `root.key` anew: under another passphrase, or under none. `current`: the one it has, if it has one.
    pub fn set_passphrase(&self, current: Option<&str>, new: Option<&str>) -> Result<(), AuthorityError> {
        let path = self.dir.join("root.key");
        if !path.exists() {
            return Err(SignerError::Absent(path).into());
        }
        let stored = files::read_secret(&path, MAX_FILE)?;
        let plain = match (file::is_encrypted(&stored), current) {
            (false, _) => stored,
            (true, Some(current)) => file::decrypt(&stored, current, &path)?,
            (true, None) => return Err(SignerError::Locked(path).into()),
        };
        // Before the old file is replaced: this is the root's key, and it is read back.
        let signer = FileSigner::from_pem(&plain, &path)?;
        fitting(Box::new(signer), self.key.public_key(), &path.display().to_string())?;
        let written = match new {
            None => plain,
            Some(new) => {
                let encrypted = file::encrypt(&plain, new)?;
                file::decrypt(&encrypted, new, &path)?;
                encrypted
            }
        };
        Ok(files::write_atomic(&path, written.as_bytes(), 0o600)?)
    }
}
