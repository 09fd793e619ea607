//! A second process with the identity of one that lives, over the wire: it waits until that is known, and is told why.

use tombolo_overlay::grpc;

use super::*;

#[tokio::test]
async fn a_second_process_waits_until_the_first_has_spoken_and_is_told_why_it_is_refused() {
    let home = Home::new("east");
    let federator = home.start();
    let web = Sidecar::join(&federator.token("sidecar", "web").await, &home.path("web"), "web").await;
    let hello = |instance: u8| v1::SidecarHello { instance: vec![instance; 16], ..web.hello(&["shop/web"]) };
    let mut first = web.client().await.watch_sidecar(hello(1)).await.unwrap().into_inner();
    let reports = async {
        loop {
            web.report("shop/web", true).await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    // A stream of its own over the same connection: who it is says the instance alone.
    let begun = Instant::now();
    let second = async { web.client().await.watch_sidecar(hello(2)).await };
    let refused = tokio::select! {
        _ = reports => unreachable!(),
        refused = second => refused.unwrap_err(),
    };
    assert!(refused.metadata().contains_key(grpc::CLONED), "{refused:?}");
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_millis(1300) && waited < Duration::from_millis(2900), "{waited:?}");
    let told = next(&mut first, "that there was a clone", |s| s.clones.is_some()).await;
    assert_eq!(told.clones.unwrap().refused, 1);
    federator.stop();
}
