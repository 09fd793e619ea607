//! One question to one upstream resolver: over UDP from a port and with a number of its own, over TCP when the reply did
//! not fit.
//!
//! A reply counts when it comes from where the question went (the socket is connected), carries its number, and repeats
//! its question; others are what an attacker guesses (RFC 5452).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

use crate::message::{UDP_PAYLOAD, own_edns};
use crate::upstream::Failure;

/// A resolver has most answers at hand; one that has to look them up first is waited for in the second round.
pub const FIRST_PATIENCE: Duration = Duration::from_secs(1);
pub const SECOND_PATIENCE: Duration = Duration::from_secs(2);
/// Resolvers that ignore what they are told send up to this.
const BUFFER_BYTES: usize = 4096;

/// Why an upstream gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("no answer in time")]
    Timeout,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the question can't be written, or the answer not be read")]
    Message,
}

impl ExchangeError {
    /// What it says of the upstream.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Io(error) if nobody_is_there(error) => Failure::Refused,
            // What is wrong here, such as no free socket, is not the upstream's.
            Self::Timeout | Self::Message | Self::Io(_) => Failure::Silent,
        }
    }
}

fn nobody_is_there(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable)
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub query: Query,
    pub dnssec_ok: bool,
    pub checking_disabled: bool,
}

/// Asks an upstream, over TCP too if need be; all within `patience`.
pub async fn exchange(
    upstream: SocketAddr,
    asked: &Asked,
    patience: Duration,
) -> Result<Message, ExchangeError> {
    let until = Instant::now() + patience;
    let mut question = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.metadata.checking_disabled = asked.checking_disabled;
    question.add_query(asked.query.clone());
    question.set_edns(own_edns(asked.dnssec_ok));
    let bytes = question.to_vec().map_err(|_| ExchangeError::Message)?;
    let within = async {
        let reply = over_udp(upstream, &question, &bytes).await?;
        if reply.metadata.truncation { over_tcp(upstream, &question, &bytes).await } else { Ok(reply) }
    };
    timeout_at(until, within).await.unwrap_or(Err(ExchangeError::Timeout))
}

async fn over_udp(upstream: SocketAddr, question: &Message, bytes: &[u8]) -> Result<Message, ExchangeError> {
    let any: SocketAddr = match upstream {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(upstream).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; BUFFER_BYTES.max(UDP_PAYLOAD.into())];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let reply = buffer.get(..length).and_then(|packet| Message::from_vec(packet).ok());
        if let Some(reply) = reply.filter(|reply| answers(reply, question)) {
            return Ok(reply);
        }
    }
}

async fn over_tcp(upstream: SocketAddr, question: &Message, bytes: &[u8]) -> Result<Message, ExchangeError> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(bytes.len()).map_err(|_| ExchangeError::Message)?;
    let mut framed = Vec::with_capacity(bytes.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut buffer = vec![0; length.into()];
    stream.read_exact(&mut buffer).await?;
    let reply = Message::from_vec(&buffer).map_err(|_| ExchangeError::Message)?;
    if answers(&reply, question) { Ok(reply) } else { Err(ExchangeError::Message) }
}

/// Whether a reply is one to this question.
fn answers(reply: &Message, question: &Message) -> bool {
    let same = match (reply.queries.as_slice(), question.queries.as_slice()) {
        ([replied], [asked]) => {
            replied.name() == asked.name()
                && replied.query_type() == asked.query_type()
                && replied.query_class() == asked.query_class()
        }
        // Some leave it out where they could not read it.
        ([], _) => reply.answers.is_empty(),
        _ => false,
    };
    reply.metadata.id == question.metadata.id && reply.metadata.message_type == MessageType::Response && same
}

/// Whether a name server of the mesh answers: the schema version of KEP-1645 section 2.2. The error says why not.
pub async fn check_version(server: SocketAddr, patience: Duration) -> Result<(), String> {
    let name = Name::from_labels(["dns-version", "clusterset", "local"]).map_err(|e| e.to_string())?;
    let query = Query::query(name, RecordType::TXT);
    let asked = Asked { query, dnssec_ok: false, checking_disabled: false };
    let reply = exchange(server, &asked, patience).await.map_err(|error| error.to_string())?;
    let is_version = |record: &Record| matches!(record.data, RData::TXT(_));
    match reply.metadata.response_code {
        ResponseCode::NoError if reply.answers.iter().any(is_version) => Ok(()),
        code => Err(format!("it knows no dns-version.clusterset.local: {code}")),
    }
}
