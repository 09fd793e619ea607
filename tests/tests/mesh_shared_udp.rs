//! UDP through one sidecar process for applications that have none: each caller has the identity of its address, one that
//! is nobody's gets nothing, and a flow ends when its address becomes another's.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use tombolo_tests::capability::require_netns;
use tombolo_tests::datagrams::{Caller, Echo};
use tombolo_tests::mesh::{Layout, Mesh};
use tombolo_tests::scenario::{export, metric, only};

const PATIENCE: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_secs(1);
/// Where the front and the callers are in east.
const FRONT: u8 = 30;
const CART: u8 = 31;
const DB: u8 = 32;
const NOBODY: u8 = 34;

struct Site {
    mesh: Mesh,
    _echo: Echo,
}

impl Site {
    /// West serves `shop/echo` over UDP; a shared sidecar in east carries `cart` and `db`.
    fn start() -> Result<Self> {
        let mut mesh = Mesh::start(&Layout { gateways: 1, ..Layout::default() })?;
        let at = mesh.cluster("west")?.address(21, 7007);
        let echo = Echo::start(&mesh.cluster("west")?.namespace, at, "west")?;
        mesh.sidecar("west", "server", &["--service".to_owned(), format!("shop/echo:7/udp={at}")])?;
        mesh.apply("west", &export("echo"))?;
        for name in ["cart", "db"] {
            mesh.token("east", "sidecar", name)?;
        }
        let mut site = Self { mesh, _echo: echo };
        site.configure([("cart", CART), ("db", DB)])?;
        let file = site.mesh.path("east/shared.yaml").display().to_string();
        let admin = site.at(FRONT, 7445)?.to_string();
        let spec =
            site.mesh.spec("east", "shared", &["sidecar", "shared", "--config", &file, "--admin", &admin])?;
        site.mesh.spawn("east/shared", spec)?;
        site.mesh.ready("east", FRONT, "shared")?;
        Ok(site)
    }

    fn at(&self, host: u8, port: u16) -> Result<SocketAddr> {
        Ok(self.mesh.cluster("east")?.address(host, port))
    }

    /// Who calls from where. Overlay sockets stay where they are.
    fn configure(&self, sources: [(&str, u8); 2]) -> Result<()> {
        let echo = self.at(FRONT, 9007)?;
        let mut text =
            format!("upstreams: [ 'shop/echo:7/udp={echo}', 'shop/echo:7={echo}' ]\napplications:\n");
        for ((name, host), own) in sources.into_iter().zip([CART, DB]) {
            let (from, bind) = (self.at(host, 0)?.ip(), self.at(own, 7442)?);
            let (state, token) =
                (self.mesh.state("east", name), self.mesh.path(&format!("east/{name}.token")));
            text += &format!(
                "- sources: [ {from} ]\n  sidecar: {{ name: {name}, bind: '{bind}', announce: '{bind}', stateDir: {}, joinTokenFile: {} }}\n",
                state.display(),
                token.display()
            );
        }
        Ok(std::fs::write(self.mesh.path("east/shared.yaml"), text)?)
    }

    fn caller(&self, host: u8) -> Result<Caller> {
        let from: IpAddr = self.at(host, 0)?.ip();
        Caller::from(&self.mesh.cluster("east")?.namespace, from, self.at(FRONT, 9007)?)
    }

    fn front_counts(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(metric(&self.mesh.metrics("east", FRONT)?, name, labels))
    }

    fn becomes(&self, what: &str, check: impl Fn() -> Result<()>) -> Result<()> {
        let took = self.mesh.eventually(what, PATIENCE, |_| check())?;
        println!("{what} after {took:?}");
        Ok(())
    }
}

#[test]
fn datagrams_have_the_identity_of_their_address_and_lose_it_with_the_address() -> Result<()> {
    let test = "datagrams_have_the_identity_of_their_address_and_lose_it_with_the_address";
    let Some(_) = require_netns(test) else { return Ok(()) };
    let site = Site::start()?;
    let (cart, db, nobody) = (site.caller(CART)?, site.caller(DB)?, site.caller(NOBODY)?);
    for (name, caller) in [("cart", &cart), ("db", &db)] {
        let (who, took) = caller.ask_until(b"hello", PATIENCE)?;
        ensure!(who == "west", "{who}");
        println!("{name} is answered after {took:?}");
    }
    // Large ones take the flow's stream.
    ensure!(cart.ask(&[7; 20_000], PATIENCE)? == "west");
    // From an address that is nobody's: dropped, and counted.
    ensure!(nobody.ask(b"and me?", SOON).is_err(), "a stranger was given an identity");
    ensure!(site.front_counts("tombolo_sidecar_shared_calls_total", &["result=\"unknown_caller\""])? >= 1.0);
    ensure!(site.front_counts("tombolo_sidecar_udp_dropped_total", &["reason=\"unknown_caller\""])? >= 1.0);
    // What each sidecar says of itself is told apart.
    for name in ["cart", "db"] {
        let label = format!("application=\"{name}\"");
        site.becomes("each is connected on its own", || {
            ensure!(site.front_counts("tombolo_sidecar_control_connected", &[&label])? == 1.0, "{label}");
            Ok(())
        })?;
    }

    // Each under its own name: west lets cart in, not db; an open flow is cut.
    site.mesh.apply("west", &only("cart"))?;
    site.becomes("db is refused", || {
        ensure!(db.ask(b"still?", SOON).is_err(), "a policy for cart lets db in");
        Ok(())
    })?;
    ensure!(cart.ask_until(b"still", PATIENCE)?.0 == "west");

    // Cart's address becomes the db's, and the open flow is cart's no more.
    site.configure([("cart", NOBODY), ("db", CART)])?;
    site.becomes("the address is the db's, which is refused", || {
        ensure!(cart.ask(b"who am I?", SOON).is_err(), "the flow keeps the identity of before");
        Ok(())
    })?;
    let ended =
        site.front_counts("tombolo_sidecar_streams_ended_total", &["outbound", "reason=\"other_caller\""])?;
    ensure!(ended >= 1.0, "{ended}");
    site.becomes("who was nobody is cart now", || {
        ensure!(nobody.ask(b"and now?", SOON)? == "west");
        Ok(())
    })?;
    site.mesh.apply("west", &only("db"))?;
    site.becomes("the db is answered at its new address", || {
        ensure!(cart.ask(b"hello again", SOON)? == "west");
        Ok(())
    })
}
