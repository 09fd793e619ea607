//! Which services Kubernetes is to be shown anew after a change of the facts.

use super::*;
use crate::view::kubernetes::{Changed, Inputs};

fn inputs(facts: &Facts) -> Inputs {
    Inputs::of(facts, NOW, Duration::from_secs(UNIX))
}

fn only(services: &[&str]) -> Changed {
    Changed::Only(services.iter().map(|text| service(text)).collect())
}

#[test]
fn only_services_that_have_changed_are_looked_at_and_all_when_a_link_has() {
    let mut facts = east();
    facts.link("west");
    facts.import("west").heard = Some(Duration::from_secs(UNIX - 1));
    let empty = inputs(&facts);
    assert_eq!(empty.since(&empty), only(&[]));
    facts.export("web", None);
    facts.export("old", None);
    facts.import("west").exports.insert(service("shop/cart"), exported(1, 2, &[]));
    let before = inputs(&facts);
    assert_eq!(before.since(&empty), only(&["shop/old", "shop/web", "shop/cart"]));
    // A heartbeat changes nothing.
    facts.import("west").heard = Some(Duration::from_secs(UNIX));
    assert_eq!(inputs(&facts).since(&before), only(&[]));
    facts.allot("west", "shop/web");
    assert_eq!(inputs(&facts).since(&before), only(&["shop/web"]), "it can be used from now on");
    let before = inputs(&facts);
    facts.sidecar(1, "/ns/shop/sa/old", &[("shop/old", port("http", 80))]);
    assert_eq!(inputs(&facts).since(&before), only(&["shop/old"]), "its ports are known from now on");
    let before = inputs(&facts);
    facts.import("west").exports.clear();
    assert_eq!(inputs(&facts).since(&before), only(&["shop/cart"]));
    facts.import("west").connected = !facts.imports[&"west".parse().unwrap()].connected;
    assert_eq!(inputs(&facts).since(&before), Changed::All);
}
