//! The thread of a link: reads packets from both devices, asks the shaper, delivers what is due, sleeps until the next.
//!
//! At 300 Mbit/s a packet is due every 40 µs; waking for each costs more than carrying it. So while packets flow on a
//! delayed link the thread rests for [`BATCH`] and then carries all that came and became due: a delivery is late by
//! less than 0.1 ms, well inside a millisecond-scale delay, and never early.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::queue::{Counters, InFlight};
use super::shape::{Shaper, Verdict};
use super::tun::Tun;
use super::{Direction, Tapped};

/// Rest between two rounds while packets flow.
const BATCH: Duration = Duration::from_micros(80);

/// Links with less delay than this are woken per packet: there, a rest would be a part of the latency.
const BATCH_FROM_DELAY: Duration = Duration::from_millis(2);

/// Longest sleep, so that a stop is seen.
const STOP_POLL: Duration = Duration::from_millis(20);

/// Packets read from one device per round, so that the other direction and the clock get their turn.
const READ_BUDGET: usize = 256;

pub(super) struct Forwarder {
    tuns: [Tun; 2],
    lanes: [Lane; 2],
    stop: Arc<AtomicBool>,
}

struct Lane {
    direction: Arc<Direction>,
    shaper: Shaper,
    in_flight: InFlight,
}

impl Forwarder {
    pub(super) fn new(
        tuns: [Tun; 2],
        directions: [Arc<Direction>; 2],
        stop: Arc<AtomicBool>,
        seed: u64,
    ) -> Self {
        let now = Instant::now();
        // The two directions must not lose the same packet numbers.
        let mut seed = seed;
        let lanes = directions.map(|direction| {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            Lane { direction, shaper: Shaper::new(seed, now), in_flight: InFlight::default() }
        });
        Self { tuns, lanes, stop }
    }

    pub(super) fn run(mut self) {
        // The default slack of 50 µs would add to every sleep.
        let _ = nix::sys::prctl::set_timerslack(1_000);
        let mut buffer = vec![0u8; 1 << 16];
        while !self.stop.load(Ordering::Relaxed) {
            let [tun_a, tun_b] = &self.tuns;
            let [a_to_b, b_to_a] = &mut self.lanes;
            let mut moved = a_to_b.round(tun_a, tun_b, &mut buffer);
            moved |= b_to_a.round(tun_b, tun_a, &mut buffer);
            let next = [a_to_b.in_flight.next_due(), b_to_a.in_flight.next_due()].into_iter().flatten().min();
            let batching = a_to_b.batches() && b_to_a.batches();
            if moved && batching {
                std::thread::sleep(BATCH);
            } else if !moved {
                self.sleep(next);
            }
        }
    }

    /// Until `next`, a packet on either device, or [`STOP_POLL`].
    fn sleep(&self, next: Option<Instant>) {
        let wait = next.map_or(STOP_POLL, |at| at.saturating_duration_since(Instant::now()).min(STOP_POLL));
        let mut fds = self.tuns.each_ref().map(|tun| libc::pollfd {
            fd: tun.raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        let timeout = libc::timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        // SAFETY: `fds` and `timeout` outlive the call and the count is the array's length. An error (EINTR) only
        // means an early round.
        unsafe {
            libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, &raw const timeout, std::ptr::null())
        };
    }
}

impl Lane {
    fn batches(&self) -> bool {
        self.direction.shape.load().delay >= BATCH_FROM_DELAY
    }

    /// Whether anything was read or delivered.
    fn round(&mut self, from: &Tun, to: &Tun, buffer: &mut [u8]) -> bool {
        let counters = &self.direction.counters;
        let shape = self.direction.shape.load();
        let black_hole = self.direction.black_hole.load(Ordering::Relaxed);
        let mut moved = false;
        let now = Instant::now();
        let mut tap = self.direction.tap.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..READ_BUDGET {
            let Some(bytes) = from.receive(buffer) else { break };
            moved = true;
            let packet = buffer.get(..bytes).unwrap_or_default();
            if black_hole {
                Counters::add(&counters.black_holed, 1);
                continue;
            }
            match tap.as_mut().map_or(Tapped::Pass, |tap| tap(packet)) {
                Tapped::Pass => {
                    let verdict = self.shaper.admit(&shape, bytes, now);
                    take(&mut self.in_flight, counters, verdict, packet, Duration::ZERO);
                }
                Tapped::Instead(packets) => {
                    for (late, packet) in packets {
                        let verdict = self.shaper.admit(&shape, packet.len(), now);
                        take(&mut self.in_flight, counters, verdict, &packet, late);
                    }
                }
            }
        }
        drop(tap);
        let now = Instant::now();
        while let Some(packet) = self.in_flight.pop_due(now) {
            moved = true;
            if black_hole {
                Counters::add(&counters.black_holed, 1);
            } else if to.send(&packet) {
                Counters::add(&counters.delivered, 1);
                Counters::add(&counters.delivered_bytes, packet.len() as u64);
            } else {
                Counters::add(&counters.refused_by_kernel, 1);
            }
            self.in_flight.recycle(packet);
        }
        moved
    }
}

/// Does what the shaper says; `late` comes on top, so that later packets may overtake.
fn take(in_flight: &mut InFlight, counters: &Counters, verdict: Verdict, packet: &[u8], late: Duration) {
    match verdict {
        Verdict::Deliver { at, reordered } => {
            if !in_flight.push(at + late, packet) {
                Counters::add(&counters.queue_full, 1);
            } else if reordered {
                Counters::add(&counters.reordered, 1);
            }
        }
        Verdict::Lost => Counters::add(&counters.lost, 1),
        Verdict::TooBig => Counters::add(&counters.too_big, 1),
        Verdict::QueueFull => Counters::add(&counters.queue_full, 1),
    }
}
