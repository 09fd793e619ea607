//! Sockets and threads of the forwarding plane: bound first, then started, handed its tables, stopped.
//!
//! It needs no federator and no runtime: whoever has [`Tables`] can run one. Threads end when the [`DataPlane`] is stopped or dropped.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;
use tombolo_overlay::datagram::StartNumber;

use crate::bucket::Bucket;
use crate::control::{ControlThread, State, Status};
use crate::counters::{Counters, Tally};
use crate::forward::{Exits, Forwarder, Notice, count_lost};
use crate::group::{Group, GroupError};
use crate::recent::Recent;
use crate::tables::Tables;
use crate::view::View;
use crate::worker::Worker;

/// Notices that wait for the control thread: stray control datagrams and hints.
const QUEUE: usize = 1024;
/// Hints per second and thread that reach the queue: a flood for an endpoint that is gone must not fill it.
const HINTS_PER_SECOND: u32 = 200;

/// Where it listens.
#[derive(Clone, Copy, Debug)]
pub struct DataPlaneConfig {
    pub border: SocketAddr,
    pub inner: SocketAddr,
    pub workers: NonZeroUsize,
    /// Of this process; peers see by it that what they told us is lost.
    pub start: StartNumber,
}

/// Why it did not start.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(
        "border and inner address are both {address}: give the two sockets different ports with --border and --inner"
    )]
    SameAddress { address: SocketAddr },
    #[error("forwarding threads can't be started: {0}")]
    Thread(#[from] io::Error),
}

/// What threads and readers share.
#[derive(Debug)]
pub struct Shared {
    pub view: ArcSwapOption<View>,
    pub counters: Arc<Counters>,
    pub draining: AtomicBool,
    pub stop: AtomicBool,
    tables: ArcSwapOption<Tables>,
    status: ArcSwap<Status>,
    /// Counts publications: readers wait for changes.
    changes: watch::Sender<u64>,
}

impl Shared {
    /// Tables that the control thread has not seen yet.
    pub fn new_tables(&self) -> Option<Arc<Tables>> {
        // An empty slot is the usual case: reading it costs less than swapping.
        if self.tables.load().is_none() { None } else { self.tables.swap(None) }
    }

    pub fn publish(&self, view: Option<View>) {
        self.view.store(view.map(Arc::new));
    }

    pub fn publish_status(&self, status: Status) {
        let news = {
            let before = self.status.load();
            let health = |s: &Status| -> Vec<(SocketAddr, bool, bool)> {
                s.hops.iter().map(|hop| (hop.address, hop.alive, hop.draining)).collect()
            };
            health(&before) != health(&status) || before.registered != status.registered
        };
        self.status.store(Arc::new(status));
        if news {
            self.changes.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

/// Wakes a thread that waits for packets.
#[derive(Clone, Debug)]
pub struct Waker(Arc<UnixStream>);

impl Waker {
    pub fn wake(&self) {
        // Full means that it is awake already.
        let _ = (&*self.0).write(&[1]);
    }
}

/// The other end, held by the thread.
#[derive(Debug)]
pub struct Wakeup(UnixStream);

impl Wakeup {
    fn pair() -> io::Result<(Waker, Self)> {
        let (waker, wakeup) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        wakeup.set_nonblocking(true)?;
        Ok((Waker(Arc::new(waker)), Self(wakeup)))
    }

    pub fn clear(&self) {
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|count| count == bytes.len()) {}
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A worker's way to the control thread; sheds when that falls behind.
#[derive(Debug)]
pub struct ControlQueue {
    notices: mpsc::SyncSender<Notice>,
    waker: Waker,
    tally: Arc<Tally>,
    hints: Bucket,
    started: Instant,
}

impl ControlQueue {
    pub fn push(&self, notice: Notice) {
        let hint = !matches!(notice, Notice::Datagram(_));
        if hint && !self.hints.take(self.started.elapsed(), HINTS_PER_SECOND) {
            return;
        }
        match self.notices.try_send(notice) {
            Ok(()) => self.waker.wake(),
            Err(mpsc::TrySendError::Full(notice) | mpsc::TrySendError::Disconnected(notice)) => {
                count_lost(&self.tally, &notice);
            }
        }
    }
}

/// Bound, not yet started.
#[derive(Debug)]
pub struct BoundDataPlane {
    config: DataPlaneConfig,
    border: Group,
    inner: Group,
}

/// Running threads.
#[derive(Debug)]
pub struct DataPlane {
    shared: Arc<Shared>,
    wakers: Vec<Waker>,
    control: Waker,
    threads: Vec<JoinHandle<()>>,
    border: SocketAddr,
    inner: SocketAddr,
}

impl BoundDataPlane {
    pub fn bind(config: DataPlaneConfig) -> Result<Self, DataPlaneError> {
        if config.border == config.inner && config.border.port() != 0 {
            return Err(DataPlaneError::SameAddress { address: config.border });
        }
        let workers = config.workers.get();
        let border = Group::bind("--border", config.border, workers)?;
        let inner = Group::bind("--inner", config.inner, workers)?;
        Ok(Self { config, border, inner })
    }

    pub fn border_addr(&self) -> SocketAddr {
        self.border.local_addr()
    }
    pub fn inner_addr(&self) -> SocketAddr {
        self.inner.local_addr()
    }

    pub fn start(self) -> Result<DataPlane, DataPlaneError> {
        let Self { config, border, inner } = self;
        let (border_addr, inner_addr) = (border.local_addr(), inner.local_addr());
        let pairs: Vec<_> = border.workers.into_iter().zip(inner.workers).collect();
        let counters = Arc::new(Counters::new(pairs.len() + 1));
        let recent = Arc::new(Recent::default());
        let started = Instant::now();
        let shared = Arc::new(Shared {
            view: ArcSwapOption::empty(),
            counters: Arc::clone(&counters),
            draining: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            tables: ArcSwapOption::empty(),
            status: ArcSwap::default(),
            changes: watch::channel(0).0,
        });
        let (notices, received) = mpsc::sync_channel(QUEUE);
        let (control_waker, control_wakeup) = Wakeup::pair()?;
        let mut plane = DataPlane {
            shared: Arc::clone(&shared),
            wakers: vec![control_waker.clone()],
            control: control_waker.clone(),
            threads: Vec::new(),
            border: border_addr,
            inner: inner_addr,
        };
        let forwarder = |index: usize, exits: &Exits| -> Result<Forwarder, io::Error> {
            let tally = counters.thread(index).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(Forwarder::new(started, exits.clone(), tally, Arc::clone(&recent)))
        };
        for (index, (border, inner)) in pairs.into_iter().enumerate() {
            let exits = Exits { border, inner };
            let (waker, wakeup) = Wakeup::pair()?;
            plane.wakers.push(waker);
            let tally = counters.thread(index).ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
            let worker = Worker {
                forwarder: forwarder(index, &exits)?,
                exits,
                shared: Arc::clone(&shared),
                control: ControlQueue {
                    notices: notices.clone(),
                    waker: control_waker.clone(),
                    tally,
                    hints: Bucket::default(),
                    started,
                },
                wakeup,
            };
            plane.threads.push(thread(format!("forward {index}"), move || worker.run())?);
        }
        let exits = Exits { border: border.control, inner: inner.control };
        let control = ControlThread {
            state: State::new(config.start, Arc::clone(&counters), Arc::clone(&recent), started),
            forwarder: forwarder(plane.threads.len(), &exits)?,
            exits,
            shared,
            notices: received,
            wakeup: control_wakeup,
        };
        plane.threads.push(thread("forward control".to_owned(), move || control.run())?);
        Ok(plane)
    }
}

fn thread(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(work)
}

impl DataPlane {
    pub fn border_addr(&self) -> SocketAddr {
        self.border
    }
    pub fn inner_addr(&self) -> SocketAddr {
        self.inner
    }

    /// The configuration from now on.
    pub fn set_tables(&self, tables: Arc<Tables>) {
        self.shared.tables.store(Some(tables));
        self.control.wake();
    }

    /// Says in every PROBE-ACK that this replica is about to go; it still forwards.
    pub fn drain(&self) {
        self.shared.draining.store(true, Relaxed);
        self.control.wake();
    }

    pub fn handle(&self) -> DataPlaneHandle {
        DataPlaneHandle { shared: Arc::clone(&self.shared), control: self.control.clone() }
    }

    /// Ends the threads; what is in the sockets is lost.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.wakers.iter().for_each(Waker::wake);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a forwarding thread had panicked");
            }
        }
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.end();
    }
}

/// For those who feed and read a running data plane without owning it.
#[derive(Clone, Debug)]
pub struct DataPlaneHandle {
    shared: Arc<Shared>,
    control: Waker,
}

impl DataPlaneHandle {
    pub fn set_tables(&self, tables: Arc<Tables>) {
        self.shared.tables.store(Some(tables));
        self.control.wake();
    }
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }
    pub fn status(&self) -> Arc<Status> {
        self.shared.status.load_full()
    }
    /// Ticks when a hop's health or the number of registrations has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Relaxed)
    }
    /// Whether packets are forwarded: a configuration has been taken.
    pub fn is_configured(&self) -> bool {
        self.shared.view.load().is_some()
    }
    pub fn drain(&self) {
        self.shared.draining.store(true, Relaxed);
        self.control.wake();
    }
    /// Waits until a configuration has been taken, at most this long.
    pub fn wait_configured(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.is_configured() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.is_configured()
    }
}
