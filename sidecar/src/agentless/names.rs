//! Who resolves the names of agentless backends.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;

use super::MAX_ADDRESSES;

/// A name with no TTL, or a very long one, is asked again all the same.
const SHORTEST_TTL: Duration = Duration::from_secs(1);
pub(super) const LONGEST_TTL: Duration = Duration::from_secs(300);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A name's addresses, and for how long they are good; or why there are none.
pub(super) type Answer = Result<(Vec<IpAddr>, Duration), String>;

/// Made when it is needed.
#[derive(Debug, Default)]
pub(super) struct Names {
    servers: Vec<SocketAddr>,
    resolver: Option<TokioResolver>,
}

impl Names {
    /// Without `servers`: those of `/etc/resolv.conf`.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, resolver: None }
    }

    /// The machine's resolvers are looked up anew.
    pub fn forget(&mut self) {
        self.resolver = None;
    }

    fn resolver(&mut self) -> Result<TokioResolver, NetError> {
        if let Some(resolver) = &self.resolver {
            return Ok(resolver.clone());
        }
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let servers = self.servers.iter().map(|server| {
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
                let at = |mut connection: ConnectionConfig| {
                    connection.port = server.port();
                    connection
                };
                NameServerConfig::new(server.ip(), true, connections.map(at).into())
            });
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        // Asked when its TTL is over: no second one counts beside that.
        builder.options_mut().cache_size = 0;
        Ok(self.resolver.insert(builder.build()?).clone())
    }

    /// Resolves a name, for five seconds at most.
    pub fn ask(&mut self, name: String) -> impl Future<Output = Answer> + Send + use<> {
        let resolver = self.resolver();
        async move {
            let failed = |error: &dyn std::fmt::Display| format!("{name} does not resolve: {error}");
            let resolver = resolver.map_err(|e| failed(&e))?;
            let answer = tokio::time::timeout(RESOLVE_TIMEOUT, resolver.lookup_ip(name.as_str())).await;
            let answer = answer.map_err(|_| failed(&"no answer"))?.map_err(|e| failed(&e))?;
            let left = answer.valid_until().saturating_duration_since(std::time::Instant::now());
            let mut addresses: Vec<IpAddr> = answer.iter().map(|ip| ip.to_canonical()).collect();
            addresses.sort_unstable();
            addresses.dedup();
            addresses.truncate(MAX_ADDRESSES);
            Ok((addresses, left.clamp(SHORTEST_TTL, LONGEST_TTL)))
        }
    }
}
