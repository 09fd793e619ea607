//! The settings of a name server, which federators and sidecars share.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use tombolo_names::server::{DEFAULT_PORT, NamesConfig, default_upstreams};

use crate::failure::Failure;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved's stub, which would ask us again.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
/// Far more than any has.
const MAX_BYTES: u64 = 64 * 1024;
/// Port of resolvers.
const DNS: u16 = 53;

/// `--dns-listen` and `--dns-upstream`.
pub fn config(
    listen: Option<String>,
    upstreams: Option<Vec<String>>,
) -> Result<Option<NamesConfig>, Failure> {
    let Some(listen) = listen else {
        return match upstreams {
            None => Ok(None),
            Some(_) => Err(Failure::usage("--dns-upstream: there is no --dns-listen to forward from")
                .remedy("give --dns-listen 127.0.0.1, or leave it out")),
        };
    };
    let listen = address("--dns-listen", &listen, DEFAULT_PORT)?;
    let upstreams = match upstreams.as_deref() {
        Some([none]) if none == "none" => Vec::new(),
        Some(given) => {
            given.iter().map(|text| address("--dns-upstream", text, DNS)).collect::<Result<_, _>>()?
        }
        None => machine_resolvers(listen),
    };
    Ok(Some(NamesConfig { listen, upstreams }))
}

/// Those of this machine. Without a `resolv.conf` that can be read nobody is asked.
fn machine_resolvers(listen: SocketAddr) -> Vec<SocketAddr> {
    let text = |path: &str| {
        let bytes = tombolo_identity::files::read(Path::new(path), MAX_BYTES).ok()?;
        String::from_utf8(bytes).ok()
    };
    match text(RESOLV_CONF) {
        Some(conf) => default_upstreams(&conf, text(RESOLVED).as_deref(), listen),
        None => Vec::new(),
    }
}

/// `10.0.0.5`, `10.0.0.5:53`, `[::1]:53`, `::1`.
pub fn address(flag: &str, text: &str, port: u16) -> Result<SocketAddr, Failure> {
    let ip = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port));
    text.parse().or(ip).map_err(|_| {
        let text: String = text.chars().take(100).collect();
        Failure::usage(format_args!("{flag} {text:?} is no IP address"))
            .remedy(format_args!("give it as 10.0.0.5 or 10.0.0.5:{port}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_leave_its_port_out() {
        let at = |text: &str| address("--dns-listen", text, 7453).unwrap().to_string();
        assert_eq!(at("10.0.0.5"), "10.0.0.5:7453");
        assert_eq!(at("10.0.0.5:53"), "10.0.0.5:53");
        assert_eq!((at("::1"), at("[::1]:53")), ("[::1]:7453".to_owned(), "[::1]:53".to_owned()));
        let refused = address("--dns-listen", "localhost", 7453).unwrap_err().to_string();
        assert!(
            refused.contains("--dns-listen \"localhost\"") && refused.contains("10.0.0.5:7453"),
            "{refused}"
        );
    }

    #[test]
    fn nobody_forwards_without_listening_and_none_means_nobody() {
        assert!(config(None, None).unwrap().is_none());
        assert!(config(None, Some(vec!["1.2.3.4".into()])).unwrap_err().to_string().contains("--dns-listen"));
        let alone = config(Some("127.0.0.1".into()), Some(vec!["none".into()])).unwrap().unwrap();
        assert!(alone.upstreams.is_empty());
        let two = config(Some("127.0.0.1".into()), Some(vec!["192.0.2.1".into(), "192.0.2.2:5353".into()]));
        assert_eq!(two.unwrap().unwrap().upstreams.len(), 2);
    }
}
