//! Two endpoints of two clusters and a gateway's part between them, in virtual time.

use super::*;
use crate::datagram;
use crate::keys::{AcrossTarget, Hour, LinkKey};

const UNIX: Duration = Duration::from_secs(494_222 * 3600 + 1800);

fn east() -> ClusterTag {
    ClusterTag::new(1).unwrap()
}
fn west() -> ClusterTag {
    ClusterTag::new(2).unwrap()
}
fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 7442))
}
fn link_key() -> LinkKey {
    LinkKey::from_bytes([7; 32])
}
fn target_ring(tag: ClusterTag, target: AcrossTarget) -> KeyRing {
    KeyRing::derive_now(UNIX, |hour| link_key().across_key(tag, target, hour))
}

/// Of endpoint `own` towards cluster `peer`, in which it calls `called`.
fn across(own: (ClusterTag, EndpointId), peer: ClusterTag, called: &[(EndpointId, SocketAddr)]) -> Across {
    let keys = |target| {
        let ring = target_ring(peer, target).map(|key| key.of_prober(own.0, own.1.block()));
        Arc::new(ring)
    };
    let endpoints = called.iter().map(|(endpoint, address)| {
        let keys = keys(AcrossTarget::Endpoint(endpoint.block()));
        (endpoint.block(), FlatEndpoint { address: *address, keys })
    });
    Across {
        cluster: "peer".into(),
        gateways: vec![GatewayHop::at(address(100))],
        gateway_keys: keys(AcrossTarget::Gateways),
        flat: Some(Flat {
            endpoints: endpoints.collect(),
            services: HashMap::new(),
            caller_keys: target_ring(own.0, AcrossTarget::Endpoint(own.1.block())),
            ranges: AllowedRanges { ranges: vec!["10.0.0.0/24".parse().unwrap()], loopback: false },
        }),
    }
}

struct Side {
    tag: ClusterTag,
    id: EndpointId,
    at: SocketAddr,
    paths: Paths,
}

impl Side {
    fn new(tag: ClusterTag, id: u32, at: SocketAddr) -> Self {
        let id = EndpointId::from_u32(id);
        Self { tag, id, at, paths: Paths::new(tag, id) }
    }
    fn endpoint(&self, peer: ClusterTag, block: Block) -> Option<(SocketAddr, bool)> {
        let view = self.paths.view("");
        let path = view.get(&peer)?.endpoints.get(&block)?;
        Some((path.address, path.alive))
    }
}

type Sent = Vec<(SocketAddr, SocketAddr, Vec<u8>)>;

fn deliver(
    side: &mut Side,
    from: SocketAddr,
    bytes: &[u8],
    at: Moment,
    out: &mut Sent,
) -> Result<Option<Gone>, DecodeError> {
    let unverified = datagram::decode(bytes)?;
    let own = side.at;
    let mut send = |to, packet: &[u8]| {
        out.push((own, to, packet.to_vec()));
        Ok(())
    };
    let received = Received { unverified: &unverified, source: from, bytes: bytes.len() };
    side.paths.on_datagram(received, at, &mut send)
}

/// Runs both for `seconds`; what is sent to anybody else is lost.
fn run(a: &mut Side, b: &mut Side, start: Instant, seconds: u64) -> Instant {
    let end = start + Duration::from_secs(seconds);
    let mut now = start;
    while now < end {
        let at = Moment { now, unix: UNIX };
        let mut sent = Sent::new();
        for side in [&mut *a, &mut *b] {
            let own = side.at;
            side.paths.tick(at, &mut |to, packet: &[u8]| {
                sent.push((own, to, packet.to_vec()));
                Ok(())
            });
        }
        while let Some((from, to, bytes)) = sent.pop() {
            for side in [&mut *a, &mut *b] {
                if side.at == to {
                    // Who has moved gets answers to what was asked at its old address: refused, and nothing comes of it.
                    let _ = deliver(side, from, &bytes, at, &mut sent);
                }
            }
        }
        now += Duration::from_millis(50);
    }
    now
}

fn pair(now: Instant) -> (Side, Side) {
    let mut caller = Side::new(east(), 5 << 4, address(1));
    let mut callee = Side::new(west(), 9 << 4, address(2));
    let to_west = across((caller.tag, caller.id), west(), &[(callee.id, callee.at)]);
    let to_east = across((callee.tag, callee.id), east(), &[]);
    caller.paths.adopt(&[(west(), to_west)].into(), now);
    callee.paths.adopt(&[(east(), to_east)].into(), now);
    (caller, callee)
}

#[test]
fn a_caller_and_a_callee_find_each_other_and_fall_back_when_the_path_dies() {
    let start = Instant::now();
    let (mut caller, mut callee) = pair(start);
    let now = run(&mut caller, &mut callee, start, 1);
    assert_eq!(caller.endpoint(west(), callee.id.block()), Some((callee.at, true)));
    assert_eq!(callee.endpoint(east(), caller.id.block()), Some((caller.at, true)), "learned by its probes");
    // The caller moves (another node address): the callee follows once it has been answered there.
    caller.at = address(3);
    let now = run(&mut caller, &mut callee, now, 2);
    assert_eq!(callee.endpoint(east(), caller.id.block()), Some((address(3), true)));
    // Nothing passes any more.
    callee.at = address(77);
    run(&mut caller, &mut callee, now, 2);
    assert_eq!(caller.endpoint(west(), callee.id.block()), Some((address(2), false)));
    let mut gone = now;
    for _ in 0..300 {
        gone += Duration::from_millis(50);
        callee.paths.tick(Moment { now: gone, unix: UNIX }, &mut |_, _| Ok(()));
    }
    assert_eq!(callee.endpoint(east(), caller.id.block()), None, "a caller that is silent is forgotten");
}

#[test]
fn what_is_forged_replayed_or_out_of_range_moves_nobody() {
    let start = Instant::now();
    let (mut caller, mut callee) = pair(start);
    let now = run(&mut caller, &mut callee, start, 1);
    let at = Moment { now, unix: UNIX };
    let hour = Hour::at(UNIX);
    let selector = Selector::Across { tag: east(), endpoint: caller.id };
    let probe =
        |sequence| Datagram { selector, sequence, body: Body::Probe(Probe { sent_micros: 1, bytes: 256 }) };
    let target = AcrossTarget::Endpoint(callee.id.block());
    let key_of = |prober: u32| {
        link_key().across_key(west(), target, hour).of_prober(east(), Block::new(prober).unwrap())
    };
    let mut out = Sent::new();
    // Another endpoint of the same cluster claims to be the caller.
    let forged = probe(u64::MAX - 1).encode(hour, &key_of(6));
    assert_eq!(deliver(&mut callee, address(66), &forged, at, &mut out), Err(DecodeError::Mac));
    // An old one from elsewhere is answered, which costs nothing, and moves nothing.
    let replayed = probe(0).encode(hour, &key_of(5));
    assert_eq!(deliver(&mut callee, address(66), &replayed, at, &mut out), Ok(None));
    let (_, to, bytes) = out.pop().unwrap();
    assert!(to == address(66) && bytes.len() <= replayed.len(), "no amplification");
    // One of an earlier start, recorded then.
    let earlier = Selector::Across { tag: east(), endpoint: EndpointId::from_u32((5 << 4) + 1) };
    let earlier = Datagram { selector: earlier, ..probe(u64::MAX - 1) }.encode(hour, &key_of(5));
    assert_eq!(deliver(&mut callee, address(66), &earlier, at, &mut out), Ok(None));
    assert_eq!(callee.endpoint(east(), caller.id.block()), Some((caller.at, true)));
    out.clear();
    // From outside the ranges of the link.
    let fresh = probe(u64::MAX - 1).encode(hour, &key_of(5));
    let outside = SocketAddr::from(([192, 0, 2, 1], 7442));
    assert_eq!(deliver(&mut callee, outside, &fresh, at, &mut out), Err(DecodeError::Field("source")));
    assert_eq!(callee.endpoint(east(), caller.id.block()), Some((caller.at, true)));
    // The caller itself, lying about where it is: nothing is sent there until somebody answers.
    assert_eq!(deliver(&mut callee, address(66), &fresh, at, &mut out), Ok(None));
    assert_eq!(callee.endpoint(east(), caller.id.block()), Some((address(66), false)));
    // An unknown link, and one that is not flat.
    let stranger = Selector::Across { tag: ClusterTag::new(3).unwrap(), endpoint: caller.id };
    let stranger = Datagram { selector: stranger, ..probe(1) }.encode(hour, &key_of(5));
    assert_eq!(
        deliver(&mut callee, address(1), &stranger, at, &mut out),
        Err(DecodeError::Field("selector"))
    );
}

#[test]
fn callers_are_bounded_and_a_link_that_is_flat_no_more_forgets_them() {
    let now = Instant::now();
    let at = Moment { now, unix: UNIX };
    let (_, mut callee) = pair(now);
    let key = link_key().across_key(west(), AcrossTarget::Endpoint(callee.id.block()), Hour::at(UNIX));
    for n in 0..MAX_CALLERS as u32 + 10 {
        let block = Block::new(n + 1).unwrap();
        let selector = Selector::Across { tag: east(), endpoint: EndpointId::from_u32((n + 1) << 4) };
        let body = Body::Probe(Probe { sent_micros: 1, bytes: 256 });
        let bytes =
            Datagram { selector, sequence: 1, body }.encode(Hour::at(UNIX), &key.of_prober(east(), block));
        let mut out = Sent::new();
        deliver(&mut callee, address(3), &bytes, at, &mut out).unwrap();
        assert_eq!(out.len(), 1, "all are answered");
    }
    assert_eq!(callee.paths.view("")[&east()].endpoints.len(), MAX_CALLERS);
    let not_flat = Across { flat: None, ..across((callee.tag, callee.id), east(), &[]) };
    callee.paths.adopt(&[(east(), not_flat)].into(), now);
    assert!(callee.paths.view("")[&east()].endpoints.is_empty());
    callee.paths.adopt(&HashMap::new(), now);
    assert!(callee.paths.view("").is_empty());
}

#[test]
fn a_remote_gateways_hint_is_heard_by_whom_it_names() {
    let start = Instant::now();
    let (mut caller, _) = pair(start);
    let at = Moment { now: start, unix: UNIX };
    let key = link_key().across_key(west(), AcrossTarget::Gateways, Hour::at(UNIX));
    let key = key.of_prober(east(), caller.id.block());
    let gone = Gone { tag: west(), endpoint: EndpointId::from_u32(9 << 4), only_this_incarnation: true };
    let selector = Selector::Across { tag: east(), endpoint: caller.id };
    let hint = Datagram { selector, sequence: 0, body: Body::Gone(gone) }.encode(Hour::at(UNIX), &key);
    let mut out = Sent::new();
    assert_eq!(deliver(&mut caller, address(100), &hint, at, &mut out), Ok(Some(gone)));
    assert!(deliver(&mut caller, address(101), &hint, at, &mut out).is_err(), "not from there");
    // Nor about whom it does not speak for: another cluster's endpoints, and from an endpoint, any but itself.
    let about = |gone, key: &CidKey| {
        Datagram { selector, sequence: 0, body: Body::Gone(gone) }.encode(Hour::at(UNIX), key)
    };
    let foreign = about(Gone { tag: east(), ..gone }, &key);
    assert_eq!(deliver(&mut caller, address(100), &foreign, at, &mut out), Err(DecodeError::Field("tag")));
    let target = AcrossTarget::Endpoint(Block::new(9).unwrap());
    let pair = link_key().across_key(west(), target, Hour::at(UNIX)).of_prober(east(), caller.id.block());
    assert_eq!(deliver(&mut caller, address(2), &about(gone, &pair), at, &mut out), Ok(Some(gone)));
    let other = Gone { endpoint: EndpointId::from_u32(8 << 4), ..gone };
    assert!(deliver(&mut caller, address(2), &about(other, &pair), at, &mut out).is_err());
}

#[test]
fn a_gateway_that_drains_is_left_at_once() {
    let start = Instant::now();
    let (mut caller, _) = pair(start);
    let key = link_key().across_key(west(), AcrossTarget::Gateways, Hour::at(UNIX));
    let key = key.of_prober(east(), caller.id.block());
    let mut answered = |now: Instant, total: u16| {
        let at = Moment { now, unix: UNIX };
        let mut probes = Vec::new();
        caller.paths.tick(at, &mut |to, packet: &[u8]| {
            probes.extend((to == address(100)).then(|| packet.to_vec()));
            Ok(())
        });
        for probe in probes {
            let asked = datagram::decode(&probe).unwrap().verify(&key).unwrap();
            let Body::Probe(body) = &asked.body else { panic!("a probe") };
            let ack = ProbeAck::answering(body, 256, StartNumber(1), caller.at, &[]);
            let body = Body::ProbeAck(ProbeAck { unreachable_total: total, ..ack });
            let bytes = Datagram { body, ..asked }.encode(Hour::at(UNIX), &key);
            deliver(&mut caller, address(100), &bytes, at, &mut Sent::new()).unwrap();
        }
        let changed = caller.paths.tick(at, &mut |_, _| Ok(()));
        (changed, caller.paths.view("")[&west()].gateways[0].alive)
    };
    assert_eq!(answered(start, 0), (true, true));
    assert_eq!(answered(start + Duration::from_secs(2), DRAINING), (true, false));
    assert_eq!(answered(start + Duration::from_secs(4), 0), (true, true));
}
