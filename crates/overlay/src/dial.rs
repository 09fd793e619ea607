//! Dialling: a connection to any endpoint of what a handle stands for (protocol.md section 2).
//!
//! No answer for max(3 RTT, 300 ms) starts a second attempt with a new nonce beside the first, which another gateway
//! replica or endpoint may take; a dial ends after 3 s. Attempts that lose are dropped, which closes them.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use quinn::{Connection, ConnectionError, ConnectionId, TransportConfig};
use tombolo_identity::{IdentityError, PeerIdentity};
use tombolo_model::ids::{Block, ClusterTag, Handle};
use tombolo_runtime::clock;

use crate::cid::{Cid, Kind};
use crate::connection::{HandleClass, PeerConnection};
use crate::keys::KeyRing;
use crate::socket::VIRTUAL_PEER;
use crate::transport::{UnusableTls, client_config};

/// The whole dial.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Before the second attempt, when the path's RTT is unknown.
const SECOND_ATTEMPT: Duration = Duration::from_millis(300);
/// One more after the second; each is two datagrams.
const MAX_ATTEMPTS: usize = 3;
/// quinn keys tickets and tokens by it; SNI is off, so it never reaches the wire.
const SERVER_NAME: &str = "overlay.tombolo.invalid";

/// What to dial: a handle of a cluster, and the keys that mint IDs for it.
#[derive(Clone, Debug)]
pub struct DialTarget {
    /// Service or control.
    pub kind: Kind,
    pub tag: ClusterTag,
    pub handle: Handle,
    pub keys: Arc<KeyRing>,
}

/// Why a dial failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error(
        "no key for this hour: the keys of handle {handle} end at {last_hour:?}; the federator has been away too long"
    )]
    KeysExpired { handle: Handle, last_hour: Option<crate::keys::Hour> },
    #[error(transparent)]
    Tls(#[from] UnusableTls),
    #[error("the connection can't be started: {0}")]
    Connect(#[from] quinn::ConnectError),
    #[error("no answer within {}s", DIAL_TIMEOUT.as_secs())]
    NoAnswer,
    #[error("the handshake failed: {0}")]
    Handshake(ConnectionError),
    #[error("the peer's identity does not hold: {0}")]
    Identity(#[from] IdentityError),
}

impl DialError {
    /// A metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::KeysExpired { .. } => "keys_expired",
            Self::Tls(_) => "tls_config",
            Self::Connect(_) => "connect",
            Self::NoAnswer => "no_answer",
            Self::Handshake(_) => "handshake",
            Self::Identity(_) => "identity",
        }
    }
    /// Whether another attempt may succeed without anything being changed.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NoAnswer | Self::Handshake(ConnectionError::TimedOut | ConnectionError::Reset))
    }
}

pub(crate) struct Dialler<'a> {
    pub endpoint: &'a quinn::Endpoint,
    pub transport: Arc<TransportConfig>,
    /// The expected round trip, when it is known.
    pub rtt: Option<Duration>,
    pub class: HandleClass,
    /// Whom the ID names in its nonce: of the renewal handle alone.
    pub holder: Option<Block>,
}

impl Dialler<'_> {
    pub async fn dial(
        &self,
        target: &DialTarget,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<PeerConnection, DialError> {
        match tokio::time::timeout(DIAL_TIMEOUT, self.race(target, tls)).await {
            Ok(result) => result,
            Err(_) => Err(DialError::NoAnswer),
        }
    }

    async fn race(
        &self,
        target: &DialTarget,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<PeerConnection, DialError> {
        let patience = self.rtt.map_or(SECOND_ATTEMPT, |rtt| (3 * rtt).max(SECOND_ATTEMPT));
        let mut attempts = FuturesUnordered::new();
        attempts.push(self.attempt(target, Arc::clone(&tls))?);
        let mut started = 1;
        loop {
            let more = started < MAX_ATTEMPTS;
            tokio::select! {
                Some(finished) = attempts.next() => match finished {
                    Ok(connection) => return self.authenticated(connection),
                    Err(error) if attempts.is_empty() => return Err(DialError::Handshake(error)),
                    Err(error) => tracing::trace!(%error, "one of several dial attempts failed"),
                },
                () = tokio::time::sleep(patience), if more => {
                    started += 1;
                    attempts.push(self.attempt(target, Arc::clone(&tls))?);
                }
                else => return Err(DialError::NoAnswer),
            }
        }
    }

    fn attempt(
        &self,
        target: &DialTarget,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<quinn::Connecting, DialError> {
        let now = clock::since_unix_epoch();
        let (hour, key) = target.keys.current(now).ok_or_else(|| DialError::KeysExpired {
            handle: target.handle,
            last_hour: target.keys.last_hour(),
        })?;
        let nonce = match self.holder {
            Some(block) => renewal_nonce(block, rand::random()),
            None => rand::random(),
        };
        let cid = Cid::mint(target.kind, target.tag, target.handle.value(), nonce, hour, key);
        let config =
            client_config(tls, Arc::clone(&self.transport), move || ConnectionId::new(cid.as_bytes()))?;
        Ok(self.endpoint.connect_with(config, VIRTUAL_PEER, SERVER_NAME)?)
    }

    fn authenticated(&self, connection: Connection) -> Result<PeerConnection, DialError> {
        let identity = peer_identity(&connection)?;
        Ok(PeerConnection::new(connection, identity, self.class, None))
    }
}

/// Of an ID for the renewal handle: the caller's block, then 24 random bits, so that gateways know by whose key to judge it.
/// A caller has a few of them at a time at most.
pub fn renewal_nonce(block: Block, random: [u8; 3]) -> [u8; 7] {
    let [a, b, c, d] = block.value().to_be_bytes();
    let [e, f, g] = random;
    [a, b, c, d, e, f, g]
}

/// Who dials the renewal handle with an ID of this nonce.
pub fn renewal_holder(nonce: &[u8; 7]) -> Option<Block> {
    let [a, b, c, d, ..] = *nonce;
    Block::new(u32::from_be_bytes([a, b, c, d]))
}

/// The identity that the TLS verifier accepted; `None` when the peer showed no certificate (a joiner).
pub(crate) fn peer_identity(connection: &Connection) -> Result<Option<PeerIdentity>, IdentityError> {
    let certificates = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok());
    match certificates {
        Some(chain) if !chain.is_empty() => tombolo_identity::peer_identity_from_certs(&chain).map(Some),
        _ => Ok(None),
    }
}
