//! What a hostile gateway knows: the stored configuration of a real one, with every key in it, and the datagrams and
//! connection IDs that can be minted from that.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use prost::Message as _;
use tombolo_model::ids::{ClusterTag, EndpointId};
use tombolo_overlay::cid::{Cid, Kind};
use tombolo_overlay::datagram::{self, Body, Datagram, Gone, ProbeAck, Selector, StartNumber};
use tombolo_overlay::keys::{ClusterKey, HandleBinding, Hour, LinkKey};
use tombolo_proto::v1;
use tombolo_runtime::clock;

/// Where a gateway keeps its last configuration, below its state directory.
const SNAPSHOT: &str = "snapshot.pb";

/// The keys of one real gateway.
#[derive(Debug)]
pub struct Stolen {
    snapshot: v1::GatewaySnapshot,
    pub tag: ClusterTag,
}

/// A link's key and the peer's tag.
pub struct StolenLink {
    pub key: LinkKey,
    pub tag: ClusterTag,
    outbound: Vec<v1::HandleBinding>,
}

fn key(bytes: &[u8]) -> Result<[u8; 32]> {
    bytes.try_into().map_err(|_| anyhow!("a key of {} bytes", bytes.len()))
}

fn tag(value: u32) -> Result<ClusterTag> {
    ClusterTag::new(value).with_context(|| format!("tag {value}"))
}

impl Stolen {
    pub fn read(state: &Path) -> Result<Self> {
        let path = state.join(SNAPSHOT);
        let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let snapshot = v1::GatewaySnapshot::decode(&*bytes)?;
        let tag = tag(snapshot.tag)?;
        Ok(Self { snapshot, tag })
    }

    fn hour() -> Hour {
        Hour::at(clock::since_unix_epoch())
    }

    pub fn link(&self, peer: &str) -> Result<StolenLink> {
        let link = self.snapshot.links.iter().find(|link| link.peer == peer && !link.self_);
        let link = link.with_context(|| format!("no link to {peer}"))?;
        Ok(StolenLink {
            key: LinkKey::from_bytes(key(&link.key)?),
            tag: tag(link.tag)?,
            outbound: link.outbound.clone(),
        })
    }

    /// An ID that names an endpoint of the own cluster.
    pub fn endpoint_cid(&self, endpoint: EndpointId) -> Result<Cid> {
        let hour = Self::hour();
        let key =
            ClusterKey::from_bytes(key(&self.snapshot.cluster_key)?).endpoint_key(endpoint.block(), hour);
        Ok(Cid::mint(Kind::Endpoint, self.tag, endpoint.value(), rand::random(), hour, &key))
    }

    /// The first ID of a connection to a service of the peer.
    pub fn service_cid(&self, peer: &str, service: &str) -> Result<Cid> {
        let link = self.link(peer)?;
        let binding = link.outbound.iter().find(|binding| binding.service == service);
        let binding =
            HandleBinding::from_wire(binding.with_context(|| format!("{service} is not exported"))?)?;
        let hour = Self::hour();
        let key = link.key.handle_key(&binding, hour);
        Ok(Cid::mint(Kind::Service, link.tag, binding.handle.value(), rand::random(), hour, &key))
    }

    /// Tells `receiver`, an endpoint of the own cluster, that `endpoint` of the cluster `of` is no more.
    pub fn gone(&self, receiver: EndpointId, of: ClusterTag, endpoint: EndpointId) -> Result<Vec<u8>> {
        let hour = Self::hour();
        let key =
            ClusterKey::from_bytes(key(&self.snapshot.cluster_key)?).endpoint_key(receiver.block(), hour);
        let gone = Gone { tag: of, endpoint, only_this_incarnation: rand::random() };
        let selector = Selector::Endpoint { tag: self.tag, endpoint: receiver };
        Ok(Datagram { selector, sequence: rand::random(), body: Body::Gone(gone) }.encode(hour, &key))
    }

    /// Tells a gateway of the peer that `endpoint` of the cluster `of` is no more.
    pub fn gone_to_peer(&self, peer: &str, of: ClusterTag, endpoint: EndpointId) -> Result<Vec<u8>> {
        let (hour, link) = (Self::hour(), self.link(peer)?);
        let gone = Gone { tag: of, endpoint, only_this_incarnation: rand::random() };
        let selector = Selector::Gateway { tag: self.tag };
        let datagram = Datagram { selector, sequence: rand::random(), body: Body::Gone(gone) };
        Ok(datagram.encode(hour, &link.key.probe_key(hour)))
    }

    /// Answers a PROBE of a peer's gateway as the real gateway would; `None` for anything else.
    pub fn probe_ack(&self, peer: &StolenLink, packet: &[u8], from: std::net::SocketAddr) -> Option<Vec<u8>> {
        let unverified = datagram::decode(packet).ok()?;
        let hour = unverified.phase.hour(clock::since_unix_epoch());
        let probe = unverified.verify(&peer.key.probe_key(hour)).ok()?;
        let Body::Probe(body) = &probe.body else { return None };
        let bytes = u16::try_from(packet.len()).ok()?;
        let ack = ProbeAck::answering(body, bytes, StartNumber(0x0057_01e4), from, &[]);
        let selector = Selector::Gateway { tag: self.tag };
        let answer = Datagram { selector, sequence: probe.sequence, body: Body::ProbeAck(ack) };
        let hour = Self::hour();
        Some(answer.encode(hour, &peer.key.probe_key(hour)))
    }
}

/// An endpoint id as status prints it.
pub fn endpoint(text: &str) -> Result<EndpointId> {
    let id = u32::from_str_radix(text, 16).with_context(|| format!("endpoint id {text:?}"))?;
    Ok(EndpointId::from_u32(id))
}
