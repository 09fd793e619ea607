//! The header that opens every application stream: bounded in bytes and in time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tombolo_proto::stream_header::{self, FrameError, MAX_HEADER_BYTES};
use tombolo_proto::v1::{StreamHeader, Transport};

use crate::copy::{End, RecvHalf, read_failed};

/// The caller sends the header with the first bytes; on the longest paths it takes one retransmission. Longer is a slow
/// peer that wants to hold memory.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Why no header was read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("the stream header did not arrive within {}s", TIMEOUT.as_secs())]
    Late,
    #[error("the stream ended before its header")]
    Truncated,
    #[error("stream header: {0}")]
    Frame(#[from] FrameError),
    #[error("port {port} is not one of 1..=65535")]
    Port { port: u32 },
    #[error("transport {transport} is neither TCP (0) nor UDP (1)")]
    Transport { transport: i32 },
    #[error("the stream ended: {}", .0.reason())]
    Stream(End),
}

/// What the caller asks for, and the application bytes that came with it.
#[derive(Debug)]
pub struct Opened {
    pub port: u16,
    pub transport: Transport,
    pub traceparent: String,
    pub early: Bytes,
}

/// Reads one header.
pub async fn read(recv: &mut RecvHalf) -> Result<Opened, HeaderError> {
    tokio::time::timeout(TIMEOUT, read_frame(recv)).await.unwrap_or(Err(HeaderError::Late))
}

async fn read_frame(recv: &mut RecvHalf) -> Result<Opened, HeaderError> {
    let mut buffer = BytesMut::new();
    loop {
        let room = 2 + MAX_HEADER_BYTES - buffer.len().min(1 + MAX_HEADER_BYTES);
        let chunk = recv.read_some(room).await.map_err(|e| HeaderError::Stream(read_failed(e)))?;
        buffer.extend_from_slice(&chunk.ok_or(HeaderError::Truncated)?);
        if let Some(header) = stream_header::decode::<StreamHeader>(&mut buffer, MAX_HEADER_BYTES)? {
            let port = u16::try_from(header.port).ok().filter(|port| *port != 0);
            return Ok(Opened {
                port: port.ok_or(HeaderError::Port { port: header.port })?,
                transport: Transport::try_from(header.transport)
                    .map_err(|_| HeaderError::Transport { transport: header.transport })?,
                traceparent: header.traceparent,
                early: buffer.freeze(),
            });
        }
    }
}

/// The bytes of a TCP connection's header.
pub fn encode(port: u16) -> Bytes {
    encode_for(port, Transport::Tcp)
}

/// The bytes of a header.
pub fn encode_for(port: u16, transport: Transport) -> Bytes {
    let transport = transport.into();
    stream_header::encode(&StreamHeader { port: port.into(), transport, ..Default::default() })
}
