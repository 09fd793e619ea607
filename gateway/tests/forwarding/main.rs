//! Gateways on real sockets between real overlays, end to end.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

mod world;

use std::time::Duration;

use tombolo_gateway::counters::{Name, Reason};
use world::*;

/// East's gateways and client, west's gateways and server, all configured.
struct Pair {
    world: World,
    east: Vec<Gateway>,
    west: Vec<Gateway>,
    client: tombolo_overlay::Overlay,
    server: tombolo_overlay::Overlay,
}

impl Pair {
    fn new(gateways: usize) -> Self {
        let world = World::new();
        let start = |cluster: &str| {
            (0..gateways).map(|n| Gateway::start(&format!("{cluster}-{n}"))).collect::<Vec<_>>()
        };
        let (east, west) = (start("east"), start("west"));
        let client = world.overlay(&world.east, 7, 0, "cart", false);
        let server = world.overlay(&world.west, 9, 2, "web", false);
        let pair = Self { world, east, west, client, server };
        pair.configure();
        through(&pair.client, &pair.east.iter().collect::<Vec<_>>());
        through(&pair.server, &pair.west.iter().collect::<Vec<_>>());
        pair
    }

    fn configure(&self) {
        let (world, west) = (&self.world, &self.west);
        let mut in_east =
            snapshot(world, &world.east, &world.west, west.iter().map(|g| g.replica(g.border)).collect());
        in_east.endpoints.push(at_address(&self.client));
        let mut in_west = snapshot(
            world,
            &world.west,
            &world.east,
            self.east.iter().map(|g| g.replica(g.border)).collect(),
        );
        in_west.endpoints.push(at_address(&self.server));
        in_west.handles.push(serving(world, &[self.server.endpoint_id()]));
        self.east.iter().filter(|g| g.plane.is_some()).for_each(|g| g.configure(&world.east, &in_east));
        west.iter().filter(|g| g.plane.is_some()).for_each(|g| g.configure(&world.west, &in_west));
    }
}

fn link(name: &str) -> Name {
    Name::Link(name.into())
}

#[tokio::test]
async fn two_sidecars_talk_through_the_gateways_of_both_clusters() {
    let pair = Pair::new(1);
    let (dialled, accepted) = pair.world.connect(&pair.client, &pair.server).await;
    echo(&dialled, &accepted, 2_000_000).await;
    for (gateway, peer) in [(&pair.east[0], "west"), (&pair.west[0], "east")] {
        let figures = gateway.handle.counters().of(&link(peer));
        assert!(figures.bytes_in > 2_000_000 && figures.bytes_out > 2_000_000, "{peer}: {figures:?}");
        assert_eq!(figures.dropped(Reason::Mac), 0);
        let status = gateway.handle.status();
        assert!(status.hops[0].alive && status.hops[0].rtt.is_some(), "{status:?}");
    }
}
