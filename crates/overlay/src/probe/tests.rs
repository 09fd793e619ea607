//! The state machine against a simulated hop, in virtual time.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A hop with a one-way delay, an MTU, and a switch.
struct Hop {
    state: ProbeState,
    now: Instant,
    delay: Duration,
    mtu: u16,
    up: bool,
    /// Every n-th packet is lost; 0 for none.
    lose_every: u64,
    sent: u64,
    start: StartNumber,
    observed: SocketAddr,
    unreachable: Vec<ClusterTag>,
    in_transit: VecDeque<(Instant, u64, ProbeAck)>,
    events: Vec<(Duration, Event)>,
    begun: Instant,
}

impl Hop {
    fn new(delay: Duration) -> Self {
        let now = Instant::now();
        Self {
            state: ProbeState::new(now, 7),
            now,
            delay,
            mtu: 1452,
            up: true,
            lose_every: 0,
            sent: 0,
            start: StartNumber(1),
            observed: "192.0.2.1:5000".parse().unwrap(),
            unreachable: Vec::new(),
            in_transit: VecDeque::new(),
            events: Vec::new(),
            begun: now,
        }
    }

    fn run(&mut self, time: Duration, traffic: bool) {
        let end = self.now + time;
        while self.now < end {
            self.now += MS;
            while let Some((at, sequence, ack)) = self.in_transit.pop_front() {
                if at > self.now {
                    self.in_transit.push_front((at, sequence, ack));
                    break;
                }
                assert!(self.state.on_ack(self.now, sequence, &ack));
            }
            while let Some(out) = self.state.on_tick(self.now, traffic) {
                self.sent += 1;
                let lost = self.lose_every != 0 && self.sent.is_multiple_of(self.lose_every);
                if self.up && !lost && out.probe.bytes <= self.mtu {
                    let ack = ProbeAck::answering(
                        &out.probe,
                        out.probe.bytes,
                        self.start,
                        self.observed,
                        &self.unreachable,
                    );
                    self.in_transit.push_back((self.now + 2 * self.delay, out.sequence, ack));
                }
            }
            let at = self.now - self.begun;
            self.events.extend(self.state.take_events().into_iter().map(|event| (at, event)));
        }
    }

    /// When `event` happened after `since`, in time from then on.
    fn after(&self, since: Instant, event: &Event) -> Option<Duration> {
        let since = since - self.begun;
        self.events.iter().find(|(at, e)| *at >= since && e == event).map(|(at, _)| *at - since)
    }
}

#[test]
fn probes_go_every_100_ms_with_traffic_and_every_second_without() {
    let mut hop = Hop::new(MS);
    hop.run(Duration::from_secs(10), false); // settles the MTU
    let sent = hop.sent;
    hop.run(Duration::from_secs(20), false);
    assert!((20..=23).contains(&(hop.sent - sent)), "{} in 20 idle seconds", hop.sent - sent);
    let sent = hop.sent;
    hop.run(Duration::from_secs(10), true);
    assert!((99..=106).contains(&(hop.sent - sent)), "{} in 10 busy seconds", hop.sent - sent);
}

#[test]
fn a_dead_hop_is_noticed_well_under_a_second_with_traffic_and_within_1300_ms_when_idle() {
    for (one_way, traffic, limit) in
        [(1, true, 380), (25, true, 420), (100, true, 720), (1, false, 1300), (25, false, 1350)]
    {
        let mut hop = Hop::new(one_way * MS);
        hop.run(Duration::from_secs(5), traffic);
        assert!(hop.state.alive() && !hop.state.suspect());
        let cut = hop.now;
        hop.up = false;
        hop.in_transit.clear();
        hop.run(Duration::from_secs(3), traffic);
        let dead = hop.after(cut, &Event::Dead).expect("found dead");
        assert!(dead <= Duration::from_millis(limit), "one way {one_way} ms, traffic {traffic}: {dead:?}");
        assert!(!hop.state.alive());
    }
}

#[test]
fn one_unanswered_probe_makes_a_hop_suspect_before_it_is_dead() {
    let mut hop = Hop::new(MS);
    hop.run(Duration::from_secs(2), true);
    hop.up = false;
    hop.run(160 * MS, true);
    assert!(hop.state.suspect() && hop.state.alive());
}

#[test]
fn one_ack_revives() {
    let mut hop = Hop::new(10 * MS);
    hop.run(Duration::from_secs(2), true);
    hop.up = false;
    hop.run(Duration::from_secs(60), true);
    assert_eq!(hop.state.health(), Health::Dead);
    hop.up = true;
    let back = hop.now;
    hop.run(Duration::from_millis(1100), true);
    assert_eq!(hop.state.health(), Health::Alive);
    assert!(hop.after(back, &Event::Alive).is_some());
}

#[test]
fn a_hop_that_never_answered_is_not_alive_and_then_dead() {
    let mut hop = Hop::new(MS);
    hop.up = false;
    hop.run(300 * MS, true);
    assert_eq!((hop.state.health(), hop.state.alive()), (Health::Untested, false));
    hop.run(Duration::from_secs(1), true);
    assert_eq!(hop.state.health(), Health::Dead);
    let sent = hop.sent;
    hop.run(Duration::from_secs(60), true);
    assert!(hop.sent - sent < 60 + 50, "a dead hop is probed slowly: {}", hop.sent - sent);
}

#[test]
fn what_was_asked_before_anybody_answered_is_no_loss() {
    let mut hop = Hop::new(25 * MS);
    hop.lose_every = 1;
    hop.run(Duration::from_secs(20), true);
    assert_eq!(hop.state.loss_per_mille(), 1000);
    hop.lose_every = 0;
    hop.run(Duration::from_secs(10), true);
    assert_eq!(hop.state.loss_per_mille(), 0);
}

#[test]
fn a_lost_probe_now_and_then_never_kills_and_shows_as_loss() {
    let mut hop = Hop::new(25 * MS);
    hop.lose_every = 10;
    hop.run(Duration::from_secs(60), true);
    assert!(hop.events.iter().all(|(_, e)| *e != Event::Dead));
    assert!((80..=120).contains(&hop.state.loss_per_mille()), "{}", hop.state.loss_per_mille());
    hop.lose_every = 0;
    hop.run(Duration::from_secs(15), true);
    assert_eq!(hop.state.loss_per_mille(), 0);
    let rtt = hop.state.rtt().unwrap();
    assert!((50 * MS..=52 * MS).contains(&rtt), "{rtt:?}");
}

#[test]
fn a_process_that_was_stopped_itself_does_not_call_its_hops_dead() {
    let mut hop = Hop::new(MS);
    hop.run(Duration::from_secs(3), true);
    // Stopped for 2 s: the tick comes before the socket's acks are read.
    hop.now += Duration::from_secs(2);
    let out = hop.state.on_tick(hop.now, true);
    assert!(out.is_some() && hop.state.alive());
    hop.run(Duration::from_secs(1), true);
    assert!(hop.events.iter().all(|(_, e)| *e != Event::Dead));
    // But a hop that died meanwhile is found dead.
    hop.up = false;
    hop.run(Duration::from_secs(1), true);
    assert!(!hop.state.alive());
}

#[test]
fn the_mtu_is_found_and_a_shrunk_path_is_noticed() {
    for mtu in [1200, 1300, 1372, 1420, 1452, 4000, 8952, 9000] {
        let mut hop = Hop::new(5 * MS);
        hop.mtu = mtu;
        hop.run(Duration::from_secs(15), true);
        let found = hop.state.mtu();
        assert!(found <= mtu && mtu - found <= 12, "{mtu}: {found}");
        assert!(hop.events.iter().all(|(_, e)| *e != Event::Dead));
    }
    let mut hop = Hop::new(5 * MS);
    hop.mtu = 8952;
    hop.run(Duration::from_secs(15), true);
    let cut = hop.now;
    hop.mtu = 1420;
    hop.run(Duration::from_secs(4), true);
    assert!(hop.state.mtu() <= 1420, "{}", hop.state.mtu());
    assert!(hop.after(cut, &Event::MtuChanged(1200)).is_some());
    hop.run(Duration::from_secs(10), true);
    assert!(hop.state.mtu() >= 1408);
    // and a path that grows is found in the end
    hop.mtu = 9000;
    hop.run(Duration::from_secs(620), false);
    assert!(hop.state.mtu() >= 8988, "{}", hop.state.mtu());
}

#[test]
fn a_size_that_the_kernel_refuses_is_not_tried_again() {
    let now = Instant::now();
    let mut state = ProbeState::new(now, 1);
    let out = state.on_tick(now, true).unwrap();
    let observed = "192.0.2.1:5000".parse().unwrap();
    state.on_ack(
        now + MS,
        out.sequence,
        &ProbeAck::answering(&out.probe, 256, StartNumber(1), observed, &[]),
    );
    let big = state.on_tick(now + 2 * MS, true).unwrap();
    assert_eq!(big.probe.bytes, 1452);
    state.on_too_large(now + 2 * MS, big.sequence);
    let next = state.on_tick(now + 3 * MS, true).unwrap();
    assert_eq!(next.probe.bytes, 1412);
}

#[test]
fn news_in_acks_become_events_once() {
    let mut hop = Hop::new(MS);
    hop.run(Duration::from_secs(1), true);
    let first = AddressEvent::of(&hop);
    assert_eq!(first, vec![(None, hop.observed)]);
    let old = hop.observed;
    hop.observed = "192.0.2.1:6000".parse().unwrap();
    hop.start = StartNumber(2);
    hop.unreachable = vec![ClusterTag::new(9).unwrap(), ClusterTag::new(3).unwrap()];
    let since = hop.now;
    hop.run(Duration::from_secs(1), true);
    assert_eq!(AddressEvent::of(&hop)[1..], [(Some(old), hop.observed)]);
    assert!(hop.after(since, &Event::Restarted(StartNumber(2))).is_some());
    assert!(hop.after(since, &Event::UnreachableChanged).is_some());
    assert_eq!(hop.state.unreachable(), [ClusterTag::new(3).unwrap(), ClusterTag::new(9).unwrap()]);
    let count = hop.events.len();
    hop.run(Duration::from_secs(1), true);
    assert_eq!(hop.events.len(), count);
}

struct AddressEvent;
impl AddressEvent {
    fn of(hop: &Hop) -> Vec<(Option<SocketAddr>, SocketAddr)> {
        let address = |(_, event): &(Duration, Event)| match event {
            Event::AddressChanged { old, new } => Some((*old, *new)),
            _ => None,
        };
        hop.events.iter().filter_map(address).collect()
    }
}

#[test]
fn unknown_replayed_and_mismatched_acks_change_nothing() {
    let now = Instant::now();
    let mut state = ProbeState::new(now, 1);
    let out = state.on_tick(now, true).unwrap();
    let observed = "192.0.2.1:5000".parse().unwrap();
    let ack = ProbeAck::answering(&out.probe, 256, StartNumber(1), observed, &[]);
    assert!(!state.on_ack(now + MS, out.sequence + 1, &ack));
    assert!(!state.on_ack(now + MS, out.sequence, &ProbeAck { sent_micros: 99, ..ack.clone() }));
    assert!(!state.alive() && state.rtt().is_none());
    assert!(state.on_ack(now + MS, out.sequence, &ack));
    assert!(!state.on_ack(now + 50 * MS, out.sequence, &ack), "a replay");
    assert_eq!(state.last_ack(), Some(now + MS));
}

#[test]
fn the_planned_ticks_alone_are_enough() {
    let now = Instant::now();
    let mut state = ProbeState::new(now, 1);
    let mut at = now;
    let mut ticks = 0;
    while state.health() != Health::Dead {
        at = at.max(state.next_tick());
        if state.on_tick(at, true).is_none() {
            at += MS;
        }
        ticks += 1;
        assert!(ticks < 1000, "never found dead");
    }
    assert!(at - now < Duration::from_secs(1), "{:?}", at - now);
}
