//! A bundle endpoint as honest, broken and hostile ones are, on this machine, and what the client makes of each.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CrlDistributionPoint, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tombolo_identity::foreign::tls;
use tombolo_model::resource::trust_domain_federation::EndpointUrl;

use super::client::{FetchError, Patience, WebRoots, fetch};
use super::*;

const SERVER: &str = "spiffe://partner.example/spire/server";
/// A machine that stands still for a moment must not decide a test about silence.
const SHORT: Patience = Patience { connect: Duration::from_secs(2), whole: Duration::from_secs(2) };
const LONG: Patience = Patience { connect: Duration::from_secs(10), whole: Duration::from_secs(30) };

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

struct Authority {
    key: KeyPair,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { key, certificate }
    }

    fn bundle(&self) -> Arc<ForeignBundle> {
        let document =
            json!({ "keys": [{ "use": "x509-svid", "x5c": [STANDARD.encode(&self.certificate)] }] });
        let domain = "partner.example".parse().unwrap();
        Arc::new(ForeignBundle::parse(domain, document.to_string().as_bytes()).unwrap())
    }

    fn acceptor(&self, edit: impl FnOnce(&mut CertificateParams)) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.subject_alt_names = vec![uri(SERVER)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        edit(&mut params);
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder_with_provider(tombolo_identity::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// What a server does after the handshake.
#[derive(Clone)]
enum Behaviour {
    /// These bytes, then the end.
    Says(Vec<u8>),
    /// A body of so many zeros, as far as they are taken.
    Floods(usize),
    /// A byte now and then, for ever.
    Drips,
    Silent,
}

fn http(head: &str, body: &str) -> Behaviour {
    let text =
        format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    Behaviour::Says(text.into_bytes())
}

/// A server on a port of its own; `sent` counts the bytes of floods that were taken.
async fn serve(acceptor: TlsAcceptor, behaviour: Behaviour, sent: Arc<AtomicUsize>) -> EndpointUrl {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    #[allow(clippy::disallowed_methods)] // ends with the test's runtime
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 2048];
            let _ = stream.read(&mut request).await;
            match &behaviour {
                Behaviour::Says(bytes) => {
                    let _ = stream.write_all(bytes).await;
                    let _ = stream.shutdown().await;
                }
                Behaviour::Floods(total) => {
                    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    let _ = stream.write_all(head.as_bytes()).await;
                    let chunk = [b"2000\r\n".as_slice(), &[b' '; 0x2000], b"\r\n"].concat();
                    while sent.load(Ordering::Relaxed) < *total && stream.write_all(&chunk).await.is_ok() {
                        sent.fetch_add(0x2000, Ordering::Relaxed);
                    }
                }
                Behaviour::Drips => {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n").await;
                    while stream.write_all(b" ").await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
                Behaviour::Silent => tokio::time::sleep(Duration::from_secs(600)).await,
            }
        }
    });
    EndpointUrl::parse(&format!("https://127.0.0.1:{port}/")).unwrap()
}

async fn ask(
    authority: &Authority,
    behaviour: Behaviour,
    patience: Patience,
) -> Result<bytes::Bytes, FetchError> {
    let url = serve(authority.acceptor(|_| ()), behaviour, Arc::default()).await;
    fetch(&url, tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap(), patience)
        .await
}

#[tokio::test]
async fn an_honest_endpoint_is_believed_in_both_profiles() {
    let authority = Authority::new();
    let body = ask(&authority, http("200 OK", "{}"), LONG).await.unwrap();
    assert_eq!(body, "{}");

    let dir = tempfile::tempdir().unwrap();
    let roots = dir.path().join("roots.pem");
    let pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        STANDARD.encode(&authority.certificate)
    );
    std::fs::write(&roots, pem).unwrap();
    let client = tls::https_web_client(WebRoots::new(Some(roots.clone())).load().unwrap()).unwrap();
    let named = |p: &mut CertificateParams| {
        p.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().unwrap())];
    };
    let url = serve(authority.acceptor(named), http("200 OK", "{}"), Arc::default()).await;
    assert_eq!(fetch(&url, Arc::clone(&client), LONG).await.unwrap(), "{}");
    let url = serve(authority.acceptor(|_| ()), http("200 OK", "{}"), Arc::default()).await;
    assert_eq!(fetch(&url, client, LONG).await.unwrap_err().kind(), "tls", "an SVID is no web certificate");
    std::fs::write(&roots, "nothing").unwrap();
    let error = WebRoots::new(Some(roots)).load().unwrap_err();
    assert!(error.kind() == "web_roots" && error.to_string().contains("--bundle-client-roots"), "{error}");
}

#[tokio::test]
async fn whoever_is_not_the_agreed_identity_is_not_believed() {
    let authority = Authority::new();
    let another =
        |p: &mut CertificateParams| p.subject_alt_names = vec![uri("spiffe://partner.example/other")];
    let domain =
        |p: &mut CertificateParams| p.subject_alt_names = vec![uri("spiffe://acme.example/spire/server")];
    let expired = |p: &mut CertificateParams| {
        p.not_before = time::OffsetDateTime::UNIX_EPOCH;
        p.not_after = time::OffsetDateTime::UNIX_EPOCH + time::Duration::DAY;
    };
    let stranger = Authority::new();
    let cases = [
        ("another identity", authority.acceptor(another), "spiffe://partner.example/other"),
        ("another trust domain", authority.acceptor(domain), "acme.example"),
        ("an expired certificate", authority.acceptor(expired), "expired"),
        ("a stranger's authority", stranger.acceptor(|_| ()), "does not chain"),
    ];
    for (case, acceptor, says) in cases {
        let url = serve(acceptor, http("200 OK", "{}"), Arc::default()).await;
        let client = tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap();
        let error = fetch(&url, client, LONG).await.unwrap_err();
        assert!(error.kind() == "tls", "{case}: {error}");
        assert!(error.to_string().to_lowercase().contains(says), "{case}: {error}");
    }
}

#[tokio::test]
async fn answers_that_are_none_are_told_apart_and_nothing_is_followed() {
    let authority = Authority::new();
    let elsewhere = http("302 Found\r\nLocation: https://127.0.0.1:1/", "");
    let cases = [
        (elsewhere, "redirect", "https://127.0.0.1:1/"),
        (http("500 No", "{}"), "status", "500"),
        (Behaviour::Says(b"SSH-2.0-nothing\r\n".to_vec()), "http", "HTTP"),
        (Behaviour::Says(Vec::new()), "http", "HTTP"),
        (
            Behaviour::Says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"keys\":".to_vec()),
            "http",
            "HTTP",
        ),
        (
            Behaviour::Says([b"HTTP/1.1 200 OK\r\n".as_slice(), &b"X: y\r\n".repeat(50_000)].concat()),
            "http",
            "HTTP",
        ),
        (
            Behaviour::Says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n".to_vec()),
            "too_large",
            "65536",
        ),
    ];
    for (behaviour, kind, says) in cases {
        let error = ask(&authority, behaviour, LONG).await.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(says), "{kind}: {} {error}", error.kind());
    }
    let closed = EndpointUrl::parse("https://127.0.0.1:1/").unwrap();
    let client = tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap();
    assert_eq!(fetch(&closed, client, LONG).await.unwrap_err().kind(), "connect");
}

#[tokio::test]
async fn a_body_of_100_mb_is_given_up_after_its_first_part() {
    let authority = Authority::new();
    let sent = Arc::new(AtomicUsize::new(0));
    let url = serve(authority.acceptor(|_| ()), Behaviour::Floods(100 << 20), Arc::clone(&sent)).await;
    let client = tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap();
    let error = fetch(&url, client, LONG).await.unwrap_err();
    assert_eq!(error.kind(), "too_large");
    // What was on its way in the kernel's buffers was taken as well.
    assert!(sent.load(Ordering::Relaxed) < 20 << 20, "{} bytes", sent.load(Ordering::Relaxed));
}

#[tokio::test]
async fn silence_and_drips_end_with_the_patience() {
    let authority = Authority::new();
    for behaviour in [Behaviour::Silent, Behaviour::Drips] {
        let start = Instant::now();
        assert_eq!(ask(&authority, behaviour, SHORT).await.unwrap_err().kind(), "timed_out");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
    // One that does not even shake hands.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = EndpointUrl::parse(&format!("https://{}/", listener.local_addr().unwrap())).unwrap();
    let client = tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap();
    assert_eq!(fetch(&url, client, SHORT).await.unwrap_err().kind(), "timed_out");
}

/// A CRL of any size costs nothing where none is fetched.
#[tokio::test]
async fn what_a_certificate_points_to_is_never_fetched() {
    let authority = Authority::new();
    let bait = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    bait.set_nonblocking(true).unwrap();
    let address = format!("http://{}/bomb.crl", bait.local_addr().unwrap());
    let pointing = |p: &mut CertificateParams| {
        p.crl_distribution_points = vec![CrlDistributionPoint { uris: vec![address.clone(); 1000] }];
    };
    let url = serve(authority.acceptor(pointing), http("200 OK", "{}"), Arc::default()).await;
    let client = tls::https_spiffe_client(authority.bundle(), SERVER.parse().unwrap()).unwrap();
    assert_eq!(fetch(&url, client, LONG).await.unwrap(), "{}");
    let untouched = bait.accept().expect_err("somebody came for the CRL");
    assert_eq!(untouched.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_sequence_never_goes_back_and_an_empty_bundle_is_one() {
    let domain: TrustDomain = "partner.example".parse().unwrap();
    let document = |sequence: u64| json!({ "keys": [], "spiffe_sequence": sequence }).to_string();
    let held = succeed(&domain, None, document(7).as_bytes()).unwrap();
    assert!(held.is_empty());
    let after = |sequence| succeed(&domain, Some(&held), document(sequence).as_bytes());
    assert!(after(7).is_ok() && after(8).is_ok());
    for back in [after(6), succeed(&domain, Some(&held), br#"{"keys":[]}"#)] {
        let error = back.unwrap_err();
        assert!(
            error.kind() == "sequence_back" && error.to_string().contains("trustDomainBundle"),
            "{error}"
        );
    }
    assert_eq!(succeed(&domain, Some(&held), b"{\"keys\": [").unwrap_err().kind(), "malformed");
}

#[test]
fn endpoints_are_asked_as_often_as_they_say_within_bounds_and_less_often_while_they_fail() {
    let mut federation = Federation {
        object: "partner".into(),
        uid: String::new(),
        generation: 1,
        trust_domain: "partner.example".parse().unwrap(),
        spec: TrustDomainFederationSpec::default(),
        in_force: true,
        bundle: None,
        bundle_json: "".into(),
        fetched: None,
        since: 0,
        error: None,
        noted: None,
        unnoted: false,
        attempts: BTreeMap::new(),
    };
    let hinted = |hint: u64| {
        let document = json!({ "keys": [], "spiffe_refresh_hint": hint }).to_string();
        Some(Arc::new(ForeignBundle::parse("partner.example".parse().unwrap(), document.as_bytes()).unwrap()))
    };
    let seconds = |federation: &Federation, failures| schedule::next(federation, failures, 0.0).as_secs();
    assert_eq!(seconds(&federation, 0), 300, "the specification's default");
    for (hint, expected) in [(0, 300), (1, 5), (60, 60), (u64::MAX, 86_400)] {
        federation.bundle = hinted(hint);
        assert_eq!(seconds(&federation, 0), expected, "hint {hint}");
    }
    federation.bundle = hinted(60);
    let retries: Vec<u64> = [1, 2, 5, 6, 1000].into_iter().map(|n| seconds(&federation, n)).collect();
    assert_eq!(retries, [2, 4, 32, 60, 60]);
    assert_eq!(schedule::next(&federation, 0, 1.0), Duration::from_secs(54));

    assert!(!federation.is_stale(1_000_000), "nothing has failed");
    federation.error = Some(("timed_out", String::new()));
    federation.fetched = Some(1000);
    assert!(!federation.is_stale(1180) && federation.is_stale(1181));
    federation.in_force = false;
    assert!(!federation.is_stale(1181));
}
