//! The audit log: what is in it, that its chain holds through restarts, failures and pruning, and that tampering shows.

use tombolo_model::audit::{Action, Broken, Entry, Link, Outcome, Requester, Verifier};

use super::*;
use crate::core::audit::Retention;

/// Every entry, whose chain holds, and what the first one continues.
#[track_caller]
pub fn whole(core: &Core) -> (Vec<Entry>, Link) {
    let reader = core.audit_reader();
    let anchor = reader.anchor().unwrap();
    let mut verifier = Verifier::new(Some(anchor.clone()), None);
    let (mut entries, mut last) = (Vec::new(), anchor.sequence);
    loop {
        let page = reader.after(last).unwrap();
        let Some(newest) = page.last() else { break };
        last = newest.sequence;
        page.iter().for_each(|entry| verifier.push(entry).unwrap_or_else(|broken| panic!("{broken}")));
        entries.extend(page);
    }
    assert_eq!(
        verifier.head().unwrap(),
        &*core.audit_reader().heads().borrow(),
        "the head is the newest entry"
    );
    (entries, anchor)
}

fn shown(core: &Core, action: Action) -> Vec<Entry> {
    whole(core).0.into_iter().filter(|entry| entry.action == action).collect()
}

/// A minute later, so that whatever is due is written.
fn refused(east: &mut Cluster, action: Action, second: u64) -> Vec<Entry> {
    east.core.tick(at(second));
    let refused = |entry: &Entry| entry.outcome == Outcome::Refused;
    shown(&east.core, action).into_iter().filter(refused).collect()
}

#[test]
fn what_is_issued_renewed_made_linked_and_revoked_is_in_the_log_with_who_asked() {
    let (_world, mut east, _west) = linked();
    let operator = Requester::operator(Some(1000));
    let token = east.core.on_behalf(operator.clone(), |core| {
        let request =
            v1::CreateJoinTokenRequest { role: "vm".into(), name: "db-1".into(), ..Default::default() };
        token::decode(&core.create_join_token(&request, at(1)).unwrap().text).unwrap()
    });
    let answer = east.core.join_workload(&request_for(&token), at(2)).unwrap();
    let db = "spiffe://acme.example/cluster/east/vm/db-1";
    let made = shown(&east.core, Action::Token).pop().unwrap();
    assert_eq!((made.subject.as_str(), &made.token, &made.requester), (db, &token.token_id, &operator));
    let join = shown(&east.core, Action::Join).pop().unwrap();
    assert_eq!((join.subject.as_str(), &join.token, join.cluster.as_str()), (db, &token.token_id, "east"));
    assert_eq!(join.time, "2026-11-24T02:15:07.000Z");
    assert!(east.core.facts.identities.contains_key(&join.serial) && join.spki_sha256.len() == 64);
    assert_eq!(join.requester, Requester::default(), "nobody yet: the token alone speaks for it");

    let caller = identity_of(&east.core, db);
    let renew = v1::RenewRequest { csr_der: csr(), lease: answer.lease, workload: false };
    east.core.renew(&caller, &renew, at(3)).unwrap();
    let renewed = shown(&east.core, Action::Renew).pop().unwrap();
    assert_eq!((renewed.subject.as_str(), renewed.requester.identity.as_str()), (db, db));
    assert_ne!(renewed.serial, join.serial);

    let revocation = object(json!({
        "apiVersion": "tombolo.dev/v1alpha1", "kind": "Revocation", "metadata": { "name": "stolen" },
        "spec": { "node": "db-1", "reason": "stolen" },
    }));
    let key = revocation.key();
    east.core.on_behalf(operator.clone(), |core| {
        core.apply(revocation.clone(), true, at(4)).unwrap();
        assert_eq!(shown(core, Action::Revoke), [], "a dry run is not recorded");
        core.apply(revocation, false, at(4)).unwrap();
        core.apply(export("shop/web", "*"), false, at(4)).unwrap();
        core.delete(&key, false, at(5)).unwrap();
    });
    let revoked = shown(&east.core, Action::Revoke).pop().unwrap();
    assert_eq!((revoked.subject.as_str(), revoked.requester.uid), ("node:db-1", Some(1000)));
    assert_eq!(revoked.reason, "revocation/stolen: stolen");
    assert_eq!(shown(&east.core, Action::Unrevoke).pop().unwrap().requester, operator);

    let links = shown(&east.core, Action::Link);
    assert_eq!(links[0].subject, "cluster:west");
    assert_eq!(links[0].requester.identity, "spiffe://acme.example/cluster/west/federator");
    assert_eq!(shown(&east.core, Action::LinkToken)[0].token, links[0].token);
    east.core.unlink(&name("west"), at(6)).unwrap();
    assert_eq!(shown(&east.core, Action::Unlink)[0].subject, "cluster:west");
    assert!(!shown(&east.core, Action::OwnSvid).is_empty());
}

#[test]
fn every_kind_of_refusal_is_recorded_with_its_token_and_reason() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let token = east.token("sidecar", "web", at(0));
    east.core.join_workload(&request_for(&token), at(1)).unwrap();
    let (fresh, late) = (east.token("sidecar", "api", at(0)), east.token("sidecar", "old", at(0)));
    let wrong = v1::JoinWorkloadRequest { secret: vec![0; 32], ..request_for(&fresh) };
    let other = east.token("sidecar", "noise", at(0));
    let noise = v1::JoinWorkloadRequest { csr_der: vec![7; 300], ..request_for(&other) };
    let unknown = v1::JoinWorkloadRequest { token_id: "00".repeat(12), ..request_for(&fresh) };
    refusal(east.core.join_workload(&request_for(&token), at(1)));
    refusal(east.core.join_workload(&unknown, at(1)));
    refusal(east.core.join_workload(&request_for(&late), at(1000)));
    refusal(east.core.join_workload(&wrong, at(1)));
    refusal(east.core.join_workload(&noise, at(1)));
    let found = refused(&mut east, Action::Join, 1001);
    let reason = |entries: &[Entry], token: &str| -> String {
        entries
            .iter()
            .find(|entry| entry.token == token)
            .unwrap_or_else(|| panic!("{token}: {entries:?}"))
            .reason
            .clone()
    };
    assert_says(&reason(&found, &token.token_id), &["used already"]);
    assert_says(&reason(&found, &"00".repeat(12)), &["not known here"]);
    assert_says(&reason(&found, &late.token_id), &["expired"]);
    assert_says(&reason(&found, &fresh.token_id), &["its secret is wrong"]);
    assert_says(&reason(&found, &other.token_id), &["CSR"]);
    let of_token = found.iter().find(|entry| entry.token == token.token_id).unwrap();
    assert_eq!(of_token.subject, "spiffe://acme.example/cluster/east/ns/shop/sa/web");

    let stranger = identity_of(&east.core, "spiffe://acme.example/cluster/east/ns/shop/sa/web");
    refusal(east.core.renew(&stranger, &v1::RenewRequest::default(), at(1002)));
    let renew = refused(&mut east, Action::Renew, 1003).pop().unwrap();
    assert_eq!(renew.requester.identity, stranger.spiffe_id.as_str());
    assert_says(&renew.reason, &["lease"]);
}

#[test]
fn a_flood_of_refusals_costs_no_commits_and_an_end_writes_what_was_counted() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let token = east.token("sidecar", "web", at(0));
    let before = whole(&east.core).0.len();
    for n in 0..20_000_u32 {
        let id = format!("{n:024}");
        let request = v1::JoinWorkloadRequest { token_id: id, ..request_for_cheap(&token) };
        refusal(east.core.join_workload(&request, at(1)));
    }
    assert_eq!(whole(&east.core).0.len(), before, "nothing is written before the next tick");
    east.core.tick(at(2));
    let written = whole(&east.core).0;
    assert_eq!(written.len() - before, 65, "64 of a kind, and a count of the rest");
    refusal(east.core.join_workload(
        &v1::JoinWorkloadRequest { token_id: "x".into(), ..request_for_cheap(&token) },
        at(3),
    ));
    east.core.end(at(3));
    let entries = whole(&east.core).0;
    let counted: u64 = entries.iter().filter(|e| e.outcome == Outcome::Refused).map(|e| e.count).sum();
    assert_eq!(counted, 20_001);
}

/// Without a fresh key.
fn request_for_cheap(token: &v1::Token) -> v1::JoinWorkloadRequest {
    v1::JoinWorkloadRequest { secret: token.secret.clone(), name: token.name.clone(), ..Default::default() }
}

#[test]
fn what_could_not_be_stored_leaves_no_entry_and_no_gap() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let token = east.token("sidecar", "web", at(0));
    let before = whole(&east.core).0;
    east.store.set_broken(true);
    refusal(east.core.join_workload(&request_for(&token), at(1)));
    let unknown = v1::JoinWorkloadRequest { token_id: "no".into(), ..request_for(&token) };
    refusal(east.core.join_workload(&unknown, at(1)));
    east.core.tick(at(2));
    assert_eq!(whole(&east.core).0, before);
    east.store.set_broken(false);
    east.core.join_workload(&request_for(&token), at(3)).unwrap();
    east.core.tick(at(70));
    let after = whole(&east.core).0;
    assert_eq!(after.len(), before.len() + 2, "the join, and the refusal that had to wait: {after:?}");
    drop(east);
    let mut east = world.start("east", at(71));
    assert_eq!(whole(&east.core).0, after, "a restart continues the chain");
    east.join("sidecar", "api", at(72));
    assert_eq!(whole(&east.core).0.len(), after.len() + 2);
}

#[test]
fn old_entries_are_dropped_by_count_and_age_and_the_rest_continues_its_anchor() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    east.core.set_audit_retention(Retention { entries: 40, days: 30 });
    for n in 0..60 {
        east.token("sidecar", &format!("web-{n}"), at(10 * n));
    }
    let head = east.core.audit_reader().heads().borrow().clone();
    east.core.tick(at(601));
    let (kept, anchor) = whole(&east.core);
    assert_eq!((kept.len(), anchor.sequence), (40, head.sequence - 40));
    drop(east);
    // Restarted with the default retention, a month later.
    let mut east = world.start("east", at(602));
    assert_eq!(whole(&east.core).0, kept);
    east.core.set_audit_retention(Retention { entries: 40, days: 30 });
    east.core.tick(at(30 * DAY + 300));
    let (left, _) = whole(&east.core);
    assert_eq!((left.len(), left[0].time.as_str()), (30, "2026-11-24T02:20:05.000Z"), "{left:?}");
    east.core.tick(at(40 * DAY));
    assert_eq!(east.core.audit_reader().after(0).unwrap(), []);
    east.token("sidecar", "late", at(40 * DAY));
    let (left, anchor) = whole(&east.core);
    assert_eq!((left.len(), left[0].sequence), (1, anchor.sequence + 1), "an empty log goes on where it was");
}

#[test]
fn a_changed_or_missing_entry_in_the_store_is_named() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    for n in 0..5 {
        east.token("sidecar", &format!("web-{n}"), at(n));
    }
    let (entries, _) = whole(&east.core);
    let key = |entry: &Entry| format!("{:020}", entry.sequence);
    let check = |core: &Core| -> Result<(), Broken> {
        let mut verifier = Verifier::new(Some(Link::genesis()), None);
        core.audit_reader().after(0).unwrap().iter().try_for_each(|entry| verifier.push(entry))
    };
    let mut forged = entries[2].clone();
    forged.requester.uid = Some(4711);
    east.store.commit(&Transaction::new().put(key(&forged), &forged)).unwrap();
    assert!(matches!(check(&east.core), Err(Broken::Altered { sequence: 3, .. })));
    forged.hash = forged.digest();
    east.store.commit(&Transaction::new().put(key(&forged), &forged)).unwrap();
    assert!(matches!(check(&east.core), Err(Broken::Unlinked { sequence: 4, before: 3, .. })));
    east.store.commit(&Transaction::new().delete(Table::Audit, key(&forged))).unwrap();
    assert_eq!(check(&east.core), Err(Broken::Gap { before: 2, found: 4 }));
}

#[test]
fn a_trust_directory_that_was_exchanged_while_nobody_ran_is_in_the_log_once() {
    let mut world = World::new();
    let mut east = world.cluster("east");
    let start = |east: &mut Cluster, second| {
        east.core.note_trust_at_start(at(second).unix).unwrap();
        shown(&east.core, Action::Rotation)
    };
    assert_eq!(start(&mut east, 0), [], "a first start exchanges nothing");
    drop(east);
    let mut east = world.start("east", at(1));
    assert_eq!(start(&mut east, 1), [], "nor does a restart");
    drop(east);
    let fresh = world.root.sign_cluster(&name("east"), Existing::Renew, at(60).unix).unwrap();
    fresh.save(&world.trust_dir("east")).unwrap();
    let mut east = world.start("east", at(61));
    let [entry] = start(&mut east, 61).try_into().unwrap();
    assert!(entry.reason.contains("while the federator was stopped"), "{}", entry.reason);
    assert!(entry.reason.contains(&hex::encode(east.core.facts.trust.issuer_sha256)), "{}", entry.reason);
    drop(east);
    let mut east = world.start("east", at(62));
    assert_eq!(start(&mut east, 62).len(), 1);
}
