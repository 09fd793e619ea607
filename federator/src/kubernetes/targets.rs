//! Numbers by which shared sidecars tell services apart: the `targetPort` of each port of a derived `Service` (pure, time
//! passed in).
//!
//! `kube-proxy` hands a connection over without saying which service was called, so each port of each has a number of its
//! own in the cluster. One is drawn by a hash of what it is for, the next free one where that is taken: the same services
//! get the same numbers in whatever order they come, but for the few that collide. What a derived `Service` has it keeps,
//! since pods and proxies know it. A number that was given up rests before another service gets it: a sidecar that has not
//! heard yet must not lead callers of the one to the other. Of two that claim one number (written by two federators at
//! once, or by somebody else in our name) the older `Service` keeps it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tombolo_model::names::ServiceKey;
use tombolo_model::protocol::Protocol;

/// Below the ports from which Linux (32768) and Kubernetes' NodePorts (30000) draw, above those that are usually served.
pub const RANGE: RangeInclusive<u16> = tombolo_kubernetes::words::FRONT_PORTS;
/// Watches tell within a second, `kube-proxy` follows within a few; a shared sidecar that lost its API server for longer
/// than this has gone from the slices.
const REST: Duration = Duration::from_secs(60);

/// A port as callers name it.
pub type ServicePort = (Protocol, u16);

/// One protocol's number.
type Number = (Protocol, u16);

/// Who has a number. Ordered by who keeps it: the older `Service`, then by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Owner {
    created_unix: u64,
    service: ServiceKey,
    port: u16,
}

/// Every number of the cluster.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    owners: BTreeMap<Number, Owner>,
    of: BTreeMap<ServiceKey, BTreeMap<ServicePort, u16>>,
    /// Until when a number that was given up is nobody's.
    resting: BTreeMap<Number, Duration>,
}

impl Targets {
    /// A derived `Service` as it is: the numbers of its ports, and when it was made. Services that have lost a number to it
    /// are returned: they need another.
    pub fn found(
        &mut self,
        service: &ServiceKey,
        created_unix: u64,
        ports: impl IntoIterator<Item = (ServicePort, u16)>,
    ) -> Vec<ServiceKey> {
        let mut losers = Vec::new();
        for ((protocol, port), number) in ports.into_iter().filter(|(_, number)| RANGE.contains(number)) {
            let claim = Owner { created_unix, service: service.clone(), port };
            let known = self.of.get(service).and_then(|of| of.get(&(protocol, port))).copied();
            // What was allotted beats what somebody has made of it: it is put right.
            if known.is_some_and(|known| known != number) {
                losers.push(service.clone());
                continue;
            }
            match self.owners.get(&(protocol, number)) {
                Some(owner) if owner.service == *service && owner.port == port => {}
                Some(owner) if *owner <= claim => {
                    losers.push(service.clone());
                    continue;
                }
                other => {
                    losers.extend(other.map(|owner| owner.service.clone()));
                    if let Some(loser) = other.cloned() {
                        self.forget(&loser.service, (protocol, loser.port));
                    }
                }
            }
            self.owners.insert((protocol, number), claim);
            self.of.entry(service.clone()).or_default().insert((protocol, port), number);
        }
        losers
    }

    fn forget(&mut self, service: &ServiceKey, port: ServicePort) {
        if let Some(of) = self.of.get_mut(service) {
            of.remove(&port);
            if of.is_empty() {
                self.of.remove(service);
            }
        }
    }

    /// The numbers of a service's ports, drawn where it has none yet; those of ports that it has no more rest from `now` on.
    /// A port is missing in the answer when every number is taken. `created_unix`: of its derived `Service`, or of now.
    pub fn allot(
        &mut self,
        service: &ServiceKey,
        created_unix: u64,
        ports: &[ServicePort],
        now: Duration,
    ) -> BTreeMap<ServicePort, u16> {
        let before = self.of.remove(service).unwrap_or_default();
        let mut numbers = BTreeMap::new();
        for (port, number) in before {
            if ports.contains(&port) {
                numbers.insert(port, number);
            } else {
                self.give_up((port.0, number), now);
            }
        }
        self.resting.retain(|_, until| *until > now);
        for &(protocol, port) in ports {
            if numbers.contains_key(&(protocol, port)) {
                continue;
            }
            let Some(number) = self.draw(service, (protocol, port)) else { continue };
            let owner = Owner { created_unix, service: service.clone(), port };
            self.owners.insert((protocol, number), owner);
            numbers.insert((protocol, port), number);
        }
        if !numbers.is_empty() {
            self.of.insert(service.clone(), numbers.clone());
        }
        numbers
    }

    /// A service is gone.
    pub fn release(&mut self, service: &ServiceKey, now: Duration) {
        for ((protocol, _), number) in self.of.remove(service).unwrap_or_default() {
            self.give_up((protocol, number), now);
        }
    }

    fn give_up(&mut self, number: Number, now: Duration) {
        self.owners.remove(&number);
        self.resting.insert(number, now + REST);
    }

    fn draw(&self, service: &ServiceKey, (protocol, port): ServicePort) -> Option<u16> {
        let digest = Sha256::digest(format!("{service}:{port}/{protocol}"));
        let start = digest.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let count = u32::from(RANGE.end() - RANGE.start()) + 1;
        let numbers = (0..count).filter_map(|step| {
            let offset = u16::try_from((start % count + step) % count).ok()?;
            RANGE.start().checked_add(offset)
        });
        let free = |number: &u16| {
            let number = (protocol, *number);
            !self.owners.contains_key(&number) && !self.resting.contains_key(&number)
        };
        numbers.into_iter().find(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: fn(u16) -> ServicePort = |port| (Protocol::Tcp, port);
    const AT: fn(u64) -> Duration = Duration::from_secs;

    fn key(name: &str) -> ServiceKey {
        format!("shop/{name}").parse().unwrap()
    }

    #[test]
    fn numbers_are_the_same_whatever_comes_first_and_no_two_services_share_one() {
        let names: Vec<String> = (0..500).map(|n| format!("svc-{n}")).collect();
        let mut ways = Vec::new();
        for backwards in [false, true] {
            let mut targets = Targets::default();
            let mut order: Vec<&String> = names.iter().collect();
            if backwards {
                order.reverse();
            }
            let numbers: BTreeMap<&String, u16> = order
                .into_iter()
                .map(|name| {
                    let ports = [TCP(80), TCP(81), (Protocol::Udp, 80)];
                    let numbers = targets.allot(&key(name), 1, &ports, AT(0));
                    assert!(numbers.len() == 3 && numbers.values().all(|number| RANGE.contains(number)));
                    (name, numbers[&TCP(80)])
                })
                .collect();
            assert_eq!(targets.owners.len(), 1500, "one owner each");
            ways.push(numbers);
        }
        let same = names.iter().filter(|name| ways[0][name] == ways[1][name]).count();
        assert!(same > 425, "a tenth of the numbers are taken, so a tenth collides at most: {same}");
    }

    #[test]
    fn what_a_service_has_it_keeps_and_what_it_gives_up_rests() {
        let mut targets = Targets::default();
        assert!(targets.found(&key("web"), 5, [(TCP(80), 20_007), (TCP(81), 7)]).is_empty());
        let ports = targets.allot(&key("web"), 5, &[TCP(80), TCP(443)], AT(0));
        assert_eq!(ports[&TCP(80)], 20_007);
        let second = ports[&TCP(443)];
        assert_eq!(targets.allot(&key("web"), 5, &[TCP(80), TCP(443)], AT(1)), ports);
        targets.allot(&key("web"), 5, &[TCP(80)], AT(2));
        // The very same question would be answered by the very same number.
        let other = targets.allot(&key("web"), 5, &[TCP(80), TCP(443)], AT(3))[&TCP(443)];
        assert_ne!(other, second, "it rests");
        targets.release(&key("web"), AT(4));
        let later = targets.allot(&key("web"), 9, &[TCP(443)], AT(70));
        assert_eq!(later[&TCP(443)], second);
        assert!(targets.resting.is_empty() && targets.owners.len() == 1);
    }

    #[test]
    fn of_two_that_claim_a_number_the_older_keeps_it_and_the_other_gets_another() {
        for younger_first in [false, true] {
            let mut targets = Targets::default();
            let mut claims = [("old", 5), ("young", 6)];
            if younger_first {
                claims.reverse();
            }
            let lost: Vec<ServiceKey> = claims
                .iter()
                .flat_map(|(name, created)| targets.found(&key(name), *created, [(TCP(80), 20_007)]))
                .collect();
            assert_eq!(lost, [key("young")], "{younger_first}");
            assert_eq!(targets.allot(&key("old"), 5, &[TCP(80)], AT(0))[&TCP(80)], 20_007);
            assert_ne!(targets.allot(&key("young"), 6, &[TCP(80)], AT(0))[&TCP(80)], 20_007);
        }
    }

    #[test]
    fn a_port_that_gets_no_number_is_left_out() {
        let mut targets = Targets::default();
        let all: Vec<ServicePort> = (1..=10_001).map(TCP).collect();
        assert_eq!(targets.allot(&key("greedy"), 1, &all, AT(0)).len(), 10_000);
        assert!(targets.allot(&key("web"), 1, &[TCP(80)], AT(0)).is_empty());
        assert_eq!(targets.allot(&key("web"), 1, &[(Protocol::Udp, 80)], AT(0)).len(), 1);
    }
}
