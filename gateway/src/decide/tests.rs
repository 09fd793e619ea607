//! Every way that a packet can take, and every reason to drop one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;
use tombolo_model::ids::{Block, Handle};
use tombolo_overlay::cid::classify;
use tombolo_overlay::keys::{CidKey, LinkKey};

use super::*;
use crate::fixture::*;
use crate::view::{Holder, PathFlags, Registered};

const BORDER: Via = Via::Side(Side::Border);
const INNER: Via = Via::Side(Side::Inner);

fn path(id: u64, address: &str, standing: Standing) -> PathView {
    PathView {
        id,
        address: at(address),
        via: BORDER,
        standing,
        hop: Slot::UNKNOWN,
        flags: Arc::new(PathFlags::default()),
    }
}

/// Block 1 sends from its address; 10.0.1.1 is a machine of the cluster; both gateways of west answer.
fn view() -> View {
    let tables = tables();
    let origin = |who| Origin { who, hop: Slot::UNKNOWN };
    let block = |n| Block::new(n).unwrap();
    let links = tables.links.values().map(|link| {
        let paths = match link.own {
            true => Vec::new(),
            false => {
                vec![path(1, "10.0.2.11:7440", Standing::Alive), path(2, "10.0.2.12:7440", Standing::Alive)]
            }
        };
        (link.tag, LinkView { link: Arc::clone(link), slot: Slot::UNKNOWN, paths })
    });
    View {
        links: Arc::new(links.collect()),
        registered: Arc::default(),
        heard: Arc::default(),
        holders: Arc::default(),
        known: Arc::new(HashMap::from([
            (at("10.0.1.1:7442"), origin(Who::Endpoint { block: block(1), registered: false })),
            (at("10.0.2.11:7440"), origin(Who::Peer(west()))),
        ])),
        learned: Arc::new(HashMap::from([(
            at("198.51.100.7:40000"),
            origin(Who::Endpoint { block: block(2), registered: true }),
        )])),
        inner_ips: Arc::new(HashSet::from([at("10.0.1.1:0").ip()])),
        ports: Arc::default(),
        tables,
    }
}

fn registered() -> HashMap<EndpointId, Registered> {
    let at = Registered {
        endpoint: endpoint(2, 0),
        address: at("198.51.100.7:40000"),
        side: Side::Border,
        contacted: Some(at("203.0.113.1:0").ip()),
    };
    HashMap::from([(at.endpoint, at)])
}

fn short(cid: &Cid) -> Vec<u8> {
    [&[0x41], cid.as_bytes().as_slice(), &[0; 20]].concat()
}
fn long(first: u8, cid: &Cid) -> Vec<u8> {
    [&[first, 0, 0, 0, 1, 20], cid.as_bytes().as_slice(), &[0; 1200]].concat()
}
fn initial(cid: &Cid) -> Vec<u8> {
    long(0xc3, cid)
}

fn judge(view: &View, side: Side, source: &str, packet: &[u8], now: Now) -> Action {
    let origin = view.origin(side, at(source));
    decide(classify(packet).as_ref(), side, origin, view, &mut KeyCache::default(), now)
}

fn reason(action: Action) -> Option<Reason> {
    match action {
        Action::Drop(reason, _) => Some(reason),
        _ => None,
    }
}
fn target(action: Action) -> Option<(String, Via)> {
    match action {
        Action::Forward(forward) => Some((forward.to.to_string(), forward.via)),
        _ => None,
    }
}

const STRANGER: &str = "192.0.2.1:1";
const OWN: &str = "10.0.1.1:7442";
const PEER: &str = "10.0.2.11:7440";

fn web() -> Cid {
    to_handle(Kind::Service, east(), &link_key(), &binding(300, "west", "shop/web"), 1)
}
fn outward(nonce: u8) -> Cid {
    to_handle(Kind::Service, west(), &link_key(), &binding(400, "east", "shop/cart"), nonce)
}
fn of_west(nonce: u8) -> Cid {
    Cid::mint(Kind::Endpoint, west(), 0x91, [nonce; 7], hour(), &CidKey::from_bytes([9; 16]))
}

#[test]
fn what_is_admitted_goes_where_its_target_is() {
    let mut with_registration = view();
    with_registration.registered = Arc::new(registered());
    let mut with_holder = view();
    let holder = Holder { address: at("10.0.1.12:7441"), hop: Slot::UNKNOWN };
    with_holder.holders = Arc::new(HashMap::from([(endpoint(2, 0), holder)]));
    let join = {
        let key = cluster_key().reserved_key(Handle::JOIN, hour());
        Cid::mint(Kind::Control, east(), Handle::JOIN.value(), [4; 7], hour(), &key)
    };
    let control = to_handle(Kind::Control, east(), &link_key(), &binding(301, "west", "control"), 1);
    let hairpin =
        to_handle(Kind::Service, east(), &LinkKey::from_bytes(SELF_KEY), &binding(303, "east", "shop/vm"), 1);
    let plain = view();
    let cases = [
        (
            "an endpoint with an address",
            &plain,
            Side::Border,
            PEER,
            short(&to_endpoint(endpoint(1, 0), 1)),
            "10.0.1.1:7442",
            INNER,
        ),
        (
            "a live incarnation",
            &plain,
            Side::Border,
            PEER,
            short(&to_endpoint(endpoint(4, 3), 1)),
            "10.0.1.4:7442",
            INNER,
        ),
        (
            "a registered endpoint",
            &with_registration,
            Side::Border,
            PEER,
            short(&to_endpoint(endpoint(2, 0), 1)),
            "198.51.100.7:40000",
            BORDER,
        ),
        (
            "one that a sibling has",
            &with_holder,
            Side::Border,
            PEER,
            short(&to_endpoint(endpoint(2, 0), 1)),
            "10.0.1.12:7441",
            INNER,
        ),
        ("a service", &plain, Side::Border, STRANGER, initial(&web()), "10.0.1.1:7442", INNER),
        ("the federators", &plain, Side::Border, PEER, initial(&control), "10.0.1.1:7442", INNER),
        ("a joiner", &plain, Side::Border, STRANGER, initial(&join), "10.0.1.1:7442", INNER),
        (
            "back into the own cluster",
            &with_registration,
            Side::Inner,
            OWN,
            initial(&hairpin),
            "198.51.100.7:40000",
            BORDER,
        ),
    ];
    for (name, view, side, source, packet, to, via) in cases {
        let action = judge(view, side, source, &packet, NOW);
        assert_eq!(target(action), Some((to.to_owned(), via)), "{name}: {action:?}");
    }
}

#[test]
fn an_endpoint_is_reached_where_it_is_and_only_one_that_nobody_has_where_another_of_its_machine_is() {
    // The first is registered at a sibling, a copy of its machine, with another incarnation, here.
    let mut view = view();
    view.registered = Arc::new(registered());
    let holder = Holder { address: at("10.0.1.12:7441"), hop: Slot::UNKNOWN };
    view.holders = Arc::new(HashMap::from([(endpoint(2, 1), holder)]));
    let to = |incarnation, handed_over| {
        let mut packet = short(&to_endpoint(endpoint(2, incarnation), 1));
        tombolo_overlay::cid::set_handed_over(&mut packet, handed_over);
        target(judge(&view, Side::Inner, OWN, &packet, NOW)).map(|(address, _)| address)
    };
    assert_eq!(to(1, false).as_deref(), Some("10.0.1.12:7441"));
    assert_eq!(to(0, false).as_deref(), Some("198.51.100.7:40000"));
    assert_eq!(to(2, false).as_deref(), Some("198.51.100.7:40000"), "it says what became of the second");
    assert_eq!(to(1, true).as_deref(), Some("198.51.100.7:40000"), "not back and forth");
}

#[test]
fn answers_leave_from_the_address_that_a_registered_endpoint_contacted() {
    let mut view = view();
    view.registered = Arc::new(registered());
    let action = judge(&view, Side::Border, PEER, &short(&to_endpoint(endpoint(2, 0), 1)), NOW);
    let Action::Forward(forward) = action else { panic!("{action:?}") };
    assert_eq!((forward.from, forward.handed_over), (Some(at("203.0.113.1:0").ip()), Some(false)));
}

#[test]
fn every_reason_to_drop_is_reached() {
    let plain = view();
    let mut no_paths = view();
    let mut links = (*no_paths.links).clone();
    links.get_mut(&west()).unwrap().paths = vec![path(1, PEER, Standing::Unproven)];
    no_paths.links = Arc::new(links);
    let forged = |cid: Cid| {
        let mut bytes = *cid.as_bytes();
        bytes[19] ^= 1;
        Cid::from_bytes(&bytes).unwrap()
    };
    let other_key = CidKey::from_bytes([0; 16]);
    let unknown = |kind, tag, target| Cid::mint(kind, tag, target, [1; 7], hour(), &other_key);
    let expired = to_endpoint(endpoint(5, 0), 1);
    let idle = to_handle(Kind::Service, east(), &link_key(), &binding(302, "west", "shop/idle"), 1);
    let north = ClusterTag::new(0x77).unwrap();
    let later = Now { unix: UNIX + Duration::from_secs(901), ..NOW };
    let handed = |cid: &Cid| {
        let mut packet = short(cid);
        tombolo_overlay::cid::set_handed_over(&mut packet, true);
        packet
    };
    let mut with_holder = view();
    let holder = Holder { address: at("10.0.1.12:7441"), hop: Slot::UNKNOWN };
    with_holder.holders = Arc::new(HashMap::from([(endpoint(2, 0), holder)]));
    let wrong_class = to_handle(Kind::Control, east(), &link_key(), &binding(300, "west", "shop/web"), 1);
    let (border, inner) = (Side::Border, Side::Inner);
    let cases = [
        (Reason::Malformed, &plain, border, PEER, vec![0x41; 5], NOW),
        (Reason::Kind, &plain, border, PEER, short(&unknown(Kind::Join, east(), 5)), NOW),
        (Reason::Kind, &plain, inner, OWN, short(&unknown(Kind::Join, west(), 5)), NOW),
        (Reason::NotInitial, &plain, border, PEER, short(&web()), NOW),
        (Reason::NotInitial, &plain, border, PEER, long(0xe3, &web()), NOW),
        (Reason::NotInitial, &plain, inner, OWN, short(&outward(1)), NOW),
        (Reason::UnknownEndpoint, &plain, border, PEER, short(&unknown(Kind::Endpoint, east(), 0x990)), NOW),
        (Reason::UnknownEndpoint, &plain, border, PEER, short(&expired), later),
        (Reason::UnknownHandle, &plain, border, PEER, initial(&unknown(Kind::Service, east(), 999)), NOW),
        (Reason::UnknownHandle, &plain, border, PEER, initial(&wrong_class), NOW),
        (Reason::UnknownHandle, &plain, inner, OWN, initial(&unknown(Kind::Service, west(), 999)), NOW),
        (Reason::Mac, &plain, border, PEER, short(&forged(to_endpoint(endpoint(1, 0), 1))), NOW),
        (Reason::Mac, &plain, border, PEER, initial(&forged(web())), NOW),
        (Reason::Mac, &plain, inner, OWN, initial(&forged(outward(1))), NOW),
        (Reason::NoEndpoint, &plain, border, PEER, initial(&idle), NOW),
        (Reason::Unregistered, &plain, border, PEER, short(&to_endpoint(endpoint(2, 0), 1)), NOW),
        (Reason::Unregistered, &plain, border, PEER, short(&to_endpoint(endpoint(5, 0), 1)), NOW),
        (Reason::Unregistered, &with_holder, inner, OWN, handed(&to_endpoint(endpoint(2, 0), 1)), NOW),
        (Reason::NoLink, &plain, inner, OWN, short(&unknown(Kind::Endpoint, north, 1)), NOW),
        (Reason::Source, &plain, border, STRANGER, short(&of_west(1)), NOW),
        (Reason::Source, &plain, border, OWN, short(&of_west(1)), NOW),
        (Reason::Source, &plain, border, PEER, short(&of_west(1)), NOW),
        (Reason::Source, &plain, inner, STRANGER, short(&of_west(1)), NOW),
        (Reason::NoPath, &no_paths, inner, OWN, short(&of_west(1)), NOW),
    ];
    let mut reached = HashSet::new();
    for (index, (expected, view, side, source, packet, now)) in cases.into_iter().enumerate() {
        let action = judge(view, side, source, &packet, now);
        assert_eq!(reason(action), Some(expected), "case {index}: {action:?}");
        reached.insert(expected);
    }
    // Reached elsewhere: gone and rate_limited below, the rest where packets are sent and control datagrams are read.
    assert_eq!(reached.len(), 11);
}

#[test]
fn a_gone_endpoint_is_told_unless_it_is_heard() {
    let mut view = view();
    let whole = endpoint(3, 1);
    let old = endpoint(4, 2);
    let gone = |view: &View, e| judge(view, Side::Border, PEER, &short(&to_endpoint(e, 1)), NOW);
    let hint = |endpoint, only_this_incarnation| {
        Action::Gone(Gone { endpoint, only_this_incarnation }, Slot::UNKNOWN)
    };
    assert_eq!(gone(&view, whole), hint(whole, false));
    assert_eq!(gone(&view, old), hint(old, true));
    view.heard = Arc::new(HashMap::from([(whole.block(), whole)]));
    assert_eq!(target(gone(&view, whole)).unwrap().0, "10.0.1.3:7442");
    assert_eq!(
        gone(&view, endpoint(3, 0)),
        hint(endpoint(3, 0), false),
        "only the incarnation that is heard"
    );
}

#[test]
fn first_packets_take_tokens_and_the_rest_of_a_connection_does_not() {
    let view = view();
    let mut keys = KeyCache::default();
    let mut admitted = |packet: &[u8], now| {
        let origin = view.origin(Side::Border, at(PEER));
        decide(classify(packet).as_ref(), Side::Border, origin, &view, &mut keys, now)
    };
    let results: Vec<_> = (0..8).map(|_| reason(admitted(&initial(&web()), NOW))).collect();
    assert_eq!(results.iter().filter(|r| r.is_none()).count(), 5);
    assert_eq!(results.last(), Some(&Some(Reason::RateLimited)));
    let later = Now { since_start: NOW.since_start + Duration::from_millis(200), ..NOW };
    assert_eq!(reason(admitted(&initial(&web()), later)), None, "one more after a fifth of a second");
    for _ in 0..100 {
        assert_eq!(reason(admitted(&short(&to_endpoint(endpoint(1, 0), 1)), NOW)), None);
    }
}

#[test]
fn a_retransmission_reaches_the_same_endpoint_and_callers_spread() {
    let mut wire = snapshot();
    wire.handles[0] = inbound(
        300,
        "west",
        "shop/web",
        tombolo_proto::v1::HandleClass::Service,
        &[endpoint(1, 0), endpoint(4, 3)],
    );
    wire.handles[0].initials_per_second = 100_000;
    let view = View { tables: parse(&wire, None), ..view() };
    let mut seen = HashSet::new();
    for nonce in 0..64 {
        let cid = to_handle(Kind::Service, east(), &link_key(), &binding(300, "west", "shop/web"), nonce);
        let first = target(judge(&view, Side::Border, PEER, &initial(&cid), NOW)).unwrap();
        assert_eq!(target(judge(&view, Side::Border, PEER, &initial(&cid), NOW)).unwrap(), first);
        seen.insert(first.0);
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn outward_packets_spread_over_live_paths_and_leave_dead_ones() {
    let mut view = view();
    let exits = |view: &View| -> HashSet<String> {
        let exit = |nonce| target(judge(view, Side::Inner, OWN, &short(&of_west(nonce)), NOW)).unwrap().0;
        (0..64).map(exit).collect()
    };
    assert_eq!(exits(&view).len(), 2);
    view.links[&west()].paths[0].flags.refused.store(true, Relaxed);
    assert_eq!(exits(&view), HashSet::from(["10.0.2.12:7440".to_owned()]), "an ICMP error counts at once");
    let mut links = (*view.links).clone();
    links.get_mut(&west()).unwrap().paths = vec![
        path(1, "10.0.2.11:7440", Standing::Dead),
        path(2, "10.0.2.12:7440", Standing::Reserve),
        path(3, "10.0.2.13:7440", Standing::Unproven),
    ];
    view.links = Arc::new(links.clone());
    assert_eq!(
        exits(&view),
        HashSet::from(["10.0.2.12:7440".to_owned()]),
        "a draining one serves while there is no better"
    );
    links.get_mut(&west()).unwrap().paths.remove(1);
    view.links = Arc::new(links);
    assert_eq!(
        exits(&view),
        HashSet::from(["10.0.2.11:7440".to_owned()]),
        "a dead one may just be coming back"
    );
}

#[test]
fn a_registered_endpoint_outside_may_send_outward_by_the_border() {
    let view = view();
    assert!(target(judge(&view, Side::Border, "198.51.100.7:40000", &initial(&outward(1)), NOW)).is_some());
    assert!(
        target(judge(&view, Side::Inner, "10.0.1.1:50123", &short(&of_west(1)), NOW)).is_some(),
        "another port of a known machine"
    );
}

#[test]
fn what_was_known_before_the_store_was_lost_is_still_admitted() {
    let mut wire = snapshot();
    let mut anew = snapshot();
    anew.epoch = 2;
    anew.cluster_key = vec![9; 32];
    anew.handles.clear();
    anew.links.retain(|link| link.self_);
    anew.endpoints.truncate(1);
    wire.revision = 2;
    let old = parse(&wire, None);
    let view = View { tables: parse(&anew, Some(&old)), ..view() };
    for packet in [short(&to_endpoint(endpoint(4, 3), 1)), initial(&web())] {
        assert!(target(judge(&view, Side::Border, PEER, &packet, NOW)).is_some());
    }
    assert!(target(judge(&view, Side::Inner, OWN, &initial(&outward(1)), NOW)).is_some());
    let after = Now { unix: UNIX + Duration::from_secs(25 * 3600), ..NOW };
    assert_eq!(
        reason(judge(&view, Side::Border, PEER, &initial(&web()), after)),
        Some(Reason::UnknownHandle)
    );
}

#[test]
fn unknown_targets_cost_no_derivation() {
    let view = view();
    let mut keys = KeyCache::default();
    for target in 0..1000u32 {
        let cid =
            Cid::mint(Kind::Endpoint, east(), 0x1000 + target, [1; 7], hour(), &CidKey::from_bytes([0; 16]));
        let origin = view.origin(Side::Border, at(STRANGER));
        decide(classify(&short(&cid)).as_ref(), Side::Border, origin, &view, &mut keys, NOW);
    }
    assert!(keys.is_empty());
}

#[test]
fn a_million_connection_ids_leave_nothing_behind() {
    let view = view();
    let mut keys = KeyCache::default();
    let key = endpoint_key(1);
    let origin = view.origin(Side::Border, at(PEER));
    for n in 0..1_000_000u64 {
        let mut nonce = [0; 7];
        nonce.copy_from_slice(&n.to_be_bytes()[1..]);
        let dcid = Cid::mint(Kind::Endpoint, east(), endpoint(1, 0).value(), nonce, hour(), &key);
        let action = decide(Some(&Packet::Short { dcid }), Side::Border, origin, &view, &mut keys, NOW);
        assert!(matches!(action, Action::Forward(_)));
    }
    assert_eq!(keys.len(), 1);
}

#[test]
fn control_datagrams_are_passed_on_from_either_side() {
    for side in [Side::Border, Side::Inner] {
        assert_eq!(judge(&view(), side, STRANGER, &[1; 80], NOW), Action::Control);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_decided_without_panic(packet in proptest::collection::vec(any::<u8>(), 0..120), inner: bool, hour: u32) {
        let side = if inner { Side::Inner } else { Side::Border };
        let now = Now { unix: Duration::from_secs(u64::from(hour)), ..NOW };
        for source in [STRANGER, OWN, PEER] {
            judge(&view(), side, source, &packet, now);
        }
    }

    #[test]
    fn any_connection_id_of_ours_is_decided_without_panic(kind in 0u8..8, tag in 0u32..32, target: u32, nonce: [u8; 7], first: u8) {
        let mut id = [0u8; 20];
        id[0] = kind << 3;
        id[1..4].copy_from_slice(&tag.to_be_bytes()[1..]);
        id[4..8].copy_from_slice(&target.to_be_bytes());
        id[8..15].copy_from_slice(&nonce);
        let packet = [&[first | 0xc0, 0, 0, 0, 1, 20], id.as_slice(), &[0, 0]].concat();
        judge(&view(), Side::Inner, OWN, &packet, NOW);
    }
}

/// Block 2, a machine, may come back by a key with the salt 9; so says the snapshot.
fn with_renewal() -> View {
    let mut wire = snapshot();
    wire.endpoints[1].renewal = 9;
    wire.handles.push(inbound(
        3,
        "east",
        "renewal",
        tombolo_proto::v1::HandleClass::Renewal,
        &[endpoint(1, 0)],
    ));
    let mut view = view();
    view.tables = parse(&wire, None);
    view.registered = Arc::new(registered());
    view
}

fn renewal_key(salt: u32) -> CidKey {
    cluster_key().renewal_key(Block::new(2).unwrap(), salt)
}

/// A first packet to the renewal handle, by the holder of a block.
fn comes_back(block: u32, key: &CidKey, handle: u32) -> Vec<u8> {
    let nonce = tombolo_overlay::renewal_nonce(Block::new(block).unwrap(), [1, 2, 3]);
    initial(&Cid::mint(Kind::Control, east(), handle, nonce, hour(), key))
}

#[test]
fn who_comes_back_reaches_the_federator_and_is_answered_by_its_renewal_key_alone() {
    let view = with_renewal();
    let judged = |packet: &[u8]| judge(&view, Side::Border, STRANGER, packet, NOW);
    let federator = Some((OWN.to_owned(), INNER));
    assert_eq!(target(judged(&comes_back(2, &renewal_key(9), 3))), federator);
    let answered = |key: &CidKey| {
        judged(&short(&Cid::mint(Kind::Endpoint, east(), endpoint(2, 0).value(), [4; 7], hour(), key)))
    };
    let machine = Some(("198.51.100.7:40000".to_owned(), BORDER));
    assert_eq!(target(answered(&renewal_key(9))), machine);
    assert_eq!(target(answered(&endpoint_key(2))), machine, "its hourly keys hold as ever");
    for (packet, expected, why) in [
        (comes_back(2, &renewal_key(8), 3), Reason::Mac, "of another holder of the block"),
        (comes_back(2, &endpoint_key(2), 3), Reason::Mac, "an hourly key leads elsewhere"),
        (comes_back(1, &renewal_key(9), 3), Reason::Mac, "block 1 may not come back"),
        (comes_back(77, &renewal_key(9), 3), Reason::UnknownEndpoint, "nobody's block"),
        (comes_back(2, &renewal_key(9), 2), Reason::Mac, "the join handle is keyed by the cluster"),
        (comes_back(2, &renewal_key(9), 301), Reason::Mac, "and the others by their links"),
    ] {
        assert_eq!(reason(judged(&packet)), Some(expected), "{why}");
    }
    // Revoked, or joined anew: the snapshot says so.
    let mut ended = with_renewal();
    let mut wire = snapshot();
    wire.handles.push(inbound(
        3,
        "east",
        "renewal",
        tombolo_proto::v1::HandleClass::Renewal,
        &[endpoint(1, 0)],
    ));
    ended.tables = parse(&wire, None);
    let packet = comes_back(2, &renewal_key(9), 3);
    assert_eq!(reason(judge(&ended, Side::Border, STRANGER, &packet, NOW)), Some(Reason::Mac));
}

#[test]
fn coming_back_is_rate_limited() {
    let view = with_renewal();
    let packet = comes_back(2, &renewal_key(9), 3);
    let judged = (0..6).map(|_| judge(&view, Side::Border, STRANGER, &packet, NOW));
    let limited = judged.filter(|action| reason(*action) == Some(Reason::RateLimited)).count();
    assert_eq!(limited, 1, "five a second");
}
