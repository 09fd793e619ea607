//! The demo's HTTP client: one request per connection, so that each is a new stream through the mesh.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Largest answer that is read into memory.
const MAX_BODY_BYTES: usize = 1024 * 1024;

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// GET with a deadline over everything; the error says how far it came.
pub async fn get(address: SocketAddr, path: &str, deadline: Duration) -> Result<Answer, String> {
    let exchange = async {
        let (mut body, status, driver) = open(address, path).await?;
        let read = async {
            let mut bytes = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|e| format!("body: {e}"))?;
                if let Some(data) = frame.data_ref() {
                    if bytes.len() + data.len() > MAX_BODY_BYTES {
                        return Err("body: larger than expected".to_owned());
                    }
                    bytes.extend_from_slice(data);
                }
            }
            Ok(bytes)
        };
        tokio::pin!(read);
        // The connection ends by itself after its one answer; the body may still be read then.
        let body = tokio::select! {
            body = &mut read => body?,
            ended = driver => { ended.map_err(|e| format!("connection: {e}"))?; read.await? }
        };
        Ok(Answer { status, body })
    };
    tokio::time::timeout(deadline, exchange).await.map_err(|_| format!("no answer within {deadline:?}"))?
}

type Driver = hyper::client::conn::http1::Connection<TokioIo<TcpStream>, Empty<Bytes>>;

async fn open(address: SocketAddr, path: &str) -> Result<(Incoming, u16, Driver), String> {
    let stream = TcpStream::connect(address).await.map_err(|e| format!("connect: {e}"))?;
    let (mut sender, mut driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| format!("connect: {e}"))?;
    let request = hyper::Request::builder()
        .uri(path)
        .header("host", "web.shop")
        .header("connection", "close")
        .body(Empty::new())
        .map_err(|e| format!("request: {e}"))?;
    let response = sender.send_request(request);
    tokio::pin!(response);
    let response = tokio::select! {
        response = &mut response => response,
        ended = &mut driver => match ended {
            Ok(()) => response.await,
            Err(error) => return Err(format!("connection: {error}")),
        },
    };
    let response = response.map_err(|e| format!("answer: {e}"))?;
    let status = response.status().as_u16();
    Ok((response.into_body(), status, driver))
}

/// How a long download went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Download {
    pub bytes: u64,
    /// The longest time without a byte.
    pub longest_gap: Duration,
    /// When that gap ended.
    pub gap_ended: Option<Instant>,
}

/// Reads `/stream` to its end, checking every byte against [`super::app::byte_at`]. `Err` is a broken stream.
pub async fn download(address: SocketAddr, path: &str, expected: u64) -> Result<Download, String> {
    let (mut body, status, driver) = open(address, path).await?;
    if status != 200 {
        return Err(format!("status {status}"));
    }
    let read = async {
        let mut seen = Download::default();
        let mut last = Instant::now();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| format!("after {} bytes: {e}", seen.bytes))?;
            let Some(data) = frame.data_ref() else { continue };
            let gap = last.elapsed();
            last = Instant::now();
            if gap > seen.longest_gap {
                (seen.longest_gap, seen.gap_ended) = (gap, Some(last));
            }
            for byte in data.iter() {
                if *byte != super::app::byte_at(seen.bytes) {
                    return Err(format!("byte {} is wrong", seen.bytes));
                }
                seen.bytes += 1;
            }
        }
        if seen.bytes == expected {
            Ok(seen)
        } else {
            Err(format!("ended after {} of {expected} bytes", seen.bytes))
        }
    };
    tokio::pin!(read);
    tokio::select! {
        result = &mut read => result,
        ended = driver => { ended.map_err(|e| format!("connection: {e}"))?; read.await }
    }
}
