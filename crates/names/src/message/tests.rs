//! Packets: what is answered, how it fits, and that nothing that comes from outside can do harm.

use hickory_proto::rr::Name;
use proptest::prelude::*;
use tombolo_proto::v1;

use super::*;
use crate::table::tests::wire;

fn table(endpoints: usize) -> NameTable {
    let endpoint = |n: usize| v1::NamedEndpoint {
        cluster: "east".into(),
        hostname: format!("db-{n}"),
        address: format!("10.0.{}.{}", n / 250, n % 250 + 1),
    };
    let db = v1::NamedService {
        headless: true,
        ports: vec![v1::ServicePort { name: "sql".into(), port: 5432, ..Default::default() }],
        endpoints: (0..endpoints).map(endpoint).collect(),
        ..wire("shop/db", &[])
    };
    NameTable::default().updated(true, &[db, wire("shop/web", &["241.64.0.1"])], &[]).0
}

fn question(name: &str, kind: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.parse().unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload).set_version(0);
        message.set_edns(edns);
    }
    message
}

fn replied(table: &NameTable, question: &Message, transport: Transport) -> (Message, usize) {
    match handle(table, &question.to_vec().unwrap(), transport, true) {
        Handled::Reply(bytes, _) => (Message::from_vec(&bytes).unwrap(), bytes.len()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reply_repeats_number_question_and_case_and_is_authoritative() {
    let question = question("wEb.ShOp.svc.clusterset.local.", RecordType::A, None);
    let (reply, _) = replied(&table(1), &question, Transport::Udp);
    assert_eq!((reply.metadata.id, reply.metadata.message_type), (0x1234, MessageType::Response));
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
    assert!(reply.queries[0].name().eq_case(question.queries[0].name()), "as 0x20 wants it");
    assert!(reply.edns.is_none(), "not asked for");
    assert_eq!(reply.answers.len(), 1);
}

#[test]
fn a_reply_that_does_not_fit_is_cut_and_is_whole_over_tcp() {
    let table = table(300);
    let name = "db.shop.svc.clusterset.local.";
    let cases = [
        (None, 512, true),
        (Some(100), 512, true),
        (Some(1232), 1232, true),
        (Some(65_535), usize::from(UDP_PAYLOAD), true),
    ];
    for (payload, limit, cut) in cases {
        let (reply, bytes) = replied(&table, &question(name, RecordType::A, payload), Transport::Udp);
        assert!(bytes <= limit, "{payload:?}: {bytes}");
        assert_eq!((reply.metadata.truncation, reply.answers.is_empty()), (cut, cut), "{payload:?}");
        assert_eq!(reply.edns.is_some(), payload.is_some());
    }
    let (reply, _) = replied(&table, &question(name, RecordType::A, None), Transport::Tcp);
    assert_eq!((reply.metadata.truncation, reply.answers.len()), (false, 300));
    let srv = question(&format!("_sql._tcp.{name}"), RecordType::SRV, None);
    let (reply, bytes) = replied(&table, &srv, Transport::Tcp);
    assert!(bytes < 65_536 && reply.answers.len() == 300 && reply.additionals.is_empty());
}

#[test]
fn addresses_that_come_along_are_left_out_before_anything_is_cut() {
    let table = table(7);
    let srv = question("_sql._tcp.db.shop.svc.clusterset.local.", RecordType::SRV, None);
    let (whole, bytes) = replied(&table, &srv, Transport::Tcp);
    assert!(bytes > 512 && whole.additionals.len() == 7);
    let (reply, _) = replied(&table, &srv, Transport::Udp);
    assert_eq!((reply.metadata.truncation, reply.answers.len(), reply.additionals.len()), (false, 7, 0));
}

#[test]
fn what_is_no_question_gets_a_code_or_nothing() {
    let table = table(1);
    let good = question("web.shop.svc.clusterset.local.", RecordType::A, Some(1232));
    let with = |change: fn(&mut Message)| {
        let mut message = good.clone();
        change(&mut message);
        message.to_vec().unwrap()
    };
    let code = |packet: &[u8]| match handle(&table, packet, Transport::Udp, true) {
        Handled::Reply(bytes, _) => {
            format!("{:?}", Message::from_vec(&bytes).unwrap().metadata.response_code)
        }
        Handled::Drop => "nothing".to_owned(),
        Handled::Forward(_) => "forward".to_owned(),
    };
    let whole = good.to_vec().unwrap();
    assert_eq!(code(&whole), "NoError");
    assert_eq!(code(&[]), "nothing");
    assert_eq!(code(&whole[..11]), "nothing");
    assert_eq!(code(&whole[..20]), "FormErr", "torn off");
    assert_eq!(code(&with(|m| m.metadata.message_type = MessageType::Response)), "nothing");
    assert_eq!(code(&with(|m| m.metadata.op_code = OpCode::Notify)), "NotImp");
    assert_eq!(code(&with(|m| m.queries.clear())), "FormErr");
    assert_eq!(code(&with(|m| m.queries.push(m.queries[0].clone()))), "FormErr");
    assert_eq!(
        code(&with(|m| {
            m.edns.as_mut().unwrap().set_version(1);
        })),
        "BADSIG",
        "BADVERS has the same number, 16"
    );
    assert_eq!(code(&question("x.example.", RecordType::AXFR, None).to_vec().unwrap()), "Refused");
    assert_eq!(
        code(&with(|m| {
            m.queries[0].set_query_class(DNSClass::CH);
        })),
        "Refused"
    );
    assert_eq!(code(&question("www.example.", RecordType::A, None).to_vec().unwrap()), "forward");
    let mut unrecursive = question("www.example.", RecordType::A, None);
    unrecursive.metadata.recursion_desired = false;
    assert_eq!(code(&unrecursive.to_vec().unwrap()), "Refused");
    let nobody = handle(
        &table,
        &question("www.example.", RecordType::A, None).to_vec().unwrap(),
        Transport::Udp,
        false,
    );
    assert!(matches!(nobody, Handled::Reply(_, Outcome::Refused)), "there is nobody to ask");
    let mut looped = whole.clone();
    // The name is a pointer to itself.
    looped.splice(12.., [0xc0, 12, 0, 1, 0, 1]);
    looped[11] = 0;
    assert_eq!(code(&looped), "FormErr");
}

#[test]
fn names_of_255_bytes_are_questions_and_longer_ones_are_not() {
    let table = table(1);
    let suffix = ".web.shop.svc.clusterset.local.";
    let label = "x".repeat(63);
    // 255 bytes on the wire: lengths and root included.
    let rest = 253 - suffix.len() - 3 * 64 + 1;
    let longest: Name = format!("{label}.{label}.{label}.{}{suffix}", "y".repeat(rest)).parse().unwrap();
    let mut message = question("x.", RecordType::A, None);
    message.queries = vec![Query::query(longest, RecordType::A)];
    let bytes = message.to_vec().unwrap();
    assert_eq!(bytes.len(), 12 + 255 + 4);
    let Handled::Reply(reply, outcome) = handle(&table, &bytes, Transport::Udp, true) else {
        panic!("no reply")
    };
    assert_eq!(outcome, Outcome::NxDomain);
    assert!(Message::from_vec(&reply).unwrap().authorities.len() == 1);
    let mut longer = bytes;
    longer.splice(12..12, [1, b'z']);
    let handled = handle(&table, &longer, Transport::Udp, true);
    assert!(matches!(handled, Handled::Reply(_, Outcome::Malformed)), "{handled:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Random bytes, and random changes of a good question, never panic, and whatever is replied fits and reads.
    #[test]
    fn random_packets_do_no_harm(
        noise in proptest::collection::vec(any::<u8>(), 0..600),
        flips in proptest::collection::vec((0usize..80, any::<u8>()), 0..8),
        tcp in any::<bool>(),
    ) {
        let table = table(40);
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        let mut changed = question("_sql._tcp.db.shop.svc.clusterset.local.", RecordType::SRV, Some(4096)).to_vec().unwrap();
        for (place, value) in flips {
            if let Some(byte) = changed.get_mut(place) {
                *byte = value;
            }
        }
        for packet in [&noise, &changed] {
            if let Handled::Reply(reply, _) = handle(&table, packet, transport, true) {
                prop_assert!(Message::from_vec(&reply).is_ok());
                prop_assert!(tcp || reply.len() <= usize::from(UDP_PAYLOAD));
            }
        }
    }

    /// Any name is answered or forwarded, and what is answered is below ours.
    #[test]
    fn random_names_do_no_harm(
        labels in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..20), 0..8),
        ours in 0usize..3,
        kind in any::<u16>(),
    ) {
        let suffix = ["", "clusterset.local", "svc.cluster.local"][ours];
        let suffix = suffix.split('.').filter(|label| !label.is_empty()).map(str::as_bytes);
        let labels = labels.iter().map(Vec::as_slice).chain(suffix);
        if let Ok(name) = Name::from_labels(labels) {
            let mut message = question("x.", RecordType::A, None);
            message.queries = vec![Query::query(name, kind.into())];
            if let Ok(bytes) = message.to_vec() {
                let handled = handle(&table(3), &bytes, Transport::Udp, true);
                prop_assert!(ours == 1 || !matches!(handled, Handled::Reply(_, Outcome::Answered)));
            }
        }
    }
}
