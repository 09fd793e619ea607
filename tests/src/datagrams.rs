//! Small UDP programs for scenarios: a server that says who it is, callers that know what they must hear, and a flood.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::netns::{Namespace, NamespaceHandle};

/// Answers each datagram with `name`, a space, and what was asked, until it is dropped.
pub struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub fn start(namespace: &Namespace, address: SocketAddr, name: &'static str) -> Result<Self> {
        let socket =
            namespace.run(|| UdpSocket::bind(address))?.with_context(|| format!("bind {address}"))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Relaxed) {
                let Ok((count, from)) = socket.recv_from(&mut buffer) else { continue };
                let answer = [name.as_bytes(), b" ", buffer.get(..count).unwrap_or_default()].concat();
                let _ = socket.send_to(&answer, from);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// One socket of a caller: connected, so that it hears nobody but whom it has called.
pub struct Caller(UdpSocket);

impl Caller {
    pub fn new(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let any = if address.is_ipv4() { "0.0.0.0" } else { "::" };
        Self::from(namespace, any.parse()?, address)
    }

    /// From one of the namespace's addresses.
    pub fn from(namespace: &Namespace, from: IpAddr, to: SocketAddr) -> Result<Self> {
        let bind = || UdpSocket::bind((from, 0)).and_then(|socket| socket.connect(to).map(|()| socket));
        Ok(Self(namespace.run(bind)??))
    }

    /// Says it once; who has answered, with the same words, within `limit`.
    pub fn ask(&self, words: &[u8], limit: Duration) -> Result<String> {
        self.0.send(words)?;
        let (deadline, mut buffer) = (Instant::now() + limit, vec![0; 65_536]);
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.0.set_read_timeout(Some(left))?;
            let count =
                self.0.recv(&mut buffer).with_context(|| format!("no answer to {} bytes", words.len()))?;
            let answer = buffer.get(..count).unwrap_or_default();
            let space = answer.iter().position(|byte| *byte == b' ').context("no name in the answer")?;
            let (name, echoed) = answer.split_at(space);
            // An answer to what was asked before: datagrams may be late.
            if echoed.get(1..) == Some(words) {
                return Ok(String::from_utf8_lossy(name).into_owned());
            }
            ensure!(Instant::now() < deadline, "only other answers, such as one of {count} bytes");
        }
    }

    /// Asks again and again until somebody answers; who, and after how long.
    pub fn ask_until(&self, words: &[u8], limit: Duration) -> Result<(String, Duration)> {
        let begun = Instant::now();
        loop {
            match self.ask(words, Duration::from_millis(300)) {
                Ok(name) => return Ok((name, begun.elapsed())),
                Err(error) => ensure!(begun.elapsed() < limit, "nobody answers within {limit:?}: {error:#}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The same until that one answers.
    pub fn answered_by(&self, who: &str, limit: Duration) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let (name, _) = self.ask_until(b"who is there?", limit)?;
            if name == who {
                return Ok(begun.elapsed());
            }
            ensure!(begun.elapsed() < limit, "{name} answers, not {who}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Datagrams from ever other source ports, as fast as one thread can, until it is finished.
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    /// Of `bytes` each, to `address`; `ports` sockets at a time, each for 20 datagrams.
    pub fn start(namespace: &Namespace, address: SocketAddr, bytes: usize, ports: usize) -> Self {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, handle) = (Arc::clone(&stop), Arc::clone(&sent), namespace.handle());
        let thread = std::thread::spawn(move || flood(&handle, address, bytes, ports, &stopped, &count));
        Self { stop, sent, thread }
    }

    /// How many were sent.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
        Ok(self.sent.load(Relaxed))
    }
}

fn flood(
    namespace: &NamespaceHandle,
    address: SocketAddr,
    bytes: usize,
    ports: usize,
    stop: &AtomicBool,
    sent: &AtomicU64,
) -> Result<()> {
    namespace.enter()?;
    let words = vec![b'x'; bytes];
    while !stop.load(Relaxed) {
        let sockets: Vec<UdpSocket> = (0..ports)
            .map(|_| UdpSocket::bind("0.0.0.0:0").and_then(|s| s.connect(address).map(|()| s)))
            .collect::<Result<_, _>>()?;
        for _ in 0..20 {
            for socket in sockets.iter().take_while(|_| !stop.load(Relaxed)) {
                // A full queue of the kernel's is what a flood makes.
                if socket.send(&words).is_ok() {
                    sent.fetch_add(1, Relaxed);
                }
            }
        }
    }
    Ok(())
}
