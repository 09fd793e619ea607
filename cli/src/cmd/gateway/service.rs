//! `--border-service`: the border address that Kubernetes gives to a replica's own Service, read from the API server as the
//! pod's service account. Needed before the gateway starts; looked at again afterwards, because balancers move: the gateway
//! then drains and ends, and its next start announces the new address.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use kube::Api;
use tombolo_federator::kubernetes::client::{LONGEST, connect};
use tombolo_federator::token_review::access::{IN_CLUSTER_DIR, KubernetesAccess};
use tombolo_model::names::ObjectName;
use tombolo_runtime::drain::{Drain, DrainTrigger};

use crate::cmd::federator::api_server;
use crate::failure::Failure;

/// A cloud takes a minute or two to give an address; a request a second is none too many for that.
const SOON: Duration = Duration::from_secs(1);
/// Addresses of balancers hardly ever change.
const AGAIN: Duration = Duration::from_secs(30);

/// Where the address is read.
#[derive(Debug)]
pub struct BorderService {
    access: KubernetesAccess,
    namespace: String,
    name: String,
    node: Option<IpAddr>,
}

/// Where the border socket is reached, as the Service says.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Found {
    Addresses(Vec<SocketAddr>),
    /// To be resolved, with the port.
    Host(String, u16),
    /// Not yet: why.
    Nothing(String),
}

impl BorderService {
    pub fn try_new(name: String, node: Option<IpAddr>) -> Result<Self, Failure> {
        name.parse::<ObjectName>().map_err(|e| Failure::usage(format_args!("--border-service: {e}")))?;
        let access = api_server("in-cluster").map_err(|failure| failure.at("--border-service"))?;
        let path = format!("{IN_CLUSTER_DIR}/namespace");
        let namespace = std::fs::read_to_string(&path).map_err(|e| Failure::new(e).at(path))?;
        Ok(Self { access, namespace: namespace.trim().to_owned(), name, node })
    }

    /// Waits until there is one.
    pub async fn address(&self) -> SocketAddr {
        let mut said = String::new();
        loop {
            let reason = match self.look().await {
                Ok(addresses) => match addresses.first() {
                    Some(address) => return *address,
                    None => "it has no address".to_owned(),
                },
                Err(reason) => reason,
            };
            if reason != said {
                tracing::info!(service = self.name, reason, "waiting for the Service's address");
                said = reason;
            }
            tokio::time::sleep(SOON).await;
        }
    }

    /// Starts the gateway's drain when the process is to end, or when `address` is the Service's no more.
    pub async fn watch(self, address: SocketAddr, drain: DrainTrigger, process: Drain) {
        loop {
            tokio::select! {
                () = process.started() => {
                    drain.start();
                    process.forced().await;
                    drain.force();
                    // Whoever vanishes forces: it is held until the process has gone.
                    return std::future::pending().await;
                }
                () = tokio::time::sleep(AGAIN) => {}
            }
            let looked = tokio::select! {
                // The head of the loop drains.
                () = process.started() => continue,
                looked = self.look() => looked,
            };
            match looked {
                Ok(addresses) if !addresses.is_empty() && !addresses.contains(&address) => {
                    tracing::warn!(service = self.name, before = %address, now = ?addresses,
                        "the Service has another address: draining, to start with that one");
                    drain.start();
                    process.forced().await;
                    drain.force();
                    return std::future::pending().await;
                }
                Ok(_) => {}
                Err(reason) => tracing::debug!(reason, "the Service's address can't be read now"),
            }
        }
    }

    /// Sorted, so that replicas of a name with several addresses agree with themselves.
    async fn look(&self) -> Result<Vec<SocketAddr>, String> {
        let client = connect(&self.access).await.map_err(|e| e.to_string())?;
        let api: Api<Service> = Api::namespaced(client, &self.namespace);
        let service = tokio::time::timeout(LONGEST, api.get(&self.name)).await;
        let service = service.map_err(|_| format!("no answer within {} s", LONGEST.as_secs()))?;
        let mut addresses = match found(&service.map_err(|e| e.to_string())?, self.node) {
            Found::Addresses(addresses) => addresses,
            Found::Nothing(reason) => return Err(reason),
            Found::Host(host, port) => {
                let found = tokio::net::lookup_host((host.as_str(), port)).await;
                found.map_err(|e| format!("{host}: {e}"))?.collect()
            }
        };
        addresses.sort_unstable();
        Ok(addresses)
    }
}

/// Pure.
fn found(service: &Service, node: Option<IpAddr>) -> Found {
    let Some(spec) = &service.spec else { return Found::Nothing("it has no spec".to_owned()) };
    let udp = |port: &&ServicePort| port.protocol.as_deref() == Some("UDP");
    let ports = spec.ports.as_deref().unwrap_or_default();
    let named = ports.iter().filter(udp).find(|port| port.name.as_deref() == Some("border"));
    let Some(port) = named.or_else(|| ports.iter().find(udp)) else {
        return Found::Nothing("it has no UDP port".to_owned());
    };
    let number = |port: i32| u16::try_from(port).unwrap_or(0);
    match spec.type_.as_deref() {
        Some("LoadBalancer") => {
            let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
            let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
            let ips = ingress.iter().filter_map(|ingress| ingress.ip.as_deref()?.parse::<IpAddr>().ok());
            let ips: Vec<_> = ips.map(|ip| SocketAddr::new(ip, number(port.port))).collect();
            if !ips.is_empty() {
                return Found::Addresses(ips);
            }
            match ingress.iter().find_map(|ingress| ingress.hostname.clone()) {
                Some(host) => Found::Host(host, number(port.port)),
                None => Found::Nothing("its load balancer has no address yet".to_owned()),
            }
        }
        Some("NodePort") => match (node, port.node_port) {
            (Some(node), Some(port)) => Found::Addresses(vec![SocketAddr::new(node, number(port))]),
            (None, _) => Found::Nothing("it is a NodePort, and --node-address is not given".to_owned()),
            (_, None) => Found::Nothing("it has no node port yet".to_owned()),
        },
        other => Found::Nothing(format!(
            "its type is {}, expected LoadBalancer or NodePort",
            other.unwrap_or("ClusterIP")
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn service(kind: &str, ingress: Value) -> Service {
        serde_json::from_value(json!({
            "spec": { "type": kind, "ports": [
                { "name": "metrics", "protocol": "TCP", "port": 7445 },
                { "name": "border", "protocol": "UDP", "port": 7440, "nodePort": 30440 },
            ] },
            "status": { "loadBalancer": { "ingress": ingress } },
        }))
        .unwrap()
    }

    #[test]
    fn the_border_address_is_the_balancers_or_the_nodes() {
        let node: IpAddr = [10, 0, 0, 1].into();
        let at = |text: &str| Found::Addresses(vec![text.parse().unwrap()]);
        let balanced = service("LoadBalancer", json!([{ "ip": "203.0.113.7" }]));
        assert_eq!(found(&balanced, None), at("203.0.113.7:7440"));
        let named = service("LoadBalancer", json!([{ "hostname": "lb.example" }]));
        assert_eq!(found(&named, None), Found::Host("lb.example".into(), 7440));
        assert_eq!(found(&service("NodePort", json!([])), Some(node)), at("10.0.0.1:30440"));
        for (kind, node, said) in [
            ("LoadBalancer", None, "no address yet"),
            ("NodePort", None, "--node-address"),
            ("ClusterIP", Some(node), "ClusterIP"),
        ] {
            let nothing = found(&service(kind, json!([])), node);
            assert!(matches!(&nothing, Found::Nothing(reason) if reason.contains(said)), "{nothing:?}");
        }
    }
}
