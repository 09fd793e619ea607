//! Who may open a connection here: the handle in the first packet's original connection ID decides what for.
//!
//! Pure: [`Inbound`] is the snapshot of handles this process serves; [`Inbound::admit`] looks one up. The MAC was
//! checked by the gateway that let the packet in; identity is mTLS's business.

use std::collections::HashMap;
use std::sync::Arc;

use tombolo_model::ids::{ClusterTag, Handle};
use tombolo_model::names::ClusterName;

use crate::cid::{Cid, Kind};
use crate::connection::{HandleClass, Pinned};

/// The handles that this process serves, set whole by its owner.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Inbound {
    pub handles: HashMap<Handle, InboundHandle>,
}

/// What one handle admits.
#[derive(Clone, PartialEq, Debug)]
pub struct InboundHandle {
    pub class: HandleClass,
    /// The cluster it was allotted to; `None`: any (joining).
    pub importer: Option<ClusterName>,
    /// `namespace/name`, or `control`.
    pub service: Arc<str>,
}

/// Why a first packet was ignored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the connection ID is not one of the overlay's")]
    NotOurs,
    #[error("the connection ID is of another cluster")]
    OtherCluster,
    #[error("a first packet must carry a service- or control-kind connection ID")]
    Kind,
    #[error("the handle is not served here")]
    UnknownHandle,
}

impl Refusal {
    /// A metric label.
    pub fn kind(self) -> &'static str {
        match self {
            Self::NotOurs => "not_ours",
            Self::OtherCluster => "other_cluster",
            Self::Kind => "kind",
            Self::UnknownHandle => "unknown_handle",
        }
    }
}

impl Inbound {
    /// What a connection whose first packet went to `original_dcid` may be used for.
    pub fn admit(&self, own: ClusterTag, original_dcid: &[u8]) -> Result<Pinned, Refusal> {
        let cid = Cid::from_bytes(original_dcid).ok_or(Refusal::NotOurs)?;
        if cid.tag_value() != own.value() {
            return Err(Refusal::OtherCluster);
        }
        if !matches!(cid.kind(), Kind::Service | Kind::Control) {
            return Err(Refusal::Kind);
        }
        let handle = self.handles.get(&cid.handle()).ok_or(Refusal::UnknownHandle)?;
        let mesh = matches!(handle.class, HandleClass::Mesh);
        if mesh != (cid.kind() == Kind::Service) {
            return Err(Refusal::Kind);
        }
        Ok(Pinned {
            handle: cid.handle(),
            class: handle.class,
            importer: handle.importer.clone(),
            service: Arc::clone(&handle.service),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{CidKey, Hour};

    #[test]
    fn only_a_served_handle_of_the_right_kind_and_cluster_is_admitted() {
        let own = ClusterTag::new(1).unwrap();
        let handle = |class| InboundHandle { class, importer: None, service: "shop/web".into() };
        let inbound = Inbound {
            handles: [
                (Handle::from_u32(300), handle(HandleClass::Mesh)),
                (Handle::from_u32(301), handle(HandleClass::Control)),
            ]
            .into(),
        };
        let admit = |kind, tag, target| {
            let tag = ClusterTag::new(tag).unwrap();
            let cid = Cid::mint(kind, tag, target, [0; 7], Hour(0), &CidKey::from_bytes([0; 16]));
            inbound.admit(own, cid.as_bytes()).map(|p| p.class)
        };
        assert_eq!(admit(Kind::Service, 1, 300), Ok(HandleClass::Mesh));
        assert_eq!(admit(Kind::Control, 1, 301), Ok(HandleClass::Control));
        assert_eq!(admit(Kind::Service, 1, 301), Err(Refusal::Kind), "control is not reachable as a service");
        assert_eq!(admit(Kind::Endpoint, 1, 300), Err(Refusal::Kind));
        assert_eq!(admit(Kind::Service, 2, 300), Err(Refusal::OtherCluster));
        assert_eq!(admit(Kind::Service, 1, 302), Err(Refusal::UnknownHandle));
        assert_eq!(inbound.admit(own, &[0; 8]).map(drop), Err(Refusal::NotOurs));
    }
}
