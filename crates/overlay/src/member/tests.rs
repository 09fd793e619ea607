//! State on disk and what is refused; joining against a real federator is tested with the federator.

use super::renewal::due_at;
use super::*;

#[test]
fn renewal_is_due_around_half_the_life_and_not_for_everybody_at_once() {
    assert_eq!(due_at(1000, 2000, 0.0), 1450);
    assert_eq!(due_at(1000, 2000, 1.0), 1550);
    assert_eq!(due_at(2000, 1000, 0.5), 2000, "an expired one is due now");
}

#[test]
fn a_directory_that_has_not_joined_is_no_member_and_a_torn_file_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    assert!(Member::load(dir.path()).unwrap().is_none());
    std::fs::write(dir.path().join(state::FILE), b"{\"format\": \"tombolo-member/1\", \"na").unwrap();
    let error = Member::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("member.json") && error.contains("join again"), "{error}");
}

#[test]
fn bad_addresses_are_left_out_one_by_one() {
    let replica = |address: &str| tombolo_proto::v1::GatewayReplica {
        name: "gw".into(),
        address: address.into(),
        ..Default::default()
    };
    let (hops, rejected) = gateway_hops(&[replica("127.0.0.1:7441"), replica("nowhere"), replica("")]);
    assert_eq!((hops.len(), rejected.len()), (1, 1));
    assert!(rejected[0].to_string().contains("nowhere"));
}
