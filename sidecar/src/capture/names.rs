//! Which virtual addresses stand for which services: what the names of the cluster resolve to ([`crate::names`]).
//!
//! Until a federator has told them whole, those that the last process left hold, and those of the last configuration's
//! upstreams. A loss of the federator changes nothing.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;
use tombolo_model::names::ServiceKey;
use tombolo_names::table::{NameTable, TableHandle};

use super::targets::Targets;
use crate::tables::Tables;

/// Keeps the targets up until a sender is gone. `whole`: whether a federator has told all names; sent with every change.
pub(crate) async fn follow(
    mut tables: watch::Receiver<Option<Arc<Tables>>>,
    names: TableHandle,
    mut whole: watch::Receiver<bool>,
    targets: watch::Sender<Arc<Targets>>,
) {
    loop {
        let complete = *whole.borrow_and_update();
        let mut known = of_upstreams(tables.borrow_and_update().as_deref());
        if complete {
            // All there are: an upstream that has lost its address has none.
            known.clear();
        }
        known.extend(of_names(&names.load()));
        targets.send_modify(|targets| *targets = Arc::new(targets.with(known, complete)));
        let news = tokio::select! {
            news = tables.changed(), if !complete => news,
            news = whole.changed() => news,
        };
        if news.is_err() {
            return;
        }
    }
}

fn of_names(names: &NameTable) -> Vec<(IpAddr, ServiceKey)> {
    // The table's keys have been read from names like these.
    names
        .virtual_addresses()
        .filter_map(|(address, service)| Some((address, service.parse().ok()?)))
        .collect()
}

fn of_upstreams(tables: Option<&Tables>) -> Vec<(IpAddr, ServiceKey)> {
    let upstreams = tables.into_iter().flat_map(|tables| tables.upstreams.values());
    let each =
        upstreams.flat_map(|upstream| upstream.addresses.iter().map(|a| (*a, upstream.service.clone())));
    each.collect()
}

#[cfg(test)]
mod tests {
    use tombolo_model::protocol::Protocol;
    use tombolo_proto::v1;

    use super::*;
    use crate::capture::settings::CaptureConfig;
    use crate::capture::targets::Target;

    fn table(services: &[(&str, &str)]) -> NameTable {
        let wire = services.iter().map(|(service, address)| v1::NamedService {
            service: (*service).to_owned(),
            addresses: vec![(*address).to_owned()],
            ..v1::NamedService::default()
        });
        NameTable::default().updated(true, &wire.collect::<Vec<_>>(), &[]).0
    }

    #[tokio::test]
    async fn addresses_of_the_last_names_hold_until_a_federator_has_told_all() {
        let config = CaptureConfig {
            listen: Vec::new(),
            addresses: Vec::new(),
            ranges: vec!["241.64.0.0/16".parse().unwrap()],
            inbound: None,
            mark: 1,
        };
        let (_tables, tables) = watch::channel(None);
        let (told, whole) = watch::channel(false);
        let (sender, mut targets) = watch::channel(Arc::new(Targets::new(&config)));
        let names = TableHandle::default();
        names.store(table(&[("shop/old", "241.64.0.1")]));
        let follow = follow(tables, names.clone(), whole, sender);
        let look = async {
            let at = |n: u8| ([241, 64, 0, n], 80).into();
            let tcp = Protocol::Tcp;
            targets.changed().await.unwrap();
            let last = targets.borrow_and_update().clone();
            assert!(matches!(last.of(tcp, at(1)), Target::Service { .. }) && !last.complete());
            names.store(table(&[("shop/new", "241.64.0.2")]));
            told.send_replace(true);
            targets.changed().await.unwrap();
            let now = targets.borrow_and_update().clone();
            assert!(now.complete() && now.of(tcp, at(1)) == Target::Unknown);
            assert!(
                matches!(now.of(tcp, at(2)), Target::Service { service, .. } if service.name.as_str() == "new")
            );
            drop(told);
        };
        tokio::join!(follow, look);
    }
}
