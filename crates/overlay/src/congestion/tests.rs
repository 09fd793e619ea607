//! The model against simulated bottlenecks, and the controller's shared state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::congestion::{Controller, ControllerFactory};

use super::model::Phase;
use super::simulation::{Link, MTU};
use super::{ModelConfig, ModelController, ModelControllerFactory};

const RTT: Duration = Duration::from_millis(50);

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn random_loss_does_not_collapse_it_and_the_queue_stays_near_a_quarter_bdp() {
    for loss in [0.0, 0.001, 0.01] {
        let mut link = Link::new(300.0, RTT, 1.0, loss);
        link.ours();
        let first = link.run(seconds(2))[0];
        assert!(first.megabits > 150.0, "loss {loss}: first 2 s {first:?}");
        let share = link.run(seconds(10))[0];
        let (median, p95) = (link.queue_at(0.5), link.queue_at(0.95));
        println!("loss {loss}: first {first:.1?} then {share:.2?}, queue p50 {median:?} p95 {p95:?}");
        assert!(share.megabits >= 0.8 * 300.0, "loss {loss}: {share:?}");
        assert!(p95 <= RTT * 3 / 10, "loss {loss}: queue {p95:?}");
        assert!(share.loss <= loss + 0.01, "loss {loss}: own loss {share:?}");
    }
}

#[test]
fn a_shallow_buffer_is_not_flooded() {
    for buffer in [0.1, 0.25] {
        let mut link = Link::new(300.0, RTT, buffer, 0.0);
        link.ours();
        link.run(seconds(3));
        let share = link.run(seconds(10))[0];
        println!("buffer {buffer} BDP: {share:.2?}");
        assert!(share.megabits >= 0.8 * 300.0 && share.loss < 0.03, "buffer {buffer}: {share:?}");
    }
}

#[test]
fn two_flows_share_within_two_to_one_whoever_comes_first() {
    for loss in [0.0, 0.01] {
        let mut link = Link::new(300.0, RTT, 1.0, loss);
        link.ours();
        link.run(seconds(5));
        link.ours();
        link.run(seconds(10));
        let shares = link.run(seconds(20));
        let (median, p95) = (link.queue_at(0.5), link.queue_at(0.95));
        println!("loss {loss}: {shares:.1?}, queue p50 {median:?} p95 {p95:?}");
        let (a, b) = (shares[0].megabits, shares[1].megabits);
        assert!(a <= 2.0 * b && b <= 2.0 * a, "loss {loss}: {a} and {b}");
        assert!(a + b >= 0.8 * 300.0, "loss {loss}: {a} and {b}");
        // Each holds up to a quarter of what it measured while the other drained: about half a BDP together.
        assert!(median <= RTT / 2 && p95 <= RTT * 3 / 4, "loss {loss}: queue {median:?} {p95:?}");
    }
}

/// Generous bounds: a cubic flow's share swings with its sawtooth, and no controller that keeps its queue short holds
/// exactly half against one that fills it. Neither may fall below a sixth of the link.
#[test]
fn it_neither_starves_a_cubic_flow_nor_is_starved_by_it() {
    for (buffer, cubic_first) in [(1.0, true), (1.0, false), (2.0, true), (0.5, true)] {
        let mut link = Link::new(100.0, RTT, buffer, 0.0);
        let (ours, cubic);
        if cubic_first {
            cubic = link.cubic();
            link.run(seconds(5));
            ours = link.ours();
        } else {
            ours = link.ours();
            link.run(seconds(5));
            cubic = link.cubic();
        }
        link.run(seconds(10));
        let shares = link.run(seconds(40));
        println!(
            "buffer {buffer}, cubic first {cubic_first}: ours {:.1?} cubic {:.1?}",
            shares[ours], shares[cubic]
        );
        for share in &shares {
            assert!(share.megabits >= 100.0 / 6.0, "buffer {buffer}, cubic first {cubic_first}: {shares:?}");
        }
    }
}

#[test]
fn it_returns_to_a_short_queue_when_the_cubic_flow_ends() {
    let mut link = Link::new(100.0, RTT, 1.0, 0.0);
    let (ours, cubic) = (link.ours(), link.cubic());
    link.run(seconds(20));
    link.offer(cubic, Some(0.0));
    link.run(seconds(15));
    let share = link.run(seconds(5))[ours];
    let p95 = link.queue_at(0.95);
    assert!(!link.model(ours).is_crowded());
    assert!(share.megabits > 80.0 && p95 <= RTT * 3 / 10, "{share:?}, queue {p95:?}");
}

#[test]
fn a_changed_bottleneck_is_found_in_both_directions() {
    let mut link = Link::new(100.0, RTT, 1.0, 0.0);
    let flow = link.ours();
    link.run(seconds(5));
    link.set_rate(300.0);
    link.run(seconds(6));
    let up = link.run(seconds(4))[flow];
    assert!(up.megabits > 240.0, "{up:?}");
    link.set_rate(60.0);
    link.run(seconds(15));
    let down = link.run(seconds(5))[flow];
    let p95 = link.queue_at(0.95);
    println!("up {up:.1?} down {down:.1?} queue {p95:?}");
    assert!(down.megabits > 48.0 && down.loss < 0.02 && p95 < RTT, "{down:?}, queue {p95:?}");
}

#[test]
fn an_application_that_sends_little_does_not_lower_the_estimate() {
    let mut link = Link::new(300.0, RTT, 1.0, 0.0);
    let flow = link.ours();
    link.run(seconds(5));
    let known = link.model(flow).bandwidth().unwrap();
    link.offer(flow, Some(2.0));
    link.run(seconds(20));
    let after = link.model(flow).bandwidth().unwrap();
    assert!(after > 0.8 * known, "{known} then {after}");
    link.offer(flow, None);
    let share = link.run(seconds(1))[flow];
    assert!(share.megabits > 200.0, "{share:?}");
}

#[test]
fn single_losses_among_few_packets_do_not_hold_a_request_load_down() {
    // A hundred requests at once are 16 Mbit/s: 70 packets a round trip. From the start, or after one at a time.
    let mut slow = Vec::new();
    for (seed, before) in (1..=200).flat_map(|seed| [(seed, None), (seed, Some(0.2)), (seed, Some(2.0))]) {
        let mut link = Link::new(300.0, RTT, 1.0, 0.01);
        link.seed(seed);
        let flow = link.ours();
        if let Some(megabits) = before {
            link.offer(flow, Some(megabits));
            link.run(seconds(5));
        }
        link.offer(flow, Some(16.0));
        link.run(seconds(1));
        let share = link.run(seconds(2))[flow];
        if share.megabits < 14.0 {
            slow.push((seed, before, share.megabits, link.model(flow).window()));
        }
    }
    assert!(slow.is_empty(), "{} of 600: {slow:?}", slow.len());
}

#[test]
fn an_outage_restarts_the_model_and_the_flow_comes_back_fast() {
    let mut link = Link::new(300.0, RTT, 1.0, 0.0);
    let flow = link.ours();
    link.run(seconds(5));
    link.set_up(false);
    link.run(seconds(1));
    assert_eq!(link.model(flow).phase(), Phase::Startup);
    link.set_up(true);
    link.run(seconds(1));
    let share = link.run(seconds(2))[flow];
    assert!(share.megabits > 200.0, "{share:?}");
}

#[test]
fn on_a_lan_it_does_not_limit_and_keeps_the_queue_short() {
    let mut link = Link::new(4000.0, Duration::from_micros(200), 40.0, 0.0);
    let flow = link.ours();
    link.run(Duration::from_millis(200));
    let share = link.run(Duration::from_millis(500))[flow];
    let p95 = link.queue_at(0.95);
    println!("lan {share:.1?} queue p95 {p95:?}");
    assert!(share.megabits > 3600.0, "{share:?}");
    assert!(p95 < Duration::from_micros(2500), "queue {p95:?}");
    assert!(link.elapsed() > Duration::from_millis(600));
}

/// 100 Mbit/s with 50 ms of buffer: what the one that comes first queues is no part of the path for the one that comes later.
#[test]
fn on_a_slow_lan_whoever_comes_later_does_not_starve() {
    for later in [2, 5, 10, 20, 50, 200] {
        let mut link = Link::new(100.0, Duration::from_micros(200), 250.0, 0.0);
        link.ours();
        link.run(Duration::from_millis(later));
        link.ours();
        link.run(seconds(2));
        let shares = link.run(seconds(4));
        println!("{later} ms later: {shares:.1?}, queue p95 {:?}", link.queue_at(0.95));
        assert!(shares.iter().all(|share| share.megabits >= 100.0 / 6.0), "{later} ms later: {shares:?}");
    }
}

#[test]
fn the_window_is_never_below_four_packets_and_follows_the_mtu() {
    let now = Instant::now();
    let mut controller = ModelController::new(ModelConfig::default(), now, 1200);
    assert_eq!(controller.window(), 20 * 1200);
    controller.on_mtu_update(1452);
    assert_eq!((controller.window(), controller.initial_window()), (20 * 1452, 20 * 1452));
    for n in 1..200u32 {
        let at = now + n * RTT;
        let _ = controller.window();
        controller.on_sent(at - RTT, 1452, u64::from(n));
        controller.acked(at - RTT, 1452);
        controller.on_end_acks(at, 0, false, Some(u64::from(n)));
        controller.on_congestion_event(at, at, false, 100_000);
        assert!(controller.window() >= 4 * 1452);
    }
    controller.on_mtu_update(9000);
    assert!(controller.window() >= 4 * 9000);
}

#[test]
fn the_overlay_sees_acknowledgements_and_lifts_the_window_once() {
    let now = Instant::now();
    let factory = Arc::new(ModelControllerFactory::default());
    let mut controller = factory.build(now, 1452);
    // As the overlay gets at it: through a clone, as quinn's congestion_state() gives one.
    let clone = controller.clone_box().into_any().downcast::<ModelController>().unwrap();
    let state = clone.state();
    assert_eq!((state.last_ack(), state.last_send(), state.bytes_in_flight()), (None, None, 0));
    // A pure ACK: quinn does not ask for the window before it.
    controller.on_sent(now, 60, 1);
    assert_eq!((state.last_send(), state.bytes_in_flight()), (None, 0));
    let window = controller.window();
    controller.on_sent(now, window, 2);
    assert_eq!((state.last_send(), state.bytes_in_flight()), (Some(now), window));
    assert!(controller.window() <= state.bytes_in_flight(), "the window is full");
    state.lift_for_one_packet();
    assert!(controller.window() > state.bytes_in_flight() + MTU);
    controller.on_sent(now, 100, 3);
    assert!(controller.window() <= state.bytes_in_flight(), "once only");
    controller.on_congestion_event(now, now, false, 1000);
    assert_eq!((state.bytes_in_flight(), state.lost_bytes()), (window + 100 - 1000, 1000));
    let later = now + RTT;
    controller.on_end_acks(later, 500, false, Some(3));
    assert_eq!((state.last_ack(), state.bytes_in_flight()), (Some(later), 500));
}

#[test]
fn silence_counts_from_the_first_unacknowledged_packet_and_ends_with_an_acknowledgement() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let mut controller = ModelController::new(ModelConfig::default(), start, 1200);
    let state = controller.state();
    let send = |controller: &mut ModelController, ms| {
        controller.window();
        Controller::on_sent(controller, at(ms), 1000, 0);
    };
    assert_eq!(state.silence(at(500)), Duration::ZERO, "nothing was sent");
    send(&mut controller, 1000);
    send(&mut controller, 1010);
    assert_eq!(state.silence(at(1040)), Duration::from_millis(40), "from the first one");
    controller.acks_end(at(1050), 1000, false);
    assert_eq!(state.silence(at(1060)), Duration::from_millis(10), "one is still out");
    controller.acks_end(at(1070), 0, false);
    assert_eq!(state.silence(at(9000)), Duration::ZERO, "idle is not silent");
    send(&mut controller, 9000);
    assert_eq!(state.silence(at(9030)), Duration::from_millis(30), "idle time does not count");
}
