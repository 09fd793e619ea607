//! A federator that ends and starts again, from its state or without it.

use super::*;

#[tokio::test]
async fn a_restarted_federator_keeps_blocks_and_rotation_and_its_revisions_grow() {
    let home = Home::new("east");
    let federator = home.start();
    let web = Sidecar::join(&federator.token("sidecar", "web").await, &home.path("web"), "web").await;
    let mut snapshots = web.watch(&["shop/web"]).await;
    let before = next(&mut snapshots, "a handle", |s| !s.inbound.is_empty()).await;
    web.report("shop/web", true).await.unwrap();
    let service = "shop/web".parse().unwrap();
    let facts = federator.until("in rotation", |f| !f.registry.healthy(&service).is_empty()).await;
    let (listen, revision) = (federator.overlay, facts.revision);
    let endpoint = facts.federator.unwrap().endpoint;
    federator.stop();

    let federator = start_again(&home, listen);
    let facts = federator.core.facts();
    assert!(facts.revision > revision);
    assert_ne!(facts.federator.unwrap().endpoint, endpoint, "another incarnation");
    assert_eq!(
        facts.registry.healthy(&service),
        [web.overlay.endpoint_id()],
        "in rotation before it is back"
    );
    let mut snapshots = web.watch(&["shop/web"]).await;
    let after = next(&mut snapshots, "a handle", |s| !s.inbound.is_empty()).await;
    assert!(after.revision > before.revision);
    assert_eq!(after.lease.unwrap().block, before.lease.unwrap().block);
    assert_eq!(after.inbound, before.inbound, "the same handles");
    federator.stop();
}

#[tokio::test]
async fn a_federator_that_lost_its_store_adopts_the_members_that_come_back() {
    let home = Home::new("east");
    let federator = home.start();
    let web = Sidecar::join(&federator.token("sidecar", "web").await, &home.path("web"), "web").await;
    let mut snapshots = web.watch(&["shop/web"]).await;
    let before = next(&mut snapshots, "a lease", |s| s.lease.is_some()).await.lease.unwrap();
    let listen = federator.overlay;
    federator.stop();
    std::fs::remove_dir_all(home.path("state")).unwrap();
    let federator = start_again(&home, listen);
    assert!(federator.core.facts().registry.members.is_empty());
    let mut snapshots = web.watch(&["shop/web"]).await;
    let after = next(&mut snapshots, "a lease", |s| s.lease.is_some()).await.lease.unwrap();
    assert_eq!(after.block, before.block);
    assert_eq!(after.keys, before.keys, "connection ids in use stay valid");
    assert!(federator.core.facts().leases[&web.member.lease().block].adopted);
    web.report("shop/web", true).await.unwrap();
    let service = "shop/web".parse().unwrap();
    federator.until("in rotation again", |f| !f.registry.healthy(&service).is_empty()).await;
    web.member.renew(&web.overlay).await.unwrap();
    federator.stop();
}

#[tokio::test]
async fn two_federators_do_not_share_a_state_directory_or_a_socket() {
    let home = Home::new("east");
    let federator = home.start();
    let refused = Running::start(home.config(local())).err().unwrap();
    assert_says(&refused.to_string(), &["in use by another process", "--state-dir"]);
    let config = FederatorConfig { state_dir: home.path("other"), ..home.config(local()) };
    let refused = Running::start(config.clone()).err().unwrap();
    assert_says(&refused.to_string(), &["another federator answers on", "--socket"]);
    let config = FederatorConfig { socket: home.path("run/other.sock"), ..config };
    let taken = FederatorConfig { listen: federator.overlay, ..config.clone() };
    let refused = Running::start(taken).err().unwrap();
    assert!(matches!(refused, BuildError::Overlay(_)), "{refused}");
    let wrong = FederatorConfig { cluster: "west".parse().unwrap(), ..config.clone() };
    let refused = Running::start(wrong).err().unwrap();
    assert_says(&refused.to_string(), &["holds the keys of cluster east, not of west"]);
    let none = FederatorConfig { trust_dir: home.path("nowhere"), ..config };
    let refused = Running::start(none).err().unwrap();
    assert_says(&refused.to_string(), &["tombolo trust cluster east", "--trust-dir"]);
    // A socket that nobody answers on is left over.
    let listen = federator.overlay;
    federator.stop();
    drop(std::os::unix::net::UnixListener::bind(home.path("run/federator.sock")).unwrap());
    start_again(&home, listen).stop();
}
