//! The rules for datagrams: to virtual and taken-over addresses, from this machine. Pure.
//!
//! ```text
//!  udp_output      route, before connection tracking (-300)   who is let through; ours -> mark, untracked
//!  udp_ours        of taken-over addresses: past the sidecar while it is away
//!  udp_prerouting  marked, on lo -> TPROXY; nobody listens -> known for a second
//! ```
//! A mark set on the way out has the kernel route anew: the rule and the table of [`super::super::kernel::route_datagrams`]
//! lead what is marked to `lo`, by which it comes in again, as if from outside, with its destination untouched. So other
//! tools' translations must not see it: untracked, none do. Datagrams are not tried again by whoever sends them, and so
//! nothing waits: who has not listened a moment ago is away for a second, then one datagram finds out, and is lost if
//! nobody does. Meanwhile those to virtual addresses are refused, and those to others go where they were going (`away`).

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::super::plan::{Away, Plan};
use super::{Chain, PREROUTING_PRIORITY};

/// On captured datagrams, from the rule that sets it to the one that hands them over: "tc".
pub const DATAGRAM_MARK: u32 = 0x7463;
/// Before connection tracking (-200).
const OUTPUT_PRIORITY: i32 = -300;
/// The set of families whose listener is away.
pub(super) const AWAY: &str = "udp_away";
/// One datagram in this time is lost to finding out whether somebody listens again.
const KNOWN_AWAY: &str = "1s";

impl Plan {
    pub(super) fn datagram_chains(&self) -> Vec<Chain> {
        let chain = |name, hook: Option<String>, rules| Chain { name, hook, rules };
        vec![
            chain("udp_ours", None, self.datagrams_taken()),
            chain(
                "udp_output",
                Some(format!("type route hook output priority {OUTPUT_PRIORITY};")),
                self.datagrams_out(),
            ),
            chain(
                "udp_prerouting",
                Some(format!("type filter hook prerouting priority {PREROUTING_PRIORITY};")),
                self.datagrams_in(),
            ),
        ]
    }

    fn datagrams_out(&self) -> Vec<String> {
        let mut rules = vec!["meta l4proto != udp accept".to_owned()];
        rules.extend(self.excluded("udp"));
        let sets: BTreeSet<&str> = self.sets().into_iter().map(|set| set.name).collect();
        let refused = format!("meta nfproto @{AWAY} counter name \"datagrams_refused\" reject");
        let then = [
            ("excluded4", "ip daddr @excluded4 accept".to_owned()),
            ("excluded6", "ip6 daddr @excluded6 accept".to_owned()),
            ("virtual4", format!("ip daddr @virtual4 {refused}")),
            ("virtual6", format!("ip6 daddr @virtual6 {refused}")),
            ("virtual4", format!("ip daddr @virtual4 {}", handed_over())),
            ("virtual6", format!("ip6 daddr @virtual6 {}", handed_over())),
            ("udp_taken4", "ip daddr . udp dport @udp_taken4 goto udp_ours".to_owned()),
            ("udp_taken6", "ip6 daddr . udp dport @udp_taken6 goto udp_ours".to_owned()),
        ];
        rules.extend(then.into_iter().filter(|(set, _)| sets.contains(set)).map(|(_, rule)| rule));
        rules
    }

    fn datagrams_taken(&self) -> Vec<String> {
        let away = match self.away {
            Away::Pass => format!("meta nfproto @{AWAY} counter name \"datagrams_past\" accept"),
            Away::Refuse => format!("meta nfproto @{AWAY} counter name \"datagrams_refused\" reject"),
        };
        vec![away, handed_over()]
    }

    fn datagrams_in(&self) -> Vec<String> {
        let port = self.port;
        let found = format!("delete @{AWAY} {{ meta nfproto }} counter name \"datagrams\" accept");
        vec![
            "meta l4proto != udp accept".to_owned(),
            format!("meta mark != {DATAGRAM_MARK:#x} accept"),
            "iifname != \"lo\" accept".to_owned(),
            // Where nobody listens `tproxy` matches nothing.
            format!("meta nfproto ipv4 meta l4proto udp tproxy ip to {}:{port} {found}", Ipv4Addr::LOCALHOST),
            format!(
                "meta nfproto ipv6 meta l4proto udp tproxy ip6 to [{}]:{port} {found}",
                Ipv6Addr::LOCALHOST
            ),
            format!(
                "update @{AWAY} {{ meta nfproto timeout {KNOWN_AWAY} }} counter name \"datagrams_refused\" drop"
            ),
        ]
    }
}

fn handed_over() -> String {
    format!("meta mark set {DATAGRAM_MARK:#x} notrack accept")
}
