//! The paths to gateways of peers and to siblings: which there are, and what probing says of each. No IO.
//!
//! A peer behind a balancer's address gets several source ports, so that several of its replicas are in use; a port whose
//! replica died is replaced by a fresh one, which the balancer may send elsewhere. A port that never had an answer is
//! kept for a while: a peer that is down as a whole would otherwise make us open sockets without end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tombolo_model::ids::ClusterTag;
use tombolo_overlay::DRAINING;
use tombolo_overlay::probe::{Health, OutgoingProbe, ProbeState};
use tombolo_overlay::rendezvous;

use super::status::HopStatus;
use crate::counters::{Counters, Name, Slot};
use crate::tables::{Replica, Tables};
use crate::view::{PathFlags, PathView, PortId, Side, Standing, Via};

pub use tombolo_overlay::probe::Event;

/// Source ports kept towards a balancer: with two replicas behind it, all four land on one of them once in eight.
const BALANCED_PORTS: usize = 4;
/// A source port that was never answered is tried for so long.
const UNANSWERED_LIFE: Duration = Duration::from_secs(10);

/// Whose gateway it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Whose {
    Peer(ClusterTag),
    Sibling,
}

/// One path.
#[derive(Debug)]
pub struct Hop {
    pub id: u64,
    pub whose: Whose,
    pub cluster: String,
    pub replica: Replica,
    pub via: Via,
    pub probe: ProbeState,
    pub flags: Arc<PathFlags>,
    pub slot: Slot,
    /// Has answered with the link's key at least once.
    proven: bool,
    born: Instant,
    /// Which of the balanced ports.
    index: usize,
}

impl Hop {
    pub fn draining(&self) -> bool {
        self.probe.unreachable_total() == DRAINING
    }

    pub fn standing(&self) -> Standing {
        match self.probe.health() {
            _ if !self.proven => Standing::Unproven,
            Health::Untested | Health::Dead => Standing::Dead,
            Health::Suspect => Standing::Reserve,
            Health::Alive if self.draining() => Standing::Reserve,
            Health::Alive => Standing::Alive,
        }
    }

    pub fn path(&self) -> PathView {
        PathView {
            id: self.id,
            address: self.replica.address,
            via: self.via,
            standing: self.standing(),
            hop: self.slot,
            flags: Arc::clone(&self.flags),
        }
    }
}

/// What a change of the set asks the owner to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortChange {
    Open(PortId),
    Close(PortId),
}

/// All paths.
#[derive(Debug, Default)]
pub struct Hops {
    hops: Vec<Hop>,
    next_port: u32,
}

impl Hops {
    pub fn iter(&self) -> impl Iterator<Item = &Hop> {
        self.hops.iter()
    }
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Hop> {
        self.hops.iter_mut()
    }
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Hop> {
        self.hops.iter_mut().find(|hop| hop.id == id)
    }

    /// Keeps what the tables still name, adds what is new.
    pub fn adopt(
        &mut self,
        tables: &Tables,
        unix: Duration,
        counters: &Counters,
        now: Instant,
    ) -> Vec<PortChange> {
        let mut wanted: Vec<(Whose, &str, &Replica)> = Vec::new();
        for link in tables.all_links(unix).into_iter().filter(|link| !link.own) {
            wanted.extend(link.gateways.iter().map(|g| (Whose::Peer(link.tag), link.peer.as_str(), g)));
        }
        wanted.extend(tables.siblings.iter().map(|s| (Whose::Sibling, tables.cluster.as_str(), s)));
        let mut changes = Vec::new();
        self.hops.retain(|hop| {
            let keep =
                wanted.iter().any(|(whose, _, replica)| *whose == hop.whose && **replica == hop.replica);
            if let (false, Via::Port(port)) = (keep, hop.via) {
                changes.push(PortChange::Close(port));
            }
            keep
        });
        for (whose, cluster, replica) in wanted {
            if self.hops.iter().any(|hop| hop.whose == whose && hop.replica == *replica) {
                continue;
            }
            let slot = counters.slot(Name::Gateway(cluster.to_owned(), replica.name.clone()));
            let balanced = replica.balanced && matches!(whose, Whose::Peer(_));
            for index in 0..if balanced { BALANCED_PORTS } else { 1 } {
                let via = match whose {
                    Whose::Sibling => Via::Side(Side::Inner),
                    Whose::Peer(_) if balanced => Via::Port(self.fresh_port(&mut changes)),
                    Whose::Peer(_) => Via::Side(Side::Border),
                };
                self.hops.push(hop(whose, cluster, replica.clone(), via, slot, index, now));
            }
        }
        changes
    }

    fn fresh_port(&mut self, changes: &mut Vec<PortChange>) -> PortId {
        let id = PortId(self.next_port);
        self.next_port = self.next_port.wrapping_add(1);
        changes.push(PortChange::Open(id));
        id
    }

    /// Replaces the source ports whose replica died.
    pub fn replace_dead(&mut self, now: Instant) -> Vec<PortChange> {
        let mut changes = Vec::new();
        let is_dead = |hop: &Hop| {
            let waited = hop.proven || now.saturating_duration_since(hop.born) >= UNANSWERED_LIFE;
            matches!(hop.via, Via::Port(_)) && hop.probe.health() == Health::Dead && waited
        };
        for at in 0..self.hops.len() {
            let Some(dead) = self.hops.get(at).filter(|hop| is_dead(hop)) else { continue };
            if let Via::Port(port) = dead.via {
                changes.push(PortChange::Close(port));
            }
            let (whose, cluster, replica) = (dead.whose, dead.cluster.clone(), dead.replica.clone());
            let (slot, index) = (dead.slot, dead.index);
            let via = Via::Port(self.fresh_port(&mut changes));
            if let Some(place) = self.hops.get_mut(at) {
                *place = hop(whose, &cluster, replica, via, slot, index, now);
            }
        }
        changes
    }

    /// Probes to send now: at most one for life and one for the MTU per path.
    pub fn tick(&mut self, now: Instant) -> Vec<(u64, OutgoingProbe)> {
        let mut probes = Vec::new();
        for hop in &mut self.hops {
            if hop.flags.refused.load(Relaxed) {
                hop.probe.on_refused(now);
            }
            let traffic = hop.flags.traffic.swap(false, Relaxed);
            for _ in 0..2 {
                let Some(probe) = hop.probe.on_tick(now, traffic) else { break };
                probes.push((hop.id, probe));
            }
        }
        probes
    }

    pub fn next_tick(&self) -> Option<Instant> {
        self.hops.iter().map(|hop| hop.probe.next_tick()).min()
    }

    /// A keyed answer that came in where the path is, from where it leads.
    pub fn on_ack(
        &mut self,
        whose: Whose,
        via: Via,
        source: std::net::SocketAddr,
        sequence: u64,
        ack: &tombolo_overlay::datagram::ProbeAck,
        now: Instant,
    ) -> bool {
        let here = |hop: &&mut Hop| hop.whose == whose && hop.via == via && hop.replica.address == source;
        let Some(hop) = self.hops.iter_mut().find(here) else { return false };
        let matched = hop.probe.on_ack(now, sequence, ack);
        hop.proven |= matched;
        matched
    }

    /// Clusters that no path reaches: all of theirs are dead, or there is none. A path not yet probed to its end counts.
    pub fn unreachable(&self, tables: &Tables, unix: Duration) -> Vec<ClusterTag> {
        let links = tables.all_links(unix).into_iter().filter(|link| !link.own);
        let reached = |tag| {
            let mut paths = self.hops.iter().filter(|hop| hop.whose == Whose::Peer(tag));
            paths.any(|hop| hop.probe.health() != Health::Dead)
        };
        let mut tags: Vec<_> = links.map(|link| link.tag).filter(|tag| !reached(*tag)).collect();
        tags.sort_unstable();
        tags
    }

    /// One line per gateway: the best of its paths.
    pub fn status(&self) -> Vec<HopStatus> {
        let mut best: HashMap<(Whose, &Replica), &Hop> = HashMap::new();
        for hop in &self.hops {
            let kept = best.entry((hop.whose, &hop.replica)).or_insert(hop);
            if hop.standing() > kept.standing() {
                *kept = hop;
            }
        }
        let line = |hop: &&Hop| HopStatus {
            cluster: hop.cluster.clone(),
            name: hop.replica.name.clone(),
            sibling: hop.whose == Whose::Sibling,
            address: hop.replica.address,
            alive: hop.probe.alive(),
            draining: hop.draining(),
            rtt: hop.probe.rtt(),
            loss_per_mille: hop.probe.loss_per_mille(),
            mtu: hop.probe.mtu(),
            last_ack: hop.probe.last_ack(),
        };
        let mut lines: Vec<_> = best.values().map(line).collect();
        lines.sort_by(|a, b| (&a.cluster, &a.name).cmp(&(&b.cluster, &b.name)));
        lines
    }
}

fn hop(
    whose: Whose,
    cluster: &str,
    replica: Replica,
    via: Via,
    slot: Slot,
    index: usize,
    now: Instant,
) -> Hop {
    // The same for every gateway of this cluster, so that they agree without talking; ports of a balancer differ anyway.
    let port = match via {
        Via::Port(PortId(id)) => id,
        Via::Side(_) => 0,
    };
    let name = format!("{cluster}/{}/{port}/{index}", replica.address);
    Hop {
        id: rendezvous::key_of(name.as_bytes()),
        whose,
        cluster: cluster.to_owned(),
        replica,
        via,
        probe: ProbeState::new(now, rand::random()),
        flags: Arc::default(),
        slot,
        proven: false,
        born: now,
        index,
    }
}
