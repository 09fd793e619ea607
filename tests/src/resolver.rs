//! A resolver for tests, over UDP and TCP inside a namespace: it answers whatever ends in `.example.` and counts.
//!
//! | name | answer |
//! |---|---|
//! | `big.example.` | 100 addresses: over UDP only that they do not fit |
//! | `missing.example.` | NXDOMAIN |
//! | `silent.example.` | nothing |
//! | `moving.example.` | where [`Resolver::move_to`] says, for a second |
//! | another under `example.` | 192.0.2.80, for a minute |
//! | any other | NXDOMAIN |
//!
//! Ends when dropped; its sockets are gone then, as a resolver's that has crashed.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::netns::Namespace;

/// How soon its threads see that they are to end.
const LOOK: Duration = Duration::from_millis(50);

/// A running resolver.
pub struct Resolver {
    asked: Arc<AtomicU64>,
    moving: Arc<AtomicU32>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Resolver {
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let bound = namespace.run(|| -> Result<_> {
            let udp = UdpSocket::bind(address)?;
            udp.set_read_timeout(Some(LOOK))?;
            let tcp = TcpListener::bind(address)?;
            tcp.set_nonblocking(true)?;
            Ok((udp, tcp))
        })?;
        let (udp, tcp) = bound.with_context(|| format!("a resolver at {address}"))?;
        let (asked, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let moving = Arc::new(AtomicU32::new(Ipv4Addr::new(192, 0, 2, 80).into()));
        let over_udp = {
            let (asked, moving, end) = (Arc::clone(&asked), Arc::clone(&moving), Arc::clone(&end));
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while !end.load(Relaxed) {
                    let Ok((length, asker)) = udp.recv_from(&mut buffer) else { continue };
                    if let Some(reply) =
                        reply(buffer.get(..length).unwrap_or_default(), true, &asked, &moving)
                    {
                        let _ = udp.send_to(&reply, asker);
                    }
                }
            })
        };
        let over_tcp = {
            let (asked, moving, end) = (Arc::clone(&asked), Arc::clone(&moving), Arc::clone(&end));
            std::thread::spawn(move || {
                while !end.load(Relaxed) {
                    match tcp.accept() {
                        Ok((stream, _)) => drop(converse(stream, &asked, &moving)),
                        Err(_) => std::thread::sleep(LOOK),
                    }
                }
            })
        };
        Ok(Self { asked, moving, end, threads: vec![over_udp, over_tcp] })
    }

    /// What `moving.example.` is from now on.
    pub fn move_to(&self, address: Ipv4Addr) {
        self.moving.store(address.into(), Relaxed);
    }

    /// Questions about names under `example.` so far.
    pub fn asked(&self) -> u64 {
        self.asked.load(Relaxed)
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One question.
fn converse(mut stream: TcpStream, asked: &AtomicU64, moving: &AtomicU32) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut question = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut question)?;
    if let Some(reply) = reply(&question, false, asked, moving) {
        stream.write_all(&u16::try_from(reply.len())?.to_be_bytes())?;
        stream.write_all(&reply)?;
    }
    Ok(())
}

fn reply(packet: &[u8], over_udp: bool, asked: &AtomicU64, moving: &AtomicU32) -> Option<Vec<u8>> {
    let question = Message::from_vec(packet).ok()?;
    let query = question.queries.first()?;
    let name = query.name().to_lowercase();
    let text = name.to_string();
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.recursion_available = true;
    message.add_query(query.clone());
    let address = |last: u8| Record::from_rdata(name.clone(), 60, RData::A(A::new(192, 0, 2, last)));
    if text.ends_with(".example.") {
        asked.fetch_add(1, Relaxed);
    }
    match text.as_str() {
        "silent.example." => return None,
        "moving.example." if query.query_type() == RecordType::A => {
            let address = A(moving.load(Relaxed).into());
            message.add_answer(Record::from_rdata(name.clone(), 1, RData::A(address)));
        }
        "big.example." if over_udp => message.metadata.truncation = true,
        "big.example." => {
            message.add_answers((1..=100).map(address));
        }
        "missing.example." => negative(&mut message),
        known if known.ends_with(".example.") && query.query_type() == RecordType::A => {
            message.add_answer(address(80));
        }
        _ => negative(&mut message),
    }
    message.to_vec().ok()
}

fn negative(message: &mut Message) {
    message.metadata.response_code = ResponseCode::NXDomain;
    let zone = Name::root();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, 2, 3, 4, 60);
    message.add_authority(Record::from_rdata(zone, 60, RData::SOA(soa)));
}
