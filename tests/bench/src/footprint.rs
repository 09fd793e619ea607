//! What a sidecar needs in memory: idle, with a thousand open streams, with five thousand client connections, and how
//! long those take to come back after its restart.
//!
//! One cluster on loopback of the real binary. The clients are dialled by this process as one member of the cluster: the
//! server can't tell them from as many sidecars.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde::Serialize;
use tombolo_identity::{ExpectedPeer, tls};
use tombolo_overlay::cid::Kind;
use tombolo_overlay::member::Member;
use tombolo_overlay::{DialTarget, Limits, Overlay, OverlayConfig, PeerConnection, ServerTls};
use tombolo_proto::v1;
use tombolo_proto::v1::config_client::ConfigClient;
use tombolo_runtime::tasks::TaskGroup;
use tombolo_sidecar::tables::{Backend, Tables};
use tombolo_tests::process::ProcessSpec;

use crate::cluster::{Place, address};
use crate::mesh::tombolo_binary;

const STREAMS: usize = 1000;
/// Handshakes under way at a time: what pools of as many sidecars with jittered backoff come to.
const AT_A_TIME: usize = 64;
const PATIENCE: Duration = Duration::from_secs(20);
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Memory that is freed lazily has settled by then.
const SETTLE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, clap::Args)]
pub struct FootprintArgs {
    /// Client connections on one sidecar.
    #[arg(long, default_value_t = 5000)]
    clients: usize,
    /// Also writes the figures to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One figure with its target.
#[derive(Debug, Serialize)]
struct Figure {
    what: String,
    value: f64,
    unit: &'static str,
    at_most: f64,
    reached: bool,
}

fn figure(what: impl Into<String>, value: f64, unit: &'static str, at_most: f64) -> Figure {
    Figure { what: what.into(), value, unit, at_most, reached: value <= at_most }
}

/// A cluster with a local application.
fn up() -> Result<Place> {
    let mut place = Place::up()?;
    let app = address(21, 8080).to_string();
    let spec =
        ProcessSpec::new("app", tombolo_binary()?).args(["demo-app", "--listen", &app, "--name", "app"]);
    let app = spec.spawn(place.dir())?;
    place.processes.insert("app", app);
    Ok(place)
}

/// The sidecar that serves it.
fn server(place: &mut Place) -> Result<()> {
    let token = place.path("server.token");
    let token = if Path::new(&token).exists() { token } else { place.token("sidecar", "server")? };
    let (state, bind) = (place.path("server"), address(21, 7442).to_string());
    let serves = format!("bench/http:80={}", address(21, 8080));
    let args = ["sidecar", "--name", "server", "--join-token-file", &token, "--state-dir", &state];
    let args = [&args[..], &["--bind", &bind, "--announce", &bind, "--service", &serves]].concat();
    place.start("server", 21, &args)
}

/// A sidecar that calls it, and where.
fn caller(place: &mut Place) -> Result<SocketAddr> {
    let (token, state) = (place.token("sidecar", "caller")?, place.path("caller"));
    let (bind, entry) = (address(22, 7442).to_string(), address(22, 9080));
    let calls = format!("bench/http:80={entry}");
    let args = ["sidecar", "--name", "caller", "--join-token-file", &token, "--state-dir", &state];
    let args = [&args[..], &["--bind", &bind, "--announce", &bind, "--upstream", &calls]].concat();
    place.start("caller", 22, &args)?;
    Ok(entry)
}

/// This process as a member of the cluster.
struct Clients {
    member: Member,
    overlay: Overlay,
    tasks: TaskGroup,
}

impl Clients {
    async fn join(place: &Place) -> Result<Self> {
        let token = std::fs::read_to_string(place.token("sidecar", "clients")?)?;
        let bind = address(23, 7442);
        let member = Member::join(token.trim(), &place.dir().join("clients"), None, bind).await?;
        let tasks = TaskGroup::new();
        let config = OverlayConfig {
            tag: member.tag(),
            endpoint: member.burn_endpoint()?,
            keys: member.lease().keys.clone(),
            kind: Kind::Endpoint,
            bind,
            registers: false,
            learns: false,
            server: Some(ServerTls { mesh: tls::mesh_server_config(member.svid())?, join: None }),
            svid: Some(member.svid().clone()),
            limits: Limits::default(),
        };
        let overlay = Overlay::bind(config, &tasks)?;
        overlay.set_routes(member.first_routes());
        Ok(Self { member, overlay, tasks })
    }

    /// The healthy backend of the service, as the newest snapshot has it.
    async fn backend(&self) -> Result<Arc<Backend>> {
        let channel = self.member.connect(&self.overlay).await?;
        let hello = v1::SidecarHello {
            endpoint_addresses: vec![self.overlay.local_addr().to_string()],
            endpoints: vec![self.overlay.endpoint_id().value()],
            upstreams: vec!["bench/http".to_owned()],
            lease: Some(self.member.lease().to_wire()),
            ..Default::default()
        };
        let mut client = ConfigClient::new(channel);
        let mut snapshots = client.watch_sidecar(hello).await?.into_inner();
        loop {
            let next = tokio::time::timeout(PATIENCE, snapshots.message()).await;
            let snapshot = next.context("no backend in time")??.context("the federator ended the stream")?;
            let tables = Tables::parse(&snapshot, self.member.cluster(), self.member.tag())?;
            let upstream = tables.upstreams.get(&"bench/http".parse()?).cloned();
            let healthy = upstream.and_then(|u| u.backends.iter().find(|b| b.healthy > 0).cloned());
            if let Some(backend) = healthy {
                self.overlay.set_routes(tables.routes);
                // A member that closes its stream, or says nothing for two seconds, has left: nobody answers it.
                self.tasks.spawn("stay", async move {
                    while client.report(v1::StatusReport::default()).await.is_ok() {
                        tokio::time::sleep(REPORT_EVERY).await;
                    }
                    drop(snapshots);
                });
                return Ok(backend);
            }
        }
    }

    /// `count` connections, and how many dials failed on the way.
    async fn dial(&self, count: usize, backend: &Backend) -> Result<(Vec<PeerConnection>, usize)> {
        let tls = tls::mesh_client_config(
            self.member.svid(),
            ExpectedPeer::OneOf(Arc::clone(&backend.identities)),
        )?;
        let target = DialTarget {
            kind: Kind::Service,
            tag: backend.tag,
            handle: backend.handle,
            keys: Arc::clone(&backend.keys),
        };
        let (mut open, mut failed) = (Vec::with_capacity(count), 0);
        let mut dials = FuturesUnordered::new();
        while open.len() < count {
            ensure!(failed <= 4 * AT_A_TIME, "{failed} dials have failed, {} connections stand", open.len());
            while dials.len() < AT_A_TIME && open.len() + dials.len() < count {
                dials.push(self.overlay.dial(&target, Arc::clone(&tls)));
            }
            match dials.next().await {
                Some(Ok(connection)) => open.push(connection),
                Some(Err(_)) => failed += 1,
                None => break,
            }
        }
        Ok((open, failed))
    }
}

/// Runs it and prints the figures.
pub fn run(args: &FootprintArgs) -> Result<()> {
    let runtime = tombolo_runtime::rt::one_thread()?;
    let figures = runtime.block_on(measure(args))?;
    for Figure { what, value, unit, at_most, reached } in &figures {
        let word = if *reached { "REACHED" } else { "MISSED" };
        println!("{word} {what}: {value:.1} {unit}, target <= {at_most} {unit}");
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)?;
    }
    Ok(())
}

async fn measure(args: &FootprintArgs) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut place = up()?;
    server(&mut place)?;
    let entry = caller(&mut place)?;
    tokio::time::sleep(SETTLE).await;
    let idle = place.rss_mb("server")?.max(place.rss_mb("caller")?);
    figures.push(figure("idle sidecar, RSS", idle, "MB", 15.0));

    let mut streams = Vec::with_capacity(STREAMS);
    for _ in 0..STREAMS {
        streams.push(TcpStream::connect(entry)?);
    }
    tokio::time::sleep(SETTLE).await;
    let with_streams = place.rss_mb("server")?.max(place.rss_mb("caller")?);
    figures.push(figure(format!("sidecar with {STREAMS} open streams, RSS"), with_streams, "MB", 60.0));
    drop(streams);

    let clients = Clients::join(&place).await?;
    let backend = clients.backend().await?;
    let (open, failed) = clients.dial(args.clients, &backend).await?;
    eprintln!("{} connections stand, {failed} dials failed", open.len());
    tokio::time::sleep(SETTLE).await;
    ensure!(open.iter().all(|c| !c.is_closed()), "connections ended by themselves");
    let loaded = place.rss_mb("server")?;
    figures.push(figure(format!("sidecar with {} client connections, RSS", open.len()), loaded, "MB", 250.0));
    drop(open);

    if let Some(mut killed) = place.processes.remove("server") {
        killed.kill()?;
    }
    let restarted = Instant::now();
    server(&mut place)?;
    let backend = clients.backend().await?;
    let (open, failed) = clients.dial(args.clients, &backend).await?;
    let back = restarted.elapsed().as_secs_f64();
    eprintln!("{} connections stand again, {failed} dials failed", open.len());
    figures.push(figure(format!("{} connections after the sidecar's restart", open.len()), back, "s", 8.0));
    Ok(figures)
}
