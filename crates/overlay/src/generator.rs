//! quinn's connection ID generator: endpoint-kind IDs for ourselves, keyed for the hour they are made in.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use tombolo_model::ids::ClusterTag;
use tombolo_runtime::clock;

use crate::cid::{CID_LEN, Cid, Kind};
use crate::keys::{CidKey, Hour, KeyRing};
use crate::parts::Place;

/// A lost packet makes quinn skip one retirement round, so an ID may live 80 min: 60 + 80 + 10 < 180 - 10.
const CID_LIFETIME: Duration = Duration::from_secs(40 * 60);

/// Who the IDs are for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub kind: Kind,
    pub tag: ClusterTag,
    pub target: u32,
}

pub(crate) struct Generator {
    pub me: Identity,
    pub keys: Arc<ArcSwap<KeyRing>>,
    /// The part that the IDs lead to.
    pub place: Option<Place>,
}

/// Mints an ID with the key of this hour. Past the ring's end the last key is used: receivers refuse it, which is
/// what a federator that has been away for over a day means.
pub(crate) fn mint(me: Identity, keys: &KeyRing, place: Option<&Place>) -> Cid {
    let now = clock::since_unix_epoch();
    let unkeyed = CidKey::from_bytes([0; 16]); // join-kind IDs have no key: they are answered to their source only
    let (hour, key) = keys.current(now).or_else(|| keys.iter().last()).unwrap_or((Hour::at(now), &unkeyed));
    let mut nonce: [u8; 7] = rand::random();
    if let Some(place) = place {
        nonce[0] = place.nonce(nonce[0]);
    }
    Cid::mint(me.kind, me.tag, me.target, nonce, hour, key)
}

impl ConnectionIdGenerator for Generator {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(mint(self.me, &self.keys.load(), self.place.as_ref()).as_bytes())
    }

    /// Consulted for short-header packets of unknown connections only: no stateless reset for what is not ours.
    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        let cid = Cid::from_bytes(cid).ok_or(InvalidCid)?;
        let keys = self.keys.load();
        let key = keys.for_phase(cid.phase(), clock::since_unix_epoch()).ok_or(InvalidCid)?;
        (cid.target() == self.me.target && cid.verify(key)).then_some(()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        CID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        Some(CID_LIFETIME)
    }
}
