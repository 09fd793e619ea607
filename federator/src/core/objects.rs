//! Objects that operators apply: validated by the model, stored as written, changed by compare-and-swap.

use std::sync::Arc;

use tombolo_model::audit::{Action, Event, Requester};
use tombolo_model::names::ClusterName;
use tombolo_model::resource::{
    MAX_ACCESS_POLICIES, Object, ObjectKey, RevocationSpec, RevocationTarget, Spec,
};

use super::{Core, CoreError, Moment, federations};
use crate::facts::{ObjectRecord, StoredObject};
use crate::import;
use crate::policies::access_policy_count;
use crate::revocations::{self, MAX_REVOCATIONS};
use crate::store::{Table, Transaction};

/// Objects of one cluster.
const MAX_STORED: usize = 50_000;
/// Those that Kubernetes keeps, exports aside.
const MAX_IN_KUBERNETES: usize = 10_000;
/// In the audit log, who asks for what Kubernetes' objects say.
const KUBERNETES: &str = "kubernetes";

/// What applying an object did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Created,
    Configured,
    Unchanged,
}

impl Outcome {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
        }
    }
}

/// What Kubernetes says of an object that it keeps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptByKubernetes {
    /// Kubernetes gives it to no other object.
    pub uid: String,
    /// Unix seconds.
    pub created_unix: u64,
    pub generation: u64,
}

impl Core {
    /// Creates or changes an object, for an operator.
    pub fn apply(&mut self, object: Object, dry_run: bool, moment: Moment) -> Result<Outcome, CoreError> {
        self.put_object(object, None, dry_run, moment)
    }

    /// The same for an object that Kubernetes keeps. One that an operator has applied is taken over.
    pub fn apply_of_kubernetes(
        &mut self,
        object: Object,
        kept: KeptByKubernetes,
        moment: Moment,
    ) -> Result<Outcome, CoreError> {
        self.on_behalf(Requester::identity(KUBERNETES), |core| {
            core.put_object(object, Some(kept), false, moment)
        })
    }

    fn put_object(
        &mut self,
        object: Object,
        kept: Option<KeptByKubernetes>,
        dry_run: bool,
        moment: Moment,
    ) -> Result<Outcome, CoreError> {
        let key = object.key();
        let existing = self.facts.objects.get(&key);
        let unchanged = |stored: &StoredObject| {
            let kept_as_before = kept.as_ref().is_none_or(|kept| {
                stored.in_kubernetes && (&stored.uid, stored.generation) == (&kept.uid, kept.generation)
            });
            kept_as_before && same(&stored.object, &object)
        };
        if kept.is_none() {
            kept_by_kubernetes(existing, &key)?;
        }
        let outcome = match existing {
            Some(stored) if unchanged(stored) => return Ok(Outcome::Unchanged),
            Some(_) => Outcome::Configured,
            None => {
                self.room_for_object(kept.is_some())?;
                self.room_for_policy(&key)?;
                Outcome::Created
            }
        };
        if let Spec::Revocation(spec) = &object.spec {
            self.check_revocation(&object.metadata.name, spec)?;
        }
        self.check_federation(&object)?;
        self.check_link_object(&object)?;
        if dry_run {
            return Ok(outcome);
        }
        let in_kubernetes = kept.is_some();
        let KeptByKubernetes { uid, created_unix, generation } = kept.unwrap_or_else(|| KeptByKubernetes {
            uid: existing.map_or_else(|| uuid::Uuid::new_v4().to_string(), |s| s.uid.clone()),
            created_unix: existing.map_or(moment.unix.as_secs(), |s| s.created_unix),
            generation: existing.map_or(1, |s| s.generation + 1),
        });
        let stored = StoredObject { uid, created_unix, generation, object, kubernetes: None, in_kubernetes };
        let mut transaction = Transaction::new().put(key.to_string(), &record_of(&stored));
        if let Some(before) = existing {
            transaction = Self::forgetting_other_domain(transaction, &before.object, &stored.object);
        }
        let event = revocation_event(&stored.object, Action::Revoke);
        match event.or_else(|| federations::event(&stored.object, "applied")) {
            Some(event) => self.commit_audited(transaction, event, moment)?,
            None => self.store.commit(&transaction)?,
        }
        let affected = linked_cluster(&stored.object);
        let stored = Arc::new(stored);
        self.facts.objects.insert(key, Arc::clone(&stored));
        self.refederate(&stored.object, moment);
        self.dirty = true;
        self.handles_stale = true;
        affected.iter().for_each(|peer| self.rescope(peer, moment));
        self.follow_link_objects(moment)?;
        Ok(outcome)
    }

    /// Those of Kubernetes have room of their own: its tenants must not lock the operator out.
    fn room_for_object(&self, in_kubernetes: bool) -> Result<(), CoreError> {
        let alike = |stored: &&Arc<StoredObject>| match in_kubernetes {
            true => stored.in_kubernetes,
            false => !stored.is_kubernetes(),
        };
        let most = if in_kubernetes { MAX_IN_KUBERNETES } else { MAX_STORED };
        if self.facts.objects.values().filter(alike).count() >= most {
            return Err(CoreError::Exhausted(format!("{most} objects are stored: delete some first")));
        }
        Ok(())
    }

    /// Access policies of one namespace travel together in snapshots of bounded size. Refused here, because leaving one
    /// out later would open what it closes.
    fn room_for_policy(&self, key: &ObjectKey) -> Result<(), CoreError> {
        let policies = match key.kind {
            "AccessPolicy" => access_policy_count(&self.facts, &key.namespace),
            _ => return Ok(()),
        };
        if policies < MAX_ACCESS_POLICIES {
            return Ok(());
        }
        Err(CoreError::Exhausted(format!(
            "namespace {} has {policies} AccessPolicy objects, as many as it may: give one of them more rules, or delete some first",
            key.namespace
        )))
    }

    /// Whether this revocation may be stored. All travel whole in every snapshot: one that did not fit would be enforced
    /// nowhere.
    fn check_revocation(&self, name: &str, spec: &RevocationSpec) -> Result<(), CoreError> {
        if !revocations::has_room(&self.facts, name) {
            return Err(CoreError::Exhausted(format!(
                "{MAX_REVOCATIONS} revocations (or {} KiB of them) are in force, as many as may be: revoke a node or the cluster as a whole, or delete those whose certificates have ended",
                revocations::MAX_OWN_BYTES / 1024
            )));
        }
        if revocations::means_federator(&self.facts, spec) {
            return Err(CoreError::Invalid(
                "this cluster's own federator can't be revoked here: members that refuse it could never be told that it is accepted again; revoke `cluster: NAME` in the linked clusters, or replace the cluster's intermediate".to_owned(),
            ));
        }
        Ok(())
    }

    /// Removes an object; whether it was there.
    pub fn delete(&mut self, key: &ObjectKey, dry_run: bool, moment: Moment) -> Result<bool, CoreError> {
        let Some(stored) = self.facts.objects.get(key).cloned() else { return Ok(false) };
        kept_by_kubernetes(Some(&stored), key)?;
        if dry_run {
            return Ok(true);
        }
        self.remove_object(key, &stored, moment)
    }

    /// Removes an object that Kubernetes kept and keeps no more; whether it was there.
    pub fn delete_of_kubernetes(&mut self, key: &ObjectKey, moment: Moment) -> Result<bool, CoreError> {
        match self.facts.objects.get(key).filter(|stored| stored.in_kubernetes).cloned() {
            None => Ok(false),
            Some(stored) => {
                let requester = Requester::identity(KUBERNETES);
                self.on_behalf(requester, |core| core.remove_object(key, &stored, moment))
            }
        }
    }

    fn remove_object(
        &mut self,
        key: &ObjectKey,
        stored: &StoredObject,
        moment: Moment,
    ) -> Result<bool, CoreError> {
        let transaction = Transaction::new().delete(Table::Objects, key.to_string());
        let transaction = Self::forgetting_bundle(transaction, &stored.object);
        let event = revocation_event(&stored.object, Action::Unrevoke);
        match event.or_else(|| federations::event(&stored.object, "deleted")) {
            Some(event) => self.commit_audited(transaction, event, moment)?,
            None => self.store.commit(&transaction)?,
        }
        self.facts.objects.remove(key);
        self.refederate(&stored.object, moment);
        self.dirty = true;
        self.handles_stale = true;
        linked_cluster(&stored.object).iter().for_each(|peer| self.rescope(peer, moment));
        self.follow_link_objects(moment)?;
        Ok(true)
    }

    /// A link's ranges have changed: what the peer said is read again.
    fn rescope(&mut self, peer: &ClusterName, moment: Moment) {
        let scope = import::PeerScope::of(&self.facts, peer, moment.unix);
        let (Some(view), Some(import)) = (self.views.get(peer), self.facts.imports.get_mut(peer)) else {
            return;
        };
        let import = Arc::make_mut(import);
        import.gateways.retain(|gateway| scope.ranges.allows(gateway.address));
        let records = view.records().filter_map(|(_, kept)| super::imports::read(kept));
        records.for_each(|record| import::put(import, &scope, &record));
    }
}

/// As it is stored.
pub(super) fn record_of(stored: &StoredObject) -> ObjectRecord {
    ObjectRecord {
        json: stored.object.to_json(),
        uid: stored.uid.clone(),
        created_unix: stored.created_unix,
        generation: stored.generation,
        kubernetes: stored.kubernetes.clone(),
        in_kubernetes: stored.in_kubernetes,
    }
}

/// One that Kubernetes keeps is changed there, or it would be changed back.
fn kept_by_kubernetes(existing: Option<&Arc<StoredObject>>, key: &ObjectKey) -> Result<(), CoreError> {
    match existing {
        Some(stored) if stored.is_kubernetes() => Err(CoreError::Precondition(format!(
            "{key} is kept by this cluster's Kubernetes: change it there, with kubectl"
        ))),
        _ => Ok(()),
    }
}

/// Equal but for what a server fills in.
fn same(a: &Object, b: &Object) -> bool {
    a.api_version == b.api_version
        && a.spec == b.spec
        && a.metadata.labels == b.metadata.labels
        && a.metadata.annotations == b.metadata.annotations
}

/// What the audit log says of a revocation that is made or taken back; nothing of other objects.
fn revocation_event(object: &Object, action: Action) -> Option<Event> {
    let Spec::Revocation(spec) = &object.spec else { return None };
    let (subject, serial) = match spec.target()? {
        RevocationTarget::SpiffeId(id) => (id.to_owned(), String::new()),
        RevocationTarget::Serial(serial) => (String::new(), hex::encode(serial)),
        RevocationTarget::Node(node) => (format!("node:{node}"), String::new()),
        RevocationTarget::Cluster(cluster) => (format!("cluster:{cluster}"), String::new()),
    };
    let reason = match spec.reason.as_str() {
        "" => format!("revocation/{}", object.metadata.name),
        reason => format!("revocation/{}: {reason}", object.metadata.name),
    };
    Some(Event { serial, reason, ..Event::done(action, subject) })
}

/// The peer that a `ClusterLink` is about.
fn linked_cluster(object: &Object) -> Option<ClusterName> {
    match &object.spec {
        Spec::ClusterLink(spec) => spec.cluster.as_deref().unwrap_or(&object.metadata.name).parse().ok(),
        _ => None,
    }
}
