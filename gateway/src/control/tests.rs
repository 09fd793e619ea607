//! The control state in virtual time: probes, registrations, announcements and hints, without a socket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tombolo_model::ids::{Block, EndpointId};
use tombolo_overlay::DRAINING;
use tombolo_overlay::datagram::{
    self, Announce, Body, Datagram, DecodeError, Gone, Probe, ProbeAck, Register, Selector, StartNumber,
};
use tombolo_overlay::keys::{AcrossTarget, CidKey};
use tombolo_overlay::register::Side;

use super::*;
use crate::counters::Counters;
use crate::decide;
use crate::fixture::*;
use crate::recent::{Listener, Recent};
use crate::tables::Tables;
use crate::view::{Standing, View, Who};

const BORDER: Via = Via::Side(Side::Border);
const INNER: Via = Via::Side(Side::Inner);
const GW1: &str = "10.0.2.11:7440";
const SIBLING: &str = "10.0.1.12:7441";
const VM: &str = "198.51.100.7:40000";

struct Bench {
    state: State,
    recent: Arc<Recent>,
    now: Instant,
    out: Vec<Effect>,
}

impl Bench {
    fn new(tables: Arc<Tables>) -> Self {
        let now = Instant::now();
        let recent = Arc::new(Recent::default());
        let mut state = State::new(StartNumber(42), Arc::new(Counters::new(1)), Arc::clone(&recent), now);
        let mut out = Vec::new();
        state.on_tables(tables, now, NOW, &mut out);
        Self { state, recent, now, out }
    }

    fn tick(&mut self, after: Duration) -> Vec<Send> {
        self.now += after;
        self.state.on_tick(self.now, NOW, &mut self.out);
        self.sends()
    }
    fn sends(&mut self) -> Vec<Send> {
        let effects = std::mem::take(&mut self.out);
        effects
            .into_iter()
            .filter_map(|e| if let Effect::Send(send) = e { Some(send) } else { None })
            .collect()
    }
    fn receive(&mut self, via: Via, source: &str, bytes: Vec<u8>) -> Result<Vec<Send>, DecodeError> {
        let arrival =
            Arrival { contacted: Some([203, 0, 113, 1].into()), ..Arrival::of(via, at(source), bytes) };
        self.state.on_datagram(&arrival, self.now, NOW, &mut self.out)?;
        Ok(self.sends())
    }
    fn view(&self) -> View {
        self.state.view(&HashMap::new(), self.now).unwrap()
    }
    fn standing(&self, address: &str) -> Standing {
        let view = self.view();
        view.links[&west()].paths.iter().find(|path| path.address == at(address)).unwrap().standing
    }

    /// Answers what was probed at `address`, as its gateway would.
    fn answer(&mut self, sends: &[Send], address: &str, unreachable_total: u16) {
        let sibling = at(address) == at(SIBLING);
        let (key, tag) = if sibling {
            (cluster_key().probe_key(hour()), east())
        } else {
            (link_key().probe_key(hour()), west())
        };
        for send in sends.iter().filter(|send| send.to == at(address)) {
            let Ok(Datagram { sequence, body: Body::Probe(probe), .. }) =
                datagram::decode(&send.bytes).unwrap().verify(&key)
            else {
                continue;
            };
            let ack = ProbeAck::answering(&probe, probe.bytes, StartNumber(7), at("10.0.1.10:7440"), &[]);
            let ack = ProbeAck { unreachable_total, ..ack };
            let bytes = Datagram { selector: Selector::Gateway { tag }, sequence, body: Body::ProbeAck(ack) }
                .encode(hour(), &key);
            self.receive(send.via, address, bytes).unwrap();
        }
    }
}

fn encode(selector: Selector, sequence: u64, body: Body, key: &CidKey) -> Vec<u8> {
    Datagram { selector, sequence, body }.encode(hour(), key)
}
fn of(endpoint: EndpointId) -> Selector {
    Selector::Endpoint { tag: east(), endpoint }
}
fn probe(bytes: u16) -> Body {
    Body::Probe(Probe { sent_micros: 1, bytes })
}
fn read(send: &Send, key: &CidKey) -> Datagram {
    datagram::decode(&send.bytes).unwrap().verify(key).unwrap()
}

#[test]
fn a_path_is_used_after_its_gateway_answered_and_left_when_it_no_longer_does() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    assert_eq!(probes.len(), 3, "two gateways of west by the border, one sibling by the inner socket");
    assert_eq!(probes.iter().filter(|p| p.via == INNER).count(), 1);
    assert_eq!(bench.standing(GW1), Standing::Unproven);
    bench.now += Duration::from_millis(20);
    bench.answer(&probes, GW1, 0);
    assert_eq!(bench.standing(GW1), Standing::Alive);
    assert_eq!(bench.standing("10.0.2.12:7440"), Standing::Unproven);
    for _ in 0..60 {
        bench.tick(Duration::from_millis(50));
    }
    assert_eq!(bench.standing(GW1), Standing::Dead);
    assert_eq!(bench.state.status().unreachable, [west()]);
}

#[test]
fn an_answer_from_elsewhere_or_of_another_cluster_proves_nothing() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    let send = probes.iter().find(|p| p.to == at(GW1)).unwrap();
    let key = link_key().probe_key(hour());
    let Datagram { sequence, body: Body::Probe(probe), .. } = read(send, &key) else { panic!("a probe") };
    let ack = Body::ProbeAck(ProbeAck::answering(&probe, 256, StartNumber(7), at(GW1), &[]));
    let bytes = encode(Selector::Gateway { tag: west() }, sequence, ack, &key);
    assert!(bench.receive(BORDER, "203.0.113.99:7440", bytes.clone()).is_err());
    assert!(bench.receive(INNER, GW1, bytes.clone()).is_err());
    let mut forged = bytes;
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(bench.receive(BORDER, GW1, forged).unwrap_err(), DecodeError::Mac);
    assert_eq!(bench.standing(GW1), Standing::Unproven);
}

#[test]
fn an_icmp_error_ends_a_path_at_once_and_one_answer_revives_it() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    bench.answer(&probes, GW1, 0);
    bench.state.on_refused(at(GW1), bench.now, NOW, &mut bench.out);
    assert_eq!(bench.standing(GW1), Standing::Dead);
    bench.state.published();
    let probes = bench.tick(Duration::from_millis(100));
    bench.answer(&probes, GW1, 0);
    assert_eq!(bench.standing(GW1), Standing::Alive);
}

#[test]
fn a_draining_gateway_is_the_last_resort_and_says_so_to_others() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    bench.answer(&probes, GW1, DRAINING);
    assert_eq!(bench.standing(GW1), Standing::Reserve);
    bench.state.set_draining(true);
    let asked = encode(of(endpoint(1, 0)), 5, probe(256), &endpoint_key(1));
    let answers = bench.receive(INNER, "10.0.1.1:7442", asked).unwrap();
    let Body::ProbeAck(ack) = read(&answers[0], &endpoint_key(1)).body else { panic!("an ack") };
    assert_eq!(ack.unreachable_total, DRAINING);
}

#[test]
fn a_probe_is_answered_where_it_came_in_and_never_by_more() {
    let mut bench = Bench::new(tables());
    for bytes in [80, 256, 1400] {
        let asked = encode(of(endpoint(1, 0)), 5, probe(bytes), &endpoint_key(1));
        let size = asked.len();
        let answers = bench.receive(INNER, "10.0.1.1:7442", asked).unwrap();
        let [answer] = answers.as_slice() else { panic!("one answer") };
        assert!(answer.bytes.len() <= size);
        assert_eq!(
            (answer.via, answer.to, answer.from),
            (INNER, at("10.0.1.1:7442"), Some([203, 0, 113, 1].into()))
        );
        let Datagram { sequence: 5, body: Body::ProbeAck(ack), .. } = read(answer, &endpoint_key(1)) else {
            panic!("an ack")
        };
        assert_eq!(
            (ack.start, ack.observed, usize::from(ack.received_bytes)),
            (StartNumber(42), at("10.0.1.1:7442"), size)
        );
    }
    let peer = encode(Selector::Gateway { tag: west() }, 5, probe(256), &link_key().probe_key(hour()));
    let answers = bench.receive(BORDER, "192.0.2.50:1024", peer).unwrap();
    assert!(matches!(read(&answers[0], &link_key().probe_key(hour())).body, Body::ProbeAck(_)));
    let stranger = encode(of(endpoint(0x99, 0)), 5, probe(256), &endpoint_key(0x99));
    assert!(bench.receive(INNER, "10.0.1.1:7442", stranger).is_err(), "nobody holds this block");
}

#[test]
fn an_endpoint_of_a_peer_may_ask_whether_we_live_and_be_told_what_is_gone_and_no_more() {
    let mut bench = Bench::new(tables());
    let key = |prober: u32| {
        let target = link_key().across_key(east(), AcrossTarget::Gateways, hour());
        target.of_prober(west(), Block::new(prober).unwrap())
    };
    let who = Selector::Across { tag: west(), endpoint: endpoint(9, 0) };
    let from = "192.0.2.50:7442";
    let answers = bench.receive(BORDER, from, encode(who, 5, probe(256), &key(9))).unwrap();
    let answer = read(&answers[0], &key(9));
    let Body::ProbeAck(ack) = answer.body else { panic!("an ack") };
    assert_eq!((answer.selector, answer.sequence, ack.observed), (who, 5, at(from)));
    assert_eq!(
        (ack.unreachable_total, ack.unreachable),
        (0, vec![]),
        "whom else we reach is not its business"
    );
    assert_eq!(
        bench.receive(BORDER, from, encode(who, 6, probe(256), &key(8))).unwrap_err(),
        DecodeError::Mac
    );
    let register = Body::Register(Register { replica: StartNumber(42), challenge: 0 });
    assert!(bench.receive(BORDER, from, encode(who, 7, register, &key(9))).is_err());
    // It may not pass for one of ours, whose packets may leave for other clusters.
    bench.receive(BORDER, "10.0.1.1:7442", encode(who, 8, probe(256), &key(9))).unwrap();
    let origin = |bench: &Bench, source: &str| bench.view().origin(Side::Border, at(source)).who;
    assert!(matches!(origin(&bench, "10.0.1.1:7442"), Who::Endpoint { .. }));
    let foreign = origin(&bench, from);
    assert_eq!(foreign, Who::Foreign { tag: west(), endpoint: endpoint(9, 0) });
    // What it sends to is no more.
    let gone = decide::Gone { endpoint: endpoint(3, 0), only_this_incarnation: false };
    let arrival = Arrival::of(BORDER, at(from), vec![0; 50]);
    let origin = bench.view().origin(Side::Border, at(from));
    bench.state.on_gone(gone, origin, &arrival, NOW, &mut bench.out);
    let told = bench.sends();
    let Body::Gone(gone) = read(&told[0], &key(9)).body else { panic!("a hint") };
    assert_eq!((told[0].to, gone.tag, gone.endpoint), (at(from), east(), endpoint(3, 0)));
}

/// REGISTERs from `source`, with the challenge echoed.
fn register(bench: &mut Bench, endpoint: EndpointId, source: &str, counter: u64) {
    let key = cluster_key().endpoint_key(endpoint.block(), hour());
    register_by(bench, endpoint, source, counter, &key);
}

fn register_by(bench: &mut Bench, endpoint: EndpointId, source: &str, counter: u64, key: &CidKey) {
    let ask = |counter, challenge| {
        encode(of(endpoint), counter, Body::Register(Register { replica: StartNumber(42), challenge }), key)
    };
    let answers = bench.receive(BORDER, source, ask(counter, 0)).unwrap();
    let Body::Challenge(challenge) = read(&answers[0], key).body else { panic!("a challenge") };
    let answers = bench.receive(BORDER, source, ask(counter + 1, challenge.challenge)).unwrap();
    assert!(matches!(read(&answers[0], key).body, Body::Registered(_)));
}

#[test]
fn a_registration_counts_once_the_challenge_was_echoed_and_siblings_hear_of_it() {
    let mut bench = Bench::new(tables());
    let vm = endpoint(2, 0);
    register(&mut bench, vm, VM, 10);
    let view = bench.view();
    let at_vm = view.registered[&vm];
    assert_eq!(
        (at_vm.address, at_vm.side, at_vm.contacted),
        (at(VM), Side::Border, Some([203, 0, 113, 1].into()))
    );
    let origin = view.origin(Side::Border, at(VM));
    assert_eq!(origin.who, crate::view::Who::Endpoint { block: vm.block(), registered: true });
    let sends = bench.tick(Duration::from_millis(60));
    let key = cluster_key().probe_key(hour());
    let told = sends.iter().filter(|s| s.to == at(SIBLING)).find_map(|s| match read(s, &key).body {
        Body::Announce(announce) => Some(announce.endpoints),
        _ => None,
    });
    assert_eq!(told, Some(vec![vm]));
    // It ends when the block is known no more.
    let mut wire = snapshot();
    wire.endpoints.remove(1);
    bench.state.on_tables(parse(&wire, None), bench.now, NOW, &mut bench.out);
    assert!(bench.view().registered.is_empty());
}

#[test]
fn a_joiner_registers_with_its_provisional_lease() {
    let mut bench = Bench::new(tables());
    register(&mut bench, endpoint(5, 9), VM, 1);
    assert!(bench.view().registered.contains_key(&endpoint(5, 9)));
}

#[test]
fn what_a_sibling_announced_is_known_until_it_dies_or_starts_anew() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    bench.answer(&probes, SIBLING, 0);
    let announce = Announce { replica: StartNumber(7), endpoints: vec![endpoint(2, 0)] };
    let bytes = encode(
        Selector::Gateway { tag: east() },
        1,
        Body::Announce(announce),
        &cluster_key().probe_key(hour()),
    );
    bench.receive(INNER, SIBLING, bytes).unwrap();
    assert_eq!(bench.view().holders[&endpoint(2, 0)].address, at(SIBLING));
    bench.state.on_refused(at(SIBLING), bench.now, NOW, &mut bench.out);
    bench.tick(Duration::from_millis(10));
    assert!(bench.view().holders.is_empty());
}

#[test]
fn a_hint_reaches_those_who_lately_sent_to_the_endpoint() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    bench.answer(&probes, GW1, 0);
    let remote = EndpointId::from_u32(0x91);
    bench.recent.note(west(), remote, Listener::Endpoint(Block::new(1).unwrap()));
    let gone = |tag, endpoint| Body::Gone(Gone { tag, endpoint, only_this_incarnation: true });
    let key = link_key().probe_key(hour());
    let hint = |tag| encode(Selector::Gateway { tag: west() }, 0, gone(tag, remote), &key);
    let sends = bench.receive(BORDER, GW1, hint(west())).unwrap();
    let [told] = sends.as_slice() else { panic!("one is told: {sends:?}") };
    assert_eq!((told.via, told.to), (INNER, at("10.0.1.1:7442")));
    assert_eq!(read(told, &endpoint_key(1)).body, gone(west(), remote));
    assert!(bench.receive(BORDER, GW1, hint(east())).is_err(), "a peer speaks for its own endpoints");
}

#[test]
fn a_crashed_endpoints_callers_are_told_by_icmp() {
    let mut bench = Bench::new(tables());
    let probes = bench.tick(Duration::ZERO);
    bench.answer(&probes, GW1, 0);
    bench.recent.note(east(), endpoint(1, 4), Listener::Peer(west()));
    bench.state.on_refused(at("10.0.1.1:7442"), bench.now, NOW, &mut bench.out);
    let sends = bench.sends();
    let [told] = sends.as_slice() else { panic!("west's live gateway is told: {sends:?}") };
    assert_eq!((told.via, told.to), (BORDER, at(GW1)));
    let expected = Gone { tag: east(), endpoint: endpoint(1, 4), only_this_incarnation: true };
    assert_eq!(read(told, &link_key().probe_key(hour())).body, Body::Gone(expected));
}

#[test]
fn hints_are_bounded_in_rate_and_size() {
    let mut bench = Bench::new(tables());
    let origin = crate::view::Origin { who: crate::view::Who::Peer(west()), hop: Slot::UNKNOWN };
    let gone = crate::decide::Gone { endpoint: endpoint(3, 0), only_this_incarnation: false };
    for _ in 0..1000 {
        let arrival = Arrival::of(BORDER, at(GW1), Vec::new());
        bench.state.on_gone(gone, origin, &arrival, NOW, &mut bench.out);
    }
    let sends = bench.sends();
    assert_eq!(sends.len(), 200);
    assert!(sends.iter().all(|send| send.bytes.len() <= 33));
}

#[test]
fn an_endpoint_that_is_heard_is_not_gone() {
    let mut bench = Bench::new(tables());
    let drained = endpoint(3, 1);
    bench.receive(INNER, "10.0.1.3:7442", encode(of(drained), 5, probe(256), &endpoint_key(3))).unwrap();
    assert!(bench.view().is_heard(drained));
    bench.tick(Duration::from_secs(4));
    assert!(!bench.view().is_heard(drained));
}

#[test]
fn a_balanced_peer_has_four_source_ports_and_a_dead_one_is_replaced() {
    let mut wire = snapshot();
    wire.links[0].gateways.truncate(1);
    wire.links[0].gateways[0].balanced = true;
    wire.siblings.clear();
    let mut bench = Bench::new(parse(&wire, None));
    let opened: Vec<_> = bench.out.iter().filter(|e| matches!(e, Effect::Open(_))).cloned().collect();
    assert_eq!(opened.len(), 4);
    bench.out.clear();
    let probes = bench.tick(Duration::ZERO);
    let ports: std::collections::HashSet<_> = probes.iter().map(|p| p.via).collect();
    assert_eq!(ports.len(), 4);
    bench.answer(&probes, GW1, 0);
    // One port's replica answers no more.
    let (dead, live) = probes.split_at(1);
    let dead_port = dead[0].via;
    assert!(!live.is_empty());
    for _ in 0..40 {
        bench.now += Duration::from_millis(50);
        bench.state.on_tick(bench.now, NOW, &mut bench.out);
        let replaced =
            bench.out.iter().any(|e| matches!(e, Effect::Close(id) if Via::Port(*id) == dead_port));
        let sends = bench.sends();
        let answered: Vec<_> = sends.into_iter().filter(|s| s.via != dead_port).collect();
        bench.answer(&answered, GW1, 0);
        if replaced {
            let paths = bench.view().links[&west()].paths.clone();
            assert_eq!(paths.len(), 4);
            assert!(paths.iter().all(|path| path.via != dead_port));
            return;
        }
    }
    panic!("the dead port was not replaced");
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), class in 0u8..2, kind in 0u8..9) {
        let mut bench = Bench::new(tables());
        let mut bytes = bytes;
        let _ = bench.receive(BORDER, GW1, bytes.clone());
        if let [first, second, t0, t1, t2, ..] = bytes.as_mut_slice() {
            (*first, *second, *t0, *t1, *t2) = (kind, class << 4, 0, 0, 0x0e);
            let _ = bench.receive(INNER, VM, bytes);
        }
    }
}

#[test]
fn a_machine_that_comes_back_registers_by_its_renewal_key_where_the_snapshot_lets_it() {
    let mut wire = snapshot();
    wire.endpoints[1].renewal = 9;
    let vm = endpoint(2, 3);
    let key = cluster_key().renewal_key(vm.block(), 9);
    let mut bench = Bench::new(parse(&wire, None));
    register_by(&mut bench, vm, VM, 10, &key);
    assert!(bench.view().registered.contains_key(&vm));
    let mut bench = Bench::new(tables());
    let ask = Body::Register(Register { replica: StartNumber(42), challenge: 0 });
    assert!(bench.receive(BORDER, VM, encode(of(vm), 10, ask, &key)).is_err());
}
