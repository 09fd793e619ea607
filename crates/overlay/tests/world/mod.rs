//! Overlays of one cluster on loopback, with an offline root, intermediates and leaves made for the test.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // shared by several tests; a panic is a test's failure

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::{BundleSet, SpiffeId, Svid, SvidHandle, tls};
use tombolo_model::ids::{Block, ClusterTag, Handle, Incarnation};
use tombolo_model::names::ClusterName;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::keys::{ClusterKey, HandleBinding, KeyRing, LinkKey};
use tombolo_overlay::routes::Routes;
use tombolo_overlay::{
    DialTarget, HandleClass, Inbound, InboundHandle, Limits, Overlay, OverlayConfig, ServerTls,
};
use tombolo_runtime::clock;
use tombolo_runtime::tasks::TaskGroup;

pub const HANDLE: Handle = Handle::JOIN; // any number will do without a gateway in between

pub struct World {
    pub root: RootAuthority,
    pub issuer: LeafIssuer,
    pub cluster_key: ClusterKey,
    pub link_key: LinkKey,
    pub name: ClusterName,
    pub tag: ClusterTag,
    pub tasks: TaskGroup,
    pub dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::since_unix_epoch();
        let mut root = RootAuthority::init(dir.path(), "acme.example".parse().unwrap(), now).unwrap();
        let name: ClusterName = "east".parse().unwrap();
        let material = root.sign_cluster(&name, Existing::Refuse, now).unwrap();
        let tag = material.tag;
        Self {
            root,
            issuer: LeafIssuer::new(material).unwrap(),
            cluster_key: ClusterKey::generate(),
            link_key: LinkKey::generate(),
            name,
            tag,
            tasks: TaskGroup::new(),
            dir,
        }
    }

    pub fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::workload(&self.issuer.material.trust_domain, &self.name, "shop", account).unwrap()
    }

    /// A fresh leaf, with the bundles that its holder judges peers by.
    pub fn issue(&self, account: &str, life: Duration, bundles: BundleSet) -> Svid {
        let key = KeyAndCsr::generate().unwrap();
        let now = clock::since_unix_epoch();
        let leaf = self.issuer.issue(&key.csr_der, &self.id(account), life, now).unwrap();
        Svid::new(&key.key_der, leaf.chain, bundles).unwrap()
    }

    pub fn bundles(&self) -> BundleSet {
        BundleSet::of(self.issuer.material.bundle.clone())
    }

    pub fn svid(&self, account: &str) -> SvidHandle {
        SvidHandle::new(self.issue(account, LEAF_LIFE, self.bundles()))
    }

    pub fn overlay(&self, block: u32, incarnation: u8, svid: &SvidHandle) -> Overlay {
        self.overlay_with(block, incarnation, svid, Limits::default())
    }

    pub fn overlay_with(&self, block: u32, incarnation: u8, svid: &SvidHandle, limits: Limits) -> Overlay {
        let block = Block::new(block).unwrap();
        let keys =
            KeyRing::derive_now(clock::since_unix_epoch(), |h| self.cluster_key.endpoint_key(block, h));
        let mesh = tls::mesh_server_config(svid).unwrap();
        let config = OverlayConfig {
            tag: self.tag,
            endpoint: block.endpoint(Incarnation::new(incarnation).unwrap()),
            keys,
            kind: Kind::Endpoint,
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            registers: false,
            learns: false,
            server: Some(ServerTls { mesh, join: None }),
            svid: Some(svid.clone()),
            limits,
        };
        Overlay::bind(config, &self.tasks).unwrap()
    }

    pub fn target(&self) -> DialTarget {
        let binding = HandleBinding {
            handle: HANDLE,
            importer: self.name.clone(),
            service: "shop/web".into(),
            export_uid: [1; 16],
        };
        let keys = KeyRing::derive_now(clock::since_unix_epoch(), |h| self.link_key.handle_key(&binding, h));
        DialTarget { kind: Kind::Service, tag: self.tag, handle: HANDLE, keys: Arc::new(keys) }
    }

    pub fn inbound(&self, importer: &str) -> Inbound {
        let handle = InboundHandle {
            class: HandleClass::Mesh,
            importer: Some(importer.parse().unwrap()),
            service: "shop/web".into(),
        };
        Inbound { handles: [(HANDLE, handle)].into() }
    }

    /// Everyone knows everyone; the handle leads to `servers`.
    pub fn connect(&self, all: &[&Overlay], servers: &[&Overlay]) {
        let endpoints: HashMap<_, _> =
            all.iter().map(|o| (o.endpoint_id().block(), o.local_addr())).collect();
        for overlay in all {
            let mut routes = Routes::empty(self.tag);
            routes.endpoints = endpoints.clone();
            routes.services.insert(HANDLE, servers.iter().map(|o| o.endpoint_id()).collect());
            overlay.set_routes(routes);
        }
    }
}

pub async fn eventually(what: &str, check: impl Fn() -> bool) {
    for _ in 0..500 {
        if check() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 5 s: {what}");
}
