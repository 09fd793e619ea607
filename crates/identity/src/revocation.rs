//! Which identities nobody accepts any more. Pure.
//!
//! A [`Revocations`] set stands in the [`BundleSet`](crate::BundleSet) that peers are judged by, so that handshakes,
//! re-attestations and live connections all ask the same one. Each cluster's federator revokes identities of its own
//! cluster for everybody; what it says of others holds in its own cluster alone. That is decided before the set is made.

use std::collections::HashMap;
use std::sync::Arc;

use tombolo_model::names::ClusterName;
use tombolo_model::resource::revocation::trimmed_serial;

use crate::spiffe_id::SpiffeId;
use crate::verify::PeerIdentity;

/// What one revocation is about.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    SpiffeId(SpiffeId),
    /// A certificate, by the cluster that issued it and its serial number without leading zeros.
    Serial {
        cluster: ClusterName,
        serial: Vec<u8>,
    },
    /// Everything that the machine or gateway of this name holds: `/vm/NAME` and `/gateway/NAME`.
    Node {
        cluster: ClusterName,
        name: String,
    },
    Cluster(ClusterName),
}

impl Target {
    /// The cluster whose identities it is about; `None` for an ID of no cluster, which nobody holds.
    pub fn cluster(&self) -> Option<ClusterName> {
        match self {
            Self::SpiffeId(id) => id.cluster(),
            Self::Serial { cluster, .. } | Self::Node { cluster, .. } | Self::Cluster(cluster) => {
                Some(cluster.clone())
            }
        }
    }

    /// Whether it is about an identity as such, whatever certificate that shows.
    pub fn names(&self, id: &SpiffeId) -> bool {
        match self {
            Self::SpiffeId(revoked) => revoked == id,
            Self::Node { cluster, name } => {
                id.cluster().as_ref() == Some(cluster) && node_of(id) == Some(name)
            }
            Self::Cluster(cluster) => id.cluster().as_ref() == Some(cluster),
            Self::Serial { .. } => false,
        }
    }
}

/// The machine's or gateway's name in an ID: `/vm/NAME`, `/gateway/NAME`.
fn node_of(id: &SpiffeId) -> Option<&str> {
    let within = id.within_cluster()?;
    let name = within.strip_prefix("/vm/").or_else(|| within.strip_prefix("/gateway/"))?;
    (!name.contains('/')).then_some(name)
}

/// A set of revocations; clones share it. Asking costs four look-ups, whatever its size.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Revocations(Arc<HashMap<Target, Arc<str>>>);

impl Revocations {
    /// From targets and the names of their revocations. The first name of a target stands.
    pub fn new(revocations: impl IntoIterator<Item = (Target, Arc<str>)>) -> Self {
        let mut set = HashMap::new();
        for (target, name) in revocations {
            set.entry(target).or_insert(name);
        }
        Self(Arc::new(set))
    }

    /// The name of a revocation that means `peer`.
    pub fn of(&self, peer: &PeerIdentity) -> Option<&Arc<str>> {
        if self.0.is_empty() {
            return None;
        }
        let cluster = || peer.cluster.clone();
        let by_id = || self.0.get(&Target::SpiffeId(peer.spiffe_id.clone()));
        let by_serial = || {
            let serial = trimmed_serial(&peer.serial).to_vec();
            self.0.get(&Target::Serial { cluster: cluster(), serial })
        };
        let by_node = || {
            let name = node_of(&peer.spiffe_id)?.to_owned();
            self.0.get(&Target::Node { cluster: cluster(), name })
        };
        by_id().or_else(by_serial).or_else(by_node).or_else(|| self.0.get(&Target::Cluster(cluster())))
    }

    /// The name of a revocation that means an identity as such, whatever certificate or token it shows.
    pub fn of_id(&self, id: &SpiffeId) -> Option<&Arc<str>> {
        if self.0.is_empty() {
            return None;
        }
        let cluster = id.cluster()?;
        let node = || {
            let name = node_of(id)?.to_owned();
            self.0.get(&Target::Node { cluster: cluster.clone(), name })
        };
        let by_id = self.0.get(&Target::SpiffeId(id.clone()));
        by_id.or_else(node).or_else(|| self.0.get(&Target::Cluster(cluster.clone())))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tombolo_model::ids::ClusterTag;

    use super::*;

    fn peer(cluster: &str, path: &str, serial: &[u8]) -> PeerIdentity {
        PeerIdentity {
            spiffe_id: format!("spiffe://a.example/cluster/{cluster}{path}").parse().unwrap(),
            cluster: cluster.parse().unwrap(),
            tag: ClusterTag::new(1).unwrap(),
            serial: serial.to_vec(),
            not_after: 0,
            chain_hash: [0; 32],
            issuer_spki: [0; 32],
        }
    }

    #[test]
    fn each_target_means_whom_it_names_and_nobody_else() {
        let east = || "east".parse::<ClusterName>().unwrap();
        let cart = peer("east", "/ns/shop/sa/cart", &[0, 0xa1]);
        let db = peer("east", "/vm/db-1", &[2]);
        let gateway = peer("east", "/gateway/db-1", &[3]);
        let namesake = peer("west", "/vm/db-1", &[0xa1]);
        let deeper = peer("east", "/ns/vm/sa/db-1", &[4]);
        let all = [&cart, &db, &gateway, &namesake, &deeper];
        let cases: [(Target, &[&PeerIdentity]); 5] = [
            (Target::SpiffeId(cart.spiffe_id.clone()), &[&cart]),
            (Target::Serial { cluster: east(), serial: vec![0xa1] }, &[&cart]),
            (Target::Node { cluster: east(), name: "db-1".into() }, &[&db, &gateway]),
            (Target::Cluster(east()), &[&cart, &db, &gateway, &deeper]),
            (Target::Cluster("north".parse().unwrap()), &[]),
        ];
        for (target, meant) in cases {
            let set = Revocations::new([(target.clone(), "r".into())]);
            for peer in all {
                let expected = meant.contains(&peer);
                assert_eq!(set.of(peer).is_some(), expected, "{target:?} {}", peer.spiffe_id);
                let by_name = expected && !matches!(target, Target::Serial { .. });
                assert_eq!(target.names(&peer.spiffe_id), by_name, "{target:?} {}", peer.spiffe_id);
                assert_eq!(set.of_id(&peer.spiffe_id).is_some(), by_name, "{target:?} {}", peer.spiffe_id);
            }
        }
        assert!(Revocations::default().of(&cart).is_none());
    }
}
