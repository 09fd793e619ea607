//! Any text as a SPIFFE bundle: an error, or a bundle that reads the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tombolo_identity::TrustBundle;

fuzz_target!(|text: &str| {
    let domain = || "acme.example".parse().expect("a trust domain");
    if let Ok(bundle) = TrustBundle::from_json(domain(), text) {
        let again = TrustBundle::from_json(domain(), &bundle.to_json()).expect("what we write reads");
        assert_eq!(again, bundle);
    }
});
