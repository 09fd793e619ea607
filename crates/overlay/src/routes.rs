//! Where a packet leaves a sidecar's or federator's socket: a pure choice by destination connection ID.
//!
//! [`Routes`] is the snapshot its owner sets; [`RouteState`] adds what probing found out about each path. Same
//! cluster: straight to the endpoint; a linked cluster: straight across, or to its gateways, where the link says so and
//! that path lives; anything else, and what is not reachable directly: through a gateway replica of the own cluster, chosen by rendezvous hashing among the live ones, so that replicas need not agree on anything.

use std::collections::HashMap;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use siphasher::sip::SipHasher13;
use tombolo_model::ids::{Block, ClusterTag, EndpointId, Handle};

use crate::across::Across;
use crate::cid::{Cid, Kind};
use crate::rendezvous;

/// A snapshot of where things are, set whole by whoever owns the overlay.
#[derive(Clone, Debug)]
pub struct Routes {
    /// The own cluster's tag.
    pub tag: ClusterTag,
    /// Endpoints of the own cluster that can be reached directly.
    pub endpoints: HashMap<Block, SocketAddr>,
    /// The own cluster's services that may be dialled directly: handle to healthy endpoints.
    pub services: HashMap<Handle, Vec<EndpointId>>,
    /// The own cluster's federators that can be reached directly.
    pub control: Vec<(EndpointId, SocketAddr)>,
    /// Where everything else goes.
    pub gateways: Vec<GatewayHop>,
    /// The own zone: gateways of the same one come first. Empty: none is nearer than another.
    pub zone: String,
    /// Linked clusters that are reached past the own gateways.
    pub across: HashMap<ClusterTag, Across>,
}

impl Routes {
    /// No route to anywhere yet.
    pub fn empty(tag: ClusterTag) -> Self {
        Self {
            tag,
            endpoints: HashMap::new(),
            services: HashMap::new(),
            control: Vec::new(),
            gateways: Vec::new(),
            zone: String::new(),
            across: HashMap::new(),
        }
    }
}

/// A gateway replica, or a balancer's address with several replicas behind it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct GatewayHop {
    pub name: String,
    pub address: SocketAddr,
    /// One address stands for several replicas: several source ports are kept, so that several are in use.
    pub balanced: bool,
    /// Empty when unknown.
    pub zone: String,
}

impl GatewayHop {
    /// A single replica of which nothing but the address is known.
    pub fn at(address: SocketAddr) -> Self {
        Self { name: address.to_string(), address, balanced: false, zone: String::new() }
    }
}

/// One way to a gateway, or across to an endpoint: its address and the local source port (slot) used for it.
#[derive(Clone, Debug)]
pub(crate) struct PathView {
    pub address: SocketAddr,
    pub slot: usize,
    /// Stable for the path's life; feeds the rendezvous hash.
    pub id: u64,
    pub alive: bool,
    /// In the own zone: no other zone's traffic price, and the shortest way.
    pub near: bool,
    /// Clusters that this gateway can't reach now, by its own word.
    pub unreachable: Arc<[ClusterTag]>,
    /// Set by each send, cleared by the hops task: paths with traffic are probed faster.
    pub traffic: Arc<AtomicBool>,
}

/// The ways to one linked cluster past the own gateways, by what probing found.
#[derive(Clone, Debug, Default)]
pub(crate) struct AcrossView {
    pub gateways: Vec<PathView>,
    pub endpoints: HashMap<Block, PathView>,
    pub services: HashMap<Handle, Vec<EndpointId>>,
}

/// Routes plus what is known of the paths; replaced whole.
#[derive(Clone, Debug)]
pub(crate) struct RouteState {
    pub routes: Arc<Routes>,
    pub paths: Vec<PathView>,
    pub across: Arc<HashMap<ClusterTag, AcrossView>>,
}

/// Where one packet goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Exit {
    pub address: SocketAddr,
    pub slot: usize,
}

impl Exit {
    fn direct(address: SocketAddr) -> Self {
        Self { address, slot: 0 }
    }
}

fn hash(parts: [u64; 3]) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(0x746f_6d62_6f6c_6f31, 0x726f_7574_6573_0001);
    parts.iter().for_each(|part| hasher.write_u64(*part));
    hasher.finish()
}

/// The endpoint that a gateway would give it: one whose address is not known is reached through them, and has to be chosen
/// there as well.
fn as_gateways_choose<'a>(
    dcid: &Cid,
    endpoints: impl IntoIterator<Item = &'a EndpointId>,
) -> Option<&'a EndpointId> {
    let key = rendezvous::key_of(&dcid.nonce());
    endpoints.into_iter().max_by_key(|e| (rendezvous::weight(key, e.value().into()), e.value()))
}

fn nonce_of(cid: &Cid) -> u64 {
    cid.nonce().iter().fold(0, |acc, byte| (acc << 8) | u64::from(*byte))
}

/// What spreads connection IDs over replicas.
fn rendezvous_key(dcid: &Cid) -> u64 {
    nonce_of(dcid) ^ (u64::from(dcid.target()) << 8)
}

impl RouteState {
    /// Where a packet for `dcid` leaves; `rotation` counts the kicks that asked for another replica, of which the last one was
    /// `lately`.
    pub fn exit(&self, dcid: &Cid, rotation: u64, lately: bool) -> Option<Exit> {
        let own = dcid.tag_value() == self.routes.tag.value();
        let kicks = if lately { rotation } else { 0 };
        let past_gateways = if own { self.direct(dcid) } else { self.across(dcid, kicks) };
        past_gateways.or_else(|| self.gateway(dcid, rotation))
    }

    /// Straight to the endpoint where that path lives, else to a live gateway of its cluster. Every second kick asks the
    /// own gateways, while one of them lives; a stall that is over leaves no trace.
    fn across(&self, dcid: &Cid, rotation: u64) -> Option<Exit> {
        let instead = !rotation.is_multiple_of(2) && self.paths.iter().any(|path| path.alive);
        let across = self.across.get(&dcid.tag()?).filter(|_| !instead)?;
        let alive = |block: Block| across.endpoints.get(&block).filter(|path| path.alive);
        let straight = match dcid.kind() {
            Kind::Endpoint => alive(dcid.endpoint().block()),
            Kind::Service => {
                let endpoints = across.services.get(&dcid.handle()).into_iter().flatten();
                as_gateways_choose(dcid, endpoints).and_then(|endpoint| alive(endpoint.block()))
            }
            Kind::Control | Kind::Join => None,
        };
        let key = rendezvous_key(dcid);
        let gateway = |near: bool| {
            let usable = across.gateways.iter().filter(|path| path.alive && (path.near || !near));
            usable.max_by_key(|path| (hash([key, path.id, rotation]), path.id))
        };
        let path = straight.or_else(|| gateway(true)).or_else(|| gateway(false))?;
        path.traffic.store(true, Relaxed);
        Some(Exit { address: path.address, slot: path.slot })
    }

    /// Past every gateway, where the routes know an address.
    pub fn direct(&self, dcid: &Cid) -> Option<Exit> {
        match dcid.kind() {
            Kind::Endpoint => {
                let block = dcid.endpoint().block();
                let federator =
                    || self.routes.control.iter().find(|(e, _)| e.block() == block).map(|(_, a)| a);
                self.routes.endpoints.get(&block).or_else(federator).copied().map(Exit::direct)
            }
            Kind::Service => {
                let chosen = as_gateways_choose(dcid, self.routes.services.get(&dcid.handle())?)?;
                self.routes.endpoints.get(&chosen.block()).copied().map(Exit::direct)
            }
            Kind::Control => {
                let nonce = nonce_of(dcid);
                let (_, address) =
                    self.routes.control.iter().max_by_key(|(e, _)| hash([nonce, u64::from(e.value()), 0]))?;
                Some(Exit::direct(*address))
            }
            Kind::Join => None,
        }
    }

    /// Live replicas that reach the cluster first, those of the own zone before others, then live ones, then any: a dead
    /// path may have just come back. A kick asks for another replica, of whatever zone.
    fn gateway(&self, dcid: &Cid, rotation: u64) -> Option<Exit> {
        let tag = dcid.tag_value();
        let key = rendezvous_key(dcid);
        let best = |usable: &dyn Fn(&PathView) -> bool| {
            let paths = self.paths.iter().enumerate().filter(|(_, path)| usable(path));
            paths.map(|(index, path)| (hash([key, path.id, rotation]), index)).max()
        };
        let reaches = |path: &PathView| path.alive && !path.unreachable.iter().any(|t| t.value() == tag);
        let near = if rotation == 0 { best(&|path| path.near && reaches(path)) } else { None };
        let best =
            near.or_else(|| best(&reaches)).or_else(|| best(&|path| path.alive)).or_else(|| best(&|_| true));
        let (_, index) = best?;
        let path = self.paths.get(index)?;
        path.traffic.store(true, Relaxed);
        Some(Exit { address: path.address, slot: path.slot })
    }

    /// Clusters that no live path reaches, of those some gateway has named unreachable.
    pub fn unreachable_tags(&self) -> std::collections::HashSet<ClusterTag> {
        let mut tags = self.unreachable_by_gateways();
        // Callers' addresses are known too: that one of them lives says nothing of what is called.
        let lives = |view: &AcrossView| {
            let called = view.services.values().flatten().filter_map(|e| view.endpoints.get(&e.block()));
            view.gateways.iter().chain(called).any(|path| path.alive)
        };
        tags.retain(|tag| !self.across.get(tag).is_some_and(lives));
        tags
    }

    fn unreachable_by_gateways(&self) -> std::collections::HashSet<ClusterTag> {
        let mut live = self.paths.iter().filter(|p| p.alive).peekable();
        let Some(first) = live.next() else { return Default::default() };
        let mut tags: std::collections::HashSet<_> = first.unreachable.iter().copied().collect();
        live.for_each(|path| tags.retain(|tag| path.unreachable.contains(tag)));
        tags
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{CidKey, Hour};

    fn tag(n: u32) -> ClusterTag {
        ClusterTag::new(n).unwrap()
    }
    fn cid(kind: Kind, t: u32, target: u32, nonce: u8) -> Cid {
        Cid::mint(kind, tag(t), target, [nonce; 7], Hour(0), &CidKey::from_bytes([0; 16]))
    }
    fn path(n: u8, alive: bool, unreachable: &[u32]) -> PathView {
        PathView {
            address: SocketAddr::from(([127, 0, 0, n], 7441)),
            slot: 0,
            id: u64::from(n),
            alive,
            near: false,
            unreachable: unreachable.iter().map(|t| tag(*t)).collect(),
            traffic: Arc::default(),
        }
    }
    fn state(paths: Vec<PathView>) -> RouteState {
        let mut routes = Routes::empty(tag(1));
        let block = Block::new(7).unwrap();
        routes.endpoints.insert(block, SocketAddr::from(([127, 0, 1, 1], 7442)));
        routes.services.insert(Handle::from_u32(300), vec![EndpointId::from_u32(7 << 4)]);
        routes.control.push((EndpointId::from_u32(8 << 4), SocketAddr::from(([127, 0, 1, 2], 7443))));
        RouteState { routes: Arc::new(routes), paths, across: Arc::default() }
    }

    #[test]
    fn past_the_own_gateways_while_that_lives_and_every_second_kick_returns_to_them() {
        let mut state = state(vec![path(9, true, &[5])]);
        let block = Block::new(7).unwrap();
        let across = |gateway: bool, endpoint: bool| {
            let view = AcrossView {
                gateways: vec![path(20, gateway, &[])],
                endpoints: [(block, path(30, endpoint, &[]))].into(),
                services: [(Handle::from_u32(300), vec![EndpointId::from_u32(7 << 4)])].into(),
            };
            Arc::new(HashMap::from([(tag(5), view)]))
        };
        let octet = |address: SocketAddr| match address {
            SocketAddr::V4(v4) => v4.ip().octets()[3],
            SocketAddr::V6(_) => 0,
        };
        let last = |state: &RouteState, dcid: &Cid, rotation| {
            octet(state.exit(dcid, rotation, true).unwrap().address)
        };
        let (endpoint, other) = (cid(Kind::Endpoint, 5, 7 << 4, 0), cid(Kind::Endpoint, 5, 8 << 4, 0));
        let (service, control) = (cid(Kind::Service, 5, 300, 0), cid(Kind::Control, 5, 300, 0));
        state.across = across(true, true);
        let exits = |state: &RouteState, rotation| {
            [&endpoint, &service, &other, &control].map(|dcid| last(state, dcid, rotation))
        };
        assert_eq!(exits(&state, 0), [30, 30, 20, 20]);
        assert_eq!(exits(&state, 1), [9, 9, 9, 9]);
        assert_eq!(exits(&state, 2), [30, 30, 20, 20]);
        assert!(state.unreachable_tags().is_empty(), "its own gateways don't reach it, others do");
        assert_eq!(
            octet(state.exit(&endpoint, 1, false).unwrap().address),
            30,
            "a stall that is over leaves no trace"
        );
        let dead = RouteState { paths: vec![path(9, false, &[])], ..state.clone() };
        assert_eq!(last(&dead, &endpoint, 1), 30, "no gateway of our own lives");
        // A caller that lives is nobody whom we call.
        let mut callers = (*across(false, true)).clone();
        callers.values_mut().for_each(|view| view.services.clear());
        let called = RouteState { across: Arc::new(callers), ..state.clone() };
        assert_eq!(called.unreachable_tags(), [tag(5)].into());
        state.across = across(true, false);
        assert_eq!(exits(&state, 0), [20, 20, 20, 20]);
        state.across = across(false, false);
        assert_eq!(exits(&state, 0), [9, 9, 9, 9]);
        assert_eq!(state.unreachable_tags(), [tag(5)].into());
    }

    #[test]
    fn the_own_cluster_is_reached_directly_and_others_through_a_gateway() {
        let state = state(vec![path(9, true, &[])]);
        let direct = Some(Exit { address: SocketAddr::from(([127, 0, 1, 1], 7442)), slot: 0 });
        let gateway = Some(Exit { address: SocketAddr::from(([127, 0, 0, 9], 7441)), slot: 0 });
        assert_eq!(state.exit(&cid(Kind::Endpoint, 1, 7 << 4, 0), 0, true), direct);
        assert_eq!(state.exit(&cid(Kind::Service, 1, 300, 0), 0, true), direct);
        let federator = Some(Exit { address: SocketAddr::from(([127, 0, 1, 2], 7443)), slot: 0 });
        assert_eq!(state.exit(&cid(Kind::Control, 1, 300, 0), 0, true), federator);
        assert_eq!(
            state.exit(&cid(Kind::Endpoint, 1, (8 << 4) + 3, 0), 0, true),
            federator,
            "what it answers with"
        );
        assert_eq!(
            state.exit(&cid(Kind::Endpoint, 1, 9 << 4, 0), 0, true),
            gateway,
            "unknown blocks go to the gateway"
        );
        assert_eq!(state.exit(&cid(Kind::Endpoint, 2, 7 << 4, 0), 0, true), gateway);
    }

    #[test]
    fn dead_and_unreaching_gateways_are_avoided_while_there_is_a_better_one() {
        let state = state(vec![path(1, false, &[]), path(2, true, &[5]), path(3, true, &[])]);
        for nonce in 0..50 {
            let exit = state.exit(&cid(Kind::Service, 5, 300, nonce), 0, true).unwrap();
            assert_eq!(exit.address.ip().to_string(), "127.0.0.3");
        }
        assert!(state.unreachable_tags().is_empty());
        let all_dead = RouteState { paths: vec![path(1, false, &[])], ..state };
        assert!(all_dead.exit(&cid(Kind::Service, 5, 300, 0), 0, true).is_some());
    }

    #[test]
    fn the_own_zone_comes_first_while_it_reaches_and_a_kick_may_leave_it() {
        let near = |n, alive, unreachable: &[u32]| PathView { near: true, ..path(n, alive, unreachable) };
        let exits = |state: &RouteState, rotation| -> std::collections::BTreeSet<String> {
            let exit = |n| state.exit(&cid(Kind::Endpoint, 5, 1, n), rotation, true).unwrap();
            (0..50).map(|n| exit(n).address.ip().to_string()).collect()
        };
        let usual = state(vec![near(1, true, &[]), path(2, true, &[]), near(3, true, &[])]);
        assert_eq!(exits(&usual, 0), ["127.0.0.1".into(), "127.0.0.3".into()].into());
        assert_eq!(exits(&usual, 1).len(), 3);
        let dead = state(vec![near(1, false, &[]), path(2, true, &[]), near(3, true, &[5])]);
        assert_eq!(exits(&dead, 0), ["127.0.0.2".into()].into());
    }

    #[test]
    fn a_cluster_is_unreachable_when_every_live_gateway_says_so() {
        let state = state(vec![path(1, true, &[5, 6]), path(2, true, &[5]), path(3, false, &[])]);
        assert_eq!(state.unreachable_tags(), [tag(5)].into());
    }

    #[test]
    fn connections_spread_over_replicas_and_a_rotation_moves_one() {
        let state = state(vec![path(1, true, &[]), path(2, true, &[])]);
        let exits: Vec<_> =
            (0..100).map(|n| state.exit(&cid(Kind::Endpoint, 5, 1, n), 0, true).unwrap()).collect();
        let on_first = exits.iter().filter(|e| e.address.ip().to_string() == "127.0.0.1").count();
        assert!((25..75).contains(&on_first), "{on_first}");
        let dcid = cid(Kind::Endpoint, 5, 1, 0);
        let rotated: std::collections::HashSet<_> =
            (0..8).map(|r| state.exit(&dcid, r, true).unwrap().address).collect();
        assert_eq!(rotated.len(), 2);
    }
}
