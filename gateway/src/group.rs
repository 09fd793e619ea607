//! The sockets behind one address: one per worker and one for control packets, in a reuseport group.
//!
//! A classic BPF program on the first payload bytes chooses ([`reuseport`], ADR 4): control datagrams and control-kind connection IDs go
//! to the last socket, so that they have a kernel queue of their own; everything else to worker `nonce byte mod N`, so that
//! one gateway pair (a single 4-tuple) spreads over all workers. Any socket may still get any packet: the kernel may
//! merge a control datagram into the batch of a worker.
//!
//! Without such programs the group is one socket, served by the control thread alone.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use tombolo_overlay::reuseport;

use crate::port::Port;

/// Why an address could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    #[error(
        "{flag} {address}: the address is in use: stop what uses it (another gateway?) or choose another with {flag} ADDRESS:PORT"
    )]
    InUse { flag: &'static str, address: SocketAddr },
    #[error(
        "{flag} {address}: this machine has no such address: choose one of its own, or 0.0.0.0, with {flag} ADDRESS:PORT"
    )]
    NotOurs { flag: &'static str, address: SocketAddr },
    #[error("{flag} {address}: cannot be bound ({source}): choose another with {flag} ADDRESS:PORT")]
    Bind { flag: &'static str, address: SocketAddr, source: io::Error },
}

impl GroupError {
    fn new(flag: &'static str, address: SocketAddr) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { flag, address },
            io::ErrorKind::AddrNotAvailable => Self::NotOurs { flag, address },
            _ => Self::Bind { flag, address, source },
        }
    }
}

/// Bound sockets of one address: workers' first, the control socket last.
#[derive(Debug)]
pub struct Group {
    pub workers: Vec<Arc<Port>>,
    pub control: Arc<Port>,
}

impl Group {
    /// Binds `workers` sockets and the control socket; only the latter when the kernel can't steer packets.
    pub fn bind(flag: &'static str, address: SocketAddr, workers: usize) -> Result<Self, GroupError> {
        let failed = GroupError::new(flag, address);
        // Sockets of a group may join a port that another process of the same user holds: this one may not.
        let address = Port::bind(address, false).map_err(&failed)?.local_addr();
        let mut ports = Vec::with_capacity(workers + 1);
        for _ in 0..=workers {
            ports.push(Arc::new(Port::bind(address, true).map_err(&failed)?));
        }
        let program = reuseport::program(workers, workers);
        let steered = ports.first().map_or(Ok(()), |first| reuseport::attach(first.as_fd(), &program));
        if let Err(error) = steered {
            tracing::warn!(%error, %address, "the kernel can't steer packets to several sockets: one thread serves all of them");
            ports.truncate(1);
        }
        match ports.pop() {
            Some(control) => Ok(Self { workers: ports, control }),
            None => Err(failed(io::ErrorKind::InvalidInput.into())),
        }
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.control.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::time::Duration;

    use quinn_udp::RecvMeta;
    use tombolo_model::ids::ClusterTag;
    use tombolo_overlay::cid::{Cid, Kind};
    use tombolo_overlay::keys::{CidKey, Hour};

    use super::*;
    use crate::port::Outgoing;
    use crate::sys;

    fn id(kind: Kind, first_nonce_byte: u8) -> Cid {
        let nonce = [first_nonce_byte, 0, 0, 0, 0, 0, 0];
        Cid::mint(kind, ClusterTag::new(1).unwrap(), 77, nonce, Hour(0), &CidKey::from_bytes([0; 16]))
    }
    fn short(kind: Kind, nonce: u8) -> Vec<u8> {
        [&[0x41], id(kind, nonce).as_bytes().as_slice(), &[0; 20]].concat()
    }
    fn long(kind: Kind, nonce: u8) -> Vec<u8> {
        [&[0xc1, 0, 0, 0, 1, 20], id(kind, nonce).as_bytes().as_slice(), &[0; 20]].concat()
    }

    #[test]
    fn packets_spread_by_nonce_and_control_has_a_socket_of_its_own() {
        let group = Group::bind("--border", ([127, 0, 0, 1], 0).into(), 2).unwrap();
        let sender = Port::bind(([127, 0, 0, 1], 0).into(), false).unwrap();
        let sockets: Vec<_> = group.workers.iter().chain([&group.control]).collect();
        let cases = [
            ("short, even", short(Kind::Endpoint, 4), 0),
            ("short, odd", short(Kind::Endpoint, 7), 1),
            ("long, even", long(Kind::Service, 8), 0),
            ("long, odd", long(Kind::Service, 9), 1),
            ("control, short", short(Kind::Control, 4), 2),
            ("control, long", long(Kind::Control, 4), 2),
            ("control datagram", vec![1; 80], 2),
            ("shorter than an ID", vec![0x41, 0], 0),
        ];
        for (name, packet, expected) in cases {
            sender
                .send(&Outgoing {
                    to: group.local_addr(),
                    from: None,
                    ecn: None,
                    contents: &packet,
                    segment: None,
                })
                .unwrap();
            let fds: Vec<_> = sockets.iter().map(|s| s.as_fd()).collect();
            let mut ready = Vec::new();
            sys::wait(&fds, &mut ready, Duration::from_secs(5)).unwrap();
            let got: Vec<_> = (0..ready.len()).filter(|i| ready[*i]).collect();
            assert_eq!(got, [expected], "{name}");
            let mut buffer = [0; 2048];
            sockets[expected]
                .receive(&mut [IoSliceMut::new(&mut buffer)], &mut [RecvMeta::default()])
                .unwrap();
        }
    }

    #[test]
    fn a_taken_address_is_an_error_that_names_the_flag_even_if_the_other_one_shares_it() {
        let first = Group::bind("--border", ([127, 0, 0, 1], 0).into(), 1).unwrap();
        let error = Group::bind("--border", first.local_addr(), 1).unwrap_err();
        assert!(
            matches!(error, GroupError::InUse { .. }) && error.to_string().contains("--border"),
            "{error}"
        );
        let error = Group::bind("--inner", "192.0.2.1:7441".parse().unwrap(), 1).unwrap_err();
        assert!(
            matches!(error, GroupError::NotOurs { .. }) && error.to_string().contains("--inner"),
            "{error}"
        );
    }
}
