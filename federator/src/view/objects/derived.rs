//! Objects that nobody applied and that are there all the same: imports, because clusters export; links, because of
//! `tombolo link join`.

use std::collections::BTreeSet;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tombolo_model::names::ServiceKey;
use tombolo_model::resource::cluster_link::TagText;
use tombolo_model::resource::service_import::ImportPort;
use tombolo_model::resource::{ClusterLinkSpec, Object, ObjectMeta, ServiceImportSpec, Spec};

use super::super::View;
use super::super::text::rfc3339;
use super::{DERIVED, exporters, exports};
use crate::facts::{Link, Port};

const MCS: &str = "multicluster.x-k8s.io/v1beta1";
pub const TOMBOLO: &str = "tombolo.dev/v1alpha1";

/// An object in whose metadata is said that it is derived.
pub fn object(
    view: &View<'_>,
    api_version: &str,
    (namespace, name): (Option<&str>, &str),
    created: Option<Duration>,
    spec: Spec,
) -> Object {
    let mut metadata = ObjectMeta::default();
    metadata.name = name.to_owned();
    metadata.namespace = namespace.map(str::to_owned);
    metadata.annotations.insert(DERIVED.to_owned(), "true".to_owned());
    metadata.creation_timestamp = created.map(rfc3339).filter(|text| !text.is_empty());
    let mut object = Object { api_version: api_version.to_owned(), metadata, spec };
    object.metadata.uid = Some(uid(view, &object));
    object
}

/// The same for the life of the store, so that clients which follow objects by uid can.
fn uid(view: &View<'_>, object: &Object) -> String {
    let cluster = &view.facts.cluster;
    let named = format!("{}/{}/{}", cluster.name, cluster.epoch.0, object.key());
    let digest: [u8; 32] = Sha256::digest(named.as_bytes()).into();
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(digest).for_each(|(byte, digest)| *byte = digest);
    uuid::Builder::from_custom_bytes(bytes).into_uuid().to_string()
}

/// One import per service that any cluster exports to us, or that we export: exporters import too (KEP-1645).
pub fn imports(view: &View<'_>) -> Vec<Object> {
    let imported = view.facts.imports.values().flat_map(|import| import.exports.keys().cloned());
    let own = exports(view.facts).map(|export| export.service);
    let services: BTreeSet<ServiceKey> = imported.chain(own).collect();
    services.iter().map(|service| import(view, service)).collect()
}

fn import(view: &View<'_>, service: &ServiceKey) -> Object {
    let exporters = exporters(view.facts, service, view.serving(service).iter().copied());
    let merged = crate::exports::merge(&exporters);
    let addresses = view.facts.addresses.of.get(service).copied().unwrap_or_default();
    let spec = ServiceImportSpec {
        ports: merged.ports.into_iter().map(import_port).collect(),
        r#type: merged.kind.as_str().to_owned(),
        ips: addresses.all().map(|address| address.to_string()).collect(),
        ip_families: addresses.all().map(|a| if a.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned()).collect(),
        ..ServiceImportSpec::default()
    };
    let place = (Some(service.namespace.as_str()), service.name.as_str());
    let created = exporters.first().map(|oldest| oldest.since);
    object(view, MCS, place, created, Spec::ServiceImport(spec))
}

fn import_port(port: Port) -> ImportPort {
    let Port { name, port, app_protocol, protocol } = port;
    ImportPort { name, port, protocol, app_protocol }
}

/// Links that no `ClusterLink` names.
pub fn links(view: &View<'_>) -> Vec<Object> {
    let unnamed = view.facts.links.values().filter(|link| view.facts.link_spec(&link.peer).is_none());
    unnamed.map(|made| link(view, made)).collect()
}

fn link(view: &View<'_>, link: &Link) -> Object {
    let gateways = view.facts.peer_gateways(link);
    let spec = ClusterLinkSpec {
        tag: Some(TagText(link.tag)),
        gateways: gateways.iter().map(|gateway| gateway.address.to_string()).collect(),
        ..ClusterLinkSpec::default()
    };
    let created = Some(Duration::from_secs(link.created_unix));
    object(view, TOMBOLO, (None, link.peer.as_str()), created, Spec::ClusterLink(spec))
}
