//! The sidecar's listeners for applications: bound before anything else, so that a taken port fails the start and uses up no join
//! token; closed last, so that nobody is reset whose connection stands.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tombolo_model::protocol::Protocol;
use tombolo_runtime::drain::Drain;

use crate::capture::listener;
use crate::config::SidecarConfig;
use crate::shared::{Call, Handed};
use crate::udp::socket as udp;

/// tokio's; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 1024;
/// `accept` fails when file descriptors run out: trying again at once would only burn CPU.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// For handshakes that are half done when a listener closes: a round trip within the site.
pub(crate) const LAST_HANDSHAKES: Duration = Duration::from_millis(50);

/// Drops SYNs, lets everything else in. The kernel shows a filter of a TCP socket the segment from its header on.
const NO_MORE_SYNS: [SockFilter; 4] = [
    // BPF_LD | BPF_B | BPF_ABS, BPF_JMP | BPF_JSET | BPF_K, BPF_RET | BPF_K.
    SockFilter::new(0x30, 0, 0, 13),
    SockFilter::new(0x45, 0, 1, 0x02),
    SockFilter::new(0x06, 0, 0, 0),
    SockFilter::new(0x06, 0, 0, u32::MAX),
];

/// Where applications call one upstream, once per thread.
pub(crate) type Listeners = Vec<std::net::TcpListener>;

/// Listens `count` times at one address; the kernel spreads connections over them.
pub(crate) fn listen(address: SocketAddr, count: usize) -> io::Result<Listeners> {
    listen_with(address, count, |_| Ok(()))
}

/// The same with sockets that `prepare` has set up.
pub(crate) fn listen_with(
    address: SocketAddr,
    count: usize,
    prepare: impl Fn(&Socket) -> io::Result<()>,
) -> io::Result<Listeners> {
    bind_all(address, count, |address, shared| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(socket2::Protocol::TCP))?;
        prepare(&socket)?;
        socket.set_nonblocking(true)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(shared)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    })
}

/// Binds `count` sockets to one address by `bind`, which gets the address, and whether others may have it as well.
pub(crate) fn bind_all<S: AsFd>(
    address: SocketAddr,
    count: usize,
    bind: impl Fn(SocketAddr, bool) -> io::Result<S>,
) -> io::Result<Vec<S>> {
    // A shared port may be joined by another process of the same user; one that is taken already is an error.
    let alone = bind(address, false)?;
    if count <= 1 {
        return Ok(vec![alone]);
    }
    let bound = SockRef::from(&alone).local_addr()?.as_socket();
    drop(alone);
    (0..count).map(|_| bind(bound.unwrap_or(address), true)).collect()
}

/// Where applications call one upstream, on one thread.
#[derive(Debug)]
pub(crate) enum UpstreamListener {
    Tcp(std::net::TcpListener),
    Udp(std::net::UdpSocket),
}

impl UpstreamListener {
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Udp(socket) => socket.local_addr(),
        }
    }
}

/// The listeners of one thread.
#[derive(Debug, Default)]
pub(crate) struct Listening {
    /// In the order of the configuration's upstreams.
    pub upstreams: Vec<UpstreamListener>,
    pub captured: Vec<std::net::TcpListener>,
    pub captured_udp: Vec<std::net::UdpSocket>,
    pub plain: Vec<std::net::TcpListener>,
    /// What a front hands over that is shared with others.
    pub handed: Option<(VecDeque<Call>, Handed)>,
}

/// Why a listener can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "upstream {service}: cannot listen on {listen} ({source}): choose another address with --upstream"
    )]
    Upstream { service: String, listen: SocketAddr, source: std::io::Error },
    #[error(
        "captured connections: cannot listen on {listen} ({source}): choose another address with --capture-listen, and give its port to `tombolo sidecar capture apply --port`"
    )]
    Capture { listen: SocketAddr, source: std::io::Error },
    #[error(
        "captured datagrams: cannot listen on {listen}/udp ({source}): choose another address with --capture-listen, and give its port to `tombolo sidecar capture apply --port`"
    )]
    CaptureUdp { listen: SocketAddr, source: std::io::Error },
    #[error(
        "plain connections from outside: cannot listen on {listen} ({source}): it takes CAP_NET_RAW, and a free port (--inbound-listen, with the same `tombolo sidecar capture apply --inbound-listen-port`)"
    )]
    Plain { listen: SocketAddr, source: std::io::Error },
}

impl Listening {
    /// Every listener of the configuration, once per thread.
    pub fn bind(config: &SidecarConfig, threads: usize) -> Result<Vec<Self>, ListenError> {
        let mut listening: Vec<Self> = (0..threads).map(|_| Self::default()).collect();
        for upstream in &config.upstreams {
            let bound: io::Result<Vec<_>> = match upstream.protocol {
                Protocol::Tcp => listen(upstream.listen, threads)
                    .map(|bound| bound.into_iter().map(UpstreamListener::Tcp).collect()),
                Protocol::Udp => udp::listen(upstream.listen, threads)
                    .map(|bound| bound.into_iter().map(UpstreamListener::Udp).collect()),
            };
            let bound = bound.map_err(|source| {
                let service = upstream.service.to_string();
                ListenError::Upstream { service, listen: upstream.listen, source }
            })?;
            listening.iter_mut().zip(bound).for_each(|(of_thread, one)| of_thread.upstreams.push(one));
        }
        let mut give = |bound: Listeners, to: fn(&mut Listening) -> &mut Listeners| {
            listening.iter_mut().zip(bound).for_each(|(of_thread, listener)| to(of_thread).push(listener));
        };
        let capture = config.capture.iter();
        for &address in capture.clone().flat_map(|capture| &capture.listen) {
            let bound = listener::redirected(address, threads);
            let bound = bound.map_err(|source| ListenError::Capture { listen: address, source })?;
            give(bound, |listening| &mut listening.captured);
        }
        for &address in
            capture.filter_map(|capture| capture.inbound.as_ref()).flat_map(|inbound| &inbound.listen)
        {
            let bound = listener::transparent(address, threads);
            let bound = bound.map_err(|source| ListenError::Plain { listen: address, source })?;
            give(bound, |listening| &mut listening.plain);
        }
        for &address in config.capture.iter().flat_map(|capture| &capture.listen) {
            let failed = |source| ListenError::CaptureUdp { listen: address, source };
            match udp::capture(address, threads) {
                Ok(bound) => listening.iter_mut().zip(bound).for_each(|(of_thread, socket)| {
                    of_thread.captured_udp.push(socket);
                }),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    tracing::warn!(%address, "UDP is not captured: it takes CAP_NET_RAW (systemd: AmbientCapabilities=CAP_NET_RAW)");
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(listening)
    }
}

/// Gives connections to `take` until the drain starts; closes the listener then.
///
/// A listener that just closes resets whoever the kernel has let in and nobody has accepted yet. So it first stops to hear
/// new connections, whose senders try again by themselves, and the last ones are taken before it goes.
pub(crate) async fn accept_until_drained(
    listener: TcpListener,
    drain: &Drain,
    mut take: impl FnMut(TcpStream, SocketAddr),
) {
    tokio::select! {
        () = accept(&listener, &mut take) => {}
        () = drain.started() => {}
    }
    if let Err(error) = SockRef::from(&listener).attach_filter(&NO_MORE_SYNS) {
        tracing::debug!(%error, "a listener closes without a filter: connections of this moment may be reset");
    }
    let _ = tokio::time::timeout(LAST_HANDSHAKES, accept(&listener, &mut take)).await;
}

async fn accept(listener: &TcpListener, take: &mut impl FnMut(TcpStream, SocketAddr)) {
    loop {
        match listener.accept().await {
            Ok((tcp, from)) => take(tcp, from),
            Err(error) => {
                let listener = listener.local_addr().map_or_else(|_| String::new(), |here| here.to_string());
                tracing::warn!(%listener, %error, "a connection can't be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_share_an_address_and_a_taken_one_is_refused() {
        for count in [1, 3] {
            let listeners = listen(([127, 0, 0, 1], 0).into(), count).unwrap();
            assert_eq!(listeners.len(), count);
            let address = listeners[0].local_addr().unwrap();
            assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
            let error = listen(address, count).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{count}");
        }
    }

    #[tokio::test]
    async fn whoever_was_let_in_when_a_listener_closes_is_taken_and_later_ones_wait_for_the_next() {
        let listener = listen(([127, 0, 0, 1], 0).into(), 1).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        let (trigger, drain) = tombolo_runtime::drain::channel();
        let mut early: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        trigger.start();
        let taken = std::cell::RefCell::new(Vec::new());
        let listener = TcpListener::from_std(listener).unwrap();
        let closing = accept_until_drained(listener, &drain, |tcp, _| taken.borrow_mut().push(tcp));
        let late = async {
            while taken.borrow().len() < early.len() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            TcpStream::connect(address).await
        };
        let next = async {
            tokio::time::sleep(LAST_HANDSHAKES * 4).await;
            TcpListener::from_std(listen(address, 1).unwrap().remove(0)).unwrap().accept().await.unwrap()
        };
        let ((), late, next) = tokio::join!(closing, late, next);
        assert_eq!(late.unwrap().local_addr().unwrap(), next.1);
        drop(taken);
        for stream in &mut early {
            assert_eq!(std::io::Read::read(stream, &mut [0]).unwrap(), 0, "an end, not a reset");
        }
    }
}
