//! An emulated link between two namespaces: a TUN device in each and one forwarding thread between them.
//!
//! Works on whole IP packets, so TCP, UDP and everything else see the same delay, jitter, loss, reordering, rate,
//! drop-tail buffer and MTU (the kernel here has no netem). Each direction has a [`Shape`] of its own that may change
//! while packets flow, and counters. The devices carry no offloads: what is dropped is always one packet of at most
//! the MTU. Dropping a [`Link`] ends its thread and removes both devices.

mod forwarder;
mod queue;
mod shape;
mod tun;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;

use crate::netns::Namespace;
pub use queue::{Counters, CountersSnapshot};
pub use shape::Shape;

/// One end of a link.
#[derive(Debug, Clone, Copy)]
pub struct LinkEnd<'a> {
    pub namespace: &'a Namespace,
    /// Device name inside the namespace, at most 15 bytes.
    pub device: &'a str,
    pub address: IpAddr,
}

/// Looks at every IP packet before the shape does, and may stand in for it: a capture, or an attacker on the path.
pub type Tap = Box<dyn FnMut(&[u8]) -> Tapped + Send>;

/// What a [`Tap`] makes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tapped {
    Pass,
    /// These leave in its place, each after a delay of its own beside the shape's; an empty list drops it.
    Instead(Vec<(Duration, Vec<u8>)>),
}

/// How packets travel in one direction; shared with the forwarding thread.
pub struct Direction {
    tap: Mutex<Option<Tap>>,
    shape: ArcSwap<Shape>,
    black_hole: AtomicBool,
    counters: Counters,
}

impl std::fmt::Debug for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Direction").field("shape", &self.shape()).finish_non_exhaustive()
    }
}

impl Direction {
    fn new(shape: Shape) -> Arc<Self> {
        Arc::new(Self {
            tap: Mutex::new(None),
            shape: ArcSwap::from_pointee(shape),
            black_hole: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    pub fn shape(&self) -> Shape {
        **self.shape.load()
    }

    /// Takes effect for the packets that arrive from now on; those under way keep their time.
    pub fn set_shape(&self, shape: Shape) -> Result<()> {
        self.shape.store(Arc::new(shape.checked()?));
        Ok(())
    }

    /// Changes some of the shape.
    pub fn update(&self, change: impl FnOnce(&mut Shape)) -> Result<()> {
        let mut shape = self.shape();
        change(&mut shape);
        self.set_shape(shape)
    }

    /// Drops everything from now on without a word, what is under way too.
    pub fn set_black_hole(&self, on: bool) {
        self.black_hole.store(on, Ordering::Relaxed);
    }

    /// Shows every packet from now on to `tap`, or to nobody.
    pub fn set_tap(&self, tap: Option<Tap>) {
        *self.tap.lock().unwrap_or_else(PoisonError::into_inner) = tap;
    }

    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }
}

/// A running link. Ends when dropped.
#[derive(Debug)]
pub struct Link {
    a_to_b: Arc<Direction>,
    b_to_a: Arc<Direction>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Creates both devices, point to point, each up and routed to the other's address, and starts forwarding with
    /// `shape` in both directions. `seed` makes loss, jitter and reordering repeatable for the same packets.
    pub fn start(a: LinkEnd<'_>, b: LinkEnd<'_>, shape: Shape, seed: u64) -> Result<Self> {
        let shape = shape.checked()?;
        if a.address.is_ipv4() != b.address.is_ipv4() {
            bail!("link {} to {}: both ends need the same address family", a.address, b.address);
        }
        let tun_a = tun::Tun::create(a, b.address, shape.mtu).context("create the first device of a link")?;
        let tun_b =
            tun::Tun::create(b, a.address, shape.mtu).context("create the second device of a link")?;
        let (a_to_b, b_to_a) = (Direction::new(shape), Direction::new(shape));
        let stop = Arc::new(AtomicBool::new(false));
        let forwarder =
            forwarder::Forwarder::new([tun_a, tun_b], [a_to_b.clone(), b_to_a.clone()], stop.clone(), seed);
        let thread = std::thread::Builder::new()
            .name("link".to_owned())
            .spawn(move || forwarder.run())
            .context("start the forwarding thread of a link")?;
        Ok(Self { a_to_b, b_to_a, stop, thread: Some(thread) })
    }

    pub fn a_to_b(&self) -> &Direction {
        &self.a_to_b
    }

    pub fn b_to_a(&self) -> &Direction {
        &self.b_to_a
    }

    /// Changes both directions alike.
    pub fn update(&self, change: impl Fn(&mut Shape)) -> Result<()> {
        self.a_to_b.update(&change)?;
        self.b_to_a.update(&change)
    }

    /// Drops everything in both directions, or carries it again.
    pub fn set_black_hole(&self, on: bool) {
        self.a_to_b.set_black_hole(on);
        self.b_to_a.set_black_hole(on);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the forwarding thread of a link panicked");
        }
    }
}
