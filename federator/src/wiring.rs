//! The federator's own overlay follows the facts: where members are, which handles it serves, its keys, who is revoked.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tombolo_model::ids::{Block, Handle};
use tombolo_overlay::keys::Hour;
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{GatewayHop, HandleClass, Inbound, InboundHandle, Overlay, Routes};

use crate::core::CoreHandle;
use crate::facts::{CONTROL, FIRST_CONTACT, Facts, JOIN, RENEWAL};
use crate::revocations;
use crate::snapshot::across::across;
use crate::snapshot::rings::Rings;
use crate::snapshot::usable_gateways;

/// Keys are looked at this often: they change with the hour, and two hours back are still accepted.
const KEYS: Duration = Duration::from_secs(60);

/// Where the federator sends: members with an address directly, everybody else through its cluster's gateways, or the
/// peer's where a link's egress is remote.
pub fn routes(facts: &Facts, own: Block, rings: &Rings, unix: Duration) -> Routes {
    let mut routes = Routes::empty(facts.cluster.tag);
    let members = facts.registry.members.values().filter_map(|m| Some((m.block, m.address?)));
    let gateways = facts.registry.gateways.values().filter_map(|gateway| {
        let (id, address) = gateway.endpoint?;
        Some((id.block(), address?))
    });
    routes.endpoints = members.chain(gateways).collect();
    routes.gateways = usable_gateways(facts)
        .map(|gateway| GatewayHop { name: gateway.name.clone(), ..GatewayHop::at(gateway.inner) })
        .collect();
    routes.across = across(facts, own, None, rings, unix);
    routes
}

/// The handles that the federator serves: its control handles, one per importing cluster, those of clusters that are to be
/// linked by objects, the join handle, and that of members that come back.
pub fn inbound(facts: &Facts) -> Inbound {
    let mut handles = HashMap::new();
    for record in facts.handles.values().filter(|r| r.service == CONTROL && r.released.is_none()) {
        let handle = InboundHandle {
            class: HandleClass::Control,
            importer: Some(record.importer.clone()),
            service: Arc::from(CONTROL),
        };
        handles.insert(record.handle, handle);
    }
    for contact in facts.pending_contacts() {
        let handle = InboundHandle {
            class: HandleClass::FirstContact,
            importer: Some(contact.peer.clone()),
            service: Arc::from(FIRST_CONTACT),
        };
        handles.insert(Handle::first_contact(contact.tag), handle);
    }
    let join = InboundHandle { class: HandleClass::Join, importer: None, service: Arc::from(JOIN) };
    handles.insert(Handle::JOIN, join);
    let renewal = InboundHandle {
        class: HandleClass::Renewal,
        importer: Some(facts.cluster.name.clone()),
        service: Arc::from(RENEWAL),
    };
    handles.insert(Handle::RENEW, renewal);
    Inbound { handles }
}

/// Enforces what is revoked on the own connections, and says when. Until the core is gone.
pub async fn enforce(core: CoreHandle, overlay: Overlay, enforcer: Enforcer) {
    let mut facts = core.watch();
    loop {
        let current = facts.borrow_and_update().clone();
        for error in enforcer.learn(&revocations::in_force(&current)) {
            tracing::warn!(%error, "a revocation can't be enforced");
        }
        enforcer.enforce(&overlay, || core.now().unix).await;
        let enforced = enforcer.untold();
        if !enforced.is_empty() {
            let known = enforced.iter().map(|e| (e.revocation.clone(), e.at_unix_ms)).collect();
            if core.call(|core, moment| core.enforced(known, moment)).await.is_err() {
                return;
            }
            enforcer.told(&enforced);
        }
        if facts.changed().await.is_err() {
            return;
        }
    }
}

/// Until the core is gone.
pub async fn follow(core: CoreHandle, overlay: Overlay) {
    let mut facts = core.watch();
    let rings = Rings::default();
    let mut keys_of = None;
    loop {
        let current = facts.borrow_and_update().clone();
        let own = overlay.endpoint_id().block();
        overlay.set_routes(routes(&current, own, &rings, core.now().unix));
        overlay.set_inbound(inbound(&current));
        let hour = Hour::at(core.now().unix);
        if keys_of != Some(hour)
            && let Ok(keys) = core.call(move |core, moment| core.block_keys(own, moment)).await
        {
            overlay.set_keys(keys);
            keys_of = Some(hour);
        }
        if let Ok(Err(_)) = tokio::time::timeout(KEYS, facts.changed()).await {
            return;
        }
    }
}
