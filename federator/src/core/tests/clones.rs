//! One identity, two processes: who is let in, who is told, and what outlives a restart of this federator.

use super::*;
use crate::core::Moment;

const FIRST: [u8; 16] = [1; 16];
const SECOND: [u8; 16] = [2; 16];

/// Milliseconds after a start that is long over.
fn after(millis: u64) -> Moment {
    let start = at(1000);
    let step = std::time::Duration::from_millis(millis);
    Moment { monotonic: start.monotonic + step, unix: start.unix + step }
}

/// A process with the identity of `member`, on a connection of its own.
fn process(
    east: &mut Cluster,
    member: &Joined,
    instance: [u8; 16],
    incarnation: u32,
) -> (Joined, v1::SidecarHello) {
    east.connections += 1;
    let process = Joined {
        identity: member.identity.clone(),
        lease: member.lease.clone(),
        connection: east.connections,
    };
    let hello = v1::SidecarHello {
        instance: instance.to_vec(),
        host: format!("host-{incarnation}"),
        endpoints: vec![member.endpoint(incarnation)],
        ..member.hello(&["shop/db"])
    };
    (process, hello)
}

fn machine(east: &mut Cluster) -> (Joined, Joined, v1::SidecarHello) {
    let member = east.join("vm", "db-1", at(0));
    let (first, hello) = process(east, &member, FIRST, 0);
    east.greet(&first, &hello, after(0)).unwrap();
    east.report(&first, healthy(&["shop/db"]), after(0)).unwrap();
    (member, first, hello)
}

#[test]
fn a_clone_is_refused_while_the_first_lives_and_the_first_keeps_its_place_and_is_told() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (member, first, hello) = machine(&mut east);
    let (second, copied) = process(&mut east, &member, SECOND, 1);
    let waits = east.greet(&second, &copied, after(100)).unwrap_err();
    assert!(matches!(waits, CoreError::Contested(wait) if wait.as_millis() == 1400), "{waits}");
    // The first reports as ever, and may come by another address in between.
    let moved = v1::SidecarHello { endpoint_addresses: vec!["10.9.9.9:7442".into()], ..hello.clone() };
    east.greet(&first, &moved, after(500)).unwrap();
    east.report(&first, healthy(&["shop/db"]), after(1000)).unwrap();
    let refused = east.greet(&second, &copied, after(1500)).unwrap_err();
    assert!(matches!(&refused, CoreError::Cloned(text) if text.contains("tombolo vm token")), "{refused}");
    let told = &east.core.facts.registry.members[&member.block()];
    assert_eq!(told.ids[0].value(), member.endpoint(0), "the first keeps its place");
    assert_eq!((told.clones.refused, told.clones.host.as_str()), (1, "host-1"));
    // Asked again, it is the same clone.
    east.greet(&second, &copied, after(32_000)).unwrap_err();
    assert_eq!(east.core.facts.registry.members[&member.block()].clones.refused, 1);
    let error = east.report(&second, healthy(&["shop/db"]), after(32_100)).unwrap_err();
    assert!(matches!(error, CoreError::Precondition(_)), "{error}");
    // In the audit log, and refused after a restart too, although the first has not come back yet.
    east.core.tick(after(40_000));
    drop(east);
    let mut east = world.start("east", after(50_000));
    let found = entries(&east.core);
    assert!(found.iter().any(|entry| entry.contains("clone") && entry.contains("refused")), "{found:?}");
    assert!(matches!(east.greet(&second, &copied, after(51_000)), Err(CoreError::Cloned(_))));
}

#[test]
fn a_process_that_was_killed_and_started_again_is_let_in_within_a_second_and_a_half() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (member, _, _) = machine(&mut east);
    let (again, hello) = process(&mut east, &member, SECOND, 1);
    assert!(matches!(east.greet(&again, &hello, after(300)), Err(CoreError::Contested(_))));
    east.greet(&again, &hello, after(1700)).unwrap();
    assert_eq!(east.core.facts.registry.members[&member.block()].clones.refused, 0);
    // One that said farewell is not waited for at all.
    east.report(&again, v1::StatusReport { leaving: true, ..healthy(&["shop/db"]) }, after(2000)).unwrap();
    let (third, hello) = process(&mut east, &member, [3; 16], 2);
    east.greet(&third, &hello, after(2100)).unwrap();
}

#[test]
fn a_holder_is_asked_whether_it_lives_and_its_silence_lets_the_next_process_in_soon() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (member, first, hello) = machine(&mut east);
    let answering = v1::SidecarHello { answers: true, ..hello };
    east.greet(&first, &answering, after(100)).unwrap();
    let (second, copied) = process(&mut east, &member, SECOND, 1);
    let waits = east.greet(&second, &copied, after(1000)).unwrap_err();
    assert!(matches!(waits, CoreError::Contested(wait) if (600..700).contains(&wait.as_millis())), "{waits}");
    let question = asked(&east, &member);
    assert_ne!(question, 0, "the holder is asked");
    // It lives: the answer is proof however soon it comes, and the question is over.
    let answer = |answer| v1::StatusReport { answer, ..healthy(&["shop/db"]) };
    east.report(&first, answer(question), after(1010)).unwrap();
    assert_eq!(asked(&east, &member), 0);
    assert!(matches!(east.greet(&second, &copied, after(1700)), Err(CoreError::Cloned(_))));
    // It is killed: an old answer, still on its way, is none to what is asked now; so the third is let in.
    let (third, restarted) = process(&mut east, &member, [3; 16], 2);
    let third_hello = v1::SidecarHello { answers: true, ..restarted };
    east.report(&first, answer(question), after(2000)).unwrap();
    assert!(matches!(east.greet(&third, &third_hello, after(2010)), Err(CoreError::Contested(_))));
    east.report(&first, answer(question), after(2020)).unwrap();
    assert_ne!(asked(&east, &member), 0);
    east.greet(&third, &third_hello, after(2700)).unwrap();
    assert_eq!(asked(&east, &member), 0, "of the process before");
    // One that answers what was never asked proves nothing to anybody.
    east.report(&third, answer(u64::MAX), after(2800)).unwrap();
    let (fourth, hello) = process(&mut east, &member, [4; 16], 3);
    assert!(matches!(east.greet(&fourth, &hello, after(2900)), Err(CoreError::Contested(_))));
    east.greet(&fourth, &hello, after(3600)).unwrap();
}

/// The question in the snapshot of a member.
fn asked(east: &Cluster, member: &Joined) -> u64 {
    let moment = after(0);
    let rings = crate::snapshot::rings::Rings::default();
    let facts = &east.core.facts;
    crate::snapshot::sidecar::snapshot(facts, member.block(), &[], &rings, moment.monotonic, moment.unix)
        .question
}

#[test]
fn a_first_that_was_cut_off_for_too_long_gets_its_place_back_from_the_clone() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let (member, first, _) = machine(&mut east);
    let (second, copied) = process(&mut east, &member, SECOND, 1);
    east.greet(&second, &copied, after(5_000)).unwrap();
    east.report(&second, healthy(&["shop/db"]), after(5_100)).unwrap();
    // One report may have been on its way; two that are apart are a process that lives.
    assert!(matches!(east.report(&first, healthy(&[]), after(6_000)), Err(CoreError::Precondition(_))));
    east.report(&first, healthy(&["shop/db"]), after(7_000)).unwrap();
    let holder = &east.core.facts.registry.members[&member.block()];
    assert_eq!((holder.ids[0].value(), holder.clones.refused), (member.endpoint(0), 1));
    assert!(matches!(east.report(&second, healthy(&[]), after(7_100)), Err(CoreError::Cloned(_))));
    assert!(matches!(east.greet(&second, &copied, after(7_200)), Err(CoreError::Cloned(_))));
    // A restart goes on with the first.
    drop(east);
    let east = world.start("east", after(9_000));
    assert_eq!(east.core.facts.registry.members[&member.block()].ids[0].value(), member.endpoint(0));
}

fn entries(core: &Core) -> Vec<String> {
    let page = core.audit_reader().after(0).unwrap();
    page.iter().map(|entry| format!("{entry:?}").to_lowercase()).collect()
}
