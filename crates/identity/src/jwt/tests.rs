use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use proptest::prelude::*;

use super::*;
use crate::revocation::{Revocations, Target};
use crate::spiffe_id::TrustDomain;

const NOW: Duration = Duration::from_secs(1_795_486_505);
const WEB: &str = "spiffe://a.example/cluster/east/ns/shop/sa/web";

fn signer(cluster: &str) -> JwtSigner {
    JwtSigner::generate(cluster.parse().unwrap()).unwrap()
}
fn domain() -> TrustDomain {
    "a.example".parse().unwrap()
}
fn authorities(signers: &[&JwtSigner]) -> JwtAuthorities {
    JwtAuthorities::new(signers.iter().map(|signer| signer.authority().clone()))
}
fn judge(known: &JwtAuthorities, token: &str, now: Duration) -> Result<VerifiedJwt, JwtError> {
    known.verify(token, "shop", &domain(), &Revocations::default(), now)
}

/// A token with any header and claims, signed by the key.
fn forged(signer: &JwtSigner, header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(header), part(claims));
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, signer.pkcs8()).unwrap();
    let signature = key.sign(&aws_lc_rs::rand::SystemRandom::new(), message.as_bytes()).unwrap();
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[test]
fn a_token_holds_for_its_audience_and_life_wherever_its_key_is_known() {
    let (east, west) = (signer("east"), signer("west"));
    let audience = ["shop".to_owned(), "pay".to_owned()];
    let (token, not_after) = east.sign(&WEB.parse().unwrap(), &audience, NOW).unwrap();
    assert_eq!(not_after, NOW.as_secs() + 300);
    let known = authorities(&[&west, &east]);
    let verified = judge(&known, &token, NOW).unwrap();
    assert_eq!((verified.spiffe_id.as_str(), &verified.claims["sub"]), (WEB, &json!(WEB)));
    let within = NOW + TOKEN_LIFE + Duration::from_secs(59);
    assert!(judge(&known, &token, within).is_ok());
    assert!(matches!(judge(&known, &token, within + Duration::from_secs(1)), Err(JwtError::Expired(_))));
    let early = NOW - Duration::from_secs(61);
    assert!(matches!(judge(&known, &token, early), Err(JwtError::NotYetValid(_))));
    let other = known.verify(&token, "bank", &domain(), &Revocations::default(), NOW);
    assert!(matches!(other, Err(JwtError::Audience { .. })));
    assert!(matches!(judge(&authorities(&[&west]), &token, NOW), Err(JwtError::UnknownKey(_))));
    // The key survives the store.
    let again = JwtSigner::from_pkcs8("east".parse().unwrap(), east.pkcs8()).unwrap();
    assert_eq!(again.authority(), east.authority());
}

#[test]
fn a_cluster_signs_for_nobody_elses_subjects_and_none_is_believed_that_does() {
    let (east, west) = (signer("east"), signer("west"));
    let other = "spiffe://a.example/cluster/west/ns/shop/sa/web";
    let refused = east.sign(&other.parse().unwrap(), &["shop".to_owned()], NOW);
    assert!(matches!(refused, Err(JwtKeyError::OutsideCluster { .. })));
    let header = json!({ "alg": "ES256", "kid": east.authority().kid(), "typ": "JWT" });
    let claims = json!({ "sub": other, "aud": "shop", "exp": NOW.as_secs() + 60 });
    let stolen = forged(&east, &header, &claims);
    let error = judge(&authorities(&[&east, &west]), &stolen, NOW).unwrap_err();
    assert!(matches!(error, JwtError::WrongCluster { .. }), "{error}");
    // The same key announced by another cluster has another ID.
    let announced = JwtAuthority::new("west".parse().unwrap(), east.authority().point()).unwrap();
    assert_ne!(announced.kid(), east.authority().kid());
}

#[test]
fn revoked_identities_are_refused_by_name_node_and_cluster() {
    let east = signer("east");
    let vm = "spiffe://a.example/cluster/east/vm/db-1";
    let cluster: ClusterName = "east".parse().unwrap();
    for target in [
        Target::SpiffeId(vm.parse().unwrap()),
        Target::Node { cluster: cluster.clone(), name: "db-1".into() },
        Target::Cluster(cluster),
    ] {
        let (token, _) = east.sign(&vm.parse().unwrap(), &["shop".to_owned()], NOW).unwrap();
        let revoked = Revocations::new([(target, "east/r".into())]);
        let error = authorities(&[&east]).verify(&token, "shop", &domain(), &revoked, NOW).unwrap_err();
        assert!(matches!(error, JwtError::Revoked { .. }), "{error}");
    }
}

#[test]
fn what_breaks_a_rule_is_refused_by_that_rule() {
    let east = signer("east");
    let kid = east.authority().kid();
    let good_header = json!({ "alg": "ES256", "kid": kid });
    let good = json!({ "sub": WEB, "aud": ["shop"], "exp": NOW.as_secs() + 60 });
    let with = |key: &str, value: Value| {
        let mut claims = good.clone();
        claims[key] = value;
        claims
    };
    let without = |key: &str| {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(key);
        claims
    };
    let known = authorities(&[&east]);
    assert!(judge(&known, &forged(&east, &good_header, &good), NOW).is_ok());
    let cases = [
        ("malformed", json!({ "alg": "none", "kid": kid }), good.clone()),
        ("algorithm", json!({ "alg": "HS256", "kid": kid }), good.clone()),
        ("type", json!({ "alg": "ES256", "kid": kid, "typ": "at+jwt" }), good.clone()),
        ("unknown_key", json!({ "alg": "ES256" }), good.clone()),
        ("unknown_key", json!({ "alg": "ES256", "kid": "west-1" }), good.clone()),
        ("missing", good_header.clone(), without("sub")),
        ("missing", good_header.clone(), without("exp")),
        ("missing", good_header.clone(), with("exp", json!("tomorrow"))),
        ("expired", good_header.clone(), with("exp", json!(1))),
        ("not_yet_valid", good_header.clone(), with("nbf", json!(NOW.as_secs() + 3600))),
        ("subject", good_header.clone(), with("sub", json!("web"))),
        ("trust_domain", good_header.clone(), with("sub", json!(WEB.replace("a.example", "b.example")))),
        ("wrong_cluster", good_header.clone(), with("sub", json!("spiffe://a.example/web"))),
        ("audience", good_header.clone(), without("aud")),
        ("audience", good_header.clone(), with("aud", json!(7))),
    ];
    for (kind, header, claims) in cases {
        let error = judge(&known, &forged(&east, &header, &claims), NOW).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    let mut token = forged(&east, &good_header, &good);
    assert_eq!(judge(&known, &"x".repeat(20_000), NOW).unwrap_err().kind(), "too_large");
    let last = if token.ends_with('A') { "E" } else { "A" };
    token.replace_range(token.len() - 2..token.len() - 1, last);
    assert_eq!(judge(&known, &token, NOW).unwrap_err().kind(), "signature");
    for audience in [vec![], vec![String::new()], vec!["a".to_owned(); 17], vec!["a".repeat(513)]] {
        assert!(matches!(east.sign(&WEB.parse().unwrap(), &audience, NOW), Err(JwtKeyError::Audience(_))));
    }
}

#[test]
fn an_authority_is_a_point_of_the_curve() {
    let east = signer("east");
    let mut off = east.authority().point().to_vec();
    off[40] ^= 1;
    let cluster = || "east".parse().unwrap();
    assert!(matches!(JwtAuthority::new(cluster(), &off), Err(JwtKeyError::Point)));
    assert!(matches!(JwtAuthority::new(cluster(), &off[1..]), Err(JwtKeyError::Length(64))));
    let jwk = east.authority().to_jwk();
    assert_eq!((jwk["use"].as_str(), jwk["tombolo_cluster"].as_str()), (Some("jwt-svid"), Some("east")));
}

proptest! {
    #[test]
    fn no_text_is_believed_and_none_is_a_crash(text in "\\PC{0,200}(\\.\\PC{0,200}){0,3}") {
        let known = authorities(&[&signer("east")]);
        prop_assert!(judge(&known, &text, NOW).is_err());
    }
}
