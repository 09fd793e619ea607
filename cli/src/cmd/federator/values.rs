//! Values of the federator's flags, each with an error that names what was given and what would be right.

use std::net::SocketAddr;
use std::path::PathBuf;

use tombolo_federator::bundle_endpoint::{BundleEndpointConfig, WebCertificate};
use tombolo_model::virtual_ranges::VirtualRanges;

use crate::failure::Failure;

/// One per family.
pub fn ranges(texts: Option<Vec<String>>) -> Result<VirtualRanges, Failure> {
    let texts = texts.unwrap_or_default();
    let parsed = VirtualRanges::parse(texts.iter().map(String::as_str));
    parsed.map_err(|error| Failure::usage(format_args!("--virtual-range: {error}")))
}

/// A certificate and its key go together, and with an address.
pub fn endpoint(
    listen: Option<SocketAddr>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<BundleEndpointConfig>, Failure> {
    let web = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(WebCertificate { certificate, key }),
        (None, None) => None,
        _ => {
            return Err(Failure::usage(
                "--bundle-endpoint-certificate and --bundle-endpoint-key go together",
            )
            .remedy("give both, or neither to show the federator's own SVID"));
        }
    };
    match (listen, web) {
        (None, Some(_)) => {
            Err(Failure::usage("--bundle-endpoint-certificate: there is no --bundle-endpoint")
                .remedy("give --bundle-endpoint 0.0.0.0:8443, or leave the certificate out"))
        }
        (listen, web) => Ok(listen.map(|listen| BundleEndpointConfig { listen, web })),
    }
}

/// `name=value`, as KEP-2149's ClusterProperty has them.
pub fn property(text: &str) -> Result<(String, String), Failure> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && name.len() <= 253 && value.len() <= 253 => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(Failure::usage(format_args!("--property {text:?} is not NAME=VALUE"))
            .remedy("give it as region.topology=eu-west-1")),
    }
}
