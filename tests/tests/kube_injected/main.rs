//! Sidecars that the webhook puts into pods which really run: two clusters of the testbed, Tombolo by its chart with injection,
//! one link. Captured pods, pods under PodSecurity `restricted` and `baseline`, strict inbound with probes and scrapes, pods that
//! end under requests, a webhook that is away, and pods that are not let in.
//!
//! Clusters are expensive to start: one test runs every case in order, and names all that fail. `TOMBOLO_CASE` runs one alone
//! (with `captured`, whose server the others call).

mod away;
mod ending;
mod identity;
mod inbound;
mod levels;
mod mesh;
mod pods;

use std::time::{Duration, Instant};

use anyhow::Result;
use tombolo_tests::capability::require_netns;
use tombolo_tests::cases::Cases;
use tombolo_tests::testbed::{Cluster, Dns, Layout, Programs, Testbed};

const SOON: Duration = Duration::from_secs(30);

/// Both clusters.
pub struct World {
    bed: Testbed,
}

impl World {
    fn east(&self) -> Result<&Cluster> {
        self.bed.cluster("east")
    }

    fn west(&self) -> Result<&Cluster> {
        self.bed.cluster("west")
    }
}

type Case = fn(&World) -> Result<()>;

const CASES: &[(&str, Case)] = &[
    ("captured", mesh::a_captured_pod_calls_another_clusters_service_by_its_own_sidecar),
    ("identities", mesh::the_server_sees_who_calls),
    ("restricted", levels::a_restricted_pod_calls_by_its_explicit_listener),
    ("baseline", levels::a_baseline_pod_calls_and_serves),
    ("strict", inbound::probes_and_scrapes_come_in_and_strangers_do_not),
    ("rollout", ending::a_rollout_under_requests_fails_none),
    ("ending", ending::a_sidecar_carries_its_application_to_the_end),
    ("job", ending::a_job_calls_at_once_and_is_over),
    ("identity", identity::pods_join_by_their_service_account_whatever_they_mount),
    ("refused", identity::pods_that_are_not_let_in_say_why),
    ("away", away::without_a_federator_the_failure_policy_decides_and_nobody_else_is_held_up),
];

#[test]
fn injected_pods_of_two_clusters_call_serve_and_end_as_pods_do() -> Result<()> {
    let test = "injected_pods_of_two_clusters_call_serve_and_end_as_pods_do";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let Some(programs) = Programs::require(test) else { return Ok(()) };
    let begun = Instant::now();
    let bed = Testbed::start(programs, &Layout::default())?;
    bed.install(&["inject.enabled=true", "shared.enabled=true"])?;
    for cluster in &bed.clusters {
        cluster.set_dns(&Dns::Multicluster)?;
    }
    bed.clusters.iter().try_for_each(Cluster::dns_ready)?;
    bed.linked()?;
    println!("two clusters with injection are linked after {:?}", begun.elapsed());
    let world = World { bed };
    #[allow(clippy::disallowed_methods)] // the test's own settings
    let only = std::env::var("TOMBOLO_CASE").ok();
    let chosen = |name: &str| name == "captured" || only.as_deref().is_none_or(|only| only == name);
    let mut cases = Cases::new(begun);
    for (name, case) in CASES.iter().filter(|(name, _)| chosen(name)) {
        cases.run(name, || case(&world));
    }
    cases.end()
}
