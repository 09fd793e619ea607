//! Which virtual addresses stand for which services: the federator's word, followed.
//!
//! [`NamesTask`] follows the names of the cluster and publishes their addresses once it has read them whole; [`merge`] makes
//! targets of them. Until then, and without a federator, those of the last configuration's upstreams hold. A loss of the
//! federator changes nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tombolo_model::names::ServiceKey;
use tombolo_overlay::Overlay;
use tombolo_overlay::member::Member;
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;

use super::targets::Targets;
use crate::tables::Tables;

/// An event comes at least every 5 s: three missed ones, and another federator is tried.
const SILENCE: Duration = Duration::from_secs(16);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// After a stream that a federator ended at once.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// What a federator may fill: 10,000 names of each of several clusters.
const MAX_SERVICES: usize = 100_000;
/// One per family; more is a mistake.
const MAX_ADDRESSES: usize = 8;

/// Addresses of all services of the cluster; `None`: not read whole yet.
pub(crate) type Addresses = Option<Arc<HashMap<IpAddr, ServiceKey>>>;

/// What has been read of the names.
#[derive(Debug, Default)]
struct Reading {
    position: v1::NamesHello,
    /// Of an update that is not complete yet.
    pending: Vec<v1::NamedService>,
    services: HashMap<String, (ServiceKey, Vec<IpAddr>)>,
}

impl Reading {
    /// Takes an event over; true: the addresses are whole and may have changed. The error: what comes does not follow from
    /// what is known, and everything is asked for anew.
    fn apply(&mut self, event: v1::NamesEvent) -> Result<bool, String> {
        let v1::NamesEvent { epoch, revision, whole, services, gone, more } = event;
        if !whole && epoch != self.position.epoch {
            return Err(format!(
                "a change of epoch {epoch:016x}, while that of {:016x} is known",
                self.position.epoch
            ));
        }
        self.pending.extend(services);
        if self.pending.len() > MAX_SERVICES {
            return Err(format!("an update of more than {MAX_SERVICES} names"));
        }
        if more {
            return Ok(false);
        }
        self.position = v1::NamesHello { epoch, revision };
        if whole {
            self.services.clear();
        }
        let changed = whole || !self.pending.is_empty() || !gone.is_empty();
        for gone in gone {
            self.services.remove(&gone);
        }
        for named in std::mem::take(&mut self.pending) {
            // What can't be read has no address here.
            let Ok(service) = named.service.parse::<ServiceKey>() else { continue };
            let addresses = named.addresses.iter().take(MAX_ADDRESSES).filter_map(|text| text.parse().ok());
            self.services.insert(named.service, (service, addresses.collect()));
        }
        if self.services.len() > MAX_SERVICES {
            return Err(format!("more than {MAX_SERVICES} names"));
        }
        Ok(changed)
    }

    fn addresses(&self) -> HashMap<IpAddr, ServiceKey> {
        let services = self.services.values();
        let each = services.flat_map(|(service, addresses)| addresses.iter().map(|a| (*a, service.clone())));
        each.collect()
    }
}

/// Follows the names of the cluster. Ends with the sidecar.
#[derive(Debug)]
pub(crate) struct NamesTask {
    pub member: Member,
    pub overlay: Overlay,
    pub addresses: watch::Sender<Addresses>,
}

impl NamesTask {
    pub async fn run(self) {
        let mut reading = Reading::default();
        loop {
            if let Err(error) = self.watch(&mut reading).await {
                tracing::info!(%error, "no names from a federator; the addresses that are known stay");
            }
            tokio::time::sleep(REOPEN_PAUSE.mul_f64(0.5 + rand::random::<f64>())).await;
        }
    }

    async fn watch(&self, reading: &mut Reading) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let channel = self.member.connect(&self.overlay).await?;
        let mut client = ConfigClient::new(channel);
        let opened = tokio::time::timeout(CALL_TIMEOUT, client.watch_names(reading.position)).await?;
        let mut events = opened.map_err(|status| status.message().to_owned())?.into_inner();
        reading.pending.clear();
        loop {
            let next = tokio::time::timeout(SILENCE, events.message()).await?;
            let Some(event) = next.map_err(|status| status.message().to_owned())? else { return Ok(()) };
            match reading.apply(event) {
                Ok(false) => {}
                Ok(true) => drop(self.addresses.send_replace(Some(Arc::new(reading.addresses())))),
                Err(error) => {
                    *reading = Reading::default();
                    return Err(error.into());
                }
            }
        }
    }
}

/// Keeps the targets up until the sender of the configuration is gone.
pub(crate) async fn merge(
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    mut addresses: watch::Receiver<Addresses>,
    targets: watch::Sender<Arc<Targets>>,
) {
    loop {
        let known = addresses.borrow_and_update().clone();
        let of_upstreams = upstreams(tables.borrow_and_update().as_deref());
        targets.send_modify(|targets| {
            *targets = Arc::new(match &known {
                Some(all) => targets.with(all.iter().map(|(a, s)| (*a, s.clone())), true),
                None => targets.with(of_upstreams, false),
            });
        });
        let news = tokio::select! {
            news = tables.changed(), if known.is_none() => news,
            news = addresses.changed() => news,
        };
        if news.is_err() {
            return;
        }
    }
}

fn upstreams(tables: Option<&Tables>) -> Vec<(IpAddr, ServiceKey)> {
    let upstreams = tables.into_iter().flat_map(|tables| tables.upstreams.values());
    let each =
        upstreams.flat_map(|upstream| upstream.addresses.iter().map(|a| (*a, upstream.service.clone())));
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(service: &str, addresses: &[&str]) -> v1::NamedService {
        v1::NamedService {
            service: service.to_owned(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            ..v1::NamedService::default()
        }
    }

    fn event(whole: bool, more: bool, services: &[v1::NamedService], gone: &[&str]) -> v1::NamesEvent {
        v1::NamesEvent {
            epoch: 7,
            revision: 1,
            whole,
            services: services.to_vec(),
            gone: gone.iter().map(|name| (*name).to_owned()).collect(),
            more,
        }
    }

    fn texts(reading: &Reading) -> Vec<String> {
        let mut texts: Vec<_> = reading.addresses().iter().map(|(a, s)| format!("{a} {s}")).collect();
        texts.sort();
        texts
    }

    #[test]
    fn addresses_are_known_once_all_pieces_are_there_and_follow_what_changes() {
        let mut reading = Reading::default();
        let web = named("shop/web", &["241.64.0.1", "fd00:1::1"]);
        assert_eq!(reading.apply(event(true, true, &[web], &[])), Ok(false));
        assert!(texts(&reading).is_empty(), "half of it is nothing");
        assert_eq!(reading.apply(event(true, false, &[named("shop/db", &["241.64.0.2"])], &[])), Ok(true));
        assert_eq!(texts(&reading), ["241.64.0.1 shop/web", "241.64.0.2 shop/db", "fd00:1::1 shop/web"]);
        assert_eq!(reading.apply(event(false, false, &[], &[])), Ok(false), "a heartbeat");
        assert_eq!(reading.apply(event(false, false, &[], &["shop/web"])), Ok(true));
        assert_eq!(texts(&reading), ["241.64.0.2 shop/db"]);
    }

    #[test]
    fn what_does_not_read_is_left_out_and_a_change_of_another_epoch_is_refused() {
        let mut reading = Reading::default();
        let odd = [named("no-namespace", &["241.64.0.1"]), named("shop/web", &["x", "241.64.0.3"])];
        assert_eq!(reading.apply(event(true, false, &odd, &[])), Ok(true));
        assert_eq!(texts(&reading), ["241.64.0.3 shop/web"]);
        let other = v1::NamesEvent { epoch: 8, ..event(false, false, &[], &[]) };
        assert!(reading.apply(other).unwrap_err().contains("epoch"));
    }
}
