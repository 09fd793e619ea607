//! Connections that go on without the mesh: dialled with the mark that the rules let through, and copied byte by byte.
//!
//! Each direction is closed by itself, and a reset is passed on as a reset. No buffer is held while a direction waits.
//! [`Dialler`] remembers its own connections while they are open, so that one which comes back, caught by rules that do
//! not exclude the sidecar, is seen and ended instead of going round for ever.

use std::collections::HashSet;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpStream;

use crate::copy::{self, IdleLimits};

/// The application's connection stands already: it can't be told to wait as long as the kernel would (two minutes).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Held by a direction while it has something to carry.
const BUFFER_BYTES: usize = 32 * 1024;
/// Bytes that one direction moves before others of the thread get their turn.
const TURN_BYTES: usize = 256 * 1024;

/// Dials past the rules.
#[derive(Clone, Debug)]
pub struct Dialler(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mark: Option<u32>,
    /// Whether own connections are remembered: where nothing is captured, none can come back.
    remembers: bool,
    own: Mutex<HashSet<SocketAddr>>,
    loop_told: AtomicBool,
}

/// A connection that was dialled here.
#[derive(Debug)]
pub struct Dialled {
    pub tcp: TcpStream,
    known: Known,
}

impl Dialled {
    pub fn into_parts(self) -> (TcpStream, Known) {
        (self.tcp, self.known)
    }
}

/// Keeps a connection known as our own for as long as it is held.
#[derive(Debug)]
pub struct Known {
    from: SocketAddr,
    dialler: Dialler,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.dialler.forget(self.from);
    }
}

impl Dialler {
    /// Where nothing is captured: neither marks nor remembers.
    pub fn plain() -> Self {
        Self::with(None, false)
    }

    /// Marks its sockets, where it may.
    pub fn marking(mark: u32) -> Self {
        let marked =
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).and_then(|s| s.set_mark(mark));
        if let Err(error) = &marked {
            tracing::warn!(%error, user = %nix::unistd::geteuid(),
                "own connections can't be marked (CAP_NET_RAW would do): the rules must exclude this user, with `tombolo sidecar capture apply --exclude-uid`");
        }
        Self::with(marked.is_ok().then_some(mark), true)
    }

    fn with(mark: Option<u32>, remembers: bool) -> Self {
        Self(Arc::new(Inner { mark, remembers, own: Mutex::default(), loop_told: AtomicBool::new(false) }))
    }

    /// What it puts on its sockets.
    pub fn mark(&self) -> Option<u32> {
        self.0.mark
    }

    fn own(&self) -> std::sync::MutexGuard<'_, HashSet<SocketAddr>> {
        self.0.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, from: SocketAddr) {
        if self.0.remembers {
            self.own().remove(&from);
        }
    }

    /// Whether a connection that has come in was dialled here.
    pub fn is_own(&self, from: SocketAddr) -> bool {
        self.own().contains(&from)
    }

    /// The same of one that was redirected, which is a mistake in the rules: said once.
    pub fn has_come_back(&self, from: SocketAddr) -> bool {
        let own = self.is_own(from);
        if own && !self.0.loop_told.swap(true, Relaxed) {
            tracing::error!(
                "the rules catch this sidecar's own connections, which are cut: exclude its user with `tombolo sidecar capture apply --exclude-uid`, or let it mark them (CAP_NET_RAW, and the same mark on both sides)"
            );
        }
        own
    }

    /// Connects within `limit`.
    pub async fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<Dialled> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.0.mark {
            socket.set_mark(mark)?;
        }
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        // Known before it can come back and be accepted on this thread.
        let from = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        if self.0.remembers {
            self.own().insert(from);
        }
        let known = Known { from, dialler: self.clone() };
        let dialled = Dialled { tcp: TcpStream::from_std(socket.into())?, known };
        let connected = tokio::time::timeout(limit, dialled.tcp.writable()).await;
        connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        match dialled.tcp.take_error()? {
            Some(error) => Err(error),
            None => Ok(dialled),
        }
    }

    /// Connects to where a captured connection was going.
    pub async fn pass(&self, to: SocketAddr) -> io::Result<Dialled> {
        self.connect(to, CONNECT_TIMEOUT).await
    }
}

/// Copies both ways until both are over; on anything but an orderly end both connections are reset.
pub async fn relay(app: TcpStream, far: &Dialled, bytes: &Counter, limits: &IdleLimits) -> &'static str {
    for tcp in [&app, &far.tcp] {
        // Small answers must not wait for an acknowledgement of the ones before.
        let _ = tcp.set_nodelay(true);
    }
    let moved = AtomicU64::new(0);
    let reason = tokio::select! {
        ended = async { tokio::try_join!(one_way(&app, &far.tcp, &moved), one_way(&far.tcp, &app, &moved)) } => {
            if ended.is_ok() { "finished" } else { "reset" }
        }
        () = silence(&moved, limits.open) => "idle",
    };
    bytes.inc_by(moved.into_inner());
    if reason != "finished" {
        let _ = SockRef::from(&far.tcp).set_linger(Some(Duration::ZERO));
        copy::abort(app);
    }
    reason
}

async fn one_way(from: &TcpStream, to: &TcpStream, moved: &AtomicU64) -> io::Result<()> {
    let mut turn = 0;
    loop {
        from.readable().await?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        loop {
            buffer.clear();
            match from.try_read_buf(&mut buffer) {
                // The other side may be gone already; then there is nobody to tell.
                Ok(0) => {
                    let _ = SockRef::from(to).shutdown(Shutdown::Write);
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            write_all(to, &buffer).await?;
            moved.fetch_add(buffer.len() as u64, Relaxed);
            turn += buffer.len();
            if turn >= TURN_BYTES {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends when nothing has moved for `limit`; moving a byte costs no timer operation.
async fn silence(moved: &AtomicU64, limit: Duration) {
    let mut seen = moved.load(Relaxed);
    loop {
        tokio::time::sleep(limit).await;
        let now = moved.load(Relaxed);
        if now == seen {
            return;
        }
        seen = now;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap());
        let (dialled, accepted) = tokio::join!(dialled, listener.accept());
        (dialled.unwrap(), accepted.unwrap().0)
    }

    /// An application's connection, what the relay holds of it, and the far server's listener.
    async fn relayed() -> (TcpStream, TcpStream, TcpListener, SocketAddr) {
        let (client, app) = pair().await;
        let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = far.local_addr().unwrap();
        (client, app, far, address)
    }

    const LIMITS: IdleLimits =
        IdleLimits { open: Duration::from_secs(60), half_closed: Duration::from_secs(60) };

    #[tokio::test]
    async fn bytes_and_half_closes_are_passed_on_both_ways() {
        let (mut client, app, far, address) = relayed().await;
        let dialled = Dialler::plain().pass(address).await.unwrap();
        let bytes = Counter::default();
        let server = async {
            let (mut tcp, _) = far.accept().await.unwrap();
            let mut read = Vec::new();
            tcp.read_to_end(&mut read).await.unwrap();
            tcp.write_all(b"answer").await.unwrap();
            read
        };
        let talk = async {
            let (mut read, mut write) = client.split();
            write.write_all(&vec![7; 300_000]).await.unwrap();
            write.shutdown().await.unwrap();
            let mut answer = Vec::new();
            read.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let (reason, read, answer) = tokio::join!(relay(app, &dialled, &bytes, &LIMITS), server, talk);
        assert_eq!((reason, read.len(), answer.as_slice()), ("finished", 300_000, b"answer".as_slice()));
        assert_eq!(bytes.get(), 300_006);
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_as_a_reset() {
        let (mut client, app, far, address) = relayed().await;
        let dialled = Dialler::plain().pass(address).await.unwrap();
        let bytes = Counter::default();
        let server = async { copy::abort(far.accept().await.unwrap().0) };
        let (reason, ()) = tokio::join!(relay(app, &dialled, &bytes, &LIMITS), server);
        assert_eq!(reason, "reset");
        let error = client.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_connection_of_its_own_is_known_until_it_ends() {
        let far = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialler = Dialler::with(None, true);
        let dialled = dialler.pass(far.local_addr().unwrap()).await.unwrap();
        let (_accepted, from) = far.accept().await.unwrap();
        assert!(dialler.is_own(from));
        drop(dialled);
        assert!(!dialler.is_own(from));
    }

    #[tokio::test]
    async fn a_refusal_is_an_error() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = Dialler::plain().pass(gone).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_what_is_forgotten() {
        let moved = AtomicU64::new(0);
        let begun = tokio::time::Instant::now();
        silence(&moved, Duration::from_secs(5)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }
}
