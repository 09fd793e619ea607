//! A restart storm: a thousand members of one cluster that have just started and all renew at once, over sockets and with
//! their handshakes; and all of them again over the connections that then stand.
//!
//! The federator is the real binary. The members are this process: each with an identity, a lease, a socket and a
//! connection of its own, by the code that sidecars and gateways renew with, so the federator can't tell them from as many
//! machines; they and the federator share this machine's cores.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde::Serialize;
use tombolo_overlay::cid::Kind;
use tombolo_overlay::member::Member;
use tombolo_overlay::member::backoff::Backoff;
use tombolo_overlay::{Limits, Overlay, OverlayConfig};
use tombolo_runtime::tasks::TaskGroup;

use crate::cluster::Place;

/// All of them, as the target has it.
const TARGET: Duration = Duration::from_secs(30);
/// Joins under way at a time: they are the set-up and not measured.
const JOINS: usize = 8;
/// As a member's renewal task begins (`tombolo_overlay::member::renewal`).
const BACKOFF: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
const PATIENCE: Duration = Duration::from_secs(120);
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, clap::Args)]
pub struct StormArgs {
    /// Members that renew at once.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=4000))]
    members: u16,
    /// Restarts of all of them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=10))]
    rounds: u8,
    /// Also writes the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One storm.
#[derive(Debug, Serialize)]
struct Storm {
    members: usize,
    /// From the first request to the last answer.
    all_seconds: f64,
    median_seconds: f64,
    /// Tries that failed and were made again, as a member would.
    tried_again: usize,
}

struct Renewer {
    member: Member,
    overlay: Overlay,
}

/// Addresses of their own, as machines have them: 250 to each of 127.84.0.0/16's networks.
fn address(number: u16) -> SocketAddr {
    let (net, host) = (number / 250, number % 250 + 1);
    SocketAddr::from(([127, 84, net.to_le_bytes()[0], host.to_le_bytes()[0]], 7442))
}

/// The set-up: an identity and a lease, in a directory of their own.
async fn join(place: &Place, number: u16) -> Result<Member> {
    let name = format!("member-{number}");
    let token = std::fs::read_to_string(place.token("sidecar", &name)?)?;
    Ok(Member::join(token.trim(), &place.dir().join(&name), None, address(number)).await?)
}

/// What a start of the member does: its files read, an incarnation burnt, a socket bound; no connection yet.
fn start(place: &Place, number: u16, tasks: &TaskGroup) -> Result<Renewer> {
    let dir = place.dir().join(format!("member-{number}"));
    let member = Member::load(&dir)?.context("it has not joined")?;
    let config = OverlayConfig {
        tag: member.tag(),
        endpoint: member.burn_endpoint()?,
        keys: member.lease().keys.clone(),
        kind: Kind::Endpoint,
        bind: address(number),
        registers: false,
        learns: false,
        server: None,
        svid: Some(member.svid().clone()),
        limits: Limits::default(),
    };
    let overlay = Overlay::bind(config, tasks)?;
    overlay.set_routes(member.first_routes());
    Ok(Renewer { member, overlay })
}

/// Renews until it works, pausing as the member's own task does; when, and after how many failures.
async fn renew(renewer: &Renewer, start: Instant) -> Result<(Duration, usize)> {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut failed = 0;
    loop {
        match renewer.member.renew(&renewer.overlay).await {
            Ok(()) => return Ok((start.elapsed(), failed)),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error).with_context(|| format!("{} never renewed", renewer.member.name()));
            }
            Err(_) => failed += 1,
        }
        tokio::time::sleep(backoff.failed(rand::random())).await;
    }
}

async fn storm(renewers: &[Renewer]) -> Result<Storm> {
    let before: Vec<_> = renewers.iter().map(|r| r.member.svid().load().not_after).collect();
    let start = Instant::now();
    let mut all: FuturesUnordered<_> = renewers.iter().map(|renewer| renew(renewer, start)).collect();
    let (mut times, mut tried_again) = (Vec::new(), 0);
    while let Some(renewed) = all.next().await {
        let (took, failed) = renewed?;
        times.push(took);
        tried_again += failed;
    }
    times.sort();
    let newer = |(renewer, before): (&Renewer, &u64)| renewer.member.svid().load().not_after >= *before;
    ensure!(renewers.iter().zip(&before).all(newer), "an identity is older than before");
    Ok(Storm {
        members: times.len(),
        all_seconds: times.last().context("nobody renewed")?.as_secs_f64(),
        median_seconds: times.get(times.len() / 2).context("nobody renewed")?.as_secs_f64(),
        tried_again,
    })
}

fn print(what: &str, storm: &Storm) {
    let reached = storm.all_seconds <= TARGET.as_secs_f64() && storm.tried_again == 0;
    println!(
        "{} {what}: {} members within {:.2} s (median {:.2} s), {} tries failed; target: all within {} s, none fails",
        if reached { "REACHED" } else { "MISSED" },
        storm.members,
        storm.all_seconds,
        storm.median_seconds,
        storm.tried_again,
        TARGET.as_secs()
    );
}

async fn measure(args: &StormArgs) -> Result<Vec<[Storm; 2]>> {
    let place = Place::up()?;
    let mut joins =
        futures::stream::iter(0..args.members).map(|number| join(&place, number)).buffer_unordered(JOINS);
    let mut joined = 0;
    while let Some(member) = joins.next().await {
        member?;
        joined += 1;
        if joined % 100 == 0 {
            eprintln!("{joined} of {} have joined", args.members);
        }
    }
    let mut rounds = Vec::new();
    for round in 1..=args.rounds {
        let tasks = TaskGroup::new();
        let renewers: Vec<_> =
            (0..args.members).map(|number| start(&place, number, &tasks)).collect::<Result<_>>()?;
        let fresh = storm(&renewers).await?;
        print(&format!("round {round}, just started"), &fresh);
        let standing = storm(&renewers).await?;
        print(&format!("round {round}, over connections that stand"), &standing);
        rounds.push([fresh, standing]);
        for renewer in &renewers {
            renewer.overlay.close().await;
        }
        drop(renewers);
        tasks.shutdown(CLOSE_PATIENCE).await;
    }
    Ok(rounds)
}

/// Runs it and prints the figures.
pub fn run(args: &StormArgs) -> Result<()> {
    let runtime = tombolo_runtime::rt::one_thread()?;
    let rounds = runtime.block_on(measure(args))?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rounds)?)?;
    }
    Ok(())
}
