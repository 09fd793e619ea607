//! Which upstream resolvers there are, and which of them are asked next (pure, time passed in).
//!
//! One that refuses twice, or is silent five times without answering anything meanwhile, is down: it is not asked while another is up, and tried again after a pause that grows.
//! With all of them down a question fails at once, but for the one that tries: an application's resolver that hears
//! SERVFAIL goes on, one that hears nothing hangs for seconds. One that forwards back to us is looping: it is not asked
//! until a later look shows otherwise ([`Upstreams::probe`]).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Somebody may be there who waits for a zone that is dead: both addresses of one name, asked for twice, are no outage.
const DOWN_AFTER: u32 = 5;
/// Nobody is there: twice is enough.
const REFUSED_COUNTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// glibc reads three as well; more would only lengthen the way to a failure.
pub const MAX_UPSTREAMS: usize = 3;
/// The last label of names by which loops are found: none of the root zone's, so that whoever gets one says NXDOMAIN.
const PROBE_ZONE: &[u8] = b"tombolo-loop";

/// An upstream's state.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Upstream {
    address: SocketAddr,
    /// Since its last answer.
    failures: u32,
    answered: Duration,
    /// Not before this, when it is down.
    retry: Duration,
    pause: Duration,
    looping: bool,
    /// Its probes carry this.
    nonce: u64,
}

/// How an upstream failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Nothing came.
    Silent,
    /// Nobody listens there, or nothing leads there.
    Refused,
}

/// The upstream resolvers in their order.
#[derive(Clone, Debug, Default)]
pub struct Upstreams(Vec<Upstream>);

/// Why an upstream can't be one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("{upstream} is this resolver itself: name the resolver that answered before it was set up")]
    Itself { upstream: SocketAddr },
    #[error(
        "{upstream}: 0.0.0.0, multicast addresses and port 0 answer nobody: give the address of a resolver"
    )]
    Address { upstream: SocketAddr },
    #[error("{count} upstream resolvers are too many: at most {MAX_UPSTREAMS}")]
    TooMany { count: usize },
}

impl Upstreams {
    /// `nonces` are random, one per upstream; `listen` is where this resolver is.
    pub fn new(addresses: &[SocketAddr], listen: SocketAddr, nonces: &[u64]) -> Result<Self, UpstreamError> {
        if addresses.len() > MAX_UPSTREAMS {
            return Err(UpstreamError::TooMany { count: addresses.len() });
        }
        let upstream = |(address, nonce): (&SocketAddr, &u64)| {
            let ip = address.ip();
            if ip.is_unspecified() || ip.is_multicast() || address.port() == 0 {
                return Err(UpstreamError::Address { upstream: *address });
            }
            if is_itself(*address, listen) {
                return Err(UpstreamError::Itself { upstream: *address });
            }
            Ok(Upstream {
                address: *address,
                failures: 0,
                answered: Duration::ZERO,
                retry: Duration::ZERO,
                pause: FIRST_PAUSE,
                looping: false,
                nonce: *nonce,
            })
        };
        addresses.iter().zip(nonces).map(upstream).collect::<Result<_, _>>().map(Self)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().map(|upstream| upstream.address)
    }

    /// Whom to ask, in order. Empty: nobody answers, say so at once. A turn at one that is down is taken by asking for it.
    pub fn plan(&mut self, now: Duration) -> Vec<SocketAddr> {
        let usable = self.0.iter().filter(|upstream| !upstream.looping);
        let up: Vec<SocketAddr> = usable.filter(|u| u.failures < DOWN_AFTER).map(|u| u.address).collect();
        if !up.is_empty() {
            return up;
        }
        let due = self.0.iter_mut().filter(|upstream| !upstream.looping && upstream.retry <= now);
        let Some(due) = due.min_by_key(|upstream| upstream.retry) else { return Vec::new() };
        // Nobody else waits for it meanwhile.
        due.retry = now + due.pause;
        due.pause = (due.pause * 2).min(LONGEST_PAUSE);
        vec![due.address]
    }

    /// An upstream answered; true when it was down.
    pub fn worked(&mut self, address: SocketAddr, now: Duration) -> bool {
        let Some(upstream) = self.find(address) else { return false };
        upstream.answered = now;
        let was_down = upstream.failures >= DOWN_AFTER;
        (upstream.failures, upstream.pause) = (0, FIRST_PAUSE);
        was_down
    }

    /// An upstream did not answer what was sent at `sent`; true when it is down from now on.
    pub fn failed(&mut self, address: SocketAddr, failure: Failure, sent: Duration, now: Duration) -> bool {
        let Some(upstream) = self.find(address) else { return false };
        let weight = match failure {
            // It has answered others meanwhile: it is the question.
            Failure::Silent if upstream.answered > sent => return false,
            Failure::Silent => 1,
            Failure::Refused => REFUSED_COUNTS,
        };
        let was_down = upstream.failures >= DOWN_AFTER;
        upstream.failures = upstream.failures.saturating_add(weight);
        if was_down || upstream.failures < DOWN_AFTER {
            return false;
        }
        upstream.retry = now + upstream.pause;
        true
    }

    fn find(&mut self, address: SocketAddr) -> Option<&mut Upstream> {
        self.0.iter_mut().find(|upstream| upstream.address == address)
    }

    /// Names to ask each upstream for: if one comes back to us, its upstream loops. What an earlier look has found is
    /// forgotten: the way may have changed.
    pub fn probe(&mut self) -> Vec<(SocketAddr, [Vec<u8>; 2])> {
        let name = |upstream: &mut Upstream| {
            upstream.looping = false;
            let label = format!("{:016x}", upstream.nonce).into_bytes();
            (upstream.address, [label, PROBE_ZONE.to_vec()])
        };
        self.0.iter_mut().map(name).collect()
    }

    /// A question has come in. If it is a probe of ours, its upstream loops; which one.
    pub fn recognise<'a>(&mut self, labels: impl Iterator<Item = &'a [u8]>) -> Option<SocketAddr> {
        let labels: Vec<&[u8]> = labels.take(3).collect();
        let [label, zone] = labels.as_slice() else { return None };
        if !zone.eq_ignore_ascii_case(PROBE_ZONE) {
            return None;
        }
        let nonce = std::str::from_utf8(label).ok().and_then(|text| u64::from_str_radix(text, 16).ok())?;
        let upstream = self.0.iter_mut().find(|upstream| upstream.nonce == nonce)?;
        upstream.looping = true;
        Some(upstream.address)
    }
}

/// Whether an address is where this resolver listens, as far as addresses say it.
pub fn is_itself(upstream: SocketAddr, listen: SocketAddr) -> bool {
    let (upstream_ip, own) = (upstream.ip().to_canonical(), listen.ip().to_canonical());
    let same_host = own == upstream_ip || (own.is_unspecified() && upstream_ip.is_loopback());
    upstream.port() == listen.port() && same_host
}

/// The name servers of a `resolv.conf`, at most as many as glibc asks; none: the local host's, as glibc has it.
pub fn from_resolv_conf(text: &str) -> Vec<SocketAddr> {
    let nameserver = |line: &str| {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            return None;
        }
        // A zone index means a link, which is not ours to choose.
        words.next()?.split('%').next()?.parse::<IpAddr>().ok()
    };
    let mut found: Vec<SocketAddr> =
        text.lines().filter_map(nameserver).map(|ip| SocketAddr::new(ip, 53)).take(MAX_UPSTREAMS).collect();
    if found.is_empty() {
        found.push((Ipv4Addr::LOCALHOST, 53).into());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn two() -> (Upstreams, SocketAddr, SocketAddr) {
        let (a, b) = (at("192.0.2.1:53"), at("192.0.2.2:53"));
        (Upstreams::new(&[a, b], at("127.0.0.1:7453"), &[1, 2]).unwrap(), a, b)
    }

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn one_that_refuses_twice_is_left_out_until_another_fails_too() {
        let (mut upstreams, a, b) = two();
        assert_eq!(upstreams.plan(s(0)), [a, b]);
        assert!(!upstreams.failed(a, Failure::Refused, s(0), s(0)));
        assert_eq!(upstreams.plan(s(0)), [a, b]);
        assert!(upstreams.failed(a, Failure::Refused, s(0), s(0)));
        assert_eq!(upstreams.plan(s(5)), [b]);
        assert!(upstreams.worked(a, s(5)) && !upstreams.worked(a, s(5)));
        assert_eq!(upstreams.plan(s(5)), [a, b]);
    }

    #[test]
    fn silence_about_one_name_is_no_outage_while_others_are_answered() {
        let (mut upstreams, a, b) = two();
        for second in 1..100 {
            upstreams.worked(a, s(second) + Duration::from_millis(500));
            assert!(!upstreams.failed(a, Failure::Silent, s(second), s(second + 1)), "{second}");
        }
        assert_eq!(upstreams.plan(s(200)), [a, b]);
        let silent = (0..100).take_while(|_| !upstreams.failed(a, Failure::Silent, s(200), s(201)));
        assert_eq!(silent.count(), 4, "down with the fifth");
        assert_eq!(upstreams.plan(s(201)), [b]);
    }

    #[test]
    fn with_all_down_one_question_tries_and_the_others_fail_at_once() {
        let (mut upstreams, a, b) = two();
        for address in [a, b] {
            upstreams.failed(address, Failure::Refused, s(0), s(0));
            upstreams.failed(address, Failure::Refused, s(0), s(0));
        }
        assert_eq!(upstreams.plan(s(0)), []);
        assert_eq!(upstreams.plan(s(1)), [a], "after its pause");
        assert_eq!(upstreams.plan(s(1)), [b]);
        assert_eq!(upstreams.plan(s(1)), [], "both are being tried");
        assert_eq!((upstreams.plan(s(2)), upstreams.plan(s(2))), (vec![a], vec![b]));
        assert_eq!(upstreams.plan(s(3)), [], "pauses grow");
        for later in (10..10_000).step_by(10) {
            upstreams.plan(s(later));
        }
        assert_eq!(upstreams.plan(s(10_000 + 31)).len(), 1, "and never beyond half a minute");
        upstreams.worked(b, s(10_031));
        assert_eq!(upstreams.plan(s(10_031)), [b]);
    }

    #[test]
    fn one_that_forwards_back_to_us_is_not_asked_until_a_later_look() {
        let (mut upstreams, a, b) = two();
        let probes = upstreams.probe();
        assert_eq!(probes.len(), 2);
        let labels = |index: usize| probes[index].1.iter().map(Vec::as_slice).collect::<Vec<_>>();
        assert_eq!(
            upstreams.recognise([b"0000000000000009".as_slice(), PROBE_ZONE].into_iter()),
            None,
            "another's"
        );
        assert_eq!(upstreams.recognise([b"www".as_slice(), b"example"].into_iter()), None);
        assert_eq!(upstreams.recognise(labels(0).into_iter()), Some(a));
        assert_eq!(upstreams.plan(s(0)), [b]);
        assert_eq!(upstreams.recognise(labels(1).into_iter()), Some(b));
        assert_eq!(upstreams.plan(s(0)), []);
        upstreams.probe();
        assert_eq!(upstreams.plan(s(0)), [a, b]);
    }

    #[test]
    fn nobody_forwards_to_himself_or_to_nowhere() {
        let new = |upstream: &str, listen: &str| {
            Upstreams::new(&[at(upstream)], at(listen), &[1]).map(|_| ()).map_err(|error| error.to_string())
        };
        assert!(new("127.0.0.1:7453", "127.0.0.1:7453").unwrap_err().contains("this resolver itself"));
        assert!(new("127.0.0.1:7453", "0.0.0.0:7453").unwrap_err().contains("this resolver itself"));
        assert!(new("[::ffff:127.0.0.1]:7453", "127.0.0.1:7453").is_err());
        assert!(new("127.0.0.1:53", "127.0.0.1:7453").is_ok());
        for nowhere in ["0.0.0.0:53", "224.0.0.1:53", "192.0.2.1:0"] {
            assert!(new(nowhere, "127.0.0.1:7453").unwrap_err().contains("answer nobody"), "{nowhere}");
        }
        let many = [at("192.0.2.1:53"); 4];
        assert!(
            Upstreams::new(&many, at("127.0.0.1:7453"), &[1; 4])
                .unwrap_err()
                .to_string()
                .contains("at most 3")
        );
    }

    #[test]
    fn a_resolv_conf_is_read_as_glibc_reads_it() {
        let text = "# x\nsearch a.example\nnameserver 192.0.2.1\n nameserver fe80::1%eth0 \nnameserver x\n\
            nameserver 192.0.2.3\nnameserver 192.0.2.4\noptions ndots:5\n";
        assert_eq!(from_resolv_conf(text), [at("192.0.2.1:53"), at("[fe80::1]:53"), at("192.0.2.3:53")]);
        assert_eq!(from_resolv_conf(""), [at("127.0.0.1:53")]);
    }
}
