//! What the API says and to whom, without a federator.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::jwt::{JwtAuthorities, JwtSigner};
use tombolo_identity::revocation::Target;
use tombolo_identity::{BundleSet, ForeignBundle, Revocations, SpiffeId};
use tombolo_overlay::member::workload::WorkloadSvid;
use tonic::{Code, Request};

use super::answers::Known;
use super::listener::{BindError, Listener, Peer, Policy};
use super::metrics::Metrics;
use super::{WorkloadApiConfig, service};
use crate::access::Access;

const NOW: Duration = Duration::from_secs(1_795_486_505);
const WEB: &str = "spiffe://acme.example/cluster/east/ns/shop/sa/web";

fn web() -> SpiffeId {
    WEB.parse().unwrap()
}

fn east() -> (tempfile::TempDir, RootAuthority, ClusterMaterial) {
    let dir = tempfile::tempdir().unwrap();
    let mut root = RootAuthority::init(&dir.path().join("t"), "acme.example".parse().unwrap(), NOW).unwrap();
    let east = root.sign_cluster(&"east".parse().unwrap(), Existing::Refuse, NOW).unwrap();
    (dir, root, east)
}

fn in_a_row(certificates: &[rustls::pki_types::CertificateDer<'_>]) -> Vec<u8> {
    certificates.iter().flat_map(|der| der.to_vec()).collect()
}

fn known() -> (Known, JwtSigner) {
    let (_dir, root, east) = east();
    let fresh = KeyAndCsr::generate().unwrap();
    let leaf = LeafIssuer::new(east).unwrap().issue(&fresh.csr_der, &web(), LEAF_LIFE, NOW).unwrap();
    let svid =
        WorkloadSvid { spiffe_id: web(), chain: leaf.chain, key: fresh.key_der, not_after: leaf.not_after };
    let signer = JwtSigner::generate("east".parse().unwrap()).unwrap();
    let known = Known {
        own: web(),
        bundles: BundleSet::of(root.bundle()),
        authorities: Arc::new(JwtAuthorities::new([signer.authority().clone()])),
        federated: Arc::default(),
        upstream_roots: Arc::default(),
        access: None,
        svid: Some(Arc::new(svid)),
        refused: false,
        unix: NOW.as_secs(),
    };
    (known, signer)
}

#[test]
fn an_answer_has_the_chain_the_key_and_the_bundle_and_ends_with_the_svid() {
    let (mut known, _) = known();
    let answer = known.x509_svid().unwrap();
    let [svid] = answer.svids.as_slice() else { panic!("{} SVIDs", answer.svids.len()) };
    assert_eq!(svid.spiffe_id, WEB);
    let issued = known.svid.clone().unwrap();
    assert_eq!(svid.x509_svid, in_a_row(&issued.chain));
    assert_eq!(svid.x509_svid_key, *issued.key);
    let roots = &known.bundles.get(&web().trust_domain()).unwrap().roots;
    assert_eq!(svid.bundle, in_a_row(roots));
    assert_eq!(known.x509_bundles().unwrap().bundles["spiffe://acme.example"], svid.bundle);
    assert!(!format!("{issued:?}").contains("key"), "{issued:?}");

    known.unix = issued.not_after;
    assert_eq!(known.x509_svid().unwrap_err().code(), Code::Unavailable);
    known.svid = None;
    assert_eq!(known.x509_svid().unwrap_err().code(), Code::Unavailable);
    assert!(known.jwt_bundles().is_ok() && known.x509_bundles().is_ok(), "bundles need no SVID");
}

#[test]
fn a_revoked_application_is_told_nothing() {
    let (mut known, signer) = known();
    let (token, _) = signer.sign(&web(), &["a".to_owned()], NOW).unwrap();
    assert!(known.validate(&token, "a", NOW).is_ok());
    known.refused = true;
    assert_eq!(known.x509_svid().unwrap_err().code(), Code::PermissionDenied);
    known.refused = false;
    let revoked = Revocations::new([(Target::SpiffeId(web()), "east/r".into())]);
    known.bundles = known.bundles.clone().revoking(revoked);
    let codes = [
        known.x509_svid().map(drop),
        known.x509_bundles().map(drop),
        known.jwt_bundles().map(drop),
        known.validate(&token, "a", NOW).map(drop),
    ];
    assert!(
        codes.iter().all(|code| code.as_ref().unwrap_err().code() == Code::PermissionDenied),
        "{codes:?}"
    );
}

#[test]
fn a_token_is_judged_and_its_claims_are_passed_on() {
    let (known, signer) = known();
    let (token, not_after) = signer.sign(&web(), &["a".to_owned(), "b".to_owned()], NOW).unwrap();
    let judged = known.validate(&token, "b", NOW).unwrap();
    assert_eq!(judged.spiffe_id, WEB);
    let exp = judged.claims.unwrap().fields["exp"].kind.clone();
    assert_eq!(exp, Some(prost_types::value::Kind::NumberValue(not_after as f64)));
    for (token, audience) in [(token.as_str(), "c"), ("nonsense", "a"), ("", "a"), (token.as_str(), "")] {
        assert_eq!(known.validate(token, audience, NOW).unwrap_err().code(), Code::InvalidArgument);
    }
    let jwks = known.jwt_bundles().unwrap().bundles["spiffe://acme.example"].clone();
    let jwks: serde_json::Value = serde_json::from_slice(&jwks).unwrap();
    assert_eq!(jwks["keys"][0]["kid"], signer.authority().kid());
}

#[test]
fn callers_need_the_metadata_and_a_user_who_may() {
    let request = |metadata: Option<&'static str>, uid: Option<u32>| {
        let mut request = Request::new(());
        if let Some(value) = metadata {
            request.metadata_mut().insert("workload.spiffe.io", value.parse().unwrap());
        }
        request.extensions_mut().insert(Peer { uid });
        request
    };
    let metrics = Metrics::register(&mut Registry::default());
    let mut admit = service::admit(Policy::new(500, &[1000]), metrics);
    let cases = [
        (Some("true"), Some(0), Code::Ok),
        (Some("true"), Some(500), Code::Ok),
        (Some("true"), Some(1000), Code::Ok),
        (Some("true"), Some(1001), Code::PermissionDenied),
        (Some("true"), None, Code::PermissionDenied),
        (Some("True"), Some(0), Code::InvalidArgument),
        (None, Some(0), Code::InvalidArgument),
    ];
    for (metadata, uid, expected) in cases {
        let code = admit(request(metadata, uid)).map_or_else(|status| status.code(), |_| Code::Ok);
        assert_eq!(code, expected, "{metadata:?} {uid:?}");
    }
}

#[tokio::test]
async fn the_socket_is_private_unless_others_are_named_and_never_somebody_elses() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let config =
        |name: &str, uids: &[u32]| WorkloadApiConfig { path: dir.path().join(name), uids: uids.to_vec() };
    let own = config("own/w.sock", &[]);
    let bound = Listener::bind(&own).await.unwrap();
    assert_eq!((mode(&own.path), mode(own.path.parent().unwrap())), (0o600, 0o700));
    let shared = config("shared/w.sock", &[1000]);
    let _shared = Listener::bind(&shared).await.unwrap();
    assert_eq!((mode(&shared.path), mode(shared.path.parent().unwrap())), (0o666, 0o755));

    assert!(matches!(Listener::bind(&own).await, Err(BindError::InUse { .. })));
    drop(bound);
    Listener::bind(&own).await.expect("what a killed process left is replaced");
    std::fs::write(dir.path().join("own/file"), "kept").unwrap();
    assert!(matches!(Listener::bind(&config("own/file", &[])).await, Err(BindError::NoSocket { .. })));
    let long = config(&"x".repeat(120), &[]);
    assert!(matches!(Listener::bind(&long).await, Err(BindError::TooLong { .. })));
    let open = dir.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = Listener::bind(&config("open/w.sock", &[])).await.unwrap_err().to_string();
    assert!(error.contains("--workload-api") && error.contains("chmod 700"), "{error}");
}

/// A foreign trust domain with one root and one JWT key of the test's own.
fn partner() -> (ForeignBundle, rcgen::KeyPair) {
    use base64::Engine;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
    use rcgen::PublicKeyData;
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap();
    let (x, y) = key.der_bytes()[1..].split_at(32);
    let document = serde_json::json!({ "keys": [
        { "use": "x509-svid", "kty": "EC", "x5c": [STANDARD.encode(root.der())] },
        { "use": "jwt-svid", "kty": "EC", "crv": "P-256", "kid": "k", "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y) },
    ] });
    let bundle = ForeignBundle::parse("partner.example".parse().unwrap(), document.to_string().as_bytes());
    (bundle.unwrap(), key)
}

/// Policies of `shop/web`, which is served here.
fn policies(spec: serde_json::Value) -> Option<Arc<Access>> {
    let policy = tombolo_proto::v1::AccessPolicy {
        name: "shop/p".into(),
        spec_json: spec.to_string(),
        services: vec!["shop/web".into()],
    };
    let snapshot = tombolo_proto::v1::SidecarSnapshot { access_policies: vec![policy], ..Default::default() };
    let (access, rejected) = Access::read(&snapshot, &"east".parse().unwrap());
    assert!(rejected.is_empty(), "{rejected:?}");
    Some(Arc::new(access))
}

#[test]
fn foreign_bundles_stand_beside_the_own_one_and_an_empty_one_is_absent() {
    let (mut known, _) = known();
    let own = known.x509_bundles().unwrap().bundles;
    let (bundle, _) = partner();
    let roots = in_a_row(bundle.roots());
    let empty = ForeignBundle::parse("gone.example".parse().unwrap(), br#"{"keys":[]}"#).unwrap();
    // A broken federator's, that would take the place of the own one.
    let ours = ForeignBundle::parse("acme.example".parse().unwrap(), br#"{"keys":[]}"#).unwrap();
    let all = [bundle, empty, ours].map(|bundle| (bundle.trust_domain().clone(), bundle));
    known.federated = Arc::new(all.into());
    let partner = "spiffe://partner.example".to_owned();
    assert_eq!(known.x509_svid().unwrap().federated_bundles, [(partner.clone(), roots.clone())].into());
    let x509 = known.x509_bundles().unwrap().bundles;
    assert_eq!((x509.len(), &x509[&partner]), (2, &roots));
    assert_eq!(x509["spiffe://acme.example"], own["spiffe://acme.example"]);
    let jwt = known.jwt_bundles().unwrap().bundles;
    assert!(jwt.len() == 2 && String::from_utf8_lossy(&jwt[&partner]).contains("jwt-svid"));
}

#[test]
fn a_foreign_token_needs_a_known_key_and_a_policy_that_names_its_subject() {
    let (mut known, _) = known();
    let (bundle, key) = partner();
    let token = |sub: &str| {
        let header = jsonwebtoken::Header {
            kid: Some("k".into()),
            ..jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256)
        };
        let claims = serde_json::json!({ "sub": sub, "aud": "shop", "exp": NOW.as_secs() + 60 });
        let key = jsonwebtoken::EncodingKey::from_ec_der(&key.serialize_der());
        jsonwebtoken::encode(&header, &claims, &key).unwrap()
    };
    let cart = token("spiffe://partner.example/cart");
    let code =
        |known: &Known, token: &str| known.validate(token, "shop", NOW).map(|_| ()).map_err(|e| e.code());
    assert_eq!(code(&known, &cart), Err(Code::InvalidArgument), "nothing is known of its domain");
    known.federated = Arc::new([(bundle.trust_domain().clone(), bundle)].into());
    let named =
        |id: &str| serde_json::json!({ "action": "ALLOW", "rules": [{ "from": [{ "identities": [id] }] }] });
    let cases = [
        (None, Err(Code::PermissionDenied)),
        (policies(serde_json::json!({ "action": "ALLOW", "rules": [{}] })), Err(Code::PermissionDenied)),
        (policies(named("spiffe://partner.example/other")), Err(Code::PermissionDenied)),
        (policies(named("spiffe://partner.example/cart")), Ok(())),
        (policies(named("spiffe://partner.example/*")), Ok(())),
    ];
    for (access, expected) in cases {
        known.access = access;
        assert_eq!(code(&known, &cart), expected);
    }
    let impostor = token(WEB);
    assert_eq!(
        code(&known, &impostor),
        Err(Code::InvalidArgument),
        "a foreign key speaks for its own domain alone"
    );
}
