//! What a gateway is told to do: checked before anything is bound.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

/// Design section 3.
pub const DEFAULT_BORDER_PORT: u16 = 7440;
pub const DEFAULT_INNER_PORT: u16 = 7441;
/// Time for sidecars and peers to see that this replica drains (a probe, at most a second apart) and for packets that are
/// under way; well below a pod's usual 30 s of grace.
pub const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

/// Everything that a gateway is told.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Of this replica in its cluster; must be the token's.
    pub name: String,
    pub state_dir: PathBuf,
    /// A join token's text; needed once, while the state directory is empty.
    pub token: Option<String>,
    /// File with the token of the pod's service account, by which it joins; the join token then says where only.
    pub service_account_token: Option<PathBuf>,
    /// Socket towards other clusters.
    pub border: SocketAddr,
    /// Socket towards this cluster.
    pub inner: SocketAddr,
    /// Where others reach them; the bound addresses when not given.
    pub advertise_border: Option<SocketAddr>,
    pub advertise_inner: Option<SocketAddr>,
    /// The border address is a balancer's, shared by several replicas.
    pub balanced: bool,
    /// As cloud providers name them; empty when unknown. Sidecars of the same zone prefer this replica.
    pub zone: String,
    pub workers: NonZeroUsize,
    pub admin: SocketAddr,
    pub drain: Duration,
}

/// What is wrong with a setting, and what would be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{flag} {address}: 0.0.0.0 and port 0 reach nobody: give the address that others can send to")]
    Advertised { flag: &'static str, address: SocketAddr },
    #[error(
        "--balanced needs --advertise-border ADDRESS:PORT: the balancer's address is not one of this machine's"
    )]
    Balanced,
    #[error("--border and --inner are both {address}: give one of them another port")]
    SameAddress { address: SocketAddr },
    #[error(
        "{listen} listens on every address of this machine, and which of them others can send to can't be told: give {advertise} ADDRESS:PORT"
    )]
    Unknown { listen: &'static str, advertise: &'static str },
}

impl GatewayConfig {
    /// Checks what can be checked before anything is bound.
    pub fn check(&self) -> Result<(), ConfigError> {
        let advertised =
            [("--advertise-border", self.advertise_border), ("--advertise-inner", self.advertise_inner)];
        for (flag, address) in advertised {
            if let Some(address) = address.filter(|a| a.ip().is_unspecified() || a.port() == 0) {
                return Err(ConfigError::Advertised { flag, address });
            }
        }
        if self.balanced && self.advertise_border.is_none() {
            return Err(ConfigError::Balanced);
        }
        if self.border == self.inner && self.border.port() != 0 {
            return Err(ConfigError::SameAddress { address: self.border });
        }
        Ok(())
    }

    /// The addresses to announce. A socket on every address of the machine is announced with the one that packets to
    /// `towards` (a federator or gateway of the cluster) leave from.
    pub fn advertised(
        &self,
        border: SocketAddr,
        inner: SocketAddr,
        towards: impl Iterator<Item = SocketAddr>,
    ) -> Result<(SocketAddr, SocketAddr), ConfigError> {
        let mut outgoing = None;
        let mut towards = towards;
        let mut address = |given: Option<SocketAddr>, bound: SocketAddr, listen, advertise| match given {
            Some(address) => Ok(address),
            None if !bound.ip().is_unspecified() => Ok(bound),
            None => {
                let ip = outgoing.or_else(|| towards.find_map(source_towards));
                outgoing = ip;
                ip.map(|ip| SocketAddr::new(ip, bound.port()))
                    .ok_or(ConfigError::Unknown { listen, advertise })
            }
        };
        Ok((
            address(self.advertise_border, border, "--border", "--advertise-border")?,
            address(self.advertise_inner, inner, "--inner", "--advertise-inner")?,
        ))
    }
}

/// The address of this machine that packets to `to` leave from. Nothing is sent.
fn source_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if to.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GatewayConfig {
        GatewayConfig {
            name: "gw-1".into(),
            state_dir: "/var/lib/tombolo/gw-1".into(),
            token: None,
            service_account_token: None,
            border: ([0, 0, 0, 0], DEFAULT_BORDER_PORT).into(),
            inner: ([0, 0, 0, 0], DEFAULT_INNER_PORT).into(),
            advertise_border: None,
            advertise_inner: None,
            balanced: false,
            zone: String::new(),
            workers: NonZeroUsize::MIN,
            admin: ([127, 0, 0, 1], 0).into(),
            drain: DEFAULT_DRAIN,
        }
    }

    #[test]
    fn contradictions_are_found_before_anything_is_bound() {
        assert_eq!(config().check(), Ok(()));
        let nowhere = GatewayConfig { advertise_border: Some(([0, 0, 0, 0], 7440).into()), ..config() };
        assert!(matches!(nowhere.check(), Err(ConfigError::Advertised { flag: "--advertise-border", .. })));
        assert_eq!(GatewayConfig { balanced: true, ..config() }.check(), Err(ConfigError::Balanced));
        let same = GatewayConfig { inner: config().border, ..config() };
        assert!(matches!(same.check(), Err(ConfigError::SameAddress { .. })));
    }

    #[test]
    fn what_is_announced_is_given_bound_or_found_by_the_route_to_the_cluster() {
        let (border, inner) = (([0, 0, 0, 0], 7440).into(), ([0, 0, 0, 0], 7441).into());
        let towards = || [SocketAddr::from(([127, 0, 0, 1], 7443))].into_iter();
        let found = config().advertised(border, inner, towards()).unwrap();
        assert_eq!(found, (([127, 0, 0, 1], 7440).into(), ([127, 0, 0, 1], 7441).into()));
        let bound: SocketAddr = ([127, 0, 0, 9], 7440).into();
        let given = GatewayConfig { advertise_inner: Some(([10, 0, 0, 1], 1).into()), ..config() };
        assert_eq!(given.advertised(bound, inner, towards()).unwrap(), (bound, ([10, 0, 0, 1], 1).into()));
        let unknown = config().advertised(border, inner, std::iter::empty()).unwrap_err();
        assert!(unknown.to_string().contains("--advertise-border"), "{unknown}");
    }
}
