//! Whatever a peer or a disk holds is parsed without panic.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

use proptest::prelude::*;
use tombolo_identity::cluster_binding::ClusterBinding;
use tombolo_identity::{ForeignBundle, SpiffeId, TrustBundle, peer_identity_from_certs};
use tombolo_model::ids::ClusterTag;

proptest! {
    #[test]
    fn any_text_is_a_spiffe_id_or_an_error(text in "\\PC*") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.as_str(), text.as_str());
            let _ = (id.cluster(), id.trust_domain(), id.within_cluster());
        }
    }

    #[test]
    fn valid_ids_round_trip(domain in "[a-z0-9._-]{1,30}", segments in proptest::collection::vec("[a-zA-Z0-9_-]{1,9}", 0..6)) {
        let path: String = segments.iter().map(|s| format!("/{s}")).collect();
        let id: SpiffeId = format!("spiffe://{domain}{path}").parse().unwrap();
        let trust_domain = id.trust_domain();
        prop_assert_eq!(trust_domain.as_str(), domain.as_str());
        prop_assert_eq!(id.path(), path.as_str());
    }

    #[test]
    fn bindings_round_trip(name in "[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?(\\.[a-z0-9]{1,62})?", tag in 1u32..=ClusterTag::MAX) {
        let binding = ClusterBinding { cluster: name.parse().unwrap(), tag: ClusterTag::new(tag).unwrap() };
        prop_assert_eq!(ClusterBinding::from_der(&binding.to_der()), Some(binding));
    }

    #[test]
    fn any_bytes_are_judged_without_panic(a in proptest::collection::vec(any::<u8>(), 0..300), b in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = ClusterBinding::from_der(&a);
        prop_assert!(peer_identity_from_certs(&[a.clone().into(), b.into()]).is_err());
        let _ = TrustBundle::from_json("acme.example".parse().unwrap(), &String::from_utf8_lossy(&a));
        prop_assert!(ForeignBundle::parse("partner.example".parse().unwrap(), &a).is_err());
    }
}
