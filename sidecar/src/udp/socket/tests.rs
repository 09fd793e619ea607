use super::*;

fn payloads(sizes: &[usize]) -> Vec<Bytes> {
    sizes.iter().map(|size| vec![7; *size].into()).collect()
}

#[test]
fn only_what_is_of_one_size_leaves_as_one() {
    let cases: [(&[usize], usize); 8] = [
        (&[5], 1),
        (&[5, 5, 5], 3),
        (&[5, 5, 3, 5], 3),
        (&[5, 5, 0], 2),
        (&[5, 6], 1),
        (&[0, 0], 1),
        (&[40_000, 40_000], 1),
        (&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 10),
    ];
    for (sizes, run) in cases {
        assert_eq!(run_length(&payloads(sizes), 10), run, "{sizes:?}");
    }
}

#[tokio::test]
async fn datagrams_of_all_sizes_arrive_whole_and_answers_come_from_where_they_were_sent() {
    let listener = listen(([0, 0, 0, 0], 0).into(), 1).unwrap().remove(0);
    let port = listener.local_addr().unwrap().port();
    let listener = Socket::listening(listener).unwrap();
    let to = SocketAddr::from(([127, 0, 0, 9], port));
    let caller = Socket::connected(to, None).unwrap();
    let sizes = [3, 3, 3, 0, 1200, 1200, 7, 65_507];
    assert_eq!(caller.send(to, None, &payloads(&sizes)).0, sizes.len());
    let (mut got, mut ends) = (Vec::new(), None);
    while got.len() < sizes.len() {
        listener.readable().await.unwrap();
        let _ = listener.receive(|received| {
            got.push(received.payload.len());
            ends = Some((received.from, received.to));
        });
    }
    assert_eq!(got, sizes);
    let (from, to) = ends.unwrap();
    assert_eq!((from, to.ip()), (caller.local_addr().unwrap(), IpAddr::from([127, 0, 0, 9])));
    // The caller's socket is connected: it hears nobody else.
    assert_eq!(listener.send(from, Some(to.ip()), &payloads(&[4])).0, 1);
    caller.readable().await.unwrap();
    let mut answer = 0;
    caller.receive(|received| answer = received.payload.len()).unwrap();
    assert_eq!(answer, 4);
}

#[tokio::test]
async fn a_closed_port_is_noticed() {
    let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let socket = Socket::connected(gone, None).unwrap();
    socket.send(gone, None, &payloads(&[1]));
    socket.readable().await.unwrap();
    let error = socket.receive(|_| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn listeners_share_an_address_and_a_taken_one_is_refused() {
    for count in [1, 3] {
        let sockets = listen(([127, 0, 0, 1], 0).into(), count).unwrap();
        let address = sockets[0].local_addr().unwrap();
        assert_eq!(sockets.len(), count);
        assert_eq!(listen(address, count).unwrap_err().kind(), io::ErrorKind::AddrInUse, "{count}");
    }
}

#[tokio::test]
async fn a_captured_datagram_says_where_it_was_sent_and_answers_may_come_from_anywhere() {
    // It takes CAP_NET_RAW, as the sidecar does; the rules are the scenarios'.
    for host in ["127.0.0.1", "::1"] {
        let here = SocketAddr::new(host.parse().unwrap(), 0);
        let bound = match capture(here, 1) {
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied && !nix::unistd::geteuid().is_root() =>
            {
                return;
            }
            bound => bound.unwrap().remove(0),
        };
        let listener = Socket::capturing(bound).unwrap();
        let to = listener.local_addr().unwrap();
        let caller = Socket::connected(to, None).unwrap();
        let sizes = [3, 3, 0, 1200, 60_000];
        assert_eq!(caller.send(to, None, &payloads(&sizes)).0, sizes.len());
        let mut got = Vec::new();
        while got.len() < sizes.len() {
            listener.readable().await.unwrap();
            let _ = listener.receive(|received| {
                assert_eq!((received.from, received.to), (caller.local_addr().unwrap(), to));
                got.push(received.payload.len());
            });
        }
        assert_eq!(got, sizes);
    }
    let from: SocketAddr = "241.64.1.1:5353".parse().unwrap();
    let hears = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let answers = Socket::answering_as(from).unwrap();
    assert_eq!(answers.send(hears.local_addr().unwrap(), None, &payloads(&[4])).0, 1);
    hears.set_read_timeout(Some(std::time::Duration::from_secs(2))).unwrap();
    assert_eq!(hears.recv_from(&mut [0; 8]).unwrap(), (4, from));
    // A flow of another caller's to the same address has a socket of its own.
    Socket::answering_as(from).unwrap();
}
