//! Identities renewed on live connections: swapped leaves, intermediates and roots, peers that show nothing or lies.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod world;

use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::CertificateDer;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::issuer::{LEAF_LIFE, LeafIssuer};
use tombolo_identity::verify::Usage;
use tombolo_identity::{BundleSet, ExpectedPeer, Svid, SvidHandle, TrustBundle, tls};
use tombolo_overlay::revoking::Enforcer;
use tombolo_overlay::{Limits, Overlay, PeerConnection, attestation};
use tombolo_proto::v1::{ControlMessage, Reattest, control_message};
use tombolo_runtime::clock;
use world::{World, eventually};

/// Certificates count whole seconds: such a leaf ends between four and five from now. A loaded machine needs a second or
/// two until the new one is pinned.
const SHORT: Duration = Duration::from_secs(5);

/// Ticks of 100 ms, so that a swap is shown at once.
fn limits() -> Limits {
    Limits { expired_patience: Duration::from_secs(1), ..Limits::default() }
}

/// A caller (cart) with a connection to a service (web), from both ends.
struct Pair {
    web: SvidHandle,
    cart: SvidHandle,
    server: Overlay,
    client: Overlay,
    dialled: PeerConnection,
    accepted: PeerConnection,
}

impl Pair {
    async fn connect(world: &World, web: Svid, cart: Svid) -> Self {
        let (web, cart) = (SvidHandle::new(web), SvidHandle::new(cart));
        let server = world.overlay_with(1, 0, &web, limits());
        let client = world.overlay_with(2, 0, &cart, limits());
        server.set_inbound(world.inbound("east"));
        world.connect(&[&server, &client], &[&server]);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let tls = tls::mesh_client_config(&cart, ExpectedPeer::OneOf([world.id("web")].into())).unwrap();
        let target = world.target();
        let (dialled, accepted) = tokio::join!(client.dial(&target, tls), server.accept());
        let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
        Self { web, cart, server, client, dialled, accepted }
    }

    /// A byte there and back.
    async fn works(&self) -> bool {
        let ask = async {
            let (mut send, mut recv) = self.dialled.quic().open_bi().await.ok()?;
            send.write_all(b"?").await.ok()?;
            send.finish().ok()?;
            recv.read_to_end(1).await.ok()
        };
        let answer = async {
            let (mut send, mut recv) = self.accepted.quic().accept_bi().await.ok()?;
            recv.read_to_end(1).await.ok()?;
            send.write_all(b"!").await.ok()?;
            send.finish().ok()
        };
        tokio::join!(ask, answer).0.as_deref() == Some(b"!")
    }

    fn is_intact(&self) -> bool {
        [&self.dialled, &self.accepted].iter().all(|c| !c.is_closed() && !c.expired())
    }
}

/// Past the last second of every leaf that [`SHORT`] was for, and the tick after that.
async fn short_leaves_have_ended() {
    tokio::time::sleep(SHORT + Duration::from_millis(1300)).await;
}

#[tokio::test]
async fn a_leaf_swapped_on_either_side_is_pinned_anew_and_the_connection_outlives_the_old_one() {
    let world = World::new();
    let (web, cart) =
        (world.issue("web", SHORT, world.bundles()), world.issue("cart", SHORT, world.bundles()));
    let (old_web, old_cart) = (web.not_after as i64, cart.not_after as i64);
    let pair = Pair::connect(&world, web, cart).await;
    assert_eq!(pair.dialled.identity().unwrap().not_after, old_web);
    assert_eq!(pair.accepted.identity().unwrap().not_after, old_cart);

    pair.web.swap(world.issue("web", LEAF_LIFE, world.bundles()));
    eventually("the caller knows the server's new leaf", || pair.client.stats().attested == 1).await;
    assert!(pair.dialled.identity().unwrap().not_after > old_web + 3600);
    assert_eq!(pair.accepted.identity().unwrap().not_after, old_cart);

    pair.cart.swap(world.issue("cart", LEAF_LIFE, world.bundles()));
    eventually("the server knows the caller's new leaf", || pair.server.stats().attested == 1).await;
    let pinned = pair.accepted.identity().unwrap();
    assert!(pinned.not_after > old_cart + 3600);
    assert_eq!(pinned.chain_hash, *pair.cart.load().chain_hash());
    assert_eq!(pinned.spiffe_id, world.id("cart"));

    short_leaves_have_ended().await;
    assert!(pair.is_intact() && pair.works().await);
    for overlay in [&pair.server, &pair.client] {
        let stats = overlay.stats();
        assert_eq!((stats.attested, stats.attestations_refused.total(), stats.expired_closed), (1, 0, 0));
    }
}

#[tokio::test]
async fn a_further_intermediate_of_the_cluster_is_taken_on_live_connections() {
    let mut world = World::new();
    let (web, cart) =
        (world.issue("web", SHORT, world.bundles()), world.issue("cart", SHORT, world.bundles()));
    let pair = Pair::connect(&world, web, cart).await;
    let before = pair.accepted.identity().unwrap().issuer_spki;
    let material = world.root.sign_cluster(&world.name, Existing::Renew, clock::since_unix_epoch()).unwrap();
    world.issuer = LeafIssuer::new(material).unwrap();
    pair.web.swap(world.issue("web", LEAF_LIFE, world.bundles()));
    pair.cart.swap(world.issue("cart", LEAF_LIFE, world.bundles()));
    eventually("both know", || pair.client.stats().attested + pair.server.stats().attested == 2).await;
    let after = pair.accepted.identity().unwrap();
    assert_ne!(after.issuer_spki, before);
    assert_eq!(after.tag, world.tag);
    short_leaves_have_ended().await;
    assert!(pair.is_intact() && pair.works().await);
}

/// A second root of the same trust domain that knows the same clusters.
fn second_root(world: &World) -> (tempfile::TempDir, RootAuthority) {
    let dir = tempfile::tempdir().unwrap();
    let now = clock::since_unix_epoch();
    RootAuthority::init(dir.path(), world.root.trust_domain.clone(), now).unwrap();
    std::fs::copy(world.dir.path().join("registry.json"), dir.path().join("registry.json")).unwrap();
    let root = RootAuthority::load(dir.path()).unwrap();
    (dir, root)
}

#[tokio::test]
async fn a_new_root_is_taken_once_the_bundle_has_it_and_not_before() {
    let mut world = World::new();
    let (web, cart) =
        (world.issue("web", SHORT, world.bundles()), world.issue("cart", SHORT, world.bundles()));
    let pair = Pair::connect(&world, web, cart).await;
    let (_dir, mut root) = second_root(&world);
    let roots = [world.root.bundle().roots, root.bundle().roots].concat();
    let both = BundleSet::of(TrustBundle { roots, sequence: 2, ..world.root.bundle() });
    let old_issuer = LeafIssuer::new(
        world.root.sign_cluster(&world.name, Existing::Renew, clock::since_unix_epoch()).unwrap(),
    );
    let new = root.sign_cluster(&world.name, Existing::Renew, clock::since_unix_epoch()).unwrap();
    world.issuer = LeafIssuer::new(new).unwrap();

    // The server is early: its caller has not got the bundle yet.
    pair.web.swap(world.issue("web", LEAF_LIFE, both.clone()));
    eventually("the caller refuses", || pair.client.stats().attestations_refused.of("chain") == 1).await;
    assert!(pair.is_intact());

    // The caller gets the bundle with its old leaf's successor under the old root, then one under the new.
    let new_issuer = std::mem::replace(&mut world.issuer, old_issuer.unwrap());
    pair.cart.swap(world.issue("cart", LEAF_LIFE, both.clone()));
    eventually("the server takes it", || pair.server.stats().attested == 1).await;
    world.issuer = new_issuer;
    pair.cart.swap(world.issue("cart", LEAF_LIFE, both.clone()));
    pair.web.swap(world.issue("web", LEAF_LIFE, both));
    eventually("the server takes the new root", || pair.server.stats().attested == 2).await;
    eventually("so does the caller", || pair.client.stats().attested == 1).await;
    short_leaves_have_ended().await;
    assert!(pair.is_intact() && pair.works().await);
}

#[tokio::test]
async fn a_new_bundle_alone_says_nothing_to_peers() {
    let world = World::new();
    let web = world.issue("web", LEAF_LIFE, world.bundles());
    let key = tombolo_identity::issuer::KeyAndCsr::generate().unwrap();
    let issue = |csr: &[u8]| {
        world.issuer.issue(csr, &world.id("cart"), LEAF_LIFE, clock::since_unix_epoch()).unwrap().chain
    };
    let chain = issue(&key.csr_der);
    let with = |bundles| Svid::new(&key.key_der, chain.clone(), bundles).unwrap();
    let pair = Pair::connect(&world, web, with(world.bundles())).await;
    let (_dir, root) = second_root(&world);
    let roots = [world.root.bundle().roots, root.bundle().roots].concat();
    pair.cart.swap(with(BundleSet::of(TrustBundle { roots, sequence: 2, ..world.root.bundle() })));
    // A swap that is to be shown follows; only that one arrives.
    tokio::time::sleep(Duration::from_millis(300)).await;
    pair.cart.swap(world.issue("cart", LEAF_LIFE, world.bundles()));
    eventually("the leaf is shown", || pair.server.stats().attested == 1).await;
    assert_eq!(pair.server.stats().attested, 1);
}

#[tokio::test]
async fn a_peer_that_shows_no_new_leaf_is_drained_then_closed() {
    let world = World::new();
    let cart = world.issue("cart", SHORT, world.bundles());
    let end = cart.not_after;
    let pair = Pair::connect(&world, world.issue("web", LEAF_LIFE, world.bundles()), cart).await;
    let (mut send, mut recv) = pair.dialled.quic().open_bi().await.unwrap();
    send.write_all(b"?").await.unwrap();
    let (mut reply, mut request) = pair.accepted.quic().accept_bi().await.unwrap();

    pair.accepted.peer_expired().await;
    assert!(clock::unix_seconds() > end, "its last second counts");
    assert!(!pair.accepted.is_closed() && pair.accepted.expired());
    assert!(!pair.dialled.expired(), "the server's own leaf is good");
    // What is open goes on.
    let mut byte = [0];
    request.read_exact(&mut byte).await.unwrap();
    reply.write_all(b"!").await.unwrap();
    recv.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"!");
    // Too late.
    pair.cart.swap(world.issue("cart", LEAF_LIFE, world.bundles()));
    eventually("it is refused", || pair.server.stats().attestations_refused.of("late") == 1).await;

    let started = std::time::Instant::now();
    let reason = pair.dialled.closed().await;
    assert!(started.elapsed() < Duration::from_secs(1), "within the patience");
    let quinn::ConnectionError::ApplicationClosed(close) = reason else { panic!("{reason}") };
    assert_eq!(close.error_code, tombolo_overlay::close_code::EXPIRED.into());
    eventually("it is counted", || pair.server.stats().expired_closed == 1).await;
    assert_eq!(pair.client.stats().expired_closed, 0);
}

/// A leaf that no honest issuer makes, with its issuer; and its key.
fn forged_chain(
    material: &ClusterMaterial,
    id: &str,
    usage: ExtendedKeyUsagePurpose,
) -> (Vec<CertificateDer<'static>>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    let ca = KeyPair::from_pem(&material.key_pem).unwrap();
    let issuer = Issuer::from_ca_cert_der(&material.certificate, &ca).unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    (vec![leaf.der().clone(), material.certificate.clone()], key)
}

fn forge(material: &ClusterMaterial, id: &str, usage: ExtendedKeyUsagePurpose) -> Svid {
    let (chain, key) = forged_chain(material, id, usage);
    Svid::new(&key.serialize_der(), chain, BundleSet::of(material.bundle.clone())).unwrap()
}

/// What a hostile caller may show, and how it is refused.
fn lies(world: &mut World, exporter: &[u8; 32]) -> Vec<(&'static str, &'static str, Reattest)> {
    let now = clock::since_unix_epoch();
    let bundles = world.bundles();
    let own = world.id("cart").to_string();
    let good = world.issue("cart", LEAF_LIFE, bundles.clone());
    let say = |svid: &Svid, role, sequence| attestation::message(svid, role, sequence, exporter).unwrap();
    let client = |svid: &Svid| say(svid, Usage::Client, 10);
    let accepted = say(&good, Usage::Client, 9);

    let stranger = world.issue("cart", LEAF_LIFE, bundles.clone());
    let by_another_key = Reattest { signature: client(&stranger).signature, ..client(&good) };
    let recreated = world.root.sign_cluster(&world.name, Existing::Recreate, now).unwrap();
    let (_dir, mut other_root) = second_root(world);
    let unknown = other_root.sign_cluster(&world.name, Existing::Renew, now).unwrap();
    let forged = |material: &ClusterMaterial, id: &str, usage| client(&forge(material, id, usage));
    let for_clients = || ExtendedKeyUsagePurpose::ClientAuth;
    let for_servers = ExtendedKeyUsagePurpose::ServerAuth;
    let thief = client(&world.issue("thief", LEAF_LIFE, bundles));
    vec![
        ("the honest one, so that the next is a replay", "", accepted.clone()),
        ("a replayed sequence", "sequence", accepted),
        ("another workload of the cluster", "other_identity", thief),
        ("a signature by another key", "signature", by_another_key),
        ("a signature for the server's side", "signature", say(&good, Usage::Server, 10)),
        ("a leaf for servers only", "chain", forged(&world.issuer.material, &own, for_servers)),
        ("a root that is in no bundle", "chain", forged(&unknown, &own, for_clients())),
        ("the cluster after it was made anew", "other_tag", forged(&recreated, &own, for_clients())),
        ("the ninth in a row, whatever it says", "too_often", client(&good)),
    ]
}

#[tokio::test]
async fn each_lie_is_refused_with_its_reason_and_leaves_the_connection_as_it_was() {
    let mut world = World::new();
    let (web, cart) =
        (world.issue("web", LEAF_LIFE, world.bundles()), world.issue("cart", LEAF_LIFE, world.bundles()));
    let pair = Pair::connect(&world, web, cart).await;
    let exporter = pair.dialled.exporter().unwrap();
    let lies = lies(&mut world, &exporter);
    let mut expected = std::collections::BTreeMap::<&str, u64>::new();
    let mut pinned = pair.accepted.identity().unwrap();
    for (at, (what, reason, message)) in lies.into_iter().enumerate() {
        let message = ControlMessage { message: Some(control_message::Message::Reattest(message)) };
        assert!(pair.dialled.send_control(&message), "{what}");
        if reason.is_empty() {
            eventually(what, || pair.server.stats().attested == 1).await;
            pinned = pair.accepted.identity().unwrap();
            continue;
        }
        *expected.entry(reason).or_default() += 1;
        eventually(what, || pair.server.stats().attestations_refused.total() == at as u64).await;
        let refused = pair.server.stats().attestations_refused;
        let found = refused.iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(expected, found, "{what}");
        assert!(Arc::ptr_eq(&pair.accepted.identity().unwrap(), &pinned), "{what}");
        assert!(pair.is_intact() && pair.works().await, "{what}");
    }
    assert_eq!(pair.server.stats().attested, 1);
}

#[tokio::test]
async fn another_cluster_attests_neither_as_itself_nor_as_the_peer_and_unknown_messages_are_ignored() {
    let mut world = World::new();
    let (web, cart) =
        (world.issue("web", LEAF_LIFE, world.bundles()), world.issue("cart", LEAF_LIFE, world.bundles()));
    let pair = Pair::connect(&world, web, cart).await;
    let now = clock::since_unix_epoch();
    let west = world.root.sign_cluster(&"west".parse().unwrap(), Existing::Refuse, now).unwrap();
    let honest = world.issue("cart", LEAF_LIFE, world.bundles());
    let exporter = pair.dialled.exporter().unwrap();
    let mut stolen = attestation::message(&honest, Usage::Client, 1, &exporter).unwrap();
    let (chain, _) = forged_chain(&west, world.id("cart").as_str(), ExtendedKeyUsagePurpose::ClientAuth);
    stolen.chain_der = chain.iter().map(|certificate| certificate.to_vec()).collect();
    let western = "spiffe://acme.example/cluster/west/ns/shop/sa/cart";
    let western = forge(&west, western, ExtendedKeyUsagePurpose::ClientAuth);
    let western = attestation::message(&western, Usage::Client, 1, &exporter).unwrap();
    let say = |message| pair.dialled.send_control(&ControlMessage { message });
    assert!(say(None), "a message that an older peer does not know reads as none");
    assert!(say(Some(control_message::Message::Reattest(stolen))));
    assert!(say(Some(control_message::Message::Reattest(western))));
    let refused = || pair.server.stats().attestations_refused;
    eventually("both are refused", || refused().total() == 2).await;
    assert_eq!((refused().of("wrong_cluster"), refused().of("other_identity")), (1, 1));
    assert!(pair.is_intact() && pair.works().await);
}

fn revoked(name: &str, id: tombolo_identity::SpiffeId) -> tombolo_proto::v1::Revocation {
    tombolo_proto::v1::Revocation {
        name: name.to_owned(),
        cluster: "east".into(),
        target: Some(tombolo_proto::v1::revocation::Target::SpiffeId(id.to_string())),
        reason: "test".into(),
    }
}

#[tokio::test]
async fn a_revoked_peer_is_cut_on_either_side_refused_anew_and_welcome_once_it_is_taken_back() {
    let world = World::new();
    let svid = |account| world.issue(account, LEAF_LIFE, world.bundles());
    for (victim, caller_revoked) in [("cart", true), ("web", false)] {
        let pair = Pair::connect(&world, svid("web"), svid("cart")).await;
        let (handle, overlay, other) = match caller_revoked {
            true => (&pair.web, &pair.server, &pair.dialled),
            false => (&pair.cart, &pair.client, &pair.accepted),
        };
        let enforcer = Enforcer::new(handle.clone());
        let now = || Duration::from_millis(1_800_000_000_000);

        // Somebody else's revocation harms nobody.
        assert!(enforcer.learn(&[revoked("east/other", world.id("other"))]).is_empty());
        enforcer.enforce(overlay, now).await;
        assert!(pair.is_intact() && pair.works().await, "{victim}");
        let told = enforcer.untold();
        assert_eq!((told.len(), told[0].at_unix_ms), (1, 1_800_000_000_000));
        enforcer.told(&told);
        assert!(enforcer.untold().is_empty());

        assert!(enforcer.learn(&[revoked("east/r", world.id(victim))]).is_empty());
        // A renewed identity of ours forgets nothing.
        handle.swap(svid(if caller_revoked { "web" } else { "cart" }));
        enforcer.enforce(overlay, now).await;
        assert_eq!(overlay.stats().revoked_closed, 1, "{victim}");
        assert_eq!(enforcer.untold()[0].revocation, "east/r");
        let why = tokio::time::timeout(Duration::from_secs(1), other.closed()).await.unwrap();
        assert!(why.to_string().contains("revoked"), "{victim}: {why}");

        let tls =
            || tls::mesh_client_config(&pair.cart, ExpectedPeer::OneOf([world.id("web")].into())).unwrap();
        let accepted = tokio::time::timeout(Duration::from_millis(500), pair.server.accept());
        let target = world.target();
        let (dialled, accepted) = tokio::join!(pair.client.dial(&target, tls()), accepted);
        // TLS 1.3's caller is done before it is judged; then it is closed at once.
        if let Ok(dialled) = dialled {
            tokio::time::timeout(Duration::from_secs(1), dialled.closed()).await.expect("refused");
        }
        assert!(accepted.is_err(), "{victim} is accepted anew");

        assert!(enforcer.learn(&[]).is_empty());
        let (dialled, accepted) = tokio::join!(pair.client.dial(&target, tls()), pair.server.accept());
        assert!(dialled.is_ok() && accepted.is_some(), "{victim} is still refused");
        pair.client.close().await;
        pair.server.close().await;
    }
}
