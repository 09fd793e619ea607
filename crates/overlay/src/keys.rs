//! The keys behind connection IDs and control datagrams: derived per target and per hour (protocol.md section 1).
//!
//! A cluster key or link key never leaves mTLS and never reaches a sidecar; sidecars hold [`KeyRing`]s of derived
//! keys for the hours ahead, so that a federator may be away for a day. The wire carries the hour modulo 4; the
//! receiver finds the whole hour from its own clock, accepting n-2 to n+1.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hasher;
use std::time::Duration;

use aws_lc_rs::hmac;
use siphasher::sip128::{Hasher128, SipHasher24};
use tombolo_model::ids::{Block, ClusterTag, Handle};
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use zeroize::Zeroizing;

/// Derived keys are handed out this far ahead: a federator may be away that long.
pub const HOURS_AHEAD: usize = 24;
/// Phases n-2 are still accepted: 60 + 80 + 10 < 180 - 10 minutes (an ID may live 80 min, clocks are off by 10).
pub const HOURS_BEHIND: usize = 2;
/// A ring longer than this is hostile.
const MAX_RING: usize = 24 * 8;

/// Whole hours since the Unix epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Hour(pub u64);

impl Hour {
    pub fn at(since_unix_epoch: Duration) -> Self {
        Self(since_unix_epoch.as_secs() / 3600)
    }
    pub fn phase(self) -> Phase {
        Phase((self.0 % 4) as u8)
    }
    /// The first hour of a ring that is made now.
    pub fn ring_start(self) -> Self {
        Self(self.0.saturating_sub(HOURS_BEHIND as u64))
    }
}

/// An hour modulo 4, as an ID carries it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Phase(u8);

impl Phase {
    pub fn from_bits(bits: u8) -> Self {
        Self(bits & 0b11)
    }
    pub fn value(self) -> u8 {
        self.0
    }
    /// The hour this phase stands for now: one of n-2 ..= n+1, which are all four phases.
    pub fn hour(self, since_unix_epoch: Duration) -> Hour {
        let now = Hour::at(since_unix_epoch).0;
        let first = now.saturating_sub(2);
        let ahead = (u64::from(self.0) + 4 - first % 4) % 4;
        Hour(first + ahead)
    }
}

macro_rules! secret {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name(Zeroizing<[u8; $len]>);
        impl $name {
            pub fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(Zeroizing::new(bytes))
            }
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
            /// A fresh random key.
            pub fn generate() -> Self {
                Self::from_bytes(rand::random())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(..)"))
            }
        }
    };
}

secret!(
    /// The SipHash key of one target in one hour.
    CidKey, 16
);
secret!(
    /// A cluster's own key: endpoint keys derive from it.
    ClusterKey, 32
);
secret!(
    /// The key of one link, held by both of its sides: handle keys derive from it.
    LinkKey, 32
);

/// One-step KDF: HMAC-SHA256 under the master key over a labelled, length-prefixed encoding, truncated to 128 bits
/// (NIST SP 800-108 in counter mode with one block).
fn kdf(master: &[u8], label: &str, parts: &[&[u8]]) -> CidKey {
    let key = hmac::Key::new(hmac::HMAC_SHA256, master);
    let mut context = hmac::Context::with_key(&key);
    context.update(&[1]);
    for part in std::iter::once(&label.as_bytes()).chain(parts) {
        context.update(&(part.len() as u32).to_be_bytes());
        context.update(part);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&context.sign().as_ref()[..16]);
    CidKey::from_bytes(out)
}

impl ClusterKey {
    /// Key of all endpoint-kind IDs of a block.
    pub fn endpoint_key(&self, block: Block, hour: Hour) -> CidKey {
        kdf(self.as_bytes(), "tombolo endpoint", &[&block.value().to_be_bytes(), &hour.0.to_be_bytes()])
    }
    /// Key by which the holder of a block comes back when its hourly ones have run out: of its endpoint-kind IDs, its control
    /// datagrams, and the IDs that it dials the renewal handle with. The same at any hour. `salt` differs from holder to
    /// holder, should a block ever be given out again.
    pub fn renewal_key(&self, block: Block, salt: u32) -> CidKey {
        kdf(self.as_bytes(), "tombolo renewal", &[&block.value().to_be_bytes(), &salt.to_be_bytes()])
    }
    /// Key of control datagrams between the gateway replicas of one cluster.
    pub fn probe_key(&self, hour: Hour) -> CidKey {
        kdf(self.as_bytes(), "tombolo replica", &[&hour.0.to_be_bytes()])
    }
    /// Key of IDs for the reserved handles (first contact aside): joining with a token.
    pub fn reserved_key(&self, handle: Handle, hour: Hour) -> CidKey {
        kdf(self.as_bytes(), "tombolo reserved", &[&handle.value().to_be_bytes(), &hour.0.to_be_bytes()])
    }
}

/// What a handle's key is bound to: a handle given out again has another export UID, hence another key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HandleBinding {
    pub handle: Handle,
    pub importer: ClusterName,
    /// `namespace/name`, or `control`.
    pub service: String,
    pub export_uid: [u8; 16],
}

impl HandleBinding {
    pub fn to_wire(&self) -> v1::HandleBinding {
        v1::HandleBinding {
            handle: self.handle.value(),
            importer: self.importer.to_string(),
            service: self.service.clone(),
            export_uid: self.export_uid.to_vec(),
        }
    }
    pub fn from_wire(wire: &v1::HandleBinding) -> Result<Self, FieldError> {
        if wire.service.len() > 200 {
            return Err(FieldError::new("binding.service", &wire.service, "at most 200 bytes"));
        }
        Ok(Self {
            handle: Handle::from_u32(wire.handle),
            importer: convert::parse("binding.importer", &wire.importer)?,
            service: wire.service.clone(),
            export_uid: convert::bytes("binding.export_uid", &wire.export_uid)?,
        })
    }
}

impl LinkKey {
    /// Of two clusters that are to be linked by objects on both sides, until they are. Whoever knows their names for each
    /// other can derive it: it admits first packets of first contact, at a few per second, and probes, and says nothing of who
    /// sent them. Bound to the trust domain and not to a root, which is rotated.
    pub fn first_contact(trust_domain: &str, a: ClusterTag, b: ClusterTag) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"tombolo first contact");
        let mut context = hmac::Context::with_key(&key);
        context.update(trust_domain.as_bytes());
        context.update(&a.min(b).value().to_be_bytes());
        context.update(&a.max(b).value().to_be_bytes());
        let mut out = [0; 32];
        out.copy_from_slice(&context.sign().as_ref()[..32]);
        Self::from_bytes(out)
    }
    /// Key of the service- or control-kind IDs of one handle.
    pub fn handle_key(&self, binding: &HandleBinding, hour: Hour) -> CidKey {
        kdf(
            self.as_bytes(),
            "tombolo handle",
            &[
                &binding.handle.value().to_be_bytes(),
                binding.importer.as_str().as_bytes(),
                binding.service.as_bytes(),
                &binding.export_uid,
                &hour.0.to_be_bytes(),
            ],
        )
    }
    /// Key of control datagrams between the gateways of the two clusters.
    pub fn probe_key(&self, hour: Hour) -> CidKey {
        kdf(self.as_bytes(), "tombolo probe", &[&hour.0.to_be_bytes()])
    }
    /// What [`CidKey::of_prober`] derives from, for control datagrams between a target of cluster `tag` and endpoints of
    /// the other cluster that reach it past their own gateways.
    pub fn across_key(&self, tag: ClusterTag, target: AcrossTarget, hour: Hour) -> CidKey {
        let (class, block) = match target {
            AcrossTarget::Gateways => (0u8, 0),
            AcrossTarget::Endpoint(block) => (1, block.value()),
        };
        let parts: [&[u8]; 4] =
            [&tag.value().to_be_bytes(), &[class], &block.to_be_bytes(), &hour.0.to_be_bytes()];
        kdf(self.as_bytes(), "tombolo across", &parts)
    }
}

/// Whom an endpoint of a linked cluster may reach past its own gateways.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AcrossTarget {
    /// Any gateway of the cluster, at its border (`egress: remote`).
    Gateways,
    /// One endpoint, at its own address (`flat`).
    Endpoint(Block),
}

impl CidKey {
    /// Of an [across key](LinkKey::across_key), which the target holds: the key of one prober, which holds nothing else. So
    /// the target needs no table of probers, and a stolen prober can't speak for another one.
    ///
    /// SipHash-2-4 with 128 bits: a snapshot needs thousands, and a datagram's MAC is no stronger.
    pub fn of_prober(&self, tag: ClusterTag, block: Block) -> CidKey {
        let mut hasher = SipHasher24::new_with_key(self.as_bytes());
        hasher.write(b"tombolo prober");
        hasher.write(&tag.value().to_be_bytes());
        hasher.write(&block.value().to_be_bytes());
        CidKey::from_bytes(hasher.finish128().as_bytes())
    }
}

/// Derived keys of consecutive hours.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeyRing(BTreeMap<Hour, CidKey>);

impl KeyRing {
    /// `hours` keys from `first` on.
    pub fn derive(first: Hour, hours: usize, key_of: impl Fn(Hour) -> CidKey) -> Self {
        Self((first.0..first.0.saturating_add(hours as u64)).map(|h| (Hour(h), key_of(Hour(h)))).collect())
    }
    /// One key, whatever the hour: of whoever is judged by no hour.
    pub fn constant(since_unix_epoch: Duration, key: &CidKey) -> Self {
        Self::derive_now(since_unix_epoch, |_| key.clone())
    }
    /// The same hours, each key turned into another.
    pub fn map(&self, key_of: impl Fn(&CidKey) -> CidKey) -> Self {
        Self(self.0.iter().map(|(hour, key)| (*hour, key_of(key))).collect())
    }
    /// The ring handed out at `now`: two hours back, a day ahead.
    pub fn derive_now(since_unix_epoch: Duration, key_of: impl Fn(Hour) -> CidKey) -> Self {
        Self::derive(Hour::at(since_unix_epoch).ring_start(), HOURS_BEHIND + 1 + HOURS_AHEAD, key_of)
    }
    pub fn at(&self, hour: Hour) -> Option<&CidKey> {
        self.0.get(&hour)
    }
    /// The hour and key to mint with now; `None` when the clock has run past the ring's end.
    pub fn current(&self, since_unix_epoch: Duration) -> Option<(Hour, &CidKey)> {
        let now = Hour::at(since_unix_epoch);
        self.0.get_key_value(&now).map(|(hour, key)| (*hour, key))
    }
    pub fn for_phase(&self, phase: Phase, since_unix_epoch: Duration) -> Option<&CidKey> {
        self.at(phase.hour(since_unix_epoch))
    }
    pub fn first_hour(&self) -> Option<Hour> {
        self.0.first_key_value().map(|(hour, _)| *hour)
    }
    pub fn last_hour(&self) -> Option<Hour> {
        self.0.last_key_value().map(|(hour, _)| *hour)
    }
    pub fn iter(&self) -> impl Iterator<Item = (Hour, &CidKey)> {
        self.0.iter().map(|(hour, key)| (*hour, key))
    }
    pub fn to_wire(&self) -> v1::KeyRing {
        v1::KeyRing {
            first_hour: self.first_hour().map_or(0, |h| h.0),
            keys: self.0.values().map(|key| key.as_bytes().to_vec()).collect(),
        }
    }
    pub fn from_wire(wire: &v1::KeyRing) -> Result<Self, FieldError> {
        if wire.keys.len() > MAX_RING {
            return Err(FieldError::new("keys", wire.keys.len(), format!("at most {MAX_RING} keys")));
        }
        let mut ring = BTreeMap::new();
        for (index, key) in wire.keys.iter().enumerate() {
            let hour = Hour(wire.first_hour.saturating_add(index as u64));
            ring.insert(hour, CidKey::from_bytes(convert::bytes("keys", key)?));
        }
        Ok(Self(ring))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(494_222 * 3600 + 1800);

    #[test]
    fn a_phase_stands_for_one_of_n_minus_2_to_n_plus_1() {
        for offset in [-2i64, -1, 0, 1] {
            let hour = Hour((494_222 + offset) as u64);
            assert_eq!(hour.phase().hour(NOW), hour);
        }
        assert_ne!(Hour(494_224).phase().hour(NOW), Hour(494_224));
    }

    #[test]
    fn keys_differ_by_target_hour_and_every_part_of_a_binding() {
        let link = LinkKey::from_bytes([7; 32]);
        let binding = |handle, importer: &str, service: &str, uid| HandleBinding {
            handle: Handle::from_u32(handle),
            importer: importer.parse().unwrap(),
            service: service.into(),
            export_uid: [uid; 16],
        };
        let base = link.handle_key(&binding(300, "east", "shop/web", 1), Hour(1));
        for other in [
            link.handle_key(&binding(301, "east", "shop/web", 1), Hour(1)),
            link.handle_key(&binding(300, "eas", "tshop/web", 1), Hour(1)),
            link.handle_key(&binding(300, "east", "shop/api", 1), Hour(1)),
            link.handle_key(&binding(300, "east", "shop/web", 2), Hour(1)),
            link.handle_key(&binding(300, "east", "shop/web", 1), Hour(5)),
            LinkKey::from_bytes([8; 32]).handle_key(&binding(300, "east", "shop/web", 1), Hour(1)),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn both_sides_derive_one_key_of_first_contact_and_nobody_elses() {
        let tag = |n| ClusterTag::new(n).unwrap();
        let key = LinkKey::first_contact("acme.example", tag(1), tag(2));
        assert_eq!(key, LinkKey::first_contact("acme.example", tag(2), tag(1)));
        assert_ne!(key, LinkKey::first_contact("acme.example", tag(1), tag(3)));
        assert_ne!(key, LinkKey::first_contact("other.example", tag(1), tag(2)));
    }

    #[test]
    fn across_keys_differ_by_target_prober_and_hour() {
        let link = LinkKey::from_bytes([7; 32]);
        let (east, west) = (ClusterTag::new(1).unwrap(), ClusterTag::new(2).unwrap());
        let block = |n| Block::new(n).unwrap();
        let key = |tag, target, hour, prober: Block| {
            link.across_key(tag, target, Hour(hour)).of_prober(east, prober).as_bytes().to_owned()
        };
        let all = [
            key(west, AcrossTarget::Gateways, 1, block(5)),
            key(east, AcrossTarget::Gateways, 1, block(5)),
            key(west, AcrossTarget::Endpoint(block(0)), 1, block(5)),
            key(west, AcrossTarget::Endpoint(block(9)), 1, block(5)),
            key(west, AcrossTarget::Gateways, 2, block(5)),
            key(west, AcrossTarget::Gateways, 1, block(6)),
        ];
        assert_eq!(std::collections::HashSet::from(all).len(), all.len());
    }

    #[test]
    fn a_ring_round_trips_and_serves_the_phases_around_now() {
        let cluster = ClusterKey::from_bytes([3; 32]);
        let block = Block::new(5).unwrap();
        let ring = KeyRing::derive_now(NOW, |hour| cluster.endpoint_key(block, hour));
        assert_eq!(ring.iter().count(), 27);
        let back = KeyRing::from_wire(&ring.to_wire()).unwrap();
        assert_eq!(back, ring);
        assert_eq!(
            ring.for_phase(Hour::at(NOW).phase(), NOW),
            Some(&cluster.endpoint_key(block, Hour::at(NOW)))
        );
        assert!(KeyRing::from_wire(&v1::KeyRing { first_hour: 0, keys: vec![vec![1; 15]] }).is_err());
    }

    #[test]
    fn keys_never_show_in_debug_output() {
        assert_eq!(format!("{:?}", LinkKey::from_bytes([7; 32])), "LinkKey(..)");
    }
}
