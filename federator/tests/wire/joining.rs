//! Joining with a token, and what a member does afterwards.

use tombolo_federator::registry::Presence;
use tombolo_identity::verify::peer_identity_from_certs;
use tombolo_overlay::keys::KeyRing;
use tombolo_overlay::member::JoinError;
use tombolo_proto::token;

use super::*;

#[tokio::test]
async fn a_member_joins_watches_reports_is_seen_renews_and_leaves() {
    let home = Home::new("east");
    let federator = home.start();
    let token = federator.token("sidecar", "web").await;
    let web = Sidecar::join(&token, &home.path("web"), "web").await;
    assert_eq!(web.member.spiffe_id().to_string(), "spiffe://acme.example/cluster/east/ns/shop/sa/web");

    let mut snapshots = web.watch(&["shop/web"]).await;
    let snapshot = next(&mut snapshots, "a handle for what it serves", |s| !s.inbound.is_empty()).await;
    assert_eq!((snapshot.cluster.as_str(), snapshot.direct), ("east", true));
    assert_eq!(snapshot.federators[0].address, federator.overlay.to_string());
    let lease = snapshot.lease.unwrap();
    assert_eq!(lease.block, web.member.lease().block.value());
    let keys = KeyRing::from_wire(lease.keys.as_ref().unwrap()).unwrap();
    assert_eq!(keys, web.member.lease().keys, "the same hour, the same keys");

    web.report("shop/web", true).await.unwrap();
    let service = "shop/web".parse().unwrap();
    federator.until("it is in rotation", |facts| !facts.registry.healthy(&service).is_empty()).await;
    let seen = next(&mut snapshots, "it is told of itself", |s| {
        s.upstreams[0].backends.iter().any(|backend| backend.healthy == 1)
    })
    .await;
    assert_eq!(seen.upstreams[0].backends[0].endpoints, [web.overlay.endpoint_id().value()]);
    assert!(seen.revision > snapshot.revision);
    let status = federator.admin().await.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert_says(&status.status_json, &["\"cluster\":\"east\"", "ns/shop/sa/web", "shop/web"]);

    let serial = |sidecar: &Sidecar| {
        let svid = sidecar.member.svid().load();
        peer_identity_from_certs(svid.chain()).unwrap().serial
    };
    let before = serial(&web);
    web.member.renew(&web.overlay).await.unwrap();
    assert_ne!(serial(&web), before, "a new SVID");
    assert_eq!(web.member.lease().block.value(), lease.block, "the same block");
    let reloaded = Member::load(&home.path("web")).unwrap().unwrap();
    assert_eq!(reloaded.svid().load().not_after, web.member.svid().load().not_after);

    let report = v1::StatusReport { leaving: true, ..Default::default() };
    web.client().await.report(report).await.unwrap();
    federator
        .until("it is out of rotation", |facts| {
            facts.registry.healthy(&service).is_empty()
                && facts.registry.members.values().all(|member| member.presence == Presence::Left)
        })
        .await;
    federator.stop();
}

#[tokio::test]
async fn a_member_whose_connection_closes_is_out_of_rotation_at_once() {
    let home = Home::new("east");
    let federator = home.start();
    let token = federator.token("sidecar", "web").await;
    let web = Sidecar::join(&token, &home.path("web"), "web").await;
    let snapshots = web.watch(&["shop/web"]).await;
    web.report("shop/web", true).await.unwrap();
    let service = "shop/web".parse().unwrap();
    federator.until("it is in rotation", |facts| !facts.registry.healthy(&service).is_empty()).await;
    drop(snapshots);
    web.member.disconnect().await;
    let facts = federator.until("it has left", |facts| facts.registry.healthy(&service).is_empty()).await;
    let member = facts.registry.members.values().next().unwrap();
    assert_eq!(member.presence, Presence::Left, "not only silent: {}", member.reason);
    federator.stop();
}

#[tokio::test]
async fn what_a_member_may_not_say_is_refused_over_the_wire_with_words() {
    let home = Home::new("east");
    let federator = home.start();
    let token = federator.token("sidecar", "web").await;
    let web = Sidecar::join(&token, &home.path("web"), "web").await;
    let early = web.report("shop/web", true).await.unwrap_err();
    assert_eq!(early.code(), tonic::Code::FailedPrecondition);
    assert_says(early.message(), &["open the configuration stream before reporting"]);
    let hello = web.hello(&["shop/web"]);
    let many = vec!["shop/web".to_owned(); 257];
    let cases = [
        (v1::SidecarHello { endpoints: vec![0], ..hello.clone() }, "not of the leased block"),
        (v1::SidecarHello { lease: None, ..hello.clone() }, "lease"),
        (v1::SidecarHello { upstreams: vec!["web".into()], ..hello.clone() }, "upstreams"),
        (v1::SidecarHello { upstreams: many, ..hello.clone() }, "257 are too many"),
    ];
    for (hello, words) in cases {
        let refused = web.client().await.watch_sidecar(hello).await.unwrap_err();
        assert_says(refused.message(), &[words]);
    }
    let gateway = v1::GatewayHello { name: "gw-1".into(), ..Default::default() };
    let refused = web.client().await.watch_gateway(gateway).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    web.watch(&["shop/web"]).await;
    federator.stop();
}

#[tokio::test]
async fn a_used_token_and_a_wrong_name_are_refused_and_leave_the_directory_empty() {
    let home = Home::new("east");
    let federator = home.start();
    let token = federator.token("sidecar", "web").await;
    Sidecar::join(&token, &home.path("web"), "web").await;
    let again = Member::join(&token, &home.path("again"), Some("web"), local()).await.unwrap_err();
    assert_eq!(again.kind(), "refused");
    assert_says(&again.to_string(), &["cluster east refused", "used already: make a new one"]);
    assert!(Member::load(&home.path("again")).unwrap().is_none());
    let other = federator.token("sidecar", "api").await;
    let wrong = Member::join(&other, &home.path("again"), Some("web"), local()).await.unwrap_err();
    assert_eq!(wrong.kind(), "wrong_name");
    Sidecar::join(&other, &home.path("again"), "api").await;
    federator.stop();
}

#[tokio::test]
async fn a_token_of_another_root_does_not_get_past_the_handshake() {
    let (home, elsewhere) = (Home::new("east"), Home::new("east"));
    let (federator, other) = (home.start(), elsewhere.start());
    let theirs = token::decode(&other.token("sidecar", "web").await).unwrap();
    let ours = token::decode(&federator.token("sidecar", "web").await).unwrap();
    // Their token, sent to our federator: its tag and keys too, so that the packets are at least let in.
    let misled = v1::Token {
        federators: ours.federators.clone(),
        join_keys: ours.join_keys.clone(),
        tag: ours.tag,
        ..theirs
    };
    // Our token, with their root.
    let forged = v1::Token { root_fingerprint: misled.root_fingerprint.clone(), ..ours.clone() };
    for token in [misled, forged] {
        let text = token::encode(&token);
        let error = Member::join(&text, &home.path("web"), Some("web"), local()).await.unwrap_err();
        assert!(matches!(error, JoinError::WrongPeer { .. }), "{error}");
        assert_says(&error.to_string(), &["not the federator of cluster east", "another federation"]);
        assert!(Member::load(&home.path("web")).unwrap().is_none());
    }
    Sidecar::join(&token::encode(&ours), &home.path("web"), "web").await;
    federator.stop();
    other.stop();
}

#[tokio::test]
async fn a_member_of_another_root_can_not_use_the_control_handle() {
    let (home, elsewhere) = (Home::new("east"), Home::new("east"));
    let (federator, other) = (home.start(), elsewhere.start());
    let ours = Sidecar::join(&federator.token("sidecar", "web").await, &home.path("web"), "web").await;
    let theirs = Sidecar::join(&other.token("sidecar", "web").await, &elsewhere.path("web"), "web").await;
    // All that lets a packet in, but the wrong certificate.
    let control = ours.member.control();
    let tls = tls::mesh_client_config(
        theirs.member.svid(),
        tombolo_identity::ExpectedPeer::OneOf(Arc::clone(&control.spiffe_ids)),
    )
    .unwrap();
    let target = tombolo_overlay::DialTarget {
        kind: Kind::Control,
        tag: ours.member.tag(),
        handle: control.handle,
        keys: Arc::clone(&control.keys),
    };
    let error = ours.overlay.dial(&target, tls).await.unwrap_err();
    assert!(!error.is_retryable() || error.to_string().contains("certificate"), "{error}");
    ours.watch(&["shop/web"]).await;
    federator.stop();
    other.stop();
}

#[tokio::test]
async fn fifty_members_join_at_once() {
    let home = Home::new("east");
    let federator = home.start();
    let mut joins = Vec::new();
    for index in 0..50 {
        let name = format!("web-{index}");
        let token = federator.token("sidecar", &name).await;
        let dir = home.path(&name);
        joins.push(async move { Sidecar::join(&token, &dir, &name).await });
    }
    let members = futures::future::join_all(joins).await;
    let mut blocks: Vec<_> = members.iter().map(|sidecar| sidecar.member.lease().block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), 50);
    for member in &members {
        member.watch(&["shop/web"]).await;
    }
    federator.until("all are there", |facts| facts.registry.members.len() == 50).await;
    federator.stop();
}
