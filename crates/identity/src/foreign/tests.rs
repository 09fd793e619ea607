//! Documents and chains as foreign authorities make them, honest, broken and hostile.

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};

use super::jwt::claimed_trust_domain;
use super::*;
use crate::bundle::BundleSet;
use crate::cluster_binding::{ClusterBinding, OID};
use crate::tls::ExpectedPeer;

const NOW: Duration = Duration::from_secs(1_795_000_000);
const SERVER: &str = "spiffe://partner.example/spire/server";

fn domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}
fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}
fn moment(seconds: i64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(NOW.as_secs() as i64 + seconds).unwrap()
}

struct Authority {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn new(edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.subject_alt_names = vec![uri("spiffe://partner.example")];
        params.not_before = moment(-3600);
        params.not_after = moment(86_400);
        edit(&mut params);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { key, certificate }
    }

    fn leaf(&self, id: &str, edit: impl FnOnce(&mut CertificateParams)) -> Vec<CertificateDer<'static>> {
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.subject_alt_names = vec![uri(id)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = moment(-60);
        params.not_after = moment(3600);
        edit(&mut params);
        vec![params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().der().clone()]
    }

    fn jwk(&self, kid: &str) -> Value {
        let (x, y) = self.key.der_bytes()[1..].split_at(32);
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        json!({ "use": "jwt-svid", "kty": "EC", "crv": "P-256", "kid": kid, "x": x, "y": y })
    }

    fn x509(&self) -> Value {
        json!({ "use": "x509-svid", "kty": "EC", "x5c": [STANDARD.encode(&self.certificate)] })
    }

    fn token(&self, kid: &str, claims: &Value) -> String {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &EncodingKey::from_ec_der(&self.key.serialize_der())).unwrap()
    }
}

fn parse(document: &Value) -> Result<ForeignBundle, ForeignBundleError> {
    ForeignBundle::parse(domain("partner.example"), document.to_string().as_bytes())
}

#[test]
fn a_document_is_read_and_written_and_unknown_keys_are_skipped() {
    let authority = Authority::new(|_| ());
    let mut secret = authority.jwk("k1");
    secret["d"] = json!("a private part that somebody published");
    let okp = json!({ "use": "jwt-svid", "kty": "OKP", "crv": "Ed25519", "kid": "k2", "x": "AA" });
    let document = json!({
        "keys": [authority.x509(), authority.x509(), secret, okp, { "use": "wit-svid", "kty": "EC" }, { "kty": "EC" }],
        "spiffe_sequence": 7, "spiffe_refresh_hint": 60, "further": {},
    });
    let bundle = parse(&document).unwrap();
    assert_eq!((bundle.sequence(), bundle.refresh_hint()), (7, Some(Duration::from_secs(60))));
    assert_eq!((bundle.roots().len(), bundle.jwt_keys()), (1, 1));
    assert!(!bundle.jwks().contains("private") && bundle.jwks().contains("k1"), "{}", bundle.jwks());
    assert_eq!(ForeignBundle::parse(domain("partner.example"), bundle.to_json().as_bytes()).unwrap(), bundle);
    let empty = parse(&json!({ "keys": [] })).unwrap();
    assert!(empty.is_empty() && !bundle.is_empty());
    assert_eq!((empty.sequence(), empty.refresh_hint()), (0, None));
}

#[test]
fn broken_and_hostile_documents_are_refused_whole() {
    let authority = Authority::new(|_| ());
    let ours = Authority::new(|p| p.subject_alt_names = vec![uri("spiffe://acme.example")]);
    let leaf = Authority::new(|p| p.is_ca = IsCa::ExplicitNoCa);
    let trailing = [authority.certificate.as_ref(), &[0]].concat();
    let weak = json!({ "use": "jwt-svid", "kty": "RSA", "kid": "k", "e": "AQAB", "n": URL_SAFE_NO_PAD.encode([0xc5; 128]) });
    let mut off_curve = authority.jwk("k");
    off_curve["x"] = json!("AA");
    let many = vec![json!({ "kty": "EC" }); MAX_KEYS + 1];
    let cases = [
        ("no keys at all", json!({}), "malformed"),
        ("a list", json!([]), "malformed"),
        ("keys that are none", json!({ "keys": [1] }), "malformed"),
        ("a sequence that is none", json!({ "keys": [], "spiffe_sequence": -1 }), "malformed"),
        (
            "a root of our own trust domain",
            json!({ "keys": [authority.x509(), ours.x509()] }),
            "other_trust_domain",
        ),
        ("a leaf as a root", json!({ "keys": [leaf.x509()] }), "malformed"),
        ("no certificate", json!({ "keys": [{ "use": "x509-svid", "x5c": [] }] }), "malformed"),
        (
            "two certificates",
            json!({ "keys": [{ "use": "x509-svid", "x5c": [STANDARD.encode(&authority.certificate), STANDARD.encode(&authority.certificate)] }] }),
            "malformed",
        ),
        (
            "bytes to spare",
            json!({ "keys": [{ "use": "x509-svid", "x5c": [STANDARD.encode(trailing)] }] }),
            "malformed",
        ),
        ("no base64", json!({ "keys": [{ "use": "x509-svid", "x5c": ["%"] }] }), "malformed"),
        ("two keys of one name", json!({ "keys": [authority.jwk("k"), ours.jwk("k")] }), "malformed"),
        ("a nameless key", json!({ "keys": [authority.jwk("")] }), "malformed"),
        ("an endless name", json!({ "keys": [authority.jwk(&"k".repeat(300))] }), "malformed"),
        ("a weak key", json!({ "keys": [weak] }), "malformed"),
        (
            "no point",
            json!({ "keys": [{ "use": "jwt-svid", "kty": "EC", "crv": "P-256", "kid": "k" }] }),
            "malformed",
        ),
        ("too many keys", json!({ "keys": many }), "malformed"),
        ("too large", json!({ "keys": [], "padding": "x".repeat(MAX_BUNDLE_BYTES) }), "too_large"),
    ];
    for (case, document, kind) in cases {
        assert_eq!(parse(&document).expect_err(case).kind(), kind, "{case}");
    }
    let twice = br#"{"keys": [], "keys": []}"#;
    assert_eq!(ForeignBundle::parse(domain("partner.example"), twice).unwrap_err().kind(), "malformed");
}

#[test]
fn a_truncated_document_is_refused_wherever_it_is_cut() {
    let document = json!({ "keys": [Authority::new(|_| ()).x509()] }).to_string();
    for at in 0..document.len() {
        let cut = ForeignBundle::parse(domain("partner.example"), &document.as_bytes()[..at]);
        assert_eq!(cut.expect_err("cut").kind(), "malformed", "cut at {at}");
    }
}

#[test]
fn a_foreign_leaf_is_judged_by_its_own_domains_bundle_and_by_every_rule() {
    let authority = Authority::new(|_| ());
    let bundle = parse(&json!({ "keys": [authority.x509()] })).unwrap();
    let check = |chain: &[CertificateDer<'_>]| {
        bundle.authenticate(chain, Usage::Server, verify::unix_time(NOW)).map(|peer| peer.spiffe_id)
    };
    assert_eq!(check(&authority.leaf(SERVER, |_| ())).unwrap().as_str(), SERVER);
    let stranger = Authority::new(|_| ());
    let expired = |p: &mut CertificateParams| p.not_after = moment(-1);
    let both = |p: &mut CertificateParams| p.subject_alt_names.push(uri("spiffe://partner.example/b"));
    let cases = [
        (authority.leaf("spiffe://other.example/a", |_| ()), "unknown_trust_domain"),
        (authority.leaf("spiffe://partner.example", |_| ()), "no_path"),
        (authority.leaf(SERVER, expired), "expired"),
        (authority.leaf(SERVER, both), "uri_sans"),
        (authority.leaf(SERVER, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "leaf_is_ca"),
        (stranger.leaf(SERVER, |_| ()), "path"),
        (Vec::new(), "no_certificate"),
        (vec![authority.certificate.clone(); MAX_CHAIN + 1], "chain_too_long"),
    ];
    for (chain, kind) in cases {
        assert_eq!(check(&chain).expect_err(kind).kind(), kind);
    }
    let empty = parse(&json!({ "keys": [] })).unwrap();
    let refused = empty.authenticate(&authority.leaf(SERVER, |_| ()), Usage::Server, verify::unix_time(NOW));
    assert_eq!(refused.unwrap_err().kind(), "empty_bundle");
}

/// A foreign root may well sign an intermediate with our private extension, and a leaf that is called our federator.
#[test]
fn no_foreign_authority_can_make_a_member_or_infrastructure() {
    let dir = tempfile::tempdir().unwrap();
    let trust = crate::authority::RootAuthority::init(dir.path(), domain("acme.example"), NOW).unwrap();
    let root = Authority::new(|p| p.subject_alt_names.clear());
    let issuer = Issuer::from_ca_cert_der(&root.certificate, &root.key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = moment(-60);
    params.not_after = moment(3600);
    let tag = tombolo_model::ids::ClusterTag::new(7).unwrap();
    let binding = ClusterBinding { cluster: "east".parse().unwrap(), tag };
    params.custom_extensions = vec![CustomExtension::from_oid_content(OID, binding.to_der())];
    let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
    let intermediate = Authority { key, certificate };
    let bundles = BundleSet::of(trust.bundle());
    for (name, kind) in [("partner.example", "unknown_trust_domain"), ("acme.example", "path")] {
        let mut chain = intermediate.leaf(&format!("spiffe://{name}/cluster/east/federator"), |_| ());
        chain.push(intermediate.certificate.clone());
        // By its names alone it would be taken for one:
        let claimed = crate::peer_identity_from_certs(&chain).unwrap();
        let federator = ExpectedPeer::Role { cluster: "east".parse().unwrap(), path: "/federator".into() };
        assert!(federator.accepts(&claimed));
        for usage in [Usage::Client, Usage::Server] {
            let judged = verify::authenticate(&chain, &bundles, usage, verify::unix_time(NOW));
            assert_eq!(judged.unwrap_err().kind(), kind, "{name}");
        }
    }
}

#[test]
fn a_foreign_token_is_judged_by_its_own_domains_keys() {
    let authority = Authority::new(|_| ());
    let bundle = parse(&json!({ "keys": [authority.jwk("k1")] })).unwrap();
    let exp = NOW.as_secs() + 300;
    let claims = |sub: &str| json!({ "sub": sub, "aud": ["shop", "bank"], "exp": exp });
    let good = authority.token("k1", &claims("spiffe://partner.example/cart"));
    assert_eq!(claimed_trust_domain(&good), Some(domain("partner.example")));
    let judged = bundle.verify_jwt(&good, "bank", NOW).unwrap();
    assert_eq!(judged.spiffe_id.as_str(), "spiffe://partner.example/cart");
    let stranger = Authority::new(|_| ());
    let hs256 = jsonwebtoken::encode(
        &Header { kid: Some("k1".into()), ..Header::default() },
        &claims("spiffe://partner.example/cart"),
        &EncodingKey::from_secret(authority.key.der_bytes()),
    );
    let cases = [
        (good.clone(), "mail", "audience"),
        (authority.token("k2", &claims("spiffe://partner.example/cart")), "shop", "unknown_key"),
        (stranger.token("k1", &claims("spiffe://partner.example/cart")), "shop", "signature"),
        (
            authority.token("k1", &claims("spiffe://acme.example/cluster/east/federator")),
            "shop",
            "trust_domain",
        ),
        (authority.token("k1", &claims("cart")), "shop", "subject"),
        (
            authority.token("k1", &json!({ "sub": "spiffe://partner.example/a", "aud": "shop" })),
            "shop",
            "missing",
        ),
        (hs256.unwrap(), "shop", "algorithm"),
        ("a.b.c".to_owned(), "shop", "malformed"),
        ("x".repeat(20_000), "shop", "too_large"),
    ];
    for (token, audience, kind) in cases {
        let refused = bundle.verify_jwt(&token, audience, NOW).expect_err(kind);
        assert_eq!(refused.kind(), kind, "{token:.60}");
    }
    let late = Duration::from_secs(exp + 61);
    assert_eq!(bundle.verify_jwt(&good, "shop", late).unwrap_err().kind(), "expired");
    assert_eq!(claimed_trust_domain("a.b.c"), None);
}
