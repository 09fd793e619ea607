//! Pods that services are sent to, and addresses of services.

use tombolo_model::names::ServiceKey;

use super::super::rows::{ServiceRow, SliceRow};
use super::{Tables, place_of};
use crate::facts::pods::{KubernetesAddresses, PodGroup, PodPort};
use crate::facts::{ExportedService, Port};

impl Tables {
    /// Pods that a service of this cluster is sent to, and where they listen for it.
    pub(super) fn pods(&self, service: &ServiceKey, of: &ExportedService) -> Vec<PodGroup> {
        let slices = self.of_service.get(&place_of(service)).into_iter().flatten();
        let slices = slices.filter_map(|place| self.slices.get(place)).filter(|slice| !slice.pods.is_empty());
        let group = |slice: &SliceRow| {
            let port = |port: &Port| {
                let same = |target: &&Port| (&target.name, &target.protocol) == (&port.name, &port.protocol);
                let target = slice.ports.iter().find(same)?;
                Some(PodPort {
                    name: port.name.clone(),
                    port: port.port,
                    target: target.port,
                    protocol: port.protocol.clone(),
                    app_protocol: port.app_protocol.clone(),
                })
            };
            PodGroup { ports: of.ports.iter().filter_map(port).collect(), pods: slice.pods.clone() }
        };
        let mut groups: Vec<PodGroup> = slices.map(group).filter(|group| !group.ports.is_empty()).collect();
        groups.sort_unstable();
        groups
    }

    /// Addresses of a service that is exported or imported here.
    pub fn addresses(&self, service: &ServiceKey) -> KubernetesAddresses {
        let derived = self.derived_row(service).filter(|row| !row.meta.deleting);
        let derived = derived.filter(|row| row.import.as_deref() == Some(service.name.as_str()));
        let known =
            self.import_row(service).is_some_and(|row| row.meta.ours) || self.export_row(service).is_some();
        let local = self.services.get(&place_of(service)).filter(|row| known && !row.meta.deleting);
        let sorted = |row: Option<&ServiceRow>| {
            let mut addresses = row.map(|row| row.cluster_ips.clone()).unwrap_or_default();
            // IPv4 first.
            addresses.sort_unstable();
            addresses
        };
        KubernetesAddresses { set: sorted(derived), local: sorted(local) }
    }
}
