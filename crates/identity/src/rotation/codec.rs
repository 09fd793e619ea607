//! The bytes of a trust update; drawn in [the module above](super). Every length is checked, nothing may be left over.

use rustls_pki_types::CertificateDer;
use tombolo_model::ids::ClusterTag;

use super::{MAX_UPDATE_BYTES, Reissued, TrustUpdate, UpdateError, sha256};
use crate::verify::signed_by_leaf;

const LABEL: &[u8] = b"tombolo trust update v1\0";
/// The old and the new root sign; more only cost verifications.
const MAX_SIGNATURES: usize = 4;
/// ECDSA P-384 in DER has 104 bytes at most.
const MAX_SIGNATURE_BYTES: usize = 256;

/// An update as it travels and as it is kept: the bytes that were signed, and by whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignedUpdate {
    payload: Vec<u8>,
    /// SHA-256 of the root's certificate, and its signature over the payload.
    signatures: Vec<([u8; 32], Vec<u8>)>,
}

impl SignedUpdate {
    pub(crate) fn new(payload: Vec<u8>, signatures: Vec<([u8; 32], Vec<u8>)>) -> Self {
        Self { payload, signatures }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = length::<4>(self.payload.len());
        out.extend_from_slice(&self.payload);
        out.extend_from_slice(&length::<1>(self.signatures.len()));
        for (root, signature) in &self.signatures {
            out.extend_from_slice(root);
            put::<2>(&mut out, signature);
        }
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, UpdateError> {
        if bytes.len() > MAX_UPDATE_BYTES {
            return Err(UpdateError::TooLarge(bytes.len()));
        }
        let mut reader = Reader(bytes);
        let payload = reader.counted::<4>()?.to_vec();
        let count = reader.number::<1>()?;
        if count > MAX_SIGNATURES {
            return Err(UpdateError::Malformed("too many signatures"));
        }
        let mut signatures = Vec::with_capacity(count);
        for _ in 0..count {
            let root = reader.array::<32>()?;
            let signature = reader.counted::<2>()?;
            if signature.len() > MAX_SIGNATURE_BYTES {
                return Err(UpdateError::Malformed("a signature that is too long"));
            }
            signatures.push((root, signature.to_vec()));
        }
        reader.end()?;
        Ok(Self { payload, signatures })
    }

    /// What it says, whoever has signed it.
    pub fn read(&self) -> Result<TrustUpdate, UpdateError> {
        read_payload(&self.payload)
    }

    /// Whether `root`'s key has signed it.
    pub fn is_signed_by(&self, root: &CertificateDer<'_>) -> bool {
        let name = sha256(root);
        self.signatures
            .iter()
            .any(|(by, signature)| *by == name && signed_by_leaf(root, &self.payload, signature))
    }
}

/// What a root signs.
pub(crate) fn payload(update: &TrustUpdate) -> Vec<u8> {
    let mut out = LABEL.to_vec();
    put::<1>(&mut out, update.trust_domain.as_str().as_bytes());
    out.extend_from_slice(&update.sequence.to_be_bytes());
    for list in [&update.roots, &update.crosses] {
        out.extend_from_slice(&length::<1>(list.len()));
        list.iter().for_each(|certificate| put::<2>(&mut out, certificate));
    }
    out.extend_from_slice(&length::<2>(update.intermediates.len()));
    for Reissued { cluster, tag, certificate } in &update.intermediates {
        put::<1>(&mut out, cluster.as_str().as_bytes());
        out.extend_from_slice(&tag.value().to_be_bytes());
        put::<2>(&mut out, certificate);
    }
    out
}

fn read_payload(bytes: &[u8]) -> Result<TrustUpdate, UpdateError> {
    let malformed = UpdateError::Malformed;
    let mut reader = Reader(bytes.strip_prefix(LABEL).ok_or(malformed("it is none"))?);
    let trust_domain = reader.text::<1>()?.parse().map_err(|_| malformed("no trust domain"))?;
    let sequence = u64::from_be_bytes(reader.array::<8>()?);
    let roots = reader.certificates()?;
    let crosses = reader.certificates()?;
    let count = reader.number::<2>()?;
    let mut intermediates = Vec::new();
    for _ in 0..count {
        let cluster = reader.text::<1>()?.parse().map_err(|_| malformed("no cluster's name"))?;
        let tag = u32::from_be_bytes(reader.array::<4>()?);
        let tag = ClusterTag::new(tag).ok_or(malformed("no cluster's tag"))?;
        let certificate = reader.counted::<2>()?.to_vec().into();
        intermediates.push(Reissued { cluster, tag, certificate });
    }
    reader.end()?;
    Ok(TrustUpdate { trust_domain, sequence, roots, crosses, intermediates })
}

/// A length in `N` bytes. Lists and certificates here are far shorter; one that is not makes an update that does not read.
fn length<const N: usize>(len: usize) -> Vec<u8> {
    let bytes = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    bytes.iter().skip(4 - N.min(4)).copied().collect()
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&length::<N>(bytes.len()));
    out.extend_from_slice(bytes);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], UpdateError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(UpdateError::Malformed("it is cut short"))?;
        self.0 = rest;
        Ok(taken)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], UpdateError> {
        self.take(N)?.try_into().map_err(|_| UpdateError::Malformed("it is cut short"))
    }
    /// Of at most four bytes.
    fn number<const N: usize>(&mut self) -> Result<usize, UpdateError> {
        Ok(self.array::<N>()?.iter().fold(0, |number, byte| (number << 8) | usize::from(*byte)))
    }
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], UpdateError> {
        let len = self.number::<N>()?;
        self.take(len)
    }
    fn text<const N: usize>(&mut self) -> Result<&'a str, UpdateError> {
        std::str::from_utf8(self.counted::<N>()?).map_err(|_| UpdateError::Malformed("a name is no text"))
    }
    fn certificates(&mut self) -> Result<Vec<CertificateDer<'static>>, UpdateError> {
        let count = self.number::<1>()?;
        (0..count).map(|_| Ok(self.counted::<2>()?.to_vec().into())).collect()
    }
    fn end(&self) -> Result<(), UpdateError> {
        if self.0.is_empty() { Ok(()) } else { Err(UpdateError::Malformed("something follows it")) }
    }
}
