//! Tombolo's own pods replaced under load, taken away without a trace, and installed again in other ways: by helm behind
//! balancers, and on the network of the nodes.
//!
//! One pair of clusters goes through all of it in order, as an operator's would; each part says what it measures (`FIGURE`).

mod installed;
mod left;
mod rollout;
mod shop;

use std::time::Instant;

use anyhow::Result;
use tombolo_tests::capability::{require_netns, require_programs};
use tombolo_tests::cases::Cases;
use tombolo_tests::testbed::{Layout, Programs, Testbed};

type Part = fn(&Testbed) -> Result<()>;

/// One after the other; what an earlier one has made is the later one's ground.
const PARTS: &[(&str, Part)] = &[
    ("an upgrade of federators and gateways fails no request", rollout::of_the_control_plane),
    ("a rollout of shared sidecars fails no new connection", rollout::of_shared_sidecars),
    ("an uninstall leaves nothing", left::after_uninstalling),
    ("helm and the command install again, with everything on", installed::in_other_ways),
    ("helm uninstalls, and the command what is on the nodes' network", left::after_helm),
];

#[test]
fn pods_are_replaced_under_load_and_removed_without_a_trace() -> Result<()> {
    let test = "pods_are_replaced_under_load_and_removed_without_a_trace";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(()) = require_programs(test, &["nginx", "curl", "ss"]) else { return Ok(()) };
    let Some(programs) = Programs::require(test) else { return Ok(()) };
    let begun = Instant::now();
    let bed = Testbed::start(programs, &Layout::default())?;
    let ready = Instant::now();
    bed.install(&["gateway.replicas=2"])?;
    bed.linked()?;
    println!(
        "FIGURE clusters ready after {:.1?}; Tombolo installed in both and linked after {:.1?} more",
        ready - begun,
        ready.elapsed()
    );
    shop::open(&bed)?;
    let mut parts = Cases::new(begun);
    for (part, run) in PARTS {
        if !parts.run(part, || run(&bed)) {
            shop::explain(&bed);
        }
    }
    parts.end()
}
