//! `--advertise`: an address, or a name that is resolved when the federator starts. In Kubernetes it is its Service's, whose
//! address stays while pods come and go.

use std::net::SocketAddr;
use std::time::Duration;

use crate::failure::Failure;

/// The cluster's DNS may start beside us.
const PATIENCE: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_millis(500);

/// What `--advertise` says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Advertise {
    Address(SocketAddr),
    /// `HOST:PORT`.
    Name(String),
}

/// Judges the setting.
pub fn parse(text: &str) -> Result<Advertise, Failure> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        if address.ip().is_unspecified() || address.port() == 0 {
            return Err(Failure::usage("--advertise: 0.0.0.0 and port 0 reach nobody")
                .remedy("give the address that gateways and sidecars can send to"));
        }
        return Ok(Advertise::Address(address));
    }
    let name = text.rsplit_once(':').filter(|(host, port)| {
        let port = port.parse::<u16>().is_ok_and(|port| port > 0);
        port && !host.is_empty() && host.len() <= 253 && !host.contains([':', '/', '[', ' '])
    });
    match name {
        Some(_) => Ok(Advertise::Name(text.to_owned())),
        None => {
            Err(Failure::usage(format_args!("--advertise {text:?} is neither ADDRESS:PORT nor NAME:PORT"))
                .remedy("give it as 10.0.0.5:7443 or tombolo-federator.tombolo-system.svc:7443"))
        }
    }
}

/// The address; a name is asked for until it has one.
pub async fn resolve(advertise: Advertise) -> Result<SocketAddr, Failure> {
    let name = match advertise {
        Advertise::Address(address) => return Ok(address),
        Advertise::Name(name) => name,
    };
    let start = tokio::time::Instant::now();
    loop {
        let error = match tokio::net::lookup_host(&name).await {
            // The least, so that a name of several is the same at every start.
            Ok(found) => match found.min() {
                Some(address) => return Ok(address),
                None => "it has no address".to_owned(),
            },
            Err(error) => error.to_string(),
        };
        if start.elapsed() > PATIENCE {
            return Err(Failure::new(format_args!("--advertise: {name} does not resolve: {error}"))
                .remedy("make the Service or DNS record, or give an address"));
        }
        tracing::info!(name, error, "the name to advertise does not resolve yet");
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_or_a_name_with_a_port_is_taken_and_nothing_else() {
        assert_eq!(parse("10.0.0.5:7443").unwrap(), Advertise::Address(([10, 0, 0, 5], 7443).into()));
        assert!(matches!(parse("[fd00::1]:7443").unwrap(), Advertise::Address(_)));
        assert_eq!(parse("fed.ns.svc:7443").unwrap(), Advertise::Name("fed.ns.svc:7443".into()));
        for bad in ["fed", "fed:0", ":7443", "0.0.0.0:7443", "10.0.0.5:0", "http://a:1", "fd00::1", "a b:1"] {
            assert!(parse(bad).unwrap_err().to_string().contains("--advertise"), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_name_is_resolved() {
        let found = resolve(parse("localhost:7443").unwrap()).await.unwrap();
        assert!(found.ip().is_loopback() && found.port() == 7443, "{found}");
    }
}
