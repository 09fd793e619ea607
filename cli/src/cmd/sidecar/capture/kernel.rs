//! The programs that change the kernel: `nft` for the rules, `ip` for the routes of virtual addresses. Each call is one
//! transaction or one that may be repeated.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ipnet::IpNet;
use tombolo_runtime::settings;

use super::rules::{DATAGRAM_MARK, TABLE};
use crate::failure::Failure;

/// Marks our routes: no routing daemon's number.
const ROUTE_PROTOCOL: &str = "116";
/// A real route to the same range comes before ours.
const ROUTE_METRIC: &str = "7447";

/// `nft`, found once.
#[derive(Debug)]
pub struct Nft(PathBuf);

impl Nft {
    /// `named`: given by the operator; else the one in `PATH`.
    pub fn find(named: Option<PathBuf>) -> Result<Self, Failure> {
        match named.or_else(|| in_path("nft")) {
            Some(path) if path.is_file() => Ok(Self(path)),
            Some(path) => Err(Failure::new(format_args!("--nft {}: there is no such program", path.display()))
                .remedy("leave --nft out to use the one in PATH")),
            None => Err(Failure::new("there is no nft in PATH: connections are captured by nftables").remedy(
                "install it (Debian: apt install nftables), or name it with --nft /usr/sbin/nft; nothing was changed",
            )),
        }
    }

    /// Runs one transaction: all of it or nothing.
    pub fn apply(&self, rules: &str) -> Result<(), Failure> {
        let mut child = self.start(&["-f", "-"])?;
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(rules.as_bytes()));
        let output = child.wait_with_output().map_err(|error| self.failed(&error))?;
        if !output.status.success() {
            return Err(refused("nft", &output.stderr));
        }
        // A program that ended well without having read everything is none that we know.
        written.transpose().map(|_| ()).map_err(|error| self.failed(&error))
    }

    /// The table as `nft` writes it, as text or as JSON; `None`: there is none.
    pub fn list(&self, json: bool) -> Result<Option<String>, Failure> {
        let list = ["list", "table", "inet", TABLE];
        let args: Vec<&str> = json.then_some("-j").into_iter().chain(list).collect();
        let output = self.start(&args)?.wait_with_output().map_err(|error| self.failed(&error))?;
        if output.status.success() {
            return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        let missing = String::from_utf8_lossy(&output.stderr).contains("No such file or directory");
        if missing { Ok(None) } else { Err(refused("nft", &output.stderr)) }
    }

    fn start(&self, args: &[&str]) -> Result<std::process::Child, Failure> {
        let mut command = Command::new(&self.0);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &std::io::Error) -> Failure {
        Failure::new(format_args!("{} can't be run: {error}", self.0.display()))
    }
}

/// The first program of that name in `PATH`.
fn in_path(program: &str) -> Option<PathBuf> {
    let path = settings::environment("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|dir| dir.join(program));
    candidates.find(|candidate| candidate.is_file())
}

fn refused(program: &str, stderr: &[u8]) -> Failure {
    let text = String::from_utf8_lossy(stderr);
    // Its first line says it; the others point into our own text.
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("it says no reason").trim();
    let failure = Failure::new(format_args!("{program} refused: {line}"));
    if text.contains("Operation not permitted") || text.contains("you must be root") {
        return failure.remedy("run it as root, or with CAP_NET_ADMIN; nothing was changed");
    }
    failure.remedy("the kernel may lack a part of nftables (nat, tproxy, socket, fib); nothing was changed")
}

/// Routes virtual ranges to this machine itself: a connection is captured after it has found a route, and without a
/// default route there is none; with one, what is not captured would leave the machine. True: IPv6 is off here, and its
/// ranges were left out.
pub fn route(ranges: &[IpNet]) -> Result<bool, Failure> {
    let ip = match in_path("ip") {
        Some(ip) => ip,
        None if ranges.is_empty() => return Ok(false),
        None => {
            return Err(Failure::new("there is no ip in PATH: virtual addresses need a route")
                .remedy("install it (Debian: apt install iproute2); nothing was changed"));
        }
    };
    let without_v6 = !has_loopback_v6(Path::new("/proc/net/if_inet6"));
    let mut left_out = false;
    for range in ranges {
        let (family, source) = if range.addr().is_ipv4() { ("-4", "127.0.0.1") } else { ("-6", "::1") };
        if family == "-6" && without_v6 {
            left_out = true;
            continue;
        }
        let range = range.to_string();
        let ours = ["proto", ROUTE_PROTOCOL, "metric", ROUTE_METRIC];
        let args = [&[family, "route", "replace", &range, "dev", "lo", "src", source][..], &ours].concat();
        run(&ip, &args)?;
    }
    for family in if without_v6 { &["-4"][..] } else { &["-4", "-6"] } {
        let listed = run(&ip, &[family, "-N", "route", "show", "proto", ROUTE_PROTOCOL])?;
        let destinations = listed.lines().filter_map(|line| line.split_whitespace().next());
        for old in destinations.filter(|old| !is_among(old, ranges)) {
            run(&ip, &[family, "route", "del", old, "dev", "lo", "metric", ROUTE_METRIC])?;
        }
    }
    Ok(left_out)
}

/// Of the rule and the table by which captured datagrams come in again; the mark's number, for want of a better one.
const DATAGRAM_TABLE: &str = "29795";
/// Before the main table's rule at 32766, and those of routing daemons.
const RULE_PRIORITY: &str = "7447";

/// Leads what the rules have marked to this machine itself; `wanted` false takes that away. True: IPv6 is off here.
pub fn route_datagrams(wanted: bool) -> Result<bool, Failure> {
    let Some(ip) = in_path("ip") else {
        return match wanted {
            false => Ok(false),
            true => Err(Failure::new("there is no ip in PATH: captured datagrams need a route")
                .remedy("install it (Debian: apt install iproute2); no rules were changed")),
        };
    };
    let without_v6 = !has_loopback_v6(Path::new("/proc/net/if_inet6"));
    let mark = format!("{DATAGRAM_MARK:#x}");
    for family in if without_v6 { &["-4"][..] } else { &["-4", "-6"] } {
        let listed = run(&ip, &[family, "-N", "rule", "show"])?;
        let ours = listed.lines().filter(|line| is_our_rule(line, &mark)).count();
        let rule = ["fwmark", &mark, "lookup", DATAGRAM_TABLE, "priority", RULE_PRIORITY];
        let route = ["local", "default", "dev", "lo", "table", DATAGRAM_TABLE];
        if wanted {
            run(&ip, &[&[family, "route", "replace"][..], &route, &["proto", ROUTE_PROTOCOL]].concat())?;
        }
        for _ in usize::from(wanted)..ours {
            run(&ip, &[&[family, "rule", "del"][..], &rule].concat())?;
        }
        if wanted && ours == 0 {
            run(&ip, &[&[family, "rule", "add"][..], &rule].concat())?;
        }
        // A table that was never made can't be listed.
        if !wanted && ours > 0 {
            run(&ip, &[family, "route", "flush", "table", DATAGRAM_TABLE])?;
        }
    }
    Ok(without_v6)
}

/// Whether captured datagrams find their way in, in each family that this machine has.
pub fn routes_datagrams() -> Result<bool, Failure> {
    let Some(ip) = in_path("ip") else { return Ok(false) };
    let without_v6 = !has_loopback_v6(Path::new("/proc/net/if_inet6"));
    let mark = format!("{DATAGRAM_MARK:#x}");
    for family in if without_v6 { &["-4"][..] } else { &["-4", "-6"] } {
        if !run(&ip, &[family, "-N", "rule", "show"])?.lines().any(|line| is_our_rule(line, &mark)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a line of `ip rule show` is ours: `7447: from all fwmark 0x7463 lookup 29795`.
fn is_our_rule(line: &str, mark: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let has = |key: &str, value: &str| words.windows(2).any(|pair| pair == [key, value]);
    line.starts_with(&format!("{RULE_PRIORITY}:")) && has("fwmark", mark) && has("lookup", DATAGRAM_TABLE)
}

/// Whether a destination, as `ip` writes it, is one of the ranges: it leaves the prefix of a single address out.
fn is_among(destination: &str, ranges: &[IpNet]) -> bool {
    let single = || destination.parse::<std::net::IpAddr>().map(IpNet::from).ok();
    destination.parse().ok().or_else(single).is_some_and(|range: IpNet| ranges.contains(&range))
}

fn has_loopback_v6(table: &Path) -> bool {
    std::fs::read_to_string(table).is_ok_and(|text| text.lines().any(|line| line.ends_with(" lo")))
}

fn run(program: &Path, args: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| Failure::new(format_args!("{} can't be run: {error}", program.display())))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.lines().next().unwrap_or("it says no reason");
        let failure = Failure::new(format_args!("ip {}: {line}", args.join(" ")));
        return Err(if text.contains("Operation not permitted") {
            failure.remedy("run it as root, or with CAP_NET_ADMIN; no rules were changed")
        } else {
            failure.remedy("the loopback device must be up, with its addresses; no rules were changed")
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_known_again_as_ip_writes_it() {
        let ranges: Vec<IpNet> =
            ["241.64.0.0/16", "241.1.1.1/32", "fd00:1::/64"].map(|r| r.parse().unwrap()).into();
        for written in ["241.64.0.0/16", "241.1.1.1", "fd00:1::/64"] {
            assert!(is_among(written, &ranges), "{written}");
        }
        assert!(!is_among("241.65.0.0/16", &ranges) && !is_among("default", &ranges));
    }

    #[test]
    fn only_the_rule_that_was_made_here_is_known_again() {
        assert!(is_our_rule("7447:\tfrom all fwmark 0x7463 lookup 29795 proto static", "0x7463"));
        for other in [
            "7447:\tfrom all fwmark 0x7464 lookup 29795",
            "100:\tfrom all fwmark 0x7463 lookup 29795",
            "7447:\tfrom all fwmark 0x7463 lookup main",
            "32766:\tfrom all lookup main",
        ] {
            assert!(!is_our_rule(other, "0x7463"), "{other}");
        }
    }

    #[test]
    fn a_refusal_keeps_what_nft_says_and_adds_what_to_do() {
        let text = refused("nft", b"Error: Could not process rule: Operation not permitted\ntable x\n^\n")
            .to_string();
        assert!(text.contains("Could not process rule: Operation not permitted"), "{text}");
        assert!(text.contains("as root"), "{text}");
    }
}
