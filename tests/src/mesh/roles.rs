//! How each role is started: its command line, addresses and token.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::{Cluster, Mesh, text};
use crate::netns::{Namespace, VethEnd, veth};
use crate::process::ProcessSpec;
use crate::{balancer, nat};

/// What only scenario tests set: shifts a role's clock.
const CLOCK_OFFSET: &str = "TOMBOLO_CLOCK_OFFSET_SECONDS";
/// Machines outside have one clock.
const OUTSIDE: &str = "outside";

impl Mesh {
    /// `tombolo` with arguments in a cluster's namespace, by the cluster's clock; not started yet.
    pub fn spec(&self, cluster: &str, name: &str, args: &[&str]) -> Result<ProcessSpec> {
        let cluster = self.cluster(cluster)?;
        Ok(ProcessSpec::new(format!("{}-{name}", cluster.name), &self.bin)
            .args(args)
            .env(CLOCK_OFFSET, self.clock_env(&cluster.name))
            .within(&cluster.namespace))
    }

    /// Ends every process and moves every clock on by so many seconds, as a holiday does: nothing runs meanwhile.
    pub fn sleep(&mut self, seconds: i64) -> Result<()> {
        for process in self.processes.values_mut() {
            process.stop()?;
        }
        self.pass(seconds)
    }

    /// Moves every clock on by so many seconds, under whatever runs. Only what goes by the wall clock sees it: what waits,
    /// and quinn, go by the machine's.
    pub fn pass(&mut self, seconds: i64) -> Result<()> {
        self.passed += seconds;
        self.set_clocks()
    }

    /// Processes look at these files all the time.
    pub(super) fn set_clocks(&self) -> Result<()> {
        let clocks = self.clusters.values().map(|cluster| (cluster.name.as_str(), cluster.clock_off));
        for (name, off) in clocks.chain([(OUTSIDE, 0)]) {
            std::fs::write(self.clock(name), (off + self.passed).to_string())?;
        }
        Ok(())
    }

    fn clock(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.clock"))
    }

    fn clock_env(&self, name: &str) -> String {
        format!("@{}", text(&self.clock(name)))
    }

    fn role(&mut self, cluster: &str, name: &str, args: &[&str]) -> Result<()> {
        let spec = self.spec(cluster, name, args)?;
        self.spawn(&format!("{cluster}/{name}"), spec)
    }

    pub(super) fn federator(&mut self, cluster: &str) -> Result<()> {
        self.federator_with(cluster, &[])
    }

    /// A federator with more arguments, in the place of the one that runs.
    pub fn federator_with(&mut self, cluster: &str, more: &[&str]) -> Result<()> {
        if let Ok(running) = self.process_mut(&format!("{cluster}/federator")) {
            running.stop()?;
        }
        let spec = self.federator_spec(cluster, more)?;
        self.spawn(&format!("{cluster}/federator"), spec)?;
        self.ready(cluster, 1, "federator")
    }

    /// A federator with more arguments; not started yet.
    pub fn federator_spec(&self, cluster: &str, more: &[&str]) -> Result<ProcessSpec> {
        let c = self.cluster(cluster)?;
        let (listen, admin) = (c.address(1, 7443).to_string(), c.address(1, 7445).to_string());
        let trust = text(&self.path(&format!("{cluster}/trust")));
        let (state, socket) = (text(&self.state(cluster, "federator")), self.socket(cluster));
        let args = ["federator", "--cluster", cluster, "--trust-dir", &trust, "--state-dir", &state];
        let args = [&args[..], &["--listen", &listen, "--admin", &admin, "--socket", &socket], more].concat();
        self.spec(cluster, "federator", &args)
    }

    /// Where a role of a cluster keeps its state.
    pub fn state(&self, cluster: &str, name: &str) -> PathBuf {
        self.path(&format!("{cluster}/state/{name}"))
    }

    /// A file with a join token.
    pub fn token(&self, cluster: &str, role: &str, name: &str) -> Result<PathBuf> {
        let args: Vec<&str> = match role {
            "vm" => vec!["vm", "token", name],
            role => vec!["token", "create", "--role", role, "--name", name, "-n", "shop"],
        };
        let path = self.path(&format!("{cluster}/{name}.token"));
        std::fs::write(&path, self.operate(cluster, &args)?)?;
        Ok(path)
    }

    /// A further gateway replica.
    pub fn gateway(&mut self, cluster: &str, name: &str) -> Result<()> {
        let token = text(&self.token(cluster, "gateway", name)?);
        let host = 11 + u8::try_from(self.cluster(cluster)?.gateways.len())?;
        let c = self.cluster(cluster)?;
        let [border, inner, admin] = [7440, 7441, 7445].map(|port| c.address(host, port).to_string());
        let state = text(&self.state(cluster, name));
        let args = ["gateway", "--name", name, "--join-token-file", &token, "--state-dir", &state];
        let args = [&args[..], &["--border", &border, "--inner", &inner, "--admin", &admin]].concat();
        // One zone per replica: sidecars that name none use all of them.
        let zone = format!("zone-of-{name}");
        let args = [&args[..], &["--zone", &zone]].concat();
        let front = c.balancer().to_string();
        let balanced = if c.balanced { vec!["--advertise-border", &front, "--balanced"] } else { Vec::new() };
        self.role(cluster, name, &[args, balanced].concat())?;
        let cluster = self.clusters.get_mut(cluster).context("no such cluster")?;
        cluster.gateways.push(name.into());
        if cluster.balanced { balance(cluster) } else { Ok(()) }
    }

    pub fn link_clusters(&mut self, inviter: &str, joiner: &str) -> Result<()> {
        let token = self.operate(inviter, &["link", "token", joiner])?;
        let socket = self.socket(joiner);
        self.tombolo_with(&["--socket", &socket, "link", "join", "-"], &token)?;
        Ok(())
    }

    /// A sidecar with extra arguments; returns its host number. It is `sa/<name>` of the namespace `shop`.
    pub fn sidecar(&mut self, cluster: &str, name: &str, extra: &[String]) -> Result<u8> {
        let token = text(&self.token(cluster, "sidecar", name)?);
        let entry = self.clusters.get_mut(cluster).context("no such cluster")?;
        let host = 21 + entry.sidecars;
        entry.sidecars += 1;
        let (overlay, admin) = (entry.address(host, 7442).to_string(), entry.address(host, 7445).to_string());
        let state = text(&self.state(cluster, name));
        let args = ["sidecar", "--name", name, "--join-token-file", &token, "--state-dir", &state];
        let args = [&args[..], &["--bind", &overlay, "--announce", &overlay, "--admin", &admin]].concat();
        let threads = self.threads.to_string();
        let args = [&args[..], &["--threads", &threads]].concat();
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        self.role(cluster, name, &[&args[..], &extra].concat())?;
        self.ready(cluster, host, name)?;
        Ok(host)
    }

    /// The next sidecar gets the host after the next: something else is there.
    pub fn skip_host(&mut self, cluster: &str) -> Result<()> {
        self.clusters.get_mut(cluster).context("no such cluster")?.sidecars += 1;
        Ok(())
    }

    /// A machine behind a masquerading router, attached to `cluster`'s network and to nothing else: `outside(n)` is the
    /// machine, `outside(n + 1)` its router, whose addresses are `10.99.0.2` and, spare, `10.99.0.6`.
    pub fn machine(&mut self, cluster: &str, name: &str, extra: &[String]) -> Result<usize> {
        let token = text(&self.token(cluster, "vm", name)?);
        let index = self.bare_machine(cluster)?;
        let state = text(&self.state("vm", name));
        let args = ["sidecar", "--name", name, "--join-token-file", &token, "--state-dir", &state];
        // No address that anybody could send to first: it registers with the gateways.
        let args = [&args[..], &["--bind", "0.0.0.0:7442", "--admin", "127.0.0.1:7445"]].concat();
        let threads = self.threads.to_string();
        let args = [&args[..], &["--threads", &threads]].concat();
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        let spec = ProcessSpec::new(name, &self.bin)
            .args([&args[..], &extra].concat())
            .env(CLOCK_OFFSET, self.clock_env(OUTSIDE))
            .within(self.outside(index)?);
        self.spawn(&format!("vm/{name}"), spec)?;
        self.machine_ready(index, name)?;
        Ok(index)
    }

    /// The same without a sidecar.
    pub fn bare_machine(&mut self, cluster: &str) -> Result<usize> {
        let (router, machine) = (Namespace::create("router")?, Namespace::create("machine")?);
        let c = self.cluster(cluster)?;
        veth(
            VethEnd { namespace: &router, device: "outside", address: "10.99.0.2/29" },
            VethEnd { namespace: &c.namespace, device: "isp", address: "10.99.0.1/29" },
            1500,
        )?;
        veth(
            VethEnd { namespace: &machine, device: "eth0", address: "192.168.77.2/24" },
            VethEnd { namespace: &router, device: "inside", address: "192.168.77.1/24" },
            1500,
        )?;
        router.add_route("default", "10.99.0.1".parse()?)?;
        machine.add_route("default", "192.168.77.1".parse()?)?;
        nat::masquerade(&router, "inside", "outside")?;
        self.outside.push(machine);
        self.outside.push(router);
        Ok(self.outside.len() - 2)
    }

    /// Waits for `/ready` of a machine's sidecar.
    pub fn machine_ready(&self, machine: usize, name: &str) -> Result<()> {
        self.wait_ready(self.outside(machine)?, "127.0.0.1:7445".parse()?, &format!("vm/{name}"))
    }
}

/// The balancer is the kernel's NAT on the way in: gateways see callers' addresses, callers see the balancer's.
fn balance(cluster: &Cluster) -> Result<()> {
    let backends: Vec<_> = (11..)
        .zip(&cluster.gateways)
        .map(|(host, _)| std::net::Ipv4Addr::new(10, cluster.net, 0, host))
        .collect();
    balancer::sticky(&cluster.namespace, cluster.balancer(), &backends)
}
