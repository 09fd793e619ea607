//! The sockets of a name server, on a thread of its own: bound first, so that a taken port fails the start, then served
//! until it is dropped.
//!
//! What the table or the cache knows is answered where it was read: a flood of such questions is worth one thread and no
//! memory, and what it has no time for the kernel drops. Over TCP there are at most [`MAX_CONNECTIONS`], and
//! [`MAX_CONNECTIONS_OF_ONE`] of one asker; each is one question at a time and closed when it is idle (RFC 7766).

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tombolo_runtime::rt;
use tombolo_runtime::tasks::TaskGroup;

use crate::forward::{Begun, Forwarder};
use crate::message::{Handled, Transport, handle};
use crate::metrics::{Counted, Metrics};
use crate::table::TableHandle;
use crate::upstream::{self, UpstreamError, Upstreams};

/// Where it listens unless told otherwise (design section 3): 53 where it may, this where it may not.
pub const DEFAULT_PORT: u16 = 7453;
/// Ten thousand questions of 100 bytes: what comes while the thread is not scheduled.
const RECEIVE_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// Questions are smaller; EDNS options and signatures may follow.
const MAX_QUESTION_BYTES: usize = 4096;
/// Packets between two looks at other tasks of the thread.
const BATCH: usize = 64;
pub const MAX_CONNECTIONS: usize = 256;
pub const MAX_CONNECTIONS_OF_ONE: u32 = 64;
/// RFC 7766 section 6.2.3: a few seconds.
const IDLE: Duration = Duration::from_secs(10);
/// The last replies of a thread that ends.
const END_PATIENCE: Duration = Duration::from_millis(100);

/// What a name server is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamesConfig {
    pub listen: SocketAddr,
    /// Who answers for other names, in order; empty: nobody, they are refused.
    pub upstreams: Vec<SocketAddr>,
}

/// Why a name server did not start.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    #[error(
        "names can't be served on {listen}/{protocol} ({source}): choose another address with --dns-listen"
    )]
    Bind { listen: SocketAddr, protocol: &'static str, source: io::Error },
    #[error("--dns-upstream: {0}")]
    Upstream(#[from] UpstreamError),
}

/// A name server whose sockets are bound.
#[derive(Debug)]
pub struct Bound {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
    listen: SocketAddr,
    upstreams: Upstreams,
    metrics: Metrics,
}

/// A name server that serves; dropping it ends it.
#[derive(Debug)]
pub struct Running {
    listen: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<io::Result<()>>>>,
}

impl Bound {
    /// Binds both sockets at one port; with port 0 at one that the kernel chooses.
    pub fn bind(config: &NamesConfig, metrics: Metrics) -> Result<Self, NamesError> {
        let NamesConfig { listen, upstreams } = config;
        let failed =
            |protocol: &'static str| move |source| NamesError::Bind { listen: *listen, protocol, source };
        let tcp = listener(*listen).map_err(failed("tcp"))?;
        let bound = tcp.local_addr().map_err(failed("tcp"))?;
        let udp = datagrams(bound).map_err(failed("udp"))?;
        let nonces: Vec<u64> = upstreams.iter().map(|_| rand::random()).collect();
        let upstreams = Upstreams::new(upstreams, bound, &nonces)?;
        Ok(Self { udp, tcp, listen: bound, upstreams, metrics })
    }

    pub fn listen_addr(&self) -> SocketAddr {
        self.listen
    }

    /// Serves `table` from now on.
    pub fn start(self, table: TableHandle) -> io::Result<Running> {
        let listen = self.listen;
        let (end, ended) = oneshot::channel();
        let thread = rt::spawn_thread("tombolo-names".to_owned(), move || self.serve(table, ended))?;
        Ok(Running { listen, end: Some(end), thread: Some(thread) })
    }

    async fn serve(self, table: TableHandle, ended: oneshot::Receiver<()>) -> io::Result<()> {
        let Self { udp, tcp, listen, upstreams, metrics } = self;
        let forwarder = Forwarder::new(upstreams, metrics.clone());
        tracing::info!(%listen, upstreams = ?forwarder.upstreams(), "names are served");
        let tasks = TaskGroup::new();
        if forwarder.forwards() {
            tasks.spawn("loop probe", forwarder.clone().probe());
        }
        let forwards = forwarder.forwards();
        let server = Server { table, forwarder, forwards, metrics, tasks: tasks.clone() };
        tasks.spawn("names over UDP", server.clone().udp(UdpSocket::from_std(udp)?));
        tasks.spawn("names over TCP", server.tcp(TcpListener::from_std(tcp)?));
        let _ = ended.await;
        tasks.shutdown(END_PATIENCE).await;
        Ok(())
    }
}

impl Running {
    pub fn listen_addr(&self) -> SocketAddr {
        self.listen
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.end.take());
        // Over within END_PATIENCE.
        if let Some(Ok(Err(error) | Ok(Err(error)))) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(%error, "names could not be served");
        }
    }
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn listener(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

fn datagrams(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
    // What the kernel grants; it is no error to get less.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

#[derive(Clone)]
struct Server {
    table: TableHandle,
    forwarder: Forwarder,
    forwards: bool,
    metrics: Metrics,
    tasks: TaskGroup,
}

impl Server {
    async fn udp(self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut buffer = vec![0; MAX_QUESTION_BYTES];
        loop {
            if let Err(error) = socket.readable().await {
                tracing::warn!(%error, "the name server's socket can't be read");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            let table = self.table.load();
            for _ in 0..BATCH {
                let (length, asker) = match socket.try_recv_from(&mut buffer) {
                    Ok(received) => received,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // An earlier reply reached nobody (ICMP): the next packet is as good as any.
                    Err(_) => continue,
                };
                let Some(packet) = buffer.get(..length) else { continue };
                match handle(&table, packet, Transport::Udp, self.forwards) {
                    Handled::Drop => self.metrics.count(Transport::Udp, Counted::Dropped),
                    Handled::Reply(reply, outcome) => {
                        self.metrics.count(Transport::Udp, Counted::Ours(outcome));
                        // A full socket drops it, as the network might; the asker asks again.
                        let _ = socket.try_send_to(&reply, asker);
                    }
                    Handled::Forward(question) => {
                        self.metrics.count(Transport::Udp, Counted::Forwarded);
                        match self.forwarder.begin(&question, asker.ip(), Transport::Udp) {
                            Begun::Reply(reply) => drop(socket.try_send_to(&reply, asker)),
                            Begun::Wait(slot) => {
                                let (forwarder, socket) = (self.forwarder.clone(), Arc::clone(&socket));
                                self.tasks.spawn("forwarded question", async move {
                                    let reply = forwarder.finish(&question, Transport::Udp, slot).await;
                                    let _ = socket.send_to(&reply, asker).await;
                                });
                            }
                        }
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn tcp(self, listener: TcpListener) {
        let open: Arc<Mutex<HashMap<IpAddr, u32>>> = Arc::default();
        loop {
            let (stream, asker) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection for names can't be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            {
                let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
                let all: u32 = open.values().sum();
                let own = open.entry(asker.ip()).or_insert(0);
                if *own >= MAX_CONNECTIONS_OF_ONE || usize::try_from(all).is_ok_and(|n| n >= MAX_CONNECTIONS)
                {
                    if *own == 0 {
                        open.remove(&asker.ip());
                    }
                    self.metrics.count(Transport::Tcp, Counted::Dropped);
                    continue;
                }
                *own += 1;
            }
            self.metrics.connections.inc();
            let (server, open) = (self.clone(), Arc::clone(&open));
            self.tasks.spawn("names connection", async move {
                // Whatever ends it is the asker's: there is nobody to tell.
                let _ = server.connection(stream, asker.ip()).await;
                server.metrics.connections.dec();
                let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(own) = open.get_mut(&asker.ip()) {
                    *own -= 1;
                    if *own == 0 {
                        open.remove(&asker.ip());
                    }
                }
            });
        }
    }

    async fn connection(&self, mut stream: TcpStream, asker: IpAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut buffer = vec![0; MAX_QUESTION_BYTES];
        loop {
            let read = async {
                let length = usize::from(stream.read_u16().await?);
                let Some(packet) = buffer.get_mut(..length) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                stream.read_exact(packet).await?;
                Ok::<_, io::Error>(length)
            };
            let length = timeout(IDLE, read).await??;
            let packet = buffer.get(..length).unwrap_or_default();
            let reply = match handle(&self.table.load(), packet, Transport::Tcp, self.forwards) {
                Handled::Drop => {
                    self.metrics.count(Transport::Tcp, Counted::Dropped);
                    return Ok(());
                }
                Handled::Reply(reply, outcome) => {
                    self.metrics.count(Transport::Tcp, Counted::Ours(outcome));
                    reply
                }
                Handled::Forward(question) => {
                    self.metrics.count(Transport::Tcp, Counted::Forwarded);
                    match self.forwarder.begin(&question, asker, Transport::Tcp) {
                        Begun::Reply(reply) => reply,
                        Begun::Wait(slot) => self.forwarder.finish(&question, Transport::Tcp, slot).await,
                    }
                }
            };
            let length = u16::try_from(reply.len()).unwrap_or(0);
            let mut framed = Vec::with_capacity(reply.len() + 2);
            framed.extend_from_slice(&length.to_be_bytes());
            framed.extend_from_slice(&reply);
            timeout(IDLE, stream.write_all(&framed)).await??;
        }
    }
}

/// Whom to forward to when nobody says: the machine's own resolvers, without this one. `resolv_conf` and `resolved` are
/// the texts of /etc/resolv.conf and of systemd-resolved's own list, whose stub would ask us again.
pub fn default_upstreams(resolv_conf: &str, resolved: Option<&str>, listen: SocketAddr) -> Vec<SocketAddr> {
    const STUBS: [&str; 2] = ["127.0.0.53:53", "127.0.0.54:53"];
    let found = upstream::from_resolv_conf(resolv_conf);
    let is_stub = |address: &SocketAddr| STUBS.contains(&address.to_string().as_str());
    let found = match resolved {
        Some(resolved) if found.iter().any(is_stub) => upstream::from_resolv_conf(resolved),
        _ => found,
    };
    found.into_iter().filter(|address| !upstream::is_itself(*address, listen)).collect()
}
