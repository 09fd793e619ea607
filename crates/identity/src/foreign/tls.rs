//! TLS towards bundle endpoints of foreign trust domains (SPIFFE Federation, section 5.2): profile `https_spiffe` demands
//! the one agreed identity, judged by the bundle that is held; profile `https_web` a name, judged by the web's CAs.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::ForeignBundle;
use crate::spiffe_id::SpiffeId;
use crate::tls::{chain, provider, refused, tls13_signatures, unexpected};
use crate::verify::Usage;

#[derive(Debug)]
struct EndpointVerifier {
    bundle: Arc<ForeignBundle>,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for EndpointVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = chain(leaf, intermediates);
        let peer = self.bundle.authenticate(&chain, Usage::Server, now).map_err(refused)?;
        if peer.spiffe_id == self.expected {
            return Ok(ServerCertVerified::assertion());
        }
        Err(unexpected(peer.spiffe_id))
    }
    tls13_signatures!();
}

fn finish(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would skip the verifier.
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// Profile `https_spiffe`: only `expected`, proven by the bundle of its trust domain. TLS 1.3.
pub fn https_spiffe_client(
    bundle: Arc<ForeignBundle>,
    expected: SpiffeId,
) -> Result<Arc<ClientConfig>, Error> {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(EndpointVerifier { bundle, expected, algorithms }))
        .with_no_client_auth();
    Ok(finish(config))
}

/// Profile `https_web`: whoever one of `roots` has certified for the name in the URL. TLS 1.3 and 1.2: what the web has.
pub fn https_web_client(
    roots: impl IntoIterator<Item = CertificateDer<'static>>,
) -> Result<Arc<ClientConfig>, Error> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots);
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(finish(config))
}
