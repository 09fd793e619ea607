//! Identities of the federation: SPIFFE IDs, the offline root, cluster intermediates, leaves, bundles, verification.
//!
//! [`authority`] signs clusters (offline) with a key that [`signer`] holds, [`rotation`] is what a federation is told to trust,
//! [`issuer`] signs leaves and [`jwt`] JWT-SVIDs (federator), [`server_certificate`] makes certificates for callers outside the mesh, [`verify`] is the one place where a
//! chain becomes a [`PeerIdentity`], [`foreign`] judges what other trust domains show, [`tls`] puts it under rustls with hot-swappable snapshots. No clock is read
//! except inside the rustls verifiers, which are handed the time by rustls.

pub mod authority;
pub mod bundle;
pub mod bundle_document;
pub mod cluster_binding;
pub mod crl;
pub mod files;
pub mod foreign;
pub mod issuer;
pub mod jwt;
pub mod revocation;
pub mod rotation;
pub mod server_certificate;
pub mod signer;
pub mod spiffe_id;
pub mod tls;
pub mod verify;

pub use bundle::{BundleSet, TrustBundle};
pub use foreign::ForeignBundle;
pub use revocation::Revocations;
pub use spiffe_id::{SpiffeId, TrustDomain};
pub use tls::{ExpectedPeer, Svid, SvidHandle};
pub use verify::{IdentityError, PeerIdentity, peer_identity_from_certs};
