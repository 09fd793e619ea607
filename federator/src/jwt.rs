//! When this federator's JWT signing keys come and go, and which one signs. Pure.
//!
//! A key is published before it signs, so that linked clusters and workloads know it by then, and stays published until
//! every token that it signed has ended. The keys lie in the store (mode 0600) and nowhere else.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tombolo_identity::jwt::{JwtAuthority, JwtKeyError, JwtSigner, TOKEN_LIFE};
use tombolo_model::names::ClusterName;
use tombolo_proto::convert::FieldError;
use tombolo_proto::v1;

use crate::facts::Facts;
use crate::revocations;
use crate::store::{Record, Table};

/// Key of the one record with signing keys, in [`Table::Meta`].
pub const KEYS: &str = "jwt-keys";
/// Key of the record by which peers are told.
pub const AUTHORITIES: &str = "jwt-authorities";
/// A key that leaked unnoticed is of no use after a month.
const KEY_LIFE: Duration = Duration::from_secs(30 * 86_400);
/// Known everywhere by then: a peer that is cut off for longer takes new tokens when it is back.
const PUBLISHED_FIRST: Duration = Duration::from_secs(3600);
/// After its successor has taken over: the life of a token, and ten minutes for clocks that differ.
const KEPT_AFTER: Duration = Duration::from_secs(TOKEN_LIFE.as_secs() + 600);
/// Of one peer: two at a time is usual.
const MAX_AUTHORITIES: usize = 8;

/// The signing keys on disk.
#[derive(Serialize, Deserialize)]
pub struct JwtKeysRecord {
    pub keys: Vec<JwtKeyRecord>,
}
impl Record for JwtKeysRecord {
    const TABLE: Table = Table::Meta;
}

#[derive(Serialize, Deserialize)]
pub struct JwtKeyRecord {
    /// PKCS#8 DER, hex.
    pub pkcs8: String,
    pub made_unix: u64,
}

/// The signing keys, oldest first.
#[derive(Debug, Default)]
pub struct JwtKeys(Vec<(u64, JwtSigner)>);

impl JwtKeys {
    pub fn from_record(record: &JwtKeysRecord, cluster: &ClusterName) -> Result<Self, JwtKeyError> {
        let read = |key: &JwtKeyRecord| {
            let pkcs8 = hex::decode(&key.pkcs8).map_err(|e| JwtKeyError::Key(e.to_string()))?;
            Ok((key.made_unix, JwtSigner::from_pkcs8(cluster.clone(), &pkcs8)?))
        };
        Ok(Self(record.keys.iter().map(read).collect::<Result<_, _>>()?))
    }

    pub fn to_record(&self) -> JwtKeysRecord {
        let key = |(made_unix, signer): &(u64, JwtSigner)| JwtKeyRecord {
            pkcs8: hex::encode(signer.pkcs8()),
            made_unix: *made_unix,
        };
        JwtKeysRecord { keys: self.0.iter().map(key).collect() }
    }

    pub fn authorities(&self) -> Vec<JwtAuthority> {
        self.0.iter().map(|(_, signer)| signer.authority().clone()).collect()
    }

    /// The place of the key that signs at `unix`: the newest that has been published for long enough, else the oldest.
    fn active(&self, unix: u64) -> usize {
        let known = |made: u64| made.saturating_add(PUBLISHED_FIRST.as_secs()) <= unix;
        self.0.iter().rposition(|(made, _)| known(*made)).unwrap_or(0)
    }

    /// The key that signs at `unix`.
    pub fn signer(&self, unix: u64) -> Option<&JwtSigner> {
        self.0.get(self.active(unix)).map(|(_, signer)| signer)
    }

    /// Whether there is anything to do at `unix`.
    pub fn is_due(&self, unix: u64) -> bool {
        self.wants_another(unix) || self.outlived(unix) > 0
    }

    fn wants_another(&self, unix: u64) -> bool {
        self.0.last().is_none_or(|(made, _)| made.saturating_add(KEY_LIFE.as_secs()) <= unix)
    }

    /// How many of the oldest keys nobody needs any more.
    fn outlived(&self, unix: u64) -> usize {
        let took_over = |made: u64| made.saturating_add((PUBLISHED_FIRST + KEPT_AFTER).as_secs());
        self.0.iter().rposition(|(made, _)| took_over(*made) <= unix).unwrap_or(0)
    }

    /// The keys as they should be from `unix` on.
    pub fn renewed(&self, cluster: &ClusterName, unix: u64) -> Result<Self, JwtKeyError> {
        let kept = self.to_record().keys.into_iter().skip(self.outlived(unix)).collect();
        let mut keys = Self::from_record(&JwtKeysRecord { keys: kept }, cluster)?;
        if self.wants_another(unix) {
            keys.0.push((unix, JwtSigner::generate(cluster.clone())?));
        }
        Ok(keys)
    }
}

/// An authority on the wire.
pub fn to_wire(authority: &JwtAuthority) -> v1::JwtAuthority {
    v1::JwtAuthority { cluster: authority.cluster().to_string(), public_key: authority.point().to_vec() }
}

/// The authorities that a peer has told of: its own cluster's alone.
pub fn authorities_of(
    peer: &ClusterName,
    wire: &v1::JwtAuthoritiesRecord,
) -> Result<Vec<JwtAuthority>, FieldError> {
    if wire.authorities.len() > MAX_AUTHORITIES {
        let expected = format!("at most {MAX_AUTHORITIES}");
        return Err(FieldError::new("jwt_authorities", wire.authorities.len(), expected));
    }
    let read = |wire: &v1::JwtAuthority| {
        if wire.cluster != peer.as_str() {
            let expected = format!("cluster {peer}");
            return Err(FieldError::new("jwt_authorities.cluster", &wire.cluster, expected));
        }
        JwtAuthority::new(peer.clone(), &wire.public_key)
            .map_err(|e| FieldError::new("jwt_authorities.public_key", hex::encode(&wire.public_key), e))
    };
    wire.authorities.iter().map(read).collect()
}

/// Those that workloads of this cluster believe: its own and those of live links, but of no cluster that is revoked here,
/// by this cluster's word or its own.
pub fn believed(facts: &Facts) -> Vec<&JwtAuthority> {
    let everything = |r: &v1::Revocation| matches!(r.target, Some(v1::revocation::Target::Everything(_)));
    let revoked: BTreeSet<String> =
        revocations::own(facts).map(|(_, r)| r).filter(everything).map(|r| r.cluster).collect();
    let peers = facts.live_links().filter(|link| !revoked.contains(link.peer.as_str()));
    let imports = peers.filter_map(|link| facts.imports.get(&link.peer));
    let theirs = imports.filter(|import| !import.revocations.values().any(everything));
    facts.jwt_authorities.iter().chain(theirs.flat_map(|import| &import.jwt_authorities)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;
    const HOUR: u64 = 3600;

    #[test]
    fn a_key_is_published_before_it_signs_and_after_it_has_signed() {
        let east: ClusterName = "east".parse().unwrap();
        let kid = |keys: &JwtKeys, unix| keys.signer(unix).unwrap().authority().kid().to_owned();
        let start = 1000 * DAY;
        let first = JwtKeys::default().renewed(&east, start).unwrap();
        assert!(!first.is_due(start) && !first.is_due(start + 29 * DAY));
        let old = kid(&first, start);
        assert_eq!(old, kid(&first, start + 29 * DAY), "the only key signs at once");

        let turn = start + 30 * DAY;
        assert!(first.is_due(turn));
        let both = first.renewed(&east, turn).unwrap();
        assert_eq!(both.authorities().len(), 2);
        assert_eq!(kid(&both, turn + HOUR - 1), old, "the new one is not known everywhere yet");
        let new = kid(&both, turn + HOUR);
        assert_ne!(new, old);
        assert!(!both.is_due(turn + HOUR + 899), "tokens of the old one live");
        assert!(both.is_due(turn + HOUR + 900));
        let last = both.renewed(&east, turn + HOUR + 900).unwrap();
        assert_eq!((last.authorities().len(), kid(&last, turn + HOUR + 900)), (1, new));
    }

    #[test]
    fn a_peer_tells_of_its_own_keys_alone() {
        let signer = JwtSigner::generate("west".parse().unwrap()).unwrap();
        let good = to_wire(signer.authority());
        let record = |authorities| v1::JwtAuthoritiesRecord { authorities };
        let west: ClusterName = "west".parse().unwrap();
        assert_eq!(authorities_of(&west, &record(vec![good.clone()])).unwrap(), [signer.authority().clone()]);
        let cases = [
            (vec![v1::JwtAuthority { cluster: "east".into(), ..good.clone() }], "jwt_authorities.cluster"),
            (vec![v1::JwtAuthority { public_key: vec![4; 65], ..good.clone() }], "public_key"),
            (vec![good; 9], "at most 8"),
        ];
        for (authorities, field) in cases {
            let error = authorities_of(&west, &record(authorities)).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
