//! Round trips, restarts, and files that are not what they should be.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::keys::{ClusterKey, Hour};

const NOW: Duration = Duration::from_secs(1_790_000_000);

fn lease(block: u32) -> EndpointLease {
    let block = Block::new(block).unwrap();
    let cluster = ClusterKey::from_bytes([1; 32]);
    EndpointLease {
        cluster: "east".parse().unwrap(),
        tag: ClusterTag::new(0x0a0b0c).unwrap(),
        block,
        spiffe_id: "spiffe://acme.example/cluster/east/vm/db-1".into(),
        not_after: 1_800_000_000,
        signature: vec![9; 71],
        keys: KeyRing::derive_now(NOW, |hour: Hour| cluster.endpoint_key(block, hour)),
        renewal_key: Some(cluster.renewal_key(block, 7)),
    }
}

fn prepared() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    LeaseFile::save(dir.path(), &lease(5)).unwrap();
    dir
}

fn burn(dir: &Path, after: u64) -> Result<u8, LeaseError> {
    LeaseFile::burn_incarnation(dir, NOW + Duration::from_secs(after)).map(|i| i.value())
}

#[test]
fn a_lease_survives_the_wire_and_the_disk() {
    let dir = prepared();
    assert_eq!(LeaseFile::load(dir.path()).unwrap(), Some(lease(5)));
    assert_eq!(EndpointLease::from_wire(&lease(5).to_wire()).unwrap(), lease(5));
    for name in ["lease.json", "lease.lock"] {
        let mode = fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(LeaseFile::load(empty.path()).unwrap(), None);
    assert_eq!(burn(empty.path(), 0).unwrap_err().kind(), "no_lease");
}

#[test]
fn what_is_signed_changes_with_every_signed_field_and_with_no_other() {
    let base = lease(5);
    let renewed = EndpointLease { keys: KeyRing::default(), signature: vec![], ..base.clone() };
    assert_eq!(base.signed_bytes(), renewed.signed_bytes());
    let expected = "00000018746f6d626f6c6f20656e64706f696e74206c656173652031000000046561737400000003\
                    0a0b0c00000004000000050000002a7370696666653a2f2f61636d652e6578616d706c652f636c75\
                    737465722f656173742f766d2f64622d3100000008000000006b49d200";
    assert_eq!(hex::encode(base.signed_bytes()), expected);
    for other in [
        EndpointLease { cluster: "west".parse().unwrap(), ..base.clone() },
        EndpointLease { tag: ClusterTag::new(1).unwrap(), ..base.clone() },
        EndpointLease { block: Block::new(6).unwrap(), ..base.clone() },
        EndpointLease { spiffe_id: "spiffe://acme.example/x".into(), ..base.clone() },
        EndpointLease { not_after: 1, ..base.clone() },
    ] {
        assert_ne!(base.signed_bytes(), other.signed_bytes());
    }
}

#[test]
fn bad_wire_fields_are_named() {
    let good = lease(5).to_wire();
    let cases = [
        (v1::EndpointLease { tag: 0, ..good.clone() }, "lease.tag"),
        (v1::EndpointLease { block: 1 << 28, ..good.clone() }, "lease.block"),
        (v1::EndpointLease { cluster: "East".into(), ..good.clone() }, "lease.cluster"),
        (v1::EndpointLease { spiffe_id: "x".repeat(5000), ..good.clone() }, "lease.spiffe_id"),
        (v1::EndpointLease { not_after_unix: -1, ..good.clone() }, "lease.not_after_unix"),
        (v1::EndpointLease { signature: vec![0; 5000], ..good.clone() }, "lease.signature"),
        (
            v1::EndpointLease { keys: Some(v1::KeyRing { first_hour: 1, keys: vec![vec![1]] }), ..good },
            "keys",
        ),
    ];
    for (wire, field) in cases {
        assert_eq!(EndpointLease::from_wire(&wire).unwrap_err().field, field);
    }
}

#[test]
fn sixteen_starts_need_no_federator_and_the_seventeenth_says_how_long_to_wait() {
    let dir = prepared();
    for n in 0..16 {
        assert_eq!(burn(dir.path(), u64::from(n) * 60).unwrap(), n);
    }
    let error = burn(dir.path(), 3600).unwrap_err();
    let LeaseError::Exhausted { wait, .. } = error else { panic!("{error}") };
    assert_eq!(wait, Duration::from_secs(3 * 3600));
    assert!(error.to_string().contains("10800 s"), "{error}");
    // A renewal of the same block gives no more of them.
    LeaseFile::save(dir.path(), &EndpointLease { not_after: 1_900_000_000, ..lease(5) }).unwrap();
    assert_eq!(burn(dir.path(), 3601).unwrap_err().kind(), "exhausted");
    // The oldest is free again after 4 h, the next one a minute later.
    assert_eq!(burn(dir.path(), 4 * 3600).unwrap(), 0);
    assert_eq!(burn(dir.path(), 4 * 3600 + 1).unwrap_err().kind(), "exhausted");
    assert_eq!(burn(dir.path(), 4 * 3600 + 60).unwrap(), 1);
    // Another block is another 16.
    LeaseFile::save(dir.path(), &lease(6)).unwrap();
    assert_eq!(burn(dir.path(), 4 * 3600 + 61).unwrap(), 0);
}

#[test]
fn incarnations_go_round_so_that_an_id_rests() {
    let dir = prepared();
    let day = 24 * 3600;
    let burned: Vec<u8> = (0..40).map(|n| burn(dir.path(), n * day).unwrap()).collect();
    assert!(burned.iter().enumerate().all(|(n, i)| usize::from(*i) == n % 16), "{burned:?}");
}

#[test]
fn a_clock_that_goes_back_neither_reuses_an_id_nor_blocks_for_years() {
    let dir = prepared();
    let year = 365 * 24 * 3600;
    for n in 0..16 {
        assert_eq!(burn(dir.path(), year).unwrap(), n);
    }
    let LeaseError::Exhausted { wait, .. } = burn(dir.path(), 0).unwrap_err() else { panic!("all are used") };
    assert_eq!(wait, RELEASED_AFTER);
}

#[test]
fn torn_and_foreign_files_are_errors_that_say_what_to_do_and_burn_nothing() {
    let whole = {
        let dir = prepared();
        burn(dir.path(), 0).unwrap();
        let read = |name| fs::read(dir.path().join(name)).unwrap();
        [("lease.json", read("lease.json")), ("incarnations.json", read("incarnations.json"))]
    };
    for (name, text) in whole {
        let half = text[..text.len() / 2].to_vec();
        let foreign = br#"{"kind":"Workload"}"#.to_vec();
        let huge = vec![b' '; 1 << 20];
        let format = String::from_utf8(text.clone()).unwrap().replace("/1\"", "/9\"").into_bytes();
        for bad in [vec![], half, foreign, huge, format, vec![0; 4096], b"[[[[".repeat(1000)] {
            let dir = prepared();
            burn(dir.path(), 0).unwrap();
            fs::write(dir.path().join(name), &bad).unwrap();
            let error = burn(dir.path(), 1).unwrap_err();
            assert_eq!(error.kind(), "damaged", "{name}: {error}");
            assert!(error.to_string().contains(name) && error.to_string().contains("join again"), "{error}");
            assert_eq!(fs::read(dir.path().join(name)).unwrap(), bad, "left as it was found");
        }
    }
}

#[test]
fn a_crash_between_writing_and_renaming_leaves_the_old_state() {
    let dir = prepared();
    assert_eq!(burn(dir.path(), 0).unwrap(), 0);
    fs::write(dir.path().join("incarnations.tmp"), b"{\"format\":").unwrap();
    assert_eq!(burn(dir.path(), 1).unwrap(), 1);
    assert!(!dir.path().join("incarnations.tmp").exists());
}

#[test]
fn an_incarnation_that_cannot_be_recorded_is_not_used() {
    let dir = prepared();
    burn(dir.path(), 0).unwrap();
    // A directory in the temporary file's place stands for a disk that refuses the write, also for root.
    fs::create_dir_all(dir.path().join("incarnations.tmp/x")).unwrap();
    assert_eq!(burn(dir.path(), 1).unwrap_err().kind(), "write");
    fs::remove_dir_all(dir.path().join("incarnations.tmp")).unwrap();
    assert_eq!(burn(dir.path(), 2).unwrap(), 1);
}

#[test]
fn processes_that_start_at_once_never_share_an_incarnation() {
    let dir = prepared();
    let path = dir.path();
    let mut burned: Vec<u8> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..16).map(|_| scope.spawn(|| burn(path, 0).unwrap())).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    burned.sort_unstable();
    assert_eq!(burned, (0..16).collect::<Vec<u8>>());
}
