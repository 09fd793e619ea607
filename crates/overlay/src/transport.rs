//! quinn's settings: one place for every window, limit and timeout of the overlay, each with its arithmetic.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{hkdf, hmac};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, ConnectionId, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, ValidationTokenConfig, VarInt,
};

use crate::congestion::ModelControllerFactory;

/// What one process allows its connections. The defaults suit a sidecar.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Streams a peer that dialled may have open at first: quinn keeps tables for all that may be, which double beyond 28, 56,
    /// 112... (ADR 11). A peer that was dialled opens none.
    pub bidi_streams: u32,
    /// Bytes a peer may send on one stream before it is read. quinn aborts a stream with over 1024 gaps; with 1400 bytes of
    /// the stream in a packet of 1452 that takes 1024 x 2 x 1400 bytes = 2.87 MB. Under loss this is what bounds a stream:
    /// all of it waits for the oldest packet that is missing, for two to three round trips.
    pub stream_window_bytes: u32,
    /// Bytes a peer may send on one connection before they are read.
    pub connection_window_bytes: u32,
    /// Bytes kept for retransmission and pacing per connection.
    pub send_window_bytes: u64,
    /// Largest UDP payload tried by MTU discovery; 8952 fits a 9000-byte path over IPv4.
    pub max_udp_payload_bytes: u16,
    /// Silence after which a connection is dead.
    pub idle_timeout: Duration,
    /// Handshakes in progress above which newcomers must prove their address by Retry.
    pub retry_above_pending: usize,
    /// Handshakes in progress above which newcomers are ignored: 40 KB each.
    pub max_pending: usize,
    /// How long after the end of its identity a peer that shows no new one is closed at the latest.
    pub expired_patience: Duration,
    /// Live connections on which a swapped SVID is shown per second: each is a signature here and 0.3 ms at the peer.
    pub attestations_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bidi_streams: 28,
            stream_window_bytes: 2_850_000,
            // Seven streams at full window; a slow reader holds no more than this of a peer's data.
            connection_window_bytes: 20_000_000,
            send_window_bytes: 8_000_000,
            max_udp_payload_bytes: 1452,
            // Open streams are kept alive every 20 s; three missed ones end the connection.
            idle_timeout: Duration::from_secs(65),
            retry_above_pending: 256,
            max_pending: 2048,
            // protocol.md section 5.
            expired_patience: Duration::from_secs(300),
            // A hundredth of a core; 10,000 connections take 50 s of the half life that is left.
            attestations_per_second: 200,
        }
    }
}

/// Keep-alives of whoever dialled; the pool closes what is idle, so this never holds a connection open for nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// DATAGRAMs of UDP flows, each way: what comes while the thread has other work (180 full ones), and what waits for the
/// path. More would be answered too late. Kicks are datagrams, too; sidecars read them off.
const DATAGRAM_BUFFER_BYTES: usize = 256 * 1024;
/// A handshake that buffers more than this before it is accepted is not one of ours.
const INCOMING_BUFFER_BYTES: u64 = 16 * 1024;

pub(crate) fn transport(limits: &Limits, dialler: bool) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(limits.max_udp_payload_bytes);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(if dialler { 0 } else { limits.bidi_streams }))
        // The control stream alone.
        .max_concurrent_uni_streams(VarInt::from_u32(4))
        .stream_receive_window(VarInt::from_u32(limits.stream_window_bytes))
        .receive_window(VarInt::from_u32(limits.connection_window_bytes))
        .send_window(limits.send_window_bytes)
        .max_idle_timeout(IdleTimeout::try_from(limits.idle_timeout).ok())
        .keep_alive_interval(dialler.then_some(KEEP_ALIVE.min(limits.idle_timeout / 3)))
        .mtu_discovery_config(Some(discovery))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_BYTES))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_BYTES)
        .congestion_controller_factory(Arc::new(ModelControllerFactory::default()));
    Arc::new(config)
}

/// A TLS configuration that QUIC can't use (no TLS 1.3 AES-128-GCM suite for Initial packets).
#[derive(Debug, thiserror::Error)]
#[error("the TLS configuration can't be used for QUIC: {0}")]
pub struct UnusableTls(String);

pub(crate) fn endpoint_config(limits: &Limits) -> EndpointConfig {
    // A random reset key per process: gateways don't hold it, so no hop can forge a stateless reset.
    let reset: [u8; 64] = std::array::from_fn(|_| rand::random());
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &reset)));
    config.grease_quic_bit(false);
    // Values under 1200 are the only refused ones.
    let _ = config.max_udp_payload_size(limits.max_udp_payload_bytes.max(1472));
    config
}

/// One key for the life of the process: Retry tokens of a second ago must still open.
pub(crate) fn token_key() -> Arc<hkdf::Prk> {
    let secret: [u8; 64] = std::array::from_fn(|_| rand::random());
    Arc::new(hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&secret))
}

pub(crate) fn server_config(
    tls: &Arc<rustls::ServerConfig>,
    token_key: &Arc<hkdf::Prk>,
    limits: &Limits,
) -> Result<Arc<ServerConfig>, UnusableTls> {
    let crypto = QuicServerConfig::try_from(Arc::clone(tls)).map_err(|e| UnusableTls(e.to_string()))?;
    let mut config = ServerConfig::new(Arc::new(crypto), Arc::clone(token_key) as _);
    // All peers share one virtual address, so a validation token of one would be valid for all: none are sent.
    let mut validation = ValidationTokenConfig::default();
    validation.sent(0);
    config
        .transport_config(transport(limits, false))
        .validation_token_config(validation)
        .migration(false)
        .max_incoming(limits.max_pending)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFER_BYTES * limits.max_pending as u64);
    Ok(Arc::new(config))
}

pub(crate) fn client_config(
    tls: Arc<rustls::ClientConfig>,
    transport: Arc<TransportConfig>,
    initial_dcid: impl Fn() -> ConnectionId + Send + Sync + 'static,
) -> Result<ClientConfig, UnusableTls> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| UnusableTls(e.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config
        .transport_config(transport)
        .token_store(Arc::new(quinn_proto::NoneTokenStore))
        .initial_dst_cid_provider(Arc::new(initial_dcid));
    Ok(config)
}
