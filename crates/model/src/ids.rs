//! The numbers that travel inside connection IDs and sync records.
//!
//! Layout (protocol.md section 1): a cluster tag has 24 bits; a target has 32: for endpoints and joiners a 28-bit
//! block and a 4-bit incarnation, for services and control an allotted handle.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A cluster's 24-bit tag, registered by the root; never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ClusterTag(u32);

impl ClusterTag {
    pub const MAX: u32 = 0x00ff_ffff;

    /// `None` for 0 and for more than 24 bits.
    pub fn new(tag: u32) -> Option<Self> {
        (tag != 0 && tag <= Self::MAX).then_some(Self(tag))
    }
    pub fn value(self) -> u32 {
        self.0
    }
    pub fn to_bytes(self) -> [u8; 3] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [a, b, c]
    }
}
impl<'de> Deserialize<'de> for ClusterTag {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let tag = u32::deserialize(d)?;
        Self::new(tag)
            .ok_or_else(|| serde::de::Error::custom(format!("cluster tag {tag} is not in 1..=16777215")))
    }
}
impl fmt::Display for ClusterTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}
impl fmt::Debug for ClusterTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A 28-bit block of endpoint ids, leased to one holder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Block(u32);

impl Block {
    pub const BITS: u32 = 28;
    pub const MAX: u32 = (1 << Self::BITS) - 1;

    pub fn new(block: u32) -> Option<Self> {
        (block <= Self::MAX).then_some(Self(block))
    }
    pub fn value(self) -> u32 {
        self.0
    }
    pub fn endpoint(self, incarnation: Incarnation) -> EndpointId {
        EndpointId((self.0 << 4) | u32::from(incarnation.0))
    }
}
impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:07x}", self.0)
    }
}
impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One start of a lease holder: 16 per lease and 4 h, so that a restart needs no federator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
pub struct Incarnation(u8);

impl Incarnation {
    pub const COUNT: u8 = 16;
    pub fn new(incarnation: u8) -> Option<Self> {
        (incarnation < Self::COUNT).then_some(Self(incarnation))
    }
    pub fn value(self) -> u8 {
        self.0
    }
}

/// A block and an incarnation: one running overlay socket of one cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EndpointId(u32);

impl EndpointId {
    pub fn from_u32(id: u32) -> Self {
        Self(id)
    }
    pub fn value(self) -> u32 {
        self.0
    }
    pub fn block(self) -> Block {
        Block(self.0 >> 4)
    }
    pub fn incarnation(self) -> Incarnation {
        Incarnation((self.0 & 0xf) as u8)
    }
}
impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}
impl fmt::Debug for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Allotted by an exporter per (importing cluster, service); meaningful only together with its cluster's tag.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Handle(u32);

impl Handle {
    /// Control handles for first contact under a shared root begin here: one for each cluster that may call, with its tag in
    /// the lower bits. They are served only while an object names that cluster.
    const FIRST_CONTACTS: u32 = 0xff00_0000;
    /// Reserved control handle for joining with a token.
    pub const JOIN: Handle = Handle(2);
    /// Reserved control handle for renewing an identity that has ended. The nonce of an ID for it begins with the caller's
    /// block, by which it is keyed.
    pub const RENEW: Handle = Handle(3);
    /// Handles below this are reserved and never allotted.
    pub const FIRST_ALLOTTED: u32 = 256;

    pub fn from_u32(handle: u32) -> Self {
        Self(handle)
    }
    pub fn value(self) -> u32 {
        self.0
    }
    /// By which the cluster of this tag makes first contact.
    pub fn first_contact(caller: ClusterTag) -> Self {
        Self(Self::FIRST_CONTACTS | caller.value())
    }
    /// Whether it is one by which some cluster makes first contact: these are not allotted.
    pub fn is_first_contact(self) -> bool {
        self.0 >= Self::FIRST_CONTACTS
    }
    pub fn is_reserved(self) -> bool {
        self.0 < Self::FIRST_ALLOTTED
    }
}
impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A random number drawn when a store is created; revisions are comparable only within one epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
pub struct Epoch(pub u64);

/// A position in a cluster's record log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
pub struct Revision(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_id_is_its_block_and_incarnation() {
        let id = Block::new(0xabc_def0).unwrap().endpoint(Incarnation::new(5).unwrap());
        assert_eq!(id.block().value(), 0xabc_def0);
        assert_eq!(id.incarnation().value(), 5);
        assert_eq!(EndpointId::from_u32(id.value()), id);
    }

    #[test]
    fn out_of_range_numbers_do_not_exist() {
        assert!(ClusterTag::new(0).is_none() && ClusterTag::new(1 << 24).is_none());
        assert!(Block::new(1 << 28).is_none() && Incarnation::new(16).is_none());
    }
}
