//! Client and table against each other, in virtual time.

use std::net::SocketAddr;
use std::time::Instant;

use tombolo_model::ids::{Block, EndpointId, Incarnation};

use super::*;
use crate::datagram::{Register, Registered, StartNumber};
use crate::keys::CidKey;

const START: StartNumber = StartNumber(77);

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], port))
}
fn endpoint(block: u32) -> EndpointId {
    Block::new(block).unwrap().endpoint(Incarnation::new(0).unwrap())
}
fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}
fn table(now: Instant, capacity: usize) -> Registrations {
    Registrations::new(now, START, CidKey::from_bytes([5; 16]), capacity)
}

/// Delivers a REGISTER and its answer; `false` when refused.
fn deliver(
    client: &mut ClientState,
    server: &mut Registrations,
    now: Instant,
    from: SocketAddr,
    sent: (u64, Register),
) -> bool {
    match server.on_register(now, from, Side::Border, endpoint(1), sent.0, &sent.1) {
        Verdict::Accepted { held, .. } => {
            client.on_registered(now, sent.0, &Registered { replica: START, observed: from, held });
            true
        }
        Verdict::Challenge(challenge) => {
            client.on_challenge(now, sent.0, &challenge);
            true
        }
        Verdict::Refused(_) => false,
    }
}

/// Registers `client` from `from`, as far as it wants to; returns how many REGISTERs that took.
fn settle(client: &mut ClientState, server: &mut Registrations, now: Instant, from: SocketAddr) -> u32 {
    let mut sent = 0;
    while let Some(register) = client.on_tick(now) {
        sent += 1;
        assert!(sent < 10 && deliver(client, server, now, from, register));
    }
    sent
}

#[test]
fn an_endpoint_registers_by_challenge_once_and_then_every_15_seconds() {
    let start = Instant::now();
    let (mut client, mut server) = (ClientState::new(start, 1000), table(start, 8));
    assert!(client.on_tick(start).is_none(), "the replica's start number is not known yet");
    assert!(client.on_probe_ack(start, START, address(1)));
    assert_eq!(settle(&mut client, &mut server, start, address(1)), 2);
    assert!(client.registered(start));
    let registration = server.get(endpoint(1), start).unwrap();
    assert_eq!((registration.address, registration.side), (address(1), Side::Border));
    assert!(server.is_source(address(1)) && !server.is_source(address(2)));
    let mut sent = 0;
    for second in 1..=120 {
        let now = start + seconds(second);
        assert!(!client.on_probe_ack(now, START, address(1)));
        sent += settle(&mut client, &mut server, now, address(1));
        server.on_tick(now);
        assert!(server.get(endpoint(1), now).is_some() && client.registered(now));
    }
    assert_eq!(sent, 8);
}

#[test]
fn a_changed_address_or_start_number_registers_again_at_once() {
    let start = Instant::now();
    let (mut client, mut server) = (ClientState::new(start, 0), table(start, 8));
    client.on_probe_ack(start, START, address(1));
    settle(&mut client, &mut server, start, address(1));
    let now = start + seconds(1);
    assert!(client.on_probe_ack(now, START, address(2)));
    assert_eq!(settle(&mut client, &mut server, now, address(2)), 2);
    assert_eq!(server.get(endpoint(1), now).unwrap().address, address(2));
    assert!(!server.is_source(address(1)));
    // The replica restarts with an empty table and another number.
    assert!(client.on_probe_ack(now, StartNumber(78), address(2)));
    assert!(!client.registered(now));
    assert_eq!(client.on_tick(now).unwrap().1, Register { replica: StartNumber(78), challenge: 0 });
}

#[test]
fn an_unanswered_register_is_retried_with_growing_gaps() {
    let start = Instant::now();
    let mut client = ClientState::new(start, 0);
    client.on_probe_ack(start, START, address(1));
    let mut counters = Vec::new();
    for ms in (0..10_000).step_by(10) {
        counters.extend(client.on_tick(start + Duration::from_millis(ms)).map(|(counter, _)| counter));
    }
    assert!((4..=6).contains(&counters.len()) && counters.is_sorted(), "{counters:?}");
}

#[test]
fn an_endless_challenge_does_not_make_a_storm() {
    let start = Instant::now();
    let mut client = ClientState::new(start, 0);
    client.on_probe_ack(start, START, address(1));
    let mut sent = 0;
    for ms in 0..4000 {
        let now = start + Duration::from_millis(ms);
        if let Some((counter, _)) = client.on_tick(now) {
            sent += 1;
            client.on_challenge(now, counter, &crate::datagram::Challenge { replica: START, challenge: ms });
        }
    }
    assert!(sent <= 12, "{sent}");
}

#[test]
fn replayed_and_foreign_registers_are_refused_and_counted() {
    let start = Instant::now();
    let (mut client, mut server) = (ClientState::new(start, 10), table(start, 8));
    client.on_probe_ack(start, START, address(1));
    settle(&mut client, &mut server, start, address(1));
    let held = server.get(endpoint(1), start).copied().unwrap();
    let mut ask = |from, counter, replica, challenge| {
        server.on_register(start, from, Side::Inner, endpoint(1), counter, &Register { replica, challenge })
    };
    assert_eq!(ask(address(1), 12, START, 0), Verdict::Refused(Refusal::Replayed));
    assert_eq!(ask(address(1), 11, START, 0), Verdict::Refused(Refusal::Replayed));
    assert_eq!(ask(address(1), 99, StartNumber(3), 0), Verdict::Refused(Refusal::WrongReplica));
    // A captured REGISTER from a spoofed address: neither without a token nor with another address's.
    let Verdict::Challenge(first) = ask(address(9), 99, START, 0) else {
        panic!("a new address is challenged")
    };
    assert!(matches!(ask(address(8), 100, START, first.challenge), Verdict::Challenge(_)));
    assert_eq!(server.get(endpoint(1), start).copied(), Some(held));
    assert_eq!(server.refusals(), Refusals { wrong_replica: 1, replayed: 2, full: 0 });
}

#[test]
fn a_token_ends_and_is_bound_to_its_endpoint() {
    let start = Instant::now();
    let mut server = table(start, 8);
    let mut ask = |now, block, counter, challenge| {
        let register = Register { replica: START, challenge };
        server.on_register(now, address(1), Side::Border, endpoint(block), counter, &register)
    };
    let Verdict::Challenge(token) = ask(start, 1, 1, 0) else { panic!("challenged") };
    assert!(matches!(ask(start, 2, 2, token.challenge), Verdict::Challenge(_)));
    assert!(matches!(ask(start + seconds(21), 1, 3, token.challenge), Verdict::Challenge(_)));
    assert!(matches!(
        ask(start + seconds(19), 1, 3, token.challenge),
        Verdict::Accepted { changed: true, .. }
    ));
}

#[test]
fn the_table_is_bounded_and_makes_room_when_registrations_end() {
    let start = Instant::now();
    let mut server = table(start, 100);
    let enter = |server: &mut Registrations, now, block: u32| {
        let from = address(1000 + block as u16);
        let mut ask = |counter, challenge| {
            let register = Register { replica: START, challenge };
            server.on_register(now, from, Side::Inner, endpoint(block), counter, &register)
        };
        let Verdict::Challenge(token) = ask(1, 0) else { panic!("challenged") };
        ask(2, token.challenge)
    };
    for block in 0..100 {
        assert!(matches!(enter(&mut server, start, block), Verdict::Accepted { .. }));
    }
    assert_eq!(enter(&mut server, start, 100), Verdict::Refused(Refusal::Full));
    assert_eq!((server.len(), server.refusals().full), (100, 1));
    assert!(!server.is_source(address(1100)));
    let later = start + HELD;
    assert!(server.get(endpoint(5), later).is_none());
    assert!(matches!(enter(&mut server, later, 100), Verdict::Accepted { .. }));
    assert_eq!(server.len(), 1);
    assert!(!server.is_source(address(1005)));
}

#[test]
fn siblings_learn_who_holds_a_registration_and_forget_it() {
    let start = Instant::now();
    let (mut client, mut server) = (ClientState::new(start, 0), table(start, 8));
    let mut siblings = Siblings::new(2);
    client.on_probe_ack(start, START, address(1));
    assert!(server.on_tick(start).is_empty());
    settle(&mut client, &mut server, start, address(1));
    let now = start + seconds(1);
    let announced = server.on_tick(now);
    assert_eq!(announced.len(), 1);
    let (sequence, announce) = announced.into_iter().next().unwrap();
    assert!(
        !siblings.on_announce(now, address(7440), Some(StartNumber(1)), sequence, &announce),
        "an earlier life"
    );
    assert!(siblings.on_announce(now, address(7440), Some(START), sequence, &announce));
    assert!(!siblings.on_announce(now, address(7440), Some(START), sequence, &announce), "a replay");
    assert_eq!(siblings.get(endpoint(1), now), Some(address(7440)));
    assert_eq!(siblings.get(endpoint(1), now + HELD), None);
    assert!(server.on_tick(now + seconds(1)).is_empty());
    assert_eq!(server.on_tick(now + seconds(15)).len(), 1);
    // bounded
    let many = crate::datagram::Announce { replica: START, endpoints: (0..5).map(endpoint).collect() };
    assert!(siblings.on_announce(now, address(7440), None, sequence + 1, &many));
    assert_eq!((siblings.len(), siblings.dropped()), (2, 3));
    siblings.forget(address(7440));
    assert!(siblings.is_empty() && siblings.get(endpoint(1), now).is_none());
}

#[test]
fn a_copy_of_a_machine_takes_nothing_from_it_and_a_block_is_bounded() {
    let start = Instant::now();
    let mut server = table(start, 8);
    let of = |incarnation: u8| Block::new(1).unwrap().endpoint(Incarnation::new(incarnation).unwrap());
    let mut register = |incarnation: u8, port: u16, counter: u64, after: u64| {
        let now = start + seconds(after);
        let ask = |server: &mut Registrations, counter, challenge| {
            server.on_register(
                now,
                address(port),
                Side::Border,
                of(incarnation),
                counter,
                &Register { replica: START, challenge },
            )
        };
        let Verdict::Challenge(token) = ask(&mut server, counter, 0) else { panic!("challenged first") };
        assert!(matches!(ask(&mut server, counter + 1, token.challenge), Verdict::Accepted { .. }));
    };
    // The copy has started later, so its counters are higher.
    register(0, 1, 10, 0);
    register(1, 2, 1000, 1);
    register(2, 3, 2000, 2);
    register(3, 4, 3000, 3);
    let later = start + seconds(4);
    assert_eq!(server.len(), 3, "of one block");
    assert!(server.get(of(0), later).is_none() && server.get(of(1), later).is_some());
    assert_eq!(server.newest(Block::new(1).unwrap()).unwrap().address, address(4));
    // The one before is still itself: its own counter goes on.
    let renewed = server.on_register(
        later,
        address(2),
        Side::Border,
        of(1),
        1002,
        &Register { replica: START, challenge: 0 },
    );
    assert!(matches!(renewed, Verdict::Accepted { changed: false, .. }), "{renewed:?}");
    assert!(server.remove(Block::new(1).unwrap()) && server.is_empty() && !server.is_source(address(2)));
}
