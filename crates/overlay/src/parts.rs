//! One endpoint on several runtime threads: each has a socket and a quinn endpoint of its own behind the endpoint's one
//! address, and mints IDs whose first nonce byte names it, so that the kernel ([`crate::reuseport`]) brings it its packets.
//!
//! From outside it is one endpoint: one id, one address, one lease, probed and registered by the first part alone. A
//! packet that another part's socket got (a balancer's extra source ports, a kernel without such programs) is handed
//! over through that part's [`Inbox`].

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use bytes::Bytes;
use quinn::udp::EcnCodepoint;
use socket2::{Domain, Protocol, Socket, Type};

use crate::cid::Cid;
use crate::reuseport;

/// Parts of one endpoint; the first nonce byte names one.
pub const MAX_PARTS: usize = 64;
/// Packets that wait for another part: 1.5 MB. What does not fit is lost as in a full socket buffer.
const INBOX: usize = 1024;

/// A bound socket that is not served yet.
#[derive(Debug)]
pub struct Part {
    pub(crate) socket: std::net::UdpSocket,
    pub(crate) place: Place,
}

/// Which part, and how the others are reached.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    index: usize,
    inboxes: Arc<[Inbox]>,
}

/// Packets that other parts' sockets got.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<(Bytes, Option<EcnCodepoint>)>,
    reader: Option<Waker>,
}

impl Part {
    /// Binds `count` sockets to one address, in order; without a shared port when it is one.
    pub fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<Self>> {
        let count = count.clamp(1, MAX_PARTS);
        let inboxes: Arc<[Inbox]> = (0..count).map(|_| Inbox::default()).collect();
        // Sockets of a group may join a port that another process of the same user holds: this one may not.
        let alone = udp(address, false)?;
        let part = |socket, index| Self { socket, place: Place { index, inboxes: Arc::clone(&inboxes) } };
        if count == 1 {
            return Ok(vec![part(alone, 0)]);
        }
        let address = alone.local_addr()?;
        drop(alone);
        let sockets = (0..count).map(|_| udp(address, true)).collect::<io::Result<Vec<_>>>()?;
        if let Some(first) = sockets.first()
            && let Err(error) = reuseport::attach(first.as_fd(), &reuseport::program(count, 0))
        {
            tracing::warn!(%error, %address, "the kernel can't bring packets to their threads: threads hand them over");
        }
        Ok(sockets.into_iter().zip(0..).map(|(socket, index)| part(socket, index)).collect())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

fn udp(address: SocketAddr, shared: bool) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_port(shared)?;
    crate::socket::set_buffers(&socket);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

impl Place {
    pub fn has_others(&self) -> bool {
        self.inboxes.len() > 1
    }

    /// A nonce byte of this part.
    pub fn nonce(&self, random: u8) -> u8 {
        let count = self.inboxes.len();
        let nonce = usize::from(random) / count * count + self.index;
        // Past the last whole round: the one before.
        u8::try_from(nonce).unwrap_or_else(|_| u8::try_from(nonce - count).unwrap_or(0))
    }

    /// Another part's inbox, if the ID is one of its own.
    pub fn elsewhere(&self, dcid: &Cid) -> Option<&Inbox> {
        let [nonce, ..] = dcid.nonce();
        let index = usize::from(nonce) % self.inboxes.len();
        self.inboxes.get(index).filter(|_| index != self.index)
    }

    pub fn own(&self) -> Option<&Inbox> {
        self.inboxes.get(self.index)
    }
}

impl Inbox {
    /// False: there is no room.
    pub fn put(&self, packet: &[u8], ecn: Option<EcnCodepoint>) -> bool {
        let mut waiting = self.lock();
        if waiting.packets.len() >= INBOX {
            return false;
        }
        waiting.packets.push_back((Bytes::copy_from_slice(packet), ecn));
        if let Some(reader) = waiting.reader.take() {
            reader.wake();
        }
        true
    }

    /// The next one; `None` and a wake-up once there is one.
    pub fn poll(&self, cx: &Context<'_>) -> Option<(Bytes, Option<EcnCodepoint>)> {
        let mut waiting = self.lock();
        let packet = waiting.packets.pop_front();
        if packet.is_none() {
            waiting.reader = Some(cx.waker().clone());
        }
        packet
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tombolo_model::ids::ClusterTag;

    use super::*;
    use crate::cid::Kind;
    use crate::keys::{CidKey, Hour};

    fn id(nonce: u8) -> Cid {
        let nonce = [nonce, 0, 0, 0, 0, 0, 0];
        let tag = ClusterTag::new(1).unwrap();
        Cid::mint(Kind::Endpoint, tag, 77, nonce, Hour(0), &CidKey::from_bytes([0; 16]))
    }

    #[tokio::test]
    async fn a_parts_ids_reach_its_socket_and_what_another_gets_is_handed_over() {
        for count in [1, 2, 3, 64] {
            let parts = Part::bind(([127, 0, 0, 1], 0).into(), count).unwrap();
            let address = parts[0].local_addr().unwrap();
            let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for part in &parts {
                let nonces: HashSet<u8> = (0..=255).map(|random| part.place.nonce(random)).collect();
                assert!(nonces.len() >= 256 / count, "{count}: {}", nonces.len());
                for nonce in nonces {
                    assert!(part.place.elsewhere(&id(nonce)).is_none(), "{nonce}");
                    let others = parts.iter().filter(|p| p.place.elsewhere(&id(nonce)).is_some()).count();
                    assert_eq!(others, count - 1);
                }
                let packet = [&[0x41], id(part.place.nonce(200)).as_bytes().as_slice(), &[0; 20]].concat();
                sender.send_to(&packet, address).unwrap();
                part.socket.set_nonblocking(false).unwrap();
                part.socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
                assert_eq!(part.socket.recv(&mut [0; 2048]).unwrap(), packet.len(), "{count}");
            }
        }
    }

    #[test]
    fn an_inbox_is_bounded_and_wakes_its_reader() {
        let inbox = Inbox::default();
        let cx = Context::from_waker(Waker::noop());
        assert!(inbox.poll(&cx).is_none());
        assert_eq!((0..INBOX + 3).filter(|_| !inbox.put(b"packet", None)).count(), 3);
        assert!(inbox.lock().reader.is_none(), "woken");
        assert_eq!((0..).take_while(|_| inbox.poll(&cx).is_some()).count(), INBOX);
    }

    #[test]
    fn a_taken_port_is_refused_although_parts_share_theirs() {
        let parts = Part::bind(([127, 0, 0, 1], 0).into(), 2).unwrap();
        let error = Part::bind(parts[0].local_addr().unwrap(), 2).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
