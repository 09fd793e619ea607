//! The words by which objects of ours are known, and names that follow from services.

use sha2::{Digest, Sha256};
use tombolo_model::names::ServiceKey;

/// Of every object that is written by a federator; what lacks it is somebody else's and is not touched.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The value of [`MANAGED_BY`], and the field manager of every write.
pub const TOMBOLO: &str = "tombolo";
/// On a derived `Service` and its slices (annotation): the `ServiceImport` that it gives an address.
pub const IMPORT: &str = "tombolo.dev/service-import";
/// On an `EndpointSlice` of a `Service` of the cluster.
pub const LOCAL_SERVICE: &str = "kubernetes.io/service-name";
/// On a pod (label, `"true"`): it has a sidecar of its own.
pub const INJECTED: &str = "tombolo.dev/injected";

/// Where shared sidecars listen for derived `Service`s, one number for each port of each.
pub const FRONT_PORTS: std::ops::RangeInclusive<u16> = 20_000..=29_999;

/// RFC 4648 section 7, lower case, without padding.
pub fn base32hex(bytes: &[u8], characters: usize) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    let bit = |index: usize| bytes.get(index / 8).map_or(0, |byte| usize::from(byte >> (7 - index % 8) & 1));
    let character = |at: usize| (0..5).fold(0, |value, index| value << 1 | bit(at * 5 + index));
    (0..characters).filter_map(|at| ALPHABET.get(character(at))).map(|byte| char::from(*byte)).collect()
}

/// The derived `Service` of an import, named as the reference implementation names it.
pub fn derived_name(service: &ServiceKey) -> String {
    format!("derived-{}", base32hex(&Sha256::digest(service.to_string()), 10))
}
