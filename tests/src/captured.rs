//! What scenarios of captured connections share: the command that makes the rules, run in a namespace; rules as other
//! tools make them; clients that know nothing of the mesh; a neighbour that is no part of it.
//!
//! The neighbour is one veth away: [`HERE`] and [`HERE6`] are the machine's addresses on it, [`THERE`] and [`THERE6`] the
//! neighbour's.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::mesh::binary;
use crate::netns::{Namespace, VethEnd, veth};

pub const HERE: &str = "10.98.0.1";
pub const THERE: &str = "10.98.0.2";
pub const HERE6: &str = "fd98::1";
pub const THERE6: &str = "fd98::2";

/// How a program ended, and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "ended with {}: {}{}", self.code, self.out, self.err);
        Ok(self.out)
    }
}

/// Runs a program inside a namespace to its end.
pub fn run(namespace: &Namespace, program: &str, args: &[&str], stdin: &str) -> Result<Ended> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace.name(), program]).args(args);
    ended(command, stdin)
}

/// Runs a program to its end.
pub fn ended(mut command: Command, stdin: &str) -> Result<Ended> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // One that has ended without reading it says why by itself.
    let _ = child.stdin.take().context("no standard input")?.write_all(stdin.as_bytes());
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Ended {
        code: output.status.code().unwrap_or(-1),
        out: text(&output.stdout),
        err: text(&output.stderr),
    })
}

/// `tombolo sidecar capture ...` inside a namespace.
pub fn capture(namespace: &Namespace, args: &[&str]) -> Result<Ended> {
    let bin = binary()?.display().to_string();
    run(namespace, &bin, &[&["sidecar", "capture"], args].concat(), "")
}

/// Every rule of every tool in a namespace, as `nft` writes it.
pub fn ruleset(namespace: &Namespace) -> Result<String> {
    run(namespace, "nft", &["list", "ruleset"], "")?.ok()
}

/// A counter of the capture's own table.
pub fn counter(namespace: &Namespace, name: &str) -> Result<u64> {
    let json = capture(namespace, &["show", "-o", "json"])?;
    let shown: serde_json::Value = serde_json::from_str(&json.out).context(json.err)?;
    let counters = shown["counters"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = counters.iter().find(|counter| counter["name"] == name);
    found.and_then(|counter| counter["count"].as_u64()).with_context(|| format!("no {name}: {shown}"))
}

/// Wires a machine to a neighbour.
pub fn neighbour(machine: &Namespace) -> Result<Namespace> {
    let there = Namespace::create("neighbour")?;
    veth(
        VethEnd { namespace: machine, device: "lan", address: &format!("{HERE}/24") },
        VethEnd { namespace: &there, device: "lan", address: &format!("{THERE}/24") },
        1500,
    )?;
    machine.add_address("lan", &format!("{HERE6}/64"))?;
    there.add_address("lan", &format!("{THERE6}/64"))?;
    Ok(there)
}

/// Rules as docker makes them (port 8081 of this machine is a container's) and as kube-proxy does in both of its modes
/// (10.96.0.10:80 and 10.96.0.11:80 are services): all of them lead to the neighbour's port 80.
pub fn other_tools(machine: &Namespace) -> Result<()> {
    let to = format!("{THERE}:80");
    let iptables = format!(
        "*nat
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -j KUBE-POSTROUTING
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination {to}
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SVC-WEB -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -p tcp -j DNAT --to-destination {to}
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
*filter
:FORWARD DROP [0:0]
COMMIT
"
    );
    run(machine, "iptables-nft-restore", &[], &iptables)?.ok()?;
    machine.nft(&format!(
        "table ip kube-proxy {{
            map service-ips {{
                type ipv4_addr . inet_proto . inet_service : verdict
                elements = {{ 10.96.0.11 . tcp . 80 : goto service-web }}
            }}
            chain service-web {{ meta l4proto tcp dnat to {to}; }}
            chain services {{ ip daddr . meta l4proto . th dport vmap @service-ips; }}
            chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
        }}"
    ))?;
    machine.add_route("10.96.0.0/16", THERE.parse()?)
}

/// What `curl` gets from `/`; its last line.
pub fn curl(namespace: &Namespace, address: SocketAddr, seconds: u32) -> Result<String> {
    curl_as(namespace, &[], address, seconds)
}

/// The same started by another program, such as `setpriv`.
pub fn curl_as(namespace: &Namespace, by: &[&str], address: SocketAddr, seconds: u32) -> Result<String> {
    let (limit, url) = (seconds.to_string(), format!("http://{address}/"));
    let command = [by, &["curl", "-sS", "--fail", "-g", "--max-time", &limit, &url]].concat();
    let (program, args) = command.split_first().context("no program")?;
    let body = run(namespace, program, args, "")?.ok().with_context(|| url.clone())?;
    Ok(body.lines().last().unwrap_or_default().to_owned())
}

/// Accepts at an address and says who it is: `name`, then echoes. Ends with the value.
pub struct Greeter(crate::netns::NamespaceHandle, SocketAddr, Arc<AtomicBool>);

impl Greeter {
    pub fn start(namespace: &Namespace, address: SocketAddr, name: &'static str) -> Result<Self> {
        let listener =
            namespace.run(|| TcpListener::bind(address))?.with_context(|| format!("bind {address}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Relaxed) {
                    return;
                }
                std::thread::spawn(move || {
                    let mut stream = stream;
                    let mut buffer = [0; 1024];
                    let mut result = writeln!(stream, "{name}");
                    while let (Ok(()), Ok(count @ 1..)) = (&result, stream.read(&mut buffer)) {
                        result = stream.write_all(buffer.get(..count).unwrap_or_default());
                    }
                });
            }
        });
        Ok(Self(namespace.handle(), address, stop))
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.2.store(true, Relaxed);
        let (namespace, address) = (self.0.clone(), self.1);
        // Wakes the accept loop.
        let wake = move || {
            namespace.enter().map(|()| TcpStream::connect_timeout(&address, Duration::from_millis(200)))
        };
        let _ = std::thread::spawn(wake).join();
    }
}

/// An open connection to a [`Greeter`].
pub struct Talk {
    stream: TcpStream,
    pub greeting: String,
}

impl Talk {
    pub fn open(namespace: &Namespace, address: SocketAddr, limit: Duration) -> Result<Self> {
        let stream = namespace.run(|| TcpStream::connect_timeout(&address, limit))?;
        let mut stream = stream.with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        let (mut greeting, mut byte) = (String::new(), [0]);
        while byte != *b"\n" {
            stream.read_exact(&mut byte).with_context(|| format!("no greeting from {address}"))?;
            greeting.push(char::from(byte[0]));
        }
        Ok(Self { stream, greeting: greeting.trim().to_owned() })
    }

    /// Whether it still carries bytes both ways.
    pub fn say(&mut self, text: &str) -> Result<()> {
        self.stream.write_all(text.as_bytes())?;
        let mut back = vec![0; text.len()];
        self.stream.read_exact(&mut back)?;
        ensure!(back == text.as_bytes(), "the echo differs");
        Ok(())
    }

    pub fn peer(&self) -> Result<SocketAddr> {
        Ok(self.stream.peer_addr()?)
    }
}

/// Who answers at an address, or why nobody does, and after how long.
pub fn greeted(namespace: &Namespace, address: SocketAddr) -> (Result<String>, Duration) {
    let begun = Instant::now();
    let talk = Talk::open(namespace, address, Duration::from_secs(10));
    (talk.map(|talk| talk.greeting), begun.elapsed())
}

/// Whether an address refuses or resets a connection at once; an answer, or silence, is an error.
pub fn refused(namespace: &Namespace, address: SocketAddr) -> Result<()> {
    const AT_ONCE: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    let talk = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&address, AT_ONCE)?;
        stream.set_read_timeout(Some(AT_ONCE))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n")?;
        stream.read(&mut [0; 64])
    };
    use std::io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset};
    match namespace.run(talk)? {
        Err(error) if [ConnectionRefused, ConnectionReset, BrokenPipe].contains(&error.kind()) => Ok(()),
        other => bail!("{address} did not refuse: {other:?} after {:?}", begun.elapsed()),
    }
}

/// One request of a [`PatientLoad`]: how long it took, and what went wrong.
type Asked = (Duration, Result<()>);

/// Requests by clients that wait as long as TCP does, one after the other on each, until finished.
pub struct PatientLoad {
    stop: Arc<AtomicBool>,
    clients: Vec<std::thread::JoinHandle<Vec<Asked>>>,
}

impl PatientLoad {
    /// `who`: what every answer must contain.
    pub fn start(namespace: &Namespace, address: SocketAddr, who: &'static str, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |_| {
            let (stop, namespace) = (Arc::clone(&stop), namespace.handle());
            std::thread::spawn(move || {
                let mut answers = Vec::new();
                if let Err(error) = namespace.enter() {
                    return vec![(Duration::ZERO, Err(error.into()))];
                }
                while !stop.load(Relaxed) {
                    let begun = Instant::now();
                    let answer = ask(address, who);
                    answers.push((begun.elapsed(), answer));
                    std::thread::sleep(Duration::from_millis(20));
                }
                answers
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, clients }
    }

    /// How many requests, how long the slowest took, and what went wrong.
    pub fn finish(self) -> Result<(usize, Duration, Vec<String>)> {
        self.stop.store(true, Relaxed);
        let mut answers = Vec::new();
        for client in self.clients {
            answers.extend(client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?);
        }
        let slowest = answers.iter().map(|(took, _)| *took).max().unwrap_or_default();
        let wrong =
            |(took, answer): &Asked| answer.as_ref().err().map(|error| format!("after {took:?}: {error:#}"));
        Ok((answers.len(), slowest, answers.iter().filter_map(wrong).collect()))
    }
}

fn ask(address: SocketAddr, who: &str) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(30))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: mesh\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains(who), "{answer}");
    Ok(())
}

/// An address with a port, of either family.
pub fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse::<IpAddr>()?, port))
}
