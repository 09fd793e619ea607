//! Any bytes as a foreign trust domain's bundle: an error, or a bundle that reads the same again. Any text as its token.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tombolo_identity::ForeignBundle;
use tombolo_identity::foreign::jwt::claimed_trust_domain;

fuzz_target!(|input: (&[u8], &str)| {
    let domain = || "partner.example".parse().expect("a trust domain");
    let _ = claimed_trust_domain(input.1);
    if let Ok(bundle) = ForeignBundle::parse(domain(), input.0) {
        let again = ForeignBundle::parse(domain(), bundle.to_json().as_bytes()).expect("what we write reads");
        assert_eq!(again, bundle);
        assert!(bundle.verify_jwt(input.1, "audience", Duration::ZERO).is_err());
    }
});
