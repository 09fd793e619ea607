//! The byte path: one application TCP connection to and from one QUIC stream.
//!
//! Invariants: each direction is closed by itself (FIN <-> end of stream); a reset is carried as a reset both ways (TCP
//! RST <-> RESET_STREAM and STOP_SENDING); whatever is dropped half-way is reset, never ended cleanly, so that no peer
//! takes a truncated body for a whole one. No buffer is held while a direction waits, so an idle stream costs its
//! future alone. A slow reader stops the writer: nothing is queued here.
//!
//! [`copy`] borrows the TCP stream and leaves its end to the caller, who may still try another endpoint ([`Replay`]).

mod meter;
mod replay;
mod stream;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::{ReadError, StoppedError, VarInt, WriteError};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

pub use meter::Meter;
pub use replay::{Kept, Replay};
pub use stream::{BiStream, RecvHalf, SendHalf};

use crate::codes;

/// A request fits; a stream that reads more at once doubles it.
const FIRST_READ_BYTES: usize = 4 * 1024;
/// More costs cache misses and gains nothing measurable: quinn cuts it into packets anyway.
const MAX_READ_BYTES: usize = 64 * 1024;
/// Chunks taken from the stream per write: about 46 KB of full packets in one `writev`.
const CHUNKS_PER_WRITE: usize = 32;
/// Bytes that one direction moves before other streams of the thread get their turn.
const TURN_BYTES: usize = 256 * 1024;
/// After the receiver of one direction is gone, the other direction may still deliver what it has, for this long.
const LINGER: Duration = Duration::from_secs(2);

/// How long silence is bearable.
#[derive(Clone, Copy, Debug)]
pub struct IdleLimits {
    /// Both directions open: databases keep connections for hours, so this only ends what is forgotten.
    pub open: Duration,
    /// One direction closed: the usual leak of proxies (CLOSE_WAIT) ends here.
    pub half_closed: Duration,
}

impl Default for IdleLimits {
    fn default() -> Self {
        Self { open: Duration::from_secs(24 * 3600), half_closed: Duration::from_secs(3600) }
    }
}

/// How a copied stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Both directions were closed in order and everything was delivered.
    Finished,
    /// The application reset its connection, or stopped taking data.
    AppReset,
    /// The peer reset the stream or stopped taking data.
    PeerReset(VarInt),
    /// The connection under the stream ended.
    ConnectionLost,
    /// Silence beyond the limit.
    Idle,
}

impl End {
    /// Access-log reason and metric label: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::AppReset => "app_reset",
            Self::PeerReset(code) => codes::name(*code),
            Self::ConnectionLost => "connection_lost",
            Self::Idle => "idle",
        }
    }
    /// What the peer is told.
    fn code(&self) -> u32 {
        match self {
            Self::Finished | Self::PeerReset(_) | Self::ConnectionLost => codes::ABANDONED,
            Self::AppReset => codes::APP_RESET,
            Self::Idle => codes::IDLE,
        }
    }
}

/// Why one direction stopped.
enum Stop {
    /// Nothing more can come of either direction.
    Both(End),
    /// The receiver of this direction is gone; the other direction may still deliver.
    This(End),
}

/// Copies both ways until both directions are over. `early` is what was read of the stream before. `eof_sent`: the
/// application's end was already carried (a replay). On any end but [`End::Finished`] the QUIC stream has been reset;
/// the TCP stream is untouched: see [`abort`].
pub async fn copy(
    tcp: &TcpStream,
    stream: &mut BiStream,
    early: Bytes,
    eof_sent: bool,
    meter: &Meter,
    replay: Option<&Replay>,
    limits: &IdleLimits,
) -> End {
    let (send, recv) = stream.halves();
    let end = both(tcp, send, recv, early, eof_sent, meter, replay, limits).await;
    if end != End::Finished {
        stream.abort(end.code());
    }
    end
}

#[allow(clippy::too_many_arguments)] // the private half of `copy`
async fn both(
    tcp: &TcpStream,
    send: &mut SendHalf,
    recv: &mut RecvHalf,
    early: Bytes,
    eof_sent: bool,
    meter: &Meter,
    replay: Option<&Replay>,
    limits: &IdleLimits,
) -> End {
    let mut upload = std::pin::pin!(upload(tcp, send, eof_sent, meter, replay));
    let mut download = std::pin::pin!(download(tcp, recv, early, meter, replay));
    let (mut uploaded, mut downloaded) = (false, false);
    let mut first_failure = None;
    let mut linger = std::pin::pin!(tokio::time::sleep(limits.half_closed.min(limits.open)));
    let mut seen = meter.total();
    let mut quiet = Duration::ZERO;
    let mut step = limits.half_closed.min(limits.open);
    loop {
        let stopped = tokio::select! {
            result = &mut upload, if !uploaded => { uploaded = true; result }
            result = &mut download, if !downloaded => { downloaded = true; result }
            () = app_error(tcp), if uploaded && !downloaded => Err(Stop::Both(End::AppReset)),
            () = &mut linger => {
                if let Some(end) = first_failure.take() {
                    return end;
                }
                // Silence is measured in steps, so that moving a byte costs no timer operation.
                let total = meter.total();
                quiet = if total == seen { quiet + step } else { Duration::ZERO };
                seen = total;
                let limit = if uploaded || downloaded { limits.half_closed } else { limits.open };
                if quiet >= limit {
                    return End::Idle;
                }
                step = (limit - quiet).min(limits.half_closed);
                linger.as_mut().reset(tokio::time::Instant::now() + step);
                continue;
            }
        };
        match stopped {
            Ok(()) => {}
            Err(Stop::Both(end)) => return first_failure.unwrap_or(end),
            Err(Stop::This(end)) => {
                if first_failure.is_none() {
                    first_failure = Some(end);
                    linger.as_mut().reset(tokio::time::Instant::now() + LINGER);
                }
            }
        }
        if uploaded && downloaded {
            return first_failure.unwrap_or(End::Finished);
        }
    }
}

/// Application to stream. Over when the peer has acknowledged everything.
async fn upload(
    tcp: &TcpStream,
    send: &mut SendHalf,
    eof_sent: bool,
    meter: &Meter,
    replay: Option<&Replay>,
) -> Result<(), Stop> {
    let mut stopped = std::pin::pin!(send.stopped());
    if !eof_sent {
        let mut size = FIRST_READ_BYTES;
        let mut turn = 0;
        'open: loop {
            tokio::select! {
                biased;
                ready = tcp.readable() => ready.map_err(|_| Stop::Both(End::AppReset))?,
                why = &mut stopped => return Err(stopped_by_peer(why)),
            }
            loop {
                let mut buffer = BytesMut::with_capacity(size);
                let read = match read_once(tcp, &mut buffer) {
                    Ok(Some(0)) => break 'open,
                    Ok(Some(read)) => read,
                    Ok(None) => break,
                    Err(_) => return Err(Stop::Both(End::AppReset)),
                };
                // A full buffer: there is more, so read more at once. A nearly empty one: stop reserving for bulk.
                let full = buffer.capacity() == buffer.len();
                size = match full {
                    true => (size * 2).min(MAX_READ_BYTES),
                    false if read < size / 4 => (size / 2).max(FIRST_READ_BYTES),
                    false => size,
                };
                let chunk = buffer.freeze();
                if let Some(replay) = replay {
                    replay.record(&chunk);
                }
                send.write(chunk).await.map_err(write_failed)?;
                meter.sent(read);
                turn += read;
                if turn >= TURN_BYTES {
                    turn = 0;
                    tokio::task::yield_now().await;
                }
                if !full {
                    break;
                }
            }
        }
        if let Some(replay) = replay {
            replay.record_end();
        }
    }
    send.finish();
    // Delivered, or refused after all. The application may still reset its connection while we wait.
    tokio::select! {
        why = &mut stopped => match why {
            Ok(None) => Ok(()),
            why => Err(stopped_by_peer(why)),
        },
        () = app_error(tcp) => Err(Stop::Both(End::AppReset)),
    }
}

/// Stream to application. Over when the application has been given the end.
async fn download(
    tcp: &TcpStream,
    recv: &mut RecvHalf,
    early: Bytes,
    meter: &Meter,
    replay: Option<&Replay>,
) -> Result<(), Stop> {
    let mut chunks: [Bytes; CHUNKS_PER_WRITE] = Default::default();
    if !early.is_empty() {
        meter.received(early.len());
        chunks[0] = early;
        write_all(tcp, recv, &mut chunks[..1]).await?;
    }
    let mut turn = 0;
    loop {
        let filled = match recv.read(&mut chunks).await {
            Ok(Some(filled)) => filled,
            Ok(None) => break,
            Err(error) => return Err(Stop::Both(read_failed(error))),
        };
        if let Some(replay) = replay {
            replay.commit();
        }
        let chunks = chunks.get_mut(..filled).unwrap_or_default();
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        write_all(tcp, recv, chunks).await?;
        meter.received(bytes);
        turn += bytes;
        if turn >= TURN_BYTES {
            turn = 0;
            tokio::task::yield_now().await;
        }
    }
    if let Some(replay) = replay {
        replay.commit();
    }
    // The application may be gone already; then there is nobody to tell.
    let _ = SockRef::from(tcp).shutdown(Shutdown::Write);
    Ok(())
}

/// Reads once into `buffer`'s spare room. `Ok(None)`: nothing there now.
fn read_once(tcp: &TcpStream, buffer: &mut BytesMut) -> io::Result<Option<usize>> {
    let mut partial = None;
    let read = tcp.try_io(Interest::READABLE, || {
        let spare = buffer.spare_capacity_mut();
        let room = spare.len();
        let read = SockRef::from(tcp).recv(spare)?;
        // SAFETY: recv initialised the first `read` bytes of the spare room.
        unsafe { buffer.advance_mut(read) };
        if read > 0 && read < room {
            // The socket is empty: telling tokio so saves the read that would only find that out.
            partial = Some(read);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(read)
    });
    match (read, partial) {
        (Ok(read), _) | (Err(_), Some(read)) => Ok(Some(read)),
        (Err(e), None) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        (Err(e), None) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
        (Err(e), None) => Err(e),
    }
}

/// Writes all chunks and lets go of them: a held chunk pins the datagrams it came in.
async fn write_all(tcp: &TcpStream, recv: &mut RecvHalf, chunks: &mut [Bytes]) -> Result<(), Stop> {
    let mut watch_reset = true;
    let mut next = 0;
    while next < chunks.len() {
        let mut slices = [IoSlice::new(&[]); CHUNKS_PER_WRITE];
        let mut count = 0;
        for (slice, chunk) in slices.iter_mut().zip(chunks.iter().skip(next)) {
            *slice = IoSlice::new(chunk);
            count += 1;
        }
        match tcp.try_write_vectored(slices.get(..count).unwrap_or_default()) {
            Ok(mut written) => {
                for chunk in chunks.iter_mut().skip(next) {
                    if written < chunk.len() {
                        chunk.advance(written);
                        break;
                    }
                    written -= chunk.len();
                    *chunk = Bytes::new();
                    next += 1;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                tokio::select! {
                    ready = tcp.writable() => {
                        if ready.is_err() {
                            return Err(app_gone(recv));
                        }
                    }
                    // A reset overtakes data that the application has not taken, as in TCP.
                    code = recv.received_reset(), if watch_reset => match code {
                        Some(code) => return Err(Stop::Both(End::PeerReset(code))),
                        None => watch_reset = false,
                    },
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(app_gone(recv)),
        }
    }
    Ok(())
}

/// The application takes no more data: the peer is told at once, and what the application has sent is still carried.
fn app_gone(recv: &mut RecvHalf) -> Stop {
    recv.stop(codes::APP_RESET);
    Stop::This(End::AppReset)
}

/// Ends when the application's connection has failed (RST).
async fn app_error(tcp: &TcpStream) {
    let _ = tcp.ready(Interest::ERROR).await;
}

fn stopped_by_peer(why: Result<Option<VarInt>, StoppedError>) -> Stop {
    match why {
        Ok(Some(code)) => Stop::This(End::PeerReset(code)),
        // Acknowledged to the end before we ended it can't be; lost is lost.
        Ok(None) | Err(_) => Stop::Both(End::ConnectionLost),
    }
}

fn write_failed(error: WriteError) -> Stop {
    match error {
        WriteError::Stopped(code) => Stop::This(End::PeerReset(code)),
        WriteError::ConnectionLost(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => {
            Stop::Both(End::ConnectionLost)
        }
    }
}

/// What a failed read of the stream means.
pub fn read_failed(error: ReadError) -> End {
    match error {
        ReadError::Reset(code) => End::PeerReset(code),
        _ => End::ConnectionLost,
    }
}

/// Ends an application connection with RST: it must not take what it has got for the whole.
pub fn abort(tcp: TcpStream) {
    let _ = SockRef::from(&tcp).set_linger(Some(Duration::ZERO));
}
