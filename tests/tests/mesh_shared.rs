//! One sidecar process for applications that have none: each called and calling under its own identity, told apart by
//! address, taken over and let go while the others run.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::mesh::{Layout, Mesh, connect_from, http_get, http_get_from};
use tombolo_tests::scenario::{application, entry, export, flag, metric, only};
use tombolo_tests::traffic::StreamServer;

const PATIENCE: Duration = Duration::from_secs(15);
/// Where the front and the applications are in east.
const FRONT: u8 = 30;
const CART: u8 = 31;
const DB: u8 = 32;
const LATE: u8 = 33;
const NOBODY: u8 = 34;

struct Site {
    mesh: Mesh,
    _stream: StreamServer,
}

impl Site {
    /// `web` and `stream` in west, an application without a sidecar in east.
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let (app, stream) =
            (mesh.cluster("west")?.address(21, 8080), mesh.cluster("west")?.address(21, 9000));
        let server = StreamServer::start(&mesh.cluster("west")?.namespace, stream)?;
        application(&mut mesh, "west", "app", app, "west")?;
        let flags = [flag("--service", "web", 80, app), flag("--service", "stream", 9000, stream)].concat();
        mesh.sidecar("west", "web", &flags)?;
        mesh.apply("west", &(export("web") + &export("stream")))?;
        let db = mesh.cluster("east")?.address(DB, 8080);
        application(&mut mesh, "east", "db-app", db, "the db of east")?;
        Ok(Self { mesh, _stream: server })
    }

    fn at(&self, host: u8, port: u16) -> Result<SocketAddr> {
        Ok(self.mesh.cluster("east")?.address(host, port))
    }

    fn from(&self, host: u8) -> Result<IpAddr> {
        Ok(self.at(host, 0)?.ip())
    }

    fn application(&self, name: &str, host: u8, more: &str) -> Result<String> {
        let (from, bind, state) = (self.from(host)?, self.at(host, 7442)?, self.mesh.state("east", name));
        let token = self.mesh.path(&format!("east/{name}.token"));
        Ok(format!(
            "- sources: [ {from} ]
  sidecar:
    {{ name: {name}, bind: '{bind}', announce: '{bind}', stateDir: {}, joinTokenFile: {}, drain: 10s{more} }}
",
            state.display(),
            token.display()
        ))
    }

    /// Writes the file with these applications.
    fn configure(&self, applications: &[String]) -> Result<()> {
        let (web, stream) = (self.at(FRONT, 9080)?, self.at(FRONT, 9090)?);
        let upstreams = format!("upstreams: [ 'shop/web:80={web}', 'shop/stream:9000={stream}' ]\n");
        let text = format!("{upstreams}applications:\n{}", applications.concat());
        Ok(std::fs::write(self.mesh.path("east/shared.yaml"), text)?)
    }

    /// Starts the shared sidecar.
    fn run(&mut self) -> Result<()> {
        let file = self.mesh.path("east/shared.yaml").display().to_string();
        let admin = self.at(FRONT, 7445)?.to_string();
        let args = ["sidecar", "shared", "--config", &file, "--admin", &admin];
        let spec = self.mesh.spec("east", "shared", &args)?;
        self.mesh.spawn("east/shared", spec)?;
        self.mesh.ready("east", FRONT, "shared")
    }

    /// What east's application at `host` gets from the front.
    fn called(&self, host: u8) -> Result<String> {
        let front = self.at(FRONT, 9080)?;
        let answer = http_get_from(&self.mesh.cluster("east")?.namespace, self.from(host)?, front, "/")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(answer.lines().last().unwrap_or_default().to_owned())
    }

    fn becomes(&self, what: &str, check: impl Fn(&Self) -> Result<()>) -> Result<()> {
        let took = self.mesh.eventually(what, PATIENCE, |_| check(self))?;
        println!("{what} after {took:?}");
        Ok(())
    }

    fn up(&self, name: &str) -> Result<f64> {
        let metrics = self.mesh.metrics("east", FRONT)?;
        let label = format!("application=\"{name}\"");
        Ok(metric(&metrics, "tombolo_sidecar_shared_application_up", &[&label]))
    }
}

fn echoed(stream: &mut TcpStream, text: &[u8]) -> Result<()> {
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == text, "the echo differs");
    Ok(())
}

#[test]
fn applications_without_a_sidecar_have_an_identity_each_and_come_and_go_without_disturbing_others()
-> Result<()> {
    let test =
        "applications_without_a_sidecar_have_an_identity_each_and_come_and_go_without_disturbing_others";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    for name in ["cart", "db", "late"] {
        site.mesh.token("east", "sidecar", name)?;
    }
    let cart = site.application("cart", CART, "")?;
    let served = site.at(DB, 8080)?;
    let db = site.application("db", DB, &format!(", services: [ 'shop/db:80={served}' ]"))?;
    // Its token is not there: it can't start, and nobody else cares.
    let broken =
        site.application("broken", NOBODY, "")?.replace(&site.from(NOBODY)?.to_string(), "10.61.0.35");
    site.configure(&[cart.clone(), db.clone(), broken])?;
    site.run()?;
    ensure!(site.up("cart")? == 1.0 && site.up("db")? == 1.0 && site.up("broken")? == 0.0);
    site.mesh.token("east", "sidecar", "broken")?;
    site.becomes("with its token it starts by itself", |site| {
        ensure!(site.up("broken")? == 1.0, "not yet");
        Ok(())
    })?;

    site.becomes("cart is answered", |site| {
        ensure!(site.called(CART)?.contains("west"));
        Ok(())
    })?;
    // Each under its own name: west lets cart in, not db.
    site.mesh.apply("west", &only("cart"))?;
    site.becomes("db is refused", |site| {
        ensure!(site.called(DB).is_err(), "a policy for cart lets db in");
        Ok(())
    })?;
    ensure!(site.called(CART)?.contains("west"));
    // From an address that is nobody's: reset, and counted.
    ensure!(site.called(NOBODY).is_err(), "a stranger was given an identity");
    let counted = metric(
        &site.mesh.metrics("east", FRONT)?,
        "tombolo_sidecar_shared_calls_total",
        &["result=\"unknown_caller\""],
    );
    ensure!(counted >= 1.0, "{counted}");

    // Served where it has no sidecar, to callers of another cluster.
    site.mesh.apply("east", &export("db"))?;
    let west = site.mesh.cluster("west")?.address(25, 9080);
    site.mesh.sidecar("west", "caller", &flag("--upstream", "db", 80, west))?;
    site.becomes("the db is served", |site| {
        let answer = http_get(&site.mesh.cluster("west")?.namespace, west, "/")?;
        ensure!(answer.contains("the db of east"), "{answer}");
        Ok(())
    })?;

    // One goes, another comes.
    let late = site.application("late", LATE, "")?;
    site.configure(&[cart.clone(), late])?;
    site.mesh.apply("west", &only("late"))?;
    site.becomes("the late one is answered", |site| {
        ensure!(site.called(LATE)?.contains("west"));
        Ok(())
    })?;
    site.becomes("the db is gone", |site| {
        let status = site.mesh.status("east")?;
        let db = entry(&status, "exports", "service", "shop/db")?;
        ensure!(db["healthy"] == 0 && site.called(DB).is_err(), "{db}");
        Ok(())
    })?;
    site.mesh.apply("west", &only("cart"))?;
    site.becomes("cart is answered again", |site| {
        ensure!(site.called(CART)?.contains("west"));
        Ok(())
    })?;

    // Nonsense is refused and named; what runs goes on.
    std::fs::write(site.mesh.path("east/shared.yaml"), "applications: [ { sidecar: { nmae: cart } } ]")?;
    site.becomes("the nonsense is named", |site| {
        let log = site.mesh.process("east/shared")?.log();
        ensure!(log.contains("nmae") && log.contains("the last one stays"), "{log}");
        Ok(())
    })?;
    ensure!(site.called(CART)?.contains("west"));

    site.mesh.process_mut("east/shared")?.stop()?;
    site.configure(&[cart])?;
    site.mesh.restart("east/shared")?;
    site.mesh.ready("east", FRONT, "shared")?;
    site.becomes("after a restart cart is answered", |site| {
        ensure!(site.called(CART)?.contains("west"));
        Ok(())
    })
}

#[test]
fn connections_outlive_the_coming_and_going_of_other_applications_and_have_the_drain_of_their_own()
-> Result<()> {
    let test =
        "connections_outlive_the_coming_and_going_of_other_applications_and_have_the_drain_of_their_own";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let mut site = Site::start()?;
    for name in ["cart", "db", "late"] {
        site.mesh.token("east", "sidecar", name)?;
    }
    let (cart, db, late) = (
        site.application("cart", CART, "")?,
        site.application("db", DB, "")?,
        site.application("late", LATE, "")?,
    );
    site.configure(&[cart.clone(), db])?;
    site.run()?;
    site.becomes("cart is answered", |site| site.called(CART).map(drop))?;
    let stream = site.at(FRONT, 9090)?;
    let mut open = Vec::new();
    for host in [CART, DB] {
        let mut stream = connect_from(&site.mesh.cluster("east")?.namespace, site.from(host)?, stream)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"e")?;
        echoed(&mut stream, b"before")?;
        open.push(stream);
    }
    site.configure(&[cart, late])?;
    site.becomes("the late one is answered", |site| site.called(LATE).map(drop))?;
    site.becomes("the db takes no more calls", |site| {
        ensure!(site.called(DB).is_err(), "it still does");
        Ok(())
    })?;
    // The one that goes has its drain time.
    open.iter_mut().try_for_each(|stream| echoed(stream, b"after"))
}
