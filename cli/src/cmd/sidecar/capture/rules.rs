//! The rules that hand connections to the sidecar, as one nftables transaction. Pure: settings in, text out.
//!
//! ```text
//!  output      nat, before every other tool's (-110)   who is let through; virtual and taken-over addresses -> ours
//!  ours        past the sidecar while it is away, else REDIRECT to it
//!  input       SYNs that were redirected -> listening
//!  listening   somebody listens: in; nobody: wait for the grace time, then refuse, and let later ones past (`away`)
//!  prerouting  SYNs from outside to the workload's ports -> TPROXY, else what the mode says
//!  udp_...     datagrams to virtual and taken-over addresses: see [`datagrams`]
//!  udp_inbound datagrams from outside to the workload's ports: see [`plain_datagrams`]
//! ```
//! Invariants. One table, `inet tombolo_capture`, made anew in one transaction, so that there is no moment without rules
//! or with half of them. Only a connection's first packet is ever redirected: what was open before stays as it was. What
//! matches nothing here is accepted, which in nftables means that the next tool's chains decide. The rules know by
//! themselves whether the sidecar listens (`socket` finds its listener or does not), so that it needs no privilege to
//! say so, and a dead one cuts nobody off.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tombolo_model::protocol::Protocol;
use tombolo_sidecar::capture::InboundMode;

use super::plan::{Allow, Away, Exclude, Inbound, Outbound, Plan};

mod datagrams;
mod plain_datagrams;

pub use datagrams::DATAGRAM_MARK;

pub const TABLE: &str = "tombolo_capture";
/// Bumped when the meaning of the table changes.
const VERSION: u32 = 3;
/// Before docker's and kube-proxy's chains at -100 (`dstnat`): the first that translates a connection wins. After
/// connection tracking (-200), without which there is nothing to translate.
const OUTPUT_PRIORITY: i32 = -110;
/// TPROXY's place (`mangle`), before any translation.
const PREROUTING_PRIORITY: i32 = -150;
/// For how long it stays known that nobody listens. Whoever listens again ends it at once, so it may be long: it only
/// bounds how long after the last connection a new one is made to wait again.
const KNOWN_AWAY: &str = "1h";
const SYN: &str = "tcp flags & (fin | syn | rst | ack) == syn";
const NOT_SYN: &str = "tcp flags & (fin | syn | rst | ack) != syn";

/// Counters of the table, with what they count.
pub const COUNTERS: [(&str, &str); 13] = [
    ("virtual", "connections to virtual addresses handed to the sidecar"),
    ("taken", "other connections handed to the sidecar"),
    ("past", "connections let past the sidecar while nobody listened"),
    ("waiting", "first packets that wait for the sidecar to listen again"),
    ("refused", "connections refused because nobody listened"),
    ("inbound", "packets from outside handed to the sidecar"),
    ("inbound_past", "connections from outside handed to the application while nobody listened"),
    ("inbound_refused", "connections from outside refused while nobody listened"),
    ("datagrams", "datagrams handed to the sidecar"),
    ("datagrams_past", "datagrams let past the sidecar while nobody listened"),
    ("datagrams_refused", "datagrams refused or lost because nobody listened"),
    ("inbound_datagrams", "datagrams from outside let in without the mesh"),
    ("inbound_datagrams_refused", "datagrams from outside refused"),
];

/// Removes the table, whether or not and however much of it is there.
pub fn removal() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// A set whose elements are known.
struct Fixed {
    name: &'static str,
    kind: &'static str,
    elements: Vec<String>,
}

struct Chain {
    name: &'static str,
    hook: Option<String>,
    rules: Vec<String>,
}

/// What must be there: less was taken away by somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inventory {
    pub rules: usize,
    /// Elements of the sets that nothing but a new table changes.
    pub addresses: usize,
}

/// The sets that [`Inventory`] counts.
pub const FIXED_SETS: [&str; 8] =
    ["virtual4", "virtual6", "taken4", "taken6", "udp_taken4", "udp_taken6", "excluded4", "excluded6"];

impl Plan {
    /// The whole transaction: the old table away, the new one in.
    pub fn rules(&self) -> String {
        let mut text = removal();
        let _ = writeln!(text, "table inet {TABLE} {{\n\tcomment \"{}\"", self.comment());
        for (name, _) in COUNTERS {
            let _ = writeln!(text, "\tcounter {name} {{ }}");
        }
        for name in ["missed", "grace", "away", datagrams::AWAY] {
            let _ = writeln!(text, "\tset {name} {{ type nf_proto; size 8; flags dynamic,timeout; }}");
        }
        for Fixed { name, kind, elements } in self.sets() {
            let elements = elements.join(", ");
            let _ = writeln!(text, "\tset {name} {{ {kind}; elements = {{ {elements} }}; }}");
        }
        for Chain { name, hook, rules } in self.chains() {
            let _ = writeln!(text, "\tchain {name} {{");
            if let Some(hook) = hook {
                let _ = writeln!(text, "\t\t{hook} policy accept;");
            }
            for rule in rules {
                let _ = writeln!(text, "\t\t{rule}");
            }
            text.push_str("\t}\n");
        }
        text.push_str("}\n");
        text
    }

    /// What stands in the table's comment, of which the kernel keeps 128 bytes.
    pub fn comment(&self) -> String {
        let rules: usize = self.chains().iter().map(|chain| chain.rules.len()).sum();
        let addresses: usize = self.sets().iter().map(|set| set.elements.len()).sum();
        format!("tombolo {VERSION}: {rules} rules, {addresses} addresses")
    }

    /// Only those that have elements: an empty one can't be written, and matches nothing.
    fn sets(&self) -> Vec<Fixed> {
        const RANGE4: &str = "type ipv4_addr; flags interval";
        const RANGE6: &str = "type ipv6_addr; flags interval";
        let (virtual4, virtual6) = by_family(self.captured_ranges());
        let (excluded4, excluded6) = by_family(&self.exclude.ranges);
        let taken: BTreeSet<(Protocol, SocketAddr)> = self.captured_addresses().iter().copied().collect();
        let taken = |protocol, v6| {
            let of = taken.iter().filter(move |(over, address)| *over == protocol && address.is_ipv6() == v6);
            of.map(|(_, address)| format!("{} . {}", address.ip(), address.port())).collect()
        };
        const PORT4: &str = "type ipv4_addr . inet_service";
        const PORT6: &str = "type ipv6_addr . inet_service";
        let sets = [
            (RANGE4, virtual4),
            (RANGE6, virtual6),
            (PORT4, taken(Protocol::Tcp, false)),
            (PORT6, taken(Protocol::Tcp, true)),
            (PORT4, taken(Protocol::Udp, false)),
            (PORT6, taken(Protocol::Udp, true)),
            (RANGE4, excluded4),
            (RANGE6, excluded6),
        ];
        let named = FIXED_SETS.into_iter().zip(sets);
        let sets = named.map(|(name, (kind, elements))| Fixed { name, kind, elements });
        sets.filter(|set| !set.elements.is_empty()).collect()
    }

    fn captured_ranges(&self) -> &[IpNet] {
        if self.outbound == Outbound::None { &[] } else { &self.virtual_ranges }
    }

    fn captured_addresses(&self) -> &[(Protocol, SocketAddr)] {
        if self.outbound == Outbound::None { &[] } else { &self.addresses }
    }

    fn chains(&self) -> Vec<Chain> {
        let mut chains = Vec::new();
        if self.outbound != Outbound::None {
            chains.push(Chain { name: "ours", hook: None, rules: self.ours() });
            chains.push(Chain {
                name: "output",
                hook: Some(format!("type nat hook output priority {OUTPUT_PRIORITY};")),
                rules: self.output(),
            });
            chains.push(Chain { name: "listening", hook: None, rules: self.listening() });
            let port = self.port;
            chains.push(Chain {
                name: "input",
                hook: Some("type filter hook input priority filter;".to_owned()),
                rules: vec![format!("iifname \"lo\" tcp dport {port} {SYN} jump listening")],
            });
            chains.extend(self.datagram_chains());
        }
        if let Some(inbound) = &self.inbound {
            chains.extend(self.prerouting(inbound).map(|rules| Chain {
                name: "prerouting",
                hook: Some(format!("type filter hook prerouting priority {PREROUTING_PRIORITY};")),
                rules,
            }));
            chains.extend(self.plain_datagrams(inbound));
        }
        chains
    }

    fn output(&self) -> Vec<String> {
        let mut rules = vec!["meta l4proto != tcp accept".to_owned(), format!("{NOT_SYN} accept")];
        rules.extend(self.excluded("tcp"));
        let sets: BTreeSet<&str> = self.sets().into_iter().map(|set| set.name).collect();
        let redirect = self.redirect("virtual");
        let then = [
            ("excluded4", "ip daddr @excluded4 accept".to_owned()),
            ("excluded6", "ip6 daddr @excluded6 accept".to_owned()),
            ("virtual4", format!("ip daddr @virtual4 {redirect}")),
            ("virtual6", format!("ip6 daddr @virtual6 {redirect}")),
            ("taken4", "ip daddr . tcp dport @taken4 goto ours".to_owned()),
            ("taken6", "ip6 daddr . tcp dport @taken6 goto ours".to_owned()),
        ];
        rules.extend(then.into_iter().filter(|(set, _)| sets.contains(set)).map(|(_, rule)| rule));
        if self.outbound == Outbound::All {
            // Connections to oneself.
            rules.push("fib daddr type local accept".to_owned());
            rules.push("goto ours".to_owned());
        }
        rules
    }

    /// Who is let through, but for addresses. `protocol` as nftables writes it.
    fn excluded(&self, protocol: &str) -> Vec<String> {
        let Exclude { uids, gids, marks, ports, ranges: _, interfaces } = &self.exclude;
        let rules = [
            among("meta mark", marks.iter().map(|mark| format!("{mark:#x}"))),
            among("meta skuid", uids.iter()),
            among("meta skgid", gids.iter()),
            among("oifname", interfaces.iter().map(|name| format!("\"{name}\""))),
            among(&format!("{protocol} dport"), ports.iter()),
        ];
        rules.into_iter().flatten().collect()
    }

    fn redirect(&self, counter: &str) -> String {
        format!("counter name \"{counter}\" meta l4proto tcp redirect to :{}", self.port)
    }

    fn ours(&self) -> Vec<String> {
        let past = format!(
            "meta nfproto @away update @away {{ meta nfproto timeout {KNOWN_AWAY} }} counter name \"past\" accept"
        );
        let past = (self.away == Away::Pass).then_some(past);
        past.into_iter().chain([self.redirect("taken")]).collect()
    }

    /// A listener is there, or it is not; which families are known to have none is kept in three sets.
    fn listening(&self) -> Vec<String> {
        let forget =
            ["missed", "grace", "away"].map(|set| format!("delete @{set} {{ meta nfproto }}")).join(" ");
        // `socket` matches nothing where no socket is found. Its `wildcard` is for whole sockets; `transparent` finds the
        // remainder of a connection from the same port, too, which says nothing about who listens: the kernel then sees.
        let mut rules = vec![
            format!("socket wildcard {{ 0, 1 }} {forget} accept"),
            "socket transparent { 0, 1 } accept".to_owned(),
        ];
        let milliseconds = self.grace.as_millis();
        if milliseconds > 0 {
            rules.extend([
                // The first that finds nobody starts the grace time; those that come within it are dropped, and their
                // senders try again by themselves.
                format!("meta nfproto != @missed add @grace {{ meta nfproto timeout {milliseconds}ms }}"),
                format!("update @missed {{ meta nfproto timeout {KNOWN_AWAY} }}"),
                "meta nfproto @grace counter name \"waiting\" drop".to_owned(),
            ]);
        }
        rules.push(format!("update @away {{ meta nfproto timeout {KNOWN_AWAY} }}"));
        rules.push("counter name \"refused\" meta l4proto tcp reject with tcp reset".to_owned());
        rules
    }

    /// What is not from outside to one of the workload's ports of a protocol is accepted; `None`: it has no such ports.
    fn outside_to(&self, protocol: Protocol, inbound: &Inbound) -> Option<Vec<String>> {
        let Inbound { ports, allow, .. } = inbound;
        let ports: Vec<String> = ports
            .iter()
            .filter(|port| port.protocol == protocol)
            .map(|port| port.number.to_string())
            .collect();
        if ports.is_empty() {
            return None;
        }
        let (ports, protocol) = (ports.join(", "), protocol.to_string().to_lowercase());
        let mut rules = vec![
            format!("meta l4proto != {protocol} accept"),
            format!("{protocol} dport != {{ {ports} }} accept"),
        ];
        // What this machine sends itself comes by `lo`, the sidecar's deliveries too.
        let interfaces = self.exclude.interfaces.iter().map(String::as_str).chain(["lo"]);
        let interfaces: BTreeSet<_> = interfaces.map(|name| format!("\"{name}\"")).collect();
        rules.extend(among("iifname", interfaces.into_iter()));
        // A datagram socket also receives what is sent to everybody.
        let own = match protocol.as_str() {
            "udp" => "{ local, broadcast, multicast }",
            _ => "local",
        };
        rules.push(format!("fib daddr type != {own} accept"));
        for Allow { source, port } in allow {
            let source = source.map(|source| {
                let family = if source.addr().is_ipv4() { "ip" } else { "ip6" };
                format!("{family} saddr {source} ")
            });
            let port = port.map(|port| format!("{protocol} dport {port} "));
            rules.push(format!("{}{}accept", source.unwrap_or_default(), port.unwrap_or_default()));
        }
        Some(rules)
    }

    fn prerouting(&self, inbound: &Inbound) -> Option<Vec<String>> {
        let mut rules = self.outside_to(Protocol::Tcp, inbound)?;
        let listen_port = inbound.listen_port;
        // Where nobody listens `tproxy` matches nothing, and neither does it for a connection that the application
        // holds already.
        rules.extend([
            format!(
                "meta nfproto ipv4 meta l4proto tcp tproxy ip to {}:{listen_port} counter name \"inbound\" accept",
                Ipv4Addr::LOCALHOST
            ),
            format!(
                "meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [{}]:{listen_port} counter name \"inbound\" accept",
                Ipv6Addr::LOCALHOST
            ),
            match inbound.mode {
                InboundMode::Strict => {
                    format!("{SYN} counter name \"inbound_refused\" reject with tcp reset")
                }
                InboundMode::Permissive => format!("{SYN} counter name \"inbound_past\" accept"),
            },
        ]);
        Some(rules)
    }
}

/// A rule that lets through what is among `values`, unless there are none.
fn among(what: &str, values: impl Iterator<Item = impl ToString>) -> Option<String> {
    let values: Vec<String> = values.map(|value| value.to_string()).collect();
    (!values.is_empty()).then(|| format!("{what} {{ {} }} accept", values.join(", ")))
}

/// Without overlaps, which nftables refuses.
fn by_family(ranges: &[IpNet]) -> (Vec<String>, Vec<String>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for range in ranges {
        match range {
            IpNet::V4(range) => v4.push(*range),
            IpNet::V6(range) => v6.push(*range),
        }
    }
    let text4 = Ipv4Net::aggregate(&v4).iter().map(ToString::to_string).collect();
    let text6 = Ipv6Net::aggregate(&v6).iter().map(ToString::to_string).collect();
    (text4, text6)
}

/// The inventory in a table's comment; `None`: not written by this version.
pub fn parse_comment(comment: &str) -> Option<Inventory> {
    let (rules, addresses) = comment.strip_prefix(&format!("tombolo {VERSION}: "))?.split_once(" rules, ")?;
    let addresses = addresses.strip_suffix(" addresses")?;
    Some(Inventory { rules: rules.parse().ok()?, addresses: addresses.parse().ok()? })
}

#[cfg(test)]
#[path = "rules/tests.rs"]
mod tests;
