//! What a federator costs when clusters and services become many: the real core on a real store, fed with the records of
//! simulated peers. Prints what grows with what, so that the limits of one federator are numbers and not guesses.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use tombolo_federator::core::imports::QUOTA;
use tombolo_federator::core::{Core, Moment};
use tombolo_federator::facts::{ControlHandle, Link};
use tombolo_federator::snapshot::rings::Rings;
use tombolo_federator::snapshot::{gateway, sidecar};
use tombolo_federator::store::Store;
use tombolo_federator::store::{Transaction, redb::RedbStore};
use tombolo_identity::SpiffeId;
use tombolo_identity::authority::{Existing, RootAuthority};
use tombolo_model::ids::{Block, ClusterTag, Epoch, Handle, Revision};
use tombolo_model::names::{ClusterName, ServiceKey};
use tombolo_model::sync::Update;
use tombolo_proto::v1;
use tombolo_runtime::clock;
use tombolo_tests::usage;

/// Services that one sidecar calls.
const UPSTREAMS: usize = 20;
const DELTAS: u32 = 200;

#[derive(Debug, Clone, clap::Args)]
pub struct ScaleArgs {
    /// Numbers of linked clusters to try.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000,3000")]
    clusters: Vec<usize>,
    /// Services that each of them exports to us.
    #[arg(long, default_value_t = 100)]
    services: usize,
    /// Also writes the rows to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Row {
    clusters: usize,
    exports: usize,
    /// Resident memory that the records take.
    memory_mb: f64,
    bytes_per_export: f64,
    /// One cluster's snapshot, taken over.
    snapshot_ms: f64,
    /// One changed record, taken over and published.
    delta_us: f64,
    /// The snapshot of a sidecar with 20 upstreams, each served by every cluster that has it.
    sidecar_us: f64,
    gateway_ms: f64,
    gateway_mb: f64,
    /// All peers' records written to the store.
    save_s: f64,
}

fn service(index: usize) -> String {
    format!("shop/service-{index}")
}

fn export(peer: &str, index: usize, healthy: u32) -> v1::Record {
    let record = v1::ExportRecord {
        service: service(index),
        export_uid: vec![7; 16],
        handle: 1000 + u32::try_from(index).unwrap_or(0),
        ports: vec![v1::ServicePort {
            name: "http".into(),
            port: 80,
            protocol: "TCP".into(),
            ..Default::default()
        }],
        spiffe_ids: vec![format!("spiffe://bench.example/cluster/{peer}/ns/shop/sa/service-{index}")],
        healthy,
        total: 10,
        ..Default::default()
    };
    v1::Record { key: format!("export/{}", service(index)), value: Some(v1::record::Value::Export(record)) }
}

fn link(peer: &ClusterName, tag: ClusterTag) -> Result<Link> {
    Ok(Link {
        peer: peer.clone(),
        tag,
        key: hex::encode(rand::random::<[u8; 32]>()),
        federator_ids: vec![SpiffeId::federator(&"bench.example".parse()?, peer)?],
        control: ControlHandle { handle: Handle::from_u32(999), export_uid: [1; 16] },
        first_gateways: Vec::new(),
        properties: BTreeMap::new(),
        created_unix: 0,
        loopback: false,
        recreated: None,
        ended_by_peer: false,
        by_object: false,
        unconfirmed: false,
    })
}

fn moment(origin: Instant) -> Moment {
    Moment { monotonic: origin.elapsed(), unix: clock::since_unix_epoch() }
}

fn rss() -> f64 {
    usage::of(std::process::id()).map_or(0.0, |used| used.rss_bytes as f64)
}

/// Runs it and prints a table.
pub fn run(args: &ScaleArgs) -> Result<()> {
    let mut rows = Vec::new();
    for clusters in &args.clusters {
        eprintln!("{clusters} clusters x {} services", args.services);
        rows.push(measure(*clusters, args.services)?);
    }
    let mut table = comfy_table::Table::new();
    table.set_header([
        "clusters",
        "exports",
        "memory MB",
        "B/export",
        "snapshot ms",
        "delta us",
        "sidecar us",
        "gateway ms",
        "gateway MB",
        "save s",
    ]);
    for row in &rows {
        table.add_row([
            row.clusters.to_string(),
            row.exports.to_string(),
            format!("{:.0}", row.memory_mb),
            format!("{:.0}", row.bytes_per_export),
            format!("{:.2}", row.snapshot_ms),
            format!("{:.0}", row.delta_us),
            format!("{:.0}", row.sidecar_us),
            format!("{:.1}", row.gateway_ms),
            format!("{:.1}", row.gateway_mb),
            format!("{:.2}", row.save_s),
        ]);
    }
    println!("{table}");
    println!("a peer may fill {} records here", QUOTA.records);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?)?;
    }
    Ok(())
}

fn measure(clusters: usize, services: usize) -> Result<Row> {
    let dir = tempfile::tempdir()?;
    let origin = Instant::now();
    let unix = clock::since_unix_epoch();
    let mut root = RootAuthority::init(&dir.path().join("root"), "bench.example".parse()?, unix)?;
    let material = root.sign_cluster(&"home".parse()?, Existing::Refuse, unix)?;
    let store: Arc<dyn Store> = Arc::new(RedbStore::open(&dir.path().join("store.redb"))?);
    let peers: Vec<ClusterName> =
        (0..clusters).map(|n| format!("cluster-{n}").parse().map_err(Into::into)).collect::<Result<_>>()?;
    let mut transaction = Transaction::new();
    for (index, peer) in peers.iter().enumerate() {
        let tag = ClusterTag::new(u32::try_from(index)? + 1).context("too many clusters")?;
        let link = link(peer, tag)?;
        transaction = transaction.put(peer.as_str(), &link);
    }
    store.commit(&transaction)?;
    let mut core = Core::load(store, material, BTreeMap::new(), unix)?;

    let before = rss();
    let taken = Instant::now();
    for peer in &peers {
        let records =
            (0..services).map(|n| export(peer.as_str(), n, 10)).map(|r| (r.key.clone(), r)).collect();
        let update = Update::Snapshot { epoch: Epoch(1), revision: Revision(1), records };
        core.apply_update(peer, Epoch(1), update, moment(origin))?;
    }
    let snapshot = taken.elapsed();
    let memory = (rss() - before).max(0.0);

    // As the core thread does it: a change, then a publication that readers hold on to.
    let mut published = Arc::new(core.facts.clone());
    let taken = Instant::now();
    for step in 0..DELTAS {
        let peer = &peers[usize::try_from(step)? % peers.len()];
        let record = export(peer.as_str(), usize::try_from(step)? % services, step % 10);
        let revision = Revision(u64::from(step) + 2);
        let update =
            Update::Delta { revision, upserts: vec![(record.key.clone(), record)], deletes: Vec::new() };
        core.apply_update(peer, Epoch(1), update, moment(origin))?;
        published = Arc::new(core.facts.clone());
    }
    let delta = taken.elapsed() / DELTAS;

    let facts = &*published;
    let upstreams: Vec<ServiceKey> = (0..UPSTREAMS.min(services))
        .map(|n| service(n).parse().map_err(Into::into))
        .collect::<Result<_>>()?;
    let (rings, block) = (Rings::default(), Block::new(1).context("a block")?);
    let make = || sidecar::snapshot(facts, block, &upstreams, &rings, Duration::ZERO, unix);
    make(); // keys are derived once an hour
    let taken = Instant::now();
    let rounds = 20;
    (0..rounds).for_each(|_| drop(make()));
    let sidecar = taken.elapsed() / rounds;
    let taken = Instant::now();
    let wire = gateway::snapshot(facts, "gw-1", Duration::ZERO, unix);
    let gateway = taken.elapsed();
    let gateway_bytes = prost::Message::encoded_len(&wire);
    let taken = Instant::now();
    core.tick(Moment { monotonic: Duration::from_secs(3600), unix });
    let save = taken.elapsed();

    let exports = clusters * services;
    Ok(Row {
        clusters,
        exports,
        memory_mb: memory / 1e6,
        bytes_per_export: memory / exports as f64,
        snapshot_ms: snapshot.as_secs_f64() * 1e3 / clusters as f64,
        delta_us: delta.as_secs_f64() * 1e6,
        sidecar_us: sidecar.as_secs_f64() * 1e6,
        gateway_ms: gateway.as_secs_f64() * 1e3,
        gateway_mb: gateway_bytes as f64 / 1e6,
        save_s: save.as_secs_f64(),
    })
}
