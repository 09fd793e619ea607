//! What one sidecar says of itself, as opposed to its services: in a process of many each application has its own.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApplicationLabels {
    application: String,
}

/// Of one sidecar; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Own {
    pub config_revision: Gauge<u64, AtomicU64>,
    pub control_connected: Gauge,
    /// 1: this process is a clone, and refused.
    pub clone_refused: Gauge,
    /// Others that came with this identity and were refused.
    pub clones_seen: Gauge,
    /// What its overlay had counted when it was last looked at.
    counted: Arc<Mutex<HashMap<&'static str, u64>>>,
}

/// Of each application of a shared sidecar.
#[derive(Clone, Debug, Default)]
pub struct OwnByApplication {
    config_revision: Family<ApplicationLabels, Gauge<u64, AtomicU64>>,
    control_connected: Family<ApplicationLabels, Gauge>,
    clone_refused: Family<ApplicationLabels, Gauge>,
    clones_seen: Family<ApplicationLabels, Gauge>,
}

/// Both have the same metrics, with and without a label.
macro_rules! register {
    ($registry:expr, $own:expr) => {{
        let (registry, own): (&mut Registry, &_) = ($registry, $own);
        let Self { config_revision, control_connected, clone_refused, clones_seen, .. } = own;
        let revision = config_revision.clone();
        registry.register("config_revision", "Revision of the configuration in use", revision);
        let connected = control_connected.clone();
        registry.register("control_connected", "Whether a federator is connected", connected);
        registry.register(
            "clone_refused",
            "1 while another process holds this one's identity, and this one is refused",
            clone_refused.clone(),
        );
        registry.register(
            "clones_seen",
            "Processes that came with this identity while this one lived, and were refused",
            clones_seen.clone(),
        );
    }};
}

impl Own {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let own = Self::default();
        register!(registry, &own);
        own
    }

    /// How much a counter of the overlay has grown since it was last looked at: those of all overlays of a process add up.
    pub(super) fn more(&self, name: &'static str, count: u64) -> u64 {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = counted.insert(name, count).unwrap_or(0);
        count.saturating_sub(before)
    }
}

impl OwnByApplication {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let own = Self::default();
        register!(registry, &own);
        own
    }

    /// For an application whose sidecar starts.
    pub fn of(&self, application: &str) -> Own {
        let labels = ApplicationLabels { application: application.to_owned() };
        Own {
            config_revision: self.config_revision.get_or_create_owned(&labels),
            control_connected: self.control_connected.get_or_create_owned(&labels),
            clone_refused: self.clone_refused.get_or_create_owned(&labels),
            clones_seen: self.clones_seen.get_or_create_owned(&labels),
            counted: Arc::default(),
        }
    }

    /// Of one that is wanted no more.
    pub fn forget(&self, application: &str) {
        let labels = ApplicationLabels { application: application.to_owned() };
        self.config_revision.remove(&labels);
        self.control_connected.remove(&labels);
        self.clone_refused.remove(&labels);
        self.clones_seen.remove(&labels);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;

    use super::*;

    #[test]
    fn each_application_has_its_own_and_takes_it_away_again() {
        let mut registry = Registry::default();
        let shared = OwnByApplication::register(&mut registry);
        let (cart, db) = (shared.of("cart"), shared.of("db"));
        cart.control_connected.set(1);
        db.clone_refused.set(1);
        let shown = || {
            let mut out = String::new();
            text::encode(&mut out, &registry).unwrap();
            out
        };
        for line in ["control_connected{application=\"cart\"} 1", "control_connected{application=\"db\"} 0"] {
            assert!(shown().contains(line), "{}", shown());
        }
        assert!(shown().contains("clone_refused{application=\"db\"} 1"), "{}", shown());
        shared.forget("db");
        assert!(!shown().contains("\"db\"") && shown().contains("\"cart\""), "{}", shown());
    }

    #[test]
    fn counters_of_several_overlays_add_up() {
        let (one, other) = (Own::default(), Own::default());
        let counts = [one.more("ok", 3), other.more("ok", 2), one.more("ok", 5), other.more("ok", 2)];
        assert_eq!(counts, [3, 2, 2, 0]);
    }
}
