//! The settings of `tombolo sidecar capture apply`, and what they mean: flag, then environment, then file.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use tombolo_model::protocol::Protocol;
use tombolo_sidecar::capture::InboundMode;
use tombolo_sidecar::capture::settings::{DEFAULT_INBOUND_PORT, DEFAULT_MARK, DEFAULT_PORT};

use super::plan::{Allow, Away, Exclude, Inbound, InboundPort, Outbound, Plan};
use super::rules::DATAGRAM_MARK;
use super::values::{address, allowed, choice, cidr, each, group, interface, port_number, user};
use crate::cmd::role::{Span, layered};
use crate::cmd::sidecar::captured::{mark, ranges};
use crate::failure::Failure;

/// A sidecar's drain (10 s) and its start: connections wait so long for it to be back.
const DEFAULT_GRACE: Duration = Duration::from_secs(15);
/// Longer than TCP itself tries to connect is no use.
const LONGEST_GRACE: Duration = Duration::from_secs(120);

#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Settings {
    /// services: connections to virtual addresses and to those of --address; all: every connection that leaves this
    /// machine, of which the sidecar passes on what is not the mesh's; none [default: services]
    #[arg(long, env = "TOMBOLO_CAPTURE_OUTBOUND", value_name = "WHICH")]
    outbound: Option<String>,
    /// Port of the sidecar's --capture-listen [default: 7447]
    #[arg(long, env = "TOMBOLO_CAPTURE_PORT", value_name = "PORT")]
    port: Option<u16>,
    /// Range of virtual addresses, as the federator has it; may be repeated [default: 241.64.0.0/16]
    #[arg(
        long = "virtual-range",
        env = "TOMBOLO_VIRTUAL_RANGES",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    virtual_ranges: Option<Vec<String>>,
    /// An address to take over, ADDRESS:PORT, of UDP ADDRESS:PORT/udp; written ADDRESS:PORT=SERVICE it is the sidecar's --capture-address and may
    /// come from the same variable; may be repeated
    #[arg(
        long = "address",
        env = "TOMBOLO_CAPTURE_ADDRESSES",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    addresses: Option<Vec<String>>,
    /// What becomes of connections to --address (and, with --outbound all, of all others) while no sidecar listens, after
    /// the grace time: pass, to where they were going, or refuse [default: pass]
    #[arg(long, env = "TOMBOLO_CAPTURE_AWAY", value_name = "pass|refuse")]
    away: Option<String>,
    /// How long new connections wait for a sidecar that restarts [default: 15s]
    #[arg(long, env = "TOMBOLO_CAPTURE_GRACE", value_name = "DURATION")]
    grace: Option<Span>,
    /// A port of the workload: what comes to it from outside without the mesh is handed to the sidecar. Datagrams
    /// (PORT/udp) are refused or let in by the rules themselves; may be repeated
    #[arg(
        long = "inbound-port",
        env = "TOMBOLO_INBOUND_PORTS",
        value_delimiter = ',',
        value_name = "PORT[/udp]"
    )]
    inbound_ports: Option<Vec<InboundPort>>,
    /// The sidecar's --inbound, for while it does not listen: strict refuses, permissive lets through
    #[arg(long, env = "TOMBOLO_INBOUND", value_name = "strict|permissive")]
    inbound: Option<String>,
    /// Port of the sidecar's --inbound-listen [default: 7448]
    #[arg(long, env = "TOMBOLO_INBOUND_LISTEN_PORT", value_name = "PORT")]
    inbound_listen_port: Option<u16>,
    /// Who comes to the workload's ports untouched, such as health probes and scrapes: SOURCE (an address or CIDR),
    /// SOURCE=PORT, or =PORT for everybody; may be repeated
    #[arg(
        long = "inbound-allow",
        env = "TOMBOLO_INBOUND_ALLOW",
        value_delimiter = ',',
        value_name = "SOURCE"
    )]
    inbound_allow: Option<Vec<String>>,
    /// Mark on the sidecar's own connections, its --capture-mark [default: 0x7462]
    #[arg(long, env = "TOMBOLO_CAPTURE_MARK", value_name = "MARK")]
    mark: Option<String>,
    /// A user whose connections are let through, by name or number: the sidecar's own, where it can't mark them; may be
    /// repeated
    #[arg(
        long = "exclude-uid",
        env = "TOMBOLO_CAPTURE_EXCLUDE_UIDS",
        value_delimiter = ',',
        value_name = "USER"
    )]
    exclude_uids: Option<Vec<String>>,
    /// A group, by name or number; may be repeated
    #[arg(
        long = "exclude-gid",
        env = "TOMBOLO_CAPTURE_EXCLUDE_GIDS",
        value_delimiter = ',',
        value_name = "GROUP"
    )]
    exclude_gids: Option<Vec<String>>,
    /// A mark that others put on their packets; may be repeated
    #[arg(
        long = "exclude-mark",
        env = "TOMBOLO_CAPTURE_EXCLUDE_MARKS",
        value_delimiter = ',',
        value_name = "MARK"
    )]
    exclude_marks: Option<Vec<String>>,
    /// Connections to this port; may be repeated
    #[arg(
        long = "exclude-port",
        env = "TOMBOLO_CAPTURE_EXCLUDE_PORTS",
        value_delimiter = ',',
        value_name = "PORT"
    )]
    exclude_ports: Option<Vec<u16>>,
    /// Connections to these addresses; may be repeated
    #[arg(
        long = "exclude-cidr",
        env = "TOMBOLO_CAPTURE_EXCLUDE_CIDRS",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    exclude_cidrs: Option<Vec<String>>,
    /// Connections that leave or come by this interface; may be repeated
    #[arg(
        long = "exclude-interface",
        env = "TOMBOLO_CAPTURE_EXCLUDE_INTERFACES",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    exclude_interfaces: Option<Vec<String>>,
    /// The program [default: nft in PATH]
    #[arg(long, env = "TOMBOLO_NFT", value_name = "FILE")]
    pub nft: Option<PathBuf>,
}

layered!(Settings {
    outbound,
    port,
    virtual_ranges,
    addresses,
    away,
    grace,
    inbound_ports,
    inbound,
    inbound_listen_port,
    inbound_allow,
    mark,
    exclude_uids,
    exclude_gids,
    exclude_marks,
    exclude_ports,
    exclude_cidrs,
    exclude_interfaces,
    nft,
});

impl Settings {
    /// What the rules are to be, and the program that makes them.
    pub fn plan(self) -> Result<(Plan, Option<PathBuf>), Failure> {
        let Self {
            outbound,
            port,
            virtual_ranges,
            addresses,
            away,
            grace,
            inbound_ports,
            inbound,
            inbound_listen_port,
            inbound_allow,
            mark: own_mark,
            exclude_uids,
            exclude_gids,
            exclude_marks,
            exclude_ports,
            exclude_cidrs,
            exclude_interfaces,
            nft,
        } = self;
        let outbound = choice(
            "--outbound",
            outbound.as_deref(),
            Outbound::Services,
            &[("services", Outbound::Services), ("all", Outbound::All), ("none", Outbound::None)],
        )?;
        let away =
            choice("--away", away.as_deref(), Away::Pass, &[("pass", Away::Pass), ("refuse", Away::Refuse)])?;
        let grace = grace.map_or(DEFAULT_GRACE, |Span(grace)| grace);
        if grace > LONGEST_GRACE {
            return Err(Failure::usage(format_args!(
                "--grace {}s is longer than a connection is tried",
                grace.as_secs()
            ))
            .remedy("give at most 120s"));
        }
        let mut marks: BTreeSet<u32> =
            each("--exclude-mark", exclude_marks, |text| mark("--exclude-mark", text))?;
        marks.insert(own_mark.map_or(Ok(DEFAULT_MARK), |text| mark("--mark", &text))?);
        if marks.contains(&DATAGRAM_MARK) {
            return Err(Failure::usage(format_args!(
                "--mark and --exclude-mark: {DATAGRAM_MARK:#x} is what the rules put on captured datagrams"
            ))
            .remedy("choose another"));
        }
        let addresses: BTreeSet<(Protocol, SocketAddr)> = each("--address", addresses, address)?;
        let plan = Plan {
            outbound,
            port: port_number("--port", port, DEFAULT_PORT)?,
            virtual_ranges: ranges(virtual_ranges)?,
            addresses: addresses.into_iter().collect(),
            away,
            grace,
            inbound: inbound_rules(inbound, inbound_ports, inbound_listen_port, inbound_allow)?,
            exclude: Exclude {
                uids: each("--exclude-uid", exclude_uids, user)?,
                gids: each("--exclude-gid", exclude_gids, group)?,
                marks,
                ports: exclude_ports.unwrap_or_default().into_iter().collect(),
                ranges: each("--exclude-cidr", exclude_cidrs, cidr)?.into_iter().collect(),
                interfaces: each("--exclude-interface", exclude_interfaces, interface)?,
            },
        };
        if plan.outbound == Outbound::None && plan.inbound.is_none() {
            return Err(Failure::usage("nothing to capture: --outbound none, and no --inbound-port")
                .remedy("to take the rules away, use `tombolo sidecar capture remove`"));
        }
        Ok((plan, nft))
    }
}

fn inbound_rules(
    mode: Option<String>,
    ports: Option<Vec<InboundPort>>,
    listen_port: Option<u16>,
    allow: Option<Vec<String>>,
) -> Result<Option<Inbound>, Failure> {
    let ports: BTreeSet<InboundPort> = ports.unwrap_or_default().into_iter().collect();
    let allow: Vec<Allow> =
        allow.unwrap_or_default().iter().map(|text| allowed(text)).collect::<Result<_, _>>()?;
    match (mode, ports.is_empty()) {
        (None, true) if allow.is_empty() => Ok(None),
        (_, true) => Err(Failure::usage(
            "--inbound and --inbound-allow: there is no --inbound-port that they are about",
        )
        .remedy("name the workload's ports, e.g. --inbound-port 8080")),
        (None, false) => Err(Failure::usage(
            "--inbound-port: say what becomes of connections that do not come through the mesh",
        )
        .remedy("give --inbound permissive, and --inbound strict once nobody comes plain any more")),
        (Some(mode), false) => Ok(Some(Inbound {
            mode: mode.parse::<InboundMode>().map_err(|e| Failure::usage(format_args!("--inbound: {e}")))?,
            listen_port: port_number("--inbound-listen-port", listen_port, DEFAULT_INBOUND_PORT)?,
            ports,
            allow,
        })),
    }
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    fn plan(settings: Settings) -> Result<Plan, String> {
        settings.plan().map(|(plan, _)| plan).map_err(|failure| failure.to_string())
    }

    fn texts(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(|text| (*text).to_owned()).collect())
    }

    #[test]
    fn by_default_only_virtual_addresses_are_captured_and_the_sidecars_mark_is_let_through() {
        let plan = plan(Settings::default()).unwrap();
        assert_eq!((plan.outbound, plan.port, plan.away), (Outbound::Services, 7447, Away::Pass));
        assert_eq!(plan.virtual_ranges, ["241.64.0.0/16".parse::<IpNet>().unwrap()]);
        assert_eq!(plan.exclude.marks, [0x7462].into());
        assert_eq!(plan.inbound, None);
    }

    #[test]
    fn the_sidecars_own_variable_serves_for_the_rules_too() {
        let addresses = texts(&["10.0.0.7:5432=shop/db:5433", "10.0.0.8:80", "10.0.0.7:53/udp=shop/dns"]);
        let plan = plan(Settings { addresses, ..Settings::default() }).unwrap();
        let expected: [(Protocol, SocketAddr); 3] = [
            (Protocol::Tcp, "10.0.0.7:5432".parse().unwrap()),
            (Protocol::Tcp, "10.0.0.8:80".parse().unwrap()),
            (Protocol::Udp, "10.0.0.7:53".parse().unwrap()),
        ];
        assert_eq!(plan.addresses, expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_flag_and_value() {
        let cases: [(Settings, &[&str]); 10] = [
            (Settings { mark: Some("0x7463".into()), ..Settings::default() }, &["--mark", "0x7463"]),
            (
                Settings { outbound: Some("some".into()), ..Settings::default() },
                &["--outbound", "some", "services"],
            ),
            (
                Settings { away: Some("fail".into()), ..Settings::default() },
                &["--away", "fail", "pass, refuse"],
            ),
            (Settings { addresses: texts(&["db:5432"]), ..Settings::default() }, &["--address", "db:5432"]),
            (
                Settings { exclude_cidrs: texts(&["10/8"]), ..Settings::default() },
                &["--exclude-cidr", "10/8"],
            ),
            (
                Settings { exclude_uids: texts(&["nobody-at-all"]), ..Settings::default() },
                &["--exclude-uid", "no such user"],
            ),
            (
                Settings { exclude_interfaces: texts(&["a\" accept"]), ..Settings::default() },
                &["--exclude-interface"],
            ),
            (
                Settings { inbound_ports: Some(vec!["8080".parse().unwrap()]), ..Settings::default() },
                &["--inbound permissive"],
            ),
            (Settings { inbound: Some("strict".into()), ..Settings::default() }, &["--inbound-port"]),
            (
                Settings { outbound: Some("none".into()), ..Settings::default() },
                &["nothing to capture", "remove"],
            ),
        ];
        for (settings, expected) in cases {
            let error = plan(settings).unwrap_err();
            assert!(expected.iter().all(|text| error.contains(text)), "{expected:?}: {error}");
        }
    }
}
