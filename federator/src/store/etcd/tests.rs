//! Against a real etcd (built by `tests/setup.sh`), which is frozen, emptied of leases, and given to two owners.

use std::net::TcpListener;
use std::time::Instant;

use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tombolo_tests::kube::{etcd_args, require_control_plane};
use tombolo_tests::process::{Process, ProcessSpec};

use super::*;

/// One etcd, and stores in it.
struct World {
    runtime: Runtime,
    endpoint: String,
    etcd: Process,
    _dir: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl World {
    fn start(test: &str) -> Option<Self> {
        let bin = require_control_plane(test)?;
        let dir = tempfile::tempdir().unwrap();
        let url = |port| format!("http://127.0.0.1:{port}");
        let (endpoint, peer) = (url(free_port()), url(free_port()));
        let spec = ProcessSpec::new("etcd", bin.etcd());
        let spec = spec.args(etcd_args(&dir.path().join("data"), &endpoint, &peer));
        let etcd = spec.spawn(dir.path()).unwrap();
        let address = endpoint.trim_start_matches("http://").to_owned();
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline && !etcd.has_exited(), "{}", etcd.tail());
            std::thread::sleep(Duration::from_millis(50));
        }
        let runtime = Runtime::new().unwrap();
        Some(Self { runtime, endpoint, etcd, _dir: dir })
    }

    fn config(&self, owner: &str) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![self.endpoint.clone()],
            prefix: "/test".to_owned(),
            ca: None,
            certificate: None,
            user: None,
            lease: Duration::from_secs(3),
            owner: owner.to_owned(),
        }
    }

    fn open(&self, owner: &str) -> EtcdStore {
        self.runtime.block_on(EtcdStore::open(self.config(owner))).unwrap()
    }

    fn ends(&self, store: &EtcdStore, within: Duration) -> Option<String> {
        self.runtime.block_on(async { tokio::time::timeout(within, store.lost()).await.ok() })
    }

    /// Ends every lease, as time does to those of processes that stand still.
    fn end_leases(&self) {
        self.runtime.block_on(async {
            let mut client = etcd_client::Client::connect([&self.endpoint], None).await.unwrap();
            for lease in client.leases().await.unwrap().leases() {
                // One that its owner has just ended is as good.
                let _ = client.lease_revoke(lease.id()).await;
            }
        });
    }
}

fn put(table: Table, key: &str, value: &[u8]) -> Transaction {
    let write = Write::Put { table, key: key.to_owned(), value: value.to_vec() };
    Transaction { checks: Vec::new(), writes: vec![write] }
}

#[test]
fn what_was_committed_is_there_for_the_next_owner_small_large_and_many() {
    let Some(world) = World::start("what_was_committed_is_there_for_the_next_owner_small_large_and_many")
    else {
        return;
    };
    let store = world.open("a");
    assert!(store.is_empty());
    store.commit(&put(Table::Links, "a", b"1")).unwrap();
    let conflict = store.commit(&put(Table::Links, "b", b"2").absent(Table::Links, "a")).unwrap_err();
    assert_eq!((conflict.kind(), store.is_writable()), ("conflict", true));
    let large: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    store.commit(&put(Table::Imports, "west", &large)).unwrap();
    let mut many = Transaction::new();
    for n in 0..2500 {
        many.writes.extend(put(Table::Audit, &format!("{n:06}"), &[b'x'; 600]).writes);
    }
    store.commit(&many).unwrap();
    store.commit(&put(Table::Imports, "north", &large).delete(Table::Links, "a")).unwrap();
    store.commit(&put(Table::Imports, "north", b"small again")).unwrap();
    world.runtime.block_on(store.resign());
    drop(store);

    let next = world.open("b");
    assert!(!next.is_empty());
    assert_eq!(next.list(Table::Links), []);
    let imports = [("north".to_owned(), b"small again".to_vec()), ("west".to_owned(), large)];
    assert_eq!(next.list(Table::Imports), imports);
    let keys = |page: Page| page.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    assert_eq!(keys(next.after(Table::Audit, "001200", 2).unwrap()), ["001201", "001202"]);
    assert_eq!(keys(next.before(Table::Audit, "~", 2).unwrap()), ["002499", "002498"]);
    assert_eq!(next.before(Table::Audit, "~", 3000).unwrap().len(), 2500);
    assert_eq!(next.list(Table::Audit), [], "a log is not held in memory");
}

#[test]
fn one_owns_the_store_the_next_takes_over_and_the_former_writes_nothing() {
    let Some(world) = World::start("one_owns_the_store_the_next_takes_over_and_the_former_writes_nothing")
    else {
        return;
    };
    let first = world.open("a");
    first.commit(&put(Table::Links, "a", b"1")).unwrap();
    std::thread::scope(|scope| {
        let standby = scope.spawn(|| world.open("b"));
        std::thread::sleep(Duration::from_secs(4));
        assert!(!standby.is_finished(), "the first keeps its lease");
        first.commit(&put(Table::Links, "a", b"2")).unwrap();
        // The standby looks twice a second, the former owner every second: who is faster is the next.
        while !standby.is_finished() {
            world.end_leases();
            std::thread::sleep(Duration::from_millis(100));
        }
        let second = standby.join().unwrap();
        assert_eq!(second.get(Table::Links, "a").unwrap(), b"2");
        let refused = first.commit(&put(Table::Links, "a", b"3")).unwrap_err();
        assert!(matches!(refused, StoreError::NotOwner { ref owner } if owner == "b"), "{refused}");
        assert!(!first.is_writable());
        assert_eq!(world.ends(&first, Duration::from_secs(5)).as_deref(), Some("b"));
        second.commit(&put(Table::Links, "a", b"4")).unwrap();
    });
}

#[test]
fn a_transaction_may_write_a_key_twice_and_an_owners_key_that_was_removed_is_made_again() {
    let Some(world) =
        World::start("a_transaction_may_write_a_key_twice_and_an_owners_key_that_was_removed_is_made_again")
    else {
        return;
    };
    let store = world.open("a");
    for count in [2, 150] {
        let mut twice = Transaction::new();
        for n in 0..count {
            twice.writes.extend(put(Table::Shifts, &format!("{n:03}"), b"1").writes);
            twice.writes.extend(put(Table::Shifts, &format!("{n:03}"), b"2").writes);
        }
        store.commit(&twice.delete(Table::Shifts, "001")).unwrap();
        assert_eq!(store.list(Table::Shifts).len(), count - 1);
    }
    world.runtime.block_on(async {
        let mut client = etcd_client::Client::connect([&world.endpoint], None).await.unwrap();
        client.delete(Layout::new("/test").owner(), None).await.unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = store.commit(&put(Table::Links, "c", b"3")) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(200));
    }
    world.runtime.block_on(store.resign());
    let next = world.open("b");
    let values: Vec<_> = next.list(Table::Shifts).into_iter().map(|(_, value)| value).collect();
    assert_eq!((values.len(), next.list(Table::Links).len()), (149, 1));
    assert!(values.iter().all(|value| value == b"2"));
}

#[test]
fn many_keys_with_long_values_are_put_back_too_after_a_commit_without_an_answer() {
    let Some(world) =
        World::start("many_keys_with_long_values_are_put_back_too_after_a_commit_without_an_answer")
    else {
        return;
    };
    let store = world.open("a");
    let many = |byte: u8, bytes: usize| {
        let puts = (0..90).flat_map(|n| put(Table::Links, &format!("{n:03}"), &vec![byte; bytes]).writes);
        Transaction { checks: Vec::new(), writes: puts.collect() }
    };
    store.commit(&many(1, 40_000)).unwrap();
    world.etcd.signal(Signal::SIGSTOP).unwrap();
    // One request of 90 operations; what it may have overwritten is more than one takes.
    assert_eq!(store.commit(&many(2, 10)).unwrap_err().kind(), "unreachable");
    world.etcd.signal(Signal::SIGCONT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = store.commit(&put(Table::Links, "c", b"3")) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(200));
    }
    world.runtime.block_on(store.resign());
    let links = world.open("b").list(Table::Links);
    assert_eq!(links.len(), 91);
    assert!(links.iter().all(|(key, value)| key == "c" || *value == vec![1; 40_000]));
}

#[test]
fn who_was_replaced_by_one_that_wrote_and_went_does_not_go_on_with_what_it_knew() {
    let Some(world) =
        World::start("who_was_replaced_by_one_that_wrote_and_went_does_not_go_on_with_what_it_knew")
    else {
        return;
    };
    let first = world.open("a");
    first.commit(&put(Table::Links, "a", b"1")).unwrap();
    let layout = Layout::new("/test");
    world.runtime.block_on(async {
        let mut client = etcd_client::Client::connect([&world.endpoint], None).await.unwrap();
        // In one step: what another owner does between the end of a lease and a look at it.
        let gone = [TxnOp::delete(layout.owner(), None), TxnOp::put(layout.sequence(), "b", None)];
        client.txn(Txn::new().and_then(gone)).await.unwrap();
    });
    let mut ends = Vec::new();
    for _ in 0..3 {
        ends.push(first.commit(&put(Table::Links, "a", b"2")).unwrap_err().kind());
    }
    assert_eq!(ends, ["unreachable", "not_owner", "not_owner"]);
    assert_eq!(world.ends(&first, Duration::from_secs(5)).as_deref(), Some("b"));
    drop(first);
    world.end_leases();
    assert_eq!(world.open("c").get(Table::Links, "a").unwrap(), b"1");
}

#[test]
fn a_commit_that_etcd_did_not_answer_is_undone_and_the_owner_stays() {
    let Some(world) = World::start("a_commit_that_etcd_did_not_answer_is_undone_and_the_owner_stays") else {
        return;
    };
    let store = world.open("a");
    store.commit(&put(Table::Links, "a", b"1")).unwrap();
    world.etcd.signal(Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    let mut transaction = put(Table::Links, "a", b"2");
    transaction.writes.extend(put(Table::Links, "b", b"2").writes);
    transaction.writes.extend(put(Table::Audit, "000001", b"2").writes);
    let error = store.commit(&transaction).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }) && error.is_retryable(), "{error}");
    assert!(begun.elapsed() < PATIENCE * 3 && !store.is_writable());
    assert_eq!(store.get(Table::Links, "a").unwrap(), b"1", "reads go on");
    // Longer than the lease.
    std::thread::sleep(Duration::from_secs(4));
    world.etcd.signal(Signal::SIGCONT).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while let Err(error) = store.commit(&put(Table::Links, "c", b"3")) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(store.is_writable() && world.ends(&store, Duration::from_millis(100)).is_none());
    world.runtime.block_on(store.resign());
    let next = world.open("b");
    let links: Vec<_> = next.list(Table::Links).into_iter().map(|(key, value)| (key, value[0])).collect();
    assert_eq!(links, [("a".to_owned(), b'1'), ("c".to_owned(), b'3')]);
    assert_eq!(next.after(Table::Audit, "", 9).unwrap(), []);
}

#[test]
fn a_journal_that_was_complete_counts_and_one_that_was_not_does_not() {
    let Some(world) = World::start("a_journal_that_was_complete_counts_and_one_that_was_not_does_not") else {
        return;
    };
    let layout = Layout::new("/test");
    let writes: Vec<Write> =
        (0..300).flat_map(|n| put(Table::Shifts, &format!("{n:03}"), &[1; 5000]).writes).collect();
    let parts = Journal::parts(&writes);
    assert!(parts.len() > 2);
    for complete in [false, true] {
        world.runtime.block_on(async {
            let mut client = etcd_client::Client::connect([&world.endpoint], None).await.unwrap();
            for (number, part) in parts.iter().enumerate() {
                client.put(layout.journal_part("1-1", number), part.clone(), None).await.unwrap();
            }
            if complete {
                client.put(layout.journal_mark(), Journal::mark("1-1", parts.len()), None).await.unwrap();
            }
        });
        let store = world.open("a");
        assert_eq!(store.list(Table::Shifts).len(), if complete { 300 } else { 0 });
        world.runtime.block_on(store.resign());
    }
    assert_eq!(world.open("b").list(Table::Shifts).len(), 300, "and it is applied once");
}

#[test]
fn wrong_settings_are_refused_at_once_and_an_embedded_store_is_taken_over_whole() {
    let Some(world) =
        World::start("wrong_settings_are_refused_at_once_and_an_embedded_store_is_taken_over_whole")
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let open = |config| world.runtime.block_on(EtcdStore::open(config)).map(drop).unwrap_err().to_string();
    let missing = EtcdConfig { ca: Some(dir.path().join("none.pem")), ..world.config("a") };
    assert!(open(missing).contains("none.pem (--etcd-ca) can't be read"));
    let nonsense = EtcdConfig { endpoints: vec!["http://not a host".to_owned()], ..world.config("a") };
    assert!(open(nonsense).contains("--etcd-endpoint http://not a host: "));

    let file = RedbStore::open(&dir.path().join("store")).unwrap();
    file.commit(&put(Table::Links, "a", b"1")).unwrap();
    for n in 0..1200 {
        file.commit(&put(Table::Audit, &format!("{n:06}"), b"x")).unwrap();
    }
    let store = world.open("a");
    assert_eq!(store.take_over(&file).unwrap(), 1201);
    assert_eq!(store.get(Table::Links, "a").unwrap(), b"1");
    assert_eq!(store.before(Table::Audit, "~", 1).unwrap()[0].0, "001199");
}
