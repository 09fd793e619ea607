//! Moves one received batch on: decides per packet, sends neighbours with the same route in one call, counts.
//!
//! One [`Forwarder`] per thread; it owns the thread's key cache and nothing else. No allocation per packet: a batch is read,
//! marked and sent in the buffer that it came in. What the kernel does not take at once is dropped and counted: QUIC's
//! senders slow down by that, and a gateway that waits would delay everybody else's packets.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use quinn_udp::{EcnCodepoint, RecvMeta};
use tombolo_overlay::cid::{CID_LEN, Cid, Kind, Packet, classify, set_handed_over};
use tombolo_runtime::clock;

use crate::counters::{Reason, Slot, Tally};
use crate::decide::{Action, Flow, Forward, Gone, Now, best_path, decide};
use crate::keys::KeyCache;
use crate::port::{MAX_SEND_BYTES, Outgoing, Port, is_refusal};
use crate::recent::{Listener, Recent};
use crate::view::{Origin, Side, Via, View};

/// What a forwarding thread passes to the control thread.
#[derive(Debug)]
pub enum Notice {
    Datagram(Arrival),
    Gone {
        gone: Gone,
        origin: Origin,
        arrival: Arrival,
    },
    /// ICMP says that nobody listens there.
    Refused(SocketAddr),
}

/// Where and how something came in.
#[derive(Debug)]
pub struct Arrival {
    pub via: Via,
    pub source: SocketAddr,
    /// The address of ours that was contacted.
    pub contacted: Option<IpAddr>,
    /// Of a control datagram; empty otherwise.
    pub bytes: Vec<u8>,
}

/// The thread's sockets.
#[derive(Clone, Debug)]
pub struct Exits {
    pub border: Arc<Port>,
    pub inner: Arc<Port>,
}

/// One thread's engine.
#[derive(Debug)]
pub struct Forwarder {
    started: Instant,
    keys: KeyCache,
    exits: Exits,
    tally: Arc<Tally>,
    recent: Arc<Recent>,
}

/// Packets next to each other in a buffer that leave together.
struct Run {
    bytes: Range<usize>,
    packets: u64,
    forward: Forward,
    dcid: Cid,
}

/// The last decision, for the packets of the same connection that follow it.
struct Memo {
    dcid: [u8; CID_LEN],
    action: Action,
}

/// The buffer in hand.
struct Batch<'a> {
    buffer: &'a mut [u8],
    stride: usize,
    ecn: Option<EcnCodepoint>,
    origin: Origin,
}

impl Forwarder {
    /// `started` is the same for all threads: buckets are shared.
    pub fn new(started: Instant, exits: Exits, tally: Arc<Tally>, recent: Arc<Recent>) -> Self {
        Self { started, keys: KeyCache::default(), exits, tally, recent }
    }

    pub fn now(&self) -> Now {
        Now { since_start: self.started.elapsed(), unix: clock::since_unix_epoch() }
    }

    pub fn keys(&mut self) -> &mut KeyCache {
        &mut self.keys
    }
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Counts a batch that came before the first snapshot.
    pub fn discard(&self, meta: &RecvMeta) {
        let packets = meta.len.div_ceil(meta.stride.max(1)) as u64;
        self.tally.dropped(Slot::UNKNOWN, Reason::Unconfigured, packets);
    }

    /// Handles what was received into `buffer`; what is not for forwarding goes to `notice`.
    pub fn batch(
        &mut self,
        view: &View,
        via: Via,
        buffer: &mut [u8],
        meta: &RecvMeta,
        now: Now,
        notice: &mut dyn FnMut(Notice),
    ) {
        let len = meta.len.min(buffer.len());
        let stride = if meta.stride == 0 { len.max(1) } else { meta.stride };
        let origin = view.origin(via.side(), meta.addr);
        let mut batch = Batch { buffer, stride, ecn: meta.ecn, origin };
        let mut run: Option<Run> = None;
        let mut memo: Option<Memo> = None;
        let mut at = 0;
        while at < len {
            let end = (at + stride).min(len);
            let Some(packet) = batch.buffer.get_mut(at..end) else { break };
            let (action, dcid) = self.judge(view, via.side(), origin, packet, now, &mut memo);
            match (action, dcid) {
                (Action::Forward(forward), Some(dcid)) => {
                    if let Some(on) = forward.handed_over.filter(|on| *on != dcid.handed_over()) {
                        set_handed_over(packet, on);
                    }
                    match &mut run {
                        Some(run) if run.forward == forward && run.bytes.end == at => {
                            run.bytes.end = end;
                            run.packets += 1;
                        }
                        _ => {
                            self.flush(view, &mut batch, run.take(), notice);
                            run = Some(Run { bytes: at..end, packets: 1, forward, dcid });
                        }
                    }
                }
                (Action::Forward(_), None) => {}
                (Action::Control, _) => {
                    let (source, contacted) = (meta.addr, meta.dst_ip);
                    notice(Notice::Datagram(Arrival { via, source, contacted, bytes: packet.to_vec() }));
                }
                (Action::Drop(reason, link), _) => self.drop(link, origin, reason, 1),
                (Action::Gone(gone, link), _) => {
                    self.drop(link, origin, Reason::Gone, 1);
                    let arrival =
                        Arrival { via, source: meta.addr, contacted: meta.dst_ip, bytes: Vec::new() };
                    notice(Notice::Gone { gone, origin, arrival });
                }
            }
            at = end;
        }
        self.flush(view, &mut batch, run, notice);
    }

    fn judge(
        &mut self,
        view: &View,
        side: Side,
        origin: Origin,
        packet: &[u8],
        now: Now,
        memo: &mut Option<Memo>,
    ) -> (Action, Option<Cid>) {
        let packet = classify(packet);
        let (dcid, each) = match &packet {
            Some(Packet::Long { dcid, first_flight, .. }) => (*dcid, *first_flight),
            Some(Packet::Short { dcid }) => (*dcid, false),
            _ => return (decide(packet.as_ref(), side, origin, view, &mut self.keys, now), None),
        };
        // First packets each take a token; all others of one connection ID fare alike.
        if !each
            && let Some(memo) = memo
            && memo.dcid == *dcid.as_bytes()
        {
            return (memo.action, Some(dcid));
        }
        let action = decide(packet.as_ref(), side, origin, view, &mut self.keys, now);
        if !each {
            *memo = Some(Memo { dcid: *dcid.as_bytes(), action });
        }
        if matches!(action, Action::Forward(_))
            && dcid.kind() == Kind::Endpoint
            && let (Some(tag), Some(listener)) = (dcid.tag(), Listener::of(origin.who))
        {
            self.recent.note(tag, dcid.endpoint(), listener);
        }
        (action, Some(dcid))
    }

    fn drop(&self, link: Slot, origin: Origin, reason: Reason, packets: u64) {
        self.tally.dropped(link, reason, packets);
        // Both, but each packet once under the unknown.
        if origin.hop != Slot::UNKNOWN {
            self.tally.dropped(origin.hop, reason, packets);
        }
    }

    fn flush(&self, view: &View, batch: &mut Batch<'_>, run: Option<Run>, notice: &mut dyn FnMut(Notice)) {
        let Some(run) = run else { return };
        let Some(contents) = batch.buffer.get(run.bytes.clone()) else { return };
        if batch.origin.hop != Slot::UNKNOWN {
            self.tally.received(batch.origin.hop, run.packets, contents.len() as u64);
        }
        if run.forward.flow == Flow::In {
            self.tally.received(run.forward.link, run.packets, contents.len() as u64);
        }
        let Some(port) = self.port(view, run.forward.via) else {
            return self.drop(run.forward.link, batch.origin, Reason::NoPath, run.packets);
        };
        let most = (MAX_SEND_BYTES / batch.stride).clamp(1, port.max_segments()) * batch.stride;
        for chunk in contents.chunks(most) {
            self.send(view, batch, &run, chunk, notice);
        }
    }

    fn port<'a>(&'a self, view: &'a View, via: Via) -> Option<&'a Port> {
        match via {
            Via::Side(Side::Border) => Some(&self.exits.border),
            Via::Side(Side::Inner) => Some(&self.exits.inner),
            Via::Port(id) => view.ports.get(&id).map(|port| &**port),
        }
    }

    /// Sends one batch. An error that belongs to an earlier packet costs this one nothing: it is sent again, by another
    /// path when the error was about this one's.
    fn send(
        &self,
        view: &View,
        batch: &Batch<'_>,
        run: &Run,
        contents: &[u8],
        notice: &mut dyn FnMut(Notice),
    ) {
        let mut forward = run.forward;
        let packets = contents.len().div_ceil(batch.stride) as u64;
        for attempt in 0..3 {
            let Some(port) = self.port(view, forward.via) else { break };
            let error = match self.try_send(port, batch, &forward, contents) {
                Ok(()) => {
                    if forward.flow == Flow::Out {
                        self.tally.sent(forward.link, packets, contents.len() as u64);
                    }
                    if forward.hop != Slot::UNKNOWN {
                        self.tally.sent(forward.hop, packets, contents.len() as u64);
                    }
                    return;
                }
                Err(error) => error,
            };
            let reason = match error.raw_os_error() {
                Some(libc::EMSGSIZE) => Reason::TooLarge,
                _ if error.kind() == std::io::ErrorKind::WouldBlock => Reason::WouldBlock,
                _ => {
                    let about_us = self.drain(view, port, notice).contains(&Some(forward.to));
                    if attempt == 2 {
                        Reason::SendError
                    } else {
                        if about_us && forward.flow == Flow::Out {
                            forward = self.other_path(view, run).unwrap_or(forward);
                        }
                        continue;
                    }
                }
            };
            return self.drop(forward.link, batch.origin, reason, packets);
        }
        self.drop(forward.link, batch.origin, Reason::SendError, packets);
    }

    fn try_send(
        &self,
        port: &Port,
        batch: &Batch<'_>,
        forward: &Forward,
        contents: &[u8],
    ) -> std::io::Result<()> {
        let several = contents.len() > batch.stride;
        let outgoing = Outgoing {
            to: forward.to,
            from: forward.from,
            ecn: batch.ecn,
            contents,
            segment: several.then_some(batch.stride),
        };
        let result = port.send(&outgoing);
        match &result {
            // A device that can't segment: quinn-udp has noted it; this batch goes one by one.
            Err(error) if several && matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL)) => {
                let mut singles = contents.chunks(batch.stride);
                singles.try_for_each(|contents| port.send(&Outgoing { contents, segment: None, ..outgoing }))
            }
            _ => result,
        }
    }

    fn other_path(&self, view: &View, run: &Run) -> Option<Forward> {
        best_path(view.links.get(&run.dcid.tag()?)?, &run.dcid)
    }

    /// Takes ICMP errors off a socket: marks the paths that they are about, tells the control thread. Up to four of the
    /// destinations are returned, the last ones.
    pub fn drain(&self, view: &View, port: &Port, notice: &mut dyn FnMut(Notice)) -> [Option<SocketAddr>; 4] {
        let mut about = [None; 4];
        let mut next = 0;
        port.drain_errors(|to, errno| {
            if !is_refusal(errno) {
                return;
            }
            if about.contains(&Some(to)) {
                return;
            }
            if let Some(place) = about.get_mut(next % 4) {
                *place = Some(to);
                next += 1;
            }
            let paths = view.links.values().flat_map(|link| &link.paths);
            paths.filter(|path| path.address == to).for_each(|path| path.flags.refused.store(true, Relaxed));
            notice(Notice::Refused(to));
        });
        about
    }
}

/// Notices that the control thread had no room for.
pub fn count_lost(tally: &Tally, notice: &Notice) {
    if matches!(notice, Notice::Datagram(_)) {
        tally.dropped(Slot::UNKNOWN, Reason::ControlOverflow, 1);
    }
}
