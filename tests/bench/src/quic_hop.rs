//! One hop of the path whose gateways terminate QUIC: takes TCP connections or QUIC streams, hands each on as a TCP
//! connection or as a stream of the one QUIC connection it keeps to the next hop. Benchmark only.
//!
//! Tuned as the mesh's own endpoints: a current-thread runtime, windows for a 50 ms path at 300 Mbit/s that stay under
//! quinn's limit of gaps per stream, mutual TLS 1.3 with AES-128. The first byte of a stream says which of the last
//! hop's upstreams it wants.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::BytesMut;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::certificates::PEER_NAME;
use crate::topology::QuicCongestion;

/// Above the 1.9 MB that 300 Mbit/s x 50 ms need, below the 2.9 MB that can make 1024 gaps of two packets.
const STREAM_WINDOW: u32 = 2_500_000;
/// Eight bulk streams of a full window.
const CONNECTION_WINDOW: u32 = 8 * STREAM_WINDOW;
/// Per TCP read; one write into QUIC fills several packets.
const READ_BYTES: usize = 64 << 10;
/// Answer of a hop that cannot go on with a stream.
const REFUSED: VarInt = VarInt::from_u32(1);

#[derive(Debug, clap::Args)]
pub struct HopArgs {
    /// `TAG=ADDRESS`: connections here become streams that begin with the byte TAG.
    #[arg(long)]
    listen_tcp: Vec<Tagged>,
    #[arg(long)]
    listen_quic: Option<SocketAddr>,
    /// `TAG=ADDRESS`: streams that begin with TAG become connections to there.
    #[arg(long)]
    upstream_tcp: Vec<Tagged>,
    #[arg(long)]
    upstream_quic: Option<SocketAddr>,
    #[arg(long)]
    root: PathBuf,
    #[arg(long)]
    leaf: PathBuf,
    #[arg(long)]
    key: PathBuf,
    #[arg(long, value_enum, default_value_t = QuicCongestion::Cubic)]
    congestion: QuicCongestion,
}

#[derive(Debug, Clone)]
struct Tagged {
    tag: u8,
    address: SocketAddr,
}

impl FromStr for Tagged {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (tag, address) = text.split_once('=').context("TAG=ADDRESS is needed, as 0=127.0.0.1:80")?;
        Ok(Self { tag: tag.parse()?, address: address.parse()? })
    }
}

pub fn run(args: HopArgs) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("build a runtime")?;
    runtime.block_on(serve(args))
}

async fn serve(args: HopArgs) -> Result<()> {
    let identity = Identity::read(&args)?;
    let transport = transport(args.congestion);
    let upstream = match (args.upstream_quic, args.upstream_tcp.is_empty()) {
        (Some(address), true) => Upstream::Quic(Pool::new(address, &identity, transport.clone())?),
        (None, false) => Upstream::Tcp(args.upstream_tcp.iter().map(|to| (to.tag, to.address)).collect()),
        _ => bail!("give either --upstream-quic or --upstream-tcp"),
    };
    let upstream = Arc::new(upstream);
    let mut tasks = JoinSet::new();
    for listen in args.listen_tcp {
        let listener = socket2_listener(listen.address)?;
        tasks.spawn(accept_tcp(listener, listen.tag, upstream.clone()));
    }
    if let Some(address) = args.listen_quic {
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(identity.server()?));
        config.transport_config(transport);
        let endpoint = Endpoint::server(config, address).with_context(|| format!("listen on {address}"))?;
        tasks.spawn(accept_quic(endpoint, upstream));
    }
    // Listeners never end by themselves; the benchmark ends this process.
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

fn socket2_listener(address: SocketAddr) -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    // As for HAProxy and nginx.
    socket.listen(8192)?;
    Ok(TcpListener::from_std(socket.into())?)
}

fn transport(congestion: QuicCongestion) -> Arc<quinn::TransportConfig> {
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .max_concurrent_bidi_streams(VarInt::from_u32(20_000))
        .keep_alive_interval(Some(Duration::from_secs(5)));
    let mut acks = quinn::AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(20));
    transport.ack_frequency_config(Some(acks));
    match congestion {
        QuicCongestion::Cubic => {}
        QuicCongestion::Bbr => {
            transport.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()));
        }
    }
    Arc::new(transport)
}

struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<rustls::RootCertStore>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl Identity {
    fn read(args: &HopArgs) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&args.root).context("read the root")?)?;
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        // As the proxies it is compared with. (QUIC needs this suite for its Initials anyway.)
        provider.cipher_suites = vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
        Ok(Self {
            chain: vec![CertificateDer::from_pem_file(&args.leaf).context("read the leaf")?],
            key: PrivateKeyDer::from_pem_file(&args.key).context("read the key")?,
            roots: Arc::new(roots),
            provider: Arc::new(provider),
        })
    }

    fn server(&self) -> Result<QuicServerConfig> {
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            self.roots.clone(),
            self.provider.clone(),
        )
        .build()?;
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.send_tls13_tickets = 0;
        Ok(QuicServerConfig::try_from(config)?)
    }

    fn client(&self) -> Result<QuicClientConfig> {
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(QuicClientConfig::try_from(config)?)
    }
}

enum Upstream {
    Quic(Pool),
    Tcp(HashMap<u8, SocketAddr>),
}

/// The one connection to the next hop, dialled on demand and again when it has closed.
struct Pool {
    endpoint: Endpoint,
    address: SocketAddr,
    connection: Mutex<Option<Connection>>,
}

impl Pool {
    fn new(address: SocketAddr, identity: &Identity, transport: Arc<quinn::TransportConfig>) -> Result<Self> {
        let mut config = quinn::ClientConfig::new(Arc::new(identity.client()?));
        config.transport_config(transport);
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let mut endpoint = Endpoint::client(any.parse()?)?;
        endpoint.set_default_client_config(config);
        Ok(Self { endpoint, address, connection: Mutex::new(None) })
    }

    async fn open(&self) -> Result<(SendStream, RecvStream)> {
        let connection = {
            let mut slot = self.connection.lock().await;
            match slot.as_ref().filter(|connection| connection.close_reason().is_none()) {
                Some(connection) => connection.clone(),
                None => slot.insert(self.endpoint.connect(self.address, PEER_NAME)?.await?).clone(),
            }
        };
        Ok(connection.open_bi().await?)
    }
}

async fn accept_tcp(listener: TcpListener, tag: u8, upstream: Arc<Upstream>) -> Result<()> {
    let mut streams = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept a connection")?;
        let upstream = upstream.clone();
        streams.spawn(async move {
            stream.set_nodelay(true)?;
            let Upstream::Quic(pool) = &*upstream else { bail!("TCP in needs QUIC out") };
            let (mut send, receive) = pool.open().await?;
            send.write_all(&[tag]).await?;
            let (from_client, to_client) = stream.into_split();
            both(tcp_to_quic(from_client, send), quic_to_tcp(receive, to_client)).await
        });
        while streams.try_join_next().is_some() {}
    }
}

async fn accept_quic(endpoint: Endpoint, upstream: Arc<Upstream>) -> Result<()> {
    let mut connections = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        let upstream = upstream.clone();
        connections.spawn(async move {
            let connection = incoming.await?;
            let mut streams = JoinSet::new();
            loop {
                let (send, receive) = connection.accept_bi().await?;
                streams.spawn(hand_on(send, receive, upstream.clone()));
                while streams.try_join_next().is_some() {}
            }
            #[allow(unreachable_code)]
            anyhow::Ok(())
        });
        while connections.try_join_next().is_some() {}
    }
    Ok(())
}

async fn hand_on(send: SendStream, mut receive: RecvStream, upstream: Arc<Upstream>) -> Result<()> {
    match &*upstream {
        Upstream::Quic(pool) => {
            let (next_send, next_receive) = pool.open().await?;
            both(quic_to_quic(receive, next_send), quic_to_quic(next_receive, send)).await
        }
        Upstream::Tcp(upstreams) => {
            let mut tag = [0];
            receive.read_exact(&mut tag).await?;
            let [tag] = tag;
            let address = upstreams.get(&tag).ok_or_else(|| anyhow!("no upstream {tag}"))?;
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (from_origin, to_origin) = stream.into_split();
            both(quic_to_tcp(receive, to_origin), tcp_to_quic(from_origin, send)).await
        }
    }
}

/// Each direction ends by itself (half-close); a failure of one ends both.
async fn both(one: impl Future<Output = Result<()>>, other: impl Future<Output = Result<()>>) -> Result<()> {
    futures::future::try_join(one, other).await.map(drop)
}

async fn tcp_to_quic(mut from: OwnedReadHalf, mut to: SendStream) -> Result<()> {
    let mut buffer = BytesMut::with_capacity(READ_BYTES);
    loop {
        buffer.reserve(READ_BYTES);
        match from.read_buf(&mut buffer).await {
            Ok(0) => return Ok(to.finish()?),
            Ok(_) => to.write_chunk(buffer.split().freeze()).await?,
            Err(error) => {
                let _ = to.reset(REFUSED);
                return Err(error.into());
            }
        }
    }
}

async fn quic_to_tcp(mut from: RecvStream, mut to: OwnedWriteHalf) -> Result<()> {
    while let Some(chunk) = from.read_chunk(READ_BYTES, true).await? {
        if let Err(error) = to.write_all(&chunk.bytes).await {
            let _ = from.stop(REFUSED);
            return Err(error.into());
        }
    }
    Ok(to.shutdown().await?)
}

async fn quic_to_quic(mut from: RecvStream, mut to: SendStream) -> Result<()> {
    while let Some(chunk) = from.read_chunk(READ_BYTES, true).await? {
        if let Err(error) = to.write_chunk(chunk.bytes).await {
            let _ = from.stop(REFUSED);
            return Err(error.into());
        }
    }
    Ok(to.finish()?)
}
