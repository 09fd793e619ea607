//! A thousand members: bounded work, in a debug build beside other tests.

use std::time::Instant;

use super::*;

/// Generous: the whole of it takes some seconds of one core.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_thousand_members_say_hello_and_report() {
    let started = Instant::now();
    // Not the disk is measured: each join waits for it several times.
    let memory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut world = World::in_dir(memory);
    let mut east = world.cluster("east");
    let services: Vec<String> = (0..100).map(|n| format!("shop/s{n}")).collect();
    let mut members = Vec::new();
    for index in 0..1000 {
        let service = services[index % services.len()].as_str();
        let member = east.join("sidecar", &format!("web-{index}"), at(0));
        east.greet(&member, &member.hello(&[service]), at(0)).unwrap();
        members.push((member, service));
    }
    east.core.publish(at(0));
    for second in 0..3 {
        for (index, (member, service)) in members.iter().enumerate() {
            east.report(member, healthy(&[service]), at(second)).unwrap();
            if index % 64 == 0 {
                east.core.publish(at(second));
            }
        }
        east.core.tick(at(second));
    }
    east.core.publish(at(3));
    assert_eq!(endpoint_ids(&east.core, "shop/s7").len(), 10);
    assert_eq!(east.core.facts.handles.len(), 101);
    let quiet = Instant::now();
    for (member, service) in &members {
        east.report(member, healthy(&[service]), at(4)).unwrap();
    }
    assert!(!east.core.dirty, "heartbeats change nothing");
    assert!(quiet.elapsed() < Duration::from_secs(5), "1000 heartbeats took {:?}", quiet.elapsed());
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
}
