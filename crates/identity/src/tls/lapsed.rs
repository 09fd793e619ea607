//! TLS of renewing an identity that has ended: an ALPN of its own, and the one verifier that looks past a leaf's end.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{
    ExpectedPeer, Resolver, SvidHandle, chain, client_config, finish_server, provider, refused, unexpected,
};
use crate::verify::{self, Usage};

/// ALPN of renewing an identity that has ended.
pub const ALPN_RENEWAL: &[u8] = b"tombolo-renewal/1";

/// Judges who comes back after its identity has ended: everything but the leaf's end, which may be up to
/// [`verify::RENEWABLE_FOR`] ago, and whether it is revoked, which its judge says in words.
#[derive(Debug)]
struct LapsedVerifier {
    svid: SvidHandle,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for LapsedVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = chain(leaf, intermediates);
        let peer = verify::authenticate_lapsed(&chain, &self.svid.load().bundles, Usage::Client, now)
            .map_err(refused)?;
        // Nobody renews the identities of another cluster.
        let own = self.svid.load().spiffe_id.cluster();
        if own.as_ref() == Some(&peer.cluster) {
            return Ok(ClientCertVerified::assertion());
        }
        Err(unexpected(peer.spiffe_id))
    }
    tls13_signatures!();
}

/// Client side of renewing an identity that has ended: the federator is judged as ever, the own chain is shown as it is.
pub fn renewal_client_config(svid: &SvidHandle, expected: ExpectedPeer) -> Result<Arc<ClientConfig>, Error> {
    client_config(svid, expected, ALPN_RENEWAL)
}

/// Server side of renewing an identity that has ended: the client shows what it has ([`verify::authenticate_lapsed`]).
pub fn renewal_server_config(svid: &SvidHandle) -> Result<Arc<ServerConfig>, Error> {
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    let config = ServerConfig::builder_with_details(provider(), svid.time())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(LapsedVerifier { svid: svid.clone(), algorithms }))
        .with_cert_resolver(Arc::new(Resolver { svid: svid.clone(), with_root: false }));
    Ok(finish_server(config, ALPN_RENEWAL))
}
