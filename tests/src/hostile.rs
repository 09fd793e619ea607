//! A hostile gateway: it stands where a real one was, at its addresses and with its keys, answers probes so that peers
//! use it, lets a QUIC client of its own speak through it, and drops everything else.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionId, ConnectionIdGenerator};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tombolo_model::ids::EndpointId;
use tombolo_overlay::cid::{CID_LEN, Cid};

use crate::netns::Namespace;
use crate::stolen::Stolen;

const POLL: Duration = Duration::from_millis(50);
const MESH: &[u8] = b"tombolo/1";
/// Longest time a forged connection may take to fail.
const FORGED: Duration = Duration::from_millis(1500);

/// What the impostor did.
#[derive(Debug, Default)]
pub struct Doings {
    pub probes_answered: AtomicU64,
    /// Packets for its own client, or for anybody else whose packets came this way: those end here.
    pub packets_taken: AtomicU64,
}

/// Runs until dropped.
pub struct HostileGateway {
    pub doings: Arc<Doings>,
    /// Where its own QUIC client sends to: what arrives leaves from the border, and what comes back is handed over.
    pub relay: SocketAddr,
    border: UdpSocket,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl HostileGateway {
    /// Takes over the border address of a gateway that has ended, and attacks `victim`, a gateway of `peer`.
    pub fn start(
        namespace: &Namespace,
        border: SocketAddr,
        stolen: Stolen,
        peer: &str,
        victim: SocketAddr,
    ) -> Result<Self> {
        let bind = |address: SocketAddr| -> Result<UdpSocket> {
            let socket = namespace.run(|| UdpSocket::bind(address))??;
            socket.set_read_timeout(Some(POLL))?;
            Ok(socket)
        };
        let (socket, relay_socket) = (bind(border)?, bind((border.ip(), 0).into())?);
        let (link, relay) = (stolen.link(peer)?, relay_socket.local_addr()?);
        let (doings, stop) = (Arc::new(Doings::default()), Arc::new(AtomicBool::new(false)));
        // Each of its clients sees every packet, and knows its own by the connection ID.
        let client = Arc::new(Mutex::new(BTreeSet::new()));
        let mut threads = Vec::new();

        let (own, stopped, client_of) = (Arc::clone(&doings), Arc::clone(&stop), Arc::clone(&client));
        let (receiver, to_client) = (socket.try_clone()?, relay_socket.try_clone()?);
        threads.push(std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((bytes, from)) = receiver.recv_from(&mut buffer) else { continue };
                let packet = buffer.get(..bytes).unwrap_or_default();
                if let Some(ack) = stolen.probe_ack(&link, packet, from) {
                    let _ = receiver.send_to(&ack, from);
                    own.probes_answered.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                own.packets_taken.fetch_add(1, Ordering::Relaxed);
                for client in client_of.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                    let _ = to_client.send_to(packet, *client);
                }
            }
        }));
        let (stopped, out) = (Arc::clone(&stop), socket.try_clone()?);
        threads.push(std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((bytes, from)) = relay_socket.recv_from(&mut buffer) else { continue };
                client.lock().unwrap_or_else(PoisonError::into_inner).insert(from);
                let _ = out.send_to(buffer.get(..bytes).unwrap_or_default(), victim);
            }
        }));
        Ok(Self { doings, relay, border: socket, stop, threads })
    }

    /// Sends from the border address that peers know.
    pub fn send(&self, packet: &[u8], to: SocketAddr) -> Result<()> {
        self.border.send_to(packet, to).map(drop).context("send from the border")
    }
}

impl Drop for HostileGateway {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Accepts every server: the forger does not care.
#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Names its own packets with IDs of one endpoint of the forger's cluster, by another nonce each. The peer's gateways can't
/// check their MAC: that key is the cluster's own.
struct Named(Cid);

impl ConnectionIdGenerator for Named {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = *self.0.as_bytes();
        id[8..15].copy_from_slice(&rand::random::<[u8; 7]>());
        ConnectionId::new(&id)
    }
    fn cid_len(&self) -> usize {
        CID_LEN
    }
    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// How far a forged connection came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forged {
    /// The server never answered, or not so that it reached us.
    Unanswered,
    /// The server answered, and closed the connection for this reason.
    Refused(String),
}

/// Dials with `first` as the first destination ID and a certificate of its own making, from `from`, and tries to use a
/// stream: an error if one byte of an answer comes back.
pub async fn forge(from: UdpSocket, to: SocketAddr, first: Cid, own: Cid) -> Result<Forged> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let made = rcgen::generate_simple_self_signed(vec!["forger.example".to_owned()])?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
        .with_client_auth_cert(vec![made.cert.der().clone()], key)?;
    tls.alpn_protocols = vec![MESH.to_vec()];
    tls.enable_sni = false;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(first.as_bytes())));
    let mut endpoint_config = quinn::EndpointConfig::default();
    endpoint_config.cid_generator(move || Box::new(Named(own)));
    let runtime = quinn::default_runtime().context("no runtime")?;
    let mut endpoint = quinn::Endpoint::new(endpoint_config, None, from, runtime)?;
    endpoint.set_default_client_config(config);
    let begun = Instant::now();
    let attempt = tokio::time::timeout(FORGED, endpoint.connect(to, "forger.example")?).await;
    let connection = match attempt {
        Err(_) => return Ok(Forged::Unanswered),
        Ok(Err(error)) => return Ok(Forged::Refused(error.to_string())),
        Ok(Ok(connection)) => connection,
    };
    // The client's half of the handshake is over; the server has not looked at the certificate yet.
    let used = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
        let mut answer = [0; 64];
        match receive.read(&mut answer).await {
            Ok(Some(bytes)) => bail!("the server answered a forger with {bytes} bytes"),
            Ok(None) => Ok("the stream ended".to_owned()),
            Err(error) => Ok(error.to_string()),
        }
    };
    match tokio::time::timeout(FORGED.saturating_sub(begun.elapsed()), used).await {
        Ok(Ok(reason)) => Ok(Forged::Refused(reason)),
        Ok(Err(error)) if error.to_string().contains("answered a forger") => Err(error),
        Ok(Err(error)) => Ok(Forged::Refused(error.to_string())),
        Err(_) => Ok(Forged::Unanswered),
    }
}

/// An endpoint id of the forger's choice, in a block that nobody has.
pub fn nobody() -> EndpointId {
    EndpointId::from_u32(0x0bad_cafe)
}
