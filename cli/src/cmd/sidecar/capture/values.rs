//! Values of the flags, each with an error that names what was given and what would be right.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use tombolo_model::protocol::Protocol;
use tombolo_sidecar::capture::CaptureAddress;
use tombolo_sidecar::capture::settings::destination;

use super::plan::{Allow, InboundPort};
use crate::failure::Failure;

pub fn port_number(flag: &str, given: Option<u16>, default: u16) -> Result<u16, Failure> {
    match given {
        Some(0) => Err(Failure::usage(format_args!("{flag} 0: is not in 1..=65535"))),
        given => Ok(given.unwrap_or(default)),
    }
}

pub fn choice<T: Copy>(
    flag: &str,
    given: Option<&str>,
    default: T,
    choices: &[(&str, T)],
) -> Result<T, Failure> {
    let Some(given) = given else { return Ok(default) };
    let chosen = choices.iter().find(|(name, _)| *name == given);
    chosen.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        Failure::usage(format_args!("{flag} {given:?}: is not one of {}", names.join(", ")))
    })
}

pub fn each<T: Ord>(
    flag: &str,
    texts: Option<Vec<String>>,
    parse: impl Fn(&str) -> Result<T, Failure>,
) -> Result<BTreeSet<T>, Failure> {
    let parse =
        |text: &String| parse(text.trim()).map_err(|failure| failure.at(format_args!("{flag} {text:?}")));
    texts.unwrap_or_default().iter().map(parse).collect()
}

/// `10.0.0.7:5432`, `10.0.0.7:53/udp`, or the sidecar's own way to write it.
pub fn address(text: &str) -> Result<(Protocol, SocketAddr), Failure> {
    if text.contains('=') {
        let address = CaptureAddress::from_str(text).map_err(Failure::usage)?;
        return Ok((address.protocol, address.address));
    }
    let (address, protocol) = Protocol::suffix(text);
    let address = destination(address).map_err(|reason| {
        Failure::usage(reason).remedy("write it as 10.0.0.7:5432, [fd00::7]:5432 or 10.0.0.7:53/udp")
    })?;
    Ok((protocol, address))
}

pub fn cidr(text: &str) -> Result<IpNet, Failure> {
    let single = || text.parse::<std::net::IpAddr>().map(IpNet::from).ok();
    let range = text.parse().ok().or_else(single).map(|range: IpNet| range.trunc());
    range.ok_or_else(|| {
        Failure::usage("is no address and no CIDR").remedy("write it as 10.0.0.0/24 or fd00::/64")
    })
}

/// `10.0.0.0/24`, `10.0.0.0/24=9100`, `=9100`.
pub fn allowed(text: &str) -> Result<Allow, Failure> {
    let at = |failure: Failure| failure.at(format_args!("--inbound-allow {text:?}"));
    let (source, port) = text.split_once('=').map_or((text, None), |(source, port)| (source, Some(port)));
    let source = if source.is_empty() { None } else { Some(cidr(source).map_err(at)?) };
    let port = match port.map(str::parse::<u16>) {
        None => None,
        Some(Ok(port)) if port != 0 => Some(port),
        Some(_) => return Err(at(Failure::usage("its port is not in 1..=65535"))),
    };
    if source.is_none() && port.is_none() {
        return Err(at(
            Failure::usage("allows nobody").remedy("write a source, a source and a port, or =PORT")
        ));
    }
    Ok(Allow { source, port })
}

const INBOUND_PORT: &str = "is no port: write it as 8080 or 5353/udp, with a number from 1 to 65535";

impl FromStr for InboundPort {
    type Err = &'static str;
    /// `8080`, `5353/udp`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, protocol) = Protocol::suffix(text.trim());
        match number.parse() {
            Ok(number) if number != 0 => Ok(Self { number, protocol }),
            _ => Err(INBOUND_PORT),
        }
    }
}

/// In a file a number will do.
impl<'de> Deserialize<'de> for InboundPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(|reason| serde::de::Error::custom(format!("{text:?} {reason}")))
    }
}

pub fn user(text: &str) -> Result<u32, Failure> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let found = nix::unistd::User::from_name(text).ok().flatten();
    found.map(|user| user.uid.as_raw()).ok_or_else(|| Failure::usage("there is no such user"))
}

pub fn group(text: &str) -> Result<u32, Failure> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let found = nix::unistd::Group::from_name(text).ok().flatten();
    found.map(|group| group.gid.as_raw()).ok_or_else(|| Failure::usage("there is no such group"))
}

/// What the kernel takes for a name (15 bytes), and nothing that means something to nftables.
pub fn interface(text: &str) -> Result<String, Failure> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@:".contains(&byte);
    if text.is_empty() || text.len() > 15 || !text.bytes().all(plain) {
        return Err(
            Failure::usage("is no name of an interface").remedy("give it as `ip link` shows it, e.g. wg0")
        );
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_from_outside_have_a_protocol_and_may_be_numbers_in_a_file() {
        let port = |number, protocol| InboundPort { number, protocol };
        let read: Vec<InboundPort> = serde_json::from_str(r#"[8080, "5353/udp", "80/tcp"]"#).unwrap();
        assert_eq!(read, [port(8080, Protocol::Tcp), port(5353, Protocol::Udp), port(80, Protocol::Tcp)]);
        for bad in ["0", "udp", "53/sctp", "65536", "", "53/udp/udp"] {
            assert!(bad.parse::<InboundPort>().unwrap_err().contains("5353/udp"), "{bad}");
        }
        assert!(
            serde_json::from_str::<Vec<InboundPort>>("[70000]").unwrap_err().to_string().contains("70000")
        );
    }

    #[test]
    fn sources_and_ports_that_are_let_in_are_read() {
        let read = |text| allowed(text).map(|allow| (allow.source.map(|s| s.to_string()), allow.port));
        assert_eq!(read("10.0.0.7/24").unwrap(), (Some("10.0.0.0/24".to_owned()), None));
        assert_eq!(read("10.0.0.7=9100").unwrap(), (Some("10.0.0.7/32".to_owned()), Some(9100)));
        assert_eq!(read("fd00::1=9100").unwrap(), (Some("fd00::1/128".to_owned()), Some(9100)));
        assert_eq!(read("=9100").unwrap(), (None, Some(9100)));
        for bad in ["=", "", "host", "10.0.0.0/24=0", "10.0.0.0/24=x", "=99999"] {
            assert!(read(bad).unwrap_err().to_string().contains("--inbound-allow"), "{bad}");
        }
    }
}
