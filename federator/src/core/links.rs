//! Links: made from a token by both sides, ended by either.
//!
//! The inviter stores the link before it answers, the joiner when the answer has come; each allots the control handle
//! that the other dials its federators by. Both pin (name, tag): a cluster of a linked name with another tag is
//! `ClusterRecreated` until `link accept` drops what is known of the old one.

use std::collections::BTreeSet;
use std::sync::Arc;

use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::ids::ClusterTag;
use tombolo_model::names::ClusterName;
use tombolo_overlay::keys::{HandleBinding, LinkKey};
use tombolo_proto::v1;

use super::tokens::request_hash;
use super::{Core, CoreError, Moment};
use crate::facts::{CONTROL, ControlHandle, HandleRecord, Import, Link, PeerGateway, Role, TokenPurpose};
use crate::linking::{self, VerifiedParty};
use crate::store::{Table, Transaction};

/// Where both sides' signatures say what they are for.
pub const PROOF_LABEL: &str = "link party";

/// What `unlink` removed, for people.
#[derive(Clone, Debug, Default)]
pub struct Unlinked {
    pub existed: bool,
    pub removed: Vec<String>,
}

impl Core {
    pub(super) fn check_not_linked(&self, peer: &ClusterName) -> Result<(), CoreError> {
        match self.facts.links.get(peer) {
            Some(link) if link.is_live() => Err(CoreError::Precondition(format!(
                "{peer} is linked already: `tombolo unlink {peer}` first if it is to be linked anew"
            ))),
            _ => Ok(()),
        }
    }

    /// A peer that wants to link: its name and tag must be new here, or those that are pinned.
    pub(super) fn check_pins(&mut self, peer: &ClusterName, tag: ClusterTag) -> Result<(), CoreError> {
        let own = &self.facts.cluster;
        if *peer == own.name {
            return Err(CoreError::Precondition(format!(
                "both sides are called {peer}: names are unique in a federation; make the cluster anew under another name"
            )));
        }
        if tag == own.tag {
            return Err(CoreError::Precondition(format!(
                "both clusters have the tag {tag}: they were signed by different registers of the root; make one anew with `tombolo trust cluster --recreate`"
            )));
        }
        if let Some(other) = self.facts.links.values().find(|link| link.tag == tag && link.peer != *peer) {
            return Err(CoreError::Precondition(format!(
                "{} is linked with the tag {tag} already: two clusters with one tag can't be linked",
                other.peer
            )));
        }
        match self.facts.links.get(peer).cloned() {
            Some(link) if link.tag != tag => {
                let marked = Link { recreated: Some(tag), ..(*link).clone() };
                self.store.commit(&Transaction::new().put(peer.as_str(), &marked))?;
                self.facts.links.insert(peer.clone(), Arc::new(marked));
                self.dirty = true;
                Err(CoreError::Precondition(format!(
                    "ClusterRecreated: {peer} was linked with tag {} and has tag {tag} now: `tombolo link accept {peer}` drops what is known of the old one",
                    link.tag
                )))
            }
            _ => self.check_not_linked(peer),
        }
    }

    /// The handle by which `peer` may dial this side's federators; allotted if there is none.
    pub(super) fn control_handle(
        &self,
        peer: &ClusterName,
        transaction: Transaction,
    ) -> Result<(HandleRecord, Transaction), CoreError> {
        if let Some(known) = self.facts.handle(peer, CONTROL) {
            return Ok((known.clone(), transaction));
        }
        let record = self.new_handle(peer, CONTROL, &BTreeSet::new())?;
        let transaction = Self::put_handle(transaction, &record);
        Ok((record, transaction))
    }

    pub(super) fn party(&self, control: &HandleRecord, chain: Vec<Vec<u8>>) -> v1::LinkParty {
        let cluster = &self.facts.cluster;
        v1::LinkParty {
            cluster: cluster.name.to_string(),
            tag: cluster.tag.value(),
            ca_chain_der: chain,
            trust_bundle_json: self.facts.trust.bundle_json.clone(),
            gateways: crate::snapshot::gateways_for(&self.facts, Role::Vm),
            control: Some(control.binding().to_wire()),
            federator_ids: vec![cluster.federator_id.to_string()],
            properties: cluster.properties.clone().into_iter().collect(),
        }
    }

    /// The joiner's side, before it dials: its party and the proof that the cluster's CA stands behind it. `chain`: the
    /// federator's own, with the root last.
    pub fn begin_link(
        &mut self,
        peer: &ClusterName,
        tag: ClusterTag,
        token_id: &str,
        chain: Vec<Vec<u8>>,
    ) -> Result<(v1::LinkParty, Vec<u8>), CoreError> {
        self.check_pins(peer, tag)?;
        if !self.has_gateway() {
            return Err(CoreError::Precondition(
                "no gateway is connected, and the link's traffic goes through one: start `tombolo gateway` first"
                    .to_owned(),
            ));
        }
        let (control, transaction) = self.control_handle(peer, Transaction::new())?;
        self.store.commit(&transaction)?;
        self.install_handle(control.clone());
        let party = self.party(&control, chain);
        let proof = self.issuer.sign_record(PROOF_LABEL, &linking::signed_bytes(token_id, &party))?;
        Ok((party, proof))
    }

    /// The joiner's side gave up: the handle goes back.
    pub fn abandon_link(&mut self, peer: &ClusterName, moment: Moment) {
        if self.facts.links.contains_key(peer) {
            return;
        }
        let Some(record) = self.facts.handle(peer, CONTROL).cloned() else { return };
        let record = HandleRecord { released: Some(moment.unix.as_secs()), ..record };
        if self.store.commit(&Self::put_handle(Transaction::new(), &record)).is_ok() {
            self.note_released(&record);
        }
    }

    /// The inviter's side: a token is redeemed by a proven party.
    pub fn join_link(
        &mut self,
        request: &v1::JoinLinkRequest,
        joiner: &VerifiedParty,
        chain: Vec<Vec<u8>>,
        moment: Moment,
    ) -> Result<v1::JoinLinkResponse, CoreError> {
        let hash = request_hash(request);
        let record = self.check_token(&request.token_id, &request.secret, &hash, moment)?;
        let TokenPurpose::Link { peer } = &record.kind else {
            return Err(CoreError::Denied("this is a join token: use it with --join-token-file".to_owned()));
        };
        if *peer != joiner.cluster {
            return Err(CoreError::Denied(format!(
                "the token is for cluster {peer}, not for {}",
                joiner.cluster
            )));
        }
        let repeated = record.used_by.is_some();
        let known = self.facts.links.get(peer).cloned();
        if let (true, Some(link)) = (repeated, &known) {
            // Its answer was lost; everything stands already.
            let control = self.facts.handle(peer, CONTROL).cloned();
            let control =
                control.ok_or_else(|| CoreError::NotFound(format!("{peer} is not linked any more")))?;
            return Ok(v1::JoinLinkResponse {
                inviter: Some(self.party(&control, chain)),
                link_key: hex::decode(&link.key).unwrap_or_default(),
            });
        }
        self.check_pins(peer, joiner.tag)?;
        let (control, transaction) = self.control_handle(peer, Transaction::new())?;
        let key = LinkKey::generate();
        let link = self.link_of(joiner, &key, moment);
        let transaction = transaction.put(peer.as_str(), &link);
        let peer = peer.clone();
        let event = Event {
            token: request.token_id.clone(),
            requester: Requester::identity(requester_of(joiner)),
            ..link_event(joiner)
        };
        let transaction = Self::use_token(transaction, &request.token_id, &record, &hash, None);
        self.commit_audited(transaction, event, moment)?;
        self.install_handle(control.clone());
        self.install_link(link);
        tracing::info!(%peer, tag = %joiner.tag, "linked");
        let response = v1::JoinLinkResponse {
            inviter: Some(self.party(&control, chain)),
            link_key: key.as_bytes().to_vec(),
        };
        Ok(response)
    }

    /// The joiner's side, with the inviter's answer.
    pub fn finish_link(
        &mut self,
        inviter: &VerifiedParty,
        key: &LinkKey,
        moment: Moment,
    ) -> Result<(), CoreError> {
        let link = self.link_of(inviter, key, moment);
        let transaction = Transaction::new().put(inviter.cluster.as_str(), &link);
        self.commit_audited(transaction, link_event(inviter), moment)?;
        self.install_link(link);
        tracing::info!(peer = %inviter.cluster, tag = %inviter.tag, "linked");
        Ok(())
    }

    pub(super) fn link_of(&self, party: &VerifiedParty, key: &LinkKey, moment: Moment) -> Link {
        let VerifiedParty { cluster, tag, federator_ids, control, gateways, properties } = party;
        let loopback = gateways.iter().any(|g: &PeerGateway| g.address.ip().is_loopback());
        Link {
            peer: cluster.clone(),
            tag: *tag,
            key: hex::encode(key.as_bytes()),
            federator_ids: federator_ids.clone(),
            control: ControlHandle { handle: control.handle, export_uid: control.export_uid },
            first_gateways: gateways.clone(),
            properties: properties.clone(),
            created_unix: moment.unix.as_secs(),
            // Our own gateways are on loopback too, or its packets could never get here.
            loopback: loopback && self.facts.registry.gateways.values().any(|g| g.border.ip().is_loopback()),
            recreated: None,
            ended_by_peer: false,
            by_object: false,
            unconfirmed: false,
        }
    }

    pub(super) fn install_link(&mut self, link: Link) {
        let peer = link.peer.clone();
        self.facts.links.insert(peer.clone(), Arc::new(link));
        let import =
            Import { last_error: "linked just now, not connected yet".to_owned(), ..Import::default() };
        self.facts.imports.insert(peer.clone(), Arc::new(import));
        self.restart_watch(&peer);
        self.handles_stale = true;
        self.dirty = true;
    }

    /// Removes a link and everything that came with it.
    pub fn unlink(&mut self, peer: &ClusterName, moment: Moment) -> Result<Unlinked, CoreError> {
        let by_object = self.facts.links.get(peer).is_some_and(|link| link.by_object);
        if by_object && self.facts.linked_by_object(peer).is_some() {
            return Err(CoreError::Precondition(format!(
                "{peer} is linked by a ClusterLink object, and would be linked again at once: delete that (`tombolo get clusterlinks`), or leave gateways out of it"
            )));
        }
        self.end_link(peer, Action::Unlink, moment)
    }

    pub(super) fn end_link(
        &mut self,
        peer: &ClusterName,
        action: Action,
        moment: Moment,
    ) -> Result<Unlinked, CoreError> {
        if !self.facts.links.contains_key(peer) {
            return Ok(Unlinked::default());
        }
        let mut transaction = Transaction::new().delete(Table::Links, peer.as_str());
        transaction = Self::without_import(transaction, peer);
        let mut ended = Vec::new();
        for record in self.facts.handles.values().filter(|record| record.importer == *peer) {
            let record = HandleRecord { released: Some(moment.unix.as_secs()), ..record.clone() };
            transaction = Self::put_handle(transaction, &record);
            ended.push(record);
        }
        self.commit_audited(transaction, Event::done(action, format!("cluster:{peer}")), moment)?;
        let mut removed = Vec::new();
        for record in &ended {
            self.note_released(record);
            if record.service != CONTROL {
                removed.push(format!("export {} to {peer}", record.service));
            }
        }
        self.facts.links.remove(peer);
        self.handles_stale = true;
        if let Some(import) = self.drop_import(peer) {
            removed.extend(import.exports.keys().map(|service| format!("import {service} from {peer}")));
        }
        tracing::info!(%peer, "unlinked");
        Ok(Unlinked { existed: true, removed })
    }

    /// The peer has said that it is no more linked to us: nothing of it is used, and `status` says so.
    pub fn ended_by_peer(&mut self, peer: &ClusterName, moment: Moment) -> Result<(), CoreError> {
        let Some(link) = self.facts.links.get(peer).filter(|link| !link.ended_by_peer) else { return Ok(()) };
        if link.by_object {
            // The object here waits for the peer's again.
            return self.end_link(peer, Action::LinkEnded, moment).map(drop);
        }
        let ended = Link { ended_by_peer: true, ..(**link).clone() };
        let federator = ended.federator_ids.first().map(ToString::to_string).unwrap_or_default();
        let event = Event {
            requester: Requester::identity(federator),
            ..Event::done(Action::LinkEnded, format!("cluster:{peer}"))
        };
        let transaction = Self::without_import(Transaction::new(), peer).put(peer.as_str(), &ended);
        self.commit_audited(transaction, event, moment)?;
        self.facts.links.insert(peer.clone(), Arc::new(ended));
        self.drop_import(peer);
        let import = Import { last_error: format!("{peer} has unlinked this cluster"), ..Import::default() };
        self.facts.imports.insert(peer.clone(), Arc::new(import));
        self.handles_stale = true;
        self.dirty = true;
        tracing::warn!(%peer, "the peer has unlinked this cluster");
        Ok(())
    }

    /// The operator accepts that a peer was created anew: what is known of the old one is dropped.
    pub fn accept_link(&mut self, peer: &ClusterName, moment: Moment) -> Result<ClusterTag, CoreError> {
        let link = self.facts.links.get(peer).cloned();
        let link = link.ok_or_else(|| CoreError::NotFound(format!("there is no link to {peer}")))?;
        let tag = link.recreated.ok_or_else(|| {
            CoreError::Precondition(format!(
                "{peer} has the tag {} that is pinned: there is nothing to accept",
                link.tag
            ))
        })?;
        self.end_link(peer, Action::LinkAccept, moment)?;
        Ok(tag)
    }
}

pub(super) fn requester_of(party: &VerifiedParty) -> String {
    party.federator_ids.first().map(ToString::to_string).unwrap_or_default()
}

pub(super) fn link_event(party: &VerifiedParty) -> Event {
    let reason = format!("tag {}", party.tag);
    Event { reason, ..Event::done(Action::Link, format!("cluster:{}", party.cluster)) }
}

/// The handle that a peer named for itself must be a control handle of ours as importer.
pub fn check_control(binding: &HandleBinding, own: &ClusterName) -> Result<(), CoreError> {
    if binding.service != CONTROL || binding.importer != *own || binding.handle.is_reserved() {
        return Err(CoreError::Invalid(format!(
            "field control: handle {} of {} for {} is not a control handle for {own}",
            binding.handle, binding.service, binding.importer
        )));
    }
    Ok(())
}
