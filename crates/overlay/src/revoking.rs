//! Revocations as one process enforces them: read from the wire, put before its verifiers, enforced on what lives,
//! and remembered with the time, for whoever asked.
//!
//! The order is the promise: verifiers first, so that nobody new gets in, then live connections, then the time is noted.
//! What can't be read (a newer version's) is not enforced and so never acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tombolo_identity::revocation::{Revocations, Target};
use tombolo_identity::{SpiffeId, SvidHandle};
use tombolo_model::names::ClusterName;
use tombolo_model::resource::revocation::trimmed_serial;
use tombolo_proto::convert::{self, FieldError};
use tombolo_proto::v1;

use crate::endpoint::Overlay;

/// RFC 5280 section 4.1.2.2.
const MAX_SERIAL_BYTES: usize = 20;
/// `cluster/object`: both names have at most 253 characters.
const MAX_NAME_BYTES: usize = 512;

/// Reads one revocation: whom it means, and its name.
pub fn from_wire(wire: &v1::Revocation) -> Result<(Target, Arc<str>), FieldError> {
    if wire.name.is_empty() || wire.name.len() > MAX_NAME_BYTES {
        return Err(FieldError::new("revocations.name", &wire.name, "a name of at most 512 bytes"));
    }
    let cluster: ClusterName = convert::parse("revocations.cluster", &wire.cluster)?;
    let target = match &wire.target {
        Some(v1::revocation::Target::SpiffeId(id)) => {
            let id: SpiffeId = convert::parse("revocations.spiffe_id", id)?;
            if id.cluster().as_ref() != Some(&cluster) {
                let expected = format!("an identity of cluster {cluster}");
                return Err(FieldError::new("revocations.spiffe_id", id, expected));
            }
            Target::SpiffeId(id)
        }
        Some(v1::revocation::Target::Serial(serial)) => {
            let serial = trimmed_serial(serial);
            if serial.is_empty() || serial.len() > MAX_SERIAL_BYTES {
                let found = format!("{} bytes", serial.len());
                return Err(FieldError::new("revocations.serial", found, "1 to 20 bytes"));
            }
            Target::Serial { cluster, serial: serial.to_vec() }
        }
        Some(v1::revocation::Target::Node(name)) => Target::Node { cluster, name: name.clone() },
        Some(v1::revocation::Target::Everything(_)) => Target::Cluster(cluster),
        None => {
            return Err(FieldError::new("revocations.target", "nothing", "a kind of target known here"));
        }
    };
    Ok((target, wire.name.as_str().into()))
}

#[derive(Debug, Default)]
struct State {
    /// As last learned, to see a change.
    wire: Vec<v1::Revocation>,
    /// Of those that could be read.
    names: BTreeSet<Arc<str>>,
    /// When each was enforced here, milliseconds since the Unix epoch.
    enforced: BTreeMap<Arc<str>, i64>,
    /// What is known here has not been told to a federator.
    untold: bool,
}

impl State {
    /// The list may be another one by the time that it has been told.
    fn told(&mut self, told: &[v1::Enforcement]) {
        let known = |e: &v1::Enforcement| self.enforced.get(e.revocation.as_str()) == Some(&e.at_unix_ms);
        if told.len() == self.enforced.len() && told.iter().all(known) {
            self.untold = false;
        }
    }
}

/// The revocations of one process; clones share them.
#[derive(Clone, Debug)]
pub struct Enforcer {
    svid: SvidHandle,
    state: Arc<Mutex<State>>,
    news: Arc<Notify>,
}

impl Enforcer {
    pub fn new(svid: SvidHandle) -> Self {
        Self { svid, state: Arc::default(), news: Arc::default() }
    }

    /// Takes the whole list over: from the next handshake on it is asked. The records that can't be used.
    pub fn learn(&self, wire: &[v1::Revocation]) -> Vec<FieldError> {
        let mut state = self.lock();
        if state.wire == wire {
            return Vec::new();
        }
        let (mut read, mut refused) = (Vec::new(), Vec::new());
        for wire in wire {
            match from_wire(wire) {
                Ok(revocation) => read.push(revocation),
                Err(error) => refused.push(error),
            }
        }
        let names: BTreeSet<Arc<str>> = read.iter().map(|(_, name)| Arc::clone(name)).collect();
        state.enforced.retain(|name, _| names.contains(name));
        state.names = names;
        state.wire = wire.to_vec();
        self.svid.set_revocations(&Revocations::new(read));
        refused
    }

    /// Cuts what lives, and notes what is enforced for the first time at `unix`.
    pub async fn enforce(&self, overlay: &Overlay, unix: impl Fn() -> Duration) {
        let asked: Vec<Arc<str>> = {
            let state = self.lock();
            state.names.iter().filter(|name| !state.enforced.contains_key(*name)).cloned().collect()
        };
        if asked.is_empty() {
            return;
        }
        if overlay.enforce_revocations().await.is_none() {
            return;
        }
        let now = i64::try_from(unix().as_millis()).unwrap_or(i64::MAX);
        let mut guard = self.lock();
        let state = &mut *guard;
        for name in asked {
            state.enforced.entry(name).or_insert_with(|| {
                state.untold = true;
                now
            });
        }
        drop(guard);
        self.news.notify_one();
    }

    /// Returns when something has been enforced that a federator does not know: reports need not wait for their turn.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// What a federator has to be told; empty when it knows.
    pub fn untold(&self) -> Vec<v1::Enforcement> {
        let state = self.lock();
        if !state.untold {
            return Vec::new();
        }
        let enforcement =
            |(name, at): (&Arc<str>, &i64)| v1::Enforcement { revocation: name.to_string(), at_unix_ms: *at };
        state.enforced.iter().map(enforcement).collect()
    }

    /// A federator has been told of `told`.
    pub fn told(&self, told: &[v1::Enforcement]) {
        self.lock().told(told);
    }

    /// Another federator, or one that was restarted, answers: it knows nothing yet.
    pub fn tell_again(&self) {
        let mut state = self.lock();
        state.untold = !state.enforced.is_empty();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(name: &str, target: Option<v1::revocation::Target>) -> v1::Revocation {
        v1::Revocation { name: name.into(), cluster: "east".into(), target, reason: String::new() }
    }

    #[test]
    fn a_list_that_changes_of_the_same_length_is_not_taken_for_told() {
        let told = |name: &str| v1::Enforcement { revocation: name.into(), at_unix_ms: 1 };
        let mut state = State { enforced: [("b".into(), 1)].into(), untold: true, ..State::default() };
        state.told(&[told("a")]);
        assert!(state.untold);
        state.told(&[told("b")]);
        assert!(!state.untold);
    }

    #[test]
    fn each_kind_of_target_is_read_and_what_is_wrong_is_named() {
        use v1::revocation::Target as Wire;
        let id = "spiffe://a.example/cluster/east/ns/shop/sa/cart";
        let east: ClusterName = "east".parse().unwrap();
        let good = [
            (Wire::SpiffeId(id.into()), Target::SpiffeId(id.parse().unwrap())),
            (Wire::Serial(vec![0, 7]), Target::Serial { cluster: east.clone(), serial: vec![7] }),
            (Wire::Node("db-1".into()), Target::Node { cluster: east.clone(), name: "db-1".into() }),
            (Wire::Everything(true), Target::Cluster(east)),
        ];
        for (target, expected) in good {
            assert_eq!(from_wire(&wire("east/r", Some(target))), Ok((expected, "east/r".into())));
        }
        let other = "spiffe://a.example/cluster/west/ns/shop/sa/cart";
        let bad = [
            (wire("", Some(Wire::Everything(true))), "revocations.name"),
            (wire("r", None), "revocations.target"),
            (wire("r", Some(Wire::SpiffeId(other.into()))), "revocations.spiffe_id"),
            (wire("r", Some(Wire::SpiffeId("nonsense".into()))), "revocations.spiffe_id"),
            (wire("r", Some(Wire::Serial(vec![0, 0]))), "revocations.serial"),
            (wire("r", Some(Wire::Serial(vec![1; 21]))), "revocations.serial"),
            (v1::Revocation { cluster: "No".into(), ..wire("r", Some(Wire::Everything(true))) }, "cluster"),
        ];
        for (wire, field) in bad {
            let error = from_wire(&wire).unwrap_err();
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
    }
}
