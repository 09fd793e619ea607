//! Keys in files: PKCS#8, plain or under a passphrase.
//!
//! The encrypted form is PKCS#8's own (PBES2, RFC 8018, by the `pkcs8` crate): scrypt and AES-256-CBC, which `openssl pkey`
//! opens too. scrypt with N = 2^14, r = 8, p = 5 costs as much as OWASP's 2^17, 8, 1 (some 0.3 s), in the 16 MiB that OpenSSL
//! allows it by default.

use std::fmt;
use std::ops::Deref;
use std::path::Path;

use pkcs8::pkcs5::pbes2;
use pkcs8::{EncryptedPrivateKeyInfoRef, LineEnding, PrivateKeyInfoRef, SecretDocument};
use rcgen::{KeyPair, PublicKeyData, SigningKey, SubjectPublicKeyInfo};
use zeroize::{Zeroize, Zeroizing};

use super::{Signer, SignerError};

const PLAIN: &str = "PRIVATE KEY";
const ENCRYPTED: &str = "ENCRYPTED PRIVATE KEY";
const SCRYPT: (u8, u32, u32) = (14, 8, 5);

/// A key pair that is zeroed when dropped.
pub struct SecretKey(KeyPair);

impl SecretKey {
    pub fn new(key: KeyPair) -> Self {
        Self(key)
    }
    pub fn from_pem(pem: &str) -> Result<Self, rcgen::Error> {
        KeyPair::from_pem(pem).map(Self)
    }
}

impl Deref for SecretKey {
    type Target = KeyPair;
    fn deref(&self) -> &KeyPair {
        &self.0
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(not shown)")
    }
}

/// Signs with a key in memory.
pub struct FileSigner {
    key: SecretKey,
    public: SubjectPublicKeyInfo,
}

impl FileSigner {
    pub fn new(key: SecretKey) -> Result<Self, SignerError> {
        let public = SubjectPublicKeyInfo::from_der(&key.subject_public_key_info())
            .map_err(|e| SignerError::Key { what: "the key".to_owned(), reason: e.to_string() })?;
        super::check_algorithm(&public, "the key")?;
        Ok(Self { key, public })
    }

    /// From the PEM of a plain key; `path` is for errors.
    pub fn from_pem(pem: &str, path: &Path) -> Result<Self, SignerError> {
        let key = SecretKey::from_pem(pem)
            .map_err(|e| SignerError::Key { what: path.display().to_string(), reason: e.to_string() })?;
        Self::new(key)
    }
}

impl Signer for FileSigner {
    fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public
    }
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignerError> {
        SigningKey::sign(&*self.key, message)
            .map_err(|e| SignerError::Key { what: "the key".to_owned(), reason: e.to_string() })
    }
}

/// Whether a PEM holds an encrypted key.
pub fn is_encrypted(pem: &str) -> bool {
    pem.contains("BEGIN ENCRYPTED PRIVATE KEY")
}

/// A plain key, encrypted.
pub fn encrypt(pem: &str, passphrase: &str) -> Result<Zeroizing<String>, SignerError> {
    if passphrase.is_empty() {
        return Err(SignerError::EmptyPassphrase);
    }
    let failed =
        |e: &dyn fmt::Display| SignerError::Key { what: "the key".to_owned(), reason: e.to_string() };
    let (label, plain) = SecretDocument::from_pem(pem).map_err(|e| failed(&e))?;
    if label != PLAIN {
        return Err(failed(&format!("a {label} is no plain key")));
    }
    let info = PrivateKeyInfoRef::try_from(plain.as_bytes()).map_err(|e| failed(&e))?;
    let (log_n, r, p) = SCRYPT;
    let cost = pkcs8::pkcs5::scrypt::Params::new(log_n, r, p).map_err(|e| failed(&e))?;
    let (salt, iv) = (rand::random::<[u8; 16]>(), rand::random::<[u8; 16]>());
    let parameters = pbes2::Parameters::generate_scrypt_aes256cbc(cost, &salt, iv).map_err(|e| failed(&e))?;
    let encrypted = info.encrypt_with_params(parameters, passphrase).map_err(|e| failed(&e))?;
    encrypted.to_pem(ENCRYPTED, LineEnding::LF).map_err(|e| failed(&e))
}

/// An encrypted key, opened; `path` is for errors.
pub fn decrypt(pem: &str, passphrase: &str, path: &Path) -> Result<Zeroizing<String>, SignerError> {
    let damaged = |e: &dyn fmt::Display| SignerError::Key {
        what: path.display().to_string(),
        reason: format!("it is damaged ({e}): restore it from your backup"),
    };
    let (_, encrypted) = SecretDocument::from_pem(pem).map_err(|e| damaged(&e))?;
    let info = EncryptedPrivateKeyInfoRef::try_from(encrypted.as_bytes()).map_err(|e| damaged(&e))?;
    // A wrong passphrase and a changed ciphertext look alike.
    let plain = info.decrypt(passphrase).map_err(|_| SignerError::Passphrase(path.to_owned()))?;
    plain.to_pem(PLAIN, LineEnding::LF).map_err(|e| damaged(&e))
}
