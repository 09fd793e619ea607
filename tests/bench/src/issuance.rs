//! What a federator issues: renewals per second with everything that belongs to one (the CSR's proof checked, leaf and
//! lease signed, identity and audit entry on the disk), against `openssl` signing the same requests and keeping nothing,
//! in turns; how fast a thousand members that all come at once are served; and what a full audit log costs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use serde::Serialize;
use tombolo_federator::core::{Core, Moment};
use tombolo_federator::store::Store;
use tombolo_federator::store::redb::RedbStore;
use tombolo_identity::PeerIdentity;
use tombolo_identity::authority::{ClusterMaterial, Existing, RootAuthority};
use tombolo_identity::issuer::KeyAndCsr;
use tombolo_model::audit::{Action, Event};
use tombolo_proto::{token, v1};
use tombolo_runtime::clock;

#[derive(Debug, Clone, clap::Args)]
pub struct IssuanceArgs {
    /// Turns of each side.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Certificates in one turn of one side.
    #[arg(long, default_value_t = 200)]
    count: usize,
    /// Members that renew at once.
    #[arg(long, default_value_t = 1000)]
    members: usize,
    /// Entries of the audit log whose size and start are measured; 0 leaves it out.
    #[arg(long, default_value_t = 100_000)]
    entries: u64,
    /// Where the store lies; by default a temporary directory, which may be in memory: say where your disk is.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Also writes the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Figures {
    federator_per_second: Vec<f64>,
    openssl_x509_per_second: Vec<f64>,
    /// Signatures alone, one process, without certificates: for comparison.
    openssl_speed_per_second: Vec<f64>,
    ratio_of_medians: f64,
    storm_members: usize,
    storm_seconds: f64,
    storm_slowest_seconds: f64,
    audit: Option<AuditCost>,
}

#[derive(Debug, Serialize)]
struct AuditCost {
    entries: u64,
    store_mb: f64,
    start_seconds: f64,
}

/// A member that has joined, and its next request.
struct Member {
    identity: PeerIdentity,
    request: v1::RenewRequest,
    csr_pem: PathBuf,
}

fn moment(origin: Instant) -> Moment {
    Moment { monotonic: origin.elapsed(), unix: clock::since_unix_epoch() }
}

fn start(dir: &Path, trust: &Path) -> Result<Core> {
    let store: Arc<dyn Store> = Arc::new(RedbStore::open(&dir.join("store.redb"))?);
    let material = ClusterMaterial::load(trust)?;
    Ok(Core::load(store, material, BTreeMap::new(), clock::since_unix_epoch())?)
}

fn join(core: &mut Core, dir: &Path, number: usize, moment: Moment) -> Result<Member> {
    let name = format!("web-{number}");
    let request = v1::CreateJoinTokenRequest {
        role: "sidecar".into(),
        name: name.clone(),
        namespace: "shop".into(),
        ..Default::default()
    };
    let made = core.create_join_token(&request, moment)?;
    let token = token::decode(&made.text)?;
    let csr = KeyAndCsr::generate()?.csr_der;
    let request = v1::JoinWorkloadRequest {
        token_id: token.token_id,
        secret: token.secret,
        csr_der: csr.clone(),
        name,
        lease_request_nonce: vec![7; 16],
    };
    let joined = core.join_workload(&request, moment)?;
    let id = joined.svid.context("no SVID")?.spiffe_id;
    let cluster = &core.facts.cluster;
    let identity = PeerIdentity {
        spiffe_id: id.parse()?,
        cluster: cluster.name.clone(),
        tag: cluster.tag,
        serial: vec![1],
        not_after: i64::MAX,
        chain_hash: [0; 32],
        issuer_spki: [0; 32],
    };
    let csr_pem = dir.join(format!("{number}.csr"));
    let text = base64::engine::general_purpose::STANDARD.encode(&csr);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    let pem = format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
        lines.join("\n")
    );
    std::fs::write(&csr_pem, pem)?;
    let lease = joined.lease.map(|lease| v1::EndpointLease { keys: None, ..lease });
    Ok(Member { identity, request: v1::RenewRequest { csr_der: csr, lease, workload: false }, csr_pem })
}

fn by_federator(core: &mut Core, members: &[Member], count: usize, origin: Instant) -> Result<f64> {
    let taken = Instant::now();
    for member in members.iter().cycle().take(count) {
        core.renew(&member.identity, &member.request, moment(origin))?;
    }
    Ok(count as f64 / taken.elapsed().as_secs_f64())
}

fn by_openssl(trust: &Path, members: &[Member], count: usize) -> Result<f64> {
    let (certificate, key) = (trust.join("ca.crt"), trust.join("ca.key"));
    let taken = Instant::now();
    for (serial, member) in members.iter().cycle().take(count).enumerate() {
        let status = Command::new("openssl")
            .args(["x509", "-req", "-days", "1", "-sha256", "-set_serial", &(serial + 1).to_string(), "-in"])
            .arg(&member.csr_pem)
            .arg("-CA")
            .arg(&certificate)
            .arg("-CAkey")
            .arg(&key)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "openssl x509: {status}");
    }
    Ok(count as f64 / taken.elapsed().as_secs_f64())
}

/// Signatures per second, as `openssl speed` counts them.
fn speed() -> Result<f64> {
    let output =
        Command::new("openssl").args(["speed", "-elapsed", "-seconds", "1", "-mr", "ecdsap256"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // +F4:<n>:<bits>:<signatures per second>:<verifications per second>, of OpenSSL 3.
    let line = text.lines().find(|line| line.starts_with("+F4:")).context("openssl speed said nothing")?;
    Ok(line.split(':').nth(3).context("no figure")?.parse()?)
}

/// Everybody at once, through the core's queue as the services send it: whole time, and the slowest answer.
fn storm(core: Core, members: Vec<Member>) -> Result<(Duration, Duration)> {
    let handle = core.start()?;
    let runtime = tombolo_runtime::rt::one_thread()?;
    runtime.block_on(async {
        let taken = Instant::now();
        let renewals = members.into_iter().map(|member| {
            let handle = handle.clone();
            async move {
                let Member { identity, request, .. } = member;
                handle.attempt(move |core, moment| core.renew(&identity, &request, moment)).await?;
                anyhow::Ok(taken.elapsed())
            }
        });
        let answered = futures::future::try_join_all(renewals).await?;
        Ok((taken.elapsed(), answered.into_iter().max().unwrap_or_default()))
    })
}

/// A store whose audit log is full: its size, and how long a federator takes to start from it.
fn full_log(dir: &Path, trust: &Path, entries: u64) -> Result<AuditCost> {
    let mut core = start(dir, trust)?;
    let origin = Instant::now();
    let events = |n: u64| Event {
        serial: hex::encode(rand::random::<[u8; 16]>()),
        spki_sha256: hex::encode(rand::random::<[u8; 32]>()),
        reason: "sidecar, until 2026-11-25T02:15:08Z".to_owned(),
        ..Event::done(Action::Renew, format!("spiffe://bench.example/cluster/home/ns/shop/sa/web-{n}"))
    };
    for first in (0..entries).step_by(1000) {
        let batch = (first..entries.min(first + 1000)).map(events).collect();
        core.record_events(batch, moment(origin))?;
    }
    drop(core);
    let store_mb = std::fs::metadata(dir.join("store.redb"))?.len() as f64 / 1e6;
    let taken = Instant::now();
    drop(start(dir, trust)?);
    Ok(AuditCost { entries, store_mb, start_seconds: taken.elapsed().as_secs_f64() })
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn row(name: &str, samples: &[f64]) {
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(0.0, f64::max);
    println!("{name:<34} {:>9.0}/s  ({least:.0} to {most:.0}, {} turns)", median(samples), samples.len());
}

pub fn run(args: &IssuanceArgs) -> Result<()> {
    let temporary = match &args.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let (dir, origin) = (temporary.path(), Instant::now());
    let unix = clock::since_unix_epoch();
    let mut root = RootAuthority::init(&dir.join("root"), "bench.example".parse()?, unix)?;
    let trust = dir.join("trust");
    root.sign_cluster(&"home".parse()?, Existing::Refuse, unix)?.save(&trust)?;
    let mut core = start(dir, &trust)?;
    let (endpoint, _) = core.own_endpoint(moment(origin))?;
    core.set_own_endpoint(endpoint);
    let members: Vec<Member> =
        (0..args.members).map(|n| join(&mut core, dir, n, moment(origin))).collect::<Result<_>>()?;

    let (mut federator, mut openssl, mut signatures) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        federator.push(by_federator(&mut core, &members, args.count, origin)?);
        openssl.push(by_openssl(&trust, &members, args.count)?);
        signatures.push(speed()?);
    }
    let ratio = median(&federator) / median(&openssl);
    row("federator, stored and audited", &federator);
    row("openssl x509, one process each", &openssl);
    row("openssl speed, signatures alone", &signatures);
    println!("federator : openssl x509           {ratio:.2}");
    let (whole, slowest) = storm(core, members)?;
    println!(
        "{} members renew at once: all within {:.2} s, the slowest answer after {:.2} s",
        args.members,
        whole.as_secs_f64(),
        slowest.as_secs_f64()
    );
    let audit = match args.entries {
        0 => None,
        entries => {
            let other = dir.join("full");
            std::fs::create_dir(&other)?;
            let cost = full_log(&other, &trust, entries)?;
            println!(
                "{entries} audit entries: a store of {:.0} MB, a start of {:.2} s",
                cost.store_mb, cost.start_seconds
            );
            Some(cost)
        }
    };
    if let Some(path) = &args.json {
        let figures = Figures {
            federator_per_second: federator,
            openssl_x509_per_second: openssl,
            openssl_speed_per_second: signatures,
            ratio_of_medians: ratio,
            storm_members: args.members,
            storm_seconds: whole.as_secs_f64(),
            storm_slowest_seconds: slowest.as_secs_f64(),
            audit,
        };
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)?;
    }
    Ok(())
}
