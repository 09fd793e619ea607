//! JWT-SVIDs: signing keys kept, tokens signed for members of this cluster.

use tombolo_identity::PeerIdentity;
use tombolo_identity::jwt::{JwtKeyError, check_audience};
use tombolo_model::names::ClusterName;
use tombolo_proto::v1;

use super::boot::BootError;
use super::{Core, CoreError, Moment};
use crate::facts::Role;
use crate::jwt::{JwtKeys, JwtKeysRecord, KEYS};
use crate::revocations;
use crate::store::{Store, StoreError, Table, Transaction, record};

/// The signing keys of the store; a new store gets its first.
pub(super) fn load(store: &dyn Store, cluster: &ClusterName, unix: u64) -> Result<JwtKeys, BootError> {
    let broken = |e: JwtKeyError| StoreError::Value {
        table: Table::Meta,
        key: KEYS.to_owned(),
        reason: e.to_string(),
    };
    let keys = match record::get::<JwtKeysRecord>(store, KEYS)? {
        Some(record) => JwtKeys::from_record(&record, cluster).map_err(broken)?,
        None => JwtKeys::default(),
    };
    if !keys.is_due(unix) {
        return Ok(keys);
    }
    let keys = keys.renewed(cluster, unix).map_err(broken)?;
    store.commit(&Transaction::new().put(KEYS, &keys.to_record()))?;
    Ok(keys)
}

impl Core {
    /// Makes the next key and forgets the last one, once they are due.
    pub(super) fn renew_jwt_keys(&mut self, unix: u64) {
        if !self.jwt.is_due(unix) {
            return;
        }
        let renewed = self.jwt.renewed(&self.facts.cluster.name, unix).map_err(|e| e.to_string());
        let stored = renewed.and_then(|keys| {
            let transaction = Transaction::new().put(KEYS, &keys.to_record());
            self.store.commit(&transaction).map(|()| keys).map_err(|e| e.to_string())
        });
        match stored {
            Ok(keys) => {
                self.facts.jwt_authorities = keys.authorities();
                self.jwt = keys;
                self.dirty = true;
                tracing::info!(keys = self.facts.jwt_authorities.len(), "JWT signing keys are renewed");
            }
            Err(error) => tracing::warn!(error, "JWT signing keys can't be renewed; tried again in a second"),
        }
    }

    /// A JWT-SVID for a sidecar's or machine's own identity.
    pub fn mint_jwt(
        &self,
        caller: &PeerIdentity,
        request: &v1::MintJwtRequest,
        moment: Moment,
    ) -> Result<v1::MintJwtResponse, CoreError> {
        let id = &caller.spiffe_id;
        if !matches!(Role::of(id), Some(Role::Sidecar | Role::Vm)) {
            return Err(CoreError::Denied(format!(
                "{id} has no workload behind it that a token could be for"
            )));
        }
        if let Some(object) = revocations::of_identity(&self.facts, id) {
            return Err(CoreError::Denied(format!("{id} is revoked (revocation/{object})")));
        }
        check_audience(&request.audience).map_err(|e| CoreError::Invalid(e.to_string()))?;
        let signer = self.jwt.signer(moment.unix.as_secs());
        let signer =
            signer.ok_or_else(|| CoreError::Precondition("there is no JWT signing key".to_owned()))?;
        let signed = signer.sign(id, &request.audience, moment.unix);
        let (token, not_after) = signed.map_err(|e| CoreError::Precondition(e.to_string()))?;
        Ok(v1::MintJwtResponse { token, not_after_unix: i64::try_from(not_after).unwrap_or(i64::MAX) })
    }
}
