//! What a former process leaves, and for whom.

use std::collections::BTreeMap;

use tombolo_model::protocol::Protocol;

use super::*;
use crate::provided::{ProvidedPort, ProvidedService, Standing};

fn picture() -> Picture {
    let port = ProvidedPort {
        name: "dns".to_owned(),
        port: 53,
        protocol: Protocol::Udp,
        app_protocol: String::new(),
        backends: vec!["10.0.0.1:5353".parse().unwrap(), "[fd00::1]:5353".parse().unwrap()],
    };
    let service = ProvidedService {
        service: "shop/names".parse().unwrap(),
        ports: vec![port],
        standing: Standing::Behind,
    };
    let account = AccountPicture { sources: vec!["10.0.0.9".parse().unwrap()], services: vec![service] };
    let numbered =
        Numbered { number: 20_001, service: "bank/db".parse().unwrap(), port: 5432, protocol: Protocol::Tcp };
    let accounts = BTreeMap::from([(("shop".to_owned(), "web".to_owned()), account)]);
    Picture { accounts, numbered: vec![numbered], ..Picture::default() }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_is_what_the_next_process_finds() {
    let dir = tempfile::tempdir().unwrap();
    let mut kept = Remembered::read(dir.path());
    assert!(kept.fall_back(1000).is_none());
    kept.know(&picture(), Instant::now());
    kept.write(Instant::now(), 1000, true);
    while Remembered::read(dir.path()).fall_back(1000).is_none() {
        tokio::task::yield_now().await;
    }
    let mut next = Remembered::read(dir.path());
    assert!(next.former().is_none(), "not before the API server is away");
    assert_eq!(next.fall_back(1090), Some(Duration::from_secs(90)));
    assert_eq!(next.former(), Some(&picture()));
    next.know(&Picture::default(), Instant::now());
    assert!(next.former().is_none(), "what was received holds");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_while_the_api_server_is_not_heard() {
    let dir = tempfile::tempdir().unwrap();
    let mut kept = Remembered::read(dir.path());
    kept.know(&picture(), Instant::now());
    kept.write(Instant::now(), 1000, false);
    let due = kept.due().unwrap();
    assert_eq!(due, Instant::now() + REFRESH, "it is looked at again");
    kept.write(Instant::now(), 1000, true);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(Remembered::read(dir.path()).fall_back(1000).is_none(), "not before it is due");
}

#[test]
fn what_can_not_be_read_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE), "{\"heard_unix\": 1, \"accounts\": [[").unwrap();
    assert!(Remembered::read(dir.path()).fall_back(2).is_none());
}
