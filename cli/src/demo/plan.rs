//! The demo as data: every command and process with its arguments, in order. Pure, so that tests and the scenario
//! harness can read and vary it.
//!
//! Addresses, with `P` the loopback prefix (127.0 by default): east is P.1.x, west P.2.x, the machine outside P.3.x;
//! x is 1 for the federator, 11 and 12 for gateways, 21 for `web`, 22 for `client`. Ports are the product's defaults.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// The service of the demo.
pub const SERVICE: &str = "shop/web";
const HEALTH: &str = "shop/web=http:/healthz";
pub const NAMESPACE: &str = "shop";
pub const TRUST_DOMAIN: &str = "demo.example";
pub const CLUSTERS: [&str; 2] = ["east", "west"];
pub const GATEWAYS: [&str; 2] = ["gw-1", "gw-2"];
/// The machine outside, a member of west.
pub const VM: &str = "vm-1";

const BORDER_PORT: u16 = 7440;
const INNER_PORT: u16 = 7441;
const SIDECAR_PORT: u16 = 7442;
const FEDERATOR_PORT: u16 = 7443;
const ADMIN_PORT: u16 = 7445;
/// On the wildcard address, as a machine behind NAT binds: a port that no other process of the demo has, nor another demo
/// on another loopback prefix, whose second octet is added.
const VM_PORT: u16 = 17449;
const APP_PORT: u16 = 8080;
/// Where the caller's sidecar of each cluster offers `shop/web` to its application.
const UPSTREAM_PORT: u16 = 9080;

/// A long-running process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Unique, such as `west/gw-1`.
    pub name: String,
    pub args: Vec<String>,
    /// Answers `/ready`.
    pub ready: SocketAddr,
    pub log: PathBuf,
}

/// One step on the way up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A command that runs to its end.
    Run {
        what: String,
        args: Vec<String>,
        stdin: Option<PathBuf>,
        stdout: Option<PathBuf>,
    },
    /// Writes a manifest that a later command applies.
    Write {
        path: PathBuf,
        text: String,
    },
    Start(Process),
    /// Waits until the named processes are ready.
    Ready {
        what: String,
        names: Vec<String>,
    },
}

/// Everything that the demo does, and where to find it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub root: PathBuf,
    pub prefix: [u8; 2],
    pub steps: Vec<Step>,
}

impl Plan {
    pub fn new(root: &Path, prefix: [u8; 2]) -> Self {
        let mut plan = Self { root: root.to_owned(), prefix, steps: Vec::new() };
        plan.trust();
        CLUSTERS.iter().for_each(|cluster| plan.control_plane(cluster));
        CLUSTERS.iter().for_each(|cluster| plan.gateways(cluster));
        plan.link();
        CLUSTERS.iter().for_each(|cluster| plan.workloads(cluster));
        plan.machine();
        CLUSTERS.iter().for_each(|cluster| plan.objects(cluster));
        plan.all_ready();
        plan
    }

    pub fn processes(&self) -> impl Iterator<Item = &Process> {
        self.steps.iter().filter_map(|step| match step {
            Step::Start(process) => Some(process),
            _ => None,
        })
    }

    pub fn process(&self, name: &str) -> Option<&Process> {
        self.processes().find(|process| process.name == name)
    }

    /// The federator's socket for operators.
    pub fn socket(&self, cluster: &str) -> PathBuf {
        self.root.join(cluster).join("admin.sock")
    }

    /// Where the caller of a cluster reaches `shop/web`.
    pub fn upstream(&self, cluster: &str) -> SocketAddr {
        self.address(site(cluster), 22, UPSTREAM_PORT)
    }

    fn address(&self, site: u8, host: u8, port: u16) -> SocketAddr {
        let [a, b] = self.prefix;
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, site, host)), port)
    }

    fn run<'a>(
        &mut self,
        what: &str,
        args: impl IntoIterator<Item = &'a str>,
        stdin: Option<PathBuf>,
        stdout: Option<PathBuf>,
    ) {
        let args = args.into_iter().map(str::to_owned).collect();
        self.steps.push(Step::Run { what: what.to_owned(), args, stdin, stdout });
    }

    fn start(&mut self, name: &str, ready: SocketAddr, args: Vec<String>) {
        let log = self.root.join("logs").join(format!("{}.log", name.replace('/', "-")));
        self.steps.push(Step::Start(Process { name: name.to_owned(), args, ready, log }));
    }

    fn trust(&mut self) {
        let root = text(&self.root.join("trust"));
        let init = ["trust", "init", "--no-encrypt", "--trust-domain", TRUST_DOMAIN, "--dir", &root];
        self.run("trust root", init, None, None);
        for cluster in CLUSTERS {
            let out = text(&self.trust_dir(cluster));
            let what = format!("intermediate of {cluster}");
            self.run(&what, ["trust", "cluster", cluster, "--dir", &root, "--out", &out], None, None);
        }
    }

    fn trust_dir(&self, cluster: &str) -> PathBuf {
        self.root.join(cluster).join("trust")
    }

    fn state_dir(&self, place: &str, name: &str) -> String {
        text(&self.root.join(place).join("state").join(name))
    }

    fn control_plane(&mut self, cluster: &str) {
        let ready = self.address(site(cluster), 1, ADMIN_PORT);
        let name = format!("{cluster}/federator");
        let args = arguments(&[
            ("federator", ""),
            ("--cluster", cluster),
            ("--trust-dir", &text(&self.trust_dir(cluster))),
            ("--state-dir", &self.state_dir(cluster, "federator")),
            ("--listen", &self.address(site(cluster), 1, FEDERATOR_PORT).to_string()),
            ("--admin", &ready.to_string()),
            ("--socket", &text(&self.socket(cluster))),
        ]);
        self.start(&name, ready, args);
        self.steps.push(Step::Ready { what: format!("federator of {cluster}"), names: vec![name] });
    }

    /// A join token in a file of its own: it never shows in a process list.
    fn join_token(&mut self, cluster: &str, role: &str, name: &str) -> PathBuf {
        let path = self.root.join(cluster).join(format!("{role}-{name}.token"));
        let socket = text(&self.socket(cluster));
        let what = format!("join token of {cluster}/{name}");
        let args = ["--socket", &socket, "token", "create", "--role", role, "--name", name, "-n", NAMESPACE];
        self.run(&what, args, None, Some(path.clone()));
        path
    }

    fn gateways(&mut self, cluster: &str) {
        let mut names = Vec::new();
        for (name, host) in GATEWAYS.iter().zip([11, 12]) {
            let token = self.join_token(cluster, "gateway", name);
            let ready = self.address(site(cluster), host, ADMIN_PORT);
            let args = arguments(&[
                ("gateway", ""),
                ("--name", name),
                ("--join-token-file", &text(&token)),
                ("--state-dir", &self.state_dir(cluster, name)),
                ("--border", &self.address(site(cluster), host, BORDER_PORT).to_string()),
                ("--inner", &self.address(site(cluster), host, INNER_PORT).to_string()),
                ("--admin", &ready.to_string()),
            ]);
            names.push(format!("{cluster}/{name}"));
            self.start(&format!("{cluster}/{name}"), ready, args);
        }
        self.steps.push(Step::Ready { what: format!("gateways of {cluster}"), names });
    }

    fn link(&mut self) {
        let token = self.root.join("link.token");
        let (east, west) = (text(&self.socket("east")), text(&self.socket("west")));
        self.run(
            "link token of east",
            ["--socket", &east, "link", "token", "west"],
            None,
            Some(token.clone()),
        );
        self.run("link east and west", ["--socket", &west, "link", "join", "-"], Some(token), None);
    }

    fn app(&mut self, name: &str, answers_as: &str, listen: SocketAddr) {
        let listen_text = listen.to_string();
        let args = arguments(&[("demo-app", ""), ("--listen", &listen_text), ("--name", answers_as)]);
        self.start(name, listen, args);
    }

    fn workloads(&mut self, cluster: &str) {
        let app = self.address(site(cluster), 21, APP_PORT);
        self.app(&format!("{cluster}/web-app"), cluster, app);
        let serves = format!("{SERVICE}:80={app}");
        self.sidecar(cluster, "web", 21, &["--service", &serves, "--health", HEALTH]);
        let calls = format!("{SERVICE}:80={}", self.upstream(cluster));
        self.sidecar(cluster, "client", 22, &["--upstream", &calls]);
    }

    fn sidecar(&mut self, cluster: &str, name: &str, host: u8, does: &[&str]) {
        let token = self.join_token(cluster, "sidecar", name);
        let ready = self.address(site(cluster), host, ADMIN_PORT);
        let overlay = self.address(site(cluster), host, SIDECAR_PORT);
        let mut args = arguments(&[
            ("sidecar", ""),
            ("--name", name),
            ("--join-token-file", &text(&token)),
            ("--state-dir", &self.state_dir(cluster, name)),
            ("--bind", &overlay.to_string()),
            ("--announce", &overlay.to_string()),
            ("--admin", &ready.to_string()),
        ]);
        args.extend(does.iter().map(|argument| (*argument).to_owned()));
        self.start(&format!("{cluster}/{name}"), ready, args);
    }

    /// The machine outside: a member of west, reached through west's gateways only.
    fn machine(&mut self) {
        let token = self.root.join("vm.token");
        let socket = text(&self.socket("west"));
        self.run(
            "join token of the machine",
            ["--socket", &socket, "vm", "token", VM],
            None,
            Some(token.clone()),
        );
        let app = self.address(3, 21, APP_PORT);
        self.app("vm/web-app", "vm", app);
        let ready = self.address(3, 21, ADMIN_PORT);
        let args = arguments(&[
            ("sidecar", ""),
            ("--name", VM),
            ("--join-token-file", &text(&token)),
            ("--state-dir", &self.state_dir("vm", "sidecar")),
            // No address of its own that anybody could send to first: it registers with the gateways.
            ("--bind", &format!("0.0.0.0:{}", VM_PORT + u16::from(self.prefix[1]))),
            ("--admin", &ready.to_string()),
            ("--service", &format!("{SERVICE}:80={app}")),
            ("--health", HEALTH),
        ]);
        self.start("vm/sidecar", ready, args);
    }

    fn objects(&mut self, cluster: &str) {
        let path = self.root.join(cluster).join("objects.yaml");
        self.steps.push(Step::Write { path: path.clone(), text: manifest(cluster) });
        let socket = text(&self.socket(cluster));
        self.run(
            &format!("exports and policy of {cluster}"),
            ["--socket", &socket, "apply", "-f", &text(&path)],
            None,
            None,
        );
    }

    fn all_ready(&mut self) {
        let names = self.processes().map(|process| process.name.clone()).collect();
        self.steps.push(Step::Ready { what: "workloads".to_owned(), names });
    }
}

/// What each cluster's operator applies: `web` is offered to the other side; callers in east prefer west, and fall back
/// on their own.
fn manifest(cluster: &str) -> String {
    let peer = if cluster == "east" { "west" } else { "east" };
    let mut text = format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata:
  name: web
  namespace: {NAMESPACE}
  annotations: {{ tombolo.dev/export-to: {peer} }}
"
    );
    if cluster == "east" {
        text.push_str(&format!(
            "---
apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: {{ name: web, namespace: {NAMESPACE} }}
spec:
  targetRef: {{ kind: ServiceImport, name: web }}
  tiers:
    - {{ clusters: [ west ] }}
    - {{ clusters: [ \"@self\" ] }}
  failover: {{ whenHealthyBelow: 50%, for: 500ms }}
  failback: {{ whenHealthyAbove: 80%, for: 3s }}
"
        ));
    }
    text
}

fn site(cluster: &str) -> u8 {
    if cluster == "east" { 1 } else { 2 }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Flags and values; an empty value is a flag alone.
fn arguments(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs
        .iter()
        .flat_map(|(flag, value)| [*flag, *value])
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    fn plan() -> Plan {
        Plan::new(Path::new("/state/demo"), [127, 0])
    }

    #[test]
    fn every_command_of_the_demo_is_one_that_can_be_typed() {
        let plan = plan();
        let mut parsed = 0;
        for step in &plan.steps {
            let args = match step {
                Step::Run { args, .. } => args,
                Step::Start(process) => &process.args,
                Step::Write { .. } | Step::Ready { .. } => continue,
            };
            let line = std::iter::once("tombolo").chain(args.iter().map(String::as_str));
            Cli::try_parse_from(line).unwrap_or_else(|e| panic!("{args:?}: {e}"));
            parsed += 1;
        }
        assert!(parsed >= 25, "only {parsed} commands");
    }

    #[test]
    fn the_cast_is_complete() {
        let plan = plan();
        let names: HashSet<_> = plan.processes().map(|p| p.name.as_str()).collect();
        for name in [
            "east/federator",
            "west/federator",
            "east/gw-1",
            "west/gw-2",
            "east/client",
            "west/web",
            "vm/sidecar",
            "vm/web-app",
        ] {
            assert!(names.contains(name), "{name} is missing from {names:?}");
        }
        assert_eq!(names.len(), plan.processes().count(), "a name is used twice");
    }

    #[test]
    fn no_two_processes_share_an_address_and_all_stay_inside_the_prefix() {
        let plan = Plan::new(Path::new("/d"), [127, 44]);
        let mut seen = HashSet::new();
        for process in plan.processes() {
            assert!(process.ready.to_string().starts_with("127.44."), "{process:?}");
            for flag in ["--listen", "--bind", "--border", "--inner"] {
                if let Some(at) = process.args.iter().position(|a| a == flag) {
                    assert!(
                        seen.insert(process.args[at + 1].clone()),
                        "{} is used twice",
                        process.args[at + 1]
                    );
                }
            }
        }
    }

    #[test]
    fn the_manifests_of_the_demo_are_accepted_by_apply() {
        for cluster in CLUSTERS {
            let manifests = crate::manifest::parse("objects.yaml", &manifest(cluster)).unwrap();
            assert_eq!(manifests.len(), if cluster == "east" { 2 } else { 1 });
        }
    }

    #[test]
    fn a_token_is_made_before_it_is_used_and_never_stands_in_an_argument() {
        let mut made = HashSet::new();
        for step in &plan().steps {
            match step {
                Step::Run { stdout: Some(path), .. } => {
                    made.insert(text(path));
                }
                Step::Run { stdin: Some(path), .. } => assert!(made.contains(&text(path))),
                Step::Start(process) => {
                    for argument in process.args.iter().filter(|a| a.ends_with(".token")) {
                        assert!(made.contains(argument), "{argument}");
                    }
                }
                _ => {}
            }
        }
        assert!(made.len() >= 10);
    }
}
