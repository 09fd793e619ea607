//! Identities under rustls: one snapshot of key, chain and bundles, swapped whole; verifiers that apply [`verify`].
//!
//! Validity is judged by the clock that the [`SvidHandle`] was given. TLS 1.3 only, X25519MLKEM768 preferred, no resumption and no early data (a resumed session would skip the
//! verifier), no SNI. A swap acts on the next handshake; on live connections the overlay shows the new chain by itself.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tombolo_model::names::ClusterName;

use crate::bundle::{BundleSet, fingerprint};
use crate::revocation::Revocations;
use crate::spiffe_id::SpiffeId;
use crate::verify::{self, IdentityError, PeerIdentity, Usage};

/// ALPN of application and control connections.
pub const ALPN_MESH: &[u8] = b"tombolo/1";
/// ALPN of joining.
pub const ALPN_JOIN: &[u8] = b"tombolo-join/1";

/// A key, its chain and the bundles to judge peers by: always consistent, because swapped whole.
#[derive(Debug)]
pub struct Svid {
    pub spiffe_id: SpiffeId,
    /// Unix seconds.
    pub not_after: u64,
    pub bundles: BundleSet,
    chain_hash: [u8; 32],
    certified: Arc<CertifiedKey>,
    /// With the roots appended: shown to joiners, who know only a fingerprint.
    certified_with_root: Arc<CertifiedKey>,
}

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    #[error("the private key can't be used: {0}")]
    Key(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("the private key can't sign for live connections: it must be ECDSA P-256, P-384 or Ed25519")]
    KeyType,
}

impl Svid {
    /// `key_pkcs8`: DER; `chain`: leaf first. The key must be the leaf's.
    pub fn new(
        key_pkcs8: &[u8],
        chain: Vec<CertificateDer<'static>>,
        bundles: BundleSet,
    ) -> Result<Self, SvidError> {
        let identity = verify::peer_identity_from_certs(&chain)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key_pkcs8.to_vec()));
        let key = aws_lc_rs::sign::any_supported_type(&key).map_err(|e| SvidError::Key(e.to_string()))?;
        let certified = CertifiedKey::new(chain.clone(), Arc::clone(&key));
        certified.keys_match().map_err(|e| SvidError::Key(e.to_string()))?;
        let roots = bundles.get(&identity.spiffe_id.trust_domain()).map(|b| b.roots.as_slice());
        // A joiner may know any of them: its token is older than a root that was staged meanwhile.
        let with_root: Vec<_> = chain.into_iter().chain(roots.unwrap_or_default().iter().cloned()).collect();
        Ok(Self {
            spiffe_id: identity.spiffe_id,
            not_after: u64::try_from(identity.not_after).unwrap_or(0),
            bundles,
            chain_hash: identity.chain_hash,
            certified: Arc::new(certified),
            certified_with_root: Arc::new(CertifiedKey::new(with_root, key)),
        })
    }

    /// The same identity, judging peers by these revocations as well.
    fn revoking(&self, revocations: Revocations) -> Self {
        Self {
            spiffe_id: self.spiffe_id.clone(),
            not_after: self.not_after,
            bundles: self.bundles.clone().revoking(revocations),
            chain_hash: self.chain_hash,
            certified: Arc::clone(&self.certified),
            certified_with_root: Arc::clone(&self.certified_with_root),
        }
    }

    /// Leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }
    /// [`verify::chain_hash`] of [`Self::chain`].
    pub fn chain_hash(&self) -> &[u8; 32] {
        &self.chain_hash
    }
    /// Signs with the leaf's key, for [`verify::signed_by_leaf`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SvidError> {
        let schemes = [
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
        ];
        let signer = self.certified.key.choose_scheme(&schemes).ok_or(SvidError::KeyType)?;
        signer.sign(message).map_err(|e| SvidError::Key(e.to_string()))
    }
}

/// Time since the Unix epoch.
pub type Clock = fn() -> Duration;

fn system_clock() -> Duration {
    rustls::time_provider::DefaultTimeProvider
        .current_time()
        .map_or(Duration::ZERO, |now| Duration::from_secs(now.as_secs()))
}

/// What rustls reads the time from.
#[derive(Debug)]
struct By(Clock);

impl TimeProvider for By {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch((self.0)()))
    }
}

/// The current snapshot; clones share it. Swapping it is rotation.
#[derive(Clone, Debug)]
pub struct SvidHandle {
    current: Arc<ArcSwap<Svid>>,
    clock: Clock,
}

impl SvidHandle {
    /// Peers are judged by the system's clock.
    pub fn new(svid: Svid) -> Self {
        Self::by(system_clock, svid)
    }
    /// Peers are judged by this clock: the one that everything else in the process goes by.
    pub fn by(clock: Clock, svid: Svid) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(svid)), clock }
    }
    pub fn load(&self) -> Arc<Svid> {
        self.current.load_full()
    }
    fn time(&self) -> Arc<dyn TimeProvider> {
        Arc::new(By(self.clock))
    }
    /// The next handshake uses `svid`; overlays show it on live connections within a second or so. Revocations stay.
    pub fn swap(&self, svid: Svid) {
        self.current.rcu(|current| svid.revoking(current.bundles.revocations().clone()));
    }
    /// Who is refused from the next handshake on. Live connections are the overlays' to cut
    /// (`Overlay::enforce_revocations`).
    pub fn set_revocations(&self, revocations: &Revocations) {
        self.current.rcu(|current| current.revoking(revocations.clone()));
    }
}

/// Whom a dialler is willing to talk to.
#[derive(Clone, Debug)]
pub enum ExpectedPeer {
    /// One of these identities: those that an export lists.
    OneOf(Arc<[SpiffeId]>),
    /// Any identity of this cluster whose path within it equals this, e.g. `/federator`.
    Role { cluster: ClusterName, path: Arc<str> },
    /// Whoever authenticates.
    Any,
}

impl ExpectedPeer {
    pub fn accepts(&self, peer: &PeerIdentity) -> bool {
        match self {
            Self::OneOf(ids) => ids.contains(&peer.spiffe_id),
            Self::Role { cluster, path } => {
                peer.cluster == *cluster && peer.spiffe_id.within_cluster() == Some(path)
            }
            Self::Any => true,
        }
    }
}

/// The one TLS provider: aws-lc-rs with the post-quantum hybrid first.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

pub(crate) fn refused(error: IdentityError) -> Error {
    Error::InvalidCertificate(match error {
        IdentityError::Expired(_) => CertificateError::Expired,
        IdentityError::NotYetValid(_) => CertificateError::NotValidYet,
        IdentityError::Revoked { .. } => CertificateError::Revoked,
        error => CertificateError::Other(OtherError(Arc::new(error))),
    })
}

/// A peer that authenticated but is not the one that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found}, which is not an identity that may serve this")]
pub struct UnexpectedPeer {
    pub found: SpiffeId,
}

/// A chain that holds, of somebody else than is asked for.
pub(crate) fn unexpected(found: SpiffeId) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(UnexpectedPeer { found }))))
}

pub(crate) fn chain<'a>(
    leaf: &CertificateDer<'a>,
    intermediates: &[CertificateDer<'a>],
) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf).chain(intermediates).cloned().collect()
}

#[derive(Debug)]
struct MeshVerifier {
    svid: SvidHandle,
    expected: ExpectedPeer,
    algorithms: WebPkiSupportedAlgorithms,
}

impl MeshVerifier {
    fn new(svid: &SvidHandle, expected: ExpectedPeer) -> Self {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        Self { svid: svid.clone(), expected, algorithms }
    }
    fn verify(&self, chain: &[CertificateDer<'_>], usage: Usage, now: UnixTime) -> Result<(), Error> {
        let peer = verify::authenticate(chain, &self.svid.load().bundles, usage, now).map_err(refused)?;
        if self.expected.accepts(&peer) {
            return Ok(());
        }
        Err(unexpected(peer.spiffe_id))
    }
}

macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken".into()))
        }
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

mod lapsed;
pub use lapsed::{ALPN_RENEWAL, renewal_client_config, renewal_server_config};
pub(crate) use tls13_signatures;

impl ServerCertVerifier for MeshVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(&chain(leaf, intermediates), Usage::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }
    tls13_signatures!();
}

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(&chain(leaf, intermediates), Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }
    tls13_signatures!();
}

/// An intermediate, a cross certificate, and every root that is trusted during a rotation.
const MAX_SHOWN: usize = 2 + crate::rotation::MAX_ROOTS;

/// Trusts a chain that ends in the pinned root and belongs to the expected peer: for joiners, who have no bundle yet.
#[derive(Debug)]
struct PinnedRootVerifier {
    root_fingerprint: String,
    expected: ExpectedPeer,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedRootVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let unknown = || Error::InvalidCertificate(CertificateError::UnknownIssuer);
        if intermediates.len() > MAX_SHOWN {
            return Err(unknown());
        }
        let is_pinned = |der: &&CertificateDer<'_>| fingerprint(der) == self.root_fingerprint;
        let root = intermediates.iter().find(is_pinned).ok_or_else(unknown)?;
        let between: Vec<_> =
            intermediates.iter().filter(|der| !verify::is_self_named(der)).cloned().collect();
        let chain = chain(leaf, &between);
        let claimed = verify::peer_identity_from_certs(&chain).map_err(refused)?;
        let bundle = crate::bundle::TrustBundle {
            trust_domain: claimed.spiffe_id.trust_domain(),
            sequence: 0,
            roots: vec![root.clone().into_owned()],
        };
        let peer =
            verify::authenticate(&chain, &BundleSet::of(bundle), Usage::Server, now).map_err(refused)?;
        if self.expected.accepts(&peer) { Ok(ServerCertVerified::assertion()) } else { Err(unknown()) }
    }
    tls13_signatures!();
}

#[derive(Debug)]
struct Resolver {
    svid: SvidHandle,
    with_root: bool,
}

impl Resolver {
    fn certified(&self) -> Arc<CertifiedKey> {
        let svid = self.svid.load();
        Arc::clone(if self.with_root { &svid.certified_with_root } else { &svid.certified })
    }
}
impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}
impl ResolvesClientCert for Resolver {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

fn alpn(protocol: &[u8]) -> Vec<Vec<u8>> {
    vec![protocol.to_vec()]
}

fn finish_server(mut config: ServerConfig, protocol: &[u8]) -> Arc<ServerConfig> {
    config.alpn_protocols = alpn(protocol);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

fn finish_client(mut config: ClientConfig, protocol: &[u8]) -> Arc<ClientConfig> {
    config.alpn_protocols = alpn(protocol);
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Arc::new(config)
}

/// Server side of application and control connections: a client certificate is demanded.
pub fn mesh_server_config(svid: &SvidHandle) -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_details(provider(), svid.time())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(MeshVerifier::new(svid, ExpectedPeer::Any)))
        .with_cert_resolver(Arc::new(Resolver { svid: svid.clone(), with_root: false }));
    Ok(finish_server(config, ALPN_MESH))
}

/// Server side of joining: shows its chain with the root; the joiner proves itself by its token.
pub fn join_server_config(svid: &SvidHandle) -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Resolver { svid: svid.clone(), with_root: true }));
    Ok(finish_server(config, ALPN_JOIN))
}

/// Server side of HTTPS for whoever asks, with the own SVID: a bundle endpoint of profile `https_spiffe`.
pub fn https_server_config(svid: &SvidHandle) -> Result<Arc<ServerConfig>, Error> {
    let resolver = Arc::new(Resolver { svid: svid.clone(), with_root: false });
    https_server_config_with(resolver)
}

/// The same, with certificates that `resolver` knows: profile `https_web`.
pub fn https_server_config_with(resolver: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    Ok(finish_server(config, b"http/1.1"))
}

/// Client side of application and control connections.
pub fn mesh_client_config(svid: &SvidHandle, expected: ExpectedPeer) -> Result<Arc<ClientConfig>, Error> {
    client_config(svid, expected, ALPN_MESH)
}

fn client_config(
    svid: &SvidHandle,
    expected: ExpectedPeer,
    protocol: &[u8],
) -> Result<Arc<ClientConfig>, Error> {
    let config = ClientConfig::builder_with_details(provider(), svid.time())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(MeshVerifier::new(svid, expected)))
        .with_client_cert_resolver(Arc::new(Resolver { svid: svid.clone(), with_root: false }));
    Ok(finish_client(config, protocol))
}

/// Client side of joining: the root is pinned by its fingerprint (`sha256:<hex>`).
pub fn join_client_config(
    root_fingerprint: &str,
    expected: ExpectedPeer,
    clock: Clock,
) -> Result<Arc<ClientConfig>, Error> {
    let verifier = PinnedRootVerifier {
        root_fingerprint: root_fingerprint.to_owned(),
        expected,
        algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
    };
    let config = ClientConfig::builder_with_details(provider(), Arc::new(By(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(finish_client(config, ALPN_JOIN))
}
