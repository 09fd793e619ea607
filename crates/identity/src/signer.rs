//! The key of an authority, wherever it lies: in a file, in a file under a passphrase, behind a program.
//!
//! [`Signer`] is the seam; [`file`](mod@file) and [`command`] are behind it. [`CaKey`] is what an authority holds: it signs certificates
//! through rcgen, whose errors have no room for a reason, so it keeps the last one ([`CaKey::why`]). Private keys are
//! zeroed when dropped and never shown: no type here prints one.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PublicKeyData, SignatureAlgorithm, SigningKey,
    SubjectPublicKeyInfo,
};

pub mod command;
pub mod file;

/// Why a key did not sign, or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    #[error(
        "{path} is encrypted: give its passphrase with --passphrase-file FILE or TOMBOLO_TRUST_PASSPHRASE, or run the command at a terminal",
        path = .0.display()
    )]
    Locked(PathBuf),
    #[error(
        "there is no {path}: name the program that holds the key with --signer-command, or restore the file from your backup",
        path = .0.display()
    )]
    Absent(PathBuf),
    #[error("{path} does not open: the passphrase is wrong, or the file is damaged", path = .0.display())]
    Passphrase(PathBuf),
    #[error("an empty passphrase protects nothing: give one of at least one character")]
    EmptyPassphrase,
    #[error("{what} can't be used: {reason}")]
    Key { what: String, reason: String },
    #[error("the key of {what} is not the one that the certificate is about")]
    OtherKey { what: String },
    #[error(
        "--signer-command {command:?} can't be started: {reason}; give a program and its arguments, without a shell's syntax"
    )]
    Start { command: String, reason: String },
    #[error("`{command}` ended with {status}{said}")]
    Failed { command: String, status: String, said: String },
    #[error(
        "`{command}` did not answer within {limit:?}; if somebody has to confirm, give them longer with --signer-timeout"
    )]
    Late { command: String, limit: Duration },
    #[error("`{command}` answered with {found}; {expected} was expected")]
    Garbage { command: String, found: String, expected: &'static str },
}

/// A private key that signs and shows only its public half.
pub trait Signer: Send + Sync {
    fn public_key(&self) -> &SubjectPublicKeyInfo;
    /// Signs a message (not its hash) with the key's algorithm: ECDSA with the curve's SHA-2, in DER (RFC 3279).
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignerError>;
}

/// Whether an authority may have such a key.
pub fn check_algorithm(key: &SubjectPublicKeyInfo, what: &str) -> Result<(), SignerError> {
    if [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384].contains(&key.algorithm()) {
        return Ok(());
    }
    let reason = "it is neither ECDSA P-256 nor P-384".to_owned();
    Err(SignerError::Key { what: what.to_owned(), reason })
}

/// Whether the holder of `key` signed the message.
pub fn verifies(key: &SubjectPublicKeyInfo, message: &[u8], signature: &[u8]) -> bool {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, UnparsedPublicKey};
    let algorithm = match key.algorithm() {
        found if *found == PKCS_ECDSA_P256_SHA256 => &ECDSA_P256_SHA256_ASN1,
        _ => &ECDSA_P384_SHA384_ASN1,
    };
    UnparsedPublicKey::new(algorithm, key.der_bytes()).verify(message, signature).is_ok()
}

/// A key that can't sign now, and why: its public half is known from the certificate.
struct Closed {
    public: SubjectPublicKeyInfo,
    why: fn(PathBuf) -> SignerError,
    path: PathBuf,
}

impl Signer for Closed {
    fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public
    }
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, SignerError> {
        Err((self.why)(self.path.clone()))
    }
}

/// What an authority signs with.
pub struct CaKey {
    signer: Box<dyn Signer>,
    failure: Mutex<Option<SignerError>>,
}

impl fmt::Debug for CaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CaKey(not shown)")
    }
}

impl CaKey {
    pub fn new(signer: Box<dyn Signer>) -> Self {
        Self { signer, failure: Mutex::new(None) }
    }

    /// Of a file that needs its passphrase first.
    pub(crate) fn locked(public: SubjectPublicKeyInfo, path: PathBuf) -> Self {
        Self::new(Box::new(Closed { public, why: SignerError::Locked, path }))
    }

    /// Of a file that is not there: the key lies elsewhere.
    pub(crate) fn absent(public: SubjectPublicKeyInfo, path: PathBuf) -> Self {
        Self::new(Box::new(Closed { public, why: SignerError::Absent, path }))
    }

    pub fn public_key(&self) -> &SubjectPublicKeyInfo {
        self.signer.public_key()
    }

    /// The reason behind rcgen's error: what the signer said, if it was asked.
    pub fn why(&self, error: rcgen::Error) -> KeyError {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        failure.map_or(KeyError::Rcgen(error), KeyError::Signer)
    }
}

/// Why something was not signed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(transparent)]
    Signer(#[from] SignerError),
    #[error("signing failed: {0}")]
    Rcgen(rcgen::Error),
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        self.signer.public_key().der_bytes()
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.signer.public_key().algorithm()
    }
}

impl SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.signer.sign(message).map_err(|failure| {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
            rcgen::Error::RemoteKeyError
        })
    }
}
