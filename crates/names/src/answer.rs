//! The answer to a question, from a table (pure): the MCS DNS specification (KEP-1645, schema 1.0.0).
//!
//! | name | records |
//! |---|---|
//! | `SERVICE.NAMESPACE.svc.clusterset.local` | A, AAAA: the virtual addresses, of a headless service its ready endpoints'; SRV: every port |
//! | `_PORT._PROTOCOL.SERVICE.NAMESPACE.svc.clusterset.local` | SRV of a named port: the service, of a headless one every endpoint |
//! | `HOSTNAME.CLUSTER.SERVICE.NAMESPACE.svc.clusterset.local` | A, AAAA of an endpoint of a headless service |
//! | `dns-version.clusterset.local` | TXT `1.0.0` |
//! | `SERVICE.NAMESPACE.svc.cluster.local`, `_PORT._PROTOCOL.` below it | the same as above, of services that are answered for here |
//!
//! A name that exists and lacks the type asked for is NODATA, and so is one below which there are names (RFC 8020):
//! `CLUSTER.SERVICE...` has no records (KEP-1645 2.3.4, 2.4.4), and exists only where a headless service has endpoints
//! below it. A headless service without a ready endpoint is NXDOMAIN (2.4.1). Negative answers carry the SOA (RFC 2308).
//! What else is under `cluster.local` is the cluster's own resolver's, and forwarded like everything that is not ours.

use std::collections::HashSet;
use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, NS, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::table::{NameTable, NamedService};

/// A virtual address is its service's for a day after it has gone: what is cached is never another's.
const TTL: u32 = 30;
/// Endpoints come and go.
const HEADLESS_TTL: u32 = 5;
/// A name that is not there may be exported any moment.
const NEGATIVE_TTL: u32 = 5;
/// As the specification's example has it.
const VERSION_TTL: u32 = 28_800;
/// Schema of the names, KEP-1645 section 2.2.
const VERSION: &str = "1.0.0";
/// Records of one answer: 64 KB over TCP hold 600 SRV records with the longest names that are usual.
const MAX_RECORDS: usize = 500;
/// With that many targets their addresses come along.
const MAX_ADDITIONALS: usize = 16;

/// What is to be done about a question.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    /// It is not about a name of ours.
    Forward,
    Reply(Reply),
}

/// An answer of ours.
#[derive(Clone, PartialEq, Debug)]
pub struct Reply {
    pub code: ResponseCode,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
}

impl Reply {
    fn of(answers: Vec<Record>) -> Self {
        Self { code: ResponseCode::NoError, answers, authorities: Vec::new(), additionals: Vec::new() }
    }
    pub(crate) fn refused(code: ResponseCode) -> Self {
        Self { code, ..Self::of(Vec::new()) }
    }
}

/// What a name is.
enum Found<'a> {
    /// Not ours.
    Elsewhere,
    Nothing,
    /// There are names below it, or no records.
    Empty,
    Apex,
    Version,
    Service(&'a NamedService),
    /// Ports by name and protocol.
    Port(&'a NamedService, &'a str, &'a str),
    /// Indices of endpoints with this name.
    Endpoints(&'a NamedService, Vec<usize>),
}

/// The answer to one question. `turn` moves the first of several addresses, so that callers spread.
pub fn answer(table: &NameTable, name: &Name, class: DNSClass, kind: RecordType, turn: usize) -> Answer {
    let lower = name.to_lowercase();
    // Ours are letters, digits, '-' and '_': another label is no name of ours, but may be below one.
    let labels: Vec<&str> =
        lower.iter().map(|label| std::str::from_utf8(label).unwrap_or("\u{fffd}")).collect();
    let found = find(table, &labels);
    if matches!(found, Found::Elsewhere) {
        return Answer::Forward;
    }
    if !matches!(class, DNSClass::IN | DNSClass::ANY) || matches!(kind, RecordType::AXFR | RecordType::IXFR) {
        return Answer::Reply(Reply::refused(ResponseCode::Refused));
    }
    let writer = Writer { name, labels: labels.len(), turn };
    let mut reply = match found {
        Found::Elsewhere => return Answer::Forward,
        Found::Nothing => Reply { code: ResponseCode::NXDomain, ..Reply::of(Vec::new()) },
        Found::Empty => Reply::of(Vec::new()),
        Found::Apex => apex(table, name, kind),
        Found::Version => version(name, kind),
        Found::Service(service) => writer.service(service, kind),
        Found::Port(service, port, protocol) => writer.port(service, kind, port, protocol),
        Found::Endpoints(service, indices) => writer.endpoints(service, kind, &indices),
    };
    if reply.answers.is_empty() {
        reply.authorities = soa(table, &zone(name, labels.len())).into_iter().collect();
    }
    Answer::Reply(reply)
}

fn find<'a>(table: &'a NameTable, labels: &'a [&'a str]) -> Found<'a> {
    match labels {
        [below @ .., "clusterset", "local"] => in_clusterset(table, below),
        [below @ .., name, namespace, "svc", "cluster", "local"] => {
            let service = table.service(namespace, name).filter(|service| service.local);
            // Below a name that is ours are no others than those of its ports.
            service.map_or(Found::Elsewhere, |service| below_service(service, below))
        }
        _ => Found::Elsewhere,
    }
}

fn in_clusterset<'a>(table: &'a NameTable, below: &'a [&'a str]) -> Found<'a> {
    match below {
        [] => Found::Apex,
        ["dns-version"] => Found::Version,
        ["ns", "dns"] | ["dns"] | ["svc"] => Found::Empty,
        [namespace, "svc"] if table.has_namespace(namespace) => Found::Empty,
        [below @ .., name, namespace, "svc"] => {
            let service = table.service(namespace, name).filter(|service| service.clusterset);
            service.map_or(Found::Nothing, |service| below_service(service, below))
        }
        _ => Found::Nothing,
    }
}

fn below_service<'a>(service: &'a NamedService, below: &'a [&'a str]) -> Found<'a> {
    match below {
        _ if service.headless && service.endpoints.is_empty() => Found::Nothing,
        [] => Found::Service(service),
        [protocol] if protocol.starts_with('_') => {
            let has = service.ports.iter().any(|p| !p.name.is_empty() && is(p.protocol, protocol));
            if has { Found::Empty } else { Found::Nothing }
        }
        [port, protocol] if protocol.starts_with('_') => {
            let named = |p: &&crate::table::NamedPort| is(p.protocol, protocol) && is(&p.name, port);
            match service.ports.iter().find(named) {
                Some(found) => Found::Port(service, &found.name, found.protocol),
                None => Found::Nothing,
            }
        }
        below if service.headless => below_headless(service, below),
        _ => Found::Nothing,
    }
}

/// Whether a label is `_` and this.
fn is(text: &str, label: &str) -> bool {
    !text.is_empty() && label.strip_prefix('_') == Some(text)
}

/// `HOSTNAME.CLUSTER`, where a cluster's name may be two labels.
fn below_headless<'a>(service: &'a NamedService, below: &[&str]) -> Found<'a> {
    let mut indices = Vec::new();
    let mut above = false;
    for (index, endpoint) in service.endpoints.iter().enumerate() {
        let labels = std::iter::once(endpoint.hostname.as_str()).chain(endpoint.cluster.as_str().split('.'));
        let labels: Vec<&str> = labels.collect();
        if labels.as_slice() == below {
            indices.push(index);
        }
        above |= labels.len() > below.len() && labels.ends_with(below);
    }
    match indices.is_empty() {
        false => Found::Endpoints(service, indices),
        true if above => Found::Empty,
        true => Found::Nothing,
    }
}

/// Writes the records of a name that was asked for.
struct Writer<'a> {
    name: &'a Name,
    labels: usize,
    turn: usize,
}

impl Writer<'_> {
    fn service(&self, service: &NamedService, kind: RecordType) -> Reply {
        if service.headless {
            let all: Vec<usize> = (0..service.endpoints.len()).collect();
            return match kind {
                RecordType::SRV => self.srv(service, ports(service, |_| true)),
                _ => self.endpoints(service, kind, &all),
            };
        }
        match kind {
            RecordType::SRV => self.srv(service, ports(service, |_| true)),
            _ => Reply::of(addresses(self.name, service, kind)),
        }
    }

    fn port(&self, service: &NamedService, kind: RecordType, name: &str, protocol: &str) -> Reply {
        if !matches!(kind, RecordType::SRV | RecordType::ANY) {
            return Reply::of(Vec::new());
        }
        self.srv(service, ports(service, |port| port.name == name && port.protocol == protocol))
    }

    fn endpoints(&self, service: &NamedService, kind: RecordType, indices: &[usize]) -> Reply {
        let start = self.turn.checked_rem(indices.len()).unwrap_or(0);
        let (later, first) = indices.split_at_checked(start).unwrap_or((indices, &[]));
        let endpoints = first.iter().chain(later).filter_map(|index| service.endpoints.get(*index));
        let of_kind = endpoints.filter_map(|endpoint| address(endpoint.address, kind));
        let records = of_kind.map(|data| Record::from_rdata(self.name.clone(), HEADLESS_TTL, data));
        Reply::of(records.take(MAX_RECORDS).collect())
    }

    /// One per port, of a headless service per port and endpoint. The target is the service's own name: what stands
    /// before it in the question is left out.
    fn srv(&self, service: &NamedService, ports: Vec<u16>) -> Reply {
        const SERVICE_LABELS: usize = 5; // name, namespace, svc and the zone
        let target = self.name.trim_to(SERVICE_LABELS.min(self.labels));
        let record = |port: u16, target: Name| {
            let ttl = if service.headless { HEADLESS_TTL } else { TTL };
            Record::from_rdata(self.name.clone(), ttl, RData::SRV(SRV::new(0, 100, port, target)))
        };
        if !service.headless {
            let mut reply = Reply::of(ports.into_iter().map(|port| record(port, target.clone())).collect());
            reply.additionals = addresses(&target, service, RecordType::ANY);
            return reply;
        }
        let mut reply = Reply::of(Vec::new());
        let mut hosts = HashSet::new();
        for endpoint in &service.endpoints {
            let labels =
                std::iter::once(endpoint.hostname.as_str()).chain(endpoint.cluster.as_str().split('.'));
            let labels = labels.map(str::as_bytes).chain(target.iter());
            // Longer than 255 bytes: it can't be asked for either.
            let Ok(host) = Name::from_labels(labels) else { continue };
            if service.endpoints.len() <= MAX_ADDITIONALS {
                let data = address(endpoint.address, RecordType::ANY);
                let record = data.map(|data| Record::from_rdata(host.clone(), HEADLESS_TTL, data));
                reply.additionals.extend(record);
            }
            // One that has several addresses is still one target.
            if hosts.insert((endpoint.hostname.as_str(), endpoint.cluster.as_str())) {
                reply.answers.extend(ports.iter().map(|port| record(*port, host.clone())));
            }
            if reply.answers.len() >= MAX_RECORDS {
                break;
            }
        }
        reply
    }
}

/// Each number once: a port that is there over TCP and UDP has one SRV record at the bare name.
fn ports(service: &NamedService, wanted: impl Fn(&crate::table::NamedPort) -> bool) -> Vec<u16> {
    let mut ports: Vec<u16> = Vec::new();
    for port in service.ports.iter().filter(|port| wanted(port)) {
        if !ports.contains(&port.port) {
            ports.push(port.port);
        }
    }
    ports
}

fn addresses(name: &Name, service: &NamedService, kind: RecordType) -> Vec<Record> {
    let v4 = service.v4.iter().map(|address| IpAddr::V4(*address));
    let all = v4.chain(service.v6.iter().map(|address| IpAddr::V6(*address)));
    let of_kind = all.filter_map(|ip| address(ip, kind));
    of_kind.map(|data| Record::from_rdata(name.clone(), TTL, data)).collect()
}

fn address(address: IpAddr, kind: RecordType) -> Option<RData> {
    match (address, kind) {
        (IpAddr::V4(address), RecordType::A | RecordType::ANY) => Some(RData::A(A(address))),
        (IpAddr::V6(address), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(address))),
        _ => None,
    }
}

fn version(name: &Name, kind: RecordType) -> Reply {
    let matches = matches!(kind, RecordType::TXT | RecordType::ANY);
    let text = || RData::TXT(TXT::new(vec![VERSION.to_owned()]));
    Reply::of(matches.then(|| Record::from_rdata(name.clone(), VERSION_TTL, text())).into_iter().collect())
}

fn apex(table: &NameTable, name: &Name, kind: RecordType) -> Reply {
    let mut answers = Vec::new();
    if matches!(kind, RecordType::SOA | RecordType::ANY) {
        answers.extend(soa(table, name));
    }
    if matches!(kind, RecordType::NS | RecordType::ANY) {
        let server = server_name(name).map(|server| RData::NS(NS(server)));
        answers.extend(server.map(|data| Record::from_rdata(name.clone(), TTL, data)));
    }
    Reply::of(answers)
}

/// `clusterset.local`, of a name below it; `svc.cluster.local` of an ordinary name: no more than that is ours.
fn zone(name: &Name, labels: usize) -> Name {
    let ours = name.to_lowercase();
    let ordinary = ours.iter().rev().nth(1).is_some_and(|label| label == b"cluster");
    let depth: usize = if ordinary { 3 } else { 2 };
    name.trim_to(depth.min(labels))
}

fn server_name(zone: &Name) -> Option<Name> {
    let labels: [&[u8]; 2] = [b"ns", b"dns"];
    Name::from_labels(labels.into_iter().chain(zone.iter())).ok()
}

/// The zone's SOA: what negative answers are cached by (RFC 2308).
fn soa(table: &NameTable, zone: &Name) -> Option<Record> {
    let labels: [&[u8]; 1] = [b"hostmaster"];
    let mailbox = Name::from_labels(labels.into_iter().chain(zone.iter())).ok()?;
    let (refresh, retry, expire) = (7200, 1800, 86_400);
    let soa = SOA::new(server_name(zone)?, mailbox, table.serial(), refresh, retry, expire, NEGATIVE_TTL);
    Some(Record::from_rdata(zone.clone(), NEGATIVE_TTL, RData::SOA(soa)))
}

#[cfg(test)]
mod tests;
