//! The embedded store itself: compare-and-swap, and damaged, full or locked files.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::*;
use crate::store::Record;

/// A value for tests of the store.
#[derive(Serialize, Deserialize, PartialEq, Debug)]
pub struct Counted {
    pub count: u64,
    pub padding: String,
}
impl Record for Counted {
    const TABLE: Table = Table::Links;
}

/// A value of a log.
#[derive(Serialize, Deserialize)]
struct Logged(u64);
impl Record for Logged {
    const TABLE: Table = Table::Audit;
}

#[test]
fn a_log_is_read_page_by_page_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&dir.path().join("store")).unwrap();
    assert_eq!(store.after(Table::Audit, "", 5).unwrap(), []);
    for n in 0..10 {
        store.commit(&Transaction::new().put(format!("{n:04}"), &Logged(n))).unwrap();
    }
    let keys = |page: Page| page.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    assert_eq!(keys(store.after(Table::Audit, "0003", 2).unwrap()), ["0004", "0005"]);
    assert_eq!(keys(store.before(Table::Audit, "0003", 9).unwrap()), ["0002", "0001", "0000"]);
    assert_eq!(keys(store.before(Table::Audit, "~", 1).unwrap()), ["0009"]);
    assert_eq!(store.list(Table::Audit), [], "a log is not held in memory");
}

fn counted(count: u64, bytes: usize) -> Counted {
    Counted { count, padding: "x".repeat(bytes) }
}

#[test]
fn a_transaction_applies_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = RedbStore::open(&dir.path().join("store")).unwrap();
    store.commit(&Transaction::new().put("a", &counted(1, 0))).unwrap();
    let value = store.get(Table::Links, "a").unwrap();
    let cases = [
        Transaction::new().absent(Table::Links, "a"),
        Transaction::new().unchanged(Table::Links, "a", b"other".to_vec()),
        Transaction::new().unchanged(Table::Links, "b", value.clone()),
    ];
    for case in cases {
        let error = store.commit(&case.put("b", &counted(2, 0)).delete(Table::Links, "a")).unwrap_err();
        assert_eq!(error.kind(), "conflict");
        assert_says(&error.to_string(), &["links/", "nothing was written"]);
        assert_eq!(store.list(Table::Links), [("a".to_owned(), value.clone())]);
        assert!(store.is_writable(), "a conflict is not the disk's fault");
    }
    let good = Transaction::new().unchanged(Table::Links, "a", value).absent(Table::Links, "b");
    store.commit(&good.put("b", &counted(2, 0)).delete(Table::Links, "a")).unwrap();
    drop(store);
    let store = RedbStore::open(&dir.path().join("store")).unwrap();
    let keys: Vec<_> = store.list(Table::Links).into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["b"]);
}

#[test]
fn a_store_is_its_owners_alone_and_used_by_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = RedbStore::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = RedbStore::open(&path).err().unwrap();
    assert_says(&error.to_string(), &["in use by another process", "--state-dir"]);
    drop(store);
    RedbStore::open(&path).unwrap();
}

/// A file with some hundred kilobytes of records, and what they are.
fn filled(path: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let store = RedbStore::open(path).unwrap();
    for count in 0..40 {
        store.commit(&Transaction::new().put(format!("{count:04}"), &counted(count, 4000))).unwrap();
    }
    store.list(Table::Links)
}

/// Opened without a panic: either whole, or refused with words that help. Whether it was refused.
#[track_caller]
fn opens_whole_or_refuses(case: &str, path: &std::path::Path, expected: &[(String, Vec<u8>)]) -> bool {
    let bytes = std::fs::read(path).unwrap();
    match RedbStore::open(path) {
        Ok(store) => {
            let found = store.list(Table::Links);
            assert!(found == expected, "{case}: {} records, some not as written", found.len());
            false
        }
        Err(error) => {
            assert!(matches!(error, StoreError::Damaged { .. }), "{case}: {error}");
            assert_says(&error.to_string(), &["is damaged", "restore it from a backup, or move it away"]);
            assert!(std::fs::read(path).unwrap() == bytes, "{case}: the damaged file was changed");
            true
        }
    }
}

#[test]
fn a_file_that_was_cut_short_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let expected = filled(&path);
    let whole = std::fs::read(&path).unwrap();
    let mut refused = 0;
    let cuts = [1, 8, 63, 100, 320, 512, 4095, 4096, 8192, whole.len() / 4, whole.len() / 2, whole.len() - 1];
    for cut in cuts {
        std::fs::write(&path, &whole[..cut]).unwrap();
        refused += usize::from(opens_whole_or_refuses(&format!("cut to {cut} bytes"), &path, &expected));
    }
    assert_eq!(refused, cuts.len(), "a file that was cut short is not whole");
}

#[test]
fn a_file_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    for (case, bytes) in [("text", b"hello, world\n".repeat(1000)), ("zeros", vec![0; 100_000])] {
        std::fs::write(&path, bytes).unwrap();
        assert!(opens_whole_or_refuses(case, &path, &[]), "{case}");
    }
}

#[test]
fn flipped_bytes_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let expected = filled(&path);
    let whole = std::fs::read(&path).unwrap();
    let mut refused = 0;
    // Pages that are in use and pages that are not; those of the records must not read differently.
    for index in 0..60 {
        let place = whole.len() / 60 * index + index * 7 % 61;
        let mut torn = whole.clone();
        torn[place..whole.len().min(place + 16)].iter_mut().for_each(|byte| *byte ^= 0x55);
        std::fs::write(&path, &torn).unwrap();
        refused += usize::from(opens_whole_or_refuses(&format!("byte {place}"), &path, &expected));
    }
    assert!(refused > 0, "not one of these flips hit anything");
    // One value's own bytes, wherever they lie.
    let needle = b"\"count\":17,";
    let place = whole.windows(needle.len()).position(|window| window == needle).unwrap() + 8;
    let mut torn = whole.clone();
    for at in (0..whole.len() - needle.len()).filter(|at| whole[*at..].starts_with(needle)) {
        torn[at + 8] = b'9';
    }
    assert_eq!(torn[place], b'9');
    std::fs::write(&path, &torn).unwrap();
    assert!(
        opens_whole_or_refuses("a changed value", &path, &expected),
        "a value reads other than it was written"
    );
}

/// Arguments by which this test binary runs one ignored test of this module in another process.
pub fn child(test: &str, path: &std::path::Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "--ignored", "--nocapture", &format!("core::tests::{test}")]);
    command.env("TOMBOLO_TEST_STORE", path);
    command
}

pub fn child_store() -> PathBuf {
    std::env::var_os("TOMBOLO_TEST_STORE").expect("run by another test only").into()
}

#[test]
#[ignore = "the other process of a_full_disk_is_said_and_changes_nothing"]
fn full_disk_child() {
    let path = child_store();
    let store = RedbStore::open(&path).unwrap();
    let mut written = 0;
    let error = loop {
        assert!(written < 10_000, "the limit on file sizes does not hold");
        let key = format!("{written:04}");
        match store
            .commit(&Transaction::new().put(key.as_str(), &counted(written, 8000)).put(key, &Logged(written)))
        {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), "full", "{error}");
    assert!(!store.is_writable());
    let expected = store.list(Table::Links);
    assert_eq!(expected.len() as u64, written);
    assert!(store.after(Table::Audit, "", 1).is_err(), "a log is read from the disk");
    for _ in 0..3 {
        let large = Transaction::new().put("large", &counted(0, 200_000)).delete(Table::Links, "0000");
        assert_eq!(store.commit(&large).unwrap_err().kind(), "full");
        assert!(store.list(Table::Links) == expected, "a failed commit changed something");
    }
    drop(store);
    let store = RedbStore::open(&path).unwrap();
    assert!(store.list(Table::Links) == expected, "a failed commit reached the disk");
    let logged = store.after(Table::Audit, "", usize::MAX).unwrap();
    assert_eq!(logged.len() as u64, written, "a log has what its transactions have");
    println!("written {written}");
}

#[test]
fn a_full_disk_is_said_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    drop(RedbStore::open(&path).unwrap());
    let child = child("stores::full_disk_child", &path);
    // A limit on file sizes fails writes as a full disk does; its signal would end the process instead.
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 4096 && exec \"$@\"", "sh", &exe()]);
    limited.args(child.get_args()).env("TOMBOLO_TEST_STORE", &path);
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let written: u64 = text.lines().find_map(|line| line.split("written ").nth(1)?.parse().ok()).unwrap();
    assert!(written > 10, "{written}");
    // With room again, the same file goes on.
    let store = RedbStore::open(&path).unwrap();
    assert_eq!(store.list(Table::Links).len() as u64, written);
    store.commit(&Transaction::new().put("more", &counted(0, 200_000))).unwrap();
}

fn exe() -> String {
    std::env::current_exe().unwrap().to_str().unwrap().to_owned()
}
