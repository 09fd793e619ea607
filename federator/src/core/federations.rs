//! Foreign trust domains: their objects, what is kept of their bundles, and what comes of fetching them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tombolo_identity::{ForeignBundle, TrustDomain};
use tombolo_model::audit::{Action, Event};
use tombolo_model::resource::{Object, Spec, TrustDomainFederationSpec};

use super::{Core, CoreError, Moment};
use crate::facts::{Facts, StoredObject};
use crate::foreign::{BundleRecord, Federation, MAX_FEDERATIONS, key, succeed};
use crate::store::{Store, StoreError, Table, Transaction, record};

const KIND: &str = "TrustDomainFederation";

fn spec_of(object: &Object) -> Option<&TrustDomainFederationSpec> {
    match &object.spec {
        Spec::TrustDomainFederation(spec) => Some(spec),
        _ => None,
    }
}

/// An endpoint that changes its bundle with every answer must not push everything else out of the audit log.
const NOTES_APART: Duration = Duration::from_secs(600);

/// A bundle that has been stored.
struct Taken {
    bundle: Arc<ForeignBundle>,
    json: Arc<str>,
    /// As [`Federation::noted`] and [`Federation::unnoted`].
    noted: Option<u64>,
    unnoted: bool,
}

fn done(trust_domain: &TrustDomain) -> Event {
    Event::done(Action::Federation, format!("trust-domain:{trust_domain}"))
}

fn summary(bundle: &ForeignBundle) -> String {
    if bundle.is_empty() {
        return "its bundle is empty: everything of it is revoked".to_owned();
    }
    let (roots, keys) = (bundle.roots().len(), bundle.jwt_keys());
    format!("bundle {}: {roots} roots, {keys} JWT keys", bundle.sequence())
}

/// What the audit log says of a `TrustDomainFederation` that an operator applies or deletes.
pub(super) fn event(object: &Object, verb: &str) -> Option<Event> {
    let spec = spec_of(object)?;
    let reason = format!(
        "trustdomainfederation/{} {verb}: {} {}",
        object.metadata.name, spec.bundle_endpoint_profile.profile, spec.bundle_endpoint_url
    );
    Some(Event { reason, ..done(&spec.trust_domain.parse().ok()?) })
}

/// SHA-256, hex; empty without a bundle.
fn initial_hash(spec: &TrustDomainFederationSpec) -> String {
    let hash = |document: &String| hex::encode(Sha256::digest(document));
    spec.trust_domain_bundle.as_ref().map(hash).unwrap_or_default()
}

/// What is known of an object's trust domain: what was fetched, else what came with the object.
fn federation(
    store: &dyn Store,
    facts: &Facts,
    stored: &StoredObject,
    unix: u64,
) -> Result<Option<Federation>, StoreError> {
    let Some(spec) = spec_of(&stored.object) else { return Ok(None) };
    let Ok(trust_domain) = spec.trust_domain.parse::<TrustDomain>() else { return Ok(None) };
    let kept = record::get::<BundleRecord>(store, &key(trust_domain.as_str()))?;
    let kept = kept.filter(|kept| kept.initial == initial_hash(spec));
    let read = |document: &str| ForeignBundle::parse(trust_domain.clone(), document.as_bytes()).ok();
    let fetched = kept.as_ref().and_then(|kept| Some((read(&kept.document)?, kept.fetched)));
    let initial = || Some((read(spec.trust_domain_bundle.as_deref()?)?, None));
    let (bundle, fetched) = fetched.or_else(initial).map_or((None, None), |(b, at)| (Some(Arc::new(b)), at));
    Ok(Some(Federation {
        object: stored.object.metadata.name.clone(),
        uid: stored.uid.clone(),
        generation: stored.generation,
        in_force: spec.holds_in(&facts.cluster.name),
        bundle_json: bundle.as_ref().map(|bundle| bundle.to_json()).unwrap_or_default().into(),
        trust_domain,
        spec: spec.clone(),
        bundle,
        fetched,
        since: unix,
        error: None,
        noted: None,
        unnoted: false,
        attempts: BTreeMap::new(),
    }))
}

/// Every one, at a start.
pub(super) fn load(
    store: &dyn Store,
    facts: &Facts,
    unix: u64,
) -> Result<BTreeMap<TrustDomain, Arc<Federation>>, StoreError> {
    let mut federations = BTreeMap::new();
    for stored in facts.objects.values().filter(|stored| stored.object.kind() == KIND) {
        if let Some(federation) = federation(store, facts, stored, unix)? {
            federations.insert(federation.trust_domain.clone(), Arc::new(federation));
        }
    }
    Ok(federations)
}

impl Core {
    /// Whether a `TrustDomainFederation` may be stored.
    pub(super) fn check_federation(&self, object: &Object) -> Result<(), CoreError> {
        let Some(spec) = spec_of(object) else { return Ok(()) };
        let invalid = |text: String| Err(CoreError::Invalid(text));
        let domain: TrustDomain =
            spec.trust_domain.parse().map_err(|e| CoreError::Invalid(format!("spec.trustDomain: {e}")))?;
        let own = &self.facts.cluster.trust_domain;
        if domain == *own {
            return invalid(format!(
                "spec.trustDomain: {own} is this federation's own trust domain; clusters of it are linked with `tombolo link token`"
            ));
        }
        if spec.endpoint_trust_domain() == Some(own.as_str()) {
            return invalid(format!(
                "spec.bundleEndpointProfile.endpointSPIFFEID: nobody of {own}, this federation's own trust domain, speaks for {domain}; give the endpoint's own identity"
            ));
        }
        let name = object.metadata.name.as_str();
        let same = self.facts.federations.get(&domain).filter(|known| known.object != name);
        if let Some(known) = same {
            return invalid(format!(
                "spec.trustDomain: {domain} is TrustDomainFederation {} already: change that one, or delete it first",
                known.object
            ));
        }
        let known = self.facts.federations.values().any(|known| known.object == name);
        if !known && self.facts.federations.len() >= MAX_FEDERATIONS {
            return Err(CoreError::Exhausted(format!(
                "{MAX_FEDERATIONS} foreign trust domains are federated, as many as may be: delete one first"
            )));
        }
        if let Some(document) = &spec.trust_domain_bundle
            && let Err(error) = ForeignBundle::parse(domain, document.as_bytes())
        {
            return invalid(format!("spec.trustDomainBundle: {error}; give what the endpoint serves"));
        }
        Ok(())
    }

    /// What is kept of a bundle goes with its object: applied anew it begins anew.
    pub(super) fn forgetting_bundle(transaction: Transaction, object: &Object) -> Transaction {
        match spec_of(object) {
            Some(spec) => transaction.delete(Table::Meta, key(&spec.trust_domain)),
            None => transaction,
        }
    }

    /// The same where an object is changed to be about another trust domain.
    pub(super) fn forgetting_other_domain(
        transaction: Transaction,
        before: &Object,
        now: &Object,
    ) -> Transaction {
        let domain = |object| spec_of(object).map(|spec| &spec.trust_domain);
        if domain(before) == domain(now) { transaction } else { Self::forgetting_bundle(transaction, before) }
    }

    /// After an object of this name was applied or deleted.
    pub(super) fn refederate(&mut self, object: &Object, moment: Moment) {
        if spec_of(object).is_none() {
            return;
        }
        let name = object.metadata.name.as_str();
        let before: Vec<Arc<Federation>> =
            self.facts.federations.values().filter(|known| known.object == name).cloned().collect();
        self.facts.federations.retain(|_, known| known.object != name);
        let Some(stored) = self.facts.objects.get(&object.key()) else { return };
        let made =
            federation(&*self.store, &self.facts, stored, moment.unix.as_secs()).unwrap_or_else(|error| {
                tracing::warn!(%error, "what was kept of a foreign bundle does not read; it is fetched anew");
                None
            });
        if let Some(mut made) = made {
            if let Some(before) = before.iter().find(|known| known.trust_domain == made.trust_domain) {
                made.attempts = before.attempts.clone();
                made.noted = before.noted;
            }
            self.facts.federations.insert(made.trust_domain.clone(), Arc::new(made));
        }
    }

    /// What an attempt brought, which was begun for this object. True: its bundle is held now.
    pub fn bundle_fetched(
        &mut self,
        domain: &TrustDomain,
        (uid, generation): (&str, u64),
        fetched: Result<Bytes, (&'static str, String)>,
        moment: Moment,
    ) -> bool {
        let Some(known) = self.facts.federations.get(domain).cloned() else { return false };
        if (known.uid.as_str(), known.generation) != (uid, generation) {
            return false;
        }
        let taken = fetched.and_then(|document| self.take_bundle(&known, &document, moment));
        let mut federation = Arc::unwrap_or_clone(known);
        let result = match taken {
            Ok(Taken { bundle, json, noted, unnoted }) => {
                federation.bundle = Some(bundle);
                federation.bundle_json = json;
                (federation.noted, federation.unnoted) = (noted, unnoted);
                federation.fetched = Some(moment.unix.as_secs());
                federation.error = None;
                "ok"
            }
            Err((kind, text)) => {
                if federation.error.as_ref() != Some(&(kind, text.clone())) {
                    tracing::warn!(trust_domain = %domain, kind, error = text, "a foreign bundle can't be had; what is held stays");
                }
                federation.error = Some((kind, text));
                kind
            }
        };
        *federation.attempts.entry(result).or_default() += 1;
        let held = federation.error.is_none();
        self.facts.federations.insert(domain.clone(), Arc::new(federation));
        self.dirty = true;
        held
    }

    /// Stores a bundle that may take the place of the one that is held.
    fn take_bundle(
        &mut self,
        known: &Federation,
        document: &[u8],
        moment: Moment,
    ) -> Result<Taken, (&'static str, String)> {
        let (unix, held) = (moment.unix.as_secs(), known.bundle.as_deref());
        let bundle = succeed(&known.trust_domain, held, document)
            .map_err(|refusal| (refusal.kind(), refusal.to_string()))?;
        let json = bundle.to_json();
        let record =
            BundleRecord { document: json.clone(), fetched: Some(unix), initial: initial_hash(&known.spec) };
        let transaction = Transaction::new().put(key(known.trust_domain.as_str()), &record);
        let same = held.is_some_and(|held| (held.roots(), held.jwks()) == (bundle.roots(), bundle.jwks()));
        let news = !same || known.fetched.is_none() || known.unnoted;
        let note = news && known.noted.is_none_or(|at| unix.saturating_sub(at) >= NOTES_APART.as_secs());
        let stored = if note {
            let event = Event { reason: summary(&bundle), ..done(&known.trust_domain) };
            self.commit_audited(transaction, event, moment)
        } else {
            self.store.commit(&transaction)
        };
        stored.map_err(|error| ("store", error.to_string()))?;
        if !same {
            tracing::info!(trust_domain = %known.trust_domain, "a foreign bundle is taken over: {}", summary(&bundle));
        }
        let noted = if note { Some(unix) } else { known.noted };
        Ok(Taken { bundle: Arc::new(bundle), json: json.into(), noted, unnoted: news && !note })
    }
}
