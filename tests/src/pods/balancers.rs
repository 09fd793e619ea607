//! Addresses for Services of type LoadBalancer, as a cloud's controller or MetalLB gives them: from a pool, on this node's
//! device, so that the network behind the node finds them here; kube-proxy does the rest.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::Command;

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::json;

use super::network::feed;

/// By namespace and name.
type Given = BTreeMap<(String, String), Ipv4Addr>;

/// Runs for as long as the node.
pub async fn run(client: Client, pool: (Ipv4Addr, Ipv4Addr)) {
    let mut events =
        Box::pin(watcher(Api::<Service>::all(client.clone()), watcher::Config::default()).default_backoff());
    let mut given = Given::new();
    while let Some(event) = events.next().await {
        let outcome = match event {
            Ok(Event::Apply(service) | Event::InitApply(service)) => {
                give(&client, pool, &mut given, &service).await
            }
            Ok(Event::Delete(service)) => take(&mut given, &key(&service)),
            Ok(Event::Init | Event::InitDone) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            tracing::warn!("load balancers: {error:#}");
        }
    }
}

fn key(service: &Service) -> (String, String) {
    let metadata = &service.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

async fn give(
    client: &Client,
    pool: (Ipv4Addr, Ipv4Addr),
    given: &mut Given,
    service: &Service,
) -> anyhow::Result<()> {
    let spec = service.spec.clone().unwrap_or_default();
    if spec.type_.as_deref() != Some("LoadBalancer") || service.metadata.deletion_timestamp.is_some() {
        return take(given, &key(service));
    }
    if given.contains_key(&key(service)) {
        return Ok(());
    }
    let Some(address) = choose(pool, given, spec.load_balancer_ip.as_deref()) else {
        anyhow::bail!("no address is left for {:?}", key(service));
    };
    feed(Command::new("ip").args(["-batch", "-"]), &format!("addr replace {address}/32 dev eth0\n"))?;
    given.insert(key(service), address);
    let (namespace, name) = key(service);
    let api: Api<Service> = Api::namespaced(client.clone(), &namespace);
    let status = json!({ "status": { "loadBalancer": { "ingress": [{ "ip": address, "ipMode": "VIP" }] } } });
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
    Ok(())
}

fn take(given: &mut Given, key: &(String, String)) -> anyhow::Result<()> {
    let Some(address) = given.remove(key) else { return Ok(()) };
    feed(Command::new("ip").args(["-batch", "-"]), &format!("addr del {address}/32 dev eth0\n"))
}

/// The address that is asked for, or the first that is free.
fn choose((first, last): (Ipv4Addr, Ipv4Addr), given: &Given, asked: Option<&str>) -> Option<Ipv4Addr> {
    let free = |address: &Ipv4Addr| !given.values().any(|of| of == address);
    let inside = |address: &Ipv4Addr| (first..=last).contains(address);
    if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
        return asked.parse().ok().filter(inside).filter(free);
    }
    (u32::from(first)..=u32::from(last)).map(Ipv4Addr::from).find(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_given_once_and_only_from_the_pool() {
        let pool = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut given = Given::new();
        let first = choose(pool, &given, None).unwrap();
        given.insert(("a".into(), "b".into()), first);
        assert_eq!(choose(pool, &given, Some("10.0.0.1")), None);
        assert_eq!(choose(pool, &given, Some("10.0.0.3")), None);
        let second = choose(pool, &given, Some("")).unwrap();
        assert_eq!(second.to_string(), "10.0.0.2");
        given.insert(("a".into(), "c".into()), second);
        assert_eq!(choose(pool, &given, None), None);
    }
}
