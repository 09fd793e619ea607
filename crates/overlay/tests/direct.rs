//! Two overlays of one cluster on loopback: dialling by handle, admission, identity, streams, GONE, gRPC plumbing.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod world;

use std::sync::Arc;
use std::time::Duration;

use tombolo_identity::{ExpectedPeer, tls};
use tombolo_overlay::{DialError, Inbound};
use world::{World, eventually};

#[tokio::test]
async fn a_dial_by_handle_reaches_the_service_and_both_sides_know_each_other() {
    let world = World::new();
    let (web, cart) = (world.svid("web"), world.svid("cart"));
    let (server, client) = (world.overlay(1, 0, &web), world.overlay(2, 3, &cart));
    server.set_inbound(world.inbound("east"));
    world.connect(&[&server, &client], &[&server]);
    tokio::time::sleep(Duration::from_millis(20)).await;

    let expected = ExpectedPeer::OneOf([world.id("web")].into());
    let target = world.target();
    let dialled = client.dial(&target, tls::mesh_client_config(&cart, expected).unwrap());
    let (dialled, accepted) = tokio::join!(dialled, server.accept());
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!(dialled.identity().unwrap().spiffe_id, world.id("web"));
    assert_eq!(accepted.identity().unwrap().spiffe_id, world.id("cart"));
    assert_eq!(accepted.service().unwrap().as_ref(), "shop/web");
    eventually("the endpoints are announced", || {
        dialled.peer_endpoint() == Some((world.tag, server.endpoint_id()))
            && accepted.peer_endpoint() == Some((world.tag, client.endpoint_id()))
    })
    .await;

    let (mut send, mut recv) = dialled.quic().open_bi().await.unwrap();
    let body = vec![7u8; 3_000_000];
    let upload = async {
        send.write_all(&body).await.unwrap();
        send.finish().unwrap();
    };
    let echo = async {
        let (mut send, mut recv) = accepted.quic().accept_bi().await.unwrap();
        let received = recv.read_to_end(4_000_000).await.unwrap();
        send.write_all(&received).await.unwrap();
        send.finish().unwrap();
        let _ = send.stopped().await;
    };
    let (_, _, back) = tokio::join!(upload, echo, recv.read_to_end(4_000_000));
    assert!(back.unwrap() == body, "three megabytes come back as they were sent");
}

#[tokio::test]
async fn a_valid_workload_that_is_not_the_services_is_refused_by_the_caller() {
    let world = World::new();
    let (thief, cart) = (world.svid("thief"), world.svid("cart"));
    let (server, client) = (world.overlay(1, 0, &thief), world.overlay(2, 0, &cart));
    server.set_inbound(world.inbound("east"));
    world.connect(&[&server, &client], &[&server]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let expected = ExpectedPeer::OneOf([world.id("web")].into());
    let error =
        client.dial(&world.target(), tls::mesh_client_config(&cart, expected).unwrap()).await.unwrap_err();
    assert!(matches!(error, DialError::Handshake(_)), "{error}");
    assert!(error.to_string().contains("thief"), "the error names who answered: {error}");
}

#[tokio::test]
async fn a_handle_of_another_cluster_or_an_unknown_one_opens_nothing() {
    let world = World::new();
    let (web, cart) = (world.svid("web"), world.svid("cart"));
    let (server, client) = (world.overlay(1, 0, &web), world.overlay(2, 0, &cart));
    server.set_inbound(world.inbound("north"));
    world.connect(&[&server, &client], &[&server]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let tls = tls::mesh_client_config(&cart, ExpectedPeer::Any).unwrap();
    // TLS ends before the callee can look at the importer: the connection is closed at once with the reason.
    if let Ok(connection) = client.dial(&world.target(), Arc::clone(&tls)).await {
        let reason = connection.closed().await.to_string();
        assert!(reason.contains("another cluster"), "{reason}");
    }
    assert_eq!(server.stats().importer_mismatch, 1);
    server.set_inbound(Inbound::default());
    assert!(matches!(client.dial(&world.target(), tls).await, Err(DialError::NoAnswer)));
    assert!(server.stats().refused >= 1);
}

#[tokio::test]
async fn a_restarted_endpoint_closes_the_connections_of_its_former_life() {
    let world = World::new();
    let (web, cart) = (world.svid("web"), world.svid("cart"));
    let (server, old) = (world.overlay(1, 0, &web), world.overlay(2, 0, &cart));
    server.set_inbound(world.inbound("east"));
    world.connect(&[&server, &old], &[&server]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let tls = tls::mesh_client_config(&cart, ExpectedPeer::Any).unwrap();
    let target = world.target();
    let (_before, accepted) = tokio::join!(old.dial(&target, Arc::clone(&tls)), server.accept());
    let accepted = accepted.unwrap();
    eventually("the old endpoint is announced", || accepted.peer_endpoint().is_some()).await;

    let new = world.overlay(2, 1, &cart);
    world.connect(&[&server, &new], &[&server]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let (after, _) = tokio::join!(new.dial(&target, tls), server.accept());
    assert!(after.is_ok());
    eventually("the old connection is closed", || accepted.is_closed()).await;
}
