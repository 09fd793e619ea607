//! What the MCS conformance suite asks of names and of the data path (its behaviours 17 to 27), with the suite's own pods,
//! between two clusters that have Tombolo by `tombolo install`.

mod case;
mod connections;
mod names;

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::Result;
use case::Case;
use tombolo_tests::capability::require_netns;
use tombolo_tests::cases::Cases;
use tombolo_tests::testbed::{Dns, Layout, NAMESPACE, Programs, Testbed};

/// Who answers for `clusterset.local`.
fn resolvers(bed: &Testbed, way: &str) -> Result<()> {
    for cluster in &bed.clusters {
        let dns = match way {
            "coredns" => Dns::Multicluster,
            _ => Dns::Stub(SocketAddr::new(cluster.service_ip(NAMESPACE, "tombolo-dns")?.parse()?, 53)),
        };
        cluster.set_dns(&dns)?;
    }
    bed.clusters.iter().try_for_each(tombolo_tests::testbed::Cluster::dns_ready)
}

#[test]
fn names_and_connections_between_clusters_are_as_mcs_has_them() -> Result<()> {
    let test = "names_and_connections_between_clusters_are_as_mcs_has_them";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(programs) = Programs::require(test) else { return Ok(()) };
    let begun = Instant::now();
    let bed = Testbed::start(programs, &Layout::default())?;
    println!("two clusters are ready after {:?}", begun.elapsed());
    bed.install(&["federator.dns=true", "shared.enabled=true"])?;
    bed.linked()?;
    println!("Tombolo is installed and linked after {:?}", begun.elapsed());
    bed.flatten()?;
    let mut held = Cases::new(begun);
    let mut number = 0;
    for (way, cases) in
        [("coredns", [names::CASES, connections::CASES].concat()), ("stub", names::CASES.to_vec())]
    {
        resolvers(&bed, way)?;
        for (name, check) in cases {
            number += 1;
            held.run(&format!("{way}: {name}"), || {
                Case::begin(&bed, &format!("mcs-conformance-{number}")).and_then(|case| check(&case))
            });
        }
    }
    held.end()
}
