//! Any bytes as a lease: from the wire (round trip when accepted) and as files on disk (an error, never a panic, and never
//! an incarnation from a damaged file).
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use prost::Message;
use tombolo_overlay::lease::{EndpointLease, LeaseFile};
use tombolo_proto::v1;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(lease) = v1::EndpointLease::decode(bytes).map_err(drop).and_then(|w| EndpointLease::from_wire(&w).map_err(drop)) {
        assert_eq!(EndpointLease::from_wire(&lease.to_wire()).as_ref(), Ok(&lease));
        assert!(!lease.signed_bytes().is_empty());
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(dir.path().join("lease.json"), bytes).expect("written");
    if let Ok(Some(lease)) = LeaseFile::load(dir.path()) {
        std::fs::write(dir.path().join("incarnations.json"), bytes).expect("written");
        assert!(LeaseFile::burn_incarnation(dir.path(), Duration::from_secs(1)).is_err());
        LeaseFile::save(dir.path(), &lease).expect("saved");
        assert_eq!(LeaseFile::load(dir.path()).expect("loaded"), Some(lease));
    }
});
