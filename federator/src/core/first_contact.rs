//! Links by objects: a `ClusterLink` on each side that names the other cluster, its tag and its gateways (ADR 24).
//!
//! Of two such clusters the one with the lower tag asks, over mTLS under the shared root. Who asks is what its certificate
//! says, and it gets a link only if an object here names exactly that (name, tag). What follows is a link as a token makes it;
//! it ends with the object on either side, and the other side's object waits again.
//!
//! The one that is asked stores the link before it answers. Until the other has shown that it got the answer, the link is
//! unconfirmed, and given up after [`CONFIRMED`]; likewise one whose peer was not heard for a whole lease: whatever happened
//! there, both begin anew.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::PeerIdentity;
use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use tombolo_model::resource::{Object, Spec};
use tombolo_model::sync::Freshness;
use tombolo_overlay::keys::LinkKey;
use tombolo_proto::v1;

use super::links::{link_event, requester_of};
use super::{Core, CoreError, Moment};
use crate::facts::{FirstContact, Link};
use crate::linking::{self, VerifiedParty};
use crate::store::Transaction;

/// The peer dials within seconds of its answer; this covers gateways that learn of the link late.
const CONFIRMED: Duration = Duration::from_secs(30);
/// Of what a peer or the network said.
const MAX_ERROR: usize = 300;

impl Core {
    /// A link to itself would be asked for for ever.
    pub(super) fn check_link_object(&self, object: &Object) -> Result<(), CoreError> {
        let Spec::ClusterLink(spec) = &object.spec else { return Ok(()) };
        let own = &self.facts.cluster;
        let peer = spec.cluster.as_deref().unwrap_or(&object.metadata.name);
        match spec.links() {
            Some(_) if peer == own.name.as_str() => Err(CoreError::Invalid(format!(
                "field spec.cluster: {peer} is this cluster itself: name the other one"
            ))),
            Some(tag) if tag == own.tag => Err(CoreError::Invalid(format!(
                "field spec.tag: {tag} is this cluster's own: give the tag that `tombolo status` shows in {peer}"
            ))),
            _ => Ok(()),
        }
    }

    /// Objects about links have changed: links that no object makes any more end, and nobody is asked for them.
    pub(super) fn follow_link_objects(&mut self, moment: Moment) -> Result<(), CoreError> {
        let unwanted =
            |link: &&Arc<Link>| link.by_object && self.facts.linked_by_object(&link.peer) != Some(link.tag);
        let ended: Vec<ClusterName> =
            self.facts.links.values().filter(unwanted).map(|link| link.peer.clone()).collect();
        for peer in ended {
            self.end_link(&peer, Action::Unlink, moment)?;
            self.dirty = true;
        }
        let before = self.facts.first_contacts.len();
        let mut contacts = std::mem::take(&mut self.facts.first_contacts);
        contacts.retain(|peer, contact| self.facts.linked_by_object(peer) == Some(contact.tag));
        self.dirty |= contacts.len() != before;
        self.facts.first_contacts = contacts;
        Ok(())
    }

    /// Where the gateways of a cluster are that an object is to link. `failed`: why it is not linked yet.
    pub fn set_first_contact(
        &mut self,
        peer: &ClusterName,
        gateways: Option<Vec<SocketAddr>>,
        failed: Option<String>,
    ) {
        let Some(tag) = self.facts.linked_by_object(peer) else { return };
        let before = self.facts.first_contacts.get(peer).filter(|contact| contact.tag == tag);
        let known = before.map(|contact| (**contact).clone());
        let mut contact = known.unwrap_or_else(|| FirstContact {
            peer: peer.clone(),
            tag,
            gateways: Vec::new(),
            last_error: String::new(),
        });
        if let Some(gateways) = gateways {
            contact.gateways = gateways;
        }
        if let Some(failed) = failed {
            contact.last_error = failed.chars().take(MAX_ERROR).collect();
        }
        if before.is_none_or(|before| **before != contact) {
            self.facts.first_contacts.insert(peer.clone(), Arc::new(contact));
            self.dirty = true;
        }
    }

    /// The asking side, before it dials: what it says of itself. `chain`: the federator's own, with the root last.
    pub fn begin_contact(
        &mut self,
        peer: &ClusterName,
        chain: Vec<Vec<u8>>,
    ) -> Result<v1::LinkParty, CoreError> {
        let tag = self.tag_of_object(peer)?;
        self.check_pins(peer, tag)?;
        let (control, transaction) = self.control_handle(peer, Transaction::new())?;
        if !transaction.is_empty() {
            self.store.commit(&transaction)?;
        }
        self.install_handle(control.clone());
        Ok(self.party(&control, chain))
    }

    fn tag_of_object(&self, peer: &ClusterName) -> Result<ClusterTag, CoreError> {
        self.facts.linked_by_object(peer).ok_or_else(|| {
            CoreError::Denied(format!(
                "no ClusterLink object in {} is to link {peer}: it needs cluster, tag and gateways",
                self.facts.cluster.name
            ))
        })
    }

    /// The side that is asked: `caller` is what the certificate says, `party` what it says of itself, verified.
    pub fn link_by_object(
        &mut self,
        caller: &PeerIdentity,
        party: &VerifiedParty,
        chain: Vec<Vec<u8>>,
        moment: Moment,
    ) -> Result<v1::JoinLinkResponse, CoreError> {
        if (&party.cluster, party.tag) != (&caller.cluster, caller.tag) {
            return Err(CoreError::Denied(format!(
                "{} says to be {} ({})",
                caller.spiffe_id, party.cluster, party.tag
            )));
        }
        if !party.federator_ids.contains(&caller.spiffe_id) {
            return Err(CoreError::Denied(format!(
                "{} is not a federator of {}",
                caller.spiffe_id, party.cluster
            )));
        }
        let peer = &party.cluster;
        let expected = self.tag_of_object(peer)?;
        if expected != party.tag {
            return Err(CoreError::Denied(format!(
                "the ClusterLink object in {} is about {peer} with tag {expected}, not {}",
                self.facts.cluster.name, party.tag
            )));
        }
        let before =
            self.facts.links.get(peer).filter(|link| link.by_object && link.tag == party.tag).cloned();
        if before.is_none() {
            self.check_pins(peer, party.tag)?;
        }
        // Its answer was lost, or it lost what it knew: the same key, what it says of itself anew.
        let key = before.as_ref().and_then(|link| link.link_key()).unwrap_or_else(LinkKey::generate);
        let (control, transaction) = self.control_handle(peer, Transaction::new())?;
        let made = self.link_of(party, &key, moment);
        let created_unix = before.as_ref().map_or(made.created_unix, |link| link.created_unix);
        let link = Link { by_object: true, unconfirmed: true, created_unix, ..made };
        let transaction = transaction.put(peer.as_str(), &link);
        let event = Event { requester: Requester::identity(requester_of(party)), ..by_object(party) };
        self.commit_audited(transaction, event, moment)?;
        self.install_handle(control.clone());
        self.install_link(link);
        tracing::info!(%peer, tag = %party.tag, "linked by objects on both sides");
        Ok(v1::JoinLinkResponse {
            inviter: Some(self.party(&control, chain)),
            link_key: key.as_bytes().to_vec(),
        })
    }

    /// The asking side, with the answer.
    pub fn finish_contact(
        &mut self,
        peer: &VerifiedParty,
        key: &LinkKey,
        moment: Moment,
    ) -> Result<(), CoreError> {
        // The object may have gone meanwhile.
        let expected = self.tag_of_object(&peer.cluster)?;
        if expected != peer.tag {
            return Err(CoreError::Denied(format!(
                "{} has the tag {}, not {expected}",
                peer.cluster, peer.tag
            )));
        }
        let link = Link { by_object: true, ..self.link_of(peer, key, moment) };
        let transaction = Transaction::new().put(peer.cluster.as_str(), &link);
        self.commit_audited(transaction, by_object(peer), moment)?;
        self.install_link(link);
        tracing::info!(peer = %peer.cluster, tag = %peer.tag, "linked by objects on both sides");
        Ok(())
    }

    /// The peer dials with the keys of the link: it has got the answer.
    pub fn confirm_link(&mut self, peer: &ClusterName) {
        let Some(link) = self.facts.links.get(peer).filter(|link| link.unconfirmed) else { return };
        let confirmed = Link { unconfirmed: false, ..(**link).clone() };
        if let Err(error) = self.store.commit(&Transaction::new().put(peer.as_str(), &confirmed)) {
            tracing::warn!(%error, %peer, "that a link is confirmed can't be stored yet");
            return;
        }
        self.facts.links.insert(peer.clone(), Arc::new(confirmed));
        self.dirty = true;
    }

    /// Gives up links by objects that the peer does not know of any more, so that both sides begin anew.
    pub fn review_links(&mut self, moment: Moment) -> Result<(), CoreError> {
        // What was to end when an object went, and could not be stored then.
        self.follow_link_objects(moment)?;
        let late = |link: &Link| {
            link.unconfirmed && moment.unix.as_secs() > link.created_unix.saturating_add(CONFIRMED.as_secs())
        };
        let lost = |link: &Link| {
            let import = self.facts.imports.get(&link.peer);
            import.is_some_and(|i| i.heard.is_some() && i.freshness == Freshness::Expired)
        };
        let links = self.facts.links.values().filter(|link| link.by_object && (late(link) || lost(link)));
        let given_up: Vec<ClusterName> = links.map(|link| link.peer.clone()).collect();
        for peer in given_up {
            tracing::warn!(%peer, "the peer does not answer on this link: both sides' objects link anew");
            self.end_link(&peer, Action::LinkEnded, moment)?;
            self.dirty = true;
        }
        Ok(())
    }
}

fn by_object(party: &VerifiedParty) -> Event {
    Event { reason: format!("tag {}; by ClusterLink objects on both sides", party.tag), ..link_event(party) }
}

/// Checks what a caller says of itself against what its certificate says, and answers.
pub fn answer(
    core: &mut Core,
    caller: &PeerIdentity,
    party: &v1::LinkParty,
    chain: Vec<Vec<u8>>,
    moment: Moment,
) -> Result<v1::JoinLinkResponse, CoreError> {
    // Where our own gateways are on loopback, so may the peer's be.
    let loopback = core.facts.registry.gateways.values().any(|gateway| gateway.border.ip().is_loopback());
    let verified = linking::verify_party(party, &core.facts, loopback, moment.unix)?;
    core.link_by_object(caller, &verified, chain, moment)
}
