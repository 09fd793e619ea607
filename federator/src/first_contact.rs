//! Asks clusters that a `ClusterLink` object names for a link, until there is one (ADR 24).
//!
//! One task. It resolves the gateways of each such object again and again, so that our own gateways carry first contact
//! there; and where this cluster has the lower tag it dials the peer's federator and asks. Everything that is decided is the
//! core's ([`crate::core::first_contact`]).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tombolo_identity::{ExpectedPeer, SvidHandle, tls};
use tombolo_model::names::ClusterName;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::keys::{KeyRing, LinkKey};
use tombolo_overlay::{DialError, DialTarget, Overlay, PeerConnection, close_code, grpc};
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;
use tombolo_proto::v1::linking_client::LinkingClient;

use crate::core::{CoreError, CoreGone, CoreHandle};
use crate::facts::{Facts, FirstContact};
use crate::linking;
use crate::service::join::chain_with_root;

/// Between two attempts; each dial that is not answered ends after 3 s by itself.
const AGAIN: Duration = Duration::from_secs(2);
/// Names are resolved anew after this.
const RESOLVED: Duration = Duration::from_secs(30);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Addresses of one name.
const MAX_ADDRESSES: usize = 16;

pub struct FirstContactTask {
    pub core: CoreHandle,
    pub overlay: Overlay,
    pub svid: SvidHandle,
}

/// When an object's gateways were resolved last.
struct Resolved {
    names: Vec<String>,
    at: Instant,
    failing: bool,
}

/// Objects that link, with the gateways that they name.
fn objects(facts: &Facts) -> HashMap<ClusterName, Vec<String>> {
    let linking = facts.link_specs().filter(|(_, spec)| spec.links().is_some());
    linking.filter_map(|(name, spec)| Some((name.parse().ok()?, spec.gateways.clone()))).collect()
}

impl FirstContactTask {
    /// Until the core has ended.
    pub async fn run(self) {
        let mut facts = self.core.watch();
        let mut resolved: HashMap<ClusterName, Resolved> = HashMap::new();
        loop {
            let current = facts.borrow_and_update().clone();
            let objects = objects(&current);
            resolved.retain(|peer, _| objects.contains_key(peer));
            if self.work(&current, objects, &mut resolved).await.is_err() {
                return;
            }
            // Facts change all the time; what this is about changes rarely.
            tokio::time::sleep(AGAIN).await;
            if self.core.facts().link_specs().all(|(_, spec)| spec.links().is_none())
                && facts.changed().await.is_err()
            {
                return;
            }
        }
    }

    async fn work(
        &self,
        facts: &Facts,
        objects: HashMap<ClusterName, Vec<String>>,
        resolved: &mut HashMap<ClusterName, Resolved>,
    ) -> Result<(), CoreGone> {
        for (peer, names) in objects {
            let before = resolved.get(&peer);
            let fresh = before.is_some_and(|of| of.names == names && of.at.elapsed() < RESOLVED);
            if fresh && facts.first_contacts.contains_key(&peer) {
                continue;
            }
            let (found, failed) = resolve(&names).await;
            // An outage of the resolver takes nothing away.
            let gateways = (!found.is_empty() || failed.is_empty()).then_some(found);
            let failing = !failed.is_empty();
            // What was said of names that resolve now is taken back.
            let said = (failing || before.is_some_and(|before| before.failing)).then_some(failed);
            resolved.insert(peer.clone(), Resolved { names, at: Instant::now(), failing });
            self.core.call(move |core, _| core.set_first_contact(&peer, gateways, said)).await?;
        }
        self.core
            .call(|core, moment| {
                if let Err(error) = core.review_links(moment) {
                    tracing::warn!(%error, "links by objects can't be reviewed now");
                }
            })
            .await?;
        let facts = self.core.facts();
        let asked = facts.pending_contacts().filter(|contact| facts.cluster.tag < contact.tag);
        let attempts = asked.map(|contact| self.attempt(Arc::clone(contact)));
        futures::future::join_all(attempts).await.into_iter().collect()
    }

    async fn attempt(&self, contact: Arc<FirstContact>) -> Result<(), CoreGone> {
        let failed = match self.ask(&contact).await {
            Ok(()) => return Ok(()),
            Err(CoreError::Gone) => return Err(CoreGone),
            Err(error) => error.to_string(),
        };
        tracing::debug!(peer = %contact.peer, failed, "not linked by objects yet");
        let peer = contact.peer.clone();
        self.core.call(move |core, _| core.set_first_contact(&peer, None, Some(failed))).await
    }

    async fn ask(&self, contact: &FirstContact) -> Result<(), CoreError> {
        let (peer, chain) = (contact.peer.clone(), chain_with_root(&self.svid));
        let party = self.core.attempt(move |core, _| core.begin_contact(&peer, chain)).await?;
        let connection = self.dial(contact).await?;
        let asked = self.call(contact, &connection, party).await;
        connection.close(close_code::DONE, "asked");
        asked
    }

    async fn dial(&self, contact: &FirstContact) -> Result<PeerConnection, CoreError> {
        let facts = self.core.facts();
        let own = &facts.cluster;
        let key = LinkKey::first_contact(own.trust_domain.as_str(), own.tag, contact.tag);
        let binding = FirstContact::binding(&own.name, own.tag);
        let expected = ExpectedPeer::Role { cluster: contact.peer.clone(), path: "/federator".into() };
        let tls = tls::mesh_client_config(&self.svid, expected)
            .map_err(|error| CoreError::Precondition(error.to_string()))?;
        let target = DialTarget {
            kind: Kind::Control,
            tag: contact.tag,
            handle: binding.handle,
            keys: Arc::new(KeyRing::derive_now(self.core.now().unix, |hour| key.handle_key(&binding, hour))),
        };
        self.overlay.dial(&target, tls).await.map_err(|error| match error {
            DialError::NoAnswer => {
                let at: Vec<String> = contact.gateways.iter().map(ToString::to_string).collect();
                let at = if at.is_empty() { "no known address".to_owned() } else { at.join(", ") };
                CoreError::Exhausted(format!("no answer through its gateways at {at}: it has no such object yet, or UDP is not let through"))
            }
            error => CoreError::Precondition(format!("whoever answers at its gateways is not its federator: {error}")),
        })
    }

    async fn call(
        &self,
        contact: &FirstContact,
        connection: &PeerConnection,
        party: v1::LinkParty,
    ) -> Result<(), CoreError> {
        let mut client = LinkingClient::new(grpc::channel(connection.clone()));
        let request = v1::LinkRequest { caller: Some(party) };
        let answer = tokio::time::timeout(CALL_TIMEOUT, client.link(request)).await;
        let answer = answer
            .map_err(|_| CoreError::Exhausted("it did not answer in time".to_owned()))?
            .map_err(|status| {
                let words: String = status.message().chars().take(300).collect();
                CoreError::Precondition(format!("it refused: {words}"))
            })?
            .into_inner();
        let inviter = answer.inviter.ok_or_else(|| FieldError::new("inviter", "nothing", "present"))?;
        let key = LinkKey::from_bytes(convert::bytes("link_key", &answer.link_key)?);
        let loopback = contact.gateways.iter().any(|address| address.ip().is_loopback());
        let (expected, tag) = (contact.peer.clone(), contact.tag);
        self.core
            .attempt(move |core, moment| {
                let verified = linking::verify_party(&inviter, &core.facts, loopback, moment.unix)?;
                if (&verified.cluster, verified.tag) != (&expected, tag) {
                    let found = format!("{} ({})", verified.cluster, verified.tag);
                    return Err(
                        FieldError::new("inviter.cluster", found, format!("{expected} ({tag})")).into()
                    );
                }
                core.finish_contact(&verified, &key, moment)
            })
            .await
    }
}

/// Every address that the names stand for, and what could not be resolved.
async fn resolve(names: &[String]) -> (Vec<SocketAddr>, String) {
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for name in names {
        match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(name)).await {
            Ok(Ok(addresses)) => found.extend(addresses.take(MAX_ADDRESSES)),
            Ok(Err(error)) => failed.push(format!("{name} does not resolve: {error}")),
            Err(_) => failed.push(format!("{name} is not resolved in time")),
        }
    }
    found.sort_unstable();
    found.dedup();
    (found, failed.join("; "))
}
